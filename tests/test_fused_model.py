"""Models whose head gives losses: against dense logits of each sample by itself, for many architectures; and LoRA."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from test_batch import made
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fusion.config import Lora
from fusion.distill.batch import Collator, Packing
from fusion.distill.divergence import Objective
from fusion.distill.lora import add_lora, merge_lora, trained
from fusion.distill.loss import Shape
from fusion.distill.model import can_pack, check_head, fuse_head, shape_of, skips_unseen

V, ROWS = 90, 96  # token ids, and rows of the head: the rest is padding
IDS: dict[str, Any] = {"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE: dict[str, Any] = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 64, "num_key_value_heads": 2}
WINDOW: dict[str, Any] = {**SHAPE, "sliding_window": 3}
GEMMA: dict[str, Any] = {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}
LAYERS = ["sliding_attention", "full_attention"]
GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=5.0, layer_types=LAYERS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, layer_types=LAYERS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, **GRANITE)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),  # a bias in its head
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WINDOW)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**IDS, **GPT2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES)),
}
UNPACKED = ("opt", "bloom")
SHAPES = {"gemma2": Shape(1, 5.0, V), "cohere": Shape(0.25, None, V), "granite": Shape(1 / 3, None, V)}


def drawn(name: str, spread: float = 0.2, seed: int = 0) -> Any:
    """A model in which everything matters: weights large enough, biases and norms drawn as well."""
    torch.manual_seed(seed)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, spread)
    return model.eval()


def fused(model: Any, objective: Objective | None = None) -> Any:
    fuse_head(model, objective or Objective(), shape_of(model, V))
    return model


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """A model's own, by its class's forward."""
    found: Tensor = type(model).forward(model, input_ids=ids, use_cache=False).logits
    return found


EXAMPLES = [made(length, number) for number, length in enumerate((9, 4, 12, 5, 3))]
LAMBDA = 0.3


def batch_of(packing: Packing) -> dict[str, Tensor]:
    """A batch as a model takes it, with a label's share and a weight of its own at each position."""
    batch = Collator(packing, "samples")(EXAMPLES)
    names = ("input_ids", "rows", "labels", "taught_ids", "taught_probs", "position_ids")
    label_weight = 1 - (1 - LAMBDA) * batch["confidence"].double()
    given = {name: batch[name] for name in names if name in batch}
    return given | {"label_weight": label_weight, "weight": batch["weight"].double()}


