"""Transformer Engine's layers against Megatron's own: the same names, the same checkpoint, the same function."""

from pathlib import Path

from minitron.checkpoint.folder import write_model_config
from minitron.checkpoint.model_io import load_model, save_model, sharded_weights
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.eval.logits import model_logits
from minitron.models.axes import params_of
from minitron.models.gpt import build_gpt
from minitron.parallel.groups import Groups
from tests.gpu.models import BF16, ONE_RANK, SMALL, batches, build


def test_names_are_those_of_the_axes_table(groups: Groups) -> None:
    for local_spec in (True, False):
        gpt = build_gpt(SMALL, ONE_RANK, BF16, groups, device=Device.cuda, local_spec=local_spec)
        state = sharded_weights(gpt)["model0"]
        keys = {value.key for key, value in state.items() if not key.endswith("_extra_state")}
        assert keys == {param.key for param in params_of(SMALL)}


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
