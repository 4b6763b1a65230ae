"""Pruned checkpoints against transformers: masked teacher = pruned student, and hand-made slices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.config.prune import PruneConfig
from minitron.config.score import Aggregation
from minitron.errors import CheckpointError, PruneError
from minitron.models.axes import num_parameters
from minitron.prune import slicer
from minitron.prune.ranking import choose
from minitron.prune.scores import Scores, random_scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from tests.unit.prune.reference import (
    FAMILIES,
    canonical,
    hf_model,
    llama,
    load_state,
    logits,
    read_checkpoint,
    restore,
    rows_of,
    shape,
    state_of,
    tokens,
    write_checkpoint,
)

READS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate", "gate_proj", "up_proj", "lm_head")
"""Modules whose weights' columns read the residual stream."""


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return shape(**FAMILIES[request.param])


def prune(
    teacher: Any,
    model: ModelConfig,
    config: PruneConfig,
    folder: Path,
    scores: Scores | None = None,
) -> tuple[Any, PruneSpec]:
    """Prune through checkpoint folders and read the student back into transformers."""
    scores = scores or random_scores(model, Aggregation.l2_mean, 7)
    spec = choose(model, config, scores=scores, source_id=scores.source_id)
    source = write_checkpoint(folder / "source", canonical(teacher, model), model)
    apply_spec(spec, source=source, out=folder / "out")
    tensors, target = read_checkpoint(folder / "out")
    assert target == spec.target
    return restore(tensors, target), spec


def mask(linear: torch.nn.Linear, kept_columns: Tensor) -> None:
    """Zero the columns of a linear that read dropped units."""
    keep = torch.zeros(linear.weight.shape[1], dtype=linear.weight.dtype)
    keep[kept_columns] = 1
    with torch.no_grad():
        linear.weight *= keep


def assert_same(have: Tensor, want: Tensor, *, fp32_inside: bool = False) -> None:
    assert want.std() > 0.1
    tolerance = 1e-5 if fp32_inside else 1e-10
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance / 10)


def test_ffn_masked_teacher_is_the_pruned_student(model: ModelConfig, tmp_path: Path) -> None:
    teacher = hf_model(model)
    student, spec = prune(teacher, model, PruneConfig(ffn_hidden_size=7), tmp_path)
    for layer, kept in zip(teacher.model.layers, spec.ffn, strict=True):
        if model.num_moe_experts:
            mask_F = torch.zeros(model.num_ffn_units, dtype=torch.float64)
            mask_F[kept] = 1
            layer.mlp.experts.down_proj.data *= mask_F.view(model.num_moe_experts, 1, -1)
        else:
            mask(layer.mlp.down_proj, torch.tensor(kept))
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_experts_masked_teacher_is_the_pruned_student(tmp_path: Path, pre_softmax: bool) -> None:
    model = shape(**FAMILIES["qwen3_moe"], moe_router_pre_softmax=pre_softmax)
    teacher = hf_model(model)
    scores = random_scores(model, Aggregation.l2_mean, 7)
    student, spec = prune(teacher, model, PruneConfig(num_moe_experts=4, ffn_hidden_size=8), tmp_path, scores)
    for layer, experts, ffn in zip(teacher.model.layers, spec.experts, spec.ffn, strict=True):
        assert len(experts) == 4
        mask_F = torch.zeros(model.num_ffn_units, dtype=torch.float64)
        mask_F[ffn] = 1
        layer.mlp.experts.down_proj.data *= mask_F.view(6, 1, -1)
        layer.mlp.gate.register_forward_hook(route_among(experts, pre_softmax=pre_softmax))
    assert scores.expert is not None
    assert spec.experts[2] == sorted(np.argsort(scores.expert[2])[2:])
    want = logits(teacher, tokens(model))
    torch.testing.assert_close(logits(student, tokens(model)), want, rtol=1e-5, atol=1e-5)  # fp32 in the router


def route_among(experts: list[int], *, pre_softmax: bool) -> Any:
    """Hook on a router that takes its choice among some of the experts."""

    def hook(_module: object, _args: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits_TE = torch.full_like(output[0], -torch.inf)
        logits_TE[:, experts] = output[0][:, experts]
        weights, chosen = logits_TE.softmax(-1).topk(2)
        return logits_TE, weights if pre_softmax else weights / weights.sum(-1, keepdim=True), chosen

    return hook


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (2, 2), (1, 1)])
def test_heads_masked_teacher_is_the_pruned_student(
    model: ModelConfig, tmp_path: Path, heads: int, groups: int
) -> None:
    teacher = hf_model(model)
    config = PruneConfig(num_attention_heads=heads, num_query_groups=groups)
    student, spec = prune(teacher, model, config, tmp_path)
    for layer, kept in zip(teacher.model.layers, spec.heads, strict=True):
        mask(layer.self_attn.o_proj, rows_of(kept, model.kv_channels))
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


