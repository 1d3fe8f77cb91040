"""Recipes, ours and mergekit's: what they come to, and one line for each thing that is refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from merging import make_toys
from tiny import ROOT

from fusion.merge import chat, mergekit, ours
from fusion.merge.methods import get_method, method_names
from fusion.merge.methods.lines import scale
from fusion.merge.recipe import load_recipe, resolve_model
from fusion.merge.records import Lines, MergeRecipe, Output, Slice, Source, Tokenizer, TokenRow
from fusion.merge.settings import at_tensor, check_setting

NAME = "model.layers.3.mlp.up_proj.weight"


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


def test_our_recipe_in_full(tmp_path: Path) -> None:
    base, one, two = make_toys(tmp_path)
    for name in ("s1", "s2", "adapter"):
        (tmp_path / name).mkdir()
    path = write_recipe(
        tmp_path,
        method="ota",
        base="base",
        models=["model-1", {"model": "base+adapter", "parameters": {"weights": {"gradient": [0, 1]}}}],
        parameters={"density": [0.5, 0.25], "power": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
        seed=7,
        statistics=["s1", "s2"],
        lines={"alpha": 0.5, "beta": 0.25},
        tokenizer={
            "source": "model-2",
            "tokens": {
                "<a>": {"source": "model-1", "force": True},
                "<b>": {"source": {"kind": "model_token", "model": "model-2", "token_id": 3}},
                "<c>": {"source": {"kind": "model_token", "model": "base", "token": "x"}},
                "<d>": {"source": {"kind": "zero"}},
            },
            "pad_to_multiple_of": 64,
        },
        chat_template="auto",
        output={"kind": "task_vector", "form": "lora", "rank": 4},
    )
    recipe = load_recipe(path)
    assert recipe == MergeRecipe(
        "ota",
        base,
        (one, f"{base}+{tmp_path / 'adapter'}"),
        {
            "density": [0.5, 0.25],
            "power": [{"filter": "mlp", "value": 0.5}, {"value": 1}],
            "weights": [1.0, {"gradient": [0, 1]}],
        },
        seed=7,
        statistics=(str(tmp_path / "s1"), str(tmp_path / "s2")),
        lines=Lines(0.5, 0.25),
        tokenizer=Tokenizer(
            two,
            {
                "<a>": TokenRow(one, force=True),
                "<b>": TokenRow(two, token_id=3),
                "<c>": TokenRow(base, token="x"),
                "<d>": TokenRow(),
            },
            64,
        ),
        chat_template="auto",
        output=Output("task_vector", "lora", 4),
    )


def test_our_slices(tmp_path: Path) -> None:
    base, one, two = make_toys(tmp_path)
    sources = [
        {"model": "model-1", "layers": [0, 2]},
        {"model": "model-2", "layers": [1, 3], "parameters": {"weights": 3}},
    ]
    slices = [
        {"sources": sources, "base": {"model": "base", "layers": [0, 2]}, "parameters": {"scale": 2}},
        {"sources": [{"model": "model-2", "layers": [0, 1]}]},
    ]
    path = write_recipe(
        tmp_path, method="task_arithmetic", base="base", slices=slices, parameters={"scale": 0.5, "weights": 2}
    )
    first = Slice((Source(one, (0, 2)), Source(two, (1, 3))), {"scale": 2, "weights": [2, 3]}, Source(base, (0, 2)))
    second = Slice((Source(two, (0, 1)),), {"scale": 0.5, "weights": 2})
    assert load_recipe(path) == MergeRecipe("task_arithmetic", base, (one, two), slices=(first, second))


def test_a_model_silent_about_a_parameter_keeps_what_is_shared() -> None:
    entries = ["a", {"model": "b", "parameters": {"weights": 5}}, "c"]
    read = ours.read({"method": "linear", "models": entries, "parameters": {"weights": [1, 2, 3]}})
    assert read.parameters == {"weights": [1, 5, 3]} and read.models == ("a", "b", "c")
    assert ours.read({"method": "linear", "models": entries}).parameters == {"weights": [1.0, 5, 1.0]}
    filters = [{"filter": "mlp", "value": 0.5}, {"value": 1}]
    read = ours.read({"method": "linear", "models": entries, "parameters": {"weights": filters}})
    assert read.parameters == {"weights": [filters, 5, filters]}


def test_settings() -> None:
    sources = [NAME, NAME.replace("3", "5")]

    def at(setting: Any, height: float = 0.0, name: str = NAME) -> Any:
        check_setting("x", setting)
        return at_tensor({"x": setting}, name, sources, height)["x"]

    assert at(0.5) == 0.5 and at("paper") == "paper" and at(True) is True and at(None) is None
    assert at([1, {"gradient": [0, 1]}], 0.25) == [1, 0.25]
    # Four layers and three points: heights 0, 1/3, 2/3 and 1 lie at 0, 2/3, 4/3 and 2 of the points.
    heights = [layer / 3 for layer in range(4)]
    assert [at({"gradient": [0, 0.5, 2]}, height) for height in heights] == pytest.approx([0, 1 / 3, 1, 2])
    assert at({"gradient": [7]}, 0.4) == 7
    filters = [{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": {"gradient": [0, 4]}}, {"value": 3}]
    assert at(filters, 0.5) == 2 and at(filters, 0.5, "lm_head.weight") == 3
    assert at([{"filter": "*", "value": [8, 9]}]) == [8, 9]
    # A model's own filters look at its own name for the tensor.
    own = [{"filter": "layers.5", "value": 1}, {"value": 2}]
    assert at([own, own]) == [2, 1] and at(own) == 2
    for setting in ([{"filter": "attn", "value": 1}], [0, [{"filter": "attn", "value": 1}]]):
        with pytest.raises(ValueError, match=f"x: no entry holds for {re.escape(NAME)}; end the list with one that"):
            at(setting)


@pytest.mark.parametrize(
    "setting",
    [
        float("nan"),
        [1, float("inf")],
        10**400,
        {"gradient": [0, 10**400]},
        {"gradient": []},
        {"gradient": [0, float("nan")]},
        {"gradient": [True]},
        {"gradient": 1},
        {"gradients": [1]},
        [[1, 2], 3],
        [{"filter": 3, "value": 1}],
        [{"filters": "mlp", "value": 1}],
        [None],
        b"x",
    ],
)
def test_what_is_no_setting_is_refused(setting: Any) -> None:
    with pytest.raises(ValueError, match=r"^tau: .* must be") as caught:
        MergeRecipe("sce", "base", ("a",), {"tau": setting})
    assert "\n" not in str(caught.value)


def test_lines_scale() -> None:
    assert [scale(0.25, 0.75, layer, 4) for layer in (None, 0, 1, 2, 3)] == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert scale(0.25, 0.75, 0, 1) == 0.25
    assert [scale(0.5, 0.5, layer, 3, 0.0) for layer in (None, 0, 2)] == [0.0, 0.5, 1.0]


def merge_kit(method: str, **content: Any) -> MergeRecipe:
    """mergekit's recipe of models a and b, with the base o where the method takes one."""
    if "slices" not in content and "modules" not in content:
        content.setdefault("models", [{"model": "a"}, {"model": "b"}])
    return mergekit.read({"merge_method": method, **content})


