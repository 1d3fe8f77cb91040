"""The report's page: one HTML file that fetches nothing."""

from collections.abc import Iterable
from typing import Any

from fusion.release.summary import Scored, Summary, change, verdict


def is_best(summary: Summary, model: Scored, domain: str | None) -> bool:
    """Whether no model of the target's architecture shows a lower figure; ties are all best."""
    rivals = [m for m in summary.models if m.role != "source"]
    return model in rivals and round(model.on(domain), 4) == min(round(m.on(domain), 4) for m in rivals)


def shown_change(summary: Summary, model: Scored) -> str:
    return "" if model.role == "pivot" else f"{change(model.mean, summary.pivot.mean):+.2f} %"


def page_html(summary: Summary, figures: dict[str, dict[str, str]]) -> str:
    """The page's HTML; jinja2 escapes every value."""
    from jinja2 import Environment, StrictUndefined

    scores = [
        (m, [(m.on(d), is_best(summary, m, d)) for d in (*summary.domains, None)], shown_change(summary, m))
        for m in summary.ordered()
    ]
    seconds = [(s.label, s.seconds) for s in summary.stages]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    return template.render(
        s=summary,
        verdict=verdict(summary),
        scores=scores,
        figures=figures,
        align=_align_rows(summary),
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


def _align_rows(summary: Summary) -> list[list[str]]:
    """Shares, and how true the source stays in the target's tokens."""
    shares = _rows(summary, "align", ("coverage", "ids mapped", "ids seen", "mass mapped"), "{:.1%}")
    bits = _rows(summary, "align", ("bits per byte", "source bits per byte"), "{:.4f}")
    return [share + bit[1:] for share, bit in zip(shares, bits, strict=True)]


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
<p class="soft">Sources fused: {{ s.sources | length }}.
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
<p>Coverage: positions of the target that a source could teach. Ids: of the source's vocabulary. Mass mapped:
probability that the map carries over. Bits a byte: of the text that follows, by what the source says in the target's
tokens, beside the source's own over the same bytes.</p>
{{ table(["source", "coverage", "ids mapped", "ids seen", "mass mapped", "bits a byte", "the source's own"], align) }}
<h2>Caches</h2>
{{ table(["source", "samples", "tokens", "bytes a token", "train bits per byte", "tokens a second", "MB"],
         cache) }}
<h2>Merge</h2>
<p>Method <b>{{ s.merge.method }}</b>
{%- for k, v in s.merge.parameters.items() %}, {{ k }} {{ v }}{% endfor %}
{%- if s.merge.far %}, {{ s.merge.far }}{% endif %};
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
