"""Rules that span several sections of a run. Each raises one error that says what to change."""

from dataclasses import replace

from minitron.config.depth import check_depth
from minitron.config.distill import TeacherSource
from minitron.config.fp8 import check_fp8_tokens
from minitron.config.launch import nodes_of
from minitron.config.line import Ancestor, check_chain
from minitron.config.logit_loss import LogitLossConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.prune import check_merging
from minitron.config.run import RunConfig, SourceKind
from minitron.config.search import candidate_training, rung_steps
from minitron.config.teacher_layout import TeacherLayout, own_layout
from minitron.config.teacher_logits import CacheMethod
from minitron.config.train import check_train
from minitron.config.trainings import in_step, settings_of
from minitron.errors import ConfigError


def validate(run: RunConfig) -> None:
    """Check a composed run, as far as that is possible without looking at the model.

    Raises:
        ConfigError: In one line.
    """
    _check_source(run)
    _check_ranges(run)
    nodes_of(run.launch, run.cluster, run.parallel)
    seq_length = run.data.seq_length
    check_train(run.distill.train, run.parallel, seq_length=seq_length, who="distill.train")
    if run.correction.enabled:
        _check_correction(run)
    if not run.search.grid.is_empty:
        _check_search(run)
    check_chain(run.chain)
    for prune in [step.prune for step in run.chain] or [run.prune]:
        check_depth(run.score, prune)
        check_merging(prune)
    for number, step in enumerate(run.chain):
        train = in_step(run, step).distill.train
        if step.num_tokens != 0:
            check_train(train, run.parallel, seq_length=seq_length, who=f"chain.{number} ({step.name})")
    if run.distill.teacher.path is not None:
        _check_given_teacher(run)
    own = own_layout(run.distill, run.parallel)
    if run.distill.intermediate.enabled:
        _check_intermediate(run.parallel, own)
    if own is not None and run.distill.teacher.source is TeacherSource.cached:
        raise ConfigError(
            "distill.teacher.parallel and distill.teacher.micro_batch_size lay out a teacher that runs, but "
            "distill.teacher.source=cached runs none (teacher_logits.micro_batch_size is for writing the cache); "
            "set them to null"
        )
    _check_top_k_rest(run)
    group, stages = run.distill.teacher_microbatches, run.parallel.pipeline_model_parallel_size
    if run.parallel.num_chunks > 1 and group % stages:
        raise ConfigError(
            f"distill.teacher_microbatches={group} is not a multiple of parallel.pipeline_model_parallel_size="
            f"{stages}, which virtual_pipeline_model_parallel_size={run.parallel.num_chunks} needs: each group of "
            f"micro-batches is an interleaved schedule of its own; use 0 or a multiple of {stages}"
        )
    if run.eval.num_tokens < seq_length:
        raise ConfigError(
            f"eval.num_tokens={run.eval.num_tokens} is less than one sequence of data.seq_length={seq_length} tokens"
        )
    _check_split_sequence(seq_length, run.parallel, "parallel")
    if own is not None:
        _check_split_sequence(seq_length, own.parallel, "distill.teacher.parallel")
    _check_fp8(run, own)


def _check_top_k_rest(run: RunConfig) -> None:
    """A rest of the vocabulary is there where only a part of it is compared; another run's cache tells what it has."""
    rest, taught = run.distill.logit_loss.top_k_rest, run.distill.teacher
    if rest is LogitLossConfig().top_k_rest or taught.cache is not None:
        return
    given = f"distill.logit_loss.top_k_rest={rest} has no meaning for"
    if taught.source is TeacherSource.online and not run.distill.logit_loss.top_k:
        raise ConfigError(
            f"{given} distill.logit_loss.top_k=0, the full vocabulary; leave it out, or set distill.logit_loss.top_k"
        )
    if taught.source is TeacherSource.cached and run.teacher_logits.method is CacheMethod.sampled:
        raise ConfigError(
            f"{given} the random draws of teacher_logits.method=sampled; leave it out, or set "
            "teacher_logits.method=top_k"
        )


def _check_fp8(run: RunConfig, own: TeacherLayout | None) -> None:
    """The tokens of every kind of micro-batch that runs in FP8."""
    train, parallel = run.distill.train, run.parallel
    teacher = run.distill.teacher.precision(run.precision)
    beside = own or TeacherLayout(parallel, train.micro_batch_size)
    whole = replace(parallel, context_parallel_size=1)  # distributions are kept by whole sequences
    for who, precision, layout, micro_batch_size in (
        ("distill.train.micro_batch_size", run.precision, parallel, train.micro_batch_size),
        ("distill.teacher.micro_batch_size", teacher, beside.parallel, beside.micro_batch_size),
        ("teacher_logits.micro_batch_size", teacher, whole, run.teacher_logits.micro_batch_size),
    ):
        check_fp8_tokens(precision, layout, micro_batch_size=micro_batch_size, seq_length=run.data.seq_length, who=who)


