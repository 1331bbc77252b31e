"""The launcher with real monitors and ranks. Ranks are small scripts of the standard library, which start fast."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.launcher.api
import torch.distributed.run
from conftest import ROOT, Started, processes_with, wait_until
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

import ft_launcher
import ft_monitor

Launch = Callable[..., Started]

# Every rank begins with this. `child()` starts what a DataLoader worker is to a real rank; `ready()` tells the test.
PRELUDE = """
import ctypes, json, os, pathlib, signal, subprocess, sys, time
from ft_monitor import RankMonitorClient

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["FT_ATTEMPT"])
HERE = pathlib.Path(__file__).parent
client = RankMonitorClient()

def say(text):  # in one piece: the ranks share their output
    os.write(1, f"{text}\\n".encode())

def child():
    return subprocess.Popen(["sleep", "1000"]).pid

def runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
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

    def run(options: list[str], body: str, *arguments: str, **settings: Any) -> Started:
        script = tmp_path / "rank.py"
        script.write_text(PRELUDE + body)
        launcher = [sys.executable, ROOT / "ft_launcher.py", f"--ft-run-dir={tmp_path / 'runs'}"]
        return start([*launcher, *options, script, *arguments], **settings)

    return run


def read_reports(directory: Path) -> dict[str, dict[str, Any]]:
    """All reports below a directory, by names such as attempt_0/rank1."""
    paths = sorted(directory.glob("**/attempt_*/rank*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in paths}


def our_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[ft_")]


def endings(output: str) -> list[str]:
    """What the launcher says of each attempt that failed: a line, and those below it that are indented."""
    found = re.findall(r"^\[ft_launcher\] (attempt \d+.*(?:\n\[ft_launcher\]   .*)*)", output, re.MULTILINE)
    return [text.replace("\n[ft_launcher] ", "\n") for text in found]


def gone_within(seconds: float, mark: Path) -> None:
    """No process of a test runs any more; `start` marks all that it starts, and they mark their children."""
    wait_until(lambda: not processes_with(f"FT_TEST_MARK={mark}"), seconds, "the end of all processes")


def wait_for_ranks(tmp_path: Path, count: int) -> None:
    """Until so many ranks have called their ready()."""
    wait_until(lambda: len(list(tmp_path.glob("ready?"))) == count, what=f"{count} ranks that are ready")


# ------------------------------------------------------------------------------------------- faults and restarts

HUNG = r"hung: no heartbeat for 1\.\d s at step 2 \(limit 1\.5 s\)"

FAULTS = {
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    "is stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", HUNG),
    "loops in Python": ("while True: pass", HUNG),
    # A mutex that is locked already: not even a signal's handler interrupts the wait for it.
    "is stuck in C and holds the GIL": ("lock = ctypes.PyDLL(None).pthread_mutex_lock; lock(MUTEX); lock(MUTEX)", HUNG),
    "raises": ("raise ValueError('a bug')", "ValueError: a bug"),
    "says why it ends": ("client.shutdown_workload_monitoring('no data left'); sys.exit(3)", "no data left"),
    "has a segmentation fault": ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "never connects": ("", r"hung: no connection after process start for 3\.\d s \(limit 3 s\)"),
}


def test_whatever_ends_or_hangs_a_rank_the_job_restarts_and_the_log_names_that_rank_and_why(
    launch: Launch, tmp_path: Path
) -> None:
    """Rank 1 meets one fault in each attempt; rank 0 ignores SIGTERM and waits for it, as in a collective.

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
    options = [
        "--nproc-per-node=2", f"--max-restarts={len(FAULTS)}", "--ft-rank-heartbeat-timeout=1.5",
        "--ft-startup-timeout=3",
    ]  # fmt: skip
    job = launch(options, body)
    assert job.wait() == 0, job.output
    assert "OVERLAP" not in job.output, job.output
    reports = read_reports(tmp_path / "runs")
    lines = endings(job.output)
    assert len(lines) == len(FAULTS), job.output
    for attempt, (line, (_, reason)) in enumerate(zip(lines, FAULTS.values(), strict=True)):
        who = rf"rank 1 \(pid {reports[f'attempt_{attempt}/rank1']['pid']}\)"
        assert line.startswith(f"attempt {attempt} ") and re.search(rf"{who}[^;\n]* {reason}", line), line
        assert line.endswith(f"; restarting, {len(FAULTS) - attempt} of {len(FAULTS)} left"), line
        assert "rank 0 (" not in line, "the survivor has done nothing"
        assert reports[f"attempt_{attempt}/rank0"]["stopped"] == "its peer failed"
        if reason == HUNG:  # what it still says while it is ended, when SIGCONT wakes it for its stacks, is too late
            report = reports[f"attempt_{attempt}/rank1"]
            assert report["ended"] - report["heartbeat"] > 1.4
    assert len(reports) == 2 * (len(FAULTS) + 1)
    assert all(report["ended"] is not None for report in reports.values())
    gone_within(2, tmp_path)


def test_a_job_whose_restarts_are_used_up_ends_with_1_and_one_line_for_each_attempt(
    launch: Launch, tmp_path: Path
) -> None:
    job = launch(["--nproc-per-node=2", "--max-restarts=1"], "client.init_workload_monitoring(); sys.exit(RANK and 7)")
    assert job.wait() == ft_launcher.EXIT_FAILED == 1
    first, second = endings(job.output)
    for line, what_next in ((first, "restarting, 1 of 1 left"), (second, "no restarts left")):
        assert re.search(r"rank 1 \(pid \d+\)[^;\n]* exit code 7", line) and line.endswith(f"; {what_next}"), line
    assert "Traceback" not in job.output
    gone_within(2, tmp_path)


def test_a_job_that_makes_no_progress_ends_with_93_and_the_reason_in_a_file(launch: Launch, tmp_path: Path) -> None:
    flag = tmp_path / "finished"
    options = ["--max-restarts=9", "--ft-max-no-progress-cycles=2"]
    body = "client.init_workload_monitoring(); client.report_saved(5); sys.exit(7)"
    job = launch(options, body, FAULT_TOL_FINISHED_FLAG_FILE=str(flag))
    assert job.wait() == ft_launcher.EXIT_GAVE_UP == 93
    reason = "no progress, 2 attempts in a row saved no new checkpoint"
    assert [line.partition("; ")[2] for line in endings(job.output)] == [
        "restarting, 9 of 9 left", "restarting, 8 of 9 left", f"not restarting: {reason}"
    ]  # fmt: skip
    assert our_lines(job.output)[-1] == f"[ft_launcher] gave up: {reason}"
    assert json.loads(Path(f"{flag}.gave_up").read_text())["reason"] == reason and not flag.exists()


def test_torch_too_is_told_first_of_the_rank_that_failed_and_not_of_the_survivors(launch: Launch) -> None:
    """torch logs, and copies to its error file, the earliest failure: that must not be a rank we ended."""
    body = "client.init_workload_monitoring()\nif RANK == 1: sys.exit(7)\nbeat_for_ever()"
    job = launch(["--nproc-per-node=2"], body)
    assert job.wait() == 1
    others = [line for line in job.output.splitlines() if "exitcode" in line and "exitcode: 7" not in line]
    assert not others, others


def test_a_killed_monitor_takes_its_rank_and_all_of_its_children_along_and_the_job_restarts(
    launch: Launch, tmp_path: Path
) -> None:
    body = """
client.init_workload_monitoring()
if ATTEMPT == 0:
    own_group = subprocess.Popen(["sleep", "1000"], process_group=0).pid
    ready(child(), own_group)
    beat_for_ever()
left = [pid for path in HERE.glob("ready?") for pid in path.read_text().split() if runs(pid)]
assert not left, f"LEFT: {left}"
"""
    if sys.version_info < (3, 11):
        body = body.replace("process_group=0", "preexec_fn=lambda: os.setpgid(0, 0)")
    job = launch(["--nproc-per-node=2", "--max-restarts=1"], body)
    wait_for_ranks(tmp_path, 2)
    report = read_reports(tmp_path / "runs")["attempt_0/rank1"]
    os.kill(report["monitor_pid"], signal.SIGKILL)
    assert job.wait() == 0, job.output
    (line,) = endings(job.output)
    assert f"rank 1 (pid {report['pid']}): its monitor (pid {report['monitor_pid']}) was killed" in line
    assert line.endswith("; restarting, 1 of 1 left")
    gone_within(2, tmp_path)


def test_a_monitor_that_is_stopped_does_not_delay_the_restart_for_another_rank(launch: Launch, tmp_path: Path) -> None:
    body = """
client.init_workload_monitoring()
client.send_heartbeat(ATTEMPT)
if ATTEMPT == 0:
    ready()
    beat_for_ever()
"""
    job = launch(["--nproc-per-node=2", "--max-restarts=1", "--ft-workers-stop-timeout=60"], body)
    wait_for_ranks(tmp_path, 2)
    reports = read_reports(tmp_path / "runs")
    os.kill(reports["attempt_0/rank0"]["monitor_pid"], signal.SIGSTOP)
    os.kill(reports["attempt_0/rank1"]["pid"], signal.SIGKILL)
    assert job.wait(60) == 0, job.output  # the launcher would wait for 80 s
    (line,) = endings(job.output)
    assert f"rank 1 (pid {reports['attempt_0/rank1']['pid']}) ended by SIGKILL" in line


def test_a_relative_flag_is_the_same_for_a_rank_that_changes_its_directory(launch: Launch, tmp_path: Path) -> None:
    body = """
os.chdir("/")
pathlib.Path(os.environ["FAULT_TOL_FINISHED_FLAG_FILE"]).touch()
"""
    job = launch([], body, FAULT_TOL_FINISHED_FLAG_FILE="done")
    assert job.wait() == 0, job.output
    assert (tmp_path / "done").exists() and "not complete" not in job.output


def test_a_directory_with_a_main_module_is_a_script(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__main__.py").write_text("print('runs')")
    job = launch([str(tmp_path / "program")], "")
    assert job.wait() == 0 and "runs" in job.output


# ----------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_what_outlives_the_grace_is_killed(
    launch: Launch, tmp_path: Path, number: signal.Signals
) -> None:
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
    os.kill(job.pid, number)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(20) == 128 + number, job.output
    took = time.monotonic() - since
    assert 2 <= took < 8, f"the grace is 2 s, it took {took:.1f} s"
    for rank in (0, 1):
        assert job.output.count(f"rank {rank} got signal") == 1, job.output
    # A DataLoader whose workers are gone makes its rank fail instead of ending well.
    assert job.output.count("its child still runs") == 2, job.output
    reports = read_reports(tmp_path / "runs")
    assert [report["status"] for report in reports.values()] == [0, -signal.SIGKILL]
    assert {report["stopped"] for report in reports.values()} == {f"stopped by {number.name}"}
    assert our_lines(job.output)[1:] == [
        f"[ft_launcher] passing {number.name} on to the ranks; they have 2 s to end",
        f"[ft_launcher] ended by {number.name}",
    ]
    gone_within(2, tmp_path)


def test_a_killed_launcher_leaves_nothing_running(launch: Launch, tmp_path: Path) -> None:
    body = """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
client.init_workload_monitoring()
ready(child())
beat_for_ever()
"""
    job = launch(["--nproc-per-node=2"], body)
    wait_for_ranks(tmp_path, 2)
    os.kill(job.pid, signal.SIGKILL)
    gone_within(2, tmp_path)
    reports = read_reports(tmp_path / "runs").values()
    assert {report["stopped"] for report in reports} == {f"the launcher (pid {job.pid}) is gone"}


def test_sigterm_to_every_process_at_once_lets_ranks_end_well_and_monitors_outlive_them(
    launch: Launch, tmp_path: Path
) -> None:
    """As scancel and many schedulers do. A rank that writes heartbeats while it ends must not meet a broken pipe."""
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


# ------------------------------------------------------------------------------------------- the command line


def test_two_launchers_at_once_with_default_flags_each_run_a_world_of_their_own(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """Also: what a run leaves behind and what a quiet one prints, as these two are as plain as can be."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        PRELUDE + "client.init_workload_monitoring(); client.send_heartbeat(1)\n"
        "mine = HERE / f'{sys.argv[1]}_{RANK}.json'\n"
        "mine.with_suffix('.tmp').write_text(json.dumps(dict(os.environ)))\n"
        "mine.with_suffix('.tmp').rename(mine)\n"
        "while len(list(HERE.glob('?_?.json'))) < 4: time.sleep(0.02)  # both jobs, all ranks, at the same time\n"
    )
    command = [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=2", script]
    jobs = [
        start([*command, "a"], TMPDIR=str(temporary)),
        start([*command, "b"], TMPDIR=str(temporary), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0"),
    ]
    for job in jobs:
        assert job.wait() == 0, job.output
    ranks = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("?_?.json")}
    assert {name: variables["RANK"] for name, variables in ranks.items()} == {
        "a_0": "0", "a_1": "1", "b_0": "0", "b_1": "1"
    }  # fmt: skip
    assert {variables["WORLD_SIZE"] for variables in ranks.values()} == {"2"}
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "FT_RUN_DIR"):
        assert len({variables[name] for variables in ranks.values()}) == 2, name
        assert ranks["a_0"][name] == ranks["a_1"][name] != ranks["b_0"][name]
    # A shared store is torch's default, which the user may ask for.
    store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert [ranks[name][store] for name in ("a_0", "b_0")] == ["1", "0"]

    # Quiet: one line says what is in force, and that hangs will not be noticed.
    for job, name in zip(jobs, "ab", strict=True):
        assert our_lines(job.output) == job.output.splitlines(), job.output
        line, *warnings = job.output.splitlines()
        assert len(warnings) == (name == "b") and all(f"{store}=0: unset it" in warning for warning in warnings)
        assert line.startswith("[ft_launcher] settings: ")
        assert f"evidence: {ranks[f'{name}_0']['FT_RUN_DIR']}; hang detection is off" in line

    # Left behind: the evidence and nothing else, in the places that the table of files names.
    assert [path.name for path in temporary.iterdir()] == [f"ft_runs_{os.getuid()}"]
    run_dir = Path(ranks["a_0"]["FT_RUN_DIR"])
    assert run_dir.parent.parent == temporary and run_dir.stat().st_mode & 0o777 == 0o700
    below = {path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_symlink() or not path.is_dir()}
    found = {re.sub(r"\d+", "<N>", str(path)).replace("attempt_<N>", "attempt_<n>") for path in below}
    assert (run_dir / "logs").is_dir()
    assert found == documented("Files in FT_RUN_DIR") - {"logs/", "progress.json"}

    # Set: what the table of variables names; of those that begin with FT_, the pipe alone is the monitor's.
    added = ranks["a_0"].keys() - os.environ.keys() | {"PYTHONPATH"} & ranks["a_0"].keys()
    variables = documented("Environment that it sets for monitors and ranks")
    assert variables <= added
    assert {name for name in added if name.startswith("FT_")} - {"FT_TEST_MARK"} == (
        {name for name in variables if name.startswith("FT_")} | {"FT_MONITOR_FD"}
    )
    assert ft_monitor.FaultToleranceConfig.from_mapping(json.loads(ranks["a_0"]["FT_CONFIG"]))


def test_a_script_may_be_a_module_a_command_or_run_by_its_path(start: Callable[..., Started], tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        f"#!{sys.executable}\n" + PRELUDE + "client.init_workload_monitoring()\n"
        "say(f'I am {__name__} of {os.environ[\"WORLD_SIZE\"]} with {sys.argv[1:]}')\n"
    )
    script.chmod(0o755)
    launcher = [sys.executable, ROOT / "ft_launcher.py", f"--ft-run-dir={tmp_path / 'runs'}"]
    jobs = [
        start([*launcher, *options, "--lr", "0.1"])
        for options in (
            ["--nproc-per-node=2", "-m", "tool"],
            ["--nproc-per-node=2", "--no-python", script],
            ["--nproc-per-node=2", "--standalone", "--run-path", script],
        )
    ]
    for job in jobs:
        assert job.wait() == 0, job.output
        assert job.output.count("I am __main__ of 2 with ['--lr', '0.1']") == 2, job.output
        assert "Traceback" not in job.output


def test_the_help_lists_the_flags_that_look_at_a_run_and_the_default_of_each_of_ours() -> None:
    parser = ft_launcher.get_args_parser()
    text = " ".join(parser.format_help().split())
    assert "--ft-status [RUN_DIR] [-w]" in text and "--ft-report [RUN_DIR]" in text
    (group,) = (group for group in parser._action_groups if group.title == "fault tolerance")
    ours = [action for action in parser._actions if action.dest.startswith("ft_")]
    assert ours == [action for action in group._group_actions if action.help is not None] and len(ours) == 15
    assert [action.dest for action in ours if "(default: " not in (action.help or "")] == []
    assert "(default: none)" in text and "(default: 5)" in text and "(default: SIGKILL)" in text


def test_what_follows_the_script_reaches_it_untouched(launch: Launch) -> None:
    """Beginnings of torchrun's options and of ours, options equal to them, and settings from all four places."""
    arguments = [
        "--log", "x", "--ft", "1", "--nproc", "9", "--nproc-per-node=9", "--ft-run-dir", "elsewhere", "--max-restarts",
        "9", "--standalone", "-m", "--ft-startup-timeout=-1", "--help", "--", "-h", "", "two words",
    ]  # fmt: skip
    body = "say(f'ARGUMENTS {json.dumps(sys.argv[1:])}')"
    options = ["--nproc_per_node=1", "--ft_startup_timeout=30", "--ft-exit-timeout=none"]
    job = launch(options, body, *arguments, PET_FT_SAFETY_FACTOR="7", PET_FT_STARTUP_TIMEOUT="99")
    assert job.wait() == 0, job.output
    assert f"ARGUMENTS {json.dumps(arguments)}" in job.output.splitlines()
    settings = our_lines(job.output)[0]
    assert "startup_timeout=30, safety_factor=7, " in settings and "exit_timeout" not in settings


def test_the_two_files_work_when_copied_alone_also_to_a_directory_with_spaces(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    vendored, elsewhere = tmp_path / "my own copy", tmp_path / "a b"
    for directory in (vendored, elsewhere):
        directory.mkdir()
    for name in ("ft_launcher.py", "ft_monitor.py"):
        shutil.copy(ROOT / name, vendored)
    (elsewhere / "train it.py").write_text(
        PRELUDE + "import ft_monitor\nclient.init_workload_monitoring()\n"
        "say(f'WITH {ft_monitor.__file__} {client.config.rank_heartbeat_timeout} {sys.argv}')\n"
    )
    (elsewhere / "settings.json").write_text('{"fault_tolerance": {"rank_heartbeat_timeout": 60, "safety_factor": 2}}')
    job = start(
        [sys.executable, "../my own copy/ft_launcher.py", "--ft-run-dir=the runs", "--ft-cfg-path", "settings.json",
         "--ft-safety-factor=3", "train it.py", "one argument"],
        cwd=elsewhere, PYTHONPATH="of/the/user",
    )  # fmt: skip
    assert job.wait() == 0, job.output
    assert f"WITH {vendored / 'ft_monitor.py'} 60.0 ['train it.py', 'one argument']" in job.output, job.output
    assert "settings: rank_heartbeat_timeout=60, safety_factor=3, " in job.output
    assert "hang detection is off" not in job.output
    assert len(our_lines(job.output)) == 1
    assert list(read_reports(elsewhere / "the runs")) == ["attempt_0/rank0"]


# ------------------------------------------------------------------------------------------------- wrong usage


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """For calls of main() here: a directory with a script and some bad settings files, and nothing may start."""
    for name in [name for name in os.environ if name.startswith(("FT_", "PET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ft_launcher, "launch", lambda *args: pytest.fail("it was started"))
    monkeypatch.setattr(ft_launcher, "default_run_dir", lambda: str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "broken.json").write_text('{"rank_heartbeat_timeout": 60')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[60]")
    (tmp_path / "misspelt.json").write_text('{"rank_hartbeat_timeout": 60}')
    (tmp_path / "negative.json").write_text('{"rank_heartbeat_timeout": -60}')
    (tmp_path / "twice.json").write_text('{"rank_heartbeat_timeout": 60, "rank_heartbeat_timeout": 600}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    return tmp_path


WRONG = {
    "": "training_script",
    "--ft-rank-hartbeat-timeout=60 train.py": "unrecognized arguments: --ft-rank-hartbeat-timeout=60",
    "--ft-rank-heartbeat-timeout=-1 train.py": "rank_heartbeat_timeout: got '-1', expected a number greater than 0",
    "--ft-rank-heartbeat-timeout=0 train.py": "rank_heartbeat_timeout: got '0', expected a number greater than 0",
    "--ft-startup-timeout=soon train.py": "startup_timeout: got 'soon', expected a number greater than 0",
    "--ft-initial-rank-heartbeat-timeout=nan train.py": "initial_rank_heartbeat_timeout: got 'nan', expected a number",
    "--ft-exit-timeout=inf train.py": "exit_timeout: got 'inf', expected a number",
    "--ft-rank-section-timeouts=60 train.py": "rank_section_timeouts: got '60', expected NAME:SECONDS",
    "--ft-safety-factor=0.5 train.py": "safety_factor: got '0.5', expected a number of at least 1",
    "--ft-rank-termination-signal=SIGNOPE train.py": "rank_termination_signal: got 'SIGNOPE', expected the name of a",
    "--ft-log-level=loud train.py": "log_level: got 'loud', expected one of",
    "--ft-cfg-path=broken.json train.py": "configuration 'broken.json': Expecting ',' delimiter",
    "--ft-cfg-path=binary.json train.py": "configuration 'binary.json': 'utf-8' codec can't decode",
    "--ft-cfg-path=list.json train.py": "configuration 'list.json': got [60], expected a JSON object",
    "--ft-cfg-path=misspelt.json train.py": "unknown setting 'rank_hartbeat_timeout'; did you mean 'rank_heartbeat_ti",
    "--ft-cfg-path=negative.json train.py": "configuration 'negative.json': rank_heartbeat_timeout: got -60, expected",
    "--ft-cfg-path=missing.json train.py": "cannot read the configuration 'missing.json': No such file or directory",
    "--ft-cfg-path=. train.py": "cannot read the configuration '.': Is a directory",
    "missing.py": "script 'missing.py' not found in ",
    ".": "script '.' not found in ",
    "--no-python missing-command": "command 'missing-command' not found or not executable: give its path",
    "--no-python ./train.py": "command './train.py' not found or not executable: give its path",
    "-m no_such_package.train": "module 'no_such_package.train' not found: there is no 'no_such_package' in ",
    "--log-dir=/dev/null/logs train.py": "/dev/null/logs",
    "--signals-to-handle=SIGTERM,SIGFOO train.py": "--signals-to-handle: got 'SIGFOO', expected names of signals",
    "--event-log-handler=pigeon train.py": "--event-log-handler: got 'pigeon', expected console or null",
    "--ft-cfg-path=twice.json train.py": "'twice.json': setting 'rank_heartbeat_timeout' is given 2 times",
    "--ft-cfg-path=deep.json train.py": "configuration 'deep.json': ",
    "--nnodes=two train.py": "'two'",
    "--nnodes=1:2:3 train.py": '1:2:3 is not in "MIN:MAX" format',
    "--nnodes=0 train.py": "min_nodes must be > 0",
    "--nproc-per-node=many train.py": "Unsupported nproc_per_node value: many",
    "--nproc-per-node=0 train.py": "nproc",
    "--max-restarts=-1 train.py": "max_restarts must be >= 0",
    "--max-restarts=often train.py": "argument --max-restarts/--max_restarts: invalid int value: 'often'",
    "--monitor-interval=-1 train.py": "--monitor-interval: got -1",
    "--monitor-interval=0 train.py": "--monitor-interval: got 0",
    "--master-port=70000 train.py": "70000",
    "--rdzv-backend=c10d --rdzv-endpoint=host:port train.py": "host:port",
    "--shutdown-timeout=-1 train.py": "shutdown_timeout must be non-negative, got -1",
    "--rdzv-backend=carrier-pigeon train.py": "carrier-pigeon",
    "--ft-run-dir=train.py train.py": "cannot create the run directory ",
    "--ft-run-dir=/proc/nowhere train.py": "No such file or directory; set --ft-run-dir",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_usage_is_one_clear_line_and_starts_nothing(
    in_process: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        ft_launcher.main(command.split())
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    usage, error = captured.err.splitlines()
    assert usage.startswith("usage: ft_launcher.py ") and captured.out == ""
    assert error.startswith("ft_launcher.py: error: ") and WRONG[command] in error


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FT_CONFIG", "{", "environment variable FT_CONFIG: Expecting"),
        ("FT_CONFIG", '{"timeout": 1}', "environment variable FT_CONFIG: unknown setting 'timeout'"),
        ("PET_FT_STARTUP_TIMEOUT", "-5", "startup_timeout: got '-5', expected a number greater than 0"),
    ],
)
def test_a_wrong_variable_is_one_clear_line_too(
    in_process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variable: str, value: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        ft_launcher.main(["train.py"])
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_wrong_usage_leaves_no_directory_behind(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("--nnodes=two train.py", "--ft-startup-timeout=-1 train.py", "missing.py"):
        with pytest.raises(SystemExit):
            ft_launcher.main(command.split())
    assert not (in_process / "runs").exists()


def test_wrong_usage_ends_the_program_with_2_without_a_traceback(launch: Launch) -> None:
    job = launch(["--ft-startup-timeout=-1"], "say('STARTED')")
    assert job.wait() == 2
    assert job.output.splitlines()[-1].startswith("ft_launcher.py: error: startup_timeout: got '-1'")
    assert "Traceback" not in job.output and "STARTED" not in job.output


def test_flags_beat_the_file_and_the_environment_stands_in_for_flags(
    in_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_process / "settings.json").write_text(json.dumps({
        "startup_timeout": 1, "initial_rank_heartbeat_timeout": 1, "rank_heartbeat_timeout": 1, "exit_timeout": 1,
        "rank_section_timeouts": {"step": 1},
    }))  # fmt: skip
    monkeypatch.setenv("FT_CONFIG", '{"startup_timeout": 5, "safety_factor": 5}')  # beaten by the file as a whole
    monkeypatch.setenv("PET_FT_CFG_PATH", "settings.json")
    monkeypatch.setenv("PET_FT_INITIAL_RANK_HEARTBEAT_TIMEOUT", "2")
    monkeypatch.setenv("PET_FT_RANK_HEARTBEAT_TIMEOUT", "2")
    monkeypatch.setenv("PET_FT_RUN_DIR", "from_environment")
    flags = ["--ft-rank-heartbeat-timeout=3", "--ft_exit_timeout=none", "--ft-rank-section-timeouts=step:3,save:4"]
    args, config = ft_launcher.parse_arguments([*flags, "train.py", "--ft-startup-timeout=9"])
    assert config == ft_monitor.FaultToleranceConfig(
        startup_timeout=1, initial_rank_heartbeat_timeout=2, rank_heartbeat_timeout=3, exit_timeout=None,
        rank_section_timeouts={"step": 3, "save": 4},
    )  # fmt: skip
    assert args.ft_run_dir.parent == in_process / "from_environment"


# -------------------------------------------------------------------------------------------- held to its word


def documented(heading: str) -> set[str]:
    """The first column of a table in the launcher's docstring."""
    rows = (ft_launcher.__doc__ or "").partition(f"\n{heading}\n")[2].partition("\n\n")[0].splitlines()
    return {row.split()[0] for row in rows} - {"variable"}


def test_the_table_of_exit_codes_names_those_that_these_tests_have_seen() -> None:
    assert documented("Exit codes") == {"0", "1", "2", "93", "128+N"}


def test_every_option_of_torchrun_is_accepted_and_ours_begin_with_ft() -> None:
    def options(parser: Any) -> set[str]:
        return {option for action in parser._actions for option in action.option_strings}

    theirs, all_of_them = options(torch.distributed.run.get_args_parser()), options(ft_launcher.get_args_parser())
    assert theirs <= all_of_them
    ours = all_of_them - theirs
    assert ours and all(option.startswith(("--ft-", "--ft_")) for option in ours)
    assert {option.replace("_", "-") for option in ours} <= ours
    assert {option[2:].replace("-", "_") for option in ours} >= {
        f"ft_{name}" for name in ft_monitor.FaultToleranceConfig.__dataclass_fields__
    }


def test_torch_still_has_what_the_agent_overrides_and_uses() -> None:
    """The whole of our contract with torch beyond its public API, in one place to look at when a version moves."""
    agent = ft_launcher.FaultToleranceAgent
    # torch.distributed.launcher.api looks the agent up by its name, among its own globals, when it launches.
    api = torch.distributed.launcher.api
    assert api.LocalElasticAgent is LocalElasticAgent
    assert "LocalElasticAgent" in api.launch_agent.__code__.co_names
    # Overridden, and called with these arguments by torch's loop.
    overridden = {
        "run": ["self", "role"],
        "_rendezvous": ["self", "worker_group"],
        "_start_workers": ["self", "worker_group"],
        "_monitor_workers": ["self", "worker_group"],
        "_stop_workers": ["self", "worker_group"],
        "_shutdown": ["self", "death_sig", "timeout"],
    }
    ours = {name for name, value in vars(agent).items() if inspect.isfunction(value) and name != "__init__"}
    assert {name for name in ours if hasattr(LocalElasticAgent, name)} == overridden.keys()
    for name, parameters in overridden.items():
        assert list(inspect.signature(getattr(LocalElasticAgent, name)).parameters) == parameters, name
    # Used: attributes that torch's __init__ sets.
    used = set(re.findall(r"self\.(_\w+)", inspect.getsource(agent))) - vars(agent).keys()
    used -= set(re.findall(r"self\.(_\w+)(?:: [^=]+)? =", inspect.getsource(agent.__init__)))
    assert used == {"_pcontext", "_worker_group", "_remaining_restarts", "_shutdown_timeout", "_store"}
    set_by_torch = inspect.getsource(LocalElasticAgent.__init__) + inspect.getsource(SimpleElasticAgent.__init__)
    assert used <= set(re.findall(r"self\.(_\w+)(?:: .*)? =", set_by_torch))
    # After a failure torch closes the survivors without naming a signal, which is how the agent tells that it has.
    assert list(inspect.signature(PContext.close).parameters) == ["self", "death_sig", "timeout"]
    assert "self.close()" in inspect.getsource(SubprocessContext._poll)
    assert inspect.signature(PContext.pids).parameters.keys() == {"self"}
    # What a node leaves a rendezvous by: see leave_rendezvous().
    source = inspect.getsource(dynamic_rendezvous.DynamicRendezvousHandler)
    assert "self._op_executor.run(exit_op, deadline)" in source and "exit_op = _RendezvousExitOp()" in source
    assert "def _stop_heartbeats(self)" in source and "self._get_deadline(self._settings.timeout.close)" in source


def test_a_function_that_torch_would_call_in_a_process_of_its_own_becomes_a_command_line() -> None:
    command = ft_launcher.rank_command(sys.executable, ["-u", "train.py", "--lr", 0.1])
    assert command == [sys.executable, "-u", "train.py", "--lr", "0.1"]
    command = ft_launcher.rank_command(torch.distributed.run.run_script_path, ["/a/train.py", "--lr"])
    assert command[:3] == [sys.executable, "-u", "-c"] and command[4:] == ["/a/train.py", "--lr"]


def test_the_readme_names_every_flag_of_ours() -> None:
    flags = {flag for action in ft_launcher.get_args_parser()._actions for flag in action.option_strings}
    ours = {flag for flag in flags if flag.startswith("--ft-")} | set(ft_launcher.SHOW_FLAGS)
    readme = (ROOT / "README.md").read_text()
    assert not [flag for flag in ours if f"`{flag}" not in readme and f" {flag} " not in readme]
