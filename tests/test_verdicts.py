"""Every failure explains itself: which rank it was, why, and where the others waited; and where the time went."""

from __future__ import annotations

import collections
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Started
from test_launcher import endings, gone_within, our_lines, read_reports

import ft_launcher
import ft_monitor
from ft_launcher import Place

# ------------------------------------------------------------------------------------ two ranks in an all_reduce

# What rank 1 does in each attempt, where it then is, and what the verdict says of it.
FAULTS = {
    "spin_in_python": ("spin_in_python", "(hung: no heartbeat|did not go on)"),
    "sleep_for_ever": ("sleep_for_ever", "(hung: no heartbeat|did not go on)"),
    "stop_itself": ("stop_itself", "(hung: no heartbeat|did not go on)"),
    "raise_an_error": (None, r"failed: ValueError: a bad batch \(rank\.py:\d+ in raise_an_error\)"),
    "raise_and_hang_at_exit": (
        "_shutdown",
        r"failed: KeyError: 'hangs at exit' \(rank\.py:\d+ in raise_and_hang_at_exit\)",
    ),
}

RANK = f"""
import os, signal, sys, threading, time
import torch, torch.distributed as dist
from ft_monitor import RankMonitorClient

FAULTS = {list(FAULTS)}
FAULT_STEP = 3

def spin_in_python():
    while True:
        pass  # spins

def sleep_for_ever():
    time.sleep(1000)  # sleeps

def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)  # stops

def raise_an_error():
    raise ValueError("a bad batch")

def raise_and_hang_at_exit():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise KeyError("hangs at exit")

def average_gradients(value):
    dist.all_reduce(value)  # waits

def train(client, attempt):
    value = torch.ones(1)
    for step in range(FAULT_STEP + 1):
        client.send_heartbeat(step)
        if step == FAULT_STEP and attempt < len(FAULTS) and dist.get_rank() == 1:
            globals()[FAULTS[attempt]]()
        average_gradients(value)

client = RankMonitorClient()
client.init_workload_monitoring()
dist.init_process_group("gloo")
train(client, int(os.environ["FT_ATTEMPT"]))
dist.barrier()
dist.destroy_process_group()
"""


def line_of(comment: str) -> int:
    return next(number for number, line in enumerate(RANK.splitlines(), 1) if line.endswith(f"# {comment}"))


