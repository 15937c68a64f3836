"""From the repository's files to the sources that Sphinx reads, without running anything.

The staged folder has the shape of the repository (`notebooks/`, `figures/`, README.md …) with the
pages of `site/` at its top, so links between Markdown files and notebooks stay as they are. A link
to any other file of the repository becomes a link to its public address. Slides are a second such
folder, a Markdown file a chapter, made from the same notebooks.
"""

from __future__ import annotations

import base64
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from public_address import address_in, badge, colab_link, notebooks_in, question  # noqa: E402
from slides import markdown_of, slides  # noqa: E402

PAGES = {
    "README.md": "",
    "TERMS.md": "",
    "CHANGELOG.md": "",
    "benchmarks/README.md": "",
    "classroom/README.md": "",
    "figures/benchmark.md": "All numbers of the benchmark",
    "lrd_helpers/training/README.md": "",
}
"""The Markdown files that become pages, and a title for those that have none."""

SLIDES = ("01_ddpm", "06_cross_attention", "08_layered_rendering")
"""The chapters that have slides."""

BAR = re.compile(r"\d+%\|")  # what a progress bar leaves in a saved notebook
WIDGET = re.compile(r"[A-Z]\w*\(")  # the repr of a widget, which draws nothing without a kernel
WIDGET_NOTE = "*Here is something to drag and click when the notebook runs.*"


class SiteError(ValueError):
    """Why there is no site, in one sentence."""


# ------------------------------------------------------------------ links and pictures


def relinked(text: str, page: str, root: Path, staged: Iterable[str]) -> str:
    """Markdown `text` of the file `page` with links to unstaged files at their public address.

    A link that leads nowhere stays: Sphinx names it, and the build ends.
    """
    there, address = set(staged), address_in(root)

    def link(match: re.Match[str]) -> str:
        target, hash_, fragment = match[1].partition("#")
        path = (root / page).parent.joinpath(target).resolve()
        if not path.exists() or not path.is_relative_to(root.resolve()):
            return match[0]
        name = path.relative_to(root.resolve()).as_posix()
        if name in there:
            return match[0]
        return f"]({address}/{'tree' if path.is_dir() else 'blob'}/main/{name}{hash_}{fragment})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", link, text)


def picture(alt: str, file: str) -> str:
    """Markdown for a picture; what `alt` says is text, whatever signs it has."""
    escaped = re.sub(r"([\\`*_{}\[\]<>$~])", r"\\\1", " ".join(alt.split()))
    return f"![{escaped}]({quote(file)})"


# ------------------------------------------------------------------ notebooks


def shown(output: NotebookNode, stem: str, folder: Path) -> NotebookNode | None:
    """An output as the page shows it; none for what only a running kernel shows.

    A figure's picture goes to the file `stem`.png in `folder`, and its alternative text with it:
    MyST-NB itself reads no alternative text from a saved output.
    """
    data = output.get("data", {})
    if "image/png" in data:
        folder.mkdir(exist_ok=True)
        (folder / f"{stem}.png").write_bytes(base64.b64decode(data["image/png"]))
        alt = output.metadata.get("image/png", {}).get("alt", "")
        markdown = picture(alt, f"{folder.name}/{stem}.png")
    elif set(data) == {"text/plain"} and BAR.search(data["text/plain"]):
        return None
    elif set(data) == {"text/plain"} and WIDGET.match(data["text/plain"]):
        markdown = WIDGET_NOTE
    else:
        return output
    return new_output("display_data", data={"text/markdown": markdown})


def staged_notebook(path: Path, folder: Path, root: Path, staged: Iterable[str]) -> NotebookNode:
    """The notebook at `path` as Sphinx reads it; its pictures are written to a folder in `folder`.

    Raises:
        SiteError: it was not run.
    """
    notebook, address = nbformat.read(path, as_version=4), address_in(root)
    file = f"{address}/blob/main/notebooks/{path.name}"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            opens = f"[Open in Colab]({colab_link(address, path.stem)}) · [the notebook]({file})"
            cell.source = cell.source.replace(badge(address, path.stem), opens)
            cell.source = relinked(cell.source, f"notebooks/{path.name}", root, staged)
            for name, data in cell.pop("attachments", {}).items():
                (folder / path.stem).mkdir(exist_ok=True)
                (folder / path.stem / name).write_bytes(base64.b64decode(data["image/png"]))
                cell.source = cell.source.replace(
                    f"(attachment:{name})", f"({path.stem}/{quote(name)})"
                )
        elif cell.cell_type == "code":
            if cell.execution_count is None:
                raise SiteError(
                    f"{path.name}: cell {cell.id!r} was not run, so the site would show no "
                    f"result; run `make notebooks ARGS={path.stem}`"
                )
            kept = (
                shown(output, f"{cell.id}-{number}", folder / path.stem)
                for number, output in enumerate(cell.outputs)
            )
            cell.outputs = [output for output in kept if output is not None]
            if cell.id == "setup":
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    return notebook


