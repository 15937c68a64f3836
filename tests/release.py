"""Build the wheel and the source archive, and try them: `make release`.

It is made of what is committed. Both go to `dist/` only after all this held: the version is in
CHANGELOG.md and CITATION.cff; the wheel, built from the archive, has every file of the package that
is committed and nothing else of the repository; and, installed into an empty environment, it draws
a picture by its command line. There the libraries come from the environment that runs this script,
so that nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).parent.parent
FOR_READERS = {"lrd_helpers/training/README.md"}  # in the repository, not in the wheel
LAYOUT = {
    "version": 1,
    "caption": "a red car at night",
    "background": "at night",
    "layers": [{"prompt": "a red car", "box": [0.1, 0.4, 0.7, 0.9]}],
}


class ReleaseError(ValueError):
    """What is wrong with a release, in one sentence."""


def version_of(root: Path) -> str:
    """The version of the repository at `root`, which its changes and its citation must have, too.

    Raises:
        ReleaseError: one of them has another.
    """
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    version = tomllib.loads(text)["project"]["version"]
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    if str(cited) != version:
        raise ReleaseError(f"CITATION.cff has version {cited}, pyproject.toml {version}")
    lines = (root / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    newest = next((line for line in lines if line.startswith("## ")), "no version")
    if newest.removeprefix("## ").split()[0] != version:
        raise ReleaseError(
            f"the newest entry of CHANGELOG.md is {newest!r}, but pyproject.toml has {version}: "
            f"say under '## {version}' what a user notices"
        )
    return version


def wheel_faults(held: Collection[str], committed: Collection[str]) -> list[str]:
    """What a wheel of files `held` lacks, or has and should not, a sentence each."""
    right = {name for name in committed if name.startswith("lrd_helpers/")} - FOR_READERS
    files = {name for name in held if ".dist-info/" not in name}
    missing = [f"the wheel lacks {name}" for name in sorted(right - files)]
    return missing + [f"the wheel has {name}, which is not its" for name in sorted(files - right)]


def run(*command: str | Path, **options: object) -> None:
    """Run a command; what it says is shown where it fails.

    Raises:
        ReleaseError: it failed.
    """
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise ReleaseError(f"this failed: {' '.join(str(part) for part in command)}")


def git(root: Path, *command: str) -> list[str]:
    """The lines that git answers in the repository at `root`."""
    command = ("git", "-C", str(root), *command)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def try_installed(wheel: Path, folder: Path) -> None:
    """Install `wheel` into an empty environment in `folder` and draw a picture with it.

    Raises:
        ReleaseError: that failed, or not the wheel's files were used.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    [site_packages] = (folder / "venv").rglob("site-packages")
    libraries = Path(yaml.__file__).parent.parent
    (site_packages / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    (folder / "car.json").write_text(json.dumps(LAYOUT), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    used = f"import lrd_helpers as l; assert l.__file__.startswith({str(folder)!r}), l.__file__"
    run(python, "-c", used, cwd=folder, env=environment)
    draw = ["-m", "lrd_helpers", "render", "car.json", "--steps", "4", "--output", "pictures"]
    run(python, *draw, cwd=folder, env=environment)
    if not list((folder / "pictures").glob("car*.png")):
        raise ReleaseError("the installed wheel drew no picture of car.json")


def release(root: Path, output: Path) -> list[Path]:
    """Build and try the release of the repository at `root`; its two files, in `output`.

    Raises:
        ReleaseError: what is wrong; `output` is as it was.
    """
    version = version_of(root)
    if changed := git(root, "status", "--porcelain"):
        raise ReleaseError(f"a release is made of what is committed, but {changed[0]!r} is not")
    committed = git(root, "ls-files", "lrd_helpers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        source = folder / "source"  # what is committed: no build folder of before gets in
        run("git", "clone", "--quiet", "--depth", "1", root.as_uri(), source)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
        [wheel], [archive] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        if faults := wheel_faults(zipfile.ZipFile(wheel).namelist(), committed):
            raise ReleaseError("\n".join(faults))
        if f"-{version}-" not in wheel.name:
            raise ReleaseError(f"{wheel.name} is not of version {version}")
        try_installed(wheel, folder)
        output.mkdir(exist_ok=True)
        return [Path(shutil.copy(path, output)) for path in (wheel, archive)]


def main(arguments: Sequence[str]) -> int:
    """Build and try the release of this repository; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    try:
        files = release(ROOT, parser.parse_args(arguments).output)
    except ReleaseError as error:
        print(f"error: nothing was released.\n{error}", file=sys.stderr)
        return 1
    for path in files:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
