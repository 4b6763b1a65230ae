"""The torch_dist reader and writer against each other and against Megatron-Core's own."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron.checkpoint import store
from minitron.checkpoint.store import CheckpointReader, CheckpointWriter, TensorInfo
from minitron.checkpoint.stream import fresh_memory
from minitron.errors import ArtefactError, CheckpointError
from tests.helpers.pool import WorkerPool
from tests.unit.checkpoint import workers

Box = tuple[tuple[int, ...], tuple[int, ...]]

# Boxes of odd shapes that tile (4, 6, 5): nothing of a grid.
TILES: list[Box] = [
    ((0, 0, 0), (2, 3, 5)),
    ((0, 3, 0), (2, 3, 1)),
    ((0, 3, 1), (2, 3, 4)),
    ((2, 0, 0), (1, 6, 5)),
    ((3, 0, 0), (1, 1, 5)),
    ((3, 1, 0), (1, 5, 5)),
]


def cut(tensor: Tensor, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))]


def write(path: Path, tensor: Tensor, boxes: list[Box], key: str = "w") -> None:
    writer = CheckpointWriter(path)
    for offsets, lengths in boxes:
        writer.write(key, cut(tensor, offsets, lengths), global_shape=tensor.shape, offsets=offsets)
    writer.finish()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_box_reads_back(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = numbers(4, 6, 5, dtype=dtype)
    write(tmp_path, whole, TILES)
    reader = CheckpointReader(tmp_path)
    assert reader.tensors == {"w": TensorInfo((4, 6, 5), dtype)}
    assert torch.equal(reader.read("w"), whole)
    assert torch.equal(reader.read("w", (1, 2, 3)), whole[1:, 2:, 3:])
    ranges = [[(a, n) for a in range(size) for n in range(1, size - a + 1)] for size in (4, 6, 5)]
    for (a, i), (b, j), (c, k) in zip(  # 10, 21 and 15 ranges: every one, mixed
        ranges[0] * 21, ranges[1] * 10, ranges[2] * 14, strict=True
    ):
        have = reader.read("w", (a, b, c), (i, j, k))
        assert have.is_contiguous()
        assert torch.equal(have, whole[a : a + i, b : b + j, c : c + k])


def test_vectors_and_scalars(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.write("vector", torch.tensor([1.0, 2.0, 3.0]), global_shape=(3,), offsets=(0,))
    writer.write("scalar", torch.tensor(7.0), global_shape=(), offsets=())
    writer.finish()
    reader = CheckpointReader(tmp_path)
    assert reader.read("vector", (1,), (2,)).tolist() == [2.0, 3.0]
    assert reader.read("scalar").item() == 7.0


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    big = numbers(1000, 1000)
    write(tmp_path, big[:2, :2], [((0, 0), (2, 2))])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000
    assert CheckpointReader(tmp_path).read("w").tolist() == [[0, 1], [1000, 1001]]


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    whole = numbers(3, 1000, 100)
    write(tmp_path, whole, [((n, 0, 0), (1, 1000, 100)) for n in range(3)])
    reader = CheckpointReader(tmp_path)
    sizes: list[int] = []

    def counting(num_bytes: int) -> NDArray[np.uint8]:
        sizes.append(num_bytes)
        return fresh_memory(num_bytes)

    assert torch.equal(reader.read("w", (1, 10, 0), (1, 5, 100), counting), whole[1:2, 10:15])
    assert sizes == [5 * 100 * 4]


def test_an_archive_with_other_strides_reads_right(tmp_path: Path) -> None:
    """Megatron saves what the model holds, transposed storage included."""
    writer = CheckpointWriter(tmp_path)
    tensor = numbers(5, 3).t()
    writer.write("w", tensor, global_shape=(3, 5), offsets=(0, 0))
    writer._boxes.pop()
    start, num_bytes = writer._append(tensor.clone())  # clone keeps the strides
    box = store.StoredBox("w", tensor.dtype, (3, 5), (0, 0), (3, 5), "__0_0.distcp", start, num_bytes)
    writer._boxes.append(box)
    writer.finish()
    assert torch.equal(CheckpointReader(tmp_path).read("w", (1, 1), (2, 3)), tensor[1:3, 1:4])


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (TILES[:-1], "95 of the 120 elements"),
        ([*TILES, ((0, 0, 0), (1, 1, 1))], "overlap"),
        ([*TILES[:-1], ((3, 0, 0), (1, 5, 5))], "overlap"),  # volumes add up, boxes do not
    ],
    ids=["hole", "twice", "shifted"],
)
def test_boxes_that_do_not_tile(tmp_path: Path, boxes: list[Box], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path, numbers(4, 6, 5), boxes)
    with pytest.raises(CheckpointError, match="not a finished one"):
        CheckpointReader(tmp_path)


def test_a_box_outside_the_tensor(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    for offsets, shape in [((1, 0), (2, 2)), ((-1, 0), (2, 2)), ((0,), (2, 2)), ((0, 0), (2, 1))]:
        with pytest.raises(CheckpointError, match="is not inside"):
            writer.write("w", torch.ones(2, 2), global_shape=shape, offsets=offsets)
    writer.finish()
    assert CheckpointReader(tmp_path).tensors == {}


def test_two_shapes_or_dtypes_of_one_key(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.write("w", torch.ones(1, 2), global_shape=(2, 2), offsets=(0, 0))
    writer.write("w", torch.ones(1, 2).bfloat16(), global_shape=(2, 2), offsets=(1, 0))
    with pytest.raises(CheckpointError, match="one shape and one dtype"):
        writer.finish()


def test_a_finished_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path, numbers(4, 6, 5), TILES)
    with pytest.raises(ArtefactError, match="holds a checkpoint already"):
        CheckpointWriter(tmp_path)


def test_no_space_left(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    writer = CheckpointWriter(tmp_path)
    with pytest.raises(ArtefactError, match=r"^cannot write .*: no space left$"):
        writer.write("w", torch.ones(1000, 1000), global_shape=(1000, 1000), offsets=(0, 0))
    with pytest.raises(ArtefactError, match="no space left"):
        writer.finish()


def test_a_reader_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        CheckpointReader(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(tmp_path)


def test_files_missing_or_cut_short(tmp_path: Path) -> None:
    write(tmp_path, numbers(4, 6, 5), TILES)
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match=r"is cut short: 1000 of at least \d+ bytes"):
        CheckpointReader(tmp_path)
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(CheckpointError, match=r"w at .* cannot be read"):
        CheckpointReader(tmp_path).read("w")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        CheckpointReader(tmp_path)


def test_wrong_requests(tmp_path: Path) -> None:
    write(tmp_path, numbers(4, 6, 5), TILES)
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="has no tensor nothing; it has w"):
        reader.read("nothing")
    for offsets, lengths in [((0, 0, 0), (5, 6, 5)), ((4, 0, 0), None), ((0, 0), (1, 1))]:
        with pytest.raises(CheckpointError, match="is not inside"):
            reader.read("w", offsets, lengths)


def test_a_part_that_was_never_saved(tmp_path: Path) -> None:
    write(tmp_path, numbers(4, 6, 5), TILES)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    del metadata.state_dict_metadata["w"].chunks[1]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = CheckpointReader(tmp_path)
    assert reader.read("w", (0, 0, 0), (2, 3, 5)).shape == (2, 3, 5)
    with pytest.raises(CheckpointError, match="only 114 of the 120 elements"):
        reader.read("w")


def test_fp8_history_is_left_out(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    for key in ("w", "decoder.layers.mlp.linear_fc1._extra_state"):
        writer.write(key, torch.ones(2), global_shape=(2,), offsets=(0,))
    writer.finish()
    assert list(CheckpointReader(tmp_path).tensors) == ["w"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_writing(tmp_path: Path, pool: WorkerPool, world_size: int) -> None:
    whole = numbers(5, 4, 3)
    assert pool.run(workers.write_boxes, world_size, tmp_path / "w", whole) == [""] * world_size
    assert torch.equal(CheckpointReader(tmp_path / "w").read("w"), whole)
    files = {file.name for file in (tmp_path / "w").glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(world_size)}


def test_every_rank_hears_of_a_hole(tmp_path: Path, pool: WorkerPool) -> None:
    errors = pool.run(workers.write_boxes, 2, tmp_path / "w", numbers(5, 4, 3), leave_hole=True)
    assert errors[0] == errors[1] == "w: 48 of the 60 elements of shape (5, 4, 3) were written"


def test_reads_what_megatron_saved(tmp_path: Path, pool: WorkerPool) -> None:
    whole = numbers(3, 4, 6)
    pool.run(workers.save_by_megatron, 2, tmp_path / "m", whole)
    reader = CheckpointReader(tmp_path / "m")
    assert {key: info.shape for key, info in reader.tensors.items()} == {
        "stack": (3, 4, 6),
        "common": (4, 6),
    }
    assert torch.equal(reader.read("stack"), whole)
    assert torch.equal(reader.read("stack", (1, 1, 2), (2, 2, 3)), whole[1:3, 1:3, 2:5])
    assert torch.equal(reader.read("common"), whole[0])


def test_the_file_is_torchs_own_format(tmp_path: Path) -> None:
    write(tmp_path, numbers(4, 6, 5), TILES)
    target = {"w": torch.empty(4, 6, 5)}
    torch.distributed.checkpoint.load(target, checkpoint_id=os.fspath(tmp_path), no_dist=True)
    assert torch.equal(target["w"], numbers(4, 6, 5))
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    [common] = [i for key, i in metadata.storage_data.items() if key.fqn.startswith("common_state")]
    content = (tmp_path / common.relative_path).read_bytes()[common.offset :][: common.length]
    assert torch.load(io.BytesIO(content), weights_only=True) == [{}]
