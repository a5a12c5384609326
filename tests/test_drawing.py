"""The drawn graph: what its outline holds, its colours and sizes, its engines, and graphs of 10,000 nodes."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.reporting import drawing
from fxdbsr.reporting.diagram import diagram
from fxdbsr.reporting.outline import label, outline, places, share

ENGINES = [
    pytest.param("graphviz", marks=pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")),
    "matplotlib",
]


class Residual(nn.Module):
    """A chain with a shortcut, norms and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return F.relu(self.b(x) + x) * self.shift


def chain(length: int) -> nx.DiGraph[str]:
    """A graph like that of a report, every other node a layer, with a shortcut at every tenth."""
    graph: nx.DiGraph[str] = nx.DiGraph(edges="data")
    for i in range(length):
        figures: dict[str, object] = {"name": f"layer{i}", "op": "call_module", "operation": "ReLU"}
        if i % 2 == 0:
            figures |= {"kind": "conv2d", "macs": i, "macs_dense": 2 * i, "saved": 0.5}
        graph.add_node(f"n{i}", **figures)
        if i:
            graph.add_edge(f"n{i - 1}", f"n{i}")
        if i >= 10 and i % 10 == 0:
            graph.add_edge(f"n{i - 10}", f"n{i}")
    return graph


def test_the_outline_holds_layers_and_joins_and_tells_what_follows_them() -> None:
    report = fxdbsr.report(Residual(), torch.ones(1, 4, 5, 5))
    small = outline(report.graph)
    assert list(small) == ["x", "a", "b", "add", "output"]
    assert small.nodes["a"]["follows"] == ["BatchNorm2d", "relu"]
    assert small.nodes["add"]["follows"] == ["relu", "mul"]
    assert label(small.nodes["add"]) == ["add + relu + mul"]
    assert label(small.nodes["x"]) == ["x"]
    assert set(small.edges) == {("x", "a"), ("a", "b"), ("a", "add"), ("b", "add"), ("add", "output")}
    assert report.graph.nodes["shift"]["op"] == "get_attr"


def test_every_layer_of_a_resnet50_is_in_the_outline_with_its_figures() -> None:
    with torch.device("meta"):
        report = fxdbsr.report(torchvision.models.resnet50(), torch.empty(1, 3, 224, 224))
    small = outline(report.graph)
    drawn = {f["name"]: f["macs"] for _, f in small.nodes(data=True) if "kind" in f}
    assert drawn == {row.name: row.macs for row in report.rows}
    assert sum(f["operation"] == "iadd" for _, f in small.nodes(data=True)) == 16
    assert len(small) == 54 + 16 + 2


def test_no_two_nodes_are_drawn_in_one_place_and_data_flows_down() -> None:
    for name in ("googlenet", "densenet121", "swin_t"):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, **({"init_weights": False} if name == "googlenet" else {}))
            graph = outline(fxdbsr.report(model, torch.empty(1, 3, 224, 224)).graph)
        found = places(graph)
        assert len(set(found.values())) == len(graph)
        assert all(found[source][0] < found[target][0] for source, target in graph.edges)


def test_colour_tells_what_was_saved_and_size_the_dense_macs() -> None:
    model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3)), 4)
    blocked_layers(model)[1].mask[:2] = False
    report = fxdbsr.report(model, torch.ones(1, 8, 9, 9))
    sizes = share(report.graph)
    first, second = (row.macs_dense for row in report.rows)
    assert list(sizes.values()) == [first / second, 1.0]
    dot = report.to_dot()
    assert f'fillcolor="{drawing.colour(0)}"' in dot
    assert f'fillcolor="{drawing.colour(0.5)}", width=3.00, height=1.40' in dot
    assert "50% saved" in dot
    svg = diagram(outline(report.graph), {row.name: i for i, row in enumerate(report.rows)})
    boxes = ElementTree.fromstring(svg).findall(".//g[@class='layer']")
    assert [box.get("style") for box in boxes] == ["--saved:0.0%", "--saved:50.0%"]
    heights = [float(rect.get("height", "0")) for box in boxes for rect in box.findall("rect")]
    assert heights[0] < heights[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_draws_each_format(engine: str, tmp_path: Path) -> None:
    report = fxdbsr.report(fxdbsr.prepare(Residual(), 4), torch.ones(1, 4, 5, 5))
    assert report.save_graph(tmp_path / "g.svg", engine) == engine
    svg = (tmp_path / "g.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "BatchNorm2d" in text
    assert "MACs" in text
    report.save_graph(tmp_path / "g.png", engine)
    image = Image.open(tmp_path / "g.png")
    assert image.format == "PNG"
    assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 4
    report.save_graph(tmp_path / "g.pdf", engine)
    assert (tmp_path / "g.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == 3


def test_auto_takes_graphviz_where_it_is_and_matplotlib_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fxdbsr.report(Residual(), torch.ones(1, 4, 5, 5))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert report.save_graph(tmp_path / "g.svg") == "matplotlib"
    with pytest.raises(ImportError, match="dot is not installed"):
        report.save_graph(tmp_path / "g.svg", "graphviz")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="needs Graphviz's program dot, or matplotlib"):
        report.save_graph(tmp_path / "h.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["g.svg"]


@pytest.mark.parametrize("engine", ENGINES)
def test_names_are_escaped_in_drawings(engine: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module('<b>"x"\\ $1$', nn.Conv2d(3, 3, 1))
    fxdbsr.report(model, torch.ones(1, 3, 2, 2)).save_graph(tmp_path / "g.svg", engine)
    text = "".join(ElementTree.fromstring((tmp_path / "g.svg").read_text()).itertext())
    assert '<b>"x"\\ $1$' in text


def test_bad_paths_and_engines_are_refused(tmp_path: Path) -> None:
    report = fxdbsr.report(nn.Conv2d(3, 3, 1), torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.svg, \.png or \.pdf, got 'g\.bmp'"):
        report.save_graph("g.bmp")
    with pytest.raises(ValueError, match="engine: expected one of auto, graphviz, matplotlib, got 'ink'"):
        report.save_graph("g.svg", "ink")
    with pytest.raises(OSError, match="No such file"):
        report.save_graph(tmp_path / "none" / "g.svg")


def test_a_graph_of_ten_thousand_nodes_is_drawn_in_linear_time_and_refused_as_png(tmp_path: Path) -> None:
    graph = chain(10_000)
    start = time.process_time()
    small = outline(graph)
    assert len(small) == 5_000
    assert len(diagram(small, {})) < 3_000_000
    assert drawing.to_dot(graph).count("->") == graph.number_of_edges()
    assert time.process_time() - start < 5
    with pytest.raises(ValueError, match="the graph has 5,000 nodes, too many for a PNG"):
        drawing.draw(graph, tmp_path / "g.png")


def test_graphs_too_large_for_dot_are_drawn_by_matplotlib(tmp_path: Path) -> None:
    assert drawing.draw(chain(2 * drawing.DOT_NODES + 2), tmp_path / "g.svg") == "matplotlib"
    assert io.BytesIO((tmp_path / "g.svg").read_bytes()).read(5) == b"<?xml"


def test_a_model_that_cannot_be_traced_is_drawn_as_a_list_of_its_modules(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if y.sum() > 0 else -y

    report = fxdbsr.report(Branching(), torch.ones(1, 3, 2, 2))
    assert list(places(outline(report.graph)).values()) == [(0, 0), (1, 1), (2, 2), (3, 2)]
    report.save_graph(tmp_path / "g.svg")
    assert "these are its modules" in report.to_html()
