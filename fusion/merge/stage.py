"""Merge: all targets and their base → one checkpoint."""

import json
import math
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fusion import cluster, tracking
from fusion.artifact import Artifact, write_json
from fusion.config import Config
from fusion.corpus import Corpus
from fusion.measure import bits_per_byte, made_of
from fusion.merge.engine import merge, plan
from fusion.merge.methods import get_method
from fusion.merge.pools import TensorReport
from fusion.merge.recipe import MergeRecipe
from fusion.merge.records import Lines
from fusion.merge.scales import Scales, alike, given, search
from fusion.records import Sample

_MB = 1_000_000


def recipe(config: Config, inputs: Mapping[str, Path]) -> MergeRecipe:
    """What the config asks for, all of the update; `inputs` holds `pivot` and `target/NAME` for each target."""
    models = tuple(str(path / "model") for name, path in inputs.items() if name.startswith("target/"))
    asked = config.merge
    return MergeRecipe(asked.method, str(inputs["pivot"]), models, asked.parameters, asked.dtype, seed=config.seed)


def check(config: Config) -> None:
    """Refuse, before anything runs, a method or parameters that the merge would refuse at the end.

    Raises:
        ValueError: an unknown method or parameter, or a value out of range.
    """
    targets = 1 if config.distill.topology == "joint" else len(config.sources)
    get_method(config.merge.method).check(config.merge.parameters, targets)


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write the fused checkpoint as a Hugging Face folder `model/`; every rank takes part.

    With `scale: auto`, `inputs` holds `prepare` too, whose validation samples choose the scales.

    Raises:
        ValueError: an unknown method or parameter, or targets whose tensors are not the base's.
    """
    cluster.on_main(partial(_clear, out))
    wanted = config.merge.scale
    samples = list(Corpus(inputs["prepare"], "validation")) if wanted == "auto" else []
    if not samples:
        scales, tried = alike(1) if wanted == "auto" else given(wanted), dict[Scales, float]()
        reports = _merged(config, inputs, scales, out.folder / "model")
    else:
        tries = _Tries(config, inputs, out, samples)
        scales, tried = search(tries.measure, apart=_layered(config, inputs))
        reports = tries.keep(scales)
    finite = [[s.layers, s.outside, bits] for s, bits in tried.items() if math.isfinite(bits)]
    told = {"scale": scales.layers, "scale outside of layers": scales.outside}
    return {**_facts(config, inputs, reports), **told, **({"bits by scale": finite} if finite else {})}


class _Tries:
    """Merges with several scales, measured on samples; the best so far is kept, so that two at most are on disk.

    What was measured is written down, so that a run that was cut off measures the rest alone.

    Args:
        samples: what is measured on; their domains weigh alike.
    """

    def __init__(self, config: Config, inputs: Mapping[str, Path], out: Artifact, samples: list[Sample]) -> None:
        self._config, self._inputs, self._out, self._samples = config, inputs, out, samples
        self._memory = out.folder / "work/tries.json"
        self._known: dict[Scales, float] = cluster.on_main(self._remembered)
        self._kept: tuple[Scales, list[TensorReport]] | None = None  # what is on disk

    def measure(self, scales: Scales) -> float:
        """Bits per byte, the mean over domains, of the merge with some scales."""
        if scales not in self._known:
            if scales == alike(0):
                self._known[scales] = self._bits(self._inputs["pivot"], scales)
            else:
                self._try(scales)
            cluster.on_main(self._remember)
        return self._known[scales]

    def keep(self, scales: Scales) -> list[TensorReport]:
        """Make the merge with some scales the result; the report of its tensors."""
        if self._kept is None or self._kept[0] != scales:  # measured before a run was cut off
            self._kept = (scales, _merged(self._config, self._inputs, scales, self._folder(scales)))

        def place() -> None:
            self._folder(scales).rename(self._out.folder / "model")
            shutil.rmtree(self._out.folder / "tries")

        cluster.on_main(place)
        return self._kept[1]

    def _try(self, scales: Scales) -> None:
        reports = _merged(self._config, self._inputs, scales, self._folder(scales))
        bits = self._bits(self._folder(scales), scales)
        best = min((b for s, b in self._known.items() if s != alike(0)), default=None)
        self._known[scales] = bits
        beaten: Scales | None = scales
        if best is None or bits < best:
            beaten, self._kept = self._kept and self._kept[0], (scales, reports)
        if beaten is not None:
            cluster.on_main(partial(shutil.rmtree, self._folder(beaten)))

    def _bits(self, folder: Path, scales: Scales) -> float:
        model = made_of(self._config.pivot, folder, f"scale-{_short(scales)}")
        found = bits_per_byte(model, folder, self._samples, self._config.release.batch_tokens)
        bits = sum(found.values()) / len(found)
        return bits if math.isfinite(bits) else math.inf

    def _remembered(self) -> dict[Scales, float]:
        if not self._memory.exists():
            return {}
        return {Scales(layers, outside): bits for layers, outside, bits in json.loads(self._memory.read_text())}

    def _remember(self) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._memory, [[s.layers, s.outside, bits] for s, bits in self._known.items()])

    def _folder(self, scales: Scales) -> Path:
        return self._out.folder / "tries" / _short(scales)


def scaled(whole: MergeRecipe, scales: Scales) -> MergeRecipe:
    """A recipe with so much of its update."""
    return whole if scales == alike(1) else replace(whole, lines=Lines(scales.layers, 0.0, scales.outside))


def _layered(config: Config, inputs: Mapping[str, Path]) -> bool:
    """Whether some of the tensors are in layers and some are not."""
    return len({job.layer is None for job in plan(recipe(config, inputs)).layout.jobs}) == 2


def _short(scales: Scales) -> str:
    return f"{scales.layers:g}-{scales.outside:g}"


def _clear(out: Artifact) -> None:
    """Take away what a run left that was cut off before its manifest, but for a merge that goes on."""
    for folder in (out.folder / "model", *(out.folder / "tries").glob("[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)


def _merged(config: Config, inputs: Mapping[str, Path], scales: Scales, folder: Path) -> list[TensorReport]:
    planned = plan(scaled(recipe(config, inputs), scales))
    with tracking.bar("merge, MB", planned.bytes_to_read // _MB) as bar:
        return merge(planned, folder, on_bytes=_Megabytes(bar))


class _Megabytes:
    """Shows bytes, counted on any thread, as megabytes."""

    def __init__(self, bar: tracking.Bar) -> None:
        self._bar, self._left, self._lock = bar, 0, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            whole, self._left = divmod(self._left + count, _MB)
            if whole:
                self._bar.advance(whole)


def _facts(config: Config, inputs: Mapping[str, Path], reports: list[TensorReport]) -> dict[str, Any]:
    merged = [r for r in reports if r.coefficients]
    return {
        "method": config.merge.method,
        "parameters": config.merge.parameters,
        "names": [name.removeprefix("target/") for name in inputs if name.startswith("target/")],
        "coefficients": [[r.name, list(r.coefficients)] for r in merged],
        "updates": [[r.name, list(r.updates)] for r in merged],
    }
