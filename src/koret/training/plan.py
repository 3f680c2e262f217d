"""What a training is going to do, in words."""

from __future__ import annotations

from koret.config import TrainingConfig
from koret.retrieval.encoder import TextEncoder
from koret.training.lora import get_lora_info
from koret.training.preparation import Job
from koret.training.trained import count_trained


def describe_plan(config: TrainingConfig, encoder: TextEncoder, job: Job, warmup: int, processes: int = 1) -> list[str]:
    """Model, adapters, data, steps and negatives, a line each."""
    task, total, batches = job.evaluators[0].task, job.schedule.total, job.report["batches"]
    lines = [
        f"model {config.model_name}: {encoder.path}, {encoder.precision} on {encoder.device.type}",
        *([str(get_lora_info(encoder))] if config.use_lora else []),
        str(count_trained(encoder)),
        f"data: {len(job.pairs):,} pairs from {len(job.train):,} articles; {len(task.queries):,} questions of "
        f"{len(job.held_out):,} other articles are scored over {len(task.corpus):,} passages",
        f"plan: {total:,} steps; a query sees at most {config.batch_size - 1} negatives, the other targets of its batch"
        + (" and the curated negatives there" if job.report["hard_negatives"] else ""),
        "batches ({}): on average {pairs:.1f} pairs of {articles:.1f} articles choose among {different_texts:.1f} "
        "different texts; an epoch encodes {tokens_of_an_epoch:,} tokens".format(config.batching, **batches),
    ]
    if processes > 1:
        lines.append(
            f"{processes} processes encode a share of every batch each; its negatives are those of the whole batch"
        )
    if config.gradient_accumulation_steps > 1:
        lines.append(f"gradients of {config.gradient_accumulation_steps} batches are summed, which adds no negatives")
    if warmup < config.warmup_steps:
        lines.append(f"warmup_steps {config.warmup_steps} is cut to {warmup}, a tenth of the run")
    if job.schedule.dropped:
        lines.append(f"{job.schedule.dropped} pairs stand in batches without negatives and are left out")
    for name, count in (("questions", job.report["queries_cut"]), ("targets", job.report["targets_cut"])):
        if count:
            lines.append(f"{count:,} {name} are longer than {encoder.max_seq_length} tokens and are cut")
    return lines