def dense(model: Any) -> Tensor:
    """The loss over all samples, each read alone, position by position from whole distributions."""
    total = torch.zeros((), dtype=torch.float64)
    for e in EXAMPLES:
        logq = logits_of(model, torch.from_numpy(e.ids).long()[None])[0].double().log_softmax(-1)
        for n, (at, label) in enumerate(zip(e.at.tolist(), e.labels.tolist(), strict=True)):
            part = slice(int(e.taught.offsets[n]), int(e.taught.offsets[n + 1]))
            ids, probs = e.taught.ids[part].tolist(), torch.from_numpy(e.taught.probs[part]).double()
            others = [i for i in range(V) if i not in ids]
            said = -(probs * logq[at, ids]).sum() - (1 - probs.sum()) * logq[at, others].logsumexp(-1)
            share = 1 - (1 - LAMBDA) * float(e.confidence[n])
            total = total + (-share * logq[at, label] + (1 - share) * said) / len(e.at)
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    """Those that are there, by name; they are put away."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# ---------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("name", MAKERS)
def test_loss_and_gradients_are_those_of_dense_logits(name: str) -> None:
    model = fused(drawn(name).double())
    check_head(model, shape_of(model, V))
    wanted = dense(model)
    wanted.backward()
    expected = gradients(model)
    assert len(expected) > 10 and all(
        float(g.abs().max()) > 1e-6 for n, g in expected.items() if "k_proj.bias" not in n
    )
    near = 3e-7 * max(float(g.abs().max()) for g in expected.values())  # norms compute in float32 whatever weights are
    for packing in get_args(Packing) if name not in UNPACKED else ("none",):
        total, label_loss, fusion_loss = model(**batch_of(packing))
        total.backward()
        assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert label_loss.shape == fusion_loss.shape == (sum(len(e.at) for e in EXAMPLES),)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=near, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", MAKERS)
def test_samples_of_a_row_do_not_see_each_other_where_it_says_so(name: str) -> None:
    for model in (fused(drawn(name)), fused(MAKERS[name]()).eval()):  # also at its first weights, that hardly matter
        assert can_pack(model) == (name not in UNPACKED)
    if name in UNPACKED:
        return
    for packing in ("rows", "flat"):
        batch = Collator(packing)(EXAMPLES)
        hidden = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        by_row = hidden.last_hidden_state.flatten(0, 1)[batch["rows"]]
        for e in EXAMPLES:
            alone = model.base_model(input_ids=torch.from_numpy(e.ids).long()[None], use_cache=False).last_hidden_state
            torch.testing.assert_close(by_row[batch["sample"] == e.number], alone[0, e.at], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what becomes of the head's product


@pytest.mark.parametrize("name", MAKERS)
def test_what_the_config_says_of_the_logits(name: str) -> None:
    model = drawn(name)
    shape, plain = shape_of(model, V), logits_of(model, torch.tensor([[3, 1, 4]]))
    wanted = SHAPES.get(name, Shape(1, None, V))
    assert (shape.scale, shape.softcap, shape.vocabulary) == (pytest.approx(wanted.scale), wanted.softcap, V)
    assert plain.abs().max().item() > 0.1 * (shape.softcap or 1) * shape.scale
    fused(model)
    check_head(model, shape)
    assert torch.equal(logits_of(model, torch.tensor([[3, 1, 4]])), plain)  # a head without targets is as it was
    check_head(fused(MAKERS[name]()).eval(), shape)
    check_head(fused(drawn(name).bfloat16()), shape)


class Doubled(LlamaForCausalLM):
    def forward(self, *args: Any, **settings: Any) -> Any:
        told = super().forward(*args, **settings)
        told.logits = told.logits * 2
        return told


class Shifted(LlamaForCausalLM):
    def forward(self, *args: Any, **settings: Any) -> Any:
        told = super().forward(*args, **settings)
        told.logits = told.logits + told.logits.max() * torch.arange(ROWS) / ROWS
        return told


class Longer(LlamaForCausalLM):
    def forward(self, *args: Any, **settings: Any) -> Any:
        told = super().forward(*args, **settings)
        told.logits = torch.cat([told.logits, told.logits[..., :1]], dim=-1)
        return told


@pytest.mark.parametrize("kind", [Doubled, Shifted, Longer])
@pytest.mark.parametrize("spread", [0.2, 0.02, 0.001])
def test_logits_that_are_changed_otherwise_are_refused(kind: type, spread: float) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SHAPE, initializer_range=spread)).eval()
    with pytest.raises(ValueError, match=f"^pivot: {kind.__name__} changes its logits after the output head in a way"):
        check_head(fused(model), shape_of(model, V))


@pytest.mark.parametrize(
    "settings",
    [{"logit_scale": 0.5}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 0.5}, {"lm_head_multiplier": 3}],
)
def test_a_setting_that_the_model_does_not_heed_is_refused(settings: dict[str, float]) -> None:
    model = drawn("llama")
    for key, value in settings.items():
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match="^pivot: LlamaForCausalLM changes its logits after"):
        check_head(fused(model), shape_of(model, V))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="^pivot: LlamaModel has no plain output head; the fused loss needs one$"):
        fuse_head(LlamaModel(LlamaConfig(**SHAPE)), Objective(), Shape())


def test_attention_that_skips_what_is_not_seen() -> None:
    for name, skips in (("flash_attention_2", True), ("flash_attention_3", True), ("sdpa", False), ("eager", False)):
        assert skips_unseen(SimpleNamespace(config=SimpleNamespace(_attn_implementation=name))) == skips
    assert not skips_unseen(drawn("llama"))


# ---------------------------------------------------------------- LoRA


def adapted(name: str, settings: Lora, spread: float = 0.2) -> Any:
    """A model with low-rank updates that are not zero."""
    model = drawn(name)
    add_lora(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, spread)
    return fused(model).eval()


@pytest.mark.parametrize("name", MAKERS)
def test_only_updates_learn(name: str) -> None:
    model = adapted(name, Lora(rank=3, alpha=5))
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    model(**batch_of("none"))[0].backward()
    learned = {n: p for n, p in model.named_parameters() if p.grad is not None}
    assert learned and all(
        ("lora_A" in n or "lora_B" in n) and float(p.grad.abs().max()) > 0 for n, p in learned.items()
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(learned)
    head = model.get_output_embeddings()
    assert not head.weight.requires_grad and not any("lora" in n for n, _ in head.named_parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    check_head(model, shape_of(model, V))
    assert can_pack(model) == (name not in UNPACKED)


def test_how_many_weights_learn() -> None:
    model = drawn("llama")
    whole = sum(p.numel() for p in model.parameters())
    assert trained(model) == (whole, whole)
    add_lora(model, Lora(rank=3))
    # q and o 16 → 16, k and v 16 → 8, gate and up 16 → 24, down 24 → 16; two layers
    learned = 2 * 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
    assert trained(model) == (learned, whole + learned)
    some = drawn("llama")
    add_lora(some, Lora(rank=3, modules=("q_proj", "v_proj")))
    assert trained(some) == (2 * 3 * (16 + 16 + 16 + 8), whole + 2 * 3 * (16 + 16 + 16 + 8))


def test_an_update_is_the_scaled_product() -> None:
    """W + alpha/rank · B·A in each module; at the beginning nothing is changed."""
    base, model = drawn("llama"), drawn("llama")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    add_lora(model, Lora(rank=3, alpha=5))
    assert torch.equal(logits_of(model, ids), logits_of(base, ids))
    model = adapted("llama", Lora(rank=3, alpha=5, dropout=0.5))
    updates = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in base.named_parameters():
            module = key.removesuffix(".weight")
            if f"{module}.lora_A.default.weight" in updates:
                product = updates[f"{module}.lora_B.default.weight"] @ updates[f"{module}.lora_A.default.weight"]
                weight += 5 / 3 * product
    torch.testing.assert_close(logits_of(model, ids), logits_of(base, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied", "neox", "gemma2", "phi3", "gpt2", "opt", "bloom"])
def test_a_merged_model_is_the_adapted_one(tmp_path: Path, name: str) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    drawn(name).save_pretrained(tmp_path / "pivot")
    model = adapted(name, Lora(rank=3, alpha=5))
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits_of(model, ids)
    pivot = AutoModelForCausalLM.from_pretrained(tmp_path / "pivot")
    merge_lora(pivot, tmp_path / "adapter", tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(merged) is type(drawn(name)) and not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "pivot").eval()(ids).logits
    assert (before - wanted).abs().max().item() > 0.1


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        (("wombat",), "wombat"),
        (("q_proj", "lm_head"), "the output head cannot be among them; leave it away"),
        (("lm_head",), "the output head cannot be among them; leave it away"),
        (("input_layernorm",), "input_layernorm|LlamaRMSNorm"),
    ],
)
def test_modules_that_cannot_have_updates_are_one_line(modules: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=rf"^distill\.lora\.modules: .*({why})") as refused:
        add_lora(drawn("llama"), Lora(modules=modules))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize("name", ["tied", "llama"])
def test_an_embedding_cannot_have_updates(name: str) -> None:
    """Tied, they are trained on what is read alone, and merged change the head too; ZeRO-3 cannot divide them."""
    with pytest.raises(
        ValueError, match=r"^distill\.lora\.modules: the embedding cannot be among them; leave it away$"
    ):
        add_lora(drawn(name), Lora(modules=("q_proj", "embed_tokens")))
