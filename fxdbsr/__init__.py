"""Block-sparse convolutional networks: train block scales to zero, convert, measure what was saved."""

from fxdbsr.api import convert, prepare, to_dense
from fxdbsr.config import BlockConfig
from fxdbsr.precision import set_float32_precision
from fxdbsr.ranking import block_prune_
from fxdbsr.reporting.build import report
from fxdbsr.reporting.result import Report
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.saving import load, save
from fxdbsr.scales import block_scales, param_groups, penalty
from fxdbsr.sparsifier import Sparsifier

__version__ = "0.1.0"
__all__ = [
    "BlockConfig",
    "LayerRow",
    "Report",
    "Sparsifier",
    "block_prune_",
    "block_scales",
    "convert",
    "load",
    "param_groups",
    "penalty",
    "prepare",
    "report",
    "save",
    "set_float32_precision",
    "to_dense",
]
