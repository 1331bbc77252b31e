#!/usr/bin/env python3
"""The rank monitor: starts one rank, hears its heartbeats over a pipe, and kills it when it hangs.

    python ft_monitor.py --ft-rank-heartbeat-timeout 60 -- python -u train.py

A rank that hangs cannot say so. So each gets a parent, as `tini` is a container's, that knows how
long each thing may take, ends with the rank's own exit status, and leaves no process behind.
ft_launcher.py starts it, or any launcher, such as srun. `RankMonitorClient` is the rank's end of
the pipe. Standard library only.

Environment, from the launcher; the last three from the monitor
    FT_CONFIG            the configuration as JSON
    FT_LEARNED           longest times of earlier attempts, by clock, as JSON
    FT_RUN_DIR           directory of reports and stacks
    FT_ATTEMPT           0, 1, 2 ...: earlier starts of workers
    FT_LAUNCHER_PID      the parent, whose death ends the rank
    FT_SHUTDOWN_TIMEOUT  seconds that a stopped rank has to end
    RANK                 the rank's number; or SLURM_PROCID, or 0
    FT_MONITOR_PID       the monitor's process
    FT_MONITOR_FD        the monitor's descriptor for the pipe's write end
    FT_STACKS_FD         the monitor's descriptor for stacks, in memory

Messages: one JSON object a line, at most 4,096 bytes, from rank to monitor only. Each has its
`type` and `time`: late looks measure right.
    type       fields                      meaning
    init       calculate, state_file, pid  connected; whether limits are learned, and kept where
    heartbeat  step                        alive, with so many batches done, or null
    section    name, open                  entered (true) or left (false) a named section
    learned    longest                     learn limits; earlier runs' longest times, by clock
    saved      step, checkpoint            is on disk; noted in FT_RUN_DIR/progress.json or, under
                                           autoresume.sh, FLAG.progress
    request    action, reason              workload control, when this attempt ends
    complete   flag, values                training is done: create the flag if the script ends well
    error      error                       an exception, which may yet be handled; what the script
                                           had waited for by then is not learned
    shutdown                               monitoring rests until the next init, or bye
    bye        error                       the main thread has ended, well (null) or with this error

Clocks: an idle one, or one for each open section; the first that runs out decides. If limits are
learned, it is the longest time survived times safety_factor, at least min_timeout or a shorter
configured limit: from 16 heartbeats, or one section, on. Else it is the configured one; else, where
any is configured or learned, unknown_timeout.
    clock                           runs from                   to
    startup_timeout                 process start               init
    initial_rank_heartbeat_timeout  init                        first heartbeat or section
    rank_heartbeat_timeout          heartbeat, or section left  next heartbeat or section
    rank_out_of_section_timeout     the latter, in a loop       next section
                                    without heartbeats
    rank_section_timeouts[name]     section entered             section left
    exit_timeout                    bye                         process end

How a rank is ended
    half of a clock, the first time   a warning and its stacks; nothing is ended
    a clock ran out                   stacks, termination signal to its processes, SIGKILL after 5 s
    SIGTERM, SIGINT, SIGHUP, SIGQUIT  SIGTERM, or SIGINT; SIGKILL after the shutdown timeout,
                                      or at once at a SIGINT while it is ending
    SIGABRT, as a peer failed;        stacks, SIGKILL; a checkpoint being saved may be finished,
    or the launcher died              within workers_stop_timeout
    SIGUSR1, SIGUSR2                  passed on to the rank; nothing is ended
    the rank ended by itself          SIGKILL to what it has left, in whatever session
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import enum
import functools
import json
import math
import os
import signal
import sys
import threading
import time

# What only a rank or a reader needs is imported there: a monitor is to be small.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any, NoReturn

    Seconds = float | None
    StrPath = str | os.PathLike[str]

MAX_MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write of this size is whole or fails
MIN_HEARTBEATS = 16  # before their limit is learned
FADE = 0.8  # of what was learned, from run to run: outliers fade
READ_SECONDS = 0.1  # between looks at the pipe, which holds 1,000 heartbeats
REPORT_SECONDS = 1.0  # between reports
TERMINATION_SECONDS = 5.0  # from the termination signal of a hung rank to SIGKILL
REAP_SECONDS = 10.0  # from SIGKILL to giving up on what the kernel does not end
SUSPENDED_SECONDS = 5.0  # a monitor that wakes so late was suspended, and its rank too
STACKS_SECONDS = 1.0  # for a rank to write its stacks; 1 ms is usual
FILE_SECONDS = 5.0  # for a file system to answer
FLAG_SECONDS = 30.0  # for the finished flag to be written
LOG_SECONDS = 0.5  # for a line of the log
UNKNOWN_SECONDS = 1800.0  # default of unknown_timeout
EXIT_SECONDS = 600.0  # unknown_timeout of a process whose script has ended
GRACE_SECONDS = 30.0  # as torchrun's --shutdown-timeout

# NVIDIA's settings are in YAML.
TO_JSON = "python -c 'import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))'"
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36  # of prctl(2)
PARENT_DIED = signal.SIGURG  # ignored by default, so a stray one is harmless
PEER_FAILED = signal.SIGABRT
STACKS_SIGNAL = signal.SIGRTMAX - 7  # of no runtime that we know: Go's is SIGURG, Java's SIGQUIT
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
SAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # to a rank: save, and end

FLAG_VARIABLE = "FAULT_TOL_FINISHED_FLAG_FILE"
STARTUP, EXIT = "startup_timeout", "exit_timeout"
INITIAL, HEARTBEAT = "initial_rank_heartbeat_timeout", "rank_heartbeat_timeout"
OUT_OF_SECTION = "rank_out_of_section_timeout"
IDLE = (INITIAL, HEARTBEAT, OUT_OF_SECTION)  # clocks of which one runs outside of sections
CHECKPOINTING = "checkpointing"  # the section in which a checkpoint is saved
AFTER_TRAINING = "after_training"  # the script's own work: no limit is learned
STACKS_HEADER = "==="  # begins the line before each dump of stacks, with its time
# What somebody else's JSON can raise.
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


# ------------------------------------------------------------------------------- configuration


class ConfigError(ValueError):
    """A setting that cannot be used: the value, what was expected, and the remedy."""


def parse_number(value: Any, bound: float = 0.0) -> float:
    try:
        number = float(str(value))  # which refuses True
    except ValueError:
        number = math.nan
    if not bound < number < math.inf:
        raise ConfigError(f"got {value!r}, expected a number above {bound:g}")
    return number


def parse_seconds(value: Any) -> Seconds:
    """A timeout; "none" is infinite, None is not configured."""
    if value in (None, math.inf):
        return value
    return math.inf if str(value).strip().lower() in ("none", "null") else parse_number(value)


def parse_sections(value: Any) -> dict[str, float]:
    sections = value
    if isinstance(value, str):
        pairs = [item.rpartition(":") for item in value.split(",") if item.strip()]
        sections = {name.strip(): seconds for name, _, seconds in pairs}
    if not isinstance(sections, dict) or "" in sections:
        raise ConfigError(f"got {value!r}, expected NAME:SECONDS,...")
    return {name: parse_seconds(x) or math.inf for name, x in sections.items()}


def parse_signal(value: Any) -> str:
    try:
        return signal.Signals[f"SIG{str(value).upper().removeprefix('SIG')}"].name
    except KeyError:
        raise ConfigError(f"got {value!r}, expected a signal, such as SIGTERM") from None


def setting(meaning: str, parse: Callable[[Any], Any] = parse_seconds, default: Any = None) -> Any:
    """A field of the configuration: `parse` checks what a flag, a file or a script gives."""
    metadata = {"parse": parse, "meaning": meaning}
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class FaultToleranceConfig:
    """The settings of a job, by NVIDIA's names where it has them. May raise ConfigError."""

    startup_timeout: float | None = setting("from process start to connection")
    initial_rank_heartbeat_timeout: float | None = setting("from then to heartbeat or section")
    rank_heartbeat_timeout: float | None = setting("between heartbeats, outside of sections")
    rank_section_timeouts: Mapping[str, float] = setting(
        "within sections, as setup:600,checkpointing:300", parse_sections, {}
    )
    rank_out_of_section_timeout: float | None = setting("between sections, without heartbeats")
    exit_timeout: float | None = setting("from the script's end to its process's (600)")
    unknown_timeout: float | None = setting("for what is neither configured nor learned (1800)")
    safety_factor: float = setting(
        "a learned limit is the longest time times this (5)",
        functools.partial(parse_number, bound=1.0),
        5.0,
    )
    min_timeout: float = setting("learned limits are not shorter (60)", parse_number, 60.0)
    workers_stop_timeout: float = setting(
        "for survivors of a failed rank to finish a checkpoint (30)", parse_number, 30.0
    )
    rank_termination_signal: str = setting(
        "what ends a hung rank; SIGKILL follows after 5 s (SIGKILL)", parse_signal, "SIGKILL"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["parse"](getattr(self, field.name))
            except ConfigError as error:
                raise ConfigError(f"{field.name}: {error}") from None
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_mapping(cls, values: Any) -> FaultToleranceConfig:
        """Settings by name; None means never."""
        if not isinstance(values, dict):
            raise ConfigError(f"got {values!r}, expected an object")
        names = cls.__dataclass_fields__.keys()
        others = sorted(values.keys() - names)
        for name in others:
            import difflib

            for close in difflib.get_close_matches(name, names, 1, cutoff=0.7):  # no NVIDIA's name
                raise ConfigError(f"unknown setting {name!r}; did you mean {close!r}?")
        if others:
            warn(f"ignoring settings that have no meaning here: {', '.join(others)}")
        given: Any = {n: "none" if x is None else x for n, x in values.items() if n in names}
        return cls(**given)

    @classmethod
    def load(cls, path: str | None = None) -> FaultToleranceConfig:
        """From a file in JSON; without one, from FT_CONFIG."""
        place = f"configuration {path!r}" if path else "environment variable FT_CONFIG"
        text = os.environ.get("FT_CONFIG") or "{}"
        try:
            if path:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            if ":" in text and not text.lstrip().startswith(("{", "[")):
                raise ConfigError(f"expected JSON; {TO_JSON} < {path or 'FILE'} turns YAML into it")
            values = json.loads(text)
            if isinstance(values, dict):
                values = values.get("fault_tolerance", values)
            return cls.from_mapping(values)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: {error}") from None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FaultToleranceConfig:
        """Flags beat the file of --ft-cfg-path, or else FT_CONFIG; both beat defaults."""
        names = cls.__dataclass_fields__
        given: Any = {name: x for name in names if (x := getattr(args, f"ft_{name}")) is not None}
        return dataclasses.replace(cls.load(args.ft_cfg_path), **given)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, **options: Any) -> Any:
        """Add a flag for each setting; return their group."""
        group = parser.add_argument_group("fault tolerance", "times in seconds, 'none' for never")
        about = "settings in JSON; flags beat it"
        group.add_argument("--ft-cfg-path", metavar="FILE", help=about, **options)
        for field in dataclasses.fields(FaultToleranceConfig):
            flag, about = f"--ft-{field.name.replace('_', '-')}", field.metadata["meaning"]
            group.add_argument(flag, metavar="VALUE", help=about, **options)
        return group

    def to_json(self) -> str:
        defaults = vars(FaultToleranceConfig())
        return json.dumps({k: v for k, v in vars(self).items() if v != defaults[k]})

    def limits(self) -> dict[str, float]:
        """The configured limits in seconds, by clock."""
        clocks = {name: getattr(self, name) for name in (STARTUP, *IDLE, EXIT)}
        clocks |= {section_clock(name): x for name, x in self.rank_section_timeouts.items()}
        return {clock: seconds for clock, seconds in clocks.items() if seconds}

    def is_watching(self) -> bool:
        """Whether any limit is configured; if so, unknown_timeout is for the rest."""
        return any(map(math.isfinite, [*self.limits().values(), self.unknown_timeout or math.inf]))


