"""Bits per byte: a naive reading, text by text, gives the same, and long ones are read in windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import samples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.config import Model
from fusion.measure import Reading, bits_per_byte
from fusion.records import Message, Sample, sample_id
from fusion.tracking import Tracker

TEXTS = ["one two three", "a", "naïve 日本語 🙂", "  spaces and\n\nlines\n", "the dog sat by the door " * 5]


def of(domain: str, texts: list[str]) -> list[Sample]:
    return [Sample(sample_id(text), domain, text) for text in texts]


def measure(folder: Path, read: list[Sample], batch_tokens: int = 4096) -> dict[str, float]:
    return bits_per_byte(Model(str(folder), "a", dtype="float32"), folder, read, batch_tokens)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [start, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]


def naive(folder: Path, texts: list[str]) -> float:
    """Σ −log₂ p of every token of every text, each read by itself, divided by all bytes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    for text in texts:
        ids = ids_of(tokenizer, text)
        with torch.no_grad():
            logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logp_TV[t, ids[t + 1]]) for t in range(len(ids) - 1))
    return nats / sum(len(text.encode()) for text in texts) / float(np.log(2))


@pytest.fixture(scope="module", params=["llama", "neox"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    kinds = {"llama": "sentencepiece_tokenizer", "neox": "byte_level_tokenizer"}
    tokenizer = request.getfixturevalue(kinds[request.param])
    return request.getfixturevalue(f"tiny_{request.param}")(made, tokenizer, seed=5, initializer_range=0.4)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_bits_per_byte_is_a_naive_reading(folder: Path, batch_tokens: int) -> None:
    assert measure(folder, of("d", TEXTS), batch_tokens) == pytest.approx({"d": naive(folder, TEXTS)}, rel=1e-5)


def _reading(domains: list[str], nats: list[float], sizes: list[int]) -> Reading:
    return Reading(tuple(domains), np.array(nats) * np.log(2), np.array(sizes))


@pytest.mark.parametrize("counts", [(2, 2), (4, 12), (80, 40)])
def test_the_lead_of_one_reading_over_another_has_a_95_percent_margin(counts: tuple[int, int]) -> None:
    """Of samples that are drawn again and again, so many leads are within the margin of the true one."""
    draw = np.random.default_rng(0)
    domains, count = ["a"] * counts[0] + ["b"] * counts[1], sum(counts)
    within = 0
    for _ in range(1000):
        sizes = draw.integers(200, 900, count)
        hard = draw.normal(3, 1, count)  # of each sample, for both alike: no noise of the difference
        shift = 0.1 + draw.normal(0, 0.2, count)
        ahead, behind = (_reading(domains, list(sizes * bits), list(sizes)) for bits in (hard, hard + shift))
        lead, margin = ahead.lead(behind)
        assert lead == pytest.approx(behind.mean() - ahead.mean())
        assert behind.lead(ahead) == (pytest.approx(-lead), pytest.approx(margin))
        assert margin < 0.1 or count < 100  # many times less than what is common to both
        within += abs(lead - 0.1) < margin
    assert 0.92 < within / 1000 < 0.985


def test_a_domain_of_one_sample_tells_nothing_of_its_noise() -> None:
    ahead = _reading(["a", "a", "b", "c"], [10, 20, 30, 5], [10, 20, 10, 0])
    behind = _reading(["a", "a", "b", "c"], [20, 40, 34, 5], [10, 20, 10, 0])
    assert ahead.bits() == pytest.approx({"a": 1.0, "b": 3.0}) and ahead.mean() == pytest.approx(2.0)
    assert ahead.lead(behind) == (pytest.approx(0.7), float("inf"))
    first, second = (_reading(["a", "a", "b", "b"], nats, [1, 2, 3, 4]) for nats in ([1, 2, 3, 4], [2, 4, 6, 8]))
    assert first.lead(second) == (pytest.approx(1.0), 0.0)
    with pytest.raises(ValueError, match="of other samples"):
        first.lead(ahead)


def test_a_large_sample_beside_small_ones_is_still_one() -> None:
    sizes = [1000, 1, 1]
    ahead, behind = (_reading(["a"] * 3, nats, sizes) for nats in ([1900.0, 2, 2], [2000.0, 2, 2]))
    lead, margin = ahead.lead(behind)
    assert lead == pytest.approx(0.1, abs=1e-3) and margin > lead


def test_a_reading_that_is_no_number_is_infinitely_bad() -> None:
    assert _reading(["a"], [float("nan")], [3]).mean() == float("inf")
    with pytest.raises(ValueError, match="^no sample has bytes to measure on$"):
        _reading(["a"], [1.0], [0]).mean()


def test_domains_are_apart(folder: Path) -> None:
    parts = {"b": TEXTS[:2], "a": TEXTS[2:4], "c": TEXTS[4:]}
    mixed = [s for row in zip(*(of(d, t * 2) for d, t in parts.items()), strict=False) for s in row]
    rest = [s for d, t in parts.items() for s in of(d, t)]
    found = measure(folder, [*mixed, *rest])
    assert list(found) == ["a", "b", "c"]
    counted = {d: [s.text for s in [*mixed, *rest] if s.domain == d] for d in parts}
    for domain, texts in counted.items():
        assert found[domain] == pytest.approx(naive(folder, [str(t) for t in texts]), rel=1e-5)


def test_a_uniform_model_needs_log_v_bits_a_token(
    tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tiny_llama(tmp_path, byte_level_tokenizer, vocab_size=1024)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    texts = [str(s.text) for s in samples(9)]
    tokens = sum(len(ids_of(byte_level_tokenizer, text)) - 1 for text in texts)
    expected = 10 * tokens / sum(len(text.encode()) for text in texts)
    assert measure(folder, of("d", texts)) == pytest.approx({"d": expected}, rel=1e-6)


def test_of_a_chat_only_the_assistants_words_count(folder: Path) -> None:
    turns = (Message("user", "what? " * 9), Message("assistant", "Two dogs."))
    chat = Sample(sample_id(None, turns), "chat", None, turns)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token or ""
    text = f"{start}User:\n{'what? ' * 9}\n\nAssistant:\nTwo dogs.{tokenizer.eos_token}\n\n"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    first, last = text.index("Two dogs."), text.index("Two dogs.") + len("Two dogs.")
    told = [t for t, (a, b) in enumerate(offsets) if b > first and a < last]
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    bits = -sum(float(logp_TV[t - 1, ids[t]]) for t in told) / float(np.log(2))
    assert measure(folder, [chat]) == pytest.approx({"chat": bits / 9}, rel=1e-5)


# Windows


def test_a_model_without_memory_is_measured_the_same_in_windows(
    tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = []
    for context in (256, 9, 4, 2):
        made = tiny_llama(
            tmp_path / str(context), byte_level_tokenizer, max_position_embeddings=context, initializer_range=0.4
        )
        model = AutoModelForCausalLM.from_pretrained(made)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        model.save_pretrained(made)
        found.append(measure(made, of("d", TEXTS))["d"])
    assert found[0] > 1 and found[1:] == pytest.approx([found[0]] * 3, rel=1e-5)


def test_long_texts_are_read_in_windows_that_overlap_by_half(
    tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    context, text = 16, "the cat sat on the mat, and so did all of the dogs in the life of two of them. " * 2
    made = tiny_llama(tmp_path, byte_level_tokenizer, max_position_embeddings=context, initializer_range=0.4)
    model, ids = AutoModelForCausalLM.from_pretrained(made), ids_of(byte_level_tokenizer, text)
    assert len(ids) > 3 * context
    nats = 0.0
    for t in range(1, len(ids)):  # token t is read in the first window, of those that begin at 0, 8, 16, …, to hold it
        start = max(0, -(-(t + 1 - context) // 8) * 8)
        with torch.no_grad():
            logits_V = model(torch.tensor([ids[start:t]])).logits[0, -1]
        nats -= float(logits_V.log_softmax(-1)[ids[t]])
    assert measure(made, of("d", [text])) == pytest.approx({"d": nats / len(text) / float(np.log(2))}, rel=1e-5)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^a: no tokenizer could be loaded from"):
        measure(tmp_path, of("d", TEXTS))


def test_nothing_to_measure(folder: Path) -> None:
    assert measure(folder, []) == {}


def test_a_tracker_tells_whether_its_run_failed() -> None:
    told: list[int] = []

    class Run:
        def finish(self, exit_code: int) -> None:
            told.append(exit_code)

    def tracker() -> Tracker:
        made = object.__new__(Tracker)
        made._run = Run()
        return made

    with tracker():
        pass
    with pytest.raises(ValueError, match="no"), tracker():
        raise ValueError("no")
    assert told == [0, 1]
