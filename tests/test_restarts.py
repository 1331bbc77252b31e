"""Restarts: quick, none where they lead nowhere, and also when a node is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_launcher
import torch.distributed
from conftest import ROOT, Started, processes_with, wait_until
from test_launcher import Launch, endings, gone_within, our_lines, read_reports, wait_for_ranks
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

import ft_launcher
import ft_monitor
from benchmarks import stress_restarts
from ft_launcher import RestartPolicy
from ft_monitor import End, Outcome, Report

launch = test_launcher.launch
Nodes = Callable[..., tuple[Started, ...]]


@pytest.fixture
def job(launch: Launch, tmp_path: Path) -> Iterator[Launch]:
    """Launch as `launch` does, and see to it that nothing lingers."""
    temporary, flag = tmp_path / "tmp", tmp_path / "finished"
    temporary.mkdir()

    def run(options: list[str], body: str, **settings: Any) -> Started:
        settings = {"FAULT_TOL_FINISHED_FLAG_FILE": str(flag), **settings}
        return launch(options, body, TMPDIR=str(temporary), **settings)

    yield run
    gone_within(3, tmp_path)
    assert not list(temporary.glob("torchelastic_*"))


def reason_given(tmp_path: Path) -> str:
    """Why the launcher gave up, from the file beside the finished flag."""
    return str(json.loads((tmp_path / "finished.gave_up").read_text())["reason"])


# ------------------------------------------------------------------------------------------- policy


def ended(
    step: int | None = None, saved: int | None = None, error: str | None = None, *requests: Any
) -> Any:
    """An incident, as far as the policy looks at it."""
    return SimpleNamespace(
        last_step=step, saved_step=saved, error=error, requests=requests, why=f"failed: {error}"
    )


def decisions(limit: int, *incidents: Any) -> list[str | None]:
    """The first words of why there is no restart after each attempt."""
    policy = RestartPolicy(limit)
    reasons = [policy.why_not(incident) for incident in incidents]
    return [reason and reason.partition(",")[0] for reason in reasons]


STOP, BUG = "no progress", "a bug in the code"
SHUTDOWN = {"action": "ShutdownWorkload", "reason": "nan loss"}
LEAVE = {"action": "ExcludeThisNode", "reason": "bad GPU"}
X = "ValueError: x (train.py:7 in step)"


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("incident", [ended(7), ended(7, error="ConnectionError: x"), ended(7, 7)])
def test_a_crash_loop_ends_after_as_many_attempts_as_the_limit_says(
    limit: int, incident: Any
) -> None:
    saves = incident.saved_step is not None  # the first time, that is progress
    assert decisions(limit, *[incident] * (limit + saves))[-2:] == [None, STOP][-limit - saves :]


def test_a_new_checkpoint_refills_the_attempts_and_one_that_is_not_new_does_not() -> None:
    saved = [ended(saved=step) for step in (10, 10, 20, 20, 15, None)]
    assert decisions(3, *saved) == [None] * 5 + [STOP]
    assert decisions(2, ended(0, 0), ended(0), ended(0)) == [None, None, STOP], "0 is a step"


def test_steps_that_grow_are_progress_where_no_checkpoint_is_ever_reported() -> None:
    assert decisions(2, *map(ended, (1, 2, 3, 4, 4, 4))) == [None] * 5 + [STOP]
    assert decisions(2, *[ended(step, saved=10) for step in (11, 12, 13)]) == [None, None, STOP]


def test_attempts_that_tell_of_neither_steps_nor_checkpoints_do_not_count() -> None:
    """Ranks that never connect, or whose heartbeats have no step: --max-restarts counts them."""
    assert decisions(2, *[ended()] * 9) == [None] * 9
    assert decisions(2, ended(), ended(5), ended(), ended()) == [None, None, STOP, STOP]


def test_0_is_no_limit() -> None:
    assert decisions(0, *[ended(step=5)] * 50) == [None] * 50


def test_the_same_error_at_the_same_line_with_no_new_step_is_a_bug() -> None:
    other = X.replace(":7", ":8")
    same, elsewhere, further = ended(5, error=X), ended(5, error=other), ended(6, error=X)
    assert decisions(9, same, same) == [None, BUG]
    assert decisions(9, same, elsewhere, same) == [None] * 3
    assert decisions(9, same, ended(5), same) == [None] * 3, "not in a row"
    assert decisions(9, same, further, further) == [None, None, BUG]
    assert decisions(0, ended(error=X), ended(error=X)) == [None, BUG], "before the first step too"


def test_the_same_error_at_the_same_step_is_a_bug_whatever_was_saved_in_between() -> None:
    assert decisions(9, ended(5, 1, X), ended(5, 2, X)) == [None, BUG]
    assert decisions(9, ended(5, 1, X), ended(4, 2, X)) == [None, None], "it came at another step"
    killed = ended(9, 1, "hung")
    assert decisions(9, killed, ended(5, 2, X), ended(9, 3, X)) == [None] * 3, "twice, at others"
    assert decisions(9, ended(5, 1, X), ended(None, 2, X)) == [None, None], "steps are not known"
    assert decisions(9, ended(0, 1, X), ended(0, 2, X)) == [None, BUG], "0 is a step"


def test_an_error_that_tells_of_other_numbers_is_the_same() -> None:
    errors = [f"ValueError: batch at 0x7f{n}a has {n} items (a.py:7 in f)" for n in (1, 2)]
    assert decisions(0, *[ended(7, error=error) for error in errors]) == [None, BUG]


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:538] Connection closed by peer",
        "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2027, remote process exited",
        "DistNetworkError: The client socket has timed out after 300000ms",
        "AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "OSError: [Errno 5] Input/output error: '/data/shard7'",
        "OSError: [Errno 116] Stale file handle",
        "OSError: [Errno 28] No space left on device",
        "OSError: [Errno 122] Disk quota exceeded",
        "BrokenPipeError: [Errno 32] Broken pipe",
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: not yet initialized",
        "RuntimeError: CUDA driver initialization failed, you might not have a CUDA gpu.",
        "OSError: [Errno 107] Transport endpoint is not connected: '/data'",
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
        "OSError: [Errno 12] Cannot allocate memory",
        "HfHubHTTPError: 503 Server Error: Service Unavailable for url: https://hub",
    ],
)
def test_what_another_node_or_the_infrastructure_may_cause_is_not_a_bug(error: str) -> None:
    incidents = [ended(5, error=f"{error} (train.py:7 in step)")] * 3
    assert decisions(3, *incidents) == [None, None, STOP]


@pytest.mark.parametrize(
    ("why", "is_bug"),
    [
        ("ended with exit code 1", True),
        ("ended by SIGKILL, which nobody here sent", False),
        ("hung: no connection after process start for 3.0 s (limit 3 s, --ft-x)", False),
    ],
)
def test_an_attempt_that_fails_twice_alike_before_it_connects_is_a_bug_where_it_must_connect(
    why: str, is_bug: bool
) -> None:
    """As with an import that fails, whose text nobody tells us."""
    incidents = [
        SimpleNamespace(**{**vars(ended()), "connected": False, "why": f"rank 0 (pid {pid}) {why}"})
        for pid in (812, 97)
    ]
    policy = RestartPolicy(9, is_new=True)
    reasons = [policy.why_not(incident) for incident in incidents]  # type: ignore[arg-type]
    assert reasons[0] is None and (reasons[1] is not None) == is_bug
    if is_bug:
        assert reasons[1] == f"{BUG}, no new step and the same error again: {incidents[1].why}"
    assert decisions(9, *incidents) == [None, None], "where it need not, as under torchrun"
    trained = SimpleNamespace(**{**vars(ended(7)), "connected": True})
    policy = RestartPolicy(9, is_new=True)
    reasons = [policy.why_not(incident) for incident in (trained, *incidents)]  # type: ignore[arg-type]
    assert reasons == [None] * 3, "what could train before is not a bug of the code's"


@pytest.mark.parametrize("place", ["connection.py:7 in decode", "train.py:9 in set_timeout"])
def test_the_name_of_a_file_or_a_function_says_nothing_of_the_kind_of_an_error(place: str) -> None:
    assert decisions(9, *[ended(5, error=f"ValueError: x ({place})")] * 2) == [None, BUG]


def test_a_request_to_shut_down_outweighs_progress_and_one_to_leave_does_not() -> None:
    policy = RestartPolicy(1)
    assert policy.why_not(ended(7, None, None, LEAVE)) is None, "the others go on"
    assert policy.why_not(ended(8, 20, None, LEAVE)) is None
    assert policy.why_not(ended(9, 30, X, LEAVE, SHUTDOWN)) == "a rank asked for it: nan loss"
    assert policy.why_not(ended(9, 30, X, SHUTDOWN)) == "a rank asked for it: nan loss"


# --------------------------------------------------------------------------------- policy, for real


def test_a_crash_loop_ends_with_93_after_3_attempts_and_the_reason_is_in_a_file(
    job: Launch, tmp_path: Path
) -> None:
    body = "client.init_workload_monitoring(); client.send_heartbeat(2); sys.exit(7)"
    crashing = job(["--nproc-per-node=2", "--max-restarts=9"], body)
    assert crashing.wait() == ft_launcher.EXIT_GAVE_UP == 93, crashing.output
    reason = "no progress, 3 attempts in a row saved no new checkpoint"
    assert [line.rpartition("; ")[2] for line in endings(crashing.output)] == [
        "restarting, 9 of 9 left",
        "restarting, 8 of 9 left",
        f"not restarting: {reason}",
    ]
    assert reason_given(tmp_path) == reason and not (tmp_path / "finished").exists()
    assert our_lines(crashing.output)[-1] == f"[ft_launcher] gave up: {reason}"
    attempts = {name.partition("/")[0] for name in read_reports(tmp_path / "runs")}
    assert attempts == {"attempt_0", "attempt_1", "attempt_2"}


def test_a_bug_ends_with_93_after_2_attempts_and_the_line_is_in_a_file(
    job: Launch, tmp_path: Path
) -> None:
    body = "client.init_workload_monitoring(); client.send_heartbeat(2)\n"
    body += "if RANK == 1: raise ValueError('a bug')\nbeat_for_ever()"
    buggy = job(["--nproc-per-node=2", "--max-restarts=9"], body)
    assert buggy.wait() == 93, buggy.output
    assert len(endings(buggy.output)) == 2
    what = r"a bug in the code, .* the same .*: ValueError: a bug \(rank\.py:\d+ in <module>\)"
    assert re.fullmatch(what, reason_given(tmp_path))


def test_restarts_are_all_used_by_a_job_that_gets_further(job: Launch, tmp_path: Path) -> None:
    body = "client.init_workload_monitoring(); client.send_heartbeat(ATTEMPT); "
    body += "client.report_saved(ATTEMPT); raise ValueError(f'after {ATTEMPT} steps')"
    unlucky = job(["--max-restarts=3"], body)
    assert unlucky.wait() == 1, unlucky.output
    assert len(endings(unlucky.output)) == 4
    assert endings(unlucky.output)[-1].endswith("; no restarts left")
    assert not (tmp_path / "finished.gave_up").exists()


REQUEST = """
from ft_monitor import WorkloadAction, WorkloadControlRequest
client.init_workload_monitoring()
def ask(action):
    client.send_workload_control_request(WorkloadControlRequest(action, "GPU 3 is lost"))
