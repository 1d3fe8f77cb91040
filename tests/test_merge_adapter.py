"""LoRA adapters as inputs: every weight against the one that peft merges, whatever stretch of it is read."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import as_tensor, make_folder
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fusion.merge import adapter
from fusion.merge.jobs import STORAGE, Checkpoint, numel
from fusion.merge.opening import open_model


@contextmanager
def quietly() -> Iterator[None]:
    """peft warns of much that is meant so here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, **(shape | settings))
    model = LlamaForCausalLM(config).to(dtype)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def gpt2(folder: Path, tied: bool = True) -> Path:
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=32, **ids))
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def train(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter that peft made and saved, all of its weights drawn at random, as if it had been trained."""
    with quietly():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(weight + 0.2 * torch.randn_like(weight) if "magnitude" not in name else weight * 1.5)
        model.save_pretrained(folder)
    return folder


def merged(base: Path, folder: Path) -> dict[str, Tensor]:
    """What peft makes of it, by the names of the base's tensors."""
    with quietly():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return dict(model.state_dict())


def tensor(model: Checkpoint, name: str, stretch: int = 1 << 30) -> Tensor:
    """A tensor, read in stretches."""
    view = model.view(name)
    count = numel(view.shape)
    whole = np.empty(count, STORAGE[view.dtype])
    for start in range(0, count, stretch):
        view.read(start, whole[start : start + stretch])
    return as_tensor(whole.reshape(view.shape), view.dtype)


def assert_same(base: Path, folder: Path, changed: Callable[[str], bool]) -> None:
    """All tensors are those that peft merges, and those that are changed are float32."""
    expected = merged(base, folder)
    model = open_model(f"{base}+{folder}")
    assert set(model.names) <= set(expected) and any(map(changed, model.names))
    for name in model.names:
        found = tensor(model, name)
        torch.testing.assert_close(found.float(), expected[name].float(), rtol=2e-6, atol=2e-6)
        original = tensor(open_model(str(base)), name)
        assert torch.equal(found, original) != changed(name), name


PLAIN = {"r": 4, "lora_alpha": 6}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "v_proj": 2}, "alpha_pattern": {"^model.layers.0.*": 9}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 5}},
    ],
)
def test_scaling_patterns_and_dora_are_peft_s(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = llama(tmp_path / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    folder = train(base, tmp_path / "adapter", target_modules=targets, **(PLAIN | settings))
    assert_same(base, folder, lambda name: name.split(".")[-2] in targets)


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_and_modules_that_are_saved_in_full(tmp_path: Path, dora: bool) -> None:
    base = llama(tmp_path / "base")
    folder = train(
        base,
        tmp_path / "adapter",
        target_modules=["o_proj", "embed_tokens"],
        modules_to_save=["lm_head", "norm"],
        use_dora=dora,
        **PLAIN,
    )
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    parts = ("o_proj.weight", "embed_tokens.weight", "lm_head.weight", "norm.weight")
    assert_same(base, folder, lambda name: name.endswith(parts))


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_biases(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = llama(tmp_path / "base", attention_bias=True)
    folder = train(base, tmp_path / "adapter", target_modules=["q_proj"], **(PLAIN | settings))
    others = settings.get("bias") == "all"
    assert_same(base, folder, lambda name: "q_proj" in name or (others and name.endswith(".bias")))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"fan_in_fan_out": False}])
