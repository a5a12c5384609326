"""batch_norm(conv(x)) -> conv'(x), where the norm uses running statistics.

    W' = W * gamma / sqrt(var + eps)        b' = (b - mean) * gamma / sqrt(var + eps) + beta

computed in float64 and rounded once. The pattern ends every conv layer of ResNets and their kin. A norm before
a conv (DenseNet) stays, as does one with hooks, and one whose conv has other readers or is called more than once.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn

from fxdbsr.channels.layers import BATCH_NORMS
from fxdbsr.graph import called_module
from fxdbsr.nn.scaled import why_unscalable
from fxdbsr.nn.shrink import whole_grid
from fxdbsr.passes.fold_scales import check_finite
from fxdbsr.passes.lowering import Lowering

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batchnorms(model: fx.GraphModule, lowering: Lowering) -> None:
    """Fold every batch norm that directly follows a conv into it.

    Raises:
        ValueError: NaN or infinity in a batch norm's statistics or affine parameters.
    """
    calls = Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")
    for node in list(model.graph.nodes):
        norm = called_module(node)
        if type(norm) not in BATCH_NORMS or norm.running_mean is None:  # type: ignore[union-attr]
            continue
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        source = node.args[0]
        conv = called_module(source)
        if not isinstance(conv, _CONVS) or norm._forward_hooks or norm._forward_pre_hooks:
            continue
        if len(source.users) > 1 or calls[str(source.target)] > 1 or norm.training or not _is_plain(conv):
            continue
        for what in ("weight", "bias", "running_mean", "running_var"):
            check_finite(getattr(norm, what), f"{node.target}.{what}")
        fold_into(conv, norm)
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)


def _is_plain(conv: nn.Module) -> bool:
    """True where the conv computes what its class says, so that its weight may be changed for another."""
    return why_unscalable(conv) is None and not conv._forward_hooks and not conv._forward_pre_hooks


def fold_into(conv: nn.modules.conv._ConvNd, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Set `conv`'s weight and bias to those of conv and norm together; `factor` is in float64, and so the product."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    factor = (var.double() + norm.eps).rsqrt()
    shift = -mean.double() * factor
    if norm.affine:
        factor, shift = factor * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * factor
    grid = whole_grid(conv)
    weight = grid.to_out_in(conv.weight) * factor.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight = _parameter(grid.from_out_in(weight), conv.weight)
    conv.bias = _parameter(shift, conv.weight)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=False)
