"""The plan: which work there is, in which order, and what a changed setting or file makes anew."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from fusion import pipeline, survey
from fusion.artifact import Artifact, read_manifest
from fusion.config import Config, Model

TASKS = [
    "prepare",
    "capture/a",
    "capture/b",
    "capture/pivot",
    "align/a",
    "align/b",
    "distill/a",
    "distill/b",
    "distill/control",
    "merge",
    "release",
]


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Any,
    tiny_neox: Any,
    byte_level_tokenizer: PreTrainedTokenizerFast,
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "pivot": tiny_llama(folder / "pivot", sentencepiece_tokenizer),
        "a": tiny_neox(folder / "a", byte_level_tokenizer),
        "b": tiny_llama(folder / "b", byte_level_tokenizer, seed=1),
    }


@pytest.fixture
def tree(tmp_path: Path, models: dict[str, Path]) -> dict[str, Any]:
    return tiny.tree(tmp_path, models["pivot"], {"a": models["a"], "b": models["b"]})


def keys(folder: Path, tree: dict[str, Any], *overrides: str) -> dict[str, str]:
    """Task → key, in the order of the plan."""
    return {task.out.label: task.out.key for task in planned(tiny.load(folder, tree, *overrides))}


def planned(config: Config) -> list[pipeline.Task]:
    return pipeline.plan(config, pipeline.find(config))


def changed(folder: Path, tree: dict[str, Any], *overrides: str) -> set[str]:
    """Tasks whose key is another one under the overrides."""
    before, after = keys(folder, tree), keys(folder, tree, *overrides)
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


AFTER_CAPTURE = {"align/a", "align/b", "distill/a", "distill/b", "merge", "release"}


def test_tasks_come_after_what_they_read(tmp_path: Path, tree: dict[str, Any]) -> None:
    tasks = planned(tiny.load(tmp_path, tree))
    assert [task.out.label for task in tasks] == TASKS
    folders = [task.out.folder for task in tasks]
    assert len(set(folders)) == len(folders) and all(f.is_relative_to(tmp_path / "run") for f in folders)
    for n, task in enumerate(tasks):
        written = {path for path in task.inputs.values() if path.is_relative_to(tmp_path / "run")}
        assert written <= set(folders[:n])
    reads = {task.out.label: sorted(task.inputs) for task in tasks}
    assert reads["capture/a"] == ["model", "prepare"]
    assert reads["align/a"] == ["cache", "model", "pivot", "prepare"]
    assert reads["distill/a"] == ["cache/a", "cache/pivot", "map/a", "pivot", "prepare"]
    assert reads["distill/control"] == ["pivot", "prepare"]
    assert reads["merge"] == ["pivot", "prepare", "target/a", "target/b"]
    assert {"model/a", "model/b", "model/pivot", "target/control", "merge", "prepare"} <= set(reads["release"])


def test_keys_are_stable(tmp_path: Path, tree: dict[str, Any]) -> None:
    first = keys(tmp_path, tree)
    assert keys(tmp_path, tree) == first and len(set(first.values())) == len(TASKS)
    (tmp_path / "run" / ".fingerprints.json").unlink()
    assert keys(tmp_path, tree, f"out={tmp_path / 'elsewhere'}") == first


def test_the_model_that_the_gate_does_not_ask_is_not_captured(tmp_path: Path, tree: dict[str, Any]) -> None:
    assert list(keys(tmp_path, tree, "distill.pivot=absent")) == [t for t in TASKS if t != "capture/pivot"]
    assert list(keys(tmp_path, tree, "distill.gate=none")) == [t for t in TASKS if t != "capture/pivot"]
    teaching = list(keys(tmp_path, tree, "distill.pivot=teach"))
    assert teaching == [*TASKS[:6], "align/pivot", *TASKS[6:]]


def test_joint_has_one_target(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tiny.load(tmp_path, tree, "distill.topology=joint", "distill.control=false")
    tasks = planned(config)
    assert [t.out.label for t in tasks] == [*TASKS[:6], "distill/joint", "merge", "release"]
    assert sorted(tasks[6].inputs) == ["cache/a", "cache/b", "cache/pivot", "map/a", "map/b", "pivot", "prepare"]
    assert sorted(tasks[7].inputs) == ["pivot", "prepare", "target/joint"]


@pytest.mark.parametrize(
    ("override", "tasks"),
    [
        ("distill.per_rank=2", set()),
        ("distill.save_steps=7", set()),
        ("distill.gradient_checkpointing=true", set()),
        ("distill.too_long=skip", set()),
        ("capture.batch_tokens=100", set()),
        ("capture.too_long=skip", set()),
        ("release.batch_tokens=100", set()),
        ("tracking.every=3", set()),
        ("pivot.parameters=1e9", set()),
        ("prepare.data.0.megabytes=3", set()),
        ("distill.deepspeed=DEEPSPEED/zero3.json", set()),
        ("name=other", {"release"}),
        ("release.new_tokens=3", {"release"}),
        ("merge.method=ties", {"merge", "release"}),
        ("merge.parameters.tau=0.3", {"merge", "release"}),
        ("merge.dtype=bfloat16", {"merge", "release"}),
        ("distill.label_weight=0.9", {"distill/a", "distill/b", "merge", "release"}),
        ("distill.missing_mass=drop", {"distill/a", "distill/b", "merge", "release"}),
        ("distill.k=3", {"distill/a", "distill/b", "merge", "release"}),
        ("distill.gate=all", {"distill/a", "distill/b", "merge", "release"}),
        ("distill.learning_rate=1e-3", {"distill/a", "distill/b", "distill/control", "merge", "release"}),
        ("seed=1", {"distill/a", "distill/b", "distill/control", "merge", "release"}),
        ("align.maps=[hard]", AFTER_CAPTURE),
        ("capture.draws=3", {t for t in TASKS if t not in ("prepare", "distill/control")}),
        ("sources.0.dtype=bfloat16", {"capture/a", "align/a", "distill/a", "merge", "release"}),
        ("sources.0.template=plain", {"capture/a", "align/a", "distill/a", "merge", "release"}),
        ("prepare.max_bytes=100", set(TASKS)),
        ("prepare.data.0.limit=30", set(TASKS)),
        ("prepare.data.0.domain=other", set(TASKS)),
        ("prepare.train_share=0.5", set(TASKS)),
    ],
)
def test_a_setting_makes_anew_what_depends_on_it(
    tmp_path: Path, tree: dict[str, Any], override: str, tasks: set[str]
) -> None:
    override = override.replace("DEEPSPEED", str(tiny.ROOT / "configs/deepspeed"))
    assert changed(tmp_path, tree, override) == tasks


def test_the_control_alone_can_be_left_away(tmp_path: Path, tree: dict[str, Any]) -> None:
    before, after = keys(tmp_path, tree), keys(tmp_path, tree, "distill.control=false")
    assert before.keys() - after.keys() == {"distill/control"}
    assert {t for t in after if before[t] != after[t]} == {"release"}


def copied(folder: Path, models: Mapping[str, Path], name: str) -> Path:
    return Path(shutil.copytree(models[name], folder / f"copy-{name}"))


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        ("model.safetensors", {"capture/a", "align/a", "distill/a", "merge", "release"}),
        ("config.json", {"capture/a", "align/a", "distill/a", "merge", "release"}),
        ("tokenizer.json", {"capture/a", "align/a", "distill/a", "merge", "release"}),
        ("README.md", set()),
    ],
)
def test_a_changed_file_of_a_source_makes_its_work_anew(
    tmp_path: Path, tree: dict[str, Any], models: dict[str, Path], file: str, tasks: set[str]
) -> None:
    model = copied(tmp_path, models, "a")
    tree["sources"][0]["model"] = str(model)
    before = keys(tmp_path, tree)
    content = (model / file).read_bytes() if (model / file).exists() else b""
    (model / file).write_bytes(content + b" ")
    after = keys(tmp_path, tree)
    assert {t for t in before if before[t] != after[t]} == tasks
    (model / file).write_bytes(content)
    assert keys(tmp_path, tree) == before


def test_a_changed_pivot_leaves_other_captures(tmp_path: Path, tree: dict[str, Any], models: dict[str, Path]) -> None:
    model = copied(tmp_path, models, "pivot")
    tree["pivot"]["model"] = str(model)
    before = keys(tmp_path, tree)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    after = keys(tmp_path, tree)
    same = {t for t in before if before[t] == after[t]}
    assert same == {"prepare", "capture/a", "capture/b", "align/a", "align/b"}


def test_a_changed_dataset_makes_everything_anew(tmp_path: Path, tree: dict[str, Any]) -> None:
    before = keys(tmp_path, tree)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    after = keys(tmp_path, tree)
    assert all(before[t] != after[t] for t in TASKS)


def test_where_a_model_is_does_not_matter(tmp_path: Path, tree: dict[str, Any], models: dict[str, Path]) -> None:
    before = keys(tmp_path, tree)
    tree["sources"][0]["model"] = str(copied(tmp_path, models, "a"))
    assert keys(tmp_path, tree) == before


# A cache that was captured before


@pytest.fixture
def cache(tmp_path: Path) -> Artifact:
    made = tiny.artifact(tmp_path / "before", "capture", "a")
    made.publish({"tokenizer": "t", "model": "m"}, 0.0)
    return made


def test_a_given_cache_takes_the_place_of_a_capture(
    tmp_path: Path, tree: dict[str, Any], models: dict[str, Path], cache: Artifact
) -> None:
    model = copied(tmp_path, models, "a")
    (model / "model.safetensors").unlink()
    tree["sources"][0] |= {"model": str(model), "cache": str(cache.folder)}
    tasks = {task.out.label: task for task in planned(tiny.load(tmp_path, tree))}
    assert list(tasks) == [t for t in TASKS if t != "capture/a"]
    assert tasks["align/a"].inputs["cache"] == tasks["distill/a"].inputs["cache/a"] == cache.folder
    assert tasks["align/a"].out.inputs["cache"] == cache.key
    assert "model/a" not in tasks["release"].inputs and "model/pivot" in tasks["release"].inputs


def test_the_pivots_given_cache_leaves_it_measured(tmp_path: Path, tree: dict[str, Any], cache: Artifact) -> None:
    tree["pivot"]["cache"] = str(cache.folder)
    tasks = {task.out.label: task for task in planned(tiny.load(tmp_path, tree))}
    assert "capture/pivot" not in tasks and tasks["distill/a"].inputs["cache/pivot"] == cache.folder
    assert "model/pivot" in tasks["release"].inputs


def test_the_release_measures_what_is_here(tmp_path: Path, tree: dict[str, Any], cache: Artifact) -> None:
    from fusion.release.stage import _models

    tree["sources"][0]["cache"] = str(cache.folder)
    config = tiny.load(tmp_path, tree)
    found = [(role, model.name) for role, model, _ in _models(config, planned(config)[-1].inputs)]
    assert found == [
        ("source", "b"),
        ("pivot", "pivot"),
        ("control", "control"),
        ("target", "target-a"),
        ("target", "target-b"),
        ("fused", "fused"),
    ]


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    tree["sources"][0]["cache"] = str(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: has no manifest.json: it is not a finished stage folder"):
        planned(tiny.load(tmp_path, tree))


# Running


class Stages:
    """Stand-ins for the stages: each writes one file and remembers that it ran."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.ran: list[str] = []
        self.announced = 0
        self.fails: str | None = None
        patch.setattr(pipeline, "stage", lambda name: SimpleNamespace(run=self.run, announce=self.announce))

    def run(self, config: Config, inputs: Mapping[str, Path], out: Artifact) -> dict[str, Any]:
        assert all(folder.is_dir() for folder in inputs.values())
        (out.folder / "work").mkdir()
        (out.folder / "work" / "scratch").write_text("x")
        if out.label == self.fails:
            raise ValueError(f"{out.label} fails")
        (out.folder / "result").write_text(out.label)
        self.ran.append(out.label)
        return {"samples": 3, "what": "text"}

    def announce(self, config: Config, out: Artifact) -> None:
        self.announced += 1

    def since(self, act: Callable[[], None]) -> list[str]:
        """What runs while something is done."""
        before = len(self.ran)
        act()
        return self.ran[before:]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def test_all_stages_run_once(tmp_path: Path, tree: dict[str, Any], stages: Stages) -> None:
    config = tiny.load(tmp_path, tree)
    assert stages.since(lambda: pipeline.run(config)) == TASKS
    for task in planned(config):
        manifest = read_manifest(task.out.folder)
        assert list(manifest["files"]) == ["result"] and manifest["facts"] == {"samples": 3, "what": "text"}
        assert task.out.done() and not (task.out.folder / "work").exists()
    assert stages.since(lambda: pipeline.run(config)) == [] and stages.announced == 2


