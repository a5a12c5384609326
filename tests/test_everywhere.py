"""Wherever a converted model may be called: layouts, sizes, modes, dtypes, threads, processes, missing parts."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fxdbsr
from bench.coverage import BOUND
from bench.small_net import SmallNet, sparse
from fxdbsr.converted import ConvertedModule
from fxdbsr.kernels import jit
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv

BACKENDS = ("auto", "reference", "dense")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepared() -> nn.Module:
    torch.manual_seed(0)
    return sparse(SmallNet(), torch.randn(2, 3, 12, 12), 8)


@pytest.fixture(params=BACKENDS)
def fast(request: pytest.FixtureRequest, prepared: nn.Module) -> ConvertedModule:
    found = fxdbsr.convert(prepared, backend=request.param)
    assert isinstance(found, ConvertedModule)
    return found


def equal(found: Tensor, expected: Tensor, bound: float = BOUND) -> bool:
    if found.shape != expected.shape:
        return False
    return not expected.numel() or bool((found - expected).abs().max() <= bound * expected.abs().max())


def has_cpu_engine() -> bool:
    return find_spec("llvmlite") is not None and jit.host() is not None


@torch.no_grad()
def test_any_layout_batch_and_size(fast: ConvertedModule, prepared: nn.Module) -> None:
    x = torch.randn(4, 3, 20, 24)
    inputs = {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "strided": x[::2, :, 1::2, ::3],
        "expanded": x[:1].expand(3, -1, -1, -1),
        "one image": x[:1],
        "one pixel high": torch.randn(1, 3, 2, 9),
        "large": torch.randn(1, 3, 70, 33),
        "empty batch": x[:0],
    }
    for name, y in inputs.items():
        assert equal(fast(y), prepared(y)), name


def test_grad_inference_and_no_grad_modes_agree(fast: ConvertedModule, prepared: nn.Module) -> None:
    x = torch.randn(2, 3, 12, 12)
    expected = prepared(x)
    assert equal(fast(x), expected)
    with torch.no_grad():
        assert equal(fast(x), expected)
    with torch.inference_mode():
        assert equal(fast(x.clone()), expected)
        assert fast(x).is_inference()
    assert equal(fast(x), expected)


def test_gradients_reach_inputs_and_on_request_values(fast: ConvertedModule, prepared: nn.Module) -> None:
    x = torch.randn(2, 3, 12, 12)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    prepared(a).square().sum().backward()
    fast(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert equal(b.grad, a.grad, 1e-4)
    packed = {name: layer for name, layer in fast.named_modules() if isinstance(layer, PackedConv)}
    assert all(layer.values.grad is None and not layer.values.requires_grad for layer in packed.values())
    for layer in packed.values():
        layer.values.requires_grad_()
    fast(x).square().sum().backward()
    reference = fxdbsr.convert(prepared, backend="reference")
    for name in packed:
        other = reference.get_submodule(name)
        assert isinstance(other, PackedConv)
        other.values.requires_grad_()
    reference(x).square().sum().backward()
    for name, layer in packed.items():
        if layer.blocked:
            expected = reference.get_buffer(f"{name}.values").grad
            assert layer.values.grad is not None
            assert expected is not None
            assert equal(layer.values.grad, expected, 1e-4), name


def test_gradients_of_values_are_right() -> None:
    torch.manual_seed(0)
    model = sparse(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), torch.randn(2, 3, 6, 6), 8).double()
    layer = fxdbsr.convert(model, backend="dense").get_submodule("0")
    assert isinstance(layer, PackedConv)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    values = layer.values.clone().requires_grad_()

    def run(values: Tensor) -> Tensor:
        layer.values = values
        y: Tensor = layer(x)
        return y

    torch.autograd.gradcheck(run, (values,), fast_mode=True)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(fast: ConvertedModule, prepared: nn.Module, grad: bool) -> None:
    x = torch.randn(2, 3, 12, 12)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found = fast(x)
    assert equal(found.float(), prepared(x), 0.05)


def conversions(model: nn.Module, change: Any) -> list[str]:
    """The warnings of `change(model)`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        change(model)
    return [str(warning.message) for warning in said]


