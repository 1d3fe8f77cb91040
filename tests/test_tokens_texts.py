"""Every tokenizer of ../shared on real text and on any text: exact where it can be, told where it is not."""

import json
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from test_tokens import FOLDERS, SHARED, check_places, renderer, text_sample, tokenizer
from test_tokens_kinds import TEXTS

from fusion.records import Carries
from fusion.tokens.bytes import Kind

UNKNOWN = "models/tinystories-656k"  # no byte fallback: what it does not know is lost


@cache
def real_texts(a_file: int) -> tuple[str, ...]:
    """Texts of ../shared/text, `a_file` of each file, spread over it; a chat as its turns one after the other."""
    if not (SHARED / "text").is_dir():
        pytest.skip(f"needs {SHARED / 'text'}")
    texts = []
    for path in sorted((SHARED / "text").glob("*.jsonl")):
        rows = path.read_text().splitlines()
        for row in map(json.loads, rows[:: len(rows) // a_file][:a_file]):
            texts.append(row.get("text") or "\n\n".join(m["content"] for m in row["messages"]))
    assert len(texts) == 4 * a_file
    return tuple(texts)


@cache
def normal_form(folder: str) -> Literal["NFC"] | None:
    """The Unicode normal form that a tokenizer brings texts to, if it does."""
    normalizer = json.loads(tokenizer(folder).backend_tokenizer.to_str())["normalizer"] or {}
    return "NFC" if normalizer.get("type") == "NFC" else None


def changes(folder: str, text: str) -> bool:
    """Whether a tokenizer changes a text, by what is known of each: a normal form, `▁` for a space, bytes it lacks."""
    form = normal_form(folder)
    if form is not None and unicodedata.normalize(form, text) != text:
        return True
    swallows = folder == "tokenizers/phi-3" and any(after[:1].isspace() for after in text.split("</s>")[1:])
    return ("▁" in text and not byte_level(folder)) or swallows or bool(lacks(folder) & set(text.encode()))


@cache
def lacks(folder: str) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for, and drops: falcon's has none for most control characters."""
    if not byte_level(folder):
        return frozenset()
    return frozenset(range(256)) - {piece[0] for piece in renderer(folder).table.pieces if len(piece) == 1}


@cache
def byte_level(folder: str) -> bool:
    return '"ByteLevel"' in str(json.dumps(json.loads(tokenizer(folder).backend_tokenizer.to_str())["decoder"]))


def check(folder: str, texts: tuple[str, ...]) -> Iterator[bool]:
    """Every text by the rules; yields whether each came back byte for byte."""
    made = renderer(folder)
    for text in texts:
        sample = text_sample(text)
        rendered = made.render(sample)
        raw, inner = text.encode(), rendered.ids[1:-1]
        exact = made.table.join(inner) in (raw, b" " + raw) and made.table.unknown not in inner
        assert rendered.lossy == (not exact)
        if exact:
            assert (made.table.kinds[inner] != Kind.CONTROL).all()
            assert (rendered.boundary[:-1] >= 0).all() and rendered.content_bytes == len(raw)
        else:
            check_places(made, sample, rendered)
        yield exact


@pytest.mark.parametrize("folder", FOLDERS)
def test_some_real_texts(folder: str) -> None:
    exact = list(check(folder, real_texts(8)))
    assert folder == UNKNOWN or all(exact)


@pytest.mark.slow  # two minutes for all
@pytest.mark.parametrize("folder", FOLDERS)
def test_two_thousand_real_texts(folder: str) -> None:
    texts = real_texts(500)
    exact = list(check(folder, texts))
    expected = [not changes(folder, text) for text in texts]
    assert exact == expected or folder == UNKNOWN
    assert sum(exact) == (394 if folder == UNKNOWN else 2000)


@pytest.mark.parametrize("folder", FOLDERS)
@settings(max_examples=40)
@given(text=TEXTS)
def test_any_text(folder: str, text: str) -> None:
    (exact,) = check(folder, (text,))
    assert folder == UNKNOWN or exact == (not changes(folder, text)) or "</s>" in text


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_vectors(folder: str) -> None:
    vectors = json.loads((SHARED / "tokenizers" / "test_vectors.json").read_text())["inputs"]
    texts = tuple(text for family in vectors.values() for text in family)
    exact = list(check(folder, texts))
    assert folder == UNKNOWN or exact == [not changes(folder, text) for text in texts]


def test_what_is_known_is_placed_among_what_is_not() -> None:
    """In text with unknown characters each place is lost only at them and where a token reaches over one."""
    made = renderer(UNKNOWN)
    for text in real_texts(8):
        rendered = made.render(text_sample(text))
        unknown = rendered.ids == made.table.unknown
        beside = unknown[:-1] | unknown[1:]
        known = np.flatnonzero((rendered.carries[:-1] == Carries.CONTENT) & ~beside)
        assert (rendered.boundary[known] >= 0).all()
