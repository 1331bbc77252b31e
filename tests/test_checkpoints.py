"""Checkpoints that survive a kill, broken ones, and trainings that start at step 0 unnoticed."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Heard, Started, wait_until
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from ft_callback import UNFINISHED, AtomicCheckpointIO, FaultToleranceCallback, is_complete

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("rank_environment")]


def save(path: Path, step: int, size: int = 1000) -> None:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.zeros(size)}, path)


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


# ------------------------------------------------------------------------------------ writing


@pytest.fixture
def other_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files lie on another file system than checkpoints: a rename is a copy."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield


def kill_in_a_save(io: Any, target: Path, delay: float) -> int:
    """Let a child save step after step, kill it so long after it has begun to write, and return
    the last step that it acknowledged, or had found."""
    before, sizes = step_of(target), sizes_in(target.parent)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(before + 1):
            weights = torch.zeros(50_000_000 // 4)
            io.save_checkpoint({"global_step": step, "weights": weights}, target)
            os.write(writer, step.to_bytes(8, "big"))
    os.close(writer)
    deadline = time.monotonic() + 60
    while sizes_in(target.parent) == sizes and time.monotonic() < deadline:
        pass  # a wait would be longer than what is waited for
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = os.read(reader, 1 << 20)
    os.close(reader)
    return int.from_bytes(acknowledged[-8:], "big") if acknowledged else before


def sizes_in(directory: Path) -> dict[str, int]:
    sizes = {}
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            sizes[name] = os.stat(directory / name).st_size
    return sizes


@pytest.mark.slow
@pytest.mark.usefixtures("other_file_system")
def test_kills_in_the_middle_of_saves_leave_a_checkpoint_that_is_the_last_or_newer(
    tmp_path: Path,
) -> None:
    target, moments, in_the_middle = tmp_path / "last.ckpt", random.Random(0), 0
    save(target, 0)
    for _ in range(20):
        last = kill_in_a_save(AtomicCheckpointIO(), target, moments.uniform(0, 0.05))
        assert step_of(target) in (last, last + 1)
        for path in tmp_path.glob(f".*{UNFINISHED}"):
            in_the_middle += 1
            path.unlink()
        assert list(tmp_path.iterdir()) == [target]
    assert in_the_middle >= 3, "hardly any save was interrupted: this has shown nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("other_file_system")
def test_such_kills_destroy_what_lightning_writes(tmp_path: Path) -> None:
    """Otherwise the test above shows nothing, or Lightning has mended it."""
    target = tmp_path / "last.ckpt"
    for _ in range(20):
        save(target, 0)
        kill_in_a_save(TorchCheckpointIO(), target, delay=0)
        if not is_complete(target):
            return
    raise AssertionError("no kill has left half of a checkpoint")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True)
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


def test_a_directory_that_vanishes_during_a_save_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoints" / "last.ckpt"
    save(target, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: shutil.rmtree(target.parent))
    with pytest.raises(FileNotFoundError):
        save(target, 2)


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


def test_the_next_save_removes_what_killed_writers_have_left(tmp_path: Path) -> None:
    """Not what others may still be writing."""
    here, ended = os.uname().nodename, subprocess.Popen(["true"])
    ended.wait()
    hosts = ("old", "host.1"), ("new", "host.1"), ("killed", f"{here}.{ended.pid}")
    writers = [*hosts, ("living", f"{here}.{os.getppid()}")]
    paths = [tmp_path / f".{name}.ckpt.{writer}{UNFINISHED}" for name, writer in writers]
    for path in paths:
        path.touch()
    os.utime(paths[0], (time.time() - 700,) * 2)
    save(tmp_path / "last.ckpt", 1)
    assert {*tmp_path.iterdir()} == {tmp_path / "last.ckpt", paths[1], paths[3]}


def test_a_remote_path_is_left_to_lightning() -> None:
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, "memory://a/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://a/last.ckpt")["global_step"] == 3


class Slow(AtomicCheckpointIO):
    """Writes step 2 slowly, and cannot write step 3."""

    def _save(self, checkpoint: dict[str, Any], *args: Any) -> None:
        time.sleep(0.2 * (checkpoint["global_step"] == 2))
        if checkpoint["global_step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        super()._save(checkpoint, *args)


def test_a_thread_writes_what_there_was_and_removes_what_has_a_successor(tmp_path: Path) -> None:
    io, paths = Slow(is_async=True), [tmp_path / f"{step}.ckpt" for step in range(5)]
    weights = torch.zeros(3)
    shared = {"global_step": 2, "weights": weights, "tied": weights, "deep": [{"w": weights}]}
    io.save_checkpoint({"global_step": 1}, paths[1])
    wait_until(paths[1].exists, 5)
    io.save_checkpoint(shared, paths[2])
    io.remove_checkpoint(paths[1])
    weights += 1  # training goes on
    assert paths[1].exists() or paths[2].exists()
    wait_until(lambda: paths[2].exists() and not paths[1].exists(), 5)
    written = torch.load(paths[2])
    for tensor in (written["weights"], written["tied"], written["deep"][0]["w"]):
        assert torch.equal(tensor, torch.zeros(3))
    io.save_checkpoint({"global_step": 3}, paths[3])
    io.remove_checkpoint(paths[2])
    with pytest.raises(OSError, match="No space left"):
        io.teardown()
    assert paths[2].exists(), "removed, although its successor was never written"
    io.teardown()  # it was raised, and is no news
    io.save_checkpoint({"global_step": 4}, paths[4])
    io.remove_checkpoint(paths[2])
    io.teardown()
    assert list(tmp_path.iterdir()) == [paths[4]]
    io.save_checkpoint({"global_step": 3}, paths[3])
    with pytest.raises(OSError, match="No space left"):
        wait_until(lambda: io.save_checkpoint({"global_step": 4}, paths[4]), 5)


# ------------------------------------------------------------------------------- broken or not


BROKEN = b"PK\3\4broken"


def test_a_complete_checkpoint_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1, size=100_000)
    assert is_complete(path) and is_complete(path, b"weights")
    assert not is_complete(path, b"optimizer_states")
    data = path.read_bytes()
    for length in [0, 1, 4, 100, *range(5_000, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:length])
        assert not is_complete(path), length
    noise = random.Random(0).randbytes(1000)
    for broken in (bytes(1000), b"some text", noise, data[:5000] + data[50_000:], b"PK" + data):
        path.write_bytes(broken)
        assert not is_complete(path), broken[:10]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/document", "not of torch")
    assert not is_complete(path)
    torch.save({"old": 1}, path, _use_new_zipfile_serialization=False)
    assert is_complete(path) and not is_complete(tmp_path / "not there")
    assert is_complete(tmp_path) and not is_complete(tmp_path, b"optimizer_states")  # sharded


def test_in_the_place_of_a_broken_one_the_newest_to_resume_from_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io, last = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    last.write_bytes(BROKEN)
    with pytest.raises(Exception, match=r"zip|PytorchStreamReader|central directory"):
        io.load_checkpoint(last)
    for name, step, age in (("val/loss=2.ckpt", 2, 1), ("epoch=1.ckpt", 1, 2)):
        path = tmp_path / name  # a metric's name may have a slash
        io.save_checkpoint({"global_step": step, "optimizer_states": []}, path)
        os.utime(path, (time.time() - age,) * 2)
    save(tmp_path / "weights.ckpt", 3)
    io.save_checkpoint({"global_step": 4, "optimizer_states": []}, tmp_path / "backup.old")
    assert io.load_checkpoint(last)["global_step"] == 2
    assert f"{last} is broken: loading {tmp_path / 'val/loss=2.ckpt'}" in caplog.text
    assert last.read_bytes() == BROKEN, "ranks would not find the same any more"
    assert io.load_checkpoint(tmp_path / "weights.ckpt")["global_step"] == 3


# ------------------------------------------------------------------------------ in a training


def fit(
    directory: Path,
    *plugins: Any,
    ckpt_path: str | None = "last",
    epochs: int = 1,
    callbacks: Any = (),
    strategy: Any = "auto",
    logger: Any = False,
    **keep: Any,
) -> Trainer:
    FaultToleranceCallback.steps = 0  # as in a process of its own
    defaults = {"dirpath": directory / "checkpoints", "save_on_train_epoch_end": True}
    options: dict[str, Any] = {**defaults, "save_last": True, **keep}
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=logger, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=directory, max_epochs=epochs,
        limit_train_batches=2, limit_val_batches=0, plugins=list(plugins), strategy=strategy,
        callbacks=[
            FaultToleranceCallback(autoresume=True), *callbacks,
            ModelCheckpoint(**options),
        ],
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
    return trainer


def noted(flag: Path, messages: list[dict[str, Any]]) -> list[int]:
    """The steps that were reported as saved; the last one is noted, as the monitor does."""
    saved = [message for message in messages if message["type"] == "saved"]
    for message in saved[-1:]:
        values = {"step": message["step"], "checkpoint": message["checkpoint"]}
        Path(f"{flag}.progress").write_text(json.dumps(values))
    return [message["step"] for message in saved]


def a_later_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultToleranceCallback, "has_trained", False)
    monkeypatch.setattr(FaultToleranceCallback, "steps", 0)


BOTH = pytest.mark.parametrize(
    "plugins", [[], [AsyncCheckpointIO()]], ids=["at once", "in a thread"]
)


@BOTH
def test_checkpoints_are_on_disk_when_they_are_reported(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plugins: list[Any],
) -> None:
    """Also in the second fit of a Trainer, which has our CheckpointIO already."""
    found: list[tuple[int, int, int]] = []
    written: list[str] = []
    replace = os.replace

    def report_saved(self: Any, step: int, checkpoint: Any) -> None:
        own = step - FaultToleranceCallback.steps_before
        found.append((own, 2 * step_of(Path(checkpoint)), 2 * own))

    def watched(source: Any, target: Any) -> None:
        assert os.path.dirname(source) == os.path.dirname(target), "a rename may be a copy"
        written.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr("ft_monitor.RankMonitorClient.report_saved", report_saved)
    monkeypatch.setattr(os, "replace", watched)
    trainer = fit(tmp_path, *plugins)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(BoringModel())
    io: Any = trainer.strategy.checkpoint_io
    assert type(io) is AtomicCheckpointIO and io.is_async == bool(plugins)
    assert {step for step, _, _ in found} == {2, 4} and all(b == c for _, b, c in found)
    assert set(written) == {"epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"}


def slow_saves(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write = torch.save

    def save_slowly(*args: Any) -> None:
        time.sleep(seconds)
        write(*args)

    monkeypatch.setattr(torch, "save", save_slowly)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[bool]]:
    """Whether a complete checkpoint that matches was there after each renaming and each removal,
    after the first."""
    moments: list[set[str]] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*args: Any, **options: Any) -> None:
            original(*args, **options)
            paths = (tmp_path / "checkpoints").glob("*.ckpt")
            moments.append({x.name for x in paths if x.is_file() and is_complete(x)})

        monkeypatch.setattr(os, name, watched)

    for name in ("replace", "remove", "unlink", "rename", "symlink"):
        watch(name)

    def answer(pattern: str) -> list[bool]:
        matches = [any(fnmatch.fnmatch(name, pattern) for name in names) for names in moments]
        return matches[matches.index(True) :]

    return answer


@BOTH
@pytest.mark.parametrize("save_last", ["link", True, None])
def test_there_is_no_moment_without_a_checkpoint_to_resume_from(
    flag: Path,
    kept: Callable[[str], list[bool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plugins: list[Any],
    save_last: Any,
) -> None:
    """Lightning removes files before their successors are written, and links before new ones."""
    slow_saves(monkeypatch, 0.1)
    fit(tmp_path, *plugins, epochs=4, save_last=save_last, save_top_k=1)
    states = kept("*.ckpt")
    assert len(states) >= 6 and all(states)
    if save_last is True:
        assert all(kept("last.ckpt"))
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["epoch=3-step=8.ckpt", *["last.ckpt"] * bool(save_last)]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.is_symlink() == (save_last == "link")


def test_a_stop_waits_for_the_thread_that_writes(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_saves(monkeypatch, 0.3)
    Path(f"{flag}.stop").touch()
    with pytest.raises(SystemExit):
        fit(tmp_path, AsyncCheckpointIO(), epochs=100, every_n_train_steps=1)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 1
    messages = monitor()
    assert noted(flag, messages)[-1] == 1
    kinds = [message["type"] for message in messages]
    left = [m for m in messages if m["type"] == "section" and m["name"] == "finishing"][-1]
    assert kinds.index("saved") < messages.index(left)


def test_a_thread_may_report_when_monitoring_has_ended(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script may end it at any moment, also while a checkpoint is written."""

    class End(Callback):
        def on_train_end(self, trainer: Any, *args: Any) -> None:
            trainer.callbacks[0]._client.shutdown_workload_monitoring()
            FaultToleranceCallback.on_fit_end = lambda *args: None  # type: ignore

    monkeypatch.setattr(FaultToleranceCallback, "on_fit_end", FaultToleranceCallback.on_fit_end)
    slow_saves(monkeypatch, 0.3)
    fit(tmp_path, AsyncCheckpointIO(), callbacks=[End()])
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 2 and noted(flag, monitor()) == []


