"""States of a model and its optimizer as whole tensors on the CPU, whether they are sharded or not."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.optim import Optimizer

WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def states_of(net: nn.Module, optimizer: Optimizer, is_sharded: bool) -> dict[str, Any]:
    """The states under "net" and "optimizer"; of shards on rank 0 alone, and all ranks have to call it."""
    if not is_sharded:
        return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    return {
        "net": sharded.get_model_state_dict(net, options=WHOLE),
        "optimizer": sharded.get_optimizer_state_dict(net, optimizer, options=WHOLE),
    }


def load_states(net: nn.Module, optimizer: Optimizer, found: dict[str, Any], is_sharded: bool) -> None:
    """Load what `states_of` gave; all ranks have to call it with the same."""
    if not is_sharded:
        optimizer.load_state_dict(found["optimizer"])
        net.load_state_dict(found["net"])
        return
    sharded.set_optimizer_state_dict(net, optimizer, found["optimizer"], options=WHOLE)
    sharded.set_model_state_dict(net, found["net"], options=WHOLE)
