"""From recipes and checkpoint folders to jobs: which tensors of which models become what, and what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import make_folder
from safetensors.torch import save_file
from torch import Tensor

from fusion.merge import vocabulary
from fusion.merge.checkpoint import CheckpointReader
from fusion.merge.folders import folders_of
from fusion.merge.jobs import Job, Layout, View
from fusion.merge.layers import Layers, before_layers, sliced_config
from fusion.merge.layout import lay_out
from fusion.merge.methods import get_method
from fusion.merge.records import Lines, MergeRecipe, Output, Slice, Source, Tokenizer

ROWS, WIDTH = 8, 4
STACK = "model.layers."


def tensors(seed: int, layers: int = 3, head: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model's tensors, with a head of its own or none."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        shapes |= {f"{STACK}{layer}.mlp.weight": (5, WIDTH), f"{STACK}{layer}.norm.weight": (WIDTH,)}
    if head:
        shapes["lm_head.weight"] = (ROWS, WIDTH)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def folder(path: Path, held: dict[str, Tensor], **config: Any) -> str:
    layers = 1 + max(int(name.split(".")[2]) for name in held if name.startswith(STACK))
    return str(make_folder(path, held, **{"num_hidden_layers": layers, "vocab_size": ROWS, **config}))


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A base and two models of three layers."""
    names = ("base", "one", "two")
    return [folder(tmp_path / name, tensors(seed)) for seed, name in enumerate(names)]


def by_name(made: Layout) -> dict[str, Job]:
    return {job.name: job for job in made.jobs}


def read(view: View) -> Tensor:
    out = np.empty(int(np.prod(view.shape)), np.float32)
    view.read(0, out)
    return torch.from_numpy(out).view(view.shape)


def where(view: View) -> str:
    """`FOLDER TENSOR` of a view, with what all toys have in common left out."""
    name, _, place = view.source.partition(" of ")
    return f"{Path(place).name} {name.removeprefix('model.').removesuffix('.weight')}"


def test_jobs_of_a_plain_recipe(models: list[str]) -> None:
    base, one, two = models
    recipe = MergeRecipe("task_arithmetic", base, (one, two), {"scale": 0.5, "weights": [1, 2]}, seed=7)
    made = lay_out(recipe)
    assert [job.name for job in made.jobs] == sorted(tensors(0))
    assert (made.models, made.seed, made.copy_from) == ((one, two), 7, Path(base))
    assert made.config == {"model_type": "toy", "num_hidden_layers": 3, "vocab_size": ROWS}
    job = by_name(made)[f"{STACK}1.mlp.weight"]
    assert (job.shape, job.dtype, job.method, job.order) == ((5, WIDTH), "float32", "task_arithmetic", (0, 1))
    assert (job.layer, job.layers, job.scale) == (1, 3, 1.0)
    assert job.parameters == get_method("task_arithmetic").check({"scale": 0.5, "weights": [1, 2]}, 2)
    assert job.base is not None and where(job.base) == "base layers.1.mlp"
    assert [where(view) for view in job.models] == ["one layers.1.mlp", "two layers.1.mlp"]
    # The files stay open as long as something may read them.
    assert torch.equal(read(job.models[1]), tensors(2)[job.name])
    outside = by_name(made)["model.norm.weight"]
    assert (outside.layer, outside.layers) == (None, 3)
    assert all(by_name(made)[name].parameters is job.parameters for name in tensors(0))  # checked once


def test_types_of_the_result(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tensors(0, dtype=torch.bfloat16) | {"model.norm.weight": torch.ones(WIDTH)})
    one = folder(tmp_path / "one", tensors(1, dtype=torch.float16))
    for recipe, norm, other in (
        (MergeRecipe("sce", base, (one,)), "float32", "bfloat16"),
        (MergeRecipe("linear", None, (one, base)), "float16", "float16"),
        (MergeRecipe("linear", None, (one, base), dtype="float32"), "float32", "float32"),
    ):
        jobs = by_name(lay_out(recipe))
        assert (jobs["model.norm.weight"].dtype, jobs["lm_head.weight"].dtype) == (norm, other)


