"""A real byte-level BPE tokenizer of about 300 ids, and a small built data folder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron.config.data import DataConfig, DataSource
from minitron.data.build import build_dataset
from minitron.data.summary import DatasetSummary

EOS = "<|endoftext|>"
VOCAB_SIZE = 400


def make_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    words = ["the", "prune", "model", "width", "depth", "token", "layer", "of", "\u00e9t\u00e9\n"]
    return " ".join(rng.choice(words) for _ in range(num_words)) + f" {seed}"


def save_tokenizer(folder: Path, **special: str) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([make_text(seed, 50) for seed in range(20)], trainer)
    core.enable_truncation(max_length=7)  # a setting that a build must not obey
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token=EOS)


Build = Callable[..., DatasetSummary]


@pytest.fixture(scope="session")
def build(tokenizer_dir: Path) -> Build:
    """``build(out_dir, *paths, **config fields)``."""

    def run(out_dir: Path, *paths: Path, **fields: object) -> DatasetSummary:
        values = {"seq_length": 16, "heldout_fraction": 0.3, "num_workers": 1} | fields
        cfg = DataConfig(source=DataSource.files, paths=[str(p) for p in paths], **values)
        return build_dataset(cfg, tokenizer_dir=tokenizer_dir, vocab_size=VOCAB_SIZE, out_dir=out_dir)

    return run


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    """41 documents of 5 to 125 words."""
    root = tmp_path_factory.mktemp("corpus")
    for seed in range(41):
        (root / f"{seed:02d}.txt").write_text(make_text(seed, 5 + 3 * seed), encoding="utf-8")
    build(root / "data", root)
    return root / "data"
