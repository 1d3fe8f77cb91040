"""How true a source stays when it speaks in a target's tokens, for every map and pair.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --model SOURCE --target TOKENIZER --text held-out.jsonl --count corpus.jsonl

For each pair: the bits per byte of the text that follows under the projected distribution, at the positions where both
have read the same bytes and the target's next token ends where a source's token ends too, so that the source's own bits
per byte are over the very same bytes. What a map loses is spread evenly over the target's vocabulary, and a
ten-thousandth goes to all ids alike, so that no figure is infinite.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from common import (
    SHARED,
    Source,
    arguments,
    door,
    fewer,
    folder_of,
    mark_of,
    parsed,
    renderer_of,
    samples_of,
    show,
    words_of,
    write,
)

from fusion.align import paper, vocabulary
from fusion.align.fidelity import compare
from fusion.align.projector import Projector, projector
from fusion.align.spans import shared
from fusion.align.spelling import Spelling
from fusion.align.stage import make_map
from fusion.config import Align
from fusion.records import Carries, Heard, Rendered, Sample, Sparse
from fusion.tokens.render import Renderer

EPSILON = 1e-4
MODELS = ("math-seedoss", "code-neox", "prose-mistral", "pivot-llama", "stories260K", "tinystories-656k")
# name: the config's `align`
MAPS = {
    "exact": Align(maps=("exact",), follow=False),
    "min_edit": Align(maps=("min_edit",), follow=False),
    "prefix": Align(maps=("prefix",), follow=False),
    "hard": Align(maps=("hard", "prefix"), follow=False),
    "soft": Align(maps=("soft", "prefix"), follow=False, targets_per_token=16),
    "prefix, followed": Align(maps=("prefix",)),
    "soft, followed": Align(),
}
Says = Callable[[Heard, np.ndarray, np.ndarray], tuple[np.ndarray, Sparse]]


def counted(source: Renderer, target: Renderer, corpus: Sequence[Sample]) -> tuple[Any, Any]:
    """What the statistics are counted from, as the align stage does."""
    return counted_in([source.render(s) for s in corpus], [target.render(s) for s in corpus], source, target)


def counted_in(
    ones: Sequence[Rendered], twos: Sequence[Rendered], source: Renderer, target: Renderer
) -> tuple[Any, Any]:
    """The same of texts that both have read."""
    first = vocabulary.FirstTokens(Spelling.of(target.table))

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for one, two in zip(ones, twos, strict=True):
            at = np.flatnonzero(two.carries == Carries.CONTENT)
            first.add(two.ids[at + 1], np.append(False, np.diff(at) == 1))
            carried = [np.where(r.carries > 0, r.boundary, -1) for r in (one, two)]
            j, i = shared(*carried)
            yield one.ids[j + 1], two.ids[i + 1]

    return vocabulary.count_pairs(pairs(), (len(source.table), len(target.table))), first.counts()


def published(source: Renderer, target: Renderer, method: str) -> Says:
    """The published procedure: pairs by dynamic programming, the map by edit distance, kept entries renormalised."""
    from fusion.align.edit import min_edit

    words = words_of(source), words_of(target)
    marks = mark_of(source), mark_of(target)
    mapping = np.full(len(source.table), -1)
    found = min_edit(*words, marks).tocoo()
    mapping[found.coords[0]] = found.coords[1]
    known = paper.strings(*words, marks)

    def says(heard: Heard, places: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, Sparse]:
        # position n predicts token n: it has read token n - 1
        first, stop = paper.pairs(known, heard.ids[:-1], labels[:-1], method)
        at = paper.taught(known, heard.ids[:-1], labels[:-1], first, stop, method, mapping)
        rows = np.flatnonzero(at >= 0)
        said = paper.first_kept(heard.entries, at[rows] + 1, mapping)
        return rows + 1, said

    return says


def of_config(hears: Projector, width: int) -> Says:
    """A projector of ours, nothing cut off."""
    return lambda heard, places, labels: hears.project(heard, places, labels, width)


def measure(says: Says, target: Renderer, source: Renderer, readings: list[tuple[Sample, Heard]]) -> dict[str, Any]:
    """Sums over all positions of some readings, by domain."""
    sums: dict[str, np.ndarray] = {}
    sizes = target.table.lengths
    for sample, heard in readings:
        read = target.render(sample)
        at = np.flatnonzero(read.carries == Carries.CONTENT)
        labels, places = read.ids[at + 1], read.boundary[at]
        rows, said = says(heard, places, labels)
        told = compare(heard, places[rows], labels[rows], sizes[labels[rows]], said)
        bits = -np.log2((1 - EPSILON) * (told.probability + told.lost / len(sizes)) + EPSILON / len(sizes))
        same, met = told.same, np.isin(places[rows], heard.boundary)
        into = sums.setdefault(sample.domain, np.zeros(10))
        into += [
            len(at),
            len(rows),
            bits[same].sum(),
            told.nats[same].sum() / np.log(2),
            sizes[labels[rows[same]]].sum(),
            bits.sum(),
            sizes[labels[rows]].sum(),
            (~met).sum(),
            bits[~met].sum(),
            sizes[labels[rows[~met]]].sum(),
        ]
    return {
        domain: {
            "coverage": s[1] / s[0],
            "projected": s[2] / max(s[4], 1),
            "own": s[3] / max(s[4], 1),
            "all taught": s[5] / max(s[6], 1),
            "inside": s[7] / s[0],
            "inside bits": s[8] / max(s[9], 1),
        }
        for domain, s in sums.items()
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="a source model's folder; all of ../shared by default")
    parser.add_argument("--target", action="append", help="a target tokenizer's folder; all of ../shared by default")
    parser.add_argument("--text", action="append", help="held-out text, JSON lines; the zoo's by default")
    parser.add_argument(
        "--count", action="append", help="text that the statistics are counted on; the zoo's by default"
    )
    parser.add_argument("--limit", type=int, default=40, help="held-out texts a domain")
    parser.add_argument("--count-limit", type=int, default=400, help="counted texts a domain")
    parser.add_argument("--k", type=int, action="append", help="entries of the source at a position; 64 and 1024")
    parser.add_argument("--domain", action="append", help="only these domains")
    given = parsed(parser)
    heldout = samples_of(given.text or [SHARED / "zoo/heldout.jsonl"], given.limit, 900)
    heldout = [s for s in heldout if not given.domain or s.domain in given.domain]
    corpus = samples_of(given.count or [SHARED / "zoo/fuse.jsonl"], given.count_limit)
    ks = given.k or [64, 1024]
    everyone = [p.name for kind in ("tokenizers", "zoo", "models") for p in sorted((SHARED / kind).glob("*/"))]

    @cache
    def target_of(other: str) -> tuple[Renderer, list[Rendered]]:
        renderer = renderer_of(other, given.template)
        return renderer, [renderer.render(s) for s in corpus]

    figures: list[dict[str, Any]] = []
    for name in given.model or MODELS:
        source = Source(name, given.template)
        ones = [source.renderer.render(s) for s in corpus]
        heard = [(s, h) for s in heldout if (h := source.read(s, max(ks))) is not None]
        for other in given.target or everyone:
            if folder_of(other) == folder_of(name):
                continue
            target, twos = target_of(other)
            counts = counted_in(ones, twos, source.renderer, target)
            ways: dict[str, Says] = {m: published(source.renderer, target, m) for m in ("fusellm", "fusechat")}
            for label, settings in MAPS.items():
                made = make_map(settings, source.renderer, target, *counts)
                ways[label] = of_config(projector(made, settings), len(target.table))
            rows = []
            for k in ks:
                readings = [(s, fewer(h, k)) for s, h in heard]
                for label, says in ways.items():
                    for domain, told in measure(says, target, source.renderer, readings).items():
                        figures.append(
                            {"target": other, "source": source.name, "k": k, "map": label, "domain": domain, **told}
                        )
                        rows.append((label, k, domain, *(float(v) for v in told.values())))
            columns = (
                "map",
                "k",
                "domain",
                "taught",
                "bits/byte",
                "source's own",
                "all taught",
                "inside",
                "their bits/byte",
            )
            show(f"{other} ← {source.name}", columns, rows)
            write(given.json, figures)
    rank(figures)


def rank(figures: list[dict[str, Any]]) -> None:
    """The maps beside each other: means over the targets, each source in the domain that it knows best.

    (Elsewhere a source is wrong with confidence, which any loss of mass makes better, and no gate would ask it.)
    """
    own: dict[str, dict[str, list[float]]] = {}
    for told in figures:
        own.setdefault(told["source"], {}).setdefault(told["domain"], []).append(told["own"])
    best = {source: min(domains, key=lambda d, by=domains: np.mean(by[d])) for source, domains in own.items()}
    sources = list(best)
    cells: dict[tuple[str, int], dict[str, list[float]]] = {}
    won: dict[tuple[str, str, int, str], tuple[float, str]] = {}
    for told in figures:
        if told["domain"] == best[told["source"]]:
            for label, value in ((told["map"], told["projected"]), ("the source's own", told["own"])):
                cells.setdefault((label, told["k"]), {}).setdefault(told["source"], []).append(value)
        pair = told["target"], told["source"], told["k"], told["domain"]
        won[pair] = min(won.get(pair, (np.inf, "")), (told["projected"], told["map"]))
    rows = []
    for (label, k), by_source in cells.items():
        first = sum(name == label and pair[2] == k for pair, (_, name) in won.items())
        rows.append((label, k, *(f"{np.mean(by_source[s]):.3f}" for s in sources), first))
    domains = [f"{s}, {best[s]}" for s in sources]
    show("bits per byte in the target's tokens, mean over targets", ("map", "k", *domains, "first in"), rows)


if __name__ == "__main__":
    door(main)
