"""The gradients of a step's batches, in as much memory as there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from koret.retrieval.encoder import TextEncoder
from koret.training.batches import Batch, cut_micro_batches
from koret.training.gradcache import embed_and_backward, read_random_state, set_random_state
from koret.training.loss import Loss, info_nce
from koret.training.optimization import GuardedOptimizer

PADDED_PIECES = 4  # where the model pads, a batch is embedded in this many pieces of texts of like length


class BatchGradients:
    """Embeds batches, takes the loss and adds its gradients to the encoder's parameters.

    ``budget`` is how many tokens are encoded at a time: a batch of more goes through GradCache. When memory runs out
    the budget is halved and the step redone, once.
    """

    def __init__(
        self, encoder: TextEncoder, optimizer: GuardedOptimizer, scale: float, budget: int, say: Callable[[str], None]
    ) -> None:
        self.encoder, self.optimizer, self.scale, self.budget, self.say = encoder, optimizer, scale, budget, say
        self.was_halved = False

    def halved_to(self, budget: int | None) -> None:
        """Go on with the budget a resumed run had come down to; None: it had not."""
        if budget is not None:
            self.budget, self.was_halved = budget, True

    def add(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Add the gradient of the batches' mean loss.

        Returns (3,) on the device, means over the batches: loss, masked pairs, questions without negatives. Raises
        MemoryError, saying what to change, when memory runs out a second time.
        """
        state = read_random_state()
        try:
            return torch.stack([self._add(batch, share=1 / len(batches)) for batch in batches]).mean(dim=0)
        except torch.OutOfMemoryError as error:
            tokens = min(self.budget, max(sum(map(len, batch.texts)) for batch in batches))
            if self.was_halved:
                raise MemoryError(
                    f"out of memory again, with {self.budget:,} tokens at a time: start a new run with "
                    f"--micro-batch-tokens {max(64, tokens // 2)}, a smaller --max-seq-length or "
                    "--gradient-checkpointing true"
                ) from error
            self.budget, self.was_halved = max(64, tokens // 2), True
        # Outside of the handler: the exception holds on to the frames, and those to the memory.
        self.say(f"out of memory: from here on {self.budget:,} tokens are encoded at a time, with the same gradients")
        self.optimizer.adamw.zero_grad()
        torch.cuda.empty_cache()
        set_random_state(state)
        return self.add(batches)

    def _add(self, batch: Batch, share: float) -> torch.Tensor:
        """Add ``share`` of one batch's gradients."""
        device = self.encoder.device
        queries, targets, positives, known = (
            None if part is None else torch.from_numpy(part).to(device, non_blocking=True)
            for part in (batch.queries, batch.targets, batch.positives, batch.known)
        )
        losses: list[Loss] = []  # the loss is taken once, however often the texts are embedded

        def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
            losses.append(info_nce(embeddings[queries], embeddings[targets], positives, known, scale=self.scale))
            return self.optimizer.scale(losses[0].value * share)

        embed_and_backward(self._embed, batch.texts, cut_micro_batches(batch.texts, self.budget), loss_of)
        return torch.stack([part.detach().float() for part in losses[0]])

    def _embed(self, texts: list[np.ndarray]) -> torch.Tensor:
        """(N, D) unit vectors. Where the model pads, texts of like length (they come sorted) go together."""
        if self.encoder.slow_path_reason is None:
            return self.encoder.embed(texts)
        pieces = np.array_split(np.arange(len(texts)), min(PADDED_PIECES, len(texts)))
        return torch.cat([self.encoder.embed([texts[i] for i in piece]) for piece in pieces])
