"""Calculated timeouts: the arithmetic, the client with a pipe of the test's, and real Lightning trainings."""

from __future__ import annotations

import datetime
import json
import logging
import math
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
from ft_callback import FaultToleranceCallback
from ft_monitor import (
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    RankMonitorClient,
    RankMonitorClientError,
    maximum_of_ranks,
    read_kills,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints for small trainings

HEARTBEAT = "rank_heartbeat_timeout"
INITIAL = "initial_rank_heartbeat_timeout"
FIRST_BATCH = "rank_section_timeouts[first_batch]"
CHECKPOINTING = "rank_section_timeouts[checkpointing]"
FINISHING = "rank_section_timeouts[finishing]"
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


def test_a_timeout_is_not_shorter_than_what_was_just_seen_nor_if_it_may_not_fade_than_the_earlier_one() -> None:
    assert ft_monitor.calculated_timeout(30, 1.5, 1, 10) == 30
    assert ft_monitor.calculated_timeout(4, 5, 1, 100, fades=False) == 100
    assert ft_monitor.calculated_timeout(40, 5, 1, 100, fades=False) == 200


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
        [],
        {"version": 0, "timeouts": {}},
        {"version": 1},
        {"version": 1, "timeouts": {"x": 1}},
        {"version": 1, "timeouts": {HEARTBEAT: -1}},
        {"version": 1, "timeouts": {}, "killed": {HEARTBEAT: math.inf}},
        {"version": 1, "timeouts": {}, "killed": 5},
        {"version": 1, "timeouts": {}, "included": 5},
    ],
)
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    with pytest.raises(ConfigError):
        RankMonitorClient().load_state_dict(state)


def test_an_empty_state_as_of_a_checkpoint_from_before_changes_nothing() -> None:
    client = RankMonitorClient()
    client.load_state_dict({"version": 1, "timeouts": {HEARTBEAT: 7}})
    client.load_state_dict({})
    assert client.calculated == {HEARTBEAT: 7}


def test_until_a_run_has_seen_what_earlier_values_came_from_the_heartbeat_timeout_only_grows(
    heard: Heard, clock: Time
) -> None:
    """Else it would halve with each attempt that crashes before its first validation, until that one seems hung."""
    state: dict[str, Any] = {"version": 1, "timeouts": {HEARTBEAT: 100}, "included": ["validation"]}
    for _ in range(3):  # attempts
        client = RankMonitorClient()
        client.load_state_dict(state)
        client.init_workload_monitoring()
        beat(client, clock, 2, 4)
        client.calculate_and_set_hb_timeouts(calc_initial=False)
        state = client.state_dict()
        assert state["timeouts"] == {HEARTBEAT: 100} and state["included"] == ["validation"]
    client.saw("validation")
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.calculated[HEARTBEAT] == (20 + 100) / 2


def test_a_time_that_was_suspended_is_not_work(heard: Heard, clock: Time) -> None:
    """Nothing else outlives a limit: the monitor, suspended too, starts its clocks anew, but the client's go on."""
    client = RankMonitorClient()
    client.load_state_dict({"version": 1, "timeouts": {HEARTBEAT: 10}})
    client.init_workload_monitoring()
    beat(client, clock, 1, 2, 3600)
    assert client.hb_timeouts.subsequent == 10
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.hb_timeouts.subsequent == (2 * 5 + 10) / 2


def test_heartbeat_timeouts_rest_after_a_first_batch_that_took_longer_than_they_are(heard: Heard, clock: Time) -> None:
    for seconds, rests in ((9, False), (11, True)):
        client = RankMonitorClient()
        client.load_state_dict({"version": 1, "timeouts": {HEARTBEAT: 10, "rank_section_timeouts[first_batch]": 100}})
        client.init_workload_monitoring(measure=["first_batch"])
        client.start_section("first_batch")
        clock.now += seconds
        client.end_section("first_batch")
        assert (HEARTBEAT not in heard()[-1].get("calculated", {HEARTBEAT: 10})) is rests
        client.shutdown_workload_monitoring()


def test_more_sections_than_fit_into_a_message_are_one_clear_error(heard: Heard, clock: Time) -> None:
    client = RankMonitorClient()
    client.init_workload_monitoring(measure=[f"pipeline_stage_{number:03}" for number in range(90)])
    for name in sorted(client._clocks.measured):
        client.start_section(name)
        clock.now += 1
        client.end_section(name)
    with pytest.raises(RankMonitorClientError, match=r"timeouts of 90 sections take 4,\d+ bytes, at most 4,096"):
        client.calculate_and_set_section_timeouts(calc_out_of_section=False)


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


