"""What must hold for the repository as a whole: dependencies, Makefile, README, files."""

import ast
import glob
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from public_address import END, NOTEBOOKS, START, address_in, colab_link, list_of_notebooks

import lrd_helpers
from lrd_helpers import editing
from lrd_helpers.layout import Layout
from lrd_helpers.methods import named as method_named
from lrd_helpers.pipeline import LayeredRenderingPipeline

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
REPOSITORY = address_in(ROOT)

MOST_ASSET_BYTES = 40_000_000
MOST_EXTRA_BYTES = {
    ("storybook-style/", "storybook-upsampler/"): 15_000_000,  # what only one notebook each needs
    ("storybook-layers/",): 40_000_000,
}
ASSET_KINDS = {
    ".safetensors",
    ".json",
    ".txt",
    ".md",
    ".csv",
    ".png",
}  # nothing that runs code when it is loaded


def repository_files() -> list[Path]:
    """Everything that is committed or will be: ignored files are not there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    files = [ROOT / name for name in dict.fromkeys(listed) if name and (ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    return files


# ------------------------------------------------------------------ dependencies


def pinned(lines: list[str]) -> dict[str, str]:
    """Canonical name → exact version; a line that is not `name==version` is an error."""
    versions = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
        assert match, f"{line!r} is not name==version"
        name = canonicalize_name(match[1])
        assert name not in versions, f"{name} is there twice"
        versions[name] = match[2]
    return versions


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return pinned([line for line in lines if line and not line.startswith("#")])


def required() -> dict[str, Requirement]:
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def test_constraints_pin_exactly_what_pyproject_asks_for():
    assert set(constraints()) == set(required())


@pytest.mark.parametrize("name", sorted(required()))
def test_the_tested_version_is_within_the_range(name):
    assert required()[name].specifier, f"{name} has no range in pyproject.toml"
    assert constraints()[name] in required()[name].specifier


def test_conda_environment_has_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [by_pip] = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    by_conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    assert by_pip[-1] == "--editable ."
    assert by_conda == ["python=3.11", "pip"]
    assert pinned(by_pip[:-1]) == constraints()


def test_ruff_is_pinned_and_its_rules_are_chosen():
    [specifier] = required()["ruff"].specifier
    assert specifier.operator == "=="
    assert specifier.version == constraints()["ruff"]
    ruff = PYPROJECT["tool"]["ruff"]
    assert ruff["lint"]["select"]
    assert ruff["line-length"] == 100


def imported(source: str) -> set[str]:
    """The packages that a module imports, by their first name; relative imports are its own."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_package_that_is_imported_is_declared():
    # ipywidgets brings IPython, webdataset braceexpand, diffusers huggingface_hub.
    projects = {"PIL": "pillow", "IPython": "ipywidgets", "braceexpand": "webdataset"}
    projects["huggingface_hub"] = "diffusers"
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    extras = {"shards.py": "shards", "precision.py": "benchmark", "export.py": "layers"}
    extras["coco.py"] = "benchmark"
    for path in sorted((ROOT / "lrd_helpers").rglob("*.py")):
        foreign = imported(path.read_text(encoding="utf-8")) - sys.stdlib_module_names
        for name in foreign - {"lrd_helpers"}:
            project = canonicalize_name(projects.get(name, name))
            extra = PROJECT["optional-dependencies"].get(extras.get(path.name), [])
            own = {Requirement(text).name for text in extra}
            assert project in declared | own, f"{path.relative_to(ROOT)} imports {name}"


def test_importing_the_package_imports_no_heavy_module():
    heavy = ["torch", "diffusers", "transformers", "matplotlib", "numpy"]
    code = f"import sys, lrd_helpers; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in lrd_helpers.__all__:
        assert getattr(lrd_helpers, name) is not None