ONES = {"weights": [1, 1], "scale": 1.0}


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("linear", {"weight": 1}, {"normalize": True, "weights": [1, 1]}),
        ("task_arithmetic", {"weight": 1, "lambda": 2, "density": 0.1, "rescale": True, "int8_mask": True},
         {"normalize": False, "scale": 2, "weights": [1, 1]}),
        ("ties", {"weight": 1}, {**ONES, "normalize": True, "rescale": "none", "density": 1.0}),
        ("ties", {"weight": 0.5, "density": 0.2, "rescale": True, "normalize": False},
         {"normalize": False, "scale": 1.0, "rescale": "norm", "density": [0.2, 0.2], "weights": [0.5, 0.5]}),
        ("dare_linear", {"weight": 1}, {**ONES, "normalize": False, "rescale": "norm", "density": 1.0}),
        ("dare_ties", {"weight": 1, "rescale": False},
         {**ONES, "normalize": False, "rescale": "none", "density": 1.0}),
        ("della", {"weight": 1, "density": 0.5},
         {**ONES, "normalize": True, "rescale": "norm", "density": [0.5, 0.5], "epsilon": 0.15}),
        ("della_linear", {"weight": 1, "epsilon": 0.1},
         {**ONES, "normalize": False, "rescale": "norm", "density": 1.0, "epsilon": [0.1, 0.1]}),
        ("breadcrumbs", {"weight": 1, "density": 0.9},
         {**ONES, "normalize": False, "rescale": "none", "density": [0.9, 0.9], "gamma": 0.01}),
        ("breadcrumbs_ties", {"weight": 1, "gamma": 0.02},
         {**ONES, "normalize": False, "rescale": "none", "density": 1.0, "gamma": [0.02, 0.02]}),
        ("sce", {"int8_mask": True}, {"tau": 1.0, "definition": "mergekit"}),
        ("sce", {"select_topk": 0.5}, {"tau": 0.5, "definition": "mergekit"}),
        ("model_stock", {}, {"filter_wise": False, "epsilon": 1e-6}),
        ("model_stock", {"filter_wise": True}, {"filter_wise": True, "epsilon": 1e-6}),
        ("nuslerp", {"weight": 1, "nuslerp_row_wise": True},
         {"flatten": True, "row_wise": False, "weights": [1, 1]}),
        ("nuslerp", {"weight": 1, "nuslerp_row_wise": 1.0, "nuslerp_flatten": False},
         {"flatten": False, "row_wise": True, "weights": [1, 1]}),
    ],
)  # fmt: skip
def test_mergekit_parameters(method: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = merge_kit(method, base_model="o", models=[{"model": "a"}, {"model": "b"}], parameters=given)
    if method == "linear":  # the base is one of the models there
        assert recipe.models == ("a", "b", "o") and recipe.base is None and recipe.reference == "o"
        expected = {**expected, "weights": [1, 1, 1]}
    else:
        assert recipe.models == ("a", "b") and recipe.base == "o" and recipe.reference is None
    assert recipe.parameters == expected and recipe.dtype is None
    at = at_tensor(recipe.parameters, NAME, [NAME] * len(recipe.models), 0.5)
    get_method(method).check(at, len(recipe.models))


def test_mergekit_methods_whose_base_is_a_model() -> None:
    recipe = merge_kit("slerp", base_model="b", parameters={"t": 0.3})
    # t = 0 is the base.
    assert (recipe.models, recipe.base, recipe.reference, recipe.parameters) == (("b", "a"), None, "b", {"t": 0.3})
    recipe = merge_kit("karcher", parameters={"max_iter": 5, "tol": 1e-3})
    assert (recipe.models, recipe.reference) == (("a", "b"), None)
    assert recipe.parameters == {"max_iter": 5, "tol": 1e-3}
    get_method("karcher").check(recipe.parameters, 2)
    assert merge_kit("karcher", base_model="o").models == ("a", "b", "o")
    recipe = merge_kit("passthrough", models=[{"model": "a", "parameters": {"scale": 0.5}}])
    assert (recipe.models, recipe.parameters) == (("a",), {"scale": 0.5})
    assert merge_kit("passthrough", models=[{"model": "a"}]).parameters == {"scale": 1.0}
    recipe = merge_kit("nuslerp", parameters={"weight": 1})
    assert (recipe.models, recipe.base) == (("a", "b"), None)
    assert merge_kit("nuslerp", base_model="o", parameters={"weight": 1}).base == "o"


def test_mergekit_bases_dtypes_and_modules() -> None:
    entries = [
        {"model": "o", "parameters": {"weight": 9}},
        {"model": "a", "parameters": {"weight": 0.3}},
        {"model": "b"},
    ]
    recipe = merge_kit(
        "ties", base_model="o", models=entries, parameters={"weight": 0.7}, dtype="bfloat16", out_dtype="torch.float32"
    )
    # The base has no update, so it has no part but that of the base.
    assert (recipe.base, recipe.models, recipe.dtype) == ("o", ("a", "b"), "float32")
    assert recipe.parameters["weights"] == [0.3, 0.7]
    assert merge_kit("sce", base_model="o", dtype="float16").dtype == "float16"
    module = {"default": {"models": entries, "parameters": {"weight": 0.6, "normalize": False}}}
    recipe = merge_kit(
        "ties", base_model="o", modules=module, parameters={"weight": 0.7, "normalize": True, "lambda": 2}
    )
    assert recipe.parameters == {
        **{"normalize": False, "rescale": "none", "density": 1.0, "scale": 2},
        "weights": [0.3, 0.6],
    }


def test_mergekit_settings_go_from_the_most_special_to_the_default() -> None:
    source = {"model": "a", "layer_range": [0, 4], "parameters": {"weight": [{"filter": "up_proj", "value": 1}]}}
    other = {"model": "b", "layer_range": [2, 6], "parameters": {"weight": [0, 10]}}
    part = {
        "sources": [source, other, {"model": "o", "layer_range": [0, 4]}],
        "parameters": {"weight": [{"filter": "mlp", "value": [1, 3]}], "lambda": [{"filter": "mlp", "value": 0.5}]},
    }
    recipe = merge_kit(
        "task_arithmetic", base_model="o", slices=[part], parameters={"weight": 7, "normalize": [{"value": True}]}
    )
    (made,) = recipe.slices
    assert made.sources == (Source("a", (0, 4)), Source("b", (2, 6))) and made.base == Source("o", (0, 4))

    def at(rest: str, height: float) -> dict[str, Any]:
        return at_tensor(
            made.parameters, f"model.layers.3.{rest}", [f"model.layers.{n}.{rest}" for n in (3, 5)], height
        )

    assert at("mlp.up_proj.weight", 0.5) == {"normalize": True, "scale": 0.5, "weights": [1, 5]}
    assert at("mlp.down_proj.weight", 0.5)["weights"] == [2, 5]
    # No filter holds for lambda, so it is mergekit's default.
    assert at("self_attn.q_proj.weight", 1) == {"normalize": True, "scale": 1.0, "weights": [7, 10]}
    assert recipe.models == ("a", "b") and recipe.parameters == {}


def test_mergekit_filters_that_miss_leave_the_default() -> None:
    density = [{"filter": "mlp", "value": [0.5, 0.7]}]
    models = [{"model": "a", "parameters": {"density": density}}, {"model": "b"}]
    recipe = merge_kit("ties", base_model="o", models=models, parameters={"weight": 1})
    names = ["model.norm.weight"] * 2
    assert at_tensor(recipe.parameters, names[0], names, 0)["density"] == [1.0, 1.0]
    assert at_tensor(recipe.parameters, NAME, [NAME] * 2, 0.5)["density"] == pytest.approx([0.6, 1.0])


def test_mergekit_slices() -> None:
    def sources(**ranges: list[int]) -> list[dict[str, Any]]:
        return [{"model": name, "layer_range": layers} for name, layers in ranges.items()]

    stacked = [{"sources": sources(a=[0, 8])}, {"sources": sources(b=[4, 12])}]
    recipe = merge_kit("passthrough", slices=stacked)
    assert recipe.slices == (
        Slice((Source("a", (0, 8)),), {"scale": 1.0}),
        Slice((Source("b", (4, 12)),), {"scale": 1.0}),
    )
    assert (recipe.models, recipe.base, recipe.reference) == (("a", "b"), None, None)
    assert merge_kit("passthrough", slices=stacked, base_model="o").reference == "o"
    # One source alone is passed through; where the base is, nothing has changed.
    recipe = merge_kit(
        "slerp", slices=[{"sources": sources(a=[0, 2], b=[0, 2])}, {"sources": sources(a=[2, 4])}],
        base_model="b", parameters={"t": 0.5},
    )  # fmt: skip
    assert recipe.slices == (
        Slice((Source("b", (0, 2)), Source("a", (0, 2))), {"t": 0.5}),
        Slice((Source("a", (2, 4)),), method="passthrough"),
    )
    slices = [
        {"sources": sources(a=[0, 2], o=[0, 2])},
        {"sources": sources(o=[2, 3])},
        {"sources": sources(a=[0, 2], b=[0, 2]), "base_model": "b"},
    ]
    recipe = merge_kit("ties", slices=slices, base_model="o", parameters={"weight": 1})
    given = {"normalize": True, "scale": 1.0, "rescale": "none", "density": 1.0, "weights": [1]}
    assert recipe.slices == (
        Slice((Source("a", (0, 2)),), given, Source("o", (0, 2))),
        Slice((Source("o", (2, 3)),), {}, Source("o", (2, 3)), "passthrough"),
        Slice((Source("a", (0, 2)),), given, Source("b", (0, 2))),
    )
    assert recipe.models == ("a", "o") and recipe.base == "o"
    # Every slice has a base of its own.
    assert merge_kit("ties", slices=slices[2:], parameters={"weight": 1}).base is None


def test_mergekit_references_and_tokenizers() -> None:
    full = {"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/l"}}
    recipe = merge_kit("karcher", models=[{"model": full}, {"model": "b+l@v2"}, {"model": {"model": "c"}}])
    assert recipe.models == ("org/a@v1+org/l", "b+l@v2", "c")
    for source in ("union", "base", "org/t"):
        assert merge_kit("karcher", tokenizer_source=source).tokenizer == Tokenizer(source)
    tokens = {"<x>": {"source": {"kind": "zero"}, "force": True}, "<y>": {"source": {"model": {"path": "b"}}}}
    recipe = merge_kit("karcher", tokenizer={"tokens": tokens, "pad_to_multiple_of": 8}, chat_template="chatml")
    assert recipe.tokenizer == Tokenizer("union", {"<x>": TokenRow(force=True), "<y>": TokenRow("b")}, 8)
    assert recipe.chat_template == "chatml"


