"""The poster's figure with our runs: error against the parameters and the MACs that are left.

`python -m bench.accuracy publish` draws it into docs/images.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.accuracy_records import Record
from bench.accuracy_table import Group, groups

POSTER = Path(__file__).parent / "data" / "poster_curves.json"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
FINE_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 40, 50, 70, 90)  # where the axis is short
LABELS = {
    "scaled": "fxdbsr (scaled gradual)",
    "gradual": "gradual block pruning, global",
    "gradual_layer": "gradual block pruning, by layer",
    "once": "one-shot block pruning, global",
    "once_layer": "one-shot block pruning, by layer",
    "clamp": "the authors' form (clamp, penalty)",
    "proximal": "penalty as a proximal step",
    "channels": "channels, Torch-Pruning, gradual",
    "channels_once": "channels, Torch-Pruning, one-shot",
    "slim": "smaller dense net",
}


def draw(records: Sequence[Record], png: Path, title: str, poster: bool) -> None:
    """Write the figure: our runs, below them the poster's curves; MACs on the left, parameters on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 9.5 if poster else 4.8
    figure, axes = pyplot.subplots(1 + poster, 2, figsize=(12, height), layout="constrained", squeeze=False)
    found = groups(records)
    for axis, key, what in zip(axes[0], ("macs", "params"), ("MACs", "parameters"), strict=True):
        draw_runs(axis, found, f"sparsity_{key}")
        axis.set(
            title=title, xlabel=f"{what} left in the blocked convs", ylabel="error on the test images, %, log scale"
        )
        scale_errors(axis, found)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 1].legend(handles, labels, fontsize=8)
    if poster:
        curves = json.loads(POSTER.read_text())
        draw_poster(axes[1, 0], curves, "macs")
        draw_poster(axes[1, 1], curves, "params")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1.03)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def draw_runs(axis: Any, found: Sequence[Group], key: str) -> None:
    """One line an arm: means over the seeds, bars of one standard deviation, means of the fraction that is left."""
    from matplotlib import pyplot

    for group in found:
        if group.name == "dense":
            axis.axhline(100 - group.mean(), color="black", linestyle="--", linewidth=1, label="dense")
    by_arm: dict[str, list[Group]] = defaultdict(list)
    for group in found:
        by_arm[group.name.split(" ")[0]].append(group)
    colours = pyplot.get_cmap("tab10")
    for number, (arm, label) in enumerate(LABELS.items()):
        points = sorted((1 - g.mean(key), 100 - g.mean(), g.deviation()) for g in by_arm.get(arm, []))
        if points:
            x, y, spread = zip(*points, strict=True)
            style = {"linewidth": 2.2, "marker": "o"} if arm == "scaled" else {"linewidth": 1.2, "marker": "."}
            axis.errorbar(x, y, yerr=spread, label=label, color=colours(number), capsize=2, **style)


def scale_errors(axis: Any, found: Sequence[Group]) -> None:
    """A logarithmic axis around the means; bars that reach further down, to 0 it may be, are cut off there."""
    from matplotlib import ticker

    means = [100 - group.mean() for group in found]
    tops = [mean + group.deviation() for mean, group in zip(means, found, strict=True)]
    low = min((mean for mean in means if mean > 0), default=1.0) / 1.5
    high = max(2 * low, *(1.1 * top for top in (*means, *tops) if not math.isnan(top)))
    ticks = FINE_TICKS if high < 30 * low else TICKS
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(ticker.FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def draw_poster(axis: Any, curves: dict[str, Any], key: str) -> None:
    """The poster's curves that have values of `key`."""
    names = {"vgg11_cifar100_32x32": "VGG11, blocks 32x32", "resnet20_cifar100_8x8": "ResNet-20, blocks 8x8"}
    for (model, name), colour in zip(names.items(), ("tab:blue", "tab:orange"), strict=True):
        if key not in curves[model]["dbsr"][0]:
            continue
        for arm, line in (("dbsr", "o-"), ("block_pruning", ".--")):
            points = sorted((p[key], p["error"]) for p in curves[model][arm])
            axis.plot(*zip(*points, strict=True), line, color=colour, label=f"{name}, {arm.replace('_', ' ')}")
        axis.axhline(curves[model]["dense_error"], color=colour, linestyle=":", linewidth=1, label=f"{name}, dense")
    what = {"macs": "MACs", "params": "parameters"}[key]
    axis.set(title="The poster, CIFAR-100 (read off its plots)", xlabel=f"{what} left", ylabel="top-1 error, %")
    axis.legend(fontsize=8)
