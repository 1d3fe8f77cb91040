"""Distill: one target from the pivot, taught by one source (pairwise), all of them (joint) or none (control)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion import cluster, hub
from fusion.align.map import Map
from fusion.align.projector import Projector, projector
from fusion.artifact import Artifact
from fusion.capture.cache import Cache
from fusion.config import Align, Config
from fusion.corpus import Corpus
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.tokens.render import Renderer
from fusion.tracking import Tracker


def check(config: Config) -> None:
    """Refuse, before anything runs, what would fail at the end of a training.

    Raises:
        ValueError: a batch size that the ranks cannot share, or a DeepSpeed file that would save no weights.
    """
    from fusion.distill.trainer import share_batch

    share_batch(config.distill)
    zero = json.loads(Path(config.distill.deepspeed).read_text()).get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"distill.deepspeed: {config.distill.deepspeed} would save no whole weights; "
            "set stage3_gather_16bit_weights_on_model_save: true under zero_optimization"
        )


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Train the target `out.subject`; write it as a Hugging Face folder `model/`.

    `inputs` holds `prepare`, `pivot`, and for each teacher NAME `cache/NAME` and `map/NAME`. A run that was cut off
    goes on from its last checkpoint.

    Raises:
        ValueError: see `trainer.train`, `dataset.FusionDataset` and `capture.cache.Cache`.
    """
    from fusion.distill import trainer as training

    settings, pivot = config.distill, config.pivot
    tokenizer = hub.load_tokenizer(pivot, inputs["pivot"])
    renderer = Renderer(tokenizer, "pivot", hub.template_of(pivot))
    names = [name.removeprefix("cache/") for name in inputs if name.startswith("cache/")]
    teachers = [_teacher(n, inputs, config.align, renderer) for n in names]
    dataset = FusionDataset(
        list(Corpus(inputs["prepare"], "train")),
        renderer,
        teachers,
        settings.gate,
        settings.k,
        hub.context_of(inputs["pivot"]),
        settings.too_long,
    )
    tracker = Tracker(config, f"distill-{out.subject}")
    work, model = out.folder / "work", out.folder / "model"
    trainer, figures = training.train(
        lambda: hub.load_model(pivot, inputs["pivot"], settings.dtype),
        dataset,
        settings,
        config.seed,
        work,
        tracker,
        f"distill {out.subject}",
        config.tracking.every,
    )
    trainer.save_model(str(model))
    history = trainer.state.log_history
    training.release(trainer)
    tracker.close()
    cluster.barrier()

    def finish() -> None:
        tokenizer.save_pretrained(model)
        (model / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing that anybody needs

    cluster.on_main(finish)
    return {**figures, "history": history}


def _teacher(name: str, inputs: Mapping[str, Path], settings: Align, target: Renderer) -> Teacher:
    cache, folder = Cache(inputs[f"cache/{name}"], name=name), inputs.get(f"map/{name}")
    hears: Projector | None = None
    if folder is not None:
        map = Map.load(folder / "map.safetensors", cache.facts["tokenizer"], target.table.digest)
        hears = projector(map, settings)
    return Teacher(name, cache, hears)
