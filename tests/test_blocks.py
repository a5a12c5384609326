"""The block grid: shapes by the method's rule, and scale, sum, pack and unpack on every kind of weight."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxdbsr.blocks import BlockGrid
from fxdbsr.config import BlockConfig, as_block_size


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    out, in_ = (groups * draw(st.integers(1, 12)) for _ in range(2))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    transposed = bool(kernel) and draw(st.booleans())
    size = tuple(draw(st.sampled_from([None, 1, 2, 5, 8, 32])) for _ in range(2))
    shape = (in_, out // groups, *kernel) if transposed else (out, in_ // groups, *kernel)
    return BlockGrid.of(shape, (size[0], size[1]), groups, transposed)


def scaled_by_loops(grid: BlockGrid, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    w = grid.to_out_in(weight).clone()
    for i, (o0, o1) in enumerate(grid.rows()):
        for j, (c0, c1) in enumerate(grid.columns()):
            w[o0:o1, c0:c1] *= scale[i, j]
    return grid.from_out_in(w)


@given(grids(), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_scale_equals_a_loop_over_blocks(grid: BlockGrid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(grid.weight_shape, generator=generator)
    scale = torch.randn(grid.shape, generator=generator)
    expected = scaled_by_loops(grid, weight, scale)
    assert torch.equal(grid.scale(weight, scale), expected)
    assert torch.equal(grid.scale_(weight.clone(), scale), expected)


@given(grids(), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack(grid: BlockGrid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(grid.shape, generator=generator) < 0.5
    weight = torch.randn(grid.weight_shape, generator=generator) * grid.expand_mask(keep)
    values, crow, col = grid.pack(weight, keep)
    assert values.shape == (int(keep.sum()), *grid.block_size, *grid.kernel_size)
    assert crow.dtype == col.dtype == torch.int32
    assert torch.equal(grid.unpack(values, crow, col), weight)


@given(grids())
@settings(max_examples=100, deadline=None)
def test_blocks_cover_every_weight_once(grid: BlockGrid) -> None:
    ones = torch.ones(grid.weight_shape)
    assert int(grid.numel().sum()) == ones.numel()
    assert torch.equal(grid.block_sum(ones).long(), grid.numel())
    assert bool(grid.expand_mask(torch.ones(grid.shape, dtype=torch.bool)).all())


@pytest.mark.parametrize("out", [1, 7, 32, 33, 96])
@pytest.mark.parametrize("groups", [1, 2, 8, 24])
@pytest.mark.parametrize("bh", [1, 8, 32, 100])
def test_rows_follow_the_methods_rule(out: int, groups: int, bh: int) -> None:
    per_group, total = out, out * groups
    grid = BlockGrid.of((total, 16, 3, 3), (bh, 5), groups)
    whole_groups = ceil(groups / (bh // per_group)) if per_group < bh and groups > 1 else 1
    rows = groups * ceil(per_group / bh) if per_group >= bh else whole_groups
    assert grid.shape == (rows, ceil(16 / 5))


def test_golden_vector_of_the_poster() -> None:
    weight = torch.tensor([[1.0, 8, 8, 6], [4, 5, 3, 2], [1, 4, 9, 5], [6, 7, 2, 1]])
    scale = torch.tensor([[0.5, 0.1], [0.2, 0.3]])
    expected = [[0.5, 4, 0.8, 0.6], [2, 2.5, 0.3, 0.2], [0.2, 0.8, 2.7, 1.5], [1.2, 1.4, 0.6, 0.3]]
    found = BlockGrid.of((4, 4), (2, 2)).scale(weight.double(), scale.double())
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("value", [0, -1, (32,), (1, 2, 3), (0, 4)])
def test_block_size_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="block_size: expected"):
        as_block_size(value)


@pytest.mark.parametrize("value", ["32", 3.0, True, (1.5, 2), (True, 2), None, {32}])
def test_block_size_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="block_size: expected"):
        as_block_size(value)


def test_config_precedence_is_name_pattern_type_global() -> None:
    conv = torch.nn.Conv2d
    config = BlockConfig(32, {"a.b": 8}, {r"a\..*": 16}, {conv: None, "Conv1d": (4, None)})
    assert config.block_size_of("a.b", conv) == (8, 8)
    assert config.block_size_of("a.c", conv) == (16, 16)
    assert config.block_size_of("b", conv) is None
    assert config.block_size_of("b", torch.nn.Conv1d) == (4, None)
    assert config.block_size_of("b", torch.nn.Conv3d) == (32, 32)


def test_config_survives_a_round_trip_through_plain_types() -> None:
    config = BlockConfig((64, 16), {"fc": None}, {"layer.*": 8}, {"Conv1d": 4}, form="clamp")
    assert BlockConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown keys"):
        BlockConfig.from_dict({"blocksize": 32})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"by_pattern": {"(": 8}}, ValueError, "not a regular expression"),
        ({"by_name": {"a": 0}}, ValueError, r"by_name\['a'\]"),
        ({"by_type": {3: 8}}, TypeError, "by_type"),
        ({"form": "sum"}, ValueError, "form: expected one of"),
        ({"by_name": ["a"]}, TypeError, "by_name: expected a dict"),
    ],
)
def test_config_refuses_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockConfig(**arguments)  # type: ignore[arg-type]
