"""Plots of the importance scores, with what pruning kept and dropped."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from minitron.report import figure as look
from minitron.report.collect import Kept

Floats = NDArray[np.float64]

_BANDS = ((5, 95, 0.25), (25, 75, 0.5))  # low and high percentile, opacity
_LOG_RANGE = 50.0


def layer_importance(scores_L: Floats, kept: Kept) -> Figure:
    """Bar of the Block Importance of each layer, dropped layers in another colour and hatched."""
    num_layers, num_kept = len(scores_L), len(kept.layers)
    figure = look.new_figure(3.6, f"Layers: {_ratio(num_kept, num_layers)}")
    axes = figure.subplots()
    is_kept = _mask(kept.layers, num_layers)
    numbers = np.arange(num_layers)
    axes.bar(numbers[is_kept], scores_L[is_kept], color=look.KEPT, width=0.75, label="kept")
    if num_kept < num_layers:
        gone = ~is_kept
        axes.bar(numbers[gone], scores_L[gone], color=look.DROPPED, hatch="///", edgecolor="white", label="dropped")
    look.tidy(axes, "layer", "Block Importance\n1 - cos(input, output)")
    look.unit_axis(axes, num_layers)
    _log_if_wide(axes, scores_L)
    look.legend(axes, columns=2)
    return figure


def hidden_importance(scores_H: Floats, kept: Kept) -> Figure:
    """Scores of all channels in falling order, and where the cut is."""
    num_hidden, num_kept = len(scores_H), len(kept.hidden)
    figure = look.new_figure(3.6, f"Hidden channels: {_ratio(num_kept, num_hidden)}")
    axes = figure.subplots()
    order = np.argsort(-scores_H, kind="stable")
    is_kept = _mask(kept.hidden, num_hidden)[order]
    ranks, ranked = np.arange(1, num_hidden + 1), scores_H[order]
    axes.plot(ranks[is_kept], ranked[is_kept], "o", markersize=2.5, color=look.KEPT, label="kept")
    if num_kept < num_hidden:
        axes.plot(ranks[~is_kept], ranked[~is_kept], "x", markersize=3.5, color=look.DROPPED, label="dropped")
    if is_kept[:num_kept].all() and num_kept < num_hidden:  # not so for a random choice
        axes.axvline(num_kept + 0.5, color=look.INK, linestyle="--", linewidth=1.2, label=f"cut after {num_kept}")
    look.tidy(axes, "channels, most important first", "importance score")
    axes.set_xlim(0, num_hidden + 1)
    _log_if_wide(axes, scores_H)
    look.legend(axes, columns=3)
    return figure


def ffn_importance(scores_LF: Floats, kept: Kept) -> Figure:
    """Bands of the neurons' scores in each layer, and the lowest score that was kept."""
    num_layers, num_neurons = scores_LF.shape
    num_kept = len(kept.ffn[0])
    figure = look.new_figure(3.9, f"Ffn neurons of each layer: {_ratio(num_kept, num_neurons)}")
    axes = figure.subplots()
    numbers = np.arange(num_layers)
    for low, high, alpha in _BANDS:
        bottom, top = np.percentile(scores_LF, [low, high], axis=1)
        label = f"{low}th to {high}th percentile"
        axes.bar(numbers, top - bottom, bottom=bottom, width=0.8, color=look.BLUE, alpha=alpha, label=label)
    axes.plot(numbers, np.median(scores_LF, axis=1), "_", markersize=9, color=look.INK, label="median")
    if num_kept < num_neurons:
        lowest = [scores_LF[layer, units].min() for layer, units in zip(kept.layers, kept.ffn, strict=True)]
        axes.plot(kept.layers, lowest, "v", markersize=5, color=look.RED, label="lowest kept")
    _shade_dropped_layers(axes, kept, num_layers)
    look.tidy(axes, "layer", "importance score")
    look.unit_axis(axes, num_layers)
    _log_if_wide(axes, np.percentile(scores_LF, [5, 95], axis=1))
    look.legend(axes, columns=5)
    return figure


def head_importance(scores_LN: Floats, kept: Kept) -> Figure:
    """Heat map of heads over layers, kept heads dotted and dropped layers hatched."""
    num_layers, num_heads = scores_LN.shape
    num_kept = len(kept.heads[0])
    height = min(7.5, max(3.2, 1.7 + 0.22 * num_heads))
    figure = look.new_figure(height, f"Query heads of each layer: {_ratio(num_kept, num_heads)}")
    axes = figure.subplots()
    highest = scores_LN.max(axis=1, keepdims=True)
    relative = np.divide(scores_LN, highest, out=np.zeros_like(scores_LN), where=highest > 0)
    image = axes.imshow(relative.T, aspect="auto", cmap=look.PALE_TO_BLUE, vmin=0, vmax=1, interpolation="nearest")
    if num_kept < num_heads:
        spots = [(layer, head) for layer, heads in zip(kept.layers, kept.heads, strict=True) for head in heads]
        radius = float(np.clip(200 / max(num_layers, 2.0 * num_heads), 1.5, 5))
        (dots,) = axes.plot(*zip(*spots, strict=True), "o", markersize=radius, color=look.ORANGE, label="kept head")
        dots.set(markeredgecolor=look.INK, markeredgewidth=0.5)
    _shade_dropped_layers(axes, kept, num_layers)
    look.tidy(axes, "layer", "query head")
    axes.grid(visible=False)
    look.unit_axis(axes, num_layers)
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("score / highest in layer", fontsize=10)
    bar.ax.tick_params(labelsize=9)
    look.legend(axes, columns=2)
    return figure


def _shade_dropped_layers(axes: Axes, kept: Kept, num_layers: int) -> None:
    style: dict[str, Any] = {"facecolor": "#FFFFFF99", "edgecolor": look.GREY, "hatch": "///", "linewidth": 0}
    for i, layer in enumerate(np.flatnonzero(~_mask(kept.layers, num_layers))):
        axes.axvspan(layer - 0.5, layer + 0.5, label=None if i else "dropped layer", **style)


def _mask(units: list[int], size: int) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.bool_)
    mask[units] = True
    return mask


def _ratio(num_kept: int, size: int) -> str:
    if num_kept == size:
        return f"all {size} kept"
    return f"{num_kept} of {size} kept"


def _log_if_wide(axes: Axes, scores: Floats) -> None:
    """A logarithmic axis where the scores span orders of magnitude."""
    if scores.min() > 0 and scores.max() / scores.min() > _LOG_RANGE:
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
    else:
        axes.set_ylim(bottom=min(0.0, float(scores.min())))
