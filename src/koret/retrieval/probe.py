"""Proving an encoder's fast path on this machine before people rely on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from koret.retrieval.encoder import TextEncoder

PROBE = (
    "한글을 만든 임금은 누구인가?",
    "훈민정음은 세종이 1443년에 창제하여 1446년에 반포한 우리나라 고유의 문자이다. " * 4,
    "한라산",
)
LEAST_COSINE = {"fp32": 0.99999, "bf16": 0.99, "fp16": 0.999}  # of a probe to what the plain forward gives


def probe_encoder(encoder: TextEncoder) -> float:
    """The lowest cosine between koret's vectors and those of the plain forward in float32, over three texts.

    The plain forward is that of transformers, a text at a time, with the model's own pooling behind it: none of the
    code that makes koret fast. A fast path is never trusted unchecked: raises RuntimeError where its vectors are not
    the model's.
    """
    encoder.model.eval()
    found = []
    for kind in ("query", "passage"):
        own = torch.from_numpy(encoder.encode(PROBE, kind))
        plain = torch.stack([encoder.embed_plainly(encoder.prefixes[kind] + text) for text in PROBE])
        found.append(F.cosine_similarity(own, plain.cpu()))
    worst = float(torch.cat(found).min())  # NaN where one is
    if not worst >= LEAST_COSINE[encoder.precision]:
        raise RuntimeError(
            f"{encoder.name} is not used: its vectors in {encoder.precision} agree with the plain forward's "
            f"only to cosine {worst:.5f}, {LEAST_COSINE[encoder.precision]} is required; try --precision fp32"
        )
    return worst
