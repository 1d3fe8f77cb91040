"""Where the quality ladder trains, merges and measures, each thing once."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import ladder
import ladder_corpus
import numpy as np
import yaml
from ladder import DEEPSPEED, DTYPE, MIXTURE, MIXTURE_BYTES, MIXTURE_RATE, ROOT, RUNGS, Regime, Rung, Zoo

from fusion import config_file, hub, pipeline, tracking
from fusion.artifact import Artifact, digest, read_manifest, write_json
from fusion.config import Config, Model
from fusion.corpus import Corpus
from fusion.measure import Reading, read
from fusion.merge.engine import merge, plan
from fusion.merge.recipe import MergeRecipe
from fusion.merge.scales import Scales, alike
from fusion.merge.stage import scaled
from fusion.records import Sample
from fusion.release import tasks

QUESTIONS = ROOT / "configs/tasks/gsm8k_shared.yaml"
PIECES = {"choose": 50, "report": 100}  # of each domain, from other held-out texts each


class Lab:
    """Trains, merges and measures, each thing once.

    Args:
        work: where everything is kept.
        zoo: the models, and the texts to fuse on and to measure on.
        quick: fewer held-out pieces.
        questions: of GSM8K that every model is asked.
    """

    def __init__(self, work: Path, zoo: Zoo, quick: bool, questions: int = 0):
        self.work, self.zoo, self.quick, self.questions = work, zoo, quick, questions
        self._fuse = ladder_corpus.read(zoo.folder / "fuse.jsonl")
        self._heldout = ladder_corpus.read(zoo.folder / "heldout.jsonl")
        self._halves = ladder_corpus.halved(self._heldout, tuple(PIECES))
        self._more: ladder_corpus.Rows | None = None
        self._pieces: dict[str, list[Sample]] = {}
        self._unmade: dict[Path, MergeRecipe] = {}

    def config(self, rung: Rung, regime: Regime, seed: int, rate: float) -> Config:
        """The config of a run, written down under `work`."""
        pivot = self.converged() if regime.converged else self.zoo.pivot
        return self._written(rung, regime, seed, rate, pivot, self._corpus(regime.share * rung.times))

    def written(self, rung: Rung, regime: Regime, seed: int, rate: float) -> Path:
        """Where the config of a run is written down."""
        return self.work / "configs" / f"{regime.name}-{rung.name}-{seed}-{rate:g}.yaml"

    def _written(self, rung: Rung, regime: Regime, seed: int, rate: float, pivot: Path, corpus: Path) -> Config:
        heldout, out = self.work / "heldout.jsonl", self.work / "runs"
        ladder_corpus.write(heldout, self._halves)
        zoo = replace(self.zoo, pivot=pivot)
        holds = ladder.tree(rung, regime, zoo, corpus, heldout, out, seed, rate, DEEPSPEED)
        path = self.written(rung, regime, seed, rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(holds, sort_keys=False))
        return config_file.load(path)

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
            self.work / "mixture.jsonl", ladder_corpus.part(self._others(), MIXTURE_BYTES, last=True)
        )
        config = self._written(RUNGS["labels"], MIXTURE, 0, MIXTURE_RATE, self.zoo.pivot, mixture)
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

    @contextmanager
    def merged(
        self, config: Config, targets: dict[str, Artifact], settings: Mapping[str, Any], scales: Scales
    ) -> Iterator[tuple[Path, str]]:
        """So much of what targets come to by a config's `merge` settings: a folder for it, and a key of its weights.

        Merged where a figure of it is asked for and not known yet; gone afterwards.
        """
        method, parameters = settings["method"], dict(settings.get("parameters", {}))
        models = tuple(str(target.folder / "model") for target in targets.values())
        recipe = MergeRecipe(method, config.pivot.model, models, parameters, "float32", seed=config.seed)
        told: list[Any] = [method, parameters, [t.key for t in targets.values()], config.seed]
        if scales != alike(1):
            told.append(scales.layers if scales == alike(scales.layers) else [scales.layers, scales.outside])
        key = digest(told)
        folder = self.work / "merged" / key
        self._unmade[folder] = scaled(recipe, scales)
        try:
            yield folder, key
        finally:
            del self._unmade[folder]
            shutil.rmtree(folder, ignore_errors=True)

    def _made(self, folder: Path) -> Path:
        """A model's folder, merged now where that was put off."""
        if folder in self._unmade and not folder.exists():
            merge(plan(self._unmade[folder]), folder)
        return folder

    def _tasks(self, config: Config) -> list[pipeline.Task]:
        return pipeline.plan(config, pipeline.find(config))

    def read_by(self, config: Config) -> int:
        """Bytes on disk of the caches that a config's targets learn from."""
        tasks = [t.out for t in self._tasks(config) if t.out.stage == "capture"]
        return sum(int(read_manifest(out.folder)["facts"]["bytes on disk"]) for out in tasks if out.done())

    def fingerprint(self, folder: Path) -> str:
        """What tells a model's files."""
        return digest(hub.fingerprint(folder, self.work / "fingerprints.json"))

    def feeds(self, rung: Rung, regime: Regime) -> bool:
        """Whether there is so much text; said once, before anything is trained."""
        try:
            self._corpus(regime.share * rung.times)
        except ValueError as error:
            tracking.say(f"{regime.name}: {rung.about} is left out: {error}")
            return False
        return True

    def reading(self, config: Config, name: str, folder: Path, key: str, half: str) -> Reading:
        """What a model makes of the samples of one half of the held-out texts; `key` tells its weights."""
        pieces = self._heldout_pieces(config)
        asked = {half: [sample.id for sample in those] for half, those in pieces.items()}
        path = self.work / "readings" / f"{digest([key, asked, *self._type()])}.json"
        found: dict[str, list[list[float]]] = json.loads(path.read_text()) if path.exists() else {}
        if half not in found:
            made = read(self._model(folder, name), self._made(folder), pieces[half], 8192)
            found[half] = [made.nats.tolist(), made.sizes.tolist()]
            write_json(path, found)
        nats, sizes = (np.array(numbers) for numbers in found[half])
        return Reading(tuple(sample.domain for sample in pieces[half]), nats, sizes)

    def _model(self, folder: Path, name: str) -> Model:
        return Model(str(folder), name, dtype=self.zoo.dtype)  # type: ignore[arg-type]

    def _type(self) -> list[str]:
        """What tells figures in another type than is usual from the others."""
        return [] if self.zoo.dtype == DTYPE else [self.zoo.dtype]

    def _solved(self, key: str) -> Path:
        how = [QUESTIONS.read_text(), QUESTIONS.with_suffix(".py").read_text()]
        return self.work / "solved" / f"{digest([key, self.questions, how, *self._type()])}.json"

    def solved(self, folder: Path, key: str) -> float:
        """The share of GSM8K's first test questions that a model answers with the right number."""
        path = self._solved(key)
        if not path.exists():
            model, task = self._model(folder, "model"), str(QUESTIONS)
            found = tasks.scores(
                tasks.manager([task]), [task], model, self._made(folder), limit=self.questions, batch_size=32
            )
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
                count = PIECES[half] // 4 if self.quick else PIECES[half]
                self._pieces.setdefault(half, []).extend(replace(s, domain=domain) for s in those[:count])
        return self._pieces
