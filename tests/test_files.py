"""Files are refused before the work, written in one step, and never left half written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fxdbsr.files import STALE, check_writable, write, writing

ROOT = Path(__file__).parents[1]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, "before")
    with suppress(RuntimeError), writing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_rights_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    usual, own = tmp_path / "usual", tmp_path / "own"
    usual.touch()
    write(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode
    own.touch()
    own.chmod(0o600)
    write(own, b"x")
    assert own.stat().st_mode & 0o777 == 0o600


def test_a_link_stays_a_link_and_a_device_stays_a_device(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    write(link, "through")
    assert link.is_symlink()
    assert target.read_text() == "through"
    write("/dev/null", "gone")
    assert not Path("/dev/null").is_file()


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*none"):
        check_writable(tmp_path / "none" / "a")
    check_writable(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="Permission denied"):
        check_writable(tmp_path / "a")


def test_a_name_without_a_suffix_and_a_long_one_are_written(tmp_path: Path) -> None:
    for name in ("model", ".model", "model.", "m" * 250):
        with writing(tmp_path / name) as part:
            torch.save({}, part)
        assert torch.load(tmp_path / name) == {}


def test_what_a_killed_writer_left_goes_in_time(tmp_path: Path) -> None:
    code = "import sys, os, fxdbsr.files as f\nwith f.writing(sys.argv[1]) as part:\n    os.kill(os.getpid(), 9)"
    path = tmp_path / "a[1].txt"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    write(path, "x")
    assert sorted(tmp_path.iterdir()) == sorted([left, path])
    os.utime(left, (time.time() - 2 * STALE,) * 2)
    (tmp_path / "b-0123abcd.txt").touch()
    write(path, "x")
    assert {file.name for file in tmp_path.iterdir()} == {"a[1].txt", "b-0123abcd.txt"}
