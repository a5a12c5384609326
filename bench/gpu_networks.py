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
from bench.gpu_setting import DTYPES, Setting
from fxdbsr.layers import blocked_layers
from fxdbsr.passes.plan_engines import seen_inputs

STEMS = {"resnet50": "conv1", "resnext50_32x4d": "conv1", "vgg11": "features.0", "vgg11_features": "0"}
STEMS["fpn_resnet50"] = "body.conv1"
COMPILE_SECONDS = 240  # that max-autotune may take
DEFAULT_SECONDS = 75  # that torch.compile's default mode may take
FOLDED_SECONDS = 150  # that must be left to compile a second network
AGAIN_SECONDS = 3
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
    model: str, dtype: str, batch: int, setting: Setting
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """eager, compiled and folded, compiled once for all sparsities, and how each was compiled, or why not.

    The last network's are dropped.
    """
    net = network(model).to(setting.device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    x = images(model, batch, setting.rehearse).to(setting.device, DTYPES[dtype])
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    arms, notes = {"eager": call_of(net, x)}, {}
    nets = {"compiled": net}
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) and model != "fpn_resnet50":
        nets["folded"] = fuse(copy.deepcopy(net)).to(memory_format=torch.channels_last)
    for name, dense in nets.items():
        if name == "folded" and setting.left() < FOLDED_SECONDS:
            notes[name] = "left out: too little time was left"
            continue
        compiled, notes[name] = compile_within(dense, x, setting)
        if compiled is not None:
            arms[name] = compiled
    return arms, notes


def compile_within(net: nn.Module, x: Tensor, setting: Setting) -> tuple[Callable[[], Any] | None, str]:
    """A call of the compiled network, and how it was compiled.

    By max-autotune, or, where that takes too long or fails, by the default mode; None where that does as well.
    """
    if setting.rehearse:
        return call_of(torch.compile(net, dynamic=False, backend="eager"), x), "rehearsal"
    reason = ""
    tuning = min(COMPILE_SECONDS, setting.left() - DEFAULT_SECONDS)
    for name, mode, seconds in (
        ("max-autotune", "max-autotune-no-cudagraphs", tuning),
        ("default mode", None, DEFAULT_SECONDS),
    ):
        try:
            with deadline(seconds):
                call = call_of(torch.compile(net, dynamic=False, mode=mode), x)
                call()
                return call, f"{name}{reason}"
        except Exception as error:
            reason = f"{reason}: {name} ended in {type(error).__name__}: {str(error)[-200:]}"
        torch._dynamo.reset()
    return None, f"not compiled{reason}"


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after that long, and again if it is caught there; in the main thread alone."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
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
