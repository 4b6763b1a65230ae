"""The tokens saved, by hand."""

from minitron.report.ablation import token_saving
from minitron.report.data import TrainingCurve


def _curve(heldout: dict[int, float]) -> TrainingCurve:
    return TrainingCurve(
        objective="",
        tokens=list(heldout),
        loss=list(heldout.values()),
        heldout_tokens=list(heldout),
        heldout_loss=list(heldout.values()),
        tokens_per_s=None,
    )


def test_scratch_run_that_gets_there_gives_the_ratio() -> None:
    saving = token_saving(_curve({50: 4.0, 100: 3.0}), _curve({100: 6.0, 400: 3.5, 900: 3.0, 1000: 2.9}))
    assert (saving.scratch_tokens, saving.ratio, saving.is_bound, saving.text) == (900, 9.0, False, "9.0x")


def test_loss_reached_between_two_validations() -> None:
    saving = token_saving(_curve({100: 3.0}), _curve({400: 4.0, 800: 2.0}))
    assert saving.scratch_tokens == 600


def test_scratch_run_that_never_gets_there_gives_a_bound() -> None:
    saving = token_saving(_curve({100: 3.0}), _curve({100: 6.0, 400: 3.5}))
    assert (saving.scratch_tokens, saving.ratio, saving.is_bound, saving.text) == (400, 4.0, True, "more than 4.0x")
