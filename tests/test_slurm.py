"""autoresume.sh in a real SLURM: two nodes on this host, started for these tests."""

from __future__ import annotations

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
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={first} CPUs=8 RealMemory=8000 Gres=gpu:2 Feature=fast State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={second} CPUs=8 RealMemory=8000 Gres=gpu:2 Feature=fast State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=cancel Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF State=UP
"""


class Slurm:
    """A cluster of two nodes. Its clients are called with its configuration, and nothing else of the environment's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        host = socket.gethostname().partition(".")[0]
        address = socket.gethostbyname(host)
        assert address.startswith("127."), f"{host} must resolve to a loopback address, not to {address}"
        for name in ("state", "log", "spool/n1", "spool/n2"):
            (directory / name).mkdir(parents=True)
        port = free_ports()
        values = {"host": host, "address": address, "port": port, "first": port + 1, "second": port + 2}
        user = os.environ.get("USER") or "root"
        text = CONFIGURATION.format(directory=directory, user=user, **values)
        (directory / "slurm.conf").write_text(text)
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (directory / "gres.conf").write_text("NodeName=n1,n2 Name=gpu Count=2 File=/dev/null,/dev/zero\n")
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "FT_", "FAULT", "PET_"))
        }
        self.environment = kept | {"SLURM_CONF": str(directory / "slurm.conf"), "PYTHON": sys.executable}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for daemon in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            self.daemons.append(
                subprocess.Popen(
                    daemon, env=self.environment, start_new_session=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
        wait_until(self.is_idle, 60, "two idle nodes")

    def is_idle(self) -> bool:
        return self.call("sinfo", "-p", "main", "-N", "-h", "-o", "%T", check=False).split() == ["idle", "idle"]

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=cwd, timeout=60)
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
        except (AssertionError, subprocess.TimeoutExpired):  # slurmctld does not answer: the daemons are to end anyway
            pass
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in processes_with(f"SLURM_CONF={self.directory}/slurm.conf"):  # job steps outlive slurmd
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
    directory = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # a long path breaks the sockets of steps
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


# Counts its starts, and saves a checkpoint in each; $1 says when to finish and $2 what to do otherwise.
TRAIN = """#!/bin/bash
f=$FAULT_TOL_FINISHED_FLAG_FILE; echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}$(printf ' <%s>' "$@")" >>"$f.starts"
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
    directory: Path, *options: str, lines: str = "-t 5", command: str = './train.sh "$@"', start: str = "exec"
) -> Path:
    """A job script that starts autoresume.sh, and the command; programs in the directory `bin` hide SLURM's."""
    write_program(directory / "train.sh", TRAIN)
    return write_program(
        directory / "the job.sh",
        f"#!/bin/bash\n#SBATCH -N1 -n1 {lines} -o out-%j.txt --open-mode=append\nPATH=$PWD/bin:$PATH\n"
        f"{start} '{ROOT}/autoresume.sh' {' '.join(options)} -- {command}\n",
    )


def output(directory: Path) -> str:
    """What all jobs have written, in the order of the jobs."""
    paths = sorted(directory.glob("out-*.txt"), key=lambda path: int(path.stem.partition("-")[2]))
    return "".join(path.read_text(errors="replace") for path in paths)


def jobs_of(directory: Path, flag: str = "ft_finished.flag") -> list[str]:
    return [line.split()[0] for line in starts(directory, flag)]


def notes(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "ft_finished.flag.runs").read_text().splitlines()]


def starts(directory: Path, flag: str = "ft_finished.flag") -> list[str]:
    path = directory / f"{flag}.starts"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_starts(directory: Path, count: int, flag: str = "ft_finished.flag") -> None:
    wait_until(lambda: len(starts(directory, flag)) >= count, 60, f"{count} starts: {output(directory)}")


