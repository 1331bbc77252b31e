#!/usr/bin/env python3
"""torchrun plus fault tolerance: starts the ranks of this node, each under a monitor, and restarts them when one fails.

    python ft_launcher.py --nproc-per-node=4 --max-restarts=3 --ft-rank-heartbeat-timeout=60 train.py --lr 0.1
    python ft_launcher.py --ft-status [RUN_DIR] [-w]    how the ranks of a run on this host do; -w keeps watching
    python ft_launcher.py --ft-report [RUN_DIR]         what became of each attempt, and where the time went

Takes every option of torchrun, and those that begin with --ft. What follows the script belongs to the script.

    ft_launcher.py             this program, one for each node
    └─ ft_monitor.py           one for each rank: starts it, hears its heartbeats, ends it when it hangs
       └─ python -u train.py   the rank

torch's own agent does the rendezvous, counts restarts and starts the monitors. `FaultToleranceAgent` adds what it
lacks: survivors of a failed rank are ended at once, what a killed monitor left is swept up, each end is explained.

Environment that it sets for monitors and ranks
    variable                             meaning
    FT_CONFIG                            the settings as JSON
    FT_RUN_DIR                           directory of this launcher's evidence, below --ft-run-dir
    FT_ATTEMPT                           0, 1, 2 ...: how often this launcher has started workers
    PYTHONPATH                           extended by this directory, so that ranks can import ft_callback
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE   1 unless set: ranks that are restarted get a store of their own

Files in FT_RUN_DIR
    attempt_<n>/rank<N>.json        the monitor's report of a rank
    attempt_<n>/rank<N>.stacks.txt  the rank's stacks
    latest                          link to the newest attempt
    incidents.jsonl                 one line for each attempt that has ended
    progress.json                   the newest checkpoint, by the callback
    logs/                           torchrun's --log-dir, unless it is given

What nodes tell each other, in the store of each round of the rendezvous
    ft_over, ft_heard<N>  the job is over, and why, or that restarts are used up; node N has heard of it
    ft_failed             ranks have failed, and not just nodes joined: this counts as an attempt
    ft_left               a node has left, the others start again without it

When it does not restart, although restarts are left
    --ft-max-no-progress-cycles attempts in a row have saved no new checkpoint
    the same exception came from the same line twice, with no new step in between: a bug in the code
    a rank asked for the shutdown of the workload, or to leave this node out

Exit codes
    0      the workers ended well, or failed when training was complete, or other nodes go on without this one
    1      they failed, and the restarts are used up, or the nodes lost each other
    2      wrong usage; nothing was started
    93     do not run this again; the reason is in the file $FAULT_TOL_FINISHED_FLAG_FILE.gave_up
    128+N  ended by signal N
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib
import importlib.machinery
import json
import linecache
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import ft_monitor
from ft_monitor import ConfigError, FaultToleranceConfig


def ignore_user_signals() -> None:
    """Schedulers send them to every process, and by default they end it."""
    for number in ft_monitor.PASSED_ON_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    ignore_user_signals()  # torch takes seconds to import

import torch.distributed.launcher.api
import torch.distributed.run
from torch.distributed.argparse_util import env
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events import get_logging_handler
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    dynamic_rendezvous,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

EXIT_FAILED = 1
EXIT_GAVE_UP = 93
HEALTH_CHECK_SECONDS = 60.0  # how long a health check of the node may take
FLAG_VARIABLE = "FAULT_TOL_FINISHED_FLAG_FILE"
RENDEZVOUS_TRIES = 3  # for a node that is lost as the nodes meet
LISTEN_SECONDS = 1.0  # between looks for what other nodes tell
HEAR_SECONDS = 5.0  # how long the node that ends a job waits for the others to hear of it
# Keys in the store of a round, by which nodes tell each other that ...
OVER, HEARD = "ft_over", "ft_heard"  # the job is over, and why; this node, whose rank follows, has heard that
FAILED = "ft_failed"  # ranks have failed, and not just nodes joined
LEFT = "ft_left"  # a node has left the job, and why
OF_OTHERS = "another node's workers failed, or nodes joined"
STOP_MARGIN_SECONDS = 20.0  # what a monitor may take after its rank's grace: SIGKILL, reaping, report
MAX_PLACES = 4  # in a verdict, which must fit a screen
MAX_COLUMNS = 100  # of a report, where no terminal says otherwise
SHOW_FLAGS = ("--ft-status", "--ft-report")
STOPPED = "stopped by"  # begins the verdict on an attempt that was told to end
ELSEWHERE = "this node's ranks wait for another node's: see the verdict of that node's launcher"

# What c10d, gloo and NCCL raise when another rank is gone or does not come; not what a rank's own connections do,
# nor what a DataLoader worker does, whose error torch raises as a RuntimeError too.
COMMUNICATION_ERROR = re.compile(
    r"Dist\w*Error\b|RuntimeError: (?!Caught ).*"
    r"(gloo|nccl|c10d|TCPStore|ProcessGroup|monitoredBarrier|connectFullMesh|Socket Timeout|closed by peer)",
    re.IGNORECASE,
)

# What may go away on another node, or by itself: not the code's fault.
INFRASTRUCTURE_ERROR = re.compile(
    rf"{COMMUNICATION_ERROR.pattern}|\b(connection(\w*error)?|\w*timeout(error)?|timed? out|broken pipe|CUDA error|"
    r"CUDNN\w*|ECC|Input/output|Stale file|No space|quota)\b",
    re.IGNORECASE,
)

# Work.wait() and what waits for a device are C code without a frame: the line that calls them is the innermost.
WAITING_CALL = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")

log = logging.getLogger("ft_launcher")


# -------------------------------------------------------------------------------------- what happened, from reports

Report = dict[str, Any]  # what a monitor writes: see RankMonitor.report
Incident = dict[str, Any]  # how an attempt ended: see incident()


class Place(NamedTuple):
    """Where a rank's main thread was: the innermost line that is not a library's, and the innermost function."""

    file: str
    line: int
    function: str
    leaf: str
    waits: bool  # for other ranks, as far as one can tell

    def __str__(self) -> str:
        leaf = "" if self.leaf == self.function else f" -> {self.leaf}"
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}{leaf}"


def read_reports(directory: Path, level: int = logging.WARNING) -> list[Report]:
    """The monitors' reports of one attempt, in the order of ranks; what cannot be read costs a line, and is missing."""
    reports = []
    for path in directory.glob("rank*.json"):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            reports.append(with_gaps(report, rank=int(report["rank"])))
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.log(level, "cannot read the report %s: %s", path, error)
    return sorted(reports, key=lambda report: report["rank"])


