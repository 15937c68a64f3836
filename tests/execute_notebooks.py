"""Run notebooks from the top and save them as they are committed: `make notebooks`.

python tests/execute_notebooks.py             all of them
python tests/execute_notebooks.py 01_ddpm     this one

A notebook is saved in place, and only if every cell succeeded and nothing was written to stderr.
What differs from run to run or from machine to machine is not saved: times, versions, the state of
widgets. `test_notebooks.py` holds what is committed against `cleaned` and `text_of`; that is why
this script lives with the tests.

The picture of a cell with the tag `title-picture` is also copied into the title, where the text
shows it as an attachment: the first thing one sees is what the notebook really draws.

The source of a cell with the tag `hide-input` is folded in Jupyter and Colab: it holds an answer,
or it only makes data or plots, and nobody needs to read it.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from lrd_helpers.files import write_atomically

FOLDER = Path(__file__).parent.parent / "notebooks"
SECONDS_A_CELL = 1200
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
"""Of every notebook; what Jupyter adds (the version of Python, for one) is of one machine."""

CELL_METADATA = ("tags", "cellView")
"""What a cell may have; the rest is times and what was folded in somebody's window."""

WIDGET = "application/vnd.jupyter.widget-view+json"
TITLE_PICTURE = "title-picture"
HIDDEN_SOURCE = "hide-input"  # Jupyter Book's name for it
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}  # Jupyter's and Colab's


class NotSaved(Exception):
    """Why a notebook was not saved, in one sentence."""


def run(path: Path) -> None:
    """Execute the notebook at `path` and save it there.

    Raises:
        NotSaved: a cell fails, takes too long or writes to stderr, or the file was changed
            meanwhile. The file is as it was.
    """
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    with tqdm(total=len(code), unit="cell", desc=path.stem, leave=False, disable=None) as progress:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=SECONDS_A_CELL,
            resources={"metadata": {"path": str(path.parent)}},
            extra_arguments=["--log-level=ERROR"],  # of the kernel itself, not of the cells
            coalesce_streams=True,
            record_timing=False,
            store_widget_state=False,
            on_cell_executed=lambda **_: progress.update(),
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            unfinished = (cell for cell in code if _failed(cell) or cell.execution_count is None)
            where = next(unfinished, code[-1]).id
            raise NotSaved(f"cell {where!r} fails: {_last_line(str(error))}") from error
    for cell in code:
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise NotSaved(f"cell {cell.id!r} writes to stderr: {_last_line(output.text)}")
    if path.read_text(encoding="utf-8") != text:
        raise NotSaved("the file was changed while it ran; run it again")
    write_atomically(path, text_of(cleaned(notebook)).encode())


def _failed(cell: NotebookNode) -> bool:
    return any(output.output_type == "error" for output in cell.outputs)


def _last_line(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text).strip().splitlines()[-1]


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is saved: without anything that another run or machine would change."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {name: cell.metadata[name] for name in CELL_METADATA if name in cell.metadata}
        )
        if HIDDEN_SOURCE in cell.metadata.get("tags", []):
            cell.metadata.update(nbformat.from_dict(FOLDED))
        for output in cell.get("outputs", []):
            # Without the state, which is not saved, its place would show an error.
            output.get("data", {}).pop(WIDGET, None)
    for cell in notebook.cells:
        if TITLE_PICTURE in cell.metadata.get("tags", []):
            _copy_to_title(cell, notebook.cells[0])
    return notebook


def _copy_to_title(cell: NotebookNode, title: NotebookNode) -> None:
    pictures = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    names = re.findall(r"\(attachment:([^)\s]+)\)", title.source)
    if len(pictures) != 1 or len(names) != 1:
        raise NotSaved(
            f"cell {cell.id!r} has the tag {TITLE_PICTURE!r}, but draws {len(pictures)} pictures "
            f"and the title shows {len(names)} attachments; it should be one each"
        )
    title.attachments = nbformat.from_dict({names[0]: {"image/png": pictures[0].replace("\n", "")}})


def text_of(notebook: NotebookNode) -> str:
    """What the notebook's file holds: one line a line of source, so that changes can be read."""
    return nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n"


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks of these names or paths; all, if there are none.

    Raises:
        FileNotFoundError: a name that is none of them.
    """
    there = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in names:
        if Path(name).stem not in there:
            raise FileNotFoundError(f"there is no notebook {name!r}; there are {', '.join(there)}")
    return [there[Path(name).stem] for name in names] or list(there.values())


def main(arguments: Sequence[str]) -> int:
    """Run the notebooks one after the other; returns the exit code: 1 if one was not saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_ddpm; default: all")
    try:
        paths = chosen(parser.parse_args(arguments).names)
    except FileNotFoundError as error:
        parser.error(str(error))
    failed = False
    for path in paths:
        start = time.perf_counter()
        try:
            run(path)
            what = "saved"
        except NotSaved as error:
            failed, what = True, f"NOT saved: {error}"
        print(f"{path.stem:24} {time.perf_counter() - start:5.0f} s   {what}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
