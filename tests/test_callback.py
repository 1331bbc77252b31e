"""The callback in real trainings: single-device ones in this process, with a pipe that the test reads in the place of
a monitor, and two-rank ones under the launcher."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from conftest import ROOT, Started, processes_with, wait_until
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.tuner import Tuner
from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpointOfPytorchLightning
from pytorch_lightning.demos.boring_classes import BoringModel as BoringModelOfPytorchLightning
from pytorch_lightning.plugins.io import AsyncCheckpointIO as AsyncIOOfPytorchLightning

import ft_callback
from ft_callback import FLAG_VARIABLE, FaultToleranceCallback, SimulatedFaultParams

Heard = Callable[[], list[dict[str, Any]]]

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints for small trainings


# ------------------------------------------------------------------------------------------------ in this process


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank's that the launcher has started, less the pipe; quiet."""
    for name in [name for name in os.environ if name.startswith(("FT_", "FAULT_TOL", "RANK", "SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FT_CONFIG", '{"rank_heartbeat_timeout": 600}')
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setattr(logging.getLogger(f"{name}.utilities.rank_zero"), "level", logging.ERROR)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Stands in for this rank's monitor: returns, when called, the messages that have arrived since the last call."""
    reader, writer = Pipe(duplex=False)
    os.set_blocking(reader.fileno(), False)
    monkeypatch.setenv("FT_MONITOR_FD", str(writer.fileno()))

    def heard() -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in os.read(reader.fileno(), 65536).splitlines()]
        except BlockingIOError:
            return []

    yield heard
    reader.close()
    writer.close()


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Heard) -> Path:
    """The path of the finished flag, which does not exist yet."""
    (tmp_path / "flag").mkdir()
    path = tmp_path / "flag" / "finished"
    monkeypatch.setenv(FLAG_VARIABLE, str(path))
    return path


