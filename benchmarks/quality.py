"""The quality ladder: what fusion gains over its pivot, beside label-only training and both published recipes.

    python benchmarks/quality.py --quick                                 under 15 minutes on 2 cores
    python benchmarks/quality.py [--regimes small-12] [--rungs labels joint] [--seeds 3]

Every rung of a regime begins at the same pivot and sees the same samples for the same number of steps, each at the
learning rate that does best at the first seed on one half of the held-out pieces; what is reported is the other half.
All is kept under --work, so that a run that was cut off goes on and a rung that was added is the only one to be run.
Figures, with the config of each run, go to --json; the table's picture to --plot.
"""

import argparse
import json
import logging
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import ladder
import ladder_corpus
import ladder_show
import yaml
from ladder import QUICK, QUICK_RATE, RATES, REGIMES, RUNGS, TRIAL, TRIALS, Regime, Rung

from fusion import cluster, hub, pipeline, tracking
from fusion import config as configs
from fusion.artifact import Artifact, digest, read_manifest, write_json
from fusion.config import Config, Model
from fusion.corpus import Corpus
from fusion.measure import bits_per_byte
from fusion.merge.engine import merge, plan
from fusion.merge.recipe import MergeRecipe
from fusion.records import Sample
from fusion.release import tasks

ZOO = common.SHARED / "zoo"
PIVOT = ZOO / "pivot-llama"
DEEPSPEED = Path(__file__).parents[1] / "configs/deepspeed/zero0.json"
CONVERGED_BYTES = 2_500_000  # of each domain, that the converged pivot reads first
QUESTIONS = Path(__file__).parents[1] / "configs/tasks/gsm8k_shared.yaml"
PIECES = {"choose": 50, "report": 100}  # of each domain, from other held-out texts each


