"""Who may import whom inside the pack. The directions are the design; this walks every import statement."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from project_files import project_files

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "server", "nodes"}
CORE = {
    "training",
    "lora",
    "image_prompt",
    "sampling",
    "slim",
    "prompts",
    "profiling",
    "metrics",
    "calibration",
    "checkpoints",
    "families",
    "quant",
    "demo",
    "reading",
    "writing",
}
ALLOWED = {
    "": {"nodes"},
    "nodes": CORE,
    "headless": CORE,
    "training": {"checkpoints.save", "lora", "sampling", "quant", "reading", "writing"},  # what is trained is a file
    "lora": {"families", "checkpoints.header", "quant", "reading"},  # a LoRA is a file, too
    "calibration": {"checkpoints", "families", "quant", "writing"},
    "checkpoints": {"families", "quant", "writing"},
    "demo": {"metrics", "training", "image_prompt", "reading", "writing"},
    "slim": {"quant", "reading"},  # of quant its truncated singular value decomposition
    "families": set(),
    "quant": set(),
    "prompts": {"families", "reading"},
    "sampling": {"families"},
    "profiling": set(),
    "metrics": set(),
    "image_prompt": set(),
    "reading": set(),
    "writing": {"reading"},
}
FORMATS = "checkpoints.formats"  # formats know bytes, families know names, and neither knows the other


def sources() -> list[Path]:
    return [ROOT / p for p in project_files() if p.suffix == ".py" and p.parts[0] not in ("tests", "benchmarks")]


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted target, relative?) of every import statement, lazy ones too; relative ones from the pack's root."""
    package = list(path.relative_to(ROOT).parent.parts)
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [(a.name, False) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            out.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            stem = base + (node.module.split(".") if node.module else [])
            out += [(".".join([*stem, a.name] if not node.module else stem), True) for a in node.names]
    return out


def within(target: str, area: str) -> bool:
    return target == area or target.startswith(area + ".")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    home = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
    assert home in ALLOWED, f"{home} is not a folder of the design"
    for target, relative in imports(path):
        top = target.split(".")[0]
        if not relative:
            assert top != "comfyui_nibble", f"absolute import of the pack itself: {target}"
            assert top not in COMFYUI or home == "nodes", f"ComfyUI imported outside nodes/: {target}"
        elif top != home:
            assert any(within(target, area) for area in ALLOWED[home]), f"{home or 'root'} imports {target}"
    here = ".".join(module_of(path))
    if within(here, FORMATS):
        assert not any(relative and within(t, "families") for t, relative in imports(path)), "a format imports families"


def test_only_the_bridge_touches_internals():
    """Outside nodes/bridge, nodes use ComfyUI's public API only."""
    public = {"comfy_api", "folder_paths"}
    for path in (ROOT / "nodes").glob("*.py"):
        for target, relative in imports(path):
            top = target.split(".")[0]
            assert relative or top not in COMFYUI or top in public, f"{path.name} imports {target}"


def test_every_relative_import_exists():
    """A lazy import of a file that is gone would only fail in a user's hands."""
    for path in sources():
        for target, relative in imports(path):
            if relative:
                p = ROOT.joinpath(*target.split("."))
                parent = p.parent
                assert (
                    p.with_suffix(".py").exists()
                    or p.is_dir()
                    or parent.with_suffix(".py").exists()
                    or (parent / "__init__.py").exists()
                ), f"{path}: {target}"


def test_families_need_no_torch():
    """They are read for help texts and lists, before anything heavy is."""
    code = "import sys, comfyui_nibble.families; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, timeout=60).returncode == 0


MOST_LINES = 60
SCHEMAS = {"define_schema"}  # tables in the shape that ComfyUI wants


def test_functions_are_short_and_hold_no_class():
    """A class in a function is a new one at each call, and its behaviour can be neither read nor tested alone."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = f"{path.relative_to(ROOT)}: {node.name}"
            assert not any(isinstance(n, ast.ClassDef) for n in ast.walk(node)), f"{where} defines a class"
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES or node.name in SCHEMAS, f"{where} has {lines} lines"
