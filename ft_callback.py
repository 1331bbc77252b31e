"""A callback that makes a Lightning training fault tolerant under ft_launcher.py: heartbeats, and a finished flag.

    trainer = Trainer(callbacks=[FaultToleranceCallback(autoresume=True), ...], ...)
    trainer.fit(model, ckpt_path="last")

Works with `lightning` and with `pytorch_lightning`, on any device, with one rank or many. Active in `fit` alone.

Hook                                     what it does
    setup                                sets broken checkpoints aside, loads timeouts, connects to the rank's monitor
    on_train_start                       heartbeat; all ranks must start at the same step; warns of 0 although a
                                         checkpoint had been saved
    on_train_batch_end                   heartbeat; removes superseded checkpoints; looks for FLAG.stop; after the last
                                         batch of the first epoch, until the first of the second, heartbeats rest
    on_train_end, on_validation_start,   heartbeat; the heartbeat timeout rests in the first validation, and while
    on_validation_batch_end,             training finishes
    on_validation_end
    on_load_checkpoint                   the time to the first heartbeat includes a load, and can be calculated from
    Trainer.save_checkpoint (wrapped)    section "checkpointing"; calculates timeouts; notes progress
    TorchCheckpointIO (wrapped)          writes checkpoints beside the target, and renames (AtomicCheckpointIO)
    ModelCheckpoint (wrapped)            links and removes when the new checkpoint is on disk, where it would before
    on_fit_end                           training ended, and not by an exception
    teardown                             creates the finished flag, disconnects; at exit, gloo is destroyed
    on_exception                         disconnects, with the exception and the line it came from

Sections, which have timeouts of their own, so that those of heartbeats can be short
    first_batch    train start to the end of the first training batch, which may compile and warm up
    checkpointing  a checkpoint is saved
    finishing      train end to teardown, which waits for asynchronous checkpoints

Files (FLAG is the value of FAULT_TOL_FINISHED_FLAG_FILE; written by global rank 0, beside and renamed)
    FLAG                           training is complete: {"reason", "step", "epoch", "time", "by"}
    FLAG.stop                      made by a person or by autoresume.sh: save a checkpoint at the next step, and end
                                   fit; training is not complete, and the next run goes on from there
    FLAG.progress                  the newest checkpoint: {"step", "epoch", "checkpoint", "time", "by"}
    FT_RUN_DIR/progress.json       the same
    EXP_DIR/ft_state.json          calculated timeouts: {"version", "timeouts", "included", "killed", "time"}
    EXP_DIR/killed_rank<N>.json    written by a monitor whose rank ran out of a calculated timeout
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ft_monitor import (
    CHECKPOINTING,
    FIRST_BATCH,
    HEARTBEAT,
    RankMonitorClient,
    WorkloadControlRequest,
    describe_error,
    maximum_of_ranks,
    section_setting,
    write_json,
)


def lightning_package() -> str:
    """The package that the script uses; one that is installed if it has imported neither yet."""
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    installed = [name for name in names if importlib.util.find_spec(name.partition(".")[0])]
    if not installed:
        raise ImportError("ft_callback needs Lightning: pip install lightning")
    return (loaded or installed)[0]


if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = importlib.import_module(lightning_package())

FAULT_SIGNALS = {"rank_killed": signal.SIGKILL, "rank_hung": signal.SIGSTOP}
FLAG_VARIABLE = "FAULT_TOL_FINISHED_FLAG_FILE"
FINISHING = "finishing"
UNFINISHED = ".ft_unfinished"  # ends the name of a checkpoint that is being written
CLEAN_STOP_SECONDS = 60.0  # how long a rank that stops with SystemExit(0) waits for the others to do the same
STOP_CHECK_SECONDS = 2.0  # between looks for FLAG.stop
MIN_BATCHES = 16  # training batches before heartbeat timeouts are calculated
SAVE, VALIDATION, EPOCH_TURN = "save", "validation", "epoch turn"  # heartbeats around them differ from those of steps


# ------------------------------------------------------------------------------------------------- checkpoints


class AtomicCheckpointIO(pl.plugins.io.TorchCheckpointIO):  # type: ignore[name-defined]
    """Writes a checkpoint so that a crash, a kill or a full disk at any moment leaves the old one intact.

    The file is written beside its target, brought to the disk, and renamed. `FaultToleranceCallback` lets checkpoints
    be written like this unless the Trainer has a CheckpointIO of its own; without the callback, give it to the
    Trainer: `Trainer(plugins=[AtomicCheckpointIO()])`. Remote paths are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(target.parent)
        # In the target's directory: a rename from another file system is a copy, and a kill leaves half of it.
        beside = unfinished(target)
        try:
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            discard(beside)
            raise
        sync_directory(target.parent)


