"""Every token id of a tokenizer as bytes: the one thing that all tokenizers agree on."""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

_PROBES = ("the cat sat on the mat", "one two", "a day in the life")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Kind(IntEnum):
    """What an id stands for."""

    TEXT = 0  # its bytes are text
    BYTE = 1  # one byte, where no longer token fits (`<0x0A>`)
    CONTROL = 2  # a special token: no bytes of the text
    UNUSED = 3  # no token has this id


@dataclass(frozen=True)
class ByteTable:
    """id → (bytes, kind).

    Attributes:
        pieces: the bytes of each id, empty for control and unused ids.
        kinds: uint8 (V,), a `Kind` each.
        lengths: int64 (V,), `len(piece)`.
        marks_start: the tokenizer puts a space before the text that the text does not have.
        digest: hexadecimal SHA-256 of pieces, kinds and control tokens: one digest, one vocabulary.
    """

    pieces: tuple[bytes, ...]
    kinds: np.ndarray
    lengths: np.ndarray
    marks_start: bool
    digest: str

    def __len__(self) -> int:
        return len(self.pieces)

    def join(self, ids: "np.ndarray | list[int]") -> bytes:
        """The bytes that a sequence of ids spells."""
        return b"".join([self.pieces[i] for i in ids])


def byte_table(tokenizer: Any, name: str = "tokenizer") -> ByteTable:
    """The byte table of a fast Hugging Face tokenizer, read off its own model, pre-tokenizer and decoder.

    Args:
        tokenizer: a `PreTrainedTokenizerBase` as loaded (transformers may rebuild the pipeline, so no file is asked).
        name: what to call it in an error.

    Raises:
        ValueError: the tokenizer has no fast form, or its tokens do not spell plain text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(f"{name}: {type(tokenizer).__name__} has no fast form (tokenizer.json); convert it first")
    spec = json.loads(backend.to_str())
    spell = _speller(spec)
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    pieces, kinds = [b""] * size, np.full(size, Kind.UNUSED, dtype=np.uint8)
    for piece, i in backend.get_vocab(with_added_tokens=False).items():
        pieces[i], kinds[i] = spell(piece)
    for i, token in backend.get_added_tokens_decoder().items():
        byte = _BYTE_PIECE.match(token.content)
        if byte and _has_byte_fallback(spec):
            pieces[i], kinds[i] = bytes([int(byte[1], 16)]), Kind.BYTE
        elif token.special:
            pieces[i], kinds[i] = b"", Kind.CONTROL
        elif kinds[i] == Kind.UNUSED:  # a non-special added token is literal text, never mark-encoded
            pieces[i], kinds[i] = token.content.encode("utf-8", "surrogatepass"), Kind.TEXT
    unknown = spec["model"].get("unk_token")
    if isinstance(spec["model"].get("unk_id"), int):  # Unigram names its unknown piece by number
        unknown = spec["model"]["vocab"][spec["model"]["unk_id"]][0]
    if unknown is not None and (i := backend.token_to_id(unknown)) is not None:
        pieces[i], kinds[i] = b"", Kind.CONTROL
    marks = [_spells(backend, pieces, probe, name) for probe in _PROBES]
    return ByteTable(
        pieces=tuple(pieces),
        kinds=kinds,
        lengths=np.array([len(p) for p in pieces], dtype=np.int64),
        marks_start=marks[0],
        digest=_digest(pieces, kinds, {i: t.content for i, t in backend.get_added_tokens_decoder().items()}),
    )


def _speller(spec: dict) -> Any:
    """A function piece → (bytes, kind) for the pieces of the tokenizer's own model."""
    if any(part["type"] == "ByteLevel" for part in _parts(spec)):
        byte_of = {char: byte for byte, char in _printable_bytes().items()}

        def byte_level(piece: str) -> tuple[bytes, Kind]:
            if all(c in byte_of for c in piece):
                return bytes(byte_of[c] for c in piece), Kind.TEXT
            return piece.encode("utf-8", "surrogatepass"), Kind.TEXT

        return byte_level
    if spec["model"]["type"] == "WordPiece":
        prefix = spec["model"].get("continuing_subword_prefix") or "##"

        def word_piece(piece: str) -> tuple[bytes, Kind]:
            word = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
            return word.encode("utf-8", "surrogatepass"), Kind.TEXT

        return word_piece
    mark, fallback = _space_mark(spec), _has_byte_fallback(spec)

    def sentence_piece(piece: str) -> tuple[bytes, Kind]:
        byte = _BYTE_PIECE.match(piece) if fallback else None
        if byte:
            return bytes([int(byte[1], 16)]), Kind.BYTE
        text = piece.replace(mark, " ") if mark else piece
        return text.encode("utf-8", "surrogatepass"), Kind.TEXT

    return sentence_piece


def _parts(spec: dict) -> list[dict]:
    """Every component of normaliser, pre-tokenizer and decoder, sequences flattened."""
    found, waiting = [], [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    while waiting:
        part = waiting.pop(0)
        if part is None:
            continue
        waiting += part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
        found.append(part)
    return found


def _space_mark(spec: dict) -> str | None:
    """The character that stands for a space in pieces (`▁`), None where a space is a space."""
    for part in _parts(spec):
        if part["type"] == "Metaspace":
            return str(part["replacement"])
        if part["type"] == "Replace":
            pattern = (part.get("pattern") or {}).get("String")
            if pattern == " " and part.get("content"):
                return str(part["content"])
            if part.get("content") == " " and pattern:
                return str(pattern)
    return None


def _has_byte_fallback(spec: dict) -> bool:
    return bool(spec["model"].get("byte_fallback")) or any(p["type"] == "ByteFallback" for p in _parts(spec))


def _printable_bytes() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters, on which every byte-level BPE is built (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in plain}
    spare = (b for b in range(256) if b not in table)
    return table | {b: chr(0x100 + n) for n, b in enumerate(spare)}


def _spells(backend: Any, pieces: list[bytes], probe: str, name: str) -> bool:
    """Check that the tokens of plain words spell them; returns whether a space was put before."""
    spelled = b"".join(pieces[i] for i in backend.encode(probe, add_special_tokens=False).ids)
    if spelled not in (probe.encode(), b" " + probe.encode()):
        raise ValueError(
            f"{name}: cannot be mapped to bytes: its tokens for {probe!r} spell {spelled.decode(errors='replace')!r}"
        )
    return spelled != probe.encode()


def _digest(pieces: list[bytes], kinds: np.ndarray, added: dict[int, str]) -> str:
    whole = hashlib.sha256(kinds.tobytes())
    for i, piece in enumerate(pieces):
        if kinds[i] == Kind.CONTROL:  # no bytes of the text, but two that change places are two vocabularies
            piece = added.get(i, "").encode("utf-8", "surrogatepass")
        whole.update(len(piece).to_bytes(4, "little") + piece)
    return whole.hexdigest()
