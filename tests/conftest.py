"""What the tests share: waiting, processes that are ended whatever happens, and a fake rank."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# nohup and & let all that tests start ignore these, which a shell cannot undo.
signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGQUIT, signal.SIGHUP):
    signal.signal(ignored, signal.SIG_DFL)

from ft_monitor import Report  # noqa: E402  after the path

PYTHON = (sys.executable, "-I", "-S")  # starts in 20 ms
SLOW = {"launch", "slurm", "job", "drill"}  # fixtures that start launchers, trainings or SLURM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest -m "not slow" takes less than two minutes."""
    for item in items:
        if SLOW & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


class Scheduling(LoadScopeScheduling):
    """Each test goes to the next worker that is free, those of SLURM to one: they share a cluster.

    --dist=loadgroup would do the same, but for pytest-xdist 3.8 knowing no groups in pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if "test_slurm.py" in nodeid else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def wait_until(condition: Callable[[], Any], limit: float = 60.0, what: str = "") -> Any:
    """Return the condition's value as soon as it is true; fail if it is not within the limit."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {limit} s: {what or condition}")


def state_of(pid: int) -> str:
    """The state of a process: R, S, D, T, Z ...; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return state_of(pid) not in "ZX"


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", 10, "SIGSTOP")


def processes_with(mark: str) -> list[int]:
    """The running processes with `mark`, such as NAME=value, in the environment they began with."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and is_running(int(directory.name)):
            found.append(int(directory.name))
    return found


class Started:
    """A process with its output in a file, so that it can be read while the process runs."""

    def __init__(self, command: list[str], output: Path, **options: Any) -> None:
        self.output_path = output
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **options
            )
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait(self, limit: float = 120.0) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s:\n{self.output}") from None

    def wait_for_output(self, text: str, limit: float = 60.0) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, limit, text)
        assert text in self.output, self.output


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start a command with extra environment variables; what is left of it is killed afterwards."""
    mark = f"FT_TEST_MARK={tmp_path}"
    started: list[Started] = []

    def run(command: list[Any], cwd: Path | None = None, **environment: str) -> Started:
        ours = ("FT_", "PET_", "SLURM")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        extra = {"FT_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
        output = tmp_path / f"output{len(started)}.txt"
        command = list(map(str, command))
        started.append(Started(command, output, cwd=cwd or tmp_path, env=inherited | extra))
        return started[-1]

    yield run
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(10)
    for pid in processes_with(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


# For scripts of tests: a state of its own, so that training resumes amid an epoch.
LOADER = """
from torch.utils.data import DataLoader

class Loader(DataLoader):
    start = done = 0

    def __iter__(self):
        start, self.start = self.start, 0
        return self.rest(start)

    def rest(self, start):
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = index + 1
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"]

"""

# A rank and its test wait for each other by files: tell() and told().
FAKE_RANK = f'''
"""A fake rank: does what its argument says, in these words."""
import ctypes, os, pathlib, resource, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import ft_monitor

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
client = ft_monitor.RankMonitorClient()
connect, enter, leave = client.init_workload_monitoring, client.start_section, client.end_section
saved = client.report_saved

def tell(name, text=""):
    pathlib.Path("." + name).write_text(str(text))
    os.rename("." + name, name)

def wait_until(condition):
    while not condition():
        time.sleep(0.01)

def told(name):
    wait_until(lambda: os.path.exists(name))

def on(number, action):
    signal.signal(number, lambda *_: action())

def beat(step=None, times=1, seconds=0.0):
    for _ in range(times):
        client.send_heartbeat(step)
        time.sleep(seconds)

def hang():
    while True:
        time.sleep(0.05)  # pause() may miss a signal that Python has not handled yet

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def deadlock():
    """In C code, with the interpreter's lock."""
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    while True:
        library.pthread_mutex_lock(mutex)

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def bye():
    """Another process connects, and its script ends."""
    subprocess.run([sys.executable, *sys.argv[:1], "connect()"], check=True)

def linger():
    """A thread that keeps the process from ending."""
    threading.Thread(target=threading.Event().wait).start()

def helper(name="helper", daemon=False):
    """Leave a process behind that nothing but SIGKILL ends; a daemon, in a session of its own."""
    if os.fork() == 0:
        if daemon:
            os.setsid()
            if os.fork():
                os._exit(0)
        for number in (*ft_monitor.STOP_SIGNALS, signal.SIGABRT):
            on(number, lambda: tell(name + "_got_a_signal"))
        tell(name, os.getpid())
        hang()
    told(name)

