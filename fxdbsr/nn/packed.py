"""The conv layer for inference: the blocks that are left, packed, and an engine that multiplies them alone.

State: `values [nnz, BO, BC, *kernel]`, `crow_indices`, `col_indices` (int32) and `bias`. What the engine
derives from them (tables, the dense weight) is made again from the state and never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import compact, dense, ops
from fxdbsr.kernels.choice import TORCH, Case, choose, engine_module
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.reference import activate
from fxdbsr.nn.changes import one_warning
from fxdbsr.nn.lift import lift_of

_REFRESH = RLock()  # threads that call one layer derive once


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
        output_padding: of a transposed conv.
        input_size: see the attribute.

    Attributes:
        lift: how the layer is a 2-d conv for the engines, where it is none itself.
        dense_grid: the blocks of the weight as it was before channels were removed, for the report.
        revision: how often `derive` was called; plans of whole models follow it.
        kept_channels: why dead channels of the output are computed still, as a sentence, or "".
        adds_residual: whether its calls pass a residual, as far as conversion knows.
        input_size: images, height and width (of the lifted input) that conversion saw, or None; 0 images where
            only a forward before conversion was seen.
        precision: "3xtf32" for float32 convs of the Triton engine, or None; see `fxdbsr.set_float32_precision`.
        engine, reason: which engine runs the layer ("compact" and "dense" are torch's own), and why, as a sentence.
        activation, negative_slope: of the epilogue; one of `fxdbsr.kernels.geometry.ACTIVATIONS`.
        form: what tuning found for the Triton engine, arguments of its `tables`.
    """

    is_leaf_in_trace = True
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    input_size: tuple[int, ...] | None
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
        output_padding: Sequence[int] = (),
        input_size: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.pad, self.backend, self.blocked = grid, pad, backend, blocked
        self.dense_grid, self.kept_channels = grid, ""
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.output_padding = list(output_padding)
        self.lift = lift_of(grid, tuple(stride), tuple(padding), tuple(dilation), tuple(output_padding))
        planar = self.lift or self
        self._sizes = (
            planar.grid.in_channels,
            planar.grid.out_channels,
            list(planar.stride),
            list(planar.padding),
            list(planar.dilation),
            planar.grid.groups,
        )
        self.activation, self.negative_slope = "none", 0.01
        self.adds_residual, self.input_size, self.precision = False, input_size, None
        self.form: dict[str, Any] = {}
        for name, tensor in zip(("values", "crow_indices", "col_indices"), packed, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.engine, self.reason, self.revision, self._derived_of = "", "", 0, self._written()
        self.choose_engine()

    @property
    def density(self) -> float:
        """Fraction of the blocks that are kept."""
        rows, columns = self.grid.shape
        return self.col_indices.shape[0] / (rows * columns)

    def case(self) -> Case:
        """The layer as the choice of an engine sees it."""
        planar = self.lift or self
        return Case(
            planar.grid,
            self.crow_indices,
            self.col_indices,
            tuple(planar.stride),
            tuple(planar.padding),
            tuple(planar.dilation),
            self.values.dtype,
            self.values.device,
            self.bias is not None,
            self.adds_residual,
            self.activation,
            self.input_size,
            self.precision,
        )

    def choose_engine(self) -> None:
        """Take the engine that `backend` stands for with the present dtype and device, and derive its tables."""
        if self.values.is_meta and self.backend == "auto":
            self.use("dense", "the meta device has shapes alone")
            return
        choice = choose(self.backend, self.case())
        self.use(choice.engine, choice.reason, choice.form)

    def use(self, engine: str, reason: str, form: dict[str, Any] | None = None) -> None:
        """Take `engine`, because of `reason`, and derive what it needs; `form` goes to the engine's `tables`."""
        self.engine, self.reason, self.form = engine, reason, form or {}
        self.derive()

    def size_of(self, x: Tensor) -> tuple[int, ...]:
        """`(N, H, W)` of the input `x` as the engines see it."""
        x = x if x.dim() == len(self.stride) + 2 or not self.stride else x.unsqueeze(0)
        if self.pad is not None:
            x = F.pad(x, self.pad[0], self.pad[1])
        x = x if self.lift is None else self.lift.image(x)
        return (x.shape[0], *x.shape[2:])

    def derive(self) -> None:
        """Make what the engine needs beyond the state: the dense weight, or the engine's tables."""
        self.revision += 1
        self._take_derived()
        if self.engine == "dense":
            derived = [dense.layout(self.weight().detach())]
        elif self.engine == "compact":
            found = compact.channels_with_blocks(self.grid, self.crow_indices, self.col_indices)
            kept = [channels.to(self.values.device) for channels in found]
            derived = [self._compact_weight(*kept).detach().contiguous(), *kept]
        else:
            derived = self._pack()
        for number, tensor in enumerate(derived):  # as buffers, whose sizes torch.compile takes for constants
            self.register_buffer(f"derived{number}", tensor, persistent=False)
        self._derived_of = self._written()

    def _written(self) -> tuple[int, ...]:
        """What changes where the values or the bias are replaced or written in place."""
        values, bias = self._buffers["values"], self._buffers["bias"]
        return (*version_of(values), *version_of(bias))

    def refresh(self) -> None:
        """Derive again where values or bias are not those that were derived from, as after an optimizer's step."""
        if self._derived_of == self._written() or "_is_replica" in self.__dict__:
            return
        with _REFRESH, torch.inference_mode(False), torch.no_grad():
            if self._derived_of != self._written():
                self.derive()

    def __getstate__(self) -> dict[str, Any]:
        self.refresh()
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._derived_of = self._written()

    def _pack(self) -> list[Tensor]:
        """Put the values in the engine's order, and return its tables."""
        module = None if self.engine == "reference" else engine_module(self.engine)
        grid, values = self.grid, self.values
        if self.lift is not None:
            grid, values = self.lift.grid, self.lift.values(values.detach())
        values = values if module is None else module.layout(values)
        if self.lift is None:
            self._take_layout(values)
        else:
            self.register_buffer("lifted_values", values, persistent=False)
            self.register_buffer("lifted_bias", self.lift.bias(self.bias), persistent=False)
        if module is None:
            return []
        form = {**self.form}
        if self.precision is not None and self.engine == "triton" and self.values.dtype == torch.float32:
            form["precision"] = self.precision
        tables: list[Tensor] = module.tables(
            grid, values, self.crow_indices, self.col_indices, *self._sizes[2:5], **form
        )
        return tables

    def _take_layout(self, values: Tensor) -> None:
        """Hold the values as the engine reads them, `values`; those that are trained stay the optimizer's tensor."""
        if (values.data_ptr(), values.stride()) == (self.values.data_ptr(), self.values.stride()):
            return
        if self.values.requires_grad:
            self.values.data = values.detach()
        else:
            self.values = values

    def derived(self) -> list[Tensor]:
        """What the engine derived from the state."""
        return [tensor for name, tensor in self._buffers.items() if name.startswith("derived")]  # type: ignore[misc]

    def _take_derived(self) -> dict[str, Tensor | None]:
        """Remove and return what was derived from the state."""
        names = [name for name in self._buffers if name.startswith(("derived", "lifted"))]
        return {name: self._buffers.pop(name) for name in names}

    def engine_weights(self) -> Tensor:
        """The packed weights in the order in which the CPU engine reads them."""
        derived = self.derived()
        return derived[0] if derived else self.planar_values()

    def planar_values(self) -> Tensor:
        """The values of the 2-d conv that the engines run, in the engine's order."""
        if self.lift is None:
            return self.values
        if not (torch.is_grad_enabled() and self.values.requires_grad):
            return self.get_buffer("lifted_values")
        module = None if self.engine == "reference" else engine_module(self.engine)
        values = self.lift.values(self.values)
        return values if module is None else module.layout(values)

    def planar_bias(self) -> Tensor | None:
        """The bias of the 2-d conv that the engines run."""
        if self.lift is None or self.bias is None:
            return self.bias
        live = torch.is_grad_enabled() and self.bias.requires_grad
        return self.lift.bias(self.bias) if live else self.get_buffer("lifted_bias")

    def weight(self) -> Tensor:
        """The dense weight, `[O, I/groups, *kernel]`, zeros where blocks were dropped."""
        return self.grid.unpack(self.values, self.crow_indices, self.col_indices)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, I, *size]`, with or without N, and a residual that broadcasts with the output.

        Raises:
            TypeError: an input of another dtype than the weights, which autocast alone may cast, or no tensor.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None:
            self.refresh()
        batched = input.dim() == len(self.stride) + 2 or not self.stride
        x = input if batched else input.unsqueeze(0)
        if x.dtype != self.values.dtype:
            if not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
                raise TypeError(f"input: expected {self.values.dtype}, the dtype of the weights, got {x.dtype}")
            x = x.to(self.values.dtype)
        if self.pad is not None:
            x = F.pad(x, self.pad[0], self.pad[1])
        if self.lift is not None and self.engine not in TORCH:
            return self._as_planar(x, residual, batched)
        if batched and self.engine in TORCH:
            return self._dense(x, residual, self.activation)
        if batched and self._fits(x, residual):
            return self._packed(x, residual, self.activation)
        y = self._dense(x, None, "none") if self.engine in TORCH else self._packed(x, None, "none")
        y = y if batched else y.squeeze(0)
        return activate(y if residual is None else y + residual, self.activation, self.negative_slope)

    def _as_planar(self, x: Tensor, residual: Tensor | None, batched: bool) -> Tensor:
        """The layer as a 2-d conv, `x` in the layer's own axes."""
        assert self.lift is not None
        image = self.lift.image(x)
        added = None if residual is None or not batched else self.lift.residual(residual)
        alone = residual is None or (added is not None and self._fits(image, added))
        y = self.lift.result(self._packed(image, added if alone else None, self.activation if alone else "none"), x)
        y = y if batched else y.squeeze(0)
        return y if residual is None or alone else activate(y + residual, self.activation, self.negative_slope)

    def _packed(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        state: dict[str, Any] = self._buffers
        own = self.lift is None
        trained = torch.compiler.is_compiling() and self.values.requires_grad  # then nothing derives again
        return ops.conv(
            x,
            state["values"] if own else self.planar_values(),
            state["crow_indices"],
            state["col_indices"],
            state["bias"] if own else self.planar_bias(),
            residual,
            [] if trained else self.derived(),
            *self._sizes,
            activation,
            self.negative_slope,
            "reference" if trained else self.engine,
        )

    def _dense(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """Torch's own layer, on all channels or on those that hold a block."""
        live = (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self.values.requires_grad
        if self.engine == "compact":
            y = self._compact(x, live)
        else:
            weight = self.weight() if live else self.get_buffer("derived0")
            if self.grid.kernel_size and not self.grid.transposed:
                geometry = (self.stride, self.padding, self.dilation, self.grid.groups)
                return dense.conv(x, weight, self.bias, residual, *geometry, activation, self.negative_slope)
            y = torch_layer(x, weight, self.bias, self)
        return activate(y if residual is None else y + residual, activation, self.negative_slope)

    def _compact_weight(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The weight as stored, of the output channels `rows` and the input channels `columns` alone."""
        weight = self.grid.to_out_in(self.weight())[rows][:, columns]
        return weight.transpose(0, 1) if self.grid.transposed else weight

    def _compact(self, x: Tensor, live: bool) -> Tensor:
        """The layer on the channels that hold a block, its bias on the others."""
        weight, rows, columns = self.derived()
        weight = self._compact_weight(rows, columns) if live else weight
        axis = 1 if self.grid.kernel_size else x.dim() - 1
        x = compact.take_channels(x, columns, axis) if len(columns) < self.grid.in_channels else x
        y = torch_layer(x, weight, None if self.bias is None else self.bias[rows], self)
        if len(rows) == self.grid.out_channels:
            return y
        others = y.new_zeros(self.grid.out_channels) if self.bias is None else self.bias
        return compact.place_channels(y, rows, axis, others)

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        """True where the operator can add `residual`: it does not broadcast and has the dtype of the output."""
        if residual is None:
            return True
        if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
            return False
        grid = self.grid if self.lift is None else self.lift.grid
        spatial = output_size(x.shape[2:], grid.kernel_size, *self._sizes[2:5])
        return tuple(residual.shape) == (x.shape[0], grid.out_channels, *spatial)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConv:
        self.refresh()
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
            self._derived_of = self._written()
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


def version_of(tensor: Tensor | None) -> tuple[int, int]:
    """What changes where a tensor is replaced or written in place; inference tensors count no writes."""
    return id(tensor), 0 if tensor is None or tensor.is_inference() else tensor._version


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor | None, layer: PackedConv) -> Tensor:
    """`x` through the function of torch that `layer` stands for, with `weight` as stored; the groups are `layer`'s."""
    grid = layer.grid
    if not grid.kernel_size:
        return F.linear(x, weight, bias)
    if not grid.transposed:
        geometry = (layer.stride, layer.padding, layer.dilation, grid.groups)
        return dense.conv(x, weight, bias, None, *geometry, "none", 0.0)
    back: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(layer.stride) - 1]
    padding = (layer.padding, layer.output_padding or 0)
    y: Tensor = back(x, weight, bias, layer.stride, *padding, grid.groups, layer.dilation)
    return y


def why_unpacked(layer: nn.Module) -> str | None:
    """Why `layer`, which has a `grid`, is not packed, as a sentence, or None where it can be."""
    grid = layer.grid
    assert isinstance(grid, BlockGrid)
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    if grid.transposed:
        geometry: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.output_padding)
        return None if lift_of(grid, *geometry) else "no engine packs transposed convs whose kernels overlap"
    return None
