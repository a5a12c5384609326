"""Max pooling of a converted model."""

from __future__ import annotations

from torch import Tensor, nn

from fxdbsr.kernels.pool import max_pool2d


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` without indices and `ceil_mode`, by the kernel that is fastest where its input is."""

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, P, Q]`."""
        return max_pool2d(input, *map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation)))


def pack(module: nn.Module) -> None:
    """Make `module` ours where it is a pool of torch's that gives no indices and rounds sizes down."""
    if type(module) is nn.MaxPool2d and not module.return_indices and not module.ceil_mode:
        module.__class__ = MaxPool2d


def side_of(module: nn.Module | None) -> int:
    """2 where `module` is a pool of ours, without hooks, of windows of 2 by 2 side by side; else 0."""
    if type(module) is not MaxPool2d or module._forward_hooks or module._forward_pre_hooks:
        return 0
    geometry = [_pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation)]
    return 2 if geometry == [(2, 2), (2, 2), (0, 0), (1, 1)] else 0


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else value
