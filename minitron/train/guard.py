"""Gradient norm, clipping and the refusal of bad gradients, all on the device: the host waits for nothing here."""

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from minitron.errors import NumericsError


class UpdateGuard:
    """Applies updates as long as every gradient was finite, and remembers the first that was not.

    From that one on no update changes a weight, whatever later gradients are, until the host looks (`check`), which
    it does on logging steps and before a checkpoint is written.

    torch's AdamW leaves weights and moments alone on the device's word. The fused Adams of Transformer Engine and Apex
    have no such switch in the mode that Megatron uses: they get a gradient of zero, so their weights stay finite but
    still move by momentum and weight decay. Either way nothing of it is ever saved.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None  # whether there is one, its step, its norm

    @torch.no_grad()
    def update(self, optimizer: MegatronOptimizer, *, step: int, clip_grad: float) -> Tensor:
        """Clip the prepared gradients and step the optimizer, unless a gradient is or was not finite.

        Args:
            optimizer: Its gradients are in place (``prepare_grads``).
            step: Number of this step, for the message.
            clip_grad: Largest gradient norm; 0 turns clipping off.

        Returns:
            Global gradient norm before clipping, fp32 scalar on the device.
        """
        norm = grad_norm(optimizer)
        refused = self._remember(norm, step)
        if clip_grad > 0:
            clip_grads_with_norm_(optimizer.get_parameters(), clip_grad, norm)
        for part in optimizer.chained_optimizers:
            _withhold(part, refused)
        optimizer.step_with_ready_grads()
        return norm

    def check(self) -> None:
        """Look, which waits for the device.

        Raises:
            NumericsError: A gradient was not finite, on all ranks alike.
        """
        if self._first_bad is None:
            return
        refused, step, norm = self._first_bad.tolist()
        if refused:
            raise NumericsError(
                f"gradient norm is {norm} at step {int(step)}; no update was made since and none will be saved. "
                "Lower lr, or train in fp32 to find out why"
            )

    def _remember(self, norm: Tensor, step: int) -> Tensor:
        """1.0 where this gradient or an earlier one was not finite."""
        if self._first_bad is None:
            self._first_bad = norm.new_zeros(3, dtype=torch.float64)
        now = torch.stack([norm.new_ones(()), norm.new_full((), step), norm]).double()
        is_first = ~norm.isfinite() & (self._first_bad[0] == 0)
        self._first_bad = torch.where(is_first, now, self._first_bad)
        return self._first_bad[0].float()


def grad_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Global norm of the prepared gradients, equal on all ranks: Megatron's ``get_grad_norm`` without its host's waits.

    Returns:
        fp32 scalar on the device.
    """
    grads = [grad for part in optimizer.chained_optimizers for grad in part.get_grads_for_grad_norm()]
    total = optimizer.get_loss_scale().new_zeros(())
    if grads:
        total += get_total_norm(grads).square()
    torch.distributed.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    norm: Tensor = total.sqrt()
    return norm


def _withhold(part: MegatronOptimizer, refused: Tensor) -> None:
    """Make the part's next step change nothing where ``refused`` is 1 (for fused Adams: see `UpdateGuard`)."""
    if isinstance(part.optimizer, torch.optim.AdamW):
        part.optimizer.found_inf = refused  # type: ignore[attr-defined]  # torch's own name, as its GradScaler sets it
        # Only the fused step reads it. Set here, for loading a state may have turned it off.
        for group in part.optimizer.param_groups:
            group["fused"] = True
        return
    for parameter in part.get_parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(torch.where(refused == 0, parameter.grad, 0.0))