"""


@pytest.mark.parametrize("status", [7, 0])
def test_a_rank_that_asks_for_the_shutdown_of_the_workload_gets_it_with_the_attempts_end(
    job: Launch, tmp_path: Path, status: int
) -> None:
    body = REQUEST + f"ask(WorkloadAction.ShutdownWorkload)\nsys.exit({status})"
    asking = job(["--max-restarts=9"], body)
    assert asking.wait() == 93, asking.output
    assert reason_given(tmp_path) == "a rank asked for it: GPU 3 is lost"
    for line in endings(asking.output):
        assert line.endswith("; not restarting: a rank asked for it: GPU 3 is lost")
    assert len(endings(asking.output)) == (status != 0)


def test_the_only_node_that_leaves_ends_the_job_with_1(job: Launch, tmp_path: Path) -> None:
    body = REQUEST + "ask(WorkloadAction.ExcludeThisNode)\nsys.exit(7)"
    leaving = job(["--max-restarts=9"], body)
    assert leaving.wait() == 1, leaving.output
    (line,) = endings(leaving.output)
    assert line.endswith("; this node leaves the job")
    last = "[ft_launcher] this node leaves the job: a rank asked for it: GPU 3 is lost"
    assert our_lines(leaving.output)[-1] == last
    assert "Traceback" not in leaving.output


# --------------------------------------------------------------------------------- what was learned

LEARNING = """
client.init_workload_monitoring(calculate_timeouts=True, state_file="state/ft_state.json")
for step in range(20):
    client.send_heartbeat(ATTEMPT * 100 + step)
    time.sleep(0.02)
