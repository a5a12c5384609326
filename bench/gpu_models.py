"""Whole networks: converted models against cuDNN eager and torch.compile, all replayed as CUDA graphs in turns.

Arms, each on the same input, channels last:

    eager      the dense network, cuDNN choosing by measurement
    compiled   torch.compile, max-autotune: the baseline to quote
    folded     the same with batch norms folded into the convs first
    dense      converted with backend="dense": our fused epilogues, no sparsity
    sparse     converted, each layer where the planner puts it
    3xTF32     for fp32: the same with float32 products from three in tf32

Blocks are switched off at random, at least one left in every row and column, so that no channel is dead and nothing is
gained by cutting channels; `macs` says what share of the dense MACs is left. The stem and the classifier stay dense.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import fxdbsr
from bench.gpu_layers import Conv, convs, estimate
from bench.gpu_setting import BLOCKS, DTYPES, Case, Setting, set_precision
from fxdbsr.kernels.triton_device import H200
from fxdbsr.kernels.triton_roofline import floor_seconds, library_seconds
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv

STEMS = {"resnet50": "conv1", "resnext50_32x4d": "conv1", "vgg11": "features.0", "vgg11_features": "0"}
STEMS["fpn_resnet50"] = "body.conv1"
CLASSIFIERS = ("resnet50", "vgg11", "resnext50_32x4d")
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
) -> dict[str, Callable[[], Any]]:
    """eager, compiled and folded, compiled once for all sparsities; the last network's are dropped."""
    net = network(model).to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    x = images(model, batch, rehearse).to(device, DTYPES[dtype])
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager"} if rehearse else {"mode": "max-autotune-no-cudagraphs"}
    arms: dict[str, Callable[[Tensor], Any]] = {"eager": net, "compiled": torch.compile(net, dynamic=False, **options)}
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) and model != "fpn_resnet50":
        folded = fuse(copy.deepcopy(net)).to(memory_format=torch.channels_last)
        arms["folded"] = torch.compile(folded, dynamic=False, **options)
    return {name: _call(arm, x) for name, arm in arms.items()}


def _call(model: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def sparse_arms(prepared: nn.Module, x: Tensor, dtype: str) -> dict[str, nn.Module]:
    """Converted models on the device and in the dtype of `x`."""
    source = copy.deepcopy(prepared).to(x.device)

    def converted(backend: str) -> nn.Module:
        model: nn.Module = fxdbsr.convert(source, backend=backend)
        return model.to(x.dtype).to(memory_format=torch.channels_last)

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


def measure(
    model: str, dtype: str, batch: int, block: tuple[int, int], sparsity: float, setting: Setting
) -> dict[str, Any]:
    """Errors first, then all arms in turns."""
    set_precision(dtype)
    with torch.no_grad():
        x = images(model, batch, setting.rehearse).to(setting.device, DTYPES[dtype])
        prepared = pruned(model, block, sparsity)
        arms = sparse_arms(prepared, x, dtype)
        for name, arm in arms.items():
            reason = why_wrong(arm, prepared, x[:2])
            if reason is not None:
                return {"wrong": f"{name}: {reason}"}
        engines = Counter(m.engine for m in arms["sparse"].modules() if isinstance(m, PackedConv))
        runs = dense_arms(model, dtype, batch, setting.rehearse, setting.device)
        runs = runs | {name: _call(arm, x) for name, arm in arms.items()}
        found = setting.times(runs, "compiled", calls=1)
        return {
            "engines": dict(engines),
            "macs": round(macs_left(prepared, images(model, 1, setting.rehearse)), 4),
            **found,
        }


def estimate_network(model: str, dtype: str, batch: int, block: str, sparsity: int) -> dict[str, Any]:
    """Where layers go, and ratios of the convs alone by the model: estimated, and at the roofline on both sides.

    The base is a cuDNN conv and one pass over memory for its epilogue, as torch.compile makes of a network.
    """
    if model not in CLASSIFIERS:
        return {}
    set_precision(dtype)
    base = ours = ideal = floor = 0.0
    choices: Counter[str] = Counter()
    for conv, count in convs(model).items():
        layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100)
        said, plain = estimate(layer), replace(layer, bias=False, residual=False, activation="none")
        choices[said["choice"]] += count
        moves = 3 if conv.residual else 2 if conv.activation != "none" else 0
        epilogue = H200.launch + moves * layer.output_bytes / H200.bandwidth if moves else 0.0
        base += count * (library_seconds(plain)["cuDNN conv and epilogue kernels"] + epilogue)
        ideal += count * (floor_seconds(plain, 1, layer.precision) + epilogue)
        times = said["estimated us"]
        taken = times["sparse"] if said["choice"] == "sparse" else min(times[n] for n in times if "cu" in n.lower())
        ours += count * 1e-6 * taken
        floor += count * floor_seconds(layer, layer.density if blockable(conv) else 1, layer.precision)
    return {
        "layers": dict(choices),
        "estimated over compiled, convs": round(base / ours, 3),
        "ceiling over compiled, convs": round(ideal / floor, 3),
    }


def blockable(conv: Conv) -> bool:
    """True where the engine runs the conv: 32 input channels in a group and more."""
    return conv.channels // conv.groups >= 32


def cases(options: Any) -> Iterator[Case]:
    """The networks asked for."""
    for model, dtype, batch in product(options.model, options.dtype, options.batch):
        for block, sparsity in product(options.block, options.sparsity):
            key = {"part": "models", "model": model, "dtype": dtype, "batch": batch, "block": block}
            yield _case({**key, "sparsity": sparsity}, options.rehearse)


def _case(key: dict[str, Any], rehearse: bool) -> Case:
    model, dtype, batch, block, sparsity = (key[name] for name in ("model", "dtype", "batch", "block", "sparsity"))
    run, size = ("tiny", 2) if rehearse else (model, batch)
    return Case(
        key,
        lambda: estimate_network(model, dtype, batch, block, sparsity),
        lambda setting: measure(run, dtype, size, BLOCKS[block], sparsity / 100, setting),
    )
