"""What `--plan` finds on this machine: the corpus, or its beginning, and what each source does with some of it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion import cluster, hub, pipeline, sizes
from fusion.artifact import read_manifest
from fusion.config import Config, Dataset, Model
from fusion.corpus import Corpus
from fusion.pipeline import Task
from fusion.records import Sample

SECONDS = 4.0  # that a source reads for, when it is loaded
_SAMPLES = 1024
_GROUPS = 16  # of the prepared samples, from which some are taken
_HOST_SHARE = 0.5  # of the memory that is free, for weights on a machine without a GPU


@dataclass(frozen=True)
class Material:
    """What there is to train on.

    Attributes:
        samples: how many; None where nobody knows.
        size: bytes of their segments.
        measured: counted, or read from the beginning of each file; else from the config or the files' sizes.
        some: samples for the calibration, none where they are not here.
    """

    samples: float | None
    size: float | None
    measured: bool
    some: Sequence[Sample] = ()


@dataclass(frozen=True)
class Survey:
    """What is here.

    Attributes:
        tasks: those of the run, by label; empty while a model or a dataset is not here.
        captured: facts of the captures that are done, by the source's name.
        trials: what each source did (`fusion.capture.calibrate.Trial`), by its name.
        devices: how many devices there are here, and `memory`, the bytes of one.
    """

    tasks: Mapping[str, Task]
    material: Material
    devices: int
    memory: float
    captured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trials: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def survey(config: Config, calibrate: bool) -> Survey:
    """Look at what is here; with `calibrate`, at the data too, and let each source that is here read for some seconds.

    Raises:
        ValueError: a model or dataset that is broken, or a sample that a source cannot read.
    """
    tasks = _tasks(config)
    done = {label: task for label, task in tasks.items() if task.out.done()}
    material = _material(config, done.get("prepare"), calibrate)
    devices, memory = _devices()
    captured, trials, reasons = {}, {}, {}
    for m in pipeline.candidates(config):
        label = f"capture/{m.name}"
        if m.cache is None and label in done:
            captured[m.name] = read_manifest(done[label].out.folder)["facts"]
        elif m.cache is None and calibrate:
            tried = _trial(config, m, material.some)
            if isinstance(tried, str):
                reasons[m.name] = tried
            else:
                trials[m.name] = tried
    return Survey(tasks, material, devices, memory, captured, trials, reasons)


def states(tasks: Iterable[Task]) -> dict[str, str]:
    """Label → done, cut off or to do."""
    found = {}
    for task in tasks:
        begun = task.out.folder.exists()
        found[task.out.label] = "done" if task.out.done() else "cut off, goes on" if begun else "to do"
    return found


def parameters(model: Model) -> float | None:
    """All parameters of a model: the config's figure, else counted where it is here.

    Raises:
        ValueError: its weights are damaged.
    """
    folder = Path(model.model)
    if model.parameters is not None or not folder.is_dir():
        return model.parameters
    return float(hub.count_parameters(folder)) or None


def dtype_of(model: Model) -> str:
    """What a source is computed in on the device that is here, or on the one that is assumed."""
    import torch

    if model.dtype == "auto" and not torch.cuda.is_available():
        return "bfloat16"
    return cluster.precision(model.dtype)


def _tasks(config: Config) -> dict[str, Task]:
    local = all(Path(m.model).is_dir() for m in (config.pivot, *config.sources))
    if not local or not all(Path(d.data).exists() for d in config.prepare.data):
        return {}
    return {task.out.label: task for task in pipeline.plan(config, pipeline.find(config))}


def _devices() -> tuple[int, float]:
    import torch

    if not torch.cuda.is_available():
        return 1, sizes.DEVICE_BYTES
    return max(cluster.world(), torch.cuda.device_count()), float(torch.cuda.get_device_properties(0).total_memory)


def _material(config: Config, prepared: Task | None, look: bool) -> Material:
    if prepared is not None:
        corpus = Corpus(prepared.out.folder, "train")
        groups = corpus.groups
        some = [n * groups // min(groups, _GROUPS) for n in range(min(groups, _GROUPS))]
        spread = [s for n in some for s in corpus.group(n)[: _SAMPLES // len(some)]]
        facts = read_manifest(prepared.out.folder)["facts"]
        return Material(len(corpus), float(facts["bytes"]["train"]), True, spread)
    found = pipeline.stage("prepare").preview(config) if look else None
    if found is not None and found[2]:
        return Material(found[0], found[1], True, found[2])
    return Material(None, sizes.total(_train_bytes(config, d) for d in config.prepare.data if not d.heldout), False)


def _train_bytes(config: Config, dataset: Dataset) -> float | None:
    path = Path(dataset.data)
    if dataset.megabytes is not None:
        size = dataset.megabytes * 1e6
    elif path.is_file():
        size = float(path.stat().st_size)
    else:
        return None
    heldout = 0 if any(d.heldout for d in config.prepare.data) else config.prepare.heldout_share
    size *= config.prepare.train_share * (1 - heldout)
    # as though it were one domain
    return size - min(
        size * config.prepare.validation_share, config.prepare.validation_limit * config.prepare.max_bytes
    )


def _trial(config: Config, model: Model, samples: Sequence[Sample]) -> Any:
    """A `Trial`, or why there is none."""
    folder = Path(model.model)
    if not folder.is_dir():
        return "not here"
    if model.parallel == "zero3":
        return "parallel: zero3 takes all devices"
    if not samples:
        return "its data is not here"
    key = "pivot.model" if model is config.pivot else f"sources.{config.sources.index(model)}.model"
    hub.locate(model, key)
    weights = sizes.product(parameters(model), sizes.DTYPE_BYTES[cluster.precision(model.dtype)])
    if weights is None or weights > _free():
        return "too large for this device"
    try:
        tried = pipeline.stage("capture").trial(model, folder, config.capture, samples, SECONDS)
    except MemoryError as error:
        return f"too large for this device: {error}"
    return tried or "none of the samples fits its context"


def _free() -> float:
    """Bytes for weights on this process's device."""
    import torch

    if torch.cuda.is_available():
        return sizes.WEIGHTS_SHARE * torch.cuda.mem_get_info(cluster.local_rank())[0]
    return _HOST_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
