"""Convolution engines over packed blocks: the reference, the Triton engine, the CPU engine, and the operator."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fxdbsr.kernels: install the project and import fxdbsr.kernels, not kernels"
    )
