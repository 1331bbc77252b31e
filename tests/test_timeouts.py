"""Calculated timeouts: the arithmetic, the client with a pipe of the test's, and real Lightning trainings."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Started, wait_until
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

import ft_monitor
from ft_callback import FaultToleranceCallback, TimeoutState, read_kills
from ft_monitor import (
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    RankMonitorClient,
    RankMonitorClientError,
    maximum_of_ranks,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints for small trainings

HEARTBEAT = "rank_heartbeat_timeout"
INITIAL = "initial_rank_heartbeat_timeout"
Heard = Callable[[], list[dict[str, Any]]]


class Time:
    """An integer clock in the place of time.monotonic()."""

    now = 0

    def monotonic(self) -> float:
        return float(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(ft_monitor.time, "monotonic", fake.monotonic)
    return fake


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Stands in for the monitor: returns the messages that have arrived since the last call."""
    for name in [name for name in os.environ if name.startswith(("FT_", "FAULT_TOL", "RANK", "SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    reader, writer = Pipe(duplex=False)
    os.set_blocking(reader.fileno(), False)
    monkeypatch.setenv("FT_MONITOR_FD", str(writer.fileno()))
    monkeypatch.setenv("FT_CONFIG", '{"min_timeout": 1}')

    def read() -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in os.read(reader.fileno(), 65536).splitlines()]
        except BlockingIOError:
            return []

    yield read
    reader.close()
    writer.close()


def beat(client: RankMonitorClient, clock: Time, *intervals: int) -> None:
    for interval in intervals:
        clock.now += interval
        client.send_heartbeat()


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("longest", "floor", "earlier", "timeout"),
    [(4, 1, None, 20), (0.05, 10, None, 10), (4, 1, 10, 15), (0.05, 10, 0.25, 10), (8, 1, 1000, 520)],
)
def test_a_timeout_is_the_longest_time_times_the_factor_merged_with_the_earlier_one(
    longest: float, floor: float, earlier: float | None, timeout: float
) -> None:
    assert ft_monitor.calculated_timeout(longest, 5, floor, earlier) == timeout


def test_clocks_tell_how_long_each_ran_and_sections_rest_the_heartbeat() -> None:
    clocks = Clocks(FaultToleranceConfig(), 0, frozenset({"save"}))
    story: list[tuple[int, dict[str, Any], list[tuple[str, int]]]] = [
        (3, {"type": "init", "rank": 0, "stacks": False}, [("startup_timeout", 3)]),
        (5, {"type": "heartbeat", "step": None}, [(INITIAL, 2)]),
        (9, {"type": "heartbeat", "step": 1}, [(HEARTBEAT, 4)]),
        (10, {"type": "section", "name": "save", "open": True}, [("rank_out_of_section_timeout", 7), (HEARTBEAT, 1)]),
        (50, {"type": "heartbeat", "step": 2}, []),
        (60, {"type": "section", "name": "save", "open": False}, [("rank_section_timeouts[save]", 50)]),
        (62, {"type": "heartbeat", "step": 3}, [(HEARTBEAT, 2)]),
        (63, {"type": "section", "name": "other", "open": True}, [("rank_out_of_section_timeout", 3)]),
        (70, {"type": "heartbeat", "step": 4}, [(HEARTBEAT, 8)]),  # a section that is not measured rests nothing
    ]
    for now, message, laps in story:
        assert [(lap.setting, lap.seconds) for lap in clocks.hear(message, now)] == laps


def test_the_client_calculates_from_what_it_has_seen_and_the_monitor_hears_of_it_at_once(
    heard: Heard, clock: Time
) -> None:
    client = RankMonitorClient()
    client.init_workload_monitoring(measure=["save"])
    assert client.calculate_and_set_hb_timeouts(skip_if_not_ready=True) is False
    with pytest.raises(RankMonitorClientError, match="not enough data to calculate rank_heartbeat_timeout"):
        client.calculate_and_set_hb_timeouts()
    beat(client, clock, 6, 2, 3, 2)
    client.start_section("save")
    clock.now += 40
    client.end_section("save")
    assert client.calculate_and_set_section_timeouts(["save"], calc_out_of_section=False)
    assert client.calculate_and_set_hb_timeouts()
    assert tuple(client.hb_timeouts) == (30, 15, True)
    assert client.section_timeouts.section == {"save": 200} and client.section_timeouts.calculated_sections == {"save"}
    in_force = {"rank_section_timeouts[save]": 200, HEARTBEAT: 15, INITIAL: 30}
    assert heard()[-1] == {"type": "timeouts", "calculated": in_force, "note": None}
    assert client.state_dict() == {"version": 1, "timeouts": in_force}


def test_a_measured_section_without_a_timeout_counts_into_that_of_heartbeats(heard: Heard, clock: Time) -> None:
    """The monitor's heartbeat clock does not rest in it, although the client's does."""
    client = RankMonitorClient()
    client.init_workload_monitoring(measure=["save"])
    beat(client, clock, 1, 2)
    client.start_section("save")
    clock.now += 40
    client.end_section("save")
    assert client.calculate_and_set_hb_timeouts()
    assert client.hb_timeouts.subsequent == (2 + 40) * 5


def test_a_rank_waits_for_one_that_does_something_alone_as_long_as_in_any_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[Any, ...]] = []

    class Work:
        def wait(self, *limit: Any) -> None:
            limits.append(limit)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **options: Work())
    assert maximum_of_ranks([1.0, 2.0]) == maximum_of_ranks([1.0, 2.0], within=60) == [1.0, 2.0]
    assert limits == [(), (datetime.timedelta(seconds=60),)]


