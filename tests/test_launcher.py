"""The launcher with real monitors and ranks. Ranks are small scripts of the standard library."""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from conftest import ROOT, Started, processes_with, wait_until
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api as launcher_api

import ft_launcher
import ft_monitor

Launch = Callable[..., Started]
LAUNCHER = [sys.executable, str(ROOT / "ft_launcher.py")]

# Every rank begins with this. `child()` starts what a DataLoader worker is to a real rank;
# `ready()` tells the test.
PRELUDE = """
import ctypes, json, os, pathlib, signal, subprocess, sys, time
from ft_monitor import RankMonitorClient

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["FT_ATTEMPT"])
HERE = pathlib.Path(__file__).parent
client = RankMonitorClient()

def say(text):  # in one piece: the ranks share their output
    os.write(1, f"{text}\\n".encode())

def child(**options):
    return subprocess.Popen(["sleep", "1000"], **options).pid

def runs(pid):
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

def ready(*pids):
    file = HERE / f"ready{RANK}"
    file.with_suffix(".tmp").write_text(" ".join(map(str, (os.getpid(), *pids))))
    file.with_suffix(".tmp").rename(file)

def beat_for_ever():
    while True:
        client.send_heartbeat(2)
        time.sleep(0.05)
"""


@pytest.fixture
def launch(start: Callable[..., Started], tmp_path: Path) -> Launch:
    """Start the launcher on a script, with a run directory of the test's own."""

    def run(
        options: list[Any], body: str, *arguments: str, before: Sequence[Any] = (), **settings: Any
    ) -> Started:
        script = tmp_path / "rank.py"
        script.write_text(PRELUDE + body)
        launcher = [*LAUNCHER, f"--ft-run-dir={tmp_path / 'runs'}"]
        settings = {"TMPDIR": str(tmp_path), **settings}
        return start([*before, *launcher, *options, script, *arguments], **settings)

    return run


