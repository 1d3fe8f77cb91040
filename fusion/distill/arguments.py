"""The config's settings as `transformers.TrainingArguments`, and how a step's samples are shared out."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fusion import cluster
from fusion.config import Distill
from fusion.distill.divergence import Objective


def share_batch(settings: Distill) -> tuple[int, int]:
    """Samples that a rank reads at once, and how many times it does so in a step.

    Raises:
        ValueError: `batch_size` cannot be divided so.
    """
    per_rank = min(settings.per_rank, max(1, settings.batch_size // cluster.world()))
    if settings.batch_size % (per_rank * cluster.world()):
        raise ValueError(
            f"distill.batch_size: {settings.batch_size} will not do: with distill.per_rank {per_rank} "
            f"on {cluster.world()} ranks it must be a multiple of {per_rank * cluster.world()}"
        )
    return per_rank, settings.batch_size // (per_rank * cluster.world())


def steps_of(samples: int, settings: Distill) -> int:
    """Optimizer steps of a training."""
    return max(1, math.ceil(math.ceil(samples / settings.batch_size) * settings.epochs))


def workers_of(settings: Distill) -> int:
    """Processes a rank that build batches."""
    if settings.workers == "auto":
        return 2 if torch.cuda.is_available() else 1
    return int(settings.workers)


def deepspeed_of(settings: Distill) -> dict[str, Any]:
    """What the DeepSpeed file says."""
    return dict(json.loads(Path(settings.deepspeed).read_text()))


def objective_of(settings: Distill) -> Objective:
    """What the loss makes small."""
    return Objective(
        settings.divergence,
        settings.missing_mass,
        settings.teacher_temperature,
        settings.student_temperature,
        settings.beta,
        settings.label_smoothing,
    )


def label_weight_at(settings: Distill, done: float) -> float:
    """λ when a share `done` of the training is over."""
    start, end = settings.label_weight, settings.label_weight_end
    if end is None:
        return start
    way = done if settings.label_schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * way


def arguments(
    settings: Distill, deepspeed: dict[str, Any] | str, seed: int, work: Path, every: int
) -> TrainingArguments:
    """How `transformers.Trainer` is to train.

    Args:
        deepspeed: the DeepSpeed settings, or their file.
        work: where checkpoints go.
        every: steps between log lines.

    Raises:
        ValueError: the batch size cannot be shared out, or the DeepSpeed file is missing.
    """
    per_rank, accumulated = share_batch(settings)
    if not Path(settings.deepspeed).is_file():
        raise ValueError(
            f"distill.deepspeed: {settings.deepspeed} is no file; configs/deepspeed holds zero0, zero2 and zero3.json"
        )
    return TrainingArguments(
        output_dir=str(work),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=per_rank,
        gradient_accumulation_steps=accumulated,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=cluster.precision(settings.dtype) == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed,
        logging_steps=every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers_of(settings),
        dataloader_persistent_workers=workers_of(settings) > 0,
        dataloader_prefetch_factor=4 if workers_of(settings) else None,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
