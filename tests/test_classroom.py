"""The teaching kit: copies of every notebook, and marks from nbgrader, whatever is handed in."""

import copy
import re
from collections import Counter

import nbformat
import pytest
from course_minutes import measured_part
from exercises import exercises_of
from grading import Execute, grade, restored
from kit import (
    HERE,
    ROOT,
    SKIPPED,
    assignment,
    guide,
    main,
    read_notebooks,
    solved_copy,
    student_copy,
    with_exercises,
    write_kit,
)
from nbformat.v4 import new_code_cell, new_markdown_cell
from nbgrader.preprocessors import ClearSolutions
from public_address import NAME, notebooks_in
from rehearsal import collected, hand_in, hand_in_three, released_course, unexpected, write

NOTEBOOKS = read_notebooks(ROOT / "notebooks")
ADDRESS = "https://github.com/someone/course"
EVERY = pytest.mark.parametrize("name", NOTEBOOKS)


def sources(notebook):
    return {cell.id: cell.source for cell in notebook.cells}


# ------------------------------------------------------------------ the copies


def test_the_kit_has_every_notebook_of_the_course_in_its_order():
    assert list(NOTEBOOKS) == notebooks_in(ROOT)


@EVERY
def test_a_student_copy_has_everything_but_solutions_and_outputs(name):
    notebook = NOTEBOOKS[name]
    student = student_copy(notebook, ADDRESS)
    nbformat.validate(student)
    before, after = sources(notebook), sources(student)
    assert list(before) == list(after)
    text = "\n".join(after.values())
    for exercise in exercises_of(notebook):
        assert after[exercise.stub] == before[exercise.stub]
        assert exercise.solution.strip() not in text
        assert after[exercise.text].count("<details><summary>Hint") == 2
        assert f"### Exercise {exercise.number} · " in after[exercise.text]
    assert "<summary>Solution" not in text
    assert "colab.research.google.com" not in text, "the badge would open the solutions"
    assert "](../" not in text
    assert f"{ADDRESS}/blob/main/" in text or "](../" not in "\n".join(before.values())
    code = [cell for cell in student.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert student.cells[0].attachments == notebook.cells[0].attachments
    assert notebook == read_notebooks(ROOT / "notebooks", [name])[name], "it is not changed"


@EVERY
def test_a_solved_copy_has_each_solution_in_place_of_its_stub(name):
    notebook = NOTEBOOKS[name]
    solved, before = sources(solved_copy(notebook, ADDRESS)), sources(notebook)
    exercises = exercises_of(notebook)
    for each in exercises:
        call = f"checks.{each.check}({each.answer})"
        assert solved[each.stub].split() == f"{each.solution}{call}".split()
    stubs = {each.stub for each in exercises}
    code = {cell.id for cell in notebook.cells if cell.cell_type == "code"}
    assert all(solved[cell] == before[cell] for cell in code - stubs)


@EVERY
def test_an_assignment_is_the_student_copy_with_points_below_each_stub(name):
    notebook = NOTEBOOKS[name]
    exercises = exercises_of(notebook)
    released = assignment(notebook, ADDRESS)
    given = sources(released)
    for each in exercises:
        assert each.solution in given[each.stub]
        points = given[f"exercise-{each.number}-points"]
        compile(points, name, "exec")
        assert points.endswith(f"points(checks.{each.check}, {each.answer}, of={each.points})")
    ClearSolutions(code_stub={"python": ""}).preprocess(released, {})
    nbformat.validate(released)
    given, student = sources(released), sources(student_copy(notebook, ADDRESS))
    assert [cell for cell in given if not re.match(r"exercise-\d-points", cell)] == list(student)
    for cell in released.cells:
        if cell.cell_type == "code" and cell.id in student:
            assert cell.source == student[cell.id], "nbgrader leaves the stub as it was"
    run = [
        c.id
        for c in released.cells
        if c.cell_type == "code" and SKIPPED not in c.metadata.get("tags", [])
    ]
    graded = [f"exercise-{each.number}-{kind}" for each in exercises for kind in ("stub", "points")]
    assert run == ["setup", *graded]
    links = re.findall(r"\]\((?!https?:|attachment:|#)([^)#\s]+)\)", "\n".join(given.values()))
    assert all(re.fullmatch(rf"\.\./({NAME})/\1\.ipynb", link) for link in links)


def spoilt(old, new, *, cell="exercise-1"):
    notebook = copy.deepcopy(NOTEBOOKS["01_ddpm"])
    [chosen] = [each for each in notebook.cells if each.id == cell]
    assert old in chosen.source
    chosen.source = chosen.source.replace(old, new)
    return notebook


@pytest.mark.parametrize(
    ("old", "new", "cell", "said"),
    [
        ("(easy, 5 minutes)", "", "exercise-1", "cell 'exercise-1': no heading like '### Exer"),
        ("easy", "trivial", "exercise-1", "with one of easy, medium, hard"),
        ("<summary>Solution", "<summary>Answer", "exercise-1", "0 folded solutions"),
        ("checks.check_jump(jump)", "", "exercise-1-stub", "ends in checks.check_…(…)"),
        ("Exercise 1", "Exercise 3", "exercise-1", "the numbers [3, 2, 3, 4]"),
    ],
)
def test_an_exercise_of_another_form_is_named(old, new, cell, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        exercises_of(spoilt(old, new, cell=cell))


def test_the_kit_says_in_a_sentence_why_there_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["02"]) == 2
    assert "there is no notebook '02'; there are 00_quickstart, 01_ddpm" in capsys.readouterr().err
    assert main(["01_ddpm", "--output", str(tmp_path / "file" / "kit")]) == 2
    assert "file is a file, but should be a folder" in capsys.readouterr().err


# ------------------------------------------------------------------ what is handed in


def released_cells():
    notebook = assignment(short(), ADDRESS)
    ClearSolutions(code_stub={"python": ""}).preprocess(notebook, {})
    return notebook


def short():
    """Notebook 01 with three of its exercises, a quick set-up and little else."""
    notebook = copy.deepcopy(NOTEBOOKS["01_ddpm"])
    exercises = exercises_of(notebook)[:3]
    kept = {"title", "goals", "setup", "push", *(each.text for each in exercises)}
    kept |= {each.stub for each in exercises}
    notebook.cells = [cell for cell in notebook.cells if cell.id in kept]
    for cell in notebook.cells:
        if cell.id == "setup":
            cell.source = (
                "from torch.nn import functional\nfrom lrd_helpers.checks import ddpm as checks"
            )
    return notebook


EXERCISES = exercises_of(short())


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def right_answers(work):
    write(work, EXERCISES, lambda exercise: exercise.solution)


def ids_are_lost(work):
    """As after a visit to an editor that knows neither the ids of cells nor nbgrader."""
    for number, cell in enumerate(work.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})


