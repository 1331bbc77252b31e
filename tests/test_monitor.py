"""The rank monitor: its pure parts with an integer clock, then the monitor itself with real ranks.

A rank is a few lines of Python that each test shows; PRELUDE is what all of them begin with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Started, is_running, wait_until

import ft_monitor
from ft_monitor import (
    MAX_MESSAGE_BYTES,
    MESSAGE_FIELDS,
    Clocks,
    ConfigError,
    FaultToleranceConfig,
    Lap,
    MessageReader,
    RankMonitorClient,
    RankMonitorClientError,
    encode_message,
)

LATE_SECONDS = 2.0  # a busy host may delay a kill by this; 1 to 30 ms are usual
STACKS_OF_THE_RANK = 'rank.py", line'

Message = dict[str, Any]


# ------------------------------------------------------------------------------------------------- the clocks

INIT: Message = {"type": "init", "rank": 0, "stacks": False}
BYE: Message = {"type": "bye", "error": None}
FAILED: Message = {"type": "bye", "error": "ValueError: x"}
BEAT: Message = {"type": "heartbeat", "step": None}


def enter(section: str) -> Message:
    return {"type": "section", "name": section, "open": True}


def leave(section: str) -> Message:
    return {"type": "section", "name": section, "open": False}


def timeouts(**calculated: Any) -> Message:
    return {"type": "timeouts", "calculated": calculated, "note": None}


ALL = FaultToleranceConfig(
    startup_timeout=100,
    initial_rank_heartbeat_timeout=50,
    rank_heartbeat_timeout=30,
    rank_section_timeouts={"save": 70, "load": 20, "never": None},
    rank_out_of_section_timeout=40,
    exit_timeout=60,
)
HEARTBEATS = FaultToleranceConfig(
    initial_rank_heartbeat_timeout=50, rank_heartbeat_timeout=30, rank_section_timeouts={"save": 70, "load": 20}
)
SECTIONS = FaultToleranceConfig(rank_section_timeouts={"save": 70, "load": 20}, rank_out_of_section_timeout=40)


def clocks_after(config: FaultToleranceConfig, history: Mapping[int, Message]) -> Clocks:
    """The clocks of a rank that was started at second 0 and sent each message at the second before it."""
    clocks = Clocks(config, now=0)
    for now, message in history.items():
        clocks.hear(message, now)
    return clocks


@pytest.mark.parametrize(
    "config, history, setting, deadline",
    [
        # Each clock starts where the table says, ...
        (ALL, {}, "startup_timeout", 100),
        (HEARTBEATS, {7: INIT}, "initial_rank_heartbeat_timeout", 57),
        (HEARTBEATS, {7: INIT, 9: BEAT}, "rank_heartbeat_timeout", 39),
        (HEARTBEATS, {7: INIT, 9: BEAT, 20: BEAT}, "rank_heartbeat_timeout", 50),
        (HEARTBEATS, {7: INIT, 9: enter("save")}, "rank_section_timeouts[save]", 79),
        (SECTIONS, {7: INIT}, "rank_out_of_section_timeout", 47),
        (SECTIONS, {7: INIT, 9: enter("save"), 12: leave("save")}, "rank_out_of_section_timeout", 52),
        (ALL, {7: INIT, 8: FAILED}, "exit_timeout", 68),
        # ... and stops where it says.
        (FaultToleranceConfig(startup_timeout=9), {7: INIT}, None, None),
        (FaultToleranceConfig(initial_rank_heartbeat_timeout=9), {7: INIT, 8: BEAT}, None, None),
        (FaultToleranceConfig(rank_section_timeouts={"a": 9}), {7: INIT, 8: enter("a"), 9: leave("a")}, None, None),
        (FaultToleranceConfig(rank_out_of_section_timeout=9), {7: INIT, 8: enter("a")}, None, None),
        (FaultToleranceConfig(rank_heartbeat_timeout=9), {7: INIT}, None, None),
        (ALL, {7: INIT, 8: BEAT, 9: BYE}, None, None),
        (ALL, {7: INIT, 8: enter("save"), 9: BYE}, None, None),
        # Without a limit a clock never runs out.
        (FaultToleranceConfig(), {}, None, None),
        (FaultToleranceConfig(), {1: INIT, 2: BEAT, 3: enter("save")}, None, None),
        (FaultToleranceConfig(), {1: INIT, 2: FAILED}, None, None),
        (FaultToleranceConfig(rank_section_timeouts={"never": None}), {1: INIT, 2: enter("never")}, None, None),
        # The first that runs out decides.
        (ALL, {7: INIT}, "rank_out_of_section_timeout", 47),
        (ALL, {7: INIT, 8: BEAT}, "rank_heartbeat_timeout", 38),
        (ALL, {7: INIT, 20: BEAT}, "rank_out_of_section_timeout", 47),
        (ALL, {7: INIT, 8: BEAT, 9: FAILED}, "exit_timeout", 69),
        # A section that has a timeout rests the heartbeat clock, which starts anew when the section is left.
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("save"), 40: BEAT}, "rank_section_timeouts[save]", 73),
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("save"), 60: leave("save")}, "rank_heartbeat_timeout", 90),
        (HEARTBEATS, {1: INIT, 3: enter("save"), 60: leave("save")}, "initial_rank_heartbeat_timeout", 110),
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("save"), 4: enter("load"), 5: leave("load")},
         "rank_section_timeouts[save]", 73),
        # A section without a timeout does neither.
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("other")}, "rank_heartbeat_timeout", 32),
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("other"), 20: leave("other")}, "rank_heartbeat_timeout", 32),
        (ALL, {1: INIT, 2: BEAT, 3: enter("never"), 20: leave("never")}, "rank_heartbeat_timeout", 32),
        # Sections nest and overlap: an outer one counts although an inner one is fresh; they are left in any order.
        (SECTIONS, {1: INIT, 2: enter("load"), 21: enter("save")}, "rank_section_timeouts[load]", 22),
        (SECTIONS, {1: INIT, 2: enter("load"), 4: enter("save"), 5: leave("load")}, "rank_section_timeouts[save]", 74),
        (SECTIONS, {1: INIT, 2: enter("save"), 5: enter("load"), 6: leave("load")}, "rank_section_timeouts[save]", 72),
        (SECTIONS, {1: INIT, 2: enter("a"), 5: enter("b"), 6: leave("a")}, None, None),
        (SECTIONS, {1: INIT, 2: enter("a"), 5: enter("b"), 6: leave("a"), 8: leave("b")},
         "rank_out_of_section_timeout", 48),
        # What a rank says twice, or of a section that it is not in, changes nothing.
        (SECTIONS, {1: INIT, 2: enter("load"), 21: enter("load")}, "rank_section_timeouts[load]", 22),
        (SECTIONS, {1: INIT, 21: leave("load")}, "rank_out_of_section_timeout", 41),
        # A second init starts over.
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: enter("save"), 9: INIT}, "initial_rank_heartbeat_timeout", 59),
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: FAILED, 9: INIT}, "initial_rank_heartbeat_timeout", 59),
        (SECTIONS, {1: INIT, 2: enter("load"), 3: leave("load"), 9: INIT}, "rank_out_of_section_timeout", 49),
        (ALL, {1: INIT, 2: BEAT, 3: BYE, 9: INIT}, "rank_out_of_section_timeout", 49),
        # Calculated timeouts replace the configured ones until the next such message.
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: timeouts(rank_heartbeat_timeout=500)}, "rank_heartbeat_timeout", 502),
        (HEARTBEATS, {1: INIT, 2: BEAT, 3: timeouts(rank_heartbeat_timeout=500), 4: timeouts()},
         "rank_heartbeat_timeout", 32),
        (SECTIONS, {1: INIT, 2: enter("x"), 3: timeouts(**{"rank_section_timeouts[x]": 5})},
         "rank_section_timeouts[x]", 7),
    ],
)  # fmt: skip
def test_the_first_clock_that_runs_out_decides(
    config: FaultToleranceConfig, history: dict[int, Message], setting: str | None, deadline: int | None
) -> None:
    first = clocks_after(config, history).first()
    assert (first and first.setting, first and first.deadline) == (setting, deadline)


@pytest.mark.parametrize(
    "history, setting",
    [
        ({}, "startup_timeout"),
        ({1: INIT}, "initial_rank_heartbeat_timeout"),
        ({1: INIT, 2: BEAT}, "rank_heartbeat_timeout"),
        ({1: INIT, 2: enter("save"), 3: leave("save")}, "initial_rank_heartbeat_timeout"),
        ({1: INIT, 2: enter("save"), 3: leave("save")}, "rank_out_of_section_timeout"),
        ({1: INIT, 2: enter("save")}, "rank_section_timeouts[save]"),
        ({1: INIT, 2: FAILED}, "exit_timeout"),
    ],
)
def test_after_a_suspension_every_clock_starts_anew(history: dict[int, Message], setting: str) -> None:
    clocks = clocks_after(ALL, history)
    running = {clock.setting for clock in clocks.running()}
    assert setting in running
    clocks.restart(now=1000)
    assert {clock.setting for clock in clocks.running()} == running
    assert [clock.since for clock in clocks.running()] == [1000] * len(running)


def test_hearing_a_message_returns_the_clocks_that_it_stopped() -> None:
    clocks = clocks_after(ALL, {1: INIT, 2: BEAT})
    assert clocks.hear(BEAT, 9) == [Lap("rank_heartbeat_timeout", 7, 30)]
    assert clocks.hear(enter("save"), 12) == [
        Lap("rank_out_of_section_timeout", 11, 40),
        Lap("rank_heartbeat_timeout", 3, 30),
    ]
    assert clocks.hear({"type": "saved", "step": 5}, 13) == []
    assert clocks.hear(leave("save"), 32) == [Lap("rank_section_timeouts[save]", 20, 70)]


def test_a_step_stays_known_when_a_heartbeat_carries_none() -> None:
    clocks = clocks_after(ALL, {1: INIT, 2: {"type": "heartbeat", "step": 8}, 3: BEAT})
    assert clocks.step == 8


# --------------------------------------------------------------------------------------------- the configuration

FIELDS = {field.name: field for field in dataclasses.fields(FaultToleranceConfig)}
NUMBERS = {"safety_factor", "min_timeout", "workers_stop_timeout"}
TIMEOUTS = {name for name in FIELDS if name.endswith("_timeout")} - NUMBERS


@pytest.mark.parametrize("name", sorted(TIMEOUTS | NUMBERS))
def test_a_number_that_cannot_be_a_time_is_refused_with_its_name_and_value(name: str) -> None:
    values: list[Any] = [0, -1, float("nan"), float("inf"), True, False, "soon", "-1", "nan", [1], {}, 10**400]
    for value in values:
        with pytest.raises(ConfigError) as caught:
            FaultToleranceConfig(**{name: value})
        assert str(caught.value).startswith(f"{name}: got {value!r}, expected a number")


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, None) for name in sorted(NUMBERS)],
        ("safety_factor", 0.99),
        *[("rank_section_timeouts", value) for value in (5, None, "step", ":5", "a:5,b", "a:0", {"a": True}, ["a"])],
        *[("rank_termination_signal", value) for value in ("SIGNOTHING", "", None, True, 0, 1000)],
        *[("log_level", value) for value in ("LOUD", "", None, True, 11)],
    ],
)
def test_any_other_value_that_cannot_be_used_is_refused_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: got .*, expected "):
        FaultToleranceConfig(**{name: value})


@pytest.mark.parametrize(
    "name, value, meaning",
    [
        *[(name, value, None) for name in sorted(TIMEOUTS) for value in (None, "none", "null", " None ", "")],
        *[(name, "2.5", 2.5) for name in sorted(TIMEOUTS | NUMBERS)],
        ("safety_factor", 1, 1.0),
        ("rank_section_timeouts", "", {}),
        ("rank_section_timeouts", "setup:600, step:none,a:b:1.5", {"setup": 600, "step": None, "a:b": 1.5}),
        ("rank_section_timeouts", {"setup": "600", "step": None}, {"setup": 600, "step": None}),
        ("rank_termination_signal", "term", "SIGTERM"),
        ("rank_termination_signal", "sigusr1", "SIGUSR1"),
        ("rank_termination_signal", 9, "SIGKILL"),
        ("rank_termination_signal", signal.SIGINT, "SIGINT"),
        ("log_level", "debug", "DEBUG"),
        ("log_level", 30, "WARNING"),
    ],
)
def test_a_setting_is_understood_as_people_write_it(name: str, value: Any, meaning: Any) -> None:
    assert getattr(FaultToleranceConfig(**{name: value}), name) == meaning


def test_a_configuration_cannot_be_changed() -> None:
    sections = {"save": 5.0}
    config = FaultToleranceConfig(rank_section_timeouts=sections)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.startup_timeout = 1  # type: ignore[misc]
    sections["save"] = 6.0
    assert config.rank_section_timeouts == {"save": 5.0}


@pytest.mark.parametrize("name", ["rank_heartbeat_timeout_s", "rank-heartbeat-timeout", "heartbeat_timeout"])
def test_an_unknown_setting_is_refused_and_the_nearest_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown setting '{name}'; did you mean 'rank_heartbeat_timeout'"):
        FaultToleranceConfig.from_mapping({name: 1})


def test_json_and_back_gives_the_same_configuration() -> None:
    config = dataclasses.replace(ALL, rank_termination_signal="TERM", log_level="debug", safety_factor=3)
    assert FaultToleranceConfig.from_mapping(json.loads(config.to_json())) == config != FaultToleranceConfig()


@pytest.mark.parametrize("text", ['{"startup_timeout": 5}', '{"lr": 1, "fault_tolerance": {"startup_timeout": 5}}'])
def test_a_file_holds_the_settings_or_has_them_as_its_member_fault_tolerance(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert FaultToleranceConfig.from_json_file(path) == FaultToleranceConfig(startup_timeout=5)


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "No such file"),
        (b"\xff\xfe\x00x", "can't decode"),
        (b'{"startup_timeout": ', "Expecting value"),
        (b"[1]", "expected a JSON object"),
        (b'{"fault_tolerance": {"startup": 5}}', "did you mean 'startup_timeout'"),
        (b'{"startup_timeout": 0}', "startup_timeout: got 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        FaultToleranceConfig.from_json_file(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "5", "null", '"text"', '{"startup": 5}', '{"startup_timeout": -1}'])
def test_a_broken_configuration_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FT_CONFIG", text)
    with pytest.raises(ConfigError, match="environment variable FT_CONFIG"):
        FaultToleranceConfig.from_environment()


def test_flags_beat_the_file_which_beats_the_environment_which_beats_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def startup_timeout(*flags: str) -> float | None:
        return ft_monitor.parse_arguments([*flags, "--", "true"])[1].startup_timeout

    monkeypatch.delenv("FT_CONFIG", raising=False)
    path = tmp_path / "config.json"
    path.write_text('{"startup_timeout": 2}')
    assert startup_timeout() is None
    monkeypatch.setenv("FT_CONFIG", '{"startup_timeout": 1}')
    assert startup_timeout() == 1
    assert startup_timeout(f"--ft-cfg-path={path}") == 2
    assert startup_timeout(f"--ft-cfg-path={path}", "--ft-startup-timeout=3") == 3
    assert startup_timeout(f"--ft-cfg-path={path}", "--ft-startup-timeout=none") is None


@pytest.mark.parametrize("name", list(FIELDS))
def test_every_setting_has_a_flag_with_dashes_and_with_underscores(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("FT_CONFIG", raising=False)
    others = {"rank_section_timeouts": "a:5", "rank_termination_signal": "SIGTERM", "log_level": "ERROR"}
    value: Any = others.get(name, "5.5")
    for flag in (f"--ft-{name.replace('_', '-')}", f"--ft_{name}"):
        config = ft_monitor.parse_arguments([flag, value, "--", "true"])[1]
        assert config == FaultToleranceConfig(**{name: value}) != FaultToleranceConfig()


# --------------------------------------------------------------------------------------------------- messages

MESSAGES: dict[str, Message] = {
    "init": {"rank": 3, "stacks": True},
    "heartbeat": {"step": 8},
    "section": {"name": "save", "open": True},
    "timeouts": {"calculated": {"rank_heartbeat_timeout": 12.5, "rank_section_timeouts[save]": 9.0}, "note": None},
    "saved": {"step": 8},
    "request": {"action": "ShutdownWorkload", "reason": "enough"},
    "bye": {"error": "ValueError: x"},
}
GOOD = encode_message("saved", step=8)
NO_TYPES: list[Any] = ["unknown", None, 5, [], {}, "heartbeat", "bye"]
NO_TIMEOUTS: list[Any] = [-5, [], float("inf"), 10**400]


def test_every_message_is_understood_as_it_was_sent() -> None:
    assert MESSAGES.keys() == MESSAGE_FIELDS.keys()
    sent = b"".join(encode_message(kind, **fields) for kind, fields in MESSAGES.items())
    assert MessageReader().feed(sent) == [{"type": kind, **fields} for kind, fields in MESSAGES.items()]


def test_messages_are_understood_wherever_they_are_cut() -> None:
    sent = b"".join(encode_message(kind, **fields) for kind, fields in MESSAGES.items())
    whole = MessageReader().feed(sent)
    for cut in range(len(sent)):
        reader = MessageReader()
        assert reader.feed(sent[:cut]) + reader.feed(sent[cut:]) == whole
    reader = MessageReader()
    assert [message for byte in sent for message in reader.feed(bytes([byte]))] == whole
    assert reader.skipped == 0


def line(message: Any) -> bytes:
    return json.dumps(message).encode()


@pytest.mark.parametrize(
    "noise",
    [
        *[b"", b"\0", b"text", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", b"null", b"5", b"NaN", b'"init"', b"[]", b"{}"],
        *[b"[" * 4000, b'{"a":' * 800, b"9" * 4000, b" " * 5000, b"x" * 70_000, GOOD[:-1] + GOOD[:-1]],
        *[line({"type": wrong}) for wrong in NO_TYPES],
        *[line({"type": kind, **MESSAGES[kind], name: [[]]}) for kind in MESSAGES for name in MESSAGES[kind]],
        *[line({"type": kind, **MESSAGES[kind], name: 1.5}) for kind in MESSAGES for name in MESSAGES[kind]],
        line({"type": "request", "action": "Dance", "reason": ""}),
        *[line(timeouts(**{name: 5})) for name in ("exit_timeout", "", "rank_section_timeouts[")],
        *[line(timeouts(rank_heartbeat_timeout=value)) for value in NO_TIMEOUTS],
    ],
    ids=lambda noise: repr(noise[:60]),
)  # fmt: skip
def test_what_is_not_a_message_is_skipped_and_counted_and_the_next_one_is_understood(noise: bytes) -> None:
    reader = MessageReader()
    assert reader.feed(noise + b"\n" + GOOD) == [{"type": "saved", "step": 8}]
    assert reader.skipped == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_skipped_and_counted(seed: int) -> None:
    generator = random.Random(seed)
    noise = generator.randbytes(20_000)
    reader, pieces = MessageReader(), [noise[i : i + 997] for i in range(0, len(noise), 997)]
    assert not any(map(reader.feed, pieces))
    assert reader.feed(b"\n" + GOOD) == [{"type": "saved", "step": 8}]
    assert reader.skipped == noise.count(b"\n") + 1


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_message_never_raises(seed: int) -> None:
    generator, reader = random.Random(seed), MessageReader()
    for _ in range(200):
        kind = generator.choice(list(MESSAGES))
        damaged = bytearray(encode_message(kind, **MESSAGES[kind]))
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        reader.feed(bytes(damaged))
    assert reader.feed(b"\n" + GOOD)[-1] == {"type": "saved", "step": 8}


@pytest.mark.parametrize("length, understood", [(MAX_MESSAGE_BYTES, 1), (MAX_MESSAGE_BYTES + 1, 0)])
def test_a_message_has_at_most_4096_bytes(length: int, understood: int) -> None:
    message = GOOD[:-1].ljust(length - 1) + b"\n"
    assert len(MessageReader().feed(message)) == understood


def test_a_line_that_never_ends_takes_no_memory_and_is_counted_once() -> None:
    reader, piece = MessageReader(), b"x" * 65536
    tracemalloc.start()
    for _ in range(100):
        assert reader.feed(piece) == []
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2 * len(piece)
    assert reader.feed(b"\n" + GOOD) == [{"type": "saved", "step": 8}]
    assert reader.skipped == 1


@pytest.mark.parametrize("character", ["x", "é", "漢", "😀", "\0", '"', "\\", "\n", "\ud800"])
@pytest.mark.parametrize(
    "kind, name", [("section", "name"), ("timeouts", "note"), ("request", "reason"), ("bye", "error")]
)
def test_long_text_is_cut_so_that_the_message_fits(kind: str, name: str, character: str) -> None:
    message = encode_message(kind, **{**MESSAGES[kind], name: character * 10_000})
    assert len(message) <= MAX_MESSAGE_BYTES
    assert message.endswith(b"\n") and message.count(b"\n") == 1
    [understood] = MessageReader().feed(message)
    assert len(understood[name]) >= 100
    assert understood == {"type": kind, **MESSAGES[kind], name: character * len(understood[name])}


def test_text_that_fits_is_not_cut() -> None:
    for error in ("x" * 4000, "é" * 600, "😀" * 300):
        assert MessageReader().feed(encode_message("bye", error=error)) == [{"type": "bye", "error": error}]


# ------------------------------------------------------------------------------------- the rank's end of the pipe


class PipeOfTheClient:
    """The read end of a pipe whose write end the client finds in FT_MONITOR_FD."""

    def __init__(self, read_end: int) -> None:
        self.read_end = read_end
        self.reader = MessageReader()

    def messages(self) -> list[Message]:
        """What has arrived since the last call."""
        try:
            return self.reader.feed(os.read(self.read_end, 1 << 20))
        except BlockingIOError:
            return []


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeOfTheClient]:
    for name in ("FT_RUN_DIR", "FT_CONFIG", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    monkeypatch.setenv("FT_MONITOR_FD", str(write_end))
    yield PipeOfTheClient(read_end)
    for end in (read_end, write_end):
        os.close(end)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Set `clock.now` to set what the client takes for the time, in seconds."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(ft_monitor, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def client(pipe: PipeOfTheClient) -> Iterator[RankMonitorClient]:
    client = RankMonitorClient()
    yield client
    client.shutdown_workload_monitoring()


@pytest.mark.parametrize("descriptor", [None, "", "text", "-1", "12345", "9" * 20, "a file", "a socket", "a read end"])
def test_without_a_monitor_the_client_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, descriptor: str | None
) -> None:
    pipe = os.pipe()
    with open(tmp_path / "file", "w") as file, socket.socket() as a_socket, open(pipe[0]) as reader, open(pipe[1], "w"):
        numbers = {"a file": file.fileno(), "a socket": a_socket.fileno(), "a read end": reader.fileno()}
        monkeypatch.delenv("FT_MONITOR_FD", raising=False)
        if descriptor is not None:
            monkeypatch.setenv("FT_MONITOR_FD", str(numbers.get(descriptor, descriptor)))
        client = RankMonitorClient()
        with pytest.raises(RankMonitorClientError, match=r"Start it with: python ft_launcher\.py") as caught:
            client.init_workload_monitoring()
    assert isinstance(caught.value, RuntimeError)
    assert not client.is_initialized


def test_the_client_refuses_what_cannot_work_and_says_what_to_do(client: RankMonitorClient) -> None:
    for too_early in (client.send_heartbeat, client.calculate_and_set_hb_timeouts):
        with pytest.raises(RankMonitorClientError, match=r"call init_workload_monitoring\(\) first"):
            too_early()
    with pytest.raises(RankMonitorClientError, match="not connected"):
        client.start_section("save")
    client.init_workload_monitoring()
    with pytest.raises(RankMonitorClientError, match="already connected"):
        client.init_workload_monitoring()
    with pytest.raises(RankMonitorClientError, match=r"'save' is not open: call start_section\('save'\) first"):
        client.end_section("save")
    client.start_section("save")
    with pytest.raises(RankMonitorClientError, match=r"'save' is open already: call end_section\('save'\) first"):
        client.start_section("save")
    assert client.open_sections == {"save"}


def test_the_client_sends_what_the_table_of_messages_tells(client: RankMonitorClient, pipe: PipeOfTheClient) -> None:
    client.report_saved(1)  # both do nothing without a connection
    client.shutdown_workload_monitoring()
    client.init_workload_monitoring()
    client.send_heartbeat(7)
    client.send_heartbeat()
    client.start_section("save")
    client.start_section("load")
    client.end_all_sections()
    client.report_saved(7)
    client.shutdown_workload_monitoring("ValueError: x")
    assert pipe.messages() == [
        {"type": "init", "rank": 0, "stacks": False},
        {"type": "heartbeat", "step": 7},
        {"type": "heartbeat", "step": None},
        {"type": "section", "name": "save", "open": True},
        {"type": "section", "name": "load", "open": True},
        {"type": "section", "name": "load", "open": False},
        {"type": "section", "name": "save", "open": False},
        {"type": "saved", "step": 7},
        {"type": "bye", "error": "ValueError: x"},
    ]


def test_a_client_can_connect_again_and_so_can_a_second_one(client: RankMonitorClient, pipe: PipeOfTheClient) -> None:
    for each in (client, client, RankMonitorClient()):
        each.init_workload_monitoring()
        each.start_section("save")
        each.shutdown_workload_monitoring()
        assert [message["type"] for message in pipe.messages()] == ["init", "section", "bye"]


def test_timeouts_are_the_longest_observed_time_times_the_factor_and_at_least_the_minimum(
    client: RankMonitorClient, pipe: PipeOfTheClient, clock: types.SimpleNamespace
) -> None:
    client.init_workload_monitoring()
    for clock.now in (1, 5, 7):
        client.send_heartbeat()
    assert client.calculate_and_set_hb_timeouts()
    expected = {"initial_rank_heartbeat_timeout": 10.0, "rank_heartbeat_timeout": 20.0}  # 5 * 1, 5 * 4; at least 10
    assert client.timeouts_in_force() == client.calculated == expected
    assert client.hb_timeouts == (10.0, 20.0, True)
    assert pipe.messages()[-1] == {"type": "timeouts", "calculated": expected, "note": None}


def test_measured_sections_get_timeouts_of_their_own(client: RankMonitorClient, clock: types.SimpleNamespace) -> None:
    client.init_workload_monitoring(measure=["save"])
    clock.now = 3
    client.start_section("save")
    clock.now = 9
    client.end_section("save")
    assert client.calculate_and_set_section_timeouts()
    assert client.section_timeouts == ({"save": 30.0}, 15.0, {"save"}, True)


def test_without_a_timeout_of_its_own_a_measured_section_is_part_of_the_time_between_heartbeats(
    client: RankMonitorClient, clock: types.SimpleNamespace
) -> None:
    client.init_workload_monitoring(measure=["save"])
    client.send_heartbeat()
    clock.now = 4
    client.start_section("save")
    clock.now = 10
    client.end_section("save")
    client.send_heartbeat()
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.calculated == {"rank_heartbeat_timeout": (4 + 6) * 5}


def test_timeouts_of_what_no_rank_has_seen_cannot_be_calculated(client: RankMonitorClient) -> None:
    client.init_workload_monitoring()
    assert not client.calculate_and_set_hb_timeouts(skip_if_not_ready=True)
    with pytest.raises(RankMonitorClientError, match="not enough data to calculate rank_heartbeat_timeout"):
        client.calculate_and_set_hb_timeouts()
    assert client.calculated == {}


def test_calculated_timeouts_go_from_run_to_run_and_outliers_fade(
    client: RankMonitorClient, pipe: PipeOfTheClient
) -> None:
    client.load_state_dict({"version": 1, "timeouts": {"rank_heartbeat_timeout": 100}})
    client.init_workload_monitoring()
    assert pipe.messages()[-1] == {"type": "timeouts", "calculated": {"rank_heartbeat_timeout": 100.0}, "note": None}
    client.observe("rank_heartbeat_timeout", 4)
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.state_dict() == {"version": 1, "timeouts": {"rank_heartbeat_timeout": (4 * 5 + 100) / 2}}


def test_a_calculated_timeout_that_nearly_ran_out_grows_at_once(
    client: RankMonitorClient, pipe: PipeOfTheClient, clock: types.SimpleNamespace
) -> None:
    client.load_state_dict({"version": 1, "timeouts": {"rank_heartbeat_timeout": 20}})
    client.init_workload_monitoring()
    client.send_heartbeat()
    clock.now = 9
    client.send_heartbeat()
    assert client.calculated == {"rank_heartbeat_timeout": 20}
    clock.now += 11
    client.send_heartbeat()
    assert client.calculated == {"rank_heartbeat_timeout": 55}
    assert pipe.messages()[-1] == {"type": "timeouts", "calculated": {"rank_heartbeat_timeout": 55}, "note": None}


def test_timeouts_that_are_set_aside_are_out_of_force_until_they_are_calculated_again(
    client: RankMonitorClient, pipe: PipeOfTheClient
) -> None:
    client.load_state_dict({"version": 1, "timeouts": {"rank_heartbeat_timeout": 20}})
    client.init_workload_monitoring()
    client.set_timeouts_aside("rank_heartbeat_timeout")
    assert pipe.messages()[-1]["calculated"] == client.timeouts_in_force() == {}
    client.observe("rank_heartbeat_timeout", 4)
    client.calculate_and_set_hb_timeouts(calc_initial=False)
    assert client.timeouts_in_force() == {"rank_heartbeat_timeout": 20}


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {"version": 2, "timeouts": {}},
        {"version": 1},
        {"version": 1, "timeouts": [5]},
        {"version": 1, "timeouts": {"rank_heartbeat_timeout": -5}},
        {"version": 1, "timeouts": {"rank_heartbeat_timeout": None}},
        {"version": 1, "timeouts": {"unknown": 5}},
    ],
)
def test_a_state_that_is_not_one_is_refused(client: RankMonitorClient, state: Any) -> None:
    with pytest.raises(ConfigError):
        client.load_state_dict(state)
    assert client.calculated == {}


# ---------------------------------------------------------------------------------------- monitors and their ranks

# tell() and told() are how a rank and its test wait for each other: a file appears.
PRELUDE = f"""
import ctypes, os, pathlib, resource, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from ft_monitor import STACKS_SIGNAL, STOP_SIGNALS, RankMonitorClient

