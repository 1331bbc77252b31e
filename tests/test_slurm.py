"""autoresume.sh in a real SLURM: two nodes on this host, started for these tests."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, is_running, processes_with, wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("slurmctld") is None and "CI" not in os.environ,
    reason="SLURM is not installed: apt-get install slurmctld slurmd slurm-client",
)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=8
KillWait=4
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=8000 Gres=gpu:2 Feature=fast State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={first}
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={second}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cancel Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL
PartitionName=grace_requeue Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=grace_cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=5
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """A cluster of two nodes. Its clients get its configuration and nothing else of SLURM's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        host = socket.gethostname().partition(".")[0]
        address = socket.gethostbyname(host)
        assert address.startswith("127."), (
            f"{host} must resolve to a loopback address, not to {address}"
        )
        for name in ("state", "log", "spool/n1", "spool/n2"):
            (directory / name).mkdir(parents=True)
        port = free_ports()
        values = {
            "host": host,
            "address": address,
            "port": port,
            "first": port + 1,
            "second": port + 2,
        }
        user = os.environ.get("USER") or "root"
        text = CONFIGURATION.format(directory=directory, user=user, **values)
        (directory / "slurm.conf").write_text(text)
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (directory / "gres.conf").write_text(
            "NodeName=n1,n2 Name=gpu Count=2 File=/dev/null,/dev/zero\n"
        )
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "FT_", "FAULT", "PET_"))
        }
        self.environment = kept | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",  # threads that spin take minutes on a busy machine
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for daemon in (
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            self.daemons.append(
                subprocess.Popen(
                    daemon, env=self.environment, start_new_session=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        wait_until(self.is_idle, 60, "two idle nodes")

    def is_idle(self) -> bool:
        return self.call("sinfo", "-p", "main", "-N", "-h", "-o", "%T", check=False).split() == [
            "idle",
            "idle",
        ]

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=cwd, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, directory: Path, *arguments: str) -> str:
        return self.call("sbatch", "--parsable", *arguments, cwd=directory).partition(";")[0]

    def queue(self, *options: str) -> list[str]:
        return self.call("squeue", "-h", "-r", "-o", "%i", *options).split()

    def wait_empty(self, limit: float = 90.0) -> None:
        wait_until(lambda: not self.queue(), limit, "an empty queue")

    def cancel_all(self) -> None:
        """Again and again: a job that ends may just have queued another."""

        def is_empty() -> bool:
            jobs = self.queue()
            for job in jobs:
                self.call("scancel", job, check=False)
            return not jobs

        wait_until(is_empty, 30, "an empty queue")

    def stop(self) -> None:
        try:
            self.cancel_all()
        except (
            AssertionError,
            subprocess.TimeoutExpired,
        ):  # slurmctld does not answer: the daemons are to end anyway
            pass
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in processes_with(
            f"SLURM_CONF={self.directory}/slurm.conf"
        ):  # job steps outlive slurmd
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def free_ports() -> int:
    """A port with two free ones after it."""
    for port in range(17100, 18000, 3):
        try:
            for offset in range(3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    directory = Path(
        tempfile.mkdtemp(prefix="sl", dir="/tmp")
    )  # a long path breaks the sockets of steps
    cluster = Slurm(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def directory(slurm: Slurm, tmp_path: Path) -> Iterator[Path]:
    """Of a job; an empty cluster before, and nothing left behind."""
    path = tmp_path / "my job's files"
    path.mkdir()
    yield path
    slurm.cancel_all()
    slurm.call("scontrol", "update", "nodename=n1,n2", "state=resume", check=False)
    wait_until(slurm.is_idle, 30, "idle nodes")


# Counts its starts and saves a checkpoint; $1 says when to finish, $2 what to do otherwise.
TRAIN = """#!/bin/bash
f=$FAULT_TOL_FINISHED_FLAG_FILE
echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}$(printf ' <%s>' "$@")" >>"$f.starts"
n=$(wc -l <"$f.starts")
case $2 in fail) exit 4;; nothing) exit 0;; esac
echo "{\\"step\\": $n}" >"$f.tmp" && mv "$f.tmp" "$f.progress"
[ "$n" -lt "$1" ] || { echo '{"reason": "max_steps reached"}' >"$f"; exit 0; }
case $2 in wait) until [ -e "$f.stop" ]; do sleep 0.05; done; rm "$f.stop";; esac
exit 0
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_job(
    directory: Path,
    *options: str,
    lines: str = "-t 5",
    command: str = './train.sh "$@"',
    start: str = "exec",
) -> Path:
    """A job script, and the command; programs in the directory `bin` hide SLURM's."""
    write_program(directory / "train.sh", TRAIN)
    return write_program(
        directory / "the job.sh",
        f"#!/bin/bash\n#SBATCH -N1 -n1 {lines} -o out-%j.txt --open-mode=append\n"
        "PATH=$PWD/bin:$PATH\n"
        f"{start} '{ROOT}/autoresume.sh' {' '.join(options)} -- {command}\n",
    )


def output(directory: Path) -> str:
    """What all jobs have written, in the order of the jobs."""
    paths = sorted(directory.glob("out-*.txt"), key=lambda path: int(path.stem.partition("-")[2]))
    return "".join(path.read_text(errors="replace") for path in paths)


def jobs_of(directory: Path, flag: str = "ft_finished.flag") -> list[str]:
    return [line.split()[0] for line in starts(directory, flag)]


NOTE = r"\S+ job (?P<job>\S+) run (?P<run>\S+) step (?P<step>\S+) .*?: (?P<text>.*)"


def notes(directory: Path) -> list[dict[str, str]]:
    found = re.finditer(NOTE, (directory / "ft_finished.flag.runs").read_text())
    return [match.groupdict() for match in found]


def starts(directory: Path, flag: str = "ft_finished.flag") -> list[str]:
    path = directory / f"{flag}.starts"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_starts(directory: Path, count: int, flag: str = "ft_finished.flag") -> None:
    wait_until(
        lambda: len(starts(directory, flag)) >= count, 60, f"{count} starts: {output(directory)}"
    )


def test_a_chain_of_jobs_ends_with_the_flag_and_an_empty_queue(
    slurm: Slurm, directory: Path
) -> None:
    job = slurm.submit(
        directory, "-J", "a name", str(write_job(directory)), "3", "go  on", "", "*", ""
    )
    slurm.wait_empty()
    lines = [line.split(" ", 2) for line in starts(directory)]
    assert [line[2] for line in lines] == ["<3> <go  on> <> <*> <>"] * 3, output(directory)
    assert len({line[0] for line in lines}) == 3 and lines[0][0] == job
    assert "training is complete" in output(directory)
    assert not re.search("warning|cannot|error", output(directory)), output(directory)
    runs = notes(directory)
    assert [run["job"] for run in runs if run["text"].endswith("starts")] == jobs_of(directory)
    assert runs[-1]["text"].startswith("training is complete")
    names = slurm.call("scontrol", "show", "job", lines[-1][0], "--oneliner")
    assert "JobName=a name" in names


def test_a_bad_node_is_not_used_again(slurm: Slurm, directory: Path) -> None:
    """What the launcher would write of the node of the first job, the job itself does."""
    text = """#!/bin/bash
./train.sh 3
echo "$SLURMD_NODENAME" >>nodes
[ -s ft_finished.flag.bad_nodes ] || printf '{"reason": "ECC", "time": "%(%FT%T%z)T", "host": "%s"}\\n' \\
  -1 "$SLURMD_NODENAME" >>ft_finished.flag.bad_nodes
"""
    write_program(directory / "marked.sh", text)
    slurm.submit(directory, str(write_job(directory, command="./marked.sh")))
    slurm.wait_empty()
    first, *later = (directory / "nodes").read_text().split()
    assert len(later) == 2 and first not in later, output(directory)
    [told, *_] = re.findall(r"bad nodes: .*", output(directory))
    what = (
        f"bad nodes: {first}; job {jobs_of(directory)[1]} does without the newest, at most 1 of 2: "
    )
    assert told.startswith(what)
    assert "warning" not in output(directory)


def test_usr1_before_the_time_limit_hands_over_to_the_next_job(
    slurm: Slurm, directory: Path
) -> None:
    job = slurm.submit(directory, str(write_job(directory)), "2", "wait")
    wait_for_starts(directory, 1)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    assert "got SIGUSR1" in output(directory)
    assert (directory / "ft_finished.flag").exists()


def test_after_usr1_a_failed_run_is_followed_by_none_in_this_job(
    slurm: Slurm, directory: Path
) -> None:
    job = slurm.submit(directory, str(write_job(directory, "--max-failures=6")), "99", "fail")
    wait_until(lambda: "failures in a row: 1 of 6" in output(directory), 60, "a first failure")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_empty()
    assert len({line.split()[0] for line in starts(directory)}) == 2, output(directory)
    assert len(starts(directory)) == 6


def test_a_job_that_always_fails_stops_at_the_limit_and_leaves_no_job(
    slurm: Slurm, directory: Path
) -> None:
    slurm.submit(directory, str(write_job(directory, "--max-failures=3")), "9", "fail")
    slurm.wait_empty()
    assert len(starts(directory)) == 3, output(directory)
    assert "3 runs in a row without progress: giving up" in output(directory)


def test_scancel_cancels_the_continuation_too(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory)), "9", "wait")
    wait_for_starts(directory, 1)
    assert len(slurm.queue("-t", "PENDING")) == 1
    slurm.call("scancel", job)
    slurm.wait_empty()
    assert len(starts(directory)) == 1, output(directory)
    assert "the job was cancelled" in output(directory)
    assert notes(directory)[-1]["text"] == "stopped"


def test_scancel_while_the_continuation_is_being_queued_cancels_it(
    slurm: Slurm, directory: Path
) -> None:
    script = write_job(directory)
    slow = f'{shutil.which("sbatch")} "$@"; touch queued; sleep 1'
    write_program(directory / "bin" / "sbatch", f"#!/bin/bash\ntrap '' TERM\n{slow}\n")
    job = slurm.submit(directory, str(script), "9", "wait")
    wait_until((directory / "queued").exists, 30, "a continuation")
    slurm.call("scancel", job)
    slurm.wait_empty(30)
    assert not starts(directory), output(directory)
    assert "the job was cancelled" in output(directory)


def test_a_job_script_without_exec_is_warned_of_what_it_costs(
    slurm: Slurm, directory: Path
) -> None:
    slurm.submit(directory, str(write_job(directory, start="")), "1")
    slurm.wait_empty()
    assert "warning: signals will not arrive here" in output(directory)


@pytest.mark.parametrize("partition", ["main", "cancel"])
def test_a_job_that_is_preempted_is_gone_on_with_once(
    slurm: Slurm, directory: Path, partition: str
) -> None:
    """Requeued in the partition main, and cancelled in the other."""
    script = write_job(directory, lines=f"-t 5 -p {partition} -w n1 --exclusive")
    job = slurm.submit(directory, str(script), "2", "wait")
    wait_for_starts(directory, 1)
    slurm.submit(
        directory,
        "-p",
        "urgent",
        "-w",
        "n1",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 0.5",
    )
    wait_for_starts(directory, 2)
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    assert (jobs_of(directory)[1] == job) == (partition == "main")
    assert "was cancelled" not in output(directory)


def test_a_continuation_that_the_user_cancels_is_not_queued_again(
    slurm: Slurm, directory: Path
) -> None:
    slurm.submit(directory, str(write_job(directory)), "9", "wait")
    wait_for_starts(directory, 1)
    (continuation,) = slurm.queue("-t", "PENDING")
    slurm.call("scancel", continuation)
    (directory / "ft_finished.flag.stop").touch()
    wait_for_starts(directory, 2)
    assert len(set(jobs_of(directory))) == len(slurm.queue()) == 1, output(directory)
    (job,) = slurm.queue()
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_empty(30)
    assert "stopped as asked" in output(directory)


def test_a_second_submission_has_a_continuation_of_its_own(slurm: Slurm, directory: Path) -> None:
    script = write_job(directory)
    slurm.submit(directory, str(script), "9", "wait")
    wait_for_starts(directory, 1)
    (first,) = slurm.queue("-t", "PENDING")
    slurm.call("scontrol", "hold", first)
    (directory / "ft_finished.flag.stop").touch()
    wait_until(lambda: not slurm.queue("-t", "RUNNING,COMPLETING"), 30, "the end of the job")
    slurm.submit(directory, str(script), "9", "wait")
    wait_for_starts(directory, 2)
    assert len(slurm.queue("-t", "PENDING")) == 2 and first in slurm.queue("-t", "PENDING")
    slurm.cancel_all()


def test_a_job_of_a_chain_waits_for_a_lock_as_long_as_it_takes(
    slurm: Slurm, directory: Path
) -> None:
    """What an earlier job has left running holds it. A second that is waited takes no time here."""
    script = write_job(directory)
    slurm.submit(directory, str(script), "3", "wait")
    wait_for_starts(directory, 1)
    flock = 'echo >>waits\nexec /usr/bin/flock "${@/1/0.01}"\n'  # a --timeout of 0.01 s
    write_program(directory / "bin" / "flock", f"#!/bin/bash\n{flock}")
    with (directory / "ft_finished.flag.lock").open() as lock:
        (directory / "ft_finished.flag.stop").touch()
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits = directory / "waits"
        wait_until(lambda: waits.exists() and waits.read_text().count("\n") > 65, 60, "waiting")
        assert output(directory).count("waiting for another run") == 1, output(directory)
        (earlier,) = jobs_of(directory)
        assert f", job {earlier}, or what it started" in output(directory)
        assert len(slurm.queue("-t", "RUNNING")) == len(slurm.queue("-t", "PENDING")) == 1
        (job,) = slurm.queue("-t", "RUNNING")
        slurm.call("scancel", "--batch", "--signal=TERM", job)
        wait_until(lambda: f"{job}" not in slurm.queue(), 30, "the end of the job that waits")
        assert "got SIGTERM" in output(directory) and len(starts(directory)) == 1
    wait_for_starts(directory, 2)
    slurm.cancel_all()


def test_a_second_submission_waits_a_minute_for_the_lock_and_leaves_no_job(
    slurm: Slurm, directory: Path
) -> None:
    script = write_job(directory)
    flock = 'exec /usr/bin/flock "${@/1/0.01}"\n'
    write_program(directory / "bin" / "flock", f"#!/bin/bash\n{flock}")
    with (directory / "ft_finished.flag.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        slurm.submit(directory, str(script), "3", "wait")
        slurm.wait_empty(30)
    assert "another run still holds" in output(directory) and not starts(directory)


SHOW = """bash -c 'scontrol show job $SLURM_JOB_ID >show.$SLURM_JOB_ID
env | grep ^SLURM >>show.$SLURM_JOB_ID; exec ./train.sh 2 x'"""


def shown(directory: Path, job: str) -> set[str]:
    """What SLURM shows of a job, and tells it, less what differs between any two jobs."""
    words = (directory / f"show.{job}").read_text().replace(f"-{job}.txt", "-%j.txt").split()
    differs = r"(Time|Id|ID|PID|Priority|Eval|Scheduler|Sid|Command|DEPENDENCY)="
    return {word for word in words if not re.search(differs, word)}


def test_the_next_job_gets_the_scripts_options_and_those_of_sbatch(
    slurm: Slurm, directory: Path
) -> None:
    options = "--ntasks-per-node=2 --cpus-per-task=3 --mem=500 --gres=gpu:1 --constraint=fast"
    lines = f"-t 5 --ntasks=2 {options} -J 'a name' --comment='a comment' --mail-user=x@y"
    given = ["--exclude=n2", "--nice=5", "--no-requeue", "-e", "err of %x-%j.txt", "-p", "cancel"]
    sbatch = """--sbatch "--exclude=n2 --nice=5 -e 'err of %x-%j.txt'" --sbatch='-p cancel'"""
    script = write_job(directory, sbatch, "--sbatch=--no-requeue", lines=lines, command=SHOW)
    first = slurm.submit(directory, *given, str(script))
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    second = jobs_of(directory)[1]
    difference = shown(directory, first) ^ shown(directory, second)
    assert difference <= {"files/the", "job.sh", "files/ft_finished.flag.job"}
    assert len(shown(directory, first)) > 60 and "Features=fast" in shown(directory, first)
    assert (directory / f"err of a name-{second}.txt").exists()
    errors = "".join(path.read_text() for path in directory.glob("err of *"))
    assert f"Submitted batch job {second}" in output(directory) and "warning" not in errors, errors


def test_what_the_next_job_will_not_get_is_said_at_once(slurm: Slurm, directory: Path) -> None:
    """Options of sbatch's command line; those of the script it has."""
    script = write_job(directory, lines="-t 5 --mem=50")
    options = "-t 10 -n2 -N2 -p cancel --mem=60 --gpus-per-node=1 --exclusive --no-requeue"
    slurm.submit(directory, *options.split(), str(script), "9", "wait")
    wait_for_starts(directory, 1)
    (warning,) = re.findall("warning: .*", output(directory))
    for difference in (
        "--time (00:10:00 here, 00:05:00 there)",
        "--partition (cancel here, main there)",
        "--nodes (2 here, 1-1 there)",
        "--ntasks (2 here, 1 there)",
        "--mem (60M here, 50M there)",
        "--gpus-per-node (gres:gpu:1 here, none there)",
        "--exclusive (NO here, OK there)",
        "--requeue (0 here, 1 there)",
    ):
        assert difference in warning
    assert warning.count(" here, ") == 8
    assert warning.endswith("write #SBATCH lines, or --sbatch 'OPTIONS'")


def test_the_next_job_runs_where_this_one_did(slurm: Slurm, directory: Path) -> None:
    """A job script that changes the directory; --output is relative."""
    (directory / "deep" / "deeper").mkdir(parents=True)
    script = write_job(
        directory / "deep",
        lines="-t 5 --chdir=deep",
        start="cd deeper; exec",
        command='../train.sh "$@"',
    )
    slurm.submit(directory, str(script), "3", "go on")
    slurm.wait_empty()
    deepest = directory / "deep" / "deeper"
    assert len(starts(deepest)) == 3, output(directory / "deep")
    assert len(list((directory / "deep").glob("out-*.txt"))) == 3 and not list(
        deepest.glob("out-*.txt")
    )


def test_arguments_that_the_job_script_uses_in_its_own_way_are_taken_for_words(
    slurm: Slurm, directory: Path
) -> None:
    slurm.submit(
        directory, str(write_job(directory, command='./train.sh "$1" "$2" and more')), "2", "go"
    )
    slurm.wait_empty()
    assert [line.split(" ", 2)[2] for line in starts(directory)] == ["<2> <go> <and> <more>"] * 2, (
        output(directory)
    )


def test_autoresume_itself_can_be_given_to_sbatch(slurm: Slurm, directory: Path) -> None:
    write_job(directory)
    arguments = ["--flag", "my flag", "--", "./train.sh", "3", "go  on"]
    slurm.submit(directory, "-t", "5", "-o", "out-%j.txt", str(ROOT / "autoresume.sh"), *arguments)
    slurm.wait_empty()
    assert len(set(jobs_of(directory, "my flag"))) == len(starts(directory, "my flag")) == 3, (
        output(directory)
    )
    assert all(line.endswith(" <3> <go  on>") for line in starts(directory, "my flag"))


@pytest.mark.parametrize("options", [["--slurm=loop"], []])
def test_loop_mode_does_all_runs_in_one_job(
    slurm: Slurm, directory: Path, options: list[str]
) -> None:
    """As auto does where there is no sbatch, in a container say."""
    script = write_job(directory, *options)
    if not options:
        names = (
            "bash",
            "env",
            "grep",
            "flock",
            "rm",
            "mv",
            "tail",
            "cat",
            "cmp",
            "wc",
            "sleep",
        )
        (directory / "bin").mkdir()
        for name in names:
            (directory / "bin" / name).symlink_to(str(shutil.which(name)))
        script.write_text(script.read_text().replace("PATH=$PWD/bin:$PATH", "export PATH=$PWD/bin"))
    slurm.submit(directory, str(script), "3", "go on")
    wait_for_starts(directory, 1)
    assert len(slurm.queue()) <= 1
    slurm.wait_empty()
    assert len(starts(directory)) == 3 and len(set(jobs_of(directory))) == 1, output(directory)
    assert not re.search("cannot|not found|queued|Submitted", output(directory)), output(directory)


def test_sbatch_that_fails_is_tried_again(slurm: Slurm, directory: Path) -> None:
    script = write_job(directory)
    fails = "echo x >>tries; [ $(wc -l <tries) -gt 2 ] || { echo 'Socket timed out' >&2; exit 1; }"
    write_program(
        directory / "bin" / "sbatch", f'#!/bin/bash\n{fails}\nexec {shutil.which("sbatch")} "$@"\n'
    )
    slurm.submit(directory, str(script), "3", "wait")
    wait_for_starts(directory, 1)
    assert "no continuation is queued" in output(directory) and len(slurm.queue()) == 1
    (directory / "ft_finished.flag.stop").touch()
    wait_for_starts(directory, 2)
    assert len(set(jobs_of(directory))) == 2, output(directory)
    slurm.cancel_all()


def test_a_node_that_fails_in_the_middle_of_a_run_is_survived(
    slurm: Slurm, directory: Path
) -> None:
    job = slurm.submit(directory, str(write_job(directory, lines="-t 5 --no-requeue")), "2", "wait")
    wait_for_starts(directory, 1)
    node = slurm.call("squeue", "-h", "-j", job, "-o", "%N")
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    assert (directory / "ft_finished.flag").exists()


def test_a_requeued_job_queues_no_second_continuation(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, lines="-t 5 --requeue")), "3", "wait")
    wait_for_starts(directory, 1)
    continuation = slurm.queue("-t", "PENDING")
    slurm.call("scontrol", "requeue", job)
    wait_for_starts(directory, 2)
    assert slurm.queue("-t", "PENDING") == continuation and len(continuation) == 1, output(
        directory
    )
    (directory / "ft_finished.flag.stop").touch()
    slurm.wait_empty()
    assert [line.split()[:2] for line in starts(directory)[:2]] == [[job, "0"], [job, "1"]], output(
        directory
    )
    assert jobs_of(directory)[2:] == continuation, output(directory)
    assert "was cancelled" not in output(directory)


def test_requeue_mode_does_its_runs_in_one_job(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, "--slurm=requeue")), "2", "go on")
    wait_for_starts(directory, 2)
    slurm.wait_empty()
    assert {line.split()[0] for line in starts(directory)} == {job}
    assert (directory / "ft_finished.flag").exists(), output(directory)


