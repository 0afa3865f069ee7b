"""10,000 hostile inputs: nothing is evaluated, no file outside the domain folders is opened, no cap is passed.

An audit hook sees every open, exec, compile, import and socket that Python does; it cannot be taken out again, so it
looks only while `watched` is on.
"""

import contextlib
import random
import sys

import pytest
import yaml
from comfyui_nibble.prompts import bake, batch, domain, expand, graph, reader, record, schema, text, tokens
from comfyui_nibble.prompts.reader import DomainError
from comfyui_nibble.reading import textfile

PIECES = [
    "{subject}", "{light}", "{0}", "{0.__class__.__mro__}", "{subject.__class__}", "{subject!r:>9999999}",
    "{a|b|{c|d}}", "{{7*7}}", "{%import os%}", "{% for i in range(10**9) %}x{% endfor "
    "%}", "${jndi:ldap://x}", "$(id)", "`id`", "%s%n",
    "__import__('os').system('id')", "__colours__", "__../../../../etc/passwd__", "<lora:x:1>", "embedding:../../x",
    "file:///etc/passwd", "lists/colours.txt", "..\\..\\windows\\win.ini", "{" * 200, "}" * 200, "{{" * 99 + "}}" * 98,
    "((((((((", ":1e999)", "\x00", "\x1b[2J", "\u202eevil\u202c", "\u2066x\u2069", "\ufeff", "\u200b", "\ud800",
    "\U000e0041", "\n---\n", "\n!!python/object/apply:os.system ['id']\n", "&a [*a, *a]", "*a", "<<: *a", "? [",
    "!!binary aGk=", "- - - - -", "x: y: z", "\t", "'", '"', "\\", "#", "\u0130\u023a\ufb01",
    "\U0001f469\u200d\U0001f680", "e\u0301" * 50, "\u0d4d" * 90, "a" * 1999, " " * 500, ",", ".", "1" * 400,
]  # fmt: skip
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n"
seen: list[str] = []
on = False


def hook(event, args):
    if on and event.split(".")[0] in ("open", "exec", "compile", "import", "os", "subprocess", "socket", "ctypes"):
        seen.append(f"{event} {args[:1]}")


@pytest.fixture(scope="module")
def watched():
    """watched() as a context: what the code inside opened, ran or imported is in the list it gives."""
    sys.addaudithook(hook)
    domain.load("food")
    tokens.clip_bound("warm up")
    textfile.decoded(b"\xe9", "warm-up")

    @contextlib.contextmanager
    def watch():
        global on
        seen.clear()
        on = True
        try:
            yield seen
        finally:
            on = False

    return watch


def hostile(count: int, seed: int):
    rng = random.Random(seed)
    for i in range(count):
        if i % 500 == 0:
            yield "x{subject}" * 100_000  # a megabyte
        else:
            yield "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))


def test_the_watch_sees(watched, tmp_path):
    (tmp_path / "x").write_text("y")
    with watched() as events:
        (tmp_path / "x").read_text()
        compile("1 + 1", "x", "eval")
    assert {e.split()[0] for e in events} >= {"open", "compile"}


def test_six_thousand_hostile_subjects_and_overrides(watched, small):
    food, refused = domain.load("food"), 0
    with watched() as events:
        for i, words in enumerate(hostile(6000, 1)):
            where = (small, food)[i % 2]
            slot = where.order[i % len(where.order)]
            try:
                prompt = expand.resolve(where, words, i, ("tags", "prose")[i // 2 % 2], {slot: words})
            except DomainError as e:
                refused += 1
                assert "the subject" in str(e) or f"{slot!r}" in str(e)
                assert len(str(e)) < 200
                continue
            clean = text.clean(words)
            assert clean in prompt.positive and prompt.subject == clean
            assert not text.HIDDEN.search(prompt.positive) and "\n" not in prompt.positive
            assert len(prompt.positive) <= expand.MAX_PROMPT
            assert prompt.chosen[slot] == clean
    assert events == []
    assert 12 <= refused < 3000


def test_two_thousand_hostile_lines_records_and_graphs(watched, small):
    with watched() as events:
        for i, words in enumerate(hostile(2000, 2)):
            with contextlib.suppress(DomainError):
                expand.resolve(small, "x", i, overrides=expand.parse_overrides(words))
            with contextlib.suppress(DomainError):
                record.parse(words)
            with contextlib.suppress(DomainError):
                domain.load(words)
            assert graph.size({words: {"class_type": words, "inputs": {"width": words}}}) is None
            found = graph.loras({"1": {"inputs": {"lora_name": words + ".safetensors", "strength": words}}})
            assert all("/" not in name and "\\" not in name for name, _ in found)
            fixed = {"time": schema.Choice(words, dict.fromkeys(schema.STYLES, (words,)))}
            bake.to_yaml(bake.bake(small, fixed))
    assert [e for e in events if "domains" not in e] == []


def test_two_thousand_hostile_files(watched, data, tmp_path):
    """A good file with hostile text anywhere in it: a checked domain that expands, or an error that names the file."""
    good, rng = yaml.safe_dump(data, sort_keys=False), random.Random(3)
    path, accepted = tmp_path / "mine.yaml", 0
    reader.parse(good, "warm-up")
    with watched() as events:
        for i, words in enumerate(hostile(2000, 4)):
            at = rng.choice([m for m in range(len(good)) if good[m] in " \n'"])
            content = (BOMB if i % 50 == 1 else "") + good[:at] + words[:4000] + good[at:]
            try:
                if i % 10:
                    found = schema.parse(reader.parse(content, "mine.yaml"), "mine.yaml")
                else:
                    path.write_bytes(content.encode("utf-8", "surrogatepass"))
                    found = domain.load_file(path)
            except DomainError as e:
                assert str(e).startswith("mine.yaml") and "\n" not in str(e) and len(str(e)) < 1000
                continue
            accepted += 1
            assert all(len(p.positive) <= expand.MAX_PROMPT for p in batch.samples(found, ["x"], 3))
    assert [e for e in events if str(tmp_path) not in e and "/lists" not in e] == []
    assert accepted > 20


def test_bombs_end_at_once(small, data):
    """Aliases, nesting, long chains and repeated marks end in an error before they have grown."""
    data["slots"] = {f"s{i}": {"choices": [f"{{s{i + 1}}}" * 100 if i < 5 else "x" * 600]} for i in range(6)}
    data["tags"] = {"positive": ["{subject} " + "{s0}" * 100]}
    data["prose"], data["loras"] = {"positive": ["{subject}"]}, []
    grown = schema.parse(data, "t")
    cases = [
        lambda: expand.resolve(grown, "x", 1, "tags"),
        lambda: expand.resolve(small, "x" * 10**6),
        lambda: reader.parse(BOMB, "t"),
        lambda: reader.parse("{a: " * 100_000, "t"),
        lambda: record.parse("[" * 100_000),
        lambda: record.parse("{" * 2_000_000),
    ]
    for case in cases:
        with pytest.raises(DomainError):
            case()
