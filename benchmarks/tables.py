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
    for name in ("sentence-transformers float32", "koret float32", "OpenVINO int8"):
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


def recipes() -> str:
    """The whole section, which benchmarks/recipes.py --report put there first."""
    import recipe_report

    return recipe_report.format_section(read("recipes"))


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (index_speed, encode_speed, encode_hours, serve_load, web_load, recipes)
}


def fill(text: str) -> str:
    """A document with every table as the results have it. Raises KeyError for an unknown name."""
    return MARKS.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    stale = []
    for document in sorted((ROOT / "docs").glob("*.md")):
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