class Model(BoringModel):
    """Logs `score`, which each test may set; `act` is called with each batch's index."""

    def __init__(self, act: Callable[[int], Any] = lambda batch_idx: None) -> None:
        super().__init__()
        self.act = act
        self.score: Callable[[int], float] = lambda epoch: 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.act(batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("score", self.score(self.current_epoch))


def make_trainer(directory: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_train_batches": 3, "limit_val_batches": 0, "default_root_dir": directory,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(directory: Path, *callbacks: Any, model: Model | None = None, last: bool = False, **options: Any) -> Trainer:
    """Train with the callback, and one that keeps last.ckpt; go on from there if `last`."""
    keep = ModelCheckpoint(directory / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    trainer = make_trainer(directory, FaultToleranceCallback(autoresume=True), keep, *callbacks, **options)
    trainer.fit(model or Model(), ckpt_path="last" if last else None)
    return trainer


class Stop(Callback):
    """What a user's own callback does that stops training at a batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


# ---------------------------------------------------------------------------------------------------- heartbeats


def test_a_training_sends_heartbeats_with_its_global_step_between_init_and_bye(monitor: Heard, tmp_path: Path) -> None:
    callback = FaultToleranceCallback(autoresume=False)
    trainer = make_trainer(tmp_path, callback, max_epochs=2, limit_val_batches=2, num_sanity_val_steps=1)
    trainer.fit(Model())
    messages = monitor()
    assert messages[0]["type"] == "init" and messages[0]["rank"] == 0
    assert messages[-1] == {"type": "bye", "error": None}
    sanity, start, end = [0, 0, 0], [0], [6, 6]  # validation: start, each batch, end; training: end, teardown
    first, second = [1, 2, 3, 3, 3, 3, 3], [4, 5, 6, 6, 6, 6, 6]  # three training batches, validation of two
    steps = [message["step"] for message in messages if message["type"] == "heartbeat"]
    assert steps == sanity + start + first + second + end


@pytest.mark.parametrize(
    ("error", "shown", "said"),
    [
        (ValueError("this batch is bad"), ValueError, "ValueError: this batch is bad"),
        (KeyboardInterrupt(), SystemExit, "KeyboardInterrupt"),
        (SystemExit(3), SystemExit, "SystemExit: 3"),
        (AssertionError(), AssertionError, "AssertionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bye_carries_what_ended_the_training_and_the_training_is_not_finished(
    flag: Path, monitor: Heard, tmp_path: Path, error: BaseException, shown: type[BaseException], said: str
) -> None:
    def act(batch_idx: int) -> None:
        if batch_idx == 1:
            raise error

    with pytest.raises(shown):
        fit(tmp_path, model=Model(act), max_epochs=1)
    bye = monitor()[-1]
    assert bye["type"] == "bye" and bye["error"].startswith(said)
    assert not flag.exists()


def test_a_training_ended_by_sigterm_is_not_finished_although_its_exit_code_is_0(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """Even if it is the last batch: a next run finds out that nothing is left."""

    def act(batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, model=Model(act), max_epochs=1)
    assert not stopped.value.code  # Lightning's SIGTERMException: Python exits with 0
    assert monitor()[-1]["error"].startswith("SIGTERMException")
    assert not flag.exists()


def test_validation_and_test_on_their_own_need_no_monitor_and_no_flag_and_send_nothing(
    tmp_path: Path, monitor: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), limit_val_batches=1, limit_test_batches=1)
    trainer.validate(Model(), verbose=False)
    trainer.test(Model(), verbose=False)
    monkeypatch.delenv("FT_MONITOR_FD")
    trainer.validate(Model(), verbose=False)
    assert monitor() == []


def test_two_trainings_in_one_process_connect_one_after_the_other(flag: Path, monitor: Heard, tmp_path: Path) -> None:
    callback = FaultToleranceCallback(autoresume=True)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(Model())
    first = monitor()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Model())
    second = monitor()
    make_trainer(tmp_path, callback, max_steps=1).fit(Model())
    third = monitor()
    for messages, last_step in ((first, 3), (second, 6), (third, 1)):
        kinds = [message["type"] for message in messages]
        assert kinds[0] == "init" and kinds[-1] == "bye" and kinds.count("init") == kinds.count("bye") == 1
        assert [message["step"] for message in messages if message["type"] == "heartbeat"][-1] == last_step
    assert json.loads(flag.read_text())["reason"] == "max_steps=1 reached"


def test_the_trainer_of_pytorch_lightning_works_too_when_it_is_imported_after_ft_callback(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here ft_callback has chosen lightning.pytorch: other classes of the same names. See also below."""
    assert ft_callback.pl.__name__ == "lightning.pytorch"
    model, limit = BoringModelOfPytorchLightning(), datetime.timedelta(seconds=0.2)
    safely: list[Path] = []
    original = ft_callback.AtomicCheckpointIO.save_checkpoint

    def save_checkpoint(self: Any, checkpoint: Any, path: Any, **options: Any) -> None:
        safely.append(Path(path))
        original(self, checkpoint, path, **options)

    monkeypatch.setattr(ft_callback.AtomicCheckpointIO, "save_checkpoint", save_checkpoint)

    def run(**options: Any) -> pytorch_lightning.Trainer:
        keep = ModelCheckpointOfPytorchLightning(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
        ours: Any = FaultToleranceCallback(autoresume=True)
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            limit_train_batches=2, callbacks=[ours, keep], **options,
        )  # fmt: skip
        trainer.fit(model, ckpt_path="last" if (tmp_path / "checkpoints").exists() else None)
        return trainer

    run(max_epochs=1)
    steps = [message["step"] for message in monitor() if message["type"] == "heartbeat"]
    assert steps[0] == 0 and steps[-1] == 2 and steps == sorted(steps)
    assert json.loads(flag.read_text())["reason"] == "max_epochs=1 reached"
    flag.unlink()
    assert run(max_epochs=-1, max_time=limit).global_step > 3 and not flag.exists()
    run(max_epochs=-1, max_time=limit)
    assert json.loads(flag.read_text())["reason"] == "max_time used up"
    assert tmp_path / "checkpoints" / "last.ckpt" in safely


def test_the_asynchronous_writer_of_pytorch_lightning_is_known_as_one_too() -> None:
    trainer: Any = pytorch_lightning.Trainer(accelerator="cpu", logger=False, plugins=[AsyncIOOfPytorchLightning()])
    assert ft_callback.is_asynchronous(trainer)


# ------------------------------------------------------------------------------------------- the finished flag


def test_the_flag_says_why_where_and_when_training_is_complete(flag: Path, tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=2)
    content = json.loads(flag.read_text())
    assert {key: content[key] for key in ("reason", "step", "epoch")} == {
        "reason": "max_epochs=2 reached", "step": 6, "epoch": 2
    }  # fmt: skip
    assert abs(time.time() - time.mktime(time.strptime(content["time"][:19], "%Y-%m-%dT%H:%M:%S"))) < 60
    assert sorted(path.name for path in flag.parent.iterdir()) == ["finished", "finished.progress"]


def test_a_run_that_has_nothing_left_to_do_creates_the_flag_too(flag: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_epochs": 2}, "max_epochs=2 reached"),
        ({"max_steps": 4}, "max_steps=4 reached"),
    ]
    for limits, reason in cases:
        directory = tmp_path / reason
        first = fit(directory, **limits)
        assert json.loads(flag.read_text())["reason"] == reason
        flag.unlink()
        seen: list[int] = []
        second = fit(directory, model=Model(seen.append), last=True, **limits)
        assert seen == [] and second.global_step == first.global_step
        assert json.loads(flag.read_text())["reason"] == reason
        flag.unlink()


def test_early_stopping_finishes_a_training_also_in_its_first_epoch_and_again_in_a_next_run(
    flag: Path, tmp_path: Path
) -> None:
    for stop in ({"patience": 1}, {"stopping_threshold": 2.0}):  # in the second epoch, in the first
        directory = tmp_path / next(iter(stop))
        for last in (False, True):
            stopped = fit(directory, EarlyStopping("score", **stop), last=last, max_epochs=9)
            assert stopped.current_epoch < 5
            assert json.loads(flag.read_text())["reason"].startswith("stopped early")
            flag.unlink()


def test_an_early_stop_of_an_earlier_run_does_not_finish_this_one(flag: Path, tmp_path: Path) -> None:
    """Its state is in the checkpoint. This run goes on, as scores improve again, until something else stops it."""
    fit(tmp_path, EarlyStopping("score", patience=1), max_epochs=9)
    flag.unlink()
    improving = Model()
    improving.score = lambda epoch: -epoch
    trainer = fit(tmp_path, EarlyStopping("score", patience=1), Stop(5), model=improving, last=True, max_epochs=9)
    assert trainer.global_step > 6
    assert not flag.exists()


def test_max_time_finishes_a_training_when_it_is_used_up_but_not_the_run_that_it_stops(
    flag: Path, tmp_path: Path
) -> None:
    limit = datetime.timedelta(seconds=0.3)
    every_step = ModelCheckpoint(tmp_path / "checkpoints", filename="step", every_n_train_steps=1, save_last=True)
    first = fit(
        tmp_path, every_step, model=Model(lambda batch: time.sleep(0.03)), max_time=limit, max_epochs=-1,
    )  # fmt: skip
    assert first.global_step > 1 and not flag.exists()
    seen: list[int] = []
    fit(tmp_path, model=Model(seen.append), last=True, max_time=limit, max_epochs=-1)
    assert seen == [] and json.loads(flag.read_text())["reason"] == "max_time used up"


@pytest.mark.parametrize("epochs", [1, 9])
@pytest.mark.parametrize("batches", [1, 2])
def test_whoever_else_stops_a_training_wants_it_to_go_on_later(
    flag: Path, tmp_path: Path, batches: int, epochs: int
) -> None:
    """Also in the last epoch, which Lightning then counts as one that is over."""
    day = datetime.timedelta(days=1)
    trainer = fit(tmp_path, Stop(batches), EarlyStopping("score"), max_epochs=epochs, max_time=day)
    assert trainer.global_step == batches
    assert not flag.exists()


def test_a_stop_with_the_last_batch_of_the_last_epoch_finishes_a_training(flag: Path, tmp_path: Path) -> None:
    fit(tmp_path, Stop(6), max_epochs=2)
    assert json.loads(flag.read_text())["reason"] == "max_epochs=2 reached"


def test_the_last_of_several_trainings_in_one_script_decides(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_RUN_DIR", str(tmp_path / "run"))

    def fail(batch_idx: int) -> None:
        assert not flag.exists()
        raise ValueError("in the second training")

    fit(tmp_path, max_epochs=1)
    assert flag.exists()
    with pytest.raises(ValueError, match="second training"):
        fit(tmp_path / "second", model=Model(fail), max_epochs=1)
    assert not flag.exists()
    flag.write_text("made by hand")  # and by no earlier training of this attempt
    fit(tmp_path / "third", Stop(1), max_epochs=9)
    assert flag.read_text() == "made by hand"


def test_a_stop_request_saves_at_the_next_step_and_the_next_run_goes_on_from_there(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    """Not in the middle of accumulated gradients: the third batch has the request, the fourth makes a step."""
    request, seen = Path(f"{flag}.stop"), []

    def act(batch_idx: int) -> None:
        seen.append(batch_idx)
        if len(seen) == 3:
            request.touch()

    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 8, "accumulate_grad_batches": 4}
    assert fit(tmp_path, model=Model(act), **options).global_step == 1
    assert seen == [0, 1, 2, 3]
    assert not request.exists() and not flag.exists()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 1
    assert monitor()[-1] == {"type": "bye", "error": None}
    assert fit(tmp_path, model=Model(seen.append), last=True, **options).global_step == 2
    assert seen == list(range(8))
    assert flag.exists()


def test_a_search_for_the_learning_rate_is_not_a_training(flag: Path, monitor: Heard, tmp_path: Path) -> None:
    """It trains, removes its checkpoint, and leaves by Lightning's _TunerExitException, which calls teardown."""
    model = Model()
    model.lr = 0.1  # type: ignore[assignment]
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    Tuner(trainer).lr_find(model, num_training=5)
    messages = monitor()
    assert messages[0]["type"] == "init" and messages[-1] == {"type": "bye", "error": None}
    # One would start a clock that no further one stops: the search takes the callbacks away for its steps.
    assert "heartbeat" not in [message["type"] for message in messages]
    assert not flag.exists()
    progress = Path(f"{flag}.progress")
    assert not progress.exists() or Path(json.loads(progress.read_text())["checkpoint"]).exists()
    trainer.fit(model)
    assert flag.exists()


def test_the_flag_is_created_when_the_last_checkpoint_is_on_disk_and_never_before(
    flag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plugin that writes in the background, and slowly: also FLAG.progress names what is on disk alone."""

    class SlowIO(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.2)
            super().save_checkpoint(*args, **kwargs)

    seen: list[tuple[str, int, int]] = []
    original = ft_callback.write_json
    newest = tmp_path / "checkpoints" / "last.ckpt"

    def write_json(path: Path, values: Any, **options: Any) -> None:
        on_disk = torch.load(values.get("checkpoint", newest), weights_only=False)["global_step"]
        seen.append((path.name, values["step"], on_disk))
        original(path, values, **options)

    monkeypatch.setattr(ft_callback, "write_json", write_json)
    for plugin in (AsyncCheckpointIO(SlowIO()), SlowIO()):
        seen.clear()
        fit(tmp_path, max_epochs=2, plugins=[plugin])
        assert seen[-1] == ("finished", 6, 6)
        assert {name for name, _, _ in seen[:-1]} == {"finished.progress"}
        assert [step for _, step, _ in seen] == [on_disk for _, _, on_disk in seen]
        assert {step for _, step, _ in seen} == {3, 6}


def test_the_progress_file_follows_the_newest_checkpoint(flag: Path, tmp_path: Path) -> None:
    progress = Path(f"{flag}.progress")
    places = []

    def act(batch_idx: int) -> None:
        places.append(json.loads(progress.read_text()) if progress.exists() else None)

    fit(tmp_path, model=Model(act), max_epochs=3)
    assert [place and (place["step"], place["epoch"]) for place in places] == (
        [None] * 3 + [(3, 0)] * 3 + [(6, 1)] * 3
    )  # fmt: skip
    last = json.loads(progress.read_text())
    assert last["step"] == 9 and Path(last["checkpoint"]).is_file() and "time" in last


def test_without_autoresume_nothing_is_written(flag: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "checkpoints")
    make_trainer(tmp_path, FaultToleranceCallback(autoresume=False), keep, max_epochs=1).fit(Model())
    assert list((tmp_path / "checkpoints").iterdir()) and not list(flag.parent.iterdir())


def test_a_flag_that_cannot_be_written_fails_the_run_and_leaves_no_half_of_it(
    flag: Path, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    vanishes = tmp_path / "vanishes"
    vanishes.mkdir()
    monkeypatch.setenv(FLAG_VARIABLE, str(vanishes / "finished"))
    with pytest.raises(FileNotFoundError, match="vanishes"):
        trainer.fit(Model(lambda batch_idx: shutil.rmtree(vanishes, ignore_errors=True)))
    assert monitor()[-1]["error"].startswith("FileNotFoundError: ")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv(FLAG_VARIABLE, str(flag))
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(Model())
    assert not list(flag.parent.iterdir())


# --------------------------------------------------------------------------------------------- a wrong set-up


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (FLAG_VARIABLE, None, rf"needs {FLAG_VARIABLE}, which is not set.*export {FLAG_VARIABLE}="),
        (FLAG_VARIABLE, "", rf"needs {FLAG_VARIABLE}, which is not set.*export {FLAG_VARIABLE}="),
        (
            FLAG_VARIABLE,
            "/not/there/flag",
            rf"{FLAG_VARIABLE}=/not/there/flag: its directory does not exist, create it",
        ),
        ("WORLD_SIZE", "2", r"launcher started 2 ranks, but this Trainer has 1: .*devices=int.*LOCAL_WORLD_SIZE"),
        ("FT_MONITOR_FD", None, r"not started by ft_launcher.*python ft_launcher.py --nproc-per-node=N SCRIPT"),
        ("FT_MONITOR_FD", "9999", r"not started by ft_launcher.*python ft_launcher.py --nproc-per-node=N SCRIPT"),
        ("FT_CONFIG", "{}", r"no timeout is set.*--ft-rank-heartbeat-timeout=SECONDS"),
    ],
)
def test_a_set_up_that_cannot_work_is_one_error_that_says_what_to_do(
    flag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, expected: str
) -> None:
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    trainer = make_trainer(tmp_path, FaultToleranceCallback(autoresume=True), max_epochs=1)
    with pytest.raises(RuntimeError, match=expected) as raised:
        trainer.fit(Model())
    assert raised.value.__context__ is None  # not raised while another error was handled, nor the other way round
    assert not flag.exists()


def test_an_error_in_the_users_own_setup_is_the_one_shown_and_the_monitor_hears_of_it(
    flag: Path, monitor: Heard, tmp_path: Path
) -> None:
    class Broken(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            raise ValueError("no such tokenizer")

    for callbacks in ([Broken(), FaultToleranceCallback(True)], [FaultToleranceCallback(True), Broken()]):
        with pytest.raises(ValueError, match="no such tokenizer") as raised:
            make_trainer(tmp_path, *callbacks, max_epochs=1).fit(Model())
        assert raised.value.__context__ is None
    messages = monitor()  # of the second, whose monitor was connected already
    assert [message["type"] for message in messages if message["type"] in ("init", "bye")] == ["init", "bye"]
    assert messages[-1]["error"].startswith("ValueError: no such tokenizer")


# -------------------------------------------------------------------------------------------- simulated faults


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"fault_type": "rank_sleeps", "base_delay": 1}, "fault_type: got 'rank_sleeps', expected one of rank_killed"),
        ({"fault_type": None, "base_delay": 1}, "fault_type: got None, expected one of"),
        ({"fault_type": ["random"], "base_delay": 1}, r"fault_type: got \['random'\], expected one of"),
        ({"fault_type": "random", "base_delay": -1}, "base_delay: got -1, expected seconds of at least 0"),
        ({"fault_type": "random", "base_delay": "1"}, "base_delay: got '1', expected seconds"),
        ({"fault_type": "random", "base_delay": math.nan}, "base_delay: got nan, expected seconds"),
        ({"fault_type": "random", "base_delay": math.inf}, "base_delay: got inf, expected seconds"),
        ({"fault_type": "random", "base_delay": None}, "base_delay: got None, expected seconds"),
        ({"fault_type": "random", "base_delay": 1, "rand_delay": -2}, "rand_delay: got -2, expected seconds"),
        ({"fault_type": "random", "base_delay": 1, "rank_to_fail": -1}, "rank_to_fail: got -1, expected a global rank"),
        ({"fault_type": "random", "base_delay": 1, "rank_to_fail": "1"}, "rank_to_fail: got '1', expected a global"),
        ({"fault_type": "random", "base_delay": 1, "rank_to_fail": 0.5}, "rank_to_fail: got 0.5, expected a global"),
        ({"fault_type": "random", "base_delay": 1, "rank": 1}, "simulated_fault_params: got .*unexpected.*'rank'"),
        ({"fault_type": "random"}, "simulated_fault_params: got .*missing.*'base_delay'"),
        ("rank_killed", "simulated_fault_params: got 'rank_killed'"),
        (5, "simulated_fault_params: got 5"),
    ],
)
def test_every_wrong_fault_is_refused_with_its_value_and_what_was_expected(params: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FaultToleranceCallback(autoresume=False, simulated_fault_params=params)


def test_a_fault_may_be_given_as_an_object_or_a_mapping() -> None:
    params = SimulatedFaultParams("rank_hung", 1, rank_to_fail=1)
    for given in (params, {"fault_type": "rank_hung", "base_delay": 1, "rank_to_fail": 1}):
        callback = FaultToleranceCallback(autoresume=False, simulated_fault_params=given)
        assert callback.simulated_fault_params == params
    assert FaultToleranceCallback(autoresume=False).simulated_fault_params is None


def test_a_random_fault_hits_one_rank_on_which_all_agree_and_another_in_other_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Timer:
        """In the place of threading.Timer: never rings."""

        def __init__(self, delay: float, function: Any, arguments: Any) -> None:
            self.delay, self.signal = delay, arguments[1]

        def start(self) -> None:
            pass

    monkeypatch.setattr(ft_callback.threading, "Timer", Timer)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    params = SimulatedFaultParams("random", base_delay=10, rand_delay=5)
    hit, signals = set(), set()
    for attempt in range(20):
        monkeypatch.setenv("MASTER_PORT", str(20000 + attempt))
        timers: list[Any] = []
        for rank in range(4):
            monkeypatch.setenv("FT_ATTEMPT", str(rank // 2))  # nodes may count attempts differently
            trainer: Any = types.SimpleNamespace(world_size=4, global_rank=rank)
            timers.append(ft_callback.schedule_fault(params, trainer, logging.getLogger("quiet")))
        (victim,) = [rank for rank, timer in enumerate(timers) if timer is not None]
        assert 10 <= timers[victim].delay < 15
        hit.add(victim)
        signals.add(timers[victim].signal)
    assert len(hit) > 1 and signals == {signal.SIGKILL, signal.SIGSTOP}


def test_a_fault_that_has_not_come_is_cancelled_when_training_ends(monitor: Heard, tmp_path: Path) -> None:
    params = SimulatedFaultParams("rank_killed", base_delay=1000)
    for model in (Model(), Model(lambda batch_idx: [][batch_idx])):
        callback = FaultToleranceCallback(autoresume=False, simulated_fault_params=params)
        try:
            make_trainer(tmp_path, callback, max_steps=1).fit(model)
        except IndexError:
            pass
        assert callback._fault is not None
        callback._fault.join(5)
        assert not callback._fault.is_alive()


# --------------------------------------------------------------------------------------- two ranks, real faults

SCRIPT = """
import os, sys, time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import ft_callback

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["FT_ATTEMPT"])
HERE = Path(__file__).parent
FAULTS = sys.argv[2:]  # of the attempts


def say(text):  # in one piece: the ranks share their output
    os.write(1, f"{text}\\n".encode())


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.0), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        if sys.argv[1] == "endless":
            time.sleep(0.01)
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class WaitForTheFault(Callback):
    \"\"\"In the middle of an epoch, alive and well: heartbeats alone tell a rank that is stopped from its peer.\"\"\"

    def on_train_start(self, trainer, module):
        say(f"rank {RANK} starts attempt {ATTEMPT} at step {trainer.global_step}")

    def on_train_batch_end(self, trainer, module, *args):
        while ATTEMPT < len(FAULTS) and trainer.global_step == 4 * (ATTEMPT + 1) + 2:
            time.sleep(0.05)
            callback._heartbeat(trainer)


def write_json(path, values, original=ft_callback.write_json, **options):
    say(f"rank {RANK} writes {path.name}")
    original(path, values, **options)


ft_callback.write_json = write_json
seed_everything(7, verbose=False)
fault = dict(zip(("fault_type", "rank_to_fail"), FAULTS[ATTEMPT].split(":"))) if ATTEMPT < len(FAULTS) else None
if fault:
    fault |= {"rank_to_fail": int(fault["rank_to_fail"]), "base_delay": 2.5}
callback = ft_callback.FaultToleranceCallback(autoresume=True, simulated_fault_params=fault)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1 if sys.argv[1] == "endless" else 3, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=HERE,
    callbacks=[callback, WaitForTheFault(), ModelCheckpoint(HERE / sys.argv[1], save_last=True)],
)
data = TensorDataset(torch.randn(32, 8))
trainer.fit(Model(), DataLoader(data, batch_size=4, shuffle=True), ckpt_path="last")
"""


@pytest.fixture
def launch(start: Callable[..., Started], tmp_path: Path) -> Callable[..., Started]:
    """Start the launcher on SCRIPT with two ranks; its checkpoints go to the directory `name`, its flag to name.flag.

    `faults`: of each attempt, as fault_type:rank_to_fail.
    """

    def run(name: str, *faults: str) -> Started:
        script = tmp_path / "train.py"
        script.write_text(SCRIPT)
        return start(
            [sys.executable, ROOT / "ft_launcher.py", f"--ft-run-dir={tmp_path / 'runs'}", "--nproc-per-node=2",
             "--max-restarts=2", "--ft-rank-heartbeat-timeout=4", "--shutdown-timeout=8", script, name, *faults],
            **{FLAG_VARIABLE: str(tmp_path / f"{name}.flag")},
        )  # fmt: skip

    return run


def read_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """All reports below a directory, by names such as attempt_0/rank1."""
    paths = sorted(directory.glob("**/attempt_*/rank*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in paths}


def test_a_training_that_loses_ranks_ends_at_the_same_step_with_the_same_weights_bit_by_bit(
    launch: Callable[..., Started], tmp_path: Path
) -> None:
    """One run without faults, and one in which rank 1 kills itself and then, in the next attempt, rank 0 stops."""
    job = launch("plain")
    assert job.wait() == 0, job.output
    assert "rank 0 writes plain.flag\n" in job.output
    assert "rank 1 writes" not in job.output, "only global rank 0 writes"
    assert {(report["status"], report["step"]) for report in read_reports(tmp_path / "runs").values()} == {(0, 12)}

    job = launch("faulty", "rank_killed:1", "rank_hung:0")
    assert job.wait() == 0, job.output
    for attempt, step in enumerate((0, 4, 8)):  # at the end of the epoch before the fault
        for rank in (0, 1):
            assert f"rank {rank} starts attempt {attempt} at step {step}\n" in job.output, job.output
    (run,) = [path for path in (tmp_path / "runs").iterdir() if (path / "attempt_2").exists()]
    reports = read_reports(run)
    killed, hung = reports["attempt_0/rank1"], reports["attempt_1/rank0"]
    assert (killed["step"], killed["status"], killed["stopped"]) == (6, -signal.SIGKILL, None)
    assert hung["step"] == 10 and hung["verdict"]["setting"] == "rank_heartbeat_timeout"
    assert reports["attempt_1/rank1"]["verdict"] is None
    for report in (killed, hung):
        assert re.search(rf"attempt {report['attempt']}\b.*rank {report['rank']} \(pid {report['pid']}\)", job.output)

    plain, faulty = (torch.load(tmp_path / name / "last.ckpt", weights_only=False) for name in ("plain", "faulty"))
    assert plain["global_step"] == faulty["global_step"] == 12 and plain["epoch"] == faulty["epoch"]
    assert plain["state_dict"].keys() == faulty["state_dict"].keys()
    assert all(torch.equal(tensor, faulty["state_dict"][name]) for name, tensor in plain["state_dict"].items())
    contents = [json.loads((tmp_path / f"{name}.flag").read_text()) for name in ("plain", "faulty")]
    assert [(content["reason"], content["step"]) for content in contents] == [("max_epochs=3 reached", 12)] * 2


def test_sigterm_to_every_process_of_a_training_ends_it_and_does_not_finish_it(
    launch: Callable[..., Started], tmp_path: Path
) -> None:
    job = launch("endless")
    job.wait_for_output("rank 1 starts attempt 0", 60)
    wait_until(lambda: Path(tmp_path / "endless.flag.progress").exists(), 60)  # the first epoch has ended
    pids = processes_with(f"FT_TEST_MARK={tmp_path}")
    assert len(pids) >= 5  # launcher, two monitors, two ranks
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    assert job.wait(40) == 128 + signal.SIGTERM, job.output
    wait_until(lambda: not processes_with(f"FT_TEST_MARK={tmp_path}"), 2, "the end of all processes")
    assert not (tmp_path / "endless.flag").exists()
    for report in read_reports(tmp_path / "runs").values():
        assert report["ended"] is not None


def test_a_script_that_knows_pytorch_lightning_alone_works_under_a_monitor_of_its_own(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text("""
import sys
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

import ft_callback

assert "lightning.pytorch" not in sys.modules
assert issubclass(ft_callback.FaultToleranceCallback, pl.Callback)
pl.Trainer(
    accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    callbacks=[ft_callback.FaultToleranceCallback(autoresume=True)],
).fit(BoringModel())
""")
    run_dir, flag = tmp_path / "run", tmp_path / "flag"
    (run_dir / "attempt_0").mkdir(parents=True)
    monitor = [sys.executable, ROOT / "ft_monitor.py", "--ft-rank-heartbeat-timeout=60", "--"]
    rank = start(
        [*monitor, sys.executable, script], PYTHONPATH=str(ROOT), FT_RUN_DIR=str(run_dir), **{FLAG_VARIABLE: str(flag)}
    )
    assert rank.wait() == 0, rank.output
    assert json.loads(flag.read_text())["reason"] == "max_steps=3 reached"
    assert read_reports(run_dir)["attempt_0/rank0"]["step"] == 3


# -------------------------------------------------------------------------------------------- held to its word


def test_the_table_of_hooks_names_the_hooks_that_the_class_has() -> None:
    table = (ft_callback.__doc__ or "").partition("\nHook")[2].partition("\n\n")[0]
    named = set(re.findall(r"\b(?:on_\w+|setup|teardown)\b", "\n".join(row[:40] for row in table.splitlines()[1:])))
    hooks = {name for name in vars(FaultToleranceCallback) if not name.startswith("_") and hasattr(Callback, name)}
    assert named == hooks


def test_the_table_of_files_names_the_finished_flag_and_its_progress() -> None:
    table = (ft_callback.__doc__ or "").partition("\nFiles")[2]
    assert re.search(r'^ +FLAG +.*\{"reason", "step", "epoch", "time", "by"\}$', table, re.MULTILINE)
    assert re.search(r'^ +FLAG\.progress +.*\{"step", "epoch", "checkpoint", "time", "by"\}$', table, re.MULTILINE)


def test_asynchronous_saves_do_not_lead_to_a_timeout_that_is_too_short(
    monitor: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Saving returns at once; how long a write takes, with those that it waits for, counts for the end of training.

    So it does where, as here, nothing is left to write at the end: next time something may be.
    """
    written: list[str] = []

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            time.sleep(0.4)
            super().save_checkpoint(checkpoint, path, storage_options)
            written.append(Path(path).name)

    def act(batch_idx: int) -> None:
        if batch_idx == 5:
            for name in ("a", "b", "c"):
                trainer.save_checkpoint(tmp_path / name)
        if batch_idx == 18:
            wait_until(lambda: len(written) == 3, 20)

    monkeypatch.setenv("FT_CONFIG", '{"min_timeout": 0.1}')
    callback = FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir=tmp_path / "state")
    trainer = make_trainer(
        tmp_path, callback, plugins=[AsyncCheckpointIO(Slow())], max_epochs=1, limit_train_batches=20
    )
    trainer.fit(Model(act))
    timeouts = json.loads((tmp_path / "state" / "ft_state.json").read_text())["timeouts"]
    assert "rank_section_timeouts[checkpointing]" not in timeouts
    assert timeouts["rank_section_timeouts[finishing]"] >= 5 * 3 * 0.4


WRITES_SLOWLY = """
import os, sys, time
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader
from ft_callback import FaultToleranceCallback

class Slow(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        time.sleep(3.5 if checkpoint["global_step"] > 20 else 1.2)
        super().save_checkpoint(checkpoint, path, storage_options)

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        if batch_idx == 20:
            self.trainer.save_checkpoint("checkpoints/20.ckpt")
        if batch_idx == 80 and sys.argv[1] == "stop" and os.environ["RANK"] == "0":
            open(os.environ["FAULT_TOL_FINISHED_FLAG_FILE"] + ".stop", "w").close()
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 10_000))

Trainer(
    accelerator="cpu", devices=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
    max_steps=100 if sys.argv[1] == "end" else 5000, limit_val_batches=0, plugins=[AsyncCheckpointIO(Slow())],
    callbacks=[
        FaultToleranceCallback(autoresume=True, calculate_timeouts=True, exp_dir="state"),
        ModelCheckpoint("checkpoints", every_n_train_steps=100 if sys.argv[1] == "end" else 5000),
    ],
).fit(Model())
"""


@pytest.mark.parametrize("how", ["end", "stop"])
def test_ranks_that_do_not_write_wait_at_the_end_for_the_one_that_does(
    start: Callable[..., Started], tmp_path: Path, how: str
) -> None:
    """With the clock of finishing, not of heartbeats, which the last write outlasts."""
    (tmp_path / "train.py").write_text(WRITES_SLOWLY)
    job = start(
        [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", "--ft-run-dir=runs", "--ft-min-timeout=2.5",
         "train.py", how],
        FAULT_TOL_FINISHED_FLAG_FILE=str(tmp_path / "flag"),
    )  # fmt: skip
    assert job.wait() == 0, job.output
    assert "hung" not in job.output, job.output
    timeouts = json.loads((tmp_path / "state" / "ft_state.json").read_text())["timeouts"]
    assert timeouts["rank_section_timeouts[finishing]"] >= 5 * 3.5
