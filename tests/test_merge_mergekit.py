"""Our merges beside mergekit's of the very same recipe files: equal on all tensors, to bfloat16 rounding.

mergekit wants other versions of what we use, so it lives in a venv of its own: MERGEKIT_PYTHON names its Python. One
process of it makes all merges. Where it is absent all this is skipped, but for whether the benchmark runs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from merging import make_folder, read
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("MERGEKIT_PYTHON") or (importlib.util.find_spec("mergekit") and sys.executable)
needs_mergekit = pytest.mark.skipif(not PYTHON, reason="MERGEKIT_PYTHON names no Python that has mergekit")

HIDDEN, INNER, LAYERS, VOCABULARY = 192, 512, 3, 400  # matrices of two and three blocks
TIE = 2**-7  # the size of a seventh of all updates: at density 0.3 the threshold is among them
# How far elements may be apart, of the largest one of their tensor: by float32's rounding alone; more where mergekit
# finds its coefficients from norms and angles in float32, or from what it chose among equals.
ROUNDING = {"nuslerp": 2e-6, "model_stock": 5e-6, "karcher": 2e-5, "sce": 2e-5}
WAYS = {"bfloat16": torch.bfloat16, "float32": torch.float32}

DRIVER = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
found = []
for recipe, out in json.load(sys.stdin):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(recipe)))
        run_merge(config, out, MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
        found.append(None)
    except Exception as error:
        found.append(repr(error))
print(json.dumps(found))
"""


def model(number: int, **parameters: Any) -> dict[str, Any]:
    """One of a recipe's models; 0 is the base."""
    return {"model": NAMES[number], **({"parameters": parameters} if parameters else {})}


NAMES = ("base", "model-1", "model-2", "model-3")
EQUAL = [model(1, weight=1.0), model(2, weight=1.0), model(3, weight=1.0)]
WEIGHED = [model(1, weight=1.0), model(2, weight=0.5), model(3, weight=0.8)]
ALONE = [model(1), model(2), model(3)]
OPPOSED = [model(1, weight=0.7), model(2, weight=-0.2)]
MLPS = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
PAIR = [model(1, weight=0.3), model(2, weight=0.9)]
SLICES = [
    {"sources": [{"model": "model-1", "layer_range": [0, 2]}]},
    {"sources": [{"model": "model-2", "layer_range": [1, 3]}]},
]
MIXED = [
    {
        "sources": [
            {"model": "model-1", "layer_range": [0, 2], "parameters": {"weight": [0.1, 0.9]}},
            {"model": "model-2", "layer_range": [1, 3]},
        ]
    },
    {"sources": [{"model": "model-3", "layer_range": [1, 3]}, {"model": "model-1", "layer_range": [0, 2]}]},
]


def merged_by(method: str, models: list[dict[str, Any]], base: bool = True, **parameters: Any) -> dict[str, Any]:
    """A recipe in mergekit's words, that computes in float32."""
    told = {"merge_method": method, "models": models, "parameters": parameters}
    return told | ({"base_model": "base"} if base else {})


