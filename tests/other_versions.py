"""The course with other versions than the tested ones: `make colab-check`, `make lowest-check`.

colab    An environment like Colab's, as far as the package index has it. Three notebooks, each
         alone in an empty folder, run there, set-up cell and all: it installs the course of this
         repository, as committed. Nothing that was installed before may change its version.
lowest   The lowest versions that pyproject.toml allows (uv finds them), and the same notebooks.

Both take the tested PyTorch: others are on the index with CUDA only. The environment stays in
outputs/environments. Minutes, and some 2 GB each: no part of `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from packaging.utils import canonicalize_name
from public_address import ROOT, address_in

NOTEBOOKS = ("00_quickstart", "06_cross_attention", "08_layered_rendering")
SECONDS_A_CELL = 1800

COLAB = (
    "diffusers==0.37.1",
    "transformers==5.9.0",
    "accelerate",
    "safetensors",
    "numpy==2.0.2",
    "scipy==1.16.3",
    "pillow==11.3.0",
    "matplotlib==3.10.9",
    "tqdm",
    "filelock",
    "ipywidgets==7.7.1",
    "anywidget==0.9.21",
    "ipython==7.34.0",
    "ipykernel==6.17.1",
    "traitlets==5.7.1",
)
"""What Colab had in the middle of 2026, of what the course needs or is run by. It had Python 3.12
and torch 2.11; here both are those that run this script."""

OUTPUT = '''"""All of google.colab that the course comes upon: anywidget asks for it."""
class _widgets:
    _installed_url = None
def enable_custom_widget_manager():
    _widgets._installed_url = "https://example.org/manager.js"
'''


class CheckError(RuntimeError):
    """What does not work with other versions, in one sentence."""


def run(*command: str | Path) -> str:
    """What a command prints.

    Raises:
        CheckError: it fails; with its last line.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise CheckError(f"{Path(command[0]).name} fails: {said[-1] if said else 'without a word'}")
    return done.stdout


def environment(folder: Path) -> Path:
    """The interpreter of a new environment with pip and the tested PyTorch."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = re.search(r"^torch==\S+", constraints, flags=re.MULTILINE)[0]
    run(python, "-m", "pip", "install", "--quiet", torch)
    return python


def like_colab(folder: Path) -> Path:
    """The interpreter of an environment like Colab's, without the course."""
    python = environment(folder)
    run(python, "-m", "pip", "install", "--quiet", *COLAB)
    return python


def lowest(folder: Path) -> Path:
    """The interpreter of an environment with the lowest versions, and the course in it."""
    python = environment(folder)
    run(python, "-m", "pip", "install", "--quiet", "uv")
    kept = folder / "override.txt"
    kept.write_text(f"torch=={versions(python)['torch']}\n", encoding="utf-8")
    uv = [folder / "bin" / "uv", "pip", "install", "--python", python, "--override", kept]
    run(*uv, "--resolution", "lowest-direct", committed(folder / "course"))
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed: name → version."""
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    return {canonicalize_name(each["name"]): each["version"] for each in listed}


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What was installed before and has another version now, or none."""
    return [
        f"{name} {version} → {after.get(name, 'gone')}"
        for name, version in before.items()
        if after.get(name) != version
    ]


def committed(folder: Path) -> Path:
    """A repository of what is committed here, in one commit.

    No shallow clone of this one: pip clones with a filter, and git would look for what the shallow
    one lacks without end.
    """
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    run("git", "-C", ROOT, "archive", "--output", archive, "HEAD")
    shutil.unpack_archive(archive, folder)
    git = ("git", "-C", folder, "-c", "user.name=check", "-c", "user.email=check@example.org")
    git += ("-c", "core.compression=0")
    run("git", "init", "--quiet", folder)
    run(*git, "add", "--all", "--force")
    run(*git, "commit", "--quiet", "--message", "as committed")
    return folder


def describe_kernel(python: Path, folder: Path, course: Path | None) -> None:
    """Write the description of a kernel of that environment, "other", into `folder`.

    With a `course` it is on "Colab": `google.colab` is imported, and the public address leads to
    that repository.
    """
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    variables = {}
    if course:
        stub = folder / "stub" / "google" / "colab"
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        (stub / "output.py").write_text(OUTPUT, encoding="utf-8")
        argv.append("--IPKernelApp.exec_lines=import google.colab.output")
        variables = {
            "PYTHONPATH": str(folder / "stub"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{course.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": f"{address_in(ROOT)}.git",
        }
    described = folder / "kernels" / "other"
    described.mkdir(parents=True)
    spec = {"argv": argv, "display_name": "other", "language": "python", "env": variables}
    (described / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def execute(name: str, folder: Path) -> None:
    """Run a notebook by the kernel "other", alone in an empty folder.

    Raises:
        CheckError: a cell fails; it names the cell.
    """
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, kernel_name="other", timeout=SECONDS_A_CELL, resources=resources
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failed = [
            cell.id
            for cell in notebook.cells
            if any(output.output_type == "error" for output in cell.get("outputs", []))
        ]
        said = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-1]
        raise CheckError(f"{name}, cell {failed[0] if failed else '?'}: {said}") from error


def check(python: Path, *, colab: bool) -> list[str]:
    """Run the notebooks in an environment; what is wrong."""
    faults, before = [], versions(python)
    with tempfile.TemporaryDirectory() as temporary:
        course = committed(Path(temporary, "course")) if colab else None
        for name in NOTEBOOKS:
            folder, start = Path(temporary, name), time.perf_counter()
            folder.mkdir()
            try:
                describe_kernel(python, folder, course)
                os.environ["JUPYTER_PATH"] = str(folder)
                execute(name, folder / "alone")
                said = "runs"
            except CheckError as error:
                said = f"fails: {error}"
                faults.append(str(error))
            print(f"{name:24} {time.perf_counter() - start:5.0f} s   {said}", flush=True)
    after = versions(python)
    if added := {name: after[name] for name in after.keys() - before.keys()}:
        print("added:", ", ".join(f"{name} {added[name]}" for name in sorted(added)))
    if colab and "lrd-helpers" not in added:
        faults.append("the set-up cell did not install the course")
    return faults + [f"moved: {each}" for each in moved(before, after)]


def main(arguments: Sequence[str]) -> int:
    """Make an environment and run the notebooks there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["colab", "lowest"])
    which = parser.parse_args(arguments).which
    folder = ROOT / "outputs" / "environments" / which
    os.environ.pop("PYTHONPATH", None)  # the course must come from the environment
    try:
        python = like_colab(folder) if which == "colab" else lowest(folder)
        faults = check(python, colab=which == "colab")
    except CheckError as error:
        faults = [str(error)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
