"""The file from which every rank loads the composed configuration."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minitron.config.compose import load_resolved, to_yaml
from minitron.config.run import RunConfig
from minitron.runtime.artefact import RESOLVED_FILE, WANTED_FILE, RunFolder, storage_error, write_json, write_whole
from minitron.runtime.environment import environment


def write_resolved(run: RunFolder, config: RunConfig, wanted: Sequence[str]) -> Path:
    """Write what every rank will load, with the versions and the commit at its head, and what stages are wanted.

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
