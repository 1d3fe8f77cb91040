"""A sample as one model's token ids, with the place at which each position stands.

Places. The segments of a sample lie one after the other on one line, the same for every tokenizer: a segment of n
bytes takes n + 2 places. Its place 0 is "before the segment, and the next token begins with a space that the segment
does not have" (SentencePiece's mark, a template's space that merged into the first word); place 1 + b is "b bytes
read". Two tokenizers that stand at one place have read the same, so one's next-token distribution can teach the
other's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.records import Carries, Rendered, Sample
from fusion.tokens.bytes import ByteTable, Kind, byte_table
from fusion.tokens.place import Content, Tokens, bytes_before, locate, place

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
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
        ValueError: the tokenizer cannot be mapped to bytes.
    """

    def __init__(self, tokenizer: Any, name: str, template: str = "own"):
        self.name = name
        self.table: ByteTable = byte_table(tokenizer, name)
        self.end_id: int | None = tokenizer.eos_token_id
        # a model without bos has read each document after the end of the one before (lm-eval does the same)
        self.start_id: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.end_id
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        named = {"own": tokenizer.chat_template or PLAIN_TEMPLATE, "plain": PLAIN_TEMPLATE}
        self._template = named.get(template, template)

    def render(self, sample: Sample) -> Rendered:
        """The sample as this model reads it.

        Raises:
            ValueError: the chat template refuses the sample, or its contents cannot be found in what it renders.
        """
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
        try:
            text = self._apply(sample.messages)
            contents = list(locate(sample.messages, text, self._apply))
        except Exception as error:  # Jinja templates raise what they like to refuse a chat
            raise ValueError(f"{self.name}: its chat template, on sample {sample.id}: {error}") from error
        tokens = self._encode_chat(text, contents)
        before = bytes_before(text)
        spans = []
        for content in contents:
            if content.message.role == "assistant":
                whole = content.message.content
                start, stop = int(before[content.start]), int(before[content.stop])
                lead = len(whole[: content.lead].encode())
                spans.append(_Span(start, stop, lead, len(whole.encode()), self._end_of_turn(tokens, stop)))
        return self._lay(tokens, spans)

    def _lay(self, tokens: Tokens, spans: list[_Span]) -> Rendered:
        """Put every position on the line of places."""
        ids, starts, ends = np.array(tokens.ids, dtype=np.int32), tokens.starts, tokens.ends
        boundary = np.full(len(ids), -1, dtype=np.int64)
        carries = np.zeros(len(ids), dtype=np.uint8)
        reached = np.concatenate([[-1], np.maximum.accumulate(ends)[:-1]]) if len(ids) else ends
        lengths = self.table.lengths[ids]
        spaced = np.array([self.table.pieces[i][:1] == b" " for i in ids], dtype=bool)
        base, content_bytes = 0, 0
        for span in spans:
            marks = spaced & (ends >= span.start) & (ends - lengths == span.start - 1)
            inside = (ends > span.start) & (starts < span.stop) & (lengths > 0) | marks
            inside |= (ends < 0) & (reached >= span.start) & (reached < span.stop)
            predicted = np.flatnonzero(inside[1:])
            carries[predicted] = Carries.CONTENT
            meets = (ends[predicted + 1] < 0) | (ends[predicted + 1] - lengths[predicted + 1] == ends[predicted])
            here = predicted[(ends[predicted] >= span.start) & (ends[predicted] <= span.stop) & meets]
            boundary[here] = base + 1 + span.lead + ends[here] - span.start
            if len(predicted) and marks[predicted[0] + 1]:
                boundary[predicted[0]] = base if span.lead == 0 else -1
            elif len(predicted) and ends[predicted[0] + 1] < 0:  # a space put before it or not: who knows
                boundary[predicted[0]] = -1
            if inside.any():  # less a first token of all, and white space that a control token swallowed
                n = int(inside.argmax())
                content_bytes += max(0, span.stop - max(span.start, int(starts[n] if n else ends[n])))
            if span.stop_token:
                first = min(int(predicted[-1]) + 1 if len(predicted) else span.stop_token - 1, span.stop_token - 1)
                carries[first : span.stop_token] = Carries.END
                boundary[first : span.stop_token] = -1  # white space that the template puts before the end
                boundary[span.stop_token - 1] = base + 1 + span.size
            base += span.size + 2
        return Rendered(ids, boundary, carries, content_bytes, tokens.lossy)

    def _encode_literally(self, text: str) -> Tokens:
        """Tokens of a text in which nothing is a control token, whatever it spells."""
        self._backend.encode_special_tokens = True
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False
        return place(self.table, encoding.ids, encoding.offsets, text)

    def _encode_chat(self, text: str, contents: list[Content]) -> Tokens:
        """Tokens of a rendered chat: the template's control tokens as such, a literal inside a content as text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        kinds, before = self.table.kinds, bytes_before(text)
        control = [(n, *encoding.offsets[n]) for n, i in enumerate(encoding.ids) if kinds[i] == Kind.CONTROL]
        own = []
        for n, start, stop in control:
            at, until = _core(text, start, stop)
            if not any(c.start < until and at < c.stop for c in contents):
                own.append((n, start, stop, at))
        parts, token_at, char_at = [], 0, 0
        for n, start, stop, at in [*own, (len(encoding.ids), len(text), len(text), len(text))]:
            fragment = text[char_at:start]
            if len(own) < len(control):
                part = self._encode_literally(fragment)
            else:
                offsets = [(max(a - char_at, 0), max(b - char_at, 0)) for a, b in encoding.offsets[token_at:n]]
                part = place(self.table, encoding.ids[token_at:n], offsets, fragment)
            parts.append(part.moved(int(before[char_at])))
            parts += [_control(i, int(before[at]), int(before[stop])) for i in encoding.ids[n : n + 1]]
            token_at, char_at = n + 1, stop
        return Tokens.joined(parts)

    def _end_of_turn(self, tokens: Tokens, stop: int) -> int | None:
        """Index of the control token that follows byte `stop` with nothing but white space between, if one does."""
        for n in np.flatnonzero(tokens.starts >= stop):
            if self.table.kinds[tokens.ids[n]] == Kind.CONTROL:
                return int(n)
            if self.table.pieces[tokens.ids[n]].strip():
                return None
        return None

    def _apply(self, messages: Any) -> str:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        return str(self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False))


def _core(text: str, start: int, stop: int) -> tuple[int, int]:
    """A control token's own characters: its offsets less the white space around it that it swallowed."""
    shown = text[start:stop]
    if not shown.strip():
        return start, stop
    return stop - len(shown.lstrip()), start + len(shown.rstrip())


def _control(i: int, start: int, stop: int) -> Tokens:
    """A control token of the rendering as a run of one."""
    return Tokens([i], np.array([start], dtype=np.int64), np.array([stop], dtype=np.int64))
