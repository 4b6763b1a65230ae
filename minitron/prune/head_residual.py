"""Head residual: a difference between a kept query head and a pruned one, added to the kept (paper 1, section 2.3)."""

import torch
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.config.prune import HeadResidual
from minitron.models.axes import Axis, Dim, ParamAxes, kept_positions
from minitron.prune.spec import PruneSpec


def merge_heads(param: ParamAxes, tensor: Tensor, layer: int | None, spec: PruneSpec) -> Tensor:
    """One layer of a parameter of the source with pruned heads merged into kept ones, before it is sliced.

    Of a group's heads only the query rows are merged, as the paper has it; heads with a key and a value of their own
    are merged with these. The output projection is left alone: the paper does not name it.

    Args:
        param: The parameter's axes.
        tensor: One layer of it in the source.
        layer: Number of the layer in the pruned model; None outside the layers.
        spec: What to keep, and the pairs.
    """
    if spec.head_residual is HeadResidual.none or layer is None or Dim.qkv not in param.dims:
        return tensor
    assert param.dims[0] is Dim.qkv, param.dims
    merged = tensor.clone()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    for pair in spec.head_pairs[layer]:
        kept, dropped = (tensor[_rows(head, spec.source)].to(wide) for head in pair)
        residual = kept - dropped if spec.head_residual is HeadResidual.paper else dropped - kept
        merged[_rows(pair.kept, spec.source)] = (kept + residual).to(tensor.dtype)
    return merged


def _rows(head: int, model: ModelConfig) -> Tensor:
    """Rows of one query head in the fused projection, and of its key and value where they are its own."""
    groups = [head] if model.heads_per_group == 1 else []
    return torch.from_numpy(kept_positions(Dim.qkv, model, {Axis.head: [head], Axis.group: groups}))
