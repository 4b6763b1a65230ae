"""Turn a verb into a job: check everything that can be checked, then start the ranks for what is not done."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from minitron.checkpoint.folder import MODEL_FILE, is_checkpoint_folder, read_model_config
from minitron.cli.search_job import run_search
from minitron.cli.source import source_model, source_vocabulary
from minitron.cli.stages import lines_of, needs_cache, stages_of
from minitron.cli.start import start_ranks, write_resolved
from minitron.cli.submit import jobs_of, submit_run
from minitron.cli.turn import in_turn
from minitron.cli.worker import PREFLIGHT, as_started, run_rank, runs_alone
from minitron.config.depth import depth_plan
from minitron.config.families import check_family
from minitron.config.fp8 import check_fp8_model
from minitron.config.intermediate import find_matches
from minitron.config.launch import LaunchKind, nodes_of
from minitron.config.model import ModelConfig
from minitron.config.parallel import check_layout
from minitron.config.run import RunConfig
from minitron.config.search import SEARCH
from minitron.config.teacher_layout import own_layout
from minitron.data.sources import check_enough_text
from minitron.distill.vocabulary import common_vocab_size, vocabulary_of
from minitron.errors import ConfigError, ModelError, StoppedError
from minitron.pipeline import OutsideHashes, Planned, outside_hashes, plan_stages
from minitron.prune.given import target_of
from minitron.runtime.artefact import RunFolder
from minitron.runtime.device import (
    check_cluster_precision,
    check_num_ranks,
    check_precision,
    resolve_device,
)
from minitron.runtime.env import DistEnv, wandb_mode
from minitron.runtime.slurm import Job

_PREFLIGHT_LIMIT = "01:00:00"
"""Time limit of a SLURM job that only looks at its machines: short, to start soon, and longer than its ranks wait for
each other by default (`minitron.cli.preflight`), so that they, not SLURM, say who is missing."""


def run_job(verb: str, config: RunConfig, env: DistEnv | None) -> int:
    """Run a verb to its end.

    Args:
        verb: One of the command line's verbs.
        config: The composed configuration.
        env: This process's rank when torchrun or srun started it, else None.

    Returns:
        Exit code.
    """
    run = RunFolder(Path(config.runs_dir) / config.name)
    with in_turn(env):
        wanted = [SEARCH] if verb == SEARCH else wanted_stages(verb, config)
        if env is not None:
            _check_started(env, config, wanted)
        check_models(config)
        if config.launch.kind is not LaunchKind.slurm:
            check_precision(config, resolve_device(config.device))
        else:  # the machine that submits need not have the nodes' device
            check_cluster_precision(config)
        if config.tracking.wandb:
            wandb_mode()
        if verb == SEARCH or "data" in wanted:
            check_text(config)
    console = Console(soft_wrap=True)
    if verb == SEARCH:
        return run_search(config, run, env, console, teacher=teacher_model(config))
    if env is not None:  # torchrun or srun started us: this process is one rank, and rank 0 plans
        if env.rank == 0:
            write_resolved(run, config, wanted)
        run_rank(config, wanted, env)
        if env.rank == 0:
            _show_end(run, wanted, config, console)
        return 0
    outside = outside_hashes(stages_of(config), config)
    planned = plan_stages(stages_of(config), config, run, wanted, outside)
    if all(item.done for item in planned):
        _say_done(planned, run, console)
    elif config.launch.kind is LaunchKind.slurm:
        submit_run(jobs_of(planned, config), config, run, outside, wanted=wanted)
        return 0
    else:
        code = _run_here(config, run, wanted, outside)
        if code:
            return code
    _show_end(run, wanted, config, console)
    return 0


def run_preflight(config: RunConfig, env: DistEnv | None) -> int:
    """Check the machines of a run, in a job of its own on SLURM; the ranks are started unless torchrun or srun has.

    Args:
        config: The composed configuration.
        env: This process's rank when torchrun or srun started it, else None.

    Returns:
        Exit code.
    """
    if env is not None:
        with in_turn(env):
            _check_not_started_twice(env, config)
        run_rank(config, [PREFLIGHT], env)
        return 0
    if config.launch.kind is LaunchKind.slurm:
        check_cluster_precision(config)
        nodes, ranks_per_node = nodes_of(config.launch, config.cluster, config.parallel)
        job = Job(PREFLIGHT, (PREFLIGHT,), (), nodes, ranks_per_node, alone=False)
        brief = replace(config, launch=replace(config.launch, time_limit=_PREFLIGHT_LIMIT, signal_lead_s=60))
        submit_run([job], brief, RunFolder(Path(config.runs_dir) / config.name), {}, wanted=[])
        return 0
    return start_ranks(config, [PREFLIGHT], {})


def _check_started(env: DistEnv, config: RunConfig, wanted: list[str]) -> None:
    """Whether the ranks that something else started are those of the configuration."""
    _check_not_started_twice(env, config)
    check_num_ranks(env, as_started(config, wanted, env.world_size).parallel)


def _check_not_started_twice(env: DistEnv, config: RunConfig) -> None:
    if config.launch.kind is not LaunchKind.local:
        raise ConfigError(
            f"launch={config.launch.kind} starts the ranks, but {env.launcher} has started this process as rank "
            f"{env.rank} of {env.world_size}; leave launch= out, or start minitron by itself"
        )


def _run_here(config: RunConfig, run: RunFolder, wanted: list[str], outside: OutsideHashes) -> int:
    """Start the ranks on this machine and wait for them."""
    size = "1 process" if runs_alone(config, wanted) else f"{config.parallel.arithmetic()} ranks"
    Console(soft_wrap=True).print(f"[bold]{config.name}[/]: {size}, artefacts in {run.path}/")
    code = start_ranks(config, wanted, outside, run=run, wanted=wanted)
    if code:
        return code
    done = all(item.done for item in plan_stages(stages_of(config), config, run, wanted, outside))
    return 0 if done else StoppedError.exit_code  # rank 0 has said where


def wanted_stages(verb: str, config: RunConfig) -> list[str]:
    """The stages a verb runs."""
    stages = [stage for stage in stages_of(config) if stage.name != "eval_checkpoint"]
    names = [stage.name for stage in stages]
    if verb in ("compress", "ablate") and not needs_cache(config):
        names = [name for name in names if _verb_name(name) != "teacher_logits"]
    match verb:
        case "compress":  # to the last report: what an ablation needs beside comes after it
            return names[: max(number for number, name in enumerate(names) if _verb_name(name) == "report") + 1]
        case "ablate":
            if "ablation" not in names:
                raise ConfigError(
                    "minitron ablate compares recipes of one step, the baseline among them; set chain=[] and "
                    "baseline.enabled=true"
                )
            return [name for name in names if name not in ("export", "report")]
        case "teacher-logits":
            if config.distill.teacher.cache:
                raise ConfigError(
                    f"minitron teacher-logits writes this run's own cache, but distill reads distill.teacher.cache="
                    f"{config.distill.teacher.cache}; leave that out, or run it in the run the folder belongs to"
                )
            if own_layout(config.distill, config.parallel) is not None:
                raise ConfigError(
                    "minitron teacher-logits runs the teacher in the layout of `parallel`; set "
                    "distill.teacher.parallel and distill.teacher.micro_batch_size to null"
                )
            return [name for name in names if _verb_name(name) == "teacher_logits"]
        case "train":
            return _wanted_training(names)
        case "eval":
            if config.eval.checkpoint:
                return ["eval_teacher", "eval_checkpoint"]
            run = RunFolder(Path(config.runs_dir) / config.name)
            evals = [stage for stage in stages if _verb_name(stage.name).startswith("eval_")]
            return [s.name for s in evals if s.name == "eval_teacher" or run.meta(s.needs[0]) is not None]
        case "score" if "score" not in map(_verb_name, names):
            raise ConfigError(
                f"minitron score has nothing to score: prune.scores={config.prune.scores} are given; leave them out"
            )
        case _:
            return [name for name in names if _verb_name(name) == verb]


def _verb_name(stage: str) -> str:
    """A stage's name without the step of a chain that it belongs to."""
    return stage.rsplit("/", 1)[-1]


