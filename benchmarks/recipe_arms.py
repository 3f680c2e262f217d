"""The arms of benchmarks/recipes.py: the reference recipe, and what each arm changes of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koret.config import TrainingConfig, read_settings

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 1024  # training questions of a run
PAIR_VISITS = 1024  # question-target pairs a run trains on, whatever its batch size
REFERENCE = {
    "model_name": "offline",
    "train_split": 0.714,  # 100 of 140 articles
    "max_seq_length": 64,  # the grid is over a hundred trainings: at 128 it takes three times as long
    "precision": "fp32",  # auto would time this machine anew in every run
    "max_samples": QUESTIONS,
    "num_epochs": 1,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "save_steps": 100_000,  # scored before the first and after the last step
    "save_total_limit": 1,
    "log_every_n_steps": 1,
}
FIXED = ("model_name", "train_split", "max_seq_length", "max_samples", "precision")  # of the reference, in every arm
DEFAULT = "reference"


@dataclass(frozen=True)
class Arm:
    """One recipe: ``changes`` are laid over ``base``; it is compared with the arm ``against`` of its group.

    ``hard_negatives`` names who mines them: 'bm25', or 'reference' for the model the reference arm has tuned.
    """

    group: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    against: str = DEFAULT
    base: dict[str, Any] = field(default_factory=lambda: REFERENCE)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that is not koret's default, the step limit of the budget included."""
        values = {**self.base, **self.changes}
        return {"max_steps": max(1, PAIR_VISITS // values["batch_size"]), **values}

    def explain_impossible(self) -> str | None:
        """Why koret's settings do not allow this arm, None where they do."""
        try:
            TrainingConfig(**self.settings)
        except ValueError as error:
            return " ".join(str(error).split())
        return None


def make_key(settings: dict[str, Any]) -> str:
    """The name of the folder of all runs with these settings: arms that are the same recipe share their runs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_brief() -> dict[str, Any]:
    """recipes/baseline.yaml on this data with this base, within the budget."""
    fixed = {name: REFERENCE[name] for name in (*FIXED, "save_steps", "save_total_limit", "log_every_n_steps")}
    return {**read_settings(ROOT / "recipes" / "baseline.yaml"), **fixed, "num_epochs": 1}


def list_arms() -> list[Arm]:
    """Every arm, by group; the reference stands first and is shared by all groups."""
    arms = [Arm(DEFAULT, DEFAULT)]

    def add(group: str, name: str, against: str = DEFAULT, **changes: Any) -> None:
        arms.append(Arm(group, name, changes, against))

    both = {"positives": "both"}
    add("positives", "answer", positives="answer")
    add("positives", "both, masked", **both)
    add("positives", "both, unmasked", **both, mask_false_negatives=False, against="both, masked")
    add("positives", "both, multi-positive", **both, multi_positive=True, against="both, masked")
    for rate in (2e-4, 5e-4, 1e-3, 4e-3):
        add("rate", f"{rate:g}", learning_rate=rate)
    arms.append(Arm("brief", "recipes/baseline.yaml", base=read_brief()))
    for batch in (16, 64, 256):
        add("masking", f"{batch}, masked", batch_size=batch)
        add("masking", f"{batch}, unmasked", f"{batch}, masked", batch_size=batch, mask_false_negatives=False)
    for scale in (50, 100):
        add("scale", f"{scale}", scale=float(scale))
    add("negatives", "BM25", hard_negatives="bm25")
    add("negatives", "self", hard_negatives=DEFAULT)
    twice = {"max_samples": QUESTIONS // 2, "num_epochs": 2}  # mining again needs a second epoch
    add("negatives", "none, half twice", **twice)
    add("negatives", "self, half twice", "none, half twice", hard_negatives=DEFAULT, **twice)
    add("negatives", "re-mined, half twice", "self, half twice", hard_negatives=DEFAULT, remine_every=1, **twice)
    add("batching", "article", batching="article")
    add("lora", "rsLoRA", lora_variant="rslora")
    add("lora", "DoRA", lora_variant="dora")
    add("lora", "all-linear", lora_target_modules=["all-linear"])
    add("lora", "QLoRA", quantize_base="nf4")
    for rate in (1e-4, 5e-4):  # full fine-tuning wants a rate of its own
        add("lora", f"full, rate {rate:g}", use_lora=False, learning_rate=rate)
        frozen = {"use_lora": False, "train_embeddings": False, "learning_rate": rate}
        add("lora", f"full without embeddings, rate {rate:g}", **frozen)
    add("lora", "LoRA + embeddings", train_embeddings=True)
    add("lora", "LoRA + embeddings, rate 0.0005", train_embeddings=True, learning_rate=5e-4)
    add("objectives", "symmetric", symmetric=True)
    add("objectives", "same-tower negatives", same_tower_negatives=True)
    add("objectives", "guide", guide_model="offline")
    add("objectives", "matryoshka", matryoshka_dims=[256, 128, 64])
    add("objectives", "hardness weight", hardness_weight=5.0)
    add("objectives", "learned scale", learn_scale=True)
    return arms
