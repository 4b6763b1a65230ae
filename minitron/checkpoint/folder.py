"""The checkpoint folder: ``model.json`` + ``weights/`` (torch_dist) + ``hf/`` (for export).

``hf/`` holds the source's config.json, generation_config.json and tokenizer files as they came.
"""

import hashlib
import json
import shutil
from pathlib import Path

from minitron.checkpoint.format import disk_errors
from minitron.config.model import ModelConfig
from minitron.errors import CheckpointError
from minitron.runtime.digests import sha256_of

MODEL_FILE = "model.json"
WEIGHTS_DIR = "weights"
SIDE_DIR = "hf"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What a tokenizer may be made of, under the names that Hugging Face gives them."""


def write_model_config(folder: Path, model: ModelConfig) -> None:
    """Write ``model.json``; the folder is made when it is not there."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_text(json.dumps(model.to_dict(), indent=2) + "\n")


def read_model_config(folder: Path) -> ModelConfig:
    """Read ``model.json``.

    Raises:
        CheckpointError: The folder or the file is missing, or is not JSON.
        ModelError: The file does not describe a model.
    """
    file = folder / MODEL_FILE
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}; run `minitron import` first")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MODEL_FILE}: not a checkpoint folder (it holds {_listing(folder)})")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return ModelConfig.from_dict(values)


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder is one of ours, and not a Hugging Face folder."""
    return (folder / MODEL_FILE).is_file()


def fingerprint(folder: Path) -> str:
    """SHA-256 over model.json, weights and ``hf/`` by relative path: what a checkpoint is, whatever lies beside it."""
    parts = (path for part in (WEIGHTS_DIR, SIDE_DIR) for path in (folder / part).rglob("*"))
    total = hashlib.sha256()
    files = sorted(path for path in (folder / MODEL_FILE, *parts) if path.is_file())
    for file, digest in zip(files, sha256_of(files, unreadable=CheckpointError), strict=True):
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def weights_dir(folder: Path) -> Path:
    """Where the torch_dist checkpoint of a checkpoint folder lies (or is to be written)."""
    return folder / WEIGHTS_DIR


def side_dir(folder: Path) -> Path:
    """The folder of the source's config and tokenizer files.

    Raises:
        CheckpointError: It is missing, or has no config.json.
    """
    path = folder / SIDE_DIR
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} has no {SIDE_DIR}/config.json; import the source again")
    return path


def copy_side_files(src: Path, dst: Path) -> None:
    """Copy ``hf/`` from one checkpoint folder to another.

    Raises:
        CheckpointError: ``src`` has none.
        ArtefactError: ``dst`` cannot be written.
    """
    source = side_dir(src)
    with disk_errors(dst):
        shutil.copytree(source, dst / SIDE_DIR, dirs_exist_ok=True)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
