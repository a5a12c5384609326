"""Prepare and convert timm's models, one and more of each family with convs, and hold the outputs against each other.

    python -m bench.timm_models [--models resnet10t,vgg11] [--json bench/results/timm_models.json]

As `bench.coverage` does for torchvision: prepared, the outputs must be the same, bit for bit; half of the blocks of
16x16 off and the norms as after training, the converted model's outputs must be within 2e-5 of the largest output,
or within 4 times eager float32's own error against float64 where that is larger. Images are as small as a model
allows.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from bench.coverage import BOUND, MIN_EFFECT, first_tensor, switch_off_half
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.scaled import plain_type, why_unscalable
from fxdbsr.paired import provenance

# 40 families in which convs do the work, the smallest model of each
FAMILIES = (
    "resnet10t", "resnetv2_18", "seresnext26t_32x4d", "legacy_seresnet18", "skresnet18", "res2net50_48w_2s",
    "resnest14d", "ecaresnet26t", "regnetx_002", "regnety_002", "regnetz_005", "densenet121", "dla46x_c", "dpn48b",
    "hrnet_w18_small", "vgg11", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035",
    "efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0", "mixnet_s", "mnasnet_small", "lcnet_035",
    "tinynet_e", "ghostnet_050", "repghostnet_050", "rexnetr_100", "repvgg_a0", "mobileone_s0", "gernet_s",
    "cs3darknet_focus_s", "ese_vovnet19b_slim_dw", "selecsls42", "inception_v3", "convnext_atto", "convnextv2_atto",
    "fasternet_t0", "starnet_s050", "hgnetv2_b0", "nf_regnet_b0", "eca_nfnet_l0", "xception41",
)  # fmt: skip
MORE = (
    "inception_v4", "inception_resnet_v2", "inception_next_atto", "convmixer_768_32", "tresnet_m", "gernet_m",
    "spnasnet_100", "fbnetc_100", "semnasnet_075", "hardcorenas_a", "cspresnet50", "cspdarknet53", "vovnet39a",
    "nf_resnet50", "dm_nfnet_f0", "resnetv2_50x1_bit", "resnetblur50", "gcresnext26ts", "halonet26t", "botnet26t_256",
    "lambda_resnet26t", "bat_resnext26ts", "efficientformer_l1", "efficientformerv2_s0", "edgenext_xx_small",
    "poolformer_s12", "mobilevit_xxs", "mobilevitv2_050", "levit_128s", "pvt_v2_b0", "repvit_m0_9", "mambaout_femto",
    "visformer_tiny", "coat_tiny", "davit_tiny", "focalnet_tiny_srf", "xcit_nano_12_p8_224", "swiftformer_xs",
    "shvit_s1", "rdnet_tiny", "nextvit_small", "coatnet_0_rw_224", "maxvit_tiny_rw_224", "fastvit_t8",
    "efficientvit_b0", "efficientvit_m0", "efficientnet_es", "efficientnet_cc_b0_4e", "mobilenetv5_base",
    "tiny_vit_5m_224", "twins_svt_small", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "lcnetv2_small",
    "xception65", "legacy_xception", "nasnetalarge", "pnasnet5large", "legacy_senet154", "ens_adv_inception_resnet_v2",
)  # fmt: skip


@dataclass
class Outcome:
    """What one model gave; errors are relative to the largest output.

    Attributes:
        model, size: its name, the side of the images.
        convs, blocked: conv layers in it, weights that got block scales.
        left: classes of convs that were left alone, with the reason and how many there are.
        unchanged: prepared, the outputs are the same bit for bit.
        input_effect: how much the outputs of two images differ.
        error, bound: of the converted model, and what it may be.
        seconds: for all of it.
        failed: the error that ended it, or "".
    """

    model: str
    size: int = 0
    convs: int = 0
    blocked: int = 0
    left: dict[str, int] | None = None
    unchanged: bool = False
    input_effect: float = 0.0
    error: float = float("nan")
    bound: float = BOUND
    seconds: float = 0.0
    failed: str = ""

    @property
    def passed(self) -> bool:
        """True where every sentence of the module's docstring holds."""
        return not self.failed and self.unchanged and self.input_effect > MIN_EFFECT and self.error <= self.bound


