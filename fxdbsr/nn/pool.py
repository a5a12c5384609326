"""Max pooling of a converted model."""

from __future__ import annotations

from torch import Tensor, nn

from fxdbsr.kernels.pool import max_pool2d


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` without indices and `ceil_mode`, by the kernel that is fastest where its input is."""

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, P, Q]`."""
        return max_pool2d(input, *map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation)))


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else value
