"""A job by its node and by its command: one run, so one file. inside/same_job.py says what the two are handed alike."""

import pytest

# job: what only one of the two can know. A MODEL does not say from which file it came.
ALONE = {"calibrate": ["source_sha256"], "refine": [], "train": [], "distill": []}

TITLES = {"calibrate": None, "refine": "mine", "train": "same", "distill": "same"}  # the demo's folder has none


@pytest.mark.parametrize("job", ALONE)
def test_node_and_command_write_the_same_file(job, inside, tmp_path):
    found = inside("same_job", job, tmp_path)
    assert found.pop("tensors") >= 3 * 70
    assert found.pop("title") == TITLES[job]
    assert found == {
        "same places": True, "same bytes": True, "other metadata": [], "other in the record": ALONE[job]
    }  # fmt: skip
