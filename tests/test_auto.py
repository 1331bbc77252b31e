"""--ft-auto: scripts that know nothing of us resume. Parts of it in this process, as a rank."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from conftest import LOADER, ROOT, Heard, Started
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner

import ft_callback
import ft_launcher
from ft_callback import FaultToleranceCallback
from ft_monitor import FLAG_VARIABLE

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("rank_environment")]
FIT = {
    package: package.Trainer.fit
    for package in (sys.modules["lightning.pytorch"], pytorch_lightning)
}

Run = Callable[[], Path]


@pytest.fixture
def new_run(flag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Makes of this process a rank that has just been started, and is due to save at each look."""
    directory = tmp_path / "auto"
    directory.mkdir()

    def begin() -> Path:
        for package, fit in FIT.items():
            monkeypatch.setattr(package.Trainer, "fit", fit)
        monkeypatch.setattr(FaultToleranceCallback, "has_trained", False)
        monkeypatch.setattr(FaultToleranceCallback, "steps", 0)
        monkeypatch.setattr(ft_callback, "STOP_CHECK_SECONDS", 0.0)
        monkeypatch.setenv("FT_AUTO", str(directory))
        monkeypatch.setenv("FT_AUTO_SAVE_MINUTES", "1e-9")
        assert ft_callback.follow_every_fit() == []
        assert "FT_AUTO" not in os.environ, "processes of this one would resume from its files"
        return directory

    return begin


class Model(BoringModel):
    """Fails in its `fails`-th batch; notes which batches it has seen."""

    def __init__(self, fails: int = -1) -> None:
        super().__init__()
        self.fails, self.lr, self.seen = fails, 0.1, list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        if len(self.seen) == self.fails:
            raise KeyError("a fault")
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("score", 1.0)


