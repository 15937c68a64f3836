"""What Sphinx is told. `make site` runs it in the folder that staging.py has filled.

With the tag `slides` it makes the slides of sphinx-revealjs, else the pages. Nothing is fetched
from elsewhere: theme, MathJax and reveal.js come with their Python packages. What depends on the
public address is given by build_site.py.
"""

import shutil
from importlib import metadata, resources
from pathlib import Path

HERE = Path(__file__).parent
SLIDES = tags.has("slides")  # Sphinx puts `tags` there

project = "Layered rendering diffusion"
author = "the lrd_helpers authors"
copyright = "2026, the lrd_helpers authors"
release = metadata.version("lrd_helpers")
html_title = project
html_static_path = revealjs_static_path = ["static"]
html_js_files = revealjs_js_files = ["site.js"]
html_copy_source = False

# ------------------------------------------------------------------ Markdown and notebooks

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = [] if SLIDES else ["slides"]
nb_execution_mode = "off"  # what is shown is what is committed
nb_render_markdown_format = "myst"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 4

# ------------------------------------------------------------------ formulas

MATHJAX = resources.files("mathjax") / "static" / "mathjax" / "es5"
for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions"):
    target = HERE / "static" / "mathjax" / part
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (MATHJAX / part).is_dir() else shutil.copy)(MATHJAX / part, target)
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

# ------------------------------------------------------------------ slides

if SLIDES:
    extensions += ["sphinx_revealjs"]
    revealjs_style_theme = "white"
    revealjs_css_files = ["slides.css"]
    revealjs_script_conf = {"hash": True, "slideNumber": True, "width": 1200, "height": 750}

# ------------------------------------------------------------------ pages

else:
    extensions += ["sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"]
    default_role = "code"  # docstrings have `names` as Markdown has them
    napoleon_attr_annotations = False  # they are in the signature already
    autodoc_member_order = "bysource"
    autodoc_typehints = "signature"
    html_context = {"default_mode": "auto"}
    html_theme = "pydata_sphinx_theme"
    html_css_files = ["site.css"]
    html_sidebars = {"index": []}
    html_theme_options = {
        "header_links_before_dropdown": 6,
        "navbar_end": ["theme-switcher", "navbar-icon-links"],
        "show_toc_level": 2,
        "footer_start": ["copyright"],
        "footer_end": [],
    }
