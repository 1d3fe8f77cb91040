"""Methods whose loops are compiled: on the CPU they merge bfloat16 without torch, to the same bytes as beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging import make_folder, near
from tiny import ROOT

from fusion.merge.engine import merge, plan
from fusion.merge.methods import get_method, method_names
from fusion.merge.recipe import MergeRecipe

RECIPES = [
    ("linear", {"weights": [0.3, 0.7]}),
    ("metrics", {"metrics": [1.0, 3.0]}),
    ("task_arithmetic", {"scale": 0.5}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "trim": "model", "rescale": "norm", "election": "count"}),
    *((name, {"density": 0.4, "rescale": how}) for name in ("dare_linear", "dare_ties") for how in ("norm", "paper")),
    *((name, {"density": 0.4, "rescale": how}) for name in ("della", "della_linear") for how in ("norm", "paper")),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.05}),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.05, "rescale": "norm"}),
]
CODE = """
import json, sys
from fusion.merge.engine import merge, plan
from fusion.merge.recipe import MergeRecipe
folder, recipes = sys.argv[1], json.loads(sys.argv[2])
for number, (method, parameters) in enumerate(recipes):
    recipe = MergeRecipe(method, f"{folder}/base", (f"{folder}/one", f"{folder}/two"), parameters, seed=3)
    merge(plan(recipe), f"{folder}/alone-{number}")
    assert "torch" not in sys.modules, method
"""


def test_every_method_that_says_so_is_tried() -> None:
    assert {name for name in method_names() if get_method(name).compiled} == {name for name, _ in RECIPES}


def test_the_same_bytes_without_torch(tmp_path: Path) -> None:
    shapes = {"a.weight": (700, 500), "b.weight": (40, 30), "b.norm": (64,)}
    tensors = {name: near(2, shape, seed, torch.bfloat16) for seed, (name, shape) in enumerate(shapes.items())}
    for place, folder in enumerate(("base", "one", "two")):
        make_folder(tmp_path / folder, {name: those[place] for name, those in tensors.items()})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, str(tmp_path), json.dumps(RECIPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for number, (method, parameters) in enumerate(RECIPES):
        folders = str(tmp_path / "base"), (str(tmp_path / "one"), str(tmp_path / "two"))
        merge(plan(MergeRecipe(method, *folders, parameters, seed=3)), tmp_path / f"beside-{number}")
        alone, beside = (tmp_path / f"{how}-{number}" / "model.safetensors" for how in ("alone", "beside"))
        assert alone.read_bytes() == beside.read_bytes(), (method, parameters)
        assert alone.read_bytes() != (tmp_path / "base/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_and_what_does_not_fit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Written as torch rounds it, to the even one of two; the largest number fits, and what rounds past it does not."""
    most = torch.finfo(torch.bfloat16).max
    x = torch.tensor([1 + 2.0**-9, 1 + 3 * 2.0**-9, -(2.0**-133), 0.0, -0.0, most])
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-126, -1e-40, 3.0, -most]
    y = torch.tensor(values).to(torch.bfloat16)
    if dtype == torch.float16:
        x, y = x[:-1], y[:-1]
    for name, tensor in (("one", x), ("two", y)):
        make_folder(tmp_path / name, {"w": tensor.to(dtype)})
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    parameters = {"weights": [0.5, 0.25], "normalize": False}
    merge(plan(MergeRecipe("linear", None, folders, parameters, "bfloat16")), tmp_path / "out")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out/model.safetensors")["w"]
    expected = (x.to(dtype).double() * 0.5 + y.to(dtype).double() * 0.25).float().to(torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    with pytest.raises(ValueError, match="w: the merged weights do not fit bfloat16; set dtype: float32"):
        parameters = (
            {"weights": [1.0, -1.0], "normalize": False} if dtype != torch.float16 else {"weights": [3e38, 3e38]}
        )
        chosen = {**parameters, "normalize": False}
        merge(plan(MergeRecipe("linear", None, folders, chosen, "bfloat16")), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_equal_models_come_back_bit_for_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = torch.tensor([-0.0, 0.0, 1.0, -(2.0**-130), 3.0])
    for name in ("one", "two"):
        make_folder(tmp_path / name, {"w": values.bfloat16()})
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    merge(plan(MergeRecipe("linear", None, folders, {}, None)), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    assert torch.equal(found.view(torch.int16), values.bfloat16().view(torch.int16))


def test_weights_whose_products_are_beyond_float32_are_reported(tmp_path: Path) -> None:
    """The report's sums are in float32; where these are too small for them they are taken again in float64."""
    size = 300_000  # two blocks
    tensors = {"base": torch.full((size,), -1e38), "one": torch.full((size,), 1e38), "two": torch.full((size,), -1e38)}
    for name, tensor in tensors.items():
        make_folder(tmp_path / name, {"w": tensor.bfloat16()})
    folders = str(tmp_path / "base"), (str(tmp_path / "one"), str(tmp_path / "two"))
    (report,) = merge(plan(MergeRecipe("task_arithmetic", *folders, {"weights": [0.5, 0.5]})), tmp_path / "out")
    apart = 2 * float(torch.tensor(1e38).bfloat16())
    assert report.gram[0][0] == pytest.approx(size * apart**2) and report.gram[1] == (0.0, 0.0)
    json.dumps(report.to_json(), allow_nan=False)


def test_a_closed_output_is_no_failure(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_folder(tmp_path / name, {"w": torch.ones(4).bfloat16()})
    (tmp_path / "r.yaml").write_text(f"method: linear\nmodels: [{tmp_path}/one, {tmp_path}/two]\n")
    command = f"exec {sys.executable} {ROOT}/launch/merge.py {tmp_path}/r.yaml {tmp_path}/out >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=120).returncode == 0
    assert (tmp_path / "out/model.safetensors").exists()
