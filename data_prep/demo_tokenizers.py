"""Four tokenizers of four kinds for the demo's models, each lossless on any text without U+2581.

A fusion has to cope with tokenizers that differ in alphabet (bytes or characters), algorithm (BPE or Unigram), space
mark (``Ġ`` or ``▁``), prefix (a prepended space or none) and special tokens. The four here differ in all of them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
CONTROLS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, so that no learned piece holds a newline: SentencePiece reads its input so."""
    for text in texts:
        yield from text.split("\n")


def _byte_level(texts: list[str], size: int, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def qwen_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE as Qwen2's: letters, single digits and line ends apart."""
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(texts, size, pre_tokenizers.Sequence([split, bytes_only]))


def gpt2_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's: digits in groups, each word with the space before it."""
    return _byte_level(texts, size, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))


def _marked() -> normalizers.Normalizer:
    """``▁`` for each space and one before the text."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _like_sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    """Give a tokenizer the normalizer, decoder and ``<s>`` that a converted SentencePiece model has."""
    tokenizer.normalizer = _marked()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(CONTROLS)
    return tokenizer


def _learn_pieces(texts: list[str], size: int) -> Tokenizer:
    """A character BPE over ``▁`` text, learned word by word; digits stand alone, runs of spaces may merge."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = _marked()
    words = pre_tokenizers.Split(Regex("▁+(?=▁)|▁?[^▁]+|▁"), "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, digits, pre_tokenizers.Punctuation("contiguous")])
    learner.train_from_iterator(_lines(texts), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return learner


def llama_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """BPE with ``▁`` and byte fallback as Llama 2's: no pre-tokenizer, digits one by one, newline a byte."""
    learner = _learn_pieces(texts, size - len(BYTES) - len(CONTROLS))
    learned = learner.get_vocab()
    # Bytes go into the vocabulary, not among the special tokens: a text that spells "<0x0A>" must stay that text.
    pieces = CONTROLS + BYTES + sorted(learned, key=lambda piece: learned[piece])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _like_sentencepiece(Tokenizer(bpe))


def _unigram(scored: list[tuple[str, float]]) -> Tokenizer:
    # Viterbi would take "<0x0A>" in a text for the byte if that piece's score were an ordinary one.
    pieces = [(piece, 0.0) for piece in CONTROLS] + [(piece, -1000.0) for piece in BYTES] + scored
    return _like_sentencepiece(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)))


def mistral_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Unigram with ``▁`` and byte fallback, as a SentencePiece Unigram model converts; newline is a byte.

    Learned from BPE's pieces, twice as many as wanted, by Viterbi counts and pruning. `tokenizers` has a trainer for
    Unigram, but it takes ten seconds here and its result differs from run to run (it sums floats in hash order).
    """
    wanted = size - len(BYTES) - len(CONTROLS)
    pieces = sorted(_learn_pieces(texts, 2 * wanted).get_vocab())
    counts = dict.fromkeys(pieces, 1)
    for share in (2.0, 1.5, 1.0):
        # A piece of one character stays whatever its count: without it that character would fall back to bytes.
        ranked = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece], piece))[: int(share * wanted)]
        total = sum(counts[piece] for piece in ranked)
        tokenizer = _unigram([(piece, math.log(counts[piece] / total)) for piece in ranked])
        used = Counter(piece for code in tokenizer.encode_batch(list(_lines(texts))) for piece in code.tokens)
        counts = {piece: used[piece] + 1 for piece in ranked}
    total = sum(counts.values())
    return _unigram([(piece, math.log(counts[piece] / total)) for piece in sorted(counts, key=lambda p: -counts[p])])


KINDS: dict[str, Callable[[list[str], int], Tokenizer]] = {
    "qwen2": qwen_tokenizer,
    "gpt_neox": gpt2_tokenizer,
    "mistral": mistral_tokenizer,
    "llama": llama_tokenizer,
}


def make_tokenizer(kind: str, texts: list[str], size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one of ``KINDS`` with about ``size`` ids, as transformers loads and saves it."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tokenizer {kind!r}: one of {', '.join(KINDS)}")
    tokenizer = KINDS[kind](texts, size)
    special = {"eos_token": END, "pad_token": END}
    if tokenizer.token_to_id(END) is None:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=context, clean_up_tokenization_spaces=False, **special
    )