def loaded(timeouts: dict[str, float], killed: dict[str, int] | None = None) -> RankMonitorClient:
    client = RankMonitorClient()
    client.load_state_dict({"version": 1, "timeouts": timeouts, "killed": killed or {}})
    return client


def test_a_timeout_that_ended_ranks_twice_with_no_new_step_is_widened(heard: Heard) -> None:
    client = loaded({HEARTBEAT: 2.0})
    assert client.judge({HEARTBEAT: 7}) == []
    assert client.judge({HEARTBEAT: 9}) == []  # with new steps in between
    (line,) = client.judge({HEARTBEAT: 9})
    assert "rank_heartbeat_timeout of 2 s ended ranks twice, and got no further than step 9, and is now 10 s" in line
    assert client.calculated == {HEARTBEAT: 10.0}


@pytest.mark.parametrize(
    ("first", "second", "widens"), [(41, 40, True), (-1, -1, True), (-1, 3, False), (40, 41, False)]
)
def test_new_steps_between_two_kills_speak_for_the_timeout(heard: Heard, first: int, second: int, widens: bool) -> None:
    client = loaded({HEARTBEAT: 3}, {HEARTBEAT: first})
    assert bool(client.judge({HEARTBEAT: second})) is widens


def test_a_timeout_is_widened_from_what_was_in_force_and_at_least_doubled(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_CONFIG", '{"min_timeout": 10, "safety_factor": 1}')
    client = loaded({HEARTBEAT: 1}, {HEARTBEAT: 9})
    client.judge({HEARTBEAT: 9})
    assert client.calculated == {HEARTBEAT: 20}


def test_what_made_the_first_batch_slower_most_likely_does_so_with_the_next_ones(heard: Heard) -> None:
    """Else a change of work would cost two kills more than the usual three restarts allow."""
    client = loaded({HEARTBEAT: 3, FIRST_BATCH: 4}, {FIRST_BATCH: 60})
    assert len(client.judge({FIRST_BATCH: 60})) == 2
    assert client.calculated == {HEARTBEAT: 15, FIRST_BATCH: 20}


def test_a_kill_is_forgotten_with_later_steps_but_not_with_those_that_lead_to_it_again(
    heard: Heard, clock: Time
) -> None:
    """A save that takes longer than its limit, more than 16 batches after the start, would else be ended for ever."""
    client = loaded({HEARTBEAT: 3}, {CHECKPOINTING: 60})
    client.init_workload_monitoring()
    for step, killed in ((58, {CHECKPOINTING: 60}), (60, {CHECKPOINTING: 60}), (61, {})):
        for _ in range(2):
            clock.now += 1
            client.send_heartbeat(step)
        client.calculate_and_set_hb_timeouts(calc_initial=False)
        assert client.killed == killed
        assert client.state_dict().get("killed", {}) == killed


def test_notes_of_kills_are_read_and_the_highest_step_counts(tmp_path: Path) -> None:
    texts = [
        '{"setting": "a", "step": 4}', '{"setting": "a", "step": 9}', "{", '{"setting": "b", "step": null}',
        '{"setting": "c", "step": "x"}', '{"setting": "c", "step": Infinity}', "[1]", "[" * 100_000,
    ]  # fmt: skip
    for rank, text in enumerate(texts):
        (tmp_path / f"killed_rank{rank}.json").write_text(text)
    assert read_kills(sorted(tmp_path.iterdir())) == {"a": 9, "b": -1}


@pytest.mark.parametrize("calculate", [True, False])
def test_what_ended_ranks_twice_is_widened_also_by_a_callback_that_calculates_nothing(
    heard: Heard, tmp_path: Path, calculate: bool
) -> None:
    state = {"version": 1, "timeouts": {HEARTBEAT: 30.0}, "killed": {HEARTBEAT: 7}}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ft_state.json").write_text(json.dumps(state))
    (tmp_path / "state" / "killed_rank0.json").write_text(json.dumps({"setting": HEARTBEAT, "step": 7}))
    fit(tmp_path, calculate=calculate, max_steps=1)
    assert stored(tmp_path)[HEARTBEAT] == 150
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["ft_state.json"]


BROKEN = [
    "", "{", "[]", "null", '{"version": 0}', '{"version": 1, "client": 5}', '{"a": "foreign"}', "\ud800",
    '{"version": 1, "timeouts": {"rank_heartbeat_timeout": "x"}}', "[" * 100_000,
    '{"version": 1, "timeouts": {}, "killed": {"x": Infinity}}',
]  # fmt: skip


def fit(directory: Path, *callbacks: Callback, calculate: bool = True, **options: Any) -> Trainer:
    keep = ModelCheckpoint(directory / "checkpoints", save_last=True, every_n_train_steps=10)
    callback = FaultToleranceCallback(autoresume=False, calculate_timeouts=calculate, exp_dir=directory / "state")
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=directory, callbacks=[callback, keep, *callbacks],
        **{"max_steps": 30, "limit_train_batches": 30, "limit_val_batches": 0, **options},
    )  # fmt: skip
    trainer.fit(BoringModel(), ckpt_path="last")
    return trainer


