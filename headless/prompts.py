"""``nibble prompts list | show | expand | check``: domains without ComfyUI."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..prompts import batch, check, expand, page, record
from ..prompts import domain as domains
from ..prompts.reader import DomainError
from ..prompts.spec import AUTO, PROSE, TAGS, Domain
from .shown import say

KEEP = "all shipped ones"


def add_command(subparsers) -> None:
    """Adds ``prompts`` to the command line."""
    prompts = subparsers.add_parser("prompts", help="domains: short prompts in, full prompts out")
    actions = prompts.add_subparsers(dest="action", required=True)

    actions.add_parser("list", help="the domains that ship with the pack").set_defaults(run=run_list)

    show = actions.add_parser("show", help="a domain with an example, or the prompt that a saved PNG remembers")
    show.add_argument("name", nargs="?", help="a domain, a domain's YAML file, or a PNG")
    show.add_argument("--page", action="store_true", help="the page of all domains, in markdown")
    show.set_defaults(run=run_show)

    out = actions.add_parser("expand", help="prompts for a subject")
    out.add_argument("name", help="a domain, such as food or food@1, or a domain's YAML file")
    out.add_argument("subject", nargs="?", help="what the picture shows (default: the calibration subjects)")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--style", choices=[AUTO, TAGS, PROSE], default=AUTO, help="which encoder it is for")
    out.add_argument("--set", action="append", default=[], metavar="SLOT=CHOICE", help="fix a slot; may be repeated")
    out.add_argument("--count", type=int, default=1, help="how many different prompts (default 1)")
    out.add_argument("--all", action="store_true", help="every combination instead")
    out.add_argument("--json", action="store_true", help="all that is known of each prompt, one JSON object a line")
    out.set_defaults(run=run_expand)

    tried = actions.add_parser("check", help="say what is wrong with domains; exit status 1 when anything is")
    tried.add_argument("names", nargs="*", help=f"domains or YAML files (default: {KEEP})")
    tried.add_argument("--samples", type=int, default=1000, help="prompts to try of each style (default 1000)")
    tried.set_defaults(run=run_check)


def load(name: str) -> Domain:
    """A shipped domain, or the one in a YAML file."""
    return domains.load_file(Path(name)) if name.endswith((".yaml", ".yml")) else domains.load(name)


def run_list(args: argparse.Namespace) -> None:
    for d in map(domains.load, domains.shipped()):
        say(f"{d.id:24} {d.description}")


def run_show(args: argparse.Namespace) -> None:
    if args.page:
        sys.stdout.write(page.page())
    elif args.name is None:
        raise DomainError("say which domain to show; nibble prompts list names them")
    elif args.name.lower().endswith(".png"):
        for node, found in record.read(Path(args.name)).items():
            say(f"node {node}: {record.to_text(found)}")
    else:
        say(page.section(load(args.name)).strip())


def run_expand(args: argparse.Namespace) -> None:
    found, overrides = load(args.name), _overrides(args.set)
    subjects = [args.subject] if args.subject else []
    if args.all:
        prompts = batch.every(found, subjects, args.style, overrides)
    elif args.count == 1:
        subject = args.subject or found.example
        prompts = [expand.resolve(found, subject, args.seed, args.style, overrides)]
    else:
        prompts = batch.unique(found, args.count, args.seed, args.style, subjects, overrides)
    for prompt in prompts:
        say(prompt.to_json(indent=None) if args.json else prompt.positive)


def run_check(args: argparse.Namespace) -> None:
    results = [check.check(load(name), args.samples) for name in args.names or domains.shipped()]
    for result in results:
        say(result.line())
    bad = [r.id for r in results if r.problems]
    if bad:
        raise DomainError(f"{len(bad)} of {len(results)} domains have problems: {', '.join(bad)}")


def _overrides(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise DomainError(f"--set {wrong[0][:60]!r} is not SLOT=CHOICE")
    return {name.strip(): value for name, _, value in pairs}
