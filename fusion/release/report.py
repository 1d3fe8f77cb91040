"""A summary as a table in the terminal, a page with plots that needs nothing else, and JSON."""

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fusion.release.summary import (
    Scored,
    Summary,
    by_kind,
    by_layer,
    change,
    curve,
    smooth,
    taught_by,
    verdict,
)

__all__ = ["console_table", "verdict", "write_report"]

# Okabe and Ito's colours, told apart with any colour vision; the fused model has one to itself
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#B8A800")
_FUSED, _PIVOT, _CONTROL = "#D55E00", "#a3abb5", "#6b7480"
_MARKERS = "o^sDvPX*"
_THEMES = {
    "light": {"ink": "#1b1f24", "paper": "#ffffff", "line": "#d5dae0"},
    "dark": {"ink": "#e4e7eb", "paper": "#1a1e24", "line": "#3d444d"},
}


def console_table(summary: Summary) -> Table:
    """Bits per byte by model; the best of the target's architecture in bold, the fused model's row marked."""
    title = Text(f"{summary.name}: held-out bits per byte (lower is better)")
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("role")
    for head in (*summary.domains, "mean", "vs pivot"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    models, columns = summary.ordered(), (*summary.domains, None)
    for model, after in zip(models, [*models[1:], None], strict=True):
        styles = ["bold" if _is_best(summary, model, d) else "" for d in columns]
        cells = [Text(f"{model.on(d):.4f}", style) for d, style in zip(columns, styles, strict=True)]
        table.add_row(
            Text(model.subject),
            model.role,
            *cells,
            _change(summary, model),
            style="reverse" if model.role == "fused" else "",
            end_section=after is not None and after.role != model.role,
        )
    return table


def _is_best(summary: Summary, model: Scored, domain: str | None) -> bool:
    """Whether no model of the target's architecture shows a lower figure; ties are all best."""
    rivals = [m for m in summary.models if m.role != "source"]
    return model in rivals and round(model.on(domain), 4) == min(round(m.on(domain), 4) for m in rivals)


def _change(summary: Summary, model: Scored) -> str:
    return "" if model.role == "pivot" else f"{change(model.mean, summary.pivot.mean):+.2f} %"


def write_report(summary: Summary, folder: Path) -> Path:
    """Write `report.html`, `plots/*.png` and `results.json` into `folder`; return the page's path.

    The page holds its style and plots within itself, in a light and a dark version, and fetches nothing.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, (draw, alt) in _PLOTS.items():
        themed = {theme: _png(draw, summary, **colours) for theme, colours in _THEMES.items()}
        light, dark = themed["light"], themed["dark"]
        if light is not None and dark is not None:
            (folder / "plots" / f"{name}.png").write_bytes(light)
            # CSS pixels below which its text would be too small: half of the width that the PNG states
            least = str(int.from_bytes(light[16:20], "big") // 2)
            figures[name] = {"alt": alt, "least": least, "light": _data_url(light), "dark": _data_url(dark)}
    (folder / "results.json").write_text(summary.to_json(), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(summary, figures), encoding="utf-8")
    return page


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(draw: Callable[[Summary], Any], summary: Summary, ink: str, paper: str, line: str) -> bytes | None:
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


_PLOTS: dict[str, tuple[Callable[[Summary], Any], str]] = {
    "bits": (_draw_bits, "Bits per byte by domain and model, and the change against the pivot"),
    "training": (_draw_training, "Label loss and fusion loss of each target by training step"),
    "teachers": (_draw_teachers, "Share of each target's positions that each source taught"),
    "merge": (
        _draw_merge,
        "Merge coefficients and update sizes by layer and kind of tensor, for each target",
    ),
}


def _page(summary: Summary, figures: dict[str, dict[str, str]]) -> str:
    """The page's HTML; jinja2 escapes every value."""
    from jinja2 import Environment, StrictUndefined

    scores = [
        (m, [(m.on(d), _is_best(summary, m, d)) for d in (*summary.domains, None)], _change(summary, m))
        for m in summary.ordered()
    ]
    seconds = [(s.label, s.seconds) for s in summary.stages]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    return template.render(
        s=summary,
        verdict=verdict(summary),
        scores=scores,
        figures=figures,
        align=_rows(summary, "align", ("coverage", "ids mapped", "ids seen", "mass kept"), "{:.1%}"),
        cache=_cache_rows(summary),
        seconds=seconds,
        slowest=max((t for _, t in seconds if t), default=1),
        total=sum(t for _, t in seconds if t),
        settings=[(s.label, _scalars(s.facts)) for s in summary.stages],
    )


def _scalars(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in facts.items() if not isinstance(value, list | dict)]


def _rows(summary: Summary, stage: str, keys: Iterable[str], form: str) -> list[list[str]]:
    """[subject, a figure for each key] of a stage's folders; a dash for what a folder does not tell."""
    told = summary.subjects(stage).items()
    return [[name, *("–" if f.get(k) is None else form.format(f[k]) for k in keys)] for name, f in told]


def _cache_rows(summary: Summary) -> list[list[str]]:
    megabytes = [
        [f"{facts['bytes on disk'] / 1e6:,.2f}" if "bytes on disk" in facts else "–"]
        for facts in summary.subjects("capture").values()
    ]
    keys = ("samples", "tokens", "bytes a token", "train bits per byte", "tokens a second")
    return [row + mb for row, mb in zip(_rows(summary, "capture", keys, "{:,}"), megabytes, strict=True)]


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" 
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ s.name }}: fusion report</title>
<style>
:root { --ink: #1b1f24; --soft: #59626d; --paper: #fff; --card: #f5f7f9; --line: #d5dae0; --mark: #fdeee3;
  --bar: #D55E00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4af; --paper: #1a1e24; --card: #232830; --line: #3d444d;
    --mark: #43301f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 64rem; margin: auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.2rem; }
p, li { max-width: 46rem; }
.soft, figcaption, small { color: var(--soft); }
.verdict { border-left: 4px solid var(--bar); background: var(--card); padding: .8rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .left { text-align: left; }
td.path { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 12rem; }
.best { font-weight: 700; }
.fused { background: var(--mark); }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; }
img { display: block; width: 100%; height: auto; }
.meter { display: inline-block; height: .7rem; background: var(--bar); vertical-align: middle; }
blockquote { margin: .8rem 0; padding: .8rem 1rem; background: var(--card);
  white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.5 ui-monospace, monospace; }
blockquote b { color: var(--soft); font-weight: 400; }
summary { cursor: pointer; }
</style>
</head>
<body>
<main>
{%- macro plot(name) %}
{%- if name in figures %}
<figure><div class="wide"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ figures[name].dark }}">
<img src="{{ figures[name].light }}" alt="{{ figures[name].alt }}"
  style="min-width: {{ figures[name].least }}px">
