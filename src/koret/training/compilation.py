"""Whether a training gains from torch.compile: tried on its own first steps where that may be, never assumed.

On a GPU a small encoder spends much of a step on passes over tokens between two products, and on starting kernels;
torch.compile makes fewer of both (``retrieval.tokenwise``) and takes its time to do so. On a CPU it lengthens a step,
which has kernels of its own there (docs/RESULTS.md), so nothing is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from koret.retrieval.encoder import DTYPES, TextEncoder
from koret.retrieval.linear import is_four_bit
from koret.retrieval.processes import Group
from koret.training.batches import Batch
from koret.training.forecast import time_steps
from koret.training.gradcache import keep_random_state
from koret.training.logbook import format_time

DEVICES = ("cuda",)  # where it may pay
WORTH = 120.0  # seconds of a training that is long enough to try
KEPT = 0.95  # of a step's time: what takes less is kept
TRIED = 6  # steps, the first of which warms up
CHECKED_TEXTS, CHECKED_STEPS = 8, 16  # texts; the gradients' relative difference, in steps of the type
LEAST_STEP = 1e-4  # float32's steps are so small that long sums count


def explain_uncompiled(encoder: TextEncoder) -> str | None:
    """None where torch.compile could have a part in training ``encoder``, else why not."""
    if encoder.slow_path_reason is not None:
        return f"it needs the padding-free forward, and {encoder.slow_path_reason}"
    if any(map(is_four_bit, encoder.backbone.parameters())):
        return "weights in 4 bits are not compiled"
    return None


def choose_compiling(
    encoder: TextEncoder,
    make_steps: Callable[[], Iterable[list[Batch]]],
    add_gradients: Callable[[list[Batch]], torch.Tensor],
    tokens: float,
    group: Group,
) -> str | None:
    """Set ``encoder.compiles`` to what is faster; what was found in words, None where nothing was tried.

    The batches of a few steps are run both ways, forward and backward, and gradients are left where they are added.
    ``tokens`` is what the whole training encodes. The random state is as before. All of ``group`` choose alike.
    """
    encoder.compiles = False
    if encoder.device.type not in DEVICES or explain_uncompiled(encoder) is not None:
        return None
    was_training = encoder.model.training
    encoder.model.train()
    try:
        with keep_random_state():
            plain = max(group.gather(time_steps(make_steps(), add_gradients)))
            if plain * tokens < WORTH:
                return None
            texts = next(iter(make_steps()))[0].texts
            if faults := [fault for fault in group.gather(_find_fault(encoder, texts)) if fault]:
                encoder.compiles = False
                return f"torch.compile was tried and is left alone: {faults[0]}"
            encoder.compiles = True
            compiled = max(group.gather(time_steps(make_steps(), add_gradients)))
    finally:
        encoder.model.train(was_training)
    encoder.compiles = compiled < KEPT * plain
    return (
        f"torch.compile was tried and is {'used' if encoder.compiles else 'left alone'}: a step takes "
        f"{compiled / plain:.2f} of its time with it, of about {format_time(plain * tokens)} in all"
    )


def _find_fault(encoder: TextEncoder, texts: Sequence[np.ndarray]) -> str | None:
    """What is wrong with the compiled gradients of a few texts, taken without dropout; None where they are right."""
    texts, allowed = texts[:CHECKED_TEXTS], CHECKED_STEPS * max(torch.finfo(DTYPES[encoder.precision]).eps, LEAST_STEP)
    encoder.model.eval()
    try:
        plain, compiled = (_take_gradients(encoder, texts, compiles) for compiles in (False, True))
    except Exception as error:  # the compilers raise what they like
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no words'}"
    finally:
        encoder.model.train()
    difference = float((compiled - plain).norm() / plain.norm())
    return None if difference <= allowed else f"its gradients differ by {difference:.1%}, {allowed:.1%} are allowed"


def _take_gradients(encoder: TextEncoder, texts: Sequence[np.ndarray], compiles: bool) -> torch.Tensor:
    """All trained weights' gradients of some number made of the texts' vectors, as one row."""
    encoder.compiles = compiles
    vectors = encoder.embed(texts)
    weights = torch.linspace(-1, 1, vectors.numel(), device=vectors.device).view_as(vectors)
    trained = [p for p in encoder.backbone.parameters() if p.requires_grad]
    found = torch.autograd.grad((vectors * weights).sum(), trained, allow_unused=True)
    return torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])
