"""Every failure explains itself: which rank, why, where the others waited; and where time went."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Started

import ft_monitor
from ft_monitor import End, Incident, Outcome, Report

NOBODY = 2**22 + 1  # above the highest process id there can be

Places = dict[int, tuple[str, bool]]  # by rank: where it was, and whether it waited there
TRAIN = ("at train.py:7 in load_batch -> read", False)
WAITS = ("waiting at train.py:9 in step -> all_reduce", True)


def report(rank: int, **values: Any) -> Report:
    """A rank that was ended since its peer failed, at step 10, with its last heartbeat at 100."""
    usual: dict[str, Any] = {
        "pid": 1000 + rank,
        "monitor_pid": 2000 + rank,
        "started": 10.0,
        "connected": 20.0,
        "first_heartbeat": 30.0,
        "heartbeat": 100.0,
        "waiting": "no heartbeat for 31.0 s",
        "ended": 131.0,
        "first_step": 0,
        "step": 10,
        "end": End.PEER_FAILED,
        "reason": "its peer failed",
        "status": -9,
    }
    return Report(rank, **{**usual, **values})


def hung(rank: int, **values: Any) -> Report:
    return report(rank, **{"end": End.HUNG, "reason": "hung: no heartbeat for 30.0 s", **values})


def ended(rank: int, status: int | None, **values: Any) -> Report:
    return report(rank, **{"end": End.BY_ITSELF, "reason": None, "status": status, **values})


RUNS: dict[str, Any] = {"end": End.RUNNING, "reason": None, "ended": None, "status": None}


def incident_of(
    reports: list[Report], directory: Path, outcome: Outcome = Outcome.FAILED, world: int = 0
) -> Incident:
    for each in reports:
        each.place, each.waits = ft_monitor.read_place(directory, each)
    return ft_monitor.make_incident(0, 10.0, outcome, reports, world)


def placed(reports: list[Report], places: Places) -> list[Report]:
    return [
        dataclasses.replace(x, place=places[x.rank][0], waits=places[x.rank][1])
        if x.rank in places
        else x
        for x in reports
    ]


def write_reports(directory: Path, reports: list[Report]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for values in reports:
        text = ft_monitor.to_text(dataclasses.asdict(values))
        (directory / f"rank{values.rank}.json").write_text(text)


# --------------------------------------------------------------------------- who is to blame

GLOO = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"
)
NCCL = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2027, remote process exited"
STORE = "DistStoreError: wait timeout after 300000ms, keys: /0/default_pg/0//key"

NO_STEP: dict[str, Any] = {"step": None, "first_step": None, "heartbeat": None}
SUSPECTS: dict[str, tuple[list[Report], Places, int, bool]] = {
    # what happened: reports, places, the suspect, certain
    "the only one that failed": ([report(0, step=9), ended(1, 7)], {1: WAITS}, 1, True),
    "the first exception of two": (
        [
            report(0, step=9, error="ValueError: b", error_time=101.0),
            report(1, error="ValueError: a", error_time=100.5),
        ],
        {},
        1,
        True,
    ),
    "an exception before the exit code of a later one": (
        [ended(0, 7, ended=102.0), report(1, error="ValueError: a", error_time=100.5)],
        {},
        1,
        True,
    ),
    "killed, and its peer's gloo complains first": (
        [report(0, error=GLOO, error_time=100.0), ended(1, -9, ended=100.5)],
        {},
        1,
        True,
    ),
    "raised, and its peer's NCCL complains first": (
        [
            report(0, error=NCCL, error_time=100.0),
            report(1, error="ValueError: a", error_time=100.5),
        ],
        {},
        1,
        True,
    ),
    "its monitor was killed": ([report(0), report(1, **RUNS)], {}, 1, True),
    "the monitor of a survivor was killed as well": (
        [report(0, ended=None, status=None), ended(1, 7)],
        {},
        1,
        True,
    ),
    "its monitor alone was told to stop": (
        [report(0), ended(1, -15, end=End.STOPPED, reason="stopped by SIGTERM")],
        {},
        1,
        True,
    ),
    "the user's own connection failed, while its peer was busy": (
        [report(0), report(1, error="ConnectionError: cannot reach s3: Connection reset by peer")],
        {0: TRAIN},
        1,
        True,
    ),
    "a connection of a DataLoader worker failed, while its peer was busy": (
        [
            report(0),
            report(
                1,
                error="RuntimeError: Caught ConnectionResetError in DataLoader worker process 0. "
                "... ConnectionResetError: [Errno 104] Connection reset by peer",
            ),
        ],
        {0: TRAIN},
        1,
        True,
    ),
    "hangs, and its peers' collectives time out": (
        [report(0, error=STORE), report(1, step=11), report(2, error=GLOO)],
        {},
        1,
        False,
    ),
    "all have a communication error: the first, but who knows": (
        [report(0, error=GLOO, error_time=101.0), report(1, error=NCCL, error_time=100.0)],
        {},
        1,
        False,
    ),
    "waits too long, and its peer complains that it was killed": (
        [report(0, error=GLOO, error_time=101.0), hung(1)],
        {0: WAITS, 1: WAITS},
        1,
        False,
    ),
    "stopped by a debugger": ([hung(0), hung(1, state="T", step=11)], {1: WAITS}, 1, True),
    "two are stopped": ([hung(0, state="T"), hung(1, state="T", step=9)], {}, 1, True),
    "sleeping is not stopped": ([hung(0, state="S"), hung(1, step=9, state="S")], {}, 1, False),
    "the one that does not wait": (
        [hung(0, step=9), report(1), hung(2)],
        {0: WAITS, 1: TRAIN, 2: WAITS},
        1,
        False,
    ),
    "gave no stacks": (
        [hung(0), report(1, stacks=False), report(2)],
        {0: WAITS, 2: WAITS},
        1,
        False,
    ),
    "waits since its heartbeat, which was earlier than that of the one it waits for": (
        [hung(0, heartbeat=97.0), hung(1)],
        {0: WAITS, 1: TRAIN},
        1,
        False,
    ),
    "ended with 0, and its peer's gloo complains": (
        [report(0, error=GLOO), ended(1, 0)],
        {},
        1,
        False,
    ),
    "ended with 0, and its peer waits": ([hung(0), ended(1, 0)], {0: WAITS}, 1, False),
    "hangs when its peer has ended with 0": (
        [ended(0, 0, heartbeat=90.0), hung(1)],
        {1: TRAIN},
        1,
        False,
    ),
    "a lower step": ([hung(0, heartbeat=90.0), hung(1, step=9)], {}, 1, False),
    "no step at all": ([hung(0), report(1, **NO_STEP)], {}, 1, False),
    "never connected": (
        [hung(0, **NO_STEP), hung(1, **NO_STEP, connected=None)],
        {},
        1,
        False,
    ),
    "an older heartbeat": (
        [hung(0), hung(1, heartbeat=95.0), hung(2)],
        {0: TRAIN},
        1,
        False,
    ),
    "an older heartbeat, but not by much: the odd one of many that wait": (
        [hung(0, heartbeat=99.5), hung(1), hung(2)],
        {0: WAITS, 1: ("waiting elsewhere", True), 2: WAITS},
        1,
        False,
    ),
    "one rank alone": ([hung(1)], {1: WAITS}, 1, True),
    "one rank alone, with a communication error": ([report(1, error=STORE)], {}, 1, True),
}


@pytest.mark.parametrize("what", SUSPECTS)
def test_the_suspect_is_the_rank_that_failed_or_fell_behind_first(what: str) -> None:
    reports, places, suspect, certain = SUSPECTS[what]
    for order in (reports, reports[::-1]):
        found, verdict = ft_monitor.judge(placed(order, places), 0)
        assert found is not None
        assert (found.rank, not verdict.startswith("suspect: ")) == (suspect, certain)


@pytest.mark.parametrize("where", [{}, {0: WAITS}, {0: TRAIN}])
def test_where_ranks_are_elsewhere_one_that_hangs_is_never_suspected_for_certain(
    where: Places,
) -> None:
    found, verdict = ft_monitor.judge(placed([hung(0)], where), 2)
    if where == {0: WAITS}:
        assert found is None and verdict == (
            "this node's ranks wait for another node's: see the verdict of that node's launcher; "
            "rank 0 (pid 1000) hung: no heartbeat for 30.0 s"
        )
    else:
        assert found is not None and verdict.startswith("suspect: ")
    for certain in (report(0, error="ValueError: x"), hung(0, state="T")):
        found, verdict = ft_monitor.judge(placed([certain], where), 2)
        assert found is not None and verdict.startswith("rank 0"), "wherever the others are"


def test_the_hang_that_ended_an_attempt_is_told_also_where_another_rank_is_the_suspect() -> None:
    ranks = placed([report(0), hung(1)], {0: TRAIN, 1: WAITS})
    suspect, verdict = ft_monitor.judge(ranks, 2)
    assert suspect and suspect.rank == 0 and "; rank 1 (pid 1001) hung: no heartbeat" in verdict


def test_a_node_whose_ranks_only_wait_shows_what_they_noticed_of_the_other_nodes() -> None:
    waits = [hung(0), report(1, error=GLOO, error_time=130.0)]
    found, verdict = ft_monitor.judge(placed(waits, {0: WAITS, 1: WAITS}), 4)
    assert found is None and verdict.endswith("; rank 1 (pid 1001) failed: " + GLOO)


def test_a_communication_error_is_shown_although_another_rank_is_suspected() -> None:
    error = f"{GLOO} (train.py:3 in load)"
    peers = [report(1, error=error), report(2, error=GLOO)]
    _, verdict = ft_monitor.judge([report(0), *peers], 0)
    assert verdict == (
        "suspect: rank 0 (pid 1000) did not go on: no heartbeat for 31.0 s; "
        f"rank 1 (pid 1001) failed: {error}"
    )
    _, verdict = ft_monitor.judge([ended(0, 7), report(1, error=error)], 0)
    assert verdict == "rank 0 (pid 1000) ended with exit code 7"


@pytest.mark.parametrize(
    ("error", "communication", "transient"),
    [
        (GLOO, True, True),
        (NCCL, True, True),
        (STORE, True, True),
        ("RuntimeError: Gloo connectFullMesh failed with [gloo/x.cc:1] no error", True, True),
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
def test_what_others_cause_and_what_may_go_away_is_told_from_what_the_code_does(
    error: str, communication: bool, transient: bool
) -> None:
    assert ft_monitor.raised_by_itself(report(0, error=error)) != communication
    assert bool(re.search(ft_monitor.INFRASTRUCTURE_ERROR, error)) == transient


def test_the_names_of_file_and_function_say_nothing_of_an_errors_kind() -> None:
    error = "ValueError: a (b) (gloo_nccl.py:3 in connection)"
    assert ft_monitor.without_place(error) == "ValueError: a (b)"
    assert ft_monitor.without_place(None) == ""
    assert ft_monitor.raised_by_itself(report(0, error="RuntimeError: x (train.py:3 in gloo)"))
    assert not ft_monitor.raised_by_itself(report(0))


# ----------------------------------------------------------------------- what is said of it

FAILURES = {
    "failed: ValueError: {x}": hung(1, error="ValueError: {x}"),
    "ended with its monitor (pid 2001), which was killed": report(1, **RUNS),
    "hung: no heartbeat for 30.0 s": hung(1),
    "stopped by SIGTERM": ended(1, 0, end=End.STOPPED, reason="stopped by SIGTERM"),
    "did not go on: no heartbeat for 31.0 s": report(1),
    "ended with exit code 0, while others went on": ended(1, 0, connected=None),
    "ended with exit code 7": ended(1, 7),
    "ended by SIGSEGV": ended(1, -11),
    "ended by signal 40": ended(1, -40),
    "ended by SIGKILL, which nobody here sent": ended(1, -9, oom_kills=0),
    "ended by SIGKILL: out of memory, such kills here: 2": ended(1, -9, oom_kills=2),
}


@pytest.mark.parametrize("sentence", FAILURES)
def test_what_was_wrong_with_a_rank_is_one_sentence(sentence: str) -> None:
    assert ft_monitor.describe_failure(FAILURES[sentence]) == f"rank 1 (pid 1001) {sentence}"


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(7, "ended with exit code 7"), (-9, "ended by SIGKILL, which nobody here sent")],
)
def test_of_a_rank_without_a_report_what_torch_knows_is_said(status: int, sentence: str) -> None:
    made_up = Report(1, monitor_pid=2001, status=status, ended=120.0)
    found, verdict = ft_monitor.judge([report(0), made_up], 2)
    assert found == made_up and verdict == f"rank 1 (its monitor's pid 2001) {sentence}"


def test_places_begin_with_the_suspect_and_gather_those_who_are_together() -> None:

    def describe(suspect: int | None, places: Places) -> str:
        return ft_monitor.describe_places(suspect, placed([*map(report, places)], places))

    assert describe(1, {1: TRAIN, 0: WAITS, 2: WAITS, 3: WAITS}) == (
        "rank 1 at train.py:7 in load_batch -> read; "
        "ranks 0, 2, 3 waiting at train.py:9 in step -> all_reduce"
    )
    assert describe(None, {0: TRAIN, 1: WAITS, 2: WAITS}).startswith("ranks 1, 2 waiting")
    assert describe(1, {}) == ""
    crowd = {rank: (f"at train.py:{rank} in spin", False) for rank in range(8)}
    assert describe(7, crowd).startswith("rank 7 at train.py:7 in spin; rank 0 at train.py:0")
    assert describe(7, crowd).endswith("rank 3 at train.py:3 in spin; 3 more places")


def test_the_verdict_on_64_ranks_fits_a_screen(tmp_path: Path) -> None:
    ranks = [hung(rank, step=9 if rank == 63 else 10) for rank in range(64)]
    for rank in range(32):  # each at a place of its own, and the others together
        name = f'File "/home/me/train.py", line {rank} in a_function_with_a_long_name_{rank}'
        (tmp_path / f"rank{rank}.stacks.txt").write_text(dump(MAIN, f"  {name}"))
    for rank in range(32, 64):
        (tmp_path / f"rank{rank}.stacks.txt").write_text(dump(MAIN, USER))
    text = ft_monitor.explain(incident_of(ranks, tmp_path), "/evidence", "restarting")
    first, places, last = text.splitlines()
    assert first == (
        "attempt 0 ended after 0:02:01 at step 10: "
        "suspect: rank 63 (pid 1063) hung: no heartbeat for 30.0 s"
    )
    assert places.startswith("  ranks 32, 33, 34, 35, 36, 37, ... at train.py:41 in ")
    assert places.endswith("; 28 more places") and len(places) < 400
    assert last == "  evidence: /evidence; restarting"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (8.06, "8.1 s"),
        (59.94, "59.9 s"),
        (59.97, "0:01:00"),
        (871, "0:14:31"),
        (3599, "0:59:59"),
        (3599.6, "1:00:00"),
        (10920, "3:02:00"),
        (360000, "4 days, 4:00:00"),
    ],
)
def test_durations_are_short_and_right(seconds: float, text: str) -> None:
    assert ft_monitor.duration(seconds) == text


# ------------------------------------------------------------------------------ where it was

LIBRARY = "/usr/lib/python3/site-packages/torch"
C10D = f'  File "{LIBRARY}/distributed/distributed_c10d.py", line 3000 in all_reduce'
WRAPPER = f'  File "{LIBRARY}/distributed/c10d_logger.py", line 81 in wrapper'
BACKWARD = f'  File "{LIBRARY}/autograd/graph.py", line 800 in _engine_run_backward'
FORWARD = f'  File "{LIBRARY}/nn/parallel/distributed.py", line 1500 in _pre_forward'
OURS = '  File "/home/me/ft_monitor.py", line 999 in wait'
USER = '  File "/home/me/my model/train.py", line 41 in step'
MODULE = '  File "/home/me/my model/train.py", line 80 in <module>'
OLD = '  File "/home/me/old.py", line 1 in old'
MAIN = "Current thread 0x00007f0000000001 (most recent call first):"
LOADER = (
    'Thread 0x00007f0000000002 (most recent call first):\n  File "/home/me/data.py", line 5 in f'
)


def dump(*lines: str, at: float = 131.0) -> str:
    """Stacks as a monitor keeps them: see Stacks.take()."""
    return "\n".join(["", f"{ft_monitor.STACKS_HEADER} {at:.6f} (12:00:00) why", *lines, ""])


REDUCING = dump(MAIN, C10D, WRAPPER, USER, MODULE)
REDUCES = "waiting at train.py:41 in step -> all_reduce"
STACKS: dict[str, tuple[str, str | None]] = {
    "library frames": (REDUCING, REDUCES),
    "several threads, the main one last": (
        dump(f"{MAIN}\n{OURS}\n", LOADER, "", MAIN.replace("Current t", "T"), C10D, USER),
        REDUCES,
    ),
    "several dumps, the last counts": (dump(MAIN, OLD) + REDUCING, REDUCES),
    "the last dump is empty": (REDUCING + dump(), REDUCES),
    "the user's own line": (dump(MAIN, USER, MODULE), "at train.py:41 in step"),
    "in the backward pass, where gradients are reduced": (
        dump(MAIN, BACKWARD, USER),
        "waiting at train.py:41 in step -> _engine_run_backward",
    ),
    "in DistributedDataParallel": (
        dump(MAIN, FORWARD, USER),
        "waiting at train.py:41 in step -> _pre_forward",
    ),
    "library frames alone": (
        dump(MAIN, '  File "<frozen importlib._bootstrap>", line 9 in _load', C10D),
        "at distributed_c10d.py:3000 in all_reduce -> _load",
    ),
    "more frames than faulthandler writes": (dump(MAIN, USER, "  ..."), "at train.py:41 in step"),
    "a dump of before its last sign of life": (dump(MAIN, USER, at=99.0), None),
    "a dump of before, and one since": (dump(MAIN, OLD, at=99.0) + REDUCING, REDUCES),
    "nothing": ("", None),
    "a header alone": (dump(), None),
    "no frames": (dump(MAIN, "  <no Python frame>"), None),
    "noise": ("\x00\xff not a stack\n", None),
}


@pytest.mark.parametrize("what", STACKS)
def test_a_place_is_the_main_threads_innermost_line_of_the_users(tmp_path: Path, what: str) -> None:
    text, expected = STACKS[what]
    (tmp_path / "rank0.stacks.txt").write_bytes(text.encode("latin-1"))
    place, waits = ft_monitor.read_place(tmp_path, report(0))
    assert place == (expected or "") and waits == place.startswith("waiting")


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("work.wait()", True),
        ("loss.item()", True),
        ("x = grads.cpu()", True),
        ("y = x.tolist()", True),
        ("torch.cuda.synchronize()", True),
        ("items(x)", False),
        ("self.wait_for(x)", False),
        ("pass", False),
    ],
)
def test_a_rank_waits_where_its_line_calls_what_has_no_frame_of_its_own(
    tmp_path: Path, line: str, waits: bool
) -> None:
    script = tmp_path / "train.py"
    (tmp_path / "rank0.stacks.txt").write_text(dump(MAIN, f'  File "{script}", line 2 in step'))
    for code, is_waiting in (("pass", False), (line, waits)):  # it was edited in between
        script.write_text(f"def step():\n    {code}  # {code}\n")
        place, waits_there = ft_monitor.read_place(tmp_path, report(0))
        assert place and waits_there == is_waiting


def test_stacks_count_from_the_last_heartbeat_or_from_the_error_of_a_rank(tmp_path: Path) -> None:
    (tmp_path / "rank0.stacks.txt").write_text(dump(MAIN, USER, at=110.0))
    assert ft_monitor.read_place(tmp_path, report(0, heartbeat=109.0))[0]
    late = {"error": "ValueError: x", "error_time": 111.0}
    for values in ({"heartbeat": 111.0}, late):
        assert ft_monitor.read_place(tmp_path, report(0, **values)) == ("", False)


def test_ranks_that_gave_no_stacks_are_named_with_their_state(tmp_path: Path) -> None:
    (tmp_path / "rank0.stacks.txt").write_text(REDUCING)
    silent = [report(rank, state="D", stacks=False) for rank in (1, 2)]
    places = incident_of([hung(0), *silent], tmp_path).places
    assert places == f"ranks 1, 2 without stacks (state D); rank 0 {REDUCES}"
    for values in ({"stacks": None}, {"stacks": False, "error": GLOO}):
        places = incident_of([hung(0), report(1, **values)], tmp_path).places
        assert places == f"rank 0 {REDUCES}", "it was not asked, or was ending"


# ---------------------------------------------------------------------------------- attempts


def test_an_incident_has_the_times_the_steps_and_why_it_ended(
    tmp_path: Path,
) -> None:
    request = {"action": "ShutdownWorkload", "reason": "x"}
    reports = [
        report(0, first_step=4, step=12, saved=8, ended=130.0),
        ended(1, 7, first_heartbeat=31.0, heartbeat=101.0, first_step=5, step=11, request=request),
    ]
    incident = incident_of(reports, tmp_path)
    assert incident == Incident(
        attempt=0,
        start=10.0,
        end=131.0,
        outcome=Outcome.FAILED,
        first_heartbeat=30.0,
        last_heartbeat=100.0,
        first_step=4,
        last_step=12,
        saved_step=8,
        connected=True,
        requests=[request],
        why="rank 1 (pid 1001) ended with exit code 7",
        suspect=1,
    )
    assert incident_of([report(0, error="ValueError: x")], tmp_path).error == "ValueError: x"


@pytest.mark.parametrize(
    ("reports", "world", "outcome", "why"),
    [
        ([ended(0, 0)], 1, Outcome.WELL, "ended well"),
        ([ended(0, 0), ended(1, 7)], 2, Outcome.FAILED, "rank 1 (pid 1001) ended with exit code"),
        ([hung(0)], 2, Outcome.FAILED, "suspect: rank 0 (pid 1000) hung: no heart"),
        ([report(0)], 1, Outcome.STOPPED, "stopped by a signal"),
        ([report(0)], 1, Outcome.ELSEWHERE, "another node's workers failed, or nodes joined"),
        ([], 1, Outcome.FAILED, "its workers failed, and there is no report of how"),
    ],
)
def test_an_attempts_end_is_an_outcome_and_has_its_words(
    tmp_path: Path, reports: list[Report], world: int, outcome: Outcome, why: str
) -> None:
    before = time.time()
    incident = incident_of(reports, tmp_path, outcome, world)
    assert incident.outcome == outcome and incident.why.startswith(why)
    assert incident.end == 131.0 if reports else incident.end >= before


def test_the_explanation_of_an_attempt_without_a_step_names_none(tmp_path: Path) -> None:
    quick = incident_of([ended(0, 7, **NO_STEP)], tmp_path)
    text = ft_monitor.explain(quick, "/evidence", "no restarts left")
    assert text.startswith("attempt 0 ended after 0:02:01: rank 0 (pid 1000) ended with exit")


def test_reports_that_cannot_be_read_cost_a_line_each_and_not_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_reports(tmp_path, [report(11), report(1), report(0)])
    bad = (b'{"rank": 3, "sta', b"", b"[1, 2]", b'{"pid": 4}', b"\xff\xfe", b'{"rank": "x"}', b"0")
    for number, content in enumerate(bad, 2):
        (tmp_path / f"rank{number}.json").write_bytes(content)
    (tmp_path / "rank10.json").mkdir()
    assert ft_monitor.read_reports(tmp_path) == [report(0), report(1), report(11)]
    assert len(caplog.messages) == len(bad) + 1
    assert all("cannot read the report" in message for message in caplog.messages)
    assert ft_monitor.read_reports(tmp_path / "missing") == []


def test_incidents_are_read_as_they_were_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    incident = incident_of([hung(0), report(1, error=GLOO)], tmp_path)
    line = ft_monitor.to_text(dataclasses.asdict(incident))
    bad = ['{"attempt": 1}\n', "[]\n", line.replace('"failed"', '"odd"'), '{"attempt": 2, "sta']
    (tmp_path / "incidents.jsonl").write_text("".join([line, *bad]))
    (found,) = ft_monitor.read_incidents(tmp_path)
    assert found == incident and isinstance(found.outcome, Outcome)
    assert [message.startswith("skipped a line of") for message in caplog.messages] == [True] * 4
    assert ft_monitor.read_incidents(tmp_path / "missing") == []


# ----------------------------------------------------------------------- where the time went


def row(
    attempt: int, start: float, first: float | None, last: float | None, end: float, **values: Any
) -> Incident:
    """An attempt that failed."""
    usual: dict[str, Any] = {
        "outcome": Outcome.FAILED,
        "why": "rank 1 hung",
        **dict.fromkeys(("first_step", "last_step", "saved_step")),
        **{"connected": True, "requests": []},
    }
    times = {"start": start, "end": end, "first_heartbeat": first, "last_heartbeat": last}
    return Incident(attempt, **{**usual, **times, **values})


WELL: dict[str, Any] = {"outcome": Outcome.WELL, "why": "ended well"}

# 10 s set-up, 100 steps in 100 s, 10 s until the hang is noticed, of which 20 steps are done again;
# 5 s to restart; 10 s set-up, 100 steps in 100 s, 1 s to end well. Of 236 s, 180 s counted: 76.3 %.
TWO = [
    row(0, 1000, 1010, 1110, 1120, first_step=0, last_step=100, saved_step=80),
    row(1, 1125, 1135, 1235, 1236, first_step=80, last_step=180, **WELL),
]
STEPS_50: dict[str, Any] = {"first_step": 0, "last_step": 50}
SPENT: dict[str, tuple[list[Incident], tuple[float, ...]]] = {
    # what happened: incidents; seconds in all, counted, repeated or unsaved
    "a hang and its restart": (TWO, (236, 180, 20)),
    "nothing has ended": ([], (0, 0, 0)),
    "one that never had a heartbeat": ([row(0, 0, None, None, 7)], (7, 0, 0)),
    "the next begins at 0, although a checkpoint was saved": (
        [TWO[0], dataclasses.replace(TWO[1], first_step=0)],
        (236, 100, 100),
    ),
    "saved, then one that never had a step": (
        [
            row(0, 0, 10, 60, 63, **STEPS_50, saved_step=40),
            row(1, 65, None, None, 75),
            row(2, 80, 90, 100, 101, first_step=40, last_step=50, **WELL),
        ],
        (101, 40 + 10, 10),
    ),
    "the last attempt failed: what was saved counts": ([TWO[0]], (120, 80, 20)),
    "the last attempt failed, and nothing was saved": (
        [dataclasses.replace(TWO[0], saved_step=None)],
        (120, 0, 100),
    ),
    "steps that an attempt after the next does again": (
        [
            row(0, 0, 10, 110, 111, first_step=0, last_step=100, saved_step=80),
            row(1, 112, 120, 140, 141, first_step=80, last_step=100),
            row(2, 142, 150, 250, 251, first_step=0, last_step=100, **WELL),
        ],
        (251, 100, 120),
    ),
    "the next resumes beyond the last step that was heard of": (
        [row(0, 0, 10, 60, 61, **STEPS_50), row(1, 61, None, None, 61, first_step=51)],
        (61, 50, 0),
    ),
    "one that was stopped, and had saved": (
        [row(0, 0, 10, 60, 90, **STEPS_50, saved_step=50, outcome=Outcome.STOPPED)],
        (90, 50, 0),
    ),
    "heartbeats without steps count when it ended well": (
        [row(0, 0, 10, 60, 61, **WELL)],
        (61, 50, 0),
    ),
    "heartbeats without steps are lost when it failed": (
        [row(0, 0, 10, 60, 61)],
        (61, 0, 50),
    ),
}


@pytest.mark.parametrize("what", SPENT)
def test_the_time_spent_is_as_reckoned_by_hand(what: str) -> None:
    incidents, expected = SPENT[what]
    assert ft_monitor.time_spent(incidents) == pytest.approx(expected)


def test_the_report_has_a_row_for_each_attempt_and_the_goodput_in_at_most_100_columns() -> None:
    long = dataclasses.replace(
        TWO[0],
        why="suspect: rank 1 (pid 812) failed: ValueError: " + "x y " * 75,
        places="rank 1 at train.py:7 in load_batch; " + WAITS[0] * 3,
    )
    text = ft_monitor.render_report([long, TWO[1]])
    head, first, *why, second, goodput, lost = text.splitlines()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert head.split() == ["attempt", "started", "ran", "steps", "saved", "why", "it", "ended"]
    assert re.match(r" +0  \d\d:\d\d:\d\d +0:02:00 +0-100 +80  suspect: rank 1 \(pid", first)
    assert re.match(r" +1  \d\d:\d\d:\d\d +0:01:51 +80-180 +-  ended well$", second)
    assert first.index("suspect") == head.index("why") == second.index("ended")
    assert all(line.startswith(" " * 9) for line in why) and len(why) > 4
    assert any(line == " " * 9 + line.strip() and line.startswith("rank 1 at", 9) for line in why)
    assert goodput == "goodput 76.3 %: 0:03:00 of 0:03:56 wall time in steps that counted"
    assert lost == (
        "lost: 20.0 s in steps repeated or unsaved, 36.0 s in set-up, hangs and restarts"
    )
    nothing = "goodput 0.0 %: 0.0 s of 0.0 s wall time in steps that counted"
    assert ft_monitor.render_report([]).splitlines()[1] == nothing


# -------------------------------------------------------------------- --ft-status, --ft-report

HERE: dict[str, Any] = {"host": os.uname().nodename, "monitor_pid": os.getpid(), **RUNS}
ROWS = {
    # heartbeat's age at 112, and state
    "12.0 s no heartbeat for 31.0 s": report(0, **HERE),
    "- no heartbeat for 31.0 s": report(0, **HERE, heartbeat=None),
    "12.0 s its peer failed": report(0),
    "12.0 s ended with status 0": ended(0, 0),
    "12.0 s gone": report(0, **{**HERE, "monitor_pid": NOBODY}),
    "12.0 s  no heartbeat for 31.0 s": report(
        0, **{**HERE, "host": "another", "monitor_pid": NOBODY}
    ),
}


@pytest.mark.parametrize("expected", ROWS)
def test_a_rank_has_a_row_with_the_age_of_its_heartbeat_and_its_state(expected: str) -> None:
    head, line = ft_monitor.render_status([ROWS[expected]], now=112.0).splitlines()
    assert head.split() == ["rank", "pid", "step", "heartbeat", "state"]
    assert line.split() == ["0", "1000", "10", *expected.split()]
    assert " ".join(expected.split()).endswith(line[head.index("state") :])


def test_a_report_that_lacks_fields_has_a_row_too() -> None:
    (line,) = ft_monitor.render_status([Report(0)], now=112.0).splitlines()[1:]
    assert line.split() == ["0", "None", "None", "-"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The newer of two runs, with two attempts that have ended and one that has not."""
    for seconds, name in enumerate(("older", "newer")):
        directory = tmp_path / "runs" / name
        reports = [report(rank, **HERE, attempt=2) for rank in (1, 0)]
        write_reports(directory / "attempt_2", reports)
        lines = [ft_monitor.to_text(dataclasses.asdict(incident)) for incident in TWO]
        (directory / "incidents.jsonl").write_text("".join(lines))
        (directory / "latest").symlink_to("attempt_2")
        os.utime(directory / "latest", (seconds, seconds), follow_symlinks=False)
    return tmp_path / "runs" / "newer"


