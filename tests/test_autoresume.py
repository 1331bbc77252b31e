"""autoresume.sh by hand: real runs of small commands. Inside of SLURM: test_slurm.py."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Started, is_running, wait_until

AUTORESUME = str(ROOT / "autoresume.sh")
Start = Callable[..., Started]

# What a run does: each start is counted in the file `starts`.
TRAIN = """
f=$FAULT_TOL_FINISHED_FLAG_FILE; echo x >>starts; n=$(wc -l <starts)
save() { echo "{\\"step\\": $1}" >"$f.tmp"; mv "$f.tmp" "$f.progress"; }
finish() { echo '{"reason": "max_steps=3 reached"}' >"$f"; }
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "a $directory's name"
    path.mkdir()
    return path


@pytest.fixture
def run(start: Start, directory: Path) -> Callable[..., Started]:
    def run_script(body: str, *options: str, **environment: str) -> Started:
        return start(
            [AUTORESUME, *options, "--", "bash", "-c", TRAIN + body], cwd=directory, **environment
        )

    return run_script


def starts(directory: Path) -> int:
    path = directory / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_it_runs_until_the_flag_exists(run: Callable[..., Started], directory: Path) -> None:
    job = run("save $n; [ $n -lt 3 ] || finish")
    assert job.wait() == 0
    assert starts(directory) == 3
    assert f"training is complete: {directory}/ft_finished.flag (max_steps=3 reached)" in job.output
    lines = (directory / "ft_finished.flag.runs").read_text().splitlines()
    assert [line.split(" step ")[1].split(" next ")[0] for line in lines] == [
        "- failures 1",
        "1 failures 0",
        "1 failures 1",
        "2 failures 0",
        "2 failures 1",
        "3 failures 0",
        "3 failures 0",
    ]
    assert lines[2].endswith(": run 2 starts") and ": training is complete: " in lines[-1]


def test_a_flag_at_the_start_runs_nothing(run: Callable[..., Started], directory: Path) -> None:
    (directory / "done").touch()
    job = run("true", "--flag", "done")
    assert job.wait() == 0
    assert starts(directory) == 0
    assert f"training is complete: {directory}/done" in job.output
    assert f"for another training, remove {directory}/done, or give --flag" in job.output


def test_a_flag_ends_it_whatever_the_exit_code(
    run: Callable[..., Started], directory: Path
) -> None:
    assert run("finish; exit 5").wait() == 0
    assert starts(directory) == 1


@pytest.mark.parametrize(("code", "expected"), [(7, 7), (0, 1)])
def test_runs_without_progress_end_it_at_the_limit(
    run: Callable[..., Started], directory: Path, code: int, expected: int
) -> None:
    job = run(f"exit {code}", "--max-failures=2")
    assert job.wait() == expected
    assert starts(directory) == 2
    assert "2 runs in a row without progress: giving up" in job.output


def make_every_run_a_long_one(directory: Path) -> Path:
    """A copy of the script to which no run is too short to be taken for progress."""
    text = Path(AUTORESUME).read_text()
    assert text.count("SECONDS >= 60") == 1
    script = directory / "autoresume.sh"
    script.write_text(text.replace("SECONDS >= 60", "SECONDS >= 0"))
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("body", "expected", "runs"),
    [
        ("[ $n -lt 5 ] || finish; exit 0", 0, 5),
        ("exit 6", 6, 2),
        ("[ $n -gt 1 ] || save 1; exit 0", 1, 3),
    ],
    ids=["ended well", "failed", "is known to report checkpoints"],
)
def test_a_long_run_that_reports_nothing_is_no_failure_if_it_ended_well(
    start: Start, directory: Path, body: str, expected: int, runs: int
) -> None:
    script = make_every_run_a_long_one(directory)
    job = start([script, "--max-failures=2", "bash", "-c", TRAIN + body], cwd=directory)
    assert job.wait() == expected
    assert starts(directory) == runs