DO
"""


@pytest.mark.parametrize(("options", "limit"), [(["--ft-auto"], 1800), ([], None)])
def test_a_first_start_is_watched_if_it_is_known_that_limits_will_be_learned(
    job: Launch, tmp_path: Path, options: list[str], limit: float | None
) -> None:
    assert job(options, "sys.exit(7)").wait() == 1
    assert (
        read_reports(tmp_path / "runs")["attempt_0/rank0"]["limits"].get("startup_timeout") == limit
    )


def test_a_first_start_that_is_longer_than_its_limit_is_learned_though_no_rank_connects(
    tmp_path: Path,
) -> None:
    hung = Report(0, hung_on="startup_timeout", waited=1800.0, started=1.0, ended=2.0)
    for number in range(2):  # in jobs of one attempt each, too
        log, config = ft_monitor.Log("test"), ft_monitor.FaultToleranceConfig()
        auto = {"FT_AUTO": str(tmp_path)}
        job = ft_launcher.Job(tmp_path, config, log, RestartPolicy(3), auto=auto)
        job.learn([dataclasses.replace(hung, started=3.0 + number)])
    assert job.state.longest == {"startup_timeout": 1800.0}


def test_what_an_attempt_has_learned_holds_in_the_next_one_and_in_later_runs(
    job: Launch, tmp_path: Path
) -> None:
    body = LEARNING.replace("DO", "sys.exit(7 if ATTEMPT == 0 else 0)")
    options = ["--max-restarts=1", "--ft-min-timeout=2"]
    first = job(options, body)
    assert first.wait() == 0, first.output
    state = ft_monitor.State.read(tmp_path / "state/ft_state.json")
    assert 0.02 <= state.longest["rank_heartbeat_timeout"] < 1
    assert state.run and state.killed == {}
    reports = read_reports(tmp_path / "runs")
    limits = reports["attempt_1/rank0"]["limits"]
    assert limits["rank_heartbeat_timeout"] < 10 and limits["startup_timeout"] < 60
    assert "startup_timeout" in reports["attempt_1/rank0"]["learned"], "from process start on"


def test_a_learned_limit_that_ends_ranks_twice_with_no_new_step_is_widened_and_the_log_says_so(
    job: Launch, tmp_path: Path
) -> None:
    """The last batch takes 3 s, which training has not seen before, and which is no hang."""
    do = "client.send_heartbeat(20); time.sleep(3.5); client.send_heartbeat(21)"
    body = LEARNING.replace("ATTEMPT * 100 + step", "step").replace("DO", do)
    options = ["--max-restarts=3", "--ft-min-timeout=2", "--ft-max-no-progress-cycles=0"]
    slow = job(options, body)
    assert slow.wait() == 0, slow.output
    assert len(endings(slow.output)) == 2, slow.output
    widened = r"rank_heartbeat_timeout ended ranks twice .* widened, 2 s to 1\d(\.\d+)? s"
    assert re.search(widened, slow.output), slow.output


def test_a_file_system_that_does_not_answer_delays_a_restart_by_seconds_only(
    job: Launch, tmp_path: Path
) -> None:
    """A FIFO without a writer, in the place of the state, is opened for ever."""
    do = "(HERE / 'state').mkdir(); os.mkfifo('state/ft_state.json'); sys.exit(7)"
    body = "if ATTEMPT == 1: sys.exit(0)\n" + LEARNING.replace("DO", do)
    stalled = job(["--max-restarts=1"], body)
    assert stalled.wait(60) == 0, stalled.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    first, second = ft_monitor.read_incidents(run_dir)
    assert 4 < second.start - first.end < 10
    assert "cannot keep what was learned in " in stalled.output


# ------------------------------------------------------------------------------------- health check


def test_a_node_that_is_not_healthy_when_it_restarts_says_what_the_check_printed(
    job: Launch, tmp_path: Path
) -> None:
    say = "echo 'GPU 3:'; echo ' 12 retired pages' >&2; exit 4"
    check = f"test ! -e {tmp_path}/broken || {{ {say}; }}"
    body = "client.init_workload_monitoring(); (HERE / 'broken').touch(); sys.exit(7)"
    broken = job(["--max-restarts=9", f"--ft-node-health-check={check}"], body)
    assert broken.wait() == 1, broken.output
    assert len(endings(broken.output)) == 1
    last = our_lines(broken.output)[-1]
    start = "[ft_launcher] this node leaves the job: the health check of this node failed: "
    assert last.startswith(start) and last.endswith("ended with 4: GPU 3: 12 retired pages")
    bad = json.loads((tmp_path / "finished.bad_nodes").read_text())
    assert bad["host"] == os.uname().nodename and "12 retired pages" in bad["reason"]


def test_a_health_check_always_has_an_answer_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FT_TEST_MARK", str(tmp_path))

    def check(command: str) -> str | None:
        since = time.monotonic()
        problem = ft_launcher.check_node(command, tmp_path)
        assert time.monotonic() - since < 5
        gone_within(3, tmp_path)
        return problem

    assert check("echo fine") is None
    assert check("exit 3") == "'exit 3' ended with 3: no output"
    assert "not found" in (check("no_such_command_anywhere") or "")
    assert len(check("yes | head -c 100000; exit 1") or "") < 400
    assert check("sleep 1000 & exit 0") is None
    # A daemon that holds its output open, and hears no signal.
    daemon = "(trap '' TERM HUP INT; exec setsid sleep 1000) &"
    assert check(f"{daemon} sleep 0.1") is None
    monkeypatch.setattr(ft_launcher, "HEALTH_CHECK_SECONDS", 0.3)
    assert check("exec sleep 1000") == "'exec sleep 1000' did not end within 0.3 s"
    assert "did not end within" in (check(f"{daemon} sleep 1000; true") or "")


def test_the_example_of_a_health_check_names_each_fault_with_its_remedy(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    def check(ecc: str, **settings: str) -> tuple[int, str]:
        smi = f"#!/bin/sh\ncase $1 in --list-gpus) echo 'GPU 0: x';; *) echo '0, {ecc}';; esac\n"
        (tmp_path / "nvidia-smi").write_text(smi)
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        script = ROOT / "examples/node_check.sh"
        checked = start([script, tmp_path / "new"], PATH=path, **settings)
        return checked.wait(20), checked.output

    assert check("[N/A]", PYTHON="true") == (0, "")
    status, text = check("3", PYTHON="false", MIN_FREE_GB="999999", MIN_SHM_MB="99999999")
    assert status == 1
    for fault in ("GB are free in", "MB are free in", "ECC errors on GPU", "matrix product fails"):
        assert re.search(f"^.*{fault}.*: .*", text, re.MULTILINE), text
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_during_a_health_check_leaves_nothing_of_it(
    job: Launch, tmp_path: Path, number: int
) -> None:
    check = f"echo $$ >{tmp_path}/checks; sleep 1000 & sleep 1000"
    ended_job = job([f"--ft-node-health-check={check}"], "")
    wait_until((tmp_path / "checks").exists, what="the check")
    os.kill(ended_job.pid, number)
    assert ended_job.wait(20) in (128 + number, -number), ended_job.output
    assert "Traceback" not in ended_job.output
    gone_within(3, tmp_path)


# -------------------------------------------------------------------------------- what is told of it


def test_a_command_is_told_of_each_failed_attempt_and_delays_no_restart(
    job: Launch, tmp_path: Path
) -> None:
    hook = f"--ft-on-incident=cat >{tmp_path}/told; sleep 2; touch {tmp_path}/over"
    body = "client.init_workload_monitoring(); sys.exit(7 if ATTEMPT == 0 else 0)"
    told = job(["--max-restarts=1", hook], body)
    assert told.wait() == 0, told.output
    wait_until((tmp_path / "over").exists, 10, "the command's end")
    incident = json.loads((tmp_path / "told").read_text())
    assert incident["suspect"] == 0 and incident["attempt"] == 0
    assert incident["text"].splitlines()[0] in told.output
    (run_dir,) = (tmp_path / "runs").iterdir()
    first, second = ft_monitor.read_incidents(run_dir)
    assert second.start - first.end < 2


def test_a_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FT_TEST_MARK", str(tmp_path))
    monkeypatch.setattr(ft_launcher, "HOOK_SECONDS", 0.2)
    ft_launcher.call_hook("trap '' TERM; sleep 1000 & sleep 1000", {})
    gone_within(5, tmp_path)


def test_a_host_with_the_suspect_twice_in_a_row_is_bad_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAULT_TOL_FINISHED_FLAG_FILE", str(tmp_path / "finished"))
    config, log = ft_monitor.FaultToleranceConfig(), ft_monitor.Log("test")

    def bad(nodes: int, *hosts: str, is_over: bool = False) -> list[str]:
        agent: Any = ft_launcher.FaultToleranceAgent.__new__(ft_launcher.FaultToleranceAgent)
        agent._job, agent._suspect = ft_launcher.Job(tmp_path, config, log, RestartPolicy(3)), ""
        agent._worker_group = SimpleNamespace(group_world_size=nodes)
        path = tmp_path / "finished.bad_nodes"
        path.write_text("")
        for host in hosts:
            agent._spread(SimpleNamespace(host=host, why="it hung"), "", is_over)
        return [json.loads(line)["host"] for line in path.read_text().splitlines()]

    assert bad(2, "a", "b", "b", "a") == ["b"]
    assert bad(2, "", "") == [] == bad(1, "a", "a")
    assert bad(2, "a", "a", is_over=True) == [], "a bug in the code, say"


# --------------------------------------------------------------------------------------- survivors


def test_a_storm_of_user_signals_ends_nothing_and_reaches_the_ranks(
    job: Launch, tmp_path: Path
) -> None:
    body = """
