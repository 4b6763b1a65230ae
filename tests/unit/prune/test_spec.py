import json
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.prune import PruneConfig, Ranking
from minitron.errors import PruneError
from minitron.prune.ranking import choose
from minitron.prune.spec import PruneSpec, read_units, write_units
from tests.unit.prune.reference import shape


def pruned() -> PruneSpec:
    config = PruneConfig(
        ranking=Ranking.random,
        num_layers=3,
        hidden_size=15,
        ffn_hidden_size=10,
        num_attention_heads=3,
        num_query_groups=3,
    )
    return choose(shape(), config, scores=None, source_id="abc")


@pytest.mark.parametrize(
    ("units", "text"),
    [([], ""), ([4], "4"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9, 11, 12], "0,2-3,9,11-12")],
)
def test_units_as_text(units: list[int], text: str) -> None:
    assert write_units(units) == text
    assert read_units(text) == units


def test_round_trip_and_hash(tmp_path: Path) -> None:
    spec = pruned()
    spec.save(tmp_path / "spec.json")
    again = PruneSpec.load(tmp_path / "spec.json")
    assert again == spec
    assert again.content_hash() == spec.content_hash()
    assert replace(spec, source_id="other").content_hash() != spec.content_hash()


def test_file_has_one_line_per_list(tmp_path: Path) -> None:
    PruneSpec.identity(shape(num_layers=2)).save(tmp_path / "spec.json")
    lines = (tmp_path / "spec.json").read_text().splitlines()
    assert lines.count('    "0-19",') == 1
    assert lines.count('    "0-19"') == 1
    assert '  "hidden": "0-23",' in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 1]}, "layers keeps 2 units, but the target has 3"),
        ({"layers": [0, 2, 1]}, "layers are not in increasing order"),
        ({"layers": [0, 1, 4]}, "reach from 0 to 4, but the source has units 0 to 3"),
        ({"hidden": [0] * 15}, "hidden are not in increasing order"),
        ({"ffn": [list(range(10))]}, "ffn has 1 lists for 3 kept layers"),
        ({"heads": [[0, 2, 6]] * 3, "groups": [[0, 1, 2]] * 3}, "query group 2 keeps 0 heads, not 1"),
        ({"heads": [[0, 1, 2]] * 3, "groups": [[0, 1, 2]] * 3}, "query group 0 keeps 2 heads, not 1"),
        ({"source": shape(kv_channels=2)}, "kv_channels changes from 2 to 4"),
    ],
)
def test_specs_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        replace(pruned(), **changes).validate()  # type: ignore[arg-type]


def test_unreadable_specs(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    with pytest.raises(PruneError, match="no readable prune spec"):
        PruneSpec.load(path)
    path.write_text("[]")
    with pytest.raises(PruneError, match="no readable prune spec"):
        PruneSpec.load(path)
    pruned().save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format": 9}))
    with pytest.raises(PruneError, match="format 9 is not 1"):
        PruneSpec.load(path)
    path.write_text(json.dumps({**values, "hidden": "0-99"}))
    with pytest.raises(PruneError, match="hidden keeps 100 units"):
        PruneSpec.load(path)
