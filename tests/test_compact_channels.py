"""Channels taken out of a tensor, and put in their place: in both orders of memory, with gradients."""

import pytest
import torch

from fxdbsr.kernels.compact import place_channels, take_channels


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_channels_are_taken_and_placed(memory: torch.memory_format, size: tuple[int, int]) -> None:
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
    channels, others = torch.tensor([1, 4, 5]), torch.randn(6, dtype=torch.float64, requires_grad=True)
    taken = take_channels(x, channels, 1)
    assert torch.equal(taken, x[:, channels])
    placed = place_channels(taken, channels, 1, others)
    assert torch.equal(placed[:, channels], taken)
    assert torch.equal(placed[:, [0, 2, 3]], others[[0, 2, 3]].view(3, 1, 1).expand(2, 3, *size))
    assert placed.is_contiguous(memory_format=memory)
    torch.autograd.gradcheck(lambda a, b: place_channels(take_channels(a, channels, 1), channels, 1, b), (x, others))


def test_features_of_a_linear_layer_are_taken_and_placed() -> None:
    x, channels = torch.randn(2, 7, 6), torch.tensor([0, 5])
    placed = place_channels(take_channels(x, channels, 2), channels, 2, torch.zeros(6))
    assert torch.equal(placed[..., channels], x[..., channels])
    assert placed.shape == x.shape
