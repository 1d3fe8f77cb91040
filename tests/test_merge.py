"""The merge room: methods against naive references, checkpoints through transformers, each refusal's line."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fusion.merge import checkpoint, engine
from fusion.merge.checkpoint import CheckpointReader, CheckpointWriter
from fusion.merge.engine import TensorReport, merge, plan
from fusion.merge.methods import METHODS, get_method
from fusion.merge.methods.base import BLOCK, largest, mean_squares
from fusion.merge.recipe import MergeRecipe, load_recipe, resolve_model

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = ("paper", "fuseai", "mergekit")


def make_tensors(
    models: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A base and some models near it; some elements agree, some have not moved."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tensors = [base] + [base + 1e-3 * torch.randn(shape, generator=generator) for _ in range(models)]
    for tensor in tensors[1:]:
        tensor.view(-1)[::7] = base.view(-1)[::7]  # nobody moved
        tensor.view(-1)[1::7] = base.view(-1)[1::7] + 1e-3  # all agree
    for tensor in tensors[1:2]:
        tensor.view(-1)[2::7] = base.view(-1)[2::7]  # one did not move
    return [tensor.to(dtype) for tensor in tensors]


def naive_sce(base: Tensor, models: list[Tensor], tau: float, definition: str) -> tuple[Tensor, list[float]]:
    """DESIGN.md's words, element by element, in Python's numbers."""
    origin = base.double().flatten().tolist()
    deltas = [[m - o for m, o in zip(model.double().flatten().tolist(), origin, strict=True)] for model in models]
    count, size = len(models), len(origin)
    columns = [[Fraction(deltas[k][i]) for k in range(count)] for i in range(size)]
    means = [sum(column) / count for column in columns]
    # In fractions, so that what ties in truth ties here.
    variances = [sum((d - mean) ** 2 for d in column) for column, mean in zip(columns, means, strict=True)]
    selected = set(range(size))
    if tau < 1:
        wanted = int(tau * sum(variance > 0 for variance in variances))
        selected = set(sorted(range(size), key=lambda i: (-variances[i], i))[:wanted])
    filtered = [[value if i in selected else 0.0 for i, value in enumerate(delta)] for delta in deltas]
    energies = [sum(value**2 for value in delta) for delta in filtered]
    weights = [energy / sum(energies) if sum(energies) else 1 / count for energy in energies]
    used = deltas if definition == "fuseai" else filtered
    merged = []
    for i in range(size):
        sign = 1 if sum(used[k][i] for k in range(count)) >= 0 else -1
        alive = [k for k in range(count) if used[k][i] * sign > 0]
        update = sum(weights[k] * used[k][i] for k in alive)
        if definition != "paper" and sum(weights[k] for k in alive) > 0:
            update /= sum(weights[k] for k in alive)
        merged.append(origin[i] + update)
    return torch.tensor(merged, dtype=torch.float64).view(base.shape), weights


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("tau", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sce_equals_the_naive_reference(definition: str, tau: float, dtype: torch.dtype) -> None:
    base, *models = make_tensors(3, (13, 29), dtype=dtype)
    expected, weights = naive_sce(base, models, tau, definition)
    merged = get_method("sce").merge(base, models, tau=tau, definition=definition)
    assert merged.tensor.dtype is torch.float32 and merged.tensor.shape == base.shape
    torch.testing.assert_close(merged.tensor.double(), expected, rtol=1e-7, atol=0)
    assert merged.weights == pytest.approx(weights, rel=1e-12)


def test_sce_by_hand() -> None:
    """Variances 4, 9, 0.25, 0 and 1: τ = 0.5 selects int(0.5 × 4) = 2, the second and the first."""
    base = torch.zeros(5)
    models = [torch.tensor([1.0, 4.0, 0.5, 2.0, 0.0]), torch.tensor([-3.0, -2.0, 1.5, 2.0, 2.0])]
    # Selected energies 1 + 16 = 17 and 9 + 4 = 13; signs of the sums: −, +.
    a, b = 17 / 30, 13 / 30
    run = get_method("sce").merge
    paper = run(base, models, tau=0.5, definition="paper")
    assert paper.weights == pytest.approx([a, b])
    torch.testing.assert_close(paper.tensor, torch.tensor([-3 * b, 4 * a, 0, 0, 0]))
    torch.testing.assert_close(
        run(base, models, tau=0.5, definition="mergekit").tensor, torch.tensor([-3.0, 4.0, 0, 0, 0])
    )
    # All deltas count here; the last element of the first model, 0, has no sign and takes no part.
    torch.testing.assert_close(
        run(base, models, tau=0.5, definition="fuseai").tensor,
        torch.tensor([-3.0, 4.0, 0.5 * a + 1.5 * b, 2.0, 2.0]),
    )


def test_sce_sums_of_zero_count_as_plus_and_ties_go_to_the_first() -> None:
    models = [torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0, -1.0])]
    merged = get_method("sce").merge(torch.zeros(4), models, tau=0.75)
    assert merged.weights == [0.5, 0.5]
    assert merged.tensor.tolist() == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_sce_of_equals(definition: str) -> None:
    base, model = make_tensors(1, (11, 17))
    run = get_method("sce").merge
    assert torch.equal(run(base, [model] * 3, tau=1.0, definition=definition).tensor, model)
    alone = run(base, [model], tau=0.1, definition=definition)
    assert torch.equal(alone.tensor, model) and alone.weights == [1.0]
    # Equal models do not vary: the filter leaves nothing, and only `fuseai` merges what it did not select.
    same = run(base, [model] * 3, tau=0.5, definition=definition)
    assert torch.equal(same.tensor, model if definition == "fuseai" else base)
    assert same.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_sce_without_updates_is_the_base(definition: str, tau: float) -> None:
    base = make_tensors(0, (8, 9))[0]
    merged = get_method("sce").merge(base, [base, base], tau=tau, definition=definition)
    assert torch.equal(merged.tensor, base) and merged.weights == [0.5, 0.5]


def test_sce_weights_do_not_depend_on_the_size_of_the_updates() -> None:
    """Updates of 1e-25 are still updates: mergekit's threshold would make their weights uniform."""
    deltas = [torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 0.0, 1.0])]
    run = get_method("sce").merge
    large = run(torch.zeros(3), deltas, tau=0.7, definition="mergekit")
    small = run(torch.zeros(3), [1e-25 * delta for delta in deltas], tau=0.7, definition="mergekit")
    assert large.weights == pytest.approx([13 / 14, 1 / 14]) and small.weights == pytest.approx(large.weights)
    torch.testing.assert_close(small.tensor, 1e-25 * large.tensor, rtol=1e-6, atol=0)


