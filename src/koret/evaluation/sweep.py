"""How much of the tuning to keep: weights between base and tuned, scored at home and elsewhere.

Interpolating weights (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models") often keeps most of the gain and
gives back what was forgotten. For a merged LoRA model it is the same as scaling the adapters' strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koret.evaluation.beir import read_beir
from koret.evaluation.evaluator import Evaluator
from koret.evaluation.metrics import PRIMARY
from koret.evaluation.scores import Scores, Verdict, judge, label
from koret.evaluation.selection import find_runs, find_trained, open_data, select_questions
from koret.evaluation.significance import Interval, bootstrap_interval
from koret.evaluation.tasks import RetrievalTask, name_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from koret.data.loader import Dataset
    from koret.retrieval.encoder import TextEncoder

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Point:
    """One strength: nDCG@10 on every task with its interval, and the verdict against the base (none at weight 0)."""

    weight: float
    scores: dict[str, Interval]
    verdicts: dict[str, Verdict]

    def to_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "scores": {task: interval.to_dict() for task, interval in self.scores.items()},
            "verdicts": {task: verdict.to_dict() for task, verdict in self.verdicts.items()},
        }


@dataclass(frozen=True)
class Sweep:
    """All points, ascending; the first of ``tasks`` is home, the others must not get worse."""

    model: str
    baseline: str
    tasks: list[str]
    points: list[Point]
    chosen: float
    cleanness: str = ""  # what the leakage audit says; "" without one

    @property
    def sentence(self) -> str:
        point = next(point for point in self.points if point.weight == self.chosen)
        home, *others = self.tasks
        said = f"Keep {self.chosen:.0%} of the tuning: {label(PRIMARY[0])} {point.scores[home].mean:.3f} on {home}"
        said += "".join(f", {point.scores[task].mean:.3f} on {task}" for task in others)
        return said + ". Chosen on these questions, so expect a little less on new ones."

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "baseline": self.baseline,
            "metric": PRIMARY[0],
            "tasks": self.tasks,
            "chosen": self.chosen,
            "sentence": self.sentence,
            "cleanness": self.cleanness or None,
            "points": [point.to_dict() for point in self.points],
        }


def sweep(
    model: str | Path | TextEncoder,
    dataset_root: str | Path | Dataset,
    *,
    baseline: str | Path | TextEncoder | None = None,
    weights: Sequence[float] = WEIGHTS,
    extra: Sequence[str | Path] = (),
    split: str = "auto",
    max_queries: int | None = None,
    save: str | Path | None = None,
    progress: bool = False,
    **loading: Any,
) -> Sweep:
    """Score weights between ``baseline`` (default: what the run was tuned from) and ``model``, and choose one.

    ``weights`` are shares of the tuning: 0 is the base, 1 the model; above 1 goes beyond it. The chosen one is the
    best at home among those that are not worse than the base on any ``extra`` set (BEIR folders). ``save`` writes the
    chosen model there. Other arguments are those of ``evaluate``. Raises ValueError when the two models do not have
    the same tensors.
    """
    tuned, base, scored = _open_pair(model, baseline)
    chosen = select_questions(
        *open_data(dataset_root, tuned, scored["trained"], progress=progress, **loading),
        **scored, kinds=("passage",), split=split, max_queries=max_queries,
    )  # fmt: skip
    others = [read_beir(folder) for folder in extra]
    tasks = name_apart([*chosen.tasks, *others])
    found = sweep_encoders(tuned, base, tasks, weights=weights, save=save, progress=progress)
    return replace(found, cleanness=chosen.audit(tasks[len(chosen.tasks) :]).sentence)


def sweep_encoders(
    tuned: TextEncoder,
    base: TextEncoder,
    tasks: Sequence[RetrievalTask],
    *,
    weights: Sequence[float] = WEIGHTS,
    save: str | Path | None = None,
    progress: bool = False,
) -> Sweep:
    """``sweep`` on models and tasks that are open. ``tuned`` ends up with the chosen weights."""
    tasks = name_apart(tasks)
    start, end = copy_state(base), copy_state(tuned)
    evaluators = [Evaluator(task) for task in tasks]
    before: list[Scores] = []
    points = []
    for weight in sorted({0.0, *weights}):
        set_state(tuned, interpolate(start, end, weight))
        scores = [evaluator.score(tuned, f"w={weight:g}", progress=progress) for evaluator in evaluators]
        before = before or scores
        points.append(_describe(weight, tasks, before, scores))
    found = Sweep(tuned.name, base.name, [task.name for task in tasks], points, choose_point(points))
    set_state(tuned, interpolate(start, end, found.chosen))
    if save is not None:
        tuned.save(save)
    return found


def choose_point(points: Sequence[Point]) -> float:
    """The weight with the best home score among those not worse than the base elsewhere; the smaller one of equals."""
    allowed = [p for p in points if not any(v.verdict == "worse" for v in list(p.verdicts.values())[1:])]
    return max(allowed, key=lambda p: (next(iter(p.scores.values())).mean, -p.weight)).weight


def interpolate(base: dict[str, Tensor], tuned: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """(1 - weight) * base + weight * tuned for every floating tensor; others are the tuned model's.

    Raises ValueError naming the first tensor that only one has or whose shapes differ.
    """
    for name in sorted({*base, *tuned}):
        shapes = [tuple(state[name].shape) if name in state else None for state in (base, tuned)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"these two models cannot be interpolated: '{name}' is {shapes[0] or 'absent'} in the base and "
                f"{shapes[1] or 'absent'} in the tuned model; give the model it was tuned from as baseline"
            )
    return {
        name: base[name].lerp(tensor, weight) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def copy_state(encoder: TextEncoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in encoder.model.state_dict().items()}


def set_state(encoder: TextEncoder, state: dict[str, Tensor]) -> None:
    encoder.model.load_state_dict(state)


def draw_sweep(found: Sweep) -> Figure:
    """nDCG@10 over the share of the tuning kept, a line with its 95% band per task."""
    from koret.evaluation.plots import GREEN, VIOLET
    from koret.figures import BLUE, GRAY, INK, ORANGE, RULE, make_figure

    figure, (axis,) = make_figure(width=7.2, height=4.2)
    weights = [point.weight for point in found.points]
    colours = (BLUE, ORANGE, GREEN, VIOLET)
    for i, task in enumerate(found.tasks):
        values, colour = [point.scores[task] for point in found.points], colours[i % len(colours)]
        axis.plot(weights, [v.mean for v in values], "o-", color=colour, label=task, linewidth=1.8, markersize=5)
        axis.fill_between(
            weights, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.14, linewidth=0
        )
    axis.axvline(found.chosen, color=GRAY, linestyle="--", linewidth=1, label=f"chosen: {found.chosen:.0%}")
    axis.set_xticks(weights, [f"{weight:.0%}" for weight in weights])
    axis.set_xlabel("share of the tuning kept", color=INK)
    axis.set_title("nDCG@10 between base and tuned model, 95% bands", color=INK, fontsize=11, loc="left")
    axis.grid(axis="y", color=RULE, linewidth=0.8)
    axis.legend(frameon=False, fontsize=9)
    return figure


def _describe(weight: float, tasks: Sequence[RetrievalTask], before: list[Scores], scores: list[Scores]) -> Point:
    metric = PRIMARY[0]
    return Point(
        weight,
        {t.name: bootstrap_interval(s.per_query[metric], t.groups) for t, s in zip(tasks, scores, strict=True)},
        {t.name: judge(b, s, t.groups) for t, b, s in zip(tasks, before, scores, strict=True) if weight},
    )


def _open_pair(
    model: str | Path | TextEncoder, baseline: str | Path | TextEncoder | None
) -> tuple[TextEncoder, TextEncoder, dict[str, Any]]:
    """Both models, and what ``find_trained`` says of them."""
    from koret.retrieval.encoder import load_encoder

    runs = find_runs(model)
    tuned = load_encoder(model) if isinstance(model, (str, Path)) else model
    if baseline is None:
        if not runs:
            name = getattr(tuned, "name", model)
            raise ValueError(f"{name} is not a run, so its base is not known: name it (baseline)")
        baseline = runs[0].config["model_name"]
    scored = find_trained(model, baseline)
    if isinstance(baseline, (str, Path)):
        baseline = load_encoder(baseline, max_seq_length=tuned.max_seq_length)
    return tuned, baseline, scored