def with_gaps(values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What was read from a file: what is not there is None."""
    return collections.defaultdict(lambda: None, values, **more)


def report_of_failure(rank: int, failure: ProcessFailure) -> Report:
    """What torch knows of a rank that failed and whose report is missing."""
    pid, status = failure.pid, failure.exitcode
    log.warning("rank %d: its report is missing; its monitor (pid %d) ended with status %d", rank, pid, status)
    return with_gaps({}, rank=rank, monitor_pid=pid, status=status, ended=float(failure.timestamp))


def read_places(directory: Path, reports: Sequence[Report]) -> dict[int, Place]:
    """Where ranks were when they did not go on, by rank; stacks from before their last sign do not count."""
    places = {}
    for report in reports:
        last_sign = max(report["heartbeat"] or 0.0, report["error_time"] or 0.0)
        place = read_place(directory / f"rank{report['rank']}.stacks.txt", last_sign)
        if place is not None:
            places[report["rank"]] = place
    return places


def read_place(path: Path, since: float = 0.0) -> Place | None:
    """The place of the main thread in the last stacks of a file that show a line of the user's, or else in the last.

    Stacks from before `since`, in seconds since the epoch, do not count.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    _, *parts = re.split(rf"^{ft_monitor.STACKS_HEADER} (\d+\.\d+) .*\n", text, flags=re.MULTILINE)
    times, texts = parts[::2], parts[1::2]
    dumps = [main_thread_frames(text) for when, text in zip(times, texts, strict=True) if float(when) >= since]
    dumps = [frames for frames in dumps if frames]
    # A rank that is about to end, since its peer did, shows nothing but libraries.
    users = [frames for frames in dumps if not all(ft_monitor.is_library(file) for file, _, _ in frames)]
    if not dumps:
        return None
    frames = (users or dumps)[-1]
    file, line, function = next((frame for frame in frames if not ft_monitor.is_library(frame[0])), frames[-1])
    return Place(file, int(line), function, frames[0][2], waits_for_others(*frames[0]))


def waits_for_others(file: str, line: str, function: str) -> bool:
    """Whether the innermost line of a stack waits for other ranks, or for a device that does."""
    if "/torch/distributed/" in file or "/torch/nn/parallel/" in file or function == "_engine_run_backward":
        return True
    linecache.checkcache(file)  # it may have been edited between two attempts
    return bool(WAITING_CALL.search(linecache.getline(file, int(line))))


def main_thread_frames(dump: str) -> list[tuple[str, str, str]]:
    """(file, line, function) of the main thread, innermost first. It is the oldest, which faulthandler puts last."""
    if re.search(r"^\.\.\.$", dump, re.MULTILINE):
        return []  # more threads than faulthandler writes
    threads = re.split(r"^(?:Current thread|Thread) 0x", dump, flags=re.MULTILINE)
    return re.findall(r'File "(.+)", line (\d+) in (.+)', threads[-1])


def failed_by_itself(report: Report) -> bool:
    """Whether a rank raised, crashed or lost its monitor, whatever was done to it afterwards."""
    crashed = report["stopped"] is None and report["status"] != 0
    return report["error"] is not None or report["ended"] is None or crashed


def failure_time(report: Report) -> float:
    """When a rank failed; for one whose monitor was killed, when it was last heard of."""
    return float(report["error_time"] or report["ended"] or report["heartbeat"] or report["started"] or 0.0)


def without_place(error: str | None) -> str:
    """What an error says, without the file and function that it came from: their names say nothing of its kind."""
    return re.sub(r" \([^()]*:\d+ in [^()]*\)$", "", error or "")


def find_suspect(
    reports: Sequence[Report], places: Mapping[int, Place], world: int | None = None
) -> tuple[Report, bool] | None:
    """The rank that failed first or fell behind first, and whether that is certain; not merely the first one ended.

    None where no report tells, or where all wait for ranks that are not among the `world` ranks here, by default all.
    """
    failed = [report for report in reports if failed_by_itself(report)]
    # What a rank raises when it waits for one that is gone, or does not come, tells nothing of that one.
    own = [report for report in failed if not COMMUNICATION_ERROR.match(without_place(report["error"]))]
    if own:
        return min(own, key=failure_time), True
    all_here = world is None or len(reports) >= world
    others = [report for report in reports if report not in failed]
    # Those who wait for others are not the ones that were waited for.
    idle = [report for report in others if not is_waiting(report, places)]
    if not reports or not (idle or all_here):
        return None
    if not failed:
        suspect, certain = fell_behind(others, places)
        return suspect, certain and all_here
    suspect = fell_behind(idle, places)[0] if idle else min(failed, key=failure_time)
    return suspect, len(reports) == 1 and all_here


def is_waiting(report: Report, places: Mapping[int, Place]) -> bool:
    """Whether a rank waits for others, as far as one can tell: one that gave no stacks may do anything."""
    return report["rank"] in places and places[report["rank"]].waits


def fell_behind(reports: Sequence[Report], places: Mapping[int, Place]) -> tuple[Report, bool]:
    """Of ranks that hang, or wait for one that does: who is stopped, at the lowest step, not connected, does not wait,
    is silent for longest, or odd."""
    stopped = [report for report in reports if (report["state"] or {}).get("state") == "T"]
    if stopped:
        return stopped[0], len(stopped) == 1
    lowest = min(-1 if report["step"] is None else report["step"] for report in reports)
    left = [report for report in reports if (-1 if report["step"] is None else report["step"]) == lowest]
    if len(left) == 1:
        return left[0], True
    left = [report for report in left if report["connected"] is None] or left
    left = [report for report in left if not is_waiting(report, places)] or left
    newest = max(report["heartbeat"] or 0.0 for report in left)
    left = [report for report in left if (report["heartbeat"] or 0.0) < newest - 1.0] or left
    crowd = collections.Counter(places.get(report["rank"]) for report in left)
    return min(left, key=lambda report: crowd[places.get(report["rank"])]), len(reports) == 1


def describe_failure(report: Report) -> str:
    """What was wrong with a rank, in one sentence."""
    # Without a report, see report_of_failure(), the pid of its monitor is all that is known.
    pid = f"its monitor's pid {report['monitor_pid']}" if report["pid"] is None else f"pid {report['pid']}"
    who = f"rank {report['rank']} ({pid})"
    if report["error"] is not None:
        return f"{who} failed: {' '.join(str(report['error']).split())[:400]}"
    if report["ended"] is None:
        return f"{who}: its monitor (pid {report['monitor_pid']}) was killed, and the rank with it"
    if report["verdict"]:
        return f"{who} {report['stopped']}"
    if report["stopped"] is not None:
        what = "connection" if report["connected"] is None else "heartbeat"
        since = report["heartbeat"] or report["connected"] or report["started"] or report["ended"]
        return f"{who} did not go on: no {what} for {report['ended'] - since:.1f} s"
    return f"{who} {describe_status(report)}"


def describe_status(report: Report) -> str:
    """How a rank ended that nobody here has stopped."""
    status = report["status"] or 0
    if status == 0:
        return "ended with exit code 0, while others went on"
    if status > 0:
        early = " before it connected: see its output above" if report["pid"] and report["connected"] is None else ""
        return f"ended with exit code {status}{early}"
    if -status != signal.SIGKILL:
        return f"ended by {signal_name(-status)}"
    memory = f": out of memory, the kernel's count of such kills rose by {report['oom_kills']}"
    return f"ended by SIGKILL, which nobody here sent{memory if report['oom_kills'] else ' (out of memory?)'}"


def describe_end(suspect: Report | None, reports: Sequence[Report]) -> str | None:
    """The verdict on an attempt that failed: what was wrong with the suspect, and what another rank noticed of it."""
    if suspect is not None and failed_by_itself(suspect):
        return describe_failure(suspect)
    noticed = [describe_failure(report) for report in reports if failed_by_itself(report)]
    if suspect is not None:
        return "; ".join([describe_failure(suspect), *noticed[:1]])
    noticed += [describe_failure(report) for report in reports if report["verdict"]]
    return "; ".join([ELSEWHERE, *noticed[:1]]) if reports else None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time signal


def is_failure(verdict: str | None) -> bool:
    """Whether an attempt failed: it neither ended well nor was told to end."""
    return verdict is not None and not verdict.startswith(STOPPED)


def describe_places(suspect: int | None, places: Mapping[int, Place], silent: Mapping[int, str] | None = None) -> str:
    """Where the ranks were, in one line: the suspect first, then those who were at the same place together.

    `silent`: the states of ranks that were asked for their stacks and did not answer.
    """
    parts = [] if suspect is None or suspect not in places else [f"rank {suspect} is at {places[suspect]}"]
    for state, ranks in gather(silent or {}):
        parts.append(f"{ranks_text(ranks)} gave no stacks (state {state})")
    groups = gather({rank: place for rank, place in places.items() if rank != suspect})
    for place, ranks in groups[:MAX_PLACES]:
        verb = ("waits" if len(ranks) == 1 else "wait") if place.waits else ("is" if len(ranks) == 1 else "are")
        parts.append(f"{ranks_text(ranks)} {verb} at {place}")
    if len(groups) > MAX_PLACES:
        parts.append(f"{len(groups) - MAX_PLACES} more places")
    return "; ".join(parts)


def silent_ranks(reports: Sequence[Report], places: Mapping[int, Place]) -> dict[int, str]:
    """The ranks that were asked for their stacks and gave none, with the states of their processes.

    Not those that have raised: a process that ends answers no more.
    """
    asked = [report for report in reports if report["stacks"] is False and report["error"] is None]
    silent = [report for report in asked if report["rank"] not in places]
    return {report["rank"]: (report["state"] or {}).get("state", "unknown") for report in silent}


def gather(what: Mapping[int, Any]) -> list[tuple[Any, list[int]]]:
    """What ranks have in common, and which ranks; the largest group first."""
    groups = collections.defaultdict(list)
    for rank, value in what.items():
        groups[value].append(rank)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def ranks_text(ranks: Iterable[int]) -> str:
    """rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"


def duration(seconds: float) -> str:
    """8.1 s; 14 m 31 s; 3 h 02 m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def incident(
    attempt: int,
    start: float,
    reports: Sequence[Report],
    places: Mapping[int, Place],
    stopped: str | None,
    *,
    world: int | None = None,
    previous_end: float | None = None,
    now: float | None = None,
) -> Incident:
    """One line of incidents.jsonl. Times are seconds since the epoch; steps are the training's.

    `stopped`: why all ranks were stopped, where that was not for a failure of one of them; `world`: the number of
    ranks on all nodes; `now`: the end, where no report tells of one.
    """
    well = stopped is not None or all(report["status"] == 0 for report in reports)
    suspect, certain = (None if well else find_suspect(reports, places, world)) or (None, True)
    verdict = stopped if well else describe_end(suspect, reports)
    # Where ranks waited for one, no step was made after its last heartbeat.
    last = min((r["heartbeat"] for r in reports if r["heartbeat"]), default=None)
    end = max((r["ended"] for r in reports if r["ended"]), default=now or time.time())
    suspect_rank = None if suspect is None else suspect["rank"]
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "start": start,
        "first_heartbeat": min((r["first_heartbeat"] for r in reports if r["first_heartbeat"]), default=None),
        "last_heartbeat": last,
        "end": end,
        "detection": end - last if last is not None and is_failure(verdict) else None,
        "restart": None if previous_end is None else start - previous_end,
        "first_step": min((r["first_step"] for r in reports if r["first_step"] is not None), default=None),
        "last_step": max((r["step"] for r in reports if r["step"] is not None), default=None),
        "saved_step": max((r["saved"] for r in reports if r["saved"] is not None), default=None),
        "statuses": {str(r["rank"]): r["status"] for r in reports},
        "connected": any(r["connected"] for r in reports),
        "requests": [r["request"] for r in reports if r["request"]],
        "suspect": suspect_rank,
        "error": None if suspect is None else suspect["error"],
        "certain": certain,
        "verdict": verdict,
        "ranks_at": "" if well else describe_places(suspect_rank, places, silent_ranks(reports, places)),
    }


