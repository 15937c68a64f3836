import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrd_helpers import files
from lrd_helpers.files import checked_file, replacing, replacing_folder, write_atomically


@pytest.fixture(autouse=True)
def a_new_process() -> None:
    """A process looks for leftovers once in a folder."""
    files._sweep.cache_clear()


# ------------------------------------------------------------------ reading


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    (tmp_path / "link").symlink_to(path)
    assert checked_file(path, 4) == checked_file(str(tmp_path / "link"), 4) == b"1234"
    with pytest.raises(OSError, match="it is larger than 2.86e-06 MB") as caught:
        checked_file(path, 3)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "it is a folder, but should be a file"),
        ("pipe", "it is a pipe, but should be a file"),
        ("/dev/zero", "it is a device, but should be a file"),
        ("gone", "No such file or directory"),
        ("a\0b", "no file can have this name"),
        ("\ud800", "no file can have this name"),
    ],
)
def test_what_is_no_file_is_not_read(name: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    with pytest.raises(OSError, match=reason) as caught:
        checked_file(path, 100)
    assert (caught.value.strerror, caught.value.filename) == (reason, str(path))


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays(there: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    link.symlink_to("far/target")
    if there:
        target.write_bytes(b"old")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize(
    ("old", "mask", "new"),
    [(0o600, 0o022, 0o600), (0o664, 0o077, 0o664), (None, 0o022, 0o644), (None, 0o077, 0o600)],
)
def test_an_old_mode_is_kept_and_a_new_one_is_usual(old, mask, new, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if old is not None:
        path.touch()
        path.chmod(old)
    before = os.umask(mask)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == new


def test_a_device_is_written_to_and_stays() -> None:
    before = os.lstat("/dev/null")
    write_atomically("/dev/null", b"new")
    assert os.path.samestat(before, os.lstat("/dev/null"))
    with pytest.raises(OSError, match="/dev/null") as caught, replacing("/dev/null"):
        pass
    assert caught.value.strerror == "it is a device, but should be a file"


@pytest.mark.parametrize("end", ["pipe", "file"])
def test_standard_output_is_written_to(end: str, tmp_path: Path) -> None:
    code = "from lrd_helpers.files import write_atomically as w; w('/dev/stdout', b'new')"
    with (tmp_path / "out").open("a+") as file:
        print("before", file=file, flush=True)
        stdout = file if end == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, text=True, check=True)
    if end == "pipe":
        assert done.stdout == "new"
    else:
        assert (tmp_path / "out").read_text() == "before\nnew"


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    for name in ("a" * 255, "ü" * 127):
        write_atomically(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "it is a folder, but should be a file"),
        ("gone/a", "No such file or directory"),
        ("file/a", "Not a directory"),
        ("a\0b", "no file can have this name"),
        ("\ud800", "no file can have this name"),
        ("round", "Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_written_is_named(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to("round")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=reason) as caught:
        write_atomically(tmp_path / name, b"new")
    assert (caught.value.strerror, caught.value.filename) == (reason, str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_killed_process_leaves_the_old_file_and_what_it_leaves_is_swept(tmp_path: Path) -> None:
    path, foreign = tmp_path / "a", tmp_path / ".a.tmp"
    path.write_text("old")
    foreign.write_text("of another program")
    code = f"""
from lrd_helpers.files import replacing
with replacing({str(path)!r}) as temporary:
    temporary.write_text("half")
    print(flush=True)
    import time; time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    (leftover,) = {*tmp_path.iterdir()} - {path, foreign}
    with replacing(tmp_path / "b"):
        pass
    assert leftover.exists(), "it may be of a process that still writes"
    long_ago = time.time() - 700
    for file in (leftover, foreign):
        os.utime(file, (long_ago, long_ago))
    files._sweep.cache_clear()
    write_atomically(tmp_path / "c", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.tmp", "a", "b", "c"]


def test_a_mistake_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes("half")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


# ------------------------------------------------------------------ folders


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "new").write_bytes(b"new")
        assert os.listdir(tmp_path / "link") == ["old"]
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "far") == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["far", "link"]


@pytest.mark.parametrize("step", ["fill", "first rename", "second rename"])
def test_a_folder_that_cannot_be_replaced_stays(step, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    renames = []

    def rename(self: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) == ["fill", "first rename", "second rename"].index(step):
            raise OSError(5, "Input/output error")
        os.rename(self, target)

    def replace() -> None:
        with replacing_folder(path) as folder:
            if step == "fill":
                raise OSError(5, "Input/output error")
            (folder / "new").touch()

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error") as caught:
        replace()
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(path) == ["old"]


@pytest.mark.parametrize(("name", "kind"), [("file", "a file"), ("pipe", "a pipe")])
def test_a_file_is_no_folder(name, kind, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    wanted = f"it is {kind}, but should be a folder"
    with pytest.raises(OSError, match=wanted), replacing_folder(tmp_path / name):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / f".a.{digit * 8}.lrd.tmp" for digit in "01")
    for folder in (old, new):
        folder.mkdir()
        (folder / "half").touch()
    os.utime(old, (0, 0))
    with replacing_folder(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == [new.name, "a"]
