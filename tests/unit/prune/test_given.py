"""A prune spec from the user: what of it is checked, and against what."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.prune import HeadResidual, PruneConfig, Ranking, check_target
from minitron.errors import ConfigError, PruneError
from minitron.prune.given import at_random, given_identity, load_given, target_of
from minitron.prune.ranking import choose
from minitron.prune.spec import PruneSpec
from tests.unit.prune.reference import shape

MODEL = shape()
SIZES = PruneConfig(ranking=Ranking.random, drop_layers=[3], hidden_size=16, ffn_hidden_size=10)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    choose(MODEL, SIZES, scores=None, source_id="abc").save(tmp_path / "spec.json")
    return tmp_path / "spec.json"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_given_spec_decides_the_target(given: Path) -> None:
    target = check_target(MODEL, SIZES)
    assert target_of(MODEL, SIZES) == target
    assert target_of(MODEL, PruneConfig(spec=str(given))) == target
    assert not PruneConfig(spec=str(given)).needs_scores


def test_an_edited_spec_is_taken_as_it_is(given: Path) -> None:
    before = given_identity(PruneConfig(spec=str(given)))
    edit(given, layers="1-3")
    assert load_given(given, MODEL, source_id="abc").layers == [1, 2, 3]
    after = given_identity(PruneConfig(spec=str(given)))
    assert after != before
    moved = given.rename(given.with_name("moved.json"))  # its content counts, not its place
    assert given_identity(PruneConfig(spec=str(moved))) == after
    assert given_identity(PruneConfig()) == {}


def test_what_does_not_fit(given: Path) -> None:
    with pytest.raises(PruneError, match=r"was made for weights of hash abc, but this run's source has def; give"):
        load_given(given, MODEL, source_id="def")
    edit(given, source_id="")
    with pytest.raises(PruneError, match="hash none, but this run's source has def"):
        load_given(given, MODEL, source_id="def")
    with pytest.raises(PruneError, match=r"another architecture .* whose num_layers is 5, not 4, ffn_hidden_size is 9"):
        load_given(given, replace(MODEL, num_layers=5, ffn_hidden_size=9))
    edit(given, hidden="0-14", target={**PruneSpec.load(given).target.to_dict(), "hidden_size": 15})
    with pytest.raises(PruneError, match=r"spec.json: .*15 / 8 leaves 7\), which transformers' LlamaConfig needs"):
        load_given(given, MODEL)
    with pytest.raises(PruneError, match=r"none.json is no readable prune spec"):
        target_of(MODEL, PruneConfig(spec=str(given.with_name("none.json"))))


@pytest.mark.parametrize(
    ("values", "undo"),
    [
        ({"hidden_size": 16}, "prune.hidden_size=null"),
        ({"num_layers": 3, "drop_layers": [0]}, "prune.num_layers=null prune.drop_layers=null"),
        ({"head_residual": HeadResidual.laco}, "prune.head_residual=none"),
    ],
)
def test_a_spec_stands_alone(values: dict[str, object], undo: str) -> None:
    with pytest.raises(ConfigError, match=f"so other settings of prune would not be read; set {undo}$"):
        PruneConfig(spec="spec.json", **values)  # type: ignore[arg-type]


def test_the_control_keeps_as_many_units_at_random(given: Path) -> None:
    control = at_random(PruneConfig(spec=str(given)))
    assert (control.spec, control.ranking) == (None, Ranking.random)
    assert check_target(MODEL, control) == check_target(MODEL, SIZES)
    assert at_random(replace(SIZES, ranking=Ranking.importance)) == SIZES
