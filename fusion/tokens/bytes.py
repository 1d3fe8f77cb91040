"""Every token id of a tokenizer as bytes: the one thing that all tokenizers agree on."""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from fusion.tokens.encode import Encoder, fast_form

_PROBES = ("the cat sat on the mat", "one two", "a day in the life")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")


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
        unknown: the id for what the vocabulary cannot spell, a control id with no bytes; None where there is none.
    """

    pieces: tuple[bytes, ...]
    kinds: np.ndarray
    lengths: np.ndarray
    marks_start: bool
    digest: str
    unknown: int | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    def join(self, ids: "np.ndarray | list[int]") -> bytes:
        """The bytes that a sequence of ids spells."""
        return b"".join([self.pieces[i] for i in ids])


def byte_table(tokenizer: Any, name: str = "tokenizer") -> ByteTable:
    """The byte table of a fast Hugging Face tokenizer: see `read`."""
    return read(tokenizer, name)[0]


def read(tokenizer: Any, name: str) -> tuple[ByteTable, Encoder]:
    """A fast tokenizer's byte table, read off its own model, pre-tokenizer and decoder, and an encoder of its ids.

    Args:
        tokenizer: a `PreTrainedTokenizerBase` as loaded (transformers may rebuild the pipeline, so no file is asked).
        name: what to call it in an error.

    Raises:
        ValueError: the tokenizer has no fast form, gives one id to two tokens, or its tokens do not spell plain text.
    """
    backend = fast_form(tokenizer, name)
    spec = json.loads(backend.to_str())
    spell = _speller(spec)
    model, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    size = max([*model.values(), *added], default=-1) + 1
    pieces, kinds = [b""] * size, np.full(size, Kind.UNUSED, dtype=np.uint8)
    owner: dict[int, str] = {}
    for piece, i in model.items():
        if (other := owner.setdefault(i, piece)) != piece:
            raise ValueError(f"{name}: its vocabulary gives id {i} to both {other!r} and {piece!r}")
        pieces[i], kinds[i] = spell(piece)
    unknown = _unknown(spec, backend)
    no_text = [*np.flatnonzero(kinds == Kind.BYTE).tolist(), *([] if unknown is None else [unknown])]
    encoder = Encoder(tokenizer, name, {owner[i]: i for i in no_text if i in owner})
    for i, token in added.items():
        if owner.get(i, token.content) != token.content:  # new ids count tokens; past a gap they run into old
            raise ValueError(f"{name}: id {i} is both {owner[i]!r} of its vocabulary and added token {token.content!r}")
        byte = _BYTE_PIECE.match(token.content)
        if byte and _has_byte_fallback(spec):
            pieces[i], kinds[i] = bytes([int(byte[1], 16)]), Kind.BYTE
        elif token.special and i not in encoder.unavoidable:
            pieces[i], kinds[i] = b"", Kind.CONTROL
        elif i not in owner:
            pieces[i], kinds[i] = _literal(token, backend, spec), Kind.TEXT
    if unknown is not None:
        pieces[unknown], kinds[unknown] = b"", Kind.CONTROL
    table = ByteTable(
        pieces=tuple(pieces),
        kinds=kinds,
        lengths=np.array([len(p) for p in pieces], dtype=np.int64),
        marks_start=_marks_start(encoder, pieces, unknown, name),
        digest=_digest(pieces, kinds, {i: t.content for i, t in added.items()}),
        unknown=unknown,
    )
    return table, encoder


def _literal(token: Any, backend: Any, spec: dict) -> bytes:
    """The bytes of an added token that is no piece of the model: its own text, as the normalizer has it.

    Where it is matched in normalized text, a normalizer that puts a mark before every text has put one before the token
    too, which is then found after a space only.
    """
    content: str = token.content
    normalizers = _flat(spec.get("normalizer"))
    if token.normalized and normalizers:
        content = backend.normalizer.normalize_str(content)
        if any(part["type"] == "ByteLevel" for part in normalizers):
            return bytes(_speller(spec)(content)[0])
        if (mark := _space_mark(normalizers, [])) is not None:
            content = content.replace(mark, " ")
    return content.encode("utf-8", "surrogatepass")


def _unknown(spec: dict, backend: Any) -> int | None:
    """The id that stands for what the vocabulary cannot spell."""
    piece = spec["model"].get("unk_token")
    if isinstance(spec["model"].get("unk_id"), int):  # Unigram names its unknown piece by number
        piece = spec["model"]["vocab"][spec["model"]["unk_id"]][0]
    found = None if piece is None else backend.token_to_id(piece)
    return None if found is None else int(found)


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
    before = _flat(spec.get("normalizer")) + _flat(spec.get("pre_tokenizer"))
    mark, fallback = _space_mark(before, _flat(spec.get("decoder"))), _has_byte_fallback(spec)

    def sentence_piece(piece: str) -> tuple[bytes, Kind]:
        byte = _BYTE_PIECE.match(piece) if fallback else None
        if byte:
            return bytes([int(byte[1], 16)]), Kind.BYTE
        text = piece.replace(mark, " ") if mark else piece
        return text.encode("utf-8", "surrogatepass"), Kind.TEXT

    return sentence_piece


def _flat(part: dict | None) -> list[dict]:
    """A component of the pipeline, sequences flattened."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [part, *(found for one in inner for found in _flat(one))]


