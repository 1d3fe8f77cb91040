"""Vocabularies joined by token: rows against a reference by token strings, tokenizers as transformers loads them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS, Maker
from merging import as_tensor, make_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.merge.jobs import STORAGE, Checkpoint, View, numel
from fusion.merge.opening import open_model
from fusion.merge.records import Tokenizer as Settings
from fusion.merge.records import TokenRow
from fusion.merge.vocabulary import Joined, join_vocabularies, refuse_different, same_vocabulary

EMBEDDING = "model.embed_tokens.weight"
REAL = Path(__file__).parents[2] / "shared/tokenizers"


def bpe(vocab: Mapping[str, int], added: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json of a BPE with a table and added tokens, and no merges."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": number, "content": content, **flags} for content, number in added.items()]
    model = json.loads(Tokenizer(models.BPE(dict(vocab), [])).to_str())["model"]
    return {"version": "1.0", "added_tokens": entries, "normalizer": None, "pre_tokenizer": None, "model": model}


def made(
    folder: Path,
    learned: Sequence[str],
    added: Sequence[str] = (),
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """A model whose tokens have ids in this order, learned ones first; rows of three columns drawn at random."""
    rows = len(learned) + len(added) + padding
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    tensors = {EMBEDDING: torch.randn(rows, 3, generator=generator).to(dtype)}
    make_folder(folder, tensors, vocab_size=rows, eos_token_id=len(learned) if added else None)
    marked = {token: len(learned) + place for place, token in enumerate(added)}
    (folder / "tokenizer.json").write_text(json.dumps(bpe({token: n for n, token in enumerate(learned)}, marked)))
    named = {"eos_token": added[0]} if added else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return open_model(str(folder))


def read(view: View, stretch: int = 1 << 30) -> Tensor:
    count = numel(view.shape)
    whole = np.empty(count, STORAGE[view.dtype])
    for start in range(0, count, stretch):
        view.read(start, whole[start : start + stretch])
    return as_tensor(whole.reshape(view.shape), view.dtype)


def embedding(joined: Joined, models: Sequence[Checkpoint], which: int, stretch: int = 1 << 30) -> Tensor:
    return read(joined.view(which, EMBEDDING, models[which].view(EMBEDDING)), stretch)


def join(settings: Any, models: Sequence[Checkpoint], base: int | None = None) -> Joined:
    joined = join_vocabularies(settings, models, base)
    assert joined is not None
    return joined


def three(tmp_path: Path) -> list[Checkpoint]:
    """Models that have tokens in common two by two, in other orders, with specials and padding of their own."""
    return [
        made(tmp_path / "one", ["a", "b", "c", "d"], ["<e>"]),
        made(tmp_path / "two", ["d", "x", "c", "y"], ["<e>", "<m>"], padding=2),
        made(tmp_path / "three", ["y", "a", "q", "x"], ["<e>", "<m>"]),
    ]


TOKENS = {
    "one": {"a": 0, "b": 1, "c": 2, "d": 3, "<e>": 4},
    "two": {"d": 0, "x": 1, "c": 2, "y": 3, "<e>": 4, "<m>": 5},
    "three": {"y": 0, "a": 1, "q": 2, "x": 3, "<e>": 4, "<m>": 5},
}


def rows_by_token(weights: Mapping[str, Tensor], name: str, token: str, base: str | None) -> Tensor:
    """The row of a token in a model, by the rules, from the strings alone."""
    if token in TOKENS[name]:
        return weights[name][TOKENS[name][token]]
    having = [other for other in TOKENS if token in TOKENS[other]]
    if len(having) > 1 and base in having:
        having = [str(base)]
    found = [weights[other][TOKENS[other][token]].double() for other in having]
    return (sum(found, torch.zeros(3).double()) / max(1, len(found))).float()


@pytest.mark.parametrize("base", [None, 0, 1])
def test_a_union_has_every_token_s_row_in_every_model(tmp_path: Path, base: int | None) -> None:
    models = three(tmp_path)
    joined = join({"source": "union", "pad_to_multiple_of": 8}, models, base)
    names = list(TOKENS)
    weights = {name: load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in names}
    assert set(joined.tokens) == set().union(*TOKENS.values()) and joined.rows == 16
    root = TOKENS[names[base or 0]]
    assert {token: joined.tokens[token] for token in root} == root  # the base's ids stay
    assert sorted(joined.tokens.values()) == list(range(9))
    for which, name in enumerate(names):
        found = embedding(joined, models, which)
        for token, row in joined.tokens.items():
            expected = rows_by_token(weights, name, token, None if base is None else names[base])
            torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-7)
        mean = found[:9].double().mean(0).float()
        torch.testing.assert_close(found[9:], mean.expand(7, 3), rtol=1e-6, atol=1e-7)
        for stretch in (1, 2, 7, 9):
            assert torch.equal(embedding(joined, models, which, stretch), found)


def test_one_model_s_tokens_and_its_special_ids(tmp_path: Path) -> None:
    models = three(tmp_path)
    joined = join(Settings(source=str(tmp_path / "two")), models, 0)
    assert joined.tokens == TOKENS["two"] and joined.rows == 6
    weights = {name: load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in TOKENS}
    expected = torch.stack([rows_by_token(weights, "one", token, "one") for token in TOKENS["two"]])
    torch.testing.assert_close(embedding(joined, models, 0), expected)
    config = {"vocab_size": 5, "eos_token_id": 99, "pad_token_id": 3, "audio": {"vocab_size": 7}}
    assert joined.config(config) == {"vocab_size": 6, "eos_token_id": 4, "audio": {"vocab_size": 7}}
    nested = {"text_config": {"vocab_size": 5, "layers": 2}, "eos_token_id": 0}
    assert joined.config(nested)["text_config"] == {"vocab_size": 6, "layers": 2}
    with pytest.raises(ValueError, match="tokenizer: 'gone' is no model of this merge"):
        join(Settings(source="gone"), models)


def test_tokens_that_the_settings_name(tmp_path: Path) -> None:
    models = three(tmp_path)
    weights = [load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in TOKENS]
    rows = {
        "<new>": {"model": None},
        "q": {"model": 1, "token": "x"},
        "a": {"model": 2, "token_id": 4, "force": True},
        "x": {"model": 2},
    }
    joined = join({"source": "base", "tokens": rows}, models)
    assert joined.tokens == {**TOKENS["one"], "<new>": 5, "q": 6, "x": 7}
    first, third = embedding(joined, models, 0), embedding(joined, models, 2)
    assert torch.equal(first[5], torch.zeros(3)) and torch.equal(third[5], torch.zeros(3))
    assert torch.equal(first[6], weights[1][1]) and torch.equal(third[6], weights[2][2])  # three has a q of its own
    assert torch.equal(first[0], weights[2][4]) and torch.equal(third[0], weights[2][4])  # forced
    assert torch.equal(first[7], weights[2][3])
    assert join({"source": "base"}, models).digest != joined.digest
    as_records = {
        token: TokenRow(**{**row, "model": row["model"] and f"m{row['model']}"}) for token, row in rows.items()
    }
    named = join_vocabularies(Settings("base", as_records), models, None, ["m0", "m1", "m2"])
    assert named is not None and named.digest == joined.digest
    for row, said in [
        ({"model": 0, "token": "q"}, "one has no token 'q'"),
        ({"model": 0, "token_id": 5}, "one has no row 5"),
        ({"model": 0}, "one has no token 'y'"),
    ]:
        with pytest.raises(ValueError, match=f"tokenizer: tokens: y: .*{said}; name one that it has"):
            join({"source": "union", "tokens": {"y": row}}, models)


def test_types_widths_and_biases(tmp_path: Path) -> None:
    one = made(tmp_path / "one", ["a", "b"], dtype=torch.bfloat16)
    two = made(tmp_path / "two", ["b", "c", "d"])
    three = made(tmp_path / "three", ["c", "b"])
    models = [one, two, three]
    joined = join({"source": "union"}, models)
    narrow, wide = embedding(joined, models, 0), embedding(joined, models, 1)
    weights = [load_file(model.folder / "model.safetensors")[EMBEDDING] for model in models]
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(narrow[2], ((weights[1][1] + weights[2][0]) / 2).to(torch.bfloat16))
    assert torch.equal(narrow[3], weights[1][2].to(torch.bfloat16))
    assert torch.equal(wide[0], weights[0][0].float())
    for model, rows in ((one, 2), (two, 3), (three, 2)):
        tensors = {"lm_head.bias": torch.arange(rows) + 0.5, "wte.weight": torch.ones(rows, 2 if model is one else 3)}
        save_file(tensors, model.folder / "model.safetensors")
    again = [open_model(str(model.folder)) for model in models]
    joined = join({"source": "union"}, again)
    assert joined.is_vocabulary("lm_head.bias", (2,), again[0].config)
    bias = read(joined.view(0, "lm_head.bias", again[0].view("lm_head.bias")), 1)
    assert bias.tolist() == [0.5, 1.5, (1.5 + 0.5) / 2, 2.5]
    with pytest.raises(ValueError, match=r"is \(2, 2\), and what .*two has of its kind is \(3, 3\)"):
        joined.view(0, "wte.weight", again[0].view("wte.weight"))


def test_a_head_that_is_tied_in_the_other_model(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", ["a", "b"]), made(tmp_path / "two", ["b", "c"])
    head = torch.randn(2, 3)
    stored = load_file(two.folder / "model.safetensors")
    save_file({**stored, "lm_head.weight": head}, two.folder / "model.safetensors")
    models = [one, open_model(str(two.folder))]
    joined = join({"source": "union"}, models)
    found = read(joined.view(1, "lm_head.weight", models[1].view("lm_head.weight")))
    assert torch.equal(found[1:], head)
    assert torch.equal(found[0], read(one.view(EMBEDDING))[0])


def test_which_tensors_have_a_row_for_each_token(tmp_path: Path) -> None:
    joined = join({"source": "union"}, three(tmp_path))
    config = {"vocab_size": 50}
    for name in (EMBEDDING, "transformer.wte.weight", "lm_head.weight", "gpt_neox.embed_in.weight", "embed_out.weight"):
        assert joined.is_vocabulary(name, (50, 3), config)
        assert joined.is_vocabulary(name, (50, 3), {"text_config": config})
        assert not joined.is_vocabulary(name, (49, 3), config)
    assert not joined.is_vocabulary("transformer.wpe.weight", (50, 3), config)
    assert not joined.is_vocabulary("model.layers.0.mlp.up_proj.weight", (50, 3), config)


def test_where_nothing_moves_the_view_is_the_model_s_own(tmp_path: Path) -> None:
    models = [made(tmp_path / name, ["a", "b"], ["<e>"]) for name in ("one", "two")]
    joined = join({"source": "base"}, models)
    own = models[1].view(EMBEDDING)
    assert joined.view(1, EMBEDDING, own) is own


def test_vocabularies_that_differ_are_refused_with_what_would_do(tmp_path: Path) -> None:
    one, same = made(tmp_path / "one", ["a", "b"], ["<e>"]), made(tmp_path / "same", ["a", "b"], ["<e>"])
    bare = make_folder(tmp_path / "bare", {EMBEDDING: torch.ones(3, 3)}, vocab_size=3)
    for settled in ([one], [one, same], [one, open_model(str(bare)), same]):
        assert same_vocabulary(settled) and join_vocabularies(None, settled, None) is None
        refuse_different(settled)
    differing = {
        r"'a' is 0 in .*one and 1 in .*order": made(tmp_path / "order", ["b", "a"], ["<e>"]),
        r"'<e>' is 2 in .*one and no token in .*other": made(tmp_path / "other", ["a", "b"], ["<f>"]),
        r".*one has 3 rows in its vocabulary, .*more 4": made(tmp_path / "more", ["a", "b"], ["<e>"], padding=1),
    }
    for said, other in differing.items():
        assert not same_vocabulary([one, other])
        with pytest.raises(ValueError, match=f"{said}; join them by token with `tokenizer: .source: union.`") as error:
            join_vocabularies(None, [one, same, other], None)
        assert "\n" not in str(error.value)
    bigger = open_model(str(make_folder(tmp_path / "big", {EMBEDDING: torch.ones(9, 3)}, vocab_size=9)))
    with pytest.raises(ValueError, match="big has no tokenizer files, and other rows than .*one"):
        join({"source": "union"}, [one, bigger])
    with pytest.raises(ValueError, match="big has no tokenizer files to begin with"):
        join({"source": "base"}, [bigger, one])
    (tmp_path / "same/tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="same: tokenizer.json is no tokenizer that is known here"):
        same_vocabulary([one, same])


@pytest.fixture
def both(
    tmp_path: Path,
    tiny_llama: Maker,
    byte_level_tokenizer: PreTrainedTokenizerFast,
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> list[Path]:
    """Two Llamas whose tokenizers differ in everything."""
    return [
        tiny_llama(tmp_path / "level", byte_level_tokenizer, seed=1, tie_word_embeddings=False),
        tiny_llama(tmp_path / "piece", sentencepiece_tokenizer, seed=2, tie_word_embeddings=False),
    ]


@pytest.mark.parametrize("root", [0, 1])
def test_the_joined_tokenizer_reads_as_the_root_s(tmp_path: Path, both: list[Path], root: int) -> None:
    models = [open_model(str(folder)) for folder in both]
    joined = join({"source": "union", "tokens": {"<|mine|>": {"model": None}}}, models, root)
    out = tmp_path / "out"
    out.mkdir()
    for stale in ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
        (out / stale).write_text("{}")
    joined.files(out)
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert (out / "generation_config.json").read_text() == (both[root] / "generation_config.json").read_text()
    loaded, own, other = (AutoTokenizer.from_pretrained(folder) for folder in (out, both[root], both[1 - root]))
    assert loaded.get_vocab() == joined.tokens and len(loaded) == joined.rows
    assert set(joined.tokens) == {*own.get_vocab(), *other.get_vocab(), "<|mine|>"}
    for text in TEXTS[:3] if root else TEXTS:
        assert loaded(text).input_ids == own(text).input_ids
    assert root == 0 or joined.tokens["["] in loaded(TEXTS[4]).input_ids  # a character that only the other one has
    assert loaded.eos_token_id == own.eos_token_id
    for token in ("<|mine|>", "<|endoftext|>", "</s>"):
        assert joined.tokens[token] in loaded(f"the {token} cat").input_ids
    assert all(isinstance(loaded.decode([number]), str) for number in joined.tokens.values())


@pytest.mark.parametrize("root", [0, 1])
def test_a_model_in_the_joined_vocabulary_says_what_it_said(tmp_path: Path, both: list[Path], root: int) -> None:
    models = [open_model(str(folder)) for folder in both]
    joined = join({"source": "union", "pad_to_multiple_of": 64}, models, root)
    own = models[root]
    tensors = {}
    for name in own.names:
        view = own.view(name)
        known = joined.is_vocabulary(name, view.shape, own.config)
        assert known == (name in (EMBEDDING, "lm_head.weight"))
        tensors[name] = read(joined.view(root, name, view) if known else view)
    out = tmp_path / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(joined.config(own.config)))
    joined.files(out)
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, both[root]))
    ids = AutoTokenizer.from_pretrained(out)(TEXTS[0], return_tensors="pt").input_ids
    logits, expected = model(ids).logits, before(ids).logits
    assert logits.shape[-1] == joined.rows == 64 * -(-len(joined.tokens) // 64)
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-6)


def test_files_of_one_model_are_taken_as_they_are(tmp_path: Path, both: list[Path]) -> None:
    (both[1] / "chat_template.jinja").write_text("{{ messages }}")
    (both[1] / "tokenizer.model").write_text("pieces")
    joined = join({"source": 1}, [open_model(str(folder)) for folder in both], 0)
    out = tmp_path / "out"
    shutil.copytree(both[0], out)
    joined.files(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"):
        assert (out / name).read_bytes() == (both[1] / name).read_bytes()
    assert (out / "model.safetensors").read_bytes() == (both[0] / "model.safetensors").read_bytes()


def test_other_kinds_of_tokenizers(tmp_path: Path) -> None:
    def write(folder: Path, model: Any, rows: int) -> Checkpoint:
        make_folder(folder, {EMBEDDING: torch.randn(rows, 3)}, vocab_size=rows)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>").save_pretrained(folder)
        return open_model(str(folder))

    other = made(tmp_path / "other", ["a", "zz", "é"], ["<e>"])
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5), ("z", -3.0)]
    unigram = write(tmp_path / "unigram", models.Unigram(pieces, unk_id=0, byte_fallback=False), 5)
    joined = join({"source": "union"}, [unigram, other])
    out = tmp_path / "out"
    out.mkdir()
    joined.files(out)
    loaded, own = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(unigram.folder)
    assert loaded.get_vocab() == joined.tokens == {**own.get_vocab(), "zz": 5, "é": 6, "<e>": 7}
    for text in ("abab", "azzb", "zzz"):
        assert loaded(text).input_ids == own(text).input_ids
    words = write(tmp_path / "words", models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"), 2)
    with pytest.raises(ValueError, match="words has a WordLevel tokenizer, which cannot take the tokens that others"):
        join({"source": "union"}, [words, other])
    assert join({"source": "base"}, [words, other]).tokens == {"<unk>": 0, "a": 1}
    assert join({"source": "union"}, [other, words]).tokens["<unk>"] == 4


def test_a_special_token_that_has_no_id_yet_gets_a_row(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", ["a", "b"], ["<e>"]), made(tmp_path / "two", ["b", "c"])
    settings = json.loads((one.folder / "tokenizer_config.json").read_text())
    (one.folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    joined = join({"source": "base"}, [one, two])
    assert joined.tokens == {"a": 0, "b": 1, "<e>": 2, "<pad>": 3} and joined.rows == 4
    assert torch.equal(embedding(joined, [one, two], 0)[3], torch.zeros(3))
    out = tmp_path / "out"
    out.mkdir()
    joined.files(out)
    assert AutoTokenizer.from_pretrained(out).pad_token_id == 3


def test_a_tokenizer_in_an_older_form(tmp_path: Path, byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    state = json.loads(byte_level_tokenizer.backend_tokenizer.to_str())["model"]
    rows = len(byte_level_tokenizer)
    old = make_folder(tmp_path / "old", {EMBEDDING: torch.ones(rows, 2)}, vocab_size=rows, model_type="gpt2")
    (old / "vocab.json").write_text(json.dumps(state["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in state["merges"]))
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    new = make_folder(tmp_path / "new", {EMBEDDING: torch.ones(rows, 2)}, vocab_size=rows)
    byte_level_tokenizer.save_pretrained(new)
    assert same_vocabulary([open_model(str(old)), open_model(str(new))])
    (old / "vocab.json").write_text("nothing")
    with pytest.raises(ValueError, match="old: its tokenizer cannot be read without tokenizer.json"):
        same_vocabulary([open_model(str(old)), open_model(str(new))])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs tokenizers of real models")
def test_tokenizers_of_real_models(tmp_path: Path) -> None:
    first, second, opened = "llama2", "gpt2", []
    for name in (first, second):
        folder = tmp_path / name
        size = len(AutoTokenizer.from_pretrained(REAL / name))
        make_folder(folder, {EMBEDDING: torch.randn(size, 2)}, vocab_size=size)
        for path in (REAL / name).iterdir():
            shutil.copyfile(path, folder / path.name)
        opened.append(open_model(str(folder)))
    assert not same_vocabulary(opened)
    joined = join({"source": "union"}, opened)
    out = tmp_path / "out"
    out.mkdir()
    joined.files(out)
    loaded, own, other = (AutoTokenizer.from_pretrained(folder) for folder in (out, REAL / first, REAL / second))
    assert loaded.get_vocab() == joined.tokens and set(joined.tokens) == {*own.get_vocab(), *other.get_vocab()}
    for text in (*TEXTS[:3], "def f(x):\n\treturn x ** 2\n"):
        assert loaded(text).input_ids == own(text).input_ids
    rows, theirs = embedding(joined, opened, 1), load_file(tmp_path / second / "model.safetensors")[EMBEDDING]
    for token, number in list(other.get_vocab().items())[::97]:
        assert torch.equal(rows[joined.tokens[token]], theirs[number])


def test_a_special_token_that_only_its_class_knows_gets_a_row(tmp_path: Path) -> None:
    """CodeLlama's `fill_token` stands in no list of the library's own kinds."""
    one, two = made(tmp_path / "one", ["a", "b"], ["<e>"]), made(tmp_path / "two", ["b", "c"])
    settings = json.loads((one.folder / "tokenizer_config.json").read_text())
    settings |= {"fill_token": "<fill>", "add_bos_token": True}
    (one.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert join({"source": "base"}, [one, two]).tokens == {"a": 0, "b": 1, "<e>": 2, "<fill>": 3}


def test_a_tokenizer_that_will_not_load_is_known_before_any_weight_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = made(tmp_path / "one", ["a", "b"], ["<e>"]), made(tmp_path / "two", ["b", "c"])
    loads = AutoTokenizer.from_pretrained

    def grown(*given: Any, **settings: Any) -> Any:
        loaded = loads(*given, **settings)
        loaded.add_tokens(["<of its own>"])
        return loaded

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", grown)
    with pytest.raises(ValueError, match="transformers gives '<of its own>' the id 4 in the place of None"):
        join({"source": "union"}, [one, two])


def test_a_changed_vocabulary_is_not_read_by_code_of_its_own(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", ["a", "b"], ["<e>"]), made(tmp_path / "two", ["b", "c"])
    settings = json.loads((one.folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (one.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    joined, out = join({"source": "union"}, [one, two]), tmp_path / "out"
    out.mkdir()
    joined.files(out)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == joined.tokens


@pytest.mark.parametrize("called", ["backbone.embeddings.weight", "transformer.tokens_embed.weight", "head.weight"])
def test_other_names_of_embeddings(tmp_path: Path, called: str) -> None:
    assert join({"source": "union"}, three(tmp_path)).is_vocabulary(called, (50, 3), {"vocab_size": 50})


def test_an_embedding_of_no_known_name_is_not_merged_row_by_row(tmp_path: Path) -> None:
    models = three(tmp_path)
    joined = join({"source": "union"}, models)
    with pytest.raises(ValueError, match=r"odd.weight of .*two is \(8, 3\), one as many as its vocabulary, and is no"):
        joined.refuse_unknown(1, "odd.weight", (8, 3))
    for bias in ((8,), (1, 8)):
        with pytest.raises(ValueError, match="odd.bias of .*two is"):
            joined.refuse_unknown(1, "odd.bias", bias)
    joined.refuse_unknown(1, "odd.weight", (7, 3))
    joined.refuse_unknown(1, "model.norm.weight", (8,))
    joined.refuse_unknown(1, "transformer.wpe.weight", (8, 3))
    alike = [made(tmp_path / name, ["a", "b"], ["<e>"]) for name in ("four", "five")]
    join({"source": "union"}, alike).refuse_unknown(1, "odd.weight", (3, 3))
