"""What the user asks for: block sizes, per layer where wanted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

BlockSize: TypeAlias = tuple[int | None, int | None]
Form: TypeAlias = Literal["product", "clamp", "mask"]

FORMS: tuple[Form, ...] = ("product", "clamp", "mask")


def as_block_size(value: object, where: str = "block_size") -> BlockSize:
    """Normalise `value`, one int or a pair (out, in) of ints or None, to a pair.

    Raises:
        ValueError, TypeError: anything else, with `where` in the message.

    >>> as_block_size(32), as_block_size((1, None))
    ((32, 32), (1, None))
    """
    expected = f"{where}: expected a positive int, or a pair (out, in) of positive ints or None, got {value!r}"
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, tuple | list):
        raise TypeError(expected)
    if len(value) != 2:
        raise ValueError(expected)
    for entry in value:
        if entry is not None and (not isinstance(entry, int) or isinstance(entry, bool)):
            raise TypeError(expected)
        if entry is not None and entry < 1:
            raise ValueError(expected)
    out, in_ = value
    return (out, in_)


def as_form(value: object) -> Form:
    """Check that `value` names a form of the scaled weight.

    Raises:
        ValueError: `value` is none of `FORMS`.
    """
    for form in FORMS:
        if value == form:
            return form
    raise ValueError(f"form: expected one of {FORMS}, got {value!r}")


@dataclass(frozen=True)
class BlockConfig:
    """Which layers are blocked, and how.

    The first of these that speaks about a layer decides: `by_name` (the layer's full name), `by_pattern`
    (regular expressions that match the whole name, in order), `by_type` (the module's class or a base of it,
    given as the class or as its name), `block_size`. A value of None leaves the layer alone.

    Raises:
        ValueError, TypeError: a block size that is not one or two positive ints or None, an invalid pattern.

    >>> config = BlockConfig((32, 32), by_name={"fc": None}, by_pattern={r"layer4\\..*": (64, 16)})
    >>> config.block_size_of("layer4.0.conv1", object), config.block_size_of("fc", object)
    ((64, 16), None)
    """

    block_size: Any = (32, 32)
    by_name: Mapping[str, Any] = field(default_factory=dict)
    by_pattern: Mapping[str, Any] = field(default_factory=dict)
    by_type: Mapping[Any, Any] = field(default_factory=dict)
    form: Form = "product"

    def __post_init__(self) -> None:
        def normal(mapping: Mapping[Any, Any], what: str) -> dict[Any, BlockSize | None]:
            if not isinstance(mapping, Mapping):
                raise TypeError(f"{what}: expected a dict, got {mapping!r}")
            return {
                key: None if size is None else as_block_size(size, f"{what}[{key!r}]") for key, size in mapping.items()
            }

        size = None if self.block_size is None else as_block_size(self.block_size)
        object.__setattr__(self, "block_size", size)
        for what in ("by_name", "by_pattern", "by_type"):
            object.__setattr__(self, what, normal(getattr(self, what), what))
        for key in self.by_type:
            if not isinstance(key, type | str):
                raise TypeError(f"by_type: expected classes or their names as keys, got {key!r}")
        for pattern in self.by_pattern:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"by_pattern: {pattern!r} is not a regular expression: {error}") from error
        as_form(self.form)

    def block_size_of(self, name: str, kind: type) -> BlockSize | None:
        """Block size (out, in) asked for the layer `name` of class `kind`, or None to leave it alone."""
        if name in self.by_name:
            return _size(self.by_name[name])
        for pattern, size in self.by_pattern.items():
            if re.fullmatch(pattern, name):
                return _size(size)
        for base in kind.__mro__:
            for key in (base, base.__name__):
                if key in self.by_type:
                    return _size(self.by_type[key])
        return _size(self.block_size)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain types that JSON can hold; classes become their names."""

        def plain(mapping: Mapping[Any, Any]) -> dict[str, Any]:
            return {
                key.__name__ if isinstance(key, type) else key: None if size is None else list(size)
                for key, size in mapping.items()
            }

        return {
            "block_size": None if self.block_size is None else list(self.block_size),
            "by_name": plain(self.by_name),
            "by_pattern": plain(self.by_pattern),
            "by_type": plain(self.by_type),
            "form": self.form,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown keys. TypeError: `data` is no dict.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"BlockConfig.from_dict: expected a dict, got {data!r}")
        unknown = sorted(map(repr, set(data) - {"block_size", "by_name", "by_pattern", "by_type", "form"}))
        if unknown:
            raise ValueError(f"BlockConfig.from_dict: unknown keys {', '.join(unknown)}")
        return cls(**data)


def _size(value: Any) -> BlockSize | None:
    return value  # type: ignore[no-any-return]