def test_a_chain_of_jobs_ends_with_the_flag_and_an_empty_queue(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, "-J", "a name", str(write_job(directory)), "3", "go  on", "", "*", "")
    slurm.wait_empty()
    lines = [line.split(" ", 2) for line in starts(directory)]
    assert [line[2] for line in lines] == ["<3> <go  on> <> <*> <>"] * 3, output(directory)
    assert len({line[0] for line in lines}) == 3 and lines[0][0] == job
    assert "training is complete" in output(directory)
    assert not re.search("warning|cannot|words", output(directory)), output(directory)
    runs = notes(directory)
    assert [run["job"] for run in runs if run["event"] == "start"] == [line[0] for line in lines]
    assert runs[-1]["result"] == "complete"
    names = slurm.call("scontrol", "show", "job", lines[-1][0], "--oneliner")
    assert "JobName=a name" in names


def test_usr1_before_the_time_limit_hands_over_to_the_next_job(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory)), "2", "wait")
    wait_for_starts(directory, 1)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    assert "got SIGUSR1: asking the job to save a checkpoint" in output(directory)
    assert (directory / "ft_finished.flag").exists()


def test_after_usr1_a_failed_run_is_followed_by_none_in_this_job(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, "--max-failures=6")), "99", "fail")
    wait_until(lambda: "no new checkpoint was reported, 1 of 6" in output(directory), 60, "a first failure")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_empty()
    assert len({line.split()[0] for line in starts(directory)}) == 2, output(directory)
    assert len(starts(directory)) == 6


def test_a_job_that_reaches_its_time_limit_is_gone_on_with(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory)), "2", "wait")
    wait_for_starts(directory, 1)
    slurm.call("scontrol", "update", f"jobid={job}", "EndTime=now+5")
    slurm.wait_empty(150)  # the limit is looked at every 30 s
    assert len(starts(directory)) == 2, output(directory)
    assert (directory / "ft_finished.flag").exists()


def test_a_job_that_always_fails_stops_at_the_limit_and_leaves_no_job(slurm: Slurm, directory: Path) -> None:
    slurm.submit(directory, str(write_job(directory, "--max-failures=3")), "9", "fail")
    slurm.wait_empty()
    assert len(starts(directory)) == 3, output(directory)
    assert "3 runs in a row reported no new checkpoint: giving up" in output(directory)


def test_scancel_cancels_the_continuation_too(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory)), "9", "wait")
    wait_for_starts(directory, 1)
    assert len(slurm.queue("-t", "PENDING")) == 1
    slurm.call("scancel", job)
    slurm.wait_empty()
    assert len(starts(directory)) == 1, output(directory)
    assert "the job was cancelled" in output(directory)


def test_a_node_that_fails_in_the_middle_of_a_run_is_survived(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, lines="-t 5 --no-requeue")), "2", "wait")
    wait_for_starts(directory, 1)
    node = slurm.call("squeue", "-h", "-j", job, "-o", "%N")
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    slurm.wait_empty()
    assert len(starts(directory)) == 2, output(directory)
    assert (directory / "ft_finished.flag").exists()


def test_a_requeued_job_queues_no_second_continuation(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, lines="-t 5 --requeue")), "2", "wait")
    wait_for_starts(directory, 1)
    slurm.call("scontrol", "requeue", job)
    wait_for_starts(directory, 2)
    slurm.wait_empty()
    assert [line.split()[:2] for line in starts(directory)] == [[job, "0"], [job, "1"]], output(directory)


def test_requeue_mode_does_its_runs_in_one_job(slurm: Slurm, directory: Path) -> None:
    job = slurm.submit(directory, str(write_job(directory, "--slurm=requeue")), "2", "go on")
    wait_for_starts(directory, 2)
    slurm.wait_empty()
    assert {line.split()[0] for line in starts(directory)} == {job}
    assert (directory / "ft_finished.flag").exists(), output(directory)


def test_each_task_of_a_job_array_has_a_chain_of_its_own(slurm: Slurm, directory: Path) -> None:
    slurm.submit(directory, "--array=3-4", str(write_job(directory)), "2", "go on")
    slurm.wait_empty()
    for task in (3, 4):
        flag = f"ft_finished_{task}.flag"
        assert (directory / flag).exists(), output(directory)
        assert len(starts(directory, flag)) == 2