got = {signal.SIGUSR1: 0, signal.SIGUSR2: 0}
def count(number, frame):
    got[number] += 1
for number in got:
    signal.signal(number, count)
client.init_workload_monitoring()
ready()
while not (HERE / "over").exists():
    time.sleep(0.01)
say(f"rank {RANK} got {got[signal.SIGUSR1]} and {got[signal.SIGUSR2]}")
(HERE / "finished").touch()
"""
    stormy = job(["--nproc-per-node=2"], body)
    wait_for_ranks(tmp_path, 2)
    pids = processes_with(f"FT_TEST_MARK={tmp_path}")
    assert len(pids) == 5  # launcher, two monitors, two ranks
    for _ in range(20):
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(stormy.pid, number)  # alone: those below must come on top of what it passes on
            for pid in pids:
                os.kill(pid, number)
        time.sleep(0.02)
    (tmp_path / "over").touch()
    assert stormy.wait() == 0, stormy.output
    counts = re.findall(r"rank (\d) got (\d+) and (\d+)", stormy.output)
    assert sorted(rank for rank, _, _ in counts) == ["0", "1"]
    # More than the rank was sent itself: the monitors have passed theirs on.
    assert all(int(count) > 20 for _, *both in counts for count in both), counts
    assert our_lines(stormy.output)[2:] == []


def test_user_signals_to_the_launcher_end_no_monitor_that_starts_and_not_the_launcher_at_its_end(
    job: Launch, tmp_path: Path
) -> None:
    """They may end a rank that has no handler for them yet, which is then what the verdict says."""
    body = """
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
client.init_workload_monitoring()
ready()
sys.exit(7)
"""
    stormy = job(["--max-restarts=3"], body)
    wait_for_ranks(tmp_path, 1)
    while stormy.process.poll() is None:
        os.kill(stormy.pid, signal.SIGUSR1)
        time.sleep(0.005)
    assert stormy.wait() == 1, stormy.output
    assert len(endings(stormy.output)) == 4, stormy.output
    for line in endings(stormy.output):
        assert re.search(r"rank 0 \(pid \d+\) ended (with exit code 7|by SIGUSR1)", line), line


def ignores(pid: int, number: int) -> bool:
    ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return ignored is not None and bool(int(ignored[1], 16) >> number - 1 & 1)


def test_user_signals_end_no_launcher_that_still_imports_torch(job: Launch, tmp_path: Path) -> None:
    early = job([], '(HERE / "finished").touch()')
    wait_until(lambda: ignores(early.pid, signal.SIGUSR1), 10, "the launcher's first lines")
    while "settings:" not in early.output and early.process.poll() is None:
        os.kill(early.pid, signal.SIGUSR1)
        time.sleep(0.05)
    assert early.wait() == 0, early.output


def test_ranks_that_fail_after_training_is_complete_do_not_restart(
    job: Launch, tmp_path: Path
) -> None:
    """The monitor of rank 0 has created the flag, whose path is right in any directory."""
    body = """
