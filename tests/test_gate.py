"""Who teaches what: weights by bits per byte, and what a source's reading cost it on segments and on others' tokens."""

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import CONTENTS, TEXTS, by_itself, chat, drawn, heard, on_tokens, runs, sizes, spread, weigh
from transformers import PreTrainedTokenizerFast

from fusion.distill.cost import Segments, Tokens, by_segment, by_token
from fusion.distill.gate import Gate, choose, soft
from fusion.records import Carries, Rendered, Sample
from fusion.tokens.render import GAP, PLAIN_TEMPLATE, Renderer

NAN, INF, LN2 = math.nan, math.inf, math.log(2)
TURNS = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
TEMPLATES = {
    "ended": PLAIN_TEMPLATE,
    "unended": TURNS + "\n{% endfor %}",
    "apart": TURNS + "\n{{ eos_token }}{% endfor %}",  # white space of the template's before the end
    "trimmed": "{% for m in messages %}{{ m.role }}:\n{{ m.content.lstrip() }}{{ eos_token }}{% endfor %}",
}
# the second begins with what a template's newline may merge with; the third has no bytes
ANSWERS = ("It is a day.", "\n\nthe  dog\n", "", " a café", "no")
MARKS = chat("a", " the cat")


@pytest.fixture(scope="module")
def renderers(
    byte_level_tokenizer: PreTrainedTokenizerFast, sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> dict[tuple[str, str], Renderer]:
    tokenizers = {"level": byte_level_tokenizer, "piece": sentencepiece_tokenizer}
    return {(k, t): Renderer(v, k, TEMPLATES[t]) for k, v in tokenizers.items() for t in TEMPLATES}


# ---------------------------------------------------------------- the gate


def column(*bits: float) -> np.ndarray:
    return np.array(bits, dtype=np.float64)[:, None]


def weights(bits: Sequence[float], gate: Gate, temperature: float = 1.0, **fixed: float) -> list[float]:
    """The weights of sources a, b, c ... on a single unit."""
    found: list[float] = choose(column(*bits), gate, temperature, fixed, "abcdef"[: len(bits)])[:, 0].tolist()
    return found


def test_the_best_source_alone() -> None:
    assert weights([2, 1, 1], "min_ce") == [0, 1, 0]  # the first named of equals
    assert weights([NAN, 3, 2, NAN], "min_ce") == [0, 0, 1, 0]
    assert weights([INF, 9], "min_ce") == [0, 1]
    assert weights([NAN, INF, INF], "min_ce") == [0, 1, 0]
    assert weights([INF], "min_ce") == [1]
    assert weights([NAN, NAN], "min_ce") == [0, 0]


def test_by_softmax() -> None:
    e = math.exp
    assert weights([0.5], "avg_ce") == [1]
    total = e(-1) + e(-2) + e(-4)
    assert weights([1, 2, 4], "avg_ce") == pytest.approx([e(-1) / total, e(-2) / total, e(-4) / total])
    total = e(-1 / 0.25) + e(-2 / 0.25)
    assert weights([1, NAN, 2], "avg_ce", 0.25) == pytest.approx([e(-4) / total, 0, e(-8) / total])
    assert weights([1, INF, 1], "avg_ce") == [0.5, 0, 0.5]
    assert weights([INF, NAN, INF, INF], "avg_ce") == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert weights([NAN, NAN], "avg_ce") == [0, 0]
    assert weights([1e9, 1e9 + 1], "avg_ce") == pytest.approx([1 / (1 + e(-1)), 1 / (1 + e(1))])
    assert weights([1, 1.001], "avg_ce", 1e-6) == [1, 0]  # the cold limit is min_ce


def test_alike_as_told_and_not_at_all() -> None:
    assert weights([1, 9, INF], "all") == pytest.approx([1 / 3] * 3)
    assert weights([1, NAN, 9], "all") == [0.5, 0, 0.5]
    assert weights([1, 9, 5], "fixed", a=1, c=3) == [0.25, 0, 0.75]  # who is not named has nothing
    assert weights([NAN, 9, 5], "fixed", a=1, b=1, c=3) == [0, 0.25, 0.75]
    assert weights([1, NAN, 5], "fixed", b=2) == [0, 0, 0]
    assert weights([1, 2, 5], "none") == [0, 0, 0]
    for gate in get_args(Gate):
        assert weights([NAN, NAN], gate, a=1, b=2) == [0, 0]
        assert choose(np.zeros((0, 3)), gate).shape == (0, 3)
        assert choose(np.zeros((2, 0)), gate, 1.0, {"a": 1}, "ab").shape == (2, 0)


@pytest.mark.parametrize("sources", [1, 3, 6])
@pytest.mark.parametrize("gate", get_args(Gate))
def test_units_do_not_meddle(sources: int, gate: Gate) -> None:
    """Many columns at once, some absent, infinite or equal, as each of them by itself."""
    random = np.random.default_rng(sources)
    bits = random.choice([NAN, INF, 0.0, 1.0, 1.0, 2.5], (sources, 200)) * random.choice([1.0, 1.3], (1, 200))
    bits = np.where(bits == 0, 0.0, bits)
    fixed = {"a": 1.0, "b": 2.0, "f": 0.5}
    found = choose(bits, gate, 0.7, fixed, "abcdef"[:sources])
    assert found.dtype == np.float64 and found.shape == bits.shape
    for n in range(200):
        assert found[:, n].tolist() == pytest.approx(weigh(bits[:, n].tolist(), gate, 0.7, fixed, "abcdef"))
    assert set(np.round(found.sum(0), 12).tolist()) <= {0.0, 1.0}
    if gate == "avg_ce":
        assert (soft(bits, 0.7) == found).all()


# ---------------------------------------------------------------- places


def test_places_of_segments_by_hand() -> None:
    segments = Segments.of([3, 0, 2])
    after = GAP + 2
    assert segments.first.tolist() == [0, 3 + after, 3 + 2 * after]
    assert segments.last.tolist() == [4, 4 + after, 6 + 2 * after]
    places = np.array([0, 1, 4, 5, 3 + after, 4 + after, 5 + after, 3 + 2 * after, 9 + 2 * after])
    assert segments.number(places).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert (segments.in_bytes(places) - places).tolist() == [1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert len(Segments.of([]).first) == 0


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["level", "piece"])
def test_places_are_the_renderers(renderers: Any, kind: str, template: str) -> None:
    renderer = renderers[kind, template]
    for sample in (*TEXTS, chat(*(a for a in ANSWERS if a))):
        rendered, segments = renderer.render(sample), Segments.of(sizes(sample))
        at = np.flatnonzero(rendered.carries)
        found = runs(rendered)
        assert len(found) == len(segments.first)
        number = segments.holding(rendered.boundary[at], rendered.carries[at])
        for g, (content, end) in enumerate(found):
            assert number[content + end].tolist() == [g] * len(content + end)
            text = sample.segments()[g].encode()
            for n in content:
                if (place := rendered.boundary[at[n]]) >= 0:
                    assert segments.first[g] <= place < segments.last[g]
                    assert segments.number(place) == g
                    read = int(segments.in_bytes(place) - segments.first[g] - 1)
                    piece = renderer.table.pieces[rendered.ids[at[n] + 1]]
                    spelled = piece[int(place == segments.first[g]) :]  # less the mark
                    assert text[read : read + len(spelled)] == spelled[: len(text) - read]
            assert [int(rendered.boundary[at[n]]) for n in end][-1:] == [segments.last[g]] * bool(end)
            assert bool(end) == (sample.text is not None or template != "unended")


def test_positions_at_no_known_place_by_hand() -> None:
    segments = Segments.of([4, 3])
    b = int(segments.first[1])
    content, end = Carries.CONTENT, Carries.END

    def holding(*positions: tuple[int, Carries]) -> list[int]:
        places, carries = (np.array(part) for part in zip(*positions, strict=True))
        return segments.holding(places, carries).tolist()  # type: ignore[no-any-return]

    nowhere = (-1, content)
    # before anything is known; and all of the rest
    assert holding(nowhere, (3, content), nowhere) == [0, 0, 0]
    assert holding((1, content), (b + 3, content)) == [0, 1]
    # the second begins after them: they are the first's, but where the first has ended
    assert holding((1, content), nowhere, nowhere, (b + 1, content), (b + 2, content)) == [0, 0, 0, 1, 1]
    assert holding((1, content), nowhere, (b, content)) == [0, 0, 1]
    assert holding((1, content), (5, end), nowhere, (b + 2, content)) == [0, 0, 1, 1]
    assert holding((1, content), (5, end), nowhere, nowhere) == [0, 0, 1, 1]
    # or where the second has been read before what is known of it
    assert holding((1, content), nowhere, (b + 2, content)) == [0, 1, 1]
    # an end's white space goes with the end
    assert holding((1, content), (-1, end), (5, end), (-1, end), (b + 1, end)) == [0, 0, 0, 1, 1]
    assert holding((1, content), (-1, end), (b + 1, end)) == [0, 1, 1]


# ---------------------------------------------------------------- by segment


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["level", "piece"])
def test_each_segments_tokens_are_summed(renderers: Any, kind: str, template: str) -> None:
    renderer = renderers[kind, template]
    answers = [a for a in ANSWERS if a or template == "ended"]
    for seed, sample in enumerate((chat(*answers), chat(*answers[::-1]), chat(answers[1]), MARKS)):
        rendered = renderer.render(sample)
        said = drawn(rendered, seed)
        bytes_ = [len(a.lstrip().encode() if template == "trimmed" else a.encode()) for a in sample.segments()]
        nats = [-said.logp[content].astype(float).sum() for content, _ in runs(rendered)]
        expected = [n / size / LN2 if size else INF for n, size in zip(nats, bytes_, strict=True)]
        found = by_segment(said, Segments.of(sizes(sample)))
        assert found.tolist() == pytest.approx(expected)
        whole = sum(b * n for b, n in zip(found, bytes_, strict=True) if n)
        assert whole == pytest.approx(said.bits_per_byte() * said.content_bytes)
        assert sum(bytes_) == said.content_bytes


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["level", "piece"])
def test_a_text_is_one_segment(renderers: Any, kind: str, start: bool, complete: bool) -> None:
    """Its bits per byte are the sample's, also where the first token is not predicted."""
    renderer = renderers[kind, "ended"]
    given, renderer.start_id = renderer.start_id, renderer.start_id if start else None
    try:
        for seed, text in enumerate(CONTENTS[:4]):
            rendered = renderer.render(Sample("x", "test", text, complete=complete))
            said, segments = drawn(rendered, seed), Segments.of([len(text.encode())])
            assert (said.carries == Carries.END).any() == complete
            assert by_segment(said, segments).tolist() == pytest.approx([said.bits_per_byte()])
            tokens = Tokens.of(rendered, segments)
            assert by_token(said, segments, tokens).tolist() == pytest.approx(by_itself(renderer, rendered, said))
            if not start:  # the bytes of the first token are not read
                first = len(renderer.table.pieces[rendered.ids[0]].removeprefix(b" " if kind == "piece" else b""))
                assert said.content_bytes == len(text.encode()) - first
    finally:
        renderer.start_id = given


