"""One transformer layer, whole on this rank, whose weights change as a pass goes down the network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import PrecisionConfig
from minitron.config.reconstruct import Linear
from minitron.config.run import Device
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import Groups


@dataclass(frozen=True)
class Half:
    """One of the two halves of a layer, ``h + body(norm(h))``.

    Attributes:
        norm: Module that reads the residual stream.
        body: Module after the norm.
        reader: The body's first linear, which reads the normed hidden channels.
        writer: Its last, which writes into the residual stream.
    """

    norm: str
    body: str
    reader: Linear
    writer: Linear

    def key(self, linear: Linear) -> str:
        """Checkpoint key of the weight of one of its linears."""
        return f"decoder.layers.{self.body}.{linear.value}.weight"


ATTENTION = Half("input_layernorm", "self_attention", Linear.linear_qkv, Linear.linear_proj)
MLP = Half("pre_mlp_layernorm", "mlp", Linear.linear_fc1, Linear.linear_fc2)
HALVES = (ATTENTION, MLP)


class OneLayer:
    """A layer, and the final norm, of a model that never is in memory as a whole.

    Args:
        model: The whole model's architecture.
        parallel: A layout of data-parallel ranks only.
        precision: Number formats.
        groups: This rank's groups in that layout.
        device: ``cpu`` or ``cuda``.
        seq_length: Tokens of every sequence.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        groups: Groups,
        *,
        device: Device,
        seq_length: int,
    ) -> None:
        shell = replace(model, num_layers=1, vocab_size=1, share_embeddings_and_output_weights=True)
        (chunk,) = build_gpt(shell, parallel, precision, groups, device=device, local_spec=True)
        self._layer: nn.Module = chunk.decoder.layers[0].eval()
        self._final_norm: nn.Module = chunk.decoder.final_layernorm
        self._weights: dict[str, Tensor] = {
            shard.key: shard.data for shard in chunk.sharded_state_dict().values() if isinstance(shard.data, Tensor)
        }
        self._rotary = chunk.rotary_pos_emb(seq_length)
        self._dtype = chunk.config.params_dtype

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights by checkpoint key; the others stay."""
        for key, weight in weights.items():
            self._weights[key].copy_(weight.view_as(self._weights[key]))

    def normed(self, half: Half, hidden_SBH: Tensor) -> Tensor:
        """What the reader of a half reads."""
        normed_SBH: Tensor = self._layer.get_submodule(half.norm)(hidden_SBH.to(self._dtype))
        return normed_SBH

    def final_normed(self, hidden_SBH: Tensor) -> Tensor:
        """What the output layer reads."""
        normed_SBH: Tensor = self._final_norm(hidden_SBH.to(self._dtype))
        return normed_SBH

    def run(self, half: Half, normed_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """Run a half from its normed input.

        Returns:
            What its writer reads ``[S, B, X]``, and what it writes ``[S, B, H]``.
        """
        body = self._layer.get_submodule(half.body)
        seen: list[Tensor] = []
        with _watching(body.get_submodule(half.writer.value), seen):
            if half is ATTENTION:
                output = body(normed_SBH, attention_mask=None, rotary_pos_emb=self._rotary)
            else:
                output = body(normed_SBH)
        return seen[0], _sum(output)

    def write(self, half: Half, inside_SBX: Tensor) -> Tensor:
        """What the writer of a half writes of what it reads."""
        return _sum(self._layer.get_submodule(f"{half.body}.{half.writer.value}")(inside_SBX))


@contextmanager
def _watching(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep the inputs of a module for the length of a block."""
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _sum(output: Any) -> Tensor:
    """A linear's or a body's output: Megatron gives it and its bias apart."""
    value, bias = output
    total: Tensor = value if bias is None else value + bias
    return total