def test_a_changed_setting_runs_what_it_changes(tmp_path: Path, tree: dict[str, Any], stages: Stages) -> None:
    pipeline.run(tiny.load(tmp_path, tree))
    other = tiny.load(tmp_path, tree, "distill.label_weight=0.9")
    assert stages.since(lambda: pipeline.run(other)) == ["distill/a", "distill/b", "merge", "release"]
    assert stages.since(lambda: pipeline.run(tiny.load(tmp_path, tree))) == []  # both results are kept


def test_only_and_from(tmp_path: Path, tree: dict[str, Any], stages: Stages) -> None:
    config = tiny.load(tmp_path, tree)
    assert stages.since(lambda: pipeline.run(config, ["prepare"])) == ["prepare"]
    assert stages.since(lambda: pipeline.run(config, ["capture", "prepare"])) == TASKS[1:4]
    assert stages.since(lambda: pipeline.run(config, ["align", "distill", "prepare"], "align")) == TASKS[4:9]
    assert stages.since(lambda: pipeline.run(config, start="distill")) == TASKS[9:]
    assert stages.announced == 1


def test_a_stage_that_was_not_asked_for_and_is_needed_is_named(
    tmp_path: Path, tree: dict[str, Any], stages: Stages
) -> None:
    config = tiny.load(tmp_path, tree)
    hint = "is not finished and a stage that was asked for reads it; leave away --only or --from"
    for only, start, missing in [
        (["capture"], None, "prepare"),
        (["release"], None, "prepare"),
        ([], "merge", "prepare"),
        (["prepare", "align"], None, "capture/a"),
    ]:
        with pytest.raises(ValueError) as refused:
            pipeline.run(config, only, start)
        assert str(refused.value) == f"{missing} {hint}"
    assert stages.ran == ["prepare"]  # by the last
    pipeline.run(config)
    stages.ran.clear()
    assert stages.since(lambda: pipeline.run(config, start="release")) == []
    other = tiny.load(tmp_path, tree, "merge.method=ties")
    assert stages.since(lambda: pipeline.run(other, start="merge")) == ["merge", "release"]
    third = tiny.load(tmp_path, tree, "merge.method=ties", "distill.k=5")
    with pytest.raises(ValueError, match=f"^distill/a {hint}$"):
        pipeline.run(third, ["merge"])


