"""Import: a Hugging Face folder or a GGUF file -> a checkpoint folder, streamed tensor by tensor."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.checkpoint.folder import SIDE_DIR, WEIGHTS_DIR, write_model_config
from minitron.checkpoint.store import CheckpointWriter
from minitron.checkpoint.stream import deal, read_ahead
from minitron.config.model import ModelConfig
from minitron.errors import ModelError
from minitron.models.axes import OUTPUT_LAYER_KEY, TABLES, part_rows
from minitron.models.gguf import GgufSource
from minitron.models.hf_config import HfConfig
from minitron.models.hf_names import IGNORED_SUFFIXES, hf_tensors, hf_tensors_of
from minitron.models.hf_source import FolderSource, Source
from minitron.models.origin import Origin
from minitron.models.pieces import Piece, pieces
from minitron.runtime.digests import sha256_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceInfo:
    """What a source holds.

    Attributes:
        path: The folder or file.
        kind: ``safetensors`` or ``gguf``.
        name: What the model calls itself.
        model: Its architecture.
        hf_config: Its config.json.
        num_tokens: Tokens that its tokenizer knows.
        num_bytes: Size of the weights' files.
        origin: Its base model and licence, where it names them.
    """

    path: Path
    kind: str
    name: str
    model: ModelConfig
    hf_config: HfConfig
    num_tokens: int
    num_bytes: int
    origin: Origin


def inspect_source(source: Path) -> SourceInfo:
    """Check everything about a source that can be checked without reading its weights.

    Args:
        source: A local Hugging Face folder (safetensors), or a ``.gguf`` file.

    Raises:
        ModelError: Something is missing, unexpected, cut short, of another shape, or not supported.
    """
    return _inspect(_open(source))


def import_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    group: ProcessGroup | None = None,
    on_progress: Progress | None = None,
) -> SourceInfo:
    """Write a source as a checkpoint folder: ``model.json``, ``weights/`` and ``hf/``.

    Each rank writes one piece (`minitron.models.pieces`) while it reads the next; they are dealt over the ranks by
    their size.

    Args:
        source: A local Hugging Face folder (safetensors), or a ``.gguf`` file.
        out: Checkpoint folder to make.
        dtype: Element type of the checkpoint; None keeps the source's (`Source.dtype`).
        rank: This rank.
        world_size: Number of ranks that share the work.
        group: Their process group; None is the default one.
        on_progress: Called after each piece of this rank with pieces done and pieces in all.

    Raises:
        ModelError: As `inspect_source`.
        ArtefactError: ``out`` cannot be written, or holds a checkpoint already.
    """
    opened = _open(source)
    info = _inspect(opened)
    dtype = dtype or opened.dtype
    writer = CheckpointWriter(out / WEIGHTS_DIR, rank=rank, world_size=world_size)
    if rank == 0:
        write_model_config(out, info.model)
        opened.write_side_files(out / SIDE_DIR)
    mine = deal(pieces(info.model, dtype), rank=rank, world_size=world_size)
    for done, (piece, tensor) in enumerate(read_ahead(mine, partial(_canonical, source=opened, dtype=dtype)), start=1):
        piece.write(writer, tensor, info.model)
        if on_progress is not None:
            on_progress(done, len(mine))
    writer.finish(group)
    return info


def source_fingerprint(source: Path) -> str:
    """SHA-256 over the names and contents of a source's config, weights and tokenizer files.

    Raises:
        ModelError: There is no such source, a folder is incomplete, or a file cannot be read.
    """
    files = [source]
    if source.suffix != ".gguf" or not source.is_file():  # a GGUF file is slow to open, quick to hash
        opened = _open(source)
        files = sorted({*opened.weight_files, *opened.side_files})
    total = hashlib.sha256()
    for file, digest in zip(files, sha256_of(files, unreadable=ModelError), strict=True):
        total.update(f"{file.name}\0{digest}\n".encode())
    return total.hexdigest()


def _open(source: Path) -> Source:
    if source.is_dir():
        return FolderSource(source)
    if not source.is_file():
        raise ModelError(
            f"no model at {source}; give a local Hugging Face folder or a .gguf file "
            "(`hf download NAME --local-dir FOLDER` fetches one)"
        )
    if source.suffix != ".gguf":
        raise ModelError(f"{source} is neither a folder nor a .gguf file")
    return GgufSource(source)


def _inspect(source: Source) -> SourceInfo:
    model = source.model
    expected = {tensor.name: tensor.shape for tensor in hf_tensors(model)}
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        raise ModelError(f"{source.path} lacks {len(missing)} of {len(expected)} tensors (first: {missing[0]})")
    extra = sorted(source.shapes.keys() - expected.keys() - _ignored(model))
    extra = [name for name in extra if not name.endswith(IGNORED_SUFFIXES)]
    if extra:
        raise ModelError(
            f"{source.path} holds {len(extra)} tensors that {model.architecture.value} does not have "
            f"(first: {extra[0]})"
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise ModelError(f"{source.path}: {name} has shape {source.shapes[name]}, but config.json needs {shape}")
    num_tokens = source.num_tokens()
    if num_tokens > model.vocab_size:
        raise ModelError(
            f"{source.path}: the tokenizer has ids up to {num_tokens - 1}, but the vocabulary only "
            f"{model.vocab_size} rows; the tokenizer belongs to another model"
        )
    return SourceInfo(
        path=source.path,
        kind=source.kind,
        name=source.name,
        model=model,
        hf_config=source.hf_config,
        num_tokens=num_tokens,
        num_bytes=sum(file.stat().st_size for file in source.weight_files),
        origin=source.origin,
    )


def _ignored(model: ModelConfig) -> set[str]:
    """A tied model's output layer, if a file has one: transformers too takes the embedding instead."""
    if not model.share_embeddings_and_output_weights:
        return set()
    params = TABLES[model.architecture].params
    return {hf.name for param in params if param.key == OUTPUT_LAYER_KEY for hf in param.hf}


def _canonical(piece: Piece, source: Source, dtype: torch.dtype) -> Tensor:
    """The piece in Megatron's layout."""
    tensors = hf_tensors_of(piece.param, piece.index, source.model)
    if len(tensors) == 1:
        return source.read_rows(tensors[0].name, piece.first_row, piece.first_row + piece.shape[0]).to(dtype)
    out = torch.empty(piece.shape, dtype=dtype)
    for tensor in tensors:
        rows = torch.from_numpy(part_rows(piece.param.dims[0], tensor.part, source.model))
        out[rows] = source.read_rows(tensor.name, 0, tensor.shape[0]).to(dtype)
    return out