client = RankMonitorClient()

def tell(name, text=""):
    pathlib.Path("." + name).write_text(str(text))
    os.rename("." + name, name)

def told(name):
    while not os.path.exists(name):
        time.sleep(0.01)

def on(numbers, action):
    for number in numbers:
        signal.signal(number, lambda number, frame: action(number))

def wait_for_ever():
    while True:
        signal.pause()

def start_child(group_of_its_own=True):
    '''As a DataLoader worker that hangs: nothing but SIGKILL ends it, and it tells the last signal it got.'''
    if os.fork() == 0:
        if group_of_its_own:
            os.setpgid(0, 0)
        on([*STOP_SIGNALS, signal.SIGABRT], lambda number: tell("child_got", number))
        tell("child", os.getpid())
        wait_for_ever()
    told("child")

"""


class Watched:
    """A rank and the monitor that watches it."""

    def __init__(self, started: Started, directory: Path, report_path: Path) -> None:
        self.started = started
        self.directory = directory
        self.report_path = report_path

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        return report

    @property
    def stacks(self) -> str:
        return self.report_path.with_suffix(".stacks.txt").read_text()

    @property
    def log(self) -> list[str]:
        """The monitor's own lines."""
        return [text for text in self.started.output.splitlines() if text.startswith("[ft_monitor")]

    @property
    def rank(self) -> int:
        return int(self.report["pid"])

    @property
    def monitor(self) -> int:
        return int(self.report["monitor_pid"])

    def told(self, name: str) -> str:
        """Wait until the rank tells something, and return it."""
        path = self.directory / name
        wait_until(lambda: path.exists() or self.started.process.poll() is not None, 20, f"{name!r} from the rank")
        assert path.exists(), f"ended before it told {name!r}:\n{self.started.output}"
        return path.read_text()

    def tell(self, name: str) -> None:
        (self.directory / name).touch()

    def send(self, number: int) -> None:
        """Send a signal to the monitor as soon as the rank is ready for it."""
        self.told("ready")
        os.kill(self.monitor, number)

    def ends(self) -> int:
        return self.started.wait(20)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", 5, "SIGSTOP")


