"""Block-sparse convolutional networks: train block scales to zero, convert, measure what was saved."""

from fxdbsr.api import convert, prepare
from fxdbsr.config import BlockConfig
from fxdbsr.reporting.build import report
from fxdbsr.reporting.result import Report
from fxdbsr.reporting.rows import LayerRow

__version__ = "0.1.0"
__all__ = ["BlockConfig", "LayerRow", "Report", "convert", "prepare", "report"]
