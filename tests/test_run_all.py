"""`make test` and `make test-quick`: what they run, and that a failure is seen."""

import json

import pytest
import run_all
import tomllib
from public_address import NOTEBOOKS, ROOT

OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]
TEST = """import os
def test_one(worker_id):
    assert worker_id == "gw0"
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def notebook(printed):
    """A notebook that prints 2, and in whose file something stands as printed."""
    output = {"output_type": "stream", "name": "stdout", "text": printed}
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "print(1 + 1)"}
    cells = [cell | {"execution_count": 1, "outputs": [output]}]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small one: two tests, and two notebooks, one of which is wrong."""
    for name, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--nbval --nbval-current-env"\n',
        "tests/test_one.py": TEST,
        "tests/deeper/test_two.py": "def test_two(): pass",
        "notebooks/00_good.ipynb": notebook("2\n"),
        "notebooks/01_bad.ipynb": notebook("3\n"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all.os, "cpu_count", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def run(capfd):
    """Its status, and the last line printed."""
    status = run_all.main(["-p", "no:cacheprovider"], {"PATH": run_all.os.environ["PATH"]})
    return status, capfd.readouterr().out.strip().splitlines()[-1]


@pytest.mark.slow
def test_tests_and_notebooks_are_run_and_a_wrong_output_is_a_failure(repository, capfd):
    status, last = run(capfd)
    assert "1 failed, 3 passed" in last
    assert status == 1


@pytest.mark.slow
def test_a_notebook_that_is_not_replayed_is_an_error(repository, capfd):
    (repository / "notebooks" / "01_bad.ipynb").unlink()
    (repository / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")  # no --nbval
    status, _ = run(capfd)
    assert status != 0


def called(monkeypatch, arguments, cores=2, status=0):
    """With which command and environment pytest is called."""
    calls = []

    def noted(command, *, env, **options):
        calls.append((command, env))
        return run_all.subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(run_all.subprocess, "run", noted)
    monkeypatch.setattr(run_all.os, "cpu_count", lambda: cores)
    assert run_all.main(arguments, {}) == status
    [(command, environment)] = calls
    return command, environment


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_status_is_that_of_pytest(monkeypatch, status):
    called(monkeypatch, [], status=status)


def test_every_file_of_tests_and_notebooks_is_named_once_and_the_longest_first(monkeypatch):
    command, _ = called(monkeypatch, [])
    named = [name for name in command if name.endswith((".py", ".ipynb"))]
    there = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")]
    notebooks = [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]
    notebooks = [name for name in notebooks if (ROOT / name).exists()]
    assert sorted(named) == sorted(there + notebooks)
    assert named[: len(notebooks)] == notebooks
    longest = [f"tests/{name}.py" for name in run_all.LONGEST]
    assert named[len(notebooks) :][: len(longest)] == longest
    assert OPTIONS["ini_options"]["testpaths"] == ["tests", "notebooks"]


def test_quick_leaves_out_the_notebooks_and_what_is_slow(monkeypatch):
    command, _ = called(monkeypatch, ["--quick", "-k", "mask"])
    assert not any(name.endswith(".ipynb") for name in command)
    assert command[3:5] == ["-m", "not slow"]
    assert command[command.index("-k") + 1] == "mask"
    command, _ = called(monkeypatch, [])
    assert "not slow" not in command


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, "1"), (2, 2, "1"), (8, 8, "1"), (32, 8, "4")]
)
def test_all_cores_are_used(monkeypatch, cores, processes, threads):
    command, environment = called(monkeypatch, [], cores)
    assert f"--numprocesses={processes}" in command
    assert environment["OMP_NUM_THREADS"] == threads
