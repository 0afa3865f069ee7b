"""What the registry would ship: the tree after .gitignore and .comfyignore, in a fresh ComfyUI of its own."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
from comfyui_nibble.demo import recognise

sys.path.insert(0, str(Path(__file__).parent))
from conftest import PACK, ROOT, start
from project_files import project_files

pathspec = pytest.importorskip("pathspec", reason="pathspec is in the test extra")
MAX_BYTES = 60 * 2**20


def shipped(root: Path) -> list[Path]:
    """Every file of the archive, relative to ``root``."""
    lines = []
    for name in (".gitignore", ".comfyignore"):
        lines += (root / name).read_text(encoding="utf-8").splitlines()
    ignored = pathspec.PathSpec.from_lines("gitignore", lines)
    return [p for p in project_files(root) if not ignored.match_file(p.as_posix())]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for p in shipped(ROOT):
            z.write(ROOT / p, p.as_posix())
    return path


def test_it_holds_what_runs_and_nothing_else(archive):
    with zipfile.ZipFile(archive) as z:
        names = z.namelist()
    assert archive.stat().st_size <= MAX_BYTES
    top = {n.split("/")[0] for n in names}
    assert not top & {"tests", "benchmarks", "docs", ".git", ".github", ".ci", "build", "dist"}
    for needed in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "demo/LICENSES.md", "README.md"):
        assert needed in names, needed
    assert not [n for n in names if n.endswith((".pyc", ".pt", ".bin", ".ckpt", ".pkl"))]


def test_a_fresh_comfyui_loads_it_and_runs_quickstart(archive, tmp_path):
    pack = tmp_path / "custom_nodes" / PACK
    with zipfile.ZipFile(archive) as z:
        z.extractall(pack)
    server = start(tmp_path)
    try:
        assert not pack.is_symlink()
        ids = {
            n["class_type"]
            for p in (pack / "workflows" / "api").glob("*.json")
            for n in json.loads(p.read_text()).values()
        }
        known = server.get("/object_info")
        assert {n for n in ids if n.startswith("Nibble")} <= known.keys()
        listed = server.get("/workflow_templates")[PACK]
        assert {p.stem for p in (pack / "workflows").glob("*.json")} == set(listed)
        for name in listed:
            assert server.get(f"/api/workflow_templates/{PACK}/{name}.json")["version"] == 0.4
        for id in (n for n in known if n.startswith("Nibble") and not n.startswith("NibbleTest")):
            assert server.get(f"/extensions/{PACK}/docs/{id}.md", raw=True), id
        graph = json.loads((pack / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
        picture = server.image(server.done(graph), "7")
        assert recognise.load().recognised(picture, "red apple")
    finally:
        server.process.terminate()
        server.process.wait(30)
