"""The charts: deterministic, complete, and readable at 512 pixels."""

from dataclasses import replace

import numpy as np
import pytest
from comfyui_nibble.profiling import chart, compare, timeline
from comfyui_nibble.profiling.memory import Device, Peaks
from comfyui_nibble.profiling.report import Node, Point, Run, Sampling
from PIL import ImageFont

CARD = Device("a card", "cuda", 8 * 2**30)


def node(id, start, seconds, kind="other", state="ran", **more) -> Node:
    return Node(id, f"Node {id}", kind, state, start, seconds, more.pop("elapsed", seconds), **more)


def run(scale=1.0, limit=8 * 2**30, label="a run") -> Run:
    nodes = (
        node("1", 0, 1 * scale, "load"),
        node("2", scale, 3 * scale, "sample", steps=(scale, scale, scale), peaks=Peaks(process=2**31)),
        node("3", 4 * scale, 0.5 * scale, "vae"),
        Node("4", "Cached", "text", "cached"),
    )
    curve = tuple(Point(i * scale / 10, int(2**31 * (i / 45)), 2**30) for i in range(46))
    samplings = (Sampling("2", "m", "sd15", "float16", "fused", "4-bit", 1000, 2000, (1, 4, 8, 8), 77, 0.1 * scale,
                          3 * scale, (scale, scale), (2, 2)),)  # fmt: skip
    return Run(label, "complete", replace(CARD, limit=limit), 4.6 * scale, 0.1 * scale, 0.0, nodes, samplings, curve)


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def count(image, colour, tolerance=0) -> int:
    return int((np.abs(pixels(image) - np.array(colour)).max(-1) <= tolerance).sum())


def test_same_run_same_picture():
    assert (pixels(timeline.timeline(run())) == pixels(timeline.timeline(run()))).all()


def test_bars_are_as_long_as_the_nodes_took():
    image = timeline.timeline(run())
    load, sample = (count(image, timeline.COLOUR[k]) for k in ("load", "sample"))
    assert sample > 2.2 * load > 0  # three times the seconds, less ticks and text


def test_the_limit_is_drawn_whether_near_or_far():
    near, far = timeline.timeline(run(limit=3 * 2**30)), timeline.timeline(run(limit=2**40))
    for image in (near, far):
        assert count(image, timeline.LIMIT) > 1000
    assert count(timeline.timeline(run(limit=0)), timeline.LIMIT) == 0


def test_text_is_readable_at_512_pixels():
    """At half the size the smallest letters are still 11 pixels high, and dark letters stay dark."""
    image = timeline.timeline(run())
    assert image.width == 2 * 512 and min(timeline.TEXT, timeline.SMALL, timeline.TITLE) / 2 >= 11
    half = pixels(image.resize((512, image.height // 2)))
    title = half[10:34, 10:200].sum(-1)
    assert title.min() < 3 * 90 and (title < 3 * 128).sum() > 150


def test_many_nodes_do_not_make_a_tower():
    nodes = tuple(node(str(i), i, 1.0 - i / 1000) for i in range(200))
    image = timeline.timeline(replace(run(), nodes=nodes, seconds=200.0))
    assert image.height < 1400


@pytest.mark.parametrize("change", [
    dict(nodes=()), dict(curve=()), dict(seconds=0.0, nodes=(), curve=()), dict(state="stopped"),
    dict(label="x" * 500), dict(nodes=(node("long " * 50, 0, 4.6, state="stopped"),)),
])  # fmt: skip
def test_odd_runs_are_drawn_too(change):
    assert timeline.timeline(replace(run(), **change)).width == timeline.WIDTH


def test_a_comparison_gives_ratios_to_the_first():
    text = compare.markdown([run(), run(0.5, label="b")], ["a", "b"])
    assert "| measure | a | b | b / a |" in text
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines()[2:]}
    assert rows["whole run"] == rows["sample"] == rows["evaluation"] == "0.50" and rows["model weights"] == "1.00"
    csv = compare.to_csv([run(), run(0.5)], ["a", "=b"]).splitlines()
    assert csv[0] == "measure,unit,a,'=b,'=b ratio" and csv[1].endswith(",0.5")


def test_differences_that_matter_are_said():
    other = replace(run(), device=replace(CARD, name="other"))
    assert "different machines (a card, other)" in compare.markdown([run(), other], ["a", "b"])
    assert "stopped" in compare.markdown([run(), replace(run(), state="stopped")], ["a", "b"])
    with pytest.raises(ValueError, match="two runs"):
        compare.markdown([run()], ["a"])
    plain = replace(run(), samplings=())
    assert "| evaluation | 1.00 s | - | - |" in compare.markdown([run(), plain], ["a", "b"])


def test_labels_that_repeat_get_their_file_name():
    assert compare.names([run(), run(label="b"), run()], ["x", "y", "z"]) == ["a run (x)", "b", "a run (z)"]


def test_the_comparison_chart_shows_the_longer_run_longer():
    image = compare.chart([run(), run(0.5)], ["a", "b"])
    rows = (np.abs(pixels(image) - np.array(timeline.COLOUR["sample"])).max(-1) == 0).sum(1)
    lengths = sorted(set(rows[rows > 0]))
    assert image.width == timeline.WIDTH and lengths[-1] > 1.8 * lengths[0]


class Font:
    """A font of letters 10 pixels wide that counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def getlength(self, text: str) -> float:
        self.asked += 1
        return 10.0 * len(text)


@pytest.mark.parametrize(
    ("text", "fitted"),
    [
        ("0123456789", "0123456789"),
        ("0123456789a", "0123456..."),
        ("one\n two", "one two"),  # PIL refuses to measure two lines
        ("", ""),
        ("0123456  9abc", "0123456..."),
        ("x" * 200_000, "xxxxxxx..."),
        ("\ud800" * 11, "\ud800" * 7 + "..."),
    ],
)
def test_a_text_is_cut_to_its_width(text, fitted):
    assert chart.fit(text, Font(), 100.0) == fitted
    assert chart.fit(text, Font(), 5.0) in ("", "...")


@pytest.mark.parametrize("letters", [1_000, 200_000])
def test_a_long_label_is_measured_a_dozen_times(letters, monkeypatch):
    """One letter at a time took 30 s for 6,000 of them, and no interrupt is seen meanwhile."""
    longest, asked = 0, 0
    measure = ImageFont.FreeTypeFont.getlength

    def counted(self, text, *args, **kwargs):
        nonlocal longest, asked
        longest, asked = max(longest, len(text)), asked + 1
        return measure(self, text, *args, **kwargs)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", counted)
    label = "W\n" * letters
    timeline.timeline(replace(run(label=label), nodes=(replace(run().nodes[0], title=label),)))
    timeline.stacked(label, [(label, [("peak", 1.0)], "1 s")])
    chart.bars(label, [(label, 1.0, label, 0)])
    assert asked < 150 and longest < 1100