def the_points_are_deleted(work):
    work.cells = [cell for cell in work.cells if cell.id != "exercise-1-points"]


def the_points_are_raised(work):
    cell_of(work, "exercise-1-points").metadata.nbgrader.points = 100


def the_points_are_not_counted(work):
    """nbgrader gives all points to a cell that is not run."""
    cell_of(work, "exercise-1-points").metadata.tags = [SKIPPED]


def the_settings_are_no_settings(work):
    cell_of(work, "exercise-1-points").metadata.nbgrader = "mine"


def the_points_are_written(work):
    cell_of(work, "exercise-1-points").source = "100"


def the_set_up_is_changed(work):
    cell_of(work, "setup").source = "checks = None"


def the_answer_is_markdown(work):
    cell = cell_of(work, "exercise-1-stub")
    work.cells[work.cells.index(cell)] = new_markdown_cell(cell.source, id=cell.id)


def the_answer_is_there_twice(work):
    cell = copy.deepcopy(cell_of(work, "exercise-1-stub"))
    cell.source = "jump = 7"
    work.cells.append(cell)


@pytest.mark.parametrize(
    ("spoil", "noted"),
    [
        (lambda work: None, []),
        (ids_are_lost, ["the set-up cell was deleted: it was put back"]),
        (the_points_are_deleted, ["the points cell of exercise 1 was deleted: it was put back"]),
        (the_points_are_raised, ["the points cell of exercise 1 had other metadata than released"]),
        (the_points_are_not_counted, ["the points cell of exercise 1 had other metadata"]),
        (the_settings_are_no_settings, ["the points cell of exercise 1 had other metadata"]),
        (the_points_are_written, ["the points cell of exercise 1 was changed, which nobody may"]),
        (the_set_up_is_changed, ["the set-up cell was changed, which nobody may"]),
        (the_answer_is_markdown, ["the answer cell of exercise 1 had other metadata"]),
        (the_answer_is_there_twice, ["the answer cell of exercise 1 is there 2 times: the first"]),
    ],
)
def test_answers_are_put_into_the_notebook_as_it_was_released(spoil, noted):
    work, expected = released_cells(), released_cells()
    right_answers(work)
    right_answers(expected)
    spoil(work)
    graded, notes = restored(work, released_cells())
    nbformat.validate(graded)
    there = {cell.id: cell for cell in graded.cells}
    for cell in expected.cells:
        if cell.cell_type == "code":
            assert there[cell.id] == cell
    assert len(notes) >= len(noted)
    for said in noted:
        assert any(note.startswith(said) for note in notes), notes
    assert all(len(note) <= 300 and "\n" not in note for note in notes)


