"""A stage, the identities of a list of stages, and running what is not done yet."""

import contextlib
import ctypes
import errno
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from minitron.config.run import RunConfig
from minitron.errors import ArtefactError, MinitronError, StoppedError
from minitron.losses import workspace
from minitron.runtime.artefact import PARTIAL_DIR, RunFolder, StageIdentity, storage_error
from minitron.runtime.environment import environment
from minitron.runtime.signals import any_rank_was_asked

if TYPE_CHECKING:  # a session brings Megatron-Core with it, which planning does not need
    from minitron.runtime.session import Session


OutsideHashes = dict[str, dict[str, str]]
"""By stage and name: hashes of content outside the run folder."""

_PROBE_BYTES = 1 << 20


def nothing_outside(_config: RunConfig) -> dict[str, str]:
    """For a stage that reads nothing outside the run folder."""
    return {}


def _lacks_nothing(_config: RunConfig, _run: RunFolder) -> str | None:
    return None


def _refuses_nothing(_config: RunConfig, _run: RunFolder) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """One step of the line.

    Attributes:
        name: Name of its folder.
        needs: Stages whose artefacts it reads.
        values: The configuration values that decide its result, by dotted key.
        run: Does the work on every rank; writes into the given folder; what it returns on rank 0 is the summary.
        outside: Hashes of content outside the run folder that it reads.
        resumable: Whether an interrupted attempt's folder is of use.
        mentions: Stages whose identities it is told, though it does not read them: they need not be there.
        waits_for: Stages that have to succeed before it, though it reads nothing of them: they fail where its hours
            would be lost.
        lacks: What a finished artefact of the right identity still lacks for this configuration, in words; running
            the stage again adds it.
        check: Refuses a finished artefact of the right identity that will not do for what is asked for now, where
            running the stage again would not help; called where the stage is wanted, before any work.
        alone: One process on the CPU does it: it reads, writes and slices files. With more, most would wait.
    """

    name: str
    needs: tuple[str, ...]
    values: Callable[[RunConfig], dict[str, Any]]
    run: Callable[["Session", Path], dict[str, Any]]
    outside: Callable[[RunConfig], dict[str, str]] = field(default=nothing_outside)
    resumable: bool = False
    mentions: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    lacks: Callable[[RunConfig, RunFolder], str | None] = field(default=_lacks_nothing)
    check: Callable[[RunConfig, RunFolder], None] = field(default=_refuses_nothing)
    alone: bool = False


@dataclass(frozen=True)
class Planned:
    """A stage with its identity and whether it is done.

    Attributes:
        stage: The stage.
        identity: What its result depends on.
        done: Its artefact exists.
        changed: Why it is run again, when an older artefact is in its place; empty where it is only added to.
        digests: Identity of each of its inputs and of each stage that it mentions, by name.
    """

    stage: Stage
    identity: StageIdentity
    done: bool
    changed: list[str]
    digests: dict[str, str]


def outside_hashes(stages: Sequence[Stage], config: RunConfig) -> OutsideHashes:
    """Hash what the stages read from outside the run folder; a large model takes minutes, so do it once a job."""
    return {stage.name: stage.outside(config) for stage in stages}


def plan_stages(
    stages: Sequence[Stage],
    config: RunConfig,
    run: RunFolder,
    wanted: Sequence[str],
    outside: OutsideHashes | None = None,
) -> list[Planned]:
    """Decide which of the wanted stages are done.

    Args:
        stages: All stages, each after those it needs.
        config: The run's configuration.
        run: Its folder.
        wanted: Names of the stages to run.
        outside: What `outside_hashes` gave a moment ago; None hashes now.

    Raises:
        ArtefactError: A finished stage was made with other inputs (see `RunFolder.is_done`), or a wanted stage needs
            one that is neither done nor wanted, or that lacks something.
        MinitronError: `Stage.check` refuses what a wanted stage has left.
    """
    outside = outside_hashes(stages, config) if outside is None else outside
    by_name = {stage.name: stage for stage in stages}
    identities: dict[str, StageIdentity] = {}
    planned: list[Planned] = []
    for stage in stages:
        inputs = {name: identities[name].digest for name in stage.needs}
        inputs |= outside[stage.name]
        identity = StageIdentity(stage.name, stage.values(config), inputs)
        identities[stage.name] = identity
        if stage.name not in wanted:
            continue
        for needed in stage.needs:
            _check_needed(identities[needed], run, wanted, stage.name)
            _check_complete(by_name[needed], config, run, wanted, stage.name)
        done, changed = run.is_done(identity, config.on_change)
        if done:
            stage.check(config, run)
        done = done and stage.lacks(config, run) is None
        digests = inputs | {name: identities[name].digest for name in stage.mentions}
        planned.append(Planned(stage, identity, done, changed, digests))
    return planned


