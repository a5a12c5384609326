"""`Report`: the rows, their total, and every form in which they are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

import networkx as nx
from torch import Tensor

from fxdbsr.files import as_path, check_writable, write
from fxdbsr.reporting.drawing import draw, to_dot
from fxdbsr.reporting.outline import outline
from fxdbsr.reporting.page import page
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.reporting.table import markdown, text

CONVENTION = "1 MAC is 1 multiply-accumulate, 2 FLOPs; convs, linear layers and matrix products count, no biases"


@dataclass(frozen=True)
class Report:
    """What a model costs on given inputs; `str()` is the table.

    Attributes:
        model: its class.
        inputs: shape, dtype and device of every input tensor, batch included.
        rows: one for each conv and linear layer that ran, in the order of the first calls.
        other: everything else: attention products and projections, norms, embeddings.
        total: the sum of `rows` and `other`.
        graph: the traced eval graph; nodes carry the figures of their rows.
        masks: `[rows, columns]` bool by the layer's name, False where a block is zero.
        untraced: why parts of the model are in no graph, by their names; "" is the model itself.
    """

    model: str
    inputs: tuple[str, ...]
    rows: list[LayerRow]
    other: LayerRow
    total: LayerRow
    graph: nx.DiGraph[str]
    masks: dict[str, Tensor]
    untraced: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.table()

    def table(
        self,
        sort: str | None = None,
        depth: int | None = None,
        only_changed: bool = False,
        width: int = 120,
    ) -> str:
        """The report as text.

        Args:
            sort: a field of `LayerRow`, or "saved"; figures with the largest first.
            depth: sum the layers that agree in so many parts of their names.
            only_changed: leave out layers that have no zero block.
            width: characters of a line; columns that do not fit are left out, and named below the table.

        Raises:
            ValueError: an unknown field, a depth or a width below 1. TypeError: one that is no int.
        """
        return text(self, sort, depth, only_changed, width)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph and the masks, in plain types."""
        return {
            "model": self.model,
            "inputs": list(self.inputs),
            "convention": CONVENTION,
            "untraced": self.untraced,
            "rows": [row.to_dict() for row in self.rows],
            "other": self.other.to_dict(),
            "total": self.total.to_dict(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_csv(self) -> str:
        """One line a row, then `other` and `total`; shapes as 64x3x7x7, times in ms, bytes in bytes."""
        out = io.StringIO()
        names = [known.name for known in fields(LayerRow)]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in [*self.rows, self.other, self.total]:
            values = (getattr(row, name) for name in names)
            writer.writerow("x".join(map(str, v)) if isinstance(v, tuple) else v for v in values)
        return out.getvalue()

    def to_markdown(self) -> str:
        """The table for Markdown, with every column."""
        return markdown(self)

    def to_html(self, history: Sequence[Mapping[str, Any]] = ()) -> str:
        """A page that needs no other file: totals, graph, sortable table, a picture of each layer's blocks.

        Args:
            history: of the training, one mapping an epoch or step, such as the lines that `fxdbsr train` writes:
                every key with figures gets a curve over "step" or "epoch".

        Raises:
            TypeError: `history` is no sequence of mappings.
        """
        return page(self, history)

    def save_html(self, path: str | PathLike[str], history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `to_html(history)` to `path`.

        Raises:
            OSError: it cannot be written. TypeError: it is no path, or `history` no sequence of mappings.
        """
        check_writable(path)
        write(path, self.to_html(history))

    def to_dot(self, whole: bool = True) -> str:
        """The graph for Graphviz: every node of the traced model, or an outline of the layers and where they meet."""
        return to_dot(self.graph if whole else outline(self.graph))

    def save_graph(self, path: str | PathLike[str], engine: str = "auto") -> str:
        """Draw the outline of the graph: layers blue where MACs are saved, larger the more MACs the dense ones have.

        Args:
            path: a name that ends in .svg, .png or .pdf.
            engine: "graphviz" (its program `dot`), "matplotlib", or "auto": Graphviz where it is installed and
                the outline has at most 1,500 nodes, else matplotlib.

        Returns:
            The engine that drew it.

        Raises:
            ValueError: an unknown suffix or engine; more nodes than a PNG can show.
            ImportError: the engine, or with "auto" both, are not installed.
            OSError: it cannot be written. TypeError: it is no path.
            RuntimeError: Graphviz failed or took more than a minute.
        """
        return draw(self.graph, as_path(path), engine)
