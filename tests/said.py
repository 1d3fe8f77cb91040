"""What a source says of a sample, made up: by hand, or kept by a sampler of random distributions."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from fusion.align.map import Map
from fusion.align.projector import Plain
from fusion.align.spelling import Spelling
from fusion.align.vocabulary import identity
from fusion.capture import sample as samplers
from fusion.capture.coder import Coder, Said
from fusion.records import Heard, Sample, Sparse
from fusion.tokens.render import Renderer

NO_ENTRIES = Sparse(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


@cache
def order_of(vocabulary: int) -> np.ndarray:
    """Ids by rank, in no order of their own."""
    return np.random.default_rng(vocabulary).permutation(vocabulary).astype(np.int32)


def by_hand(
    tokens: Any, places: Any, carries: Any, logp: Any, left: Any, head: tuple[Any, Any], drawn: tuple[Any, Any, Any]
) -> Said:
    """Rows as a reader gives them."""
    n = len(tokens)
    ids, head_logp, hits = (np.asarray(a).reshape(n, -1 if n else 0) for a in (*head, drawn[0]))
    counts, drawn_logp = (np.asarray(a).reshape(hits.shape) for a in drawn[1:])
    heard = Heard(
        np.asarray(tokens, np.int32),
        np.asarray(places, np.int64),
        np.asarray(carries, np.uint8),
        np.asarray(logp, np.float32),
        NO_ENTRIES,
        3 * n,
    )
    exact = ids.astype(np.int64), head_logp.astype(np.float32)
    draws = hits.astype(np.int64), counts.astype(np.int64), drawn_logp.astype(np.float32)
    return Said("0" * 16, heard, np.asarray(left, np.float32), *exact, *draws)


def sampled(
    sampler: str, vocabulary: int, n: int, temperature: float, seed: int, draws: int = 50, id: str = "0" * 16
) -> tuple[Said, np.ndarray]:
    """What a sampler keeps of random distributions, and the distributions, float64 (n, V)."""
    spread = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 6, (n, 1)))
    logits = (spread * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))).float()
    following = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed + 1))
    following[::2] = logits[::2].argmax(-1)
    uniform = torch.from_numpy(samplers.uniforms(id, np.arange(n), draws))
    kept = {
        "top_k": lambda: samplers.top_k(logits, following, 20),
        "nucleus": lambda: samplers.nucleus(logits, following, 0.9, 20),
        "random": lambda: samplers.random(logits, following, uniform, temperature),
        "hybrid": lambda: samplers.hybrid(logits, following, 6, uniform, temperature),
    }[sampler]()
    known = (kept.ids == following[:, None]).any(-1)
    left = (kept.left() - torch.where(known, 0.0, kept.next_logp.exp())).clamp(min=0)
    rng = np.random.default_rng(seed)
    places = np.where(rng.random(n) < 0.3, -1, np.sort(rng.integers(0, 9000, n)))
    heard = Heard(
        following.numpy().astype(np.int32),
        places,
        rng.integers(1, 3, n).astype(np.uint8),
        kept.next_logp.numpy(),
        NO_ENTRIES,
        5 * n,
    )
    columns = [c.numpy() for c in (left, kept.ids, kept.logp, kept.drawn, kept.counts, kept.drawn_logp)]
    return Said(id, heard, *columns), logits.double().softmax(-1).numpy()


def through(coder: Coder, one: Said) -> Heard:
    """Encoded and decoded."""
    row = coder.encode(one)
    assert row["id"] == one.id and row["positions"] == len(one.heard.ids)
    return coder.decode({k: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else v for k, v in row.items()})


def rows_of(heard: Heard) -> Iterator[tuple[list[int], np.ndarray]]:
    """Ids and probabilities of each position."""
    for a, b in zip(heard.entries.offsets[:-1], heard.entries.offsets[1:], strict=True):
        yield heard.entries.ids[a:b].tolist(), heard.entries.probs[a:b].astype(np.float64)


class Held:
    """What a cache gives back, held in memory: sample id → what was heard."""

    def __init__(self, heard: dict[str, Heard]):
        self._heard = heard

    def get(self, id: str) -> Heard | None:
        """As `capture.cache.Cache.get`."""
        return self._heard.get(id)


def invented_sources(renderer: Renderer, samples: Sequence[Sample], count: int = 3) -> dict[str, tuple[Any, Plain]]:
    """Sources with the target's own tokenizer that say something at random of each sample: name → cache, projector."""
    size = len(renderer.table)
    spelling = Spelling.of(renderer.table)
    eye = Plain(Map(identity(size), csr_array((size, size)), spelling, spelling), size)
    made: dict[str, tuple[Any, Plain]] = {}
    for number in range(count):
        rng, heard = np.random.default_rng(number), {}
        for sample in samples:
            r = renderer.render(sample)
            at = np.flatnonzero(r.carries)
            ids = np.concatenate([rng.permutation(size)[:6] for _ in at]).astype(np.int32)
            probs = np.concatenate([rng.dirichlet(np.ones(7))[:6] for _ in at]).astype(np.float32)
            entries = Sparse(np.arange(len(at) + 1) * 6, ids, probs)
            logp = -rng.exponential(2, len(at)).astype(np.float32)
            heard[sample.id] = Heard(r.ids[at + 1], r.boundary[at], r.carries[at], logp, entries, r.content_bytes)
        made[f"source{number}"] = Held(heard), eye
    return made