def test_requeue_mode_where_requeueing_is_not_allowed_goes_on_in_the_job(
    slurm: Slurm, directory: Path
) -> None:
    slurm.submit(
        directory, "--no-requeue", str(write_job(directory, "--slurm=requeue")), "3", "go on"
    )
    slurm.wait_empty()
    assert len(starts(directory)) == 3, output(directory)
    assert "cannot requeue job" in output(directory)


@pytest.mark.parametrize(("mode", "options"), [("chain", ["--export=NONE"]), ("requeue", [])])
def test_the_failure_limit_holds_from_job_to_job(
    slurm: Slurm, directory: Path, mode: str, options: list[str]
) -> None:
    slurm.submit(
        directory,
        *options,
        str(write_job(directory, f"--slurm={mode}", "--max-failures=2")),
        "9",
        "nothing",
    )
    wait_until(
        lambda: "giving up" in output(directory) or len(starts(directory)) > 2, 60, "the limit"
    )
    slurm.wait_empty()
    assert [line.split()[1] for line in starts(directory)] == [
        "0",
        "1" if mode == "requeue" else "0",
    ]
    assert "2 runs in a row without progress: giving up" in output(directory)


def test_each_task_of_a_job_array_has_a_chain_of_its_own(slurm: Slurm, directory: Path) -> None:
    slurm.submit(directory, "--array=3-4", str(write_job(directory)), "2", "go on")
    slurm.wait_empty()
    for task in (3, 4):
        flag = f"ft_finished_{task}.flag"
        assert (directory / flag).exists(), output(directory)
        assert len(set(jobs_of(directory, flag))) == len(starts(directory, flag)) == 2, output(
            directory
        )
    assert not re.search("cannot|error|warning", output(directory)), output(directory)


