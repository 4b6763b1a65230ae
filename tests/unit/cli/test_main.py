"""The command line before any rank starts: help, the printed configuration, and one line for each bad input."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from minitron.cli.main import VERBS, main
from minitron.config.compose import load_resolved
from minitron.config.run import RandomModelConfig
from minitron.models.hf_source import INDEX_FILE, SINGLE_FILE
from minitron.models.random_source import write_random_model
from minitron.runtime.artefact import RunFolder, StageIdentity

# (source, target) 4 layers, 64 channels, 128 neurons, 8 heads in 4 groups.
SMALL = ["data.seq_length=32", "device=cpu"]

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_args: object, **_kwargs: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("minitron.cli.start.launch_ranks", refuse)


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run `minitron compress`, expect an exit code, and return the one line on stderr."""

    def run(code: int, *overrides: str, verb: str = "compress") -> str:
        capsys.readouterr()
        assert main([verb, f"runs_dir={tmp_path / 'runs'}", *SMALL, *overrides]) == code
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in captured.out
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = write_random_model(RandomModelConfig(), tmp_path / "model")
    capsys.readouterr()  # transformers' progress bar
    return folder


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("A text of some words.\n" * 2000)
    return ["data=files", f"data.paths=[{tmp_path / 'text.txt'}]", "data.seq_length=32"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "SUPPRESS" not in out
    lines = out.splitlines()
    for verb, (what, _sections) in VERBS.items():
        assert len([line for line in lines if line.split()[:1] == [verb]]) == 1
        assert len([line for line in lines if line.split() == [verb, *what.split()]]) == 1
    assert "minitron compress experiment=demo" in out
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"minitron {verb}: {VERBS[verb][0]}" in out
    assert VERBS[verb][1] in out
    assert "--print-config" in out


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compres"])
    assert caught.value.code == 2
    assert "invalid choice: 'compres'" in capsys.readouterr().err


def test_overrides_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "experiment=tiny", "--print-config", "seed=7"]) == 0
    assert "seed: 7\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["compress", "experiment=tiny", "--print-confg", "seed=7"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --print-confg" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [[], ["experiment=tiny", "prune.hidden_size=56"]])
def test_print_config(overrides: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compress", *overrides, "--print-config"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    path = tmp_path / "printed.yaml"
    path.write_text(captured.out)
    run = load_resolved(path)
    assert run.prune.hidden_size == (56 if overrides else None)


def test_config_errors(fails: Fails) -> None:
    assert "source.path is not set" in fails(3)
    assert "there is no key distill.train.lrr; did you mean" in fails(3, "source.kind=random", "distill.train.lrr=1")


def test_no_model_folder(fails: Fails, tmp_path: Path) -> None:
    message = fails(4, f"source.path={tmp_path / 'nowhere'}")
    assert f"no model at {tmp_path / 'nowhere'}; give a local Hugging Face folder or a .gguf file" in message


def test_empty_model_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fails(4, f"source.path={tmp_path / 'empty'}") == f"{tmp_path / 'empty'} is empty"


def test_file_that_is_no_model(fails: Fails, tmp_path: Path) -> None:
    for name, message in (("m.bin", "is neither a folder nor a .gguf file"), ("m.gguf", "m.gguf")):
        (tmp_path / name).write_bytes(b"not a model")
        assert message in fails(4, f"source.path={tmp_path / name}")


def test_folder_without_config(fails: Fails, model: Path) -> None:
    (model / "config.json").unlink()
    assert f"{model} has no config.json" in fails(4, f"source.path={model}")


def test_missing_shard(fails: Fails, model: Path) -> None:
    tensors = load_file(model / SINGLE_FILE)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, model / "model-00001-of-00002.safetensors")
    (model / SINGLE_FILE).unlink()
    weight_map = {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names}
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    message = fails(4, f"source.path={model}")
    assert f"1 of the 2 files that {INDEX_FILE} names are missing" in message
    assert "(first: model-00002-of-00002.safetensors)" in message


def _edit_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_unknown_architecture(fails: Fails, model: Path) -> None:
    _edit_config(model, architectures=["GPT9ForCausalLM"], model_type="gpt9")
    message = fails(4, f"source.path={model}")
    for part in ("GPT9ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"):
        assert part in message


def test_config_of_another_shape(fails: Fails, model: Path) -> None:
    _edit_config(model, intermediate_size=160)
    message = fails(4, f"source.path={model}")
    assert "has shape (128, 64), but config.json needs (160, 64)" in message


def test_config_that_is_cut_off(fails: Fails, model: Path) -> None:
    (model / "config.json").write_text('{"architectures": [')
    assert "config.json cannot be read" in fails(4, f"source.path={model}")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(fails: Fails, model: Path, kept: int) -> None:
    whole = (model / SINGLE_FILE).read_bytes()
    (model / SINGLE_FILE).write_bytes(whole[:kept])
    message = fails(4, f"source.path={model}")
    assert str(model / SINGLE_FILE) in message
    assert f"{len(whole[:kept])} bytes" in message


