"""Bundles as directories of sentence-transformers: read where every setting is known, written file for file alike.

sentence-transformers takes a second and 160 MB to import, and for these models it is a container only. A directory is
read here if it says nothing that this module does not reproduce exactly: a BERT-family transformer, mean or cls
pooling, normalisation or none. Anything else, a setting never heard of included, is left to sentence-transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from koret.retrieval.bundle import VECTOR, Bundle, ModuleBundle
from koret.retrieval.packed import FAMILIES, explain_unsupported

FORM = "6."  # the versions of sentence-transformers whose files these are
# What modules.json calls a module: first as it is written, then as older versions wrote it.
TYPES = {
    "Transformer": (
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.models.Transformer",
    ),
    "Pooling": (
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.models.Pooling",
    ),
    "Dense": ("sentence_transformers.base.modules.dense.Dense",),
    "Normalize": (
        "sentence_transformers.base.modules.normalize.Normalize",
        "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
        "sentence_transformers.models.Normalize",
    ),
}
TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
OLD_SETTINGS = "sentence_*_config.json"  # where versions before 2 kept the transformer's settings, by its family
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
WHOLE = ("config.json", "tokenizer.json", "model.safetensors")  # of a download: what a bundle cannot do without
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Head:
    """What a directory says beside weights and tokenizer; the defaults are those of a plain transformer's."""

    pooling: str = "mean"
    normalizes: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    similarity: str = "cosine"
    max_seq_length: int | None = None
    width: int | None = None  # of the vectors that are pooled, where that is said


def read_bundle(directory: Path, name: str | None = None) -> Bundle | None:
    """The model in ``directory``, in float32 and evaluation mode, or None where sentence-transformers has to read it.

    ``name`` is the hub's, where the directory is a snapshot in its cache: a tokenizer keeps in mind where it is from.
    Raises what transformers raises for weights and tokenizers that cannot be read.
    """
    from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedTokenizerFast

    is_plain = not (directory / "modules.json").exists()
    try:
        _check_transformer(directory, is_plain)
        head = _Head() if is_plain else _read_head(directory)
    except (ValueError, OSError) as reason:  # ValueError: of json and of UTF-8 too
        return _leave(directory, reason)
    source, settings = name or directory, {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **settings)
    if head.width not in (None, config.hidden_size):
        return _leave(directory, f"pooling of {head.width} numbers, the transformer gives {config.hidden_size}")
    if hasattr(config, "use_cache"):
        config.use_cache = False
    backbone = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, **settings)
    length = {} if head.max_seq_length is None else {"model_max_length": head.max_seq_length}
    tokenizer = AutoProcessor.from_pretrained(source, **length, **settings)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (is_plain and tokenizer.chat_template is not None):
        return _leave(directory, f"{type(tokenizer).__name__} is not all that reads its texts")
    if reason := explain_unsupported(backbone):
        return _leave(directory, reason)
    window = getattr(config, "max_position_embeddings", -1)
    if not length and window != -1:
        tokenizer.model_max_length = min(tokenizer.model_max_length, window)
    prompts = {"query": "", "document": "", **head.prompts}
    return Bundle(
        backbone,
        tokenizer,
        pooling=head.pooling,
        normalizes=head.normalizes,
        prompts=prompts,
        similarity=head.similarity,
    ).eval()


def write_bundle(bundle: Bundle | ModuleBundle, directory: str | Path) -> None:
    """Write a directory of sentence-transformers: the files that its installed version would write, byte for byte."""
    if isinstance(bundle, ModuleBundle):
        bundle.model.save(str(directory), safe_serialization=True, create_model_card=False)
        return
    import transformers
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "sentence_transformers": importlib.metadata.version("sentence-transformers"),
        "transformers": transformers.__version__,
        "pytorch": torch.__version__,
    }
    settings = {
        "model_type": "SentenceTransformer",
        "__version__": versions,
        "prompts": bundle.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": bundle.similarity,
    }
    _write(folder / "config_sentence_transformers.json", settings, indent=2, sort_keys=True)
    bundle.backbone.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    _write(folder / "sentence_bert_config.json", TRANSFORMER, indent=4)
    modules = [{"idx": 0, "name": "0", "path": "", "type": TYPES["Transformer"][0]}]
    for number, (kind, options) in enumerate(bundle.describe(), 1):
        path = f"{number}_{kind}"
        (folder / path).mkdir(exist_ok=True)
        _write(folder / path / "config.json", options, indent=4)
        if kind == "Dense":  # the first rows of the identity: exact
            cut = torch.eye(options["out_features"], options["in_features"])
            save_file({"linear.weight": cut}, folder / path / "model.safetensors")
        modules.append({"idx": number, "name": str(number), "path": path, "type": TYPES[kind][0]})
    _write(folder / "modules.json", modules, indent=2)


def find_snapshot(name: str) -> Path | None:
    """The directory of the hub's model ``name`` in the local cache, or None where it is not there as a whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or "SENTENCE_TRANSFORMERS_HOME" in os.environ:  # a name or a cache of the library's own
        return None
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return folder if all((folder / file).is_file() for file in WHOLE) else None


def is_latest(name: str, snapshot: Path, timeout: float = 5.0) -> bool:
    """Whether ``snapshot`` is the last commit that the hub has of model ``name``; False where it does not say so."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi(endpoint=constants.ENDPOINT).model_info(name, timeout=timeout).sha == snapshot.name
    except Exception as reason:  # a gate, a proxy, a name that is gone: whoever downloads says it better
        log.debug("%s: the hub does not say which commit is its last: %s", name, reason)
        return False


