"""The whole road, walked by two ranks under the real launcher, on models made in seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "WANDB_MODE": "offline"}

CONFIG = """
name: walk
out: {out}
pivot: {{model: {made}/models/pivot}}
sources:
  - {{name: math, model: {made}/models/math}}
  - {{name: code, model: {made}/models/code}}
prepare:
  data:
    - {{data: {made}/corpus/fuse.jsonl, limit: 24}}
    - {{data: {chats}, domain: chat, limit: 8}}
    - {{data: {made}/corpus/heldout.jsonl, heldout: true, limit: 12}}
  max_bytes: 300
capture: {{sampler: hybrid, head: 4, draws: 16, too_long: skip}}
distill:
  {{topology: pairwise, epochs: 2, learning_rate: 1e-3, batch_size: 8, per_rank: 4, pivot: teach, save_steps: 2,
    too_long: skip}}
merge: {{method: sce, parameters: {{tau: 1.0}}}}
release: {{prompts: ["def f("], new_tokens: 4}}
tracking: {{every: 1}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and models of the demo, in their quick form."""
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-m", "data_prep.demo", "--quick", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return folder


def write_config(made: Path, folder: Path) -> Path:
    chats = folder / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]
        for n in range(8)
    ]
    chats.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    path = folder / "walk.yaml"
    path.write_text(CONFIG.format(made=made, out=folder / "run", chats=chats))
    return path


def launch(ranks: int) -> list[str]:
    """The launcher on a port that nobody has."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def fuse(config: Path, *more: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = launch(ranks) if ranks > 1 else [sys.executable]
    command = [*launcher, "launch/fuse.py", "--config", str(config), *more]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def walked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("walked")
    config = write_config(made, folder)
    done = fuse(config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return config, done.stdout


def test_two_ranks_reach_a_measured_release(walked: tuple[Path, str]) -> None:
    config, said = walked
    run = config.parent / "run"
    results = json.loads((run / "report.html").resolve().with_name("results.json").read_text())
    measured = {(m["role"], m["name"]) for m in results["models"]}
    assert {role for role, _ in measured} == {"source", "pivot", "control", "target", "fused"}
    assert len(measured) == 7
    assert all(0 < bits < 20 for m in results["models"] for bits in m["bits"].values())
    assert set(results["models"][0]["bits"]) == {"code", "math", "prose"}
    assert "held-out bits per byte" in said and str(run / "fused") in said
    assert list(run.glob("wandb/offline-run-*")), "wandb is offline without an API key"
    taught = json.loads(next(run.glob("distill/math-*/manifest.json")).read_text())["facts"]
    assert taught["taught_share"] > 0.3
    assert not list(run.rglob("*.part")) and not list(run.glob("distill/*/work"))


def test_release_loads_and_generates(walked: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = walked[0].parent / "run" / "fused"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("def f(", add_special_tokens=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, ids.shape[1] + 3)
    assert (folder / "README.md").read_text().startswith("---\n")


def test_second_run_does_nothing(walked: tuple[Path, str]) -> None:
    config, _ = walked
    before = {p: p.stat().st_mtime_ns for p in (config.parent / "run").rglob("manifest.json")}
    done = fuse(config, ranks=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done before") == len(before)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_killed_run_goes_on_to_the_same_weights(made: Path, walked: tuple[Path, str], tmp_path: Path) -> None:
    config = write_config(made, tmp_path)
    command = [*launch(2), "launch/fuse.py", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("run/distill/code-*/work/checkpoint-*/trainer_state.json")):
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    done = fuse(config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    undisturbed = weights(walked[0].parent / "run" / "fused")
    for name, tensor in weights(tmp_path / "run" / "fused").items():
        assert (tensor - undisturbed[name]).abs().max() < 1e-5, name


def test_a_killed_launcher_loses_nothing(made: Path, walked: tuple[Path, str], tmp_path: Path) -> None:
    """The launcher alone is killed: its ranks live on, a second run is told so, and the cache is the same at last."""
    config = write_config(made, tmp_path)
    command = [*launch(2), "launch/fuse.py", "--config", str(config), "--only", "prepare", "capture"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("run/capture/*/shard-*.parquet")):
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    while (done := fuse(config, "--only", "prepare", "capture", ranks=1)).returncode:
        assert "another run is writing" in done.stderr and time.monotonic() < deadline, done.stderr[-2000:]
    for shard in walked[0].parent.glob("run/capture/*/*.parquet"):
        mine = tmp_path / "run" / "capture" / shard.parent.name / shard.name
        assert mine.read_bytes() == shard.read_bytes()
