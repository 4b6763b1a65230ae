"""Which tokenizers may be distilled from one another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron.checkpoint.folder import write_model_config
from minitron.config.model import ModelConfig
from minitron.config.run import RandomModelConfig
from minitron.distill import vocabulary
from minitron.errors import ModelError
from minitron.models.random_source import random_model

TEXT = ["the student learns what the teacher says", "and then the teacher says what the student learns"] * 4
NUM_TOKENS = 280

Edit = Callable[[PreTrainedTokenizerFast], object]
Make = Callable[..., Path]


def common_vocab_size(teacher: Path, student: Path) -> int:
    return vocabulary.common_vocab_size(vocabulary.vocabulary_of(teacher), vocabulary.vocabulary_of(student))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 280 ids, the last of which is the special token <end>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a checkpoint folder, without weights, whose tokenizer was edited."""

    def folder(name: str, vocab_size: int, edit: Edit = len, edit_json: Callable[[str], str] = str) -> Path:
        path = tmp_path / name
        values = random_model(RandomModelConfig()).to_dict() | {"vocab_size": vocab_size}
        write_model_config(path, ModelConfig.from_dict(values))
        ours = tokenizer()
        edit(ours)
        ours.save_pretrained(path / "hf")
        (path / "hf" / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        file = path / "hf" / "tokenizer.json"
        file.write_text(edit_json(file.read_text()))
        return path

    return folder


def test_tokenizer_of_the_tests() -> None:
    assert len(tokenizer()) == NUM_TOKENS
    assert tokenizer().convert_tokens_to_ids("<end>") == NUM_TOKENS - 1


@pytest.mark.parametrize(("teacher", "student", "common"), [(280, 280, 280), (304, 280, 280), (288, 320, 288)])
def test_sizes_that_differ_by_padding(make: Make, teacher: int, student: int, common: int) -> None:
    assert common_vocab_size(make("teacher", teacher), make("student", student)) == common


def test_another_file_with_the_same_tokens(make: Make) -> None:
    other = make("student", 280, edit_json=lambda text: json.dumps(json.loads(text)))
    assert (other / "hf/tokenizer.json").read_text() != (make("teacher", 280) / "hf/tokenizer.json").read_text()
    assert common_vocab_size(make("teacher2", 304), other) == 280


def test_tokens_that_only_the_teacher_has(make: Make) -> None:
    teacher = make("teacher", 304, lambda t: t.add_special_tokens({"additional_special_tokens": ["<tool>", "<think>"]}))
    assert common_vocab_size(teacher, make("student", 280)) == 280
    assert common_vocab_size(teacher, make("padded", 304)) == 304


def test_ids_that_mean_different_tokens(make: Make) -> None:
    def swapped(text: str) -> str:
        values = json.loads(text)
        vocab = values["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        return json.dumps(values)

    student = make("student", 280)
    first = tokenizer().convert_tokens_to_ids("A")
    with pytest.raises(ModelError, match="differ: 2 of 280 ids mean different tokens, such as ") as caught:
        common_vocab_size(make("teacher", 304, edit_json=swapped), student)
    assert f"such as {first}: 'B' to the teacher, 'A' to the student" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_tokens_count(make: Make) -> None:
    teacher = make("teacher", 280, edit_json=lambda text: text.replace("<end>", "<|endoftext|>"))
    with pytest.raises(ModelError, match=r"1 of 280 ids mean .* 279: '<\|endoftext\|>' to the teacher, '<end>' to"):
        common_vocab_size(teacher, make("student", 280))


def test_a_token_that_the_teacher_cannot_read(make: Make) -> None:
    student = make("student", 288, lambda t: t.add_tokens(["<new>"]))
    with pytest.raises(ModelError, match=r"the teacher's vocab_size=280 has no row for .*'<new>' \(id 280\)"):
        common_vocab_size(make("teacher", 280), student)
