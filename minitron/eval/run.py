"""The eval stages: held-out loss and perplexity of one model, and a sample of what it writes."""

import math
from pathlib import Path

from transformers import AutoTokenizer

from minitron.checkpoint.folder import side_dir
from minitron.config.run import SourceKind
from minitron.data.loader import heldout_batches
from minitron.errors import NumericsError
from minitron.eval.logits import greedy_tokens
from minitron.models.load import load_gpt
from minitron.runtime.artefact import write_json
from minitron.runtime.session import Session
from minitron.train.heldout import HeldoutLoss, groups_of, heldout_loss
from minitron.train.objective import CrossEntropy

EVAL_FILE = "eval.json"

CHANCE_SHARE = 0.9
"""A teacher above this share of ln(vocabulary) has not been imported right."""


def evaluate(session: Session, *, name: str, model: Path, data: Path, out: Path) -> dict[str, float]:
    """Evaluate one checkpoint folder.

    Args:
        session: The running job.
        name: Name of the stage, for the bar.
        model: Checkpoint folder.
        data: The data folder.
        out: The stage's working folder; gets ``eval.json``.

    Raises:
        NumericsError: The loss is not finite.
    """
    config, groups = session.config, session.groups
    gpt, architecture = load_gpt(model, session)
    gpt.eval()
    batches = heldout_batches(
        data,
        seq_length=config.data.seq_length,
        micro_batch_size=config.eval.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp.size(),
        max_tokens=config.eval.num_tokens,
    )
    cross_entropy = CrossEntropy(architecture.vocab_size, groups, config.parallel.sequence_parallel)
    parts: list[HeldoutLoss] = []
    with session.progress(name) as progress:
        done = 0
        for part in groups_of(batches, groups):
            here = [batch.on_rank(groups, session.torch_device) for batch in part]
            parts.append(heldout_loss(gpt, here, cross_entropy, groups))
            done += len(part)
            progress.update(done, len(batches), loss=parts[-1].loss)
    num_tokens = sum(part.num_tokens for part in parts)
    total = HeldoutLoss(sum(part.loss * part.num_tokens for part in parts) / num_tokens, num_tokens)
    if not math.isfinite(total.loss):
        raise NumericsError(
            f"{name}: held-out loss is {total.loss}; evaluate with precision.dtype=fp32 to find out why"
        )

    tokenizer = AutoTokenizer.from_pretrained(str(side_dir(model)), local_files_only=True)
    added = greedy_tokens(
        gpt,
        tokenizer.encode(config.report.prompt) or [tokenizer.eos_token_id],
        groups,
        num_tokens=config.report.sample_tokens,
        vocab_size=architecture.vocab_size,
        stop=tokenizer.eos_token_id,
    )
    if session.is_main:
        result = {
            "loss": total.loss,
            "perplexity": total.perplexity,
            "num_tokens": num_tokens,
            "prompt": config.report.prompt,
            "sample": tokenizer.decode(added, skip_special_tokens=True),
        }
        write_json(out / EVAL_FILE, result)
    return {"loss": total.loss, "perplexity": total.perplexity}


def check_better_than_chance(session: Session, loss: float, vocab_size: int) -> None:
    """The check on the path itself: an unpruned teacher at chance level means a wrong import or tokenizer.

    Raises:
        NumericsError: For a real model. A random one is at chance by construction, and only said to be.
    """
    chance = math.log(vocab_size)
    if loss < CHANCE_SHARE * chance:
        return
    text = f"the unpruned teacher's held-out loss is {loss:.3f}, chance is ln({vocab_size}) = {chance:.3f}"
    if session.config.source.kind is SourceKind.random:
        session.say(f"  {text}: as expected of random weights")
        return
    raise NumericsError(f"{text}: the weights or the tokenizer were not imported right, or the text is not language")
