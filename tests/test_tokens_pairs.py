"""Tokenizers trained on random text: any two meet exactly where both have read the same bytes, and nowhere else."""

import json
import random
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import text_sample
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion.align.spans import shared
from fusion.records import Rendered
from fusion.tokens.render import Renderer

ALPHABETS = ("abcde fgh", "xyz \n\t.,01", "абвг где", "你好世界 。", "🙂👍 é\u0301n")
SEEDS = range(8)


def random_text(rng: random.Random, size: int) -> str:
    """Words of a few letters each, so that merges are found, from one or two alphabets."""
    letters = "".join(rng.sample(ALPHABETS, rng.randint(1, 2)))
    words = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(12)]
    return rng.choice(("", " ", "\n")).join(rng.choices(words, k=size)) + rng.choice(("", " ", "  "))


def byte_level(rng: random.Random, number: int, corpus: list[str], size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    prefix = number % 2 == 0
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=rng.random() < 0.6)
    apart = not prefix and rng.random() < 0.7  # with a prefix each digit would get one
    digits = [pre_tokenizers.Digits(individual_digits=True)] if apart else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def sentence_piece(rng: random.Random, number: int, corpus: list[str], size: int) -> Tokenizer:
    scheme = ("always", "first", "never", None)[number % 4]
    learner = Tokenizer(models.BPE())
    if scheme is None:
        learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=rng.random() < 0.5)
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=max(size - 259, 40), show_progress=False))
    learned = learner.get_vocab()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *sorted(learned, key=lambda p: learned[p])]
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if learner.normalizer is not None:
        backend.normalizer = learner.normalizer
    if learner.pre_tokenizer is not None:
        backend.pre_tokenizer = learner.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


@cache
def trained(seed: int) -> tuple[Renderer, PreTrainedTokenizerFast]:
    rng = random.Random(seed)
    corpus = [random_text(rng, 40) for _ in range(12)]
    backend = (byte_level, sentence_piece)[seed % 2](rng, seed // 2, corpus, rng.randint(270, 600))
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Renderer(tokenizer, f"random-{seed}"), tokenizer


def naive_places(seed: int, rendered: Rendered, text: str) -> dict[bytes | str, int]:
    """What each position has read, from the strings of its tokens: bytes, or "mark" before a space not there."""
    tokenizer, raw = trained(seed)[1], text.encode()
    level = {c: b for b, c in enumerate(byte_characters())} if seed % 2 == 0 else {}
    read = []
    for token in tokenizer.convert_ids_to_tokens(rendered.ids[1:-1].tolist()):
        if level:
            read.append(bytes(level[c] for c in token))
        elif token.startswith("<0x") and len(token) == 6:
            read.append(bytes([int(token[3:5], 16)]))
        else:
            read.append(token.replace("▁", " ").encode())
    whole = b"".join(read)
    assert whole in (raw, b" " + raw)
    marked, places = whole != raw, {}
    for n in range(len(read) + 1):
        so_far = b"".join(read[:n])
        places["mark" if marked and not so_far else so_far[marked:]] = n  # of several positions, the last
    return places


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, written once more."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 400))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def check_pair(first: int, second: int, text: str) -> None:
    sample = text_sample(text)
    source, target = (trained(seed)[0].render(sample) for seed in (first, second))
    assert not source.lossy and not target.lossy
    ours, theirs = naive_places(first, source, text), naive_places(second, target, text)
    expected = sorted((ours[read], theirs[read]) for read in ours.keys() & theirs.keys())
    at_source, at_target = shared(source.boundary, target.boundary)
    assert list(zip(at_source.tolist(), at_target.tolist(), strict=True)) == expected


TEXTS = st.lists(
    st.sampled_from(
        ("abc", " de", "  ", "\n", "x.y", "01", "где", "你好", "🙂", "e\u0301", "\t", "\ufeff", "<s>", "<0x0A>")
    )
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("first", SEEDS)
@settings(max_examples=60)
@given(text=TEXTS)
def test_any_two_meet_where_both_have_read_the_same(first: int, text: str) -> None:
    for second in SEEDS:
        check_pair(first, second, text)


def test_text_that_they_were_trained_on() -> None:
    rng = random.Random(99)
    for first, second in product(SEEDS, SEEDS):
        check_pair(first, second, random_text(rng, 15))


def test_the_tokenizers_differ() -> None:
    """What the tests above rest on: other vocabularies, with and without a space put before the text."""
    tables = [trained(seed)[0].table for seed in SEEDS]
    assert len({table.digest for table in tables}) == len(SEEDS)
    assert (
        {table.marks_start for table in tables[::2]} == {table.marks_start for table in tables[1::2]} == {True, False}
    )
    assert all(270 <= len(table) <= 600 for table in tables)
    meetings = [len(np.unique(trained(s)[0].render(text_sample("abc de где 你好 01")).boundary)) for s in SEEDS]
    assert len(set(meetings)) > 3
