"""Sources made up for the tests of the distill room, held in memory; and by hand: what they cost, what they weigh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from fusion.align import vocabulary
from fusion.align.map import Map
from fusion.align.projector import Plain
from fusion.align.spelling import Spelling
from fusion.distill.cost import Segments
from fusion.distill.dataset import Example
from fusion.distill.gate import Gate
from fusion.records import Carries, Heard, Message, Rendered, Sample, Sparse, sample_id
from fusion.tokens.render import Renderer

CONTENTS = (
    "The cat sat on the mat.",
    "def add(one, two):\n    return one + two\n",
    "Führer naïve café 🙂 48",
    "  two spaces, the end  ",
    "a",
)
TEXTS = tuple(Sample(sample_id(text), "test", text) for text in CONTENTS)


def chat(*answers: str) -> Sample:
    """A chat with these assistant's turns, a question before each."""
    messages = tuple(m for answer in answers for m in (Message("user", "q"), Message("assistant", answer)))
    return Sample(sample_id(None, messages), "test", None, messages)


CHAT = chat("It is a day.", "a")
SAMPLES = (*TEXTS, CHAT)

Rows = list[dict[str, Any]]


def heard(
    rendered: Rendered, logp: np.ndarray | Sequence[float] | float = -1.0, entries: Sparse | None = None
) -> Heard:
    """What a source that renders a sample so, and is as sure of its tokens as told, says of it."""
    at = np.flatnonzero(rendered.carries)
    told = np.broadcast_to(np.asarray(logp, dtype=np.float32), at.shape)
    none = Sparse(np.zeros(len(at) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    ids, places, carries = rendered.ids[at + 1], rendered.boundary[at], rendered.carries[at]
    return Heard(ids, places, carries, told, entries or none, rendered.content_bytes)


def row_of(
    sample: Sample, r: Rendered, logp: np.ndarray, kept: np.ndarray, entry_ids: np.ndarray, entry_logp: np.ndarray
) -> dict[str, Any]:
    """A cache row: of each position that carries loss the log-probability and the count of its entries; all entries."""
    at = np.flatnonzero(r.carries)
    return {
        "id": sample.id,
        "content_bytes": r.content_bytes,
        "tokens": r.ids[at + 1],
        "boundary": r.boundary[at].astype(np.int32),
        "carries": r.carries[at],
        "logp": logp,
        "kept": kept.astype(np.uint16),
        "entry_ids": entry_ids.astype(np.int32),
        "entry_logp": entry_logp.astype(np.float16),
    }


def invented(renderer: Renderer, samples: Sequence[Sample], seed: int, logp: float = -1.0, k: int = 5) -> Rows:
    """Cache rows of a source that says something at random, 0 to k entries a position, and is as sure as told."""
    random, rows = np.random.default_rng(seed), []
    for sample in samples:
        r = renderer.render(sample)
        at = np.flatnonzero(r.carries)
        kept = random.integers(0, k + 1, len(at))
        ids = [random.permutation(len(renderer.table))[:n] for n in kept]
        probs = [np.sort(random.dirichlet(np.ones(n + 1)))[::-1][:n] for n in kept]
        said = np.full(len(at), logp, dtype=np.float32)
        rows.append(row_of(sample, r, said, kept, np.concatenate([[], *ids]), np.log(np.concatenate([[], *probs]))))
    return rows


def said_by_hand(renderer: Renderer, sample: Sample, said: Sequence[Mapping[int, float]]) -> Rows:
    """A cache row with these entries, whose probabilities are powers of two: exact in float16 logarithms or nearly."""
    row = invented(renderer, [sample], seed=0)[0]
    row["kept"] = np.array([len(s) for s in said], dtype=np.uint16)
    row["entry_ids"] = np.array([i for s in said for i in s], dtype=np.int32)
    row["entry_logp"] = np.log(np.array([p for s in said for p in s.values()])).astype(np.float16)
    return [row]


class _Held:
    def __init__(self, rows: Rows):
        self._heard = {str(row["id"]): _heard(row) for row in rows}

    def get(self, id: str) -> Heard | None:
        return self._heard.get(id)


def _heard(row: Mapping[str, Any]) -> Heard:
    offsets = np.concatenate([[0], np.cumsum(row["kept"], dtype=np.int64)])
    said = Sparse(offsets, row["entry_ids"], np.exp(row["entry_logp"].astype(np.float32)))
    boundary = row["boundary"].astype(np.int64)
    return Heard(row["tokens"], boundary, row["carries"], row["logp"], said, row["content_bytes"])


def held(rows: Rows) -> Any:
    """What a cache gives back of these rows."""
    return _Held(rows)


def entries(row: Mapping[str, Any]) -> list[dict[int, float]]:
    """The kept entries of each position of a cache row, id → probability."""
    stops = np.cumsum(row["kept"], dtype=int)
    return [
        {
            int(i): float(np.exp(p.astype(np.float32)))
            for i, p in zip(row["entry_ids"][a:b], row["entry_logp"][a:b], strict=True)
        }
        for a, b in zip(stops - row["kept"], stops, strict=True)
    ]


def taught(example: Example) -> list[dict[int, float]]:
    """The entries of each position of an example, id → probability."""
    of, t = example.taught.offsets, example.taught
    return [
        dict(zip(t.ids[a:b].tolist(), t.probs[a:b].tolist(), strict=True)) for a, b in zip(of, of[1:], strict=False)
    ]


def plain(matrix: csr_array, source: Renderer, target: Renderer) -> Plain:
    """A map that is used as it is, nothing followed along the text."""
    size = len(target.table)
    return Plain(Map(matrix, csr_array((size, size)), Spelling.of(source.table), Spelling.of(target.table)), size)


def same(renderer: Renderer) -> Plain:
    """The map of a source that is the target."""
    return plain(vocabulary.identity(len(renderer.table)), renderer, renderer)


# ---------------------------------------------------------------- by hand


def weigh(
    bits: Sequence[float], gate: Gate, temperature: float, fixed: Mapping[str, float], names: Sequence[str]
) -> list[float]:
    """The weights of sources on one unit, by the definitions."""
    here = [n for n, b in enumerate(bits) if not math.isnan(b)]
    raw = [0.0] * len(bits)
    if gate == "min_ce" and here:
        raw[min(here, key=lambda n: (bits[n], n))] = 1.0
    for n in here:
        if gate == "avg_ce":
            least = min(bits[m] for m in here)
            raw[n] = 1.0 if least == math.inf else math.exp((least - bits[n]) / temperature)
        if gate == "all":
            raw[n] = 1.0
        if gate == "fixed":
            raw[n] = fixed.get(names[n], 0.0)
    return [w / sum(raw) if sum(raw) else 0.0 for w in raw]


def runs(rendered: Rendered) -> list[tuple[list[int], list[int]]]:
    """Of each stretch of positions that carry loss, numbers among these: those of its content, those of its end.

    Between two stretches lies a question, and after an end nothing.
    """
    found: list[tuple[list[int], list[int]]] = []
    at = np.flatnonzero(rendered.carries).tolist()
    for n, i in enumerate(at):
        if not n or at[n - 1] != i - 1:
            found.append(([], []))
        found[-1][int(rendered.carries[i] == Carries.END)].append(n)
    return found


def sizes(sample: Sample) -> list[int]:
    """Bytes of each segment."""
    return [len(text.encode()) for text in sample.segments()]


def drawn(rendered: Rendered, seed: int) -> Heard:
    """A reading with other costs at each position."""
    return heard(rendered, -np.random.default_rng(seed).uniform(0.1, 9, int((rendered.carries > 0).sum())))


def pieces_of(renderer: Renderer, said: Heard, content: Sequence[int], first: int) -> list[int]:
    """Bytes of these tokens, less a mark at the place before the segment."""
    return [len(renderer.table.pieces[said.ids[n]]) - int(said.boundary[n] == first) for n in content]


def by_itself(renderer: Renderer, rendered: Rendered, said: Heard, *lengths: int) -> list[float]:
    """Each token's own cost over its own bytes; one without bytes goes with the next, an end is a byte."""
    expected: list[float] = []
    for first, (content, end) in zip(Segments.of([*lengths, 0]).first, runs(rendered), strict=False):
        waiting: list[float] = []
        for n, size in zip(content, pieces_of(renderer, said, content, int(first)), strict=True):
            waiting.append(-float(said.logp[n]))
            if size:
                expected += [sum(waiting) / size / math.log(2)] * len(waiting)
                waiting = []
        assert not waiting
        expected += [-sum(float(said.logp[n]) for n in end) / math.log(2)] * len(end)
    return expected


def spread(
    renderer: Renderer, rendered: Rendered, said: Heard, lengths: Sequence[int]
) -> list[tuple[list[float], float]]:
    """Of each segment, the cost of each of its bytes in bits (NaN where none is predicted), and that of its end."""
    found = []
    for first, size, (content, end) in zip(
        Segments.of(list(lengths)).first, lengths, runs(rendered) or [([], [])], strict=True
    ):
        costs: list[float] = []
        waiting = 0.0
        for n, bytes_ in zip(content, pieces_of(renderer, said, content, int(first)), strict=True):
            waiting += -float(said.logp[n]) / math.log(2)
            costs += [waiting / bytes_] * bytes_ if bytes_ else []
            waiting = 0.0 if bytes_ else waiting
        costs = [math.nan] * (size - len(costs)) + costs
        found.append((costs, -sum(float(said.logp[n]) for n in end) / math.log(2) if end else math.inf))
    return found


def on_tokens(
    target: Renderer, rendered: Rendered, lengths: Sequence[int], costs: list[tuple[list[float], float]]
) -> list[float]:
    """The mean over each target token's bytes."""
    expected: list[float] = []
    own = heard(rendered)
    for first, (content, end), (by_byte, of_end) in zip(
        Segments.of(list(lengths)).first, runs(rendered), costs, strict=True
    ):
        sizes = pieces_of(target, own, content, int(first))
        at = len(by_byte) - sum(sizes)
        for n in range(len(content)):
            there = [c for c in by_byte[at : at + next((s for s in sizes[n:] if s), 0)] if not math.isnan(c)]
            expected.append(sum(there) / len(there) if there else math.inf)
            at += sizes[n]
        expected += [of_end] * len(end)
    return expected
