"""The cache: bytes a token, coding and reading speed, what a capture costs above a forward pass, and its memory.

python benchmarks/cache.py [--model FOLDER ...] [--text FILE ...] [--limit N] [--json OUT]

One core codes and reads. `curve` rows have a vocabulary of 150,000 ids: at each position the probabilities of a real
model's position, its curve carried on by a power law, handed out to ids by how frequent these are and by chance, as
far as that model's own logits are from their means.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch

from fusion.artifact import Artifact
from fusion.capture import cache as store
from fusion.capture import sample as samplers
from fusion.capture import stage
from fusion.capture.cache import Cache, write_shard
from fusion.capture.coder import Coder, Said
from fusion.capture.reader import NO_ENTRIES, Batch, Reader, columns_of
from fusion.config import Capture, Config, Dataset, Model, Prepare
from fusion.corpus import write_samples
from fusion.records import Heard, Sample
from fusion.tokens.batch import pad

MODELS = ("math-seedoss", "code-neox", "prose-mistral", "pivot-llama")
WAYS = (
    Capture(sampler="random", draws=50),
    Capture(sampler="hybrid", head=8, draws=50),
    Capture(sampler="top_k", k=12),
    Capture(sampler="top_k", k=64),
)
_WIDE = 150_000
PARTS = ("sizes", "curves", "reading", "cost", "memory")


def name_of(way: Capture) -> str:
    """`SAMPLER NUMBER`."""
    return {"random": f"random {way.draws}", "hybrid": f"hybrid {way.head} {way.draws}"}.get(
        way.sampler, f"{way.sampler} {way.k}"
    )


def reader_of(model: str, template: str) -> Reader:
    """A model, loaded."""
    made = Reader(
        Model(str(common.folder_of(model)), "source", template), common.folder_of(model), Capture(too_long="skip")
    )
    made.load()
    return made


def texts_of(path: Path, limit: int) -> list[Sample]:
    """The first texts of a file spread over it, at most 900 characters each."""
    return common.samples_of([path], limit, 900)


def sizes(model: str, paths: Sequence[Path], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes a token and speeds of one model on each text, with each sampler."""
    reader, rows = reader_of(model, given.template), []
    for path in paths:
        batches = list(reader.batches(texts_of(path, given.limit), {}))
        order = np.argsort(-reader.frequencies(batches[:1]), kind="stable").astype(np.int32)
        for way in WAYS:
            reader.settings = replace(way, too_long="skip")
            said = [one for batch in batches for one in reader.read(batch)[0]]
            rows.append({"model": Path(model).name, "text": path.stem, "kept": name_of(way), **coded(said, order)})
    return rows


