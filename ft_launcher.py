#!/usr/bin/env python3
"""torchrun plus fault tolerance: starts the ranks of this node, each under a monitor, and restarts them when one fails.

    python ft_launcher.py --nproc-per-node=4 --max-restarts=3 --ft-rank-heartbeat-timeout=60 train.py --lr 0.1

Takes every option of torchrun, and those that begin with --ft. What follows the script belongs to the script.

    ft_launcher.py             this program, one for each node
    └─ ft_monitor.py           one for each rank: starts it, hears its heartbeats, ends it when it hangs
       └─ python -u train.py   the rank

torch's own agent does the rendezvous, counts restarts and starts the monitors. `FaultToleranceAgent` adds what it
lacks: survivors of a failed rank are ended at once, what a killed monitor left is swept up, each end is explained.

Environment that it sets for monitors and ranks
    variable                             meaning
    FT_CONFIG                            the settings as JSON
    FT_RUN_DIR                           directory of this launcher's evidence, below --ft-run-dir
    FT_ATTEMPT                           0, 1, 2 ...: how often this launcher has started workers
    PYTHONPATH                           extended by this directory, so that ranks can import ft_callback
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE   1 unless set: ranks that are restarted get a store of their own

Files in FT_RUN_DIR
    attempt_<n>/rank<N>.json   the monitor's report of a rank
    logs/                      torchrun's --log-dir, unless it is given

Exit codes
    0      the workers ended well
    1      they failed, and the restarts are used up
    2      wrong usage; nothing was started
    128+N  ended by signal N
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed.launcher.api
import torch.distributed.run
from torch.distributed.argparse_util import env
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

import ft_monitor
from ft_monitor import ConfigError, FaultToleranceConfig

EXIT_FAILED = 1
STOP_MARGIN_SECONDS = 20.0  # what a monitor may take after its rank's grace: SIGKILL, reaping, report

log = logging.getLogger("ft_launcher")


# --------------------------------------------------------------------------------------------------- reports


def read_reports(directory: Path) -> list[dict[str, Any]]:
    """The monitors' reports of one attempt, in the order of ranks; what cannot be read is missing."""
    reports = []
    for path in directory.glob("rank*.json"):
        try:
            reports.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            log.warning("cannot read the report %s: %s", path, error)
    return sorted(reports, key=lambda report: report["rank"])


def describe_failure(report: dict[str, Any]) -> str | None:
    """What was wrong with a rank, in one sentence; None for one that ended well or was ended for another's sake."""
    step = "" if report["step"] is None else f" at step {report['step']}"
    who = f"rank {report['rank']} (pid {report['pid']})"
    if report["ended"] is None:
        return f"{who}: its monitor (pid {report['monitor_pid']}) was killed"
    if report["verdict"] is not None:
        return f"{who} {report['stopped']}; killed"
    if report["stopped"] is not None or report["status"] == 0:
        return None
    status = report["status"]
    how = f"exit code {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    return f"{who} failed{step}: {report['error']} ({how})" if report["error"] else f"{who} failed{step}: {how}"


# ----------------------------------------------------------------------------------------------------- agent


class FaultToleranceAgent(LocalElasticAgent):
    """torch's agent for the workers of this node, with a monitor between itself and every worker.

    A worker, for torch, is a monitor here: it has the rank's exit code or signal and ends after it.
    """

    def __init__(self, run_dir: Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run_dir = run_dir
        self._attempt = -1
        spec = self._worker_group.spec
        command = rank_command(spec.entrypoint, spec.args)
        # -I -S: quick to start, and nothing of the user's is imported instead of a standard module of the same name.
        monitor = ["-I", "-S", ft_monitor.__file__, f"--parent-pid={os.getpid()}"]
        spec.entrypoint = sys.executable
        spec.args = (*monitor, f"--shutdown-timeout={self._shutdown_timeout}", "--", *command)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        self._attempt_dir.mkdir(parents=True, exist_ok=True)
        os.environ["FT_ATTEMPT"] = str(self._attempt)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._a_worker_failed():
            # torch would ask the survivors to end and wait 30 s for them; they can only wait for a rank that is gone.
            self._end_workers()
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._explain()
        return result

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        """Called before every restart, also when this node's workers are well and another node's failed."""
        self._end_workers()
        super()._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30, **kwargs: Any) -> None:
        """Called at the end alone: stop the workers if they still run, and give them their grace."""
        # From here every wait is bounded, and a second signal would only leave workers behind.
        for number in ft_monitor.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._pcontext is not None and self._worker_group.state == WorkerState.HEALTHY:
            log.warning("passing %s on to the ranks; they have %s s to end", death_sig.name, timeout)
        super()._shutdown(death_sig, timeout + int(STOP_MARGIN_SECONDS), **kwargs)
        self._sweep()

    @property
    def _attempt_dir(self) -> Path:
        return self._run_dir / f"attempt_{self._attempt}"

    def _a_worker_failed(self) -> bool:
        workers = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return any(worker.proc.poll() not in (None, 0) for worker in workers)

    def _end_workers(self) -> None:
        """End all workers at once, and leave nothing of them behind."""
        if self._pcontext is not None:
            self._pcontext.close(ft_monitor.PEER_FAILED, int(STOP_MARGIN_SECONDS))
            self._sweep()

    def _sweep(self) -> None:
        """End what ranks have left behind whose monitor was killed before it could do so."""
        for report in read_reports(self._attempt_dir) if self._attempt >= 0 else []:
            if report["ended"] is None and self._is_ours(report["pid"]):
                ft_monitor.kill_session(report["pid"])

    def _is_ours(self, session: int) -> bool:
        """Whether a session is one of this launcher's ranks: the kernel gives numbers out again."""
        mark = b"FT_RUN_DIR=" + os.fsencode(self._run_dir) + b"\0"
        for pid in ft_monitor.session_members(session):
            try:
                return mark in Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
        return False

    def _explain(self) -> None:
        reasons = [describe_failure(report) for report in read_reports(self._attempt_dir)]
        what_next = f"restarting, {self._remaining_restarts} of {self._worker_group.spec.max_restarts} left"
        log.error(
            "attempt %d: %s; %s",
            self._attempt,
            "; ".join(filter(None, reasons)) or "its workers failed",
            what_next if self._remaining_restarts else "no restarts left",
        )


