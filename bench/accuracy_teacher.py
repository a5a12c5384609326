"""The finished dense net as a start and as a teacher (Hinton et al., 2015) for the leads of bench/accuracy.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accuracy_nets import make_net
from bench.accuracy_setting import Setting
from bench.accuracy_training import Training


@lru_cache(maxsize=1)
def trained_dense(setting: Setting) -> nn.Module:
    """The finished dense net, in evaluation mode; runs of one seed share it, so `cpu_seconds` may leave it out."""
    return Training(make_net(setting), setting).run().eval()


def trained_on_pairs(setting: Setting) -> nn.Module:
    """The net of `setting` as it comes out of 12 epochs on the images called "source"."""
    return trained_dense(
        Setting(
            "dense", setting.seed, data="source", draw=setting.draw, net=setting.net, width=setting.width,
            depth=setting.depth, lr=0.8, weight_decay=2e-3,
        )
    )  # fmt: skip


def start_from(net: nn.Module, trained: nn.Module) -> None:
    """Copy all but the last layer."""
    kept = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    missing, unexpected = net.load_state_dict(kept, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])


def distilled(setting: Setting, teacher: nn.Module | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Cross entropy and, with the option's weight, the divergence from the teacher's softened probabilities."""
    weight, temperature = setting.option("distill", 0.0), 2.0
    if teacher is None or not weight:
        return None

    def distil(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            wanted = teacher(images).float()
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(wanted / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss: Tensor = (1 - weight) * F.cross_entropy(logits, labels) + weight * temperature**2 * divergence
        return loss

    return distil
