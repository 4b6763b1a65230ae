"""The experiments' shapes made small, in proportion."""

from pathlib import Path

import pytest

from minitron.config.compose import compose_run, load_resolved, to_yaml
from minitron.config.line import CorrectionConfig
from minitron.config.model import Architecture
from minitron.config.prune import PruneConfig
from minitron.config.reconstruct import ReconstructConfig
from minitron.config.run import SourceKind
from minitron.config.scale import ScaleConfig
from minitron.config.trainings import settings_of
from minitron.errors import ConfigError

NEMO = "experiment=mistral_nemo_12b-to-8b"


def test_shapes_keep_their_proportions(tmp_path: Path) -> None:
    run = compose_run([NEMO, "scale=tiny"])
    random = run.source.random
    assert (run.source.kind, run.source.model, run.name) == (SourceKind.random, None, "mistral_nemo_12b-to-8b_tiny")
    assert random.architecture is Architecture.mistral
    assert (random.num_layers, random.hidden_size, random.ffn_hidden_size) == (5, 80, 224)
    assert (random.num_attention_heads, random.num_query_groups, random.kv_channels) == (8, 2, 8)
    assert not random.share_embeddings_and_output_weights
    sliced = ReconstructConfig(enabled=False, micro_batch_size=1)
    assert run.prune == PruneConfig(hidden_size=64, ffn_hidden_size=180, reconstruct=sliced)
    assert run.scale == ScaleConfig()  # done once: what is written down is an ordinary run
    (tmp_path / "resolved.yaml").write_text(to_yaml(run))
    assert load_resolved(tmp_path / "resolved.yaml") == run


def test_the_recipe_stays_the_experiment_s() -> None:
    large, small = compose_run([NEMO]), compose_run([NEMO, "scale=tiny"])
    for name in ("lr", "min_lr", "weight_decay", "adam_beta2", "clip_grad"):
        assert getattr(small.distill.train, name) == getattr(large.distill.train, name)
    assert small.correction.enabled
    assert small.correction.lr_scale == large.correction.lr_scale
    assert small.distill.logit_loss == large.distill.logit_loss
    assert compose_run([NEMO, "scale=tiny", "distill.train.lr=1e-3"]).distill.train.lr == 1e-3


def test_dropped_layers_stay_the_middle_block() -> None:
    assert compose_run(["experiment=llama31_8b-to-4b_depth", "scale=tiny"]).prune.drop_layers == [1, 2]
    finer = compose_run(["experiment=llama31_8b-to-4b_depth", "scale=tiny", "scale.depth=2"])
    assert finer.source.random.num_layers == 16
    assert finer.prune.drop_layers == list(range(7, 15))


def test_steps_of_a_chain_are_scaled() -> None:
    chain = "chain=[{name: a, prune: {hidden_size: 2048, num_layers: 24}, num_tokens: 1000000000000}]"
    [step] = compose_run([NEMO, "scale=tiny", chain]).chain
    assert (step.prune.hidden_size, step.prune.num_layers, step.num_tokens) == (32, 3, None)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["scale=tiny", "source.kind=random"], "source.model is not set"),
        ([NEMO, "scale=tiny", "scale.depth=7"], "source.model.num_layers=40 is not a multiple of 7"),
        ([NEMO, "scale=tiny", "prune.hidden_size=4100"], "prune.hidden_size=4100 is not a multiple of 64"),
        ([NEMO, "scale=tiny", "scale.heads=3"], "scale.width=64 must be a multiple of scale.heads=3"),
        ([NEMO, "scale.depth=0"], "scale.depth=0 must be at least 1"),
        ([NEMO, "plan.utilization=1.5"], "plan.utilization=1.5 must be above 0 and at most 1"),
        ([NEMO, "plan.peak_tflops=0"], "plan.peak_tflops=0.0 must be a number above 0"),
        ([NEMO, "preflight.outlier_share=1"], "preflight.outlier_share=1.0 must lie in [0, 1)"),
        (
            ["experiment=tiny", "correction.enabled=true", "correction.lr_scale=0.05"],
            "last learning rate 0.0001 (correction.min_lr, null: distill.train.min_lr) is above its peak 5e-05",
        ),
        (["experiment=tiny", "correction.enabled=true", "correction.min_lr=-1"], "correction.min_lr=-1"),
        ([NEMO, "correction.lr_warmup_steps=-1"], "correction.lr_warmup_steps=-1 must be at least 0"),
    ],
)
def test_impossible_scale_is_one_line(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_correction_lowers_the_peak_and_not_the_end() -> None:
    """arXiv 2408.11796: a fifth of the peak learning rate, the original training's last one."""
    base = ["experiment=tiny", "correction.enabled=true", "distill.train.lr=1e-3", "distill.train.min_lr=1e-4"]
    corrected = settings_of(compose_run(base), "correct")
    assert (corrected.lr, corrected.min_lr) == (pytest.approx(2e-4), 1e-4)
    given = compose_run([*base, "correction.min_lr=3e-6"])
    assert settings_of(given, "correct").min_lr == 3e-6
    assert settings_of(given, "distill").min_lr == 1e-4


def test_correction_warms_up_by_itself() -> None:
    run = compose_run(["experiment=llama31_8b-to-4b_width"])
    assert settings_of(run, "correct").lr_warmup_steps == 120
    assert settings_of(run, "correct").lr == pytest.approx(6e-5)  # a fifth of Llama's 3e-4
    assert settings_of(run, "distill").lr_warmup_steps == 40
    tokens = compose_run(
        [
            "experiment=llama31_8b-to-4b_width",
            "distill.train.lr_warmup_steps=0",
            "distill.train.lr_warmup_tokens=94371840",
        ]
    )
    assert settings_of(tokens, "correct").warmup_steps(8192) == 120
    assert settings_of(tokens, "distill").warmup_steps(8192) == 10
    assert CorrectionConfig().lr_warmup_steps is None
