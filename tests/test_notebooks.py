"""The notebooks as files: what a learner's first look and every platform need.

That their outputs are right is nbval's part: `pytest` replays notebooks/ (see pyproject.toml).
"""

import re
from collections.abc import Collection
from itertools import pairwise

import nbformat
import pytest
import tomllib
from execute_notebooks import HIDDEN_SOURCE, METADATA, NotSaved, cleaned, text_of
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from public_address import NAME, NOTEBOOKS, NUMBER, ROOT, badge, linked, set_up
from test_repository import MACHINE, PROJECT, REPOSITORY

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
THERE = {path.stem for path in PATHS}
MOST_BYTES = 1_500_000
SHORTEST_ALT = 30


def image_faults(cell: NotebookNode) -> list[str]:
    """Pictures that say nothing to somebody who cannot see them, and tables without a head."""
    shown, alts = [cell.source] if cell.cell_type == "markdown" else [], []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        shown += [data[kind] for kind in ("text/html", "text/markdown") if kind in data]
        kinds = [kind for kind in data if kind.startswith("image/")]
        alts += [output.metadata.get(kind, {}).get("alt", "") for kind in kinds]
    for text in shown:
        alts += re.findall(r"!\[([^\]]*)\]\((?!https://colab)", text)
        for tag in re.findall(r"<img\b[^>]*>", text):
            alts.append("".join(re.findall(r"""\balt=["']([^"']*)""", tag)))
    faults = [f"{cell.id}: a picture without an alternative text"] * sum(
        len(alt) < SHORTEST_ALT for alt in alts
    )
    if any("<table" in text and "<th" not in text.replace("<thead", "") for text in shown):
        faults.append(f"{cell.id}: a table without a head")
    return faults


def reading_faults(text: str) -> list[str]:
    """What a screen reader stumbles over: headings that skip a level, links that do not say where.

    Readers of the screen jump from heading to heading, and list the links without their sentences.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^(#+) (.+)$", prose, flags=re.MULTILINE)
    faults = [
        f"the heading {heading!r} skips a level"
        for (before, _), (level, heading) in pairwise([("", ""), *headings])
        if len(level) > len(before) + 1
    ]
    links = re.findall(r"(?<!!)\[(here|this|there|link|click here)\]\(", prose, re.IGNORECASE)
    return faults + [
        f"a link's text is only {text!r}: it does not say where it leads" for text in links
    ]


def neighbours(name: str) -> tuple[list[str], list[str]]:
    """Before and after a notebook of the course, where it links to; with a chapter's side roads.

    The core path goes from chapter to chapter; a side road, 02b, leads from 02 to 03.
    """
    side_roads = [each for each in NOTEBOOKS if each[2] != "_" and each != name]
    path = [each for each in NOTEBOOKS if each not in side_roads]
    place = path.index(name)
    beside = [each for each in side_roads if name[2] == "_" and each[:2] == name[:2]]
    return path[max(0, place - 1) : place], beside + path[place + 1 : place + 2]


def anchors(page: str) -> list[str]:
    """Where links into a Markdown page lead: a heading in lower case, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def link_faults(text: str, name: str, there: Collection[str]) -> list[str]:
    """Links that lead nowhere, and a chain of notebooks that is broken."""
    links = re.findall(r"\]\((?!https?:|attachment:|#)([^)#\s]+)", text)
    links += re.findall(r"(?:href|src)=[\"'](?!https?:|attachment:|#)([^\"'#]+)", text)
    found = []
    for link in links:
        stem = link.removesuffix(".ipynb")
        if link.endswith(".ipynb") and "/" not in link:
            exists = stem in there
        else:
            exists = (ROOT / "notebooks" / link).exists()
        if not exists:
            found.append(f"a link to {link}, which does not exist; as yet name it without a link")
    for page, anchor in re.findall(r"\]\(([^)#\s:]+\.md)#([^)\s]+)\)", text):
        path = ROOT / "notebooks" / page
        if path.exists() and anchor not in anchors(path.read_text(encoding="utf-8")):
            found.append(f"a link to {page}#{anchor}, but {path.name} has no such heading")
    before, after = neighbours(name)
    for neighbour in before + after:
        if neighbour in there and f"{neighbour}.ipynb" not in links:
            found.append(f"no link to its neighbour {neighbour}.ipynb")
    if after and after[-1] not in there and "more follows" not in text.lower():
        found.append("no notebook comes after it yet, but it does not say 'more follows'")
    return found


