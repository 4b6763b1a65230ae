"""A Hugging Face model folder as a source of tensors, checked before anything is read."""

import json
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from minitron.checkpoint.folder import TOKENIZER_FILES
from minitron.checkpoint.format import disk_errors
from minitron.config.model import ModelConfig
from minitron.errors import ModelError
from minitron.models.hf_config import HfConfig, model_from_hf_config, model_type_of, read_json
from minitron.models.origin import Origin, origin_of_folder

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Any one of these sets of files makes a tokenizer.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("tekken.json",),
)
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
_FLOATS = ("F64", "F32", "F16", "BF16")


class Source(Protocol):
    """A model to import.

    Attributes:
        path: The folder or file.
        kind: ``safetensors`` or ``gguf``.
        name: What the model calls itself.
        model: Its architecture.
        hf_config: Its config.json.
        shapes: Shape of every tensor by its Hugging Face name.
        weight_files: The files that hold them.
        side_files: The config and tokenizer files.
        dtype: bf16 where every tensor is stored so, else fp32, which holds the other formats without loss.
        origin: Its base model and licence, where it names them.
    """

    path: Path
    kind: str
    name: str
    model: ModelConfig
    hf_config: HfConfig
    shapes: Mapping[str, tuple[int, ...]]
    weight_files: list[Path]
    side_files: list[Path]
    dtype: torch.dtype
    origin: Origin

    def num_tokens(self) -> int:
        """One more than the tokenizer's largest id.

        Raises:
            ModelError: There is no tokenizer, or it cannot be read.
        """

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in the file's own precision."""

    def write_side_files(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the tokenizer's files."""


class FolderSource:
    """A local folder of safetensors, one file or several with an index (see `Source`).

    Raises:
        ModelError: Something is missing, cut short, or not supported.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not any(path.iterdir()):
            raise ModelError(f"{path} is empty")
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json; is it a Hugging Face model folder?")
        self.hf_config = read_json(path / "config.json")
        self.model = _read_model(path, self.hf_config)
        self.name = self.hf_config.get("_name_or_path") or path.resolve().name
        self._file_of = _tensor_files(path)
        self.weight_files = sorted(set(self._file_of.values()))
        headers = {file: _read_header(file) for file in self.weight_files}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: _shape(name, file, headers[file]) for name, file in self._file_of.items()
        }
        stored = {headers[file][name]["dtype"] for name, file in self._file_of.items()}
        self.dtype = torch.bfloat16 if stored == {"BF16"} else torch.float32
        self.origin = origin_of_folder(path, self.hf_config.get("_name_or_path"))
        self.side_files = [path / name for name in _SIDE_FILES if (path / name).is_file()]
        self._open: dict[Path, Any] = {}

    def num_tokens(self) -> int:
        """One more than the tokenizer's largest id."""
        names = {file.name for file in self.side_files}
        if not any(names.issuperset(files) for files in _TOKENIZERS):
            known = ", ".join(" + ".join(files) for files in _TOKENIZERS)
            raise ModelError(f"{self.path} has no tokenizer; one of these is needed: {known}")
        return tokenizer_size(self.path)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in the file's own precision."""
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            rows: Tensor = self._open[file].get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {name} cannot be read: {error}") from error
        return rows

    def write_side_files(self, folder: Path) -> None:
        """Copy the files that export needs again, as they are."""
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in self.side_files:
                shutil.copyfile(file, folder / file.name)


def tokenizer_size(folder: Path) -> int:
    """One more than the largest id of the tokenizer in a folder.

    Raises:
        ModelError: transformers cannot load it.
    """
    return max(token_ids(folder).values()) + 1


def token_ids(source: Path) -> dict[str, int]:
    """The id of every token of the tokenizer in a folder or a GGUF file, added and special tokens included.

    Raises:
        ModelError: transformers cannot load it.
    """
    folder, gguf = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **gguf)
        ids: dict[str, int] = tokenizer.get_vocab()
        return ids
    except Exception as error:  # transformers raises whatever the tokenizer's backend does
        raise ModelError(f"{source}: the tokenizer cannot be loaded: {_one_line(error)}") from error


def _read_model(path: Path, config: HfConfig) -> ModelConfig:
    """What config.json describes, checked by transformers too: its classes are stricter about types and nulls."""
    try:
        model = model_from_hf_config(config)
        values = {key: value for key, value in config.items() if key != "model_type"}
        AutoConfig.for_model(model_type_of(model), **values)
    except ModelError as error:
        raise ModelError(f"{path}/{error}") from error
    except Exception as error:  # transformers raises whatever the key's type does
        raise ModelError(f"{path / 'config.json'} is refused by transformers: {_one_line(error)}") from error
    return model


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor; every file that the index names must be there."""
    if not (path / INDEX_FILE).is_file():
        single = path / SINGLE_FILE
        if not single.is_file():
            other = sorted(f.name for f in path.glob("*.bin")) + sorted(f.name for f in path.glob("*.safetensors"))
            found = f" (found {other[0]})" if other else ""
            raise ModelError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
        return {name: single for name in _read_header(single) if name != "__metadata__"}
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{path / INDEX_FILE} has no weight_map of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (path / name).is_file()]
    if absent:
        raise ModelError(
            f"{path}: {len(absent)} of the {len(shards)} files that {INDEX_FILE} names are missing "
            f"(first: {absent[0]}); download them again"
        )
    return {name: path / shard for name, shard in weight_map.items()}


def _read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, and whether the file is as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{file} is cut short or not safetensors: {size} bytes")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is not a safetensors file: its header is no JSON object")
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{file} has {size} bytes, its header says {expected}; download it again")
    return header


def _shape(name: str, file: Path, header: Mapping[str, Any]) -> tuple[int, ...]:
    if name not in header:
        raise ModelError(f"{file} has no tensor {name}, though {INDEX_FILE} says so")
    if header[name]["dtype"] not in _FLOATS:
        raise ModelError(f"{file}: {name} is stored as {header[name]['dtype']}; known: {', '.join(_FLOATS)}")
    return tuple(header[name]["shape"])
