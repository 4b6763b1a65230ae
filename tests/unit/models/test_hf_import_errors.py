"""Every way a source can be wrong is said in one line, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron.errors import ModelError
from minitron.models.hf_import import import_model, inspect_source, source_fingerprint
from tests.unit.models.tiny_hf import read_folder, save_tiny, save_tokenizer

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, **values: torch.Tensor | None) -> None:
    """Write the folder's weights again, some changed (dots are double underscores), some left out."""
    tensors = read_folder(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    for name, value in values.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only_torch_weights(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def unlist_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    name = next(n for n, shard in index["weight_map"].items() if shard != first)
    index["weight_map"][name] = first
    (folder / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, r"no model at .*; give a local"),
    "empty": (empty_folder, "is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "architecture": (
        lambda f: edit_json(f / "config.json", architectures=["Gemma2ForCausalLM"]),
        "Gemma2ForCausalLM is not known; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
    ),
    "null where a number must be": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=None),
        r"source/config\.json is refused by transformers: .*'rms_norm_eps'.*float, got NoneType",
    ),
    "what transformers cannot build": (
        lambda f: edit_json(f / "config.json", hidden_size=26, head_dim=6),
        r"source/config\.json is refused by transformers: .*26\) is not a multiple",
    ),
    "activation": (
        lambda f: edit_json(f / "config.json", hidden_act="gelu"),
        r"source/config\.json: hidden_act=gelu is not supported",
    ),
    "no weights": (only_torch_weights, r"neither .* nor .* \(found pytorch_model\.bin\)"),
    "shard absent": (
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        r"1 of the \d+ files .* are missing \(first: model-00002-of-",
    ),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index of numbers": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), "has no weight_map of tensor"),
    "index wrong": (unlist_tensor, r"has no tensor .*, though .*index\.json says so"),
    "cut short": (cut_short, r"has \d+ bytes, its header says \d+"),
    "header cut short": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"\xff" * 40),
        "is cut short or not safetensors",
    ),
    "not safetensors": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"\3" + b"\0" * 20),
        "is not a safetensors file",
    ),
    "tensor missing": (
        lambda f: edit_tensors(f, **{Q_PROJ.replace(".", "__"): None}),
        rf"lacks 1 of 30 tensors \(first: {Q_PROJ}\)",
    ),
    "tensor unexpected": (
        lambda f: edit_tensors(f, model__layers__0__self_attn__q_proj__bias=torch.zeros(24)),
        r"1 tensors that LlamaForCausalLM does not have \(first: .*q_proj\.bias\)",
    ),
    "shape": (
        lambda f: edit_tensors(f, **{Q_PROJ.replace(".", "__"): torch.zeros(24, 23)}),
        rf"{Q_PROJ} has shape \(24, 23\), but config\.json needs \(24, 24\)",
    ),
    "untied without lm_head": (lambda f: edit_tensors(f, lm_head__weight=None), "first: lm_head"),
    "dtype": (
        lambda f: edit_tensors(f, model__norm__weight=torch.zeros(24, dtype=torch.int8)),
        r"norm\.weight is stored as I8",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer; one of these"),
    "tokenizer broken": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer cannot be loaded",
    ),
    "tokenizer too large": (
        lambda f: save_tokenizer(f, size=97),
        "ids up to 96, but the vocabulary only 96 rows",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_source(tmp_path: Path, what: str) -> None:
    source = save_tiny(tmp_path / "source", max_shard_size="6KB")
    breakage, words = BROKEN[what]
    breakage(source)
    with pytest.raises(ModelError, match=words) as caught:
        inspect_source(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=words):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        inspect_source(tmp_path / "weights.pt")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF" + b"\0" * 10)
    with pytest.raises(ModelError, match="cut short or not a GGUF file"):
        inspect_source(tmp_path / "weights.gguf")


def test_what_is_ignored(tmp_path: Path) -> None:
    """Old files hold rotary buffers, and tied models an output layer that transformers ignores too."""
    source = save_tiny(tmp_path / "source", "llama-tied")
    edit_tensors(
        source,
        lm_head__weight=torch.zeros(96, 24),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(3),
    )
    import_model(source, tmp_path / "out")


def test_what_is_found(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "my-model", "mistral-window")
    info = inspect_source(source)
    assert (info.kind, info.name, info.num_tokens) == ("safetensors", "my-model", 96)
    assert info.num_bytes == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert info.model.sliding_window == 5
    assert info.hf_config == json.loads((source / "config.json").read_text())


def test_fingerprint_is_of_contents(tmp_path: Path) -> None:
    first = save_tiny(tmp_path / "a")
    before = source_fingerprint(first)
    assert source_fingerprint(save_tiny(tmp_path / "b")) == before
    (first / "README.md").write_text("not part of the model")
    assert source_fingerprint(first) == before
    edit_json(first / "generation_config.json", temperature=0.5)
    assert source_fingerprint(first) != before
    other = save_tiny(tmp_path / "c")
    tensors = read_folder(other)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert source_fingerprint(other) not in (before, source_fingerprint(first))
