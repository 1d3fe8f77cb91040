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


def ours(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
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
        Rung("joint-whole", "ours, joint, all of the update", "joint", ours()),
        Rung("joint", "ours, joint", "joint", ours(), DRAWN_BACK),
        Rung("pairwise", "ours, pairwise", "pairwise", ours(), MERGES),
        *(
            Rung(f"labels-{n}", f"label-only, {n} times the text", "control", {}, DRAWN_BACK, float(n), begin=5e-4)
            for n in (2, 4, 10)
        ),
        *(
            Rung(
                f"{WITHOUT}{left}", f"ours, joint, without {left}", "joint", ours(), DRAWN_BACK, sources=_without(left)
            )
            for left in DOMAINS
        ),
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
