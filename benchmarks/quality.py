"""The quality ladder: what fusion gains over its pivot, beside label-only training and both published recipes.

    python benchmarks/quality.py --quick                                 under 15 minutes on 2 cores
    python benchmarks/quality.py [--regimes small-12] [--rungs labels joint] [--seeds 3]

Every rung of a regime begins at the same pivot and sees the same samples for the same number of steps, each at the
learning rate that does best at the first seed on one half of the held-out pieces; what is reported is the other half.
All is kept under --work, so that a run that was cut off goes on and a rung that was added is the only one to be run.
Figures, with the config of each run, go to --json; the table's picture to --plot.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import ladder
import ladder_show
import yaml
from ladder import LEAST, QUICK, QUICK_RATE, RATES, REGIMES, RUNGS, TRIAL, TRIALS, Regime, Rung
from ladder_lab import PIECES, QUESTIONS, ZOO, Lab

from fusion import cluster, hub, pipeline, tracking
from fusion.artifact import Artifact, digest, read_manifest
from fusion.config import Config
from fusion.merge.scales import Scales, alike, search
from fusion.release import tasks

ALL_REGIMES = {**REGIMES, TRIAL.name: TRIAL, LEAST.name: LEAST}
ALL_RUNGS = {**RUNGS, **TRIALS}


def climb(lab: Lab, regime: Regime, rung: Rung, rates: Sequence[float], seeds: int) -> list[dict[str, Any]]:
    """All runs of a rung: the first seed at learning rates up and down until none is better, the others at that one."""
    rates = sorted(rates)
    tried: dict[int, dict[str, Any]] = {}

    def bits(at: int) -> float:
        if at not in tried:
            tried[at] = _run(lab, regime, rung, rates[at], 0)
        return float(tried[at]["choose"]["mean"])

    best = min(range(len(rates)), key=lambda n: abs(math.log(rates[n] / rung.begin)))
    for step in (1, -1):
        while 0 <= best + step < len(rates) and bits(best + step) < bits(best):
            best += step
    bits(best)
    if len(rates) > 1 and best in (0, len(rates) - 1):
        tracking.say(f"{rung.about} does best at {rates[best]:g}, the last rate that may be tried: give more --rates")
    others = [_run(lab, regime, rung, rates[best], seed) for seed in range(1, seeds)]
    return [
        *({**told, "chosen": at == best} for at, told in sorted(tried.items())),
        *({**o, "chosen": True} for o in others),
    ]


def _run(lab: Lab, regime: Regime, rung: Rung, rate: float, seed: int) -> dict[str, Any]:
    """One run: its targets, what they merge to, and their figures; those of the run are its best merge's."""
    config = lab.config(rung, regime, seed, rate)
    tracking.say(f"[bold]{regime.name} · {rung.about} · rate {rate:g} · seed {seed}[/bold]")
    targets = lab.targets(config, rung)
    manifests = {name: read_manifest(target.folder) for name, target in targets.items()}
    models = {name: _measured(lab, config, name, a.folder / "model", a.key) for name, a in targets.items()}
    for name, settings in rung.merges.items():
        models[name] = _merged(lab, config, targets, settings)
    among = list(rung.merges) + (list(targets) if len(targets) == 1 else [])
    told = models[min(among, key=lambda name: models[name]["choose"]["mean"])]
    facts = [m["facts"] for m in manifests.values()]
    tracking.say(
        f"{regime.name} · {rung.name} · rate {rate:g} · seed {seed}: {told['report']['mean']:.4f} bits per byte"
    )
    return {
        "regime": regime.name,
        "rung": rung.name,
        "about": rung.about,
        "trains": rung.trains,
        "text": rung.times,
        "rate": rate,
        "seed": seed,
        **told,
        "models": models,
        "targets": list(targets),
        "steps": sum(int(f["steps"]) for f in facts),
        "positions": sum(int(f["positions"]) for f in facts),
        "seconds": sum(float(f["seconds"]) for f in facts),
        "cache_bytes": 0 if rung.trains == "control" else lab.read_by(config),
        "config": yaml.safe_load(lab.written(rung, regime, seed, rate).read_text()),
    }


