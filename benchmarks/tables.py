"""Write the tables of docs from benchmarks/results: `python benchmarks/tables.py [--check]`.

A document names a table by a pair of comments, ``<!-- table: NAME -->`` and ``<!-- end of NAME -->``; what stands
between them is replaced. ``--check`` changes nothing and fails where a document says something else than the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def format_rows(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def index_speed() -> str:
    """A table a size; engines that were not run at a size stand below it with the reason."""
    import index_speed

    found, parts = read("index_speed"), []
    for count in (10_000, 100_000, 1_000_000):
        sizes = {name: rows.get(str(count), {"not_run": "not asked for"}) for name, rows in found["engines"].items()}
        run = {name: {str(count): row} for name, row in sizes.items() if "not_run" not in row}
        missing = [f"{name} ({row['not_run'].split(': ')[-1]})" for name, row in sizes.items() if "not_run" in row]
        parts.append(index_speed.format_table({**found, "engines": run}, count) + "\n")
        if missing:
            parts.append(f"Not run at {count:,}: {'; '.join(missing)}.\n")
    return "\n".join(parts)


def encode_speed() -> str:
    found = read("encode_speed")
    rows = []
    for name in found["short"]["rows"]:
        own = [found[part]["rows"][name] for part in ("short", "long")]
        cells = [
            cell
            for row in own
            for cell in (
                f"{row['tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
                "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}",
            )
        ]
        rows.append([name, *cells, f"{min(row['worst_cosine'] for row in own):.4f}"])
    head = ["", "short: tokens/s", "ratio", "of the limit", "long: tokens/s", "ratio", "of the limit", "worst cosine"]
    limits = ", ".join(f"{value / 1e9:.0f} GFLOP/s {name}" for name, value in found["limits"].items())
    return f"{found['threads']} threads, limit {limits}.\n\n" + format_rows(head, rows)


def encode_hours() -> str:
    """What 100 million passages of 256 tokens take at the measured rates, and their vectors at the measured size."""
    found, passages = read("encode_speed"), 100_000_000
    rows = []
    for name in ("sentence-transformers float32", "koret float32", "koret bfloat16", "OpenVINO int8"):
        texts = found["long"]["rows"][name]["tokens_per_second"] / 256
        hours = passages / texts / 3600
        rows.append([name, f"{texts:.1f}", f"{hours:,.0f}", f"{hours / 10:,.0f}"])
    built = read("index_speed")["engines"]["koret float16"]["1000000"]
    return format_rows(
        [
            f"offline base (6 layers), {found['threads']} threads",
            "texts a second",
            "hours",
            "such machines for one night",
        ],
        rows,
    ) + (
        f"\nA hundred times the measured million x 384 of float16: {built['build_seconds'] / 36:.1f} hours to write, "
        f"{built['disk_mb'] / 10:.0f} GB with short texts, {built['p50_ms'] / 10:.0f} s an exact query.\n"
    )


def serve_load() -> str:
    head = ["client", "at once", "koret: requests/s", "p50, p99 ms", "plain: requests/s", "p50, p99 ms", "ratio"]
    rows = []
    for row in read("serve_load_speed")["rows"]:
        cells = [
            cell
            for side in (row["koret"], row["plain"])
            for cell in (f"{side['requests_per_second']:.0f}", f"{side['p50_ms']:.0f}, {side['p99_ms']:.0f}")
        ]
        rows.append([row["client"], str(row["clients"]), *cells, f"{row['ratio']:.2f}"])
    return format_rows(head, rows)


def export() -> str:
    """Every kind of export: size, ranking, vectors, speed and verdict."""
    found, rows = read("export"), []
    for name, row in found["variants"].items():
        gap, (before, after) = row["ndcg@10"]["difference"], (row["speed"][key] for key in ("before", "after"))
        rows.append([
            name.replace(" merged,", ""), f"{row['bytes']['after'] / 1e6:.1f} MB",
            "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**gap),
            f"{min(cosine['worst'] for cosine in row['cosine'].values()):.5f}",
            f"{before['texts_per_second']:.0f} → {after['texts_per_second']:.0f}",
            " → ".join(f"{speed['p50_ms']:.0f} / {speed['p99_ms']:.0f}" for speed in (before, after)),
            "passed" if row["passed"] else "**failed**: " + ", ".join(name_failed(row)),
        ])  # fmt: skip
    first = found["variants"]["merged"]
    head = [
        "export",
        "size",
        "nDCG@10 difference [95%]",
        "worst cosine",
        "passages/s",
        "one question, p50 / p99 ms",
        "parity",
    ]
    task, machine = first["task"], found["machine"]
    return (
        f"{machine['threads']} threads, float32 original of {first['bytes']['before'] / 1e6:.1f} MB, tuned nDCG@10 "
        f"{first['ndcg@10']['before']:.3f}; {task['queries']} held-out questions of {task['groups']} articles over "
        f"{task['corpus']} passages.\n\n" + format_rows(head, rows)
    )


def name_failed(row: dict[str, Any]) -> list[str]:
    """What a failed export missed, in few words."""
    missed = [check["name"] for check in row["checks"] if not check["passed"]]
    return ["bits" if "rescoring" in name else "ranking" if "nDCG" in name else name for name in missed]


def export_stored() -> str:
    """nDCG@10 of every way to keep vectors of every length, tuned for it (Matryoshka) or not."""
    variants = {name: row for name, row in read("export")["variants"].items() if row["stored"]}
    ways = [way["name"] for way in next(iter(variants.values()))["stored"]]
    rows = []
    for name, row in variants.items():
        label = name.replace("merged, ", "").replace(" dimensions", "")
        for n, way in enumerate(row["stored"]):
            gap = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**way["difference"])
            rows.append(
                [label if not n else "", ways[n], str(way["searched"]), str(way["kept"]), f"{way['ndcg']:.3f}", gap]
            )
    return format_rows(["dimensions", "vectors", "bytes searched", "bytes kept", "nDCG@10", "difference [95%]"], rows)


def web_load() -> str:
    found = read("web_load")
    head = ["columns", "one user", f"{found['rows'][1]['users']} users who read", "as many, back to back"]
    rows: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        kind = "one" if row["users"] == 1 else row["kind"]
        rows.setdefault(row["columns"], {})[kind] = (
            f"{row['p50_ms']:.0f}, {row['p99_ms']:.0f} ({row['per_second']:.0f} a second)"
        )
    table = [[name, kinds["one"], kinds["reading"], kinds["back to back"]] for name, kinds in rows.items()]
    return f"Started in {found['start_s']} s.\n\n" + format_rows(head, table)


SYSTEMS = {"base": "base", "model": "**tuned**", "lexical": "BM25 bigrams"}
KOREAN = {"base": "베이스", "model": "**학습한 모델**", "lexical": "BM25 바이그램"}
METRICS = {"ndcg@10": "nDCG@10", "map": "MAP", "mrr@10": "MRR@10", "recall@10": "recall@10"}


def korquad1() -> str:
    """Every seed, the mean, the verdicts and what a run cost."""
    found, rows = read("korquad1")["runs"], []
    for run in found:
        for number, (role, name) in enumerate(SYSTEMS.items()):
            cells = [run["systems"][role][metric] for metric in METRICS]
            shown = [f"{cell['mean']:.3f} ({cell['low']:.3f}–{cell['high']:.3f})" for cell in cells]
            rows.append(
                [*([str(run["seed"]), f"{run['task']['queries']:,}"] if not number else ["", ""]), name, *shown]
            )
    means = [["mean" if row[0] == "base" else "", "", *row] for row in average_systems(SYSTEMS)]
    said = [f"- seed {run['seed']}: {say_difference(run['verdict'])}; {run['cpu_seconds'] / 60:.1f} CPU minutes, "
            f"{run['peak_bytes'] / 2**30:.1f} GB at the peak" for run in found]  # fmt: skip
    return (
        format_rows(["seed", "questions", "system", *METRICS.values()], [*rows, *means]) + "\n" + "\n".join(said) + "\n"
    )


def say_difference(verdict: dict[str, Any]) -> str:
    gap = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**verdict)
    return f"tuned - base {gap} nDCG@10: {verdict['verdict']}"


def average_systems(names: dict[str, str]) -> list[list[str]]:
    runs = read("korquad1")["runs"]
    return [
        [name, *(f"{fmean(run['systems'][role][metric]['mean'] for run in runs):.3f}" for metric in METRICS)]
        for role, name in names.items()
    ]


def korquad1_means() -> str:
    return format_rows(["", *METRICS.values()], average_systems({**SYSTEMS, "model": "**tuned with koret**"}))


def korquad1_means_ko() -> str:
    return format_rows(["", *METRICS.values()], average_systems(KOREAN))


def hybrid() -> str:
    """Every seed's systems and the curve of weights."""
    parts = []
    for run in read("hybrid")["runs"]:
        rows = []
        for name, row in run["systems"].items():
            gap = run["differences"].get(name, {}).get("BM25 bigrams")
            said = "{mean:+.4f} [{low:+.4f}, {high:+.4f}], {outcome}".format(**gap) if gap else ""
            rows.append(
                [name, *("{mean:.3f} ({low:.3f}–{high:.3f})".format(**row[m]) for m in ("ndcg@10", "recall@10")), said]
            )
        missed, curve = run["missed_by_bm25"], [f"{value:.3f}" for value in run["weights"].values()]
        parts.append(
            f"Seed {run['seed']}, {run['task']['queries']:,} questions. Weight of the dense score learned on held-out "
            f"questions {run['weight']}, on training questions {run['weight_of_training_questions']}. BM25 misses "
            f"{missed['questions']} questions in its first ten, the tuned model finds {missed['found_by_tuned']} of "
            "them.\n\n"
            + format_rows(["system", "nDCG@10", "recall@10", "minus BM25 bigrams, nDCG@10"], rows)
            + "\n" + format_rows(["weight", *run["weights"]], [["nDCG@10", *curve]])
        )  # fmt: skip
    return "\n".join(parts)


