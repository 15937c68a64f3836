"""`make address`, on a copy of the repository's texts with another address."""

import json
import shutil

import nbformat
import public_address
import pytest
from execute_notebooks import text_of
from public_address import (
    END,
    NOTEBOOKS,
    ROOT,
    START,
    address_in,
    badge,
    linked,
    question,
    rewrite,
    set_up,
)
from test_notebooks import PATHS

OTHER = "https://github.com/ann-lee/Layers.2"


@pytest.fixture(scope="module")
def bare():
    """Name → text of each notebook without its pictures, which are nearly all of it."""
    texts = {}
    for path in PATHS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.pop("attachments", None)
            if cell.cell_type == "code":
                cell.outputs = []
        texts[path.name] = text_of(notebook)
    return texts


@pytest.fixture
def copy(tmp_path, bare):
    """README.md, CITATION.cff and bare notebooks, and pyproject.toml with another address."""
    (tmp_path / "notebooks").mkdir()
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "CITATION.cff"]:
        shutil.copy(path, tmp_path)
    for name, text in bare.items():
        (tmp_path / "notebooks" / name).write_text(text, encoding="utf-8")
    readdress(tmp_path, OTHER)
    return tmp_path


def readdress(root, address):
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(address_in(root), address), encoding="utf-8")


def texts(root):
    paths = [
        root / "README.md",
        root / "CITATION.cff",
        *sorted((root / "notebooks").glob("*.ipynb")),
    ]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_another_address_is_written_everywhere_and_nothing_else_is_changed(copy):
    for path in PATHS:  # here with their pictures
        shutil.copy(path, copy / "notebooks")
    old, before = address_in(ROOT), texts(copy)
    changed = rewrite(copy)
    after = texts(copy)
    assert {path.name for path in changed} == set(before) == set(after)
    for name, text in after.items():
        assert old not in text
        assert old.removeprefix("https://github.com/") not in text
        if name != "README.md":
            expected = before[name].replace(old.split("github.com/")[1], "ann-lee/Layers.2")
            assert text == expected
        if name.endswith(".ipynb"):
            cells = nbformat.reads(text, as_version=4).cells
            assert cells[0].source.startswith(badge(OTHER, name.removesuffix(".ipynb")))
            code = [cell for cell in cells if cell.cell_type == "code"]
            assert code[0].source.startswith(set_up(OTHER))
    assert f"git clone --depth 1 {OTHER}.git\ncd Layers.2\n" in after["README.md"]


def test_doing_it_again_changes_nothing_and_going_back_restores_every_byte(copy):
    before = texts(copy)
    rewrite(copy)
    assert rewrite(copy) == []
    readdress(copy, address_in(ROOT))
    rewrite(copy)
    after = texts(copy)
    assert {name: text for name, text in after.items() if name != "README.md"} == {
        name: text for name, text in before.items() if name != "README.md"
    }
    outside = [text.split(START)[0] + text.split(END)[1] for text in (before["README.md"],)]
    assert outside == [after["README.md"].split(START)[0] + after["README.md"].split(END)[1]]


def test_a_line_that_disagrees_with_the_badge_is_mended(copy):
    path = copy / "notebooks" / PATHS[0].name
    rewrite(copy)
    right = path.read_text(encoding="utf-8")
    wrong = right.replace(
        "git+https://github.com/ann-lee/Layers.2.git", "git+https://github.com/x/y.git"
    )
    assert wrong != right
    path.write_text(wrong, encoding="utf-8")
    assert rewrite(copy) == [path]
    assert path.read_text(encoding="utf-8") == right


@pytest.mark.parametrize("clone", ["git clone", "git clone --depth 1"])
def test_other_repositories_are_left_alone(clone):
    same = "https://github.com/huggingface/diffusers and github.com/a/b-2 and github.com/a/b.py"
    text = public_address.readdressed(
        f"{clone} https://github.com/a/b.git\ncd b\n{same} https://github.com/a/b/blob/main/x",
        OTHER,
    )
    assert text == f"{clone} {OTHER}.git\ncd Layers.2\n{same} {OTHER}/blob/main/x"


def test_the_list_has_the_notebooks_that_are_there_and_names_the_others(copy):
    for path in (copy / "notebooks").glob("*.ipynb"):
        if path.stem != "01_ddpm":
            path.unlink()
    rewrite(copy)
    listed = (copy / "README.md").read_text(encoding="utf-8").split(START)[1].split(END)[0]
    rows = [line for line in listed.splitlines() if ".ipynb" in line]
    assert rows == [
        '| <img src="figures/chapters/01_ddpm.png" width="140" alt=""> '
        "| [`01_ddpm`](notebooks/01_ddpm.ipynb) | How can destroying an image teach a network to "
        "make one? | [![Open In Colab][badge]](https://colab.research.google.com/github/"
        "ann-lee/Layers.2/blob/main/notebooks/01_ddpm.ipynb) |"
    ]
    to_come = ", ".join(name.replace("_", " ") for name in NOTEBOOKS if name != "01_ddpm")
    assert f"\nStill to come: {to_come}.\n" in listed


def test_a_notebook_that_is_named_is_a_link_as_soon_as_it_is_there():
    named = "| 01 ddpm | and 02 autoencoder, but not 102 autoencoder or [01 Ddpm](#x)"
    one = named.replace("| 01 ddpm |", "| [01 ddpm](01_ddpm.ipynb) |")
    both = one.replace("and 02 autoencoder", "and [02 autoencoder](02_autoencoder.ipynb)")
    for before in (named, one, both):
        assert linked(before, []) == named
        assert linked(before, ["01_ddpm"]) == one
        assert linked(before, ["01_ddpm", "02_autoencoder"]) == both


@pytest.mark.parametrize(
    "address",
    [
        "https://gitlab.com/a/b",
        "https://github.com/a",
        "https://github.com/a/b.git",
        "https://github.com/a/b/",
        "git@github.com:a/b",
    ],
)
def test_an_address_that_would_not_work_is_refused(copy, address):
    readdress(copy, address)
    before = texts(copy)
    with pytest.raises(ValueError, match="should look like 'https://github.com/OWNER/NAME'"):
        rewrite(copy)
    assert texts(copy) == before


def test_a_file_without_a_place_for_it_is_named_and_nothing_is_written(copy):
    title = nbformat.v4.new_markdown_cell("# 12 · What?", id="a")
    lacking = nbformat.v4.new_notebook(cells=[title])
    (copy / "notebooks" / "12_stable_diffusion.ipynb").write_text(json.dumps(lacking))
    before = texts(copy)
    with pytest.raises(ValueError, match=r"12_stable_diffusion\.ipynb: it has no Colab badge"):
        rewrite(copy)
    assert texts(copy) == before


def test_a_readme_without_the_list_and_a_notebook_without_a_title_are_named(copy):
    readme = copy / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(START, ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: it has no lines <!-- notebooks -->"):
        rewrite(copy)
    readme.write_text(text, encoding="utf-8")
    path = copy / "notebooks" / "01_ddpm.ipynb"
    title = path.read_text(encoding="utf-8")
    path.write_text(title.replace("# 01 · ", "# 01b · "), encoding="utf-8")
    assert question(path).startswith("How can destroying"), "01b is a side road's number"
    path.write_text(title.replace("# 01 · ", "# "), encoding="utf-8")
    with pytest.raises(ValueError, match=r"01_ddpm\.ipynb has no title"):
        rewrite(copy)