def test_settings_over_layers_and_tensors(models: list[str]) -> None:
    base, one, two = models
    weights = [[{"filter": "mlp", "value": {"gradient": [1, 2, 5, 9]}}, {"value": {"gradient": [3, 4]}}], 7]
    jobs = by_name(lay_out(MergeRecipe("linear", base, (one, two), {"weights": weights, "normalize": False})))
    mlp = [jobs[f"{STACK}{layer}.mlp.weight"].parameters.weights for layer in range(3)]
    # Layer 1 of 3 is at half of the way, between the second and the third of four points.
    assert mlp == [(1, 7), (3.5, 7), (9, 7)]
    assert [jobs[f"{STACK}{layer}.norm.weight"].parameters.weights[0] for layer in range(3)] == [3, 3.5, 4]
    assert jobs["model.norm.weight"].parameters.weights == jobs["lm_head.weight"].parameters.weights == (3, 7)


def test_lines_scale_the_update(models: list[str]) -> None:
    base, *others = models
    jobs = by_name(lay_out(MergeRecipe("linear", base, tuple(others), lines=Lines(0.25, 0.5))))
    assert [jobs[f"{STACK}{layer}.mlp.weight"].scale for layer in range(3)] == [0.25, 0.5, 0.75]
    assert jobs["model.embed_tokens.weight"].scale == jobs["lm_head.weight"].scale == 0.25


def test_layers_are_counted_by_the_configuration_or_by_names() -> None:
    names = ["vision.blocks.0.w", "vision.blocks.1.w", "text.layers.0.experts.7.w", "text.layers.2.w", "proj.0.w"]
    config = {"vision_config": {"depth": 2}, "text_config": {"num_hidden_layers": 3}}
    layers = Layers(names, config)
    assert layers.stacks == {"vision.blocks.": 2, "text.layers.": 3}
    place = layers.place("text.layers.1.experts.7.w")
    assert place is not None and (place.layer, place.layers, place.height) == (1, 3, 0.5)
    assert layers.place("proj.0.w") is None and layers.place("lm_head.weight") is None
    assert Layers(names, {}).stacks == {"vision.blocks.": 2, "text.layers.": 3, "proj.": 1}
    first = ["model.embed_tokens.weight", "transformer.wte.weight", "bert.embeddings.LayerNorm.bias"]
    assert all(map(before_layers, first))
    assert not any(map(before_layers, ["model.norm.weight", "lm_head.weight", "embed_out.weight"]))


def sources(*parts: tuple[str, int, int]) -> tuple[Source, ...]:
    return tuple(Source(model, (first, end)) for model, first, end in parts)


def test_slices_stack_layers(tmp_path: Path) -> None:
    tall = folder(
        tmp_path / "tall",
        tensors(0, 4),
        layer_types=["full", "slide", "wide", "last"],
        mlp_only_layers=[1, 3],
        max_window_layers=4,
    )
    flat = folder(tmp_path / "flat", tensors(1, 2), layer_types=["own-0", "own-1"], mlp_only_layers=[])
    slices = (Slice(sources((tall, 1, 4))), Slice(sources((flat, 0, 2))), Slice(sources((tall, 0, 1)), {"scale": 2}))
    made = lay_out(MergeRecipe("passthrough", None, (tall, flat), slices=slices))
    jobs = by_name(made)
    assert [where(jobs[f"{STACK}{layer}.mlp.weight"].models[0]) for layer in range(6)] == [
        *(f"tall layers.{layer}.mlp" for layer in (1, 2, 3)),
        *(f"flat layers.{layer}.mlp" for layer in (0, 1)),
        "tall layers.0.mlp",
    ]
    assert len(jobs) == 3 + 2 * 6
    assert jobs[f"{STACK}4.norm.weight"].order == (1,) and jobs[f"{STACK}4.norm.weight"].layers == 6
    assert [jobs[f"{STACK}{layer}.norm.weight"].parameters.scale for layer in range(6)] == [1, 1, 1, 1, 1, 2]
    # The embedding is the lowest slice's, norm and head are the highest one's.
    assert jobs["model.embed_tokens.weight"].parameters.scale == 1 and jobs["lm_head.weight"].parameters.scale == 2
    assert made.config["num_hidden_layers"] == 6 and made.config["max_window_layers"] == 4
    assert made.config["layer_types"] == ["slide", "wide", "last", "own-0", "own-1", "full"]
    assert made.config["mlp_only_layers"] == [0, 2]


