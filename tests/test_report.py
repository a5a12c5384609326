"""The report's figures against torchvision's metadata, FlopCounterMode and counts by brute force."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked


class Small(nn.Module):
    """Every kind of 2-D layer: stem, grouped, depthwise, strided, one called twice, transposed, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.grouped = nn.Conv2d(20, 12, 3, groups=2, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding="same")
        self.twice = nn.Conv2d(12, 12, 1)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2, groups=2)
        self.fc = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.depthwise(self.grouped(x))
        x = self.up(self.twice(F.relu(self.twice(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Functional(nn.Module):
    """A functional conv on a parameter, called twice, and one on a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.v = nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.conv2d(x, self.w, padding=1), self.w, None, 2, 1)
        return F.conv2d(x, self.v - self.v.mean())


class Shared(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


class Lines(nn.Module):
    """A conv along one axis and one along three."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(6, 9, 3, stride=2, padding=2, dilation=2)
        self.space = nn.Conv3d(9, 5, (1, 2, 3), groups=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.space(self.line(x)[..., None, None].expand(-1, -1, -1, 4, 5))
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (Small, (2, 3, 9, 8)),
    "functional": (Functional, (2, 8, 6, 6)),
    "shared": (Shared, (1, 8, 5, 5)),
    "lines": (Lines, (3, 6, 11)),
}
TYPES = (nn.modules.conv._ConvNd, nn.Linear)


def halve(model: nn.Module, seed: int = 0) -> nn.Module:
    """Switch off a random half of every layer's blocks, but not the first."""
    generator = torch.Generator().manual_seed(seed)
    for layer in blocked_layers(model):
        keep = torch.rand(layer.grid.shape, generator=generator) < 0.5
        keep[0, 0] = True
        layer.set_mask(keep)
    return model


def forms(name: str) -> list[tuple[str, nn.Module, Tensor]]:
    """(form, model, input) of the plain, prepared and converted model `name`."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(size)
    types = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear]
    prepared = halve(fxdbsr.prepare(plain, (4, 3), types=types))
    converted = [(b, fxdbsr.convert(prepared, backend=b), x) for b in ("reference", "dense", "auto")]
    return [("plain", plain, x), ("prepared", prepared, x), *converted]


def counted(model: nn.Module, x: Tensor) -> int:
    """What FlopCounterMode counts in one eval forward, attention as matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "maxvit_t",
        "mnasnet1_0",
        "mobilenet_v3_large",
        "resnet50",
        "resnext50_32x4d",
        "shufflenet_v2_x1_0",
        "squeezenet1_1",
        "swin_t",
        "swin_v2_t",
        "vgg11_bn",
        "vit_b_16",
    ],
)
def test_dense_totals_equal_torchvisions_metadata(name: str) -> None:
    weights = next(iter(get_model_weights(name)))
    crop = weights.transforms().crop_size[0]
    with torch.device("meta"):
        model, x = get_model(name, weights=None), torch.empty(1, 3, crop, crop)
    total = fxdbsr.report(model, x).total
    assert round(total.macs_dense / 1e9, 3) == weights.meta["_ops"]
    assert total.macs_dense == total.macs == total.macs_run
    assert total.params == total.params_dense == weights.meta["num_params"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnet50",
            {
                "params": 25_557_032,
                "macs": 4_089.18,
                "stem": 118.01,
                "1x1": 1_759.77,
                "3x3": 1_849.69,
                "down": 359.66,
                "fc": 2.05,
                "blocks": 13_072,
            },
        ),
        (
            "resnext50_32x4d",
            {
                "params": 25_028_904,
                "macs": 4_230.48,
                "stem": 118.01,
                "1x1": 3_519.55,
                "grouped": 231.21,
                "down": 359.66,
                "fc": 2.05,
                "blocks": 21_220,
            },
        ),
    ],
)
def test_macs_by_class_and_blocks_equal_the_known_arithmetic(name: str, expected: dict[str, float]) -> None:
    model = get_model(name, weights=None)
    x = torch.randn(1, 3, 224, 224)
    report = fxdbsr.report(fxdbsr.prepare(model, 32), x)
    found: dict[str, float] = {"params": report.total.params, "macs": report.total.macs_dense}
    for row in report.rows:
        assert row.weight_shape is not None
        conv = model.get_submodule(row.name)
        grouped = getattr(conv, "groups", 1) > 1
        taps = "grouped" if grouped else "1x1" if row.weight_shape[2:] == (1, 1) else "3x3"
        kind = {"conv1": "stem", "fc": "fc"}.get(row.name, "down" if "downsample" in row.name else taps)
        found[kind] = found.get(kind, 0) + row.macs_dense
    found = {key: value if key == "params" else round(value / 1e6, 2) for key, value in found.items()}
    assert {**found, "blocks": sum(r.blocks_total for r in report.rows if r.name != "conv1")} == expected


