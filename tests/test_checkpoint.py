"""Which checkpoint a training goes on from, and which it is told that it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT

from fusion.config import Distill, Lora
from fusion.distill.checkpoint import LAYOUT, finished, last_checkpoint, layout, own_steps, seal


def settings(zero: int = 2, **more: Any) -> Distill:
    return Distill(**{"dtype": "float32", "deepspeed": str(ROOT / f"configs/deepspeed/zero{zero}.json"), **more})


def checkpoint(work: Path, step: int, **made: Any) -> Path:
    """A finished one, as `settings()` makes it on one rank, but for what is given."""
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    seal(folder, settings(), [[1.0, float(step)]])
    told = json.loads((folder / LAYOUT).read_text())
    (folder / LAYOUT).write_text(json.dumps({**told, **made}))
    return folder


def test_nothing_was_begun(tmp_path: Path) -> None:
    begun = last_checkpoint(tmp_path / "work", settings())
    assert begun.checkpoint is None and begun.sums is None and begun.deepspeed == settings().deepspeed
    assert layout(settings(3, lora=Lora())) == {"ranks": 1, "zero": 3, "lora": True, "dtype": "float32"}


def test_the_newest_that_was_finished(tmp_path: Path) -> None:
    kept = [checkpoint(tmp_path, step) for step in (90, 100)]
    for step in (95, 110):  # what a rank that was killed had written
        (tmp_path / f"checkpoint-{step}/global_step{step}").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    begun = last_checkpoint(tmp_path, settings())
    assert begun.checkpoint == str(kept[1]) and begun.sums == [[1.0, 100.0]]
    assert finished(tmp_path) == kept and sorted(tmp_path.glob("checkpoint-*")) == sorted(kept)


@pytest.mark.parametrize(
    ("made", "wanted", "said"),
    [
        ({"zero": 3}, settings(), "1 ranks, ZeRO-3, float32 and this run has 1 ranks, ZeRO-2, float32"),
        ({"dtype": "bfloat16"}, settings(), "1 ranks, ZeRO-2, bfloat16 and this run has 1 ranks, ZeRO-2, float32"),
        ({}, settings(lora=Lora()), "1 ranks, ZeRO-2, float32 and this run has 1 ranks, ZeRO-2, float32, LoRA"),
        (
            {"lora": True, "ranks": 4},
            settings(lora=Lora()),
            "4 ranks, ZeRO-2, float32, LoRA and this run has 1 ranks, ZeRO-2, float32, LoRA",
        ),
        ({"zero": 0}, settings(), "1 ranks, ZeRO-0, float32 and this run has 1 ranks, ZeRO-2, float32"),
    ],
)
def test_what_cannot_be_divided_anew(tmp_path: Path, made: dict[str, Any], wanted: Distill, said: str) -> None:
    folder = checkpoint(tmp_path, 5, **made)
    with pytest.raises(ValueError) as refused:
        last_checkpoint(tmp_path, wanted)
    assert str(refused.value) == (
        f"{tmp_path} holds checkpoints of {said}; go on as it began, or remove that folder to begin this target again"
    )
    assert finished(tmp_path) == [folder]


def test_zero_0_divides_nothing(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5, zero=0, ranks=4)
    begun = last_checkpoint(tmp_path, settings(0))
    assert begun.checkpoint == str(folder) and begun.deepspeed == settings(0).deepspeed


def test_another_number_of_ranks_loads_the_universal_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5, ranks=4)
    (folder / "latest_universal").write_text("global_step5_universal")  # as if divided before
    begun = last_checkpoint(tmp_path, settings())
    assert begun.checkpoint == str(folder) and isinstance(begun.deepspeed, dict)
    told = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    assert begun.deepspeed == {**told, "checkpoint": {"load_universal": True}}


def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5, ranks=4)
    (folder / "global_step5").mkdir()
    (folder / "latest").write_text("global_step5")
    with pytest.raises(
        ValueError, match=r"checkpoint-5: cannot be divided anew \(.*\); go on with as many ranks"
    ) as no:
        last_checkpoint(tmp_path, settings())
    assert "\n" not in str(no.value)


def test_own_steps() -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    adam = torch.optim.AdamW(weights, lr=0.1)
    shared = torch.tensor(7.0)
    for weight in weights:
        adam.state[weight] = {"step": shared, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        weight.grad = torch.ones(2)

    class Wrapped:
        optimizer = adam

    own_steps(Wrapped())
    adam.step()
    assert [float(adam.state[weight]["step"]) for weight in weights] == [8, 8, 8]
