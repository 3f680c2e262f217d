"""What an evaluation found: numbers with intervals, paired verdicts, honest lines, ready for tables and JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from koret.evaluation.audit import Audit
from koret.evaluation.metrics import PRIMARY, measure_recall_curve
from koret.evaluation.scores import Scores, Verdict, format_gap, judge, label
from koret.evaluation.significance import Difference, Interval, bootstrap_intervals, compare_paired
from koret.evaluation.slices import Slice, measure_slices
from koret.evaluation.tasks import RetrievalTask, make_distinct

if TYPE_CHECKING:
    from koret.evaluation.probes import Probe

_NOT_PLAIN = re.compile(r"[^0-9A-Za-z가-힣]+")
CURVE_KS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 75, 100)


@dataclass(frozen=True)
class Row:
    """One system on one task. ``role``: base, model, lexical or fusion."""

    system: str
    role: str
    metrics: dict[str, Interval]
    curve: dict[int, Interval]  # recall at each of CURVE_KS
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "role": self.role,
            "metrics": {name: interval.to_dict() for name, interval in self.metrics.items()},
            "recall_curve": {str(k): interval.to_dict() for k, interval in self.curve.items()},
            "seconds": self.seconds,
        }


@dataclass
class Section:
    """All systems on one task. ``scores`` are in the order of ``rows``."""

    task: RetrievalTask
    scores: list[Scores]
    rows: list[Row]
    gaps: dict[str, Difference] = field(default_factory=dict)  # model - base per primary metric
    verdict: Verdict | None = None  # model against base
    strongest: str = ""  # the best BM25
    lexical: Verdict | None = None  # model against it
    slices: list[Slice] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The verdict and the honest line about BM25, in words."""
        said = [self.verdict.sentence] if self.verdict else []
        if self.lexical:
            said.append(self.lexical.sentence)
            said += _say_where_ahead(self.lexical, self.slices)
        return said

    def find_row(self, role: str) -> Row | None:
        return next((row for row in self.rows if row.role == role), None)

    def find_scores(self, role: str) -> Scores | None:
        return next((s for s, row in zip(self.scores, self.rows, strict=True) if row.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task.describe(),
            "systems": [row.to_dict() for row in self.rows],
            "differences": {name: gap.to_dict() for name, gap in self.gaps.items()},
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "against_bm25": self.lexical.to_dict() if self.lexical else None,
            "slices": [part.to_dict() for part in self.slices],
            "probes": [probe.to_dict() for probe in self.probes],
            "lines": self.lines,
        }


@dataclass
class EvaluationReport:
    """Everything ``koret.evaluate`` found. The first section decides; ``extra`` are sets that must not get worse."""

    model: str
    baseline: str | None
    data: dict[str, Any]
    sections: list[Section]
    extra: list[Section] = field(default_factory=list)
    audit: Audit | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """better, worse, not distinguishable, or mixed (better here, worse on an extra set); '' without a baseline."""
        home = self.sections[0].verdict
        if home is None:
            return ""
        if home.verdict == "better" and any(s.verdict and s.verdict.verdict == "worse" for s in self.extra):
            return "mixed"
        return home.verdict

    @property
    def conclusion(self) -> str:
        """The verdict over all tasks, in words; '' without a baseline."""
        home = self.sections[0].verdict
        if home is None:
            return ""
        said = [home.sentence]
        others = [s.verdict for s in (*self.sections[1:], *self.extra) if s.verdict]
        for outcome, words in (
            ("worse", "But it got WORSE on"),
            ("better", "Also better on"),
            ("not distinguishable", "Not distinguishable on"),
        ):
            found = [v for v in others if v.verdict == outcome]
            if found:
                said.append(f"{words} {', '.join(f'{v.task} ({format_gap(v)})' for v in found)}.")
        return " ".join(said)

    @property
    def cleanness(self) -> str:
        """What the leakage audit allows to be said about these numbers."""
        return (self.audit or Audit("", [])).sentence

    def name_sections(self) -> list[tuple[str, Section]]:
        """Every section with the name its files have, unlike those of the others."""
        sections = [*self.sections, *self.extra]
        return list(zip(make_distinct([make_name(s.task.name) for s in sections], "-"), sections, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            "data": self.data,
            "verdict": self.verdict or None,
            "conclusion": self.conclusion or None,
            "clean": None if self.audit is None else self.audit.clean,
            "cleanness": self.cleanness,
            "tasks": [section.to_dict() for section in self.sections],
            "extra": [section.to_dict() for section in self.extra],
            "audit": None if self.audit is None else self.audit.to_dict(),
            "seconds": self.seconds,
        }


def build_section(
    task: RetrievalTask,
    model: Scores,
    base: Scores | None = None,
    lexical: Sequence[Scores] = (),
    fused: Sequence[Scores] = (),
    labels: dict[str, list[str]] | None = None,
) -> Section:
    """Intervals for every system, the paired verdicts, and slices by ``labels`` (``slices.label_queries``) if given.

    Rows come in the order base, model, lexical, fused.
    """
    entries = [("base", base), ("model", model), *(("lexical", s) for s in lexical), *(("fusion", s) for s in fused)]
    present = [(role, scores) for role, scores in entries if scores is not None]
    strongest = max(lexical, key=lambda scores: scores.sort_key, default=None)
    section = Section(task, [scores for _, scores in present], [_build_row(task, *entry) for entry in present])
    if base is not None:
        section.gaps = {
            name: compare_paired(base.per_query[name], model.per_query[name], task.groups) for name in PRIMARY
        }
        section.verdict = judge(base, model, task.groups)
    if strongest is not None:
        section.strongest = strongest.system
        section.lexical = judge(strongest, model, task.groups)
    if labels:
        section.slices = measure_slices(labels, task.groups, model, base, strongest, [s for _, s in present])
    return section


def make_name(text: str) -> str:
    """A file name of letters, digits and dashes."""
    return _NOT_PLAIN.sub("-", text).strip("-").lower() or "task"


def _build_row(task: RetrievalTask, role: str, scores: Scores) -> Row:
    curve = measure_recall_curve(scores.rankings, task.relevant)
    ks = [k for k in CURVE_KS if k <= max(curve.shape[1], 1)]
    recalls = np.stack([curve[:, k - 1] if curve.shape[1] else np.zeros(len(curve)) for k in ks], axis=1)
    recall_at = dict(zip(ks, bootstrap_intervals(recalls, task.groups), strict=True))
    return Row(scores.system, role, scores.measure_intervals(task.groups), recall_at, scores.seconds)


def _say_where_ahead(lexical: Verdict, slices: Sequence[Slice]) -> list[str]:
    """On which slices the dense model beats BM25, where it does not beat it overall (or loses to it)."""
    against = [part for part in slices if part.lexical_gap is not None]
    if not against:
        return []
    ahead = [part for part in against if part.lexical_gap.outcome == "better"]
    behind = [part for part in against if part.lexical_gap.outcome == "worse"]
    if lexical.verdict == "better":
        listed, words = behind, "BM25 still wins on"
    else:
        listed, words = ahead, "The dense model wins on"
    if listed:
        listed = sorted(listed, key=lambda part: -abs(part.lexical_gap.mean))[:3]
        return [f"{words}: " + "; ".join(_name_slice(part) for part in listed) + "."]
    closest = max(against, key=lambda part: part.lexical_gap.mean)
    if lexical.verdict == "better":
        return ["BM25 wins on no slice."]
    return [f"It wins on no slice; it comes closest on {_name_slice(closest)}."]


def _name_slice(part: Slice) -> str:
    gap = f"{label(PRIMARY[0])} {format_gap(part.lexical_gap)}"
    return f"{part.dimension} {part.name} ({gap}, {part.queries} questions)"
