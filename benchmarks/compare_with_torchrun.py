"""Measures what ft_launcher costs and saves, beside torchrun in the same run: medians, and the ratio of the two.

    python benchmarks/compare_with_torchrun.py --repeat 5

Each job has two ranks, which all-reduce with gloo. In the first attempt rank 1 kills itself while rank 0 is stuck in C
code with a Python handler for SIGTERM, as every Lightning rank has one: such a handler does not run before the C code
returns. torchrun gets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 too, without which its restart often does not come back.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "ft_launcher": [sys.executable, str(ROOT / "ft_launcher.py")],
}
LIMIT = 120.0  # seconds that a job may take for each of its parts
START, RESTART, MEMORY = "start to first step, s", "failure to first step, s", "beside the ranks, MiB"


def rank(directory: Path) -> None:
    """What a rank runs. The attempts are told apart by what the first has left."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    failure = directory / "failure"
    is_first = not failure.exists()
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        (directory / ("first" if is_first else "again")).write_text(str(time.time()))
    dist.barrier()
    if is_first and dist.get_rank() == 1:
        (directory / "ready").touch()
        while not (directory / "go").exists():
            time.sleep(0.01)
        failure.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if is_first:
        mutex = ctypes.create_string_buffer(256)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    dist.destroy_process_group()


def memory_without_ranks(pid: int) -> float:
    """MiB of a process and of its descendants other than ranks; pages that are shared are divided among the sharers."""
    is_rank = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1] == b"-u"
    if is_rank:
        return 0.0
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(found[1]) / 1024 if found else 0.0) + sum(memory_without_ranks(int(child)) for child in children)


def run_job(launcher: list[str]) -> dict[str, float]:
    """Run one job to its end. Raises RuntimeError when it does not come back."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        variables = {
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PET_FT_RUN_DIR": f"{name}/runs",
        }
        command = [*launcher, "--nproc-per-node=2", "--max-restarts=1", __file__, "--rank", name]
        start = time.time()
        with open(directory / "log", "wb") as log:
            job = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
        try:
            wait_for(directory / "ready", job)
            memory = memory_without_ranks(job.pid)
            (directory / "go").touch()
            if job.wait(LIMIT):
                raise RuntimeError(f"{command} ended with {job.returncode}: {(directory / 'log').read_text()}")
        finally:
            job.kill()
            job.wait()
        first, failure, again = (float((directory / name).read_text()) for name in ("first", "failure", "again"))
        return {START: first - start, RESTART: again - failure, MEMORY: memory}


def wait_for(path: Path, job: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{job.args!r} has not come as far as {path.name}")
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ft_launcher with torchrun.")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="jobs of each, in turn (default: 5)")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in LAUNCHERS}
    for _ in range(args.repeat):
        for name, launcher in LAUNCHERS.items():
            results[name].append(run_job(launcher))
    print(f"{f'medians of {args.repeat}':<28} {'torchrun':>10} {'ft_launcher':>12} {'ratio':>7}")
    for what in (START, RESTART, MEMORY):
        theirs, ours = (statistics.median(result[what] for result in results[name]) for name in LAUNCHERS)
        print(f"{what:<28} {theirs:>10.2f} {ours:>12.2f} {ours / theirs:>7.2f}")


if __name__ == "__main__":
    main()