client.init_workload_monitoring()
os.chdir("/")
if RANK == 0:
    client.training_complete(step=7)
    sys.exit(0)
while not (HERE / "finished").exists():
    time.sleep(0.01)
sys.exit(5)
"""
    options = ["--nproc-per-node=2", "--max-restarts=3"]
    complete = job(options, body, FAULT_TOL_FINISHED_FLAG_FILE="finished")
    assert complete.wait() == 0, complete.output
    assert "ranks failed, but training is complete" in complete.output
    assert json.loads((tmp_path / "finished").read_text()) == {"step": 7}
    again = job(["--max-restarts=0"], "sys.exit(5)")  # an old flag says nothing of this run
    assert again.wait() == 1, again.output


def test_a_single_node_with_a_port_of_its_own_resumes_too(job: Launch, tmp_path: Path) -> None:
    """torch's static rendezvous would give the new ranks the store of the old ones."""
    body = """
import torch, torch.distributed as dist
client.init_workload_monitoring()
dist.init_process_group("gloo")
for step in range(5):
    dist.all_reduce(torch.ones(1))
client.report_saved(ATTEMPT)
if ATTEMPT < 2:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    sys.exit(1)
dist.destroy_process_group()
(HERE / "finished").touch()
"""
    options = [
        "--nproc-per-node=2",
        "--max-restarts=2",
        "--master-addr=localhost",
        f"--master-port={free_port()}",
    ]
    resumed = job(options, body)
    assert resumed.wait(90) == 0, resumed.output


def test_a_launcher_that_waits_for_other_nodes_outlives_user_signals(
    job: Launch, tmp_path: Path
) -> None:
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    waiting = job([*rendezvous, f"--ft-node-health-check=touch {tmp_path}/checked"], "")
    wait_until((tmp_path / "checked").exists, 60, "the health check, which precedes the rendezvous")
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(waiting.pid, number)
    # torch has no handler for SIGTERM either before it starts workers; a shell sees 143 anyway.
    assert waiting.wait(30) in (-signal.SIGTERM, 128 + signal.SIGTERM), waiting.output


def test_a_survivor_may_finish_saving_a_checkpoint_and_no_longer_than_the_limit(
    job: Launch, tmp_path: Path
) -> None:
    body = """
if ATTEMPT == 1:
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: say("SIGTERM"))
client.init_workload_monitoring()
client.send_heartbeat(2)
if RANK != 1:
    client.start_section("checkpointing")
ready()
while len(list(HERE.glob("ready?"))) < 3:
    time.sleep(0.01)
if RANK == 1:
    sys.exit(7)
for _ in range(20 if RANK == 0 else 1000):  # a second, or too long
    time.sleep(0.05)
(HERE / f"checkpoint{RANK}").touch()
client.report_saved(2)
client.end_section("checkpointing")
time.sleep(1000)
"""
    saving = job(["--nproc-per-node=3", "--max-restarts=1", "--ft-workers-stop-timeout=3"], body)
    assert saving.wait() == 0, saving.output
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint0"]
    reports = read_reports(tmp_path / "runs")
    first, failed, never = (reports[f"attempt_0/rank{rank}"] for rank in range(3))
    assert 0.5 < first["ended"] - failed["ended"] < 2.8, "it is ended when it has saved"
    assert 2.9 < never["ended"] - failed["ended"] < 6, "it is ended when its time is over"
    assert first["saved"] == 2 and never["saved"] is None and "SIGTERM" not in saving.output
    (line,) = endings(saving.output)
    assert "rank 1 (pid" in line and "ended with exit code 7" in line


def test_a_survivor_that_is_stuck_in_c_does_not_delay_the_restart(
    job: Launch, tmp_path: Path
) -> None:
    """Python runs no handler while the main thread is in C: SIGTERM would be waited for, 30 s."""
    body = """
if ATTEMPT == 1:
    (HERE / f"again{RANK}.tmp").write_text(str(time.time()))
    (HERE / f"again{RANK}.tmp").rename(HERE / f"again{RANK}")
    (HERE / "finished").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
client.init_workload_monitoring()
client.send_heartbeat(2)
ready()
if RANK == 0:
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
beat_for_ever()
"""
    stuck = job(["--nproc-per-node=2", "--max-restarts=1"], body)
    wait_for_ranks(tmp_path, 2)
    killed = time.time()
    os.kill(int((tmp_path / "ready1").read_text()), signal.SIGKILL)
    assert stuck.wait() == 0, stuck.output
    took = max(float((tmp_path / f"again{rank}").read_text()) for rank in (0, 1)) - killed
    print(f"from the kill to the new ranks' first line: {took:.2f} s")
    assert took < 5
    assert "ended by SIGKILL, which nobody here sent" in endings(stuck.output)[0]


def test_ranks_that_end_well_without_the_finished_flag_are_warned_of(
    job: Launch, tmp_path: Path
) -> None:
    settings = ["--ft-exit-timeout=60"]
    warning = "[ft_launcher] the workers ended well, but training is not complete: no "
    reason = "no rank told of training: is FaultToleranceCallback among the Trainer's callbacks?"
    unfinished = job(settings, "client.init_workload_monitoring()")
    assert unfinished.wait() == 0
    assert our_lines(unfinished.output)[1:] == [f"{warning}{tmp_path / 'finished'}"]
    unconnected = job(settings, "")
    assert unconnected.wait() == 93  # the next run would be no better
    assert our_lines(unconnected.output)[1:] == [f"[ft_launcher] gave up: {reason}"]
    assert reason in (tmp_path / "finished.gave_up").read_text()
    # What is on a node's own disk is out of reach after a job.
    runs = list((tmp_path / "finished.evidence").iterdir())
    reports = [run / "latest" / "rank0.json" for run in runs]
    assert len(runs) == 2 and all(ft_monitor.Report.read(report).status == 0 for report in reports)


