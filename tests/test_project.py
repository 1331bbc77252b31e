"""The four files stay as short as they promise to be, and need nothing that they may not need."""

from __future__ import annotations

import ast
import sys

import pytest
from conftest import ROOT

FILES = ("ft_monitor.py", "ft_launcher.py", "ft_callback.py", "autoresume.sh")
MODULES = {
    "ft_monitor.py": set[str](),
    "ft_launcher.py": {"torch", "ft_monitor"},
    "ft_callback.py": {"torch", "lightning", "ft_monitor"},
}
MAX_LINES, MAX_WORDS, MAX_COLUMNS, MAX_FUNCTION_LINES = 4305, 22035, 100, 40


def test_the_four_files_can_be_read_in_one_sitting() -> None:
    texts = [(ROOT / name).read_text() for name in FILES]
    assert sum(len(text.splitlines()) for text in texts) <= MAX_LINES
    assert sum(len(text.split()) for text in texts) <= MAX_WORDS
    assert max(len(line) for text in texts for line in text.splitlines()) <= MAX_COLUMNS


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short_and_imports_are_those_agreed(name: str) -> None:
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {f: n for f, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
    imported = {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {module.partition(".")[0] for module in imported}
    assert packages - sys.stdlib_module_names <= MODULES[name]