def read_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """All reports of ranks below a directory, by names such as attempt_0/rank1."""
    paths = sorted(directory.glob("*/attempt_*/rank*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in paths}


def our_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[ft_")]


def endings(output: str) -> list[str]:
    """What the launcher says of each failed attempt: a line, and those below it, indented."""
    ending = r"^\[ft_launcher\] (attempt \d+.*(?:\n\[ft_launcher\]   .*)*)"
    found = re.findall(ending, output, re.MULTILINE)
    return [text.replace("\n[ft_launcher] ", "\n") for text in found]


def gone_within(seconds: float, mark: Path) -> None:
    """No process of a test runs any more; `start` marks all that it starts."""
    wait_until(
        lambda: not processes_with(f"FT_TEST_MARK={mark}"), seconds, "the end of all processes"
    )


def wait_for_ranks(tmp_path: Path, count: int) -> None:
    """Until so many ranks have called their ready()."""
    what = f"{count} ranks that are ready"
    wait_until(lambda: len(list(tmp_path.glob("ready?"))) == count, what=what)


# ------------------------------------------------------------------------------ faults and restarts

HUNG = r"hung: no heartbeat for 1\.\d s at step 2 \(limit 1\.5 s"
LOCK = "lock = ctypes.PyDLL(None).pthread_mutex_lock; lock(MUTEX); lock(MUTEX)"

FAULTS = {
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", HUNG),
    "loops in Python": ("while True: pass", HUNG),
    # A mutex that is locked already: not even a signal's handler interrupts the wait for it.
    "is stuck in C and holds the GIL": (LOCK, HUNG),
    "raises": ("raise ValueError('a bug')", "ValueError: a bug"),
    "says why it ends": (
        "client.report_error(OSError('no data')); sys.exit(3)",
        "OSError: no data",
    ),
    "has a segmentation fault": ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "never connects": ("", r"hung: no connection after process start for 3\.\d s \(limit 3 s"),
}


def test_whatever_ends_or_hangs_a_rank_the_job_restarts_and_the_log_names_that_rank_and_why(
    launch: Launch, tmp_path: Path
) -> None:
    """Rank 1 meets a fault in each attempt; rank 0 ignores SIGTERM and waits, as in a collective.

    Each attempt saves a new checkpoint, as there would be no restart otherwise.
    """
    body = f"""
MUTEX = ctypes.create_string_buffer(256)
FAULTS = {json.dumps([code for code, _ in FAULTS.values()])}
earlier = [path for attempt in range(ATTEMPT) for path in HERE.glob(f"pids_{{attempt}}_*")]
alive = [pid for path in earlier for pid in path.read_text().split() if runs(pid)]
assert not alive, f"OVERLAP: {{alive}} of an earlier attempt still run"
if ATTEMPT == len(FAULTS):
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if RANK == 0:
    client.init_workload_monitoring()
    client.report_saved(ATTEMPT)
(HERE / f"pids_{{ATTEMPT}}_{{RANK}}").write_text(f"{{os.getpid()}} {{child()}}")
while len(list(HERE.glob(f"pids_{{ATTEMPT}}_*"))) < 2:
    time.sleep(0.01)
if RANK == 1 and not FAULTS[ATTEMPT]:
    time.sleep(1000)
if RANK == 1:
    client.init_workload_monitoring()
    client.send_heartbeat(2)
    exec(FAULTS[ATTEMPT])
beat_for_ever()
"""
    count = len(FAULTS)
    options = ["--nproc-per-node=2", f"--max-restarts={count}", "--ft-startup-timeout=3"]
    job = launch([*options, "--ft-rank-heartbeat-timeout=1.5"], body)
    assert job.wait() == 0, job.output
    assert "OVERLAP" not in job.output, job.output
    reports = read_reports(tmp_path / "runs")
    lines = endings(job.output)
    assert len(lines) == count, job.output
    for attempt, (line, (_, reason)) in enumerate(zip(lines, FAULTS.values(), strict=True)):
        who = rf"rank 1 \(pid {reports[f'attempt_{attempt}/rank1']['pid']}\)"
        assert line.startswith(f"attempt {attempt} "), line
        assert re.search(rf"{who}[^;\n]* {reason}", line), line
        assert line.endswith(f"; restarting, {count - attempt} of {count} left"), line
        assert "rank 0 (" not in line, "the survivor has done nothing"
        assert reports[f"attempt_{attempt}/rank0"]["end"] == "peer failed"
        if reason == HUNG:  # what it says when SIGCONT wakes it for its stacks is too late
            report = reports[f"attempt_{attempt}/rank1"]
            assert report["ended"] - report["heartbeat"] > 1.4
    assert len(reports) == 2 * (count + 1)
    assert all(report["ended"] is not None for report in reports.values())
    gone_within(2, tmp_path)


def test_a_job_whose_restarts_are_used_up_ends_with_1_and_one_line_for_each_attempt(
    launch: Launch, tmp_path: Path
) -> None:
    body = "client.init_workload_monitoring()\nif RANK == 1: sys.exit(7)\nbeat_for_ever()"
    job = launch(["--nproc-per-node=2", "--max-restarts=1"], body)
    assert job.wait() == ft_launcher.EXIT_FAILED == 1
    first, second = endings(job.output)
    for line, what_next in ((first, "restarting, 1 of 1 left"), (second, "no restarts left")):
        assert re.search(r"rank 1 \(pid \d+\)[^;\n]* exit code 7", line), line
        assert line.endswith(f"; {what_next}"), line
    assert "torch/distributed" not in job.output, "our own lines say it"
    assert "Traceback" not in job.output
    gone_within(2, tmp_path)


def test_a_killed_monitor_takes_along_its_rank_and_all_that_it_has_started_and_the_job_restarts(
    launch: Launch, tmp_path: Path
) -> None:
    body = """
client.init_workload_monitoring()
if ATTEMPT == 0:
    ready(child(), child(start_new_session=True))
    beat_for_ever()
left = [pid for path in HERE.glob("ready?") for pid in path.read_text().split() if runs(pid)]
assert not left, f"LEFT: {left}"
"""
    # A wrapper's child is one of the launcher's, after its exec: it is none of our business.
    (tmp_path / "wrapper.sh").write_text('sleep 1000 & echo $! >service; exec "$@"')
    options = ["--nproc-per-node=2", "--max-restarts=1"]
    job = launch(options, body, before=["bash", "wrapper.sh"])
    wait_for_ranks(tmp_path, 2)
    report = read_reports(tmp_path / "runs")["attempt_0/rank1"]
    os.kill(report["monitor_pid"], signal.SIGKILL)
    assert job.wait() == 0, job.output
    (line,) = endings(job.output)
    who = f"rank 1 (pid {report['pid']}) ended with its monitor (pid {report['monitor_pid']})"
    assert who in line and line.endswith("; restarting, 1 of 1 left")
    service = int((tmp_path / "service").read_text())
    assert processes_with(f"FT_TEST_MARK={tmp_path}") == [service]


def test_a_helper_in_a_session_of_its_own_ends_with_its_rank(
    launch: Launch, tmp_path: Path
) -> None:
    body = """
client.init_workload_monitoring()
if ATTEMPT == 0:
    ready(child(start_new_session=True))
    os.kill(os.getpid(), signal.SIGKILL)
assert not any(map(runs, (HERE / "ready0").read_text().split()))
"""
    job = launch(["--max-restarts=1"], body)
    assert job.wait() == 0, job.output
    gone_within(2, tmp_path)


def test_a_monitor_that_is_stopped_does_not_delay_the_restart_for_another_rank(
    launch: Launch, tmp_path: Path
) -> None:
    body = """
client.init_workload_monitoring()
client.send_heartbeat(ATTEMPT)
if ATTEMPT == 0:
    ready()
    beat_for_ever()
"""
    options = ["--nproc-per-node=2", "--max-restarts=1", "--ft-workers-stop-timeout=60"]
    job = launch(options, body)
    wait_for_ranks(tmp_path, 2)
    reports = read_reports(tmp_path / "runs")
    os.kill(reports["attempt_0/rank0"]["monitor_pid"], signal.SIGSTOP)
    os.kill(reports["attempt_0/rank1"]["pid"], signal.SIGKILL)
    assert job.wait(60) == 0, job.output  # the launcher would wait for 80 s
    (line,) = endings(job.output)
    assert f"rank 1 (pid {reports['attempt_0/rank1']['pid']}) ended by SIGKILL" in line


# ------------------------------------------------------------------------------------ being stopped


def test_a_signal_is_passed_on_once_and_what_outlives_the_grace_is_killed(
    launch: Launch, tmp_path: Path
) -> None:
    number = signal.SIGTERM
    body = """
def stop(number, frame):
    say(f"rank {RANK} got signal {number}; its child {'still runs' if runs(CHILD) else 'is gone'}")
    if RANK == 0:
        sys.exit(0)

CHILD = child()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
client.init_workload_monitoring()
ready(CHILD)
beat_for_ever()
"""
    job = launch(["--nproc-per-node=2", "--shutdown-timeout=2", "--max-restarts=5"], body)
    wait_for_ranks(tmp_path, 2)
    since = time.monotonic()
    os.kill(job.pid, number)
    job.wait_for_output(f"rank 1 got signal {number}")
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(20) == 128 + number, job.output
    took = time.monotonic() - since
    assert 2 <= took < 8, f"the grace is 2 s, it took {took:.1f} s"
    for rank in (0, 1):
        assert job.output.count(f"rank {rank} got signal") == 1, job.output
    # A DataLoader whose workers are gone makes its rank fail instead of ending well.
    assert job.output.count("its child still runs") == 2, job.output
    reports = read_reports(tmp_path / "runs").values()
    assert [report["status"] for report in reports] == [0, -signal.SIGKILL]
    assert {report["reason"] for report in reports} == {f"stopped by {number.name}"}
    asked, stopped, ended = our_lines(job.output)[-3:]
    assert asked == f"[ft_launcher] {number.name}: the ranks have 2 s to save and end"
    assert re.fullmatch(
        r"\[ft_launcher\] stopped within \d\.\d s: nothing new is saved, steps to \d+ are lost; "
        r"had to kill rank 1: no heartbeat for \d\.\d s at step 2",
        stopped,
    )
    assert ended == f"[ft_launcher] ended by {number.name}"
    assert "torch/distributed" not in job.output
    gone_within(2, tmp_path)


def test_ctrl_c_again_ends_ranks_at_once(launch: Launch, tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, lambda *_: say("saving"))
client.init_workload_monitoring()
client.send_heartbeat(2)
client.report_saved(1)
ready()
beat_for_ever()
"""
    job = launch(["--shutdown-timeout=60"], body)
    wait_for_ranks(tmp_path, 1)
    os.kill(job.pid, signal.SIGINT)
    job.wait_for_output("saving")
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(10) == 128 + signal.SIGINT, job.output
    assert "step 1 is saved, steps to 2 are lost; had to kill rank 0" in job.output
    gone_within(2, tmp_path)


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")


@pytest.mark.skipif(
    subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0,
    reason="no PID namespaces for this user",
)
@pytest.mark.parametrize("when", ["at once", "in training"])
def test_process_1_of_a_container_ends_when_it_is_told_to(
    launch: Launch, tmp_path: Path, when: str
) -> None:
    """The kernel drops signals that it has no handler for."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: (client.report_saved(2), sys.exit(0)))
client.init_workload_monitoring()
ready()
beat_for_ever()
"""
    job = launch([], body, before=CONTAINER)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    [launcher] = wait_until(lambda: children.read_text().split())
    if when == "in training":
        wait_for_ranks(tmp_path, 1)
    else:
        wait_until(lambda: int(ft_monitor.process_status(int(launcher), "SigCgt"), 16) >> 14 & 1)
    os.kill(int(launcher), signal.SIGTERM)
    assert job.wait(10) == 128 + signal.SIGTERM, job.output
    is_saved = "step 2 is saved, and the next run resumes there" in job.output
    assert is_saved == (when == "in training"), job.output


def test_a_killed_launcher_leaves_nothing_running(launch: Launch, tmp_path: Path) -> None:
    body = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
client.init_workload_monitoring()
ready(child(), child(start_new_session=True))
beat_for_ever()
"""
    job = launch(["--nproc-per-node=2"], body)
    wait_for_ranks(tmp_path, 2)
    os.kill(job.pid, signal.SIGKILL)
    gone_within(2, tmp_path)
    reports = read_reports(tmp_path / "runs").values()
    assert {report["reason"] for report in reports} == {f"the launcher (pid {job.pid}) is gone"}


def test_sigterm_to_every_process_at_once_lets_ranks_end_well_and_monitors_outlive_them(
    launch: Launch, tmp_path: Path
) -> None:
    """As scancel does. A rank that writes heartbeats at its end must not meet a broken pipe."""
    body = """
def stop(number, frame):
    for step in range(20):
        client.send_heartbeat(100 + step)
        time.sleep(0.05)
    client.shutdown_workload_monitoring()
    (HERE / f"graceful{RANK}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
client.init_workload_monitoring()
ready(child())
beat_for_ever()
"""
    job = launch(["--nproc-per-node=2", "--shutdown-timeout=10"], body)
    wait_for_ranks(tmp_path, 2)
    pids = processes_with(f"FT_TEST_MARK={tmp_path}")
    assert len(pids) == 7  # launcher, two monitors, two ranks, two children
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert job.wait(12) == 128 + signal.SIGTERM
    gone_within(2, tmp_path)
    assert len(list(tmp_path.glob("graceful?"))) == 2, job.output
    for report in read_reports(tmp_path / "runs").values():
        assert report["step"] == 119 and report["status"] == 0 and report["ended"] is not None


# --------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_two_launchers_at_once_with_default_flags_each_run_a_world_of_their_own(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """Also: what a run leaves behind and what a quiet one prints, as these are plain ones."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        PRELUDE + "client.init_workload_monitoring(); client.send_heartbeat(1)\n"
        "mine = HERE / f'{sys.argv[1]}_{RANK}.json'\n"
        "mine.with_suffix('.tmp').write_text(json.dumps(dict(os.environ)))\n"
        "mine.with_suffix('.tmp').rename(mine)\n"
        "while len(list(HERE.glob('?_?.json'))) < 4: time.sleep(0.02)  # all at the same time\n"
    )
    command = [*LAUNCHER, "--nproc-per-node=2", script]
    store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # a shared one is torch's default
    first = start([*command, "a"], TMPDIR=str(temporary))
    second = start([*command, "b"], TMPDIR=str(temporary), **{store: "0"})
    for job in (first, second):
        assert job.wait() == 0, job.output
        assert our_lines(job.output) == job.output.splitlines(), job.output
    ranks = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("?_?.json")}
    assert {name: variables["RANK"] for name, variables in ranks.items()} == {
        "a_0": "0",
        "a_1": "1",
        "b_0": "0",
        "b_1": "1",
    }
    assert {variables["WORLD_SIZE"] for variables in ranks.values()} == {"2"}
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "FT_RUN_DIR"):
        assert len({variables[name] for variables in ranks.values()}) == 2, name
        assert ranks["a_0"][name] == ranks["a_1"][name] != ranks["b_0"][name]
    assert [ranks[name][store] for name in ("a_0", "b_0")] == ["1", "0"]

    # Quiet: what is in force, and that hangs will not be noticed.
    settings, off = first.output.splitlines()
    run_dir = Path(ranks["a_0"]["FT_RUN_DIR"])
    assert settings.startswith("[ft_launcher] settings: ")
    assert settings.endswith(f"evidence: {run_dir}") and "no timeout is set" in off

    # Left behind: the evidence and nothing else, in the places that the table of files names.
    assert [path.name for path in temporary.iterdir()] == [f"ft_runs_{os.getuid()}"]
    assert run_dir.parent.parent == temporary and run_dir.stat().st_mode & 0o777 == 0o700
    found = {path.name for path in run_dir.iterdir()}
    table = {name.replace("_<n>", "_0").rstrip("/") for name in documented("Files in FT_RUN_DIR")}
    assert found == table - {"health_check", "plugin"}
    files = {path.name for path in (run_dir / "attempt_0").iterdir()}
    assert files == {"rank0.json", "rank1.json"}
    assert ft_monitor.FaultToleranceConfig.from_mapping(json.loads(ranks["a_0"]["FT_CONFIG"]))


