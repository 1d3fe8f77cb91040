"""The single changes that the ladder's defaults were chosen by."""

from typing import Any

from ladder import BEST, DRAWN_BACK, MERGES, Rung, ours


def _best(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`OURS` where the best source alone teaches a sample, with some changes."""
    return ours(**{**changes, "distill": {**BEST, **changes.get("distill", {})}})


def _change(name: str, about: str, **changes: dict[str, Any]) -> Rung:
    """`joint` with some changes."""
    return Rung(name, about, "joint", ours(**changes), DRAWN_BACK)


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
        *(_change(name, about, capture=kept) for name, (about, kept) in CACHES.items()),
        *(
            _change(
                name,
                f"{measure} divergence, {CACHES['top-128'][0]}",
                capture=CACHES["top-128"][1],
                distill={"divergence": name.replace("-", "_")},
            )
            for name, measure in (("jsd", "Jensen-Shannon"), ("reverse-kl", "reverse Kullback-Leibler"))
        ),
        _change(
            "heard",
            "labels teach what the sources heard leave of the weights",
            distill={"label_schedule": "confidence"},
        ),
        _change("gate-cold", "gate temperature 0.1", distill={"gate_temperature": 0.1}),
        _change("joint-weight-0.1", "ours, joint, label weight 0.1", distill={"label_weight": 0.1}),
        _change("joint-weight-0.5", "ours, joint, label weight 0.5", distill={"label_weight": 0.5}),
        _change("joint-token", "ours, joint, gate by token", distill={"gate_level": "token"}),
        _change("joint-pivot-absent", "ours, joint, pivot not asked", distill={"pivot": "absent"}),
        _change("joint-pivot-gates", "ours, joint, no source where the pivot is best", distill={"pivot": "gate"}),
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