class Lab:
    """Trains, merges and measures, each thing once.

    Args:
        work: where everything is kept.
        quick: fewer held-out pieces.
        questions: of GSM8K that every model is asked.
    """

    def __init__(self, work: Path, quick: bool, questions: int = 0):
        self.work, self._quick, self.questions = work, quick, questions
        self._fuse = ladder_corpus.read(ZOO / "fuse.jsonl")
        self._heldout = ladder_corpus.read(ZOO / "heldout.jsonl")
        self._halves = ladder_corpus.halved(self._heldout, tuple(PIECES))
        self._more: ladder_corpus.Rows | None = None
        self._pieces: dict[str, list[Sample]] = {}

    def config(self, rung: Rung, regime: Regime, seed: int, rate: float) -> Config:
        """The config of a run, written down under `work`."""
        pivot = self.converged() if regime.converged else PIVOT
        return self._written(rung, regime, seed, rate, pivot, self._corpus(regime.share * rung.times))

    def _written(self, rung: Rung, regime: Regime, seed: int, rate: float, pivot: Path, corpus: Path) -> Config:
        heldout, out = self.work / "heldout.jsonl", self.work / "runs"
        ladder_corpus.write(heldout, self._halves)
        holds = ladder.tree(rung, regime, pivot, ZOO, corpus, heldout, out, seed, rate, DEEPSPEED)
        path = self.work / "configs" / f"{regime.name}-{rung.name}-{seed}-{rate:g}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(holds, sort_keys=False))
        return configs.load(path)

    def _corpus(self, share: float) -> Path:
        """So much of the corpus; beyond all of it, with more text of the same kinds."""
        size = share * min(ladder_corpus.bytes_of(self._fuse).values())
        rest = self._others() if share > 1 else []
        return ladder_corpus.write(self.work / f"corpus-{share:g}.jsonl", ladder_corpus.part(self._fuse, size, rest))

    def _others(self) -> ladder_corpus.Rows:
        if self._more is None:
            self._more = ladder_corpus.more(common.SHARED / "text", [*self._fuse, *self._heldout])
        return self._more

    def converged(self) -> Path:
        """The pivot after a training on a general mixture of other text; made once."""
        mixture = ladder_corpus.write(
            self.work / "mixture.jsonl", ladder_corpus.part(self._others(), CONVERGED_BYTES, last=True)
        )
        once = Regime("mixture", "the converged pivot", 1.0, 1)
        config = self._written(RUNGS["labels"], once, 0, 1e-3, PIVOT, mixture)
        (target,) = self.targets(config, RUNGS["labels"]).values()
        return target.folder / "model"

    def targets(self, config: Config, rung: Rung) -> dict[str, Artifact]:
        """A rung's trained targets by name."""
        made = {t.out.subject: t.out for t in self._tasks(config) if t.out.stage == "distill"}
        wanted = {n: a for n, a in made.items() if (n == "control") == (rung.trains == "control")}
        if not all(a.done() for a in wanted.values()):
            if rung.trains == "control":
                pipeline.run(config, only=["prepare"])
            else:
                pipeline.run(config, only=["prepare", "capture", "align"])
            pipeline.run(config, only=["distill"], targets=sorted(wanted))
        return wanted

    def merged(self, config: Config, targets: dict[str, Artifact], settings: dict[str, Any]) -> tuple[Path, str]:
        """What targets come to by the settings of a config's `merge`: its folder, and a key of its weights."""
        asked = configs.Merge(**settings)
        recipe = MergeRecipe(
            asked.method,
            config.pivot.model,
            tuple(str(target.folder / "model") for target in targets.values()),
            asked.parameters,
            "float32",
            seed=config.seed,
        )
        key = digest([asked.method, asked.parameters, [t.key for t in targets.values()], config.seed])
        folder = self.work / "merged" / key
        if not folder.exists() and not self._known(config, key):
            merge(plan(recipe), folder)
        return folder, key

    def _tasks(self, config: Config) -> list[pipeline.Task]:
        return pipeline.plan(config, pipeline.find(config))

    def read_by(self, config: Config) -> int:
        """Bytes on disk of the caches that a config's targets learn from."""
        tasks = [t.out for t in self._tasks(config) if t.out.stage == "capture"]
        return sum(int(read_manifest(out.folder)["facts"]["bytes on disk"]) for out in tasks if out.done())

    def feeds(self, rung: Rung, regime: Regime) -> bool:
        """Whether there is so much text; said once, before anything is trained."""
        try:
            self._corpus(regime.share * rung.times)
        except ValueError as error:
            tracking.say(f"{regime.name}: {rung.about} is left out: {error}")
            return False
        return True

    def bits(self, config: Config, name: str, folder: Path, key: str) -> dict[str, dict[str, float]]:
        """A model's bits per byte, by half of the held-out texts and domain; `key` tells its weights."""
        path = self._bits(config, key)
        if not path.exists():
            model, pieces = Model(str(folder), _plain(name)), self._heldout_pieces(config)
            write_json(path, {half: bits_per_byte(model, folder, those, 8192) for half, those in pieces.items()})
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
        return found

    def _bits(self, config: Config, key: str) -> Path:
        asked = {half: [sample.id for sample in those] for half, those in self._heldout_pieces(config).items()}
        return self.work / "measured" / f"{digest([key, asked])}.json"

    def _known(self, config: Config, key: str) -> bool:
        return self._bits(config, key).exists() and (self._solved(key).exists() or not self.questions)

    def _solved(self, key: str) -> Path:
        return self.work / "solved" / f"{digest([key, self.questions])}.json"

    def solved(self, folder: Path, key: str) -> float:
        """The share of GSM8K's first test questions that a model answers with the right number."""
        path = self._solved(key)
        if not path.exists():
            model, task = Model(str(folder), "model"), str(QUESTIONS)
            found = tasks.scores(tasks.manager([task]), [task], model, folder, limit=self.questions, batch_size=32)
            write_json(path, {"strict": found["gsm8k_shared"]["exact_match,strict"][0]})
        return float(json.loads(path.read_text())["strict"])

    def _heldout_pieces(self, config: Config) -> dict[str, list[Sample]]:
        """The first held-out pieces by id of each half and domain."""
        if not self._pieces:
            prepared = next(t.out.folder for t in self._tasks(config) if t.out.stage == "prepare")
            by_domain: dict[str, list[Sample]] = {}
            for sample in sorted(Corpus(prepared, "heldout"), key=lambda s: s.id):
                by_domain.setdefault(sample.domain, []).append(sample)
            for label, those in by_domain.items():
                half, domain = label.split("-")
                count = PIECES[half] // 4 if self._quick else PIECES[half]
                self._pieces.setdefault(half, []).extend(replace(s, domain=domain) for s in those[:count])
        return self._pieces


def climb(lab: Lab, regime: Regime, rung: Rung, rates: Sequence[float], seeds: int) -> list[dict[str, Any]]:
    """All runs of a rung: its figures at each learning rate for the first seed, at the best one for the others."""
    tried = [_run(lab, regime, rung, rate, 0) for rate in rates]
    best = min(range(len(rates)), key=lambda n: tried[n]["choose"]["mean"])
    chosen = [tried[best], *(_run(lab, regime, rung, rates[best], seed) for seed in range(1, seeds))]
    for told in tried:
        told["chosen"] = told is tried[best]
    for told in chosen[1:]:
        told["chosen"] = True
    return [*tried, *chosen[1:]]


