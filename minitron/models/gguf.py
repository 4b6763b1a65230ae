"""A GGUF file (llama.cpp) as a source of tensors, dequantised a slice at a time.

llama.cpp stores Mistral models as ``llama`` too; both are read as LlamaForCausalLM. Its query and key rows
are permuted for its rotary kernel, and are put back here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, dequantize, get_tensor_name_map
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from minitron.checkpoint.format import disk_errors
from minitron.config.model import Architecture, ModelConfig
from minitron.errors import ModelError
from minitron.models.hf_config import HfConfig, to_hf_config
from minitron.models.hf_names import hf_tensors
from minitron.models.origin import origin_of_gguf

# Every key of the architecture that is understood; another one could change what the model computes.
_KNOWN_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
}
# Splitting rules (`tokenizer.ggml.pre`) for which transformers' conversion gives the same tokens. Without
# merges that hold a digit, smollm's splitting of digits is GPT-2's.
_KNOWN_PRE = ("default", "gpt-2", "smollm")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "padding_token_id")


class GgufSource:
    """A ``.gguf`` file of architecture llama (see `minitron.models.hf_source.Source`).

    Raises:
        ModelError: The file is cut short, or holds something that is not supported.
    """

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ModelError(f"{path} is cut short or not a GGUF file: {error}") from error
        self._tensors: dict[str, ReaderTensor] = {t.name: t for t in self._reader.tensors}
        self.model = self._read_model()
        self.hf_config = self._make_hf_config()
        self.name = self._field("general.name", path.stem)
        self._gguf_names = self._map_names()
        self.shapes: Mapping[str, tuple[int, ...]] = {
            hf_name: tuple(int(n) for n in reversed(self._tensors[name].shape))
            for hf_name, name in self._gguf_names.items()
        }
        self.weight_files = [path]
        self.side_files: list[Path] = []
        self.dtype = torch.float32  # what dequantising gives
        self.origin = origin_of_gguf(self._field)

    def num_tokens(self) -> int:
        """Number of tokens in the file's vocabulary."""
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        if tokens is None:
            raise ModelError(f"{self.path} has no tokenizer (tokenizer.ggml.tokens)")
        pre = self._field("tokenizer.ggml.pre", "default")
        if pre not in _KNOWN_PRE:
            raise ModelError(
                f"{self.path}: the tokenizer's splitting rule {pre} is not converted faithfully; "
                f"import the Hugging Face folder instead (known: {', '.join(_KNOWN_PRE)})"
            )
        return len(tokens.data)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, dequantised to fp32."""
        tensor = self._tensors[self._gguf_names[name]]
        heads = self._rotary_heads(tensor.name)
        rows = slice(start, stop) if heads is None else slice(None)
        values: NDArray[np.float32] = dequantize(tensor.data[rows], tensor.tensor_type)
        if heads is not None:
            values = _undo_rotary_permutation(values, heads)[start:stop]
        return torch.tensor(values, dtype=torch.float32)

    def write_side_files(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the tokenizer, converted by transformers.

        Raises:
            ModelError: The converted tokenizer has other special tokens than the file names.
        """
        ids = {k: v for k, v in self.hf_config.items() if k.endswith("_token_id")}
        tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        tokenizer.model_max_length = self.model.max_position_embeddings
        self._check_tokenizer(tokenizer, ids)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(folder)
            # The name that transformers 4, and other programs, know this class by.
            file = folder / "tokenizer_config.json"
            saved = json.loads(file.read_text(encoding="utf-8"))
            saved = {k: v for k, v in saved.items() if k not in ("backend", "is_local")}
            saved.pop("local_files_only", None)
            saved["tokenizer_class"] = "PreTrainedTokenizerFast"
            _write_json(file, saved)
            _write_json(folder / "config.json", self.hf_config)
            _write_json(folder / "generation_config.json", ids)

    def _check_tokenizer(self, tokenizer: Any, ids: Mapping[str, int]) -> None:
        wrong = [
            f"{key}={getattr(tokenizer, key)}, not {value}"
            for key, value in ids.items()
            if getattr(tokenizer, key) != value
        ]
        add_bos = self._field("tokenizer.ggml.add_bos_token", None)
        adds_bos = tokenizer("a")["input_ids"][:1] == [ids.get("bos_token_id")]
        if add_bos is not None and bool(add_bos) != adds_bos:
            wrong.append(f"a text starts {'with' if adds_bos else 'without'} the bos token")
        if wrong:
            raise ModelError(
                f"{self.path}: the tokenizer is not converted faithfully ({'; '.join(wrong)}); "
                "import the Hugging Face folder instead"
            )

    def _read_model(self) -> ModelConfig:
        self._check_supported()
        heads, hidden = self._size("attention.head_count"), self._size("embedding_length")
        head_dim = self._field("llama.attention.key_length", None) or hidden // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            size = self._field(f"llama.{key}", head_dim)
            if size != head_dim:
                raise ModelError(f"{self.path}: llama.{key}={size} differs from the size of a head, {head_dim}")
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        return ModelConfig(
            architecture=Architecture.llama,
            num_layers=self._size("block_count"),
            hidden_size=hidden,
            ffn_hidden_size=self._size("feed_forward_length"),
            num_attention_heads=heads,
            num_query_groups=self._field("llama.attention.head_count_kv", heads),
            kv_channels=head_dim,
            vocab_size=self._field("llama.vocab_size", len(tokens.data) if tokens else 0),
            max_position_embeddings=self._size("context_length"),
            layernorm_epsilon=_shortest(self._field("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            rotary_base=_shortest(self._field("llama.rope.freq_base", 10000.0)),
            share_embeddings_and_output_weights="output.weight" not in self._tensors,
        )

    def _check_supported(self) -> None:
        architecture = self._field("general.architecture", None)
        if architecture != "llama":
            raise ModelError(f"{self.path}: architecture {architecture} is not known; known: llama")
        prefix = "llama."
        fields = (name for name in self._reader.fields if name.startswith(prefix))
        unknown = [name for name in fields if name.removeprefix(prefix) not in _KNOWN_KEYS]
        if "rope_freqs.weight" in self._tensors:
            unknown.append("rope_freqs.weight (Llama-3 rotary scaling)")
        if unknown:
            raise ModelError(
                f"{self.path}: {unknown[0]} is not supported in a GGUF file; import the Hugging Face folder instead"
            )

    def _make_hf_config(self) -> HfConfig:
        ids = {key: self._field(f"tokenizer.ggml.{key}", None) for key in _TOKEN_IDS}
        ids["pad_token_id"] = ids.pop("padding_token_id")
        return to_hf_config(self.model, {k: v for k, v in ids.items() if v is not None})

    def _map_names(self) -> dict[str, str]:
        """The file's tensors by their Hugging Face names; what has none keeps its own."""
        to_gguf = get_tensor_name_map(MODEL_ARCH.LLAMA, self.model.num_layers)
        found = {}
        left = dict.fromkeys(self._tensors)
        for tensor in hf_tensors(self.model):
            name = to_gguf.get_name(tensor.name, try_suffixes=(".weight",))
            if name in left:
                found[tensor.name] = name
                del left[name]
        return found | {name: name for name in left}

    def _rotary_heads(self, name: str) -> int | None:
        """How many heads of permuted rows the tensor holds, if it is a query or key projection."""
        if name.endswith(".attn_q.weight"):
            return self.model.num_attention_heads
        if name.endswith(".attn_k.weight"):
            return self.model.num_query_groups
        return None

    def _field(self, name: str, default: Any) -> Any:
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def _size(self, key: str) -> int:
        value = self._field(f"llama.{key}", None)
        if not isinstance(value, int):
            raise ModelError(f"{self.path}: llama.{key} is {value}, not a whole number")
        return value


def _undo_rotary_permutation(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put a head's channels back in rotate-half order: llama.cpp interleaves the two halves."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """The number that was written, from its fp32 image: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
