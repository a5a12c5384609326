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
from fxdbsr.kernels import compact, dense
from fxdbsr.kernels.choice import Case, choose, engine_module
from fxdbsr.nn import packed_forward
from fxdbsr.nn.changes import one_warning
from fxdbsr.nn.lift import lift_of

_REFRESH = RLock()  # threads that call one layer derive once


class PackedConv(nn.Module):
    """`activation(conv(input, unpack(values)) + bias + residual)`, without scales, for evaluation.

    It computes once it has an engine: `choose_engine`, after all attributes are set. What is written into `values` or
    `bias` runs in the next call (`refresh`).

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
        pool: side of a max pool that alone reads the output, 1 for none; the conv may take it in (`forward`).
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
        self.sizes = (
            planar.grid.in_channels,
            planar.grid.out_channels,
            list(planar.stride),
            list(planar.padding),
            list(planar.dilation),
            planar.grid.groups,
        )
        self.activation, self.negative_slope = "none", 0.01
        self.adds_residual, self.pool, self.input_size, self.precision = False, 1, input_size, None
        self.form: dict[str, Any] = {}
        for name, tensor in zip(("values", "crow_indices", "col_indices"), packed, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.engine, self.reason, self.revision, self._derived_of = "", "", 0, self._written()

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
            self.pool,
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
            derived = dense.layout(self.weight().detach(), self.grid.groups)
        elif self.engine == "compact":
            found = compact.channels_with_blocks(self.grid, self.crow_indices, self.col_indices)
            kept = [channels.to(self.values.device) for channels in found]
            derived = [self.compact_weight(*kept).detach().contiguous(), *kept]
        else:
            derived = self._pack()
        for number, tensor in enumerate(derived):  # as buffers, whose sizes torch.compile takes for constants
            self.register_buffer(f"derived{number}", tensor, persistent=False)
        self._derived_of = self._written()

    def _written(self) -> tuple[int, ...]:
        """What changes where values or bias are replaced or written in place; inference tensors count no writes."""
        held = (self._buffers["values"], self._buffers["bias"])
        return tuple(n for t in held if t is not None for n in (id(t), 0 if t.is_inference() else t._version))

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
        values = self.values.detach() if self.lift is None else self.lift.values(self.values.detach())
        values = values if module is None else module.layout(values)
        if self.lift is None:
            self._take_layout(values)
        else:
            self.register_buffer("lifted_values", values, persistent=False)
            self.register_buffer("lifted_bias", self.lift.bias(self.bias), persistent=False)
        return [] if module is None else self._tables(values)

    def _tables(self, values: Tensor) -> list[Tensor]:
        """The engine's tables for the planar `values`."""
        form = {**self.form}
        if self.precision is not None and self.engine == "triton" and self.values.dtype == torch.float32:
            form["precision"] = self.precision
        planar = self.lift or self
        indices = (self.crow_indices, self.col_indices)
        tables: list[Tensor] = engine_module(self.engine).tables(  # type: ignore[union-attr]
            planar.grid, values, *indices, *self.sizes[2:5], **form
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

    def compact_weight(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The weight as stored, of the output channels `rows` and the input channels `columns` alone."""
        weight = self.grid.to_out_in(self.weight())[rows][:, columns]
        return weight.transpose(0, 1) if self.grid.transposed else weight

    def weight(self) -> Tensor:
        """The dense weight, `[O, I/groups, *kernel]`, zeros where blocks were dropped."""
        return self.grid.unpack(self.values, self.crow_indices, self.col_indices)

    def forward(self, input: Tensor, residual: Tensor | None = None, pool: int = 1) -> Tensor:
        """`[N, I, *size]`, with or without N, and a residual that broadcasts with the output.

        Args:
            pool: side of a max pool of the output that follows, of a 2-d conv; 1 for none.

        Raises:
            TypeError: an input of another dtype than the weights, which autocast alone may cast, or no tensor.
        """
        return packed_forward.run(self, input, residual, pool)

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
