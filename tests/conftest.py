"""Shared by all tests: two tiny tokenizers that differ in everything, and small real models on disk."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fusion.tokens.render import Renderer

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")

END = "<|endoftext|>"
TEXTS = [
    "The cat sat on the mat, and the dog sat by the door. It was a day in the life of two of them.",
    "def add(one, two):\n    total = one + two\n    return total\n\n\nprint(add(1, 2))  # 3\n",
    "There are 48 clips in April and half as many in May: 48 / 2 = 24, so 48 + 24 = 72 altogether.",
    "Führer naïve café, fiancée's résumé; приве́т мир, 你好，世界。 日本語 🙂🙂 👩‍👩‍👧 e\u0301\u0301 नमस्ते",
    "user assistant system: [INST] the question [/INST] the answer is in the question, said the assistant.",
]

Maker = Callable[..., Path]


def _loaded(folder: Path, backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers gives it back from a folder, which is its `name_or_path`."""
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=256, clean_up_tokenization_spaces=False, **special
    ).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="session")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: no space put before the text, no start token, one control token at id 0."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return _loaded(tmp_path_factory.mktemp("byte-level"), backend, eos_token=END, pad_token=END)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """BPE with `▁` and byte fallback as Llama 2's: a space before the text; <unk> 0, <s> 1, </s> 2, bytes 3 to 258."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)]
    )
    lines = [line for text in TEXTS[:4] for line in text.split("\n")]  # TEXTS[4]: words that this one has not learned
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    learned = learner.get_vocab()
    controls = ["<unk>", "<s>", "</s>"]
    pieces = controls + [f"<0x{value:02X}>" for value in range(256)] + sorted(learned, key=lambda p: learned[p])
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = learner.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(controls)
    folder = tmp_path_factory.mktemp("sentencepiece")
    return _loaded(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@pytest.fixture(scope="session")
def level(byte_level_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    """The first as the house reads with it."""
    return Renderer(byte_level_tokenizer, "level")


@pytest.fixture(scope="session")
def piece(sentencepiece_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    """The second."""
    return Renderer(sentencepiece_tokenizer, "piece")


@pytest.fixture(scope="session")
def tiny_llama() -> Maker:
    """tiny_llama(folder, tokenizer, seed=0, **LlamaConfig settings): saves a Llama of width 32."""

    def make(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **settings: object) -> Path:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        chosen = {
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **shape,
            **ids,
        }
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**(chosen | settings))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_neox() -> Maker:
    """tiny_neox(folder, tokenizer, seed=0, **GPTNeoXConfig settings): saves a GPT-NeoX of width 24."""

    def make(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **settings: object) -> Path:
        shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        chosen = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **shape, **ids}
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(GPTNeoXConfig(**(chosen | settings))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make
