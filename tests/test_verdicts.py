"""Every failure explains itself: which rank it was, why, and where the others waited; and where the time went."""

from __future__ import annotations

import collections
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Started
from test_launcher import endings, gone_within, our_lines, read_reports
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

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
        waits = f"rank 0 waits at rank.py:{line_of('waits')} in average_gradients -> all_reduce"
        # A stopped rank is continued for its stacks, and with it, for some milliseconds, the one that waits for it.
        assert waits in where or function == "stop_itself", verdict
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
    head, summary = job.output.split("[ft_launcher] attempt  started ")
    rows = re.findall(r"^\[ft_launcher\] +(\d)  \d\d:\d\d:\d\d .*", summary, re.MULTILINE)
    assert rows == ["0", "1", "2", "3", "4", "5"] and "ended well" in summary
    assert re.search(r"^\[ft_launcher\] goodput \d+\.\d %: ", summary, re.MULTILINE)
    assert all(line in our_lines(summary) for line in summary.splitlines()[1:]) and our_lines(head)
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

NO_STEP: dict[str, Any] = {"step": None, "first_step": None, "heartbeat": None, "first_heartbeat": None}
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
    "one rank alone, with a communication error": ([report(0, error=STORE, error_time=130.0)], {}, 0, True),
    "never connected, and its peer waits for it": (
        [hung(0, **NO_STEP), hung(1, **NO_STEP, connected=None)], {0: WAITS}, 1, False,
    ),
    "never connected, and nobody gave stacks": ([hung(0, **NO_STEP), hung(1, **NO_STEP, connected=None)], {}, 1, False),
    "connected before the others did, and did not go on": (
        [report(0, **NO_STEP), hung(1, **NO_STEP), report(2, **NO_STEP)], {0: WAITS, 2: WAITS}, 1, False,
    ),
    "gave no stacks": ([hung(0), report(1, stacks=False), report(2)], {0: WAITS, 2: WAITS}, 1, False),
    "waits since its heartbeat, which was earlier than that of the one it waits for": (
        [hung(0, heartbeat=97.0), hung(1)], {0: WAITS, 1: TRAIN}, 1, False,
    ),
    "ended with 0, and its peer's gloo complains": (
        [report(0, error=GLOO, error_time=100.0), report(1, stopped=None, status=0)], {}, 1, False,
    ),
    "ended with 0, and its peer waits": ([hung(0), report(1, stopped=None, status=0)], {0: WAITS}, 1, False),
    "the user's own connection failed, while its peer was busy": (
        [report(0), report(1, error="ConnectionError: cannot reach s3: Connection reset by peer", error_time=101.0)],
        {0: TRAIN}, 1, True,
    ),
    "a connection of a DataLoader worker failed, while its peer was busy": (
        [report(0), report(1, error="RuntimeError: Caught ConnectionResetError in DataLoader worker process 0. ... "
        "ConnectionResetError: [Errno 104] Connection reset by peer", error_time=101.0)],
        {0: TRAIN}, 1, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SUSPECTS)
def test_the_suspect_is_the_rank_that_failed_or_fell_behind_first(what: str) -> None:
    reports, places, suspect, certain = SUSPECTS[what]
    for order in (reports, reports[::-1]):
        found = ft_launcher.find_suspect(order, places)
        assert found is not None and (found[0]["rank"], found[1]) == (suspect, certain)


def test_nobody_is_suspected_where_there_are_no_reports() -> None:
    assert ft_launcher.find_suspect([], {}) is None


@pytest.mark.parametrize("where", [{}, {0: WAITS}, {0: TRAIN}])
def test_where_ranks_are_elsewhere_a_rank_that_hangs_is_never_suspected_for_certain(where: dict[int, Place]) -> None:
    found = ft_launcher.find_suspect([hung(0)], where, world=2)
    if where == {0: WAITS}:
        assert found is None
    else:
        assert found is not None and (found[0]["rank"], found[1]) == (0, False)
    failed = ft_launcher.find_suspect([report(0, error="ValueError: x")], where, world=2)
    assert failed is not None and failed[1], "it failed by itself, wherever the others are"


