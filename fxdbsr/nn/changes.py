"""One warning for all layers of a model that change their engine together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_changes: ContextVar[list[str] | None] = ContextVar("changes", default=None)


@contextmanager
def one_warning() -> Iterator[list[str]]:
    """Collect the changes of engines inside, and warn of them together when the outermost such block ends."""
    changes = _changes.get()
    if changes is not None:
        yield changes
        return
    changes = []
    token = _changes.set(changes)
    try:
        yield changes
    finally:
        _changes.reset(token)
    if changes:
        kinds = "; ".join(f"{number} {change}" for change, number in Counter(changes).items())
        warnings.warn(f"fxdbsr: layers change their engine with dtype and device: {kinds}", stacklevel=5)
