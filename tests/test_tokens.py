"""The bytes of tokens and the places of positions, on two tokenizers made here and on those of ../shared."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fusion.align.spans import shared
from fusion.records import Carries, Message, Rendered, Sample, sample_id
from fusion.tokens.batch import by_length, pad
from fusion.tokens.bytes import ByteTable, Kind, byte_table
from fusion.tokens.locate import locate
from fusion.tokens.place import bytes_before, place
from fusion.tokens.render import GAP, Renderer

SHARED = Path(__file__).parents[2] / "shared"
# folder: byte tokens it has, and whether it puts a space before the text
FOLDERS = {
    "tokenizers/gpt2": (0, False),
    "tokenizers/gpt-neox": (0, False),
    "tokenizers/mpt": (0, False),
    "tokenizers/llama2": (256, True),
    "tokenizers/mistral-v0.1": (256, True),
    "tokenizers/phi-3": (256, True),
    "tokenizers/internlm2": (256, False),
    "tokenizers/llama3": (0, False),
    "tokenizers/qwen2.5": (0, False),
    "tokenizers/falcon": (0, False),
    "tokenizers/starcoder2": (0, False),
    "models/stories260K": (256, True),
    "models/tinystories-656k": (0, True),
    "zoo/pivot-llama": (256, True),
    "zoo/math-seedoss": (0, False),
    "zoo/code-neox": (0, False),
    "zoo/prose-mistral": (0, False),
}
WITH_TEMPLATE = [f"tokenizers/{n}" for n in ("llama2", "mistral-v0.1", "llama3", "internlm2", "qwen2.5", "phi-3")]
WITHOUT_TEMPLATE = [f"tokenizers/{n}" for n in ("gpt2", "falcon", "starcoder2")] + ["zoo/pivot-llama", "zoo/code-neox"]
NO_SYSTEM = {"tokenizers/mistral-v0.1", "tokenizers/phi-3"}  # their templates drop a system message
LITERALS = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "[/INST]", "<0x0A>")
TEXTS = (
    "",
    " ",
    "\n",
    "a",
    "The cat sat on the mat.",
    "  two spaces before, two after  ",
    "\n\n\tdef add(a, b):\n\n\n        return a + b   \n",
    "naïve Führer's 12 345 km² — “quoted”…",
    "日本語のテキスト，你好 🙂🙂 👩‍👩‍👧 нещо",
    "e\u0301\u0323 and \u00e9, \u0000\u0001\u007f\u200b\ufeff\u00a0 end",
    "literal <s> and </s>, <unk> <|endoftext|><|im_start|>user [INST] <0x0A>",
)


@cache
def tokenizer(folder: str) -> Any:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"needs {SHARED / folder}")
    return AutoTokenizer.from_pretrained(SHARED / folder)


@cache
def renderer(folder: str) -> Renderer:
    return Renderer(tokenizer(folder), folder)


def text_sample(text: str, complete: bool = True) -> Sample:
    return Sample(sample_id(text), "test", text, complete=complete)


def chat_sample(*turns: tuple[str, str]) -> Sample:
    messages = tuple(Message(role, content) for role, content in turns)
    return Sample(sample_id(None, messages), "test", None, messages)


class Line:
    """The naive reading of the rule in render.py: segment after segment, a space that may be before each."""

    def __init__(self, sample: Sample):
        self.segments = [segment.encode() for segment in sample.segments()]
        self.bases = [sum(len(s) + 2 + GAP for s in self.segments[:n]) for n in range(len(self.segments))]

    def at(self, where: int) -> tuple[int, int]:
        """Segment, and offset in b" " + segment."""
        number = max(n for n, base in enumerate(self.bases) if base <= where)
        return number, where - self.bases[number]

    def bytes(self, number: int) -> bytes:
        return b" " + self.segments[number]

    def ends(self) -> list[int]:
        return [base + 1 + len(s) for base, s in zip(self.bases, self.segments, strict=True)]


def check_places(renderer: Renderer, sample: Sample, rendered: Rendered) -> None:
    """What holds of every rendering: between two known places lie exactly the bytes of the token between."""
    table, line = renderer.table, Line(sample)
    known = rendered.boundary[rendered.boundary >= 0]
    assert (np.diff(known) > 0).all()
    assert (rendered.boundary[rendered.carries == Carries.NOTHING] == -1).all()
    assert len(rendered.ids) == 0 or rendered.carries[-1] == Carries.NOTHING
    for i in np.flatnonzero(rendered.carries):
        here, after, token = int(rendered.boundary[i]), int(rendered.boundary[i + 1]), int(rendered.ids[i + 1])
        if rendered.carries[i] == Carries.END:
            if here >= 0:
                assert table.kinds[token] == Kind.CONTROL
                assert here in line.ends()
            continue
        assert rendered.lossy or table.kinds[token] != Kind.CONTROL
        if here < 0:
            continue
        number, offset = line.at(here)
        ahead, piece = line.bytes(number)[offset:], table.pieces[token]
        closes = rendered.carries[i + 1] == Carries.END
        if rendered.lossy and (after < 0 or closes):
            continue  # the next token is not the text's: it has no place of its own
        assert ahead.startswith(piece) or piece.startswith(ahead)  # the last one may go on into the template
        rest = ahead[len(piece) :].decode(errors="replace").strip()
        if after >= 0 and (rest or not closes):  # else the template may have stripped what is left
            assert line.at(after) == (number, offset + len(piece))


def check_lossless_text(renderer: Renderer, text: str, complete: bool = True) -> Rendered:
    sample = text_sample(text, complete)
    rendered = renderer.render(sample)
    assert not rendered.lossy
    check_places(renderer, sample, rendered)
    carrying = np.flatnonzero(rendered.carries)
    assert (rendered.boundary[carrying] >= 0).all()
    start = renderer.start_id is not None
    spelled = renderer.table.join(rendered.ids)
    assert spelled in (text.encode(), b" " + text.encode())
    if start:
        assert rendered.ids[0] == renderer.start_id
        assert rendered.content_bytes == len(text.encode())
        ends = complete and renderer.end_id is not None
        assert carrying.tolist() == list(range(len(rendered.ids) - 1))
        assert (rendered.carries == Carries.END).sum() == ends
        inner = rendered.ids[1 : len(rendered.ids) - ends]
        assert (renderer.table.kinds[inner] != Kind.CONTROL).all()
        if ends:
            assert rendered.ids[-1] == renderer.end_id
            assert rendered.boundary[-2] == 1 + len(text.encode())
    return rendered


# ---------------------------------------------------------------- bytes


def test_byte_table_of_fixtures(byte_level_tokenizer: Any, sentencepiece_tokenizer: Any) -> None:
    level, piece = byte_table(byte_level_tokenizer), byte_table(sentencepiece_tokenizer)
    assert len(level) == len(byte_level_tokenizer) and len(piece) == len(sentencepiece_tokenizer)
    assert np.bincount(level.kinds, minlength=4).tolist() == [len(level) - 1, 0, 1, 0]
    assert np.bincount(piece.kinds, minlength=4).tolist() == [len(piece) - 259, 256, 3, 0]
    assert not level.marks_start and piece.marks_start
    assert sorted(level.pieces[i] for i in range(len(level)) if level.lengths[i] == 1) == [
        bytes([b]) for b in range(256)
    ]
    assert [piece.pieces[3 + b] for b in range(256)] == [bytes([b]) for b in range(256)]
    assert piece.pieces[:3] == (b"", b"", b"") and piece.kinds[:3].tolist() == [Kind.CONTROL] * 3
    assert piece.pieces[sentencepiece_tokenizer.convert_tokens_to_ids("▁the")] == b" the"
    assert level.pieces[byte_level_tokenizer.convert_tokens_to_ids("Ġthe")] == b" the"
    for table in (level, piece):
        assert table.lengths.tolist() == [len(p) for p in table.pieces]


@pytest.mark.parametrize("folder", FOLDERS)
def test_byte_table_kinds(folder: str) -> None:
    table = renderer(folder).table
    bytes_, marks = FOLDERS[folder]
    assert (table.kinds == Kind.BYTE).sum() == bytes_
    assert table.marks_start == marks
    assert len(table) == len(tokenizer(folder))
    special = [i for i, t in tokenizer(folder).added_tokens_decoder.items() if t.special]
    assert special and np.isin(table.kinds[special], (Kind.CONTROL, Kind.BYTE)).all()
    assert ((table.lengths == 0) == np.isin(table.kinds, (Kind.CONTROL, Kind.UNUSED))).all()
    if bytes_:
        assert sorted(table.pieces[i] for i in np.flatnonzero(table.kinds == Kind.BYTE)) == [
            bytes([b]) for b in range(256)
        ]


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.startswith("tokenizers/")])
def test_published_ids_spell_their_text(folder: str) -> None:
    table = renderer(folder).table
    vectors = json.loads((SHARED / "tokenizers" / "test_vectors.json").read_text())
    expected, checked = vectors["expected"].get(folder.split("/")[1], {}), 0
    for family, texts in vectors["inputs"].items():
        own = [tokenizer(folder).encode(text, add_special_tokens=False) for text in texts]
        for text, ids in zip(texts, expected.get(family, own), strict=True):
            if any(table.kinds[i] == Kind.CONTROL for i in ids):
                continue  # the text spells a control token
            forms = {form.encode() for form in (text, unicodedata.normalize("NFC", text))}
            assert table.join(ids) in forms | {b" " + form for form in forms}
            checked += 1
    assert checked >= 19


def test_digest_names_a_vocabulary(byte_level_tokenizer: Any, sentencepiece_tokenizer: Any) -> None:
    digest = byte_table(byte_level_tokenizer).digest
    assert byte_table(AutoTokenizer.from_pretrained(byte_level_tokenizer.name_or_path)).digest == digest
    assert byte_table(sentencepiece_tokenizer).digest != digest
    grown = AutoTokenizer.from_pretrained(byte_level_tokenizer.name_or_path)
    grown.add_tokens(["<extra>"])
    assert byte_table(grown).digest != digest
    assert byte_table(grown).pieces[-1] == b"<extra>"
    control = AutoTokenizer.from_pretrained(byte_level_tokenizer.name_or_path)
    control.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert byte_table(control).kinds[-1] == Kind.CONTROL
    assert byte_table(control).digest not in (digest, byte_table(grown).digest)


def test_digests_of_real_tokenizers() -> None:
    digests = {folder: renderer(folder).table.digest for folder in FOLDERS}
    assert digests.pop("tokenizers/mpt") == digests["tokenizers/gpt-neox"]  # one vocabulary under two names
    assert len(set(digests.values())) == len(digests)


def test_slow_tokenizers_are_refused(byte_level_tokenizer: Any) -> None:
    class NoBackend:
        backend_tokenizer = None

    for slow in (NoBackend(), object(), ByT5Tokenizer()):
        with pytest.raises(ValueError, match=f"gpt-x: {type(slow).__name__} has no fast form"):
            byte_table(slow, "gpt-x")
        with pytest.raises(ValueError, match="gpt-x"):
            Renderer(slow, "gpt-x")


def wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_unreadable_vocabulary_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "xyz": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="words: cannot be mapped to bytes"):
        byte_table(wrapped(backend), "words")


def test_word_piece() -> None:
    words = ["the", "cat", "sat", "on", "mat", "one", "two", "a", "day", "in", "life", "of", ".", "s"]
    vocabulary = {w: n for n, w in enumerate(["[UNK]", "[CLS]", *words, "##s", "##."])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[CLS]"])
    made = Renderer(wrapped(backend, bos_token="[CLS]"), "wordpiece")
    assert made.table.marks_start
    assert made.table.pieces[vocabulary["cat"]] == b" cat" and made.table.pieces[vocabulary["##s"]] == b"s"
    assert made.table.kinds[0] == Kind.CONTROL and made.table.kinds[1] == Kind.CONTROL
    check_lossless_text(made, "the cats sat")
    # "." is stored as " .": what stands before it predicts a space that the text does not have, and has no place
    sample = text_sample("the cats. sat")
    rendered = made.render(sample)
    assert rendered.lossy
    check_places(made, sample, rendered)
    assert rendered.boundary.tolist() == [0, 4, 8, -1, 10, -1]


def test_unigram_with_byte_fallback() -> None:
    letters = [(c, -5.0) for c in "▁abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *[(f"<0x{b:02X}>", -50.0) for b in range(256)], *letters, ("▁the", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made = Renderer(wrapped(backend, bos_token="<s>"), "unigram")
    assert made.table.kinds[0] == Kind.CONTROL  # the unknown piece is named by number
    assert (made.table.kinds == Kind.BYTE).sum() == 256
    for text in ("the mat", " the\nthe é 🙂", ""):
        check_lossless_text(made, text)


# ---------------------------------------------------------------- places of a text

ODD = st.sampled_from(
    [
        "  ",
        "   ",
        "\n\n",
        "\n \n",
        "\t",
        "🙂",
        "👩‍👩‍👧",
        "e\u0301\u0301",
        "日本語",
        "\u0000",
        "\u0085",
        "\u2028",
        "ﬁ",
        "½",
        "İ",
    ]
    + list(LITERALS)
    + ["the cat", " mat", "return total", "48", "user", "assistant"]
)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20)
UNICODE = st.lists(ODD | ANY, max_size=8).map("".join)


@settings(max_examples=250)
@given(text=UNICODE, complete=st.booleans())
def test_places_of_any_text(byte_level_tokenizer: Any, sentencepiece_tokenizer: Any, text: str, complete: bool) -> None:
    first, second = both(byte_level_tokenizer, sentencepiece_tokenizer)
    check_meeting(check_lossless_text(first, text, complete), check_lossless_text(second, text, complete))


@settings(max_examples=100)
@given(text=st.lists(UNICODE | st.just("▁"), max_size=4).map("".join))
def test_places_of_changed_text(sentencepiece_tokenizer: Any, text: str) -> None:
    # U+2581 in a text comes back as a space: only what is unchanged has a place
    made, sample = Renderer(sentencepiece_tokenizer, "sp"), text_sample(text)
    rendered = made.render(sample)
    assert rendered.lossy == ("▁" in text)
    check_places(made, sample, rendered)


@cache
def _renderers(first: Any, second: Any) -> tuple[Renderer, Renderer]:
    return Renderer(first, "level"), Renderer(second, "sp")


def both(first: Any, second: Any) -> tuple[Renderer, Renderer]:
    """Renderers of the two fixtures, made once."""
    return _renderers(first, second)


def check_meeting(source: Rendered, target: Rendered) -> None:
    """`shared` against every pair of positions."""
    pairs = {}
    for i, a in enumerate(source.boundary.tolist()):
        for j, b in enumerate(target.boundary.tolist()):
            if a == b and a >= 0:
                pairs[a] = (i, j)
    at_source, at_target = shared(source.boundary, target.boundary)
    assert list(zip(at_source.tolist(), at_target.tolist(), strict=True)) == [pairs[p] for p in sorted(pairs)]


def test_hand_worked_places(sentencepiece_tokenizer: Any, byte_level_tokenizer: Any) -> None:
    made = Renderer(sentencepiece_tokenizer, "sp")
    rendered = made.render(text_sample("é the"))
    assert [made.table.pieces[i] for i in rendered.ids] == [b"", " é".encode(), b" the", b""] or rendered.ids[0] == 1
    spelled = [made.table.pieces[i] for i in rendered.ids]
    assert spelled[0] == spelled[-1] == b"" and b"".join(spelled) == " é the".encode()
    # before all: a space is to come that the text has not; then after each token, one more for that space
    assert rendered.boundary[:-1].tolist() == np.cumsum([len(p) for p in spelled])[:-1].tolist()
    assert rendered.boundary[0] == 0 and rendered.boundary[-2] == 7
    assert rendered.carries.tolist() == [1] * (len(spelled) - 2) + [2, 0]
    assert rendered.content_bytes == 6
    level = Renderer(byte_level_tokenizer, "level").render(text_sample("é the"))
    assert level.boundary[0] == 1  # no space is to come
    empty = made.render(text_sample(""))
    assert (empty.ids.tolist(), empty.boundary.tolist(), empty.carries.tolist()) == ([1, 2], [1, -1], [2, 0])
    nothing = made.render(text_sample("", complete=False))
    assert (nothing.ids.tolist(), nothing.carries.tolist(), nothing.content_bytes) == ([1], [0], 0)


def test_without_any_start_token(byte_level_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer.backend_tokenizer)
    made = Renderer(bare, "bare")
    assert made.start_id is None and made.end_id is None
    for text in TEXTS[1:]:
        rendered, sample = made.render(text_sample(text)), text_sample(text)
        check_places(made, sample, rendered)
        first = made.table.lengths[rendered.ids[0]]
        assert rendered.content_bytes == len(text.encode()) - first  # nothing predicts the first token
        assert rendered.boundary[:-1].tolist() == (1 + np.cumsum(made.table.lengths[rendered.ids]))[:-1].tolist()
    empty = made.render(text_sample(""))
    assert (len(empty.ids), len(empty.boundary), len(empty.carries), empty.content_bytes) == (0, 0, 0, 0)


def test_white_space_that_is_stripped_has_no_place() -> None:
    letters = {c: n for n, c in enumerate(["<s>", *"▁abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.BPE(letters, []))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>"])
    made = Renderer(wrapped(backend, bos_token="<s>", eos_token="<s>"), "strips")
    rendered = made.render(text_sample("  ab  "))
    assert [made.table.pieces[i] for i in rendered.ids] == [b"", b"a", b"b", b""]
    # the start has read nothing and yet predicts "a": who else stands there predicts a space
    assert rendered.boundary.tolist() == [-1, 4, 7, -1]
    assert rendered.content_bytes == 4


@pytest.mark.parametrize("folder", FOLDERS)
def test_places_of_texts_with_real_tokenizers(folder: str) -> None:
    made = renderer(folder)
    vectors = json.loads((SHARED / "tokenizers" / "test_vectors.json").read_text())
    lossy = folder == "models/tinystories-656k"
    swallows = folder == "tokenizers/phi-3"  # its "</s>" is plain text and takes the white space after it
    spec = json.loads(tokenizer(folder).backend_tokenizer.to_str())
    nfc = (spec["normalizer"] or {}).get("type") == "NFC"
    for text in (*TEXTS, *vectors["inputs"]["llama.cpp"], *vectors["inputs"]["kitoken_small"]):
        if lossy or (nfc and unicodedata.normalize("NFC", text) != text) or (swallows and "</s>, " in text):
            sample = text_sample(text)
            rendered = made.render(sample)
            check_places(made, sample, rendered)
            check_meeting(rendered, rendered)
        else:
            check_lossless_text(made, text)


def test_unknown_characters_cost_only_their_own_place() -> None:
    made, sample = renderer("models/tinystories-656k"), text_sample("Once upon a time é there was a cat.")
    rendered = made.render(sample)
    assert rendered.lossy
    pieces = [b"", b" ", b"On", b"ce ", b"upon a tim", b"e ", b"", b" ", b"there was a ", b"cat", b".", b""]
    assert [made.table.pieces[i] for i in rendered.ids] == pieces
    assert rendered.boundary.tolist() == [0, 1, 3, 6, 16, 18, -1, 21, 33, 36, 37, -1]
    check_places(made, sample, rendered)
    # an unknown tab is not white space that was swallowed
    assert made.render(text_sample("\t48")).boundary.tolist() == [0, 1, -1, 3, 4, -1]


@pytest.mark.parametrize("other", ["tokenizers/llama2", "tokenizers/internlm2", "zoo/code-neox", "models/stories260K"])
def test_real_tokenizers_meet(other: str) -> None:
    for text in TEXTS:
        source, target = (
            renderer("tokenizers/gpt2").render(text_sample(text)),
            renderer(other).render(text_sample(text)),
        )
        check_meeting(source, target)
        at_source, at_target = shared(source.boundary, target.boundary)
        for i, j in zip(at_source, at_target, strict=True):
            read = [
                r.table.join(x.ids[: n + 1]).lstrip(b" ")
                for r, x, n in ((renderer("tokenizers/gpt2"), source, i), (renderer(other), target, j))
            ]
            assert read[0] == read[1]
        assert source.boundary[-2] == target.boundary[-2] == 1 + len(text.encode())


# ---------------------------------------------------------------- chats

CONTENTS = (
    "Hello, how can I help you?",
    "assistant",
    "the assistant said: user\nsystem assistant:\n\nUser:",
    "[/INST] and [INST] and <<SYS>>",
    "ends with <|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\nno",
    "</s> <s> <unk> <|endoftext|> <|eot_id|><|end|>\n<|assistant|>\n",
    "  leading and trailing  ",
    "\n\nlines around\n\n",
    " \n mixed \t\n ",
    "日本語 🙂 é",
    "a",
    "",
    "   ",
)


def check_chat(made: Renderer, sample: Sample) -> Rendered:
    """Every turn's content comes back from the positions that carry it, and one control token ends it."""
    rendered = made.render(sample)
    assert not rendered.lossy
    check_places(made, sample, rendered)
    segments, line, table = sample.segments(), Line(sample), made.table
    closing = np.flatnonzero((rendered.carries == Carries.END) & (rendered.boundary >= 0))
    assert rendered.boundary[closing].tolist() == line.ends()
    assert (table.kinds[rendered.ids[closing + 1]] == Kind.CONTROL).all()
    before = 0
    for turn, stop in zip(segments, closing.tolist(), strict=True):
        at = before + np.flatnonzero(rendered.carries[before:stop] == Carries.CONTENT)
        assert (np.diff(at) == 1).all()
        spelled = table.join(rendered.ids[at + 1]).decode()
        began = len(at) and rendered.boundary[at[0]] >= 0  # else its first token began in the template
        assert spelled.strip() == turn.strip() or (not began and spelled.strip().endswith(turn.strip()))
        assert (rendered.boundary[at[1:]] >= 0).all()
        last = int(at[-1]) if len(at) else stop - 1
        between = rendered.carries[last + 1 : stop]
        assert (between == Carries.END).all() and not table.join(rendered.ids[last + 2 : stop + 1]).strip()
        before = stop + 1
    return rendered


