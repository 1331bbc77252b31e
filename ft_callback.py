"""Makes a Lightning training fault tolerant under ft_launcher.py.

    trainer = Trainer(callbacks=[FaultToleranceCallback(autoresume=True), ...], ...)
    trainer.fit(model, ckpt_path="last")

Tells the rank's monitor what the Trainer does: heartbeats for steps, sections for all that may be
slow for good reasons. Works with `lightning` and `pytorch_lightning`, on any device, in `fit`
alone. A step, here, is a training batch that the loop has done.

    hook                what it does; the section from there to the next
    setup               connects; "setup", or "resume" where a checkpoint had been saved
    on_train_start      all ranks must start at the same step; "first_batch", which may compile
    on_train_batch_end  heartbeat; stops if asked; none, or "epoch_turn" after an epoch's last batch
    on_validation_*     "validation", entered again with each batch
    state_dict          "checkpointing", or "awaiting_checkpoint" on ranks that do not write
    on_train_end        "finishing", which waits for asynchronous checkpoints
    on_fit_end          if training is complete, lets the monitor create FLAG when the script ends
    teardown            "after_training", entered again with each test batch
    on_exception        tells of the exception; "after_training"

FLAG.stop, SIGTERM and SIGUSR1 mean the same: save a checkpoint after a step and end the script
there, with exit code 0; the next run resumes at that step.

Files (FLAG is the value of FAULT_TOL_FINISHED_FLAG_FILE)
    FLAG                   training is complete: {"reason", "step", "epoch", "time"}
    FLAG.stop              made by a person or by autoresume.sh, and removed when obeyed
    EXP_DIR/ft_state.json  what was learned of how long things take, by the launcher
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ft_monitor import (
    AFTER_TRAINING,
    CHECKPOINTING,
    FLAG_VARIABLE,
    RankMonitorClient,
    RankMonitorClientError,
    WorkloadControlRequest,
    progress_files,
)


def lightning_package() -> str:
    """The package that the script uses; one that is installed if it has imported neither yet."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    loaded = [name for name in names if name in sys.modules]
    installed = [name for name in names if importlib.util.find_spec(name.partition(".")[0])]
    return (loaded or installed or names)[0]


if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.io import TorchCheckpointIO
else:
    pl = importlib.import_module(lightning_package())
    TorchCheckpointIO = pl.plugins.io.TorchCheckpointIO

SETUP, RESUME, FIRST_BATCH = "setup", "resume", "first_batch"
EPOCH_TURN, VALIDATION, FINISHING = "epoch_turn", "validation", "finishing"
AWAITING = "awaiting_checkpoint"
FAULT_SIGNALS = {"rank_killed": signal.SIGKILL, "rank_hung": signal.SIGSTOP}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_CHECK_SECONDS, STOP_CHECK_BATCHES = 2.0, 100  # at most, between looks for a request to stop
STEPLESS_BATCHES = 20  # without an optimizer step, before a warning
UNFINISHED = ".ft_unfinished"  # ends the name of a checkpoint that is being written
LOGGER = f"{pl.__name__}.FaultToleranceCallback"  # whose lines appear as Lightning's do


