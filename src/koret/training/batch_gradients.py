"""The gradients of a step's batches, in as much memory as there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from koret.retrieval.devices import send
from koret.retrieval.encoder import TextEncoder
from koret.retrieval.layout import cut_by_length
from koret.retrieval.processes import Group, PeerOutOfMemory
from koret.training.batches import Batch, cut_micro_batches
from koret.training.gradcache import embed_and_backward, read_random_state, set_random_state
from koret.training.loss import Loss
from koret.training.objectives import MOST_SCALE, Objective, Relations
from koret.training.optimization import GuardedOptimizer

PADDED_PIECES = 4  # where the model pads, a batch is embedded in at most so many pieces of texts of like length


class BatchGradients:
    """Embeds batches, takes the loss and adds its gradients to the encoder's parameters.

    ``budget`` is how many tokens are encoded at a time: a batch of more goes through GradCache. When memory runs out
    the budget is halved and the step redone, once.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        optimizer: GuardedOptimizer,
        objective: Objective,
        budget: int,
        say: Callable[[str], None],
        *,
        log_scale: torch.nn.Parameter | None = None,
        guided: bool = False,
        group: Group | None = None,
    ) -> None:
        """``log_scale``: () where the scale is learned; ``guided``: batches carry a guide's vectors.

        The processes of ``group`` share the texts of every batch: each embeds its own, all take the same loss of all
        the embeddings, and their gradients are added up. Loss and gradients are those of one process.
        """
        self.encoder, self.optimizer, self.objective, self.budget, self.say = encoder, optimizer, objective, budget, say
        self.log_scale, self.guided, self.group = log_scale, guided, group or Group()
        self.was_halved = False

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the values that ``add`` returns after the first three."""
        return (("guided_out",) if self.guided else ()) + (("scale",) if self.log_scale is not None else ())

    def halved_to(self, budget: int | None) -> None:
        """Go on with the budget a resumed run had come down to; None: it had not."""
        if budget is not None:
            self.budget, self.was_halved = budget, True

    def add(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Add the gradient of the batches' mean loss.

        Returns (3,) on the device, means over the batches: loss, masked pairs, questions without negatives; behind them
        the ``extras``. Raises MemoryError, saying what to change, when memory runs out a second time.
        """
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(0.0, math.log(MOST_SCALE))
        state = read_random_state()
        try:
            values = torch.stack([self._add(batch, share=1 / len(batches)) for batch in batches]).mean(dim=0)
            self.group.sum_gradients(self.optimizer.parameters)
            return values
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
        """Add ``share`` of one batch's gradients, those of this process's texts."""
        device = self.encoder.device
        relations = Relations(
            *(
                None if part is None else send(part, device)
                for part in (getattr(batch, name) for name in Relations._fields)
            )
        )
        scale = self.objective.scale if self.log_scale is None else self.log_scale.exp()
        if self.log_scale is not None and not self.group.leads:
            scale = scale.detach()  # everybody takes the whole loss: the scale's gradient counts once
        losses: list[Loss] = []  # the loss is taken once, however often the texts are embedded
        shares = self.group.deal([len(text) for text in batch.texts])
        texts = [batch.texts[i] for i in shares[self.group.process.rank]]

        def loss_of(own: torch.Tensor) -> torch.Tensor:
            self.group.meet()
            embeddings = self.group.gather_rows(own, shares)
            losses.append(self.objective.measure(embeddings, relations, scale))
            return self.optimizer.scale(losses[0].value * share)

        try:
            embed_and_backward(self._embed, texts, cut_micro_batches(texts, self.budget), loss_of)
            self.group.meet()
        except PeerOutOfMemory:
            raise
        except torch.OutOfMemoryError:
            self.group.meet(failed=True)  # where the others meet: they would wait for this process forever
            raise
        value, masked, skipped, guided = losses[0]
        parts = [
            value,
            masked,
            skipped,
            *([guided] if self.guided else []),
            *([] if self.log_scale is None else [scale]),
        ]
        return torch.stack([part.detach().float() for part in parts])

    def _embed(self, texts: list[np.ndarray]) -> torch.Tensor:
        """(N, D) unit vectors. Where the model pads, texts of like length (they come sorted) go together."""
        if not texts:  # more processes than texts
            return torch.zeros(0, self.encoder.dimensions, device=self.encoder.device, requires_grad=True)
        if self.encoder.slow_path_reason is None:
            return self.encoder.embed(texts)
        pieces = cut_by_length([len(text) for text in texts], PADDED_PIECES)
        return torch.cat([self.encoder.embed(texts[first:last]) for first, last in pieces])
