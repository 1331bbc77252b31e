"""Counts how many restarts come back: ranks are killed or frozen, on one node or on two.

    python benchmarks/stress_restarts.py --restarts 20

Each case is one job of two ranks that all-reduce with gloo. As often as --restarts says the victims
fail in the middle of training; a restart counts as resumed when all ranks have all-reduced again.
Two nodes are two launchers on this host, which meet in a c10d rendezvous. Prints a row for each
case, and exits with 1 unless every restart resumed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS_BEFORE_FAULT = 5
# name: (nodes, signal, which ranks fail)
CASES = {
    "one node, rank 1 killed": (1, signal.SIGKILL, (1,)),
    "one node, rank 1 frozen": (1, signal.SIGSTOP, (1,)),
    "two nodes, rank on node 0 killed": (2, signal.SIGKILL, (0,)),
    "two nodes, rank on node 1 killed": (2, signal.SIGKILL, (1,)),
    "two nodes, rank on node 1 frozen": (2, signal.SIGSTOP, (1,)),
    "two nodes, ranks on both killed": (2, signal.SIGKILL, (0, 1)),
}


def rank(directory: Path, restarts: int, number: int, victims: str) -> None:
    """What a rank runs: rank 0 notes each start in which all ranks have all-reduced."""
    import torch
    import torch.distributed as dist

    from ft_monitor import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    dist.init_process_group("gloo")
    starts = directory / "starts"
    value = torch.ones(1)
    for step in range(STEPS_BEFORE_FAULT + 1):
        value.fill_(1.0)
        dist.all_reduce(value)
        client.send_heartbeat(step)
    assert value.item() == dist.get_world_size()
    if dist.get_rank() == 0:
        with open(starts, "a") as file:
            file.write(f"{time.time()}\n")
    dist.barrier()
    client.report_saved(len(starts.read_text().splitlines()))  # so that the launcher sees progress
    if len(starts.read_text().splitlines()) <= restarts:
        if os.environ["RANK"] in victims.split(","):
            os.kill(os.getpid(), number)
        dist.all_reduce(value)
    client.shutdown_workload_monitoring()


def run_case(
    nodes: int, number: int, victims: tuple[int, ...], restarts: int, limit: float
) -> tuple[int, list[int], float]:
    """The restarts that resumed, the launchers' exit codes (-9: not in time), the seconds taken."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rendezvous = [
            f"--nnodes={nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=localhost:{port}",
            "--rdzv-id=stress",
        ]
        command = [
            sys.executable, str(ROOT / "ft_launcher.py"), f"--nproc-per-node={2 // nodes}",
            *rendezvous, f"--max-restarts={restarts + 5}", "--ft-rank-heartbeat-timeout=3",
            f"--ft-run-dir={directory / 'runs'}",
            __file__, "--rank", name, "--restarts", str(restarts), "--signal", str(int(number)),
            "--victims", ",".join(map(str, victims)),
        ]  # fmt: skip
        start = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = open(directory / "log", "wb")  # noqa: SIM115  closed with the process
        launchers = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log) for _ in range(nodes)
        ]
        for launcher in launchers:
            try:
                launcher.wait(max(1.0, start + limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
        starts = directory / "starts"
        resumed = len(starts.read_text().splitlines()) - 1 if starts.exists() else 0
        codes = [launcher.returncode for launcher in launchers]
        if resumed != restarts or any(codes):
            sys.stderr.write((directory / "log").read_text(errors="replace")[-20000:])
        return resumed, codes, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Count how many restarts come back.")
    parser.add_argument("--restarts", type=int, default=20, help="in each case")
    parser.add_argument(
        "--case", choices=CASES, action="append", help="only this case; may be given again"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--signal", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--victims", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.restarts, args.signal, args.victims)
        return 0
    all_resumed = True
    print(f"{'case':<34} {'resumed':>9} {'seconds each':>13}  exit codes")
    for name in args.case or CASES:
        nodes, number, victims = CASES[name]
        resumed, codes, seconds = run_case(
            nodes, number, victims, args.restarts, limit=60.0 + 40.0 * args.restarts
        )
        all_resumed &= resumed == args.restarts and not any(codes)
        print(
            f"{name:<34} {resumed:>3} of {args.restarts:<2} "
            f"{seconds / (args.restarts + 1):>13.1f}  {codes}",
            flush=True,
        )
    return 0 if all_resumed else 1


if __name__ == "__main__":
    sys.exit(main())
