"""Merge: all targets and their base → one checkpoint."""

import math
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fusion import cluster, tracking
from fusion.artifact import Artifact
from fusion.config import Config
from fusion.corpus import Corpus
from fusion.measure import bits_per_byte, made_of
from fusion.merge.engine import merge, plan
from fusion.merge.methods import get_method
from fusion.merge.pools import TensorReport
from fusion.merge.recipe import MergeRecipe
from fusion.merge.records import Lines
from fusion.records import Sample

_MB = 1_000_000
_LEAST, _MOST = 0.1, 2.0  # of the scales that are tried


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

    With `scale: auto`, `inputs` holds `prepare` too, whose validation samples choose the scale.

    Raises:
        ValueError: an unknown method or parameter, or targets whose tensors are not the base's.
    """
    cluster.on_main(partial(_clear, out))
    wanted = config.merge.scale
    samples = list(Corpus(inputs["prepare"], "validation")) if wanted == "auto" else []
    if not samples:
        scale, tried = 1.0 if wanted == "auto" else float(wanted), dict[float, float]()
        reports = _merged(config, inputs, scale, out.folder / "model")
    else:
        tries = _Tries(config, inputs, out, samples)
        scale, tried = search(tries.measure)
        reports = tries.keep()
    facts, finite = _facts(config, inputs, reports), {s: bits for s, bits in tried.items() if math.isfinite(bits)}
    return {**facts, "scale": scale, **({"bits by scale": finite} if finite else {})}


def search(measure: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The scale of the merged update that measures best: of a half, the whole, and where a parabola says the least is.

    The loss along the line from one model to another that was trained from it is nearly a parabola (as where Wortsman
    et al. 2109.01903 interpolate them), which three points give: the pivot's, half way and the whole.

    Args:
        measure: scale → bits per byte; 0 is the pivot.

    Returns:
        The best scale above 0, and scale → bits per byte of all that were measured.

    Raises:
        ValueError: no scale gives bits per byte that are finite.
    """
    tried = {scale: measure(scale) for scale in (0.0, 0.5, 1.0)}
    start, half, whole = tried.values()
    lowest = _LEAST
    if all(map(math.isfinite, tried.values())):
        bend = 2 * (start + whole - 2 * half)  # the loss is start + slope · s + bend · s²
        slope = whole - start - bend
        lowest = -slope / (2 * bend) if bend > 0 else math.inf if whole < start else -math.inf
        lowest = round(min(max(lowest, _LEAST), _MOST), 2)
    if lowest not in tried:
        tried[lowest] = measure(lowest)
    finite = {scale: bits for scale, bits in tried.items() if scale and math.isfinite(bits)}
    if not finite:
        raise ValueError(f"merge.scale: no merged model has finite bits per byte on the validation samples: {tried}")
    return min(finite, key=finite.__getitem__), tried


class _Tries:
    """Merges with several scales, measured on samples; the best so far is kept, so that two at most are on disk.

    Args:
        samples: what is measured on; their domains weigh alike.
    """

    def __init__(self, config: Config, inputs: Mapping[str, Path], out: Artifact, samples: list[Sample]) -> None:
        self._config, self._inputs, self._out, self._samples = config, inputs, out, samples
        self._best: tuple[float, float, list[TensorReport]] | None = None  # bits per byte, scale, report

    def measure(self, scale: float) -> float:
        """Bits per byte, the mean over domains, of the merge with a scale."""
        if not scale:
            return self._bits(self._inputs["pivot"], scale)
        reports = _merged(self._config, self._inputs, scale, self._folder(scale))
        bits, before = self._bits(self._folder(scale), scale), self._best
        if before is None or bits < before[0]:
            self._best = (bits, scale, reports)
        if before is not None:
            beaten = scale if self._best is before else before[1]
            cluster.on_main(partial(shutil.rmtree, self._folder(beaten)))
        return bits

    def _bits(self, folder: Path, scale: float) -> float:
        model = made_of(self._config.pivot, folder, f"scale-{scale:g}")
        found = bits_per_byte(model, folder, self._samples, self._config.release.batch_tokens)
        bits = sum(found.values()) / len(found)
        return bits if math.isfinite(bits) else math.inf

    def keep(self) -> list[TensorReport]:
        """Make the best the result; the report of its tensors."""
        assert self._best is not None
        _, scale, reports = self._best

        def place() -> None:
            self._folder(scale).rename(self._out.folder / "model")
            shutil.rmtree(self._out.folder / "tries")

        cluster.on_main(place)
        return reports

    def _folder(self, scale: float) -> Path:
        return self._out.folder / "tries" / f"{scale:g}"


def _clear(out: Artifact) -> None:
    """Take away what a run left that was cut off before its manifest, but for a merge that goes on."""
    for folder in (out.folder / "model", *(out.folder / "tries").glob("[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)


def _merged(config: Config, inputs: Mapping[str, Path], scale: float, folder: Path) -> list[TensorReport]:
    asked = recipe(config, inputs)
    planned = plan(asked if scale == 1 else replace(asked, lines=Lines(scale, 0.0)))
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