def _parts(spec: dict) -> list[dict]:
    """Every component of normaliser, pre-tokenizer and decoder, sequences flattened."""
    return [part for name in ("normalizer", "pre_tokenizer", "decoder") for part in _flat(spec.get(name))]


def _space_mark(before: list[dict], after: list[dict]) -> str | None:
    """The character that stands for a space in pieces (`▁`), None where a space is a space.

    Args:
        before: components that make pieces of text; one that replaces something else by a space is no sign of a mark.
        after: decoders, which make text of pieces.
    """
    for part in before + after:
        if part["type"] == "Metaspace":
            return str(part["replacement"])
    for parts, text_first in ((before, True), (after, False)):
        for part in parts:
            if part["type"] == "Replace":
                sides = ((part.get("pattern") or {}).get("String"), part.get("content"))
                text, piece = sides if text_first else sides[::-1]
                if text == " " and piece:
                    return str(piece)
    return None


def _has_byte_fallback(spec: dict) -> bool:
    return bool(spec["model"].get("byte_fallback")) or any(p["type"] == "ByteFallback" for p in _parts(spec))


def _printable_bytes() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters, on which every byte-level BPE is built (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in plain}
    spare = (b for b in range(256) if b not in table)
    return table | {b: chr(0x100 + n) for n, b in enumerate(spare)}


def _marks_start(encoder: Encoder, pieces: list[bytes], unknown: int | None, name: str) -> bool:
    """Check that the tokens of plain words spell them; returns whether a space was put before.

    A vocabulary that cannot spell English, of another script perhaps, is asked for words of its own.
    """
    words = [word for p in pieces if (word := p.decode(errors="ignore").strip()).isalnum()][:8] * 2
    marks: list[bool] = []
    for probe in (*_PROBES, " ".join(words), "".join(words)):
        ids = encoder.encode(probe, literal=True).ids
        if not ids or unknown in ids or (marks and probe not in _PROBES):
            continue
        spelled = b"".join(pieces[i] for i in ids)
        if spelled not in (probe.encode(), b" " + probe.encode()):
            shown = spelled.decode(errors="replace")
            raise ValueError(f"{name}: cannot be mapped to bytes: its tokens for {probe!r} spell {shown!r}")
        marks.append(spelled != probe.encode())
    if not marks:
        raise ValueError(
            f"{name}: cannot be mapped to bytes: neither plain words nor its own can be written in its tokens"
        )
    return marks[0]


def _digest(pieces: list[bytes], kinds: np.ndarray, added: dict[int, str]) -> str:
    whole = hashlib.sha256(kinds.tobytes())
    control = (kinds == Kind.CONTROL).tolist()
    for i, piece in enumerate(pieces):
        if control[i]:  # no bytes of the text, but two that change places are two vocabularies
            piece = added.get(i, "").encode("utf-8", "surrogatepass")
        whole.update(len(piece).to_bytes(4, "little") + piece)
    return whole.hexdigest()