def train_speed(name: str = "train_speed") -> str:
    """A table a case: seconds a step, speed, memory and share of the machine's limit of every arm."""
    found, parts = read(name), []
    for case in found["cases"]:
        arms = {name: row for name, row in case["rows"].items() if "error" not in row}
        own = next(row["median"] for row in arms.values())  # koret's comes first
        rows = [
            [
                name, f"{row['median']:.2f}", f"{median(row['clock_seconds']):.2f}", f"{row['median'] / own:.2f}x",
                f"{row['pairs_per_second']:.1f}", f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['share_of_limit']:.0%}",
            ]
            for name, row in arms.items()
        ]  # fmt: skip
        head = ["arm", "CPU s a step", "clock s", "of koret's CPU", "pairs/s", "tokens/s", "peak MB", "of the limit"]
        rows += [[name, row["error"], *[""] * 6] for name, row in case["rows"].items() if "error" in row]
        per_token, threads, limits = case["operations"] / case["tokens"] / 1e6, case["threads"], case["limits"]
        parts.append(
            f"question -> {case['task']}, batch {case['batch']}: {case['tokens']:,.0f} tokens a step, "
            f"{per_token:.0f} million operations a token; {threads} thread{'s' * (threads > 1)}, "
            f"limits of {limits['fp32'] / 1e9:.0f} GFLOP/s in float32 and {limits['bf16'] / 1e9:.0f} in bfloat16\n\n"
            + format_rows(head, rows)
        )
    return "\n".join(parts)


