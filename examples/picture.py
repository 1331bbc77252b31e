"""Draws examples/hang.svg: the terminal of a real run in which a rank hangs.

python examples/picture.py [FILE]
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (
    "./autoresume.sh python ft_launcher.py --nproc-per-node=2 --max-restarts=3"
    " --ft-rank-heartbeat-timeout=4 examples/train.py --fault rank_hung"
)
COLUMNS, LINE_HEIGHT, CHARACTER_WIDTH = 104, 19, 8.43
COLOURS = ((r"\[(ft|auto)", "#f0c674"), (r"simulated fault", "#cc6666"), (r"\$", "#ffffff"))


def run() -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        names = ("./autoresume.sh", "ft_launcher.py", "examples/train.py")
        command = [str(ROOT / word) if word in names else word for word in COMMAND.split()]
        result = subprocess.run(
            [sys.executable if word == "python" else word for word in command],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=300,
        )
    return result.stdout.replace(directory, "~").splitlines()


def shown(lines: list[str]) -> list[str]:
    """What fits the picture: of the steps after the restart, the first and the last."""
    steps = [line for line in lines if line.startswith("step ")]
    restart = next(n for n, line in enumerate(lines) if "restarting" in line)
    left_out = [line for line in steps if lines.index(line) > restart][1:-1]
    kept = [line for line in lines if line not in left_out[1:]]
    kept = ["..." if line in left_out[:1] else line for line in kept]
    wrap = textwrap.TextWrapper(COLUMNS, subsequent_indent="    ", break_on_hyphens=False)
    return [row for line in [f"$ {COMMAND}", *kept] for row in wrap.wrap(line) or [""]]


def draw(rows: list[str]) -> str:
    width, height = round(COLUMNS * CHARACTER_WIDTH) + 40, len(rows) * LINE_HEIGHT + 60
    texts = []
    begun = "#c5c8c6"  # of a row that goes on, the colour of its line
    for number, row in enumerate(rows):
        if not row.startswith("    "):
            begun = next((c for p, c in COLOURS if re.match(p, row)), "#c5c8c6")
        place = f'x="20" y="{52 + number * LINE_HEIGHT}" fill="{begun}"'
        texts.append(f'<text {place} xml:space="preserve">{escape(row)}</text>')
    dots = "".join(
        f'<circle cx="{22 + 20 * n}" cy="18" r="6" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    font = 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14"'
    body = "\n".join(texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#1d1f21"/>{dots}\n{body}\n</svg>\n'
    )


def main() -> None:
    path = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "examples" / "hang.svg"
    path.write_text(draw(shown(run())), encoding="utf-8")


if __name__ == "__main__":
    main()
