"""The callback in real trainings: most in this process, with a pipe that the test reads in the
place of a monitor; what becomes of a script, of a hang and of two ranks under real monitors."""

from __future__ import annotations

import copy
import datetime
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from conftest import LOADER, ROOT, Heard, Started, is_running, processes_with
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpointOfPytorchLightning
from pytorch_lightning.demos.boring_classes import BoringModel as BoringModelOfPytorchLightning
from torch.utils.data import DataLoader

import ft_callback
import ft_monitor
from ft_callback import FaultToleranceCallback, SimulatedFaultParams
from ft_monitor import (
    FLAG_VARIABLE,
    Clocks,
    FaultToleranceConfig,
    Report,
    WorkloadAction,
    WorkloadControlRequest,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's hints for small trainings
    pytest.mark.usefixtures("rank_environment"),
]


# ---------------------------------------------------------------------------- in this process


class Model(BoringModel):
    """Logs `score`, which each test may set; `act` is called with each batch's index."""

    def __init__(self, act: Callable[[int], Any] = lambda batch_idx: None) -> None:
        super().__init__()
        self.act = act
        self.lr = 0.1
        self.score: Callable[[int], float] = lambda epoch: 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.act(batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("score", self.score(self.current_epoch))


class Manual(Model):
    """Steps an optimizer of its own, of which Lightning knows nothing (case 01)."""

    def __init__(self, act: Callable[[int], Any] = lambda batch_idx: None) -> None:
        super().__init__(act)
        self.automatic_optimization = False
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def configure_optimizers(self) -> Any:
        return self.optimizer


def make_trainer(directory: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_train_batches": 3, "limit_val_batches": 0,
        "default_root_dir": directory,
        "enable_checkpointing": any(isinstance(x, ModelCheckpoint) for x in callbacks),
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def keep(directory: Path, **options: Any) -> ModelCheckpoint:
    defaults = {"save_last": True, "save_on_train_epoch_end": True}
    return ModelCheckpoint(directory / "checkpoints", **{**defaults, **options})


def fit(
    directory: Path,
    *callbacks: Any,
    model: Any = None,
    last: bool = False,
    keeper: Any = None,
    **options: Any,
) -> Trainer:
    """Train with the callback and one that keeps last.ckpt; resume from there if `last`. As in a
    process of its own."""
    FaultToleranceCallback.steps = 0
    ours = FaultToleranceCallback(autoresume=True)
    trainer = make_trainer(directory, ours, keeper or keep(directory), *callbacks, **options)
    trainer.fit(model or Model(), ckpt_path="last" if last else None)
    return trainer


def of_type(messages: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [message for message in messages if message["type"] == kind]


def reason(messages: list[dict[str, Any]]) -> str | None:
    """Why training is complete, as rank 0 has told its monitor; None if it has not."""
    completes = of_type(messages, "complete")
    return completes[-1]["values"]["reason"] if completes else None


class Stop(Callback):
    """What a user's own callback does that stops training at a batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


# ------------------------------------------------------------------- heartbeats and sections


class Places(Model):
    """Notes in which section the rank is while the user's own code runs: that of a hang there."""

    def __init__(self, client: Any) -> None:
        super().__init__(lambda batch_idx: self.note(f"batch {batch_idx}"))
        self.client = [client]  # in a list: no attribute of a module
        self.seen: list[tuple[str, ...]] = []

    def note(self, place: str) -> None:
        epoch = self.trainer.current_epoch
        self.seen.append((f"{place} of epoch {epoch}", *sorted(self.client[0].open_sections)))

    def train_dataloader(self) -> Any:
        self.note("train_dataloader")
        return super().train_dataloader()

    def validation_step(self, *args: Any) -> Any:
        if not self.trainer.sanity_checking:
            self.note("validation")
        return super().validation_step(*args)

    def on_validation_end(self) -> None:
        self.note("validation end")

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.note("save")

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.note("epoch end")

    def on_train_epoch_start(self) -> None:
        self.note("epoch start")

    def on_train_end(self) -> None:
        self.note("train end")

    def test_step(self, *args: Any) -> Any:
        self.note("test")
        return super().test_step(*args)


def test_each_place_in_which_a_users_code_may_be_slow_or_hang_has_its_section(
    flag: Path, tmp_path: Path
) -> None:
    for section in ("setup", "resume"):
        ours = FaultToleranceCallback(autoresume=True)
        model = Places(ours._client)
        trainer = make_trainer(
            tmp_path, ours, keep(tmp_path), max_epochs=2, limit_val_batches=2,
            limit_test_batches=2, num_sanity_val_steps=1, reload_dataloaders_every_n_epochs=1,
        )  # fmt: skip
        trainer.fit(model)
        trainer.test(model, verbose=False)
        first, second = [
            [(f"{place} of epoch {epoch}", *section) for place, *section in places]
            for epoch, places in enumerate(
                [
                    [
                        ("validation end", "validation"),
                        ("train_dataloader", section),
                        ("epoch start", "first_batch"),
                        ("batch 0", "first_batch"),
                        ("batch 1",),
                        ("batch 2",),
                        *[("validation", "validation")] * 2,
                        ("validation end", "validation_end"),
                        ("epoch end", "epoch_turn"),
                        *[("save", "checkpointing")] * 2,
                    ],
                    [
                        ("train_dataloader", "epoch_turn"),
                        ("epoch start", "epoch_turn"),
                        ("batch 0", "epoch_turn"),
                        ("batch 1",),
                        ("batch 2",),
                        *[("validation", "validation")] * 2,
                        ("validation end", "validation_end"),
                        ("epoch end", "epoch_turn"),
                        *[("save", "checkpointing")] * 2,
                    ],
                ]
            )
        ]
        end = [("train end of epoch 2", "finishing"), *[("test of epoch 2", "after_training")] * 2]
        assert model.seen == first + second + end
        Path(f"{flag}.progress").touch()  # what a run before this one has left


def test_a_rank_is_never_idle_between_sections_and_steps_count_batches(
    monitor: Heard, tmp_path: Path
) -> None:
    ours = FaultToleranceCallback(autoresume=False)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 2}
    options |= {"limit_val_batches": 3, "num_sanity_val_steps": 2, "limit_test_batches": 4}
    trainer = make_trainer(tmp_path, ours, **options)
    trainer.fit(Model())
    trainer.test(Model(), verbose=False)
    messages = monitor()
    assert messages[0]["type"] == "init"
    steps = [message["step"] for message in of_type(messages, "heartbeat")]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    opened: set[str] = set()
    idle_after = []
    for before, message in itertools.pairwise(messages):
        if message["type"] == "section":
            assert (message["name"] in opened) != message["open"]
            (opened.add if message["open"] else opened.remove)(message["name"])
            if not opened:
                idle_after.append(before["type"])
    # Idle, with the clock of heartbeats, only after the first batches of epochs: all others find
    # themselves in none already. In between, a section may be left only to be entered again.
    assert idle_after.count("heartbeat") == 2
    entered = [m["name"] for m in of_type(messages, "section") if m["open"]]
    # start and each batch; of a sanity check, the end, too
    assert entered.count("validation") == (1 + 2 + 1) + 2 * (1 + 2)
    assert entered.count("validation_end") == 2 * (1 + 1)  # from the last batch on
    # after the fit, each test batch, and after the test
    assert entered[-7:] == ["finishing", *["after_training"] * (1 + 4 + 1)]


def test_a_resumed_run_counts_on_from_where_it_was(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    every = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    fit(tmp_path, Stop(5), max_epochs=3, keeper=keep(tmp_path, **every))
    saved = of_type(monitor(), "saved")
    assert {m["step"] for m in saved} == {1, 2, 3, 4, 5}
    assert saved[-1]["checkpoint"] == str(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, max_epochs=3, last=True, keeper=keep(tmp_path, **every))
    steps = [message["step"] for message in of_type(monitor(), "heartbeat")]
    assert steps == [5, 6, 7, 8, 9]


def test_without_optimizer_steps_of_lightnings_batches_are_progress_and_one_line_warns(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ft_callback, "STOP_CHECK_BATCHES", 5)
    request = Path(f"{flag}.stop")
    model = Manual(lambda batch_idx: request.touch() if batch_idx == 24 else None)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, model=model, max_epochs=1, limit_train_batches=60)
    assert stopped.value.code == 0 and not request.exists()
    assert caplog.text.count("no ModelCheckpoint saves") == 1
    messages = monitor()
    at = of_type(messages, "heartbeat")[-1]["step"]
    assert at >= 25 and [m["step"] for m in of_type(messages, "saved")] == [at]
    seen: list[int] = []
    caplog.clear()
    trainer = fit(
        tmp_path, model=Manual(seen.append), last=True, max_epochs=1, limit_train_batches=at + 5
    )
    assert trainer.global_step == 0 and seen == list(range(at, at + 5))
    assert reason(monitor()) == "max_epochs=1 reached"
    fit(tmp_path / "automatic", max_epochs=1, limit_train_batches=30, accumulate_grad_batches=30)
    assert "no ModelCheckpoint saves" not in caplog.text


def test_saves_after_an_exception_count_and_are_removed_when_lightning_says_so(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """Also when that comes after our teardown, as for OnExceptionCheckpoint's file."""

    def fail(batch_idx: int) -> None:
        if batch_idx == 1:
            raise ValueError("bad batch")

    for keeper in (
        keep(tmp_path / "a", save_on_exception=True),
        OnExceptionCheckpoint(tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match="bad batch"):
            fit(tmp_path, model=Model(fail), keeper=keeper, max_epochs=1, enable_checkpointing=True)
        messages = monitor()
        assert {m["step"] for m in of_type(messages, "saved")} == {1}
        assert of_type(messages, "error")[0]["error"].startswith("ValueError: bad batch (")
        sections = [m["name"] for m in of_type(messages, "section") if m["open"]]
        assert sections[-2:] == ["checkpointing", "after_training"]
    (saved,) = (tmp_path / "b").iterdir()
    steps = fit(tmp_path, keeper=keeper, max_epochs=1, last=True, enable_checkpointing=True)
    assert steps.global_step == 3 and not saved.exists()


def test_validation_and_test_on_their_own_need_no_monitor_and_no_flag_and_send_nothing(
    monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = FaultToleranceCallback(autoresume=True)
    trainer = make_trainer(tmp_path, ours, limit_val_batches=1, limit_test_batches=1)
    trainer.validate(Model(), verbose=False)
    trainer.test(Model(), verbose=False)
    assert monitor() == []
    monkeypatch.delenv("FT_MONITOR_FD")
    trainer.validate(Model(), verbose=False)


# ---------------------------------------------------------------------- what complete means


def test_a_run_that_has_nothing_left_to_do_is_complete_too(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], str, int]] = [
        ({"max_epochs": 2}, "max_epochs=2 reached", 6),
        ({"max_steps": 4}, "max_steps=4 reached", 4),
    ]
    for limits, why, step in cases:
        fit(tmp_path / why, **limits)
        (message,) = of_type(monitor(), "complete")
        values = message["values"]
        assert message["flag"] == str(flag)
        assert (values["reason"], values["step"], values["epoch"]) == (why, step, 2)
        written = time.mktime(time.strptime(values["time"][:19], "%Y-%m-%dT%H:%M:%S"))
        assert abs(time.time() - written) < 60
        seen: list[int] = []
        fit(tmp_path / why, model=Model(seen.append), last=True, **limits)
        assert seen == [] and reason(monitor()) == why


def test_early_stopping_completes_a_training_also_in_its_first_epoch_and_again_in_a_next_run(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    for stop in ({"patience": 1}, {"stopping_threshold": 2.0}):  # in epoch 1, in epoch 0
        directory = tmp_path / next(iter(stop))
        for last in (False, True):
            stopped = fit(directory, EarlyStopping("score", **stop), last=last, max_epochs=9)
            assert stopped.current_epoch < 5
            assert (reason(monitor()) or "").startswith("stopped early: ")
    # Its stop is in the checkpoint. A run whose scores improve again goes on, until another stops.
    improving = Model()
    improving.score = lambda epoch: -epoch
    options: dict[str, Any] = {"model": improving, "last": True, "max_epochs": 9}
    fit(tmp_path / "patience", EarlyStopping("score", patience=1), Stop(5), **options)
    assert reason(monitor()) is None


def test_max_time_completes_a_training_when_it_is_used_up_but_not_the_run_that_it_stops(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_time": datetime.timedelta(seconds=0.3), "max_epochs": -1}
    every = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
    slow = Model(lambda batch: time.sleep(0.03))
    assert fit(tmp_path, keeper=every, model=slow, **options).global_step > 1
    assert reason(monitor()) is None
    seen: list[int] = []
    fit(tmp_path, model=Model(seen.append), last=True, **options)
    assert seen == [] and reason(monitor()) == "max_time used up"


@pytest.mark.parametrize("epochs", [1, 9])
@pytest.mark.parametrize("batches", [1, 2])
def test_whoever_else_stops_a_training_wants_it_to_go_on_later(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    batches: int,
    epochs: int,
) -> None:
    """Also in the last epoch, which Lightning then counts as one that is over."""
    day = datetime.timedelta(days=1)
    stops = Stop(batches), EarlyStopping("score")
    assert fit(tmp_path, *stops, max_epochs=epochs, max_time=day).global_step == batches
    assert reason(monitor()) is None
    assert "it was stopped early, so training is not complete" in caplog.text


def test_a_stop_with_the_last_batch_of_the_last_epoch_completes_a_training(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    fit(tmp_path, Stop(6), max_epochs=2)
    assert reason(monitor()) == "max_epochs=2 reached"


class NoData(Model):
    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 0))


def test_what_has_trained_nothing_has_not_completed_a_training(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor has a trial; and data may be missing in a run that has resumed, too."""
    nothing = "no batch was trained, so training is not complete"
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (NoData(), {"max_epochs": 2}, 1),
        (Model(), {"max_epochs": 2, "limit_train_batches": 0}, 1),
        (Model(), {"max_epochs": 2, "fast_dev_run": True}, 0),
        (Model(), {"max_epochs": 2, "fast_dev_run": 2}, 0),
    ]
    for model, options, lines in cases:
        fit(tmp_path, model=model, **options)
        assert reason(monitor()) is None and caplog.text.count(nothing) == lines, options
        caplog.clear()
    fit(tmp_path, max_epochs=1)
    assert reason(monitor()) == "max_epochs=1 reached"
    fit(tmp_path, model=NoData(), last=True, max_epochs=2)
    assert reason(monitor()) is None and caplog.text.count(nothing) == 1

    class Bad(Callback):
        def on_sanity_check_end(self, *args: Any) -> None:
            raise ValueError("after the sanity check")

    with pytest.raises(ValueError, match="sanity"):
        fit(tmp_path, Bad(), max_epochs=1, limit_val_batches=1)
    assert reason(monitor()) is None


def test_a_search_for_the_learning_rate_is_not_a_training(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It trains, removes its checkpoint, and leaves fit in a way of its own."""
    model = Model()
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    Tuner(trainer).lr_find(model, num_training=5)
    messages = monitor()
    assert messages[0]["type"] == "init"
    assert not [m for m in messages if m["type"] in ("complete", "heartbeat", "saved", "error")]
    assert "not complete" not in caplog.text
    assert not list(tmp_path.glob(".lr_find*")) and not FaultToleranceCallback.has_trained
    trainer.fit(model)
    assert reason(monitor()) == "max_epochs=1 reached"
    fit(tmp_path, LearningRateFinder(num_training_steps=5), max_epochs=1)
    assert reason(monitor()) == "max_epochs=1 reached"
    assert not list(tmp_path.glob(".lr_find*"))


def test_folds_with_a_trainer_each_and_one_callback_for_two_trainings(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One connection each, steps of its own; and a fold that starts at 0 has lost nothing."""
    Path(f"{flag}.progress").write_text(
        json.dumps({"step": 9, "checkpoint": str(tmp_path / "of an attempt before this one")})
    )
    fit(tmp_path / "0", max_epochs=1)
    assert caplog.text.count("TRAINING STARTS AT STEP 0") == 1
    fit(tmp_path / "1", max_epochs=2)
    one = FaultToleranceCallback(autoresume=True)
    trainer = make_trainer(tmp_path, one, max_epochs=1)
    trainer.fit(Model())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Model())
    make_trainer(tmp_path, one, max_steps=1).fit(Model())
    messages = monitor()
    starts = [i for i, message in enumerate(messages) if message["type"] == "init"]
    fits = [messages[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
    steps = [of_type(each, "heartbeat")[-1]["step"] for each in fits]
    assert steps == [3, 6, 6 + 3, 9 + 6, 15 + 1], "they grow through all fits of a process"
    reasons = [reason(each) for each in fits]
    assert reasons == [f"max_epochs={n} reached" for n in (1, 2, 1, 2)] + ["max_steps=1 reached"]
    assert caplog.text.count("TRAINING STARTS AT STEP 0") == 1


@pytest.mark.parametrize("before", ["is complete", "fails"])
def test_a_fit_after_another_has_lost_nothing_whatever_became_of_that(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
) -> None:
    if before == "is complete":
        fit(tmp_path / "0", max_epochs=1)
        monkeypatch.setattr(FaultToleranceCallback, "has_trained", False)  # in another process
        monkeypatch.setattr(FaultToleranceCallback, "steps", 0)
        fit(tmp_path / "0", max_epochs=1, last=True)
    else:
        with pytest.raises(IndexError):
            fit(tmp_path / "0", max_epochs=1, model=Model(lambda batch_idx: [][batch_idx]))
    noted = {"step": 3, "checkpoint": str(tmp_path / "0" / "checkpoints" / "last.ckpt")}
    Path(f"{flag}.progress").write_text(json.dumps(noted))
    fit(tmp_path / "1", max_epochs=1)
    assert "TRAINING STARTS AT STEP 0" not in caplog.text


def test_a_process_can_give_its_stacks_also_after_a_fit(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning resets the handlers of all signals as it ends."""
    given = []

    def give(*args: Any) -> None:
        caught = int(ft_monitor.process_status(os.getpid(), "SigCgt"), 16)
        assert caught >> (ft_monitor.STACKS_SIGNAL - 1) & 1, "it would end this process"
        signal.raise_signal(ft_monitor.STACKS_SIGNAL)
        given.append((tmp_path / "stacks").stat().st_size)
        assert given[-2:-1] < given[-1:]

    class End(Callback):
        def on_fit_end(self, *args: Any) -> None:
            give()

    with open(tmp_path / "stacks", "w") as file:
        monkeypatch.setenv("FT_STACKS_FD", str(file.fileno()))
        for _ in range(2):
            fit(tmp_path, End(), max_epochs=1)
            give()
        assert len(given) == 4


def test_a_fit_learns_nothing_from_the_state_of_one_before_it(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    one = FaultToleranceCallback(autoresume=True, calculate_timeouts=True)
    for name, seconds in (("a", 100.0), ("b", 7.0)):
        state = {"longest": {f"clock {name}": seconds}, "killed": {}, "run": ""}
        (tmp_path / name).mkdir()
        (tmp_path / name / "ft_state.json").write_text(json.dumps(state))
        one.exp_dir = tmp_path / name
        make_trainer(tmp_path, one, max_epochs=1).fit(Model())
    messages = monitor()
    inits = [(m["calculate"], m["state_file"]) for m in of_type(messages, "init")]
    assert inits == [(True, str(tmp_path / name / "ft_state.json")) for name in "ab"]
    learned = [message["longest"] for message in of_type(messages, "learned")]
    assert learned == [{"clock a": 100.0}, {"clock b": 7.0}]
    clocks = Clocks(FaultToleranceConfig(), 0.0)
    for message in messages:
        clocks.hear(message, time.monotonic())
    assert clocks.earlier == {"clock b": 7.0}  # to the monitor, too


# --------------------------------------------------------------------------------- stopping


STOPS = {
    "the file": lambda flag: Path(f"{flag}.stop").touch(),
    "SIGTERM": lambda flag: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda flag: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGINT": lambda flag: os.kill(os.getpid(), signal.SIGINT),
}


@pytest.fixture
def ask_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft_callback, "STOP_CHECK_SECONDS", 0.0)


@pytest.mark.usefixtures("ask_at_each_batch")
@pytest.mark.parametrize("how", STOPS)
def test_a_stop_ends_the_script_where_the_next_run_resumes(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Not in the middle of accumulated gradients: asked in the third batch, it stops at the 4th.

    And in a script that keeps another name than last.ckpt.
    """

    def keeper() -> ModelCheckpoint:
        named = keep(tmp_path)
        named.CHECKPOINT_NAME_LAST, named.FILE_EXTENSION = "newest", ".pt"
        return named

    seen: list[int] = []

    def act(batch_idx: int) -> None:
        seen.append(batch_idx)
        if len(seen) == 3:
            STOPS[how](flag)

    options: dict[str, Any] = {
        "max_epochs": 1, "limit_train_batches": 8, "accumulate_grad_batches": 4
    }  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, model=Model(act), keeper=keeper(), **options)
    assert stopped.value.code == 0 and seen == [0, 1, 2, 3], seen
    newest = tmp_path / "checkpoints" / "newest.pt"
    by = how if how.startswith("SIG") else f"{flag}.stop"
    assert (
        f'stopped at step 4, as {by} asked; saved {newest}, where ckpt_path="last"' in caplog.text
    )
    assert not Path(f"{flag}.stop").exists()
    messages = monitor()
    assert not of_type(messages, "complete") and not of_type(messages, "error")
    assert of_type(messages, "saved")[-1] | {"time": 0} == {
        "type": "saved", "time": 0, "step": 4, "checkpoint": str(newest)
    }  # fmt: skip
    assert torch.load(newest, weights_only=False)["global_step"] == 1
    fit(tmp_path, model=Model(seen.append), keeper=keeper(), last=True, **options)
    assert seen == list(range(8)) and reason(monitor()) == "max_epochs=1 reached"
    assert not list(newest.parent.glob("newest-v*"))  # written in its place, not beside it


def test_without_a_model_checkpoint_a_stop_says_that_nothing_is_saved(
    flag: Path, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(f"{flag}.stop").touch()
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    with pytest.raises(SystemExit):
        trainer.fit(Model())
    assert "asked; nothing saved: there is no ModelCheckpoint" in caplog.text
    assert not of_type(monitor(), "saved")


class Validated(Model):
    """Stops in the first epoch's validation; notes what was validated, and with which result."""

    def __init__(self, seen: list[Any], act: Callable[[int], Any]) -> None:
        super().__init__()
        self.seen, self.act_in_validation = seen, act

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.trainer.sanity_checking:
            self.seen.append(batch_idx)
            self.act_in_validation(batch_idx)
        return super().validation_step(batch, batch_idx)


@pytest.mark.usefixtures("ask_at_each_batch")
@pytest.mark.parametrize("every", [3, 6], ids=["amid an epoch", "at its end"])
def test_a_stop_in_validation_lets_all_of_it_be_done_again(
    flag: Path, monitor: Heard, tmp_path: Path, every: int
) -> None:
    seen: list[int] = []
    options: dict[str, Any] = {
        "max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 4, "val_check_interval": every
    }  # fmt: skip

    def stop(batch_idx: int) -> None:
        if batch_idx == 1:
            STOPS["SIGTERM"](flag)

    with pytest.raises(SystemExit):
        fit(tmp_path, model=Validated(seen, stop), **options)
    assert seen == [0, 1] and of_type(monitor(), "saved")[-1]["step"] == every
    seen.clear()
    fit(tmp_path, model=Validated(seen, lambda batch_idx: None), last=True, **options)
    messages = monitor()
    steps = [message["step"] for message in of_type(messages, "heartbeat")]
    assert steps == list(range(every, 7)) and reason(messages) == "max_epochs=1 reached"
    assert seen == [0, 1, 2, 3] * (6 // every)


class Averaged(Callback):
    """Validates with other weights than those that are trained, as averages are."""

    def swap(self, trainer: Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            module.layer.weight.data.mul_(-1)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.swap(trainer, pl_module)

    on_validation_end = on_validation_start


@pytest.mark.usefixtures("ask_at_each_batch")
@pytest.mark.parametrize("number", [0, 1, 3])
def test_averaged_weights_are_never_saved_in_the_place_of_those_trained(
    flag: Path, monitor: Heard, tmp_path: Path, number: int
) -> None:
    """A stop in a validation comes when that is over, then."""
    seen: list[int] = []
    options: dict[str, Any] = {
        "max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 4, "val_check_interval": 3
    }  # fmt: skip

    def stop(batch_idx: int) -> None:
        if batch_idx == number:
            STOPS["SIGTERM"](flag)

    model = Validated(seen, stop)
    callbacks = [Averaged()]
    keeper = keep(tmp_path)
    ours = FaultToleranceCallback(autoresume=True)
    trainer = make_trainer(tmp_path, *callbacks, ours, keeper, **options)
    with pytest.raises(SystemExit):
        trainer.fit(model)
    assert seen == [0, 1, 2, 3]
    (saved,) = {(m["step"], m["checkpoint"]) for m in of_type(monitor(), "saved")}
    state = torch.load(saved[1], weights_only=True)["state_dict"]
    assert saved[0] == 4 and torch.equal(state["layer.weight"], model.layer.weight)


@pytest.mark.usefixtures("ask_at_each_batch")
def test_a_validation_counted_across_epochs_is_not_skipped_after_a_stop_just_before(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    seen: list[int] = []
    trained: list[int] = []
    options: dict[str, Any] = {
        "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2,
        "val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 1,
    }  # fmt: skip

    class Stops(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            trained.append(batch_idx)
            if len(trained) == 4:
                STOPS["SIGTERM"](flag)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit):
        fit(tmp_path, model=Stops(seen, lambda batch_idx: None), **options)
    assert of_type(monitor(), "saved")[-1]["step"] == 4
    seen.clear()
    fit(tmp_path, model=Stops(seen, lambda batch_idx: None), last=True, **options)
    assert reason(monitor()) == "max_epochs=2 reached"
    assert seen == [0, 1] and trained == [0, 1, 2, 0, 1, 2]


@pytest.mark.usefixtures("ask_at_each_batch")
def test_a_stop_with_an_epochs_last_batch_comes_when_that_epoch_is_over(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """A run that resumed at that batch would skip the validation; so too with the last epoch."""
    seen: list[int] = []

    def act(batch_idx: int) -> None:
        if batch_idx == 2:
            STOPS["SIGTERM"](flag)

    options: dict[str, Any] = {"last": True, "max_epochs": 2, "limit_val_batches": 0}
    for epoch in (1, 2):
        with pytest.raises(SystemExit):
            fit(tmp_path, model=Model(act), **options)
        messages = monitor()
        assert of_type(messages, "saved")[-1]["step"] == 3 * epoch and reason(messages) is None
    fit(tmp_path, model=Model(seen.append), **options)
    assert seen == [] and reason(monitor()) == "max_epochs=2 reached"


@pytest.mark.usefixtures("ask_at_each_batch")
def test_amid_accumulated_gradients_a_stop_waits_only_while_there_is_time(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FT_SHUTDOWN_TIMEOUT", "0.2")
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 6}
    options["limit_train_batches"] = 6

    def act(batch_idx: int) -> None:
        if batch_idx == 1:
            time.sleep(0.2)
            STOPS["SIGTERM"](flag)

    with pytest.raises(SystemExit):
        fit(tmp_path, model=Model(act), **options)
    assert of_type(monitor(), "saved")[-1]["step"] == 2
    assert "stopped at step 2, as SIGTERM asked" in caplog.text
    assert "resumes, less the gradients accumulated" in caplog.text


@pytest.mark.usefixtures("ask_at_each_batch")
def test_a_script_that_handles_a_signal_itself_is_called_and_wins_if_it_stops_training(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    got: list[int] = []
    trainers: list[Any] = []

    def handle(number: int, frame: Any) -> None:
        got.append(number)
        for trainer in trainers:
            trainer.should_stop = True

    class Remember(Callback):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            trainers.append(trainer)

    def act(batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        fit(tmp_path, Remember(), model=Model(act), max_epochs=1, limit_train_batches=9)
        assert got == [signal.SIGTERM] and reason(monitor()) is None
        trainers.clear()
        with pytest.raises(SystemExit):
            fit(tmp_path / "2", model=Model(act), max_epochs=1, limit_train_batches=9)
        assert got == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_ends_training_at_once(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """But not one that comes within a second: the same Ctrl-C may arrive by two ways."""
    seen: list[int] = []

    def act(batch_idx: int) -> None:
        seen.append(batch_idx)
        for seconds in (0, 0, 1.1):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(-1)

    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, model=Model(act), max_epochs=1)
    assert stopped.value.code == 1 and seen == [0, -1, -1]
    assert of_type(monitor(), "error")[0]["error"].startswith("KeyboardInterrupt")


def test_a_signal_that_comes_too_late_for_a_fit_ends_what_follows_at_once(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    class Late(Callback):
        def on_fit_end(self, *args: Any) -> None:
            ours._client._note_signal(signal.SIGTERM, None)

    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        ours = FaultToleranceCallback(autoresume=True)
        trainer = make_trainer(tmp_path, ours, Late(), max_epochs=1, limit_test_batches=1)
        trainer.fit(Model())
        got.clear()
        trainer.test(Model(), verbose=False)
        assert got == [signal.SIGTERM] and reason(monitor()) == "max_epochs=1 reached"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_fork_of_the_rank_ends_by_a_signal(flag: Path, monitor: Heard, tmp_path: Path) -> None:
    def act(batch_idx: int) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"!")
            time.sleep(30)  # the test fails, then
            os._exit(1)
        os.read(reader, 1)  # Python forgets what arrives while it forks
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM

    fit(tmp_path, model=Model(act), max_epochs=1, limit_train_batches=1)
    assert reason(monitor()) == "max_epochs=1 reached"


def signalled_by_another(pid: int) -> None:
    """Send what ends other processes, and not from their parent."""
    command = f"import os; [os.kill({pid}, number) for number in {[15, 10, 2]}]"
    subprocess.run([sys.executable, "-S", "-c", command], check=True)


def test_a_forked_worker_outlives_signals_that_are_not_its_parents(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    def load() -> None:
        time.sleep(30)

    load.__name__ = "_worker_loop"

    def act(batch_idx: int) -> None:
        context = multiprocessing.get_context("fork")
        for target, exitcode in (
            (load, 0),
            (functools.partial(time.sleep, 30), 128 + signal.SIGTERM),
        ):
            worker = context.Process(target=target)
            worker.start()
            assert worker.pid
            time.sleep(0.3)  # until it is past its start
            if target is load:  # others get signals as without us
                signalled_by_another(worker.pid)
                worker.join(0.5)
                assert worker.is_alive()
            worker.terminate()
            worker.join(10)
            assert worker.exitcode == exitcode

    fit(tmp_path, model=Model(act), max_epochs=1, limit_train_batches=1)
    assert reason(monitor()) == "max_epochs=1 reached"


def test_looks_for_a_request_come_every_few_batches_or_seconds(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    original = FaultToleranceCallback._stop_if_asked

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        looks.append(self._fit.batches)
        original(self, *args, **kwargs)

    monkeypatch.setattr(FaultToleranceCallback, "_stop_if_asked", look)
    fit(tmp_path, max_epochs=1, limit_train_batches=250)
    assert (
        looks[0] == 1 and looks[1] <= 4 and max(b - a for a, b in itertools.pairwise(looks)) <= 101
    )
    assert len(looks) < 20
    looks.clear()
    monkeypatch.setattr(ft_callback, "STOP_CHECK_SECONDS", 0.2)
    slow = Model(lambda batch_idx: time.sleep(0.05))
    fit(tmp_path, model=slow, max_epochs=1, limit_train_batches=20)
    assert 4 <= len(looks) <= 12, looks


@pytest.mark.usefixtures("ask_at_each_batch")
@pytest.mark.parametrize("how", ["the file", "SIGTERM"])
def test_the_trainer_of_the_other_package_works_and_stops_too(
    flag: Path, monitor: Heard, tmp_path: Path, how: str
) -> None:
    """ft_callback has chosen lightning.pytorch: other classes of the same names (case 06)."""
    assert ft_callback.pl.__name__ == "lightning.pytorch"
    limit = datetime.timedelta(seconds=0.2)

    def run(act: Any = lambda batch_idx: None, **options: Any) -> Any:
        class Theirs(BoringModelOfPytorchLightning):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                act(batch_idx)
                return super().training_step(batch, batch_idx)

        ours: Any = FaultToleranceCallback(autoresume=True)
        keeper = ModelCheckpointOfPytorchLightning(
            tmp_path / "checkpoints", every_n_train_steps=1, save_last=True
        )
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=0,
            enable_model_summary=False, limit_train_batches=20, callbacks=[ours, keeper], **options,
        )  # fmt: skip
        trainer.fit(Theirs(), ckpt_path="last" if (tmp_path / "checkpoints").exists() else None)
        io: Any = trainer.strategy.checkpoint_io
        assert type(io) is ft_callback.AtomicCheckpointIO
        return trainer

    with pytest.raises(SystemExit) as stopped:
        run(lambda batch_idx: STOPS[how](flag) if batch_idx == 1 else None, max_epochs=1)
    assert stopped.value.code == 0
    messages = monitor()
    assert [m["step"] for m in of_type(messages, "heartbeat")] == [0, 1, 2]
    assert not Path(f"{flag}.stop").exists()
    run(max_epochs=1)
    assert reason(monitor()) == "max_epochs=1 reached"
    run(max_epochs=-1, max_time=limit)
    assert reason(monitor()) is None
    run(max_epochs=-1, max_time=limit)
    assert reason(monitor()) == "max_time used up"


# ----------------------------------------------------------------------- errors and set-up


@pytest.mark.parametrize(
    ("error", "shown", "said"),
    [
        (ValueError("this batch is bad"), ValueError, "ValueError: this batch is bad"),
        (KeyboardInterrupt(), SystemExit, "KeyboardInterrupt"),
        (SystemExit(3), SystemExit, "SystemExit: 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_monitor_hears_what_ended_the_training_and_what_the_policy_asks_for(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    shown: type[BaseException],
    said: str,
) -> None:
    def act(batch_idx: int) -> None:
        raise error

    request = WorkloadControlRequest(WorkloadAction.ShutdownWorkload, "no use")

    def broken(exception: BaseException) -> Any:
        raise OSError("of the policy")

    policies: list[Any] = [lambda exception: request, broken, lambda exception: "not a request"]
    for policy in policies:
        ours = FaultToleranceCallback(autoresume=True, exc_handling_policy=policy)
        with pytest.raises(shown) as raised:
            make_trainer(tmp_path, ours, max_epochs=1).fit(Model(act))
        assert raised.value.__context__ is (error if shown is not type(error) else None)
        messages = monitor()
        assert [m["error"][: len(said)] for m in of_type(messages, "error")] == [said]
        assert reason(messages) is None
        asked = [(m["action"], m["reason"]) for m in of_type(messages, "request")]
        assert asked == ([("ShutdownWorkload", "no use")] if policy is policies[0] else [])
    assert caplog.text.count("exc_handling_policy failed") == 2
    assert "OSError: of the policy" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (FLAG_VARIABLE, None, f"got {FLAG_VARIABLE}=None, expected a path.*: export it"),
        (FLAG_VARIABLE, "", f"got {FLAG_VARIABLE}=, expected a path.*: export it"),
        (FLAG_VARIABLE, "/not/there/flag", "=/not/there/flag, expected .*directory that exists"),
        ("WORLD_SIZE", "2", r"started 2 ranks, but this Trainer has 1: .*LOCAL_WORLD_SIZE"),
        ("FT_MONITOR_FD", None, r"not started by ft_launcher.*ft_launcher.py --nproc-per-node=N"),
        ("FT_MONITOR_FD", "9999", "no rank monitor at /proc/"),
        ("FT_CONFIG", "{}", r"no timeout is set.*--ft-rank-heartbeat-timeout=SECONDS"),
    ],
)
def test_a_set_up_that_cannot_work_is_one_error_that_says_what_to_do_and_the_monitor_hears_it(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str | None,
    expected: str,
) -> None:
    monkeypatch.setenv(variable, value or "")
    if value is None:
        monkeypatch.delenv(variable)
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    with pytest.raises(RuntimeError, match=expected) as raised:
        trainer.fit(Model())
    # Nor is it shown as one that came while another was handled.
    assert raised.value.__context__ is None or raised.value.__suppress_context__
    messages = monitor()
    told = [message["error"] for message in of_type(messages, "error")]
    asked = of_type(messages, "request")  # no other attempt would be better
    connected = variable != "FT_MONITOR_FD"
    assert len(told) == len(asked) == connected
    assert all(re.search(expected, error) for error in told)
    assert all(message["action"] == "ShutdownWorkload" for message in asked)


def test_without_a_launcher_it_is_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a debugger. Callbacks that follow are set up all the same."""
    monkeypatch.delenv(FLAG_VARIABLE, raising=False)
    keeper = keep(tmp_path)
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), keeper, max_epochs=1)
    trainer.fit(Model(), ckpt_path="last")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Model())
    assert trainer.global_step == 6 and (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert caplog.text.count("not started by ft_launcher: FaultToleranceCallback is off") == 1


def test_a_timeout_of_a_section_that_there_is_not_is_told(
    flag: Path,
    monitor: Heard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = FaultToleranceConfig(rank_section_timeouts={"step": 60, "setup": 60})
    monkeypatch.setenv("FT_CONFIG", config.to_json())
    make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1).fit(Model())
    (told,) = [line for line in caplog.messages if "rank_section_timeouts" in line]
    assert "there is no section step, but after_training, " in told and ", validation" in told


def test_rows_of_loggers_before_a_restart_are_kept_by_directories_of_their_own(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """And only so by CSVLogger: README tells."""

    class Logs(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", float(batch_idx))
            return super().training_step(batch, batch_idx)

    def rows(version: int | None) -> int:
        for _ in range(2):
            logger = CSVLogger(tmp_path, version=version)
            ours = FaultToleranceCallback(autoresume=True)
            options: Any = {"logger": logger, "log_every_n_steps": 1, "limit_train_batches": 2}
            make_trainer(tmp_path, ours, max_epochs=1, **options).fit(Logs())
        files = tmp_path.glob("lightning_logs/*/metrics.csv")
        return sum(len(file.read_text().splitlines()) - 1 for file in files)

    all_rows = rows(version=None)
    shutil.rmtree(tmp_path / "lightning_logs")
    assert all_rows == 2 * rows(version=7) > 0


def test_an_error_in_the_users_own_setup_is_the_one_shown(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    class Broken(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            raise ValueError("no such tokenizer")

    ours = FaultToleranceCallback(True)
    for callbacks in ([Broken(), ours], [ours, Broken()]):
        with pytest.raises(ValueError, match="no such tokenizer") as raised:
            make_trainer(tmp_path, *callbacks, max_epochs=1).fit(Model())
        assert raised.value.__context__ is None
    (error,) = of_type(monitor(), "error")  # of the second, whose monitor was connected already
    assert error["error"].startswith("ValueError: no such tokenizer")


class Copies(Callback):
    """Copies its Trainer in every way, at set-up and in training."""

    copies: list[Any] = []  # noqa: RUF012  of no instance, or they would be in the pickle

    def copy(self, trainer: Any) -> None:
        Copies.copies += [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]

    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.copy(trainer)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.copy(trainer)


def test_a_trainer_and_its_callback_can_be_copied_and_pickled_at_any_time(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """Copies are not connected. In training, a thread is writing a checkpoint."""
    every = keep(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False)
    callbacks = [FaultToleranceCallback(autoresume=True), every, Copies()]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=1, plugins=[AsyncCheckpointIO()])
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)  # cannot be pickled
    trainer.fit(BoringModel())
    signal.signal(signal.SIGUSR1, before)
    assert reason(monitor()) == "max_epochs=1 reached" and len(Copies.copies) == 4
    for other in Copies.copies:
        ours = next(x for x in other.callbacks if isinstance(x, FaultToleranceCallback))
        assert ours.autoresume and not ours._client.is_initialized
        ours.on_test_batch_end()
    assert monitor() == []
    Copies.copies.clear()


# ------------------------------------------------------------------------- simulated faults


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"fault_type": "rank_sleeps", "base_delay": 1}, "'rank_sleeps'.*expected one of"),
        ({"fault_type": None, "base_delay": 1}, "fault_type=None.*expected one of"),
        ({"fault_type": "random", "base_delay": -1}, "base_delay=-1.*numbers of at least 0"),
        ({"fault_type": "random", "base_delay": "1"}, "'str' and 'int'|'int' and 'str'"),
        ({"fault_type": "random", "base_delay": math.nan}, "base_delay=nan"),
        ({"fault_type": "random", "base_delay": math.inf}, "base_delay=inf"),
        ({"fault_type": "random", "base_delay": None}, "NoneType"),
        ({"fault_type": "random", "base_delay": 1, "rand_delay": -2}, "rand_delay=-2"),
        ({"fault_type": "random", "base_delay": 1, "rank_to_fail": -1}, "rank_to_fail=-1"),
        ({"fault_type": "random", "base_delay": 1, "rank": 1}, "unexpected.*'rank'"),
        ({"fault_type": "random"}, "missing.*'base_delay'"),
    ],
)
def test_every_wrong_fault_is_refused_with_its_value_and_what_was_expected(
    params: Any, expected: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        FaultToleranceCallback(autoresume=False, simulated_fault_params=params)


def test_a_random_fault_hits_one_rank_on_which_all_agree_and_another_in_other_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timers: list[Any] = []

    class Timer:
        """In the place of threading.Timer: never rings."""

        def __init__(self, delay: float, function: Callable[[], None]) -> None:
            self.delay, self.function = delay, function

        def start(self) -> None:
            timers.append(self)

    monkeypatch.setattr(ft_callback.threading, "Timer", Timer)
    params = SimulatedFaultParams("random", base_delay=10, rand_delay=5)
    hit, signals = set(), set()
    monkeypatch.setattr(ft_callback.os, "kill", lambda pid, number: signals.add(number))
    for attempt in range(20):
        monkeypatch.setenv("MASTER_PORT", str(20000 + attempt))
        for rank in range(4):
            monkeypatch.setenv("FT_ATTEMPT", str(rank // 2))  # nodes may count differently
            trainer: Any = types.SimpleNamespace(world_size=4, global_rank=rank)
            before = len(timers)
            params.schedule(trainer, logging.getLogger("quiet"))
            hit |= {rank} if len(timers) > before else set()
        assert len(timers) == attempt + 1
        assert 10 <= timers[-1].delay < 15
        timers[-1].function()
    assert len(hit) > 1 and signals == {signal.SIGKILL, signal.SIGSTOP}


# ------------------------------------------------------------------------ held to its word


def test_the_table_names_the_hooks_that_there_are() -> None:
    document = ft_callback.__doc__ or ""
    table = document.partition("\n    hook")[2].partition("\n\n")[0]
    named = set(re.findall(r"^    ([\w*]+)", table, re.MULTILINE))
    hooks = {
        re.sub(r"on_validation_.*", "on_validation_*", name)
        for name in vars(FaultToleranceCallback)
        if not name.startswith("_") and hasattr(Callback, name)
    }
    # The table leaves out where the Trainer goes on, and names test batches with teardown.
    went_on = {"on_train_batch_start", "on_train_epoch_start", "on_train_epoch_end"}
    signals = {"on_sanity_check_start", "on_test_start", "on_predict_start"}
    others = {"on_sanity_check_end", "on_test_batch_end", "on_predict_batch_end"}
    assert hooks - named == went_on | signals | others
    assert named <= hooks


# --------------------------------------------------------------------------- under monitors

HEAD = """
import os, signal, sys, time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader, TensorDataset

from ft_callback import FaultToleranceCallback

RANK = int(os.environ.get("RANK", 0))


def say(text):  # in one piece: ranks share their output
    os.write(1, f"{text}\\n".encode())


def make_trainer(*callbacks, name="checkpoints", ours=None, keeper=None, **options):
    ours = ours or FaultToleranceCallback(autoresume=True, exp_dir="state")
    defaults = {
        "accelerator": "cpu", "devices": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "limit_train_batches": 4, "limit_val_batches": 0, "max_epochs": 2,
    }
    keeper = keeper or ModelCheckpoint(name, save_last=True, save_on_train_epoch_end=True)
    return Trainer(callbacks=[ours, keeper, *callbacks], **{**defaults, **options})

"""


class Job:
    """A script, in a directory of its own, that `run` starts once more.

    One rank runs under a monitor, two under the launcher.
    """

    def __init__(self, start: Callable[..., Started], directory: Path, script: str) -> None:
        self.start, self.directory = start, directory
        self.flag, self.runs = directory / "flag", 0
        (directory / "train.py").write_text(HEAD + script)

    def run(self, *flags: str, ranks: int = 1, arguments: Any = (), **environment: str) -> Started:
        self.runs += 1
        self.flag.with_name("flag.stop").unlink(missing_ok=True)
        run_dir = self.directory / f"run{self.runs}"
        flags = ("--ft-unknown-timeout=60", *flags)
        if ranks > 1:
            command = [ROOT / "ft_launcher.py", f"--ft-run-dir={run_dir}", *flags]
            command += [f"--nproc-per-node={ranks}", "train.py", *arguments]
        else:
            command = [ROOT / "ft_monitor.py", *flags, "--", sys.executable, "-u", "train.py"]
            command += arguments
            environment["FT_RUN_DIR"] = str(run_dir)
        environment |= {"PYTHONPATH": str(ROOT), FLAG_VARIABLE: str(self.flag)}
        return self.start([sys.executable, *command], cwd=self.directory, **environment)

    def report(self, rank: int = 0, attempt: int = 0) -> Report:
        (path,) = self.directory.glob(f"run{self.runs}/**/attempt_{attempt}/rank{rank}.json")
        return Report.read(path)


@pytest.fixture
def job(start: Callable[..., Started], tmp_path: Path) -> Callable[[str], Job]:
    return lambda script: Job(start, tmp_path, script)


def test_the_flag_appears_when_the_script_has_ended_well_and_not_between_or_after_fits(
    job: Callable[[str], Job],
) -> None:
    """A restart then runs what follows: two folds (case 03) with a test each."""
    folds = job("""
run = len(list(Path(".").glob("run[0-9]")))

class Model(BoringModel):
    def test_step(self, *args):
        assert not Path("flag").exists()
        if (run, fold) == (2, 1):
            raise ValueError("in the last test")

for fold in range(2):
    trainer = make_trainer(name=f"fold{fold}", limit_test_batches=1)
    trainer.fit(Model(), ckpt_path="last")
    say(f"run {run} fold {fold} batches {trainer.fit_loop.total_batch_idx + 1} of this run "
        f"{trainer.callbacks[0]._fit.batches}")
    if run == 1:
        os.kill(os.getpid(), 9)
    trainer.test(Model(), verbose=False)
    Path(f"result{fold}").touch()
""")
    expected: list[tuple[int, list[str], list[str]]] = [
        (-signal.SIGKILL, ["8"], []),
        (1, ["0", "8"], ["result0"]),
        (0, ["0", "0"], ["result0", "result1"]),
    ]
    for run, (status, batches, results) in enumerate(expected, start=1):
        started = folds.run()
        assert started.wait() == status, started.output
        assert folds.flag.exists() == (run == 3)
        assert sorted(path.name for path in folds.directory.glob("result*")) == results
        done = re.findall(rf"run {run} fold \d batches 8 of this run (\d)", started.output)
        assert done == batches, started.output
    content = json.loads(folds.flag.read_text())
    assert {name: content[name] for name in ("reason", "step", "epoch")} == {
        "reason": "max_epochs=2 reached", "step": 8, "epoch": 2
    }  # fmt: skip


SLOW = """
import threading

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(3 * (batch_idx == 0))
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        time.sleep(3 * (not hasattr(self, "saved")))
        self.saved = True

make_trainer(max_epochs=1).fit(Model())
threading.Thread(target=threading.Event().wait).start()
say("done")
"""


def test_a_slow_first_batch_and_a_slow_save_are_no_hang_and_what_is_left_at_the_end_is_killed(
    job: Callable[[str], Job],
) -> None:
    """With a timeout of heartbeats alone, shorter than both (case 58). At the end, a thread of a
    logger that waits for its server keeps the process from ending: training is complete (case 11).
    """
    slow = job(SLOW)
    started = slow.run("--ft-rank-heartbeat-timeout=2", "--ft-exit-timeout=3")
    assert started.wait() == -signal.SIGKILL and "done" in started.output, started.output
    report = slow.report()
    assert slow.flag.exists() and report.hung_on == "exit_timeout"
    assert report.longest["rank_section_timeouts[first_batch]"] >= 3
    assert report.longest["rank_section_timeouts[checkpointing]"] >= 3


def test_a_hang_is_found_and_named_with_its_section(job: Callable[[str], Job]) -> None:
    hung = job("""
class Model(BoringModel):
    def validation_step(self, *args):
        time.sleep(99 * (not self.trainer.sanity_checking))

make_trainer(limit_val_batches=1, max_epochs=1).fit(Model())
""")
    started = hung.run("--ft-rank-section-timeouts=validation:1")
    assert started.wait() == -signal.SIGKILL, started.output
    assert hung.report().hung_on == "rank_section_timeouts[validation]"
    assert "hung: in section 'validation' for" in started.output
    assert not hung.flag.exists()


def test_workers_started_by_spawn_may_pickle_the_trainer_and_so_may_ddp_spawn(
    job: Callable[[str], Job],
) -> None:
    """Case 33: a bound method holds the data module, which holds the Trainer."""
    spawns = job("""
from lightning.pytorch import LightningDataModule

class Data(LightningDataModule):
    def collate(self, samples):
        return torch.stack(samples)
    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 64), batch_size=8, num_workers=1,
                          multiprocessing_context="spawn", collate_fn=self.collate)

class Model(BoringModel):
    val_dataloader = None

if __name__ == "__main__":
    strategy = sys.argv[1]
    data = {"datamodule": Data()} if strategy == "auto" else {}
    make_trainer(max_epochs=1, strategy=strategy).fit(Model(), **data)
    say("done")
""")
    for strategy in ("auto", "ddp_spawn"):
        started = spawns.run(arguments=[strategy])
        assert started.wait() == 0 and "done" in started.output, started.output
        assert json.loads(spawns.flag.read_text())["step"] == 4
        spawns.flag.unlink()
        shutil.rmtree(spawns.directory / "checkpoints")


@pytest.mark.slow
def test_two_files_copied_alone_work_with_pytorch_lightning_alone(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    for name in ("ft_callback.py", "ft_monitor.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "train.py").write_text("""
import sys
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

import ft_callback

assert "lightning.pytorch" not in sys.modules
assert issubclass(ft_callback.FaultToleranceCallback, pl.Callback)
pl.Trainer(
    accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False,
    enable_checkpointing=False,
    callbacks=[ft_callback.FaultToleranceCallback(autoresume=True, calculate_timeouts=True)],
).fit(BoringModel())
""")
    flag = tmp_path / "flag"
    command = [sys.executable, "ft_monitor.py", "--", sys.executable, "train.py"]
    rank = start(command, **{FLAG_VARIABLE: str(flag)})
    assert rank.wait() == 0, rank.output
    assert json.loads(flag.read_text())["reason"] == "max_steps=3 reached"


# -------------------------------------------------------------------------------- two ranks

STOPPED = (
    LOADER
    + """
class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.03)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(0.03)
        self.log("loss", self.layer(batch[0]).square().mean(), sync_dist=True)

    def on_train_batch_end(self, *args):
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches == 3:
            say("beyond the start")

    def on_validation_start(self):
        if hasattr(self, "batches"):
            say("validates")

    def on_validation_end(self):
        if RANK == 0 and not self.trainer.sanity_checking:
            say(f"step {self.global_step} validated: {self.trainer.callback_metrics['loss']:.9f}")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_start(self):
        say(f"rank {RANK} starts at {self.trainer.global_step}")

seed_everything(7, verbose=False)
data = TensorDataset(torch.randn(160, 8))
callback = FaultToleranceCallback(autoresume=True, calculate_timeouts=True, exp_dir="state")
trainer = make_trainer(
    name=sys.argv[1], ours=callback, strategy="ddp", limit_train_batches=1.0, limit_val_batches=1.0,
    max_epochs=3, val_check_interval=10,
)
try:
    trainer.fit(
        Model(), Loader(data, batch_size=4, shuffle=True, num_workers=1),
        DataLoader(data, batch_size=4, num_workers=1), ckpt_path="last",
    )
finally:
    say(f"rank {RANK} leaves fit at step {trainer.global_step}")
say("after fit")
"""
)


def test_two_ranks_that_are_stopped_again_and_again_lose_nothing(job: Callable[[str], Job]) -> None:
    """By SIGTERM to a rank other than 0 and in a validation, and to every process, DataLoader
    workers too."""
    two = job(STOPPED)
    started = two.run(ranks=2, arguments=["plain"])
    assert started.wait() == 0 and two.flag.exists(), started.output
    results = set(re.findall(r"step \d+ validated: .*", started.output))
    two.flag.unlink()
    two.flag.with_name("flag.progress").unlink()
    at = 0
    for how in ("one rank", "all"):
        started = two.run(ranks=2, arguments=["stopped"])
        started.wait_for_output(f"rank 1 starts at {at}\n", limit=100)
        sign = "validates" if how == "one rank" else "beyond the start"
        started.wait_for_output(sign, limit=100)
        everyone = processes_with(f"FT_TEST_MARK={two.directory}")
        for pid in [two.report(1).pid or 0] if how == "one rank" else everyone:
            os.kill(pid, signal.SIGTERM)
        assert started.wait(40) == (0 if how == "one rank" else 128 + signal.SIGTERM)
        left = set(re.findall(r"rank \d leaves fit at step (\d+)", started.output))
        assert len(left) == 1 and "after fit" not in started.output, started.output
        assert not two.flag.exists()
        at = int(left.pop())
        assert f"stopped at step {at}, as" in started.output
        progress = json.loads(two.flag.with_name("flag.progress").read_text())
        last = two.directory / "stopped" / "last.ckpt"
        assert progress["step"] == at and progress["checkpoint"] == str(last)
        assert all(two.report(rank).status == 0 for rank in (0, 1))
        assert "Error" not in started.output and not any(map(is_running, everyone))
        seen = set(re.findall(r"step \d+ validated: .*", started.output))
        assert seen <= results
        results -= seen
    started = two.run(ranks=2, arguments=["stopped"])
    assert started.wait() == 0 and f"rank 1 starts at {at}\n" in started.output, started.output
    assert results == set(re.findall(r"step \d+ validated: .*", started.output))
    plain, stopped = (
        torch.load(two.directory / name / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("plain", "stopped")
    )
    assert plain and all(torch.equal(plain[name], stopped[name]) for name in plain)


def test_ranks_that_find_different_checkpoints_are_an_error_and_not_a_hang(
    job: Callable[[str], Job], tmp_path: Path
) -> None:
    """As on nodes that have no file system in common."""
    different = job("""
make_trainer(name=f"rank{RANK}").fit(BoringModel(), ckpt_path="last")
""")
    keeper = ModelCheckpoint(tmp_path / "rank0", save_last=True)
    make_trainer(tmp_path, keeper, max_epochs=1, limit_train_batches=4).fit(BoringModel())
    started = different.run(ranks=2)
    assert started.wait() == 1
    assert "RuntimeError: rank 1 starts at step 0, rank 0 at 4: give Model" in started.output
    assert "(dirpath=...), or --ft-auto-dir, a directory that all nodes share" in started.output


def test_ranks_with_unequal_data_are_found_before_the_first_save(job: Callable[[str], Job]) -> None:
    """Case 10: they hang at the end of the first epoch, where nothing is learned yet."""
    unequal = job("""
from torch.utils.data import IterableDataset

class Shards(IterableDataset):
    def __iter__(self):
        return (torch.randn(32) for _ in range(40 - 4 * RANK))

trainer = make_trainer(strategy="ddp", limit_train_batches=None)
trainer.fit(BoringModel(), DataLoader(Shards(), batch_size=2))
""")
    flags = "--ft-startup-timeout=60", "--ft-rank-section-timeouts=setup:60,first_batch:60"
    started = unequal.run(*flags, "--ft-unknown-timeout=4", ranks=2)
    assert started.wait() == 1
    assert "hung: " in started.output and not unequal.flag.exists()
    assert not list(unequal.directory.glob("checkpoints/*"))
