"""A sample cut in windows that fit a model's context, so that every position is scored once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusion.records import Carries, Rendered


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of T positions of a sample; those from `first` on are scored, those before are context.

    Attributes:
        domain: the sample's.
        ids: int32 (T,), the tokens of the stretch.
        first: the first position that no window before this one has scored.
        content: bool (T,), the position predicts a token of a segment. The last one's token is in the next window, if
            there is one, and is scored there.
    """

    domain: str
    ids: np.ndarray
    first: int
    content: np.ndarray

    def scored(self) -> np.ndarray:
        """int64 (n,), the positions to score, rising: position i predicts `ids[i + 1]`."""
        at = np.flatnonzero(self.content[:-1])
        return at[at >= self.first]


def windows(domain: str, rendered: Rendered, context: int | None) -> Iterator[Window]:
    """The windows of a sample: one where the context is enough for it, else such as overlap by half.

    Each position with `Carries.CONTENT` is scored in one window, the first that holds the token it predicts. But at the
    sample's beginning, half a context of tokens stands before that one.

    Args:
        context: tokens that the model reads at once, less than 2 taken as 2; None where it reads any number.
    """
    content = rendered.carries == Carries.CONTENT
    context = max(context or len(rendered.ids), 2)
    first, start = 0, 0
    while True:
        stop = min(start + context, len(rendered.ids))
        yield Window(domain, rendered.ids[start:stop], first - start, content[start:stop])
        if stop == len(rendered.ids):
            return
        first, start = stop - 1, start + context // 2