def test_resnet50_at_the_densities_fitted_to_the_posters_rows_has_their_figures() -> None:
    """Row A (.654 / .684) has 17.89 M parameters and 2.74 GMACs, row B (.541 / .445) 13.36 M and 2.19 G."""
    model = fxdbsr.prepare(get_model("resnet50", weights=None), 32)
    x = torch.randn(1, 3, 224, 224)
    for early, late, params, macs in ((0.654, 0.684, 17.89e6, 2.74e9), (0.541, 0.445, 13.36e6, 2.19e9)):
        for layer in blocked_layers(model):
            density = 1.0 if layer.name == "conv1" else late if layer.name.startswith("layer4") else early
            kept = torch.zeros(layer.mask.numel(), dtype=torch.bool)
            kept[: round(density * kept.numel())] = True
            layer.set_mask(kept.view_as(layer.mask))
        total = fxdbsr.report(model, x).total
        assert total.params == pytest.approx(params, rel=0.01)
        assert total.macs == pytest.approx(macs, rel=0.01)


# ---------------------------------------------------------------- FlopCounterMode and brute force


@pytest.mark.parametrize("name", MODELS)
def test_twice_macs_run_is_what_flop_counter_mode_counts(name: str) -> None:
    for form, model, x in forms(name):
        report = fxdbsr.report(model, x)
        rows = [*report.rows, report.other]
        assert 2 * sum(row.macs_run for row in rows) == counted(model, x), form
        assert report.total.macs_run == sum(row.macs_run for row in rows)


def test_attention_is_counted_in_other_where_a_fused_path_would_hide_it() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    report = fxdbsr.report(model, x)
    assert [row.name for row in report.rows] == ["linear1", "linear2"]
    assert report.other.macs_run == 2 * 5 * 16 * 16 * 4 + 2 * 2 * 5 * 5 * 16
    assert 2 * report.total.macs_run == counted(model, x)
    assert report.total.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_the_expanded_mask_multiplied_one_by_one(name: str) -> None:
    _, prepared, x = forms(name)[1]
    report = fxdbsr.report(prepared, x)
    found: dict[str, int] = {}
    for row in report.rows:
        key = row.reason.rpartition(" ")[2] if "shares the weight" in row.reason else row.name
        if row.block_size:
            found[key] = found.get(key, 0) + row.macs
    prepared(x)
    expected = {
        layer.name: sum(
            int(layer.grid.expand_mask(layer.mask).sum()) * positions * x.shape[0]
            for user in layer.users
            for positions in user.positions
        )
        for layer in blocked_layers(prepared)
    }
    assert found == expected


def test_macs_of_one_conv_recounted_by_summing_over_ones() -> None:
    conv = nn.Conv2d(10, 12, 3, stride=2, groups=2, bias=False)
    model = halve(fxdbsr.prepare(nn.Sequential(conv), (4, 3)))
    x = torch.ones(2, 10, 9, 7)
    row = fxdbsr.report(model, x).rows[0]
    layer = blocked_layers(model)[0]
    kept = layer.grid.expand_mask(layer.mask).float()
    assert row.macs == int(F.conv2d(x, kept, stride=2, groups=2).sum())
    assert row.macs_dense == int(F.conv2d(x, torch.ones_like(kept), stride=2, groups=2).sum())
    assert row.params == int(kept.sum())
    assert (row.blocks_kept, row.blocks_total) == (int(layer.mask.sum()), layer.mask.numel())
    assert row.sparsity == 1 - row.blocks_kept / row.blocks_total
    assert row.block_size == (4, 3)


