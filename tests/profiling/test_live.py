"""The run recorder with a clock that the test turns: every moment is charged to exactly one node."""

import json

import pytest
from comfyui_nibble.profiling import report, tables
from comfyui_nibble.profiling.live import POINTS, About, RunRecorder, steps_of
from comfyui_nibble.profiling.memory import Device, HostProbe, Peaks, probe
from comfyui_nibble.profiling.report import Sampling


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Card:
    """A probe of an 8 GiB card whose use the test sets."""

    device = Device("a card", "cuda", 8 * 2**30)

    def __init__(self):
        self.peak = Peaks(1, 2, 3, 4)
        self.restarts = 0

    def wait(self):
        pass

    def restart(self):
        self.restarts += 1

    def read(self):
        return self.peak

    def used(self):
        return 10, Peaks(process=9, host=20)


@pytest.fixture
def recorder():
    clock = Clock()
    made = RunRecorder(Card(), clock, cpu=clock)
    made.clock = clock
    return made


def spend(recorder, seconds: float) -> None:
    recorder.clock.now += seconds


def run(recorder, *ids, label="run", **silent) -> report.Run:
    about = {id: About(id.upper()) for id in ids} | {id: About(id, silent=s) for id, s in silent.items()}
    return recorder.report(label, about, "0")


def test_sum_of_nodes_and_between_is_the_wall_time(recorder):
    spend(recorder, 0.5)
    for id, seconds in (("a", 1.0), ("b", 2.0)):
        recorder.start(id)
        spend(recorder, seconds)
        recorder.finish(id)
        spend(recorder, 0.25)
    recorder.stop()
    found = run(recorder, "a", "b")
    assert [n.seconds for n in found.nodes] == [1.0, 2.0] and found.between == 1.0 and found.seconds == 4.0
    assert found.state == "complete" and [n.start for n in found.nodes] == [0.5, 1.75]


def test_overlapping_nodes_are_charged_once(recorder):
    """a waits (async) while b runs: b is charged with its time, a with the rest of its own."""
    recorder.start("a")
    spend(recorder, 1)
    recorder.start("b")
    spend(recorder, 4)
    recorder.finish("b")
    spend(recorder, 2)
    recorder.finish("a")
    recorder.stop()
    a, b = run(recorder, "a", "b").nodes
    assert (a.seconds, a.elapsed) == (3.0, 7.0) and (b.seconds, b.elapsed) == (4.0, 4.0)


def test_a_node_that_starts_twice_adds_up(recorder):
    recorder.start("lazy")
    spend(recorder, 1)
    recorder.start("source")
    spend(recorder, 5)
    recorder.finish("source")
    recorder.start("lazy")
    spend(recorder, 2)
    recorder.finish("lazy")
    recorder.stop()
    lazy, source = run(recorder, "lazy", "source").nodes
    assert (lazy.seconds, lazy.elapsed, source.seconds) == (3.0, 8.0, 5.0)


def test_a_finish_without_start_is_a_cached_node(recorder):
    recorder.finish("c")
    recorder.stop()
    found = run(recorder, "c", quiet="cached", never="not run")
    assert [n.state for n in found.nodes] == ["cached", "cached", "not run"]


def test_what_is_open_at_the_end_was_stopped(recorder):
    recorder.start("a")
    spend(recorder, 3)
    recorder.stop()
    spend(recorder, 100)
    recorder.stop()
    found = run(recorder, "a")
    assert found.state == "stopped" and found.nodes[0].state == "stopped" and found.nodes[0].seconds == 3.0


def test_a_reporting_node_does_not_make_its_own_run_look_stopped(recorder):
    recorder.start("p")
    spend(recorder, 1)
    found = recorder.report("r", {"p": About("P", reporter=True)}, "0")
    assert found.state == "complete" and found.nodes[0].state == "ran"


def test_peaks_go_to_the_nodes_that_ran(recorder):
    recorder.start("a")
    recorder.probe.peak = Peaks(allocated=100, reserved=200, process=50, host=7)
    recorder.start("b")
    recorder.probe.peak = Peaks(allocated=10)
    recorder.finish("b")
    recorder.stop()
    a, b = run(recorder, "a", "b").nodes
    assert a.peaks == Peaks(100, 200, 50, 7) and b.peaks == Peaks(allocated=10)
    assert recorder.probe.restarts == 4


def test_the_driver_is_asked_while_a_node_runs(recorder):
    """NVML keeps no peak: what it showed between a node's start and end counts to that node, and only to it."""
    recorder.probe.peak = Peaks()
    recorder.start("a")
    recorder.sample()
    recorder.finish("a")
    recorder.start("b")
    recorder.finish("b")
    a, b = run(recorder, "a", "b").nodes
    assert a.peaks == Peaks(process=9, host=20) and b.peaks == Peaks()


def test_peaks_taken_by_a_model_are_not_lost(recorder):
    recorder.start("a")
    recorder.probe.peak = Peaks(allocated=99)
    recorder.take_peaks()
    recorder.probe.peak = Peaks(allocated=1)
    recorder.finish("a")
    assert run(recorder, "a").nodes[0].peaks.allocated == 99


