#!/usr/bin/env python3
"""The rank monitor: starts one rank, hears its heartbeats over a pipe, and kills it when it hangs.

    python ft_monitor.py --ft-rank-heartbeat-timeout 60 -- python -u train.py

A rank that hangs cannot say so. So each gets a parent, as `tini` is a container's, that knows how
long each thing may take, ends with the rank's own exit status, and leaves no process behind.
ft_launcher.py starts one for each rank; alone it works under any launcher (`srun python
ft_monitor.py ...`). `RankMonitorClient` is the rank's end of the pipe. Standard library only.

Environment
    variable             set by    read by          meaning
    FT_CONFIG            launcher  monitor, client  the configuration as JSON
    FT_LEARNED           launcher  monitor          what earlier attempts have learned, as JSON
    FT_RUN_DIR           launcher  monitor, client  directory of reports and stacks
    FT_ATTEMPT           launcher  monitor, client  0, 1, 2 ...: how often workers were started
    FT_LAUNCHER_PID      launcher  monitor          whose death ends the rank; else the parent's
    FT_SHUTDOWN_TIMEOUT  launcher  monitor          seconds that a stopped rank has to end
    FT_MONITOR_PID       monitor   client           process of the monitor
    FT_MONITOR_FD        monitor   client           its file descriptor for the pipe's write end
    FT_STACKS_FD         monitor   client           its file descriptor for stacks, in memory
    RANK                 launcher  monitor, client  the rank's number; else SLURM_PROCID; else 0

Messages: one JSON object a line, at most 4,096 bytes, from the rank to the monitor only. Each has
its `type` and `time`: the monitor need not wake for each, and a late look measures right.
    type       fields                 meaning
    init       calculate, state_file  connected; are limits learned, and where are they kept?
    heartbeat  step                   alive, with so many batches done, or null
    section    name, open             entered (true) or left (false) a named section
    learned    longest                earlier runs' seconds by clock: learn from these
    calculate  clock                  learn the limit of this clock
    saved      step, checkpoint       it is safely on disk; noted in progress.json in FT_RUN_DIR
                                      and, under autoresume.sh, in FLAG.progress
    request    action, reason         workload control, when this attempt ends
    complete   flag, values           training is: create the flag if the script ends well
    error      error                  an exception that the script may yet handle
    shutdown                          monitoring rests until the next init, or bye
    bye        error                  the main thread has ended, well (null) or with this error

Clocks: an idle one, or one for each open section; the first that runs out decides. Its limit is
what was configured; or, if limits are learned, the longest time survived times safety_factor, at
least min_timeout (from 16 heartbeats on, a section once left); else, if any limit is configured or
learned, unknown_timeout.
    clock                           runs from                to
    startup_timeout                 process start            init
    initial_rank_heartbeat_timeout  init                     first heartbeat or section
    rank_heartbeat_timeout          heartbeat, or the end    next heartbeat or section
                                    of the last section
    rank_section_timeouts[name]     section entered          section left
    rank_out_of_section_timeout     end of the last section  next section or, unless it is
                                                             configured, heartbeat
    exit_timeout                    bye                      process end

How a rank is ended
    half of a clock passed            a warning and its stacks; nothing is ended
    a clock ran out                   stacks, termination signal to its processes, SIGKILL after 5 s
    SIGTERM, SIGINT, SIGHUP, SIGQUIT  passed on to the rank; SIGKILL after the shutdown timeout,
                                      or at a SIGINT on top
    SIGABRT (a peer failed), or the   stacks, SIGKILL; a checkpoint that is being saved may be
    launcher died                     finished, within workers_stop_timeout
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
import select
import signal
import sys
import threading
import time

# A monitor is one more process for each rank: what only a rank or a reader needs is imported there.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write of this size is whole or fails
MIN_HEARTBEATS = 16  # before the limit of heartbeats is learned
FADE = 0.8  # what was learned fades by this from run to run, and outliers with it
HALF_TIME_WARNINGS = 3  # in one attempt, so that slow training does not fill the log
READ_SECONDS = 0.1  # between looks at the pipe, which takes 1,000 heartbeats in between
REPORT_SECONDS = 1.0  # between reports of a rank that is well
TERMINATION_SECONDS = 5.0  # from the termination signal of a hung rank to SIGKILL
REAP_SECONDS = 10.0  # from SIGKILL to giving up on a process that the kernel does not end
SUSPENDED_SECONDS = 5.0  # a monitor that wakes later than this was suspended, and its rank too
STACKS_SECONDS = 1.0  # how long a rank may take to write its stacks; 1 ms is usual
FILE_SECONDS = 5.0  # how long a file system may take to answer
FLAG_SECONDS = 30.0  # how long for the finished flag
LOG_SECONDS = 0.5  # how long for a line of the log
UNKNOWN_SECONDS = 1800.0  # default of unknown_timeout
EXIT_SECONDS = 600.0  # unknown_timeout of a process whose script has ended
GRACE_SECONDS = 30.0  # as torchrun's --shutdown-timeout

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36  # of prctl(2)
PARENT_DIED = signal.SIGURG  # from the kernel; ignored by default, so a stray one is harmless
PEER_FAILED = signal.SIGABRT
STACKS_SIGNAL = signal.SIGRTMAX - 7  # of no runtime that we know: Go's is SIGURG, Java's SIGQUIT
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

FLAG_VARIABLE = "FAULT_TOL_FINISHED_FLAG_FILE"
STARTUP, EXIT = "startup_timeout", "exit_timeout"
INITIAL, HEARTBEAT = "initial_rank_heartbeat_timeout", "rank_heartbeat_timeout"
OUT_OF_SECTION = "rank_out_of_section_timeout"
CHECKPOINTING = "checkpointing"  # the section in which a checkpoint is saved
AFTER_TRAINING = "after_training"  # what a script does then: never the same, so never learned
STACKS_HEADER = "==="  # begins the line before each dump of stacks, with its time since the epoch


# What JSON can raise that somebody else has written.
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


# ------------------------------------------------------------------------------- configuration


class ConfigError(ValueError):
    """A setting that cannot be used: the value, what was expected, and the remedy."""


def parse_number(value: Any, least: float = 0.0) -> float:
    """A finite number above 0, and of at least `least`."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (0 < number < math.inf and number >= least):
        expected = f"at least {least:g}" if least else "more than 0"
        raise ConfigError(f"got {value!r}, expected a number of {expected}")
    return number


def parse_seconds(value: Any) -> float | None:
    """A timeout from a number or text; "none" is infinite, None is not configured."""
    if value in (None, math.inf):
        return value
    if str(value).strip().lower() in ("none", "null"):
        return math.inf
    try:
        return parse_number(value)
    except ConfigError as error:
        raise ConfigError(f"{error}, or none") from None


def parse_sections(value: Any) -> dict[str, float]:
    """Timeouts of sections from a mapping, or from text such as "setup:600,step:60"."""
    if isinstance(value, str):
        pairs = [item.rpartition(":")[::2] for item in value.split(",") if item.strip()]
        names = [name.strip() for name, _ in pairs]
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"got {value!r}, expected NAME:SECONDS,..., each name once")
        value = dict(zip(names, (seconds for _, seconds in pairs), strict=True))
    if not isinstance(value, dict):
        raise ConfigError(f"got {value!r}, expected names of sections with their seconds")
    return {name: parse_seconds(x) or math.inf for name, x in value.items()}


def parse_signal(value: Any) -> str:
    """The name of a signal, from its name with or without SIG, or its number."""
    text = str(value).strip().upper()
    for known in signal.Signals:
        if text in (known.name, known.name.removeprefix("SIG"), str(known.value)):
            return known.name
    raise ConfigError(f"got {value!r}, expected a signal, such as SIGKILL or SIGTERM")


def parse_log_level(value: Any) -> str:
    text = str(value).strip().upper()
    numbers = {"10": "DEBUG", "20": "INFO", "30": "WARNING", "40": "ERROR"}  # of logging
    level = numbers.get(text, text)
    if level not in Log.LEVELS:
        raise ConfigError(f"got {value!r}, expected one of {', '.join(Log.LEVELS)}")
    return level


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which a setting that is given twice is an error."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name!r} is given {names.count(name)} times: give it once")
    return dict(pairs)


# How settings of NVIDIA's begin that have no meaning here.
NVIDIAS = (
    *("attribution_", "check_remaining", "checkpoint_iteration", "cycle_info", "enable_", "gpu_"),
    *("ignore_missing", "install_exception", "link_", "log_aggregator", "log_leaf", "log_server"),
    *("max_no_progress", "min_progress", "no_restart", "node_health_check_", "num_warmup", "numa_"),
    *("nvrx_", "pci_topo", "per_cycle", "rdzv_impl", "restart_", "segment", "skip_section"),
    *("storage_", "workload_check"),
)


def is_nvidias(name: str) -> bool:
    """Whether a setting, or its flag, is NVIDIA's and has no meaning here."""
    return name.removeprefix("--ft-").replace("-", "_").startswith(NVIDIAS)


def read_yaml(text: str) -> dict[str, Any]:
    """What plain YAML says, such as NVIDIA's settings: `key: value`, indented in blocks."""
    found: dict[str, Any] = {}
    blocks = [(-1, found)]  # that are open, with their indentation
    for line in text.splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        name, value = key.strip(" '\""), value.strip(" '\"{}")
        if not colon:
            continue
        indent = len(key) - len(key.lstrip())
        while indent <= blocks[-1][0]:
            blocks.pop()
        is_number = value.replace(".", "", 1).isdecimal()
        blocks[-1][1][name] = float(value) if is_number else value or {}
        if not value:
            blocks.append((indent, blocks[-1][1][name]))
    return found


def setting(parse: Callable[[Any], Any], default: Any, meaning: str) -> Any:
    """A field of the configuration: `parse` checks what a flag, a file or a script gives."""
    metadata = {"parse": parse, "meaning": meaning}
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


def timeout(meaning: str) -> Any:
    return setting(parse_seconds, None, f"seconds {meaning}")


