"""What the stages of `minitron search` do that no other verb's do."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minitron.cli.actions import train_stage
from minitron.cli.search_stages import (
    candidates_of,
    distilled,
    distilled_loss,
    pruned_loss,
    rounds,
    search_space,
    steps_of,
)
from minitron.config.compose import flat_values
from minitron.config.prune import DENSE_SIZES
from minitron.config.run import Device, RunConfig
from minitron.config.search import COSTS, SEARCH, LatencySource
from minitron.report.collect import read_curve, read_eval
from minitron.report.search import PLOTTED, SearchResult, SearchRow, write_search
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from minitron.search.measure import measure_widths
from minitron.search.rank import pareto_front, rank_correlation
from minitron.search.space import Candidate
from minitron.train.run import STATES_DIR, Leg

Curve = dict[int, float]
"""Held-out loss by tokens."""


def distill_to(session: Session, out: Path, steps: int) -> dict[str, Any]:
    """Distill a candidate up to a step of its schedule, from where the rung before stopped."""
    earlier = max((before for before in steps_of(session.config) if before < steps), default=None)
    states = None if earlier is None else session.run.stage(f"distill_{earlier}") / STATES_DIR
    if states is not None and not states.exists():
        session.say(f"  {states} is gone: from the first step again, to the same end")
    return train_stage("distill", session, out, leg=Leg(steps, states))


def latency(session: Session, out: Path) -> dict[str, Any]:
    """Time every width that may be a candidate's."""
    space = search_space(session.config, session.run)  # before latencies decide
    models = [candidate.model for candidate in space.candidates]
    return {"widths": measure_widths(session, models, session.config.search.serving, out)}


def result(session: Session, out: Path) -> dict[str, Any]:
    """Compare the candidates: table, plot, and the winner's prune section."""
    if not session.is_main:
        return {}
    config, run = session.config, session.run
    candidates = {candidate.name: candidate for candidate in candidates_of(config, run)}
    compared = compare(config, run, candidates, device=session.device)
    winner = candidates[compared.winner].prune(config.prune)
    write_search(
        compared, {key.removeprefix("prune."): value for key, value in flat_values(winner, "prune").items()}, out
    )
    return {"winner": compared.winner, "loss": compared.rows[0].loss, "stability": compared.stability}


def compare(config: RunConfig, run: RunFolder, candidates: dict[str, Candidate], *, device: Device) -> SearchResult:
    """Read the finished stages of a search.

    Args:
        config: The run's configuration.
        run: Its folder.
        candidates: By name.
        device: Where latencies were measured, if they were.
    """
    rungs = list(rounds(config, run, list(candidates)))
    tokens_per_step = config.distill.train.tokens_per_step(config.data.seq_length)
    rows = {name: _row(candidate, pruned_loss(run, name)) for name, candidate in candidates.items()}
    for steps, alive in rungs:
        for name in alive:
            loss = distilled_loss(run, name, steps)
            rows[name] = replace(rows[name], loss=loss, num_tokens=steps * tokens_per_step)
    _, finished = rungs[-1]
    fronts = {cost: pareto_front({n: (getattr(rows[n], cost), _loss(rows[n])) for n in finished}) for cost in PLOTTED}
    for name in finished:
        front = [cost for cost, names in fronts.items() if name in names]
        rows[name] = replace(rows[name], finished=True, front=front)
    ordered = sorted(rows.values(), key=lambda row: (-row.num_tokens, _loss(row), row.name))
    curves = [_curve(run, name, [steps for steps, _ in rungs]) for name in finished]
    last_two = _last_two(curves)
    best = ordered[0]
    space, teacher = search_space(config, run), read_eval(run.stage("eval_teacher"))
    compared_on = {read_eval(run.stage(f"{SEARCH}/{name}/eval_pruned"))["num_tokens"] for name in candidates}
    assert len(compared_on) == 1, "the tokens are part of the stage's identity"
    return SearchResult(
        rows=ordered,
        winner=best.name,
        eval_tokens=compared_on.pop(),
        teacher_loss=float(teacher["loss"]),
        teacher_tokens=int(teacher["num_tokens"]),
        latency_source=_latency_source(config, device),
        space=f"{space.num_points} shapes, {len(candidates)} candidates ({space.reasons or 'none dropped'})",
        stability=rank_correlation(*([c[t] for c in curves] for t in last_two)) if last_two else None,
        stability_tokens=last_two,
        pruned_stability=rank_correlation(
            [rows[name].pruned_loss for name in finished], [_loss(rows[name]) for name in finished]
        ),
        overrides=[f"prune.{size}={getattr(best, size)}" for size in DENSE_SIZES],
    )


def _row(candidate: Candidate, loss: float) -> SearchRow:
    costs = asdict(candidate.costs)
    assert set(costs) == set(COSTS)
    return SearchRow(
        name=candidate.name, **{size: getattr(candidate.model, size) for size in DENSE_SIZES}, **costs, pruned_loss=loss
    )


def _loss(row: SearchRow) -> float:
    return row.pruned_loss if row.loss is None else row.loss


def _curve(run: RunFolder, name: str, steps: list[int]) -> Curve:
    """A candidate's validations over all of its rungs."""
    curves = [read_curve(run.stage(distilled(name, rung))) for rung in steps]
    return {t: loss for curve in curves for t, loss in zip(curve.heldout_tokens, curve.heldout_loss, strict=True)}


def _last_two(curves: list[Curve]) -> list[int]:
    """Tokens of the last two validations that all candidates have; empty where there are no two."""
    common = set(curves[0]).intersection(*curves[1:])
    return sorted(common)[-2:] if len(common) > 1 else []


def _latency_source(config: RunConfig, device: Device) -> str:
    search = config.search
    serving = search.serving
    load = f"{serving.batch_size} x {serving.prompt_tokens} prompt tokens and {serving.new_tokens} new ones"
    if search.latency.source is LatencySource.measured:
        return f"measured on one device ({device}), {config.precision.dtype}, {load}"
    ranks = f" x {serving.tensor_model_parallel_size}" if serving.tensor_model_parallel_size > 1 else ""
    return f"roofline of {search.latency.gpu}{ranks}, {serving.dtype}, {load}"