def controls(made: Renderer, rendered: Rendered) -> list[int]:
    return [int(i) for i in rendered.ids if made.table.kinds[i] == Kind.CONTROL]


@pytest.mark.parametrize("folder", [*WITH_TEMPLATE, *WITHOUT_TEMPLATE, "plain tokenizers/llama2"])
def test_chats_of_real_tokenizers(folder: str) -> None:
    plain = folder.removeprefix("plain ")
    made = renderer(folder) if plain == folder else Renderer(tokenizer(plain), plain, "plain")
    system = [("system", "Be brief.")] if folder not in NO_SYSTEM else []
    calm = chat_sample(*system, ("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"))
    expected = controls(made, check_chat(made, calm))
    for n, content in enumerate(CONTENTS):
        other = CONTENTS[(n + 5) % len(CONTENTS)]
        chat = [*system, ("user", other), ("assistant", content), ("user", content), ("assistant", other)]
        rendered = check_chat(made, chat_sample(*chat))
        assert controls(made, rendered) == expected  # what a content spells is never a control token
        whole = sum(len(c.encode()) for c in (content, other))
        assert whole - rendered.content_bytes <= sum(len(c) - len(c.strip()) for c in (content, other))


@pytest.mark.parametrize("folder", WITH_TEMPLATE)
def test_first_word_after_a_template(folder: str) -> None:
    made = renderer(folder)
    rendered = check_chat(
        made, chat_sample(("user", "q"), ("assistant", "hello world"), ("user", "q"), ("assistant", "x"))
    )
    known = rendered.boundary[rendered.boundary >= 0].tolist()
    first = 0 if FOLDERS[folder][1] else 1  # " hello" with a space that the content does not have
    assert known[0] == first and known[-3:] == [12, 13 + GAP + first, 15 + GAP]
    assert rendered.content_bytes == 12


