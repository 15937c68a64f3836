"""What goes out: versions that agree, a wheel that is whole, a workflow with pinned actions."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from release import FOR_READERS, ReleaseError, release, version_of, wheel_faults
from test_repository import MAKEFILE, PROJECT, REPOSITORY, ROOT

WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_changes_and_citation_have_the_version():
    assert version_of(ROOT) == PROJECT["version"]


def release_files(root: Path, changes: str = "## 2.0.0", cited: str = "2.0.0") -> Path:
    (root / "pyproject.toml").write_text('[project]\nversion = "2.0.0"\n')
    (root / "CITATION.cff").write_text(f"version: {cited}\n")
    (root / "CHANGELOG.md").write_text(f"# Changes\n\n{changes}\n")
    return root


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"changes": "## 1.9.0"}, "newest entry of CHANGELOG.md is '## 1.9.0', but .* has 2.0.0"),
        ({"changes": ""}, "newest entry of CHANGELOG.md is 'no version'"),
        ({"cited": "1.9.0"}, "CITATION.cff has version 1.9.0, pyproject.toml 2.0.0"),
    ],
)
def test_a_version_that_differs_is_named(tmp_path, files, said):
    assert version_of(release_files(tmp_path, changes="## 2.0.0 (today)")) == "2.0.0"
    with pytest.raises(ReleaseError, match=said):
        version_of(release_files(tmp_path, **files))


def test_what_is_not_committed_is_named(tmp_path):
    release_files(tmp_path)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    with pytest.raises(ReleaseError, match=r"what is committed, but '\?\? CHANGELOG.md' is not"):
        release(tmp_path, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_a_wheel_that_lacks_or_has_a_file_is_named():
    committed = ["lrd_helpers/a.py", "lrd_helpers/assets/b.json", *FOR_READERS, "tests/c.py"]
    whole = ["lrd_helpers/a.py", "lrd_helpers/assets/b.json", "lrd_helpers-1.dist-info/RECORD"]
    assert wheel_faults(whole, committed) == []
    assert wheel_faults(whole[:1], committed) == ["the wheel lacks lrd_helpers/assets/b.json"]
    assert wheel_faults([*whole, "tests/c.py"], committed) == [
        "the wheel has tests/c.py, which is not its"
    ]


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == REPOSITORY
    cited = [paper["identifiers"][0]["value"] for paper in citation["references"]]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cited == re.findall(r"note\s+= \{(arXiv:[\d.]+)\}", readme)


def test_the_workflow_runs_what_everybody_runs():
    workflow = yaml.safe_load(WORKFLOW)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs == [".ci/run", "make site"]
    assert re.search(r"^site:", MAKEFILE, flags=re.MULTILINE)
    [path] = [step["with"]["path"] for step in steps if "upload" in step.get("uses", "")]
    assert path == "outputs/site"
    assert workflow["permissions"] == {"contents": "read"}, "only the job that publishes may more"


def test_every_action_is_pinned_by_its_commit():
    actions = re.findall(r"uses: (.+)", WORKFLOW)
    assert actions
    for action in actions:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