@pytest.mark.skipif(not has_cpu_engine(), reason="needs the CPU engine")
def test_a_change_of_dtype_chooses_engines_again_with_one_warning(prepared: nn.Module) -> None:
    fast = fxdbsr.convert(prepared)
    layers = [m for m in fast.modules() if isinstance(m, PackedConv)]
    before = [layer.engine for layer in layers]
    assert "cpu" in before
    x = torch.randn(2, 3, 12, 12)
    assert equal(fast(x), prepared(x))
    (said,) = conversions(fast, lambda m: m.half())
    assert "from cpu to dense" in said
    assert all(layer.engine == "dense" and "float16" in layer.reason for layer in layers)
    assert equal(fast(x.half()).float(), prepared(x), 0.02)
    (said,) = conversions(fast, lambda m: m.float())
    assert "from dense to cpu" in said
    assert [layer.engine for layer in layers] == before
    assert equal(fast(x), prepared(x), 0.02)
    assert conversions(fast, lambda m: m.to("cpu").float().to(memory_format=torch.channels_last)) == []
    holder = nn.Sequential(fast, nn.Identity())
    assert len(conversions(holder, lambda m: m.double())) == 1
    assert equal(holder(x.double()).float(), prepared(x), 0.02)


@pytest.mark.skipif(not has_cpu_engine(), reason="needs the CPU engine")
def test_a_backend_asked_for_by_name_that_cannot_go_on_says_so(prepared: nn.Module) -> None:
    fast = fxdbsr.convert(prepared, backend="cpu")
    (said,) = conversions(fast, lambda m: m.double())
    assert "from cpu to dense" in said
    x = torch.randn(2, 3, 12, 12)
    assert equal(fast(x.double()).float(), prepared(x))


@pytest.mark.filterwarnings("ignore:fxdbsr. layers change")
def test_bfloat16_computes_the_same(fast: ConvertedModule, prepared: nn.Module) -> None:
    x = torch.randn(2, 3, 12, 12)
    assert equal(fast.bfloat16()(x.bfloat16()).float(), prepared(x), 0.1)


@pytest.mark.filterwarnings("ignore:fxdbsr. layers change")
def test_a_model_on_the_meta_device_gives_shapes(fast: ConvertedModule) -> None:
    assert fast.to("meta")(torch.empty(2, 3, 12, 12, device="meta")).shape == (2, 5)


def test_several_threads_on_one_model_and_several_models(prepared: nn.Module) -> None:
    models = [fxdbsr.convert(prepared, backend=backend) for backend in BACKENDS]
    inputs = [torch.randn(1 + n % 3, 3, 8 + n % 5, 12) for n in range(24)]
    with torch.no_grad():
        expected = [prepared(x) for x in inputs]

        def run(n: int) -> bool:
            with torch.inference_mode():
                return all(equal(model(inputs[n]), expected[n]) for model in models)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(run, list(range(24)) * 3))


