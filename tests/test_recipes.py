"""The grid of benchmarks/recipes.py: pairing against brute force, tables and section from a result, no run twice."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from koret.evaluation.significance import bootstrap_interval, compare_paired

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def draw(questions=240, articles=12, effect=0.1, seed=0):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, articles, questions)
    base = rng.random(questions)
    return base, base + effect + 0.1 * rng.normal(size=articles)[groups] + 0.1 * rng.normal(size=questions), groups


def test_questions_are_paired_by_id_and_never_across_different_ones():
    from recipe_report import align

    base = {"b": (0.5, 1), "a": (0.25, 0), "c": (1.0, 1)}
    tuned = {"c": (0.0, 1), "a": (1.0, 0), "b": (0.5, 1)}
    left, right, groups = align(base, tuned)
    assert list(right - left) == [0.75, 0.0, -1.0] and list(groups) == [0, 1, 1]
    with pytest.raises(ValueError, match="different questions"):
        align(base, {"a": (1.0, 0), "b": (0.5, 1)})
    with pytest.raises(ValueError, match="different questions"):
        align(base, {**tuned, "b": (0.5, 2)})


def test_one_seed_is_the_ordinary_paired_interval():
    from recipe_report import pool_seeds

    base, tuned, groups = draw()
    pooled, known = pool_seeds([tuned - base], [groups]), compare_paired(base, tuned, groups)
    assert (pooled.mean, pooled.low, pooled.high) == pytest.approx((known.mean, known.low, known.high), abs=1e-12)
    assert pooled.outcome == "better" and pooled.covers == "articles only: one seed"


def test_seeds_that_agree_widen_nothing_and_repeat_no_article():
    """The same questions three times tell no more than once: an article is drawn with all its seeds."""
    from recipe_report import pool_seeds

    base, tuned, groups = draw()
    pooled, once = pool_seeds([tuned - base] * 3, [groups] * 3), bootstrap_interval(tuned - base, groups)
    assert (pooled.mean, pooled.low, pooled.high) == pytest.approx((once.mean, once.low, once.high), abs=1e-12)


def test_seed_noise_is_students_interval_where_articles_have_none():
    from recipe_report import pool_seeds

    means = np.array([0.02, 0.05, 0.11])
    pooled = pool_seeds([np.full(60, m) for m in means], [np.arange(60) + 60 * i for i in range(3)])
    articles = bootstrap_interval(np.repeat(means, 60), np.arange(180))
    half = 4.302653 * means.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    expected = pooled.mean - np.hypot(articles.mean - articles.low, half)
    assert pooled.mean == pytest.approx(means.mean()) and pooled.seeds == pytest.approx(list(means))
    assert pooled.low == pytest.approx(expected, rel=0.02)
    assert pooled.outcome == "not distinguishable" and pooled.covers.startswith("training seeds")


def test_the_mean_is_brute_force_over_every_question_of_every_seed():
    from recipe_report import pool_seeds

    drawn = [draw(questions, seed=seed) for seed, questions in enumerate((50, 70, 90))]
    pooled = pool_seeds([tuned - base for base, tuned, _ in drawn], [groups for *_, groups in drawn])
    total = sum(float(t) - float(b) for base, tuned, _ in drawn for b, t in zip(base, tuned, strict=True))
    assert pooled.mean == pytest.approx(total / 210, abs=1e-12)


def test_the_interval_holds_the_truth_at_least_as_often_as_it_says():
    """Seeds, articles and questions drawn anew 200 times, splits overlapping as in the grid."""
    from recipe_report import pool_seeds

    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        of_article = 0.05 * rng.normal(size=40)
        gaps, groups = [], []
        for noise in 0.03 * rng.normal(size=3):
            chosen = rng.choice(40, 12, replace=False).repeat(8)
            gaps.append(0.1 + noise + of_article[chosen] + 0.2 * rng.normal(size=len(chosen)))
            groups.append(chosen)
        pooled = pool_seeds(gaps, groups)
        held += pooled.low <= 0.1 <= pooled.high
    assert held >= 184  # 95% of 200 is 190, with a standard deviation of 3


def test_every_arm_differs_from_what_it_is_compared_with_by_settings_only():
    from recipe_arms import DEFAULT, PAIR_VISITS, REFERENCE, list_arms, make_key

    arms = list_arms()
    known = {(arm.group, arm.name): arm for arm in arms}
    assert len(known) == len(arms) and len({make_key(arm.settings) for arm in arms}) >= len(arms) - 1
    for arm in arms:
        assert (arm.group, arm.against) in known or arm.against == DEFAULT
        assert arm.settings["max_steps"] * arm.settings["batch_size"] == PAIR_VISITS
        assert arm.settings["max_samples"] * arm.settings["num_epochs"] == PAIR_VISITS
        assert all(arm.settings[name] == REFERENCE[name] for name in ("model_name", "train_split", "max_seq_length"))
        assert "seed" not in arm.settings
    groups = "positives rate brief masking scale negatives batching lora objectives".split()
    assert list(dict.fromkeys(arm.group for arm in arms)) == [DEFAULT, *groups]


def finish(folder, seed, shift):
    """What a finished run leaves, written by hand."""
    run = folder / f"run_20260101_00000{seed}"
    (run / "evaluation").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    metrics = ("ndcg@10", "map", "mrr@10", "recall@10")
    scores = {f"q{i}": (float(rng.random()) / 2, i % 7) for i in range(70)}
    lines = [
        {"id": name, "group": group, "systems": {"tuned": {"ndcg@10": value + shift + 0.01 * (group - 3)}}}
        for name, (value, group) in scores.items()
    ]
    system = {m: {"mean": 0.25 + shift, "low": 0.2, "high": 0.3} for m in metrics}
    systems = [{"role": role, "metrics": system} for role in ("base", "model", "lexical")]
    files = {
        "status.json": {"state": "finished"},
        "environment.json": {"config": {"seed": seed}},
        "data.json": {"steps": 32, "pairs": 1024, "evaluation": [{"corpus": 961}]},
        "evaluation/report.json": {"tasks": [{"systems": systems}]},
        "evaluation/verdict.json": {"verdict": "better", "queries": 70, "groups": 7},
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.0, "train/pairs_per_second": 9.0}))
    (run / "evaluation" / "queries-question-passage.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cost = {"seconds": 60.0, "cpu_seconds": 55.0, "peak_bytes": 2**30, "trained_weights": 110592}
    (folder / "cost.json").write_text(json.dumps(cost))


def test_results_tables_section_and_picture_come_from_the_runs(tmp_path, monkeypatch):
    import figures
    import recipes
    import tables
    from recipe_arms import Arm
    from recipe_report import format_tables, write_section

    better, gone = Arm("scale", "50", {"scale": 50.0}), Arm("scale", "no such", {"no_such_setting": 1})
    arms = [Arm("reference", "reference"), better, Arm("rate", "0.001", {"learning_rate": 1e-3}), gone]
    grid = recipes.Grid(tmp_path / "data.json", tmp_path / "logs", [1, 2], 1, None)
    for arm, seed in product(arms[:2], (1, 2)):
        finish(grid.folder(arm, seed), seed, 0.1 if arm is better else 0.0)
    failed = grid.folder(arms[2], 1)
    failed.mkdir(parents=True)
    (failed / "failure.json").write_text('{"reason": "the loss is not finite"}')
    monkeypatch.setattr(recipes, "RESULT", tmp_path / "recipes.json")
    monkeypatch.setattr(recipes.Grid, "train", lambda self, arm, seed: pytest.fail("a finished run was run again"))
    recipes.run_grid(grid, arms, arms[:2], jobs=2)
    result = grid.write(arms)
    assert json.loads((tmp_path / "recipes.json").read_text()) == result
    gap = result["arms"][1]["difference"]
    assert gap["mean"] == pytest.approx(0.1) and gap["outcome"] == "better" and gap["low"] > 0.09
    assert [run["difference"]["mean"] for run in result["arms"][1]["runs"]] == pytest.approx([0.1, 0.1])
    assert "| 50 | 0.350 | reference | +0.100 [+0.100, +0.100], **better** |" in format_tables(result)

    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\n[KorQuAD 1.0](#k) · [the embedded sample](#s)\n\n## The embedded sample\n\ntext\n")
    write_section(result, page)
    first = page.read_text()
    assert first.count("## Recipes compared") == 1 and "· [recipes compared](#recipes-compared) ·" in first
    assert first.endswith("## The embedded sample\n\ntext\n")
    assert "- better: scale 50" in first
    assert "rate 0.001 (the loss is not finite)" in first and "unknown setting 'no_such_setting'" in first
    write_section(result, page)
    assert page.read_text() == first
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.fill(first) == first

    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "PICTURES", tmp_path)
    assert "scale" in figures.draw_recipes().read_text("utf-8")


def test_a_failing_training_is_written_down_with_its_last_words(tmp_path):
    import recipes
    from recipe_arms import Arm

    grid = recipes.Grid(tmp_path / "absent.json", tmp_path / "logs", [1], 1, 2)
    arm = Arm("reference", "reference")
    grid.train(arm, 1)
    assert not grid.is_done(arm, 1)
    run = grid.read(arm, 1)
    assert run["state"] == "failed" and "there is no file or folder" in run["reason"]
    miner = Arm("negatives", "self", {"hard_negatives": "reference"})
    grid.train(miner, 1)
    assert grid.read(miner, 1)["reason"] == "the reference arm of this seed has no model to mine with"
