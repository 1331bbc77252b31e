"""What the three files lean on in torch and Lightning, and neither promises.

When a version moves, a failure here is the sentence that is no longer true. The agent's own
overrides are in test_launcher.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import multiprocessing.popen_fork
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import torch.utils.data._utils.worker
from conftest import ROOT
from torch.distributed.argparse_util import env
from torch.distributed.elastic.agent.server import api as agent_api
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as c10d
from torch.distributed.launcher.api import LaunchConfig


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


ARGUMENTS = {
    "training_script", "training_script_args", "nnodes", "standalone", "rdzv_backend",
    "rdzv_endpoint", "rdzv_id", "master_port", "log_dir", "run_path", "no_python", "module",
    "signals_to_handle",
}  # fmt: skip

TORCH: dict[str, Callable[[], bool]] = {
    "torchrun's parser has the arguments that the launcher reads and changes": lambda: (
        {action.dest for action in torch.distributed.run.get_args_parser()._actions} >= ARGUMENTS
    ),
    "argparse knows options by their strings": lambda: (
        "--help" in argparse.ArgumentParser()._option_string_actions
    ),
    "a DataLoader's workers run _worker_loop, and a fork of them shows it": lambda: (
        torch.utils.data._utils.worker._worker_loop.__name__ == "_worker_loop"
        and {"self", "process_obj"} <= parameters(vars(multiprocessing.popen_fork.Popen)["_launch"])
        and "self._target" in source(multiprocessing.process.BaseProcess)
    ),
    "torch's action `env` takes an option from PET_...": lambda: (
        issubclass(env, argparse.Action) and "PET_" in source(env)
    ),
    "parse_min_max_nnodes gives both": lambda: (
        torch.distributed.run.parse_min_max_nnodes("2:3") == (2, 3)
    ),
    "a launch has the most nodes and an id": lambda: (
        {"max_nodes", "run_id"} <= fields(LaunchConfig)
    ),
    "config_from_args gives configuration, command and arguments": lambda: (
        "tuple[LaunchConfig, Callable | str, list[str]]"
        in source(torch.distributed.run.config_from_args).replace("\n", " ")
    ),
    "what is launched is an entrypoint and its args, and torch reads them at each start": lambda: (
        {"entrypoint", "args", "rdzv_handler", "max_restarts"} <= fields(agent_api.WorkerSpec)
    ),
    "a group of workers has these attributes": lambda: all(
        f"self.{name} =" in source(agent_api.WorkerGroup.__init__)
        for name in ("spec", "workers", "group_rank", "group_world_size", "state")
    ),
    "a worker has its number and the world's size": lambda: (
        {"global_rank", "world_size"} <= parameters(agent_api.Worker.__init__)
    ),
    "an agent's result has a state and return values": lambda: (
        {"state", "return_values"} <= fields(agent_api.RunResult)
    ),
    "torch's loop asks how many nodes wait, of the handler's attribute": lambda: (
        "rdzv_handler.num_nodes_waiting()" in source(agent_api.SimpleElasticAgent._invoke_run)
    ),
    "torch's loop calls monitor, stops and starts by the names that are overridden": lambda: all(
        f"self.{name}(" in source(agent_api.SimpleElasticAgent)
        for name in ("_monitor_workers", "_stop_workers", "_start_workers", "_rendezvous")
    ),
    "started processes are found by their handlers": lambda: (
        "self.subprocess_handlers" in source(SubprocessContext.__init__)
    ),
    "a rendezvous counts its participants": lambda: (
        "self.participants =" in source(c10d._RendezvousState.__init__)
    ),
    "its settings have a number of nodes and a time to close": lambda: (
        "max_nodes" in inspect.get_annotations(c10d.RendezvousSettings)
        and isinstance(c10d.RendezvousTimeout.close, property)
    ),
    "a store that outlives restarts can be switched off": lambda: (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in source(c10d)
    ),
    "a signal that ended torch's loop is told": lambda: (
        "self.sigval =" in source(SignalException.__init__)
    ),
    "ranks that failed, and nodes that were lost, are errors of these kinds": lambda: (
        issubclass(RendezvousClosedError, RendezvousError)
        and issubclass(torch.distributed.DistStoreError, torch.distributed.DistError)
        and issubclass(torch.distributed.DistError, RuntimeError)
        and issubclass(ChildFailedError, Exception)
    ),
    "torch.load can look without reading tensors": lambda: (
        {"map_location", "mmap", "weights_only"} <= parameters(torch.load)
    ),
}


@pytest.mark.parametrize("what", TORCH)
def test_of_torch(what: str) -> None:
    assert TORCH[what](), f"torch {torch.__version__}: no longer true"


# In a process of its own: one process has one of the two packages for ft_callback.
LOOK = """
import inspect, json, sys
from importlib import import_module

name, directory = sys.argv[1:]
pl = import_module(name)
modules = {x: import_module(f"{name}.{x}") for x in ("callbacks", "strategies", "plugins.io", "cli")}
boring = import_module(f"{name}.demos.boring_classes")
callbacks, io = modules["callbacks"], modules["plugins.io"]
import ft_callback

seen = {}