def _leave(directory: Path, reason: object) -> None:
    log.info("%s: read by sentence-transformers (%s)", directory, reason)


def _check_transformer(directory: Path, is_plain: bool) -> None:
    """Raise ValueError unless the transformer itself is one that transformers alone reads alike."""
    if not importlib.metadata.version("sentence-transformers").startswith(FORM):
        raise ValueError(f"version {importlib.metadata.version('sentence-transformers')}")
    others = [name for name in ("adapter_config.json", *PROCESSORS) if (directory / name).exists()]
    if others:
        raise ValueError(f"files {others}")
    config = _read(directory / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"architecture {config.get('model_type')}")
    architectures = config.get("architectures") or []
    if is_plain and any(str(name).endswith("ForCausalLM") for name in architectures):  # pooled by its last token
        raise ValueError(f"architectures {architectures}")


def _read_head(directory: Path) -> _Head:
    """Raises ValueError for whatever is said that is not understood."""
    modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
    if not isinstance(modules, list):
        raise ValueError(f"modules {modules}")
    kinds = [_find_kind(number, module) for number, module in enumerate(modules)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"modules {', '.join(kinds)}")
    prompts, similarity = _read_settings(directory / "config_sentence_transformers.json")
    pooling, width = _read_pooling(directory / "1_Pooling" / "config.json")
    if len(kinds) > 2 and (directory / "2_Normalize" / "config.json").exists():
        names = _read(directory / "2_Normalize" / "config.json", "module_input_name", "module_output_name")
        _expect(names, module_input_name=VECTOR, module_output_name=VECTOR)
    return _Head(pooling, len(kinds) > 2, prompts, similarity, _read_length(directory), width)


def _find_kind(number: int, module: Any) -> str:
    for kind, types in TYPES.items():
        path = "" if number == 0 else f"{number}_{kind}"
        if module in [{"idx": number, "name": str(number), "path": path, "type": name} for name in types]:
            return kind
    raise ValueError(f"module {module}")


def _read_settings(file: Path) -> tuple[dict[str, str], str]:
    """The prompts and the name of the similarity."""
    if not file.exists():
        return {}, "cosine"
    known = ("__version__", "prompts", "default_prompt_name", "similarity_fn_name", "model_type", "truncate_dim")
    settings = _read(file, *known)
    _expect(settings, model_type="SentenceTransformer", default_prompt_name=None, truncate_dim=None)
    _check_version(settings.get("__version__", {}))
    prompts = settings.get("prompts", {})
    if not isinstance(prompts, dict) or not all(text is None or isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"prompts {prompts}")
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity {similarity}")
    return {name: text or "" for name, text in prompts.items()}, similarity


def _check_version(versions: Any) -> None:
    """A directory of a version to come may mean something else by the same words."""
    from packaging.version import Version

    if not isinstance(versions, dict):
        raise ValueError(f"versions {versions}")
    written = Version(str(versions.get("sentence_transformers", "0")))
    if written > Version(importlib.metadata.version("sentence-transformers")):
        raise ValueError(f"version {written}")


def _read_length(directory: Path) -> int | None:
    """How many tokens the transformer's settings let it read; None where they leave it to the tokenizer."""
    file = directory / "sentence_bert_config.json"
    settings = _read(file, "max_seq_length", "do_lower_case", *TRANSFORMER) if file.exists() else {}
    if not settings and (others := [old.name for old in directory.glob(OLD_SETTINGS)]):
        raise ValueError(f"files {others}")
    _expect(settings, do_lower_case=False, **TRANSFORMER)
    if "modality_config" in settings and "module_output_name" not in settings:
        raise ValueError(f"settings {settings}")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"length {length}")
    return length


def _read_pooling(file: Path) -> tuple[str, int]:
    """The mode, and how many numbers a token's vector is said to have."""
    settings = _read(
        file, "embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt", *OLD_POOLING
    )
    _expect(settings, include_prompt=True)
    widths = [settings[name] for name in ("embedding_dimension", "word_embedding_dimension") if name in settings]
    modes = [mode for name, mode in OLD_POOLING.items() if settings.get(name)] or ["mean"]
    if "pooling_mode" in settings:
        modes = [settings["pooling_mode"]]
    if len(widths) != 1 or type(widths[0]) is not int or modes not in (["mean"], ["cls"]):
        raise ValueError(f"pooling {settings}")
    return modes[0], widths[0]


def _read(file: Path, *known: str) -> dict[str, Any]:
    """A JSON object; where names are given, with no others. Raises ValueError or OSError."""
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or (known and not set(value) <= set(known)):
        raise ValueError(f"{file.name}: {value}")
    return value


def _expect(settings: dict[str, Any], **values: Any) -> None:
    """Raise ValueError where a setting is given and is not this value."""
    for name, value in values.items():
        found = settings.get(name, value)
        if found != value or type(found) is not type(value):
            raise ValueError(f"{name} {settings[name]}")


def _write(file: Path, value: Any, **form: Any) -> None:
    file.write_text(json.dumps(value, **form), encoding="utf-8")