def test_the_state_goes_from_one_run_to_the_next_and_outliers_fade(heard: Heard, clock: Time) -> None:
    state = {"version": 1, "timeouts": {HEARTBEAT: 100, INITIAL: 40}}
    client = RankMonitorClient()
    client.load_state_dict(state)
    client.init_workload_monitoring()
    assert heard()[-1]["calculated"] == {HEARTBEAT: 100, INITIAL: 40}
    beat(client, clock, 2, 4)
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    client.calculate_and_set_hb_timeouts(calc_initial=False)  # with earlier runs, not with this one's own
    assert tuple(client.hb_timeouts) == (40, 60, True)
    client.set_timeouts_aside(HEARTBEAT)
    assert client.hb_timeouts.subsequent is None and client.state_dict()["timeouts"][HEARTBEAT] == 60


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 0, "timeouts": {}},
        {"version": 1},
        {"version": 1, "timeouts": {"x": 1}},
        {"version": 1, "timeouts": {HEARTBEAT: -1}},
    ],
)
def test_a_state_that_is_none_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RankMonitorClient().load_state_dict(state)


def test_a_calculated_timeout_that_nearly_ran_out_is_widened_at_once(heard: Heard, clock: Time) -> None:
    client = RankMonitorClient()
    client.load_state_dict({"version": 1, "timeouts": {HEARTBEAT: 10}})
    client.init_workload_monitoring()
    beat(client, clock, 1, 5)
    assert client.hb_timeouts.subsequent == 10
    beat(client, clock, 6)
    assert heard()[-1]["calculated"] == {HEARTBEAT: 30}


def test_the_floor_holds_for_stored_timeouts_too(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CONFIG", '{"min_timeout": 20}')
    client = RankMonitorClient()
    client.load_state_dict({"version": 1, "timeouts": {HEARTBEAT: 3}})
    client.init_workload_monitoring()
    assert client.timeouts_in_force() == {HEARTBEAT: 20}


# ------------------------------------------------------------------------------------------------- the state file


def test_a_timeout_that_ended_ranks_twice_with_no_new_step_is_widened() -> None:
    state = TimeoutState(client={"version": 1, "timeouts": {HEARTBEAT: 2.0}})
    assert state.judge({HEARTBEAT: 7}, 5) == []
    assert state.judge({HEARTBEAT: 9}, 5) == []  # with steps in between
    (line,) = state.judge({HEARTBEAT: 9}, 5)
    assert "rank_heartbeat_timeout of 2 s ended ranks twice at step 9 and is now 10 s" in line
    assert state.client["timeouts"] == {HEARTBEAT: 10.0}


def test_notes_of_kills_are_read_and_the_highest_step_counts(tmp_path: Path) -> None:
    for rank, text in enumerate(
        ['{"setting": "a", "step": 4}', '{"setting": "a", "step": 9}', "{", '{"setting": "b", "step": null}']
    ):
        (tmp_path / f"killed_rank{rank}.json").write_text(text)
    assert read_kills(sorted(tmp_path.iterdir())) == {"a": 9, "b": -1}


BROKEN = [
    "", "{", "[]", "null", '{"version": 0}', '{"version": 1, "client": 5}', '{"a": "foreign"}', "\ud800",
    '{"version": 1, "client": {"version": 1, "timeouts": {"rank_heartbeat_timeout": "x"}}}',
]  # fmt: skip


def fit(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    keep = ModelCheckpoint(directory / "checkpoints", save_last=True, every_n_train_steps=10)
    callback = FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir=directory / "state")
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, callbacks=[callback, keep, *callbacks],
        **{"max_steps": 30, "limit_train_batches": 30, "limit_val_batches": 0, **options},
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path="last")
    return trainer


