"""One system's result on one task, and the paired verdict on two of them.

Letters: Q queries, K ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from koret.evaluation import metrics
from koret.evaluation.significance import Difference, Interval, bootstrap_intervals, compare_paired

LEAST_GROUPS = 6  # with fewer no sign pattern is rarer than 5%: 2 / 2^5
_WRITTEN = {"ndcg": "nDCG", "map": "MAP", "mrr": "MRR"}
_SAID = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}


@dataclass(frozen=True)
class Scores:
    """Rankings of one system on one task, and every metric of every query."""

    system: str
    task: str
    per_query: dict[str, np.ndarray]  # (Q,) each
    rankings: np.ndarray  # (Q, K) corpus rows, best first, -1 where there is none
    similarities: np.ndarray  # (Q, K) what they were ranked by
    seconds: dict[str, float] = field(default_factory=dict)  # encode, search

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric over the queries."""
        return metrics.average(self.per_query)

    @property
    def sort_key(self) -> tuple[float, ...]:
        """Orders models: ndcg@10, then map, then recall@10, then mrr@10."""
        return tuple(float(self.per_query[name].mean()) for name in metrics.PRIMARY)

    def measure_intervals(self, groups: np.ndarray, **options: Any) -> dict[str, Interval]:
        """Each metric's mean with its 95% interval; ``options`` as in ``bootstrap_intervals``."""
        columns = np.stack(list(self.per_query.values()), axis=1)
        return dict(zip(self.per_query, bootstrap_intervals(columns, groups, **options), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Means, without the per-query arrays."""
        return {"system": self.system, "task": self.task, "metrics": self.metrics, "seconds": self.seconds}


@dataclass(frozen=True)
class Verdict:
    """Whether ``system`` is better than ``base`` on one metric of one task."""

    verdict: str  # better | worse | not distinguishable
    metric: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    p_value: float
    detectable: float
    queries: int
    groups: int
    task: str
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and v != v else v for k, v in asdict(self).items()}


def judge(base: Scores, tuned: Scores, groups: np.ndarray, metric: str = metrics.PRIMARY[0], **options: Any) -> Verdict:
    """The paired verdict on ``tuned`` against ``base``, both scored on the same task.

    ``groups`` (Q,) are the task's; ``options`` go to ``significance.compare_paired``.
    """
    if base.task != tuned.task:
        raise ValueError(f"'{base.system}' was scored on '{base.task}', '{tuned.system}' on '{tuned.task}'")
    gap = compare_paired(base.per_query[metric], tuned.per_query[metric], groups, **options)
    means = float(base.per_query[metric].mean()), float(tuned.per_query[metric].mean())
    return Verdict(
        gap.outcome,
        metric,
        *means,
        gap.mean,
        gap.low,
        gap.high,
        gap.p_value,
        gap.detectable,
        gap.queries,
        gap.groups,
        base.task,
        _say(tuned.system, base.system, metric, means, gap),
    )


def _say(tuned: str, base: str, metric: str, means: tuple[float, float], gap: Difference) -> str:
    owners = f" of {gap.groups} articles" if gap.groups != gap.queries else ""
    said = (
        f"{tuned} is {_SAID[gap.outcome]} {base}: {label(metric)} {means[0]:.3f} -> {means[1]:.3f} ({format_gap(gap)}, "
        f"p {format_p(gap.p_value)}, {gap.queries:,} questions{owners})."
    )
    if gap.groups < LEAST_GROUPS:
        return f"{said} Fewer than {LEAST_GROUPS} articles cannot prove a difference: ask about more."
    if gap.outcome == "not distinguishable" and gap.detectable > 0:
        return f"{said} A true difference of {gap.detectable:.3f} or more would have shown four times out of five."
    return said


def label(metric: str) -> str:
    """How a metric is written in tables: ndcg@10 -> nDCG@10."""
    name, _, k = metric.rpartition("/")[2].partition("@")
    written = _WRITTEN.get(name, name)
    return written + (f"@{k}" if k else "")


def format_gap(gap: Difference | Verdict | Interval) -> str:
    """'+.183 [+.142, +.234]'."""
    mean = gap.difference if isinstance(gap, Verdict) else gap.mean
    return f"{mean:+.3f}" + ("" if gap.low != gap.low else f" [{gap.low:+.3f}, {gap.high:+.3f}]")


def format_p(p_value: float) -> str:
    return "< .001" if p_value < 0.001 else f"= {p_value:.3f}".replace("= 0.", "= .")
