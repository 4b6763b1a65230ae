"""Pruned checkpoints against transformers: masked teacher = pruned student, and hand-made slices."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

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
    canonical,
    llama,
    logits,
    read_checkpoint,
    restore,
    rows_of,
    shape,
    tokens,
    write_checkpoint,
)


def prune(
    teacher: LlamaForCausalLM,
    model: ModelConfig,
    config: PruneConfig,
    folder: Path,
    scores: Scores | None = None,
) -> tuple[LlamaForCausalLM, PruneSpec]:
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


def assert_same(have: Tensor, want: Tensor) -> None:
    assert want.std() > 0.1
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


def test_ffn_masked_teacher_is_the_pruned_student(tmp_path: Path) -> None:
    model = shape()
    teacher = llama(model)
    student, spec = prune(teacher, model, PruneConfig(ffn_hidden_size=7), tmp_path)
    for layer, kept in zip(teacher.model.layers, spec.ffn, strict=True):
        mask(layer.mlp.down_proj, torch.tensor(kept))
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (2, 2), (1, 1)])
def test_heads_masked_teacher_is_the_pruned_student(tmp_path: Path, heads: int, groups: int) -> None:
    model = shape()
    teacher = llama(model)
    config = PruneConfig(num_attention_heads=heads, num_query_groups=groups)
    student, spec = prune(teacher, model, config, tmp_path)
    for layer, kept in zip(teacher.model.layers, spec.heads, strict=True):
        mask(layer.self_attn.o_proj, rows_of(kept, model.kv_channels))
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


def test_depth_shortened_teacher_is_the_pruned_student(tmp_path: Path) -> None:
    model = shape()
    teacher = llama(model)
    student, spec = prune(teacher, model, PruneConfig(drop_layers=[1, 2]), tmp_path)
    assert spec.layers == [0, 3]
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[i] for i in spec.layers)
    teacher.config.num_hidden_layers = 2
    assert_same(logits(student, tokens(model)), logits(teacher, tokens(model)))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_is_a_slice_of_the_teacher(tmp_path: Path, tied: bool) -> None:
    """A norm averages over fewer channels afterwards, so masking is no reference; slicing is."""
    model = shape(share_embeddings_and_output_weights=tied)
    teacher = llama(model)
    student, spec = prune(teacher, model, PruneConfig(hidden_size=16), tmp_path)
    kept = torch.tensor(spec.hidden)
    reads = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    state = {}
    for name, weight in teacher.state_dict().items():
        dim = 1 if name.split(".")[-2] in reads else 0  # columns, or rows of what writes the stream
        state[name] = weight.index_select(dim, kept)
    reference = llama(spec.target)
    reference.load_state_dict(state)
    assert_same(logits(student, tokens(model)), logits(reference, tokens(model)))


def test_identity_is_bit_identical(tmp_path: Path) -> None:
    model = shape(share_embeddings_and_output_weights=True)
    tensors = canonical(llama(model), model)
    source = write_checkpoint(tmp_path / "source", tensors, model)
    apply_spec(PruneSpec.identity(model), source=source, out=tmp_path / "out")
    have, target = read_checkpoint(tmp_path / "out")
    assert target == model
    assert have.keys() == tensors.keys()
    assert all(torch.equal(have[key], tensor) for key, tensor in tensors.items())


def permute(teacher: LlamaForCausalLM, model: ModelConfig, scores: Scores) -> LlamaForCausalLM:
    """The same function with units in another order, and the scores along with them (in place)."""
    rng = np.random.default_rng(5)
    state = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    width = scores.width[Aggregation.l2_mean]
    hidden = rng.permutation(model.hidden_size)
    width.hidden[:] = width.hidden[:, hidden]
    reads = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    for name in state:
        dim = 1 if name.split(".")[-2] in reads else 0
        state[name] = state[name].index_select(dim, torch.from_numpy(hidden))
    per_group = model.heads_per_group
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        ffn = rng.permutation(model.ffn_hidden_size)
        heads = np.concatenate([g * per_group + rng.permutation(per_group) for g in range(model.num_query_groups)])
        width.ffn[layer] = width.ffn[layer, ffn]
        width.head[layer] = width.head[layer, heads]
        rows = rows_of(heads.tolist(), model.kv_channels)
        orders = {
            "mlp.gate_proj": (0, torch.from_numpy(ffn)),
            "mlp.up_proj": (0, torch.from_numpy(ffn)),
            "mlp.down_proj": (1, torch.from_numpy(ffn)),
            "self_attn.q_proj": (0, rows),
            "self_attn.o_proj": (1, rows),
        }
        for name, (dim, order) in orders.items():
            key = f"{prefix}{name}.weight"
            state[key] = state[key].index_select(dim, order)
    permuted = llama(model)
    permuted.load_state_dict(state)
    return permuted


def test_permuting_units_before_pruning_changes_nothing(tmp_path: Path) -> None:
    model = shape()
    teacher = llama(model)
    config = PruneConfig(
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
    assert_same(logits(permuted, tokens(model)), logits(teacher, tokens(model)))
    (tmp_path / "b").mkdir()
    other, _ = prune(permuted, model, config, tmp_path / "b", scores)
    assert_same(logits(other, tokens(model)), logits(student, tokens(model)))


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
