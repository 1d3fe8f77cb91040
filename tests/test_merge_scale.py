"""How far to go along a merged update: given, or as the validation samples say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import artifact, load, samples, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.artifact import Artifact
from fusion.config import Config, Dataset, Distill, Merge, Model, Prepare
from fusion.corpus import Corpus, write_samples
from fusion.measure import Reading, bits_per_byte, read
from fusion.merge import stage
from fusion.merge.contribution import POWERS, choose, search_power, shares, surely
from fusion.merge.scales import Scales, alike, search


@pytest.mark.parametrize(
    ("start", "slope", "bend", "found"),
    [
        (2.0, -1.0, 1.0, 0.5),
        (2.0, -1.2, 1.0, 0.6),
        (2.0, -2.0, 1.0, 1.0),
        (2.0, -2.5, 1.0, 1.25),
        (2.0, -9.0, 1.0, 2.0),  # no further than twice
        (2.0, -1.0, 0.0, 2.0),
        (2.0, -1.0, -0.1, 2.0),
        (2.0, 1.0, 1.0, 0.1),  # worse at once: as little as may be
        (2.0, 1.0, -0.1, 0.1),
    ],
)
def test_the_least_of_a_parabola_for_all_weights_alike(start: float, slope: float, bend: float, found: float) -> None:
    scales, tried = search(lambda s: start + slope * (mean := (s.layers + s.outside) / 2) + bend * mean * mean)
    assert {alike(s) for s in (0.0, 0.5, 1.0, found)} <= set(tried) and len(tried) <= 10
    assert tried[scales] <= tried[alike(found)]


def test_layers_and_what_is_outside_of_them_go_as_far_as_suits_each() -> None:
    scales, tried = search(lambda s: 2 + (s.layers - 0.9) ** 2 + 2 * (s.outside - 0.6) ** 2)
    assert scales == Scales(0.9, 0.6) and len(tried) == 10
    assert list(tried)[:4] == [alike(0.0), alike(0.5), alike(1.0), alike(0.7)]


def test_no_part_goes_further_than_may_be_tried() -> None:
    far, tried = search(lambda s: 5 - s.layers - s.outside)
    assert far == alike(2.0) == max(tried, key=lambda s: s.layers + s.outside)
    near, tried = search(lambda s: 1 + s.layers + s.outside)
    assert near == alike(0.1) and min(min(s.layers, s.outside) for s in tried if s != alike(0)) == 0.1


def test_a_model_of_one_part_is_looked_at_as_a_whole() -> None:
    scales, tried = search(lambda s: (s.layers - 0.7) ** 2, apart=False)
    assert scales == alike(0.7) and set(tried) == {alike(s) for s in (0.0, 0.5, 0.7, 1.0)}


def test_what_is_measured_decides_where_the_loss_is_no_parabola() -> None:
    losses = {0.0: 2.0, 0.5: 1.9, 1.0: 1.95, 0.58: 1.91}
    scales, tried = search(lambda s: losses[s.layers] if s == alike(s.layers) else 1.99)
    assert scales == alike(0.5) and {alike(s): bits for s, bits in losses.items()}.items() <= tried.items()


def test_a_figure_that_is_no_number_never_wins() -> None:
    nan, inf = float("nan"), float("inf")

    def told(losses: dict[float, float]) -> Scales:
        return search(lambda s: losses[s.layers] if s == alike(s.layers) else nan)[0]

    assert told({0.0: 2.0, 0.5: nan, 1.0: 1.9, 0.1: 1.95}) == alike(1.0)
    assert told({0.0: 2.0, 0.5: 2.1, 1.0: inf, 0.1: 2.05}) == alike(0.1)
    with pytest.raises(ValueError, match=r"^merge\.scale: no merged model has finite bits .*'0.5': inf"):
        search(lambda s: 2.0 if s == alike(0) else inf)


@pytest.mark.parametrize("scale", [0, -1, 5, "half", True, float("nan"), [0.5], [0, 0], [0.5, 5], [1, 1, 1], [1, "a"]])
def test_a_scale_that_will_not_do(tmp_path: Path, scale: Any) -> None:
    holds = tree(tmp_path, tmp_path, {"a": tmp_path}, merge={"method": "sce", "scale": scale})
    with pytest.raises(ValueError, match=r"merge\.scale: .* will not do[;:] .*") as told:
        load(tmp_path, holds)
    assert "union" not in str(told.value) and "constrained" not in str(told.value)


@pytest.fixture
def models(tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: Any) -> tuple[Path, list[Path], Path]:
    """A pivot; targets on both sides of a model that reads the samples better, three times as far away; the samples."""
    pivot = tiny_llama(tmp_path / "pivot", byte_level_tokenizer, seed=1, initializer_range=0.05)
    tokenizer, model = AutoTokenizer.from_pretrained(pivot), AutoModelForCausalLM.from_pretrained(pivot)
    prepared = tmp_path / "prepared"
    validation = samples(16, seed=4)
    write_samples(prepared / "validation.parquet", validation)
    write_samples(prepared / "train.parquet", samples(4, seed=5))
    steps = torch.optim.SGD(model.parameters(), lr=0.3 / len(validation))
    for _ in range(4):
        for sample in validation:
            ids = torch.tensor([tokenizer(str(sample.text))["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    start, better = load_file(pivot / "model.safetensors"), model.state_dict()
    targets = []
    torch.manual_seed(0)
    noise = {name: 0.01 * torch.randn_like(weight) for name, weight in start.items()}
    for n, sign in enumerate((1, -1)):
        folder = tmp_path / f"target-{n}"
        shutil.copytree(pivot, folder / "model")
        moved = {k: w + 3 * (better[k] - w) + sign * noise[k] for k, w in start.items()}
        save_file(moved, folder / "model/model.safetensors", metadata={"format": "pt"})
        targets.append(folder)
    return pivot, targets, prepared


def run(
    models: tuple[Path, list[Path], Path], root: Path, merge: Merge, out: Artifact | None = None
) -> tuple[dict[str, Any], Path]:
    pivot, targets, prepared = models
    sources = tuple(Model("none", name=name) for name in ("a", "b"))
    model = Model(str(pivot), "pivot", dtype="float32")
    config = Config(
        "small",
        model,
        sources,
        Prepare((Dataset("none.jsonl"),)),
        distill=Distill("pairwise", control=False),
        merge=merge,
    )
    inputs = {"pivot": pivot, "prepare": prepared, **{f"target/{n}": t for n, t in zip("ab", targets, strict=True)}}
    out = out or artifact(root, "merge")
    return stage.run(config, inputs, out), out.folder


@pytest.mark.parametrize("method", ["linear", "sce"])
def test_validation_samples_choose_the_scale(models: Any, tmp_path: Path, method: str) -> None:
    parameters: dict[str, Any] = {"tau": 1.0} if method == "sce" else {}
    facts, out = run(models, tmp_path / "auto", Merge(method, parameters, weights="alike"))
    tried = {Scales(layers, outside): bits for layers, outside, bits in facts["bits by scale"]}
    chosen = Scales(facts["scale"], facts["scale outside of layers"])
    assert {alike(s) for s in (0.0, 0.5, 1.0)} < set(tried) and 0.1 < chosen.outside < 1
    assert min(tried, key=tried.__getitem__) == chosen
    model = Model(str(out / "model"), "fused", dtype="float32")
    bits = bits_per_byte(model, out / "model", list(Corpus(models[2], "validation")), 4096)
    assert sum(bits.values()) / len(bits) == pytest.approx(tried[chosen], rel=1e-6)
    assert sorted(path.name for path in out.iterdir()) == ["model", "work"]  # what was tried is gone
    given, again = run(models, tmp_path / "given", Merge(method, parameters, scale=0.625, weights="alike"))
    assert "bits by scale" not in given and given["scale"] == given["scale outside of layers"] == 0.625
    name = "model/model.safetensors"
    start, auto, end = (load_file(path) for path in (models[0] / "model.safetensors", out / name, again / name))
    whole = load_file(run(models, tmp_path / "whole", Merge(method, parameters, scale=1.0, weights="alike"))[1] / name)
    for key, weight in whole.items():
        far = chosen.layers if ".layers." in key else chosen.outside
        torch.testing.assert_close(auto[key], start[key] + far * (weight - start[key]))
        torch.testing.assert_close(end[key], start[key] + 0.625 * (weight - start[key]))
    json.dumps(facts)


def test_without_validation_samples_all_of_the_update(models: Any, tmp_path: Path) -> None:
    pivot, targets, _ = models
    write_samples(tmp_path / "empty/validation.parquet", [])
    write_samples(tmp_path / "empty/train.parquet", samples(4))
    facts, out = run((pivot, targets, tmp_path / "empty"), tmp_path / "auto", Merge("linear"))
    assert facts["scale"] == 1.0 and (out / "model/config.json").exists()


def test_leftovers_of_a_run_that_was_cut_off_are_no_hindrance(models: Any, tmp_path: Path) -> None:
    out = artifact(tmp_path, "merge")
    first, folder = run(models, tmp_path, Merge("linear"), out)
    (folder / "tries/0.5-0.5").mkdir(parents=True)
    (folder / "tries/0.5-0.5/model.safetensors").write_text("half of it")
    again, _ = run(models, tmp_path, Merge("linear"), out)
    assert again == first and not (folder / "tries").exists()


@pytest.mark.parametrize(("weights", "cut"), [("alike", 2), ("alike", 5), ("alike", 9), ("auto", 2), ("auto", 7)])
def test_a_run_that_was_cut_off_measures_the_rest_alone(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, cut: int
) -> None:
    measured: list[str] = []

    def counted(model: Model, *rest: Any) -> Reading:
        measured.append(model.model)
        if len(measured) == cut + 1:
            raise KeyboardInterrupt
        return read(model, *rest)

    merge = Merge("linear", weights=weights)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "read", lambda *given: measured.append("") or read(*given))
        whole, undisturbed = run(models, tmp_path / "whole", merge)
    needed = len(measured)
    assert needed == len(whole["bits by scale"]) or weights == "auto"
    measured.clear()
    monkeypatch.setattr(stage, "read", counted)
    out = artifact(tmp_path, "merge")
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path, merge, out)
    again, folder = run(models, tmp_path, merge, out)
    assert again == whole and len(measured) == needed + 1
    shutil.rmtree(folder / "work")  # as the pipeline does
    assert sorted(path.name for path in folder.iterdir()) == ["model"]
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_target_counts_by_what_it_gains(models: Any, tmp_path: Path) -> None:
    pivot, (good, other), prepared = models
    start = load_file(pivot / "model.safetensors")
    file = other / "model/model.safetensors"
    torch.manual_seed(3)  # as far from the pivot as the other, and nowhere
    save_file({k: w + 0.05 * torch.randn_like(w) for k, w in start.items()}, file, metadata={"format": "pt"})
    facts, out = run((pivot, [good, other], prepared), tmp_path / "auto", Merge("linear"))
    alike_facts, _ = run((pivot, [good, other], prepared), tmp_path / "alike", Merge("linear", weights="alike"))
    assert facts["weights"] == [1.0, 0.0] and "weights" not in alike_facts
    bits = [min(bits for _, _, bits in told["bits by scale"]) for told in (facts, alike_facts)]
    assert bits[0] < bits[1]
    model = Model(str(out / "model"), "fused", dtype="float32")
    found = bits_per_byte(model, out / "model", list(Corpus(prepared, "validation")), 4096)
    assert sum(found.values()) / len(found) == pytest.approx(bits[0], rel=1e-6)
    assert sorted(path.name for path in out.iterdir()) == ["model", "work"]
    by_hand = Merge("linear", {"weights": [1.0, 0.0]}, scale=[facts["scale"], facts["scale outside of layers"]])
    told, again = run((pivot, [good, other], prepared), tmp_path / "given", by_hand)
    assert "weights" not in told and "bits by scale" not in told
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()


def test_targets_that_gain_nearly_the_same(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that differ in their last digits are tries of their own."""
    known = read

    def nearly(model: Model, folder: Path, *rest: Any) -> Reading:
        found, target = known(model, folder, *rest), folder.parent.name
        if not target.startswith("target-"):
            return found
        return replace(found, nats=found.sizes * (0.5 if target == "target-0" else 0.5000001))

    monkeypatch.setattr(stage, "read", nearly)
    facts, _ = run(models, tmp_path / "run", Merge("linear"))
    assert sum(facts["weights"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "held", ["", "{", '{"a": 1}', "[1, 2]", "[[1], [[[], 1, 1, [1]]]]", "[[1, 2], [[[], 1, [2]]]]"]
)
def test_a_memory_that_cannot_be_read_is_none(models: Any, tmp_path: Path, held: str) -> None:
    whole, _ = run(models, tmp_path / "whole", Merge("linear"))
    out = artifact(tmp_path, "merge")
    (out.folder / "work").mkdir(parents=True)
    (out.folder / "work/tried.json").write_text(held)
    assert run(models, tmp_path, Merge("linear"), out)[0] == whole


def test_a_given_scale_and_measured_weights(models: Any, tmp_path: Path) -> None:
    facts, _ = run(models, tmp_path / "run", Merge("linear", scale=0.5))
    assert facts["scale"] == 0.5 and sum(facts["weights"]) == pytest.approx(1)
    assert [[layers, outside] for layers, outside, _ in facts["bits by scale"]] == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("gains", "power", "wanted"),
    [
        ([0.2, 0.1], 0.0, (0.5, 0.5)),
        ([0.2, 0.1], 1.0, (2 / 3, 1 / 3)),
        ([0.2, 0.1, -0.3], 2.0, (0.8, 0.2, 0.0)),
        ([-0.2, -0.1], 4.0, (0.5, 0.5)),  # none gains anything
        ([1e-200, 0.5e-200], 16.0, (1 / (1 + 2**-16), 2**-16 / (1 + 2**-16))),
        ([float("-inf"), 0.1], 1.0, (0.0, 1.0)),
        ([0.2, 0.1999, -0.1], float("inf"), (1.0, 0.0, 0.0)),
    ],
)
def test_weights_by_gains(gains: list[float], power: float, wanted: tuple[float, ...]) -> None:
    assert shares(gains, power) == pytest.approx(wanted)


