"""The notebooks as files: what a learner's first look and every platform need.

That their outputs are right is nbval's part: `pytest` replays notebooks/ (see pyproject.toml).
"""

import re

import nbformat
import pytest
import tomllib
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_repository import MACHINE, NOTEBOOKS, PROJECT, REPOSITORY, ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = (
    "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb)"
)
SET_UP = f"""import sys

IN_COLAB = "google.colab" in sys.modules
if IN_COLAB:
    %pip install -q "git+{REPOSITORY}.git"
"""
MOST_BYTES = 1_500_000
SHORTEST_ALT = 30


def image_faults(cell: NotebookNode) -> list[str]:
    """Pictures that say nothing to somebody who cannot see them."""
    faults = [
        f"{cell.id}: a picture without an alternative text"
        for alt in re.findall(r"!\[([^\]]*)\]\((?!https://colab)", cell.source)
        if len(alt) < SHORTEST_ALT
    ]
    for output in cell.get("outputs", []):
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                alt = output.metadata.get(kind, {}).get("alt", "")
                if len(alt) < SHORTEST_ALT:
                    faults.append(f"{cell.id}: a picture without an alternative text")
    return faults


def faults(notebook: NotebookNode, name: str, size: int) -> list[str]:
    """What is wrong with a notebook of this name and size in bytes."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    printed = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in code
        for output in cell.outputs
    )
    found = [fault for cell in cells for fault in image_faults(cell)]
    if name not in NOTEBOOKS:
        found.append(f"{name} is no notebook of the course")
    if not text.startswith(BADGE.format(repository=REPOSITORY.split("github.com/")[1], name=name)):
        found.append("it does not begin with its Colab badge")
    if len(re.findall(r"^# ", text, flags=re.MULTILINE)) != 1:
        found.append("it has not exactly one title")
    if not code or not code[0].source.startswith(SET_UP):
        found.append("its first code cell is not the set-up cell")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("it was not run from the top to the end: nbval would compare nothing")
    if any(o.output_type == "error" for cell in code for o in cell.outputs):
        found.append("a cell ends in an error")
    if any(o.get("name") == "stderr" for cell in code for o in cell.outputs):
        found.append("a cell prints warnings")
    if match := MACHINE.search("\n".join([text, printed, *(cell.source for cell in code)])):
        found.append(f"a path of one machine: {match[0]}")
    if size > MOST_BYTES:
        found.append(f"{size / 1e6:.2f} MB, but at most {MOST_BYTES / 1e6:g} are allowed")
    if "widgets" in notebook.metadata:
        found.append("it holds widget state, which goes stale")
    for exercise in re.findall(r"^### Exercise.*?(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        folded = re.findall(r"<details><summary>(\w+)", exercise)
        if folded != ["Hint", "Hint", "Solution"]:
            found.append(f"{exercise.splitlines()[0]}: not two hints and a solution")
    found += [
        f"a link to {link}.ipynb, which is no notebook of the course"
        for link in re.findall(r"\]\((\w+)\.ipynb\)", text)
        if link not in NOTEBOOKS
    ]
    ids = [cell.id for cell in cells]
    found += [
        f"two cells have the id {one}" for one in sorted({i for i in ids if ids.count(i) > 1})
    ]
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_as_it_should_be(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert faults(notebook, path.stem, path.stat().st_size) == []


def test_there_are_notebooks_and_pytest_replays_them():
    assert PATHS
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = options["tool"]["pytest"]["ini_options"]
    assert "notebooks" in options["testpaths"]
    assert "--nbval " in options["addopts"]
    assert "--nbval-current-env" in options["addopts"]
    [sanitize] = re.findall(r"--nbval-sanitize-with=(\S+)", options["addopts"])
    assert (ROOT / sanitize).is_file()
    assert any(text.startswith("nbval") for text in PROJECT["optional-dependencies"]["development"])


# ------------------------------------------------------------------ would a fault be found?


def good() -> NotebookNode:
    badge = BADGE.format(repository=REPOSITORY.split("github.com/")[1], name="01_ddpm")
    exercise = "### Exercise 1\n" + "".join(
        f"<details><summary>{name}</summary>\n" for name in ("Hint 1", "Hint 2", "Solution")
    )
    picture = new_output(
        "display_data",
        data={"image/png": "iVBORw0KGgo="},
        metadata={"image/png": {"alt": "A picture that is described in a whole sentence."}},
    )
    notebook = new_notebook(
        cells=[
            new_markdown_cell(f"{badge}\n\n# Title\n[next](02_autoencoder.ipynb)", id="title"),
            new_code_cell(SET_UP, execution_count=1, id="setup"),
            new_markdown_cell(exercise, id="exercise"),
            new_code_cell("show()", execution_count=2, outputs=[picture], id="show"),
        ]
    )
    return notebook


def test_a_good_notebook_has_no_faults():
    assert faults(good(), "01_ddpm", 1000) == []


def no_alt(notebook):
    notebook.cells[3].outputs[0].metadata = {}


def no_markdown_alt(notebook):
    notebook.cells[0].source += "\n![](figure.png)"


def no_badge(notebook):
    notebook.cells[0].source = "# Title"


def two_titles(notebook):
    notebook.cells[2].source = "# Another\n" + notebook.cells[2].source


def no_set_up(notebook):
    notebook.cells[1].source = "import torch"


def not_executed(notebook):
    notebook.cells[3].execution_count = None


def an_error(notebook):
    notebook.cells[3].outputs = [new_output("error", ename="E", evalue="", traceback=[])]


def a_warning(notebook):
    notebook.cells[3].outputs = [new_output("stream", name="stderr", text="careful")]


def a_path(notebook):
    notebook.cells[3].outputs = [
        new_output("stream", name="stdout", text="/".join(["", "home", "ann", "x"]))
    ]


def widget_state(notebook):
    notebook.metadata["widgets"] = {}


def one_hint(notebook):
    notebook.cells[2].source = notebook.cells[2].source.replace("<summary>Hint 2", "<summary>")


def a_dead_link(notebook):
    notebook.cells[0].source += "[x](13_more.ipynb)"


def one_id_twice(notebook):
    notebook.cells[3].id = "setup"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_alt, "without an alternative text"),
        (no_markdown_alt, "without an alternative text"),
        (no_badge, "badge"),
        (two_titles, "exactly one title"),
        (no_set_up, "set-up cell"),
        (not_executed, "not run from the top"),
        (an_error, "ends in an error"),
        (a_warning, "warnings"),
        (a_path, "a path of one machine"),
        (widget_state, "widget state"),
        (one_hint, "not two hints"),
        (a_dead_link, "13_more"),
        (one_id_twice, "two cells have the id setup"),
    ],
)
def test_a_fault_would_be_found(spoil, said):
    notebook = good()
    spoil(notebook)
    [fault] = faults(notebook, "01_ddpm", 1000)
    assert said in fault


def test_a_large_or_unknown_notebook_would_be_found():
    assert len(faults(good(), "01_ddpm", MOST_BYTES + 1)) == 1
    assert any("no notebook of the course" in fault for fault in faults(good(), "99_x", 1))
