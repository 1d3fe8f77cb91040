"""The frozen records that pass between rooms. Arrays are numpy; nothing here reads a file or knows a rank."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np


class Carries(IntEnum):
    """What the token predicted at a position is to the sample."""

    NOTHING = 0  # a prompt, template text, padding: no loss
    CONTENT = 1  # a token of a segment
    END = 2  # the token that ends the text or the assistant's turn


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One text or chat, joined everywhere by `id`.

    Exactly one of `text` and `messages` is set. `complete` is false for a piece that was cut from a longer text
    and does not end where that text ends: no end-of-text token follows it.
    """

    id: str
    domain: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    complete: bool = True

    def segments(self) -> tuple[str, ...]:
        """The stretches that carry loss: the whole text, or each assistant turn."""
        if self.text is not None:
            return (self.text,)
        return tuple(m.content for m in self.messages if m.role == "assistant")

    def sizes(self) -> list[int]:
        """Bytes of each segment."""
        return [len(segment.encode()) for segment in self.segments()]

    def to_row(self) -> dict[str, object]:
        """The sample as one JSON line holds it."""
        row: dict[str, object] = {"id": self.id, "domain": self.domain, "complete": self.complete}
        if self.text is not None:
            row["text"] = self.text
        else:
            row["messages"] = [{"role": m.role, "content": m.content} for m in self.messages]
        return row

    @staticmethod
    def from_row(row: dict) -> "Sample":
        """The inverse of `to_row`."""
        messages = tuple(Message(m["role"], m["content"]) for m in row.get("messages") or ())
        return Sample(row["id"], row["domain"], row.get("text"), messages, row.get("complete", True))


def sample_id(text: str | None, messages: tuple[Message, ...] = ()) -> str:
    """A sample's id: 16 hexadecimal digits of the SHA-256 of its content, the same on every machine."""
    content: object = text if text is not None else [[m.role, m.content] for m in messages]
    packed = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.sha256(packed).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as one model reads it. Arrays have one element a position; position i predicts `ids[i + 1]`.

    Attributes:
        ids: int32 (T,), the token ids, start token included.
        boundary: int64 (T,), the byte offset, in the concatenation of the sample's segments (each followed by one
            more place for its end), up to which position i has read; -1 where it stands at no offset that another
            tokenizer could share.
        carries: uint8 (T,), a `Carries` for the token that follows position i.
        content_bytes: bytes of the segments that positions with `Carries.CONTENT` predict, for bits per byte.
        lossy: the tokenizer changed the text (normaliser, unknown character); only its untouched part is aligned.
    """

    ids: np.ndarray
    boundary: np.ndarray
    carries: np.ndarray
    content_bytes: int
    lossy: bool = False


@dataclass(frozen=True, slots=True)
class Sparse:
    """Some entries of a next-token distribution at n positions, as compressed rows.

    Attributes:
        offsets: int64 (n + 1,), row i is the slice offsets[i]:offsets[i + 1] of the two arrays below.
        ids: int32 (m,), token ids, distinct within a row.
        probs: float32 (m,), their probabilities; a row sums to at most 1, but for rounding, and what it lacks is
            mass not kept.
    """

    offsets: np.ndarray
    ids: np.ndarray
    probs: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def joined(parts: "Sequence[Sparse]") -> "Sparse":
        """Rows of several one after the other."""
        counts = [np.diff(part.offsets) for part in parts]
        offsets = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *counts]), dtype=np.int64)
        ids = np.concatenate([np.zeros(0, dtype=np.int32), *(part.ids for part in parts)])
        return Sparse(offsets, ids, np.concatenate([np.zeros(0, dtype=np.float32), *(part.probs for part in parts)]))

    def rows(self, wanted: np.ndarray) -> "Sparse":
        """Some of the rows, by a mask (n,)."""
        if wanted.all():
            return self
        counts = np.diff(self.offsets)
        entries = np.repeat(wanted, counts)
        return Sparse(np.append(0, np.cumsum(counts[wanted])), self.ids[entries], self.probs[entries])

    def mass(self) -> np.ndarray:
        """float32 (n,), the probability that each row keeps."""
        return np.add.reduceat(np.append(self.probs, np.float32(0)), self.offsets[:-1]) * (np.diff(self.offsets) > 0)


@dataclass(frozen=True, slots=True)
class Heard:
    """What one source said of one sample, as its cache gives it back.

    Attributes:
        ids: int32 (n,), the source's own next token at each kept position.
        boundary: int64 (n,), as in `Rendered`.
        carries: uint8 (n,), as in `Rendered`.
        logp: float32 (n,), the source's log-probability (nats) of that next token.
        entries: the kept part of the source's distribution at each position.
        content_bytes: as in `Rendered`.
        grain: float32 (n,), where entries were drawn, the probability that a single draw stands for: what no draw met
            may have about as much. None where all entries are exact.
    """

    ids: np.ndarray
    boundary: np.ndarray
    carries: np.ndarray
    logp: np.ndarray
    entries: Sparse
    content_bytes: int
    grain: np.ndarray | None = None

    def bits_per_byte(self) -> float:
        """The source's cross-entropy on the sample's segments, in bits per byte; infinite where it predicts none."""
        return self.bits("bytes")

    def bits(self, unit: Literal["bytes", "tokens"]) -> float:
        """The same by byte, or by token of the source's own."""
        content = self.carries == Carries.CONTENT
        count = self.content_bytes if unit == "bytes" else int(content.sum())
        if not count:
            return float("inf")
        nats = -float(self.logp[content].sum(dtype=np.float64))
        return nats / count / float(np.log(2))
