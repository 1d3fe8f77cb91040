"""The quality ladder as a table and as a picture."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
from ladder import DOMAINS, Regime


def summed(regime: Regime, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A regime's lines, in the order of its rungs: of a rung what does best on the half that chooses, at its best rate;
    and at that rate its single targets and merges.

    `bits`: domain, and `mean`, → (mean, spread) over `seeds`; `choose`: the mean on the other half; `gain`: over the
    pivot; `times`: the gain as a multiple of label-only training's, None where that has none.
    """
    chosen = [row for row in rows if row["regime"] == regime.name and row["chosen"]]
    lines: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, str] = {}
    for row in chosen:
        models = row.get("models") or {}
        told = {f"{row['rung']}/{name}": (f" · {_kind(row, name)}", bits) for name, bits in models.items()}
        told = told if len(models) > 1 else {}
        told[row["rung"]] = ("", {})
        for label, (kind, bits) in told.items():
            about[label] = row["about"] + kind
            lines.setdefault(label, []).append({**row, **bits})
    found = []
    for label, runs in lines.items():
        bits = {d: _over([run["report"][d] for run in runs]) for d in (*DOMAINS, "mean")}
        cost = {name: mean([run.get(name, 0) for run in runs]) for name in ("positions", "seconds", "cache_bytes")}
        if "solved" in runs[0]:
            cost["solved"] = mean([run["solved"] for run in runs])
        same = {name: runs[0].get(name) for name in ("rung", "trains", "text", "rate", "climbed")}
        choose = mean([run["choose"]["mean"] for run in runs])
        found.append(
            {"label": label, "about": about[label], **same, "choose": choose, "bits": bits, "seeds": len(runs), **cost}
        )
    start = _bits(next(line for line in found if line["label"] == "pivot"))
    of_labels = next((start - _bits(line) for line in found if line["label"] == "labels"), 0.0)
    for line in found:
        line["gain"] = start - _bits(line)
        line["times"] = line["gain"] / of_labels if of_labels > 0 else None
    return found


def texts_needed(lines: Sequence[dict[str, Any]], bits: float) -> tuple[float, bool]:
    """How many times the text label-only training needs to come down to so many bits per byte, at the same steps.

    Read off a line through the best of its rungs at each multiple, over the logarithm of these.

    Returns:
        The multiple, and whether it is one: False where the most text is not enough, and it is that of the most.
    """
    best: dict[float, dict[str, Any]] = {}
    for line in lines:
        if line["trains"] == "control" and line["label"] == line["rung"]:
            text = float(line["text"])
            best[text] = min(best.get(text, line), line, key=lambda told: told["choose"])
    known = [(text, _bits(best[text])) for text in sorted(best)]
    if not known or bits >= known[0][1]:
        return 1.0, bool(known)
    for (before, high), (after, low) in pairwise(known):
        if low <= bits < high:
            return before * (after / before) ** ((high - bits) / (high - low)), True
    return known[-1][0], False


def _kind(row: dict[str, Any], name: str) -> str:
    return f"target {name}" if name in row.get("targets", ()) else name