def test_a_checkpoint_gives_a_failing_job_new_tries(
    run: Callable[..., Started], directory: Path
) -> None:
    """The 2nd and the 4th start save one; the 5th and the 6th reach the limit of two."""
    job = run("case $n in 2|4) save $n;; esac; exit 3", "--max-failures", "2")
    assert job.wait() == 3
    assert starts(directory) == 6


def test_a_job_that_gave_up_is_not_run_again(run: Callable[..., Started], directory: Path) -> None:
    (directory / "ft_finished.flag.gave_up").write_text('{"reason": "of an earlier job"}')
    reason = '{"reason": "a bug in the code", "time": "now"}'
    job = run(f"""[ $n -lt 2 ] || echo '{reason}' >"$f.gave_up"; exit 1""")
    assert job.wait() == 93
    assert starts(directory) == 2
    assert "gave up: a bug in the code\n" in job.output


def test_exit_code_93_is_enough(run: Callable[..., Started], directory: Path) -> None:
    assert run("exit 93").wait() == 93
    assert starts(directory) == 1


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_stop_signal_reaches_the_command_which_is_waited_for(
    run: Callable[..., Started], directory: Path, name: str
) -> None:
    number = signal.Signals[f"SIG{name}"]
    job = run(f"trap 'sleep 0.2; echo ENDS; exit 0' {name}; echo UP; while :; do sleep 0.05; done")
    job.wait_for_output("UP")
    os.kill(job.pid, number)
    assert job.wait() == 128 + number
    assert starts(directory) == 1
    assert re.search(
        rf"got SIG{name}\n.*ENDS.*run 1 ended.*stopped\n$",
        job.output,
        re.DOTALL,
    )


def test_a_command_that_ignores_the_signal_is_waited_for(
    run: Callable[..., Started], directory: Path
) -> None:
    job = run("trap '' TERM; echo UP; until [ -e go ]; do sleep 0.05; done; echo LAST")
    job.wait_for_output("UP")
    for _ in range(3):
        os.kill(job.pid, signal.SIGTERM)
    job.wait_for_output("got SIGTERM")
    assert job.process.poll() is None
    (directory / "go").touch()
    assert job.wait() == 128 + signal.SIGTERM
    assert "LAST" in job.output


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_in_the_background_of_a_shell_without_job_control_signals_end_it(
    start: Start, directory: Path, name: str
) -> None:
    """Where SIGINT and SIGQUIT are ignored, which bash cannot undo."""
    body = f"trap 'echo ENDS; exit 1' {name}; echo UP; while :; do sleep 0.05; done"
    script = '"$@" & echo "pid=$!"; wait $!'
    job = start(["sh", "-c", script, "-", AUTORESUME, "bash", "-c", body], cwd=directory)
    job.wait_for_output("UP")
    pid = int(job.output.partition("pid=")[2].split()[0])
    ignored = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0]
    assert int(ignored, 16) & 1 << signal.SIGINT - 1
    os.kill(pid, signal.Signals[f"SIG{name}"])
    assert job.wait() == 128 + signal.Signals[f"SIG{name}"]
    assert "ENDS" in job.output


def test_a_stop_signal_at_any_moment_ends_it(start: Start, directory: Path) -> None:
    """Between two runs, and while the second one starts, which would go on for long."""
    body = 'f=$FAULT_TOL_FINISHED_FLAG_FILE; [ -e "$f.once" ] && exec sleep 60; : >"$f.once"; false'
    numbers = itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    for moment, number in zip(range(12), numbers, strict=False):
        job = start([AUTORESUME, "--flag", f"flag{moment}", "bash", "-c", body], cwd=directory)
        while "run 1 ended" not in job.output and job.process.poll() is None:
            pass
        time.sleep(moment / 1000)  # over the time that a start takes, and not to wait for something
        os.kill(job.pid, number)
        assert job.wait(10) == 128 + number, job.output
        assert job.output.count("got SIG") == 1, job.output
        assert job.output.endswith("] stopped\n"), job.output