class Own(TorchCheckpointIO):
    """A user's own, which counts."""

    saves = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1
        super().save_checkpoint(*args, **kwargs)


class Directories(SingleDeviceStrategy):
    """Writes checkpoints itself, as directories, as strategies do that shard a model."""

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        Path(filepath).mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, Path(filepath) / "shard")


def test_whoever_has_chosen_another_way_to_write_keeps_it(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    own = type("TorchCheckpointIO", (Own,), {"__module__": "mine"})()  # of the same name, too
    plugins: list[Any] = [Own(), own, AsyncCheckpointIO(Own())]
    for number, plugin in enumerate(plugins):
        trainer = fit(tmp_path / str(number), plugin, save_top_k=1, epochs=2)
        assert trainer.strategy.checkpoint_io is plugin
        inner: Any = getattr(plugin, "checkpoint_io", plugin)
        assert inner.saves == 4
        kept = {path.name for path in tmp_path.glob(f"{number}/checkpoints/*")}
        assert kept >= {"epoch=1-step=4.ckpt", "last.ckpt"}
    monitor()
    second = type("Second", (Directories,), {"is_global_zero": False})
    for kind in (Directories, second):  # all ranks write, or none
        directory = tmp_path / kind.__name__
        fit(directory, strategy=kind(torch.device("cpu")), ckpt_path=None, epochs=2)
        found = {path.name: path.is_dir() for path in (directory / "checkpoints").iterdir()}
        assert found.items() >= {"epoch=1-step=4.ckpt": True, "last.ckpt": True}.items()
        entered = [m["name"] for m in monitor() if m["type"] == "section" and m["open"]]
        assert "checkpointing" in entered and "awaiting_checkpoint" not in entered


def test_a_rank_that_does_not_write_waits_in_a_section_of_its_own(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed at once when a peer fails, and left with the next batch, in which it may wait
    for one whose logger uploads the checkpoint."""

    class Second(SingleDeviceStrategy):
        is_global_zero = property(lambda self: False)

    seen: list[set[str]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append(set(trainer.callbacks[0]._client.open_sections))

    keep = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    second = Second(torch.device("cpu"))
    fit(tmp_path, strategy=second, ckpt_path=None, callbacks=[Look()], **keep)
    entered = [m["name"] for m in monitor() if m["type"] == "section" and m["open"]]
    assert "awaiting_checkpoint" in entered and "checkpointing" not in entered
    assert seen == [{"first_batch"}, {"awaiting_checkpoint"}]
    assert not (tmp_path / "checkpoints").exists()


def test_it_works_as_a_plugin_without_the_callback(tmp_path: Path) -> None:
    for io in (AtomicCheckpointIO(), AtomicCheckpointIO(is_async=True)):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, max_epochs=3, plugins=[io],
            limit_train_batches=1, limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path / str(io.is_async), save_last="link")],
        )  # fmt: skip
        trainer.fit(BoringModel())
        names = sorted(path.name for path in (tmp_path / str(io.is_async)).iterdir())
        assert names == ["epoch=2-step=3.ckpt", "last.ckpt"]
        assert step_of(tmp_path / str(io.is_async) / "last.ckpt") == 3


# ---------------------------------------------------------------------- starting and resuming


def truncate(last: Path) -> None:
    os.truncate(last, last.stat().st_size - 10)


def dangle(last: Path) -> None:
    last.unlink()
    last.symlink_to("epoch=7-step=99.ckpt")


@pytest.mark.parametrize("harm", [truncate, dangle, Path.unlink], ids=["broken", "link", "missing"])
@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_run_whose_last_checkpoint_is_harmed_resumes_from_the_newest(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path], None],
    save_last: Any,
) -> None:
    """Where Lightning does not even find it, after one restart."""
    options = {"save_last": save_last, "save_top_k": -1, "epochs": 2}
    fit(tmp_path, **options)
    noted(flag, monitor())
    a_later_run(monkeypatch)
    last = tmp_path / "checkpoints" / "last.ckpt"
    newest = tmp_path / "checkpoints" / "epoch=1-step=4.ckpt"
    weights = tmp_path / "checkpoints" / "weights.ckpt"
    save(weights, 7)
    harm(last)
    if save_last == "link" and harm is truncate:
        newest = newest.with_name("epoch=0-step=2.ckpt")  # through the link, the newest was harmed
    if harm is not truncate:
        with pytest.raises(RuntimeError, match=f"{last} was missing: linked {newest}, for a rest"):
            fit(tmp_path, **options)
        assert os.path.samefile(last, newest) and not last.is_symlink()
        (error,) = [m["error"] for m in monitor() if m["type"] == "error"]
        assert error.startswith(f"RuntimeError: {last} was missing")
        a_later_run(monkeypatch)
    trainer = fit(tmp_path, **{**options, "epochs": 3})
    first = next(m["step"] for m in monitor() if m["type"] == "heartbeat")
    assert first == (2 if newest.name.startswith("epoch=0") else 4)
    assert trainer.global_step == 6 and "STEP 0" not in caplog.text
    assert (f"{last} is broken: loading {newest}" in caplog.text) == (harm is truncate)


def test_no_link_is_made_where_none_was_lost(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without save_last, it would soon be older than the newest; elsewhere, it was never made."""
    fit(tmp_path, save_last=None)
    noted(flag, monitor())
    for options in ({"save_last": None}, {"dirpath": tmp_path / "elsewhere"}):
        a_later_run(monkeypatch)
        fit(tmp_path, epochs=2, **options)
    assert caplog.text.count("TRAINING STARTS AT STEP 0 ALTHOUGH STEP 2 WAS SAVED") == 2
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def remove_all(directory: Path) -> dict[str, Any]:
    shutil.rmtree(directory / "checkpoints")
    return {}


def link_directory(directory: Path) -> dict[str, Any]:
    (directory / "linked").symlink_to(directory / "checkpoints")
    return {"dirpath": directory / "linked", "ckpt_path": None}


ASK, KEEP = 'loaded nothing: give it "last"', "no last checkpoint is kept: give"
FIX, GONE = "give ModelCheckpoint one dirpath for all runs", "not there any more"
NO_LAST: dict[str, Any] = {"save_last": False}
# What the first run does differently from what is right, what the second does, and the advice.
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]], str]] = {
    "no ckpt_path": ({}, lambda directory: {"ckpt_path": None}, ASK),
    "another directory": ({}, lambda directory: {"dirpath": directory / "another"}, FIX),
    "no save_last": (NO_LAST, lambda directory: NO_LAST, KEEP),
    "neither": ({}, lambda directory: {**NO_LAST, "dirpath": directory / "another"}, FIX),
    "the files are removed": ({}, remove_all, GONE),
    "a link to the directory, no ckpt_path": ({}, link_directory, ASK),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_training_that_starts_anew_although_a_checkpoint_was_saved_says_what_to_change(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mistake: str,
) -> None:
    before, make, advice = MISTAKES[mistake]
    fit(tmp_path, **before)
    assert noted(flag, monitor())[-1] == 2 and "STEP 0" not in caplog.text
    a_later_run(monkeypatch)
    fit(tmp_path, epochs=2, **make(tmp_path))
    (warning,) = [x.getMessage() for x in caplog.records if "STEP 0" in x.getMessage()]
    assert "ALTHOUGH STEP 2 WAS SAVED" in warning
    assert [text for text in (ASK, KEEP, FIX, GONE) if text in warning] == [advice]


def test_a_fixed_ckpt_path_at_which_every_run_starts_again_is_told(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit(tmp_path)
    start = str(shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "start.ckpt"))
    for epochs, path in ((2, start), (3, "last"), (4, start)):
        noted(flag, monitor())
        a_later_run(monkeypatch)
        assert "TRAINING STARTS" not in caplog.text
        fit(tmp_path, epochs=epochs, ckpt_path=path)
    assert "TRAINING STARTS AT STEP 2 ALTHOUGH STEP 6 WAS SAVED" in caplog.text
    assert f"*** trainer.fit(ckpt_path='{start}') loaded {start}: give it \"last\"" in caplog.text
    caplog.clear()
    a_later_run(monkeypatch)
    fit(tmp_path / "tuned", epochs=2, ckpt_path=start)
    assert "TRAINING STARTS" not in caplog.text, "that is another training, which has lost nothing"


def test_a_remote_checkpoint_is_named_as_it_is(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for epochs in (1, 2):
        a_later_run(monkeypatch)
        fit(tmp_path, epochs=epochs, dirpath=f"memory://{tmp_path.name}", ckpt_path=None)
        noted(flag, monitor())
    known = "*** trainer.fit(ckpt_path=None) loaded nothing"
    assert f"*** in memory://{tmp_path.name}/last.ckpt\n{known}" in caplog.text


def test_checkpoints_that_others_write_are_reported_once_they_are_written(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the next hook: autoresume.sh would take such a training for one without progress."""

    class Failing(Own):
        def save_checkpoint(self, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
            if checkpoint["global_step"] == 4:
                raise OSError(28, "No space left on device")
            super().save_checkpoint(checkpoint, *args, **kwargs)

    with pytest.raises(OSError, match="No space"):
        fit(tmp_path, Failing(), epochs=3)
    messages = monitor()
    assert [m["checkpoint"] for m in messages if m["type"] == "saved"] == [
        f"{tmp_path}/checkpoints/"
    ] * 2, "with its link"
    assert noted(flag, messages) == [2, 2]
    a_later_run(monkeypatch)
    fit(tmp_path, Own(), ckpt_path=None)
    assert "TRAINING STARTS AT STEP 0 ALTHOUGH STEP 2 WAS SAVED" in caplog.text
    assert f"*** in {tmp_path}/checkpoints/\n*** trainer.fit(ckpt_path=None) loaded" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "not JSON", '{"step": null}', '{"step": 3}'])
def test_a_note_that_says_nothing_stops_nothing(
    flag: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    Path(f"{flag}.progress").write_text(text)
    fit(tmp_path)
    assert "STEP 0" not in caplog.text


# ------------------------------------------------------- set-ups that cannot resume, told at once


class Config:
    """What a script has in its hyper-parameters."""


class Holder(Callback):
    """Has a state that a restart may, or may not load."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The obstacles that were told, in one warning."""
    texts = [record.getMessage() for record in caplog.records]
    warnings = [text for text in texts if "TRAINING WILL NOT" in text or "NO RESTART" in text]
    assert len(warnings) <= 1, warnings
    text = "".join(warnings).partition("WILL NOT RESUME: ")[2]
    return text.split("; ") if text else "".join(warnings).replace("*** ", "").splitlines()[1:]


@pytest.mark.parametrize(
    ("keeper", "advice"),
    [
        ({"monitor": "step", "save_top_k": 1}, "seldom written: give ModelCheckpoint(save_last=Tr"),
        ({"save_top_k": 0}, "seldom written: give ModelCheckpoint(save_last=Tr"),
        (
            {"save_weights_only": True},
            "weights only: give ModelCheckpoint(save_weights_only=False)",
        ),
        ({"save_last": False}, "no last checkpoint is kept: give ModelCheckpoint(save_last=True)"),
        ({"monitor": "step", "save_top_k": -1}, None),
        ({"monitor": "step", "every_n_train_steps": 1, "save_on_train_epoch_end": None}, None),
        ({}, None),
        ({"dirpath": None, "logger": True}, "each run has its own checkpoints: give ModelCheckpo"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_last_checkpoint_that_no_restart_can_resume_from_is_told_at_the_start(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keeper: dict[str, Any],
    advice: str | None,
) -> None:
    """Case 05, and others; once in a process, and not if another one is kept as it should be."""
    fit(tmp_path, **keeper)
    assert len(told(caplog)) == (advice is not None)
    assert advice is None or advice in told(caplog)[0]
    fit(tmp_path / "again", **keeper)
    assert len(told(caplog)) == (advice is not None)


@pytest.mark.parametrize(
    ("path", "keeper", "line"),
    [
        ("last", {"every_n_epochs": 2}, "resumes from {last}, saved every 2 epoch(s)"),
        ("last", {"every_n_train_steps": 1}, "resumes from {last}, saved every 1 step(s)"),
        (
            None,
            {},
            "NOT RESUME: trainer.fit got no ckpt_path: give ModelCheckpoint(save_last=True)",
        ),
    ],
)
def test_what_happens_if_a_rank_fails_is_told_before_training_starts(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    path: str | None,
    keeper: dict[str, Any],
    line: str,
) -> None:
    fit(tmp_path, ckpt_path=path, **keeper)
    assert caplog.text.count("if a rank fails now") == 1
    assert line.format(last=tmp_path / "checkpoints" / "last.ckpt") in caplog.text


def test_two_keepers_of_which_one_is_right_are_right(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="step", save_weights_only=True)
    fit(tmp_path, callbacks=[best])
    assert told(caplog) == []


def test_the_last_checkpoint_is_as_seldom_written_as_is_told(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """Otherwise Lightning has changed, and the warning must go."""

    class Worse(BoringModel):
        def on_train_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch))

    for options, step in (({"save_top_k": 1, "monitor": "score"}, 2), ({"save_top_k": 0}, None)):
        keeper = ModelCheckpoint(
            tmp_path / str(step), save_last=True, save_on_train_epoch_end=True, **options
        )

        class Look(Callback):
            def on_train_end(self, trainer: Any, *args: Any) -> None:
                last = tmp_path / str(step) / "last.ckpt"  # noqa: B023  used at once
                saved = torch.load(last)["global_step"] if last.exists() else None
                assert saved == step  # noqa: B023

        Trainer(
            accelerator="cpu", logger=False, max_epochs=3, limit_train_batches=2,
            limit_val_batches=0, enable_progress_bar=False, callbacks=[Look(), keeper],
        ).fit(Worse())  # fmt: skip


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["at once", "in a thread"])
def test_what_a_restart_cannot_load_is_told_after_the_first_save_with_its_cause(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    plugins: list[Any],
) -> None:
    """Case 04. The whole cause, in one line without colours; and once."""
    fit(tmp_path / "good", *plugins, callbacks=[Holder([1, "a"])])
    assert told(caplog) == []
    a_later_run(monkeypatch)
    fit(tmp_path / "bad", *plugins, epochs=2, callbacks=[Holder(Config())])
    (cause,) = told(caplog)
    assert "Unsupported global: GLOBAL test_checkpoints.Config" in cause and "\x1b" not in cause
    assert "give trainer.fit(..., weights_only=False)" in caplog.text


def test_a_trial_load_is_as_a_restart_will_load(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what the script gives to fit, has allowed, or has in its environment."""

    def train(name: str, **options: Any) -> None:
        a_later_run(monkeypatch)
        trainer = Trainer(
            accelerator="cpu", logger=False, max_epochs=1, limit_train_batches=2,
            limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                FaultToleranceCallback(autoresume=True), Holder(Config()),
                ModelCheckpoint(tmp_path / name, save_last=True),
            ],
        )  # fmt: skip
        trainer.fit(BoringModel(), ckpt_path="last", **options)

    train("given", weights_only=False)
    with torch.serialization.safe_globals([Config]):
        train("allowed")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train("forced")
    assert told(caplog) == []


def test_whatever_else_a_trial_load_raises_is_told_and_stops_nothing(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("two\nlines")

    monkeypatch.setattr(torch, "load", load)
    assert fit(tmp_path).global_step == 2
    (line,) = told(caplog)
    assert line.startswith("KeyError: 'two\\nlines' (test_checkpoints.py:")


class Tuned(BoringModel):
    """What the two tuners change."""

    lr, batch_size = 0.1, 2


@pytest.mark.parametrize("tuner", [LearningRateFinder, BatchSizeFinder])
def test_tuners_that_let_a_restart_begin_at_step_0_are_told(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tuner: Any,
) -> None:
    options = {"max_trials": 1} if tuner is BatchSizeFinder else {"num_training_steps": 2}

    def train(epochs: int) -> None:
        Trainer(
            accelerator="cpu", logger=False, max_epochs=epochs, limit_train_batches=2,
            limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                FaultToleranceCallback(autoresume=True), tuner(**options),
                ModelCheckpoint(tmp_path / "checkpoints", save_last=True),
            ],
        ).fit(Tuned(), ckpt_path="last")  # fmt: skip

    train(1)
    would = f"{tuner.__name__} would run again, and training start at step 0: use Tuner"
    assert told(caplog) == [would]
    noted(flag, monitor())
    a_later_run(monkeypatch)
    caplog.clear()
    train(2)
    assert "TRAINING STARTS AT STEP 0 ALTHOUGH STEP 2 WAS SAVED" in caplog.text
    assert told(caplog) == [would]


@pytest.mark.parametrize(
    ("options", "logger", "is_told"),
    [
        ({}, False, True),
        ({}, {"version": "run1"}, True),
        ({"overwrite": True}, False, False),
        ({}, {}, False),  # each run has a version_N of its own
    ],
    ids=["no logger", "fixed", "overwrite", "versions"],
)
def test_a_configuration_that_is_not_to_be_overwritten_is_told(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    logger: Any,
    is_told: bool,
) -> None:
    """Case 07: LightningCLI, whose second run fails."""
    parser: Any = types.SimpleNamespace(save=lambda *args, **kwargs: None)
    config: Any = {}
    save_config = SaveConfigCallback(parser, config, **options)
    Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0,
        logger=logger if logger is False else CSVLogger(tmp_path, **logger),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[
            FaultToleranceCallback(autoresume=True), save_config,
            ModelCheckpoint(tmp_path / "checkpoints", save_last=True),
        ],
    ).fit(BoringModel(), ckpt_path="last")  # fmt: skip
    remedy = 'give LightningCLI(save_config_kwargs={"overwrite": True})'
    assert told(caplog) == [f"config.yaml would exist already: {remedy}"] * is_told


@pytest.mark.slow
def test_two_ranks_resume_from_the_same_one_in_the_place_of_a_broken_one(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    (tmp_path / "train.py").write_text("""
import os, sys
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from ft_callback import FaultToleranceCallback

ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
Trainer(
    accelerator="cpu", devices=ranks, logger=False, max_epochs=int(sys.argv[1]),
    limit_train_batches=2, limit_val_batches=0, enable_progress_bar=False,
    callbacks=[FaultToleranceCallback(True, True), ModelCheckpoint("checkpoints", save_last=True)],
).fit(BoringModel(), ckpt_path="last")
""")
    environment = {"PYTHONPATH": str(ROOT), "FAULT_TOL_FINISHED_FLAG_FILE": str(flag)}
    first = start(
        [sys.executable, ROOT / "ft_monitor.py", "--", sys.executable, "train.py", "2"],
        **environment,
    )
    assert first.wait() == 0, first.output
    last = tmp_path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    flag.unlink()
    launcher = [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", "--ft-run-dir=runs"]
    second = start([*launcher, "train.py", "4"], **environment)
    assert second.wait() == 0, second.output
    newest = tmp_path / "checkpoints" / "epoch=1-step=4.ckpt"
    assert second.output.count(f"{last} is broken: loading {newest}") == 2
    assert json.loads(flag.read_text())["step"] == 8
