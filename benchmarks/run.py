"""Measures what fault tolerance costs and saves, beside torchrun in the same run.

    python benchmarks/run.py [--repeat 5 | --quick] [--nvrx PYTHON]

Prints a table in Markdown: medians, with the lowest and highest value behind them. `--nvrx` names a
Python that has nvidia_resiliency_ext, whose launcher then takes part. Launchers take turns, so that
what else the machine does hits all of them. torchrun gets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 as
well, without which its restart often does not come back.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ft_monitor  # noqa: E402  from the directory above

LIMIT = 120.0  # seconds that a job may take for each of its parts
RESTARTS = {  # launchers, and what is to happen
    "": (1, "death"),
    ", a survivor stuck in C": (1, "stuck"),
    ", two nodes": (2, "death"),
    ", node lost, a spare takes over": (3, "loss"),
}
RANKS = 8  # of which a monitor's memory is measured
Samples = dict[str, list[float]]  # by what was measured


# ------------------------------------------------------------------------------- what ranks run


def beat(directory: Path) -> None:
    """Heartbeats, in microseconds each, back to back and one every 5 ms.

    The pipe holds 1,000: of more at once, most would be dropped, which is another cost.
    """
    client = ft_monitor.RankMonitorClient()
    client.init_workload_monitoring()
    back_to_back = []
    for _ in range(20):
        time.sleep(2 * ft_monitor.READ_SECONDS)
        start = time.perf_counter()
        for step in range(500):
            client.send_heartbeat(step)
        back_to_back.append((time.perf_counter() - start) / 500)
    paced = []
    for step in range(200):
        time.sleep(0.005)
        start = time.perf_counter()
        client.send_heartbeat(step)
        paced.append(time.perf_counter() - start)
    medians = [1e6 * statistics.median(seconds) for seconds in (back_to_back, paced)]
    print(json.dumps(medians), flush=True)


def train(directory: Path) -> None:
    """Microseconds that our callback adds to an empty callback's, in a step that does nothing."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    from ft_callback import FaultToleranceCallback

    class Model(LightningModule):
        automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> None:
            pass

    class Empty(Callback):
        def on_train_batch_start(self, *args: object) -> None:
            pass

        def on_train_batch_end(self, *args: object) -> None:
            pass

    def seconds(callback: Callback, steps: int = 3000) -> float:
        trainer = Trainer(
            max_epochs=1, limit_train_batches=steps, logger=False, callbacks=[callback],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", devices=1,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(Model(), [torch.zeros(1)] * steps)
        return (time.perf_counter() - start) / steps

    pairs = []
    for _ in range(5):
        callback = FaultToleranceCallback(
            autoresume=False, calculate_timeouts=True, exp_dir=directory
        )
        pairs.append(seconds(callback) - seconds(Empty()))
    print(json.dumps([statistics.median(pairs) * 1e6]), flush=True)


def hang(directory: Path) -> None:
    """Stop after a heartbeat; whoever started this knows when."""
    client = ft_monitor.RankMonitorClient()
    client.init_workload_monitoring()
    client.send_heartbeat(1)
    print(json.dumps([time.monotonic()]), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def all_reduce(directory: Path) -> None:
    """In the first attempt, rank 1 kills itself, or its node. Rank 0 may be stuck in C code with a
    handler for SIGTERM, as every Lightning rank has: it does not run before the C code returns."""
    (directory / "interpreter").write_text(str(time.time()))
    import torch
    import torch.distributed as dist

    (directory / "imports").write_text(str(time.time()))

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    failure = directory / "failure"
    is_first = not failure.exists()
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        (directory / ("first" if is_first else "again")).write_text(str(time.time()))
    dist.barrier()
    if is_first and dist.get_rank() == 1:
        failure.write_text(str(time.time()))
        if (directory / "loss").exists():
            launcher = ft_monitor.Report.read(ft_monitor.evidence_path("json")).launcher_pid
            os.kill(launcher or 0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if is_first and (directory / "stuck").exists():
        mutex = ctypes.create_string_buffer(256)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    elif is_first:
        dist.barrier()
    dist.destroy_process_group()


def stop(directory: Path) -> None:
    """Train with Lightning, a step every 20 ms and a checkpoint every 50 steps, until stopped."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    from ft_callback import FaultToleranceCallback

    class Pace(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
            time.sleep(0.02)
            if trainer.is_global_zero:
                (directory / "step").write_text(str(trainer.global_step))

    callbacks = [Pace(), ModelCheckpoint(directory, save_last=True, every_n_train_steps=50)]
    if "FT_MONITOR_FD" in os.environ:
        ours = FaultToleranceCallback(autoresume=False, calculate_timeouts=True, exp_dir=directory)
        callbacks.append(ours)
    trainer = Trainer(
        max_epochs=-1, logger=False, callbacks=callbacks, accelerator="cpu", devices=2,
        strategy="ddp", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BoringModel())


RANK_PROGRAMS: dict[str, Callable[[Path], None]] = {
    "beat": beat, "train": train, "hang": hang, "all_reduce": all_reduce, "stop": stop,
}  # fmt: skip


# --------------------------------------------------------------------------------- measurements


def program(name: str, directory: str) -> list[str]:
    return [sys.executable, "-u", __file__, "--rank", name, "--directory", directory]


def monitored(name: str, directory: str, **settings: float) -> list[float]:
    """What a rank under a monitor prints, as numbers."""
    environment = {**os.environ, "FT_CONFIG": json.dumps(settings), "FT_RUN_DIR": directory}
    command = [*ft_monitor.monitor_command(), "--", *program(name, directory)]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=LIMIT
    )
    return [float(x) for x in json.loads(result.stdout.splitlines()[-1])]


def measure_rank(samples: Samples) -> None:
    with tempfile.TemporaryDirectory() as directory:
        back_to_back, paced = monitored("beat", directory, rank_heartbeat_timeout=60)
        samples["heartbeat, back to back, µs"].append(back_to_back)
        samples["heartbeat, every 5 ms, µs"].append(paced)
        samples["callback, a step, µs"] += monitored("train", directory)
        [heartbeat] = monitored("hang", directory, rank_heartbeat_timeout=1)
        report = ft_monitor.Report.read(f"{directory}/attempt_0/rank0.json")
        ended = time.monotonic() - (time.time() - (report.ended or 0.0))
        samples["hung rank dead after its limit, ms"].append((ended - heartbeat - 1) * 1e3)


def proportional_memory(pid: int) -> float:
    """MiB of a process; pages that are shared are divided among the sharers."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def measure_memory(samples: Samples) -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [*ft_monitor.monitor_command(), "--", "sleep", "60"]
        variables = [{"RANK": str(rank), "FT_RUN_DIR": directory} for rank in range(RANKS)]
        monitors = [subprocess.Popen(command, env={**os.environ, **v}) for v in variables]
        try:
            reports = [Path(directory, "attempt_0", f"rank{rank}.json") for rank in range(RANKS)]
            wait_for(lambda: all(report.exists() for report in reports))
            mebibytes = [proportional_memory(monitor.pid) for monitor in monitors]
            samples[f"a monitor's memory, {RANKS} ranks, MiB"].append(statistics.mean(mebibytes))
        finally:
            for monitor in monitors:
                monitor.terminate()
                monitor.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {LIMIT:g} s")
        time.sleep(0.01)


def measure_restart(launcher: list[str], case: str, samples: Samples) -> None:
    """One job whose rank 1 dies once, to its end. Raises RuntimeError if it does not come back."""
    number, fault = RESTARTS[case]
    with tempfile.TemporaryDirectory() as name, open(f"{name}/log", "wb") as log:
        directory = Path(name)
        (directory / fault).touch()
        options = ["--nproc-per-node=2"]
        if number > 1:
            with socket.create_server(("localhost", 0)) as free:
                endpoint = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
            options = ["--nproc-per-node=1", "--nnodes=2", "--rdzv-backend=c10d", endpoint]
        script = program("all_reduce", name)[2:]
        variables = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, **variables}
        start = time.time()
        nodes = []
        try:
            for n in range(number):  # the first, which hosts the store, is not to die
                who = f"--rdzv-conf=is_host={int(n == 0)}"
                command = [*launcher, *options, who, "--max-restarts=1", *script]
                nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            statuses = [node.wait(LIMIT) for node in nodes]
        finally:
            for node in nodes:
                node.terminate()
                node.wait(LIMIT)
        if any(status not in (0, -signal.SIGKILL) for status in statuses):
            raise RuntimeError(f"{command} ended with {statuses}: {Path(log.name).read_text()}")
        files = ("first", "failure", "interpreter", "imports", "again")
        first, failure, interpreter, imports, again = [
            float((directory / file).read_text()) for file in files
        ]
        if not case:
            samples["start to first step, s"].append(first - start)
        samples[f"death to first step{case}, s"].append(again - failure)
        if not case:
            samples["... death to a new rank's first line, s"].append(interpreter - failure)
            samples["... import of torch, s"].append(imports - interpreter)
            samples["... process group and first all_reduce, s"].append(again - imports)


def measure_status(samples: Samples) -> None:
    """Of a run of one rank that has ended."""
    with tempfile.TemporaryDirectory() as directory:
        ours = [sys.executable, str(ROOT / "ft_launcher.py")]
        options = ["--ft-run-dir", directory, "--no-python"]
        subprocess.run([*ours, *options, "true"], stderr=subprocess.DEVNULL, check=True)
        start = time.monotonic()
        subprocess.run([*ours, "--ft-status", directory], stdout=subprocess.DEVNULL, check=True)
        samples["--ft-status, s"].append(time.monotonic() - start)


def measure_stop(launcher: list[str], samples: Samples) -> None:
    """SIGTERM to the launcher of a Lightning training: when all is gone, and what is lost."""
    import torch

    with tempfile.TemporaryDirectory() as name, open(f"{name}/log", "wb") as log:
        directory = Path(name)
        command = [*launcher, "--nproc-per-node=2", *program("stop", name)[2:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        step = directory / "step"
        wait_for(lambda: step.exists() and int(step.read_text() or 0) > 130)
        start = time.monotonic()
        job.terminate()
        job.wait(LIMIT)
        samples["SIGTERM to gone, Lightning, s"].append(time.monotonic() - start)
        saved = torch.load(directory / "last.ckpt", weights_only=False)["global_step"]
        samples["steps lost by that"].append(int(step.read_text()) - saved)


# --------------------------------------------------------------------------------------- output


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict[str, Samples]) -> str:
    """Markdown: a row for what was measured, a column for each launcher, and the ratio of two."""
    names = list(results)
    rows = [f"| | {' | '.join(names)} | ratio |", f"|---{'|---' * len(names)}|---|"]
    for what in dict.fromkeys(what for samples in results.values() for what in samples):
        values = [results[name].get(what, []) for name in names]
        pair = [results[name].get(what, []) for name in ("ft_launcher", "torchrun")]
        medians = [statistics.median(x) for x in pair if x]
        ratio = f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else "-"
        rows.append(f"| {what} | {' | '.join(map(shown, values))} | {ratio} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ft_launcher beside torchrun.")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="of each (default: 5)")
    about = "once each, within 3 minutes"
    parser.add_argument("--quick", action="store_const", dest="repeat", const=1, help=about)
    parser.add_argument("--nvrx", metavar="PYTHON", help="that has nvidia_resiliency_ext")
    parser.add_argument("--rank", choices=RANK_PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        RANK_PROGRAMS[args.rank](args.directory)
        return
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "ft_launcher": [sys.executable, str(ROOT / "ft_launcher.py")],
    }
    if args.nvrx:
        module = "nvidia_resiliency_ext.fault_tolerance.launcher"
        launchers["nvrx"] = [args.nvrx, "-m", module, "--rdzv-backend=c10d"]
    import collections

    results: dict[str, Samples] = {name: collections.defaultdict(list) for name in launchers}
    for _ in range(args.repeat):
        measure_rank(results["ft_launcher"])
        measure_memory(results["ft_launcher"])
        measure_status(results["ft_launcher"])
        for case, (_, fault) in RESTARTS.items():
            for name, launcher in launchers.items():
                if fault != "loss" or name == "ft_launcher":  # others never come back
                    measure_restart(launcher, case, results[name])
        for name, launcher in launchers.items():
            measure_stop(launcher, results[name])
    import torch

    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(
        f"Medians of {args.repeat} (lowest to highest); {machine}, {versions}\n\n{table(results)}"
    )


if __name__ == "__main__":
    main()