@pytest.mark.parametrize("name", ["small", "lines"])
def test_converted_models_have_the_macs_of_the_prepared_one_or_fewer(name: str) -> None:
    (_, plain, x), (_, prepared, _), *converted = forms(name)
    dense, before = fxdbsr.report(plain, x).total, fxdbsr.report(prepared, x).total
    assert (before.macs_dense, before.params_dense) == (dense.macs_dense, dense.params_dense)
    for backend, model, _ in converted:
        after = fxdbsr.report(model, x)
        assert after.total.macs_dense == before.macs_dense, backend
        assert before.macs * 0.95 < after.total.macs <= before.macs, backend  # a few channels are dead
        assert after.total.blocks_total == before.blocks_total
        assert after.total.blocks_kept <= before.blocks_kept
        for row in after.rows:
            assert row.reason, row.name


def test_bytes_of_a_packed_conv_are_its_values_indices_and_bias() -> None:
    model = halve(fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 8, 3)), 4))
    packed = fxdbsr.convert(model, backend="dense")
    row = fxdbsr.report(packed, torch.randn(1, 8, 5, 5)).rows[0]
    layer = next(m for m in packed.modules() if isinstance(m, PackedConv))
    assert row.bytes == sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert (row.kernel, row.reason) == ("dense", "asked for")
    assert row.macs_run == row.macs_dense > row.macs


def test_scales_at_zero_count_as_zero_blocks_in_both_forms() -> None:
    x = torch.randn(1, 8, 5, 5)
    for form, value, kept in (("product", -1.0, 4), ("clamp", -1.0, 3), ("product", 0.0, 3)):
        model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 8, 3)), 4, form=form)
        with torch.no_grad():
            blocked_layers(model)[0].scale[0, 0] = value
        assert fxdbsr.report(model, x).rows[0].blocks_kept == kept


# ---------------------------------------------------------------- rows


def test_rows_are_convs_and_linears_in_the_order_of_calls() -> None:
    report = fxdbsr.report(Small(), torch.randn(2, 3, 9, 8))
    assert [(row.name, row.kind) for row in report.rows] == [
        ("stem", "conv2d"),
        ("grouped", "conv2d"),
        ("depthwise", "conv2d"),
        ("twice", "conv2d"),
        ("up", "conv_transpose2d"),
        ("fc", "linear"),
    ]
    rows = {row.name: row for row in report.rows}
    assert rows["twice"].macs_dense == 2 * 2 * 5 * 4 * 12 * 12
    assert rows["twice"].params == 12 * 12 + 12
    assert rows["up"].macs_dense == 2 * 5 * 4 * 12 * 5 * 4
    assert (rows["up"].weight_shape, rows["up"].output_shape) == ((12, 5, 2, 2), (2, 10, 10, 8))
    assert report.other.params == 40
    assert report.total.params == sum(p.numel() for p in Small().parameters())
    assert {row.reason for row in report.rows} == {"not prepared"}


def test_functional_convs_have_rows_with_their_reasons() -> None:
    x = torch.randn(2, 8, 6, 6)
    first, second = fxdbsr.report(Functional(), x).rows
    assert (first.name, first.reason, first.params) == ("w", "not prepared", 576)
    assert first.macs_dense == 2 * (36 + 9) * 576
    assert (second.name, second.kind) == ("conv2d_2", "conv2d")
    assert second.reason == "its weight is computed in the forward"
    prepared = fxdbsr.report(fxdbsr.prepare(Functional(), 4), x)
    assert [(row.name, row.blocks_total) for row in prepared.rows] == [("w", 4), ("conv2d_2", 0)]
    assert prepared.total.params == 576 + 32
    assert prepared.rows[0].macs_dense == first.macs_dense
    assert prepared.rows[1].reason == "its weight is computed in the forward"


def test_a_weight_that_two_modules_share_counts_once() -> None:
    report = fxdbsr.report(Shared(), torch.randn(1, 8, 5, 5))
    assert [row.params for row in report.rows] == [576 + 8, 8]
    assert report.rows[1].reason.endswith("shares the weight of a")
    prepared = fxdbsr.report(fxdbsr.prepare(Shared(), 4), torch.randn(1, 8, 5, 5))
    assert prepared.total.params == prepared.total.params_dense == 576 + 16
    assert prepared.total.blocks_total == 4


