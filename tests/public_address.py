"""The public address of the course, and what is made from it: `make address`.

It stands in pyproject.toml, `[project.urls]`, and nowhere else. This script writes it into every
notebook (badge, set-up cell, links), into CITATION.cff and into README.md, whose list of notebooks
it writes as well; and where a notebook names another one, as in "04 conditioning", it makes that a
link or, as long as there is no such notebook, plain text.

It lives with the tests, which hold the files against what is said here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import nbformat
import tomllib

from lrd_helpers.files import write_atomically

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [
    "00_quickstart",
    "01_ddpm",
    "02_autoencoder",
    "02b_codebooks_and_critic",
    "03_latent_diffusion",
    "04_conditioning",
    "04b_style",
    "05_image_tasks",
    "06_cross_attention",
    "07_vision_guidance",
    "08_layered_rendering",
    "09_evaluation",
    "10_editing",
    "11_layerdiff",
    "12_stable_diffusion",
    "14_project",
]
"""All that the course will have, in its order; a side road stands behind its chapter."""

NUMBER = r"\d\d[a-z]?"
"""A notebook's number, as a regular expression: 02, or 02b, which is a side road of 02."""

NAME = rf"{NUMBER}_\w+"
"""A notebook's name, as a regular expression: 02b_codebooks_and_critic."""

COLAB = "https://colab.research.google.com"
BADGE_IMAGE = f"{COLAB}/assets/colab-badge.svg"
START, END = "<!-- notebooks -->\n", "<!-- /notebooks -->"


# ------------------------------------------------------------------ what is made from the address


def address_in(root: Path) -> str:
    """The public address in the pyproject.toml of `root`: "https://github.com/OWNER/NAME".

    Raises:
        ValueError: it is not one that Colab and pip can open.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    if not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]*[\w-](?<!\.git)", address):
        raise ValueError(
            f"pyproject.toml, [project.urls], Repository is {address!r}, but should look like "
            "'https://github.com/OWNER/NAME': Colab opens notebooks from GitHub only"
        )
    return address


def _owner_and_name(address: str) -> str:
    return address.removeprefix("https://github.com/")


def colab_link(address: str, name: str) -> str:
    """Where Colab opens the notebook `name` of the repository at `address`."""
    return f"{COLAB}/github/{_owner_and_name(address)}/blob/main/notebooks/{name}.ipynb"


def badge(address: str, name: str) -> str:
    """What the first cell of the notebook `name` begins with."""
    return f"[![Open In Colab]({BADGE_IMAGE})]({colab_link(address, name)})"


def set_up(address: str) -> str:
    """What the first code cell of every notebook begins with."""
    return f"""import sys

IN_COLAB = "google.colab" in sys.modules
if IN_COLAB:
    %pip install -q "git+{address}.git"
"""


# ------------------------------------------------------------------ writing it into the files

_REPOSITORY = r"([\w-]+/[\w.-]*?[\w-])"
_OWN = re.compile(
    rf"{re.escape(COLAB)}/github/{_REPOSITORY}/blob/"
    rf"|%pip install -q \\?\"git\+https://github\.com/{_REPOSITORY}\.git"
    rf"|git clone (?:--depth 1 )?https://github\.com/{_REPOSITORY}\.git"
    rf"|repository-code: \"https://github\.com/{_REPOSITORY}\""
)


def readdressed(text: str, address: str) -> str:
    """`text` (of README.md, CITATION.cff or a notebook) with `address` for the one that it had.

    What it had is seen from its badges and from its lines that install or clone; then every link to
    there is changed.

    Raises:
        ValueError: it has nothing of the kind.
    """
    had = {next(filter(None, match.groups())) for match in _OWN.finditer(text)}
    if not had:
        raise ValueError(
            "it has no Colab badge, no line that installs or clones the course, no repository-code"
        )
    any_of_them = "|".join(re.escape(one) for one in sorted(had))
    own = _owner_and_name(address)
    not_longer = r"(?![\w-]|\.(?!git\b)\w)"  # lrd-course, but not lrd-course-2 or lrd-course.x
    text = re.sub(rf"(?<=github\.com/)(?:{any_of_them}){not_longer}", own, text)
    text = re.sub(rf"(?<={re.escape(COLAB)}/github/)(?:{any_of_them})(?=/)", own, text)
    folder = own.split("/")[1]
    return re.sub(r"(git clone .+\ncd )\S+", rf"\g<1>{folder}", text)


def linked(text: str, there: Collection[str]) -> str:
    """`text` of a notebook's file: each "04 conditioning" a link if that is `there`, else none."""
    for name in NOTEBOOKS:
        label = name.replace("_", " ")
        link = f"[{label}]({name}.ipynb)"
        text = text.replace(link, label)
        if name in there:
            text = re.sub(rf"(?<![\w\[]){label}(?!\w)", link, text)
    return text


