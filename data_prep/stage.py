"""Prepare: the config's datasets → train and held-out samples, told apart by the hash of their content."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.samples import BEGUN, beginning, cut, fraction, matches, read_rows, to_sample, unique
from fusion import cluster, tracking
from fusion.artifact import Artifact
from fusion.config import Config, Dataset
from fusion.corpus import write_samples
from fusion.records import Sample

PARTS = ("train", "heldout")
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

    def part_of(self, sample: Sample, dataset: Dataset) -> str | None:
        """`train`, `heldout` or neither, for a whole document or chat."""
        prepare = self.config.prepare
        if dataset.heldout:
            return "heldout"
        if not any(d.heldout for d in prepare.data) and fraction(sample.id, 0) < prepare.heldout_share:
            return "heldout"
        return "train" if fraction(sample.id, 1) < prepare.train_share else None

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Every piece with its part."""
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

    def pieces(self, dataset: Dataset, rows: Iterable[tuple[str, dict]], found: Taken) -> Iterator[tuple[str, Sample]]:
        """The pieces of one dataset's rows with their parts, counted in `found`."""
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
        for piece in fresh:
            if part == "heldout" and self.counts[f"heldout {piece.domain}"] >= self.config.prepare.heldout_limit:
                self.left_out["over prepare.heldout_limit"] += 1
                continue
            self.counts[f"{part} {piece.domain}"] += 1
            self.counts[part] += 1
            yield part, piece


def preview(config: Config) -> tuple[float, float, list[Sample]] | None:
    """What there will be to train on, from the beginning of each dataset: samples, their bytes, and some of them.

    A file of which a share was read is taken to go on as it began. The samples stand in the order of their hashes, from
    every dataset as many as it has a share in the bytes. None where a dataset is no file that is here.

    Raises:
        ValueError: a row of another shape.
    """
    data = [(n, d) for n, d in enumerate(config.prepare.data) if not d.heldout]
    if not all(Path(d.data).is_file() and Path(d.data).suffix in BEGUN for _, d in data):
        return None
    split, parts = _Split(config), []
    for n, dataset in data:
        found = Taken()
        rows, share = beginning(dataset, f"prepare.data.{n}.data", _PREVIEW_BYTES)
        pieces = [s for part, s in split.pieces(dataset, rows, found) if part == "train"]
        scale = 1.0 if found.taken == dataset.limit else 1 / share
        if dataset.limit is not None and found.taken:
            scale = min(scale, dataset.limit / found.taken)
        parts.append((scale * len(pieces), scale * _bytes(pieces), sorted(pieces, key=lambda s: s.id)))
    size = sum(part[1] for part in parts)
    some = [s for _, mine, pieces in parts for s in pieces[: math.ceil(_PREVIEW_SAMPLES * mine / max(size, 1))]]
    return sum(part[0] for part in parts), size, sorted(some, key=lambda s: s.id)


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Write `train.parquet` and `heldout.parquet`; returns counts.

    Raises:
        ValueError: a dataset that is missing, empty or has a row of another shape; or nothing to train or measure on.
    """
    return cluster.on_main(lambda: _write(config, out))


def _write(config: Config, out: Artifact) -> dict[str, Any]:
    split = _Split(config)
    by_part: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for part, sample in split.samples():
        by_part[part].append(sample)
    for part in PARTS:
        if not by_part[part]:
            what = (
                "train on"
                if part == "train"
                else "measure on; raise prepare.heldout_share or mark a dataset `heldout: true`"
            )
            raise ValueError(f"prepare: no sample is left to {what}")
    for part, samples in by_part.items():
        # in the order of their hashes: groups are mixtures of all domains, on every machine the same
        write_samples(out.folder / f"{part}.parquet", sorted(samples, key=lambda s: s.id))
    sizes = {p: _bytes(by_part[p]) for p in PARTS}
    return {"samples": dict(split.counts), "left out": {k: n for k, n in split.left_out.items() if n}, "bytes": sizes}


def _bytes(samples: Iterable[Sample]) -> int:
    return sum(len(segment.encode()) for sample in samples for segment in sample.segments())
