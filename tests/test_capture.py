"""Capture: the cache of a source is what a naive reading of each sample by itself gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from said import rows_of
from tiny import artifact, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.artifact import Artifact
from fusion.capture import reader, stage
from fusion.capture.cache import INDEX, VOCABULARY, Cache, read_vocabulary, shard_name
from fusion.config import Capture, Config, Dataset, Model, Prepare
from fusion.corpus import Corpus, write_samples
from fusion.records import Carries, Message, Sample, sample_id

K = 6
HYBRID = {"sampler": "hybrid", "draws": 20, "temperature": 1.3}


def fusion(source: Path, **settings: Any) -> Config:
    model = Model(str(source), "a", dtype="float32")
    data = (Dataset("none.jsonl"),)
    chosen: dict[str, Any] = {"sampler": "top_k", "k": K} | settings
    return Config("small", Model("none"), (model,), Prepare(data), capture=Capture(**chosen))


def capture(root: Path, source: Path, prepared: Path, **settings: Any) -> tuple[Artifact, dict[str, Any]]:
    out = artifact(root, "capture", "a")
    return out, again(out, source, prepared, **settings)


def again(out: Artifact, source: Path, prepared: Path, **settings: Any) -> dict[str, Any]:
    facts = stage.run(fusion(source, **settings), {"prepare": prepared, "model": source}, out)
    out.publish(facts, 0.0)
    return facts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of unlike lengths, one cut from a longer one, one beyond ASCII."""
    folder = tmp_path_factory.mktemp("prepared")
    made = samples(30, words=20)
    made += [Sample(sample_id(t), "odd", t) for t in ("a", "  spaces\n\n", "naïve 日本語 🙂", "<s> spelled </s>")]
    made.append(Sample(sample_id("cut off"), "odd", "cut off", complete=False))
    write_samples(folder / "train.parquet", made)
    return folder