def test_layers_that_stay_dense_say_why() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4, 4, 1), norm, nn.Flatten(), nn.Linear(4, 2))
    prepared = fxdbsr.prepare(model, 2)
    reasons = {row.name: row.reason for row in fxdbsr.report(prepared, torch.randn(1, 3, 1, 1)).rows}
    assert reasons == {
        "0": "training form: convert drops the zero blocks",
        "1": "Own overrides forward",
        "2": "its parameters are parametrized",
        "4": "not selected",
    }
    x = torch.randn(1, 3, 1, 1)
    assert 2 * fxdbsr.report(prepared, x).total.macs_run == counted(prepared, x)
    assert fxdbsr.report(model, x).total.params == sum(p.numel() for p in model.parameters())


def test_unpacked_layers_of_a_converted_model_keep_their_blocks_and_say_why() -> None:
    types = [nn.Conv2d, nn.ConvTranspose2d, nn.Linear]
    model = Small()
    model.up = nn.ConvTranspose2d(model.up.in_channels, model.up.out_channels, 3, stride=2)
    converted = fxdbsr.convert(halve(fxdbsr.prepare(model, 4, types=types)), backend="reference")
    rows = {row.name: row for row in fxdbsr.report(converted, torch.randn(1, 3, 9, 8)).rows}
    assert rows["up"].kernel == "dense"
    assert rows["up"].reason == "no engine packs transposed convs whose kernels overlap"
    assert (rows["up"].kind, rows["fc"].kind) == ("conv_transpose2d", "linear")
    assert (rows["fc"].kernel, rows["fc"].reason) == ("reference", "asked for")
    assert 0 < rows["up"].blocks_kept < rows["up"].blocks_total
    assert rows["up"].macs < rows["up"].macs_run <= rows["up"].macs_dense


def test_models_with_two_graphs_and_uncalled_heads_report_the_eval_graph() -> None:
    model = fxdbsr.prepare(torchvision.models.googlenet(init_weights=False, aux_logits=True), 32)
    x = torch.randn(2, 3, 64, 64)
    report = fxdbsr.report(model.train(), x)
    assert model.training
    assert report.model == "GoogLeNet"
    assert not any(row.name.startswith("aux") for row in report.rows)
    assert "not called as layers in eval mode: aux1.conv.conv" in report.other.reason
    assert 2 * report.total.macs_run == counted(model, x)
    assert not any("aux" in name for name in report.graph)


# ---------------------------------------------------------------- the model afterwards


def test_the_model_is_as_it_was_afterwards() -> None:
    model = halve(fxdbsr.prepare(Small(), 4)).train()
    model.get_submodule("norm").eval()
    x = torch.randn(2, 3, 9, 8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    fxdbsr.report(model, x, measure=True)
    for bad in (torch.randn(2, 4, 9, 8), torch.randn(2, 3, 9, 8).double()):
        with pytest.raises(ValueError, match="the forward of Small fails on 2x"):
            fxdbsr.report(model, bad)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(module.positions == [] for module in model.modules() if isinstance(module, Blocked))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrapped_models_are_looked_through() -> None:
    x = torch.randn(2, 3, 9, 8)
    expected = fxdbsr.report(Small(), x).to_dict()
    assert fxdbsr.report(nn.DataParallel(Small()), x).to_dict() == expected
    compiled: Any = torch.compile(Small())
    assert fxdbsr.report(compiled, x).to_dict() == expected


def test_compiled_parts_run_uncompiled_and_keep_their_names() -> None:
    model = Small()
    expected = fxdbsr.report(model, torch.randn(2, 3, 9, 8)).to_dict()
    model.stem = torch.compile(model.stem)  # type: ignore[assignment]
    assert fxdbsr.report(model, torch.randn(2, 3, 9, 8)).to_dict() == expected


@pytest.mark.filterwarnings("ignore")
def test_scripted_models_are_counted_whole() -> None:
    x = torch.randn(2, 3, 9, 8)
    report, plain = (fxdbsr.report(m, x) for m in (torch.jit.script(Small()), Small()))
    assert report.rows == []
    assert (report.total.macs, report.total.params) == (plain.total.macs, plain.total.params)
    assert "scripted modules with their layers" in report.other.reason


def test_a_part_that_is_a_prepared_graph_is_reported_under_its_path() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), halve(fxdbsr.prepare(Small(), 4)))
    report = fxdbsr.report(model, torch.randn(1, 3, 9, 8))
    assert [row.name for row in report.rows][:2] == ["0", "1.stem"]
    assert report.rows[1].blocks_total == 5


