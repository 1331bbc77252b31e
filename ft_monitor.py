#!/usr/bin/env python3
"""The rank monitor: it starts one rank, hears its heartbeats over a pipe, and ends it when it hangs.

    python ft_monitor.py --ft-rank-heartbeat-timeout 60 -- python -u train.py

ft_launcher.py starts one monitor for each rank; alone, it works under any launcher (`srun python ft_monitor.py ...`).
The monitor is the rank's parent, as `tini` is a container's: it ends after the rank, with the rank's own exit code
or signal. `RankMonitorClient`, below, is the rank's end of the pipe, for any PyTorch loop. Standard library only.

Environment
    variable       set by    read by          meaning
    FT_CONFIG      launcher  monitor, client  the configuration as JSON
    FT_RUN_DIR     launcher  monitor          directory of the reports; without it none is written
    FT_ATTEMPT     launcher  monitor          0, 1, 2 ...: how often this launcher has started workers
    FT_MONITOR_FD  monitor   client           file descriptor of the pipe's write end

Messages, one JSON object a line, at most 4,096 bytes, from the rank to the monitor only
    type       fields      meaning
    init       rank        connected
    heartbeat  step        alive; the step is the training's, or null
    section    name, open  entered (true) or left (false) a named section
    bye        error       monitoring ends: training is over (null), or failed with this error

Clocks, in seconds; "none" is never. The first that runs out decides.
    setting                         runs from                    to
    startup_timeout                 process start                init
    initial_rank_heartbeat_timeout  init                         first heartbeat
    rank_heartbeat_timeout          last heartbeat               next heartbeat
    rank_section_timeouts[name]     section entered              section left
    rank_out_of_section_timeout     init, or last section left   next section entered
    exit_timeout                    bye with an error            process end
Heartbeat clocks rest while a section that has a timeout is open, and start anew when it is left.

How a rank is ended
    a clock ran out                      termination signal to its session, after 5 s SIGKILL
    SIGTERM, SIGINT, SIGHUP or SIGQUIT   passed on to the rank, after the grace SIGKILL to its session
    SIGABRT (a peer of the rank failed)  SIGKILL to its session
    the monitor's parent died            SIGKILL to its session
    the rank ended by itself             SIGKILL to what is left of its session
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import difflib
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MAX_MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write of this size is whole or fails, also from several threads
TERMINATION_SECONDS = 5.0  # from the termination signal of a hung rank to SIGKILL
REAP_SECONDS = 10.0  # from SIGKILL to giving up on a process that the kernel does not end (D state)
SUSPENDED_SECONDS = 5.0  # a monitor that wakes later than this was suspended, and its rank most likely with it
DEFAULT_GRACE_SECONDS = 30.0  # as torchrun's --shutdown-timeout
PARENT_DIED = signal.SIGURG  # sent by the kernel; by default a process ignores it, so a stray one is harmless

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
PEER_FAILED = signal.SIGABRT

log = logging.getLogger("ft_monitor")


# ---------------------------------------------------------------------------------------------- configuration


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the value, what was expected, and the remedy."""


