"""Distill: one target from the pivot, taught by one source (pairwise), all of them (joint) or none (control)."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion import cluster, hub
from fusion.align.map import Map
from fusion.align.projector import Projector, projector
from fusion.artifact import Artifact
from fusion.capture.cache import Cache
from fusion.config import EXACT_SAMPLERS, NOT_LINEAR, Config
from fusion.corpus import Corpus
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.distill.gate import Gating
from fusion.distill.lora import merge_lora
from fusion.distill.texts import Texts
from fusion.tokens.render import Renderer
from fusion.tracking import Tracker


def check(config: Config) -> None:
    """Refuse, before anything runs, what would fail at the end of a training.

    Raises:
        ValueError: a batch size that the ranks cannot share, or a DeepSpeed file that would save no weights.
    """
    from fusion.distill.arguments import deepspeed_of, share_batch

    share_batch(config.distill)
    if config.distill.lora is not None and importlib.util.find_spec("peft") is None:
        raise ValueError("distill.lora: needs peft; pip install 'fusion[lora]'")
    zero = deepspeed_of(config.distill).get("zero_optimization") or {}
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            f"distill.deepspeed: {config.distill.deepspeed} would save no whole weights; "
            "set stage3_gather_16bit_weights_on_model_save: true under zero_optimization"
        )


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Train the target `out.subject`; write it as a Hugging Face folder `model/`, and with LoRA its `adapter/` too.

    `inputs` holds `prepare`, `pivot`, and for each teacher NAME `cache/NAME` and `map/NAME`. A run that was cut off
    goes on from its last checkpoint.

    Raises:
        ValueError: see `trainer.train`, `dataset.FusionDataset` and `capture.cache.Cache`.
    """
    from fusion.distill import trainer as training
    from fusion.distill.validation import Validation

    settings, pivot = config.distill, config.pivot
    tokenizer = hub.load_tokenizer(pivot, inputs["pivot"])
    renderer = Renderer(tokenizer, "pivot", hub.template_of(pivot))
    names = [name.removeprefix("cache/") for name in inputs if name.startswith("cache/")]
    teachers = [teacher(n, inputs, config, renderer) for n in names]
    context = hub.context_of(inputs["pivot"])
    confident = settings.label_schedule == "confidence"
    gating = Gating(
        settings.gate,
        settings.gate_level,
        settings.gate_temperature,
        settings.weights,
        confident,
        settings.gate_unit,
    )
    texts = Texts.shared(Corpus(inputs["prepare"], "train"), renderer, out.folder / "work/rendered")
    dataset = FusionDataset(texts, teachers, gating, settings.k, context, settings.too_long)
    budget = settings.per_rank * int(dataset.lengths().max(initial=1))
    measured = Corpus(inputs["prepare"], "validation") if settings.evaluations else ()
    validation = Validation(measured, renderer, context, budget)
    tracker = Tracker(config, f"distill-{out.subject}")
    work, model, adapter = out.folder / "work", out.folder / "model", out.folder / "adapter"
    trainer, figures = training.train(
        lambda: hub.load_model(pivot, inputs["pivot"], settings.dtype),
        dataset,
        validation,
        settings,
        config.seed,
        work,
        tracker,
        f"distill {out.subject}",
        config.tracking.every,
    )
    trainer.keep(adapter if settings.lora else model)
    history = trainer.state.log_history
    training.release(trainer)
    tracker.close()
    cluster.barrier()

    def finish() -> None:
        if settings.lora:
            merge_lora(hub.load_model(pivot, inputs["pivot"], settings.dtype), adapter, model)
        tokenizer.save_pretrained(model)
        for folder in (model, adapter):
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing that anybody needs

    cluster.on_main(finish)
    return {**figures, "history": history}


def teacher(name: str, inputs: Mapping[str, Path], config: Config, target: Renderer) -> Teacher:
    """A source as the target hears it, from its `cache/NAME` and `map/NAME` among the inputs.

    Raises:
        ValueError: a cache or map that is broken, of another tokenizer, or of a sampler that the divergence cannot use.
    """
    cache, folder = Cache(inputs[f"cache/{name}"], name=name), inputs.get(f"map/{name}")
    wanted, sampler = config.distill.divergence, cache.facts["sampler"]
    if folder is not None and wanted in NOT_LINEAR and sampler not in EXACT_SAMPLERS:
        raise ValueError(
            f"distill.divergence: {wanted} will not do with the cache of {name}, whose sampler is {sampler}: draws are "
            "right on average only in what is linear in them; capture it with top_k or nucleus"
        )
    hears: Projector | None = None
    if folder is not None:
        map = Map.load(folder / "map.safetensors", cache.facts["tokenizer"], target.table.digest)
        hears = projector(map, config.align)
    return Teacher(name, cache, hears)
