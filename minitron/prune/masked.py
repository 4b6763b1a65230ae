"""The masked teacher: the source computing as its pruned model must, with nothing cut out of its weights.

What a spec drops is taken out of the activations instead: a dropped layer hands its input on, inputs of the attention's
and the MLP's last linear are zero in dropped heads and neurons, and norms see the kept channels only. So it shares no
code with the slicer, and a wrong index or a wrong layout of a sliced weight shows up in the logits.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.models.axes import Axis, score_sites_of
from minitron.models.gpt import Chunks
from minitron.parallel.groups import Groups
from minitron.prune.spec import PruneSpec


def mask_dropped(gpt: Chunks, spec: PruneSpec, groups: Groups) -> None:
    """Make a loaded source compute what the pruned model does; for forward passes only, and for good.

    Args:
        gpt: This rank's part of the source, built with Megatron's local layer spec in one chunk.
        spec: What the pruned model keeps.
        groups: This rank's process groups.
    """
    (chunk,) = gpt
    place = {layer: number for number, layer in enumerate(spec.layers)}
    for layer in chunk.get_submodule("decoder.layers").children():
        number = place.get(layer.layer_number - 1)
        if number is None:
            layer.register_forward_hook(_hand_input_on, with_kwargs=True)
            continue
        kept = spec.kept(number)
        for site in score_sites_of(spec.source):
            if site.sees == "input":
                _mask_input(layer.get_submodule(site.module), _channels(site.axis, kept, spec), groups)
    if spec.target.hidden_size < spec.source.hidden_size:
        for name, module in list(chunk.named_modules()):
            weight = getattr(module, "weight", None)
            if name.endswith("layernorm") and weight is not None and weight.shape == (spec.source.hidden_size,):
                _norm_kept_only(module, torch.tensor(spec.hidden, device=weight.device))


def _channels(axis: Axis, kept: Mapping[Axis, Sequence[int]], spec: PruneSpec) -> Tensor:
    """1 for each channel of the axis' activation that is kept, 0 for the others."""
    if axis is Axis.ffn:
        mask_X = torch.zeros(spec.source.ffn_hidden_size)
        mask_X[list(kept[axis])] = 1
        return mask_X
    assert axis is Axis.head, axis
    mask_N = torch.zeros(spec.source.num_attention_heads)
    mask_N[list(kept[axis])] = 1
    return mask_N.repeat_interleave(spec.source.kv_channels)


def _mask_input(module: nn.Module, mask_X: Tensor, groups: Groups) -> None:
    """Zero a row-parallel linear's input where the mask is; each tensor-parallel rank has a run of the channels."""
    mask_x = mask_X.chunk(groups.tp.size())[groups.tp_rank]

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        (hidden_SBx, *rest) = args
        assert hidden_SBx.shape[-1] == len(mask_x), (hidden_SBx.shape, len(mask_x))
        return hidden_SBx * mask_x.to(hidden_SBx), *rest

    module.register_forward_pre_hook(hook)


def _norm_kept_only(norm: nn.Module, kept_K: Tensor) -> None:
    """Let a norm take its mean over the kept channels only, whichever kind of norm it is; the others become zero."""
    small = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(small, name, nn.Parameter(parameter[kept_K], requires_grad=False))
    setattr(small, "normalized_shape", (len(kept_K),))  # noqa: B010 - torch's norms look at it, Module's type says Tensor

    def hook(_module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        return torch.zeros_like(args[0]).index_copy(-1, kept_K, small(args[0].index_select(-1, kept_K)))

    norm.register_forward_hook(hook)


def _hand_input_on(_layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook of a dropped layer."""
    before_SBH: Tensor = args[0] if args else kwargs["hidden_states"]
    return (before_SBH, *output[1:]) if isinstance(output, tuple) else before_SBH