# --------------------------------------------------------------------------------- checkpoints


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lets a crash, a kill or a full disk at any moment leave a complete checkpoint.

    A file is written beside its target and renamed; one that was superseded is removed when its
    successor is there; in the place of a broken one the newest complete one is loaded. Remote
    paths are left to Lightning. Works without the callback: Trainer(plugins=[AtomicCheckpointIO()])

    `is_async`: write in a thread. `section` is entered while the caller waits; `saved` is called,
    by whoever has written it, with each checkpoint on disk and its path.
    """

    def __init__(self, is_async: bool = False) -> None:
        self.is_async = is_async
        self.section: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.saved: Callable[[Mapping[str, Any], Any], None] | None = None
        self.superseded: list[Any] = []
        self._is_settled = True  # no save since what was superseded was removed
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._error: BaseException | None = None  # in the thread

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_thread": None}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with self.section():
            self.remove_superseded()
            self._raise_error()
            self._is_settled = False
            if "://" not in str(path):  # before the thread, as a link there may follow at once
                path = Path(path).expanduser()
                path.parent.mkdir(parents=True, exist_ok=True)
            # Training goes on, and changes tensors that the thread still writes.
            values = copy.deepcopy(checkpoint) if self.is_async else checkpoint
            self._do(self._save, values, path, storage_options)

    def _save(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)
        if self.saved is not None:
            self.saved(checkpoint, path)

    def remove_checkpoint(self, path: Any) -> None:
        """Later, after a save: a link may still point to it, or its successor be unwritten."""
        self.superseded.append(path)
        if self._is_settled:
            self.remove_superseded()

    def remove_superseded(self) -> None:
        self._is_settled = True
        paths, self.superseded = self.superseded, []
        for path in paths:
            self._do(super().remove_checkpoint, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All ranks come here, find the same, and change nothing."""
        if "://" not in str(path) and not is_complete(Path(path)):
            broken, path = path, newest_resumable(Path(path)) or path
            logging.getLogger(LOGGER).warning("%s is broken: loading %s", broken, path)
        return super().load_checkpoint(path, *args, **kwargs)

    def teardown(self) -> None:
        """Wait until all is written. Raises what has kept the thread from writing."""
        self.remove_superseded()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._raise_error()

    def _do(self, function: Callable[..., Any], *args: Any) -> None:
        """Now; or in the thread, when all that came before is done."""
        if not self.is_async:
            function(*args)
            return
        self._thread = self._thread or concurrent.futures.ThreadPoolExecutor(1)
        self._thread.submit(self._do_in_thread, function, *args)

    def _do_in_thread(self, function: Callable[..., Any], *args: Any) -> None:
        if self._error is None:  # after a failed write, its predecessor must stay
            try:
                function(*args)
            except BaseException as error:  # for the main thread
                self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    remove_unfinished(target.parent)
    # In the target's directory: a rename from another file system is a copy, and not atomic.
    name = f".{target.name[:99]}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}"
    beside = target.with_name(name)
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError:
        pass  # some network file systems refuse it; the file itself is on the disk
    finally:
        os.close(directory)


def remove_unfinished(directory: Path) -> None:
    """Remove what killed writers have left: their process is gone, or an hour has passed."""
    for path in directory.glob(f".*{UNFINISHED}"):
        host, _, pid = path.name.removesuffix(UNFINISHED).rpartition(".")
        is_dead = host.endswith(f".{socket.gethostname()}") and not os.path.exists(f"/proc/{pid}")
        try:
            if is_dead or path.stat().st_mtime < time.time() - 3600:
                path.unlink()
        except OSError:
            continue  # another process did it, or may do it


def is_complete(path: Path, member: bytes = b"") -> bool:
    """Whether a checkpoint has all its parts, as far as that shows without reading them.

    `member`: a key that it must have, such as b"optimizer_states".
    """
    if path.is_dir():  # sharded, and not ours
        return not member
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if head[:1] == b"\x80":  # a pickle, as torch wrote before 1.6
                return not member
            with zipfile.ZipFile(file) as archive:  # whose directory is its end
                parts, end = archive.infolist(), archive.start_dir
                is_whole = all(0 <= x.header_offset < end - x.compress_size for x in parts)
                pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
                is_whole &= head == b"PK\3\4" and bool(pickles)
                return is_whole and member in archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def newest_resumable(last: Path) -> Path | None:
    """The newest complete checkpoint with optimizer states beside this one, or below."""
    paths = last.parent.rglob(f"*{last.suffix}")
    good = [path for path in paths if is_complete(path, b"optimizer_states")]
    return max(good, key=lambda path: path.stat().st_mtime, default=None)


def restore_last(path: str) -> Path | None:
    """Link the newest complete checkpoint to `path` if that is missing, and return it.

    Lightning removes the old link before it makes the new one, so a kill can leave none.
    """
    if "://" in path or os.path.exists(path):
        return None
    newest = newest_resumable(Path(path))
    if newest is not None:
        Path(path).unlink(missing_ok=True)  # a link to what is not there
        os.link(newest, path)
    return newest


def last_keeper(trainer: pl.Trainer) -> Any:
    """The ModelCheckpoint that keeps `last`, or else any; None if there is none."""
    keepers: list[Any] = [k for k in trainer.checkpoint_callbacks if hasattr(k, "save_last")]
    return max(keepers, key=lambda keeper: bool(keeper.save_last), default=None)


def last_path(keeper: Any, trainer: pl.Trainer) -> str:
    """Where ckpt_path="last" finds what a ModelCheckpoint keeps."""
    values = {"epoch": trainer.current_epoch, "step": trainer.global_step}
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    metrics = {**trainer.callback_metrics, **metrics}
    return keeper.last_model_path or keeper.format_checkpoint_name(
        metrics, keeper.CHECKPOINT_NAME_LAST
    )


