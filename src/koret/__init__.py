"""koret: fine-tune Korean retrieval embeddings, and prove that they got better."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koret.config import TrainingConfig as TrainingConfig
    from koret.data.loader import load_dataset as load_dataset
    from koret.data.markup import clean_html_text as clean_html_text
    from koret.evaluation.evaluator import evaluate as evaluate
    from koret.retrieval.index import build_index as build_index
    from koret.retrieval.index import open_index as open_index
    from koret.retrieval.inference import E5KorQuADInference as E5KorQuADInference
    from koret.training.lora import print_lora_info as print_lora_info
    from koret.training.lora import setup_lora_model as setup_lora_model
    from koret.training.trainer import EmbeddingTrainer as EmbeddingTrainer

__version__ = "0.1.0"

# Each public name and the module that holds it; modules load on first use, so `import koret` stays light.
_HOMES = {
    "TrainingConfig": "koret.config",
    "EmbeddingTrainer": "koret.training.trainer",
    "E5KorQuADInference": "koret.retrieval.inference",
    "load_dataset": "koret.data.loader",
    "clean_html_text": "koret.data.markup",
    "setup_lora_model": "koret.training.lora",
    "print_lora_info": "koret.training.lora",
    "build_index": "koret.retrieval.index",
    "open_index": "koret.retrieval.index",
    "evaluate": "koret.evaluation.evaluator",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'koret' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
