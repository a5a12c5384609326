"""Prepare and convert every torchvision model that torch.fx traces, and hold the outputs against each other.

    python -m bench.coverage [--models resnet18,vit_b_16] [--json bench/results/coverage.json]

For each model: prepare; switch a random half of the blocks off, the first kept in every layer; make the batch
norms' affine values and statistics random around those of the data, so that folding mistakes show; convert with
every backend named. The largest difference from `prepared.eval()` must stay under 2e-5 of the largest output,
or under 4 times eager float32's own error against float64 where that is larger. The outputs of two inputs
must differ, or the comparison would prove nothing: where a mask cuts the input off from the output, the next
seed is drawn.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from fxdbsr.layers import blocked_layers

BOUND = 2e-5
MIN_EFFECT = 1e-3


@dataclass
class Outcome:
    """What one model gave: seed of the mask, seconds, layers, and errors relative to the largest output."""

    model: str
    seed: int
    layers: int
    blocks: int
    prepare_s: float
    convert_s: float
    unchanged: bool
    input_effect: float
    eager_error: float
    errors: dict[str, float]

    @property
    def bound(self) -> float:
        """Largest error allowed, relative to the largest output."""
        return max(BOUND, 4 * self.eager_error)

    @property
    def passed(self) -> bool:
        """True where every sentence of the module's docstring holds."""
        return self.unchanged and self.input_effect > MIN_EFFECT and all(e <= self.bound for e in self.errors.values())


def traceable_models() -> list[str]:
    """Names of the torchvision models that `torch.fx.symbolic_trace` can trace."""
    found = []
    for name in torchvision.models.list_models():
        try:
            torch.fx.symbolic_trace(build(name))
        except Exception:
            continue
        found.append(name)
    return found


def build(name: str) -> nn.Module:
    """The torchvision model `name` with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options: dict[str, Any] = {}
        if name.startswith(("googlenet", "inception")):
            options["init_weights"] = False
        elif any(part in name for part in ("rcnn", "retinanet", "ssd", "fcos", "deeplab", "fcn_", "lraspp")):
            options["weights_backbone"] = None
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def example(name: str, batch: int, size: int | None = None) -> Tensor:
    """Random images, or clips for video models; each with a contrast and a brightness of its own."""
    fixed = name.startswith(("vit", "maxvit", "swin", "inception", "mvit", "s3d"))
    side = size if size and not fixed else 299 if name.startswith("inception") else 224
    shape: tuple[int, ...] = (batch, 3, side, side)
    if name in torchvision.models.list_models(torchvision.models.video):
        shape = (batch, 3, 16, 112, 112) if not fixed else (batch, 3, 16, 224, 224)
    index = torch.arange(batch).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape) * (1 + index) + 0.5 * index


def switch_off_half(model: nn.Module, generator: torch.Generator) -> None:
    """Mask a random half of the blocks of every layer, but never its first; scales of the rest are random.

    The first blocks lead from the first input channels to the first outputs, so that no mask cuts the net.
    """
    for layer in blocked_layers(model):
        draw = torch.rand(layer.mask.numel(), generator=generator)
        draw[0] = -1
        order = draw.argsort()
        mask = torch.zeros(layer.mask.numel(), dtype=torch.bool)
        mask[order[: max(1, layer.mask.numel() // 2)]] = True
        layer.set_mask(mask.view_as(layer.mask))
        layer.scale.data.uniform_(0.8, 1.6, generator=generator)


@torch.no_grad()
def enliven(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> None:
    """Random affine values and statistics near the data's in every batch norm."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0, 0.1, generator=generator)
    model.eval()
    for norm in norms:
        norm.train()
    model(inputs)
    for norm in norms:
        norm.eval()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()) + 1e-6)
        noise = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean.add_(0.05 * noise * norm.running_var.sqrt())
        norm.running_var.mul_(0.9 + 0.2 * torch.rand(norm.running_var.shape, generator=generator))


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output: the logits."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def check_model(name: str, backends: tuple[str, ...], size: int | None = None) -> Outcome:
    """Run one model as the module's docstring says, with up to eight seeds until its inputs matter."""
    for seed in range(8):
        outcome = check_seed(name, backends, size, seed)
        if outcome.input_effect > MIN_EFFECT:
            break
    return outcome


@torch.no_grad()
def check_seed(name: str, backends: tuple[str, ...], size: int | None, seed: int) -> Outcome:
    """Run one model with one seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, inputs = build(name).eval(), example(name, 2, size)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(0, 0.02, generator=generator)
    start = time.perf_counter()
    prepared = fxdbsr.prepare(model, (32, 32))
    prepare_s = time.perf_counter() - start
    unchanged = torch.equal(first_tensor(model(inputs)), first_tensor(prepared(inputs)))
    del model
    switch_off_half(prepared, generator)
    enliven(prepared, inputs, generator)
    prepared.eval()
    expected = first_tensor(prepared(inputs))
    largest = expected.abs().max().item()
    effect = (expected[0] - expected[1]).abs().max().item() / largest
    exact = first_tensor(copy.deepcopy(prepared).double()(inputs.double()))
    errors, convert_s = {}, 0.0
    for backend in backends:
        start = time.perf_counter()
        converted = fxdbsr.convert(prepared, backend=backend)
        convert_s = max(convert_s, time.perf_counter() - start)
        found = first_tensor(converted(inputs))
        errors[backend] = (found - expected).abs().max().item() / largest
        del converted
    layers = blocked_layers(prepared)
    return Outcome(
        model=name,
        seed=seed,
        layers=len(layers),
        blocks=sum(layer.mask.numel() for layer in layers),
        prepare_s=round(prepare_s, 3),
        convert_s=round(convert_s, 3),
        unchanged=unchanged,
        input_effect=effect,
        eager_error=(expected.double() - exact).abs().max().item() / largest,
        errors=errors,
    )


def main() -> int:
    """Run the models named on the command line, print the table, exit 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="comma-separated names; all traceable ones by default")
    parser.add_argument("--backends", default="reference,auto")
    parser.add_argument("--size", type=int, help="side of the images, where the model leaves it open; 224 by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.models.split(",") if arguments.models else traceable_models()
    outcomes = []
    for name in names:
        outcome = check_model(name, tuple(arguments.backends.split(",")), arguments.size)
        outcomes.append(outcome)
        print(f"{'ok  ' if outcome.passed else 'FAIL'} {outcome}", flush=True)
        if arguments.json:
            versions = {
                "size": arguments.size or 224,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            }
            rows = [asdict(o) | {"bound": o.bound, "passed": o.passed} for o in outcomes]
            arguments.json.write_text(json.dumps({"versions": versions, "models": rows}, indent=1) + "\n")
    columns = ["model", "layers", "blocks", "prepare_s", "convert_s", "eager_error", "bound"]
    rows_ = [
        [getattr(o, c) for c in columns] + [max(o.errors.values()), "ok" if o.passed else "FAIL"] for o in outcomes
    ]
    print(tabulate(rows_, headers=[*columns, "error", ""], floatfmt=".2g"))
    failed = [o.model for o in outcomes if not o.passed]
    print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} models pass{': not ' + ', '.join(failed) if failed else ''}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
