from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.parallel import ParallelConfig
from minitron.errors import ArtefactError
from minitron.search import measure as measure_module
from minitron.search.latency import WidthLatency, read_latencies
from tests.helpers.pool import WorkerPool
from tests.unit.search.workers import MODEL, WIDE, measure


def test_a_models_latency_is_its_layers_and_the_rest() -> None:
    assert WidthLatency(layer_ms=2.0, rest_ms=5.0).of(10) == 25.0


@pytest.mark.parametrize(
    ("shallow_ms", "deep_ms", "want"),
    [(7.0, 13.0, WidthLatency(layer_ms=3.0, rest_ms=4.0)), (7.0, 6.5, WidthLatency(layer_ms=0.0, rest_ms=7.0))],
    ids=["one layer and three", "noise: three were quicker than one"],
)
def test_a_layer_takes_half_of_what_two_more_take(
    monkeypatch: pytest.MonkeyPatch, shallow_ms: float, deep_ms: float, want: WidthLatency
) -> None:
    times = {1: shallow_ms, 3: deep_ms}
    monkeypatch.setattr(measure_module, "_batch_ms", lambda _session, model, *_rest: times[model.num_layers])
    assert measure_module._measure(None, MODEL, None, None, None) == want  # type: ignore[arg-type]


def test_every_width_is_measured_once_in_any_layout(pool: WorkerPool, tmp_path: Path) -> None:
    """A pipeline's ranks measure whole models all the same, and only one of them writes."""
    assert pool.run(measure, 2, tmp_path, ParallelConfig(pipeline_model_parallel_size=2)) == [2, 2]
    latency = read_latencies(tmp_path)
    assert all(latency(model) > 0 for model in (MODEL, WIDE))
    with pytest.raises(KeyError):
        latency(replace(MODEL, ffn_hidden_size=16))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text('{"h16": {"layer_ms": 1')
    with pytest.raises(ArtefactError, match=r"latency.json cannot be read .*; delete .* and run minitron search again"):
        read_latencies(tmp_path)
