"""A converted model's run of steps against its graph: the same values, and the graph wherever something looks."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("llvmlite")

import fxdbsr
from fxdbsr.converted import ConvertedModule
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import best_grid
from fxdbsr.network import calls, plan, runner
from fxdbsr.network.memory import FOREVER, Buffer, arrange
from fxdbsr.network.plan import Run
from fxdbsr.nn.packed import PackedConv
from fxdbsr.traced import trace_eval

pytestmark = pytest.mark.skipif(jit.host() is None, reason="no vector unit that the engine knows")
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not (jit.host() or jit.Target("", "", "", 0, 0, 0)).bfloat16, reason="no avx512_bf16"),
)


def converted(model: nn.Module, block: Any = (16, 16), sparsity: float = 0.5, **options: Any) -> ConvertedModule:
    """`model` with lively norms, pruned at random and converted for the CPU engine."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    prepared = fxdbsr.prepare(model.eval(), block_size=block)
    fxdbsr.block_prune_(prepared, sparsity, score="random", generator=generator)
    found = fxdbsr.convert(prepared, backend="cpu", **options)
    assert isinstance(found, ConvertedModule)
    return found


def plan_of(model: nn.Module) -> calls.Planned:
    """The plan that `model` made last."""
    found: Any = type(model)
    planned = next(reversed(found.runner.plans.values()))
    assert isinstance(planned, calls.Planned)
    return planned


def planned_call(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of a call that follows a plan."""
    with torch.no_grad():
        output: Tensor = model(*inputs)
    assert plan_of(model).plans
    return output


def graph_call(model: nn.Module, *inputs: Tensor) -> Any:
    """The output of the graph, node by node."""
    assert isinstance(model, fx.GraphModule)
    with torch.no_grad():
        return fx.Interpreter(model).run(*inputs)


def assert_same(model: nn.Module, *inputs: Tensor) -> None:
    """The run of steps and the graph agree within rounding, relative to the largest output."""
    expected, output = graph_call(model, *inputs), planned_call(model, *inputs)
    assert output.shape == expected.shape
    scale = float(expected.abs().max())
    bound = 2e-5 if inputs[0].dtype == torch.float32 else 5e-2
    assert float((output - expected).abs().max()) <= bound * scale, scale


class Residual(nn.Module):
    """Two convs with a shortcut, a pool, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.pool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        pooled: Tensor = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        result: Tensor = self.fc(torch.flatten(pooled, 1))
        return result


@pytest.mark.parametrize(("sparsity", "height"), [(0.0, 32), (0.7, 8)])
def test_low_blocks_run_as_tall_ones_where_nearly_all_are_kept(sparsity: float, height: int) -> None:
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()), (8, 8), sparsity)
    layer = next(module for module in model.modules() if isinstance(module, PackedConv))
    assert best_grid(layer.grid, layer.crow_indices, layer.col_indices).block_size == (height, 8)
    assert_same(model, torch.randn(2, 64, 9, 9))