def test_the_verdict_names_the_rank_that_failed_and_the_line_in_which_each_rank_was(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    script, runs = tmp_path / "rank.py", tmp_path / "runs"
    script.write_text(RANK)
    job = start([
        sys.executable, ROOT / "ft_launcher.py", f"--ft-run-dir={runs}", "--nproc-per-node=2", "--max-restarts=5",
        "--ft-rank-heartbeat-timeout=3", "--ft-max-no-progress-cycles=0", script,
    ])  # fmt: skip
    assert job.wait(200) == 0, job.output
    verdicts = endings(job.output)
    assert len(verdicts) == len(FAULTS), job.output
    (run_dir,) = runs.iterdir()
    reports = read_reports(run_dir)
    for attempt, (verdict, (function, what)) in enumerate(zip(verdicts, FAULTS.values(), strict=True)):
        first, *others = verdict.splitlines()
        assert re.search(rf"rank 1 \(pid {reports[f'attempt_{attempt}/rank1']['pid']}\) {what}", first), verdict
        assert "rank 0" not in first and " at step 3: " in first, verdict
        assert others[-1].startswith(f"  evidence: {run_dir}/attempt_{attempt}; restarting, {5 - attempt} of 5 left")
        if function is None:
            continue
        where = others[0]
        assert f"rank 0 waits at rank.py:{line_of('waits')} in average_gradients -> all_reduce" in where, verdict
        assert re.match(rf"  rank 1 is at \w+\.py:\d+ in {function}\b", where), verdict
    (spins, sleeps, stops) = (f"rank 1 is at rank.py:{line_of(what)} in " for what in ("spins", "sleeps", "stops"))
    spinning = f"rank 1 is at rank.py:{line_of('spins') - 1} in "  # the line of the loop's condition
    assert spins in verdicts[0] or spinning in verdicts[0], verdicts[0]
    assert sleeps in verdicts[1] and stops in verdicts[2]

    # The evidence of every attempt is there, and the summary after the end.
    for attempt in range(len(FAULTS) + 1):
        names = {path.name for path in (run_dir / f"attempt_{attempt}").iterdir()}
        assert names == {"rank0.json", "rank1.json", "rank0.stacks.txt", "rank1.stacks.txt"}
    assert os.readlink(run_dir / "latest") == f"attempt_{len(FAULTS)}"
    incidents = [json.loads(line) for line in (run_dir / "incidents.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["suspect"]) for row in incidents] == [(n, 1) for n in range(5)] + [(5, None)]
    summary = job.output.partition("[ft_launcher] attempt  started ")[2]
    rows = [line.split()[0] for line in summary.splitlines()[1:7]]
    assert rows == ["0", "1", "2", "3", "4", "5"] and summary.splitlines()[6].endswith("ended well")
    assert re.search(r"^goodput \d+\.\d % ?", summary, re.MULTILINE) and our_lines(job.output)
    gone_within(2, tmp_path)


# ------------------------------------------------------------------------------------------------ who it was

TRAIN = Place("/home/me/train.py", 7, "load_batch", "read", waits=False)
WAITS = Place("/home/me/train.py", 9, "step", "all_reduce", waits=True)


def report(rank: int, **values: Any) -> ft_launcher.Report:
    """A rank that its monitor ended as a survivor, at step 10, with its last heartbeat at 100."""
    usual = {
        "rank": rank, "pid": 1000 + rank, "monitor_pid": 2000 + rank, "attempt": 0, "step": 10, "first_step": 0,
        "started": 10.0, "connected": 20.0, "first_heartbeat": 30.0, "heartbeat": 100.0, "ended": 131.0,
        "stopped": "its peer failed", "status": -9, "oom_kills": 0, "sections": [], "timeouts": {}, "state": {},
    }  # fmt: skip
    return collections.defaultdict(lambda: None, {**usual, **values})


def hung(rank: int, **values: Any) -> ft_launcher.Report:
    verdict = {"setting": "rank_heartbeat_timeout"}
    return report(rank, stopped="hung: no heartbeat for 30.0 s", verdict=verdict, **values)


GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"
NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2027, remote process exited or there was a network error"
STORE = "DistStoreError: wait timeout after 300000ms, keys: /0/default_pg/0//key"

SUSPECTS: dict[str, tuple[list[ft_launcher.Report], dict[int, Place], int, bool]] = {
    # what happened: reports, places, the suspect, certain
    "the only one that failed": ([report(0), report(1, stopped=None, status=7)], {}, 1, True),
    "the first exception of two": (
        [report(0, error="ValueError: b", error_time=101.0), report(1, error="ValueError: a", error_time=100.5)],
        {}, 1, True,
    ),
    "an exception before the exit code of a later one": (
        [report(0, stopped=None, status=7, ended=102.0), report(1, error="ValueError: a", error_time=100.5)],
        {}, 1, True,
    ),
    "killed, and its peer's gloo complains first": (
        [report(0, error=GLOO, error_time=100.0), report(1, stopped=None, status=-9, ended=100.5)], {}, 1, True,
    ),
    "raised, and its peer's NCCL complains first": (
        [report(0, error=NCCL, error_time=100.0), report(1, error="ValueError: a", error_time=100.5)], {}, 1, True,
    ),
    "hangs, and its peers' collectives time out": (
        [report(0, error=STORE, error_time=130.0), report(1), report(2, error=GLOO, error_time=130.0)], {}, 1, False,
    ),
    "all have a communication error: the first, but who knows": (
        [report(0, error=GLOO, error_time=101.0), report(1, error=NCCL, error_time=100.0)], {}, 1, False,
    ),
    "its monitor was killed": ([report(0), report(1, ended=None, stopped=None, status=None)], {}, 1, True),
    "stopped by a debugger": ([hung(0), hung(1, state={"state": "T"}, step=11)], {}, 1, True),
    "sleeping is not stopped": ([hung(0, state={"state": "S"}), hung(1, step=9, state={"state": "S"})], {}, 1, True),
    "a lower step": ([hung(0, heartbeat=90.0), hung(1, step=9)], {}, 1, True),
    "no step at all": ([hung(0), report(1, step=None, heartbeat=None)], {}, 1, True),
    "an older heartbeat": ([hung(0), hung(1, heartbeat=95.0), hung(2)], {}, 1, False),
    "an older heartbeat, but not by much: places tell": (
        [hung(0, heartbeat=99.5), hung(1)], {0: WAITS, 1: TRAIN}, 1, False,
    ),
    "the one that does not wait": ([hung(0), report(1), hung(2)], {0: WAITS, 1: TRAIN, 2: WAITS}, 1, False),
    "the odd one of many that wait": (
        [hung(0), hung(1), hung(2)], {0: WAITS, 1: WAITS._replace(line=5), 2: WAITS}, 1, False,
    ),
    "one rank alone": ([hung(0)], {}, 0, True),
}  # fmt: skip


@pytest.mark.parametrize("what", SUSPECTS)
def test_the_suspect_is_the_rank_that_failed_or_fell_behind_first(what: str) -> None:
    reports, places, suspect, certain = SUSPECTS[what]
    for order in (reports, reports[::-1]):
        found = ft_launcher.find_suspect(order, places)
        assert found is not None and (found[0]["rank"], found[1]) == (suspect, certain)


def test_nobody_is_suspected_where_there_are_no_reports() -> None:
    assert ft_launcher.find_suspect([], {}) is None


def test_an_exception_that_looks_like_communication_is_shown_although_a_survivor_might_be_the_cause() -> None:
    error = "ConnectionError: cannot reach the data server (train.py:3 in load)"
    entry = ft_launcher.incident(0, 0.0, [report(0), report(1, stopped=None, status=1, error=error)], {}, None)
    assert error in entry["verdict"]


FAILURES = {
    "rank 1 (pid 1001) failed: ValueError: x": report(1, error="ValueError: x", status=1),
    "rank 1 (pid 1001): its monitor (pid 2001) was killed, and the rank with it": report(1, ended=None),
    "rank 1 (pid 1001) hung: no heartbeat for 30.0 s": hung(1),
    "rank 1 (pid 1001) did not go on": report(1),
    "rank 1 (pid 1001) ended with exit code 7": report(1, stopped=None, status=7),
    "rank 1 (pid 1001) ended by SIGSEGV": report(1, stopped=None, status=-11),
    "rank 1 (pid 1001) ended by SIGKILL, which nobody here sent (out of memory?)": report(1, stopped=None),
    "rank 1 (pid 1001) ended by SIGKILL, which nobody here sent: out of memory, the kernel's count of such kills rose "
    "by 2": report(1, stopped=None, oom_kills=2),
}


@pytest.mark.parametrize("sentence", FAILURES)
def test_what_was_wrong_with_a_rank_is_one_sentence(sentence: str) -> None:
    assert ft_launcher.describe_failure(FAILURES[sentence]) == sentence


def test_a_real_time_signal_without_a_name_has_a_verdict_too() -> None:
    assert "40" in ft_launcher.describe_failure(report(1, stopped=None, status=-40))


# ------------------------------------------------------------------------------------------------ where it was


def test_places_begin_with_the_suspect_and_gather_those_who_are_together() -> None:
    assert ft_launcher.describe_places(1, {1: TRAIN, 0: WAITS, 2: WAITS, 3: WAITS}) == (
        "rank 1 is at train.py:7 in load_batch -> read; ranks 0, 2-3 wait at train.py:9 in step -> all_reduce"
    )
    spins = Place("train.py", 5, "spin", "spin", waits=False)
    assert ft_launcher.describe_places(1, {0: spins}) == "rank 0 is at train.py:5 in spin"
    assert ft_launcher.describe_places(2, {0: spins, 1: spins}) == "ranks 0-1 are at train.py:5 in spin"
    assert ft_launcher.describe_places(1, {}) == ""
    crowd = {rank: spins._replace(line=rank) for rank in range(8)}
    text = ft_launcher.describe_places(0, crowd)
    assert text.count(" is at ") == 1 + ft_launcher.MAX_PLACES and text.endswith("; 3 more places")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"), ([0, 1], "ranks 0-1"), ([5, 0, 2, 1], "ranks 0-2, 5"), ([1, 3], "ranks 1, 3"),
        (range(64), "ranks 0-63"),
    ],
)  # fmt: skip
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    assert ft_launcher.ranks_text(ranks) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (8.06, "8.1 s"), (59.94, "59.9 s"), (60, "1 m 00 s"), (871, "14 m 31 s"), (3599, "59 m 59 s"),
        (3599.6, "1 h 00 m"), (10920, "3 h 02 m"), (360000, "100 h 00 m"),
        (59.97, "1 m 00 s"),
    ],
)  # fmt: skip
def test_durations_are_short_and_right(seconds: float, text: str) -> None:
    assert ft_launcher.duration(seconds) == text


