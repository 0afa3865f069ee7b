"""Domains in a real ComfyUI: prompts, lists, saving one's own, records in saved pictures, and real tokenizers."""

import json
import re
import sys
from pathlib import Path

import pytest
from comfyui_nibble.families.spec import MAX_TOKENS
from comfyui_nibble.prompts import batch, domain, expand, record
from comfyui_nibble.prompts.spec import PROSE, TAGS
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import prompt_graphs
from prompt_graphs import MINE, graph, prompt_node

own = prompt_graphs.own


def listed(server, node: str = "NibbleDomainPrompt") -> list[str]:
    return server.get(f"/object_info/{node}")[node]["input"]["required"]["domain"][1]["options"]


def test_real_tokenizers(inside):
    """1,000 samples of each domain: tags fit CLIP's window, prose T5's; the core's count is never too low."""
    found = inside("prompt_tokens")
    assert found["low"] == []
    for key, tokens in found["longest"].items():
        assert tokens <= MAX_TOKENS[TAGS if f" {TAGS}" in key else PROSE], key
    assert found["excess"] < 1.2
    assert found["golden"] == expand.expand(domain.load("food"), "a pear", 3)


def test_a_prompt_is_the_same_as_outside(server):
    result = server.done(graph(prompt_node(overrides="light: candle"), 0, 1, 2))
    expected = expand.resolve(domain.load("food"), "a pear", 3, "tags", {"light": "candle"})
    assert result.text("show0") == expected.positive
    assert result.text("show1") == expected.negative
    told = json.loads(result.text("show2"))
    assert (told["domain"], told["hash"]) == ("food@1", domain.load("food").hash)
    assert told["chosen"]["light"] == "candle" and told["seed"] == 3


def test_trigger_words_are_added_for_a_family(server):
    text = server.done(graph(prompt_node(domain="childrens-book@1", triggers="sdxl"), 0)).text("show0")
    assert text.endswith(", KidsRedmAF")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"overrides": "lite: x"}, "food@1 has no slot 'lite'; its slots are serving, table"),
        ({"overrides": "x"}, "overrides, line 1: 'x' is not 'slot: choice'"),
        ({"subject": "x" * 2001}, "the subject has 2001 characters; at most 2000 are allowed"),
        ({"subject": " "}, "the subject is empty; say what the picture shows"),
    ],
)
def test_one_sentence_for_what_is_wrong(changed, words, server):
    result = server.run(graph(prompt_node(**changed), 0))
    assert result.status == "error" and words in result.error
    assert len(result.error.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["../../etc/passwd", "user/../../../etc/passwd", "food", "user/gone", "food@1\0"])
def test_names_outside_the_list_never_reach_a_file(name, server):
    reply = server.post("/prompt", {"prompt": graph(prompt_node(domain=name), 0)})
    assert reply["http"] == 400 and "not in list" in str(reply)


def test_domains_of_ones_own_override_nothing(server, own):
    """A file named as a shipped domain stands beside it; a changed file is read again."""
    choice = own("food@1", MINE)
    assert choice == "user/food@1" and {"food@1", choice} <= set(listed(server))
    text = server.done(graph(prompt_node(domain=choice, overrides="time: noon"), 0)).text("show0")
    assert text == "photo of a pear, noon"
    own("food@1", MINE.replace("photo of", "drawing of"))
    text = server.done(graph(prompt_node(domain=choice, overrides="time: noon"), 0)).text("show0")
    assert text == "drawing of a pear, noon"
    shipped = server.done(graph(prompt_node(), 0)).text("show0")
    assert shipped == expand.expand(domain.load("food"), "a pear", 3, "tags")


def test_a_broken_file_is_one_sentence(server, own):
    choice = own("broken", MINE + "evil: !!python/object/apply:os.system ['id']\n")
    result = server.run(graph(prompt_node(domain=choice), 0))
    assert "broken.yaml, line 13: tags (!) are not allowed" in result.error
    assert str(server.base) not in result.error
    assert server.get("/system_stats")


def test_two_folders_with_the_same_name_are_an_error(server, own):
    choice = own("twice", MINE)
    saved = server.base / "output" / "nibble_domains"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "twice.yaml").write_text(MINE)
    result = server.run(graph(prompt_node(domain=choice), 0))
    assert "twice.yaml is in 2 nibble_domains folders; rename all but one" in result.error
    (saved / "twice.yaml").unlink()


def test_a_list_of_prompts(server):
    node = {"class_type": "NibblePromptList", "inputs": dict(
        domain="emoji@1", subjects="", count=12, seed=5, style="tags", overrides="")}  # fmt: skip
    result = server.done(graph(node, 2, 3))
    expected = [p.positive for p in batch.unique(domain.load("emoji"), 12, 5, "tags")]
    assert result.text("show2").splitlines() == expected and result.text("show3") == "12"
    node["inputs"] |= dict(subjects="fox\n\n owl ", count=0)
    result = server.done(graph(node, 2))
    assert len(result.text("show2").splitlines()) == 8
    listed_out = server.done({"n": node, "all": {"class_type": "PreviewAny", "inputs": {"source": ["n", 0]}}})
    assert len(listed_out.outputs["all"]["text"]) == 8