@dataclasses.dataclass(frozen=True)
class FaultToleranceConfig:
    """The settings of a job. Names as in NVIDIA's fault_tolerance where it has them.

    Raises ConfigError for a value that cannot be used, wherever it comes from.
    """

    startup_timeout: float | None = timeout("from process start to connection")
    initial_rank_heartbeat_timeout: float | None = timeout("from there to heartbeat or section")
    rank_heartbeat_timeout: float | None = timeout("between heartbeats, outside of sections")
    rank_section_timeouts: Mapping[str, float] = setting(
        parse_sections, {}, "seconds within sections, as setup:600,checkpointing:300"
    )
    rank_out_of_section_timeout: float | None = timeout("between sections, without heartbeats")
    exit_timeout: float | None = timeout("from the script's end to its process's (600)")
    unknown_timeout: float | None = timeout("for what is neither configured nor learned (1800)")
    safety_factor: float = setting(
        lambda value: parse_number(value, 1), 5.0, "a learned limit is the longest time times this"
    )
    min_timeout: float = setting(
        parse_number,
        60.0,
        "no learned limit is shorter, unless the configured one is",
    )
    workers_stop_timeout: float = setting(
        parse_number, 30.0, "seconds that survivors of a failed rank have to finish a checkpoint"
    )
    rank_termination_signal: str = setting(
        parse_signal, "SIGKILL", "what a hung rank is sent; SIGKILL follows after 5 s"
    )
    log_level: str = setting(parse_log_level, "INFO", "of the launcher and the monitors")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["parse"](getattr(self, field.name))
            except ConfigError as error:
                raise ConfigError(f"{field.name}: {error}") from None
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_mapping(cls, values: Any) -> FaultToleranceConfig:
        """Settings by name, as JSON has them; null is never."""
        if not isinstance(values, dict):
            example = '{"rank_heartbeat_timeout": 60}'
            raise ConfigError(f"got {values!r}, expected an object such as {example}")
        ignored = list(filter(is_nvidias, values))
        if ignored:
            warn(f"ignoring settings that have no meaning here: {', '.join(ignored)}")
            values = {name: x for name, x in values.items() if name not in ignored}
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                import difflib

                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(names)}"
                raise ConfigError(f"unknown setting {name!r}; {hint}")
        given: dict[str, Any] = {n: "none" if x is None else x for n, x in values.items()}
        return cls(**given)

    @classmethod
    def from_json_file(cls, path: str) -> FaultToleranceConfig:
        """Read settings from a JSON object, or from its member "fault_tolerance"."""
        text = ""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            values = json.loads(text, object_pairs_hook=once_each)
            if isinstance(values, dict) and isinstance(values.get("fault_tolerance"), dict):
                values = values["fault_tolerance"]
            return cls.from_mapping(values)
        except OSError as error:
            raise ConfigError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{os.fspath(path)!r} is not JSON: {error}{cls._hint(text)}"
            ) from None
        except (ValueError, RecursionError) as error:  # broken JSON, not text, or a ConfigError
            raise ConfigError(f"configuration {os.fspath(path)!r}: {error}") from None

    @classmethod
    def _hint(cls, text: str) -> str:
        """For settings in YAML, the JSON that would do."""
        values = read_yaml(text)
        values = values.get("fault_tolerance") or values
        try:
            cls.from_mapping(values)
        except ConfigError:
            return ""
        return f"; as JSON it is {json.dumps(values)}" if values else ""

    @classmethod
    def from_environment(cls) -> FaultToleranceConfig:
        """The configuration that the launcher handed on; defaults without it."""
        try:
            return cls.from_mapping(json.loads(os.environ.get("FT_CONFIG") or "{}"))
        except ValueError as error:
            raise ConfigError(f"environment variable FT_CONFIG: {error}") from None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FaultToleranceConfig:
        """Flags beat the file of --ft-cfg-path, or FT_CONFIG without one; these the defaults."""
        base = cls.from_json_file(args.ft_cfg_path) if args.ft_cfg_path else cls.from_environment()
        flags = {field.name: getattr(args, f"ft_{field.name}") for field in dataclasses.fields(cls)}
        return dataclasses.replace(base, **{k: v for k, v in flags.items() if v is not None})

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, **options: Any) -> Any:
        """Add --ft-cfg-path and a flag for each setting, in a group, which is returned."""
        group = parser.add_argument_group("fault tolerance", "times in seconds, 'none' for never")
        about = "file with settings; flags beat it"
        names = ("--ft-cfg-path", "--ft_cfg_path")
        group.add_argument(*names, metavar="FILE.json", help=about, **options)
        for field in dataclasses.fields(FaultToleranceConfig):
            default = getattr(FaultToleranceConfig(), field.name)
            about = field.metadata["meaning"] + (f" (default: {default})" if default else "")
            names = (f"--ft-{field.name.replace('_', '-')}", f"--ft_{field.name}")
            group.add_argument(*names, metavar="VALUE", help=about, **options)
        return group

    def configured(self) -> dict[str, Any]:
        """The settings that have a value."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value not in (None, {})}

    def to_json(self) -> str:
        return json.dumps(self.configured())

    def limits(self) -> dict[str, float]:
        """The configured limits in seconds, by clock."""
        names = (STARTUP, INITIAL, HEARTBEAT, OUT_OF_SECTION, EXIT)
        limits = {name: x for name, x in self.configured().items() if name in names}
        sections = self.rank_section_timeouts.items()
        return {**limits, **{section_clock(name): seconds for name, seconds in sections}}

    def is_watching(self) -> bool:
        """Whether any limit is configured; if so, no clock is without one."""
        return any(map(math.isfinite, [*self.limits().values(), self.unknown_timeout or math.inf]))


def section_clock(section: str) -> str:
    """The clock of a section, named as the setting that limits it."""
    return f"rank_section_timeouts[{section}]"


# ------------------------------------------------------------------------------------ messages


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


OPTIONAL_TEXT = (str, type(None))
MESSAGE_FIELDS: dict[str, dict[str, Any]] = {
    "init": {"calculate": bool, "state_file": OPTIONAL_TEXT},
    "heartbeat": {"step": (int, type(None))},
    "section": {"name": str, "open": bool},
    "learned": {"longest": dict},
    "calculate": {"clock": str},
    "saved": {"step": int, "checkpoint": OPTIONAL_TEXT},
    "request": {"action": str, "reason": str},
    "complete": {"flag": OPTIONAL_TEXT, "values": dict},
    "error": {"error": str},
    "shutdown": {},
    "bye": {"error": OPTIONAL_TEXT},
}


def encode_message(kind: str, **fields: Any) -> bytes:
    """One line of JSON, with the time. Of what is too long for a pipe, text is cut."""
    message = {"type": kind, "time": time.monotonic(), **fields}
    while len(line := json.dumps(message, default=str)) >= MAX_MESSAGE_BYTES:
        longest = max(fields, key=lambda name: len(json.dumps(message[name], default=str)))
        text = message[longest]
        message[longest] = text[: len(text) // 2] if isinstance(text, str) else {}
    return line.encode() + b"\n"


def decode_message(line: bytes) -> dict[str, Any] | None:
    """The message in a line, or None for what is not one."""
    try:
        message = json.loads(line) if len(line) < MAX_MESSAGE_BYTES else {}
        fields = MESSAGE_FIELDS[message["type"]]
        message["time"] = parse_number(message["time"])
        if "action" in fields:
            WorkloadAction[message["action"]]
        if "longest" in fields:
            message["longest"] = parse_longest(message["longest"])
        is_right = all(isinstance(message[name], types) for name, types in fields.items())
    except BROKEN:
        return None
    return message if is_right else None


def parse_longest(values: Any) -> dict[str, float]:
    """Seconds by clock. Raises ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"longest: got {values!r}, expected seconds by clock")
    return {str(clock): parse_number(seconds) for clock, seconds in values.items()}


class Inbox:
    """The monitor's end of the pipe: cuts what arrives into messages.

    Messages end with a newline, so after anything that is not one the next line is understood
    again. Both ends stay open here: the pipe outlives whatever a rank does to its descriptors.
    """

    def __init__(self) -> None:
        # What multiprocessing.Pipe(duplex=False) makes; its module would double our memory.
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.skipped = 0  # lines that were not understood
        self._rest = b""  # the beginning of a line whose end has not arrived

    def read(self) -> list[dict[str, Any]]:
        """What has arrived, but not for ever if the rank keeps filling the pipe."""
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
        return [message for message in messages if message is not None]


# -------------------------------------------------------------------------------------- clocks


