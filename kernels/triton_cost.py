"""What a step of a kernel costs on one multiprocessor: a resource model in clocks, not a measurement.

The slowest of four units decides: products; instructions issued (four a clock); the port that shared memory and
L1 have in common (operands written once, then read by the matrix unit); reads from L2. Instruction counts are
those of the compiled loops (`python -m bench.inspect_kernels`). Activations that the tile keeps in L1 are read
from L2 a quarter of the times (three taps of a row of three, and part of the rows above and below).
"""

from __future__ import annotations

from fxdbsr.kernels.triton_configs import Tile
from fxdbsr.kernels.triton_device import Device

FROM_L2 = 0.25
STEP_INSTRUCTIONS = 130  # of a warp
BITMASK_INSTRUCTIONS = (120, 29)  # of a warp: a step, and each block taken in it


def on_wgmma(tile: Tile, precision: str, device: Device) -> bool:
    """True where the product is one of a warp group with its operands in shared memory."""
    return device.target == "cuda:90" and precision in ("16", "tf32") and not (tile.weights_first and tile.outputs < 64)


def gather_clocks(tile: Tile, precision: str, taps: int, device: Device) -> float:
    """Clocks of one step of the gather kernel: `tile.pixels` by `tile.outputs` by `tile.depth` products."""
    row = tile.depth * (2 if precision == "16" else 4)
    products = 2 * tile.pixels * tile.outputs * tile.depth / _rate(tile, precision, device)
    instructions = _vector_instructions(tile) if precision == "ieee" else STEP_INSTRUCTIONS
    weights = tile.outputs * (2 if precision == "3xtf32" else 1)
    cached = taps > 1 and tile.cache == ".ca"
    port = tile.pixels + weights + _read(tile, precision, device) + (tile.pixels if cached else 0)
    fetched = tile.pixels * (FROM_L2 if cached else 1) + weights
    return max(
        products, instructions * tile.warps / 4, port * row / device.shared, fetched * row / device.l2
    )  # fmt: skip


def bitmask_clocks(tile: Tile, precision: str, taken: float, taps: int, device: Device) -> float:
    """Clocks of one step of the bitmask kernel in which `taken` rows of four, on average, have a block."""
    row = tile.depth * (2 if precision == "16" else 4)
    # with wgmma, row 0's product is formed in every step
    formed = taken + 1 - taken / 4 if on_wgmma(tile, precision, device) else taken
    products = formed * 2 * tile.pixels * tile.outputs * tile.depth / _rate(tile, precision, device)
    fixed, each = BITMASK_INSTRUCTIONS
    cached = taps > 1 and tile.cache == ".ca"
    read = formed * _read(tile, precision, device)
    port = tile.pixels + taken * tile.outputs + read + (tile.pixels if cached else 0)
    fetched = tile.pixels * (FROM_L2 if cached else 1) + taken * tile.outputs
    return max(
        products, (fixed + each * formed) * tile.warps / 4, port * row / device.shared, fetched * row / device.l2
    )  # fmt: skip


def fixed_clocks(tile: Tile, taps: int, rows: int = 1) -> float:
    """Clocks of a program outside of its loop: what taps lie inside, addresses, residual, layout, store.

    Args:
        rows: tiles of outputs that a program sums, of the bitmask kernel 4.
    """
    sums = rows * tile.pixels * tile.outputs / (32 * tile.warps)  # of a thread
    instructions = 200 + 9.5 * sums + (13.5 * tile.pixels / tile.warps if taps > 1 else 0)
    return instructions * tile.warps / 4


def _vector_instructions(tile: Tile) -> float:
    """Instructions of a warp in a step: products, and loads of their operands, 16 bytes each, from shared memory.

    A thread sums a rectangle of outputs, square or twice as wide.
    """
    sums = tile.pixels * tile.outputs // (32 * tile.warps)
    side = 1 << (sums.bit_length() - 1) // 2
    return tile.depth * (sums + (side + sums / side) / 4) + 50 + 1.6 * tile.pixels / tile.warps


def _rate(tile: Tile, precision: str, device: Device) -> float:
    share = 1.0 if precision == "ieee" or on_wgmma(tile, precision, device) else device.synchronous
    return device.flop(precision) * share


def _read(tile: Tile, precision: str, device: Device) -> float:
    """Rows of the operands that the products of a step read from shared memory."""
    if not on_wgmma(tile, precision, device):
        weights = 2 if precision == "3xtf32" else 1
        return 2 * (tile.pixels + weights * tile.outputs) * max(1, tile.warps // 4)
    if tile.weights_first:  # 64 outputs an instruction
        return tile.outputs / 64 * (64 + tile.pixels)
    return tile.pixels / 64 * (64 + tile.outputs)
