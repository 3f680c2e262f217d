"""How many articles and questions the published sets hold, to notice a copy that is not whole."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# (articles, questions); 1.0 by its files, 2.x by its paper.
OFFICIAL = {
    ("1.0", "train"): (1_420, 60_407),
    ("1.0", "dev"): (140, 5_774),
    ("2.0", "train"): (38_496, 83_486),
    ("2.0", "dev"): (4_736, 10_165),
    ("2.1", "train"): (38_496, 83_486),
    ("2.1", "dev"): (4_736, 10_165),
}
_NAME = re.compile(r"korquad_?v?(1\.0|2\.0|2\.1)_(train|dev)(?![a-z])", re.I)


def find_split(name: str, version: str = "") -> tuple[str, str] | None:
    """The official set a source is part of, as (version, split): by its file's name, its folders', its own version."""
    named = _NAME.search(name.rpartition("/")[2]) or _NAME.search(name) or _NAME.search(version)
    return (named[1], named[2].lower()) if named else None


def compare_totals(sources: list[dict[str, Any]]) -> list[str]:
    """A line for every official set that was read but does not have the published size."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for source in sources:
        split = find_split(source["name"], source["version"])
        if split:
            counts = found.setdefault(split, Counter())
            counts.update({kind: source[kind]["seen"] for kind in ("articles", "questions")})
    lines = []
    for (version, split), counts in found.items():
        articles, questions = OFFICIAL[version, split]
        if (counts["articles"], counts["questions"]) != (articles, questions):
            lines.append(
                f"KorQuAD {version} {split} has {articles:,} articles and {questions:,} questions, "
                f"these files {counts['articles']:,} and {counts['questions']:,}"
            )
    return lines