class Clocks:
    """Which clocks run, what their limits are, and what was learned. No I/O; times in seconds.

    `earlier`: the longest times by clock that earlier attempts and runs have seen.
    """

    def __init__(
        self, config: FaultToleranceConfig, now: float, earlier: Mapping[str, float] | None = None
    ) -> None:
        self.config = config
        self.configured = config.limits()
        self.is_watching = config.is_watching()
        self.heard = now  # time of the last message
        self.running: dict[str, float] = {STARTUP: now}  # and since when
        self.sections: set[str] = set()  # that are open
        self.has_heartbeats = False  # since init
        self.calculate = earlier is not None  # all limits
        self.asked: set[str] = set()  # or the limits of these clocks
        self.earlier = dict(earlier or {})
        self.longest: dict[str, float] = {}  # seconds survived on each clock, in this attempt
        self.state_file: str | None = None  # of this training; another one has other limits
        self.laps = collections.Counter[str]()  # how often each was stopped

    def hear(self, message: Mapping[str, Any], now: float) -> None:
        """Let a message start and stop clocks."""
        self.heard = at = min(max(message["time"], self.heard), now)  # whatever was written
        kind = message["type"]
        if kind == "init":
            if STARTUP not in self.running and message["state_file"] != self.state_file:
                self.earlier, self.longest, self.asked = {}, {}, set()
                self.laps.clear()
            self._stop_all(at)
            self.state_file = message["state_file"]
            self.has_heartbeats, self.calculate = False, message["calculate"]
            self.running[INITIAL] = at
        elif kind == "heartbeat":
            self._hear_heartbeat(at)
        elif kind == "section":
            self._hear_section(message["name"], message["open"], at)
        elif kind == "learned":
            self.asked.update(message["longest"])
            for clock, seconds in message["longest"].items():
                self.earlier[clock] = max(seconds, self.earlier.get(clock, 0.0))
        elif kind == "calculate":
            self.asked.add(message["clock"])
        elif kind in ("shutdown", "bye"):
            self._stop_all(at)
            if kind == "bye":
                self.running[EXIT] = at

    def _hear_heartbeat(self, at: float) -> None:
        self.has_heartbeats = True
        self._stop(INITIAL, at)
        self._stop(HEARTBEAT, at)
        if OUT_OF_SECTION not in self.configured:
            self._stop(OUT_OF_SECTION, at)
        if not self.sections:
            self.running[HEARTBEAT] = at

    def _hear_section(self, name: str, is_open: bool, at: float) -> None:
        if is_open:
            for idle in (INITIAL, HEARTBEAT, OUT_OF_SECTION):
                self._stop(idle, at)
            self.sections.add(name)
            self.running.setdefault(section_clock(name), at)
        elif name in self.sections:
            self._stop(section_clock(name), at)
            self.sections.discard(name)
            if not self.sections and self.has_heartbeats:
                self.running[HEARTBEAT] = at
            if not self.sections and (not self.has_heartbeats or OUT_OF_SECTION in self.configured):
                self.running[OUT_OF_SECTION] = at

    def _stop(self, clock: str, at: float) -> None:
        """Stop a clock if it runs, and learn how long it took."""
        if clock in self.running:
            seconds = round(at - self.running.pop(clock), 3)
            self.longest[clock] = max(seconds, self.longest.get(clock, 0.001))
            self.laps[clock] += 1

    def _stop_all(self, at: float) -> None:
        for clock in list(self.running):
            self._stop(clock, at)
        self.sections.clear()

    def restart(self, now: float) -> None:
        """Start all running clocks again, after a time in which nothing could run."""
        self.heard = now  # what is still in the pipe was sent before
        self.running = dict.fromkeys(self.running, now)

    def is_learned(self, clock: str) -> bool:
        """Whether a clock's limit is learned, and enough was seen for that."""
        if clock in (EXIT, section_clock(AFTER_TRAINING)):
            return False
        is_asked = not self.asked.isdisjoint((clock, clock.partition("[")[0]))
        enough = MIN_HEARTBEATS if clock == HEARTBEAT and not is_asked else 1
        has_seen = clock in self.earlier or self.laps[clock] >= enough
        return (self.calculate or is_asked) and has_seen

    def limit(self, clock: str) -> float:
        """The seconds that a clock may run; infinite for never."""
        config, configured = self.config, self.configured.get(clock)
        longest = max(self.longest.get(clock, 0.0), self.earlier.get(clock, 0.0))
        learned = config.safety_factor * longest
        if self.is_learned(clock):
            return max(learned, min(config.min_timeout, configured or math.inf))
        if configured is not None:
            return configured
        if not (self.is_watching or self.calculate or self.asked):
            return math.inf
        unknown = EXIT_SECONDS if clock == EXIT else UNKNOWN_SECONDS
        return max(learned, config.unknown_timeout or unknown)

    def limits(self) -> dict[str, float]:
        """The finite limits, by clock."""
        names = sorted({*self.configured, *self.running, *self.laps, *self.earlier})
        limits = {name: round(self.limit(name), 3) for name in names}
        return {name: seconds for name, seconds in limits.items() if math.isfinite(seconds)}

    def first(self) -> tuple[str, float]:
        """The clock that runs out first, and when; ("", infinity) where none runs."""
        deadlines = [(since + self.limit(clock), clock) for clock, since in self.running.items()]
        deadline, clock = min(deadlines, default=(math.inf, ""))
        return clock, deadline


# --------------------------------------------------------------------------- reports and state


class End(str, enum.Enum):
    """How a rank came to its end."""

    RUNNING = "running"
    BY_ITSELF = "by itself"
    HUNG = "hung"
    STOPPED = "stopped"  # by a signal to its monitor
    PEER_FAILED = "peer failed"
    LAUNCHER_DIED = "launcher died"


@dataclasses.dataclass
class Report:
    """How a rank does, at most a second old, and how it ended. Times are since the epoch."""

    rank: int
    attempt: int = 0
    host: str = ""
    launcher_pid: int | None = None
    monitor_pid: int | None = None
    pid: int | None = None
    started: float | None = None
    connected: float | None = None
    first_heartbeat: float | None = None
    heartbeat: float | None = None  # the last one
    error_time: float | None = None
    ended: float | None = None
    first_step: int | None = None  # of the first heartbeat
    step: int | None = None  # of the last heartbeat
    saved: int | None = None  # step of the newest checkpoint that this rank has reported
    sections: list[str] = dataclasses.field(default_factory=list)  # that are open
    clock: str | None = None  # that runs out first
    clock_since: float | None = None
    clock_limit: float | None = None  # seconds
    request: dict[str, str] | None = None  # workload control: action, reason
    calculate: bool = False  # whether limits are learned
    state_file: str | None = None  # where what was learned is kept
    longest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by clock
    limits: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by clock
    learned: list[str] = dataclasses.field(default_factory=list)  # clocks with learned limits
    complete: bool = False  # training is, as far as this rank knows
    over: bool = False  # the script's main thread has ended
    error: str | None = None  # the exception that ended it, or went through it
    end: End = End.RUNNING
    reason: str | None = None  # why the monitor ended it
    hung_on: str | None = None  # the clock that ran out
    waited: float | None = None  # seconds on that clock
    state: str | None = None  # of the process before the monitor ended it: R, S, D, T ...
    stacks: bool | None = None  # whether it wrote its stacks then; None: it was not asked
    oom_kills: int = 0  # in its control group, or else on this host, while it ran
    status: int | None = None  # exit code, or -N for signal N

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """Raises OSError, or ValueError for what is no report."""
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            report = cls(**{name: value for name, value in values.items() if name in names})
            report.rank, report.end = int(report.rank), End(report.end)
        except BROKEN as error:
            raise ValueError(f"{path} holds no report: {error!r}") from None
        return report


@dataclasses.dataclass
class State:
    """What runs have learned of how long things take, kept in ft_state.json."""

    longest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by clock
    # By clock, the step at which its limit last ended a rank; forgotten with the first step beyond.
    killed: dict[str, int] = dataclasses.field(default_factory=dict)
    run: str = ""  # the launcher that wrote last

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> State:
        """Empty if there is no file yet. Raises OSError, or ConfigError for what is no state."""
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            killed = {str(clock): int(step) for clock, step in values["killed"].items()}
            return cls(parse_longest(values["longest"]), killed, str(values["run"]))
        except FileNotFoundError:
            return cls()
        except BROKEN as error:
            raise ConfigError(f"{path} holds no state: {error!r}") from None

    def after(self, reports: Sequence[Report], run: str) -> State:
        """This state and what the reports of an attempt add to it.

        What another run has learned fades where this one has seen the same clock. A limit that
        ended ranks twice with no new step in between does not fit: it counts as survived, so that
        the next is longer. A real hang that comes again is only noticed later then.
        """
        fade = 1.0 if run == self.run else FADE
        longest = dict(self.longest)
        seen = [item for report in reports for item in report.longest.items()]
        for clock in {clock for clock, _ in seen}:
            longest[clock] = round(longest.get(clock, 0.0) * fade, 3)
        for clock, seconds in seen:
            longest[clock] = max(seconds, longest[clock])
        highest = max((report.step for report in reports if report.step is not None), default=-1)
        killed = {clock: step for clock, step in self.killed.items() if step >= highest}
        hung = [(r.hung_on, r.waited) for r in reports if r.hung_on and r.waited]
        for clock, waited in hung:
            if clock in killed:
                longest[clock] = max(longest.get(clock, 0.0), waited)
        return State(longest, {**killed, **dict.fromkeys(dict(hung), highest)}, run)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_file(path, to_text({**dataclasses.asdict(self), "time": stamp}, indent=2))


# --------------------------------------------------------------------------- the rank's end


class RankMonitorClientError(RuntimeError):
    """The client was used in a way that cannot work; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class HeartbeatTimeouts:
    """The limits of heartbeats in force, in seconds; None is none. Names as NVIDIA's."""

    initial: float | None
    subsequent: float | None
    were_calculated: bool

    @property
    def are_valid(self) -> bool:
        return None not in (self.initial, self.subsequent)


@dataclasses.dataclass(frozen=True)
class SectionTimeouts:
    """The limits of sections in force, in seconds; None is none. Names as NVIDIA's."""

    section: Mapping[str, float | None]
    out_of_section: float | None
    calculated_sections: frozenset[str]
    is_out_of_section_calculated: bool

    @property
    def were_calculated(self) -> bool:
        return self.is_out_of_section_calculated and self.calculated_sections == set(self.section)

    @property
    def are_valid(self) -> bool:
        return None not in (*self.section.values(), self.out_of_section)


