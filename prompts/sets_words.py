"""Which captions belong to a domain: by the set's own category where it has one, else by words."""

from __future__ import annotations

import re

from .spec import Domain

# domain -> (categories of MJHQ-30K, words of captions). A domain without a row goes by the words of its own subjects.
DOMAINS: dict[str, tuple[str, str]] = {
    "anime": ("", "anime manga"),
    "architecture-exterior": (
        "", "architecture building house tower church cathedral castle temple bridge skyscraper villa cottage facade",
    ),
    "childrens-book": ("", "children storybook fairytale illustration cartoon watercolor watercolour"),
    "fashion-lookbook": ("fashion", "fashion dress coat jacket suit outfit skirt model runway garment"),
    "food": (
        "food", "food dish meal plate bowl pizza cake bread soup salad sandwich fruit vegetable dessert breakfast "
        "dinner lunch burger pasta noodle rice sushi cheese meat coffee drink cocktail restaurant donut",
    ),
    "game-asset": ("", "potion sword shield chest isometric sprite pixel weapon armor armour"),
    "interior-design": ("indoor", "interior room bedroom kitchen bathroom sofa couch furniture apartment"),
    "landscape": (
        "landscape", "landscape mountain lake forest beach river valley desert waterfall ocean coast hill meadow "
        "canyon",
    ),
    "logo-icon": ("logo", "logo icon emblem badge symbol"),
    "marketing-poster": ("", "poster flyer advertisement advert banner"),
    "packshot": ("", "product packaging bottle sneaker shoe toaster watch backpack"),
    "portrait": ("people", "portrait man woman boy girl face person lady gentleman"),
    "product-photo": ("", "product perfume bottle mug watch headphone camera lamp ceramic"),
}  # fmt: skip
STOP = frozenset(
    [
        "about",
        "above",
        "after",
        "among",
        "and",
        "are",
        "around",
        "behind",
        "below",
        "beside",
        "between",
        "black",
        "blue",
        "brown",
        "down",
        "front",
        "from",
        "gold",
        "green",
        "grey",
        "her",
        "his",
        "into",
        "its",
        "large",
        "little",
        "next",
        "old",
        "orange",
        "out",
        "over",
        "own",
        "pair",
        "pink",
        "purple",
        "red",
        "side",
        "silver",
        "small",
        "some",
        "someone",
        "the",
        "their",
        "this",
        "three",
        "through",
        "two",
        "under",
        "was",
        "white",
        "who",
        "with",
        "yellow",
        "young",
    ]
)
MJHQ = frozenset(["animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles"])


def words(text: str) -> set[str]:
    """The words of ``text``, small, in the singular as far as an s tells."""
    found = re.findall(r"[^\W\d_]+", text.casefold())
    return {w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in found}


def vocabulary(domain: Domain) -> set[str]:
    """The words that show a domain; of its own subjects where the table has none."""
    if domain.name in DOMAINS:
        return words(DOMAINS[domain.name][1])
    return {w for w in words(" ".join(domain.calibration)) if len(w) > 2 and w not in STOP}


def belongs(domain: Domain, text: str, category: str = "") -> bool:
    """Whether a caption is one of ``domain``. A category of MJHQ-30K decides where the domain has one."""
    kind = DOMAINS.get(domain.name, ("", ""))[0]
    if kind and category.lower() in MJHQ:
        return category.lower() == kind
    return not vocabulary(domain).isdisjoint(words(text))
