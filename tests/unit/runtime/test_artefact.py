"""A stage's folder: skipped when the same, never half there, never lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from minitron.config.run import OnChange
from minitron.errors import ArtefactError
from minitron.runtime.artefact import META_FILE, RunFolder, StageIdentity, storage_error, write_json


def _identity(stage: str = "prune", *, size: int = 48, source: str = "abc") -> StageIdentity:
    return StageIdentity(stage, {"prune.hidden_size": size, "prune.seed": 1}, {"import": source})


def _make(run: RunFolder, identity: StageIdentity, content: str) -> Path:
    folder = run.begin(identity, resumable=False)
    (folder / "result.txt").write_text(content)
    return run.finish(identity, summary={"n": 1}, seconds=1.234, environment={"torch": "x"})


def test_finished_stage_is_skipped_when_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.is_done(_identity(), OnChange.error) == (False, [])
    folder = _make(run, _identity(), "one")
    assert folder == tmp_path / "run" / "prune"
    assert sorted(file.name for file in folder.iterdir()) == [META_FILE, "result.txt"]
    meta = json.loads((folder / META_FILE).read_text())
    assert meta["digest"] == _identity().digest
    assert meta["summary"] == {"n": 1}
    assert meta["seconds"] == 1.23
    for on_change in OnChange:
        assert run.is_done(_identity(), on_change) == (True, [])


def test_digest_depends_on_everything_and_not_on_order() -> None:
    first = StageIdentity("a", {"x": 1, "y": 2}, {"i": "1"})
    assert first.digest == StageIdentity("a", {"y": 2, "x": 1}, {"i": "1"}).digest
    others = [
        StageIdentity("b", {"x": 1, "y": 2}, {"i": "1"}),
        StageIdentity("a", {"x": 1, "y": 3}, {"i": "1"}),
        StageIdentity("a", {"x": 1, "y": 2}, {"i": "2"}),
        StageIdentity("a", {"x": 1}, {"i": "1"}),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_changed_stage_is_an_error_that_names_the_difference(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    _make(run, _identity(), "one")
    with pytest.raises(ArtefactError) as caught:
        run.is_done(_identity(size=40, source="xyz"), OnChange.error)
    message = str(caught.value)
    assert f"{tmp_path / 'run' / 'prune'} was made with other inputs" in message
    assert "prune.hidden_size: 48 -> 40" in message
    assert "input import has changed" in message
    assert "prune.seed" not in message
    assert "on_change=rerun" in message
    assert "\n" not in message


def test_many_differences_are_counted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    _make(run, StageIdentity("s", {f"k{i}": 0 for i in range(5)}, {}), "")
    with pytest.raises(ArtefactError, match=r"k0: 0 -> 1, k1: 0 -> 1, k2: 0 -> 1 and 2 more"):
        run.is_done(StageIdentity("s", {f"k{i}": 1 for i in range(5)}, {}), OnChange.error)


def test_rerun_keeps_the_old_result_aside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    old, new = _identity(), _identity(size=40)
    _make(run, old, "one")
    assert run.is_done(new, OnChange.rerun) == (False, ["prune.hidden_size: 48 -> 40"])
    assert (run.stage("prune") / "result.txt").read_text() == "one"  # until the new one is whole
    _make(run, new, "two")
    assert (run.stage("prune") / "result.txt").read_text() == "two"
    aside = tmp_path / "run" / "superseded" / f"prune-{old.digest[:12]}"
    assert (aside / "result.txt").read_text() == "one"
    _make(run, old, "one again")  # and back: both are there
    assert (run.stage("prune") / "result.txt").read_text() == "one again"
    names = {folder.name for folder in (tmp_path / "run" / "superseded").iterdir()}
    assert names == {f"prune-{old.digest[:12]}", f"prune-{new.digest[:12]}"}


@pytest.mark.parametrize("on_change", OnChange)
def test_another_model_is_always_an_error(tmp_path: Path, on_change: OnChange) -> None:
    run = RunFolder(tmp_path / "run")
    _make(run, StageIdentity("import", {}, {"model": "1"}), "")
    with pytest.raises(ArtefactError) as caught:
        run.is_done(StageIdentity("import", {}, {"model": "2"}), on_change)
    assert f"{tmp_path / 'run'} belongs to another model (input model has changed)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interrupted_stage_is_not_done(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    folder = run.begin(_identity(), resumable=True)
    (folder / "half.txt").write_text("half")
    assert run.meta("prune") is None
    assert run.is_done(_identity(), OnChange.error) == (False, [])
    assert not run.stage("prune").exists()


@pytest.mark.parametrize(
    ("resumable", "same", "kept"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_partial_is_kept_only_for_the_same_identity(tmp_path: Path, resumable: bool, same: bool, kept: bool) -> None:
    run = RunFolder(tmp_path / "run")
    (run.begin(_identity(), resumable=resumable) / "half.txt").write_text("half")
    again = run.begin(_identity() if same else _identity(size=40), resumable=resumable)
    assert (again / "half.txt").exists() is kept


def test_partial_without_its_mark_is_not_trusted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    folder = run.begin(_identity(), resumable=True)
    (folder / "half.txt").write_text("half")
    (folder / "digest").unlink()
    assert not (run.begin(_identity(), resumable=True) / "half.txt").exists()


@pytest.mark.parametrize("content", [None, "", '{"digest": "ab'])
def test_folder_without_readable_metadata_is_one_line(tmp_path: Path, content: str | None) -> None:
    run = RunFolder(tmp_path)
    run.stage("prune").mkdir()
    if content is not None:
        (run.stage("prune") / META_FILE).write_text(content)
    with pytest.raises(ArtefactError, match=r"prune is not a finished stage .*; move it away") as caught:
        run.is_done(_identity(), OnChange.rerun)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_metadata_of_another_program_is_one_line(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.stage("prune").mkdir()
    (run.stage("prune") / META_FILE).write_text(content)
    with pytest.raises(ArtefactError, match="prune is not a finished stage"):
        run.is_done(_identity(), OnChange.rerun)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_so(tmp_path: Path, number: int) -> None:
    error = storage_error(OSError(number, "full"), tmp_path / "not" / "there")
    assert isinstance(error, ArtefactError)
    assert error.exit_code == 8
    assert f"no space left for {tmp_path}/not/there (" in str(error)
    assert "GB free); the stage is not done. Free space, or set runs_dir=" in str(error)


def test_other_refusals_say_why(tmp_path: Path) -> None:
    error = storage_error(OSError(errno.EACCES, "Permission denied"), tmp_path)
    assert str(error) == f"cannot write {tmp_path}: Permission denied; set runs_dir= to a writable folder"


def test_runs_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"cannot write .*: Not a directory"):
        RunFolder(tmp_path / "file" / "run").begin(_identity(), resumable=False)


def test_write_json_leaves_no_temporary(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_finished_stage_in_a_subfolder_is_taken_up_again(tmp_path: Path) -> None:
    run, identity = RunFolder(tmp_path / "run"), _identity("steps/mid/teacher_logits")
    _make(run, identity, "first")
    content = {path.name for path in run.stage(identity.stage).iterdir()}
    shutil.rmtree(run.path / ".partial")
    assert content <= {path.name for path in run.begin(identity, resumable=True).iterdir()}
    assert not run.stage(identity.stage).exists()


def test_a_stage_in_use_is_left_alone(tmp_path: Path) -> None:
    run, again = RunFolder(tmp_path / "demo"), RunFolder(tmp_path / "demo")
    with run.in_use("steps/a/prune"):
        with again.in_use("steps/b/prune"):
            pass
        with (
            pytest.raises(ArtefactError, match=r"at work on .*demo/steps/a/prune; wait"),
            again.in_use("steps/a/prune"),
        ):
            pass
    with again.in_use("steps/a/prune"):  # it ends with the block
        pass