class RankMonitorClient:
    """The rank's end of the pipe to its monitor, for any training loop. Method names as NVIDIA's.

        client = RankMonitorClient()
        client.init_workload_monitoring(calculate_timeouts=True, state_file="ft_state.json")
        for step, batch in enumerate(loader):
            train(batch)
            client.send_heartbeat(step)

    Nothing waits for the monitor: when it does not read, heartbeats are dropped, and all else is
    kept for later. Nothing is measured here: the monitor does that. A copy is a new client.
    """

    def __init__(self) -> None:
        self.is_initialized = False
        self.cfg: FaultToleranceConfig | None = None  # from init_workload_monitoring() on
        self.open_sections: set[str] = set()
        self._pipe = -1  # file descriptor; stays open for the next connection
        self._pid = 0  # of the process that connected; its forks have inherited this object
        self._given: dict[str, float] = {}  # by load_state_dict()
        self._earlier: dict[str, float] = {}  # that, and what is in state_file
        self._lock = threading.RLock()  # threads and signal handlers may have something to say too
        # What must not get lost while a frozen monitor leaves the pipe full.
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=10_000)

    def __reduce__(self) -> Any:
        return RankMonitorClient, ()

    def init_workload_monitoring(
        self,
        num_warmup_iters: int | None = None,
        calculate_timeouts: bool = False,
        state_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Connect to the monitor.

        With `calculate_timeouts`, limits are learned from what this rank does, and kept in
        `state_file` for later runs. `num_warmup_iters` is NVIDIA's, without a meaning here: what
        is slow at first is a section. Raises RankMonitorClientError without a monitor, or when
        connected already.
        """
        if self.is_initialized:
            raise RankMonitorClientError("connected already: call shutdown_workload_monitoring()")
        path = None if state_file is None else os.path.abspath(state_file)
        self.cfg = FaultToleranceConfig.from_environment()
        if self._pid != os.getpid():
            self._pipe, self._pid = connect(), os.getpid()
            self._announce_the_end()
        self.is_initialized = True
        self._send("init", calculate=calculate_timeouts, state_file=path)
        state: Any = State()
        if path and calculate_timeouts:
            state = within(FILE_SECONDS, lambda: State.read(path))
        if isinstance(state, State):
            self._earlier = {**state.longest, **self._given}
        else:
            warn(f"starting without what was learned: {state or f'{path} does not answer'}")
        self._send_earlier()

    def send_heartbeat(self, step: int | None = None) -> None:
        """Say that this rank is alive, with the number of batches done where it is known."""
        if not self.is_initialized:
            raise RankMonitorClientError(NOT_CONNECTED)
        # By hand: json.dumps takes longer than all the rest.
        line = b'{"type": "heartbeat", "time": %.6f, "step": ' % time.monotonic()
        line += b"null}\n" if step is None else b"%d}\n" % step
        if self._unsent:
            self._flush()
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            pass  # the monitor does not read: frozen, or its host overloaded
        except OSError:
            self._reopen()

    def start_section(self, section: str) -> None:
        """Enter a named section. Sections may overlap, but each name can be open only once."""
        if section in self.open_sections:
            raise RankMonitorClientError(f"section {section!r} is open: call end_section() first")
        self._send("section", name=section, open=True)
        self.open_sections.add(section)

    def end_section(self, section: str) -> None:
        """Leave a named section, which must be open."""
        if section not in self.open_sections:
            raise RankMonitorClientError(f"section {section!r} is not open: call start_section()")
        self._send("section", name=section, open=False)
        self.open_sections.discard(section)

    def end_all_sections(self) -> None:
        for section in sorted(self.open_sections):
            self.end_section(section)

    def report_saved(self, step: int, checkpoint: str | os.PathLike[str] | None = None) -> None:
        """Say that the checkpoint of `step` is safely on disk, at this path."""
        self._send("saved", step=int(step), checkpoint=checkpoint and os.fspath(checkpoint))

    def training_complete(self, **values: Any) -> None:
        """Say that training is complete. When the script ends well, the monitor creates the file
        $FAULT_TOL_FINISHED_FLAG_FILE, with these values as JSON."""
        flag = os.environ.get(FLAG_VARIABLE)
        self._send("complete", flag=flag and os.path.abspath(flag), values=values)

    def report_error(self, error: BaseException) -> None:
        """Tell of an exception that may end the script."""
        self._send("error", error=describe_error(error))

    def send_workload_control_request(self, req: WorkloadControlRequest) -> None:
        """Ask the launcher for an action, which it takes when this attempt ends."""
        self._send("request", action=req.action.name, reason=req.description)

    def shutdown_workload_monitoring(self) -> None:
        """Let monitoring rest until the script ends. Without a connection, do nothing."""
        if self.is_initialized:
            self._send("shutdown")
            self.is_initialized = False
            self.open_sections.clear()

    # -- limits, which the monitor learns

    @property
    def hb_timeouts(self) -> HeartbeatTimeouts | None:
        """None before init_workload_monitoring()."""
        if not self.is_initialized:
            return None
        report = self._report()
        limits, learned = report.limits, report.learned
        return HeartbeatTimeouts(limits.get(INITIAL), limits.get(HEARTBEAT), HEARTBEAT in learned)

    @property
    def section_timeouts(self) -> SectionTimeouts | None:
        """None before init_workload_monitoring()."""
        if not self.is_initialized:
            return None
        report = self._report()
        limits, learned = report.limits, report.learned
        sections = {section_of(clock): seconds for clock, seconds in limits.items()}
        sections.pop("", None)
        calculated = frozenset(map(section_of, learned)) - {""}
        outside = limits.get(OUT_OF_SECTION)
        return SectionTimeouts(sections, outside, calculated, OUT_OF_SECTION in learned)

    def calculate_and_set_hb_timeouts(
        self, skip_if_not_ready: bool = False, calc_initial: bool = True
    ) -> bool:
        """Let the limits of heartbeats be learned, as soon as one was seen. Returns True."""
        return self._calculate([HEARTBEAT, *[INITIAL] * calc_initial])

    def calculate_and_set_section_timeouts(
        self,
        selected_sections: Collection[str] | None = None,
        calc_out_of_section: bool = True,
        skip_if_not_ready: bool = False,
    ) -> bool:
        """The same for the limits of sections, by default of all."""
        clocks = ["rank_section_timeouts"]
        if selected_sections is not None:
            clocks = [section_clock(section) for section in selected_sections]
        return self._calculate([*clocks, *[OUT_OF_SECTION] * calc_out_of_section])

    def state_dict(self) -> dict[str, Any]:
        """What a later run can be given by load_state_dict()."""
        return {"longest": State(self._earlier).after([self._report()], "this run").longest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Learn limits from what an earlier run has seen, before or after connecting.

        Raises ConfigError (a ValueError) for a state that is not one.
        """
        if "longest" in state:
            self._given = parse_longest(state["longest"])
            self._earlier = {**self._earlier, **self._given}
        elif state:
            warn("ignoring a state that is not ours, such as NVIDIA's: limits are learned again")
        if self.is_initialized:
            self._send_earlier()

    def _send_earlier(self) -> None:
        for clock, seconds in self._earlier.items():
            self._send("learned", longest={clock: seconds})

    def _calculate(self, clocks: list[str]) -> bool:
        for clock in clocks:  # one each: a message has a limited size
            self._send("calculate", clock=clock)
        return True

    def _report(self) -> Report:
        """What the monitor has written, or would write before it hears of anything."""
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
                        return  # the monitor does not read: training goes on
                    self._reopen()

    def _reopen(self) -> None:
        """The script has closed our descriptor, as daemons close all that they find."""
        try:
            self._pipe = connect()
        except RankMonitorClientError:
            self._unsent.clear()  # the monitor is gone, and the kernel ends this process with it

    def _announce_the_end(self) -> None:
        """Say bye when the main thread ends, also while other threads keep the process alive."""
        import atexit

        def bye() -> None:
            if os.getpid() == self._pid:
                error = getattr(sys, "last_value", None)  # what ended the main thread
                text = None if error is None else describe_error(error)
                self._unsent.append(encode_message("bye", error=text))
                self._flush()

        def wait() -> None:
            threading.main_thread().join()
            bye()

        atexit.register(bye)
        threading.Thread(target=wait, daemon=True, name="ft_monitor").start()


NOT_CONNECTED = "not connected: call init_workload_monitoring() first"
NO_MONITOR = (
    "this process was not started by ft_launcher: python ft_launcher.py --nproc-per-node=N SCRIPT"
)


def connect() -> int:
    """A descriptor of our own for the pipe to the monitor, which can have our stacks from now on.

    faulthandler writes those even while the main thread is stuck in C code with the interpreter's
    lock. Raises RankMonitorClientError.
    """
    import faulthandler

    if "FT_MONITOR_FD" not in os.environ:
        raise RankMonitorClientError(NO_MONITOR)
    pipe = open_of_monitor("FT_MONITOR_FD", os.O_NONBLOCK)
    try:
        stacks = open_of_monitor("FT_STACKS_FD", os.O_APPEND)
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True, chain=False)
    except (RankMonitorClientError, RuntimeError):
        pass  # no stacks, then
    return pipe


def open_of_monitor(variable: str, flags: int) -> int:
    """A descriptor of our own for what the monitor has open.

    Through the monitor's /proc, it is found whatever a wrapper (conda run) or the script has
    closed. Its number is high: were it closed, files that are opened next get low ones, and no
    heartbeat lands in them.
    """
    import fcntl
    import resource

    path = f"/proc/{os.environ.get('FT_MONITOR_PID')}/fd/{os.environ.get(variable)}"
    try:
        low = os.open(path, os.O_WRONLY | flags)
        most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096)
        high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, most // 2)
    except OSError as error:
        reason = "it has ended, or sudo or a container is in between: start the launcher inside"
        raise RankMonitorClientError(
            f"no rank monitor at {path}, {error.strerror}: {reason}"
        ) from None
    os.close(low)
    return high


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns, or the OSError or ValueError it raises; None if it takes longer.

    For file systems, which may never answer: the thread is left behind then.
    """
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function())
        except (OSError, ValueError) as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def warn(text: str) -> None:
    import logging

    logging.getLogger("ft_monitor").warning("%s", text)


def is_library(file: str) -> bool:
    """Whether a line of a stack is Python's, an installed package's or ours, not the user's."""
    is_ours = os.path.basename(file) in ("ft_monitor.py", "ft_callback.py")
    return (
        is_ours or file.startswith(("<frozen", os.path.dirname(os.__file__))) or "-packages" in file
    )


def describe_error(error: BaseException) -> str:
    """An exception and the user's line that it came from, in one line.

    What failed in a DataLoader worker is the last line of its text, below the worker's traceback.
    """
    import re
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not is_library(frame.filename)]
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")  # without colours
    lines = [" ".join(line.split()) for line in text.removesuffix(": ").strip().splitlines()]
    text = " ".join(lines)
    if len(text) > 300:
        text = f"{text[:300]}..." if len(lines) == 1 else f"{lines[0][:150]} ... {lines[-1][:150]}"
    for frame in users[-1:]:
        text += f" ({os.path.basename(frame.filename)}:{frame.lineno} in {frame.name})"
    return text


def section_of(clock: str) -> str:
    """The section that a clock is of; empty if it is of none."""
    return clock.partition("[")[2][:-1]


def rank_number() -> int:
    """This process's rank, as torchrun or srun gives it; 0 without them."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0


def attempt_number() -> int:
    text = os.environ.get("FT_ATTEMPT") or "0"
    return int(text) if text.isdecimal() else 0


def evidence_path(kind: str) -> str:
    """This rank's file in the evidence of this attempt, of kind "json" or "stacks.txt"."""
    directory = os.environ.get("FT_RUN_DIR", "")
    return os.path.join(directory, f"attempt_{attempt_number()}", f"rank{rank_number()}.{kind}")


def progress_files() -> list[str]:
    """Where the newest checkpoint is noted: for later attempts, and under autoresume.sh for later
    runs, as {"step", "checkpoint", "time", "by"}."""
    flag = os.environ.get(FLAG_VARIABLE)
    here = os.path.join(os.environ.get("FT_RUN_DIR") or default_run_dir(), "progress.json")
    return [here, f"{flag}.progress"] if flag else [here]


def default_run_dir() -> str:
    """Below it, each launcher keeps the evidence of its run, and a monitor without one its own."""
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"ft_runs_{os.getuid()}")


# ------------------------------------------------------------------------------------ processes