def _check_needed(identity: StageIdentity, run: RunFolder, wanted: Sequence[str], by: str) -> None:
    if identity.stage in wanted:
        return
    meta = run.meta(identity.stage)
    if meta is None:
        raise ArtefactError(
            f"{by} needs the stage {identity.stage}, which is not in {run.path}; "
            f"run it first, or run `minitron compress` with the same settings"
        )
    if meta["digest"] != identity.digest:
        changes = ", ".join(identity.differences(meta)[:3])
        raise ArtefactError(
            f"{by} needs the stage {identity.stage}, but {run.stage(identity.stage)} was made with other inputs "
            f"({changes}); run that stage again, or use another name="
        )


def _check_complete(needed: Stage, config: RunConfig, run: RunFolder, wanted: Sequence[str], by: str) -> None:
    lack = None if needed.name in wanted else needed.lacks(config, run)
    if lack:
        verb = needed.name.rsplit("/", 1)[-1].replace("_", "-")
        raise ArtefactError(f"{by}: {lack}; run `minitron {verb}` with the same settings, which adds them")


def run_stages(planned: Sequence[Planned], session: "Session") -> None:
    """Run every planned stage that is not done. Called by all ranks with the same plan."""
    for number, item in enumerate(planned, start=1):
        label = f"[{number:>2}/{len(planned)}] {item.stage.name}"
        if item.done:
            meta = session.run.meta(item.stage.name) or {}
            session.say(f"{label}: done before ({meta.get('seconds', 0):.0f} s then)")
            continue
        if item.changed:
            session.say(f"{label}: running again, {'; '.join(item.changed[:4])}; the old result is in superseded/")
        if any_rank_was_asked():
            raise StoppedError(f"stopped before {item.stage.name}; the same command goes on from there")
        started = time.monotonic()
        session.say(f"{label} ...")
        summary = _run_stage(item, session)
        _give_back_memory()
        shown = ", ".join(f"{key} {_short(value)}" for key, value in summary.items())
        session.say(f"{label}: {time.monotonic() - started:.0f} s  {shown}")


def _give_back_memory() -> None:
    """Free what a stage has left: models and optimizers hold cycles, and allocators keep what is freed."""
    workspace.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries give memory back by themselves
    if trim is not None:
        trim(0)


def _run_stage(item: Planned, session: "Session") -> dict[str, Any]:
    """Run one stage in its working folder and give the folder its place."""
    started = time.monotonic()
    partial = session.run.path / PARTIAL_DIR / item.stage.name
    summary: dict[str, Any] = {}
    alone = session.run.in_use(item.stage.name) if session.is_main else contextlib.nullcontext()
    try:
        with alone:
            if session.is_main:
                session.run.begin(item.identity, resumable=item.stage.resumable)
            torch.distributed.barrier()
            summary = item.stage.run(replace(session, digests=item.digests), partial)
            torch.distributed.barrier()
            if session.is_main:
                session.run.finish(
                    item.identity,
                    summary=summary,
                    seconds=time.monotonic() - started,
                    environment=environment(),
                )
            torch.distributed.barrier()
    except MinitronError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        refused = _storage_cause(error) or _refused_now(error, partial)
        if refused is None:
            raise
        raise storage_error(refused, partial) from error
    return summary


def _storage_cause(error: BaseException | None) -> OSError | None:
    """The file system's refusal behind an error, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return error
        error = error.__cause__ or error.__context__
    return None


def _refused_now(error: BaseException, folder: Path) -> OSError | None:
    """The same where the error number was lost: Megatron's writer passes on neither number nor message."""
    writing = isinstance(error, CheckpointException) or "PytorchStreamWriter" in str(error)
    if not writing:
        return None
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return _storage_cause(refused)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
