"""Timeouts that nobody has to choose: how they are calculated, agreed on, kept, and corrected.

First what is pure, then the client and Lightning in this process, where time is a number that a test adds to, and last
real monitors and launchers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import test_monitor
from conftest import ROOT, Started, wait_until
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import _TunerExitException
from test_monitor import BEAT, BYE, FAILED, INIT, Message, Watch, enter, leave, timeouts

import ft_callback
import ft_monitor
from ft_callback import FaultToleranceCallback, TimeoutState, read_kills
from ft_monitor import (
    Clock,
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    MessageReader,
    RankMonitor,
    RankMonitorClient,
    RankMonitorClientError,
    calculated_timeout,
    encode_message,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints for small trainings

watch = test_monitor.watch

FIRST, STEP, OUTSIDE = "initial_rank_heartbeat_timeout", "rank_heartbeat_timeout", "rank_out_of_section_timeout"
SAVE, LOAD, OTHER = (f"rank_section_timeouts[{name}]" for name in ("save", "load", "other"))
FIRST_BATCH, CHECKPOINTING, FINISHING = (
    f"rank_section_timeouts[{name}]" for name in ("first_batch", "checkpointing", "finishing")
)


# ------------------------------------------------------------------------------------------------------- laps

ALL = FaultToleranceConfig(
    startup_timeout=100,
    initial_rank_heartbeat_timeout=50,
    rank_heartbeat_timeout=30,
    rank_section_timeouts={"save": 70},
    rank_out_of_section_timeout=40,
    exit_timeout=60,
)
BEATING = {3: INIT, 5: BEAT}


@pytest.mark.parametrize(
    "history, message, laps",
    [
        ({}, INIT, [("startup_timeout", 20, 100)]),
        ({3: INIT}, BEAT, [(FIRST, 17, 50)]),
        (BEATING, BEAT, [(STEP, 15, 30)]),
        # What has passed when a timed section is entered counts, and not what passes in it; then it starts anew.
        (BEATING, enter("save"), [(OUTSIDE, 17, 40), (STEP, 15, 30)]),
        ({3: INIT}, enter("save"), [(OUTSIDE, 17, 40), (FIRST, 17, 50)]),
        ({**BEATING, 9: enter("save")}, BEAT, []),
        ({**BEATING, 9: enter("save")}, leave("save"), [(SAVE, 11, 70)]),
        ({**BEATING, 9: enter("save"), 12: leave("save")}, BEAT, [(STEP, 8, 30)]),
        ({3: INIT, 9: enter("save"), 12: leave("save")}, BEAT, [(FIRST, 8, 50)]),
        ({**BEATING, 9: enter("save"), 12: leave("save")}, enter("save"), [(OUTSIDE, 8, 40), (STEP, 8, 30)]),
        # A measured section is timed, as one with a limit.
        (BEATING, enter("load"), [(OUTSIDE, 17, 40), (STEP, 15, 30)]),
        ({**BEATING, 9: enter("load")}, BEAT, []),
        ({**BEATING, 9: enter("load")}, leave("load"), [(LOAD, 11, None)]),
        ({**BEATING, 9: enter("load"), 12: leave("load")}, BEAT, [(STEP, 8, 30)]),
        # Any other is not: heartbeats go on in it.
        (BEATING, enter("other"), [(OUTSIDE, 17, 40)]),
        ({**BEATING, 9: enter("other")}, BEAT, [(STEP, 15, 30)]),
        ({**BEATING, 9: enter("other")}, leave("other"), [(OTHER, 11, None)]),
        ({**BEATING, 9: enter("other"), 12: leave("other")}, BEAT, [(STEP, 15, 30)]),
        # Of two sections, each has a lap of its own, and heartbeats rest until both are left.
        ({**BEATING, 9: enter("save"), 10: enter("load")}, leave("save"), [(SAVE, 11, 70)]),
        ({**BEATING, 9: enter("save"), 10: enter("load"), 12: leave("load")}, BEAT, []),
        # The end stops everything, and a new beginning stops the clock of the end.
        (BEATING, BYE, [(OUTSIDE, 17, 40), (STEP, 15, 30)]),
        ({**BEATING, 9: enter("save")}, FAILED, [(SAVE, 11, 70)]),
        ({**BEATING, 9: FAILED}, INIT, [("exit_timeout", 11, 60)]),
        ({**BEATING, 9: BYE}, INIT, []),
        # What tells nothing of the rank's life stops nothing.
        (BEATING, {"type": "saved", "step": 1}, []),
        (BEATING, timeouts(rank_heartbeat_timeout=5), []),
        (BEATING, leave("save"), []),
        ({**BEATING, 9: enter("save")}, enter("save"), []),
    ],
)  # fmt: skip
def test_a_message_stops_the_clocks_that_wait_for_it(
    history: Mapping[int, Message], message: Message, laps: list[tuple[str, float, float | None]]
) -> None:
    clocks = Clocks(ALL, 0, measured=frozenset({"load"}))
    for now, earlier in history.items():
        clocks.hear(earlier, now)
    assert clocks.hear(message, 20) == laps


def test_a_lap_has_the_limit_that_was_in_force_when_it_ended() -> None:
    clocks = Clocks(ALL, 0)
    for now, message in {**BEATING, 9: timeouts(rank_heartbeat_timeout=25)}.items():
        clocks.hear(message, now)
    assert clocks.hear(BEAT, 20) == [(STEP, 15, 25)]
    clocks.hear(timeouts(), 21)
    assert clocks.hear(BEAT, 22) == [(STEP, 2, 30)]


# ----------------------------------------------------------------------------------------------- calculations


@pytest.mark.parametrize(
    "longest, factor, floor, earlier, expected",
    [
        (4, 5, 10, None, 20),
        (4, 2.5, 10, None, 10),
        (1, 5, 10, None, 10),
        (4, 5, 10, 100, 60),
        (100, 5, 10, 4, 252),
        (4, 5, 70, 100, 70),
        (0.12345678, 1, 0.01, None, 0.123),
    ],
)
def test_a_timeout_is_the_longest_time_with_a_margin_not_below_the_floor_and_the_mean_with_an_earlier_one(
    longest: float, factor: float, floor: float, earlier: float | None, expected: float
) -> None:
    assert calculated_timeout(longest, factor, floor, earlier) == expected


@pytest.mark.xfail(strict=True, reason="with a factor below 2, the mean with an earlier timeout may be less")
def test_no_timeout_is_shorter_than_the_longest_time_that_was_seen() -> None:
    assert calculated_timeout(longest=100, factor=1.5, floor=1, earlier=10) > 100


def test_calculated_timeouts_replace_those_of_the_same_name_and_leave_the_configuration_alone() -> None:
    config = ALL.with_calculated({STEP: 7, SAVE: 8, LOAD: 9})
    expected = {**ALL.timeouts(), STEP: 7, SAVE: 8, LOAD: 9}
    assert config.timeouts() == expected
    assert ALL.timeouts()[STEP] == 30 and LOAD not in ALL.timeouts()
    assert config.with_calculated({}) == config


@pytest.mark.parametrize(
    "name", ["startup_timeout", "exit_timeout", "safety_factor", "rank_section_timeouts", "heartbeat", "sections[save]"]
)
def test_a_timeout_that_is_not_one_of_those_that_are_calculated_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)):
        ALL.with_calculated({STEP: 7, name: 5})


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon", True])
@pytest.mark.parametrize("name", [STEP, SAVE])
def test_a_calculated_timeout_that_is_no_time_is_refused(name: str, seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a number greater than 0"):
        ALL.with_calculated({name: seconds})


# -------------------------------------------------------------------------------------- what is kept in a file


def stored(**timeouts: float) -> dict[str, Any]:
    return {"version": 1, "timeouts": timeouts}


def test_what_was_saved_is_loaded_again_and_the_file_is_one_that_people_can_read(tmp_path: Path) -> None:
    state = TimeoutState(stored(**{STEP: 12.5, SAVE: 30.0}), validated=True, killed={STEP: 7})
    path = tmp_path / "ft_state.json"
    state.save(path)
    assert TimeoutState.load(path) == state
    assert f'"{STEP}": 12.5' in path.read_text()
    assert set(json.loads(path.read_text())) == {"version", "client", "validated", "killed", "time"}
    assert [found.name for found in tmp_path.iterdir()] == ["ft_state.json"]


def test_without_a_file_there_is_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TimeoutState.load(tmp_path / "ft_state.json")


def test_the_first_kill_by_a_timeout_is_noted_and_the_second_at_the_same_step_widens_it() -> None:
    state = TimeoutState(stored(**{STEP: 10.0, SAVE: 30.0}))
    assert state.judge({STEP: 7}, factor=5) == []
    assert (state.client["timeouts"], state.killed) == ({STEP: 10, SAVE: 30}, {STEP: 7})
    (line,) = state.judge({STEP: 7}, factor=5)
    assert line == f"{STEP} of 10 s ended ranks twice at step 7 and is now 50 s"
    assert state.client["timeouts"] == {STEP: 50, SAVE: 30}
    assert len(state.judge({STEP: 7}, factor=5)) == 1 and state.client["timeouts"][STEP] == 250
    assert state.judge({}, factor=5) == []


@pytest.mark.parametrize(
    "kills, timeout",
    [
        ([7, 8, 9], 10),  # training gets further each time: each may be a hang
        ([7, 6], 50),  # not even as far as the first time
        ([7, 8, 8], 50),
        ([0, 0], 50),
        ([-1, -1], 50),  # before the first heartbeat with a step
        ([7, 9, 8, 9], 250),
    ],
)
def test_a_timeout_is_widened_when_it_kills_with_no_new_step_in_between(kills: list[int], timeout: float) -> None:
    state = TimeoutState(stored(**{STEP: 10.0}))
    for step in kills:
        state.judge({STEP: step}, factor=5)
    assert state.client["timeouts"] == {STEP: timeout}


def test_a_kill_by_another_timeout_or_by_one_that_is_calculated_no_more_widens_nothing() -> None:
    state = TimeoutState(stored(**{STEP: 10.0, SAVE: 30.0}))
    for kills in ({STEP: 7}, {SAVE: 7}, {LOAD: 7}, {LOAD: 7}):
        assert state.judge(kills, factor=5) == []
    assert state.client["timeouts"] == {STEP: 10, SAVE: 30}


def test_of_several_notes_the_highest_step_of_each_timeout_counts_and_broken_ones_do_not(tmp_path: Path) -> None:
    notes = {
        "a": {"setting": STEP, "limit": 10, "step": 7},
        "b": {"setting": STEP, "limit": 10, "step": 9},
        "c": {"setting": STEP, "limit": 10, "step": None},
        "d": {"setting": SAVE, "limit": 30, "step": None},
        "e": {"limit": 10},
        "f": [],
    }
    for name, verdict in notes.items():
        (tmp_path / name).write_text(json.dumps(verdict))
    (tmp_path / "g").write_text('{"setting": "rank_he')
    assert read_kills(sorted(tmp_path.iterdir())) == {STEP: 9, SAVE: -1}
    assert read_kills([tmp_path / "gone"]) == {}


# -------------------------------------------------------------------------------------------- in this process


class FakeMonitor:
    """In the place of this rank's monitor, with its real clocks, and of the time, which passes when a test says so."""

    def __init__(self, read_end: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.messages: list[Message] = []
        self.killed: list[Clock] = []  # the clocks that would have ended the rank
        self._read_end, self._reader, self._monkeypatch = read_end, MessageReader(), monkeypatch
        self.configure(min_timeout=1)

    def configure(self, **settings: Any) -> None:
        self._monkeypatch.setenv("FT_CONFIG", json.dumps(settings))
        self.clocks = Clocks(FaultToleranceConfig(**settings), self.now)

    def hear(self) -> None:
        try:
            messages = self._reader.feed(os.read(self._read_end, 1 << 20))
        except BlockingIOError:
            return
        for message in messages:
            self.clocks.hear(message, self.now)
            self._enforce()
        self.messages += messages

    def spend(self, seconds: float) -> None:
        self.hear()
        self.now += seconds
        self._enforce()

    @property
    def in_force(self) -> dict[str, float]:
        self.hear()
        return self.clocks.config.timeouts()

    def sent(self, kind: str) -> list[Message]:
        self.hear()
        return [message for message in self.messages if message["type"] == kind]

    def _enforce(self) -> None:
        clock = self.clocks.first()
        if clock is not None and self.now >= clock.deadline:
            self.killed.append(clock)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMonitor]:
    for name in [name for name in os.environ if name.startswith(("FT_", "FAULT_TOL", "RANK", "SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    for package in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(f"{package}.utilities.rank_zero"), "level", logging.ERROR)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    reader, writer = Pipe(duplex=False)
    os.set_blocking(reader.fileno(), False)
    monkeypatch.setenv("FT_MONITOR_FD", str(writer.fileno()))
    monitor = FakeMonitor(reader.fileno(), monkeypatch)
    monkeypatch.setattr(ft_monitor, "time", types.SimpleNamespace(monotonic=lambda: monitor.now))
    yield monitor
    reader.close()
    writer.close()


def connect(monitor: FakeMonitor, *measure: str, **settings: Any) -> RankMonitorClient:
    monitor.configure(**{"min_timeout": 1, **settings})
    client = RankMonitorClient()
    client.init_workload_monitoring(measure)
    return client


def beat(client: RankMonitorClient, monitor: FakeMonitor, *seconds: float) -> None:
    """A heartbeat after each of so many seconds."""
    for each in seconds:
        monitor.spend(each)
        client.send_heartbeat()


def stay(client: RankMonitorClient, monitor: FakeMonitor, section: str, seconds: float) -> None:
    client.start_section(section)
    monitor.spend(seconds)
    client.end_section(section)


# -- calculating


def test_what_is_calculated_is_in_force_at_once_for_the_client_and_for_its_monitor(monitor: FakeMonitor) -> None:
    client = connect(monitor, "save", rank_heartbeat_timeout=600, rank_section_timeouts={"load": 300})
    assert client.hb_timeouts == (None, 600, False)
    assert client.section_timeouts == ({"load": 300}, None, set(), False)
    beat(client, monitor, 3, 1, 4)
    stay(client, monitor, "save", 20)
    stay(client, monitor, "load", 10)
    configured = {STEP: 600, LOAD: 300}
    assert monitor.in_force == client.timeouts_in_force() == configured

    assert client.calculate_and_set_section_timeouts(calc_out_of_section=False) is True
    client.send_heartbeat()
    assert client.calculate_and_set_hb_timeouts() is True
    calculated = {FIRST: 15, STEP: 20, SAVE: 100, LOAD: 50}
    assert monitor.in_force == client.timeouts_in_force() == client.calculated == calculated
    assert client.hb_timeouts == (15, 20, True)
    assert client.section_timeouts == ({"load": 50, "save": 100}, None, {"load", "save"}, False)
    assert monitor.killed == []


def test_only_what_is_asked_for_is_calculated(monitor: FakeMonitor) -> None:
    client = connect(monitor, "save", "load")
    beat(client, monitor, 3, 4)
    stay(client, monitor, "save", 20)
    stay(client, monitor, "other", 7)
    assert client.calculate_and_set_section_timeouts(["save"], calc_out_of_section=False)
    assert client.calculated == {SAVE: 100}
    assert client.calculate_and_set_section_timeouts({"other": None}, calc_out_of_section=False)
    assert client.calculated == {SAVE: 100, OTHER: 35}
    client.send_heartbeat()
    assert client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.calculated == {SAVE: 100, OTHER: 35, STEP: 20}
    assert client.calculate_and_set_section_timeouts([])
    assert client.calculated == {SAVE: 100, OTHER: 35, STEP: 20, OUTSIDE: 35}


def test_the_time_outside_of_sections_that_still_runs_counts(monitor: FakeMonitor) -> None:
    client = connect(monitor)
    stay(client, monitor, "save", 2)
    monitor.spend(30)
    client.calculate_and_set_section_timeouts([])
    assert client.calculated == {OUTSIDE: 150}
    monitor.spend(100)
    assert monitor.killed == []


def test_all_that_is_asked_for_must_have_been_seen_and_else_nothing_changes(monitor: FakeMonitor) -> None:
    client = connect(monitor, "save", "load")
    stay(client, monitor, "save", 20)
    beat(client, monitor, 3)  # the first: no time between two has been seen
    for calculate, missing in (
        (client.calculate_and_set_hb_timeouts, [STEP]),
        (client.calculate_and_set_section_timeouts, [LOAD]),
        (lambda **options: client.calculate_and_set_section_timeouts(["save", "x", "y"], **options),
         ["rank_section_timeouts[x]", "rank_section_timeouts[y]"]),
    ):  # fmt: skip
        assert calculate(skip_if_not_ready=True) is False
        with pytest.raises(RankMonitorClientError, match=re.escape(f"not enough data to calculate {missing[0]}")) as no:
            calculate()
        assert all(name in str(no.value) for name in missing)
        assert not any(name in str(no.value) for name in {FIRST, STEP, SAVE, LOAD, OUTSIDE} - set(missing))
    assert client.calculated == {} and monitor.sent("timeouts") == []


def test_without_a_connection_nothing_can_be_calculated() -> None:
    for calculate in (
        RankMonitorClient().calculate_and_set_hb_timeouts,
        RankMonitorClient().calculate_and_set_section_timeouts,
    ):
        with pytest.raises(RankMonitorClientError, match=r"call init_workload_monitoring\(\) first"):
            calculate(skip_if_not_ready=True)


def test_a_measured_section_that_has_no_timeout_counts_as_a_part_of_a_step(monitor: FakeMonitor) -> None:
    """Its clock does not rest heartbeats for the monitor, which has no limit for it."""
    client = connect(monitor, "save", "load")
    for _ in range(2):
        beat(client, monitor, 4)
        stay(client, monitor, "save", 20)
        stay(client, monitor, "load", 10)
    client.send_heartbeat()
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.calculated == {STEP: 5 * (4 + 20 + 10)}
    client.calculate_and_set_section_timeouts(["save"], calc_out_of_section=False)
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.calculated == {STEP: 5 * (4 + 10), SAVE: 100}


@pytest.mark.xfail(strict=True, reason="a section that is configured as 'none' is taken for one with a limit")
def test_so_does_one_whose_timeout_is_configured_as_none(monitor: FakeMonitor) -> None:
    client = connect(monitor, rank_section_timeouts={"save": None})
    beat(client, monitor, 4, 4)
    stay(client, monitor, "save", 20)
    client.send_heartbeat()
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    stay(client, monitor, "save", 25)
    client.send_heartbeat()
    assert monitor.killed == [] and client.calculated == {STEP: 5 * (4 + 20)}


@pytest.mark.xfail(strict=True, reason="it is added to the timeout between heartbeats alone")
def test_a_measured_section_without_a_timeout_counts_for_the_first_heartbeat_too(monitor: FakeMonitor) -> None:
    client = connect(monitor, "setup")
    stay(client, monitor, "setup", 20)
    beat(client, monitor, 3, 1)
    client.calculate_and_set_hb_timeouts()
    state = client.state_dict()
    client.shutdown_workload_monitoring()
    second = RankMonitorClient()
    second.load_state_dict(state)
    second.init_workload_monitoring(["setup"])
    stay(second, monitor, "setup", 20)
    beat(second, monitor, 3)
    assert monitor.killed == []


@pytest.mark.xfail(strict=True, reason="its clock has run since the last heartbeat, and the limit is younger")
def test_a_limit_that_comes_into_force_after_a_long_section_does_not_end_the_rank_at_once(
    monitor: FakeMonitor,
) -> None:
    client = connect(monitor, "save")
    beat(client, monitor, 1, 1)
    stay(client, monitor, "save", 60)  # for the monitor, without a limit yet
    client.calculate_and_set_section_timeouts(calc_out_of_section=False)
    client.calculate_and_set_hb_timeouts()
    assert monitor.in_force[STEP] == 5
    assert monitor.killed == []


# -- earlier runs


def test_timeouts_of_an_earlier_run_are_in_force_from_the_connection_on_or_from_then_on(monitor: FakeMonitor) -> None:
    first = connect(monitor, "save")
    beat(first, monitor, 3, 4)
    stay(first, monitor, "save", 20)
    first.calculate_and_set_section_timeouts(calc_out_of_section=False)
    first.calculate_and_set_hb_timeouts()
    state = json.loads(json.dumps(first.state_dict()))
    first.shutdown_workload_monitoring()

    before, after = RankMonitorClient(), RankMonitorClient()
    before.load_state_dict(state)
    before.init_workload_monitoring()
    assert monitor.sent("timeouts")[-1]["calculated"] == {FIRST: 15, STEP: 20, SAVE: 100}
    assert before.state_dict() == state and before.hb_timeouts == (15, 20, True)
    before.shutdown_workload_monitoring()

    monitor.configure(min_timeout=1)
    after.init_workload_monitoring()
    assert monitor.in_force == {}
    after.load_state_dict(state)
    assert monitor.in_force == {FIRST: 15, STEP: 20, SAVE: 100}
    assert after.section_timeouts == ({"save": 100}, None, {"save"}, False)


def test_an_outlier_fades_from_run_to_run_but_not_within_one(monitor: FakeMonitor) -> None:
    state, kept = stored(**{STEP: 400.0}), []
    for _ in range(3):
        client = connect(monitor)
        client.load_state_dict(state)
        beat(client, monitor, 1, 10)
        for _ in range(2):  # however often: this run's part is the same
            client.calculate_and_set_hb_timeouts(calc_initial=False)
        state = client.state_dict()
        kept.append(client.calculated[STEP])
        client.shutdown_workload_monitoring()
    assert kept == [225, 137.5, 93.75]


def test_a_timeout_of_an_earlier_run_is_not_in_force_below_the_floor_of_this_one(monitor: FakeMonitor) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{STEP: 0.25, SAVE: 0.3, FIRST: 90.0}))
    monitor.configure(min_timeout=30)
    client.init_workload_monitoring()
    assert monitor.in_force == client.timeouts_in_force() == {STEP: 30, SAVE: 30, FIRST: 90}
    assert client.hb_timeouts == (90, 30, True)


@pytest.mark.parametrize("seconds", [None, 0, float("nan"), float("inf"), "soon", True, [5]])
def test_a_state_with_a_timeout_that_is_no_time_is_refused_and_changes_nothing(
    monitor: FakeMonitor, seconds: Any
) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{STEP: 7}))
    for timeouts in ({SAVE: seconds}, {STEP: seconds}, {"exit_timeout": 5}):
        with pytest.raises(ConfigError):
            client.load_state_dict({"version": 1, "timeouts": timeouts})
    assert client.state_dict() == stored(**{STEP: 7})


