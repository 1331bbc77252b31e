"""Checkpoints that survive a kill, broken ones that are set aside, and trainings that start at step 0 unnoticed."""

from __future__ import annotations

import errno
import fnmatch
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Started
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import ft_callback
from ft_callback import AtomicCheckpointIO, FaultToleranceCallback, is_complete, set_broken_checkpoints_aside

pytestmark = pytest.mark.filterwarnings("ignore")


def save(path: Path, step: int, size: int = 1000) -> None:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.zeros(size)}, path)


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


@pytest.fixture
def other_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files lie on another file system than checkpoints, from which a rename is a copy."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield


def kill_in_a_save(io: Any, target: Path, size: int, delay: float) -> int:
    """Let a child save step after step, kill it, and return the last step that it acknowledged, or had found."""
    before = step_of(target)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(before + 1):
            io.save_checkpoint({"global_step": step, "weights": torch.zeros(size)}, target)
            os.write(writer, step.to_bytes(8, "big"))
    os.close(writer)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = os.read(reader, 1 << 20)
    os.close(reader)
    return int.from_bytes(acknowledged[-8:], "big") if acknowledged else before


@pytest.mark.usefixtures("other_file_system")
def test_fifty_kills_in_the_middle_of_saves_leave_a_checkpoint_that_is_the_last_or_newer(tmp_path: Path) -> None:
    target, moments, in_the_middle = tmp_path / "last.ckpt", random.Random(0), 0
    save(target, 0)
    for _ in range(50):
        last = kill_in_a_save(AtomicCheckpointIO(), target, 50_000_000 // 4, moments.uniform(0.02, 0.25))
        assert step_of(target) in (last, last + 1)
        in_the_middle += len(list(tmp_path.glob(f".*{ft_callback.UNFINISHED}")))
        ft_callback.remove_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == [target]
    assert in_the_middle >= 5, "hardly any save was interrupted: this has shown nothing"


@pytest.mark.usefixtures("other_file_system")
def test_such_kills_destroy_what_lightning_writes(tmp_path: Path) -> None:
    """Otherwise the test above shows nothing, or Lightning has mended it."""
    target, moments = tmp_path / "last.ckpt", random.Random(0)
    for _ in range(100):
        save(target, 0)
        kill_in_a_save(TorchCheckpointIO(), target, 50_000_000 // 4, moments.uniform(0.02, 0.25))
        if not is_complete(target):
            return
    raise AssertionError("no kill has left half of a checkpoint")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted: {mounted.stderr.decode()}")
    try:
        save(disk / "last.ckpt", 1)
        with pytest.raises((OSError, RuntimeError)):
            save(disk / "last.ckpt", 2, size=1_000_000)
        assert step_of(disk / "last.ckpt") == 1
        assert [path.name for path in disk.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_vanishes_during_a_save_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoints" / "last.ckpt"
    save(target, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: shutil.rmtree(target.parent))
    with pytest.raises(FileNotFoundError):
        save(target, 2)


def test_a_directory_that_may_not_be_written_any_more_leaves_the_old_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Root may write everywhere, so a child that is nobody tries."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                own = Path(name) / "own"
                own.mkdir()
                save(own / "last.ckpt", 1)
                monkeypatch.setattr(os, "fsync", lambda descriptor: own.chmod(0o555))
                try:
                    save(own / "last.ckpt", 2)
                except PermissionError as error:
                    os._exit(0 if step_of(own / "last.ckpt") == 1 and "last.ckpt" in str(error.filename2) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_file_and_its_directory_are_brought_to_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def fsync(descriptor: int) -> None:
        kinds.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        if kinds[-1] == "directory":
            assert (tmp_path / "last.ckpt").exists()
            raise OSError(errno.EINVAL, "some file systems cannot")

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path / "last.ckpt", 1)
    assert kinds == ["file", "directory"]


def test_names_may_be_as_long_as_the_file_system_allows_and_begin_with_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"{'x' * 250}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, f"~/{name}")
    assert step_of(tmp_path / name) == 1


def test_what_dead_writers_have_left_is_removed_and_that_of_living_ones_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    names = {
        f".last.ckpt.{host}.{dead.pid}{ft_callback.UNFINISHED}": False,
        f".last.ckpt.{host}.{os.getpid()}{ft_callback.UNFINISHED}": True,
        f".last.ckpt.another-host.{dead.pid}{ft_callback.UNFINISHED}": True,
        f".old.ckpt.another-host.1{ft_callback.UNFINISHED}": False,
        "last.ckpt": True,
    }
    for name in names:
        (tmp_path / name).touch()
        if name.startswith(".old"):
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    ft_callback.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, kept in names.items() if kept}


def test_the_next_save_removes_what_dead_writers_have_left_also_without_the_callback(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".x.{socket.gethostname()}.{dead.pid}{ft_callback.UNFINISHED}"
    left.touch()
    save(tmp_path / "last.ckpt", 1)
    assert not left.exists()


def test_a_complete_checkpoint_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1, size=100_000)
    assert is_complete(path)
    data = path.read_bytes()
    for length in [0, 1, 4, 100, *range(5_000, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:length])
        assert not is_complete(path), length
    for broken in (
        bytes(1000),
        b"some text",
        random.Random(0).randbytes(1000),
        data[:5000] + data[50_000:],
        b"PK" + data,
    ):
        path.write_bytes(broken)
        assert not is_complete(path), broken[:10]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/document", "not of torch")
    assert not is_complete(path)
    torch.save({"old": 1}, path, _use_new_zipfile_serialization=False)
    assert is_complete(path)


def resumable(path: Path, step: int, age: int) -> None:
    path.parent.mkdir(exist_ok=True)
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "optimizer_states": []}, path)
    os.utime(path, (time.time() - age,) * 2)


