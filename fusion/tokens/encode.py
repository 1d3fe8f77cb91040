"""Text to ids by a tokenizer's own pipeline, with control tokens parsed or, on demand, read as the text they are."""

from collections.abc import Iterator
from typing import Any

from tokenizers import Encoding, Regex, pre_tokenizers


class Encoder:
    """Encodes for one tokenizer, whatever its file says of truncation, padding and trimmed offsets.

    Args:
        tokenizer: a `PreTrainedTokenizerBase` as loaded.
        name: what to call it in an error.
        no_text: pieces of the model that stand for no text of theirs (`<0x0A>`, `<unk>`), ids by piece.

    Attributes:
        backend: the `tokenizers.Tokenizer` behind it.
        special: the content of each special added token, by id.
        unavoidable: special tokens that plain text is encoded with too, as `!` where it is also the padding.

    Raises:
        ValueError: the tokenizer has no fast form, or drops merges at random.
    """

    def __init__(self, tokenizer: Any, name: str, no_text: dict[str, int]):
        self.backend = fast_form(tokenizer, name)
        if dropout := getattr(self.backend.model, "dropout", None):
            raise ValueError(
                f"{name}: tokenizer.json sets dropout {dropout}, so a text has no fixed ids; set it to null"
            )
        self.backend.no_truncation()  # a bound saved in tokenizer.json would cut every text, silently
        self.backend.no_padding()
        self.special = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        self._first_only = [
            part
            for part in _parts(self.backend.pre_tokenizer)
            if isinstance(part, pre_tokenizers.Metaspace) and part.prepend_scheme == "first"
        ]
        self._cut: Any = None
        named = {content: i for i, content in self.special.items()} | no_text
        reached = [content for content, i in named.items() if self._reaches(content, i)]
        if reached:
            cut = pre_tokenizers.Split(Regex("|".join(map(_first_character, reached))), "isolated")
            self._cut = pre_tokenizers.Sequence([p for p in (self.backend.pre_tokenizer, cut) if p is not None])
        self.unavoidable = {named[c] for c in reached if named[c] in self.special and self._reaches(c, named[c])}

    def encode(self, text: str, literal: bool = False, first: bool = True) -> Encoding:
        """Ids and the characters each covers; no start or end token is added.

        Args:
            literal: nothing is a control token, whatever the text spells.
            first: the text is the beginning of what the model reads; else it follows a control token.
        """
        backend = self.backend
        held = backend.encode_special_tokens, backend.pre_tokenizer, backend.post_processor
        backend.encode_special_tokens = literal
        backend.post_processor = None  # it adds nothing here, and byte-level ones trim spaces off the offsets
        if literal and self._cut is not None:
            backend.pre_tokenizer = self._cut
        for part in () if first else self._first_only:
            part.prepend_scheme = "never"
        try:
            return backend.encode(text, add_special_tokens=False)
        finally:
            for part in self._first_only:
                part.prepend_scheme = "first"
            backend.encode_special_tokens, backend.pre_tokenizer, backend.post_processor = held

    def _reaches(self, content: str, i: int) -> bool:
        """Whether text that spells a control token is encoded with it: Unigram and whole-word models look pieces up."""
        return any(i in self.encode(before + content, literal=True).ids for before in ("", "a", "a "))


def fast_form(tokenizer: Any, name: str) -> Any:
    """The `tokenizers.Tokenizer` behind a Hugging Face tokenizer.

    Raises:
        ValueError: there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(f"{name}: {type(tokenizer).__name__} has no fast form (tokenizer.json); convert it first")
    return backend


def _parts(pre_tokenizer: Any) -> Iterator[Any]:
    """A pre-tokenizer's components, sequences flattened; they are the live ones, not copies."""
    if isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        parts: Any = pre_tokenizer  # its stub does not know that it can be walked
        for part in parts:
            yield from _parts(part)
    elif pre_tokenizer is not None:
        yield pre_tokenizer


def _first_character(content: str) -> str:
    """A pattern for the first character of `content` where the rest follows: cut there, it is no piece any more."""
    first, *rest = (f"\\x{{{ord(c):X}}}" for c in content)
    return f"{first}(?={''.join(rest)})" if rest else first