def test_the_wheel_has_every_file_that_the_package_opens():
    package = ROOT / "lrd_helpers"
    data = PYPROJECT["tool"]["setuptools"]["package-data"]["lrd_helpers"]
    shipped = {
        package / name
        for pattern in data
        for name in glob.glob(pattern, root_dir=package, recursive=True)
    }
    files = [path for path in repository_files() if package in path.parents]
    left_out = {path for path in files if path.suffix != ".py"} - shipped
    assert left_out == {package / "training" / "README.md"}, "which is for readers"
    for path in files:
        for up in re.findall(r"__file__\)\.parents\[(\d)\]", text_of(path)):
            folder = path.parents[int(up)]
            assert package in (folder, *folder.parents), f"{path} opens what is not in the wheel"


# ------------------------------------------------------------------ Makefile and README


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))


def code_of(markdown: str) -> list[str]:
    """The fenced blocks and the `spans` of a Markdown text."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", rest)


def test_every_make_target_in_the_readme_exists():
    named = {
        target for code in code_of(README) for target in re.findall(r"\bmake ([a-z][a-z-]*)", code)
    }
    assert {"demo", "test", "setup", "lab"} <= named
    assert named <= make_targets()


def test_every_target_is_phony_and_explained():
    phony = set(re.search(r"\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE)[1].replace("\\", " ").split())
    explained = set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, flags=re.MULTILINE))
    assert phony == explained == make_targets()


def test_everything_the_makefile_runs_exists():
    for module in re.findall(r"-m (lrd_helpers[\w.]*)", MAKEFILE):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in re.findall(r"\$\(RUN\) (\w[\w/]*\.py)", MAKEFILE):
        assert (ROOT / script).is_file(), script


def test_lab_serves_what_the_notebooks_link_to():
    """../TERMS.md is outside of the notebooks' folder."""
    assert re.search(r"^lab:.*\n\t.*--ServerApp\.root_dir=\. ", MAKEFILE, flags=re.MULTILINE)


def test_ci_is_executable_and_runs_the_tests():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")


def test_the_list_of_notebooks_is_the_one_that_make_address_writes():
    listed = README.split(START)[1].split(END)[0]
    assert listed == list_of_notebooks(ROOT, REPOSITORY)
    there = [name for name in NOTEBOOKS if f"(notebooks/{name}.ipynb)" in listed]
    assert there
    assert re.findall(r"\((https://colab[^)]+)\)", README) == [
        colab_link(REPOSITORY, name) for name in there
    ]


def test_every_address_in_the_readme_is_the_one_in_pyproject():
    own = REPOSITORY.rsplit("/", 1)[1]
    addresses = [
        address for address in re.findall(r"https://github\.com/[\w./-]+", README) if own in address
    ]
    assert addresses
    assert {address.removesuffix(".git") for address in addresses} == {REPOSITORY}


def test_every_file_the_readme_links_to_exists():
    targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target.split("#")[0]).exists()]
    assert not missing