def test_slices_merge_layers(tmp_path: Path) -> None:
    base, one, two = (folder(tmp_path / name, tensors(seed, 4)) for seed, name in enumerate(("base", "one", "two")))
    own = [{"filter": "layers.3", "value": 5}, {"value": {"gradient": [1, 2]}}]
    slices = (
        Slice(sources((one, 0, 3), (two, 1, 4)), {"weights": [own, own]}, Source(base, (1, 4))),
        Slice(sources((two, 3, 4)), {"weights": {"gradient": [8, 9]}}),
    )
    made = lay_out(MergeRecipe("task_arithmetic", base, (one, two), slices=slices))
    jobs = by_name(made)

    def inputs(name: str) -> list[str]:
        assert jobs[name].base is not None
        return [where(view) for view in (jobs[name].base, *jobs[name].models) if view is not None]

    assert inputs(f"{STACK}2.mlp.weight") == ["base layers.3.mlp", "one layers.2.mlp", "two layers.3.mlp"]
    # Each model's settings look at its own name, and layers are counted within the slice.
    assert [jobs[f"{STACK}{layer}.mlp.weight"].parameters.weights for layer in range(4)] == [
        *((1, 1), (1.5, 1.5), (2, 5)),
        (9,),  # a slice of one layer is at the end of the way
    ]
    # Where a slice names no base it is the recipe's, at the height of the first source.
    assert inputs(f"{STACK}3.mlp.weight") == ["base layers.3.mlp", "two layers.3.mlp"]
    assert jobs["model.embed_tokens.weight"].order == (0, 1) and jobs["lm_head.weight"].order == (1,)
    assert inputs("lm_head.weight") == ["base lm_head", "two lm_head"]
    assert jobs["lm_head.weight"].parameters.weights == (8,)


def test_slices_that_cannot_be(tmp_path: Path, models: list[str]) -> None:
    _, one, two = models

    def refused(line: str, *parts: Slice, method: str = "linear") -> None:
        with pytest.raises(ValueError, match=line):
            lay_out(MergeRecipe(method, None, (one, two), slices=parts))

    refused(r"slices: \[2, 4\]: .*one has 3 layers; end at 3 at most", Slice(sources((one, 2, 4))))
    refused("task_arithmetic needs a base", Slice(sources((one, 0, 1))), method="task_arithmetic")
    refused("passthrough merges exactly 1 model, got 2", Slice(sources((one, 0, 1), (two, 0, 1)), method="passthrough"))
    held = tensors(3) | {f"{STACK}1.mlp.bias": torch.zeros(5)}
    one = folder(tmp_path / "more", held)
    refused(
        f"more has {STACK}1.mlp.bias, which .*two has not and which is no copy",
        Slice(sources((two, 0, 1), (one, 1, 2))),
    )
    refused(f"two has no {STACK}0.mlp.bias, which .*more has", Slice(sources((one, 1, 2), (two, 0, 1))))
    one = folder(tmp_path / "two-stacks", tensors(4) | {"vision.layers.2.w": torch.ones(2)})
    refused("slices: .*two-stacks has 2 stacks of layers; slices need a model with one", Slice(sources((one, 0, 1))))
    one = folder(tmp_path / "miscounted", tensors(5), num_hidden_layers=5)
    refused("slices: config.json does not state the 3 layers that the tensors' names", Slice(sources((one, 0, 1))))


def test_a_task_vector_needs_the_tensors_of_its_base(models: list[str]) -> None:
    base, one, _ = models
    output, parts = Output("task_vector"), sources((one, 0, 3), (one, 1, 2))
    whole = MergeRecipe("task_arithmetic", base, (one,), slices=(Slice(parts[:1]),), output=output)
    assert len(lay_out(whole).jobs) == len(tensors(0))
    with pytest.raises(ValueError, match=rf"task vector .* {STACK}3.mlp.weight is \(5, 4\) in it, not there in .*base"):
        lay_out(replace(whole, slices=tuple(Slice((part,)) for part in parts)))
    with pytest.raises(ValueError, match="output: needs a base"):
        replace(whole, base=None, slices=(Slice(parts[:1], base=Source(base, (0, 3))),))


