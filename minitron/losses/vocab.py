"""One rank's share of the vocabulary, and the collectives that a block of tokens needs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from minitron.errors import LayoutError


class ScaledSums(NamedTuple):
    """Per-token sums over vocabulary columns, each standing for ``sum * exp(max)``.

    Attributes:
        max_C: the exponent taken out, one per token; zero for ordinary sums.
        sums: the sums, each of shape [C].
    """

    max_C: Tensor
    sums: tuple[Tensor, ...]


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds.

    Rank r of the tensor-parallel group holds ``num_columns`` columns from ``r * num_columns`` on;
    those at or beyond ``vocab_size`` are padding.

    Attributes:
        vocab_size: true vocabulary size.
        num_columns: columns per rank, padding included (v).
        group: tensor-parallel process group, None for a single rank.
        rank: this process's rank in the group.
        num_ranks: size of the group.
    """

    vocab_size: int
    num_columns: int
    group: dist.ProcessGroup | None
    rank: int
    num_ranks: int

    @classmethod
    def build(cls, vocab_size: int | None, num_columns: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """Describe this rank's columns.

        Args:
            vocab_size: true vocabulary size, None when no column is padding.
            num_columns: columns per rank, padding included.
            group: tensor-parallel process group, None for a single rank.

        Raises:
            LayoutError: the ranks together hold fewer columns than the vocabulary has.
        """
        rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if vocab_size is None:
            vocab_size = num_columns * num_ranks
        if not 1 <= vocab_size <= num_columns * num_ranks:
            raise LayoutError(
                f"vocab_size {vocab_size} must be between 1 and the columns held by the tensor-parallel group, "
                f"{num_columns} per rank * {num_ranks} ranks = {num_columns * num_ranks}"
            )
        return cls(vocab_size, num_columns, group, rank, num_ranks)

    @property
    def start(self) -> int:
        """First column of this rank in the whole vocabulary."""
        return self.rank * self.num_columns

    @property
    def num_valid(self) -> int:
        """Columns of this rank that are not padding; zero is possible on the last ranks."""
        return max(0, min(self.num_columns, self.vocab_size - self.start))

    def merge(self, *parts: ScaledSums) -> list[ScaledSums]:
        """Add up every rank's sums, in one all-gather whatever their number.

        All ranks get bit-identical results. Give a loss's softmax denominators and dot products
        together: each call is one collective.

        Args:
            *parts: this rank's sums over its valid columns; ``max_C`` is -inf where it has none.

        Returns:
            The sums over the group, in the same order, each with the largest ``max_C`` taken out.
        """
        if self.num_ranks == 1:
            return list(parts)
        rows_RC = torch.stack([row for part in parts for row in (part.max_C, *part.sums)])
        num_rows, num_tokens = rows_RC.shape
        flat = rows_RC.new_empty(self.num_ranks * num_rows, num_tokens)
        dist.all_gather_into_tensor(flat, rows_RC, group=self.group)
        ranks_PRC = flat.view(self.num_ranks, num_rows, num_tokens)
        merged: list[ScaledSums] = []
        row = 0
        for part in parts:
            max_PC = ranks_PRC[:, row]
            max_C = max_PC.amax(0)
            factor_PC = (max_PC - max_C).exp()
            sums = tuple((ranks_PRC[:, row + 1 + i] * factor_PC).sum(0) for i in range(len(part.sums)))
            merged.append(ScaledSums(max_C, sums))
            row += 1 + len(part.sums)
        return merged

    def top_k(self, logits_Cv: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The K largest logits over every rank's columns, and their token ids; one all-gather.

        Args:
            logits_Cv: this rank's valid columns.
            k: K, at most ``vocab_size``.

        Returns:
            Logits [C, K], largest first, and ids [C, K], equal on all ranks.
        """
        values_Ck, index_Ck = logits_Cv.topk(min(k, self.num_valid), dim=-1)
        ids_Ck = index_Ck + self.start
        if self.num_ranks == 1:
            return values_Ck, ids_Ck
        missing = (0, k - values_Ck.shape[1])  # a rank may hold fewer columns than K
        mine_C2K = torch.cat(
            # Ids travel as numbers of the logits' dtype: fp32 holds integers up to 16.7 million exactly.
            [pad(values_Ck, missing, value=-torch.inf), pad(ids_Ck.to(values_Ck.dtype), missing, value=-1)],
            dim=1,
        )
        num_tokens = mine_C2K.shape[0]
        flat = mine_C2K.new_empty(self.num_ranks * num_tokens, 2 * k)
        dist.all_gather_into_tensor(flat, mine_C2K, group=self.group)
        ranks_CP2K = flat.view(self.num_ranks, num_tokens, 2 * k).transpose(0, 1)
        values_CK, index_CK = ranks_CP2K[..., :k].reshape(num_tokens, -1).topk(k, dim=-1)
        ids_CK = ranks_CP2K[..., k:].reshape(num_tokens, -1).gather(1, index_CK).long()
        return values_CK, ids_CK


def row_max(logits_Cv: Tensor) -> Tensor:
    """Largest value of each row, -inf for rows without columns."""
    if logits_Cv.shape[1] == 0:
        return logits_Cv.new_full((logits_Cv.shape[0],), float("-inf"))
    return logits_Cv.amax(-1)
