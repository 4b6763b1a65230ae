"""One look for all plots: size, palette, axes.

No pyplot: every plot is a `Figure` of its own, so nothing is left open and no display is asked for.
"""

import io

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

WIDTH_IN = 9.0
DPI = 200  # 1800 px wide: sharp when shown at 900 px on a dense screen

# Okabe and Ito's palette; told apart with any colour vision, and each is paired with a shape or a hatch.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, GREY, PALE = "#222222", "#777777", "#D9D9D9"
KEPT, DROPPED = BLUE, RED
PALE_TO_BLUE = LinearSegmentedColormap.from_list("pale_to_blue", ["#F4F7FA", "#9CC5E3", "#0072B2", "#06304D"])


def new_figure(height_in: float, title: str) -> Figure:
    """A white figure of the common width."""
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    return figure


def tidy(axes: Axes, xlabel: str, ylabel: str, *, grid: str = "y") -> None:
    """Label the axes, with a pale grid behind the data along ``grid``."""
    axes.set_xlabel(xlabel, fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis=grid, color=PALE, linewidth=0.7)  # type: ignore[arg-type]


def token_axis(axes: Axes) -> None:
    """Write tokens as ``200k``."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def unit_axis(axes: Axes, num_units: int) -> None:
    """Whole unit numbers, with room for the outermost."""
    axes.set_xlim(-0.6, num_units - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))


def legend(axes: Axes, columns: int) -> None:
    """A legend between title and plot, where it hides nothing; none where nothing has a label."""
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=9, frameon=False, markerscale=1.3
    )


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
