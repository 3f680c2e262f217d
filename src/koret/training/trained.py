"""Which weights train, and what their gradients and the optimizer's state hold for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from koret.retrieval.bundle import Bundle, is_sentence_transformer, open_bundle
from koret.retrieval.encoder import TextEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Model = TypeVar("Model", "TextEncoder", "SentenceTransformer", nn.Module)
UNUSED = "pooler."  # BERT's head for classification: no vector passes through it, so it never gets a gradient
GRADIENT_BYTES = 4  # per trained float32 weight
STATE_BYTES = 3 * GRADIENT_BYTES  # its gradient and the two moments of AdamW
MB = 1 << 20


@dataclass(frozen=True)
class TrainedWeights:
    """Numbers of weights: trained, all (adapters included), of the base, of its embedding table."""

    trained: int
    total: int
    full: int  # what full fine-tuning would train
    table: int
    table_trains: bool
    adapters: int

    @property
    def base(self) -> int:
        return self.total - self.adapters

    @property
    def state_bytes(self) -> int:
        """Bytes of gradients and AdamW moments."""
        return self.trained * STATE_BYTES

    @property
    def gradient_bytes(self) -> int:
        """Those of them that are free between two steps."""
        return self.trained * GRADIENT_BYTES

    @property
    def full_state_bytes(self) -> int:
        """The same for full fine-tuning."""
        return self.full * STATE_BYTES

    def __str__(self) -> str:
        table = f"the embedding table ({self.table / self.base:.0%} of the base's weights) "
        table += "trains too" if self.table_trains else "stays frozen"
        state = f"{self.state_bytes / MB:,.1f} MB of gradients and AdamW state"
        if not self.adapters:
            return f"{self.trained:,} of {self.total:,} weights train, with {state}; {table}"
        saved = (self.full_state_bytes - self.state_bytes) / MB
        return (
            f"LoRA {'saves' if saved > 0 else 'costs'} {abs(saved):,.1f} MB: {state} instead of the "
            f"{self.full_state_bytes / MB:,.1f} MB of full fine-tuning; activations cost about the same; {table}"
        )


def setup_full_model(model: Model, train_embeddings: bool = True) -> Model:
    """Let every weight of ``model`` that its vectors depend on train, the embedding table if asked; returns it."""
    backbone = find_backbone(model)
    backbone.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        if name.startswith(UNUSED):
            parameter.requires_grad_(False)
    find_table(backbone).requires_grad_(train_embeddings)
    return model


def count_trained(model: Model) -> TrainedWeights:
    """Count the weights of ``model`` as it is set up now."""
    backbone = find_backbone(model)
    named = dict(backbone.named_parameters())
    adapters = [p for name, p in named.items() if ".lora_" in name]
    table = find_table(backbone)
    return TrainedWeights(
        trained=count_weights(p for p in named.values() if p.requires_grad),
        total=count_weights(named.values()),
        full=count_weights(p for name, p in named.items() if ".lora_" not in name and not name.startswith(UNUSED)),
        table=table.numel(),
        table_trains=table.requires_grad,
        adapters=count_weights(adapters),
    )


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they stand for; two of a 4-bit base share a stored byte."""
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in parameters)


def find_backbone(model: Any) -> nn.Module:
    """The transformer in a TextEncoder, a Bundle, a SentenceTransformer or already a transformer."""
    if isinstance(model, TextEncoder):
        return model.backbone
    return open_bundle(model).backbone if isinstance(model, Bundle) or is_sentence_transformer(model) else model


def find_table(backbone: nn.Module) -> nn.Parameter:
    """The table of token embeddings, one row per token."""
    return backbone.get_input_embeddings().weight