def unfinished(target: Path) -> Path:
    """Where this process writes what is to become `target`; no longer than a name may be, however long the target's."""
    name = f".{zlib.crc32(target.name.encode()):08x}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}"
    return target.with_name(name)


def discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # what made the write fail matters more


def sync_directory(directory: Path) -> None:
    """Bring a rename to the disk, where the file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it; the file itself is on the disk
    finally:
        os.close(descriptor)


def is_complete(path: Path, member: bytes = b"") -> bool:
    """Whether a file of torch.save has all its parts, as far as that shows without reading them.

    `member`: a key that its top level must have, such as b"optimizer_states", which a file of weights alone lacks.
    """
    with open(path, "rb") as file:
        head = file.read(4)
        if head != b"PK\3\4":
            return head[:1] == b"\x80" and not member  # a pickle, as torch wrote before 1.6; else empty or damaged
        try:
            with zipfile.ZipFile(file) as archive:  # whose directory is its end
                parts = archive.infolist()
                pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
                is_whole = all(0 <= part.header_offset < archive.start_dir - part.compress_size for part in parts)
                return is_whole and bool(pickles) and (not member or member in archive.read(pickles[0]))
        except (zipfile.BadZipFile, OSError, EOFError):
            return False


def set_broken_checkpoints_aside(paths: Iterable[Path]) -> list[str]:
    """Put the newest complete checkpoint in the place of each that is not; return a line for each.

    At any moment there is a file in each place, lest a kill or a full disk let the training start anew.
    """
    lines = []
    for broken in sorted(paths):
        if not broken.is_file() or is_complete(broken):
            continue
        aside = unused_name(broken)
        good = [path for path in broken.parent.rglob("*.ckpt") if path.is_file() and is_resumable(path)]
        newest = max(good, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            os.replace(broken, aside)
            lines.append(
                f"{broken} is not complete, now {aside.name}; {broken.parent} has no complete checkpoint: the next "
                "attempt starts at step 0"
            )
            continue
        beside = unfinished(broken)
        try:
            shutil.copyfile(newest, beside)
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.link(broken, aside)
            os.replace(beside, broken)
        except OSError:
            discard(beside)
            raise
        lines.append(f"{broken} is not complete, now {aside.name}; going on from a copy of {newest.name}")
    return lines


def is_resumable(path: Path) -> bool:
    return is_complete(path, member=b"optimizer_states")


def unused_name(path: Path) -> Path:
    """last.ckpt.corrupt, or last.ckpt.corrupt-1 ...: nothing that was set aside is ever overwritten."""
    names = itertools.chain([".corrupt"], (f".corrupt-{number}" for number in itertools.count(1)))
    return next(name for name in (path.with_name(path.name + suffix) for suffix in names) if not name.exists())


def remove_unfinished(directory: Path) -> None:
    """Remove what writers that were killed have left: their process is gone, or nothing was written for an hour."""
    for path in directory.glob(f".*{UNFINISHED}"):
        host, _, pid = path.name.removesuffix(UNFINISHED).rpartition(".")
        is_dead = host.endswith(f".{socket.gethostname()}") and not os.path.exists(f"/proc/{pid}")
        try:
            if is_dead or path.stat().st_mtime < time.time() - 3600:
                path.unlink()
        except OSError:
            continue  # another process did it, or may do it


def point_link(link: Path, target: Path) -> None:
    """Let a symbolic link point elsewhere, with no moment at which it is missing."""
    beside = unfinished(link)
    discard(beside)
    beside.symlink_to(os.path.relpath(target, link.parent))
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # a sharded checkpoint
    os.replace(beside, link)


def last_checkpoints(trainer: pl.Trainer) -> list[Path]:
    """The local files that ckpt_path="last" chooses from."""
    found: set[str] = set()
    for keeper in trainer.checkpoint_callbacks:
        if hasattr(keeper, "_find_last_checkpoints"):
            found |= keeper._find_last_checkpoints(trainer)
        elif getattr(keeper, "ckpt_path", None):  # OnExceptionCheckpoint
            found.add(str(keeper.ckpt_path))  # type: ignore[attr-defined]
    return [Path(path) for path in found if "://" not in path]


def checkpoint_directories(trainer: pl.Trainer) -> list[str]:
    """Where ModelCheckpoints of this training write, as far as that is known."""
    directories = [getattr(keeper, "dirpath", None) for keeper in trainer.checkpoint_callbacks]
    return [str(directory) for directory in directories if directory]


def why_not_resumed(trainer: pl.Trainer, checkpoint: str) -> str:
    """Why a training starts at step 0 although `checkpoint` was saved, and the line to change."""
    is_remote = "://" in checkpoint
    if not is_remote and not os.path.exists(checkpoint):
        return f"the file is not there any more: {checkpoint}"
    directories = checkpoint_directories(trainer)
    causes = []
    if os.path.dirname(checkpoint) not in [*directories, *map(os.path.realpath, directories)]:
        now = ", ".join(directories) or "nowhere"
        causes.append(
            f"this run looks in {now}: give ModelCheckpoint(dirpath=...) a directory that is the same in every run"
        )
    if not any(getattr(keeper, "save_last", None) for keeper in trainer.checkpoint_callbacks):
        causes.append("no last checkpoint is kept: give ModelCheckpoint(save_last=True)")
    elif not causes and not is_remote and not any(path.exists() for path in last_checkpoints(trainer)):
        causes.append(f"there is no last checkpoint: copy {checkpoint} to {os.path.dirname(checkpoint)}/last.ckpt")
    return "; ".join(causes) or 'the script does not ask for it: trainer.fit(..., ckpt_path="last")'


# -------------------------------------------------------------------------------------------- simulated faults


@dataclasses.dataclass(frozen=True)
class SimulatedFaultParams:
    """A fault to try a job with: one rank kills or stops itself.

    `fault_type`: rank_killed (SIGKILL), rank_hung (SIGSTOP), or random, one of the two. It comes `base_delay` seconds
    after the callback's setup plus a random part of `rand_delay` seconds, on `rank_to_fail` or on a random rank.
    """

    fault_type: str
    base_delay: float
    rand_delay: float = 0.0
    rank_to_fail: int | None = None

    def __post_init__(self) -> None:
        if self.fault_type not in (*FAULT_SIGNALS, "random"):
            expected = ", ".join((*FAULT_SIGNALS, "random"))
            raise ValueError(f"fault_type: got {self.fault_type!r}, expected one of {expected}")
        for name in ("base_delay", "rand_delay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected seconds of at least 0")
        if self.rank_to_fail is not None and (not isinstance(self.rank_to_fail, int) or self.rank_to_fail < 0):
            raise ValueError(f"rank_to_fail: got {self.rank_to_fail!r}, expected a global rank or None")

    @classmethod
    def parse(cls, value: SimulatedFaultParams | Mapping[str, Any] | None) -> SimulatedFaultParams | None:
        if value is None or isinstance(value, cls):
            return value
        try:
            return cls(**value)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"simulated_fault_params: got {value!r}: {error}") from None


class FaultToleranceCallback(pl.Callback):
    """Connects a Lightning training to its rank monitor. Argument names as NVIDIA's.

    Args:
        autoresume: create the file named by FAULT_TOL_FINISHED_FLAG_FILE when training is complete, so that
            autoresume.sh stops running the job again.
        calculate_timeouts: calculate the timeouts from what is observed, and keep them for later runs.
        simulated_fault_params: a `SimulatedFaultParams`, or a mapping with its fields.
        exp_dir: where calculated timeouts are kept, the same for all runs of this training; created if missing. By
            default ft_state in Trainer.log_dir, or beside its version_<N> if loggers number it anew in every run.
        logger_name: of the logger to use; by default one whose lines appear as Lightning's own do.
        exc_handling_policy: is given the exception that ended training, and may return a request to the launcher:
            WorkloadControlRequest(WorkloadAction.ShutdownWorkload or .ExcludeThisNode, "why").

    `setup` raises RuntimeError when the process was not started by ft_launcher.py, when `autoresume` is set but
    FAULT_TOL_FINISHED_FLAG_FILE is not, when no timeout is configured, stored or to be calculated, and when `exp_dir`
    cannot be written. A flag that cannot be written fails the run with an OSError.
    """

    def __init__(
        self,
        autoresume: bool,
        calculate_timeouts: bool = False,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None = None,
        exp_dir: str | os.PathLike[str] | None = None,
        logger_name: str | None = None,
        exc_handling_policy: Callable[[BaseException], WorkloadControlRequest | None] | None = None,
    ) -> None:
        self.autoresume = autoresume
        self.calculate_timeouts = calculate_timeouts
        self.simulated_fault_params = SimulatedFaultParams.parse(simulated_fault_params)
        self.exp_dir = exp_dir
        self.exc_handling_policy = exc_handling_policy
        self.logger = logging.getLogger(logger_name or f"{pl.__name__}.FaultToleranceCallback")
        self._client = RankMonitorClient()
        self._directory = Path()  # of the calculated timeouts
        self._fault: threading.Timer | None = None
        self._start_over()

    def _start_over(self) -> None:
        """What is known of a fit that begins."""
        self._batches = 0  # training batches
        self._in_training = False
        self._step = -1  # at the end of the batch before
        self._next_stop_check = 1  # the batch from whose end on all ranks ask whether to stop
        self._last_stop_check = (0, 0.0)  # batch and time of the last one
        self._early_stops: list[tuple[int, str | None]] = []  # that are part of the checkpoint
        self._loaded = False  # a checkpoint
        self._underway: set[str] = set()  # VALIDATION, EPOCH_TURN
        self._submitted: dict[str, list[float]] = {}  # by path, when its asynchronous writes were asked for
        self._superseded: list[str] = []  # checkpoints that ModelCheckpoint has asked to remove
        self._fit_ended = False  # and not by an exception

    # -- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._check_environment(trainer)
        self._start_over()
        self._client = RankMonitorClient()
        self._load_timeouts(trainer)
        self._client.init_workload_monitoring(measure=self._measured())
        self._check_timeouts(trainer)
        self._watch_saves(trainer)
        if self.simulated_fault_params is not None:
            self._fault = schedule_fault(self.simulated_fault_params, trainer, self.logger)

    def on_load_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self._loaded = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_training = True
        self._early_stops = early_stops(trainer)
        self._heartbeat(trainer)
        if self._client.is_initialized:
            self._check_start(trainer)
        self._enter(FIRST_BATCH)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._leave(FIRST_BATCH)
        self._batches += 1
        self._heartbeat(trainer)
        self._remove_superseded(trainer)
        self._end(trainer, EPOCH_TURN)
        if self._batches == MIN_BATCHES:
            self._update_timeouts(trainer)
        if trainer.is_last_batch:
            self._begin(EPOCH_TURN)
        # Not in the middle of accumulated gradients, which would be lost.
        if self._batches >= self._next_stop_check and trainer.global_step != self._step:
            self._stop_if_requested(trainer)
        self._step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(FIRST_BATCH)  # of a training without any
        self._heartbeat(trainer)
        self._underway.clear()  # no epoch follows
        self._update_timeouts(trainer)
        self._enter(FINISHING)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heartbeat(trainer)
        if not trainer.sanity_checking:
            self._begin(VALIDATION)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._heartbeat(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heartbeat(trainer)
        self._end(trainer, VALIDATION)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_ended = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end of fit, when the last checkpoint is on disk: asynchronous writers were waited for."""
        if stage != "fit" or not self._client.is_initialized:
            return
        trainer.strategy.barrier("FaultToleranceCallback.teardown")  # within the section: rank 0 may still write
        self._leave(FINISHING)
        if self._in_training:
            self._heartbeat(trainer)  # before timeouts come into force: finishing took longer than they are
        self._underway.clear()
        self._update_timeouts(trainer)
        self._remove_superseded(trainer)
        self._unwatch_saves(trainer)
        reason = self._why_complete(trainer)
        if self.autoresume and reason is not None and trainer.is_global_zero:
            self._create_finished_flag(trainer, reason)
        self._disconnect()
        atexit.register(destroy_gloo)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls this instead of teardown, and also for what happens before setup and outside of fit.
        if type(exception) is SystemExit and not exception.code:  # a clean stop; SIGTERM raises a subclass
            self._client.sync_timeout = CLEAN_STOP_SECONDS
            self._underway.clear()
            try:
                self._update_timeouts(trainer)
                atexit.register(destroy_gloo)
            except RuntimeError as error:
                self.logger.warning("timeouts are not calculated, other ranks did not stop here: %s", error)
        if self.exc_handling_policy is not None and self._client.is_initialized:
            request = self.exc_handling_policy(exception)
            if request is not None:
                self._client.send_workload_control_request(request)
        self._disconnect(describe_error(exception))

    # -- the connection

    def _check_environment(self, trainer: pl.Trainer) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", trainer.world_size))
        if ranks != trainer.world_size:  # each would train alone, and overwrite the others' checkpoints
            raise RuntimeError(
                f"the launcher started {ranks} ranks, but this Trainer has {trainer.world_size}: give Trainer("
                'devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), '
                'num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)))'
            )
        flag = os.environ.get(FLAG_VARIABLE)
        if not self.autoresume:
            return
        if not flag:
            raise RuntimeError(
                f"FaultToleranceCallback(autoresume=True) needs {FLAG_VARIABLE}, which is not set. Start the job with "
                "./autoresume.sh python ft_launcher.py --nproc-per-node=N SCRIPT, "
                f"or: export {FLAG_VARIABLE}=/path/of/a/file"
            )
        if not Path(flag).absolute().parent.is_dir():
            raise RuntimeError(f"{FLAG_VARIABLE}={flag}: its directory does not exist, create it or choose another")
        if trainer.is_global_zero:
            remove_flag_of_this_attempt(Path(flag))

    def _heartbeat(self, trainer: pl.Trainer) -> None:
        if self._client.is_initialized:
            self._client.send_heartbeat(trainer.global_step)

    def _enter(self, section: str) -> None:
        if not self._client.is_initialized:
            return
        if section_setting(section) not in self._client.timeouts_in_force():
            self._rest_heartbeats(for_good=section == FINISHING)  # their clock goes on in a section without a timeout
        self._client.start_section(section)

    def _leave(self, section: str) -> None:
        if self._client.is_initialized and section in self._client.open_sections:
            self._client.end_section(section)

    def _disconnect(self, error: str | None = None) -> None:
        if self._fault is not None:
            self._fault.cancel()
        self._client.shutdown_workload_monitoring(error)

    # -- checkpoints

    def _watch_saves(self, trainer: pl.Trainer) -> None:
        """Lightning has no hook for a checkpoint that is on disk: stand in the place of what writes it."""
        self._unwatch_saves(trainer)
        trainer.save_checkpoint = functools.partial(self._save_checkpoint, trainer)  # type: ignore[method-assign]
        writer = file_writer(trainer)
        writer.save_checkpoint = functools.partial(self._write_checkpoint, trainer, writer)
        links = [keeper for keeper in trainer.checkpoint_callbacks if getattr(keeper, "save_last", None) == "link"]
        for keeper in links:
            keeper._link_checkpoint = self._link_checkpoint  # type: ignore[attr-defined]
        if links or is_asynchronous(trainer):
            trainer.strategy.checkpoint_io.remove_checkpoint = self._superseded.append  # type: ignore[method-assign,assignment]

    def _unwatch_saves(self, trainer: pl.Trainer) -> None:
        for watched in (trainer, file_writer(trainer), trainer.strategy.checkpoint_io, *trainer.checkpoint_callbacks):
            for name in ("save_checkpoint", "remove_checkpoint", "_link_checkpoint"):
                vars(watched).pop(name, None)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of Trainer.save_checkpoint, which all ranks call."""
        if not self._in_training:  # the learning-rate finder, which removes its checkpoint
            type(trainer).save_checkpoint(trainer, filepath, *args, **kwargs)
            return
        if is_asynchronous(trainer):  # takes no longer than a step; how long it goes on is seen by the writer
            if trainer.is_global_zero:
                self._submitted.setdefault(str(filepath), []).append(time.monotonic())
            type(trainer).save_checkpoint(trainer, filepath, *args, **kwargs)
        else:
            self._enter(CHECKPOINTING)
            try:
                type(trainer).save_checkpoint(trainer, filepath, *args, **kwargs)
                # Within the section: at its end, the survivor of a failed peer is killed.
                self._note_progress(trainer, trainer.global_step, trainer.current_epoch, filepath)
            finally:
                self._leave(CHECKPOINTING)
        self._client.saw(SAVE)
        self._heartbeat(trainer)
        self._update_timeouts(trainer)

    def _write_checkpoint(
        self, trainer: pl.Trainer, writer: Any, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any
    ) -> None:
        """In the place of CheckpointIO.save_checkpoint, on global rank 0 alone, and in a thread if asynchronous."""
        submitted = self._submitted.get(str(path))
        start = submitted.pop(0) if submitted else time.monotonic()
        if is_lightnings_own(writer):  # is made safe; whoever has chosen another keeps it
            AtomicCheckpointIO().save_checkpoint(checkpoint, path, *args, **kwargs)
        else:
            type(writer).save_checkpoint(writer, checkpoint, path, *args, **kwargs)
        if is_asynchronous(trainer):
            # The end of training may have to wait for as long as this took, with what was written before it.
            self._client.observe(section_setting(FINISHING), time.monotonic() - start)
            self._note_progress(trainer, checkpoint.get("global_step", 0), checkpoint.get("epoch", 0), path)

    def _link_checkpoint(self, trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """In the place of ModelCheckpoint's, which removes the old link first, and may link what is not written yet."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            after_writes(trainer, point_link, Path(linkpath), Path(filepath))
        trainer.strategy.barrier()

    def _remove_superseded(self, trainer: pl.Trainer) -> None:
        """Remove what ModelCheckpoint keeps no longer. It asks for that before the next one is written and linked."""
        for path in self._superseded:
            after_writes(
                trainer, type(trainer.strategy.checkpoint_io).remove_checkpoint, trainer.strategy.checkpoint_io, path
            )
        self._superseded.clear()

    def _note_progress(self, trainer: pl.Trainer, step: int, epoch: int, path: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._client.report_saved(step)
        values = {"step": step, "epoch": epoch, "checkpoint": absolute(path), "time": timestamp(), "by": this_attempt()}
        for progress in self._progress_files():
            try:
                write_json(progress, values)
            except OSError as error:
                self.logger.warning("cannot note in %s that step %d was saved: %s", progress, step, error)

    def _progress_files(self) -> list[Path]:
        """Where the newest checkpoint is noted: for later runs, and for later attempts of this launcher."""
        flag, run_dir = os.environ.get(FLAG_VARIABLE), os.environ.get("FT_RUN_DIR")
        files = [Path(f"{flag}.progress")] if self.autoresume and flag else []
        return files + ([Path(run_dir) / "progress.json"] if run_dir else [])

    def _check_start(self, trainer: pl.Trainer) -> None:
        """A training that is restarted from nothing, or on some ranks alone, costs more than any fault."""
        step = trainer.global_step
        highest, minus_lowest = maximum_of_ranks([step, -step])
        if highest != -minus_lowest:
            raise RuntimeError(
                f"ranks start at different steps, from {-int(minus_lowest)} to {int(highest)}: they found different "
                "checkpoints; give ModelCheckpoint(dirpath=...) a directory that all nodes share"
            )
        if step == 0 and trainer.is_global_zero:
            self._check_resume(trainer)

    def _check_resume(self, trainer: pl.Trainer) -> None:
        for progress in self._progress_files():
            try:
                values = json.loads(progress.read_text(encoding="utf-8"))
                step, checkpoint, by = int(values["step"]), str(values["checkpoint"]), values.get("by")
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if step > 0 and (by is None or by != this_attempt()):  # not by an earlier fit of this same process
                self.logger.warning(
                    "*** TRAINING STARTS AT STEP 0 ALTHOUGH STEP %d WAS SAVED ***\n*** in %s\n*** %s",
                    step, checkpoint, why_not_resumed(trainer, checkpoint),
                )  # fmt: skip
                return

    def _prepare_checkpoints(self, trainer: pl.Trainer) -> None:
        """Before Lightning reads the checkpoint that it resumes from."""
        if not is_lightnings_own(file_writer(trainer)):
            return  # who knows what its files look like
        lasts = last_checkpoints(trainer)
        local = [directory for directory in checkpoint_directories(trainer) if "://" not in directory]
        for directory in {Path(directory) for directory in local}.union(path.parent for path in lasts):
            remove_unfinished(directory)
        for line in set_broken_checkpoints_aside(lasts):
            self.logger.warning("%s", line)

    # -- timeouts

    def _measured(self) -> tuple[str, ...]:
        return (FIRST_BATCH, CHECKPOINTING, FINISHING) if self.calculate_timeouts else ()

    def _load_timeouts(self, trainer: pl.Trainer) -> None:
        """Give all ranks the timeouts that earlier runs have calculated, as global rank 0 reads and judges them."""
        self._directory = self._state_dir(trainer)
        state: dict[str, Any] | Exception = {}
        if trainer.is_global_zero:
            try:
                self._prepare_checkpoints(trainer)
                for line in self._client.read_state(self._directory):
                    self.logger.warning("%s", line)
                if self.calculate_timeouts:
                    self._client.write_state(self._directory)
                state = self._client.state_dict()
            except OSError as error:
                state = RuntimeError(f"cannot prepare the directories of this training: {error}; see exp_dir, dirpath")
        state = trainer.strategy.broadcast(state)
        if isinstance(state, Exception):  # on all ranks, lest the others wait for this one
            raise state
        self._client.load_state_dict(state, notes=self._directory)

    def _state_dir(self, trainer: pl.Trainer) -> Path:
        log_dir = trainer.log_dir  # a collective: all ranks must call it, also where it is not needed
        if self.exp_dir is not None:
            return Path(self.exp_dir).absolute()
        path = Path(log_dir or trainer.default_root_dir).absolute()
        return (path.parent if re.fullmatch(r"version_\d+", path.name) else path) / "ft_state"

    def _check_timeouts(self, trainer: pl.Trainer) -> None:
        client = self._client
        in_force = client.timeouts_in_force()
        if client.config.watches_steps or client.calculated:
            timeouts = ", ".join(f"{name}={seconds:g}" for name, seconds in in_force.items())
            self._say(trainer, "timeouts in force: %s", timeouts)
        elif not self.calculate_timeouts:
            raise RuntimeError(
                "no timeout is set, so no hang would be noticed: give ft_launcher --ft-rank-heartbeat-timeout=SECONDS, "
                "or FaultToleranceCallback calculate_timeouts=True"
            )
        if HEARTBEAT in in_force or "rank_out_of_section_timeout" in in_force:
            return
        if self.calculate_timeouts:
            self._say(trainer, "no timeout of steps yet: hang detection starts when timeouts have been calculated")
        else:
            self._say(trainer, "no timeout of steps is set: give ft_launcher --ft-rank-heartbeat-timeout=SECONDS")

    def _update_timeouts(self, trainer: pl.Trainer) -> None:
        """Calculate what can be calculated. All ranks come here at the same places of the training."""
        client = self._client
        if not (self.calculate_timeouts and client.is_initialized) or FINISHING in client.open_sections:
            return
        changed, is_first = False, not client.calculated
        for section in self._measured():
            changed |= client.calculate_and_set_section_timeouts([section], False, skip_if_not_ready=True)
        if self._knows_steps(trainer):
            changed |= client.calculate_and_set_hb_timeouts(True, calc_initial=self._loaded)
        if changed and trainer.is_global_zero:
            self._save_timeouts(is_first)

    def _knows_steps(self, trainer: pl.Trainer) -> bool:
        """Whether enough was seen for a timeout of heartbeats, and nothing is under way that was never seen."""
        known = self._client.seen | self._client.included
        saves = SAVE in known or (EPOCH_TURN in known and not trainer.checkpoint_callbacks)
        return saves and self._batches >= MIN_BATCHES and self._underway <= self._client.included

    def _begin(self, what: str) -> None:
        """Something begins in which heartbeats may come slower than those of steps."""
        self._underway.add(what)
        if what not in self._client.included:
            self._rest_heartbeats()

    def _end(self, trainer: pl.Trainer, what: str) -> None:
        if what not in self._underway:
            return
        self._underway.discard(what)
        self._client.saw(what)
        if what not in self._client.included:
            self._update_timeouts(trainer)

    def _rest_heartbeats(self, for_good: bool = False) -> None:
        """Until they are calculated again: nothing is known of the steps that come, or no steps come."""
        client = self._client
        if (self.calculate_timeouts or for_good) and client.is_initialized and HEARTBEAT in client.calculated:
            client.set_timeouts_aside(HEARTBEAT)

    def _save_timeouts(self, is_first: bool) -> None:
        try:
            self._client.write_state(self._directory)
        except OSError as error:
            self.logger.warning(
                "cannot keep timeouts in %s: %s; the next run starts without them", self._directory, error
            )
        if is_first:
            self.logger.info("timeouts calculated, kept in %s", self._directory)

    def _say(self, trainer: pl.Trainer, text: str, *values: Any) -> None:
        if trainer.is_global_zero:
            self.logger.info(text, *values)

    # -- the end of training

    def _stop_if_requested(self, trainer: pl.Trainer) -> None:
        """End fit if FLAG.stop exists. Ranks must stop at the same batch, so they ask each other, every few seconds.

        What ends fit is Lightning's own exception for that: `should_stop` would start a validation first, and ends
        nothing before min_epochs.
        """
        flag = os.environ.get(FLAG_VARIABLE)
        if not flag:
            return
        request = Path(f"{flag}.stop")
        asked = trainer.is_global_zero and request.exists()
        batch, now = self._batches, time.monotonic()
        since_batch, since = self._last_stop_check
        # The batches of the next seconds, as rank 0 expects them: all must come to the same number.
        interval = 1.0 if not since else max(1.0, STOP_CHECK_SECONDS * (batch - since_batch) / max(now - since, 1e-3))
        answer = maximum_of_ranks([float(asked), interval if trainer.is_global_zero else 0.0])
        self._last_stop_check, self._next_stop_check = (batch, now), batch + int(answer[1])
        if not answer[0]:
            return
        self._save_last_checkpoint(trainer)
        self._enter(FINISHING)
        trainer.strategy.checkpoint_io.teardown()  # wait for asynchronous writers, as Lightning does after teardown
        if trainer.is_global_zero:
            request.unlink(missing_ok=True)
            self.logger.info(
                "stopped at step %d, as %s asked; the next run goes on from there", trainer.global_step, request
            )
        raise importlib.import_module(f"{pl.__name__}.utilities.exceptions")._TunerExitException

    def _save_last_checkpoint(self, trainer: pl.Trainer) -> None:
        """Save where ckpt_path="last" looks."""
        keepers: list[Any] = [keeper for keeper in trainer.checkpoint_callbacks if getattr(keeper, "dirpath", None)]
        directory = keepers[0].dirpath if keepers else trainer.default_root_dir
        path = os.path.join(directory, "last.ckpt")
        for keeper in keepers[:1]:
            keeper.last_model_path = path
        trainer.save_checkpoint(path, weights_only=False)

    def _why_complete(self, trainer: pl.Trainer) -> str | None:
        """Why there is nothing left to train; None if a next run has to go on."""
        if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
            return f"max_steps={trainer.max_steps} reached"
        # Lightning counts an epoch that was stopped in the middle as one that is over.
        cut_short = trainer.should_stop and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch and not cut_short:
            return f"max_epochs={trainer.max_epochs} reached"
        if not self._fit_ended:  # left by Lightning's _TunerExitException
            return None
        for stop, earlier in zip(early_stops(trainer), self._early_stops, strict=False):
            if trainer.should_stop and stop != earlier:
                return f"stopped early: {stop[1]}"
        # A Timer whose time was used up by earlier runs stops this one at once; whoever else stops it wants it later.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        timers = [callback for callback in callbacks if is_a(callback, "Timer")]
        out_of_time = any((timer.time_remaining() or math.inf) <= 0 for timer in timers)
        if self._batches <= 1 and (out_of_time or not trainer.should_stop):
            return "max_time used up" if out_of_time else "nothing left to train"
        return None

    def _create_finished_flag(self, trainer: pl.Trainer, reason: str) -> None:
        flag = Path(os.environ[FLAG_VARIABLE])
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "time": timestamp(), "by": this_attempt()}
        write_json(flag, {"reason": reason, **place}, durable=True)
        self.logger.info("training is complete: %s; created %s", reason, flag)


