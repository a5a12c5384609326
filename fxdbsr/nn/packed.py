"""The conv layer for inference: the blocks that are left, packed, and an engine that multiplies them alone.

State: `values [nnz, BO, BC, *kernel]`, `crow_indices`, `col_indices` (int32) and `bias`. What the engine
derives from them (tables, the dense weight) is made again from the state and never saved.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import dense, ops
from fxdbsr.kernels.choice import choose, engine_module, why_not
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.reference import activate


class PackedConv(nn.Module):
    """`activation(conv(input, unpack(values)) + bias + residual)`, without scales, for evaluation.

    Args:
        packed: `values`, `crow_indices`, `col_indices` of the blocks that are kept (`BlockGrid.pack`).
        bias: `[O]` or None.
        grid: the blocks of the weight.
        stride, dilation: as in nn.Conv2d, one int an axis.
        padding: zeros on both sides of each axis.
        pad: (amounts, mode) of a separate `F.pad` before the conv, or None.
        backend: which engine to take, see `fxdbsr.convert`.
        blocked: False for a conv that was given no blocks, and is packed whole because an engine runs it faster.

    Attributes:
        dense_grid: the blocks of the weight as it was before channels were removed, for the report.
        revision: how often `derive` was called; plans of whole models follow it.
        kept_channels: why dead channels of the output are computed still, as a sentence, or "".
        adds_residual: whether its calls pass a residual, as far as conversion knows.
        input_size: images, height and width that conversion saw, or None.
        precision: "3xtf32" for float32 convs of the Triton engine, or None; see `fxdbsr.set_float32_precision`.
        form: what tuning found for the Triton engine, arguments of its `tables`.
    """

    is_leaf_in_trace = True
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    input_size: tuple[int, int, int] | None
    precision: str | None

    def __init__(
        self,
        packed: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
        grid: BlockGrid,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        pad: tuple[tuple[int, ...], str] | None,
        backend: str,
        blocked: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.pad, self.backend, self.blocked = grid, pad, backend, blocked
        self.dense_grid, self.kept_channels = grid, ""
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self._sizes = (grid.in_channels, grid.out_channels, self.stride, self.padding, self.dilation, grid.groups)
        self.activation, self.negative_slope = "none", 0.01
        self.adds_residual, self.input_size, self.precision = False, None, None
        self.form: dict[str, Any] = {}
        for name, tensor in zip(("values", "crow_indices", "col_indices"), packed, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.engine, self.reason, self.revision = "", "", 0
        self.choose_engine()

    @property
    def density(self) -> float:
        """Fraction of the blocks that are kept."""
        rows, columns = self.grid.shape
        return self.col_indices.shape[0] / (rows * columns)

    def choose_engine(self) -> None:
        """Take the engine that `backend` stands for with the present dtype and device, and derive its tables."""
        geometry = (self.grid, self.stride, self.padding, self.dilation)
        where = (self.values.dtype, self.values.device)
        seen: dict[str, Any] = {"size": self.input_size, "bias": self.bias is not None, "residual": self.adds_residual}
        seen |= {"activation": self.activation, "precision": self.precision}
        indices = (self.crow_indices, self.col_indices)
        self.engine, self.reason = choose(self.backend, self.density, *geometry, *where, indices, **seen)
        self.form = {}
        self.derive()

    def use(self, engine: str, reason: str) -> None:
        """Take `engine`, because of `reason`, and derive what it needs."""
        self.engine, self.reason = engine, reason
        self.derive()

    def candidates(self) -> list[str]:
        """Engines that can run this conv with the present dtype and device, dense among them."""
        arguments = (self.grid, self.stride, self.padding, self.dilation, self.values.dtype, self.values.device)
        return [engine for engine in ("cpu", "triton", "dense") if why_not(engine, *arguments) is None]

    def derive(self) -> None:
        """Make what the engine needs beyond the state: the dense weight, or the engine's tables."""
        derived: list[Tensor] = []
        self.revision += 1
        packed = (self.values, self.crow_indices, self.col_indices)
        if self.engine == "dense":
            derived = [dense.layout(self.grid.unpack(*packed).detach())]
        elif self.engine != "reference":
            module = engine_module(self.engine)
            assert module is not None
            self.values = module.layout(self.values)
            form = {**self.form}
            if self.precision is not None and self.engine == "triton" and self.values.dtype == torch.float32:
                form["precision"] = self.precision
            geometry = (self.stride, self.padding, self.dilation)
            derived = module.tables(self.grid, self.values, *packed[1:], *geometry, **form)
        self._take_derived()
        for number, tensor in enumerate(derived):  # as buffers, whose sizes torch.compile takes for constants
            self.register_buffer(f"derived{number}", tensor, persistent=False)

    def derived(self) -> list[Tensor]:
        """What the engine derived from the state."""
        return [tensor for name, tensor in self._buffers.items() if name.startswith("derived")]  # type: ignore[misc]

    def _take_derived(self) -> dict[str, Tensor]:
        """Remove and return what the engine derived."""
        return {name: self._buffers.pop(name) for name in [*self._buffers] if name.startswith("derived")}  # type: ignore

    def engine_weights(self) -> Tensor:
        """The packed weights in the order in which the CPU engine reads them."""
        derived = self.derived()
        return derived[0] if derived else self.values

    def weight(self) -> Tensor:
        """The dense weight, `[O, I/groups, *kernel]`, zeros where blocks were dropped."""
        return self.grid.unpack(self.values, self.crow_indices, self.col_indices)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, I, *size]`, with or without N, and a residual that broadcasts with the output."""
        batched = input.dim() == len(self.stride) + 2
        x = input if batched else input.unsqueeze(0)
        if x.dtype != self.values.dtype:
            x = x.to(self.values.dtype)
        if self.pad is not None:
            x = F.pad(x, self.pad[0], self.pad[1])
        if batched and self.engine == "dense":
            return self._dense(x, residual, self.activation)
        if batched and self._fits(x, residual):
            return self._packed(x, residual, self.activation)
        y = self._dense(x, None, "none") if self.engine == "dense" else self._packed(x, None, "none")
        y = y if batched else y.squeeze(0)
        return activate(y if residual is None else y + residual, self.activation, self.negative_slope)

    def _packed(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        state: dict[str, Any] = self._buffers
        return ops.conv(
            x,
            state["values"],
            state["crow_indices"],
            state["col_indices"],
            state["bias"],
            residual,
            self.derived(),
            *self._sizes,
            activation,
            self.negative_slope,
            self.engine,
        )

    def _dense(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        live = torch.is_grad_enabled() and self.values.requires_grad
        weight = self.weight() if live else self.get_buffer("derived0")
        geometry = (self.stride, self.padding, self.dilation, self.grid.groups)
        return dense.conv(x, weight, self.bias, residual, *geometry, activation, self.negative_slope)

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """True where the operator can add `residual`: it does not broadcast and has the dtype of the output."""
        if residual is None:
            return True
        if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
            return False
        spatial = output_size(x.shape[2:], self.grid.kernel_size, self.stride, self.padding, self.dilation)
        return tuple(residual.shape) == (x.shape[0], self.grid.out_channels, *spatial)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConv:
        before = (self.values.dtype, self.values.device)
        shape, order = self.values.shape, sorted(range(self.values.dim()), key=self.values.stride, reverse=True)
        # flat, because `.to(memory_format=torch.channels_last)` refuses the five axes of the values
        self.values = self.values.permute(order).flatten()
        derived = self._take_derived()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        flat = self.values.view([shape[axis] for axis in order])
        self.values = flat.permute([order.index(axis) for axis in range(len(order))])
        if (self.values.dtype, self.values.device) != before:
            old = self.engine
            self.choose_engine()
            if self.engine != old:
                with one_warning() as changes:
                    changes.append(f"from {old} to {self.engine} ({self.reason})")
        else:
            self._buffers.update(derived)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # in the order of the axes, whatever order the engine reads: safetensors takes no other
        destination[f"{prefix}values"] = destination[f"{prefix}values"].contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.grid.check_indices(self.crow_indices, self.col_indices, prefix)
        self.derive()

    def extra_repr(self) -> str:
        """Channels, kernel, blocks and engine in one line."""
        g = self.grid
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={tuple(self.stride)}, "
            f"groups={g.groups}, block_size={g.block_size}, density={self.density:.2f}, engine={self.engine}, "
            f"activation={self.activation}"
        )


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


def why_unpacked(layer: nn.Module) -> str | None:
    """Why `layer`, which has a `grid`, is not packed, as a sentence, or None where it can be."""
    grid = layer.grid
    assert isinstance(grid, BlockGrid)
    if not grid.kernel_size:
        return "no engine packs linear layers"
    if grid.transposed:
        return "no engine packs transposed convs"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    return None