def stored(directory: Path) -> dict[str, float]:
    path = directory / "state" / "ft_state.json"
    return dict(json.loads(path.read_text())["client"]["timeouts"])


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_state_file_costs_one_warning_and_is_replaced(
    heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "state" / "ft_state.json"
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogatepass"))
    logging.getLogger("lightning.pytorch").propagate = True
    fit(tmp_path)
    warnings = [record.getMessage() for record in caplog.records if "ignoring the stored timeouts" in record.message]
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert stored(tmp_path)[HEARTBEAT] == 1


def test_the_first_run_calculates_after_its_first_save_and_the_second_has_the_initial_timeout_too(
    heard: Heard, tmp_path: Path
) -> None:
    seen: list[tuple[int, set[str]]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            path = tmp_path / "state" / "ft_state.json"
            seen.append((trainer.global_step, set(stored(tmp_path)) if path.exists() else set()))

    fit(tmp_path, Look())
    sections = {"rank_section_timeouts[first_batch]", "rank_section_timeouts[checkpointing]"}
    at = dict(seen)
    assert at[10] == set() or at[10] == sections
    assert at[11] == sections and at[15] == sections  # after the first save
    assert at[17] == {*sections, HEARTBEAT}  # after 16 batches
    assert set(stored(tmp_path)) == {*sections, HEARTBEAT, "rank_section_timeouts[finishing]"}
    heard()
    fit(tmp_path, max_steps=60, max_epochs=9)
    first = next(message for message in heard() if message["type"] == "timeouts")
    assert set(first["calculated"]) == {*sections, HEARTBEAT, "rank_section_timeouts[finishing]"}
    assert INITIAL in stored(tmp_path)


def test_a_slow_save_does_not_stretch_the_timeout_of_steps(heard: Heard, tmp_path: Path) -> None:
    class Slow(Callback):
        def on_save_checkpoint(self, *args: Any) -> None:
            time.sleep(0.45)

    fit(tmp_path, Slow())
    timeouts = stored(tmp_path)
    assert timeouts["rank_section_timeouts[checkpointing]"] >= 2.25 > timeouts[HEARTBEAT]


def test_heartbeat_timeouts_rest_in_the_first_validation_whose_steps_are_not_known(
    heard: Heard, tmp_path: Path
) -> None:
    class Slow(Callback):
        def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                time.sleep(0.3)

    fit(tmp_path, Slow(), limit_val_batches=2, num_sanity_val_steps=0)
    messages = heard()
    in_force = [HEARTBEAT in message["calculated"] for message in messages if message["type"] == "timeouts"]
    first_set, set_aside = in_force.index(True), in_force.index(False, in_force.index(True))
    assert set_aside > first_set and True in in_force[set_aside:]
    assert stored(tmp_path)[HEARTBEAT] >= 1.5


# How a training ends: what a rank does in batch 25, whether timeouts are then calculated, and the launcher's exit code.
ENDS = {
    "normal end": ("pass", True, 0),
    "should_stop": ("self.trainer.should_stop = True", True, 0),
    "SystemExit(0)": ("raise SystemExit(0)", True, 0),
    "_TunerExitException": ("raise _TunerExitException", True, 0),
    "exception": ("raise ValueError('bad')", False, 1),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", False, 1),
    "SIGTERM": ("terminate(self.trainer)", False, 128 + signal.SIGTERM),
}
SLOW_SECONDS = 0.4  # a step after the last save takes so long: only a calculation at the end takes it in

ENDING = """
import atexit, os, signal, sys, time
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import _TunerExitException
from ft_callback import FaultToleranceCallback

def terminate(trainer):
    if os.environ["RANK"] == "0":
        os.kill(int(open("launcher.pid").read()), signal.SIGTERM)
    while not trainer.received_sigterm:
        time.sleep(0.01)

atexit.register(lambda: print("a process group is left:", dist.is_initialized()))

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        if batch_idx == 23:
            time.sleep(float(sys.argv[1]))
        if batch_idx == 25:
            exec(sys.argv[2])
        return super().training_step(batch, batch_idx)

Trainer(
    accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), logger=False, enable_progress_bar=False,
    enable_model_summary=False, max_steps=28, limit_train_batches=30, limit_val_batches=0,
    callbacks=[
        FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir="state"),
        ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=10),
    ],
).fit(Model())
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("action", "calculates", "code"), ENDS.values(), ids=ENDS)
def test_at_an_end_and_a_clean_stop_timeouts_are_calculated_and_gloo_is_destroyed_but_never_on_a_failure(
    start: Callable[..., Started], tmp_path: Path, action: str, calculates: bool, code: int, ranks: int
) -> None:
    (tmp_path / "train.py").write_text(ENDING)
    job = start([
        sys.executable, ROOT / "ft_launcher.py", f"--nproc-per-node={ranks}", "--ft-run-dir=runs", "--ft-min-timeout=1",
        "train.py", SLOW_SECONDS, action,
    ])  # fmt: skip
    (tmp_path / "launcher.pid").write_text(str(job.pid))
    assert job.wait() == code, job.output
    assert (stored(tmp_path)[HEARTBEAT] >= SLOW_SECONDS * 5) is calculates, job.output
    assert ("a process group is left: True" in job.output) is (ranks == 2 and not calculates), job.output


def test_a_run_without_any_timeout_says_what_to_set(heard: Heard, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[FaultToleranceCallback(False)]
    )
    with pytest.raises(RuntimeError, match=r"--ft-rank-heartbeat-timeout=SECONDS, or .*calculate_timeouts=True"):
        trainer.fit(BoringModel())


def test_a_directory_that_cannot_be_written_is_one_clear_error(heard: Heard, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, and no directory")
    with pytest.raises(RuntimeError, match=r"cannot prepare the directories of this training.*see exp_dir"):
        fit(tmp_path)


# ------------------------------------------------------------------------------------------------- two ranks

SCRIPT = """
import os, sys, time
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from ft_callback import FaultToleranceCallback

pause, steps, fault = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        time.sleep(pause * (1 + int(os.environ["RANK"])))
        if fault and os.environ["FT_ATTEMPT"] == "0" and os.environ["RANK"] == "1" and batch_idx == 5:
            os.kill(os.getpid(), 19)
        return super().training_step(batch, batch_idx)

Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
    max_steps=steps, limit_train_batches=20, limit_val_batches=0,
    callbacks=[
        FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir="state"),
        ModelCheckpoint("checkpoints", save_last=True, save_on_train_epoch_end=True),
    ],
).fit(Model(), ckpt_path="last")
"""


def test_runs_calibrate_themselves_and_a_timeout_that_fits_no_longer_does_not_kill_for_ever(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(floor: float, *arguments: Any) -> Started:
        launcher = [
            sys.executable,
            ROOT / "ft_launcher.py",
            "--nproc-per-node=2",
            "--max-restarts=4",
            "--ft-run-dir=runs",
        ]
        return start([*launcher, f"--ft-min-timeout={floor}", "train.py", *arguments])

    # Rank 1 is twice as slow; both agree on what it needs.
    first = run(0.1, 0.05, 40)
    assert first.wait() == 0, first.output
    assert first.output.count("hang detection starts when timeouts have been calculated") == 1
    assert stored(tmp_path)[HEARTBEAT] >= 5 * 0.1

    # A frozen rank is ended by the calculated limit.
    second = run(4, 0.05, 60, "freeze")
    assert second.wait() == 0, second.output
    assert "timeouts in force: " in second.output
    assert re.search(r"rank 1 .* hung: no heartbeat for 4\.\d s at step 4\d \(calculated limit 4 s\)", second.output)
    assert INITIAL in stored(tmp_path)

    # The next steps take longer than the calculated limit; it has ended ranks twice when it is widened.
    state = json.loads((tmp_path / "state" / "ft_state.json").read_text())
    state["client"]["timeouts"] = {HEARTBEAT: 0.6}
    (tmp_path / "state" / "ft_state.json").write_text(json.dumps(state))
    third = run(0.1, 0.7, 63)
    assert third.wait() == 0, third.output
    assert third.output.count("timeout widened: rank_heartbeat_timeout of 0.6 s ended ranks twice") == 1, third.output
    assert third.output.count("calculated limit 0.6 s); sending") <= 4  # two attempts of two ranks
    assert stored(tmp_path)[HEARTBEAT] > 1.4
    assert not list((tmp_path / "state").glob("killed_rank*"))
    wait_until(lambda: not list((tmp_path / "state").glob(".*")), 5, "no unfinished file")