Watch = Callable[..., Watched]
PYTHON = (sys.executable, "-I", "-S")  # starts in 20 ms


@pytest.fixture
def watch(start: Callable[..., Started], tmp_path: Path) -> Watch:
    """Start a monitor with a rank that runs `body`.

    `settings` are those of FaultToleranceConfig, `constants` replace some of ft_monitor's, `wrapper` is a command that
    starts the monitor's command.
    """

    def run(
        body: str,
        *options: str,
        constants: Mapping[str, float] | None = None,
        wrapper: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Watched:
        variables = {"FT_RUN_DIR": str(tmp_path / "run"), **(environment or {})}
        evidence = tmp_path / "run" / f"attempt_{variables.get('FT_ATTEMPT', '0')}"
        evidence.mkdir(parents=True)
        (tmp_path / "rank.py").write_text(PRELUDE + body)
        patched = f"vars(ft_monitor).update({dict(constants or {})}); ft_monitor.main()"
        load = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ft_monitor; {patched}"
        monitor = ["-c", load] if constants else [str(ROOT / "ft_monitor.py")]
        flags = [f"--ft-{name.replace('_', '-')}={value}" for name, value in settings.items()]
        rank = [sys.executable, "-S", str(tmp_path / "rank.py")]
        command = [*wrapper, *PYTHON, *monitor, *options, *flags, "--", *rank]
        number = variables.get("RANK") or variables.get("SLURM_PROCID") or "0"
        return Watched(start(command, **variables), tmp_path, evidence / f"rank{number}.json")

    return run


# -- a rank that hangs


@pytest.mark.parametrize(
    "setting, hang, others",
    [
        pytest.param("rank_heartbeat_timeout", "client.send_heartbeat(8)\nwhile True: pass",
                     {}, id="in_a_python_loop"),
        pytest.param("rank_heartbeat_timeout", "client.send_heartbeat(8)\nwhile True: ctypes.PyDLL(None).pause()",
                     {}, id="in_c_code_that_holds_the_interpreters_lock"),
        pytest.param("rank_heartbeat_timeout", "client.send_heartbeat(8)\nos.kill(os.getpid(), signal.SIGSTOP)",
                     {}, id="stopped"),
        pytest.param("initial_rank_heartbeat_timeout", "",
                     {"rank_heartbeat_timeout": 0.1}, id="before_its_first_heartbeat"),
        pytest.param("rank_section_timeouts[save]", "client.start_section('save')",
                     {"initial_rank_heartbeat_timeout": 0.1}, id="in_a_section"),
        pytest.param("rank_out_of_section_timeout", "client.start_section('load')\nclient.end_section('load')",
                     {"rank_section_timeouts": "load:0.3"}, id="outside_of_sections"),
        pytest.param("exit_timeout", "client.shutdown_workload_monitoring('ValueError: x')",
                     {"initial_rank_heartbeat_timeout": 0.1}, id="after_its_error"),
    ],
)  # fmt: skip
def test_a_rank_that_hangs_is_killed_when_its_time_is_over_and_not_before(
    watch: Watch, setting: str, hang: str, others: dict[str, Any]
) -> None:
    body = f'tell("silent", time.time())\nclient.init_workload_monitoring()\n{hang}\nwait_for_ever()'

    limit = {"rank_section_timeouts": "save:0.4"} if setting.endswith("[save]") else {setting: 0.4}
    watched = watch(body, **others, **limit)
    assert watched.ends() == -signal.SIGKILL
    report, verdict = watched.report, watched.report["verdict"]
    step = 8 if setting == "rank_heartbeat_timeout" else None
    assert verdict == {"setting": setting, "limit": 0.4, "calculated": False, "waited": verdict["waited"], "step": step}
    assert 0.4 <= verdict["waited"] < 0.4 + LATE_SECONDS
    assert 0.4 <= report["ended"] - float(watched.told("silent")) < 0.5 + LATE_SECONDS  # by the rank's own clock
    assert report["status"] == -signal.SIGKILL
    assert report["stopped"].startswith("hung: ") and report["stopped"] in watched.started.output
    assert report["stacks"] is True and STACKS_OF_THE_RANK in watched.stacks
    assert report["state"]["state"] in "RSTt"
    header = re.search(
        rf"^{ft_monitor.STACKS_HEADER} (\d+\.\d+) .*{re.escape(report['stopped'])}", watched.stacks, re.M
    )
    assert header is not None and 0 <= report["ended"] - float(header[1]) < LATE_SECONDS


def test_a_rank_that_never_connects_is_killed_when_its_time_is_over(watch: Watch) -> None:
    watched = watch("wait_for_ever()", startup_timeout=0.4)
    assert watched.ends() == -signal.SIGKILL
    report = watched.report
    assert (report["verdict"]["setting"], report["connected"]) == ("startup_timeout", None)
    assert report["stacks"] is None, "it could not be asked for them"
    assert 0.4 <= report["verdict"]["waited"] < 0.4 + LATE_SECONDS


def test_a_rank_that_shows_signs_of_life_is_not_ended(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
for step in range(12):
    client.send_heartbeat(step)
    client.start_section("step")
    time.sleep(0.1)
    client.end_section("step")
client.shutdown_workload_monitoring()
time.sleep(1)
"""
    limits = {"rank_heartbeat_timeout": 0.8, "rank_section_timeouts": "step:0.8", "rank_out_of_section_timeout": 0.8}
    watched = watch(body, startup_timeout=20, initial_rank_heartbeat_timeout=20, exit_timeout=0.8, **limits)
    assert watched.ends() == 0
    assert watched.report["verdict"] is None and watched.report["stopped"] is None


def test_at_half_of_its_time_a_rank_is_warned_of_and_its_stacks_are_taken(watch: Watch) -> None:
    body = """
stacks = pathlib.Path("run/attempt_0/rank0.stacks.txt")
client.init_workload_monitoring()
client.send_heartbeat(8)
while "rank.py" not in stacks.read_text():
    time.sleep(0.01)
client.shutdown_workload_monitoring()
"""
    watched = watch(body, rank_heartbeat_timeout=2)
    assert watched.ends() == 0
    assert STACKS_OF_THE_RANK in watched.stacks
    assert re.search(r"no heartbeat for 1\.\d s at step 8, limit 2 s; its stacks are asked for", watched.log[0])


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"/proc/vmstat": "nr_free_pages 9\noom_kill 3"}, 3),
        (
            {
                "/proc/self/cgroup": "0::/job\n",
                "/sys/fs/cgroup/job/memory.events": "max 8\noom 1\noom_kill 1",
                "/proc/vmstat": "oom_kill 3",
            },
            1,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/a:b\n0::/\n",
                "/sys/fs/cgroup/memory/a:b/memory.oom_control": "under_oom 0\noom_kill 2",
                "/proc/vmstat": "oom_kill 3",
            },
            2,
        ),
        ({"/proc/self/cgroup": "0::/\n", "/proc/vmstat": "oom_kill 3"}, 3),
        ({}, 0),
    ],
    ids=["no groups", "cgroup v2", "cgroup v1", "the root group", "not Linux"],
)
def test_kills_for_want_of_memory_are_those_of_the_control_group_if_it_counts_them(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kills: int
) -> None:
    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert ft_monitor.oom_kills() == kills


def has_dumps(path: Path, number: int) -> bool:
    return path.read_text().count(" in <module>") == number


def test_a_stopped_process_writes_its_stacks_before_it_goes_on(start: Callable[..., Started], tmp_path: Path) -> None:
    """Any of its threads could handle a signal that is sent to the process, while the main one goes on."""
    path = tmp_path / "stacks.txt"
    process = start([sys.executable, "-c", f"""
import faulthandler, os, signal, threading, time
faulthandler.register({int(ft_monitor.STACKS_SIGNAL)}, open({str(path)!r}, "w"))

def wait_in_turns():
    while True:
        time.sleep(0.0005)

def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)

for _ in range(20):
    threading.Thread(target=wait_in_turns, daemon=True).start()
while True:
    stop_itself()
    time.sleep(0.02)
"""])  # fmt: skip
    for dumps in range(1, 16):
        wait_until(lambda: ft_monitor.process_state(process.pid).get("state") == "T")
        ft_monitor.signal_main_thread(process.pid, ft_monitor.STACKS_SIGNAL)
        os.kill(process.pid, signal.SIGCONT)
        wait_until(functools.partial(has_dumps, path, dumps))
    assert path.read_text().count(" in stop_itself\n") == 15


@pytest.mark.parametrize("hang", ["wait_for_ever()", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_with_another_termination_signal_a_hung_rank_may_end_itself(watch: Watch, hang: str) -> None:
    body = f"on([signal.SIGTERM], lambda number: os._exit(9))\n{hang}\ntime.sleep(100)"
    watched = watch(body, startup_timeout=1, rank_termination_signal="SIGTERM")
    assert watched.ends() == 9
    assert watched.report["verdict"]["setting"] == "startup_timeout"


def test_a_hung_rank_that_ignores_the_termination_signal_is_killed_soon_after(watch: Watch) -> None:
    body = """
on([signal.SIGTERM], lambda number: tell("got", time.time()))
client.init_workload_monitoring()
client.send_heartbeat()
wait_for_ever()
"""
    patience = {"TERMINATION_SECONDS": 0.5}  # 5 s, but this test is in a hurry
    watched = watch(body, constants=patience, rank_heartbeat_timeout=0.3, rank_termination_signal="SIGTERM")
    assert watched.ends() == -signal.SIGKILL
    assert 0.3 < watched.report["ended"] - float(watched.told("got")) < 0.5 + LATE_SECONDS
    assert 0.3 <= watched.report["verdict"]["waited"] < 0.3 + LATE_SECONDS


def test_a_verdict_by_a_calculated_limit_goes_into_the_note_of_the_client(watch: Watch) -> None:
    body = """
client.note = os.path.abspath("note.json")
client.init_workload_monitoring()
client.send_heartbeat(8)
client.observe("rank_heartbeat_timeout", 0.2)
client.calculate_and_set_hb_timeouts(calc_initial=False)
wait_for_ever()
"""
    watched = watch(body, min_timeout=0.1, safety_factor=2)
    assert watched.ends() == -signal.SIGKILL
    verdict = json.loads(watched.told("note.json"))
    assert verdict == watched.report["verdict"]
    assert (verdict["calculated"], verdict["limit"], verdict["step"]) == (True, 0.4, 8)


def test_if_the_file_of_the_stacks_vanishes_the_rank_is_killed_all_the_same(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
on([STACKS_SIGNAL], lambda number: os.unlink("run/attempt_0/rank0.stacks.txt"))
client.send_heartbeat()
wait_for_ever()
"""
    watched = watch(body, rank_heartbeat_timeout=0.3)
    assert watched.ends() == -signal.SIGKILL
    assert watched.report["status"] == -signal.SIGKILL


# -- a rank that ends


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_monitor_ends_with_the_exit_code_of_its_rank(watch: Watch, code: int) -> None:
    watched = watch(f"sys.exit({code})")
    assert watched.ends() == watched.report["status"] == code
    assert watched.log == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM", "SIGABRT", "SIGINT"])
def test_the_monitor_ends_by_the_signal_of_its_rank_and_leaves_no_core_dump(watch: Watch, name: str) -> None:
    body = f"""
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.kill(os.getpid(), signal.{name})
"""
    allow_core_dumps = ("sh", "-c", 'ulimit -c "$(ulimit -H -c)"; exec "$@"', "sh")
    watched = watch(body, wrapper=allow_core_dumps)
    assert watched.ends() == watched.report["status"] == -signal.Signals[name]
    assert watched.report["stopped"] is None
    assert list(watched.directory.glob("*core*")) == []
    assert ("Segmentation fault" in watched.started.output) == (name == "SIGSEGV")  # with the stack of the rank


LAST_WORDS = {
    "it_ends": "sys.exit(0)",
    "it_crashes": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(os.getpid(), signal.SIGSEGV)",
    "it_hangs": "client.init_workload_monitoring(); client.send_heartbeat(); wait_for_ever()",
    "it_is_stopped": "tell('ready'); wait_for_ever()",
    "it_ignores_the_stop": "on(STOP_SIGNALS, print); tell('ready'); wait_for_ever()",
    "its_peer_failed": "tell('ready'); wait_for_ever()",
}
SENT = {"it_is_stopped": signal.SIGTERM, "it_ignores_the_stop": signal.SIGTERM, "its_peer_failed": signal.SIGABRT}


@pytest.mark.parametrize("why", LAST_WORDS)
def test_nothing_of_a_rank_outlives_it_whatever_ended_it(watch: Watch, why: str) -> None:
    watched = watch(f"start_child()\n{LAST_WORDS[why]}", "--shutdown-timeout=0.2", rank_heartbeat_timeout=0.3)
    child = int(watched.told("child"))
    if why in SENT:
        watched.send(SENT[why])
    watched.ends()
    assert not is_running(child)
    assert not is_running(watched.rank)


def test_the_exception_that_ends_a_rank_is_in_its_report(watch: Watch) -> None:
    body = """
def train():
    raise ValueError("no such file")

client.init_workload_monitoring()
train()
"""
    watched = watch(body)
    assert watched.ends() == 1
    assert re.fullmatch(r"ValueError: no such file \(rank\.py:\d+ in train\)", watched.report["error"])
    assert "Traceback" in watched.started.output


# -- a rank that is stopped


@pytest.mark.parametrize("number", ft_monitor.STOP_SIGNALS)
def test_a_stop_signal_goes_to_the_rank_alone_which_may_end_by_itself(watch: Watch, number: signal.Signals) -> None:
    body = """
def stop(number):
    tell("got", number)
    time.sleep(0.1)
    client.report_saved(8)
    os._exit(5)

on(STOP_SIGNALS, stop)
start_child(group_of_its_own=False)
client.init_workload_monitoring()
tell("ready")
wait_for_ever()
"""
    watched = watch(body)
    watched.send(number)
    assert watched.ends() == 5
    assert watched.told("got") == str(int(number))
    assert not (watched.directory / "child_got").exists()
    assert (watched.report["stopped"], watched.report["saved"]) == (f"stopped by {number.name}", 8)


def test_a_rank_that_does_not_end_in_its_grace_is_killed(watch: Watch) -> None:
    watched = watch("on(STOP_SIGNALS, print)\ntell('ready')\nwait_for_ever()", "--shutdown-timeout=0.4")
    watched.told("ready")
    before = time.time()
    watched.send(signal.SIGTERM)
    assert watched.ends() == -signal.SIGKILL
    assert 0.4 <= watched.report["ended"] - before < 0.4 + LATE_SECONDS


def test_no_clock_runs_in_the_grace(watch: Watch) -> None:
    body = """
def stop(number):
    time.sleep(0.8)
    os._exit(5)

on([signal.SIGTERM], stop)
client.init_workload_monitoring()
client.send_heartbeat()
tell("ready")
wait_for_ever()
"""
    watched = watch(body, rank_heartbeat_timeout=0.6)
    watched.send(signal.SIGTERM)
    assert watched.ends() == 5


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_stop_signal_is_not_passed_on(watch: Watch, second: int) -> None:
    body = """
stops = []
on(STOP_SIGNALS, lambda number: (stops.append(number), tell("stop")))
on([signal.SIGUSR1], lambda number: tell("fence"))
on([signal.SIGUSR2], lambda number: os._exit(len(stops)))
tell("ready")
wait_for_ever()
"""
    watched = watch(body)
    watched.send(signal.SIGTERM)
    watched.told("stop")
    watched.send(second)
    watched.send(signal.SIGUSR1)
    watched.told("fence")  # now the monitor has taken in the second one, too
    watched.send(signal.SIGUSR2)
    assert watched.ends() == 1


def test_user_signals_are_passed_on_and_end_nothing(watch: Watch) -> None:
    body = """
on([signal.SIGUSR1, signal.SIGUSR2], lambda number: tell(signal.Signals(number).name))
tell("ready")
told("end")
"""
    watched = watch(body)
    for name in ("SIGUSR1", "SIGUSR2"):
        watched.send(signal.Signals[name])
        watched.told(name)
    watched.tell("end")
    assert watched.ends() == 0
    assert watched.report["stopped"] is None


def test_a_signal_that_is_ignored_when_the_monitor_starts_stays_ignored_as_nohup_wants_it(watch: Watch) -> None:
    body = """
on([signal.SIGUSR1], lambda number: os._exit(5))
tell("ignored", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
tell("ready")
wait_for_ever()
"""
    watched = watch(body, wrapper=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    assert watched.told("ignored") == "True"
    watched.send(signal.SIGHUP)
    watched.send(signal.SIGUSR1)
    assert watched.ends() == 5
    assert watched.report["stopped"] is None


def test_a_stopped_rank_is_continued_so_that_it_can_take_the_stop_signal(watch: Watch) -> None:
    body = """
on([signal.SIGTERM], lambda number: os._exit(5))
tell("ready")
os.kill(os.getpid(), signal.SIGSTOP)
wait_for_ever()
"""
    watched = watch(body)
    watched.told("ready")
    wait_until(lambda: state_of(watched.rank) == "T", 5, "SIGSTOP")
    watched.send(signal.SIGTERM)
    assert watched.ends() == 5


def test_a_rank_whose_peer_failed_is_killed_at_once(watch: Watch) -> None:
    body = """
on([*STOP_SIGNALS, signal.SIGABRT], print)
client.init_workload_monitoring()
client.send_heartbeat()
tell("ready")
wait_for_ever()
"""
    watched = watch(body, "--shutdown-timeout=20")
    watched.told("ready")
    before = time.time()
    watched.send(signal.SIGABRT)
    assert watched.ends() == -signal.SIGKILL
    assert watched.report["ended"] - before < LATE_SECONDS
    assert watched.report["stopped"] == "its peer failed"
    assert watched.report["stacks"] is True and STACKS_OF_THE_RANK in watched.stacks


@pytest.mark.parametrize("patience", [20, 0.4])
def test_a_rank_whose_peer_failed_may_finish_saving_a_checkpoint_in_bounded_time(watch: Watch, patience: float) -> None:
    body = """
client.init_workload_monitoring()
client.start_section("checkpointing")
tell("ready")
told("save")
client.report_saved(8)
client.end_section("checkpointing")
wait_for_ever()
"""
    watched = watch(body, workers_stop_timeout=patience)
    watched.told("ready")
    before = time.time()
    watched.send(signal.SIGABRT)
    wait_until(lambda: watched.report["stopped"], 5, "the verdict")
    if patience == 20:
        watched.tell("save")
    assert watched.ends() == -signal.SIGKILL
    seconds = watched.report["ended"] - before
    assert (watched.report["saved"], seconds >= 0.4) == ((8, seconds >= 0.4) if patience == 20 else (None, True))
    assert seconds < 0.4 + LATE_SECONDS


def test_signals_to_all_processes_at_once_leave_the_monitor_until_the_rank_has_ended(watch: Watch) -> None:
    body = """
def stop(number):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2)
    client.send_heartbeat(9)
    client.report_saved(9)
    client.shutdown_workload_monitoring()
    os._exit(5)

on([signal.SIGTERM], stop)
start_child()
client.init_workload_monitoring()
tell("ready")
wait_for_ever()
"""
    watched = watch(body)
    watched.told("ready")
    for pid in (watched.monitor, int(watched.told("child")), watched.rank):
        os.kill(pid, signal.SIGTERM)
    assert watched.ends() == 5
    report = watched.report
    assert (report["saved"], report["step"], report["status"]) == (9, 9, 5)
    assert report["ended"] is not None


# -- a process that is killed or frozen

AS_PARENT = (*PYTHON, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
FROM_A_THREAD = """
import os, signal, subprocess, sys, threading, time

def start():
    global monitor
    monitor = subprocess.Popen(sys.argv[1:])
    while not os.path.exists("ready"):
        time.sleep(0.01)

thread = threading.Thread(target=start)
thread.start()
thread.join()
os.kill(monitor.pid, signal.SIGUSR1)
sys.exit(monitor.wait())
"""


def test_when_the_monitors_parent_is_killed_the_rank_and_its_children_are_too(watch: Watch) -> None:
    body = "start_child()\nclient.init_workload_monitoring()\ntell('ready')\nwait_for_ever()"
    watched = watch(body, wrapper=AS_PARENT)
    watched.told("ready")
    pids = [watched.monitor, watched.rank, int(watched.told("child"))]
    watched.started.process.kill()
    wait_until(lambda: not any(map(is_running, pids)), 2, "the end of all processes")
    assert watched.report["stopped"] == f"the launcher (pid {watched.started.pid}) is gone"
    assert watched.report["status"] == -signal.SIGKILL


def test_when_the_monitors_parent_was_gone_before_the_monitor_could_watch_it_the_rank_is_killed(watch: Watch) -> None:
    watched = watch("wait_for_ever()", f"--parent-pid={os.getppid()}")
    assert watched.ends() == -signal.SIGKILL
    assert watched.report["stopped"] == f"the launcher (pid {os.getppid()}) is gone"


def test_the_end_of_the_thread_that_started_the_monitor_ends_nothing(watch: Watch) -> None:
    body = """
on([signal.SIGUSR1], lambda number: tell("fence"))
tell("ready")
told("end")
sys.exit(5)
"""
    watched = watch(body, wrapper=(*PYTHON, "-c", FROM_A_THREAD))
    watched.told("fence")
    watched.tell("end")
    assert watched.ends() == 5


def test_when_the_monitor_is_killed_the_rank_is_too(watch: Watch) -> None:
    watched = watch("client.init_workload_monitoring()\ntell('ready')\nwait_for_ever()")
    watched.send(signal.SIGKILL)
    wait_until(lambda: not is_running(watched.rank), 2, "the end of the rank")


def test_a_frozen_monitor_neither_blocks_its_rank_nor_misses_what_is_not_a_heartbeat(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
client.send_heartbeat(1)
client.start_section("save")
tell("ready")
told("frozen")
for step in range(4000):  # more than a pipe holds
    client.send_heartbeat(step)
    client.report_saved(step)
client.end_section("save")
tell("sent")
told("awake")
for step in range(4000, 4100):
    client.send_heartbeat(step)
    time.sleep(0.02)
"""
    watched = watch(body, rank_section_timeouts="save:2")
    watched.told("ready")
    freeze(watched.monitor)
    watched.tell("frozen")
    watched.told("sent")
    os.kill(watched.monitor, signal.SIGCONT)
    watched.tell("awake")
    assert watched.ends() == 0
    report = watched.report
    assert (report["saved"], report["sections"], report["verdict"], report["step"]) == (3999, [], None, 4099)


def test_a_monitor_that_was_frozen_when_training_ended_does_not_wait_for_more_heartbeats(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
tell("ready")
told("frozen")
for step in range(5000):
    client.send_heartbeat(step)
client.shutdown_workload_monitoring()
tell("sent")
told("end")  # the client says nothing any more, but the process goes on
"""
    watched = watch(body, rank_heartbeat_timeout=0.8)
    watched.told("ready")
    freeze(watched.monitor)
    watched.tell("frozen")
    watched.told("sent")
    os.kill(watched.monitor, signal.SIGCONT)
    end = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > end or watched.started.process.poll() is not None)
    watched.tell("end")
    assert watched.ends() == 0


@pytest.mark.parametrize("late", [0.5, 1000.0])
def test_a_monitor_that_was_suspended_with_its_rank_does_not_take_it_for_hung(watch: Watch, late: float) -> None:
    """It knows from SIGCONT, or, since a virtual machine is continued without one, from how late it is."""
    body = """
client.init_workload_monitoring()
client.send_heartbeat(8)
client.report_saved(8)
told("awake")
client.shutdown_workload_monitoring()
"""
    watched = watch(body, constants={"SUSPENDED_SECONDS": late}, rank_heartbeat_timeout=1)
    wait_until(lambda: watched.report_path.exists() and watched.report["saved"], 20, "the first heartbeat")
    rank, monitor = watched.rank, watched.monitor
    freeze(monitor)
    freeze(rank)
    end = time.monotonic() + 1.6  # the clock has run out, and the monitor is later than it ever should be
    wait_until(lambda: time.monotonic() > end)
    os.kill(monitor, signal.SIGCONT)
    if late == 0.5:
        watched.started.wait_for_output("suspended; its clocks start anew", limit=5)
    os.kill(rank, signal.SIGCONT)
    watched.tell("awake")
    assert watched.ends() == 0
    assert watched.report["verdict"] is None


def test_a_reader_of_the_log_that_has_stopped_saves_no_hung_rank(tmp_path: Path) -> None:
    """Such as a pager, or a file system that hangs: what the rank itself may wait for."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    (tmp_path / "rank.py").write_text(f"{PRELUDE}\nclient.init_workload_monitoring()\nwait_for_ever()")
    rank = [sys.executable, "-S", str(tmp_path / "rank.py")]
    command = [*PYTHON, str(ROOT / "ft_monitor.py"), "--ft-initial-rank-heartbeat-timeout=1", "--", *rank]
    monitor = subprocess.Popen(command, stderr=writer, cwd=tmp_path)
    try:
        assert monitor.wait(20) == -signal.SIGKILL
    finally:
        monitor.kill()
        os.close(reader)
        os.close(writer)


def test_an_error_in_a_forked_child_is_not_the_ranks(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
child = os.fork()
if child == 0:
    raise ValueError("in the child")
os.waitpid(child, 0)
client.send_heartbeat(3)
client.shutdown_workload_monitoring()
"""
    watched = watch(body)
    assert watched.ends() == 0
    assert "in the child" in watched.started.output
    assert (watched.report["error"], watched.report["step"]) == (None, 3)


def test_the_first_process_of_a_container_ends_with_a_code_where_a_signal_cannot_end_it(watch: Watch) -> None:
    wrapper = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted")
    watched = watch("os.kill(os.getpid(), signal.SIGKILL)", wrapper=wrapper)
    assert watched.ends() == 128 + signal.SIGKILL


# -- the pipe


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(random.Random(0).randbytes(10_000), id="random_bytes"),
        pytest.param(bytes(10_000), id="a_long_line"),
        pytest.param(line({**timeouts(), "calculated": [1]}), id="timeouts_that_are_a_list"),
        pytest.param(line(timeouts(rank_heartbeat_timeout=10**400)), id="a_timeout_too_long_for_a_float"),
        pytest.param(line({**timeouts(rank_heartbeat_timeout=0.6), "note": "a\0b"}), id="a_note_that_is_no_file_name"),
        pytest.param(line({**timeouts(rank_heartbeat_timeout=0.6), "note": "/"}), id="a_note_that_is_a_directory"),
        pytest.param(line(enter("\ud800")), id="text_that_is_not_unicode"),
    ],
)
def test_nothing_on_the_pipe_keeps_the_monitor_from_its_work(watch: Watch, tmp_path: Path, noise: bytes) -> None:
    body = """
client.init_workload_monitoring()
os.set_blocking(int(os.environ["FT_MONITOR_FD"]), True)
for _ in range(2):
    os.write(int(os.environ["FT_MONITOR_FD"]), pathlib.Path("noise").read_bytes() + b"\\n")
client.send_heartbeat(2)
wait_for_ever()
"""
    (tmp_path / "noise").write_bytes(noise)
    watched = watch(body, rank_heartbeat_timeout=0.6)
    assert watched.ends() == -signal.SIGKILL
    verdict = watched.report["verdict"]
    assert (verdict["setting"], verdict["limit"], verdict["step"]) == ("rank_heartbeat_timeout", 0.6, 2)
    assert sum("skipped" in text for text in watched.log) <= 1
    assert "Traceback" not in watched.started.output


def test_what_is_not_a_message_is_logged_once(watch: Watch) -> None:
    body = """
for text in (b"a\\n", b"b\\n", b"c\\n"):
    os.write(int(os.environ["FT_MONITOR_FD"]), text)
    time.sleep(0.05)
"""
    watched = watch(body)
    assert watched.ends() == 0
    assert ["skipped what is not a message" in text for text in watched.log] == [True]


def test_what_the_rank_starts_inherits_its_pipe_until_it_connects(watch: Watch) -> None:
    body = """
pipe = os.readlink(f"/proc/self/fd/{os.environ['FT_MONITOR_FD']}")

def is_inherited():
    command = ["ls", "-l", "/proc/self/fd"]
    return pipe in subprocess.run(command, stdout=subprocess.PIPE, close_fds=False, check=True).stdout.decode()

before = is_inherited()  # a shell may stand between the monitor and the rank
client.init_workload_monitoring()
tell("inherited", [before, is_inherited()])
"""
    watched = watch(body)
    assert watched.ends() == 0
    assert watched.told("inherited") == "[True, False]"


def test_a_second_client_in_the_same_process_is_heard(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
client.shutdown_workload_monitoring()
client = RankMonitorClient()
client.init_workload_monitoring()
client.send_heartbeat(8)
wait_for_ever()
"""
    watched = watch(body, rank_heartbeat_timeout=0.4)
    assert watched.ends() == -signal.SIGKILL
    assert watched.report["verdict"]["step"] == 8


# -- the report


def test_the_report_tells_how_the_rank_does_and_how_it_ended(watch: Watch) -> None:
    body = """
told("go")
client.init_workload_monitoring()
client.start_section("save")
client.send_heartbeat(7)
client.send_heartbeat(8)
client.report_saved(8)
told("end")
client.shutdown_workload_monitoring("ValueError: x")
sys.exit(3)
"""
    before = time.time()
    watched = watch(body, rank_heartbeat_timeout=20, environment={"RANK": "5", "FT_ATTEMPT": "2"})
    wait_until(watched.report_path.exists, 20, "the report")
    report = watched.report
    assert (report["rank"], report["attempt"], report["host"]) == (5, 2, socket.gethostname())
    assert report["monitor_pid"] == watched.started.pid
    assert before <= report["started"] <= time.time()
    assert report["clock"] == {"setting": "startup_timeout", "since": report["clock"]["since"], "limit": None}
    assert abs(report["clock"]["since"] - report["started"]) < LATE_SECONDS and not report["over"]
    assert report["launcher_pid"] == os.getpid()
    assert {report[name] for name in ("connected", "heartbeat", "ended", "status", "stopped", "verdict")} == {None}
    watched.tell("go")
    wait_until(lambda: watched.report["saved"] == 8, 5, "the report of the checkpoint")
    report = watched.report
    assert (report["first_step"], report["step"], report["sections"]) == (7, 8, ["save"])
    assert report["timeouts"] == {"rank_heartbeat_timeout": 20.0}
    assert report["started"] <= report["connected"] <= report["heartbeat"]
    assert (report["clock"]["setting"], report["clock"]["limit"]) == ("rank_heartbeat_timeout", 20.0)
    assert abs(report["clock"]["since"] - report["heartbeat"]) < LATE_SECONDS
    watched.tell("end")
    assert watched.ends() == 3
    report = watched.report
    assert (report["status"], report["error"], report["stopped"]) == (3, "ValueError: x", None)
    assert report["over"] and report["clock"]["setting"] == "exit_timeout"
    assert report["heartbeat"] <= report["error_time"] <= report["ended"] <= time.time()
    assert sorted(path.name for path in watched.report_path.parent.iterdir()) == ["rank5.json", "rank5.stacks.txt"]


def test_the_report_is_at_most_a_second_old(watch: Watch) -> None:
    body = """
client.init_workload_monitoring()
client.send_heartbeat(1)
time.sleep(0.1)
client.send_heartbeat(2)
tell("ready")
told("end")
"""
    watched = watch(body)
    watched.told("ready")
    wait_until(lambda: watched.report["step"] == 2, 1 + LATE_SECONDS, "the report of the last heartbeat")
    watched.tell("end")
    assert watched.ends() == 0


def test_without_a_place_for_its_report_the_monitor_does_its_work(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    body = "client.init_workload_monitoring()\nclient.send_heartbeat()\nwait_for_ever()"
    watched = watch(body, rank_heartbeat_timeout=0.3, environment={"FT_RUN_DIR": str(tmp_path / "file")})
    assert watched.ends() == -signal.SIGKILL
    assert ["cannot write" in text for text in watched.log].count(True) == 1
    assert "hung: no heartbeat" in watched.started.output


def test_a_report_that_could_not_be_written_is_written_when_its_place_is_back(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "place").touch()
    body = """
client.init_workload_monitoring()
client.report_saved(1)
tell("ready")
told("go")
client.report_saved(2)
"""
    watched = watch(body, environment={"FT_RUN_DIR": str(tmp_path / "place")})
    watched.told("ready")
    wait_until(lambda: watched.log, 5, "the line on the report")
    (tmp_path / "place").unlink()
    watched.tell("go")
    assert watched.ends() == 0
    assert json.loads((tmp_path / "place" / "attempt_0" / "rank0.json").read_text())["saved"] == 2
    assert ["cannot write" in text for text in watched.log].count(True) == 1


def test_the_state_of_a_process_tells_where_in_the_kernel_it_waits(start: Callable[..., Started]) -> None:
    sleeping = start(["sleep", "1000"])
    wait_until(lambda: state_of(sleeping.pid) == "S", 5, "a sleeping process")
    assert ft_monitor.process_state(sleeping.pid) == {
        "state": "S",
        "wchan": Path(f"/proc/{sleeping.pid}/wchan").read_text(),
    }


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def in_worker(last_line: str) -> str:
    """As torch's ExceptionWrapper.reraise() has it."""
    frames = '  File "/usr/lib/site-packages/torch/utils/data/_utils/worker.py", line 1, in _worker_loop\n' * 9
    head = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):"
    return f"{head}\n{frames}{last_line}\n"


def test_an_error_is_described_by_its_first_and_last_line_and_where_it_came_from() -> None:
    place = r" \(test_monitor\.py:\d+ in raised\)"
    described = {
        "one line": ("ValueError: one line", ValueError("one line")),
        "two lines": ("ValueError: two lines", ValueError("two\n  lines\n")),
        "long": (f"ValueError: {'x' * 288}\\.\\.\\.", ValueError("x" * 1000)),
        "no text": ("KeyboardInterrupt", KeyboardInterrupt()),
    }
    for text, error in described.values():
        assert re.fullmatch(f"{text}{place}", ft_monitor.describe_error(raised(error)))
    stale = ft_monitor.describe_error(raised(OSError(in_worker("OSError: [Errno 116] Stale file handle"))))
    first = "OSError: Caught OSError in DataLoader worker process 0\\."
    assert re.fullmatch(rf"{first} \.\.\. OSError: \[Errno 116\] Stale file handle{place}", stale)
    assert len(ft_monitor.describe_error(raised(OSError(in_worker("y" * 1000))))) < 350


def test_every_line_of_a_message_begins_with_who_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    ft_monitor.configure_logging("test_prefix", "INFO", "ft_monitor attempt 1 rank 3")
    logging.getLogger("test_prefix").warning("%s", "one\n  two\n\nfour")
    prefix = "[ft_monitor attempt 1 rank 3] "
    assert capfd.readouterr().err == f"{prefix}one\n{prefix}  two\n{prefix}\n{prefix}four\n"


def test_under_a_launcher_that_gives_slurm_procid_only_the_rank_has_this_number(watch: Watch) -> None:
    watched = watch("client.init_workload_monitoring()", environment={"SLURM_PROCID": "3"})
    assert watched.ends() == 0
    assert watched.report_path.name == "rank3.json"
    assert watched.report["rank"] == 3
    assert watched.report_path.with_name("rank3.stacks.txt").exists()


# -- how a monitor is started


def run_monitor(start: Callable[..., Started], *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Start a monitor; return its exit status and the lines of its output."""
    started = start([*PYTHON, ROOT / "ft_monitor.py", *arguments], **environment)
    return started.wait(20), started.output.splitlines()


def test_a_rank_gets_the_configuration_its_pipe_and_the_rest_of_the_environment(start: Callable[..., Started]) -> None:
    show = "import os; print(os.environ['FT_CONFIG']); print(os.environ['OTHER'], os.environ['FT_MONITOR_FD'])"
    command = ["--ft-startup-timeout=9", "--", *PYTHON, "-c", show]
    status, output = run_monitor(start, *command, OTHER="other", FT_CONFIG='{"exit_timeout": 8}')
    assert status == 0
    config = FaultToleranceConfig.from_mapping(json.loads(output[0]))
    assert config == FaultToleranceConfig(startup_timeout=9, exit_timeout=8)
    assert re.fullmatch(r"other \d+", output[1])


def test_what_follows_the_command_is_the_commands_own(start: Callable[..., Started]) -> None:
    command = ["echo", "--ft-startup-timeout=0", "--help", "--", "-x"]
    for arguments in (["--", *command], command):
        assert run_monitor(start, *arguments) == (0, [" ".join(command[1:])])


def test_a_limit_may_be_as_long_as_one_likes(watch: Watch) -> None:
    body = """
on([signal.SIGTERM], lambda number: os._exit(5))
client.init_workload_monitoring()
client.send_heartbeat()
tell("ready")
wait_for_ever()
"""
    watched = watch(body, "--shutdown-timeout=1e9", startup_timeout=1e9, rank_heartbeat_timeout=1e9)
    watched.send(signal.SIGTERM)
    assert watched.ends() == 5


@pytest.mark.parametrize(
    "command, status, reason",
    [
        ("./missing", 127, "No such file or directory"),
        ("./no_permission", 126, "Permission denied"),
        ("./no_permission/x", 126, "Not a directory"),
        ("./no_program", 126, "Exec format error"),
    ],
)
def test_a_command_that_cannot_be_started_is_one_line_and_the_status_of_a_shell(
    start: Callable[..., Started], tmp_path: Path, command: str, status: int, reason: str
) -> None:
    (tmp_path / "no_permission").touch()
    (tmp_path / "no_program").write_text("text")
    (tmp_path / "no_program").chmod(0o755)
    expected = f"[ft_monitor attempt 0 rank 0] cannot start {command!r}: {reason}"
    assert run_monitor(start, "--", command) == (status, [expected])


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "no command: give the rank's command line after --"),
        (["--"], "no command: give the rank's command line after --"),
        (["--ft-startup-timeout=0", "--", "true"], "startup_timeout: got '0', expected a number greater than 0"),
        (["--ft-startup=5", "--", "true"], "--ft-startup=5"),
        (["--ft-cfg-path=missing.json", "--", "true"], "missing.json"),
        (["--shutdown-timeout=nan", "--", "true"], "nan"),
        (["--shutdown-timeout=-1", "--", "true"], "-1"),
    ],
)
def test_wrong_usage_is_one_line_of_error_below_the_usage(
    start: Callable[..., Started], arguments: list[str], error: str
) -> None:
    status, output = run_monitor(start, *arguments)
    assert status == 2
    assert [text.split(":")[0] for text in output] == ["usage", "ft_monitor.py"]
    assert error in output[1]


# -------------------------------------------------------------------------------------- the file and its contracts


def run_python(code: str) -> str:
    """Run code that can import the module in an interpreter that has nothing else; return its output."""
    command = [*PYTHON, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_module_imports_nothing_but_the_standard_library() -> None:
    modules = {name.partition(".")[0] for name in run_python("import ft_monitor; print(*sys.modules)").split()}
    assert modules - sys.stdlib_module_names == {"ft_monitor", "__main__", "__mp_main__"}


def test_importing_the_module_does_nothing() -> None:
    look = """
import os, signal, subprocess, threading, multiprocessing.connection
def look():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return handlers, sorted(os.listdir("/proc/self/fd")), dict(os.environ), threading.enumerate(), sys.excepthook
before = look()
import ft_monitor
print(look() == before)
"""
    assert run_python(look) == "True\n"


def table(title: str) -> dict[str, list[str]]:
    """A table of the module's docstring: its rows by their first cell. Columns stand at least two spaces apart."""
    _, _, rest = (ft_monitor.__doc__ or "").partition(f"\n{title}")
    rows = itertools.takewhile(lambda row: row.startswith("    "), rest.splitlines()[1:])
    cells = [re.split("  +", row.strip()) for row in rows if row[4] != " "]
    return {first: others for first, *others in cells}


def test_the_table_of_messages_is_that_of_the_code() -> None:
    documented = {kind: cells[0] for kind, cells in table("Messages, ").items() if kind != "type"}
    assert documented == {kind: ", ".join(fields) for kind, fields in MESSAGE_FIELDS.items()}
    assert f"at most {MAX_MESSAGE_BYTES:,} bytes" in (ft_monitor.__doc__ or "")


def test_the_table_of_clocks_names_every_timeout_of_the_configuration() -> None:
    every: dict[str, Any] = {"rank_section_timeouts": {"name": 1}, **dict.fromkeys(TIMEOUTS, 1)}
    assert table("Clocks, ").keys() - {"setting"} == FaultToleranceConfig(**every).timeouts().keys()


def test_the_table_of_the_environment_names_every_variable_that_the_code_reads() -> None:
    read = re.findall(r"""environ(?:\.get\(|\[)"(FT_\w+)\"""", Path(ft_monitor.__file__).read_text())
    assert table("Environment").keys() - {"variable", "RANK"} == set(read)


def test_the_table_of_endings_names_the_signals_and_the_times_of_the_code() -> None:
    rows = table("How a rank is ended")
    named = [re.findall(r"SIG\w+", row) for row in rows]
    for signals in (ft_monitor.STOP_SIGNALS, ft_monitor.PASSED_ON_SIGNALS, [ft_monitor.PEER_FAILED]):
        assert [number.name for number in signals] in named
    assert f"after {ft_monitor.TERMINATION_SECONDS:g} s SIGKILL" in rows["a clock ran out"][0]


def test_the_table_of_files_names_those_that_a_rank_leaves() -> None:
    assert table("Files in FT_RUN_DIR").keys() == {"rank<N>.json", "rank<N>.stacks.txt"}
    assert ft_monitor.REPORT_SECONDS == 1  # "at most a second old"
