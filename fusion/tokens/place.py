"""Where tokens lie in the bytes of a text, and where a chat's contents lie in what its template rendered."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fusion.records import Message
from fusion.tokens.bytes import ByteTable


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and the bytes starts[n]..ends[n] of a text that each one covers, int64; -1 where that is unknown."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray
    lossy: bool = False

    def moved(self, by: int) -> "Tokens":
        """The same tokens in a text that has `by` more bytes in front."""
        starts, ends = (np.where(at >= 0, at + by, -1) for at in (self.starts, self.ends))
        return Tokens(self.ids, starts, ends, self.lossy)

    @staticmethod
    def joined(parts: Sequence["Tokens"]) -> "Tokens":
        """Several runs of tokens of one text as one."""
        empty = np.zeros(0, dtype=np.int64)
        return Tokens(
            [i for part in parts for i in part.ids],
            np.concatenate([empty, *(part.starts for part in parts)]),
            np.concatenate([empty, *(part.ends for part in parts)]),
            any(part.lossy for part in parts),
        )


def bytes_before(text: str) -> np.ndarray:
    """int64 (len(text) + 1,): how many UTF-8 bytes come before each character."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    return np.fromiter(accumulate((len(c.encode()) for c in text), initial=0), dtype=np.int64, count=len(text) + 1)


def place(table: ByteTable, ids: list[int], offsets: Sequence[tuple[int, int]], text: str) -> Tokens:
    """Place the tokens of `text` in its bytes.

    Where the tokens' bytes spell the text (with or without a space put before it, with or without the white space that
    a neighbouring control token swallowed) the places are exact, inside characters too. Where they do not, the text
    was changed by the tokenizer: a token is placed only where its own bytes are the text's at its character offsets.
    """
    if not ids:
        return Tokens([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    spelled, raw = table.join(ids), text.encode()
    ends = np.cumsum(table.lengths[ids])
    known = table.lengths[ids].all()  # an unknown token may stand for white space: that is not swallowed but lost
    for seen in dict.fromkeys((raw, raw.lstrip(), raw.rstrip(), raw.strip())):
        if known and spelled in (seen, b" " + seen):
            lead = (len(raw) - len(raw.lstrip())) if not raw.startswith(seen) else 0
            ends = ends + (lead - (len(spelled) - len(seen)))
            starts = np.concatenate([[lead], ends[:-1]])
            return Tokens(ids, np.maximum(starts, lead), ends)
    return _place_by_offsets(table, ids, offsets, text)


def _place_by_offsets(table: ByteTable, ids: list[int], offsets: Sequence[tuple[int, int]], text: str) -> Tokens:
    before, raw = bytes_before(text), text.encode()
    starts, ends = np.full(len(ids), -1, dtype=np.int64), np.full(len(ids), -1, dtype=np.int64)
    for n, (i, (a, b)) in enumerate(zip(ids, offsets, strict=True)):
        piece, shown = table.pieces[i], raw[before[a] : before[b]]
        alone = n + 1 == len(ids) or offsets[n + 1][0] >= b  # tokens that share a character's offsets end inside it
        if shown and alone and piece.endswith(shown) and not piece[: -len(shown)].strip():
            starts[n], ends[n] = before[a], before[b]
    return Tokens(ids, starts, ends, lossy=True)


@dataclass(frozen=True, slots=True)
class Content:
    """Characters start..stop of a rendering are a message's content, less `lead` characters stripped in front."""

    message: Message
    start: int
    stop: int
    lead: int


def locate(messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]) -> Iterator[Content]:
    """Find every message's content in a rendered chat.

    The template is rendered once more with marks in place of the contents; what stands between the marks is the
    template's own, so a content that repeats template words cannot mislead.

    Args:
        render: renders other messages with the same template.

    Raises:
        ValueError: the template drops, reorders or rewrites a content.
    """
    marks = [f"\ue000{n}\ue001" for n in range(len(messages))]
    skeleton = render([Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)])
    cursor, rest = 0, skeleton
    for n, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        fixed, found, rest = rest.partition(mark)
        if not found or not text.startswith(fixed, cursor):
            raise ValueError(f"drops or reorders message {n + 1} ({message.role})")
        start = cursor + len(fixed)
        until = rest.partition(marks[n + 1])[0] if n + 1 < len(marks) else rest
        content = message.content
        for shown in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
            if text.startswith(shown + until, start):
                lead = len(content) - len(content.lstrip()) if not content.startswith(shown) else 0
                yield Content(message, start, start + len(shown), lead)
                cursor = start + len(shown)
                break
        else:
            raise ValueError(f"rewrites the content of message {n + 1} ({message.role})")
