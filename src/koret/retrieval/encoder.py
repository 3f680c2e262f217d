"""Texts to unit vectors: one encoder for training, evaluation and search, padding-free where the model allows it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koret import runs
from koret.retrieval import offline
from koret.retrieval.bundle import Bundle, open_bundle
from koret.retrieval.bundle_folder import find_snapshot, is_latest, read_bundle, write_bundle
from koret.retrieval.devices import send
from koret.retrieval.packed import PackedEncoder, Recompute, explain_unsupported
from koret.retrieval.products import compare_types, limit_products

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Kind = Literal["query", "passage"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
# Of a backbone's configuration: what decides how its weights are computed with, beside their shapes.
FORWARD = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "position_embedding_type")
CHARACTERS_PER_TOKEN = 24  # no tokenizer here makes fewer tokens of more characters; longer texts are clipped first
log = logging.getLogger(__name__)


class TextEncoder:
    """A model with its prefixes, run padding-free where its architecture allows.

    ``model`` is a Bundle or any SentenceTransformer and stays what it is: adapters are attached to it, and it is what
    gets saved. The names of its ``state_dict`` are the same in both.
    ``precision`` is what was chosen: 'fp32', 'bf16' or 'fp16'. Vectors are float32 and of unit length.
    """

    def __init__(
        self,
        model: Bundle | SentenceTransformer,
        *,
        name: str,
        precision: str = "fp32",
        query_prefix: str = "query: ",
        passage_prefix: str = "passage: ",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model, self.name, self.precision = model, name, precision
        self._bundle = open_bundle(model)
        self.prefixes = {"query": query_prefix, "passage": passage_prefix}
        self.recompute: Recompute = "layers" if gradient_checkpointing else 0
        self.compiles = False  # whether torch.compile has a part in training, where the forward is padding-free
        self.prefers_order: bool | None = None  # whether many tokens of float32 go by oneDNN's order; None: as measured
        self._packed: tuple[nn.Module, PackedEncoder] | None = None
        self.slow_path_reason = self._explain_slow_path()
        if self.slow_path_reason:
            log.info("%s: padded path (%s)", name, self.slow_path_reason)
            if gradient_checkpointing:
                self.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def backbone(self) -> nn.Module:
        """The Hugging Face transformer, wrapped by PEFT once adapters are attached."""
        return self._bundle.backbone

    @backbone.setter
    def backbone(self, module: nn.Module) -> None:
        self._bundle.backbone = module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, of a fast class."""
        return self._bundle.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._bundle.tokenizer = tokenizer

    @property
    def kinds(self) -> list[str]:
        """What the model is made of, by the names of the modules of sentence-transformers."""
        return self._bundle.kinds

    @property
    def pooling(self) -> str:
        """How a text's vector comes from its tokens': the mode of the model's pooling, which is its second module."""
        return self._bundle.pooling

    @property
    def similarity(self) -> str:
        """What the model's files say vectors are to be compared by; koret compares by cosine."""
        return self._bundle.similarity

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dimensions(self) -> int:
        return self._bundle.dimensions

    @property
    def max_seq_length(self) -> int:
        return int(self._bundle.max_seq_length)

    def with_precision(self, precision: str) -> TextEncoder:
        """This encoder, or one that shares its model and computes in another precision ('auto': the faster one)."""
        precision = choose_precision(str(self.device)) if precision == "auto" else precision
        if precision == self.precision:
            return self
        return TextEncoder(
            self.model,
            name=self.name,
            precision=precision,
            query_prefix=self.prefixes["query"],
            passage_prefix=self.prefixes["passage"],
            gradient_checkpointing=self.recompute == "layers",
        )

    @property
    def keeps_on_shelves(self) -> bool:
        """Whether what a step keeps for its backward pass lies apart from all else."""
        by_hand = self.slow_path_reason is None and self._packed_forward().runs_by_hand()
        return by_hand and self.recompute != "layers"

    @property
    def path(self) -> str:
        """In words, which forward runs."""
        if self.slow_path_reason:
            return f"padded ({self.slow_path_reason})"
        return self._packed_forward().path.words + (", fused by torch.compile" if self.compiles else "")

    def tokenize(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        """Token ids of each text, prefix and special tokens included, cut to max_seq_length: N arrays of int32.

        Texts are clipped before tokenising, so a long text costs little and gives the same ids; later where they do not
        fill the length, because of a stretch of blanks or a word that is one unknown token.
        """
        clip, rows = self.max_seq_length * CHARACTERS_PER_TOKEN, [np.zeros(0, np.int32)] * len(texts)
        left = list(range(len(texts)))
        while left:
            found = self.tokenizer(
                [self.prefixes[kind] + texts[i][:clip] for i in left],
                truncation=True, max_length=self.max_seq_length, padding=False, return_attention_mask=False,
            )["input_ids"]  # fmt: skip
            for i, row in zip(left, found, strict=True):
                rows[i] = np.asarray(row, dtype=np.int32)
            left = [i for i in left if len(rows[i]) < self.max_seq_length and len(texts[i]) > clip]
            clip *= 4
        return rows

    def embed(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Token ids of N texts -> (N, D) float32 unit vectors in the given order; one forward, autograd if enabled."""
        if self.slow_path_reason is None:
            vectors = self._packed_forward().forward(ids)
        else:
            vectors = self._forward_padded(ids)
        return F.normalize(vectors.float(), dim=-1)

    def embed_plainly(self, text: str) -> Tensor:
        """A text, its prefix included -> (D,) in float32, by the forward of the model itself: to check others against.

        transformers' own forward and the model's pooling; nothing of what makes ``embed`` fast has a part in it.
        """
        found = self.tokenizer(text, truncation=True, max_length=self.max_seq_length, return_tensors="pt")
        tokens, mask = found["input_ids"].to(self.device), found["attention_mask"].to(self.device)
        with torch.no_grad():
            return self._bundle(tokens, mask)[0].float()

    def encode(
        self, texts: Sequence[str], kind: Kind, *, progress: bool = False, batch_tokens: int | None = None
    ) -> np.ndarray:
        """Texts -> (N, D) float32 unit vectors; longest first, in micro-batches of ``batch_tokens`` tokens.

        Raises FloatingPointError naming the first text whose vector is not finite.
        """
        ids = self.tokenize(texts, kind)
        vectors = self.encode_ids(
            ids, progress=progress, label=f"encoding {len(texts)} {kind} texts", budget=batch_tokens
        )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise FloatingPointError(
                f"the model gives non-finite vectors ({bad.size} of {len(texts)} texts, "
                f"first: {texts[bad[0]][:80]!r}); "
                "its weights are damaged or the precision is too low: try --precision fp32"
            )
        return vectors

    def encode_ids(
        self, ids: Sequence[np.ndarray], *, progress: bool = False, label: str = "encoding", budget: int | None = None
    ) -> np.ndarray:
        """Token ids of N texts -> (N, D) float32 unit vectors, without gradients and without dropout."""
        vectors = np.empty((len(ids), self.dimensions), np.float32)
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        budget = budget or BATCH_TOKENS.get(self.device.type, 8192)
        batches = cut_by_tokens(order, ids, budget, padded=self.slow_path_reason is not None)
        was_training = self.model.training
        in_training = any(module.training for module in self.model.modules())
        if in_training:  # to look at every module's mode takes a sixth of the time that setting it twice does
            self.model.eval()
        try:
            with torch.no_grad():
                for batch in _track(batches, label, progress):
                    vectors[batch] = self.embed([ids[i] for i in batch]).cpu().numpy()
        finally:
            if in_training:
                self.model.train(was_training)
        return vectors

    def save(self, directory: str | Path) -> None:
        """Write a plain sentence-transformers directory: safetensors, pooling, normalisation, tokenizer, prompts."""
        self._bundle.prompts = {
            "query": self.prefixes["query"],
            "passage": self.prefixes["passage"],
            "document": self.prefixes["passage"],
        }
        write_bundle(self._bundle, directory)

    def export_tokenizer(self, directory: str | Path) -> Path:
        """Write the tokenizer as ``<sha256>.json`` for readers without transformers; returns the file."""
        text = self._describe_tokenizer()
        file = Path(directory) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            staged = file.with_suffix(f".{os.getpid()}.tmp")
            staged.write_text(text, encoding="utf-8")
            staged.replace(file)
        return file

    def fingerprint(self) -> str:
        """sha256 over weights, forward, tokenizer, prefixes and length: equal for encoders that give equal vectors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            numbers = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(numbers.data)  # in place: the bytes of a table would be a copy of it
        digest.update(self._describe_forward().encode())
        digest.update(self._describe_tokenizer().encode())
        digest.update(repr((self.prefixes, self.max_seq_length)).encode())
        return digest.hexdigest()

    def release(self) -> None:
        """Let go of the copies of frozen weights that the padding-free forward keeps; the next forward makes them anew.

        Scoring may leave them in an order that nothing else multiplies them in.
        """
        self._packed = None

    def release_shelves(self) -> None:
        """Let go of the memory that steps put on shelves what they keep in; the next one takes as much as it needs."""
        if self._packed is not None:
            self._packed[1].shelves.clear()

    def _describe_tokenizer(self) -> str:
        """The tokenizer as JSON, less the truncation and padding its last caller happened to set."""
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return json.dumps({**parts, "truncation": None, "padding": None}, ensure_ascii=False)

    def _describe_forward(self) -> str:
        """What weights of one shape may be computed with in more than one way: pooling, heads, activation and so on."""
        config = {name: getattr(self.backbone.config, name, None) for name in FORWARD}
        return json.dumps([config, self._bundle.describe()], sort_keys=True, default=str)

    def _explain_slow_path(self) -> str | None:
        if self.kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return f"modules {', '.join(self.kinds)}"
        if self.pooling not in ("mean", "cls"):
            return f"pooling {self.pooling}"
        return explain_unsupported(self.backbone)

    def _packed_forward(self) -> PackedEncoder:
        if self._packed is None or self._packed[0] is not self.backbone:
            forward = PackedEncoder(self.backbone, self.pooling, DTYPES[self.precision])
            self._packed = self.backbone, forward
        forward = self._packed[1]
        forward.recompute, forward.compiles, forward.prefers_order = self.recompute, self.compiles, self.prefers_order
        return forward

    def _forward_padded(self, ids: Sequence[np.ndarray]) -> Tensor:
        longest = max(len(x) for x in ids)
        tokens = torch.full((len(ids), longest), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, x in enumerate(ids):
            tokens[row, : len(x)] = torch.from_numpy(x)
            mask[row, : len(x)] = 1
        tokens, mask = (send(part, self.device) for part in (tokens, mask))
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return self._bundle(tokens, mask)


def load_encoder(
    name_or_path: str | Path,
    *,
    device: str | None = None,
    precision: str = "fp32",
    max_seq_length: int | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    gradient_checkpointing: bool = False,
    quantize: str = "none",
) -> TextEncoder:
    """Load a model by run (directory, name or 'latest'), local directory, hub name, or 'offline' (retrieval.offline).

    Prefixes not given come from the model's own prompts, else they are "query: " and "passage: ". ``precision``
    'auto' picks what is faster on the device. ``quantize`` 'nf4' keeps the linear layers in 4 bits, for adapters to be
    trained over. Raises ValueError in words where the model cannot be had, RuntimeError where 4 bits cannot.
    """
    limit_products()
    name = str(name_or_path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = _find_source(name)
    precision = choose_precision(device) if precision == "auto" else precision
    four_bits = {} if quantize == "none" else {"quantization_config": _configure_four_bits(DTYPES[precision])}
    try:
        model = _load_model(source, device, four_bits)
    except Exception as error:  # the libraries raise a dozen kinds for "not there"
        raise ValueError(_explain_missing_model(name, error)) from error
    _announce_pickled_weights(source)
    bundle = open_bundle(model)
    if name == offline.NAME:
        length = bundle.max_seq_length
        offline.add_syllables(bundle)
        bundle.max_seq_length = length
    window = getattr(bundle.backbone.config, "max_position_embeddings", None)
    if window and bundle.backbone.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        window -= 2
    if max_seq_length is not None:
        if window and max_seq_length > window:
            raise ValueError(f"max_seq_length is {max_seq_length}, but {name} reads at most {window} tokens")
        bundle.max_seq_length = max_seq_length
    elif bundle.max_seq_length is None or (window and bundle.max_seq_length > window):
        bundle.max_seq_length = window or 512
    prompts = bundle.prompts
    for module in model.modules() if four_bits else ():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes stores weights in an order only it can read
    model.requires_grad_(False)  # adapters bring their own; frozen weights are prepared for the products once
    return TextEncoder(
        model,
        name=name,
        precision=precision,
        query_prefix=query_prefix if query_prefix is not None else prompts.get("query") or "query: ",
        passage_prefix=passage_prefix
        if passage_prefix is not None
        else prompts.get("passage") or prompts.get("document") or "passage: ",
        gradient_checkpointing=gradient_checkpointing,
    )


def _load_model(source: str, device: str, four_bits: dict[str, Any]) -> Bundle | SentenceTransformer:
    """A directory or a hub's model, without importing sentence-transformers where that is possible; in float32.

    What the hub has a newer commit of than the local cache is left to sentence-transformers.
    """
    is_local = Path(source).is_dir()
    cached_only = not is_local and not _reaches_hub()
    folder = Path(source) if is_local else find_snapshot(source)
    if folder is not None and not four_bits and (is_local or cached_only or is_latest(source, folder)):
        bundle = read_bundle(folder, None if is_local else source)
        if bundle is not None:
            return bundle.to(device)
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        source,
        device=device,
        model_kwargs={"dtype": torch.float32, **four_bits},
        local_files_only=cached_only,
    )


def _configure_four_bits(dtype: torch.dtype) -> Any:
    """NF4 with quantised constants, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError("quantize_base nf4 needs bitsandbytes: pip install 'koret[qlora]', or leave the setting out")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _announce_pickled_weights(source: str) -> None:
    """Say where weights come from a pickle; the libraries read tensors from it and run no code (weights_only)."""
    from huggingface_hub import try_to_load_from_cache

    def has(file: str) -> bool:
        return Path(source, file).is_file() if Path(source).is_dir() else bool(try_to_load_from_cache(source, file))

    if has("pytorch_model.bin") and not has("model.safetensors"):
        log.warning("%s: weights from pytorch_model.bin, a pickle, read as tensors only; prefer safetensors", source)


def _find_source(name: str) -> str:
    """A directory for what is on this machine, else the name itself, for the hub."""
    if name == offline.NAME:
        return str(offline.find_offline_base())
    try:
        return str(runs.resolve_model(name))
    except FileNotFoundError:
        if name == "latest" or runs.is_run(Path(name)):
            raise
        return name


def _reaches_hub(timeout: float = 5.0) -> bool:
    """Whether the model hub answers at all; without this, its client retries for a minute before it says no."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def choose_precision(device: str) -> str:
    """On CUDA 'bf16' where it is native, else 'fp16'; on CPU 'bf16' where a measured product is faster, else 'fp32'."""
    limit_products()
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.startswith("cpu"):
        return "bf16" if compare_types(torch.bfloat16, torch.float32) < 0.7 else "fp32"
    return "fp32"


def cut_by_tokens(
    order: Sequence[int], ids: Sequence[np.ndarray], budget: int, *, padded: bool = True
) -> list[list[int]]:
    """Cut ``order`` into runs of at most ``budget`` tokens, or one text.

    ``padded``: a run costs its longest times its size, else the sum of its lengths.
    """
    batches: list[list[int]] = []
    longest = total = 0
    for i in order:
        longest, total = max(longest, len(ids[i])), total + len(ids[i])
        if not batches or (longest * (len(batches[-1]) + 1) if padded else total) > budget:
            batches.append([])
            longest = total = len(ids[i])
        batches[-1].append(i)
    return batches


def _track(batches: list[list[int]], label: str, progress: bool):
    if not progress or len(batches) < 4:
        return batches
    from rich.progress import track

    return track(batches, description=label, transient=True)


def _explain_missing_model(name: str, error: Exception) -> str:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        return f"{name} is a directory, but no model loads from it: {cause}"
    return (
        f"model '{name}' was not found: no such directory here, and the model hub did not provide it ({cause}). "
        "Ways on: a local model directory (--model-name PATH), or the packaged base (--model-name offline)"
    )
