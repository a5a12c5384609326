"""save and load, state dicts, copies and pickles: nothing changes on the way, and damage is named."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxdbsr
from bench.coverage import build, example, first_tensor
from bench.small_net import SmallNet, sparse
from fxdbsr.converted import STATE, ConvertedModule
from fxdbsr.nn.packed import PackedConv
from fxdbsr.record import name_of

ZOO = ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 12, 12)


@pytest.fixture
def fast(x: Tensor) -> ConvertedModule:
    converted = fxdbsr.convert(sparse(SmallNet(), x))
    assert isinstance(converted, ConvertedModule)
    return converted


def write(model: nn.Module, path: Path) -> Path:
    """The state of `model` at `path`, as a user without `fxdbsr.save` writes it."""
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("writer", [fxdbsr.save, write])
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_load_gives_back_the_model(suffix: str, writer: Callable[..., Any], backend: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = sparse(SmallNet(), x)
    fast, path = fxdbsr.convert(prepared, backend=backend), tmp_path / f"model.{suffix}"
    writer(fast, path)
    dense = SmallNet()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    loaded = fxdbsr.load(dense, path)
    assert torch.equal(loaded(x), fast(x))
    assert not loaded.training
    assert str(fxdbsr.report(loaded, x)) == str(fxdbsr.report(fast, x))
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = write(loaded, tmp_path / "again.pt")
    assert torch.equal(fxdbsr.load(SmallNet(), again)(x), fast(x))


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_zoo_models_load_into_a_model_on_the_meta_device(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = example(name, 2, 64)
    fast = fxdbsr.convert(sparse(build(name).eval(), x, 32))
    path = write(fast, tmp_path / "model.safetensors")
    with torch.device("meta"):
        dense = build(name)
    loaded = fxdbsr.load(dense, path)
    assert torch.equal(first_tensor(loaded(x)), first_tensor(fast(x)))
    assert loaded.state_dict().keys() == fast.state_dict().keys()


def test_half_precision_models_load_with_their_dtype(x: Tensor, tmp_path: Path) -> None:
    fast = fxdbsr.convert(sparse(SmallNet(), x), backend="reference").to(torch.bfloat16)
    loaded = fxdbsr.load(SmallNet(), write(fast, tmp_path / "model.pt"))
    assert torch.equal(loaded(x.bfloat16()), fast(x.bfloat16()))


def test_a_state_saved_through_a_wrapper_loads(fast: ConvertedModule, x: Tensor, tmp_path: Path) -> None:
    compiled: Any = torch.compile(fast, backend="eager")
    wrapped = nn.DataParallel(compiled)
    assert torch.equal(fxdbsr.load(SmallNet(), write(wrapped, tmp_path / "model.pt"))(x), fast(x))


def test_the_state_is_plain_tensors_and_their_record(fast: ConvertedModule, tmp_path: Path) -> None:
    state = fast.state_dict()
    assert all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() for tensor in state.values())
    packed = {name for name, module in fast.named_modules() if isinstance(module, PackedConv)}
    assert {"stem", "a", "b", "w_conv"} <= packed
    for name in packed:
        own = {key.removeprefix(f"{name}.") for key in state if key.startswith(f"{name}.")}
        assert own - {"bias"} == {"values", "crow_indices", "col_indices"}
    torch.save(state, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_state_loads_into_another_conversion_of_the_same_model(x: Tensor) -> None:
    prepared = sparse(SmallNet(), x)
    one = fxdbsr.convert(prepared)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.5)
    other = fxdbsr.convert(prepared)
    assert not torch.equal(other(x), one(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
    other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()}, assign=True)
    assert torch.equal(other(x), one(x))


def test_resnet50_is_saved_in_its_density_of_the_dense_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("resnet50")
    prepared = fxdbsr.prepare(model, (32, 32))
    fxdbsr.block_prune_(prepared, 0.6, "random", generator=torch.Generator().manual_seed(0))
    total = fxdbsr.report(prepared, torch.zeros(1, 3, 32, 32)).total
    fxdbsr.save(fxdbsr.convert(prepared), tmp_path / "sparse.safetensors")
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    dense, sparse = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "sparse"))
    assert total.params / total.params_dense < 0.5
    assert sparse <= (total.params / total.params_dense + 0.01) * dense


@pytest.mark.parametrize("strict", [True, False])
def test_prepared_states_and_plain_checkpoints_load_both_ways(x: Tensor, strict: bool, tmp_path: Path) -> None:
    plain, prepared = SmallNet(), sparse(SmallNet(), x)
    torch.save(prepared.state_dict(), tmp_path / "prepared.pt")
    save_file(prepared.state_dict(), tmp_path / "prepared.safetensors")
    for state in (
        torch.load(tmp_path / "prepared.pt", weights_only=True),
        load_file(tmp_path / "prepared.safetensors"),
    ):
        other = fxdbsr.prepare(SmallNet(), 4).eval()
        other.load_state_dict(state)
        assert torch.equal(other(x), prepared(x))
        found = plain.load_state_dict(state, strict=False)
        assert not found.missing_keys
        assert {key.rpartition(".")[2] for key in found.unexpected_keys} == {"scale", "mask", "w_scale", "w_mask"}
    state = plain.state_dict()
    if strict:
        ones = {name: torch.ones_like(t) for name, t in prepared.state_dict().items() if name not in state}
        prepared.load_state_dict(state | ones)
    else:
        fresh = fxdbsr.prepare(SmallNet(), 4)
        assert {key.rpartition(".")[2] for key in fresh.load_state_dict(state, strict=False).missing_keys} == {
            "scale",
            "mask",
            "w_scale",
            "w_mask",
        }
        prepared = fresh.eval()
    assert torch.equal(prepared(x), plain.eval()(x))


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch])
def test_copies_and_pickles_stay_converted_models(clone: Any, x: Tensor, tmp_path: Path) -> None:
    fast = fxdbsr.convert(sparse(SmallNet(), x))
    fast.register_forward_hook(double)
    for other in (clone(fast), clone(clone(fast))):
        assert type(other).__name__ == "SmallNet"
        assert isinstance(other, ConvertedModule)
        assert torch.equal(other(x), fast(x))
        assert torch.equal(fxdbsr.load(SmallNet(), write(other, tmp_path / "model.pt"))(x) * 2, fast(x))


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_hooks_of_the_dense_model_run_after_load(fast: ConvertedModule, x: Tensor, tmp_path: Path) -> None:
    path = write(fast, tmp_path / "model.pt")
    dense = SmallNet()
    dense.register_forward_hook(double)
    assert torch.equal(fxdbsr.load(dense, path)(x), 2 * fast(x))


class Concrete(nn.Module):
    """Traces only where `twice` is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y: Tensor = self.conv(x)
        return 2 * y if twice else y