def parse_seconds(value: Any) -> float | None:
    """A timeout in seconds from a number or text; None, "none" and "null" are never."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
        return None
    return parse_positive(value)


def parse_positive(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
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
    rank_termination_signal: str = setting(
        parse_signal, "SIGKILL", "what a hung rank is sent; SIGKILL follows after 5 s"
    )
    log_level: str = setting(parse_log_level, "INFO", "of the launcher, the monitors and the callback")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](getattr(self, field.name)))
            except ConfigError as error:
                raise ConfigError(f"{field.name}: {error}") from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FaultToleranceConfig:
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise ConfigError(f"unknown setting {name!r}; did you mean {close!r}?")
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> FaultToleranceConfig:
        """Read settings from a JSON object, or from its member "fault_tolerance" where it has one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if isinstance(values, dict) and isinstance(values.get("fault_tolerance"), dict):
                values = values["fault_tolerance"]
            if not isinstance(values, dict):
                raise ConfigError('expected a JSON object, such as {"rank_heartbeat_timeout": 60}')
            return cls.from_mapping(values)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {os.fspath(path)!r}: {error.strerror}") from None
        except ValueError as error:  # broken JSON, not text, or a ConfigError
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
        """Flags beat the file of --ft-cfg-path, which beats FT_CONFIG, which beats the defaults."""
        path = args.ft_cfg_path
        base = cls.from_json_file(path) if path else cls.from_environment()
        flags = {field.name: getattr(args, f"ft_{field.name}") for field in dataclasses.fields(cls)}
        return dataclasses.replace(base, **{name: value for name, value in flags.items() if value is not None})

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, **options: Any) -> None:
        """Add --ft-cfg-path and one flag for each setting; `options` go to every add_argument."""
        group = parser.add_argument_group("fault tolerance", "times in seconds, 'none' for never")
        group.add_argument(
            "--ft-cfg-path", "--ft_cfg_path", metavar="FILE.json", help="file with settings; flags beat it", **options
        )
        for field in dataclasses.fields(FaultToleranceConfig):
            flag = f"--ft-{field.name.replace('_', '-')}"
            group.add_argument(flag, flag[:5] + field.name, metavar="VALUE", help=field.metadata["meaning"], **options)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def watches_steps(self) -> bool:
        """Whether any clock is set that a hang in the middle of training would let run out."""
        timeouts = (self.rank_heartbeat_timeout, self.rank_out_of_section_timeout, *self.rank_section_timeouts.values())
        return any(timeout is not None for timeout in timeouts)

    def describe(self) -> str:
        """The settings that are in force, in one line."""
        values = dataclasses.asdict(self)
        sections = values.pop("rank_section_timeouts")
        values.update({f"rank_section_timeouts[{name}]": seconds for name, seconds in sections.items()})
        return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


# --------------------------------------------------------------------------------------------------- messages