def process_control(option: int, value: int) -> None:
    """prctl(2) for this process; elsewhere than on Linux, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def send(pid: int, number: int, how: Callable[[int, int], None] = os.kill) -> None:
    """Signal a process, or with os.killpg a group, that may have ended."""
    try:
        how(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def send_to_main_thread(pid: int, number: int) -> None:
    """A stopped process that is continued handles this before its main thread goes on.

    A signal to the process is handled by any of its threads, while the others go on.
    """
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except AttributeError:  # glibc has it since 2.30
        send(pid, number)


def descendants(pid: int) -> list[int]:
    """The processes that descend from a process and still run; zombies do not count. Linux only.

    Those of a subreaper stay its descendants, whatever session they make for themselves.
    """
    children: dict[int, list[tuple[int, bytes]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else []):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # proc(5): pid (comm) state ppid ...; comm may hold spaces and parentheses
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(int(parent), []).append((int(name), state))
    found, queue = [], [pid]
    while queue:
        young = children.get(queue.pop(), [])
        queue += [child for child, _ in young]
        found += [child for child, state in young if state not in b"ZX"]
    return found


def kill_descendants(mark: bytes = b"") -> list[int]:
    """SIGKILL all that descends from this process, or was started with a mark such as b"NAME=value"
    in its environment; return what does not end (D state)."""
    deadline = time.monotonic() + REAP_SECONDS
    while True:
        left = [pid for pid in descendants(os.getpid()) if not mark or has_mark(pid, mark)]
        for pid in left:
            send(pid, signal.SIGKILL)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.005)


def has_mark(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:
        return False


def process_status(pid: int, name: str) -> str:
    """A line of /proc/PID/status, such as State or SigCgt; empty where there is none."""
    try:
        with open(f"/proc/{pid}/status", errors="replace") as file:
            return next((x.partition(":")[2].strip() for x in file if x.startswith(f"{name}:")), "")
    except OSError:
        return ""  # it ended, or this is no Linux


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: of this control group (v2), or
    else of this host."""
    counters = ["/proc/vmstat"]
    try:
        with open("/proc/self/cgroup") as file:
            paths = [line.strip().removeprefix("0::") for line in file if line.startswith("0::")]
        counters[:0] = [f"/sys/fs/cgroup{path}/memory.events" for path in paths]
    except OSError:
        pass  # not Linux
    for counter in counters:
        try:
            with open(counter) as file:
                return int(dict(line.split() for line in file)["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue  # not mounted here, or an older kernel
    return 0


# ---------------------------------------------------------------------------------------- files


def to_text(values: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(values, indent=indent) + "\n"


def write_file(path: str | os.PathLike[str], text: str, durable: bool = False) -> None:
    """Write beside the file and rename, so that a reader never sees half of it.

    `durable` survives a power cut too. Raises OSError, and leaves nothing behind then.
    """
    directory, name = os.path.split(os.path.abspath(path))
    # Launchers in containers have the same pid on all nodes.
    beside = os.path.join(directory, f".{name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.lexists(beside):
            os.unlink(beside)


class Writer:
    """Writes each file in a thread: nobody waits for a file system, and no file for another's.

    Of several texts for one file, the last counts. What cannot be written costs a line. A
    directory that a cleaner has removed from /tmp is made again.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._texts: dict[str, str] = {}  # to be written, by path
        self._changed = threading.Condition()
        self._has_failed: dict[str, bool] = {}  # by path, the last time

    def put(self, path: str, text: str) -> None:
        with self._changed:
            self._texts[path] = text
            self._changed.notify_all()
        if path not in self._has_failed:
            self._has_failed[path] = False
            threading.Thread(target=self._run, args=(path,), daemon=True).start()

    def finish(self, seconds: float) -> bool:
        """Wait until all is written, but not longer; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._texts, seconds)

    def _run(self, path: str) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: path in self._texts)
                text = self._texts[path]
            self._write(path, text)
            with self._changed:
                if self._texts[path] is text:
                    del self._texts[path]
                self._changed.notify_all()

    def _write(self, path: str, text: str) -> None:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, text)
            self._has_failed[path] = False
        except OSError as error:
            if not self._has_failed[path]:
                self._log.warning("cannot write %r: %s", path, error.strerror)
            self._has_failed[path] = True


class Log:
    """This program's own lines on stderr, each begun with who speaks.

    What reads them may have stopped, or be on a file system that hangs: nobody waits for it.
    """

    LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

    def __init__(self, prefix: str, level: str = "INFO") -> None:
        self.prefix = prefix
        self.lowest = self.LEVELS.index(level)

    def _write(self, level: int, text: str, *values: Any) -> None:
        if level < self.lowest:
            return
        lines = (text % values if values else text).split("\n")
        data = "".join(f"[{self.prefix}] {line}\n" for line in lines).encode(errors="replace")
        within(LOG_SECONDS, lambda: os.write(2, data))

    debug = functools.partialmethod(_write, 0)
    info = functools.partialmethod(_write, 1)
    warning = functools.partialmethod(_write, 2)
    error = functools.partialmethod(_write, 3)


# -------------------------------------------------------------------------------------- monitor


@dataclasses.dataclass
class Ending:
    """How a rank is being ended: see the table at the head of this file."""

    end: End
    reason: str
    signal: int  # that it is sent first, unless that is SIGKILL
    kill_at: float  # monotonic
    to_rank_alone: bool = False  # DataLoader workers that end first would make it fail
    wants_stacks: bool = False
    may_save: bool = False  # only: a survivor is killed as soon as no checkpoint is being saved
    is_killed: bool = False


class RankMonitor:
    """One rank, from its start to its end: what it says, and what is done to it.

    `command` is the rank's command line; `grace` the seconds that a stopped rank has to end;
    `launcher_pid`: whose death ends the rank, by default our parent's.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: FaultToleranceConfig,
        log: Log,
        grace: float = GRACE_SECONDS,
        launcher_pid: int = 0,
    ) -> None:
        self.command = list(command)
        self.config = config
        self.log = log
        self.grace = grace
        self.report = Report(rank_number(), attempt_number(), os.uname().nodename)
        self.report.launcher_pid = launcher_pid or os.getppid()
        self.report.monitor_pid = os.getpid()
        self.report.oom_kills = -oom_kills()
        self.inbox = Inbox()
        self.stacks = Stacks()
        self.writer = Writer(log)
        learned = os.environ.get("FT_LEARNED")
        self.clocks = Clocks(config, time.monotonic(), json.loads(learned) if learned else None)
        self.ending: Ending | None = None
        self.flag: tuple[str, str] | None = None  # path and text, once training is complete

    def start(self) -> None:
        environment = {
            "PYTHONFAULTHANDLER": "1",  # a rank that crashes in C code leaves its stack
            **os.environ,
            "FT_CONFIG": self.config.to_json(),
            "FT_MONITOR_PID": str(os.getpid()),
            "FT_MONITOR_FD": str(self.inbox.write_end),
            "FT_STACKS_FD": str(self.stacks.descriptor),
        }
        for name in ("FT_LEARNED", "FT_LAUNCHER_PID"):
            environment.pop(name, None)  # which a monitor below the rank would take for its own
        monitor = os.getpid()
        self.report.started, self.report.pid = time.time(), os.fork()
        if self.report.pid == 0:
            become_rank(self.command, environment, monitor)

    @property
    def pid(self) -> int:
        return self.report.pid or 0

    # -- what the rank says

    def hear(self, now: float) -> bool:
        """Take in what is in the pipe; return whether that is worth a report at once."""
        skipped = self.inbox.skipped
        is_news = False
        for message in self.inbox.read():
            is_lap = message["type"] in ("heartbeat", "section")
            is_news |= not is_lap
            # A hung rank that is continued for its stacks may finish what it was at: too late.
            if not (is_lap and self.report.end == End.HUNG):
                self.clocks.hear(message, now)
                self._note(message, time.time() - (now - self.clocks.heard))
        if self.inbox.skipped and not skipped:
            self.log.warning("%s: skipping what is no message on its pipe", self.who())
        return is_news

    def _note(self, message: Mapping[str, Any], at: float) -> None:
        """Let the report tell of a message; `at` is since the epoch."""
        report, kind = self.report, message["type"]
        if kind == "init":
            report.connected, report.error, report.error_time = at, None, None
            report.complete = report.over = False  # one more fit: its end will tell
            self.flag = None
            report.calculate, report.state_file = message["calculate"], message["state_file"]
        elif kind == "heartbeat":
            report.heartbeat = at
            report.step = report.step if message["step"] is None else message["step"]
            if report.first_heartbeat is None:
                report.first_heartbeat, report.first_step = at, report.step
        elif kind == "saved":
            report.saved = message["step"]
            stamp, by = time.strftime("%Y-%m-%dT%H:%M:%S%z"), os.path.dirname(evidence_path("json"))
            where = message["checkpoint"]
            noted = to_text({"step": report.saved, "checkpoint": where, "time": stamp, "by": by})
            for path in progress_files():
                self.writer.put(os.path.abspath(path), noted)
        elif kind == "request":
            report.request = {"action": message["action"], "reason": message["reason"]}
        elif kind == "complete":
            report.complete = True
            self.flag = message["flag"] and (message["flag"], to_text(message["values"]))
        elif kind in ("error", "bye"):
            report.over = kind == "bye"
            if message["error"] is not None:
                report.error, report.error_time = message["error"], report.error_time or at

    # -- what is done to it

    def end_hung_rank(self, clock: str, now: float) -> None:
        waited, limit = now - self.clocks.running[clock], self.clocks.limit(clock)
        self.report.hung_on, self.report.waited = clock, round(waited, 3)
        reason = f"hung: {waiting_for(clock)} for {waited:.1f} s{self.at_step()} "
        kind = "learned limit" if self.clocks.is_learned(clock) else "limit"
        reason += f"({kind} {limit:g} s, {flag_of(clock)})"
        number = signal.Signals[self.config.rank_termination_signal]
        kill_at = now if number == signal.SIGKILL else now + TERMINATION_SECONDS
        self.begin(Ending(End.HUNG, reason, number, kill_at, wants_stacks=True), now)
        self.log.warning("%s %s; sent %s", self.who(), reason, number.name)

    def stop(self, number: int, now: float) -> None:
        if self.ending is not None and number == signal.SIGINT:  # Ctrl-C again
            self.ending.kill_at = now
        reason = f"stopped by {signal.Signals(number).name}"
        kill_at = now + self.grace
        self.begin(Ending(End.STOPPED, reason, number, kill_at, to_rank_alone=True), now)

    def end_survivor(self, end: End, reason: str, now: float) -> None:
        """It can only wait for who is gone, unless it is saving a checkpoint."""
        self.hear(now)  # it may have begun to since the last look
        kill_at = now + self.config.workers_stop_timeout
        ending = Ending(end, reason, signal.SIGKILL, kill_at, wants_stacks=True, may_save=True)
        self.begin(ending, now)

    def begin(self, ending: Ending, now: float) -> None:
        """Begin to end the rank, once: what comes on top of it does not cut its grace short."""
        if self.ending is not None:
            return
        self.ending = ending
        self.report.end, self.report.reason = ending.end, ending.reason
        if ending.wants_stacks:
            self.report.state = process_status(self.pid, "State")[:1]
            self.report.stacks = self.stacks.take(self.pid, ending.reason, is_ending=True)
        if ending.signal != signal.SIGKILL:
            send(self.pid, ending.signal, os.kill if ending.to_rank_alone else os.killpg)
            send(self.pid, signal.SIGCONT, os.killpg)  # a stopped process takes no other signal
        self.enforce(now)

    def enforce(self, now: float) -> None:
        """Kill the rank if that is due."""
        ending = self.ending
        if ending is None or ending.is_killed:
            return
        has_saved = ending.may_save and CHECKPOINTING not in self.clocks.sections
        if has_saved or now >= ending.kill_at:
            ending.is_killed, ending.kill_at = True, now
            send(self.pid, signal.SIGKILL, os.killpg)

    def warn_at_half_time(self, clock: str, now: float) -> None:
        waited, limit = now - self.clocks.running[clock], self.clocks.limit(clock)
        what = f"{waiting_for(clock)} for {waited:.1f} s{self.at_step()}, limit {limit:g} s"
        taken = self.stacks.take(self.pid, what, until=self.clocks.first()[1])
        self.log.warning("%s: %s%s", self.who(), what, "; its stacks are kept" if taken else "")

    def finish(self) -> int:
        """The rank is gone, or given up: clear up after it, and return its status."""
        for number in (*STOP_SIGNALS, *PASSED_ON_SIGNALS, PEER_FAILED):
            signal.signal(number, signal.SIG_IGN)  # from here on, the exit status is the rank's
        left = kill_descendants()
        if left:
            self.log.error("%s: %s do not end after SIGKILL", self.who(), left)
        self.hear(time.monotonic())  # its last words
        report = self.report
        report.status = -signal.SIGKILL if report.status is None else report.status
        report.end = End.BY_ITSELF if report.end == End.RUNNING else report.end
        report.ended = time.time()
        report.oom_kills += oom_kills()
        if report.over and report.status == 0:
            report.error = None  # the script has handled it
        # The exit code is the script's word; a signal after its end cuts short what hangs then.
        was_well = report.over and report.error is None and report.status < 0
        if self.flag and (report.status == 0 or was_well):
            self._create_flag(*self.flag)
        return report.status

    def _create_flag(self, path: str, text: str) -> None:
        def create() -> bool:
            write_file(path, text, durable=True)
            return True

        result = within(FLAG_SECONDS, create)
        if result is not True:
            why = result or "its file system does not answer"
            self.log.error("training is complete, but cannot create %s: %s", path, why)

    # -- words

    def who(self) -> str:
        return f"rank {self.report.rank} (pid {self.report.pid})"

    def at_step(self) -> str:
        return "" if self.report.step is None else f" at step {self.report.step}"


class Stacks:
    """What a rank writes of its stacks, in memory: no file system is in the way of a kill."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("ft_stacks") if hasattr(os, "memfd_create") else -1
        self.text = ""  # all that it wrote, each time below a header; we rarely ask, so it is short

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
            send(pid, signal.SIGCONT, os.killpg)  # a stopped process does not answer
        until = min(until, time.monotonic() + STACKS_SECONDS)
        while time.monotonic() < until:
            time.sleep(0.001)  # they are written in one go, mostly quicker than this
            before, size = size, os.fstat(self.descriptor).st_size
            if size == before > start or process_status(pid, "State")[:1] in "ZX":
                break  # or it has ended meanwhile, as survivors do that hear of a peer's end
        self.text += os.pread(self.descriptor, size - start, start).decode(errors="replace")
        return size > start


class Loop:
    """Sleeps until a signal, a message or a deadline, and lets the monitor act on it."""

    def __init__(self, monitor: RankMonitor) -> None:
        self.monitor = monitor
        self.signals = catch_signals()  # read end of a pipe to which signals write their numbers
        self.read_at = 0.0  # when the pipe is worth a look again, monotonic
        self.written = -math.inf  # when the report was, monotonic
        self.is_report_old = True
        self.warned: tuple[str, float] | None = None  # the last clock, and its start, warned of
        self.warnings_left = HALF_TIME_WARNINGS

    def run(self) -> int:
        """Start the rank, stay until it has ended, and return its exit code, or -N for signal N.

        127 or 126, as from a shell, when its command cannot be started.
        """
        monitor = self.monitor
        process_control(PR_SET_CHILD_SUBREAPER, 1)  # whatever leaves the rank's session stays ours
        monitor.start()
        process_control(PR_SET_PDEATHSIG, PARENT_DIED)
        if os.getppid() != monitor.report.launcher_pid:  # it died before, and no signal will come
            os.kill(os.getpid(), PARENT_DIED)
        while monitor.report.status is None and not self._is_given_up():
            self._turn()
        status = monitor.finish()
        self._write_report()
        monitor.writer.finish(FILE_SECONDS)
        return status

    def _turn(self) -> None:
        monitor = self.monitor
        wake_at = self._wake_at()
        self._sleep(wake_at)
        now = time.monotonic()
        if now > wake_at + SUSPENDED_SECONDS and monitor.ending is None:
            monitor.log.warning("%s: woke %.1f s late: suspended", monitor.who(), now - wake_at)
            monitor.clocks.restart(now)
        self._obey(now)
        if now >= self.read_at or now >= wake_at:
            self._hear(now)
        monitor.report.status = reap(monitor.pid)
        if monitor.report.status is None:
            self._enforce(now)
        if self.is_report_old and now >= self.written + REPORT_SECONDS:
            self._write_report()

    def _is_given_up(self) -> bool:
        ending = self.monitor.ending
        if ending is None or not ending.is_killed:
            return False
        return time.monotonic() > ending.kill_at + REAP_SECONDS

    def _wake_at(self) -> float:
        """When there is something to do, if nothing happens before."""
        ending = self.monitor.ending
        if ending is not None:
            return ending.kill_at + REAP_SECONDS * ending.is_killed
        return min(self._half_time(), self.monitor.clocks.first()[1])

    def _half_time(self) -> float:
        """When half of the first clock has passed, if that is still to be warned of."""
        clock, deadline = self.monitor.clocks.first()
        since = self.monitor.clocks.running.get(clock, math.inf)
        is_due = self.warnings_left > 0 and self.warned != (clock, since)
        return (since + deadline) / 2 if is_due else math.inf

    def _sleep(self, wake_at: float) -> None:
        now = time.monotonic()
        until = min(wake_at, now + 3600.0)
        if self.is_report_old:
            until = min(until, self.written + REPORT_SECONDS)
        sources = [self.signals]
        if now < self.read_at:
            until = min(until, self.read_at)
        else:
            sources.append(self.monitor.inbox.read_end)
        select.select(sources, [], [], max(0.0, until - now))

    def _hear(self, now: float) -> None:
        has_news = self.monitor.hear(now)
        self.read_at = now + READ_SECONDS
        self.is_report_old = True
        if has_news:
            self._write_report()

    def _obey(self, now: float) -> None:
        """Do what the signals say that have arrived."""
        monitor = self.monitor
        try:
            arrived = set(os.read(self.signals, 4096))
        except BlockingIOError:
            return
        # First what asks to stop: a failed peer does not cut its grace short.
        for number in sorted(arrived, key=lambda number: number not in STOP_SIGNALS):
            if number in STOP_SIGNALS:
                monitor.stop(number, now)
            elif number in PASSED_ON_SIGNALS:
                send(monitor.pid, number)
            elif number == PEER_FAILED:
                monitor.end_survivor(End.PEER_FAILED, "its peer failed", now)
            elif number == signal.SIGCONT and monitor.ending is None:
                monitor.clocks.restart(now)  # we were stopped, and most likely the rank with us
            # The kernel sends this also when only the launcher's thread that started us ends.
            elif number == PARENT_DIED and os.getppid() != monitor.report.launcher_pid:
                reason = f"the launcher (pid {monitor.report.launcher_pid}) is gone"
                monitor.end_survivor(End.LAUNCHER_DIED, reason, now)
        self.is_report_old = True

    def _enforce(self, now: float) -> None:
        monitor = self.monitor
        if monitor.ending is not None:
            monitor.enforce(now)
            return
        clock, deadline = monitor.clocks.first()
        if now >= deadline:
            monitor.end_hung_rank(clock, now)
            self._write_report()
        elif now >= self._half_time():
            self.warned = clock, monitor.clocks.running[clock]
            self.warnings_left -= 1
            monitor.warn_at_half_time(clock, now)
            self._write_report()

    def _write_report(self) -> None:
        report, clocks = self.monitor.report, self.monitor.clocks
        now = time.monotonic()
        self.written, self.is_report_old = now, False
        report.sections = sorted(clocks.sections)
        report.longest, report.limits = clocks.longest, clocks.limits()
        report.learned = [clock for clock in report.limits if clocks.is_learned(clock)]
        report.clock, _ = clocks.first()
        report.clock_since = time.time() - (now - clocks.running.get(report.clock, now))
        report.clock_limit = report.limits.get(report.clock)
        self.monitor.writer.put(evidence_path("json"), to_text(dataclasses.asdict(report)))
        if self.monitor.stacks.text:
            self.monitor.writer.put(evidence_path("stacks.txt"), self.monitor.stacks.text)


def waiting_for(clock: str) -> str:
    """What a rank has not done in time, if this is the clock that ran out."""
    words = {
        STARTUP: "no connection after process start",
        INITIAL: "no first heartbeat",
        HEARTBEAT: "no heartbeat",
        OUT_OF_SECTION: "outside of all sections",
        EXIT: "no end of the process after the script's",
    }
    return words.get(clock) or f"in section {section_of(clock)!r}"


def flag_of(clock: str) -> str:
    """The flag that sets a clock's limit."""
    section = section_of(clock)
    name = "rank-section-timeouts=" + section + ":SECONDS" if section else clock.replace("_", "-")
    return f"--ft-{name}"


def catch_signals() -> int:
    """Let signals do nothing but arrive, as bytes, in a pipe; return its read end."""
    read_end, write_end = os.pipe()
    for end in (read_end, write_end):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    others = (PEER_FAILED, PARENT_DIED, signal.SIGCHLD, signal.SIGCONT)
    for number in (*STOP_SIGNALS, *PASSED_ON_SIGNALS, *others):
        if number in STOP_SIGNALS and signal.getsignal(number) == signal.SIG_IGN:
            continue  # under nohup, a hang-up is to be ignored by the rank too
        signal.signal(number, lambda number, frame: None)
    return read_end


def become_rank(command: list[str], environment: Mapping[str, str], monitor: int) -> NoReturn:
    """In the child: a session of its own, which ends with the monitor, and then the command."""
    try:
        os.setsid()  # one kill reaches DataLoader workers too, which outlive it by seconds
        process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != monitor:  # it died before the request
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        for number in PASSED_ON_SIGNALS:  # which schedulers send to everyone
            signal.signal(number, signal.SIG_IGN)
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"[ft_monitor] cannot start {command[0]!r}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def reap(rank: int) -> int | None:
    """Take in all children that have ended; return the status of the rank if it has."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == rank:
            status = os.waitstatus_to_exitcode(raw)


def end_like(status: int) -> NoReturn:
    """End this process as the rank did: by its exit code or signal, without a core dump of ours."""
    if status < 0:
        process_control(PR_SET_DUMPABLE, 0)
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(128 - status if status < 0 else status)  # PID 1 of a container outlives its signals


# ----------------------------------------------------------------- what can be said of reports

if TYPE_CHECKING:
    from pathlib import Path

# For re.match: what c10d, gloo and NCCL raise when a peer is gone or does not come. What a
# DataLoader worker raised is a RuntimeError that was "Caught".
COMMUNICATION_ERROR = (
    r"(?i)Dist\w*Error\b|RuntimeError: (?!Caught ).*(gloo|nccl|c10d|TCPStore|ProcessGroup|"
    r"monitoredBarrier|connectFullMesh|Socket Timeout|closed by peer)"
)
# For re.search: what may go away by itself, and is not the code's fault.
INFRASTRUCTURE_ERROR = (
    rf"{COMMUNICATION_ERROR}|\b(connection(\w*error)?|\w*timeout(error)?|timed? out|broken pipe|"
    r"CUDA error|CUDNN\w*|ECC|Input/output|Stale file|No space|quota)\b"
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
    STOPPED = "stopped"
    ELSEWHERE = "another node's workers failed, or nodes joined"
    LAUNCHER_DIED = "its launcher was killed"


@dataclasses.dataclass
class Incident:
    """How an attempt on this node ended: a line of incidents.jsonl. Times are since the epoch."""

    attempt: int
    host: str
    start: float
    end: float
    outcome: Outcome
    first_heartbeat: float | None
    last_heartbeat: float | None  # of the rank that was silent first
    detection: float | None  # seconds from there to the end
    restart: float | None  # seconds since the last end
    first_step: int | None
    last_step: int | None
    saved_step: int | None
    statuses: dict[str, int | None]
    connected: bool
    requests: list[dict[str, str]]
    suspect: int | None = None
    certain: bool = True
    error: str | None = None  # the suspect's
    verdict: str | None = None
    places: str = ""

    def why(self) -> str:
        return ("" if self.certain else "suspect: ") + (self.verdict or self.outcome.value)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank's main thread was."""

    text: str
    waits: bool  # for other ranks


def read_reports(directory: str | Path) -> list[Report]:
    """The reports of an attempt, by rank; one that cannot be read costs a line, and is missing."""
    from pathlib import Path

    reports = []
    for path in Path(directory).glob("rank*.json"):
        try:
            reports.append(Report.read(path))
        except (OSError, ValueError) as error:
            warn(f"cannot read the report {path}: {error}")
    return sorted(reports, key=lambda report: report.rank)


def read_text(path: Path) -> str:
    """Empty for what cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_place(directory: Path, report: Report) -> Place | None:
    """From the last stacks since a rank's last sign that show the user's code, if any do."""
    import linecache
    import re

    stacks = read_text(directory / f"rank{report.rank}.stacks.txt")
    last_sign = max(report.heartbeat or 0.0, report.error_time or 0.0)
    frames: list[tuple[str, str, str]] = []  # file, line, function; innermost first
    for dump in stacks.split(f"\n{STACKS_HEADER} ")[1:]:
        main = dump[dump.rfind("hread 0x") :]  # faulthandler writes the main thread last
        found = re.findall(r'File "(.+)", line (\d+) in (.+)', main)
        is_better = not frames or not all(is_library(file) for file, _, _ in found)
        if is_better and float(dump.split()[0]) >= last_sign:
            frames = found
    if not frames:
        is_silent = report.stacks is False and report.error is None
        return Place(f"without stacks (state {report.state})", False) if is_silent else None
    file, line, function = next((x for x in frames if not is_library(x[0])), frames[-1])
    text = f"at {os.path.basename(file)}:{line} in {function}"
    file, line, leaf = frames[0]
    text += "" if leaf == function else f" -> {leaf}"
    linecache.checkcache(file)  # it may have been edited
    code = linecache.getline(file, int(line))
    waits = re.search(WAITING, f"{file} {leaf} {code}") is not None
    return Place(f"waiting {text}" if waits else text, waits)


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
    return report.status != 0 and report.end in (End.RUNNING, End.BY_ITSELF, End.STOPPED)


def is_waiting(report: Report, place: Place | None) -> bool:
    """Whether a rank that did not fail by itself waits, as far as its error or stacks tell."""
    if report.state == "T":
        return False
    return report.error is not None or (place is not None and place.waits)


def by_blame(reports: Sequence[Report], places: Mapping[int, Place]) -> list[Report]:
    """The ranks of an attempt that failed, the one to blame first."""
    crowd = collections.Counter(places.get(report.rank) for report in reports)
    newest = max(report.heartbeat or 0.0 for report in reports)

    def key(report: Report) -> tuple[float, ...]:
        is_cause, place = failed_by_itself(report), places.get(report.rank)
        failed = report.error_time or report.ended or report.heartbeat or 0.0
        return (
            not is_cause,  # the others failed, or waited, because of it
            failed if is_cause else 0.0,  # later ones because of the first
            report.state != "T",  # stopped, as by a debugger
            is_waiting(report, place),  # not what was waited for
            report.status == 0,  # missed only by those who wait
            -1 if report.step is None else report.step,  # fell behind
            report.connected is not None,  # did not get as far
            int((report.heartbeat or 0.0) - newest),  # silent for longest, in whole seconds
            crowd[place],  # the odd one out
            report.error_time or math.inf,  # complained first
        )

    return sorted(reports, key=key)


def judge(
    reports: Sequence[Report], places: Mapping[int, Place], world: int | None
) -> tuple[Report | None, bool, str]:
    """The rank to blame, or None if it is on another node; is that certain; and the verdict."""
    if not reports:
        return None, True, "its workers failed, and there is no report of how"
    first, *others = by_blame(reports, places)
    sentence = describe_failure(first)
    if failed_by_itself(first):
        return first, True, sentence
    are_all_here = world is None or len(reports) >= world
    if is_waiting(first, places.get(first.rank)) and not are_all_here:
        return None, True, f"{OF_OTHERS}; {sentence}"
    noticed = [describe_failure(report) for report in others if report.error is not None]
    stopped = [report for report in reports if report.state == "T"]
    is_certain = stopped == [first] or (are_all_here and not others)
    return first, is_certain, "; ".join([sentence, *noticed[:1]])


# What was wrong with a rank: the first row that is true of its report.
FAILURES: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda r: r.error is not None, "failed: {error}"),
    (lambda r: r.status is None, "ended with its monitor (pid {monitor_pid}), which was killed"),
    (lambda r: r.end in (End.HUNG, End.STOPPED), "{reason}"),
    (lambda r: r.end not in (End.RUNNING, End.BY_ITSELF), "did not go on: {waiting}"),
    (lambda r: r.status == 0, "ended with exit code 0, while others went on"),
    (
        lambda r: r.status > 0 and r.pid and r.connected is None,
        "ended with exit code {status} before it connected: see its output above",
    ),
    (lambda r: r.status > 0, "ended with exit code {status}"),
    (lambda r: r.status != -signal.SIGKILL, "ended by {signal}"),
    (lambda r: r.oom_kills > 0, "ended by SIGKILL: out of memory, such kills here: {oom_kills}"),
    (lambda r: r.pid is None, "ended by SIGKILL (out of memory?)"),  # no report, nobody counted
    (lambda r: True, "ended by SIGKILL, which nobody here sent"),
)


def describe_failure(report: Report) -> str:
    pid = f"pid {report.pid}" if report.pid else f"its monitor's pid {report.monitor_pid}"
    since = report.clock_since or report.heartbeat or report.started or 0.0
    waited = (report.ended or since) - since
    signals = {-number: number.name for number in signal.Signals}
    words = next(words for is_true, words in FAILURES if is_true(report)).format(
        **vars(report),
        waiting=f"{waiting_for(report.clock or HEARTBEAT)} for {waited:.1f} s",
        signal=signals.get(report.status or 0, f"signal {abs(report.status or 0)}"),
    )
    return f"rank {report.rank} ({pid}) {words}"


def describe_places(suspect: int | None, places: Mapping[int, Place]) -> str:
    """In one line, the suspect first."""
    import reprlib

    groups: dict[str, list[int]] = {}
    for rank, place in places.items():
        groups.setdefault(place.text, []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: (suspect not in group[1], -len(group[1])))
    parts = [
        f"rank{'s' * (len(ranks) > 1)} {reprlib.repr(ranks)[1:-1]} {text}"
        for text, ranks in ordered
    ]
    if len(parts) > MAX_PLACES:
        parts[MAX_PLACES:] = [f"{len(parts) - MAX_PLACES} more places"]
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """8.1 s; 14 m 31 s; 3 h 02 m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def make_incident(
    attempt: int,
    directory: Path,
    start: float,
    *,
    reports: Sequence[Report],
    outcome: Outcome | None = None,
    stopped_by: str | None = None,
    world: int | None = None,
    previous_end: float | None = None,
    now: float | None = None,
) -> Incident:
    """Without `outcome`, statuses tell how it ended; `now` is when, if no report tells."""

    def known(name: str) -> list[Any]:
        return [x for report in reports if (x := getattr(report, name)) is not None]

    if outcome is None:
        is_well = all(report.status == 0 for report in reports)
        outcome = Outcome.WELL if is_well else Outcome.FAILED
    end = max(known("ended"), default=now or time.time())
    last = min(known("heartbeat"), default=None)
    is_failure = outcome not in (Outcome.WELL, Outcome.STOPPED)
    incident = Incident(
        *(attempt, os.uname().nodename, start, end, outcome),
        first_heartbeat=min(known("first_heartbeat"), default=None),
        last_heartbeat=last,
        detection=end - last if last and is_failure else None,
        restart=start - previous_end if previous_end else None,
        first_step=min(known("first_step"), default=None),
        last_step=max(known("step"), default=None),
        saved_step=max(known("saved"), default=None),
        statuses={str(report.rank): report.status for report in reports},
        connected=bool(known("connected")),
        requests=known("request"),
        verdict=f"stopped by {stopped_by}" if stopped_by else None,
    )
    if outcome == Outcome.FAILED:
        find_cause(incident, directory, reports, world)
    return incident


def find_cause(
    incident: Incident, directory: Path, reports: Sequence[Report], world: int | None
) -> None:
    """Let the incident of a failed attempt tell who is to blame, and where the ranks were."""
    places = {x.rank: place for x in reports if (place := read_place(directory, x))}
    suspect, incident.certain, incident.verdict = judge(reports, places, world)
    if suspect is not None:
        incident.suspect, incident.error = suspect.rank, suspect.error
    incident.places = describe_places(incident.suspect, places)


def read_incidents(run_dir: Path) -> list[Incident]:
    path = run_dir / "incidents.jsonl"
    names = [field.name for field in dataclasses.fields(Incident)]
    incidents = []
    for line in read_text(path).splitlines():
        try:
            values = json.loads(line)
            values["outcome"] = Outcome(values["outcome"])
            incidents.append(Incident(**{name: values[name] for name in names}))
        except (ValueError, TypeError, KeyError):
            warn(f"skipped a line of {path} that tells of no attempt")
    return incidents


def explain(incident: Incident, evidence: str, what_next: str, saved: int = 0) -> str:
    """Who, where, and what happens next; `saved`: the step of the checkpoint at its start."""
    ran = duration(incident.end - incident.start)
    step = "" if incident.last_step is None else f" at step {incident.last_step}"
    lines = [f"attempt {incident.attempt} ended after {ran}{step}: {incident.why()}"]
    if incident.places:
        lines.append(f"  {incident.places}")
    if saved and incident.first_step == 0:
        lines.append(f"  it began at step 0 although step {saved} was saved: see its warning")
    return "\n".join([*lines, f"  evidence: {evidence}; {what_next}"])


@dataclasses.dataclass
class TimeSpent:
    """Where the wall time of a run went, in seconds."""

    total: float
    counted: float  # in steps that are part of the training
    lost: float  # in steps that were done again, or never saved
    detection: float
    restart: float
    setup: float  # all else


def time_spent(incidents: Sequence[Incident]) -> TimeSpent:
    total = incidents[-1].end - incidents[0].start if incidents else 0.0
    training = [(x.last_heartbeat or 0.0) - (x.first_heartbeat or 0.0) for x in incidents]
    counted = sum(x * kept_share(incidents[n:]) for n, x in enumerate(training))
    detection = sum(x.detection or 0.0 for x in incidents)
    restart = sum(x.restart or 0.0 for x in incidents)
    setup = total - sum(training) - detection - restart
    return TimeSpent(total, counted, sum(training) - counted, detection, restart, setup)


def kept_share(incidents: Sequence[Incident]) -> float:
    """Which share of the first one's steps later ones did not do again, or else was saved."""
    this, *later = incidents
    begin, end = this.first_step or 0, this.last_step or 0
    if end == begin:
        return float(not this.detection)
    resumed = [incident.first_step for incident in later if incident.first_step is not None]
    kept = end if this.outcome == Outcome.WELL else this.saved_step or 0
    kept = min([end, *resumed] if resumed else [end, kept])
    return max(kept - begin, 0) / (end - begin)


def render_report(incidents: Sequence[Incident], width: int = 100) -> str:
    """What became of each attempt, and where the time went."""
    import textwrap

    row, indent = "{:>7}  {:<8}  {:>10}  {:>15}  {:>7}  {}", " " * 9
    lines = [row.format("attempt", "started", "ran", "steps", "saved", "why it ended")]
    for this in incidents:
        started = time.strftime("%H:%M:%S", time.localtime(this.start))
        steps = "none" if this.last_step is None else f"{this.first_step}-{this.last_step}"
        ran, saved = duration(this.end - this.start), this.saved_step or "-"
        text = row.format(this.attempt, started, ran, steps, saved, this.why())
        lines += textwrap.wrap(text, width, subsequent_indent=indent)
        lines += textwrap.wrap(indent + this.places, width, subsequent_indent=indent)
    spent = time_spent(incidents)
    share = 100 * spent.counted / (spent.total or 1.0)
    counted, total = duration(spent.counted), duration(spent.total)
    lines.append(f"goodput {share:.1f} %: {counted} of {total} wall time in steps that counted")
    lost = f"lost: {duration(spent.setup)} set-up, {duration(spent.lost)} in steps repeated or "
    lost += f"unsaved, {duration(spent.detection)} detection, {duration(spent.restart)} restart"
    return "\n".join([*lines, *textwrap.wrap(lost, width)])


def render_status(reports: Sequence[Report], now: float) -> str:
    """For each rank the age of its last heartbeat, and the clock that runs out first."""
    row = "{:>4}  {!s:>8}  {!s:>10}  {:>9}  {:>9}  {:>8}  {}"
    lines = [row.format("rank", "pid", "step", "heartbeat", "waited", "limit", "clock")]
    for report in reports:
        clock, times = report.clock, [report.heartbeat, report.clock_since]
        seconds = [*(now - x if x else None for x in times), report.clock_limit]
        if report.ended:
            clock, seconds = report.reason or f"ended with status {report.status}", [None] * 3
        elif is_gone(report, report.monitor_pid):
            clock, seconds = "gone", [None] * 3
        texts = ["-" if x is None else f"{x:.1f} s" for x in seconds]
        lines.append(row.format(report.rank, report.pid, report.step, *texts, clock))
    return "\n".join(lines)


def is_gone(report: Report, pid: int | None) -> bool:
    """Whether a process that a report names, on this host, exists no more."""
    return report.host == os.uname().nodename and not os.path.exists(f"/proc/{pid}")


def is_alive(attempt: Path) -> bool:
    return not all(is_gone(report, report.launcher_pid) for report in read_reports(attempt))


def find_run_dir(path: Path) -> Path:
    """`path`, or the newest run below it, if possible one that is alive. Raises ConfigError."""
    links = [path / "latest", *path.glob("*/latest")]
    runs = [(is_alive(x), x.lstat().st_mtime, x.parent) for x in links if x.is_symlink()]
    if not runs:
        remedy = "give the directory that ft_launcher prints as evidence"
        raise ConfigError(f"no run found in {str(path)!r}: {remedy}")
    return max(runs)[2]


def all_incidents(run_dir: Path) -> list[Incident]:
    """Also of an attempt whose launcher was killed, and could not write it down."""
    incidents, latest = read_incidents(run_dir), run_dir / "latest"
    reports = read_reports(latest)
    noted = {incident.attempt: incident.end for incident in incidents}
    if reports and not is_alive(latest) and reports[0].attempt not in noted:
        start = latest.lstat().st_mtime
        incident = make_incident(
            reports[0].attempt,
            latest,
            start,
            reports=reports,
            outcome=Outcome.LAUNCHER_DIED,
            previous_end=max(noted.values(), default=None),
            now=max(report.heartbeat or start for report in reports),
        )
        incidents.append(incident)
    if not incidents:
        raise ConfigError(f"no attempt of {str(run_dir)!r} has ended yet: see --ft-status")
    return incidents


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
            text = render_report(all_incidents(run_dir))
        print(f"{run_dir}\n{text}", flush=True)
    except BrokenPipeError:  # its reader has ended, as head does; what is left is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, OSError) as error:
        print(f"ft_launcher.py: error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------ main


def monitor_command() -> list[str]:
    """How to start a monitor; -- and the rank's command line follow.

    -I -S: quick to start, and nothing of the user's is imported in place of a standard module. As
    a module, it is not compiled each time.
    """
    call = "import sys; sys.path.append(sys.argv.pop(1)); import ft_monitor; ft_monitor.main()"
    here = os.path.dirname(os.path.realpath(__file__))
    return [sys.executable, "-I", "-S", "-c", call, here]


def parse_arguments(argv: Sequence[str]) -> tuple[Sequence[str], FaultToleranceConfig, float]:
    """The rank's command, the settings, and the grace in seconds."""
    grace = float(os.environ.get("FT_SHUTDOWN_TIMEOUT") or GRACE_SECONDS)
    if argv[:1] == ["--"] and argv[1:]:  # the launcher's way, which needs no argparse
        return argv[1:], FaultToleranceConfig.from_environment(), grace
    import argparse

    usage, about = "ft_monitor.py [options] -- COMMAND ...", "Kills a command when it hangs."
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False)
    about = "seconds that a stopped rank has to end (default: 30)"
    parser.add_argument("--shutdown-timeout", type=float, default=grace, help=about)
    FaultToleranceConfig.add_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command: give the rank's command line after --")
    if not 0 <= args.shutdown_timeout < math.inf:
        parser.error(f"--shutdown-timeout: got {args.shutdown_timeout}, expected 0 or more")
    try:
        return command, FaultToleranceConfig.from_args(args), args.shutdown_timeout
    except ConfigError as error:
        parser.error(str(error))


def launch() -> None:
    """The command ft_launcher; it looks at runs without importing torch."""
    import runpy

    runpy.run_module("ft_launcher", run_name="__main__", alter_sys=True)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    command, config, grace = parse_arguments(sys.argv[1:] if argv is None else argv)
    if not os.environ.get("FT_RUN_DIR"):
        os.environ["FT_RUN_DIR"] = os.path.join(default_run_dir(), f"monitor_{os.getpid()}")
    log = Log(f"ft_monitor attempt {attempt_number()} rank {rank_number()}", config.log_level)
    launcher = int(os.environ.get("FT_LAUNCHER_PID") or 0)
    end_like(Loop(RankMonitor(command, config, log, grace, launcher)).run())


if __name__ == "__main__":
    main()