def test_mergekit_recipes_with_anchors(tmp_path: Path) -> None:
    """`<<` takes over another block's keys, and those beside it go first."""
    make_toys(tmp_path)
    own = "models: [{model: model-1, parameters: &p {weight: 0.25}}, {model: model-2, parameters: {<<: *p%s}}]"
    path = tmp_path / "recipe.yaml"
    for beside, weights in [("", [0.25, 0.25]), (", weight: 0.5", [0.25, 0.5])]:
        path.write_text(f"merge_method: linear\n{own % beside}\n")
        assert load_recipe(path).parameters["weights"] == weights


def test_mergekit_recipes_from_files(tmp_path: Path) -> None:
    base, one, two = make_toys(tmp_path)
    (tmp_path / "lora").mkdir()
    listed = [{"model": "base"}, {"model": "model-1"}, {"model": "model-2+lora"}]
    path = write_recipe(tmp_path, models=listed, merge_method="sce", base_model="base", parameters={"select_topk": 0.5})
    assert load_recipe(path) == MergeRecipe(
        "sce", base, (one, f"{two}+{tmp_path / 'lora'}"), {"tau": 0.5, "definition": "mergekit"}
    )
    path.write_text(
        """
slices:
  - sources:
      - {model: model-1, layer_range: [0, 2]}
      - {model: model-2, layer_range: [0, 2]}
merge_method: slerp
base_model: model-1
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
tokenizer_source: model-2
"""
    )
    recipe = load_recipe(path)
    assert recipe.slices[0].sources == (Source(one, (0, 2)), Source(two, (0, 2)))
    assert recipe.reference == one and recipe.tokenizer == Tokenizer(two)
    filters = recipe.slices[0].parameters["t"]
    assert filters[1] == {"filter": "mlp", "value": {"gradient": [1, 0.5, 0.7, 0.3, 0]}}