RECIPES: dict[str, dict[str, Any]] = {
    "linear": merged_by("linear", WEIGHED, base=False),
    "linear, not normalized": merged_by("linear", OPPOSED, base=False, normalize=False),
    "linear, the base among the models": merged_by("linear", [model(0, weight=0.4), *WEIGHED]),
    "linear, gradients and filters": merged_by(
        "linear",
        [
            model(1, weight=[0.0, 0.3, 1.0]),
            model(2, weight=[{"filter": "self_attn", "value": 0.7}, {"filter": "mlp", "value": [0.1, 0.4]}]),
            model(3),
        ],
        base=False,
        weight=[{"filter": "norm", "value": 0.6}, {"value": 1.5}],
    ),
    "task_arithmetic": merged_by("task_arithmetic", WEIGHED, **{"lambda": 0.5}),
    "task_arithmetic, normalized": merged_by("task_arithmetic", [model(0), *OPPOSED], normalize=True),
    "ties, equal sizes at the threshold": merged_by("ties", WEIGHED, density=0.3),
    "ties, half": merged_by("ties", WEIGHED, density=0.53, int8_mask=True, **{"lambda": 0.7}),
    "ties, rescaled": merged_by("ties", WEIGHED, density=0.2, rescale=True, normalize=False),
    "ties, density over the layers": merged_by(
        "ties", [model(1, weight=1.0, density=[1.0, 0.53, 0.2]), model(2, weight=0.5)], density=0.2
    ),
    "ties, the MLPs alone": merged_by("ties", [model(1, weight=MLPS), model(2, weight=MLPS)], density=0.53),
    "task_arithmetic, weights that cancel": merged_by(
        "task_arithmetic", [model(1, weight=1.0), model(2, weight=-1.0)], normalize=True
    ),
    "ties, weights that cancel": merged_by("ties", [model(1, weight=1.0), model(2, weight=-1.0)], density=0.53),
    "breadcrumbs": merged_by("breadcrumbs", WEIGHED, density=0.9, gamma=0.01),
    "breadcrumbs, few without many outliers": merged_by("breadcrumbs", WEIGHED, density=0.4, gamma=0.15),
    "breadcrumbs, few": merged_by("breadcrumbs", WEIGHED, density=0.2, gamma=0.01),
    "breadcrumbs_ties": merged_by("breadcrumbs_ties", WEIGHED, density=0.5, gamma=0.02),
    "dare_linear, off": merged_by("dare_linear", WEIGHED, density=1.0),
    "dare_ties, off": merged_by("dare_ties", WEIGHED, density=1.0),
    "della, off": merged_by("della", WEIGHED, density=1.0),
    "della_linear, off": merged_by("della_linear", WEIGHED, density=1.0),
    "sce": merged_by("sce", ALONE),
    "sce, four fifths": merged_by("sce", ALONE, select_topk=0.8),
    "sce, a tenth": merged_by("sce", ALONE, select_topk=0.1),
    "slerp": merged_by("slerp", [model(0), model(1)], t=0.3),
    "slerp, the base last": merged_by("slerp", [model(1), model(0)], t=0.3),
    "slerp, gradients and filters": merged_by(
        "slerp",
        [model(0), model(1)],
        t=[{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.3]}, {"value": 0.4}],
    ),
    "nuslerp": merged_by("nuslerp", PAIR, base=False),
    "nuslerp of updates": merged_by("nuslerp", PAIR),
    "nuslerp, by row": merged_by("nuslerp", PAIR, base=False, nuslerp_flatten=False),
    "nuslerp of updates, by column": merged_by("nuslerp", PAIR, nuslerp_flatten=False, nuslerp_row_wise=True),
    "karcher": merged_by("karcher", ALONE, base=False),
    "model_stock": merged_by("model_stock", ALONE),
    "model_stock, by row": merged_by("model_stock", ALONE, filter_wise=True),
    "passthrough, scaled": merged_by(
        "passthrough", [model(1, scale=[{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": [0, 1]}])],
        base=False,
    ),
    "passthrough, slices": {"merge_method": "passthrough", "slices": SLICES},
    "linear, slices": {"merge_method": "linear", "slices": MIXED, "parameters": {"weight": [0.5, 1.0]}},
    "linear, a module": {"merge_method": "linear", "modules": {"default": {"models": EQUAL}}},
}  # fmt: skip
SMALL_SCE = merged_by("sce", ALONE)
NARROW_TOP = merged_by("breadcrumbs", EQUAL, density=0.9, gamma=0.001)


def tensors(dtype: torch.dtype, size: float = 1e-2) -> list[dict[str, Tensor]]:
    """A base and three models with a third of their updates in common, the second's and third's larger.

    Of each tensor a seventh has not moved, a seventh moved the same way in all, a seventh by TIE up or down. The
    head is tied in float32.
    """
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if dtype == torch.bfloat16:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        for name in ("self_attn.q_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{n}.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            shapes[f"model.layers.{n}.{name}.weight"] = (HIDDEN // 2, HIDDEN)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            shapes[f"model.layers.{n}.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{name}.weight"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    made: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    for name, shape in shapes.items():
        base = 0.02 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        base.view(-1)[2::7] = 0
        common = torch.randn(shape, generator=generator)
        made[0][name] = base.to(dtype)
        for k in (1, 2, 3):
            update = size * (1 + 0.2 * k) * (0.6 * common + 0.8 * torch.randn(shape, generator=generator))
            flat = update.view(-1)
            flat[::7] = 0
            flat[1::7] = 0.4 * size
            flat[2::7] = 100 * size * TIE * torch.randn(flat[2::7].shape, generator=generator).sign()
            made[k][name] = (base.to(dtype) + update).to(dtype)
    return made


def write_models(folder: Path, models: list[dict[str, Tensor]]) -> Path:
    """The models as folders of shards."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": "lm_head.weight" not in models[0],
    }
    for name, own in zip(NAMES, models, strict=True):
        make_folder(folder / name, own, shards=3, **config)
    return folder


def write_recipe(folder: Path, name: str, recipe: dict[str, Any], out_dtype: str = "bfloat16") -> Path:
    """The recipe beside its models, which it names by absolute paths."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(own) for key, own in value.items()}
        if isinstance(value, list):
            return [named(own) for own in value]
        return str(folder / value) if value in NAMES else value

    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**named(recipe), "dtype": "float32", "out_dtype": out_dtype}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of models, a recipe beside them for each merge; mergekit's outputs are in `RECIPE.mergekit`."""
    whole = tmp_path_factory.mktemp("mergekit")
    folders = {way: write_models(whole / way, tensors(dtype)) for way, dtype in WAYS.items()}
    folders["small"] = write_models(whole / "small", tensors(torch.float32, 1e-4))
    recipes = [write_recipe(folders[way], name, told) for way in WAYS for name, told in RECIPES.items()]
    recipes.append(write_recipe(folders["small"], "sce", SMALL_SCE, "float32"))
    recipes.append(write_recipe(folders["float32"], "narrow top", NARROW_TOP))
    asked = json.dumps([(str(path), str(path.with_suffix(".mergekit"))) for path in recipes])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(PYTHON), "-c", DRIVER], input=asked, capture_output=True, text=True, env=environment, cwd=whole
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = {
        path.stem: error for path, error in zip(recipes, json.loads(done.stdout.splitlines()[-1]), strict=True) if error
    }
    assert not failed
    return folders


@pytest.fixture(scope="module")
def door() -> ModuleType:
    """launch/merge.py."""
    spec = importlib.util.spec_from_file_location("merge_door", ROOT / "launch" / "merge.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(door: ModuleType, folder: Path, name: str, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What we make of a recipe, and what mergekit made of it."""
    assert door.main([str(folder / f"{name}.yaml"), str(out)]) == 0
    return read(out), read(folder / f"{name}.mergekit")


def apart(ours: Tensor, theirs: Tensor, method: str) -> Tensor:
    """Which elements differ by more than one step of bfloat16, but for sums that nearly cancel (see ROUNDING)."""

    def steps(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    far = (ours.float() - theirs.float()).abs() > ROUNDING.get(method, 1e-7) * theirs.float().abs().max()
    return far & ((steps(ours) - steps(theirs)).abs() > 1)


def at(setting: Any, key: str) -> float:
    """A number, or a point of a gradient over the layers."""
    if not isinstance(setting, list):
        return setting
    place = int(key.split(".")[2]) / (LAYERS - 1) * (len(setting) - 1) if ".layers." in key else 0
    left = min(int(place), len(setting) - 2)
    return setting[left] + (place - left) * (setting[left + 1] - setting[left])


def thresholds(recipe: dict[str, Any], key: str, base: Tensor, models: list[Tensor]) -> list[tuple[Tensor, int]]:
    """What a recipe selects a tensor's elements by, and how many of the largest are one side of a threshold."""
    shared, deltas = recipe.get("parameters", {}), [own.float() - base.float() for own in models]
    if shared.get("select_topk", 1) < 1:
        spread = torch.stack(deltas).double().var(0, correction=0)
        return [(spread, int(shared["select_topk"] * int(spread.count_nonzero())))]
    found = []
    for entry, delta in zip(recipe["models"], deltas, strict=False) if "density" in shared else ():
        kept = int(at(entry["parameters"].get("density", shared["density"]), key) * delta.numel())
        top = int(shared.get("gamma", 0) * delta.numel())
        found += [(delta.abs(), count) for count in (top, top + kept) if 0 < count < delta.numel()]
    return found


def open_to_choice(recipe: dict[str, Any], key: str, base: Tensor, models: list[Tensor]) -> Tensor:
    """Elements that equal a threshold but for rounding: mergekit's sort keeps no order of equals."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    for keys, count in thresholds(recipe, key, base, models):
        found |= (keys / keys.flatten().topk(count).values[-1] - 1).abs() < 1e-5
    return found


@needs_mergekit
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_makes_the_same_tensors(
    name: str, way: str, theirs: dict[str, Path], door: ModuleType, tmp_path: Path
) -> None:
    ours, wanted = both(door, theirs[way], name, tmp_path / "out")
    assert set(ours) == set(wanted)
    recipe, free = RECIPES[name], 0
    base, *models = (read(theirs[way] / own) for own in NAMES)
    for key in wanted:
        assert ours[key].dtype == wanted[key].dtype == torch.bfloat16
        assert ours[key].shape == wanted[key].shape
        wrong = apart(ours[key], wanted[key], recipe["merge_method"])
        if "models" in recipe:
            open_ = open_to_choice(recipe, key, base[key], [own[key] for own in models])
            free += int(open_.sum())
            wrong &= ~open_
        assert not wrong.any(), f"{key}: {int(wrong.sum())} of {wrong.numel()}"
    assert free < (0.2 if "equal sizes" in name else 0.03) * sum(own.numel() for own in wanted.values())
    configs = [json.loads((folder / "config.json").read_text()) for folder in
               (tmp_path / "out", theirs[way] / f"{name}.mergekit")]  # fmt: skip
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]


@needs_mergekit
def test_small_updates_leave_mergekit_with_a_plain_average(
    theirs: dict[str, Path], door: ModuleType, tmp_path: Path
) -> None:
    ours, wanted = both(door, theirs["small"], "sce", tmp_path / "out")
    base, *models = (read(theirs["small"] / own) for own in NAMES)

    def naive(key: str, weights: Tensor) -> Tensor:
        deltas = torch.stack([own[key].double() - base[key].double() for own in models])
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        mass = weights.view(-1, *[1] * base[key].dim()) * (deltas.sign() == sign)
        return base[key].double() + (mass * deltas).sum(0) / mass.sum(0).clamp(min=1e-6)

    different = 0
    for key in wanted:
        energy = torch.stack([(own[key].double() - base[key].double()).square().mean() for own in models])
        assert energy.sum() < 1e-6  # its threshold
        assert torch.allclose(wanted[key].double(), naive(key, torch.full((3,), 1 / 3)), rtol=1e-6, atol=1e-9)
        assert torch.allclose(ours[key].double(), naive(key, energy / energy.sum()), rtol=1e-6, atol=1e-9)
        different += not torch.allclose(ours[key], wanted[key], rtol=1e-6, atol=1e-6)
    assert different > len(wanted) / 2


@needs_mergekit
def test_breadcrumbs_of_a_tensor_too_small_for_one_outlier(
    theirs: dict[str, Path], door: ModuleType, tmp_path: Path
) -> None:
    ours, wanted = both(door, theirs["float32"], "narrow top", tmp_path / "out")
    base = read(theirs["float32"] / "base")
    for key in wanted:
        if 0.001 * wanted[key].numel() < 1:
            assert torch.equal(wanted[key], base[key].bfloat16())  # mergekit drops all of the update
            assert not torch.equal(ours[key], wanted[key])
        else:
            assert not apart(ours[key], wanted[key], "breadcrumbs").any()


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "merge.py"), "--small", "--methods", "linear"]
    command += ["--threads", "1", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MERGEKIT_PYTHON": ""})
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert found["method"] == "linear" and "mergekit" not in found
    assert found["bytes_read"] == pytest.approx(4 * found["bytes_written"], rel=0.05)
    assert found["of_copy"] == found["ours"]["seconds"] / found["copy"]["seconds"]
    assert 0 < found["ours"]["own_bytes"] <= found["ours"]["peak_bytes"]
    assert not (tmp_path / "work" / "out").exists()


def test_the_benchmark_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    def said(*options: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "merge.py"), "--work", str(tmp_path / "work"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert "unknown merge method 'tie'" in said("--methods", "tie")
    assert f"{tmp_path}: no model with safetensors" in said("--base", str(tmp_path), "--models", str(tmp_path))
    assert "is no Python that has mergekit" in said("--mergekit", str(tmp_path / "python"))
    assert not (tmp_path / "work").exists()
