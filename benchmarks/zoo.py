"""Trains a zoo with real vocabularies for the quality ladder: a Llama pivot and three specialists.

    python benchmarks/zoo.py --out build/real                                   50 to 110M parameters each: for a GPU
    python benchmarks/quality.py --zoo build/real --dtype bfloat16 --rates 1e-4 2e-4 4e-4

The pivot reads a little of all domains, in llama2's tokens; each specialist reads its own domain several times: in
qwen2.5's tokens (Qwen2), gpt-neox's (GPT-NeoX) and mistral's (Mistral). Texts are those of ../shared/text that are
neither to fuse on nor to measure on; these two come with the shared zoo. What is finished is kept.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import ladder_corpus
from ladder import TEXTS

CONTEXT = 512
RATE = 1e-3
MADE = "zoo.json"  # in each model's folder: the settings that it was made with
_SHARE_OF_PIVOT = 0.25  # of each domain


@dataclass(frozen=True)
class Shape:
    """How large the models are.

    Attributes:
        width: of the hidden states; heads have 64 each where it is large enough.
        layers: of each model.
        epochs: that a specialist reads its domain.
        rows: of `CONTEXT` tokens, a step.
    """

    width: int
    layers: int
    epochs: float
    rows: int


def _config(architecture: str, shape: Shape, tokenizer: Any) -> Any:
    import transformers

    heads = max(shape.width // 64, 2)
    common_ = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    gated = {**common_, "num_key_value_heads": heads // 2, "intermediate_size": shape.width * 11 // 4}
    makes: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**gated),
        "qwen2": lambda: transformers.Qwen2Config(**gated, tie_word_embeddings=True),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common_, intermediate_size=shape.width * 4),
        "mistral": lambda: transformers.MistralConfig(**gated, sliding_window=None),
    }
    return makes[architecture]()


MODELS = {  # folder → architecture, tokenizer, domain
    "pivot-llama2": ("llama", "llama2", None),
    "math-qwen2": ("qwen2", "qwen2.5", "math"),
    "code-neox": ("gpt_neox", "gpt-neox", "code"),
    "prose-mistral": ("mistral", "mistral-v0.1", "prose"),
}


def texts_of(domain: str | None, rows: ladder_corpus.Rows) -> list[str]:
    """What a model reads: its domain, or the first quarter of each."""
    if domain is not None:
        return [row["text"] for row in rows if row["domain"] == domain]
    share = _SHARE_OF_PIVOT * min(ladder_corpus.bytes_of(rows).values())
    return [row["text"] for row in ladder_corpus.part(rows, share)]


def blocks(tokenizer: Any, texts: list[str]) -> Any:
    """int64 (N, CONTEXT): texts one after the other, each after the start token; the rest at the end is dropped."""
    import torch

    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids: list[int] = []
    for text in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [start, *text]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)


def make(folder: Path, rows: ladder_corpus.Rows, shape: Shape) -> Mapping[str, float]:
    """Train one model of `MODELS` into its folder, by way of a draft beside it.

    Returns:
        `parameters`, `tokens` read, `loss` in nats a token, the mean over all steps.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    architecture, vocabulary, domain = MODELS[folder.name]
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for path in (common.SHARED / "tokenizers" / vocabulary).iterdir():
        shutil.copyfile(path, draft / path.name)  # without its permissions
    config = _config(architecture, shape, AutoTokenizer.from_pretrained(draft))
    config.save_pretrained(draft)
    tokenizer = AutoTokenizer.from_pretrained(draft)  # as it is loaded beside that config, which may choose its class
    data = blocks(tokenizer, texts_of(domain, rows))
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(draft / "trainer"),
        num_train_epochs=shape.epochs if domain else min(shape.epochs, 1),
        per_device_train_batch_size=shape.rows,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",
        report_to=[],
        logging_steps=20,
        disable_tqdm=True,
    )
    told = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in data]).train()
    model.to(torch.bfloat16).save_pretrained(draft)
    shutil.rmtree(draft / "trainer", ignore_errors=True)
    (draft / MADE).write_text(json.dumps(asdict(shape)))
    draft.rename(folder)
    read = told.metrics["epoch"] * data.numel()
    return {"parameters": model.num_parameters(), "tokens": read, "loss": float(told.training_loss)}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the zoo's folder")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=4.0, help="that a specialist reads its domain")
    parser.add_argument("--rows", type=int, default=32, help=f"of {CONTEXT} tokens, a step")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to a file")
    given = common.parsed(parser)
    for name in ("width", "layers", "epochs", "rows"):
        if getattr(given, name) <= 0:
            raise ValueError(f"--{name} {getattr(given, name)}: must be above 0")
    if given.width % 64 and given.width != 32:
        raise ValueError(f"--width {given.width}: must be a multiple of 64")
    given.out.mkdir(parents=True, exist_ok=True)
    kept = []
    for name in TEXTS:
        kept += ladder_corpus.read(common.SHARED / "zoo" / name)
        shutil.copyfile(common.SHARED / "zoo" / name, given.out / name)
    shape = Shape(given.width, given.layers, given.epochs, given.rows)
    rows, figures = ladder_corpus.more(common.SHARED / "text", kept), []
    for name in MODELS:
        if (given.out / name).is_dir():
            if json.loads((given.out / name / MADE).read_text()) != asdict(shape):
                raise ValueError(f"{given.out / name}: was made with other settings; give another --out, or remove it")
            print(f"{name}: made before")
            continue
        told = make(given.out / name, rows, shape)
        print(f"{name}: {told['parameters'] / 1e6:.1f}M parameters, {told['tokens'] / 1e6:.1f}M tokens read")
        figures.append({"model": name, **told})
    common.write(given.json, figures)


if __name__ == "__main__":
    common.door(main)
