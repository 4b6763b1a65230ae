from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.parallel import ParallelConfig
from minitron.errors import ArtefactError
from minitron.search.latency import WidthLatency, read_latencies
from tests.helpers.pool import WorkerPool
from tests.unit.search.workers import MODEL, WIDE, measure


def test_a_models_latency_is_its_layers_and_the_rest() -> None:
    assert WidthLatency(layer_ms=2.0, rest_ms=5.0).of(10) == 25.0


def test_every_width_is_measured_once_in_any_layout(pool: WorkerPool, tmp_path: Path) -> None:
    """A pipeline's ranks measure whole models all the same, and only one of them writes."""
    assert pool.run(measure, 2, tmp_path, ParallelConfig(pipeline_model_parallel_size=2)) == [2, 2]
    latency = read_latencies(tmp_path)
    for model in (MODEL, WIDE):
        four, eight, twelve = (latency(replace(model, num_layers=layers)) for layers in (4, 8, 12))
        assert 0 < four <= eight <= twelve
        assert twelve - eight == pytest.approx(eight - four)
    with pytest.raises(KeyError):
        latency(replace(MODEL, ffn_hidden_size=16))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text('{"h16": {"layer_ms": 1')
    with pytest.raises(ArtefactError, match=r"latency.json cannot be read .*; delete .* and run minitron search again"):
        read_latencies(tmp_path)