def test_the_curve_keeps_its_length(recorder):
    waits = []
    for _ in range(4 * POINTS):
        spend(recorder, 0.05)
        waits.append(recorder.sample())
    found = run(recorder)
    assert POINTS / 2 <= len(found.curve) <= POINTS + 1 and waits[-1] > waits[0]
    times = [p.t for p in found.curve]
    assert times == sorted(times) and times[0] == 0.05 and (found.curve[0].device, found.curve[0].host) == (10, 20)


def test_steps_from_a_throttled_progress_bar():
    """Marks at 1, 2 and 5 steps: the last three share their time."""
    assert steps_of([(0, 0.0), (1, 2.0), (2, 3.0), (5, 6.0)]) == (2.0, 1.0, 1.0, 1.0, 1.0)
    assert steps_of([(0, 0.0)]) == () and steps_of([]) == ()


def test_progress_counts_only_forward_and_only_while_running(recorder):
    recorder.progress("a", 1)
    recorder.start("a")
    for value in (1, 1, 0.5, 2):
        spend(recorder, 1)
        recorder.progress("a", value)
    recorder.finish("a")
    recorder.progress("a", 9)
    assert run(recorder, "a").nodes[0].steps == (1.0, 3.0)


def sampling(**changes) -> Sampling:
    values = dict(node="a", label="4-bit", family="sd15", dtype="float32", attention="fused", weights="4-bit",
                  weight_bytes=10, parameters=5, shape=(1, 4, 8, 8), tokens=77, load_seconds=0.5, seconds=4.0,
                  evaluations=(2.0, 1.0, 0.5), batches=(2, 2, 2))  # fmt: skip
    return Sampling(**values | changes)


def test_measured_evaluations_replace_the_progress_bar(recorder):
    recorder.start("a")
    recorder.progress("a", 1)
    recorder.add(sampling())
    recorder.finish("a")
    node = run(recorder, "a").nodes[0]
    assert node.exact and node.steps == (2.0, 1.0, 0.5)


def test_warm_up_is_apart():
    assert (sampling().warm_up, sampling().steady) == (2.0, 0.75)
    assert (sampling(evaluations=(3.0,)).warm_up, sampling(evaluations=(3.0,)).steady) == (3.0, 3.0)
    assert sampling(evaluations=()).steady == 0.0


@pytest.fixture
def full(recorder):
    recorder.start("a")
    spend(recorder, 2)
    recorder.sample()
    recorder.add(sampling())
    recorder.finish("a")
    recorder.finish("c")
    recorder.stop()
    return recorder.report("full", {"a": About("KS|ampler", "sample"), "c": About("=C", "load")}, "0.1", "id")


def test_json_there_and_back(full):
    assert report.from_json(full.to_json()) == full


@pytest.mark.parametrize("change", [
    lambda d: d.update(format="other"), lambda d: d.pop("nodes"), lambda d: d.update(seconds="1"),
    lambda d: d.update(seconds=float("nan")), lambda d: d.update(extra=1), lambda d: d["nodes"][0].update(kind="x"),
    lambda d: d["nodes"][0].update(state="x"), lambda d: d.update(nodes={}), lambda d: d.update(device=[]),
    lambda d: d["nodes"][0]["peaks"].update(host=True),
])  # fmt: skip
def test_a_bad_report_is_refused_by_name(full, change):
    data = json.loads(full.to_json())
    change(data)
    with pytest.raises(ValueError, match=r"^x\.json: "):
        report.from_json(json.dumps(data), "x.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "[" * 100_000])
def test_no_report_at_all_is_refused(text):
    with pytest.raises(ValueError, match="the report: "):
        report.from_json(text)


def test_tables_say_what_the_run_holds(full):
    text = tables.markdown(full)
    assert "**full**: complete, 2.00 s on a card" in text
    assert "KS\\|ampler" in text and "3 x 1.17 s" in text and "| =C | load | cached |" in text
    assert "first (warm-up)" in text and "driver, this process" in text
    rows = tables.to_csv(full).splitlines()
    assert len(rows) == 3 and rows[2].split(",")[1] == "'=C"  # no formula for a spreadsheet


def test_models_are_compared_with_the_largest(recorder):
    """Whichever ran first."""
    recorder.add(sampling(label="small", weight_bytes=25, evaluations=(1.0, 3.0)))
    recorder.add(sampling(label="large", weight_bytes=100, evaluations=(1.0, 2.0)))
    large, small = tables.models(run(recorder))[2:]
    assert large.startswith("| large | 4-bit | 100 B | 1.00x |") and "| 2.00 s | 1.00x |" in large
    assert small.startswith("| small | 4-bit | 25 B | 0.25x |") and "| 3.00 s | 1.50x |" in small


def test_sizes_and_seconds_for_people():
    assert [tables.size(n) for n in (512, 3 * 2**20, 5 * 2**29)] == ["512 B", "3.0 MiB", "2.50 GiB"]
    assert [tables.seconds(t) for t in (0.00034, 0.0567, 1.234, 83)] == ["0.34 ms", "56.7 ms", "1.23 s", "83 s"]


def test_this_machine_can_be_asked():
    here = probe("cpu")
    assert isinstance(here, HostProbe) and here.device.limit > here.read().host > 2**20
    ballast = bytearray(64 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    device, now = here.used()
    assert device == now.host > 32 * 2**20 and now == Peaks(host=device)