def test_every_picture_in_the_readme_has_an_alt_text():
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", README):
        assert len(alt) > 10, target


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_pictures_that_come_from_notebooks_are_the_ones_they_show():
    """`python benchmarks/figures.py NAME` after a notebook was executed anew."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import figures
    finally:
        sys.path.pop(0)
    for name, (notebook, cell) in figures.NOTEBOOKS.items():
        assert f"](figures/{name}.png)" in README
        shown = figures.below_cell(notebook, cell)
        assert shown.startswith(b"\x89PNG")
        assert (ROOT / "figures" / f"{name}.png").read_bytes() == shown, name
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shown = (ROOT / "figures" / "chapters" / f"{path.stem}.png").read_bytes()
        assert shown == figures.chapter_picture(path), path.stem
    with pytest.raises(ValueError, match="has no cell 'nowhere' with a picture below it"):
        figures.below_cell("10_editing", "nowhere")


def test_the_layout_in_the_readme_is_one():
    [block] = readme_blocks("json")
    assert len(Layout.from_json(block).layers) >= 2
    assert json.loads(block)["version"] == 1


def test_the_python_in_the_readme_says_the_same_as_its_json(monkeypatch, tmp_path):
    drawn = []
    arguments = inspect.signature(LayeredRenderingPipeline.__call__).parameters

    def pipe(layout, **options):
        assert set(options) <= set(arguments)
        method_named(options.get("method", arguments["method"].default))
        drawn.append(layout)
        picture = types.SimpleNamespace(save=lambda path: None)
        return types.SimpleNamespace(images=[picture], layers=[])

    edits = []

    def called(function):
        def noted(*arguments, **options):
            inspect.signature(function).bind(*arguments, **options)
            edits.append(function.__name__)
            return types.SimpleNamespace(image=None)

        return noted

    for name in ("find", "insert", "move", "remove", "replace_object"):
        monkeypatch.setattr(editing, name, called(getattr(editing, name)))
    monkeypatch.setattr(lrd_helpers, "load_pipeline", lambda name: pipe, raising=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"image": None}
    for block in readme_blocks("python"):  # each goes on where the one before it stopped
        # test_style.py and test_layerdiff_pipeline.py run these on real pipelines.
        if "load_style" not in block and "storybook-layers" not in block:
            exec(block, names)
    [block] = readme_blocks("json")
    assert set(drawn) == {Layout.from_json(block)}
    assert edits == ["find", "insert", "replace_object", "remove", "move"]


# ------------------------------------------------------------------ files


# The letter in brackets keeps this line itself from being found.
MACHINE = re.compile(
    r"(?<![\w.])/(?:wor[k]|far[m]|roo[t]|hom[e]|User[s]|tm[p])/[A-Za-z.]|[A-Z]:\\User[s]"
    r"|index-ur[l]|find-link[s]"
)


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a picture, weights


def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in repository_files()
        for match in MACHINE.finditer(text_of(path))
    ]
    assert not found


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("/".join(["open('", "root", ".cache')"]), True),
        ("/".join(["file = ", "home", "ann", "x"]), True),
        ("/".join(["", "tmp", "scratch"]), True),
        ("pip install --extra-" + "index" + "-url=x", True),
        ("https://example.org/home/page and ./home/x", False),
        ("a path such as runs/clip/log.csv", False),
    ],
)
def test_a_path_of_one_machine_would_be_found(line, bad):
    assert bool(MACHINE.search(line)) == bad


def asset_faults(sizes: dict[str, int]) -> list[str]:
    """What is wrong with files of these names and sizes in bytes."""
    faults = [
        f"{name} is not {', '.join(sorted(ASSET_KINDS))}"
        for name in sizes
        if Path(name).suffix not in ASSET_KINDS
    ]
    extras = {
        names: sum(size for name, size in sizes.items() if name.startswith(names))
        for names in MOST_EXTRA_BYTES
    }
    totals = [(sum(sizes.values()) - sum(extras.values()), MOST_ASSET_BYTES)]
    totals += [(extras[names], most) for names, most in MOST_EXTRA_BYTES.items()]
    for total, most in totals:
        if total > most:
            faults.append(f"{total / 1e6:.1f} MB, but at most {most / 1e6:.0f} are allowed")
    if not any(name.endswith(".safetensors") for name in sizes):
        faults.append("no weights at all")
    return faults


def test_assets_are_small_and_run_no_code():
    folder = ROOT / "lrd_helpers" / "assets"
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in repository_files()
        if folder in path.parents
    }
    assert asset_faults(sizes) == []


@pytest.mark.parametrize(
    ("sizes", "faults"),
    [
        ({"a/model.safetensors": 39_999_000, "a/config.json": 1_000}, 0),
        ({"a/model.safetensors": 40_000_000, "a/config.json": 1}, 1),
        ({"a/model.safetensors": 1, "a/model.bin": 1}, 1),
        ({"a/model.safetensors": 39_000_000, "storybook-style/unet.safetensors": 15_000_000}, 0),
        ({"a/model.safetensors": 39_000_000, "storybook-style/unet.safetensors": 15_000_001}, 1),
        ({"a/model.safetensors": 39_000_000, "storybook-layers/a.safetensors": 39_000_000}, 0),
        ({"a/model.safetensors": 1, "storybook-layers/a.safetensors": 40_000_001}, 1),
        ({"model.pt": 1}, 2),
        ({}, 1),
    ],
)
def test_wrong_assets_would_be_found(sizes, faults):
    assert len(asset_faults(sizes)) == faults