def test_weights_that_are_stored_transposed(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = gpt2(tmp_path / "base", tied=False)
    targets = ["c_attn", "c_proj", "wte"]
    folder = train(base, tmp_path / "adapter", target_modules=targets, **(PLAIN | {"fan_in_fan_out": True} | settings))
    assert_same(base, folder, lambda name: name.endswith(".weight") and name.split(".")[-2] in targets)


def test_tied_heads(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    both = train(
        base,
        tmp_path / "both",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        **PLAIN,
    )
    assert "base_model.model.lm_head.weight" in load_file(both / "adapter_model.safetensors")
    assert_same(base, both, lambda name: "q_proj" in name or "embed_tokens" in name)
    apart = train(base, tmp_path / "apart", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="lm_head.weight finds no tensor .*; its output head is tied"):
        open_model(f"{base}+{apart}")
    alone = train(base, tmp_path / "alone", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="it changes model.embed_tokens.weight and leaves the output head that is"):
        open_model(f"{base}+{alone}")
    low = train(base, tmp_path / "low", target_modules=["q_proj", "embed_tokens"], **PLAIN)
    with pytest.raises(ValueError, match="it changes model.embed_tokens.weight .*; untie the base first"):
        open_model(f"{base}+{low}")


def test_a_base_in_bfloat16_is_changed_in_float32(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.bfloat16)
    wide = tmp_path / "wide"
    shutil.copytree(base, wide)
    loaded = load_file(base / "model.safetensors")
    save_file({name: weight.float() for name, weight in loaded.items()}, wide / "model.safetensors", {"format": "pt"})
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    folder = train(base, tmp_path / "adapter", target_modules=["up_proj"], **PLAIN)
    model, expected = open_model(f"{base}+{folder}"), merged(wide, folder)
    for name in model.names:
        assert model.view(name).dtype == ("float32" if "up_proj" in name else "bfloat16")
        torch.testing.assert_close(tensor(model, name).float(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_weight_is_the_same_whatever_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_TILE", 200)
    base = llama(tmp_path / "base")
    folder = train(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True, **PLAIN)
    model = open_model(f"{base}+{folder}")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        whole = tensor(model, name)
        for stretch in (1, 7, 32, 33, 200, 1000):
            assert torch.equal(tensor(open_model(f"{base}+{folder}"), name, stretch), whole)
        model.view(name).read(numel(whole.shape), np.empty(0, np.float32))  # nothing is nothing


def test_an_adapter_by_itself_and_two_on_one_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    one = train(base, tmp_path / "one", target_modules=["q_proj"], **PLAIN)
    two = train(base, tmp_path / "two", seed=1, target_modules=["q_proj", "k_proj"], **PLAIN)
    alone, both = open_model(str(one)), open_model(f"{base}+{one}+{two}")
    name = "model.layers.1.self_attn.q_proj.weight"
    original, only_two = tensor(open_model(str(base)), name), tensor(open_model(f"{base}+{two}"), name)
    assert torch.equal(tensor(alone, name), tensor(open_model(f"{base}+{one}"), name))
    torch.testing.assert_close(tensor(both, name), tensor(alone, name) + only_two - original)
    assert alone.folder == both.folder == base and alone.config["model_type"] == "llama"
    alone.close()


def test_a_name_with_a_plus_is_a_name(tmp_path: Path) -> None:
    base = llama(tmp_path / "a+b")
    folder = train(base, tmp_path / "c+d", target_modules=["q_proj"], **PLAIN)
    assert open_model(str(base)).names == open_model(f"{base}+{folder}").names
    assert "c+d" in open_model(f"{base}+{folder}").view("model.layers.0.self_attn.q_proj.weight").source


def test_a_base_without_its_head_s_prefix(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    folder = train(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, **PLAIN)
    weights = load_file(base / "model.safetensors")
    bare = make_folder(tmp_path / "bare", {name.removeprefix("transformer."): w for name, w in weights.items()})
    name = "h.1.attn.c_attn.weight"
    whole = tensor(open_model(f"{base}+{folder}"), f"transformer.{name}")
    assert torch.equal(tensor(open_model(f"{bare}+{folder}"), name), whole)


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LORA is applied"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changed the base in training"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"r": 8}, "has rank 4, where adapter_config.json says 8"),
        ({"use_dora": True}, "says use_dora = True, its weights the opposite"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    base = llama(tmp_path / "base")
    folder = train(base, tmp_path / "adapter", target_modules=["q_proj"], **PLAIN)
    change(folder, **settings)
    with pytest.raises(ValueError, match=said) as error:
        open_model(f"{base}+{folder}")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    with quietly():
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="an adapter of type IA3"):
        open_model(f"{base}+{tmp_path / 'ia3'}")


def test_every_tensor_of_an_adapter_must_find_its_weight(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    folder = train(base, tmp_path / "adapter", target_modules=["q_proj"], **PLAIN)
    weights = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(changed: dict[str, Tensor], said: str) -> None:
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            open_model(f"{base}+{folder}")

    refused({**weights, "base_model.model.model.strange.weight": torch.ones(3)}, "model.strange.weight finds no tensor")
    refused({name: w for name, w in weights.items() if "0.self_attn.q_proj.lora_B" not in name}, "but no lora_B.weight")
    refused({**weights, f"{prefix}.lora_C.weight": torch.ones(4, 4)}, "q_proj.lora_C.weight finds no tensor")
    refused({**weights, f"{prefix}.lora_A.weight": torch.ones(4, 30)}, "changes a weight of shape .32, 30., which is")
    resized = {**weights, "base_model.model.model.embed_tokens.weight": torch.ones(64, 32)}
    refused(resized, r"embed_tokens.weight is \(64, 32\), in .* \(60, 32\); where the vocabulary was resized")
    refused({}, "adapter_model.safetensors is empty")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        open_model(f"{base}+{folder}")
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has only pickled weights, which are never loaded"):
        open_model(f"{base}+{folder}")


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    folder = train(base, tmp_path / "adapter", target_modules=["q_proj"], **PLAIN)
    with pytest.raises(ValueError, match="must be a LoRA adapter or a task vector"):
        open_model(f"{base}+{base}")
    for unknown in (None, str(folder)):
        change(folder, base_model_name_or_path=unknown)
        with pytest.raises(ValueError, match=f"names none; name it as BASE.{folder}"):
            open_model(str(folder))
    change(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="is a change of .*gone, which cannot be opened"):
        open_model(str(folder))
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        open_model(str(tmp_path / "gone"))
