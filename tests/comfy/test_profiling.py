"""The profiling nodes in a real server: what a run's report holds against what ComfyUI itself says of the run."""

import csv
import io
import json
import time

import pytest


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def sampled(loader: dict, steps: int = 4, size: int = 128, seed: int = 5) -> dict:
    """The tiny SD1.5 model's whole run: loader, conditioning, stock KSampler, SaveLatent."""
    return {
        "model": loader,
        "pos": node("NibbleTestConditioning", tokens=20, width=768, pooled=0, seed=1),
        "neg": node("NibbleTestConditioning", tokens=20, width=768, pooled=0, seed=2),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sample": node("KSampler", model=["model", 0], positive=["pos", 0], negative=["neg", 0],
                       latent_image=["latent", 0], seed=seed, steps=steps, cfg=4.0, sampler_name="euler",
                       scheduler="normal", denoise=1.0),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="t/profiled"),
    }  # fmt: skip


def profiled(graph: dict, label: str, source: str = "sample") -> dict:
    return {**graph, "profile": node("NibbleProfiler", anything=[source, 0], label=label, filename_prefix="nibble/run")}


def with_model(graph: dict, label: str) -> dict:
    """The same graph with a self-recording model before the sampler."""
    sample = {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "model": ["timed", 0]}}
    return {**graph, "timed": node("NibbleProfileModel", model=["model", 0], label=label), "sample": sample}


def nibble(name: str) -> dict:
    return node("NibbleLoadModel", model_name=name)


@pytest.fixture
def tiny_model(server, tiny, tiny_4bit):
    """The tiny SD1.5 model in the server's list, 16-bit and 4-bit: (name, name)."""
    names = []
    for path in (tiny("sd15"), tiny_4bit("sd15")):
        target = server.models("diffusion_models") / path.name
        if not target.exists():
            target.symlink_to(path)
        names.append(path.name)
    return tuple(names)


def saved(server, result, ending: str = ".json") -> str:
    """The text of a profiler's saved file, as it is after the run."""
    entry = result.outputs["profile"]["nibble_run"][0]["file"]
    path = server.base / "output" / entry["subfolder"] / entry["filename"]
    return path.with_name(path.stem + ending).read_text()


def newest(server, known: set[str]) -> dict:
    """The one report saved since ``known``."""
    new = set(reports(server)) - known
    assert len(new) == 1, new
    return json.loads((server.base / "output" / "nibble" / new.pop()).read_text())


def reports(server) -> list[str]:
    return [p.name for p in (server.base / "output" / "nibble").glob("*.json")]


def by_title(run: dict) -> dict[str, dict]:
    return {n["id"]: n for n in run["nodes"]}


def test_every_node_is_timed_and_the_sum_is_the_wall_time(server, tiny_model):
    result = server.done(profiled(sampled(nibble(tiny_model[0]), steps=6, seed=11), "first"))
    run = json.loads(saved(server, result))
    nodes = by_title(run)
    assert set(nodes) == {"model", "pos", "neg", "latent", "sample", "save", "profile"}
    assert {n["state"] for n in nodes.values()} <= {"ran", "cached"} and nodes["save"]["state"] == "ran"
    assert len(nodes["sample"]["steps"]) == 6 and not nodes["sample"]["exact"]
    total = sum(n["seconds"] for n in nodes.values())
    assert total == pytest.approx(result.wall, rel=0.05, abs=0.1)  # 0.1 s: this run may take but one
    assert nodes["sample"]["kind"] == "sample" and nodes["model"]["kind"] == "load"
    assert run["recording"] <= 0.02 * run["seconds"]
    assert run["curve"] and run["device"]["limit"] > 0 and nodes["sample"]["peaks"]["host"] > 2**20


def test_the_report_in_the_graph_holds_the_nodes_beside_it(server, tiny_model):
    """SaveLatent hangs on nothing of the profiler, which waits for it all the same."""
    result = server.done(profiled(sampled(nibble(tiny_model[0]), seed=12), "beside", source="latent"))
    text = result.text("profile")
    assert "SaveLatent" in text or "Save Latent" in text
    assert "not run" not in text


def test_a_second_run_shows_cached_nodes_as_cached(server, tiny_model):
    graph = profiled(sampled(nibble(tiny_model[0]), seed=13), "cached")
    server.done(graph)
    nodes = by_title(json.loads(saved(server, server.done(graph))))
    assert nodes["profile"]["state"] == "ran"
    assert {n["state"] for id, n in nodes.items() if id != "profile"} == {"cached"}
    graph["sample"]["inputs"]["seed"] = 14
    nodes = by_title(json.loads(saved(server, server.done(graph))))
    assert nodes["sample"]["state"] == "ran" and nodes["model"]["state"] == "cached"