def test_a_command_without_an_interpreter_line_hears_signals_and_costs_no_time(
    start: Start, directory: Path
) -> None:
    script = directory / "train"
    script.write_text(
        "trap 'echo ENDS; exit 1' TERM; echo UP; while :; do read -t 1 <> pipe; done\n"
    )
    script.chmod(0o755)
    os.mkfifo(directory / "pipe")
    job = start([AUTORESUME, "./train"], cwd=directory)
    job.wait_for_output("UP")
    wait_until(lambda: costs_no_time(job.pid), 10)  # that the command remains a copy of the shell
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    assert "ENDS" in job.output


def test_a_stop_request_by_hand_is_for_the_job_and_the_next_run_goes_on(
    run: Callable[..., Started], directory: Path
) -> None:
    body = "save $n; echo UP; [ $n -lt 2 ] || { finish; exit; }; "
    job = run(body + 'until [ -e "$f.stop" ]; do sleep 0.05; done')
    job.wait_for_output("UP")
    (directory / "ft_finished.flag.stop").touch()
    assert job.wait() == 0
    assert starts(directory) == 2 and not (directory / "ft_finished.flag.stop").exists()


def test_a_file_system_without_locks_is_said_once_and_ends_nothing(
    run: Callable[..., Started], tmp_path: Path
) -> None:
    flock = tmp_path / "bin" / "flock"
    flock.parent.mkdir()
    flock.write_text("#!/bin/bash\necho 'flock: 9: Function not implemented' >&2; exit 71\n")
    flock.chmod(0o755)
    job = run("save $n; [ $n -lt 2 ] || finish", PATH=f"{flock.parent}:{os.environ['PATH']}")
    assert job.wait() == 0
    assert job.output.count("Function not implemented") == 1


HEARS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit("HEARD USR1"))
signal.signal(signal.SIGUSR2, lambda *_: print("HEARD USR2", flush=True))
print("UP", flush=True)
while True:
    time.sleep(0.05)
"""


def test_usr1_and_usr2_are_passed_on_to_programs_that_know_them(
    start: Start, directory: Path
) -> None:
    job = start(
        [AUTORESUME, "bash", "-c", '"$@"; exit 0', "-", sys.executable, "-c", HEARS], cwd=directory
    )
    job.wait_for_output("UP")
    for _ in range(20):
        os.kill(job.pid, signal.SIGUSR2)
    job.wait_for_output("HEARD USR2")
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait() == 0
    assert "HEARD USR1" in job.output and job.output.count("UP") == 1


def test_usr1_and_usr2_end_no_program_that_does_not_know_them(
    run: Callable[..., Started], directory: Path
) -> None:
    job = run("echo UP; until [ -e go ]; do sleep 0.05; done; echo LAST; finish")
    job.wait_for_output("UP")
    for _ in range(10):
        os.kill(job.pid, signal.SIGUSR2)
        os.kill(job.pid, signal.SIGUSR1)
    job.wait_for_output("got SIGUSR1")
    (directory / "go").touch()
    assert job.wait() == 0
    assert "LAST" in job.output and not (directory / "ft_finished.flag.stop").exists()


OWN_HANDLER = """
import os, signal, sys, time
step, stop = int(open("step").read()) if os.path.exists("step") else 0, []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
print("UP", flush=True)
while not step:
    time.sleep(0.05)
    if stop:
        open("step", "w").write("7")
        print("saved by its own handler", flush=True)
        sys.exit(0)
