"""Turn a verb into a job: check everything that can be checked, then start the ranks for what is not done."""

from pathlib import Path

from rich.console import Console

from minitron.cli.stages import CHECKPOINT_OF, default_stages, stages_of
from minitron.cli.worker import run_rank
from minitron.config.compose import load_resolved, to_yaml
from minitron.config.model import ModelConfig
from minitron.config.parallel import check_layout
from minitron.config.prune import check_target
from minitron.config.run import RunConfig, SourceKind
from minitron.errors import ConfigError, ModelError
from minitron.models.hf_import import inspect_source
from minitron.models.random_source import random_model
from minitron.pipeline import Planned, plan_stages
from minitron.runtime.artefact import RunFolder, storage_error
from minitron.runtime.device import check_num_ranks, resolve_device
from minitron.runtime.env import dist_env
from minitron.runtime.environment import environment
from minitron.runtime.launch import launch_local

RESOLVED_FILE = "resolved.yaml"


def run_job(verb: str, config: RunConfig) -> int:
    """Run a verb to its end.

    Args:
        verb: One of the command line's verbs.
        config: The composed configuration.

    Returns:
        Exit code.
    """
    check_models(config)
    resolve_device(config.device, config.parallel)
    env = dist_env()
    if env is not None:
        check_num_ranks(env, config.parallel)
    run = RunFolder(Path(config.runs_dir) / config.name)
    wanted = wanted_stages(verb, config)
    console = Console(soft_wrap=True)
    if env is not None:  # torchrun started us: this process is one rank, and rank 0 plans
        if env.rank == 0:
            _write_resolved(run, config)
        run_rank(config, wanted, env)
        if env.rank == 0:
            _show_end(run, wanted, console)
        return 0
    planned = plan_stages(stages_of(config), config, run, wanted)
    if all(item.done for item in planned):
        _say_done(planned, run, console)
    else:
        resolved = _write_resolved(run, config)
        console.print(f"[bold]{config.name}[/]: {config.parallel.arithmetic()} ranks, artefacts in {run.path}/")
        code = launch_local(resolved, wanted, num_ranks=config.parallel.num_ranks)
        if code:
            return code
    _show_end(run, wanted, console)
    return 0


def wanted_stages(verb: str, config: RunConfig) -> list[str]:
    """The stages a verb runs."""
    match verb:
        case "compress":
            return default_stages(config)
        case "teacher-logits":
            if config.distill.teacher.cache:
                raise ConfigError(
                    f"minitron teacher-logits writes this run's own cache, but distill reads distill.teacher.cache="
                    f"{config.distill.teacher.cache}; leave that out, or run it in the run the folder belongs to"
                )
            return ["teacher_logits"]
        case "train":
            if not config.baseline.enabled:
                raise ConfigError("minitron train makes the baseline, but baseline.enabled=false; set it to true")
            return ["baseline"]
        case "eval":
            chosen = ["eval_teacher"]
            if config.eval.checkpoint:
                return [*chosen, "eval_checkpoint"]
            run = RunFolder(Path(config.runs_dir) / config.name)
            done = [which for which, made_by in CHECKPOINT_OF.items() if run.meta(made_by) is not None]
            return [*chosen, *(f"eval_{which}" for which in done if which != "teacher")]
        case _:
            return [verb]


def check_models(config: RunConfig) -> None:
    """Check source, target and layout before any work starts.

    Raises:
        ModelError: The source cannot be imported.
        PruneError: The target does not fit it.
        LayoutError: The layout cannot split one of the two.
    """
    source = source_model(config)
    target = check_target(source, config.prune)
    check_layout(source, config.parallel, who="teacher")
    check_layout(target, config.parallel, who="student")
    longest = min(source.max_position_embeddings, source.sliding_window or source.max_position_embeddings)
    if config.data.seq_length > longest:
        raise ModelError(
            f"data.seq_length={config.data.seq_length} is longer than the model's {longest} positions; lower it"
        )


def source_model(config: RunConfig) -> ModelConfig:
    """Architecture of the model to compress, every cheap check made."""
    if config.source.kind is SourceKind.path:
        assert config.source.path is not None  # checked when composed
        return inspect_source(Path(config.source.path)).model
    return random_model(config.source.random)


def _write_resolved(run: RunFolder, config: RunConfig) -> Path:
    """Write what every rank will load, with the versions and the commit at its head."""
    path = run.path / RESOLVED_FILE
    head = "".join(f"# {key}: {value}\n" for key, value in environment().items())
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        path.write_text(head + to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error
    assert load_resolved(path) == config, "a configuration must survive its own YAML"
    return path


def _say_done(planned: list[Planned], run: RunFolder, console: Console) -> None:
    for item in planned:
        meta = run.meta(item.stage.name) or {}
        console.print(f"{item.stage.name}: done before ({meta.get('seconds', 0):.0f} s then)", highlight=False)


def _show_end(run: RunFolder, wanted: list[str], console: Console) -> None:
    if "report" in wanted:
        from minitron.report.data import load_report
        from minitron.report.table import print_table

        print_table(load_report(run.stage("report")), console)
