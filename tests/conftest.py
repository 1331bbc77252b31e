"""What the tests share: waiting for a condition, and processes that are ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup lets all that tests start ignore it, which bash cannot undo


def wait_until(condition: Callable[[], Any], limit: float = 60.0, what: str = "") -> Any:
    """Return the condition's value as soon as it is true; fail when it is not within `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {limit} s: {what or condition}")


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_with(mark: str) -> list[int]:
    """The running processes that have `mark`, such as NAME=value, in the environment they were started with."""
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
        wait_until(lambda: text in self.output or self.process.poll() is not None, limit, f"{text!r} in {self.output}")
        assert text in self.output, self.output


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start a command with extra environment variables; whatever of it still runs is killed after the test."""
    mark = f"FT_TEST_MARK={tmp_path}"
    started: list[Started] = []

    def run(command: list[Any], cwd: Path | None = None, **environment: str) -> Started:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FT_", "PET_", "SLURM"))}
        variables = inherited | {"FT_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
        output = tmp_path / f"output{len(started)}.txt"
        started.append(Started(list(map(str, command)), output, cwd=cwd or tmp_path, env=variables))
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
