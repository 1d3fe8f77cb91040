"""Align and project, against the published procedure: target tokens a second on one core.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --target TOKENIZER --source TOKENIZER --text FILE.jsonl --json OUT
    python benchmarks/alignment.py --target TOKENIZER --model SOURCE_MODEL

The source's entries are drawn from the text's own tokens with probabilities that fall as 1/rank^1.5; with --model a
model's. `map alone` is the boundary merge and the map; `followed` is the default. The published procedure runs on the
same samples, less of them where one takes long. Rendering is not timed on either side, tables are made before.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    TEXTS,
    Source,
    arguments,
    door,
    entries_of,
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
from published import align_sample

from fusion.align.edit import min_edit, replaced
from fusion.align.projector import projector
from fusion.align.stage import make_map
from fusion.config import Align
from fusion.records import Heard, Sample, sample_id
from fusion.tokens.render import Renderer

LENGTHS = (512, 2048, 8192)
KEPT = 64  # entries of a projected row that are kept, as distill.k has it
MOST = 20.0  # seconds that the published procedure is given for a pair and length, one sample at least


def long_samples(samples: list[Sample], target: Renderer, length: int, count: int) -> list[Sample]:
    """Texts of `length` target tokens, made of several."""
    made, text, size = [], "", 0
    for sample in samples:
        text += (sample.text or "\n".join(m.content for m in sample.messages)) + "\n\n"
        size += len(target.render(sample).ids)
        if size >= 1.1 * length:
            read = target.render(Sample(sample_id(text), "mixed", text, complete=False))
            stop = int(read.boundary[: length + 1].max()) - 1
            text = text.encode()[:stop].decode(errors="ignore")
            made.append(Sample(sample_id(text), "mixed", text, complete=False))
            text, size = "", 0
        if len(made) == count:
            break
    return made


def best_of(times: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    pair_arguments(parser)
    parser.add_argument("--model", help="a source model's folder: its own entries, and not drawn ones")
    parser.add_argument("--text", action="append", help="JSON lines; ../shared/text by default")
    parser.add_argument("--k", type=int, default=16, help="entries of the source at a position")
    parser.add_argument("--length", type=int, action="append", help="target tokens a sample; 512, 2048 and 8192")
    given = parsed(parser)
    texts = samples_of(given.text or TEXTS, 120)
    texts = [texts[n] for n in np.random.default_rng(0).permutation(len(texts))]
    pairs = pairs_of(given.target, [given.model] if given.model else given.source)
    figures: list[dict[str, Any]] = []
    for target_name, source_name in pairs:
        target, source = (renderer_of(n, given.template) for n in (target_name, source_name))
        counts = counted(source, target, texts)
        settings = {"map alone": Align(follow=False), "followed": Align()}
        ours = {n: projector(make_map(s, source, target, *counts), s) for n, s in settings.items()}
        model = Source(given.model, given.template) if given.model else None
        vocabulary = target.tokenizer.get_vocab()
        marks = mark_of(source), mark_of(target)
        nearest = min_edit(words_of(source), words_of(target), marks).tocoo()
        words = [words_of(source), words_of(target)]
        mapping = {replaced(str(words[0][i]), *marks): words[1][j] for i, j in zip(*nearest.coords, strict=True)}
        for length in given.length or LENGTHS:
            samples = long_samples(texts, target, length, max(65536 // length, 4))
            read = [target.render(s) for s in samples]
            heard = [model.read(s, given.k) if model else entries_of(source, s, given.k) for s in samples]
            done = [(h, r) for h, r in zip(heard, read, strict=True) if h is not None]
            if not done:
                raise ValueError(f"{source_name}: can read no text of {length} tokens; give --length")
            at = [np.flatnonzero(r.carries) for _, r in done]
            asked = [(h, r.boundary[a], r.ids[a + 1]) for (h, r), a in zip(done, at, strict=True)]
            tokens = sum(len(a) for a in at)
            told: dict[str, Any] = {"target": target_name, "source": source_name, "length": length, "tokens": tokens}
            for name, hears in ours.items():
                work = [lambda h=hears, a=a: h.project(*a, KEPT) for a in asked]
                work[0]()  # compiled once, read from a cache after that
                told[name] = tokens / best_of(3, lambda work=work: [w() for w in work])
            seconds, theirs = 0.0, 0
            for h, places, labels in asked:
                entries = as_lists(h)
                start = time.perf_counter()
                align_sample(
                    source.tokenizer,
                    target.tokenizer,
                    h.ids.tolist(),
                    labels.tolist(),
                    entries,
                    vocabulary,
                    mapping,
                    marks,
                )
                seconds, theirs = seconds + time.perf_counter() - start, theirs + len(places)
                if seconds > MOST:
                    break
            told["published"] = theirs / seconds
            told["ratio"] = told["followed"] / told["published"]
            figures.append(told)
            print(
                " ".join(f"{k} {v:,.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()), flush=True
            )
    columns = (
        "target ← source",
        "tokens a sample",
        "map alone, tokens/s",
        "followed, tokens/s",
        "published, tokens/s",
        "ratio",
    )
    rows = [
        (
            f"{f['target']} ← {f['source']}",
            f["length"],
            *(f"{f[c]:,.0f}" for c in ("map alone", "followed", "published", "ratio")),
        )
        for f in figures
    ]
    show(f"align and project, k = {given.k}, one core", columns, rows)
    write(given.json, figures)


def as_lists(heard: Heard) -> list[tuple[list[int], list[float]]]:
    """Entries as the published code has them: lists of ids and logits."""
    offsets, entries = heard.entries.offsets, heard.entries
    return [
        (entries.ids[a:b].tolist(), np.log(np.maximum(entries.probs[a:b], 1e-30)).tolist())
        for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]


if __name__ == "__main__":
    door(main)