def _wanted_training(names: list[str]) -> list[str]:
    """What `minitron train` trains."""
    for training in ("correct", "baseline"):
        if wanted := [name for name in names if _verb_name(name) == training]:
            return wanted
    raise ConfigError(
        "minitron train has nothing to train: set correction.enabled=true to correct the teacher, or "
        "baseline.enabled=true for the control from random weights"
    )


def check_models(config: RunConfig) -> None:
    """Check source, target and layout before any work starts.

    Raises:
        ModelError: The source cannot be imported, or the teacher's tokenizer is another than its.
        PruneError: The target does not fit it.
        LayoutError: The layout cannot split one of the two.
        ConfigError: A pair of intermediate states names a layer that is not there, or a block to score is too large.
    """
    source = source_model(config)
    own = own_layout(config.distill, config.parallel)
    teacher = teacher_model(config) or source
    if own is None:
        check_layout(teacher, config.parallel.plain(), who="teacher")
    else:
        check_layout(teacher, own.parallel, who="teacher in its own layout", section="distill.teacher.parallel")
    check_layout(source, config.parallel.plain(), who="source")  # scored and evaluated, whatever the teacher's layout
    if config.correction.enabled:
        check_layout(source, config.parallel, who="teacher to correct (correction.enabled=true)")
        check_fp8_model(source, config.precision, config.parallel, who="teacher to correct (correction.enabled=true)")
    students: dict[str, ModelConfig] = {}
    for line in lines_of(config):
        before = students[line.source.step] if line.source else source
        student = students[line.step] = target_of(before, line.config.prune)
        depth_plan(config.score, line.config.prune, before.num_layers)
        check_family(before, student, line.config.prune, config.score)
        who = f"student {line.step}".rstrip()
        check_layout(student, config.parallel, who=who)
        check_fp8_model(student, config.precision, config.parallel, who=who)
        beside = students[line.teacher.step] if line.teacher else teacher
        taught = config.distill.teacher.precision(config.precision)
        check_fp8_model(beside, taught, own.parallel if own else config.parallel.plain(), who=f"teacher of {who}")
        if own is not None:
            own_of = f"teacher of {line.step} in its own layout"
            check_layout(beside, own.parallel, who=own_of, section="distill.teacher.parallel")
        if not line.distills:
            continue
        try:
            find_matches(config.distill.intermediate, beside, student, config.parallel)
        except ConfigError as error:
            if not line.step:
                raise
            raise ConfigError(f"chain step {line.step}: {error}; rules such as last-2 fit every depth") from error
    check_vocabulary(config, source)
    for model in (source, teacher):
        longest = model.longest_sequence
        for name, length in (
            ("data.seq_length", config.data.seq_length),
            ("score.seq_length", config.score.seq_length or 0),
        ):
            if length > longest:
                raise ModelError(f"{name}={length} is longer than the model's {longest} positions; lower it")