</picture></div><figcaption>{{ caller() }}</figcaption></figure>
{%- else %}
<p class="soft">This run has no figures for it.</p>
{%- endif %}
{%- endmacro %}
{%- macro table(heads, rows) %}
<div class="wide"><table><thead><tr>{% for h in heads %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- else %}
<tr><td class="soft">none</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endmacro %}
<h1>{{ s.name }}</h1>
<p class="soft">Sources fused: {{ s.having("source") | length }}.
Parameters of the fused model: {{ "{:,}".format(s.fused.parameters) }}.</p>
<p class="verdict">{{ verdict }}</p>
<h2>Held-out bits per byte</h2>
<p>Lower is better. Bits per byte compare models of any tokenizer. Bold: the best of the models with the
pivot's architecture. The control was trained like a target, from labels alone.</p>
<div class="wide"><table><thead><tr><th>model</th><th class="left">role</th>
{%- for d in s.domains %}<th>{{ d }}</th>{% endfor -%}
<th>mean</th><th>vs pivot</th><th>parameters</th></tr></thead><tbody>
{%- for m, cells, change in scores %}
<tr class="{{ m.role }}"><td>{{ m.subject }}</td><td class="left">{{ m.role }}</td>
{%- for value, best in cells %}<td{% if best %} class="best"{% endif %}>{{ "%.4f" % value }}</td>{% endfor -%}
<td>{{ change }}</td><td>{{ "{:,}".format(m.parameters) }}</td></tr>
{%- endfor %}
</tbody></table></div>
<p><small>Held-out samples, none of them trained on:
{%- for d, n in s.heldout.items() %} {{ d }} {{ n }}{{ "." if loop.last else "," }}{% endfor %}</small></p>
{% call plot("bits") %}Above: bits per byte from zero; marks are the sources. Below: the same as a change
against the pivot; down is better.{% endcall %}
<h2>Training</h2>
{% call plot("training") %}Cross-entropy against the next token (left) and against the sources' distributions
(right), as a moving average; faint: each logged step. Nats a token compare within one tokenizer, the pivot's.
{%- endcall %}
<h2>Who taught what</h2>
{% call plot("teachers") %}Share of each target's positions that a source taught, beside the label; the
rest had the label alone.{% endcall %}
<h2>Alignment</h2>
<p>Coverage: positions of the target that a source could teach. Ids: of the source's vocabulary. Mass kept:
probability that the map carries over.</p>
{{ table(["source", "coverage", "ids mapped", "ids seen", "mass kept"], align) }}
<h2>Caches</h2>
{{ table(["source", "samples", "tokens", "bytes a token", "train bits per byte", "tokens a second", "MB"],
         cache) }}
<h2>Merge</h2>
<p>Method <b>{{ s.merge.method }}</b>
{%- for k, v in s.merge.parameters.items() %}, {{ k }} {{ v }}{% endfor %};
targets {{ s.merge.names | join(", ") }}.</p>
{% call plot("merge") %}For each target, by layer and by kind of tensor: its coefficient in the merge, and how
far training moved it from the pivot. Means over tensors; "none": not moved.{% endcall %}
<h2>What it writes</h2>
{%- for prompt, text in s.continuations %}
<blockquote><b>{{ prompt }}</b>{{ text }}</blockquote>
{%- else %}
<p class="soft">No prompts were given (release.prompts).</p>
{%- endfor %}
<h2>Time</h2>
<div class="wide"><table><tbody>
{%- for label, t in seconds %}
<tr><td>{{ label }}</td><td>{{ "–" if t is none else "{:,.1f} s".format(t) }}</td>
<td class="left"><span class="meter" style="width:{{ "%.2f" % (12 * (t or 0) / slowest) }}rem"></span></td>
</tr>
{%- endfor %}
<tr><td><b>together</b></td><td><b>{{ "{:,.1f} s".format(total) }}</b></td><td></td></tr>
</tbody></table></div>
<h2>Settings and figures</h2>
<p>Seed {{ s.seed }}. All numbers of this page are in <code>results.json</code>.</p>
<details><summary>Models</summary><div class="wide"><table><tbody>
{%- for m, _, _ in scores %}
<tr><td>{{ m.subject }}</td><td class="left">{{ m.role }}</td><td class="left">{{ m.architecture }}</td>
<td class="path">{{ m.path }}</td></tr>
{%- endfor %}
</tbody></table></div></details>
{%- for label, facts in settings if facts %}
<details><summary>{{ label }}</summary>{{ table(["figure", "value"], facts) }}</details>
{%- endfor %}
</main>
</body>
</html>
"""