# ---------------------------------------------------------------- forms


def test_every_form_holds_the_same_figures() -> None:
    _, model, x = forms("small")[1]
    report = fxdbsr.report(model, x)
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["inputs"] == ["2x3x9x8 float32 on cpu"]
    assert "2 FLOPs" in data["convention"]
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    for key in ("macs_dense", "macs", "macs_run", "params", "bytes", "blocks_kept"):
        values = [getattr(row, key) for row in report.rows]
        assert [row[key] for row in data["rows"]] == values
        assert [int(line[key]) for line in lines[:-2]] == values
        assert sum(values) + getattr(report.other, key) == int(lines[-1][key]) == data["total"][key]
    assert data["total"]["flops_run"] == 2 * data["total"]["macs_run"]
    figures = {f["name"]: f["macs"] for _, f in report.graph.nodes(data=True) if "macs" in f}
    assert figures == {row.name: row.macs for row in report.rows}
    assert sum(line.startswith("|") for line in report.to_markdown().splitlines()) == len(report.rows) + 4


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_the_table_fits_its_width_and_ends_in_the_total(name: str) -> None:
    with torch.device("meta"):
        report = fxdbsr.report(get_model(name), torch.empty(4, 3, 224, 224))
    for width in (120, 100, 80):
        lines = report.table(width=width).splitlines()
        assert max(len(line) for line in lines) <= width
    assert "4x3x224x224" in lines[0]
    assert "batch included" in lines[0]
    text = str(report)
    assert "1 multiply-accumulate" in text
    assert "GFLOPs" in text or "FLOPs" in text
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert f"{report.total.macs / 1e9:.1f}"[:2] in total


def test_the_table_of_a_converted_model_fits_120_columns() -> None:
    model = halve(fxdbsr.prepare(torchvision.models.resnet50(), 32))
    report = fxdbsr.report(fxdbsr.convert(model, backend="reference"), torch.randn(1, 3, 64, 64))
    assert max(len(line) for line in str(report).splitlines()) <= 120
    assert re.search(r"^layer4\.0\.do\S*\.0 ", str(report), re.MULTILINE)


def test_the_table_of_a_wide_resnet_has_every_column_at_120_characters() -> None:
    model = halve(fxdbsr.prepare(torchvision.models.resnet50(), 32))
    text = fxdbsr.report(model, torch.randn(1, 3, 64, 64)).table(width=120)
    assert "not shown" not in text
    heads = next(line for line in text.splitlines() if line.startswith("layer ")).split()
    assert heads == [
        "layer",
        "kind",
        "weight",
        "output",
        "block",
        "kept",
        "zero",
        "dense",
        "kept",
        "run",
        "cut",
        "dense",
        "now",
        "bytes",
        "kernel",
    ]


def test_the_table_sorts_sums_stages_and_hides_what_did_not_change() -> None:
    _, model, x = forms("small")[1]
    report = fxdbsr.report(model, x)

    def names(text: str) -> list[str]:
        body = text.split("-\n", 1)[1].split("\n-")[0]
        return [line.split()[0] for line in body.splitlines() if not line.startswith(("other", "-"))]

    by_macs = sorted(report.rows, key=lambda row: -row.macs)
    assert names(report.table(sort="macs")) == [row.name for row in by_macs]
    assert names(report.table(sort="name")) == sorted(row.name for row in report.rows)
    changed = [row.name for row in report.rows if row.changed]
    assert names(report.table(only_changed=True)) == changed
    nested = fxdbsr.report(nn.Sequential(Small(), nn.Linear(7, 2)), x)
    assert names(nested.table(depth=1)) == ["0", "1"]
    assert "6 layers" in nested.table(depth=1)
    with pytest.raises(ValueError, match=r"sort: expected one of name, .* got 'flops'"):
        report.table(sort="flops")
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        report.table(depth=0)


