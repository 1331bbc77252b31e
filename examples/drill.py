#!/usr/bin/env python3
"""Shows whether training comes back from what can go wrong here: one fault after the other.

    python examples/drill.py [--only FAULT ...] [-- OPTIONS OF ft_launcher.py]
    python examples/drill.py --only crash "endless loop" -- --nproc-per-node=8

Each fault meets a toy job of two ranks once, under ft_launcher.py, or autoresume.sh where it ends
the launcher too. The job uses GPUs if there is one for each rank. Seconds and steps of the table
are from the reports of the monitors:
    noticed    seconds from the fault to the end of the rank that it has met
    stacks     whether any rank has left its stacks
    restarted  seconds from there to the next attempt's first step
    lost       steps that had to be done again
    left       processes that were there after the end
    verdict    ok; or else what is wrong, and where the output is
Exit code: 0 if all is ok, or else 1.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ft_monitor  # noqa: E402  from the directory above

STEPS, SAVE_EVERY, FAULT_STEP, STEP_SECONDS = 40, 10, 17, 0.03
HANG_SECONDS = 5  # the limit of heartbeats, of the start and of the exit
RUN_SECONDS = 300.0  # how long a job may take, with its fault
GONE_SECONDS = 5.0  # how long its processes may take to be gone afterwards
OPTIONS = (
    *("--nproc-per-node=2", "--max-restarts=2", f"--ft-startup-timeout={HANG_SECONDS}"),
    *(f"--ft-rank-heartbeat-timeout={HANG_SECONDS}", f"--ft-exit-timeout={HANG_SECONDS}"),
    "--ft-rank-section-timeouts=setup:120",
)


# ---------------------------------------------------------------------------------- the toy's ranks


class Toy:
    """A rank of a job that adds up numbers of all ranks, and meets a fault once."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.checkpoint = directory / "checkpoint.json"
        self.pid, self.monitor = os.getpid(), int(os.environ["FT_MONITOR_PID"])
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.launcher = int(ft_monitor.process_status(self.monitor, "PPid"))
        self.client = ft_monitor.RankMonitorClient()
        self.is_told_to_stop = False

    def meet(self, place: str, step: int = 0) -> None:
        """The fault, if it is this rank's, of this place, and has not been there before."""
        fault, note = FAULTS[self.name], self.directory / "fault.json"
        is_here = place == fault.place and self.rank == fault.rank % self.world
        if is_here and (step >= FAULT_STEP or place in ("start", "end")) and not note.exists():
            met = {"time": time.time(), "rank": self.rank, "step": step}
            ft_monitor.write_file(note, json.dumps(met))
            fault.action(self)

    def run(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        subprocess.Popen(["sleep", "1000"], start_new_session=True)  # what must not be left behind
        self.meet("start")
        self.client.init_workload_monitoring()
        self.client.start_section("setup")
        signal.signal(signal.SIGTERM, self._note_signal)
        import torch
        import torch.distributed as dist

        on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
        dist.init_process_group("nccl" if on_gpu else "gloo")
        self._train(dist, torch.zeros(2, dtype=torch.int64, device=device))
        dist.destroy_process_group()
        self.meet("end", STEPS)

    def _train(self, dist: Any, numbers: Any) -> None:
        state = {"step": 0, "total": 0}
        if self.checkpoint.exists():
            state = json.loads(self.checkpoint.read_text())
        dist.all_reduce(numbers)  # connects
        self.client.end_section("setup")
        for step in range(state["step"] + 1, STEPS + 1):
            numbers[0], numbers[1] = step + self.rank, self.is_told_to_stop
            dist.all_reduce(numbers)
            added, stops = numbers.tolist()
            state = {"step": step, "total": state["total"] + added}
            self.client.send_heartbeat(step)
            time.sleep(STEP_SECONDS)
            if self.rank == 0 and (stops or step % SAVE_EVERY == 0):
                self._save(state)
            if stops:
                return
            self.meet("step", step)
        if self.rank == 0:
            self.client.training_complete(total=state["total"], world=self.world)

    def _note_signal(self, number: int, frame: Any) -> None:
        self.is_told_to_stop = True

    def _save(self, state: dict[str, int]) -> None:
        beside, text = self.checkpoint.with_suffix(".unfinished"), json.dumps(state)
        with open(beside, "w") as file:
            file.write(text[:5])
            file.flush()
            self.meet("save", state["step"])
            file.write(text[5:])
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.checkpoint)
        self.client.report_saved(state["step"], self.checkpoint)


