"""The calibration pass: run a model forward over calibration text and score it."""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch

from minitron.config.model import ModelConfig
from minitron.config.score import ScoreConfig
from minitron.data.batch import Batch
from minitron.models.gpt import Chunks, FinalState
from minitron.parallel.groups import Groups
from minitron.prune.importance import ImportanceCollector
from minitron.prune.scores import Scores
from minitron.train.heldout import forward_only


def score_model(
    gpt: Chunks,
    microbatches: Sequence[Batch],
    *,
    model: ModelConfig,
    config: ScoreConfig,
    groups: Groups,
    source_id: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a model on calibration text, at any TP x PP x DP; every rank gets the scores.

    Args:
        gpt: This stage's part of the model in one chunk, built with Megatron's local layer spec; put in
            evaluation mode and back.
        microbatches: This data-parallel rank's calibration micro-batches, as many on every rank; rows
            whose loss mask is 0 only fill up and do not count.
        model: Architecture of the model.
        config: What to measure.
        groups: This rank's process groups.
        source_id: Identity of the weights.
        on_progress: Called as each micro-batch begins with micro-batches begun and in all.

    Raises:
        PlatformError: The model was built with Transformer Engine's fused norms.
        DataError: There is no sample, or the sequences differ in length.
        NumericsError: A score is not finite.
    """
    (chunk,) = gpt
    collector = ImportanceCollector(
        chunk.get_submodule("decoder.layers").children(),
        chunk.decoder.final_layernorm,
        model,
        seq_length=microbatches[0].tokens_BS.shape[1],
        aggregations=config.aggregations,
        head_norm=config.head_norm,
        ffn_activation=config.ffn_activation,
    )
    was_training = gpt.training
    gpt.eval()
    try:
        with collector:
            watched = _Watched(microbatches, collector, _device_of(gpt), on_progress)
            forward_only(gpt, watched, _nothing)
    finally:
        gpt.train(was_training)
    return collector.reduce(source_id=source_id, dp_group=groups.dp, tp_group=groups.tp, pp_group=groups.pp)


class _Watched(Sequence[Batch]):
    """The micro-batches, each announced to the collector when the schedule takes it."""

    def __init__(
        self,
        microbatches: Sequence[Batch],
        collector: ImportanceCollector,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._microbatches = microbatches
        self._collector = collector
        self._device = device
        self._on_progress = on_progress

    def __len__(self) -> int:
        return len(self._microbatches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self._microbatches[index]

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._microbatches, start=1):
            if self._on_progress is not None:
                self._on_progress(number, len(self))
            on_device = batch.to(self._device)
            self._collector.observe(on_device.loss_mask_BS.amax(dim=1))
            yield on_device


def _device_of(gpt: Chunks) -> torch.device:
    return next(gpt.parameters()).device


def _nothing(_state: FinalState, _batch: Batch) -> None:
    """Nothing to keep of the last hidden state."""