# -- correcting


def test_timeouts_that_are_set_aside_leave_those_that_were_configured_and_the_others_in_force(
    monitor: FakeMonitor,
) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{STEP: 20, SAVE: 100, LOAD: 50}))
    monitor.configure(min_timeout=1, rank_heartbeat_timeout=600, rank_section_timeouts={"load": 300})
    client.init_workload_monitoring()
    client.set_timeouts_aside(STEP)
    client.set_timeouts_aside(LOAD)
    assert monitor.in_force == client.timeouts_in_force() == {STEP: 600, SAVE: 100, LOAD: 300}
    assert client.hb_timeouts == (None, 600, False) and client.section_timeouts.calculated_sections == {"save"}
    assert client.state_dict() == stored(**{STEP: 20, SAVE: 100, LOAD: 50}), "later runs have them"
    beat(client, monitor, 1, 500)
    assert monitor.killed == []
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert monitor.in_force == {STEP: (5 * 500 + 20) / 2, SAVE: 100, LOAD: 300}


@pytest.mark.parametrize("setting", [STEP, FIRST, SAVE])
@pytest.mark.parametrize(
    "seconds, timeout",
    [(9, 20), (10, 20), (11, 55), (19, 95)],  # half of 20 s is not much; more is
)
def test_a_calculated_timeout_that_nearly_ran_out_is_wider_at_once(
    monitor: FakeMonitor, setting: str, seconds: float, timeout: float
) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{setting: 20}))
    client.init_workload_monitoring()
    if setting == SAVE:
        stay(client, monitor, "save", seconds)
    else:
        beat(client, monitor, *([seconds] if setting == FIRST else [1, seconds]))
    assert client.calculated == monitor.in_force == {setting: timeout}


