"""A character-level language model whose training survives crashes, hangs and time limits.

    ./autoresume.sh python ft_launcher.py --nproc-per-node=2 --max-restarts=3 \\
        examples/train.py --fault rank_killed

What makes it so is marked with numbers:
  1. devices and nodes come from the launcher;
  2. checkpoints go to a directory that is the same in every run, the newest also as last.ckpt;
  3. `ckpt_path="last"` resumes from there;
  4. the callback, which connects each rank to its monitor.
"""

import argparse
import logging
import os
import pydoc_data.topics
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ft_callback import FaultToleranceCallback

CONTEXT = 64  # characters that the model sees at once


class CharacterModel(LightningModule):
    """Predicts each next character of a text with a GRU."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(characters))[0])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._loss("train_loss", batch)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._loss("val_loss", batch)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            loss = self.trainer.callback_metrics["val_loss"]
            print(f"step {self.global_step}: validation loss {loss:.3f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def _loss(self, name: str, batch: list[torch.Tensor]) -> torch.Tensor:
        text = batch[0]
        loss = nn.functional.cross_entropy(self(text[:, :-1]).transpose(1, 2), text[:, 1:])
        self.log(name, loss, sync_dist=True)
        return loss


def load_text() -> tuple[TensorDataset, TensorDataset, int]:
    """Training and validation pieces of the Python manual, and how many characters it knows."""
    text = "".join(pydoc_data.topics.topics.values())
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([number[character] for character in text])
    pieces = data[: len(data) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return TensorDataset(pieces[:-256]), TensorDataset(pieces[-256:]), len(number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small language model on the text of Python's manual."
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--steps-per-epoch", type=int, default=10, help="batches of one rank between checkpoints"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("checkpoints"), help="where checkpoints go"
    )
    parser.add_argument(
        "--fault", choices=("rank_killed", "rank_hung", "random"), help="try it: let a rank fail"
    )
    parser.add_argument(
        "--fault-delay",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="after the callback's setup",
    )
    args = parser.parse_args()

    # Let the screen tell of faults and restarts alone.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")

    seed_everything(1)
    training, validation, vocabulary = load_text()
    first_start = os.environ.get("FT_ATTEMPT", "0") == "0" and not (args.dir / "last.ckpt").exists()
    fault = (
        {"fault_type": args.fault, "base_delay": args.fault_delay}
        if args.fault and first_start
        else None
    )
    trainer = Trainer(
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),  # 1
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        strategy="ddp",
        max_epochs=args.epochs,
        limit_train_batches=args.steps_per_epoch,
        default_root_dir=args.dir,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(dirpath=args.dir, save_last=True, save_on_train_epoch_end=True),  # 2
            FaultToleranceCallback(
                autoresume=True,
                calculate_timeouts=True,
                exp_dir=args.dir,
                simulated_fault_params=fault,
            ),  # 4
        ],
    )
    trainer.fit(
        CharacterModel(vocabulary),
        DataLoader(training, batch_size=32, shuffle=True),
        DataLoader(validation, batch_size=32),
        ckpt_path="last",  # 3
    )


if __name__ == "__main__":
    main()