def test_copies_are_made_while_others_run(prepared: nn.Module) -> None:
    fast, x = fxdbsr.convert(prepared), torch.randn(2, 3, 12, 12)
    expected, stop = fast(x), threading.Event()

    def run() -> bool:
        same = True
        while not stop.is_set():
            same &= torch.equal(fast(x), expected)
        return same

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run) for _ in range(2)]
        copies = [copy.deepcopy(fast) for _ in range(10)]
        stop.set()
        assert all(done.result() for done in runs)
    assert all(torch.equal(other(x), expected) for other in copies)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own, of forks beside threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_are_forked_and_spawned_compute_the_same(
    prepared: nn.Module, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # else spawned children import pytest
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    fast = fxdbsr.convert(prepared).requires_grad_(False)
    inputs = [torch.randn(2, 3, 12, 8 + n) for n in range(4)]
    expected = [fast(x) for x in inputs]
    context = multiprocessing.get_context(method)
    # one thread, as in DataLoader's workers: a forked child has none of its parent's for torch's own operators
    with context.Pool(2, torch.set_num_threads, (1,)) as pool:
        found = pool.map_async(fast, inputs).get(timeout=120)
    assert all(equal(a, b, 1e-6) for a, b in zip(found, expected, strict=True))


def test_the_profiler_and_the_flop_counter_see_the_operator(prepared: nn.Module) -> None:
    fast, x = fxdbsr.convert(prepared, backend="reference"), torch.randn(2, 3, 12, 12)
    packed = sum(isinstance(m, PackedConv) for m in fast.modules())
    for model in (fast, fxdbsr.convert(prepared)):
        with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
            model(x)
        calls = {event.key: event.count for event in seen.key_averages()}
        engines = [m.engine for m in model.modules() if isinstance(m, PackedConv)]
        assert calls["fxdbsr::conv"] == packed - engines.count("dense")
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * fxdbsr.report(model, x).total.macs_run


WITHOUT = """
import sys
for name in {missing}:
    sys.modules[name] = None
import os
os.environ["PATH"] = ""  # no compiler
import torch, fxdbsr
from bench.small_net import SmallNet, sparse
from fxdbsr.nn.packed import PackedConv
torch.manual_seed(0)
x = torch.randn(2, 3, 12, 12)
prepared = sparse(SmallNet(), x, 8)
fast = fxdbsr.convert(prepared)
torch.testing.assert_close(fast(x), prepared(x), rtol=1e-4, atol=1e-4)
print(fxdbsr.report(fast, x))
print(*sorted({{m.engine for m in fast.modules() if isinstance(m, PackedConv)}}))
"""


@pytest.mark.parametrize("missing", [["triton"], ["triton", "llvmlite", "safetensors", "sklearn", "matplotlib"]])
def test_without_what_is_optional_and_without_a_compiler(missing: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT.format(missing=missing)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    engines = done.stdout.splitlines()[-1]
    assert ("cpu" in engines) == (has_cpu_engine() and "llvmlite" not in missing)
    assert ("llvmlite is not installed" in done.stdout) == ("llvmlite" in missing)


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_inputs_that_the_dense_model_refuses_are_refused(prepared: nn.Module, backend: str) -> None:
    fast, x = fxdbsr.convert(prepared, backend=backend), torch.randn(2, 3, 12, 12)
    for wrong in (x.double(), x.half(), x.int(), x.to(torch.complex64)):
        with pytest.raises(TypeError, match=r"input: expected torch\.float32, the dtype of the weights, got torch"):
            fast(wrong)
    for nothing in (None, x.numpy(), [x]):
        with pytest.raises(TypeError, match="input: expected a tensor, got"):
            fast(nothing)


@pytest.mark.parametrize("engine", ["cpu", "reference", "dense", "compact"])
@pytest.mark.parametrize("channels", [1, 7, 9, 16])
def test_inputs_with_another_number_of_channels_are_refused(engine: str, channels: int) -> None:
    if engine == "cpu" and not has_cpu_engine():
        pytest.skip("llvmlite is not installed, or no vector unit that the CPU engine knows")
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), 4)
    for layer in blocked_layers(prepared):
        layer.set_mask(torch.tensor([[True, False], [False, False]]))
    fast = fxdbsr.convert(prepared)
    for module in fast.modules():
        if isinstance(module, PackedConv):
            module.use(engine, "it is tested")
    with torch.no_grad():
        assert fast(torch.randn(1, 8, 9, 9)).shape == (1, 8, 5, 5)
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            fast(torch.randn(1, channels, 9, 9))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference", "dense"])
def test_values_that_are_trained_or_written_are_what_runs(prepared: nn.Module, backend: str) -> None:
    fast, x = fxdbsr.convert(prepared, backend=backend), torch.randn(2, 3, 12, 12)
    twin = fxdbsr.convert(prepared, backend="reference")
    before = fast(x)
    values = [module.values for module in fast.modules() if isinstance(module, PackedConv)]
    optimizer = torch.optim.SGD([tensor.requires_grad_() for tensor in values], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in values)
        optimizer.step()
    for number in range(3):
        twin.load_state_dict(fast.state_dict())
        expected = twin(x)
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(fast(x), expected)
        torch.testing.assert_close(copy.deepcopy(fast)(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected)
            for tensor in values:
                tensor.mul_(1.5)
        if number == 1:
            fast.requires_grad_(False)
            for tensor in values:
                tensor.requires_grad_(False)
            torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x))


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_values_that_are_trained_are_what_runs_compiled(backend: str) -> None:
    conv, x = nn.Sequential(nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 6, 6)
    fast = fxdbsr.convert(fxdbsr.prepare(conv, 8), backend=backend)
    values = fast.get_buffer("0.values").requires_grad_()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x).sum().backward()
        assert values.grad is not None
        with torch.no_grad():
            values.mul_(2)
            torch.testing.assert_close(compiled(x), fast(x))
