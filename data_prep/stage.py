"""Prepare: the config's datasets → train and held-out samples, told apart by the hash of their content."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.samples import cut, fraction, matches, read_rows, to_sample, unique
from fusion import cluster, tracking
from fusion.artifact import Artifact
from fusion.config import Config, Dataset
from fusion.corpus import write_samples
from fusion.records import Sample

PARTS = ("train", "heldout")


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
            taken, rows = 0, 0
            for where, row in tracking.progress(
                read_rows(dataset, f"prepare.data.{n}.data"), f"prepare {dataset.data}"
            ):
                rows += 1
                if not matches(row, dataset.where):
                    continue
                sample = to_sample(row, where, dataset.domain)
                if sample is None:
                    self.left_out["blank"] += 1
                    continue
                part = self.part_of(sample, dataset)
                if part is None:
                    continue
                taken += 1
                yield from self._pieces(sample, part)
                if taken == dataset.limit:
                    break
            if not taken:
                left = "`where`, blank ones and prepare.train_share"
                why = "has no rows" if not rows else f"has {rows} rows and none is left after {left}"
                raise ValueError(f"prepare.data.{n}.data: {dataset.data} {why}")

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
    sizes = {p: sum(len(s.encode()) for x in by_part[p] for s in x.segments()) for p in PARTS}
    return {"samples": dict(split.counts), "left out": {k: n for k, n in split.left_out.items() if n}, "bytes": sizes}
