#!/usr/bin/env python3
"""The rank monitor: it starts one rank, hears its heartbeats over a pipe, and ends it when it hangs.

    python ft_monitor.py --ft-rank-heartbeat-timeout 60 -- python -u train.py

ft_launcher.py starts one monitor for each rank; alone, it works under any launcher (`srun python ft_monitor.py ...`).
The monitor is the rank's parent, as `tini` is a container's: it ends after the rank, with the rank's own exit code
or signal. `RankMonitorClient`, below, is the rank's end of the pipe, for any PyTorch loop. Standard library only.

Environment
    variable       set by    read by          meaning
    FT_CONFIG      launcher  monitor, client  the configuration as JSON
    FT_RUN_DIR     launcher  monitor, client  directory of the evidence; without it none is written
    FT_ATTEMPT     launcher  monitor, client  0, 1, 2 ...: how often this launcher has started workers
    FT_MONITOR_FD  monitor   client           file descriptor of the pipe's write end
    RANK           launcher  monitor, client  the rank's number; without it SLURM_PROCID, which srun sets

Messages, one JSON object a line, at most 4,096 bytes, from the rank to the monitor only
    type       fields            meaning
    init       rank, stacks      connected; whether the rank writes its stacks when asked by STACKS_SIGNAL
    heartbeat  step              alive; the step is the training's, or null
    section    name, open        entered (true) or left (false) a named section
    timeouts   calculated, note  these calculated timeouts replace the configured ones, until the next such message;
                                 when one of them ends the rank, the monitor writes its verdict to the file `note`
    saved      step              a checkpoint is safely on disk
    request    action, reason    workload control, when this attempt ends: ShutdownWorkload or ExcludeThisNode
    bye        error             monitoring ends: training is over (null), or failed with this error

Clocks, in seconds; "none" is never. The first that runs out decides.
    setting                         runs from                    to
    startup_timeout                 process start                init
    initial_rank_heartbeat_timeout  init                         first heartbeat
    rank_heartbeat_timeout          last heartbeat               next heartbeat
    rank_section_timeouts[name]     section entered              section left
    rank_out_of_section_timeout     init, or last section left   next section entered
    exit_timeout                    bye with an error            process end
Heartbeat clocks rest while a section that has a timeout is open, and start anew when it is left.
Timeouts can be calculated: the longest time on a clock that any rank has seen, times safety_factor, averaged with what
earlier runs have calculated, and at least min_timeout. Until a run has seen all that the heartbeat timeout of earlier
runs came from, such as a validation, it makes that one longer only. A calculated timeout that has ended ranks twice
with no new step in between is widened.

How a rank is ended
    half of a clock passed               a warning and its stacks; nothing is ended
    a clock ran out                      verdict, stacks, termination signal to its session, after 5 s SIGKILL
    SIGTERM, SIGINT, SIGHUP or SIGQUIT   passed on to the rank, after the grace SIGKILL to its session
    SIGABRT (a peer of the rank failed)  stacks, SIGKILL to its session, but a checkpoint that is being saved (section
                                         "checkpointing") may be finished, for workers_stop_timeout at most
    SIGUSR1, SIGUSR2                     passed on to the rank; nothing is ended
    the monitor's parent died            SIGKILL to its session
    the rank ended by itself             SIGKILL to what is left of its session

Files in FT_RUN_DIR/attempt_<FT_ATTEMPT>
    rank<N>.json        the report: how the rank does, at most a second old, and how it ended
    rank<N>.stacks.txt  stacks of all its threads, each time they were asked for

Files in a directory that belongs to the training, where it keeps its calculated timeouts
    ft_state.json          {"version", "timeouts", "included", "killed", "time"}, of RankMonitorClient.write_state()
    killed_rank<N>.json    verdict of a monitor whose rank ran out of a calculated timeout, until read_state()
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import datetime
import difflib
import enum
import faulthandler
import fcntl
import json
import logging
import math
import multiprocessing
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MAX_MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write of this size is whole or fails, also from several threads
PIPE_BYTES = 65536  # what a pipe takes before it is full; see pipe(7)
TERMINATION_SECONDS = 5.0  # from the termination signal of a hung rank to SIGKILL
REAP_SECONDS = 10.0  # from SIGKILL to giving up on a process that the kernel does not end (D state)
SUSPENDED_SECONDS = 5.0  # a monitor that wakes later than this was suspended, and its rank most likely with it
STACKS_SECONDS = 1.0  # how long a rank may take to write its stacks; 1 ms is usual
HALF_TIME_WARNINGS = 3  # in one attempt, so that a training whose steps are always slow does not fill the log
LONGEST_WAIT_SECONDS = 86_400.0  # poll(2) takes at most 24 days
REPORT_SECONDS = 1.0  # between reports of a rank that is well
DEFAULT_GRACE_SECONDS = 30.0  # as torchrun's --shutdown-timeout
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4  # options of prctl(2)
PARENT_DIED = signal.SIGURG  # sent by the kernel; by default a process ignores it, so a stray one is harmless

# To a rank, not to a monitor, and so no clash with PARENT_DIED.
STACKS_SIGNAL = signal.SIGURG  # ignored by default too: harmless to a rank that has not armed it, or is shutting down
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
PEER_FAILED = signal.SIGABRT
CHECKPOINTING = "checkpointing"  # the section in which a checkpoint is saved
FIRST_BATCH = "first_batch"  # the section of a run's first step, which tells how long its steps may take
HEARTBEAT = "rank_heartbeat_timeout"
STATE_FILE = "ft_state.json"
STACKS_HEADER = "==="  # begins the line before each dump of stacks; its time, in seconds since the epoch, follows

log = logging.getLogger("ft_monitor")


# ---------------------------------------------------------------------------------------------- configuration


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the value, what was expected, and the remedy."""