@pytest.mark.slow
def test_a_script_may_be_a_module_a_command_a_directory_or_run_by_its_path(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "program").mkdir()
    script = tmp_path / "tool.py"
    script.write_text(
        f"#!{sys.executable}\n" + PRELUDE + "client.init_workload_monitoring()\n"
        "say(f'I am {__name__} of {os.environ[\"WORLD_SIZE\"]} with {sys.argv[1:]}')\n"
    )
    script.chmod(0o755)
    shutil.copy(script, tmp_path / "program" / "__main__.py")
    launcher = [*LAUNCHER, f"--ft-run-dir={tmp_path / 'runs'}", "--nproc-per-node=2"]
    jobs = [
        start([*launcher, *options, "--lr", "0.1"])
        for options in (
            ["-m", "tool"],
            ["--no-python", script],
            ["--standalone", "--run-path", "program"],
        )
    ]
    for job in jobs:
        assert job.wait() == 0, job.output
        assert job.output.count("I am __main__ of 2 with ['--lr', '0.1']") == 2, job.output
        assert "Traceback" not in job.output


def test_a_module_may_be_where_a_finder_of_its_own_knows(
    in_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip install -e does it."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            if name == "editable":
                return importlib.util.spec_from_file_location(name, in_process / "train.py")
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    ft_launcher.parse_arguments(["-m", "editable"])


@pytest.mark.slow
def test_the_files_work_when_copied_or_linked_and_whatever_is_on_the_path(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    vendored, elsewhere = tmp_path / "my own copy", tmp_path / "a b"
    for directory in (vendored, elsewhere):
        directory.mkdir()
    for name in ("ft_launcher.py", "ft_monitor.py"):
        shutil.copy(ROOT / name, vendored)
    (elsewhere / "ft_launch").symlink_to(vendored / "ft_launcher.py")
    (elsewhere / "train it.py").write_text(
        PRELUDE + "import ft_monitor\nclient.init_workload_monitoring()\n"
        "say(f'WITH {ft_monitor.__file__} {client.cfg.rank_heartbeat_timeout} {sys.argv}')\n"
    )
    settings = {"fault_tolerance": {"rank_heartbeat_timeout": 60, "safety_factor": 2}}
    (elsewhere / "settings.json").write_text(json.dumps(settings))
    options = ["--ft-run-dir=the runs", "--ft-cfg-path", "settings.json", "--ft-safety-factor=3"]
    command = [*options, "train it.py", "one argument"]
    copied = [sys.executable, "../my own copy/ft_launcher.py", *command]
    jobs = [
        start(copied, cwd=elsewhere, PYTHONPATH="of/the/user"),
        start([sys.executable, "ft_launch", *command], cwd=elsewhere, PYTHONPATH=""),
        start([sys.executable, "-P", *copied[1:]], cwd=elsewhere, PYTHONPATH=""),
        start(copied, cwd=elsewhere, PYTHONPATH="", PYTHONSAFEPATH="1"),
    ]
    if sys.version_info < (3, 11):  # which has no -P
        jobs[2:] = []
    for job in jobs:
        assert job.wait() == 0, job.output
        said = f"WITH {vendored / 'ft_monitor.py'} 60.0 ['train it.py', 'one argument']"
        assert said in job.output, job.output
        (line,) = our_lines(job.output)
        assert '{"rank_heartbeat_timeout": 60.0, "safety_factor": 3.0}' in line
    assert list(read_reports(elsewhere / "the runs")) == ["attempt_0/rank0"]


def test_what_follows_the_script_reaches_it_untouched_and_options_before_it_have_many_spellings(
    launch: Launch,
) -> None:
    arguments = [
        *("--log", "x", "--ft", "1", "--nproc", "9", "--nproc-per-node=9", "--ft-run-dir", "else"),
        *(
            "--ft_a_b=1",
            "--ft-param-x",
            "--max-restarts",
            "9",
            "--standalone",
            "-m",
            "--term-timeout",
        ),
        *("--ft-startup-timeout=-1", "--help", "--", "-h", "", "two words"),
    ]
    body = "say(f'ARGUMENTS {json.dumps(sys.argv[1:])}')"
    options = [
        *("--nproc_per_node", "1", "-t0", "-r", "0", "--ft-param-startup_timeout=30"),
        *("--ft-exit_timeout=none", "--ft_rank_heartbeat_timeout=5"),
        *("--term-timeout=7", "--workers_stop_timeout=8"),
    ]
    job = launch(options, body, *arguments, PET_FT_SAFETY_FACTOR="7", PET_FT_STARTUP_TIMEOUT="99")
    assert job.wait() == 0, job.output
    assert f"ARGUMENTS {json.dumps(arguments)}" in job.output.splitlines()
    (line,) = our_lines(job.output)
    settings = json.loads(re.findall(r"settings: ({.*?})", line)[0])
    assert settings["startup_timeout"] == 30 and settings["rank_heartbeat_timeout"] == 5
    assert settings["safety_factor"] == 7 and settings["workers_stop_timeout"] == 8


def test_a_run_is_looked_at_without_waiting_for_the_import_of_torch(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    launch = "import ft_monitor; ft_monitor.launch()"  # the command ft_launcher
    commands = (LAUNCHER, [sys.executable, "-m", "ft_launcher"], [sys.executable, "-c", launch])
    for command in commands:
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        job = start([*command, "--ft-status", str(tmp_path)], PYTHONPATH=path)
        job.wait()
        assert "no run found" in job.output and "Traceback" not in job.output, job.output
        assert "torch was imported" not in job.output


def test_only_the_newest_runs_are_kept_and_those_that_live(tmp_path: Path) -> None:
    times = [f"20261128-{minute:04}00" for minute in range(25)]
    alive, *runs = [f"{at}_{os.uname().nodename}_{4194305 + n}" for n, at in enumerate(times)]
    alive = alive.replace("4194305", str(os.getpid()))
    theirs = ["latest", "20261128", "20261128-x_host_1", "run_1", "20261128-000000_elsewhere_1"]
    for name in (alive, *runs, *theirs):
        (tmp_path / name / "attempt_0").mkdir(parents=True)
    ft_launcher.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, *runs[4:], *theirs}


# -------------------------------------------------------------------------------------- wrong usage


def test_a_python_without_torch_is_named(start: Callable[..., Started]) -> None:
    job = start([sys.executable, "-I", "-S", ROOT / "ft_launcher.py", "train.py"])
    assert job.wait() == 2
    remedy = "has no torch: activate its environment"
    assert job.output == f"ft_launcher.py: error: {sys.executable} {remedy}\n"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """For calls of main() here: a directory with a script and settings, and nothing may start."""
    for name in list(os.environ):
        if name.startswith(("FT_", "PET_", "SLURM", "FAULT_TOL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(ft_launcher, "launch_workers", lambda *args: pytest.fail("it was started"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "broken.json").write_text('{"rank_heartbeat_timeout": 60')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[60]")
    (tmp_path / "misspelt.json").write_text('{"rank_hartbeat_timeout": 60}')
    (tmp_path / "negative.json").write_text('{"rank_heartbeat_timeout": -60}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    return tmp_path


WRONG = {
    "": "training_script",
    "--ft-rank-hartbeat-timeout=60 train.py": "unrecognized arguments: --ft-rank-hartbeat-timeout",
    "--ft-rank-heartbeat-timeout=-1 train.py": "rank_heartbeat_timeout: got '-1', expected",
    "--ft-startup-timeout=soon train.py": "startup_timeout: got 'soon', expected a number",
    "--ft-exit-timeout=inf train.py": "exit_timeout: got 'inf', expected a number",
    "--ft-rank-section-timeouts=60 train.py": "rank_section_timeouts: got '60', expected NAME:",
    "--ft-safety-factor=0.5 train.py": "safety_factor: got '0.5', expected a number above 1",
    "--ft-rank-termination-signal=SIGNOPE train.py": "expected a signal, such as",
    "--ft-cfg-path=broken.json train.py": "configuration 'broken.json': Expecting ',' delimiter",
    "--ft-cfg-path=binary.json train.py": "'binary.json': 'utf-8' codec can't decode",
    "--ft-cfg-path=list.json train.py": "'list.json': got [60], expected an object",
    "--ft-cfg-path=misspelt.json train.py": "did you mean 'rank_heartbeat_timeout'?",
    "--ft-cfg-path=negative.json train.py": "rank_heartbeat_timeout: got -60, expected",
    "--ft-cfg-path=missing.json train.py": "No such file or directory: 'missing.json'",
    "--ft-cfg-path=. train.py": "Is a directory: '.'",
    "--ft-cfg-path=deep.json train.py": "configuration 'deep.json': ",
    "--ft-auto --ft-auto-save-minutes=0 train.py": "--ft-auto-save-minutes: got 0, expected more",
    "--ft-auto --ft-auto-dir=/dev/null train.py": "Not a directory: '/dev/null/train_",
    "missing.py": "script 'missing.py' not found in ",
    ".": "script '.' not found in ",
    "--no-python missing-command": "command 'missing-command' not found",
    "--no-python ./train.py": "command './train.py' not found",
    "-m no_such_package.train": "module 'no_such_package.train' not found in ",
    "--log-dir=/dev/null/logs train.py": "/dev/null/logs",
    "--nnodes=two train.py": "'two'",
    "--nnodes=1:2:3 train.py": '1:2:3 is not in "MIN:MAX" format',
    "--nnodes=0 train.py": "min_nodes must be > 0",
    "--nproc-per-node=many train.py": "Unsupported nproc_per_node value: many",
    "--max-restarts=-1 train.py": "max_restarts must be >= 0",
    "--max-restarts=often train.py": "invalid int value: 'often'",
    "--shutdown-timeout=-1 train.py": "shutdown_timeout must be non-negative, got -1",
    "--ft-run-dir=/proc/nowhere train.py": "No such file or directory: '/proc/nowhere",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_usage_is_one_clear_line_and_starts_and_leaves_nothing(
    in_process: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        ft_launcher.main(command.split())
    assert stopped.value.code == 2
    captured = capfd.readouterr()
    usage, error = captured.err.splitlines()[-2:]
    assert usage.startswith("usage: ft_launcher.py ") and captured.out == ""
    assert error.startswith("ft_launcher.py: error: ") and WRONG[command] in error
    assert not list(in_process.glob("ft_runs*/*_*"))


def test_a_full_disk_is_no_wrong_usage_and_another_node_may_do_better(
    in_process: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "/tmp/ft_runs_0")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SystemExit, match="1"):
        ft_launcher.main(["train.py"])
    line = "[ft_launcher] cannot start: [Errno 28] No space left on device: '/tmp/ft_runs_0'"
    assert capfd.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"FT_CONFIG": "{"}, "environment variable FT_CONFIG: Expecting"),
        ({"FT_CONFIG": '{"timeout": 1}'}, "FT_CONFIG: unknown setting 'timeout'"),
        ({"PET_FT_STARTUP_TIMEOUT": "-5"}, "startup_timeout: got '-5', expected a number"),
        # srun with several tasks on this node: a training each, in the same place.
        ({"SLURM_LOCALID": "1"}, "give it --ntasks-per-node=1"),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "--ntasks-per-node=1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x3),4"}, "--ntasks-per-node=1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "PET_NNODES": "2"}, "--ntasks-per-node=1"),
        ({"SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}, "--ntasks-per-node=1"),
    ],
)
def test_a_wrong_variable_is_one_clear_line_too(
    in_process: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    expected: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        ft_launcher.main(["train.py"])
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_one_task_on_each_node_is_right(in_process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")  # of a job script that uses no srun
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", "/")
    ft_launcher.check_tasks()
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    ft_launcher.check_tasks()


def test_two_trainings_cannot_have_one_finished_flag_at_the_same_time(
    launch: Launch, in_process: Path, tmp_path: Path
) -> None:
    flag = {"FAULT_TOL_FINISHED_FLAG_FILE": str(tmp_path / "finished")}
    body = "ready()\nwhile True: time.sleep(1)"
    first = launch([], body, **flag)
    wait_for_ranks(tmp_path, 1)
    second = launch([], body, **flag)
    assert second.wait() == 2
    *_, line = second.output.splitlines()
    assert f"another training, whose launcher is pid {first.pid}, has the same finished" in line
    ft_launcher.lock_flag(str(tmp_path / "other"), "another")
    os.kill(first.pid, signal.SIGKILL)  # its lock ends with it
    first.wait()
    ft_launcher.lock_flag(str(tmp_path / "finished"), "another")


def test_launchers_of_one_rendezvous_share_a_finished_flag(in_process: Path) -> None:
    """Also when they start at the same time."""
    fork = multiprocessing.get_context("fork")

    def hold(rendezvous: str, test: Any) -> None:
        try:
            ft_launcher.lock_flag("flag", rendezvous)
            test.send("held")
        except ft_launcher.ConfigError as error:
            test.send(str(error))
        test.recv()

    def lock_as(rendezvous: str) -> tuple[Any, Any]:
        ours, theirs = fork.Pipe()
        process = fork.Process(target=hold, args=(rendezvous, theirs), daemon=True)
        process.start()
        return process, ours

    nodes = [lock_as("job") for _ in range(3)]
    assert [pipe.recv() for _, pipe in nodes] == ["held"] * 3
    nodes[0][0].kill()  # of the launcher whose pid is known
    nodes[0][0].join()
    other, pipe = lock_as("other")
    assert "has the same finished flag" in pipe.recv()
    for process in (other, *[process for process, _ in nodes]):
        process.kill()
        process.join()


def test_flags_beat_the_file_and_the_environment_stands_in_for_flags(
    in_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_process / "settings.json").write_text(
        json.dumps(
            {
                "startup_timeout": 1,
                "initial_rank_heartbeat_timeout": 1,
                "rank_heartbeat_timeout": 1,
                "exit_timeout": 1,
                "rank_section_timeouts": {"step": 1},
            }
        )
    )
    monkeypatch.setenv("FT_CONFIG", '{"startup_timeout": 5, "safety_factor": 5}')  # not used
    monkeypatch.setenv("PET_FT_CFG_PATH", "settings.json")
    monkeypatch.setenv("PET_FT_INITIAL_RANK_HEARTBEAT_TIMEOUT", "2")
    monkeypatch.setenv("PET_FT_RANK_HEARTBEAT_TIMEOUT", "2")
    monkeypatch.setenv("PET_FT_RUN_DIR", "from_environment")
    flags = ["--ft-rank-heartbeat-timeout=3", "--ft_exit_timeout=none"]
    flags += ["--ft-rank-section-timeouts=step:3,save:4"]
    job, _ = ft_launcher.parse_arguments([*flags, "train.py", "--ft-startup-timeout=9"])
    assert job.config == ft_monitor.FaultToleranceConfig(
        startup_timeout=1,
        initial_rank_heartbeat_timeout=2,
        rank_heartbeat_timeout=3,
        exit_timeout=float("inf"),
        rank_section_timeouts={"step": 3, "save": 4},
    )
    assert job.run_dir.parent == in_process / "from_environment"


# --------------------------------------------------------------------------------- held to its word


def documented(heading: str) -> set[str]:
    """The first column of a table in the launcher's docstring."""
    text = (ft_launcher.__doc__ or "").partition(f"\n{heading}")[2].partition("\n\n")[0]
    return {row.split()[0] for row in text.splitlines()[1:]}


def test_the_table_of_exit_codes_names_those_that_these_tests_have_seen() -> None:
    assert documented("Exit codes") == {"0", "1", "2", "93", "128+N"}


def test_every_option_of_torchrun_is_accepted_and_ours_begin_with_ft() -> None:
    def options(parser: Any) -> set[str]:
        return {option for action in parser._actions for option in action.option_strings}

    parser = ft_launcher.get_args_parser()
    theirs = options(torch.distributed.run.get_args_parser())
    ours = options(parser) - theirs
    assert theirs <= options(parser) and "--ft-status" in parser.format_help()
    assert ours and all(option.startswith(("--ft-", "--ft_")) for option in ours)
    assert {option[2:].replace("-", "_") for option in ours} >= {
        f"ft_{name}" for name in ft_monitor.FaultToleranceConfig.__dataclass_fields__
    }


def test_torch_still_has_what_the_agent_overrides_and_uses() -> None:
    """The whole of our contract with torch beyond its public API, for when a version moves."""
    agent = ft_launcher.FaultToleranceAgent
    # launcher.api looks the agent up by its name, among its own globals, when it launches.
    assert launcher_api.LocalElasticAgent is LocalElasticAgent
    assert "LocalElasticAgent" in launcher_api.launch_agent.__code__.co_names
    # Overridden, and called with these arguments by torch's loop.
    overridden = {
        "run": ["self", "role"],
        "_rendezvous": ["self", "worker_group"],
        "_start_workers": ["self", "worker_group"],
        "_monitor_workers": ["self", "worker_group"],
        "_stop_workers": ["self", "worker_group"],
        "_shutdown": ["self", "death_sig", "timeout"],
    }
    functions = {name for name, value in vars(agent).items() if inspect.isfunction(value)}
    assert {name for name in functions - {"__init__"} if hasattr(LocalElasticAgent, name)} == set(
        overridden
    )
    for name, parameters in overridden.items():
        found = inspect.signature(getattr(LocalElasticAgent, name)).parameters
        assert list(found) == parameters, name
    # Used: attributes that torch's __init__ sets.
    used = set(re.findall(r"self\.(_\w+)", inspect.getsource(agent))) - vars(agent).keys()
    used -= set(re.findall(r"self\.(_\w+)(?:: [^=]+)? =", inspect.getsource(agent.__init__)))
    assert used == {
        "_pcontext",
        "_worker_group",
        "_exit_barrier_timeout",
        "_remaining_restarts",
        "_shutdown_timeout",
        "_store",
    }
    set_by_torch = inspect.getsource(LocalElasticAgent.__init__)
    set_by_torch += inspect.getsource(SimpleElasticAgent.__init__)
    assert used <= set(re.findall(r"self\.(_\w+)(?:: .*)? =", set_by_torch))
    # After a failure torch closes the survivors without naming a signal, which tells _close().
    assert list(inspect.signature(PContext.close).parameters) == ["self", "death_sig", "timeout"]
    assert "self.close()" in inspect.getsource(SubprocessContext._poll)
    assert inspect.signature(PContext.pids).parameters.keys() == {"self"}
    # What a node leaves a rendezvous by, and where its nodes are counted.
    source = inspect.getsource(dynamic_rendezvous.DynamicRendezvousHandler)
    assert "exit_op = _RendezvousExitOp()" in source
    assert "self._op_executor.run(exit_op, deadline)" in source
    assert "def _stop_heartbeats(self)" in source
    assert "self._get_deadline(self._settings.timeout.close)" in source
    assert "return len(self._state_holder.state.wait_list)" in source
    # What a spare stays out of.
    assert "join_op = _RendezvousJoinOp()" in source
    join = dynamic_rendezvous._RendezvousJoinOp
    assert list(inspect.signature(join.__call__).parameters) == ["self", "ctx", "deadline"]
    assert {"participants", "wait_list", "closed"} <= vars(
        dynamic_rendezvous._RendezvousState()
    ).keys()
    assert "_Action.SYNC:" in inspect.getsource(
        dynamic_rendezvous._DistributedRendezvousOpExecutor.run
    )


def test_the_readme_names_every_flag_of_ours() -> None:
    actions = ft_launcher.get_args_parser()._actions
    flags = {flag for action in actions for flag in action.option_strings}
    ours = {flag for flag in flags if flag.startswith("--ft-")} | {"--ft-status", "--ft-report"}
    readme = (ROOT / "README.md").read_text()
    assert not [flag for flag in ours if f"`{flag}" not in readme and f" {flag} " not in readme]
