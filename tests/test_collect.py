"""The collector of statistics: against plain autograd and inputs caught by hand, and each refusal's line."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Maker
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ROOT, samples, texts, write_lines
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fusion.artifact import file_digest
from fusion.config import Model
from fusion.merge.collect import FILE, Reading, _drawn, collect, second_moments
from fusion.merge.methods import InMemory, get_method, joined
from fusion.records import Message, Sample
from fusion.tokens.render import Renderer

Door = Callable[[list[str]], int]


@pytest.fixture
def llama(tmp_path: Path, tiny_llama: Maker, byte_level_tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny_llama(tmp_path / "llama", byte_level_tokenizer)


@pytest.fixture(scope="module")
def door() -> Door:
    main: Door = runpy.run_path(str(ROOT / "launch/collect.py"))["main"]
    return main


def model_of(folder: Path) -> Model:
    return Model(str(folder), name="model", dtype="float32")


def token_ids(folder: Path, given: list[Sample]) -> list[Tensor]:
    renderer = Renderer(AutoTokenizer.from_pretrained(folder), "model")
    return [torch.from_numpy(renderer.render(sample).ids.astype(np.int64)) for sample in given]


def naive_fisher(model: Any, sequences: list[Tensor], skip: int = 0) -> dict[str, Tensor]:
    """The whole log-likelihood of a sequence, less its first tokens, differentiated by autograd."""
    names, weights = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for ids in sequences:
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        likelihood = sum(logp[i, ids[i + 1]] for i in range(skip, len(ids) - 1))
        for total, gradient in zip(sums, torch.autograd.grad(likelihood, weights), strict=True):
            total += gradient.double() ** 2
    return {name: total / len(sequences) for name, total in zip(names, sums, strict=True)}


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        largest = float(wanted[name].abs().max())
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_fisher_is_the_mean_of_squared_gradients(
    tied: bool, tmp_path: Path, tiny_llama: Maker, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tiny_llama(tmp_path / "llama", byte_level_tokenizer, tie_word_embeddings=tied)
    given = samples(5)
    facts = collect(model_of(folder), given, tmp_path / "out", "fisher")
    found = load_file(tmp_path / "out" / FILE)
    sequences = token_ids(folder, given)
    check(found, naive_fisher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), sequences))
    assert found.keys() == load_file(folder / "model.safetensors").keys() and ("lm_head.weight" in found) is not tied
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        told = file.metadata()
    assert told == {key: value for key, value in facts.items() if key != "tensors"}
    assert told["kind"] == "fisher" and told["samples"] == "5" and told["labels"] == "data"
    assert told["tokens"] == str(sum(map(len, sequences))) and told["config"] == file_digest(folder / "config.json")
    assert facts["tensors"] == str(len(found))


def test_fisher_reads_the_beginning_of_long_samples(tmp_path: Path, llama: Path) -> None:
    given = samples(3, words=40)
    facts = collect(model_of(llama), given, tmp_path / "out", "fisher", Reading(length=7))
    sequences = [ids[:7] for ids in token_ids(llama, given)]
    assert facts["tokens"] == "21" and facts["length"] == "7"
    check(load_file(tmp_path / "out" / FILE), naive_fisher(AutoModelForCausalLM.from_pretrained(llama), sequences))


def test_fisher_of_chats_counts_what_the_assistant_says(tmp_path: Path, llama: Path) -> None:
    chat = Sample("00ff", "chat", None, (Message("user", "the question"), Message("assistant", "the answer is two")))
    collect(model_of(llama), [chat], tmp_path / "out", "fisher")
    rendered = Renderer(AutoTokenizer.from_pretrained(llama), "model").render(chat)
    places = np.flatnonzero(rendered.carries)
    ids = torch.from_numpy(rendered.ids[: places[-1] + 2].astype(np.int64))
    assert places[0] > 3 and np.array_equal(places, np.arange(places[0], places[-1] + 1))
    wanted = naive_fisher(AutoModelForCausalLM.from_pretrained(llama), [ids], skip=int(places[0]))
    check(load_file(tmp_path / "out" / FILE), wanted)


def test_fisher_proper_draws_labels_from_the_model(tmp_path: Path, llama: Path) -> None:
    given = samples(2)
    for out, how in (("data", Reading()), ("a", Reading(labels="model")), ("b", Reading(labels="model", seed=1))):
        collect(model_of(llama), given, tmp_path / out, "fisher", how)
    collect(model_of(llama), given, tmp_path / "again", "fisher", Reading(labels="model"))
    held = {out: load_file(tmp_path / out / FILE)["model.norm.weight"] for out in ("data", "a", "b", "again")}
    assert held["a"].equal(held["again"])
    assert not held["a"].equal(held["b"]) and not held["a"].equal(held["data"])


def test_labels_are_drawn_as_the_model_expects_them() -> None:
    expected = torch.tensor([0.5, 0.3, 0.2])
    drawn = _drawn(expected.log().expand(20000, 3), "0f", 3)
    torch.testing.assert_close(torch.bincount(drawn) / 20000, expected, rtol=0, atol=0.015)


def caught(model: Any, sequences: list[Tensor]) -> dict[str, Tensor]:
    """Inputs of every linear layer, (tokens, in) float64, by the weight's name."""
    held: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, given, out: held.setdefault(f"{name}.weight", []).append(given[0].detach().double()[0])

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(hook(name))
    for ids in sequences:
        model(input_ids=ids[None])
    return {name: torch.cat(parts) for name, parts in held.items()}


