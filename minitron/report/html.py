"""The report as one HTML page that needs nothing else: styles inline, plots embedded, no scripts."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

import jinja2

import minitron
from minitron.report import format as fmt
from minitron.report.data import PruneResult, ReportData, Role
from minitron.report.plots import captions

TEMPLATE = "report.html.j2"

# Characters that HTML does not allow in text; a byte-level tokenizer can produce them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

_AXES = (
    ("layers", "num_layers"),
    ("hidden channels", "hidden_size"),
    ("ffn neurons per layer", "ffn_hidden_size"),
    ("query heads per layer", "num_attention_heads"),
    ("query groups per layer", "num_query_groups"),
    ("experts per layer", "num_moe_experts"),
    ("channels per head", "kv_channels"),
    ("vocabulary", "vocab_size"),
)


def render_html(data: ReportData, plots: Mapping[str, bytes], resolved_yaml: str) -> str:
    """Fill the template.

    Args:
        data: The numbers.
        plots: PNGs by name, as `minitron.report.plots.all_figures` names them.
        resolved_yaml: The run's whole configuration.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "nats", "perplexity", "share", "power", "duration", "size"):
        environment.filters[name] = getattr(fmt, name)
    environment.filters["printable"] = _printable
    return environment.get_template(TEMPLATE).render(
        data=data,
        plots={name: base64.b64encode(png).decode("ascii") for name, png in plots.items()},
        captions=captions(data),
        teacher=data.row(Role.teacher),
        pruned=data.row(Role.pruned),
        distilled=data.row(Role.distilled),
        control=data.result(Role.baseline),
        axes=_axis_rows(data.prune),
        snippet=load_snippet(data.export_path),
        total_seconds=sum(stage.seconds for stage in data.stages),
        resolved_yaml=resolved_yaml,
        version=minitron.__version__,
    )


def load_snippet(folder: Path) -> str:
    """Three lines of Python that load the exported folder."""
    where = repr(str(folder.resolve()))
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({where})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})"
    )


def _axis_rows(prune: PruneResult) -> list[tuple[str, int, int, float, float | None]]:
    """Name, size before, size after, share kept and share of the scores kept of each axis that the model has."""
    rows = [(name, key, getattr(prune.source, key), getattr(prune.target, key)) for name, key in _AXES]
    rows = [row for row in rows if row[2] is not None]
    return [(name, before, after, after / before, prune.score_kept.get(key)) for name, key, before, after in rows]


def _printable(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)
