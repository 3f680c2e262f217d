"""The model card: what a tuned model is, what it scores beside its base and BM25, how to load it, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koret.evaluation.metrics import PRIMARY
from koret.evaluation.report import EvaluationReport, Section
from koret.evaluation.scores import format_gap, label
from koret.evaluation.significance import Interval

_RECIPE = (
    "positives", "num_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate",
    "warmup_steps", "scale", "mask_false_negatives", "max_seq_length", "passage_tokens", "passage_overlap", "precision",
    "use_lora", "lora_variant", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "train_embeddings",
    "quantize_base", "train_split", "seed",
)  # fmt: skip
_LICENCES = (
    ("korquad", "KorQuAD is CC BY-ND 2.0 KR (LG CNS) and its pages come from Korean Wikipedia (CC BY-SA); "
     "no text of it is part of this model directory"),
    ("sample", "the data set embedded in koret, Apache-2.0"),
)  # fmt: skip


def format_model_card(
    config: Mapping[str, Any], data: Mapping[str, Any], report: EvaluationReport, *, dimensions: int | None = None
) -> str:
    """README.md of a model directory. ``config`` is training_config.json, ``data`` the run's data.json.

    Names of local files and folders are given without their directories.
    """
    base = _name(config.get("model_name", ""))
    parts = [
        _format_header(config),
        f"# {Path(base).name}, tuned for Korean retrieval\n",
        f"A sentence-transformers model{f' of {dimensions} dimensions' if dimensions else ''}: questions and passages "
        f"become unit vectors, the dot product ranks. Tuned from `{base}` with koret.\n",
        _format_outcome(report),
        *(_format_scores(section) for section in (*report.sections, *report.extra)),
        _format_loading(config),
        "## Recipe\n\n| setting | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {_show(config[key])} |" for key in _RECIPE if key in config)
        + "\n\nEvery setting as used: `training_config.json`.\n",
        _format_data(config, data),
        _format_limits(config, report),
    ]
    return "\n".join(parts)


def _format_header(config: Mapping[str, Any]) -> str:
    return (
        "---\nlanguage: ko\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        f"base_model: {_name(config.get('model_name', ''))}\n"
        "tags:\n- sentence-transformers\n- feature-extraction\n- retrieval\n- korean\n---\n"
    )


def _format_outcome(report: EvaluationReport) -> str:
    lines = [f"**{report.verdict.capitalize()}.** {report.conclusion}"] if report.verdict else []
    for section in report.sections:
        lines += [f"{section.task.name}: {line}" for line in section.lines[1 if section.verdict else 0 :]]
    lines.append(report.cleanness)
    return "## Is it better than its base?\n\n" + "\n\n".join(lines) + "\n"


def _format_scores(section: Section) -> str:
    task = section.task
    rows = [[row.system, *(_format(row.metrics[name]) for name in PRIMARY)] for row in section.rows]
    if section.gaps:
        rows.append(["tuned - base", *(format_gap(section.gaps[name]) for name in PRIMARY)])
    rows = [["", *map(label, PRIMARY)], ["---"] * (len(PRIMARY) + 1), *rows]
    return (
        f"## {task.name}\n\n{len(task.queries):,} questions over {len(task.corpus):,} texts; 95% intervals by "
        "bootstrap over whole articles.\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    )


def _format_loading(config: Mapping[str, Any]) -> str:
    lora = (
        "\n`lora_weights/` holds the adapters alone, for `peft.PeftModel.from_pretrained` on the base's transformer.\n"
        if config.get("use_lora")
        else ""
    )
    return (
        "## Use\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/model")\n'
        'queries = model.encode(["대한민국에서 가장 높은 산은 무엇인가?"], prompt_name="query")\n'
        'passages = model.encode(["한라산은 제주도에 있는 해발 1,947m의 산이다."], prompt_name="passage")\n'
        "print(queries @ passages.T)\n```\n\n"
        f"The prompts `{config.get('query_prefix', 'query: ')}` and `{config.get('passage_prefix', 'passage: ')}` "
        f"belong to the model. Texts are cut at {config.get('max_seq_length')} tokens.\n{lora}"
    )


def _format_data(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    source = str(config.get("dataset_root", data.get("source", "")))
    licence = next((text for word, text in _LICENCES if word in source.lower()), "see the data set's own licence")
    facts = [
        ("source", _name(source)),
        ("fingerprint", data.get("fingerprint")),
        ("training articles", data.get("training_articles")),
        ("held-out articles", data.get("held_out_articles")),
        ("pairs", data.get("pairs")),
    ]
    lines = "\n".join(f"| {name} | {_show(value)} |" for name, value in facts if value is not None)
    return (
        f"## Data\n\n| | |\n|---|---|\n{lines}\n\nThe split is by article: no article, question, or passage that "
        f"answers one stands on both sides. Licence of the data: {licence}. The weights also stand under the licence "
        "of the base model.\n"
    )


def _format_limits(config: Mapping[str, Any], report: EvaluationReport) -> str:
    limits = [
        "Scores hold for questions like those above. Such questions were written with the passage in sight, which "
        "flatters word matching (see BM25 above) and says little about other kinds of search.",
        "The intervals cover the choice of articles, not the choice of training seed.",
        "The best step was chosen on the same held-out questions, which flatters the tuned model a little.",
        f"Text beyond {config.get('max_seq_length')} tokens is not read: cut long documents into passages first.",
    ]
    if not report.extra:
        limits.append(
            "What the model lost on other data was not measured: score it on other sets with `koret evaluate --extra`."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) + "\n"


def _format(value: Interval) -> str:
    return f"{value.mean:.3f}" + ("" if value.low != value.low else f" ({value.low:.3f}–{value.high:.3f})")


def _name(path: str) -> str:
    """A hub name as it is, a local path as its last part, the packaged base by its hub name."""
    if path == "offline":
        return "sentence-transformers/all-MiniLM-L6-v2"
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else Path(path).name


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
