"""What a source's reading of a sample cost it, in bits per byte: as a whole, by segment, or byte by byte.

A place is a byte offset as in `Rendered.boundary`. Between two places that a source's tokens share with the text its
cross-entropy is spread evenly over the bytes, so that any other tokenizer's tokens can be costed. A space mark alone
has no bytes: it is costed with what follows it. The end of a segment counts as one byte.
"""

from dataclasses import dataclass

import numpy as np

from fusion.records import Carries, Heard, Rendered
from fusion.tokens.render import GAP


@dataclass(frozen=True, slots=True)
class Segments:
    """Where a sample's segments lie among its places, int64 (G,): the place before each, and the one after its text."""

    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of(sizes: list[int]) -> "Segments":
        """For segments of so many bytes: one takes a place before it, one a byte, one for its end, and a gap."""
        bytes_ = np.array(sizes, dtype=np.int64)
        first = np.cumsum(np.append(0, bytes_ + 2 + GAP))[:-1]
        return Segments(first, first + 1 + bytes_)

    def number(self, places: np.ndarray) -> np.ndarray:
        """The segment in which each place lies."""
        return np.clip(np.searchsorted(self.first, places, side="right") - 1, 0, None)

    def in_bytes(self, places: np.ndarray) -> np.ndarray:
        """The places, but the first of a segment is the one after it: no byte lies between, a space mark at most."""
        return np.maximum(places, self.first[self.number(places)] + 1)

    def holding(self, boundary: np.ndarray, carries: np.ndarray) -> np.ndarray:
        """The segment of each of the positions that carry loss, also of those at no known place: int64 (n,).

        Such a position belongs to the segment that goes on after it, unless that begins there and the one before has
        not come to its end. At least one place must be known.
        """
        known = np.flatnonzero(boundary >= 0)
        of_known, at = self.number(boundary[known]), np.arange(len(boundary))
        before, after = np.searchsorted(known, at, side="right") - 1, np.searchsorted(known, at)
        last = after == len(known)
        before, after = np.maximum(before, 0), np.minimum(after, len(known) - 1)  # where none is, both are the same one
        closed = carries[known[before]] == Carries.END
        begins = boundary[known[after]] <= self.first[of_known[after]] + 1
        stays = (boundary < 0) & (last | begins & ~closed & (carries == Carries.CONTENT))
        earlier = np.minimum(of_known[before] + closed, len(self.first) - 1)
        found: np.ndarray = np.where(stays, earlier, of_known[after])
        return found


@dataclass(frozen=True, slots=True)
class Tokens:
    """The places between which the N tokens that carry loss lie, int64 (N,), and the segment of each."""

    start: np.ndarray
    stop: np.ndarray
    segment: np.ndarray

    @staticmethod
    def of(rendered: Rendered, segments: Segments) -> "Tokens":
        """Those of a target; a token at whose ends no place is known counts as all that lies between known ones."""
        at = np.flatnonzero(rendered.carries)
        boundary, carries = rendered.boundary[at], rendered.carries[at]
        known = np.flatnonzero(boundary >= 0)
        if not len(known):
            nothing = np.zeros(len(at), dtype=np.int64)
            return Tokens(nothing, nothing + 1, nothing)
        segment = segments.holding(boundary, carries)
        first, last = segments.first[segment] + 1, segments.last[segment]
        places = segments.in_bytes(boundary[known])
        before = np.searchsorted(known, np.arange(len(at)), side="right") - 1
        start = np.clip(np.where(before >= 0, places[before], first), first, last)
        start = np.where(carries == Carries.END, last, start)
        after = np.searchsorted(places, start, side="right")
        stop = np.where(after < len(places), places[np.minimum(after, len(places) - 1)], last)
        return Tokens(start, np.maximum(np.minimum(stop, last), start + 1), segment)


class Curve:
    """A source's cross-entropy in nats on everything before a place."""

    def __init__(self, heard: Heard, segments: Segments):
        self._segments = segments
        # where each segment begins and stops to be predicted: nowhere, as long as nothing is known
        self._begin, self._stop = np.ones_like(segments.first), np.zeros_like(segments.first)
        self._places = self._values = np.zeros(1)
        known = heard.boundary >= 0
        if not known.any():
            return
        spent = np.append(0.0, np.cumsum(-heard.logp, dtype=np.float64))
        content = heard.carries == Carries.CONTENT
        # of each segment that is heard, its number and its first position, where its end begins, and the next one's
        # first position
        segment = segments.holding(heard.boundary, heard.carries)
        found, head = np.unique(segment, return_index=True)
        end = head + np.bincount(segment[content], minlength=len(segments.first))[found]
        tail = np.append(head[1:], len(segment))
        ends = tail > end
        begin, last = segments.first[found] + 1, segments.last[found]
        begin = np.where(known[head], segments.in_bytes(heard.boundary[head]), begin)
        self._begin[found], self._stop[found] = begin, last + ends
        inner = np.flatnonzero(known & content)
        knots = [
            (begin, spent[head]),
            (segments.in_bytes(heard.boundary[inner]), spent[inner]),
            (last, spent[end]),
            (last[ends] + 1, spent[tail[ends]]),
        ]
        places, values = (np.concatenate(part) for part in zip(*knots, strict=True))
        order = np.lexsort((values, places))
        self._places, least = np.unique(places[order], return_index=True)
        self._values = values[order][least]

    def bits(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Bits per byte between two places of one segment: float64 (N,).

        What the source does not predict is left out, as the first token of all where it reads no start token; where it
        predicts nothing they are infinite.
        """
        segment = self._segments.number(start)
        start, stop = np.maximum(start, self._begin[segment]), np.minimum(stop, self._stop[segment])
        nats = np.interp(stop, self._places, self._values) - np.interp(start, self._places, self._values)
        read = stop - start
        return np.where(read > 0, nats / np.maximum(read, 1) / np.log(2), np.inf)


def by_segment(heard: Heard, segments: Segments) -> np.ndarray:
    """Bits per byte of each segment's text: float64 (G,)."""
    return Curve(heard, segments).bits(segments.first + 1, segments.last)


def by_token(heard: Heard, segments: Segments, tokens: Tokens) -> np.ndarray:
    """Bits per byte of each of the target's tokens: float64 (N,)."""
    return Curve(heard, segments).bits(tokens.start, tokens.stop)