def test_a_model_prepared_with_concrete_arguments_loads_with_them(x: Tensor, tmp_path: Path) -> None:
    fast = fxdbsr.convert(fxdbsr.prepare(Concrete(), 4, concrete_args={"twice": True}))
    path = write(fast, tmp_path / "model.pt")
    loaded = fxdbsr.load(Concrete(), path, concrete_args={"twice": True})
    assert torch.equal(loaded(x, True), fast(x, True))
    with pytest.raises(ValueError, match="cannot be traced"):
        fxdbsr.load(Concrete(), path)


def changed(state: dict[str, Tensor], name: str, how: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return state | {name: how(state[name])}


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def edited(state: dict[str, Tensor], edit: Callable[[Any], Any]) -> dict[str, Tensor]:
    """`state` with another record."""
    record = json.loads(bytes(state[STATE].tolist()))
    edit(record)
    return state | {STATE: torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)}


def call(record: Any, target: str, *args: Any, op: str = "call_function", keyword: str = "dim") -> None:
    record["graph"].insert(-1, [op, "evil", target, {"tuple": args}, {"dict": [[keyword, 1]]}])


def put(record: Any, place: int, value: Any) -> None:
    record["layers"]["a"]["grids"]["grid"][place] = value


SPLIT = name_of(torch.split)
DAMAGE: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (lambda s: without(s, STATE), "expected the state of a converted model"),
    (lambda s: without(s, "fc.weight"), "fc.weight: expected .* the file holds nothing"),
    (lambda s: without(s, "stem.values"), "stem.values: expected .* the file holds nothing"),
    (lambda s: s | {"stem.extra": torch.ones(1)}, r"stem\.extra: expected nothing"),
    (lambda s: s | {"extra": torch.ones(1)}, "extra: the file holds it, and no step"),
    (lambda s: changed(s, "stem.bias", lambda t: t[:-1]), "stem.bias: expected"),
    (lambda s: changed(s, "stem.values", lambda t: t[:, :, :-1]), "stem.values: expected"),
    (lambda s: changed(s, "a.col_indices", lambda t: t + 100), "a.col_indices: expected columns from 0"),
    (
        lambda s: changed(s, "w_conv.col_indices", lambda t: t * 0),
        "expected the columns of a row in order",
    ),
    (lambda s: changed(s, "a.col_indices", lambda t: t.long()), "a.col_indices: expected one axis of int32"),
    (lambda s: changed(s, "a.crow_indices", lambda t: t.flip(0)), "a.crow_indices: expected"),
    (lambda s: changed(s, STATE, lambda t: t[:-5]), "damaged record"),
    (lambda s: changed(s, STATE, lambda t: t[:0].float()), "damaged record"),
    (lambda s: edited(s, lambda r: r.update(format=0)), "another version of fxdbsr"),
    (lambda s: edited(s, lambda r: r.update(why_not="it is odd")), "could not be described .*it is odd"),
    (lambda s: edited(s, lambda r: r.pop("graph")), "damaged"),
    (lambda s: edited(s, lambda r: r["graph"].pop(1)), "damaged graph"),
    (lambda s: edited(s, lambda r: r["layers"]["a"].pop("stride")), "damaged record"),
    (lambda s: edited(s, lambda r: r["layers"]["a"].update(stride=[1, -1])), "no stride, padding or dilation"),
    (
        lambda s: edited(s, lambda r: put(r, 0, 1 << 40)),
        "a.crow_indices: expected|a.bias",
    ),
    (lambda s: edited(s, lambda r: put(r, 4, [0, 4])), "damaged record"),
    (lambda s: edited(s, lambda r: put(r, 3, 0)), "damaged record"),
    (lambda s: edited(s, lambda r: r["layers"]["a"].update(activation="exec")), "damaged record"),
    (lambda s: edited(s, lambda r: r["layers"]["a"].update(backend="exec")), "backend: expected one of"),
    (lambda s: edited(s, lambda r: r["layers"].update({"nothing": {"kind": "norm"}})), "nothing: no step"),
    (lambda s: edited(s, lambda r: call(r, "posix.system", "true")), "evil calls posix.system, which the model"),
    (lambda s: edited(s, lambda r: call(r, "torch.serialization.load", "x")), "which the model does not call"),
    (lambda s: edited(s, lambda r: call(r, "numpy", op="call_method")), "calls the method numpy, which the model"),
    (lambda s: edited(s, lambda r: call(r, "fc; exit()", op="call_module")), "is no name"),
    (lambda s: edited(s, lambda r: call(r, 'fc["x"]', op="get_attr")), "is no name"),
    (lambda s: edited(s, lambda r: call(r, "missing", op="call_module")), "missing: the model has no such layer"),
    (lambda s: edited(s, lambda r: call(r, "missing.x", op="get_attr")), "missing.x: the file does not hold it"),
    (lambda s: edited(s, lambda r: call(r, "x", op="exec")), "is no kind of node"),
    (lambda s: edited(s, lambda r: call(r, SPLIT, keyword="a=exit()")), "are no keyword arguments"),
    (lambda s: edited(s, lambda r: call(r, SPLIT, {"torch": "load"})), "is no value"),
    (lambda s: edited(s, lambda r: call(r, SPLIT, {"node": "nobody"})), "damaged graph"),
]


