"""Scores of every family on Megatron-Core, against activations of transformers."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.score import Aggregation, ScoreConfig
from tests.helpers.pool import WorkerPool
from tests.unit.prune import workers
from tests.unit.prune.reference import FAMILIES, canonical, hf_model, logits, shape, tokens, write_checkpoint

SEEN = {
    "input_layernorm": ("norm", "output"),
    "post_attention_layernorm": ("norm", "output"),
    "self_attn.o_proj": ("head", "input"),
    "mlp.down_proj": ("ffn", "input"),
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "nemotron"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1)])
def test_scores_match_transformers(pool: WorkerPool, tmp_path: Path, family: str, tp: int, pp: int) -> None:
    model = shape(vocab_size=48, **FAMILIES[family])
    reference = hf_model(model).float().double()  # weights that fp32 holds exactly, computing in fp64
    floats = {key: tensor.float() for key, tensor in canonical(reference, model).items()}
    source = write_checkpoint(tmp_path / "source", floats, model)
    sequences_BS = tokens(model, batch=5, length=12)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    config = ScoreConfig(micro_batch_size=2)
    have = pool.run(workers.score, tp * pp, source, sequences_BS, parallel, config)[0]
    seen, states = activations(reference, model, sequences_BS)
    width = have.width[Aggregation.l2_mean]
    heads = [a.unflatten(2, (model.num_attention_heads, -1)).norm(dim=3) for a in seen["head"]]
    np.testing.assert_allclose(width.hidden, l2_mean(seen["norm"]), rtol=1e-6)
    np.testing.assert_allclose(width.ffn, l2_mean(seen["ffn"]), rtol=1e-6)
    np.testing.assert_allclose(width.head, l2_mean(heads), rtol=1e-6)
    cosine = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(states)]
    np.testing.assert_allclose(have.layer, [float(1 - c.mean()) for c in cosine], rtol=1e-6)


def l2_mean(activations_BSX: list[Tensor]) -> np.ndarray:
    return np.stack([a.abs().mean(1).norm(dim=0).numpy() for a in activations_BSX])


def activations(
    reference: Any, model: ModelConfig, sequences_BS: Tensor
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Activations [B, S, X] by axis, in layer order; and the hidden states around the layers."""
    seen: dict[str, list[Tensor]] = {"norm": [], "head": [], "ffn": []}
    states: list[Tensor] = []

    def keep(axis: str, what: str) -> Any:
        return lambda _module, args, output: seen[axis].append(args[0] if what == "input" else output)

    for layer in reference.model.layers:
        for name, (axis, what) in SEEN.items():
            layer.get_submodule(name).register_forward_hook(keep(axis, what))
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    reference.model.norm.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
    logits(reference, sequences_BS)
    assert len(states) == model.num_layers + 1
    return seen, states


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_expert_scores_by_formula(pool: WorkerPool, tmp_path: Path, axes: tuple[int, int, int]) -> None:
    """At layouts (TP, PP, DP), in micro-batches of other sizes."""
    model = shape(vocab_size=48, **FAMILIES["qwen3_moe"])
    reference = hf_model(model).float().double().requires_grad_(False)
    floats = {key: tensor.float() for key, tensor in canonical(reference, model).items()}
    source = write_checkpoint(tmp_path / "source", floats, model)
    sequences_BS = tokens(model, batch=5, length=12)
    parallel = ParallelConfig(
        tensor_model_parallel_size=axes[0], pipeline_model_parallel_size=axes[1], data_parallel_size=axes[2]
    )
    config = ScoreConfig(micro_batch_size=3 - axes[1])
    have = pool.run(workers.score, math.prod(axes), source, sequences_BS, parallel, config)[0]
    inputs: list[Tensor] = []
    for layer in reference.model.layers:
        layer.mlp.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    logits(reference, sequences_BS)
    width = have.width[Aggregation.l2_mean]
    assert have.expert is not None
    for number, (layer, x_BSH) in enumerate(zip(reference.model.layers, inputs, strict=True)):
        weights_BSE = routing_weights(x_BSH @ layer.mlp.gate.weight.T, top_k=2)
        for expert in range(6):
            gate, up = (x_BSH @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner_BSF = torch.nn.functional.silu(gate) * up * weights_BSE[..., expert, None]
            norms_BS = (inner_BSF @ layer.mlp.experts.down_proj[expert].T).norm(dim=-1)
            routed = weights_BSE[..., expert] > 0
            assert routed.any()
            neurons = slice(expert * 10, expert * 10 + 10)
            np.testing.assert_allclose(width.ffn[number, neurons], l2_mean([inner_BSF])[0], rtol=1e-6)
            np.testing.assert_allclose(have.expert[number, expert], float(norms_BS[routed].mean()), rtol=1e-6)


def routing_weights(logits_BSE: Tensor, *, top_k: int) -> Tensor:
    """Softmax over the chosen experts, 0 for the others."""
    lowest = logits_BSE.topk(top_k, dim=-1).values[..., -1:]
    return logits_BSE.masked_fill(logits_BSE < lowest, -torch.inf).softmax(-1)