def question(notebook: Path) -> str:
    """The question a notebook answers: its title, "# 01 · How can …?", without the number.

    Raises:
        ValueError: it has no such title.
    """
    for cell in nbformat.read(notebook, as_version=4).cells:
        if title := re.search(rf"^# {NUMBER} · (.+)$", cell.source, flags=re.MULTILINE):
            return title[1].strip()
    raise ValueError(f"{notebook.name} has no title like '# 01 · How can …?'")


def notebooks_in(root: Path) -> list[str]:
    """The names of the notebooks that are there, in the order of the course."""
    return [name for name in NOTEBOOKS if (root / "notebooks" / f"{name}.ipynb").is_file()]


def list_of_notebooks(root: Path, address: str) -> str:
    """README's part about the notebooks: a row for each there is, a line for those to come."""
    there = notebooks_in(root)
    lines = ["", "| | notebook | question it answers | |", "|---|---|---|---|"]
    for name in there:
        path = f"notebooks/{name}.ipynb"
        opens = f"[![Open In Colab][badge]]({colab_link(address, name)})"
        # Its first picture, which `make figures` takes out of it; beside its question, no more.
        shown = f'<img src="figures/chapters/{name}.png" width="140" alt="">'
        lines.append(f"| {shown} | [`{name}`]({path}) | {question(root / path)} | {opens} |")
    planned = [name.replace("_", " ") for name in NOTEBOOKS if name not in there]
    if planned:
        lines += ["", f"Still to come: {', '.join(planned)}."]
    return "\n".join([*lines, "", f"[badge]: {BADGE_IMAGE}", ""])


def rewrite(root: Path) -> list[Path]:
    """Write the address and the list of notebooks into the files of `root`; which were changed.

    Raises:
        ValueError: a file in which there is no place for it; nothing is written then.
    """
    address, new = address_in(root), {}
    texts = [root / "README.md", root / "CITATION.cff"]
    for path in [*texts, *sorted((root / "notebooks").glob("*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        try:
            changed = readdressed(text, address)
            if path.name == "README.md":
                if not changed.count(START) == changed.count(END) == 1:
                    raise ValueError(f"it has no lines {START.strip()} and {END}")
                before, rest = changed.split(START)
                after = rest.split(END)[1]
                changed = before + START + list_of_notebooks(root, address) + END + after
            elif path.suffix == ".ipynb":
                changed = linked(changed, notebooks_in(root))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        if changed != text:
            new[path] = changed
    for path, changed in new.items():
        write_atomically(path, changed.encode())
    return list(new)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the files of this repository; returns the exit code."""
    if arguments:
        print("there are no arguments: the address is in pyproject.toml", file=sys.stderr)
        return 2
    try:
        changed = rewrite(ROOT)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in changed:
        print(f"rewritten: {path.relative_to(ROOT)}")
    if not changed:
        print(f"nothing to do: all say {address_in(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
