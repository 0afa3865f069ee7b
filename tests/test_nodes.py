"""What every node's source must hold, without a ComfyUI."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = [
    pytest.param(method, id=f"{path.stem}.{node.name}")
    for path in sorted((ROOT / "nodes").glob("*.py"))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
    for method in node.body
    if isinstance(method, ast.FunctionDef) and method.name == "fingerprint_inputs"
]


@pytest.mark.parametrize("method", METHODS)
def test_a_fingerprint_does_without_linked_inputs(method):
    """ComfyUI leaves linked inputs out when it asks: each has a default, and the others may be there."""
    required = len(method.args.args) - 1 - len(method.args.defaults)
    assert required == 0


def test_there_are_some():
    assert len(METHODS) >= 10