def section_clock(section: str) -> str:
    return f"rank_section_timeouts[{section}]"


def section_of(clock: str) -> str:
    """The section that a clock is of; empty if it is of none."""
    return clock.partition("[")[2][:-1]


# ------------------------------------------------------------------------------------ messages


class WorkloadAction(enum.Enum):
    """What a rank can ask the launcher for, when the attempt ends."""

    Continue = 0  # restart as usual
    ExcludeThisNode = 1  # go on without this node
    ShutdownWorkload = 2  # do not restart anywhere


@dataclasses.dataclass(frozen=True)
class WorkloadControlRequest:
    action: WorkloadAction
    description: str = "no reason given"


TEXT = (str, type(None))
MESSAGE_FIELDS: dict[str, dict[str, Any]] = {
    "init": {"calculate": bool, "state_file": TEXT, "pid": int},
    "heartbeat": {"step": (int, type(None))},
    "section": {"name": str, "open": bool},
    "learned": {"longest": dict},
    "saved": {"step": int, "checkpoint": TEXT},
    "request": {"action": str, "reason": str},
    "complete": {"flag": TEXT, "values": dict},
    "error": {"error": str},
    "shutdown": {},
    "bye": {"error": TEXT},
}


def encode_message(kind: str, **fields: Any) -> bytes:
    """Cuts text that is too long for a pipe."""
    message = {"type": kind, "time": time.monotonic(), **fields}
    while len(line := json.dumps(message, default=str)) >= MAX_MESSAGE_BYTES:
        longest = max(fields, key=lambda name: len(json.dumps(message[name], default=str)))
        text = message[longest]
        message[longest] = text[: len(text) // 2] if isinstance(text, str) else {}
    return line.encode() + b"\n"


def decode_message(line: bytes) -> dict[str, Any] | None:
    """None for what is no message."""
    try:
        message = json.loads(line) if len(line) < MAX_MESSAGE_BYTES else {}
        fields = MESSAGE_FIELDS[message["type"]]
        message["time"] = parse_number(message["time"])
        if "longest" in fields:
            message["longest"] = parse_longest(message["longest"])
        is_right = all(isinstance(message[name], types) for name, types in fields.items())
    except BROKEN:
        return None
    return message if is_right else None


class Inbox:
    """The pipe, cut into messages. It outlives whatever a rank does to its own descriptors."""

    def __init__(self) -> None:
        # What multiprocessing.Pipe(duplex=False) makes; its module would double our memory.
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.skipped = 0  # lines that were not understood
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """What has arrived, up to a bound: a rank may keep filling the pipe."""
        messages = []
        for _ in range(16):
            try:
                messages += self.feed(os.read(self.read_end, 65536))
            except BlockingIOError:
                break
        return messages

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:MAX_MESSAGE_BYTES]  # enough to see that it is too long
        messages = list(map(decode_message, lines))
        self.skipped += messages.count(None)
        return list(filter(None, messages))


# -------------------------------------------------------------------------------------- clocks


class Clocks:
    """Which clocks run, what their limits are, and what was learned. No I/O; times in seconds."""

    def __init__(
        self, config: FaultToleranceConfig, now: float, earlier: Mapping[str, float] | None = None
    ) -> None:
        self.config = config
        self.configured = config.limits()
        self.heard = now  # time of the last message
        self.running = {STARTUP: now}  # and since when
        self.idle = OUT_OF_SECTION  # the one of IDLE after a section
        self.learns = earlier is not None
        self.earlier = dict(earlier or {})  # longest time of earlier attempts, by clock
        self.longest: dict[str, float] = {}  # and of this one
        self.laps = collections.Counter[str]()  # how often each was stopped
        self.state_file: str | None = None  # another training has another one, and limits

    @property
    def sections(self) -> list[str]:
        """The open ones."""
        return sorted(filter(None, map(section_of, self.running)))

    def hear(self, message: Mapping[str, Any], now: float) -> None:
        """Let a message start and stop clocks."""
        self.heard = at = min(max(message["time"], self.heard), now)  # whatever was written
        kind = message["type"]
        if kind == "init":
            if STARTUP not in self.running and message["state_file"] != self.state_file:
                self.earlier, self.longest = {}, {}
                self.laps.clear()
            self.state_file, self.learns = message["state_file"], message["calculate"]
            self._stop([*self.running], at)
            self.idle, self.running[INITIAL] = OUT_OF_SECTION, at
        elif kind == "heartbeat":
            self._stop(IDLE, at)
            self.idle = HEARTBEAT
            if not self.sections:
                self.running[HEARTBEAT] = at
        elif kind == "section":
            clock = section_clock(message["name"])
            if message["open"]:
                self._stop(IDLE, at)
                self.running.setdefault(clock, at)
            elif clock in self.running:
                self._stop([clock], at)
                if not self.sections:
                    self.running[self.idle] = at
        elif kind == "learned":
            self.learns = True
            for clock, seconds in message["longest"].items():
                self.earlier[clock] = max(seconds, self.earlier.get(clock, 0.0))
        elif kind == "error":  # what it was waiting for may have hung: not a time survived
            self.restart(at)
        elif kind == "shutdown":
            self._stop([*self.running], at)
        elif kind == "bye":
            if message["error"] is None:
                self._stop([*self.running], at)
            self.running = {EXIT: at}

    def _stop(self, clocks: Sequence[str], at: float) -> None:
        """Stop those that run, and learn how long they took."""
        for clock in clocks:
            if clock in self.running:
                seconds = round(at - self.running.pop(clock), 3)
                self.longest[clock] = max(seconds, self.longest.get(clock, 0.001))
                self.laps[clock] += 1

    def restart(self, now: float) -> None:
        """Restart the running clocks: the time before does not count."""
        self.heard = now  # not what is still in the pipe
        self.running = dict.fromkeys(self.running, now)

    def is_learned(self, clock: str) -> bool:
        """Whether enough was seen for a learned limit."""
        never = (EXIT, section_clock(AFTER_TRAINING))
        if clock in never or self.configured.get(clock) == math.inf or not self.learns:
            return False
        enough = MIN_HEARTBEATS if clock == HEARTBEAT else 1
        return clock in self.earlier or self.laps[clock] >= enough

    def limit(self, clock: str) -> float:
        """The seconds that a clock may run, or infinity."""
        config, configured = self.config, self.configured.get(clock)
        survived = max(self.longest.get(clock, 0.0), self.earlier.get(clock, 0.0))
        learned = config.safety_factor * survived
        if self.is_learned(clock):
            return max(learned, min(config.min_timeout, configured or math.inf))
        if configured:
            return configured
        if not (self.learns or config.is_watching()):
            return math.inf
        unknown = EXIT_SECONDS if clock == EXIT else UNKNOWN_SECONDS
        return max(learned, config.unknown_timeout or unknown)

    def limits(self) -> dict[str, float]:
        """The finite limits, by clock."""
        names = {*self.configured, *self.running, *self.longest, *self.earlier}
        return {x: round(limit, 3) for x in sorted(names) if math.isfinite(limit := self.limit(x))}

    def first(self) -> tuple[str, float]:
        """The clock that runs out first, and when; ("", infinity) if none does."""
        ends = {clock: since + self.limit(clock) for clock, since in self.running.items()}
        return min(ends.items(), key=lambda item: item[1], default=("", math.inf))