@settings(max_examples=80)
@given(contents=st.lists(UNICODE, min_size=4, max_size=4))
def test_plain_chats_of_any_content(
    byte_level_tokenizer: Any, sentencepiece_tokenizer: Any, contents: list[str]
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    sample = chat_sample(*zip(roles, [*contents, contents[0]], strict=True))
    rendered = []
    for made in both(byte_level_tokenizer, sentencepiece_tokenizer):
        rendered.append(made.render(sample))
        check_places(made, sample, rendered[-1])
        closing = (rendered[-1].carries == Carries.END) & (rendered[-1].boundary >= 0)
        assert rendered[-1].boundary[closing].tolist() == Line(sample).ends()
    check_meeting(*rendered)
    at = shared(rendered[0].boundary, rendered[1].boundary)
    assert {int(p) for p in rendered[0].boundary[at[0]]} >= set(Line(sample).ends())


def test_chats_of_two_templates_meet() -> None:
    names = ["tokenizers/llama2", "tokenizers/llama3", "tokenizers/phi-3", "tokenizers/qwen2.5"]
    for content in CONTENTS:
        sample = chat_sample(("user", "q"), ("assistant", content), ("user", "q"), ("assistant", "The end."))
        rendered = [renderer(name).render(sample) for name in names]
        for source in rendered:
            for target in rendered:
                check_meeting(source, target)
                at_source, at_target = shared(source.boundary, target.boundary)
                ends = source.carries[at_source] == Carries.END
                assert set(source.boundary[at_source[ends]].tolist()) <= set(Line(sample).ends())
                kinds = zip(source.carries[at_source], target.carries[at_target], at_source, strict=True)
                for a, b, i in kinds:  # an end meets an end
                    assert a == b or not content.strip() or source.boundary[i] in Line(sample).ends()


def test_white_space_that_a_control_token_swallows() -> None:
    made = renderer("tokenizers/phi-3")  # <|assistant|> takes all white space after it
    sample = chat_sample(("user", "q"), ("assistant", "  hi  "))
    rendered = check_chat(made, sample)
    assert made.render(chat_sample(("user", "q"), ("assistant", "hi"))).ids[:5].tolist() == rendered.ids[:5].tolist()
    at = np.flatnonzero(rendered.carries)
    assert [made.table.pieces[i] for i in rendered.ids[at + 1]] == [b" hi", b"  ", b""]
    assert rendered.boundary[at].tolist() == [-1, 5, 7]  # who has read two spaces elsewhere awaits "hi", not " hi"
    assert rendered.content_bytes == 4
    blank = made.render(chat_sample(("user", "q"), ("assistant", "  ")))
    assert (blank.content_bytes, blank.carries.tolist().count(Carries.CONTENT)) == (0, 0)
    assert blank.boundary[blank.carries == Carries.END].tolist() == [3]


def test_templates_that_lose_a_message_are_refused(byte_level_tokenizer: Any) -> None:
    for folder in sorted(NO_SYSTEM):
        with pytest.raises(ValueError, match=rf"{folder}: its chat template, on sample .*message 1 \(system\)"):
            renderer(folder).render(chat_sample(("system", "Be brief."), ("user", "q"), ("assistant", "a")))
    chat = chat_sample(("user", "Question"), ("assistant", "Answer"))
    templates = {
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}": "rewrites the content of message",
        "{% for m in messages %}{{ m['content'][:4] }}{% endfor %}": "rewrites the content of message 1",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}": "drops or rewrites message 2",
        "{% for m in messages | reverse %}{{ m['content'] }}|{% endfor %}": r"reorders message 2 \(assistant\)",
        "{{ raise_exception('no chats here') }}": "no chats here",
        "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}": r"repeats message 2 \(assistant\)",
    }
    for template, told in templates.items():
        with pytest.raises(ValueError, match=rf"my-model: the chat template given, on sample {chat.id}: .*{told}"):
            Renderer(byte_level_tokenizer, "my-model", template).render(chat)


