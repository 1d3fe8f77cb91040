"""The report's plots, each a figure of a summary."""

import io
from collections.abc import Callable
from typing import Any

from fusion.release.summary import Summary, by_kind, by_layer, change, curve, smooth, taught_by

# Okabe and Ito's colours, told apart with any colour vision; the fused model has one to itself
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#B8A800")
_FUSED, _PIVOT, _CONTROL = "#D55E00", "#a3abb5", "#6b7480"
_MARKERS = "o^sDvPX*"
THEMES = {
    "light": {"ink": "#1b1f24", "paper": "#ffffff", "line": "#d5dae0"},
    "dark": {"ink": "#e4e7eb", "paper": "#1a1e24", "line": "#3d444d"},
}


def png(draw: Callable[[Summary], Any], summary: Summary, ink: str, paper: str, line: str) -> bytes | None:
    """A figure in the colours of a theme; None where there is nothing to draw."""
    import warnings

    import matplotlib

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color", "lines.color")
    style: Any = dict.fromkeys(inked, ink) | dict.fromkeys(("axes.facecolor", "figure.facecolor"), paper)
    style |= {"axes.edgecolor": line, "grid.color": line, "axes.axisbelow": True, "legend.frameon": False}
    style |= {"font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"savefig.facecolor": paper, "hatch.linewidth": 0.6}
    style["text.parse_math"] = False  # names may have a $
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # a name in a script that the font lacks shows as boxes in the plot, and right in the tables
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw(summary)
        if figure is None:
            return None
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=140)
        return out.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and minds the display

    return Figure(figsize=(width, height), layout="constrained")


def _short(name: str, longest: int = 18) -> str:
    """The name, its middle left out where it is long: names of one family differ at their ends."""
    return name if len(name) <= longest else f"{name[: longest // 3]}…{name[1 + longest // 3 - longest :]}"


