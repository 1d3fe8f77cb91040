"""The bytes and places of tokenizers of every kind, made here: what spells the text is exact, what does not is told."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import check_places, text_sample
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion.records import Rendered
from fusion.tokens.bytes import Kind, byte_table
from fusion.tokens.render import Renderer

CONTROLS = ["<unk>", "<s>", "</s>"]
LETTERS = [*"▁abcdefghijklmnopqrstuvwxyz.,<>/0A|_é日"]
MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "▁")]
PIECES = [a + b for a, b in MERGES]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())
LEVEL_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ã", "©"), ("Ġ", "Ġ")]


def wrap(backend: Tokenizer, start: str = "<s>", end: str = "</s>") -> PreTrainedTokenizerFast:
    backend.add_special_tokens([start, end])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end)


def bpe(pieces: list[str], merges: list[tuple[str, str]], **settings_: Any) -> Tokenizer:
    return Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, merges, **settings_))


def byte_level(prefix: bool = False, normalizer: Any = None, **settings_: Any) -> Tokenizer:
    backend = bpe([*CONTROLS, *LEVEL, *(a + b for a, b in LEVEL_MERGES)], LEVEL_MERGES, **settings_)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def sentence_piece(scheme: str | None, fallback: bool = True, normalizer: Any = None, split: bool = False) -> Tokenizer:
    """BPE with `▁`; `scheme` None puts the mark by a normalizer, as Llama 2 does."""
    pieces = [*CONTROLS, *(BYTES if fallback else []), *LETTERS, *PIECES]
    backend = bpe(pieces, MERGES, unk_token="<unk>", fuse_unk=not fallback, byte_fallback=fallback)
    steps = [normalizer] if normalizer is not None else []
    if scheme is None:
        steps += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram(fallback: bool, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    scored = [(c, 0.0) for c in CONTROLS] + [(b, -30.0) for b in BYTES] * fallback
    scored += [(c, -5.0) for c in LETTERS] + [(p, -2.0) for p in PIECES]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=fallback))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def word_piece() -> Tokenizer:
    words = ["the", "cat", "day", "a", "in", "one", "two", "on", "sat", "mat", "life", "of", ".", ",", "<", "unk", ">"]
    pieces = [*CONTROLS, *words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz.")]
    backend = Tokenizer(models.WordPiece({p: n for n, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def with_gaps() -> Tokenizer:
    pieces = [*CONTROLS, *LEVEL, *(a + b for a, b in LEVEL_MERGES)]
    return_ = byte_level()
    return_.model = models.BPE({p: 3 * n for n, p in enumerate(pieces)}, LEVEL_MERGES)
    return return_


def unknown(text: str) -> bool:
    return any(c not in LETTERS for c in text.replace(" ", ""))


def marked(text: str) -> bool:
    return "▁" in text


@dataclass(frozen=True)
class Make:
    """A tokenizer, and whether it changes a text."""

    backend: Callable[[], Tokenizer]
    changes: Callable[[str], bool]


def never(text: str) -> bool:
    return False


def unlike(form: Literal["NFC", "NFKC"]) -> Callable[[str], bool]:
    return lambda text: unicodedata.normalize(form, text) != text


T5_SPACES = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
T5_PIECES = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
)

KINDS = {
    "byte-level": Make(byte_level, never),
    "byte-level with a space before": Make(lambda: byte_level(prefix=True), never),
    "byte-level NFC": Make(lambda: byte_level(normalizer=normalizers.NFC()), unlike("NFC")),
    "byte-level NFKC": Make(lambda: byte_level(normalizer=normalizers.NFKC()), unlike("NFKC")),
    "byte-level ignoring merges": Make(lambda: byte_level(ignore_merges=True), never),
    "byte-level with gaps in its ids": Make(with_gaps, never),
    "sentencepiece by normalizer": Make(lambda: sentence_piece(None), marked),
    "sentencepiece always": Make(lambda: sentence_piece("always"), marked),
    "sentencepiece first": Make(lambda: sentence_piece("first"), marked),
    "sentencepiece never": Make(lambda: sentence_piece("never"), marked),
    "sentencepiece split": Make(lambda: sentence_piece("first", split=True), marked),
    "sentencepiece without fallback": Make(lambda: sentence_piece(None, False), lambda t: marked(t) or unknown(t)),
    "sentencepiece after tabs": Make(
        lambda: sentence_piece("first", normalizer=normalizers.Replace("\t", " ")), lambda t: marked(t) or "\t" in t
    ),
    "unigram": Make(lambda: unigram(True), marked),
    "unigram without fallback": Make(lambda: unigram(False), lambda t: marked(t) or unknown(t)),
    "unigram as T5": Make(
        lambda: unigram(False, T5_SPACES, T5_PIECES),
        lambda t: marked(t) or unknown(t) or " ".join(t.split()) not in (t, t.removeprefix(" ")),
    ),
}


@cache
def made(kind: str) -> Renderer:
    return Renderer(wrap(KINDS[kind].backend()), kind)


# what users write that looks like tokens, and what tokenizers stumble over
LOOKALIKES = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<0x0A>",
    "<0xFF>",
    "<0x3C>",
    "▁",
    "Ġ",
    "Ċ",
    "##a",
)
ODD: tuple[str, ...] = (
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u200b",
    "\u200d",
    "\ufffd",
    "\ufeff",
    "e\u0301",
    "é",
    "\u0301\u0323",
)
ODD += ("ﬁ", "①", "İ", "日本", "🙂", "👩‍👩‍👧", "\x00", "\x7f", "\u0085", "\u2028", "\uffff", "\U0010fffe", "ÿ")
TEXTS = st.lists(
    st.sampled_from((*LOOKALIKES, *ODD, "the", "cat", " the", " cat", " ", "a", ".", "The Cat", "x"))
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=9,
).map("".join)


def check_text(renderer: Renderer, text: str, changed: bool) -> Rendered:
    """What holds of any text: nothing in it is a control token, what spells it is exact, what does not is told."""
    sample = text_sample(text)
    rendered = renderer.render(sample)
    table, raw = renderer.table, text.encode()
    inner = rendered.ids[1:-1]
    assert rendered.lossy == changed
    assert not np.isin(inner, [i for i in (renderer.start_id, renderer.end_id) if i is not None]).any()
    assert changed or (table.join(inner) in (raw, b" " + raw) and (rendered.boundary[:-1] >= 0).all())
    assert changed or rendered.content_bytes == len(raw)
    check_places(renderer, sample, rendered)
    return rendered


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120)
@given(text=TEXTS)
def test_any_text_of_any_kind(kind: str, text: str) -> None:
    check_text(made(kind), text, KINDS[kind].changes(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("literal", LOOKALIKES)
def test_a_literal_is_text(kind: str, literal: str) -> None:
    for text in (literal, f"the {literal} cat", f"{literal}{literal}", f"a{literal}\n"):
        rendered = check_text(made(kind), text, KINDS[kind].changes(text))
        if not rendered.lossy:
            assert (made(kind).table.kinds[rendered.ids[1:-1]] != Kind.CONTROL).all()


def test_unknown_characters_one_by_one() -> None:
    """Tokens that are characters: each place is known by hand."""
    backend = bpe([*CONTROLS, *LETTERS], [], unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    renderer = Renderer(wrap(backend), "characters")
    for text in ("aZb", "Zab", "abZ", "ZZ", "é Z日", "Z Z", " Z", "ab"):
        known = [True, *(c in LETTERS or c == " " for c in text)]
        ends = np.cumsum([0, *(len(c.encode()) for c in text)])
        expected = [1 + int(end) if k else -1 for end, k in zip(ends, known, strict=True)]
        expected[-1] = 1 + len(text.encode())  # the end is the end
        rendered = renderer.render(text_sample(text))
        assert rendered.boundary.tolist() == [*expected, -1]
        assert rendered.lossy == ("Z" in text)


@pytest.mark.parametrize(
    ("kind", "text", "pieces", "boundary"),
    [
        # the beginning has a place although the rest is changed, and what follows a change has one too
        ("sentencepiece without fallback", "the Zcat", [" the", " ", "", "cat"], [0, 4, 5, -1, 9]),
        ("sentencepiece without fallback", "Zcat", [" ", "", "cat"], [0, 1, -1, 5]),
        ("byte-level NFC", "the e\u0301 cat", ["the", " ", "é", " cat"], [1, 4, 5, -1, 12]),
        ("byte-level NFKC", "ﬁ the", ["f", "i", " the"], [1, -1, -1, 8]),
        ("unigram as T5", "the  cat\n", [" the", " cat"], [0, -1, 10]),
        ("sentencepiece after tabs", "a\tcat", [" ", "a", " cat"], [0, 1, 2, 6]),
    ],
)
def test_what_is_unchanged_has_its_place(kind: str, text: str, pieces: list[str], boundary: list[int]) -> None:
    rendered = check_text(made(kind), text, True)
    assert [made(kind).table.pieces[i].decode() for i in rendered.ids[1:-1]] == pieces
    assert rendered.boundary.tolist() == [*boundary, -1]


def test_word_pieces_in_lower_case() -> None:
    renderer = Renderer(wrap(word_piece()), "words")
    rendered = check_text(renderer, "the cats.", True)
    assert [renderer.table.pieces[i] for i in rendered.ids[1:-1]] == [b" the", b" cat", b"s", b" ."]
    assert rendered.boundary.tolist() == [0, 4, 8, -1, 10, -1]  # "." is " .", a space that the text does not have
    changed = check_text(renderer, "The cat sat", True)
    assert changed.boundary.tolist() == [-1, -1, 8, 12, -1]
    assert check_text(renderer, "the cat sat", False).boundary.tolist() == [0, 4, 8, 12, -1]
    assert check_text(renderer, "the\ncat", True).boundary.tolist() == [0, -1, 8, -1]


@settings(max_examples=80)
@given(text=TEXTS)
def test_word_pieces_of_any_text(text: str) -> None:
    renderer = made_words()
    sample = text_sample(text)
    rendered = renderer.render(sample)
    check_places(renderer, sample, rendered)
    spelled = renderer.table.join(rendered.ids)
    assert rendered.lossy == (
        spelled not in (text.encode(), b" " + text.encode()) or renderer.table.unknown in rendered.ids
    )


@cache
def made_words() -> Renderer:
    return Renderer(wrap(word_piece()), "words")


# ---------------------------------------------------------------- added tokens


def piece_of(renderer: Renderer, token: str) -> bytes:
    return renderer.table.pieces[renderer._tokenizer.convert_tokens_to_ids(token)]


def test_added_tokens_that_are_text() -> None:
    # matched after a normalizer that put a mark before it: found after a space only, so the space is its own
    backend = sentence_piece(None)
    backend.add_tokens([AddedToken("foozy", normalized=True), AddedToken("[raw]", normalized=False)])
    renderer = Renderer(wrap(backend), "added")
    assert piece_of(renderer, "foozy") == b" foozy"
    assert piece_of(renderer, "[raw]") == b"[raw]"
    for text in ("a foozy foozyb cfoozy", "foozy", " foozy", "a[raw]b [raw] c", "[raw]", "the [raw]"):
        sample = text_sample(text)
        check_places(renderer, sample, renderer.render(sample))
    assert not renderer.render(text_sample("a foozy foozyb")).lossy
    # a piece of the byte-level vocabulary that is another text as an added token: told, not shifted
    level = byte_level()
    level.add_tokens([AddedToken("é", normalized=False), AddedToken("the", normalized=False)])
    renderer = Renderer(wrap(level), "overlap")
    assert piece_of(renderer, "é") == b"\xe9"  # the byte 0xE9, whose printable form is é
    rendered = check_text(renderer, "the é cat", True)
    assert rendered.boundary.tolist() == [1, 4, 5, -1, 11, -1]
    assert check_text(renderer, "xthecat", False).boundary.tolist() == [1, 2, 5, 8, -1]


def test_added_tokens_that_swallow_white_space() -> None:
    # one takes the space before it, so what has read "a" does not await it; the other takes the one after
    for side, expected in (("lstrip", [1, 2, -1, 10, 11, -1]), ("rstrip", [1, 2, 3, -1, 11, -1])):
        backend = byte_level()
        backend.add_tokens([AddedToken("<tool>", normalized=False, **{side: True})])
        renderer = Renderer(wrap(backend), side)
        rendered = check_text(renderer, "a <tool> b", True)
        assert rendered.boundary.tolist() == expected
        assert check_text(renderer, "a<tool>b", False).boundary.tolist() == [1, 2, 8, 9, -1]


def test_a_control_token_that_plain_text_uses_is_text() -> None:
    level = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>", pad_token="!")
    renderer = Renderer(level, "padded")
    assert renderer.table.kinds[level.pad_token_id] == Kind.TEXT
    assert renderer.table.kinds[level.eos_token_id] == Kind.CONTROL
    assert check_text(renderer, "the cat!!", False).boundary.tolist()[-2] == 10


def test_a_gap_in_ids_is_unused_and_a_collision_refused() -> None:
    table = made("byte-level with gaps in its ids").table
    assert (table.kinds == Kind.UNUSED).sum() == 2 * len(table) // 3
    assert table.kinds[::3].tolist() == [Kind.TEXT, Kind.CONTROL, Kind.CONTROL, *[Kind.TEXT] * (len(table) // 3 - 2)]
    collides = with_gaps()
    size = collides.get_vocab_size(with_added_tokens=False)
    while size % 3:  # the library gives new tokens the number of pieces as id, which here is a piece's already
        size += 1
        collides.add_tokens([f"<new{size}>"])
    collides.add_tokens(["<new>"])
    told = re.escape(f"id {collides.token_to_id('<new>')} is both") + ".* of its vocabulary and added token '<new>'"
    with pytest.raises(ValueError, match="gaps: " + told):
        byte_table(PreTrainedTokenizerFast(tokenizer_object=collides), "gaps")


def test_what_a_file_says_of_length_is_not_heeded() -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=40)
    renderer = Renderer(wrap(backend), "cut")
    assert (
        len(check_text(renderer, "the cat " * 20, False).ids) == 43
    )  # two for each pair of words, one space, two ends


def test_random_merges_are_refused() -> None:
    with pytest.raises(ValueError, match="noisy: tokenizer.json sets dropout 0.1"):
        byte_table(wrap(byte_level(dropout=0.1)), "noisy")


def test_another_script() -> None:
    backend = bpe([*CONTROLS, *"你好世界▁"], [], unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    renderer = Renderer(wrap(backend), "chinese")
    assert renderer.table.marks_start
    assert check_text(renderer, "你好 世界", False).boundary.tolist() == [0, 1, 4, 7, 8, 11, 14, -1]
