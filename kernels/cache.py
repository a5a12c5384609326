"""Files that outlive the process, in a private folder: at worst a slow start with one warning.

The folder is `FXDBSR_CACHE`, else `XDG_CACHE_HOME/fxdbsr`, else `~/.cache/fxdbsr`. It is used only where no other
user can put a file in its place: it and every folder above it belong to this user or to root, and others may
write to none of them (a parent with the sticky bit, such as /tmp, will do: nobody can rename there what is not
theirs). A file is written beside its place and moved there, so that what another process reads is whole; code is led
by its hash, too, and not used where that differs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path

LIMIT = 256 * 2**20  # bytes in the folder above which the oldest files go
STALE = 3600.0  # seconds after which the unfinished file of a process that died goes
_UNFINISHED = ".unfinished-"
_HASH = 32  # bytes of SHA-256 that lead a file

_said: dict[str, str] = {}
_tidied: set[Path] = set()


def read(name: str) -> bytes | None:
    """What `write` last kept under `name`; None where there is nothing, or it is damaged."""
    content = read_plain(name)
    if content is None:
        return None
    if hashlib.sha256(content[_HASH:]).digest() != content[:_HASH]:
        warn_damaged(name)
        return None
    return content[_HASH:]


def write(name: str, content: bytes) -> None:
    """Keep `content` under `name`, where there is a folder and room for it."""
    write_plain(name, hashlib.sha256(content).digest() + content)


def read_plain(name: str) -> bytes | None:
    """The file `name` as it is, for content that shows by itself whether it is damaged; None where there is none."""
    folder = _folder()
    if folder is None:
        return None
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"cache: {folder / name} cannot be read, and is made anew: {error}")
        return None


def write_plain(name: str, content: bytes) -> None:
    """Make the file `name` of `content` alone, where there is a folder and room for it."""
    folder = _folder()
    if folder is None:
        return
    path = None
    try:
        handle, path = tempfile.mkstemp(prefix=_UNFINISHED, dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(path, folder / name)
        path = None
        _tidy(folder)
    except OSError as error:
        _warn(f"cache: {folder} cannot be written: {error}")
    finally:
        if path is not None:
            _remove(Path(path))


def warn_damaged(name: str) -> None:
    """Warn that the file `name` is not what was written."""
    _warn(f"cache: {name} is damaged, and is made anew")


def _folder() -> Path | None:
    """The folder, made where it is missing; None where it cannot be used safely."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("FXDBSR_CACHE") or f"{base}/fxdbsr")
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        reason = why_unsafe(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, or links in a circle
        reason = str(error)
    if reason is not None:
        _warn(f"cache: {folder} is not used: {reason}")
        return None
    return folder


def why_unsafe(folder: Path) -> str | None:
    """Why another user could put files in `folder`, a path without links, as a sentence; None where none can."""
    if sys.platform == "win32":
        return None
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid not in (os.getuid(), 0):
            return f"{part} belongs to another user"
        if part != folder and status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)):
            return f"{part} is writable for other users"
    return None


def _is_private(group: int) -> bool:
    """True for a group of this user alone, as many systems give every user one."""
    import grp
    import pwd

    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}


def _tidy(folder: Path) -> None:
    """Once in a process: remove what died processes left, and the oldest files above `LIMIT`."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    found = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except OSError:  # another process was faster
            continue
        if path.name.startswith(_UNFINISHED):
            if time.time() - status.st_mtime > STALE:
                _remove(path)
        else:
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT:
            break
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _warn(f"cache: {path} cannot be removed: {error}")


def _warn(message: str) -> None:
    """Warn, once in a process."""
    if _said.setdefault("first", message) is message:
        warnings.warn(message, stacklevel=4)