# ------------------------------------------------------------------------------------------ where the time went


def read_incidents(run_dir: Path) -> list[Incident]:
    incidents = []
    path = run_dir / "incidents.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and {"attempt", "start", "end"} <= set(entry):
            incidents.append(with_gaps(entry))
        else:
            log.warning("skipped a line of %s that tells of no attempt", path)
    return incidents


class TimeSpent(NamedTuple):
    """Where the wall time of a run went, in seconds; `repeated` counts steps that did not count."""

    total: float
    counted: float  # steps whose results are part of the training
    lost: float  # steps that were done again, or never saved
    detection: float  # from the last heartbeat of an attempt that failed to its end
    restart: float  # from the end of an attempt to the start of the next
    setup: float  # from a start to its first heartbeat, and from the last heartbeat to the end of one that did not fail
    repeated: int


def time_spent(incidents: Sequence[Mapping[str, Any]]) -> TimeSpent:
    counted = lost = detection = restart = setup = 0.0
    repeated = 0
    for index, this in enumerate(incidents):
        following = incidents[index + 1] if index + 1 < len(incidents) else None
        first, last = this["first_heartbeat"], this["last_heartbeat"]
        setup += (first or this["end"]) - this["start"]
        restart += following["start"] - this["end"] if following else 0.0
        if first is None or last is None:
            continue
        begin, end = this["first_step"] or 0, this["last_step"] or 0
        steps = kept = end - begin
        later = [row["first_step"] for row in incidents[index + 1 :] if row["first_step"] is not None]
        if later or this["verdict"] is not None:  # of what failed, that counts which was saved, or gone on from
            kept = min(max((min(later) if later else this["saved_step"] or 0) - begin, 0), steps)
        detected = this["detection"] or 0.0
        share = kept / steps if steps else float(not detected)
        counted += (last - first) * share
        lost += (last - first) * (1 - share)
        detection += detected
        setup += this["end"] - last - detected
        repeated += steps - kept
    total = incidents[-1]["end"] - incidents[0]["start"] if incidents else 0.0
    return TimeSpent(total, counted, lost, detection, restart, setup, repeated)