def _merged(lab: Lab, config: Config, targets: dict[str, Artifact], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one merge, all of the update or as far as `merge.scale: auto` goes, by the half that chooses."""

    def measure(scales: Scales) -> float:
        if scales == alike(0):
            of_pivot = _of_folder(lab, config, "pivot", Path(config.pivot.model))
            return float(of_pivot["choose"]["mean"])
        with lab.merged(config, targets, settings, scales) as (folder, key):
            return fmean(lab.bits(config, "merged", folder, key, "choose").values())

    wanted = settings.get("scale", 1.0)
    scales = search(measure)[0] if wanted == "auto" else alike(wanted)
    with lab.merged(config, targets, settings, scales) as (folder, key):
        told = _measured(lab, config, "merged", folder, key)
    return {**told, "scale": [scales.layers, scales.outside]}


def _of_folder(lab: Lab, config: Config, name: str, folder: Path) -> dict[str, Any]:
    return _measured(lab, config, name, folder, digest(hub.fingerprint(folder, lab.work / "fingerprints.json")))


def _measured(lab: Lab, config: Config, name: str, folder: Path, key: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for half in PIECES:
        bits = lab.bits(config, name, folder, key, half)
        told[half] = {**bits, "mean": fmean(bits.values())}
    return told | ({"solved": lab.solved(folder, key)} if lab.questions else {})


def untrained(lab: Lab, regime: Regime) -> list[dict[str, Any]]:
    """The pivot and the sources as they are."""
    config = lab.config(RUNGS["labels"], regime, 0, RATES[0])
    pipeline.run(config, only=["prepare"])
    rows = []
    models = {"pivot": Path(config.pivot.model), **{n: ZOO / folder for n, folder in ladder.SOURCES.items()}}
    for name, folder in models.items():
        about = "the pivot" if name == "pivot" else f"source {name}"
        told = _of_folder(lab, config, name, folder)
        rows.append({"regime": regime.name, "rung": name, "about": about, "seed": 0, "chosen": True, **told})
    return rows


def main() -> None:
    """Climb."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny corpus, one rate, one seed: whether it works")
    parser.add_argument(
        "--regimes",
        nargs="+",
        metavar="REGIME",
        choices=list(ALL_REGIMES),
        default=list(REGIMES),
        help=f"of these; and {TRIAL.name}, where settings are tried, and {LEAST.name}, with less text still",
    )
    parser.add_argument(
        "--rungs",
        nargs="+",
        metavar="RUNG",
        choices=list(ALL_RUNGS),
        default=list(RUNGS),
        help=f"of these, and single changes to joint: {', '.join(TRIALS)}",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates it may take")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=0, help="of GSM8K that every model is asked")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="folder that keeps everything")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to a file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the ladder into a picture")
    given = common.parsed(parser)
    if not ZOO.is_dir():
        raise ValueError(f"{ZOO} is not there; the ladder needs the shared models and texts")
    if given.questions < 0:
        raise ValueError(f"--questions {given.questions}: must be at least 0")
    if given.questions:
        tasks.manager([str(QUESTIONS)])  # refused now, and not after hours, where lm-evaluation-harness is missing
    if given.seeds < 1:
        raise ValueError(f"--seeds {given.seeds}: must be at least 1")
    regimes = [QUICK] if given.quick else [ALL_REGIMES[name] for name in given.regimes]
    rates, seeds = ([QUICK_RATE], 1) if given.quick else (given.rates, given.seeds)
    if given.quick:
        given.rungs = [name for name in given.rungs if _quick(ALL_RUNGS[name])]
    _climb_all(given, regimes, rates, seeds)


def _quick(rung: Rung) -> bool:
    """Whether there is time for a rung in quick mode."""
    return rung.times in (1, 10) and len(rung.sources) == len(ladder.SOURCES)


def _climb_all(given: argparse.Namespace, regimes: Sequence[Regime], rates: Sequence[float], seeds: int) -> None:
    _quieten()
    cluster.start()
    try:
        lab = Lab(given.work.resolve(), given.quick, given.questions)
        rows, begun = list[dict[str, Any]](), time.monotonic()
        asked = [ALL_RUNGS[name] for name in given.rungs]
        rungs = {r.name: [rung for rung in asked if lab.feeds(rung, r)] for r in regimes}
        for regime in regimes:
            rows += untrained(lab, regime)
            for rung in rungs[regime.name]:
                rows += climb(lab, regime, rung, rates, seeds)
                common.write(given.json, rows)
            ladder_show.table(regime, rows)
            ladder_show.helped(regime, rows)
        ladder_show.curve(regimes, rows)
        if given.plot:
            ladder_show.picture(given.plot, regimes, rows)
        tracking.say(f"{time.monotonic() - begun:.0f} s in all")
    finally:
        cluster.stop()


def _quieten() -> None:
    """Leave the terminal to the ladder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    common.door(main)
