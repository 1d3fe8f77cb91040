"""What the quality ladder compares: regimes, rungs, and the config of each of their runs.

A regime says from which pivot, on how much text and for how many passes; a rung says how. All rungs of a regime see the
same samples for the same number of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEEPSPEED = ROOT / "configs/deepspeed/zero0.json"
TEXTS = ("fuse.jsonl", "heldout.jsonl")  # of a zoo
DOMAINS = ("math", "code", "prose")  # a source each
WITHOUT = "joint-no-"  # and a source: the rung that goes without it
RATES = (7.8125e-6, 1.5625e-5, 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BATCH = 16
PIECE = 900  # bytes of a sample at most
DTYPE = "float32"  # of everything, so that figures of machines with and without bfloat16 stand in one table


@dataclass(frozen=True)
class Zoo:
    """The models of a ladder, and the type that all of them compute in.

    Attributes:
        folder: where they are, beside fuse.jsonl and heldout.jsonl.
        pivot: its folder.
        sources: domain → folder.
        dtype: as in a config.
    """

    folder: Path
    pivot: Path
    sources: Mapping[str, Path]
    dtype: str = DTYPE

    @classmethod
    def of(cls, folder: Path, dtype: str = DTYPE) -> "Zoo":
        """The folders in it that are called pivot-… and, by their domains, math-…, code-…, prose-….

        Raises:
            ValueError: one is missing, or there are two of a kind.
        """
        found = {
            name: sorted(path for path in folder.glob(f"{name}-*") if path.is_dir()) for name in ("pivot", *DOMAINS)
        }
        for name, paths in found.items():
            if len(paths) != 1:
                raise ValueError(f"{folder}: {len(paths)} folders are called {name}-…, and one is wanted")
        for name in TEXTS:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: there is no {name}")
        return cls(folder, found["pivot"][0], {name: found[name][0] for name in DOMAINS}, dtype)

    def named(self) -> "Zoo":
        """The same with names in place of one machine's paths."""
        folder = Path(self.folder.name)
        sources = {name: folder / path.name for name, path in self.sources.items()}
        return replace(self, folder=folder, pivot=folder / self.pivot.name, sources=sources)


@dataclass(frozen=True)
class Regime:
    """`share`: of the corpus; `passes` over it; `converged`: from the pivot that was trained on first."""

    name: str
    about: str
    share: float
    passes: float
    converged: bool = False


REGIMES = {
    r.name: r
    for r in (
        Regime("one-pass", "one pass over all of the corpus", 1.0, 1),
        Regime("small-12", "15 % of the corpus, 12 passes", 0.15, 12),
        Regime("small-24", "15 % of the corpus, 24 passes", 0.15, 24),
        Regime("converged", "15 % of the corpus, 12 passes, from a pivot trained to convergence first", 0.15, 12, True),
    )
}
TRIAL = Regime("trial", "5 % of the corpus, 12 passes", 0.05, 12)  # where settings are tried, at a third of the time
LEAST = Regime("least", "1.7 % of the corpus, 12 passes", 0.05 / 3, 12)  # with trial and small-12 a curve over tokens
MIXTURE = Regime("mixture", "the training of the converged pivot", 0, 1)  # on other text
MIXTURE_RATE = 1e-3
MIXTURE_BYTES = 2_500_000  # of each domain
QUICK = Regime("quick", "3 % of the corpus, 3 passes", 0.03, 3)
QUICK_RATE = 3e-4


@dataclass(frozen=True)
class Rung:
    """One way to train.

    `settings`: what its config says beside what all say. `trains`: `control` for labels alone, `joint` for one target,
    `pairwise` for one a source. `merges`: name → the config's `merge`, for what is made of several targets. `times`:
    how much more text than the others', passed over so much less often. `sources`: who teaches. `begin`: the learning
    rate that is tried first.
    """

    name: str
    about: str
    trains: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    merges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    times: float = 1.0
    sources: tuple[str, ...] = DOMAINS
    begin: float = 1e-3


BEST: dict[str, Any] = {"gate": "min_ce", "gate_temperature": 1.0, "k": 64}  # the best of all teaches a sample


def _as_published(procedure: str) -> dict[str, Any]:
    """Top 10 of a source renormalised; the best of all by its own tokens, the pivot among them; lambda 0.9."""
    return {
        "capture": {"sampler": "top_k", "k": 10},
        "align": {"procedure": procedure},
        "distill": {**BEST, "gate_unit": "tokens", "pivot": "teach", "label_weight": 0.9},
    }


def _without(left: str) -> tuple[str, ...]:
    return tuple(name for name in DOMAINS if name != left)


