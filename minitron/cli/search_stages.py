"""The stages of `minitron search` and their order: each round depends on the losses of the one before.

A candidate's stages lie in ``search/<its name>/``: ``prune``, ``eval_pruned``, and ``distill_<steps>`` for each rung
that it reaches. Everything before them (import, data, teacher, scores) is the run's own.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.cli.source import source_model
from minitron.cli.stages import Line, line_stages, needs_cache, stages_of
from minitron.config.compose import flat_values
from minitron.config.prune import Ranking
from minitron.config.run import RunConfig
from minitron.config.search import RESULT, SEARCH, LatencySource, candidate_training, rung_steps
from minitron.pipeline import OutsideHashes, Planned, Stage, outside_hashes, plan_stages
from minitron.runtime.artefact import RunFolder
from minitron.search.latency import read_latencies, width_name
from minitron.search.rank import best, num_survivors
from minitron.search.space import Candidate, Latency, Space, enumerate_space, require_candidates, roofline

if TYPE_CHECKING:
    from minitron.runtime.session import Session

LATENCY = f"{SEARCH}/latency"

_NOT_DECIDING = ("search.workers", "search.max_candidates")
_SHARED = ("import", "data", "eval_teacher", "correct", "eval_corrected", "score")


def is_search(wanted: Sequence[str]) -> bool:
    """Whether the wanted stages are those of a search."""
    return any(name == SEARCH or name.startswith(f"{SEARCH}/") for name in wanted)


def search_space(config: RunConfig, run: RunFolder) -> Space:
    """What is left of the grid; before latencies are measured, what they decide is still in."""
    return _space(config, latencies(config, run))


def _space(config: RunConfig, latency: Latency | None) -> Space:
    return enumerate_space(
        source_model(config), config.prune, config.search, config.parallel, latency, precision=config.precision
    )


def latencies(config: RunConfig, run: RunFolder) -> Latency | None:
    """Milliseconds of every shape of the grid; None where they are still to be measured, or measured anew."""
    if config.search.latency.source is LatencySource.roofline:
        return roofline(config.search)
    meta, now = run.meta(LATENCY), _latency_values(config)
    return read_latencies(run.stage(LATENCY)) if meta is not None and meta["values"] == now else None


def candidates_of(config: RunConfig, run: RunFolder) -> list[Candidate]:
    """The candidates of a search whose latencies are known.

    Raises:
        ConfigError: There are none, or too many.
    """
    return require_candidates(search_space(config, run), config.search)


def candidate_line(config: RunConfig, candidate: Candidate) -> Line:
    """The line that a candidate goes down: the run's own, with its shape and a short distillation."""
    search = config.search
    train = candidate_training(config.distill.train, search, seq_length=config.data.seq_length)
    short = replace(
        config,
        prune=candidate.prune(config.prune),
        distill=replace(config.distill, train=train),
        eval=replace(config.eval, num_tokens=search.eval_tokens),
        report=replace(config.report, sample_tokens=0),
    )
    return Line(short, candidate.name, candidate=True)


def steps_of(config: RunConfig) -> list[int]:
    """Optimizer steps at which candidates are compared."""
    seq_length = config.data.seq_length
    train = candidate_training(config.distill.train, config.search, seq_length=seq_length)
    return rung_steps(train.num_steps(seq_length), config.search.halving)


