"""Merge: all targets and their base → one checkpoint."""

import json
import math
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusion import cluster, hub, tracking
from fusion.artifact import Artifact, digest, write_json
from fusion.config import Config
from fusion.corpus import Corpus
from fusion.measure import Reading, made_of, read
from fusion.merge import chat
from fusion.merge.base import base_for
from fusion.merge.contribution import Refused, choose
from fusion.merge.engine import merge, plan
from fusion.merge.methods import get_method
from fusion.merge.pools import TensorReport
from fusion.merge.recipe import MergeRecipe
from fusion.merge.records import Lines
from fusion.merge.scales import Scales, alike, given
from fusion.records import Sample
from fusion.tokens.render import PLAIN_TEMPLATE

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

    With `scale: auto` and with `weights: auto` the validation samples of `prepare` choose the scales, and how much each
    target counts. A pivot whose checkpoint has other tensors than its targets is written anew first. The tokenizer
    gets the template that chats were trained with.

    Raises:
        ValueError: an unknown method or parameter, or targets whose tensors are not the base's.
    """
    cluster.on_main(partial(_clear, out))
    far = None if config.merge.scale == "auto" else given(config.merge.scale)
    models = [Path(model) for model in recipe(config, inputs).models]
    inputs = {**inputs, "pivot": cluster.on_main(partial(_base, config, inputs["pivot"], models[0], out))}
    weighs = config.merge.weighs(len(models))
    samples = list(Corpus(inputs["prepare"], "validation")) if weighs or far is None else []
    weights: tuple[float, ...] = ()
    tried: dict[Scales, float] = {}
    why = ""
    if not samples:
        scales = far or alike(1)
        reports = _merged(config, inputs, weights, scales, out.folder / "model")
    else:
        tries = _Tries(config, inputs, out, samples)
        alone = tries.alone(models) if weighs else []
        weights, scales, tried, refused = choose(tries.measure, alone, far, tries.lead, _layered(config, inputs))
        if refused:
            why = _why(refused)
            tracking.say(f"merge.scale: {why}: {scales} is taken")
        reports = tries.keep(weights, scales)
    cluster.on_main(partial(_give_template, config, inputs, out.folder / "model"))
    cluster.on_main(partial(_settle_tokenizer, config, out.folder / "model"))
    finite = [[s.layers, s.outside, bits] for s, bits in tried.items() if math.isfinite(bits)]
    told: dict[str, Any] = {"scale": scales.layers, "scale outside of layers": scales.outside}
    told |= {"weights": list(weights)} if weights else {}
    told |= {"why not another scale": why} if why else {}
    return {**_facts(config, inputs, reports), **told, **({"bits by scale": finite} if finite else {})}


_Try = tuple[tuple[float, ...], Scales]  # weights, none where they are the recipe's; and how far


class _Tries:
    """Merges with several weights and scales, measured on samples; the best so far is kept: two at most are on disk.

    What was measured is written down, so that a run that was cut off measures the rest alone.

    Args:
        samples: what is measured on; their domains weigh alike.
    """

    def __init__(self, config: Config, inputs: Mapping[str, Path], out: Artifact, samples: list[Sample]) -> None:
        self._config, self._inputs, self._out, self._samples = config, inputs, out, samples
        self._memory = out.folder / "work/tried.json"
        self._known: dict[_Try, Reading] = cluster.on_main(self._remembered)
        self._kept: tuple[_Try, list[TensorReport]] | None = None  # what is on disk

    def alone(self, models: Sequence[Path]) -> list[float]:
        """Bits per byte, the mean over domains, of each of the models that are merged."""
        each: list[_Try] = [(tuple(float(n == at) for n in range(len(models))), alike(1)) for at in range(len(models))]
        for one, model in zip(each, models, strict=True):
            if one not in self._known:
                self._known[one] = self._read(model, model.parent.name)
                cluster.on_main(self._remember)
        return [self._bits(one) for one in each]

    def measure(self, weights: tuple[float, ...], scales: Scales) -> float:
        """Bits per byte, the mean over domains, of the merge with some weights and scales."""
        one: _Try = ((), scales) if scales == alike(0) else (weights, scales)
        if one not in self._known:
            if scales == alike(0):
                self._known[one] = self._read(self._inputs["pivot"], "pivot")
            else:
                self._try(one)
            cluster.on_main(self._remember)
        return self._bits(one)

    def lead(self, weights: tuple[float, ...], scales: Scales, others: Scales) -> tuple[float, float]:
        """How far the merge with some scales is below that with others, both measured; see `Reading.lead`."""
        first, second = self._known[weights, scales], self._known[weights, others]
        return cluster.on_main(lambda: first.lead(second))

    def keep(self, weights: tuple[float, ...], scales: Scales) -> list[TensorReport]:
        """Make the merge with some weights and scales the result; the report of its tensors."""
        one: _Try = (weights, scales)
        if self._kept is None or self._kept[0] != one:  # measured before a run was cut off, or beaten by another
            if self._kept is not None:
                cluster.on_main(partial(shutil.rmtree, self._folder(self._kept[0])))
            self._kept = (one, _merged(self._config, self._inputs, *one, self._folder(one)))

        def place() -> None:
            self._folder(one).rename(self._out.folder / "model")
            shutil.rmtree(self._out.folder / "tries")

        cluster.on_main(place)
        return self._kept[1]

    def _try(self, one: _Try) -> None:
        reports = _merged(self._config, self._inputs, *one, self._folder(one))
        self._known[one] = self._read(self._folder(one), _short(one))
        beaten: _Try | None = one
        if self._kept is None or self._bits(one) < self._bits(self._kept[0]):
            beaten, self._kept = self._kept and self._kept[0], (one, reports)
        if beaten is not None:
            cluster.on_main(partial(shutil.rmtree, self._folder(beaten)))

    def _read(self, folder: Path, name: str) -> Reading:
        model = made_of(self._config.pivot, folder, name)
        return read(model, folder, self._samples, self._config.release.batch_tokens)

    def _bits(self, one: _Try) -> float:
        """The first rank's figure, so that all decide alike."""
        return cluster.on_main(self._known[one].mean)

    def _remembered(self) -> dict[_Try, Reading]:
        """What an earlier run wrote down; nothing where that cannot be read."""
        domains = tuple(sample.domain for sample in self._samples)
        try:
            sizes, held = json.loads(self._memory.read_text())
            found = {
                (tuple(weights), Scales(layers, outside)): Reading(domains, np.array(nats), np.array(sizes))
                for weights, layers, outside, nats in held
            }
        except (OSError, ValueError, TypeError):
            return {}
        alike_long = all(reading.nats.shape == reading.sizes.shape == (len(domains),) for reading in found.values())
        return found if alike_long else {}

    def _remember(self) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        sizes = next(iter(self._known.values())).sizes.tolist()
        told = [[w, s.layers, s.outside, reading.nats.tolist()] for (w, s), reading in self._known.items()]
        write_json(self._memory, [sizes, told])

    def _folder(self, one: _Try) -> Path:
        return self._out.folder / "tries" / _short(one)


