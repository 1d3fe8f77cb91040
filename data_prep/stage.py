"""Prepare: the config's datasets → train, validation and held-out samples, told apart by the hash of their content."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.samples import BEGUN, beginning, cut, fraction, matches, read_rows, to_sample, turns_of, unique
from data_prep.sorting import Sorted
from fusion import cluster, tracking
from fusion.artifact import Artifact
from fusion.config import Config, Dataset
from fusion.records import Sample

PARTS = ("train", "validation", "heldout")
_NEEDED = {
    "train": "train on; lower prepare.heldout_share or prepare.validation_share",
    "heldout": "measure on; raise prepare.heldout_share or mark a dataset `heldout: true`",
}
_MANY = 10  # documents of a domain of which validation takes one at least
_PREVIEW_BYTES = 4 << 20  # of each dataset
_PREVIEW_SAMPLES = 1024


@dataclass
class Taken:
    """How many rows of a dataset were looked at, and how many were taken."""

    rows: int = 0
    taken: int = 0


@dataclass
class _Split:
    """One reading of all datasets."""

    config: Config
    seen: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    waiting: list[tuple[str, list[Sample]]] = field(default_factory=list)  # documents that may be validation's
    documents: Counter[str] = field(default_factory=Counter)  # of each domain, to train on
    spare: dict[str, tuple[float, str, list[Sample]]] = field(default_factory=dict)  # the first of them by hash

    def part_of(self, sample: Sample, dataset: Dataset) -> str | None:
        """`train`, `validation`, `heldout` or none of them, for a whole document or chat."""
        prepare = self.config.prepare
        if dataset.heldout:
            return "heldout"
        if not any(d.heldout for d in prepare.data) and fraction(sample.id, 0) < prepare.heldout_share:
            return "heldout"
        if fraction(sample.id, 1) >= prepare.train_share:
            return None
        return "validation" if fraction(sample.id, 2) < prepare.validation_share else "train"

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Every piece with its part, those of `settled` last."""
        prepare = self.config.prepare
        # what is measured on comes first, so that nothing equal to it is trained on
        for n, dataset in sorted(enumerate(prepare.data), key=lambda pair: not pair[1].heldout):
            found = Taken()
            rows = read_rows(dataset, f"prepare.data.{n}.data")
            yield from self.pieces(dataset, tracking.progress(rows, f"prepare {dataset.data}"), found)
            if not found.taken:
                left = "`where`, blank ones and prepare.train_share"
                why = "has no rows" if not found.rows else f"has {found.rows} rows and none is left after {left}"
                raise ValueError(f"prepare.data.{n}.data: {dataset.data} {why}")
        yield from self.settled()

    def pieces(self, dataset: Dataset, rows: Iterable[tuple[str, dict]], found: Taken) -> Iterator[tuple[str, Sample]]:
        """The pieces of one dataset's rows with their parts, counted in `found`; validation's wait for `settled`."""
        for where, row in rows:
            found.rows += 1
            if not matches(row, dataset.where):
                continue
            sample = to_sample(row, where, dataset.domain)
            if sample is None:
                self.left_out["blank"] += 1
                continue
            part = self.part_of(sample, dataset)
            if part is None:
                continue
            if left := len(turns_of(row) or ()) - len(sample.messages):
                self.left_out["turns without text, and after such"] += left
            found.taken += 1
            yield from self._pieces(sample, part)
            if found.taken == dataset.limit:
                break

    def _pieces(self, sample: Sample, part: str) -> Iterator[tuple[str, Sample]]:
        pieces = cut(sample, self.config.prepare.max_bytes)
        if not pieces:
            self.left_out["longer than prepare.max_bytes"] += 1
        fresh = list(unique(pieces, self.seen))
        self.left_out["seen before"] += len(pieces) - len(fresh)
        if part == "validation":
            self.waiting += [(sample.id, fresh)] if fresh else []
            return
        if part == "train" and 0 < len(fresh) <= self.config.prepare.validation_limit:
            domain, order = fresh[0].domain, (fraction(sample.id, 2), sample.id)
            self.documents[domain] += 1
            if domain not in self.spare or order < self.spare[domain][:2]:
                self.spare[domain] = (*order, fresh)
        for piece in fresh:
            if part == "heldout" and self.counts[f"heldout {piece.domain}"] >= self.config.prepare.heldout_limit:
                self.left_out["over prepare.heldout_limit"] += 1
                continue
            yield self._counted(part, piece)

    def settled(self) -> Iterator[tuple[str, Sample]]:
        """The pieces that waited: validation's until their domain has enough, then train's.

        Documents stay whole, so the last one may go over the limit; one that is over it by itself is trained on. They
        come in the order of their hashes: which ones are validation's does not depend on the order of reading.
        """
        for _, pieces in sorted(self.waiting, key=lambda document: (fraction(document[0], 2), document[0])):
            limit = self.config.prepare.validation_limit
            over = len(pieces) > limit or self.counts[f"validation {pieces[0].domain}"] >= limit
            yield from [self._counted("train" if over else "validation", piece) for piece in pieces]
        self.waiting.clear()

    def lent(self) -> list[Sample]:
        """What validation takes from train: a document of each domain that has many and gave it none by hash."""
        if not self.config.prepare.validation_share:
            return []
        lacking = [d for d, n in self.documents.items() if n >= _MANY and not self.counts[f"validation {d}"]]
        taken = [piece for domain in lacking for piece in self.spare[domain][2]]
        for piece in taken:
            for key in ("", f" {piece.domain}"):
                self.counts[f"train{key}"] -= 1
                self.counts[f"validation{key}"] += 1
        return taken

    def _counted(self, part: str, piece: Sample) -> tuple[str, Sample]:
        self.counts[f"{part} {piece.domain}"] += 1
        self.counts[part] += 1
        return part, piece


