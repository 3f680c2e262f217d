"""From a run to a folder that loads elsewhere: written, measured, and only then put in its place."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from koret import files, runs
from koret.evaluation import sweep
from koret.evaluation.beir import read_beir
from koret.evaluation.selection import find_runs, open_data, select_questions
from koret.evaluation.tasks import RetrievalTask
from koret.export import conversion, layout, parity, vocabulary
from koret.export.binary import OVERSAMPLE
from koret.export.parity import LIMITS, Parity
from koret.export.runtime import open_exported
from koret.privacy import scrub
from koret.retrieval.encoder import TextEncoder, load_encoder

TARGETS = ("merged", "onnx", "openvino")
RECORD, REPORT = "export.json", "parity.json"


class ParityFailed(RuntimeError):
    """The export does not rank as the original does; ``parity`` holds all that was measured."""

    def __init__(self, message: str, found: Parity) -> None:
        super().__init__(message)
        self.parity = found


@dataclass(frozen=True)
class Export:
    """A finished export: its folder, what it is (export.json) and what was measured (parity.json)."""

    folder: Path
    record: dict[str, Any]
    parity: Parity


def export_model(
    model: str | Path,
    to: str,
    *,
    int8: bool = False,
    dims: int | None = None,
    binary: bool = False,
    trim_vocab: str | Path | None = None,
    trim_anyway: bool = False,
    lora_strength: float | None = None,
    extra: Sequence[str | Path] = (),
    out: str | Path | None = None,
    dataset_root: str | Path | None = None,
    max_queries: int | None = None,
    limit_ndcg: float | None = None,
    limit_cosine: float | None = None,
    keep_failed: bool = False,
    progress: bool = False,
    **loading: Any,
) -> Export:
    """Write ``model`` (a run, a model directory, a hub name or 'offline') for other programs, and prove it.

    ``to``: 'merged' (safetensors), 'onnx' or 'openvino'; ``int8`` for the last two. ``dims`` keeps the first numbers of
    a vector; ``binary`` also measures bits with rescoring; ``trim_vocab`` is a text file (a passage a line) or a data
    set whose tokens stay; ``lora_strength`` is the share of the tuning kept. On ``extra`` (BEIR folders) is reported
    what that share, or without one the whole tuning, forgot.
    ``dataset_root``: what is asked (default: the run's own questions). ``loading`` goes to ``load_dataset``.

    The default folder is ``exports/`` in the run. Raises ParityFailed when a limit does not hold: then no folder is
    left, unless ``keep_failed`` (as ``OUT.failed``); ValueError, FileNotFoundError or RuntimeError in words.
    """
    kind = _check_request(to, int8, dims, lora_strength)
    _check_limits(limit_ndcg, limit_cosine)
    conversion.require_packages(kind)
    trained = find_runs(model)
    if (lora_strength is not None or extra) and not trained:
        raise ValueError(f"--lora-strength and --extra: {model} is not a run, so what it was tuned from is not known")
    target = _choose_folder(out, model, trained, kind, dims, trim_vocab, lora_strength)
    others = [read_beir(folder) for folder in extra]
    encoder = load_encoder(model, device="cpu")
    if dataset_root is None and not trained:
        raise ValueError(f"{model} is not a run of koret, so it has no questions of its own: name some, --dataset-root")
    layout.check_modules(encoder)
    if dims is not None:
        layout.check_dims(encoder, dims)
    trim, trimmed = None, None
    if trim_vocab is not None:
        texts = read_corpus(trim_vocab, encoder, trained, **loading)
        trim = vocabulary.plan_trim(encoder, texts, anyway=trim_anyway)
    source = dataset_root if dataset_root is not None else trained[0].config["dataset_root"]
    chosen = select_questions(
        *open_data(source, encoder, trained, progress=progress, **loading),
        trained=trained, kinds=("passage",), max_queries=max_queries,
    )  # fmt: skip
    task = chosen.tasks[0]
    fingerprint = encoder.fingerprint()
    strength = None
    if lora_strength is not None or extra:
        weight = 1.0 if lora_strength is None else lora_strength
        strength = _set_strength(encoder, trained[0], weight, [task, *others], progress)
    reference = parity.measure_reference(task, encoder, progress=progress)
    if trim is not None:
        trimmed = _describe_trim(trim, vocabulary.trim_encoder(encoder, trim, texts), trim_vocab)
    encoder = layout.shape_output(encoder, dims)
    limits = replace(
        LIMITS[kind],
        **{k: v for k, v in (("ndcg", limit_ndcg), ("cosine", limit_cosine)) if v is not None},
    )
    record = {
        "kind": kind,
        "model": trained[0].name if trained else Path(str(model)).name,
        "tuned": bool(trained),
        "fingerprint": fingerprint,
        "dimensions": encoder.dimensions,
        "lora_strength": 1.0 if lora_strength is None else lora_strength,
        "vocabulary_trimmed": trim is not None,
        "vectors": {"search": "ubinary", "rescore": "int8", "oversample": OVERSAMPLE} if binary else None,
        "data": chosen.describe(),
        "versions": runs.describe_environment()["versions"],
    }
    with files.stage_folder(target) as folder:
        write_model(encoder, kind, folder)
        size = sum(file.stat().st_size for file in _list_model_files(folder))
        exported = open_exported(folder, threads=torch.get_num_threads())
        found = parity.measure_parity(
            kind,
            reference,
            load_encoder(model, device="cpu"),
            exported,
            size,
            limits,
            trim=trim,
            binary=binary,
            progress=progress,
        )
        found.trim, found.strength = trimmed, strength
        files.write_json(folder / RECORD, scrub(record))
        files.write_json(folder / REPORT, scrub(found.to_dict()))
        _write_card(folder, trained, record, found)
        if not found.passed:
            left = "nothing was written"
            if keep_failed:
                failed = target.with_name(target.name + ".failed")
                with files.stage_folder(failed) as kept:
                    shutil.copytree(folder, kept, dirs_exist_ok=True)
                left = f"it is kept for study in {failed}"
            raise ParityFailed(f"the {kind} export failed: {found.failures}; {left}", found)
    return Export(target, record, found)


def write_model(encoder: TextEncoder, kind: str, folder: Path) -> None:
    """The files of one kind of export, unmeasured; ``folder`` exists."""
    layout.save_classic(encoder, folder, weights=kind == "merged")
    if kind == "merged":
        return
    with tempfile.TemporaryDirectory() as room:
        plain = folder / conversion.ONNX_FILE if kind == "onnx" else Path(room) / "model.onnx"
        conversion.write_onnx(encoder, plain)
        if kind == "onnx-int8":
            (folder / conversion.ONNX_INT8_FILE).parent.mkdir(parents=True)
            conversion.quantize_onnx(plain, folder / conversion.ONNX_INT8_FILE)
        elif kind == "openvino":
            conversion.write_openvino(plain, folder / conversion.OPENVINO_FILE, int8=False)
        elif kind == "openvino-int8":
            conversion.write_openvino(plain, folder / conversion.OPENVINO_INT8_FILE, int8=True)


def read_corpus(
    source: str | Path, encoder: TextEncoder, trained: Sequence[runs.Run] = (), **loading: Any
) -> list[vocabulary.Text]:
    """(kind, text) of a text file (a passage a line) or of a data set's passages and questions, each text once."""
    from koret.data.passages import join_heading

    if str(source).endswith(".txt"):
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file or folder: {source}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error
        passages, questions = [line.strip() for line in lines if line.strip()], []
    else:
        dataset, _ = open_data(source, encoder, trained, **loading)
        columns = (dataset.passages.column(name).to_pylist() for name in ("heading", "text"))
        passages = [join_heading(heading, text) for heading, text in zip(*columns, strict=True)]
        questions = [text for text in dataset.questions.column("text").to_pylist() if text]
    if not passages:
        raise ValueError(f"{source} holds no text to keep a vocabulary for")
    texts = [("passage", text) for text in passages] + [("query", text) for text in questions]
    return list(dict.fromkeys(texts))


def _check_request(to: str, int8: bool, dims: int | None, strength: float | None) -> str:
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}; choose one of {', '.join(TARGETS)}")
    if int8 and to == "merged":
        raise ValueError("--int8 needs an engine that computes with it: --to onnx or --to openvino")
    if dims is not None and dims < 1:
        raise ValueError(f"--dims must be at least 1, not {dims}")
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"--lora-strength must lie between 0 (the base) and 1 (the tuned model), not {strength}")
    return f"{to}-int8" if int8 else to