LIBRARY = "/usr/lib/python3/site-packages/torch"
C10D = f'  File "{LIBRARY}/distributed/distributed_c10d.py", line 3000 in all_reduce'
WRAPPER = f'  File "{LIBRARY}/distributed/c10d_logger.py", line 81 in wrapper'
USER = '  File "/home/me/my model/train.py", line 41 in average_gradients'
MODULE = '  File "/home/me/my model/train.py", line 80 in <module>'
MAIN = "Current thread 0x00007f0000000001 (most recent call first):"
LOADER = 'Thread 0x00007f0000000002 (most recent call first):\n  File "/home/me/data.py", line 5 in read'


def dump(*lines: str) -> str:
    return "\n".join(["", f"{ft_monitor.STACKS_HEADER} 12:00:00 its peer failed", *lines, ""])


WAITING = Place("/home/me/my model/train.py", 41, "average_gradients", "all_reduce", waits=True)
BACKWARD = f'  File "{LIBRARY}/autograd/graph.py", line 800 in _engine_run_backward'
STACKS: dict[str, tuple[str, Place | None]] = {
    "library frames": (dump(MAIN, C10D, WRAPPER, USER, MODULE), WAITING),
    "several threads, the main one last": (
        dump(LOADER, "", MAIN.replace("Current t", "T"), C10D, WRAPPER, USER, MODULE), WAITING,
    ),
    "several dumps, the last counts": (
        dump(MAIN, '  File "a.py", line 1 in old') + dump(MAIN, C10D, WRAPPER, USER, MODULE), WAITING,
    ),
    "the last dump is empty": (dump(MAIN, C10D, WRAPPER, USER, MODULE) + dump(), WAITING),
    "the user's own line": (dump(MAIN, USER, MODULE), WAITING._replace(leaf="average_gradients", waits=False)),
    "in the backward pass, where gradients are reduced": (
        dump(MAIN, BACKWARD, USER), WAITING._replace(leaf="_engine_run_backward"),
    ),
    "library frames alone": (
        dump(MAIN, '  File "<frozen importlib._bootstrap>", line 9 in _load', C10D),
        Place(f"{LIBRARY}/distributed/distributed_c10d.py", 3000, "all_reduce", "_load", waits=False),
    ),
    "nothing": ("", None),
    "a header alone": (dump(), None),
    "no frames": (dump(MAIN, "  <no Python frame>"), None),
    "noise": ("\x00\xff not a stack\n", None),
}  # fmt: skip