BROKEN = b"PK\3\4broken"


def test_broken_checkpoints_are_set_aside_and_the_newest_one_to_resume_from_takes_their_place(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    resumable(tmp_path / "val" / "loss=2.ckpt", 2, age=1)  # a metric's name may have a slash
    resumable(tmp_path / "epoch=1.ckpt", 1, age=2)
    save(tmp_path / "weights.ckpt", 3)
    for number, aside in enumerate(["last.ckpt.corrupt", "last.ckpt.corrupt-1"]):
        last.write_bytes(BROKEN + bytes([number]))
        (line,) = set_broken_checkpoints_aside([last])
        assert f"last.ckpt is not complete, now {aside}; going on from a copy of loss=2.ckpt" in line
        assert step_of(last) == 2
        assert (tmp_path / aside).read_bytes() == BROKEN + bytes([number])
    assert set_broken_checkpoints_aside([last, tmp_path / "not there"]) == []
    for path in tmp_path.rglob("*.ckpt"):
        path.write_bytes(b"")
    (line,) = set_broken_checkpoints_aside([last])
    assert "has no complete checkpoint: the next attempt starts at step 0" in line and not last.exists()


@pytest.mark.parametrize("function", [(shutil, "copyfile"), (os, "link"), (os, "replace")])
def test_a_full_disk_while_a_broken_checkpoint_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: tuple[Any, str]
) -> None:
    last = tmp_path / "last.ckpt"
    resumable(tmp_path / "epoch=1.ckpt", 1, age=2)
    last.write_bytes(BROKEN)

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*function, fail)
        with pytest.raises(OSError, match="No space left"):
            set_broken_checkpoints_aside([last])
    assert last.read_bytes() == BROKEN
    assert not list(tmp_path.glob(f".*{ft_callback.UNFINISHED}"))
    set_broken_checkpoints_aside([last])
    assert step_of(last) == 1


