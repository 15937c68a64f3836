"""Build the site from the executed notebooks, without a network and without running them.

python site/build_site.py                     into outputs/site: `make site`
python site/build_site.py --output FOLDER     into FOLDER

Sphinx reads what staging.py makes of the repository's files. Any warning of Sphinx, any broken link
and anything that a page would fetch from elsewhere is named, and then there is no new site: the old
one stays as it was. Links to elsewhere are listed in `external-links.txt` of the site.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from links import checked
from staging import ROOT, SiteError, address_in, colab_link, notebooks_in, stage

# What comes with Sphinx, its theme and reveal.js, and what no browser needs.
ENDINGS = {".map", ".eot", ".ttf"}
LEFT_BEHIND = {".buildinfo", "objects.inv", "webpack-macros.html"}


def sphinx(builder: str, source: Path, site: Path, root: Path, *more: str) -> None:
    """Build the pages in `source` into `site`.

    Raises:
        SiteError: what Sphinx warns of, with the page and its line.
    """
    address = address_in(root)
    first = colab_link(address, notebooks_in(root)[0])
    settings = {
        "html_theme_options.github_url": address,
        "myst_substitutions.repository": f"[the repository]({address})",
        "myst_substitutions.first_chapter": f"[Open the first chapter in Colab]({first})",
    }
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    command += [f"--define={name}={value}" for name, value in settings.items()]
    command += ["--builder", builder, "--doctree-dir", str(site) + "-doctrees", *more]
    command += [str(source), str(site)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # for docstrings.py
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SiteError(f"Sphinx says:\n{done.stderr.replace(f'{source}/', '').strip()}")


def build(root: Path, output: Path) -> dict[str, list[str]]:
    """Build the site of the repository at `root` into the folder `output`, all of it or nothing.

    Returns the outer addresses that it links to, and the pages that do.

    Raises:
        SiteError: what is wrong with a notebook, a page or a link.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".site-") as name:
        work = Path(name)
        stage(root, work / "source")
        sphinx("html", work / "source", work / "site", root)
        if decks := sorted((work / "source" / "slides").glob("*.md")):
            options = ["--conf-dir", str(work / "source"), "--tag", "slides"]
            options += [f"--define=root_doc={decks[0].stem}"]
            sphinx("revealjs", work / "source" / "slides", work / "slides", root, *options)
            shutil.move(work / "slides", work / "site" / "slides")
        for path in (work / "site").rglob("*"):
            if path.suffix in ENDINGS or path.name in LEFT_BEHIND:
                path.unlink()
        faults, outer = checked(work / "site")
        if faults:
            raise SiteError("\n".join([f"{len(faults)} broken links:", *faults]))
        listed = [f"{address}  ({', '.join(pages)})" for address, pages in sorted(outer.items())]
        (work / "site" / "external-links.txt").write_text("\n".join([*listed, ""]), "utf-8")
        (work / "site" / ".nojekyll").touch()  # else GitHub's pages leave out _static
        if output.exists():
            output.rename(work / "old")
        (work / "site").rename(output)
    return outer


def main(arguments: Sequence[str]) -> int:
    """Build the site of this repository; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "site")
    output, began = parser.parse_args(arguments).output, time.monotonic()
    try:
        outer = build(ROOT, output)
    except SiteError as error:
        print(f"error: no site was built.\n{error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(
        f"{output}: {len(list(output.rglob('*.html')))} pages, {size / 1e6:.1f} MB, "
        f"{time.monotonic() - began:.0f} s; {len(outer)} links to elsewhere, not tried"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