def faults(
    notebook: NotebookNode, name: str, size: int, there: Collection[str] = THERE
) -> list[str]:
    """What is wrong with a notebook of this name and size in bytes, beside those that are there."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    printed = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in code
        for output in cell.outputs
    )
    found = [fault for cell in cells for fault in image_faults(cell)] + reading_faults(text)
    if name in NOTEBOOKS:
        found += link_faults(text, name, there)
    else:
        found.append(f"{name} is no notebook of the course")
    if not text.startswith(badge(REPOSITORY, name)):
        found.append("it does not begin with its Colab badge")
    if len(re.findall(r"^# ", text, flags=re.MULTILINE)) != 1:
        found.append("it has not exactly one title")
    if not code or not code[0].source.startswith(set_up(REPOSITORY)):
        found.append("its first code cell is not the set-up cell")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("it was not run from the top to the end: nbval would compare nothing")
    if any(o.output_type == "error" for cell in code for o in cell.outputs):
        found.append("a cell ends in an error")
    if any(o.get("name") == "stderr" for cell in code for o in cell.outputs):
        found.append("a cell prints warnings")
    found += [
        f"{cell.id}: the source shows the answer of a Guess; give it the tag {HIDDEN_SOURCE!r}"
        for cell in code
        if re.search(r"\bGuess\(", cell.source)
        and HIDDEN_SOURCE not in cell.metadata.get("tags", [])
    ]
    if match := MACHINE.search("\n".join([text, printed, *(cell.source for cell in code)])):
        found.append(f"a path of one machine: {match[0]}")
    if size > MOST_BYTES:
        found.append(f"{size / 1e6:.2f} MB, but at most {MOST_BYTES / 1e6:g} are allowed")
    try:
        if "widgets" in notebook.metadata:
            found.append("it holds widget state, which goes stale")
        elif cleaned(notebook) != notebook:
            found.append(
                "it holds what `make notebooks` does not save: times, versions, dead widgets"
            )
    except NotSaved as error:
        found.append(str(error))
    for exercise in re.findall(r"^### Exercise.*?(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL):
        folded = re.findall(r"<details><summary>(\w+)", exercise)
        if folded != ["Hint", "Hint", "Solution"]:
            found.append(f"{exercise.splitlines()[0]}: not two hints and a solution")
    ids = [cell.id for cell in cells]
    found += [
        f"two cells have the id {one}" for one in sorted({i for i in ids if ids.count(i) > 1})
    ]
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_as_it_should_be(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert faults(notebook, path.stem, path.stat().st_size) == []
    assert text == linked(text, THERE), "it names a notebook without a link: run `make address`"
    assert text == text_of(notebook), "not in the format in which `make notebooks` saves it"


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


# ------------------------------------------------------------------ the list of terms


def test_every_term_has_a_few_sentences_and_a_notebook():
    page = (ROOT / "TERMS.md").read_text(encoding="utf-8")
    words, symbols = page.split("\n## Symbols\n")
    terms = anchors(words)[2:]  # below its title and "Words"
    assert len(terms) > 30
    assert terms == sorted(set(terms))
    for entry in words.split("\n### ")[1:]:
        *sentences, source = entry.strip().splitlines()[2:]
        assert 1 <= len(re.findall(r"[.?](?=[ )]|$)", " ".join(sentences))) <= 3, entry
        notebooks = re.findall(r"\[([^\]]+)\]\(notebooks/(\w+)\.ipynb\)", source)
        assert notebooks, entry
        for label, name in notebooks:
            assert name in THERE
            assert label == name.replace("_", " ")
        for symbol in re.findall(r"\$[^$]+\$", source):
            assert symbol in symbols, f"{symbol} is missing in the table of symbols"


# ------------------------------------------------------------------ would a fault be found?


def good() -> NotebookNode:
    exercise = "## Section\n\n### Exercise 1\n" + "".join(
        f"<details><summary>{name}</summary>\n" for name in ("Hint 1", "Hint 2", "Solution")
    )
    picture = new_output(
        "display_data",
        data={"image/png": "iVBORw0KGgo="},
        metadata={"image/png": {"alt": "A picture that is described in a whole sentence."}},
    )
    links = "[before](00_quickstart.ipynb) [next](02_autoencoder.ipynb)"
    return new_notebook(
        metadata=METADATA,
        cells=[
            new_markdown_cell(f"{badge(REPOSITORY, '01_ddpm')}\n\n# Title\n{links}", id="title"),
            new_code_cell(set_up(REPOSITORY), execution_count=1, id="setup"),
            new_markdown_cell(exercise, id="exercise"),
            new_code_cell("show()", execution_count=2, outputs=[picture], id="show"),
        ],
    )


def test_a_good_notebook_has_no_faults():
    assert faults(good(), "01_ddpm", 1000, NOTEBOOKS) == []


def no_alt(notebook):
    notebook.cells[3].outputs[0].metadata = {}


def no_markdown_alt(notebook):
    notebook.cells[0].source += "\n![](../figures/demo.png)"


def no_alt_in_html(notebook):
    data = {
        "text/html": '<img src="data:,"><img alt="It is described in a whole sentence." src="">'
    }
    notebook.cells[3].outputs.append(new_output("display_data", data=data))


def a_short_alt_in_an_output(notebook):
    data = {"text/markdown": "![a cat](data:,)"}
    notebook.cells[3].outputs.append(new_output("display_data", data=data))


def a_table_without_a_head(notebook):
    data = {"text/html": "<table><tbody><tr><td>1</td></tr></tbody></table>"}
    notebook.cells[3].outputs.append(new_output("display_data", data=data))


def a_skipped_level(notebook):
    notebook.cells[2].source = "#### Aside\n\n" + notebook.cells[2].source


def a_link_to_somewhere(notebook):
    notebook.cells[0].source += " [Here](00_quickstart.ipynb)"


def no_badge(notebook):
    notebook.cells[0].source = notebook.cells[0].source.split("\n", 1)[1]


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


def a_dead_picture(notebook):
    notebook.cells[0].source += "![A picture that is described in a whole sentence](figure.png)"


def a_dead_link(notebook):
    notebook.cells[0].source += "[x](13_more.ipynb)"


def a_dead_link_to_a_file(notebook):
    notebook.cells[0].source += "[x](../lrd_helpers/dpm.py)"


def a_dead_link_to_a_term(notebook):
    notebook.cells[0].source += "[latent](../TERMS.md#latent) [x](../TERMS.md#phlogiston)"


def a_dead_link_in_html(notebook):
    notebook.cells[0].source += '<a href="13_more.ipynb#end">x</a>'


def no_link_to_the_next(notebook):
    notebook.cells[0].source = notebook.cells[0].source.replace("02_autoencoder.ipynb", "#end")


def no_link_to_the_one_before(notebook):
    notebook.cells[0].source = notebook.cells[0].source.replace("00_quickstart.ipynb", "#end")


def a_time(notebook):
    notebook.cells[3].metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00"}


def a_version(notebook):
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}


def no_title_picture(notebook):
    notebook.cells[3].metadata["tags"] = ["title-picture"]


def a_dead_widget(notebook):
    data = {"text/plain": "VBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    notebook.cells[3].outputs.append(new_output("display_data", data=data))


def an_answer_before_the_guess(notebook):
    notebook.cells[3].source = 'Guess("More?", ["yes", "no"], answer=0, why="So it is.")'


def one_id_twice(notebook):
    notebook.cells[3].id = "setup"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_alt, "without an alternative text"),
        (no_markdown_alt, "without an alternative text"),
        (no_alt_in_html, "without an alternative text"),
        (a_short_alt_in_an_output, "without an alternative text"),
        (a_table_without_a_head, "a table without a head"),
        (a_skipped_level, "the heading 'Aside' skips a level"),
        (a_link_to_somewhere, "a link's text is only 'Here'"),
        (no_badge, "badge"),
        (two_titles, "exactly one title"),
        (no_set_up, "set-up cell"),
        (not_executed, "not run from the top"),
        (an_error, "ends in an error"),
        (a_warning, "warnings"),
        (a_path, "a path of one machine"),
        (widget_state, "widget state"),
        (one_hint, "not two hints"),
        (a_dead_picture, "a link to figure.png, which does not exist"),
        (a_dead_link, "a link to 13_more.ipynb, which does not exist"),
        (a_dead_link_to_a_file, "a link to ../lrd_helpers/dpm.py, which does not exist"),
        (a_dead_link_to_a_term, "a link to ../TERMS.md#phlogiston, but TERMS.md has no such"),
        (a_dead_link_in_html, "a link to 13_more.ipynb, which does not exist"),
        (no_link_to_the_next, "no link to its neighbour 02_autoencoder"),
        (no_link_to_the_one_before, "no link to its neighbour 00_quickstart"),
        (a_time, "times, versions, dead widgets"),
        (a_version, "times, versions, dead widgets"),
        (a_dead_widget, "times, versions, dead widgets"),
        (no_title_picture, "the title shows 0 attachments"),
        (an_answer_before_the_guess, "show: the source shows the answer of a Guess"),
        (one_id_twice, "two cells have the id setup"),
    ],
)
def test_a_fault_would_be_found(spoil, said):
    notebook = good()
    spoil(notebook)
    [fault] = faults(notebook, "01_ddpm", 1000, NOTEBOOKS)
    assert said in fault


def test_links_to_files_that_are_there_are_no_faults():
    notebook = good()
    notebook.cells[0].source += "[x](../lrd_helpers/ddpm.py#L1) ![y](attachment:y.png)" + "y" * 30
    assert not [fault for fault in faults(notebook, "01_ddpm", 1, NOTEBOOKS) if "link" in fault]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("00_quickstart", [], ["01_ddpm"]),
        ("01_ddpm", ["00_quickstart"], ["02_autoencoder"]),
        (
            "02_autoencoder",
            ["01_ddpm"],
            ["02b_codebooks_and_critic", "03_latent_diffusion"],
        ),
        ("02b_codebooks_and_critic", ["02_autoencoder"], ["03_latent_diffusion"]),
        ("03_latent_diffusion", ["02_autoencoder"], ["04_conditioning"]),
    ],
)
def test_the_core_path_leads_past_side_roads_and_a_side_road_comes_back(name, before, after):
    assert neighbours(name) == (before, after)


def test_every_name_has_the_form_of_a_name_and_a_side_road_stands_behind_its_chapter():
    assert all(re.fullmatch(NAME, name) for name in NOTEBOOKS)
    numbers = [re.match(NUMBER, name)[0] for name in NOTEBOOKS]
    assert numbers == sorted(numbers)
    assert {number[:2] for number in numbers} <= set(numbers), "a side road of no chapter"


def test_the_last_notebook_there_is_says_that_more_follows():
    there = ["00_quickstart", "01_ddpm"]
    notebook = good()
    dead, silent = faults(notebook, "01_ddpm", 1000, there)
    assert "a link to 02_autoencoder.ipynb, which does not exist" in dead
    assert "it does not say 'more follows'" in silent
    notebook.cells[0].source = notebook.cells[0].source.replace(
        "[next](02_autoencoder.ipynb)", "More follows."
    )
    assert faults(notebook, "01_ddpm", 1000, there) == []


def test_a_large_or_unknown_notebook_would_be_found():
    assert len(faults(good(), "01_ddpm", MOST_BYTES + 1, NOTEBOOKS)) == 1
    assert any("no notebook of the course" in fault for fault in faults(good(), "99_x", 1))