def test_a_chat_without_an_assistant_carries_nothing(byte_level_tokenizer: Any) -> None:
    rendered = Renderer(byte_level_tokenizer, "level").render(chat_sample(("user", "q")))
    assert not rendered.carries.any() and (rendered.boundary == -1).all() and rendered.content_bytes == 0


# ---------------------------------------------------------------- the small parts


def test_bytes_before() -> None:
    assert bytes_before("").tolist() == [0]
    assert bytes_before("abc").tolist() == [0, 1, 2, 3]
    assert bytes_before("aé🙂b").tolist() == [0, 1, 3, 7, 8]


def make_table(*pieces: bytes) -> ByteTable:
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    return ByteTable(tuple(pieces), np.zeros(len(pieces), np.uint8), lengths, False, "")


def test_place_by_hand() -> None:
    table = make_table(b" ab", b"ab", b"\xc3", b"\xa9", b" ", b"x")
    exact = place(table, [1, 2, 3, 5], [(0, 2), (2, 3), (2, 3), (3, 4)], "abéx")
    assert (exact.starts.tolist(), exact.ends.tolist(), exact.lossy) == ([0, 2, 3, 4], [2, 3, 4, 5], False)
    marked = place(table, [0, 5], [(0, 2), (2, 3)], "abx")
    assert (marked.starts.tolist(), marked.ends.tolist()) == ([0, 2], [2, 3])
    alone = place(table, [4, 1], [(0, 0), (0, 2)], "ab")
    assert (alone.starts.tolist(), alone.ends.tolist()) == ([0, 0], [0, 2])
    stripped = place(table, [1, 5], [(2, 4), (4, 5)], "\n\nabx \n")
    assert (stripped.starts.tolist(), stripped.ends.tolist(), stripped.lossy) == ([2, 4], [4, 5], True)
    changed = place(table, [1, 5, 1], [(0, 2), (2, 3), (3, 5)], "abXab")
    assert (changed.starts.tolist(), changed.ends.tolist(), changed.lossy) == ([0, 2, 3], [2, -1, 5], True)
    assert changed.moved(10).ends.tolist() == [12, -1, 15]
    nothing = place(table, [], [], "")
    assert (nothing.ids, nothing.ends.tolist(), nothing.lossy) == ([], [], False)


