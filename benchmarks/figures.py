"""Draw the pictures of README and docs from benchmarks/results: `python benchmarks/figures.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from koret.figures import make_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
COLOURS = {"base": "#b8bec7", "model": "#2d6cb3", "lexical": "#e08a3c"}
# Where names stand beside points of a picture of trainings that would cover one another.
LABELS = {
    "koret": ((2, 6), "left"), "koret-lean": ((6, -3), "left"), "koret-small": ((2, -11), "center"),
    "naive": ((5, -6), "left"),
}  # fmt: skip
NAMES = {"base": "base", "model": "tuned with koret", "lexical": "BM25"}


def draw_korquad1() -> Path:
    """Bars of four metrics for base, tuned and BM25: mean of the seeds, lines from the lowest to the highest bound."""
    runs = json.loads((RESULTS / "korquad1.json").read_text(encoding="utf-8"))["runs"]
    metrics = ("ndcg@10", "map", "mrr@10", "recall@10")
    figure, (axes,) = make_figure(width=7.2, height=3.2)
    place = np.arange(len(metrics))
    for offset, role in zip((-0.27, 0.0, 0.27), NAMES, strict=True):
        cells = [[run["systems"][role][metric] for run in runs] for metric in metrics]
        means = np.array([np.mean([cell["mean"] for cell in row]) for row in cells])
        low = means - [min(cell["low"] for cell in row) for row in cells]
        high = np.array([max(cell["high"] for cell in row) for row in cells]) - means
        axes.bar(place + offset, means, 0.25, color=COLOURS[role], label=NAMES[role])
        axes.errorbar(place + offset, means, [low, high], fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
        for x, mean, up in zip(place + offset, means, high, strict=True):
            axes.text(x, mean + up + 0.015, f"{mean:.2f}", ha="center", fontsize=8)
    axes.set_xticks(place, ["nDCG@10", "MAP", "MRR@10", "recall@10"])
    axes.set_ylim(0, 1.08)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.17))
    return save_figure(figure, PICTURES / "korquad1.svg")


def draw_recipes() -> Path:
    """A forest: each arm's difference of nDCG@10 to the arm it is compared with, with its interval, by group."""
    arms = [arm for arm in json.loads((RESULTS / "recipes.json").read_text("utf-8"))["arms"] if arm["difference"]]
    groups = list(dict.fromkeys(arm["group"] for arm in arms))
    rows: list[dict | str] = [row for g in groups for row in (g, *(arm for arm in arms if arm["group"] == g))]
    figure, (axes,) = make_figure(width=7.6, height=0.8 + 0.22 * len(rows))
    colours = {"better": COLOURS["model"], "worse": COLOURS["lexical"], "not distinguishable": "#8a8f98"}
    for place, row in enumerate(rows):
        if isinstance(row, str):
            continue
        gap = row["difference"]
        colour = colours[gap["outcome"]]
        axes.plot([gap["low"], gap["high"]], [place, place], color=colour, linewidth=1.6)
        axes.plot(gap["seeds"], [place] * len(gap["seeds"]), "|", color=colour, markersize=6)
        axes.plot(gap["mean"], place, "o", color=colour, markersize=4.5)
    axes.axvline(0, color="#444444", linewidth=0.8)
    labels = [row if isinstance(row, str) else f"{row['name']}  –  {row['against']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference of nDCG@10: mean, 95% interval, each seed", fontsize=8)
    return save_figure(figure, PICTURES / "recipes.svg")


def draw_train_speed() -> Path:
    """Speed over memory of every arm, a panel a case: what is higher and further left is better."""
    cases = json.loads((RESULTS / "train_speed_avx512.json").read_text(encoding="utf-8"))["cases"]
    figure, axes = make_figure(3, -(-len(cases) // 3), width=3.2, height=2.7)
    for place, case in zip(axes, cases, strict=True):
        for name, row in case["rows"].items():
            if "error" in row or name == "koret-compiled":
                continue
            kind = "model" if name.startswith("koret") else "base" if name == "naive" else "lexical"
            x, y = row["peak_bytes"] / 2**30, row["pairs_per_second"]
            place.plot(x, y, "o", color=COLOURS[kind], markersize=6 if name == "koret" else 4)
            shift, side = LABELS.get(name, ((5, -2), "left"))
            place.annotate(name, (x, y), xytext=shift, textcoords="offset points", ha=side, fontsize=6.5)
        missing = [name for name, row in case["rows"].items() if "error" in row]
        if missing:
            words = f"{case['rows'][missing[0]]['error']}:\n{', '.join(missing)}"
            place.text(0.04, 0.05, words, transform=place.transAxes, fontsize=6.5)
        place.set_xscale("log")
        place.set_yscale("log")
        place.set_title(f"question → {case['task']}, batch {case['batch']}", fontsize=8.5)
        place.tick_params(labelsize=7)
        for axis, ticks in ((place.xaxis, (1, 2, 4, 8, 16)), (place.yaxis, (1, 2, 5, 10, 20, 50, 100))):
            axis.set_ticks(ticks, map(str, ticks))
            axis.set_ticks([], minor=True)
        top = max(row["pairs_per_second"] for row in case["rows"].values() if "error" not in row)
        place.set_xlim(0.6, 34)  # after the ticks, which widen what they are put on
        place.set_ylim(top / 20, top * 1.6)
    for place in axes[3:]:
        place.set_xlabel("peak memory, GB", fontsize=8)
    for place in axes[::3]:
        place.set_ylabel("pairs a second", fontsize=8)
    return save_figure(figure, PICTURES / "train_speed_cases.svg")


def draw_train_curves() -> Path:
    """The loss of koret and of sentence-transformers on the same batches, one over the other."""
    found = json.loads((RESULTS / "train_curves.json").read_text(encoding="utf-8"))
    figure, (axes,) = make_figure(width=6.4, height=2.8)
    theirs, ours = found["losses"]["sentence-transformers"], found["losses"]["koret"]
    axes.plot(range(1, len(theirs) + 1), theirs, color=COLOURS["lexical"], linewidth=4, label="sentence-transformers")
    axes.plot(range(1, len(ours) + 1), ours, color=COLOURS["model"], linewidth=1.4, label="koret")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.legend(frameon=False)
    return save_figure(figure, PICTURES / "train_speed.svg")


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    print(draw_korquad1())
    if (RESULTS / "recipes.json").is_file():
        print(draw_recipes())
    print(draw_train_speed())
    if (RESULTS / "train_curves.json").is_file():
        print(draw_train_curves())


if __name__ == "__main__":
    main()
