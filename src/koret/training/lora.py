"""Low-rank adapters through PEFT: attach, report, save, merge.

Hu et al. 2021 (LoRA, arXiv:2106.09685): a frozen weight W gets a trained update (alpha / r) B A of rank r.
The adapters are put into the transformer in place: the model object stays the one it was.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import save_file
from torch import nn

from koret.privacy import scrub
from koret.retrieval.encoder import TextEncoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Model = TypeVar("Model", "TextEncoder", "SentenceTransformer", nn.Module)
ADAPTER = "default"


@dataclass(frozen=True)
class LoraInfo:
    """What adapters cost: numbers of weights, and which layers carry one."""

    trainable: int
    total: int  # adapters included
    rank: int
    alpha: float
    modules: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        kinds = {}
        for name in self.modules:
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + 1
        layers = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return (
            f"LoRA r={self.rank} alpha={self.alpha:g}: {self.trainable:,} of {self.total:,} weights train "
            f"({self.share:.2%}), on {layers}"
        )


def setup_lora_model(
    model: Model,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    target_modules: Sequence[str] = ("query", "key", "value"),
) -> Model:
    """Freeze ``model``, put adapters on its linear layers named in ``target_modules``, and return it.

    A layer is meant when its name ends with one of the names; ``("all-linear",)`` means every linear layer. The
    adapters are float32 and start at zero effect, their other half drawn from torch's generator.

    Raises ValueError, naming what there is, when a name matches no linear layer.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    backbone = find_backbone(model)
    if getattr(backbone, "peft_config", None):
        raise ValueError("the model already has adapters; load it again without them")
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    targets = _match_targets(names, target_modules)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=TaskType.FEATURE_EXTRACTION
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers warn about each other
        get_peft_model(backbone, config)
    return model


def get_lora_info(model: Model) -> LoraInfo:
    """Count trainable and all weights of ``model``. Raises ValueError when it has no adapters."""
    backbone = find_backbone(model)
    config = _read_config(backbone)
    parameters = list(model.model.parameters() if isinstance(model, TextEncoder) else model.parameters())
    return LoraInfo(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        rank=config.r,
        alpha=config.lora_alpha,
        modules=tuple(name for name, _ in _find_adapted(backbone)),
    )


def print_lora_info(model: Model) -> None:
    """Print trainable weights, their share and the adapted layers."""
    print(get_lora_info(model))


def save_adapter(model: Model, directory: str | Path, base_name: str) -> None:
    """Write the adapters as plain PEFT does: adapter_config.json and adapter_model.safetensors.

    ``base_name`` is recorded as the base model, without the machine's paths.
    """
    from peft import get_peft_model_state_dict

    backbone, directory = find_backbone(model), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(backbone, adapter_name=ADAPTER, save_embedding_layers=False)
    # In a PeftModel the transformer lies two levels down, and PEFT writes those names.
    tensors = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in sorted(state.items())}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**_read_config(backbone).to_dict(), "base_model_name_or_path": scrub(base_name), "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=_as_json)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def merge_lora(encoder: TextEncoder) -> TextEncoder:
    """A copy of ``encoder`` with every adapter added to its weight; the original stays as it is.

    Raises FloatingPointError when a merged weight is not finite.
    """
    merged = copy.deepcopy(encoder.model)
    backbone = merged[0].model
    for name, layer in list(_find_adapted(backbone)):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise FloatingPointError(f"the adapter on {name} is broken: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    return TextEncoder(
        merged,
        name=encoder.name,
        precision=encoder.precision,
        query_prefix=encoder.prefixes["query"],
        passage_prefix=encoder.prefixes["passage"],
    )


def find_backbone(model: Any) -> nn.Module:
    """The transformer in a TextEncoder, a SentenceTransformer or already a transformer."""
    from sentence_transformers import SentenceTransformer

    if isinstance(model, TextEncoder):
        return model.backbone
    return model[0].model if isinstance(model, SentenceTransformer) else model


def _match_targets(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    if tuple(wanted) == ("all-linear",):
        return list(names)
    missing = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names)]
    if missing:
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise ValueError(
            f"lora_target_modules: no linear layer is called {', '.join(missing)}; this model has: {ends} "
            "(or all-linear for every one)"
        )
    return list(wanted)


def _find_adapted(backbone: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in backbone.named_modules() if isinstance(module, LoraLayer)]


def _read_config(backbone: nn.Module) -> Any:
    configs = getattr(backbone, "peft_config", None)
    if not configs:
        raise ValueError("the model has no adapters: attach them with setup_lora_model first")
    return configs[ADAPTER]


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
