"""The same model as train.py in a plain PyTorch loop, fault tolerant without Lightning.

    ./autoresume.sh python ft_launcher.py --nproc-per-node=2 --max-restarts=3 \\
        examples/train_pytorch.py --fault rank_killed

What makes it so is marked with numbers:
  1. the client connects to this rank's monitor before anything that can hang; limits are learned,
     and kept in a file for the next start;
  2. heartbeats, with the step; what is slow for good reasons is a section;
  3. checkpoints are written beside their target and renamed, and reported;
  4. a request to stop (SIGTERM, SIGUSR1, Ctrl-C) saves and ends the script; the next run goes on;
  5. training is complete: the finished flag appears when the script ends well.
"""

import argparse
import os
import pydoc_data.topics
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ft_monitor import RankMonitorClient

CONTEXT = 64  # characters that the model sees at once
FAULTS = {"rank_killed": signal.SIGKILL, "rank_hung": signal.SIGSTOP}


class CharacterModel(nn.Module):
    """Predicts each next character of a text with a GRU."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(characters))[0])


def load_text() -> tuple[torch.Tensor, int]:
    """The Python manual as numbers, and how many different characters it has."""
    text = "".join(pydoc_data.topics.topics.values())
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def batch(text: torch.Tensor, step: int, size: int = 32) -> torch.Tensor:
    """The pieces of text for one step of one rank: the same after a restart."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])


def any_rank(yes: bool, device: torch.device) -> bool:
    """Ranks must agree: a signal may come to one of them, or between two of their steps."""
    answer = torch.tensor(int(yes), device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def save(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".unfinished")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)  # 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small language model on the text of Python's manual."
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
        "--dir", type=Path, default=Path("checkpoints"), help="where the checkpoint goes"
    )
    parser.add_argument(
        "--fault", choices=FAULTS, help="try it: let the last rank fail, in the first start"
    )
    parser.add_argument(
        "--fault-step", type=int, default=80, metavar="STEP", help="after so many steps"
    )
    args = parser.parse_args()

    client = RankMonitorClient()
    state_file = args.dir / "ft_state.json"
    client.init_workload_monitoring(calculate_timeouts=True, state_file=state_file)  # 1
    client.start_section("setup")  # 2
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    text, vocabulary = load_text()
    torch.manual_seed(1)
    model = DistributedDataParallel(CharacterModel(vocabulary).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoint, start = args.dir / "last.pt", 0
    first_start = os.environ.get("FT_ATTEMPT", "0") == "0" and not checkpoint.exists()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    client.stop_requested()  # 4: from here on, signals are only noted
    client.end_section("setup")
    client.start_section("first_batch")  # 2

    for step in range(start, args.steps):
        if (
            args.fault
            and first_start
            and step == args.fault_step
            and dist.get_rank() == dist.get_world_size() - 1
        ):
            print(f"simulated fault: {args.fault} on rank {dist.get_rank()}", flush=True)
            os.kill(os.getpid(), FAULTS[args.fault])
        pieces = batch(text, step).to(device)
        loss = nn.functional.cross_entropy(model(pieces[:, :-1]).transpose(1, 2), pieces[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == start:
            client.end_section("first_batch")
        client.send_heartbeat(step + 1)  # 2
        is_stopping = step % 10 == 0 and any_rank(client.stop_requested() is not None, device)  # 4
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or is_stopping:
            client.start_section("checkpointing")  # 2
            if dist.get_rank() == 0:
                args.dir.mkdir(parents=True, exist_ok=True)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                }
                save(checkpoint, state)
                client.report_saved(step + 1)  # 3
                print(f"step {step + 1}: loss {loss.item():.3f}, saved {checkpoint}", flush=True)
            dist.barrier()
            client.end_section("checkpointing")
        if is_stopping:
            break
    else:
        if dist.get_rank() == 0:
            client.training_complete(reason=f"{args.steps} steps done", step=args.steps)  # 5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
