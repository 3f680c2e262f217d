"""Low-rank adapters through PEFT: attach, report, save, merge.

Hu et al. 2021 (LoRA, arXiv:2106.09685): a frozen weight W gets a trained update (alpha / r) B A of rank r.
Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732): alpha / sqrt(r) instead. Liu et al. 2024 (DoRA, arXiv:2402.09353): the
length of every row of W + (alpha / r) B A is trained apart from its direction. Dettmers et al. 2023 (QLoRA,
arXiv:2305.14314): any of them over a base kept in 4 bits (``load_encoder(..., quantize="nf4")``).
The adapters are put into the transformer in place: the model object stays the one it was.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from koret.privacy import scrub
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.linear import dequantize
from koret.training.trained import UNUSED, Model, TrainedWeights, count_trained, find_backbone, find_table

Variant = Literal["lora", "rslora", "dora"]
ADAPTER = "default"
NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class LoraInfo:
    """What adapters cost: numbers of weights, which layers carry one, and whether their base is in 4 bits."""

    weights: TrainedWeights
    variant: Variant
    rank: int
    alpha: float
    modules: tuple[str, ...]
    quantized: bool

    @property
    def trainable(self) -> int:
        return self.weights.trained

    @property
    def total(self) -> int:
        """All weights, adapters included."""
        return self.weights.total

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
            f"{NAMES[self.variant]} r={self.rank} alpha={self.alpha:g}: {self.trainable:,} of {self.total:,} weights "
            f"train ({self.share:.2%}), on {layers}" + (", over a base in 4 bits (nf4)" if self.quantized else "")
        )


def setup_lora_model(
    model: Model,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    target_modules: Sequence[str] = ("query", "key", "value"),
    variant: Variant = "lora",
    train_embeddings: bool = False,
) -> Model:
    """Freeze ``model``, put adapters on its linear layers named in ``target_modules``, and return it.

    A layer is meant when its name ends with one of the names; ``("all-linear",)`` means every linear layer that the
    vectors pass through (BERT's pooler is none of them). The adapters are float32 and start at zero effect, their
    other half drawn from torch's generator. With ``train_embeddings`` the embedding table trains beside them.

    Raises ValueError, naming what there is, when a name matches no linear layer.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    backbone = find_backbone(model)
    if getattr(backbone, "peft_config", None):
        raise ValueError("the model already has adapters; load it again without them")
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if not name.startswith(UNUSED)]
    targets = _match_targets(names, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        task_type=TaskType.FEATURE_EXTRACTION,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers warn about each other
        get_peft_model(backbone, config)
    find_table(backbone).requires_grad_(train_embeddings)
    return model


def get_lora_info(model: Model) -> LoraInfo:
    """Count trainable and all weights of ``model``. Raises ValueError when it has no adapters."""
    backbone = find_backbone(model)
    config = _read_config(backbone)
    return LoraInfo(
        weights=count_trained(model),
        variant="dora" if config.use_dora else "rslora" if config.use_rslora else "lora",
        rank=config.r,
        alpha=config.lora_alpha,
        modules=tuple(name for name, _ in _find_adapted(backbone)),
        quantized=is_quantized(backbone),
    )


def print_lora_info(model: Model) -> None:
    """Print trainable weights, their share, the adapted layers, and what all of it saves."""
    info = get_lora_info(model)
    print(info)
    print(info.weights)


def save_adapter(model: Model, directory: str | Path, base_name: str) -> None:
    """Write the adapters as plain PEFT does: adapter_config.json and adapter_model.safetensors.

    A trained embedding table is written with them, under the name PEFT gives it. ``base_name`` is recorded as the
    base model, without the machine's paths.
    """
    from peft import get_peft_model_state_dict

    backbone, directory = find_backbone(model), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(backbone, adapter_name=ADAPTER, save_embedding_layers=False)
    table = find_table(backbone)
    if table.requires_grad:
        state |= {name: p for name, p in backbone.named_parameters() if p is table}
    # In a PeftModel the transformer lies two levels down, and PEFT writes those names.
    tensors = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in sorted(state.items())}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**_read_config(backbone).to_dict(), "base_model_name_or_path": scrub(base_name), "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=_as_json)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def merge_lora(encoder: TextEncoder) -> TextEncoder:
    """A copy of ``encoder`` with every adapter added to its weight; the original stays as it is.

    Frozen weights without an adapter are the same memory in both: change neither's in place while the other is in use.
    A base in 4 bits becomes float32: the values its 4 bits stand for, which the adapters were trained on.
    Raises FloatingPointError when a merged weight is not finite.
    """
    frozen = {id(p): p for p in encoder.model.parameters() if not p.requires_grad}
    merged = copy.deepcopy(encoder.model, frozen)  # what deepcopy takes for copied already, it does not copy
    backbone = find_backbone(merged)
    for name, layer in _find_adapted(backbone):
        weight = _merge_weight(layer)
        if not torch.isfinite(weight).all():
            raise FloatingPointError(f"the adapter on {name} is broken: merged weights are not finite")
        _replace(backbone, name, layer.get_base_layer(), weight)
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    if is_quantized(backbone):
        for name, layer in [item for item in backbone.named_modules() if hasattr(item[1], "quant_state")]:
            _replace(backbone, name, layer, dequantize(layer.weight))
        backbone.hf_quantizer.remove_quantization_config(backbone)
    found = TextEncoder(
        merged,
        name=encoder.name,
        precision=encoder.precision,
        query_prefix=encoder.prefixes["query"],
        passage_prefix=encoder.prefixes["passage"],
    )
    found.prefers_order = encoder.prefers_order
    return found


def is_quantized(backbone: nn.Module) -> bool:
    """Whether its linear layers are kept in 4 bits."""
    return bool(getattr(backbone, "is_loaded_in_4bit", False))


@torch.no_grad()
def _merge_weight(layer: Any) -> torch.Tensor:
    """The weight (out, in) a layer and its adapter come to."""
    weight, variant = dequantize(layer.get_base_layer().weight), layer.lora_variant.get(ADAPTER)
    if variant is not None:
        return variant.merge_safe(layer, ADAPTER, weight)
    return weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)


def _replace(backbone: nn.Module, name: str, layer: Any, weight: torch.Tensor) -> None:
    """Put an ordinary linear layer of this weight, with the bias of ``layer``, where ``name`` stands."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, plain.train(layer.training))


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
