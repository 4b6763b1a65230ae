"""Transformer Engine's layers against Megatron's own: the same names, the same checkpoint, the same function."""

from pathlib import Path

import pytest
import torch

from minitron.checkpoint.folder import write_model_config
from minitron.checkpoint.model_io import load_model, save_model, sharded_weights
from minitron.config.model import ModelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.eval.logits import model_logits
from minitron.models.axes import params_of
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import Groups
from tests.gpu.models import BF16, EXPERTS, ONE_RANK, SMALL, batches, build


@pytest.mark.parametrize("model", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_names_are_those_of_the_axes_table(groups: Groups, model: ModelConfig) -> None:
    for local_spec in (True, False):
        gpt = build_gpt(model, ONE_RANK, BF16, groups, device=Device.cuda, local_spec=local_spec)
        state = sharded_weights(gpt)["model0"]
        keys = {value.key for value in state.values() if not value.key.endswith("_extra_state")}
        assert keys == {param.key for param in params_of(model)}


def test_one_checkpoint_gives_both_the_same_logits(groups: Groups, tmp_path: Path) -> None:
    """In bf16 neither is further from Megatron's own modules in fp32 than half as far again as the other."""
    exact = build(SMALL, PrecisionConfig(dtype=Dtype.fp32), groups, local_spec=True).eval()
    save_model(exact, tmp_path)
    write_model_config(tmp_path, SMALL)
    [batch] = batches(SMALL, 1)
    wanted = model_logits(exact, batch.tokens_BS, groups, vocab_size=SMALL.vocab_size)
    errors = {}
    for name, local_spec in (("local", True), ("te", False)):
        gpt = build_gpt(SMALL, ONE_RANK, BF16, groups, device=Device.cuda, local_spec=local_spec)
        load_model(gpt, tmp_path)
        have = model_logits(gpt.eval(), batch.tokens_BS, groups, vocab_size=SMALL.vocab_size)
        errors[name] = float((have - wanted).norm() / wanted.norm())
    assert 0 < errors["te"] <= 1.5 * errors["local"], errors
    assert errors["local"] < 0.03, errors  # about sqrt(8 products) times bf16's 2^-8


def test_experts_go_there_and_back(groups: Groups, tmp_path: Path) -> None:
    """Transformer Engine multiplies all experts in one layer, Megatron's own modules one after the other."""
    one_by_one = build(EXPERTS, BF16, groups, local_spec=True)
    wanted = {name: parameter.clone() for name, parameter in one_by_one[0].named_parameters()}
    grouped = build(EXPERTS, BF16, groups, seed=2)
    for number, (source, target) in enumerate(((one_by_one, grouped), (grouped, one_by_one))):
        folder = tmp_path / str(number)
        save_model(source, folder)
        write_model_config(folder, EXPERTS)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        load_model(target, folder)
    for name, parameter in one_by_one[0].named_parameters():
        assert torch.equal(parameter, wanted[name]), name
