"""The plan of a run on the terminal."""

import math
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from minitron.config.gpus import GPUS
from minitron.config.run import RunConfig
from minitron.models.axes import num_active_parameters, num_embedding_parameters, num_parameters
from minitron.plan.memory import StageMemory
from minitron.plan.trainings import Plan, PlannedPass
from minitron.report import format as fmt
from minitron.report.cost import six_nd

_GB = 1e9
_GPUS_PER_NODE = 8
_ITEMS = {
    "parameters": "parameters",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer (this rank's share)",
    "activations": "activations in flight",
    "teacher": "teacher's parameters",
    "stash": "teacher's states that wait",
    "loss": "logits chunks, loss",
    "fp8_weights": "FP8 copies of weights",
    "total": "total",
}
"""Lines of the memory tables; one that is 0 on every stage is left out."""


def print_plan(plan: Plan, config: RunConfig, origin: str, console: Console) -> None:
    """Print the machine, the models, the memory of every kind of training, and the cost of every stage."""
    ranks, settings = config.parallel.num_ranks, config.plan
    gpu, each = config.planned_gpu, settings.gpus_per_node or config.cluster.gpus_per_node or _GPUS_PER_NODE
    console.print(f"{config.name}: {config.parallel.arithmetic()} ranks", highlight=False)
    console.print(f"{math.ceil(ranks / each)} x {each} {gpu} GPUs, {config.precision.label}", highlight=False)
    console.print(f"shape: {origin}\n", highlight=False)
    console.print(_models(plan))
    for item in plan.passes:
        if item.memory and not item.stage.endswith("baseline"):  # which holds the student without the teacher
            console.print(_memory(item, config))
            if max(held.total for held in item.memory) > GPUS[gpu].memory_bytes:
                console.print(
                    f"{item.stage} does not fit: more tensor or pipeline parallelism, a smaller micro-batch, fewer "
                    "distill.teacher_microbatches\nor parallel.recompute_granularity=full take less\n",
                    style="bold red",
                    highlight=False,
                )
    console.print(_costs(plan, config))
    per_second = _flops_per_second(config)
    console.print(
        f"GPU-hours: at {per_second / 1e12:.0f} TFLOPs a GPU, {settings.utilization:.0%} of {gpu}'s peak "
        "(plan.*); days: on all GPUs\n6ND: the papers' rule, 6 x parameters x tokens, without the teacher",
        style="dim",
        highlight=False,
    )
    if config.fp8_recipes and settings.peak_tflops is None:
        console.print(
            f"FP8: hours at the peak of {config.precision.dtype}, in which attention and output layer stay; what FP8 "
            "saves is not in them",
            style="dim",
            highlight=False,
        )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _models(plan: Plan) -> Table:
    table = _table("models", "", "parameters", "non-embedding", "layers", "hidden", "ffn", "heads", "layers per stage")
    for item in plan.models:
        model, total = item.model, num_parameters(item.model)
        table.add_row(
            item.role,
            f"{total:,}",
            f"{total - num_embedding_parameters(model):,}",
            str(model.num_layers),
            str(model.hidden_size),
            str(model.ffn_hidden_size),
            f"{model.num_attention_heads} / {model.num_query_groups}",
            _runs(item.layers),
        )
    return table


def _memory(item: PlannedPass, config: RunConfig) -> Table:
    """Stages that hold the same are one column."""
    stages = _same_stages(item.memory)
    title = f"{item.stage}: memory of one rank, GB (of {GPUS[config.planned_gpu].memory_bytes / _GB:.0f})"
    headings = [f"stage {first}" if first == last else f"stages {first}-{last}" for first, last, _ in stages]
    table = _table(title, "", *headings)
    for name, label in _ITEMS.items():
        values = [getattr(memory, name) / _GB for _, _, memory in stages]
        if not any(values):
            continue
        table.add_row(label, *(f"{value:.3f}" for value in values), style="bold" if name == "total" else None)
    return table


def _costs(plan: Plan, config: RunConfig) -> Table:
    table = _table("cost", "stage", "steps", "tokens", "FLOPs", "teacher's", "6ND", "GPU-hours", "days")
    sizes = {item.role: num_active_parameters(item.model) for item in plan.models}
    hours = [_gpu_hours(item.flops + item.teacher_flops, config) for item in plan.passes]
    for item, spent in zip(plan.passes, hours, strict=True):
        step, _, stage = item.stage.rpartition("/")
        trained = sizes["source" if stage == "correct" else f"student {step}".rstrip()]
        table.add_row(
            item.stage,
            f"{item.steps:,}" if item.steps else "-",
            fmt.count(item.tokens),
            fmt.power(item.flops),
            fmt.power(item.teacher_flops) if item.teacher_flops else "-",
            fmt.power(six_nd(trained, item.tokens)) if item.steps else "-",
            _number(spent),
            _number(spent / config.parallel.num_ranks / 24),
        )
    total = sum(hours)
    table.add_row(
        "total", "", "", "", "", "", _number(total), _number(total / config.parallel.num_ranks / 24), style="bold"
    )
    return table


def _gpu_hours(flops: float, config: RunConfig) -> float:
    return flops / _flops_per_second(config) / 3600


def _flops_per_second(config: RunConfig) -> float:
    """FLOPs that one GPU does in a second of training."""
    peak = config.plan.peak_tflops
    if peak is None:
        peak = GPUS[config.planned_gpu].tflops[config.precision.dtype]
    return 1e12 * peak * config.plan.utilization


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.01 else fmt.power(value)


def _runs(layers: Sequence[int]) -> str:
    """``[16, 8, 8, 16]`` as ``16, 2 x 8, 16``."""
    runs = [(number, len(list(same))) for number, same in groupby(layers)]
    return ", ".join(str(number) if times == 1 else f"{times} x {number}" for number, times in runs)


def _same_stages(memory: Sequence[StageMemory]) -> list[tuple[int, int, StageMemory]]:
    """First and last stage of every run of equal stages."""
    found: list[tuple[int, int, StageMemory]] = []
    for stage, held in enumerate(memory):
        if found and found[-1][2] == held:
            found[-1] = (found[-1][0], stage, held)
        else:
            found.append((stage, stage, held))
    return found
