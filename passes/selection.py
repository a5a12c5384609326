"""Which layers `prepare` was asked to block: the configuration, the filter and the types together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fxdbsr.config import BlockConfig, BlockSize
from fxdbsr.nn.scaled import SCALED

CONV_TYPES: tuple[type[nn.Module], ...] = tuple(kind for kind in SCALED if kind is not nn.Linear)


@dataclass(frozen=True)
class Selection:
    """The user's choice of layers.

    Args:
        config: block sizes by name, pattern and type.
        filter_fn: `filter_fn(module, name)` is True for the layers to block; the module is the owner of the
            weight where a function is called on it.
        types: classes of layers to consider.
        prefix: what goes before the names of a part of a model.

    Raises:
        TypeError: `types` holds anything but conv classes and nn.Linear; `filter_fn` cannot be called.
    """

    config: BlockConfig
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    types: Sequence[type[nn.Module]] = field(default=CONV_TYPES)
    prefix: str = ""

    def below(self, name: str) -> Selection:
        """The same for the part `name` of the model; "" is the whole."""
        return replace(self, prefix=f"{name}.") if name else self

    def __post_init__(self) -> None:
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(f"filter_fn: expected a function of (module, name), got {self.filter_fn!r}")
        if not isinstance(self.types, Iterable):
            raise TypeError(f"types: expected a list of conv classes or nn.Linear, got {self.types!r}")
        object.__setattr__(self, "types", tuple(self.types))
        for kind in self.types:
            if not isinstance(kind, type) or not issubclass(kind, tuple(SCALED)):
                raise TypeError(f"types: expected conv classes or nn.Linear, got {kind!r}")

    def block_size_of(self, module: nn.Module, name: str, kind: type) -> BlockSize | None:
        """Block size asked for the layer `name` of class `kind`, or None to leave it alone."""
        name = f"{self.prefix}{name}"
        named = name in self.config.by_name
        if not named and not issubclass(kind, tuple(self.types)):
            return None
        if self.filter_fn is not None and not self.filter_fn(module, name):
            return None
        return self.config.block_size_of(name, kind)