# --------------------------------------------------------------------------- reports and state


class End(str, enum.Enum):
    """How a rank came to its end."""

    RUNNING = "running"
    BY_ITSELF = "by itself"
    HUNG = "hung"
    STOPPED = "stopped"  # by a signal to its monitor
    PEER_FAILED = "peer failed"
    LAUNCHER_DIED = "launcher died"
    LOST = "lost"  # with its node


@dataclasses.dataclass
class Report:
    """How a rank does, and how it ended. Times are since the epoch."""

    rank: int
    attempt: int = 0
    host: str = ""
    launcher_pid: int | None = None
    monitor_pid: int | None = None
    pid: int | None = None
    started: Seconds = None
    connected: Seconds = None
    first_heartbeat: Seconds = None
    heartbeat: Seconds = None  # the last
    error_time: Seconds = None
    ended: Seconds = None
    first_step: int | None = None
    step: int | None = None  # the last
    saved: int | None = None  # step of the newest checkpoint
    sections: list[str] = dataclasses.field(default_factory=list)  # open
    waiting: str = ""  # for what, how long, and the limit: of the clock that runs out first
    request: dict[str, str] | None = None  # action, reason
    calculate: bool = False  # as init said
    state_file: str | None = None
    longest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds by clock
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    learned: list[str] = dataclasses.field(default_factory=list)  # clocks
    over: bool = False  # the script's main thread has ended
    error: str | None = None  # the last exception told of
    end: End = End.RUNNING
    reason: str | None = None  # why the monitor ended it
    hung_on: str | None = None  # the clock that ran out
    waited: Seconds = None  # on that clock
    state: str | None = None  # of its process then: R, S, D, T ...
    stacks: bool | None = None  # whether it wrote its stacks then; None: not asked
    place: str = ""  # where its main thread was, as the launcher reads from its stacks
    waits: bool = False  # there, for other ranks
    oom_kills: int = 0  # while it ran, in its control group or on its host
    status: int | None = None  # exit code, or -N for signal N

    def __post_init__(self) -> None:
        self.rank, self.end = int(self.rank), End(self.end)

    @classmethod
    def read(cls, path: StrPath) -> Report:
        """Raises OSError, or ValueError for what is no report."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except BROKEN as error:
            raise ValueError(f"{path} holds no report: {error!r}") from None


def parse_longest(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ConfigError(f"longest: got {values!r}, expected seconds by clock")
    return {str(clock): parse_number(seconds) for clock, seconds in values.items()}


@dataclasses.dataclass
class State:
    """What runs have learned of how long things take, kept in ft_state.json."""

    longest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by clock
    # By clock: the step at which its limit ended a rank, and when; dropped at higher steps.
    killed: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    run: str = ""  # that wrote last, on whichever node

    @classmethod
    def read(cls, path: StrPath) -> State:
        """Empty if there is no file yet. Raises OSError, or ConfigError for what is no state."""
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            ended = values["killed"].items()
            killed = {str(clock): (int(step), float(at)) for clock, (step, at) in ended}
            return cls(parse_longest(values["longest"]), killed, str(values["run"]))
        except FileNotFoundError:
            return cls()
        except BROKEN as error:
            raise ConfigError(f"{path} holds no state: {error!r}") from None

    def after(self, reports: Sequence[Report], run: str) -> State:
        """This state, and what an attempt adds: what other runs saw of the same clocks fades.

        A limit that ended ranks twice with no new step in between counts as survived: the next is
        longer, and a real hang is noticed later.
        """
        fade = 1.0 if run == self.run else FADE
        highest = max((report.step for report in reports if report.step is not None), default=-1)
        before = {clock: x for clock, x in self.killed.items() if x[0] >= highest}
        killed = dict(before)
        longest: dict[str, float] = {}
        for report in reports:
            survived = dict(report.longest)
            if report.hung_on:
                step, ended = before.get(report.hung_on, (highest, math.inf))
                if (report.started or math.inf) > ended:  # not on another node in the same attempt
                    survived[report.hung_on] = report.waited or 0.0
                killed[report.hung_on] = step, report.ended or 0.0
            for clock, seconds in survived.items():
                known = longest.get(clock, round(self.longest.get(clock, 0.0) * fade, 3))
                longest[clock] = max(seconds, known)
        return State({**self.longest, **longest}, killed, run)


# --------------------------------------------------------------------------- the rank's end


class RankMonitorClientError(RuntimeError):
    """A call that cannot work; the message says what to do."""


# Limits in force, in seconds; None: no limit.
HeartbeatTimeouts = collections.namedtuple(
    "HeartbeatTimeouts", "initial subsequent were_calculated are_valid"
)
SectionTimeouts = collections.namedtuple(
    "SectionTimeouts",
    "section out_of_section calculated_sections is_out_of_section_calculated "
    "were_calculated are_valid",
)


class RankMonitorClient:
    """The rank's end of the pipe to its monitor, for any training loop. Method names as NVIDIA's.

        client = RankMonitorClient()
        client.init_workload_monitoring(calculate_timeouts=True, state_file="ft_state.json")
        for step, batch in enumerate(loader):
            train(batch)
            client.send_heartbeat(step)

    Each method sends what the table of messages tells. Nothing waits for the monitor: when it does
    not read, heartbeats are dropped, and all else is kept for later. A copy is a new client.
    """

    def __init__(self) -> None:
        self.is_initialized = False
        self.cfg: FaultToleranceConfig | None = None  # once connected
        self.open_sections: set[str] = set()
        self._pipe = self._stacks = -1
        self._pid = 0  # of the process that connected: a fork inherits this object
        self.stop_signal: str | None = None  # the last that came
        self._handlers: dict[int, Any] = {}  # the script's own, for SAVE_SIGNALS
        self._interrupted_at = math.inf  # when the first SIGINT came, monotonic
        self._earlier: dict[str, float] = {}  # given to load_state_dict()
        self._lock = threading.RLock()  # for threads, and again in signal handlers
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=10_000)

    def __reduce__(self) -> Any:
        return RankMonitorClient, ()

    def init_workload_monitoring(
        self,
        num_warmup_iters: int | None = None,
        calculate_timeouts: bool = False,
        state_file: StrPath | None = None,
    ) -> None:
        """Connect. With `calculate_timeouts`, limits are learned, and kept in `state_file`.

        `num_warmup_iters` is NVIDIA's: here, what is slow at first is a section. Raises
        RankMonitorClientError without a monitor, or when connected already.
        """
        if self.is_initialized:
            raise RankMonitorClientError("connected already: call shutdown_workload_monitoring()")
        path = None if state_file is None else os.path.abspath(state_file)
        self.cfg = FaultToleranceConfig.load()
        if self._pid != os.getpid():
            (self._pipe, self._stacks), self._pid = connect(), os.getpid()
            self._announce_the_end()
        self.is_initialized = True
        self.offer_stacks()
        self._send("init", calculate=calculate_timeouts, state_file=path, pid=self._pid)
        earlier = self._earlier
        if path and calculate_timeouts:
            state = within(FILE_SECONDS, lambda: State.read(path))
            if isinstance(state, State):
                earlier = {**state.longest, **earlier}
            else:
                warn(f"starting without what was learned in {path}: {state}")
        self._send_learned(earlier)

    def send_heartbeat(self, step: int | None = None) -> None:
        if not self.is_initialized:
            raise RankMonitorClientError(NOT_CONNECTED)
        # By hand, and from whole numbers: json.dumps and %f take longer than all the rest.
        number = b"null" if step is None else b"%d" % step
        line = b'{"type": "heartbeat", "time": %de-9, "step": %b}\n' % (time.monotonic_ns(), number)
        if self._unsent:
            self._flush()
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            pass  # the monitor is frozen, or its host overloaded
        except OSError:
            self._reopen()

    def start_section(self, section: str) -> None:
        """Sections may overlap, but each name can be open only once."""
        if section in self.open_sections:
            raise RankMonitorClientError(f"section {section!r} is open: call end_section() first")
        self._send("section", name=section, open=True)
        self.open_sections.add(section)

    def end_section(self, section: str) -> None:
        if section not in self.open_sections:
            raise RankMonitorClientError(f"section {section!r} is not open: call start_section()")
        self._send("section", name=section, open=False)
        self.open_sections.discard(section)

    def end_all_sections(self) -> None:
        for section in sorted(self.open_sections):
            self.end_section(section)

    def report_saved(self, step: int, checkpoint: StrPath | None = None) -> None:
        self._send("saved", step=int(step), checkpoint=checkpoint and os.fspath(checkpoint))

    def training_complete(self, **values: Any) -> None:
        """When the script ends well, $FAULT_TOL_FINISHED_FLAG_FILE will hold these values."""
        flag = os.environ.get(FLAG_VARIABLE)
        self._send("complete", flag=flag and os.path.abspath(flag), values=values)

    def report_error(self, error: BaseException) -> None:
        self._send("error", error=describe_error(error))

    def send_workload_control_request(self, req: WorkloadControlRequest) -> None:
        self._send("request", action=req.action.name, reason=req.description)

    def shutdown_workload_monitoring(self) -> None:
        """Let monitoring rest until the script ends. Without a connection, do nothing."""
        if self.is_initialized:
            self._send("shutdown")
            self.is_initialized = False
            self.open_sections.clear()

    def offer_stacks(self) -> None:
        """Let the monitor have our stacks, again after a Trainer, which resets all signals.

        faulthandler writes them even while the main thread is stuck in C code with the GIL.
        """
        import faulthandler

        if self._stacks >= 0:
            faulthandler.unregister(STACKS_SIGNAL)
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, chain=False)

    # -- a request to stop

    def stop_requested(self) -> str | None:
        """The signal that asks to save and end with exit code 0, such as "SIGTERM", or None.

        Call it once in the main thread before DataLoader workers start, and after each step. From
        the first call on, these signals are only noted, except a second Ctrl-C; earlier handlers
        are called too. Ranks must agree on a step: some may have got no signal.
        """
        if not self.is_initialized:
            raise RankMonitorClientError(NOT_CONNECTED)
        if not self._handlers:
            self.protect_workers()
            self.catch_signals()
        return self.stop_signal

    def catch_signals(self) -> None:
        """Note the signals that ask to stop, until somebody installs other handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.stop_signal, self._interrupted_at = None, math.inf
        for number in SAVE_SIGNALS:
            own = signal.getsignal(number)
            if own not in (None, self._note_signal):  # None: set by C code, which is left alone
                self._handlers[number] = own
                signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a fork of this rank
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.stop_signal = signal.Signals(number).name
        own, now = self._handlers[number], time.monotonic()
        if number == signal.SIGINT:
            self._interrupted_at = min(now, self._interrupted_at)
        # One Ctrl-C may arrive twice, from the terminal and from the monitor.
        is_first = now < self._interrupted_at + 1.0
        if callable(own) and not (own is signal.default_int_handler and is_first):
            own(number, frame)

    @staticmethod
    @functools.cache  # once in a process
    def protect_workers() -> None:
        """Let forked DataLoader workers outlive signals to all processes until a rank has saved."""
        os.register_at_fork(after_in_child=RankMonitorClient._protect_this_worker)

    @staticmethod
    def _protect_this_worker() -> None:
        process = sys._getframe(1).f_locals.get("process_obj")  # of multiprocessing's Popen
        if getattr(getattr(process, "_target", None), "__name__", "") != "_worker_loop":
            return  # no DataLoader's, of torch or torchdata
        parent, term = os.getppid(), [signal.SIGTERM]
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, term)

        def wait() -> None:
            while signal.sigwaitinfo(term).si_pid != parent:
                pass
            os._exit(0)  # its parent calls terminate()

        start_thread(wait)

    # -- limits, which the monitor learns

    @property
    def hb_timeouts(self) -> HeartbeatTimeouts | None:
        """None before init_workload_monitoring()."""
        if not self.is_initialized:
            return None
        report = self._report()
        initial, subsequent = report.limits.get(INITIAL), report.limits.get(HEARTBEAT)
        are_valid = None not in (initial, subsequent)
        return HeartbeatTimeouts(initial, subsequent, HEARTBEAT in report.learned, are_valid)

    @property
    def section_timeouts(self) -> SectionTimeouts | None:
        if not self.is_initialized:
            return None
        report = self._report()
        limits = {section_of(clock): x for clock, x in report.limits.items() if section_of(clock)}
        learned = frozenset(map(section_of, report.learned)) - {""}
        outside = report.limits.get(OUT_OF_SECTION)
        is_learned = OUT_OF_SECTION in report.learned
        are_all = is_learned and learned == limits.keys()
        return SectionTimeouts(limits, outside, learned, is_learned, are_all, outside is not None)

    def calculate_and_set_hb_timeouts(self, *args: Any, **kwargs: Any) -> bool:
        """Let all limits be learned, whatever NVIDIA's arguments say."""
        self._send("learned", longest={})
        return True

    calculate_and_set_section_timeouts = calculate_and_set_hb_timeouts

    def state_dict(self) -> dict[str, Any]:
        """What a later run can be given by load_state_dict()."""
        return {"longest": State(self._earlier).after([self._report()], "this run").longest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Learn limits from what an earlier run has seen. Raises ConfigError."""
        if "longest" in state:
            self._earlier = parse_longest(state["longest"])
        elif state:
            warn("ignoring a state that is not ours, such as NVIDIA's: limits are learned again")
        if self.is_initialized:
            self._send_learned(self._earlier)

    def _send_learned(self, longest: Mapping[str, float]) -> None:
        for clock, seconds in longest.items():  # one each: a message has a limited size
            self._send("learned", longest={clock: seconds})

    def _report(self) -> Report:
        """The monitor's, or what it will write first."""
        try:
            return Report.read(evidence_path("json"))
        except (OSError, ValueError):
            return Report(rank_number(), limits=(self.cfg or FaultToleranceConfig()).limits())

    # -- the pipe

    def _send(self, kind: str, **fields: Any) -> None:
        if not self.is_initialized:
            raise RankMonitorClientError(NOT_CONNECTED)
        self._unsent.append(encode_message(kind, **fields))
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            while self._unsent:
                message = self._unsent.popleft()
                try:
                    os.write(self._pipe, message)
                except OSError as error:
                    self._unsent.appendleft(message)
                    if isinstance(error, BlockingIOError):
                        return
                    self._reopen()

    def _reopen(self) -> None:
        """The script has closed our descriptor, as daemons close all that they find."""
        try:
            self._pipe, self._stacks = connect()
            self.offer_stacks()
        except RankMonitorClientError:
            self._unsent.clear()  # the monitor has ended, and so will we

    def _announce_the_end(self) -> None:
        """Say bye when the main thread ends, also while other threads keep the process alive."""
        import atexit

        def bye() -> None:
            if os.getpid() == self._pid:
                self.offer_stacks()
                error = getattr(sys, "last_value", None)  # what ended the main thread
                text = None if error is None else describe_error(error)
                self._unsent.append(encode_message("bye", error=text))
                self._flush()

        def wait() -> None:
            threading.main_thread().join()
            bye()

        atexit.register(bye)
        if getattr(sys.excepthook, "func", None) is not show_error:
            sys.excepthook = functools.partial(show_error, sys.excepthook)
        start_thread(wait)


NOT_CONNECTED = "not connected: call init_workload_monitoring() first"


def connect() -> tuple[int, int]:
    """Descriptors of the monitor's pipe, and for stacks, or -1."""
    if "FT_MONITOR_FD" not in os.environ:
        command = "python ft_launcher.py --nproc-per-node=N SCRIPT"
        raise RankMonitorClientError(f"this process was not started by ft_launcher; run {command}")
    pipe = open_of_monitor("FT_MONITOR_FD", os.O_NONBLOCK)
    try:
        return pipe, open_of_monitor("FT_STACKS_FD", os.O_APPEND)
    except RankMonitorClientError:
        return pipe, -1


def open_of_monitor(variable: str, flags: int) -> int:
    """A descriptor of our own for what the monitor has open: /proc knows it, even if a wrapper such
    as conda run has closed ours. Its number is high: should the script close it and open files,
    no heartbeat lands in them."""
    import fcntl

    path = f"/proc/{os.environ.get('FT_MONITOR_PID')}/fd/{os.environ.get(variable)}"
    try:
        low = os.open(path, os.O_WRONLY | flags)
        high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 512)
    except OSError as error:
        remedy = "it has ended, or start the launcher inside of your sudo or container"
        text = f"no rank monitor at {path}, {error.strerror}: {remedy}"
        raise RankMonitorClientError(text) from None
    os.close(low)
    return high


