"""Pivots whose checkpoints are not what transformers writes of their targets; the template that a result is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import artifact, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPT2Config, GPT2LMHeadModel

from fusion import hub
from fusion.config import Config, Dataset, Distill, Merge, Model, Prepare
from fusion.corpus import write_samples
from fusion.merge import stage
from fusion.merge.base import base_for
from fusion.records import Message, Sample
from fusion.tokens.render import PLAIN_TEMPLATE

Weights = dict[str, torch.Tensor]


def _target(pivot: Path, folder: Path) -> Path:
    """What a training would leave: the pivot as transformers writes it, all weights half as large again."""
    model = hub.load_model(Model(str(pivot), "pivot", dtype="auto"), pivot, "float32")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(pivot).save_pretrained(folder / "model")
    return folder


def _changed(pivot: Path, change: Callable[[Weights], Weights]) -> None:
    held = change(load_file(pivot / "model.safetensors"))
    save_file({name: w.clone() for name, w in held.items()}, pivot / "model.safetensors", metadata={"format": "pt"})


def _merged(pivot: Path, root: Path, merge: Merge, train: list[Sample] | None = None, template: str = "own") -> Path:
    prepared = root / "prepared"
    write_samples(prepared / "validation.parquet", samples(4, seed=4))
    write_samples(prepared / "train.parquet", train or samples(4))
    model = Model(str(pivot), "pivot", dtype="float32", template=template)
    config = Config(
        "small", model, (Model("none", name="a"),), Prepare((Dataset("none.jsonl"),)), distill=Distill(), merge=merge
    )
    out = artifact(root, "merge")
    target = _target(pivot, root / "target")
    stage.run(config, {"pivot": pivot, "prepare": prepared, "target/joint": target}, out)
    return out.folder / "model"


def _gpt2(folder: Path, tokenizer: Any) -> Path:
    """Named as on the hub: without `transformer.`, with masks, in float16."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(2)}
    _changed(folder, lambda held: {**{name.removeprefix("transformer."): w for name, w in held.items()}, **masks})
    (folder / "LICENSE").write_text("as it pleases you")
    return folder


def test_buffers_of_older_versions_are_no_tensors(tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: Any) -> None:
    pivot = tiny_llama(tmp_path / "pivot", byte_level_tokenizer)
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    _changed(pivot, lambda held: {**held, **frequencies})
    target = _target(pivot, tmp_path / "target")
    model = Model(str(pivot), "pivot")
    assert base_for(model, pivot, target / "model", tmp_path / "saved") == pivot
    made = load_file(_merged(pivot, tmp_path, Merge(scale=1.0)) / "model.safetensors")
    wanted = load_file(target / "model/model.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.allclose(made[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("scale", [0.5, "auto"])
def test_a_pivot_with_other_names_is_written_anew(tmp_path: Path, byte_level_tokenizer: Any, scale: Any) -> None:
    pivot = _gpt2(tmp_path / "pivot", byte_level_tokenizer)
    out = _merged(pivot, tmp_path, Merge(scale=scale))
    made, start = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, pivot))
    assert {w.dtype for w in made.values()} == {torch.float16}
    assert (out / "LICENSE").is_file() and (out / "tokenizer.json").is_file()
    if scale == 0.5:
        for name, weight in made.items():
            torch.testing.assert_close(weight.float(), 1.25 * start[name].float(), rtol=2e-3, atol=1e-6)


def test_what_was_written_anew_is_found_again(
    tmp_path: Path, byte_level_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pivot, saved = _gpt2(tmp_path / "pivot", byte_level_tokenizer), tmp_path / "saved"
    target = _target(pivot, tmp_path / "target") / "model"
    model = Model(str(pivot), "pivot")
    (tmp_path / "saved.partial").mkdir()  # of a run that was cut off
    (tmp_path / "saved.partial/half.safetensors").touch()
    assert base_for(model, pivot, target, saved) == saved
    assert not (saved / "half.safetensors").exists()
    monkeypatch.setattr(hub, "load_model", lambda *_: pytest.fail("written twice"))
    assert base_for(model, pivot, target, saved) == saved


def test_a_vocabulary_size_that_only_transformers_knows(tmp_path: Path, byte_level_tokenizer: Any) -> None:
    """As in the hub's Gemma 3: `text_config` leaves out what is the default of its class."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**small, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**small, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )
    pivot = tmp_path / "pivot"
    model.save_pretrained(pivot)
    byte_level_tokenizer.save_pretrained(pivot)
    settings = json.loads((pivot / "config.json").read_text())
    rows = settings["text_config"].pop("vocab_size")
    (pivot / "config.json").write_text(json.dumps(settings))
    made = AutoModelForCausalLM.from_pretrained(_merged(pivot, tmp_path, Merge(scale=1.0)))
    assert made.get_input_embeddings().weight.shape == (rows, 8)


_CHATS = [
    Sample(f"{n:016x}", "chat", None, (Message("user", f"what is {n}?"), Message("assistant", f"it is {n}.")))
    for n in range(4)
]
_GIVEN = "{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "own, setting, train, wanted",
    [
        (None, "own", _CHATS, PLAIN_TEMPLATE),
        (None, "own", None, None),
        (_GIVEN, "own", _CHATS, _GIVEN),
        (_GIVEN, "plain", _CHATS, PLAIN_TEMPLATE),
        (None, "file", _CHATS, _GIVEN),
    ],
)
def test_the_template_that_chats_were_trained_with(
    tmp_path: Path,
    tiny_llama: Any,
    byte_level_tokenizer: Any,
    own: str | None,
    setting: str,
    train: list[Sample] | None,
    wanted: str | None,
) -> None:
    pivot = tiny_llama(tmp_path / "pivot", byte_level_tokenizer)
    if own is not None:
        (pivot / "chat_template.jinja").write_text(own)
    if setting == "file":
        (tmp_path / "given.jinja").write_text(_GIVEN)
        setting = str(tmp_path / "given.jinja")
    out = _merged(pivot, tmp_path, Merge(scale=1.0), train, setting)
    assert AutoTokenizer.from_pretrained(out).chat_template == wanted