def found(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> list[tuple[int, int, int]]:
    return [(c.start, c.stop, c.lead) for c in locate(messages, render(messages), render)]


def test_locate_by_hand() -> None:
    messages = [Message("user", "a|b"), Message("assistant", " |b ")]
    assert found(messages, lambda ms: "".join(f"<{m.content}|b" for m in ms)) == [(1, 4, 0), (7, 11, 0)]
    assert found(messages, lambda ms: "".join(f"<{m.content.strip()}>" for m in ms)) == [(1, 4, 0), (6, 8, 1)]
    assert found(messages, lambda ms: "".join(f"<{m.content.lstrip()}>" for m in ms)) == [(1, 4, 0), (6, 9, 1)]
    assert found(messages, lambda ms: "".join(f"<{m.content.rstrip()}>" for m in ms)) == [(1, 4, 0), (6, 9, 0)]
    assert found([], lambda ms: "x") == []


def test_batches_by_length() -> None:
    lengths = [3, 9, 1, 4, 9, 2]
    batches = list(by_length(list("abcdef"), lengths, 12))
    assert batches == [["b"], ["e"], ["d", "a", "f"], ["c"]]
    assert list(by_length(["long"], [100], 5)) == [["long"]]
    assert list(by_length([], [], 5)) == []
    ids, mask = pad([np.array([5, 6, 7]), np.array([8]), np.array([], dtype=np.int32)])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_samples_and_their_ids() -> None:
    chat = chat_sample(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
    assert chat.segments() == ("a", "b") and text_sample("x").segments() == ("x",)
    for sample in (chat, text_sample("naïve", complete=False), text_sample("")):
        assert Sample.from_row(json.loads(json.dumps(sample.to_row()))) == sample
    assert sample_id("x") == sample_id("x") != sample_id("y")
    assert sample_id(None, chat.messages) != sample_id(None, chat.messages[:2])
    assert len(sample_id("\ud800")) == 16