def test_a_failing_stage_leaves_no_manifest_and_goes_on_later(
    tmp_path: Path, tree: dict[str, Any], stages: Stages
) -> None:
    config = tiny.load(tmp_path, tree)
    stages.fails = "align/b"
    with pytest.raises(ValueError, match="^align/b fails$"):
        pipeline.run(config)
    assert stages.ran == TASKS[:5]
    states = survey.states(planned(config))
    assert [states[label] for label in TASKS[:7]] == ["done"] * 5 + ["cut off, goes on", "to do"]
    stages.fails = None
    folder = next(task.out.folder for task in planned(config) if task.out.label == "align/b")
    (folder / "work" / "scratch").unlink()
    (folder / "work").rmdir()
    assert stages.since(lambda: pipeline.run(config)) == TASKS[5:]


def test_a_damaged_input_is_refused_before_it_is_read(tmp_path: Path, tree: dict[str, Any], stages: Stages) -> None:
    config = tiny.load(tmp_path, tree)
    pipeline.run(config, ["prepare", "capture"])
    folder = next(task.out.folder for task in planned(config) if task.out.label == "capture/b")
    (folder / "result").write_text("capture/c")
    with pytest.raises(ValueError) as refused:
        pipeline.run(config)
    wanted = f"{folder / 'result'}: fails its checksum; start again with --repair to make it anew"
    assert str(refused.value) == wanted
    assert stages.ran == [*TASKS[:4], "align/a"]