# Each on top of {method: ties, base: base, models: [model-1, model-2]}; a key with nothing is taken away.
OURS = [
    ("slice: []", "'slice' not supported; known are method, base,"),
    ("method:", "method: None must be a name"),
    ("method: tis", "unknown merge method 'tis'; known are linear, task_arithmetic"),
    ("models: base", "models: 'base' must be a list of folders or hub ids"),
    ("models: []", "models: there are none to merge; name at least one"),
    ("models: [3]", "models: 3 must be a name"),
    ("models: [./gone]", "model './gone' is neither a folder nor a hub id (owner/name)"),
    ("models: [base+./gone]", "model './gone' is neither a folder nor a hub id (owner/name)"),
    ("models: [{model: a, layers: [0, 1]}]", "models: 'layers' not supported; known are model, parameters"),
    ("models: [{model: a, parameters: {scale: 1}}]", "models: 'scale' cannot differ by model in ties; what can is ["),
    (
        "{method: metrics, models: [{model: a, parameters: {metrics: 1}}, b]}",
        "models: number 2 has no metrics; give each of them one",
    ),
    (
        "{models: [a, {model: b, parameters: {weights: 1}}], parameters: {weights: [1]}}",
        "weights: [1] has 1 entries for 2 models; give one for each",
    ),
    ("parameters: [1]", "parameters: [1] must be keys with values"),
    ("parameters: {weights: .nan}", "weights: nan must be a finite number"),
    ("parameters: {weights: [1, .inf]}", "weights: inf must be a finite number"),
    ("dtype: int8", "dtype: 'int8' must be one of float32, bfloat16,"),
    ("seed: -1", "seed: -1 must be a whole number, 0 or more"),
    ("seed: true", "seed: True must be a whole number, 0 or more"),
    ("statistics: s", "statistics: 's' must be a list of folders, one for each model"),
    ("statistics: [base]", "statistics: 1 folders for 2 models; give one for each model"),
    ("statistics: [s, base]", "statistics: 's' is no folder; name the one that"),
    ("lines: {gamma: 1}", "lines: 'gamma' not supported; known are alpha, beta, outside"),
    ("lines: {outside: all}", "lines: outside: 'all' must be a finite number"),
    ("lines: {alpha: .inf}", "lines: alpha: inf must be a finite number"),
    ("{method: linear, base: , lines: {alpha: 1}}", "lines: needs a base, the model that the others were trained from"),
    ("{method: linear, base: , output: {kind: task_vector}}", "output: needs a base, the model that the others"),
    ("output: {kind: vector}", "output: kind: 'vector' must be model or task_vector"),
    ("output: {form: lora}", "output: form: 'lora' is for a task vector; set kind: task_vector"),
    ("output: {kind: task_vector, form: sparse}", "output: form: 'sparse' must be full, lora or ternary"),
    ("output: {kind: task_vector, rank: 8}", "output: rank: 8 is for form: lora; leave it out, or set that form"),
    ("output: {kind: task_vector, form: lora, rank: 0}", "output: rank: 0 must be a whole number, 1 or more"),
    ("output: {kind: task_vector, form: ternary, density: 0}", "output: density: 0 must be a number in (0, 1]"),
    ("tokenizer: union", "tokenizer: 'union' must be keys with values"),
    ("tokenizer: {pad_to_multiple_of: 0}", "tokenizer: pad_to_multiple_of: 0 must be a whole number, 1 or more"),
    ("tokenizer: {tokens: {x: {source: {kind: one}}}}", "x: source: kind: 'one' must be zero or model_token"),
    ("tokenizer: {tokens: {x: {force: 1}}}", "tokenizer: tokens: x: force: 1 must be true or false"),
    ("tokenizer: {tokens: {x: {}}}", "tokenizer: tokens: x: source: None must be a name"),
    (
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: base}}}}",
        "tokenizer: tokens: x: source: give one of `token` and `token_id`",
    ),
    ("slices: []", "slices: they name their models themselves; leave out `models`"),
    ("{models: , slices: []}", "slices: there are none; give a list of entries `sources: ...`"),
    (
        "{models: , slices: [{sources: [{model: base, layers: [2, 1]}]}]}",
        "slices: 0: sources: layers: [2, 1] must be [first, end]",
    ),
    (
        "{models: , slices: [{sources: [{model: a, layers: [0, 2]}, {model: b, layers: [0, 1]}]}]}",
        "slices: [0, 1] of b are 1 layers and [0, 2] of a are 2; all sources of a slice need as many",
    ),
]
# Each on top of mergekit's linear merge of model-1 with a weight.
THEIRS = [
    ("random_seed: 1", "'random_seed' not supported; known are merge_method,"),
    ("merge_method: arcee_fusion", "merge_method: 'arcee_fusion' not supported; known are linear, task_arithmetic"),
    ("{merge_method: sce, base_model: base}", "models: model-1: sce: 'weight' not supported; known are"),
    ("merge_method: ties", "base_model: ties needs one, the model that the others were trained from"),
    ("models: [{model: base}]", "models: base has no weight, which linear needs for each"),
    ("base_model: base", "models: base has no weight, which linear needs for each"),
    ("models: [{path: base}]", "models: 'path' not supported; known are model, parameters"),
    ("models: [{model: {path: base}}]", "models: 'path' not supported; known are model, lora"),
    ("models: [{model: a}, {model: a}]", "models: a is given twice, of which mergekit would take one; leave one out"),
    (
        "models: [{model: base, parameters: {normalize: true}}]",
        "models: base: 'normalize' cannot differ by model; set it in `parameters`",
    ),
    ("parameters: {normalize: [true, false]}", "parameters: normalize: [True, False] must be one value, or for a"),
    ("parameters: {normalize: maybe}", "parameters: normalize: 'maybe' must be true or false"),
    ("parameters: {weight: '1'}", "parameters: weight: '1' must be a finite number"),
    ("parameters: {weight: [1, .nan]}", "parameters: weight: [1, nan] must be one value, or for a number a list"),
    (
        "parameters: {weight: [{filter: x, value: 1, t: 2}]}",
        "parameters: weight: 't' not supported; known are value, filter",
    ),
    ("out_dtype: int8", "out_dtype: 'int8' must be one of float32, bfloat16, float16"),
    ("models:", "nothing to merge; give one of models, slices and modules"),
    ("slices: [{}]", "'models', 'slices' to merge; give one of models, slices and modules"),
    ("{models: , modules: {vision: {}}}", "modules: 'vision' not supported; the module `default` is, alone"),
    ("{merge_method: slerp, models: [{model: a}, {model: b}]}", "base_model: slerp needs one, the model of the two"),
    (
        "{merge_method: slerp, models: [{model: a}, {model: b}], base_model: a}",
        "parameters: slerp needs t",
    ),
    (
        "{models: , slices: [{sources: [], residual_weight: 0.5}]}",
        "slices: 0: 'residual_weight' not supported; known are sources, base_model, parameters",
    ),
    (
        "{models: , merge_method: ties, base_model: o, slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}",
        "slices: 0: sources: the base o is not among them; list it with its layer_range",
    ),
    (
        "{models: , merge_method: ties, slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}",
        "slices: 0: base_model: ties needs one, the model that the others were trained from",
    ),
    ("{tokenizer_source: union, tokenizer: {}}", "tokenizer_source and tokenizer are both given; leave one out"),
]