def curves(reader: Reader, path: Path, limit: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Sample ids with logits over 150,000 ids (float32 (T, V)) and what followed, for a part of each text."""
    chance = torch.Generator().manual_seed(0)
    sums, squares, seen = 0.0, 0.0, 0
    sorted_logp = []
    for batch in reader.batches(texts_of(path, limit), {}):
        for r in batch.rendered:
            at = np.flatnonzero(r.carries)[:64]
            with torch.inference_mode():
                for _, logits in reader._blocks([r], [at]):
                    logp = logits.float().log_softmax(-1)
                    sums, squares, seen = sums + logp.sum(0), squares + logp.square().sum(0), seen + len(logp)
                    sorted_logp.append(logp.sort(-1, descending=True).values)
    mean = sums / seen
    spread = float((squares / seen - mean.square()).clamp(min=0).sqrt().mean())
    ranks = torch.arange(1, _WIDE + 1).double().log()
    narrow = len(mean)
    common_logp = _carried_on(mean.sort(descending=True).values[None], ranks, narrow)[0]
    for n, rows in enumerate(sorted_logp):
        wide = _carried_on(rows, ranks, narrow)
        score = common_logp + spread * torch.randn((len(rows), _WIDE), generator=chance)
        logits = torch.empty_like(wide).scatter_(-1, score.argsort(-1, descending=True), wide).float()
        following = torch.multinomial(logits.exp(), 1, generator=chance)[:, 0]
        yield f"{n:016x}", logits, following


def _carried_on(rows: torch.Tensor, ranks: torch.Tensor, narrow: int) -> torch.Tensor:
    """Sorted log-probabilities over more ids: on by the power law of the last ranks, normalised."""
    first = narrow // 2
    slope = (rows[:, narrow * 9 // 10] - rows[:, first]) / (ranks[narrow * 9 // 10] - ranks[first])
    tail = rows[:, narrow * 9 // 10, None] + slope[:, None] * (ranks[narrow * 9 // 10 :] - ranks[narrow * 9 // 10])
    return torch.cat([rows[:, : narrow * 9 // 10].double(), tail], dim=1).log_softmax(-1)


def wide(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The same for 150,000 ids."""
    path = common.own_texts(model)[0]
    made: dict[str, list[Said]] = {name_of(way): [] for way in WAYS}
    frequencies = torch.zeros(_WIDE, dtype=torch.float64)
    for n, (id, logits, following) in enumerate(curves(reader_of(model, given.template), path, given.limit // 2)):
        if n < 32:
            frequencies += logits.softmax(-1).sum(0, dtype=torch.float64)
        at = np.arange(len(logits))
        places = 1 + np.cumsum(np.random.default_rng(n).integers(1, 8, len(logits)))
        for way in WAYS:
            uniform = torch.from_numpy(samplers.uniforms(id, at, way.draws))
            if way.sampler == "top_k":
                kept = samplers.top_k(logits, following, way.k)
            else:
                kept = samplers.hybrid(logits, following, way.head if way.sampler == "hybrid" else 0, uniform)
            next_logp, *columns = columns_of(kept, following)
            ids, carries = following.numpy().astype(np.int32), np.ones(len(at), np.uint8)
            heard = Heard(ids, places, carries, next_logp, NO_ENTRIES, int(places[-1]))
            made[name_of(way)].append(Said(id, heard, *columns))
    order = np.argsort(-frequencies.numpy(), kind="stable").astype(np.int32)
    told = f"{Path(model).name}, curve"
    return [{"model": told, "text": path.stem, "kept": name, **coded(said, order)} for name, said in made.items()]


def coded(said: list[Said], order: np.ndarray) -> dict[str, Any]:
    """Bytes a token on disk, and how fast a core codes, writes and reads them."""
    coder = Coder(order)
    tokens = sum(len(one.heard.ids) for one in said)
    rows = [coder.encode(one) for one in said[:2]]
    before = time.perf_counter()
    rows = [coder.encode(one) for one in said]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        write_shard(path, rows, {})
        spent = time.perf_counter() - before
        size = path.stat().st_size
    return {"tokens": tokens, "bytes a token": size / tokens, "coded and written, tokens/s": tokens / spent}


def reading(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Reading at random, on one core: a capture of one source, its samples in shuffled order."""
    rows = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            out = captured(given.model[0], texts_of(common.TEXTS[2], given.limit), way, Path(folder))
            ids = np.random.default_rng(0).permutation(list(Cache(out.folder).ids())).tolist()
            speeds = {}
            for told, held in (("shuffled", 64), ("shuffled, nothing kept at hand", 1)):
                store._OPEN, measured = held, []
                for _ in range(3):
                    cache = Cache(out.folder)
                    cache.get(ids[0])
                    before = time.perf_counter()
                    tokens = sum(len(cache.get(id).ids) for id in ids)  # type: ignore[union-attr]
                    measured.append(tokens / (time.perf_counter() - before))
                speeds[f"{told}, tokens/s"] = max(measured)
            store._OPEN = 64
            rows.append({"kept": name_of(way), "tokens": tokens, **speeds})
    return rows


def captured(model: str, samples: list[Sample], way: Capture, folder: Path) -> Artifact:
    """A finished capture."""
    write_samples(folder / "train.parquet", samples, 256)  # as in a large corpus
    source = Model(str(common.folder_of(model)), "source")
    config = Config(
        "benchmark", Model("none"), (source,), Prepare((Dataset("none"),)), capture=replace(way, too_long="skip")
    )
    out = Artifact.planned(folder, "capture", "source", {}, {})
    out.folder.mkdir(parents=True)
    out.publish(stage.run(config, {"prepare": folder, "model": common.folder_of(model)}, out), 0.0)
    return out


def cost(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A capture (reading, keeping, coding, writing) against forward passes of the same batches, turn by turn."""
    reader = reader_of(model, given.template)
    batches = list(reader.batches(texts_of(common.TEXTS[2], min(given.limit, 24)), {}))
    order = np.argsort(-reader.frequencies(batches[:1]), kind="stable").astype(np.int32)
    tokens = sum(int(np.count_nonzero(r.carries)) for batch in batches for r in batch.rendered)
    assert reader._halves is not None
    device = reader._halves._model.device
    rows = []

    def plain(batch: Batch) -> None:
        ids, mask = (torch.from_numpy(array).to(device) for array in pad([r.ids for r in batch.rendered]))
        with torch.inference_mode():
            reader._halves._model(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[union-attr]
        if device.type == "cuda":
            torch.cuda.synchronize()

    for way in WAYS:
        reader.settings, coder = way, Coder(order)
        with tempfile.TemporaryDirectory() as folder:

            def whole() -> None:
                said = [one for batch in batches for one in reader.read(batch)[0]]
                write_shard(Path(folder) / "shard.parquet", [coder.encode(one) for one in said], {})  # noqa: B023

            whole()
            times: list[tuple[float, float]] = []
            for _ in range(given.rounds):
                at = [time.perf_counter()]
                for batch in batches:
                    plain(batch)
                at.append(time.perf_counter())
                whole()
                at.append(time.perf_counter())
                times.append((at[1] - at[0], at[2] - at[1]))
        forward, capture = (median(column) for column in zip(*times, strict=True))
        rows.append(
            {
                "model": Path(model).name,
                "kept": name_of(way),
                "forward, tokens/s": tokens / forward,
                "capture, tokens/s": tokens / capture,
                "above": median(c / f - 1 for f, c in times),
            }
        )
    return rows


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of a capture in a process of its own, of some texts and of ten times as many."""
    rows = []
    for times in (1, 10):
        command = [sys.executable, __file__, "--peak", str(times * given.memory_texts)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        rows.append({"texts": times * given.memory_texts, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def peak(count: int) -> None:
    """Capture texts with a small model, and tell how much memory this process had at most."""
    samples = [s for path in common.TEXTS for s in common.samples_of([path], None, 300)]
    samples = [replace(s, id=f"{n:016x}") for n, s in enumerate((samples * (1 + count // len(samples)))[:count])]
    with tempfile.TemporaryDirectory() as folder:
        out = captured("stories260K", samples, Capture(), Path(folder))
        tokens = Cache(out.folder).facts["tokens"]
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"tokens": tokens, "peak, MB": int(told["VmHWM"].split()[0]) / 1000}))


def main() -> None:
    """Read the options, measure, print."""
    parser = common.arguments("Size, speed, cost and memory of the cache")
    parser.add_argument("--model", action="append", help="a model's folder, or its name in ../shared; default: the zoo")
    parser.add_argument("--curve", action="append", help="models whose curves 150,000 ids get, each in its own domain")
    parser.add_argument(
        "--text",
        action="append",
        type=Path,
        help="JSON lines with `text` or `messages`; default: all of ../shared/text",
    )
    parser.add_argument("--limit", type=int, default=256, help="texts of each file")
    parser.add_argument("--rounds", type=int, default=3, help="of each cost")
    parser.add_argument("--memory-texts", type=int, default=1500, help="texts of the smaller capture")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
    )
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = common.parsed(parser)
    if given.peak:
        peak(given.peak)
        return
    given.model = given.model or list(MODELS)
    texts = given.text or [*common.TEXTS, common.SHARED / "text" / "instruct_chat.jsonl"]
    figures: dict[str, Any] = {}

    def tell(name: str, rows: list[dict[str, Any]]) -> None:
        figures[name] = rows
        columns = list(rows[0])
        common.show(name, columns, [[row[c] for c in columns] for row in rows])

    if "reading" in given.only:
        tell("reading, one core", reading(given))
    if "cost" in given.only:
        tell("a capture above forward passes", [row for model in given.model for row in cost(model, given)])
    if "memory" in given.only:
        tell("memory", memory(given))
    if "sizes" in given.only:
        rows = [row for model in given.model for row in sizes(model, texts, given)]
        tell("bytes a token", rows)
        ways = list(map(name_of, WAYS))
        means = [np.mean([row["bytes a token"] for row in rows if row["kept"] == way]) for way in ways]
        tell(
            "mean of these",
            [{"kept": way, "bytes a token": float(mean)} for way, mean in zip(ways, means, strict=True)],
        )
    if "curves" in given.only:
        curved = [row for model in given.curve or ("math-seedoss", "prose-mistral") for row in wide(model, given)]
        tell("bytes a token, 150,000 ids", curved)
    common.write(given.json, figures)


if __name__ == "__main__":
    common.door(main)