def _why(refused: Refused) -> str:
    """Why scales were not taken."""
    known = math.isfinite(refused.noise)
    noise = f"{refused.noise:.4f} may be noise" if known else "all may be noise, with one sample in a domain"
    return f"{refused.scales} measures {refused.ahead:.4f} bits per byte better than 1, of which {noise}"


def scaled(whole: MergeRecipe, scales: Scales) -> MergeRecipe:
    """A recipe with so much of its update."""
    return whole if scales == alike(1) else replace(whole, lines=Lines(scales.layers, 0.0, scales.outside))


def _layered(config: Config, inputs: Mapping[str, Path]) -> bool:
    """Whether some of the tensors are in layers and some are not."""
    return len({job.layer is None for job in plan(recipe(config, inputs)).layout.jobs}) == 2


def _short(one: _Try) -> str:
    """What a try's folder is called."""
    weights, scales = one
    return "-".join([f"{scales.layers:g}", f"{scales.outside:g}", *([digest(weights)] if weights else [])])


def _base(config: Config, pivot: Path, target: Path, out: Artifact) -> Path:
    saved = out.folder / "work/base"
    saved.parent.mkdir(parents=True, exist_ok=True)
    found = base_for(config.pivot, pivot, target, saved)
    if found != pivot:
        tracking.say(
            "  the pivot's checkpoint has other tensors than its targets: it is merged as transformers writes it"
        )
    return found


def _give_template(config: Config, inputs: Mapping[str, Path], model: Path) -> None:
    """Write the template that chats were trained with, where the pivot's tokenizer has another or none."""
    template = hub.template_of(config.pivot)
    if template == "own" and chat.read(inputs["pivot"]) is not None or not Corpus(inputs["prepare"], "train").chats:
        return
    chat.write(model, PLAIN_TEMPLATE if template in ("own", "plain") else template)


def _settle_tokenizer(config: Config, model: Path) -> None:
    """Publish the tokenizer so that it is loaded as it was trained with."""
    if not hub.settle_tokenizer(config.pivot, model):
        tracking.say(
            "  transformers reads this tokenizer otherwise than its tokenizer.json says; load the fused model's with "
            "PreTrainedTokenizerFast.from_pretrained"
        )


def _clear(out: Artifact) -> None:
    """Take away what a run left that was cut off before its manifest, but for a merge that goes on."""
    for folder in (out.folder / "model", *(out.folder / "tries").glob("[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)


def _merged(
    config: Config, inputs: Mapping[str, Path], weights: tuple[float, ...], scales: Scales, folder: Path
) -> list[TensorReport]:
    whole = recipe(config, inputs)
    if weights:
        whole = replace(whole, parameters={**whole.parameters, "weights": list(weights)})
    planned = plan(scaled(whole, scales), threads=cluster.cores())
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
