"""What a source said as bytes and back: as docs/cache.md tells it, and as exactly as it says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from said import by_hand, order_of, rows_of, sampled, through

from fusion.capture import code
from fusion.capture.coder import Coder, Said
from fusion.records import Heard

POSITION, ENTRY = 1024, 48  # log-probabilities are (c / these)² nats


class Page:
    """A row of a shard in plain Python, from docs/cache.md and nothing else: slow, and written a second time."""

    def __init__(self, row: dict[str, Any], order: np.ndarray, temperature: float):
        self.row, self.order, self.temperature = row, order, temperature

    def bits(self, column: str, at: int, count: int) -> int:
        """`count` raw bits from bit `at`, the least significant first."""
        return sum((self.row[column][b // 8] >> b % 8 & 1) << n for n, b in enumerate(range(at, at + count)))

    def number(self, symbol: int, column: str, at: int) -> tuple[int, int]:
        if symbol < 16:
            return symbol, at
        e, three = 4 + (symbol - 16) // 8, (symbol - 16) % 8
        return 2**e + three * 2 ** (e - 3) + self.bits(column, at, e - 3), at + e - 3

    def columns(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        at = 0
        for name in ("tokens", "ends", "carries", "logp", "left", "head", "drawn"):
            found[name] = []
            for symbol in self.row[name]:
                value, at = self.number(symbol, "bits", at)
                found[name].append(value)
        pairs = found["carries"]
        found["carries"] = [v for v, times in zip(pairs[::2], pairs[1::2], strict=True) for _ in range(times)]
        for name in ("head", "drawn"):
            found[name] = found[name] or [0] * len(found["tokens"])
        return found

    def ids(self, sizes: list[int], heads: list[int], at: int) -> tuple[list[list[tuple[int, bool]]], int]:
        rows = []
        for size in sizes:
            row, rank = [], -1
            for _ in range(size):
                value, digits = (rank + 2) // 4, 0
                while value:
                    value, digits = value // 4, digits + 1
                s = min(6, digits)
                symbol, heads[s] = self.row[f"ids_{s}"][heads[s]], heads[s] + 1
                if symbol & 127 == 127:
                    step, at = self.bits("id_bits", at, 32), at + 32
                else:
                    step, at = self.number(symbol & 127, "id_bits", at)
                rank += step + 1
                row.append((int(self.order[rank]), symbol >= 128))
            rows.append(row)
        return rows, at

    def read(self) -> list[tuple[int, int, int, float, dict[int, float]]]:
        """Token, place, carries, log-probability and entries of each position."""
        n = self.columns()
        heads = [0] * 7
        exact, at = self.ids(n["head"], heads, 0)
        drawn, at = self.ids(n["drawn"], heads, at)
        assert heads == [len(self.row[f"ids_{s}"]) for s in range(7)]
        positions, place, h, d, more = [], 0, 0, 0, 0
        for t, rank in enumerate(n["tokens"]):
            token, logp = int(self.order[rank]), -((n["logp"][t] / POSITION) ** 2)
            here = -1 if n["ends"][t] == 0 else place + n["ends"][t] - 1
            place = max(place, here)
            p = np.exp(logp)
            left = np.exp(-((n["left"][t] / POSITION) ** 2)) if n["left"] else 1 - p
            heads_here = {}
            for i, _ in exact[t]:
                heads_here[i] = np.exp(-((self.row["head_logp"][h] / ENTRY) ** 2))
                h += 1
            draws_here = {}
            for i, again in drawn[t]:
                count = 1
                if again:
                    code = self.row["counts"][more // 2] >> 4 * (more % 2) & 15
                    more += 1
                    base, width = {12: (12, 2), 13: (16, 3), 14: (24, 4), 15: (40, 20)}.get(code, (code, 0))
                    count, at = base + self.bits("id_bits", at, width) + 2, at + width
                if self.temperature == 1:
                    draws_here[i] = float(count)
                else:
                    q = np.exp(-((self.row["drawn_logp"][d] / ENTRY) ** 2))
                    draws_here[i] = count * q ** (1 - self.temperature)
                d += 1
            entries = {token: p}
            for kind, share in ((heads_here, max(1 - p - left, 0)), (draws_here, left)):
                entries.update({i: w / sum(kind.values()) * share for i, w in kind.items()})
            positions.append((token, here, n["carries"][t], logp, entries))
        assert at <= 8 * len(self.row["id_bits"]) < at + 8 and len(self.row["counts"]) == (more + 1) // 2
        return positions


def is_as_the_page_says(coder: Coder, one: Said) -> Heard:
    row = coder.encode(one)
    page = Page(row, coder.order, coder.temperature).read()
    heard = through(coder, one)
    assert heard.ids.tolist() == [token for token, *_ in page]
    assert heard.boundary.tolist() == [place for _, place, *_ in page]
    assert heard.carries.tolist() == [carries for _, _, carries, *_ in page]
    assert np.allclose(heard.logp, [logp for _, _, _, logp, _ in page], rtol=1e-6)
    for (ids, probs), (*_, entries) in zip(rows_of(heard), page, strict=True):
        assert ids == list(entries) and np.allclose(probs, list(entries.values()), rtol=1e-5, atol=1e-30)
    return heard


def nats(codes: Any, unit: int) -> Any:
    return -((np.asarray(codes) / unit) ** 2)


def test_a_row_by_hand() -> None:
    """Three positions of a source with ids 10, 11 … by rank, two exact entries at most, draws from q itself."""
    order = np.arange(300) + 10
    order[290:] = np.arange(10)
    coder = Coder(order.astype(np.int32))
    one = by_hand(
        tokens=[10, 12, 309 - 10],  # ranks 0, 2, 289
        places=[1, -1, 4],
        carries=[1, 1, 2],
        logp=nats([512, 0, 1700], POSITION),
        left=np.exp(nats([1024, 30_000, 512], POSITION)),
        head=([[15, 10], [-1, -1], [11, 10]], [nats([48, 24], ENTRY), [0, 0], nats([96, 64], ENTRY)]),
        drawn=([[10, 15, 250, 251], [0, -1, -1, -1], [-1] * 4], [[9, 9, 1, 60], [14, 0, 0, 0], [0] * 4], [[0] * 4] * 3),
    )
    row = coder.encode(one)
    # 289 is 256 + 1·32 + 1: e = 8, three bits 001, five raw bits 00001
    assert list(row["tokens"]) == [0, 2, 16 + 8 * 4 + 1]
    assert list(row["ends"]) == [2, 0, 4]  # 1 + 1; none; 1 + 4 - 1
    assert list(row["carries"]) == [1, 2, 2, 1]
    # 512 = 2^9, 0, 1700 = 1024 + 5·128 + 36; the mass 1e-30 that is the least has the code 8,511 = 8192 + 0·1024 + 319
    assert list(row["logp"]) == [16 + 8 * 5, 0, 16 + 8 * 6 + 5]
    assert list(row["left"]) == [16 + 8 * 6, 16 + 8 * 9, 16 + 8 * 5]
    assert list(row["head"]) == [1, 0, 2] and list(row["drawn"]) == [2, 1, 0]
    bits = int.from_bytes(row["bits"], "little")
    raw = [(1, 5), (0, 6), (36, 7), (0, 7), (319, 10), (0, 6)]  # the three columns' numbers that have raw bits
    for value, width in raw:
        assert bits & ((1 << width) - 1) == value
        bits >>= width
    assert bits == 0 and len(row["bits"]) == (41 + 7) // 8
    # exact: 15 is rank 5, 11 and 10 are ranks 1 and 0. Drawn: 250 and 251 are ranks 240 and 241, 0 is rank 290
    assert list(row["ids_0"])[:3] == [5, 0, 0]
    # 240 = 128 + 7·16 + 0, then 241 - 240 - 1 = 0, drawn 60 times, in the stream of ranks from 62 to 253
    assert list(row["ids_0"])[3:] == [16 + 8 * 3 + 7, 128 + 16 + 8 * 4 + 1]  # 290 = 256 + 1·32 + 2, 14 times
    assert [list(row[f"ids_{s}"]) for s in range(1, 7)] == [[], [], [128], [], [], []]
    assert list(row["head_logp"]) == [48, 64, 96] and row["drawn_logp"] == b""
    assert list(row["counts"]) == [15 + 16 * 12]  # 58 = 40 + 18, 12 = 12 + 0
    id_bits = int.from_bytes(row["id_bits"], "little")
    raw = [(0, 4), (2, 5), (18, 20), (0, 2)]
    assert id_bits == sum(v << sum(w for _, w in raw[:n]) for n, (v, _) in enumerate(raw))
    heard = is_as_the_page_says(coder, one)
    assert heard.boundary.tolist() == [1, -1, 4] and heard.content_bytes == 9
    first, second, third = rows_of(heard)
    p, left = np.exp(-0.25), np.exp(-1)
    assert first[0] == [10, 15, 250, 251] and second[0] == [12, 0] and third[0] == [299, 10, 11]
    assert np.allclose(first[1], [p, max(1 - p - left, 0), left / 61, left * 60 / 61], rtol=1e-6)
    assert second[1] == pytest.approx([1, 1e-30], rel=1e-2)
    p, left = np.exp(-((1700 / 1024) ** 2)), np.exp(-0.25)
    exact = np.exp(nats([64, 96], ENTRY))
    assert np.allclose(third[1], [p, *(max(1 - p - left, 0) * exact / exact.sum())], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("sampler", ["top_k", "nucleus", "random", "hybrid"])
@pytest.mark.parametrize("vocabulary", [25, 700, 300_000])
def test_what_a_sampler_keeps_comes_back(sampler: str, temperature: float, vocabulary: int) -> None:
    drawing = sampler in ("random", "hybrid")
    coder = Coder(order_of(vocabulary), temperature if drawing else 1.0)
    for seed in range(3):
        one, q = sampled(sampler, vocabulary, 12, temperature, seed)
        heard = is_as_the_page_says(coder, one)
        assert np.array_equal(heard.ids, one.heard.ids) and np.array_equal(heard.boundary, one.heard.boundary)
        assert np.array_equal(heard.carries, one.heard.carries) and heard.content_bytes == 60
        off = np.abs(np.sqrt(-heard.logp) - np.sqrt(-one.heard.logp))
        assert off.max() <= 0.5 / POSITION + 1e-5
        assert (heard.entries.mass() <= 1 + 1e-3).all()
        for t, (ids, probs) in enumerate(rows_of(heard)):
            token = int(one.heard.ids[t])
            head = [i for i in one.head[t].tolist() if i not in (-1, token)]
            draws = {i: int(c) for i, c in zip(one.drawn[t], one.counts[t], strict=True) if i not in (-1, token, *head)}
            assert len(set(ids)) == len(ids) and set(ids) == {token, *head, *draws} and ids[0] == token
            got = dict(zip(ids, probs, strict=True))
            # half a code's step in the root of an entry, and as much in the others that share the scale
            step = max((np.sqrt(-np.log(q[t, i])) for i in head), default=0) / ENTRY + 0.25 / ENTRY**2
            rest = 1 - q[t, token] - q[t, head].sum()
            exact = 1 - q[t, token] - (rest if sampler != "random" else 0)
            slack = 1e-3 / exact if head else 0  # of a small difference of two coded masses
            for i in head:
                assert got[i] == pytest.approx(q[t, i], rel=2 * step + slack, abs=1e-7)
            if not draws:
                continue
            weights = {i: c * q[t, i] ** (1 - coder.temperature) for i, c in draws.items()}
            step = 0 if coder.temperature == 1 else max(np.sqrt(-np.log(q[t, i])) for i in draws) / ENTRY
            mass = rest if sampler == "hybrid" else 1 - q[t, token]
            for i, weight in weights.items():
                wanted = weight / sum(weights.values()) * mass
                assert got[i] == pytest.approx(wanted, rel=0.6 * step + 0.01, abs=1e-6)


LOGP = st.one_of(st.just(0.0), st.just(-np.inf), st.floats(-40, 0), st.floats(-1e-6, 0))
COUNT = st.one_of(st.integers(1, 60), st.sampled_from([1, 2, 13, 14, 17, 18, 25, 26, 41, 42, 43, 65_535]))


@st.composite
def anything(draw: Any) -> tuple[Coder, Said]:
    """Rows that no source would say, too."""
    vocabulary = draw(st.sampled_from([1, 2, 40, 5000, 300_000]))
    n = draw(st.integers(0, 6))
    few = st.lists(st.integers(0, vocabulary - 1), max_size=6, unique=True)
    # near the ends of the ranks distances are as short and as long as they can be
    edge = st.sampled_from([r for r in (0, 1, 245_758, 245_759, 245_760, 299_999) if r < vocabulary])
    few = st.one_of(few, st.lists(edge.map(lambda rank: int(order_of(vocabulary)[rank])), max_size=6, unique=True))
    wide = draw(st.integers(0, 6))

    def rows(fill: float, values: Any, like: list[list[int]] | None = None) -> list[list[Any]]:
        found = [draw(few) if like is None else [draw(values) for _ in like[t]] for t in range(n)]
        return [(row[:wide] + [fill] * wide)[:wide] for row in found]

    head, hits = rows(-1, None), rows(-1, None)
    mass = st.floats(0, 1)
    one = by_hand(
        [draw(st.integers(0, vocabulary - 1)) for _ in range(n)],
        np.where(
            [draw(st.booleans()) for _ in range(n)], np.cumsum([draw(st.integers(0, 10**6)) for _ in range(n)]), -1
        )
        if n
        else [],
        [draw(st.integers(1, 2)) for _ in range(n)],
        [draw(LOGP) for _ in range(n)],
        [draw(mass) for _ in range(n)],
        (head, rows(0.0, LOGP, head)),
        (hits, rows(-1, COUNT, hits), rows(0.0, st.floats(-40, 0), hits)),
    )
    return Coder(order_of(vocabulary), draw(st.sampled_from([1.0, 0.7, 1.3, 4.0]))), one


@hypothesis_settings(max_examples=150)
@given(anything())
def test_anything_comes_back(made: tuple[Coder, Said]) -> None:
    coder, one = made
    heard = is_as_the_page_says(coder, one)
    assert np.array_equal(heard.ids, one.heard.ids) and np.array_equal(heard.boundary, one.heard.boundary)
    assert np.array_equal(heard.carries, one.heard.carries)
    wanted = np.maximum(one.heard.logp.astype(np.float64), -((2**24 / POSITION) ** 2))
    assert np.allclose(np.sqrt(-heard.logp.astype(np.float64)), np.sqrt(-wanted), rtol=1e-6, atol=0.5 / POSITION)
    for t, (ids, probs) in enumerate(rows_of(heard)):
        head = [i for i, p in zip(one.head[t], one.head_logp[t], strict=True) if i >= 0 and p > -np.inf]
        token = one.heard.ids[t]
        assert ids[0] == token and len(ids) == len(set(ids)) and np.isfinite(probs).all() and (probs >= 0).all()
        assert set(ids) == {token, *head, *(i for i in one.drawn[t] if i >= 0)}


def test_rows_sum_to_one_at_most() -> None:
    """The token and the mass left are coded each by itself: at their worst they are a thousandth too much."""
    logp = np.log(np.linspace(0.001, 0.999, 999))
    coder = Coder(order_of(40))
    one = by_hand(
        np.full(999, 3), np.full(999, -1), np.ones(999), logp, -np.expm1(logp), (np.full((999, 1), 3), logp[:, None]),
        (np.full((999, 1), 5), np.ones((999, 1)), np.zeros((999, 1))),
    )  # fmt: skip
    mass = through(coder, one).entries.mass()
    assert mass.max() <= 1 + 1e-3 and mass.min() >= 1 - 1e-3


def test_there_is_room_for_ids_that_are_far_and_often_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    put_counts = code.put_counts

    def looked_at(values: np.ndarray, bits: np.ndarray, at: int) -> tuple[np.ndarray, int]:
        assert at + 20 * len(values) <= 8 * len(bits)  # compiled code would write beyond them
        packed: tuple[np.ndarray, int] = put_counts(values, bits, at)
        return packed

    monkeypatch.setattr(code, "put_counts", looked_at)
    n, far = 40, int(order_of(300_000)[299_999])
    one = by_hand(
        np.full(n, order_of(300_000)[0]), np.full(n, -1), np.ones(n), np.full(n, -1.0), np.zeros(n),
        (np.zeros((n, 0)), np.zeros((n, 0))), (np.full((n, 1), far), np.full((n, 1), 50), np.zeros((n, 1))),
    )  # fmt: skip
    heard = through(Coder(order_of(300_000)), one)
    assert [ids for ids, _ in rows_of(heard)] == [[int(order_of(300_000)[0]), far]] * n
