"""The Hugging Face tensors of a model, in file order, from the table of parameter axes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron.config.model import ModelConfig
from minitron.models.axes import HfPart, ParamAxes, dim_size, params_of, part_rows, stack_shape

# What other files may hold beside the parameters: buffers of old transformers versions.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face model.

    Attributes:
        name: Its name.
        shape: Its shape.
        param: The canonical parameter it is part of.
        index: Its place in the dimensions that the parameter is stacked over: layer, or layer and expert.
        part: Which part of the parameter's dimension 0 it fills.
    """

    name: str
    shape: tuple[int, ...]
    param: ParamAxes
    index: tuple[int, ...]
    part: str


def blocks(model: ModelConfig) -> Iterator[tuple[ParamAxes, tuple[int, ...]]]:
    """Every parameter of every layer (of every expert) of a model, in the order of its layers, with its place.

    What comes before the layers in the axes table stays before them, what comes after stays after.
    """
    params = params_of(model)
    stacked = [n for n, param in enumerate(params) if param.stacked]
    yield from ((param, ()) for param in params[: stacked[0]])
    for layer in range(model.num_layers):
        for param in (params[n] for n in stacked):
            for rest in np.ndindex(stack_shape(param, model)[1:]):
                yield param, (layer, *rest)
    yield from ((param, ()) for param in params[stacked[0] :] if not param.stacked)


def hf_tensors_of(param: ParamAxes, index: tuple[int, ...], model: ModelConfig) -> list[HfTensor]:
    """The tensors that make up one parameter (of one layer and expert)."""
    return [_hf_tensor(param, index, hf, model) for hf in param.hf]


def hf_tensors(model: ModelConfig) -> list[HfTensor]:
    """Every tensor of a model, layer by layer."""
    return [tensor for param, index in blocks(model) for tensor in hf_tensors_of(param, index, model)]


def _hf_tensor(param: ParamAxes, index: tuple[int, ...], hf: HfPart, model: ModelConfig) -> HfTensor:
    rest = (dim_size(dim, model) for dim in param.dims[1:])
    return HfTensor(
        name=hf.name.format(**dict(zip(("layer", "expert"), index, strict=False))),
        shape=(len(part_rows(param.dims[0], hf.part, model)), *rest),
        param=param,
        index=index,
        part=hf.part,
    )