def test_linear_and_task_arithmetic_equal_float64() -> None:
    base, *models = make_tensors(3, (7, 31))
    weights = [0.5, 2.0, -0.75]
    wide = torch.stack(models).double()
    factors = torch.tensor(weights, dtype=torch.float64)[:, None, None]

    linear = METHODS["linear"].merge
    torch.testing.assert_close(linear(None, models).tensor, wide.mean(0).float(), rtol=0, atol=0)
    assert linear(None, models).weights == pytest.approx([1 / 3] * 3)
    merged = linear(None, models, weights=weights)
    torch.testing.assert_close(merged.tensor, ((factors * wide).sum(0) / 1.75).float(), rtol=2e-7, atol=0)
    assert merged.weights == pytest.approx([weight / 1.75 for weight in weights])
    merged = linear(None, models, weights=weights, normalize=False)
    torch.testing.assert_close(merged.tensor, (factors * wide).sum(0).float(), rtol=2e-7, atol=0)
    assert torch.equal(linear(None, [models[0]] * 3).tensor, models[0])

    arithmetic = METHODS["task_arithmetic"].merge
    moved = (factors * (wide - base.double())).sum(0)
    merged = arithmetic(base, models, weights=weights, scale=0.5)
    torch.testing.assert_close(merged.tensor, (base.double() + 0.5 * moved).float(), rtol=2e-7, atol=0)
    assert merged.weights == [0.25, 1.0, -0.375]
    merged = arithmetic(base, models, weights=weights, normalize=True)
    torch.testing.assert_close(merged.tensor, (base.double() + moved / 1.75).float(), rtol=2e-7, atol=0)
    assert arithmetic(base, models).weights == [1.0, 1.0, 1.0]
    assert torch.equal(arithmetic(base, [models[0]]).tensor, models[0])
    assert torch.equal(arithmetic(base, [base, base]).tensor, base)


