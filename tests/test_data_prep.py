"""The offline demo's corpus, tokenizers and models: repeatable, disjoint, exact, lossless."""

import ast
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import demo, demo_corpus, demo_models
from data_prep.demo_corpus import DOMAINS, PARTS, Piece, Sizes
from data_prep.demo_math import APPLY, WORLDS, make_problem, spin, word_problems
from data_prep.demo_models import CONTEXT, QUICK_RECIPES, RECIPES, Recipe
from data_prep.demo_tokenizers import KINDS, make_tokenizer

ODD_TEXTS = [
    "",
    "a",
    " a",
    "  two spaces,\n\n\tthen a tab \r\n",
    "def f(x):\n        return {'a': [1, 23, 4567]}\n",
    "héllo wörld, 日本語 😀👩‍👩‍👧",
    "<0x0A> is spelled, \n is meant",
    "don't  stop\x00\x7f",
]


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Piece]]:
    return demo_corpus.build_corpus(Sizes(pretrain=150_000, fuse=8_000, heldout=6_000, files=80), seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("demo") / "out"
    demo.make_demo(out, 0, QUICK_RECIPES, demo_corpus.QUICK, Console(quiet=True), workers=0)
    yield out


def texts_of(pieces: list[Piece], domain: str) -> list[str]:
    return [piece.text for piece in pieces if piece.domain == domain]


# Word problems


def test_word_problems_are_exact() -> None:
    for problem in islice(word_problems(0), 2000):
        lines = problem.text.split("\n")
        assert lines[0].startswith("Problem: ") and lines[1] == "Solution:" and 2 <= len(problem.steps) <= 4
        worked = [re.search(r", (\d+) ([-+*/]) (\d+) = (\d+) ", line) for line in lines[2:-1]]
        assert len(worked) == len(problem.steps)
        for match, step in zip(worked, problem.steps, strict=True):
            assert match is not None and match.groups() == (str(step.left), step.op, str(step.right), str(step.result))
            exact = {"+": step.left + step.right, "-": step.left - step.right, "*": step.left * step.right}
            if step.op == "/":
                assert step.right * step.result == step.left
            else:
                assert step.result == exact[step.op]
        assert lines[-1] == f"Answer: {problem.answer}" and problem.answer == problem.steps[-1].result > 0


def test_a_step_goes_on_from_the_one_before() -> None:
    for problem in islice(word_problems(1), 500):
        for before, step in zip(problem.steps, problem.steps[1:], strict=False):
            assert step.left == before.result or (step.right == before.result and step.left == before.left)


def test_every_number_of_a_solution_comes_from_the_story() -> None:
    for problem in islice(word_problems(2), 500):
        told = set(map(int, re.findall(r"\d+", problem.text.split("\n")[0])))
        known = told | {step.result for step in problem.steps}
        assert all(step.left in known and step.right in known for step in problem.steps)


def test_word_problems_repeat_by_seed_and_never_within_one() -> None:
    first = [problem.text for problem in islice(word_problems(5), 1500)]
    assert first == [problem.text for problem in islice(word_problems(5), 1500)]
    assert len(set(first)) == 1500
    assert set(first).isdisjoint(problem.text for problem in islice(word_problems(6), 1500))


def test_every_template_can_be_filled() -> None:
    fields: dict[str, object] = dict.fromkeys(
        ("name", "he", "his", "other", "thing", "thing1", "n", "k", "day", "compare"), "x"
    )
    random = Random(0)
    for world in WORLDS:
        assert set(world.change) == set(APPLY)
        every = [*world.opening, *world.product, *world.question, *world.rival, *world.together]
        for template in every + [each for templates in world.change.values() for each in templates]:
            assert not set(spin(template, random, fields)) & set("(){}|")


def test_a_problem_depends_on_nothing_but_the_generator() -> None:
    assert make_problem(Random("a")) == make_problem(Random("a")) != make_problem(Random("b"))


# Corpus


def test_corpus_is_the_same_every_time(parts: dict[str, list[Piece]], tmp_path: Path) -> None:
    again = demo_corpus.build_corpus(Sizes(pretrain=150_000, fuse=8_000, heldout=6_000, files=80), seed=0)
    assert again == parts
    for part in PARTS:
        demo_corpus.write_part(tmp_path / "part.jsonl", parts[part])
        rows = [json.loads(line) for line in (tmp_path / "part.jsonl").read_text("utf-8").split("\n")[:-1]]
        assert rows == [{"text": piece.text, "domain": piece.domain} for piece in parts[part]]
        read = demo_corpus.read_part(tmp_path / "part.jsonl")
        assert read == {domain: texts_of(parts[part], domain) for domain in DOMAINS}


def test_parts_are_disjoint_by_origin_and_by_text(parts: dict[str, list[Piece]]) -> None:
    assert set(parts) == set(PARTS)
    for first, second in (("pretrain", "fuse"), ("pretrain", "heldout"), ("fuse", "heldout")):
        assert {piece.origin for piece in parts[first]}.isdisjoint(piece.origin for piece in parts[second])
        assert {piece.text for piece in parts[first]}.isdisjoint(piece.text for piece in parts[second])
    assert all(demo_corpus.part_of(piece.origin) == part for part in PARTS for piece in parts[part])


def test_parts_have_their_sizes_and_pieces_theirs(parts: dict[str, list[Piece]]) -> None:
    for domain in DOMAINS:
        for part, wanted in (("fuse", 8_000), ("heldout", 6_000)):
            size = sum(len(text.encode()) for text in texts_of(parts[part], domain))
            assert wanted <= size <= wanted + 1.1 * demo_corpus.LONGEST
    lengths = [len(piece.text) for pieces in parts.values() for piece in pieces]
    assert max(lengths) <= demo_corpus.LONGEST + 100 and min(lengths) > 100


def test_heldout_lines_stand_nowhere_else(parts: dict[str, list[Piece]]) -> None:
    others = "\n".join(piece.text for part in ("pretrain", "fuse") for piece in parts[part] if piece.domain != "math")
    lines = {line.strip() for line in others.split("\n")}
    for piece in parts["heldout"]:
        if piece.domain != "math":
            shared = [line for line in piece.text.split("\n") if len(line.strip()) >= 25 and line.strip() in lines]
            assert sum(map(len, shared)) <= 0.3 * len(piece.text)


def test_no_docstring_paragraph_is_in_the_code(parts: dict[str, list[Piece]]) -> None:
    code = "\n".join(text for part in PARTS for text in texts_of(parts[part], "code"))
    for part in PARTS:
        for text in texts_of(parts[part], "prose"):
            assert not any(len(paragraph) > 80 and paragraph in code for paragraph in text.split("\n\n"))


def test_docstrings_are_cut_and_the_rest_runs_the_same() -> None:
    source = '"""Módule."""\nimport os; X = 1\nclass A:\n    """Only."""\n\n    def f(self): "é"; return 2\n\n\n'
    source += 'def g():\n    """Long\n    one."""  # note\n    return "kept"\n\ndef h():\n    "only"\n'
    stripped = demo_corpus.without_docstrings(source, ast.parse(source))
    assert not any(word in stripped for word in ("Módule", "Only", "é", "Long", "one."))
    space: dict[str, object] = {}
    exec(stripped, space)
    assert space["X"] == 1 and space["A"]().f() == 2 and space["g"]() == "kept" and space["h"]() is None  # type: ignore
    whole = 'class B:\n    """Alone."""\n'
    assert demo_corpus.without_docstrings(whole, ast.parse(whole)) == "class B:\n    pass\n"


def test_a_python_without_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        demo_corpus.build_corpus(demo_corpus.QUICK, 0, root=tmp_path)


# Tokenizers


@pytest.fixture(scope="module")
def learned(parts: dict[str, list[Piece]]) -> list[str]:
    return [piece.text for piece in parts["pretrain"]][::4]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_are_lossless_and_repeatable(kind: str, learned: list[str], parts: dict[str, list[Piece]]) -> None:
    tokenizer = make_tokenizer(kind, learned, 900, CONTEXT)
    assert 800 <= len(tokenizer) <= 900
    for text in ODD_TEXTS + [piece.text for piece in parts["heldout"]]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    again = make_tokenizer(kind, learned, 900, CONTEXT)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizers_differ_as_they_should(learned: list[str]) -> None:
    four = {kind: make_tokenizer(kind, learned, 900, CONTEXT) for kind in KINDS}
    pieces = {kind: each.convert_ids_to_tokens(each("123 ab\n")["input_ids"]) for kind, each in four.items()}
    words = {kind: four[kind].backend_tokenizer.pre_tokenizer for kind in ("qwen2", "gpt_neox")}
    assert {kind: len(each.pre_tokenize_str("123")) for kind, each in words.items()} == {"qwen2": 3, "gpt_neox": 1}
    assert pieces["llama"][0] == pieces["mistral"][0] == "<s>"
    assert pieces["llama"][-1] == pieces["mistral"][-1] == "<0x0A>"
    for kind, each in four.items():
        assert (each.bos_token_id is None) == (kind in ("qwen2", "gpt_neox"))
        assert each.eos_token_id is not None
    emoji = four["mistral"]("😀", add_special_tokens=False)["input_ids"]
    assert four["mistral"].convert_ids_to_tokens(emoji)[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    with pytest.raises(ValueError, match="'word2vec'"):
        make_tokenizer("word2vec", learned, 900, CONTEXT)


def test_documents_stand_between_their_marks(learned: list[str]) -> None:
    for kind in ("llama", "qwen2"):
        tokenizer = make_tokenizer(kind, learned, 700, CONTEXT)
        one = tokenizer("one two", add_special_tokens=False)["input_ids"]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        row = [*bos, *one, tokenizer.eos_token_id]
        expected = [*row, *row, *row] if bos else [tokenizer.eos_token_id, *row, *row, *row]
        stream = demo_models.token_stream(tokenizer, iter(["one two"] * 64), len(expected))
        assert stream.tolist() == expected


def test_reading_follows_the_mixture_and_repeats_nothing_early() -> None:
    random = Random(0)
    texts = {"math": [f"{i:04}" for i in range(400)], "code": [f"{i:08}" for i in range(400)], "prose": []}
    order = demo_models.reading_order(texts, {"math": 0.5, "code": 0.5, "prose": 0.0}, random)
    read = list(islice(order, 450))
    assert len(set(read)) == 450  # 300 short and 150 long ones: equal shares of bytes
    assert 265 <= sum(len(text) == 4 for text in read) <= 335


# Models


def test_orthogonal_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        update = demo_models.orthogonal(torch.randn(shape), iterations=5)
        values = torch.linalg.svdvals(update)
        assert update.shape == shape and values.max() < 1.3 and values.median() > 0.6


def test_rate_warms_up_and_falls() -> None:
    rates = [demo_models.rate(step, 100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.002)


def test_bits_per_byte_of_a_uniform_model(learned: list[str]) -> None:
    recipe = replace(QUICK_RECIPES[0], vocabulary=700)
    tokenizer = make_tokenizer(recipe.kind, learned, recipe.vocabulary, CONTEXT)
    model = demo_models.build_model(recipe, tokenizer).eval()  # its head is zero: every id has the same probability
    texts = ["é" * 900, "a short one"]
    tokens = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
    assert tokens > CONTEXT  # more than one window
    bits = demo_models.bits_per_byte(model, tokenizer, texts)
    expected = tokens * torch.log2(torch.tensor(float(len(tokenizer)))).item() / (1800 + 11)
    assert bits == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least one text"):
        demo_models.bits_per_byte(model, tokenizer, [])


def test_recipes_name_four_architectures_and_the_pivot() -> None:
    for recipes in (RECIPES, QUICK_RECIPES):
        assert {recipe.name for recipe in recipes} == {"math", "code", "prose", "pivot"}
        assert {recipe.kind for recipe in recipes} == set(KINDS)
        assert all(sum(recipe.mixture.values()) == pytest.approx(1) for recipe in recipes)


def test_quick_demo_makes_four_models_that_load(made: Path) -> None:
    table = json.loads((made / "models.json").read_text())
    assert [row["name"] for row in table["models"]] == ["pivot", *DOMAINS]
    heldout = demo_corpus.read_part(made / "corpus" / "heldout.jsonl")
    recipes = {recipe.name: recipe for recipe in QUICK_RECIPES}
    for row in table["models"]:
        recipe = recipes[row["name"]]
        folder = made / "models" / row["name"]
        assert (folder / "model.safetensors").is_file() and (folder / demo.MADE).is_file()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == recipe.kind and model.config.vocab_size == len(tokenizer)
        assert model.config.max_position_embeddings >= 512
        for text in ODD_TEXTS:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        bits = demo_models.bits_per_byte(model, tokenizer, heldout["code"])
        assert bits == pytest.approx(row["bits_per_byte"]["code"], rel=1e-5) and bits < 8


def test_training_learns(made: Path) -> None:
    corpus = demo_corpus.read_part(made / "corpus" / "pretrain.jsonl")
    losses: list[float] = []
    recipe: Recipe = replace(QUICK_RECIPES[0], steps=12)
    demo_models.make_model(recipe, corpus, 0, made / "again", lambda step, loss: losses.append(loss))
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5


def weights_of(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted((out / "models").glob("*/model.safetensors"))}


def test_a_second_run_keeps_what_is_made_and_remakes_what_is_not(made: Path) -> None:
    before, stamps = weights_of(made), {p: p.stat().st_mtime_ns for p in made.rglob("*.safetensors")}
    record = made / "models" / "pivot" / demo.MADE
    record.write_text(record.read_text().replace('"seed": 0', '"seed": 1'))
    demo.make_demo(made, 0, QUICK_RECIPES, demo_corpus.QUICK, Console(quiet=True), workers=0)
    changed = {p.parent.name for p in stamps if p.stat().st_mtime_ns != stamps[p] and p.parent.parent.name == "models"}
    assert changed == {"pivot"}
    assert weights_of(made) == before  # and made again from the same settings it is the same to the byte
    assert not [path for path in made.rglob("*") if path.name.startswith(".")]


def test_command_line_names_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert demo.main(["--quick", "--out", str(tmp_path / "file" / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "file" in shown and shown.count("\n") == 1