@pytest.mark.parametrize("best", [0.0, 1.0, 4.0, 16.0])
def test_the_power_that_measures_best(best: float) -> None:
    asked: list[float] = []

    def measure(power: float, scales: Scales) -> float:
        asked.append(power)
        return abs(POWERS.index(power) - POWERS.index(best)) + (scales.layers - 1.1 + power / 50) ** 2

    power, scales, tried = search_power(measure, None)
    assert power == best and tried[scales] == min(tried.values())
    assert abs(scales.layers - 1.1 + power / 50) < 0.02 and len(asked) <= 22
    assert search_power(measure, alike(0.7))[:2] == (best, alike(0.7))


@pytest.mark.parametrize(
    ("layers", "outside", "noise", "chosen"),
    [
        (0.9, 0.6, 9.0, Scales(0.9, 0.6)),  # less is taken as measured
        (1.4, 1.2, 0.15, Scales(1.4, 1.2)),  # 0.18 better than all of it
        (1.4, 1.2, 0.2, alike(1)),
        (1.4, 0.6, 0.3, alike(1)),  # nothing that goes no further was tried and is better
    ],
)
def test_what_goes_further_than_all_of_the_update_has_to_be_surely_better(
    layers: float, outside: float, noise: float, chosen: Scales
) -> None:
    def measure(weights: tuple[float, ...], scales: Scales) -> float:
        return 2 + (scales.layers - layers) ** 2 + 0.5 * (scales.outside - outside) ** 2

    def lead(weights: tuple[float, ...], scales: Scales, others: Scales) -> tuple[float, float]:
        return measure(weights, others) - measure(weights, scales), noise

    for alone in ([], [1.9, 1.8]):
        assert choose(measure, alone, None, lead)[1] == chosen
        assert choose(measure, alone, alike(0.5), lead)[1] == alike(0.5)  # what is given is taken