def make_trainer(directory: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "limit_train_batches": 4, "limit_val_batches": 0,
        "default_root_dir": directory, "max_epochs": 2,
        "enable_checkpointing": any(isinstance(x, ModelCheckpoint) for x in callbacks),
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def ours(trainer: Any) -> list[Any]:
    return [x for x in trainer.callbacks if isinstance(x, FaultToleranceCallback)]


# ---------------------------------------------------------------------------------- resuming


def test_each_fit_of_a_script_resumes_or_is_done(
    new_run: Run, monitor: Heard, tmp_path: Path
) -> None:
    """The first one had stopped early, which Lightning would forget. With a fold's Trainer each,
    and hyper-parameters that torch only loads from a file that it is told to trust."""

    def script(*fails: int) -> list[Model]:
        models = [Model(fail) for fail in fails]
        for model, stopping in zip(models, ([EarlyStopping("score", patience=1)], []), strict=True):
            model.save_hyperparameters({"path": Callback()})
            trainer = make_trainer(tmp_path, *stopping, max_epochs=5)
            trainer.fit(model)
            (callback,) = ours(trainer)
            assert callback.calculate_timeouts and callback.exp_dir == directory
        return models

    directory = new_run()
    with pytest.raises(KeyError, match="a fault"):
        script(-1, 7)
    names = {"fit_Model_0.ckpt", "fit_Model_1.ckpt"}
    assert {path.name for path in directory.iterdir()} == names
    weights = torch.load(directory / "fit_Model_0.ckpt", weights_only=False)["state_dict"]
    monitor()

    new_run()
    first, second = script(-1, -1)
    assert first.seen == [] and torch.equal(first.layer.weight, weights["layer.weight"])
    assert second.seen[0] in (1, 2) and len(second.seen) == 20 - 4 - second.seen[0]
    completes = [message for message in monitor() if message["type"] == "complete"]
    reasons = [message["values"]["reason"] for message in completes]
    assert reasons[0].startswith("stopped early: ") and reasons[1] == "max_epochs=5 reached"


def test_a_stop_saves_there_and_the_next_run_resumes_at_that_step(
    new_run: Run, monitor: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by the script's own callback, and with a ModelCheckpoint, whose ways are its own."""
    keeper = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    own = FaultToleranceCallback(autoresume=False)
    directory = new_run()
    Path(f"{os.environ[FLAG_VARIABLE]}.stop").touch()
    trainer: Any = make_trainer(tmp_path, own, keeper)
    with pytest.raises(SystemExit):
        trainer.fit(Model())
    assert ours(trainer) == [own] and own.autoresume, "or no run would ever start anew"
    path = directory / "fit_Model_0.ckpt"
    assert f"saved {path}, where the next run resumes" in caplog.text
    assert (
        f"if a rank fails now, training resumes from {path}, saved every 1e-09 min" in caplog.text
    )
    saved = [message for message in monitor() if message["type"] == "saved"]
    assert [(m["step"], m["checkpoint"]) for m in saved] == [(1, str(path))]
    new_run()
    model = Model()
    resumed: Any = make_trainer(tmp_path, keeper)
    resumed.fit(model, None)
    assert model.seen == [1, 2, 3, 0, 1, 2, 3]
    assert resumed.callbacks[-1] is keeper, "Lightning saves with the state of all others"
    saved = [message for message in monitor() if message["type"] == "saved"]
    assert {m["checkpoint"] for m in saved} == {str(path)}, "no restart would resume elsewhere"


@pytest.mark.parametrize(("attempt", "may_overwrite"), [("0", False), ("1", True)])
def test_a_later_attempt_may_overwrite_the_configuration_of_one_that_saved_nothing(
    new_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: str,
    may_overwrite: bool,
) -> None:
    monkeypatch.setenv("FT_ATTEMPT", attempt)
    new_run()
    parser: Any = types.SimpleNamespace(save=lambda *args, **kwargs: None)
    config: Any = {}
    callback = SaveConfigCallback(parser, config)
    make_trainer(tmp_path, callback).fit(Model(), ckpt_path=None)
    assert callback.overwrite == may_overwrite


def test_a_fit_that_has_resumed_does_not_save_at_once(
    new_run: Run, monitor: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at one step would look like progress, one step in each attempt."""
    saved = []
    for _ in range(2):
        new_run()
        monkeypatch.setenv("FT_AUTO_SAVE_MINUTES", "60")
        with pytest.raises(KeyError, match="a fault"):
            make_trainer(tmp_path).fit(Model(6))
        saved.append([message["step"] for message in monitor() if message["type"] == "saved"])
    assert saved == [[1], []]


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 1, "max_epochs": 6},
        {
            "limit_train_batches": 6,
            "max_epochs": 1,
            "val_check_interval": 1,
            "limit_val_batches": 2,
        },
        {"limit_train_batches": 6, "max_epochs": 1, "accumulate_grad_batches": 2},
    ],
    ids=["epochs of one batch", "a validation after each batch", "accumulated gradients"],
)
def test_there_is_a_moment_to_save_in_every_training(
    new_run: Run, tmp_path: Path, options: dict[str, Any]
) -> None:
    new_run()
    with pytest.raises(KeyError):
        make_trainer(tmp_path, **options).fit(Model(fails=5))
    new_run()
    model = Model()
    trainer = make_trainer(tmp_path, **options)
    trainer.fit(model)
    assert 1 < len(model.seen) < 6 and trainer.current_epoch == options["max_epochs"]
    steps = 6 // options.get("accumulate_grad_batches", 1)
    assert trainer.global_step == steps


def test_a_rank_that_does_not_write_leaves_the_section_of_the_save_with_it(
    new_run: Run, tmp_path: Path
) -> None:
    """Hooks of the script may follow, and hang."""

    class Second(SingleDeviceStrategy):
        is_global_zero = property(lambda self: False)

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            (callback,) = ours(trainer)
            callback._save(trainer)
            seen.append(set(callback._client.open_sections))

    seen: list[set[str]] = []
    new_run()
    strategy = Second(torch.device("cpu"))
    make_trainer(tmp_path, Look(), strategy=strategy, max_steps=3).fit(Model())
    assert seen == [{"first_batch"}, set(), set()]


def test_the_trainer_of_the_other_package_resumes_too(new_run: Run, tmp_path: Path) -> None:
    from pytorch_lightning.demos.boring_classes import BoringModel as Other

    class Noting(Other):
        def on_train_start(self) -> None:
            steps.append(self.trainer.global_step)

    steps: list[int] = []
    for epochs in (1, 2):
        new_run()
        pytorch_lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, max_steps=4 * epochs, default_root_dir=tmp_path,
        ).fit(Noting())  # fmt: skip
    assert steps == [0, 4]


# ---------------------------------------------------------------------------------- left alone


class Own(TorchCheckpointIO):
    """A user's."""


class Directories(SingleDeviceStrategy):
    """Writes checkpoints in its own way."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)


LEFT_ALONE: dict[str, tuple[list[Any], dict[str, Any], str | None]] = {
    "fast_dev_run": ([], {"fast_dev_run": True}, None),
    "a CheckpointIO": ([], {"plugins": [Own()]}, "keeps no checkpoints: Own has its own way"),
    "a strategy": ([], {"strategy": Directories("cpu")}, "no checkpoints: Directories has its own"),
    "a tuner": ([LearningRateFinder(num_training_steps=2)], {}, "LearningRateFinder would run aga"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_it_cannot_resume_is_left_alone_with_a_line(
    new_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    callbacks, options, line = LEFT_ALONE[case]
    directory = new_run()
    make_trainer(tmp_path, *callbacks, **options).fit(Model())
    assert not list(directory.glob("*.ckpt"))
    assert (line or "") in caplog.text and ("WILL NOT RESUME" in caplog.text) == bool(line)


def test_a_script_that_names_a_checkpoint_is_given_that_one_and_a_search_is_no_training(
    new_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = new_run()
    trainer = make_trainer(tmp_path, ModelCheckpoint(tmp_path / "own", save_last=True))
    trainer.fit(Model(), ckpt_path="last")
    own = tmp_path / "own" / "last.ckpt"
    assert f"training resumes from {own}, saved every 1 epoch(s)" in caplog.text
    model = Model()
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, ckpt_path=own)
    assert trainer.global_step == 12 and len(model.seen) == 4
    trainer = make_trainer(tmp_path, max_epochs=3)
    Tuner(trainer).lr_find(Model(), num_training=3)
    trainer.validate(Model(), verbose=False)
    assert not list(directory.glob("*.ckpt"))


def test_training_goes_on_if_the_disk_is_full_but_a_stop_says_so(
    new_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    new_run()
    monkeypatch.setattr(ft_callback, "write_checkpoint", write)
    trainer = make_trainer(tmp_path)
    trainer.fit(Model())
    assert trainer.global_step == 8 and "_0.ckpt: OSError(28, 'No space left" in caplog.text
    Path(f"{os.environ[FLAG_VARIABLE]}.stop").touch()
    with pytest.raises(OSError, match="No space"):
        make_trainer(tmp_path).fit(Model())


# ------------------------------------------------------------------------------ unchanged scripts

# What befalls the rank, and in which step, is in a file. What should come of it, plain torch tells.
PRELUDE = (
    LOADER
    + """
import copy, os, signal, time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

FAULTS, SIGNALS = Path(__file__).with_name("faults"), {"killed": 9, "frozen": 19, "stopped": 15}

class Train:
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", max(0.2 - self.current_epoch * 0.1, 0.0))

    def on_train_start(self):
        print(f"starts at {self.global_step},")

    def on_train_batch_end(self, *args):
        fault, step, *rest = (FAULTS.read_text() + " - 0").split(" ")
        if self.global_step == int(step):
            FAULTS.write_text(" ".join(rest))
            os.kill(os.getpid(), SIGNALS[fault])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

def tell(trainer, model, first, loader):
    expected = copy.deepcopy(first)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    for step in range(trainer.global_step):
        optimizer.zero_grad()
        batch = list(DataLoader(loader.dataset, batch_size=8))[step % 10]
        expected(batch[0]).square().mean().backward()
        optimizer.step()
    is_same = torch.allclose(model.layer.weight, expected.weight, atol=1e-6)
    print(f"step {trainer.global_step}, {'as' if is_same else 'NOT AS'} without a fault")

torch.manual_seed(1)
"""
)
SCRIPTS = {  # its arguments, its text, faults, and its last step
    "plain": (
        [],
        """
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

class Net(Train, LightningModule):
    pass

loader = Loader(TensorDataset(torch.randn(80, 8)), batch_size=8)
model = Net()
first = copy.deepcopy(model.layer)
trainer = Trainer(max_epochs=4, accelerator="cpu", logger=CSVLogger("logs"))
trainer.fit(model, loader, loader)
tell(trainer, model, first, loader)
""",
        "killed 13 frozen 27",
        40,
    ),
    "cli": (
        ["fit", "--config=settings.yaml"],
        """
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

class Net(Train, LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first = [copy.deepcopy(self.layer)]

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(80, 8)), batch_size=8)

cli = LightningCLI(Net)
tell(cli.trainer, cli.model, cli.model.first[0], cli.model.train_dataloader())
""",
        "stopped 13",
        30,
    ),
    "hydra": (
        [],
        """
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

class Net(Train, pl.LightningModule):
    pass

os.makedirs(outputs := f"outputs/{time.time()}")
os.chdir(outputs)
loader = DataLoader(TensorDataset(torch.ones(80, 8)), batch_size=8)
model = Net()
first = copy.deepcopy(model.layer)
top = ModelCheckpoint("top", monitor="val", save_top_k=3)
stopping = EarlyStopping("val", patience=2)
trainer = pl.Trainer(max_epochs=50, accelerator="cpu", callbacks=[stopping, top])
trainer.fit(model, loader, loader)
tell(trainer, model, first, loader)
trainer.validate(model, loader, ckpt_path="best")
""",
        "killed 37",
        50,
    ),
}
SETTINGS = "seed_everything: 7\ntrainer: {max_epochs: 3, accelerator: cpu, logger: false}\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unchanged_script_ends_as_without_its_faults(
    start: Callable[..., Started], tmp_path: Path, name: str
) -> None:
    """With default checkpointing and a CSVLogger; with LightningCLI and YAML, which would not
    overwrite its config.yaml; with pytorch_lightning, in a directory that is another each time."""
    arguments, text, faults, last = SCRIPTS[name]
    (tmp_path / "train.py").write_text(PRELUDE + text)
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    (tmp_path / "faults").write_text(faults)
    (tmp_path / "vendored").mkdir()
    for module in ("ft_monitor.py", "ft_launcher.py", "ft_callback.py"):
        shutil.copy(ROOT / module, tmp_path / "vendored")
    options = ["--ft-auto", "--ft-auto-save-minutes=1e-6", "--max-restarts=2", "--ft-run-dir=runs"]
    options += ["--ft-rank-heartbeat-timeout=3", "--ft-min-timeout=3"]
    command = [sys.executable, "vendored/ft_launcher.py", *options, "train.py", *arguments]
    runs = [start(command)]
    assert runs[0].wait() == 0, runs[0].output
    if "stopped" in faults:
        assert "step 13 is saved" in runs[0].output or "stopped at step" in runs[0].output
        runs.append(start(command))
        assert runs[1].wait() == 0 and "resuming the training in" in runs[1].output
    assert f"step {last}, as without a fault" in runs[-1].output, runs[-1].output
    (directory,) = (tmp_path / "ft_checkpoints").iterdir()
    assert json.loads((directory / "finished").read_text())["step"] == last
    output = "".join(run.output for run in runs)
    starts = re.findall(r"starts at (\d+),", output)
    assert len(starts) == len(faults.split()) // 2 + 1, output
    assert int(starts[0]) == 0 and all(int(step) > 0 for step in starts[1:])


# --------------------------------------------------------------------------------- the launcher


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Any]:
    """What the launcher makes of a command line; nothing is started."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    runs = itertools.count()
    for name in ("train.py", "other.py"):
        (tmp_path / name).touch()

    def parse(*words: str) -> tuple[Path, Path, str]:
        monkeypatch.setattr(ft_launcher, "lock_flag", lambda *args: None)
        run_dir = tmp_path / f"runs{next(runs)}"
        job, _ = ft_launcher.parse_arguments(["--ft-auto", f"--ft-run-dir={run_dir}", *words])
        directory, flag = Path(job.auto["FT_AUTO"]), Path(job.auto[FLAG_VARIABLE])
        assert directory.is_dir() and directory.is_absolute()
        return directory, flag, capfd.readouterr().err

    return parse


def test_each_training_has_a_directory_of_its_own(
    begin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, flag, told = begin("train.py", "--lr=0.1")
    assert directory.parent == tmp_path / "ft_checkpoints" and flag == directory / "finished"
    assert directory.name.startswith("train_") and told == ""
    assert begin("--ft-auto-save-minutes=3", "train.py", "--lr=0.1")[0] == directory
    different = {
        begin(*words)[0] for words in (["train.py"], ["train.py", "--lr=0.2"], ["other.py"])
    }
    assert len(different - {directory}) == 3
    assert begin("--ft-auto-dir=there", "train.py")[0].parent == tmp_path / "there"
    for name in ("a", "b"):  # tasks of a job array, which tell each other apart by variables
        monkeypatch.setenv(FLAG_VARIABLE, f"elsewhere/{name}")
        under, flag, _ = begin("train.py")
        assert under.parent == tmp_path / "elsewhere" / "ft_checkpoints" and flag.name == name
        assert under not in different
        different.add(under)


def test_a_training_that_follows_a_complete_one_starts_anew(begin: Callable[..., Any]) -> None:
    directory, flag, _ = begin("train.py")
    for name in ("fit_Net_0.ckpt", "finished.progress", "ft_state.json"):
        (directory / name).touch()
    (directory / "finished.evidence").mkdir()
    _, _, told = begin("train.py")
    assert f"resuming the training in {directory} (to start anew, remove that)" in told
    flag.touch()
    _, _, told = begin("train.py")
    assert f"the training before was complete: starting a new one in {directory}" in told
    assert {path.name for path in directory.iterdir()} == {"finished.evidence", "ft_state.json"}


def test_a_finished_flag_of_the_users_own_is_left_to_him(
    begin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FLAG_VARIABLE, "flag")
    directory, flag, _ = begin("train.py")
    (directory / "fit_Net_0.ckpt").touch()
    flag.touch()
    begin("train.py")
    assert flag == tmp_path / "flag" and flag.exists() and list(directory.iterdir())