def test_the_graph_follows_the_data_and_falls_back_to_modules() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y if y.sum() > 0 else -y

    x = torch.randn(2, 3, 9, 8)
    graph = fxdbsr.report(Small(), x).graph
    assert nx.has_path(graph, "stem", "fc")
    assert graph.graph["edges"] == "data"
    modules = fxdbsr.report(Branching(), x).graph
    assert modules.graph["edges"] == "children"
    assert modules.nodes["conv"]["macs"] == 2 * 9 * 8 * 9


def test_names_are_escaped_in_markdown_and_dot() -> None:
    model = nn.Sequential()
    model.add_module('<b>"x|y"\\', nn.Conv2d(3, 3, 1))
    report = fxdbsr.report(model, torch.randn(1, 3, 4, 4))
    row = next(line for line in report.to_markdown().splitlines() if "x" in line and "conv2d" in line)
    assert row.startswith('| \\<b\\>"x\\|y"\\\\ ')
    assert '\\"x|y\\"\\\\' in report.to_dot()


# ---------------------------------------------------------------- time


def test_measured_reports_have_milliseconds_for_every_layer() -> None:
    for form, model, x in forms("small")[:3]:
        report = fxdbsr.report(model, x, measure=True)
        for row in report.rows:
            assert row.ms is not None, form
            assert row.ms_dense is not None
            assert min(row.ms, row.ms_dense) > 0
            assert row.block_size or row.ms == row.ms_dense
        assert report.total.ms == pytest.approx(sum(row.ms or 0 for row in report.rows))
        assert "ms" in str(report)
    assert fxdbsr.report(Small(), x).total.ms is None


def test_counting_costs_little_beside_the_forward() -> None:
    """ResNet-152 on the meta device, where only the counting takes time."""
    with torch.device("meta"):
        model, x = get_model("resnet152"), torch.empty(1, 3, 224, 224)
    start = time.process_time()
    fxdbsr.report(model, x)
    assert time.process_time() - start < 3


# ---------------------------------------------------------------- bad input


def test_bad_input_is_refused_with_what_came() -> None:
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got str"):
        fxdbsr.report("resnet50", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a tensor or a tuple with one, got \[1, 2\]"):
        fxdbsr.report(conv, [1, 2])
    with pytest.raises(ValueError, match=r"fails on 1x4x2x2 float32 on cpu .*expected input"):
        fxdbsr.report(conv, torch.ones(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"1x3x2x2 int64 on cpu \(its parameters are float32 on cpu\)"):
        fxdbsr.report(conv, torch.ones(1, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight is not initialised yet"):
        fxdbsr.report(nn.LazyConv2d(3, 1), torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match="neither parameters nor MACs"):
        fxdbsr.report(nn.ReLU(), torch.ones(1))
    with pytest.raises(ValueError, match="expected inputs that hold values"):
        fxdbsr.report(conv.to("meta"), torch.ones(1, 3, 2, 2, device="meta"), measure=True)


def test_inputs_on_another_device_give_the_same_figures_or_are_refused() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Embedding(3, 3))
    x = torch.ones(1, 3, 2, 2)
    assert fxdbsr.report(conv, x.to("meta")).total == fxdbsr.report(conv, x).total
    with pytest.raises(ValueError, match=r"fails on 1x3x2x2 float32 on meta \(its parameters are float32 on cpu\)"):
        fxdbsr.report(norm, x.to("meta"))


def test_a_model_without_convs_has_a_report() -> None:
    report = fxdbsr.report(nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4)), torch.tensor([1, 2]))
    assert report.rows == []
    assert (report.total.params, report.total.macs) == (48, 0)
    assert "48" in str(report)


def test_an_empty_batch_has_a_report() -> None:
    report = fxdbsr.report(nn.Conv2d(3, 4, 1), torch.ones(0, 3, 2, 2))
    assert (report.total.macs_dense, report.total.params) == (0, 16)
    assert "total" in str(report)