def test_a_node_whose_ranks_only_wait_says_so_and_points_to_the_other_nodes() -> None:
    waits = [hung(0), report(1, error=GLOO, error_time=130.0)]
    entry = ft_launcher.incident(0, 0.0, waits, {0: WAITS, 1: WAITS}, None, world=4)
    assert entry["suspect"] is None and entry["ranks_at"].startswith("ranks 0-1 wait at train.py:9")
    assert entry["verdict"].startswith("this node's ranks wait for another node's: see the verdict of that node's")
    assert "Connection closed by peer" in entry["verdict"]
    entry = ft_launcher.incident(0, 0.0, [hung(0)], {0: WAITS}, None, world=2)
    assert entry["verdict"].endswith("; rank 0 (pid 1000) hung: no heartbeat for 30.0 s")


@pytest.mark.parametrize(
    ("error", "communication", "transient"),
    [
        (GLOO, True, True),
        (NCCL, True, True),
        (STORE, True, True),
        ("RuntimeError: Gloo connectFullMesh failed with [../third_party/gloo/x.cc:1] no error", True, True),
        ("DistNetworkError: The client socket has timed out after 60000ms", True, True),
        ("ConnectionError: cannot reach s3: Connection reset by peer", False, True),
        ("TimeoutError: storage: read timed out", False, True),
        ("OSError: [Errno 116] Stale file handle", False, True),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", False, True),
        ("OSError: [Errno 122] Disk quota exceeded", False, True),
        ("KeyError: 'connection_id'", False, False),
        ("ValueError: not a SECCOMP profile, nor a quotation", False, False),
        ("AttributeError: no attribute 'peers'", False, False),
    ],
)
def test_what_other_ranks_cause_and_what_may_go_away_is_told_from_what_the_code_does(
    error: str, communication: bool, transient: bool
) -> None:
    assert bool(ft_launcher.COMMUNICATION_ERROR.match(error)) == communication
    assert bool(ft_launcher.INFRASTRUCTURE_ERROR.search(error)) == transient


def test_a_communication_error_is_shown_although_a_survivor_might_be_the_cause() -> None:
    error = "RuntimeError: [gloo/pair.cc:1] Connection closed by peer (train.py:3 in load)"
    entry = ft_launcher.incident(0, 0.0, [report(0), report(1, stopped=None, status=1, error=error)], {}, None)
    assert error in entry["verdict"]


FAILURES = {
    "rank 1 (pid 1001) failed: ValueError: x": report(1, error="ValueError: x", status=1),
    "rank 1 (pid 1001): its monitor (pid 2001) was killed, and the rank with it": report(1, ended=None),
    "rank 1 (pid 1001) hung: no heartbeat for 30.0 s": hung(1),
    "rank 1 (pid 1001) did not go on: no heartbeat for 31.0 s": report(1),
    "rank 1 (pid 1001) did not go on: no heartbeat for 111.0 s": report(1, heartbeat=None),
    "rank 1 (pid 1001) did not go on: no connection for 121.0 s": report(1, heartbeat=None, connected=None),
    "rank 1 (pid 1001) ended with exit code 7": report(1, stopped=None, status=7),
    "rank 1 (pid 1001) ended with exit code 7 before it connected: see its output above": report(
        1, stopped=None, status=7, connected=None
    ),
    "rank 1 (pid 1001) ended with exit code 0, while others went on": report(1, stopped=None, status=0),
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


def dump(*lines: str, at: float = 131.0) -> str:
    return "\n".join(["", f"{ft_monitor.STACKS_HEADER} {at:.6f} (12:00:00) its peer failed", *lines, ""])


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
    "a dump of before its last sign of life": (dump(MAIN, USER, at=99.0), None),
    "a dump of before, and one since": (
        dump(MAIN, '  File "a.py", line 1 in old', at=99.0) + dump(MAIN, C10D, USER, MODULE, at=100.0), WAITING,
    ),
    "more threads than faulthandler writes, so that the main one is missing": (dump(LOADER, "..."), None),
    "more frames than it writes": (dump(MAIN, USER, "  ..."), WAITING._replace(leaf="average_gradients", waits=False)),
    "in DistributedDataParallel": (
        dump(MAIN, f'  File "{LIBRARY}/nn/parallel/distributed.py", line 1500 in _pre_forward', USER),
        WAITING._replace(leaf="_pre_forward"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STACKS)
def test_a_place_is_the_main_threads_last_line_of_the_users(tmp_path: Path, what: str) -> None:
    text, place = STACKS[what]
    (tmp_path / "rank0.stacks.txt").write_bytes(text.encode("latin-1"))
    assert ft_launcher.read_place(tmp_path / "rank0.stacks.txt", since=100.0) == place


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("work.wait()", True), ("loss.item()", True), ("x = grads.cpu()", True), ("y = x.tolist()", True),
        ("torch.cuda.synchronize()", True), ("items(x)", False), ("self.wait_for(x)", False), ("pass", False),
    ],
)  # fmt: skip
def test_a_rank_waits_where_its_line_calls_what_has_no_frame_of_its_own(tmp_path: Path, line: str, waits: bool) -> None:
    (tmp_path / "train.py").write_text(f"def step():\n    {line}\n")
    (tmp_path / "stacks.txt").write_text(dump(MAIN, f'  File "{tmp_path / "train.py"}", line 2 in step'))
    place = ft_launcher.read_place(tmp_path / "stacks.txt")
    assert place is not None and place.waits == waits


