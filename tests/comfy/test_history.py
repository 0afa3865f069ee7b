"""The routes of the runs' history: they show what output/nibble holds, and nothing else."""

import json
import urllib.error
import urllib.parse

import pytest
from comfyui_nibble.profiling.memory import Device
from comfyui_nibble.profiling.report import FORMAT, MAX_BYTES, Node, Run

TWO = ["the run before it", "the newest run"]
RUN = Run(
    label="<b>4-bit</b>", state="complete", device=Device("some card", "cuda", 2**34), seconds=3.0, between=0.25,
    recording=0.01, nodes=(
        Node("1", "Load", "load", "ran", 0.0, 0.75, 0.75),
        Node("2", "KSampler", "sample", "ran", 0.75, 2.0, 2.0, (0.5, 0.5)),
        Node("3", "Text", "text", "cached"),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    """output/nibble with a good run, files that look like one, and a link that leads out."""
    place = server.base / "output" / "nibble"
    place.mkdir(parents=True, exist_ok=True)
    outside = tmp_path_factory.mktemp("outside") / "secret.json"
    outside.write_text(RUN.to_json(), encoding="utf-8")
    names = ["hist_good.json", "hist_damaged.json", "hist_large.json", "hist_bytes.json", "hist_link.json"]
    good, damaged, large, raw, link = (place / name for name in names)
    good.write_text(RUN.to_json(), encoding="utf-8")
    damaged.write_text(json.dumps({"format": FORMAT, "label": 7}), encoding="utf-8")
    raw.write_bytes(json.dumps({"format": FORMAT}).encode() + b"\xff\xfe")
    with large.open("wb") as f:
        f.write(json.dumps({"format": FORMAT}).encode())
        f.truncate(MAX_BYTES + 1)
    link.symlink_to(outside)
    yield place
    for name in names:
        (place / name).unlink()


def answer(server, path: str) -> tuple[int, dict]:
    try:
        return 200, server.get(path)
    except urllib.error.HTTPError as e:
        body = e.read()
        return e.code, json.loads(body) if body.startswith(b"{") else {}


def test_a_run_is_listed_with_its_figures(server, folder):
    rows = {row["name"]: row for row in server.get("/nibble/runs")["runs"]}
    row = rows["hist_good.json"]
    assert row.pop("saved") == pytest.approx((folder / "hist_good.json").stat().st_mtime)
    assert row == {
        "name": "hist_good.json", "label": RUN.label, "state": "complete", "seconds": 3.0, "peak": RUN.peak,
        "limit": 2**34, "device": "some card", "ran": 2, "nodes": 3,
    }  # fmt: skip


def test_a_listed_run_can_be_read_whole(server, folder):
    assert server.get("/nibble/runs/hist_good.json") == json.loads(RUN.to_json())
    newer = json.loads(RUN.to_json()) | {"label": "changed"}
    (folder / "hist_good.json").write_text(json.dumps(newer), encoding="utf-8")
    rows = {row["name"]: row for row in server.get("/nibble/runs")["runs"]}
    assert rows["hist_good.json"]["label"] == "changed"
    (folder / "hist_good.json").write_text(RUN.to_json(), encoding="utf-8")


@pytest.mark.parametrize(
    "name, says",
    [
        ("hist_damaged.json", "damaged"),
        ("hist_large.json", "larger than a profile"),
        ("hist_bytes.json", "not text"),
        ("hist_link.json", "leads out"),
    ],
)
def test_a_bad_file_is_a_sentence_in_its_own_row(server, folder, name, says):
    rows = {row["name"]: row for row in server.get("/nibble/runs")["runs"]}
    assert says in rows[name]["error"] and "seconds" not in rows[name]
    status, body = answer(server, f"/nibble/runs/{name}")
    assert status == 422 and says in body["error"]
    assert str(folder) not in json.dumps(rows) + body["error"]


@pytest.mark.parametrize(
    "name", ["none.json", "../../user/x.json", "..", "/etc/passwd", "hist_good.json\0", "../nibble/hist_good.json"]
)
def test_other_names_are_not_there(server, folder, name):
    status, body = answer(server, f"/nibble/runs/{urllib.parse.quote(name, safe='')}")
    assert status == 404 and "seconds" not in body


def test_thousands_of_saved_runs_are_listed_by_their_dates(inside, tmp_path):
    """Not one is parsed for it, and the heads of the newest alone are read: 5,000 took 14 s a prompt."""
    (tmp_path / "good.json").write_text(RUN.to_json(), encoding="utf-8")
    found = inside("saved_runs", tmp_path)
    assert found["saved"] == [499, "run_01199_.json", "run_00701_.json"]  # other.json, which is none, is the newest
    listing, marking, picking, loading = found["opens"]
    assert listing <= 500 and marking == 0 and picking <= 500 and loading <= 2
    assert found["label"] == RUN.label  # an old one can still be read by name
    assert not any(found["strange"])
    assert all("there is no such saved run" in said and len(said) < 200 for said in found["said"])
    assert found["rows"] == 100
    assert found["gone"] == {"run_01199_.json": [499, TWO], "nibble": [0, TWO]}
    assert found["empty"] == []