open(os.environ["FAULT_TOL_FINISHED_FLAG_FILE"], "w").close()
"""


@pytest.mark.slow
def test_a_script_with_its_own_usr1_handler_hears_it_through_the_launcher(
    start: Start, directory: Path
) -> None:
    (directory / "train.py").write_text(OWN_HANDLER)
    launcher = [sys.executable, ROOT / "ft_launcher.py", "--nproc-per-node=1", "--ft-run-dir=runs"]
    job = start([AUTORESUME, *launcher, "train.py"], cwd=directory)
    job.wait_for_output("UP")
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait() == 0
    assert "saved by its own handler" in job.output and "stopped as asked" in job.output
    assert start([AUTORESUME, *launcher, "train.py"], cwd=directory).wait() == 0
    assert (directory / "ft_finished.flag").exists()


@pytest.mark.parametrize("code", [0, 5])
def test_usr1_asks_the_job_to_save_and_to_end_and_starts_no_other_run(
    run: Callable[..., Started], directory: Path, code: int
) -> None:
    job = run(f'echo UP; until [ -e "$f.stop" ]; do sleep 0.05; done; save $n; exit {code}')
    job.wait_for_output("UP")
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait() == 0
    assert starts(directory) == 1
    assert "stopped as asked: run this again to continue" in job.output
    assert not (directory / "ft_finished.flag.stop").exists()
    assert run('[ ! -e "$f.stop" ] && finish').wait() == 0
    assert starts(directory) == 2


def test_wrong_usage_of_the_command_is_not_tried_again(
    run: Callable[..., Started], directory: Path
) -> None:
    assert run("exit 2").wait() == 2
    assert starts(directory) == 1


def test_exit_code_2_of_a_later_run_is_a_failure_like_any_other(
    run: Callable[..., Started], directory: Path
) -> None:
    assert run("[ $n -gt 1 ] || { save 1; exit 1; }; exit 2", "--max-failures=2").wait() == 2
    assert starts(directory) == 3


def test_the_same_checkpoint_again_is_no_progress(
    run: Callable[..., Started], directory: Path
) -> None:
    """A job that begins anew each time, and fails."""
    body = """sleep 0.01; echo '{"step": 50, "time": "'$(date +%N)'"}' >"$f.progress"; exit 7"""
    job = run(body, "--max-failures=2")
    assert job.wait() == 7
    assert starts(directory) == 3


def test_a_lower_checkpoint_than_before_is_no_progress(
    run: Callable[..., Started], directory: Path
) -> None:
    """A job that begins anew each time, and gets more or less far; whatever an older job had."""
    (directory / "ft_finished.flag.progress").write_text('{"step": 900}')
    job = run("steps=(0 20 30 20 10); save ${steps[n]}; exit 7", "--max-failures=2")
    assert job.wait() == 7
    assert starts(directory) == 4


def test_a_reason_is_shown_whole(run: Callable[..., Started], directory: Path) -> None:
    reason = "a bug in the code, the same error: KeyError: 'a \"key\"' (train.py:3 in step)"
    (directory / "reason").write_text(json.dumps({"time": 3.5, "reason": reason, "host": "here"}))
    job = run('cp reason "$f.gave_up"; exit 93')
    assert job.wait() == 93
    assert f"gave up: {json.dumps(reason)[1:-1]}\n" in job.output
    notes = (directory / "ft_finished.flag.runs").read_text()
    assert notes.endswith(f": gave up: {json.dumps(reason)[1:-1]}\n")


def test_a_signal_as_the_command_ends_does_not_change_its_exit_code(
    run: Callable[..., Started],
) -> None:
    job = run("echo UP; sleep 0.3; exit 93")
    job.wait_for_output("UP")
    while job.process.poll() is None:
        os.kill(job.pid, signal.SIGUSR2)
        time.sleep(
            0.002
        )  # a shell that gets the next signal before it has handled the last runs out of stack
    assert job.wait() == 93


def test_a_stopped_command_costs_no_time_and_still_hears_a_stop_signal(
    run: Callable[..., Started],
) -> None:
    job = run("echo UP; kill -STOP $$; echo ON")
    job.wait_for_output("UP")
    assert costs_no_time(job.pid)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    assert "ON" not in job.output


def costs_no_time(pid: int) -> bool:
    """Whether a process waits: in a loop it would take a good part of half a second."""
    before = cpu_seconds(pid)
    time.sleep(0.5)
    return cpu_seconds(pid) - before < 0.15


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_command_ended_by_a_signal_is_a_failed_run(
    run: Callable[..., Started], directory: Path
) -> None:
    job = run("kill -9 $$", "--max-failures=1")
    assert job.wait() == 128 + signal.SIGKILL
    assert "Killed" not in job.output.replace("SIGKILL", "")


def test_there_is_never_a_second_run_while_the_first_one_lives(
    run: Callable[..., Started], directory: Path
) -> None:
    first = run("echo UP; until [ -e go ]; do sleep 0.05; done; finish")
    first.wait_for_output("UP")
    second = run("finish")
    second.wait_for_output("waiting for another run")
    lock = directory / "ft_finished.flag.lock"
    assert f"{lock}: pid {first.pid} on {socket.gethostname()}, or what it started" in second.output
    third = run("finish")
    third.wait_for_output("waiting for another run")
    assert starts(directory) == 1
    os.kill(first.pid, signal.SIGKILL)  # the command goes on, and with it the lock
    first.wait()
    assert second.process.poll() is third.process.poll() is None
    (directory / "go").touch()
    assert second.wait() == third.wait() == 0
    assert starts(directory) == 1


def test_usr1_to_one_that_waits_for_another_run_ends_it_and_not_the_other(
    run: Callable[..., Started], directory: Path
) -> None:
    first = run("echo UP; until [ -e go ]; do sleep 0.05; done; finish")
    first.wait_for_output("UP")
    second = run("finish")
    second.wait_for_output("waiting for another run")
    os.kill(second.pid, signal.SIGUSR1)
    assert second.wait() == 0
    assert not (directory / "ft_finished.flag.stop").exists()
    (directory / "go").touch()
    assert first.wait() == 0
    assert starts(directory) == 1


def test_what_the_command_leaves_running_does_not_hold_the_lock(
    run: Callable[..., Started], directory: Path
) -> None:
    body = "[ $n -gt 1 ] && finish; sleep 1000 & echo $! >left; exit 1"
    assert run(body, "--max-failures=1").wait() == 1
    assert is_running(int((directory / "left").read_text()))
    second = run(body)
    assert second.wait(20) == 0
    assert "waiting" not in second.output


def test_a_stop_request_of_an_earlier_run_is_forgotten(
    run: Callable[..., Started], directory: Path
) -> None:
    (directory / "ft_finished.flag.stop").touch()
    assert run('[ ! -e "$f.stop" ] || exit 1; finish', "--max-failures=1").wait() == 0


def test_the_command_gets_its_arguments_and_the_path_of_the_flag(
    start: Start, directory: Path
) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['FAULT_TOL_FINISHED_FLAG_FILE'])"
    job = start(
        [AUTORESUME, "python3", "-c", f"{code}; sys.exit(93)", "--flag", "a  b", "", "*"],
        cwd=directory,
        FAULT_TOL_FINISHED_FLAG_FILE="x y",
    )
    assert job.wait() == 93
    assert f"['--flag', 'a  b', '', '*'] {directory}/x y\n" in job.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "command '' not found"),
        (["--max-failures", "0", "true"], "--max-failures: got '0'"),
        (["--max-failures", "many", "true"], "--max-failures: got 'many'"),
        (["--max-failures"], "--max-failures: got ''"),
        (["--max-failures="], "--max-failures: got ''"),
        (["--slurm=always", "true"], "--slurm: got 'always'"),
        (["--falg", "x", "true"], "unknown option --falg"),
        (["no-such-command-here"], "command 'no-such-command-here' not found"),
        (
            ["--flag", "missing/flag", "true"],
            "missing/flag', expected a file in a writable directory",
        ),
        (["--flag", "/proc/flag", "true"], "/proc/flag', expected a file in a writable directory"),
        (["--flag", "", "true"], "expected a file in a writable directory"),
        (["--flag", ".", "true"], "expected a file in a writable directory"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    directory: Path, arguments: list[str], complaint: str
) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FAULT", "SLURM"))
    }
    done = subprocess.run(
        [AUTORESUME, *arguments], cwd=directory, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(directory.glob("*.runs"))


def test_in_a_terminal_of_a_job_no_continuation_is_queued(start: Start, directory: Path) -> None:
    """Its script is a notebook's, say, and would start another one."""
    tools = directory / "tools"
    tools.mkdir()
    for name in ("sbatch", "scontrol", "squeue"):
        (tools / name).write_text('#!/bin/sh\ntouch "${0%/*}/called"')
        (tools / name).chmod(0o755)
    script = f"exec <{{0}} '{AUTORESUME}' -- bash -c '[ -e done ] && touch flag; touch done'"
    terminal, inner = pty.openpty()
    environment = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/", "SLURM_JOB_NAME": "jupyter"}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "FAULT_TOL_FINISHED_FLAG_FILE": "flag"}
    for place, is_queued in ((os.ttyname(inner), False), ("/dev/null", True)):
        for name in ("flag", "done"):
            (directory / name).unlink(missing_ok=True)
        start(["sh", "-c", script.format(place)], cwd=directory, **environment).wait()
        assert (tools / "called").exists() == is_queued
    os.close(terminal)
    os.close(inner)


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")


