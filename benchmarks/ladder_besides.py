"""What a user of the quality ladder decides by: tables beside those of the regimes."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ladder import DOMAINS, WITHOUT, Regime
from ladder_show import Table, figure, summed
from ladder_trials import CACHES

from fusion.config import Capture

KEPT = f"{Capture().draws} draws"  # by default
_Lines = Mapping[str, dict[str, Any]]  # of a regime: label → line


def besides(regimes: Sequence[Regime], rows: Sequence[dict[str, Any]]) -> list[Table]:
    """What a user decides by: what each merge gives, how near the sources the target is in their own domains, which
    source helps where, what more text gives, what each byte of cache buys.
    """
    lines = {regime.name: {line["label"]: line for line in summed(regime, rows)} for regime in regimes}
    each = [made(regime, lines[regime.name]) for regime in regimes for made in (_helped, _stored)]
    found = [_merged(regimes, lines), _bounded(regimes, lines), *each, *_curves(regimes, lines)]
    return [table for table in found if table is not None]


def _merged(regimes: Sequence[Regime], lines: Mapping[str, _Lines]) -> Table | None:
    """What pairwise targets come to, each by itself and by every merge."""
    regimes = [regime for regime in regimes if "pairwise" in lines[regime.name]]
    labels = {label: line["about"] for regime in regimes for label, line in lines[regime.name].items()}
    mine = {label: about.split(" · ")[-1] for label, about in labels.items() if label.startswith("pairwise/")}
    if not mine:
        return None
    found = []
    for label, about in mine.items():
        told = [lines[regime.name].get(label) for regime in regimes]
        found.append([about, *(figure(line) if line else "" for line in told)])
    return Table("What targets of one source each come to", ["", *(regime.name for regime in regimes)], found)


def _bounded(regimes: Sequence[Regime], lines: Mapping[str, _Lines]) -> Table | None:
    """How near the joint target is to each source in the source's own domain."""
    found, pivots = list[list[str]](), set[bool]()
    for regime in regimes:
        own = lines[regime.name]
        if "joint" not in own or not set(DOMAINS) <= set(own):
            continue
        begun, reached = (
            [f"{own[label]['bits'][d][0]:.4f}" for d in (*DOMAINS, "mean")] for label in ("pivot", "joint")
        )
        if regime.converged not in pivots:
            pivots.add(regime.converged)
            found.append([own["pivot"]["about"] + (", converged" if regime.converged else ""), *begun])
        found.append([f"{own['joint']['about']}: {regime.about}", *reached])
        sources = [own[d]["bits"][d][0] for d in DOMAINS]
    if not found:
        return None
    found.append(["each source in its own domain", *(f"{bits:.4f}" for bits in (*sources, mean(sources)))])
    return Table("How near the sources, bits per byte", ["", *DOMAINS, "mean"], found)


def _helped(regime: Regime, lines: _Lines) -> Table | None:
    """Which source helped in which domain: what a joint target without it lacks of the gain."""
    lacking = {
        label.removeprefix(WITHOUT): line
        for label, line in lines.items()
        if label == line["rung"] and label.startswith(WITHOUT)
    }
    if not lacking or "joint" not in lines:
        return None
    found = [
        [source, *(f"{line['bits'][d][0] - lines['joint']['bits'][d][0]:+.4f}" for d in (*DOMAINS, "mean"))]
        for source, line in lacking.items()
    ]
    return Table(f"Bits per byte that are lost without a source: {regime.about}", ["source", *DOMAINS, "mean"], found)


def _stored(regime: Regime, lines: _Lines) -> Table | None:
    """What each byte of cache buys: the joint target's gain by what is kept of each source."""
    kept = [line for label, line in lines.items() if label in CACHES]
    if not kept or "joint" not in lines:
        return None
    found = []
    for line in sorted([lines["joint"], *kept], key=lambda line: float(line["cache_bytes"])):
        about = KEPT if line["label"] == "joint" else line["about"]
        found.append([about, f"{line['cache_bytes'] / 1e6:,.1f}", _gain(line)])
    columns = ["kept of each source", "MB of all sources and the pivot", "joint's gain"]
    return Table(f"What each byte of cache buys: {regime.about}", columns, found)


def _gain(line: dict[str, Any]) -> str:
    """With an asterisk where the rates on both sides were not tried."""
    return f"{line['gain']:+.4f}" + ("*" if line["climbed"] is False else "")


def _curves(regimes: Sequence[Regime], lines: Mapping[str, _Lines]) -> list[Table]:
    """What more text gives: the gains in regimes that differ in their text alone."""
    tables = []
    for passes in sorted({regime.passes for regime in regimes if not regime.converged}):
        alike = sorted((r for r in regimes if r.passes == passes and not r.converged), key=lambda r: r.share)
        alike = [regime for regime in alike if {"labels", "joint"} <= set(lines[regime.name])]
        if len(alike) < 2:
            continue
        found = []
        for regime in alike:
            labels, joint = (lines[regime.name][label] for label in ("labels", "joint"))
            back = lines[regime.name].get("labels-back")
            told = [_gain(line) if line else "–" for line in (labels, back, joint)]
            found.append([regime.about, f"{joint['positions']:,.0f}", *told])
        columns = ["text", "tokens read", "label-only's gain", "and drawn back", "joint's gain"]
        tables.append(Table("What more text gives", columns, found))
    return tables
