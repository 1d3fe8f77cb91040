"""Training itself: however a step is shared out, and wherever it was cut off, the target is the same.

Trainings run under the launcher, several in one process group (trainings.py).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, free_port, samples
from trainings import validation_samples
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion.distill.checkpoint import LAYOUT
from fusion.distill.divergence import Objective
from fusion.distill.model import fuse_head, shape_of
from fusion.distill.trainer import FusionTrainer
from fusion.distill.validation import Validation
from fusion.tokens.render import Renderer

STEPS = 14  # 26 samples, 4 a step, 2 epochs
BETWEEN = {"per_rank": 1, "packing": "none", "gradient_checkpointing": True, "workers": 1}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "zero0": {"zero": "zero0.json"},
    "zero2": {"zero": "zero2.json"},
    "zero3": {"zero": "zero3.json"},
    "offloaded2": {},
    "offloaded3": {},
    "one-by-one": BETWEEN,
    "flat": {"packing": "flat"},
}
LORA = {"lora": {"rank": 4}, "learning_rate": 0.02}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "low": {"dtype": "bfloat16"},
    "lora2": LORA,
    "lora3": {**LORA, "zero": "zero3.json"},
    "frozen2": {"freeze_embeddings": True, "gradient_checkpointing": True},
    "frozen3": {"freeze_embeddings": True, "zero": "zero3.json"},
    "poisoned": {"poisoned": 5},
    "burst": {"burst_at": 4, "save_steps": 2, "zero": "zero0.json"},
    "no-norm": {"no_norm_at": 3, "save_steps": 2},
}
ALONE: Mapping[str, Mapping[str, Any]] = {
    **{name: WAYS[name] for name in ("zero0", "zero2", "zero3", "one-by-one")},
    "low": OTHERS["low"],
    "lora2": LORA,
    "frozen2": {"freeze_embeddings": True},
    "wild": {"pivot": "zero2", "label_weight": 0.0, "learning_rate": 0.01},
    "last": {"pivot": "zero2", "label_weight": 0.0, "learning_rate": 0.01, "keep": "last"},
    "once": {"epochs": 1.5, "save_steps": 4},
    "again": {"epochs": 1.5, "save_steps": 4, "work": "once"},
    "spread": {"gate_level": "token", "label_schedule": "confidence", "divergence": "jsd", "average": "samples"},
}

Run = Callable[..., int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(folder, ranks, ways): trains under the launcher; the exit status."""

    def start(folder: Path, ranks: int, ways: Mapping[str, Mapping[str, Any]]) -> int:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
        told = [f"{name}={json.dumps(dict(way))}" for name, way in ways.items()]
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        log = folder / "log"
        with log.open("w") as out:
            return subprocess.run(
                [*launcher, "--master_port", str(free_port()), str(ROOT / "tests/trainings.py"), str(folder), *told],
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                cwd=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=600,
            ).returncode

    return start


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: Any, tiny_llama: Any) -> Path:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("pivot"), byte_level_tokenizer)
    return folder


def made(folder: Path, pivot: Path) -> Path:
    folder.mkdir()
    shutil.copytree(pivot, folder / "pivot")
    return folder


def without_compiling(folder: Path, stage: int) -> str:
    """The shipped settings for an optimizer on the CPU, with torch's Adam: DeepSpeed's takes minutes to compile."""
    told = json.loads((ROOT / f"configs/deepspeed/zero{stage}_offload.json").read_text())
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    told["optimizer"]["params"]["torch_adam"], told["zero_force_ds_cpu_optimizer"] = True, False
    path = folder / f"offloaded{stage}.json"
    path.write_text(json.dumps(told))
    return str(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pivot: Path, run: Run) -> Path:
    folder = made(tmp_path_factory.mktemp("one") / "rank", pivot)
    assert run(folder, 1, ALONE) == 0, (folder / "log").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, pivot: Path, run: Run) -> Path:
    folder = made(tmp_path_factory.mktemp("two") / "ranks", pivot)
    ways = {name: dict(way) for name, way in {**WAYS, **OTHERS}.items()}
    for stage in (2, 3):
        ways[f"offloaded{stage}"]["zero"] = without_compiling(folder, stage)
    assert run(folder, 2, ways) == 0, (folder / "log").read_text()[-3000:]
    return folder