def _check_search(run: RunConfig) -> None:
    """The candidates' short distillation, and what a search leaves undefined."""
    search, seq_length = run.search, run.data.seq_length
    if run.chain:
        raise ConfigError("minitron search compares shapes of one step; set chain=[], or search.grid without axes")
    if run.prune.drop_layers is not None and search.grid.num_layers:
        raise ConfigError(
            f"search.grid.num_layers={list(search.grid.num_layers)} contradicts prune.drop_layers, which fixes the "
            "layers of every candidate; leave one of them out"
        )
    if search.eval_tokens < seq_length:
        raise ConfigError(
            f"search.eval_tokens={search.eval_tokens} is less than one sequence of data.seq_length={seq_length} tokens"
        )
    train = candidate_training(run.distill.train, search, seq_length=seq_length)
    check_train(train, run.parallel, seq_length=seq_length, who="search")
    rung_steps(train.num_steps(seq_length), search.halving)


def _check_given_teacher(run: RunConfig) -> None:
    """A teacher from elsewhere takes the place of the run's own."""
    given = f"distill.teacher.path={run.distill.teacher.path}"
    if run.correction.enabled:
        raise ConfigError(f"{given} teaches, so the corrected teacher of correction.enabled=true would not be read")
    for step in run.chain:
        if step.teacher is Ancestor.previous:
            raise ConfigError(f"{given} teaches, but chain step {step.name} asks for teacher=previous; leave one out")


def _check_intermediate(parallel: ParallelConfig, own: TeacherLayout | None) -> None:
    """Where both models' states are seen: in the forward pass, whole sequences at a time, in one layout."""
    for name, bad, why in (
        ("distill.teacher.parallel or distill.teacher.micro_batch_size", own is not None, "states are sent by stage"),
        (
            "parallel.virtual_pipeline_model_parallel_size",
            parallel.num_chunks > 1,
            "a stage's losses are settled once a forward pass",
        ),
        ("parallel.context_parallel_size", parallel.context_parallel_size > 1, "relations need whole sequences"),
        (
            "parallel.recompute_granularity",
            parallel.recompute_granularity is not None,
            "a state that is computed twice would count twice",
        ),
    ):
        if bad:
            raise ConfigError(
                f"distill.intermediate is not offered together with {name} ({why}); leave that at its default, or "
                "distill.intermediate without pairs"
            )


def _check_split_sequence(seq_length: int, parallel: ParallelConfig, section: str) -> None:
    """The tokens of a sequence divide over the ranks that share it."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp > 1 and seq_length % (2 * cp):
        raise ConfigError(
            f"data.seq_length={seq_length} is not a multiple of 2 x parallel.context_parallel_size={cp}: each rank "
            f"holds two chunks of every sequence; use a multiple of {2 * cp}"
        )
    if parallel.sequence_parallel and seq_length % (cp * tp):
        over = f"{section}.tensor_model_parallel_size={tp}"
        if cp > 1:
            over = f"parallel.context_parallel_size={cp} x {over}"
        raise ConfigError(
            f"data.seq_length={seq_length} does not divide over {over}, which {section}.sequence_parallel=true needs"
        )


def _check_ranges(run: RunConfig) -> None:
    for name, value, least in (
        ("seed", run.seed, 0),
        ("source.random.seed", run.source.random.seed, 0),
        ("distill.teacher_microbatches", run.distill.teacher_microbatches, 0),
        ("eval.micro_batch_size", run.eval.micro_batch_size, 1),
        ("report.sample_tokens", run.report.sample_tokens, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")
    for name, number in (
        ("export.max_shard_gb", run.export.max_shard_gb),
        ("export.max_logit_error", run.export.max_logit_error),
    ):
        if not number > 0:
            raise ConfigError(f"{name}={number} must be more than 0")


def _check_correction(run: RunConfig) -> None:
    train = settings_of(run, "correct")
    if train.min_lr > train.lr:
        raise ConfigError(
            f"the correction's last learning rate {train.min_lr:g} (correction.min_lr, null: distill.train.min_lr) is "
            f"above its peak {train.lr:g} (correction.lr_scale={run.correction.lr_scale:g} x "
            f"distill.train.lr={run.distill.train.lr:g}); set correction.min_lr lower, or correction.lr_scale higher"
        )
    check_train(train, run.parallel, seq_length=run.data.seq_length, who="correction")


def _check_source(run: RunConfig) -> None:
    if run.source.kind is SourceKind.path and not run.source.path:
        raise ConfigError(
            "source.path is not set; give a Hugging Face folder or a .gguf file, such as "
            "source.path=/models/Llama-3.1-8B, or choose an experiment: experiment=demo"
        )