def test_an_answer_that_was_deleted_is_the_stub_again_and_what_was_added_is_run():
    work = released_cells()
    right_answers(work)
    place = [cell.id for cell in work.cells].index("exercise-1-stub")
    work.cells[place] = new_code_cell("half = 0.5", id="mine")
    graded, notes = restored(work, released_cells())
    ids = [cell.id for cell in graded.cells]
    assert sources(graded)["exercise-1-stub"] == sources(released_cells())["exercise-1-stub"]
    assert sources(graded)["exercise-2-stub"] == sources(work)["exercise-2-stub"]
    assert graded.cells[ids.index("exercise-1-stub") - 1].source == "half = 0.5"
    assert notes == ["the answer cell of exercise 1 was deleted: its empty stub was put back"]


FOREVER = """import time

def jump(*case):
    while True:
        time.sleep(1)
"""
LOUD = """
import sys
loss = noise_loss

def noise_loss(*case):
    print("✗", "x" * 300_000)
    print("careful", file=sys.stderr)
    return loss(*case)
"""


def odd(work):
    """Never ends, prints without end, has lost a cell, and an error in a cell of its own."""
    right_answers(work)
    cell_of(work, "exercise-1-stub").source = f"{FOREVER}\n\nchecks.check_jump(jump)"
    loud = cell_of(work, "exercise-2-stub")
    loud.source = loud.source.replace("\n\nchecks.", f"{LOUD}\n\nchecks.")
    work.cells = [cell for cell in work.cells if cell.id != "exercise-3-points"]
    work.cells.append(new_code_cell("1 / 0", id="mine"))


def dead(work):
    """Right in exercise 1; the points of 2 have lost their check; 3 ends the kernel."""
    right_answers(work)
    cell_of(work, "exercise-2-stub").source += "\ndel checks"
    cell_of(work, "exercise-3-stub").source = "import os\n\nos._exit(1)"


def test_output_beyond_the_limit_is_dropped_but_never_the_points():
    execute, cell = Execute(), new_code_cell("", id="exercise-1-points")
    execute._printed, execute.clear_before_next_output = Counter(), False

    def receive(kind, **content):
        heads = {"msg_type": kind, "header": {"msg_type": kind}, "parent_header": {}}
        execute.process_message({**heads, "content": content}, cell, 0)

    for _ in range(3):
        receive("stream", name="stdout", text="x" * 150_000)
        receive("display_data", data={"text/plain": "x" * 150_000}, metadata={})
    receive("error", ename="E", evalue="x" * 10**6, traceback=["x" * 10**6])
    points = {"data": {"text/plain": "2"}, "metadata": {}, "execution_count": 1}
    receive("execute_result", **points)
    assert cell.outputs[-1].data == points["data"]
    assert len(str(cell.outputs)) < 3 * execute.most_characters
    assert execute._printed[0] > 900_000


@pytest.mark.slow
def test_a_class_is_graded_whatever_one_of_it_hands_in(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    api = released_course(tmp_path, {"01_ddpm": short()})
    api.config.Execute.timeout = 6
    hand_in_three(api, "01_ddpm", EXERCISES)
    hand_in(api, "01_ddpm", "odd", odd)
    hand_in(api, "01_ddpm", "dead", dead)
    course = tmp_path / "course"
    for student, name, content in (("broken", "01_ddpm.ipynb", "{"), ("absent", "notes.txt", "")):
        file = course / "submitted" / student / "01_ddpm" / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
    marks = collected(api, "01_ddpm")
    assert unexpected(marks, EXERCISES) == []
    others = {name: (each.points, each.notes) for name, each in marks.items()}
    assert {name: others[name] for name in ("odd", "dead", "broken", "absent")} == {
        "odd": (
            4,
            [
                "the points cell of exercise 3 was deleted: it was put back",
                "the answer cell of exercise 1 took too long and was stopped",
                "the answer cell of exercise 2 printed 600,117 characters: the rest was dropped",
                "an added cell raises ZeroDivisionError: division by zero",
            ],
        ),
        "dead": (
            1,
            [
                "an answer ended the kernel: what comes after it was not run",
                "the points cell of exercise 2 raises NameError: name 'checks' is not defined "
                "(though it is as released)",
                "the points cell of exercise 3 raises NoPoints: no number came out of this cell "
                "(though it is as released)",
            ],
        ),
        "broken": (None, ["01_ddpm.ipynb is not a notebook: NotJSONError"]),
        "absent": (None, ["01_ddpm.ipynb was not handed in; there is notes.txt"]),
    }
    [graded] = (course / "autograded" / "odd").rglob("*.ipynb")
    assert graded.stat().st_size < 500_000
    shown = nbformat.read(graded, as_version=4).cells[0].source
    assert shown.splitlines()[2:] == [f"- {note}" for note in others["odd"][1]]
    with pytest.raises(ValueError, match="there is no assignment '02'"):
        next(grade(api, "02"))
    write_kit(tmp_path, {"01_ddpm": short()})  # once more: the class keeps what it has
    with api.gradebook as gradebook:
        assert gradebook.find_submission("01_ddpm", "right").score == 5
    assert (course / "submitted" / "right" / "01_ddpm" / "01_ddpm.ipynb").is_file()


# ------------------------------------------------------------------ the teacher's guide

README = (HERE / "README.md").read_text(encoding="utf-8")
PLANS = {
    int(hours): re.findall(r"^\| (\d+) \| (.+) \|$", table, flags=re.MULTILINE)
    for hours, table in re.findall(r"^### (\d+) hours\n(.*?)(?=^##|\Z)", README, re.M | re.S)
}


def numbers(text: str, what: str) -> set[int]:
    """ "sections 1 to 3, 6; …": 1, 2, 3 and 6."""
    listed = re.search(rf"{what}s? ([\d, to]+)", text)
    found = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed[1] if listed else ""):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def text_of(name):
    cells = NOTEBOOKS[name].cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def minutes_of(name):
    return int(re.search(r"^\*\*Time\*\* about (\d+) minutes", text_of(name), re.MULTILINE)[1])


