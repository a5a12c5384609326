"""Training on several processes: parameters that are sharded over them, and choices that all have to share.

With fully_shard (FSDP2) a parameter is a DTensor of which every rank holds some rows. `whole` gathers it, so that
all ranks see the same numbers in the same order and rank the same blocks; every rank has to call it. Where the
process group is known, rank 0's choice of blocks is sent to all: ranks that see images of other sizes or run on
other devices then still hold the same zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxdbsr.traced import unwrap


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all ranks where it is sharded; differentiable."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, sharing its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def assign_(tensor: Tensor, value: Tensor) -> None:
    """Write `value`, shaped like the whole tensor, into `tensor`; each rank writes its own part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    local(tensor).copy_(value)


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module of `model` hold its shards again, which the optimizer knows, as before a forward."""
    for module in unwrap(model).modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def group_of(model: nn.Module, parameter: Tensor) -> Any:
    """The process group over which `model` is trained, where its wrapper or the sharding tells, or None."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.process_group
        model = model.__dict__.get("_modules", {}).get("_orig_mod")
    if not is_sharded(parameter):
        return None
    mesh = parameter.device_mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else None


def agreed(tensor: Tensor, group: Any, device: torch.device) -> Tensor:
    """Rank 0's `tensor` on every rank of `group`; as it is where `group` is None. On the CPU."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    sent = tensor.to(device) if tensor.dtype != torch.bool else tensor.to(device, torch.uint8)
    dist.broadcast(sent, group=group, group_src=0)
    return sent.cpu().to(tensor.dtype)
