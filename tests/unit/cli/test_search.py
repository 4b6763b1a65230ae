"""A search before any rank starts: identities of its stages, who works on what, and one line for each mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron.cli.main import main
from minitron.cli.search_job import deal
from minitron.cli.search_stages import LATENCY, plan_search, search_plans, stages_of_search
from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run
from minitron.errors import ArtefactError
from minitron.pipeline import Planned, plan_stages
from minitron.runtime.artefact import RunFolder
from minitron.runtime.env import place_environment
from tests.helpers.line import LINE

GRID = ["search.grid.hidden_size=[48,56]", "search.num_tokens=2048", "search.eval_tokens=512"]
A, B = "L3-h48-f96-a4-g4", "L3-h56-f96-a4-g4"
SHARED = ["import", "data", "eval_teacher", "score"]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("Some text.\n" * 5000)
    return ["experiment=tiny", f"runs_dir={tmp_path}", "data=files", f"data.paths=[{tmp_path / 'text.txt'}]"]


def _plan(base: list[str], *overrides: str) -> dict[str, Planned]:
    config = compose_run([*base, *GRID, *overrides])
    run = RunFolder(Path(config.runs_dir) / "none")
    names = [stage.name for stage in stages_of_search(config, run)]
    return {item.stage.name: item for item in plan_search(config, run, names, {})}


def test_stages_of_a_search(base: list[str]) -> None:
    of_one = ["prune", "eval_pruned", "distill_8"]
    assert list(_plan(base)) == [*SHARED, *(f"search/{name}/{stage}" for name in (A, B) for stage in of_one)]
    halved = _plan(base, "search.halving.rungs=2")
    assert [name for name in halved if A in name][2:] == [f"search/{A}/distill_4", f"search/{A}/distill_8"]
    # Where a rung stops does not depend on who goes on, so a search without halving reads the same last stage.
    assert halved[f"search/{A}/distill_8"].identity == _plan(base)[f"search/{A}/distill_8"].identity
    cached = _plan(base, "distill.teacher.source=cached")
    assert list(cached)[:5] == [*SHARED, "teacher_logits"]
    assert "teacher_logits" in cached[f"search/{B}/distill_8"].identity.inputs
    assert "score" not in _plan(base, "prune.ranking=random")
    assert "correct" in _plan(base, "correction.enabled=true")[f"search/{A}/distill_8"].identity.inputs


def test_what_comes_before_the_candidates_is_the_lines_own(base: list[str]) -> None:
    config = compose_run([*base, *GRID])
    run = RunFolder(Path(config.runs_dir) / "none")
    line = {item.stage.name: item.identity for item in plan_stages(stages_of(config), config, run, LINE)}
    search = _plan(base)
    assert {name: search[name].identity for name in SHARED} == {name: line[name] for name in SHARED}
    winner = compose_run([*base, "prune.hidden_size=56", "prune.num_query_groups=4"])
    [pruned] = [i for i in plan_stages(stages_of(winner), winner, run, LINE) if i.stage.name == "prune"]
    assert pruned.identity.values == search[f"search/{B}/prune"].identity.values
    assert pruned.identity.inputs == search[f"search/{B}/prune"].identity.inputs


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("search.workers=2", ""),
        ("search.max_candidates=3", ""),
        ("search.distill_best=1", ""),
        ("distill.train.num_tokens=256000", ""),
        ("distill.train.eval_tokens=128", ""),
        ("eval.num_tokens=512", "eval_teacher"),
        ("search.eval_tokens=256", "eval_pruned distill_8"),
        ("search.lr_warmup_steps=1", "distill_8"),
        ("distill.train.lr=2e-3", "distill_8"),
        ("prune.hidden_norms=[input]", "prune eval_pruned distill_8"),
    ],
)
def test_what_a_setting_changes(base: list[str], override: str, changed: str) -> None:
    before, after = _plan(base), _plan(base, override)
    assert list(before) == list(after)
    different = [name for name in before if before[name].identity.digest != after[name].identity.digest]
    expected = [name for name in before if name.rsplit("/", 1)[-1] in changed.split()]
    assert different == expected


def test_a_candidate_stays_with_one_worker(base: list[str]) -> None:
    planned = list(_plan(base).values())
    of_one = ("prune", "eval_pruned", "distill_8")
    assert deal(planned, 2) == [[*SHARED, *(f"search/{A}/{s}" for s in of_one)], [f"search/{B}/{s}" for s in of_one]]
    assert deal(planned[-3:], 3) == [[f"search/{B}/{s}" for s in of_one]]
    assert deal([], 2) == []


def test_jobs_side_by_side_share_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("minitron.runtime.env.num_cores", lambda: 16)
    places = [place_environment(place, 4, 2, uses_cuda=True) for place in range(4)]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0,1", "2,3", "4,5", "6,7"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    second = place_environment(1, 2, 1, uses_cuda=True)
    assert (second["CUDA_VISIBLE_DEVICES"], second["OMP_NUM_THREADS"]) == ("5", "1")
    assert place_environment(1, 2, 1, uses_cuda=False)["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_latencies_count_for_what_they_were_measured_for(base: list[str]) -> None:
    """Candidates are known once the benchmark is done; another grid or load needs another one."""
    measured = [*base, *GRID, "search.latency.source=measured", "search.budget.latency_ms.max=5"]
    config = compose_run(measured)
    run = RunFolder(Path(config.runs_dir) / "tiny")
    assert [stage.name for stage in stages_of_search(config, run)] == [
        "import",
        LATENCY,
        "data",
        "eval_teacher",
        "score",
    ]
    first = next(search_plans(config, run, {}))
    assert [item.stage.name for item in first] == ["import", LATENCY]
    for item in first:
        run.begin(item.identity, resumable=False)
        if item.stage.name == LATENCY:
            widths = {"h48-f96-a4-g4": (1, 1), "h56-f96-a4-g4": (2, 1)}  # 3 layers: 4 and 7 ms
            text = json.dumps({name: {"layer_ms": layer, "rest_ms": rest} for name, (layer, rest) in widths.items()})
            (run.path / ".partial" / LATENCY / "latency.json").write_text(text)
        run.finish(item.identity, summary={}, seconds=1.0, environment={})
    names = [stage.name for stage in stages_of_search(config, run) if stage.name.endswith("/prune")]
    assert names == [f"search/{A}/prune"]
    for other in ("search.grid.ffn_hidden_size=[96,64]", "search.serving.batch_size=2"):
        changed = compose_run([*measured, other])
        assert LATENCY in [stage.name for stage in stages_of_search(changed, run)]
        assert not any(stage.name.endswith("/prune") for stage in stages_of_search(changed, run))
        with pytest.raises(ArtefactError, match=r"search/latency was made with other inputs \(search\."):
            next(search_plans(changed, run, {}))


@pytest.fixture
def refused(base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run `minitron search`, expect an error before any rank starts, and return its one line."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*overrides: str) -> str:
        assert main(["search", *base, "device=cpu", *overrides]) == 3
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return run


def test_mistakes_before_any_work(refused: Callable[..., str]) -> None:
    assert refused().startswith("minitron search has no grid; give at least one axis, such as")
    nothing = refused(*GRID, "search.budget.parameters.min=1e6")
    assert nothing.startswith(f"search: no shape of 2 meets search.budget; nearest: {B} (parameters=")
    assert refused(*GRID, "search.max_candidates=1").startswith("search: 2 shapes of 2 meet the budget, more than")
    large = refused("search.grid.hidden_size=[72]", *GRID[1:])
    assert (
        "no shape of 1 is left (1 by not fitting the source), for instance hidden_size=72: prune.hidden_size" in large
    )
    assert "start minitron search with launch=local" in refused(*GRID, "search.workers=2", "launch=torchrun")
    layer = refused(*GRID, "search.grid.num_layers=[2,3]", "distill.intermediate.block_output=['3:2']")
    assert layer.startswith("search: L2-h48-f96-a4-g4: ")


def test_ranks_that_are_there_already_cannot_work_side_by_side(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert "search.workers=2 starts ranks of its own, on this machine; set it to 1 with torchrun" in refused(
        *GRID, "search.workers=2"
    )