def render_report(incidents: Sequence[Incident], width: int = MAX_COLUMNS, colour: bool = False) -> str:
    """What became of each attempt, and where the time went, in lines of at most `width`. Failures are red in colour."""
    lines = [f"{'attempt':>7}  {'started':<8}  {'ran':>10}  {'steps':>15}  {'saved':>7}  why it ended"]
    for row in incidents:
        red = colour and row["verdict"]
        lines += [f"\033[31m{line}\033[0m" if red else line for line in render_incident(row, width)]
    spent = time_spent(incidents)
    share = 100 * spent.counted / spent.total if spent.total else 0.0
    goodput = f"goodput {share:.1f} %: {duration(spent.counted)} of {duration(spent.total)}"
    lost = (
        f"lost: {duration(spent.setup)} set-up, {duration(spent.lost)} in {spent.repeated} steps repeated or unsaved, "
        f"{duration(spent.detection)} detection, {duration(spent.restart)} restart"
    )
    return "\n".join([*lines, *wrap(f"{goodput} wall time in steps that counted", width, ""), *wrap(lost, width, "")])


def render_incident(row: Incident, width: int) -> list[str]:
    """A row, and below it what does not fit."""
    started = time.strftime("%H:%M:%S", time.localtime(row["start"]))
    steps = "none" if row["last_step"] is None else f"{row['first_step']}-{row['last_step']}"
    saved = "-" if row["saved_step"] is None else row["saved_step"]
    ran = duration(row["end"] - row["start"])
    text = f"{row['attempt']:>7}  {started:<8}  {ran:>10}  {steps:>15}  {saved:>7}"
    guess = "suspect: " if row["certain"] is False else ""
    why, indent = f"{guess}{row['verdict'] or 'ended well'}", " " * 9
    fits = len(f"{text}  {why}") <= width
    rows = [f"{text}  {why}"] if fits else [text, *wrap(why, width, indent)]
    return rows + wrap(row["ranks_at"] or "", width, indent)


def wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=f"{indent}  ")


def line_width(stream: TextIO) -> int:
    """How long a line may be: as the terminal, if it is one."""
    return shutil.get_terminal_size((MAX_COLUMNS, 24)).columns if stream.isatty() else MAX_COLUMNS


def render_status(reports: Sequence[Report], now: float) -> str:
    """A row for each rank of an attempt that runs: the age of its last heartbeat, and the clock that is in force."""
    head = f"{'rank':>4}  {'pid':>8}  {'attempt':>7}  {'step':>10}  {'heartbeat':>9}  {'clock':>9}  {'limit':>8}  phase"
    lines = [head]
    for report in reports:
        over = report["ended"] or is_gone(report, "monitor_pid")
        clock = {} if over else report["clock"] or {}
        beat = "-" if over or report["heartbeat"] is None else f"{now - report['heartbeat']:.1f} s"
        age = f"{now - clock['since']:.1f} s" if clock else "-"
        limit = "none" if clock.get("limit") is None else f"{clock['limit']:g} s"
        pid, attempt, step = ("-" if report[name] is None else report[name] for name in ("pid", "attempt", "step"))
        row = f"{report['rank']:>4}  {pid:>8}  {attempt:>7}  {step:>10}  {beat:>9}  {age:>9}  {limit:>8}"
        setting = f" ({clock['setting']})" if clock else ""
        lines.append(f"{row}  {phase(report)}{setting}")
    return "\n".join(lines)


def phase(report: Report) -> str:
    if report["ended"]:
        return report["stopped"] or f"ended with status {report['status']}"
    if is_gone(report, "monitor_pid"):
        return "gone"
    if report["error"] is not None:
        return f"failed: {report['error']}"
    if report["over"]:
        return "after training"
    if report["sections"]:
        return f"in {', '.join(report['sections'])}"
    if report["heartbeat"]:
        return "training"
    return "set-up" if report["connected"] else "starting"


def is_gone(report: Report, process: str) -> bool:
    """Whether a process that a report names, on this host, exists no more."""
    return report["host"] == socket.gethostname() and not os.path.exists(f"/proc/{report[process]}")


def find_run_dir(path: Path) -> Path:
    """`path` if it is a run directory, else the newest one below it. Raises ConfigError when there is none."""
    if (path / "latest").is_symlink():
        return path
    runs = sorted(path.glob("*/latest"), key=lambda link: link.lstat().st_mtime)
    if not runs:
        raise ConfigError(f"no run found in {str(path)!r}: give the directory that ft_launcher prints as evidence")
    return runs[-1].parent


def ended_with_its_launcher(run_dir: Path, noted: Sequence[Incident]) -> list[Incident]:
    """The newest attempt, if its launcher was killed and could not write down how it ended."""
    reports = read_reports(run_dir / "latest")
    if not reports or not all(is_gone(report, "launcher_pid") for report in reports):
        return []
    attempt = int(reports[0]["attempt"] or 0)
    if attempt in [row["attempt"] for row in noted]:
        return []
    start = min(report["started"] or math.inf for report in reports)
    last_sign = max(report["heartbeat"] or report["started"] or 0.0 for report in reports)
    previous_end = noted[-1]["end"] if noted else None
    why = "its launcher was killed"
    return [with_gaps(incident(attempt, start, reports, {}, why, previous_end=previous_end, now=last_sign))]


