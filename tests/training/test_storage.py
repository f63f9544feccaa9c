"""Full disks and read-only folders end in a StorageError that names the file, and leave earlier files whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from test_loop import folder, trainer  # noqa: F401 folder is a fixture

from mindomni_rt.outputs import write_atomic
from mindomni_rt.training.errors import StorageError
from mindomni_rt.training.loop import checkpointing
from mindomni_rt.training.outputs import check_target, save_checkpoint, save_tensors


def state_of(run):
    return checkpointing.capture(1, run.trained, run.optimizer, run.ema, {}, {})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        # What torch raises when a write into its zip file fails, depending on where.
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "unexpected pos"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "file write failed"),
    ],
)
def test_a_checkpoint_that_cannot_be_written(error, reason, folder, tmp_path, monkeypatch):  # noqa: F811
    run = trainer(folder, tmp_path, optim={"steps": 1})
    run.run()

    def fail(*_):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StorageError, match=f"step-00000001 could not be written: .*{reason}"):
        checkpointing.save(tmp_path / "checkpoints", state_of(run), keep=1)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpointing.latest(tmp_path / "checkpoints").step == 1


def test_a_small_disk_that_fills_while_torch_writes(folder, tmp_path):  # noqa: F811
    """The file's own limit stands for the disk: the kernel refuses the bytes beyond it."""
    import resource
    import signal

    run = trainer(folder, tmp_path, optim={"steps": 1})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (1, 5_000, 60_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(StorageError, match="could not be written"):
                checkpointing.save(tmp_path / "checkpoints", state_of(run), keep=1)
            with pytest.raises(StorageError, match=r"model .* could not be written"):
                save_checkpoint(run.stage.model, tmp_path / "model", folder)
            with pytest.raises(StorageError, match=r"x\.safetensors could not be written"):
                save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(20_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "checkpoints").iterdir()) == [] and not list(tmp_path.glob("*x.safetensors*"))


def test_a_target_is_checked_before_the_work(tmp_path):
    check_target(tmp_path / "new" / "record.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(ValueError, match="is a folder, expected the name of a file"):
        check_target(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/record"):
        check_target(tmp_path / "file" / "record.json")
    with pytest.raises(StorageError, match=r"proc/record\.json"):
        write_atomic(Path("/proc/record.json"), "x")


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "one\n")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(StorageError, match=r"a\.txt could not be written: No space left"):
        write_atomic(path, "two\n")
    monkeypatch.undo()
    assert path.read_text() == "one\n" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