def build(name: str) -> nn.Module:
    """The timm model `name` with random weights and 10 classes, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    return model.eval()


def example(model: nn.Module, size: int) -> Tensor:
    """Two images of contrasts of their own, of side `size` or what the model asks for."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    fixed = config.get("fixed_input_size") or config.get("min_input_size")
    least = 96 if "nception" in type(model).__name__ else 0
    side = config["input_size"][1] if fixed else max(size, least)
    return torch.randn(2, 3, side, side) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)


def left_alone(model: nn.Module) -> dict[str, int]:
    """How many convs of `model` cannot take block scales, by class and reason."""
    reasons = Counter(
        f"{type(m).__name__}: {reason}"
        for m in model.modules()
        if plain_type(type(m)) not in (None, nn.Linear) and (reason := why_unscalable(m))
    )
    return dict(reasons)


def norms_of(model: nn.Module) -> list[Any]:
    """The batch norms of `model`, subclasses included."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def calibrate(prepared: nn.Module, inputs: Tensor, generator: torch.Generator) -> None:
    """Give the batch norms the statistics of the data, moved a little; their momentum was 1 when they were traced."""
    prepared.train()(inputs)
    for norm in norms_of(prepared.eval()):
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()) + 1e-6)
        noise = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean.add_(0.05 * noise * norm.running_var.sqrt())
        norm.running_var.mul_(0.9 + 0.2 * torch.rand(norm.running_var.shape, generator=generator))


@torch.no_grad()
def check(name: str, size: int = 64, backend: str = "auto") -> Outcome:
    """Run one model as the module's docstring says."""
    outcome, start = Outcome(name), time.perf_counter()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build(name)
    for parameter_name, parameter in model.named_parameters():
        if not parameter.any() and not parameter_name.endswith("bias"):
            parameter.normal_(0, 0.5, generator=generator)  # a gain of zero would hide what stands before it
    for norm in norms_of(model):
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.1, generator=generator)
    inputs = example(model, size)
    outcome.size, outcome.left = inputs.shape[-1], left_alone(model)
    outcome.convs = sum(plain_type(type(m)) not in (None, nn.Linear) for m in model.modules())
    try:
        prepared = fxdbsr.prepare(model, (16, 16))
        outcome.unchanged = torch.equal(first_tensor(model(inputs)), first_tensor(prepared(inputs)))
        outcome.blocked = len(blocked_layers(prepared))
        switch_off_half(prepared, generator)
        calibrate(prepared, inputs, generator)
        expected = first_tensor(prepared(inputs))
        largest = expected.abs().max().item()
        outcome.input_effect = (expected[0] - expected[1]).abs().max().item() / largest
        found = first_tensor(fxdbsr.convert(prepared, backend=backend)(inputs))
        outcome.error = (found - expected).abs().max().item() / largest
        if outcome.error > BOUND:
            exact = first_tensor(copy.deepcopy(prepared).double()(inputs.double()))
            outcome.bound = max(BOUND, 4 * (expected.double() - exact).abs().max().item() / largest)
    except (ValueError, TypeError, RuntimeError) as error:
        outcome.failed = f"{type(error).__name__}: {str(error)[:300]}"
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


def main() -> int:
    """Run the models named on the command line, print the table, exit 1 if one of `FAMILIES` fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join((*FAMILIES, *MORE)), help="comma-separated names")
    parser.add_argument("--size", type=int, default=64, help="side of the images, where the model leaves it open")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    outcomes = []
    for name in arguments.models.split(","):
        outcomes.append(check(name, arguments.size, arguments.backend))
        print("ok  " if outcomes[-1].passed else "FAIL", outcomes[-1], flush=True)
    columns = ["model", "size", "convs", "blocked", "unchanged", "input_effect", "error", "bound", "seconds", "failed"]
    rows = [[*(getattr(o, c) for c in columns), "ok" if o.passed else "FAIL"] for o in outcomes]
    print(tabulate(rows, headers=[*columns, ""], floatfmt=".2g", maxcolwidths=60))
    failed = [o.model for o in outcomes if not o.passed]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} models pass; not {', '.join(failed) or 'one'}")
    if arguments.json:
        about = provenance() | {"timm": timm.__version__, "backend": arguments.backend}
        models = [asdict(o) | {"passed": o.passed} for o in outcomes]
        arguments.json.write_text(json.dumps({"about": about, "models": models}, indent=1) + "\n")
    return int(any(name in FAMILIES for name in failed))


if __name__ == "__main__":
    raise SystemExit(main())
