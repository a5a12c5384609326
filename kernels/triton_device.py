"""What the planner knows of a GPU: figures of data sheets, and what the driver says of the device at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from fxdbsr.kernels.triton_configs import family


@dataclass(frozen=True)
class Device:
    """One GPU, per multiprocessor and clock where not stated otherwise.

    Args:
        target: "cuda:<capability>" or "hip:<architecture>".
        processors: streaming multiprocessors.
        clock: clocks a second.
        bandwidth: bytes a second of device memory, of the whole device.
        matrix: FLOP of products of 16 bits on the matrix unit; tf32 does half.
        vector: FLOP of float32 outside of the matrix unit.
        synchronous: share of `matrix` that mma.sync reaches, where the device has a faster instruction.
        shared: bytes of shared memory.
        l2: bytes from L2.
        launch: seconds that any kernel costs, replayed from a CUDA graph.
        efficiency: share of the peak that a library's conv reaches.
    """

    target: str = "cuda:90"
    processors: int = 132
    clock: float = 1.83e9
    bandwidth: float = 4.8e12
    matrix: float = 4096
    vector: float = 256
    synchronous: float = 0.62
    shared: float = 128
    l2: float = 30
    launch: float = 2e-6
    efficiency: float = 0.8

    def flop(self, precision: str) -> float:
        """FLOP a clock of one multiprocessor; one product in 3xTF32 counts once, though it takes three."""
        return {"16": self.matrix, "tf32": self.matrix / 2, "ieee": self.vector, "3xtf32": self.matrix / 6}[precision]

    def peak(self, precision: str) -> float:
        """FLOP a second of the whole device."""
        return self.flop(precision) * self.processors * self.clock


H200 = Device()
H100 = replace(H200, bandwidth=3.35e12)
A100 = Device(
    "cuda:80", 108, 1.41e9, bandwidth=2.0e12, matrix=2048, vector=128, synchronous=1.0, shared=128, l2=40
)  # fmt: skip
MI300X = Device(
    "hip:gfx942", 304, 2.1e9, bandwidth=5.3e12, matrix=2048, vector=256, synchronous=1.0, shared=128, l2=30
)  # fmt: skip
KNOWN = {"cuda:90": H200, "cuda:80": A100, "hip": MI300X}


@cache
def device_of(device: torch.device) -> Device:
    """The GPU `device`; an H200 where there is none, and for the CPU and the meta device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return H200
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target = f"hip:{properties.gcnArchName.split(':')[0]}"
    else:
        target = f"cuda:{properties.major}{properties.minor}"
    known = KNOWN[family(target)]
    # kHz and bits; two transfers a clock
    rate = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    return replace(
        known,
        target=target,
        processors=properties.multi_processor_count,
        bandwidth=rate or known.bandwidth,
    )


def overlaps(target: str) -> bool:
    """True where a kernel may start before the one ahead of it has ended (programmatic dependent launch)."""
    return target.startswith("cuda:") and int(target.removeprefix("cuda:")) >= 90
