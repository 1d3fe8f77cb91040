"""What each way to keep a distribution loses: bytes on disk, divergence, and what a student's gradient becomes.

python benchmarks/cache_fidelity.py [--model FOLDER ...] [--text FILE ...] [--positions N] [--json OUT]

Each position's distribution is kept, written to a shard and read back. A student (the model with noise on its
weights, or --student) then learns from what was read. Of its gradient in the logits the table has the angle to the
dense teacher's and the ratio of their lengths, twice: over all positions side by side, where every error counts,
and summed into the gradient of the output head, where unbiased errors cancel as they do in training.
"""

import argparse
import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow.parquet as pq
import torch

from fusion.capture import sample as samplers
from fusion.capture.cache import write_shard
from fusion.capture.coder import Coder, Said
from fusion.capture.head import Halves
from fusion.capture.reader import NO_ENTRIES, columns_of
from fusion.capture.sample import Kept
from fusion.records import Heard, Sample

WAYS = (
    "top_k 12",
    "top_k 50",
    "top_k 64",
    "top_k 300",
    "nucleus 0.95 64",
    "random 12",
    "random 25",
    "random 50",
    "random 100",
    "hybrid 4 25",
    "hybrid 8 25",
    "hybrid 8 50",
    "hybrid 16 50",
)
_SMOOTH = 1e-3  # mass spread over all ids before a divergence is taken: what is not kept is not impossible
_LARGEST_HEAD = 1 << 27  # weights of a head whose gradient is summed


@dataclass
class Sums:
    """What one way to keep distributions comes to."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    kl: float = 0.0
    entries: int = 0
    mass: float = 0.0
    mean: Any = 0.0
    dots: np.ndarray = field(default_factory=lambda: np.zeros(2))  # with the dense gradient, with itself
    head: Any = 0.0


def keep(way: str, logits: torch.Tensor, following: torch.Tensor, id: str, at: np.ndarray) -> Kept:
    """`SAMPLER NUMBER...`: top_k K, nucleus MASS K, random N [TEMPERATURE], hybrid K N [TEMPERATURE]."""
    name, *numbers = way.split()
    if name == "top_k":
        return samplers.top_k(logits, following, int(numbers[0]))
    if name == "nucleus":
        return samplers.nucleus(logits, following, float(numbers[0]), int(numbers[1]))
    if name not in ("random", "hybrid"):
        raise ValueError(f"--way {way!r}: is none of top_k, nucleus, random, hybrid")
    k = int(numbers.pop(0)) if name == "hybrid" else 0
    temperature = float(numbers[1]) if len(numbers) > 1 else 1.0
    uniform = torch.from_numpy(samplers.uniforms(id, at, int(numbers[0]))).to(logits.device)
    return samplers.hybrid(logits, following, k, uniform, temperature)


def temperature_of(way: str) -> float:
    """Of the proposal."""
    name, *numbers = way.split()
    places = {"random": 1, "hybrid": 2}
    return float(numbers[places[name]]) if name in places and len(numbers) > places[name] else 1.0


def said_of(sample: Sample, read: Any, at: np.ndarray, kept: Kept) -> Said:
    """What the cache is given."""
    following = torch.from_numpy(read.ids[at + 1].astype(np.int64)).to(kept.ids.device)
    next_logp, *columns = columns_of(kept, following)
    heard = Heard(read.ids[at + 1], read.boundary[at], read.carries[at], next_logp, NO_ENTRIES, read.content_bytes)  # type: ignore[arg-type]
    return Said(sample.id, heard, *columns)


def dense(heard: Heard, width: int, device: torch.device) -> torch.Tensor:
    """float32 (T, V), the entries that were read back."""
    rows = np.repeat(np.arange(len(heard.ids)), np.diff(heard.entries.offsets))
    kept = torch.zeros((len(heard.ids), width), device=device)
    at = torch.from_numpy(rows).to(device), torch.from_numpy(heard.entries.ids.astype(np.int64)).to(device)
    kept[at] = torch.from_numpy(heard.entries.probs).to(device)
    return kept


def gradient(student: torch.Tensor, kept: torch.Tensor, missing: str) -> torch.Tensor:
    """Of the cross-entropy against `kept`, in the student's logits; as distill/loss.py treats the mass left out."""
    total = kept.sum(-1, keepdim=True)
    if missing == "drop":
        return total * student - kept
    if missing == "renormalise":
        return student - kept / total
    rest = kept == 0
    share = (student * rest).sum(-1, keepdim=True).clamp(min=1e-9)
    return torch.where(rest, student * (1 - (1 - total).clamp(min=0) / share), student - kept)


def noisy(model: Any, noise: float) -> Any:
    """A copy whose every weight is off by Gaussian noise, `noise` times the deviation of its tensor."""
    random = torch.Generator().manual_seed(0)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=random).to(weight)
    return made