def test_what_stands_at_no_known_place_is_paid_all_the_same() -> None:
    """Segments of 4 and 3 bytes, cut by hand as a template or a normaliser would: tokens of 1, 2, 4 ... nats."""
    segments = Segments.of([4, 3])
    b = int(segments.first[1])

    def nats(*positions: tuple[int, Carries]) -> list[float]:
        places, carries = (np.array(part) for part in zip(*positions, strict=True))
        rendered = Rendered(np.zeros(len(places) + 1, np.int32), np.append(places, -1), np.append(carries, 0), 7)
        said = heard(rendered, [-(2.0**n) for n in range(len(places))])
        return (by_segment(said, segments) * [4, 3] * LN2).round(9).tolist()  # type: ignore[no-any-return]

    content, end = Carries.CONTENT, Carries.END
    nowhere = (-1, content)
    assert nats((1, content), (3, content), (b + 1, content)) == [3, 4]
    assert nats((0, content), (1, content), (3, content), (b + 1, content)) == [7, 8]  # a space mark alone
    assert nats(nowhere, nowhere, (3, content), (b + 1, content)) == [7, 8]
    assert nats((1, content), nowhere, (b + 1, content), nowhere) == [3, 12]
    assert nats((1, content), (5, end), nowhere, (b + 3, content)) == [1, 12]
    assert nats((1, content), (5, end), nowhere, (b + 4, end)) == [1, 4]  # no place of the second's text is known
    assert nats((1, content), (5, end), nowhere, nowhere) == [1, 12]
    assert nats(nowhere, (-1, end), (5, end), (b + 1, content)) == [1, 8]  # white space before the end is the end's
    assert nats((1, content), (3, content)) == [3, INF]  # nothing is heard of the second
    assert nats(nowhere, (b + 4, end)) == [INF, 1]
    assert nats(nowhere, nowhere) == [INF, INF]