def test_files_are_new_and_say_the_same(server, tiny_model):
    graph = profiled(sampled(nibble(tiny_model[0]), seed=15), "files")
    one, two = server.done(graph), server.done(graph)
    names = [r.outputs["profile"]["nibble_run"][0]["file"]["filename"] for r in (one, two)]
    assert names[0] != names[1]
    run = json.loads(saved(server, one))
    rows = list(csv.DictReader(io.StringIO(saved(server, one, ".csv"))))
    assert {r["id"]: float(r["seconds"]) for r in rows} == {n["id"]: n["seconds"] for n in run["nodes"]}
    assert "**files**: complete" in saved(server, one, ".md")
    picture = server.image(one, "profile")
    assert picture.shape[1] == 1024 and picture.std() > 0.05
    assert str(server.base) not in saved(server, one)  # no local path leaves the machine


def test_an_interrupted_run_leaves_a_report_and_the_next_is_clean(server, tiny_model):
    known = set(reports(server))
    prompt = server.queue(profiled(sampled(nibble(tiny_model[0]), steps=500, seed=16), "cut"))
    end = time.monotonic() + 120
    while "sample" not in progress(server) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)
    server.post("/interrupt", {})
    assert server.wait(prompt).status == "error"
    run = newest(server, known)
    assert run["state"] == "stopped" and run["label"] == "cut"
    nodes = by_title(run)
    assert nodes["sample"]["state"] == "stopped" and nodes["sample"]["seconds"] > 0.5
    assert nodes["profile"]["state"] == "not run" and nodes["save"]["state"] == "not run"
    known = set(reports(server))
    server.done(profiled(sampled(nibble(tiny_model[0]), seed=17), "clean"))
    run = newest(server, known)
    assert run["state"] == "complete" and len(by_title(run)["sample"]["steps"]) == 4


def progress(server) -> list[str]:
    """Ids of nodes that the server's log says are at work: the tqdm bar of the sampler."""
    return ["sample"] if "it/s]" in server.tail(3) or "s/it]" in server.tail(3) else []


def test_a_label_may_come_from_another_node(server, tiny_model):
    """ComfyUI cannot say what is linked when it asks for the fingerprint: recording begins all the same."""
    graph = profiled(with_model(sampled(nibble(tiny_model[0]), seed=24), ""), "")
    graph["name"] = node("PrimitiveString", value="linked")
    for id in ("profile", "timed"):
        graph[id]["inputs"]["label"] = ["name", 0]
    run = json.loads(saved(server, server.done(graph)))
    assert run["label"] == run["samplings"][0]["label"] == "linked"
    assert {n["state"] for n in run["nodes"]} <= {"ran", "cached"} and by_title(run)["sample"]["seconds"] > 0


def test_a_name_that_leads_out_is_refused_and_the_next_run_is_clean(server, tiny_model):
    graph = profiled(sampled(nibble(tiny_model[0]), seed=23), "out")
    graph["profile"]["inputs"]["filename_prefix"] = "../../escaped"
    error = server.run(graph).error
    assert "'../../escaped' leads out of the output folder" in error and str(server.base) not in error
    assert not list(server.base.parent.glob("escaped*"))
    graph["profile"]["inputs"]["filename_prefix"] = "nibble/run"
    assert json.loads(saved(server, server.done(graph)))["state"] == "complete"


def test_a_failing_run_leaves_a_report(server, tiny_model):
    known = set(reports(server))
    graph = profiled(sampled(nibble(tiny_model[0]), seed=18), "fails")
    graph["pos"]["inputs"]["width"] = 64  # the model wants 768
    assert server.run(graph).status == "error"
    run = newest(server, known)
    assert run["state"] == "stopped" and by_title(run)["sample"]["state"] == "stopped"


def test_a_model_records_every_evaluation(server, tiny_model):
    graph = profiled(with_model(sampled(nibble(tiny_model[1]), steps=5, seed=19), "4-bit"), "model")
    run = json.loads(saved(server, server.done(graph)))
    (s,) = run["samplings"]
    assert (s["label"], s["weights"], s["family"], s["node"]) == ("4-bit", "4-bit", "sd15", "sample")
    assert len(s["evaluations"]) == 5 and s["batches"] == [2] * 5 and s["tokens"] == 20
    assert s["shape"] == [1, 4, 16, 16] and s["dtype"] == "float32" and s["attention"] == "matrix"
    sample = by_title(run)["sample"]
    assert sample["exact"] and sample["steps"] == s["evaluations"]
    assert sum(s["evaluations"]) + s["load_seconds"] <= s["seconds"] <= sample["elapsed"]
    known = set(reports(server))
    alone = with_model(sampled(nibble(tiny_model[1]), steps=3, seed=20), "alone")
    server.done(alone)  # without a profiler the run is saved, too
    assert len(newest(server, known)["samplings"][0]["evaluations"]) == 3


