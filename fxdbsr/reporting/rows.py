"""One line of the report: what a layer is, how many of its blocks are left, what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerRow:
    """A layer's figures, summed over its calls in one forward; one MAC is one multiply-accumulate, two FLOPs.

    Attributes:
        name: of the layer; of the weight where a function is called on a parameter.
        kind: "conv1d" to "conv3d", "conv_transpose1d" to 3d, "linear", "other" or "total".
        weight_shape: as the dense layer stores it; None where there is no one weight.
        output_shape: of the first call, batch included.
        block_size: (out, in) channels of a block; None where the layer is not blocked.
        blocks_total, blocks_kept: blocks of the weight, and those that are not zero; 0 where not blocked.
        sparsity: fraction of the blocks that is zero; 0 where not blocked.
        macs_dense: MACs with every weight.
        macs: MACs with the kept blocks alone, edge blocks with their real size.
        macs_run: MACs that the kernel executes: all for a dense one, padding of blocks included for others.
        params_dense: numel of dense weight and bias; a batch norm that was folded into them is no more.
        params: numel of the kept blocks and the bias. Scales and masks are none.
        bytes: of parameters, or of packed values, indices and bias, as they are saved; what an engine derives
            from them (tables, an unpacked weight) and buffers such as running statistics are left out.
        kernel: the engine that runs it; "dense" is torch's own.
        reason: why this kernel, or why no blocks, as a sentence.
        ms_dense, ms: milliseconds of the dense form and of the layer as it is, where measured.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    block_size: tuple[int, int] | None = None
    blocks_total: int = 0
    blocks_kept: int = 0
    sparsity: float = 0.0
    macs_dense: int = 0
    macs: int = 0
    macs_run: int = 0
    params_dense: int = 0
    params: int = 0
    bytes: int = 0
    kernel: str = ""
    reason: str = ""
    ms_dense: float | None = None
    ms: float | None = None

    @property
    def saved(self) -> float:
        """Fraction of the dense MACs that the zero blocks save."""
        return 1 - self.macs / self.macs_dense if self.macs_dense else 0.0

    @property
    def changed(self) -> bool:
        """True where blocks or MACs are fewer than the dense layer's."""
        return self.blocks_kept < self.blocks_total or self.macs < self.macs_dense

    def to_dict(self) -> dict[str, Any]:
        """Every field, plain types alone, and the MACs as FLOPs too (`flops_dense`, `flops`, `flops_run`)."""
        figures = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        flops = {key.replace("macs", "flops"): 2 * figures[key] for key in ("macs_dense", "macs", "macs_run")}
        return {**figures, "saved": self.saved, **flops}


_SUMS = (
    "blocks_total",
    "blocks_kept",
    "macs_dense",
    "macs",
    "macs_run",
    "params_dense",
    "params",
    "bytes",
)


def sum_rows(rows: Iterable[LayerRow], name: str, kind: str) -> LayerRow:
    """One row with the figures of `rows` added up."""
    rows = list(rows)
    sums = {key: sum(getattr(row, key) for row in rows) for key in _SUMS}
    sparsity = 1 - sums["blocks_kept"] / sums["blocks_total"] if sums["blocks_total"] else 0.0
    timed = [row for row in rows if row.ms is not None and row.ms_dense is not None]
    return LayerRow(
        name,
        kind,
        sparsity=sparsity,
        ms_dense=sum(row.ms_dense or 0.0 for row in timed) if timed else None,
        ms=sum(row.ms or 0.0 for row in timed) if timed else None,
        **sums,
    )
