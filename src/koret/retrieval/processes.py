"""The processes of a launch (accelerate launch, torchrun): who is who, and what they tell one another.

Work is shared, results are not: whatever is decided or written is decided and written by process 0, the leader, and
the others are told. Alone, every method does its plain thing, so callers need no second path.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from koret.retrieval.devices import send

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others
BUCKET = 16 << 20  # numbers summed over the processes at a time


class Process(NamedTuple):
    """One of ``count`` processes; ``local`` is its number on its own machine, of ``local_count``."""

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    def owns(self, name: str) -> bool:
        return choose_owner(name, self.count) == self.rank


class PeerFailed(RuntimeError):
    """Another process of the launch could not go on."""


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Another process of the launch ran out of memory in this step."""


def find_process() -> Process:
    """This process as its launcher numbered it; alone where nothing launched it.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Raises ValueError where they do not fit together.
    """
    rank, count, local = (
        int(os.environ.get(name, other)) for name, other in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not 0 <= rank < count:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={count} do not fit together: unset both, or use torchrun or accelerate launch"
        )
    return Process(rank, count, local, int(os.environ.get("LOCAL_WORLD_SIZE", min(count, local + 1))))


def choose_owner(name: str, count: int) -> int:
    """The process of ``count`` that something called ``name`` belongs to: the same on every machine, in every run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def choose_device(process: Process) -> str | None:
    """The accelerator of this process's own, where there are any."""
    return f"cuda:{process.local % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def join_group() -> Group:
    """The group of this process's launch, joined on first use and left when the process ends."""
    process = find_process()
    if process.count > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=process.rank, world_size=process.count, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Group(process)


class Group:
    """What the processes of a launch can say to one another. Every method is called by all of them, in one order."""

    def __init__(self, process: Process | None = None) -> None:
        self.process = process or Process()

    @property
    def alone(self) -> bool:
        return self.process.count == 1

    @property
    def leads(self) -> bool:
        return self.process.rank == 0

    # ------------------------------------------------------------ plain values

    def wait(self) -> None:
        """Until every process is here."""
        self.find_largest(0)

    def find_largest(self, number: int) -> int:
        """The largest number any process gives; goes over the CPU, so nobody waits for an accelerator."""
        if self.alone:
            return number
        told = torch.tensor(number)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks, for all of them."""
        values: list[Any] = [value] * self.process.count
        if not self.alone:
            dist.all_gather_object(values, value)
        return values

    def lead(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What ``function`` returns in process 0, for all; nobody else calls it.

        What it raises there is raised there, and PeerFailed with its words everywhere else.
        """
        if self.alone:
            return function(*arguments)
        result, error = None, None
        if self.leads:
            result, error = _try(function, *arguments)
        told: list[Any] = [(result, _describe(error))]
        dist.broadcast_object_list(told, src=0)
        result, reason = told[0] if not self.leads else (result, None)
        if error is not None:
            raise error
        if reason is not None:
            raise PeerFailed(f"process 0 stopped: {reason}")
        return result

    def in_turn(self, function: Callable[[], Result]) -> Result:
        """``function`` in every process: first one on each machine, then the others, which find what it left on disk.

        Raises what it raises, or PeerFailed where it failed elsewhere.
        """
        if self.alone:
            return function()
        result = None
        for first in (True, False):
            error = None
            if (self.process.local == 0) is first:
                result, error = _try(function)
            self.require_all(error)
        return result

    def require_all(self, error: BaseException | None = None) -> None:
        """Raise ``error``, or PeerFailed where another process gives one."""
        said = self.gather(_describe(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(said):
            if reason is not None:
                raise PeerFailed(f"process {rank} stopped: {reason}")

    def require_same(self, **facts: Any) -> None:
        """Raise ValueError, naming the fact, unless every process gives the same values."""
        for rank, other in enumerate(self.gather(facts)):
            if odd := [name for name in facts if other[name] != facts[name]]:
                raise ValueError(
                    f"processes {self.process.rank} and {rank} do not agree on {', '.join(odd)}: start them with the "
                    "same command, versions, data and model on every machine"
                )

    def meet(self, failed: bool = False) -> None:
        """A point in a step where all learn whether one of them is out of memory; raises PeerOutOfMemory there."""
        if self.find_largest(int(failed)) and not failed:
            raise PeerOutOfMemory("another process is out of memory")

    # ------------------------------------------------------------ tensors

    def deal(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """For every process the positions of its share of things of these sizes: about equal sums, largest first.

        Dealt by falling size, back and forth: 0 1 2 2 1 0 0 1 2 ...
        """
        count = self.process.count
        if count == 1:
            return [np.arange(len(sizes))]
        order = np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable")
        turn, place = np.divmod(np.arange(len(order)), count)
        owner = np.where(turn % 2 == 0, place, count - 1 - place)
        return [order[owner == rank] for rank in range(count)]

    def gather_rows(self, own: torch.Tensor, shares: Sequence[np.ndarray]) -> torch.Tensor:
        """Every process's rows (n_r, D) in the order the positions ``shares`` name: (sum of n_r, D).

        Differentiable in ``own`` alone. When every process takes the same loss of the result, each gets the whole
        gradient of its own rows, and the sum of the processes' weight gradients is that of one process.
        """
        if self.alone:
            return own
        order = send(np.argsort(np.concatenate(shares), kind="stable"), own.device)
        return _GatherRows.apply(own, [len(share) for share in shares], self.process.rank)[order]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add every process's gradients up, in place; a missing one counts as zero."""
        if self.alone:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and sum(g.numel() for g in bucket) + parameter.numel() > BUCKET:
                _sum_in_place(bucket)
                bucket = []
            bucket.append(parameter.grad)
        _sum_in_place(bucket)


class SharedEncoder:
    """An encoder whose work a group shares: each process encodes its part of the texts, all get every vector."""

    def __init__(self, encoder: Any, group: Group) -> None:
        """``encoder`` has ``encode`` and ``dimensions`` (a TextEncoder)."""
        self.encoder, self.group = encoder, group
        self.name = encoder.name

    def encode(self, texts: Sequence[str], kind: str, *, progress: bool = False) -> np.ndarray:
        """Texts -> (N, D) float32 unit vectors. Raises what the encoder raises, PeerFailed in the other processes."""
        if self.group.alone:
            return self.encoder.encode(texts, kind, progress=progress)
        shares = self.group.deal([len(text) for text in texts])
        own = shares[self.group.process.rank]
        vectors, error = _try(lambda: self.encoder.encode([texts[i] for i in own], kind, progress=progress))
        self.group.require_all(error)
        return self.group.gather_rows(torch.from_numpy(vectors), shares).numpy()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
        """Rows of all processes one after another; shorter shares travel with zeros behind them."""
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = own.new_zeros(max(counts), own.shape[1])
        padded[: len(own)] = own
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[ctx.own], None, None


def _sum_in_place(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def _try(function: Callable[..., Result], *arguments: Any) -> tuple[Result | None, Exception | None]:
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error


def _describe(error: BaseException | None) -> str | None:
    return None if error is None else str(error) or type(error).__name__
