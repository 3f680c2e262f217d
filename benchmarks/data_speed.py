"""How fast and how lean is reading KorQuAD 2.1, next to the usual ways? Results go to results/data_speed.json.

Each task runs in a process of its own, tasks take turns, and the least CPU time (user + system, children included,
imports not) of all rounds counts: wall time says little on a shared machine. The files are generated with the real
shape and sizes (data_generator.py).

    python benchmarks/data_speed.py [--articles 1000] [--files 2] [--rounds 3]

naive pool   multiprocessing.Pool: json.load, a dictionary of everything, answers through a chain of regexes
soup         BeautifulSoup(context, "lxml").get_text(" ") of every page, on top of the naive pool
pairs        koret: question and clean answer of every record, from JSON and from the zip
full         koret: every page cleaned, exact spans, passages, keys, written and mapped (load_dataset), with the
             compiled extension and in Python alone
floor        reading the bytes and searching them once: nothing can be faster
"""

from __future__ import annotations

import argparse
import html
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "data_speed.json"


# ---- the usual ways


def clean_naively(text: str) -> str:
    """The chain of substitutions most loaders have."""
    text = re.sub(r"<!DOCTYPE[^>]*>", " ", text, flags=re.I)
    text = re.sub(r"<head.*?</head>", " ", text, flags=re.S | re.I)
    text = re.sub(r"<script.*?</script>", " ", text, flags=re.S | re.I)
    text = re.sub(r"<style.*?</style>", " ", text, flags=re.S | re.I)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"<br\s*/?>", "\n", text)
    text = re.sub(r"</(p|div|tr|li|h[1-6])>", "\n", text)
    text = re.sub(r"<[^>]+>", " ", text)
    text = html.unescape(text)
    text = re.sub(r"\[\d+\]|\[편집\]", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def load_naively(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        data = json.load(file)["data"]
    return [
        {
            "title": article["title"],
            "context": article["context"],
            "raw_html": article["raw_html"],
            "question": question["question"],
            "answer": clean_naively(question["answer"]["text"]),
        }
        for article in data
        for question in article["qas"]
    ]


# ---- tasks: each returns how many articles it did


def run_naive_pool(files: list[Path], _: Path) -> int:
    with multiprocessing.Pool(2) as pool:
        return len({row["title"] for rows in pool.map(load_naively, files) for row in rows})


def run_soup(files: list[Path], _: Path) -> int:
    from bs4 import BeautifulSoup

    with open(files[0], encoding="utf-8") as file:
        pages = [article["context"] for article in json.load(file)["data"][:SOUP_PAGES]]
    before = measure_cpu()
    for page in pages:
        BeautifulSoup(page, "lxml").get_text(" ")
    EXTRA["cpu"] = measure_cpu() - before
    return len(pages)


def run_pairs(files: list[Path], _: Path) -> int:
    from koret.data.korquad import Article, read_articles
    from koret.data.markup import clean_html_text
    from koret.data.sources import find_sources

    count, pairs = 0, []
    for file in files:
        for source in find_sources(file)[0]:
            for article in read_articles(source, contexts=False):
                if isinstance(article, Article):
                    count += 1
                    pairs += [(q.text, clean_html_text(a.text)) for q in article.questions for a in q.answers]
    return count


def run_full(files: list[Path], scratch: Path, workers: int = 0) -> int:
    from koret.data import native
    from koret.data.loader import load_dataset

    EXTRA["compiled"] = native.scan is not None
    dataset = load_dataset(files[0].parent, cache_dir=scratch, num_workers=workers, progress=False)
    EXTRA["questions"], EXTRA["passages"] = dataset.questions.num_rows, dataset.passages.num_rows
    return dataset.articles.num_rows


def run_full_workers(files: list[Path], scratch: Path) -> int:
    return run_full(files, scratch, workers=2)


def run_second_start(files: list[Path], scratch: Path) -> int:
    from koret.data.loader import load_dataset

    started = time.perf_counter()
    dataset = load_dataset(files[0].parent, cache_dir=scratch, progress=False)
    question = dataset.questions.slice(0, 1).to_pylist()[0]
    dataset.passages.column("text")[question["best"]].as_py()
    EXTRA["seconds"] = time.perf_counter() - started
    return dataset.articles.num_rows


def run_floor(files: list[Path], _: Path) -> int:
    block, count = bytearray(1 << 20), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                count += block.count(b'"qas": [', 0, size)
    return count


PLAIN = "full, one process, Python alone"
TASKS = {
    "naive pool": run_naive_pool,
    "soup": run_soup,
    "pairs, JSON": run_pairs,
    "pairs, zip": run_pairs,
    "full, one process": run_full,
    PLAIN: run_full,
    "full, two workers": run_full_workers,
    "second start": run_second_start,
    "floor": run_floor,
}
SOUP_PAGES = 100
EXTRA: dict[str, float] = {}


def measure_cpu() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_peak() -> float:
    """Most memory this process held, in MB. (ru_maxrss would start with what its parent held.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_task(name: str, files: list[Path], scratch: Path) -> None:
    """Run one task in this process and print what it took as JSON."""
    if name not in ("naive pool", "floor"):  # imports are not part of the work
        import bs4  # noqa: F401

        import koret.data.loader  # noqa: F401
    if name.startswith("full"):
        shutil.rmtree(scratch, ignore_errors=True)
    cpu, wall = measure_cpu(), time.perf_counter()
    articles = TASKS[name](files, scratch)
    result = {"articles": articles, "cpu": measure_cpu() - cpu, "wall": time.perf_counter() - wall, **EXTRA}
    result["peak_mb"] = measure_peak()
    result["worker_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps(result))


def spawn(name: str, files: list[Path], scratch: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", name, "--scratch", str(scratch), *map(str, files)]
    environment = os.environ | {"KORET_PURE_PYTHON": str(int(name == PLAIN))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


# ---- the comparison


def compare(folder: Path, articles: int, files: int, rounds: int) -> dict:
    import data_generator

    print(f"writing {2 * files} files of {articles:,} articles ...", flush=True)
    half, whole, packed = folder / "half", folder / "whole", folder / "zips"
    data_generator.write_files(half, files, articles)
    data_generator.write_files(whole, 2 * files, articles)
    data_generator.write_files(packed, files, articles, packed=True)
    flat = {name: sorted(path.rglob("*.json")) for name, path in {"half": half, "whole": whole}.items()}
    for name, paths in flat.items():  # one folder each, so that load_dataset takes all of it
        for path in paths:
            path.rename(folder / name / path.name)
    inputs = {name: sorted((folder / name).glob("*.json")) for name in flat} | {"zips": sorted(packed.glob("*.zip"))}
    runs: dict[str, list[dict]] = {name: [] for name in TASKS}
    for number in range(rounds):
        for name in TASKS:
            scratch = folder / (f"cache {name}" if name.startswith("full, ") else "cache full, one process")
            runs[name].append(spawn(name, inputs["zips" if name == "pairs, zip" else "half"], scratch))
            print(f"round {number + 1}: {name}: {runs[name][-1]['cpu']:.2f} s CPU", flush=True)
    doubled = {
        name: spawn(name, inputs["whole"], folder / "cache4") for name in ("full, one process", "full, two workers")
    }
    best = {name: min(found, key=lambda run: run["cpu"]) for name, found in runs.items()}
    size = sum(path.stat().st_size for path in inputs["half"])
    return summarise(best, doubled, size, articles * files, rounds)


def summarise(best: dict[str, dict], doubled: dict[str, dict], size: int, articles: int, rounds: int) -> dict:
    each = {name: run["cpu"] / run["articles"] for name, run in best.items()}
    full, plain, pairs = (each[name] for name in ("full, one process", PLAIN, "pairs, JSON"))
    growth = {
        name: {key: doubled[name][key] - best[name][key] for key in ("peak_mb", "worker_peak_mb")} for name in doubled
    }
    return {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
        },
        "rounds": rounds,
        "articles": articles,
        "bytes": size,
        "cpu_ms_per_article": {name: round(1000 * value, 4) for name, value in each.items()},
        "peak_mb": {name: round(run["peak_mb"], 1) for name, run in best.items()},
        "worker_peak_mb": {name: round(run["worker_peak_mb"], 1) for name, run in best.items()},
        "growth_mb_when_doubled": {n: {k: round(v, 1) for k, v in found.items()} for n, found in growth.items()},
        "questions": best["full, one process"]["questions"],
        "passages": best["full, one process"]["passages"],
        "second_start_seconds": round(best["second start"]["seconds"], 4),
        "gigabytes_per_cpu_second": {
            name: round(size / 1e9 / (each[name] * articles), 3) for name in ("pairs, JSON", "pairs, zip", "floor")
        },
        "full_is_compiled": best["full, one process"]["compiled"],
        "full_articles_per_cpu_second": round(1 / full),
        "full_articles_per_cpu_second_in_python": round(1 / plain),
        "times_less_cpu": {
            "pairs from JSON than the naive pool": round(each["naive pool"] / pairs, 2),
            "pairs from zip than the naive pool (on unpacked files)": round(each["naive pool"] / each["pairs, zip"], 2),
            "full than the naive pool and BeautifulSoup": round((each["naive pool"] + each["soup"]) / full, 2),
            "full in Python alone than the naive pool and BeautifulSoup": round(
                (each["naive pool"] + each["soup"]) / plain, 2
            ),
            "full than full in Python alone": round(plain / full, 2),
            "floor than pairs from JSON": round(pairs / each["floor"], 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files_given", nargs="*", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--articles", type=int, default=1000, help="articles a file")
    parser.add_argument("--files", type=int, default=2, help="files; the memory test doubles them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.task:
        run_task(options.task, options.files_given, options.scratch)
        return
    with tempfile.TemporaryDirectory(prefix="koret-bench-") as folder:
        found = compare(Path(folder), options.articles, options.files, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