@pytest.mark.parametrize("hours", [4, 8, 12])
def test_a_plan_fills_its_hours_with_sections_and_exercises_that_exist(hours):
    assert sum(int(minutes) for minutes, _ in PLANS[hours]) == 60 * hours
    spent: dict[str, int] = {}
    for minutes, what in PLANS[hours]:
        if named := re.match(rf"\[({NAME})\]\(\.\./notebooks/\1\.ipynb\): (.+)", what):
            name, part = named.groups()
            spent[name] = spent.get(name, 0) + int(minutes)
            if part == "the core path":
                assert int(minutes) == minutes_of(name)
                continue
            sections, chosen = numbers(part, "section"), numbers(part, "exercise")
            there = set(map(int, re.findall(r"^## (\d+) · ", text_of(name), re.MULTILINE)))
            exercises = [each for each in exercises_of(NOTEBOOKS[name]) if each.number in chosen]
            assert sections
            assert sections <= there, what
            assert len(exercises) == len(chosen), what
            assert int(minutes) == measured_part(NOTEBOOKS[name], sections, chosen).minutes, what
            for each in exercises:  # the section that it stands in is read, too
                before = text_of(name).split(f"### Exercise {each.number} ·")[0]
                assert int(re.findall(r"^## (\d+) · ", before, re.M)[-1]) in sections, what
    assert all(minutes <= minutes_of(name) for name, minutes in spent.items())
    assert len(spent) >= 5


def test_the_guide_has_questions_minutes_points_and_mistakes_of_every_notebook():
    for name in NOTEBOOKS:
        questions = re.search(rf"^- \*\*{name}\.\*\* (.+?)(?=^- |\Z)", README, re.M | re.S)
        assert questions, f"classroom/README.md has no questions to discuss for {name}"
        assert questions[1].count("?") >= 2
    # Of three, since the checks of others import much.
    notebooks = {
        name: NOTEBOOKS[name] for name in ("00_quickstart", "01_ddpm", "06_cross_attention")
    }
    text = guide(notebooks)
    assert "../notebooks" not in text
    for name, notebook in notebooks.items():
        chapter = text.split(f"\n### {name}: ")[1].split("\n### ")[0]
        assert f"**Time** about {minutes_of(name)} minutes" in chapter
        for each in exercises_of(notebook):
            row = f"| {each.number} · {each.title} | {each.difficulty} | {each.minutes} | "
            assert f"{row}{each.points} |" in chapter
            named = chapter.count(f"\n- Exercise {each.number}: ")
            assert named >= 3 or each.answer == "star_in_front", "which compares no functions"
    assert "- Exercise 4: no square roots. *ᾱ is a share of the variance; the numbers" in text


def test_the_project_has_no_exercises_no_assignment_and_a_chapter_in_the_guide():
    project = {"14_project": NOTEBOOKS["14_project"]}
    assert with_exercises({**project, "01_ddpm": short()}).keys() == {"01_ddpm"}
    chapter = guide(project).split("\n### 14_project: ")[1]
    assert "exercises, no assignment" in chapter
    assert "mistakes" not in chapter


def test_the_limits_in_the_readme_are_those_of_the_grading():
    for limit in (Execute.timeout, Execute.whole_timeout, Execute.most_characters):
        assert f"{limit.default_value:,}" in README
