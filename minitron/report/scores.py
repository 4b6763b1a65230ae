"""Plots of the scores by themselves, before anything is pruned: a heat map for each axis, and a curve over the depth.

An array's name says what it is: ``ffn`` [L, F], ``head`` [L, N], ``group`` [L, G] and ``hidden_norms`` [norms, H]
become heat maps; ``layer`` [L] (Block Importance) and ``<metric> <size>`` (of blocks of so many layers, by their first
layer) curves.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from minitron.report import figure as look
from minitron.runtime.artefact import storage_error

Arrays = Mapping[str, NDArray[np.float64]]

_HEAT_MAPS = {
    "ffn": ("Ffn neurons", "neurons, most important first", "layer"),
    "head": ("Query heads", "query head", "layer"),
    "group": ("Query groups", "query group", "layer"),
    "hidden_norms": (
        "Hidden channels",
        "channels, most important over all norms first",
        "norm, the final one last",
    ),
}
_METRICS = {
    "block_importance": "Block Importance\n1 - cos(input, output)",
    "loss": "loss without the layers\n(nats/token)",
    "logit_mse": "squared logit difference\nwithout the layers",
    "accuracy": "share of wrong answers\nwithout the layers",
}
_COLOURS = (look.BLUE, look.ORANGE, look.GREEN, look.RED, look.INK)
_MARKERS = "os^Dv"
_DECADES = 2.0
"""The palest colour stands for a score this many powers of ten below the highest."""


def write_score_plots(arrays: Arrays, folder: Path) -> list[str]:
    """Draw all there is to draw.

    Args:
        arrays: The scores, by name.
        folder: Where to write.

    Returns:
        Names of the PNG files.
    """
    names = []
    for name, figure in score_figures(arrays).items():
        path = folder / f"{name}.png"
        try:
            path.write_bytes(look.png_bytes(figure))
        except OSError as error:
            raise storage_error(error, path) from error
        names.append(path.name)
    return names


def score_figures(arrays: Arrays) -> dict[str, Figure]:
    """Every plot by the name of its file."""
    figures = {f"scores_{name}": heat_map(name, arrays[name]) for name in _HEAT_MAPS if name in arrays}
    return figures | {"scores_depth": depth_curves(arrays)}


def heat_map(name: str, scores_RU: NDArray[np.float64]) -> Figure:
    """Scores of units (across) in layers or norms (down), each relative to the highest of its row.

    Args:
        name: The axis.
        scores_RU: The scores.
    """
    title, across, down = _HEAT_MAPS[name]
    highest = scores_RU.max(axis=1, keepdims=True)
    relative = np.divide(scores_RU, highest, out=np.zeros_like(scores_RU), where=highest > 0)
    if name == "ffn":
        relative = -np.sort(-relative, axis=1)
    elif name == "hidden_norms":
        relative = relative[:, np.argsort(-scores_RU.sum(axis=0), kind="stable")]
    figure = look.new_figure(min(8.0, 2.2 + 0.12 * len(relative)), f"{title}: importance scores")
    axes = figure.subplots()
    decades = np.log10(np.maximum(relative, 10**-_DECADES))
    image = axes.imshow(decades, aspect="auto", cmap=look.PALE_TO_BLUE, vmin=-_DECADES, vmax=0, interpolation="nearest")
    look.tidy(axes, across, down)
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[-2, -1, 0])
    bar.ax.set_yticklabels(["1/100", "1/10", "1"])
    bar.set_label("score / highest in row", fontsize=10)
    return figure


def depth_curves(arrays: Arrays) -> Figure:
    """The importance of layers and blocks over the depth, a panel for each metric."""
    panels: dict[str, list[tuple[int, NDArray[np.float64]]]] = {"block_importance": [(1, arrays["layer"])]}
    for name, values in arrays.items():
        metric, _, size = name.partition(" ")
        if size:
            panels.setdefault(metric, []).append((int(size), values))
    figure = look.new_figure(1.0 + 2.2 * len(panels), "Importance of layers")
    all_axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axes, (metric, curves) in zip(all_axes, panels.items(), strict=True):
        _panel(axes, curves)
        look.tidy(axes, "", _METRICS[metric])
        look.unit_axis(axes, len(arrays["layer"]))
        look.legend(axes, columns=len(curves))
    all_axes[-1].set_xlabel("layer; of a block, its first", fontsize=10, color=look.INK)
    return figure


def _panel(axes: Axes, curves: list[tuple[int, NDArray[np.float64]]]) -> None:
    for place, (size, values) in enumerate(sorted(curves, key=lambda curve: curve[0])):
        label = "one layer" if size == 1 else f"{size} contiguous layers"
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        axes.plot(np.arange(len(values)), values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    lowest = min(values.min() for _, values in curves)
    if lowest > 0 and max(values.max() for _, values in curves) > 50 * lowest:
        axes.set_yscale("log")
