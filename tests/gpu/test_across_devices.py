"""What a CPU wrote goes on on a GPU, and back: a model's weights, and a training in the middle."""

from pathlib import Path

import pytest

from minitron.checkpoint.folder import write_model_config
from minitron.checkpoint.model_io import load_model, save_model
from minitron.compat.cpu import CPU_LAYER
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups, model_parallel
from minitron.train.state import load_state, save_state
from minitron.train.step import train_step
from tests.gpu.models import ONE_RANK, SMALL, SMALLER, batches, build, distillation, trainable
from tests.helpers.pool import WorkerPool

STEPS = 9


def _models(folder: Path) -> None:
    """Teacher and student with random weights, made on the CPU."""
    with CPU_LAYER.in_force(), model_parallel(ONE_RANK, seed=1) as groups:
        for name, model in (("teacher", SMALL), ("student", SMALLER)):
            gpt = build(model, PrecisionConfig(), groups, device=Device.cpu)
            save_model(gpt, folder / name)
            write_model_config(folder / name, model)


def _distill(folder: Path, dtype: Dtype, groups: Groups, device: Device, states: str, stop: int) -> list[float]:
    """Distill from the newest state in a folder up to step ``stop``, write that one's, and return the losses."""
    precision = PrecisionConfig(dtype=dtype)

    def loaded(name: str) -> Chunks:
        gpt = build_gpt({"teacher": SMALL, "student": SMALLER}[name], ONE_RANK, precision, groups, device=device)
        load_model(gpt, folder / name)
        return gpt

    student = trainable(loaded("student"), groups, num_steps=STEPS, num_microbatches=2)
    objective = distillation(loaded("teacher"), SMALL.vocab_size, groups)
    work = batches(SMALL, 2 * STEPS, device=device)
    done = load_state(student, folder / states)
    losses = [
        float(train_step(student, objective, work[2 * step : 2 * step + 2]).terms["loss"]) for step in range(done, stop)
    ]
    save_state(student, folder / states, step=stop)
    return losses


def _distill_on_cpu(folder: Path, dtype: Dtype, states: str, stop: int) -> list[float]:
    with CPU_LAYER.in_force(), model_parallel(ONE_RANK, seed=1) as groups:
        return _distill(folder, dtype, groups, Device.cpu, states, stop)


@pytest.mark.parametrize(("dtype", "tolerance"), [(Dtype.fp32, 1e-3), (Dtype.bf16, 1e-2)])
def test_a_training_changes_devices_twice(
    groups: Groups, cpu_pool: WorkerPool, tmp_path: Path, dtype: Dtype, tolerance: float
) -> None:
    """CPU, GPU, CPU, three steps each, against all nine on the CPU; the GPU's fp32 products are TF32."""
    cpu_pool.run(_models, 1, tmp_path)
    [unbroken] = cpu_pool.run(_distill_on_cpu, 1, tmp_path, dtype, "unbroken", STEPS)
    [first] = cpu_pool.run(_distill_on_cpu, 1, tmp_path, dtype, "moving", 3)
    second = _distill(tmp_path, dtype, groups, Device.cuda, "moving", 6)
    [third] = cpu_pool.run(_distill_on_cpu, 1, tmp_path, dtype, "moving", STEPS)
    assert unbroken[-1] < 0.9 * unbroken[0], "nothing to compare: the loss does not fall"
    assert first == pytest.approx(unbroken[:3], rel=1e-6)
    assert [*second, *third] == pytest.approx(unbroken[3:], rel=tolerance)
