"""The walk of the tree, in a clone as people have it: a virtual environment in it, builds, another repository."""

import re
import subprocess
from pathlib import Path

import pytest
from project_files import ROOT, project_files


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import comfy\n", encoding="utf-8")


OURS = [".ci/run", "__init__.py", "nodes/__init__.py", "quant/new.py", "venv_of_tests.py"]
THEIRS = [
    "venv/pyvenv.cfg", "venv/lib/python3.11/site-packages/torch/__init__.py", "my env/pyvenv.cfg",
    "my env/Lib/site-packages/x.py", ".venv/lib/y.py", "tools/deep/env/pyvenv.cfg", "tools/deep/env/z.py",
    "conda/conda-meta/history", "conda/lib/w.py", "build/lib/quant/new.py", "nodes/__pycache__/a.py",
    "ComfyUI/.git/HEAD", "ComfyUI/main.py",
]  # fmt: skip


def git(root: Path, *args: str) -> None:
    subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True,
                   capture_output=True)  # fmt: skip


@pytest.mark.parametrize("kind", ["git", "no git", "inside another repository"])
def test_only_the_projects_files(kind, tmp_path):
    root = tmp_path / "pack"
    put(root, *OURS, "gone.py", "notes.log")
    if kind == "git":
        git(tmp_path, "init", "-q", str(root))
        git(root, "add", *OURS[:3], "gone.py")
        (root / ".gitignore").write_text("*.log\n", encoding="utf-8")
    elif kind != "no git":
        git(tmp_path, "init", "-q")
        (tmp_path / ".gitignore").write_text("pack/\n", encoding="utf-8")
    (root / "gone.py").unlink()
    put(root, *THEIRS)
    found = {p.as_posix() for p in project_files(root)} - {".gitignore"}
    assert found == {*OURS, *(() if kind == "git" else ("notes.log",))} - (set() if kind == "git" else {".ci/run"})


def test_this_projects_own():
    found = {p.as_posix() for p in project_files()}
    assert {"__init__.py", "quant/checks.py", "tests/project_files.py", "pyproject.toml"} <= found
    assert not [p for p in found if "site-packages" in p or p.endswith(".pyc")]


def test_no_test_walks_the_tree_by_itself():
    """Each such walk finds what a person put into the clone, and calls it this project's fault."""
    for path in project_files():
        if (
            path.suffix == ".py"
            and path.parts[0] == "tests"
            and path.name not in ("project_files.py", Path(__file__).name)
        ):
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])ROOT\.(rglob|glob|walk)\(", text), path
