"""Align: for one source, a map from its vocabulary to the target's, counted on the corpus."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from fusion import cluster, hub, tracking
from fusion.align import vocabulary
from fusion.align.project import project
from fusion.align.spans import shared
from fusion.artifact import Artifact
from fusion.capture.cache import Cache
from fusion.config import Align, Config
from fusion.corpus import Corpus
from fusion.records import Heard, Rendered
from fusion.tokens.render import Renderer

_FALLBACKS = {"prefix": vocabulary.prefix, "exact": vocabulary.exact}


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write `map.safetensors` for the source `out.subject`; returns what it covers.

    Raises:
        ValueError: the cache was made with another tokenizer than the source's.
    """
    source = next(m for m in (config.pivot, *config.sources) if m.name == out.subject)
    reads = Renderer(hub.load_tokenizer(source, inputs["model"]), source.name, hub.template_of(source))
    learns = Renderer(hub.load_tokenizer(config.pivot, inputs["pivot"]), "pivot", hub.template_of(config.pivot))
    cache = Cache(inputs["cache"], reads.table.digest, source.name)
    corpus = Corpus(inputs["prepare"], "train")
    shape = (len(reads.table), len(learns.table))
    groups = cluster.share(range(corpus.groups))

    def met() -> Iterator[tuple[Heard, Rendered, np.ndarray, np.ndarray]]:
        for n in tracking.progress(groups, f"align {source.name}", len(groups)):
            for sample in corpus.group(n):
                heard = cache.get(sample.id)
                if heard is not None:
                    rendered = learns.render(sample)
                    yield (heard, rendered, *shared(heard.boundary, rendered.boundary))

    def count() -> tuple[csr_array, int, int]:
        positions = [0, 0]

        def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for heard, rendered, j, i in met():
                positions[0] += len(i)
                positions[1] += int((rendered.carries > 0).sum())
                yield heard.ids[j], rendered.ids[i + 1]

        return vocabulary.count_pairs(pairs(), shape), *positions

    parts = cluster.together(count)

    def write() -> dict[str, Any]:
        counts = csr_array(sum((part[0] for part in parts), csr_array(shape, dtype=np.int64)))
        taught, wanted = sum(p[1] for p in parts), sum(p[2] for p in parts)
        if not taught:
            raise ValueError(f"{source.name}: its cache {inputs['cache']} has none of these samples; capture it again")
        matrix = make_map(config.align, reads, learns, counts)
        vocabulary.save(out.folder / "map.safetensors", matrix)
        return _facts(matrix, counts, taught, wanted, cache, learns.table.digest)

    return cluster.on_main(write)


def make_map(settings: Align, source: Renderer, target: Renderer, counts: csr_array) -> csr_array:
    """The map that the config names: its kind first, then the end of text, then the fallback.

    A source with the target's own vocabulary needs no map but the identity, and loses nothing.
    """
    tables = (source.table, target.table)
    if source.table.digest == target.table.digest:
        return vocabulary.identity(len(source.table))
    if settings.map in ("soft", "hard"):
        first = vocabulary.statistics(counts, settings.map == "hard", settings.targets_per_token)
    else:
        first = vocabulary.exact(*tables) if settings.map == "exact" else vocabulary.prefix(*tables)
    maps = [first, vocabulary.pair(source.end_id, target.end_id, (len(source.table), len(target.table)))]
    if settings.fallback != "none":
        maps.append(_FALLBACKS[settings.fallback](*tables))
    return vocabulary.chain(*maps)


def _facts(matrix: csr_array, counts: csr_array, taught: int, wanted: int, cache: Cache, target: str) -> dict[str, Any]:
    """Coverage of positions, of ids, and of probability mass on a part of the corpus."""
    kept, whole = 0.0, 0.0
    for n, id in enumerate(cache.ids()):
        if n == 64:
            break
        entries = cache.get(id).entries  # type: ignore[union-attr]
        kept += float(project(entries, np.arange(len(entries)), matrix, matrix.shape[1]).probs.sum(dtype=np.float64))
        whole += float(entries.probs.sum(dtype=np.float64))
    return {
        "target tokenizer": target,
        "positions taught": taught,
        "positions": wanted,
        "coverage": round(taught / max(wanted, 1), 4),
        "ids mapped": round(float((np.diff(matrix.indptr) > 0).mean()), 4),
        "ids seen": round(float((np.diff(counts.indptr) > 0).mean()), 4),
        "mass kept": round(kept / max(whole, 1e-9), 4),
    }
