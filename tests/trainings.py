"""Started by tests under the launcher: trains the same target in several ways, one after the other, in one process.

    deepspeed --num_gpus N tests/trainings.py FOLDER NAME=JSON...

FOLDER/pivot is the model, or with `pivot` what an earlier one made. Each JSON holds settings of `distill`; what came of
it is written to FOLDER/NAME.json, the weights to FOLDER/NAME. The teachers are three sources that say something at
random, the same each time.
"""

import gc
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from said import invented_sources
from tiny import ROOT, samples
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion import cluster
from fusion.config import Distill, Lora
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.distill.gate import Gating
from fusion.distill.texts import Texts
from fusion.distill.trainer import release, train
from fusion.distill.validation import Validation
from fusion.records import Sample
from fusion.tokens.render import Renderer


class _Silent:
    """A tracker that nobody reads."""

    def log(self, values: Any, step: int | None = None) -> None:
        """Nothing."""


def validation_samples() -> list[Sample]:
    """Of two domains."""
    return samples(5, seed=4, domain="one") + samples(3, seed=5, domain="two")


def main(folder: Path, name: str, asked: dict[str, Any]) -> None:
    """Train one target."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "pivot")
    renderer = Renderer(tokenizer, "pivot")
    texts = samples(asked.pop("samples", 26), seed=3, words=30)
    kill_at, kill_rank = asked.pop("kill_at", None), asked.pop("kill_rank", None)
    poisoned, no_norm_at = asked.pop("poisoned", None), asked.pop("no_norm_at", None)
    burst_at = asked.pop("burst_at", None)
    work = folder / f"{asked.pop('work', name)}-work"
    lora, pivot = asked.pop("lora", None), folder / asked.pop("pivot", "pivot")
    settings = Distill(
        **{
            "deepspeed": str(ROOT / "configs/deepspeed" / asked.pop("zero", "zero2.json")),
            "dtype": "float32",
            "learning_rate": 3e-3,
            "batch_size": 4,
            "per_rank": 2,
            "label_weight": 0.4,
            "gate": "avg_ce",
            "gate_temperature": 5.0,
            "epochs": 2.0,
            "evaluations": 3,
            "workers": 0,
            "lora": None if lora is None else Lora(**lora),
            **asked,
        }
    )
    teachers = [Teacher(n, *said) for n, said in invented_sources(renderer, texts).items()]
    gating = Gating(settings.gate, settings.gate_level, settings.gate_temperature)
    dataset = FusionDataset(Texts.of(texts, renderer), teachers, gating, settings.k)
    validation = Validation(validation_samples(), renderer, None, 64)
    if kill_at is not None and cluster.rank() == kill_rank:
        _kill_at(kill_at)
    if poisoned is not None:
        dataset[poisoned].taught.probs[3] = np.nan
    if no_norm_at is not None:
        _no_norm_at(no_norm_at)
    if burst_at is not None:
        _burst_at(burst_at)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    try:
        trainer, figures = train(
            lambda: AutoModelForCausalLM.from_pretrained(pivot, dtype=dtype),
            dataset,
            validation,
            settings,
            0,
            work,
            _Silent(),  # type: ignore[arg-type]
            name,
            1,
        )
    except ValueError as error:
        (folder / f"{name}-{cluster.rank()}.error").write_text(str(error))
        return
    trainer.keep(folder / name)
    history = trainer.state.log_history
    release(trainer)
    left = sum(type(held).__name__ == "DeepSpeedEngine" for held in gc.get_objects())  # that fill a device's memory
    if cluster.is_main():
        (folder / f"{name}.json").write_text(json.dumps({"figures": figures, "history": history, "engines": left}))
    cluster.barrier()


def _kill_at(step: int) -> None:
    """This process kills itself when the training has done so many steps."""
    from fusion.distill import trainer as module

    done = module.FusionTrainer.check_gradient

    def counted(self: Any) -> None:
        done(self)
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    module.FusionTrainer.check_gradient = counted  # type: ignore[method-assign]


def _no_norm_at(step: int) -> None:
    """DeepSpeed says that the gradient of this step is no number."""
    from fusion.distill import trainer as module

    begun = module.FusionTrainer.check_model

    def patched(self: Any) -> None:
        begun(self)
        self.model_wrapped.get_global_grad_norm = lambda: math.inf if self.state.global_step == step else 1.0

    module.FusionTrainer.check_model = patched  # type: ignore[method-assign]


def _burst_at(step: int) -> None:
    """In this step a gradient overflows, whose loss is finite."""
    from fusion.distill import trainer as module

    begun = module.FusionTrainer.check_model

    def patched(self: Any) -> None:
        begun(self)
        weight = next(iter(self.model.parameters()))
        weight.register_hook(lambda grad: grad + math.inf if self.state.global_step == step - 1 else grad)

    module.FusionTrainer.check_model = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cluster.start()
    for told in arguments[1:]:
        name, _, settings = told.partition("=")
        main(Path(arguments[0]), name, json.loads(settings))
    cluster.stop()