def _run(lab: Lab, regime: Regime, rung: Rung, rate: float, seed: int) -> dict[str, Any]:
    """One run: its targets, what they merge to, and their figures; those of the run are its best merge's."""
    config = lab.config(rung, regime, seed, rate)
    tracking.say(f"[bold]{regime.name} · {rung.about} · rate {rate:g} · seed {seed}[/bold]")
    targets = lab.targets(config, rung)
    manifests = {name: read_manifest(target.folder) for name, target in targets.items()}
    models = {name: _measured(lab, config, name, a.folder / "model", a.key) for name, a in targets.items()}
    for name, settings in rung.merges.items():
        folder, key = lab.merged(config, targets, dict(settings))
        models[name] = _measured(lab, config, name, folder, key)
        shutil.rmtree(folder, ignore_errors=True)  # its figures are kept
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
        "rate": rate,
        "seed": seed,
        **told,
        "models": models,
        "targets": list(targets),
        "steps": sum(int(f["steps"]) for f in facts),
        "positions": sum(int(f["positions"]) for f in facts),
        "seconds": sum(float(f["seconds"]) for f in facts),
        "cache_bytes": 0 if rung.trains == "control" else lab.read_by(config),
        "config": yaml.safe_load(
            (lab.work / "configs" / f"{regime.name}-{rung.name}-{seed}-{rate:g}.yaml").read_text()
        ),
    }


def _plain(name: str) -> str:
    """As a model may be named."""
    return re.sub(r"[^\w.-]+", "-", name)


def _measured(lab: Lab, config: Config, name: str, folder: Path, key: str) -> dict[str, Any]:
    found = lab.bits(config, name, folder, key)
    told: dict[str, Any] = {half: {**bits, "mean": sum(bits.values()) / len(bits)} for half, bits in found.items()}
    return told | ({"solved": lab.solved(folder, key)} if lab.questions else {})


def untrained(lab: Lab, regime: Regime) -> list[dict[str, Any]]:
    """The pivot and the sources as they are."""
    config = lab.config(RUNGS["labels"], regime, 0, RATES[0])
    pipeline.run(config, only=["prepare"])
    rows = []
    models = {"pivot": Path(config.pivot.model), **{n: ZOO / folder for n, folder in ladder.SOURCES.items()}}
    for name, folder in models.items():
        key = digest(hub.fingerprint(folder, lab.work / "fingerprints.json"))
        about = "the pivot" if name == "pivot" else f"source {name}"
        told = _measured(lab, config, name, folder, key)
        rows.append({"regime": regime.name, "rung": name, "about": about, "seed": 0, "chosen": True, **told})
    return rows


def main() -> None:
    """Climb."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny corpus, one rate, one seed: whether it works")
    parser.add_argument("--regimes", nargs="+", choices=[*REGIMES, TRIAL.name], default=list(REGIMES))
    parser.add_argument("--rungs", nargs="+", choices=[*RUNGS, *TRIALS], default=list(RUNGS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates to choose from")
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
    regimes = [QUICK] if given.quick else [{**REGIMES, TRIAL.name: TRIAL}[name] for name in given.regimes]
    rates, seeds = ([QUICK_RATE], 1) if given.quick else (given.rates, given.seeds)
    if given.quick:
        given.rungs = [name for name in given.rungs if RUNGS[name].times in (1, 10)]
    _climb_all(given, regimes, rates, seeds)


def _climb_all(given: argparse.Namespace, regimes: Sequence[Regime], rates: Sequence[float], seeds: int) -> None:
    _quieten()
    cluster.start()
    try:
        lab, rows, begun = (
            Lab(given.work.resolve(), given.quick, given.questions),
            list[dict[str, Any]](),
            time.monotonic(),
        )
        asked = [{**RUNGS, **TRIALS}[name] for name in given.rungs]
        rungs = {r.name: [rung for rung in asked if lab.feeds(rung, r)] for r in regimes}
        for regime in regimes:
            rows += untrained(lab, regime)
            for rung in rungs[regime.name]:
                rows += climb(lab, regime, rung, rates, seeds)
                common.write(given.json, rows)
            ladder_show.table(regime, rows)
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
