"""The disk cache: whatever is wrong with the disk, results are right, and one warning is all that is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fxdbsr.kernels import cache, jit

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FXDBSR_CACHE", str(tmp_path / "cache"))
    cache._said.clear()
    cache._tidied.clear()
    yield tmp_path / "cache"
    cache._said.clear()


def test_what_was_written_is_read(folder: Path) -> None:
    assert cache.read("a") is None
    cache.write("a", b"one")
    cache.write("a", b"two")
    assert cache.read("a") == b"two"
    assert [path.name for path in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "changed", "longer"])
def test_a_damaged_file_is_not_read_and_one_warning_says_so(folder: Path, damage: str) -> None:
    cache.write("a", bytes(100))
    good = (folder / "a").read_bytes()
    bad = {"empty": b"", "short": good[:20], "cut": good[:-1], "changed": good[:-1] + b"x", "longer": good + b"x"}
    (folder / "a").write_bytes(bad[damage])
    with pytest.warns(UserWarning, match=r"a is damaged"):
        assert cache.read("a") is None
    assert cache.read("a") is None  # a second warning would be an error
    cache.write("a", b"again")
    assert cache.read("a") == b"again"


def test_a_file_that_cannot_be_opened_is_named(folder: Path) -> None:
    cache.write("b", b"")
    (folder / "a").mkdir()
    with pytest.warns(UserWarning, match="a cannot be read"):
        assert cache.read("a") is None


@pytest.mark.parametrize("where", ["folder", "parent"])
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_write_to_is_not_used(
    folder: Path, where: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_is_private", lambda group: False)
    cache.write("a", b"planted")
    (folder if where == "folder" else folder.parent).chmod(mode)
    with pytest.warns(UserWarning, match="is not used: .* is writable for other users"):
        assert cache.read("a") is None
    cache.write("b", b"")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_group_of_this_user_alone_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_is_private", lambda group: True)
    cache.write("a", b"kept")
    folder.parent.chmod(0o775)
    assert cache.read("a") == b"kept"


def test_a_sticky_folder_serves_as_a_parent_and_not_as_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("a", b"kept")
    folder.parent.chmod(0o1777)
    assert cache.read("a") == b"kept"
    monkeypatch.setenv("FXDBSR_CACHE", str(folder.parent))
    with pytest.warns(UserWarning, match="is writable for other users"):
        assert cache.read("a") is None


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("a", b"planted")
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    owner = folder.stat().st_uid
    if owner == 0:  # root's files are trusted, so let the folder belong to somebody else
        os.chown(folder, 1234, -1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert cache.read("a") is None


def test_a_link_is_judged_by_where_it_leads(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    folder.symlink_to(tmp_path / "open")
    with pytest.warns(UserWarning, match="open is writable for other users"):
        cache.write("a", b"")


@pytest.mark.parametrize("place", ["a file", "below a file", "no name", "no home"])
def test_a_folder_that_cannot_be_made_is_no_error(
    folder: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    paths = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache", "no name": "\udcff\x01" * 200}
    monkeypatch.setenv("FXDBSR_CACHE", str(paths.get(place, "~nobody-of-this-name/cache")))
    with pytest.warns(UserWarning, match="is not used"):
        cache.write("a", b"")
    assert cache.read("a") is None


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("a", b"kept")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written: .*No space left"):
        cache.write("b", b"lost")
    cache.write("c", b"lost")
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert cache.read("a") == b"kept"


def test_a_read_only_folder_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("FXDBSR_CACHE", name)
        cache.write("a", b"kept")
        become = ""
        if os.getuid() == 0:  # modes do not bind root
            become = "import os; os.setgid(12345); os.setuid(12345)"
            for path in (name, f"{name}/a"):
                os.chown(path, 12345, 12345)
        os.chmod(name, 0o500)
        code = f"from fxdbsr.kernels import cache; {become}\n"
        code += "assert cache.read('a') == b'kept'; cache.write('b', b''); cache.write('c', b'')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be written") == 1
        assert os.listdir(name) == ["a"]


WRITER = """
import sys
from fxdbsr.kernels import cache
for n in range(10**9):
    cache.write("a", bytes([n % 256]) * 1_000_000)
    assert n or print("ready", flush=True) is None
"""


def test_a_killed_writer_leaves_a_whole_file_and_what_it_left_goes_in_time(folder: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        for _ in range(50):
            content = cache.read("a")  # a damaged one would warn, which is an error here
            assert content is not None
            assert content == content[:1] * 1_000_000
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    assert cache.read("a") is not None
    left = folder / f"{cache._UNFINISHED}dead"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 2 * cache.STALE,) * 2)
    cache.write("b", b"")
    assert not left.exists()


def test_the_oldest_files_go_where_there_are_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("abc"):
        cache.write(name, bytes(1000))
        os.utime(folder / name, (time.time() - age,) * 2)
    cache._tidied.clear()
    monkeypatch.setattr(cache, "LIMIT", 3500)
    cache.write("d", bytes(1000))
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "d"]


def test_code_for_another_machine_or_version_of_llvm_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    host = jit.target_of("x86_64-unknown-linux-gnu", "znver4", {"avx2": True, "fma": True})
    assert host is not None
    names = {jit.key("text", target) for target in (host, replace(host, cpu="znver3"), replace(host, features=""))}
    monkeypatch.setattr(llvm, "llvm_version_info", (1, 0, 0))
    assert len(names | {jit.key("text", host)}) == 4
