"""Graph rewrites: PREPARE before training, CONVERT for deployment. One file a pass, named like its function."""

from __future__ import annotations

if __name__ == "passes":
    raise ImportError(
        "this folder is the package fxdbsr.passes: install the project and import fxdbsr.passes, not passes"
    )

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from torch import fx

from fxdbsr.graph import writes_in_place
from fxdbsr.passes.cluster_rows import cluster_rows
from fxdbsr.passes.drop_identities import drop_identities
from fxdbsr.passes.fold_batchnorms import fold_batchnorms
from fxdbsr.passes.fold_scales import fold_scales
from fxdbsr.passes.fuse_epilogues import fuse_epilogues
from fxdbsr.passes.keep_modes import keep_modes
from fxdbsr.passes.loosen_views import loosen_views
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.name_batchnorms import name_batchnorms
from fxdbsr.passes.name_pools import name_pools
from fxdbsr.passes.pack_convs import pack_convs
from fxdbsr.passes.pack_pools import pack_pools, unpack_pools
from fxdbsr.passes.plan_engines import plan_engines
from fxdbsr.passes.remove_dead_channels import remove_dead_channels
from fxdbsr.passes.scale_functions import scale_functions
from fxdbsr.passes.scale_layers import scale_layers
from fxdbsr.passes.tune_engines import tune_engines
from fxdbsr.passes.unpack_convs import unpack_convs

Options = TypeVar("Options")
Pass: TypeAlias = Callable[[fx.GraphModule, Lowering], None]

PREPARE = (scale_layers, scale_functions)
CONVERT = (
    keep_modes,
    fold_scales,
    drop_identities,
    name_batchnorms,
    name_pools,
    fold_batchnorms,
    remove_dead_channels,
    cluster_rows,
    loosen_views,
    pack_convs,
    fuse_epilogues,
    pack_pools,
    plan_engines,
    tune_engines,
)
TO_DENSE = (unpack_pools, fold_scales, name_batchnorms, remove_dead_channels, unpack_convs)


def run(passes: Sequence[Callable[[fx.GraphModule, Options], None]], model: fx.GraphModule, options: Options) -> None:
    """Apply `passes` in order to `model`, in place; after each one the graph is valid and the model runs.

    Raises:
        TypeError, ValueError: a pass refuses the model; the message begins with the pass's name.
    """
    for apply in passes:
        try:
            apply(model, options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{apply.__name__}: {error}") from error
        model.graph.eliminate_dead_code(lambda node: node.is_impure() or writes_in_place(node))
        model.graph.lint()
        model.recompile()