def why_not_resumed(trainer: pl.Trainer, checkpoint: str) -> str:
    """Why a training starts at step 0 although `checkpoint` was saved, and the line to change."""
    if "://" not in checkpoint and not os.path.exists(checkpoint):
        return "that file is not there any more"
    keepers: list[Any] = trainer.checkpoint_callbacks
    paths = [str(k.dirpath) for k in keepers if getattr(k, "dirpath", None)]
    if os.path.dirname(checkpoint) not in [*paths, *map(os.path.realpath, paths)]:
        where = f"this run looks in {', '.join(paths) or 'no directory'}"
        return f"{where}: give ModelCheckpoint a dirpath that is the same in every run"
    if not getattr(last_keeper(trainer), "save_last", None):
        return "no last checkpoint is kept: give ModelCheckpoint(save_last=True)"
    return 'none was asked for: does the script call trainer.fit(..., ckpt_path="last")?'


# ----------------------------------------------------------------------------- simulated faults


@dataclasses.dataclass(frozen=True)
class SimulatedFaultParams:
    """A fault to try a job with: a rank kills or stops itself, so many seconds after setup."""

    fault_type: str  # rank_killed (SIGKILL), rank_hung (SIGSTOP) or random
    base_delay: float
    rand_delay: float = 0.0  # at most, on top of base_delay
    rank_to_fail: int | None = None  # None: a random one

    def __post_init__(self) -> None:
        kinds = (*FAULT_SIGNALS, "random")
        if self.fault_type not in kinds:
            raise ValueError(f"fault_type: got {self.fault_type!r}, expected one of {kinds}")
        rank = 0 if self.rank_to_fail is None else self.rank_to_fail
        numbers = {
            "base_delay": self.base_delay,
            "rand_delay": self.rand_delay,
            "rank_to_fail": rank,
        }
        for name, value in numbers.items():
            types = int if name == "rank_to_fail" else (int, float)
            if not isinstance(value, types) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a number of at least 0")

    def schedule(self, trainer: pl.Trainer, logger: logging.Logger) -> None:
        """All ranks draw the same numbers, other ones in each attempt: its port is a new one."""
        attempt = [os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
        rng = random.Random(str(attempt))
        rank = rng.randrange(trainer.world_size) if self.rank_to_fail is None else self.rank_to_fail
        kind = rng.choice(sorted(FAULT_SIGNALS))
        kind = kind if self.fault_type == "random" else self.fault_type
        delay = self.base_delay + rng.random() * self.rand_delay
        if rank == trainer.global_rank:
            logger.warning("simulated fault: %s on rank %d in %.1f s", kind, rank, delay)
            timer = threading.Timer(delay, os.kill, (os.getpid(), FAULT_SIGNALS[kind]))
            timer.daemon = True
            timer.start()


# --------------------------------------------------------------------------------- the callback


class FaultToleranceCallback(pl.Callback):
    """Connects a Lightning training to its rank monitor. Argument names as NVIDIA's.

    `autoresume`: tell when training is complete, so that autoresume.sh does not run it again.
    `calculate_timeouts`: learn limits from what is observed.
    `exp_dir`: where they are kept for later runs, the same for all. By default ft_state in
    Trainer.log_dir, or beside its version_<N> if loggers number it.
    `exc_handling_policy`: is given the exception that ended training, and may return a request to
    the launcher, such as WorkloadControlRequest(WorkloadAction.ShutdownWorkload, "why").

    `setup` raises RuntimeError for what cannot work: the message says what to do.
    """

    has_trained: ClassVar[bool] = False  # this process, so one more fit may well start at step 0

    def __init__(
        self,
        autoresume: bool,
        calculate_timeouts: bool = False,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None = None,
        exp_dir: str | os.PathLike[str] | None = None,
        logger_name: str = LOGGER,
        exc_handling_policy: Callable[[BaseException], WorkloadControlRequest | None] | None = None,
    ) -> None:
        self.autoresume = autoresume
        self.calculate_timeouts = calculate_timeouts
        fault = simulated_fault_params
        self.fault = SimulatedFaultParams(**fault) if isinstance(fault, Mapping) else fault
        self.exp_dir = exp_dir
        self.exc_handling_policy = exc_handling_policy
        self.logger = logging.getLogger(logger_name)
        self._client = RankMonitorClient()
        self._phase: str | None = None  # the section that the Trainer is in, if it is in one
        self._within: str | None = None  # a section within that
        self._fit = Fit()

    # -- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._client.shutdown_workload_monitoring()  # of a fit before this one
        self._client.init_workload_monitoring(
            calculate_timeouts=self.calculate_timeouts, state_file=self._state_file(trainer)
        )
        self._fit = Fit()
        self._be_in(RESUME if os.path.exists(progress_files()[-1]) else SETUP)
        self._check_set_up(trainer)
        self._put_checkpoint_io(trainer)
        if self.fault is not None:
            self.fault.schedule(trainer, self.logger)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_start(trainer)
        self._fit.catch_signals()
        self._fit.early_stops = early_stops(trainer)
        FaultToleranceCallback.has_trained = True
        self._client.send_heartbeat(batches_done(trainer))
        self._be_in(FIRST_BATCH)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._within is not None:  # the Trainer goes on: no hook says that it is over
            self._be_in(self._phase)
        if self._fit.io is not None and self._fit.io.superseded:
            self._fit.io.remove_superseded()

    on_train_epoch_start = on_train_epoch_end = on_sanity_check_end = on_train_batch_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        fit = self._fit
        fit.batches += 1
        self._client.send_heartbeat(batches_done(trainer))
        if trainer.is_last_batch:
            self._be_in(EPOCH_TURN)
        elif self._phase is not None:
            self._be_in(None)
        if fit.batches == STEPLESS_BATCHES:
            self._check_optimizer_steps(trainer, pl_module)
        if fit.batches >= fit.next_stop_check:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._be_in(self._phase, VALIDATION)

    # At its end a checkpoint may follow, which not all ranks write: in the section still.
    on_validation_start = on_validation_end = on_validation_batch_end

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._be_in(self._phase)

    on_predict_batch_end = on_test_batch_end

    def state_dict(self) -> dict[str, Any]:
        """Called on all ranks as a checkpoint is made; there is nothing of ours to keep in it."""
        self._be_in(self._phase, CHECKPOINTING if self._fit.writes else AWAITING)
        return {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._be_in(FINISHING)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after no exception, nor where only a tuner has run."""
        FaultToleranceCallback.has_trained = True
        trainer.strategy.barrier("FaultToleranceCallback.on_fit_end")  # complete on all ranks
        reason = self._why_complete(trainer)
        if not trainer.is_global_zero:
            return
        if reason is None and self._fit.batches == 0:
            self.logger.warning("no batch was trained, so training is not complete")
        if self.autoresume and reason is not None:
            step, epoch = batches_done(trainer), trainer.current_epoch
            self.logger.info("training is complete at step %d: %s", step, reason)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._client.training_complete(reason=reason, step=step, epoch=epoch, time=stamp)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Of a fit, or of a test after it."""
        self._be_in(AFTER_TRAINING)
        atexit.register(destroy_gloo)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Called instead of teardown, and also for what happens before setup or outside of fit."""
        self._be_in(AFTER_TRAINING)  # the script may handle it, and go on
        if type(exception) is SystemExit and not exception.code:  # a clean stop
            atexit.register(destroy_gloo)
            return
        if not self._client.is_initialized:
            return
        self._client.report_error(exception)
        try:
            request = self.exc_handling_policy and self.exc_handling_policy(exception)
            if request:
                self._client.send_workload_control_request(request)
        except Exception:  # a user's own code, which must not hide the error
            self.logger.exception("exc_handling_policy failed")

    def _be_in(self, phase: str | None, within: str | None = None) -> None:
        """Be in this section, or in one within it, and in no other; if in it already, again."""
        self._phase, self._within = phase, within
        client, section = self._client, within or phase
        if not client.is_initialized:
            return
        if section in client.open_sections:
            client.end_section(section)
        if section is not None:
            client.start_section(section)
        for other in client.open_sections - {section}:
            client.end_section(other)

    # -- set-up

    def _state_file(self, trainer: pl.Trainer) -> Path:
        if self.exp_dir is not None:
            return Path(self.exp_dir) / "ft_state.json"
        path = Path(trainer.log_dir or trainer.default_root_dir)
        path = path.parent if re.fullmatch(r"version_\d+", path.name) else path
        return path / "ft_state" / "ft_state.json"

    def _check_set_up(self, trainer: pl.Trainer) -> None:
        config, flag = self._client.cfg, os.environ.get(FLAG_VARIABLE)
        assert config is not None
        ranks = int(os.environ.get("WORLD_SIZE", trainer.world_size))
        if ranks != trainer.world_size:  # each would train alone, and overwrite the others' files
            raise RuntimeError(
                f"the launcher started {ranks} ranks, but this Trainer has {trainer.world_size}: "
                'give Trainer(devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), '
                'num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)))'
            )
        if self.autoresume and not flag:
            raise RuntimeError(
                f"FaultToleranceCallback(autoresume=True) needs {FLAG_VARIABLE}: start the job by "
                f"./autoresume.sh python ft_launcher.py ..., or export {FLAG_VARIABLE}=/some/file"
            )
        if self.autoresume and flag and not Path(flag).absolute().parent.is_dir():
            raise RuntimeError(f"{FLAG_VARIABLE}={flag}: there is no such directory: create it")
        if config.rank_out_of_section_timeout is not None:
            raise RuntimeError(
                "rank_out_of_section_timeout is for loops without heartbeats, and would end this "
                "training: remove it, and set rank_heartbeat_timeout"
            )
        if not (config.is_watching() or self.calculate_timeouts):
            raise RuntimeError(
                "no timeout is set, so no hang would be noticed: give FaultToleranceCallback "
                "calculate_timeouts=True, or ft_launcher --ft-rank-heartbeat-timeout=SECONDS"
            )

    def _put_checkpoint_io(self, trainer: pl.Trainer) -> None:
        """Ours in the place of Lightning's own; whoever has chosen another keeps it."""
        strategy = trainer.strategy
        # A strategy that writes checkpoints itself does so on all ranks.
        is_plain = is_lightnings(type(strategy).save_checkpoint, "Strategy.save_checkpoint")
        self._fit.writes = trainer.is_global_zero or not is_plain
        io: Any = strategy.checkpoint_io
        if type(io) is not AtomicCheckpointIO:
            is_async = is_lightnings(type(io), "AsyncCheckpointIO")
            inner = type(io.checkpoint_io if is_async else io)
            if inner is not AtomicCheckpointIO and not is_lightnings(inner, "TorchCheckpointIO"):
                return
            io = strategy.checkpoint_io = AtomicCheckpointIO(is_async)
        io.section, io.saved = self._checkpointing, self._report_saved
        self._fit.io = io

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        self._be_in(self._phase, CHECKPOINTING)
        yield
        self._be_in(self._phase)

    def _report_saved(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        """Tell of a checkpoint to resume from; in a thread, if they are written in one."""
        where = str(path) if "://" in str(path) else os.path.abspath(path)
        try:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            step = progress["total"]["processed"]
            if step > 0 and "optimizer_states" in checkpoint:
                self._client.report_saved(step, where)
        except (KeyError, RankMonitorClientError):
            pass  # not of a Trainer, or monitoring was shut down meanwhile

    def _check_start(self, trainer: pl.Trainer) -> None:
        """A training that is restarted from nothing, or on some ranks alone, costs most of all."""
        step = batches_done(trainer)
        first = trainer.strategy.broadcast(step)
        if step != first:
            raise RuntimeError(
                f"rank {trainer.global_rank} starts at step {step}, rank 0 at {first}: they found "
                "different checkpoints; give ModelCheckpoint(dirpath=...) a shared directory"
            )
        if step > 0 or not trainer.is_global_zero or self.has_trained:
            return
        try:
            noted = json.loads(Path(progress_files()[-1]).read_text(encoding="utf-8"))
            step, checkpoint = int(noted["step"]), str(noted["checkpoint"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        keeper = last_keeper(trainer)
        if keeper is not None and keeper.save_last:
            path = last_path(keeper, trainer)
            newest = restore_last(path)
            if newest is not None:
                raise RuntimeError(f"{path} was missing: linked {newest}, for a restart to resume")
        self.logger.warning(
            "*** TRAINING STARTS AT STEP 0 ALTHOUGH STEP %d WAS SAVED ***\n*** in %s\n*** %s",
            step, checkpoint, why_not_resumed(trainer, checkpoint),
        )  # fmt: skip

    def _check_optimizer_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_manual = not pl_module.automatic_optimization
        if is_manual and trainer.global_step == 0 and trainer.is_global_zero:
            self.logger.warning(
                "no step of self.optimizers() in %d batches: global_step stays 0, and "
                "ModelCheckpoint will not save",
                STEPLESS_BATCHES,
            )

    # -- the end of training

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        """End the script if any rank was asked to.

        Ranks must stop at the same batch, so they ask each other after a number of batches on
        which they agree. Not in the middle of accumulated gradients, which would be lost.
        """
        fit, strategy = self._fit, trainer.strategy
        current = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if current % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        flag = os.environ.get(FLAG_VARIABLE)
        if flag and trainer.is_global_zero and os.path.exists(f"{flag}.stop"):
            fit.asked_by = f"{flag}.stop"
        now = time.monotonic()
        rate = (fit.batches - fit.last_stop_check[0]) / max(now - fit.last_stop_check[1], 1e-3)
        batches = min(int(rate * STOP_CHECK_SECONDS), STOP_CHECK_BATCHES)
        answer = torch.tensor([fit.asked_by is not None, batches], device=strategy.root_device)
        asking, batches = strategy.reduce(answer, reduce_op="sum").tolist()
        fit.last_stop_check = fit.batches, now
        fit.next_stop_check = fit.batches + 1 + batches // trainer.world_size
        if asking:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        keeper, what = last_keeper(trainer), "nothing saved: there is no ModelCheckpoint"
        if keeper is not None:
            path = last_path(keeper, trainer)
            trainer.save_checkpoint(path, weights_only=False)
            what = f'saved {path}, where ckpt_path="last" resumes'
        self._be_in(FINISHING)
        trainer.strategy.checkpoint_io.teardown()  # waits for what a thread still writes
        if trainer.is_global_zero:
            by, step = self._fit.asked_by or "another rank", batches_done(trainer)
            Path(by).unlink(missing_ok=True)
            self.logger.warning("stopped at step %d, as %s asked; %s", step, by, what)
        raise SystemExit(0)

    def _why_complete(self, trainer: pl.Trainer) -> str | None:
        """Why there is nothing left to train; None if a next run has to resume."""
        if getattr(trainer, "fast_dev_run", False):
            return None
        if 0 < trainer.max_steps <= trainer.global_step:
            return f"max_steps={trainer.max_steps} reached"
        # Lightning counts an epoch that was stopped in the middle as one that is over.
        is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        is_cut = trainer.should_stop and not is_last_batch
        epochs = trainer.max_epochs
        if epochs is not None and 0 < epochs <= trainer.current_epoch and not is_cut:
            return f"max_epochs={epochs} reached"
        for stop, earlier in zip(early_stops(trainer), self._fit.early_stops, strict=False):
            if trainer.should_stop and stop != earlier:
                return f"stopped early: {stop[1]}"
        # A Timer whose time was used up by earlier runs stops this one at once; whoever else stops
        # it wants it later.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        timers = [callback for callback in callbacks if hasattr(callback, "time_remaining")]
        is_spent = any((timer.time_remaining() or 1) <= 0 for timer in timers)
        return "max_time used up" if is_spent and self._fit.batches <= 1 else None


class Fit:
    """What is known of a fit, and who asks to stop it."""

    def __init__(self) -> None:
        free = (signal.SIG_DFL, signal.SIG_IGN)  # the script does not handle it itself
        self.signals = [number for number in STOP_SIGNALS if signal.getsignal(number) in free]
        self.pid = os.getpid()
        self.writes = False  # whether this rank writes checkpoints
        self.io: AtomicCheckpointIO | None = None  # unless the user has chosen another
        self.early_stops: list[tuple[int, str | None]] = []  # before it
        self.batches = 0  # that this run has done
        self.asked_by: str | None = None  # the signal or file that asks for a stop
        self.next_stop_check = 1  # the batch from whose end on all ranks ask whether to stop
        self.last_stop_check = (0, 0.0)  # batch and time

    def catch_signals(self) -> None:
        """After Lightning, whose handler of SIGTERM waits for ranks that do not answer."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self.pid:
            os._exit(128 + number)  # forked from this rank: its pool ends it
        self.asked_by = signal.Signals(number).name


def batches_done(trainer: pl.Trainer) -> int:
    """Training batches, in this run and before; optimizer steps would not tell of all loops."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def early_stops(trainer: pl.Trainer) -> list[tuple[int, str | None]]:
    """The epoch and the reason of the last stop by each EarlyStopping."""
    callbacks = trainer.early_stopping_callbacks
    return [(callback.stopped_epoch, callback.stopping_reason_message) for callback in callbacks]


def is_lightnings(thing: Any, name: str) -> bool:
    """Whether a class or function is Lightning's own of this name, in whichever package."""
    package = thing.__module__.partition(".")[0]
    ours = ("lightning", "pytorch_lightning", "lightning_fabric")
    return thing.__qualname__ == name and package in ours


def destroy_gloo() -> None:
    """At the exit of a process: destroy gloo's process group.

    Otherwise its threads abort some processes, whose work was done, as the interpreter ends (torch
    2.13, PR 179291: 9 of 25 runs of two ranks).
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
