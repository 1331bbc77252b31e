"""Limits: clocks with an integer clock, what is learned and kept, and NVIDIA's names for it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Watched

import ft_monitor
from ft_monitor import (
    EXIT,
    HEARTBEAT,
    INITIAL,
    OUT_OF_SECTION,
    STARTUP,
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    RankMonitorClient,
    Report,
    State,
    section_clock,
)

Message = dict[str, Any]
Watch = Callable[..., Watched]
SAVE, LOAD, NEVER = map(section_clock, ("save", "load", "never"))

INIT: Message = {"type": "init", "calculate": False, "state_file": None, "pid": 7}
LEARN: Message = {**INIT, "calculate": True}
BEAT: Message = {"type": "heartbeat", "step": None}
SHUTDOWN: Message = {"type": "shutdown"}
BYE: Message = {"type": "bye", "error": None}


def enter(section: str) -> Message:
    return {"type": "section", "name": section, "open": True}


def leave(section: str) -> Message:
    return {"type": "section", "name": section, "open": False}


def settings(**values: Any) -> FaultToleranceConfig:
    return FaultToleranceConfig.from_mapping(values)


NONE = settings()
BEATS = settings(rank_heartbeat_timeout=30, rank_section_timeouts={"save": 70, "load": 20})
ALL = settings(
    startup_timeout=100,
    initial_rank_heartbeat_timeout=50,
    rank_heartbeat_timeout=30,
    rank_section_timeouts={"save": 70, "load": 20, "never": None},
    rank_out_of_section_timeout=40,
    exit_timeout=60,
)
NO_CEILING = settings(rank_heartbeat_timeout=30, unknown_timeout=None)


def hear(clocks: Clocks, now: float, message: Message) -> None:
    clocks.hear({"time": now, **message}, now)


def after(
    history: dict[int, Message],
    config: FaultToleranceConfig = NONE,
    earlier: dict[str, float] | None = None,
) -> Clocks:
    """The clocks of a rank that was started at second 0 and sent each message at its second."""
    clocks = Clocks(config, 0, earlier)
    for now, message in history.items():
        hear(clocks, now, message)
    return clocks


# -------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize(
    "config, history, clock, deadline",
    [
        # Each clock starts and stops where the table says.
        (ALL, {}, STARTUP, 100),
        (ALL, {7: INIT}, INITIAL, 57),
        (ALL, {7: INIT, 9: BEAT}, HEARTBEAT, 39),
        (ALL, {7: INIT, 9: BEAT, 20: BEAT}, HEARTBEAT, 50),
        (ALL, {7: INIT, 9: enter("save")}, SAVE, 79),
        (ALL, {7: INIT, 9: enter("save"), 12: leave("save")}, OUT_OF_SECTION, 52),
        (ALL, {7: INIT, 9: BEAT, 10: SHUTDOWN}, "", math.inf),
        (ALL, {7: INIT, 9: BEAT, 10: BYE}, EXIT, 70),
        (ALL, {7: INIT, 9: enter("load"), 10: BYE}, EXIT, 70),
        (ALL, {7: INIT, 9: SHUTDOWN, 10: BYE}, EXIT, 70),
        (ALL, {7: BYE}, EXIT, 67),
        # Sections rest the heartbeats, which run again from the end of the last one.
        (ALL, {1: INIT, 2: BEAT, 3: enter("save"), 40: BEAT}, SAVE, 73),
        (ALL, {1: INIT, 2: BEAT, 3: enter("save"), 60: leave("save")}, HEARTBEAT, 90),
        (ALL, {1: INIT, 3: enter("save"), 5: BEAT, 60: leave("save")}, HEARTBEAT, 90),
        # Without heartbeats, what is outside of sections has a limit of its own.
        (BEATS, {1: INIT, 3: enter("save"), 9: leave("save")}, OUT_OF_SECTION, 1809),
        (BEATS, {1: INIT, 3: enter("save"), 9: leave("save"), 45: BEAT}, HEARTBEAT, 75),
        (ALL, {1: INIT, 3: enter("save"), 9: leave("save"), 45: BEAT}, HEARTBEAT, 75),
        # Sections overlap: the first that runs out decides.
        (ALL, {1: INIT, 2: enter("load"), 21: enter("save")}, LOAD, 22),
        (ALL, {1: INIT, 2: enter("load"), 4: enter("save"), 5: leave("load")}, SAVE, 74),
        (ALL, {1: INIT, 2: enter("save"), 5: enter("load"), 6: leave("load")}, SAVE, 72),
        # What is said twice, or of a section that is not open, changes nothing.
        (ALL, {1: INIT, 2: enter("load"), 9: enter("load")}, LOAD, 22),
        (ALL, {1: INIT, 21: leave("load")}, INITIAL, 51),
        # A second init starts over.
        (ALL, {1: INIT, 2: BEAT, 3: SHUTDOWN, 9: INIT}, INITIAL, 59),
        (ALL, {1: INIT, 2: BEAT, 3: enter("load"), 9: INIT}, INITIAL, 59),
        (ALL, {1: INIT, 2: BEAT, 3: BYE, 9: INIT}, INITIAL, 59),
        (ALL, {1: BEAT, 2: INIT, 3: enter("save"), 9: leave("save")}, OUT_OF_SECTION, 49),
        # Where anything is limited, nothing is without a limit, unless none is asked for.
        (BEATS, {}, STARTUP, 1800),
        (BEATS, {1: INIT}, INITIAL, 1801),
        (BEATS, {1: INIT, 2: BEAT, 3: enter("other")}, section_clock("other"), 1803),
        (BEATS, {1: INIT, 2: BYE}, EXIT, 602),
        (ALL, {1: INIT, 2: BEAT, 3: enter("never")}, NEVER, math.inf),
        (settings(exit_timeout=5), {}, STARTUP, 1800),
        (settings(unknown_timeout=9), {}, STARTUP, 9),
        (settings(unknown_timeout=9), {1: INIT, 2: BYE}, EXIT, 11),
        (NO_CEILING, {1: INIT, 2: BEAT}, HEARTBEAT, 32),
        *[(NO_CEILING, {1: INIT, 2: message}, ..., math.inf) for message in (enter("a"), BYE)],
        *[(NONE, {1: INIT, 2: message}, ..., math.inf) for message in (BEAT, enter("a"), BYE)],
        *[(settings(unknown_timeout=None), {1: INIT, 2: m}, ..., math.inf) for m in (BEAT, BYE)],
    ],
)
def test_the_first_clock_that_runs_out_decides(
    config: FaultToleranceConfig, history: dict[int, Message], clock: str, deadline: float
) -> None:
    first = after(history, config).first()
    assert first == (first[0] if clock is ... else clock, deadline)


@pytest.mark.parametrize("sent, counts", [(5, 9), (20, 20), (99, 25)])
def test_the_time_of_a_message_is_between_the_one_before_and_now(sent: int, counts: int) -> None:
    clocks = after({7: INIT, 9: BEAT}, ALL)
    clocks.hear({**BEAT, "time": sent}, 25)
    assert clocks.first() == (HEARTBEAT, counts + 30)


def test_a_time_in_which_nothing_could_run_is_nobodys_hang_and_is_not_learned() -> None:
    clocks = after({1: LEARN, 2: BEAT, 4: enter("load")}, ALL)
    clocks.restart(now=1000)
    assert clocks.first() == (LOAD, 1020)
    clocks.hear({**leave("load"), "time": 5}, 1001)  # was still in the pipe
    assert clocks.first() == (HEARTBEAT, 1030)
    assert max(clocks.longest.values()) == 2


# ------------------------------------------------------------------------------------- learning

QUICK = settings(min_timeout=1)
BEATEN = dict.fromkeys(range(2, 36, 2), BEAT)  # 16 times 2 s between heartbeats


@pytest.mark.parametrize(
    "config, history, clock, limit",
    [
        # The longest time survived times the factor, ...
        (QUICK, {1: LEARN, **BEATEN}, HEARTBEAT, 10),
        (QUICK, {1: LEARN, **BEATEN, 44: BEAT}, HEARTBEAT, 50),
        (QUICK, {4: LEARN, 6: BEAT}, INITIAL, 10),
        (QUICK, {4: LEARN}, STARTUP, 20),
        (QUICK, {1: LEARN, 2: enter("save"), 9: leave("save")}, SAVE, 35),
        (QUICK, {1: LEARN, 2: enter("a"), 3: leave("a"), 9: enter("b")}, OUT_OF_SECTION, 30),
        (settings(min_timeout=1, safety_factor=2), {4: LEARN, 6: BEAT}, INITIAL, 4),
        # ... at least the floor, which a shorter configured limit lowers, ...
        (NONE, {1: LEARN, **BEATEN}, HEARTBEAT, 60),
        (ALL, {1: LEARN, **BEATEN}, HEARTBEAT, 30),
        (settings(rank_heartbeat_timeout=300), {1: LEARN, **BEATEN}, HEARTBEAT, 60),
        (settings(rank_heartbeat_timeout=4), {1: LEARN, **BEATEN}, HEARTBEAT, 10),
        # ... from 16 heartbeats on; before, what is configured, or the ceiling, which gives way.
        (NONE, {1: LEARN, **dict.fromkeys(range(2, 34, 2), BEAT)}, HEARTBEAT, 1800),
        (NONE, {1: LEARN, 2: BEAT, 402: BEAT}, HEARTBEAT, 2000),
        (ALL, {1: LEARN, 2: BEAT}, HEARTBEAT, 30),
        (NONE, {1: LEARN}, SAVE, 1800),
        # The end of a process is never learned.
        (NONE, {1: LEARN, 2: BYE, 9: BYE}, EXIT, 600),
        # Unless it is asked for, nothing is.
        (NONE, {1: INIT, **BEATEN}, HEARTBEAT, math.inf),
        (NONE, {1: LEARN, **BEATEN, 50: INIT}, HEARTBEAT, math.inf),
    ],
)
def test_a_limit_is_learned(
    config: FaultToleranceConfig, history: dict[int, Message], clock: str, limit: float
) -> None:
    assert after(history, config).limit(clock) == limit


def test_what_earlier_runs_have_learned_counts_at_once_and_only_grows() -> None:
    clocks = after({}, QUICK, {STARTUP: 30, HEARTBEAT: 20})
    assert clocks.first() == (STARTUP, 150)
    for longest in ({HEARTBEAT: 40.0}, {HEARTBEAT: 5.0}, {SAVE: 9.0}, {EXIT: 99.0}):
        hear(clocks, 1, {"type": "learned", "longest": longest})
    hear(clocks, 1, LEARN)
    limits = [clocks.limit(clock) for clock in (STARTUP, HEARTBEAT, SAVE, EXIT)]
    assert limits == [150, 200, 45, 600]


def test_limits_are_also_learned_from_when_that_is_asked_for() -> None:
    history = {1: INIT, **BEATEN, 37: enter("save"), 39: leave("save")}
    clocks = after(history, QUICK)
    assert (clocks.limit(HEARTBEAT), clocks.is_learned(SAVE)) == (math.inf, False)
    hear(clocks, 40, {"type": "learned", "longest": {}})
    assert (clocks.limit(HEARTBEAT), clocks.limit(SAVE), clocks.is_learned(SAVE)) == (15, 10, True)


def test_the_limits_that_are_reported_are_finite() -> None:
    assert not settings(unknown_timeout=None, exit_timeout=None).is_watching()
    assert after({}, ALL).limits() == {
        **{STARTUP: 100, INITIAL: 50, HEARTBEAT: 30, EXIT: 60},
        **{OUT_OF_SECTION: 40, SAVE: 70, LOAD: 20},
    }


@pytest.mark.parametrize(
    "ends",
    [{90: {"type": "error", "error": "gloo"}, 91: enter("after")}, {90: {**BYE, "error": "gloo"}}],
)
def test_what_a_rank_waited_for_before_an_error_was_not_survived(ends: dict[int, Message]) -> None:
    """It may have waited for one that hung."""
    clocks = after({0: LEARN, 1: BEAT, 2: BEAT, **ends})
    assert clocks.longest[HEARTBEAT] == 1


def test_a_limit_of_none_is_never_replaced_by_a_learned_one() -> None:
    clocks = after({1: LEARN, 2: enter("never"), 3: leave("never")}, ALL)
    assert clocks.limit(NEVER) == math.inf and not clocks.is_learned(NEVER)


# ------------------------------------------------------------------------------------ the state


def report(step: int | None = None, hung_on: str | None = None, **longest: float) -> Report:
    return Report(0, step=step, hung_on=hung_on, waited=hung_on and 30.0, longest=longest)  # type: ignore[arg-type]


def test_a_state_is_the_maximum_of_the_ranks_and_fades_from_run_to_run_where_it_was_seen() -> None:
    state = State().after([report(a=5, b=1), report(a=7)], "first")
    assert state == State({"a": 7, "b": 1}, {}, "first")
    assert state.after([report(a=2)], "first").longest == {"a": 7, "b": 1}
    assert state.after([report(a=2)], "second").longest == {"a": 5.6, "b": 1}
    assert state.after([report(a=6)], "second").longest == {"a": 6, "b": 1}
    assert state.after([], "second").longest == {"a": 7, "b": 1}


def write(state: State, path: Path) -> None:
    ft_monitor.write_file(path, json.dumps(dataclasses.asdict(state)))


@pytest.mark.parametrize(
    "first, second, is_widened",
    [(9, 9, True), (9, 8, True), (9, 10, False), (None, None, True), (None, 3, False)],
)
def test_a_limit_that_ends_ranks_twice_with_no_new_step_is_widened_by_whichever_launcher(
    tmp_path: Path, first: int | None, second: int | None, is_widened: bool
) -> None:
    path = tmp_path / "new" / "ft_state.json"
    write(State({"a": 2.0}, {}, "job 1").after([report(first, "a"), report(1)], "job 1"), path)
    state = State.read(path)
    assert state.longest == {"a": 2.0}
    state = state.after([report(1), report(second, "a")], "job 2 on another node")
    assert state.longest == {"a": 30.0 if is_widened else 2.0}
    assert state.killed == {"a": (max(1, first or 1, second or 1), 0.0)}


def test_two_nodes_that_notice_one_hang_have_not_seen_two(tmp_path: Path) -> None:
    def hung(started: float) -> Report:
        return Report(0, step=5, hung_on="a", waited=9.0, started=started, ended=started + 30)

    state = State().after([hung(100)], "job").after([hung(101)], "job")
    assert state.longest == {}
    write(state, tmp_path / "state.json")
    assert State.read(tmp_path / "state.json") == state
    assert state.after([hung(140)], "job").longest == {"a": 9.0}


def test_the_highest_step_of_all_ranks_counts_as_a_new_one_and_the_longest_wait_is_survived() -> (
    None
):
    killed = State({}, {"a": (5, 0.0), "b": (5, 0.0)})
    assert killed.after([report(5), report(6)], "").killed == {}
    waits = [Report(0, hung_on="a", waited=waited) for waited in (10.0, 40.0, 20.0)]
    assert killed.after(waits, "").longest == {"a": 40.0}


BROKEN = ["", "{", "[]", "5", "null", '"text"', "[" * 100_000, "\ud800", '{"timeouts": {}}']
KEPT = '{"longest": {"a": LONGEST}, "killed": {"a": KILLED}, "run": ""}'
BROKEN += [KEPT.replace("LONGEST", x) for x in ("0", "-1", "NaN", "Infinity", "null", '"x"')]
BROKEN += [KEPT.replace("LONGEST", "1").replace("KILLED", x) for x in ("5", "[NaN, 1]", "[1]")]
BROKEN += ['{"longest": [], "killed": {}, "run": ""}', '{"longest": {}, "killed": [], "run": ""}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_holds_no_state_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match="holds no state"):
        State.read(path)


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "ft_state.json").mkdir()
    for path in (tmp_path / "ft_state.json", tmp_path / ("x" * 300)):
        with pytest.raises(OSError):
            write(State({"a": 1.0}), path)
    assert [path.name for path in tmp_path.rglob("*")] == ["ft_state.json"]


STATE = {"longest": {HEARTBEAT: 0.2, SAVE: 7.0}, "killed": {}, "run": "job 1"}


def test_a_hung_rank_is_killed_by_a_limit_that_earlier_runs_have_learned(
    watch: Watch, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(STATE))
    body = "connect(calculate_timeouts=True, state_file='state.json'); beat(8); hang()"
    watched = watch(body, min_timeout=0.1)
    assert watched.ends() == -signal.SIGKILL
    report = watched.report
    assert (report.hung_on, report.step) == (HEARTBEAT, 8)
    assert report.limits[HEARTBEAT] == 1.0 <= (report.waited or 0) and report.limits[SAVE] == 35
    assert (report.state_file, report.learned) == (
        str(tmp_path / "state.json"),
        [INITIAL, HEARTBEAT, SAVE, STARTUP],
    )
    assert "(learned limit 1 s, --ft-min-timeout)" in watched.log[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_tells_of_learned_limits_once(watch: Watch, rank: int) -> None:
    body = """
