"""The Hugging Face tensors of a model, in file order, from the table of parameter axes."""

from collections.abc import Iterator
from dataclasses import dataclass

from minitron.config.model import ModelConfig
from minitron.models.axes import HfPart, ParamAxes, dim_size, params_of, part_rows

# What other files may hold beside the parameters: buffers of old transformers versions.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face model.

    Attributes:
        name: Its name.
        shape: Its shape.
        param: The canonical parameter it is part of.
        layer: The layer, for a stacked parameter.
        part: Which part of the parameter's dimension 0 it fills.
    """

    name: str
    shape: tuple[int, ...]
    param: ParamAxes
    layer: int | None
    part: str


def blocks(model: ModelConfig) -> Iterator[tuple[ParamAxes, int | None]]:
    """Every (parameter, layer) of a model, in the order of its layers.

    What comes before the layers in the axes table stays before them, what comes after stays after.
    """
    params = params_of(model)
    stacked = [n for n, param in enumerate(params) if param.stacked]
    yield from ((param, None) for param in params[: stacked[0]])
    for layer in range(model.num_layers):
        yield from ((params[n], layer) for n in stacked)
    yield from ((param, None) for param in params[stacked[0] :] if not param.stacked)


def hf_tensors_of(param: ParamAxes, layer: int | None, model: ModelConfig) -> list[HfTensor]:
    """The tensors that make up one parameter (of one layer)."""
    return [_hf_tensor(param, layer, hf, model) for hf in param.hf]


def hf_tensors(model: ModelConfig) -> list[HfTensor]:
    """Every tensor of a model, layer by layer."""
    return [tensor for param, layer in blocks(model) for tensor in hf_tensors_of(param, layer, model)]


def _hf_tensor(param: ParamAxes, layer: int | None, hf: HfPart, model: ModelConfig) -> HfTensor:
    rest = (dim_size(dim, model) for dim in param.dims[1:])
    return HfTensor(
        name=hf.name.format(layer=layer),
        shape=(len(part_rows(param.dims[0], hf.part, model)), *rest),
        param=param,
        layer=layer,
        part=hf.part,
    )
