#!/usr/bin/env python3
"""torchrun plus fault tolerance: a monitor for each rank, and restarts that lead somewhere.

    python ft_launcher.py --nproc-per-node=4 --max-restarts=3 train.py
    python ft_launcher.py --ft-auto train.py       any Lightning script, unchanged, resumes
    python ft_launcher.py --ft-status [RUN_DIR]    how the ranks of a run on this host do
    python ft_launcher.py --ft-report [RUN_DIR]    what became of each attempt

Takes torchrun's options, and those that begin with --ft. On each node, one starts
`ft_monitor.py -- python -u train.py` where torchrun would start `python -u train.py`. torch's own
agent does the rendezvous and counts restarts; FaultToleranceAgent kills survivors of a failed rank
at once, explains each end, and does not restart where
    --ft-max-no-progress-cycles attempts in a row have saved no new checkpoint,
    the same exception came from the same line twice, with no new step in between: a bug,
    a rank asked for ShutdownWorkload, or on this node for ExcludeThisNode.

Files in FT_RUN_DIR, one for each launcher (variables: see ft_monitor.py)
    attempt_<n>/      the monitors' reports and stacks of ranks
    latest            link to the newest attempt
    incidents.jsonl   one line for each attempt that has ended; then all is copied to FLAG.evidence
    health_check/     the report of --ft-node-health-check
    plugin/           for --ft-auto: lets Lightning find ft_callback.follow_every_fit
    logs/             torchrun's --log-dir, unless it is given

Exit codes
    0      the workers ended well, or training was complete, or other nodes go on without this one
    1      they failed, and the restarts are used up, or the nodes lost each other
    2      wrong usage; nothing was started
    93     do not run this again; the reason is in $FAULT_TOL_FINISHED_FLAG_FILE.gave_up
    128+N  ended by signal N
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.append(HERE)  # for python -P

import ft_monitor
from ft_monitor import (
    FLAG_VARIABLE,
    USER_SIGNALS,
    ConfigError,
    End,
    FaultToleranceConfig,
    Incident,
    Outcome,
    Report,
    State,
    WorkloadAction,
)


def end_early(number: int, frame: Any) -> None:
    """Until torch's agent has handlers. PID 1 of a container ignores signals without one."""
    os._exit(128 + number)


if __name__ == "__main__":  # before torch, whose import takes seconds
    if ft_monitor.asks_to_look(sys.argv[1:]):
        sys.exit(ft_monitor.show(sys.argv[1:]))
    if importlib.util.find_spec("torch") is None:
        remedy = "activate its environment"
        print(f"ft_launcher.py: error: {sys.executable} has no torch: {remedy}", file=sys.stderr)
        sys.exit(2)
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.putenv("TORCH_CPP_LOG_LEVEL", "FATAL")  # for this process alone
    ft_monitor.ignore(USER_SIGNALS)
    for early in ft_monitor.STOP_SIGNALS:
        if signal.getsignal(early) != signal.SIG_IGN:  # as under nohup
            signal.signal(early, end_early)

import torch.distributed.run
from torch.distributed.argparse_util import check_env, env
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
)
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as c10d
from torch.distributed.launcher import api as launcher_api

EXIT_FAILED = 1
EXIT_GAVE_UP = 93
DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE
KEPT_RUNS = 20  # the newest, in each place
HEALTH_CHECK_SECONDS = 60.0
HOOK_SECONDS = 10
RENDEZVOUS_TRIES = 3  # for a node that is lost as the nodes meet
SPARE_SECONDS = 3.0  # that a spare leaves a free place to a node that restarts
LISTEN_SECONDS = 1.0  # between looks for what other nodes tell
HEAR_SECONDS = 3.0  # how long a node stays at a job's end, as it may host the store
STOP_MARGIN_SECONDS = 20  # that a monitor may take after its rank's grace: SIGKILL, reaping
# What nodes tell each other: keys in the store of each rendezvous.
OVER = "ft_over"  # the job is, and why; empty where restarts are used up
AGAIN = "ft_again"  # a node has failed, left, or JOINED: all start again
JOINED = "joined"
ENDED = "ft_ended"  # with a node's number: how the attempt ended there
COUNT = "ft_count"  # of the nodes where it has
JUDGES = "ft_judges"  # nodes done waiting; the first judges
VERDICT = "ft_verdict"  # how it ended on all nodes
SPEAKERS = "ft_speakers"  # nodes that know it; the first tells the world
RENAMED = {  # NVIDIA's flags
    "fault-tol-cfg-path": "--ft-cfg-path",
    "term-timeout": "--shutdown-timeout",
    "workers-stop-timeout": "--ft-workers-stop-timeout",
}


# ------------------------------------------------------------------------------ whether to restart


