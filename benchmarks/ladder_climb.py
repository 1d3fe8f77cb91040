"""Climbs the quality ladder: runs a rung at learning rates up and down, and at several seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import ladder_record
from ladder import DOMAINS, DRAWN_BACK, RATES, RUNGS, Regime, Rung, Zoo
from ladder_lab import PIECES, Lab
from ladder_record import Record, Row

from fusion import pipeline, tracking
from fusion.artifact import Artifact, read_manifest
from fusion.config import Config
from fusion.measure import Reading
from fusion.merge.contribution import choose
from fusion.merge.scales import Scales, alike


@dataclass(frozen=True)
class Climber:
    """Runs rungs, each run once.

    Attributes:
        zoo: the models.
        record: what is known.
        lab: where the rest is trained; None trains nothing, and what is not recorded is left out.
    """

    zoo: Zoo
    record: Record
    lab: Lab | None

    def climb(self, regime: Regime, rung: Rung, rates: Sequence[float], seeds: int) -> list[Row]:
        """All runs of a rung: the first seed at rates up and down until none is better, the others at that one.

        `chosen`: whether a run is at the best rate. `climbed`: whether the rates on both sides of it were tried.
        """
        rates = sorted(rates)
        tried: dict[int, Row | None] = {}

        def bits(at: int) -> float:
            if at not in tried:
                tried[at] = self.run(regime, rung, rates[at], 0)
            told = tried[at]
            return math.inf if told is None else float(told["choose"]["mean"])

        best = min(range(len(rates)), key=lambda n: abs(math.log(rates[n] / rung.begin)))
        if self.lab is None:
            best = min(range(len(rates)), key=bits)
        for step in (1, -1):
            while 0 <= best + step < len(rates) and bits(best + step) < bits(best):
                best += step
        bits(best)
        climbed = 0 < best < len(rates) - 1 and all(tried.get(n) for n in (best - 1, best + 1))
        if self.lab and len(rates) > 1 and best in (0, len(rates) - 1):
            last = f"{rates[best]:g}, the last rate that may be tried"
            tracking.say(f"{rung.about} does best at {last}: give more --rates")
        others = [self.run(regime, rung, rates[best], seed) for seed in range(1, seeds)]
        runs = [(row, at == best) for at, row in sorted(tried.items())] + [(row, True) for row in others]
        return [{**row, "chosen": is_best, "climbed": climbed} for row, is_best in runs if row is not None]

    def run(self, regime: Regime, rung: Rung, rate: float, seed: int) -> Row | None:
        """One run; None where it is not recorded and nothing may be trained."""
        key = self.record.of_run(rung, regime, seed, rate)
        row = self.record.get(key)
        if row is None or self._lacks(row, rung):
            if self.lab is None:
                return None
            made = _run(self.lab, regime, rung, rate, seed, row or {})
            config = ladder_record.config(self.zoo, rung, regime, seed, rate)
            row = self.record.add(key, {**made, "config": ladder_record.told(config)})
        return _seen(regime, rung, row)

    def _lacks(self, row: Row, rung: Rung) -> bool:
        """Whether a training is known, and not all of what a rung asks of it."""
        models = row["models"]
        merges = all(models.get(name, {}).get("merge") == how for name, how in rung.merges.items())
        asked = self.lab.questions if self.lab else 0
        return not merges or (asked > 0 and any(told.get("questions") != asked for told in models.values()))

    def untrained(self, regime: Regime) -> list[Row]:
        """The pivot and the sources as they are."""
        rows = []
        for name in ("pivot", *DOMAINS):
            key = self.record.of_model(regime, name)
            row = self.record.get(key)
            asked = self.lab.questions if self.lab else 0
            if self.lab is not None and (row is None or (asked and row.get("questions") != asked)):
                row = self.record.add(key, _untrained(self.lab, regime, name))
            if row is not None:
                rows.append({**row, "regime": regime.name, "chosen": True})
        return rows


def _run(lab: Lab, regime: Regime, rung: Rung, rate: float, seed: int, known: Row) -> Row:
    """One training: its targets, what they merge to, and their figures.

    Whatever trained is drawn back too, but in quick mode, and what was merged of a training that is known is merged
    again, so that all figures of a line of the record are of the same weights.
    """
    config = lab.config(rung, regime, seed, rate)
    tracking.say(f"[bold]{regime.name} · {rung.about} · rate {rate:g} · seed {seed}[/bold]")
    targets = lab.targets(config, rung)
    manifests = {name: read_manifest(target.folder) for name, target in targets.items()}
    models = {name: _measured(lab, config, name, a.folder / "model", a.key) for name, a in targets.items()}
    merges = {name: told["merge"] for name, told in known.get("models", {}).items() if "merge" in told}
    back = DRAWN_BACK if len(targets) == 1 and not lab.quick else {}
    for name, settings in {**merges, **back, **rung.merges}.items():
        models[name] = _merged(lab, config, targets, settings)
    facts = [m["facts"] for m in manifests.values()]
    best = min(models.values(), key=lambda told: told["choose"]["mean"])
    tracking.say(f"{regime.name} · {rung.name} · {rate:g} · seed {seed}: {best['report']['mean']:.4f} bits per byte")
    return {
        "models": models,
        "targets": list(targets),
        "rate": rate,
        "seed": seed,
        "steps": sum(int(f["steps"]) for f in facts),
        "positions": sum(int(f["positions"]) for f in facts),
        "seconds": sum(float(f["seconds"]) for f in facts),
        "cache_bytes": 0 if rung.trains == "control" else lab.read_by(config),
        "machine": common.machine(),
        "begun_at": lab.fingerprint(Path(config.pivot.model)),
    }


def _seen(regime: Regime, rung: Rung, row: Row) -> Row:
    """A training as a rung looks at it: with its merges, and the figures of the best of them."""
    among = list(rung.merges) + (row["targets"] if len(row["targets"]) == 1 else [])
    models = {name: row["models"][name] for name in [*row["targets"], *rung.merges]}
    told = models[min(among, key=lambda name: models[name]["choose"]["mean"])]
    what = {"regime": regime.name, "rung": rung.name, "about": rung.about, "trains": rung.trains, "text": rung.times}
    return {**row, **told, **what, "models": models}


def _merged(lab: Lab, config: Config, targets: dict[str, Artifact], settings: Mapping[str, Any]) -> Row:
    """The figures of one merge; what `merge.scale: auto` and `merge.weights: auto` choose, the choosing half does."""

    def reading(weights: tuple[float, ...], scales: Scales) -> Reading:
        if scales == alike(0):
            folder = Path(config.pivot.model)
            return lab.reading(config, "pivot", folder, lab.fingerprint(folder), "choose")
        with lab.merged(config, targets, _weighed(settings, weights), scales) as (folder, key):
            return lab.reading(config, "merged", folder, key, "choose")

    def lead(weights: tuple[float, ...], scales: Scales, others: Scales) -> tuple[float, float]:
        return reading(weights, scales).lead(reading(weights, others))

    wanted, alone = settings.get("scale", 1.0), list[float]()
    if settings.get("weights") == "auto":
        alone = [lab.reading(config, n, a.folder / "model", a.key, "choose").mean() for n, a in targets.items()]
    far = None if wanted == "auto" else alike(wanted)
    weights, scales, _, _ = choose(lambda weights, scales: reading(weights, scales).mean(), alone, far, lead)
    with lab.merged(config, targets, _weighed(settings, weights), scales) as (folder, key):
        told = _measured(lab, config, "merged", folder, key)
    found = {"weights": list(weights)} if weights else {}
    return {**told, "merge": dict(settings), "scale": [scales.layers, scales.outside], **found}


def _weighed(settings: Mapping[str, Any], weights: tuple[float, ...]) -> dict[str, Any]:
    """A config's `merge` with weights, where there are any, as a parameter."""
    return {
        **settings,
        "parameters": {**settings.get("parameters", {}), **({"weights": list(weights)} if weights else {})},
    }


def _of_folder(lab: Lab, config: Config, name: str, folder: Path) -> Row:
    return _measured(lab, config, name, folder, lab.fingerprint(folder))


def _measured(lab: Lab, config: Config, name: str, folder: Path, key: str) -> Row:
    told: Row = {}
    for half in PIECES:
        found = lab.reading(config, name, folder, key, half)
        told[half] = {**found.bits(), "mean": found.mean()}
    return told | ({"solved": lab.solved(folder, key), "questions": lab.questions} if lab.questions else {})


def _untrained(lab: Lab, regime: Regime, name: str) -> Row:
    config = lab.config(RUNGS["labels"], regime, 0, RATES[0])
    pipeline.run(config, only=["prepare"])
    folder = Path(config.pivot.model) if name == "pivot" else lab.zoo.sources[name]
    about = "the pivot" if name == "pivot" else f"source {name}"
    told = _of_folder(lab, config, name, folder)
    begun = {"begun_at": lab.fingerprint(folder)} if name == "pivot" else {}
    return {"rung": name, "about": about, "seed": 0, **told, **begun}