def picture(node: dict, width: int = 64) -> dict:
    """A graph that saves a picture which waits for the prompt, as a sampled one does: its height is the text's."""
    return {
        "n": node,
        "length": {"class_type": "StringLength", "inputs": {"string": ["n", 0]}},
        "image": {"class_type": "EmptyImage", "inputs": dict(width=width, height=["length", 0], batch_size=1, color=0)},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["image", 0], "filename_prefix": "prompts"}},
    }  # fmt: skip


def saved_png(server, result):
    entry = result.outputs["save"]["images"][0]
    return server.base / entry["type"] / entry["subfolder"] / entry["filename"]


def test_the_prompt_is_read_back_from_the_png(server):
    """Also from a second picture, for which the domain node came from ComfyUI's cache."""
    node = prompt_node(subject="a quince {light}", seed=11)
    for width, cached in ((64, False), (72, True), (80, True)):
        result = server.done(picture(node, width))
        from_cache = next(data["nodes"] for kind, data in result.messages if kind == "execution_cached")
        assert ("n" in from_cache) == cached
        found = record.read(saved_png(server, result))["n"]
        d = domain.load(found["domain"])
        again = expand.resolve(d, found["subject"], found["seed"], found["style"], found["overrides"])
        assert again.positive == found["positive"] == expand.expand(d, "a quince {light}", 11, "tags")
        assert again.hash == found["hash"] and d.version == 1


def test_the_record_is_ordinary_metadata_and_tells_no_paths(server):
    """An entry beside ComfyUI's own, so --disable-metadata leaves it out as well."""
    path = saved_png(server, server.done(picture(prompt_node(seed=12))))
    with Image.open(path) as opened:
        assert {"prompt", record.KEY} <= set(opened.info)
        assert str(server.base) not in str(opened.info)


def save_node(**changed) -> dict:
    inputs = dict(chosen=["n", 2], name="my-food", title="My food", keep="choices open", family="sd15")
    return {"class_type": "NibbleSaveDomain", "inputs": {**inputs, **changed}}


def test_what_the_graph_does_is_saved_and_works_at_once(server):
    workflow = graph(prompt_node(overrides="light: candle\ngarnish:"), 0) | {
        "save": save_node(),
        "latent": {"class_type": "EmptyLatentImage", "inputs": dict(width=320, height=256, batch_size=1)},
        "count": {"class_type": "LatentBatch", "inputs": {"samples1": ["latent", 0], "samples2": ["latent", 0]}},
    }
    result = server.done(workflow)
    file = result.text("save")
    assert re.fullmatch(r"nibble_domains/my-food_\d+_\.yaml", file)
    path = server.base / "output" / file
    mine = domain.load_file(path)
    assert (mine.id, mine.title, mine.based_on) == ("my-food@1", "My food", "food@1")
    assert mine.size("sd15") == (320, 256) and not {"light", "garnish"} & set(mine.slots)
    choice = f"user/{path.stem}"
    assert choice in listed(server)
    again = server.done(graph(prompt_node(domain=choice), 0)).text("show0")
    assert again == result.text("show0")
    exact = graph(prompt_node(), 0) | {"save": save_node(keep="exactly this prompt", name="exact")}
    result = server.done(exact)
    frozen = domain.load_file(server.base / "output" / result.text("save"))
    assert not frozen.slots
    assert expand.expand(frozen, "a pear", 99, "tags") == result.text("show0")
    assert not list((server.base / "output").rglob("*.part"))


def test_a_graphs_loras_go_with_it(server):
    workflow = graph(prompt_node(), 0) | {"save": save_node(name="inked")}
    workflow["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": dict(
        model=["m", 0], lora_name="styles/ink wash.safetensors", strength_model=0.75)}  # fmt: skip
    workflow["m"] = {"class_type": "UNETLoader", "inputs": dict(unet_name="gone.safetensors", weight_dtype="default")}
    text = server.done(workflow).text("save")
    lora = domain.load_file(server.base / "output" / text).loras[-1]
    assert (lora.file, lora.family, lora.strength) == ("ink wash.safetensors", "sd15", 0.75)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "../../escaped"}, "../../escaped.yaml: id: '../../escaped@1' is not name@version"),
        ({"name": ""}, "id: '@1' is not name@version"),
        ({"title": "x" * 700}, "title: must be a text of 1 to 600 characters"),
        ({"family": "auto"}, "say which model family this graph's LoRAs and picture size are for; set 'family'"),
    ],
)
def test_nothing_is_saved_that_would_not_load(changed, words, server):
    before = sorted((server.base / "output").rglob("*.yaml"))
    workflow = graph(prompt_node(), 0) | {"save": save_node(**changed)}
    workflow["latent"] = {"class_type": "EmptyLatentImage", "inputs": dict(width=320, height=256, batch_size=1)}
    result = server.run(workflow)
    assert result.status == "error" and words in result.error
    assert sorted((server.base / "output").rglob("*.yaml")) == before
    assert not list(server.base.parent.rglob("*escaped*"))


def test_hostile_requests_pass_through(inside):
    """The handler that makes room for records meets diamonds, circles and rubbish, and leaves requests as they are."""
    found = inside("prompt_requests")
    room = {"nibble": {}}
    workflow = {"workflow": {"id": 1}, **room}
    assert found["places"] == [room, room, room, room, workflow, room, room, "y", "x", None, None, None, None]
    assert found["same"] and not found["other"]
