"""A sample as one model's token ids, with the place at which each position stands.

Places. The segments of a sample lie one after the other on one line, the same for every tokenizer: a segment of n
bytes takes n + 2 places, and after them come GAP that nothing stands on. Its place 0 is "before the segment, and the
next token begins with a space that the segment does not have" (SentencePiece's mark, a template's space that merged
into the first word); place 1 + b is "b bytes read". Two tokenizers that stand at one place have read the same, so one's
next-token distribution can teach the other's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fusion.records import Carries, Message, Rendered, Sample
from fusion.tokens.bytes import ByteTable, Kind, read
from fusion.tokens.files import check_files
from fusion.tokens.locate import Content, locate
from fusion.tokens.place import Tokens, bytes_before, place

T = TypeVar("T")
GAP = 4096  # more than any token is long: one that runs over a segment's end does not reach the next

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
)


# A template that prints today's date prints this one (Llama 3.1's own default), so that a run that is resumed tomorrow
# goes on to the same bytes. trim_blocks takes the newline at the end.
_FIXED_DATE = {"%Y": "2024", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%y": "24", "%A": "Friday", "%a": "Fri"}
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _FIXED_DATE.items())
    + " }}{% endmacro %}\n"
)


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes start..stop of a rendering are a segment's, less `lead` bytes stripped at its beginning.

    `size` is the segment's length with whatever was stripped; `stop_token` the index of the token that ends it.
    """

    start: int
    stop: int
    lead: int
    size: int
    stop_token: int | None