OURS: dict[str, dict[str, Any]] = {"distill": {"label_weight": 0.3, "pivot": "teach"}}  # beside what are defaults


def _ours(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`OURS` with some changes."""
    return {section: {**OURS.get(section, {}), **changes.get(section, {})} for section in {**OURS, **changes}}


MERGES: dict[str, dict[str, Any]] = {
    "average": {"method": "linear"},
    "SCE, all elements": {"method": "sce", "parameters": {"tau": 1.0}},
    "SCE, a tenth": {"method": "sce", "parameters": {"tau": 0.1}},
    "VaRM": {"method": "varm"},
    "TIES": {"method": "ties"},
    "DARE-TIES": {"method": "dare_ties", "parameters": {"normalize": True}},
    "Model Stock": {"method": "model_stock"},
    "sum of updates": {"method": "task_arithmetic"},
}
AS_FAR = "as far as chosen"  # as `merge.scale: auto` goes along the update, by the half that chooses
DRAWN_BACK = {AS_FAR: {"method": "linear", "scale": "auto"}}
MERGES |= {f"{name}, {AS_FAR}": {**MERGES[name], "scale": "auto"} for name in ("average", "SCE, all elements", "TIES")}
MERGES[f"average by contribution, {AS_FAR}"] = {"method": "linear", "weights": "auto", "scale": "auto"}
RUNGS = {
    r.name: r
    for r in (
        Rung("labels", "label-only training", "control", begin=2.5e-4),
        Rung("labels-back", "label-only training, drawn back", "control", merges=DRAWN_BACK, begin=2.5e-4),
        Rung("fusellm", "FuseLLM as published", "joint", _as_published("fusellm")),
        Rung(
            "fusechat",
            "FuseChat as published",
            "pairwise",
            _as_published("fusechat"),
            {"SCE as published": {"method": "sce", "parameters": {"tau": 0.1, "definition": "fuseai"}}},
        ),
        Rung("joint-whole", "ours, joint, all of the update", "joint", _ours()),
        Rung("joint", "ours, joint", "joint", _ours(), DRAWN_BACK),
        Rung("pairwise", "ours, pairwise", "pairwise", _ours(), MERGES),
        *(
            Rung(f"labels-{n}", f"label-only, {n} times the text", "control", {}, DRAWN_BACK, float(n), begin=5e-4)
            for n in (2, 4, 10)
        ),
        *(
            Rung(
                f"{WITHOUT}{left}", f"ours, joint, without {left}", "joint", _ours(), DRAWN_BACK, sources=_without(left)
            )
            for left in DOMAINS
        ),
    )
}


def _best(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`OURS` where the best source alone teaches a sample, with some changes."""
    return _ours(**{**changes, "distill": {**BEST, **changes.get("distill", {})}})


def _trial(name: str, about: str, **changes: dict[str, Any]) -> Rung:
    """`joint` where the best source alone teaches a sample, with some changes."""
    return Rung(name, about, "joint", _best(**changes), DRAWN_BACK)


CACHES: dict[str, tuple[str, dict[str, Any]]] = {  # what else may be kept of each source
    "draws-12": ("12 draws", {"draws": 12}),
    "draws-200": ("200 draws", {"draws": 200}),
    "top-32": ("the 32 most probable entries", {"sampler": "top_k", "k": 32}),
    "top-128": ("the 128 most probable entries", {"sampler": "top_k", "k": 128}),
}
# one change at a time to `gate-best`, or to `joint`, to choose the defaults by; docs/log.md tells of each
TRIALS = {
    r.name: r
    for r in (
        Rung(
            "labels-frozen",
            "label-only, embeddings frozen",
            "control",
            {"distill": {"freeze_embeddings": True}},
            DRAWN_BACK,
        ),
        Rung("pairwise-gate", "ours, pairwise, pivot gates", "pairwise", _best(distill={"pivot": "gate"}), MERGES),
        Rung("pairwise-best", "ours, pairwise, gate: the best of each sample", "pairwise", _best(), MERGES),
        _trial("gate-best", "ours, joint, gate: the best of each sample"),
        _trial("frozen", "embeddings frozen", distill={"freeze_embeddings": True}),
        _trial("weight-0", "label weight 0", distill={"label_weight": 0.0}),
        _trial("weight-0.1", "label weight 0.1", distill={"label_weight": 0.1}),
        _trial("weight-0.5", "label weight 0.5", distill={"label_weight": 0.5}),
        _trial(
            "weight-falls",
            "label weight 0.7 to 0",
            distill={"label_weight": 0.7, "label_schedule": "linear", "label_weight_end": 0.0},
        ),
        _trial(
            "weight-rises",
            "label weight 0 to 0.7",
            distill={"label_weight": 0.0, "label_schedule": "linear", "label_weight_end": 0.7},
        ),
        _trial("confidence", "label weight by the gate's confidence", distill={"label_schedule": "confidence"}),
        _trial("gate-average", "gate: all by their bits", distill={"gate": "avg_ce"}),
        *(
            _trial(
                f"gate-{name}",
                f"gate: all by their bits, temperature {degree:g}",
                distill={"gate": "avg_ce", "gate_temperature": degree},
            )
            for name, degree in (("cool", 0.25), ("mild", 0.5), ("warm", 2.0))
        ),
        _trial(
            "gate-average-0",
            "gate: all by their bits, label weight 0",
            distill={"gate": "avg_ce", "label_weight": 0.0},
        ),
        _trial(
            "gate-average-256",
            "gate: all by their bits, 256 entries of the mean",
            distill={"gate": "avg_ce", "k": 256},
        ),
        _trial("entries-256", "256 entries of a projected distribution", distill={"k": 256}),
        _trial("gate-segment", "gate: the best of each segment", distill={"gate_level": "segment"}),
        _trial("gate-token", "gate: the best of each token", distill={"gate_level": "token"}),
        _trial("pivot-absent", "pivot not asked", distill={"pivot": "absent"}),
        _trial("pivot-gates", "where the pivot is best labels alone teach", distill={"pivot": "gate"}),
        _trial("drop", "missing mass dropped", distill={"missing_mass": "drop"}),
        _trial("renormalise", "missing mass renormalised", distill={"missing_mass": "renormalise"}),
        _trial("teacher-0.8", "teacher's temperature 0.8", distill={"teacher_temperature": 0.8}),
        _trial("teacher-1.25", "teacher's temperature 1.25", distill={"teacher_temperature": 1.25}),
        *(Rung(name, about, "joint", _ours(capture=kept), DRAWN_BACK) for name, (about, kept) in CACHES.items()),
        Rung(
            "heard",
            "labels teach what the sources heard leave of the weights",
            "joint",
            _ours(distill={"label_schedule": "confidence"}),
            DRAWN_BACK,
        ),
        Rung("gate-cold", "gate temperature 0.1", "joint", _ours(distill={"gate_temperature": 0.1}), DRAWN_BACK),
        _trial("smoothing", "label smoothing 0.1", distill={"label_smoothing": 0.1}),
        _trial("gate-alike", "gate: all alike", distill={"gate": "all"}),
        _trial("map-hard", "map: a source token's likeliest target token", align={"maps": ["hard", "prefix"]}),
        _trial("map-prefix", "map: the target token that a source token begins with", align={"maps": ["prefix"]}),
        _trial("not-inside", "no teaching inside of a source's tokens", align={"inside": False}),
        _trial("not-followed", "map alone, not followed", align={"follow": False, "inside": False}),
        _trial("decay-0.1", "weight decay 0.1", distill={"weight_decay": 0.1}),
        _trial("decay-1", "weight decay 1", distill={"weight_decay": 1.0}),
    )
}


def tree(
    rung: Rung,
    regime: Regime,
    zoo: Zoo,
    corpus: Path,
    heldout: Path,
    out: Path,
    seed: int,
    rate: float,
    deepspeed: Path,
) -> dict[str, Any]:
    """A run's config, as YAML holds it.

    Args:
        corpus: JSON lines to train on.
        heldout: JSON lines to measure on.
        out: where all runs write; what they share is made once.
        deepspeed: the DeepSpeed file.
    """
    distill = {
        "topology": "pairwise" if rung.trains == "pairwise" else "joint",
        "epochs": regime.passes / rung.times,
        "learning_rate": rate,
        "batch_size": BATCH,
        "per_rank": BATCH,
        "workers": 0,
        "evaluations": 0,
        "keep": "last",
        "too_long": "skip",
        "deepspeed": str(deepspeed),
        "dtype": zoo.dtype,
    }
    common: dict[str, Any] = {
        "name": f"{regime.name}-{rung.name}",
        "out": str(out),
        "seed": seed,
        "pivot": {"model": str(zoo.pivot), "dtype": zoo.dtype},
        "sources": [{"name": name, "model": str(zoo.sources[name]), "dtype": zoo.dtype} for name in rung.sources],
        "prepare": {
            "data": [{"data": str(corpus)}, {"data": str(heldout), "heldout": True}],
            "max_bytes": PIECE,
            "validation_share": 0.0,
        },
        "capture": {"too_long": "skip"},
        "distill": distill,
        "tracking": {"wandb": "disabled", "every": 50},
    }
    for section, settings in rung.settings.items():
        common[section] = {**common.get(section, {}), **settings}
    return common
