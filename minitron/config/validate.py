"""Rules that span several sections of a run. Each raises one error that says what to change."""

from minitron.config.run import RunConfig, SourceKind
from minitron.config.teacher_layout import own_layout
from minitron.config.train import check_train
from minitron.errors import ConfigError


def validate(run: RunConfig) -> None:
    """Check a composed run, as far as that is possible without looking at the model.

    Raises:
        ConfigError: In one line.
    """
    _check_source(run)
    _check_ranges(run)
    seq_length = run.data.seq_length
    check_train(run.distill.train, run.parallel, seq_length=seq_length, who="distill.train")
    own_layout(run.distill, run.parallel)
    for name, tokens in (("eval.num_tokens", run.eval.num_tokens), ("distill.train.eval_tokens", _eval_tokens(run))):
        if tokens < seq_length:
            raise ConfigError(f"{name}={tokens} is less than one sequence of data.seq_length={seq_length} tokens")
    if run.parallel.sequence_parallel and seq_length % run.parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"data.seq_length={seq_length} does not divide over "
            f"parallel.tensor_model_parallel_size={run.parallel.tensor_model_parallel_size}, "
            "which parallel.sequence_parallel=true needs"
        )


def _check_ranges(run: RunConfig) -> None:
    train = run.distill.train
    for name, value, least in (
        ("seed", run.seed, 0),
        ("source.random.seed", run.source.random.seed, 0),
        ("distill.teacher_microbatches", run.distill.teacher_microbatches, 0),
        ("distill.train.clip_grad", train.clip_grad, 0),
        ("distill.train.weight_decay", train.weight_decay, 0),
        ("eval.micro_batch_size", run.eval.micro_batch_size, 1),
        ("report.sample_tokens", run.report.sample_tokens, 0),
    ):
        if not value >= least:  # true for nan too
            raise ConfigError(f"{name}={value} must be at least {least}")
    for name, number in (
        ("distill.train.adam_eps", train.adam_eps),
        ("export.max_shard_gb", run.export.max_shard_gb),
        ("export.max_logit_error", run.export.max_logit_error),
    ):
        if not number > 0:
            raise ConfigError(f"{name}={number} must be more than 0")
    for name, beta in (("distill.train.adam_beta1", train.adam_beta1), ("distill.train.adam_beta2", train.adam_beta2)):
        if not 0 <= beta < 1:
            raise ConfigError(f"{name}={beta} must lie in [0, 1)")


def _eval_tokens(run: RunConfig) -> int:
    return run.distill.train.eval_tokens


def _check_source(run: RunConfig) -> None:
    if run.source.kind is SourceKind.path and not run.source.path:
        raise ConfigError(
            "source.path is not set; give a Hugging Face folder or a .gguf file, such as "
            "source.path=/models/Llama-3.1-8B, or choose an experiment: experiment=demo"
        )
