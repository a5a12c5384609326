"""Each error that a public docstring documents is raised, with a message that names what was wrong.

`ERRORS` has a line for each; the last test holds the table against the docstrings, so that neither can go on alone.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxdbsr
from fxdbsr.reporting import drawing
from fxdbsr.training import checkpoint, load_trained

X = torch.randn(1, 4, 6, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


def prepared() -> Any:
    return fxdbsr.prepare(net(), 4)


def fast() -> Any:
    return fxdbsr.convert(prepared(), backend="reference")


def broken(name: str, value: float = torch.nan) -> Any:
    """A prepared net with a value that is no number."""
    model = prepared()
    model.state_dict()[name].view(-1)[0] = value
    return model


def hooked_weight() -> Any:
    """A prepared net of which a layer has lost its weight to a hook, as those of `torch.nn.utils.weight_norm`."""
    model = prepared()
    layer = model.get_submodule("3")
    layer.original = layer._parameters.pop("weight")
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.original * 2))
    model(X)
    return model


def ready(**options: Any) -> fxdbsr.Sparsifier:
    model = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fxdbsr.Sparsifier(model, optimizer, **({"target": 0.5, "steps": 4} | options))


class Twice(nn.Module):
    """Traces where `twice` is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor, twice: Any = None) -> Tensor:
        y: Tensor = self.conv(x)
        return 2 * y if twice > 1 else y


