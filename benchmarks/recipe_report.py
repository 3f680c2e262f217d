"""Paired differences over seeds, and the tables and the section of docs/RESULTS.md made of results/recipes.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from koret.evaluation.significance import LEVEL, bootstrap_interval, expand_quantile

ROOT = Path(__file__).resolve().parents[1]
METRIC = "ndcg@10"
BEGIN, END = "<!-- table: recipes -->", "<!-- end of recipes -->"  # as benchmarks/tables.py marks them
BEFORE = "## The embedded sample\n"
TITLE = "Recipes compared"
COVERS = {True: "training seeds, splits and articles", False: "articles only: one seed"}


@dataclass(frozen=True)
class Pooled:
    """The difference of two arms over seeds; ``low`` and ``high`` are its 95% interval, ``seeds`` each seed's mean."""

    mean: float
    low: float
    high: float
    outcome: str  # better | worse | not distinguishable
    covers: str
    seeds: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def align(
    base: Mapping[str, tuple[float, int]], tuned: Mapping[str, tuple[float, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of both (Q,) and the articles (Q,), question by question. Raises ValueError when they asked others."""
    if base.keys() != tuned.keys() or any(base[name][1] != tuned[name][1] for name in base):
        raise ValueError(f"two arms of one seed were scored on different questions ({len(base)} and {len(tuned)})")
    names = sorted(base)
    scores = [np.array([side[name][0] for name in names]) for side in (base, tuned)]
    return scores[0], scores[1], np.array([base[name][1] for name in names])


def pool_seeds(gaps: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Pooled:
    """One difference from each seed's differences per question and their articles, (Q,) each.

    The mean is over all questions of all seeds. Two sources of chance widen its interval, their half-widths added in
    quadrature (Zou and Donner 2008, "MOVER"): articles, by bootstrap over articles, one held out by several seeds
    drawn in all of them together; and seeds, Student's t of the seeds' means. The seeds' means differ by their
    articles too, so articles count twice and the interval errs on the wide side. With one seed only the first is
    there.
    """
    articles = bootstrap_interval(np.concatenate(gaps), np.concatenate(groups))
    means = [float(gap.mean()) for gap in gaps]
    wide = 0.0
    if len(means) > 1:  # std with S in its denominator, times the quantile widened by sqrt(S / (S - 1))
        wide = expand_quantile(NormalDist().inv_cdf((1 + LEVEL) / 2), len(means)) * np.std(means) / len(means) ** 0.5
    low = articles.mean - math.hypot(articles.mean - articles.low, wide)
    high = articles.mean + math.hypot(articles.high - articles.mean, wide)
    outcome = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return Pooled(articles.mean, low, high, outcome, COVERS[len(means) > 1], means)


# ---------------------------------------------------------------- tables


def format_tables(result: Mapping[str, Any]) -> str:
    """One Markdown table a group: scores, paired difference, and what an arm cost."""
    arms = result["arms"]
    tables = []
    for group in dict.fromkeys(arm["group"] for arm in arms):
        own = [arm for arm in arms if arm["group"] == group]
        rows = [_format_row(arm, result["machine"]["threads"]) for arm in own if _is_begun(arm)]
        if missing := [arm for arm in own if not _is_begun(arm)]:
            listed = "; ".join(f"{arm['name']}: {_explain_missing(arm)}" for arm in missing)
            if not rows:
                tables.append(f"**{group}**: not run: {listed}")
                continue
            rows.append(f"\nNot run: {listed}")
        head = "| arm | nDCG@10 | minus | difference | each seed | loss | pairs/s | CPU s | peak MB | trained weights |"
        tables.append("\n".join([f"**{group}**\n", head, "|---" * head.count(" | ") + "|---|", *rows]))
    return "\n\n".join(tables)


def _format_row(arm: Mapping[str, Any], threads: int) -> str:
    """``threads``: of the grid; an arm that ran on other ones says so, because speed and CPU seconds depend on it."""
    finished = [run for run in arm["runs"] if run["state"] == "finished"]
    gap = arm["difference"]

    def mean(name: str) -> float:
        return fmean(run[name] for run in finished)

    incomplete = "" if arm["state"] == "finished" else f" ({len(finished)} of {len(arm['runs'])} seeds)"
    own = {run.get("threads", threads) for run in finished} - {threads}
    cells = [
        arm["name"] + incomplete + "".join(f" ({number} thread{'s' * (number > 1)})" for number in sorted(own)),
        f"{fmean(run['model'][METRIC] for run in finished):.3f}",
        arm["against"] or "",
        f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], {_say(gap['outcome'])}" if gap else "",
        " ".join(f"{value:+.3f}" for value in gap["seeds"]) if gap else "",
        f"{mean('last_loss'):.2f}",
        f"{mean('pairs_per_second'):.1f}",
        f"{mean('cpu_seconds'):.0f}",
        f"{mean('peak_bytes') / 2**20:,.0f}",
        f"{finished[0]['trained_weights']:,}",
    ]
    return f"| {' | '.join(cells)} |"


def _say(outcome: str) -> str:
    return outcome if outcome == "not distinguishable" else f"**{outcome}**"


def _is_begun(arm: Mapping[str, Any]) -> bool:
    return any(run["state"] == "finished" for run in arm["runs"])


def _explain_missing(arm: Mapping[str, Any]) -> str:
    return arm["reason"] or "no run yet"


# ---------------------------------------------------------------- the section


def format_section(result: Mapping[str, Any]) -> str:
    """The section of docs/RESULTS.md: what was compared, each group's table, what came of it, failures included."""
    arms, budget, reference = result["arms"], result["budget"], result["arms"][0]
    runs = [run for run in reference["runs"] if run["state"] == "finished"]
    if not runs:
        raise ValueError("the reference arm has no finished run yet: run benchmarks/recipes.py first")
    scores = {role: fmean(run[role][METRIC] for run in runs) for role in ("base", "model", "lexical")}
    seeds = ", ".join(str(run["seed"]) for run in runs)
    shown = {k: v for k, v in result["reference"].items() if not k.startswith(("save", "log"))}
    settings = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    compared = [arm for arm in arms if arm["difference"]]
    listed = {
        outcome: [f"{arm['group']} {arm['name']}" for arm in compared if arm["difference"]["outcome"] == outcome]
        for outcome in ("better", "worse", "not distinguishable")
    }
    missing = [f"{arm['group']} {arm['name']} ({_explain_missing(arm)})" for arm in arms if not _is_begun(arm)]
    lines = [
        f"## {TITLE}\n",
        f"`python benchmarks/recipes.py KorQuAD_v1.0_dev.json` — every arm changes one thing of a reference recipe "
        f"and trains on {budget['pair_visits']:,} pairs of {budget['questions']:,} questions, seeds {seeds}; scored on "
        f"all questions of about {round(fmean(run['articles'] for run in runs))} other articles "
        f"({', '.join(format(run['questions'], ',') for run in runs)}) over "
        f"{max(run['corpus'] for run in runs)} paragraphs. The reference: {settings}. Mean nDCG@10: "
        f"base {scores['base']:.3f}, reference {scores['model']:.3f}, BM25 {scores['lexical']:.3f}.\n",
        "A difference is paired by question within a seed and pooled over the seeds; its 95% interval covers "
        "articles (bootstrap) and, from two seeds on, training seeds and splits (Student's t), added in quadrature, "
        "which errs on the wide side. CPU seconds are of the whole run, its three evaluations included. "
        "The arms are many and the intervals are not corrected for that: one in twenty true nulls would show.\n",
        "![nDCG@10 of every arm minus what it is compared with, with 95% intervals](pictures/recipes.svg)\n",
        format_tables(result),
        "",
        *(f"- {outcome}: {'; '.join(names)}" for outcome, names in listed.items() if names),
        *([f"- not run, or failed: {'; '.join(missing)}"] if missing else []),
    ]
    return "\n".join(lines)


def write_section(result: Mapping[str, Any], page: Path = ROOT / "docs" / "RESULTS.md") -> Path:
    """Put the section, and its place in the list of contents, into the page; a former one is replaced."""
    text = page.read_text(encoding="utf-8")
    section = f"{BEGIN}\n\n{format_section(result)}\n{END}\n\n"
    if BEGIN in text:
        text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n+", lambda _: section, text, flags=re.DOTALL)
    else:
        text = text.replace(BEFORE, section + BEFORE, 1)
    link = f"[{TITLE.lower()}](#{TITLE.lower().replace(' ', '-')})"
    if link not in text:
        text = text.replace("[the embedded sample]", f"{link} · [the embedded sample]", 1)
    page.write_text(text, encoding="utf-8")
    return page
