"""`minitron plan` as a user sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

from minitron.cli.main import main
from minitron.config.prune import PruneConfig, Ranking, check_target
from minitron.config.run import RandomModelConfig
from minitron.models.axes import num_parameters
from minitron.models.random_source import random_model, write_random_model
from minitron.prune.ranking import choose

REPOSITORY = Path(__file__).resolve().parents[3]
EXPERIMENT = "experiment=llama31_8b-to-4b_width"


def _error(capsys: pytest.CaptureFixture[str], code: int, *overrides: str) -> str:
    assert main(["plan", *overrides]) == code
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_published_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXPERIMENT]) == 0
    shown = capsys.readouterr().out
    assert "tensor 4 x pipeline 1 x data 64 = 256 ranks" in shown
    assert "32 x 8 h100 GPUs, bf16" in shown
    assert "models/Llama-3.1-8B is not on this machine" in shown
    rows = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    assert rows["source"][:2] == ["8,030,261,248", "6,979,588,096"]
    assert rows["student"][:2] == ["4,512,746,496", "3,724,741,632"]
    assert rows["distill"][:2] == ["10,000", "94.4B"]
    # 6 x 4.513e9 x 94.37e9, and the same figure from the printed parts: hours x 0.4 x 989e12 x 3600 = FLOPs.
    flops, teachers, rule, hours = rows["distill"][2:6]
    assert float(rule) == pytest.approx(6 * 4_512_746_496 * 94_371_840_000, rel=0.005)
    spent = float(hours.replace(",", "")) * 3600 * 0.4 * 989e12
    assert spent == pytest.approx(float(flops) + float(teachers), rel=0.01)


def test_machine_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    hours = {}
    for machine in ("plan.gpu=h100", "plan.gpu=a100", "plan.peak_tflops=494.5", "plan.utilization=0.2"):
        assert main(["plan", EXPERIMENT, machine]) == 0
        rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if (words := line.split())}
        hours[machine] = float(rows["distill"][6].replace(",", ""))
    assert hours["plan.gpu=a100"] / hours["plan.gpu=h100"] == pytest.approx(989 / 312, rel=1e-3)
    assert hours["plan.peak_tflops=494.5"] == pytest.approx(2 * hours["plan.gpu=h100"], rel=1e-3)
    assert hours["plan.utilization=0.2"] == hours["plan.peak_tflops=494.5"]


def test_the_machine_is_the_cluster_s_unless_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in (
        (["cluster=dgx_a100"], "32 x 8 a100 GPUs"),
        (["cluster=dgx_h100", "cluster.gpus_per_node=4", "launch=slurm"], "64 x 4 h100 GPUs"),
        (["cluster=dgx_h100", "plan.gpu=b200", "plan.gpus_per_node=16"], "16 x 16 b200 GPUs"),
        (["cluster=dgx_h100", "cluster.gpu=null"], "32 x 8 h100 GPUs"),
        (["cluster=generic"], "32 x 8 h100 GPUs"),
    ):
        assert main(["plan", EXPERIMENT, *words]) == 0
        assert shown in capsys.readouterr().out
    assert main(["plan", EXPERIMENT, "cluster=dgx_a100", "precision=fp8_delayed"]) == 3
    assert "cluster.gpu=a100 cannot do precision.fp8_recipe=delayed" in capsys.readouterr().err
    assert main(["plan", EXPERIMENT, "launch=slurm", "precision=fp8_delayed"]) == 3
    assert "precision.fp8_recipe=delayed needs GPUs, but cluster.gpus_per_node=0" in capsys.readouterr().err


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    alone = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    alone.append("distill.train.micro_batch_size=2")
    for machine, fits in (("plan.gpu=a100", False), ("plan.gpu=b200", True)):
        assert main(["plan", EXPERIMENT, "correction.enabled=false", *alone, machine]) == 0
        shown = capsys.readouterr().out
        assert ("distill does not fit: more tensor" in shown) is not fits
    [total] = [line.split()[1] for line in shown.splitlines() if line.startswith(" total") and len(line.split()) == 2]
    assert 80 < float(total) < 180


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["precision=fp8_current", "prune.ffn_hidden_size=9224"],
            [
                "student: ffn_hidden_size=9224 / tensor_model_parallel_size=4 = 2306 is not a multiple of 16",
                "tensorwise",
            ],
        ),
        (
            ["precision=mxfp8"],
            [
                "plan.gpu=h100 cannot do precision.fp8_recipe=mxfp8: ",
                "10.0 or higher and below",
                "set plan.gpu=b200, or",
            ],
        ),
        (
            ["distill.teacher.fp8_recipe=blockwise", "plan.gpu=l40s"],
            [
                "plan.gpu=l40s cannot do distill.teacher.fp8_recipe=blockwise: ",
                "not 8.9; set plan.gpu=h100|h200|b200, or",
            ],
        ),
    ],
    ids=["width", "H100", "L40S"],
)
def test_fp8_that_cannot_be(capsys: pytest.CaptureFixture[str], overrides: list[str], messages: list[str]) -> None:
    error = _error(capsys, 3, EXPERIMENT, *overrides)
    assert [message for message in messages if message not in error] == []


def test_hours_of_fp8_are_at_the_peak_of_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for precision in ("bf16", "fp8_current"):
        assert main(["plan", EXPERIMENT, f"precision={precision}"]) == 0
        shown = capsys.readouterr().out
        [hours] = [line.split()[6] for line in shown.splitlines() if line.startswith(" distill ")]
        said[precision] = (hours, "FP8: hours at the peak of bf16" in shown)
    assert said["fp8_current"] == (said["bf16"][0], True)
    assert not said["bf16"][1]


def test_lines_of_nothing_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXPERIMENT, "correction.enabled=true"]) == 0
    tables: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        name, is_memory, _ = line.partition(": memory of one rank")
        if is_memory:
            lines = tables[name] = []
        elif tables and line.startswith(" "):
            lines.append(line.strip().rsplit("  ", 1)[0].strip())
    assert tables.keys() == {"correct", "distill"}
    shared = ["parameters", "gradients (fp32)", "optimizer (this rank's share)", "activations in flight"]
    teachers = ["teacher's parameters", "teacher's states that wait"]
    assert [line for line in tables["correct"] if line in (*shared, *teachers)] == shared
    assert [line for line in tables["distill"] if line in (*shared, *teachers)] == shared + teachers


def test_without_torch() -> None:
    code = (
        "import sys; from minitron.cli.main import main; "
        f"assert main(['plan', '{EXPERIMENT}']) == 0; "
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_source_s_own_shape_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_random_model(RandomModelConfig(), tmp_path / "model")
    capsys.readouterr()
    where = [f"source.path={folder}", "data.seq_length=32"]
    assert main(["plan", *where]) == 0
    assert f"shape: {folder}" in capsys.readouterr().out
    message = _error(capsys, 4, *where, "model=llama31_8b")
    assert f"source.path={folder} has num_layers=4, hidden_size=64" in message
    assert "source.model describes a model of num_layers=32, hidden_size=4096" in message
    assert main(["compress", *where, "model=llama31_8b"]) == 4  # before any work
    assert "source.model describes" in capsys.readouterr().err


def test_a_given_spec_says_the_student_s_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = random_model(RandomModelConfig())
    sizes = PruneConfig(ranking=Ranking.random, num_layers=3, ffn_hidden_size=80)
    choose(source, sizes, scores=None, source_id="random").save(tmp_path / "spec.json")
    given = ["source.kind=random", f"prune.spec={tmp_path / 'spec.json'}", "data.seq_length=32"]
    assert main(["plan", *given, "prune.reconstruct.enabled=false"]) == 0
    rows = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    target = check_target(source, sizes)
    assert rows["student"][0] == f"{num_parameters(target):,}"
    assert rows["student"][2:5] == ["3", str(source.hidden_size), "80"]
    assert num_parameters(target) < num_parameters(source)


def test_unknown_shape_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{bad")
    assert "config.json cannot be read: Expecting" in _error(capsys, 4, f"source.path={tmp_path}")
    assert "source.path=nowhere is not on this machine" in _error(capsys, 3, "source.path=nowhere")
    assert "prune.hidden_size=9000 is larger than the model's 4096" in _error(
        capsys, 7, EXPERIMENT, "prune.hidden_size=9000"
    )
    assert "source: num_query_groups=8 does not divide over" in _error(
        capsys, 3, EXPERIMENT, "parallel.tensor_model_parallel_size=16"
    )