def stored(directory: Path) -> dict[str, float]:
    path = directory / "state" / "ft_state.json"
    return dict(json.loads(path.read_text())["timeouts"])


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


def in_force(trainer: Trainer) -> float | None:
    """The timeout of heartbeats that is in force."""
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, FaultToleranceCallback)]  # type: ignore[attr-defined]
    return callback._client.hb_timeouts.subsequent


def state_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "state" / "ft_state.json").read_text()))


def test_heartbeat_timeouts_rest_in_validation_until_one_was_seen_and_included(heard: Heard, tmp_path: Path) -> None:
    seen: list[float | None] = []

    class Look(Callback):
        def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
            seen.append(in_force(trainer))

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 25:
                seen.append(in_force(trainer))

    options: dict[str, Any] = {
        "limit_val_batches": 1,
        "val_check_interval": 20,
        "num_sanity_val_steps": 0,
        "limit_train_batches": 50,
    }
    fit(tmp_path, Look(), **options, max_steps=45)
    assert seen == [None, 1, 1]  # first validation, training, second validation
    assert state_of(tmp_path)["included"] == ["save", "validation"]


def test_a_validation_that_no_heartbeat_timeout_includes_rests_it_in_the_next_run_too(
    heard: Heard, tmp_path: Path
) -> None:
    fit(tmp_path, limit_val_batches=1, val_check_interval=5, num_sanity_val_steps=0, max_steps=9)
    assert "included" not in state_of(tmp_path)  # without a save


def test_heartbeat_timeouts_rest_in_the_first_turn_of_an_epoch_and_then_include_it(
    heard: Heard, tmp_path: Path
) -> None:
    """DataLoader workers start there, and callbacks do what they do at the end of an epoch."""
    seen: list[float | None] = []

    class Slow(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step in (20, 45):
                seen.append(in_force(trainer))

        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            seen.append(in_force(trainer))
            time.sleep(0.3 if trainer.current_epoch == 0 else 0)

    fit(tmp_path, Slow(), limit_train_batches=30, max_steps=65, max_epochs=9)
    training, first_turn, training_again, second_turn = seen[:4]
    assert (training, first_turn) == (1, None)
    assert training_again is not None and training_again >= 1.5 and second_turn == training_again
    assert state_of(tmp_path)["included"] == ["epoch turn", "save"]


def test_attempts_that_do_not_reach_what_the_heartbeat_timeout_came_from_do_not_shorten_it(
    heard: Heard, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    state = {"version": 1, "timeouts": {HEARTBEAT: 100}, "included": ["epoch turn", "save", "validation"]}
    (tmp_path / "state" / "ft_state.json").write_text(json.dumps(state))
    options: dict[str, Any] = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 9}
    fit(tmp_path, **options, max_steps=29)
    assert stored(tmp_path)[HEARTBEAT] == 100
    fit(tmp_path, **options, max_steps=75)
    assert 50 <= stored(tmp_path)[HEARTBEAT] < 60


@pytest.mark.parametrize("waits_for_a_save", [False, True])
def test_timeouts_are_calculated_without_a_modelcheckpoint_too_after_an_epoch(
    heard: Heard, tmp_path: Path, waits_for_a_save: bool
) -> None:
    """A save that comes nevertheless has no limit yet, and the clock of heartbeats would go on in it."""
    seen: list[float | None] = []

    class Save(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 35:
                seen.append(in_force(trainer))
                trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
                seen.append(in_force(trainer))

        def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
            seen.append(in_force(trainer))

    callback = FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir=tmp_path / "state")
    Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=waits_for_a_save, max_steps=40, limit_train_batches=20, limit_val_batches=0,
        callbacks=[callback, Save(), *[ModelCheckpoint(tmp_path, every_n_train_steps=1000)] * waits_for_a_save],
    ).fit(BoringModel())  # fmt: skip
    assert seen == [None if waits_for_a_save else 1, None, 1]


