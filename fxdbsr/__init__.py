"""Block-sparse convolutional networks: train block scales to zero, convert, measure what was saved."""

from fxdbsr.api import convert, prepare
from fxdbsr.config import BlockConfig

__version__ = "0.1.0"
__all__ = ["BlockConfig", "convert", "prepare"]