def train_speed_float32() -> str:
    """The same on a processor without bfloat16."""
    return train_speed("train_speed_float32")


def train_speed_avx2() -> str:
    """The same held to what a processor with AVX2 alone has."""
    return train_speed("train_speed_avx2")


def train_speed_avx512_float32() -> str:
    """Everybody in float32 on the same processor."""
    return train_speed("train_speed_avx512_float32")


def train_speed_avx512() -> str:
    """The same on a processor with bfloat16 in AVX-512, without a matrix unit."""
    return train_speed("train_speed_avx512")


def lexical() -> str:
    rows = {(row["tokenizer"], row["k1"], row["b"]): row for row in read("lexical")["rows"]}
    names = {"bigram": "character bigrams", "kiwi": "morphemes (Kiwi)", "whitespace": "white space"}
    found = read("lexical")["tasks"]
    head = ["tokens", *(f"{own['queries']:,} questions of {own['groups']} articles" for own in found.values())]
    cells = [[names[name], *(f"{rows[name, 1.2, 0.75][task]['ndcg@10']:.3f}" for task in found)] for name in names]
    return format_rows(head, cells)


def data_speed() -> str:
    """What every task costs an article, and the goals with what was reached."""
    found = read("data_speed")
    cpu, times = found["cpu_ms_per_article"], found["times_less_cpu"]
    peak, workers = found["peak_mb"], found["worker_peak_mb"]
    names = {
        "naive pool": "naive pool (json.load of everything, regex chain on answers)",
        "soup": "BeautifulSoup over every page, on top of that",
        "pairs, JSON": "koret, question/answer pairs from JSON",
        "pairs, zip": "koret, pairs from the zip",
        "full, one process": "koret, every page cleaned, exact spans, passages, written",
        "full, one process, Python alone": "the same without the compiled extension",
        "floor": "reading the bytes and searching them once",
    }
    tasks = [
        [text, f"{cpu[n]:.2f}", f"{peak[n]:.0f}" + (f", workers {workers[n]:.0f}" if workers[n] else "")]
        for n, text in names.items()
    ]
    speed = found["gigabytes_per_cpu_second"]
    growth = max(value for own in found["growth_mb_when_doubled"].values() for value in own.values())
    most = max(value for part in (peak, workers) for n, value in part.items() if n.startswith(("pairs", "full")))
    pairs, zipped, full, plain = (
        next(value for name, value in times.items() if name.startswith(start))
        for start in ("pairs from JSON", "pairs from zip", "full than the naive", "full in Python alone")
    )
    articles, start = found["full_articles_per_cpu_second"], found["second_start_seconds"]
    goals = [
        ("pairs from JSON, less CPU than the naive pool", "10x", f"{pairs:.1f}x", pairs >= 10),
        ("pairs from JSON, GB a CPU second", "1", f"{speed['pairs, JSON']:.2f}", speed["pairs, JSON"] >= 1),
        ("pairs from the zip, less CPU than the naive pool on unpacked files", "5x", f"{zipped:.1f}x", zipped >= 5),
        ("full pages, less CPU than naive + BeautifulSoup", "12x", f"{full:.1f}x", full >= 12),
        ("full pages, articles a second and core", "700", f"{articles}", articles >= 700),
        ("peak memory of a process", "150 MB", f"{most:.0f} MB", most <= 150),
        ("growth when the files double", "5 MB", f"{growth:.1f} MB at most", growth < 5),
        ("second start, to the first pair", "0.1 s", f"{start:.4f} s", start < 0.1),
    ]
    reached = [[name, goal, value if met else f"**{value}, missed**"] for name, goal, value, met in goals]
    size = f"{found['bytes'] / 1e6:.0f} MB of JSON, {found['articles']:,} articles, {found['questions']:,} questions"
    parts = [
        f"{size}; {found['rounds']} rounds.\n",
        format_rows(["", "CPU ms an article", "peak MB"], tasks),
        format_rows(["", "goal", "measured"], reached),
        f"Without the compiled extension full pages take {plain:.1f}x less CPU than naive + BeautifulSoup, "
        f"{found['full_articles_per_cpu_second_in_python']} articles a second and core. "
        f"The floor itself reads {speed['floor']:.2f} GB a CPU second.\n",
    ]
    return "\n".join(parts)