def _over(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, that of one value 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def table(regime: Regime, rows: Sequence[dict[str, Any]]) -> None:
    """Print a regime's ladder."""
    columns = ["bits per byte, lower is better", *DOMAINS, "mean", "spread", "seeds", "gain", "times labels'", "rate"]
    columns += ["tokens", "s", "cache MB"]
    shown, lines = [], summed(regime, rows)
    asked = any("solved" in line for line in lines)
    columns += ["GSM8K"] if asked else []
    for line in lines:
        bits = [f"{line['bits'][d][0]:.4f}" for d in (*DOMAINS, "mean")]
        rate = f"{line['rate']:g}{'*' if line['climbed'] is False else ''}" if line["rate"] else "–"
        times = "–" if line["times"] is None else f"{line['times']:.2f}"
        cost = [f"{line['positions']:,.0f}", f"{line['seconds']:,.0f}", f"{line['cache_bytes'] / 1e6:,.1f}"]
        spread = f"{line['bits']['mean'][1]:.4f}" if line["seeds"] > 1 else "–"
        told = [spread, line["seeds"] if line["rate"] else "–", f"{line['gain']:+.4f}", times, rate]
        cost += [f"{line['solved']:.1%}"] if asked else []
        shown.append([line["about"], *bits, *told, *cost])
    common.show(f"{regime.name}: {regime.about}", columns, shown)
    if any(line["climbed"] is False for line in lines):
        print("* the next lower or higher learning rate was not tried")
    begun = {row["begun_at"] for row in rows if row["regime"] == regime.name and "begun_at" in row}
    if len(begun) > 1:
        print(f"these began at {len(begun)} pivots, each trained in the same way")
    ours = [line for line in lines if line["label"] in ("joint", "pairwise")]
    if ours and sum(line["trains"] == "control" for line in lines) > 1:
        best = min(ours, key=lambda line: line["choose"])
        times, found = texts_needed(lines, _bits(best))
        told = f"{times:.1f} times the text" if found else f"more than {times:g} times the text"
        print(f"label-only training needs {told} to reach {best['about']} ({_bits(best):.4f})")


def helped(regime: Regime, rows: Sequence[dict[str, Any]]) -> None:
    """Print which source helped in which domain: what a joint target without it lacks of the gain."""
    lines = {line["label"]: line for line in summed(regime, rows)}
    lacking = {
        label.removeprefix("joint-no-"): line
        for label, line in lines.items()
        if label == line["rung"] and label.startswith("joint-no-")
    }
    if not lacking or "joint" not in lines:
        return
    found = [
        [source, *(f"{line['bits'][d][0] - lines['joint']['bits'][d][0]:+.4f}" for d in (*DOMAINS, "mean"))]
        for source, line in lacking.items()
    ]
    common.show(f"{regime.name}: bits per byte that are lost without a source", ["source", *DOMAINS, "mean"], found)


def curve(regimes: Sequence[Regime], rows: Sequence[dict[str, Any]]) -> None:
    """Print what more text gives: the gains in regimes that differ in their text alone."""
    for passes in sorted({regime.passes for regime in regimes if not regime.converged}):
        alike = sorted((r for r in regimes if r.passes == passes and not r.converged), key=lambda r: r.share)
        lines = {regime.name: {line["label"]: line for line in summed(regime, rows)} for regime in alike}
        alike = [regime for regime in alike if {"labels", "joint"} <= set(lines[regime.name])]
        if len(alike) < 2:
            continue
        found = []
        for regime in alike:
            labels, joint = (lines[regime.name][label] for label in ("labels", "joint"))
            back = lines[regime.name].get("labels-back")
            told = [f"{line['gain']:+.4f}" if line else "–" for line in (labels, back, joint)]
            found.append([regime.about, f"{joint['positions']:,.0f}", *told])
        columns = ["text", "tokens read", "label-only's gain", "and drawn back", "joint's gain"]
        common.show("what more text gives", columns, found)


def _bits(line: dict[str, Any]) -> float:
    return float(line["bits"]["mean"][0])


def _colour(label: str) -> str:
    """Grey for what fuses nothing, orange for what was published, blue for ours."""
    if label.startswith(("pivot", "labels")):
        return "#7f7f7f"
    return "#d9822b" if label.startswith("fuse") else "#1f77b4"


def picture(path: Path, regimes: Sequence[Regime], rows: Sequence[dict[str, Any]]) -> None:
    """The mean over domains with its spread over seeds, a panel a regime; a line at the pivot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [summed(regime, rows) for regime in regimes]
    panels = [[line for line in lines if not line["about"].startswith("source ")] for lines in panels]
    tallest = max(len(lines) for lines in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7 * len(panels), 0.34 * tallest + 1.4), squeeze=False, layout="constrained"
    )
    for axis, regime, lines in zip(axes[0], regimes, panels, strict=True):
        values, spread = ([line["bits"]["mean"][n] for line in lines] for n in (0, 1))
        at = range(len(lines))
        for y, line in zip(at, lines, strict=True):  # points, and no bars: these would have to begin at 0
            axis.errorbar(values[y], y, xerr=spread[y], fmt="o", markersize=5, capsize=3, color=_colour(line["label"]))
            axis.annotate(
                f"{values[y]:.4f}",
                (values[y] + spread[y], y),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axis.axvline(values[0], color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_yticks(at, [line["about"] for line in lines], fontsize=8)
        axis.invert_yaxis()
        room = 0.15 * (max(values) - min(values)) or 0.01
        axis.set_xlim(min(values) - room, max(values) + 2 * room)
        axis.set_title(regime.about, fontsize=9)
        axis.set_xlabel("bits per byte, mean over domains")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture in {path}")
