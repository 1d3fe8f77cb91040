"""`transformers.Trainer` with the sparse loss in place of logits, under DeepSpeed or alone."""

import gc
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fusion import cluster, tracking
from fusion.config import Distill
from fusion.distill.dataset import FusionDataset, collate
from fusion.distill.loss import MissingMass, Targets, sparse_cross_entropy

_LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def train(
    load: Callable[[], Any],
    dataset: FusionDataset,
    settings: Distill,
    seed: int,
    work: Path,
    tracker: tracking.Tracker,
    title: str,
    every: int,
) -> tuple["FusionTrainer", dict[str, float]]:
    """Train a target, going on from the last checkpoint under `work` if there is one.

    Args:
        load: makes the pivot; called once the DeepSpeed settings are known, so that ZeRO-3 can shard it as it loads.
        settings: `batch_size` is that of all ranks together; ranks × `per_rank` must divide it.

    Returns:
        The trainer, whose `save_model` every rank must call, and figures of the run.

    Raises:
        ValueError: a batch size that cannot be shared out, an architecture whose logits are not head(hidden state),
            or a loss that is not finite.
    """
    arguments = _arguments(settings, seed, work, every)
    model = load()
    _check_head(model)
    _fuse_head(model, settings.missing_mass)
    steps = _steps(len(dataset), settings)
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=partial(collate, label_weight=settings.label_weight),
        callbacks=[_Progress(title, steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.begin(tracker, [t.name for t in dataset.teachers])
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_checkpoint(work, zero_stage(settings)))
    return trainer, {
        **trainer.summary(),
        "seconds": round(time.monotonic() - start, 1),
        "steps": trainer.state.global_step,
    }


def release(trainer: "FusionTrainer") -> None:
    """Let go of a trainer's model and DeepSpeed state, so that the next target starts from nothing."""
    from accelerate.state import AcceleratorState

    engine: Any = trainer.model_wrapped
    if hasattr(engine, "destroy"):
        engine.destroy()
    trainer.accelerator.free_memory()
    del trainer.model, trainer.model_wrapped, engine
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def zero_stage(settings: Distill) -> int:
    """The ZeRO stage that the DeepSpeed file asks for."""
    told = json.loads(Path(settings.deepspeed).read_text())
    return int(told.get("zero_optimization", {}).get("stage", 0))


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


def _arguments(settings: Distill, seed: int, work: Path, every: int) -> TrainingArguments:
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
        deepspeed=settings.deepspeed,
        logging_steps=every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _steps(samples: int, settings: Distill) -> int:
    return max(1, math.ceil(math.ceil(samples / settings.batch_size) * settings.epochs))


def _last_checkpoint(work: Path, zero: int) -> str | None:
    """The newest checkpoint that every rank wrote to its end.

    Raises:
        ValueError: it is of another number of ranks or ZeRO stage, by which DeepSpeed divides the optimizer's state.
    """
    return cluster.on_main(lambda: _find_checkpoint(work, f"{cluster.world()} ranks, ZeRO-{zero}"))


def _find_checkpoint(work: Path, layout: str) -> str | None:
    told = work / "layout"
    states = [p.parent for p in work.glob("checkpoint-*/trainer_state.json")]  # which Trainer writes last
    if told.exists() and states and told.read_text() != layout:
        raise ValueError(
            f"{work} holds checkpoints of {told.read_text()} and this run has {layout}; go on as it began, "
            "or remove that folder to begin this target again"
        )
    work.mkdir(parents=True, exist_ok=True)
    told.write_text(layout)
    whole = [p for p in states if len(list(p.glob("rng_state*.pth"))) == cluster.world()]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _check_head(model: Any) -> None:
    """Refuse an architecture that does more to its logits than the output head (soft caps, scales)."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        raise ValueError(f"pivot: {type(model).__name__} has no plain output head; the fused loss needs one")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        scaled = [name for name in _LOGIT_SCALES if getattr(model.config, name, None) not in (None, 1)]
        if scaled:  # sharded by ZeRO-3, it cannot be run before its engine is there: the config has to tell
            raise ValueError(f"pivot: {type(model).__name__} has {scaled[0]} on its logits; this cannot be fused yet")
        return
    with torch.no_grad():
        ids = torch.arange(4)[None] + 1
        hidden = model.base_model(input_ids=ids).last_hidden_state
        if not torch.allclose(model(input_ids=ids).logits.float(), head(hidden).float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"pivot: {type(model).__name__} changes its logits after the output head; this cannot be fused yet"
            )


def _fuse_head(model: Any, missing: MissingMass) -> None:
    """Make the model return losses and never logits.

    The head stays a module and is called as one, so that DeepSpeed's hooks gather its weights under ZeRO-3.
    """

    def head_forward(head: Any, hidden: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, ...]:
        return sparse_cross_entropy(hidden, head.weight, getattr(head, "bias", None), targets, missing)

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        labels: torch.Tensor,
        taught_ids: torch.Tensor,
        taught_probs: torch.Tensor,
        label_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        body = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = body.last_hidden_state.flatten(0, 1)[rows]
        return self.get_output_embeddings()(hidden, Targets(labels, taught_ids, taught_probs, label_weight))  # type: ignore[no-any-return]

    head = model.get_output_embeddings()
    head.forward = MethodType(head_forward, head)
    model.forward = MethodType(forward, model)


class FusionTrainer(Trainer):
    """Trainer whose loss is the mean over all positions that carry loss, of all ranks and accumulated batches."""

    loss_is_scaled_for_ga = True

    def begin(self, tracker: tracking.Tracker, teachers: list[str]) -> None:
        """Set what is reported to whom."""
        self._tracker, self._teachers = tracker, teachers
        # per teacher: positions, Σ fusion loss; last two rows: all positions, Σ label loss
        self._sums = np.zeros((len(teachers) + 1, 2))
        self._all = np.zeros_like(self._sums)
        self._tokens, self._since = 0, time.monotonic()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of a step, and how many positions carry loss in them on all ranks together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor([sum(len(batch["labels"]) for batch in batches)], device=self.args.device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's part of the mean; DeepSpeed averages over ranks, so it is scaled by their number."""
        teacher = inputs.pop("teacher")
        total, label_loss, fusion_loss = model(**inputs)
        finite = torch.isfinite(total.detach()).float()
        if cluster.world() > 1:  # all ranks stop together, and none waits for one that is gone
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite:
            raise ValueError(
                f"distill: the loss is not finite ({total.item()} on this rank) at step "
                f"{self.state.global_step}; lower distill.learning_rate. "
                "The last checkpoint is kept"
            )
        self._count(teacher, label_loss, fusion_loss, int(inputs["attention_mask"].sum()))
        loss = total * cluster.world() / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def _count(self, teacher: torch.Tensor, label_loss: torch.Tensor, fusion_loss: torch.Tensor, tokens: int) -> None:
        which = teacher.cpu().numpy()
        taught = which >= 0
        losses = fusion_loss.float().cpu().numpy()
        n = len(self._teachers)
        self._sums[:n, 0] += np.bincount(which[taught], minlength=n)
        self._sums[:n, 1] += np.bincount(which[taught], losses[taught], minlength=n)
        self._sums[n] += len(which), float(label_loss.sum())
        self._tokens += tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this step's own figures, summed over ranks, and pass all of them on."""
        if "loss" in logs:
            sums = np.sum(cluster.gather(self._sums), axis=0)
            self._all += sums
            now = time.monotonic()
            speed = cluster.world() * self._tokens / max(now - self._since, 1e-9)
            logs |= {**self._figures(sums), "tokens_per_second": round(speed, 1), "memory_gb": round(_memory_gb(), 3)}
            self._sums[:], self._tokens, self._since = 0, 0, now
            self._tracker.log(logs, self.state.global_step)
        super().log(logs, start_time)

    def _figures(self, sums: np.ndarray) -> dict[str, float]:
        positions = max(sums[-1, 0], 1)
        figures = {"label_loss": sums[-1, 1] / positions, "taught_share": sums[:-1, 0].sum() / positions}
        for name, (count, loss) in zip(self._teachers, sums[:-1], strict=True):
            figures[f"taught_by/{name}"] = count / positions
            if count:
                figures[f"fusion_loss/{name}"] = loss / count
        return {name: round(float(value), 5) for name, value in figures.items()}

    def summary(self) -> dict[str, float]:
        """Figures over all steps of this process; after a resume those before it are in the log history alone."""
        self._all += np.sum(cluster.gather(self._sums), axis=0)
        self._sums[:] = 0
        return {**self._figures(self._all), "positions": int(self._all[-1, 0])}


def _memory_gb() -> float:
    """Peak memory of this process: the GPU's where there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Progress(TrainerCallback):
    """A bar over steps."""

    def __init__(self, title: str, steps: int):
        self._bar, self._note = tracking.Bar(title, steps), ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more."""
        self._bar.advance(note=self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest figures for the bar."""
        if logs and "label_loss" in logs:
            self._note = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        self._bar.close()