class Reshaped(nn.Module):
    """Ends with an operation that torch runs, and a view of its value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(self.conv(x), 1)
        return torch.flatten(y, 1), torch.flatten(x, 1)


def test_a_view_of_what_torch_makes_is_made_by_torch() -> None:
    model = converted(Reshaped())
    x = torch.randn(2, 16, 3, 3)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            for found, expected in zip(model(image), graph_call(model, image), strict=True):
                torch.testing.assert_close(found, expected)
    assert plan_of(model).plans


ZOO = [
    ("resnet18", (32, 32), 64),
    ("resnext50_32x4d", (32, 32), 64),
    ("vgg11_bn", (32, 32), 32),
    ("mobilenet_v2", (16, 16), 64),
    ("mobilenet_v3_small", (16, 16), 64),
    ("densenet121", (32, 32), 64),
    ("squeezenet1_1", (16, 16), 64),
    ("shufflenet_v2_x0_5", (8, 8), 64),
    ("googlenet", (16, 16), 64),
    ("mnasnet0_5", (8, 8), 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize(("name", "block", "size"), ZOO)
def test_zoo_models_run_as_their_graph(name: str, block: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    x = torch.randn(2, 3, size, size)
    assert_same(converted(model.to(dtype), block), x.to(dtype))


def test_a_resnet_is_one_run() -> None:
    model = converted(torchvision.models.resnet18(), (32, 32))
    planned_call(model, torch.randn(1, 3, 64, 64))
    assert plan_of(model).first.is_whole


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_batch_in_either_order_of_memory(batch: int, channels_last: bool) -> None:
    x = torch.randn(batch, 3, 17, 19)
    assert_same(converted(Residual()), x.contiguous(memory_format=torch.channels_last) if channels_last else x)


def test_result_does_not_depend_on_the_batch_or_the_threads() -> None:
    model, x = converted(Residual()), torch.randn(9, 3, 20, 20)
    whole, threads = planned_call(model, x), torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with torch.no_grad():
                assert torch.equal(model(x), whole)
                assert all(torch.allclose(model(x[i : i + 1]), whole[i : i + 1], atol=1e-6) for i in range(3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("large", [0, 5_000, 30_000, 1 << 20])
def test_every_value_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """Memory starts as NaN, but for borders and what fills up planes; whatever is done image by image."""
    plain = calls.Memory.__init__

    def poisoned(self: calls.Memory, made: Any, modules: Any) -> None:
        plain(self, made, modules)
        own = [b for item in made.items if isinstance(item, Run) for move in item.moves for b in move.buffers]
        clean = [
            (b.offset, b.offset + (1 if b.alone else made.batch) * b.layout.image * 4)
            for b in own
            if not b.layout.is_full
        ]
        saved = [self.arena[start:stop].clone() for start, stop in clean]
        self.arena.fill_(255)
        for (start, stop), old in zip(clean, saved, strict=True):
            self.arena[start:stop] = old

    monkeypatch.setattr(calls.Memory, "__init__", poisoned)
    monkeypatch.setattr(plan, "LARGE", large / torch.get_num_threads())
    for block in ((16, 16), (8, 8), (32, 16)):
        assert_same(converted(Residual(), block), torch.randn(2, 3, 20, 20))


def test_images_taken_one_by_one_give_the_same_bits_in_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, found, original = torch.randn(5, 3, 20, 20), [], converted(Residual())
    for large in (1 << 20, 30_000, 5_000, 0):  # bytes
        monkeypatch.setattr(plan, "LARGE", large / torch.get_num_threads())
        model = copy.deepcopy(original)
        y = planned_call(model, x)
        made = plan_of(model).first
        assert isinstance(made.items[0], Run)
        found.append((y, made.items[0].alone, made.bytes))
    assert all(torch.equal(y, found[0][0]) for y, _, _ in found)
    assert 0 == found[0][1] < found[1][1] < found[2][1] < found[3][1]
    assert found[3][2] < found[0][2]


def test_outputs_stay_when_the_model_is_called_again() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y[:, ::2], y.transpose(2, 3)

    model, x = converted(Views(), sparsity=0.0), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        kept = [model(x) for _ in range(4)]
        model(torch.zeros_like(x))
    for views in kept:
        for found, expected in zip(views, kept[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_code_from_outside_of_torch_may_keep_what_it_reads() -> None:
    kept: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(x)
            return x + 1

    Keeps.is_leaf_in_trace = True  # type: ignore[attr-defined]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Keeps(), nn.Conv2d(16, 16, 3))
    fast, x = converted(model, sparsity=0.0), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(4):
            fast(x)
        fast(torch.zeros_like(x))
    torch.testing.assert_close(kept[3], kept[0])


def test_writes_in_place_are_seen_by_later_readers() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.second(y)
            y.mul_(2)
            result: Tensor = self.second(y) + z
            return result

    assert_same(converted(InPlace(), sparsity=0.25), torch.randn(2, 3, 9, 9))


def test_a_write_into_the_input_keeps_the_graph() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x.mul_(2))
            return result

    model, ones = converted(Writes()), torch.ones(1, 3, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            x = ones.clone()
            model(x)
            assert torch.equal(x, 2 * ones)


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"levels": [y, y * 2], "largest": torch.max(y, 1)}


@pytest.mark.parametrize("batch", [1, 9])
def test_lists_and_dicts_of_the_output_may_be_changed(batch: int) -> None:
    model, x = converted(Shapes()), torch.randn(batch, 3, 6, 6)
    with torch.no_grad():
        found, expected = model(x), graph_call(model, x)
    assert (type(found), type(found["levels"])) == (dict, list)
    assert type(found["largest"]) is torch.return_types.max
    torch.testing.assert_close(found["levels"], expected["levels"])


def test_a_forward_with_any_number_of_arguments_takes_one() -> None:
    class Starred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, *images: Tensor) -> Tensor:
            result: Tensor = self.conv(images[0])
            return result

    model, x = converted(Starred()), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), graph_call(model, x))


def test_ten_thousand_calls_from_eight_threads() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)))
    inputs = [torch.randn(1, 3, 5, 5) for _ in range(8)]
    expected = [graph_call(model, x) for x in inputs]
    planned_call(model, inputs[0])

    def wrong(i: int) -> int:
        with torch.inference_mode():
            return sum(not torch.allclose(model(inputs[i]), expected[i], atol=1e-5) for _ in range(1250))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wrong, range(8))) == 0


class WatchedError(Exception):
    """A run of steps where the graph was due."""


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise WatchedError

    monkeypatch.setattr(calls.Planned, "__call__", refuse)


@pytest.mark.usefixtures("no_steps")
def test_the_graph_runs_where_something_looks() -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        with pytest.raises(WatchedError):
            model(x)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        handle = model.get_submodule("first").register_forward_hook(lambda *_: None)
        model(x)
        handle.remove()
        torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.export.export(model, (x,))
        trace_eval(model)
    y = x.clone().requires_grad_()
    model(y).sum().backward()
    assert y.grad is not None
    with pytest.raises(WatchedError):
        model(x)


def test_without_no_grad_a_converted_model_still_takes_the_steps() -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 16, 16)
    outputs = [model(x) for _ in range(3)]
    assert plan_of(model).plans
    assert not any(output.requires_grad for output in outputs)
    model.get_buffer("first.values").requires_grad_()
    assert model(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_new_tensors_are_seen(dtype: torch.dtype) -> None:
    model, x = converted(Residual().to(dtype)), torch.randn(1, 3, 16, 16).to(dtype)
    planned_call(model, x)
    state = {key: t * 2 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.load_state_dict(state)
    assert_same(model, x)


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_new_weight_of_a_linear_layer_is_seen(how: str) -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 16, 16)
    before = planned_call(model, x)
    with torch.no_grad():
        if how == "written":
            model.fc.weight.mul_(2)  # type: ignore[union-attr, operator]
        else:
            model.fc.weight = nn.Parameter(2 * model.fc.weight, requires_grad=False)  # type: ignore[union-attr, operator, arg-type]
        assert not torch.allclose(model(x), before)
    assert_same(model, x)


def test_a_model_without_inputs_runs_as_its_graph() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 3)
            self.register_buffer("x", torch.randn(1, 16, 5, 5))

        def forward(self) -> Tensor:
            result: Tensor = self.conv(self.x)
            return result

    model = converted(Constant())
    expected = model.get_submodule("conv")(model.get_buffer("x"))
    assert torch.equal(model(), expected)


def test_a_layer_that_is_put_in_the_place_of_another_is_seen() -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 16, 16)
    before = planned_call(model, x)
    model.fc = nn.Linear(32, 10).requires_grad_(False)
    with torch.no_grad():
        for _ in range(3):
            assert not torch.allclose(model(x), before)


def test_copies_and_pickles_run_by_themselves() -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 16, 16)
    expected = planned_call(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(planned_call(twin, x), expected)
        twin.get_parameter("fc.weight").data.zero_()
    assert torch.equal(planned_call(model, x), expected)


def test_shapes_come_and_go() -> None:
    model = converted(Residual())
    for size in (*range(8, 8 + 2 * runner.PLANS), 8):
        assert_same_once = torch.randn(1, 3, size, size)
        with torch.no_grad():
            for _ in range(3):
                output = model(assert_same_once)
        torch.testing.assert_close(output, graph_call(model, assert_same_once), rtol=1e-4, atol=1e-5)
    found: Any = type(model)
    assert len(found.runner.plans) <= runner.PLANS


def _child(model: nn.Module, x: Tensor, expected: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(all(torch.equal(model(x), expected) for _ in range(3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_runs_serially_and_right() -> None:
    model, x = converted(Residual()), torch.randn(1, 3, 32, 32)
    expected = planned_call(model, x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(model, x, expected, queue))
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    assert queue.get()


def test_buffers_share_memory_where_their_times_do_not_meet() -> None:
    layout = Layout.channels_last(64, (16, 16))
    buffers = [Buffer(layout, first=i, last=i + 1) for i in range(1, 7)]
    size = arrange(buffers, 1, 4)
    assert size < 3 * (64 * 256 * 4 + 4096)
    for a in buffers:
        for b in buffers:
            if a is not b and a.first <= b.last and b.first <= a.last:
                assert abs(a.offset - b.offset) >= 64 * 256 * 4


def test_a_border_of_zeros_is_shared_with_its_like_alone() -> None:
    bordered = Layout(32, (8, 8), 32, 32, (1, 1))
    plain = Layout(32, (10, 10), 32, 32)
    buffers = [Buffer(bordered, first=1, last=2), Buffer(plain, first=3, last=4), Buffer(bordered, first=5, last=6)]
    arrange(buffers, 1, 4)
    assert buffers[0].offset == buffers[2].offset
    assert abs(buffers[0].offset - buffers[1].offset) >= 4 * bordered.image


def test_what_a_view_may_show_is_never_given_away() -> None:
    layout = Layout.channels_last(64, (16, 16))
    buffers = [Buffer(layout, first=1, last=FOREVER), Buffer(layout, first=5, last=6)]
    arrange(buffers, 1, 4)
    assert buffers[0].offset != buffers[1].offset