# ------------------------------------------------------------------------------------------------- in a training


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    for name in [name for name in os.environ if name.startswith(("FT_", "FAULT_TOL", "RANK", "SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    reader, writer = Pipe(duplex=False)
    os.set_blocking(reader.fileno(), False)
    monkeypatch.setenv("FT_MONITOR_FD", str(writer.fileno()))
    monkeypatch.setenv("FT_CONFIG", '{"rank_heartbeat_timeout": 600}')
    monkeypatch.setenv("FAULT_TOL_FINISHED_FLAG_FILE", str(tmp_path / "flag"))
    logging.getLogger("lightning.pytorch").propagate = True
    yield lambda: [json.loads(line) for line in os.read(reader.fileno(), 65536).splitlines()]
    reader.close()
    writer.close()


def fit(directory: Path, *plugins: Any, ckpt_path: str | None = "last", epochs: int = 1, **keep: Any) -> Trainer:
    options = {"dirpath": directory / "checkpoints", "save_last": True, **keep}
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, max_epochs=epochs, limit_train_batches=2, limit_val_batches=0,
        plugins=list(plugins),
        callbacks=[FaultToleranceCallback(autoresume=True), ModelCheckpoint(save_on_train_epoch_end=True, **options)],
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was renamed to a checkpoint, and the directory that it came from."""
    calls: list[tuple[str, str]] = []
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append((os.path.dirname(source), str(target)))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return calls


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["Lightning's", "asynchronous over Lightning's"])
def test_checkpoints_are_written_beside_their_target_and_then_reported(
    messages: Callable[[], list[dict[str, Any]]], replaced: list[tuple[str, str]], tmp_path: Path, plugins: list[Any]
) -> None:
    fit(tmp_path, *plugins)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert (os.path.dirname(last), last) in replaced
    order = [target for _, target in replaced]
    assert order.index(last) < len(order) - 1 - order[::-1].index(f"{tmp_path}/flag.progress")
    assert {"type": "saved", "step": 2} in messages()
    assert is_complete(Path(last))


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["Lightning's", "asynchronous over Lightning's"])
def test_a_checkpoint_that_is_told_of_is_on_the_disk(
    messages: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[Any]
) -> None:
    found: list[bool] = []

    def report_saved(self: Any, step: int) -> None:
        found.append(any(step_of(path) == step for path in tmp_path.glob("checkpoints/*.ckpt")))

    monkeypatch.setattr("ft_monitor.RankMonitorClient.report_saved", report_saved)
    fit(tmp_path, *plugins)
    assert len(found) >= 2 and all(found)


def slow_saves(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write = torch.save

    def save_slowly(*args: Any, **options: Any) -> None:
        time.sleep(seconds)
        write(*args, **options)

    monkeypatch.setattr(torch, "save", save_slowly)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[bool]]:
    """Whether a complete checkpoint that matches was there after each renaming and each removal, after the first."""
    moments: list[set[str]] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*args: Any, **options: Any) -> None:
            original(*args, **options)
            paths = (tmp_path / "checkpoints").glob("*.ckpt")
            moments.append({path.name for path in paths if path.is_file() and is_complete(path)})

        monkeypatch.setattr(os, name, watched)

    for name in ("replace", "remove", "unlink", "rename", "symlink"):
        watch(name)

    def answer(pattern: str) -> list[bool]:
        matches = [any(fnmatch.fnmatch(name, pattern) for name in names) for names in moments]
        return matches[matches.index(True) :]

    return answer


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["Lightning's", "asynchronous over Lightning's"])
@pytest.mark.parametrize("save_last", ["link", None])
def test_there_is_no_moment_without_a_checkpoint_to_resume_from(
    messages: Callable[[], Any], kept: Callable[[str], list[bool]], tmp_path: Path, plugins: list[Any],
    save_last: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Lightning removes the old link before it makes the new one, and files before their successors are written."""
    slow_saves(monkeypatch, 0.1)
    fit(tmp_path, *plugins, epochs=4, save_last=save_last, save_top_k=1)
    states = kept("last.ckpt" if save_last else "*.ckpt")
    assert len(states) >= 6 and all(states)
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["epoch=3-step=8.ckpt", *(["last.ckpt"] if save_last else [])]
    if save_last:
        assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == files[0]


def test_a_stop_request_waits_for_asynchronous_writers(
    messages: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_saves(monkeypatch, 0.3)
    monkeypatch.setattr(ft_callback, "STOP_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", None)  # would be Lightning's own writer
    (tmp_path / "flag.stop").touch()
    fit(tmp_path, AsyncCheckpointIO(), epochs=100, every_n_train_steps=1)
    last = step_of(tmp_path / "checkpoints" / "last.ckpt")
    assert json.loads((tmp_path / "flag.progress").read_text())["step"] == last == 1
    assert not (tmp_path / "flag").exists()


def test_a_note_of_progress_that_cannot_be_written_costs_a_line_and_nothing_else(
    messages: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FT_RUN_DIR", str(tmp_path / "removed meanwhile"))
    fit(tmp_path)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 2
    assert "removed meanwhile/progress.json that step 2 was saved: [Errno 2]" in caplog.text
    assert json.loads((tmp_path / "flag.progress").read_text())["step"] == 2
    assert (tmp_path / "flag").exists()


def test_a_class_of_the_users_with_the_name_of_lightnings_is_left_alone() -> None:
    own = type("TorchCheckpointIO", (TorchCheckpointIO,), {"__module__": "lightning_of_mine"})
    assert not ft_callback.is_lightnings_own(own())
    assert ft_callback.is_lightnings_own(TorchCheckpointIO()) and ft_callback.is_lightnings_own(AtomicCheckpointIO())


def test_a_checkpoint_io_of_the_users_own_is_left_alone(
    messages: Callable[[], list[dict[str, Any]]], replaced: list[tuple[str, str]], tmp_path: Path
) -> None:
    class Own(TorchCheckpointIO):
        saves = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.saves += 1
            super().save_checkpoint(*args, **kwargs)

    own = Own()
    fit(tmp_path, own)
    assert own.saves >= 1
    assert not [target for _, target in replaced if target.endswith("last.ckpt")]


def test_a_remote_path_is_left_to_lightning() -> None:
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, "memory://a/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://a/last.ckpt")["global_step"] == 3


def test_it_works_as_a_plugin_without_the_callback(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, max_steps=1, limit_val_batches=0, plugins=[AtomicCheckpointIO()],
        callbacks=[ModelCheckpoint(tmp_path, save_last=True)],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert step_of(tmp_path / "last.ckpt") == 1


def remove_file(directory: Path) -> dict[str, Any]:
    (directory / "checkpoints" / "last.ckpt").unlink()
    return {}


def link_directory(directory: Path) -> dict[str, Any]:
    (directory / "linked").symlink_to(directory / "checkpoints")
    return {"dirpath": directory / "linked", "ckpt_path": None}


def remove_last(directory: Path) -> dict[str, Any]:
    (directory / "checkpoints" / "last.ckpt").unlink()
    note = json.loads((directory / "flag.progress").read_text())
    note["checkpoint"] = str(directory / "checkpoints" / "epoch=0-step=2.ckpt")
    (directory / "flag.progress").write_text(json.dumps(note))
    return {}


ASK, KEEP, FIX = 'trainer.fit(..., ckpt_path="last")', "ModelCheckpoint(save_last=True)", "same in every run"
# What the first run does differently from what is right, and the second; and the advice that is given, and only this.
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]], list[str]]] = {
    "no ckpt_path": ({}, lambda directory: {"ckpt_path": None}, [ASK]),
    "another directory": ({}, lambda directory: {"dirpath": directory / "another"}, [FIX]),
    "no save_last": ({"save_last": False}, lambda directory: {"save_last": False}, [KEEP]),
    "neither": ({}, lambda directory: {"dirpath": directory / "another", "save_last": None}, [FIX, KEEP]),
    "the file is removed": ({}, remove_file, ["the file is not there any more"]),
    "last.ckpt is removed": ({}, remove_last, ["there is no last checkpoint: copy "]),
    "save_last is new, no ckpt_path": ({}, lambda directory: {"ckpt_path": None}, [ASK]),
    "a link to the directory, no ckpt_path": ({}, link_directory, [ASK]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_training_that_starts_anew_although_a_checkpoint_was_saved_says_what_to_change(
    messages: Callable[[], list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture, mistake: str
) -> None:
    before, make, advice = MISTAKES[mistake]
    fit(tmp_path, **before)
    assert "STEP 0" not in caplog.text
    fit(tmp_path, epochs=2, **make(tmp_path))
    (warning,) = [record.getMessage() for record in caplog.records if "STEP 0" in record.getMessage()]
    assert "ALTHOUGH STEP 2 WAS SAVED" in warning
    known = [ASK, KEEP, FIX, "the file is not there any more", "there is no last checkpoint: copy "]
    assert [text for text in known if text in warning] == sorted(advice, key=known.index)


def test_a_remote_checkpoint_is_named_as_it_is(
    messages: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epochs in (1, 2):
        fit(tmp_path, epochs=epochs, dirpath=f"memory://{tmp_path.name}", ckpt_path=None)
    assert f"*** in memory://{tmp_path.name}/last.ckpt\n*** the script does not ask for it" in caplog.text


def test_a_training_that_resumes_says_nothing(
    messages: Callable[[], list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path)
    assert fit(tmp_path, epochs=2).global_step == 4
    assert "STEP 0" not in caplog.text


def test_a_second_training_in_the_same_process_is_none_that_has_not_resumed(
    messages: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FT_RUN_DIR", str(tmp_path))
    fit(tmp_path)
    fit(tmp_path, dirpath=tmp_path / "fine-tuned", ckpt_path=None)
    assert "STEP 0" not in caplog.text
    monkeypatch.setenv("FT_ATTEMPT", "1")
    fit(tmp_path, dirpath=tmp_path / "fine-tuned", ckpt_path=None)
    assert "STEP 0" in caplog.text


def test_a_broken_checkpoint_is_found_where_lightning_looks_also_without_a_dirpath(
    messages: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, dirpath=None)
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size - 10)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = last.with_name(f".x.{socket.gethostname()}.{dead.pid}{ft_callback.UNFINISHED}")
    left.touch()
    (tmp_path / "flag").unlink()
    assert fit(tmp_path, epochs=2, dirpath=None).global_step == 4
    assert "going on from a copy of epoch=0-step=2.ckpt" in caplog.text
    assert not left.exists()


def test_ranks_that_find_different_checkpoints_are_an_error_and_not_a_hang(
    messages: Callable[[], Any], start: Callable[..., Started], tmp_path: Path
) -> None:
    """As on nodes that have no file system in common."""
    fit(tmp_path, dirpath=tmp_path / "checkpoints0")
    script = tmp_path / "train.py"
    script.write_text("""
import os
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from ft_callback import FaultToleranceCallback
keep = ModelCheckpoint(f"checkpoints{os.environ['RANK']}", save_last=True)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=2, limit_train_batches=2,
                  limit_val_batches=0, enable_progress_bar=False, callbacks=[keep, FaultToleranceCallback(False, True)])
trainer.fit(BoringModel(), ckpt_path="last")
""")
    job = start([sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", "--ft-run-dir=runs", script])
    assert job.wait() == 1
    assert "RuntimeError: ranks start at different steps, from 0 to 2: they found different checkpoints" in job.output
    assert "a directory that all nodes share" in job.output


def test_a_run_with_a_broken_last_checkpoint_goes_on_from_the_newest_good_one(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """Two ranks: the second must not read the file before the first has put a good one in its place."""
    flag = str(tmp_path / "flag")
    command = [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", "--ft-run-dir=runs"]
    command += ["--ft-min-timeout=60", ROOT / "examples" / "train.py", "--steps-per-epoch=5", "--epochs"]
    first = start([*command, "1"], FAULT_TOL_FINISHED_FLAG_FILE=flag)
    assert first.wait() == 0, first.output
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    os.unlink(flag)
    second = start([*command, "2"], FAULT_TOL_FINISHED_FLAG_FILE=flag)
    assert second.wait() == 0, second.output
    assert second.output.count("going on from a copy of epoch=0-step=5.ckpt") == 1
    assert f"Restored all states from the checkpoint at {last}" in second.output
    assert json.loads(Path(flag).read_text())["step"] == 10
