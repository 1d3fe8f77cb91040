"""Where a chat's contents lie in what its template rendered."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fusion.records import Message


@dataclass(frozen=True, slots=True)
class Content:
    """Characters start..stop of a rendering are a message's content, less `lead` characters stripped in front."""

    message: Message
    start: int
    stop: int
    lead: int


def locate(messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]) -> list[Content]:
    """Find every message's content in a rendered chat.

    The template is rendered once more with marks in place of the contents; what stands between the marks is the
    template's own, so a content that repeats template words cannot mislead. A content may have lost white space at its
    ends; a message that is not the assistant's may be shown more than once.

    Args:
        render: renders other messages with the same template.

    Returns:
        The contents in the order of the rendering.

    Raises:
        ValueError: the template drops, reorders or rewrites a content, or repeats an assistant's.
    """
    marks = [f"\ue000{n}\ue001" for n in range(len(messages))]
    skeleton = render([Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)])
    shown, fixed = _order(messages, marks, skeleton)
    # depth first: where stripped white space and the template's own could be one another, an early guess can fail
    found: list[Content] = []
    open_: list[Iterator[Content]] = []
    furthest, start = 0, len(fixed[0])
    if not text.startswith(fixed[0]):
        raise ValueError("its own words depend on the contents")
    while len(found) < len(shown):
        if len(open_) == len(found):
            open_.append(_readings(messages[shown[len(found)]], text, start, fixed[len(found) + 1]))
        content = next(open_[-1], None)
        if content is not None and (len(open_) < len(shown) or content.stop + len(fixed[-1]) == len(text)):
            start = content.stop + len(fixed[len(open_)])
            found.append(content)
            furthest = max(furthest, len(found))
        elif content is None:
            open_.pop()
            if not open_:
                message = messages[shown[furthest]]
                raise ValueError(f"rewrites the content of message {shown[furthest] + 1} ({message.role})")
            found.pop()
    return found


def _order(messages: Sequence[Message], marks: Sequence[str], skeleton: str) -> tuple[list[int], list[str]]:
    """Which message each content of a rendering is, and the template's text before, between and after them."""
    for n, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        which = f"message {n + 1} ({message.role})"
        if mark not in skeleton:
            raise ValueError(f"drops or rewrites {which}")
        if n and skeleton.index(mark) < skeleton.index(marks[n - 1]):
            raise ValueError(f"reorders {which}")
        if message.role == "assistant" and skeleton.count(mark) > 1:
            raise ValueError(f"repeats {which}")
    places = sorted((at, n) for n, mark in enumerate(marks) for at in _all(skeleton, mark))
    fixed, cursor = [], 0
    for at, n in places:
        fixed.append(skeleton[cursor:at])
        cursor = at + len(marks[n])
    return [n for _, n in places], [*fixed, skeleton[cursor:]]


def _all(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _readings(message: Message, text: str, start: int, until: str) -> Iterator[Content]:
    """The ways in which `text` may show a content at `start`, with `until` after it: as it is first, then stripped."""
    whole, seen = message.content, set()
    for chars in (None, "\n", " "):
        for shown in (whole, whole.strip(chars), whole.lstrip(chars), whole.rstrip(chars)):
            if shown not in seen and text.startswith(shown, start) and text.startswith(until, start + len(shown)):
                lead = 0 if whole.startswith(shown) else len(whole) - len(whole.lstrip(chars))
                yield Content(message, start, start + len(shown), lead)
            seen.add(shown)