def preview(config: Config) -> tuple[float, float, list[Sample]] | None:
    """What there will be to train on, from the beginning of each dataset: samples, their bytes, and some of them.

    A file of which a share was read is taken to go on as it began, and validation's samples to stop at their limit. The
    samples stand in the order of their hashes, from every dataset as many as it has a share in the bytes. None where a
    dataset is no file that is here.

    Raises:
        ValueError: a row of another shape.
    """
    data = [(n, d) for n, d in enumerate(config.prepare.data) if not d.heldout]
    if not all(Path(d.data).is_file() and Path(d.data).suffix in BEGUN for _, d in data):
        return None
    split = _Split(config)
    parts: list[tuple[float, list[Sample]]] = []  # how many each piece stands for, and the pieces
    for n, dataset in data:
        found = Taken()
        rows, share = beginning(dataset, f"prepare.data.{n}.data", _PREVIEW_BYTES)
        known = len(split.waiting)
        pieces = [s for part, s in split.pieces(dataset, rows, found) if part == "train"]
        pieces += [s for _, document in split.waiting[known:] for s in document]
        scale = 1.0 if found.taken == dataset.limit else 1 / share
        if dataset.limit is not None and found.taken:
            scale = min(scale, dataset.limit / found.taken)
        parts.append((scale, sorted(pieces, key=lambda s: s.id)))
    evaluated = {s.id for part, s in split.settled() if part == "validation"}
    train = [[s for s in pieces if s.id not in evaluated] for _, pieces in parts]
    sizes = [scale * _bytes(pieces) for (scale, _), pieces in zip(parts, train, strict=True)]
    shares = [math.ceil(_PREVIEW_SAMPLES * size / max(sum(sizes), 1)) for size in sizes]
    some = [s for share, pieces in zip(shares, train, strict=True) for s in pieces[:share]]
    over, over_bytes = _over(config, [(scale, s) for scale, pieces in parts for s in pieces if s.id in evaluated])
    samples = over + sum(scale * len(pieces) for (scale, _), pieces in zip(parts, train, strict=True))
    return samples, over_bytes + sum(sizes), sorted(some, key=lambda s: s.id)


def _over(config: Config, evaluated: Sequence[tuple[float, Sample]]) -> tuple[float, float]:
    """Samples and bytes that go over the limit of validation, and so are trained on, where files go on as they began.

    Args:
        evaluated: what validation takes of the beginnings; how many samples each stands for, and the sample.
    """
    domains: dict[str, list[tuple[float, Sample]]] = {}
    for scale, sample in evaluated:
        domains.setdefault(sample.domain, []).append((scale, sample))
    samples = size = 0.0
    for found in domains.values():
        count = sum(scale for scale, _ in found)
        over = max(count - max(config.prepare.validation_limit, len(found)), 0.0)
        samples += over
        size += over / count * sum(scale * _bytes([sample]) for scale, sample in found)
    return samples, size


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write `train.parquet`, `validation.parquet`, which may hold nothing, and `heldout.parquet`; returns counts.

    Raises:
        ValueError: a dataset that is missing, empty or has a row of another shape; or nothing to train or measure on.
    """
    return cluster.on_main(lambda: _write(config, out))


def _write(config: Config, out: Artifact) -> dict[str, Any]:
    split = _Split(config)
    # in the order of their hashes: groups are mixtures of all domains, on every machine the same
    parts = {part: Sorted(out.folder / "work" / part) for part in PARTS}
    for part, sample in split.samples():
        parts[part].add(sample)
    for sample in split.lent():
        parts["train"].drop(sample)
        parts["validation"].add(sample)
    for part, what in _NEEDED.items():
        if not len(parts[part]):
            raise ValueError(f"prepare: no sample is left to {what}")
    sizes = {part: samples.bytes for part, samples in parts.items()}
    for part, samples in parts.items():
        samples.write(out.folder / f"{part}.parquet")
    counts = {**dict.fromkeys(PARTS, 0), **split.counts}
    return {"samples": counts, "left out": {k: n for k, n in split.left_out.items() if n}, "bytes": sizes}


def _bytes(samples: Iterable[Sample]) -> int:
    return sum(size for sample in samples for size in sample.sizes())