def test_configurations_of_slices() -> None:
    config = {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"], "rope": [1, 2]},
        "architectures": ["X"],
    }
    assert sliced_config(config, 2, [(config, 1), (config, 1), (config, 0)]) == {
        "text_config": {"num_hidden_layers": 3, "layer_types": ["b", "b", "a"], "rope": [1, 2]},
        "architectures": ["X"],
    }
    with pytest.raises(ValueError, match=r"slices: layer_types in a config.json says nothing of layer 1"):
        sliced_config(config, 2, [({"text_config": {"num_hidden_layers": 2}}, 1)])


def test_tied_heads(tmp_path: Path) -> None:
    """A head that is the embedding again may be stored or left out; one of its own may not get lost."""
    free = folder(tmp_path / "free", tensors(0), tie_word_embeddings=False)
    tied = folder(tmp_path / "tied", tensors(1, head=False), tie_word_embeddings=True)
    again = tensors(2)
    again["lm_head.weight"] = again["model.embed_tokens.weight"].clone()
    copied = folder(tmp_path / "copied", again, tie_word_embeddings=True)
    for order in ((tied, copied), (copied, tied)):
        assert "lm_head.weight" not in by_name(lay_out(MergeRecipe("linear", None, order)))
    head = by_name(lay_out(MergeRecipe("linear", None, (free, tied))))["lm_head.weight"].models
    assert [where(view) for view in head] == ["free lm_head", "tied embed_tokens"]
    with pytest.raises(
        ValueError, match=r"free has lm_head.weight, which .*tied has not and which is no copy of the em"
    ):
        lay_out(MergeRecipe("linear", None, (tied, free)))
    untied = folder(tmp_path / "untied", tensors(1, head=False), tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"untied has no lm_head.weight, which .*free has; merge models of one"):
        lay_out(MergeRecipe("linear", None, (free, untied)))


def test_models_that_do_not_correspond(tmp_path: Path, models: list[str]) -> None:
    base, one, _ = models

    def refused(name: str, line: str, held: dict[str, Tensor], **config: Any) -> None:
        other = folder(tmp_path / name, held, **config)
        with pytest.raises(ValueError, match=line) as caught:
            lay_out(MergeRecipe("sce", base, (one, other)))
        assert "\n" not in str(caught.value)

    fewer = {name: tensor for name, tensor in tensors(3).items() if "2.mlp" not in name}
    refused("fewer", rf"fewer has no {STACK}2.mlp.weight, which .*base has; merge models of one architecture", fewer)
    more = tensors(3) | {"model.x": torch.ones(1), "model.y": torch.ones(1)}
    refused("more", "more has model.x and 1 more, which .*base has not and which is no copy", more)
    wide = tensors(3) | {"model.norm.weight": torch.ones(9)}
    refused("wide", r"model.norm.weight of .*base has shape \(4,\) and .*wide has \(9,\); merge models of one", wide)
    packed = tensors(3) | {"model.norm.weight": torch.ones(WIDTH).to(torch.float8_e4m3fn)}
    refused("packed", "model.norm.weight of .*packed is float8_e4m3fn; weights must be float32, bfloat16 or", packed)
    counted = tensors(3) | {"model.norm.weight": torch.ones(WIDTH, dtype=torch.int64)}
    refused("counted", "model.norm.weight of .*counted is int64; weights must be float32, bfloat16 or float16", counted)
    refused("rows", r"base has 8 rows in its vocabulary, .*rows 9; join them by token with", tensors(3), vocab_size=9)