def remove_flag_of_this_attempt(flag: Path) -> None:
    """An earlier fit of the same script was complete, but now there is one more, and the last one decides."""
    try:
        if this_attempt() and json.loads(flag.read_text(encoding="utf-8"))["by"] == this_attempt():
            flag.unlink()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # there is none, or it was made by hand


def destroy_gloo() -> None:
    """At the exit of a process, after a clean end of fit: destroy the process group, if it is gloo's.

    Otherwise its threads abort some processes, whose work was done, as the interpreter ends (torch 2.13, PR 179291: 9
    of 25 runs of two ranks). After an exception there may be peers that this would wait for.
    """
    dist = torch.distributed
    if hasattr(sys, "last_value") or not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()


def early_stops(trainer: pl.Trainer) -> list[tuple[int, str | None]]:
    """The epoch and the reason of the last stop by each EarlyStopping."""
    callbacks = trainer.early_stopping_callbacks
    return [(callback.stopped_epoch, callback.stopping_reason_message) for callback in callbacks]


def absolute(path: Any) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(path)


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def this_attempt() -> str | None:
    """The directory of this attempt's evidence, another for each attempt of each launcher; None without a launcher."""
    run_dir = os.environ.get("FT_RUN_DIR")
    return f"{run_dir}/attempt_{os.environ.get('FT_ATTEMPT') or 0}" if run_dir else None


