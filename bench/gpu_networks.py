"""Whole networks, dense and converted, and how each is made ready to be timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import fxdbsr
from bench.gpu_setting import by_heuristics
from fxdbsr.commands.spread import spread_mask
from fxdbsr.kernels.triton_plan import precision_of
from fxdbsr.layers import blocked_layers
from fxdbsr.passes.plan_engines import seen_inputs

CLASSIFIERS = ("resnet50", "vgg11", "resnext50_32x4d")
STEMS = {"resnet50": "conv1", "resnext50_32x4d": "conv1", "vgg11": "features.0", "vgg11_features": "0"}
STEMS["fpn_resnet50"] = "body.conv1"
SIZES = {"fpn_resnet50": (800, 1088)}


def network(model: str) -> nn.Module:
    """The dense network in eval mode, with random weights and batch norms that are not the identity."""
    torch.manual_seed(0)
    if model == "fpn_resnet50":
        backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
        found: nn.Module = backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d)
    elif model == "vgg11_features":
        found = torchvision.models.vgg11(weights=None).features
    elif model == "tiny":
        found = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
    else:
        found = torchvision.models.get_model(model, weights=None)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return found.eval()


def images(model: str, batch: int, rehearse: bool) -> Tensor:
    """The input, channels last."""
    size = (8, 8) if rehearse else SIZES.get(model, (224, 224))
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def pruned(model: str, block: tuple[int, int], sparsity: float, masks: str = "covered") -> nn.Module:
    """The network prepared, with `sparsity` of each layer's blocks off; none of its stem's.

    Args:
        masks: "covered" keeps a block in each row and column, "exact" the share that is asked for.
    """
    prepared = fxdbsr.prepare(network(model), config=fxdbsr.BlockConfig(block))
    generator = torch.Generator().manual_seed(0)
    stem: Any = prepared.get_submodule(STEMS[model]) if model in STEMS else None
    for layer in blocked_layers(prepared):
        rows, columns = layer.mask.shape
        if layer is not stem:
            layer.set_mask(spread_mask((rows, columns), sparsity, generator, masks == "covered"))
    return prepared.eval()


def macs_left(prepared: nn.Module, x: Tensor) -> float:
    """Share of the dense MACs that kept blocks and dense layers do."""
    total = fxdbsr.report(prepared, x[:1]).total
    return total.macs / total.macs_dense


def call_of(model: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def sparse_arms(prepared: nn.Module, x: Tensor, dtype: str) -> dict[str, nn.Module]:
    """Converted models on the device and in the dtype of `x`, planned for its size."""
    source = copy.deepcopy(prepared).to(x.device)
    source(x[:1].float())  # records about what sizes come: with `example_inputs`, float32 kernels were compiled first

    def converted(backend: str) -> nn.Module:
        model: nn.Module = fxdbsr.convert(source, backend=backend)
        model = model.to(x.dtype).to(memory_format=torch.channels_last)
        for layer, inputs in seen_inputs(model, (x,)).items():
            layer.input_size = layer.size_of(inputs[0])
            layer.choose_engine()
        return model

    auto = "auto" if x.is_cuda else "triton"
    arms = {"sparse": converted(auto), "dense": converted("dense")}
    if dtype == "fp32":
        arms["3xTF32"] = fxdbsr.set_float32_precision(copy.deepcopy(arms["sparse"]), "3xtf32")
    return arms


@dataclass(frozen=True)
class Exact:
    """The outputs of a prepared model in float64, and by how much others may be off.

    That is four times what the prepared model in the dtype of the input is off, and four ulps; of tf32, where that is
    on (a CPU does not round to it); in ieee float32 256 ulps, for a library may sum in shorter chains (with tf32 by
    mistake a network would be off by thousands).
    """

    outputs: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, prepared: nn.Module, x: Tensor) -> Exact:
        """Of all images of `x`, so that the kernels that are timed are those that are checked."""
        with by_heuristics():
            exact = flat(copy.deepcopy(prepared).to(x.device).double()(x.double()))
        eager = flat(copy.deepcopy(prepared).to(x.device, x.dtype)(x)).double()
        ulp = 2.0**-10 if precision_of(x.dtype) == "tf32" else torch.finfo(x.dtype).eps
        ulps = 256 if precision_of(x.dtype) == "ieee" else 4
        return cls(exact, 4 * (eager - exact).abs().max() + ulps * ulp * exact.abs().max())

    def why_wrong(self, model: Callable[[Tensor], Any], x: Tensor) -> str | None:
        """A sentence where `model` fails on `x` or is off by more than is allowed; else None."""
        try:
            error = (flat(model(x)).double() - self.outputs).abs().max()
        except Exception as failed:
            if x.is_cuda:
                torch.cuda.synchronize()  # raises where the GPU was lost
            return f"{type(failed).__name__}: {str(failed)[-300:]}"
        return None if error <= self.allowed else f"error {error:.3g} against float64, {self.allowed:.3g} allowed"


def flat(outputs: Any) -> Tensor:
    """All outputs as one vector."""
    return torch.cat([y.flatten() for y in outputs.values()]) if isinstance(outputs, dict) else outputs.flatten()
