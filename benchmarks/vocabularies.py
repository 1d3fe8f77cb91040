"""Maps between whole vocabularies: seconds for the edit-distance map and for the statistics, against the published way.

    python benchmarks/vocabularies.py
    python benchmarks/vocabularies.py --target TOKENIZER --source TOKENIZER --text FILE.jsonl --json OUT

`min_edit` runs on all ids with two threads; the published way is timed on some source tokens that have no equal in the
target, and taken as many times as there are such tokens. What both find for these is compared, string by string.
`statistics` reads ten megabytes of text with both tokenizers, in two processes.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from common import (
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
from fidelity import counted
from published import min_edit as published_min_edit

from fusion.align.edit import min_edit, nearest, replaced
from fusion.records import Sample
from fusion.tokens.render import Renderer

MEGABYTES = 10
TRIED = 40  # source tokens that the published way is timed on


def statistics_of(source: Renderer, target: Renderer, corpus: list[Sample]) -> Any:
    """The counts of a corpus, half of it by each of two processes, as two ranks of the align stage do it."""
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        parts = [pool.submit(counted, source, target, corpus[n::2]) for n in range(2)]
        (one, first), (two, more) = (part.result() for part in parts)
    return one + two, first + more


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    pair_arguments(parser)
    parser.add_argument("--model", action="append", dest="source", help="a source model's folder, for its tokenizer")
    parser.add_argument("--text", action="append", help="JSON lines; ../shared/text by default")
    given = parsed(parser)
    pairs = pairs_of(given.target, given.source)
    pairs += [] if given.target else [("llama3", "qwen2.5")]
    corpus, size = [], 0
    for sample in samples_of(given.text or TEXTS[1:]):
        corpus.append(sample)
        size += sum(sample.sizes())
        if size >= MEGABYTES * 1e6:
            break
    nearest(["a"], ["b"])  # compiled once, read from a cache after that
    figures: list[dict[str, Any]] = []
    for target_name, source_name in pairs:
        target, source = (renderer_of(n, given.template) for n in (target_name, source_name))
        marks = mark_of(source), mark_of(target)
        words, others = words_of(source), words_of(target)
        start = time.perf_counter()
        found = min_edit(words, others, marks).tocoo()
        seconds = time.perf_counter() - start
        mapped = dict(zip(found.coords[0].tolist(), found.coords[1].tolist(), strict=True))
        known = {w: i for i, w in enumerate(others) if w is not None}
        unlike = [i for i, w in enumerate(words) if w is not None and replaced(w, *marks) not in known]
        tried = np.random.default_rng(0).permutation(unlike)[:TRIED].tolist()
        start = time.perf_counter()
        theirs = published_min_edit({str(words[i]): i for i in tried}, known, marks)
        each = (time.perf_counter() - start) / max(len(tried), 1)
        differ = sum(theirs[replaced(str(words[i]), *marks)] != others[mapped[i]] for i in tried)
        start = time.perf_counter()
        statistics_of(source, target, corpus)
        told = {
            "target": target_name,
            "source": source_name,
            "unlike": len(unlike),
            "min_edit": seconds,
            "published": each * len(unlike),
            "ratio": each * len(unlike) / seconds,
            "differ": differ,
            "tried": len(tried),
            "statistics": time.perf_counter() - start,
            "megabytes": size / 1e6,
        }
        figures.append(told)
        print(" ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()), flush=True)
    columns = (
        "target ← source",
        "ids without equal",
        "min_edit, s",
        "published, s",
        "ratio",
        "differ",
        "statistics, s",
    )
    rows = [
        (
            f"{f['target']} ← {f['source']}",
            f"{f['unlike']:,}",
            f"{f['min_edit']:.1f}",
            f"{f['published']:,.0f}",
            f"{f['ratio']:,.0f}",
            f"{f['differ']} of {f['tried']}",
            f"{f['statistics']:.1f}",
        )
        for f in figures
    ]
    show("maps between whole vocabularies", columns, rows)
    write(given.json, figures)


if __name__ == "__main__":
    door(main)
