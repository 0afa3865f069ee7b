"""Prompt Set in a real server: files of the input folder, what they give, and what is said when they are not there."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "api" / "prompt-set.json"


def graph(**changes) -> dict:
    given = {"set": "text", "file": "", "domain": "any", "words": "", "calibration_count": 4, "evaluation_count": 3,
             "seed": 0} | changes  # fmt: skip
    return {
        "set": {"class_type": "NibblePromptSet", "inputs": given},
        "calibration": {"class_type": "PreviewAny", "inputs": {"source": ["set", 0]}},
        "list": {"class_type": "PreviewAny", "inputs": {"source": ["set", 1]}},
        "lines": {"class_type": "PreviewAny", "inputs": {"source": ["set", 2]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["set", 3]}},
    }


@pytest.fixture(scope="module")
def folder(server):
    path = server.base / "input" / "sets"
    path.mkdir(parents=True, exist_ok=True)
    (path / "mine.txt").write_text("\n".join(f"picture {i}" for i in range(20)), encoding="utf-8")
    return path


def test_the_workflow_on_a_file_as_it_is_published(server):
    """Without the file it says where it is; with it, food for calibrating, other food for evaluating."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    file = server.base / "input" / "meta_data.json"
    file.unlink(missing_ok=True)
    said = server.run(workflow).error
    assert "input/meta_data.json is not there. MJHQ-30K is published at https://huggingface.co/datasets/" in said
    rows = {
        f"{kind}{i}": {"category": kind, "prompt": f"{kind} number {i}"} for kind in ("food", "art") for i in range(20)
    }
    file.write_text(json.dumps(rows), encoding="utf-8")
    result = server.done(workflow)  # the file is there now: the node runs again
    calibration, evaluation = (result.text(id).splitlines() for id in ("2", "3"))
    assert len(calibration) == 8 and len(evaluation) == 12
    assert not {*calibration} & {*evaluation} and all(p.startswith("food") for p in calibration + evaluation)
    assert "| of the domain and words | 20 |" in result.text("4")
    file.unlink()


def test_lists_lines_and_seeds(server, folder):
    result = server.done(graph(file="sets/mine.txt"))
    lines = result.text("lines").splitlines()
    assert result.outputs["list"]["text"] == lines and len(lines) == 3
    assert len(result.text("calibration").splitlines()) == 4
    other = server.done(graph(file="sets/mine.txt", seed=1))
    assert other.text("calibration") != result.text("calibration")
    assert "for evaluation | 3" in result.text("report")


@pytest.mark.parametrize("name", ["../server.log", "/etc/hostname", "sets", "sets/../../server.log", "sets/mine.txt\0"])
def test_names_outside_the_input_folder_are_not_read(name, server, folder):
    said = server.run(graph(file=name)).error
    assert "is not there. It is a file of your own (text)" in said


WORDS = ["a café — “crème brûlée”", "l’été"]  # noqa: RUF001 - as word processors write


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_a_file_gives_the_same_prompts_whatever_wrote_it(encoding, server, folder):
    """Prompt Set and Calibration Prompts, on one file with the line ends of Windows."""
    name = f"sets-{encoding}.txt"
    (server.base / "input" / name).write_bytes("\r\n".join(WORDS).encode(encoding))
    given = {"source": name, "count": 2, "seed": 0}
    nodes = graph(file=name) | {
        "prompts": {"class_type": "NibbleCalibrationPrompts", "inputs": given},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["prompts", 0]}},
    }
    result = server.done(nodes)
    assert sorted(result.text("text").split("\n")) == sorted(result.text("calibration").split("\n")) == WORDS


def test_a_list_that_is_no_text_or_empty_is_refused(server):
    for name, data, words in (
        ("sets-zip.txt", b"PK\x03\x04\0\0", "sets-zip.txt, line 1: this is no text"),
        ("sets-empty.txt", b"\r\n", "sets-empty.txt: there is no prompt in it"),
    ):
        (server.base / "input" / name).write_bytes(data)
        nodes = {
            "prompts": {"class_type": "NibbleCalibrationPrompts", "inputs": {"source": name, "count": 2, "seed": 0}},
            "text": {"class_type": "PreviewAny", "inputs": {"source": ["prompts", 0]}},
        }
        assert words in server.run(nodes).error


def test_what_is_wrong_is_said_in_one_sentence(server, folder):
    assert (
        "mine.txt cannot be read as MJHQ-30K: line 1: it is not JSON"
        in server.run(graph(set="MJHQ-30K", file="sets/mine.txt")).error
    )
    said = server.run(graph(file="sets/mine.txt", words="cat")).error
    assert "none of the 20 prompts has any of the words. Choose another domain or words" in said
