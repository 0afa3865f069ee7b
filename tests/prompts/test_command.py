"""``nibble prompts``: list, show, expand, check."""

import argparse
import json

import pytest
from comfyui_nibble.headless import prompts
from comfyui_nibble.prompts import domain, expand, page
from comfyui_nibble.prompts.reader import DomainError


@pytest.fixture
def nibble(capsys):
    def run(*words) -> str:
        top = argparse.ArgumentParser()
        prompts.add_command(top.add_subparsers())
        args = top.parse_args(["prompts", *map(str, words)])
        args.run(args)
        return capsys.readouterr().out

    return run


def test_list_names_every_domain(nibble):
    assert [line.split()[0] for line in nibble("list").splitlines()] == domain.shipped()


def test_show(nibble):
    shown = nibble("show", "food")
    food = domain.load("food")
    assert all(c.name in shown for s in food.slots.values() for c in s.choices)
    assert expand.expand(food, food.example, page.SEED) in shown
    assert nibble("show", "--page") == page.page()
    with pytest.raises(DomainError, match="say which domain to show"):
        nibble("show")


def test_expand(nibble):
    food = domain.load("food")
    assert nibble("expand", "food", "a pear", "--seed", 3).strip() == expand.expand(food, "a pear", 3)
    candle = nibble("expand", "food@1", "a pear", "--set", "light=candle", "--style", "tags")
    assert "warm candlelight" in candle
    many = nibble("expand", "emoji", "--count", 40).splitlines()
    assert len(set(many)) == 40
    assert len(nibble("expand", "emoji", "pear", "--all").splitlines()) == 4
    told = json.loads(nibble("expand", "food", "a pear", "--json"))
    assert told["domain"] == "food@1" and told["hash"] == food.hash and told["tokens"] < 100
    with pytest.raises(DomainError, match="food@1 has no slot 'lite'"):
        nibble("expand", "food", "x", "--set", "lite=1")
    with pytest.raises(DomainError, match="--set 'x' is not SLOT=CHOICE"):
        nibble("expand", "food", "x", "--set", "x")


def test_check(nibble, tmp_path):
    assert len(nibble("check", "--samples", 20).splitlines()) == len(domain.shipped())
    text = (domain.FOLDER / "food@1.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("slots:\n", "slots:\n  spare: {choices: [x]}\n"), encoding="utf-8")
    with pytest.raises(DomainError, match="1 of 1 domains have problems: food@1"):
        nibble("check", mine, "--samples", 5)
    mine.write_text("id: [", encoding="utf-8")
    with pytest.raises(DomainError, match=r"mine\.yaml, line 1"):
        nibble("check", mine)
    with pytest.raises(DomainError, match="unknown domain 'nope'"):
        nibble("check", "nope")
