"""What every Triton conv is launched with: the tensors and the geometry of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

AT_ONCE = 2**24  # bytes; an H100 has 50 MB of L2 in two halves


@dataclass(frozen=True)
class Call:
    """One launch; input, residual and output are channels last and have fewer than 2**31 elements each.

    Args:
        input: `[N, C, H, W]`.
        bias: `[O]` or None.
        residual: `[N, O, P, Q]` or None.
        output: `[N, O, P, Q]`, to be filled; of the pooled pixels where a max pool follows.
        pool: side of the max pool that follows, 1 for none.
    """

    input: Tensor
    bias: Tensor | None
    residual: Tensor | None
    output: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activation: str
    negative_slope: float
    pool: int = 1

    @property
    def pixels(self) -> int:
        """Output pixels of the conv, N*P*Q; those that the pool reads."""
        return self.output.numel() // self.output.shape[1] * self.pool**2

    def tiles_at_once(self, pixels: int) -> int:
        """Tiles of that many output pixels whose input fits in L2 beside what else is there."""
        read = pixels * self.stride[0] * self.stride[1] * self.input.shape[1] * self.input.element_size()
        return max(1, AT_ONCE // read)

    def epilogue(self) -> tuple[Tensor, Tensor, Tensor]:
        """bias, residual, output; the output stands in for an absent one, which is never read."""
        bias = self.output if self.bias is None else self.bias
        return bias, self.output if self.residual is None else self.residual, self.output

    def constants(self) -> dict[str, Any]:
        """The kernels' constants that follow from the call; each set of values is compiled once."""
        return {
            "H": self.input.shape[2],
            "W": self.input.shape[3],
            "C": self.input.shape[1],
            "P": self.output.shape[2] * self.pool,
            "Q": self.output.shape[3] * self.pool,
            "O": self.output.shape[1],
            "R": self.kernel_size[0],
            "S": self.kernel_size[1],
            "SH": self.stride[0],
            "SW": self.stride[1],
            "PH": self.padding[0],
            "PW": self.padding[1],
            "DH": self.dilation[0],
            "DW": self.dilation[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "ACTIVATION": self.activation,
        }
