"""The folder other programs load: file names and fields that every reader of sentence-transformers models knows.

Newer releases of transformers and sentence-transformers write class names and fields that older ones, and servers with
readers of their own (text-embeddings-inference, infinity, vLLM), do not know. The classic spelling is read by all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from koret import files
from koret.retrieval.bundle import Bundle
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.packed import FAMILIES

POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def check_modules(encoder: TextEncoder) -> None:
    """Raise ValueError unless the model is a transformer, mean or cls pooling and, perhaps, normalisation."""
    kinds = encoder.kinds
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        hint = "; it was cut to fewer dimensions already: export the model it came from" if "Dense" in kinds else ""
        raise ValueError(f"{encoder.name} is made of {', '.join(kinds)}: koret cannot export that{hint}")
    if encoder.pooling not in ("mean", "cls"):
        raise ValueError(f"{encoder.name} pools by {encoder.pooling}: only mean and cls can be exported")


def check_dims(encoder: TextEncoder, dims: int) -> None:
    """Raise ValueError unless the model has that many dimensions."""
    if not 1 <= dims <= encoder.dimensions:
        raise ValueError(f"--dims {dims}: {encoder.name} has {encoder.dimensions} dimensions, choose 1 to that many")


def shape_output(encoder: TextEncoder, dims: int | None) -> TextEncoder:
    """An encoder of the same weights whose model itself gives unit vectors of ``dims`` numbers, the first of those.

    The cut is a Dense layer with the first rows of the identity, which every reader knows, between pooling and
    normalisation (a ``truncate_dim`` would cut after it and leave vectors shorter than 1). It is exact: each number is
    multiplied by 1 and added to zeros.
    """
    model = Bundle(
        encoder.backbone,
        encoder.tokenizer,
        pooling=encoder.pooling,
        normalizes=True,
        dims=dims if dims is not None and dims < encoder.dimensions else None,
        similarity=encoder.similarity,
    ).eval()
    prefixes = encoder.prefixes
    return TextEncoder(model, name=encoder.name, query_prefix=prefixes["query"], passage_prefix=prefixes["passage"])


def save_classic(encoder: TextEncoder, folder: Path, *, weights: bool = True) -> None:
    """Write the model so that old and new readers load it. Without ``weights`` model.safetensors is left out."""
    encoder.save(folder)
    modules = _read(folder / "modules.json")
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    files.write_json(folder / "modules.json", modules)
    length = {"max_seq_length": encoder.max_seq_length, "do_lower_case": False}
    files.write_json(folder / "sentence_bert_config.json", length)
    width = encoder.backbone.config.hidden_size
    chosen = {"mean": "mean_tokens", "cls": "cls_token"}[encoder.pooling]
    modes = {f"pooling_mode_{mode}": mode == chosen for mode in POOLING_MODES}
    pooling = {"word_embedding_dimension": width, **modes, "include_prompt": True}
    files.write_json(folder / "1_Pooling" / "config.json", pooling)
    if (folder / "2_Dense").is_dir():
        dense = {
            "in_features": width, "out_features": encoder.dimensions, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        files.write_json(folder / "2_Dense" / "config.json", dense)
    config = _read(folder / "config.json")
    # what transformers 5 leaves out of some families' configurations, and vLLM and older releases ask for
    older = {"torch_dtype": config.get("dtype", "float32")}
    if config["model_type"] in FAMILIES:
        older["position_embedding_type"] = "absolute"
    files.write_json(folder / "config.json", {**older, **config})
    _write_tokenizer_config(encoder, folder)
    if not weights:
        (folder / "model.safetensors").unlink()


def _write_tokenizer_config(encoder: TextEncoder, folder: Path) -> None:
    """The generic class, by the name old releases know; it reads all of tokenizer.json and rebuilds nothing."""
    backend = json.loads((folder / "tokenizer.json").read_bytes())
    files.write_json(folder / "tokenizer.json", {**backend, "truncation": None, "padding": None})
    special = {
        name: str(getattr(encoder.tokenizer, name))
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        if getattr(encoder.tokenizer, name, None) is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.max_seq_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files.write_json(folder / "tokenizer_config.json", settings)
    files.write_json(folder / "special_tokens_map.json", special)
    for name in ("vocab.txt", "sentencepiece.bpe.model", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())