@dataclasses.dataclass
class RestartPolicy:
    """Decides from how attempts ended whether one more makes sense. No I/O."""

    max_no_progress: int  # attempts in a row; 0 is no limit
    no_progress: int = 0  # so far
    saved: int = -1  # step of the newest checkpoint
    step: int = -1  # the highest of any attempt
    last: int = -1  # of the last one
    error: str | None = None  # that ended the last attempt, see bug_of()
    is_new: bool = False  # there is a FLAG, and no rank has connected yet, in any run

    def why_not(self, incident: Incident) -> str | None:
        """Why not to restart after this attempt; None to restart."""
        saved = -1 if incident.saved_step is None else incident.saved_step
        step = -1 if incident.last_step is None else incident.last_step
        has_saved, is_further = saved > self.saved, step > self.step
        has_got_on = is_further or (has_saved and not 0 <= step == self.last)
        # A loop that never reports a checkpoint shows by its steps that it resumes. Of one that
        # tells of neither, nothing is known; --max-restarts counts its attempts.
        is_going = has_saved or (is_further and self.step >= 0 > self.saved)
        is_known = max(step, saved, self.step, self.saved) >= 0
        self.no_progress = self.no_progress + 1 if is_known and not is_going else 0
        self.is_new = self.is_new and not incident.connected  # it failed in an import, say
        error, before = bug_of(incident.why if self.is_new else incident.error), self.error
        self.saved, self.step = max(saved, self.saved), max(step, self.step)
        self.last, self.error = step, error
        shutdown = requested(incident, WorkloadAction.ShutdownWorkload)
        if shutdown:
            return shutdown
        if error is not None and error == before and not has_got_on:
            told = incident.error or incident.why
            return f"a bug in the code, no new step and the same error again: {told}"
        if not incident.requests and 0 < self.max_no_progress <= self.no_progress:
            return f"no progress, {self.no_progress} attempts in a row saved no new checkpoint"
        return None

    def what_is_kept(
        self, incident: Incident, reports: Sequence[Report], knows_saves: bool = True
    ) -> str:
        """Of an attempt that was told to stop."""
        step, saved = incident.last_step or 0, max(incident.saved_step or 0, self.saved, 0)
        if not knows_saves:
            text = f"at step {step}; what is saved, the launcher of rank 0 tells"
        elif saved < step:
            lost = f"steps to {step} are lost"
            text = f"step {saved} is saved, {lost}" if saved else f"nothing new is saved, {lost}"
        else:
            text = f"step {saved} is saved, and the next run resumes there"
        text = text if step or saved else "no step was made"
        for report in reports:
            if report.status == -signal.SIGKILL:
                return f"{text}; had to kill rank {report.rank}: {report.waiting}"
        return text


def prune(directory: Path) -> None:
    """Remove old runs of this host, but not of launchers that live."""
    name = re.compile(rf"\d{{8}}-\d{{6}}_{re.escape(os.uname().nodename)}_\d+")
    runs = sorted(run for run in directory.glob("*_*") if name.fullmatch(run.name))
    for run in runs[:-KEPT_RUNS]:
        if not ft_monitor.is_alive(run):
            shutil.rmtree(run, ignore_errors=True)


def bug_of(error: str | None) -> str | None:
    """An error with its place, whatever addresses and sizes it tells of; None if it may go away."""
    message = ft_monitor.without_place(error)
    if error is None or re.search(ft_monitor.INFRASTRUCTURE_ERROR, message, re.IGNORECASE):
        return None
    return re.sub(r"0x[0-9a-f]+|\d+", "#", message) + error.removeprefix(message)


def requested(incident: Incident, action: WorkloadAction) -> str | None:
    """Why a rank has asked for this; None if none has."""
    reasons = [x["reason"] for x in incident.requests if x["action"] == action.name]
    return f"a rank asked for it: {reasons[0]}" if reasons else None


# ------------------------------------------------------------------------------------------ agent


class NodeLeft(Exception):
    """This node takes no further part; the others may go on without it."""


class GaveUp(Exception):
    """No node is to run this job again; the message says why."""


