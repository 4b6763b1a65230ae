"""What jobs ask of their nodes and containers: GPUs or none, images, folders."""

from pathlib import Path

import pytest

from minitron.config.compose import load_resolved
from minitron.config.run import Device
from tests.unit.cli.conftest import Compress

TWO = ["parallel.pipeline_model_parallel_size=2"]


def test_what_a_container_lacks_is_refused(
    compress: Compress, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    container = ["launch.container_image=/images/minitron.sqsh", "launch.dry_run=true"]
    text = tmp_path / "text.txt"
    assert compress(*container) == 3
    assert capsys.readouterr().err == (
        f"error: data.paths={text} is not in the container, which has {Path.cwd()}, {tmp_path / 'runs'}; "
        f"add {tmp_path}:{tmp_path} to launch.container_mounts\n"
    )
    assert compress(*container, f"launch.container_mounts=['{tmp_path}:/elsewhere']") == 3  # not by this name
    assert f"add {tmp_path}:{tmp_path} to" in capsys.readouterr().err
    assert compress(*container, f"launch.container_mounts=['{tmp_path}:{tmp_path}:ro']") == 0
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "text.txt").symlink_to(text)
    linked = [f"data.paths=[{tmp_path / 'linked' / 'text.txt'}]", f"launch.container_mounts=[{tmp_path / 'linked'}]"]
    assert compress(*container, *linked) == 3
    assert f"add {tmp_path}:{tmp_path} to" in capsys.readouterr().err


def test_on_the_cpu_the_nodes_gpus_are_not_asked_for(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("cluster=dgx_h100", "device=cpu", "launch.dry_run=true", *TWO, verb="preflight") == 0
    out = capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=2\n" in out
    assert "gpus-per-node" not in out


def test_an_image_that_is_a_file(
    compress: Compress, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyxis would look for a relative one in a registry."""
    monkeypatch.chdir(tmp_path)
    container = ["launch.dry_run=true", "launch.container_image=images/minitron.sqsh"]
    assert compress(*container, verb="import") == 3
    file = tmp_path / "images" / "minitron.sqsh"
    assert f"launch.container_image=images/minitron.sqsh: there is no {file}; name" in capsys.readouterr().err
    file.parent.mkdir()
    file.write_bytes(b"")
    assert compress(*container, verb="import") == 0
    assert f"    --container-image={file}\n" in capsys.readouterr().out
    assert compress("launch.dry_run=true", "launch.container_image='nvcr.io#team/minitron:1'", verb="import") == 0
    assert "    '--container-image=nvcr.io#team/minitron:1'\n" in capsys.readouterr().out


def test_what_computes_on_cpus_asks_enroot_for_no_gpu(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    """NVIDIA's images ask for all, and where there is no driver enroot would end with that."""
    void = 'export NVIDIA_VISIBLE_DEVICES="void"'
    container = ["launch.dry_run=true", "launch.container_image=/images/minitron.sqsh", "launch.container_mounts=[/]"]
    for words, verb, said in (
        ((*container, "cluster=dgx_h100"), "import", True),
        ((*container, "cluster=dgx_h100"), "preflight", False),
        (container, "preflight", True),
        (container[:1], "import", False),
    ):
        assert compress(*TWO, *words, verb=verb) == 0
        assert (void in capsys.readouterr().out) == said, (words, verb)


def test_nodes_without_gpus_are_remarked_on(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    """A forgotten ``cluster=`` would ask for as many nodes of CPUs as the layout has ranks; unless it is meant."""
    cases = (
        (("device=auto",), "preflight", True),
        (("device=cpu",), "preflight", False),
        (("device=auto",), "import", False),  # one process on a CPU anyway
        (("device=auto", "cluster=dgx_h100"), "preflight", False),
    )
    for words, verb, remarked in cases:
        assert compress(*TWO, *words, "launch.dry_run=true", verb=verb) == 0
        out = capsys.readouterr().out
        assert out.startswith("# the nodes have no GPUs (cluster.gpus_per_node=0)") == remarked, (words, verb)


def test_gpus_that_the_nodes_do_not_have(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("device=cuda", "launch.dry_run=true", verb="preflight") == 3
    assert "error: device=cuda, but the nodes have no GPUs (cluster.gpus_per_node=0); name" in capsys.readouterr().err


def test_a_gpu_cluster_computes_on_gpus(compress: Compress, slurm: Path, tmp_path: Path) -> None:
    assert compress("cluster=dgx_h100", verb="import") == 0
    assert load_resolved(tmp_path / "runs" / "tiny" / "jobs" / "001" / "resolved.yaml").device is Device.cuda
