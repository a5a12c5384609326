"""Whole networks, dense and converted, and how each is made ready to be timed."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import fxdbsr
from bench.gpu_setting import DTYPES
from fxdbsr.layers import blocked_layers
from fxdbsr.passes.plan_engines import seen_inputs

STEMS = {"resnet50": "conv1", "resnext50_32x4d": "conv1", "vgg11": "features.0", "vgg11_features": "0"}
STEMS["fpn_resnet50"] = "body.conv1"
COMPILE_SECONDS = 240
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


def live_mask(shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """Random blocks, at least one in every row and column."""
    rows, columns = shape
    rank = torch.rand(rows, columns, generator=generator)
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(max(rows, columns)):
        keep[i % rows, (i + i // max(min(rows, columns), 1)) % columns] = True
    keep = keep[torch.randperm(rows, generator=generator)][:, torch.randperm(columns, generator=generator)]
    wanted = max(round(density * rows * columns), int(keep.sum()))
    rank[keep] = -1.0
    return torch.zeros(rows * columns, dtype=torch.bool).index_fill_(0, rank.flatten().argsort()[:wanted], True).view(
        rows, columns
    )  # fmt: skip


def pruned(model: str, block: tuple[int, int], sparsity: float) -> nn.Module:
    """The network prepared, its stem left dense, with `sparsity` of each layer's blocks off."""
    by_name: dict[str, Any] = {STEMS[model]: None} if model in STEMS else {}
    prepared = fxdbsr.prepare(network(model), config=fxdbsr.BlockConfig(block, by_name=by_name))
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        rows, columns = layer.mask.shape
        layer.set_mask(live_mask((rows, columns), 1 - sparsity, generator))
    return prepared.eval()


def macs_left(prepared: nn.Module, x: Tensor) -> float:
    """Share of the dense MACs that kept blocks and dense layers do."""
    total = fxdbsr.report(prepared, x[:1]).total
    return total.macs / total.macs_dense


@lru_cache(1)
def dense_arms(
    model: str, dtype: str, batch: int, rehearse: bool, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """eager, compiled and folded, compiled once for all sparsities, and how each was compiled.

    The last network's are dropped.
    """
    net = network(model).to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    x = images(model, batch, rehearse).to(device, DTYPES[dtype])
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    compiled, how = compile_within(net, x, rehearse)
    arms, notes = {"eager": call_of(net, x), "compiled": compiled}, {"compiled": how}
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) and model != "fpn_resnet50":
        folded = fuse(copy.deepcopy(net)).to(memory_format=torch.channels_last)
        arms["folded"], notes["folded"] = compile_within(folded, x, rehearse)
    return arms, notes


def compile_within(net: nn.Module, x: Tensor, rehearse: bool) -> tuple[Callable[[], Any], str]:
    """A call of the compiled network, by max-autotune, or, where that takes too long or fails, by the default mode."""
    if rehearse:
        return call_of(torch.compile(net, dynamic=False, backend="eager"), x), "rehearsal"
    try:
        with deadline(COMPILE_SECONDS):
            call = call_of(torch.compile(net, dynamic=False, mode="max-autotune-no-cudagraphs"), x)
            call()
            return call, "max-autotune"
    except Exception as error:
        reason = f"default mode: max-autotune ended in {type(error).__name__}: {str(error)[-200:]}"
    torch._dynamo.reset()
    call = call_of(torch.compile(net, dynamic=False), x)
    call()
    return call, reason


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after that long; in the main thread alone."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def why_wrong(model: nn.Module, prepared: nn.Module, x: Tensor) -> str | None:
    """A sentence where `model` is off float64 by over four times what the prepared model in its dtype is; else None."""
    exact = flat(copy.deepcopy(prepared).to(x.device).double()(x.double()))
    eager = flat(copy.deepcopy(prepared).to(x.device, x.dtype)(x)).double()
    found = flat(model(x)).double()
    allowed = 4 * (eager - exact).abs().max() + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
    error = (found - exact).abs().max()
    return None if error <= allowed else f"error {error:.3g} against float64, {allowed:.3g} allowed"


def flat(outputs: Any) -> Tensor:
    """All outputs as one vector."""
    return torch.cat([y.flatten() for y in outputs.values()]) if isinstance(outputs, dict) else outputs.flatten()
