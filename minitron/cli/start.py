"""Start the ranks of a job on this machine, and the files from which each loads its configuration."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from minitron.cli.worker import runs_alone
from minitron.config.compose import load_resolved, to_yaml
from minitron.config.launch import nodes_of
from minitron.config.run import RunConfig
from minitron.pipeline import OutsideHashes
from minitron.runtime.artefact import (
    OUTSIDE_FILE,
    RESOLVED_FILE,
    WANTED_FILE,
    RunFolder,
    storage_error,
    write_json,
    write_whole,
)
from minitron.runtime.device import check_devices
from minitron.runtime.environment import environment
from minitron.runtime.launch import launch_ranks


def write_resolved(run: RunFolder, config: RunConfig, wanted: Sequence[str]) -> Path:
    """Write a run's configuration into its folder, with the versions and the commit at its head.

    Args:
        run: The run's folder.
        config: The run.
        wanted: Stages for `minitron status` to list before they begin; with none, what is written there stays.

    Raises:
        ArtefactError: The folder cannot be written.
    """
    path = run.path / RESOLVED_FILE
    head = "".join(f"# {key}: {value}\n" for key, value in environment().items())
    # Every host of several writes it: without what is one host's own, they write the same.
    config = replace(config, launch=replace(config.launch, is_host=None, local_address=None))
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(path, head + to_yaml(config))
        if wanted:
            write_json(run.path / WANTED_FILE, list(wanted))
    except OSError as error:
        raise storage_error(error, path) from error
    assert load_resolved(path) == config, "a configuration must survive its own YAML"
    return path


@contextmanager
def given_to_ranks(config: RunConfig, outside: OutsideHashes) -> Iterator[tuple[str, str]]:
    """Files for the ranks that are started on this machine: the configuration and the hashes, for `cli.worker`.

    They are this job's own. Ranks that are lost and started again read them once more, whatever other commands have
    written into the run's folder by then.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        hashes = Path(folder) / OUTSIDE_FILE
        write_json(hashes, outside)
        yield str(write_resolved(RunFolder(Path(folder)), config, [])), str(hashes)


def start_ranks(
    config: RunConfig,
    stages: Sequence[str],
    outside: OutsideHashes,
    *,
    run: RunFolder | None = None,
    wanted: Sequence[str] = (),
) -> int:
    """Start as many ranks as the stages need, and wait.

    Args:
        config: The run.
        stages: What every rank's worker is asked for.
        outside: Hashes of what lies outside the run's folder.
        run: The folder that the stages go to, where `write_resolved` puts what is started once it can be; None for
            what is no stage.
        wanted: See `write_resolved`.

    Returns:
        Exit code.
    """
    nodes, ranks_per_node = (
        (1, 1) if runs_alone(config, stages) else nodes_of(config.launch, config.cluster, config.parallel)
    )
    check_devices(ranks_per_node, config)
    if run is not None:
        write_resolved(run, config, wanted)
    with given_to_ranks(config, outside) as (resolved, hashes):
        arguments = [resolved, ",".join(stages), hashes]
        return launch_ranks(
            arguments, config.launch, nodes=nodes, ranks_per_node=ranks_per_node, name=f"minitron-{config.name}"
        )