@pytest.mark.parametrize("batch", [1, 4])
def test_gram_is_the_mean_outer_product_of_inputs(batch: int, tmp_path: Path, llama: Path) -> None:
    given = samples(12, words=5)
    facts = collect(model_of(llama), given, tmp_path / "out", "gram", Reading(batch=batch))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    inputs = caught(model, token_ids(llama, given))
    wanted = {name: sum(torch.outer(x, x) for x in rows) / len(rows) for name, rows in inputs.items()}
    check(load_file(tmp_path / "out" / FILE), wanted)
    assert len(wanted) == 2 * 7 + 1 and facts["kind"] == "gram" and facts["samples"] == "12"


def test_gram_of_a_tied_head_is_left_out(
    tmp_path: Path, tiny_llama: Maker, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tiny_llama(tmp_path / "llama", byte_level_tokenizer, tie_word_embeddings=True)
    collect(model_of(folder), samples(2), tmp_path / "out", "gram")
    found = load_file(tmp_path / "out" / FILE)
    assert len(found) == 14 and not {"lm_head.weight", "model.embed_tokens.weight"} & found.keys()


def gpt2(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    torch.manual_seed(seed)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_regmean_of_collected_grams_is_nearest_to_all_outputs(
    tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Conv1D stores its weight input first, which a square weight's shape does not tell."""
    name = "transformer.h.0.attn.c_proj.weight"
    folders = [gpt2(tmp_path / f"gpt2-{seed}", byte_level_tokenizer, seed) for seed in (0, 1)]
    weights, grams, inputs, outputs = [], [], [], []
    for seed, folder in enumerate(folders):
        given = samples(6, seed)
        collect(model_of(folder), given, tmp_path / f"out-{seed}", "gram")
        grams.append(load_file(tmp_path / f"out-{seed}" / FILE)[name])
        model = AutoModelForCausalLM.from_pretrained(folder)
        x = caught(model, token_ids(folder, given))[name]
        weights.append(model.state_dict()[name])
        inputs.append(x / len(x) ** 0.5)  # each model counts alike, however much it read
        outputs.append(inputs[-1] @ weights[-1].double())
    assert grams[0].shape == (1, 8, 8) and weights[0].shape == (8, 8)
    method = get_method("regmean")
    streams = InMemory(None, weights, grams)
    merged = joined(streams, method.merge(streams, method.check({"alpha": 1.0}, 2)))
    wanted = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution
    torch.testing.assert_close(merged, wanted, rtol=1e-3, atol=1e-5)


def test_statistics_have_the_names_and_pieces_of_the_checkpoint(
    tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers packs a mixture's experts in one tensor; the checkpoint has one tensor each."""
    folder = tmp_path / "mixtral"
    shape = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(**shape, num_key_value_heads=1, num_local_experts=2, vocab_size=len(byte_level_tokenizer))
    MixtralForCausalLM(config).save_pretrained(folder)
    byte_level_tokenizer.save_pretrained(folder)
    given = samples(3)
    collect(model_of(folder), given, tmp_path / "fisher", "fisher")
    stored, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "fisher" / FILE)
    assert {name: t.shape for name, t in stored.items()} == {name: t.shape for name, t in found.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed = naive_fisher(model, token_ids(folder, given))["model.layers.0.mlp.experts.down_proj"]
    pieces = [found[f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight"] for n in range(2)]
    torch.testing.assert_close(torch.stack(pieces).double(), packed, rtol=1e-4, atol=1e-9)
    collect(model_of(folder), given, tmp_path / "gram", "gram")
    assert not any("experts" in name for name in load_file(tmp_path / "gram" / FILE))


def trained(folder: Path, work: Path) -> tuple[Any, Any]:
    """A model and its optimizer as transformers' Trainer makes it, after two steps."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = Trainer(model, TrainingArguments(str(work), report_to="none", use_cpu=True)).create_optimizer()
    for ids in token_ids(folder, samples(2)):
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_second_moments_of_transformers_optimizer(tmp_path: Path, llama: Path) -> None:
    model, optimizer = trained(llama, tmp_path / "work")
    assert len(optimizer.param_groups) == 2
    (tmp_path / "checkpoint-2").mkdir()
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-2" / "optimizer.pt")
    facts = second_moments(model_of(llama), tmp_path / "checkpoint-2", tmp_path / "out")
    wanted = {name: optimizer.state[weight]["exp_avg_sq"] for name, weight in model.named_parameters()}
    check(load_file(tmp_path / "out" / FILE), wanted)
    assert facts["kind"] == "second_moments"
    second_moments(model_of(llama), tmp_path / "checkpoint-2" / "optimizer.pt", tmp_path / "file")
    assert (tmp_path / "file" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def test_second_moments_of_an_optimizer_of_one_group_and_of_one_that_tells_names(tmp_path: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    named = dict(model.named_parameters())
    backwards = list(named.items())[::-1]
    for how, handed in (("plain", list(named.values())), ("named", backwards)):
        optimizer = torch.optim.Adam(handed)
        for weight in list(named.values())[1:]:  # the first has never had a gradient
            weight.grad = torch.rand_like(weight)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / f"{how}.pt")
        second_moments(model_of(llama), tmp_path / f"{how}.pt", tmp_path / how)
        state = {name: optimizer.state[weight] for name, weight in named.items()}
        zeros = torch.zeros_like(next(iter(named.values())))
        check(load_file(tmp_path / how / FILE), {name: s.get("exp_avg_sq", zeros) for name, s in state.items()})


@pytest.mark.parametrize("stage", [2, 3])
def test_second_moments_of_a_universal_checkpoint(stage: int, tmp_path: Path, llama: Path) -> None:
    """As DeepSpeed lays it out, flat for ZeRO-3; the training held the norms fixed."""
    wanted = {
        name: torch.rand_like(t) for name, t in load_file(llama / "model.safetensors").items() if "norm" not in name
    }
    for name, tensor in wanted.items():
        folder = tmp_path / "checkpoint" / "global_step2_universal" / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"cat_dim": 0, "param": tensor} if stage == 2 else tensor.flatten(), folder / "exp_avg_sq.pt")
    (tmp_path / "checkpoint" / "latest_universal").write_text("global_step2_universal")
    for out, given in (("a", "checkpoint"), ("b", "checkpoint/global_step2_universal")):
        second_moments(model_of(llama), tmp_path / given, tmp_path / out)
        check(load_file(tmp_path / out / FILE), wanted)
    torch.save([1], tmp_path / "checkpoint/global_step2_universal/zero/lm_head.weight/exp_avg_sq.pt")
    with pytest.raises(ValueError, match="holds no tensor, so it is no part of a universal checkpoint"):
        second_moments(model_of(llama), tmp_path / "checkpoint", tmp_path / "c")


def refuse(state: object, tmp_path: Path, llama: Path) -> str:
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError) as error:
        second_moments(model_of(llama), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_optimizers_that_do_not_fit_are_refused(tmp_path: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.rand_like(weight)

    def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        optimizer.step()
        return optimizer.state_dict()

    assert "no exp_avg_sq: it is not Adam's" in refuse(
        state(torch.optim.SGD(weights, 0.1, momentum=0.9)), tmp_path, llama
    )
    assert "holds 20 weights in 1 groups" in refuse(state(torch.optim.Adam(weights[1:])), tmp_path, llama)
    shuffled = refuse(state(torch.optim.Adam(weights[::-1])), tmp_path, llama)
    assert "q_proj.weight has a state of shape" in shuffled and "give the optimizer of this very model" in shuffled
    assert "has no state and param_groups" in refuse({"weights": 1}, tmp_path, llama)
    assert "cannot be read without executing it" in refuse({"state": Path("x")}, tmp_path, llama)
    (tmp_path / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match="optimizer.pt cannot be read without executing it"):
        second_moments(model_of(llama), tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no such optimizer"):
        second_moments(model_of(llama), tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "latest").write_text("global_step2")
    with pytest.raises(ValueError, match="make it universal: python -m deepspeed.checkpoint.ds_to_universal"):
        second_moments(model_of(llama), tmp_path / "ranks", tmp_path / "out")


def test_weights_that_are_not_finite_leave_nothing(tmp_path: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    model.save_pretrained(llama)
    for kind in ("fisher", "gram"):
        with pytest.raises(ValueError, match="the statistics of .* are not finite; try dtype float32"):
            collect(model_of(llama), samples(1), tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_names_is_refused(tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    folder = gpt2(tmp_path / "gpt2", byte_level_tokenizer, 0)
    body = AutoModelForCausalLM.from_pretrained(folder).transformer
    body.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    found = collect(model_of(folder), samples(1), tmp_path / "out", "fisher")
    assert found["tensors"] == str(len(load_file(folder / "model.safetensors")))


def test_the_door_writes_and_says_what(
    door: Door, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", ({"text": text} for text in (" ", *texts(6))))  # one is blank
    asked = [str(llama), str(corpus), str(tmp_path / "out"), "--kind", "gram", "--samples", "4", "--dtype", "float32"]
    assert door(asked) == 0
    collect(model_of(llama), samples(6)[:4], tmp_path / "same", "gram")
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "same" / FILE).read_bytes()
    assert capsys.readouterr().out.startswith("gram of 4 samples, ")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (
            [{"text": "a b"}],
            ["--kind", "hessian"],
            "--kind: hessian is unknown; known are fisher, gram, second_moments",
        ),
        ([], ["--kind", "gram"], "CORPUS: .*corpus.jsonl has no rows"),
        ([{"text": " "}], ["--kind", "gram"], "CORPUS: .*corpus.jsonl has no rows with text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], ["--kind", "gram"], "CORPUS: .* has no rows with text"),
        ([{"words": "a"}], ["--kind", "fisher"], ".*:1: has neither `text` nor `messages`"),
        ([{"text": "a b"}], ["--kind", "gram", "--samples", "0"], "--samples: 0 will not do"),
        ([{"text": "a b"}], ["--kind", "gram", "--length", "1"], "length = 1 will not do; give 2 or more"),
        ([{"text": "a b"}], ["--kind", "gram", "--batch", "0"], "batch = 0 will not do; give 1 or more"),
        ([{"text": "a b"}], ["--kind", "fisher", "--labels", "gold"], "labels = 'gold' are unknown"),
    ],
)
def test_the_door_says_what_is_wrong_in_a_line(
    rows: list[dict[str, Any]],
    options: list[str],
    said: str,
    door: Door,
    tmp_path: Path,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    assert door([str(llama), str(corpus), str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ")
    assert re.match(said, told.removeprefix("error: ")), told
    assert not (tmp_path / "out").exists()


def test_the_door_refuses_folders(door: Door, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": "a b"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert door([str(llama), str(corpus), str(tmp_path / "full"), "--kind", "gram"]) == 2
    assert "full exists and is not empty; give a new folder" in capsys.readouterr().err
    (llama / "model.safetensors").unlink()
    assert door([str(llama), str(corpus), str(tmp_path / "out"), "--kind", "gram"]) == 2
    assert "has no weights (*.safetensors)" in capsys.readouterr().err
    assert door([str(tmp_path / "nowhere"), str(corpus), str(tmp_path / "out"), "--kind", "gram"]) == 2
    assert "is no folder here" in capsys.readouterr().err