@dataclasses.dataclass
class Job:
    """What this launcher is to run, and what it has learned."""

    run_dir: Path
    config: FaultToleranceConfig
    log: ft_monitor.Log
    policy: RestartPolicy
    health_check: str | None = None  # a shell command
    hook: str | None = None  # another, for each incident
    flag: str | None = None  # the finished flag, unless there was one at the start
    run_id: str = ""  # the same on all nodes
    auto: dict[str, str] = dataclasses.field(default_factory=dict)  # ranks' variables, --ft-auto
    incidents: list[Incident] = dataclasses.field(default_factory=list)  # also in incidents.jsonl
    state: State = dataclasses.field(default_factory=State)

    def has_flag(self, suffix: str = "") -> bool:
        """Whether FLAG, or a file beside it, is there."""
        exists = functools.partial(os.path.exists, f"{self.flag or ''}{suffix}")
        return ft_monitor.within(ft_monitor.FILE_SECONDS, exists) is True

    def keep_evidence(self) -> None:
        """Copy it to FLAG.evidence: after a job, nobody may reach this host's files."""
        if self.flag:
            copies = Path(f"{self.flag}.evidence")
            ignore = shutil.ignore_patterns("logs", "*.tmp")  # large; half-written
            target = copies / self.run_dir.name
            (target / "latest").unlink(missing_ok=True)  # which would not be replaced
            shutil.copytree(self.run_dir, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            prune(copies)

    def learn(self, reports: Sequence[Report]) -> None:
        """Keep what an attempt has learned, for the next and for later runs."""
        if not (self.auto or any(report.calculate for report in reports)):
            return
        usual = os.path.join(self.auto["FT_AUTO"], "ft_state.json") if self.auto else None
        path = next((report.state_file for report in reports if report.state_file), usual)

        def update() -> tuple[State, State]:
            before = State.read(path) if path else self.state
            after = before.after(reports, self.run_id)
            if path:
                ft_monitor.write_file(path, json.dumps(dataclasses.asdict(after), indent=2))
            return before, after

        result = ft_monitor.within(ft_monitor.FILE_SECONDS, update)
        if not isinstance(result, tuple):
            self.log.warning("cannot keep what was learned in %s: %s", path, result)
            result = self.state, self.state.after(reports, self.run_id)
        before, self.state = result
        os.environ["FT_LEARNED"] = json.dumps(self.state.longest)
        for clock in before.killed.keys() & {report.hung_on for report in reports}:
            old, new = (
                ft_monitor.Clocks(self.config, 0.0, state.longest).limit(clock) for state in result
            )
            if new > old:
                text = "%s ended ranks twice with no new step in between: widened, %g s to %g s"
                self.log.warning(text, clock, old, new)


class JoinOrWait(c10d._RendezvousJoinOp):
    """torch's way into a round of the rendezvous. A node that finds no room waits as a spare, in
    none of torch's lists: from there it would let the others restart again and again."""

    def __init__(self, log: ft_monitor.Log) -> None:
        self._log = log
        self._full = -math.inf  # when there was last no room, monotonic

    def __call__(self, ctx: Any, deadline: float) -> Any:
        state, now = ctx.state, time.monotonic()
        others = {*state.participants, *state.wait_list} - {ctx.node}
        if len(others) >= ctx.settings.max_nodes:
            if self._full < 0:
                self._log.info("waiting as a spare: %d nodes take part", len(others))
            self._full = now
        if self._full > 0 and state.closed:
            raise RendezvousGracefulExitError("the job has ended without this spare")
        if now < self._full + SPARE_SECONDS:
            return c10d._Action.SYNC  # looks again in a second
        joins_until = self._full + ctx.settings.timeout.join.total_seconds()
        return super().__call__(ctx, max(deadline, joins_until))


@dataclasses.dataclass
class Evidence:
    """How an attempt ended on a node."""

    outcome: Outcome
    reports: list[Report]

    @classmethod
    def parse(cls, text: bytes) -> Evidence:
        values = json.loads(text)
        return cls(Outcome(values["outcome"]), [Report(**x) for x in values["reports"]])


class FaultToleranceAgent(LocalElasticAgent):
    """torch's agent for this node's workers, which are monitors: each ends after its rank, with its
    exit code or signal."""

    def __init__(self, job: Job, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._job = job
        self._attempt = -1
        self._started = 0.0  # the newest attempt, wall clock
        self._evidence: Evidence | None = Evidence(Outcome.WELL, [])  # of how it has ended
        self._listened = 0.0  # when this node last looked for what others tell, monotonic
        self._suspect = ""  # host of the previous attempt's
        self._well: RunResult | None = None  # this node's result, if its ranks ended well
        self._wait_until = 0.0  # for other nodes' ranks then, monotonic
        spec = self._worker_group.spec
        command = [*ft_monitor.monitor_command(), "--", str(spec.entrypoint), *spec.args]
        spec.entrypoint, spec.args = command[0], tuple(command[1:])
        os.environ["FT_SHUTDOWN_TIMEOUT"] = str(self._shutdown_timeout)
        # One request a second to the store, which hears all nodes: every fifth is torch's.
        self._looks = itertools.cycle([False] * 4 + [True])
        self._torchs_count = spec.rdzv_handler.num_nodes_waiting
        spec.rdzv_handler.num_nodes_waiting = self._count_waiting  # type: ignore[method-assign]

    def run(self, *args: Any, **kwargs: Any) -> RunResult:
        try:
            result = super().run(*args, **kwargs)
        except RendezvousError:
            self._end_if_over()  # may be why the rendezvous is closed
            raise
        if result is None:  # torch's answer to RendezvousGracefulExitError
            self._close_rendezvous()
            self._job.log.info("the job has ended, and this spare was not needed")
            raise NodeLeft
        return result

    # -- nodes

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._job.health_check:
            problem = check_node(self._job.health_check, self._job.run_dir)
            if problem:
                self._leave(f"the health check of this node failed: {problem}")
        for left in reversed(range(RENDEZVOUS_TRIES)):
            try:
                super()._rendezvous(worker_group)
                break
            except torch.distributed.DistStoreError:
                if not left:
                    raise
                self._job.log.warning("a node was lost as the nodes met: meeting again")

    def _count_waiting(self) -> int:
        """The nodes that torch is to restart workers for: those that wait, or have left."""
        if time.monotonic() < self._listened + LISTEN_SECONDS:
            return 0
        self._listened = time.monotonic()
        if next(self._looks):
            number = self._torchs_count()
            if number and self._told(AGAIN) is None:
                handler: Any = self._worker_group.spec.rdzv_handler
                present = len(handler._state_holder.state.participants)
                is_lost = present < (self._worker_group.group_world_size or 0)  # a spare comes
                self._tell(AGAIN, "" if is_lost else JOINED)
            return number
        if self._told(AGAIN) is None:
            return 0
        self._end_if_over()
        return 1

    def _leave(self, reason: str) -> None:
        """Take this node out of the job, for which torch has no call."""
        handler: Any = self._worker_group.spec.rdzv_handler
        handler.shutdown = lambda: True  # which would close the rendezvous for all
        self._worker_group.state = WorkerState.FAILED
        self._job.log.error("this node leaves the job: %s", reason)
        self._tell(AGAIN)
        has_others = isinstance(handler, c10d.DynamicRendezvousHandler)
        has_others = has_others and handler._settings.max_nodes > 1
        with contextlib.suppress(RendezvousError):  # the others will take it for dead
            if has_others:
                handler._stop_heartbeats()
                deadline = handler._get_deadline(handler._settings.timeout.close)
                handler._op_executor.run(c10d._RendezvousExitOp(), deadline)
        write_beside_flag(self._job, "bad_nodes", "a", reason, ft_monitor.host_name())
        if has_others:
            self._job.log.info("staying until the others end: their store may be here")
            with contextlib.suppress(RendezvousError):  # it was elsewhere, and is gone
                self._stay(handler)
        raise NodeLeft

    def _stay(self, handler: Any) -> None:
        """Until the others have shown no sign of life for long, or have ended and let all hear."""
        alone, patience = 0.0, handler._settings.timeout.join.total_seconds()
        while alone < (HEAR_SECONDS if handler.is_closed() else patience):
            nodes = handler._state_holder.state.last_heartbeats
            alone = 0.0 if nodes else alone + LISTEN_SECONDS
            time.sleep(LISTEN_SECONDS)

    def _shared(self, use: Callable[[Any], Any]) -> Any:
        """What comes of a use of this round's store; None where there is none yet, or its node is
        lost, which torch notices."""
        try:
            return use(self._store)
        except (AttributeError, RuntimeError, RendezvousError):
            return None

    def _tell(self, key: str, text: str = "") -> None:
        self._shared(lambda store: store.set(key, text))

    def _tell_of(self, evidence: Evidence) -> None:
        text = ft_monitor.to_text(dataclasses.asdict(evidence))
        self._tell(f"{ENDED}{self._worker_group.group_rank}", text)

    def _told(self, key: str) -> str | None:
        return self._shared(lambda store: store.get(key).decode() if store.check([key]) else None)

    def _end_if_over(self) -> None:
        """End as another node has, if it has."""
        reason = self._told(OVER)
        if reason is None:
            return
        self._worker_group.state = WorkerState.FAILED
        if reason:
            raise GaveUp(reason)
        raise RendezvousClosedError("another node has used up its restarts")

    def _end_job(self, reason: str = "") -> None:
        """End it on all nodes."""
        self._worker_group.state = WorkerState.FAILED
        self._tell(OVER, reason)
        self._tell(AGAIN)
        self._close_rendezvous()
        if reason:
            raise GaveUp(reason)

    def _close_rendezvous(self) -> None:
        """Let all hear of the end, also spares, while the store is there: it may be here."""
        handler: Any = self._worker_group.spec.rdzv_handler
        if self._worker_group.group_world_size != 1:
            handler.shutdown()
            time.sleep(HEAR_SECONDS)
            handler.shutdown = lambda: True  # the store may be gone

    def _judge(self, store: Any) -> None:
        """Say for all nodes how the attempt ended. The first verdict counts."""
        keys = [f"{ENDED}{number}" for number in range(self._worker_group.group_world_size or 1)]
        incident = self._incident(*map(Evidence.parse, store.multi_get(keys)))
        store.compare_set(VERDICT, "", ft_monitor.to_text(dataclasses.asdict(incident)))

    def _verdict(self, own: Evidence) -> Incident:
        """How the attempt ended on all nodes; or on this one, where their store is lost."""
        handler: Any = self._worker_group.spec.rdzv_handler
        deadline = time.monotonic() + self._job.config.workers_stop_timeout + STOP_MARGIN_SECONDS

        def wait(store: Any) -> Any:
            while not store.check([VERDICT]):
                handler.is_closed()  # brings its state up to date
                present = len(handler._state_holder.state.participants)
                if store.add(COUNT, 0) >= present or time.monotonic() > deadline:
                    if store.add(JUDGES, 1) == 1:
                        self._judge(store)
                    break
                time.sleep(0.2)
            return json.loads(store.get(VERDICT))

        values = self._shared(wait)
        if values is None:
            return self._incident(own)
        return Incident(**{**values, "attempt": self._attempt, "start": self._started})

    # -- attempts

    @property
    def _directory(self) -> Path:
        return self._job.run_dir / f"attempt_{self._attempt}"

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._attempt += 1
        self._started, self._evidence = time.time(), None
        self._well = None
        os.environ["FT_ATTEMPT"] = str(self._attempt)
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._job.auto:
            write_plugin(self._job.run_dir)
        link = self._job.run_dir / "latest.new"
        link.symlink_to(self._directory.name)
        link.replace(self._job.run_dir / "latest")
        if worker_group.spec.rdzv_handler.get_backend() == "static":  # one store for all rounds
            store: Any = self._store
            prefix = str(self._remaining_restarts)
            self._store = torch.distributed.PrefixStore(prefix, store)  # type: ignore[assignment]
        lost = [
            Report(worker.global_rank, host=ft_monitor.host_name(), end=End.LOST)
            for worker in worker_group.workers
        ]
        self._tell_of(Evidence(Outcome.FAILED, lost))  # until it is told better
        ft_monitor.ignore(USER_SIGNALS)  # and so do the monitors, until they have handlers
        ids = super()._start_workers(worker_group)
        for number in USER_SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:  # not one of --signals-to-handle
                signal.signal(number, self._signal)
        pcontext: Any = self._pcontext
        pcontext.close = functools.partial(self._close, pcontext.close)
        return ids

    def _signal(self, number: int, frame: Any = None) -> None:
        """Signal the monitors."""
        context: Any = self._pcontext
        for handler in context.subprocess_handlers.values():
            handler.proc.send_signal(number)  # unless it has ended

    def _close(self, close: Any, number: signal.Signals | None = None, timeout: int = 30) -> None:
        """End the ranks. torch names no signal when one has failed: the others, which can only wait
        for it, are killed then, where torch would give them 30 s."""
        if number is None:
            number = ft_monitor.PEER_FAILED
            timeout = int(self._job.config.workers_stop_timeout) + STOP_MARGIN_SECONDS
        self._signal(signal.SIGCONT)  # a monitor that is stopped hears nothing else
        close(number, timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = self._well or super()._monitor_workers(worker_group)
        job = self._job
        if result.state == WorkerState.SUCCEEDED:
            return self._end_with_all(result)
        if result.state == WorkerState.HEALTHY:
            return result
        if self._told(AGAIN) == JOINED:  # another node's ranks were ended for that
            return RunResult(WorkerState.HEALTHY)
        if job.has_flag():
            job.log.warning("ranks failed, but training is complete: %s exists", job.flag)
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(WorkerState.SUCCEEDED, dict.fromkeys(ranks))
        self._decide(Outcome.FAILED)
        return result

    def _end_with_all(self, result: RunResult) -> RunResult:
        """Report ranks that ended well as healthy until those of all nodes have: else torch would
        only wait for them, deaf to those that failed and want a restart."""
        if self._well is None:
            incident = self._incident(self._gather(Outcome.WELL))
            reason = requested(incident, WorkloadAction.ShutdownWorkload)
            if reason and not self._job.has_flag():
                self._end_job(reason)
            self._well, self._wait_until = result, time.monotonic() + self._exit_barrier_timeout
        elif time.monotonic() < self._listened + LISTEN_SECONDS:
            return RunResult(WorkerState.HEALTHY)
        if self._told(VERDICT) is not None and self._told(AGAIN) is None:
            self._exit_barrier_timeout = HEAR_SECONDS  # torch's, which stopped nodes never reach
        elif not (self._job.has_flag() or time.monotonic() > self._wait_until):
            return RunResult(WorkerState.HEALTHY)
        self._close_rendezvous()
        return result

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> None:
        """Called before a restart, also for another node's sake."""
        if self._told(AGAIN) == JOINED:  # no rank has failed: all can save
            super()._shutdown(timeout=self._shutdown_timeout + STOP_MARGIN_SECONDS)
        else:
            super()._shutdown(None)  # type: ignore[arg-type]  # at once: see _close()
        self._decide(Outcome.ELSEWHERE)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30, **kwargs: Any
    ) -> None:
        """Called at the end alone: stop workers that still run."""
        # From here every wait is bounded, and more signals would only leave workers behind.
        ft_monitor.ignore(ft_monitor.STOP_SIGNALS + USER_SIGNALS)
        log, state = self._job.log, self._worker_group.state
        if state == WorkerState.HEALTHY and self._well is None:
            signal.signal(signal.SIGINT, self._signal)  # Ctrl-C again: monitors kill at once
            log.warning("%s: the ranks have %s s to save and end", death_sig.name, timeout)
            began = time.monotonic()
            super()._shutdown(death_sig, timeout + STOP_MARGIN_SECONDS)
            evidence = self._gather(Outcome.STOPPED)
            incident = self._incident(evidence)
            self._note(incident)
            is_first = self._worker_group.group_rank == 0
            text = self._job.policy.what_is_kept(incident, evidence.reports, is_first)
            log.warning("stopped within %.1f s: %s", time.monotonic() - began, text)
        else:
            super()._shutdown(None)  # type: ignore[arg-type]
            outcome = Outcome.ELSEWHERE if state == WorkerState.FAILED else Outcome.WELL
            self._note(self._incident(self._gather(outcome)))
        if len(self._job.incidents) > 1:  # of one, its verdict tells all
            log.info(ft_monitor.render_report(self._job.incidents))

    def _gather(self, outcome: Outcome) -> Evidence:
        """How the attempt ended on this node, which the others are told, once."""
        if self._evidence is not None:
            return self._evidence

        def read() -> list[Report]:
            reports = ft_monitor.read_reports(self._directory)
            for report in reports:
                report.place, report.waits = ft_monitor.read_place(self._directory, report)
            return reports

        found = ft_monitor.within(ft_monitor.FILE_SECONDS, read)
        reports = found if isinstance(found, list) else []
        group = self._worker_group
        if sum(bool(report.pid and report.ended) for report in reports) < len(group.workers):
            # A monitor was killed: what its rank has left descends from us now, a subreaper. The
            # mark spares what a wrapper has started before.
            mark = b"FT_RUN_DIR=" + os.fsencode(self._job.run_dir)
            kill = functools.partial(ft_monitor.kill_descendants, mark)
            ft_monitor.within(STOP_MARGIN_SECONDS, kill)
        if outcome == Outcome.ELSEWHERE and any(
            report.request or (report.end != End.STOPPED and ft_monitor.raised_by_itself(report))
            for report in reports
        ):
            outcome = Outcome.FAILED  # a rank here failed first, and took its time to end
        self._evidence = Evidence(outcome, reports)
        self._tell_of(self._evidence)
        if self._shared(lambda store: store.add(COUNT, 1)) == group.group_world_size:
            self._shared(self._judge)
        self._job.learn(reports)
        return self._evidence

    def _incident(self, *parts: Evidence) -> Incident:
        outcomes = [part.outcome for part in parts]
        return ft_monitor.make_incident(
            self._attempt,
            self._started,
            Outcome.FAILED if Outcome.FAILED in outcomes else outcomes[0],
            [report for part in parts for report in part.reports],
            self._worker_group.workers[0].world_size,
        )

    def _note(self, incident: Incident) -> None:
        if len(self._job.incidents) > self._attempt:
            return
        self._job.incidents.append(incident)

        def note() -> None:
            with open(self._job.run_dir / "incidents.jsonl", "a", encoding="utf-8") as file:
                file.write(ft_monitor.to_text(dataclasses.asdict(incident)))

        within = functools.partial(ft_monitor.within, ft_monitor.FILE_SECONDS)
        problem = within(note) or within(self._job.keep_evidence)
        if problem is not None:
            self._job.log.warning("cannot write down how the attempt ended: %s", problem)

    def _spread(self, incident: Incident, text: str, is_over: bool) -> None:
        """Tell the world, as one node for all."""
        job, before, self._suspect = self._job, self._suspect, incident.host
        if self._shared(lambda store: store.add(SPEAKERS, 1)) not in (1, None):
            return
        has_others = self._worker_group.group_world_size != 1
        if before == incident.host != "" and has_others and not is_over:
            write_beside_flag(job, "bad_nodes", "a", f"twice in a row: {incident.why}", before)
        if job.hook:
            call_hook(job.hook, {**dataclasses.asdict(incident), "text": text})

    def _decide(self, outcome: Outcome) -> None:
        """Explain how an attempt ended, and end the job if a restart would lead nowhere."""
        if len(self._job.incidents) > self._attempt:
            return
        if outcome == Outcome.FAILED:
            self._tell(AGAIN)
        evidence = self._gather(outcome)
        incident = self._verdict(evidence)
        self._note(incident)
        is_failure = incident.outcome == Outcome.FAILED
        reason = self._job.policy.why_not(incident) if is_failure else None
        leave = requested(self._incident(evidence), WorkloadAction.ExcludeThisNode)
        left, most = self._remaining_restarts, self._worker_group.spec.max_restarts
        is_over = is_failure and not left
        what_next = "no restarts left" if is_over else f"restarting, {left} of {most} left"
        if reason or leave:
            what_next = f"not restarting: {reason}" if reason else "this node leaves the job"
        text = ft_monitor.explain(incident, str(self._directory), what_next)
        self._job.log.error(text)
        if is_failure:
            self._spread(incident, text, is_over=bool(reason))
        if leave and not reason:
            self._leave(leave)
        if reason or is_over:
            self._end_job(reason or "")
        if is_failure and outcome == Outcome.ELSEWHERE:
            self._remaining_restarts -= 1  # as torch does where a node's own ranks failed


def call_hook(command: str, values: dict[str, Any]) -> None:
    """Nobody waits for it, and it may outlive this launcher: it lacks the mark of ranks."""
    environment = dict(os.environ)
    environment.pop("FT_RUN_DIR", None)
    bounded = ["timeout", "-k1", str(HOOK_SECONDS), "/bin/sh", "-c", command]
    with tempfile.TemporaryFile() as text:
        text.write(ft_monitor.to_text(values).encode())
        text.seek(0)
        subprocess.Popen(bounded, stdin=text, env=environment, start_new_session=True)


def check_node(command: str, run_dir: Path) -> str | None:
    """Check this node; return what is wrong, in one line, or None.

    Its monitor kills all that it leaves. A pipe for its output would be waited for: a file is not.
    """
    settings = {"FT_CONFIG": "", "FT_LEARNED": "", "FT_SHUTDOWN_TIMEOUT": "0"}
    environment = {**os.environ, **settings, "FT_RUN_DIR": str(run_dir / "health_check")}
    monitor = [*ft_monitor.monitor_command(), "--", "/bin/sh", "-c", command]
    with tempfile.TemporaryFile() as output:
        check = subprocess.Popen(
            monitor, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            status = check.wait(HEALTH_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{command!r} did not end within {HEALTH_CHECK_SECONDS:g} s"
        finally:
            check.terminate()
            ft_monitor.within(STOP_MARGIN_SECONDS, check.wait)
        output.seek(0)
        text = " ".join(output.read(10_000).decode(errors="replace").split())[:300]
    return f"{command!r} ended with {status}: {text or 'no output'}" if status else None


# ------------------------------------------------------------------------------------- the command


def get_args_parser() -> argparse.ArgumentParser:
    """torchrun's parser and our options; each may also come from the environment, as PET_FT_..."""
    parser = torch.distributed.run.get_args_parser()
    parser.prog = "ft_launcher.py"
    parser.usage = "ft_launcher.py [options] SCRIPT [options of the script]  (--help lists all)"
    parser.description = "Besides: --ft-status [RUN_DIR] and --ft-report [RUN_DIR] show a run."
    parser.allow_abbrev = False  # an option of the script may be the beginning of one of ours
    group = FaultToleranceConfig.add_arguments(parser, action=env)
    add = functools.partial(group.add_argument, action=env)
    about = "do not restart after N attempts in a row without a new checkpoint; 0: no limit (3)"
    add("--ft-max-no-progress-cycles", type=int, metavar="N", default=3, help=about)
    about = "run before each start of workers; unless it ends with 0 within 60 s, this node leaves"
    add("--ft-node-health-check", metavar="COMMAND", help=about)
    about = "let any Lightning script resume, unchanged, from checkpoints that we keep"
    group.add_argument("--ft-auto", action=check_env, help=about)
    about = "where we keep them (ft_checkpoints, beside the finished flag)"
    add("--ft-auto-dir", metavar="DIR", help=about)
    about = "from one of them to the next (%(default)s)"
    add("--ft-auto-save-minutes", type=float, metavar="N", default=10.0, help=about)
    about = "run, for 10 s at most, after each failed attempt, which it is given as JSON on stdin"
    add("--ft-on-incident", metavar="COMMAND", help=about)
    about = "below it, each launcher keeps its evidence (default: %(default)s)"
    add("--ft-run-dir", metavar="DIR", default=ft_monitor.default_run_dir(), help=about)
    if torch.__version__ < "2.13.dev0":
        parser.error(f"torch {torch.__version__} is too old: give this Python 2.13 or newer")
    options = parser._option_string_actions  # add_argument would let --help show all spellings
    for option in [option for option in options if option.startswith("--ft-")]:
        for prefix in ("--ft-", "--ft_", "--ft-param-", "--ft_param_"):
            options[prefix + option[5:].replace("-", "_")] = options[option]
    for theirs, option in RENAMED.items():
        for spelling in (theirs, theirs.replace("-", "_")):
            options[f"--{spelling}"] = options[option]
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[Job, Any]:
    """The job; torch's configuration, entry point and arguments. Ends with 2 for wrong usage."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{os.uname().nodename}_{os.getpid()}"
    run_dir = Path(args.ft_run_dir).absolute() / name
    given = os.environ.get(FLAG_VARIABLE)
    flag = os.path.abspath(given) if given else None
    log = ft_monitor.Log("ft_launcher")
    try:
        config = FaultToleranceConfig.from_args(args)
        check_script(args)
        adapt(args, run_dir)
        run_dir.mkdir(parents=True, mode=0o700)
        prune(run_dir.parent)
        launch = torch.distributed.run.config_from_args(args)
        check_tasks()
        auto = auto_variables(args, flag)
        flag = auto.get(FLAG_VARIABLE, flag)
        if flag:
            lock_flag(flag, launch[0].run_id)
        if auto:
            begin_auto(auto, log)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:  # a ConfigError too
        shutil.rmtree(run_dir, ignore_errors=True)
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) in DISK_ERRORS:  # another node may do better
            log.error("cannot start: %s", text)
            sys.exit(EXIT_FAILED)
        parser.error(text)
    is_new = flag is not None and not os.path.exists(f"{flag}.progress")
    policy = RestartPolicy(args.ft_max_no_progress_cycles, is_new=is_new)
    flag = None if flag is None or os.path.exists(flag) else flag
    commands = args.ft_node_health_check, args.ft_on_incident
    return Job(run_dir, config, log, policy, *commands, flag, launch[0].run_id, auto), launch


def check_script(args: argparse.Namespace) -> None:
    """Find out before the start what every rank of every attempt would fail with."""
    script, what = args.training_script, "script"
    found: object = os.path.isfile(script) or os.path.isfile(os.path.join(script, "__main__.py"))
    if args.no_python and not args.run_path:
        what, found = "command", shutil.which(script)
    elif args.module:
        sys.path.append(os.getcwd())  # where ranks look too
        what, found = "module", importlib.util.find_spec(script.partition(".")[0])
    if not found:
        raise ConfigError(f"{what} {script!r} not found in {os.getcwd()}: is it spelt right?")


def adapt(args: argparse.Namespace, run_dir: Path) -> None:
    """Change torchrun's options where they would be in our way."""
    _, nodes = torch.distributed.run.parse_min_max_nnodes(args.nnodes)
    # The static rendezvous keeps its store, where new ranks read the addresses of dead ones.
    if args.standalone or (args.rdzv_backend == "static" and nodes == 1):
        args.rdzv_backend, args.rdzv_endpoint = "c10d", f"localhost:{args.master_port or 0}"
        args.rdzv_id = str(uuid.uuid4())
    args.master_port = args.master_port or 29500  # as torchrun
    args.log_dir = args.log_dir or str(run_dir / "logs")  # not a temporary one, left behind
    if args.run_path:  # a process of Python's all the same
        args.run_path = args.no_python = False
    ignored = [x.name for x in ft_monitor.STOP_SIGNALS if signal.getsignal(x) == signal.SIG_IGN]
    names = args.signals_to_handle.split(",")  # nohup means to outlive a hang-up
    args.signals_to_handle = ",".join(name for name in names if name.strip() not in ignored)


def check_tasks() -> None:
    """Each of several tasks on one node would start all ranks, as a training of its own."""
    local = os.environ.get("SLURM_LOCALID") or "0"
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not tasks and "SLURM_SUBMIT_DIR" not in os.environ:  # a batch script, whose tasks come later
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", tasks or "")
    if local != "0" or {*counts} - {"1"}:
        raise ConfigError(
            "srun starts several launchers on this node: give it --ntasks-per-node=1 (or, for a "
            "training each, unset SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE, SLURM_NTASKS_PER_NODE)"
        )


def auto_variables(args: argparse.Namespace, flag: str | None) -> dict[str, str]:
    """What --ft-auto adds to the ranks' environment. Each training has a directory of its own, and
    another script, or other arguments, never resume its checkpoints."""
    if not args.ft_auto:
        return {}
    minutes = args.ft_auto_save_minutes
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--ft-auto-save-minutes: got {minutes:g}, expected more than 0")
    script = os.path.abspath(args.training_script)
    key = json.dumps([script, *args.training_script_args, flag])
    name = f"{Path(script).stem}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    base = args.ft_auto_dir or os.path.join(os.path.dirname(flag or ""), "ft_checkpoints")
    directory = os.path.abspath(os.path.join(base, name))
    variables = {"FT_AUTO": directory, "FT_AUTO_SAVE_MINUTES": str(minutes)}
    return {**variables, FLAG_VARIABLE: flag or os.path.join(directory, "finished")}


def begin_auto(auto: dict[str, str], log: ft_monitor.Log) -> None:
    """Let a training that follows a complete one start anew."""
    directory, flag = Path(auto["FT_AUTO"]), Path(auto[FLAG_VARIABLE])
    directory.mkdir(parents=True, exist_ok=True)
    is_over = flag.parent == directory and flag.exists()  # nobody but us would remove that
    if is_over:
        for path in directory.iterdir():
            if path.is_file() and (path.name.startswith(flag.name) or path.suffix == ".ckpt"):
                path.unlink()
        log.info("the training before was complete: starting a new one in %s", directory)
    elif any(directory.glob("*.ckpt")):
        log.info("resuming the training in %s (to start anew, remove that)", directory)


def write_plugin(run_dir: Path) -> None:
    """As pip would install it; again for each attempt, as a cleaner may have removed it."""
    plugin = run_dir / "plugin" / "ft_auto-0.dist-info"
    about = "Metadata-Version: 2.1\nName: ft-auto\nVersion: 0\n"
    names = "lightning.pytorch", "pytorch_lightning"
    entry = "[{}.callbacks_factory]\nft_auto = ft_callback:follow_every_fit\n"
    ft_monitor.write_file(plugin / "METADATA", about)
    ft_monitor.write_file(plugin / "entry_points.txt", "".join(map(entry.format, names)))


def lock_flag(flag: str, rendezvous: str) -> None:
    """Let no other training on this host have this finished flag while this process lives.
    Launchers of one rendezvous share it."""
    name = hashlib.sha256(os.fsencode(flag)).hexdigest()[:16]
    directory = Path(ft_monitor.default_run_dir())
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(BlockingIOError):  # another has it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.write(lock, f"{os.getpid()} {rendezvous}".encode())
        fcntl.flock(lock, fcntl.LOCK_SH)  # the other has written, then
        pid, _, holder = os.pread(lock, 1000, 0).decode().partition(" ")
    except OSError:
        return  # no place for locks: they are only a precaution
    if holder != rendezvous:
        raise ConfigError(
            f"another training, whose launcher is pid {pid}, has the same finished flag {flag}: "
            f"wait for its end, or set another {FLAG_VARIABLE}"
        )


def quieten_torch() -> None:
    """Of signals sent and workers failed, and of OMP_NUM_THREADS, our own lines tell enough."""
    if "LOGLEVEL" not in os.environ:  # torch's own setting
        for name in ("run", "elastic", "elastic.agent.server.api"):
            logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)


def prepare_environment(job: Job) -> None:
    os.environ["FT_CONFIG"] = job.config.to_json()
    os.environ["FT_RUN_DIR"] = str(job.run_dir)
    os.environ["FT_LAUNCHER_PID"] = str(os.getpid())
    # With a store that outlives a restart, ranks read the addresses of dead ones (pytorch #135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if os.environ.get(FLAG_VARIABLE):  # for ranks that change their directory
        os.environ[FLAG_VARIABLE] = os.path.abspath(os.environ[FLAG_VARIABLE])
    paths = [os.environ.get("PYTHONPATH")]
    if os.path.basename(HERE) not in ("site-packages", "dist-packages"):
        paths.append(HERE)
    if job.auto:  # whose limits are learned: process starts are watched from the first on
        os.environ.update(job.auto, FT_LEARNED="{}")
        paths.append(str(job.run_dir / "plugin"))
    if any(paths):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@record
def launch_workers(job: Job, config: Any, entrypoint: Any, args: Sequence[Any]) -> None:
    """Run the workers to their end, as torchrun does, but with our agent."""
    # torch offers no way to name these classes: it looks each up by this one name.
    join = functools.partial(JoinOrWait, job.log)
    c10d._RendezvousJoinOp = join  # type: ignore[misc, assignment]
    agent = functools.partial(FaultToleranceAgent, job)
    launcher_api.LocalElasticAgent = agent  # type: ignore[misc, assignment]
    launcher_api.elastic_launch(config, entrypoint)(*args)


def write_beside_flag(job: Job, suffix: str, mode: str, reason: str, host: str) -> None:
    """For autoresume.sh."""
    flag, moment = os.environ.get(FLAG_VARIABLE), time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def write() -> None:
        with open(f"{flag}.{suffix}", mode, encoding="utf-8") as file:
            file.write(ft_monitor.to_text({"reason": reason, "time": moment, "host": host}))
            file.flush()
            os.fsync(file.fileno())

    if flag and (error := ft_monitor.within(ft_monitor.FLAG_SECONDS, write)):
        job.log.error("cannot write %s.%s: %s", flag, suffix, error)


def check_end(job: Job) -> None:
    """Of workers that ended well. Raises GaveUp where the next run would not complete training."""
    if job.flag is None or job.has_flag():
        return
    has_connected = any(incident.connected for incident in job.incidents)
    if not (has_connected or job.has_flag(".stop")):  # which a script may have heeded by itself
        callback = "is FaultToleranceCallback among the Trainer's callbacks?"
        raise GaveUp(f"no rank told of training: {callback}")
    job.log.warning("the workers ended well, but training is not complete: no %s", job.flag)


def run(job: Job, launch: Any) -> int:
    """Launch, and return the exit code."""
    log = job.log
    try:
        launch_workers(job, *launch)
        check_end(job)
        return 0
    except ChildFailedError:  # which the agent has explained
        return EXIT_FAILED
    except GaveUp as error:  # srun and schedulers lose exit codes
        log.error("gave up: %s", error)
        write_beside_flag(job, "gave_up", "w", str(error), ft_monitor.host_name())
        return EXIT_GAVE_UP
    except SignalException as error:
        log.warning("ended by %s", error.sigval.name)
        return 128 + error.sigval
    except NodeLeft:
        return EXIT_FAILED if launch[0].max_nodes == 1 else 0
    except (RendezvousError, torch.distributed.DistError) as error:
        text = "the nodes of this job lost each other, or one gave up"
        if not (job.run_dir / "latest").is_symlink():
            text = f"the nodes did not meet at {launch[0].rdzv_endpoint}: is it right on all nodes"
            text += f", and do {launch[0].min_nodes} of them start"
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()  # and then C++ frames
        log.error("%s: %s", text, reason)
        return EXIT_FAILED


def main(argv: Sequence[str]) -> int:
    quieten_torch()
    job, launch = parse_arguments(argv)
    ft_monitor.process_control(ft_monitor.PR_SET_CHILD_SUBREAPER, 1)  # see _gather()
    prepare_environment(job)
    copied = f", copied to {job.flag}.evidence" if job.flag else ""
    job.log.info("settings: %s; evidence: %s%s", job.config.to_json(), job.run_dir, copied)
    if not (job.auto or job.config.is_watching()):
        job.log.info("no timeout is set: hang detection begins once ranks learn limits")
    if launch[0].rdzv_backend == "static" and launch[0].max_restarts:
        text = "restarts rarely come back with the static rendezvous: give --rdzv-backend=c10d"
        job.log.warning(text)
    return run(job, launch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
