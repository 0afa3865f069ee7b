"""One server, many prompts: drawings, jobs that are stopped, prompts that fail. Nothing grows, and nothing changes.

The suite runs 26 prompts; ``pytest -m soak`` runs 200, prints its figures, and takes half an hour.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def shipped(name: str) -> dict:
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def only(workflow: dict, *outputs: str) -> dict:
    """``workflow`` without what none of ``outputs`` needs."""
    kept, queue = {}, list(outputs)
    while queue:
        id = queue.pop()
        if id not in kept:
            kept[id] = workflow[id]
            queue += [v[0] for v in workflow[id]["inputs"].values() if isinstance(v, list)]
    return kept


def draw(seed: int, steps: int = 2, precision: str = "4-bit") -> dict:
    out = shipped("quickstart")
    out["1"]["inputs"]["precision"] = precision
    out["5"]["inputs"] |= {"seed": seed, "steps": steps}
    out["7"]["inputs"]["filename_prefix"] = "soak/drawn"
    return out


def with_lora(seed: int, strength: float) -> dict:
    out, style = draw(seed), "nibble_demo_flat_style.safetensors"
    out["lora"] = {
        "class_type": "NibbleApplyLora",
        "inputs": dict(model=["1", 0], lora_name=style, strength_model=strength, strength_clip=0.0),
    }
    out["5"]["inputs"]["model"] = ["lora", 0]
    return out


def training(i: int) -> dict:
    out = only(shipped("train-lora"), "12")
    out["2"]["inputs"] |= {"steps": 100_000, "seed": i, "name": f"loras/soak-{i}"}
    return out


def calibration(i: int) -> dict:
    out = shipped("calibrate")
    job = next(id for id, n in out.items() if n["class_type"] == "NibbleCalibrate")
    out[job]["inputs"] |= {"preset": "fast", "noise_levels": 50, "seed": i}
    out["show"] = {"class_type": "PreviewAny", "inputs": {"source": [job, 1]}}
    return only(out, "show")


def start(i: int) -> dict:
    return {
        "1": {"class_type": "NibbleLoadDemo", "inputs": {"precision": "16-bit", "rank": 16}},
        "2": {"class_type": "NibbleLoftQ", "inputs": dict(
            model=["1", 0], name=f"loras/loftq-{i}", rank=16, base_rank=16, rounds=20)},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}},
    }  # fmt: skip


@dataclass
class Soak:
    """What was measured after each prompt. ``stops``: CPU seconds from an interrupt to the end of its prompt."""

    rss: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    stops: dict[str, list[float]] = field(default_factory=dict)
    pictures: list[np.ndarray] = field(default_factory=list)

    def look(self, pid: int) -> None:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        self.rss.append(int(status["VmRSS"].split()[0]) / 1024)
        self.threads.append(int(status["Threads"]))
        self.descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))

    def slope(self, start: int) -> float:
        """MiB a prompt, from prompt ``start`` on."""
        y = np.array(self.rss[start:])
        return float(np.polyfit(np.arange(len(y)), y, 1)[0])


def cpu(pid: int) -> float:
    """Seconds of a process so far: a stop is measured by its work, which a busy machine does not lengthen."""
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / TICK


JOBS = ("drawn", "lora", "LoftQ", "drawn", "train", "16-bit", "calibrate", "broken")
STOPPED = {"LoftQ": start, "train": training, "calibrate": calibration}


def soak(server, prompts: int) -> Soak:
    found, pid = Soak(), server.process.pid
    for i in range(prompts):
        job = JOBS[i % len(JOBS)]
        if job in STOPPED:
            stop(server, STOPPED[job](i), found.stops.setdefault(job, []))
        elif job == "broken":
            assert "strength_model" in server.run(with_lora(i, float("nan"))).error
        elif job == "drawn":
            found.pictures.append(server.image(server.done(draw(7)), "7"))
        else:
            server.done(with_lora(i, 0.5 + i / 1000) if job == "lora" else draw(i, precision="16-bit"))
        found.look(pid)
    return found


def stop(server, workflow: dict, seconds: list[float]) -> None:
    prompt, pid = server.queue(workflow), server.process.pid
    began, end = cpu(pid), time.monotonic() + 120
    while cpu(pid) - began < 2.0 and time.monotonic() < end:  # well into its work
        time.sleep(0.05)
    before = cpu(pid)
    server.post("/interrupt", {})
    result = server.wait(prompt, 120)
    seconds.append(cpu(pid) - before)
    assert any(kind == "execution_interrupted" for kind, _ in result.messages), result.messages[-1]


def check(server, found: Soak, settled: int, slope: float) -> None:
    print(json.dumps({"MiB a prompt": round(found.slope(settled), 3), "RSS": [round(r) for r in found.rss[::10]],
                      "CPU seconds to stop": {k: round(max(v), 2) for k, v in found.stops.items()},
                      "descriptors": sorted(set(found.descriptors[settled:])),
                      "threads": sorted(set(found.threads[settled:]))}))  # fmt: skip
    assert all(np.array_equal(p, found.pictures[0]) for p in found.pictures)
    assert found.slope(settled) < slope
    assert max(found.descriptors[settled:]) <= max(found.descriptors[:settled])
    assert max(found.threads[settled:]) <= max(found.threads[:settled])
    assert max(max(v) for v in found.stops.values()) < 1.0, found.stops
    hooks = server.done({"1": draw(0)["1"], "hooks": {"class_type": "NibbleTestHooks", "inputs": {"model": ["1", 0]}}})
    assert hooks.text("hooks") == "0"
    assert not list(server.base.rglob("*.part"))


def test_a_short_soak(own_server):
    check(own_server, soak(own_server, 26), settled=10, slope=3.0)


@pytest.mark.soak
def test_a_long_soak(own_server):
    check(own_server, soak(own_server, 200), settled=30, slope=0.2)
