"""Capture: one source reads every training sample once; what it expects next is kept."""

import hashlib
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion import cluster, hub, tracking
from fusion.artifact import Artifact, Journal, file_digest, read_manifest, sweep
from fusion.capture.cache import (
    FORMAT,
    VOCABULARY,
    Cache,
    intact,
    read_vocabulary,
    shard_facts,
    shard_name,
    write_index,
    write_shard,
    write_vocabulary,
)
from fusion.capture.calibrate import trial as trial  # for the plan, by way of the pipeline
from fusion.capture.chats import try_templates as try_templates  # for the pipeline
from fusion.capture.coder import Coder
from fusion.capture.reader import NOT_FINITE, TOO_LONG, Batch, Reader
from fusion.config import Config, Model
from fusion.corpus import Corpus
from fusion.records import Carries, Sample

_NO_FACTS = {"samples": 0, "left out": 0, "tokens": 0, "nats": 0.0, "content_bytes": 0}
_CALIBRATED = 32  # samples that tell which ids are frequent


def run(config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
    """Read the samples in `inputs["prepare"]` with the source `out.subject`; write a cache, a shard a group of samples.

    Shards that are there already are kept, so a run that was cut off goes on, on any number of ranks.

    Raises:
        ValueError: a model that does not load, a sample longer than its context, or logits that are not finite.
    """
    source = next(m for m in (config.pivot, *config.sources) if m.name == out.subject)
    corpus = Corpus(inputs["prepare"], "train")
    reader = Reader(source, inputs["model"], config.capture)
    claims = cluster.on_main(lambda: _begin(out.folder))
    files = [VOCABULARY, *(shard_name(n) for n in range(corpus.groups))]
    broken = {name for part in cluster.together(lambda: _broken(out, files)) for name in part}
    missing: list[int] = []
    about = {"key": out.key, "source": source.name, "model": source.model, "tokenizer": reader.renderer.table.digest}
    start = time.monotonic()
    if broken:
        journal = Journal(out.folder, str(cluster.rank()))
        cluster.together(reader.load)
        try:
            if VOCABULARY in broken:
                cluster.together(lambda: _write_order(out.folder, reader, corpus, journal))
            order = read_vocabulary(out.folder / VOCABULARY)
            told = {**about, "vocabulary": hashlib.sha256(order.tobytes()).hexdigest()}
            others = cluster.on_main(lambda: _of_another_order(out.folder, set(files[1:]) - broken, told))
            missing = [n for n in range(corpus.groups) if shard_name(n) in broken | others]
            work = _Work(out.folder, reader, Coder(order, reader.temperature), corpus, journal, told)
            cluster.together(lambda: work.capture(missing, claims))
        finally:
            reader.close()
    seconds = time.monotonic() - start

    def finish() -> dict[str, Any]:
        write_index(out.folder, files[1:])
        new = sum(shard_facts(out.folder / shard_name(n))["facts"]["tokens"] for n in missing)
        return {
            **about,
            "config": file_digest(inputs["model"] / "config.json"),
            **_facts(out.folder, files[1:], reader),
            "tokens a second": round(new / seconds, 1) if missing else None,
        }

    return cluster.on_main(finish)


def repair(folder: Path, files: Mapping[str, Mapping[str, Any]], broken: set[str]) -> None:
    """Make a finished folder an unfinished one that lacks its broken files alone."""
    Journal(folder, "before").note({name: told for name, told in files.items() if name not in broken})


def accept(config: Config, out: Artifact) -> None:
    """Look at a cache that was finished before with the settings of now.

    Raises:
        ValueError: samples were left out that may not be.
    """
    settings = config.capture
    refused = {TOO_LONG: settings.too_long == "refuse", NOT_FINITE: settings.on_nonfinite == "stop"}
    for id, why in Cache(out.folder, None, out.subject).left_out.items():
        if refused.get(why):
            key, skip = ("too_long", "refuse") if why == TOO_LONG else ("on_nonfinite", "stop")
            raise ValueError(
                f"{out.subject}: its cache {out.folder} was captured without sample {id} ({why}), and capture.{key} is "
                f"{skip} now; set it to skip, or change the samples"
            )


def admit(config: Config, source: Model, folder: Path, weights: str | None, prepared: Path) -> None:
    """Look at a cache that the config names, which was captured by another run.

    Args:
        folder: the source's.
        weights: the key of its weights and tokenizer, None where the weights are not here. Its config is.

    Raises:
        ValueError: it is another model's, or lacks samples of this run.
    """
    cache = Cache(Path(str(source.cache)), None, source.name)
    manifest = {"inputs": {}, "settings": {}, **read_manifest(Path(str(source.cache)))}
    other = weights is not None and manifest["inputs"].get("model") != weights
    if other or cache.facts["config"] != file_digest(folder / "config.json"):
        raise ValueError(
            f"{source.name}: the cache {source.cache} was made by {cache.facts['model']}, and {source.model} is "
            "another model or revision"
        )
    template = manifest["settings"].get("template")
    if template != hub.template_of(source):
        raise ValueError(
            f"{source.name}: the cache {source.cache} was captured with another chat template ({str(template)[:40]!r})"
        )
    settings = config.capture
    allowed = {TOO_LONG: settings.too_long == "skip", NOT_FINITE: settings.on_nonfinite == "skip"}
    corpus = Corpus(prepared, "train")
    lacking = [id for id in corpus.ids() if id not in cache and not allowed.get(cache.left_out.get(id, ""), False)]
    if lacking:
        raise ValueError(
            f"{source.name}: the cache {source.cache} lacks {len(lacking)} of {len(corpus)} samples, {lacking[0]} for "
            "one: they were changed or added since"
        )


def _begin(folder: Path) -> Path:
    """Clear away what a killed run left; a folder for the claims of this one, which no claim of an older run is in."""
    sweep(folder)
    for old in folder.glob("work/claims-*"):
        shutil.rmtree(old, ignore_errors=True)
    return folder / "work" / f"claims-{uuid.uuid4().hex[:12]}"


def _broken(out: Artifact, files: list[str]) -> set[str]:
    """This rank's share of the files: those that are not finished, or not as they were when they were finished."""
    mine = cluster.share(files)
    noted = Journal.read(out.folder)
    whole = Journal.whole(out.folder, mine)
    # a shard that nobody wrote down (it was killed before, or the manifest was lost) vouches for itself
    lost = [name for name in mine if name not in noted and name != VOCABULARY]
    whole |= {name for name in lost if intact(out.folder / name)}
    shards = whole - {VOCABULARY}
    return set(mine) - whole | {name for name in shards if shard_facts(out.folder / name).get("key") != out.key}


def _write_order(folder: Path, reader: Reader, corpus: Corpus, journal: Journal) -> None:
    """Rank the source's ids by how probable they are on some samples; all ranks do the same, one writes."""
    batches = list(reader.batches(corpus.group(0)[:_CALIBRATED], {}))
    frequencies = reader.frequencies(batches)
    if cluster.is_main():
        write_vocabulary(folder / VOCABULARY, np.argsort(-frequencies, kind="stable").astype(np.int32))
        journal.add(folder / VOCABULARY)


def _of_another_order(folder: Path, names: set[str], about: Mapping[str, Any]) -> set[str]:
    """Shards whose ids are ranked otherwise: the ranks were lost, and did not come out the same again."""
    return {name for name in names if shard_facts(folder / name)["vocabulary"] != about["vocabulary"]}


@dataclass
class _Shard:
    """A group of samples on its way to a file."""

    number: int
    samples: list[Sample]
    left: int = 0  # batches still to be read
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    nats: dict[str, float] = field(default_factory=dict)  # of each sample: added up in one order, whatever the batches
    facts: dict[str, Any] = field(default_factory=lambda: {**_NO_FACTS})


class _Work:
    """One rank's part of a capture."""

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        coder: Coder,
        corpus: Corpus,
        journal: Journal,
        about: Mapping[str, Any],
    ):
        self._folder, self._reader, self._coder = folder, reader, coder
        self._corpus, self._journal = corpus, journal
        self._about = {**about, "sampler": reader.settings.sampler, "temperature": reader.temperature}

    def capture(self, missing: list[int], claims: Path) -> None:
        """Read and write the shards that this rank claims."""
        name, total = self._reader.source.name, -(-len(missing) // cluster.world())
        steps = self._steps(tracking.progress(cluster.claims(missing, claims), f"capture {name}", total))
        if self._reader.spread:
            cluster.in_step(steps, self._step)
            return
        try:
            for step in steps:
                self._step(step)
        except (ValueError, OSError):
            cluster.close_claims(claims)  # the others end with what they are at, and all hear of it
            raise

    def _steps(self, numbers: Iterator[int]) -> Iterator[tuple[_Shard, Batch]]:
        for n in numbers:
            shard = _Shard(n, self._corpus.group(n))
            left_out: dict[int, str] = {}
            batches = list(self._reader.batches(shard.samples, left_out))
            shard.rows.update({shard.samples[m].id: _left_out(shard.samples[m].id, why) for m, why in left_out.items()})
            shard.left = len(batches)
            if not batches:
                self._write(shard)
            for batch in batches:
                yield shard, batch

    def _step(self, step: tuple[_Shard, Batch] | None) -> None:
        if step is None:
            self._reader.read(None)
            return
        shard, batch = step
        said, left_out = self._reader.read(batch)
        shard.rows.update({id: _left_out(id, why) for id, why in left_out.items()})
        for one in said:
            shard.rows[one.id] = self._coder.encode(one)
            content = one.heard.carries == Carries.CONTENT
            shard.facts["samples"] += 1
            shard.facts["tokens"] += len(content)
            shard.facts["content_bytes"] += one.heard.content_bytes
            shard.nats[one.id] = -float(one.heard.logp[content].sum(dtype=np.float64))
        shard.left -= 1
        if not shard.left:
            self._write(shard)

    def _write(self, shard: _Shard) -> None:
        path = self._folder / shard_name(shard.number)
        shard.facts["nats"] = sum(shard.nats.get(sample.id, 0.0) for sample in shard.samples)
        shard.facts["left out"] = len(shard.rows) - shard.facts["samples"]
        write_shard(path, [shard.rows[s.id] for s in shard.samples], {**self._about, "facts": shard.facts})
        self._journal.add(path)


def _left_out(id: str, why: str) -> dict[str, Any]:
    return {"id": id, "left_out": why}


def _facts(folder: Path, names: list[str], reader: Reader) -> dict[str, Any]:
    sums, size = dict(_NO_FACTS), (folder / VOCABULARY).stat().st_size
    for name in names:
        for key, value in shard_facts(folder / name)["facts"].items():
            sums[key] += value
        size += (folder / name).stat().st_size
    return {
        "cache format": FORMAT,
        "shards": len(names),
        "sampler": reader.settings.sampler,
        "temperature": reader.temperature,
        "samples": sums["samples"],
        "left out": sums["left out"],
        "tokens": sums["tokens"],
        "bytes on disk": size,
        "bytes a token": round(size / max(sums["tokens"], 1), 2),
        "train bits per byte": round(sums["nats"] / max(sums["content_bytes"], 1) / float(np.log(2)), 4),
    }