def show(argv: Sequence[str]) -> int:
    """--ft-status and --ft-report."""
    parser = argparse.ArgumentParser(prog="ft_launcher.py", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    for flag in SHOW_FLAGS:
        what.add_argument(flag, flag.replace("-ft-", "-ft_"), metavar="RUN_DIR", nargs="?", const="")
    parser.add_argument("-w", "--watch", action="store_true", help="show the status again every second")
    default = os.environ.get("PET_FT_RUN_DIR") or default_run_dir()
    parser.add_argument("--ft-run-dir", "--ft_run_dir", metavar="DIR", default=default)
    args = parser.parse_args(argv)
    path = Path(args.ft_status or args.ft_report or args.ft_run_dir)
    try:
        if args.ft_report is not None:
            print(report_of_run(find_run_dir(path)))
            return 0
        while True:
            clear = "\033[H\033[J" if args.watch and sys.stdout.isatty() else ""
            run_dir = find_run_dir(path)
            print(f"{clear}{run_dir}\n{render_status(read_reports(run_dir / 'latest'), time.time())}", flush=True)
            if not args.watch:
                return 0
            time.sleep(1.0)
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # its reader has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the interpreter flushes what is left
        return 0
    except OSError as error:
        parser.error(f"cannot read {error.filename!r}: {error.strerror}")


def report_of_run(run_dir: Path) -> str:
    incidents = read_incidents(run_dir)
    incidents += ended_with_its_launcher(run_dir, incidents)
    if not incidents:
        raise ConfigError(f"no attempt of {str(run_dir)!r} has ended yet: see --ft-status")
    return f"{run_dir}\n{render_report(incidents, line_width(sys.stdout), colour=sys.stdout.isatty())}"


def asks_to_look(argv: Sequence[str]) -> bool:
    """Whether show() is meant: one of its flags stands before anything that it does not know, such as a script."""
    words = iter(argv)
    for word in words:
        name, _, value = word.replace("_", "-").partition("=")
        if name in SHOW_FLAGS:
            return True
        if name == "--ft-run-dir" and not value:
            next(words, None)
        elif name not in ("-w", "--watch", "--ft-run-dir"):
            return False
    return False


# ------------------------------------------------------------------------------------------------ whether to go on


class RestartPolicy:
    """Decides from how the attempts of this launcher ended whether one more makes sense. No I/O."""

    def __init__(self, max_no_progress: int) -> None:
        self.max_no_progress = max_no_progress  # attempts in a row; 0 is no limit
        self.no_progress = 0  # attempts in a row, so far
        self.connected = False  # whether a rank ever was
        self.saved: int | None = None  # step of the newest checkpoint
        self.step: int | None = None  # the highest that any attempt reached
        self.error: str | None = None  # what ended the last attempt, and its line

    def why_not(
        self, entry: Mapping[str, Any], requests: Sequence[Mapping[str, str]], knows_saves: bool = True
    ) -> str | None:
        """Why not to restart after the attempt of this incident; None to restart.

        `knows_saves`: whether this node hears of checkpoints, as only that of global rank 0 does.
        """
        shutdown = shutdown_request(requests)
        if shutdown:
            return shutdown
        new_checkpoint = is_newer(entry["saved_step"], self.saved)
        new_step = is_newer(entry["last_step"], self.step)
        # Loops that do not report their checkpoints still show that they resumed, by getting further.
        progress = new_checkpoint or (self.saved is None and self.step is not None and new_step)
        error = entry["error"] if not INFRASTRUCTURE_ERROR.search(without_place(entry["error"])) else None
        same_error = error is not None and without_numbers(error) == without_numbers(self.error)
        self.connected |= entry["connected"]
        self.saved = entry["saved_step"] if new_checkpoint else self.saved
        self.step = entry["last_step"] if new_step else self.step
        self.error = error
        # Of ranks that never connect nothing is known; --max-restarts counts their attempts.
        self.no_progress = 0 if progress or not self.connected else self.no_progress + 1
        if same_error and not (new_step or new_checkpoint):
            return f"a bug in the code, no new step since the last attempt and the same error: {error}"
        if knows_saves and not requests and 0 < self.max_no_progress <= self.no_progress:
            return f"no progress, {self.no_progress} attempts in a row saved no new checkpoint"
        return None


def shutdown_request(requests: Sequence[Mapping[str, str]]) -> str | None:
    reasons = [request["reason"] for request in requests if request["action"] == "ShutdownWorkload"]
    return f"a rank asked for it: {reasons[0]}" if reasons else None


def without_numbers(error: str | None) -> str:
    """An error with its place, whatever addresses and sizes it tells of this time."""
    message = without_place(error)
    return re.sub(r"0x[0-9a-f]+|\d+", "#", message) + (error or "").removeprefix(message)


def is_newer(step: int | None, than: int | None) -> bool:
    return step is not None and (than is None or step > than)


class NodeLeft(Exception):
    """This node takes no further part; the others may go on without it."""


class GaveUp(Exception):
    """No node is to run this job again; the message says why."""


@dataclasses.dataclass
class Job:
    """What the launcher tells its agent, and what it learns from it."""

    run_dir: Path
    policy: RestartPolicy
    workers_stop_timeout: float  # seconds
    health_check: str | None = None  # a shell command
    flag: str | None = None  # the finished flag, unless there was one at the start


# ----------------------------------------------------------------------------------------------------- agent


class FaultToleranceAgent(LocalElasticAgent):
    """torch's agent for the workers of this node, with a monitor between itself and every worker.

    A worker, for torch, is a monitor here: it has the rank's exit code or signal and ends after it.
    """

    def __init__(self, job: Job, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._job = job
        self._run_dir = job.run_dir
        self._attempt = -1
        self._started = 0.0  # the newest attempt, wall clock
        self._noted = -1  # the newest attempt that is in incidents.jsonl
        self._ended: float | None = None  # that attempt, wall clock
        spec = self._worker_group.spec
        command = rank_command(spec.entrypoint, spec.args)
        # -I -S: quick to start, and nothing of the user's is imported instead of a standard module of the same name.
        monitor = ["-I", "-S", ft_monitor.__file__, f"--parent-pid={os.getpid()}"]
        self._passed_on = set(ft_monitor.PASSED_ON_SIGNALS) - signals_to_handle()
        for number in self._passed_on:
            signal.signal(number, self._pass_on)
        spec.entrypoint = sys.executable
        spec.args = (*monitor, f"--shutdown-timeout={self._shutdown_timeout}", "--", *command)
        self._listened = 0.0  # when this node last looked for what others tell, monotonic
        self._is_left = False  # whether another node has left this round
        waiting = spec.rdzv_handler.num_nodes_waiting  # what torch restarts the workers for
        spec.rdzv_handler.num_nodes_waiting = lambda: waiting() or int(self._is_left)  # type: ignore[method-assign]

    def run(self, *args: Any, **kwargs: Any) -> RunResult:
        try:
            result = super().run(*args, **kwargs)
        except RendezvousError:
            self._end_if_over()  # may be why the rendezvous is closed
            raise
        if result is None:  # torch's answer to a rendezvous that went on, or was closed, without this node
            raise NodeLeft("the rendezvous does not need this node")
        return result

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._job.health_check:
            problem = check_node(self._job.health_check)
            if problem:
                self._leave(f"the health check of this node failed: {problem}")
        for left in reversed(range(RENDEZVOUS_TRIES)):
            try:
                super()._rendezvous(worker_group)
                break
            except torch.distributed.DistStoreError:
                if not left:
                    raise
                log.warning("a node was lost as the nodes met: meeting again")
        self._is_left = False

    def _leave(self, reason: str) -> None:
        """Take this node out of the job. torch closes the rendezvous for all nodes when an agent ends: not now."""
        handler = self._worker_group.spec.rdzv_handler
        handler.shutdown = lambda: True  # type: ignore[method-assign]
        self._worker_group.state = WorkerState.FAILED  # and not to be stopped gracefully
        self._tell(LEFT, reason)
        leave_rendezvous(handler)
        raise NodeLeft(reason)

    # -- what nodes tell each other, in the store of the round, which is theirs alone

    def _tell(self, key: str, text: str) -> None:
        store: Any = self._store
        try:
            if store is not None:
                store.set(key, text)
        except (torch.distributed.DistError, RuntimeError) as error:
            log.debug("cannot tell the other nodes: %s", error)

    def _told(self, key: str) -> str | None:
        store: Any = self._store
        try:
            return store.get(key).decode() if store is not None and store.check([key]) else None
        except (torch.distributed.DistError, RuntimeError):
            return None  # the node of the store is lost, which torch notices

    def _listen(self) -> None:
        """While the ranks here run: they may wait for those of a node that has ended the job, or left it."""
        if time.monotonic() >= self._listened + LISTEN_SECONDS:
            self._listened = time.monotonic()
            self._is_left = self._told(LEFT) is not None
            self._end_if_over()

    def _end_if_over(self) -> None:
        """End as another node has, if it has. An empty reason is that of restarts which are used up."""
        reason = self._told(OVER)
        if reason is None:
            return
        self._tell(f"{HEARD}{self._worker_group.group_rank}", "")
        if self._pcontext is not None:
            self._pcontext.close()
        self._worker_group.state = WorkerState.FAILED
        self._note_incident("another node has ended the job")
        raise GaveUp(reason) if reason else RendezvousClosedError("another node has used up its restarts")

    def _end_job(self, reason: str) -> None:
        """End it on all nodes; this one may be that of the store, and waits until the others have heard."""
        self._worker_group.state = WorkerState.FAILED
        self._tell(OVER, reason)
        others = set(range(self._worker_group.group_world_size or 1)) - {self._worker_group.group_rank}
        deadline = time.monotonic() + HEAR_SECONDS
        while time.monotonic() < deadline and any(self._told(f"{HEARD}{other}") is None for other in others):
            time.sleep(0.1)
        if reason:
            raise GaveUp(reason)

    # -- attempts

    def _pass_on(self, number: int, frame: Any) -> None:
        """SIGUSR1 and SIGUSR2, which schedulers send to every process, end nothing here: the ranks may know them."""
        for pid in self._pcontext.pids().values() if self._pcontext is not None else []:
            ft_monitor.signal_process(pid, number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        self._started = time.time()
        self._attempt_dir.mkdir(parents=True, exist_ok=True)
        point_link(self._run_dir / "latest", self._attempt_dir.name)
        os.environ["FT_ATTEMPT"] = str(self._attempt)
        for number in self._passed_on:
            signal.signal(number, signal.SIG_IGN)  # and so by the monitors, until they have handlers
        ids = super()._start_workers(worker_group)
        for number in self._passed_on:
            signal.signal(number, self._pass_on)
        assert self._pcontext is not None
        # torch calls close() without a signal when a worker has failed: it would ask the survivors to end and wait
        # 30 s for them, but they can only wait for a rank that is gone.
        self._pcontext.close = functools.partial(self._close, self._pcontext.close)  # type: ignore[method-assign]
        return ids

    def _close(
        self, close: Callable[[signal.Signals, int], None], death_sig: signal.Signals | None = None, timeout: int = 30
    ) -> None:
        if death_sig is None:
            death_sig, timeout = ft_monitor.PEER_FAILED, int(self._job.workers_stop_timeout + STOP_MARGIN_SECONDS)
        for pid in self._pcontext.pids().values() if self._pcontext is not None else []:
            ft_monitor.signal_process(pid, signal.SIGCONT)  # a monitor that is stopped hears nothing else
        close(death_sig, timeout)
        self._sweep()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            self._listen()
        elif result.state == WorkerState.SUCCEEDED:
            reason = shutdown_request(self._requests())
            if reason and not self._is_complete():
                self._end_job(reason)
        elif self._is_complete():
            log.warning("ranks failed, but training is complete: %s exists", self._job.flag)
            return RunResult(WorkerState.SUCCEEDED, dict.fromkeys(w.global_rank for w in worker_group.workers))
        else:
            self._decide(result.failures)
        return result

    def _is_complete(self) -> bool:
        return self._job.flag is not None and os.path.exists(self._job.flag)

    def _requests(self) -> list[dict[str, str]]:
        return [report["request"] for report in read_reports(self._attempt_dir) if report["request"]]

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        """Called before every restart, also when this node's workers are well and another node's failed."""
        if self._pcontext is not None:
            self._pcontext.close()
        self._decide(None)
        super()._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30, **kwargs: Any) -> None:
        """Called at the end alone: stop the workers if they still run, and give them their grace."""
        # From here every wait is bounded, and a second signal would only leave workers behind.
        for number in (*ft_monitor.STOP_SIGNALS, *ft_monitor.PASSED_ON_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
        stopped = None
        if self._pcontext is not None and self._worker_group.state == WorkerState.HEALTHY:
            stopped = f"{STOPPED} {death_sig.name}"
            log.warning("passing %s on to the ranks; they have %s s to end", death_sig.name, timeout)
        super()._shutdown(death_sig, timeout + int(STOP_MARGIN_SECONDS), **kwargs)
        self._note_incident(stopped)
        incidents = read_incidents(self._run_dir)
        if len(incidents) > 1 or any(is_failure(row["verdict"]) for row in incidents):
            width = line_width(sys.stderr) - len("[ft_launcher] ")
            log.info("%s", render_report(incidents, width, colour=sys.stderr.isatty()))

    def _world(self) -> int:
        """The number of ranks on all nodes."""
        return int(self._worker_group.workers[0].world_size)

    @property
    def _attempt_dir(self) -> Path:
        return self._run_dir / f"attempt_{self._attempt}"

    def _sweep(self) -> None:
        """End what ranks have left behind whose monitor was killed before it could do so."""
        for report in read_reports(self._attempt_dir, logging.DEBUG) if self._attempt >= 0 else []:
            if report["ended"] is None and self._is_ours(report["pid"]):
                ft_monitor.kill_session(report["pid"])

    def _is_ours(self, session: int) -> bool:
        """Whether a session is one of this launcher's ranks: the kernel gives numbers out again."""
        mark = b"FT_RUN_DIR=" + os.fsencode(self._run_dir) + b"\0"
        for pid in ft_monitor.session_members(session):
            try:
                return mark in Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
        return False

    def _note_incident(
        self, stopped: str | None = None, failures: Mapping[int, ProcessFailure] | None = None
    ) -> Incident | None:
        """Write down how an attempt ended, once, and return it; `failures`: of the ranks, as torch sees them."""
        if self._noted == self._attempt:
            return None
        self._noted = self._attempt
        reports = read_reports(self._attempt_dir)
        missing = set(failures or {}) - {report["rank"] for report in reports}
        reports += [report_of_failure(rank, failure) for rank, failure in (failures or {}).items() if rank in missing]
        if stopped == OF_OTHERS and any(report["request"] or raised(report) for report in reports):
            stopped = None  # a rank here, which takes its time to end, was the first to fail
        places = read_places(self._attempt_dir, reports)
        entry = incident(
            self._attempt, self._started, reports, places, stopped, world=self._world(), previous_end=self._ended
        )
        self._ended = entry["end"]
        if failures is not None and entry["verdict"] is None:
            entry["verdict"] = "its workers failed, and there is no report of how"
        try:
            with open(self._run_dir / "incidents.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s", self._run_dir / "incidents.jsonl", error.strerror)
        return entry

    def _decide(self, failures: Mapping[int, ProcessFailure] | None) -> None:
        """After the end of an attempt: the roll call, and whether to restart.

        `failures`: of this node's ranks, as torch sees them; None: another node's have failed, or nodes joined.
        """
        entry = self._note_incident(OF_OTHERS if failures is None else None, failures)
        if entry is None:
            return
        is_ours, requests = entry["verdict"] != OF_OTHERS, entry["requests"]
        if is_ours:
            self._tell(FAILED, "")
        reason, saved = None, self._job.policy.saved
        if is_ours or self._told(FAILED) is not None:
            reason = self._job.policy.why_not(entry, requests, self._worker_group.group_rank == 0)
        leave = next((request["reason"] for request in requests if request["action"] == "ExcludeThisNode"), None)
        left, most = self._remaining_restarts, self._worker_group.spec.max_restarts
        what_next = f"restarting, {left} of {most} left" if left or failures is None else "no restarts left"
        if reason or leave:
            what_next = f"not restarting: {reason}" if reason else "this node leaves the job"
        self._explain(entry, what_next, saved or 0)
        if leave and not reason:
            self._leave(f"a rank asked for it: {leave}")
        if reason or (failures is not None and not left):
            self._end_job(reason or "")

    def _explain(self, entry: Mapping[str, Any], what_next: str, saved: int = 0) -> None:
        """Who, where, and what happens next; `saved`: the step of the checkpoint that was there at its start."""
        step = "" if entry["last_step"] is None else f" at step {entry['last_step']}"
        guess = "" if entry["certain"] else "suspect: "
        anew = f"  it began at step 0 although step {saved} was saved: see its warning"
        ran = duration(entry["end"] - entry["start"])
        lines = [
            f"attempt {self._attempt} ended after {ran}{step}: {guess}{entry['verdict']}",
            entry["ranks_at"] and f"  {entry['ranks_at']}",
            anew if saved and entry["first_step"] == 0 else None,
            f"  evidence: {self._attempt_dir}; {what_next}",
        ]
        log.error("%s", "\n".join(filter(None, lines)))


def raised(report: Report) -> bool:
    """Whether a rank failed by an error of its own, and not since another one was gone."""
    return report["error"] is not None and not COMMUNICATION_ERROR.match(without_place(report["error"]))


def leave_rendezvous(handler: Any) -> None:
    """Let the other nodes of a c10d rendezvous not wait until this one is taken for dead; torch has no call for it."""
    if not isinstance(handler, dynamic_rendezvous.DynamicRendezvousHandler):
        return
    handler._stop_heartbeats()
    try:
        deadline = handler._get_deadline(handler._settings.timeout.close)
        handler._op_executor.run(dynamic_rendezvous._RendezvousExitOp(), deadline)
    except RendezvousError as error:
        log.debug("cannot leave the rendezvous: %s", error)


def signals_to_handle() -> set[int]:
    """The signals that torch's agent takes as a reason to end."""
    names = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")
    return {getattr(signal, name.strip()) for name in names if hasattr(signal, name.strip())}


def check_node(command: str) -> str | None:
    """Run a health check of this node; return what is wrong, in one line, or None.

    It runs under a monitor, as ranks do: whatever ends this launcher, or the check, ends all that it has started.
    """
    monitor = [sys.executable, "-I", "-S", ft_monitor.__file__, f"--parent-pid={os.getpid()}", "--shutdown-timeout=0"]
    environment = {name: value for name, value in os.environ.items() if name != "FT_RUN_DIR"}
    check = subprocess.Popen(
        [*monitor, "--", "/bin/sh", "-c", command], env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = check.communicate(timeout=HEALTH_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        check.terminate()
        check.communicate()
        return f"{command!r} did not end within {HEALTH_CHECK_SECONDS:g} s"
    text = " ".join(output.decode(errors="replace").split())[:300]
    return f"{command!r} ended with {check.returncode}: {text or 'no output'}" if check.returncode else None


def point_link(link: Path, target: str) -> None:
    """Let a symbolic link point elsewhere, with no moment at which it is missing."""
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def rank_command(entrypoint: Any, args: Sequence[Any]) -> list[str]:
    """A rank's command line. --run-path gives a function, which gets an interpreter of its own here."""
    if isinstance(entrypoint, str):
        return [entrypoint, *map(str, args)]
    call = f"import sys; from {entrypoint.__module__} import {entrypoint.__name__} as run; run(*sys.argv[1:])"
    return [sys.executable, "-u", "-c", call, *map(str, args)]


# ------------------------------------------------------------------------------------------------ the command


def get_args_parser() -> argparse.ArgumentParser:
    """torchrun's parser with our options added; each may also come from the environment, as PET_FT_..."""
    parser = torch.distributed.run.get_args_parser()
    parser.prog = "ft_launcher.py"
    parser.usage = "ft_launcher.py [options] SCRIPT [options of the script]  (--help lists all)"
    parser.description = "torchrun plus fault tolerance: restarts ranks that crash or hang."
    parser.allow_abbrev = False  # an option of the script may be the beginning of one of ours
    parser.epilog = (
        "To look at a run instead of starting one: --ft-status [RUN_DIR] [-w] shows how its ranks do, -w again every "
        "second; --ft-report [RUN_DIR] shows what became of each attempt, and where the time went."
    )
    group = FaultToleranceConfig.add_arguments(parser, action=env)
    group.add_argument(
        "--ft-max-no-progress-cycles", "--ft_max_no_progress_cycles", action=env, type=int, metavar="N", default=3,
        help="do not restart after N attempts in a row that saved no new checkpoint; 0: no limit (default: 3)",
    )  # fmt: skip
    group.add_argument(
        "--ft-node-health-check", "--ft_node_health_check", action=env, metavar="COMMAND", default=None,
        help="run before each start of workers; unless it ends with 0 within 60 s, this node stays out (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--ft-run-dir", "--ft_run_dir", action=env, metavar="DIR", default=default_run_dir(),
        help="directory below which each launcher keeps its evidence (default: %(default)s)",
    )  # fmt: skip
    return parser


def default_run_dir() -> str:
    return os.path.join(tempfile.gettempdir(), f"ft_runs_{os.getuid()}")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, FaultToleranceConfig]:
    """Everything that can be wrong with the command line ends here, in one line and exit code 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        config = FaultToleranceConfig.from_args(args)
        check_script(args)
        check_torchrun_options(args)
        if args.ft_max_no_progress_cycles < 0:
            raise ConfigError(f"--ft-max-no-progress-cycles: got {args.ft_max_no_progress_cycles}, expected 0 or more")
        args.ft_run_dir = make_run_dir(Path(args.ft_run_dir))
        if args.log_dir is None:
            args.log_dir = str(args.ft_run_dir / "logs")  # torchrun would leave a temporary directory behind
    except (ConfigError, ValueError, AssertionError, RuntimeError, OSError) as error:
        parser.error(str(error))
    return args, config


def check_script(args: argparse.Namespace) -> None:
    """Find out before the start what every rank of every attempt would fail with."""
    script = args.training_script
    if args.no_python and not args.run_path:
        if shutil.which(script) is None:
            raise ConfigError(f"command {script!r} not found or not executable: give its path")
    elif args.module:
        package = script.partition(".")[0]
        if importlib.machinery.PathFinder.find_spec(package, [os.getcwd(), *sys.path]) is None:
            raise ConfigError(f"module {script!r} not found: there is no {package!r} in {os.getcwd()}, nor installed")
    elif not any(map(os.path.isfile, (script, os.path.join(script, "__main__.py")))):
        raise ConfigError(f"script {script!r} not found in {os.getcwd()}: give its path, or -m for a module")


def check_torchrun_options(args: argparse.Namespace) -> None:
    """Let torch look at its options, and look at those that it does not."""
    if args.log_dir is not None:
        os.makedirs(args.log_dir, exist_ok=True)
    without_logs = argparse.Namespace(**{**vars(args), "log_dir": os.devnull})  # what is in it would be created
    config, _, _ = torch.distributed.run.config_from_args(without_logs)
    if config.nproc_per_node < 1:
        raise ConfigError(f"--nproc-per-node: got {args.nproc_per_node!r}, expected at least 1")
    if not 0 < config.monitor_interval < math.inf:
        raise ConfigError(f"--monitor-interval: got {args.monitor_interval:g}, expected seconds, more than 0")
    for name in filter(None, args.signals_to_handle.split(",")):
        if not hasattr(signal, name.strip()):
            raise ConfigError(f"--signals-to-handle: got {name!r}, expected names of signals, such as SIGTERM")
    try:
        get_logging_handler(args.event_log_handler)
    except KeyError:
        raise ConfigError(f"--event-log-handler: got {args.event_log_handler!r}, expected console or null") from None
    if args.master_port is not None and not 0 <= args.master_port < 65536:
        raise ConfigError(f"--master-port: got {args.master_port}, expected a port, up to 65535")
    if args.rdzv_endpoint and config.rdzv_backend in ("c10d", "static"):
        parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=0)
    backends = getattr(rendezvous_handler_registry, "_registry", {config.rdzv_backend: None})
    if config.rdzv_backend not in backends:
        raise ConfigError(f"--rdzv-backend: got {config.rdzv_backend!r}, expected one of {', '.join(backends)}")


def make_run_dir(base: Path) -> Path:
    """A directory of this launcher's own; on many nodes `base` may be on a shared file system."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{socket.gethostname()}_{os.getpid()}"
    run_dir = base.absolute() / name
    try:
        run_dir.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {str(run_dir)!r}: {error.strerror}; set --ft-run-dir"
        ) from None
    return run_dir


def heard_signals(names: str) -> str:
    """Of the signals that torch is to handle, those that are not ignored: nohup means to outlive a hang-up."""
    numbers = {name: getattr(signal, name.strip()) for name in names.split(",") if name.strip()}
    ignored = {number for number in ft_monitor.STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
    return ",".join(name for name, number in numbers.items() if number not in ignored)


def prepare_environment(config: FaultToleranceConfig, run_dir: Path) -> None:
    os.environ["FT_CONFIG"] = config.to_json()
    os.environ["FT_RUN_DIR"] = str(run_dir)
    # With a store that outlives a restart, ranks read the addresses of their dead predecessors (pytorch #135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if os.environ.get(FLAG_VARIABLE):  # for ranks that change their directory
        os.environ[FLAG_VARIABLE] = os.path.abspath(os.environ[FLAG_VARIABLE])
    here = os.path.dirname(os.path.abspath(__file__))
    if here not in sys.path[1:]:  # not installed: only this script, whose directory is first, finds it
        paths = [os.environ.get("PYTHONPATH"), here]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def make_restarts_possible(args: argparse.Namespace) -> None:
    """torch's static rendezvous keeps the store, in which new ranks read the addresses of their dead predecessors."""
    _, nodes = torch.distributed.run.parse_min_max_nnodes(args.nnodes)
    if args.rdzv_backend == "static" and nodes == 1:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", f"localhost:{args.master_port or 0}"
        args.rdzv_id, args.master_port = str(uuid.uuid4()), None
    elif args.rdzv_backend == "static" and args.max_restarts:
        log.warning("restarts rarely come back with the static rendezvous: give --rdzv-backend=c10d --rdzv-endpoint")
    if os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] != "1":
        log.warning("restarts rarely come back with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0: unset it")


@record
def launch(args: argparse.Namespace, job: Job) -> None:
    """Run the workers to their end, as torchrun does, but with our agent.

    torch.distributed.run offers no way to name an agent: its class is looked up by this one name.
    """
    agent = functools.partial(FaultToleranceAgent, job)
    importlib.import_module("torch.distributed.launcher.api").LocalElasticAgent = agent  # type: ignore[attr-defined]
    torch.distributed.run.run(args)


def give_up(reason: str) -> int:
    """Exit code 93, and the reason in a file: srun and schedulers lose exit codes."""
    log.error("gave up: %s", reason)
    flag = os.environ.get(FLAG_VARIABLE)
    if flag:
        values = {"reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname()}
        try:
            ft_monitor.write_json(Path(f"{flag}.gave_up"), values, durable=True)
        except OSError as error:
            log.error("cannot write %s.gave_up: %s", flag, error.strerror)
    return EXIT_GAVE_UP


def run(args: argparse.Namespace, job: Job) -> int:
    """Launch, and turn what comes of it into an exit code."""
    try:
        launch(args, job)
    except ChildFailedError as error:
        log.debug("%s", error)  # the agent has explained it
        return EXIT_FAILED
    except GaveUp as error:
        return give_up(str(error))
    except KeyboardInterrupt:  # before torch's agent has its handlers
        log.warning("ended by SIGINT")
        return 128 + signal.SIGINT
    except SignalException as error:
        log.warning("ended by %s", error.sigval.name)
        return 128 + error.sigval
    except NodeLeft as error:
        alone = torch.distributed.run.parse_min_max_nnodes(args.nnodes)[1] == 1
        log.error("this node leaves the job: %s", error)
        return EXIT_FAILED if alone else 0
    except (RendezvousError, torch.distributed.DistError) as error:
        log.error("the nodes of this job lost each other, or another one gave up: %s: %s", type(error).__name__, error)
        return EXIT_FAILED
    flag = os.environ.get(FLAG_VARIABLE)
    if flag and not os.path.exists(flag):
        hint = "no rank has connected to its monitor: is FaultToleranceCallback(autoresume=True) "
        hint += "among the Trainer's callbacks?"
        connected = any(row["connected"] for row in read_incidents(args.ft_run_dir)[-1:])
        why = "" if connected else f"; {hint}"
        log.warning("the workers ended well, but training is not complete: there is no %s%s", flag, why)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if asks_to_look(argv):
        return show(argv)
    args, config = parse_arguments(argv)
    ignore_user_signals()
    ft_monitor.configure_logging("ft_launcher", config.log_level, "ft_launcher")
    prepare_environment(config, args.ft_run_dir)
    args.signals_to_handle = heard_signals(args.signals_to_handle)
    off = "; hang detection is off, unless the callback calculates timeouts: set --ft-rank-heartbeat-timeout"
    log.info("settings: %s; evidence: %s%s", config.describe(), args.ft_run_dir, "" if config.watches_steps else off)
    make_restarts_possible(args)
    flag = os.environ.get(FLAG_VARIABLE)
    flag = None if flag is None or os.path.exists(flag) else flag
    policy = RestartPolicy(args.ft_max_no_progress_cycles)
    return run(args, Job(args.ft_run_dir, policy, config.workers_stop_timeout, args.ft_node_health_check, flag))


if __name__ == "__main__":
    sys.exit(main())