MESSAGE_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "init": {"rank": (int,)},
    "heartbeat": {"step": (int, type(None))},
    "section": {"name": (str,), "open": (bool,)},
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
        understood = all(isinstance(message[name], types) for name, types in fields.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return message if understood else None


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
    """One running clock: the setting that limits it, when it started, and its limit in seconds."""

    setting: str
    since: float
    limit: float
    waiting_for: str

    @property
    def deadline(self) -> float:
        return self.since + self.limit


class Clocks:
    """What a rank has told so far, and which clocks therefore run. Pure: `now` goes in, in seconds."""

    def __init__(self, config: FaultToleranceConfig, now: float) -> None:
        self.config = config
        self.started: float = now  # process start
        self.connected: float | None = None  # last init
        self.heartbeat: float | None = None  # last heartbeat since init
        self.step: int | None = None  # the last one that a heartbeat carried
        self.sections: dict[str, float] = {}  # open sections and when they were entered
        self.left_timed: float | None = None  # when the last section with a timeout was left
        self.left_any: float | None = None  # when the last section was left
        self.over: float | None = None  # when bye arrived
        self.error: str | None = None  # what bye said

    def hear(self, message: Mapping[str, Any], now: float) -> None:
        kind = message["type"]
        if kind == "init":
            self.connected, self.heartbeat, self.over, self.error = now, None, None, None
            self.sections, self.left_timed, self.left_any = {}, None, None
        elif kind == "heartbeat":
            self.heartbeat = now
            self.step = self.step if message["step"] is None else message["step"]
        elif kind == "section" and message["open"]:
            self.sections.setdefault(message["name"], now)
        elif kind == "section" and self.sections.pop(message["name"], None) is not None:
            self.left_any = now
            if self._section_limit(message["name"]) is not None:
                self.left_timed = now
        elif kind == "bye":
            self.over, self.error = now, message["error"]

    def restart(self, now: float) -> None:
        """Start all running clocks anew, for a time in which nobody could run."""
        self.started = now
        self.sections = dict.fromkeys(self.sections, now)
        for name in ("connected", "heartbeat", "left_timed", "left_any", "over"):
            if getattr(self, name) is not None:
                setattr(self, name, now)

    def running(self) -> list[Clock]:
        """All clocks that run now and have a limit."""
        return [Clock(name, since, limit, what) for name, since, limit, what in self._all() if limit is not None]

    def first(self) -> Clock | None:
        """The clock that runs out first."""
        return min(self.running(), key=lambda clock: clock.deadline, default=None)

    def _section_limit(self, name: str) -> float | None:
        return self.config.rank_section_timeouts.get(name)

    def _all(self) -> Iterator[tuple[str, float, float | None, str]]:
        config = self.config
        if self.over is not None:
            if self.error is not None:
                yield "exit_timeout", self.over, config.exit_timeout, "no end of the process after its error"
            return
        if self.connected is None:
            yield "startup_timeout", self.started, config.startup_timeout, "no connection after process start"
            return
        for name, entered in self.sections.items():
            yield f"rank_section_timeouts[{name}]", entered, self._section_limit(name), f"in section {name!r}"
        if not self.sections:
            since = self.connected if self.left_any is None else self.left_any
            yield "rank_out_of_section_timeout", since, config.rank_out_of_section_timeout, "outside of all sections"
        if any(self._section_limit(name) is not None for name in self.sections):
            return
        if self.heartbeat is None:
            since, limit = self.connected, config.initial_rank_heartbeat_timeout
            setting, what = "initial_rank_heartbeat_timeout", "no first heartbeat"
        else:
            since, limit = self.heartbeat, config.rank_heartbeat_timeout
            setting, what = "rank_heartbeat_timeout", "no heartbeat"
        yield setting, max(since, self.left_timed or since), limit, what


# ------------------------------------------------------------------------------------------- the rank's end


class RankMonitorClientError(RuntimeError):
    """The client was used in a way that cannot work; the message says what to do."""


class RankMonitorClient:
    """The rank's end of the pipe to its monitor, for any training loop. Method names as NVIDIA's.

        client = RankMonitorClient()
        client.init_workload_monitoring()
        for step, batch in enumerate(loader):
            train(batch)
            client.send_heartbeat(step)
        client.shutdown_workload_monitoring()

    No method waits for the monitor: when it does not read, heartbeats are dropped and all else is kept for later.
    """

    def __init__(self) -> None:
        self.is_initialized = False
        self.config = FaultToleranceConfig()  # as the launcher gave it, from init_workload_monitoring() on
        self._pipe: Connection | None = None
        self._open_sections: set[str] = set()
        # What must not get lost while a frozen monitor leaves the pipe full; far more than any loop sends by then.
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=10_000)

    def init_workload_monitoring(self) -> None:
        """Connect to the monitor.

        Raises RankMonitorClientError (a RuntimeError) when this process was not started by ft_launcher.py or
        ft_monitor.py, or is connected already.
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
        self.is_initialized = True
        self._send("init", rank=rank_number())

    def send_heartbeat(self, step: int | None = None) -> None:
        """Say that this rank is alive, at `step` of the training where it is known."""
        self._send("heartbeat", step=step)

    def start_section(self, section: str) -> None:
        """Enter a named section; sections may nest and overlap, but a name can be open only once."""
        if section in self._open_sections:
            raise RankMonitorClientError(f"section {section!r} is open already: call end_section({section!r}) first")
        self._send("section", name=section, open=True)
        self._open_sections.add(section)

    def end_section(self, section: str) -> None:
        """Leave a named section, which must be open."""
        if section not in self._open_sections:
            raise RankMonitorClientError(f"section {section!r} is not open: call start_section({section!r}) first")
        self._send("section", name=section, open=False)
        self._open_sections.remove(section)

    def end_all_sections(self) -> None:
        """Leave all sections that are open."""
        for section in sorted(self._open_sections):
            self.end_section(section)

    def shutdown_workload_monitoring(self, error: str | None = None) -> None:
        """End monitoring: training is over, or failed with `error`. Without a connection, do nothing."""
        if self._pipe is None:
            return
        self._send("bye", error=error)
        self._pipe.close()
        self._pipe, self.is_initialized = None, False
        self._open_sections.clear()
        self._unsent.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a later run can be given by load_state_dict(); the same on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier run, before or after init_workload_monitoring()."""

    def _send(self, kind: str, **fields: Any) -> None:
        if self._pipe is None:
            raise RankMonitorClientError("not connected: call init_workload_monitoring() first")
        line = encode_message(kind, **fields)
        try:
            while self._unsent:
                os.write(self._pipe.fileno(), self._unsent[0])
                self._unsent.popleft()
            os.write(self._pipe.fileno(), line)
        except BlockingIOError:  # the monitor does not read (frozen, or its host overloaded): training goes on
            if kind != "heartbeat":
                self._unsent.append(line)
        except OSError:
            self._unsent.clear()  # the monitor is gone, and the kernel ends this process with it


