"""`minitron plan`: what a run will need, from its configuration and the shape of its models. Needs no GPU."""

from pathlib import Path

from rich.console import Console

from minitron.cli.plan_table import print_plan
from minitron.config.fp8 import unmet_need
from minitron.config.gpus import GPUS
from minitron.config.launch import LaunchKind
from minitron.config.model import ModelConfig
from minitron.config.run import RunConfig, SourceKind
from minitron.errors import ConfigError
from minitron.plan.trainings import plan_run
from minitron.prune.given import target_of

_WIDTH = 100
"""Columns of the tables: figures are not cut where a terminal is narrower."""


def run_plan(config: RunConfig) -> int:
    """Print the plan of a run.

    Returns:
        Exit code.

    Raises:
        ConfigError: The shape of a model is not known, or the GPUs cannot do the run's FP8.
        PruneError: A target does not fit its source.
        LayoutError: The layout cannot split a model, or FP8 cannot multiply its widths.
    """
    _check_gpu(config)
    source, origin = source_shape(config)
    plan = plan_run(config, source, _given_teacher(config), target_of=target_of)
    console = Console(soft_wrap=True)
    console.width = max(console.width, _WIDTH)
    print_plan(plan, config, origin, console)
    return 0


def _check_gpu(config: RunConfig) -> None:
    """Refuse to plan FP8 for GPUs that cannot do it."""
    gpu = config.planned_gpu
    machine = "cluster.gpu" if config.plan.gpu is None and config.cluster.gpu else "plan.gpu"
    for key, recipe in config.fp8_recipes.items():
        if config.launch.kind is LaunchKind.slurm and not config.cluster.gpus_per_node:
            raise ConfigError(
                f"{key}={recipe} needs GPUs, but cluster.gpus_per_node=0; choose a cluster= with GPUs, or bf16"
            )
        if reason := unmet_need(recipe, capability=GPUS[gpu].capability, cuda=None):
            others = (
                other for other, has in GPUS.items() if not unmet_need(recipe, capability=has.capability, cuda=None)
            )
            raise ConfigError(
                f"{machine}={gpu} cannot do {key}={recipe}: {reason}; set {machine}={'|'.join(others)}, or choose "
                "another recipe, or bf16"
            )


def source_shape(config: RunConfig) -> tuple[ModelConfig, str]:
    """The architecture of the source, and where it was read. torch is imported for GGUF files and random models only.

    Raises:
        ConfigError: Neither the path nor ``source.model`` gives it.
        ModelError: The path holds no model, or one of another shape than ``source.model``.
    """
    source = config.source
    if source.kind is SourceKind.random:
        from minitron.models.random_source import random_model

        return random_model(source.random), "a random model"
    path = Path(source.path or "")
    if (path / "config.json").is_file():
        from minitron.models.hf_config import model_from_hf_config, read_json

        found = model_from_hf_config(read_json(path / "config.json"))
    elif path.is_file():
        from minitron.models.hf_import import inspect_source

        found = inspect_source(path).model
    elif source.model is not None:
        return source.model, f"the published shape (source.model); {source.path} is not on this machine"
    else:
        raise ConfigError(
            f"source.path={source.path} is not on this machine, and there is no published shape of it: choose one with "
            "model=..., such as model=llama31_8b, or an experiment that has one"
        )
    if source.model is not None:
        found.check_sizes(source.model, f"source.path={source.path}")
    return found, str(path)


def _given_teacher(config: RunConfig) -> ModelConfig | None:
    if config.distill.teacher.path is None:
        return None
    from minitron.cli.job import teacher_model

    return teacher_model(config)
