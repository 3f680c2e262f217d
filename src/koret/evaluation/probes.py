"""Robustness probes: the same questions as other keyboards and hands would type them, and what that costs."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores
from koret.evaluation.significance import Difference, compare_paired
from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.lexical import load_kiwi

TITLES = {
    "nfd": "decomposed jamo (NFD)",
    "spacing": "no spaces",
    "particles": "other particles (조사)",
    "typos": "one typing error",
}
_BASE, _FINALS = 0xAC00, 28
_VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"  # in the order of their code
_MISTAKES = "ㅑㅔㅏㅖㅕㅐㅓㅒㅛㅏㅞㅙㅗㅠㅓㅙㅣㅜㅜㅣㅢ"  # what is heard or hit instead
_SUBJECT, _TOPIC = ("이", "가"), ("은", "는")  # after a consonant, after a vowel


@dataclass(frozen=True)
class Probe:
    """What changed questions cost each system: nDCG@10 on them minus on the originals, paired."""

    name: str
    title: str
    changed: float  # share of the questions that the probe alters
    drops: dict[str, Difference]
    examples: list[tuple[str, str]]  # original, changed

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "changed": self.changed,
            "systems": {system: drop.to_dict() for system, drop in self.drops.items()},
            "examples": [{"original": a, "changed": b} for a, b in self.examples],
        }


def run_probes(
    task: RetrievalTask,
    systems: Sequence[tuple[Scores, Callable[[Sequence[str]], Scores]]],
    names: Sequence[str] = tuple(TITLES),
    seed: int = 0,
) -> list[Probe]:
    """Score every system on changed questions; the corpus stays as it is.

    ``systems`` pairs each system's Scores on the task's own questions with a function that scores it on others.
    """
    found = []
    for name in names:
        queries = change_queries(task.queries, name, seed)
        altered = [(a, b) for a, b in zip(task.queries, queries, strict=True) if a != b]
        drops = {}
        for before, score in systems:
            after = score(queries)
            pair = before.per_query[PRIMARY[0]], after.per_query[PRIMARY[0]]
            drops[before.system] = compare_paired(*pair, task.groups)
        found.append(Probe(name, TITLES[name], len(altered) / len(queries), drops, altered[:3]))
    return found


def change_queries(queries: Sequence[str], probe: str, seed: int = 0) -> list[str]:
    """The questions as the probe has them typed; the same for the same seed.

    ``nfd``: decomposed jamo, as macOS file names are; ``spacing``: no spaces; ``particles``: 은/는 and 이/가 swapped,
    을/를 and 의 dropped, as in speech; ``typos``: one vowel of one syllable replaced by its neighbour or look-alike.
    Raises ValueError for another name.
    """
    if probe == "nfd":
        return [unicodedata.normalize("NFD", query) for query in queries]
    if probe == "spacing":
        return ["".join(query.split()) for query in queries]
    if probe == "particles":
        return _change_particles(queries)
    if probe == "typos":
        return [_mistype(query, random.Random(f"{seed} {query}")) for query in queries]
    raise ValueError(f"unknown probe {probe!r}; choose from {', '.join(TITLES)}")


def _change_particles(queries: Sequence[str]) -> list[str]:
    changed = []
    for query, tokens in zip(queries, load_kiwi().tokenize(list(queries)), strict=True):
        for i in range(len(tokens) - 1, 0, -1):  # from the end, so that earlier places stay right
            token, end = tokens[i], tokens[i].start + tokens[i].len
            swapped = _swap_particle(query[token.start : end], token.tag)
            if swapped is not None and tokens[i - 1].tag != "NP":  # 누가, 제가: the pronoun changes with its particle
                query = query[: token.start] + swapped + query[end:]
        changed.append(query)
    return changed


def _swap_particle(text: str, tag: str) -> str | None:
    """What stands instead of a particle; None where it stays."""
    if tag == "JX" and text in _TOPIC:
        return _SUBJECT[_TOPIC.index(text)]
    if tag == "JKS" and text in _SUBJECT:
        return _TOPIC[_SUBJECT.index(text)]
    if (tag == "JKO" and text in ("을", "를")) or (tag == "JKG" and text == "의"):
        return ""
    return None


def _mistype(query: str, rng: random.Random) -> str:
    places = [i for i, letter in enumerate(query) if 0 <= ord(letter) - _BASE < 11172]
    if not places:
        return query
    place = rng.choice(places)
    code = ord(query[place]) - _BASE
    lead, rest = divmod(code, len(_VOWELS) * _FINALS)
    vowel, final = divmod(rest, _FINALS)
    wrong = _BASE + (lead * len(_VOWELS) + _VOWELS.index(_MISTAKES[vowel])) * _FINALS + final
    return query[:place] + chr(wrong) + query[place + 1 :]