def shown(capsys: pytest.CaptureFixture[str], *command: Any) -> list[str]:
    assert ft_monitor.show(list(map(str, command))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_the_status_shows_the_newest_run_below_a_directory_or_the_run_itself(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = run_dir.parent
    monkeypatch.delenv("PET_FT_RUN_DIR", raising=False)
    monkeypatch.setattr(ft_monitor, "default_run_dir", lambda: str(runs))
    for command in (
        ["--ft-status"],
        ["--ft_status", run_dir],
        [f"--ft-status={run_dir}"],
        ["--ft-status", runs],
        ["--ft-status", run_dir / "attempt_2"],  # as printed with a verdict
    ):
        name, _, *rows = shown(capsys, *command)
        assert name == str(run_dir) and [line.split()[0] for line in rows] == ["0", "1"]
    assert shown(capsys, "--ft-status", runs / "older")[0] == str(runs / "older")
    monkeypatch.setenv("PET_FT_RUN_DIR", str(runs / "older"))
    assert shown(capsys, "--ft-status")[0] == str(runs / "older")
    alive = (runs / "older").rename(runs / f"host_{os.getpid()}")  # named as by its launcher
    assert shown(capsys, "--ft-status", runs)[0] == str(alive)


def test_the_report_shows_what_became_of_each_attempt(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ft_monitor.render_report(TWO).splitlines()
    runs = "attempt_2 still runs, or was killed with its launcher: see --ft-status"
    for path in (run_dir, run_dir.parent):
        lines = shown(capsys, "--ft-report", path)
        assert lines == [str(run_dir), *table[:3], runs, *table[3:]]
    ended = ft_monitor.to_text(dataclasses.asdict(dataclasses.replace(TWO[1], attempt=2)))
    (run_dir / "incidents.jsonl").open("a").write(ended)
    assert runs not in shown(capsys, "--ft-report", run_dir)
    (run_dir / "incidents.jsonl").unlink()
    assert runs in shown(capsys, "--ft-report", run_dir)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["--ft-status"], True),
        (["--ft_report", "x"], True),
        (["--ft-report=x"], True),
        (["train.py", "--ft-status"], False),
        (["--nproc-per-node=2", "train.py", "--ft-report"], False),
        (["--ft-status-of-mine"], False),
        ([], False),
    ],
)
def test_a_flag_of_the_script_does_not_ask_for_the_status(
    command: list[str], expected: bool
) -> None:
    assert ft_monitor.asks_to_look(command) == expected