def test_whole_numbers_are_copied(tmp_path: Path) -> None:
    steps = {"model.steps": torch.arange(5)}
    one = folder(tmp_path / "one", tensors(0) | steps)
    two = folder(tmp_path / "two", tensors(1) | steps)
    job = by_name(lay_out(MergeRecipe("linear", None, (one, two), dtype="float16")))["model.steps"]
    assert (job.method, job.dtype, job.order, [where(view) for view in job.models]) == (
        None,
        "int64",
        (),
        ["one steps"],
    )
    other = folder(tmp_path / "other", tensors(1) | {"model.steps": torch.arange(5) + (torch.arange(5) > 3)})
    with pytest.raises(
        ValueError, match=r"model.steps of .*one \(int64\) differs from model.steps of .*other; only fl"
    ):
        lay_out(MergeRecipe("linear", None, (one, other)))


def test_methods_get_what_they_need(models: list[str]) -> None:
    base, *others = models
    with pytest.raises(ValueError, match=r"^sce needs a base, the model that the others were trained from; name it as"):
        lay_out(MergeRecipe("sce", None, tuple(others)))
    with pytest.raises(
        ValueError, match=r"^fisher needs statistics of each model; collect them and name their folders"
    ):
        lay_out(MergeRecipe("fisher", None, tuple(others)))
    with pytest.raises(ValueError, match=r"^statistics: sce takes none; leave them out"):
        lay_out(MergeRecipe("sce", base, tuple(others), statistics=(base, base)))
    with pytest.raises(ValueError, match=r"^unknown merge method 'nope'"):
        lay_out(MergeRecipe("nope", base, tuple(others)))
    with pytest.raises(ValueError, match=r"^sce: unknown parameter density = 0.5; it takes tau, definition"):
        lay_out(MergeRecipe("sce", base, tuple(others), {"density": 0.5}))


def test_statistics_go_with_their_models(tmp_path: Path, models: list[str]) -> None:
    _, one, two = models

    def collected(name: str, held: dict[str, Tensor], kind: str = "fisher") -> str:
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "statistics.safetensors", metadata={"kind": kind})
        return str(tmp_path / name)

    known = {name: tensor.abs() for name, tensor in tensors(5).items() if "layers" in name}
    first, second = collected("first", known), collected("second", known)
    jobs = by_name(lay_out(MergeRecipe("fisher", None, (one, two), statistics=(first, second))))
    assert [where(view) for view in jobs[f"{STACK}0.mlp.weight"].statistics] == [
        "first layers.0.mlp",
        "second layers.0.mlp",
    ]
    assert jobs["model.norm.weight"].statistics == ()
    slices = (Slice(sources((two, 1, 2))), Slice(sources((one, 0, 1))))
    jobs = by_name(lay_out(MergeRecipe("fisher", None, (two, one), statistics=(second, first), slices=slices)))
    assert [where(view) for view in jobs[f"{STACK}1.mlp.weight"].statistics] == ["first layers.0.mlp"]
    assert [where(view) for view in jobs[f"{STACK}0.mlp.weight"].statistics] == ["second layers.1.mlp"]

    def refused(line: str, folder: str, method: str = "fisher") -> None:
        with pytest.raises(ValueError, match=line):
            lay_out(MergeRecipe(method, None, (one, two), statistics=(first, folder)))

    fewer = collected("fewer", {name: tensor for name, tensor in known.items() if "1.mlp" not in name})
    refused(rf"statistics: .*fewer has none of {STACK}1.mlp.weight, others have; collect all alike", fewer)
    refused("statistics: .*first holds fisher, and gram is needed; collect it", second, "regmean")
    other = collected("other", known | {f"{STACK}0.mlp.weight": torch.ones(3, 3)})
    refused(rf"{STACK}0.mlp.weight of .* has shape \(5, 4\) and .*other has \(3, 3\)", other)
    (tmp_path / "empty").mkdir()
    refused(
        "statistics: .*empty has no safetensors file; name a folder that was collected into", str(tmp_path / "empty")
    )


class Joined:
    """Stands for joined vocabularies: every embedding and head gets a row more."""

    rows, digest = ROWS + 1, "abc"

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def is_vocabulary(self, name: str, shape: tuple[int, ...], config: dict[str, Any]) -> bool:
        return shape[0] == config["vocab_size"] and len(shape) == 2

    def refuse_unknown(self, which: int, name: str, shape: tuple[int, ...]) -> None:
        assert ROWS not in shape

    def view(self, which: int, name: str, view: View) -> View:
        self.asked.append((which, name))
        return _Longer(view)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "vocab_size": self.rows}

    def files(self, out: Path) -> None:
        (out / "tokenizer.json").write_text("joined")