def test_of_what_is_surely_better_the_best() -> None:
    tried = {alike(0.0): 2.0, alike(0.5): 1.8, alike(1.0): 1.6, alike(1.2): 1.5, alike(1.5): 1.3, alike(1.7): 1.4}
    noise = {alike(1.2): 0.0, alike(1.5): 0.4, alike(1.7): 0.1}
    found = surely(tried, lambda scales, whole: (tried[whole] - tried[scales], noise[scales]))
    assert found == (alike(1.7), (alike(1.5), pytest.approx(0.3), 0.4))


def test_weights_for_all_of_the_update_are_searched_with_all_of_it() -> None:
    """Far along, an average of both is best, and that may be noise; all of the update is best of the first alone."""

    def measure(weights: tuple[float, ...], scales: Scales) -> float:
        first = weights[0] if weights else 0.5
        return 1.5 + 0.3 * (scales.layers - 1.5) ** 2 + 0.2 * abs(first - (0.6 if scales.layers > 1.2 else 1.0))

    weights, scales, _, refused = choose(measure, [1.6, 1.7], None, lambda *_: (0.1, 0.0))
    assert refused is None and weights[0] == pytest.approx(0.6, abs=0.1) and scales.layers > 1.2
    weights, scales, tried, refused = choose(measure, [1.6, 1.7], None, lambda *_: (0.1, 1.0))
    assert refused is not None and refused.scales.layers > 1.2  # told, though measured with other weights
    assert weights[0] == pytest.approx(1.0, abs=0.1) and scales == alike(1) and scales in tried


