"""The operator torch.ops.fxdbsr.conv: schema, fake, gradient, FLOP formula and errors, by its reference."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.choice import engine_module, why_not
from fxdbsr.kernels.geometry import ACTIVATIONS
from fxdbsr.kernels.ops import ENGINES
from fxdbsr.kernels.reference import activate


def arguments(seed: int = 0, activation: str = "relu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    grid = BlockGrid.of((48, 40, 3, 3), (32, 32))
    weight = torch.randn(grid.weight_shape, generator=generator)
    values, crow, col = grid.pack(weight, torch.tensor([[True, False], [False, True]]))
    return {
        "input": torch.randn(2, 40, 9, 9, generator=generator),
        "values": values,
        "crow_indices": crow,
        "col_indices": col,
        "bias": torch.randn(48, generator=generator),
        "residual": torch.randn(2, 48, 5, 5, generator=generator),
        "tables": [],
        "in_channels": 40,
        "out_channels": 48,
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "activation": activation,
        "negative_slope": 0.1,
        "engine": "reference",
    }


def expected(a: dict[str, Any]) -> Tensor:
    grid = BlockGrid(48, 40, (3, 3), 1, (32, 32))
    weight = grid.unpack(a["values"], a["crow_indices"], a["col_indices"])
    y = F.conv2d(a["input"], weight, a["bias"], 2, 1) + a["residual"]
    return activate(y, a["activation"], a["negative_slope"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_definition_and_returns_channels_last(activation: str) -> None:
    a = arguments(activation=activation)
    y = torch.ops.fxdbsr.conv(**a)
    torch.testing.assert_close(y, expected(a))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through_every_activation(activation: str) -> None:
    a = arguments(activation=activation)
    a["bias"][3] = float("nan")
    y = torch.ops.fxdbsr.conv(**a)
    assert bool(y[:, 3].isnan().all())
    assert int(y.isnan().sum()) == y[:, 3].numel()


def of_engine(engine: str) -> dict[str, Any]:
    """The arguments as `engine` takes them: values in its order, its tables."""
    a = arguments() | {"engine": engine}
    module = engine_module(engine)
    if engine != "reference" and module is not None:
        grid = BlockGrid(48, 40, (3, 3), 1, (32, 32))
        geometry = (a["stride"], a["padding"], a["dilation"])
        a["values"] = module.layout(a["values"])
        a["tables"] = module.tables(grid, a["values"], a["crow_indices"], a["col_indices"], *geometry)
    return a


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", sorted({*ENGINES} - {"triton"}))  # whose own tests check it interpreted
def test_opcheck_passes(engine: str) -> None:
    grid = BlockGrid(48, 40, (3, 3), 1, (32, 32))
    reason = why_not(engine, grid, (2, 2), (1, 1), (1, 1), torch.float32, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    a = of_engine(engine)
    for name in ("input", "values", "bias", "residual"):
        a[name].requires_grad_()
    torch.library.opcheck(torch.ops.fxdbsr.conv.default, tuple(a.values()))


def test_every_operator_is_checked() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fxdbsr::")}
    assert names == {"fxdbsr::conv"}


def test_gradients_equal_those_of_the_definition() -> None:
    names = ("input", "values", "bias", "residual")
    a, b = arguments(), arguments()
    for name in names:
        a[name].requires_grad_()
        b[name].requires_grad_()
    torch.ops.fxdbsr.conv(**a).square().sum().backward()
    expected(b).square().sum().backward()
    for name in names:
        torch.testing.assert_close(a[name].grad, b[name].grad)


def test_the_flop_formula_counts_what_the_reference_multiplies() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxdbsr.conv(**arguments())
    assert counter.get_total_flops() == 2 * 48 * 40 * 9 * 25 * 2


def test_an_empty_batch_gives_an_empty_output() -> None:
    a = arguments() | {"residual": None}
    a["input"] = a["input"][:0]
    assert torch.ops.fxdbsr.conv(**a).shape == (0, 48, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 39, 9, 9)}, ValueError, r"input: expected \[N, 40\]"),
        ({"input": torch.randn(2, 40, 9)}, ValueError, "input: expected"),
        ({"input": torch.randn(2, 40, 9, 9).double()}, TypeError, "input: expected the dtype of values"),
        ({"input": torch.randn(2, 40, 0, 9)}, ValueError, "input: too small"),
        ({"residual": torch.randn(2, 48, 5, 4)}, ValueError, "residual: expected"),
        ({"residual": torch.randn(2, 48, 5, 5).double()}, ValueError, "residual: expected"),
        ({"bias": torch.randn(47)}, ValueError, r"bias: expected \[48\]"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of"),
        ({"engine": "magic"}, ValueError, "engine: expected one of"),
        ({"values": torch.empty(2, 32, 32)}, ValueError, "values: expected"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.fxdbsr.conv(**(arguments() | change))