def rank_command(entrypoint: Any, args: Sequence[Any]) -> list[str]:
    """A rank's command line. --run-path gives a function, which gets an interpreter of its own here."""
    if isinstance(entrypoint, str):
        return [entrypoint, *map(str, args)]
    call = f"import sys; from {entrypoint.__module__} import {entrypoint.__name__} as run; run(*sys.argv[1:])"
    return [sys.executable, "-u", "-c", call, *map(str, args)]


# ------------------------------------------------------------------------------------------------ the command


def get_args_parser() -> argparse.ArgumentParser:
    """torchrun's parser with our options added; each may also come from the environment, as PET_FT_..."""
    parser = torch.distributed.run.get_args_parser()
    parser.prog = "ft_launcher.py"
    parser.usage = "ft_launcher.py [options] SCRIPT [options of the script]  (--help lists all)"
    parser.description = "torchrun plus fault tolerance: restarts ranks that crash or hang."
    parser.allow_abbrev = False  # an option of the script may be the beginning of one of ours
    FaultToleranceConfig.add_arguments(parser, action=env)
    parser.add_argument(
        "--ft-run-dir", "--ft_run_dir", action=env, metavar="DIR", default=default_run_dir(),
        help="directory below which each launcher keeps its evidence (default: %(default)s)",
    )  # fmt: skip
    return parser


def default_run_dir() -> str:
    return os.path.join(tempfile.gettempdir(), f"ft_runs_{os.getuid()}")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, FaultToleranceConfig]:
    """Everything that can be wrong with the command line ends here, in one line and exit code 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    try:
        config = FaultToleranceConfig.from_args(args)
        check_script(args)
        args.ft_run_dir = make_run_dir(Path(args.ft_run_dir))
        if args.log_dir is None:
            args.log_dir = str(args.ft_run_dir / "logs")  # torchrun would leave a temporary directory behind
        torch.distributed.run.config_from_args(args)
    except (ConfigError, ValueError, AssertionError, RuntimeError, OSError) as error:
        parser.error(str(error))
    return args, config


def check_script(args: argparse.Namespace) -> None:
    """Find out before the start what every rank of every attempt would fail with."""
    script = args.training_script
    if args.no_python and not args.run_path:
        if shutil.which(script) is None:
            raise ConfigError(f"command {script!r} not found or not executable: give its path")
    elif not args.module and not os.path.isfile(script):
        raise ConfigError(f"script {script!r} not found in {os.getcwd()}: give its path, or -m for a module")


def make_run_dir(base: Path) -> Path:
    """A directory of this launcher's own; on many nodes `base` may be on a shared file system."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{socket.gethostname()}_{os.getpid()}"
    run_dir = base.absolute() / name
    try:
        run_dir.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {str(run_dir)!r}: {error.strerror}; set --ft-run-dir"
        ) from None
    return run_dir


def prepare_environment(config: FaultToleranceConfig, run_dir: Path) -> None:
    os.environ["FT_CONFIG"] = config.to_json()
    os.environ["FT_RUN_DIR"] = str(run_dir)
    # With a store that outlives a restart, ranks read the addresses of their dead predecessors (pytorch #135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    here = os.path.dirname(os.path.abspath(__file__))
    if here not in sys.path[1:]:  # not installed: only this script, whose directory is first, finds it
        paths = [os.environ.get("PYTHONPATH"), here]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@record
def launch(args: argparse.Namespace) -> None:
    """Run the workers to their end, as torchrun does, but with our agent.

    torch.distributed.run offers no way to name an agent: its class is looked up by this one name.
    """
    agent = functools.partial(FaultToleranceAgent, args.ft_run_dir)
    importlib.import_module("torch.distributed.launcher.api").LocalElasticAgent = agent  # type: ignore[attr-defined]
    torch.distributed.run.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse_arguments(sys.argv[1:] if argv is None else argv)
    ft_monitor.configure_logging("ft_launcher", config.log_level, "ft_launcher")
    prepare_environment(config, args.ft_run_dir)
    off = "" if config.watches_steps else "; hang detection is off: set --ft-rank-heartbeat-timeout"
    log.info("settings: %s; evidence: %s%s", config.describe(), args.ft_run_dir, off)
    try:
        launch(args)
    except ChildFailedError as error:
        log.debug("%s", error)  # the agent has explained it
        return EXIT_FAILED
    except SignalException as error:
        log.warning("ended by %s", error.sigval.name)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