def test_while_training_finishes_and_after_saves_there_is_a_heartbeat_before_its_timeout_comes_into_force(
    heard: Heard, tmp_path: Path
) -> None:
    """Saving and finishing may have taken longer than that."""

    class Export(Callback):
        def on_train_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "export.ckpt")

    fit(tmp_path, Export())
    in_force, beaten, finishing = False, True, False  # as the monitor sees it
    for message in heard():
        if message["type"] == "section":
            beaten = message["open"] and beaten
            finishing = message["open"] if message["name"] == "finishing" else finishing
        elif message["type"] == "heartbeat":
            beaten = True
        elif message["type"] == "timeouts":
            in_force = HEARTBEAT in message["calculated"]
            assert beaten
        assert not (finishing and in_force)
    assert in_force


def test_that_steps_are_not_watched_is_said_also_when_a_section_is(
    heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ft_state.json").write_text(json.dumps({"version": 1, "timeouts": {FINISHING: 7}}))
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        fit(tmp_path, max_steps=1)
    assert "timeouts in force: rank_section_timeouts[finishing]=7" in caplog.text
    assert "hang detection starts when timeouts have been calculated" in caplog.text


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
SLOW_SECONDS = 1.0  # a step after the last save takes so long: only a calculation at the end takes it in

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


@pytest.mark.parametrize(("action", "calculates", "code"), ENDS.values(), ids=ENDS)
def test_at_an_end_and_a_clean_stop_timeouts_are_calculated_and_gloo_is_destroyed_but_never_on_a_failure(
    start: Callable[..., Started], tmp_path: Path, action: str, calculates: bool, code: int
) -> None:
    """With one rank, and with two, at the same time."""
    jobs = {}
    for ranks in (1, 2):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        (directory / "train.py").write_text(ENDING)
        command = [sys.executable, ROOT / "ft_launcher.py", f"--nproc-per-node={ranks}", "--ft-min-timeout=3"]
        jobs[ranks] = start([*command, "--ft-run-dir=runs", "train.py", SLOW_SECONDS, action], cwd=directory)
        (directory / "launcher.pid").write_text(str(jobs[ranks].pid))
    for ranks, job in jobs.items():
        assert job.wait() == code, job.output
        assert (stored(tmp_path / str(ranks))[HEARTBEAT] >= SLOW_SECONDS * 5) is calculates, job.output
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

SLOW_STEPS = """
import runpy, sys, time, torch
pause = float(sys.argv.pop(1))
sys.argv.pop(0)
step = torch.optim.AdamW.step

def slow(*args, **options):
    time.sleep(pause)
    return step(*args, **options)

torch.optim.AdamW.step = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_plain_loop_whose_steps_have_become_longer_recovers(start: Callable[..., Started], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_STEPS)

    def run(pause: float, steps: int) -> Started:
        launcher = [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", "--max-restarts=3"]
        example = [ROOT / "examples" / "train_pytorch.py", f"--steps={steps}", "--save-every=20"]
        options = ["--ft-min-timeout=1.5", "--ft-run-dir=runs", "slow.py", pause]
        return start([*launcher, *options, *example], PYTHONPATH=str(ROOT))

    first = run(0, 20)
    assert first.wait() == 0, first.output
    timeouts = json.loads((tmp_path / "checkpoints" / "ft_state.json").read_text())["timeouts"]
    assert set(timeouts) == {HEARTBEAT, INITIAL, FIRST_BATCH, CHECKPOINTING, "rank_section_timeouts[setup]"}
    limit = timeouts[FIRST_BATCH]
    second = run(limit + 1, 22)
    assert second.wait() == 0, second.output
    assert "timeout widened: rank_section_timeouts[first_batch]" in second.output
    assert "timeout widened: rank_heartbeat_timeout" in second.output
    assert second.output.count("sending SIGKILL") <= 4, second.output  # two attempts of two ranks


SCRIPT = """
import os, sys, time
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from ft_callback import FaultToleranceCallback

pause, steps, fault = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

class Model(BoringModel):
    is_first = True  # a slow first batch would let the timeout of heartbeats rest

    def training_step(self, batch, batch_idx):
        time.sleep(0 if self.is_first else pause * (1 + int(os.environ["RANK"])))
        self.is_first = False
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
    state["timeouts"].update({HEARTBEAT: 3, FIRST_BATCH: 100})
    (tmp_path / "state" / "ft_state.json").write_text(json.dumps(state))
    third = run(0.1, 2, 62)
    assert third.wait() == 0, third.output
    assert third.output.count("timeout widened: rank_heartbeat_timeout of 3 s ended ranks twice") == 1, third.output
    assert third.output.count("calculated limit 3 s); sending") <= 4  # two attempts of two ranks
    assert stored(tmp_path)[HEARTBEAT] > 4
    assert not list((tmp_path / "state").glob("killed_rank*"))
    wait_until(lambda: not list((tmp_path / "state").glob(".*")), 5, "no unfinished file")