def test_nothing_is_heard() -> None:
    segments = Segments.of([4])
    nothing = heard(Rendered(np.zeros(1, np.int32), np.zeros(1, np.int64), np.zeros(1, np.uint8), 0))
    tokens = Tokens(np.array([1, 5]), np.array([3, 6]), np.array([0, 0]))
    assert by_segment(nothing, segments).tolist() == [INF]
    assert by_token(nothing, segments, tokens).tolist() == [INF, INF]


# ---------------------------------------------------------------- by token


@pytest.mark.parametrize("kind", ["level", "piece"])
def test_a_source_that_is_the_target_pays_each_token_itself(renderers: Any, kind: str) -> None:
    renderer = renderers[kind, "ended"]
    for seed, sample in enumerate((*TEXTS, chat("It is a day.", "", " a café", "no"), MARKS)):
        rendered, lengths = renderer.render(sample), sizes(sample)
        said, segments = drawn(rendered, seed), Segments.of(lengths)
        found = by_token(said, segments, Tokens.of(rendered, segments))
        assert found.tolist() == pytest.approx(by_itself(renderer, rendered, said, *lengths))


WORDS = st.lists(
    st.sampled_from(["the", "cat", " ", "  ", "\n", "é", "🙂", "48", "def", "приве́т", ", and", "x"]), min_size=1
)


