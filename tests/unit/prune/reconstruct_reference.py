"""Reconstruction, dense, in fp64, with `torch.linalg.lstsq` on all tokens at once: the independent reference."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.prune.spec import PruneSpec
from tests.unit.prune.reference import rows_of

QKV, PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
HALVES = (
    (QKV, "self_attention.linear_qkv.layer_norm_weight", PROJ),
    (FC1, "mlp.linear_fc1.layer_norm_weight", FC2),
)
Weights = dict[str, Tensor]


def of_layer(tensors: Mapping[str, Tensor], layer: int) -> Weights:
    """One layer's weights by their names in it, fp64."""
    prefix = "decoder.layers."
    return {key.removeprefix(prefix): t[layer].double() for key, t in tensors.items() if key.startswith(prefix)}


def norm(hidden: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], weight, model.layernorm_epsilon)


def heads(normed_BSH: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    """Outputs of all heads side by side."""
    groups, width, per = model.num_query_groups, model.kv_channels, model.heads_per_group
    batch, length, _ = normed_BSH.shape
    rows = (normed_BSH @ weight.T).view(batch, length, groups, per + 2, width).permute(0, 2, 3, 1, 4)
    frequency = model.rotary_base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    query, key, value = turn(rows[:, :, :per]), turn(rows[:, :, per : per + 1]), rows[:, :, per + 1 :]
    scores = query @ key.transpose(-1, -2) / width**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ value).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


def inside(reader: str, normed: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    """What the writer of a half layer reads."""
    if reader == QKV:
        return heads(normed, weight, model)
    gate, up = (normed @ weight.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def kept_rows(reader: str, spec: PruneSpec, kept: int) -> Tensor:
    """Rows of a reader that the pruned model keeps."""
    source = spec.source
    if reader == FC1:
        neurons = torch.tensor(spec.ffn[kept])
        return torch.cat([neurons, source.ffn_hidden_size + neurons])
    per = source.heads_per_group
    units = []
    for group in spec.groups[kept]:
        own = [head % per for head in spec.heads[kept] if head // per == group]
        units += [group * (per + 2) + unit for unit in (*own, per, per + 1)]
    return rows_of(units, source.kv_channels)


def ridge(inputs: Tensor, outputs: Tensor, start: Tensor, damping: float) -> Tensor:
    """argmin over V of |outputs - inputs V^T|^2 + damping mean(|input|^2) |V - start|^2."""
    inputs, outputs = inputs.flatten(0, 1), outputs.flatten(0, 1)
    root = (damping * inputs.square().sum(0).mean()).sqrt()
    above = torch.cat([inputs, root * torch.eye(inputs.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(above, torch.cat([outputs, root * start.T])).solution.T


def reconstruct(
    tensors: Mapping[str, Tensor],
    sliced: Mapping[str, Tensor],
    spec: PruneSpec,
    tokens_BS: Tensor,
    *,
    damping: float,
    modules: Sequence[str],
) -> dict[str, Tensor]:
    """Every fitted weight, stacked over the kept layers, by checkpoint key."""
    source, target, hidden = spec.source, spec.target, torch.tensor(spec.hidden)
    stream = tensors["embedding.word_embeddings.weight"].double()[tokens_BS]
    pruned = stream[..., hidden]
    fitted: dict[str, list[Tensor]] = {}

    def through(layer: int, stream: Tensor, halves: Sequence[tuple[str, str, str]] = HALVES) -> Tensor:
        weights = of_layer(tensors, layer)
        for reader, norm_weight, writer in halves:
            normed = norm(stream, weights[norm_weight], source)
            stream = stream + inside(reader, normed, weights[reader], source) @ weights[writer].T
        return stream

    for layer in range(spec.layers[0]):
        stream = through(layer, stream)
    for kept, layer in enumerate(spec.layers):
        whole, part = of_layer(tensors, layer), of_layer(sliced, kept)
        end = spec.layers[kept + 1] if kept + 1 < len(spec.layers) else source.num_layers
        for half in HALVES:
            reader, norm_weight, writer = half
            normed = norm(pruned, part[norm_weight], target)
            if reader.split(".")[1] in modules:
                rows = whole[reader][kept_rows(reader, spec, kept)]
                wanted = norm(stream, whole[norm_weight], source) @ rows.T
                part[reader] = ridge(normed, wanted, part[reader], damping)
            stream = through(layer, stream, [half])
            for dropped in range(layer + 1, end) if reader == FC1 else ():
                stream = through(dropped, stream)
            read = inside(reader, normed, part[reader], target)
            if writer.split(".")[1] in modules:
                part[writer] = ridge(read, stream[..., hidden] - pruned, part[writer], damping)
            pruned = pruned + read @ part[writer].T
            for key in (reader, writer):
                fitted.setdefault(f"decoder.layers.{key}", []).append(part[key])
    result = {key: torch.stack(layers) for key, layers in fitted.items()}
    if "output_layer" in modules:
        scale = tensors[FINAL_NORM].double()
        key, weight = fit_output(
            tensors, norm(stream, scale, source), norm(pruned, scale[hidden], target), spec, damping
        )
        result[key] = weight
    return result


def fit_output(
    tensors: Mapping[str, Tensor], wanted: Tensor, normed: Tensor, spec: PruneSpec, damping: float
) -> tuple[str, Tensor]:
    """Key and weight of what is fitted to the logits."""
    hidden = torch.tensor(spec.hidden)
    if not spec.source.share_embeddings_and_output_weights:
        rows = tensors["output_layer.weight"].double()
        return "output_layer.weight", ridge(normed, wanted @ rows.T, rows[:, hidden], damping)
    rows = tensors["embedding.word_embeddings.weight"].double()
    rows = rows - rows.mean(0)
    # One row for each logit of each token, one column for each channel's scale.
    design = (normed.flatten(0, 1)[:, None, :] * rows[None, :, hidden]).flatten(0, 1)
    logits = (wanted @ rows.T).flatten()
    root = (damping * design.square().sum(0).mean()).sqrt() * torch.eye(len(hidden), dtype=torch.float64)
    scales = torch.linalg.lstsq(torch.cat([design, root]), torch.cat([logits, root.sum(0)])[:, None]).solution
    return FINAL_NORM, tensors[FINAL_NORM].double()[hidden] * scales[:, 0]
