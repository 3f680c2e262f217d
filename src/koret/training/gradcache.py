"""Big batches in small memory: the whole batch's gradients from chunks, calling the same loss.

Gao et al. 2021 (GradCache, arXiv:2101.06983): embed every chunk without a graph; take the loss of all embeddings
and its gradient with respect to them; embed every chunk again with a graph and push that gradient through. Memory
is one chunk's activations instead of the batch's, for one more forward pass of all chunks but the last: there is room
for one graph, so the last chunk keeps its own from the first pass. Both passes draw the same dropout masks, because
each chunk starts from the random state it had the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from koret.retrieval.devices import send

Embed = Callable[[list[np.ndarray]], torch.Tensor]  # N token lists -> (N, D), with a graph when gradients are enabled


def embed_and_backward(
    embed: Embed,
    texts: Sequence[np.ndarray],
    chunks: Sequence[np.ndarray],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Embed ``texts``, take the loss of their embeddings and add its gradients to the parameters.

    Args:
        embed: maps token lists to embeddings, in the given order.
        texts: N token lists.
        chunks: positions in ``texts``, each exactly once; the last one should be the largest. One chunk means one
            ordinary backward pass.
        loss_of: (N, D) embeddings in the order of ``texts`` -> the scalar to differentiate.

    Returns:
        The loss, detached.
    """
    order = np.argsort(np.concatenate(chunks))  # where each text's embedding stands
    if len(chunks) == 1:
        embeddings = embed([texts[i] for i in chunks[0]])
        loss = loss_of(embeddings[send(order, embeddings.device)])
        loss.backward()
        return loss.detach()

    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks[:-1]:
            states.append(read_random_state())
            parts.append(embed([texts[i] for i in chunk]))
    last = embed([texts[i] for i in chunks[-1]])
    embeddings = torch.cat([*parts, last.detach()]).requires_grad_()
    loss = loss_of(embeddings[send(order, embeddings.device)])
    loss.backward()

    after = read_random_state()
    wanted = embeddings.grad.split([len(chunk) for chunk in chunks])
    last.backward(wanted[-1])
    del last
    for chunk, state, gradient in zip(chunks[:-1], states, wanted[:-1], strict=True):
        set_random_state(state)
        embed([texts[i] for i in chunk]).backward(gradient)
    set_random_state(after)
    return loss.detach()


def read_random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The states of torch's generators: CPU, and every CUDA device in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Put back what ``read_random_state`` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """What is drawn meanwhile is drawn again afterwards."""
    state = read_random_state()
    try:
        yield
    finally:
        set_random_state(state)