def parse_seconds(value: Any) -> float | None:
    """A timeout in seconds from a number or text; None, "none" and "null" are never."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
        return None
    try:
        return parse_positive(value)
    except ConfigError as error:
        raise ConfigError(f"{error}, or none") from None


def parse_positive(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"got {value!r}, expected a number greater than 0")
    return number


def parse_factor(value: Any) -> float:
    factor = parse_positive(value)
    if factor < 1:
        raise ConfigError(f"got {value!r}, expected a number of at least 1")
    return factor


def parse_sections(value: Any) -> dict[str, float | None]:
    """Timeouts of sections from a mapping, or from text such as "setup:600,step:60"."""
    if isinstance(value, str):
        pairs = [item.rpartition(":") for item in value.split(",") if item.strip()]
        if not all(name.strip() for name, _, _ in pairs):
            raise ConfigError(f"got {value!r}, expected NAME:SECONDS,NAME:SECONDS")
        value = {name.strip(): seconds for name, _, seconds in pairs}
    if not isinstance(value, Mapping):
        raise ConfigError(f"got {value!r}, expected names of sections with their seconds")
    return {str(name): parse_seconds(seconds) for name, seconds in value.items()}


def parse_signal(value: Any) -> str:
    """The name of a signal, from its name with or without SIG, or its number."""
    text = str(value).strip().upper()
    names = {str(number.value): number.name for number in signal.Signals}
    name = names.get(text, text if text.startswith("SIG") else f"SIG{text}")
    if name not in signal.Signals.__members__:
        raise ConfigError(f"got {value!r}, expected the name of a signal, such as SIGKILL or SIGTERM")
    return name


def parse_log_level(value: Any) -> str:
    names = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}
    name = logging.getLevelName(value) if isinstance(value, int) else str(value).strip().upper()
    if name not in names:
        raise ConfigError(f"got {value!r}, expected one of {', '.join(sorted(names))}")
    return str(name)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a setting that is given twice is an error, and not the last one that counts."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"setting {name!r} is given {names.count(name)} times: give it once")
    return dict(pairs)


def setting(parse: Callable[[Any], Any], default: Any, meaning: str) -> Any:
    """A field of the configuration: `parse` validates what a flag, a file or the environment gives."""
    factory = dict if default == {} else lambda: default
    return dataclasses.field(default_factory=factory, metadata={"parse": parse, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class FaultToleranceConfig:
    """The settings of a job. Names as in NVIDIA's fault_tolerance where it has them.

    Raises ConfigError for a value that cannot be used, whether given in Python, by flag, file or environment.
    """

    startup_timeout: float | None = setting(parse_seconds, None, "seconds from process start to connection")
    initial_rank_heartbeat_timeout: float | None = setting(
        parse_seconds, None, "seconds from connection to the first heartbeat"
    )
    rank_heartbeat_timeout: float | None = setting(parse_seconds, None, "seconds between heartbeats")
    rank_section_timeouts: Mapping[str, float | None] = setting(
        parse_sections, {}, "seconds within named sections, as setup:600,step:60"
    )
    rank_out_of_section_timeout: float | None = setting(
        parse_seconds, None, "seconds outside of all sections, for loops that use sections"
    )
    exit_timeout: float | None = setting(
        parse_seconds, None, "seconds from an exception that ended training to the end of the process"
    )
    safety_factor: float = setting(
        parse_factor, 5.0, "calculated timeouts are the longest observed time multiplied by this"
    )
    min_timeout: float = setting(
        parse_positive, 10.0, "no calculated timeout is shorter than these seconds, for hosts that stall"
    )
    workers_stop_timeout: float = setting(
        parse_positive, 30.0, "seconds that survivors of a failed rank have to finish saving a checkpoint"
    )
    rank_termination_signal: str = setting(
        parse_signal, "SIGKILL", "what a hung rank is sent; SIGKILL follows after 5 s"
    )
    log_level: str = setting(parse_log_level, "INFO", "of the launcher and the monitors")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](getattr(self, field.name)))
            except ConfigError as error:
                raise ConfigError(f"{field.name}: {error}") from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FaultToleranceConfig:
        if not isinstance(values, Mapping):
            raise ConfigError(f'got {values!r}, expected a JSON object, such as {{"rank_heartbeat_timeout": 60}}')
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(names)}"
                raise ConfigError(f"unknown setting {name!r}; {hint}")
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> FaultToleranceConfig:
        """Read settings from a JSON object, or from its member "fault_tolerance" where it has one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
            if isinstance(values, dict) and isinstance(values.get("fault_tolerance"), dict):
                values = values["fault_tolerance"]
            return cls.from_mapping(values)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {os.fspath(path)!r}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # broken JSON, not text, or a ConfigError
            raise ConfigError(f"configuration {os.fspath(path)!r}: {error}") from None

    @classmethod
    def from_environment(cls) -> FaultToleranceConfig:
        """The configuration that the launcher handed on in FT_CONFIG; defaults without it."""
        try:
            return cls.from_mapping(json.loads(os.environ.get("FT_CONFIG") or "{}"))
        except ValueError as error:
            raise ConfigError(f"environment variable FT_CONFIG: {error}") from None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FaultToleranceConfig:
        """Flags beat the file of --ft-cfg-path, or FT_CONFIG where there is no file; these beat the defaults."""
        path = args.ft_cfg_path
        base = cls.from_json_file(path) if path else cls.from_environment()
        flags = {field.name: getattr(args, f"ft_{field.name}") for field in dataclasses.fields(cls)}
        return dataclasses.replace(base, **{name: value for name, value in flags.items() if value is not None})

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, **options: Any) -> argparse._ArgumentGroup:
        """Add --ft-cfg-path and one flag for each setting; `options` go to every add_argument. Returns their group."""
        group = parser.add_argument_group("fault tolerance", "times in seconds, 'none' for never")
        group.add_argument(
            "--ft-cfg-path", "--ft_cfg_path", metavar="FILE.json",
            help="file with settings; flags beat it (default: none)", **options,
        )  # fmt: skip
        for field in dataclasses.fields(FaultToleranceConfig):
            flag = f"--ft-{field.name.replace('_', '-')}"
            default = getattr(FaultToleranceConfig(), field.name) or "none"
            default = f"{default:g}" if isinstance(default, float) else default
            text = f"{field.metadata['meaning']} (default: {default})"
            group.add_argument(flag, f"--ft_{field.name}", metavar="VALUE", help=text, **options)
        return group

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def with_calculated(self, calculated: Mapping[str, float]) -> FaultToleranceConfig:
        """This configuration with calculated timeouts, named as `Clock.setting`, in place of the configured ones."""
        sections = {section_of(name): seconds for name, seconds in calculated.items() if section_of(name)}
        others = {name: seconds for name, seconds in calculated.items() if not section_of(name)}
        if not set(others) <= set(CALCULATED_SETTINGS):
            raise ConfigError(f"got {sorted(others)}, expected some of {CALCULATED_SETTINGS}")
        timeouts: dict[str, Any] = {"rank_section_timeouts": {**self.rank_section_timeouts, **sections}, **others}
        return dataclasses.replace(self, **timeouts)

    @property
    def watches_steps(self) -> bool:
        """Whether any clock is set that a hang in the middle of training would let run out."""
        timeouts = (self.rank_heartbeat_timeout, self.rank_out_of_section_timeout, *self.rank_section_timeouts.values())
        return any(timeout is not None for timeout in timeouts)

    def timeouts(self) -> dict[str, float]:
        """The timeouts that are set, in seconds, by setting as in `Clock.setting`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sections = values.pop("rank_section_timeouts").items()
        timeouts = {name: values[name] for name in ("startup_timeout", *CALCULATED_SETTINGS, "exit_timeout")}
        timeouts.update({section_setting(name): seconds for name, seconds in sections})
        return {name: seconds for name, seconds in timeouts.items() if seconds is not None}

    def describe(self) -> str:
        """The settings that are in force, in one line."""
        others = ("safety_factor", "min_timeout", "workers_stop_timeout", "rank_termination_signal", "log_level")
        values = {**self.timeouts(), **{name: getattr(self, name) for name in others}}
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
        )


CALCULATED_SETTINGS = ("initial_rank_heartbeat_timeout", "rank_heartbeat_timeout", "rank_out_of_section_timeout")


def section_setting(name: str) -> str:
    """The setting that limits a section."""
    return f"rank_section_timeouts[{name}]"


def section_of(setting: str) -> str | None:
    """The section that a setting limits, if it limits one."""
    kind, bracket, name = setting.partition("[")
    return name.removesuffix("]") if bracket and kind == "rank_section_timeouts" else None


# --------------------------------------------------------------------------------------------------- messages


class WorkloadAction(enum.Enum):
    """What a rank can ask the launcher for when the attempt ends. Names as NVIDIA's."""

    Continue = 0  # restart as usual
    ExcludeThisNode = 1  # go on without this node
    ShutdownWorkload = 2  # do not restart anywhere


@dataclasses.dataclass(frozen=True)
class WorkloadControlRequest:
    """A request of a rank to the launcher, and why."""

    action: WorkloadAction
    description: str = "no reason given"


MESSAGE_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "init": {"rank": (int,), "stacks": (bool,)},
    "heartbeat": {"step": (int, type(None))},
    "section": {"name": (str,), "open": (bool,)},
    "timeouts": {"calculated": (dict,), "note": (str, type(None))},
    "saved": {"step": (int,)},
    "request": {"action": (str,), "reason": (str,)},
    "bye": {"error": (str, type(None))},
}


def encode_message(kind: str, **fields: Any) -> bytes:
    """One line of JSON; text that would make it longer than MAX_MESSAGE_BYTES is cut."""
    message = json.dumps({"type": kind, **fields}).encode() + b"\n"
    if len(message) <= MAX_MESSAGE_BYTES:
        return message
    # A character takes at most 12 bytes as JSON (a pair of \uXXXX).
    budget = (MAX_MESSAGE_BYTES - 256) // (12 * len(fields))
    short = {name: value[:budget] if isinstance(value, str) else value for name, value in fields.items()}
    return json.dumps({"type": kind, **short}).encode() + b"\n"