def _look(summary: Summary, name: str) -> dict[str, str]:
    """Colour and hatching of a source or target: a target has its source's."""
    names = list(dict.fromkeys(m.subject for m in summary.models if m.role in ("source", "target")))
    if name not in names:
        return {
            "color": {"pivot": _PIVOT, "control": _CONTROL, "fused": _FUSED}.get(name, _PIVOT),
            "hatch": "",
        }
    n = names.index(name)
    return {"color": _COLOURS[n % len(_COLOURS)], "hatch": ("", "//", "..", "xx")[n // len(_COLOURS) % 4]}


def _draw_bits(summary: Summary) -> Any:
    """Bars by domain and model, sources as marks; below, each bar's change against the pivot."""
    bars = [m for m in summary.ordered() if m.role != "source"]
    sources, columns = summary.having("source"), (*summary.domains, None)
    width = 0.84 / len(bars)
    figure = _figure(min(24, max(9, 0.26 * len(columns) * (len(bars) + 1))), 6.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for n, model in enumerate(bars):
        x = [c + (n - (len(bars) - 1) / 2) * width for c in range(len(columns))]
        look = _look(summary, model.subject if model.role == "target" else model.role)
        label = model.role if model.role != "target" else f"target {_short(model.subject)}"
        above.bar(x, [model.on(d) for d in columns], width * 0.92, label=label, **look)
        changes = [change(model.on(d), summary.pivot.on(d)) for d in columns]
        drawn = below.bar(x, changes, width * 0.92, **look)
        if model.role != "pivot":
            size = 8.5 if len(bars) < 8 else 7
            below.bar_label(
                drawn, [f"{c:+.1f}".replace("-", "−") for c in changes], padding=2, fontsize=size, rotation=90
            )
    places = {m.subject: n - (len(bars) - 1) / 2 for n, m in enumerate(bars) if m.role == "target"}
    for n, source in enumerate(sources):
        # on the bar of its own target, where each source has one
        offset = places.get(source.name, (n + 0.5 - len(sources) / 2) * len(bars) / len(sources)) * width
        x, y = [c + offset for c in range(len(columns))], [source.on(d) for d in columns]
        above.plot(
            x,
            y,
            _MARKERS[n % len(_MARKERS)],
            markersize=9,
            color="#ffffff",
            markeredgecolor="#000000",
            label=f"source {_short(source.name)}",
        )
    above.set_ylabel("bits per byte")
    below.set_ylabel("% against the pivot")
    below.axhline(0, color=_PIVOT, linewidth=1)
    below.margins(y=0.28)  # room for the labels
    below.set_xlim(-0.55, len(columns) - 0.45)
    below.set_xticks(range(len(columns)), [_short(d or "mean", 16) for d in columns])
    if len(columns) > 8:
        below.tick_params(axis="x", rotation=30)
    for axes in (above, below):
        axes.grid(axis="y")
    _legend(figure, above)
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """A legend above the panels, in as many columns as fit: a letter takes about 0.085 inches."""
    handles, labels = axes.get_legend_handles_labels()
    wide = 0.85 + 0.085 * max(map(len, labels))
    columns = max(1, int(figure.get_figwidth() / wide))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _on(colour: Any) -> str:
    """Black or white, whichever reads on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _draw_training(summary: Summary) -> Any:
    """Label loss and fusion loss of each target by step, smoothed, over the raw figures in faint."""
    curves = {name: curve(facts) for name, facts in summary.subjects("distill").items()}
    curves = {name: c for name, c in curves.items() if c[0]}
    if not curves:
        return None
    figure = _figure(10, 4.4)
    panels = figure.subplots(1, 2, sharex=True)
    for n, (name, (steps, *losses)) in enumerate(curves.items()):
        look = {"color": _look(summary, name)["color"], "linestyle": ("-", "--", "-.")[n % 3]}
        for axes, values in zip(panels, losses, strict=True):
            if all(v != v for v in values):
                continue
            label = _short(name) if axes is panels[0] else None
            marker = "o" if len(steps) < 3 else ""
            axes.plot(steps, values, color=look["color"], alpha=0.25, linewidth=1)
            axes.plot(steps, smooth(values), linewidth=2, marker=marker, label=label, **look)
    for axes, title in zip(panels, ("label loss", "fusion loss, where taught"), strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        axes.grid()
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    _legend(figure, panels[0])
    return figure


def _draw_teachers(summary: Summary) -> Any:
    """For each target, the share of its positions that each source taught."""
    shares = {name: taught_by(facts) for name, facts in summary.subjects("distill").items()}
    shares = {name: told for name, told in shares.items() if told}
    if not shares:
        return None
    rows, figure = list(shares), _figure(9, 1.5 + 0.5 * len(shares))
    axes, left = figure.subplots(), [0.0] * len(shares)
    teachers = dict.fromkeys(t for told in shares.values() for t in told)
    for teacher in [*sorted(teachers, key="pivot".__eq__), None]:
        if teacher is None:  # what nobody taught
            widths, look = (
                [max(0.0, 1 - x) for x in left],
                {"color": "none", "edgecolor": _PIVOT, "hatch": ".."},
            )
        else:
            widths, look = [shares[r].get(teacher, 0.0) for r in rows], _look(summary, teacher)
        drawn = axes.barh([_short(r) for r in rows], widths, left=left, height=0.66,
                          label=_short(teacher or "label alone"), **look)  # fmt: skip
        if teacher is not None:
            labels = [f"{w:.0%}" if w > 0.05 else "" for w in widths]
            axes.bar_label(drawn, labels, label_type="center", color=_on(look["color"]), fontsize=10)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("share of positions")
    axes.set_ylabel("target")
    axes.invert_yaxis()
    _legend(figure, axes)
    return figure


def _draw_merge(summary: Summary) -> Any:
    """Coefficients (left) and updates (right) of layers (above) and kinds of tensor (below) by target."""
    import numpy as np

    sides = [("coefficient", summary.merge.coefficients), ("root mean square update", summary.merge.updates)]
    sides = [(title, rows) for title, rows in sides if any(any(values) for _, values in rows)]
    grids = [[group(rows) for _, rows in sides] for group in (by_layer, by_kind)]
    grids = [pair for pair in grids if any(pair)]
    if not grids:
        return None
    keys = [list(dict.fromkeys(key for grid in pair for key in grid)) for pair in grids]
    names, heights = [_short(n, 14) for n in summary.merge.names], [len(k) for k in keys]
    size = (2.4 + len(sides) * max(2.8, 0.75 * len(names)), min(24, 2.2 + 0.3 * sum(heights)))
    figure = _figure(*size)
    shape: Any = {"squeeze": False, "sharex": True, "sharey": "row", "height_ratios": heights}
    panels = figure.subplots(len(grids), len(sides), **shape)
    for column, (title, _) in enumerate(sides):
        missing = [np.nan] * len(names)
        values = []
        for pair, found in zip(grids, keys, strict=True):
            values.append(np.array([pair[column].get(key, missing) for key in found]))
        _heat(figure, panels[:, column], values, title)
        panels[0, column].set_title(title, loc="left")
        slant = 0 if len(names) < 4 else 40
        panels[-1, column].set_xticks(range(len(names)), names, fontsize=9, rotation=slant)
    for axes, ks in zip(panels[:, 0], keys, strict=True):
        every = -(-len(ks) // 60)
        axes.set_yticks(range(0, len(ks), every), [_short(k, 27) for k in ks[::every]], fontsize=9)
    return figure


def _heat(figure: Any, column: Any, grids: list[Any], title: str) -> None:
    """Panels of one quantity on one scale; an update, a mean of squares, as its root, logarithmic."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    form = "{:.2f}"
    if title != "coefficient":
        grids, form = [np.sqrt(grid) for grid in grids], "{:.1e}"
    known = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    low, high = known.min(), known.max()
    norm = Normalize(low, high) if high - low > 1e-3 else Normalize(min(0, low), max(1, high))
    if title != "coefficient":
        low = known[known > 0].min()
        norm = LogNorm(low * 0.9, high * 1.1)
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad=_CONTROL)
    for axes, grid in zip(column, grids, strict=True):
        hidden = np.isnan(grid) | ((grid == 0) & (title != "coefficient"))
        image = axes.imshow(np.ma.array(grid, mask=hidden), aspect="auto", cmap=cmap, norm=norm)
        if grid.shape[0] > 60 or grid.shape[1] > 8:
            continue  # no room for numbers
        for (y, x), value in np.ndenumerate(grid):
            text = "" if np.isnan(value) else "none" if hidden[y, x] else form.format(value)
            tone = _on("#6b7480" if hidden[y, x] else cmap(norm(value))[:3])
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=tone)
    bar = figure.colorbar(image, ax=list(column), location="bottom", aspect=30, shrink=0.9, pad=0.02)
    if title != "coefficient":
        bar.set_ticks(np.geomspace(low, high, 3 if high > low else 1))
        bar.minorticks_off()
    bar.ax.xaxis.set_major_formatter(lambda x, _: form.format(x))
    bar.ax.tick_params(labelsize=9)


PLOTS: dict[str, tuple[Callable[[Summary], Any], str]] = {
    "bits": (_draw_bits, "Bits per byte by domain and model, and the change against the pivot"),
    "training": (_draw_training, "Label loss and fusion loss of each target by training step"),
    "teachers": (_draw_teachers, "Share of each target's positions that each source taught"),
    "merge": (
        _draw_merge,
        "Merge coefficients and update sizes by layer and kind of tensor, for each target",
    ),
}
