"""Makes a Lightning training fault tolerant under ft_launcher.py.

    trainer = Trainer(callbacks=[FaultToleranceCallback(autoresume=True), ...], ...)
    trainer.fit(model, ckpt_path="last")

or, with `ft_launcher.py --ft-auto`, without a change to the script: see follow_every_fit.

Sends the rank's monitor steps (here: trained batches) as heartbeats, and all that may be slow as
sections. Works with `lightning` and `pytorch_lightning`, in `fit` alone.

    hook                what it does; the section until the next hook
    setup               connects; "setup", or "resume" where a checkpoint had been saved
    on_load_checkpoint  a fit that had stopped early is done
    on_fit_start        tells what happens if a rank fails now
    on_train_start      ranks must start at one step, and restarts resume; "first_batch"
    on_train_batch_end  heartbeat; stops if asked; no section, or after the last batch "epoch_turn"
    on_validation_*     stops if asked; "validation", entered again with each batch; from the last
                        one on, "validation_end"
    state_dict          "checkpointing", or "awaiting_checkpoint" on ranks that do not write
    on_save_checkpoint  lets a validation that is stopped be repeated
    on_train_end        stops if asked; "finishing", which waits for asynchronous checkpoints
    on_fit_end          tells if training is complete: reason, step, epoch and time for the flag
    teardown            "after_training", entered again with each test batch
    on_exception        tells of the exception; "after_training"

FLAG.stop, SIGTERM, SIGUSR1 and Ctrl-C mean the same: save a checkpoint after a step and end the
script there, with exit code 0; the next run resumes there. Outside of `fit`, signals end it.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import pickle
import random
import re
import signal
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
    BROKEN,
    CHECKPOINTING,
    FLAG_VARIABLE,
    GRACE_SECONDS,
    SAVE_SIGNALS,
    RankMonitorClient,
    RankMonitorClientError,
    WorkloadAction,
    WorkloadControlRequest,
    attempt_number,
    describe_error,
    progress_file,
    within,
)

PACKAGES = "lightning.pytorch", "pytorch_lightning"


def lightning_package() -> str:
    """The package that the script has imported, or else one that is installed."""
    loaded = [name for name in PACKAGES if name in sys.modules]
    installed = [name for name in PACKAGES if importlib.util.find_spec(name.split(".")[0])]
    return (loaded or installed or PACKAGES)[0]


if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.io import TorchCheckpointIO
else:
    pl = importlib.import_module(lightning_package())
    TorchCheckpointIO = pl.plugins.io.TorchCheckpointIO

SETUP, RESUME, FIRST_BATCH = "setup", "resume", "first_batch"
EPOCH_TURN, VALIDATION, VALIDATION_END = "epoch_turn", "validation", "validation_end"
AWAITING, FINISHING = "awaiting_checkpoint", "finishing"
SECTIONS = {
    SETUP, RESUME, FIRST_BATCH, EPOCH_TURN, VALIDATION, VALIDATION_END, CHECKPOINTING, AWAITING,
    FINISHING, AFTER_TRAINING,
}  # fmt: skip
TUNERS = "LearningRateFinder.on_fit_start", "BatchSizeFinder.on_fit_start"
KEEP_LAST = "give ModelCheckpoint(save_last=True)"
DIRPATH = "give ModelCheckpoint(dirpath=...)"
OF_A_RUN = re.compile(r"/version_\d+/checkpoints$")  # Lightning's default, with a logger's version
COMPLETE = "ft_complete"  # in a checkpoint: why there is nothing left to train
OVERWRITE = 'give LightningCLI(save_config_kwargs={"overwrite": True})'
FAULT_SIGNALS = {"rank_killed": signal.SIGKILL, "rank_hung": signal.SIGSTOP}
LOOK_SECONDS = 0.5  # for a file system to tell if there is a file
STOP_CHECK_SECONDS, STOP_CHECK_BATCHES = 2.0, 100  # at most, between looks for a request to stop
STEPLESS_BATCHES = 20  # before a warning that no optimizer steps
UNFINISHED = ".ft_unfinished"  # ends the name of a checkpoint that is being written
UNFINISHED_SECONDS = 600.0  # without a change: its writer on another host was killed
LOGGER = f"{pl.__name__}.FaultToleranceCallback"  # whose lines appear as Lightning's do


# --------------------------------------------------------------------------------- checkpoints


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lets a crash, a kill or a full disk at any moment leave a complete checkpoint.

    A file is written beside its target and renamed; a superseded one is removed when its successor
    is there; instead of a broken one, the newest complete one is loaded. Remote paths are left to
    Lightning. Works without the callback: Trainer(plugins=[AtomicCheckpointIO()])
    """

    def __init__(self, is_async: bool = False) -> None:
        self.is_async = is_async
        self.section: Callable[[], Any] = contextlib.nullcontext  # in which a caller waits
        self.saved: Callable[[Any, Any], None] | None = None  # told of a checkpoint, and its path
        self.dispensable = ""  # path; that it cannot be written does not end training
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._last: concurrent.futures.Future[None] | None = None  # what it does last

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_thread": None, "_last": None}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with self.section():
            if self._last is not None and self._last.done():
                self.teardown()
            if "://" not in str(path):  # now, as a link there may follow before the thread
                path = Path(path).expanduser()
                path.parent.mkdir(parents=True, exist_ok=True)
            if self.is_async:  # training goes on, and changes tensors
                checkpoint = copy.deepcopy(checkpoint)
            self._do(self._save, checkpoint, path, storage_options)

    def _save(self, checkpoint: Any, path: Any, storage_options: Any) -> None:
        try:
            if storage_options is not None or "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write_checkpoint(checkpoint, path)
        except Exception as error:
            if str(path) != self.dispensable:
                raise
            logging.getLogger(LOGGER).warning("cannot save %s: %r", path, error)
            return
        if self.saved is not None:
            self.saved(checkpoint, path)

    def remove_checkpoint(self, path: Any) -> None:
        self._do(super().remove_checkpoint, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All ranks come here, find the same, and change nothing."""
        if os.path.lexists(path) and not is_complete(Path(path)):
            broken, path = path, newest_resumable(Path(path)) or path
            logging.getLogger(LOGGER).warning("%s is broken: loading %s", broken, path)
        return super().load_checkpoint(path, *args, **kwargs)

    def teardown(self) -> None:
        """Wait for the thread. Raises what has kept it from writing."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _do(self, function: Callable[..., Any], *args: Any) -> None:
        """Now; or in the thread, after all that came before."""
        if self.is_async:
            self._thread = self._thread or concurrent.futures.ThreadPoolExecutor(1)
            self._last = self._thread.submit(self._follow, self._last, function, *args)
        else:
            function(*args)

    @staticmethod
    def _follow(before: Any, function: Callable[..., Any], *args: Any) -> None:
        if before is not None:
            before.result()  # after a failed write, its predecessor must stay
        function(*args)


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    for path in target.parent.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if is_left_behind(path):
                path.unlink()
    # In the target's directory: a rename from another file system is a copy, and not atomic.
    who = f"{os.uname().nodename}.{os.getpid()}"
    beside = target.with_name(f".{target.name[:99]}.{who}{UNFINISHED}")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems refuse it
        os.fsync(directory)
    os.close(directory)


def is_left_behind(unfinished: Path) -> bool:
    """Whether its writer was killed."""
    target, _, pid = unfinished.name.removesuffix(UNFINISHED).rpartition(".")
    if target.endswith(f".{os.uname().nodename}"):
        return not os.path.exists(f"/proc/{pid}")
    return unfinished.stat().st_mtime < time.time() - UNFINISHED_SECONDS


def is_complete(path: Path, member: bytes = b"") -> bool:
    """Whether a checkpoint has all its parts, as far as its directory shows, and this key."""
    if path.is_dir():  # sharded, and not ours
        return not member
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if head[:1] == b"\x80":  # a pickle, as torch wrote before 1.6
                return not member
            with zipfile.ZipFile(file) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                is_torchs = head == b"PK\3\4" and bool(pickles)
                return is_torchs and member in archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def newest_resumable(last: Path) -> Path | None:
    """The newest complete checkpoint with optimizer states beside this one, or below."""
    paths = last.parent.rglob(f"*{last.suffix}")
    good = [path for path in paths if is_complete(path, b"optimizer_states")]
    return max(good, key=lambda path: path.stat().st_mtime, default=None)


def model_checkpoints(trainer: pl.Trainer) -> list[Any]:
    return [keeper for keeper in trainer.checkpoint_callbacks if hasattr(keeper, "every_n_epochs")]


def last_keeper(trainer: pl.Trainer) -> Any:
    """Whose last checkpoint ckpt_path="last" loads, if one has save_last."""
    return next((keeper for keeper in model_checkpoints(trainer) if keeper.save_last), None)


def last_path(trainer: pl.Trainer, keeper: Any) -> str:
    name = keeper.format_checkpoint_name(
        dict(trainer.callback_metrics), keeper.CHECKPOINT_NAME_LAST
    )
    return keeper.last_model_path or name


def restore_last(path: str) -> Path | None:
    """Link the newest complete checkpoint to `path` if a kill between two links has left none."""
    if "://" in path or os.path.exists(path):
        return None
    newest = newest_resumable(Path(path))
    if newest is not None:
        Path(path).unlink(missing_ok=True)  # a link to nothing
        os.link(newest, path)
    return newest


def given_to_fit(trainer: pl.Trainer) -> dict[str, Any]:
    """Arguments of trainer.fit, which keeps them nowhere: from the stack."""
    given, frame = {}, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is trainer:
            given = {name: frame.f_locals.get(name) for name in ("ckpt_path", "weights_only")}
    return given


def obstacles(trainer: Any, given: Mapping[str, Any], rolling: Path | None) -> Iterator[str]:
    """What will keep restarts from resuming, and the line to change. On all ranks."""
    if rolling is not None:
        return
    keepers = [keeper for keeper in model_checkpoints(trainer) if keeper.save_last]
    if given.get("ckpt_path") is None:
        yield f'trainer.fit got no ckpt_path: {KEEP_LAST} and ckpt_path="last", or --ft-auto'
    elif given["ckpt_path"] == "last" and not keepers:
        yield f"no last checkpoint is kept: {KEEP_LAST}"
    elif given["ckpt_path"] == "last" and all(OF_A_RUN.search(str(x.dirpath)) for x in keepers):
        yield f"unless the logger's version is fixed, each run has its own checkpoints: {DIRPATH}"
    if any(keeper.save_weights_only for keeper in keepers):
        yield "the last checkpoint has weights only: give ModelCheckpoint(save_weights_only=False)"
    # At an epoch's end, Lightning writes the last one only with another.
    choosy = [k.save_top_k == 0 or (k.monitor and k.save_top_k > 0) for k in keepers]
    if keepers and all(choosy) and all(keeper.every_n_epochs for keeper in keepers):
        yield f"the last checkpoint is seldom written: {KEEP_LAST} without monitor"
    for callback in trainer.callbacks:
        kind = type(callback)
        if is_lightnings(kind.on_fit_start, *TUNERS):
            yield f"{kind.__name__} would run again, and training start at step 0: use Tuner"
        if is_lightnings(kind.setup, "SaveConfigCallback.setup") and not callback.overwrite:
            is_new = re.fullmatch(r"version_\d+", os.path.basename(trainer.log_dir or ""))
            if callback.save_to_log_dir and not is_new:
                yield f"{callback.config_filename} would exist already: {OVERWRITE}"


def resumes_from(trainer: pl.Trainer, given: Mapping[str, Any], rolling: Path | None) -> str:
    """Where a restart resumes, if there are no obstacles, and how often that is saved."""
    if rolling is not None:
        return f"{rolling}, saved every {save_minutes():g} minutes"
    keeper = last_keeper(trainer)
    if given.get("ckpt_path") != "last" or keeper is None:
        return f"{given.get('ckpt_path')} again, or what your script then gives"
    epochs, steps = keeper.every_n_epochs, keeper._every_n_train_steps
    every = keeper._train_time_interval or (f"{epochs} epoch(s)" if epochs else f"{steps} step(s)")
    return f"{last_path(trainer, keeper)}, saved every {every}"


def directories(trainer: pl.Trainer) -> list[str]:
    return [str(keeper.dirpath) for keeper in model_checkpoints(trainer)]


def is_beside(checkpoint: str, trainer: pl.Trainer) -> bool:
    """Whether this training, too, writes to the directory of a checkpoint."""
    paths = directories(trainer)
    return os.path.dirname(checkpoint) in [*paths, *map(os.path.realpath, paths)]


def why_not_resumed(trainer: pl.Trainer, checkpoint: str, given: Mapping[str, Any]) -> str:
    """Why `checkpoint` was not loaded, and the line to change; else what is known."""
    if "://" not in checkpoint and not os.path.exists(checkpoint):
        return "that file is not there any more"
    if not is_beside(checkpoint, trainer):
        places = directories(trainer)
        return f"this run looks in {places}: give ModelCheckpoint one dirpath for all runs"
    if last_keeper(trainer) is None:
        return f"no last checkpoint is kept: {KEEP_LAST}"
    loaded = trainer.ckpt_path or "nothing"
    return f'trainer.fit(ckpt_path={given.get("ckpt_path")!r}) loaded {loaded}: give it "last"'


# ------------------------------------------------------------------------------------ --ft-auto


def follow_every_fit() -> list[Any]:
    """Lightning calls this for each new Trainer, by the entry point of ft_launcher --ft-auto. Only
    `fit` adds our callback: no hook comes before Lightning chooses what to load."""
    directory = os.environ.pop("FT_AUTO", None)  # not for processes that this one starts
    for name in PACKAGES:
        if directory and name in sys.modules:
            trainer_class = sys.modules[name].Trainer
            trainer_class.fit = resuming(trainer_class.fit, Path(directory))
    return []


def resuming(fit: Callable[..., None], directory: Path) -> Callable[..., None]:
    """Trainer.fit with our callback, which resumes where the script names no checkpoint. Fits are
    told apart by their model's class and, for each, by their order."""
    signature, fits = inspect.signature(fit), collections.Counter[str]()
    has_begun = attempt_number() > 0 or os.path.exists(progress_file())

    @functools.wraps(fit)
    def fit_and_resume(trainer: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(trainer, *args, **kwargs)
        values = given.arguments
        name = type(getattr(values["model"], "_orig_mod", values["model"])).__name__
        path = directory / f"fit_{name}_{fits[name]}.ckpt"
        fits[name] += 1
        if not trainer.fast_dev_run:
            ours = callback_of(trainer, directory)
            tuners = [x for x in trainer.callbacks if is_lightnings(type(x).on_fit_start, *TUNERS)]
            is_ours = values.get("ckpt_path") is None and not tuners
            ours.autoresume, ours.rolling = True, path if is_ours else None
            if is_ours and is_complete(path):
                values.update(ckpt_path=path, weights_only=False)  # we trust it
            for callback in trainer.callbacks if has_begun else []:
                if is_lightnings(type(callback).setup, "SaveConfigCallback.setup"):
                    callback.overwrite = True  # what it wrote before
        fit(*given.args, **given.kwargs)

    return fit_and_resume


def save_minutes() -> float:
    return float(os.environ["FT_AUTO_SAVE_MINUTES"])


def callback_of(trainer: Any, directory: Path) -> Any:
    """The Trainer's FaultToleranceCallback, of whatever copy of this module, or a new one."""
    callbacks, keepers = trainer.callbacks, trainer.checkpoint_callbacks
    for callback in callbacks:
        if FaultToleranceCallback.__name__ in str(type(callback).__mro__):
            return callback
    ours = FaultToleranceCallback(True, calculate_timeouts=True, exp_dir=directory)
    place = callbacks.index(keepers[0]) if keepers else len(callbacks)  # Lightning's order
    trainer.callbacks = [*callbacks[:place], ours, *callbacks[place:]]
    return ours


# ----------------------------------------------------------------------------- simulated faults


@dataclasses.dataclass(frozen=True)
class SimulatedFaultParams:
    """A fault to try a job with: a rank kills or stops itself."""

    fault_type: str  # rank_killed, rank_hung or random
    base_delay: float  # seconds after setup
    rand_delay: float = 0.0  # at most, on top of that
    rank_to_fail: int | None = None  # None: a random one

    def __post_init__(self) -> None:
        kinds = (*FAULT_SIGNALS, "random")
        numbers = (self.base_delay, self.rand_delay, self.rank_to_fail or 0)
        if self.fault_type not in kinds or not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"{self}: expected one of {kinds}, and numbers of at least 0")

    def schedule(self, trainer: pl.Trainer, logger: logging.Logger) -> None:
        """All ranks draw the same numbers, others in each attempt: its port is new."""
        attempt = [os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
        rng = random.Random(str(attempt))
        rank = rng.randrange(trainer.world_size) if self.rank_to_fail is None else self.rank_to_fail
        kinds = FAULT_SIGNALS if self.fault_type == "random" else [self.fault_type]
        kind = rng.choice(sorted(kinds))
        delay = self.base_delay + rng.random() * self.rand_delay
        if rank == trainer.global_rank:
            logger.warning("simulated fault: %s on rank %d in %.1f s", kind, rank, delay)

            def fail() -> None:
                logger.warning("simulated fault: %s on rank %d, now", kind, rank)
                os.kill(os.getpid(), FAULT_SIGNALS[kind])

            timer = threading.Timer(delay, fail)
            timer.daemon = True
            timer.start()


# --------------------------------------------------------------------------------- the callback


class FaultToleranceCallback(pl.Callback):
    """Connects a Lightning training to its rank monitor. Argument names as NVIDIA's.

    `autoresume`: tell when training is complete, for autoresume.sh to end.
    `calculate_timeouts`: learn limits, kept in `exp_dir`, the same for all runs; by default
    ft_state in Trainer.log_dir, or beside its version_<N>.
    `exc_handling_policy`: is given what ended training, and may return a request to the launcher:
    WorkloadControlRequest(WorkloadAction.ShutdownWorkload, "why").
    """

    has_trained: ClassVar[bool] = False  # this process: another fit may well start at step 0
    steps: ClassVar[int] = 0  # of all fits of this process: only what grows is progress
    steps_before: ClassVar[int] = 0  # of those before this one
    rolling: Path | None = None  # under --ft-auto, what this fit saves again and again

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
        self._phase: str | None = None  # the section that the Trainer is in
        self._inner: str | None = None  # a section within that
        self._fit = Fit()

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not {"FT_MONITOR_FD", FLAG_VARIABLE} & os.environ.keys():  # in a debugger, or a notebook
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]
            if trainer.is_global_zero:
                self.logger.warning("not started by ft_launcher: FaultToleranceCallback is off")
            return
        self._client.shutdown_workload_monitoring()  # of a fit before this one
        state_file = self._state_file(trainer)
        self._client.init_workload_monitoring(None, self.calculate_timeouts, state_file)
        FaultToleranceCallback.steps_before = self.steps
        self._fit = Fit(given_to_fit(trainer))
        self._client.protect_workers()
        self._be_in(RESUME if os.path.exists(progress_file()) else SETUP)
        self._check_set_up(trainer)
        self._put_checkpoint_io(trainer)
        if self.fault is not None:
            self.fault.schedule(trainer, self.logger)

    def on_sanity_check_start(self, *args: Any, **kwargs: Any) -> None:
        """End at once, with nothing to save: Lightning's handler would wait for other ranks."""
        self._fit.give_signals_back(self._client)

    on_test_start = on_predict_start = on_sanity_check_start

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.has_trained:
            return
        given, rolling = self._fit.given, self.rolling
        self._fit.may_try = trainer.is_global_zero
        found = "; ".join(obstacles(trainer, given, rolling))
        if found and trainer.is_global_zero:
            self.logger.warning("if a rank fails now, TRAINING WILL NOT RESUME: %s", found)
        elif trainer.is_global_zero:
            where = resumes_from(trainer, given, rolling)
            self.logger.info("if a rank fails now, training resumes from %s", where)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get(COMPLETE):
            self._fit.complete = checkpoint[COMPLETE]
            trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_start(trainer)
        self._fit.give_signals_back(self._client)
        self._client.catch_signals()
        self._fit.is_training, self._fit.weights = True, weights_of(pl_module)
        self._fit.ask_soon()
        for stopping in trainer.early_stopping_callbacks:
            stopping.stopping_reason_message = None  # of an earlier run
        FaultToleranceCallback.has_trained = True
        step = batches_done(trainer)
        if step > 0:  # else each attempt would save, before it fails as the one before
            self._fit.saved_at = time.monotonic()
        self._beat(step)
        self._be_in(FIRST_BATCH)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._inner is not None:  # for which there was no hook at its end
            # Amid an epoch, one rank's logger may upload a checkpoint: others wait in a batch.
            is_saved = self._inner in (CHECKPOINTING, AWAITING) and self._phase is None
            self._be_in(self._phase, AWAITING if is_saved else None)

    on_train_epoch_end = on_sanity_check_end = on_train_batch_start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_batch_start()
        if self._fit.is_asked:
            self._stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        fit = self._fit
        fit.batches += 1
        self._beat(batches_done(trainer))
        if trainer.is_last_batch:
            self._be_in(EPOCH_TURN)
        elif self._phase or self._inner:
            self._be_in(None)
        is_due = fit.batches == STEPLESS_BATCHES * trainer.accumulate_grad_batches
        if is_due and trainer.global_step == 0 and trainer.is_global_zero:
            self.logger.warning("no optimizer steps, as global_step says: no ModelCheckpoint saves")
        # Resuming would skip the validation or epoch's end that comes next.
        counts = trainer.fit_loop.epoch_loop.batch_progress
        count = counts.total if trainer.check_val_every_n_epoch is None else counts.current
        every = trainer.val_check_batch or math.inf
        is_next = count.ready % every == 0 or trainer.is_last_batch
        if is_next:
            fit.weights = weights_of(pl_module)
        if fit.is_due():
            self._stop_if_asked(trainer, is_apt=not is_next)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._be_in(self._phase, VALIDATION)
        if self._fit.is_training:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # as saved by a stop
            # Ranks that validate unequal numbers of batches ask at none of them.
            batches = sum(trainer.num_val_batches)
            is_same = trainer.strategy.broadcast(batches) == batches < math.inf
            self._fit.ask_soon()
            is_swapped = self._fit.weights != weights_of(pl_module)
            self._stop_if_asked(trainer, is_same=is_same, is_swapped=is_swapped)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        is_last = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        # Of a few batches, as in a sanity check, the end says nothing of a whole validation's.
        is_end = is_last and not trainer.sanity_checking
        self._be_in(self._phase, VALIDATION_END if is_end else VALIDATION)
        if self._fit.is_due():
            self._stop_if_asked(trainer, is_swapped=self._fit.weights != weights_of(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A checkpoint may follow, which not all ranks write: they wait in this section.
        self._be_in(self._phase, VALIDATION if trainer.sanity_checking else VALIDATION_END)
        self._fit.ask_soon()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._fit.is_unseen and trainer.is_global_zero:
            where = os.path.join(*directories(trainer)[:1], "")
            self._fit.unseen = self.steps_before + batches_done(trainer), where
        if not self._fit.is_saving:
            return
        if trainer.should_stop and not self._fit.is_training:  # at its end
            checkpoint[COMPLETE] = self._why_complete(trainer)
        loop = checkpoint["loops"]["fit_loop"]
        validation, epoch = loop["epoch_loop.val_loop.batch_progress"], loop["epoch_progress"]
        if trainer.validating:  # as in its first batch: Lightning would skip the rest
            validation["current"] = dict.fromkeys(validation["current"], 0)
            validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        if epoch["current"]["ready"] > epoch["current"]["started"]:  # as at the end of the last
            for progress in (epoch["current"], epoch["total"]):
                progress["ready"] -= 1
                progress["completed"] -= 1

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._be_in(self._phase)

    on_predict_batch_end = on_test_batch_end

    def state_dict(self) -> dict[str, Any]:
        """Called as a checkpoint is made; it keeps nothing of ours."""
        self._be_in(self._phase, CHECKPOINTING if self._fit.writes else AWAITING)
        return {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._be_in(FINISHING)
        self._stop_if_asked(trainer)
        self._fit.is_training = False
        if self.rolling is not None:  # a restart finds this fit done
            self._save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not called after an exception, or for a tuner alone."""
        FaultToleranceCallback.has_trained = True
        self._client.offer_stacks()  # the Trainer has just reset all handlers
        trainer.strategy.barrier("FaultToleranceCallback.on_fit_end")  # complete on all ranks
        reason = self._why_complete(trainer)
        what = "it was stopped early" if self._fit.batches else "no batch was trained"
        is_odd = trainer.should_stop or not self._fit.batches
        if reason is None and is_odd and trainer.is_global_zero:
            self.logger.warning("%s, so training is not complete", what)
        if self.autoresume and reason is not None and trainer.is_global_zero:
            step, epoch = batches_done(trainer), trainer.current_epoch
            self.logger.info("training is complete at step %d: %s", step, reason)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._client.training_complete(reason=reason, step=step, epoch=epoch, time=stamp)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._be_in(AFTER_TRAINING)
        self._client.offer_stacks()
        atexit.register(destroy_gloo)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """In the place of teardown; also called before setup and outside of fit."""
        self._fit.unseen = None  # perhaps because of that
        if type(exception) is SystemExit and not exception.code:  # a clean stop
            atexit.register(destroy_gloo)
        elif self._client.is_initialized:
            self._client.report_error(exception)
            try:
                request = self.exc_handling_policy and self.exc_handling_policy(exception)
                if isinstance(exception, RankMonitorClientError):  # the set-up is wrong
                    action = WorkloadAction.ShutdownWorkload
                    request = WorkloadControlRequest(action, str(exception))
                if request:
                    self._client.send_workload_control_request(request)
            except Exception:  # of a user's own code, which must not hide the error
                self.logger.exception("exc_handling_policy failed")
        self._be_in(AFTER_TRAINING)  # the script may handle it, and go on

    def _beat(self, step: int) -> None:
        FaultToleranceCallback.steps = self.steps_before + step
        self._client.send_heartbeat(self.steps)

    def _be_in(self, phase: str | None, inner: str | None = None) -> None:
        """Be in this section or one within it, and in no other; if already there, again."""
        self._phase, self._inner = phase, inner
        client, section = self._client, inner or phase
        if not client.is_initialized:
            return
        if self._fit.unseen is not None:
            client.report_saved(*self._fit.unseen)
            self._fit.unseen = None
        if section in client.open_sections:
            client.end_section(section)
        if section is not None:
            client.start_section(section)
        for other in client.open_sections - {section}:
            client.end_section(other)

    def _state_file(self, trainer: pl.Trainer) -> Path:
        path = Path(self.exp_dir or trainer.log_dir or trainer.default_root_dir)
        if self.exp_dir is None:
            path = path.parent if re.fullmatch(r"version_\d+", path.name) else path
            path /= "ft_state"
        return path / "ft_state.json"

    def _check_set_up(self, trainer: pl.Trainer) -> None:
        config, flag = self._client.cfg, os.environ.get(FLAG_VARIABLE)
        assert config is not None
        ranks = int(os.environ.get("WORLD_SIZE", trainer.world_size))
        if ranks != trainer.world_size:  # each would train alone, and overwrite others' files
            raise RankMonitorClientError(
                f"the launcher started {ranks} ranks, but this Trainer has {trainer.world_size}: "
                "give it the environment's LOCAL_WORLD_SIZE devices and GROUP_WORLD_SIZE num_nodes"
            )
        if self.autoresume and not (flag and Path(flag).absolute().parent.is_dir()):
            raise RankMonitorClientError(
                f"autoresume=True: got {FLAG_VARIABLE}={flag}, expected a path in a directory that "
                "exists: export it, or start the job by ./autoresume.sh"
            )
        if not (config.is_watching() or self.calculate_timeouts):
            raise RankMonitorClientError(
                "no timeout is set, so no hang would be noticed: give calculate_timeouts=True, or "
                "ft_launcher --ft-rank-heartbeat-timeout=SECONDS"
            )
        unknown = config.rank_section_timeouts.keys() - SECTIONS
        if unknown and trainer.is_global_zero:
            text = "rank_section_timeouts: there is no section %s, but %s"
            self.logger.warning(text, ", ".join(sorted(unknown)), ", ".join(sorted(SECTIONS)))

    def _put_checkpoint_io(self, trainer: pl.Trainer) -> None:
        """Ours in the place of Lightning's; whoever has chosen another keeps it."""
        strategy = trainer.strategy  # which may write itself, then on all ranks
        is_plain = is_lightnings(type(strategy).save_checkpoint, "Strategy.save_checkpoint")
        self._fit.writes = trainer.is_global_zero or not is_plain
        io: Any = strategy.checkpoint_io
        is_async = is_lightnings(type(io), "AsyncCheckpointIO")
        inner = type(io.checkpoint_io if is_async else io)
        if is_lightnings(inner, "TorchCheckpointIO") or (is_async and inner is AtomicCheckpointIO):
            io = strategy.checkpoint_io = AtomicCheckpointIO(is_async)
        if type(io) is AtomicCheckpointIO:
            io.section, io.saved = self._checkpointing, self._report_saved
        is_ours = is_plain and type(io) is AtomicCheckpointIO
        self._fit.is_unseen = not (is_ours or is_async)
        if self.rolling is not None and not is_ours:
            self.rolling = None
            if trainer.is_global_zero:
                kind = type(io if is_plain else strategy).__name__
                self.logger.warning("--ft-auto keeps no checkpoints: %s has its own way", kind)

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        self._be_in(self._phase, CHECKPOINTING)
        yield
        self._be_in(self._phase, None if self._phase else AWAITING)

    def _report_saved(self, checkpoint: Mapping[str, Any], path: Any) -> None:
        where = str(path) if "://" in str(path) else os.path.abspath(path)
        try:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            step = progress["total"]["processed"]
            if self.rolling not in (None, path):
                return  # restarts do not resume there
            if step > 0 and "optimizer_states" in checkpoint:
                self._client.report_saved(self.steps_before + step, where)
                self._try_to_load(where)
        except (KeyError, RankMonitorClientError):
            pass  # not of a Trainer, or not connected any more

    def _try_to_load(self, path: str) -> None:
        """Once, and as a restart will, but without reading tensors."""
        if not self._fit.may_try or not os.path.isfile(path):
            return
        self._fit.may_try = False
        weights_only = False if self.rolling else self._fit.given.get("weights_only")
        try:
            torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        except Exception as error:  # whatever a restart would end with
            text = describe_error(error)
            if isinstance(error, pickle.UnpicklingError):
                text = f"give trainer.fit(..., weights_only=False): {text}"
            self.logger.warning("*** NO RESTART CAN LOAD %s ***\n*** %s", path, text)

    def _check_start(self, trainer: pl.Trainer) -> None:
        """Nothing costs more than training again from the start, or apart."""
        step = batches_done(trainer)
        first = trainer.strategy.broadcast(step)
        if step != first:
            raise RuntimeError(
                f"rank {trainer.global_rank} starts at step {step}, rank 0 at {first}: give "
                "ModelCheckpoint(dirpath=...), or --ft-auto-dir, a directory that all nodes share"
            )
        if self.has_trained or not trainer.is_global_zero:
            return
        try:
            noted = json.loads(Path(progress_file()).read_text(encoding="utf-8"))
            saved, checkpoint = int(noted["step"]), str(noted["checkpoint"])
        except (OSError, *BROKEN):
            return
        given, keeper = self._fit.given.get("ckpt_path"), last_keeper(trainer)
        last = last_path(trainer, keeper) if keeper else ""
        is_last = given == "last" or os.path.realpath(str(given)) == os.path.realpath(last)
        if step >= saved or (step > 0 and (is_last or not is_beside(checkpoint, trainer))):
            return
        if last and given == "last" and not self.rolling and (newest := restore_last(last)):
            raise RuntimeError(f"{last} was missing: linked {newest}, for a restart to resume")
        self.logger.warning(
            "*** TRAINING STARTS AT STEP %d ALTHOUGH STEP %d WAS SAVED ***\n*** in %s\n*** %s",
            step, saved, checkpoint, why_not_resumed(trainer, checkpoint, self._fit.given),
        )  # fmt: skip

    def _stop_if_asked(
        self,
        trainer: pl.Trainer,
        is_apt: bool = True,
        is_same: bool = True,
        is_swapped: bool = False,
    ) -> None:
        """All ranks ask each other, and save or stop together: at an apt batch, not amid
        accumulated gradients, unless the grace is running out; never with averaged weights in the
        place of those trained, as in validations."""
        fit, strategy, now = self._fit, trainer.strategy, time.monotonic()
        by = self._asked_by(trainer)
        grace = float(os.environ.get("FT_SHUTDOWN_TIMEOUT") or GRACE_SECONDS)
        is_late = by in ("SIGTERM", "SIGINT") and now - fit.unasked_at > grace / 2
        rate = fit.stride / (now - fit.unasked_at + 1e-3)
        stride = min(int(rate * STOP_CHECK_SECONDS), STOP_CHECK_BATCHES, 2 * fit.stride)
        is_due = self.rolling is not None and now > fit.saved_at + 60 * save_minutes()
        is_due = is_due and trainer.is_global_zero
        answer = [by is not None, is_due, is_late, is_swapped, not is_same, stride]
        answers = strategy.reduce(
            torch.tensor(answer, device=strategy.root_device), reduce_op="sum"
        )
        stopping, due, late, swapped, unlike, strides = answers.tolist()
        fit.is_asked = stopping + due > 0
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        is_amid = batches % trainer.accumulate_grad_batches > 0 and not trainer.is_last_batch
        if not swapped and (late or (fit.is_asked and is_apt and not is_amid)):
            if stopping:
                self._stop(trainer, by or "another rank", is_amid)
            self._save(trainer)
            now, fit.is_asked = time.monotonic(), False
        fit.unasked_at = fit.unasked_at if stopping else now
        fit.stride = 1 if fit.is_asked else 1 + strides // trainer.world_size
        fit.next_check = math.inf if unlike else fit.ticks + fit.stride

    def _asked_by(self, trainer: pl.Trainer) -> str | None:
        """A signal or file; None if somebody else is stopping training."""
        by, flag = self._client.stop_requested(), os.environ.get(FLAG_VARIABLE)
        if flag and trainer.is_global_zero:
            file = f"{flag}.stop"
            if within(LOOK_SECONDS, lambda: os.path.exists(file)) is True:
                by = by or file
        is_ending = trainer.should_stop and getattr(trainer.fit_loop, "_can_stop_early", True)
        return None if is_ending else by

    def _save(self, trainer: pl.Trainer, is_needed: bool = False) -> str:
        """For a next run to resume there; what it is, in words."""
        keeper = last_keeper(trainer) or next(iter(model_checkpoints(trainer)), None)
        if self.rolling is not None:
            io: Any = trainer.strategy.checkpoint_io
            io.dispensable = "" if is_needed else str(self.rolling)
            path, who = str(self.rolling), "the next run"
        elif keeper is not None:  # which in a next run, too, writes there and not beside it
            path = keeper.last_model_path = last_path(trainer, keeper)
            who = 'ckpt_path="last"'
        else:
            return "nothing saved: there is no ModelCheckpoint"
        inner, self._fit.is_saving = self._inner, True
        trainer.save_checkpoint(path, weights_only=False)
        self._fit.is_saving, self._fit.saved_at = False, time.monotonic()
        self._be_in(self._phase, inner)  # hooks of others follow
        return f"saved {path}, where {who} resumes"

    def _stop(self, trainer: pl.Trainer, by: str, is_amid: bool) -> None:
        what = self._save(trainer, is_needed=True)
        self._be_in(FINISHING)
        trainer.strategy.checkpoint_io.teardown()  # waits for what a thread still writes
        if trainer.is_global_zero:
            what += ", less the gradients accumulated" * is_amid
            self.logger.warning(
                "stopped at step %d, as %s asked; %s", batches_done(trainer), by, what
            )
            if flag := os.environ.get(FLAG_VARIABLE):
                Path(f"{flag}.stop").unlink(missing_ok=True)
        raise SystemExit(0)

    def _why_complete(self, trainer: Any) -> str | None:
        """Why there is nothing left to train; None if a next run has to resume."""
        if self._fit.complete or trainer.fast_dev_run:
            return self._fit.complete
        if 0 < trainer.max_steps <= trainer.global_step:
            return f"max_steps={trainer.max_steps} reached"
        # Lightning counts an epoch that was stopped in the middle as one that is over.
        is_cut = trainer.should_stop and not trainer.is_last_batch
        if 0 < (trainer.max_epochs or 0) <= trainer.current_epoch and not is_cut:
            return f"max_epochs={trainer.max_epochs} reached"
        for stopping in trainer.early_stopping_callbacks if trainer.should_stop else []:
            if stopping.stopping_reason_message is not None:
                return f"stopped early: {stopping.stopping_reason_message}"
        # A Timer that earlier runs have used up stops this one at once.
        timers = [x for x in trainer.callbacks if hasattr(x, "time_remaining")]
        is_spent = any((timer.time_remaining() or 1) <= 0 for timer in timers)
        return "max_time used up" if is_spent and self._fit.batches <= 1 else None


class Fit:
    """What is known of a fit, and when its ranks ask each other whether to stop."""

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self.given = given or {}  # to trainer.fit, by name
        self.handlers = {number: signal.getsignal(number) for number in SAVE_SIGNALS}
        self.writes = False  # checkpoints, on this rank
        self.may_try = False  # to load the first checkpoint
        self.is_unseen = False  # others write checkpoints, and the next hook tells that it is done
        self.unseen: tuple[int, str] | None = None  # step and place of such a one
        self.batches = 0  # trained in this run
        self.ticks = 0  # batches trained or validated
        self.next_check: float = 0  # tick
        self.stride = 1  # ticks up to then
        self.unasked_at = 0.0  # monotonic, when ranks last agreed that none wanted to stop
        self.is_training = False  # from on_train_start to on_train_end
        self.weights: Any = None  # weights_of() the last batch before a validation
        self.is_asked = False  # to save, or to stop, at the next apt batch
        self.is_saving = False  # a checkpoint of ours
        self.saved_at = -math.inf  # monotonic: the first save comes soon, and shows if it can
        self.complete: str | None = None  # why nothing is left to train, as a checkpoint says

    def __reduce__(self) -> Any:
        return Fit, ()  # handlers may be anything

    def ask_soon(self) -> None:
        """What follows may be slower than what came before."""
        self.stride, self.next_check = 1, self.ticks + 1
        self.unasked_at = self.unasked_at if self.is_asked else time.monotonic()

    def is_due(self) -> bool:
        self.ticks += 1
        return self.is_training and self.ticks >= self.next_check

    def give_signals_back(self, client: RankMonitorClient) -> None:
        """To the script, with any that came too late for its fit."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                if handler is not None:
                    signal.signal(number, handler)
            if client.stop_signal is not None:
                signal.raise_signal(signal.Signals[client.stop_signal])


@torch.no_grad()
def weights_of(module: pl.LightningModule) -> list[float]:
    """Their sums, which tell whether others are in their place: a change of x.data leaves no trace
    in torch."""
    known = [x for x in module.parameters() if not torch.nn.parameter.is_lazy(x)]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in known]  # of a sharded one
    return [float(x.sum(dtype=torch.float64)) for x in local]


def batches_done(trainer: pl.Trainer) -> int:
    """Of this fit, in this run and before. Optimizer steps would not tell of all loops."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def is_lightnings(thing: Any, *names: str) -> bool:
    """Whether a class or function is Lightning's own of one of these names."""
    package = thing.__module__.partition(".")[0]
    ours = ("lightning", "pytorch_lightning", "lightning_fabric")
    return thing.__qualname__ in names and package in ours


def destroy_gloo() -> None:
    """At exit; else its threads abort some processes, whose work is done (PyTorch PR 179291)."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
