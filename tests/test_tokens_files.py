"""A tokenizer whose files disagree is refused by name: transformers would mend it with ids that the model never saw."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion import hub
from fusion.config import Model
from fusion.records import Sample
from fusion.tokens.bytes import byte_table
from fusion.tokens.files import check_files
from fusion.tokens.render import Renderer

Edit = Callable[[dict[str, Any]], object]


def token(content: str, special: bool = True, **more: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"content": content, **flags, **more}


def edited(folder: Path, source: Any, file: str, edit: Edit) -> Path:
    """The folder of a tokenizer with one of its JSON files changed, or made."""
    source.save_pretrained(folder)
    path = folder / file
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    edit(content)
    path.write_text(json.dumps(content))
    return folder


def decoder(**tokens: dict[str, Any]) -> Edit:
    return lambda config: config.update(added_tokens_decoder={i.strip("_"): t for i, t in tokens.items()})


DISAGREE: dict[str, tuple[str, Edit, str]] = {
    "an id that is taken": (
        "tokenizer.json",
        lambda file: file["added_tokens"].append(token("<x>", id=5)),
        "tokenizer.json gives token '<x>' the id 5, but it is loaded as 400",
    ),
    "an id beyond a gap": (
        "tokenizer.json",
        lambda file: file["added_tokens"].append(token("<x>", id=500)),
        "tokenizer.json gives token '<x>' the id 500, but it is loaded as 400",
    ),
    "another token at an id": (
        "tokenizer_config.json",
        decoder(_0=token("<|other|>")),
        "tokenizer_config.json gives token '<|other|>' the id 0, but it is loaded as 400",
    ),
    "a token that is special in one file only": (
        "tokenizer_config.json",
        decoder(_0=token("<|endoftext|>", special=False)),
        "disagree on whether '<|endoftext|>' (0) is special",
    ),
    "an old list of added tokens": (
        "added_tokens.json",
        lambda file: file.update({"<z>": 450}),
        "added_tokens.json gives token '<z>' the id 450, but it is loaded as 400",
    ),
    "an end token without id": (
        "tokenizer_config.json",
        lambda config: config.update(eos_token="<nope>"),
        "tokenizer_config.json names '<nope>' as eos_token, which has no id in tokenizer.json",
    ),
    "a map that names a token without id": (
        "special_tokens_map.json",
        lambda file: file.update(bos_token={"content": "<nope>"}),
        "special_tokens_map.json names '<nope>' as bos_token, which has no id in tokenizer.json",
    ),
    "one more special token without id": (
        "tokenizer_config.json",
        lambda config: config.update(extra_special_tokens=["<|tool|>"]),
        "tokenizer_config.json names '<|tool|>' as extra_special_tokens, which has no id in tokenizer.json",
    ),
    "two pieces of one id": (
        "tokenizer.json",
        lambda file: file["model"]["vocab"].update({"zzzz": 7}),
        "its vocabulary gives id 7 to both",
    ),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_files_that_disagree_are_refused(case: str, byte_level_tokenizer: Any, tmp_path: Path) -> None:
    file, edit, told = DISAGREE[case]
    loaded = AutoTokenizer.from_pretrained(edited(tmp_path, byte_level_tokenizer, file, edit))
    with pytest.raises(ValueError, match="^my-model: .*" + re.escape(told)) as error:
        Renderer(loaded, "my-model")
    assert "\n" not in str(error.value)


def test_files_that_agree_pass(byte_level_tokenizer: Any, sentencepiece_tokenizer: Any, tmp_path: Path) -> None:
    for source in (byte_level_tokenizer, sentencepiece_tokenizer):
        check_files(source, "as saved")
    grown = AutoTokenizer.from_pretrained(byte_level_tokenizer.name_or_path)
    grown.add_tokens(["<extra>"])
    grown.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    check_files(grown, "grown in memory")
    grown.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    check_files(again, "grown and saved")
    assert byte_table(again).digest == byte_table(grown).digest
    grown.name_or_path = ""
    check_files(grown, "from no folder")


@pytest.mark.parametrize("called", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("kind", ["olmo2", "starcoder2", "llama", "qwen2"])
def test_a_tokenizer_reads_as_its_file_says(tmp_path: Path, called: str, kind: str) -> None:
    """transformers 5 builds it anew by its class, which may cut words in another way and bring tokens of its own."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?[a-z]{1,2}|\d{1,3}|."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on 123 mats; the cats sat on 1234567 mats"] * 4, trainer)
    text, folder = "  the Cats sat on 1234567 mats", tmp_path / "model"
    expected = backend.encode(text).ids
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class=called)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = Model(str(folder), "a")
    for _ in range(2):
        loaded = hub.load_tokenizer(model, folder)
        assert loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected
        assert loaded.get_vocab() == backend.get_vocab() and loaded.eos_token == "<end>"
        assert loaded.decode(expected) == text and loaded.unk_token in (None, *backend.get_vocab())
        assert Renderer(loaded, "a").render(Sample("0" * 16, "d", text)).ids[1:-1].tolist() == expected
        settled = hub.settle_tokenizer(model, folder)  # a published one is what all others load, too
        assert settled == (AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) == expected)
        assert settled or kind == "qwen2"  # whose class transformers takes whatever is named


def test_a_class_may_know_a_token_that_no_file_names(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({**{c: n for n, c in enumerate("ab")}, "<|endoftext|>": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    loaded = hub.load_tokenizer(Model(str(tmp_path), "a"), tmp_path)
    assert loaded.eos_token_id == 2 and loaded.encode("ab") == [0, 1]


def test_a_tokenizer_in_a_sentencepiece_file_alone(tmp_path: Path) -> None:
    trained = io.BytesIO()
    texts = [f"the cat sat on {n} mats and the dog on {n + 1}" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    expected = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    loaded = hub.load_tokenizer(Model(str(tmp_path), "a"), tmp_path)
    for text in ("the cat sat", "dogs on 123 mats"):
        assert loaded.encode(text, add_special_tokens=False) == expected.encode(text)
