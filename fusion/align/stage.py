"""Align: for one source, a map from its vocabulary to the target's, counted on the corpus."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from fusion import cluster, hub, tracking
from fusion.align import published, vocabulary
from fusion.align.edit import min_edit
from fusion.align.fidelity import compare
from fusion.align.map import Map
from fusion.align.paper import Strings, strings
from fusion.align.projector import Projector, projector
from fusion.align.report import examples
from fusion.align.spans import shared
from fusion.align.spelling import Spelling
from fusion.artifact import Artifact, write_json
from fusion.capture.cache import Cache
from fusion.config import Align, Config
from fusion.corpus import Corpus
from fusion.records import Carries, Heard, Rendered
from fusion.tokens.render import Renderer
from fusion.tokens.words import space_mark, token_strings

_MEASURED = 256  # samples that the figures of a map are taken on
_EVEN = 1e-4  # share that goes to all ids alike when a map is measured


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write `map.safetensors` and `map.json` for the source `out.subject`; returns what it covers.

    Raises:
        ValueError: the cache was made with another tokenizer than the source's, or holds none of the samples.
    """
    source = next(m for m in (config.pivot, *config.sources) if m.name == out.subject)
    reads = Renderer(hub.load_tokenizer(source, inputs["model"]), source.name, hub.template_of(source))
    learns = Renderer(hub.load_tokenizer(config.pivot, inputs["pivot"]), "pivot", hub.template_of(config.pivot))
    cache = Cache(inputs["cache"], reads.table.digest, source.name)
    corpus = Corpus(inputs["prepare"], "train")
    shape = (len(reads.table), len(learns.table))
    groups = cluster.share(range(corpus.groups))
    compared = None if config.align.procedure == "boundaries" else strings_of(reads, learns)

    def met() -> Iterator[tuple[Heard, Rendered]]:
        for n in tracking.progress(groups, f"align {source.name}", len(groups)):
            for sample in corpus.group(n):
                heard = cache.get(sample.id)
                if heard is not None:
                    yield heard, learns.render(sample)

    def count() -> tuple[csr_array, csr_array, int]:
        first = vocabulary.FirstTokens(Spelling.of(learns.table))
        samples = 0

        def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal samples
            for heard, rendered in met():
                samples += 1
                j, i = shared(heard.boundary, rendered.boundary)
                content = np.flatnonzero(rendered.carries == Carries.CONTENT)
                first.add(rendered.ids[content + 1], np.append(False, np.diff(content) == 1))
                if compared is not None and config.align.procedure == "fusechat":
                    yield published.paired(compared, heard, rendered.ids[np.flatnonzero(rendered.carries) + 1])
                else:
                    yield heard.ids[j], rendered.ids[i + 1]

        return vocabulary.count_pairs(pairs(), shape), first.counts(), samples

    parts = cluster.together(count)

    def write() -> dict[str, Any]:
        counts, first = (csr_array(sum((part[n] for part in parts[1:]), parts[0][n])) for n in (0, 1))
        if not any(part[2] for part in parts):
            raise ValueError(f"{source.name}: its cache {inputs['cache']} has none of these samples; capture it again")
        made = make_map(config.align, reads, learns, counts, first, compared)
        made.save(out.folder / "map.safetensors")
        used, facts = _measure(projector(made, config.align), made, cache, corpus, learns)
        facts["ids seen"] = round(float((np.diff(counts.indptr) > 0).mean()), 4)
        write_json(out.folder / "map.json", {**facts, **examples(made, used)})
        return {"target tokenizer": learns.table.digest, **facts}

    return cluster.on_main(write)