@pytest.mark.parametrize(("text", "line"), [*OURS, *THEIRS])
def test_recipes_are_refused_by_name(tmp_path: Path, text: str, line: str) -> None:
    make_toys(tmp_path)
    content: dict[str, Any] = {"method": "ties", "base": "base", "models": ["model-1", "model-2"]}
    if (text, line) in THEIRS:
        content = {"merge_method": "linear", "models": [{"model": "model-1", "parameters": {"weight": 1.0}}]}
    content |= yaml.safe_load(text)
    path = write_recipe(tmp_path, **{key: value for key, value in content.items() if value is not None})
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
        "[" * 3000: "nested too deep",
    }
    texts["method: !!python/object/apply:os.system [true]"] = "could not determine a constructor"
    for text, line in texts.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(line)) as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)


def test_paths_that_leave_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, _ = make_toys(tmp_path)
    (tmp_path / "work" / "recipes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    path = write_recipe(tmp_path / "work" / "recipes", method="linear", models=["../../base"])
    line = f"model '../../base' leads to {base}, which is neither in the recipe's folder nor in the working directory"
    with pytest.raises(ValueError, match=re.escape(line)):
        load_recipe(path)
    (tmp_path / "work" / "link").symlink_to(base)
    write_recipe(tmp_path / "work" / "recipes", method="linear", models=["link"])
    with pytest.raises(ValueError, match="model 'link' leads to .*; give its absolute path"):
        load_recipe(path)
    for name in (base, "../../base"):  # in full, and with both folders within the working directory
        write_recipe(tmp_path / "work" / "recipes", method="linear", models=[name])
        assert load_recipe(path).models == (base,)
        monkeypatch.chdir(tmp_path)
    assert resolve_model("model-1") == one


def test_folders_with_a_plus_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a+b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("a+b") == str(tmp_path / "a+b")
    assert resolve_model("a+b+c") == f"{tmp_path / 'a+b'}+{tmp_path / 'c'}"
    assert resolve_model("a+c") == f"{tmp_path / 'a'}+{tmp_path / 'c'}"


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
    assert resolve_model("owner/name@v1.0+owner/lora") == f"{tmp_path}+{tmp_path}"
    with pytest.raises(ValueError, match="model 'owner/gone' is no folder and cannot be had from the hub"):
        resolve_model("owner/gone")
    assert asked == [("owner/name", None), ("owner/name", "v1.0"), ("owner/lora", None), ("owner/gone", None)]


def test_reading_a_recipe_takes_no_torch() -> None:
    """torch and transformers alone take longer to import than a plan may."""
    code = (
        "import sys; from fusion.merge import recipe, ours, mergekit, layout, methods;"
        "[methods.get_method(name).fields() for name in methods.method_names()];"
        "ours.read({'method': 'ties', 'base': 'o', 'models': ['a', {'model': 'b', 'parameters': {'weights': 2}}]});"
        "print([name for name in ('torch', 'numba', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_method_can_be_named() -> None:
    known = {"task_arithmetic", "linear", "ties", "sce", "dare_linear", "dare_ties", "della", "della_linear"}
    assert known <= set(method_names()) >= set(mergekit._RULES)


def test_a_broken_template_is_refused() -> None:
    assert chat.chosen("{% generation %}{{ a }}{% endgeneration %}", []).startswith("{%")
    with pytest.raises(ValueError, match="chat_template: it is no Jinja template"):
        chat.chosen("{% bad", [])


def test_named_chat_templates() -> None:
    jinja2 = pytest.importorskip("jinja2")
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    expected = {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "A<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
        "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n### Response:\n",
        "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]",
    }
    assert set(expected) == set(chat.NAMED)
    for name, text in expected.items():
        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat.NAMED[name])
        given = {"messages": talk, "bos_token": "<s>", "eos_token": "</s>"}
        assert template.render(**given, add_generation_prompt=True) == text