@pytest.mark.parametrize(
    ("damage", "message"), DAMAGE, ids=[f"{i}: {message}" for i, (_, message) in enumerate(DAMAGE)]
)
def test_a_damaged_state_is_refused_by_name(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, fast: ConvertedModule, tmp_path: Path
) -> None:
    torch.save(damage(fast.state_dict()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        fxdbsr.load(SmallNet(), tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_truncated_file_is_refused(suffix: str, fast: ConvertedModule, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    fxdbsr.save(fast, path)
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="expected tensors saved by"):
            fxdbsr.load(SmallNet(), path)


class Evil:
    """Whoever unpickles it runs code."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("code was run",)


def test_load_unpickles_nothing_but_tensors(fast: ConvertedModule, tmp_path: Path) -> None:
    for content in (fast.state_dict() | {"evil": Evil()}, Evil(), fast):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="expected tensors saved by"):
            fxdbsr.load(SmallNet(), tmp_path / "model.pt")
    torch.save([torch.ones(1)], tmp_path / "model.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        fxdbsr.load(SmallNet(), tmp_path / "model.pt")


def test_another_model_is_refused(fast: ConvertedModule, tmp_path: Path) -> None:
    class Other(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    class Fewer(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.stem(x)
            return y

    path = write(fast, tmp_path / "model.pt")
    fxdbsr.load(Other(), path)  # its steps hold those of SmallNet
    with pytest.raises(ValueError, match=r"does not fit Fewer: .* calls .*, which the model does not call"):
        fxdbsr.load(Fewer(), path)


def test_wrong_arguments_are_refused(fast: ConvertedModule, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fxdbsr.save(3, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected a converted model, got SmallNet"):
        fxdbsr.save(SmallNet(), path)
    with pytest.raises(FileNotFoundError):
        fxdbsr.save(fast, tmp_path / "nowhere" / "model.pt")
    with pytest.raises(FileNotFoundError):
        fxdbsr.load(SmallNet(), path)
    with pytest.raises(IsADirectoryError):
        fxdbsr.load(SmallNet(), tmp_path)
    fxdbsr.save(fast, path)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fxdbsr.load(3, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="concrete_args: expected a dict"):
        fxdbsr.load(SmallNet(), path, concrete_args=3)  # type: ignore[arg-type]
    for model in (fast, fxdbsr.prepare(SmallNet(), 4)):
        with pytest.raises(ValueError, match="expected the dense model, got one that is prepared or converted"):
            fxdbsr.load(model, path)


def test_a_write_that_fails_leaves_the_old_file(
    fast: ConvertedModule, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    fxdbsr.save(fast, path)

    def full(state: Any, file: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fxdbsr.save(fast, path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(fxdbsr.load(SmallNet(), path)(x), fast(x))


def test_without_safetensors_the_file_cannot_be_written_or_read(
    fast: ConvertedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    fxdbsr.save(fast, path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="safetensors"):
        fxdbsr.load(SmallNet(), path)
    with pytest.raises(ImportError, match="safetensors"):
        fxdbsr.save(fast, path)


def hooked() -> nn.Module:
    """A net of which one conv and one norm have hooks that change what they compute."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    layers[4].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("pruned", [False, True])
def test_hooks_on_layers_run_after_load_as_before(pruned: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 9, 7)
    model, other = hooked(), hooked()
    if pruned:
        for net in (model, other):
            torch.nn.utils.prune.ln_structured(net.get_submodule("0"), "weight", amount=0.5, n=2, dim=0)
            torch.nn.utils.prune.ln_structured(net.get_submodule("3"), "weight", amount=0.5, n=2, dim=0)
    fast = fxdbsr.convert(model, block_size=4)
    torch.testing.assert_close(fast(x), model(x))
    fxdbsr.save(fast, tmp_path / "model.pt")
    assert torch.equal(fxdbsr.load(other, tmp_path / "model.pt")(x), fast(x))
    torch.testing.assert_close(other(x), model(x))  # its own hooks are still there
    plain = nn.Sequential(*hooked().children())
    plain[3].register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(ValueError, match="3: the model has forward hooks here, the one that was saved had none"):
        fxdbsr.load(plain, tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_compute_are_saved_as_the_layer_has_them(norm: Callable[..., Any], tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(norm(nn.Conv2d(4, 8, 3)), nn.Conv2d(8, 8, 3))

    x = torch.randn(2, 4, 9, 7)
    fast = fxdbsr.convert(fxdbsr.prepare(net(), 4))
    fxdbsr.save(fast, tmp_path / "model.pt")
    assert torch.equal(fxdbsr.load(net(), tmp_path / "model.pt")(x), fast(x))


class NormOfItsOwn(nn.BatchNorm2d):
    """As timm's norms: its own forward, behind a check of the axes."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.silu(y)


def test_norms_that_stay_are_saved_moved_and_trained_on(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), NormOfItsOwn(8), nn.Conv2d(8, 8, 3))

    x = torch.randn(2, 4, 9, 7)
    fast = fxdbsr.convert(fxdbsr.prepare(net(), 4))
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    fxdbsr.save(fast, tmp_path / "model.safetensors")
    assert torch.equal(fxdbsr.load(net(), tmp_path / "model.safetensors")(x), fast(x))
    dense = fxdbsr.to_dense(fast)
    torch.testing.assert_close(dense(x), fast(x))
    dense.train()(x)
    assert [int(b) for name, b in dense.named_buffers() if name.endswith("num_batches_tracked")] == [1]
    assert not any(tensor.is_meta for tensor in (*fast.state_dict().values(), *dense.state_dict().values()))


def test_layers_whose_names_are_no_identifiers_are_loaded(tmp_path: Path) -> None:
    def net() -> nn.Module:
        layers = nn.Sequential()
        for name in ("block1-0", "a conv", "3"):
            layers.add_module(name, nn.Conv2d(4, 4, 3))
        return layers

    x = torch.randn(2, 4, 9, 7)
    fast = fxdbsr.convert(fxdbsr.prepare(net(), 4))
    fxdbsr.save(fast, tmp_path / "model.pt")
    assert torch.equal(fxdbsr.load(net(), tmp_path / "model.pt")(x), fast(x))
