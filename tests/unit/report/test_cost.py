"""The papers' own figures come out of the cost model from their inputs."""

import pytest

from minitron.errors import ConfigError
from minitron.report.ablation import token_saving
from minitron.report.cost import TeacherCost, family_saving, six_nd, two_nd
from minitron.report.data import TrainingCurve

FLOPS_PER_STEP = [4.4e17, 2.5e17, 1.2e17]
"""15B, 8B and 4B at 1152 sequences of 4096 tokens (arXiv 2407.14679, section 4.1)."""
BATCH_TOKENS = 1152 * 4096


def test_flops_of_a_step_are_6nd() -> None:
    assert six_nd(15.6e9, BATCH_TOKENS) == pytest.approx(FLOPS_PER_STEP[0], rel=0.01)
    assert two_nd(15.6e9, BATCH_TOKENS) == pytest.approx(FLOPS_PER_STEP[0] / 3, rel=0.01)


@pytest.mark.parametrize(("teacher", "saving"), [(None, 1.80), (TeacherCost(), 1.77)])
def test_saving_of_the_papers_family(teacher: TeacherCost | None, saving: float) -> None:
    assert round(family_saving(FLOPS_PER_STEP, 40, teacher=teacher), 2) == saving


@pytest.mark.parametrize(
    ("scratch_tokens", "distilled_tokens"),
    [
        (3.8e12, 20_000 * BATCH_TOKENS),  # Nemotron-3 8B against MINITRON 8B and its 94B tokens, table 2
        (15e12, 380e9),  # arXiv 2408.11796
    ],
)
def test_token_saving_of_the_papers(scratch_tokens: float, distilled_tokens: float) -> None:
    """Both runs end with the same loss; half-way there the one from scratch is not as low."""
    scratch = _curve({scratch_tokens / 2: 2.1, scratch_tokens: 2.0})
    saving = token_saving(_curve({distilled_tokens / 2: 2.2, distilled_tokens: 2.0}), scratch)
    assert not saving.is_bound
    assert saving.ratio == pytest.approx(40, rel=0.02)
    # The family of the first paper, its token saving computed, not given.
    assert round(family_saving(FLOPS_PER_STEP, saving.ratio, teacher=None), 1) == 1.8


def _curve(heldout: dict[float, float]) -> TrainingCurve:
    tokens, losses = [round(number) for number in heldout], list(heldout.values())
    return TrainingCurve(
        objective="", tokens=tokens, loss=losses, heldout_tokens=tokens, heldout_loss=losses, tokens_per_s=None
    )


def test_no_tokens_saved_saves_only_nothing() -> None:
    assert family_saving([8.0, 4.0], 1, teacher=None) == 1.0
    assert family_saving([6.0, 3.0], 1, teacher=TeacherCost()) == pytest.approx(9 / (6 + 3 + 2))


@pytest.mark.parametrize(
    ("teacher", "flops"),
    [
        (TeacherCost(size=2.0), 2 * 18 * 0.5 * 2),  # 18 parameters run beside both
        (TeacherCost(shared=True, passes=0.5), 2 * 9 * 0.5 * 0.5),  # one pass over half of the tokens
        (TeacherCost(correction=0.25), 2 * 9 * 0.5 * 2 + 6 * 9 * 0.125),  # a quarter of the tokens, once
    ],
)
def test_teachers_share_of_a_family_by_hand(teacher: TeacherCost, flops: float) -> None:
    """Of 9, 6 and 3 parameters, the smaller two learn on half the tokens."""
    students = 6 * (6 + 3) * 0.5
    saving = family_saving([9.0, 6.0, 3.0], 2, teacher=teacher)
    assert saving == pytest.approx(6 * (9 + 6 + 3) / (6 * 9 + students + flops), rel=1e-12)


@pytest.mark.parametrize(("sizes", "saving"), [([8.0], 40.0), ([8.0, 4.0], 0.0)])
def test_impossible_family_is_refused(sizes: list[float], saving: float) -> None:
    with pytest.raises(ConfigError, match=r"a family's saving needs two models or more and a token saving above 0"):
        family_saving(sizes, saving, teacher=TeacherCost())