def test_one_that_is_wider_already_does_not_become_narrower_by_that(monitor: FakeMonitor) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{STEP: 20}))
    monitor.configure(min_timeout=1, safety_factor=1.5)
    client.init_workload_monitoring()
    beat(client, monitor, 1, 11)
    assert client.calculated == {STEP: 20}


def test_a_timeout_that_people_have_configured_stays_as_it_is(monitor: FakeMonitor) -> None:
    client = RankMonitorClient()
    client.load_state_dict(stored(**{SAVE: 20}))
    monitor.configure(min_timeout=1, rank_heartbeat_timeout=20)
    client.init_workload_monitoring()
    beat(client, monitor, 1, 19)
    assert client.calculated == {SAVE: 20} and monitor.in_force == {STEP: 20, SAVE: 20}


def test_a_slow_clock_is_said_with_its_figures_but_not_at_every_step_that_is_as_slow(
    monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ft_monitor"), "propagate", True)
    watching = RankMonitor([], FaultToleranceConfig(rank_heartbeat_timeout=100, rank_section_timeouts={"save": 100}))
    watching.rank = types.SimpleNamespace(pid=812)  # type: ignore[assignment]
    messages = [(0, INIT), (1, BEAT)]
    for now in (41, 100, 160, 220, 290):  # after 40, 59, 60, 60 and 70 s
        messages.append((now, {"type": "heartbeat", "step": now}))
    messages += [(300, enter("save")), (390, leave("save"))]
    for now, message in messages:
        fields = {name: value for name, value in message.items() if name != "type"}
        watching._take_in(encode_message(message["type"], **fields), now)
    assert caplog.messages == [
        f"rank 0 (pid 812): slow at step 100: 59.0 s, limit 100 s ({STEP})",
        f"rank 0 (pid 812): slow at step 290: 70.0 s, limit 100 s ({STEP})",
        f"rank 0 (pid 812): slow at step 290: 90.0 s, limit 100 s ({SAVE})",
    ]