def told(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def curve(folder: Path, name: str, of: str = "loss") -> list[float]:
    return [float(entry[of]) for entry in told(folder, name)["history"] if of in entry]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file)


def far(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between any two weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "zero2"])
def test_one_curve_whatever_divides_the_work(together: Path, name: str) -> None:
    assert curve(together, name) == pytest.approx(curve(together, "zero2"), rel=1e-5)
    assert len(curve(together, name)) == STEPS
    for of in ("bits_per_byte", "bits_per_byte/one", "bits_per_byte/two"):
        assert curve(together, name, of) == pytest.approx(curve(together, "zero2", of), rel=1e-5)
        assert len(curve(together, name, of)) == 3
    assert far(weights(together, name), weights(together, "zero2")) < 1e-5


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "one-by-one"])
def test_one_curve_on_any_number_of_ranks(alone: Path, together: Path, name: str) -> None:
    assert curve(alone, name) == pytest.approx(curve(together, "zero2"), rel=1e-5)
    assert far(weights(alone, name), weights(together, "zero2")) < 1e-5


def test_training_learns_and_tells(together: Path) -> None:
    figures, losses = told(together, "zero2")["figures"], curve(together, "zero2")
    assert losses[-1] < losses[0] and curve(together, "zero2", "bits_per_byte")[-1] < 4.3
    assert figures["steps"] == STEPS and figures["taught_share"] == 1
    for of in ("label_loss", "tokens_per_second", "memory_gb", "data_wait_share", "taught_by/source2"):
        assert len(curve(together, "zero2", of)) == STEPS
    shares = [curve(together, "zero2", f"taught_by/source{n}") for n in range(3)]
    assert [sum(part) for part in zip(*shares, strict=True)] == pytest.approx([1] * STEPS, abs=1e-4)


def test_low_precision_stays_near(alone: Path, together: Path) -> None:
    for folder in (alone, together):
        assert curve(folder, "low") == pytest.approx(curve(together, "zero2"), rel=2e-2)
    assert curve(alone, "low") == pytest.approx(curve(together, "low"), rel=2e-3)
    assert next(iter(weights(together, "low").values())).dtype == torch.bfloat16


def test_frozen_embeddings_stay_the_pivots_and_the_rest_learns(together: Path, alone: Path, pivot: Path) -> None:
    start = load_file(pivot / "model.safetensors")
    for name, folder in (("frozen3", together), ("frozen2", alone)):
        assert curve(folder, name) == pytest.approx(curve(together, "frozen2"), rel=1e-5)
        end = weights(folder, name)
        assert far(end, weights(together, "frozen2")) < 1e-5
        for key, weight in start.items():
            still = "embed" in key or "lm_head" in key
            assert torch.equal(end[key], weight) == still, key
    assert curve(together, "frozen2")[-1] < curve(together, "frozen2")[0]


def test_low_rank_updates(alone: Path, together: Path, pivot: Path) -> None:
    for name, folder in (("lora3", together), ("lora2", alone)):
        assert curve(folder, name) == pytest.approx(curve(together, "lora2"), rel=1e-5)
        # one factor begins at 0, so that the other's first gradients are rounding alone, which Adam makes steps of
        assert far(weights(folder, name), weights(together, "lora2")) < 1e-4
    figures = told(together, "lora2")["figures"]
    assert 0 < figures["learned"] < figures["weights"] / 4
    assert all("lora" in name and "lm_head" not in name for name in weights(together, "lora2"))
    losses = curve(together, "lora2")
    assert losses[-1] < losses[0]


