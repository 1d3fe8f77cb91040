"""`transformers.Trainer` with the sparse loss in place of logits, under DeepSpeed or alone."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fusion import cluster, spread, tracking
from fusion.config import Distill
from fusion.distill.arguments import arguments, label_weight_at, objective_of, steps_of, workers_of
from fusion.distill.batch import Collator
from fusion.distill.checkpoint import finished, last_checkpoint, own_steps, seal
from fusion.distill.dataset import FusionDataset
from fusion.distill.figures import Figures, Progress
from fusion.distill.lora import add_lora, trained
from fusion.distill.loss import Shape
from fusion.distill.model import can_pack, check_head, freeze_embeddings, fuse_head, shape_of, skips_unseen
from fusion.distill.order import StepOrder
from fusion.distill.validation import Validation

_NAMED = 5  # samples that an error names


def train(
    load: Callable[[], Any],
    dataset: FusionDataset,
    validation: Validation,
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
        validation: measured `settings.evaluations` times.
        settings: `batch_size` is that of all ranks together; ranks × `per_rank` must divide it.

    Returns:
        The trainer, whose `keep` every rank must call, and figures of the run.

    Raises:
        ValueError: no samples, a batch size that cannot be shared out, an architecture whose logits are more than the
            head's own, scaled or soft-capped, or a loss or gradient that is not finite.
    """
    if not len(dataset):
        raise ValueError(
            "distill: no sample is left to learn from: all are too long for the pivot; lower prepare.max_bytes"
        )
    begun = last_checkpoint(work, settings)
    told = arguments(settings, begun.deepspeed, seed, work, every)
    model = load()
    shape = shape_of(model, len(dataset.renderer.table))
    if settings.lora is not None:
        torch.manual_seed(seed)  # their first values are drawn, and have to be the same on all ranks
        add_lora(model, settings.lora)
    if settings.freeze_embeddings:
        freeze_embeddings(model)
    fuse_head(model, objective_of(settings), shape)
    steps = steps_of(len(dataset), settings)
    dataset.share_memory(workers_of(settings))
    trainer = FusionTrainer(
        model=model,
        args=told,
        train_dataset=dataset,
        data_collator=Collator(average=settings.average),
        callbacks=[Progress(title, steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.begin(settings, shape, tracker, validation, steps)
    if begun.sums is not None:
        trainer.figures.go_on(begun.sums)
    start = time.monotonic()
    with suppress(_Done):
        trainer.train(resume_from_checkpoint=begun.checkpoint)
    learned, weights = trained(model)
    return trainer, {
        **trainer.figures.summary(),
        "seconds": round(time.monotonic() - start, 1),
        "steps": trainer.state.global_step,
        **trainer.outcome(),
        **({"learned": learned, "weights": weights} if settings.lora else {}),
    }


class _Done(Exception):
    """A checkpoint that was gone on from had all its steps behind it: Trainer would look only after one more."""


def release(trainer: "FusionTrainer") -> None:
    """Let go of a trainer's workers, model and DeepSpeed state, so that the next target starts from nothing."""
    from accelerate.state import AcceleratorState

    loader = trainer.callback_handler.train_dataloader
    workers: Any = getattr(getattr(loader, "base_dataloader", loader), "_iterator", None)
    if hasattr(workers, "_shutdown_workers"):  # they live as long as their iterator, which much refers to
        workers._shutdown_workers()
    trainer.callback_handler.train_dataloader = None
    trainer.callback_handler.callbacks.clear()
    engine: Any = trainer.model_wrapped
    if hasattr(engine, "destroy"):
        engine.destroy()
    trainer.accelerator.free_memory()
    del trainer.model, trainer.model_wrapped, engine
    handler: Any = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = None
    trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None  # all of these refer to the engine
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    spread.forget()


class FusionTrainer(Trainer):
    """Trainer whose loss is the mean over all positions that carry loss, of all ranks and accumulated batches."""

    loss_is_scaled_for_ga = True

    def begin(
        self, settings: Distill, shape: Shape, tracker: tracking.Tracker, validation: Validation, steps: int
    ) -> None:
        """Set what is to be done beside the steps: checks, figures, evaluations."""
        self._settings, self._shape, self._tracker, self._validation = settings, shape, tracker, validation
        self._steps, self._work = steps, Path(str(self.args.output_dir))
        self._share = settings.label_weight
        self._read: list[torch.Tensor] = []  # numbers of the samples of this step
        self.figures = Figures([t.name for t in self._dataset.teachers], self.args.device)
        self.add_callback(_Watch(self))

    @property
    def _dataset(self) -> FusionDataset:
        assert isinstance(self.train_dataset, FusionDataset)
        return self.train_dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        self.order = StepOrder(len(self._dataset), self._settings.batch_size, self.args.seed)
        return self.order

    def _prepare_input(self, data: Any) -> Any:
        """On the device, in its own type: Trainer would round probabilities and weights to the model's bfloat16."""
        if isinstance(data, Mapping):
            return {name: self._prepare_input(held) for name, held in data.items()}
        return data.to(self.args.device) if torch.is_tensor(data) else data

    # ------------------------------------------------------------ a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of a step, and the sum of the weights of all positions in them on all ranks together."""
        start = time.monotonic()
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:  # a worker's comes with its traceback as text
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        self.figures.waited(time.monotonic() - start)
        self._read = [batch["sample"] for batch in batches]
        whole = torch.tensor([sum(float(batch["weight"].sum()) for batch in batches)], device=self.args.device)
        return batches, self.accelerator.gather(whole).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's part of the mean; DeepSpeed averages over ranks, so it is scaled by their number."""
        teacher, sample = inputs.pop("teacher"), inputs.pop("sample")
        tokens, confidence = int(inputs.pop("tokens")), inputs.pop("confidence")
        self._share = label_weight_at(self._settings, self.state.global_step / max(self.state.max_steps, 1))
        total, label_loss, fusion_loss = model(**inputs, label_weight=1 - (1 - self._share) * confidence)
        finite = torch.isfinite(total.detach()).float()
        if cluster.world() > 1:  # all ranks stop together, and none waits for one that is gone
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite:
            broken = sample[~torch.isfinite(label_loss + fusion_loss)]
            here = sample[:0] if torch.isfinite(total) else broken if len(broken) else sample
            raise self._stop("loss", here)
        self.figures.add(teacher, label_loss, fusion_loss, tokens)
        loss = total * cluster.world() / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def check_gradient(self) -> None:
        """Stop, before anything is saved, where the step that was done had a gradient that is no number."""
        norm = getattr(self.model_wrapped, "get_global_grad_norm", lambda: None)()
        if norm is None:  # ZeRO-0 in float32 keeps none; by now such a gradient is in the weights, which all ranks have
            learned = [weight.detach() for weight in self.model_wrapped.parameters() if weight.requires_grad]
            norm = torch.nn.utils.get_total_norm(learned, math.inf)
        if not math.isfinite(float(norm)):
            raise self._stop("gradient", torch.cat(self._read))

    def _stop(self, what: str, samples: torch.Tensor) -> ValueError:
        """The error for all ranks, with the ids of the samples on any of them."""
        found = sorted({int(n) for part in cluster.gather(samples.unique().tolist()) for n in part})
        shown = ", ".join(self._dataset.id(n) for n in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        saved = finished(self._work)
        kept = f"{saved[-1]} is kept" if saved else "there is no checkpoint yet"
        return ValueError(
            f"distill: the {what} is not finite at step {self.state.global_step}, samples {shown}{more}; "
            f"lower distill.learning_rate. {kept}"
        )

    # ------------------------------------------------------------ beside the steps

    def check_model(self) -> None:
        """Look whether the model's logits are what the loss takes them to be, and how its samples can be packed."""
        model: Any = getattr(self.model_wrapped, "module", self.model_wrapped)
        model.eval()
        check_head(model, self._shape)
        asked = self._settings.packing
        # attention that skips what is not seen does so in batches of one row alone
        packs = asked != "none" and can_pack(model) and not (asked == "rows" and skips_unseen(model))
        model.train()
        if asked in ("rows", "flat") and not packs:
            raise ValueError(
                f"distill.packing: {asked} will not do: in {type(model).__name__} samples of one row see each other; "
                "set auto or none"
            )
        flat = asked == "flat" or (asked == "auto" and skips_unseen(model))
        assert isinstance(self.data_collator, Collator)
        self.data_collator.packing = ("flat" if flat else "rows") if packs else "none"

    def due(self, step: int) -> bool:
        """Whether the model is to be evaluated after a step."""
        times = min(self._settings.evaluations, self._steps)
        return bool(len(self._validation)) and step in {round(self._steps * (n + 1) / times) for n in range(times)}

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Bits per byte on the validation samples, by domain; the best weights so far are put aside."""
        model: Any = self.model_wrapped
        start = time.monotonic()
        model.eval()
        found = self._validation.measure(model)
        model.train()
        mean = sum(found.values()) / len(found)
        told = {"bits_per_byte": mean, **{f"bits_per_byte/{d}": value for d, value in found.items()}}
        told = {name: round(value, 6) for name, value in told.items()}
        self._tracker.log(told, self.state.global_step)
        self.log(told)
        step, best = self.state.global_step, self.best() == (self.state.global_step, told["bits_per_byte"])
        if best and self._settings.keep == "best" and step < self._steps:
            self._put_aside(step)
        by_domain = ", ".join(f"{d} {value:.4f}" for d, value in found.items())
        tracking.say(f"  step {step}: bits per byte {mean:.4f} ({by_domain}){', the best so far' if best else ''}")
        self.figures.leave_out(time.monotonic() - start)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, told)
        return told

    def _put_aside(self, step: int) -> None:
        folder = self._aside(step)
        part = folder.with_suffix(".part")
        cluster.on_main(lambda: shutil.rmtree(part, ignore_errors=True))
        self.save_model(str(part))

        def finish() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)

        cluster.barrier()
        cluster.on_main(finish)

    def _aside(self, step: int) -> Path:
        """Where the weights of a step are kept that was the best so far."""
        return self._work / f"best-{step}"

    def seal(self) -> None:
        """Call the checkpoint of this step finished; only then what was best before it can go."""
        seal(self._work / f"checkpoint-{self.state.global_step}", self._settings, self.figures.sums())
        best = self.best()

        def clear() -> None:
            for folder in self._work.glob("best-*"):
                if best is None or folder != self._aside(best[0]):
                    shutil.rmtree(folder)

        cluster.on_main(clear)

    def best(self) -> tuple[int, float] | None:
        """The step and the mean of the best evaluation, the first of equals; also of steps before a resume."""
        found = [(float(e["bits_per_byte"]), int(e["step"])) for e in self.state.log_history if "bits_per_byte" in e]
        found = [(value, step) for value, step in found if math.isfinite(value)]
        return None if not found else min(found)[::-1]

    def outcome(self) -> dict[str, float]:
        """Which step's weights are kept, and what they measured."""
        best = self.best()
        return {} if best is None or self._settings.keep == "last" else {"best_step": best[0], "bits_per_byte": best[1]}

    def keep(self, folder: Path) -> None:
        """Save the weights that are kept: those of the best evaluation, or the last. Every rank must call it."""
        step = int(self.outcome().get("best_step", self._steps))
        if step < self._steps:
            cluster.on_main(lambda: shutil.copytree(self._aside(step), folder, dirs_exist_ok=True))
        else:
            self.save_model(str(folder))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this step's own figures, summed over ranks, and pass all of them on."""
        if "loss" in logs:
            logs |= self.figures.take()
            logs["label_weight"] = round(self._share, 5)
            self._tracker.log(logs, self.state.global_step)
        super().log(logs, start_time)


class _Watch(TrainerCallback):
    """Calls the trainer at the points that it cannot override."""

    def __init__(self, trainer: FusionTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The engine is there, and no step was done."""
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps  # not those of the checkpoint
        own_steps(self._trainer.model_wrapped)
        if state.global_step >= state.max_steps:
            raise _Done
        start = time.monotonic()
        self._trainer.check_model()
        self._trainer.figures.leave_out(time.monotonic() - start)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch begins, or is gone on with: there Trainer wraps the sampler once more and does not reach it."""
        self._trainer.order.go_on(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step was done, and nothing of it is saved."""
        self._trainer.check_gradient()
        control.should_evaluate = self._trainer.due(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """This rank has written its part of a checkpoint."""
        self._trainer.seal()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once a step: at the end of an epoch Trainer looks again."""
        control.should_evaluate = False