def test_recording_changes_no_bit(server, tiny_model):
    plain = sampled(nibble(tiny_model[1]), seed=21)
    one = server.latent(server.done(plain), "save")
    two = server.latent(server.done(profiled(with_model(sampled(nibble(tiny_model[1]), seed=21), ""), "same")), "save")
    assert (one == two).all()


def test_runs_are_compared(server, tiny_model):
    names = []
    for name, label in zip(tiny_model, ("16-bit", "4-bit"), strict=True):
        result = server.done(profiled(with_model(sampled(nibble(name), seed=22), label), label))
        names.append(result.outputs["profile"]["nibble_run"][0]["file"]["filename"])
    graph = {"c": node("NibbleCompareProfiles", first=names[0], second=names[1], third="none", fourth="none"),
             "i": node("SaveImage", images=["c", 2], filename_prefix="compared")}  # fmt: skip
    result = server.done(graph)
    table = result.text("c")
    assert "| measure | 16-bit | 4-bit | 4-bit / 16-bit |" in table
    ratio = float(next(line for line in table.splitlines() if line.startswith("| model weights")).split("|")[-2])
    expected = [
        json.loads((server.base / "output/nibble" / n).read_text())["samplings"][0]["weight_bytes"] for n in names
    ]
    assert ratio == pytest.approx(expected[1] / expected[0], abs=0.006) and ratio < 0.5
    assert server.image(result, "i").std() > 0.05
    graph["c"]["inputs"] |= dict(first="the run before it", second="the newest run")  # the same two, in this order
    assert server.done(graph).text("c") == table
    bad = server.post("/prompt", {"prompt": {"c": node("NibbleCompareProfiles", first="../x.json", second=names[0],
                      third="none", fourth="none")}, "client_id": server.client})  # fmt: skip
    assert bad["http"] == 400


def test_odd_graphs(inside, tmp_path):
    """Async, expanding, lazy, failing and interrupted nodes, two profilers, no cache: in ComfyUI's own executor."""
    found = inside("profiling_graph", tmp_path)

    def nodes(name):
        (report,) = found[name]["reports"]
        total = sum(n["seconds"] for n in report["nodes"]) + report["between"]
        assert total == pytest.approx(report["seconds"], rel=1e-6), name
        return {n["id"]: n for n in report["nodes"]}, report

    chain, report = nodes("chain")
    assert chain["a"]["seconds"] >= 0.2 and len(chain["b"]["steps"]) == 4 and chain["b"]["seconds"] >= 0.4
    assert report["seconds"] == pytest.approx(found["chain"]["wall"], rel=0.05, abs=0.1)
    again, _ = nodes("again")
    assert again["a"]["state"] == again["b"]["state"] == "cached"
    waits, _ = nodes("async")  # two at once: each was open for its whole time, and only one is charged with it
    assert waits["a"]["elapsed"] >= 0.4 and waits["b"]["elapsed"] >= 0.4
    assert sum(waits[n]["seconds"] for n in "ab") < 0.75 * sum(waits[n]["elapsed"] for n in "ab")
    assert waits["k"]["state"] == "ran"
    expanded, _ = nodes("expand")
    assert expanded["a"]["elapsed"] >= max(0.4, 2 * expanded["a"]["seconds"]) and len(expanded) == 4
    assert all(n["title"] == "Expand / Sleep" for id, n in expanded.items() if id.startswith("a."))
    lazy, _ = nodes("lazy")
    assert (lazy["x"]["state"], lazy["y"]["state"]) == ("ran", "not run") and lazy["a"]["seconds"] < lazy["a"][
        "elapsed"
    ]
    assert nodes("beside")[0]["k"]["state"] == "ran" and nodes("refused")[0]["k"]["state"] == "not run"
    for name, stopped in (("fails", "f"), ("fails_beside", "f"), ("interrupt", "i")):
        cut, report = nodes(name)
        assert report["state"] == "stopped" and cut[stopped]["state"] == "stopped" and cut["a"]["state"] == "ran"
        assert cut[stopped]["seconds"] >= 0.2
    after, report = nodes("after")
    assert report["state"] == "complete" and {n["state"] for n in after.values()} == {"ran"}
    assert nodes("no_cache")[0]["a"]["state"] == "not timed"
    assert len(nodes("two")[0]) == 3 and found["without"]["reports"] == []
    assert nodes("broken")[0]["a"]["state"] == "ran"  # whatever another node's schema does
    assert "execution_success" in found["sabotage"]["messages"]  # and whatever the recorder does