def is_writable_pipe(descriptor: str) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(int(descriptor)).st_mode)
    except (ValueError, OSError):
        return False


def rank_number() -> int:
    """This process's rank, as torchrun or srun gives it; 0 without them."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0


# ------------------------------------------------------------------------------------------------- processes


def request_death_signal(number: int) -> None:
    """Ask the kernel to send this process `number` when its parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)


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


def kill_session(session: int, within: float = REAP_SECONDS) -> list[int]:
    """SIGKILL every process of a session, wait until they are gone, and return those that are not (D state)."""
    deadline = time.monotonic() + within
    while True:
        signal_session(session, signal.SIGKILL)
        left = session_members(session)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def write_json(path: Path, values: Mapping[str, Any], durable: bool = False) -> None:
    """Write beside the file and rename, so that a reader never sees half; `durable` survives a power cut too."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(values, file)
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
        self.clocks = Clocks(config, time.monotonic())
        self.reader = MessageReader()
        self.rank: subprocess.Popen[bytes]  # from _start() on
        self.pipe: Connection | None = None  # read end; None again when no process holds the write end
        self.signals, self._signals_in = os.pipe()  # numbers of the signals that arrived
        self.kill_at: float | None = None  # set when the rank is being stopped: SIGKILL follows then
        self.abandon_at: float | None = None  # set with SIGKILL: the rank is given up then
        self.report: dict[str, Any] = {
            "rank": rank_number(),
            "attempt": int(os.environ.get("FT_ATTEMPT") or 0),
            "host": socket.gethostname(),
            "monitor_pid": os.getpid(),
            "pid": None,
            "started": None,  # wall clock, seconds since the epoch
            "ended": None,
            "step": None,  # of the last heartbeat
            "verdict": None,  # the clock that ran out: {setting, limit, waited, step}
            "stopped": None,  # why the monitor ended the rank; null: it ended by itself
            "error": None,  # the exception that ended training
            "status": None,  # exit code, or -N for signal N
        }

    def run(self) -> int:
        """Start the rank, stay until it has ended, and return its exit code, or -N for signal N.

        Raises OSError when the command cannot be started.
        """
        self._catch_signals()
        self._start()
        self._watch_parent()
        while not self._rank_has_ended():
            wake_at = self._next_deadline()
            sources: list[Any] = [self.signals] if self.pipe is None else [self.signals, self.pipe]
            wait(sources, None if wake_at is None else max(0.0, wake_at - time.monotonic()))
            now = time.monotonic()
            self._hear(now)
            if wake_at is not None and now - wake_at > SUSPENDED_SECONDS and self.kill_at is None:
                log.warning("%s: woke %.1f s late, suspended; its clocks start anew", self._who(), now - wake_at)
                self.clocks.restart(now)
            self._obey(now)
            self._enforce(now)
            if self.abandon_at is not None and now >= self.abandon_at:
                return self._abandon()
        return self._finish()

    # -- start

    def _catch_signals(self) -> None:
        """Let signals do nothing but arrive, as bytes, in a pipe that the loop reads."""
        for end in (self.signals, self._signals_in):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, *PASSED_ON_SIGNALS, PEER_FAILED, PARENT_DIED, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)

    def _start(self) -> None:
        self.pipe, write_end = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.pipe.fileno(), False)
        environment = os.environ | {"FT_MONITOR_FD": str(write_end.fileno()), "FT_CONFIG": self.config.to_json()}
        monitor_pid = os.getpid()

        def die_with_the_monitor() -> None:
            request_death_signal(signal.SIGKILL)
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
        if self.abandon_at is not None:
            return self.abandon_at
        if self.kill_at is not None:
            return self.kill_at
        clock = self.clocks.first()
        return None if clock is None else clock.deadline

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
        for message in self.reader.feed(data):
            self.clocks.hear(message, now)
            if message["type"] in ("init", "bye"):
                self._write_report()
        if self.reader.skipped and not skipped:
            log.warning("%s: skipped what is not a message on its pipe, and will from now on", self._who())

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
                self._kill("its peer failed", now)
            # A launcher that starts its ranks from a thread sends this when the thread ends.
            elif number == PARENT_DIED and os.getppid() != self.parent_pid:
                self._kill(f"the launcher (pid {self.parent_pid}) is gone", now)

    def _enforce(self, now: float) -> None:
        """Do what is due: a clock has run out, or a rank that is being stopped did not end."""
        if self.abandon_at is not None:
            return
        if self.kill_at is not None:
            if now >= self.kill_at:
                self._kill(None, now)
            return
        clock = self.clocks.first()
        if clock is not None and now >= clock.deadline:
            self._end_hung_rank(clock, now)

    # -- ending the rank

    def _end_hung_rank(self, clock: Clock, now: float) -> None:
        waited = now - clock.since
        self.report["verdict"] = {
            "setting": clock.setting, "limit": clock.limit, "waited": round(waited, 3), "step": self.clocks.step
        }  # fmt: skip
        reason = f"hung: {clock.waiting_for} for {waited:.1f} s{self._at_step()} (limit {clock.limit:g} s)"
        termination = signal.Signals[self.config.rank_termination_signal]
        log.warning("%s: %s; sending %s", self._who(), reason, termination.name)
        self._stopping(reason, now + TERMINATION_SECONDS)
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

    def _kill(self, reason: str | None, now: float) -> None:
        self._stopping(reason, now)
        if self.abandon_at is None:
            self.abandon_at = now + REAP_SECONDS
            signal_session(self.rank.pid, signal.SIGKILL)

    def _stopping(self, reason: str | None, kill_at: float) -> None:
        """Write down why before the rank, and then the launcher, can notice."""
        self.kill_at = kill_at
        if reason is not None and self.report["stopped"] is None:
            self.report["stopped"] = reason
            self._write_report()

    def _finish(self) -> int:
        left = kill_session(self.rank.pid)
        status = self.rank.wait()
        self._hear(time.monotonic())  # its last words
        self.report.update(ended=time.time(), status=status)
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
        self.report.update(step=self.clocks.step, error=self.clocks.error)
        if self.report_path is None:
            return
        try:
            write_json(self.report_path, self.report)
        except OSError as error:
            log.warning("%s: cannot write its report %s: %s", self._who(), self.report_path, error.strerror)
            self.report_path = None


# ------------------------------------------------------------------------------------------------------ main


def report_path() -> Path | None:
    """Where the launcher expects this rank's report; None without a launcher."""
    directory = os.environ.get("FT_RUN_DIR")
    if not directory:
        return None
    return Path(directory) / f"attempt_{os.environ.get('FT_ATTEMPT') or 0}" / f"rank{rank_number()}.json"


def configure_logging(name: str, level: str, prefix: str) -> None:
    """Send this program's own lines to stderr, with a prefix that tells them from the ranks' output."""
    logger = logging.getLogger(name)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[{prefix}] %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


def end_like(status: int) -> NoReturn:
    """End this process as the rank ended: with its exit code, or by its signal, without a core dump of our own."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


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
    try:
        return args, FaultToleranceConfig.from_args(args)
    except ConfigError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    args, config = parse_arguments(sys.argv[1:] if argv is None else argv)
    configure_logging("ft_monitor", config.log_level, f"ft_monitor attempt {os.environ.get('FT_ATTEMPT') or 0}")
    monitor = RankMonitor(args.command, config, args.shutdown_timeout, args.parent_pid, report_path())
    try:
        status = monitor.run()
    except (FileNotFoundError, PermissionError) as error:
        log.error("cannot start %r: %s", args.command[0], error.strerror)
        status = 127 if isinstance(error, FileNotFoundError) else 126  # as a shell
    end_like(status)


if __name__ == "__main__":
    main()
