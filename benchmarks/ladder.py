"""What the quality ladder compares: regimes, rungs, and the config of each of their runs.

A regime says from which pivot, on how much text and for how many passes; a rung says how. All rungs of a regime see the
same samples for the same number of steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCES = {"math": "math-seedoss", "code": "code-neox", "prose": "prose-mistral"}
RATES = (3e-4, 1e-3, 2e-3)
BATCH = 16
PIECE = 900  # bytes of a sample at most


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
        Regime("small-12", "15 % of it, 12 passes", 0.15, 12),
        Regime("small-24", "15 % of it, 24 passes", 0.15, 24),
        Regime("converged", "15 % of it, 12 passes, from a pivot trained to convergence first", 0.15, 12, True),
    )
}
QUICK = Regime("quick", "3 % of the corpus, 3 passes", 0.03, 3)
QUICK_RATE = 3e-4


@dataclass(frozen=True)
class Rung:
    """One way to train.

    `settings`: what its config says beside what all say. `trains`: `control` for labels alone, `joint` for one target,
    `pairwise` for one a source. `merges`: name → the config's `merge`, for what is made of several targets. `times`:
    how much more text than the others', passed over so much less often.
    """

    name: str
    about: str
    trains: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    merges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    times: float = 1.0


def _as_published(procedure: str) -> dict[str, Any]:
    """Top 10 of a source renormalised; the best of all by its own tokens, the pivot among them; lambda 0.9."""
    return {
        "capture": {"sampler": "top_k", "k": 10},
        "align": {"procedure": procedure},
        "distill": {"gate": "min_ce", "gate_unit": "tokens", "pivot": "teach", "label_weight": 0.9},
    }


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
RUNGS = {
    r.name: r
    for r in (
        Rung("labels", "label-only training", "control"),
        Rung("fusellm", "FuseLLM as published", "joint", _as_published("fusellm")),
        Rung(
            "fusechat",
            "FuseChat as published",
            "pairwise",
            _as_published("fusechat"),
            {"SCE as published": {"method": "sce", "parameters": {"tau": 0.1, "definition": "fuseai"}}},
        ),
        Rung("joint", "ours, joint", "joint", {"distill": {"label_weight": 0.3}}),
        Rung("pairwise", "ours, pairwise", "pairwise", {"distill": {"label_weight": 0.3}}, MERGES),
        Rung("labels-2", "label-only, 2 times the text", "control", times=2.0),
        Rung("labels-4", "label-only, 4 times the text", "control", times=4.0),
        Rung("labels-10", "label-only, 10 times the text", "control", times=10.0),
    )
}


def tree(
    rung: Rung,
    regime: Regime,
    pivot: Path,
    zoo: Path,
    corpus: Path,
    heldout: Path,
    out: Path,
    seed: int,
    rate: float,
    deepspeed: Path,
) -> dict[str, Any]:
    """A run's config, as YAML holds it.

    Args:
        pivot: its folder.
        zoo: where the sources are.
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
        "evaluations": 0,
        "keep": "last",
        "too_long": "skip",
        "deepspeed": str(deepspeed),
    }
    common: dict[str, Any] = {
        "name": f"{regime.name}-{rung.name}",
        "out": str(out),
        "seed": seed,
        "pivot": {"model": str(pivot)},
        "sources": [{"name": name, "model": str(zoo / folder)} for name, folder in SOURCES.items()],
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
