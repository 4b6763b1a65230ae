"""The files from which every rank loads the composed configuration and the hashes of outside content."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from minitron.config.compose import load_resolved, to_yaml
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
from minitron.runtime.environment import environment


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
