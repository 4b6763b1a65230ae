"""Pairs of layers: how they are written, what they resolve to, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from minitron.cli.job import check_models
from minitron.config.compose import compose_run, load_resolved, to_yaml
from minitron.config.intermediate import IntermediateConfig, Match, State, StateKind, find_matches, log_names
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.errors import ConfigError

TEACHER = ModelConfig(
    architecture=Architecture.llama,
    num_layers=32,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=100,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rotary_base=1e4,
)
STUDENT = replace(TEACHER, num_layers=16, num_attention_heads=8)


def pair(kind: StateKind, teacher: int, student: int) -> Match:
    return Match(State(kind, teacher), State(kind, student))


def test_pairs_and_rules() -> None:
    config = IntermediateConfig(
        embedding=True, block_output=["last-2", "0:0"], mlp_input=["31:last"], attention_relations=["last-1:3"]
    )
    assert find_matches(config, TEACHER, STUDENT, ParallelConfig()) == [
        pair(StateKind.embedding, 0, 0),
        pair(StateKind.block_output, 29, 13),  # as in table 17 of arXiv 2407.14679
        pair(StateKind.block_output, 0, 0),
        pair(StateKind.mlp_input, 31, 15),
        pair(StateKind.attention_relations, 30, 3),
    ]


def test_a_pair_is_logged_by_its_layers_where_its_kind_has_several() -> None:
    config = IntermediateConfig(embedding=True, block_output=["last-2", "0:0"], mlp_input=["31:last"])
    names = log_names(find_matches(config, TEACHER, STUDENT, ParallelConfig()))
    assert list(names.values()) == ["embedding", "block_output.29:13", "block_output.0:0", "mlp_input"]


@pytest.mark.parametrize(
    ("kind", "layer", "stage"),
    [
        (StateKind.embedding, 0, 0),
        (StateKind.block_output, 6, 0),  # seen at block 7, the last of the first stage
        (StateKind.block_output, 7, 1),  # seen at block 8, on the next stage
        (StateKind.block_output, 15, 1),  # seen at the final norm
        (StateKind.mlp_input, 7, 0),
        (StateKind.mlp_input, 8, 1),
    ],
)
def test_stage_that_sees_a_state(kind: StateKind, layer: int, stage: int) -> None:
    assert State(kind, layer).stage([8, 8]) == stage


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_output": ["32:13"]}, r"block_output: 32:13 .*layer 32 of the teacher, whose layers are 0 to 31"),
        ({"block_output": ["29:16"]}, r"29:16 .*layer 16 of the student, whose layers are 0 to 15"),
        ({"mlp_input": ["last-16"]}, r"mlp_input: last-16 .*layer -1 of the student, whose layers are 0 to 15"),
        ({"mlp_input": ["29-13"]}, r"'29-13' is no pair .*29:13"),
        ({"block_output": ["1753"]}, r"'1753' is no pair .*in YAML with quotes"),
        ({"block_output": ["29:13", "last-2"]}, r"29:13 is there twice"),
        ({"attention_relations": ["last"], "relation_heads": 6}, r"relation_heads=6 .*\[64, 128, 192\].*\[1, 2, 4, 8,"),
        ({"weight": 0.0}, r"weight=0.0 must be above 0"),
        ({"relation_heads": 0}, r"relation_heads=0 must be at least 1"),
    ],
)
def test_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        find_matches(IntermediateConfig(**values), TEACHER, STUDENT, ParallelConfig())  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_relation_heads_are_split_over_tensor_parallel_ranks() -> None:
    config = IntermediateConfig(attention_relations=["last"], relation_heads=8)
    assert find_matches(config, TEACHER, STUDENT, ParallelConfig(tensor_model_parallel_size=4))
    with pytest.raises(ConfigError, match=r"multiple of parallel.tensor_model_parallel_size=4; such numbers: \[4, 8,"):
        find_matches(replace(config, relation_heads=2), TEACHER, STUDENT, ParallelConfig(tensor_model_parallel_size=4))


def test_pairs_survive_the_resolved_file(tmp_path: Path) -> None:
    run = compose_run(["experiment=tiny", "distill.intermediate.block_output=[29:13,last-2]"])
    assert run.distill.intermediate.block_output == ["29:13", "last-2"]
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(run))  # an unquoted 29:13 is the number 1753 in YAML 1.1
    assert load_resolved(path) == run


def test_a_layer_that_is_not_there_stops_the_run_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="layer 99 of the teacher, whose layers are 0 to 3"):
        check_models(compose_run(["experiment=tiny", "distill.intermediate.mlp_input=[99:0]"]))
