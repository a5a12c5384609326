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
