"""Constants that find themselves again, and never ones of another machine."""

import json
from dataclasses import replace

import numpy as np
import pytest
from comfyui_nibble.profiling import calibrate, work
from comfyui_nibble.profiling.calibrate import Key, Measurement

KEY = Key("comfyui", "sd15", "float32", "fused", "16-bit", "a machine")


def measured(true: calibrate.Constants, noise: float = 0.0) -> list[Measurement]:
    rng = np.random.default_rng(0)
    out = []
    for side in (512, 768, 1024):
        pixels, flops, live = side**2, 3_000_000 * side**2, 900 * side**2
        for n in (2, 6):
            stretch = 1 + noise * rng.standard_normal()
            out.append(Measurement(pixels, flops, live, true.activation(live), n,
                                   true.seconds(pixels, flops, n) * stretch))  # fmt: skip
    return out


TRUE = calibrate.Constants(KEY, 5e6, 1.2, 0.3, 2e-7, 0.05, 4e12, 6)


def test_a_fit_finds_the_constants_again():
    found = calibrate.fit(KEY, measured(TRUE))
    for name in ("activation_fixed", "activation_factor", "run_fixed", "run_per_pixel", "evaluation_fixed",
                 "flops_per_second"):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert found.time_error < 1e-6 and found.memory_error < 1e-6 and found.runs == 6
    assert (found.flops_least, found.flops_most) == (3_000_000 * 512**2, 3_000_000 * 1024**2)


def test_a_noisy_fit_predicts_steps_it_never_saw():
    """Fitted on 2 and 6 steps of times that vary by 4 %, 4 and 10 steps are within 15 %."""
    found = calibrate.fit(KEY, measured(TRUE, noise=0.04))
    for m in measured(TRUE):
        for n in (4, 10):
            truth = TRUE.seconds(m.pixels, m.flops, n)
            assert found.seconds(m.pixels, m.flops, n) == pytest.approx(truth, rel=0.15)
    assert 0 < found.time_error < 0.15


def test_constants_are_never_negative_and_speed_is_finite():
    """Times that shrink with size would want a negative constant."""
    odd = [Measurement(10, 1000, 10, 0, 2, 5.0), Measurement(1000, 100_000, 10, 0, 2, 1.0)]
    found = calibrate.fit(KEY, odd)
    values = (found.run_fixed, found.run_per_pixel, found.evaluation_fixed, 1 / found.flops_per_second)
    assert all(v >= 0 for v in values) and values[-1] > 0
    assert (found.memory_error, found.activation_factor, found.activation_fixed) == (-1.0, 1.0, 0.0)


def test_one_run_is_explained_exactly():
    found = calibrate.fit(KEY, [Measurement(100, 10**9, 10, 20, 4, 8.0)])
    assert found.seconds(100, 10**9, 4) == pytest.approx(8.0) and found.activation(10) == 20


def test_nothing_to_fit_is_said():
    with pytest.raises(ValueError, match="no measured run of sd15"):
        calibrate.fit(KEY, [])
    with pytest.raises(ValueError, match="took no time"):
        calibrate.fit(KEY, [Measurement(1, 1, 1, 1, 1, 0.0)])


def test_calibrations_there_and_back_and_bad_ones_refused():
    rows = [TRUE, calibrate.fit(KEY, measured(TRUE))]
    assert calibrate.from_json(calibrate.to_json(rows)) == rows
    data = json.loads(calibrate.to_json(rows))
    for change in (lambda d: d.update(format="x"), lambda d: d["rows"][0].update(flops_per_second=0.0),
                   lambda d: d["rows"][0]["key"].update(extra="x"), lambda d: d.update(rows=3)):  # fmt: skip
        bad = json.loads(json.dumps(data))
        change(bad)
        with pytest.raises(ValueError, match=r"^c\.json: it is not a calibration"):
            calibrate.from_json(json.dumps(bad), "c.json")


def test_shipped_constants_are_read_and_sound(monkeypatch, tmp_path):
    """Those of this pack, where it ships any, and a file put in their place."""
    for row in calibrate.shipped():
        assert row.key.engine in calibrate.ENGINES and row.key.attention in work.KINDS and row.runs >= 2
        assert row.memory_error < 0.15 and row.time_error < 0.3
    monkeypatch.setattr(calibrate, "SHIPPED", tmp_path / "constants.json")
    assert calibrate.shipped() == []
    calibrate.SHIPPED.write_text(calibrate.to_json([TRUE]))
    assert calibrate.shipped() == [TRUE]


def test_constants_of_another_machine_or_family_are_not_used():
    rows = [TRUE]
    assert calibrate.find(rows, KEY)[0] is TRUE
    assert calibrate.find(rows, replace(KEY, weights="4-bit"))[0] is TRUE  # said in words
    assert "16-bit weights" in calibrate.find(rows, replace(KEY, weights="4-bit"))[1]
    found, how = calibrate.find(rows, replace(KEY, engine="diffusers"))
    assert found is TRUE and how.endswith("in comfyui")
    other = replace(TRUE, key=replace(KEY, engine="diffusers", weights="4-bit"))
    assert calibrate.find([TRUE, other], replace(KEY, weights="4-bit"))[0] is TRUE  # the engine matters more
    for other in (dict(device="b"), dict(family="flux"), dict(dtype="float16"), dict(attention="matrix")):
        found, how = calibrate.find(rows, replace(KEY, **other))
        assert found is None and "was measured" in how
    assert calibrate.find([TRUE, replace(TRUE, runs=9)], KEY)[0].runs == 9  # the newest counts