def test_tokenizer_of_another_model(fails: Fails, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<one>"), AddedToken("<two>")])
    tokenizer.save_pretrained(model)
    message = fails(4, f"source.path={model}")
    assert "the tokenizer has ids up to 258, but the vocabulary only 257 rows" in message


def test_no_tokenizer(fails: Fails, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer; one of these is needed: tokenizer.json" in fails(4, f"source.path={model}")


@pytest.mark.parametrize(
    ("code", "overrides", "message"),
    [
        (
            3,
            ["parallel.tensor_model_parallel_size=3"],
            "num_attention_heads=8 does not divide over parallel.tensor_model_parallel_size=3 (8 / 3 leaves 2)",
        ),
        (
            3,
            ["parallel.tensor_model_parallel_size=8"],
            "teacher: num_query_groups=4 does not divide over parallel.tensor_model_parallel_size=8 (4 / 8 leaves 4)",
        ),
        (3, ["parallel.pipeline_model_parallel_size=5"], "teacher: num_layers=4 is fewer than"),
        (3, ["parallel.pipeline_model_parallel_size=4", "prune.num_layers=3"], "student: num_layers=3 is fewer than"),
        (
            3,
            ["parallel.tensor_model_parallel_size=2", "prune.ffn_hidden_size=97"],
            "student: ffn_hidden_size=97 does not divide over parallel.tensor_model_parallel_size=2 (97 / 2 leaves 1)",
        ),
        (
            3,
            [
                "parallel.data_parallel_size=4",
                "distill.teacher.parallel.pipeline_model_parallel_size=4",
                "source.random.num_layers=3",
                "prune.num_layers=2",
            ],
            "in its own layout: num_layers=3 is fewer than distill.teacher.parallel.pipeline_model_parallel_size=4",
        ),
        (
            3,
            ["parallel.tensor_model_parallel_size=8", "distill.teacher.parallel.tensor_model_parallel_size=1"],
            "source: num_query_groups=4 does not divide over parallel.tensor_model_parallel_size=8",
        ),
        (
            3,
            ["distill.teacher.path=/models/Big"],
            "import a Hugging Face model first, `minitron import name=teacher source.path=/models/Big`, and give",
        ),
        (3, ["source.random.num_query_groups=3"], "num_attention_heads=8 is not a multiple of num_query_groups=3"),
        (7, ["prune.hidden_size=128"], "prune.hidden_size=128 is larger than the model's 64; use at most 64"),
        (7, ["prune.num_layers=5"], "prune.num_layers=5 is larger than the model's 4"),
        (
            7,
            ["prune.num_attention_heads=6"],
            "num_attention_heads=6 does not divide over num_query_groups=4 (6 / 4 leaves 2)",
        ),
        (7, ["prune.num_query_groups=3"], "num_attention_heads=8 does not divide over num_query_groups=3"),
        (7, ["prune.drop_layers=[4]"], "prune.drop_layers names [4], but the model's 4 layers are numbered 0 to 3"),
        (
            7,
            ["prune.drop_layers=[1]", "prune.num_layers=2"],
            "prune.num_layers=2 contradicts prune.drop_layers, which leaves 4 - 1 = 3 layers",
        ),
        (
            7,
            [
                "source.random.num_query_groups=8",
                "prune.num_attention_heads=2",
                "prune.num_query_groups=2",
                "prune.head_residual=paper",
                "prune.reconstruct.enabled=false",
            ],
            "of 8 heads that may be merged (num_attention_heads=8, num_query_groups=8) only 2 are kept",
        ),
        (3, ["prune.head_residual=laco"], "but prune.reconstruct fits linear_qkv anew; set prune.reconstruct.enabled="),
        (3, ["prune.spec=a.json", "prune.num_layers=3"], "would not be read; set prune.num_layers=null"),
        (7, ["prune.spec=/nowhere/spec.json"], "/nowhere/spec.json is no readable prune spec (FileNotFoundError"),
        (4, ["data.seq_length=512"], "data.seq_length=512 is longer than the model's 256 positions"),
        (
            4,
            ["source.random.hidden_size=60"],
            "source.random: hidden_size=60 is not a multiple of num_attention_heads=8",
        ),
        (4, ["source.random.num_attention_heads=0"], "source.random: hidden_size=64 is not a multiple of"),
        (4, ["source.random.num_layers=0"], "num_layers=0 must be at least 1"),
        (
            3,
            ["precision=fp8_delayed", "prune.hidden_size=56"],
            "student: hidden_size=56 is not a multiple of 16 (nearest: 48 or 64), which FP8 (delayed) needs",
        ),
        (
            3,
            [
                "precision=bf16",
                "distill.teacher.fp8_recipe=mxfp8",
                "distill.teacher.parallel.tensor_model_parallel_size=4",
                "parallel.data_parallel_size=4",
                "source.random.ffn_hidden_size=192",
            ],
            "teacher of student: ffn_hidden_size=192 / tensor_model_parallel_size=4 = 48 is not a multiple of 32",
        ),
        (10, ["precision=mxfp8"], "precision.fp8_recipe=mxfp8 needs an NVIDIA GPU of compute capability 10.0 or"),
        (5, ["data=files", "data.paths=[/nowhere/a.txt]", "data.seq_length=32"], "/nowhere/a.txt"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit(fails: Fails, code: int, overrides: list[str], message: str) -> None:
    assert message in fails(code, "source.kind=random", *overrides)


def test_too_little_text(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 100)
    given = [
        "data=files",
        f"data.paths=[{tmp_path / 'text.txt'}]",
        "score.num_samples=2",
        "prune.reconstruct.enabled=false",
    ]
    message = fails(5, "source.kind=random", *given, "distill.train.global_batch_size=4")
    assert "text.txt: 100 bytes in 1 documents are at most 102 tokens" in message
    assert "need 162" in message  # (4 + 1) x 32, and the last label of either split
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_ranks(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **master}.items():
        monkeypatch.setenv(name, value)
    message = fails(3, "source.kind=random", "parallel.pipeline_model_parallel_size=2")
    assert "4 processes were started, but the layout needs tensor 1 x pipeline 2 x data 1 = 2" in message
    for launch, verb in itertools.product(("slurm", "torchrun"), ("compress", "preflight")):
        message = fails(3, "source.kind=random", f"launch={launch}", verb=verb)
        assert f"launch={launch} starts the ranks, but torchrun has started this process as rank 0 of 4" in message
    monkeypatch.delenv("LOCAL_RANK")
    assert "MASTER_PORT set but LOCAL_RANK not" in fails(10, "source.kind=random")


def test_more_ranks_than_gpus(fails: Fails, text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message = fails(3, "source.kind=random", *text, "device=cuda", "parallel.pipeline_model_parallel_size=2")
    assert "pipeline 2" in message
    assert "need 2 GPUs on this machine, which has 1; change parallel.*" in message


@pytest.mark.parametrize(("ranks", "refused"), [(17, True), (16, False)])
@pytest.mark.parametrize("verb", ["preflight", "compress"])
def test_far_more_ranks_than_cores(
    fails: Fails, text: list[str], monkeypatch: pytest.MonkeyPatch, ranks: int, refused: bool, verb: str
) -> None:
    monkeypatch.setattr("minitron.runtime.device.num_cores", lambda: 2)
    layout = ["device=cpu", f"parallel.data_parallel_size={ranks}", f"distill.train.global_batch_size={ranks}"]
    overrides = ["source.kind=random", *text, *layout, "distill.train.micro_batch_size=1"]
    if not refused:
        with pytest.raises(AssertionError, match="started"):
            fails(3, *overrides, verb=verb)
        return
    message = fails(3, *overrides, verb=verb)
    assert (
        "would start 17 processes on this machine, which has 2 cores and no GPU in use, more than 8 a core;" in message
    )
    assert "change parallel.* or search.workers, or start it where there are more: launch=torchrun" in message


def test_run_folder_of_another_model(fails: Fails, model: Path, text: list[str], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "mine")
    identity = StageIdentity("import", {"source.dtype": "auto"}, {"model": "other"})
    run.begin(identity, resumable=False)
    run.finish(identity, summary={}, seconds=0.0, environment={})
    for on_change in ("error", "rerun"):
        message = fails(8, f"source.path={model}", *text, "name=mine", f"on_change={on_change}")
        assert f"{run.path} belongs to another model (input model has changed)" in message


def test_verb_before_what_it_needs(fails: Fails, text: list[str], tmp_path: Path) -> None:
    message = fails(8, "source.kind=random", *text, verb="distill")
    assert "distill needs the stage import, which is not in" in message
    assert not (tmp_path / "runs").exists()


def test_runs_dir_that_cannot_be_made(fails: Fails, text: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fails(8, "source.kind=random", *text, f"runs_dir={tmp_path / 'file'}", verb="import")
    assert "Not a directory" in message
    assert "set runs_dir= to a writable folder" in message


def test_eval_checkpoint_that_is_not_there(fails: Fails, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert f"eval.checkpoint={missing} does not exist" in fails(
        3, "source.kind=random", f"eval.checkpoint={missing}", verb="eval"
    )


def test_train_without_a_baseline(fails: Fails, text: list[str]) -> None:
    message = fails(3, "source.kind=random", *text, "baseline.enabled=false", verb="train")
    assert "nothing to train" in message
    assert "baseline.enabled=true" in message