# What is found on disk


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("pivot.model=/none/there", "pivot.model: /none/there is no folder here and no hub id (owner/name)"),
        (
            "sources.1.model=owner/none",
            "sources.1.model: owner/none is no folder here and could not be had from the hub (HF_HUB_OFFLINE is set)",
        ),
        ("sources.0.model=EMPTY", "sources.0.model: EMPTY has no config.json; give the folder of a Hugging Face model"),
        ("pivot.template=none.jinja", "pivot.template: none.jinja is no file; give own, plain or a Jinja file"),
        ("distill.deepspeed=none.json", "distill.deepspeed: none.json cannot be read as JSON ("),
        ("distill.deepspeed=EMPTY/list.json", "distill.deepspeed: EMPTY/list.json cannot be read as JSON ("),
    ],
)
def test_what_is_missing_is_named_by_its_key(tmp_path: Path, tree: dict[str, Any], override: str, line: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "list.json").write_text("[1, 2]")
    config = tiny.load(tmp_path, tree, override.replace("EMPTY", str(empty)))
    with pytest.raises(ValueError) as refused:
        planned(config)
    assert str(refused.value).startswith(line.replace("EMPTY", str(empty))) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "{", "has a damaged config.json or index ("),
        ("model.safetensors.index.json", "{}", "has a damaged config.json or index ("),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "part-2.safetensors", "b": "part-1.safetensors"}}',
            "lacks part-2.safetensors, which its index names; download it again",
        ),
    ],
)
def test_a_damaged_model_is_named_by_its_key(
    tmp_path: Path, tree: dict[str, Any], models: dict[str, Path], file: str, content: str, said: str
) -> None:
    model = copied(tmp_path, models, "b")
    (model / file).write_text(content)
    if file != "config.json":
        (model / "model.safetensors").rename(model / "part-1.safetensors")
    tree["sources"][1]["model"] = str(model)
    with pytest.raises(ValueError) as refused:
        planned(tiny.load(tmp_path, tree))
    assert str(refused.value).startswith(f"sources.1.model: {model} {said}")


