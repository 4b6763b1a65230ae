"""Latency on this device: a tiny benchmark of one layer of every width, without any weights to load."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.config.search import ServingConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.models.gpt import Chunks, FinalState, build_gpt, forward_to_final_state
from minitron.parallel.groups import Groups, second_layout
from minitron.runtime.artefact import write_json
from minitron.runtime.session import Session
from minitron.search.latency import LATENCY_FILE, WidthLatency, width_name

_SHALLOW, _DEEP = 1, 3
"""Layers of the two models whose difference is what a layer takes."""
_REPEATS = 5
"""Timed batches of each; the fastest counts, for a busy machine only adds time."""


def measure_widths(session: Session, models: Sequence[ModelConfig], serving: ServingConfig, out: Path) -> int:
    """Time a batch of every width and write `LATENCY_FILE`.

    Rank 0 measures, on one device; the others wait. A new token is a pass of one position without a cache to read, so
    what the cache's traffic costs is left out.

    Args:
        session: The running job.
        models: Shapes of which every width is measured once, whatever their depth.
        serving: Batch and lengths.
        out: The stage's working folder.

    Returns:
        Number of widths.
    """
    widths = {width_name(model): model for model in models}
    alone = ParallelConfig(data_parallel_size=session.groups.world_size)
    with second_layout(alone) as layout, layout.active() as groups:
        if session.is_main:
            found = {}
            with session.progress("latency") as progress:
                for number, (name, model) in enumerate(widths.items(), start=1):
                    found[name] = asdict(_measure(session, model, alone, groups, serving))
                    progress.update(number, len(widths))
            write_json(out / LATENCY_FILE, found)
        torch.distributed.barrier()
    return len(widths)


def _measure(
    session: Session, model: ModelConfig, parallel: ParallelConfig, groups: Groups, serving: ServingConfig
) -> WidthLatency:
    shallow, deep = (
        _batch_ms(session, replace(model, num_layers=layers), parallel, groups, serving) for layers in (_SHALLOW, _DEEP)
    )
    layer = max(0.0, (deep - shallow) / (_DEEP - _SHALLOW))
    return WidthLatency(layer, max(0.0, shallow - _SHALLOW * layer))


def _batch_ms(
    session: Session, model: ModelConfig, parallel: ParallelConfig, groups: Groups, serving: ServingConfig
) -> float:
    """Milliseconds of the prompt's pass and of one pass for each new token, at the best of several tries."""
    gpt = build_gpt(model, parallel, session.config.precision, groups, device=session.device, initialize=True)
    gpt.eval()
    total = _fastest_ms(session, gpt, _batch(session, model, serving.batch_size, serving.prompt_tokens))
    if serving.new_tokens:
        total += serving.new_tokens * _fastest_ms(session, gpt, _batch(session, model, serving.batch_size, 1))
    return total


def _batch(session: Session, model: ModelConfig, size: int, length: int) -> Batch:
    tokens_BS = torch.randint(model.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        position_ids_BS=torch.arange(length).repeat(size, 1),
        loss_mask_BS=torch.ones(size, length),
        sample_index_B=torch.full((size,), NO_SAMPLE),
    ).to(session.torch_device)


def _fastest_ms(session: Session, gpt: Chunks, batch: Batch) -> float:
    """Milliseconds of a forward pass up to the last position's logits."""
    [chunk] = gpt
    times = []
    with torch.no_grad():
        for _ in range(1 + _REPEATS):  # the first one warms up
            _wait(session)
            started = time.perf_counter()
            state = forward_to_final_state(chunk, batch)
            assert isinstance(state, FinalState)
            state.hidden_SBH[-1] @ state.weight_vH.t()
            _wait(session)
            times.append(time.perf_counter() - started)
    return 1e3 * min(times[1:])


def _wait(session: Session) -> None:
    if session.device is Device.cuda:
        torch.cuda.synchronize()
