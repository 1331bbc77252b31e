"""A callback that makes a Lightning training fault tolerant under ft_launcher.py: heartbeats, and a finished flag.

    trainer = Trainer(callbacks=[FaultToleranceCallback(autoresume=True), ...], ...)
    trainer.fit(model, ckpt_path="last")

Works with `lightning` and with `pytorch_lightning`, on any device, with one rank or many. Active in `fit` alone.

Hook                                                what it does
    setup                                           connects to this rank's monitor (ft_monitor.py)
    on_train_start, on_train_batch_end,             heartbeat with the global step
    on_train_end, on_validation_start,
    on_validation_batch_end, on_validation_end
    Trainer.save_checkpoint (wrapped)               writes FLAG.progress when the checkpoint is on disk
    teardown                                        creates the finished flag, disconnects
    on_exception                                    disconnects, with the exception's type and message

Files (FLAG is the value of FAULT_TOL_FINISHED_FLAG_FILE; written by global rank 0, beside and renamed)
    FLAG           training is complete: {"reason", "step", "epoch", "time"}
    FLAG.progress  the newest checkpoint: {"step", "epoch", "checkpoint", "time"}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_monitor import RankMonitorClient, write_json


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
        simulated_fault_params: a `SimulatedFaultParams`, or a mapping with its fields.
        logger_name: of the logger to use; by default one whose lines appear as Lightning's own do.

    `setup` raises RuntimeError when the process was not started by ft_launcher.py, and when `autoresume` is set but
    FAULT_TOL_FINISHED_FLAG_FILE is not. A flag that cannot be written fails the run with an OSError.
    """

    def __init__(
        self,
        autoresume: bool,
        calculate_timeouts: bool = False,
        simulated_fault_params: SimulatedFaultParams | Mapping[str, Any] | None = None,
        exp_dir: str | os.PathLike[str] | None = None,
        logger_name: str | None = None,
    ) -> None:
        self.autoresume = autoresume
        self.calculate_timeouts = calculate_timeouts
        self.simulated_fault_params = SimulatedFaultParams.parse(simulated_fault_params)
        self.exp_dir = exp_dir
        self.logger = logging.getLogger(logger_name or f"{pl.__name__}.FaultToleranceCallback")
        self._client = RankMonitorClient()
        self._fault: threading.Timer | None = None
        self._batches = 0  # training batches of this fit
        self._first_epoch = 0  # at which this fit's training started
        self._fit_ended = False  # and not by an exception

    # -- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._check_environment()
        self._batches, self._first_epoch, self._fit_ended = 0, 0, False
        self._client.init_workload_monitoring()
        if "save_checkpoint" not in vars(trainer):
            trainer.save_checkpoint = functools.partial(self._save_checkpoint, trainer)  # type: ignore[method-assign]
        if self.simulated_fault_params is not None:
            self._fault = schedule_fault(self.simulated_fault_params, trainer, self.logger)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_epoch = trainer.current_epoch
        self._heartbeat(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._batches += 1
        self._heartbeat(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heartbeat(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heartbeat(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._heartbeat(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._heartbeat(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_ended = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called at the end of fit, when the last checkpoint is on disk: asynchronous writers were waited for."""
        if stage != "fit" or not self._client.is_initialized:
            return
        vars(trainer).pop("save_checkpoint", None)
        reason = self._why_complete(trainer)
        if self.autoresume and reason is not None and trainer.is_global_zero:
            self._create_finished_flag(trainer, reason)
        self._disconnect()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls this instead of teardown, and also for what happens before setup and outside of fit.
        self._disconnect(f"{type(exception).__name__}: {exception}".removesuffix(": "))

    # -- what they do

    def _check_environment(self) -> None:
        if self.autoresume and not os.environ.get(FLAG_VARIABLE):
            raise RuntimeError(
                f"FaultToleranceCallback(autoresume=True) needs {FLAG_VARIABLE}, which is not set. Start the job with "
                f"./autoresume.sh, or: export {FLAG_VARIABLE}=/path/of/a/file"
            )

    def _heartbeat(self, trainer: pl.Trainer) -> None:
        if self._client.is_initialized:
            self._client.send_heartbeat(trainer.global_step)

    def _disconnect(self, error: str | None = None) -> None:
        if self._fault is not None:
            self._fault.cancel()
        self._client.shutdown_workload_monitoring(error)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """In the place of Trainer.save_checkpoint: Lightning has no hook for a checkpoint that is on disk."""
        type(trainer).save_checkpoint(trainer, filepath, *args, **kwargs)
        flag = os.environ.get(FLAG_VARIABLE)
        if self.autoresume and flag and trainer.is_global_zero:
            write_json(Path(f"{flag}.progress"), {**where(trainer), "checkpoint": str(filepath)})

    def _why_complete(self, trainer: pl.Trainer) -> str | None:
        """Why there is nothing left to train; None if a next run has to go on."""
        if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
            return f"max_steps={trainer.max_steps} reached"
        if trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
            return f"max_epochs={trainer.max_epochs} reached"
        if not self._fit_ended:  # left by Lightning's _TunerExitException
            return None
        for early in trainer.early_stopping_callbacks if trainer.should_stop else []:
            # stopped_epoch is part of its checkpoint: one from an earlier run says nothing about this one.
            if early.stopping_reason_message is not None or early.stopped_epoch > self._first_epoch:
                return f"stopped early: {early.stopping_reason_message or early.monitor}"
        # A Timer whose time was used up by earlier runs stops this one at once; whoever else stops it wants it later.
        timers = [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.Timer)]  # type: ignore[attr-defined]
        out_of_time = any((timer.time_remaining() or math.inf) <= 0 for timer in timers)
        if self._batches <= 1 and (out_of_time or not trainer.should_stop):
            return "max_time used up" if out_of_time else "nothing left to train"
        return None

    def _create_finished_flag(self, trainer: pl.Trainer, reason: str) -> None:
        flag = Path(os.environ[FLAG_VARIABLE])
        write_json(flag, {"reason": reason, **where(trainer)}, durable=True)
        self.logger.info("training is complete: %s; created %s", reason, flag)


def where(trainer: pl.Trainer) -> dict[str, Any]:
    """The place in training that the files of this callback name."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"step": trainer.global_step, "epoch": trainer.current_epoch, "time": stamp}


def schedule_fault(params: SimulatedFaultParams, trainer: pl.Trainer, logger: logging.Logger) -> threading.Timer | None:
    """Start the clock of a simulated fault, if it is this rank's."""
    # All ranks draw the same numbers, another set in each attempt; this takes no communication.
    rng = random.Random(f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.environ.get('FT_ATTEMPT')}")
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