def test_nodes_that_do_not_meet_are_told_so_in_one_line(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """Of torch's attempts to connect, with C++ frames, there is none."""
    (tmp_path / "train.py").touch()
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=ft.invalid:29400"]
    options = ["--nnodes=2", *rendezvous, "--rdzv-conf=read_timeout=1"]
    alone = start([*test_launcher.LAUNCHER, *options, "train.py"])
    assert alone.wait() == 1
    *settings, line = alone.output.splitlines()
    assert len(settings) == 2
    told = "the nodes did not meet at ft.invalid:29400: is it right on all nodes, and do 2 of them"
    assert line.startswith(f"[ft_launcher] {told} start: RendezvousConnectionError")


def test_evidence_that_is_lost_while_the_job_runs_costs_the_evidence_alone(job: Launch) -> None:
    """It cannot be written, as on a full disk; a cleaner of /tmp removes it, in a job of days."""
    body = """
import shutil
client.init_workload_monitoring()
if ATTEMPT == 0:
    os.mkdir(os.environ["FT_RUN_DIR"] + "/incidents.jsonl")
if ATTEMPT == 1:
    shutil.rmtree(os.environ["FT_RUN_DIR"], ignore_errors=True)
if ATTEMPT < 2:
    sys.exit(7)
(HERE / "finished").touch()
"""
    spoiled = job(["--max-restarts=2"], body)
    assert spoiled.wait() == 0, spoiled.output
    assert "Traceback" not in spoiled.output, spoiled.output


# --------------------------------------------------------------------------------------- two nodes


NODE_FAULTS = (
    "two nodes, rank on node 1 killed",
    "two nodes, rank on node 1 frozen",
    "two nodes, ranks on both killed",
)


@pytest.mark.slow
def test_two_nodes_come_back_from_every_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases run at the same time: most of each is waiting and the imports of torch."""
    for name in [name for name in os.environ if name.startswith(("FT_", "PET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FT_TEST_MARK", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run(case: str) -> tuple[int, list[int], float]:
        nodes, number, victims = stress_restarts.CASES[case]
        return stress_restarts.run_case(nodes, number, victims, restarts=1, limit=120)

    with ThreadPoolExecutor() as pool:
        results = dict(zip(NODE_FAULTS, pool.map(run, NODE_FAULTS), strict=True))
    print(results)
    assert {case: result[:2] for case, result in results.items()} == dict.fromkeys(
        NODE_FAULTS, (1, [0, 0])
    )
    gone_within(3, tmp_path)
    assert not list(tmp_path.glob("torchelastic_*"))


# Ranks of two nodes that wait for each other as in a collective: without the peer there are no
# heartbeats, and the clock runs out.
TOGETHER = (
    REQUEST
    + """
NODE, WORLD = os.environ["NODE"], int(os.environ["WORLD_SIZE"])
if WORLD == 1 and list(HERE.glob("together_*")):
    (HERE / "finished").touch()
    say(f"node {NODE} goes on alone at {time.time():.2f}")
    sys.exit(0)
beats = HERE / f"beats_{NODE}"
step = 0
while True:
    step += 1
    beats.write_text(str(os.getpid()))
    others = [path for path in HERE.glob("beats_?") if path != beats]
    if WORLD == 1 or any(time.time() - path.stat().st_mtime < 0.7 for path in others):
        client.send_heartbeat(step)
        client.report_saved(ATTEMPT)
    if WORLD == 2 and others and step > 20:
        (HERE / f"together_{NODE}").touch()
    DO
    time.sleep(0.05)
"""
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def two_nodes(job: Launch, tmp_path: Path) -> Nodes:
    """Two launchers on this host; node a, which hosts the store, starts first. Spares follow as
    soon as the two are together."""

    def run(
        do: str = "pass",
        body: str = TOGETHER,
        nodes: str = "1:2",
        restarts: int = 9,
        spares: str = "",
    ) -> tuple[Started, ...]:
        port = free_port()
        times = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10"
        options = [
            *(f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"),
            *("--rdzv-id=test", f"--rdzv-conf={times}", f"--max-restarts={restarts}"),
            "--ft-rank-heartbeat-timeout=2",
        ]
        body = body.replace("DO", do)

        def start(name: str) -> Started:
            return job(options, body, NODE=name, SLURMD_NODENAME=f"host-{name}")

        first = start("a")
        wait_until(lambda: answers(port), 120, "the store")
        second = start("b")
        if spares:
            wait_until_together(tmp_path)
        return first, second, *map(start, spares)

    return run


def wait_until_together(tmp_path: Path) -> None:
    wait_until(lambda: len(list(tmp_path.glob("together_*"))) == 2, 60, "both nodes in one world")


def kill_node(name: str, tmp_path: Path, *signals: int) -> None:
    """As a power cut: none of the launcher, its monitors and ranks sees another one's end."""
    ours = set(processes_with(f"FT_TEST_MARK={tmp_path}"))
    node = ours & set(processes_with(f"NODE={name}\0"))
    for number in signals or (signal.SIGSTOP, signal.SIGKILL):
        for pid in node:
            os.kill(pid, number)


def test_a_node_that_is_lost_is_gone_without(two_nodes: Nodes, tmp_path: Path) -> None:
    survivor, lost = two_nodes()
    wait_until_together(tmp_path)
    killed = time.time()
    kill_node("b", tmp_path)
    assert survivor.wait(60) == 0, survivor.output
    assert lost.wait(5) == -signal.SIGKILL
    (at,) = re.findall(r"node a goes on alone at ([\d.]+)", survivor.output)
    print(f"from the loss of a node to the survivor's new start: {float(at) - killed:.1f} s")
    assert "suspect: rank 1 (host-b) was lost with its node" in endings(survivor.output)[-1]


def test_the_loss_of_the_node_with_the_store_ends_the_other_one_with_a_clear_line(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    lost, survivor = two_nodes()
    wait_until_together(tmp_path)
    killed = time.monotonic()
    kill_node("a", tmp_path)
    assert survivor.wait(60) == 1, survivor.output
    print(
        f"from the loss of the store to the other launcher's end: {time.monotonic() - killed:.1f} s"
    )
    assert lost.wait(5) == -signal.SIGKILL
    assert (
        "[ft_launcher] the nodes of this job lost each other, or one gave up: " in survivor.output
    )
    assert "Traceback" not in survivor.output


@pytest.mark.parametrize("name", ["a", "b"])  # a hosts the store, and stays
def test_a_node_that_a_rank_excludes_ends_with_0_and_the_other_goes_on(
    two_nodes: Nodes, tmp_path: Path, name: str
) -> None:
    do = f"""if NODE == "{name}" and len(list(HERE.glob("together_*"))) == 2:
        ask(WorkloadAction.ExcludeThisNode)
        sys.exit(7)"""
    first, second = two_nodes(do)
    other, excluded = (second, first) if name == "a" else (first, second)
    assert other.wait(60) == 0, other.output
    assert re.search("node [ab] goes on alone", other.output)
    assert excluded.wait(60) == 0, excluded.output
    said = "this node leaves the job: a rank asked for it: GPU 3 is lost"
    assert said in excluded.output
    bad = json.loads((tmp_path / "finished.bad_nodes").read_text())
    assert bad["host"] == f"host-{name}"


# Ranks that fail as soon as a peer is gone, as in a collective.
GROUP = (
    REQUEST
    + """
NODE, WORLD, GROUP = os.environ["NODE"], int(os.environ["WORLD_SIZE"]), os.environ["MASTER_PORT"]
def save(*args):
    (HERE / f"saved_{NODE}").touch()
    raise KeyError("which costs no restart, either")
signal.signal(signal.SIGTERM, save)
(HERE / f"pid_{NODE}").write_text(str(os.getpid()))
(HERE / f"pid_{NODE}").rename(HERE / f"{GROUP}_{NODE}")
for step in range(100_000):
    pids = [int(path.read_text()) for path in HERE.glob(f"{GROUP}_?")]
    if len(pids) == WORLD:
        (HERE / f"done{WORLD}_{NODE}").touch()
    if WORLD == 2 and len(pids) == 2:
        (HERE / f"together_{NODE}").touch()
    if WORLD == 3 and len(list(HERE.glob("done3_?"))) == 3 and NODE == "a":
        (HERE / "left").touch()
        ask(WorkloadAction.ExcludeThisNode)
        sys.exit(7)
    if WORLD == 2 and (HERE / "left").exists() and (HERE / "done2_c").exists():
        (HERE / "finished").touch()
        sys.exit(0)
    if len(pids) == WORLD and not all(map(runs, pids)):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    client.send_heartbeat(step)
    time.sleep(0.02)
"""
)


def test_a_node_that_joins_costs_neither_a_restart_nor_steps_and_the_stores_host_may_leave(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    nodes = two_nodes("", GROUP, "2:3", restarts=1, spares="c")
    for node in nodes:
        assert node.wait(90) == 0, node.output
    host, *others = (node.output for node in nodes)
    assert "this node leaves the job: a rank asked for it: GPU 3 is lost" in host
    assert all("restarting, 1 of 1 left" in endings(text)[-1] for text in others), others
    assert list(tmp_path.glob("saved_[ab]")), "ranks are told to save"


def test_a_node_whose_ranks_ended_well_starts_again_with_one_whose_ranks_failed_later(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    body = (
        REQUEST
        + """
NODE = os.environ["NODE"]
client.send_heartbeat(ATTEMPT)
client.report_saved(ATTEMPT)
while NODE == "b" and not (HERE / "latest_a").exists():
    time.sleep(0.05)
if NODE == "b" and ATTEMPT == 0:
    while not (reports := list(HERE.glob("runs/*/attempt_0/rank0.json"))):
        time.sleep(0.05)
    monitor = json.loads(reports[0].read_text())["monitor_pid"]
    while os.path.exists(f"/proc/{monitor}"):  # until the launcher of node a has heard of its end
        time.sleep(0.05)
    sys.exit(7)
(HERE / f"latest_{NODE}").touch()
if ATTEMPT == 1:
    (HERE / "finished").touch()
"""
    )
    first, second = two_nodes("", body, "2")
    assert first.wait(60) == 0, first.output
    assert second.wait(60) == 0, second.output
    assert "attempt 0 ended" in second.output and "exit code 7" in second.output, second.output
    assert (tmp_path / "finished").exists()


def test_a_node_does_not_wait_for_one_that_was_told_to_stop(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    body = (
        REQUEST
        + """
signal.signal(signal.SIGTERM, lambda *_: (HERE / "stop").touch())
ready()
while not (HERE / "stop").exists():  # which all ranks agree on
    client.send_heartbeat(2)
    time.sleep(0.05)
if RANK == 0:
    client.report_saved(2)
"""
    )
    first, second = two_nodes("", body, "2")
    wait_for_ranks(tmp_path, 2)
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait(20) == 128 + signal.SIGTERM, second.output
    told = {
        "rank0.json": "step 2 is saved, and the next run resumes there",
        "rank1.json": "at step 2; what is saved, the launcher of rank 0 tells",
    }
    [rank] = tmp_path.glob(f"runs/*_{second.pid}/attempt_0/rank*.json")
    assert told[rank.name] in second.output, second.output
    assert first.wait(20) == 0, first.output


# The rank on node a goes on, and never notices that the one on node b fails.
UNAWARE = (
    REQUEST
    + """
NODE, WORLD = os.environ["NODE"], int(os.environ["WORLD_SIZE"])
client.send_heartbeat(3)
if WORLD == 1 and (HERE / "over").exists():
    (HERE / "finished").touch()
    sys.exit(0)
if WORLD == 2 and NODE == "a":
    (HERE / "together").touch()
if WORLD == 1 or NODE == "a":
    beat_for_ever()
while not (HERE / "together").exists():
    client.send_heartbeat(3)
    time.sleep(0.01)
(HERE / "together").unlink()
DO
"""
)
SHUT_DOWN = "ask(WorkloadAction.ShutdownWorkload)"


def test_the_shutdown_that_a_rank_asks_for_ends_every_node_with_93(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    launchers = two_nodes(f"{SHUT_DOWN}; raise ValueError('NaN')", UNAWARE, "2")
    for launcher in launchers:
        assert launcher.wait() == 93, launcher.output
        assert "gave up: a rank asked for it: GPU 3 is lost" in launcher.output
        [ending] = endings(launcher.output)
        assert re.search(r"rank 1 \(host-b, pid \d+\) failed: ValueError: NaN \(rank", ending)


def test_restarts_that_are_used_up_on_one_node_end_the_others(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    first, second = two_nodes("raise ValueError('NaN')", UNAWARE, "2", restarts=0)
    assert second.wait() == 1, second.output
    assert first.wait() == 1, first.output
    assert "another node has used up its restarts" in first.output


def test_a_bug_on_any_node_ends_the_job_after_two_attempts(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    launchers = two_nodes(
        "raise ValueError(f'batch at {hex(id(client))} has {ATTEMPT} items')", UNAWARE, "2"
    )
    for launcher in launchers:
        assert launcher.wait(60) == 93, launcher.output
        assert "gave up: a bug in the code" in launcher.output
    assert [name for name in read_reports(tmp_path / "runs") if "rank1" in name] == [
        "attempt_0/rank1",
        "attempt_1/rank1",
    ]
    assert "a bug in the code" in reason_given(tmp_path)


def test_a_rank_that_takes_its_time_to_end_is_heard_although_its_peer_fails_first(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    do = f"""
{SHUT_DOWN}
client.report_error(ValueError("NaN"))
(HERE / "peer_fails").touch()
time.sleep(60)
"""
    body = UNAWARE.replace(
        "    beat_for_ever()",
        """    while not (HERE / "peer_fails").exists():
        client.send_heartbeat(3)
    raise RuntimeError("[gloo] Connection closed by peer")""",
    )
    _, second = two_nodes(do, body, "2")
    assert second.wait(60) == 93, second.output
    assert "failed: ValueError: NaN" in endings(second.output)[0]
    assert len(endings(second.output)) == 1
    assert "a rank asked for it: GPU 3 is lost" in reason_given(tmp_path)


def test_a_node_that_is_left_by_another_restarts_although_its_ranks_notice_nothing(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    do = """
(HERE / "over").touch()
ask(WorkloadAction.ExcludeThisNode)
sys.exit(7)
"""
    first, second = two_nodes(do, UNAWARE)
    assert second.wait() == 0, second.output
    assert "SIGTERM: the ranks have" not in second.output
    assert first.wait() == 0, first.output
    assert any("rank 1 (host-b, pid" in text for text in endings(first.output))


def test_spares_restart_nobody_and_one_takes_the_place_of_a_node_that_is_lost(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    """torch's own waiting list lets the others restart for ever."""
    do = """if list(HERE.glob("beats_[cd]")) and step > 20:
        (HERE / "finished").touch()
        break"""
    first, _, *spares = two_nodes(do, nodes="2", spares="cd")
    for spare in spares:
        spare.wait_for_output("[ft_launcher] waiting as a spare: 2 nodes take part")
    time.sleep(ft_launcher.SPARE_SECONDS)
    assert endings(first.output) == []
    kill_node("b", tmp_path)
    for launcher in (first, *spares):
        assert launcher.wait(60) == 0, launcher.output
        assert launcher.output.count("as a spare") <= 1
    assert len(endings(first.output)) == 1
    unused = "the job has ended, and this spare was not needed"
    assert sorted(spare.output.count(unused) for spare in spares) == [0, 1]


def test_ranks_that_wait_for_a_frozen_node_are_given_no_grace_when_a_spare_replaces_it(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    """They cannot save without it: that a node comes is not all there is to know."""
    do = """client.send_heartbeat(step)
    signal.signal(signal.SIGTERM, lambda *args: (HERE / "asked").touch())
    if (HERE / "beats_c").exists() and step > 20:
        (HERE / "finished").touch()
        break"""
    first, _, spare = two_nodes(do, nodes="2", spares="c")
    spare.wait_for_output("[ft_launcher] waiting as a spare: 2 nodes take part")
    kill_node("b", tmp_path, signal.SIGSTOP)
    try:
        for launcher in (first, spare):
            assert launcher.wait(60) == 0, launcher.output
    finally:
        kill_node("b", tmp_path)
    assert "rank 1 (host-b) was lost with its node" in endings(first.output)[-1]
    assert not (tmp_path / "asked").exists()


def test_all_nodes_tell_the_same_verdict_once_all_that_are_not_lost_have_told(
    tmp_path: Path,
) -> None:
    store = torch.distributed.HashStore()
    participants = SimpleNamespace(participants=range(2))  # node 2 is lost
    handler = SimpleNamespace(
        is_closed=lambda: False, _state_holder=SimpleNamespace(state=participants)
    )

    def node(number: int) -> Any:
        agent: Any = ft_launcher.FaultToleranceAgent.__new__(ft_launcher.FaultToleranceAgent)
        config, log = ft_monitor.FaultToleranceConfig(), ft_monitor.Log("test")
        run_dir = tmp_path / str(number)
        agent._job = ft_launcher.Job(run_dir, config, log, RestartPolicy(3))
        agent._worker_group = SimpleNamespace(
            group_rank=number,
            group_world_size=3,
            workers=[SimpleNamespace(global_rank=number, world_size=3)],
            spec=SimpleNamespace(rdzv_handler=handler),
        )
        agent._store, agent._attempt, agent._started, agent._evidence = store, 0, 5.0, None
        lost = Report(number, host=f"host-{number}", end=End.LOST)
        agent._tell_of(ft_launcher.Evidence(Outcome.FAILED, [lost]))
        (run_dir / "attempt_0").mkdir(parents=True)
        peer = dataclasses.replace(
            lost, end=End.BY_ITSELF, pid=7, ended=9.0, status=1, error="RuntimeError: [gloo] closed"
        )
        text = ft_monitor.to_text(dataclasses.asdict(peer))
        (run_dir / f"attempt_0/rank{number}.json").write_text(text)
        return agent

    first, second, _ = [node(number) for number in range(3)]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: first._verdict(first._gather(Outcome.FAILED)))
        time.sleep(0.3)
        assert not waiting.done(), "without the second"
        verdict = second._verdict(second._gather(Outcome.FAILED))
        assert waiting.result() == verdict
    assert (verdict.suspect, verdict.host) == (2, "host-2")
    closed = "rank 0 (host-0, pid 7) failed: RuntimeError: [gloo] closed"
    assert verdict.why == f"suspect: rank 2 (host-2) was lost with its node; {closed}"


def test_a_node_that_is_lost_as_the_nodes_meet_is_met_again(
    job: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def meet(self: Any, worker_group: Any) -> None:
        calls.append(1)
        if len(calls) < failures:
            raise torch.distributed.DistStoreError("wait timeout")

    monkeypatch.setattr(LocalElasticAgent, "_rendezvous", meet)
    agent = ft_launcher.FaultToleranceAgent.__new__(ft_launcher.FaultToleranceAgent)
    config, log = ft_monitor.FaultToleranceConfig(), ft_monitor.Log("test")
    agent._job = ft_launcher.Job(tmp_path, config, log, RestartPolicy(3))
    failures = ft_launcher.RENDEZVOUS_TRIES
    agent._rendezvous(None)  # type: ignore[arg-type]
    assert len(calls) == failures
    calls.clear()
    failures += 1
    with pytest.raises(torch.distributed.DistStoreError):
        agent._rendezvous(None)  # type: ignore[arg-type]