def _check_limits(ndcg: float | None, cosine: float | None) -> None:
    if ndcg is not None and not 0 <= ndcg < math.inf:
        raise ValueError(f"--limit-ndcg must be a number from 0 on, not {ndcg}")
    if cosine is not None and not -1 <= cosine <= 1:
        raise ValueError(f"--limit-cosine must lie between -1 and 1, not {cosine}")


def _choose_folder(
    out: str | Path | None, model: str | Path, trained: Sequence[runs.Run], kind: str, dims: int | None,
    trim: str | Path | None, strength: float | None,
) -> Path:  # fmt: skip
    """The folder to write; an earlier export there is replaced, anything else is left alone."""
    parts = [kind, f"{dims}d" if dims else "", "trimmed" if trim else "", "" if strength is None else f"w{strength:g}"]
    name = "-".join(part for part in parts if part)
    if out is None:
        home = trained[0].path / "exports" if trained else Path("exports") / Path(str(model)).name
        target = home / name
    else:
        target = Path(out).expanduser()
    if target.exists() and not (target / RECORD).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is no export of koret: name another folder with --out")
    return target.resolve()


def _set_strength(
    encoder: TextEncoder, run: runs.Run, strength: float, tasks: Sequence[RetrievalTask], progress: bool
) -> dict[str, Any]:
    """Move the weights to ``strength`` between base and tuned; what that does at home and on the other tasks."""
    base = load_encoder(run.config["model_name"], device="cpu", max_seq_length=encoder.max_seq_length)
    start, end = sweep.copy_state(base), sweep.copy_state(encoder)
    found = sweep.sweep_encoders(encoder, base, tasks, weights=(strength, 1.0), progress=progress)
    sweep.set_state(encoder, sweep.interpolate(start, end, strength))
    return {"weight": strength, **found.to_dict(), "model": run.name}


