"""The blocked layers of a prepared model, one for each scale, whether called as a module or as a function."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.config import Form
from fxdbsr.graph import called_module, get_attribute
from fxdbsr.nn.scaled import Blocked, ScaledFunction, ScaledLayer
from fxdbsr.ranks import whole
from fxdbsr.traced import graph_modules, unwrap


@dataclass
class BlockedLayer:
    """One blocked weight.

    Attributes:
        name: of the layer, or of the weight where a function is called on it.
        weight: as stored.
        scale: `[rows, columns]`.
        holders: the modules with a buffer that holds the mask, `[rows, columns]` bool, and its name there; these are
            kept equal. Moving a model gives it new buffers, so they are looked up each time.
        grid: the blocks of the weight.
        form: "product", "clamp" or "mask".
        users: the modules that multiply the weight.
    """

    name: str
    weight: nn.Parameter
    scale: nn.Parameter
    holders: list[tuple[nn.Module, str]]
    grid: BlockGrid
    form: Form
    users: list[Blocked] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """`[rows, columns]` bool: False where the block is switched off."""
        owner, name = self.holders[0]
        mask: Tensor = getattr(owner, name)
        return mask

    def set_mask(self, mask: Tensor) -> None:
        """Overwrite the mask, in place."""
        for owner, name in self.holders:
            getattr(owner, name).copy_(mask)

    def alive(self, scale: Tensor | None = None) -> Tensor:
        """`[rows, columns]` bool: the blocks that are not exactly zero by `scale` (by default its own) or mask."""
        if self.form == "mask":
            return self.mask.clone()
        scale = whole(self.scale.detach()) if scale is None else scale
        return self.mask & (scale > 0 if self.form == "clamp" else scale != 0)


def blocked_layers(model: nn.Module) -> list[BlockedLayer]:
    """Every blocked weight of `model` (also inside DDP and torch.compile), in the order of its modules.

    Raises:
        ValueError: `model` has none: it was not prepared. TypeError: it is no module.
    """
    root = unwrap(model)
    found: dict[int, BlockedLayer] = {}

    def add(name: str, user: Blocked, weight: nn.Parameter, scale: nn.Parameter, holder: tuple[nn.Module, str]) -> None:
        layer = found.setdefault(id(scale), BlockedLayer(name, weight, scale, [], user.grid, user.form))
        if all(user is not known for known in layer.users):
            layer.users.append(user)
        if holder not in layer.holders:
            layer.holders.append(holder)

    for name, module in root.named_modules():
        if isinstance(module, ScaledLayer):
            add(name, module, module.weight, module.scale, (module, "mask"))
    for prefix, part in graph_modules(root):
        for node in part.graph.nodes:
            if isinstance(function := called_module(node), ScaledFunction):
                targets = [str(argument.target) for argument in node.args[1:4]]
                weight, scale = (get_attribute(part, target) for target in targets[:2])
                owner, _, mask = targets[2].rpartition(".")
                holder = part.get_submodule(owner), mask
                add(f"{prefix}.{targets[0]}" if prefix else targets[0], function, weight, scale, holder)
    if not found:
        raise ValueError(f"{type(root).__name__} has no block scales: call fxdbsr.prepare first")
    return list(found.values())
