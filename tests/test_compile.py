"""torch.compile and torch.export: no graph break, one graph for all sizes, a fresh process without the source."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fxdbsr
from bench.small_net import SmallNet, sparse

SIZES = [(2, 3, 12, 16), (5, 3, 12, 16), (3, 3, 20, 18)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compilations(model: nn.Module, run: Callable[[nn.Module, Tensor], Any], dynamic: bool | None, sizes: Any) -> int:
    """How often `run` on inputs of `sizes` compiles `model`, each time as one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    wrapped: Any = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for size in sizes:
        before = counter.frame_count
        run(wrapped, torch.randn(size))
        counts.append(counter.frame_count > before)
    assert counts[0]
    return sum(counts)


def step(model: nn.Module, x: Tensor) -> None:
    """A training step of the prepared model, its gradients all there."""
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("scale"))


def input_gradient(model: nn.Module, x: Tensor) -> None:
    """The gradient of the input of a converted model, whose tensors have none unless one asks."""
    model(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("form", ["product", "clamp"])
def test_training_a_prepared_model_compiles_once_for_all_sizes(form: str) -> None:
    prepared = sparse(SmallNet(), torch.randn(2, 3, 12, 12), form=form).train()
    assert compilations(prepared, step, True, SIZES) == 1


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
@pytest.mark.parametrize("run", [infer, input_gradient])
def test_a_converted_model_compiles_once_for_all_sizes(backend: str, run: Any) -> None:
    converted = fxdbsr.convert(sparse(SmallNet(), torch.randn(2, 3, 12, 12), 8), backend=backend)
    assert compilations(converted, run, True, SIZES) == 1


def test_a_second_batch_size_is_the_last_that_compiles() -> None:
    prepared = sparse(SmallNet(), torch.randn(2, 3, 12, 12), 8)
    batches = [(n, 3, 12, 16) for n in range(2, 9)]
    assert compilations(fxdbsr.convert(prepared), infer, None, batches) == 2
    assert compilations(prepared.train(), step, None, batches) == 2


SERVE = """
import sys, torch, fxdbsr
program, arrays = sys.argv[1:]
model = torch.export.load(program).module()
for x, expected in torch.load(arrays, weights_only=True):
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"bench", "tests", "timm"}, loaded
"""


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's own, on buffers of no elements
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_an_exported_model_runs_at_other_sizes_in_a_process_without_its_source(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 16)
    converted = fxdbsr.convert(sparse(SmallNet(), x, 8), backend=backend)
    sizes = ({0: Dim("batch", max=64), 2: Dim("height", min=4, max=512), 3: Dim("width", min=4, max=512)},)
    program = torch.export.export(converted, (x,), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [torch.randn(shape) for shape in ((1, 3, 12, 16), (5, 3, 4, 40), (3, 3, 33, 17))]
    with torch.no_grad():
        torch.save([(y, converted(y)) for y in inputs], tmp_path / "arrays.pt")
    done = subprocess.run(
        [sys.executable, "-c", SERVE, "model.pt2", "arrays.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_prepared_model_exports() -> None:
    x = torch.randn(2, 3, 12, 16)
    prepared = sparse(SmallNet(), x)
    program = torch.export.export(prepared, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
    y = torch.randn(5, 3, 12, 16)
    torch.testing.assert_close(program.module()(y), prepared(y))
