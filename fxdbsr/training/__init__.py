"""`fxdbsr train`: options and recipes, data, the loop, checkpoints; on one process or under torchrun."""

from fxdbsr.training.checkpoint import load_trained

__all__ = ["load_trained"]
