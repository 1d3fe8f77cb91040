"""A source is read the same in batches, by halves and in blocks as each sample by itself, whatever its architecture."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import samples
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.capture import reader as reading
from fusion.capture.coder import Said
from fusion.capture.head import Halves
from fusion.capture.reader import NOT_FINITE, Reader
from fusion.config import Capture, Model
from fusion.records import Message, Sample, sample_id

K = 8
ROWS = 3  # positions whose logits exist at a time
SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"max_position_embeddings": 128, "initializer_range": 0.4}
SHARED = SIZE | {"num_key_value_heads": 2}
NARROW = SHARED | {"head_dim": 8, "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.4}
SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# name → model type and settings; a body of each can be told from its head
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SHARED),
    "neox": ("gpt_neox", SIZE),
    "gpt2": ("gpt2", GPT2),
    "mistral, a window of 8": ("mistral", SHARED | {"sliding_window": 8}),
    "mixtral": ("mixtral", SHARED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", SHARED),
    "qwen2 moe": ("qwen2_moe", SHARED | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3 moe": ("qwen3_moe", SHARED | EXPERTS | {"head_dim": 8}),
    "gemma2, soft caps": ("gemma2", NARROW | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma3 text, soft cap": ("gemma3_text", NARROW | {"final_logit_softcapping": 3.0}),
    "granite, logits scaled": ("granite", SHARED | {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere, logits scaled": ("cohere", SHARED | {"logit_scale": 0.25}),
    "opt, head of another width": ("opt", OPT | {"max_position_embeddings": 128, "word_embed_proj_dim": 24}),
    "falcon": ("falcon", {k: v for k, v in SIZE.items() if k != "intermediate_size"}),
    "phi3": ("phi3", SHARED),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}),
    "gemma3, with images": (
        "gemma3",
        {"text_config": NARROW, "vision_config": SEEING | {"image_size": 28, "patch_size": 14}}
        | {"mm_tokens_per_image": 4},
    ),
}
# transformers has no other attention for these than its own
EAGER = {"gemma2", "mamba"}
# no module of these says what their head is given: whole logits, a sample at a time
UNSPLIT = {"roberta": ("roberta", SIZE | {"is_decoder": True})}
# reference code of these says that faster kernels are not installed
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")


@pytest.fixture(scope="module")
def made() -> list[Sample]:
    """Texts of unlike lengths, one of a single word, one cut off, and a chat."""
    turns = ("user", "one?"), ("assistant", "Two three."), ("user", "four?"), ("assistant", "five")
    messages = tuple(Message(*turn) for turn in turns)
    texts = [Sample(sample_id(t), "d", t) for t in ("a", "the cat sat on the mat " * 3)]
    chat = Sample(sample_id(None, messages), "chat", None, messages)
    return [*samples(4), *texts, chat, Sample(sample_id("cut off"), "odd", "cut off", complete=False)]


def folder_of(root: Path, tokenizer: PreTrainedTokenizerFast, kind: str, settings: dict[str, Any], dtype: str) -> Path:
    """A random model of a family, saved."""
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    settings = {"vocab_size": len(tokenizer), **ids, **settings}
    if "text_config" in settings:
        settings["text_config"] = {"vocab_size": len(tokenizer), **ids, **settings["text_config"]}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.to(getattr(torch, dtype)).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def reader_of(folder: Path, dtype: Any = "float32", **settings: Any) -> Reader:
    chosen: dict[str, Any] = {"sampler": "top_k", "k": K, "batch_tokens": 100} | settings
    attention: Any = "eager" if json.loads((folder / "config.json").read_text())["model_type"] in EAGER else "sdpa"
    reader = Reader(Model(str(folder), "a", dtype=dtype, attention=attention), folder, Capture(**chosen))
    reader.load()
    return reader


def all_said(reader: Reader, made: list[Sample]) -> dict[str, Said]:
    batches = list(reader.batches(made, {}))
    assert 1 < len(batches) < len(made)
    told = [said for batch in batches for said in reader.read(batch)[0]]
    assert sorted(said.id for said in told) == sorted(sample.id for sample in made)
    return {said.id: said for said in told}


@pytest.fixture
def rows_of_the_head(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many positions each call of a model's head was about, from when the model was split in two."""
    rows: list[int] = []
    begin = Halves.__init__

    def watched(self: Halves, model: Any) -> None:
        begin(self, model)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))

    monkeypatch.setattr(Halves, "__init__", watched)
    yield rows