def rounds(config: RunConfig, run: RunFolder, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Who is distilled to which step. A round's losses are read when the next one is asked for.

    Args:
        config: The run's configuration.
        run: Its folder, with every candidate pruned and evaluated.
        names: The candidates.

    Yields:
        Step, and the candidates that are distilled up to there.
    """
    search, steps = config.search, steps_of(config)
    alive = best({name: pruned_loss(run, name) for name in names}, search.distill_best or len(names))
    yield steps[0], alive
    for before, after in itertools.pairwise(steps):
        keep = num_survivors(len(alive), search.halving.factor)
        alive = best({name: distilled_loss(run, name, before) for name in alive}, keep)
        yield after, alive


def pruned_loss(run: RunFolder, name: str) -> float:
    """A candidate's held-out loss right after pruning."""
    return float(_summary(run, f"{SEARCH}/{name}/eval_pruned")["loss"])


def distilled_loss(run: RunFolder, name: str, steps: int) -> float:
    """A candidate's held-out loss after so many steps of distillation."""
    return float(_summary(run, distilled(name, steps))["heldout_loss"])


def distilled(name: str, steps: int) -> str:
    """The stage that distills a candidate up to a step."""
    return f"{SEARCH}/{name}/distill_{steps}"


def stages_of_search(config: RunConfig, run: RunFolder, wanted: Sequence[str] = ()) -> list[Stage]:
    """Every stage that a search may run, each after those it needs; candidates only once they are known.

    Args:
        config: The run's configuration.
        run: Its folder.
        wanted: The comparison at the end is among the stages if it is among these: what it needs follows from the
            candidates' losses.
    """
    first = first_stages(config)
    if latencies(config, run) is None:
        return first
    candidates = candidates_of(config, run)
    stages = [*first, *_candidate_stages(config, [candidate_line(config, candidate) for candidate in candidates])]
    if RESULT in wanted:
        stages.append(_result_stage(config, run, [candidate.name for candidate in candidates]))
    return stages


def search_plans(config: RunConfig, run: RunFolder, outside: OutsideHashes) -> Iterator[list[Planned]]:
    """The rounds of a search, each planned when the one before is done.

    Args:
        config: The run's configuration.
        run: Its folder.
        outside: Hashes of outside content by stage, as far as they are known.

    Raises:
        ArtefactError: See `plan_stages`.
        ConfigError: No candidate is left after latencies have been measured, or too many are.
    """
    known = dict(outside)

    def plan(wanted: Sequence[str]) -> list[Planned]:
        return plan_search(config, run, wanted, known)

    if config.search.latency.source is LatencySource.measured:
        yield plan(["import", LATENCY])
    names = [candidate.name for candidate in candidates_of(config, run)]
    yield plan([stage.name for stage in stages_of_search(config, run) if not is_search([stage.name])])
    yield plan([f"{SEARCH}/{name}/{stage}" for name in names for stage in ("prune", "eval_pruned")])
    earlier: list[str] = []
    for steps, alive in rounds(config, run, names):
        _drop_states(run, [stage for stage in earlier if Path(stage).parent.name not in alive])
        yield plan([distilled(name, steps) for name in alive])
        _drop_states(run, earlier)
        earlier = [distilled(name, steps) for name in alive]
    yield plan([RESULT])


def plan_search(config: RunConfig, run: RunFolder, wanted: Sequence[str], outside: OutsideHashes) -> list[Planned]:
    """`plan_stages` for stages of a search.

    Args:
        config: The run's configuration.
        run: Its folder.
        wanted: Names of the stages to run.
        outside: Hashes of outside content by stage; those that are not there yet are made and added, for the next
            plan (a large model takes minutes).
    """
    stages = stages_of_search(config, run, wanted)
    outside.update(outside_hashes([stage for stage in stages if stage.name not in outside], config))
    return plan_stages(stages, config, run, wanted, outside)


def first_stages(config: RunConfig) -> list[Stage]:
    """What comes before the candidates."""
    names = [name for name in _SHARED if name != "score" or config.prune.ranking is Ranking.importance]
    stages = [stage for stage in stages_of(config) if stage.name in names]
    if config.search.latency.source is LatencySource.measured:
        stages.insert(1, Stage(LATENCY, ("import",), _latency_values, _action("latency")))
    return stages


def _candidate_stages(config: RunConfig, lines: Sequence[Line]) -> list[Stage]:
    """The candidates' stages, after the cache of the teacher where they read the run's own."""
    found: list[Stage] = []
    for line in lines:
        stages = {stage.name: stage for stage in line_stages(line.config)}
        if needs_cache(config) and not found:
            found.append(line.stage(stages["teacher_logits"]))
        mine = [stages["prune"], stages["eval_pruned"]]
        mine += [_rung(stages["distill"], steps) for steps in steps_of(config)]
        found += [line.stage(stage) for stage in mine]
    return found


def _rung(distill: Stage, steps: int) -> Stage:
    """Distillation up to a step of its schedule; from where an earlier rung stopped, which changes no step."""

    def values(config: RunConfig) -> dict[str, Any]:
        return distill.values(config) | {"search.steps": steps, "search.eval_tokens": config.search.eval_tokens}

    def run(session: "Session", out: Path) -> dict[str, Any]:
        from minitron.cli.searching import distill_to

        return distill_to(session, out, steps)

    return replace(distill, name=f"distill_{steps}", values=values, run=run)


def _latency_values(config: RunConfig) -> dict[str, Any]:
    """What decides latencies: every width that may be a candidate's, and how it is run."""
    space = _space(config, None)
    return {
        "search.widths": sorted({width_name(candidate.model) for candidate in space.candidates}),
        **flat_values(config.search.serving, "search.serving"),
        **flat_values(config.precision, "precision"),
    }


def _result_stage(config: RunConfig, run: RunFolder, names: Sequence[str]) -> Stage:
    compared = [f"{SEARCH}/{name}/eval_pruned" for name in names]
    compared += [distilled(name, steps) for steps, alive in rounds(config, run, names) for name in alive]

    def values(config: RunConfig) -> dict[str, Any]:
        values = flat_values(config.search, "search")
        return {key: value for key, value in values.items() if key not in _NOT_DECIDING}

    return Stage(RESULT, ("eval_teacher", *compared), values, _action("result"))


def _action(name: str) -> Callable[["Session", Path], dict[str, Any]]:
    """What a stage does, looked up when it runs: planning needs no device."""

    def run(session: "Session", out: Path) -> dict[str, Any]:
        from minitron.cli import searching

        actions = {"latency": searching.latency, "result": searching.result}
        return actions[name](session, out)

    return run


def _summary(run: RunFolder, stage: str) -> dict[str, Any]:
    meta = run.meta(stage)
    assert meta is not None, f"{stage} comes before what reads it"
    summary: dict[str, Any] = meta["summary"]
    return summary


def _drop_states(run: RunFolder, stages: Sequence[str]) -> None:
    """Free the checkpoints of candidates that have gone on or out; they are several times as large as a model."""
    from minitron.train.run import STATES_DIR  # brings Megatron-Core

    for stage in stages:
        shutil.rmtree(run.stage(stage) / STATES_DIR, ignore_errors=True)
