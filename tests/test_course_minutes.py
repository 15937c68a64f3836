"""How long the notebooks take: what they say is what is measured, and their cells stay short."""

import re

import course_minutes
import nbformat
import pytest
from course_minutes import (
    SIDE_ROAD,
    TIME,
    Part,
    is_side_road,
    lines,
    main,
    measured,
    measured_part,
    stated,
    table,
    together,
    words,
)
from execute_notebooks import METADATA, text_of
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from public_address import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES, MOST_WORDS = 25, 180

UNREAD = re.compile(r"<details>.*?</details>|^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) (?:\d+ · )?(.+)$", re.MULTILINE)


def form_faults(notebook: NotebookNode, name: str) -> list[str]:
    """What is wrong with the lengths of its cells, its side roads, and what it says they take."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and words(cell.source) > MOST_WORDS:
            found.append(f"{cell.id}: {words(cell.source)} words, but {MOST_WORDS} at most")
        if cell.cell_type == "code" and cell.id != "setup" and lines(cell) > MOST_LINES:
            found.append(f"{cell.id}: {lines(cell)} lines, but {MOST_LINES} at most")
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    said, right = TIME.findall(text), stated(name, notebook)
    if said != [right]:
        found.append(f"it says {said}, but should say {right!r}: run `make minutes ARGS=--write`")
    return found if is_side_road(name) else found + side_road_faults(notebook)


def side_road_faults(notebook: NotebookNode) -> list[str]:
    """Cells of a side road without the tag, others with it, and headings within a cell.

    A side road goes on until a heading of its level or above. An exercise below a subsection that
    is a side road may belong to it or not: its tag says so.
    """
    found, level = [], 0  # of the side road's heading; 0: core
    for cell in notebook.cells:
        tagged = SIDE_ROAD in cell.metadata.get("tags", [])
        text = UNREAD.sub("", cell.source) if cell.cell_type == "markdown" else ""
        for heading in HEADING.finditer(text):
            before, depth = level, len(heading[1])
            if heading[2].startswith("Side road:"):
                level = min(level, depth) if level else depth
            elif level and depth <= level:
                stays = heading[2].startswith("Exercise ") and depth == level and tagged
                level = level if stays else 0
            if bool(before) != bool(level) and text[: heading.start()].strip():
                found.append(f"{cell.id}: {heading[2]!r} should begin a cell of its own")
        if tagged != bool(level):
            what = f"lacks the tag {SIDE_ROAD!r}" if level else f"has the tag {SIDE_ROAD!r}"
            where = "within" if level else "outside of"
            found.append(f"{cell.id} {what}, but is {where} a section 'Side road: …'")
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_can_be_done_in_the_minutes_that_it_says(path):
    assert form_faults(nbformat.read(path, as_version=4), path.stem) == []


def test_the_core_path_takes_the_eight_hours_that_the_readme_says():
    of = {path.stem: measured(nbformat.read(path, as_version=4))[0].minutes for path in PATHS}
    spent = sum(m for name, m in of.items() if name < "11" and not is_side_road(name))
    assert spent <= 485
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(the core path of 00 to 10: about eight hours)" in readme


# ------------------------------------------------------------------ would a fault be found?


def short() -> NotebookNode:
    """A notebook of two sections, the second a side road with an exercise."""
    fold = "<details><summary>Hint 1</summary>\n\n" + "folded " * 500 + "\n</details>"
    tags = {"tags": [SIDE_ROAD]}
    cells = [
        new_markdown_cell("# 01 · What?\n![a picture of something](attachment:x.png)", id="title"),
        new_markdown_cell("**Time** unknown. **Device** any.", id="goals"),
        new_code_cell("import torch\n" * 60, id="setup"),
        new_markdown_cell("## 1 · Core\n\n" + "word " * 170, id="core"),
        new_code_cell("x = 1\n" * 25, id="core-code"),
        new_markdown_cell(f"### Exercise 1 · One (easy, 5 minutes)\n\n{fold}", id="exercise-1"),
        new_code_cell("def f(): ...\n\n\nchecks.check_f(f)", id="exercise-1-stub"),
        new_markdown_cell("## 2 · Side road: More\n\n" + "word " * 100, id="side", metadata=tags),
        new_code_cell("y = 1\n" * 20, id="side-code", metadata=tags),
        new_markdown_cell(
            "### Exercise 2 · Two (hard, 10 minutes)", id="exercise-2", metadata=tags
        ),
        new_markdown_cell("## 3 · Core again", id="again"),
        new_code_cell("Guess()\n" * 9, id="guess", metadata={"tags": ["hide-input"]}),
    ]
    notebook = new_notebook(metadata=METADATA, cells=cells)
    goals = notebook.cells[1]
    goals.source = TIME.sub(stated("01_ddpm", notebook), goals.source)
    return notebook


def cell(notebook: NotebookNode, name: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def test_minutes_are_words_lines_and_exercises():
    core, side = measured(short())
    # The title's 2 words, those of the headings, and what follows "Device".
    assert core == Part(words=2 + 2 + 2 + 170 + 6 + 3, code=25, exercises=5, waiting=1.5)
    assert side == Part(words=4 + 100 + 6, code=20, exercises=10)
    assert (core.minutes, side.minutes) == (3 + 5 + 2, 2 + 10)
    line = "**Time** about 10 minutes: reading 3, exercises 5, waiting 2; side roads another 12."
    assert cell(short(), "goals").source == f"{line} **Device** any."
    assert form_faults(short(), "01_ddpm") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one – two · *three*", 3),
        ("$$a = b + c$$ and $x + y$ too", 4),
        ("[two words](../README.md#a-b) <b>three</b>", 3),
        ("[![badge here](x.svg)](https://a.b) seen ![alt text](attachment:a.png)", 1),
        ("| a | b |\n|---|---|\n| 1 | – |", 3),
        ("seen <details><summary>Hint</summary>\n\nnot seen\n</details> seen", 2),
        ("**Time** about 9 minutes: reading 9. **Device** any CPU", 3),
    ],
)
def test_words_are_what_is_read(text, count):
    assert words(text) == count


def test_a_notebook_that_knows_how_long_running_takes_says_so():
    notebook = short()
    cell(notebook, "goals").source += " running everything takes about 200 seconds"
    assert "waiting 4;" in stated("01_ddpm", notebook)


def test_a_notebook_that_is_a_side_road_itself_counts_as_such():
    assert "about 21 minutes: reading 4, exercises 15, waiting 2." in stated("02b_vq", short())
    last = table({"01_ddpm": short(), "02b_vq": short()}).splitlines()[-1]
    assert last == f"core path {10 / 60:.1f} hours, side roads {(12 + 21) / 60:.1f}"
    assert form_faults(short(), "01b_more") != []  # the line is that of 01_ddpm
    assert together([Part(1, 2, 3, 4), Part(1, 1, 1, 1)]) == Part(2, 3, 4, 5)


def test_milestones_count_and_the_project_is_no_core_path():
    project = short()
    cell(project, "again").source = "## 3 · Draw (milestone, 20 minutes)"
    assert "about 41 minutes: reading 4, exercises 35, waiting 2." in stated("14_project", project)


def a_long_text(notebook):
    cell(notebook, "again").source += " word" * 181


def a_long_code(notebook):
    cell(notebook, "exercise-1-stub").source = "x = 1\n" * 26 + "\n\nchecks.check_f(f)"


def no_tag(notebook):
    cell(notebook, "side-code").metadata = {}


def a_tag_too_many(notebook):
    cell(notebook, "again").metadata = {"tags": [SIDE_ROAD]}


def a_heading_within_a_cell(notebook):
    side = cell(notebook, "side")
    side.source = f"So much for that.\n\n{side.source}"


def an_end_within_a_cell(notebook):
    cell(notebook, "exercise-2").source += "\n\n## 3 · Core\n"


def another_time(notebook):
    goals = cell(notebook, "goals")
    goals.source = goals.source.replace("about 10 minutes", "about 9 minutes")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (a_long_text, "again: 184 words, but 180 at most"),
        (a_long_code, "exercise-1-stub: 29 lines, but 25 at most"),
        (no_tag, "side-code lacks the tag 'side-road', but is within"),
        (a_tag_too_many, "again has the tag 'side-road', but is outside of"),
        (a_heading_within_a_cell, "side: 'Side road: More' should begin a cell of its own"),
        (an_end_within_a_cell, "exercise-2: 'Core' should begin a cell of its own"),
        (another_time, "about 9 minutes"),
    ],
)
def test_a_fault_would_be_found(spoil, said):
    notebook = short()
    spoil(notebook)
    if spoil is not another_time:
        goals = cell(notebook, "goals")
        goals.source = TIME.sub(stated("01_ddpm", notebook), goals.source)
    assert said in form_faults(notebook, "01_ddpm")[0]


@pytest.mark.parametrize("tags", [[], [SIDE_ROAD]])
def test_an_exercise_below_a_subsection_may_belong_to_it(tags):
    notebook = short()
    cell(notebook, "side").source = "### Side road: More"
    cell(notebook, "exercise-2").metadata = {"tags": tags}
    assert side_road_faults(notebook) == []


def test_a_section_that_is_a_side_road_may_follow_a_subsection_that_is():
    notebook = short()
    tags = {"tags": [SIDE_ROAD]}
    notebook.cells.insert(7, new_markdown_cell("### Side road: Play", id="play", metadata=tags))
    within = new_markdown_cell("### Within section 2", id="within", metadata=tags)
    notebook.cells.insert(9, within)
    assert side_road_faults(notebook) == []


# ------------------------------------------------------------------ the command


def test_the_line_is_written_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("execute_notebooks.FOLDER", tmp_path)
    notebook = short()
    right = text_of(notebook)
    another_time(notebook)
    path = tmp_path / "01_ddpm.ipynb"
    path.write_text(text_of(notebook), encoding="utf-8")
    assert main([]) == 0
    assert path.read_text(encoding="utf-8") == text_of(notebook), "only --write writes"
    assert main(["--write", "01_ddpm"]) == 0
    assert path.read_text(encoding="utf-8") == right
    assert capsys.readouterr().out.endswith("written\n")
    assert not course_minutes.write(path)


def test_a_notebook_without_a_place_for_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("execute_notebooks.FOLDER", tmp_path)
    notebook = short()
    cell(notebook, "goals").source = "No time."
    (tmp_path / "01_ddpm.ipynb").write_text(text_of(notebook), encoding="utf-8")
    assert main(["--write"]) == 2
    assert "01_ddpm.ipynb: 0 text cells have a line that begins" in capsys.readouterr().err
    assert main(["02_vq"]) == 2
    assert "there is no notebook '02_vq'" in capsys.readouterr().err


def test_a_part_is_its_goals_its_sections_and_the_exercises_that_are_named():
    cells = [
        new_markdown_cell("# 01 · Goals\n\nthree words here"),
        new_markdown_cell("## 1 · One\n\none two"),
        new_markdown_cell("### Exercise 1 · Jump (easy, 5 minutes)\n\nthree four"),
        new_code_cell("a = 1\nb = 2"),
        new_markdown_cell("### After it\n\nfive"),
        new_markdown_cell("### Exercise 2 · Fall (easy, 7 minutes)"),
        new_markdown_cell("## 2 · Two\n\nnot read"),
        new_markdown_cell("## Summary\n\nnot read"),
        new_markdown_cell("## 3 · Side road: no"),
    ]
    cells[4].metadata["tags"] = ["side-road"]
    notebook = new_notebook(cells=cells)
    part = measured_part(notebook, {1, 3}, {1})
    assert (part.exercises, part.code) == (5, 2)
    assert part.words == sum(words(cells[n].source) for n in (0, 1, 2, 8))
    assert measured_part(notebook, {1, 2}, {1, 2}).exercises == 12
