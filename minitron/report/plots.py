"""The plots of a report: losses over tokens, importance, wall times."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from minitron.report import figure as look
from minitron.report.collect import Kept
from minitron.report.data import ReportData, Role, TrainingCurve
from minitron.report.format import duration, nats
from minitron.report.importance import ffn_importance, head_importance, hidden_importance, layer_importance
from minitron.report.scores import depth_curves

_MOST_MARKERS = 60
_TIME_UNITS = (("h", 3600), ("min", 60), ("s", 1))


def all_figures(data: ReportData, kept: Kept, importance: Mapping[str, NDArray[np.float64]]) -> dict[str, Figure]:
    """Every plot by the name of its file; an axis without scores has none.

    Args:
        data: The numbers.
        kept: What pruning kept.
        importance: Scores of the source: ``layer`` [L], ``hidden`` [H], ``ffn`` [L, F], ``head`` [L, N], and what
            else `minitron.report.scores` draws of them.
    """
    figures = {"losses": loss_curves(data)}
    for axis, draw in (
        ("layer", layer_importance),
        ("hidden", hidden_importance),
        ("ffn", ffn_importance),
        ("head", head_importance),
    ):
        if axis in importance:
            figures[f"importance_{axis}"] = draw(np.asarray(importance[axis], dtype=np.float64), kept)
    if any(" " in name for name in importance):  # measured by taking layers out
        figures["importance_depth"] = depth_curves(importance)
    figures["stages"] = stage_times(data)
    return figures


def loss_curves(data: ReportData) -> Figure:
    """Held-out loss over training tokens above, the training objectives below."""
    figure = look.new_figure(6.6, "Retraining: loss against tokens")
    heldout, training = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    curves = [(Role.distilled, data.distill, look.BLUE, "o", "-")]
    if data.baseline is not None:
        curves.append((Role.baseline, data.baseline, look.ORANGE, "s", "--"))
    for role, curve, colour, marker, line in curves:
        label = f"{role.label} ({nats(data.row(role).loss)})"
        heldout.plot(curve.heldout_tokens, curve.heldout_loss, line, marker=marker, color=colour, label=label)
        _training_line(training, curve, colour, line)
    for role, colour, line in ((Role.teacher, look.GREEN, "-."), (Role.pruned, look.INK, ":")):
        label = f"{role.label}{', not retrained' if role is Role.pruned else ''} ({nats(data.row(role).loss)})"
        heldout.axhline(data.row(role).loss, color=colour, linestyle=line, linewidth=1.6, label=label)
    look.tidy(heldout, "", "held-out loss\n(nats/token)")
    look.tidy(training, "tokens trained on", "training loss\n(nats/token)")
    training.set_ylim(bottom=0)
    training.set_xlim(left=0)
    look.token_axis(training)
    look.legend(training, columns=2)
    look.legend(heldout, columns=2)
    return figure


def _training_line(axes: Axes, curve: TrainingCurve, colour: str, line: str) -> None:
    few = len(curve.tokens) <= _MOST_MARKERS
    axes.plot(curve.tokens, curve.loss, line, color=colour, label=curve.objective, linewidth=1.4)
    if few:
        axes.plot(curve.tokens, curve.loss, ".", color=colour, markersize=4)


def stage_times(data: ReportData) -> Figure:
    """Wall time of every stage, the first at the top."""
    figure = look.new_figure(0.9 + 0.3 * len(data.stages), f"Wall time per stage, {_total(data)} in all")
    axes = figure.subplots()
    longest_s = max(stage.seconds for stage in data.stages)
    unit, unit_s = next((unit, size) for unit, size in _TIME_UNITS if longest_s >= 2 * size or size == 1)
    bars = axes.barh(
        [stage.name for stage in data.stages],
        [stage.seconds / unit_s for stage in data.stages],
        color=look.BLUE,
        height=0.65,
    )
    axes.bar_label(bars, [duration(stage.seconds) for stage in data.stages], padding=4, fontsize=9, color=look.INK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    look.tidy(axes, f"wall time ({unit})", "", grid="x")
    return figure


def _total(data: ReportData) -> str:
    return duration(sum(stage.seconds for stage in data.stages))


def captions(data: ReportData) -> dict[str, str]:
    """What each plot shows, for the page and for readers without the picture."""
    sizes = data.prune
    return {
        "losses": _loss_caption(data),
        "importance_layer": "Block Importance of each layer, 1 - cos(input, output): how much it turns the residual "
        "stream. Low values make a layer a candidate for dropping.",
        "importance_depth": "Every depth metric that was measured, over the layers; higher is more important. A block "
        "of contiguous layers stands at its first.",
        "importance_hidden": f"Scores of the {sizes.source.hidden_size} channels of the residual stream, sorted. One "
        f"choice holds for the whole network, so that residual connections line up.",
        "importance_ffn": f"Spread of the scores of each layer's {sizes.source.ffn_hidden_size} ffn neurons. "
        "They are ranked within a layer, so levels of different layers need not be compared.",
        "importance_head": "Scores of the query heads, each relative to the highest in its layer. Heads compete inside "
        f"their query group ({sizes.source.heads_per_group} heads each), for a group shares its keys and values.",
        "stages": "Wall time as each stage recorded it.",
    }


def _loss_caption(data: ReportData) -> str:
    text = (
        "Above: cross-entropy on held-out text, the same measure for all models. Points during training use "
        "distill.train.eval_tokens held-out tokens, the lines and the numbers in the legend (as in the table) "
        f"{data.row(Role.distilled).num_tokens:,}, so the last point may differ a little. Below: what each training "
        "run minimises"
    )
    return text + ("; the two are different quantities." if data.baseline else ".")