connect(calculate_timeouts=True)
client.start_section("save")
time.sleep(0.2)
client.end_section("save")
beat(1, times=25, seconds=0.1)
"""
    watched = watch(body, environment={"RANK": str(rank)}, safety_factor=500)
    assert watched.ends() == 0
    told = [
        line.partition("limits learned so far: ")[2] for line in watched.log if "learned" in line
    ]
    assert len(told) == (rank == 0)
    save = watched.report.limits[SAVE]
    assert all(x.startswith("in general 60 s, ") and f", save {save:g} s" in x for x in told)


def test_the_launcher_hands_on_what_earlier_attempts_have_learned(watch: Watch) -> None:
    watched = watch(
        "hang()", environment={"FT_LEARNED": '{"startup_timeout": 0.1}'}, min_timeout=0.1
    )
    assert watched.ends() == -signal.SIGKILL
    assert (watched.report.hung_on, watched.report.limits) == (STARTUP, {STARTUP: 0.5})


@pytest.mark.parametrize("kind", ["missing", "broken", "directory"])
def test_a_state_that_cannot_be_read_costs_one_line_and_a_missing_one_none(
    watch: Watch, tmp_path: Path, kind: str
) -> None:
    if kind == "broken":
        (tmp_path / "state.json").write_text(
            '{"longest": {}, "killed": {"a": Infinity}, "run": ""}'
        )
    elif kind == "directory":
        (tmp_path / "state.json").mkdir()
    watched = watch("connect(calculate_timeouts=True, state_file='state.json')")
    assert watched.ends() == 0
    lines = watched.output.splitlines()
    assert [line for line in lines if "starting without what was learned" in line] == lines
    assert len(lines) == (kind != "missing")


def test_a_state_on_a_file_system_that_hangs_delays_the_connection_a_little_but_never_the_kill(
    watch: Watch, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "state.json")
    body = """