def is_library(file: str) -> bool:
    """Whether a file is Python's, an installed package's or ours, not the user's."""
    is_ours = os.path.basename(file) in ("ft_monitor.py", "ft_callback.py")
    pythons = ("<frozen", os.path.dirname(os.__file__))
    return is_ours or file.startswith(pythons) or "-packages" in file


def describe_error(error: BaseException) -> str:
    """In one line, without colours; and the user's line that it came from."""
    import re
    import traceback

    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}").strip()
    if "Traceback (most recent call last)" in text:  # a DataLoader worker's: its last line tells
        text = " ... ".join([text.splitlines()[0], text.splitlines()[-1]])
    text = " ".join(text.removesuffix(":").split())
    text = text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in [frame for frame in frames if not is_library(frame.filename)][-1:]:
        text += f" ({os.path.basename(frame.filename)}:{frame.lineno} in {frame.name})"
    return text


def show_error(show: Callable[..., Any], kind: Any, error: BaseException, trace: Any) -> None:
    """As sys.excepthook: where a peer is gone, or a call of ours was wrong, one line is enough."""
    import re
    import traceback

    text, path = describe_error(error), evidence_path("traceback.txt")
    if isinstance(error, RankMonitorClientError) or re.match(COMMUNICATION_ERROR, text):
        full = "".join(traceback.format_exception(kind, error, trace))
        if within(FILE_SECONDS, lambda: write_file(path, full)) is None:
            print(f"rank {rank_number()}: {text}; traceback: {path}", file=sys.stderr)
            return
    show(kind, error, trace)


def rank_number() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def attempt_number() -> int:
    return int(os.environ.get("FT_ATTEMPT") or 0)


def evidence_path(kind: str) -> str:
    """Where this rank's report (json), stacks (stacks.txt) or traceback.txt are."""
    directory = os.environ.get("FT_RUN_DIR", "")
    return os.path.join(directory, f"attempt_{attempt_number()}", f"rank{rank_number()}.{kind}")