def test_hashes_are_remembered_until_the_file_changes(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keys(tmp_path, tree)
    read: list[str] = []
    digest = pipeline.hub.file_digest

    def watched(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(pipeline.hub, "file_digest", watched)
    assert keys(tmp_path, tree) == first and read == []
    (tmp_path / "train.jsonl").touch()
    assert keys(tmp_path, tree) == first and read == ["train.jsonl"]


def test_parameters_are_counted_from_headers(tmp_path: Path, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    for folder in models.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert pipeline.hub.count_parameters(folder) == sum(p.numel() for p in model.parameters())
    damaged = copied(tmp_path, models, "a")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=f"^{damaged / 'model.safetensors'}: is damaged"):
        pipeline.hub.count_parameters(damaged)


def test_weights_in_another_layout_beside_are_none(tmp_path: Path, models: dict[str, Path]) -> None:
    folder = copied(tmp_path, models, "a")
    memory = tmp_path / "memory.json"
    before = (pipeline.hub.count_parameters(folder), pipeline.hub.fingerprint(folder, memory))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert (pipeline.hub.count_parameters(folder), pipeline.hub.fingerprint(folder, memory)) == before
    shard, index = "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": shard}}))
    assert pipeline.hub.weight_files(folder) == [folder / "model.safetensors"]  # that is what is loaded
    (folder / "model.safetensors").rename(folder / shard)
    assert pipeline.hub.weight_files(folder) == [folder / shard]
    assert pipeline.hub.count_parameters(folder) == before[0]
    (folder / shard).unlink()  # of a source whose cache is given
    for text in (index.read_text(), "{}", "no JSON"):
        index.write_text(text)
        assert pipeline.hub.weight_files(folder) == [] and pipeline.hub.fingerprint(folder, memory)["weights"]