def is_a_naive_reading(reader: Reader, folder: Path, made: list[Sample], dtype: str, close: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=reader.source.attention
    ).eval()
    for id, said in all_said(reader, made).items():
        rendered = reader.renderer.render(next(s for s in made if s.id == id))
        with torch.no_grad():
            logits = model(torch.from_numpy(rendered.ids).long()[None]).logits
        logp = logits[0].float().log_softmax(-1)
        at = np.flatnonzero(rendered.carries)
        following = rendered.ids[at + 1]
        assert said.heard.ids.tolist() == following.tolist()
        assert said.heard.boundary.tolist() == rendered.boundary[at].tolist()
        assert said.heard.carries.tolist() == rendered.carries[at].tolist()
        assert said.heard.content_bytes == rendered.content_bytes
        assert np.allclose(said.heard.logp, logp[at, following], **close)
        largest = logp[at].topk(K).values
        assert np.allclose(said.head_logp, largest, **close)
        assert np.allclose(said.head_logp, logp[at].gather(-1, torch.from_numpy(said.head)), **close)
        listed = (said.head == following[:, None]).any(-1)
        left = 1 - largest.exp().sum(-1).numpy() - np.where(listed, 0, np.exp(said.heard.logp))
        assert np.allclose(said.left, left.clip(0), atol=close["atol"])
        assert logp[at].std() > 0.1  # not all the same: a wrong position would show


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_by_halves_is_a_naive_reading(
    family: str, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    rows_of_the_head: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES[family], "float32")
    monkeypatch.setitem(reading._BLOCK, "cpu", ROWS * len(byte_level_tokenizer) + 1)
    reader = reader_of(folder)
    assert reader._halves is not None and reader._halves.split and reader.width == len(byte_level_tokenizer)
    is_a_naive_reading(reader, folder, made, "float32", {"rtol": 0, "atol": 2e-4})
    positions = sum(int((reader.renderer.render(s).carries > 0).sum()) for s in made)
    assert max(rows_of_the_head) == ROWS and sum(rows_of_the_head) == positions


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "gemma2, soft caps", "mixtral", "gemma3, with images"])
def test_a_reading_in_bfloat16(
    family: str, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    rows_of_the_head: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As close as its eight bits allow: sums are taken in another order where there is padding."""
    kind, settings = FAMILIES[family]
    even = {"initializer_range": 0.1}  # else near ties between experts go either way
    settings = settings | ({"text_config": settings["text_config"] | even} if "text_config" in settings else even)
    folder = folder_of(tmp_path, byte_level_tokenizer, kind, settings, "bfloat16")
    monkeypatch.setitem(reading._BLOCK, "cpu", ROWS * len(byte_level_tokenizer))
    reader = reader_of(folder, "bfloat16")
    assert reader._halves is not None and reader._halves.split
    is_a_naive_reading(reader, folder, made, "bfloat16", {"rtol": 0.02, "atol": 0.05})
    assert max(rows_of_the_head) == ROWS


@pytest.mark.parametrize("family", UNSPLIT)
def test_a_model_that_cannot_be_split_is_read_a_sample_at_a_time(
    family: str, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kind, settings = UNSPLIT[family]
    folder = folder_of(tmp_path, byte_level_tokenizer, kind, settings | {"pad_token_id": 1}, "float32")
    monkeypatch.setitem(reading._BLOCK, "cpu", ROWS * len(byte_level_tokenizer))
    reader = reader_of(folder)
    assert reader._halves is not None and not reader._halves.split
    is_a_naive_reading(reader, folder, made, "float32", {"rtol": 0, "atol": 2e-4})


def test_a_body_that_will_not_be_called_alone_is_not_split(
    tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that keeps the halves from saying what the whole says, the whole is asked."""
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32")
    said = Halves.logits
    for wrong in (lambda self, h: said(self, h) + 0.1, lambda self, h: said(self, h)[:, 1:], lambda self, h: h.no):
        monkeypatch.setattr(Halves, "logits", wrong)
        reader = reader_of(folder)
        assert reader._halves is not None and not reader._halves.split
        is_a_naive_reading(reader, folder, made, "float32", {"rtol": 0, "atol": 2e-4})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_say_what_the_whole_says(family: str, dtype: str, byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    kind, settings = FAMILIES[family]
    settings = {"vocab_size": 90, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None} | settings
    torch.manual_seed(0)
    if "text_config" in settings:
        settings["text_config"] = settings["text_config"] | {"vocab_size": 90, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    halves = Halves(model)
    assert halves.split
    ids = torch.randint(0, 90, (2, 20))
    with torch.inference_mode():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        hidden = halves.hidden(ids, torch.ones_like(ids)).reshape(40, -1)
        parts = [halves.logits(hidden[n : n + 7]) for n in range(0, 40, 7)]
        least = 1e-5 if dtype == "float32" else 2e-2
        assert torch.allclose(torch.cat(parts), wanted.reshape(40, -1), rtol=least, atol=least)
        # the model is what it was
        again = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert torch.equal(again, wanted)


@pytest.mark.parametrize("split", [True, False])
def test_samples_without_loss_are_read_as_nothing(
    split: bool, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32")
    reader = reader_of(folder, sampler="random")
    assert reader._halves is not None
    monkeypatch.setattr(reader._halves, "split", split)
    mute = Sample("0" * 16, "d", None, (Message("user", "one two"),))
    for part in ([mute], [mute, made[0]]):
        (batch,) = reader.batches(part, {})
        said, left_out = reader.read(batch)
        assert not left_out and sorted(s.id for s in said) == sorted(s.id for s in part)
        nothing = next(s for s in said if s.id == mute.id)
        assert len(nothing.heard.ids) == len(nothing.drawn) == 0 and nothing.heard.content_bytes == 0
    assert reader.frequencies(reader.batches([mute], {})).tolist() == [0] * reader.width


@pytest.mark.parametrize("split", [True, False])
def test_ranks_that_hold_the_weights_together_ask_as_often(
    split: bool, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every pass takes all ranks: one that has less to read goes through the motions, and keeps what it would alone."""
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32")
    monkeypatch.setitem(reading._BLOCK, "cpu", ROWS * len(byte_level_tokenizer))
    reader = reader_of(folder, batch_tokens=10_000)
    assert reader._halves is not None
    monkeypatch.setattr(reader._halves, "split", split)
    (batch,) = reader.batches(made, {})
    alone = {said.id: said for said in reader.read(batch)[0]}
    asked: list[str] = []
    for name in ("hidden", "logits", "all_logits"):

        def watched(*args: Any, name: str = name, ask: Any = getattr(reader._halves, name)) -> Any:  # noqa: B008
            asked.append(name)
            return ask(*args)

        monkeypatch.setattr(reader._halves, name, watched)
    monkeypatch.setattr(Reader, "spread", True)
    monkeypatch.setattr(reading.cluster, "most", lambda values: [max(v, 60) for v in values])
    told, left_out = reader.read(batch)
    wanted = ["hidden"] + ["logits"] * 60 if split else ["all_logits"] * 60
    assert asked == wanted and not left_out
    for said in told:
        assert np.allclose(said.heard.logp, alone[said.id].heard.logp, atol=1e-5)
        assert np.array_equal(said.head, alone[said.id].head)
    asked.clear()
    assert reader.read(None) == ([], {}) and asked == wanted


def test_frequencies_are_mean_probabilities(
    tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["neox"], "float32")
    reader = reader_of(folder)
    found = reader.frequencies(reader.batches(made, {}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = np.zeros(len(byte_level_tokenizer))
    positions = 0
    for sample in made:
        rendered = reader.renderer.render(sample)
        with torch.no_grad():
            probs = model(torch.from_numpy(rendered.ids).long()[None]).logits[0].softmax(-1)
        wanted += probs[np.flatnonzero(rendered.carries)].double().sum(0).numpy()
        positions += int((rendered.carries > 0).sum())
    assert np.allclose(found / found.sum(), wanted / positions, atol=1e-6)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("sampler", ["top_k", "nucleus", "random", "hybrid"])
def test_what_is_not_finite_leaves_out_its_sample_alone(
    sampler: str, split: bool, tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32")
    monkeypatch.setitem(reading._BLOCK, "cpu", 5 * len(byte_level_tokenizer))
    reader = reader_of(folder, sampler=sampler, on_nonfinite="skip", batch_tokens=10_000)
    assert reader._halves is not None
    monkeypatch.setattr(reader._halves, "split", split)
    (batch,) = reader.batches(made, {})
    before = {said.id: said for said in reader.read(batch)[0]}
    sun = byte_level_tokenizer.backend_tokenizer.encode("日").ids
    reader._halves._model.get_input_embeddings().weight.data[sun] = float("nan")
    odd = Sample(sample_id("日 one"), "d", "日 one")
    (batch,) = reader.batches([*made, odd], {})
    told, left_out = reader.read(batch)
    assert left_out == {odd.id: NOT_FINITE} and {said.id for said in told} == set(before)
    for said in told:
        assert np.allclose(said.heard.logp, before[said.id].heard.logp, atol=1e-4)
        entries = said.drawn if sampler == "random" else said.head
        wanted = before[said.id].drawn if sampler == "random" else before[said.id].head
        width = min(entries.shape[1], wanted.shape[1])
        assert (entries[:, :width] == wanted[:, :width]).mean() > 0.99


def test_a_source_lets_go_of_its_weights(
    tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    import weakref

    reader = reader_of(folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32"))
    assert reader._halves is not None
    batch = next(iter(reader.batches(made, {})))
    reader.read(batch)
    held = weakref.ref(reader._halves._model.get_input_embeddings())
    reader.close()
    assert held() is None
    reader.load()
    assert len(reader.read(batch)[0]) == len(batch.samples)


def test_a_tokenizer_without_padding(
    tmp_path: Path, made: list[Sample], byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_of(tmp_path, byte_level_tokenizer, *FAMILIES["llama"], "float32")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    is_a_naive_reading(reader_of(folder), folder, made, "float32", {"rtol": 0, "atol": 2e-4})