ft_monitor.FILE_SECONDS = 1.0
start = time.monotonic()
connect(calculate_timeouts=True, state_file="state.json")
tell("seconds", time.monotonic() - start)
hang()
"""
    watched = watch(body, initial_rank_heartbeat_timeout=2)
    assert watched.ends() == -signal.SIGKILL
    assert 1 <= float(watched.told("seconds")) < 1.9
    assert "state.json: no answer within" in watched.output
    watched = watch(body.replace("1.0", "60.0"), initial_rank_heartbeat_timeout=1)
    start = time.monotonic()
    assert watched.ends() == -signal.SIGKILL
    assert time.monotonic() - start < 10 and watched.report.hung_on == INITIAL


# -------------------------------------------------------------------------------- NVIDIA's names


def test_limits_are_told_by_nvidias_names(watch: Watch) -> None:
    body = """
from ft_monitor import FaultToleranceConfig
assert (client.hb_timeouts, client.section_timeouts, client.cfg) == (None, None, None)
connect(num_warmup_iters=5)
assert client.cfg == FaultToleranceConfig.load()
wait_until(lambda: client.hb_timeouts.are_valid)
assert (client.hb_timeouts.initial, client.hb_timeouts.subsequent) == (50, 30)
assert not client.hb_timeouts.were_calculated
assert client.section_timeouts.section == {"save": 70}
assert (client.section_timeouts.out_of_section, client.section_timeouts.are_valid) == (None, False)
client.start_section("save")
client.end_section("save")
beat(1, times=20, seconds=0.02)
assert not client.section_timeouts.were_calculated
assert client.calculate_and_set_hb_timeouts(calc_initial=False) is True
assert client.calculate_and_set_section_timeouts(["save"]) is True
wait_until(lambda: client.hb_timeouts.were_calculated)
assert client.hb_timeouts.subsequent == 30 and client.section_timeouts.section == {"save": 60}
assert client.section_timeouts.calculated_sections == {"save"}
assert client.section_timeouts.were_calculated and client.section_timeouts.are_valid
tell("state", client.state_dict()["longest"])
"""
    limits = {"initial_rank_heartbeat_timeout": 50, "rank_heartbeat_timeout": 30}
    watched = watch(body, **limits, rank_section_timeouts={"save": 70})
    assert watched.ends() == 0, watched.output
    state = eval(watched.told("state"))
    assert state.keys() == {STARTUP, INITIAL, OUT_OF_SECTION, HEARTBEAT, SAVE}
    assert 0.02 <= state[HEARTBEAT] < 5


def test_a_state_goes_from_run_to_run_also_by_nvidias_names(watch: Watch) -> None:
    body = """
client.load_state_dict({})
client.load_state_dict({"longest": {"rank_heartbeat_timeout": 100, "a": 9}})
connect()
wait_until(lambda: client.hb_timeouts.subsequent == 500)
client.load_state_dict({"longest": {"rank_heartbeat_timeout": 200}})
wait_until(lambda: client.hb_timeouts.subsequent == 1000)
beat(times=2)
wait_until(lambda: "rank_heartbeat_timeout" in client._report().longest)
assert client.state_dict() == client.state_dict()
assert client.state_dict()["longest"]["rank_heartbeat_timeout"] == 160
"""
    watched = watch(body)
    assert watched.ends() == 0, watched.output


def test_nvidias_own_state_is_ignored_with_one_warning_and_a_broken_one_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = RankMonitorClient()
    client.load_state_dict({"hb_timeouts": {"initial": 1.0}, "section_timeouts": {}})
    assert len(caplog.records) == 1 and "such as NVIDIA's" in caplog.text
    states: list[Any] = [None, [], {"a": 0}, {"a": "x"}, {"a": None}]
    for longest in states:
        with pytest.raises(ConfigError):
            client.load_state_dict({"longest": longest})