def measure(model: str, texts: list[Path], given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model on some texts."""
    source = common.Source(model, given.template)
    device = next(source.model.parameters()).device
    learns = common.Source(given.student).model if given.student else noisy(source.model, given.noise)
    halves = Halves(learns)
    if not halves.split:
        raise ValueError(f"{model}: head and body cannot be told apart")
    sums = {way: Sums() for way in given.way}
    frequencies, chosen, positions = 0.0, [], 0
    for sample in common.samples_of(texts, given.samples, 1500):
        read = source.renderer.render(sample)
        if len(read.ids) <= source.context:
            chosen.append((sample, read, np.flatnonzero(read.carries)))
            positions += len(chosen[-1][2])
        if positions >= given.positions:
            break
    with torch.inference_mode():
        for _, read, at in chosen[:16]:
            frequencies = frequencies + source.logits(read, at).softmax(-1).sum(0, dtype=torch.float64).cpu().numpy()
    order = np.argsort(-frequencies, kind="stable").astype(np.int32)
    coders = {way: Coder(order, temperature_of(way)) for way in given.way}
    own, costs, true_mean, whole = np.zeros(2), np.zeros(2), 0.0, 0.0
    with torch.inference_mode():
        for sample, read, at in chosen:
            logits = source.logits(read, at)
            q = logits.softmax(-1)
            ids = torch.from_numpy(read.ids[None].astype(np.int64)).to(device)
            hidden = halves.hidden(ids, torch.ones_like(ids))[0][torch.from_numpy(at).to(device)]
            student = halves.logits(hidden).float().softmax(-1)
            following = ids[0][torch.from_numpy(at + 1).to(device)]
            rows = torch.arange(len(at), device=device)
            costs -= [float(p[rows, following].log().sum()) for p in (q, student)]
            wanted = student - q
            own += [len(at), float(wanted.double().square().sum())]
            true_mean = true_mean + q.sum(0, dtype=torch.float64)
            fits = student.shape[1] * hidden.shape[1] <= _LARGEST_HEAD
            whole = whole + (wanted.T @ hidden.float()).double() if fits else 0.0
            for way, sum in sums.items():
                row = coders[way].encode(said_of(sample, read, at, keep(way, logits, following, sample.id, at)))
                heard = coders[way].decode(
                    {k: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else v for k, v in row.items()}
                )
                kept = dense(heard, q.shape[1], device)
                sum.rows.append(row)
                total = kept.sum(-1, keepdim=True)
                smooth = kept + ((1 - total).clamp(min=0) + _SMOOTH) / q.shape[1]
                smooth /= smooth.sum(-1, keepdim=True)
                sum.kl += float(torch.nn.functional.kl_div(smooth.log(), q, reduction="sum"))
                sum.entries += len(heard.entries.ids)
                sum.mass += float(total.sum())
                sum.mean = sum.mean + smooth.sum(0, dtype=torch.float64)
                found = gradient(student, kept, given.missing_mass)
                sum.dots += [float((found * wanted).double().sum()), float(found.double().square().sum())]
                sum.head = sum.head + (found.T @ hidden.float()).double() if fits else 0.0
    n = own[0]
    mean = true_mean / n
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, sum in sums.items():
            path = Path(folder) / "shard.parquet"
            write_shard(path, sum.rows, {})
            assert pq.read_metadata(path).num_rows == len(sum.rows)
            summed = {}
            if isinstance(sum.head, torch.Tensor):
                ratio = float(sum.head.norm() / whole.norm())
                summed = {
                    "head angle": _angle(float((sum.head * whole).sum()) / float(whole.norm() ** 2) / ratio),
                    "head ratio": ratio,
                }
            table[way] = {
                "bytes a token": path.stat().st_size / n,
                "entries": sum.entries / n,
                "mass": sum.mass / n,
                "KL": sum.kl / n,
                "KL of the mean": float((mean * (mean.clamp(min=1e-12) / (sum.mean / n)).log()).sum()),
                "angle": _angle(sum.dots[0] / np.sqrt(sum.dots[1] * own[1])),
                "ratio": float(np.sqrt(sum.dots[1] / own[1])),
                **summed,
            }
    entropy = {"teacher": costs[0] / n / np.log(2), "student": costs[1] / n / np.log(2)}
    return {
        "model": Path(model).name,
        "positions": int(n),
        "vocabulary": len(order),
        "bits a token": entropy,
        "ways": table,
    }


def _angle(cosine: float) -> float:
    return float(np.degrees(np.arccos(min(max(cosine, -1.0), 1.0))))


def main() -> None:
    """Read the options, measure, print."""
    parser = common.arguments("What each way to keep a distribution costs and loses")
    parser.add_argument(
        "--model", action="append", help="a model's folder, or its name in ../shared; default: the zoo's sources"
    )
    parser.add_argument(
        "--text", action="append", type=Path, help="JSON lines with `text`; default: the source's own domain"
    )
    parser.add_argument("--positions", type=int, default=6000, help="positions read, about")
    parser.add_argument("--samples", type=int, default=400, help="texts they are taken from")
    parser.add_argument(
        "--way",
        action="append",
        help="SAMPLER NUMBER...: top_k 12, nucleus 0.95 64, random 50 [0.8], hybrid 8 25 [0.8]",
    )
    parser.add_argument("--student", help="a model with the same vocabulary that learns; default: the model with noise")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="of the student's weights, in deviations of each tensor"
    )
    parser.add_argument("--missing-mass", choices=("ghost", "drop", "renormalise"), default="ghost")
    given = common.parsed(parser)
    given.way = given.way or list(WAYS)
    figures = []
    for model in given.model or list(common.OWN):
        found = measure(model, given.text or list(common.own_texts(model)), given)
        figures.append(found)
        bits = found["bits a token"]
        title = f"{found['model']}: {found['positions']:,} positions, {found['vocabulary']:,} ids; "
        title += f"{bits['teacher']:.2f} bits a token, student {bits['student']:.2f}"
        columns = list(next(iter(found["ways"].values())))
        common.show(title, ["kept", *columns], [[way, *row.values()] for way, row in found["ways"].items()])
    common.write(given.json, figures)


if __name__ == "__main__":
    common.door(main)