def progress_file() -> str:
    """Where the newest checkpoint is noted for later attempts and, under autoresume.sh, runs."""
    if flag := os.environ.get(FLAG_VARIABLE):
        return f"{flag}.progress"
    return os.path.join(os.environ.get("FT_RUN_DIR") or default_run_dir(), "progress.json")


def default_run_dir() -> str:
    """Below it, each launcher, or monitor without one, has a directory of its own."""
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"ft_runs_{os.getuid()}")


# ------------------------------------------------------------------------------------ processes


def process_control(option: int, value: int) -> None:
    """prctl(2) for this process."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def ignore(signals: Sequence[int]) -> None:
    """Such as USER_SIGNALS: schedulers send them to every process, and by default they end it."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def send(pid: int, number: int, how: Callable[[int, int], None] = os.kill) -> None:
    """Signal a process, or with os.killpg a group, that may have ended."""
    try:
        how(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def send_to_main_thread(pid: int, number: int) -> None:
    """Any thread may take a process's signal, while the continued main one runs on."""
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except AttributeError:  # glibc has it since 2.30
        send(pid, number)


def descendants(pid: int) -> list[int]:
    """What descends from a process and still runs; from a subreaper, in whatever session."""
    children: dict[int, list[tuple[int, bytes]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        # proc(5): pid (comm) state ppid ...; comm may hold spaces and parentheses
        if fields := read_kernel(f"/proc/{name}/stat").rpartition(b")")[2].split():
            children.setdefault(int(fields[1]), []).append((int(name), fields[0]))
    found, queue = [], [pid]
    while queue:
        young = children.get(queue.pop(), [])
        queue += [child for child, _ in young]
        found += [child for child, state in young if state not in b"ZX"]
    return found


def kill_descendants(mark: bytes = b"") -> list[int]:
    """SIGKILL what descends from us and began with `mark` in its environment; return what does not
    end (D state)."""
    deadline = time.monotonic() + REAP_SECONDS
    while True:
        left = []
        for pid in descendants(os.getpid()):
            # Not read in vain: that may wait for a process that hangs in the kernel.
            if not mark or mark in read_kernel(f"/proc/{pid}/environ"):
                send(pid, signal.SIGKILL)
                left.append(pid)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.005)


def read_kernel(path: StrPath) -> bytes:
    """A file, in /proc or /sys say; empty where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def kernel_value(path: str, name: str) -> str:
    """What follows `name` in its line of such a file; else empty."""
    lines = read_kernel(path).decode(errors="replace").splitlines()
    return next((line.removeprefix(name).strip() for line in lines if line.startswith(name)), "")


def process_status(pid: int, name: str) -> str:
    """A line of /proc/PID/status, such as State or SigCgt."""
    return kernel_value(f"/proc/{pid}/status", f"{name}:")


def oom_kills() -> int:
    """Kills for want of memory so far, in this control group (v2), or else on this host."""
    group = kernel_value("/proc/self/cgroup", "0::")
    in_group = kernel_value(f"/sys/fs/cgroup{group}/memory.events", "oom_kill ")
    return int(in_group or kernel_value("/proc/vmstat", "oom_kill ") or 0)


# ---------------------------------------------------------------------------------------- files


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return what a function returns, or its OSError or ValueError; or a TimeoutError if it takes
    longer, as where a file system hangs: its thread is left behind."""
    results: list[Any] = [TimeoutError(f"no answer within {seconds:g} s")]

    def call() -> None:
        try:
            results.append(function())
        except (OSError, ValueError) as error:
            results.append(error)

    if thread := start_thread(call):
        thread.join(seconds)
    return results[-1]


def start_thread(function: Callable[[], None]) -> threading.Thread | None:
    """None where the host or a control group allows no more of them."""
    thread = threading.Thread(target=function, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def host_name() -> str:
    """As SLURM knows it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def to_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def write_file(path: StrPath, text: str) -> None:
    """Readers never see half of it. Raises OSError."""
    directory, name = os.path.split(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)  # a cleaner may have removed it
    # Launchers in containers have the same pid on all nodes.
    beside = os.path.join(directory, f".{name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    finally:
        if os.path.lexists(beside):
            os.unlink(beside)


class Writer:
    """Writes each file in a thread, as any file system may hang. The last text counts."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._texts: dict[str, str] = {}  # to be written, by path
        self._changed = threading.Condition()
        self._failed: set[str] = set()  # paths, the last time

    def put(self, path: str, text: str) -> None:
        with self._changed:
            is_idle = path not in self._texts
            self._texts[path] = text
        if is_idle and not start_thread(lambda: self._run(path)):
            self._texts.pop(path)

    def finish(self, seconds: float) -> None:
        """Wait until all is written, but not longer."""
        with self._changed:
            self._changed.wait_for(lambda: not self._texts, seconds)

    def _run(self, path: str) -> None:
        while True:
            text = self._texts[path]
            try:
                write_file(path, text)
                self._failed.discard(path)
            except OSError as error:
                if path not in self._failed:
                    self._log.warning("cannot write %r: %s", path, error.strerror)
                self._failed.add(path)
            with self._changed:
                if self._texts[path] is text:
                    del self._texts[path]
                    self._changed.notify_all()
                    return


class Log:
    """Lines on stderr, each begun with who speaks. Nobody waits for a reader that has stopped."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def info(self, text: str, *values: Any) -> None:
        lines = (text % values if values else text).split("\n")
        data = "".join(f"[{self.prefix}] {line}\n" for line in lines)
        bar = "\r\033[K" if os.isatty(2) else "\n" * (len(lines) > 1)  # a progress bar's rest
        within(LOG_SECONDS, lambda: os.write(2, (bar + data).encode(errors="replace")))

    warning = error = info


def warn(text: str) -> None:
    import logging

    logging.getLogger("ft_monitor").warning("%s", text)


# -------------------------------------------------------------------------------------- monitor

AWAITED = {  # what a rank has not done while a clock runs
    STARTUP: "no connection after process start",
    INITIAL: "no first heartbeat",
    HEARTBEAT: "no heartbeat",
    OUT_OF_SECTION: "outside of all sections",
    EXIT: "no end of the process after the script's",
}
TAKEN_SIGNALS = (*STOP_SIGNALS, *USER_SIGNALS, PEER_FAILED, PARENT_DIED, signal.SIGCHLD)


class RankMonitor:
    """One rank, from its start to its end: what it says, and what is done to it."""

    def __init__(self, config: FaultToleranceConfig, log: Log) -> None:
        self.config = config
        self.log = log
        self.grace = float(os.environ.get("FT_SHUTDOWN_TIMEOUT") or GRACE_SECONDS)
        launcher = int(os.environ.get("FT_LAUNCHER_PID") or os.getppid())
        self.report = Report(rank_number(), attempt_number(), host_name(), launcher, os.getpid())
        self.report.oom_kills = -oom_kills()
        self.pid = 0  # the rank's
        self.inbox = Inbox()
        self.stacks = Stacks()
        self.writer = Writer(log)
        learned = json.loads(os.environ.get("FT_LEARNED") or "null")
        self.clocks = Clocks(config, time.monotonic(), learned)
        self.warned: set[str] = set()  # of these clocks, at half of their time
        self.written = -math.inf  # when the report was, monotonic
        self.kill_at = math.inf  # monotonic, once the rank is being ended
        self.flag: tuple[str, str] | None = None  # path and text, once training is complete

    def run(self, command: Sequence[str]) -> int:
        """Start the rank, stay until it has ended, and return its exit code, or -N for signal N.

        127 or 126, as from a shell, when its command cannot be started.
        """
        hold_signals()
        process_control(PR_SET_CHILD_SUBREAPER, 1)  # whatever leaves the rank's session stays ours
        self._start(command)
        process_control(PR_SET_PDEATHSIG, PARENT_DIED)
        if os.getppid() != self.report.launcher_pid:  # it died before, and no signal will come
            os.kill(os.getpid(), PARENT_DIED)
        while self.report.status is None and time.monotonic() < self.kill_at + REAP_SECONDS:
            if time.monotonic() >= self.written + REPORT_SECONDS:
                self._write_report()
            self._turn()
        return self._finish()

    def _start(self, command: Sequence[str]) -> None:
        environment = {
            "PYTHONFAULTHANDLER": "1",  # a rank that crashes in C code leaves its stack
            "TORCH_FR_DUMP_TEMP_FILE": evidence_path("nccl_"),  # of NCCL's flight recorder
            **os.environ,
            "FT_CONFIG": self.config.to_json(),
            "FT_MONITOR_PID": str(os.getpid()),
            "FT_MONITOR_FD": str(self.inbox.write_end),
            "FT_STACKS_FD": str(self.stacks.descriptor),
        }
        for name in ("FT_LEARNED", "FT_LAUNCHER_PID"):
            environment.pop(name, None)  # which a monitor below the rank would take for its own
        self.report.started = time.time()
        self.pid = self.report.pid = os.fork()
        if self.pid == 0:
            become_rank(list(command), environment)
        self.log.prefix += f" (pid {self.pid})"

    def _turn(self) -> None:
        """Sleep until there may be something to do, and do it."""
        now = time.monotonic()
        wake_at = min(self._wake_at(), now + READ_SECONDS)
        arrived = signal.sigtimedwait(TAKEN_SIGNALS, max(0.0, wake_at - now))
        now = time.monotonic()
        if now > wake_at + SUSPENDED_SECONDS and not self.report.reason:
            self.log.warning("woke %.1f s late: suspended", now - wake_at)
            self.clocks.restart(now)
        self.hear(now)
        if arrived:
            self._obey(arrived.si_signo)
        self.report.status = reap(self.pid)
        if self.report.status is None:
            self._act(now)

    # -- what the rank says

    def hear(self, now: float) -> None:
        """Take in what is in the pipe."""
        skipped = self.inbox.skipped
        for message in self.inbox.read():
            # A hung rank that is continued for its stacks may finish what it was at: too late.
            is_late = self.report.end == End.HUNG
            if not is_late:
                self.clocks.hear(message, now)
            if not (is_late and message["type"] == "heartbeat"):
                self._note(message, time.time() - (now - self.clocks.heard))
        if self.inbox.skipped and not skipped:
            self.log.warning("skipping what is no message on its pipe")

    def _note(self, message: Mapping[str, Any], at: float) -> None:
        """Let the report tell of a message; `at` is since the epoch."""
        report, kind = self.report, message["type"]
        if kind == "init":
            report.connected, report.error, report.error_time = at, None, None
            report.calculate, report.state_file = message["calculate"], message["state_file"]
            if message["pid"] in descendants(os.getpid()):
                report.pid = message["pid"]
            report.over, self.flag = False, None  # one more fit: its end will tell
        elif kind == "heartbeat":
            report.heartbeat = at
            report.step = report.step if message["step"] is None else message["step"]
            if report.first_heartbeat is None:
                report.first_heartbeat, report.first_step = at, report.step
        elif kind == "saved":
            report.saved = message["step"]
            values = {name: message[name] for name in ("step", "checkpoint")}
            self.writer.put(os.path.abspath(progress_file()), to_text(values))
        elif kind == "request":
            report.request = {"action": message["action"], "reason": message["reason"]}
        elif kind == "complete":
            self.flag = message["flag"] and (message["flag"], to_text(message["values"]))
        elif kind in ("error", "bye"):
            report.over = kind == "bye"
            if message["error"] is not None:
                report.error, report.error_time = message["error"], report.error_time or at

    # -- what is done to it

    def _rank(self) -> int:
        """The process that connected: with a wrapper, it descends from the one that we started."""
        pid = self.report.pid or self.pid
        return pid if pid == self.pid or pid in descendants(os.getpid()) else self.pid

    def _obey(self, number: int) -> None:
        launcher, patience = self.report.launcher_pid, self.config.workers_stop_timeout
        is_stopped_next = not signal.sigpending().isdisjoint(STOP_SIGNALS)
        if number == signal.SIGINT and self.report.reason:  # Ctrl-C again
            self.kill_at = min(self.kill_at, time.monotonic())
        if number in STOP_SIGNALS:
            reason = f"stopped by {signal.Signals(number).name}"
            number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            self._end(End.STOPPED, reason, number, self.grace)
        elif number in USER_SIGNALS:
            send(self._rank(), number)
        elif number == PEER_FAILED and not is_stopped_next:  # whose grace is to win
            self._end(End.PEER_FAILED, "its peer failed", 0, patience)
        # Also sent when only the launcher's thread that started us ends: hence the look.
        elif number == PARENT_DIED and os.getppid() != launcher:
            self._end(End.LAUNCHER_DIED, f"the launcher (pid {launcher}) is gone", 0, patience)

    def _end(self, end: End, reason: str, number: int, seconds: float) -> None:
        """Begin to end the rank: by a signal, 0 for none, and by SIGKILL some seconds later.

        Once: only Ctrl-C again cuts its grace short.
        """
        if self.report.reason:
            return
        self.report.end, self.report.reason = end, reason
        self.kill_at = time.monotonic() + seconds
        rank = self._rank()
        if end == End.STOPPED:  # not its DataLoader workers, without which it would fail
            send(rank, number)
        else:
            self.report.state = process_status(rank, "State")[:1]
            self.report.stacks = self.stacks.take(rank, reason, is_ending=True)
            send(self.pid, number, os.killpg)
        send(self.pid, signal.SIGCONT, os.killpg)  # a stopped process takes no other signal

    def _wake_at(self) -> float:
        """When the first clock, or half of its time, runs out; monotonic."""
        if self.report.reason:
            return math.inf
        clock, deadline = self.clocks.first()
        since = self.clocks.running.get(clock, math.inf)
        return deadline if clock in self.warned else (since + deadline) / 2

    def _act(self, now: float) -> None:
        # A survivor can only wait for who is gone, unless it is saving a checkpoint.
        is_survivor = self.report.end in (End.PEER_FAILED, End.LAUNCHER_DIED)
        if is_survivor and CHECKPOINTING not in self.clocks.sections:
            self.kill_at = min(self.kill_at, now)
        if now >= self.kill_at:
            send(self.pid, signal.SIGKILL, os.killpg)
        if self.report.reason:
            return
        clock, deadline = self.clocks.first()
        if now >= deadline:
            reason = f"hung: {self._waiting(now)}"
            self.report.hung_on = clock
            self.report.waited = round(now - self.clocks.running[clock], 3)
            number = signal.Signals[self.config.rank_termination_signal]
            self._end(End.HUNG, reason, number, TERMINATION_SECONDS)
            self.log.warning("%s; sent %s", reason, number.name)
        elif now >= self._wake_at():
            self.warned.add(clock)
            what = self._waiting(now)
            taken = self.stacks.take(self._rank(), what, until=deadline)
            self.log.warning("%s%s", what, "; its stacks are kept" if taken else "")

    def _waiting(self, now: float) -> str:
        """Such as: no heartbeat for 3.1 s at step 80 (limit 4 s, --ft-rank-heartbeat-timeout)."""
        clock, deadline = self.clocks.first()
        if not clock:
            return "not watched now"
        section, since = section_of(clock), self.clocks.running[clock]
        what = AWAITED.get(clock) or f"in section {section!r}"
        step = "" if self.report.step is None else f" at step {self.report.step}"
        flag = f"rank-section-timeouts={section}:SECONDS" if section else clock.replace("_", "-")
        kind, configured = "limit", self.clocks.configured.get(clock, math.inf)
        if self.clocks.is_learned(clock):
            kind = "learned limit"
            flag = "min-timeout" if configured >= self.config.min_timeout else flag
        what = f"{what} for {now - since:.1f} s{step}"
        limit = deadline - since
        return f"{what} ({kind} {limit:g} s, --ft-{flag})" if limit < math.inf else what

    def _finish(self) -> int:
        """The rank is gone, or given up: clear up after it, and return its status."""
        report = self.report
        report.ended = time.time()
        if left := kill_descendants():
            self.log.error("%s do not end after SIGKILL", left)
        self.hear(time.monotonic())  # its last words
        report.oom_kills += oom_kills()
        if report.status is None:
            report.status = -signal.SIGKILL
        if not report.reason:
            report.end = End.BY_ITSELF
        if report.over and report.status == 0:
            report.error = None  # the script has handled it
        # The exit code is the script's word; a signal after its end cuts short what hangs then.
        was_well = report.over and report.error is None and report.status < 0
        if self.flag and (report.status == 0 or was_well):
            self.writer.put(*self.flag)
        self._write_report()
        self.writer.finish(FLAG_SECONDS if self.flag else FILE_SECONDS)
        return report.status

    def _write_report(self) -> None:
        report, clocks = self.report, self.clocks
        self.written = time.monotonic()
        report.sections = clocks.sections
        report.longest, report.limits = clocks.longest, clocks.limits()
        before, report.learned = report.learned, [x for x in report.limits if clocks.is_learned(x)]
        is_news = HEARTBEAT in {*report.learned} - {*before}
        if is_news and report.rank == 0 and not (report.reason or report.ended):
            floor, limits = self.config.min_timeout, report.limits
            others = [x for x in report.learned if limits[x] != floor]
            told = "".join(f", {section_of(x) or x} {limits[x]:g} s" for x in others)
            self.log.info("limits learned so far: in general %g s%s", floor, told)
        report.waiting = self._waiting(self.written)
        self.writer.put(evidence_path("json"), to_text(dataclasses.asdict(report)))
        if self.stacks.text:
            self.writer.put(evidence_path("stacks.txt"), self.stacks.text)


class Stacks:
    """What a rank writes of its stacks, in memory: no file system is in the way of a kill."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ft_stacks") if hasattr(os, "memfd_create") else -1
        self.text = ""  # all that it wrote, each time below a header

    def take(
        self, pid: int, why: str, is_ending: bool = False, until: float = math.inf
    ) -> bool | None:
        """Ask for the stacks and wait, but not for long: a process in D state writes none.

        Returns whether they came; None where the process would not know the signal.
        """
        caught = int(process_status(pid, "SigCgt") or "0", 16)
        if self.descriptor < 0 or not caught >> (STACKS_SIGNAL - 1) & 1:
            return None
        self.text += f"\n{STACKS_HEADER} {time.time():.6f} ({time.strftime('%H:%M:%S')}) {why}\n"
        start = size = os.fstat(self.descriptor).st_size
        send_to_main_thread(pid, STACKS_SIGNAL)
        if is_ending:
            send(pid, signal.SIGCONT)  # a stopped process does not answer
        until = min(until, time.monotonic() + STACKS_SECONDS)
        while time.monotonic() < until:
            time.sleep(0.0005)  # they are written in one go, mostly quicker than this
            before, size = size, os.fstat(self.descriptor).st_size
            if size == before > start or process_status(pid, "State")[:1] in "ZX":
                break  # or it has ended meanwhile, as survivors do that hear of a peer's end
        self.text += os.pread(self.descriptor, size - start, start).decode(errors="replace")
        return size > start


def hold_signals() -> None:
    """Let signals wait until they are taken, but for those that nohup ignores."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would lose exit statuses
    ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, {*TAKEN_SIGNALS} - {*ignored})


def become_rank(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """In the child: a session of its own, which ends with the monitor, and then the command."""
    try:
        os.setsid()  # one kill reaches DataLoader workers too, which outlive it by seconds
        process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
        if str(os.getppid()) != environment["FT_MONITOR_PID"]:  # it died before the request
            os._exit(1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        ignore(USER_SIGNALS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN_SIGNALS)
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"[ft_monitor] cannot start {command[0]!r}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def reap(rank: int) -> int | None:
    """Take in all children that have ended; return the status of the rank if it has."""
    status = None
    try:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == rank:
                status = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        pass  # no child is left
    return status


def end_like(status: int) -> NoReturn:
    """End this process as the rank did: by its exit code or signal, without a core dump of ours."""
    if status < 0:
        process_control(PR_SET_DUMPABLE, 0)
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        os.kill(os.getpid(), -status)
    os._exit(128 - status if status < 0 else status)  # PID 1 of a container outlives its signals


# ----------------------------------------------------------------- what can be said of reports

# For re.match: what c10d, gloo and NCCL raise when a peer is gone or does not come. What a
# DataLoader worker raised is a RuntimeError that was "Caught".
COMMUNICATION_ERROR = (
    r"(?i)Dist\w*Error\b|RuntimeError: (?!Caught ).*(gloo|nccl|c10d|TCPStore|ProcessGroup|"
    r"monitoredBarrier|connectFullMesh|Socket Timeout|closed by peer)"
)
# For re.search: what may go away by itself, and is not the code's fault.
INFRASTRUCTURE_ERROR = (
    rf"{COMMUNICATION_ERROR}|\b(connection(\w*error)?|\w*timeout(error)?|timed? out|broken pipe|"
    r"CUDA (error|driver|GPUs)|cudaGet\w*|CUDNN\w*|NVIDIA driver|ECC|Input/output|Stale file|"
    r"No space|quota|Transport endpoint|Cannot allocate|(Service|temporarily) unavailable|"
    r"Bad Gateway|Server Error|Bus error|hung|SIGKILL)\b"
)
# What waits for other ranks: a file, a function, or a call of C code, which has no frame.
WAITING = (
    r"/torch/distributed/|/torch/nn/parallel/|_engine_run_backward|"
    r"\.(wait|synchronize|item|tolist|cpu)\("
)
OF_OTHERS = "this node's ranks wait for another node's: see the verdict of that node's launcher"
MAX_PLACES = 5  # in a verdict


class Outcome(str, enum.Enum):
    """How an attempt ended."""

    WELL = "ended well"
    FAILED = "failed"
    STOPPED = "stopped by a signal"
    ELSEWHERE = "another node's workers failed, or nodes joined"


@dataclasses.dataclass
class Incident:
    """How an attempt ended: a line of incidents.jsonl. Times are since the epoch."""

    attempt: int
    start: float
    end: float
    outcome: Outcome
    first_heartbeat: Seconds
    last_heartbeat: Seconds  # of the rank that was silent first
    first_step: int | None
    last_step: int | None
    saved_step: int | None
    connected: bool
    requests: list[dict[str, str]]
    why: str
    suspect: int | None = None
    host: str = ""  # the suspect's
    error: str | None = None  # the suspect's
    places: str = ""

    def __post_init__(self) -> None:
        self.outcome = Outcome(self.outcome)


def read_reports(directory: Path) -> list[Report]:
    """The reports of an attempt, by rank; one that cannot be read costs a line."""
    reports = []
    for path in directory.glob("rank*.json"):
        try:
            reports.append(Report.read(path))
        except (OSError, ValueError) as error:
            warn(f"cannot read the report {path}: {error}")
    return sorted(reports, key=lambda report: report.rank)


def read_place(directory: Path, report: Report) -> tuple[str, bool]:
    """From the last stacks of a rank since it was heard of."""
    import linecache
    import re

    stacks = read_kernel(directory / f"rank{report.rank}.stacks.txt").decode(errors="replace")
    heard = max(report.heartbeat or 0.0, report.error_time or 0.0)
    frames: list[tuple[str, str, str]] = []  # file, line, function; innermost first
    for dump in stacks.split(f"\n{STACKS_HEADER} ")[1:]:
        stamp = re.match(r"\d+\.\d+ ", dump)
        main = dump[dump.rfind("hread 0x") :]  # faulthandler writes the main thread last
        if stamp and float(stamp[0]) >= heard:
            frames = re.findall(r'File "(.+)", line (\d{1,9}) in (.+)', main) or frames
    if not frames:
        is_silent = report.stacks is False and report.error is None
        return f"without stacks (state {report.state})" * is_silent, False
    file, line, function = next((x for x in frames if not is_library(x[0])), frames[-1])
    text = f"at {os.path.basename(file)}:{line} in {function}"
    file, line, leaf = frames[0]
    text += f" -> {leaf}" * (leaf != function)
    linecache.checkcache(file)  # it may have been edited
    code = linecache.getline(file, int(line))
    waits = bool(re.search(WAITING, f"{file} {leaf} {code}"))
    return "waiting " * waits + text, waits


def without_place(error: str | None) -> str:
    """An error without its file and function, whose names say nothing of its kind."""
    import re

    return re.sub(r" \([^()]*:\d+ in [^()]*\)$", "", error or "")


def raised_by_itself(report: Report) -> bool:
    """Whether a rank raised an error, and not because a peer was gone."""
    import re

    error = without_place(report.error)
    return error != "" and not re.match(COMMUNICATION_ERROR, error)


def failed_by_itself(report: Report) -> bool:
    """Whether a rank raised, crashed, was stopped or lost its monitor, without a peer as cause."""
    if report.error is not None:
        return raised_by_itself(report)
    has_ended = report.end in (End.RUNNING, End.BY_ITSELF, End.STOPPED) and report.status != 0
    return has_ended or report.state == "T"  # suspended, as by a debugger


def judge(reports: Sequence[Report], world: int) -> tuple[Report | None, str]:
    """The rank to blame, or None if it is on another node, and the verdict."""
    if not reports:
        return None, "its workers failed, and there is no report of how"
    waiting = {report.rank for report in reports if report.waits or report.error is not None}
    crowd = collections.Counter(report.place for report in reports)
    newest = max(report.heartbeat or 0.0 for report in reports)

    def blame(report: Report) -> tuple[float, ...]:
        is_cause = failed_by_itself(report)
        return (
            not is_cause,  # first who failed by itself: others did, or waited, because of it
            is_cause and (report.error_time or report.ended or 0.0),  # who failed first
            report.rank in waiting,  # who was waited for
            report.status == 0,  # who did not end well: only those who wait miss who did
            -1 if report.step is None else report.step,  # who fell behind
            bool(report.connected),  # who did not get as far
            int((report.heartbeat or 0.0) - newest),  # who was silent longest, in whole seconds
            crowd[report.place],  # the odd one out
            report.end != End.HUNG,  # who was ended for that, before others complained
            report.error_time or math.inf,  # who complained first
        )

    first, *others = sorted(reports, key=blame)
    has_hosts = len({report.host for report in reports}) > 1
    verdict = describe_failure(first, has_hosts)
    if failed_by_itself(first):
        return first, verdict
    # What others noticed; and the hang that ended it, if the suspect is another rank.
    told = [x for x in others if x.error is not None or x.end == End.HUNG != first.end]
    for report in told[:1]:
        verdict += f"; {describe_failure(report, has_hosts)}"
    are_all_here = len(reports) >= world
    if first.rank in waiting and not are_all_here:
        return None, f"{OF_OTHERS}; {verdict}"
    return first, verdict if are_all_here and not others else f"suspect: {verdict}"


# What was wrong with a rank: the first row that is true of its report.
FAILURES: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda r: r.end == End.LOST, "was lost with its node"),
    (lambda r: r.error is not None, "failed: {error}"),
    (lambda r: r.status is None, "ended with its monitor (pid {monitor_pid}), which was killed"),
    (lambda r: r.end in (End.HUNG, End.STOPPED), "{reason}"),
    (lambda r: r.end not in (End.RUNNING, End.BY_ITSELF), "did not go on: {waiting}"),
    (lambda r: r.status == 0, "ended with exit code 0, while others went on"),
    (lambda r: r.status > 0, "ended with exit code {status}"),
    (lambda r: r.status != -signal.SIGKILL, "ended by {signal}"),
    (lambda r: r.oom_kills > 0, "ended by SIGKILL: out of memory, such kills here: {oom_kills}"),
    (lambda r: True, "ended by SIGKILL, which nobody here sent"),
)


def describe_failure(report: Report, has_hosts: bool = False) -> str:
    who = f"pid {report.pid}" if report.pid else f"its monitor's pid {report.monitor_pid}"
    if report.end == End.LOST:
        who = report.host
    elif has_hosts:
        who = f"{report.host}, {who}"
    signals = {-number: number.name for number in signal.Signals}
    words = next(words for is_true, words in FAILURES if is_true(report)).format(
        **vars(report),
        signal=signals.get(report.status or 0, f"signal {abs(report.status or 0)}"),
    )
    return f"rank {report.rank} ({who}) {words}"


def describe_places(suspect: int | None, reports: Sequence[Report]) -> str:
    """In one line, the suspect first."""
    import reprlib

    groups: dict[str, list[int]] = {}
    for report in reports:
        if report.place:
            groups.setdefault(report.place, []).append(report.rank)
    ordered = sorted(groups.items(), key=lambda group: (suspect not in group[1], -len(group[1])))
    parts = [
        f"rank{'s' * (len(ranks) > 1)} {reprlib.repr(ranks)[1:-1]} {text}"
        for text, ranks in ordered
    ]
    if len(parts) > MAX_PLACES:
        parts[MAX_PLACES:] = [f"{len(parts) - MAX_PLACES} more places"]
    return "; ".join(parts)


def make_incident(
    attempt: int, start: float, outcome: Outcome, reports: Sequence[Report], world: int
) -> Incident:
    def known(name: str) -> list[Any]:
        return [x for report in reports if (x := getattr(report, name)) is not None]

    incident = Incident(
        attempt=attempt,
        start=start,
        end=max(known("ended"), default=time.time()),
        outcome=outcome,
        first_heartbeat=min(known("first_heartbeat"), default=None),
        last_heartbeat=min(known("heartbeat"), default=None),
        first_step=min(known("first_step"), default=None),
        last_step=max(known("step"), default=None),
        saved_step=max(known("saved"), default=None),
        connected=bool(known("connected")),
        requests=known("request"),
        why=outcome.value,
    )
    if outcome == Outcome.FAILED:
        suspect, incident.why = judge(reports, world)
        if suspect:
            incident.suspect, incident.error = suspect.rank, suspect.error
            incident.host = suspect.host
        incident.places = describe_places(incident.suspect, reports)
    return incident


def read_incidents(run_dir: Path) -> list[Incident]:
    path = run_dir / "incidents.jsonl"
    incidents = []
    for line in read_kernel(path).splitlines():
        try:
            incidents.append(Incident(**json.loads(line)))
        except BROKEN:
            warn(f"skipped a line of {path} that tells of no attempt")
    return incidents


def duration(seconds: float) -> str:
    """8.1 s; 0:14:31."""
    import datetime

    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def explain(incident: Incident, evidence: str, what_next: str) -> str:
    """Who, where, and what happens next."""
    ran = duration(incident.end - incident.start)
    step = "" if incident.last_step is None else f" at step {incident.last_step}"
    lines = [f"attempt {incident.attempt} ended after {ran}{step}: {incident.why}"]
    if incident.places:
        lines.append(f"  {incident.places}")
    return "\n".join([*lines, f"  evidence: {evidence}; {what_next}"])


def time_spent(incidents: Sequence[Incident]) -> tuple[float, float, float]:
    """Seconds in all, in steps that count, and in steps that were repeated or never saved."""
    total = incidents[-1].end - incidents[0].start if incidents else 0.0
    training = [(x.last_heartbeat or 0.0) - (x.first_heartbeat or 0.0) for x in incidents]
    counted = sum(x * kept_share(incidents[n:]) for n, x in enumerate(training))
    return total, counted, sum(training) - counted


def kept_share(incidents: Sequence[Incident]) -> float:
    """Which share of the first one's steps later ones did not repeat, or else was saved."""
    this, *later = incidents
    is_well = this.outcome == Outcome.WELL
    begin, end = this.first_step or 0, this.last_step or 0
    if end == begin:
        return float(is_well)
    resumed = [incident.first_step for incident in later if incident.first_step is not None]
    kept = min([end, *(resumed or [end if is_well else this.saved_step or 0])])
    return max(kept - begin, 0) / (end - begin)


def render_report(incidents: Sequence[Incident], newest: str = "") -> str:
    """What became of each attempt, and where the time went; `newest`: the directory of the last."""
    import textwrap

    wrap = functools.partial(textwrap.wrap, width=100, subsequent_indent=" " * 9)
    row = "{:>7}  {:<8}  {:>15}  {:>15}  {:>7}  {}"
    lines = [row.format("attempt", "started", "ran", "steps", "saved", "why it ended")]
    for this in incidents:
        started = time.strftime("%H:%M:%S", time.localtime(this.start))
        steps = "none" if this.last_step is None else f"{this.first_step}-{this.last_step}"
        ran, saved = duration(this.end - this.start), this.saved_step or "-"
        text = row.format(this.attempt, started, ran, steps, saved, this.why)
        lines += wrap(text) + wrap(" " * 9 + this.places)
    if newest and newest not in [f"attempt_{this.attempt}" for this in incidents]:
        lines.append(f"{newest} still runs, or was killed with its launcher: see --ft-status")
    total, counted, repeated = time_spent(incidents)
    share, rest = 100 * counted / (total or 1.0), duration(total - counted - repeated)
    text = f"{duration(counted)} of {duration(total)} wall time in steps that counted"
    lost = (
        f"{duration(repeated)} in steps repeated or unsaved, {rest} in set-up, hangs and restarts"
    )
    return "\n".join([*lines, f"goodput {share:.1f} %: {text}", f"lost: {lost}"])


def render_status(reports: Sequence[Report], now: float) -> str:
    """For each rank the age of its last heartbeat, and what it is waited for."""
    row = "{:>4}  {!s:>8}  {!s:>10}  {:>9}  {}"
    lines = [row.format("rank", "pid", "step", "heartbeat", "state")]
    for report in reports:
        state = report.waiting
        if report.ended:
            state = report.reason or f"ended with status {report.status}"
        elif report.host == host_name() and not os.path.exists(f"/proc/{report.monitor_pid}"):
            state = "gone"
        age = f"{now - report.heartbeat:.1f} s" if report.heartbeat else "-"
        lines.append(row.format(report.rank, report.pid, report.step, age, state))
    return "\n".join(lines)


def find_run_dir(path: Path) -> Path:
    """The run of `path`, or below it: one that is alive, or that has started workers last.

    Raises ConfigError.
    """
    places = (path, path.parent, *path.glob("*"))
    links = [place / "latest" for place in places if (place / "latest").is_symlink()]
    if not links:
        remedy = "give the directory that ft_launcher prints as evidence"
        raise ConfigError(f"no run found in {str(path)!r}: {remedy}")
    return max(links, key=lambda link: (is_alive(link.parent), link.lstat().st_mtime)).parent


def is_alive(run_dir: Path) -> bool:
    """Whether its launcher, whose pid ends its name, may still run."""
    return os.path.exists(f"/proc/{run_dir.name.rpartition('_')[2]}")


def asks_to_look(argv: Sequence[str]) -> bool:
    """Whether show() is meant: its flag comes first."""
    flag = "".join(argv[:1]).partition("=")[0].replace("_", "-")
    return flag in ("--ft-status", "--ft-report")


def show(argv: Sequence[str]) -> int:
    """Answer --ft-status [RUN_DIR] or --ft-report [RUN_DIR], and return the exit code."""
    from pathlib import Path

    flag, *words = [*argv[0].split("=", 1), *argv[1:]]
    path = words.pop(0) if words else os.environ.get("PET_FT_RUN_DIR", default_run_dir())
    try:
        if words:
            raise ConfigError(f"unexpected {words[0]!r}, expected {flag} [RUN_DIR]")
        run_dir = find_run_dir(Path(path))
        if flag.endswith("status"):
            text = render_status(read_reports(run_dir / "latest"), time.time())
        else:
            text = render_report(read_incidents(run_dir), os.readlink(run_dir / "latest"))
        print(f"{run_dir}\n{text}", flush=True)
    except BrokenPipeError:  # its reader has ended, as head does; what is left is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, *BROKEN) as error:
        print(f"ft_launcher.py: error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------ main


def monitor_command() -> list[str]:
    """How to start a monitor; -- and the rank's command line follow.

    -I -S: quick to start, and nothing of the user's replaces a standard module. As a module, it is
    not compiled each time.
    """
    call = "import sys; sys.path.append(sys.argv.pop(1)); import ft_monitor; ft_monitor.main()"
    here = os.path.dirname(os.path.realpath(__file__))
    return [sys.executable, "-I", "-S", "-c", call, here]


def parse_arguments(argv: Sequence[str]) -> tuple[Sequence[str], FaultToleranceConfig]:
    """The rank's command, and the settings."""
    if argv[:1] == ["--"] and argv[1:]:  # the launcher's way, which needs no argparse
        return argv[1:], FaultToleranceConfig.load()
    import argparse

    usage, about = "ft_monitor.py [options] -- COMMAND ...", "Kills a command when it hangs."
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False)
    FaultToleranceConfig.add_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command: give the rank's command line after --")
    try:
        return command, FaultToleranceConfig.from_args(args)
    except ConfigError as error:
        parser.error(str(error))


def launch() -> None:
    """The command ft_launcher; it looks at runs without importing torch."""
    import runpy

    runpy.run_module("ft_launcher", run_name="__main__", alter_sys=True)


def main() -> NoReturn:
    command, config = parse_arguments(sys.argv[1:])
    if not os.environ.get("FT_RUN_DIR"):
        os.environ["FT_RUN_DIR"] = os.path.join(default_run_dir(), f"monitor_{os.getpid()}")
    log = Log(f"ft_monitor attempt {attempt_number()} rank {rank_number()}")
    end_like(RankMonitor(config, log).run(command))


if __name__ == "__main__":
    main()