def check_vocabulary(config: RunConfig, source: ModelConfig) -> None:
    """Check that a teacher which is not the source has its tokenizer, and the logit loss against what they share.

    Raises:
        ModelError: The tokenizers differ.
        ConfigError: More tokens are to be compared than both have.
    """
    common, given = source.vocab_size, config.distill.teacher.path
    if given is not None:
        common = common_vocab_size(vocabulary_of(Path(given)), source_vocabulary(config, source))
    config.distill.logit_loss.check_vocabulary(common)


def check_text(config: RunConfig) -> None:
    """Check that there is text at all, and enough of it to start, before any work does.

    How many tokens it has, only the data stage can tell: it checks again.

    Raises:
        DataError: With the arithmetic.
    """
    sequences = config.least_train_sequences + 1  # and one held out
    check_enough_text(config.data, num_tokens=sequences * config.data.seq_length + 2)


def teacher_model(config: RunConfig) -> ModelConfig | None:
    """Architecture of the teacher that ``distill.teacher.path`` names, if it does.

    Raises:
        ConfigError: There is no checkpoint folder.
    """
    given = config.distill.teacher.path
    if given is None:
        return None
    if not is_checkpoint_folder(Path(given)):
        raise ConfigError(
            f"distill.teacher.path={given} is not a checkpoint folder (it has no {MODEL_FILE}); import a Hugging Face "
            f"model first, `minitron import name=teacher source.path={given}`, and give "
            f"distill.teacher.path={Path(config.runs_dir) / 'teacher' / 'import'}"
        )
    return read_model_config(Path(given))


def _say_done(planned: list[Planned], run: RunFolder, console: Console) -> None:
    for item in planned:
        meta = run.meta(item.stage.name) or {}
        console.print(f"{item.stage.name}: done before ({meta.get('seconds', 0):.0f} s then)", highlight=False)


def _show_end(run: RunFolder, wanted: list[str], config: RunConfig, console: Console) -> None:
    if "ablation" in wanted:
        from minitron.report.ablation import collect_ablation, print_ablation

        print_ablation(collect_ablation(run, config), run.stage("ablation"), console)
    for report in (name for name in wanted if _verb_name(name) == "report"):
        from minitron.report.data import load_report
        from minitron.report.table import print_table

        print_table(load_report(run.stage(report)), console)
