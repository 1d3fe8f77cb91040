"""Trains the offline demo's pivot and sources on the spot: small models of four architectures, one per tokenizer.

Each source reads almost only one domain; the pivot reads less, of all three. Everything is in float32: on a CPU
without bfloat16 instructions a bfloat16 product is ten times slower. One thread, a fixed number of steps and a seed
make the weights repeatable on one machine.
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
    layers: int = 3
    heads: int = 4
    batch_tokens: int = 1024
    matrix_rate: float = 0.02
    embedding_rate: float = 0.03
    vector_rate: float = 4e-3
    long_share: float = 0.25  # share of the steps, at the end, that read rows of CONTEXT tokens; the others half


def _mostly(domain: str, others: float) -> dict[str, float]:
    """A specialist's reading: a little of the other domains, as any real model has seen a little of everything."""
    return {each: 1 - others if each == domain else others / 2 for each in DOMAINS}


RECIPES = (
    # The longest first: two train at a time, and the short ones fill the end.
    Recipe("code", "gpt_neox", 3072, _mostly("code", 0.01), 430),
    Recipe("prose", "mistral", 3072, _mostly("prose", 0.01), 430),
    Recipe("math", "qwen2", 2048, _mostly("math", 0.06), 260),
    Recipe("pivot", "llama", 2560, dict.fromkeys(DOMAINS, 1 / len(DOMAINS)), 190),
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
        "tie_word_embeddings": False,
    }
    gated = common | {"intermediate_size": recipe.hidden * 5 // 2}
    shared = gated | {"num_key_value_heads": recipe.heads // 2}
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "qwen2": lambda: Qwen2Config(**shared),
        "llama": lambda: LlamaConfig(**gated),
        "mistral": lambda: MistralConfig(**shared, sliding_window=None),
        "gpt_neox": lambda: GPTNeoXConfig(**common, intermediate_size=recipe.hidden * 4),
    }
    model = AutoModelForCausalLM.from_config(configs[recipe.kind](), dtype=torch.float32)
    writers = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")
    with torch.no_grad():
        # A layer that begins as the identity, and a head that begins uniform, save the first dozens of steps.
        for name, weight in model.named_parameters():
            if name.endswith(writers):
                weight.zero_()
        model.get_output_embeddings().weight.zero_()
    return model


def orthogonal(gradient: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    """About U·Vᵀ of the gradient's singular value decomposition, by the Newton–Schulz iteration of Muon.

    Coefficients of Jordan et al. 2024 (kellerjordan.github.io/posts/muon), who take five iterations; at these widths
    three train as well. ``torch.optim.Muon`` works in bfloat16, which many CPUs emulate.
    """
    x = gradient / (gradient.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


class Muon:
    """Momentum whose update is orthogonalised, for the matrices between embedding and head (Jordan et al. 2024)."""

    def __init__(self, weights: list[torch.nn.Parameter], momentum: float = 0.85) -> None:
        self.weights, self.momentum = weights, momentum
        self.averages = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at learning rate ``rate``; a tall matrix moves further, so that its outputs move as far."""
        for weight, average in zip(self.weights, self.averages, strict=True):
            assert weight.grad is not None
            average.lerp_(weight.grad, 1 - self.momentum)
            update = orthogonal(weight.grad.lerp(average, self.momentum))
            weight.add_(update, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the inner matrices, AdamW for embedding, head, norms and biases (its groups hold their ``peak`` rates).

    With a few hundred steps to train in, this reaches in 120 of them what AdamW alone reaches in 300.
    """
    outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    inner = [p for p in model.parameters() if p.ndim == 2 and not any(p is each for each in outer)]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": outer, "peak": recipe.embedding_rate}, {"params": vectors, "peak": recipe.vector_rate}]
    return Muon(inner), torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over a twentieth of the steps, then a cosine to a twentieth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: PreTrainedModel, stream: torch.Tensor, recipe: Recipe, report: Report) -> None:
    """One pass over ``stream`` (steps × batch_tokens + 1 ids), rows doubled in length near the end."""
    muon, adam = make_optimizers(model, recipe)
    model.train()
    for step in range(recipe.steps):
        length = CONTEXT if step >= recipe.steps * (1 - recipe.long_share) else CONTEXT // 2
        begin = step * recipe.batch_tokens
        inputs = stream[begin : begin + recipe.batch_tokens].view(-1, length)
        labels = stream[begin + 1 : begin + recipe.batch_tokens + 1]
        loss = cross_entropy(model(input_ids=inputs, use_cache=False).logits.flatten(0, 1), labels)
        loss.backward()
        share = rate(step, recipe.steps)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * share
        adam.step()
        muon.step(recipe.matrix_rate * share)
        model.zero_grad()
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
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
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


def recipe_record(recipe: Recipe, seed: int, corpus_sha256: str, code_sha256: str) -> str:
    """What decides a model, as JSON: two equal records mean two equal models."""
    made = {"recipe": asdict(recipe), "seed": seed, "corpus_sha256": corpus_sha256, "code_sha256": code_sha256}
    return json.dumps(made, indent=2, sort_keys=True) + "\n"