def checkpoint_ios(trainer: pl.Trainer) -> list[Any]:
    """The CheckpointIO and those that it wraps, outermost first."""
    ios: list[Any] = [trainer.strategy.checkpoint_io]
    while getattr(ios[-1], "checkpoint_io", None) is not None:
        ios.append(ios[-1].checkpoint_io)
    return ios


def file_writer(trainer: pl.Trainer) -> Any:
    """The innermost CheckpointIO, which writes the files."""
    return checkpoint_ios(trainer)[-1]


def is_lightnings_own(writer: Any) -> bool:
    kind = type(writer)
    is_theirs = kind.__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
    return kind is AtomicCheckpointIO or (kind.__name__ == "TorchCheckpointIO" and is_theirs)


def is_asynchronous(trainer: pl.Trainer) -> bool:
    """Whether a thread writes the checkpoints, so that saving returns before they are on disk."""
    return any(is_a(io, "AsyncCheckpointIO") for io in checkpoint_ios(trainer))


def after_writes(trainer: pl.Trainer, function: Callable[..., Any], *args: Any) -> None:
    """Call a function now, or, where a thread writes the checkpoints, there, after those that wait to be written."""
    threads = filter(None, (getattr(io, "_executor", None) for io in checkpoint_ios(trainer)))
    thread = next(threads, None)
    if thread is None:
        function(*args)
    else:
        thread.submit(function, *args)


def is_a(thing: object, name: str) -> bool:
    """Whether something is of Lightning's class `name`, of whichever of its two packages."""
    return any(base.__name__ == name and "lightning" in base.__module__ for base in type(thing).__mro__)


def schedule_fault(params: SimulatedFaultParams, trainer: pl.Trainer, logger: logging.Logger) -> threading.Timer | None:
    """Start the clock of a simulated fault, if it is this rank's."""
    # All ranks draw the same numbers, another set in each attempt, without communication. The nodes of a job may
    # count attempts differently, but the port is a new one each time, and the same for all.
    rng = random.Random(f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.environ.get('MASTER_PORT')}")
    rank = rng.randrange(trainer.world_size) if params.rank_to_fail is None else params.rank_to_fail
    fault_type = rng.choice(sorted(FAULT_SIGNALS)) if params.fault_type == "random" else params.fault_type
    delay = params.base_delay + rng.random() * params.rand_delay
    if rank != trainer.global_rank:
        return None
    logger.warning("simulated fault: %s on rank %d in %.1f s", fault_type, rank, delay)
    timer = threading.Timer(delay, os.kill, (os.getpid(), FAULT_SIGNALS[fault_type]))
    timer.daemon = True
    timer.start()
    return timer
