"""How many tokens a chunk of logits has when nobody says, and how long its memory is kept."""

import weakref

import pytest
import torch

from minitron.losses import workspace
from minitron.losses.engine import choose_chunk_tokens
from minitron.losses.vocab import VocabShard


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "dtype", "chunk"),
    [
        (256, 131072, torch.bfloat16, 256),  # 64 MiB exactly: one
        (272, 131072, torch.bfloat16, 144),  # two of 136, up to a multiple of 16
        (256, 131072, torch.float32, 128),
        (1024, 49152, torch.bfloat16, 512),  # 672 would fit, and leave a second of 352
        (10_000, 49152, torch.bfloat16, 672),  # 15 chunks of 667
        (7, 300, torch.float32, 16),
        (0, 300, torch.float32, 16),
        (40, 10**8, torch.float32, 16),  # never fewer, whatever the size
    ],
)
def test_chunks_fit_and_are_of_one_length(num_tokens: int, vocab_size: int, dtype: torch.dtype, chunk: int) -> None:
    hidden_TH = torch.empty(num_tokens, 4, dtype=dtype)
    assert choose_chunk_tokens(None, hidden_TH, VocabShard.build(None, vocab_size, None)) == chunk


def test_chunks_are_kept_until_released() -> None:
    like = torch.empty(0)
    workspace.release()
    first = workspace.chunk("student", (4, 8), like)
    kept, place = weakref.ref(first._base), first.data_ptr()
    del first
    assert workspace.chunk("student", (8, 3), like).data_ptr() == place
    assert kept() is not None
    workspace.release()
    assert kept() is None