def test_wrong_usage_is_one_line_and_leaves_no_job(slurm: Slurm, directory: Path) -> None:
    slurm.submit(directory, str(write_job(directory, "--flag missing/flag")), "1", "go on")
    slurm.wait_empty()
    assert output(directory).count("\n") == 1 and "a writable directory" in output(directory)


def test_a_chain_survives_the_loss_of_exit_codes(slurm: Slurm, directory: Path) -> None:
    """srun returns the highest code of its tasks, scripts lose them: the reason file counts."""
    (directory / "reason").write_text('{"reason": "a bug"}\n')
    gives_up = 'cp reason "$FAULT_TOL_FINISHED_FLAG_FILE.gave_up"; exit 1'
    slurm.submit(directory, str(write_job(directory, command=f"srun bash -c '{gives_up}'")))
    slurm.wait_empty()
    assert "gave up: a bug" in output(directory)


def test_the_readmes_job_script_for_one_node_runs_as_written(slurm: Slurm, directory: Path) -> None:
    """With a python that only notes how it is called."""
    _, _, text = (ROOT / "README.md").read_text().partition("<!-- one_node.sh -->\n```bash\n")
    (directory / "job.sh").write_text(
        text.partition("```")[0].replace("-node=8\n", "-node=2\n").replace("=64", "=8")
    )
    shutil.copy(ROOT / "autoresume.sh", directory)
    python = directory / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        '#!/bin/bash\necho "called: $*"; echo "{}" >"$FAULT_TOL_FINISHED_FLAG_FILE"\n'
    )
    python.chmod(0o755)
    slurm.submit(
        directory,
        f"--export=ALL,PATH={python.parent}:{os.environ['PATH']}",
        "-o",
        "out-%j.txt",
        "job.sh",
    )
    slurm.wait_empty()
    assert "called: ft_launcher.py --nproc-per-node=8 --max-restarts=3 train.py\n" in output(
        directory
    )
    assert "training is complete" in output(directory)