@pytest.mark.parametrize("name", METHODS)
def test_blocks_join_and_odd_shapes_pass(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base, a, b = (torch.randn(BLOCK + 5, generator=generator) for _ in range(3))
    whole = METHODS[name].merge(base, [a, b])
    if name == "sce":
        spread = (a.double() - b.double()).abs()
        chosen = spread >= spread.topk(int(0.1 * spread.numel())).values.min()
        assert torch.equal(whole.tensor[~chosen], base[~chosen])
        assert bool((whole.tensor[chosen] != base[chosen]).all())
    else:
        factors = torch.tensor(whole.weights, dtype=torch.float64)[:, None]
        start = base.double() if name == "task_arithmetic" else torch.zeros(BLOCK + 5, dtype=torch.float64)
        expected = start + (factors * (torch.stack([a, b]).double() - start)).sum(0)
        torch.testing.assert_close(whole.tensor, expected.float(), rtol=1e-6, atol=1e-7)
    for shape in [(), (1,), (0, 3)]:
        assert METHODS[name].merge(torch.ones(shape), [torch.ones(shape)] * 2).tensor.shape == shape


def test_largest_equals_a_stable_sort() -> None:
    values = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(2)).float() / 7
    order = sorted(range(2000), key=lambda i: (-values[i].item(), i))
    for count in (0, 1, 777, 2000):
        assert largest(values, count).nonzero().squeeze(1).tolist() == sorted(order[:count])


def test_mean_squares() -> None:
    base = torch.tensor([1.0, 2.0])
    assert mean_squares(base, [torch.tensor([2.0, 5.0]), base]) == [5.0, 0.0]


