"""Every kind of export of one run side by side: size, speed, latency, vectors, and what it does to the ranking.

    python benchmarks/export.py RUN [--matryoshka RUN] [--only NAME ...]

``--matryoshka`` names a second run of the same data that was trained with matryoshka_dims: its cut vectors stand beside
those of a model that was not. Where vectors are cut, bits and bytes are measured too. What was measured earlier of the
same data stays in the result. Writes benchmarks/results/export.json; the tables of docs/EXPORT.md come from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
from pathlib import Path

import torch

from koret import runs
from koret.export import exporting

RESULT = Path(__file__).parent / "results" / "export.json"
VARIANTS = {
    "merged": ("merged", {}),
    "onnx": ("onnx", {}),
    "onnx int8": ("onnx", {"int8": True}),
    "openvino": ("openvino", {}),
    "openvino int8": ("openvino", {"int8": True}),
    "merged, trimmed": ("merged", {"trim_vocab": "run"}),
    "openvino int8, trimmed": ("openvino", {"int8": True, "trim_vocab": "run"}),
    "merged, strength 0.8": ("merged", {"lora_strength": 0.8}),
    "merged, 384 dimensions": ("merged", {"binary": True}),
    "merged, 256 dimensions": ("merged", {"dims": 256, "binary": True}),
    "merged, 128 dimensions": ("merged", {"dims": 128, "binary": True}),
    "merged, 64 dimensions": ("merged", {"dims": 64, "binary": True}),
}
CUT = [name for name, (_, given) in VARIANTS.items() if "binary" in given]
MATRYOSHKA = {f"Matryoshka {name}": VARIANTS[name] for name in CUT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--matryoshka", type=Path, metavar="RUN")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *MATRYOSHKA])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    run = runs.read_run(options.run)
    trained = None if options.matryoshka is None else runs.read_run(options.matryoshka)
    found = json.loads(RESULT.read_bytes()) if RESULT.exists() else {}
    variants = found["variants"] if found.get("run", {}).get("fingerprint") == run.data.get("fingerprint") else {}
    for name in options.only or [*VARIANTS, *(MATRYOSHKA if trained else ())]:
        if name in MATRYOSHKA and trained is None:
            parser.error(f"{name} needs --matryoshka RUN")
        report = variants[name] = measure(trained if name in MATRYOSHKA else run, *({**VARIANTS, **MATRYOSHKA}[name]))
        print(
            f"{name}: {'passed' if report['passed'] else 'FAILED'}, {report['bytes']['after'] / 1e6:.1f} MB", flush=True
        )
        result = {
            "run": {k: run.config[k] for k in ("model_name", "dataset_root", "max_seq_length")}
            | {"fingerprint": run.data.get("fingerprint")},
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.machine()},
            "versions": runs.describe_environment()["versions"],
            "variants": {key: variants[key] for key in [*VARIANTS, *MATRYOSHKA] if key in variants},
        }
        RESULT.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def measure(run: runs.Run, to: str, given: dict) -> dict:
    """The parity report of one variant, whether it passes or not."""
    given = {key: run.config["dataset_root"] if value == "run" else value for key, value in given.items()}
    with tempfile.TemporaryDirectory() as room:
        try:
            return exporting.export_model(run.path, to, out=Path(room) / "export", **given).parity.to_dict()
        except exporting.ParityFailed as failed:
            return failed.parity.to_dict()


if __name__ == "__main__":
    main()
