"""The door: whatever the user can mend ends in status 2 and one line that names it; nothing is left half written."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion import cluster, tracking
from fusion.artifact import MANIFEST, Journal, verify

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Any,
    byte_level_tokenizer: PreTrainedTokenizerFast,
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "pivot": tiny_llama(folder / "pivot", sentencepiece_tokenizer),
        "a": tiny_llama(folder / "a", byte_level_tokenizer, seed=1),
    }


@pytest.fixture
def tree(tmp_path: Path, made: dict[str, Path]) -> dict[str, Any]:
    return tiny.tree(tmp_path, made["pivot"], {"a": made["a"]})


@pytest.fixture(scope="module")
def fuse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_fuse", tiny.ROOT / "launch" / "fuse.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(fuse: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run(tree, *arguments): the program in this process, without a process group; its exit status."""
    monkeypatch.setattr(cluster, "start", lambda: None)
    monkeypatch.setattr(cluster, "stop", lambda: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def act(tree: dict[str, Any], *arguments: str) -> int:
        config = tiny.write_config(tmp_path / "config.yaml", tree)
        monkeypatch.setattr(sys, "argv", ["launch/fuse.py", "--config", str(config), *arguments])
        return fuse.main()

    return act


@pytest.fixture
def refused(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(tree, *arguments): the one line that the program ends with; what it left behind is whole."""

    def act(tree: dict[str, Any], *arguments: str) -> str:
        capsys.readouterr()
        assert run(tree, *arguments) == 2
        line = only_error(capsys.readouterr().err)
        check_left_behind(tmp_path / "run")
        return line

    return act


def only_error(stderr: str) -> str:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and stderr.count("error:") == 1, stderr
    return lines[0].removeprefix("error: ")


def check_left_behind(run: Path) -> None:
    """Finished folders hold what their manifests say, others no file that another run would take for finished."""
    assert not list(run.rglob("*.part"))
    for folder in run.glob("*/*"):
        if (folder / MANIFEST).exists():
            verify(folder)
        else:
            kept = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
            kept = {name for name in kept if not name.startswith("work/")}
            assert kept == Journal.whole(folder, kept)


def finished(run: Path) -> list[str]:
    return sorted(
        path.parent.relative_to(run).as_posix().rpartition("-")[0] or "prepare" for path in run.glob("*/*/" + MANIFEST)
    )


def copied(folder: Path, source: Path) -> Path:
    return Path(shutil.copytree(source, folder / f"copy-{source.name}"))


# In a process of its own


def program(*arguments: str, folder: Path = tiny.ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tiny.ROOT / "launch/fuse.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_help_shows_how() -> None:
    done = program("--help")
    assert done.returncode == 0 and done.stderr == ""
    for word in (
        "--config FILE",
        "--set KEY=VALUE",
        "--only STAGE",
        "--from STAGE",
        "--target NAME",
        "--plan",
        "examples:",
    ):
        assert word in done.stdout
    examples = re.findall(r"launch/fuse.py --config (\S+)", done.stdout.partition("examples:")[2])
    assert len(examples) == 4 and all((tiny.ROOT / path).is_file() for path in examples)


@pytest.mark.parametrize("name", ["fusellm-7b", "best-7b", "fusechat-7b", "scale-70b"])
def test_the_plan_needs_neither_models_nor_data(name: str, tmp_path: Path) -> None:
    done = program("--config", f"configs/{name}.yaml", "--plan", "--set", f"out={tmp_path / 'run'}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    wanted = [
        "prepare",
        "capture/pivot",
        "align/mpt" if name in ("fusellm-7b", "best-7b") else "align/qwen",
        "3 days" if name == "scale-70b" else "captures",
        "distill/control",
        "release",
    ]
    assert all(word in done.stdout for word in wanted)
    assert "device hours" in done.stdout and "sizes not known" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_template_that_cannot_show_a_chat_stops_before_any_capture(
    tree: dict[str, Any], refused: Refused, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    chats = [*([{"messages": turns}] * 3), {"messages": [{"role": "system", "content": "Be kind."}, *turns]}]
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
    )
    tree["prepare"]["data"][0]["data"] = str(tiny.write_lines(tmp_path / "chats.jsonl", chats))
    tree["sources"][-1]["template"] = str(tmp_path / "strict.jinja")
    last = len(tree["sources"]) - 1
    line = refused(tree)
    assert "the chat template given, on sample " in line and ": no system" in line
    assert line.endswith(
        f"set sources.{last}.template to plain or a Jinja file that shows them, or leave such chats out of prepare.data"
    )
    assert "no system (as in 1 of 2 chats); " in line
    assert not list((tmp_path / "run").glob("capture/*/*.parquet"))


def test_a_mistake_is_status_2_and_one_line(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tiny.write_config(tmp_path / "config.yaml", {**tree, "wombat": 1})
    done = program("--config", str(config))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert only_error(done.stderr).startswith(f"{config}: wombat: unknown key; known here: name, pivot, ")
    (Path(tree["out"]) / "model").mkdir(parents=True)
    tree["pivot"]["model"] = str(Path(tree["out"]) / "model")
    done = program("--config", str(tiny.write_config(config, tree)), "--plan")
    line = f"pivot.model: {tree['pivot']['model']} has no config.json; give the folder of a Hugging Face model"
    assert done.returncode == 2 and done.stderr == f"error: {line}\n"


# In this process


def test_the_plan_of_models_that_are_here(
    tree: dict[str, Any], run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(tracking.console, "file", said)
    assert run(tree, "--plan") == 0
    assert said.getvalue().count("to do") == 8 and not list((tmp_path / "run").glob("*/"))
    assert run(tree, "--only", "prepare") == 0
    said.truncate(0)
    assert run(tree, "--plan") == 0
    assert re.search(r"prepare .* done", said.getvalue()) and said.getvalue().count("to do") == 7


def test_a_key_that_nobody_knows(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    tree["distill"]["epoch"] = 3
    assert refused(tree) == f"{tmp_path / 'config.yaml'}: distill.epoch: unknown key; did you mean epochs?"
    assert not (tmp_path / "run").exists()


def test_a_value_out_of_range_on_the_command_line(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    line = refused(tree, "--set", "distill.label_weight=2")
    wanted = "distill.label_weight: 2 will not do: input should be less than or equal to 1"
    assert line == f"{tmp_path / 'config.yaml'}: {wanted}"
    assert refused(tree, "--set", "distill.label_weight").startswith("--set distill.label_weight: write key=value")


def test_a_config_that_is_not_there(
    fuse: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/fuse.py", "--config", "none.yaml"])
    assert fuse.main() == 2
    line = "none.yaml: cannot be read (No such file or directory); give --config an existing YAML file"
    assert only_error(capsys.readouterr().err) == line


@pytest.mark.parametrize("arguments", [[], ["--config", "x", "--only", "bake"], ["--config", "x", "--no-calibrate"]])
def test_a_command_line_that_is_none(
    fuse: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/fuse.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        fuse.main()
    assert stopped.value.code == 2 and "launch/fuse.py: error: " in capsys.readouterr().err


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_without_safetensors(tree: dict[str, Any], refused: Refused, tmp_path: Path, pickled: bool) -> None:
    model = copied(tmp_path, Path(tree["sources"][0]["model"]))
    (model / "model.safetensors").unlink()
    if pickled:
        (model / "pytorch_model.bin").write_bytes(b"\x80")
    tree["sources"][0]["model"] = str(model)
    instead = "only pickled weights, which are not read; convert them with save_pretrained" if pickled else "no weights"
    for arguments in ((), ("--plan",)):
        assert refused(tree, *arguments) == f"sources.0.model: {model} has {instead} (*.safetensors)"
    assert finished(tmp_path / "run") == []


def test_a_model_that_is_nowhere(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    tree["pivot"]["model"] = str(tmp_path / "none")
    line = f"pivot.model: {tmp_path / 'none'} is no folder here and no hub id (owner/name)"
    assert refused(tree) == line


def test_a_model_whose_weights_are_cut_short(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    model = copied(tmp_path, Path(tree["sources"][0]["model"]))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tree["sources"][0]["model"] = str(model)
    assert refused(tree).startswith(f"a: {model} does not load as a causal language model: ")
    assert refused(tree, "--plan").startswith(f"{weights}: is damaged")


def unmappable(folder: Path, source: Path) -> Path:
    """A copy of a model with a tokenizer that spells nothing."""
    model = copied(folder, source)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(model)
    return model


def test_a_tokenizer_that_spells_nothing(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    tree["sources"][0]["model"] = str(unmappable(tmp_path, Path(tree["sources"][0]["model"])))
    line = refused(tree)
    assert line == "a: cannot be mapped to bytes: its tokens for 'cat cat' spell 'catcat'"
    assert finished(tmp_path / "run") == ["prepare"]


def test_a_folder_without_a_tokenizer(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    model = copied(tmp_path, Path(tree["sources"][0]["model"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    tree["sources"][0]["model"] = str(model)
    assert refused(tree).startswith("a: ") and finished(tmp_path / "run") == ["prepare"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "prepare.data.0.data: {path} has no rows"),
        ('{"text": "a"}\n{"body": "b"}\n', "{path}:2: has neither `text` nor `messages`; its keys are body"),
        ('{"text": "a"}\n{"text": \n', "{path}:2: is not JSON (Expecting value); one object a line"),
        ('{"text": "\\ud800"}\n', "{path}:1: is not valid Unicode (lone surrogate at character 0)"),
        (None, "prepare.data.0.data: {path} does not exist; give a .jsonl or .parquet file, a folder or a hub id"),
    ],
)
def test_a_dataset_that_cannot_be_read(
    tree: dict[str, Any], refused: Refused, tmp_path: Path, content: str | None, line: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert refused(tree) == line.format(path=path)
    assert finished(tmp_path / "run") == []


def test_a_stage_that_needs_another(tree: dict[str, Any], refused: Refused) -> None:
    hint = "is not finished and a stage that was asked for reads it; leave away --only or --from"
    assert refused(tree, "--only", "align") == f"prepare {hint}"
    assert refused(tree, "--from", "merge") == f"prepare {hint}"


def test_caches_of_other_makers(
    tree: dict[str, Any], run: Callable[..., int], refused: Refused, tmp_path: Path, made: dict[str, Path]
) -> None:
    assert run(tree, "--only", "prepare", "capture") == 0
    assert finished(tmp_path / "run") == ["capture/a", "capture/pivot", "prepare"]
    (captured,) = (tmp_path / "run" / "capture").glob("a-*")
    hint = "leave away its `cache`, or start with --repair, to capture it here"
    # another model's
    tree["sources"] = [{"name": "c", "model": str(made["pivot"]), "cache": str(captured), "dtype": "float32"}]
    line = refused(tree, "--only", "align")
    assert line == (
        f"c: the cache {captured} was made by {made['a']}, and {made['pivot']} is another model or revision; {hint}"
    )
    # of other samples: nothing to learn from it
    tiny.write_lines(tmp_path / "train.jsonl", ({"text": text} for text in tiny.texts(20, seed=9)))
    tree["sources"] = [{"name": "c", "model": str(made["a"]), "cache": str(captured), "dtype": "float32"}]
    line = refused(tree, "--only", "prepare", "capture", "align")
    assert line.startswith(f"c: the cache {captured} lacks 19 of 19 samples, ") and line.endswith(hint)
    # damaged
    shard = captured / "shard-000002.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    manifest = json.loads((captured / MANIFEST).read_text())
    assert manifest["files"][shard.name]["bytes"] == len(content)
    with pytest.raises(ValueError, match="fails its checksum"):
        verify(captured)
    tree["out"] = str(tmp_path / "other")
    kept = shutil.move(captured, tmp_path / "kept")
    tree["sources"][0]["cache"] = str(kept)
    line = refused(tree, "--only", "prepare", "capture", "align")
    assert line == f"{tmp_path / 'kept' / shard.name}: fails its checksum; {hint}"
    # no cache at all
    tree["sources"][0]["cache"] = str(tmp_path)
    assert refused(tree) == f"{tmp_path}: has no manifest.json: it is not a finished stage folder; run its stage first"


def test_a_template_whose_turns_end_in_nothing_is_told(
    tree: dict[str, Any], run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracking, "say", said.append)
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    tree["prepare"]["data"][0]["data"] = str(tiny.write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 3))
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    tree["sources"][-1]["template"] = str(tmp_path / "endless.jinja")
    assert run(tree, "--only", "prepare", "capture") == 0
    name = tree["sources"][-1]["name"]
    told = [line for line in said if "ends turns in no special token" in line]
    assert len(told) == 1 and told[0].startswith(f"  {name}: ")


def test_two_runs_do_not_write_to_one_folder(
    tree: dict[str, Any], refused: Refused, fuse: ModuleType, tmp_path: Path
) -> None:
    held: list[IO[str]] = []
    fuse._lock(tmp_path / "run", [], held)
    line = f"out: another run is writing to {tmp_path / 'run'}; wait for it, or give this one another `out`"
    assert refused(tree) == line and refused(tree, "--target", "a") == line
    held[0].close()
    assert refused(tree, "--from", "merge").startswith("prepare is not finished")


def test_what_the_first_machine_refuses_ends_the_others_too(
    tree: dict[str, Any], fuse: ModuleType, tmp_path: Path
) -> None:
    held: list[IO[str]] = []
    fuse._lock(tmp_path / "run", [], held)
    config, port = tiny.write_config(tmp_path / "config.yaml", tree), str(tiny.free_port())
    running = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(tiny.ROOT / "launch/fuse.py"), "--config", str(config)]
        environment = {**ENVIRONMENT, **own, "MASTER_PORT": port}
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    held[0].close()
    for one in said:
        assert only_error(one).startswith(f"out: another run is writing to {tmp_path / 'run'};")


def test_a_rank_that_meets_no_other_says_so() -> None:
    script = (
        "from datetime import timedelta; from fusion import cluster\n"
        "cluster._LONGEST_MEETING = timedelta(seconds=2)\n"
        "try: cluster.start()\nexcept ValueError as error: cluster.end(cluster.fail(error))"
    )
    own = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**ENVIRONMENT, **own, "MASTER_PORT": (port := str(tiny.free_port()))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and only_error(done.stderr).startswith(f"the ranks do not meet at 127.0.0.1:{port}: ")


def test_launches_of_different_targets_share_a_folder(
    tree: dict[str, Any], refused: Refused, fuse: ModuleType, tmp_path: Path
) -> None:
    held: list[IO[str]] = []
    fuse._lock(tmp_path / "run", ["a"], held)
    assert refused(tree).startswith(f"out: another run is writing to {tmp_path / 'run'};")
    assert refused(tree, "--target", "control", "a").startswith("out: another run is writing target a in ")
    assert refused(tree, "--target", "control").startswith("prepare is not finished")
    sources = ", ".join(s["name"] for s in tree["sources"])
    assert refused(tree, "--target", "zzz") == f"--target zzz: there is no such target; known here: {sources}, control"
    for lock in held:
        lock.close()


def test_an_out_that_is_a_file(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert str(tmp_path / "run") in refused(tree)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_full_disk_is_said_in_words(fuse: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.fail(fuse._told(OSError(28, "No space left on device", "/data/run"))) == 2
    line = only_error(capsys.readouterr().err)
    assert line == "no space left on the disk of /data/run; finished work is kept, free some and start again"


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [3])])
def test_an_error_of_many_lines_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, waits: list[int]
) -> None:
    """Said by the first rank that meets it."""
    slept: list[int] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    assert cluster.fail(ValueError("one\n  two\n\nthree")) == 2
    assert capsys.readouterr().err == "error: one two three\n" and slept == waits


def test_a_sample_longer_than_a_context(
    tree: dict[str, Any], refused: Refused, run: Callable[..., int], tmp_path: Path
) -> None:
    model = copied(tmp_path, Path(tree["sources"][0]["model"]))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    tree["sources"][0]["model"] = str(model)
    line = refused(tree, "--only", "prepare", "capture")
    assert re.fullmatch(
        r"a: sample [0-9a-f]{16} has \d+ tokens and the context is 8; "
        "lower prepare.max_bytes or set capture.too_long: skip",
        line,
    )
    assert finished(tmp_path / "run") == ["prepare"]


def test_weights_that_are_not_numbers(tree: dict[str, Any], refused: Refused, tmp_path: Path) -> None:
    import torch

    model = copied(tmp_path, Path(tree["sources"][0]["model"]))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.lm_head.weight[7, 3] = float("nan")
    loaded.save_pretrained(model)
    tree["sources"][0]["model"] = str(model)
    line = refused(tree, "--only", "prepare", "capture")
    assert re.fullmatch(
        r"a: logits are not finite on sample [0-9a-f]{16}, position 0; try dtype: float32 for this source, "
        r"or capture.on_nonfinite: skip",
        line,
    )


def test_torch_finds_this_environments_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them take turns to compile DeepSpeed's op anew."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert cluster._prefer_own_ninja()
    found = shutil.which("ninja")
    assert found and Path(found).parent == Path(sysconfig.get_path("scripts"))