def test_what_cannot_be_shown_costs_one_line_and_exit_code_2(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: Any) -> str:
        assert ft_monitor.show(list(map(str, command))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line.removeprefix("ft_launcher.py: error: ")

    missing = run_dir / "attempt_2" / "below"
    for flag in ("--ft-status", "--ft-report"):
        assert said(flag, missing).startswith(f"no run found in {str(missing)!r}: give the dir")
    assert said("--ft-status", run_dir, "-w") == "unexpected '-w', expected --ft-status [RUN_DIR]"

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_symlink", refuse)
    assert said("--ft-status", run_dir).endswith(f"Permission denied: '{run_dir / 'latest'}'")


# As the launcher calls it, before torch: whatever imports it fails.
SHOW = """
import sys
sys.modules.update(dict.fromkeys(("torch", "lightning")))
import ft_monitor
sys.exit(ft_monitor.show(sys.argv[1:]))
"""


@pytest.mark.parametrize("flag", ["--ft-status", "--ft-report"])
def test_status_and_report_need_no_torch_and_no_reader(run_dir: Path, flag: str) -> None:
    command = [sys.executable, "-c", SHOW, flag, str(run_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and str(run_dir) in result.stdout
    read_end, write_end = os.pipe()
    os.close(read_end)  # as head does when it has seen enough
    result = subprocess.run(
        command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "")


# ------------------------------------------------------------------- two ranks in an all_reduce

# What rank 1 does in each attempt, what the verdict says of it, and where it then is.
FAULTS = {
    "sleep_for_ever": ("hung: no heartbeat", r"at rank\.py:\d+ in sleep_for_ever"),
    "stop_itself": ("hung: no heartbeat", r"at rank\.py:\d+ in stop_itself"),
    "raise_an_error": (r"failed: ValueError: bad \(rank\.py:\d+ in raise_an_error\)", ""),
    "raise_and_hang_at_exit": (
        r"failed: KeyError: 'x' \(rank\.py:\d+ in raise_and_hang_at_exit\)",
        r"at threading\.py:\d+ in _shutdown",
    ),
}

RANK = f"""
import os, signal, threading, time
import torch, torch.distributed as dist
from ft_monitor import RankMonitorClient

FAULTS = {list(FAULTS)}

def sleep_for_ever():
    time.sleep(1000)

def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)

def raise_an_error():
    raise ValueError("bad")

def raise_and_hang_at_exit():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise KeyError("x")

def average_gradients(value):
    dist.all_reduce(value)

client = RankMonitorClient()
client.init_workload_monitoring()
dist.init_process_group("gloo")
attempt = int(os.environ["FT_ATTEMPT"])
for step in range(4):
    client.send_heartbeat(step)
    if step == 3 and attempt < len(FAULTS) and dist.get_rank() == 1:
        globals()[FAULTS[attempt]]()
    average_gradients(torch.ones(1))
client.send_heartbeat(4)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_launcher_names_the_rank_that_failed_and_the_line_in_which_each_rank_was(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    script, runs = tmp_path / "rank.py", tmp_path / "runs"
    script.write_text(RANK)
    options = ["--nproc-per-node=2", "--max-restarts=5", "--ft-rank-heartbeat-timeout=5"]
    options += [f"--ft-run-dir={runs}", "--ft-max-no-progress-cycles=0"]
    job = start([sys.executable, ROOT / "ft_launcher.py", *options, script])
    assert job.wait(200) == 0, job.output
    (run_dir,) = runs.glob("*/latest")
    *incidents, last = ft_monitor.read_incidents(run_dir.parent)
    assert len(incidents) == len(FAULTS) and last.outcome == Outcome.WELL, job.output
    for incident, (fault, (what, where)) in zip(incidents, FAULTS.items(), strict=True):
        assert re.match(rf"(suspect: )?rank 1 \(pid \d+\) {what}", incident.why), incident
        # A stopped rank is continued for its stacks, and with it, briefly, the one that waits.
        steps = (3, 4) if fault == "stop_itself" else (3,)
        assert incident.suspect == 1 and incident.last_step in steps, incident
        rank_1, _, rank_0 = incident.places.partition("; ")
        if where:
            assert re.match(f"rank 1 {where}", rank_1), incident
        if fault not in ("stop_itself", "raise_an_error"):
            assert re.match(r"rank 0 waiting at rank\.py:\d+ in average_", rank_0), incident
        assert f"{incident.why}\n" in job.output
    assert "[ft_launcher] goodput " in job.output
