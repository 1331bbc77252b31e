"""Checkpoints that survive a kill, broken ones that are set aside, and trainings that start at step 0 unnoticed."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
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


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no second file system")
def test_fifty_kills_in_the_middle_of_saves_leave_a_checkpoint_that_is_the_last_or_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary directory is on another file system, from which a rename would be a copy."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    target, moments, in_the_middle = tmp_path / "last.ckpt", random.Random(0), 0
    save(target, 0)
    for _ in range(50):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            step = step_of(target)
            while True:
                step += 1
                save(target, step, size=50_000_000 // 4)
                os.write(writer, step.to_bytes(8, "big"))
        os.close(writer)
        before = step_of(target)
        time.sleep(moments.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged = os.read(reader, 1 << 20)
        os.close(reader)
        last = int.from_bytes(acknowledged[-8:], "big") if acknowledged else before
        assert step_of(target) in (last, last + 1)
        unfinished = list(tmp_path.glob(f".*{ft_callback.UNFINISHED}"))
        in_the_middle += len(unfinished)
        ft_callback.remove_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == [target]
    assert in_the_middle >= 5, "hardly any save was interrupted: this has shown nothing"


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


def test_a_complete_checkpoint_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1, size=100_000)
    assert is_complete(path)
    data = path.read_bytes()
    for length in [0, 1, 4, 100, *range(5_000, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:length])
        assert not is_complete(path), length
    path.write_bytes(bytes(1000))
    assert not is_complete(path)
    torch.save({"old": 1}, path, _use_new_zipfile_serialization=False)
    assert is_complete(path)


def test_broken_checkpoints_are_set_aside_and_the_newest_complete_one_takes_their_place(tmp_path: Path) -> None:
    for age, name in enumerate(["epoch=2.ckpt", "epoch=1.ckpt"]):
        save(tmp_path / name, 2 - age)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "last.ckpt").write_bytes(b"PK\3\4broken")
    (line,) = set_broken_checkpoints_aside(tmp_path, ft_callback.LAST_PATTERN)
    assert "last.ckpt is not complete, now last.ckpt.corrupt; going on from a copy of epoch=2.ckpt" in line
    assert step_of(tmp_path / "last.ckpt") == 2
    assert (tmp_path / "last.ckpt.corrupt").read_bytes() == b"PK\3\4broken"
    for name in ("epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"):
        (tmp_path / name).write_bytes(b"")
    (line,) = set_broken_checkpoints_aside(tmp_path, ft_callback.LAST_PATTERN)
    assert "has no complete checkpoint" in line and not (tmp_path / "last.ckpt").exists()


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


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]]]] = {
    'trainer.fit(..., ckpt_path="last")': ({}, lambda directory: {"ckpt_path": None}),
    "a directory that is the same in every run": ({}, lambda directory: {"dirpath": directory / "another"}),
    "give ModelCheckpoint(save_last=True)": ({"save_last": False}, lambda directory: {"save_last": False}),
    "the file is not there any more": ({}, remove_file),
}


@pytest.mark.parametrize("advice", MISTAKES)
def test_a_training_that_starts_anew_although_a_checkpoint_was_saved_says_what_to_change(
    messages: Callable[[], list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture, advice: str
) -> None:
    before, mistake = MISTAKES[advice]
    fit(tmp_path, **before)
    assert "STEP 0" not in caplog.text
    fit(tmp_path, epochs=2, **mistake(tmp_path))
    (warning,) = [record.getMessage() for record in caplog.records if "STEP 0" in record.getMessage()]
    assert "ALTHOUGH STEP 2 WAS SAVED" in warning and advice in warning


def test_a_training_that_resumes_says_nothing(
    messages: Callable[[], list[dict[str, Any]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path)
    assert fit(tmp_path, epochs=2).global_step == 4
    assert "STEP 0" not in caplog.text


def test_a_run_with_a_broken_last_checkpoint_goes_on_from_the_newest_good_one(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """Two ranks: the second must not read the file before the first has put a good one in its place."""
    flag = str(tmp_path / "flag")
    command = [
        sys.executable,
        ROOT / "ft_launcher.py",
        "--nproc-per-node=2",
        "--ft-run-dir=runs",
        "--ft-min-timeout=60",
    ]
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