exec(compile(sys.argv[1], "rank.py", "exec"))
'''


class Watched:
    """A fake rank and the monitor that watches it."""

    def __init__(self, started: Started, directory: Path, report_path: Path) -> None:
        self.started = started
        self.directory = directory
        self.report_path = report_path

    @property
    def output(self) -> str:
        return self.started.output

    @property
    def report(self) -> Any:
        """A Report, of whose fields a test knows which are there."""
        return Report.read(self.report_path)

    @property
    def stacks(self) -> str:
        return self.report_path.with_suffix(".stacks.txt").read_text()

    @property
    def log(self) -> list[str]:
        """The monitor's own lines."""
        return [text for text in self.output.splitlines() if text.startswith("[ft_monitor")]

    @property
    def rank(self) -> int:
        return self.wait_for("pid")

    @property
    def monitor(self) -> int:
        return self.wait_for("monitor_pid")

    def wait_for(self, field: str, value: Any = None) -> Any:
        """Wait until the report's field has this value, or any; return it."""

        def look() -> Any:
            now = getattr(self.report, field) if self.report_path.exists() else None
            return now if value in (None, now) else None

        return wait_until(look, 20, f"{field} {value or ''} in the report; {self.output}")

    def told(self, name: str) -> str:
        """Wait until the rank tells something, and return it."""
        path = self.directory / name
        wait_until(lambda: path.exists() or self.started.process.poll() is not None, 20, name)
        assert path.exists(), f"ended before it told {name!r}:\n{self.output}"
        return path.read_text()

    def tell(self, name: str) -> None:
        (self.directory / name).touch()

    def send(self, number: int) -> None:
        """Send a signal to the monitor as soon as the rank is ready for it."""
        self.told("ready")
        os.kill(self.monitor, number)

    def ends(self) -> int:
        return self.started.wait(30)

    def seconds_since(self, name: str) -> float:
        """From when the rank told a time, which time.time() gave it, to its end."""
        return float(self.report.ended - float(self.told(name)))


@pytest.fixture
def watch(start: Callable[..., Started], tmp_path: Path) -> Callable[..., Watched]:
    """Start a monitor with a fake rank that does what `body` says.

    `settings` are the configuration's, `constants` replace some of ft_monitor's, `wrapper` is a
    command that starts the monitor's.
    """

    def run(
        body: str,
        constants: Mapping[str, float] | None = None,
        wrapper: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Watched:
        (tmp_path / "rank.py").write_text(FAKE_RANK)
        variables = {"FT_RUN_DIR": str(tmp_path / "run"), "FT_CONFIG": json.dumps(settings)}
        variables |= environment or {}
        patched = f"vars(ft_monitor).update({dict(constants or {})}); ft_monitor.main()"
        load = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ft_monitor; {patched}"
        rank = [sys.executable, "-S", str(tmp_path / "rank.py"), body]
        started = start([*wrapper, *PYTHON, "-c", load, "--", *rank], **variables)
        evidence = Path(variables["FT_RUN_DIR"]) / f"attempt_{variables.get('FT_ATTEMPT', '0')}"
        number = variables.get("RANK") or variables.get("SLURM_PROCID") or "0"
        return Watched(started, tmp_path, evidence / f"rank{number}.json")

    return run


# A training in the process of the test.

Heard = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def rank_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a rank's that the launcher has started, less the pipe; Lightning says little."""
    import ft_callback

    ours = ("FT_", "FAULT_TOL", "RANK", "SLURM", "TORCHELASTIC")
    for name in [name for name in os.environ if name.startswith(ours)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FT_CONFIG", '{"rank_heartbeat_timeout": 600}')
    monkeypatch.setattr(ft_callback.FaultToleranceCallback, "has_trained", False)
    monkeypatch.setattr(ft_callback.FaultToleranceCallback, "steps", 0)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        quiet = logging.getLogger(f"{name}.utilities.rank_zero")
        monkeypatch.setattr(quiet, "level", logging.ERROR)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)  # to caplog
    handlers = {number: signal.getsignal(number) for number in ft_callback.SAVE_SIGNALS}
    yield
    for number, handler in handlers.items():
        assert signal.signal(number, handler) == handler, "a handler has outlived its training"


@pytest.fixture
def monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Stands in for this rank's monitor: returns the messages that came since the last call."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setenv("FT_MONITOR_PID", str(os.getpid()))
    monkeypatch.setenv("FT_MONITOR_FD", str(writer))
    monkeypatch.setenv("FT_RUN_DIR", str(tmp_path / "run"))

    def heard() -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]
        except BlockingIOError:
            return []

    yield heard
    os.close(reader)
    os.close(writer)


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Heard) -> Path:
    """The path of the finished flag, which does not exist yet."""
    (tmp_path / "flag").mkdir()
    path = tmp_path / "flag" / "finished"
    monkeypatch.setenv("FAULT_TOL_FINISHED_FLAG_FILE", str(path))
    return path
