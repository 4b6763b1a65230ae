"""Importance of layers and blocks of layers, by taking them out and looking at what comes out of the rest."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron.config.depth import DepthPlan
from minitron.config.model import ModelConfig
from minitron.config.score import DepthMetric
from minitron.data.batch import Batch
from minitron.errors import NumericsError
from minitron.losses import linear_cross_entropy
from minitron.losses.vocab import VocabShard
from minitron.models.gpt import Chunks, FinalState
from minitron.parallel.groups import Groups
from minitron.prune.depth_scores import DepthScores, Floats, GreedyRemoval
from minitron.prune.questions import QuestionSheet, QuestionTally
from minitron.prune.removal import RemovalPass, Variant, everywhere, variants_without
from minitron.prune.statistics import cosine_distance

Progress = Callable[[int, int], None]

_GRAM_ROWS = 4096
"""Rows of the output layer that are held in float64 at once."""


def measure_depth(
    gpt: Chunks,
    microbatches: Sequence[Batch],
    plan: DepthPlan,
    *,
    model: ModelConfig,
    groups: Groups,
    questions: QuestionSheet | None = None,
    on_progress: Progress | None = None,
) -> DepthScores:
    """Measure what a plan asks for, at any TP x PP x DP; every rank gets all of it.

    One pass over the micro-batches measures every metric of every block, and each iterative removal takes one more.

    Args:
        gpt: This stage's part of the model in one chunk; put in evaluation mode and back.
        microbatches: This data-parallel rank's calibration micro-batches, as many on every rank; rows whose loss mask
            is 0 only fill up.
        plan: What to measure.
        model: Architecture of the model.
        groups: This rank's process groups.
        questions: For the metric ``accuracy``.
        on_progress: Called after each micro-batch with micro-batches done and in all.

    Raises:
        NumericsError: A metric is not finite.
    """
    passes = _Passes(gpt, microbatches, model, groups, questions, on_progress)
    passes.num_passes = sum(passes.per_round(m) for m in ([plan.metrics] if plan.sizes else [])) + sum(
        passes.per_round([plan.greedy]) for _ in range(plan.num_greedy) if plan.greedy
    )
    was_training = gpt.training
    gpt.eval()
    try:
        blocks, whole = _blocks(passes, plan, model.num_layers) if plan.sizes else ({}, {})
        greedy = _greedy(passes, plan.greedy, plan.num_greedy, model.num_layers) if plan.greedy else None
    finally:
        gpt.train(was_training)
    return DepthScores(blocks=blocks, greedy=greedy, whole_loss=whole.get(DepthMetric.loss))


def _blocks(
    passes: "_Passes", plan: DepthPlan, num_layers: int
) -> tuple[dict[tuple[DepthMetric, int], Floats], dict[DepthMetric, float]]:
    """Every block of every size under every metric; and the whole model."""
    blocks = [range(first, first + size) for size in plan.sizes for first in range(num_layers - size + 1)]
    values, whole = passes.measure([], blocks, plan.metrics)
    starts = np.cumsum([0, *(num_layers - size + 1 for size in plan.sizes)])
    return {
        (metric, size): values[metric][start : start + num_layers - size + 1]
        for metric in plan.metrics
        for size, start in zip(plan.sizes, starts, strict=False)
        if (metric, size) != (DepthMetric.block_importance, 1)  # the calibration pass has it
    }, whole


def _greedy(passes: "_Passes", metric: DepthMetric, count: int, num_layers: int) -> GreedyRemoval:
    """Remove layers one after the other; of equals the later one goes."""
    removed: list[int] = []
    lowest: list[float] = []
    while len(removed) < count:
        left = [layer for layer in range(num_layers) if layer not in removed]
        found, _ = passes.measure(removed, [[layer] for layer in left], [metric])
        values = found[metric]
        place = len(values) - 1 - int(np.argmin(values[::-1]))
        removed.append(left[place])
        lowest.append(float(values[place]))
    return GreedyRemoval(metric=metric, layers=removed, values=np.array(lowest))


class _Passes:
    """Passes over one calibration text."""

    def __init__(
        self,
        gpt: Chunks,
        microbatches: Sequence[Batch],
        model: ModelConfig,
        groups: Groups,
        questions: QuestionSheet | None,
        on_progress: Progress | None,
    ) -> None:
        self._gpt = gpt
        self._microbatches = microbatches
        self._model = model
        self._groups = groups
        self._questions = questions
        self._on_progress = on_progress
        self._done = 0
        self.num_passes = 0

    def per_round(self, metrics: Sequence[DepthMetric]) -> int:
        """Micro-batches of one round."""
        text = len(self._microbatches) if _on_text(metrics) else 0
        questions = self._questions if DepthMetric.accuracy in metrics else None
        return text + (len(questions.batches) if questions else 0)

    def measure(
        self, removed: Sequence[int], candidates: Sequence[Sequence[int]], metrics: Sequence[DepthMetric]
    ) -> tuple[dict[DepthMetric, Floats], dict[DepthMetric, float]]:
        """Each metric of the model without ``removed`` and each candidate; and of the whole model."""
        variants = variants_without(removed, candidates)
        everything: dict[DepthMetric, Floats] = {}
        if text_metrics := _on_text(metrics):
            measure = TextMeasure(self._gpt, len(variants), text_metrics, self._model, self._groups)
            self._run(variants, measure, self._microbatches)
            everything |= measure.values()
        if DepthMetric.accuracy in metrics:
            assert self._questions is not None, "a plan with accuracy comes with questions"
            device = next(self._gpt.parameters()).device
            tally = QuestionTally(self._questions, len(variants), self._model, self._groups, device)
            self._run(variants, tally, self._questions.batches)
            everything[DepthMetric.accuracy] = tally.error_rates()
        for metric, values in everything.items():
            if not np.isfinite(values).all():
                raise NumericsError(
                    f"score: {metric} without layers {sorted(removed)} and one more is not finite for "
                    f"{int((~np.isfinite(values)).sum())} of {len(values)} models; score in bf16 or fp32"
                )
        first = len(variants) - len(candidates)
        return {m: v[first:] for m, v in everything.items()}, {m: float(v[0]) for m, v in everything.items()}

    def _run(
        self, variants: Sequence[Variant], measure: "TextMeasure | QuestionTally", batches: Sequence[Batch]
    ) -> None:
        one = RemovalPass(self._gpt, self._groups, variants, measure)
        device = next(self._gpt.parameters()).device
        for index in range(len(batches)):
            one.run(batches[index].to(device))
            self._done += 1
            if self._on_progress is not None:
                self._on_progress(self._done, self.num_passes)


def _on_text(metrics: Sequence[DepthMetric]) -> list[DepthMetric]:
    return [metric for metric in metrics if metric is not DepthMetric.accuracy]


class TextMeasure:
    """Sums over calibration text of what the variants' metrics are made of, in float64."""

    def __init__(
        self, gpt: Chunks, num_variants: int, metrics: Sequence[DepthMetric], model: ModelConfig, groups: Groups
    ) -> None:
        """Prepare empty sums.

        Args:
            gpt: The model.
            num_variants: How many variants run, the whole model included.
            metrics: Which metrics to measure.
            model: Architecture of the model.
            groups: This rank's process groups.
        """
        self.whole = set(metrics) != {DepthMetric.block_importance}
        self._metrics = metrics
        self._vocab_size = model.vocab_size
        self._groups = groups
        device = next(gpt.parameters()).device
        self._sums = {metric: torch.zeros(num_variants, dtype=torch.float64, device=device) for metric in metrics}
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._gram_HH: Tensor | None = None

    def begins(self, batch: Batch) -> None:
        """Count the tokens."""
        self._tokens += batch.loss_mask_BS.sum()

    def meets(self, variant: int, state_SBH: Tensor, parent_SBH: Tensor, batch: Batch) -> None:
        """Block importance: the block's input against its output."""
        if DepthMetric.block_importance in self._metrics:
            distance_B = cosine_distance(state_SBH, parent_SBH)
            self._sums[DepthMetric.block_importance][variant] += batch.loss_mask_BS[:, 0].double() @ distance_B

    def ends(self, variant: int, final: FinalState, whole_model: FinalState, batch: Batch) -> None:
        """Loss of a variant, and how far its logits are from the whole model's."""
        mask_SB = batch.loss_mask_BS.t()
        if DepthMetric.loss in self._metrics:
            total = linear_cross_entropy(
                final.hidden_SBH.flatten(0, 1),
                final.weight_vH,
                batch.labels_BS.t().reshape(-1),
                vocab_size=self._vocab_size,
                tp_group=self._groups.tp,
                token_weights_T=mask_SB.reshape(-1),
            )
            self._sums[DepthMetric.loss][variant] += total.double()
        if DepthMetric.logit_mse in self._metrics and variant:
            gram_HH = self._gram(final.weight_vH)
            change_SBH = (final.hidden_SBH.double() - whole_model.hidden_SBH.double()) * mask_SB[..., None]
            change_TH = change_SBH.flatten(0, 1)
            squares = ((change_TH @ gram_HH) * change_TH).sum()
            self._sums[DepthMetric.logit_mse][variant] += squares / self._vocab_size

    def values(self) -> dict[DepthMetric, Floats]:
        """Means over all tokens of all ranks, equal on every rank; a collective."""
        tokens = self._tokens.clone()
        dist.all_reduce(tokens, group=self._groups.dp)
        return {metric: everywhere(sums, self._groups) / float(tokens) for metric, sums in self._sums.items()}

    def _gram(self, weight_vH: Tensor) -> Tensor:
        """``W^T W`` over the vocabulary, of the output layer's weight W.

        Where final states differ by d, logits differ by ``W d``, and ``|W d|^2 = d^T (W^T W) d``: H products for each
        channel instead of V.
        """
        if self._gram_HH is None:
            valid = VocabShard.build(self._vocab_size, len(weight_vH), self._groups.tp).num_valid
            width = weight_vH.shape[1]
            gram_HH = torch.zeros(width, width, dtype=torch.float64, device=weight_vH.device)
            for rows in weight_vH[:valid].split(_GRAM_ROWS):
                gram_HH.addmm_(rows.double().t(), rows.double())
            dist.all_reduce(gram_HH, group=self._groups.tp)
            self._gram_HH = gram_HH
        return self._gram_HH
