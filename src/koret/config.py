"""TrainingConfig: every knob, its default, its meaning, its validation."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


def _knob(default: Any, help: str, group: str, **limits: Any) -> Any:
    """Declare a field: default, one line of help, the group it is shown under, and the limits it must keep."""
    return field(default=default, metadata={"help": help, "group": group, **limits})


@dataclass(init=False, eq=True)
class TrainingConfig:
    """Everything that decides what a training run does.

    Values are checked when the object is built: every problem (unknown key, wrong type, value out of range)
    is collected and raised in one ``ValueError``. The same checks serve Python, YAML files and the command line.
    """

    # model
    model_name: str = _knob(
        "intfloat/multilingual-e5-small", "base embedder: hub name, local path, or 'offline'", "model"
    )
    max_seq_length: int = _knob(256, "tokens a text is cut to", "model", least=8, most=8192)
    query_prefix: str = _knob("query: ", "put before every question", "model")
    passage_prefix: str = _knob("passage: ", "put before every passage and answer", "model")
    # data
    dataset_root: str = _knob("sample", "file, folder or zip to train on, or 'sample' for the embedded set", "data")
    train_split: float = _knob(
        0.9, "share of the articles used for training, the rest is held out", "data", above=0.0, below=1.0
    )
    max_samples: int | None = _knob(None, "use at most this many training questions", "data", least=2)
    eval_samples: int | None = _knob(None, "score at most this many held-out questions", "data", least=1)
    eval_corpus_size: int = _knob(
        20000, "passages searched in evaluation: all held-out ones, filled up with training passages", "data", least=1
    )
    passage_tokens: int | None = _knob(
        None,
        "passage budget in tokens; none: pages are cut at max_seq_length, ready-made paragraphs stay whole",
        "data",
        least=16,
    )
    passage_overlap: float = _knob(
        0.0, "share of a passage repeated at the start of the next", "data", least=0.0, below=0.5
    )
    max_bad: float = _knob(
        0.001, "stop above this share of bad records; by default ten may always pass", "data", least=0.0, most=1.0
    )
    positives: Literal["passage", "answer", "both"] = _knob(
        "passage", "what a question is pulled towards: the passage holding its answer, the answer text, or both", "data"
    )
    num_workers: int = _knob(
        4, "processes that read and clean data; the result does not depend on it", "data", least=0, most=256
    )
    cache_dir: str | None = _knob(None, "where prepared data is kept; none: $KORET_CACHE or ~/.cache/koret", "data")
    # hard negatives
    hard_negatives: str | None = _knob(None, "file of `koret mine`: passages to push a question away from", "training")
    negatives_per_question: int = _knob(
        1,
        "mined negatives used for a question, the best-ranked first; each costs encoding a passage",
        "training",
        least=1,
    )
    remine_every: int | None = _knob(
        None, "mine anew with the model as it is after every so many epochs, and go on with that", "training", least=1
    )
    # optimisation
    batch_size: int = _knob(16, "questions per step, each with up to batch_size - 1 negatives", "training", least=2)
    batching: Literal["shuffle", "article"] = _knob(
        "shuffle",
        "shuffle: any questions share a batch; article: several of a passage and of an article do, which makes "
        "negatives harder and encodes fewer passages",
        "training",
    )
    num_epochs: int = _knob(3, "passes over the training questions", "training", least=1)
    max_steps: int | None = _knob(
        None, "stop after this many optimizer steps, whatever num_epochs says", "training", least=1
    )
    learning_rate: float = _knob(2e-5, "peak of the warm-up + linear-decay schedule", "training", above=0.0, most=10.0)
    warmup_steps: int = _knob(
        500, "steps of linear warm-up (cut to a tenth of a run shorter than ten times this)", "training", least=0
    )
    weight_decay: float = _knob(0.01, "AdamW weight decay", "training", least=0.0)
    max_grad_norm: float = _knob(1.0, "gradient norm is clipped to this", "training", above=0.0)
    gradient_accumulation_steps: int = _knob(
        1, "batches summed per optimizer step; adds no negatives (raise batch_size for those)", "training", least=1
    )
    scale: float = _knob(20.0, "cosine similarities are multiplied by this: 1 / temperature", "training", above=0.0)
    mask_false_negatives: bool = _knob(True, "leave known positives out of the in-batch negatives", "training")
    learn_scale: bool = _knob(False, "train the scale too, from the given one, at most 100 (as CLIP does)", "training")
    multi_positive: bool = _knob(
        False, "average over all known positives in the batch instead of only leaving them out", "training"
    )
    symmetric: bool = _knob(False, "average with the loss from passages to questions", "training")
    same_tower_negatives: bool = _knob(
        False, "other questions are negatives of a question too; with symmetric, passages of a passage", "training"
    )
    hardness_weight: float = _knob(
        0.0, "a negative counts exp(this * its cosine) times; 0: all alike", "training", least=0.0, most=100.0
    )
    guide_model: str | None = _knob(
        None, "a model that judges negatives: what it holds for a positive is left out", "training"
    )
    guide_margin: float | None = _knob(
        0.0,
        "left out is what the guide scores above the positive's score less this; none: it only teaches",
        "training",
        least=0.0,
        most=2.0,
    )
    guide_margin_kind: Literal["absolute", "relative"] = _knob(
        "absolute", "guide_margin as a cosine, or as a share of the positive's score", "training"
    )
    matryoshka_dims: tuple[int, ...] = _knob(
        (), "vector lengths trained besides the full one, so that vectors may be cut to them", "training"
    )
    distillation: Literal["none", "margin_mse", "kl"] = _knob(
        "none", "learn a teacher's scores too: the guide's, else those of mined hard negatives", "training"
    )
    distillation_weight: float = _knob(1.0, "weight of the distillation beside the loss", "training", above=0.0)
    distillation_temperature: float = _knob(
        0.05, "kl: the teacher's scores are divided by this, the model's multiplied by scale", "training", above=0.0
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _knob(
        "auto", "arithmetic of the frozen base; adapters and loss stay float32", "training"
    )
    gradient_checkpointing: bool = _knob(
        False, "recompute layers in the backward pass: less memory, more time", "training"
    )
    torch_compile: bool | None = _knob(
        None, "fuse a layer's small operations by torch.compile; none: on a GPU, where a trial is faster", "training"
    )
    micro_batch_tokens: int | None = _knob(
        None,
        "tokens encoded at a time (GradCache): any batch_size in this much memory; none: chosen for the device",
        "training",
        least=64,
    )
    max_memory_gb: float | None = _knob(
        None,
        "GiB each process may hold, on its GPU if it has one: it keeps less, or encodes in pieces; none: what is free",
        "training",
        above=0.0,
    )
    seed: int = _knob(42, "fixes split, order, adapters and dropout", "training", least=0, most=2**31 - 1)
    # adapters
    use_lora: bool = _knob(True, "train low-rank adapters; false trains every weight", "lora")
    lora_variant: Literal["lora", "rslora", "dora"] = _knob(
        "lora", "lora; rslora scales by lora_alpha / sqrt(lora_r); dora also trains the length of every row", "lora"
    )
    lora_r: int = _knob(8, "rank of the adapters", "lora", least=1)
    lora_alpha: float = _knob(16, "adapter output is scaled by lora_alpha / lora_r", "lora", above=0.0)
    lora_dropout: float = _knob(0.1, "dropout on the adapters' input", "lora", least=0.0, below=1.0)
    lora_target_modules: tuple[str, ...] = _knob(
        ("query", "key", "value"),
        "linear layers that get an adapter, by the end of their name; all-linear for every one",
        "lora",
    )
    train_embeddings: bool | None = _knob(
        None, "train the embedding table; none: in full fine-tuning yes, beside adapters no", "lora"
    )
    quantize_base: Literal["none", "nf4"] = _knob(
        "none", "keep the frozen base in 4 bits under its adapters (QLoRA; needs koret[qlora])", "lora"
    )
    # watching and saving
    log_dir: str = _knob("./logs/tensorboard", "runs are created in here", "logging")
    log_every_n_steps: int = _knob(10, "steps between two records of loss, rate and speed", "logging", least=1)
    log_gradients: bool = _knob(True, "record gradient norms per module", "logging")
    log_gradient_histograms: bool = _knob(False, "also record gradient histograms", "logging")
    save_steps: int = _knob(1000, "steps between two evaluations and checkpoints", "logging", least=1)
    save_total_limit: int = _knob(2, "checkpoints kept (the best model is kept besides)", "logging", least=1)
    patience: int | None = _knob(None, "stop after this many evaluations without a better score", "logging", least=1)

    def __init__(self, **values: Any) -> None:
        problems = []
        names = {f.name for f in dataclasses.fields(self)}
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                problems.append(f"unknown setting '{key}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        types_of = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = values.get(f.name, f.default)
            if f.name in values:
                try:
                    value = _coerce(value, types_of[f.name])
                    _check_limits(value, f.metadata)
                except ValueError as error:
                    problems.append(f"{f.name}: {error}")
            setattr(self, f.name, value)
        if not problems:
            problems += self._find_conflicts()
        if problems:
            raise ValueError(_format_problems(problems))

    def _find_conflicts(self) -> list[str]:
        problems = []
        for name in ("model_name", "dataset_root", "log_dir"):
            if not getattr(self, name).strip():
                problems.append(f"{name}: must not be empty")
        if self.use_lora and not self.lora_target_modules:
            problems.append("lora_target_modules: name at least one layer, or set use_lora to false")
        if not self.use_lora and self.quantize_base != "none":
            problems.append(
                "quantize_base: weights in 4 bits cannot train; set use_lora to true, or quantize_base to none"
            )
        if self.multi_positive and not self.mask_false_negatives:
            problems.append("multi_positive: averages over known positives, so leave mask_false_negatives at true")
        if self.learn_scale and self.scale > 100:
            problems.append("scale: a learned scale is at most 100; start lower, or set learn_scale to false")
        if self.guide_model is not None and self.guide_margin is None and self.distillation == "none":
            problems.append("guide_model: has nothing to do; give guide_margin a number, or ask for a distillation")
        needs = {
            "guide_margin": ("guide_model", self.guide_model is None),
            "guide_margin_kind": ("guide_model", self.guide_model is None),
            "distillation_weight": ("distillation", self.distillation == "none"),
            "distillation_temperature": ("distillation kl", self.distillation != "kl"),
        }
        for name, (needed, missing) in needs.items():
            if missing and getattr(self, name) != getattr(type(self), name):
                problems.append(f"{name}: does nothing without {needed}; set that, or leave this out")
        if self.remine_every is not None and self.distillation != "none" and self.guide_model is None:
            problems.append(
                "distillation: with remine_every the scores of mined negatives are the model's own and teach nothing; "
                "give a guide_model as the teacher, or leave one of them out"
            )
        if any(size < 1 for size in self.matryoshka_dims):
            problems.append("matryoshka_dims: every length must be at least 1")
        return problems

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> TrainingConfig:
        """Read a YAML (or JSON) file of settings; ``overrides`` win over the file.

        Raises ValueError naming the file: unreadable, not a mapping, or any problem of its values.
        """
        return cls(**{**read_settings(path), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def print_summary(self) -> None:
        """Print every setting by group; values that differ from the default are marked with ``*``."""
        print(self.format_summary())

    def format_summary(self) -> str:
        """The text of ``print_summary``."""
        lines, group = [], None
        for f in dataclasses.fields(self):
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                lines.append(f"[{group}]")
            value = getattr(self, f.name)
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f" {'*' if value != f.default else ' '} {f.name:<28} {shown}")
        return "\n".join(lines)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON settings file. Raises ValueError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read config file {path}: {error}") from error
    try:
        values = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"config file {path} is not valid: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must be a mapping of settings, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _coerce(value: Any, wanted: Any) -> Any:
    """``value`` as the field's type; text from a command line or YAML is converted. Raises ValueError."""
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType or origin is typing.Union:
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
            return None
        return _coerce(value, next(o for o in options if o is not type(None)))
    if origin is Literal:
        if value in options:
            return value
        raise ValueError(f"must be one of {', '.join(options)}, not {value!r}")
    if origin is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and options[0] is int:
            return tuple(_coerce_number(item, int) for item in items)
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) and i for i in items):
            raise ValueError(f"must be a list of names, not {value!r}")
        return tuple(items)
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        raise ValueError(f"must be true or false, not {value!r}")
    if wanted in (int, float):
        return _coerce_number(value, wanted)
    if wanted is str:
        if isinstance(value, (str, Path)):
            return str(value)
        raise ValueError(f"must be text, not {value!r}")
    raise TypeError(f"TrainingConfig has a field of unsupported type {wanted}")


def _coerce_number(value: Any, wanted: type) -> Any:
    noun = "a whole number" if wanted is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be {noun}, not {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"must be {noun}, not {value!r}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"must be finite, not {value!r}")
    if wanted is int:
        if number != int(number):
            raise ValueError(f"must be {noun}, not {value!r}")
        return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
    return number


def _check_limits(value: Any, limits: Any) -> None:
    if value is None:
        return
    for key, holds, words in (
        ("least", lambda v, b: v >= b, "at least"),
        ("most", lambda v, b: v <= b, "at most"),
        ("above", lambda v, b: v > b, "greater than"),
        ("below", lambda v, b: v < b, "less than"),
    ):
        if key in limits and not holds(value, limits[key]):
            raise ValueError(f"must be {words} {limits[key]}, not {value}")


def _format_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"configuration problem: {problems[0]}"
    return f"{len(problems)} configuration problems:\n" + "\n".join(f"  - {p}" for p in problems)
