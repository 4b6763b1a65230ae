"""Damped least squares from sums over tokens: the corrections of kept weights, in closed form."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.errors import NumericsError


class LeastSquares:
    """The problem ``min |E - X D^T|^2 + damping |D|^2`` over the tokens of all ranks.

    X are the inputs of a linear layer and E the errors of its outputs, so D is what to add to its weight. Only
    ``X^T X`` and ``X^T E`` are kept, in fp64; the products of one call of `add` are taken in fp32.

    Args:
        num_inputs: Width of X.
        num_errors: Width of E.
        device: Where to sum.
    """

    def __init__(self, num_inputs: int, num_errors: int, *, device: torch.device) -> None:
        self.gram_XX = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross_XE = torch.zeros(num_inputs, num_errors, dtype=torch.float64, device=device)

    def add(self, inputs_TX: Tensor, errors_TE: Tensor) -> None:
        """Add tokens of this rank.

        Args:
            inputs_TX: ``[..., X]``.
            errors_TE: ``[..., E]``, the same tokens.
        """
        inputs_TX = _flat(inputs_TX)
        self.gram_XX += inputs_TX.T @ inputs_TX
        self.cross_XE += inputs_TX.T @ _flat(errors_TE)

    def of_scales(self, within_XX: Tensor, between_XE: Tensor) -> "LeastSquares":
        """Another problem from the same sums: scale each input by ``1 + d`` in front of a fixed linear A.

        The errors seen by ``B``, ``min |E B^T - X diag(d) A^T|^2 + damping |d|^2``.

        Args:
            within_XX: ``A^T A``.
            between_XE: ``A^T B``.

        Returns:
            A problem whose solution is d, ``[1, X]``.
        """
        scales = LeastSquares(len(self.gram_XX), 1, device=self.gram_XX.device)
        scales.gram_XX = self.gram_XX * within_XX
        scales.cross_XE = (self.cross_XE * between_XE).sum(dim=1, keepdim=True)
        return scales

    def solve(self, damping: float, group: ProcessGroup, *, what: str) -> Tensor:
        """Sum over the ranks, solve on the first, and give all the same bits. Uses the sums up.

        Args:
            damping: In units of the mean of the diagonal of ``X^T X``.
            group: The ranks.
            what: Name of the layer, for the error.

        Returns:
            ``D``, ``[E, X]``, fp32.

        Raises:
            NumericsError: The sums are not finite, or the matrix is singular.
        """
        source = dist.get_global_rank(group, 0)
        for sums in (self.gram_XX, self.cross_XE):
            dist.reduce(sums, dst=source, group=group)
        correction_EX = torch.zeros(self.cross_XE.T.shape, device=self.gram_XX.device)
        if group.rank() == 0:
            correction_EX = _solve(self.gram_XX, self.cross_XE, damping).T.float().contiguous()
        dist.broadcast(correction_EX, src=source, group=group)
        if not correction_EX.isfinite().all():
            raise NumericsError(
                f"prune.reconstruct: the least squares of {what} have no finite solution at prune.reconstruct.damping="
                f"{damping}; raise it, or the number of samples, or leave the layer out of prune.reconstruct.modules"
            )
        return correction_EX


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).float()


def _solve(gram_XX: Tensor, cross_XE: Tensor, damping: float) -> Tensor:
    """``D^T``; not a number where the damped matrix is not positive definite."""
    damped_XX = gram_XX.clone()
    damped_XX.diagonal().add_(damping * gram_XX.diagonal().mean())
    factor_XX, failed = torch.linalg.cholesky_ex(damped_XX)
    return torch.full_like(cross_XE, torch.nan) if failed.item() else torch.cholesky_solve(cross_XE, factor_XX)
