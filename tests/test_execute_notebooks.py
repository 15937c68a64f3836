"""`make notebooks`, on small notebooks."""

import execute_notebooks
import nbformat
import pytest
from execute_notebooks import METADATA, NotSaved, chosen, cleaned, main, run, text_of
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
PICTURE = f"""import base64
from IPython.display import display
display({{"image/png": "{PNG}", "text/plain": "a dot"}}, raw=True)"""
WIDGETS = """from tqdm.auto import tqdm
import sys
for number in tqdm([1, 2]):
    print(number)
    sys.stdout.flush()"""


def write(path, *sources, title="# 01 · What?", tags=()):
    """A notebook that has never been run, with traces of another machine."""
    cells = [new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    cells[-1].metadata = {"tags": list(tags), "execution": {"iopub.status.idle": "now"}}
    metadata = {"kernelspec": {"name": "mine", "display_name": "Mine"}, "widgets": {"x": 1}}
    notebook = new_notebook(cells=[new_markdown_cell(title, id="title"), *cells], metadata=metadata)
    nbformat.write(notebook, path)
    return path


def test_a_notebook_that_succeeds_is_saved_without_a_trace_of_this_run(tmp_path):
    (tmp_path / "beside.txt").write_text("found")
    path = write(
        tmp_path / "01_ddpm.ipynb",
        "from pathlib import Path",
        "print(Path('beside.txt').read_text())",  # cells run in the notebook's folder
        WIDGETS,
        PICTURE,
        title="# 01 · What?\n![a dot](attachment:dot.png)",
        tags=["title-picture"],
    )
    run(path)
    text = path.read_text(encoding="utf-8")
    saved = nbformat.reads(text, as_version=4)
    nbformat.validate(saved)
    assert text == text_of(saved)
    assert cleaned(saved) == saved
    assert saved.metadata == METADATA
    title, *code = saved.cells
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[1].outputs == [new_output("stream", name="stdout", text="found\n")]
    [bar] = [o for o in code[2].outputs if o.output_type == "display_data"]
    [printed] = [o for o in code[2].outputs if o.output_type == "stream"]  # not one a flush
    assert list(bar.data) == ["text/plain"]
    assert printed.text == "1\n2\n"
    assert code[3].metadata == {"tags": ["title-picture"]}
    assert title.attachments == {"dot.png": {"image/png": PNG}}
    run(path)
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir() if ".tmp" in file.name] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "cell 'cell-1' fails: ZeroDivisionError: division by zero"),
        ("import warnings; warnings.warn('careful')", "cell 'cell-1' writes to stderr: "),
        ("open('01_ddpm.ipynb', 'a').write(' ')", "the file was changed while it ran"),
        # Sometimes the death is noticed one cell later.
        ("import os; os._exit(1)", "fails: Kernel died"),
    ],
)
def test_a_notebook_that_fails_is_not_saved(tmp_path, source, said):
    path = write(tmp_path / "01_ddpm.ipynb", "x = 1", source, "x = 2")
    before = path.read_text(encoding="utf-8")
    with pytest.raises(NotSaved) as caught:
        run(path)
    assert said in str(caught.value)
    assert path.read_text(encoding="utf-8").rstrip(" ") == before


def test_a_cell_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(execute_notebooks, "SECONDS_A_CELL", 1)
    path = write(tmp_path / "01_ddpm.ipynb", "import time", "time.sleep(60)")
    with pytest.raises(NotSaved, match="cell 'cell-1' fails"):
        run(path)


@pytest.mark.parametrize(("pictures", "attachments"), [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_a_title_picture_needs_one_picture_and_one_place(pictures, attachments):
    output = new_output("display_data", data={"image/png": PNG})
    title = "# 01 · What?" + "![a dot](attachment:dot.png)" * attachments
    cell = new_code_cell("", id="b", outputs=[output] * pictures)
    cell.metadata = {"tags": ["title-picture"]}
    notebook = new_notebook(cells=[new_markdown_cell(title, id="a"), cell])
    with pytest.raises(NotSaved, match=f"draws {pictures} pictures .* {attachments} attachments"):
        cleaned(notebook)


def test_a_source_that_holds_an_answer_is_folded_and_no_other():
    cells = [new_code_cell("", id="a"), new_code_cell("", id="b")]
    cells[0].metadata = {"tags": ["hide-input"]}
    cells[1].metadata = {"jupyter": {"source_hidden": True}}  # in somebody's window
    hidden, shown = cleaned(new_notebook(cells=cells)).cells
    folded = {"jupyter": {"source_hidden": True}, "cellView": "form"}
    assert hidden.metadata == {"tags": ["hide-input"], **folded}
    assert shown.metadata == {}


def test_all_are_run_and_the_times_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute_notebooks, "FOLDER", tmp_path)
    write(tmp_path / "00_quickstart.ipynb", "1 / 0")
    write(tmp_path / "01_ddpm.ipynb", "x = 1")
    assert main([]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("00_quickstart")
    assert first.endswith(
        " s   NOT saved: cell 'cell-0' fails: ZeroDivisionError: division by zero"
    )
    assert second.startswith("01_ddpm")
    assert second.endswith(" s   saved")
    assert main(["notebooks/01_ddpm.ipynb"]) == 0
    assert [path.stem for path in chosen([])] == ["00_quickstart", "01_ddpm"]
    with pytest.raises(SystemExit):
        main(["02"])
    assert "there is no notebook '02'; there are 00_quickstart, 01_ddpm" in capsys.readouterr().err
