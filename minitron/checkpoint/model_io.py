"""Load and save a model's shards through Megatron-Core's sharded checkpoints, at any layout."""

import queue
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from minitron.checkpoint.folder import WEIGHTS_DIR, weights_dir
from minitron.checkpoint.format import EXTRA_STATE
from minitron.checkpoint.store import CheckpointReader
from minitron.errors import CheckpointError

TRAINING_ONLY = "training_only"
"""Name of a submodule that is trained with a model and belongs to the training state, but not to the model."""


def load_model(gpt: Iterable[GPTModel], folder: Path) -> None:
    """Fill this rank's part of a model from a checkpoint folder, resharding as needed.

    Args:
        gpt: This rank's chunks of the model (`minitron.models.gpt.Chunks`), built for any layout.
        folder: A checkpoint folder (`minitron.checkpoint.folder`).

    Raises:
        CheckpointError: A parameter is missing from the checkpoint, or has another shape.
    """
    fill(gpt, load_sharded(_weights(gpt), weights_dir(folder)), folder)


def fill(gpt: Iterable[GPTModel], state: dict[str, Any], origin: Path) -> None:
    """Copy what was loaded into the chunks; FP8 histories that it lacks start empty.

    Args:
        gpt: This rank's chunks.
        state: Their state dicts by place.
        origin: Where it was loaded from, for the message.

    Raises:
        CheckpointError: Anything else is missing, or too much.
    """
    for name, chunk in by_place(gpt):
        missing, unexpected = chunk.load_state_dict(state[name], strict=False)
        missing = [key for key in missing if not key.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise CheckpointError(
                f"{origin} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )


def save_model(gpt: Iterable[GPTModel], folder: Path) -> None:
    """Write the model's weights, and nothing else, into a checkpoint folder. Called by every rank."""
    save_sharded(_weights(gpt), folder / WEIGHTS_DIR)


def by_place(gpt: Iterable[GPTModel]) -> Iterator[tuple[str, GPTModel]]:
    """The chunks with the names that keep them apart in a state dict."""
    return ((f"model{index}", chunk) for index, chunk in enumerate(gpt))


def sharded_weights(gpt: Iterable[GPTModel]) -> ShardedStateDict:
    """The chunks' sharded state dicts by their place; in the checkpoint the keys are those of the whole model."""
    return {name: chunk.sharded_state_dict() for name, chunk in by_place(gpt)}


def with_history(weights: ShardedStateDict, kept: frozenset[str] = frozenset()) -> ShardedStateDict:
    """The chunks' sharded state dicts with no more of what layers keep beside their weights than ``kept``, by key.

    The key is the checkpoint's: Transformer Engine's experts are one layer, whose entries in the dict are numbered.
    """
    return {
        name: {
            entry: value for entry, value in state.items() if not value.key.endswith(EXTRA_STATE) or value.key in kept
        }
        for name, state in weights.items()
    }


def load_sharded(state: ShardedStateDict, path: Path) -> dict[str, Any]:
    """Load a sharded state dict; called by every rank.

    Raises:
        CheckpointError: The folder or a file is missing or cut short; a key that is asked for is not there, or
            has another shape.
    """
    CheckpointReader(path)  # says in one line what Megatron would say in a traceback a rank
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (CheckpointingException, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be loaded: {_one_line(error)}") from error
    return loaded


def save_sharded(state: ShardedStateDict, path: Path, *, replicas: ProcessGroup | None = None) -> None:
    """Save a sharded state dict into a folder, which is made if it is missing.

    Args:
        state: This rank's shards.
        path: The folder.
        replicas: Ranks that hold the same shards, which then each write a part of them; None: the first writes all.
    """
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    # Megatron-Core 0.19 starts a process on each rank to hold a queue that only its asynchronous save shares with a
    # writer elsewhere: 0.4 GB and ten seconds of imports. This save writes in threads of its own process.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy()
    if replicas is not None and replicas.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    dist_checkpointing.save(state, str(path), strategy)


def _one_line(error: BaseException) -> str:
    """What went wrong; torch wraps the errors of the ranks in one that is no `Exception`."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def _weights(gpt: Iterable[GPTModel]) -> ShardedStateDict:
    """Leave out FP8 histories, which mean nothing after slicing (and the CPU has none), and what is no weight of it."""
    training = f"{TRAINING_ONLY}."
    return {
        name: {key: value for key, value in state.items() if not key.startswith(training)}
        for name, state in with_history(sharded_weights(gpt)).items()
    }