def test_a_line_that_was_edited_between_two_attempts_is_read_again(tmp_path: Path) -> None:
    stacks, script = tmp_path / "stacks.txt", tmp_path / "train.py"
    stacks.write_text(dump(MAIN, f'  File "{script}", line 1 in step'))
    for line, waits in (("pass\n", False), ("work.wait()\n", True)):
        script.write_text(line)
        place = ft_launcher.read_place(stacks)
        assert place is not None and place.waits == waits


def test_stacks_count_from_the_last_heartbeat_or_from_the_error_of_a_rank(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank{rank}.stacks.txt").write_text(dump(MAIN, USER, at=110.0))
    ranks = [report(0, heartbeat=109.0), report(1, heartbeat=111.0), report(2, error="ValueError: x", error_time=111.0)]
    assert list(ft_launcher.read_places(tmp_path, ranks)) == [0]


def test_ranks_that_were_asked_for_their_stacks_and_gave_none_are_named_with_their_state() -> None:
    state = {"state": {"state": "D"}, "stacks": False}
    entry = ft_launcher.incident(0, 0.0, [hung(0), report(1, **state), report(2, **state)], {0: WAITS}, None)
    assert entry["ranks_at"] == "ranks 1-2 gave no stacks (state D); rank 0 waits at train.py:9 in step -> all_reduce"
    for values in ({"stacks": None}, {"stacks": False, "error": GLOO, "error_time": 130.0}):
        entry = ft_launcher.incident(0, 0.0, [hung(0), report(1, **values)], {0: WAITS}, None)
        assert "gave no stacks" not in entry["ranks_at"]


def test_a_missing_stacks_file_has_no_place(tmp_path: Path) -> None:
    assert ft_launcher.read_place(tmp_path / "rank0.stacks.txt") is None


# ------------------------------------------------------------------------------ the verdict as the log shows it


class Agent(ft_launcher.FaultToleranceAgent):
    """The agent's words on an attempt, without torch's part of it."""

    def __init__(self, run_dir: Path, world: int | None = None) -> None:
        self._run_dir, self._attempt, self._noted, self._started, self._ended = run_dir, 0, -1, 10.0, None
        self._attempt_dir.mkdir(parents=True)
        self._job = ft_launcher.Job(run_dir, ft_launcher.RestartPolicy(3), 30.0)
        self._store, self._remaining_restarts = None, 2
        self._worker_group: Any = SimpleNamespace(group_rank=1, spec=SimpleNamespace(max_restarts=3))
        self.world = world

    def _world(self) -> int:
        return len(list(self._attempt_dir.glob("rank*.json"))) if self.world is None else self.world


def verdict_of(agent: Agent, failures: dict[int, ProcessFailure] | None = None) -> str:
    """What the launcher logs, warnings about what it could not read included."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    ft_launcher.log.addHandler(handler)
    try:
        entry = agent._note_incident(failures=failures or {})
        assert entry is not None and agent._note_incident(failures={}) is None
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


@pytest.mark.parametrize("report_file", [None, '{"rank": 1, "sta'])
def test_the_failed_ranks_missing_report_is_made_up_from_what_torch_knows(
    tmp_path: Path, report_file: str | None
) -> None:
    agent = Agent(tmp_path, world=3)
    write_reports(agent._attempt_dir, [report(0), report(2)])
    if report_file is not None:
        (agent._attempt_dir / "rank1.json").write_text(report_file)
    failure = ProcessFailure(local_rank=1, pid=2001, exitcode=7, error_file="none")
    *warnings, verdict, _ = verdict_of(agent, {1: failure}).splitlines()
    assert warnings[-1] == "rank 1: its report is missing; its monitor (pid 2001) ended with status 7"
    assert len(warnings) == (1 if report_file is None else 2)
    assert verdict.endswith(" at step 10: rank 1 (its monitor's pid 2001) ended with exit code 7")


def test_a_node_whose_ranks_are_ended_for_another_nodes_failure_tells_where_the_evidence_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent(tmp_path)
    agent._pcontext = None
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda *_: None)
    monkeypatch.setattr(ft_launcher.log, "propagate", True)
    agent._stop_workers(None)  # type: ignore[arg-type]
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"attempt 0 ended after .*: another node's workers failed, or nodes joined\n", line)
    assert line.endswith(f"  evidence: {tmp_path / 'attempt_0'}; restarting, 2 of 3 left")


@pytest.mark.parametrize(("status", "shown"), [(7, True), (0, False)])
def test_the_summary_is_shown_at_the_end_of_a_single_attempt_if_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int, shown: bool
) -> None:
    agent = Agent(tmp_path)
    agent._pcontext = None
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda *_: None)
    monkeypatch.setattr(ft_launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ft_launcher.log, "propagate", True)
    write_reports(agent._attempt_dir, [report(0, stopped=None, status=status)])
    with caplog.at_level(logging.INFO, "ft_launcher"):
        agent._shutdown()
    texts = [line.getMessage() for line in caplog.records]
    assert len(texts) == int(shown) and all("goodput" in text for text in texts)
    assert all(len(line) <= 100 - len("[ft_launcher] ") for text in texts for line in text.splitlines())


def test_an_incident_has_the_host_the_times_the_steps_and_what_the_end_cost() -> None:
    reports = [
        report(0, first_heartbeat=30.0, heartbeat=100.0, first_step=4, step=12, saved=8, ended=130.0),
        report(1, first_heartbeat=31.0, heartbeat=101.0, first_step=5, step=11, saved=7, ended=131.0, status=7),
    ]
    entry = ft_launcher.incident(2, 10.0, reports, {}, None, previous_end=7.5)
    expected = {
        "attempt": 2, "host": socket.gethostname(), "start": 10.0, "first_heartbeat": 30.0, "last_heartbeat": 100.0,
        "end": 131.0, "detection": 31.0, "restart": 2.5, "first_step": 4, "last_step": 12, "saved_step": 8,
        "statuses": {"0": -9, "1": 7}, "connected": True,
    }  # fmt: skip
    assert {name: entry[name] for name in expected} == expected
    stopped = ft_launcher.incident(0, 10.0, reports, {}, "stopped by SIGTERM")
    assert stopped["detection"] is None and stopped["restart"] is None, "the grace is no detection"


def test_the_verdict_knows_that_there_are_ranks_on_other_nodes(tmp_path: Path) -> None:
    for world, certain in ((1, True), (2, False)):
        agent = Agent(tmp_path / str(world), world)
        write_reports(agent._attempt_dir, [hung(0)])
        assert ("suspect: rank 0" not in verdict_of(agent)) == certain


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
    detection = None if last is None or values.get("verdict", "") is None else end - last
    return ft_launcher.with_gaps({"attempt": attempt, **times, "detection": detection, **usual, **values})


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
    # Of a failure that nothing follows, what was saved counts.
    "the last attempt failed": ([TWO[0]], (120, 80, 20, 10, 0, 10, 20)),
    "the last attempt failed, and nothing was saved": (
        [{**TWO[0], "saved_step": None}],
        (120, 0, 100, 10, 0, 10, 100),
    ),
    # Attempt 2 begins at 0: nothing of the two before it counts.
    "steps that an attempt after the next does again": (
        [
            row(0, 0, 10, 110, 111, first_step=0, last_step=100, saved_step=80),
            row(1, 112, 120, 140, 141, first_step=80, last_step=100),
            row(2, 142, 150, 250, 251, first_step=0, last_step=100, saved_step=100, **WELL),
        ],
        (251, 100, 120, 2, 2, 10 + 8 + 8 + 1, 120),
    ),
    "the grace of one that was stopped is no detection": (
        [
            row(
                0,
                0,
                10,
                60,
                90,
                first_step=0,
                last_step=50,
                saved_step=50,
                detection=None,
                verdict="stopped by SIGTERM",
            )
        ],
        (90, 50, 0, 0, 0, 10 + 30, 0),
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
    long = {**TWO[0], "verdict": "rank 1 (pid 812) failed: ValueError: " + "x y " * 75, "certain": False}
    long["ranks_at"] = "rank 1 is at train.py:7 in load_batch; ranks 0, 2-3 wait at train.py:9 in step -> all_reduce"
    text = ft_launcher.render_report([long, TWO[1]])
    head, first, *why, second, goodput, lost = text.splitlines()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert head.split() == ["attempt", "started", "ran", "steps", "saved", "why", "it", "ended"]
    assert re.match(r" +0  \d\d:\d\d:\d\d +2 m 00 s +0-100 +80$", first)
    assert re.match(r" +1  \d\d:\d\d:\d\d +1 m 51 s +80-180 +180  ended well$", second)
    told = " ".join(" ".join(why).split())
    assert told == f"suspect: {long['verdict'].strip()} {long['ranks_at']}" and all(line[:9] == " " * 9 for line in why)
    assert goodput == "goodput 76.3 %: 3 m 00 s of 3 m 56 s wall time in steps that counted"
    assert lost == ("lost: 21.0 s set-up, 20.0 s in 20 steps repeated or unsaved, 10.0 s detection, 5.0 s restart")
    nothing = "goodput 0.0 %: 0.0 s of 0.0 s wall time in steps that counted"
    assert ft_launcher.render_report([]).splitlines()[1] == nothing
    narrow = ft_launcher.render_report([long], width=60).splitlines()
    assert all(len(line) <= 60 for line in narrow[1:]) and narrow[-1].startswith("  ")


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

RUNS: dict[str, Any] = {"ended": None, "stopped": None, "status": None}
NEVER: dict[str, Any] = {"heartbeat": None, "first_heartbeat": None, "step": None}
CLOCK = {"setting": "rank_heartbeat_timeout", "since": 100.0, "limit": 30.0}
HERE: dict[str, Any] = {**RUNS, "host": socket.gethostname(), "monitor_pid": os.getpid()}
PHASES = {
    # phase: report, the heartbeat's age, and the age, limit and setting of the clock, at 112
    "starting": (
        report(0, **{**RUNS, **NEVER, "connected": None}, clock={**CLOCK, "since": 10.0, "setting": "startup_timeout"}),
        "- 102.0 s 30 s", "startup_timeout",
    ),
    "set-up": (report(0, **{**RUNS, **NEVER}, clock={**CLOCK, "since": 20.0}), "- 92.0 s 30 s", CLOCK["setting"]),
    "training": (report(0, **RUNS, clock=CLOCK), "12.0 s 12.0 s 30 s", CLOCK["setting"]),
    "in checkpointing, step": (
        report(0, **{**RUNS, "sections": ["checkpointing", "step"]}, clock={**CLOCK, "since": 110.0, "limit": None}),
        "12.0 s 2.0 s none", CLOCK["setting"],
    ),
    "failed: ValueError: x": (
        report(0, **{**RUNS, "error": "ValueError: x"}, over=True, clock={**CLOCK, "setting": "exit_timeout"}),
        "12.0 s 12.0 s 30 s", "exit_timeout",
    ),
    "after training": (report(0, **RUNS, over=True), "12.0 s - none", None),
    "its peer failed": (report(0, clock=CLOCK), "- - none", None),
    "ended with status 0": (report(0, stopped=None, status=0), "- - none", None),
    "gone": (report(0, **{**HERE, "monitor_pid": 2**22 + 1}, clock=CLOCK), "- - none", None),
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_has_a_row_with_the_age_of_its_heartbeat_its_clock_and_its_phase(phase: str) -> None:
    values, ages, setting = PHASES[phase]
    assert ft_launcher.phase(values) == phase
    head, line = ft_launcher.render_status([values], now=112.0).splitlines()
    step = "-" if values["step"] is None else "10"
    text = f"{phase} ({setting})" if setting else phase
    assert head.split() == ["rank", "pid", "attempt", "step", "heartbeat", "clock", "limit", "phase"]
    assert line.split() == ["0", "1000", "0", step, *ages.split(), *text.split()]
    assert line.index(phase) == head.index("phase")


def test_a_rank_whose_monitor_still_runs_or_is_on_another_host_is_not_gone() -> None:
    elsewhere = report(0, **{**HERE, "host": "another", "monitor_pid": 2**22 + 1})
    assert [ft_launcher.phase(values) for values in (report(0, **HERE), elsewhere)] == ["training", "training"]


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
        ["--ft-status"], ["--ft_status", str(run_dir)],
        [f"--ft-run-dir={run_dir}", "--ft-status"], ["--ft_run_dir", str(run_dir), "--ft_status"],
        ["--ft-status", "--ft-run-dir", str(run_dir)],
    ):  # fmt: skip
        assert ft_launcher.main(command) == 0
        shown, _, *rows = capsys.readouterr().out.splitlines()
        assert shown == str(run_dir)
        assert [line.split()[0] for line in rows] == ["0", "1"] and all(line.endswith("training") for line in rows)


def test_the_status_honours_the_environment_variable_of_the_run_directory(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_FT_RUN_DIR", str(run_dir.parent))
    assert ft_launcher.main(["--ft-status"]) == 0
    assert capsys.readouterr().out.startswith(f"{run_dir}\n")


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--ft-status"],
        ["--nproc-per-node=2", "train.py", "-w", "--ft-report"],
        ["-w", "train.py"],
        ["-w"],
        [],
    ],
)
def test_a_flag_of_the_script_does_not_ask_for_the_status(command: list[str]) -> None:
    assert not ft_launcher.asks_to_look(command)


@pytest.mark.parametrize("flags", [["--ft-status", "-w"], ["-w", "--ft-status"], ["--ft-status", "--watch"]])
def test_the_watched_status_follows_the_newest_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt
        newest = run_dir.parent / "newest"
        write_reports(newest / "attempt_0", [report(5, **RUNS)])
        (newest / "latest").symlink_to("attempt_0")

    monkeypatch.setattr(time, "sleep", sleep)
    assert ft_launcher.main([*flags, f"--ft-run-dir={run_dir.parent}"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("/")]
    assert shown == [str(run_dir), str(run_dir.parent / "newest")] and waited == [1.0, 1.0]


def test_a_reader_that_ends_early_ends_the_watched_status_without_a_traceback(run_dir: Path) -> None:
    command = [sys.executable, str(ROOT / "ft_launcher.py"), "--ft-status", str(run_dir), "-w"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watch.stdout is not None and watch.stderr is not None
    watch.stdout.readline()
    watch.stdout.close()
    assert (watch.wait(60), watch.stderr.read()) == (0, b"")
    watch.stderr.close()


@pytest.mark.parametrize("flag", ["--ft-status", "--ft-report"])
def test_a_run_that_may_not_be_read_costs_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_symlink", refuse)
    with pytest.raises(SystemExit, match="2"):
        ft_launcher.main([flag, str(run_dir)])
    assert f"cannot read '{run_dir / 'latest'}': Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("colour", [True, False])
def test_the_report_is_in_colour_on_a_terminal_alone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], colour: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: colour, raising=False)
    assert ft_launcher.main(["--ft-report", str(run_dir)]) == 0
    assert ("\033[31m" in capsys.readouterr().out) == colour


def test_an_attempt_whose_launcher_was_killed_has_a_row_made_of_its_ranks_reports(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**HERE, "attempt": 1, "ended": 150.0, "stopped": "the launcher (pid 7) is gone", "status": -9, "step": 7}
    for launcher, rows in ((os.getpid(), 0), (2**22 + 1, 1)):
        write_reports(run_dir / "latest", [report(rank, **values, launcher_pid=launcher) for rank in (0, 1)])
        (run_dir / "incidents.jsonl").write_text(f"{json.dumps({**TWO[0], 'end': 5.0})}\n")
        assert ft_launcher.main(["--ft-report", str(run_dir)]) == 0
        killed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("its launcher was killed")]
        assert len(killed) == rows
    assert re.match(r" +1  \d\d:\d\d:\d\d +2 m 20 s +0-7 +-  its launcher was killed$", killed[0])


def test_incidents_that_lack_fields_are_shown_as_far_as_they_go(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"start": 1}', '{"start": 1, "attempt": 0, "end": 3, "verdict": null}', "[]", "{"]
    (run_dir / "incidents.jsonl").write_text("\n".join(lines))
    assert ft_launcher.main(["--ft-report", str(run_dir)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 1 + 1 + 2 and rows[2].split()[0] == "0" and rows[2].endswith("ended well")


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