class _Longer:
    def __init__(self, view: View) -> None:
        self.source, self.dtype, self.shape = view.source, view.dtype, (view.shape[0] + 1, *view.shape[1:])

    def read(self, start: int, out: "np.ndarray[Any, Any]") -> None:
        raise AssertionError("a layout reads no weights")


def test_joined_vocabularies(tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = models
    joined, asked = Joined(), list[Any]()

    def join(settings: Any, checkpoints: Any, base_index: int | None, specs: list[str]) -> Joined:
        asked.append((settings, [checkpoint.folder.name for checkpoint in checkpoints], base_index, specs))
        return joined

    monkeypatch.setattr(vocabulary, "join_vocabularies", join)
    settings = Tokenizer("union", pad_to_multiple_of=3)
    made = lay_out(MergeRecipe("sce", base, (one, two), tokenizer=settings))
    assert asked == [(settings, ["base", "one", "two"], 0, [base, one, two])]
    assert sorted(joined.asked) == [
        (which, name) for which in range(3) for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert by_name(made)["lm_head.weight"].shape == (ROWS + 1, WIDTH) and made.config["vocab_size"] == ROWS + 1
    made.files(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "joined"
    before = made.digest
    joined.digest = "abd"
    assert lay_out(MergeRecipe("sce", base, (one, two), tokenizer=settings)).digest != before
    # A base that is one of the models: its rows stand in for others', and its files are taken.
    recipe = MergeRecipe("linear", None, (one, two), reference=two, tokenizer=settings)
    made = lay_out(recipe)
    assert made.copy_from == Path(two) and asked[-1][1:3] == (["two", "one"], 0)
    joined.asked.clear()
    lay_out(MergeRecipe("linear", None, (one, two), tokenizer=settings))
    assert asked[-1][2] is None
    with pytest.raises(ValueError, match="statistics: they have no rows for a joined vocabulary"):
        lay_out(MergeRecipe("fisher", None, (one,), tokenizer=settings, statistics=(one,)))


def test_vocabularies_are_joined_by_token(tmp_path: Path) -> None:
    def with_tokens(name: str, seed: int, tokens: str) -> str:
        held = {key: tensor for key, tensor in tensors(seed, head=False).items() if "embed" not in key}
        embedding = torch.arange(len(tokens))[:, None] + torch.full((len(tokens), WIDTH), 10.0 * seed)
        made = folder(tmp_path / name, held | {"model.embed_tokens.weight": embedding}, vocab_size=len(tokens))
        model = {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": []}
        (Path(made) / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
        return made

    base, one, two = (with_tokens(*given) for given in (("base", 1, "abc"), ("one", 2, "cab"), ("two", 3, "adbe")))
    with pytest.raises(ValueError, match="join them by token with `tokenizer: {source: union}`"):
        lay_out(MergeRecipe("sce", base, (one, two)))
    made = lay_out(MergeRecipe("sce", base, (one, two), tokenizer=Tokenizer("base")))
    job = by_name(made)["model.embed_tokens.weight"]
    assert job.base is not None and job.shape == (3, WIDTH) and made.config["vocab_size"] == 3
    # Rows of a, b and c; the last model has no c and takes the base's.
    assert [read(view)[:, 0].tolist() for view in (job.base, *job.models)] == [[10, 11, 12], [21, 22, 20], [30, 32, 12]]
    job = by_name(lay_out(MergeRecipe("linear", None, (base, two), tokenizer=Tokenizer())))["model.embed_tokens.weight"]
    assert [read(view)[:, 0].tolist() for view in job.models] == [[10, 11, 12, 31, 33], [30, 32, 12, 31, 33]]


def test_tokenizers_of_the_same_bytes_are_not_read(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(vocabulary, "join_vocabularies", lambda *given: asked.append(given[3]))
    base, one, two = models
    for model in models:
        (Path(model) / "tokenizer.model").write_text("whatever this is")
        (Path(model) / "tokenizer_config.json").write_text(model)
    recipe = MergeRecipe("sce", base, (one, two))
    lay_out(recipe)
    assert asked == []
    (Path(two) / "tokenizer.model").write_text("whatever that is")
    lay_out(recipe)
    assert asked == [[base, two]]


def test_chat_templates(tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = (Path(model) for model in models)
    monkeypatch.setattr(vocabulary, "join_vocabularies", lambda *_: None)
    out = tmp_path / "out"
    out.mkdir()

    def written(setting: str) -> str | None:
        lay_out(MergeRecipe("sce", str(base), (str(one), str(two)), chat_template=setting)).files(out)
        return (out / "chat_template.jinja").read_text() if (out / "chat_template.jinja").is_file() else None

    assert written("auto") is None
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ base }}"}))
    (one / "chat_template.jinja").write_text("{{ most }}\n")
    (two / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ most }}"}]}
        )
    )
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ base }}"}))
    assert written("auto") == "{{ most }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    assert "<|im_start|>" in str(written("chatml"))
    assert written("{{ own }}") == "{{ own }}"
    with pytest.raises(
        ValueError, match=r"chat_template: 'vicuna' must be auto, chatml, llama3, .* or a Jinja template"
    ):
        written("vicuna")