def test_the_best_weights_are_kept(alone: Path, byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    figures, measured = told(alone, "wild")["figures"], curve(alone, "wild", "bits_per_byte")
    assert measured == curve(alone, "last", "bits_per_byte")
    steps = [e["step"] for e in told(alone, "wild")["history"] if "bits_per_byte" in e]
    assert steps == [5, 9, 14] and min(measured) < measured[-1]
    assert (figures["best_step"], figures["bits_per_byte"]) == (steps[measured.index(min(measured))], min(measured))
    assert "best_step" not in told(alone, "last")["figures"]
    renderer = Renderer(byte_level_tokenizer, "pivot")
    for name, expected in (("wild", min(measured)), ("last", measured[-1])):
        model = AutoModelForCausalLM.from_pretrained(alone / name, dtype=torch.float32).eval()
        fuse_head(model, Objective(), shape_of(model, len(renderer.table)))
        found = Validation(validation_samples(), renderer, None, 300).measure(model)
        assert sum(found.values()) / 2 == pytest.approx(expected, rel=1e-5)


def test_a_training_that_was_done_is_not_gone_on_with(alone: Path) -> None:
    """Cut off after its last checkpoint, before its weights were written: no step more, and the same figures."""
    once, again = (told(alone, name) for name in ("once", "again"))
    histories = [[e for e in one["history"] if "train_runtime" not in e] for one in (once, again)]
    assert histories[0] == histories[1] and once["figures"]["steps"] == again["figures"]["steps"] == 11
    assert far(weights(alone, "once"), weights(alone, "again")) == 0
    timed = {"seconds", "data_wait_share"}
    assert {k: v for k, v in once["figures"].items() if k not in timed} == {
        k: v for k, v in again["figures"].items() if k not in timed
    }
    assert once["figures"]["positions"] > 1000


def test_what_is_no_number_stops_all_ranks_and_names_samples(together: Path) -> None:
    poisoned = samples(26, seed=3, words=30)[5].id
    errors = [(together / f"poisoned-{rank}.error").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "\n" not in errors[0]
    assert errors[0].startswith("distill: the loss is not finite at step ") and f"samples {poisoned};" in errors[0]
    errors = [(together / f"no-norm-{rank}.error").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "the gradient is not finite at step 3, samples " in errors[0]
    assert errors[0].count(",") >= 4 and errors[0].endswith("checkpoint-2 is kept")
    assert (together / "no-norm-work/checkpoint-2" / LAYOUT).exists()
    errors = [(together / f"burst-{rank}.error").read_text() for rank in range(2)]
    assert errors[0] == errors[1] and "the gradient is not finite at step 4, samples " in errors[0]
    assert [path.name for path in (together / "burst-work").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_killed_rank_changes_nothing(tmp_path: Path, together: Path, pivot: Path, run: Run) -> None:
    """Killed in its second epoch, it goes on from step 9: to the same bytes on as many ranks, to near ones on others.

    How often it saves is as it is told then.
    """
    saved = {"save_steps": 3}
    folder = made(tmp_path / "killed", pivot)
    assert run(folder, 2, {"zero2": {**saved, "kill_at": 11, "kill_rank": 1}}) != 0
    assert not (folder / "zero2.json").exists() and (folder / "zero2-work/checkpoint-9" / LAYOUT).exists()
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    often = {"save_steps": 5}
    assert run(folder, 2, {"zero2": often}) == 0, (folder / "log").read_text()[-3000:]
    assert {path.name for path in (folder / "zero2-work").glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-14"}
    assert far(weights(folder, "zero2"), weights(together, "zero2")) == 0
    assert curve(folder, "zero2") == curve(together, "zero2")
    assert curve(folder, "zero2", "bits_per_byte") == curve(together, "zero2", "bits_per_byte")
    refused = {**saved, "zero": "zero3.json", "work": "zero2"}
    assert run(moved, 1, {"refused": refused, "zero2": saved}) == 0, (moved / "log").read_text()[-3000:]
    said = "zero2-work holds checkpoints of 2 ranks, ZeRO-2, float32 and this run has 1 ranks, ZeRO-3, float32; "
    assert said in (moved / "refused-0.error").read_text()
    assert "checkpoint-9 of 2 ranks is divided anew for 1" in (moved / "log").read_text()
    assert curve(moved, "zero2") == pytest.approx(curve(together, "zero2"), rel=1e-5)
    assert far(weights(moved, "zero2"), weights(together, "zero2")) < 1e-5


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "low"])
def test_a_target_leaves_nothing_in_memory(alone: Path, name: str) -> None:
    assert told(alone, name)["engines"] == 0


def test_a_batch_keeps_its_types() -> None:
    trainer = object.__new__(FusionTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    batch = {"weight": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "tokens": 5}
    found = trainer._prepare_input({"inputs": batch})["inputs"]
    assert [found["weight"].dtype, found["ids"].dtype, found["tokens"]] == [torch.float32, torch.int64, 5]
