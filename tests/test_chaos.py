"""Faults of many kinds at any time, and a training that must not show it.

A Lightning training of two ranks under autoresume.sh must end with the finished flag, at the exact
step, with the very weights of one that nothing has disturbed, and leave nothing behind. Kinds,
ranks and delays come from a seed. By hand, for longer:

    python tests/test_chaos.py --faults 100 [--seed 1]
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Started, processes_with, wait_until

import ft_monitor
from ft_monitor import Report

STEPS_FOR_EACH = 50  # that take a second
RUN_SECONDS = 200.0  # for each fault
NEXT_SECONDS = 45.0  # to wait for the next attempt to train
OPTIONS = (
    *("--nproc-per-node=2", "--max-restarts=99", "--ft-max-no-progress-cycles=0"),
    *("--ft-rank-heartbeat-timeout=6", "--ft-min-timeout=6", "--ft-unknown-timeout=60"),
)

TRAIN = """
import resource, signal, sys, time
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from ft_callback import FaultToleranceCallback

asked_to_raise = []
signal.signal(signal.SIGUSR2, lambda *_: asked_to_raise.append(True))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        if asked_to_raise:
            raise ConnectionError("chaos")
        time.sleep(0.02)
        # Data are a function of the step: a DataLoader begins its epoch again after a stop.
        generator = torch.Generator().manual_seed(2 * self.global_step + self.global_rank)
        return (self.layer(torch.randn(16, 8, generator=generator)) - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=int(sys.argv[1]), max_epochs=-1,
    logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
    callbacks=[
        ModelCheckpoint(dirpath="checkpoints", save_last=True, every_n_train_steps=10),
        FaultToleranceCallback(autoresume=True, calculate_timeouts=True, exp_dir="state"),
    ],
)
loader = DataLoader(range(50), batch_size=1)  # 25 steps of each rank are an epoch
trainer.fit(Model(), loader, loader, ckpt_path="last")
"""


@dataclass
class Injected:
    """A fault, and the attempt that it has met."""

    kind: str
    rank: int
    directory: Path
    in_training: bool


# What the verdict must say, where the fault was the only one of an attempt that trained.
VERDICTS = {
    "rank killed": r"rank {rank} \(pid \d+\) ended by SIGKILL",
    "rank stopped": r"rank {rank} \(pid \d+\) hung: ",
    "exception": r"rank {rank} \(pid \d+\) failed: ConnectionError: chaos",
    "abort": r"rank {rank} \(pid \d+\) ended by SIGABRT",
    "monitor killed": r"rank {rank} \(pid \d+\) ended with its monitor",
    "launcher killed": "launcher was killed",
    "SIGTERM": "stopped by a signal",
    "FLAG.stop": "ended well",
}


class Chaos:
    """One training, and what is done to it."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.directory, self.steps = directory, steps
        self.flag = directory / "flag"
        self.mark = f"FT_TEST_MARK={directory}"
        self.injected: list[Injected] = []
        directory.mkdir(parents=True)
        (directory / "train.py").write_text(TRAIN)

    def start(self) -> None:
        ours = ("FT_", "PET_", "SLURM", "FAULT_TOL")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        temporary = self.directory / "tmp"
        temporary.mkdir()
        environment |= {"FT_TEST_MARK": str(self.directory), "OMP_NUM_THREADS": "1"}
        environment |= {"TMPDIR": str(temporary), "PYTHONWARNINGS": "ignore"}
        launcher = [sys.executable, str(ROOT / "ft_launcher.py"), *OPTIONS]
        launcher += [f"--ft-run-dir={self.directory / 'runs'}", "train.py", str(self.steps)]
        command = [str(ROOT / "autoresume.sh"), f"--flag={self.flag}", "--max-failures=99"]
        output = self.directory / "output.txt"
        self.job = Started([*command, *launcher], output, cwd=self.directory, env=environment)

    def running(self) -> dict[int, tuple[Path, Report]]:
        """The reports of ranks that run, with their directories."""
        found = {}
        for latest in self.directory.glob("runs/*/latest"):
            for report in ft_monitor.read_reports(latest):
                pid = report.pid or 0
                if report.ended is None and self.mark.encode() in ft_monitor.read_kernel(
                    f"/proc/{pid}/environ"
                ):
                    found[report.rank] = latest.resolve(), report
        return found

    def is_over(self) -> bool:
        return self.job.process.poll() is not None

    def wait_for_training(self, rank: int) -> None:
        """Until an attempt trains that no fault has met, but not for ever."""
        met = {fault.directory for fault in self.injected}
        deadline = time.monotonic() + NEXT_SECONDS
        while time.monotonic() < deadline and not self.is_over():
            directory, report = self.running().get(rank, (None, None))
            if report is not None and directory not in met and report.step is not None:
                return
            time.sleep(0.05)

    def inject(self, kind: str, rank: int) -> None:
        directory, report = self.running().get(rank, (None, None))
        if directory is None or report is None or self.is_over():
            return
        targets = {
            "rank killed": (report.pid, signal.SIGKILL),
            "rank stopped": (report.pid, signal.SIGSTOP),
            "exception": (report.pid, signal.SIGUSR2),
            "abort": (report.pid, signal.SIGABRT),
            "monitor killed": (report.monitor_pid, signal.SIGKILL),
            "launcher killed": (report.launcher_pid, signal.SIGKILL),
            "SIGTERM": (report.launcher_pid, signal.SIGTERM),
        }
        if kind in targets:
            pid, number = targets[kind]
            if not pid or self.mark.encode() not in ft_monitor.read_kernel(f"/proc/{pid}/environ"):
                return  # it has ended meanwhile
            os.kill(pid, number)
        else:
            Path(f"{self.flag}.stop").touch()
        in_training = report.waiting.startswith("no heartbeat")
        self.injected.append(Injected(kind, rank, directory, in_training))

    def run(self, seed: int, faults: int) -> list[str]:
        """Train under faults to the end; return what is wrong."""
        draw = random.Random(seed)
        self.start()
        try:
            for _ in range(faults):
                kind, rank = draw.choice(list(VERDICTS)), draw.randrange(2)
                at_any_time, delay = draw.random() < 0.25, draw.random()
                if not at_any_time or kind == "rank stopped":
                    self.wait_for_training(rank)
                time.sleep(delay * (4 if at_any_time else 1))
                self.inject(kind, rank)
            code = self.job.wait(RUN_SECONDS * (faults + 1))
            wrong = [f"exit code {code}"] if code else []
            return wrong + self.what_is_wrong()
        except AssertionError as error:
            return [str(error)]
        finally:
            self.end()

    def end(self) -> None:
        for pid in processes_with(self.mark):
            ft_monitor.send(pid, signal.SIGKILL)
        self.job.process.wait(10)

    # -- what must hold at the end

    def what_is_wrong(self) -> list[str]:
        try:
            wait_until(lambda: not processes_with(self.mark), 5)
        except AssertionError:
            return [f"processes are left: {processes_with(self.mark)}"]
        if not self.flag.exists():
            return ["no finished flag"]
        wrong = self.wrong_verdicts() + [f"left: {path}" for path in self.strays()]
        step = json.loads(self.flag.read_text()).get("step")
        saved = self.weights()["global_step"]
        if not step == saved == self.steps:
            wrong.append(f"ended at step {step}, saved {saved}, expected {self.steps}")
        return wrong

    def weights(self) -> dict[str, Any]:
        """The newest checkpoint, which ckpt_path="last" resumes.

        A stop before the first checkpoint writes last.ckpt, which Lightning takes for another
        training's: from then on it writes last-v1.ckpt.
        """
        paths = self.directory.glob("checkpoints/last*.ckpt")
        newest = max(paths, key=lambda path: path.stat().st_mtime)
        return dict(torch.load(newest, weights_only=True, map_location="cpu"))

    def strays(self) -> list[str]:
        names = [str(path.relative_to(self.directory)) for path in self.directory.rglob("*")]
        pattern = r"(\.tmp|unfinished|\.new|flag\.stop|flag\.gave_up)$|torchelastic"
        # A kill may come amid a file of evidence, which goes with its run.
        evidence = re.compile(r"runs/.*\.tmp")
        return sorted(x for x in names if re.search(pattern, x) and not evidence.fullmatch(x))

    def wrong_verdicts(self) -> list[str]:
        """Attempts without a verdict, with a wrong one, or that failed without a fault."""
        wrong = []
        for run_dir in sorted(self.directory.glob("runs/*/")):
            incidents = {x.attempt: x for x in ft_monitor.read_incidents(run_dir)}
            for directory in sorted(run_dir.glob("attempt_*")):
                name = directory.relative_to(self.directory / "runs")
                incident = incidents.get(int(directory.name.partition("_")[2]))
                faults = [x for x in self.injected if x.directory == directory]
                if incident is None and "launcher killed" in [x.kind for x in faults]:
                    continue  # nobody was left to write it down
                if incident is None:
                    wrong.append(f"{name}: no verdict, faults {faults}")
                    continue
                says = incident.why
                # A kill between a checkpoint and the link to it: one attempt mends that.
                is_mended = "last.ckpt was missing: linked" in says
                if not (faults or is_mended or incident.outcome == ft_monitor.Outcome.WELL):
                    wrong.append(f"{name}: nothing was done to it: {says}")
                is_clear = len(faults) == 1 and faults[0].in_training
                if is_clear and (incident.last_step or 0) < self.steps:
                    expected = VERDICTS[faults[0].kind].format(rank=faults[0].rank)
                    if not re.search(expected, says):
                        wrong.append(f"{name}: {faults[0].kind}, rank {faults[0].rank}: {says}")
        return wrong


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints' values are not the same to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        pairs = [(key, one[key], other.get(key)) for key in one]
    elif isinstance(one, list):
        pairs = [(n, *pair) for n, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [where]
    return [x for key, a, b in pairs for x in differences(a, b, f"{where}.{key}")]


def trained_differently(chaos: Chaos, undisturbed: Chaos) -> list[str]:
    ours, theirs = chaos.weights(), undisturbed.weights()
    names = ("state_dict", "optimizer_states", "global_step")
    places = [x for name in names for x in differences(ours[name], theirs[name], name)]
    return [f"not the same in {places}"] if places else []


def disturb(base: Path, undisturbed: Chaos, seed: int, faults: int) -> tuple[list[str], Chaos]:
    """A training under faults, and what is wrong with it."""
    chaos = Chaos(base / f"seed{seed}", undisturbed.steps)
    wrong = chaos.run(seed, faults)
    return wrong or trained_differently(chaos, undisturbed), chaos


def train_undisturbed(base: Path, faults: int) -> Chaos:
    chaos = Chaos(base / "undisturbed", STEPS_FOR_EACH * (faults + 1))
    wrong = chaos.run(0, 0)
    assert not wrong, f"{wrong}\n{chaos.job.output}"
    return chaos


FAULTS = 5  # for each seed in CI


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return train_undisturbed(tmp_path_factory.mktemp("chaos"), FAULTS)


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS * 5)
@pytest.mark.parametrize("seed", [1, 2, 6, 8])  # each kind at least twice
def test_a_training_under_random_faults_ends_as_one_that_nothing_has_disturbed(
    undisturbed: Chaos, tmp_path: Path, seed: int
) -> None:
    wrong, chaos = disturb(tmp_path, undisturbed, seed, FAULTS)
    again = f"python tests/test_chaos.py --faults {FAULTS} --each {FAULTS} --seed {seed}"
    assert not wrong, f"{wrong}\nagain: {again}\n{chaos.injected}\n{chaos.job.output}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Let trainings meet random faults.")
    parser.add_argument("--faults", type=int, default=100, help="altogether")
    parser.add_argument("--each", type=int, default=5, help="faults in one training")
    parser.add_argument("--seed", type=int, default=1, help="of the first training")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="ft_chaos_"))
    undisturbed = train_undisturbed(base, args.each)
    counts, failed, seed = collections.Counter[str](), 0, args.seed
    while counts.total() < args.faults:
        began = time.monotonic()
        wrong, chaos = disturb(base, undisturbed, seed, args.each)
        counts.update(fault.kind for fault in chaos.injected)
        what = "; ".join(wrong) or "ok"
        print(
            f"seed {seed}: {len(chaos.injected)} faults, {time.monotonic() - began:.0f} s: {what}"
        )
        if wrong:
            failed += 1
            print(f"  see {chaos.directory}", *chaos.injected, sep="\n  ", flush=True)
        else:
            shutil.rmtree(chaos.directory)
        seed += 1
    print(f"{counts.total()} faults, {seed - args.seed} trainings, {failed} failed: {dict(counts)}")
    if not failed:
        shutil.rmtree(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
