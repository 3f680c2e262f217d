"""How the batches of a training are encoded in the memory there is: whole, keeping less, or in pieces."""

from __future__ import annotations

from dataclasses import dataclass

from koret.retrieval.encoder import TextEncoder
from koret.retrieval.processes import Process
from koret.training.forecast import forecast_peak
from koret.training.memory import (
    ALONE,
    LEAST,
    choose_fewer,
    choose_micro_batch_tokens,
    count_free_tokens,
    measure_bytes_per_token,
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a step keeps for its backward pass per token, tokens encoded at a time, and whether that fits."""

    per_token: int
    budget: int
    fits: bool


def plan_memory(
    encoder: TextEncoder,
    heaviest: int,
    *,
    merges: bool,
    asked: int | None = None,
    limit: int | None = None,
    process: Process = ALONE,
) -> MemoryPlan:
    """Choose how batches of up to ``heaviest`` tokens are encoded, and set ``encoder.recompute`` to it.

    As a whole, keeping everything, where that fits into half of the free memory and under ``limit``, the bytes that
    this process may hold. Else q, k and v are computed again in the backward pass, in as few layers as will do: in all
    of them four sevenths are kept, and a step takes a tenth longer. What does not fit then either goes in pieces
    (GradCache), which takes two fifths more (docs/RESULTS.md).

    ``asked``: tokens at a time that were asked for. ``merges``: whether a merged copy of the model is made at the end.

    Gradients are the same in every case, and on a CPU with the same bits in the first two.
    """

    def plan() -> MemoryPlan:
        per_token = measure_bytes_per_token(encoder)

        def exceeds(budget: int) -> bool:
            return limit is not None and forecast_peak(encoder, per_token, budget, heaviest, merges).peak > limit

        budget = asked or choose_micro_batch_tokens(count_free_tokens(encoder, per_token, process), heaviest)
        while not asked and budget > LEAST and exceeds(budget):
            budget = choose_fewer(budget)
        return MemoryPlan(per_token, budget, not exceeds(budget) and budget >= min(heaviest, asked or heaviest))

    encoder.recompute = "layers" if encoder.recompute == "layers" else 0
    whole = plan()
    if whole.fits or encoder.recompute == "layers" or encoder.slow_path_reason is not None:
        return whole
    few, many = 0, encoder.backbone.config.num_hidden_layers  # too few layers, and enough of them
    encoder.recompute = many
    found = plan()
    if not found.fits and not asked:
        encoder.recompute = 0
        return whole
    while found.fits and many - few > 1:
        encoder.recompute = (few + many) // 2
        tried = plan()
        if tried.fits:
            many, found = encoder.recompute, tried
        else:
            few = encoder.recompute
    encoder.recompute = many
    return found