@given(text=WORDS.map("".join), seed=st.integers(0, 99), start=st.booleans(), complete=st.booleans())
def test_another_tokenizers_tokens_cost_what_their_bytes_do(
    renderers: Any, text: str, seed: int, start: bool, complete: bool
) -> None:
    sample, lengths = Sample("x", "test", text, complete=complete), [len(text.encode())]
    for kinds in (("level", "piece"), ("piece", "level"), ("piece", "piece")):
        source, target = (renderers[kind, "ended"] for kind in kinds)
        given, source.start_id = source.start_id, source.start_id if start else None
        read = source.render(sample)
        source.start_id = given
        rendered, said, segments = target.render(sample), drawn(read, seed), Segments.of(lengths)
        found = by_token(said, segments, Tokens.of(rendered, segments))
        assert found.tolist() == pytest.approx(
            on_tokens(target, rendered, lengths, spread(source, read, said, lengths))
        )


def test_another_tokenizers_tokens_in_chats(renderers: Any) -> None:
    sample = chat("It is a day.", " a café", "no", "naïve")
    lengths = sizes(sample)
    for source, target in ((a, b) for a in renderers.values() for b in renderers.values()):
        if "trimmed" in (source._template, target._template):
            continue
        read, rendered, segments = source.render(sample), target.render(sample), Segments.of(lengths)
        said = drawn(read, 0)
        tokens = Tokens.of(rendered, segments)
        expected = on_tokens(target, rendered, lengths, spread(source, read, said, lengths))
        found = by_token(said, segments, tokens)
        assert found.tolist() == pytest.approx(expected)
        assert tokens.segment.tolist() == [g for g, run in enumerate(runs(rendered)) for _ in [*run[0], *run[1]]]