@pytest.mark.skipif(
    subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0,
    reason="no PID namespaces for this user",
)
@pytest.mark.parametrize(("how", "is_told"), [("", True), ("exec", False)])
def test_below_a_shell_that_is_process_1_of_a_container_it_says_that_no_signals_come(
    start: Start, directory: Path, how: str, is_told: bool
) -> None:
    command = f"cd . && {how} '{AUTORESUME}' --max-failures=1 -- false"
    job = start([*CONTAINER, "sh", "-c", command], cwd=directory)
    assert job.wait() == 1
    assert ("signals will not arrive here" in job.output) == is_told


def test_sbatch_options_that_no_shell_could_split_are_wrong_usage(directory: Path) -> None:
    done = subprocess.run([AUTORESUME, "--sbatch", "-t '5", "true"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--sbatch: cannot split '-t '5'" in done.stderr


def test_help_is_the_head_of_the_script(directory: Path) -> None:
    done = subprocess.run([AUTORESUME, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--max-failures N" in done.stdout and "set -u" not in done.stdout
    assert done.stdout.rstrip().endswith("so that signals arrive here.")


def run_at_a_terminal(directory: Path, script: str) -> tuple[int, int]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execv(AUTORESUME, [AUTORESUME, "--max-failures=1", "bash", "-c", script])
    return pid, terminal


def read_until(terminal: int, text: bytes) -> bytes:
    """What the terminal shows until there is the text, or nothing more."""
    seen = b""
    deadline = time.monotonic() + 30
    while text not in seen and time.monotonic() < deadline:
        try:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        except OSError:  # the terminal is gone with its last process
            break
    return seen


def end_of(pid: int, ends: bool) -> int:
    """The exit code of a process that ends by itself, or is killed."""
    if not ends:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_ctrl_c_at_a_terminal_stops_the_command_and_the_loop(directory: Path) -> None:
    pid, terminal = run_at_a_terminal(
        directory, "trap 'echo ENDS; exit 1' INT; echo UP; while :; do sleep 0.05; done"
    )
    seen = read_until(terminal, b"UP")
    os.write(terminal, b"\x03")
    seen += read_until(terminal, b"] stopped")
    assert end_of(pid, b"] stopped" in seen) == 128 + signal.SIGINT
    assert b"ENDS" in seen and b"run 2" not in seen


def test_a_command_that_reads_at_a_terminal_gets_the_end_of_the_file_and_does_not_hang(
    directory: Path,
) -> None:
    pid, terminal = run_at_a_terminal(directory, "read answer; echo answered: $?")
    seen = read_until(terminal, b"giving up")
    end_of(pid, b"giving up" in seen)
    assert b"answered: 1" in seen