def test_the_digest_is_of_all_that_decides_the_result(models: list[str]) -> None:
    base, one, two = models
    recipe = MergeRecipe("sce", base, (one, two), {"tau": 0.5})
    first = lay_out(recipe).digest
    assert lay_out(recipe).digest == first
    others = [
        MergeRecipe("sce", base, (two, one), {"tau": 0.5}),
        MergeRecipe("sce", base, (one, two), {"tau": 0.25}),
        MergeRecipe("sce", base, (one, two), {"tau": 0.5}, "float16"),
        MergeRecipe("sce", base, (one, two), {"tau": 0.5}, seed=1),
        MergeRecipe("sce", base, (one, two), {"tau": 0.5}, lines=Lines(1, 0.5)),
        MergeRecipe("sce", base, (one, two), {"tau": 0.5}, chat_template="chatml"),
    ]
    assert len({first, *(lay_out(other).digest for other in others)}) == 1 + len(others)
    path = Path(two) / "model.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert lay_out(recipe).digest != first


def test_models_are_opened_once_and_closed(models: list[str]) -> None:
    base, one, _ = models
    opened: list[str] = []
    closed: list[str] = []

    class Watched(CheckpointReader):
        def close(self) -> None:
            closed.append(self.folder.name)
            super().close()

    def open_model(spec: str) -> CheckpointReader:
        opened.append(Path(spec).name)
        return Watched(spec)

    made = lay_out(MergeRecipe("linear", base, (one, base, one)), open_model)
    assert opened == ["base", "one"] and sorted(closed) == opened
    assert [where(view) for view in by_name(made)["lm_head.weight"].models] == [
        f"{n} lm_head" for n in ("one", "base", "one")
    ]
    assert by_name(made)["lm_head.weight"].order == (0, 1, 2)
    closed.clear()
    with pytest.raises(ValueError, match="unknown parameter"):
        lay_out(MergeRecipe("linear", base, (one,), {"tau": 1}), open_model)
    assert sorted(closed) == ["base", "one"]


def test_folders_of_a_name_with_changes(tmp_path: Path) -> None:
    for name in ("a", "a+b", "c"):
        (tmp_path / name).mkdir()
    base, change = str(tmp_path / "a+b"), str(tmp_path / "c")
    assert folders_of(f"{base}+{change}") == [Path(base), Path(change)]
    assert folders_of(base) == [Path(base)] and folders_of("owner/gone") == []


def test_names_are_looked_for_in_constant_time(tmp_path: Path) -> None:
    """Thousands of experts are planned at once."""
    held = {f"{STACK}{layer}.experts.{k}.w": torch.ones(1) for layer in range(4) for k in range(800)}
    one = folder(tmp_path / "one", held)
    slices = (Slice(sources((one, 0, 4), (one, 0, 4))),)
    for recipe in (MergeRecipe("linear", one, (one, one)), MergeRecipe("linear", None, (one,), slices=slices)):
        assert len(lay_out(recipe).jobs) == 3200