def decode_message(line: bytes) -> dict[str, Any] | None:
    """The message in a line, or None for what is not one."""
    try:
        message = json.loads(line)
        fields = MESSAGE_FIELDS[message["type"]]
        if not all(isinstance(message[name], types) for name, types in fields.items()):
            return None
        if message["type"] == "request":
            WorkloadAction[message["action"]]
        if message["type"] == "timeouts":
            FaultToleranceConfig().with_calculated(message["calculated"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(message)


class MessageReader:
    """Cuts what arrives on the pipe into messages.

    Messages end with a newline, so after anything that is not one the next line is understood again. `skipped`
    counts the lines that were not understood.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._rest = b""  # the beginning of a line whose end has not arrived

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        # Of a line that grows without end only its beginning is kept, enough to see that it is too long.
        self._rest = self._rest[: MAX_MESSAGE_BYTES + 1]
        messages = [decode_message(line) if len(line) < MAX_MESSAGE_BYTES else None for line in lines]
        self.skipped += messages.count(None)
        return [message for message in messages if message is not None]


# ----------------------------------------------------------------------------------------------------- clocks


class Clock(NamedTuple):
    """One running clock: the setting that limits it, when it started, and its limit in seconds, if it has one."""

    setting: str
    since: float
    limit: float | None
    waiting_for: str

    @property
    def deadline(self) -> float:
        return math.inf if self.limit is None else self.since + self.limit


class Lap(NamedTuple):
    """A clock that was stopped in time."""

    setting: str
    seconds: float
    limit: float | None


class Clocks:
    """What a rank has told so far, and which clocks therefore run. No I/O: `now` goes in, in seconds.

    Sections in `measured` rest the heartbeat clocks even if they have no timeout.
    """

    def __init__(self, config: FaultToleranceConfig, now: float, measured: frozenset[str] = frozenset()) -> None:
        self.configured = config
        self.config = config  # with the calculated timeouts in it
        self.calculated: dict[str, float] = {}
        self.note: str | None = None  # the file that takes the verdict when a calculated timeout ends the rank
        self.measured = measured
        self.started: float = now  # process start
        self.connected: float | None = None  # last init
        self.heartbeat: float | None = None  # last heartbeat since init
        self.step: int | None = None  # the last one that a heartbeat carried
        self.sections: dict[str, float] = {}  # open sections and when they were entered
        self.left_timed: float | None = None  # when the last section that rests the heartbeat clocks was left
        self.left_any: float | None = None  # when the last section was left
        self.over: float | None = None  # when bye arrived
        self.error: str | None = None  # what bye said
        self.has_stacks = False  # whether the rank writes its stacks when asked
        self.saved: int | None = None  # step of the newest checkpoint that is on disk
        self.request: dict[str, str] | None = None  # the last workload control request: {action, reason}

    def hear(self, message: Mapping[str, Any], now: float) -> list[Lap]:
        """Take in a message; return the clocks that it stopped or started anew."""
        before = self.running()
        self._take_in(message, now)
        since = {clock.setting: clock.since for clock in self.running()}
        stopped = [clock for clock in before if since.get(clock.setting) != clock.since]
        return [Lap(clock.setting, now - clock.since, clock.limit) for clock in stopped]

    def restart(self, now: float) -> None:
        """Start all running clocks anew, after a time in which nothing could run."""
        self.started = now
        self.sections = dict.fromkeys(self.sections, now)
        for name in ("connected", "heartbeat", "left_timed", "left_any", "over"):
            if getattr(self, name) is not None:
                setattr(self, name, now)

    def first(self) -> Clock | None:
        """The clock that runs out first, if any has a limit."""
        clock = self.nearest()
        return None if clock is None or clock.limit is None else clock

    def nearest(self) -> Clock | None:
        """The clock that runs out first; where none has a limit, the heartbeats' if it runs. None after training."""
        return min(reversed(self.running()), key=lambda clock: clock.deadline, default=None)

    def running(self) -> list[Clock]:
        """The clocks that run now, with and without a limit."""
        config = self.config
        if self.over is not None:
            waiting_for = "no end of the process after its error"
            return (
                [Clock("exit_timeout", self.over, config.exit_timeout, waiting_for)] if self.error is not None else []
            )
        if self.connected is None:
            waiting_for = "no connection after process start"
            return [Clock("startup_timeout", self.started, config.startup_timeout, waiting_for)]
        clocks = [
            Clock(section_setting(name), entered, self._limit(name), f"in section {name!r}")
            for name, entered in self.sections.items()
        ]
        if not clocks:
            since = self.connected if self.left_any is None else self.left_any
            limit = config.rank_out_of_section_timeout
            clocks.append(Clock("rank_out_of_section_timeout", since, limit, "outside of all sections"))
        if not any(map(self._is_timed, self.sections)):
            clocks.append(self._heartbeat_clock(self.connected))
        return clocks

    def _heartbeat_clock(self, connected: float) -> Clock:
        rested = connected if self.left_timed is None else self.left_timed
        if self.heartbeat is None:
            limit, setting = self.config.initial_rank_heartbeat_timeout, "initial_rank_heartbeat_timeout"
            return Clock(setting, max(connected, rested), limit, "no first heartbeat")
        limit = self.config.rank_heartbeat_timeout
        return Clock("rank_heartbeat_timeout", max(self.heartbeat, rested), limit, "no heartbeat")

    def _limit(self, section: str) -> float | None:
        return self.config.rank_section_timeouts.get(section)

    def _is_timed(self, section: str) -> bool:
        return self._limit(section) is not None or section in self.measured

    def _take_in(self, message: Mapping[str, Any], now: float) -> None:
        kind = message["type"]
        if kind == "init":
            self.connected, self.heartbeat, self.over, self.error = now, None, None, None
            self.sections, self.left_timed, self.left_any = {}, None, None
            self.has_stacks = message["stacks"]
        elif kind == "heartbeat":
            self.heartbeat = now
            self.step = self.step if message["step"] is None else message["step"]
        elif kind == "section" and message["open"]:
            self.sections.setdefault(message["name"], now)
        elif kind == "section" and self.sections.pop(message["name"], None) is not None:
            self.left_any = now
            if self._is_timed(message["name"]):
                self.left_timed = now
        elif kind == "timeouts":
            self.calculated, self.note = message["calculated"], message["note"]
            self.config = self.configured.with_calculated(self.calculated)
        elif kind == "saved":
            self.saved = message["step"]
        elif kind == "request":
            self.request = {"action": message["action"], "reason": message["reason"]}
        elif kind == "bye":
            self.over, self.error = now, message["error"]


# ------------------------------------------------------------------------------------------- the rank's end


class RankMonitorClientError(RuntimeError):
    """The client was used in a way that cannot work; the message says what to do."""


class HeartbeatTimeouts(NamedTuple):
    """The timeouts of heartbeats that are in force, in seconds; None is never."""

    initial: float | None
    subsequent: float | None
    were_calculated: bool


class SectionTimeouts(NamedTuple):
    """The timeouts of sections that are in force, in seconds; None is never."""

    section: Mapping[str, float | None]
    out_of_section: float | None
    calculated_sections: frozenset[str]
    is_out_of_section_calculated: bool


class RankMonitorClient:
    """The rank's end of the pipe to its monitor, for any training loop. Method names as NVIDIA's.

        client = RankMonitorClient()
        client.init_workload_monitoring()
        for step, batch in enumerate(loader):
            train(batch)
            client.send_heartbeat(step)
        client.shutdown_workload_monitoring()

    No method waits for the monitor: when it does not read, heartbeats are dropped and all else is kept for later.

    The client measures how long each clock runs, and can calculate timeouts from that. They replace the configured
    ones at once. `state_dict` and `load_state_dict` carry them from one run to the next, `read_state` and `write_state`
    in a file, with what is known of timeouts that have ended ranks: see examples/train_pytorch.py.
    """

    STATE_VERSION = 1

    def __init__(self) -> None:
        self.is_initialized = False
        self.config = FaultToleranceConfig()  # as the launcher gave it, from init_workload_monitoring() on
        self.calculated: dict[str, float] = {}  # calculated timeouts, by setting, in seconds
        self.included: set[str] = set()  # what else than steps the heartbeat timeout came from: see saw()
        self.killed: dict[str, int] = {}  # by setting, the step at which it ended a rank, if no later one was seen
        self.note: str | None = None  # file in which the monitor notes that a calculated timeout ended this rank
        self.sync_timeout: float | None = None  # seconds that ranks wait for each other; None: as their group does
        self.seen: set[str] = set()  # since the connection: see saw()
        self._set_aside: frozenset[str] = frozenset()  # calculated timeouts that are not in force
        self._earlier: dict[str, float] = {}  # what earlier runs have calculated
        self._longest: dict[str, float] = {}  # the longest time on each clock since the connection
        self._clocks = Clocks(self.config, time.monotonic())
        self._pipe: Connection | None = None
        self._lock = threading.RLock()  # a thread may save a checkpoint while training goes on
        # What must not get lost while a frozen monitor leaves the pipe full; far more than any loop sends by then.
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=10_000)

    def init_workload_monitoring(self, measure: Collection[str] = ()) -> None:
        """Connect to the monitor.

        Sections that have an entry in `rank_section_timeouts`, and those named in `measure`, are measured, so that
        their timeouts can be calculated. Raises RankMonitorClientError (a RuntimeError) when this process was not
        started by ft_launcher.py or ft_monitor.py, or is connected already.
        """
        if self.is_initialized:
            raise RankMonitorClientError("already connected: call shutdown_workload_monitoring() first")
        descriptor = os.environ.get("FT_MONITOR_FD", "")
        if not is_writable_pipe(descriptor):
            raise RankMonitorClientError(
                f"no pipe to a rank monitor (FT_MONITOR_FD={descriptor!r}): this process was not started by "
                "ft_launcher. Start it with: python ft_launcher.py --nproc-per-node=N SCRIPT"
            )
        self.config = FaultToleranceConfig.from_environment()
        os.set_inheritable(int(descriptor), False)
        os.set_blocking(int(descriptor), False)
        self._pipe = Connection(os.dup(int(descriptor)), readable=False)
        self._clocks = Clocks(self.config, time.monotonic(), frozenset([*self.config.rank_section_timeouts, *measure]))
        self._longest, self.seen = {}, set()
        self.is_initialized = True
        self._report_uncaught_errors()
        self._send("init", rank=rank_number(), stacks=arm_stacks())
        if self.calculated:
            self._send_timeouts()

    def send_heartbeat(self, step: int | None = None) -> None:
        """Say that this rank is alive, at `step` of the training where it is known."""
        self._send("heartbeat", step=None if step is None else int(step))

    def start_section(self, section: str) -> None:
        """Enter a named section; sections may nest and overlap, but a name can be open only once."""
        if section in self._clocks.sections:
            raise RankMonitorClientError(f"section {section!r} is open already: call end_section({section!r}) first")
        self._send("section", name=section, open=True)

    def end_section(self, section: str) -> None:
        """Leave a named section, which must be open."""
        if section not in self._clocks.sections:
            raise RankMonitorClientError(f"section {section!r} is not open: call start_section({section!r}) first")
        self._send("section", name=section, open=False)

    def end_all_sections(self) -> None:
        """Leave all sections that are open."""
        for section in sorted(self._clocks.sections):
            self.end_section(section)

    def report_saved(self, step: int) -> None:
        """Say that the checkpoint of `step` is safely on disk. Without a connection, do nothing."""
        if self.is_initialized:
            self._send("saved", step=int(step))

    def send_workload_control_request(self, req: WorkloadControlRequest) -> None:
        """Ask the launcher for an action, which it takes when this attempt ends: when a rank fails."""
        self._send("request", action=req.action.name, reason=req.description)

    def shutdown_workload_monitoring(self, error: str | None = None) -> None:
        """End monitoring: training is over, or failed with `error`. Without a connection, do nothing."""
        if self._pipe is None:
            return
        self._send("bye", error=error)
        self._pipe.close()
        self._pipe, self.is_initialized = None, False
        self._unsent.clear()

    @property
    def open_sections(self) -> frozenset[str]:
        return frozenset(self._clocks.sections)

    # -- timeouts

    def timeouts_in_force(self) -> dict[str, float]:
        """The timeouts that are set, configured and calculated, in seconds, by setting."""
        return self.config.with_calculated(self._in_force()).timeouts()

    @property
    def hb_timeouts(self) -> HeartbeatTimeouts:
        config = self.config.with_calculated(self._in_force())
        calculated = "rank_heartbeat_timeout" in self._in_force()
        return HeartbeatTimeouts(config.initial_rank_heartbeat_timeout, config.rank_heartbeat_timeout, calculated)

    @property
    def section_timeouts(self) -> SectionTimeouts:
        in_force = self._in_force()
        config = self.config.with_calculated(in_force)
        calculated = frozenset(filter(None, map(section_of, in_force)))
        is_calculated = "rank_out_of_section_timeout" in in_force
        return SectionTimeouts(
            config.rank_section_timeouts, config.rank_out_of_section_timeout, calculated, is_calculated
        )

    def calculate_and_set_hb_timeouts(self, skip_if_not_ready: bool = False, *, calc_initial: bool = True) -> bool:
        """Calculate the timeouts of heartbeats from what all ranks have seen since they connected.

        All ranks must call it, at the same place. Returns True when new timeouts are in force. When some rank has
        not seen enough, returns False if `skip_if_not_ready`, and raises RankMonitorClientError otherwise.
        """
        initial = ["initial_rank_heartbeat_timeout"] if calc_initial else []
        return self._calculate(["rank_heartbeat_timeout", *initial], skip_if_not_ready)

    def calculate_and_set_section_timeouts(
        self,
        selected_sections: Collection[str] | None = None,
        calc_out_of_section: bool = True,
        skip_if_not_ready: bool = False,
    ) -> bool:
        """As calculate_and_set_hb_timeouts(), for the selected sections, by default all that are measured."""
        sections = self._clocks.measured if selected_sections is None else selected_sections
        outside = ["rank_out_of_section_timeout"] if calc_out_of_section else []
        return self._calculate([*map(section_setting, sorted(sections)), *outside], skip_if_not_ready)

    def set_timeouts_aside(self, *settings: str) -> None:
        """Put the configured timeouts in force instead of these calculated ones, until they are calculated again."""
        self._set_aside = self._set_aside.union(settings)
        self._send_timeouts()

    def observe(self, setting: str, seconds: float) -> None:
        """Count a time that this client could not measure itself, such as one spent in another thread."""
        self._longest[setting] = max(seconds, self._longest.get(setting, 0.0))

    def saw(self, what: str) -> None:
        """Say that this run has been through something, such as "validation", whose heartbeats differ from steps'.

        All ranks must say so at the same place. A run that has not seen yet what the heartbeat timeout of earlier runs
        came from makes it longer only: the mean of both would be too short for it.
        """
        self.seen.add(what)

    def judge(self, kills: Mapping[str, int]) -> list[str]:
        """Widen each calculated timeout that has ended ranks twice with no new step in between; return a line for each.

        `kills`: by setting, the step at which it ended ranks since the last judgement; -1 is no step known. A timeout
        that fits no longer, because the work has changed, would otherwise end every attempt for ever. One that is
        right, and has met a hang that comes again at the same step, is only late afterwards, not gone.
        """
        lines = []
        for name, step in kills.items():
            if name in self.calculated and step <= self.killed.get(name, -2):
                lines.append(self._widen(name, f"ended ranks twice, and got no further than step {self.killed[name]},"))
                if name == section_setting(FIRST_BATCH) and HEARTBEAT in self.calculated:
                    lines.append(self._widen(HEARTBEAT, "is most likely as wrong"))
            self.killed[name] = step
        return lines

    def _widen(self, name: str, why: str) -> str:
        config = FaultToleranceConfig.from_environment()  # perhaps not connected yet
        old = max(self.calculated[name], config.min_timeout)
        self.calculated[name] = self._earlier[name] = round(old * max(config.safety_factor, 2), 3)
        return f"timeout widened: {name} of {old:g} s {why} and is now {self.calculated[name]:g} s"

    def state_dict(self) -> dict[str, Any]:
        """What a later run can be given by load_state_dict(); the same on all ranks after a calculation."""
        state: dict[str, Any] = {"version": self.STATE_VERSION, "timeouts": dict(self.calculated)}
        more = {"included": sorted(self.included), "killed": dict(self.killed)}
        return state | {name: value for name, value in more.items() if value}

    def load_state_dict(self, state: Mapping[str, Any], notes: str | os.PathLike[str] | None = None) -> None:
        """Take over the timeouts of an earlier run, before or after init_workload_monitoring().

        They are in force at once, for clocks that run already too: leave sections, and send a heartbeat, before. An
        empty state, as of a checkpoint from before, changes nothing. `notes`: the directory of read_state(), in which
        monitors are to note what ends ranks. Raises ConfigError (a ValueError) for a state that is not one.
        """
        if notes is not None:
            self.note = str(Path(notes).absolute() / f"killed_rank{rank_number()}.json")
        if not isinstance(state, Mapping) or (state and state.get("version") != self.STATE_VERSION):
            raise ConfigError(f"got {str(state)[:100]}, expected a state of version {self.STATE_VERSION}")
        if state:
            self.calculated, self.included, self.killed = parse_state(state)
            self._earlier = dict(self.calculated)
        if self.is_initialized:
            self._send_timeouts()

    def read_state(self, directory: str | os.PathLike[str]) -> list[str]:
        """Take over what write_state() left in a directory, and judge() what monitors have noted there since.

        Returns lines that a person should see. For one rank, which gives its state_dict() to the others: each loads it
        with load_state_dict(state, notes=directory). Raises OSError if a judgement cannot be written.
        """
        path, lines = Path(directory) / STATE_FILE, []
        try:
            self.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass  # this is the first run
        except (OSError, ValueError, RecursionError) as error:
            lines.append(f"ignoring the stored timeouts in {path}: {error}; calculating anew")
        notes = sorted(Path(directory).glob("killed_rank*.json"))
        lines += self.judge(read_kills(notes))
        if notes:
            self.write_state(directory)
        for note in notes:
            note.unlink()
        return lines

    def write_state(self, directory: str | os.PathLike[str]) -> None:
        """Keep the state in a directory, which is created if missing. For one rank. Raises OSError."""
        path = Path(directory) / STATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**self.state_dict(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=2)

    def _report_uncaught_errors(self) -> None:
        """Let the monitor know of the exception that ends the process, unless monitoring is over by then."""
        previous, pid = sys.excepthook, os.getpid()

        def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if os.getpid() == pid:  # a forked child has inherited this
                self.shutdown_workload_monitoring(describe_error(error))
            previous(kind, error, trace)

        sys.excepthook = report

    def _calculate(self, settings: Sequence[str], skip_if_not_ready: bool) -> bool:
        if self._pipe is None:
            raise RankMonitorClientError("not connected: call init_workload_monitoring() first")
        # The monitor's heartbeat clock, unlike ours, goes on during a section that has no timeout yet.
        untimed = [section_setting(name) for name in sorted(self._clocks.measured)]
        asked = sorted({*settings, *untimed})
        now = time.monotonic()
        for clock in self._clocks.running():  # a time that still runs counts as far as it has come
            if clock.setting == "rank_out_of_section_timeout":
                self.observe(clock.setting, now - clock.since)
        seen = maximum_of_ranks([self._longest.get(name, 0.0) for name in asked], self.sync_timeout)
        longest = dict(zip(asked, seen, strict=True))
        missing = [name for name in settings if not longest[name]]
        if missing and skip_if_not_ready:
            return False
        if missing:
            raise RankMonitorClientError(f"not enough data to calculate {', '.join(missing)}: no rank has seen it yet")
        timed = {*settings, *self._in_force()} | {section_setting(name) for name in self.config.rank_section_timeouts}
        in_steps = sum(longest[name] for name in untimed if name not in timed)
        factor, floor = self.config.safety_factor, self.config.min_timeout
        for name in settings:
            extra, fades = (in_steps, self.included <= self.seen) if name == HEARTBEAT else (0.0, True)
            self.calculated[name] = calculated_timeout(
                longest[name] + extra, factor, floor, self._earlier.get(name), fades
            )
        if HEARTBEAT in settings:
            self.included |= self.seen
        # A kill is forgotten with steps beyond it, not with those before it, which were made twice.
        step = math.inf if self._clocks.step is None else self._clocks.step
        self.killed = {name: at for name, at in self.killed.items() if at >= step}
        self._set_aside = self._set_aside.difference(settings)
        self._send_timeouts()
        return True

    def _in_force(self) -> dict[str, float]:
        floor = self.config.min_timeout
        return {name: max(value, floor) for name, value in self.calculated.items() if name not in self._set_aside}

    def _send_timeouts(self) -> None:
        fields = {"calculated": self._in_force(), "note": self.note}
        size = len(encode_message("timeouts", **fields))
        if size > MAX_MESSAGE_BYTES:  # which the monitor would skip
            raise RankMonitorClientError(
                f"timeouts of {len(self._clocks.measured)} sections take {size:,} bytes, at most {MAX_MESSAGE_BYTES:,} "
                "fit into a message: measure fewer sections, or give them shorter names"
            )
        self._send("timeouts", **fields)

    # -- the pipe

    def _send(self, kind: str, **fields: Any) -> None:
        if self._pipe is None:
            raise RankMonitorClientError("not connected: call init_workload_monitoring() first")
        with self._lock:
            laps = self._clocks.hear({"type": kind, **fields}, time.monotonic())
            self._write(self._pipe.fileno(), encode_message(kind, **fields), keep=kind != "heartbeat")
            for lap in laps:
                self._count(lap)

    def _write(self, descriptor: int, line: bytes, keep: bool) -> None:
        if not keep and is_half_full(descriptor):
            return  # the other half is kept for what must not get lost
        try:
            while self._unsent:
                os.write(descriptor, self._unsent[0])
                self._unsent.popleft()
            os.write(descriptor, line)
        except BlockingIOError:  # the monitor does not read (frozen, or its host overloaded): training goes on
            if keep:
                self._unsent.append(line)
        except OSError:
            self._unsent.clear()  # the monitor is gone, and the kernel ends this process with it

    def _count(self, lap: Lap) -> None:
        if lap.limit is not None and lap.seconds > lap.limit + SUSPENDED_SECONDS:
            return  # only a rank that was suspended together with its monitor outlives a limit
        self.observe(lap.setting, lap.seconds)
        limit = self._in_force().get(HEARTBEAT, math.inf)
        if lap.setting == section_setting(FIRST_BATCH) and FIRST_BATCH in self._clocks.measured and lap.seconds > limit:
            self.set_timeouts_aside(HEARTBEAT)  # the next steps may take as long: see first how long they do
        if lap.setting in self._clocks.calculated and lap.limit is not None and lap.seconds > lap.limit / 2:
            # It nearly ran out: the work has changed since it was calculated. Waiting for the next calculation,
            # or for the other ranks, could be too late.
            self.calculated[lap.setting] = max(lap.seconds * self.config.safety_factor, lap.limit)
            self._send_timeouts()


def calculated_timeout(longest: float, factor: float, floor: float, earlier: float | None, fades: bool = True) -> float:
    """A timeout from the longest time seen, in seconds; the mean with an earlier one, so that outliers fade.

    Unless it `fades`, it is not shorter than the earlier one.
    """
    timeout = longest * factor
    if earlier is not None:
        timeout = (timeout + earlier) / 2 if fades else max(timeout, earlier)
    return round(max(timeout, floor, longest), 3)


def parse_state(state: Mapping[str, Any]) -> tuple[dict[str, float], set[str], dict[str, int]]:
    """The calculated timeouts in a client's state, what they came from, and the steps at which they ended ranks."""
    timeouts = state.get("timeouts")
    if not isinstance(timeouts, Mapping):
        raise ConfigError(f"timeouts: got {timeouts!r}, expected seconds by setting")
    FaultToleranceConfig().with_calculated(timeouts)
    included, killed = state.get("included", []), state.get("killed", {})
    if not isinstance(included, list) or not isinstance(killed, Mapping):
        raise ConfigError(f"included, killed: got {included!r}, {killed!r}, expected a list, and steps by setting")
    if not all(isinstance(step, int) for step in killed.values()):
        raise ConfigError(f"killed: got {killed!r}, expected steps by setting")
    calculated = {str(name): parse_positive(seconds) for name, seconds in timeouts.items()}
    return calculated, set(map(str, included)), dict(killed)


def read_kills(notes: Sequence[Path]) -> dict[str, int]:
    """By setting, the highest step at which monitors noted that a calculated timeout ended their rank."""
    kills: dict[str, int] = {}
    for note in notes:
        try:
            verdict = json.loads(note.read_text(encoding="utf-8"))
            setting, step = str(verdict["setting"]), verdict["step"]
            step = -1 if step is None else int(step)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # it stands for one kill; the next is noted again
        kills[setting] = max(kills.get(setting, -1), step)
    return kills


def maximum_of_ranks(values: Sequence[float], within: float | None = None) -> list[float]:
    """The maximum over all ranks of each value, if there is a process group; else the values.

    Raises RuntimeError when the other ranks do not take part within these seconds, by default the timeout of the
    process group: a rank may have to wait for another that does something alone, for as long as in any collective.
    """
    dist = sys.modules.get("torch.distributed")  # whoever has a process group has imported it
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return list(values)
    torch = sys.modules["torch"]
    on_cpu = any(name in dist.get_backend() for name in ("gloo", "mpi"))
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
    work.wait(*([] if within is None else [datetime.timedelta(seconds=within)]))
    return [float(value) for value in tensor.tolist()]


def is_library(file: str) -> bool:
    """Whether a line of a stack belongs to Python, to an installed package or to these modules, not to the user."""
    stdlib = os.path.dirname(os.__file__)
    own = os.path.basename(file) in ("ft_monitor.py", "ft_callback.py")
    return own or file.startswith(("<frozen", stdlib)) or "site-packages" in file or "dist-packages" in file


def describe_error(error: BaseException) -> str:
    """An exception and the user's line that it came from, in one line.

    What failed in a DataLoader worker is the last line of its text, below the worker's traceback.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    lines = f"{type(error).__name__}: {error}".removesuffix(": ").strip().splitlines()
    text = " ".join(" ".join(lines).split())
    if len(text) > 300:
        text = f"{text[:300]}..." if len(lines) == 1 else f"{lines[0].strip()[:150]} ... {lines[-1].strip()[:150]}"
    return text + place


def arm_stacks() -> bool:
    """Let this process write the stacks of all its threads when it gets STACKS_SIGNAL; return whether it will.

    faulthandler answers even while the main thread is stuck in C code and holds the interpreter's lock.
    """
    path = evidence_path("stacks.txt")
    if path is None or threading.current_thread() is not threading.main_thread():
        return False
    try:
        file = open(path, "ab")  # noqa: SIM115  faulthandler keeps it
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def is_half_full(descriptor: int) -> bool:
    try:
        unread: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]
        return unread > PIPE_BYTES // 2
    except OSError:
        return False


def is_writable_pipe(descriptor: str) -> bool:
    try:
        number = int(descriptor)
        is_writable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        return is_writable and stat.S_ISFIFO(os.fstat(number).st_mode)
    except (ValueError, OverflowError, OSError):
        return False


def rank_number() -> int:
    """This process's rank, as torchrun or srun gives it; 0 without them."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0


def evidence_path(kind: str) -> Path | None:
    """This rank's file in the evidence of this attempt; None without a launcher."""
    directory = os.environ.get("FT_RUN_DIR")
    if not directory:
        return None
    return Path(directory) / f"attempt_{os.environ.get('FT_ATTEMPT') or 0}" / f"rank{rank_number()}.{kind}"


# ------------------------------------------------------------------------------------------------- processes


def process_control(option: int, value: int) -> None:
    """prctl(2) for this process; elsewhere than on Linux, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def request_death_signal(number: int) -> None:
    """Ask the kernel to send this process `number` when its parent ends."""
    process_control(PR_SET_PDEATHSIG, int(number))


def session_members(session: int) -> list[int]:
    """The processes of a session that still run, in whatever process group; zombies do not count. Linux only."""
    members = []
    for pid in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        try:
            stat_line = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        # proc(5): pid (comm) state ppid pgrp session ...; comm may hold spaces and parentheses
        state, _, _, its_session = stat_line.rpartition(b")")[2].split()[:4]
        if int(its_session) == session and state not in (b"Z", b"X"):
            members.append(int(pid))
    return members


def process_state(pid: int) -> dict[str, str]:
    """What the kernel says a process does: its state (R, S, D, T ...) and where in the kernel it waits. Linux only."""
    state = {}
    for name, path in (("state", f"/proc/{pid}/stat"), ("wchan", f"/proc/{pid}/wchan")):
        try:
            state[name] = Path(path).read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue  # no Linux, not ours to read, or it ended
    return state


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: of this control group, or else of this host.

    Linux only. See memory.events in the kernel's documentation of cgroup v2, and memory.oom_control in that of v1.
    """
    counters = [Path("/proc/vmstat")]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                counters.insert(0, Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
            elif not controllers:
                counters.insert(0, Path(f"/sys/fs/cgroup{path}/memory.events"))
    except OSError:
        pass  # not Linux
    for counter in counters:
        try:
            return int(dict(line.split() for line in counter.read_text().splitlines())["oom_kill"])
        except (OSError, KeyError):
            continue  # not mounted here, or an older kernel
    return 0


def signal_session(session: int, number: int) -> None:
    """Send a signal to every process of a session that we started and whose leader is not reaped yet."""
    try:
        os.killpg(session, number)  # at once and without gaps, but not to a child that made a group of its own
    except (ProcessLookupError, PermissionError):
        pass
    for pid in session_members(session):
        if process_group(pid) not in (session, None):
            signal_process(pid, number)


def process_group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def signal_process(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def signal_main_thread(pid: int, number: int) -> None:
    """Signal the main thread of a process: one that was stopped and is continued handles it before it goes on.

    A signal to the process is handled by any of its threads, while the others go on from where they were.
    """
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except AttributeError:  # glibc has it since 2.30
        signal_process(pid, number)


def kill_session(session: int, within: float = REAP_SECONDS) -> list[int]:
    """SIGKILL every process of a session, wait until they are gone, and return those that are not (D state)."""
    deadline = time.monotonic() + within
    while True:
        signal_session(session, signal.SIGKILL)
        left = session_members(session)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def write_json(path: Path, values: Mapping[str, Any], durable: bool = False, indent: int | None = None) -> None:
    """Write beside the file and rename, so that a reader never sees half; `durable` survives a power cut too."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=indent)
            file.write("\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------------------------------- monitor


class RankMonitor:
    """Supervises one rank from its start to its end.

    `command` is the rank's command line; `grace` the seconds a stopped rank has to end by itself; `parent_pid` the
    launcher's, whose death ends the rank; `report_path` takes the report, a JSON object that tells how the rank does.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: FaultToleranceConfig,
        grace: float = DEFAULT_GRACE_SECONDS,
        parent_pid: int | None = None,
        report_path: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.config = config
        self.grace = grace
        self.parent_pid = os.getppid() if parent_pid is None else parent_pid
        self.report_path = report_path
        self.report_written = -math.inf  # when
        self.report_is_old = False
        self.report_failed = False  # the last time; a file system that fails may come back
        self.oom_kills = oom_kills()
        self.clocks = Clocks(config, time.monotonic())
        self.reader = MessageReader()
        self.half_time: Clock | None = None  # the last clock whose half was warned of
        self.half_time_warnings = HALF_TIME_WARNINGS  # left
        self.slowest: dict[str, float] = {}  # the longest times that were warned of, by setting, in seconds
        self.rank: subprocess.Popen[bytes]  # from _start() on
        self.pipe: Connection | None = None  # read end; None again when no process holds the write end
        self.signals, self._signals_in = os.pipe()  # numbers of the signals that arrived
        self.is_survivor = False  # of a failed peer, and may only finish saving a checkpoint
        self.kill_at: float | None = None  # set when the rank is being stopped: SIGKILL follows then
        self.abandon_at: float | None = None  # set with SIGKILL: the rank is given up then
        self.report: dict[str, Any] = {
            "rank": rank_number(),
            "attempt": int(os.environ.get("FT_ATTEMPT") or 0),
            "host": socket.gethostname(),
            "launcher_pid": self.parent_pid,
            "monitor_pid": os.getpid(),
            "pid": None,
            "started": None,  # wall clock, seconds since the epoch
            "connected": None,
            "first_heartbeat": None,
            "heartbeat": None,  # the last one
            "error_time": None,
            "ended": None,
            "first_step": None,  # of the first heartbeat
            "step": None,  # of the last heartbeat
            "request": None,  # workload control: {action, reason}
            "saved": None,  # step of the newest checkpoint that this rank has reported
            "sections": [],  # that are open
            "timeouts": {},  # in force, by setting, in seconds
            "clock": None,  # that runs out first: {setting, since, limit}; since is wall clock
            "over": False,  # whether monitoring is over: training ended, well or not
            "verdict": None,  # the clock that ran out: {setting, limit, calculated, waited, step}
            "state": {},  # of the process before the monitor ended it: {state, wchan}
            "stacks": None,  # whether it wrote its stacks before it was ended; null: it was not asked
            "oom_kills": 0,  # in its control group, or else on this host, while it ran
            "stopped": None,  # why the monitor ended the rank; null: it ended by itself
            "error": None,  # the exception that ended training
            "status": None,  # exit code, or -N for signal N
        }

    def run(self) -> int:
        """Start the rank, stay until it has ended, and return its exit code, or -N for signal N.

        127 or 126, as from a shell, when the command cannot be started.
        """
        self._catch_signals()
        try:
            self._start()
        except OSError as error:
            log.error("cannot start %r: %s", self.command[0], error.strerror)
            return 127 if isinstance(error, FileNotFoundError) else 126  # as a shell
        self._watch_parent()
        while not self._rank_has_ended():
            wake_at = self._next_deadline()
            sources: list[Any] = [self.signals] if self.pipe is None else [self.signals, self.pipe]
            wait(sources, None if wake_at is None else min(max(0.0, wake_at - time.monotonic()), LONGEST_WAIT_SECONDS))
            now = time.monotonic()
            self._hear(now)
            if wake_at is not None and now - wake_at > SUSPENDED_SECONDS and self.kill_at is None:
                log.warning("%s: woke %.1f s late, suspended; its clocks start anew", self._who(), now - wake_at)
                self.clocks.restart(now)
            self._obey(now)
            self._enforce(now)
            if self.report_is_old and now >= self.report_written + REPORT_SECONDS:
                self._write_report()
            if self.abandon_at is not None and now >= self.abandon_at:
                return self._abandon()
        return self._finish()

    # -- start

    def _catch_signals(self) -> None:
        """Let signals do nothing but arrive, as bytes, in a pipe that the loop reads."""
        for end in (self.signals, self._signals_in):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        others = (PEER_FAILED, PARENT_DIED, signal.SIGCHLD, signal.SIGCONT)
        for number in (*STOP_SIGNALS, *PASSED_ON_SIGNALS, *others):
            if number in STOP_SIGNALS and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup, a hang-up is to be ignored by the rank too
            signal.signal(number, lambda number, frame: None)

    def _start(self) -> None:
        self.pipe, write_end = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.pipe.fileno(), False)
        defaults = {"PYTHONFAULTHANDLER": "1"}  # a rank that crashes in C code leaves its stack
        environment = (
            defaults | os.environ | {"FT_MONITOR_FD": str(write_end.fileno()), "FT_CONFIG": self.config.to_json()}
        )
        monitor_pid = os.getpid()

        def die_with_the_monitor() -> None:
            request_death_signal(signal.SIGKILL)
            for number in PASSED_ON_SIGNALS:  # which schedulers send to every process, also to one that has no handler
                signal.signal(number, signal.SIG_IGN)
            if os.getppid() != monitor_pid:  # it died before the request
                os._exit(1)

        self.clocks = Clocks(self.config, time.monotonic())
        self.rank = subprocess.Popen(
            self.command,
            env=environment,
            pass_fds=[write_end.fileno()],
            # One kill reaches all of a rank's processes: DataLoader workers outlive a killed rank by seconds.
            start_new_session=True,
            preexec_fn=die_with_the_monitor,
        )
        write_end.close()
        self.report.update(pid=self.rank.pid, started=time.time())
        self._write_report()

    def _watch_parent(self) -> None:
        request_death_signal(PARENT_DIED)
        if os.getppid() != self.parent_pid:  # it died before the request, and no signal will come
            os.kill(os.getpid(), PARENT_DIED)

    # -- the loop's parts

    def _rank_has_ended(self) -> bool:
        """Look without reaping: as long as the rank is a zombie, nobody else can get its pid and session."""
        return os.waitid(os.P_PID, self.rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _next_deadline(self) -> float | None:
        deadlines = [self._next_action()]
        if self.report_is_old:
            deadlines.append(self.report_written + REPORT_SECONDS)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _next_action(self) -> float | None:
        if self.abandon_at is not None:
            return self.abandon_at
        if self.kill_at is not None:
            return self.kill_at
        clock = self.clocks.first()
        if clock is None:
            return None
        return half_time(clock) if self._half_time_is_due(clock) else clock.deadline

    def _half_time_is_due(self, clock: Clock) -> bool:
        noted = self.half_time is not None and self.half_time[:2] == clock[:2]
        return self.half_time_warnings > 0 and not noted

    def _hear(self, now: float) -> None:
        """Take in what is in the pipe, but not for ever if the rank keeps filling it."""
        for _ in range(16):
            if self.pipe is None:
                return
            try:
                data = os.read(self.pipe.fileno(), 65536)
            except BlockingIOError:
                return
            if not data:  # no process holds the other end any more
                self.pipe.close()
                self.pipe = None
                return
            self._take_in(data, now)

    def _take_in(self, data: bytes, now: float) -> None:
        skipped = self.reader.skipped
        kinds = set()
        for message in self.reader.feed(data):
            if message["type"] == "heartbeat" and (self.report["verdict"] is not None or self.is_survivor):
                continue  # too late: a stopped rank is continued for its stacks, which are of before
            for lap in self.clocks.hear(message, now):
                self._warn_if_slow(lap)
            self._note_times(message["type"])
            kinds.add(message["type"])
        if kinds - {"heartbeat", "section"} or (kinds and now - self.report_written >= REPORT_SECONDS):
            self._write_report()
        else:
            self.report_is_old |= bool(kinds)
        if self.reader.skipped and not skipped:
            log.warning("%s: skipped what is not a message on its pipe, and will from now on", self._who())

    def _note_times(self, kind: str) -> None:
        """Wall clock, for people."""
        report, names = self.report, {"init": ["connected"], "heartbeat": ["heartbeat"], "bye": ["error_time"]}
        report.update(dict.fromkeys(names.get(kind, []), time.time()))
        if kind == "heartbeat" and report["first_heartbeat"] is None:
            report.update(first_heartbeat=report["heartbeat"], first_step=self.clocks.step)

    def _warn_if_slow(self, lap: Lap) -> None:
        """Say that a clock nearly ran out, but not again at every step of a training that is always slow."""
        if (
            self.kill_at is not None
            or lap.limit is None
            or lap.seconds <= max(lap.limit / 2, 1.1 * self.slowest.get(lap.setting, 0.0))
        ):
            return
        self.slowest[lap.setting] = lap.seconds
        log.warning(
            "%s: slow%s: %.1f s, limit %g s (%s)", self._who(), self._at_step(), lap.seconds, lap.limit, lap.setting
        )

    def _obey(self, now: float) -> None:
        try:
            arrived = os.read(self.signals, 4096)
        except BlockingIOError:
            return
        for number in sorted(set(arrived)):
            if number in STOP_SIGNALS and self.kill_at is None:
                self._stop(number, now)
            elif number in PASSED_ON_SIGNALS:
                signal_process(self.rank.pid, number)
            elif number == PEER_FAILED:
                self._stop_survivor(now)
            elif number == signal.SIGCONT and self.kill_at is None:
                self.clocks.restart(now)  # we were stopped, and most likely the rank with us
            # The kernel sends this also when no more than the launcher's thread that started us ends.
            elif number == PARENT_DIED and os.getppid() != self.parent_pid:
                self._kill(f"the launcher (pid {self.parent_pid}) is gone", now)

    def _enforce(self, now: float) -> None:
        """Do what is due: a clock has run out, or a rank that is being stopped did not end."""
        if self.abandon_at is not None:
            return
        if self.kill_at is not None:
            saved = self.is_survivor and CHECKPOINTING not in self.clocks.sections
            if saved or now >= self.kill_at:
                self._kill(None, now)
            return
        clock = self.clocks.first()
        if clock is None:
            return
        if now >= clock.deadline:
            self._end_hung_rank(clock, now)
        elif self._half_time_is_due(clock) and now >= half_time(clock):
            self.half_time, self.half_time_warnings = clock, self.half_time_warnings - 1
            what = f"{clock.waiting_for} for {now - clock.since:.1f} s{self._at_step()}, limit {clock.limit:g} s"
            asked = self._ask_for_stacks(what) is not None
            log.warning("%s: %s%s", self._who(), what, "; its stacks are asked for" if asked else "")

    # -- ending the rank

    def _end_hung_rank(self, clock: Clock, now: float) -> None:
        waited, limit = now - clock.since, clock.limit or 0.0
        calculated = clock.setting in self.clocks.calculated
        self.report["verdict"] = {
            "setting": clock.setting,
            "limit": limit,
            "calculated": calculated,
            "waited": round(waited, 3),
            "step": self.clocks.step,
        }
        if calculated and self.clocks.note:
            self._write(Path(self.clocks.note), self.report["verdict"])
        kind = "calculated limit" if calculated else "limit"
        reason = f"hung: {clock.waiting_for} for {waited:.1f} s{self._at_step()} ({kind} {limit:g} s)"
        termination = signal.Signals[self.config.rank_termination_signal]
        log.warning("%s: %s; sending %s", self._who(), reason, termination.name)
        self._stopping(reason, now + TERMINATION_SECONDS)
        self._take_stacks(reason)
        if termination == signal.SIGKILL:
            self._kill(None, now)
            return
        signal_session(self.rank.pid, termination)
        signal_session(self.rank.pid, signal.SIGCONT)  # a stopped process takes no other signal

    def _stop(self, number: int, now: float) -> None:
        """Pass a stop signal on, to the rank alone: DataLoader workers that die first would make it fail."""
        self._stopping(f"stopped by {signal.Signals(number).name}", now + self.grace)
        signal_process(self.rank.pid, number)
        signal_session(self.rank.pid, signal.SIGCONT)

    def _stop_survivor(self, now: float) -> None:
        """A peer failed: this rank can only wait for it, unless it is saving a checkpoint."""
        if self.abandon_at is not None:
            return
        self.is_survivor = True
        clocks = {clock.setting: clock for clock in self.clocks.running()}
        saving = clocks.get(section_setting(CHECKPOINTING))
        bound = now + self.config.workers_stop_timeout
        self._take_stacks("its peer failed")
        self._stopping("its peer failed", now if saving is None else min(bound, saving.deadline))

    def _kill(self, reason: str | None, now: float) -> None:
        self._stopping(reason, now)
        if self.abandon_at is None:
            self.abandon_at = now + REAP_SECONDS
            signal_session(self.rank.pid, signal.SIGKILL)

    def _ask_for_stacks(self, why: str) -> int | None:
        """Let the rank add its stacks to its file, below a line that tells why; return the size before, if it can."""
        path = evidence_path("stacks.txt")
        if path is None or not self.clocks.has_stacks:
            return None
        try:
            with open(path, "ab") as file:
                file.write(f"\n{STACKS_HEADER} {time.time():.6f} ({time.strftime('%H:%M:%S')}) {why}\n".encode())
                size = file.tell()
        except OSError:
            return None
        signal_main_thread(self.rank.pid, STACKS_SIGNAL)
        return size

    def _take_stacks(self, why: str) -> None:
        """Wait for the stacks, but not for long: a process in uninterruptible sleep writes none."""
        self.report["state"] = process_state(self.rank.pid)
        size = self._ask_for_stacks(why)
        if size is None:
            return
        self.report["stacks"] = False
        signal_session(self.rank.pid, signal.SIGCONT)  # a stopped process does not answer
        path, deadline = evidence_path("stacks.txt"), time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline and path is not None:
            time.sleep(0.01)  # the stacks are written in one go, much quicker than this
            try:
                before, size = size, path.stat().st_size
            except OSError:  # it was removed, or its file system fails
                return
            if size == before and self.report["stacks"]:
                return
            self.report["stacks"] = self.report["stacks"] or size > before

    def _stopping(self, reason: str | None, kill_at: float) -> None:
        """Write down why before the rank, and then the launcher, can notice."""
        self.kill_at = kill_at
        if reason is not None and self.report["stopped"] is None:
            self.report["stopped"] = reason
            self._write_report()

    def _finish(self) -> int:
        for number in (*STOP_SIGNALS, *PASSED_ON_SIGNALS, PEER_FAILED):
            signal.signal(number, signal.SIG_IGN)  # from here on, the exit status is the rank's
        left = kill_session(self.rank.pid)
        status = self.rank.wait()
        self._hear(time.monotonic())  # its last words
        self.report.update(ended=time.time(), status=status, oom_kills=oom_kills() - self.oom_kills)
        self._write_report()
        if left:
            log.error("%s: processes %s of its session do not end after SIGKILL", self._who(), left)
        return status

    def _abandon(self) -> int:
        log.error("%s: does not end after SIGKILL; left alone (uninterruptible in the kernel?)", self._who())
        self.report.update(ended=time.time(), status=-signal.SIGKILL)
        self._write_report()
        return -signal.SIGKILL

    # -- words

    def _who(self) -> str:
        return f"rank {self.report['rank']} (pid {self.rank.pid})"

    def _at_step(self) -> str:
        return "" if self.clocks.step is None else f" at step {self.clocks.step}"

    def _write_report(self) -> None:
        clocks = self.clocks
        self.report_written, self.report_is_old = time.monotonic(), False
        self.report.update(step=clocks.step, saved=clocks.saved, request=clocks.request, sections=list(clocks.sections))
        self.report.update(error=clocks.error, over=clocks.over is not None, timeouts=clocks.config.timeouts())
        self.report["clock"] = self._clock_for_people()
        if self.report_path is not None:
            self.report_failed = not self._write(self.report_path, self.report, quiet=self.report_failed)

    def _clock_for_people(self) -> dict[str, Any] | None:
        clock = self.clocks.nearest()
        if clock is None:
            return None
        since = time.time() - (time.monotonic() - clock.since)
        return {"setting": clock.setting, "since": round(since, 3), "limit": clock.limit}

    def _write(self, path: Path, values: Mapping[str, Any], quiet: bool = False) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # without a launcher, nobody has made it
            write_json(path, values)
        except (OSError, ValueError) as error:  # ValueError: the rank gave a name that no file can have
            level = logging.DEBUG if quiet else logging.WARNING
            log.log(level, "%s: cannot write %r: %s", self._who(), str(path), error)
            return False
        return True


def half_time(clock: Clock) -> float:
    return clock.since + (clock.limit or 0.0) / 2


# ------------------------------------------------------------------------------------------------------ main


class NeverWaitingHandler(logging.StreamHandler):
    """Drops a line rather than wait for a reader that has stopped: a hung rank is ended, whoever reads our log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            is_ready = select.select([], [self.stream], [], 0)[1]  # a pipe is if it takes PIPE_BUF bytes
        except (OSError, ValueError, TypeError):
            return  # there is no stderr
        if is_ready:
            super().emit(record)


class PrefixFormatter(logging.Formatter):
    """Begins every line with who speaks, since the output of ranks comes in between."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"[{self.prefix}] {line}" for line in super().format(record).split("\n"))


def configure_logging(name: str, level: str, prefix: str) -> None:
    """Send this program's own lines to stderr, with a prefix that tells them from the ranks' output."""
    logger = logging.getLogger(name)
    handler = NeverWaitingHandler()
    handler.setFormatter(PrefixFormatter(prefix))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


def end_like(status: int) -> NoReturn:
    """End this process as the rank ended: with its exit code, or by its signal, without a core dump of our own."""
    if status < 0:
        process_control(PR_SET_DUMPABLE, 0)
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(128 - status if status < 0 else status)  # the first process of a container outlives its own signals


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, FaultToleranceConfig]:
    parser = argparse.ArgumentParser(
        prog="ft_monitor.py",
        usage="ft_monitor.py [options] -- COMMAND ...",
        description="Runs a command as one rank, and ends it when it hangs.",
        allow_abbrev=False,
    )
    parser.add_argument("--shutdown-timeout", metavar="SECONDS", type=float, default=DEFAULT_GRACE_SECONDS,
                        help="seconds a stopped rank has to end by itself (default: 30)")  # fmt: skip
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end the rank when this, our parent, dies")
    FaultToleranceConfig.add_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command: give the rank's command line after --")
    if not 0 <= args.shutdown_timeout < math.inf:
        parser.error(f"--shutdown-timeout: got {args.shutdown_timeout}, expected a number of at least 0")
    try:
        return args, FaultToleranceConfig.from_args(args)
    except ConfigError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    args, config = parse_arguments(sys.argv[1:] if argv is None else argv)
    attempt = os.environ.get("FT_ATTEMPT") or 0
    configure_logging("ft_monitor", config.log_level, f"ft_monitor attempt {attempt} rank {rank_number()}")
    monitor = RankMonitor(args.command, config, args.shutdown_timeout, args.parent_pid, evidence_path("json"))
    end_like(monitor.run())


if __name__ == "__main__":
    main()
