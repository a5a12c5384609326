"""Side-by-side timing for the scripts here: that of `fxdbsr bench`."""

from fxdbsr.paired import Ratio, as_row, paired, processor, provenance, quantiles, seconds, write_lines

__all__ = ["Ratio", "as_row", "paired", "processor", "provenance", "quantiles", "seconds", "write_lines"]