@pytest.mark.parametrize("what", STACKS)
def test_a_place_is_the_main_threads_last_line_of_the_users(tmp_path: Path, what: str) -> None:
    text, place = STACKS[what]
    (tmp_path / "rank0.stacks.txt").write_bytes(text.encode("latin-1"))
    assert ft_launcher.read_place(tmp_path / "rank0.stacks.txt") == place


def test_a_missing_stacks_file_has_no_place(tmp_path: Path) -> None:
    assert ft_launcher.read_place(tmp_path / "rank0.stacks.txt") is None


# ------------------------------------------------------------------------------ the verdict as the log shows it


class Agent(ft_launcher.FaultToleranceAgent):
    """The agent's words on an attempt, without torch's part of it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._attempt, self._noted, self._started = run_dir, 0, -1, 10.0
        self._attempt_dir.mkdir(parents=True)


def verdict_of(agent: Agent) -> str:
    """What the launcher logs, warnings about what it could not read included."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    ft_launcher.log.addHandler(handler)
    try:
        entry = agent._note_incident(failed=True)
        assert entry is not None and agent._note_incident(failed=True) is None
        agent._explain(entry, "restarting, 1 of 1 left")
    finally:
        ft_launcher.log.removeHandler(handler)
    return "\n".join(said)


def write_reports(directory: Path, reports: list[ft_launcher.Report]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for values in reports:
        (directory / f"rank{values['rank']}.json").write_text(json.dumps(values))


def test_the_verdict_on_64_ranks_fits_a_screen(tmp_path: Path) -> None:
    agent = Agent(tmp_path / "a_host-with-a-rather-long-name_12345")
    write_reports(agent._attempt_dir, [hung(rank, step=9 if rank == 63 else 10) for rank in range(64)])
    for rank in range(64):  # each at a place of its own: the worst for the second line
        text = dump(MAIN, f'  File "/home/me/train.py", line {rank} in a_function_with_a_long_name_{rank}')
        (agent._attempt_dir / f"rank{rank}.stacks.txt").write_text(text)
    lines = verdict_of(agent).splitlines()
    assert len(lines) == 3 and all(len(line) < 400 for line in lines), lines
    assert "rank 63 (pid 1063) hung" in lines[0] and lines[1].startswith("  rank 63 is at train.py:63 in ")
    assert lines[1].endswith("; 59 more places")


def test_reports_that_cannot_be_read_cost_a_line_each_and_not_the_verdict(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    write_reports(agent._attempt_dir, [report(0), report(1, stopped=None, status=7)])  # of rank 2 there is none
    bad = {
        "rank3.json": b'{"rank": 3, "sta', "rank4.json": b"", "rank5.json": b"[1, 2]", "rank6.json": b'{"pid": 4}',
        "rank7.json": b"\xff\xfe", "rank8.json": b'{"rank": "x"}', "rank9.json": b"null",
    }  # fmt: skip
    for name, content in bad.items():
        (agent._attempt_dir / name).write_bytes(content)
    (agent._attempt_dir / "rank10.json").mkdir()
    *warnings, verdict, _ = verdict_of(agent).splitlines()
    assert len(warnings) == len(bad) + 1 and all("cannot read the report" in line for line in warnings), warnings
    assert verdict == "attempt 0 ended after 2 m 01 s at step 10: rank 1 (pid 1001) ended with exit code 7"


def test_an_attempt_that_failed_without_reports_did_not_end_well(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    assert "its workers failed" in verdict_of(agent)
    assert "ended well" not in ft_launcher.render_report(ft_launcher.read_incidents(tmp_path))


# -------------------------------------------------------------------------------------------- where the time went


def row(
    attempt: int, start: float, first: float | None, last: float | None, end: float, **values: Any
) -> dict[str, Any]:
    """An incident; the steps are values of the tests."""
    usual = {"first_step": None, "last_step": None, "saved_step": None, "suspect": 1, "verdict": "rank 1 hung"}
    times = {"start": start, "first_heartbeat": first, "last_heartbeat": last, "end": end}
    return {"attempt": attempt, **times, **usual, **values}


WELL = {"suspect": None, "verdict": None}

# 10 s set-up, 100 steps in 100 s, 10 s until the hang is noticed, of which 20 steps are done again; 5 s to restart;
# 10 s set-up, 100 steps in 100 s, 1 s to end well. Total 236 s, of which 180 counted: 76.3 %.
TWO = [
    row(0, 1000, 1010, 1110, 1120, first_step=0, last_step=100, saved_step=80),
    row(1, 1125, 1135, 1235, 1236, first_step=80, last_step=180, saved_step=180, **WELL),
]
SPENT = {
    "a hang and its restart": (TWO, (236, 180, 20, 10, 5, 21, 20)),
    "nothing has ended": ([], (0, 0, 0, 0, 0, 0, 0)),
    "one that never had a heartbeat is set-up": ([row(0, 0, None, None, 7)], (7, 0, 0, 0, 0, 7, 0)),
    # 50 steps in 50 s that nobody saved are all lost when the next attempt begins at 0, or never begins.
    "nothing was saved": (
        [
            row(0, 0, 10, 60, 63, first_step=1, last_step=51),
            row(1, 65, None, None, 75),
            row(2, 80, 90, 140, 141, first_step=1, last_step=51, **WELL),
        ],
        (141, 50, 50, 3, 2 + 5, 10 + 10 + 10 + 1, 50),
    ),
    # The attempt between them has no step: what the one before had saved tells what counts of it.
    "saved, then one that never had a step": (
        [
            row(0, 0, 10, 60, 63, first_step=0, last_step=50, saved_step=40),
            row(1, 65, None, None, 75),
            row(2, 80, 90, 100, 101, first_step=40, last_step=50, **WELL),
        ],
        (101, 40 + 10, 10, 3, 7, 10 + 10 + 10 + 1, 10),
    ),
    "heartbeats without steps count when it ended well": ([row(0, 0, 10, 60, 61, **WELL)], (61, 50, 0, 0, 0, 11, 0)),
    "heartbeats without steps are lost when it failed": ([row(0, 0, 10, 60, 61)], (61, 0, 50, 1, 0, 10, 0)),
}


@pytest.mark.parametrize("what", SPENT)
def test_the_time_spent_is_as_reckoned_by_hand_and_its_parts_make_up_the_total(what: str) -> None:
    incidents, expected = SPENT[what]
    spent = ft_launcher.time_spent(incidents)
    assert tuple(spent) == pytest.approx(expected)
    assert spent.total == pytest.approx(spent.counted + spent.lost + spent.detection + spent.restart + spent.setup)


def test_steps_are_lost_when_the_next_attempt_begins_at_0_although_a_checkpoint_was_saved() -> None:
    begins_again = [TWO[0], {**TWO[1], "first_step": 0}]
    assert ft_launcher.time_spent(begins_again).lost == 100


def test_the_report_has_a_row_for_each_attempt_and_the_goodput_in_at_most_100_columns() -> None:
    long = {**TWO[0], "verdict": "rank 1 (pid 812) failed: ValueError: " + "x" * 300}
    lines = ft_launcher.render_report([long, TWO[1]]).splitlines()
    head, first, second, goodput, lost = lines
    assert all(len(line) <= 100 for line in lines)
    assert head.split() == ["attempt", "started", "ran", "steps", "saved", "why", "it", "ended"]
    assert re.match(r" +0  \d\d:\d\d:\d\d +2 m 00 s +0-100 +80  rank 1 \(pid 812\) failed: Va.*\.\.\.$", first)
    assert re.match(r" +1  \d\d:\d\d:\d\d +1 m 51 s +80-180 +180  ended well$", second)
    assert goodput == "goodput 76.3 %: 3 m 00 s of 3 m 56 s in steps that counted"
    assert lost == "lost: 21.0 s set-up, 20.0 s in 20 steps done twice, 10.0 s detection, 5.0 s restart"
    assert ft_launcher.render_report([]).splitlines()[1] == "goodput 0.0 %: 0.0 s of 0.0 s in steps that counted"


def test_the_report_of_a_month_with_as_many_steps_as_anybody_does_has_at_most_100_columns_too() -> None:
    month = [
        row(0, 0, 45_000, 2.59e6, 2.65e6, first_step=10_000_000, last_step=99_999_999, saved_step=50_000_000),
        row(1, 2.7e6, 2.75e6, 5e6, 5.1e6, first_step=10_000_000, last_step=99_999_999, **WELL),
    ]
    assert [line for line in ft_launcher.render_report(month).splitlines() if len(line) > 100] == []


def test_failures_are_red_where_there_is_colour() -> None:
    lines = ft_launcher.render_report(TWO, colour=True).splitlines()
    assert [line.startswith("\033[31m") and line.endswith("\033[0m") for line in lines] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert "\033" not in ft_launcher.render_report(TWO)


# ----------------------------------------------------------------------------------------- --ft-status, --ft-report

LIMITS = {"initial_rank_heartbeat_timeout": 600.0, "rank_heartbeat_timeout": 30.0}
RUNS: dict[str, Any] = {"ended": None, "stopped": None, "status": None, "timeouts": LIMITS}
NEVER: dict[str, Any] = {"heartbeat": None, "first_heartbeat": None, "step": None}
PHASES = {
    # phase: report, the heartbeat's age and limit at 112
    "starting": (report(0, **{**RUNS, **NEVER, "connected": None}), "102.0 s", "600 s"),
    "set-up": (report(0, **{**RUNS, **NEVER}), "92.0 s", "600 s"),
    "training": (report(0, **RUNS), "12.0 s", "30 s"),
    "in checkpointing, step": (report(0, **{**RUNS, "sections": ["checkpointing", "step"]}), "12.0 s", "30 s"),
    "failed: ValueError: x": (report(0, **{**RUNS, "error": "ValueError: x"}), "12.0 s", "30 s"),
    "its peer failed": (report(0), "-", "none"),
    "ended with status 0": (report(0, stopped=None, status=0), "-", "none"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_has_a_row_with_the_age_of_its_heartbeat_its_limit_and_its_phase(phase: str) -> None:
    values, age, limit = PHASES[phase]
    assert ft_launcher.phase(values) == phase
    head, line = ft_launcher.render_status([values], now=112.0).splitlines()
    step = "-" if values["step"] is None else "10"
    assert head.split() == ["rank", "pid", "attempt", "step", "heartbeat", "limit", "phase"]
    assert line.split() == ["0", "1000", "0", step, *age.split(), *limit.split(), *phase.split()]
    assert line.index(phase) == head.index("phase")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two attempts, the second of which still runs, and an older run beside it."""
    for name, seconds in (("older", 1), ("newer", 2)):
        directory = tmp_path / "runs" / name
        write_reports(directory / "attempt_0", [report(0), report(1)])
        (directory / "attempt_1").mkdir()
        (directory / "incidents.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in TWO))
        (directory / "latest").symlink_to("attempt_1")
        os.utime(directory / "latest", (seconds, seconds), follow_symlinks=False)
    write_reports(tmp_path / "runs" / "newer" / "attempt_1", [report(rank, **RUNS) for rank in (1, 0)])
    return tmp_path / "runs" / "newer"


def test_the_status_shows_the_newest_run_below_a_directory_or_the_run_itself(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ft_launcher, "default_run_dir", lambda: str(run_dir.parent))
    for command in (
        ["--ft-status", str(run_dir)], ["--ft-status", str(run_dir.parent)], [f"--ft-status={run_dir}"],
        ["--ft-status"],
    ):  # fmt: skip
        assert ft_launcher.main(command) == 0
        shown, _, *rows = capsys.readouterr().out.splitlines()
        assert shown == str(run_dir)
        assert [line.split()[0] for line in rows] == ["0", "1"] and all(line.endswith("training") for line in rows)


def test_the_report_shows_what_became_of_each_attempt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "incidents.jsonl").open("a").write('{"attempt": 2, "sta')  # the disk was full
    for path in (run_dir, run_dir.parent):
        assert ft_launcher.main(["--ft-report", str(path)]) == 0
        assert capsys.readouterr().out == f"{run_dir}\n{ft_launcher.render_report(TWO)}\n"


def test_where_there_is_no_run_status_and_report_end_with_2_and_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            ft_launcher.main(command)
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    for flag in ("--ft-status", "--ft-report"):
        for path in (tmp_path / "empty", tmp_path / "missing"):
            assert said(flag, str(path)).startswith(f"ft_launcher.py: error: no run found in {str(path)!r}: give the")
    (run_dir / "incidents.jsonl").unlink()
    assert said("--ft-report", str(run_dir)).endswith(f"no attempt of {str(run_dir)!r} has ended yet: see --ft-status")
    assert "not allowed with" in said("--ft-status", "--ft-report")


def test_the_status_shows_a_report_that_lacks_fields(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "attempt_1" / "rank0.json").write_text('{"rank": 0}')
    assert ft_launcher.main(["--ft-status", str(run_dir)]) == 0
