"""What is checked of a teacher that is not the source, before any stage runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from minitron.checkpoint.folder import write_model_config
from minitron.cli.job import check_models
from minitron.config.compose import compose_run
from minitron.config.run import RandomModelConfig
from minitron.errors import ConfigError, ModelError
from minitron.models.random_source import random_model, write_random_model


def _teacher(folder: Path, **ids: int) -> Path:
    """A checkpoint folder, without weights, of the random model, in which some tokens have other ids."""
    source = write_random_model(RandomModelConfig(), folder / "hf")
    file = source / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] |= ids
    file.write_text(json.dumps(values))
    write_model_config(folder, random_model(RandomModelConfig()))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(RandomModelConfig(), tmp_path / "model")


def _sources(model: Path) -> dict[str, list[str]]:
    return {str(model): ["source.kind=path", f"source.path={model}"], "source.random": ["source.kind=random"]}


def test_another_tokenizer(base: list[str], model: Path, tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(model).get_vocab()
    teacher = _teacher(tmp_path / "teacher", A=ids["B"], B=ids["A"])
    for where, source in _sources(model).items():
        with pytest.raises(ModelError) as caught:
            check_models(compose_run([*base, *source, f"distill.teacher.path={teacher}"]))
        told = str(caught.value)
        assert f"teacher ({teacher / 'hf'}) and student ({where}) differ: 2 of 257 ids mean different tokens" in told
        assert f"such as {ids['A']}: 'B' to the teacher, 'A' to the student" in told


def test_the_same_tokenizer(base: list[str], model: Path, tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher")
    for source in _sources(model).values():
        check_models(compose_run([*base, *source, f"distill.teacher.path={teacher}"]))


def test_compared_tokens_are_those_of_both_models(base: list[str], model: Path, tmp_path: Path) -> None:
    """A padded source has rows that its teacher lacks."""
    weights = load_file(model / "model.safetensors")
    grown = {name: torch.cat([w, w[:7]]) if len(w) == 257 else w for name, w in weights.items()}
    save_file(grown, model / "model.safetensors", metadata={"format": "pt"})
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 264}))
    alone = [*base, *_sources(model)[str(model)]]
    taught = [*alone, f"distill.teacher.path={_teacher(tmp_path / 'teacher')}"]
    for arguments, size in ((alone, 264), (taught, 257)):
        check_models(compose_run([*arguments, f"distill.logit_loss.top_k={size}"]))
        with pytest.raises(ConfigError, match=rf"logit_loss\.top_k={size + 1} is more than the {size} tokens"):
            check_models(compose_run([*arguments, f"distill.logit_loss.top_k={size + 1}"]))