@pytest.mark.parametrize(
    ("method", "parameters", "line"),
    [
        ("sce", {"topk": 0.1}, "sce: unknown parameter topk = 0.1; it takes tau, definition"),
        ("sce", {"tau": 0}, "sce: tau = 0 must be a number in (0, 1]"),
        ("sce", {"tau": 1.5}, "sce: tau = 1.5 must be a number in (0, 1]"),
        ("sce", {"tau": "0.1"}, "sce: tau = '0.1' must be a number in (0, 1]"),
        ("sce", {"tau": True}, "sce: tau = True must be a number in (0, 1]"),
        ("sce", {"tau": float("nan")}, "sce: tau = nan must be a number in (0, 1]"),
        ("sce", {"definition": "best"}, "sce: definition = 'best' must be one of paper, fuseai, mergekit"),
        ("linear", {"normalize": 1}, "linear: normalize = 1 must be true or false"),
        ("linear", {"weights": 0.5}, "linear: weights = 0.5 must be a list, each a finite number"),
        ("linear", {"weights": [1, "x"]}, "linear: weights = [1, 'x'] must be a list, each a finite number"),
        (
            "linear",
            {"weights": [1.0]},
            "linear: weights = [1.0] has 1 numbers for 2 models; give one for each",
        ),
        ("linear", {"weights": [1, -1]}, "linear: weights = [1.0, -1.0] sum to 0 and cannot be normalized"),
        ("task_arithmetic", {"scale": float("inf")}, "task_arithmetic: scale = inf must be a finite number"),
        ("ties", {}, "unknown merge method 'ties'; known are linear, sce, task_arithmetic"),
    ],
)
def test_parameters_are_refused_by_name(method: str, parameters: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        plan(MergeRecipe(method, "nowhere", ("nowhere", "nowhere"), parameters))


def make_folder(folder: Path, tensors: dict[str, Tensor], shards: int = 1, **config: object) -> Path:
    """A checkpoint folder without a model behind it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_toys(tmp_path: Path, count: int = 3, shards: int = 1) -> list[str]:
    """Folders of three tensors each: a base and models."""
    shapes = {"a.weight": (6, 4), "b.0.weight": (5,), "b.1.weight": (3, 3)}
    names = ["base", *(f"model-{number}" for number in range(1, count))]
    made = {name: make_tensors(count - 1, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return [
        str(make_folder(tmp_path / name, {key: made[key][k].contiguous() for key in made}, shards))
        for k, name in enumerate(names)
    ]


def read(folder: str | Path) -> dict[str, Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names}


def test_reader_single_equals_sharded(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    single, sharded = make_toys(tmp_path / "1"), make_toys(tmp_path / "2", shards=2)
    with CheckpointReader(single[1]) as one, CheckpointReader(sharded[1]) as two:
        assert one.names == two.names == ("a.weight", "b.0.weight", "b.1.weight")
        assert two.shape("a.weight") == (6, 4) and two.dtype("a.weight") is torch.float32
        assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)
    merge(MergeRecipe("sce", single[0], tuple(single[1:]), {"tau": 0.5}), tmp_path / "out1")
    recipe = MergeRecipe("sce", sharded[0], tuple(sharded[1:]), {"tau": 0.5})
    merge(recipe, tmp_path / "out2", max_shard_bytes=100)
    merge(recipe, tmp_path / "out3", max_shard_bytes=100)
    assert sorted(os.listdir(tmp_path / "out1")) == ["config.json", "model.safetensors"]
    files = sorted(os.listdir(tmp_path / "out2"))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert files == ["config.json", *shards, "model.safetensors.index.json"]
    first, second = read(tmp_path / "out1"), read(tmp_path / "out2")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all((tmp_path / "out2" / file).read_bytes() == (tmp_path / "out3" / file).read_bytes() for file in files)
    index = json.loads((tmp_path / "out2" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (24 + 5 + 9) and set(index["weight_map"]) == set(first)


def test_writer_carries_over_what_is_neither_weights_nor_code(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", {"w": torch.ones(2)}, torch_dtype="float32")
    kept = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
    ]
    left = ["pytorch_model.bin", "modeling_toy.py", "x.pkl", "manifest.json", "README.md", ".gitattributes"]
    left += ["other.safetensors", "pytorch_model.bin.index.json", "optimizer.pt"]
    for name in kept + left:
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    writer = CheckpointWriter(tmp_path / "out")
    writer.add("w", torch.ones(2, dtype=torch.bfloat16))
    files = writer.finish(copy_from=source)
    expected = sorted([*kept, "config.json", "model.safetensors", "additional_chat_templates/rag.jinja"])
    assert files == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype is torch.bfloat16
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def make_llama(folder: Path, seed: int, **changes: Any) -> Path:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(
        **{**shape, "num_key_value_heads": 1, "vocab_size": 40, "tie_word_embeddings": True, **changes}
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_llama_comes_back_through_transformers(tmp_path: Path) -> None:
    base, a, b = (str(make_llama(tmp_path / name, seed)) for seed, name in enumerate(["base", "a", "b"]))
    # One target saved its head although it is the embedding: it stays tied, the copy is dropped.
    again = load_file(Path(b) / "model.safetensors")
    assert "lm_head.weight" not in again
    again["lm_head.weight"] = again["model.embed_tokens.weight"].clone()
    save_file(again, Path(b) / "model.safetensors", metadata={"format": "pt"})

    for dtype in ("float32", None):
        recipe = MergeRecipe("sce", base, (a, b), {"tau": 0.3, "definition": "fuseai"}, dtype)
        reported: list[TensorReport] = []
        out = tmp_path / str(dtype)
        reports = merge(recipe, out, on_tensor=reported.append)
        written = torch.float32 if dtype else torch.bfloat16
        assert json.loads((out / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")
        fused = AutoModelForCausalLM.from_pretrained(out)
        assert fused.dtype is written
        assert fused.lm_head.weight.data_ptr() == fused.model.embed_tokens.weight.data_ptr()
        start, one, two, result = read(base), read(a), read(b), fused.state_dict()
        assert "lm_head.weight" not in read(out) and reported == reports
        assert [report.name for report in reports] == sorted(start)
        for report in reports:
            key = report.name
            expected, weights = naive_sce(start[key], [one[key], two[key]], 0.3, "fuseai")
            assert torch.equal(result[key], expected.float().to(written))
            assert report.coefficients == pytest.approx(weights) and report.numel == start[key].numel()
            updates = [(other[key].double() - start[key].double()).square().mean().item() for other in (one, two)]
            assert report.updates == pytest.approx(updates)


def test_untied_heads_and_other_vocabularies_are_refused(tmp_path: Path) -> None:
    base, other = (
        make_llama(tmp_path / "base", 0),
        make_llama(tmp_path / "untied", 1, tie_word_embeddings=False),
    )
    with pytest.raises(
        ValueError, match=r"untied has lm_head.weight, which .*base has not and which is no copy of the"
    ):
        plan(MergeRecipe("linear", str(base), (str(other),)))
    with pytest.raises(ValueError, match=r"base has no lm_head.weight, which .*untied has; merge models of one"):
        plan(MergeRecipe("linear", str(other), (str(base),)))
    wide = make_llama(tmp_path / "wide", 2, vocab_size=41)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight has 40 rows in .*base and 41 in .*wide: the vocabularies"
    ):
        plan(MergeRecipe("linear", str(base), (str(wide),)))
    deep = make_llama(tmp_path / "deep", 3, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"base has no model.layers.2.input_layernorm.weight and 8 more, which .*deep"):
        plan(MergeRecipe("linear", str(deep), (str(base),)))
    fat = make_llama(tmp_path / "fat", 4, intermediate_size=32)
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \(16, 24\) in .*base and \(16, 32\) in .*fat"):
        plan(MergeRecipe("linear", str(base), (str(fat),)))


def test_plan_counts_bytes(tmp_path: Path) -> None:
    base, *models = make_toys(tmp_path)
    planned = plan(MergeRecipe("sce", base, tuple(models), dtype="bfloat16"))
    numel = 24 + 5 + 9
    assert [tensor.name for tensor in planned.tensors] == ["a.weight", "b.0.weight", "b.1.weight"]
    assert planned.bytes_to_read == 3 * 4 * numel and planned.bytes_to_write == 2 * numel
    # The largest tensor: three inputs, the result, spread and mask; and all that is written, as one shard.
    assert planned.peak_memory_bytes == 24 * (3 * 4 + 4 + 5) + 2 * numel


def test_integers_are_copied_where_they_are_the_same(tmp_path: Path) -> None:
    tensors = {"steps": torch.tensor([3, 4]), "w": torch.ones(2)}
    base = str(make_folder(tmp_path / "base", tensors))
    same = str(make_folder(tmp_path / "same", {**tensors, "w": torch.zeros(2)}))
    reports = merge(MergeRecipe("linear", None, (base, same)), tmp_path / "out")
    assert [(report.name, report.coefficients, report.updates) for report in reports] == [
        ("steps", (), ()),
        ("w", (0.5, 0.5), ()),
    ]
    out = read(tmp_path / "out")
    assert out["steps"].tolist() == [3, 4] and out["w"].tolist() == [0.5, 0.5]
    other = str(make_folder(tmp_path / "other", {**tensors, "steps": torch.tensor([3, 5])}))
    with pytest.raises(ValueError, match=r"steps \(torch.int64\) differs between .*base and .*other; only floating"):
        plan(MergeRecipe("linear", None, (base, other)))
    packed = str(make_folder(tmp_path / "packed", {**tensors, "w": torch.ones(2).to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"w of .*packed is torch.float8_e4m3fn; weights must be float32, bfloat16"):
        plan(MergeRecipe("linear", None, (base, packed)))


def test_broken_weights_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    base = str(make_folder(tmp_path / "base", {"a": torch.ones(2), "w": torch.full((2,), 60000.0)}))
    broken = str(make_folder(tmp_path / "broken", {"a": torch.ones(2), "w": torch.tensor([1.0, float("nan")])}))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"w of .*broken holds a weight that is not finite"):
        merge(MergeRecipe("linear", base, (base, broken)), tmp_path / "out")
    doubled = MergeRecipe("linear", base, (base, base), {"weights": [1, 1], "normalize": False}, "float16")
    with pytest.raises(ValueError, match=r"w: the merged weights do not fit float16; set dtype: float32"):
        merge(doubled, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_and_an_interrupt_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = make_toys(tmp_path)
    recipe = MergeRecipe("linear", base, tuple(models))
    before = sorted(os.listdir(tmp_path))

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left") as caught:
            merge(recipe, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and sorted(os.listdir(tmp_path)) == before
    with monkeypatch.context() as patched:
        patched.setattr(engine.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        with pytest.raises(OSError, match="152 bytes needed"):
            merge(recipe, tmp_path / "out")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", on_tensor=interrupt)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_output_folder_must_be_new_or_empty(tmp_path: Path) -> None:
    base, *models = make_toys(tmp_path)
    recipe = MergeRecipe("linear", base, tuple(models))
    (tmp_path / "out").mkdir()
    assert len(merge(recipe, tmp_path / "out")) == 3
    with pytest.raises(ValueError, match="out exists and is not empty; give a new folder"):
        merge(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge(recipe, Path(base) / "config.json")
    assert len(merge(recipe, tmp_path / "deep" / "er")) == 3
    with pytest.raises(ValueError, match=r"^sce needs a base, the model that the others were trained from"):
        plan(MergeRecipe("sce", None, tuple(models)))


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
            CheckpointReader(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = tmp_path / "x"
    assert "no such folder" in refusal(folder)
    folder.mkdir()
    assert "has no config.json; give the folder that save_pretrained wrote" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "has no safetensors weights; there must be a model.safetensors or" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "AutoModelForCausalLM.from_pretrained(X).save_pretrained(Y)" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors cannot be read (" in refusal(folder)
    (folder / "model.safetensors").unlink()

    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "has no weight_map of tensors to shards" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    assert "names the shard '../one.safetensors', not a file of this folder" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    assert "shard one.safetensors is named in model.safetensors.index.json but absent" in refusal(folder)
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    assert "model.safetensors.index.json names b, missing in one.safetensors" in refusal(folder)
    index.unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert "holds an adapter, not a model; merge it into its base" in refusal(folder)


def write_recipe(tmp_path: Path, **content: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_our_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = make_toys(tmp_path)
    path = tmp_path / "recipe.yaml"
    # 1e-1 is a string to PyYAML; the second model lies in the working directory, not beside the recipe.
    path.write_text("method: sce\nbase: base\nmodels: [model-1, model-2]\nparameters: {tau: 1e-1}\ndtype: float16\n")
    recipe = load_recipe(path)
    assert recipe == MergeRecipe("sce", base, tuple(models), {"tau": 0.1}, "float16")
    (tmp_path / "elsewhere").mkdir()
    path = path.rename(tmp_path / "elsewhere" / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path) == recipe
    path.write_text(f"method: linear\nmodels: ['{base}']\n")
    assert load_recipe(path) == MergeRecipe("linear", None, (base,))


def test_mergekit_recipes(tmp_path: Path) -> None:
    base, one, two = make_toys(tmp_path)
    listed = [{"model": "base"}, {"model": "model-1"}, {"model": "model-2"}]
    weighted = [{"model": "model-1", "parameters": {"weight": 0.3}}, {"model": "model-2"}]

    path = write_recipe(
        tmp_path,
        models=listed,
        merge_method="sce",
        base_model="base",
        parameters={"select_topk": 0.5},
        dtype="bfloat16",
    )
    recipe = load_recipe(path)
    assert recipe == MergeRecipe("sce", base, (one, two), {"tau": 0.5, "definition": "mergekit"}, "bfloat16")
    merge(recipe, tmp_path / "out")
    start, first, second = read(base), read(one), read(two)
    for name, tensor in read(tmp_path / "out").items():
        expected, _ = naive_sce(start[name], [first[name], second[name]], 0.5, "mergekit")
        assert torch.equal(tensor, expected.float().bfloat16())

    path = write_recipe(tmp_path, models=listed, merge_method="sce", base_model="base", parameters={"int8_mask": True})
    assert load_recipe(path).parameters == {"tau": 1.0, "definition": "mergekit"}
    path = write_recipe(
        tmp_path,
        models=weighted,
        merge_method="task_arithmetic",
        base_model="base",
        parameters={"weight": 0.7, "lambda": 0.5},
        dtype="bfloat16",
        out_dtype="float32",
    )
    expected_parameters = {"normalize": False, "scale": 0.5, "weights": [0.3, 0.7]}
    assert load_recipe(path) == MergeRecipe("task_arithmetic", base, (one, two), expected_parameters, "float32")
    path = write_recipe(tmp_path, models=weighted, merge_method="linear", parameters={"weight": 1})
    assert load_recipe(path) == MergeRecipe("linear", None, (one, two), {"normalize": True, "weights": [0.3, 1]})


MODELS = [{"model": "model-1", "parameters": {"weight": 1.0}}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            {"method": "sce", "models": ["base"], "slices": []},
            "'slices' not supported; known are method, base,",
        ),
        ({"models": ["base"]}, "method: None must be a name"),
        ({"method": "sce", "models": "base"}, "models: 'base' must be a list of folders or hub ids"),
        ({"method": "sce", "models": []}, "models: there are none to merge; name at least one"),
        (
            {"method": "sce", "models": ["base"], "parameters": [1]},
            "parameters: [1] must be keys with values",
        ),
        (
            {"method": "sce", "models": ["base"], "dtype": "int8"},
            "dtype: 'int8' must be one of float32, bfloat16,",
        ),
        (
            {"method": "sce", "models": ["./gone"]},
            "model './gone' is neither a folder nor a hub id (owner/name)",
        ),
        ({"merge_method": "sce", "slices": []}, "'slices' not supported; known are merge_method, base_model"),
        ({"merge_method": "sce", "modules": {}}, "'modules' not supported"),
        ({"merge_method": "sce", "tokenizer_source": "union"}, "'tokenizer_source' not supported"),
        (
            {"merge_method": "slerp", "models": MODELS},
            "merge_method: 'slerp' must be one of linear, task_arithmetic, sce",
        ),
        (
            {"merge_method": "sce", "models": MODELS},
            "models: model-1: sce: 'weight' not supported; known are select_topk",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "base"}]},
            "models: base has no weight, which linear needs",
        ),
        (
            {"merge_method": "linear", "models": MODELS, "base_model": "base"},
            "base_model: 'base' must be among the models, for linear has no base",
        ),
        (
            {"merge_method": "linear", "models": MODELS, "parameters": {"normalize": [True, False]}},
            "parameters: normalize: gradients and filters are not supported; give one value",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "base", "parameters": {"normalize": True}}]},
            "models: base: only a weight can differ by model, not 'normalize'",
        ),
        (
            {"merge_method": "linear", "models": [{"path": "base"}]},
            "models: 'path' not supported; known are model",
        ),
        (
            {"merge_method": "linear", "models": MODELS, "out_dtype": "int8"},
            "out_dtype: 'int8' must be one of",
        ),
    ],
)
def test_recipes_are_refused_by_name(tmp_path: Path, content: dict[str, object], line: str) -> None:
    make_toys(tmp_path)
    path = write_recipe(tmp_path, **content)
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_recipes_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml: no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "recipe.yaml"
    texts = {
        "[1]": "holds no keys",
        "a: [": "while parsing",
        "method: sce\nmethod: sce": "'method' is given twice",
    }
    texts["method: !!python/object/apply:os.system [true]"] = "could not determine a constructor"
    for text, line in texts.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(line)) as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns and not any("bin" in p or "py" in p for p in allow_patterns)
        if name == "owner/gone":
            raise FileNotFoundError("cannot find it\nand more lines")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("owner/name") == str(tmp_path)
    assert resolve_model("owner/name@v1.0") == str(tmp_path)
    with pytest.raises(ValueError, match="model 'owner/gone' is no folder and cannot be had from the hub"):
        resolve_model("owner/gone")
    assert asked == [("owner/name", None), ("owner/name", "v1.0"), ("owner/gone", None)]


def load_door() -> ModuleType:
    """launch/merge.py, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("launch_merge", ROOT / "launch" / "merge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_door(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    door = load_door()
    make_toys(tmp_path)
    recipe = str(write_recipe(tmp_path, method="task_arithmetic", base="base", models=["model-1", "model-2"]))
    out = tmp_path / "out"
    assert door.main([recipe, str(out), "--plan"]) == 0 and not out.exists()
    assert "3 tensors, 38 parameters: read 456 B, write 152 B, hold up to" in capsys.readouterr().out
    assert door.main([recipe, str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0 .*1\.0000 .*1\.0000", printed) and re.search(r"others .*1\.0000", printed)
    assert (out / "model.safetensors").is_file()
    assert door.main([recipe, str(out)]) == 2
    assert re.fullmatch(r"error: .*out exists and is not empty; give a new folder\n", capsys.readouterr().err)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert door.main([recipe, str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("error: [Errno 28] No space left on device: 'shard'\n") and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_door_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "launch" / "merge.py"), "gone.yaml", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: gone.yaml: no such recipe\n")