def make_map(
    settings: Align,
    source: Renderer,
    target: Renderer,
    counts: csr_array,
    first: csr_array,
    compared: Strings | None = None,
) -> Map:
    """The map that the config names: its first kind, then the end of text, then its other kinds.

    A source with the target's own vocabulary needs no map but the identity, and loses nothing; what ends a turn may be
    another token all the same, where the two read other chat templates.

    Args:
        settings: the config's `align`.
        source: the renderer of the model that teaches.
        target: that of the model that learns.
        counts: int64 (source ids, target ids), see `vocabulary.count_pairs`.
        first: int64 (target ids, target ids), see `vocabulary.FirstTokens`.
        compared: the token strings of both, for a published procedure.
    """
    tables = (source.table, target.table)
    shape = (len(source.table), len(target.table))
    ends = vocabulary.ends(counts, *tables)  # what ends a turn here is what ends it there, whatever the map
    if source.table.digest == target.table.digest:
        matrix = vocabulary.chain(ends, vocabulary.identity(shape[0]))
    else:
        made = {
            "soft": lambda: vocabulary.statistics(counts, False, shape[1]),
            "hard": lambda: vocabulary.statistics(counts, True, 1),
            "exact": lambda: vocabulary.exact(*tables),
            "prefix": lambda: vocabulary.prefix(*tables),
            "min_edit": lambda: nearest_strings(source, target),
        }
        head, *rest = (made[kind]() for kind in published.MAPS.get(settings.procedure, settings.maps))
        matrix = vocabulary.chain(ends, head, vocabulary.pair(source.end_id, target.end_id, shape), *rest)
    shares = vocabulary.statistics(first, False, 8)
    return Map(matrix, shares, Spelling.of(source.table), Spelling.of(target.table), compared)


def nearest_strings(source: Renderer, target: Renderer) -> csr_array:
    """FuseLLM's map: token strings, their space marks made equal, to the nearest by edit distance."""
    return min_edit(*_words(source, target))


def strings_of(source: Renderer, target: Renderer) -> Strings:
    """The token strings of two vocabularies as the published procedures compare them."""
    return strings(*_words(source, target))


def _words(source: Renderer, target: Renderer) -> tuple[list[str | None], list[str | None], tuple[str, str]]:
    """The token strings of two vocabularies, and what stands for a space in each."""
    one, two = (token_strings(side.tokenizer, side.table) for side in (source, target))
    return one, two, (space_mark(one, source.table), space_mark(two, target.table))


def _measure(
    hears: Projector, made: Map, cache: Cache, corpus: Corpus, target: Renderer
) -> tuple[np.ndarray, dict[str, Any]]:
    """How much each source id is used, and the map's figures on a part of the corpus."""
    used, taught, wanted, mass, samples = np.zeros(len(made.source)), 0, 0, [0.0, 0.0], 0
    nats, length, has_target = np.zeros(2), 0, made.rows_mass
    for sample in corpus:
        heard = cache.get(sample.id)
        if heard is None:
            continue
        rendered = target.render(sample)
        at = np.flatnonzero(rendered.carries)
        labels = rendered.ids[at + 1]
        rows, said = hears.project(heard, rendered.boundary[at], labels, len(made.target))
        known = heard.entries.ids < len(used)
        used += np.bincount(heard.entries.ids[known], heard.entries.probs[known], len(used))
        taught, wanted = taught + len(rows), wanted + len(at)
        mass[0] += float(heard.entries.probs.sum(dtype=np.float64))
        mass[1] += float((heard.entries.probs * has_target[np.minimum(heard.entries.ids, len(used))]).sum())
        sizes = made.target.lengths[labels[rows]]
        told = compare(heard, rendered.boundary[at][rows], labels[rows], sizes, said)
        even = 1 / len(made.target)  # what a map loses is spread evenly, and no figure is infinite
        probs = (told.probability + told.lost * even) * (1 - _EVEN) + _EVEN * even
        nats += [-np.log(probs[told.same]).sum(), told.nats[told.same].sum()]
        length += int(sizes[told.same].sum())
        samples += 1
        if samples == _MEASURED:
            break
    return used, {
        "coverage": round(taught / max(wanted, 1), 4),
        "ids mapped": round(float((np.diff(made.matrix.indptr) > 0).mean()), 4),
        "mass mapped": round(mass[1] / max(mass[0], 1e-9), 4),
        "bits per byte": round(nats[0] / max(length, 1) / np.log(2), 4),
        "source bits per byte": round(nats[1] / max(length, 1) / np.log(2), 4),
    }