def data_stages() -> str:
    found = read("data_stages")
    compiled, plain = (found["cpu_us_per_article"][way] for way in ("with the extension", "Python alone"))
    rows = [[n, f"{compiled[n]:,.0f}", f"{plain[n]:,.0f}", f"{plain[n] / compiled[n]:.1f}x"] for n in compiled]
    head = f"CPU µs a page: {found['articles']} pages, least of {found['rounds']} rounds"
    return format_rows([head, "with the extension", "Python alone", "less"], rows)


def recipes() -> str:
    """The whole section, which benchmarks/recipes.py --report put there first."""
    import recipe_report

    return recipe_report.format_section(read("recipes"))


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        index_speed,
        encode_speed,
        encode_hours,
        serve_load,
        export,
        export_stored,
        web_load,
        recipes,
        korquad1,
        korquad1_means,
        korquad1_means_ko,
        hybrid,
        train_speed,
        train_speed_float32,
        train_speed_avx2,
        train_speed_avx512,
        train_speed_avx512_float32,
        lexical,
        data_speed,
        data_stages,
    )  # fmt: skip
}


def fill(text: str) -> str:
    """A document with every table as the results have it. Raises KeyError for an unknown name."""
    return MARKS.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    stale = []
    for document in sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]):
        text = document.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(document.name)
            if "--check" not in sys.argv:
                document.write_text(filled, encoding="utf-8")
    print(", ".join(stale) or "every table is up to date")
    if stale and "--check" in sys.argv:
        raise SystemExit("run: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