@pytest.mark.timeout(700)  # 40 s on two idle cores
def test_a_lightning_training_of_three_jobs(slurm: Slurm, directory: Path) -> None:
    """The README's script for several nodes: a rank killed on the way, two stops, an end."""
    script = directory / "job.sh"
    readme = (ROOT / "README.md").read_text()
    _, _, text = readme.partition("<!-- job.sh -->\n```bash\n")
    text = text.partition("```")[0]
    assert "srun" in text and "autoresume.sh" in text
    train = "--epochs 3 --steps-per-epoch 40 --fault rank_killed --fault-delay 1"
    for old, new in (
        ("#SBATCH --nodes=4", "#SBATCH -o out-%j.txt\n#SBATCH --nodes=2"),
        ("--time=04:00:00", "--time=60"),
        ("--gpus-per-node=8", "--gpus-per-node=2"),
        ("=64", "=4"),
        ("--nproc-per-node=8", "--nproc-per-node=1"),
        ("./autoresume.sh", f"'{ROOT}/autoresume.sh'"),
        ("ft_launcher.py", f"'{ROOT}/ft_launcher.py' --ft-run-dir=runs"),
        ("train.py", f"'{ROOT}/examples/train.py' {train}"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    # Two slurmd on one host: the nodes' names do not resolve.
    text = text.replace(" python ", ' "$PYTHON" ').replace(
        "export ", "MASTER=localhost\nexport ", 1
    )
    script.write_text(text)
    job = slurm.submit(directory, str(script))
    progress = directory / "ft_finished.flag.progress"
    killed = "ended by SIGKILL, which nobody here sent"
    wait_until(lambda: killed in output(directory) and progress.exists(), 240, "a restart, a save")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    wait_until(
        lambda: "run 2 starts" in output(directory), 60, f"a second job: {output(directory)}"
    )
    (directory / "ft_finished.flag.stop").touch()
    wait_until(
        lambda: (directory / "ft_finished.flag").exists(), 300, f"the flag: {output(directory)}"
    )
    slurm.wait_empty()
    text = output(directory)
    runs = notes(directory)
    ended = [run for run in runs if "ended with" in run["text"]]
    assert [run["run"] for run in ended] == ["1", "2", "3"], text
    assert len({run["job"] for run in runs}) == 3, text
    stopped_at = [int(run["step"]) for run in ended]
    assert 40 <= stopped_at[0] < stopped_at[1] < stopped_at[2] == 120
    assert json.loads((directory / "ft_finished.flag").read_text())["step"] == 120


# Trains until SIGTERM, takes a second to save, and exits; the next start resumes and completes.
RANK = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from ft_monitor import RankMonitorClient

client = RankMonitorClient()
client.init_workload_monitoring()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(time.time()))
step = int(open("checkpoint").read()) if os.path.exists("checkpoint") else 0
print(f"rank: begins at {{step}}", flush=True)
if step:
    client.training_complete(step=step)
    sys.exit()
while not stopped:
    step += 1
    client.send_heartbeat(step)
    time.sleep(0.05)
print("rank: got SIGTERM", flush=True)
time.sleep(1)
with open("unfinished", "w") as file:
    file.write(str(step))
os.rename("unfinished", "checkpoint")
client.report_saved(step)
print(f"rank: saved {{step}}", flush=True)
"""


def write_training(directory: Path, lines: str, prefix: str = "") -> Path:
    (directory / "rank.py").write_text(RANK)
    launcher = f"{sys.executable} '{ROOT}/ft_launcher.py' --nproc-per-node=1 --ft-run-dir=runs"
    return write_job(directory, lines=lines, command=f"{prefix} {launcher} rank.py")


def story(directory: Path) -> list[str]:
    """What the rank has said, in all jobs."""
    return re.findall("rank: (.*)", output(directory))


def wait_for_training(directory: Path) -> None:
    wait_until(lambda: "rank: begins at 0" in output(directory), 60, "a rank")


def test_scancel_lets_a_rank_save_and_the_next_submission_resume(
    slurm: Slurm, directory: Path
) -> None:
    """A rank of the job script, and one of a step."""
    scripts = {}
    for name, prefix in {"script": "", "step": "srun --kill-on-bad-exit=0"}.items():
        path = directory / name
        path.mkdir()
        scripts[path] = str(write_training(path, "-t 5", prefix))
    jobs = [slurm.submit(path, script) for path, script in scripts.items()]
    for path in scripts:
        wait_for_training(path)
    slurm.call("scancel", *jobs)
    slurm.wait_empty(30)
    for path, script in scripts.items():
        saved = (path / "checkpoint").read_text()
        assert story(path) == ["begins at 0", "got SIGTERM", f"saved {saved}"], output(path)
        slurm.submit(path, script)
    slurm.wait_empty()
    for path in scripts:
        saved = (path / "checkpoint").read_text()
        assert story(path)[3:] == [f"begins at {saved}"]
        assert (path / "ft_finished.flag").exists(), output(path)


def test_a_preempted_rank_saves_and_is_resumed(slurm: Slurm, directory: Path) -> None:
    """After the GraceTime. At its begin, SLURM ends steps, but not the job script."""
    cases = {"grace_requeue": ("n1", "srun --kill-on-bad-exit=0"), "grace_cancel": ("n2", "")}
    for partition, (node, prefix) in cases.items():
        path = directory / partition
        path.mkdir()
        script = write_training(path, f"-t 5 -p {partition} -w {node} --exclusive", prefix)
        slurm.submit(path, str(script))
    for partition in cases:
        wait_for_training(directory / partition)
    for node, _ in cases.values():
        urgent = ["-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap"]
        slurm.submit(directory, *urgent, "sleep 0.5")
    slurm.wait_empty()
    for partition in cases:
        path = directory / partition
        saved = (path / "checkpoint").read_text()
        expected = ["begins at 0", "got SIGTERM", f"saved {saved}", f"begins at {saved}"]
        assert story(path) == expected, output(path)
        assert (path / "ft_finished.flag").exists(), output(path)


def test_a_time_limit_and_the_signal_before_it_are_survived(slurm: Slurm, directory: Path) -> None:
    """Two jobs at once, since SLURM looks at time limits every 30 s: one is told, one is not.

    That one saves in the 4 s of KillWait, between SLURM's SIGTERM and its SIGKILL.
    """
    told, untold = directory / "told", directory / "untold"
    for path in (told, untold):
        path.mkdir()
    slurm.submit(told, str(write_job(told, lines="-t 1 --signal=B:USR1@45")), "2", "wait")
    job = slurm.submit(untold, str(write_training(untold, "-t 5")))
    wait_for_starts(told, 1)
    wait_for_training(untold)
    slurm.call("scontrol", "update", f"jobid={job}", "EndTime=now+1")
    slurm.wait_empty(150)
    assert len(set(jobs_of(told))) == len(starts(told)) == 2, output(told)
    assert "got SIGUSR1" in output(told) and "continues from here" in output(told)
    saved = (untold / "checkpoint").read_text()
    expected = ["begins at 0", "got SIGTERM", f"saved {saved}", f"begins at {saved}"]
    assert story(untold) == expected, output(untold)
    assert "DUE TO TIME LIMIT" in output(untold) and "was cancelled" not in output(untold)
    for path in (told, untold):
        assert (path / "ft_finished.flag").exists(), output(path)