# --------------------------------------------------------------------------------------- the faults


def fail(toy: Toy) -> None:
    raise RuntimeError("a drill")


def loop_for_ever(toy: Toy) -> None:
    while True:
        pass


def hold_interpreter(toy: Toy) -> None:
    """A deadlock in C code that has not released the interpreter's lock."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


def linger(toy: Toy) -> None:
    threading.Thread(target=threading.Event().wait).start()


def stall_evidence(toy: Toy) -> None:
    """The monitor's next report is opened for ever: what it writes first is a FIFO here."""
    report = Path(ft_monitor.evidence_path("json"))
    os.mkfifo(report.with_name(f".{report.name}.{os.uname().nodename}.{toy.monitor}.tmp"))
    os.abort()


def remove_evidence(toy: Toy) -> None:
    shutil.rmtree(os.environ["FT_RUN_DIR"], ignore_errors=True)
    os.abort()


def use_up_memory(toy: Toy) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bytearray(1 << 30)


def send(number: int, who: str = "pid") -> Callable[[Toy], None]:
    """Signal the rank, its monitor or the launcher."""
    return lambda toy: os.kill(getattr(toy, who), number)


@dataclasses.dataclass(frozen=True)
class Fault:
    action: Callable[[Toy], Any]
    verdict: str  # what the report must say of it, a regular expression
    place: str = "step"  # or "start", "save", "end"
    rank: int = -1  # that meets it
    ends_launcher: bool = False


KILL, TERM = signal.SIGKILL, signal.SIGTERM
FAULTS = {
    "crash": Fault(lambda toy: os.abort(), "SIGABRT"),
    "exception": Fault(fail, "RuntimeError: a drill"),
    "segmentation fault": Fault(send(signal.SIGSEGV), "SIGSEGV"),
    "stopped process": Fault(send(signal.SIGSTOP), "hung: no heartbeat"),
    "endless loop": Fault(loop_for_ever, "hung: no heartbeat"),
    "hang in C with the GIL": Fault(hold_interpreter, "hung: no heartbeat"),
    "hang at the start": Fault(loop_for_ever, "hung: no connection", "start"),
    "hang at the exit": Fault(linger, "hung: no end of the process", "end"),
    "kill amid a checkpoint": Fault(send(KILL), "SIGKILL", "save", rank=0),
    "out of memory": Fault(use_up_memory, "MemoryError"),
    "monitor killed": Fault(send(KILL, "monitor"), "its monitor"),
    "evidence stalls": Fault(stall_evidence, "rank"),
    "evidence removed": Fault(remove_evidence, "SIGABRT"),
    "launcher killed": Fault(send(KILL, "launcher"), "launcher", ends_launcher=True),
    "SIGTERM to the launcher": Fault(send(TERM, "launcher"), "SIGTERM", ends_launcher=True),
}


# ---------------------------------------------------------------------------------------- the drill

COLUMNS = ("fault", "noticed", "stacks", "restarted", "lost", "left", "verdict")


def run_job(name: str, directory: Path, options: Sequence[str]) -> int | None:
    """Run the toy to its end, and return its exit code; None if it took too long."""
    command = [sys.executable, str(ROOT / "ft_launcher.py"), f"--ft-run-dir={directory / 'runs'}"]
    command += [*OPTIONS, *options, __file__, "--rank-of", name, str(directory)]
    if FAULTS[name].ends_launcher:
        command = [str(ROOT / "autoresume.sh"), "--slurm", "loop", *command]
    flag = {ft_monitor.FLAG_VARIABLE: str(directory / "flag"), "FT_DRILL": str(directory)}
    with open(directory / "output.txt", "wb") as output:
        job = subprocess.Popen(
            command, env={**os.environ, **flag}, stdout=output, stderr=output, cwd=directory
        )
        try:
            return job.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return None


