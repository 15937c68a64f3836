"""The site: what staging makes of notebooks, which links are broken, and a small site."""

import base64
import io
import shutil
import sys
from pathlib import Path

import pytest
from execute_notebooks import METADATA
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from public_address import badge, colab_link

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "site"))
from build_site import build, main  # noqa: E402
from docstrings import restructured  # noqa: E402
from links import checked  # noqa: E402
from slides import MOST_WORDS, slides, stacked, text_of_slide  # noqa: E402
from staging import PAGES, SLIDES, WIDGET_NOTE, SiteError, picture, relinked, shown, stage  # noqa: E402

ADDRESS = "https://github.com/ann/course"
ALT = "A map M_0 of [two] *red* cars, <bright> where the model looks"


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def figure() -> object:
    metadata = {"image/png": {"alt": ALT}}
    return new_output("display_data", data={"image/png": png()}, metadata=metadata)


def text(plain: str) -> object:
    return new_output("display_data", data={"text/plain": plain})


def notebook(name: str, *more: str) -> object:
    title = (
        f"{badge(ADDRESS, name)}\n\n# {name[:2]} · Why?\n\n![The first picture](attachment:a.png)"
    )
    cells = [
        new_markdown_cell(title, id="title", attachments={"a.png": {"image/png": png()}}),
        new_markdown_cell("**Time** about 20 minutes with the exercises.", id="time"),
        new_markdown_cell("## 1 · Where?\n\nSo:\n\n$$a=b\\qquad c=d$$", id="where"),
        new_code_cell("draw()", id="draw", execution_count=1, outputs=[text("50%|##"), figure()]),
        new_markdown_cell("**What to notice.** It is red.\n\n### Exercise 1 · Draw (easy)\n\nDo."),
        new_markdown_cell("\n\n".join(["[code](../lrd_helpers/a.py#L1)", *more]), id="links"),
        new_markdown_cell("## Summary\n\n1. Red.\n\n## References\n\nNobody.", id="end"),
    ]
    return new_notebook(metadata=METADATA, cells=cells)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A course of two small notebooks, of which the second has slides."""
    for folder in ("site", "notebooks", "figures", "lrd_helpers"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lrd_helpers" / "a.py").touch()
    (tmp_path / "pyproject.toml").write_text(f'[project]\nurls.Repository = "{ADDRESS}"\n')
    pages = tmp_path / "site" / "pages"
    shutil.copytree(ROOT / "site" / "pages", pages, ignore=shutil.ignore_patterns("*.md", "api"))
    toctree = "```{toctree}\n:glob:\n\nnotebooks/*\nTERMS\n```"
    terms = "# Terms\n\n## Words\n\n### Latent\n\nSee [the first](notebooks/00_quickstart.ipynb).\n"
    (tmp_path / "TERMS.md").write_text(terms)
    include = "```{include} cards.txt\n```\n\n```{include} slides.txt\n```"
    (pages / "index.md").write_text(
        f"# The course\n\n{{{{ first_chapter }}}}\n\n{include}\n\n{toctree}\n", encoding="utf-8"
    )
    write(notebook("00_quickstart"), tmp_path / "notebooks" / "00_quickstart.ipynb")
    links = "[before](00_quickstart.ipynb#where), [latent](../TERMS.md#latent)"
    write(notebook("01_ddpm", links), tmp_path / "notebooks" / "01_ddpm.ipynb")
    return tmp_path


# ------------------------------------------------------------------ a small site


@pytest.mark.slow
def test_a_small_site_is_built_whole_or_not_at_all(repository):
    output = repository / "outputs" / "site"
    outer = build(repository, output)
    assert f"{ADDRESS}/blob/main/lrd_helpers/a.py#L1" in outer
    assert "index.html" in outer[colab_link(ADDRESS, "00_quickstart")]
    page = (output / "notebooks" / "01_ddpm.html").read_text(encoding="utf-8")
    assert 'alt="A map M_0 of [two] *red* cars, &lt;bright&gt; where the model looks"' in page
    assert "00_quickstart.html#where" in page
    assert "../TERMS.html#latent" in page
    assert "50%" not in page
    deck = (output / "slides" / "01_ddpm.html").read_text(encoding="utf-8")
    assert "Exercise 1 · Draw" in deck
    assert (output / "_static" / "mathjax" / "tex-chtml.js").is_file()
    assert checked(output)[0] == []

    (output / "of-before").touch()
    broken = notebook("01_ddpm", "[to nothing](07_nothing.ipynb)")
    write(broken, repository / "notebooks" / "01_ddpm.ipynb")
    with pytest.raises(SiteError, match=r"notebooks/01_ddpm.ipynb:\d+.*07_nothing.ipynb"):
        build(repository, output)
    assert (output / "of-before").is_file()
    assert list(output.parent.iterdir()) == [output], "what was begun is cleared away"


def test_a_notebook_that_was_not_run_is_named(repository, tmp_path):
    empty = notebook("01_ddpm")
    empty.cells[3].execution_count = None
    write(empty, repository / "notebooks" / "01_ddpm.ipynb")
    with pytest.raises(SiteError, match=r"01_ddpm.ipynb: cell 'draw' was not run.*ARGS=01_ddpm"):
        stage(repository, tmp_path / "staged")


def test_a_course_without_notebooks_is_no_site(repository, tmp_path):
    shutil.rmtree(repository / "notebooks")
    with pytest.raises(SiteError, match="has none of the course's notebooks"):
        stage(repository, tmp_path / "staged")


def test_the_command_says_that_no_site_was_built(monkeypatch, capsys, tmp_path):
    def fails(root, output):
        raise SiteError("a broken link")

    monkeypatch.setattr("build_site.build", fails)
    assert main(["--output", str(tmp_path / "site")]) == 1
    assert capsys.readouterr().err == "error: no site was built.\na broken link\n"


def test_the_pages_and_slides_that_are_named_exist():
    assert [name for name in PAGES if not (ROOT / name).is_file()] == []
    assert [name for name in SLIDES if not (ROOT / "notebooks" / f"{name}.ipynb").is_file()] == []
    assert len(SLIDES) >= 3


# ------------------------------------------------------------------ staging


@pytest.mark.parametrize(
    ("link", "right"),
    [
        ("../lrd_helpers/a.py#L1", f"{ADDRESS}/blob/main/lrd_helpers/a.py#L1"),
        ("../lrd_helpers", f"{ADDRESS}/tree/main/lrd_helpers"),
        ("00_quickstart.ipynb", "00_quickstart.ipynb"),
        ("nothing.py", "nothing.py"),
        ("../../../elsewhere", "../../../elsewhere"),
        ("https://example.org/a.py", "https://example.org/a.py"),
        ("#where", "#where"),
    ],
)
def test_only_what_has_no_page_is_linked_at_the_public_address(repository, link, right):
    staged = ["notebooks/00_quickstart.ipynb"]
    linked = relinked(f"see [it]({link}).", "notebooks/01_ddpm.ipynb", repository, staged)
    assert linked == f"see [it]({right})."


def test_outputs_are_shown_as_a_page_can(tmp_path):
    assert shown(text("  3%|▎   | 1/30"), "a", tmp_path) is None
    widget = shown(text("VBox(children=())"), "a", tmp_path)
    assert widget.data["text/markdown"] == WIDGET_NOTE
    assert shown(text("tensor(1.)"), "a", tmp_path) == text("tensor(1.)")
    made = shown(figure(), "cell-0", tmp_path / "01_ddpm")
    assert made.data["text/markdown"] == picture(ALT, "01_ddpm/cell-0.png")
    assert (tmp_path / "01_ddpm" / "cell-0.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ links


@pytest.mark.parametrize(
    ("tag", "fault"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="b.html">', None),
        ('<a href="sub/">', None),
        ('<a href="#here">', None),
        ('<a href="https://example.org">', None),
        ('<img src="data:image/png;base64,">', None),
        ('<a href="c.html">', "a.html: a link to c.html, which is not there"),
        ('<img src="c%20d.png">', "a.html: a link to c%20d.png, which is not there"),
        ('<a href="b.html#gone">', "a.html: a link to b.html#gone, a page without this anchor"),
        ('<a href="sub/#gone">', "a.html: a link to sub/#gone, a page without this anchor"),
        ('<a href="#gone">', "a.html: a link to #gone, a page without this anchor"),
        ('<script src="//example.org/x.js">', "a.html: <script> fetches //example.org/x.js"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "a.html: <link> fetches"),
    ],
)
def test_broken_links_are_named(tmp_path, tag, fault):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text("<p>")
    (tmp_path / "b.html").write_text("<p id='there'>")
    (tmp_path / "a.html").write_text(f"<p id='here'>{tag}")
    faults, outer = checked(tmp_path)
    assert [found[: len(fault or "")] for found in faults] == ([fault] if fault else [])
    assert outer == ({"https://example.org": ["a.html"]} if 'org">' in tag and not fault else outer)


def test_links_to_elsewhere_are_collected_with_their_pages(tmp_path):
    for name in ("a.html", "b.html"):
        (tmp_path / name).write_text('<a href="https://example.org/x">')
    assert checked(tmp_path) == ([], {"https://example.org/x": ["a.html", "b.html"]})


# ------------------------------------------------------------------ slides


def test_a_slide_has_few_words_and_whole_sentences():
    sentence = "Ten words are in each of these sentences of mine."
    assert text_of_slide(" ".join([sentence] * 20)) == " ".join([sentence] * (MOST_WORDS // 10))
    assert text_of_slide(f"{sentence}\n\n{sentence}") == f"{sentence}\n\n{sentence}"
    assert text_of_slide(f"[a link](b.ipynb)\n\n{' '.join([sentence] * 9)}") == "a link"


def test_slides_follow_the_notebook(tmp_path):
    staged = notebook("01_ddpm")
    staged.cells[3].outputs = [shown(figure(), "draw-1", tmp_path / "01_ddpm")]
    deck = [block for block in slides(staged).split("\n\n") if not block.startswith(":::")]
    assert deck == [
        "---\norphan: true\n---",
        "# 01 · Why?",
        "![The first picture](attachment:a.png)",
        "## 1 · Where?",
        stacked("$$a=b\\qquad c=d$$"),
        picture(ALT, "01_ddpm/draw-1.png"),
        "It is red.",
        "### Exercise 1 · Draw (easy)",
        "Do.",
        "## Summary",
        "1. Red.",
        "",
    ]
    assert stacked("$$a=b\\qquad c=d$$").count(r"\\[1em]") == 1


# ------------------------------------------------------------------ docstrings


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        (["|x| of `a|b`, height_ and a_b"], [r"\|x\| of `a|b`, height\_ and a_b"]),
        (
            ["What.", "", "    x = 1", ""],
            ["What.", "", ".. code-block:: default", "", "    x = 1", ""],
        ),
        (["Args:", "    x: it", "", "    y: too"], ["Args:", "    x: it", "", "    y: too"]),
        (
            ["| a | b |", "|---|---|", "| 1 | 2 |"],
            ["", ".. list-table::", "   :header-rows: 1", "", "   * - a", "     - b", "   * - 1"]
            + ["     - 2", ""],
        ),
    ],
)
def test_docstrings_mean_in_sphinx_what_they_mean_in_markdown(lines, right):
    assert restructured(lines) == right