@pytest.fixture(scope="module", params=["llama", "neox"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures, each with another kind of tokenizer. Weights are large, so that distributions are uneven."""
    folder = tmp_path_factory.mktemp(request.param)
    kinds = {"llama": "sentencepiece_tokenizer", "neox": "byte_level_tokenizer"}
    tokenizer = request.getfixturevalue(kinds[request.param])
    make = request.getfixturevalue(f"tiny_{request.param}")
    return make(folder, tokenizer, seed=3, initializer_range=0.4)


def naive(model: Any, tokenizer: Any, text: str, complete: bool) -> tuple[list[int], torch.Tensor]:
    """Ids of a text with its start and end, and float32 log-probabilities (T - 1, V), without padding or batches."""
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    tokenizer.backend_tokenizer.encode_special_tokens = True
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.backend_tokenizer.encode_special_tokens = False
    ids = [start, *ids, *([end] if complete else [])]
    with torch.no_grad():
        return ids, model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def is_near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Log-probabilities of next tokens: half a step of their code (in the root of nats), and what float32 does."""
    return bool((np.abs(found - wanted) <= np.sqrt(np.abs(wanted)) / 1024 + 2e-4).all())


def test_rows_are_a_naive_reading(tmp_path: Path, prepared: Path, source: Path) -> None:
    out, facts = capture(tmp_path, source, prepared)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    cache, nats, positions, size = Cache(out.folder), 0.0, 0, 0
    for sample in Corpus(prepared, "train"):
        assert sample.text is not None
        heard = cache.get(sample.id)
        assert heard is not None
        ids, logp_TV = naive(model, tokenizer, sample.text, sample.complete)
        n = len(ids) - 1
        assert heard.ids.tolist() == ids[1:]
        assert heard.carries.tolist() == [Carries.CONTENT] * (n - 1) + [
            Carries.END if sample.complete else Carries.CONTENT
        ]
        assert heard.content_bytes == len(sample.text.encode())
        next_T = logp_TV[range(n), ids[1:]].numpy()
        assert is_near(heard.logp, next_T)
        assert (heard.entries.mass() <= 1 + 1e-3).all()
        for t, (kept, probs) in enumerate(rows_of(heard)):
            # the token that followed first, then the K most probable; each with its own probability, none renormalised
            logp = logp_TV[t].double().numpy()
            others = [i for i in (-logp).argsort()[:K].tolist() if i != ids[t + 1]]
            assert kept[0] == ids[t + 1] and sorted(kept[1:]) == sorted(others)
            assert probs[0] == pytest.approx(float(np.exp(heard.logp[t])), rel=1e-5)
            step = np.sqrt(-logp[others].min()) / 24 + 1e-3 / np.exp(logp[others]).sum()
            assert np.allclose(probs[1:], np.exp(logp[kept[1:]]), rtol=step, atol=1e-6)
        content = n if not sample.complete else n - 1
        bits = -float(next_T[:content].sum(dtype=np.float64)) / len(sample.text.encode()) / np.log(2)
        assert heard.bits_per_byte() == pytest.approx(bits, rel=1e-3)
        nats, positions, size = nats + bits * heard.content_bytes, positions + n, size + heard.content_bytes
    assert len(cache) == facts["samples"] == 35 and facts["tokens"] == positions and facts["left out"] == 0
    assert facts["train bits per byte"] == pytest.approx(nats / size, abs=2e-4)
    held = [p for p in out.folder.glob("*.parquet") if p.name != INDEX]
    assert facts["bytes on disk"] == sum(p.stat().st_size for p in held)
    assert facts["bytes a token"] == pytest.approx(facts["bytes on disk"] / positions, abs=0.01)
    assert facts["model"] == str(source) and facts["sampler"] == "top_k" and facts["temperature"] == 1
    order = read_vocabulary(out.folder / VOCABULARY)
    assert len(order) == model.config.vocab_size


def test_places_of_a_text_are_its_bytes(
    tmp_path: Path, prepared: Path, tiny_neox: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    out, _ = capture(tmp_path, tiny_neox(tmp_path / "m", byte_level_tokenizer), prepared)
    cache = Cache(out.folder)
    for sample in Corpus(prepared, "train"):
        heard = cache.get(sample.id)
        assert heard is not None and sample.text is not None
        spelled = [byte_level_tokenizer.convert_ids_to_tokens(int(i)) for i in heard.ids[heard.carries == 1]]
        read = np.cumsum([0, *map(len, spelled)])  # byte-level pieces have one character a byte
        assert heard.boundary.tolist() == (1 + read[: len(heard.ids)]).tolist()


@pytest.mark.parametrize("how", [{}, {"sampler": "nucleus", "mass": 0.8}, {"sampler": "random", "draws": 20}, HYBRID])
def test_batches_do_not_matter(tmp_path: Path, prepared: Path, source: Path, how: dict[str, Any]) -> None:
    """What is kept and drawn is the same, but where float32 rounds to another side."""
    folders = [capture(tmp_path / str(n), source, prepared, batch_tokens=n, **how)[0].folder for n in (1, 100_000)]
    first, *others = [Cache(folder) for folder in folders]
    same, rows = 0, 0
    for sample in Corpus(prepared, "train"):
        wanted = first.get(sample.id)
        assert wanted is not None
        for cache in others:
            heard = cache.get(sample.id)
            assert heard is not None
            assert heard.ids.tolist() == wanted.ids.tolist() and heard.boundary.tolist() == wanted.boundary.tolist()
            assert (np.abs(heard.logp - wanted.logp) <= np.sqrt(np.abs(wanted.logp)) / 500 + 2e-4).all()
            for (ids, probs), (other_ids, other_probs) in zip(rows_of(heard), rows_of(wanted), strict=True):
                rows += 1
                same += sorted(ids) == sorted(other_ids) and np.allclose(
                    np.sort(probs), np.sort(other_probs), atol=2e-3
                )
    assert rows > 300 and same > 0.99 * rows


def test_draws_are_of_the_sources_distribution(tmp_path: Path, prepared: Path, source: Path) -> None:
    """What the draws of all positions say of one id after the other is what the source says, in sum."""
    out, facts = capture(tmp_path, source, prepared, sampler="random", draws=40, temperature=0.8)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    cache = Cache(out.folder)
    found, wanted = np.zeros(model.config.vocab_size), np.zeros(model.config.vocab_size)
    for sample in Corpus(prepared, "train"):
        heard = cache.get(sample.id)
        assert heard is not None
        _, logp = naive(model, tokenizer, str(sample.text), sample.complete)
        wanted += logp.exp().double().sum(0).numpy()
        np.add.at(found, heard.entries.ids, heard.entries.probs)
        assert np.allclose(heard.entries.mass(), 1, atol=1e-3)
    assert facts["temperature"] == 0.8 and facts["sampler"] == "random"
    assert found.sum() == pytest.approx(wanted.sum(), rel=1e-3)
    assert np.abs(found - wanted).sum() < 0.1 * wanted.sum()
    assert np.corrcoef(found, wanted)[0, 1] > 0.99


def test_only_assistant_turns_are_kept(tmp_path: Path, source: Path) -> None:
    turns = ("user", "one?"), ("assistant", "Two three."), ("user", "four?"), ("assistant", "five")
    messages = tuple(Message(*turn) for turn in turns)
    chat = Sample(sample_id(None, messages), "chat", None, messages)
    write_samples(tmp_path / "train.parquet", [chat])
    out, _ = capture(tmp_path, source, tmp_path)
    heard = Cache(out.folder).get(chat.id)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert heard is not None and heard.content_bytes == len("Two three.five")
    content, ends = heard.ids[heard.carries == Carries.CONTENT], heard.ids[heard.carries == Carries.END]
    assert "".join(str(tokenizer.decode(content)).split()) == "Twothree.five"
    assert ends.tolist() == [tokenizer.eos_token_id] * 2


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, prepared: Path, source: Path) -> None:
    out, facts = capture(tmp_path, source, prepared)
    shards = sorted(out.folder.glob("shard-*.parquet"))
    assert [s.name for s in shards] == [shard_name(n) for n in range(5)]  # groups of 8 of 35 samples
    before = {s: (s.read_bytes(), s.stat().st_mtime_ns, s.stat().st_ino) for s in shards}
    shards[1].unlink()
    shards[3].write_bytes(before[shards[3]][0][:-9])  # no whole parquet file
    resumed = again(out, source, prepared)
    for n, shard in enumerate(shards):
        content, changed, inode = before[shard]
        assert shard.read_bytes() == content
        assert (shard.stat().st_mtime_ns == changed and shard.stat().st_ino == inode) == (n not in (1, 3))
    idle = again(out, source, prepared)
    assert idle["tokens a second"] is None and resumed["tokens a second"] > 0
    speeds = {"tokens a second": 0}
    assert idle | speeds == resumed | speeds == facts | speeds
    assert all(s.stat().st_ino == before[s][2] for n, s in enumerate(shards) if n not in (1, 3))


def test_a_finished_capture_loads_no_model(
    tmp_path: Path, prepared: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = capture(tmp_path, source, prepared)
    monkeypatch.setattr(reader.hub, "load_model", lambda *_: pytest.fail("the model was loaded"))
    again(out, source, prepared)


@pytest.fixture
def long(tmp_path: Path) -> list[Sample]:
    made = [Sample(sample_id(t), "d", t) for t in ("short", "long " * 90, "also short")]
    write_samples(tmp_path / "train.parquet", made)
    return made


def test_too_long_is_refused(
    tmp_path: Path, long: list[Sample], tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=64)
    out = artifact(tmp_path, "capture", "a")
    with pytest.raises(ValueError) as refused:
        again(out, source, tmp_path)
    tokens = len(byte_level_tokenizer.backend_tokenizer.encode(str(long[1].text)).ids) + 2
    assert str(refused.value) == (
        f"a: sample {long[1].id} has {tokens} tokens and the context is 64; "
        "lower prepare.max_bytes or set capture.too_long: skip"
    )
    assert list(out.folder.iterdir()) == []


def test_too_long_is_skipped(
    tmp_path: Path, long: list[Sample], tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=64)
    out, facts = capture(tmp_path, source, tmp_path, too_long="skip")
    cache = Cache(out.folder)
    assert list(cache.ids()) == [long[0].id, long[2].id] and facts["samples"] == 2
    assert cache.get(long[1].id) is None and long[1].id not in cache and long[0].id in cache
    assert cache.left_out == {long[1].id: reader.TOO_LONG} and facts["left out"] == 1
    stage.accept(fusion(source, too_long="skip", on_nonfinite="stop"), out)
    with pytest.raises(ValueError, match="too_long is refuse now; set it to skip, or change the samples"):
        stage.accept(fusion(source), out)


def test_a_sample_as_long_as_the_context_is_read(
    tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "one two"
    tokens = len(byte_level_tokenizer.backend_tokenizer.encode(text).ids) + 2
    write_samples(tmp_path / "train.parquet", [Sample("0" * 16, "d", text)])
    exact = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=tokens)
    assert capture(tmp_path / "c", exact, tmp_path)[1]["tokens"] == tokens - 1
    less = tiny_llama(tmp_path / "n", byte_level_tokenizer, max_position_embeddings=tokens - 1)
    with pytest.raises(ValueError, match=f"has {tokens} tokens and the context is {tokens - 1}"):
        capture(tmp_path / "d", less, tmp_path)


def test_logits_that_are_not_finite_name_the_sample(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    sun = byte_level_tokenizer.backend_tokenizer.encode("日").ids
    with torch.no_grad():
        model.get_input_embeddings().weight[sun] = float("nan")
    model.save_pretrained(source)
    odd = [s for s in Corpus(prepared, "train") if "日" in str(s.text)]
    assert len(odd) == 1
    out = artifact(tmp_path, "capture", "a")
    with pytest.raises(ValueError) as refused:
        again(out, source, prepared)
    said = f"a: logits are not finite on sample {odd[0].id}, position "
    assert str(refused.value).startswith(said) and str(refused.value).endswith(
        "; try dtype: float32 for this source, or capture.on_nonfinite: skip"
    )
    int(str(refused.value).removeprefix(said).partition(";")[0])
    broken = next(n for n in range(5) if odd[0] in Corpus(prepared, "train").group(n))
    assert {p.name for p in out.folder.glob("*.parquet")} == {VOCABULARY, *(shard_name(n) for n in range(broken))}
    facts = again(out, source, prepared, on_nonfinite="skip")
    cache = Cache(out.folder)
    assert facts["samples"] == 34 and facts["left out"] == 1 and len(cache) == 34
    assert cache.left_out == {odd[0].id: reader.NOT_FINITE} and cache.get(odd[0].id) is None
    stage.accept(fusion(source, on_nonfinite="skip"), out)
    with pytest.raises(ValueError) as refused:
        stage.accept(fusion(source), out)
    assert str(refused.value) == (
        f"a: its cache {out.folder} was captured without sample {odd[0].id} (logits not finite), and "
        "capture.on_nonfinite is stop now; set it to skip, or change the samples"
    )


def test_a_tokenizer_larger_than_its_model_is_refused(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    size = len(byte_level_tokenizer)
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, vocab_size=size - 1)
    with pytest.raises(ValueError) as refused:
        capture(tmp_path, source, prepared)
    assert str(refused.value) == f"a: its tokenizer has {size} ids and its model {size - 1}; they are not a pair"


def test_a_control_token_beyond_the_model_is_no_hindrance(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma 3 of 1B has a token for images, and no row for it."""
    size = len(byte_level_tokenizer)
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(source)
    assert len(tokenizer) == size + 1
    capture(tmp_path, source, prepared)
    tokenizer.add_special_tokens({"eos_token": "<image>"})
    tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match=f"has {size + 1} ids and its model {size}; they are not a pair"):
        capture(tmp_path / "again", source, prepared)


def test_a_model_larger_than_its_tokenizer_is_read(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, vocab_size=len(byte_level_tokenizer) + 60)
    assert capture(tmp_path, source, prepared)[1]["samples"] == 35


@pytest.mark.parametrize("damage", ["cut", "lacks"])
def test_weights_that_do_not_load_are_named(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llama(tmp_path / "m", byte_level_tokenizer)
    path = source / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        said = f"a: {source} does not load as a causal language model: "
    else:
        tensors = load_file(path)
        del tensors["lm_head.weight"]
        save_file(tensors, path, {"format": "pt"})
        said = f"a: {source} lacks weights: lm_head.weight"
    with pytest.raises(ValueError) as refused:
        capture(tmp_path, source, prepared)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
