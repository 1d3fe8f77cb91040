"""Trains the offline demo's pivot and sources on the spot: small models of four architectures, one per tokenizer.

Each source reads mostly one domain; the pivot reads less, of all three. Everything is in float32: on CPUs without
bfloat16 instructions a bfloat16 product is ten times slower. One thread, a fixed number of steps and a seed make the
weights repeatable on one machine.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from data_prep.demo_corpus import DOMAINS
from data_prep.demo_tokenizers import make_tokenizer

CONTEXT = 512
TOKENIZER_TEXTS = 1500  # documents that a tokenizer learns from, in the recipe's mixture
Report = Callable[[int, float], None]  # (steps done, loss in nats per token)


@dataclass(frozen=True)
class Recipe:
    """How one model is made; what is here decides, with corpus and seed, every byte of it."""

    name: str
    kind: str  # architecture and tokenizer: qwen2, gpt_neox, mistral or llama
    vocabulary: int
    mixture: dict[str, float] = field(hash=False)  # domain → share of the documents read
    steps: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    batch_tokens: int = 1024
    learning_rate: float = 4e-3
    long_share: float = 0.25  # share of the steps, at the end, that read rows of CONTEXT tokens; the others half


def _mostly(domain: str) -> dict[str, float]:
    """A specialist's reading: a little of the other domains, as any real model has seen a little of everything."""
    return {each: 0.92 if each == domain else 0.04 for each in DOMAINS}


RECIPES = (
    Recipe("math", "qwen2", 2048, _mostly("math"), 450),
    Recipe("code", "gpt_neox", 3072, _mostly("code"), 450),
    Recipe("prose", "mistral", 3072, _mostly("prose"), 450),
    Recipe("pivot", "llama", 2560, dict.fromkeys(DOMAINS, 1 / len(DOMAINS)), 300),
)
QUICK_RECIPES = tuple(
    replace(recipe, vocabulary=640, steps=4, hidden=32, layers=2, heads=2, batch_tokens=512) for recipe in RECIPES
)


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that comes before a document: bos where the tokenizer has one, else eos."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert isinstance(start, int)
    return start


def reading_order(texts: dict[str, list[str]], mixture: dict[str, float], rng: random.Random) -> Iterator[str]:
    """Documents without end, their domains drawn by ``mixture``; a domain is read through before it repeats."""
    waiting: dict[str, list[str]] = {domain: [] for domain in mixture}
    # Shares are of bytes, and math's documents are short: a domain is drawn by its share over its mean length.
    lengths = {domain: sum(map(len, texts[domain])) / max(1, len(texts[domain])) for domain in mixture}
    domains = [domain for domain in mixture if texts[domain]]
    weights = [mixture[domain] / lengths[domain] for domain in domains]
    while True:
        domain = rng.choices(domains, weights)[0]
        if not waiting[domain]:
            waiting[domain] = rng.sample(texts[domain], len(texts[domain]))
        yield waiting[domain].pop()


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterator[str], length: int) -> torch.Tensor:
    """``length`` ids: bos document eos bos document eos …, or with eos alone: eos document eos document …"""
    ids = [] if tokenizer.bos_token_id is not None else [start_id(tokenizer)]
    while len(ids) < length:
        some = [next(documents) for _ in range(64)]
        for document in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            if tokenizer.bos_token_id is not None:
                ids.append(tokenizer.bos_token_id)
            ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids[:length])


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialised model of the recipe's architecture, for this tokenizer's ids."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "use_cache": False,
    }
    gated = common | {"intermediate_size": recipe.hidden * 5 // 2, "tie_word_embeddings": True}
    shared = gated | {"num_key_value_heads": recipe.heads // 2}
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "qwen2": lambda: Qwen2Config(**shared),
        "llama": lambda: LlamaConfig(**gated),
        "mistral": lambda: MistralConfig(**shared, sliding_window=None),
        "gpt_neox": lambda: GPTNeoXConfig(**common, intermediate_size=recipe.hidden * 4, tie_word_embeddings=False),
    }
    return AutoModelForCausalLM.from_config(configs[recipe.kind](), dtype=torch.float32)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(model: PreTrainedModel, stream: torch.Tensor, recipe: Recipe, report: Report) -> None:
    """One pass over ``stream`` (steps × batch_tokens + 1 ids), AdamW, rows doubled in length near the end."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    model.train()
    for step in range(recipe.steps):
        length = CONTEXT if step >= recipe.steps * (1 - recipe.long_share) else CONTEXT // 2
        begin = step * recipe.batch_tokens
        inputs = stream[begin : begin + recipe.batch_tokens].view(-1, length)
        labels = stream[begin + 1 : begin + recipe.batch_tokens + 1]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.learning_rate)
        loss = cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, loss.item())
    model.eval()


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Σ −log₂ p(token | what came before, bos or eos first) over all texts ÷ their UTF-8 bytes.

    Every token counts, the end of the text does not. A text longer than CONTEXT goes on in a window that begins with
    the last token of the one before.
    """
    if not texts:
        raise ValueError("bits per byte need at least one text, got none")
    nats = 0.0
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        row = torch.tensor([start_id(tokenizer), *ids])
        for begin in range(0, len(row) - 1, CONTEXT):
            window = row[begin : begin + CONTEXT + 1]
            logits = model(input_ids=window[None, :-1]).logits[0]
            nats += cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def make_model(recipe: Recipe, texts: dict[str, list[str]], seed: int, out: Path, report: Report) -> None:
    """Train a recipe's tokenizer and model on ``texts`` by domain, and save both in ``out`` (float32 safetensors)."""
    torch.manual_seed(seed)
    documents = reading_order(texts, recipe.mixture, random.Random(f"{recipe.name} tokenizer {seed}"))
    sample = [next(documents) for _ in range(TOKENIZER_TEXTS)]
    tokenizer = make_tokenizer(recipe.kind, sample, recipe.vocabulary, CONTEXT)
    documents = reading_order(texts, recipe.mixture, random.Random(f"{recipe.name} model {seed}"))
    stream = token_stream(tokenizer, documents, recipe.steps * recipe.batch_tokens + 1)
    model = build_model(recipe, tokenizer)
    train(model, stream, recipe, report)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def recipe_record(recipe: Recipe, seed: int, corpus_sha256: str) -> str:
    """What decides a model, as JSON: two equal records mean two equal models."""
    made = {"recipe": asdict(recipe), "seed": seed, "corpus_sha256": corpus_sha256}
    return json.dumps(made, indent=2, sort_keys=True) + "\n"