@pytest.mark.parametrize("trusted", [False, True])
def test_what_a_models_own_code_raises(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """Of a version of transformers before, say."""

    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("'list' object has no attribute 'keys'")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
    model = Model(str(models["a"]), "a", trust_remote_code=trusted)
    with pytest.raises(ValueError if trusted else AttributeError, match="object has no attribute 'keys'"):
        pipeline.hub.load_model(model, models["a"])


def test_a_target_asks_for_what_it_reads_alone(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control learns from labels: nothing need be captured for it; a source's target waits for its own source."""
    done: list[str] = []

    def do(config: Config, task: pipeline.Task, checked: set[Path]) -> None:
        done.append(task.out.label)

    config = tiny.load(tmp_path, tree)
    pipeline.run(config, only=["prepare"])
    monkeypatch.setattr(pipeline, "_do", do)
    pipeline.run(config, only=["distill"], targets=["control"])
    assert done == ["distill/control"]
    with pytest.raises(ValueError, match="capture/b is not finished and a stage that was asked for reads it"):
        pipeline.run(config, only=["distill"], targets=["b"])


def test_an_index_beside_whole_weights_is_an_older_one(tmp_path: Path, models: dict[str, Path]) -> None:
    folder = copied(tmp_path, models, "a")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    model = Model(str(folder), "a")
    assert pipeline.hub.locate(model, "a") == folder
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks model-00001-of-00002.safetensors, which its index names"):
        pipeline.hub.locate(model, "a")


def test_files_of_one_name_in_several_folders_of_a_dataset(tmp_path: Path) -> None:
    """As in a snapshot of a hub dataset: each counts."""
    memory, data = tmp_path / "memory.json", tmp_path / "data"
    seen = set()
    for text in ("one", "two"):
        for folder in ("main", "other"):
            (data / folder).mkdir(parents=True, exist_ok=True)
            (data / folder / "train.jsonl").write_text(f"{text} {folder}")
            seen.add(pipeline.hub.fingerprint_data(str(data), memory))
    (data / "main/train.jsonl").unlink()
    seen.add(pipeline.hub.fingerprint_data(str(data), memory))
    assert len(seen) == 5
    assert pipeline.hub.fingerprint_data(str(data), memory) in seen


def test_home_is_written_short(tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tree["out"], tree["pivot"]["model"], tree["distill"]["deepspeed"] = "~/run", "~/pivot", "~/zero2.json"
    tree["prepare"]["data"][0]["data"] = "~/texts.jsonl"
    config = tiny.load(tmp_path, tree)
    found = [str(config.folder), config.pivot.model, config.distill.deepspeed, config.prepare.data[0].data]
    assert found == [str(tmp_path / "home" / name) for name in ("run", "pivot", "zero2.json", "texts.jsonl")]
