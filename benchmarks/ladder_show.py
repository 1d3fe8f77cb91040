"""The quality ladder as tables."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any, NamedTuple

import common
from ladder import DOMAINS, RUNGS, WITHOUT, Regime
from ladder_trials import CACHES, TRIALS

_UNTRIED = "* the next lower or higher learning rate was not tried"
LEAST_GAIN = 0.005  # of label-only training, in bits per byte; multiples of less say nothing


class Table(NamedTuple):
    """A table as it is printed, or written as Markdown."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Its title in bold, and its lines."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n" + table.replace("*", r"\*")


def summed(regime: Regime, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A regime's lines, in the order of its rungs: of a rung what does best on the half that chooses, at its best rate;
    and at that rate its single targets and merges.

    `bits`: domain, and `mean`, → (mean, spread) over `seeds`; `choose`: the mean on the other half; `gain`: over the
    pivot; `times`: the gain as a multiple of label-only training's, None where that gains next to nothing.
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
        line["times"] = line["gain"] / of_labels if of_labels > LEAST_GAIN else None
    return found


def in_short(regime: Regime, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a regime's lines the pivot, what each rung comes to, and the best target of those that train several.

    Not what `ladder_besides` tells against `joint`: fewer sources and other caches.
    """
    lines = [line for line in summed(regime, rows) if line["rung"] not in DOMAINS]
    if any(line["label"] == "joint" for line in lines):
        lines = [line for line in lines if line["rung"] not in CACHES and not line["rung"].startswith(WITHOUT)]
    found = []
    for line in lines:
        targets = [
            one for one in lines if one["label"].startswith(f"{line['label']}/") and " · target " in one["about"]
        ]
        if len(targets) > 1 and line["label"] == line["rung"]:
            best = min(targets, key=lambda one: float(one["choose"]))
            found.append({**best, "label": f"{line['label']}/target", "about": f"{line['about']} · best target"})
        if line["label"] == line["rung"]:
            found.append(line)
    return found


def names(columns: Sequence[Sequence[dict[str, Any]]]) -> dict[str, str]:
    """The labels of the lines of several regimes, and what they are about, in the order of the rungs."""
    order = ["pivot", *RUNGS, *TRIALS]
    about = {line["label"]: (order.index(line["rung"]), line["about"]) for lines in columns for line in lines}
    return {label: told for label, (_, told) in sorted(about.items(), key=lambda held: held[1][0])}


def overview(regimes: Sequence[Regime], rows: Sequence[dict[str, Any]], tables: Sequence[Table] = ()) -> str:
    """All regimes in one Markdown table, a line a rung: bits per byte, spread and number of seeds, gain over the pivot,
    and that as a multiple of label-only training's. The best of a regime, by the half that chooses, is in bold. Then
    what other tables there are.
    """
    columns = [in_short(regime, rows) for regime in regimes]
    about = names(columns)
    told = ["| | " + " | ".join(f"{regime.name}: {regime.about}" for regime in regimes) + " |"]
    told.append("|---" * (len(regimes) + 1) + "|")
    for label, name in about.items():
        cells = []
        for lines in columns:
            line = next((line for line in lines if line["label"] == label), None)
            cells.append(_cell(line, line is min(lines, key=lambda one: float(one["choose"]))) if line else "")
        told.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = {regime.name: _notes(regime, rows) for regime in regimes}
    if any(_UNTRIED in found for found in notes.values()):
        told += ["", f"\\{_UNTRIED}"]
    told += ["", *(f"- {name}: {note}" for name, found in notes.items() for note in found if note != _UNTRIED)]
    return "\n\n".join(["\n".join(told).rstrip(), *(table.markdown() for table in tables)]) + "\n"


def _notes(regime: Regime, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of a regime's figures has to know besides."""
    lines, told = summed(regime, rows), []
    if any(line["climbed"] is False for line in lines):
        told.append(_UNTRIED)
    begun = {row["begun_at"] for row in rows if row["regime"] == regime.name and "begun_at" in row}
    if len(begun) > 1:
        told.append(f"these began at {len(begun)} pivots, each trained in the same way")
    machines = {str(row["machine"]) for row in rows if row["regime"] == regime.name and "machine" in row}
    if len(machines) > 1:
        told.append(f"seconds were taken on {len(machines)} kinds of machines")
    ours = [line for line in lines if line["label"] in ("joint", "pairwise")]
    texts = {line["text"] for line in lines if line["trains"] == "control"}
    if ours and 1 in texts and len(texts) > 1:
        best = min(ours, key=lambda line: float(line["choose"]))
        times, found = texts_needed(lines, _bits(best))
        needs = f"{times:.1f} times the text" if found else f"more than {times:g} times the text"
        told.append(f"label-only training needs {needs} to reach {best['about']} ({_bits(best):.4f})")
    return told


def figure(line: dict[str, Any], untried: str = "*", best: bool = False) -> str:
    """Bits per byte; spread and number of seeds where there are several; marked where rates were not tried."""
    bits, spread = line["bits"]["mean"]
    told = f"**{bits:.4f}**" if best else f"{bits:.4f}"
    told += f" ± {spread:.4f} ({line['seeds']})" if line["seeds"] > 1 else ""
    return told + (untried if line["climbed"] is False else "")


def _cell(line: dict[str, Any], best: bool) -> str:
    told = figure(line, r"\*", best)
    if not line["rate"]:
        return told
    return told + f", {line['gain']:+.4f}" + (f", {line['times']:.2f}×" if line["times"] is not None else "")


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
    for note in _notes(regime, rows):
        print(note)


def _bits(line: dict[str, Any]) -> float:
    return float(line["bits"]["mean"][0])