# ------------------------------------------------------------------ the whole site


def minutes(notebook: NotebookNode) -> str:
    """How long a notebook takes with its exercises, as it says itself."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    said = re.search(r"^\*\*Time\*\* about (\d+) minutes", text, flags=re.MULTILINE)
    return f"{said[1]} minutes" if said else ""


def card(name: str, notebook: NotebookNode, asks: str) -> str:
    """A chapter's card on the front page: its question, minutes and first picture."""
    pictures = re.search(rf"!\[[^\n]*\]\({name}/[^)]*\)", markdown_of(notebook))
    image = pictures[0].replace(f"]({name}/", f"](notebooks/{name}/") if pictures else ""
    return f""":::{{grid-item-card}} {name.replace("_", " ")}
:link: notebooks/{name}
:link-type: doc

{image}

{asks}

```{{card-footer}}
{minutes(notebook)}
```
:::
"""


def lists(notebooks: dict[str, NotebookNode], root: Path) -> dict[str, str]:
    """What pages include: the chapters as cards and as a table, and the slides."""
    cards = ["::::{grid} 1 2 2 3\n:gutter: 3\n"]
    rows = ["| chapter | question | time |", "|---|---|---|"]
    decks = []
    for name, notebook in notebooks.items():
        asks, label = question(root / "notebooks" / f"{name}.ipynb"), name.replace("_", " ")
        cards.append(card(name, notebook, asks))
        rows.append(f"| [{label}](notebooks/{name}.ipynb) | {asks} | {minutes(notebook)} |")
        if name in SLIDES:
            decks.append(f'- <a href="slides/{name}.html">{label}: {asks}</a>')
    return {
        "cards.txt": "\n".join([*cards, "::::"]),
        "list.txt": "\n".join(rows),
        "slides.txt": "\n".join(decks),
    }


def stage(root: Path, folder: Path) -> None:
    """Write the sources of the site of the repository at `root` into the empty `folder`.

    Raises:
        SiteError: there are no notebooks, or one was not run.
    """
    names = notebooks_in(root)
    if not names:
        raise SiteError(f"{root / 'notebooks'} has none of the course's notebooks")
    shutil.copytree(root / "site" / "pages", folder, dirs_exist_ok=True)
    shutil.copytree(root / "figures", folder / "figures")
    pages = {name: title for name, title in PAGES.items() if (root / name).is_file()}
    staged = {*pages, *(f"notebooks/{name}.ipynb" for name in names)}
    staged |= {f"figures/{path.name}" for path in (root / "figures").glob("*.png")}
    for name, title in pages.items():
        text = relinked((root / name).read_text(encoding="utf-8"), name, root, staged)
        text = text.replace("[![Open In Colab][badge]]", "[Open in Colab]")  # fetches no picture
        # Sphinx publishes pictures of Markdown only.
        text = re.sub(r'<img src="([^"]+)" width="\d+" alt="">', r"![](\1)", text)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {title}\n\n{text}" if title else text, encoding="utf-8")
    notebooks = {}
    for sub in ("notebooks", "slides"):
        (folder / sub).mkdir()
    for name in names:
        path = root / "notebooks" / f"{name}.ipynb"
        notebooks[name] = staged_notebook(path, folder / "notebooks", root, staged)
        nbformat.write(notebooks[name], folder / "notebooks" / path.name)
        if name in SLIDES:
            (folder / "slides" / f"{name}.md").write_text(slides(notebooks[name]), "utf-8")
            shutil.copytree(folder / "notebooks" / name, folder / "slides" / name)
    for name, text in lists(notebooks, root).items():
        (folder / name).write_text(text, encoding="utf-8")
