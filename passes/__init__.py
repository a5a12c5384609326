"""Graph rewrites: PREPARE before training, CONVERT for deployment."""

if __name__ == "passes":
    raise ImportError(
        "this folder is the package fxdbsr.passes: install the project and import fxdbsr.passes, not passes"
    )