class Renderer:
    """Renders samples for one model.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        name: what to call the model in errors.
        template: `own` (the tokenizer's chat template, the plain one where it has none), `plain`, or a Jinja template.

    Raises:
        ValueError: the tokenizer cannot be mapped to bytes, its files disagree, or it has no default chat template.
    """

    def __init__(self, tokenizer: Any, name: str, template: str = "own"):
        self.name = name
        self.table: ByteTable
        self.table, self._encoder = read(tokenizer, name)
        check_files(tokenizer, name)
        self.end_id: int | None = tokenizer.eos_token_id
        # a model without bos has read each document after the end of the one before (lm-eval does the same)
        self.start_id: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end_id
        self._tokenizer = tokenizer
        self._template, self._called = template, "the chat template given"
        if template == "plain" or (template == "own" and not tokenizer.chat_template):
            self._template, self._called = PLAIN_TEMPLATE, "the plain chat template"
        elif template == "own":
            self._template, self._called = _own_template(tokenizer, name), "its chat template"
        if "strftime_now" in self._template:
            self._template = _FIXED_CLOCK + self._template

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._tokenizer

    def render(self, sample: Sample) -> Rendered:
        """The sample as this model reads it.

        Raises:
            ValueError: the chat template refuses the sample, or its contents cannot be found in what it renders.
        """
        try:
            "".join((sample.text or "", *(m.content for m in sample.messages))).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.name}: sample {sample.id} is no Unicode text: {error}") from None
        if sample.text is not None:
            return self._text(sample.text, sample.complete)
        return self._chat(sample)

    def _text(self, text: str, complete: bool) -> Rendered:
        size = len(text.encode())
        parts = [self._encode_literally(text)]
        if self.start_id is not None:
            parts.insert(0, _control(self.start_id, 0, 0))
        stop = None
        if complete and self.end_id is not None:
            parts.append(_control(self.end_id, size, size))
            stop = sum(len(part.ids) for part in parts) - 1
        return self._lay(Tokens.joined(parts), [_Span(0, size, 0, size, stop)])

    def _chat(self, sample: Sample) -> Rendered:
        text, contents = self._shown(sample, lambda: self._show(sample.messages))
        enders = self._shown(sample, lambda: self._enders(sample.messages))
        tokens = self._encode_chat(text, contents)
        before = bytes_before(text)
        spans = []
        for content in contents:
            if content.message.role == "assistant":
                whole = content.message.content
                start, stop = int(before[content.start]), int(before[content.stop])
                lead = len(whole[: content.lead].encode())
                end = self._control_after(tokens, stop)
                end = end if end is not None and tokens.ids[end] in enders else None
                spans.append(_Span(start, stop, lead, len(whole.encode()), end))
        return self._lay(tokens, spans)

    def check(self, sample: Sample) -> None:
        """ValueError, as `render` raises it, where the template cannot show a chat: a fiftieth of its work."""
        self._shown(
            sample, lambda: [self._show(told) for told in (sample.messages, _answered(sample.messages)) if told]
        )

    def _shown(self, sample: Sample, show: Callable[[], T]) -> T:
        try:
            return show()
        except Exception as error:  # Jinja templates raise what they like to refuse a chat
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.name}: {self._called}, on sample {sample.id}: {why}") from error

    def _show(self, messages: Sequence[Message]) -> tuple[str, list[Content]]:
        """A chat as the template renders it, and where its contents lie in that."""
        text = self._apply(messages)
        return text, locate(messages, text, self._apply)

    def _enders(self, messages: Sequence[Message]) -> set[int]:
        """The control tokens that can end an assistant's turn: the end token, and what follows a chat's last one.

        What follows another turn proves nothing: where the template ends turns by nothing, it opens the next.
        """
        enders = set() if self.end_id is None else {self.end_id}
        if answered := _answered(messages):
            text, contents = self._show(answered)
            tokens = self._encode_chat(text, contents)
            after = self._control_after(tokens, int(bytes_before(text)[contents[-1].stop]))
            enders |= set() if after is None else {tokens.ids[after]}
        return enders

    def _lay(self, tokens: Tokens, spans: list[_Span]) -> Rendered:
        """Put every position on the line of places."""
        ids, starts, ends = np.array(tokens.ids, dtype=np.int32), tokens.starts, tokens.ends
        boundary = np.full(len(ids), -1, dtype=np.int64)
        carries = np.zeros(len(ids), dtype=np.uint8)
        lengths = self.table.lengths[ids]
        spaced = np.array([self.table.pieces[i][:1] == b" " for i in ids], dtype=bool)
        base, content_bytes = 0, 0
        for span in spans:
            marks = spaced & (ends >= span.start) & (ends - lengths == span.start - 1)
            inside = (ends > span.start) & (starts < span.stop) & (lengths > 0) | marks
            inside |= (ends < 0) & (starts >= span.start) & (starts < span.stop)
            predicted = np.flatnonzero(inside[1:])
            carries[predicted] = Carries.CONTENT
            after = predicted + 1  # it begins where this one ends, and with nothing that the text does not have
            meets = (starts[after] == ends[predicted]) & ((ends - lengths == starts) | (ends < 0))[after]
            here = predicted[(ends[predicted] >= span.start) & (ends[predicted] <= span.stop) & meets]
            boundary[here] = base + 1 + span.lead + ends[here] - span.start
            if len(predicted) and marks[predicted[0] + 1]:
                boundary[predicted[0]] = base if span.lead == 0 else -1
            elif len(predicted) and ends[predicted[0] + 1] < 0 and self._may_be_marked(ids[predicted[0] + 1]):
                boundary[predicted[0]] = -1
            if inside.any():  # less a first token of all, and white space that a control token swallowed
                n = int(inside.argmax())
                begins = int(starts[max(n, 1)]) if len(ids) > 1 else span.stop
                content_bytes += max(0, span.stop - max(span.start, begins))
            if span.stop_token:
                first = min(int(predicted[-1]) + 1 if len(predicted) else span.stop_token - 1, span.stop_token - 1)
                carries[first : span.stop_token] = Carries.END
                boundary[first : span.stop_token] = -1  # white space that the template puts before the end
                boundary[span.stop_token - 1] = base + 1 + span.size
            base += span.size + 2 + GAP
        return Rendered(ids, boundary, carries, content_bytes, tokens.lossy)

    def _may_be_marked(self, i: int) -> bool:
        """Whether a token that spells something else than the text may stand for a space put before it too."""
        return self.table.pieces[i][:1] == b" " or (self.table.marks_start and i == self.table.unknown)

    def _encode_literally(self, text: str, first: bool = True) -> Tokens:
        """Tokens of a text in which nothing is a control token, whatever it spells."""
        encoding = self._encoder.encode(text, literal=True, first=first)
        return place(self.table, encoding.ids, encoding.offsets, text)

    def _encode_chat(self, text: str, contents: list[Content]) -> Tokens:
        """Tokens of a rendered chat: the template's control tokens as such, a literal inside a content as text."""
        encoding, before = self._encoder.encode(text), bytes_before(text)
        ids, offsets = encoding.ids, encoding.offsets
        own, literals = [], False
        for n, i in enumerate(ids):
            if i not in self._encoder.special:
                continue
            start, stop = offsets[n]
            at, until = _core(text, start, stop)
            if text[at:until] != self._encoder.special[i] and (i == self.table.unknown or self.table.lengths[i]):
                continue  # text that the vocabulary cannot spell, or a byte of one
            if any(c.start < until and at < c.stop for c in contents):
                literals = True
            elif not self.table.lengths[i]:
                own.append((n, start, stop, at))
        parts, token_at, char_at = [], 0, 0
        for n, start, stop, at in [*own, (len(ids), len(text), len(text), len(text))]:
            fragment = text[char_at:start]
            if literals:
                part = self._encode_literally(fragment, first=char_at == 0)
            else:
                shifted = [(max(a - char_at, 0), max(b - char_at, 0)) for a, b in offsets[token_at:n]]
                part = place(self.table, ids[token_at:n], shifted, fragment)
            parts.append(part.moved(int(before[char_at])))
            parts += [_control(i, int(before[at]), int(before[stop])) for i in ids[n : n + 1]]
            token_at, char_at = n + 1, stop
        return Tokens.joined(parts)

    def _control_after(self, tokens: Tokens, stop: int) -> int | None:
        """Index of the control token that follows byte `stop` with nothing but white space between, if one does."""
        for n in np.flatnonzero(tokens.starts >= stop):
            i = tokens.ids[n]
            if (i == self.table.unknown and tokens.ends[n] < 0) or self.table.pieces[i].strip():
                return None  # a character without a token; as the template's own, the unknown token may be the end too
            if self.table.kinds[i] == Kind.CONTROL:
                return int(n)
        return None

    def _apply(self, messages: Any) -> str:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        return str(self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False))


def _answered(messages: Sequence[Message]) -> Sequence[Message]:
    """A chat up to its last answer; none where it has none."""
    return messages[: max((n for n, m in enumerate(messages) if m.role == "assistant"), default=-1) + 1]


def _own_template(tokenizer: Any, name: str) -> str:
    """The tokenizer's chat template; of several, the one named `default`."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{name}: its chat templates have no default; name one in the config ({why})") from None


def _core(text: str, start: int, stop: int) -> tuple[int, int]:
    """A control token's own characters: its offsets less the white space around it that it swallowed."""
    shown = text[start:stop]
    if not shown.strip():
        return start, stop
    return stop - len(shown.lstrip()), start + len(shown.rstrip())


def _control(i: int, start: int, stop: int) -> Tokens:
    """A control token of the rendering as a run of one."""
    return Tokens([i], np.array([start], dtype=np.int64), np.array([stop], dtype=np.int64))
