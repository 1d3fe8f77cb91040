"""Which share of a target's positions a source teaches, by bytes and by the published procedure.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --target TOKENIZER --source TOKENIZER --text FILE.jsonl [--template plain] --json OUT

`shared`: both have read the same bytes. `inside`: the position lies inside one of the source's tokens; how many of
these are taught depends on what the source expected, so this is the most. The published procedure pairs tokens:
`paired` is what it would teach from, and `right` the part of that in which the source really has read the same bytes;
the rest is taught something else. `one-hot`: positions where it teaches the token before.
"""

from typing import Any

import numpy as np
from common import (
    SHARED,
    TEXTS,
    arguments,
    door,
    mark_of,
    pair_arguments,
    pairs_of,
    parsed,
    renderer_of,
    samples_of,
    show,
    words_of,
    write,
)

from fusion.align import paper
from fusion.align.edit import min_edit
from fusion.align.spans import shared
from fusion.records import Carries


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    pair_arguments(parser)
    parser.add_argument(
        "--text", action="append", help="JSON lines with `text` or `messages`; ../shared/text by default"
    )
    parser.add_argument("--limit", type=int, default=60, help="texts a domain")
    given = parsed(parser)
    samples = samples_of(given.text or [*TEXTS, SHARED / "text/instruct_chat.jsonl"], given.limit, 3000)
    figures: list[dict[str, Any]] = []
    for target_name, source_name in pairs_of(given.target, given.source):
        target, source = (renderer_of(n, given.template) for n in (target_name, source_name))
        words, marks = (words_of(source), words_of(target)), (mark_of(source), mark_of(target))
        found = min_edit(*words, marks).tocoo()
        mapping = np.full(len(source.table), -1)
        mapping[found.coords[0]] = found.coords[1]
        known = paper.strings(*words, marks)
        sums: dict[str, np.ndarray] = {}
        for sample in samples:
            one, two = source.render(sample), target.render(sample)
            at = np.flatnonzero(two.carries == Carries.CONTENT)
            if not len(at):
                continue
            place = two.boundary[at]
            met = np.isin(place, one.boundary[(one.carries > 0) & (one.boundary >= 0)])
            j, i = shared(np.where(one.carries > 0, one.boundary, -1), np.where(two.carries > 0, two.boundary, -1))
            within = ~met & (place >= 0)
            row = sums.setdefault(sample.domain, np.zeros(7))
            row += [len(at), met.sum(), within.sum(), 0, 0, 0, 0]
            ids = [r.ids[np.flatnonzero(r.carries == Carries.CONTENT) + 1] for r in (one, two)]
            first, stop = paper.pairs(known, ids[0], ids[1], "fusellm")
            taught = paper.taught(known, ids[0], ids[1], first, stop, "fusellm", mapping)
            # a token's partner: right where both tokens end at one place
            after = [np.append(r.boundary[np.flatnonzero(r.carries == Carries.CONTENT)][1:], -2) for r in (one, two)]
            rows = np.flatnonzero(taught >= 0)
            right = (after[1][rows] == after[0][taught[rows]]) & (after[1][rows] >= 0)
            row[3:] += [len(rows), right.sum(), (taught < 0).sum(), len(ids[1])]
        for domain, s in sums.items():
            told = {
                "shared": s[1] / s[0],
                "inside": s[2] / s[0],
                "paired": s[3] / s[6] if s[6] else None,
                "right": s[4] / s[6] if s[6] else None,
                "one-hot": s[5] / s[6] if s[6] else None,
            }
            figures.append({"target": target_name, "source": source_name, "domain": domain, **told})
    columns = ("target ← source", "domain", "shared", "inside, at most", "published: paired", "right", "one-hot")
    rows = [
        (
            f"{f['target']} ← {f['source']}",
            f["domain"],
            *("–" if f[c] is None else f"{f[c]:.1%}" for c in ("shared", "inside", "paired", "right", "one-hot")),
        )
        for f in figures
    ]
    show("share of the target's positions that are taught", columns, rows)
    write(given.json, figures)


if __name__ == "__main__":
    door(main)