def test_all_of_an_update_that_is_no_number_is_not_taken() -> None:
    def measure(weights: tuple[float, ...], scales: Scales) -> float:
        return float("inf") if scales.layers > 0.9 else 2 - scales.layers

    _, scales, *_ = choose(measure, [], None, lambda *_: (float("nan"), float("nan")))
    assert scales.layers <= 0.9


def test_few_samples_of_which_each_wants_something_else(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Reading] = []
    said: list[str] = []
    monkeypatch.setattr(stage.tracking, "say", said.append)

    def noisy(model: Model, folder: Path, *rest: Any) -> Reading:
        """Half of the samples want to go far along, the others by a little less not at all."""
        found, parts = read(model, folder, *rest), folder.name.split("-")
        asked.append(found)
        far = sum(map(float, parts)) / 2 if folder.parent.name == "tries" else 0.0
        wants = np.where(np.arange(len(found.nats)) % 2, 9.0, -8.0)
        return replace(found, nats=found.sizes * (20 - far * wants * (1 - 0.2 * far)))

    monkeypatch.setattr(stage, "read", noisy)
    facts, out = run(models, tmp_path / "auto", Merge("linear", weights="alike"))
    assert max(facts["scale"], facts["scale outside of layers"]) == 1.0 and len(asked) > 4
    best = min(facts["bits by scale"], key=lambda told: told[2])
    assert max(best[:2]) > 1
    assert facts["why not another scale"].startswith(f"{Scales(*best[:2])} measures ")
    chosen = Scales(facts["scale"], facts["scale outside of layers"])
    assert said == [f"merge.scale: {facts['why not another scale']}: {chosen} is taken"]
    given = Merge("linear", scale=[chosen.layers, chosen.outside], weights="alike")
    _, whole = run(models, tmp_path / "whole", given)
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_found_can_be_given(models: Any, tmp_path: Path) -> None:
    facts, found = run(models, tmp_path / "auto", Merge("linear", weights="alike"))
    scales = [facts["scale"], facts["scale outside of layers"]]
    assert scales[0] != scales[1]
    _, again = run(models, tmp_path / "given", Merge("linear", scale=scales, weights="alike"))
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (found / name).read_bytes()