def _describe_trim(trim: vocabulary.Trim, proof: vocabulary.Proof, source: str | Path) -> dict[str, Any]:
    return {
        "corpus": Path(source).name,
        "tokens_before": trim.tokens_before,
        "tokens_after": len(trim.kept),
        "tokens_used": trim.used,
        "corpus_tokens": trim.corpus_tokens,
        "unseen_estimate": trim.unseen,
        "proof": proof.to_dict(),
    }


def _list_model_files(folder: Path) -> list[Path]:
    endings = (".safetensors", ".onnx", ".data", ".xml", ".bin")
    return [file for file in folder.rglob("*") if file.suffix in endings or file.name == "tokenizer.json"]


def _write_card(folder: Path, trained: Sequence[runs.Run], record: dict[str, Any], found: Parity) -> None:
    """The run's model card, and below it what this export is."""
    card = ""
    if trained and trained[0].model and (trained[0].model / "README.md").is_file():
        card = (trained[0].model / "README.md").read_text(encoding="utf-8").rstrip() + "\n\n"
    rows = "".join(f"| {name} | {before} | {after} |\n" for name, before, after in parity.summarize(found))
    verdict = "passed" if found.passed else f"FAILED: {found.failures}"
    text = f"## Export: {record['kind']}\n\n| | original | this export |\n|---|---|---|\n{rows}\nParity {verdict}.\n"
    if found.strength:
        text += "".join(f"\n- {line}" for line in parity.describe_strength(found.strength)) + "\n"
    (folder / "README.md").write_text(card + text, encoding="utf-8")