def test_depth_shortened_teacher_is_the_pruned_student(model: ModelConfig, tmp_path: Path) -> None:
    teacher = hf_model(model)
    student, spec = prune(teacher, model, PruneConfig(drop_layers=[1, 2]), tmp_path)
    assert spec.layers == [0, 3]
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[i] for i in spec.layers)
    teacher.config.num_hidden_layers = 2
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_is_a_slice_of_the_teacher(model: ModelConfig, tmp_path: Path, tied: bool) -> None:
    """A norm averages over fewer channels afterwards, so masking is no reference; slicing is."""
    model = replace(model, share_embeddings_and_output_weights=tied)
    teacher = hf_model(model)
    student, spec = prune(teacher, model, PruneConfig(hidden_size=16), tmp_path)
    kept = torch.tensor(spec.hidden)
    state = {name: select_hidden(name, weight, kept) for name, weight in state_of(teacher).items()}
    reference = hf_model(spec.target)
    load_state(reference, state)
    assert_same(logits(student, tokens(model)), logits(reference, tokens(model)))


def select_hidden(name: str, tensor: Tensor, channels: Tensor) -> Tensor:
    """A tensor with other channels of the residual stream: columns, or rows of what writes the stream."""
    module, kind = name.split(".")[-2:]
    if module in ("q_norm", "k_norm") or (module in READS and kind == "bias"):
        return tensor
    return tensor.index_select(1 if module in READS else 0, channels)


def test_identity_is_bit_identical(model: ModelConfig, tmp_path: Path) -> None:
    model = replace(model, share_embeddings_and_output_weights=True)
    tensors = canonical(hf_model(model), model)
    source = write_checkpoint(tmp_path / "source", tensors, model)
    apply_spec(PruneSpec.identity(model), source=source, out=tmp_path / "out")
    have, target = read_checkpoint(tmp_path / "out")
    assert target == model
    assert have.keys() == tensors.keys()
    assert all(torch.equal(have[key], tensor) for key, tensor in tensors.items())


def permute(teacher: Any, model: ModelConfig, scores: Scores) -> Any:
    """The same function with units in another order, and the scores along with them (in place)."""
    rng = np.random.default_rng(5)
    state = {name: weight.clone() for name, weight in state_of(teacher).items()}
    width = scores.width[Aggregation.l2_mean]
    hidden = rng.permutation(model.hidden_size)
    width.hidden[:] = width.hidden[:, hidden]
    for name in state:
        state[name] = select_hidden(name, state[name], torch.from_numpy(hidden))
    per_group = model.heads_per_group
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        heads = np.concatenate([g * per_group + rng.permutation(per_group) for g in range(model.num_query_groups)])
        permute_mlp(state, f"{prefix}mlp.", layer, model, scores, rng)
        width.head[layer] = width.head[layer, heads]
        rows = rows_of(heads.tolist(), model.kv_channels)
        orders = {
            "self_attn.q_proj": (0, rows),
            "self_attn.o_proj": (1, rows),
        }
        for name, (dim, order) in orders.items():
            for key in {f"{prefix}{name}.weight", f"{prefix}{name}.bias"} & state.keys():
                state[key] = state[key].index_select(dim, order)
    permuted = hf_model(model)
    load_state(permuted, state)
    return permuted


def permute_mlp(
    state: dict[str, Tensor], prefix: str, layer: int, model: ModelConfig, scores: Scores, rng: np.random.Generator
) -> None:
    """One layer's experts, and the neurons of each, in another order (in place)."""
    old = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    order = rng.permutation(model.num_moe_experts or 1)
    ffn_EF = scores.width[Aggregation.l2_mean].ffn[layer].reshape(len(order), -1)
    was = ffn_EF.copy()
    if scores.expert is not None:
        scores.expert[layer] = scores.expert[layer, order]
        state[prefix + "gate.weight"] = old[prefix + "gate.weight"][order]
    for new, source in enumerate(order):
        neurons = rng.permutation(model.ffn_hidden_size)
        ffn_EF[new] = was[source, neurons]
        place, place_before = (f"{prefix}experts.{n}." if scores.expert is not None else prefix for n in (new, source))
        for name in ("gate_proj", "up_proj", "down_proj"):
            before = old.get(f"{place_before}{name}.weight")
            if before is not None:
                dim = 1 if name == "down_proj" else 0
                state[f"{place}{name}.weight"] = before.index_select(dim, torch.from_numpy(neurons))