class Look(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        progress = trainer.fit_loop.epoch_loop.batch_progress
        seen.setdefault("batches", []).append(
            (progress.current.ready, progress.total.processed, trainer.is_last_batch)
        )
        seen["val_check_batch"] = trainer.val_check_batch

    def on_validation_start(self, trainer, module):
        seen["num_val_batches"] = sum(trainer.num_val_batches)
        seen["validating"] = trainer.validating
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()

    def on_save_checkpoint(self, trainer, module, checkpoint):
        loop = checkpoint["loops"]["fit_loop"]
        names = ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress", "epoch_progress")
        seen["loops"] = {x: sorted(loop[x]["total"]) == sorted(loop[x]["current"]) for x in names}
        seen["counts"] = sorted(loop["epoch_progress"]["total"])
        seen["processed"] = loop["epoch_loop.batch_progress"]["total"]["processed"]
        seen["optimizer_states"] = "optimizer_states" in checkpoint

    def setup(self, trainer, *args, **kwargs):
        seen["given"] = ft_callback.given_to_fit(trainer)
        seen["ckpt_path"] = trainer.ckpt_path

keeper = callbacks.ModelCheckpoint(directory, save_last=True)
stopping = callbacks.EarlyStopping("x", strict=False)
timer = callbacks.Timer("00:01:00:00")
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=2, logger=False,
    num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Look(), keeper, stopping, timer],
)
trainer.fit(boring.BoringModel(), ckpt_path="last", weights_only=False)
strategy, ours = trainer.strategy, ft_callback.is_lightnings
answers = strategy.reduce(ft_callback.torch.tensor([1, 2]), reduce_op="sum").tolist()
strategy.checkpoint_io = replacement = ft_callback.AtomicCheckpointIO()
source = inspect.getsource
truths = {
    "fit's arguments are found on the stack":
        seen["given"] == {"ckpt_path": "last", "weights_only": False},
    "set-up knows what will be loaded": seen["ckpt_path"] is None,
    "batches are counted: begun in this epoch, and processed of all":
        [x[:2] for x in seen["batches"]] == [(1, 1), (2, 2), (3, 3)],
    "the last batch is known as such": [x[2] for x in seen["batches"]] == [False, False, True],
    "when validation comes is known": seen["val_check_batch"] == 3,
    "how many batches it has, too": seen["num_val_batches"] == 2,
    "a validation within fit is known as such": seen["validating"] is True,
    "a checkpoint has the progress of these loops": list(seen["loops"].values()) == [True] * 3,
    "a progress has these counts": set(seen["counts"]) >= {"ready", "started", "completed"},
    "a checkpoint tells of processed batches": seen["processed"] == 3,
    "a checkpoint has optimizer states": seen["optimizer_states"],
    "keepers and stoppers are found":
        (trainer.checkpoint_callbacks, trainer.early_stopping_callbacks) == ([keeper], [stopping]),
    "a keeper has these settings": all(hasattr(keeper, x) for x in (
        "every_n_epochs", "save_last", "save_top_k", "save_weights_only", "monitor", "dirpath",
        "CHECKPOINT_NAME_LAST", "FILE_EXTENSION")),
    "a keeper names its last one": keeper.last_model_path == f"{directory}/last.ckpt"
        == keeper.format_checkpoint_name({}, keeper.CHECKPOINT_NAME_LAST),
    "an early stop tells why": "stopping_reason_message" in source(callbacks.EarlyStopping),
    "a timer tells what remains": 3000 < timer.time_remaining() <= 3600,
    "what has to go on before a stop is asked for by this name":
        "_can_stop_early" in source(type(trainer.fit_loop)),
    "ranks broadcast and add up": (strategy.broadcast(3), answers) == (3, [1, 2]),
    "a CheckpointIO can be put in": strategy.checkpoint_io is replacement,
    "Lightning's own CheckpointIO has this name": ours(io.TorchCheckpointIO, "TorchCheckpointIO"),
    "the asynchronous one has another inside": ours(io.AsyncCheckpointIO, "AsyncCheckpointIO")
        and hasattr(io.AsyncCheckpointIO(io.TorchCheckpointIO()), "checkpoint_io"),
    "plain strategies save by Strategy's own method": ours(
        modules["strategies"].DDPStrategy.save_checkpoint, "Strategy.save_checkpoint")
        and not ours(modules["strategies"].FSDPStrategy.save_checkpoint, "Strategy.save_checkpoint"),
    "tuners work as fit starts": all(
        ours(getattr(callbacks, x.split(".")[0]).on_fit_start, x) for x in ft_callback.TUNERS),
    "LightningCLI's configuration is saved at set-up": ours(
        modules["cli"].SaveConfigCallback.setup, "SaveConfigCallback.setup")
        and all(f"self.{x} =" in source(modules["cli"].SaveConfigCallback.__init__)
                for x in ("overwrite", "save_to_log_dir", "config_filename")),
}
print(json.dumps([what for what, is_true in truths.items() if not is_true]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_of_lightning(tmp_path: Path, package: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, package, str(tmp_path / "checkpoints")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version = importlib.import_module(package.partition(".")[0]).__version__
    no_longer_true = json.loads(done.stdout.splitlines()[-1])
    assert no_longer_true == [], f"{package} {version}"
