"""Write the report of a run: ``report.html``, the plots beside it, and ``report.json``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minitron.report.collect import collect, read_kept
from minitron.report.data import HTML_FILE, JSON_FILE, ReportData
from minitron.report.figure import png_bytes
from minitron.report.html import render_html
from minitron.report.plots import all_figures
from minitron.runtime.artefact import RunFolder, storage_error, write_json


def write_report(
    run: RunFolder, out_dir: Path, importance: Mapping[str, NDArray[np.float64]], resolved_yaml: str
) -> ReportData:
    """Collect the numbers of a run and write its report.

    Args:
        run: The run, or one step of a chain, with all stages before the report.
        out_dir: Where to write; as a stage, its working folder.
        importance: Scores of the source model that pruning ranked by: ``layer`` [L] (Block Importance), ``hidden``
            [H], ``ffn`` [L, F], ``head`` [L, N]. An axis that is left out gets no plot.
        resolved_yaml: The run's whole configuration, for the page.

    Returns:
        The numbers, as in ``report.json``.

    Raises:
        ArtefactError: A stage is missing or unreadable, or ``out_dir`` cannot be written.
    """
    data = collect(run)
    figures = all_figures(data, read_kept(run), importance)
    plots = {name: png_bytes(figure) for name, figure in figures.items()}
    page = render_html(data, plots, resolved_yaml)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, png in plots.items():
            (out_dir / f"{name}.png").write_bytes(png)
        (out_dir / HTML_FILE).write_text(page, encoding="utf-8")
        write_json(out_dir / JSON_FILE, data.to_dict())
    except OSError as error:
        raise storage_error(error, out_dir) from error
    return data
