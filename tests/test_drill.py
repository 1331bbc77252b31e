"""examples/drill.py: its table, and its exit code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Started, processes_with

Start = Callable[..., Started]


def rows(output: str) -> dict[str, list[str]]:
    """The cells of each row of the table, by its first."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first: others for first, *others in cells}


@pytest.fixture
def drill(start: Start, tmp_path: Path) -> Callable[..., Started]:
    def run(*arguments: str) -> Started:
        return start(
            [sys.executable, ROOT / "examples" / "drill.py", *arguments], TMPDIR=str(tmp_path)
        )

    return run


@pytest.mark.timeout(620)
def test_faults_that_training_comes_back_from_are_rows_of_a_table_and_end_with_0(
    drill: Callable[..., Started], tmp_path: Path
) -> None:
    job = drill("--only", "crash", "SIGTERM to the launcher")
    assert job.wait(600) == 0, job.output
    table = rows(job.output)
    assert list(table) == ["fault", "---", "crash", "SIGTERM to the launcher"], job.output
    noticed, stacks, restarted, lost, left, verdict = table["crash"]
    assert float(noticed.removesuffix(" s")) > 0 and float(restarted.removesuffix(" s")) > 0
    assert (stacks, lost, left, verdict) == ("yes", "7", "0", "ok")
    assert table["SIGTERM to the launcher"][3:] == ["0", "0", "ok"], "saved in time"
    assert not list(tmp_path.glob("ft_drill_*"))


@pytest.mark.timeout(620)
def test_a_fault_that_training_does_not_come_back_from_is_told_of_and_ends_with_1(
    drill: Callable[..., Started], tmp_path: Path
) -> None:
    job = drill("--only", "crash", "--", "--max-restarts=0")
    assert job.wait(600) == 1, job.output
    *_, restarted, lost, left, verdict = rows(job.output)["crash"]
    assert (restarted, lost, left) == ("-", "-", "0")
    output = re.fullmatch(r"exit code 1: see (\S+)", verdict)
    assert output and "no restarts left" in Path(output[1]).read_text()
    assert not processes_with(f"FT_DRILL={tmp_path}")