class Turns(nn.Module):
    """Takes a step with a number that JSON does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * 1j


def state_of_another(folder: Path) -> Path:
    fxdbsr.save(fxdbsr.convert(fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 4, 1)), 4)), folder / "other.pt")
    return folder / "other.pt"


def bytes_at(folder: Path, content: bytes) -> Path:
    (folder / "file.pt").write_bytes(content)
    return folder / "file.pt"


def plain_state(folder: Path) -> Path:
    torch.save(net().state_dict(), folder / "plain.pt")
    return folder / "plain.pt"


def cut_checkpoint(folder: Path) -> Path:
    checkpoint.save(folder / "cut.pt", {"classes": 10})
    return folder / "cut.pt"


@dataclass
class Here:
    """Where a call finds itself: an empty folder, and what it may change until it is over."""

    folder: Path
    patch: pytest.MonkeyPatch

    def without(self, module: str) -> None:
        self.patch.setitem(sys.modules, module, None)

    def dot(self, script: str) -> None:
        """A program `dot` that is the only one, and runs `script`."""
        program = self.folder / "bin" / "dot"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        self.patch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def report() -> fxdbsr.Report:
    return fxdbsr.report(fast(), X)


def save_without_safetensors(here: Here) -> None:
    here.without("safetensors.torch")
    fxdbsr.save(fast(), here.folder / "model.safetensors")


def load_without_safetensors(here: Here) -> None:
    fxdbsr.save(fast(), here.folder / "model.safetensors")
    here.without("safetensors.torch")
    fxdbsr.load(net(), here.folder / "model.safetensors")


def draw_without(here: Here, module: str, engine: str) -> None:
    here.patch.setattr(shutil, "which", lambda name: None)
    here.without(module)
    report().save_graph(here.folder / "g.svg", engine)


def draw_by(here: Here, script: str) -> None:
    here.dot(script)
    here.patch.setattr(drawing, "DOT_SECONDS", 0.2)
    report().save_graph(here.folder / "g.svg", "graphviz")


def draw_too_much(here: Here) -> None:
    here.patch.setattr(drawing, "MOST_AREA", 1)
    report().save_graph(here.folder / "g.png", "matplotlib")


def load_another_way() -> None:
    ready().load_state_dict(ready(target=None, steps=None, gamma=0.1).state_dict())


def load_another_model() -> None:
    other = fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), 4)
    sparsifier = fxdbsr.Sparsifier(other, torch.optim.SGD(other.parameters(), 0.1), target=0.5, steps=4)
    ready().load_state_dict(sparsifier.state_dict())


def unprepared() -> fxdbsr.Sparsifier:
    model = net()
    return fxdbsr.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), target=0.5, steps=4)


def without_scales() -> fxdbsr.Sparsifier:
    model = prepared()
    weights = [p for name, p in model.named_parameters() if not name.endswith("scale")]
    return fxdbsr.Sparsifier(model, torch.optim.SGD(weights, 0.1), target=0.5, steps=4)


def unknown_layer() -> fxdbsr.BlockConfig:
    return fxdbsr.BlockConfig(by_name={"conv": 4})


def complex_net() -> nn.Module:
    model: Any = net()
    model[0].weight = nn.Parameter(model[0].weight.to(torch.complex64))
    return model  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    return net().requires_grad_(False)


ANY: Any = fxdbsr  # of calls that type checkers refuse
# public name, what its docstring says, the error, what its message says, the call
ERRORS: list[tuple[str, str, type[Exception], str, Callable[[Here], Any]]] = [
    ("prepare", "an argument of the wrong kind", TypeError, "model: expected an nn.Module",
     lambda _: ANY.prepare("net")),
    ("prepare", "an argument of the wrong kind", TypeError, "config: ", lambda _: ANY.prepare(net(), config={})),
    ("prepare", "an argument of the wrong kind", TypeError, "concrete_args",
     lambda _: ANY.prepare(net(), concrete_args=1)),
    ("prepare", "an argument of the wrong kind", ValueError, "form: expected",
     lambda _: ANY.prepare(net(), form="sum")),
    ("prepare", "an argument of the wrong kind", ValueError, "block_size: expected",
     lambda _: ANY.prepare(net(), 0)),
    ("prepare", "a model that is prepared already", ValueError, "prepared already",
     lambda _: ANY.prepare(prepared())),
    ("prepare", "no layer to block", ValueError, "0: converted already", lambda _: ANY.prepare(fast())),
    ("prepare", "an unknown layer name in `config`", ValueError, "no layer 'conv'",
     lambda _: ANY.prepare(net(), config=unknown_layer())),
    ("prepare", "integer or complex weights", TypeError, "0: expected floating-point weights",
     lambda _: ANY.prepare(complex_net())),
    ("prepare", "no layer to block", ValueError, "no layer to block",
     lambda _: ANY.prepare(nn.Sequential(nn.ReLU()))),
    ("prepare", "a model that cannot be traced with the `concrete_args` given", ValueError, "Twice cannot be traced",
     lambda _: ANY.prepare(Twice(), concrete_args={"x": X})),
    ("convert", "an argument of the wrong kind", TypeError, "model: expected an nn.Module",
     lambda _: ANY.convert(3)),
    ("convert", "an argument of the wrong kind", ValueError, "backend: expected",
     lambda _: ANY.convert(prepared(), backend="gpu")),
    ("convert", "an argument of the wrong kind", ValueError, "block_size: required", lambda _: ANY.convert(net())),
    ("convert", "an argument of the wrong kind", ValueError, "block_size: 0 was prepared with",
     lambda _: ANY.convert(prepared(), block_size=2)),
    ("convert", "an argument of the wrong kind", ValueError, "tune: ",
     lambda _: ANY.convert(prepared(), tune=True)),
    ("convert", "a model without layers to block or converted already", ValueError, "no layer to block",
     lambda _: ANY.convert(nn.Sequential(nn.ReLU()), block_size=4)),
    ("convert", "a model without layers to block or converted already", ValueError, "converted already",
     lambda _: ANY.convert(fast())),
    ("convert", "or tensors on the meta device, which have no values", ValueError, r"0\.weight: expected a tensor that",
     lambda _: ANY.convert(net().to("meta"), block_size=4)),
    ("convert", "or tensors on the meta device, which have no values", ValueError, r"0\.weight: expected a tensor that",
     lambda _: ANY.convert(prepared().to("meta"))),
    ("convert", "weights of blocked layers that a hook computes", ValueError, r"3\.weight: a hook computes it",
     lambda _: ANY.convert(hooked_weight())),
    ("convert", "NaN or infinity in weights, scales or batch norms", ValueError, "3",
     lambda _: ANY.convert(broken("3.weight"))),
    ("convert", "NaN or infinity in weights, scales or batch norms", ValueError, "3",
     lambda _: ANY.convert(broken("3.scale", torch.inf))),
    ("convert", "NaN or infinity in weights, scales or batch norms", ValueError, r"1\.running_var",
     lambda _: ANY.convert(broken("1.running_var"))),
    ("convert", "the backend that was asked for by name cannot run here",
     RuntimeError, "backend 'triton' cannot run here",
     lambda _: ANY.convert(prepared().double(), backend="triton")),
    ("to_dense", "`model` is neither", TypeError, "model: expected an nn.Module", lambda _: ANY.to_dense("net")),
    ("to_dense", "`model` is neither", ValueError, "expected a prepared or converted model",
     lambda _: ANY.to_dense(net())),
    ("to_dense", "or holds NaN or infinity", ValueError, "3", lambda _: ANY.to_dense(broken("3.weight"))),
    ("to_dense", "or is on the meta device", ValueError, "expected a tensor that holds values",
     lambda _: ANY.to_dense(fast().to("meta"))),
    ("save", "no module or no path", TypeError, "path: expected a string or a path", lambda _: ANY.save(fast(), 3)),
    ("save", "no module or no path", TypeError, "model: expected an nn.Module",
     lambda here: ANY.save(fast().state_dict(), here.folder / "a")),
    ("save", "a module that is not converted", ValueError, "expected a converted model",
     lambda here: ANY.save(prepared(), here.folder / "a")),
    ("save", "was in parts", ValueError, r"Twice was converted in parts.* torch\.export\.save",
     lambda here: ANY.save(ANY.convert(ANY.prepare(Twice(), 4)), here.folder / "a")),
    ("save", "that no file of tensors describes", ValueError, "mul: 1j is no plain value",
     lambda here: ANY.save(ANY.convert(ANY.prepare(Turns(), 4)), here.folder / "a")),
    ("save", "safetensors is not installed", ImportError, "safetensors", save_without_safetensors),
    ("save", "the file cannot be written", OSError, "none",
     lambda here: ANY.save(fast(), here.folder / "none" / "a.pt")),
    ("load", "an argument of the wrong kind", TypeError, "model: expected an nn.Module",
     lambda here: ANY.load("net", here.folder)),
    ("load", "an argument of the wrong kind", TypeError, "concrete_args",
     lambda here: ANY.load(net(), here.folder, concrete_args=3)),
    ("load", "an argument of the wrong kind", TypeError, "path: expected a string or a path",
     lambda _: ANY.load(net(), None)),
    ("load", "an argument of the wrong kind", ValueError, "expected the dense model",
     lambda here: ANY.load(prepared(), here.folder)),
    ("load", "a file that is damaged", ValueError, "expected tensors saved by",
     lambda here: ANY.load(net(), bytes_at(here.folder, b"no tensors"))),
    ("load", "holds no converted model", ValueError, "expected the state of a converted model",
     lambda here: ANY.load(net(), plain_state(here.folder))),
    ("load", "or one of another model", ValueError, "does not fit Sequential",
     lambda here: ANY.load(nn.Sequential(nn.Linear(4, 4)), state_of_another(here.folder))),
    ("load", "safetensors is not installed", ImportError, "safetensors", load_without_safetensors),
    ("load", "the file cannot be read", OSError, "none", lambda here: ANY.load(net(), here.folder / "none")),
    ("report", "`model` is no module", TypeError, "model: expected an nn.Module", lambda _: ANY.report("net", X)),
    ("report", "`example_inputs` holds no tensor", TypeError, "expected a tensor or a tuple",
     lambda _: ANY.report(net(), [1])),
    ("report", "the forward fails on these inputs", ValueError, "the forward of Sequential fails",
     lambda _: ANY.report(net(), X[:, :3])),
    ("report", "parameters are not initialised yet", ValueError, "is not initialised yet",
     lambda _: ANY.report(nn.LazyConv2d(3, 1), X)),
    ("report", "blocks on the meta device", ValueError, "0: which blocks are zero",
     lambda _: ANY.report(prepared().to("meta"), X.to("meta"))),
    ("report", "blocks on the meta device", ValueError, "0: which blocks are zero",
     lambda _: ANY.report(fxdbsr.convert(prepared(), backend="dense").to("meta"), X.to("meta"))),
    ("report", "the model has neither parameters nor MACs", ValueError, "neither parameters nor MACs",
     lambda _: ANY.report(nn.ReLU(), X)),
    ("report", "no values to `measure` with", ValueError, "inputs that hold values",
     lambda _: ANY.report(net(), X.to("meta"), measure=True)),
    ("Report.table", "an unknown field", ValueError, "sort: expected one of", lambda _: report().table(sort="speed")),
    ("Report.table", "a depth or a width below 1", ValueError, "depth: expected", lambda _: report().table(depth=0)),
    ("Report.table", "a depth or a width below 1", ValueError, "width: expected", lambda _: report().table(width=-1)),
    ("Report.table", "one that is no int", TypeError, "depth: expected",
     lambda _: ANY.Report.table(report(), depth="1")),
    ("Report.table", "one that is no int", TypeError, "width: expected",
     lambda _: ANY.Report.table(report(), width=None)),
    ("Report.to_html", "`history` is no sequence of mappings", TypeError, "history",
     lambda _: ANY.Report.to_html(report(), 3)),
    ("Report.save_html", "it cannot be written", OSError, "none",
     lambda here: report().save_html(here.folder / "none" / "a.html")),
    ("Report.save_html", "it is no path", TypeError, "path: expected a string or a path",
     lambda _: ANY.Report.save_html(report(), 3)),
    ("Report.save_html", "or `history` no sequence of mappings", TypeError, "history",
     lambda here: ANY.Report.save_html(report(), here.folder / "a.html", [1])),
    ("Report.save_graph", "an unknown suffix or engine", ValueError, "path: expected a name",
     lambda here: report().save_graph(here.folder / "g.bmp")),
    ("Report.save_graph", "an unknown suffix or engine", ValueError, "engine: expected one of",
     lambda here: report().save_graph(here.folder / "g.svg", "ink")),
    ("Report.save_graph", "more nodes than a PNG can show", ValueError, "too many for a PNG", draw_too_much),
    ("Report.save_graph", 'the engine, or with "auto" both, are not installed', ImportError, "dot is not installed",
     lambda here: draw_without(here, "none", "graphviz")),
    ("Report.save_graph", 'the engine, or with "auto" both, are not installed', ImportError, "matplotlib",
     lambda here: draw_without(here, "matplotlib", "matplotlib")),
    ("Report.save_graph", 'the engine, or with "auto" both, are not installed', ImportError, "or matplotlib",
     lambda here: draw_without(here, "matplotlib", "auto")),
    ("Report.save_graph", "it cannot be written", OSError, "none",
     lambda here: report().save_graph(here.folder / "none" / "g.svg")),
    ("Report.save_graph", "it is no path", TypeError, "path: expected a string or a path",
     lambda _: ANY.Report.save_graph(report(), 3)),
    ("Report.save_graph", "Graphviz failed or took more than a minute", RuntimeError, "no room",
     lambda here: draw_by(here, "echo no room >&2; exit 1")),
    ("Report.save_graph", "Graphviz failed or took more than a minute", RuntimeError, "dot",
     lambda here: draw_by(here, "exec sleep 5")),
    ("BlockConfig", "a block size that is not one or two positive ints or None", ValueError, "block_size: expected",
     lambda _: ANY.BlockConfig((4, 4, 4))),
    ("BlockConfig", "a block size that is not one or two positive ints or None", TypeError, "block_size: expected",
     lambda _: ANY.BlockConfig("4")),
    ("BlockConfig", "an invalid pattern", ValueError, "by_pattern",
     lambda _: ANY.BlockConfig(4, by_pattern={"(": 4})),
    ("BlockConfig.from_dict", "unknown keys", ValueError, "unknown keys",
     lambda _: ANY.BlockConfig.from_dict({"blocks": 4})),
    ("BlockConfig.from_dict", "unknown keys", ValueError, "unknown keys 4",
     lambda _: ANY.BlockConfig.from_dict({4: 4})),
    ("BlockConfig.from_dict", "`data` is no dict", TypeError, "expected a dict",
     lambda _: ANY.BlockConfig.from_dict(4)),
    ("block_scales", "it is no module", TypeError, "model: expected an nn.Module", lambda _: ANY.block_scales(None)),
    ("block_scales", "the model was not prepared", ValueError, "prepare", lambda _: ANY.block_scales(net())),
    ("penalty", "an unknown `weight`", ValueError, "weight: expected one of",
     lambda _: ANY.penalty(prepared(), "flops")),
    ("penalty", "MACs asked for before any forward and without `example_inputs`",
     ValueError, "0: its MACs are not known",
     lambda _: ANY.penalty(prepared(), "macs")),
    ("penalty", "a model that was not prepared", ValueError, "prepare", lambda _: ANY.penalty(net())),
    ("penalty", "`model` is no module", TypeError, "model: expected an nn.Module", lambda _: ANY.penalty(None)),
    ("param_groups", "`model` is no module", TypeError, "model: expected an nn.Module",
     lambda _: ANY.param_groups(list(net().parameters()), 0)),
    ("param_groups", "or `params` among the `defaults`", ValueError, "got params as well",
     lambda _: ANY.param_groups(net(), 0, params=[])),
    ("param_groups", "a negative or NaN `weight_decay`", ValueError, "weight_decay",
     lambda _: ANY.param_groups(net(), -1)),
    ("param_groups", "a negative or NaN `weight_decay`", ValueError, "weight_decay",
     lambda _: ANY.param_groups(net(), torch.nan)),
    ("param_groups", "no trainable parameter", ValueError, "no trainable parameter",
     lambda _: ANY.param_groups(frozen(), 0)),
    ("param_groups", "or `weight_decay` no number", TypeError, "weight_decay",
     lambda _: ANY.param_groups(net(), "1e-4")),
    ("block_prune_", "an argument out of its range", ValueError, "sparsity",
     lambda _: ANY.block_prune_(prepared(), 1.5)),
    ("block_prune_", "an argument out of its range", ValueError, "scope: expected one of",
     lambda _: ANY.block_prune_(prepared(), 0.5, scope="net")),
    ("block_prune_", "an argument out of its range", ValueError, "score: expected one of",
     lambda _: ANY.block_prune_(prepared(), 0.5, score="l3")),
    ("block_prune_", "NaN in a score", ValueError, "3: its weight or its scale",
     lambda _: ANY.block_prune_(broken("3.weight"), 0.5)),
    ("block_prune_", "a model not prepared or on the meta device", ValueError, "prepare",
     lambda _: ANY.block_prune_(net(), 0.5)),
    ("block_prune_", "a model not prepared or on the meta device", ValueError, "0: expected weights that hold values",
     lambda _: ANY.block_prune_(prepared().to("meta"), 0.5)),
    ("block_prune_", "an argument of another type", TypeError, "model: expected an nn.Module",
     lambda _: ANY.block_prune_(None, 0.5)),
    ("block_prune_", "an argument of another type", TypeError, "sparsity: expected a number",
     lambda _: ANY.block_prune_(prepared(), "0.5")),
    ("block_prune_", "an argument of another type", TypeError, "generator: expected a torch.Generator",
     lambda _: ANY.block_prune_(prepared(), 0.5, "random", generator=0)),
    ("Sparsifier", "an argument that is missing or out of its range", ValueError, "steps",
     lambda _: ready(steps=None)),
    ("Sparsifier", "an argument that is missing or out of its range", ValueError, "target",
     lambda _: ready(target=1.0)),
    ("Sparsifier", "an argument that is missing or out of its range", TypeError, "target",
     lambda _: ready(target="half")),
    ("Sparsifier", "an argument that is missing or out of its range", ValueError, "gamma",
     lambda _: ready(target=None, gamma=-1.0)),
    ("Sparsifier", "an argument that is missing or out of its range", TypeError, "model: expected an nn.Module",
     lambda _: ANY.Sparsifier(None, None, target=0.5, steps=4)),
    ("Sparsifier", "an argument that is missing or out of its range", TypeError, "optimizer: expected",
     lambda _: ANY.Sparsifier(prepared(), None, target=0.5, steps=4)),
    ("Sparsifier.sparsity", "another `of`", ValueError, "of: expected one of", lambda _: ready().sparsity("flops")),
    ("Sparsifier.sparsity", "MACs before the first forward, where no `example_inputs` were given", ValueError,
     "0: its MACs are not known", lambda _: ready().sparsity("macs")),
    ("Sparsifier", "a model that was not prepared", ValueError, "prepare",
     lambda _: unprepared()),
    ("Sparsifier", "an optimizer without the scales", ValueError, "lacks 2 of 2 scales", lambda _: without_scales()),
    ("Sparsifier",
     "a target that cannot be met because convs on the only path from input to output keep a block",
     ValueError, "at most 0",
     lambda _: ready(target=0.99)),
    ("Sparsifier.load_state_dict", "`state` is not of a sparsifier", ValueError, "expected the state of a Sparsifier",
     lambda _: ready().load_state_dict({})),
    ("Sparsifier.load_state_dict", "`state` is not of a sparsifier", ValueError, "expected the plan of a Sparsifier",
     lambda _: ready().load_state_dict(ready().state_dict() | {"plan": {}})),
    ("Sparsifier.load_state_dict", "it is no dict", TypeError, "state: expected",
     lambda _: ANY.Sparsifier.load_state_dict(ready(), None)),
    ("Sparsifier.load_state_dict", "of one that goes another way", ValueError, "one of the sparsifiers has a target",
     lambda _: load_another_way()),
    ("Sparsifier.load_state_dict", "of another model", ValueError, "state", lambda _: load_another_model()),
    ("load_trained", "the file cannot be read", OSError, "none", lambda here: load_trained(here.folder / "none")),
    ("load_trained", "it is no such checkpoint", ValueError, "not a checkpoint",
     lambda here: load_trained(bytes_at(here.folder, b"no tensors"))),
    ("load_trained", "it is no such checkpoint", ValueError, r"damaged checkpoint: it lacks \['ema_steps'",
     lambda here: load_trained(cut_checkpoint(here.folder))),
    ("load_trained", "`path` is no path", TypeError, "path: expected a string or a path",
     lambda _: cast(Any, load_trained)(None)),
    ("set_float32_precision", "`model` is no module", TypeError, "model: expected an nn.Module",
     lambda _: ANY.set_float32_precision(None, "3xtf32")),
    ("set_float32_precision", "another precision", ValueError, "precision: expected one of",
     lambda _: ANY.set_float32_precision(fast(), "tf32")),
    ("set_float32_precision", "a model without packed convs", ValueError, "without packed convs",
     lambda _: ANY.set_float32_precision(net(), "3xtf32")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "error", "message", "call"), [(name, *rest) for name, _, *rest in ERRORS], ids=[n for n, *_ in ERRORS]
)
def test_a_documented_error_is_raised_and_says_what_is_wrong(
    name: str,
    error: type[Exception],
    message: str,
    call: Callable[[Here], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(error, match=message):
        call(Here(tmp_path, monkeypatch))


def documented() -> dict[str, str]:
    """What the docstring of each public function, class and method says under Raises."""
    public: dict[str, Any] = {}
    for name in (*fxdbsr.__all__, *fxdbsr.training.__all__):
        found = public[name] = getattr(fxdbsr if name in fxdbsr.__all__ else fxdbsr.training, name)
        if inspect.isclass(found):
            public |= {f"{name}.{key}": getattr(found, key) for key in vars(found) if not key.startswith("_")}
    sections = {}
    for name, found in public.items():
        if section := re.search(r"^Raises:\n((?: +.*\n?)+)", inspect.getdoc(found) or "", re.MULTILINE):
            sections[name] = " ".join(section[1].split())
    return sections


def test_there_is_a_line_for_each_error_that_a_docstring_documents() -> None:
    said = documented()
    assert {name for name, *_ in ERRORS} == set(said)
    for name, text in said.items():
        lines = [line for line in ERRORS if line[0] == name]
        kinds = set(re.findall(r"\w+Error", text))
        assert {error.__name__ for _, _, error, *_ in lines} == kinds, name
        for clause in {clause for _, clause, *_ in lines}:
            assert clause in text, name
            text = text.replace(clause, "", 1)
        rest = re.sub(r"\([^)]*\)|`model` is then unchanged|\w+Error|\bor\b|[,:;.\s]", "", text)
        assert not rest, f"{name}: no test of {text!r}"