def test_permuting_units_before_pruning_changes_nothing(model: ModelConfig, tmp_path: Path) -> None:
    teacher = hf_model(model)
    config = PruneConfig(
        num_moe_experts=4 if model.num_moe_experts else None,
        num_layers=3,
        hidden_size=12,
        ffn_hidden_size=9,
        num_attention_heads=3,
        num_query_groups=3,
    )
    (tmp_path / "a").mkdir()
    student, _ = prune(teacher, model, config, tmp_path / "a")
    scores = random_scores(model, Aggregation.l2_mean, 7)
    permuted = permute(teacher, model, scores)
    routed = model.num_moe_experts is not None  # transformers' router computes in fp32
    assert_same(logits(permuted, tokens(model)), logits(teacher, tokens(model)), fp32_inside=routed)
    (tmp_path / "b").mkdir()
    other, _ = prune(permuted, model, config, tmp_path / "b", scores)
    assert_same(logits(other, tokens(model)), logits(student, tokens(model)), fp32_inside=routed)


def test_chunks_padding_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the vocabulary are left behind; the size of the chunks does not matter."""
    model = shape()
    tensors = canonical(llama(model), model)
    padded = dict(tensors)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[key] = torch.cat([tensors[key], torch.full((6, model.hidden_size), torch.nan)])
    source = write_checkpoint(tmp_path / "source", padded, model)
    monkeypatch.setattr(slicer, "CHUNK_BYTES", 8 * model.hidden_size * 7)
    steps: list[tuple[int, int]] = []
    apply_spec(
        PruneSpec.identity(model),
        source=source,
        out=tmp_path / "out",
        on_progress=lambda done, total: steps.append((done, total)),
    )
    have, _ = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(have[key], tensor) for key, tensor in tensors.items())
    total = 6 * model.num_layers + 1 + 2 * 8  # six stacked, the final norm, 50 rows in eights of 7
    assert steps == [(n + 1, total) for n in range(total)]


def test_items_are_the_whole_source_once() -> None:
    spec = PruneSpec.identity(shape())
    items = list(slicer.slice_items(spec, dict.fromkeys(_keys(spec), 8)))
    assert len({item for item, _ in items}) == len(items)
    assert sum(num_bytes for _, num_bytes in items) == 8 * num_parameters(spec.source)


def _keys(spec: PruneSpec) -> list[str]:
    return [param.key for param in slicer.params_of(spec.source)]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = shape()
    spec = PruneSpec.identity(model)
    tensors = canonical(llama(model), model)
    source = write_checkpoint(tmp_path / "source", tensors, model)
    other = PruneSpec.identity(replace(model, rotary_base=5.0))
    with pytest.raises(PruneError, match="not the architecture that the prune spec was made for"):
        apply_spec(other, source=source, out=tmp_path / "out")
    key = "decoder.final_layernorm.weight"
    lacking = write_checkpoint(tmp_path / "lacking", {k: t for k, t in tensors.items() if k != key}, model)
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        apply_spec(spec, source=lacking, out=tmp_path / "out")
    extra = write_checkpoint(tmp_path / "extra", {**tensors, "more": torch.zeros(2)}, model)
    with pytest.raises(CheckpointError, match=r"holds 1 tensors .*first: more"):
        apply_spec(spec, source=extra, out=tmp_path / "out")
    wrong = write_checkpoint(tmp_path / "wrong", {**tensors, key: torch.zeros(25)}, model)
    with pytest.raises(CheckpointError, match=r"shape \(25,\), but model.json needs \(24,\)"):
        apply_spec(spec, source=wrong, out=tmp_path / "out")


def test_memory_holds_one_slice_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read is larger than one layer of one parameter, or one chunk of rows."""
    model = shape()
    source = write_checkpoint(tmp_path / "source", canonical(llama(model), model), model)
    monkeypatch.setattr(slicer, "CHUNK_BYTES", 8 * model.hidden_size * 5)
    largest = 0
    read = slicer.CheckpointReader.read

    def watched(self: slicer.CheckpointReader, *args: object) -> Tensor:
        nonlocal largest
        tensor = read(self, *args)  # type: ignore[arg-type]
        largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(slicer.CheckpointReader, "read", watched)
    apply_spec(PruneSpec.identity(model), source=source, out=tmp_path / "out")
    qkv_rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    assert largest == qkv_rows * model.hidden_size  # the largest slice here
