"""Weights between base and tuned: the ends are the models, the middle is the mean, the choice forgets nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_examples import HashEncoder, build_tiny_encoder

from koret.evaluation.evaluator import Evaluator
from koret.evaluation.scores import judge
from koret.evaluation.significance import Interval
from koret.evaluation.sweep import Point, Sweep, choose_point, draw_sweep, interpolate, sweep, sweep_encoders
from koret.evaluation.tasks import build_task


@pytest.fixture
def task(dataset):
    return build_task(dataset, np.arange(dataset.questions.num_rows), np.arange(dataset.passages.num_rows), "passage")


def test_interpolation_is_exact_at_its_ends_and_linear_between():
    base = {"w": torch.tensor([0.1, 2.0]), "n": torch.tensor([7])}
    tuned = {"w": torch.tensor([0.3, -1.0]), "n": torch.tensor([7])}
    assert torch.equal(interpolate(base, tuned, 0.0)["w"], base["w"])
    assert torch.equal(interpolate(base, tuned, 1.0)["w"], tuned["w"])
    assert torch.allclose(interpolate(base, tuned, 0.25)["w"], torch.tensor([0.15, 1.25]))
    assert torch.allclose(interpolate(base, tuned, 1.5)["w"], torch.tensor([0.4, -2.5]))
    assert interpolate(base, tuned, 0.5)["n"].tolist() == [7]
    with pytest.raises(ValueError, match=r"'w' is \(2,\) in the base and absent in the tuned model"):
        interpolate(base, {"n": tuned["n"]}, 0.5)
    with pytest.raises(ValueError, match=r"'w' is \(2,\) in the base and \(3,\) in the tuned"):
        interpolate(base, {**tuned, "w": torch.zeros(3)}, 0.5)


def test_sweep_scores_both_ends_and_saves_what_it_chose(task, tmp_path):
    base, tuned = build_tiny_encoder(tmp_path / "a", seed=1), build_tiny_encoder(tmp_path / "b", seed=2)
    ends = [Evaluator(task).score(encoder).metrics["ndcg@10"] for encoder in (base, tuned)]
    found = sweep_encoders(tuned, base, [task], weights=[1.0, 0.5], save=tmp_path / "kept")
    assert [point.weight for point in found.points] == [0.0, 0.5, 1.0]
    assert [found.points[i].scores[task.name].mean for i in (0, 2)] == pytest.approx(ends)
    means = [point.scores[task.name].mean for point in found.points]
    assert found.chosen == found.points[int(np.argmax(means))].weight
    assert not found.points[0].verdicts and found.points[2].verdicts[task.name].metric == "ndcg@10"
    from koret.retrieval.encoder import load_encoder

    kept = load_encoder(tmp_path / "kept", device="cpu")
    assert Evaluator(task).score(kept).metrics["ndcg@10"] == pytest.approx(max(means))
    assert found.to_dict()["chosen"] == found.chosen and f"Keep {found.chosen:.0%} of the tuning" in found.sentence


def test_the_choice_is_the_best_at_home_that_forgets_nothing(task, encoder, weak_encoder):
    evaluator = Evaluator(task)
    good, bad = evaluator.score(encoder), evaluator.score(weak_encoder)
    worse, better = judge(good, bad, task.groups), judge(bad, good, task.groups)
    assert (worse.verdict, better.verdict) == ("worse", "better")

    def point(weight, home, verdict):
        return Point(weight, {"home": Interval(home, 0, 1), "panel": Interval(0.5, 0, 1)},
                     {"home": better, "panel": verdict} if verdict else {})  # fmt: skip

    points = [point(0.0, 0.3, None), point(0.5, 0.6, better), point(0.8, 0.6, better), point(1.0, 0.9, worse)]
    assert choose_point(points) == 0.5
    found = Sweep("m", "b", ["home", "panel"], points, 0.5)
    assert "Keep 50% of the tuning: nDCG@10 0.600 on home, 0.500 on panel." in found.sentence
    (axis,) = draw_sweep(found).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["home", "panel", "chosen: 50%"]
    assert axis.lines[0].get_ydata().tolist() == [0.3, 0.6, 0.6, 0.9]


def test_no_set_hides_what_another_of_its_name_lost(task, tmp_path, monkeypatch):
    """Two extra sets are called alike; the tuning loses on the first only."""
    base, tuned = build_tiny_encoder(tmp_path / "a", seed=1), build_tiny_encoder(tmp_path / "b", seed=2)
    extra = replace(task, name="set")
    good, bad = HashEncoder(), HashEncoder(noise=50.0)
    plan = iter([bad, good, good, good, bad, good])  # at home, on the first, on the second; base, then tuned
    score = Evaluator.score
    monkeypatch.setattr(Evaluator, "score", lambda self, _, name, progress: score(self, next(plan), name))
    found = sweep_encoders(tuned, base, [task, extra, extra], weights=[1.0])
    assert found.tasks == [task.name, "set", "set #2"]
    assert {name: v.verdict for name, v in found.points[1].verdicts.items()} == {
        task.name: "better", "set": "worse", "set #2": "not distinguishable",
    }  # fmt: skip
    assert found.chosen == 0.0


def test_a_sweep_says_what_the_audit_allows(dataset, tmp_path):
    tuned = build_tiny_encoder(tmp_path / "a")
    found = sweep(tuned, dataset, baseline=tuned, weights=[1.0])
    assert found.cleanness.startswith("What a was trained on is not known here") and found.to_dict()["cleanness"]


def test_a_model_that_is_no_run_needs_a_baseline(tmp_path, dataset):
    tuned = build_tiny_encoder(tmp_path / "a")
    with pytest.raises(ValueError, match="is not a run, so its base is not known"):
        sweep(tuned, dataset)
    found = sweep(tmp_path / "a", dataset, baseline=tuned, weights=[1.0], split="held-out")
    assert found.chosen == 0.0  # the same model: the smaller weight of equals
