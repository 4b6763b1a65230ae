"""Rules that span several sections of a run. Each raises one error that says what to change."""

from minitron.config.run import RunConfig, SourceKind
from minitron.config.train import check_train
from minitron.errors import ConfigError


def validate(run: RunConfig) -> None:
    """Check a composed run, as far as that is possible without looking at the model.

    Raises:
        ConfigError: In one line.
    """
    _check_source(run)
    seq_length = run.data.seq_length
    check_train(run.distill.train, run.parallel, seq_length=seq_length, who="distill.train")
    for name, tokens in (("eval.num_tokens", run.eval.num_tokens), ("distill.train.eval_tokens", _eval_tokens(run))):
        if tokens < seq_length:
            raise ConfigError(f"{name}={tokens} is less than one sequence of data.seq_length={seq_length} tokens")
    if run.distill.teacher_microbatches < 0:
        raise ConfigError(f"distill.teacher_microbatches={run.distill.teacher_microbatches} must not be negative")
    if run.parallel.sequence_parallel and seq_length % run.parallel.tensor_model_parallel_size:
        raise ConfigError(
            f"data.seq_length={seq_length} does not divide over "
            f"parallel.tensor_model_parallel_size={run.parallel.tensor_model_parallel_size}, "
            "which parallel.sequence_parallel=true needs"
        )


def _eval_tokens(run: RunConfig) -> int:
    return run.distill.train.eval_tokens


def _check_source(run: RunConfig) -> None:
    if run.source.kind is SourceKind.path and not run.source.path:
        raise ConfigError(
            "source.path is not set; give a Hugging Face folder or a .gguf file, such as "
            "source.path=/models/Llama-3.1-8B, or choose an experiment: experiment=demo"
        )
