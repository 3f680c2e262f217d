"""Proving an encoder's fast path on this machine before people rely on it."""

from __future__ import annotations

import numpy as np

from koret.retrieval.encoder import TextEncoder

PROBE = (
    "한글을 만든 임금은 누구인가?",
    "훈민정음은 세종이 1443년에 창제하여 1446년에 반포한 우리나라 고유의 문자이다. " * 4,
    "한라산",
)
LEAST_COSINE = {"fp32": 0.99999, "bf16": 0.99, "fp16": 0.999}  # of a probe to what plain sentence-transformers gives


def probe_encoder(encoder: TextEncoder) -> float:
    """The lowest cosine between koret's vectors and plain sentence-transformers' in float32, over three texts.

    A fast path is never trusted unchecked: raises RuntimeError where its vectors are not the model's.
    """
    worst = 1.0
    for kind in ("query", "passage"):
        own = encoder.encode(PROBE, kind)
        plain = np.stack([encoder.model.encode(encoder.prefixes[kind] + text) for text in PROBE])
        lengths = np.linalg.norm(plain, axis=1)
        worst = min(worst, float((np.einsum("nd,nd->n", own, plain) / lengths).min()))
    if not worst >= LEAST_COSINE[encoder.precision]:
        raise RuntimeError(
            f"{encoder.name} is not used: its vectors in {encoder.precision} agree with plain sentence-transformers' "
            f"only to cosine {worst:.5f}, {LEAST_COSINE[encoder.precision]} is required; try --precision fp32"
        )
    return worst