def kill_left(directory: Path) -> int:
    """How many processes of the job there still are after a while; they are killed."""
    mark, deadline = b"FT_DRILL=" + os.fsencode(directory), time.monotonic() + GONE_SECONDS
    while True:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        left = [pid for pid in pids if mark in ft_monitor.read_kernel(f"/proc/{pid}/environ")]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in left:
        ft_monitor.send(pid, signal.SIGKILL)
    return len(left)


def what_is_wrong(name: str, directory: Path, code: int | None, left: int) -> str:
    """Empty if the job has recovered as it must."""
    if code != 0:
        return f"exit code {code}" if code is not None else f"no end within {RUN_SECONDS:g} s"
    try:
        met = json.loads((directory / "fault.json").read_text())
        result = json.loads((directory / "flag").read_text())
        run_dir = min(directory.glob("runs/*_*"), key=lambda path: path.stat().st_mtime)
        first = ft_monitor.read_incidents(run_dir)[:1]  # none, if the launcher was killed
        reports = ft_monitor.read_reports(run_dir / "attempt_0")
    except (OSError, ValueError) as error:
        return str(error)
    right = sum(step + rank for step in range(1, STEPS + 1) for rank in range(result["world"]))
    if result["total"] != right:
        return f"a total of {result['total']}, not {right}"
    said = "; ".join([*(x.why for x in first), *(x.reason for x in reports if x.reason)])
    suspects = [incident.suspect for incident in first]
    if not re.search(FAULTS[name].verdict, said) or {*suspects} - {None, met["rank"]}:
        return f"the report says: {said}"
    return "processes are left" if left else ""


def drill(name: str, directory: Path, options: Sequence[str]) -> list[str]:
    """Run the toy with this fault, and return the row of the table that tells of it."""
    directory.mkdir()
    try:
        code = run_job(name, directory, options)
    finally:
        left = kill_left(directory)
    wrong = what_is_wrong(name, directory, code, left)
    verdict = f"{wrong}: see {directory}/output.txt" if wrong else "ok"
    found = filter(None, map(ft_monitor.read_reports, directory.glob("runs/*/attempt_*")))
    attempts = sorted(found, key=lambda reports: reports[0].started or 0.0)
    if not attempts or not (directory / "fault.json").exists():
        return [name, "-", "-", "-", "-", str(left), verdict]
    met = json.loads((directory / "fault.json").read_text())
    ends = {report.rank: report.ended for report in attempts[0] if report.ended}
    ended = ends.get(met["rank"], min(ends.values(), default=None))
    steps = max(met["step"], *(report.step or 0 for report in attempts[0]))
    noticed = "-" if ended is None else f"{ended - met['time']:.2f} s"
    stacks = "yes" if any(report.stacks for report in attempts[0]) else "no"
    restarted, lost = "-", "-"
    starts = [x for x in attempts[1] if x.first_heartbeat] if attempts[1:] else []
    if starts and ended is not None:
        restarted = f"{min(report.first_heartbeat or 0.0 for report in starts) - ended:.2f} s"
        lost = str(steps + 1 - min(report.first_step or 0 for report in starts))
    return [name, noticed, stacks, restarted, lost, str(left), verdict]


def print_row(cells: Sequence[str]) -> None:
    widths = (max(map(len, FAULTS)), 8, 6, 9, 4, 4, 0)
    texts = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    print(f"| {' | '.join(texts)} |", flush=True)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--rank-of"]:
        Toy(argv[1], Path(argv[2])).run()
        return 0
    ours, options = list(argv), list[str]()
    if "--" in ours:
        ours, options = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    parser = argparse.ArgumentParser(description="Let a toy job meet faults, and see it recover.")
    about = f"of {', '.join(FAULTS)}"
    parser.add_argument(
        "--only", nargs="+", choices=FAULTS, metavar="FAULT", default=[*FAULTS], help=about
    )
    args = parser.parse_args(ours)
    base = Path(tempfile.mkdtemp(prefix="ft_drill_"))
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    are_ok = []
    for name in args.only:
        row = drill(name, base / name.replace(" ", "_"), options)
        print_row(row)
        are_ok.append(row[-1] == "ok")
    if all(are_ok):
        shutil.rmtree(base, ignore_errors=True)
    return 0 if all(are_ok) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
