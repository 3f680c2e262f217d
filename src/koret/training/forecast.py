"""What a training is going to cost, said before it has cost it, and how true that was at the end.

Seconds come from a few of the run's own steps and a sample of its scoring; bytes from what one token's activations
take, counted on the model at hand (memory.measure_bytes_per_token), what is lost between them (HOLES), and what is
held anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from koret.evaluation.tasks import RetrievalTask
from koret.retrieval.encoder import BATCH_TOKENS, DTYPES, TextEncoder
from koret.retrieval.packed import count_slice_tokens, find_core
from koret.retrieval.processes import SharedEncoder
from koret.retrieval.products import gains_from_order
from koret.training.batches import Batch
from koret.training.logbook import format_time
from koret.training.memory import read_held, read_peak, return_freed
from koret.training.trained import count_trained, count_weights

WARM, LAST = 2, 5  # steps: the first ones are slow, the next ones are timed
WORTH = 20  # steps of the shortest run that is forecast
CHECKPOINT_BYTES = 4 * (3 + 4)  # per trained weight: copies of it and its two moments, and those moments' file twice
# Bytes lost between tensors on a CPU for each that a step keeps: in the first steps, and what they grow by in a run of
# some sixty (glibc 2.36, 2,600 to 9,200 tokens at a time). glibc before 2.38 puts no aligned piece where one of its own
# size was freed (its bug 14581).
HOLES, GROWTH = 0.2, 0.25
# Where what is kept lies apart, on shelves, holes are left by what passes alone: so many times what the widest layer
# computes for a slice (2,600 to 18,000 tokens at a time).
PASSING, LATER = 7, 5  # in the first steps, and what they grow by until Pace.hold_to gives it back
SAMPLE = 16  # questions and texts whose encoding is timed


@dataclass(frozen=True)
class Forecast:
    """Seconds and bytes to expect; ``steps`` and ``scorings`` are those still to come."""

    steps: int
    step_seconds: float
    scorings: int
    scoring_seconds: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.scorings * self.scoring_seconds

    def __str__(self) -> str:
        return (
            f"{self.step_seconds:.2f} s a step, {self.steps:,} steps to go; {self.scoring_seconds:.1f} s a "
            f"scoring, {self.scorings} to go; about {format_time(self.seconds)} to the end"
        )


@dataclass(frozen=True)
class PeakForecast:
    """The most memory a training will hold, in bytes, and what it is made of."""

    held: int  # before the first step: model, data, libraries
    per_token: int  # kept for the backward pass
    tokens: int  # at a time
    pieces: int  # of the heaviest batch
    state: int  # gradients and moments of AdamW
    scoring: int  # encoding without gradients, and the merged copy that is scored at the end
    saving: int  # copies of weights and moments while a checkpoint is written
    holes: float = 0.0  # bytes lost between tensors, for each that activations keep
    growth: float = 0.0  # the same, what they grow by in a run
    passing: int = 0  # what the widest layer computes and does not keep
    later: int = 0  # what is lost beside that in a run
    again: int = 0  # layers whose q, k and v are computed again in the backward pass
    gradients: int = 0  # of the state: what is free between two steps

    @property
    def lost(self) -> float:
        """Bytes lost between tensors at the end of a run, for each that activations keep."""
        return self.holes + self.growth

    @property
    def activations(self) -> int:
        return int(self.per_token * self.tokens * (1 + self.lost)) + self.passing + self.later

    @property
    def peak(self) -> int:
        return self.held + self.state + max(self.activations, self.scoring, self.saving)

    def correct(self, most: int, seen: int) -> int:
        """The peak to expect once steps of at most ``seen`` tokens at a time have held ``most`` bytes."""
        heavier = max(0, self.tokens - seen) * (1 + self.holes) + self.tokens * self.growth
        return max(
            most + int(self.per_token * heavier) + self.later, self.held + self.state + max(self.scoring, self.saving)
        )

    def __str__(self) -> str:
        pieces = f", a batch in up to {self.pieces} pieces by GradCache" if self.pieces > 1 else ""
        lost = f"; {self.lost:.0%} more lost between tensors" if self.lost else ""
        again = f", q, k and v of {self.again} layers computed again instead of kept" if self.again else ""
        return (
            f"memory: about {self.peak / 2**30:.2f} GB at the peak: {self.held / 2**30:.2f} held, "
            f"{self.activations / 2**30:.2f} for activations ({self.per_token / 1024:.1f} KB a token, "
            f"{self.tokens:,} tokens at a time at most{pieces}{again}{lost}), "
            f"{self.state / 2**30:.2f} for gradients and AdamW, "
            f"when nothing trains {self.scoring / 2**30:.2f} for scoring, {self.saving / 2**30:.2f} for a checkpoint"
        )


def forecast_peak(encoder: TextEncoder, per_token: int, budget: int, heaviest: int, merges: bool) -> PeakForecast:
    """Memory of a training whose heaviest batch has ``heaviest`` tokens in this process.

    ``merges``: whether a merged copy of the model is made at the end.
    """
    config = encoder.backbone.config
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    dtype = DTYPES[encoder.precision]
    size = torch.finfo(dtype).bits // 8
    numbers = inner + 6 * config.hidden_size  # a token's, while a layer works on it
    tokens, trained = min(budget, heaviest), count_trained(encoder)
    at_once = BATCH_TOKENS.get(encoder.device.type, 8192)
    return_freed()  # what only the count took
    sliced = encoder.device.type == "cpu" and encoder.slow_path_reason is None
    slice_tokens, slice_scored = (count_slice_tokens(n) if sliced else at_once for n in (tokens, at_once))
    # Flat tokens before, between and after slices; a slice.
    scoring = at_once * 3 * config.hidden_size * size + min(at_once, slice_scored) * numbers * size
    if merges:  # a copy, and where it pays one more in oneDNN's order; the trained model's own is held already
        scoring += count_merged(encoder) * 4
        products = find_products(encoder) if sliced else []
        ordered = bool(products) and gains_from_order(dtype, products, at_once, encoder.prefers_order)
        scoring += count_weights(products) * size if ordered else 0
    pieces = -(-heaviest // budget)
    passing = min(tokens, slice_tokens) * numbers * size
    cpu = encoder.device.type == "cpu"  # on CUDA tensors are counted, not memory
    shelved = encoder.keeps_on_shelves
    return PeakForecast(
        held=read_held(encoder.device),
        per_token=per_token,
        tokens=tokens,
        pieces=pieces,
        state=trained.state_bytes,
        scoring=scoring,
        saving=trained.trained * CHECKPOINT_BYTES,
        holes=HOLES if cpu and not shelved else 0.0,
        growth=GROWTH if cpu and not shelved else 0.0,
        passing=passing * (PASSING if shelved else 1),
        later=passing * LATER if shelved else 0,
        again=0 if encoder.recompute == "layers" else encoder.recompute,
        gradients=trained.gradient_bytes,
    )


def find_products(encoder: TextEncoder) -> list[torch.nn.Parameter]:
    """The frozen matrices that every token is multiplied with."""
    layers = find_core(encoder.backbone).encoder.layer
    return [p for name, p in layers.named_parameters() if p.dim() == 2 and not p.requires_grad and ".lora_" not in name]


def count_merged(encoder: TextEncoder) -> int:
    """Numbers of the weights that a merged copy has of its own: those with an adapter, and those that train."""
    bases = [m.base_layer.weight for m in encoder.backbone.modules() if hasattr(m, "lora_A")]
    own = [p for name, p in encoder.backbone.named_parameters() if p.requires_grad and ".lora_" not in name]
    return count_weights([*bases, *own])


def count_scorings(step: int, total: int, every: int) -> int:
    """Scorings after step ``step``: every so many steps, after the last one, and of the model as saved."""
    return total // every - step // every + (total % every != 0) + 1


def time_scoring(encoder: SharedEncoder, task: RetrievalTask) -> float:
    """Seconds to encode the task's questions and corpus, from a sample spread over both, by characters."""
    seconds = 0.0
    for texts, kind in ((task.queries, "query"), (task.corpus, "passage")):
        sample = texts[:: max(1, len(texts) // SAMPLE)][:SAMPLE]
        began = time.perf_counter()
        encoder.encode(sample, kind)
        seconds += (time.perf_counter() - began) * sum(map(len, texts)) / max(1, sum(map(len, sample)))
    return seconds


def time_steps(batches: Iterable[list[Batch]], add_gradients: Callable[[list[Batch]], torch.Tensor]) -> float:
    """Seconds a token, of steps run forward and backward; the first of them only warms up. Nothing is applied."""
    found: list[tuple[float, int]] = []
    for step in batches:
        began = time.perf_counter()
        add_gradients(step).cpu()  # waits for the device
        found.append((time.perf_counter() - began, count_tokens(step)))
    timed = found[1:] or found
    return sum(seconds for seconds, _ in timed) / sum(tokens for _, tokens in timed)


def count_tokens(batches: Iterable[Batch]) -> int:
    """Tokens of all distinct texts, each once a batch."""
    return sum(len(text) for batch in batches for text in batch.texts)


class Pace:
    """Watches the first steps of a run, forecasts the rest from them, and says at the end how true that was."""

    def __init__(
        self,
        total: int,
        every: int,
        step_tokens: float,
        peak: PeakForecast,
        time_scorings: Callable[[], float],
        limit: int | None = None,
    ) -> None:
        """``every``: steps between two scorings; ``step_tokens``: mean tokens of a step; ``time_scorings``: seconds
        that one scoring takes; ``limit``: bytes that may be held."""
        self.total, self.every, self.step_tokens, self.peak = total, every, step_tokens, peak
        self._time_scorings, self._limit = time_scorings, limit
        self._tokens, self._seen, self._began = 0, 0, 0.0
        self._needed: int | None = 0  # bytes held after the first step since some were given back; None: before it
        self.forecast: Forecast | None = None
        self.expected = peak.peak

    def watch(self, step: int, batches: list[Batch], device: torch.device, wait: Callable[[], object]) -> str | None:
        """After step ``step``; the forecast in words when there is one now. ``wait`` waits for the device."""
        if self.total < WORTH or step > LAST:
            return None
        self._seen = max([self._seen, *(count_tokens([batch]) for batch in batches)])
        if step < WARM:
            return None
        if step > WARM:
            self._tokens += count_tokens(batches)
        if step in (WARM, LAST):
            wait()
        now = time.perf_counter()
        if step == WARM:
            self._began = now
        if step != LAST or not self._tokens:
            return None
        seconds = (now - self._began) / self._tokens * self.step_tokens
        scorings = count_scorings(step, self.total, self.every)
        self.forecast = Forecast(self.total - step, seconds, scorings, self._time_scorings())
        self.expected = self.peak.correct(read_peak(device), self._seen)
        self._began = time.perf_counter()
        return f"forecast: {self.forecast}, {self.expected / 2**30:.2f} GB at the peak"

    def hold_to(self, device: torch.device) -> None:
        """After a step: give back what was freed where more is held than was forecast, and more than a step needs.

        On a CPU what a step frees is kept for the next one (memory.keep_freed). Batches of other sizes do not quite
        fit into it, so it grows from step to step, the more the longer it is kept. What every step needs is not given
        back: the next one would wait for fresh pages. Near a limit less growth is let stand. The next step's gradients
        come on top of what is held.
        """
        if device.type != "cpu":
            return
        held = read_held(device)
        if self._needed is None:
            self._needed = held
            return
        gradients = self.peak.gradients
        most = max(self.expected - gradients, self._needed * 1.1)
        if self._limit is not None:
            most = min(most, max(self._limit * 0.97 - gradients, self._needed * 1.02))
        if held > most:
            return_freed()
            self._needed = None

    def compare(self, device: torch.device) -> str | None:
        """How long it took since the forecast and what was held at most, beside what was said; None without one."""
        if self.forecast is None:
            return None
        took, said = time.perf_counter() - self._began, self.forecast.seconds
        most, expected = read_peak(device), self.expected
        return (
            f"forecast {format_time(said)}, took {format_time(took)} ({took / said - 1:+.0%}); memory forecast "
            f"{expected / 2**30:.2f} GB at the peak, was {most / 2**30:.2f} GB ({most / expected - 1:+.0%})"
        )