def test_a_flag_in_a_missing_directory_is_one_line_and_leaves_no_job(slurm: Slurm, directory: Path) -> None:
    slurm.submit(directory, str(write_job(directory, "--flag missing/flag")), "1", "go on")
    slurm.wait_empty()
    assert output(directory).count("\n") == 1 and "does not exist" in output(directory)


def test_a_chain_survives_the_loss_of_exit_codes(slurm: Slurm, directory: Path) -> None:
    """srun returns the highest code of its tasks, and scripts lose codes: the reason file counts."""
    gives_up = """bash -c 'echo "{\\"reason\\": \\"a bug\\"}" >"$FAULT_TOL_FINISHED_FLAG_FILE.gave_up"; exit 1'"""
    slurm.submit(directory, str(write_job(directory, command=f"srun {gives_up}")))
    slurm.wait_empty()
    assert "gave up: a bug" in output(directory)


def test_the_readmes_job_script_for_one_node_runs_as_written(slurm: Slurm, directory: Path) -> None:
    """Without GPUs, and with a python that only notes how it is called."""
    _, _, text = (ROOT / "README.md").read_text().partition("<!-- one_node.sh -->\n```bash\n")
    (directory / "job.sh").write_text(text.partition("```")[0].replace("#SBATCH --gpus-per-node=8\n", ""))
    shutil.copy(ROOT / "autoresume.sh", directory)
    python = directory / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\necho "called: $*"; echo "{}" >"$FAULT_TOL_FINISHED_FLAG_FILE"\n')
    python.chmod(0o755)
    slurm.submit(directory, f"--export=ALL,PATH={python.parent}:{os.environ['PATH']}", "-o", "out-%j.txt", "job.sh")
    slurm.wait_empty()
    assert "called: ft_launcher.py --nproc-per-node=8 --max-restarts=3 train.py\n" in output(directory)
    assert "training is complete" in output(directory)


def test_a_lightning_training_goes_on_from_job_to_job(slurm: Slurm, directory: Path) -> None:
    """The README's job script for several nodes: two launchers, a rank killed on the way, a stop request, an end."""
    script = directory / "job.sh"
    readme = (ROOT / "README.md").read_text()
    _, _, text = readme.partition("<!-- job.sh -->\n```bash\n")
    text = text.partition("```")[0]
    assert "srun" in text and "autoresume.sh" in text
    for old, new in {
        "--nodes=4": "--nodes=2", "--time=04:00:00": "--time=60", "--gpus-per-node=8": "--cpus-per-task=2",
        "--nproc-per-node=8": "--nproc-per-node=1", "./autoresume.sh": f"'{ROOT}/autoresume.sh'",
        "ft_launcher.py": f"'{ROOT}/ft_launcher.py' --ft-run-dir=runs",
        "train.py": f"'{ROOT}/examples/train.py' --epochs 3 --steps-per-epoch 40 --fault rank_killed --fault-delay 2",
    }.items():  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    # Two slurmd on one host: the nodes' names do not resolve.
    text = text.replace(" python ", ' "$PYTHON" ').replace("export ", "MASTER=localhost\nexport ", 1)
    script.write_text(text)
    job = slurm.submit(directory, "-o", "out-%j.txt", str(script))
    progress = directory / "ft_finished.flag.progress"
    wait_until(progress.exists, 120, f"a checkpoint: {output(directory)}")
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: (directory / "ft_finished.flag").exists(), 150, f"the flag: {output(directory)}")
    slurm.wait_empty()
    text = output(directory)
    assert "ended by SIGKILL, which nobody here sent" in text
    assert "stopped at step" in text
    runs = [json.loads(line) for line in (directory / "ft_finished.flag.runs").read_text().splitlines()]
    assert len({run["job"] for run in runs}) == 2, text
    stopped_at = next(run["step"] for run in runs if run["event"] == "end")
    assert 40 <= int(stopped_at) < 120
    assert json.loads((directory / "ft_finished.flag").read_text())["step"] == 120
