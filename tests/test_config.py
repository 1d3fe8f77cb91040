"""The config: whatever is wrong is one line with the file, the key, the value and what would do."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tiny import ROOT

from fusion.config import Config, Dataset, Lora, Model
from fusion.config_file import load

BASE = """
name: small
pivot: {model: p}
sources: [{name: a, model: q}, {name: b, model: r}]
prepare: {data: [{data: d.jsonl}]}
"""
TOP = "name, pivot, sources, prepare, out, seed, capture, align, distill, merge, release, tracking"


def write(folder: Path, text: str | bytes = BASE) -> Path:
    path = folder / "fusion.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What the config is refused with, less the file's name that it begins with."""
    with pytest.raises(ValueError) as refused:
        load(path, overrides)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distil.epochs=1", "distil: unknown key; did you mean distill?"),
        ("distill.learning_rat=1", "distill.learning_rat: unknown key; did you mean learning_rate?"),
        ("sources.1.modle=x", "sources.1.modle: unknown key; did you mean model?"),
        ("prepare.data.0.domian=x", "prepare.data.0.domian: unknown key; did you mean domain?"),
        ("wombat=1", f"wombat: unknown key; known here: {TOP}"),
        ("tracking.zzz=1", "tracking.zzz: unknown key; known here: wandb, project, every"),
        ("seed=true", "seed: True will not do: input should be a valid integer"),
        ("seed=-1", "seed: -1 will not do: input should be greater than or equal to 0"),
        ("seed=2147483648", "seed: 2147483648 will not do: input should be less than 2147483648"),
        ("capture.k=3.0", "capture.k: 3.0 will not do: input should be a valid integer"),
        ("capture.k='3'", "capture.k: '3' will not do: input should be a valid integer"),
        ("capture.k=0", "capture.k: 0 will not do: input should be greater than 0"),
        ("distill.label_weight=1.5", "distill.label_weight: 1.5 will not do: input should be less than or equal to 1"),
        (
            "distill.label_weight=-0.1",
            "distill.label_weight: -0.1 will not do: input should be greater than or equal to 0",
        ),
        ("distill.beta=1.0", "distill.beta: 1.0 will not do: input should be less than 1"),
        ("distill.gate_temperature=0", "distill.gate_temperature: 0 will not do: input should be greater than 0"),
        ("distill.lora={rank: 0}", "distill.lora.rank: 0 will not do: input should be greater than 0"),
        ("distill.lora={ranks: 3}", "distill.lora.ranks: unknown key; did you mean rank?"),
        ("distill.lora={dropout: 1.0}", "distill.lora.dropout: 1.0 will not do: input should be less than 1"),
        ("distill.lora=16", "distill.lora: 16 will not do: input should be an object"),
        ("distill.lora.modules=[q_proj, 3]", "distill.lora.modules.1: 3 will not do: input should be a valid string"),
        ("distill.learning_rate=.nan", "distill.learning_rate: nan will not do: input should be a finite number"),
        ("distill.epochs=.inf", "distill.epochs: inf will not do: input should be a finite number"),
        ("distill.epochs=many", "distill.epochs: 'many' will not do: input should be a valid number"),
        (
            "distill.gate=best",
            "distill.gate: 'best' will not do: input should be 'min_ce', 'avg_ce', 'all', 'fixed' or 'none'",
        ),
        ("distill=", "distill: None will not do: input should be an object"),
        ("pivot=gpt2", "pivot: 'gpt2' will not do: input should be an object"),
        ("pivot.name=a", "pivot.name: 'a' will not do: the pivot is called pivot; leave it away"),
        ("pivot.trust_remote_code=1", "pivot.trust_remote_code: 1 will not do: input should be a valid boolean"),
        ("sources=[]", "sources: [] will not do: tuple should have at least 1 item after validation, not 0"),
        ("sources.0.name=pivot", "sources: the name 'pivot' is taken; give each source a `name` of its own"),
        ("sources.0.name=control", "sources: the name 'control' is taken; give each source a `name` of its own"),
        ("sources.0.name=fused", "sources: the name 'fused' is taken; give each source a `name` of its own"),
        ("sources.0.name=b", "sources: the name 'b' is taken; give each source a `name` of its own"),
        ("sources.0={model: q}", "sources: the name 'pivot' is taken; give each source a `name` of its own"),
        ("name=../x", "name: '../x' will not do: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"),
        (
            "prepare.data.0.where={split: 1}",
            "prepare.data.0.where.split: 1 will not do: input should be a valid string",
        ),
        ("prepare.heldout_share=1.0", "prepare.heldout_share: 1.0 will not do: input should be less than 1"),
        ("merge.parameters={tau: []}", None),
        (
            "merge.parameters={tau: {a: 1}}",
            "merge.parameters.tau: {'a': 1} will not do: input should be a valid number",
        ),
        ("distill={k: 0, per_rank: 0}", "distill.k: 0 will not do: input should be greater than 0 (and 1 more)"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path: Path, override: str, line: str | None) -> None:
    path = write(tmp_path)
    if line is None:
        load(path, [override])
    else:
        assert refusal(path, override).startswith(line)


LEAVE = "the student would do best to leave the entries; set ghost or renormalise"
UNASKED = "does not ask it; leave it away, or set linear or cosine"
DRAWS = "draws are right on average only in what is linear in them; set sampler top_k or nucleus"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        # divergences that a teacher's missing mass or its draws would mislead
        (
            ["divergence=reverse_kl", "missing_mass=drop"],
            f"missing_mass: drop will not do with divergence reverse_kl: {LEAVE}",
        ),
        (
            ["divergence=jsd", "missing_mass=drop", "/capture.sampler=top_k"],
            f"missing_mass: drop will not do with divergence jsd: {LEAVE}",
        ),
        (["divergence=jsd"], f"divergence: jsd will not do with capture.sampler random: {DRAWS}"),
        (
            ["divergence=reverse_kl", "/capture.sampler=hybrid"],
            f"divergence: reverse_kl will not do with capture.sampler hybrid: {DRAWS}",
        ),
        (
            ["divergence=jsd", "/sources.0.cache=x"],  # the other one is captured
            f"divergence: jsd will not do with capture.sampler random: {DRAWS}",
        ),
        (
            ["divergence=jsd", "pivot=teach", "/sources.0.cache=x", "/sources.1.cache=y"],
            f"divergence: jsd will not do with capture.sampler random: {DRAWS}",
        ),
        (["divergence=jsd", "/capture.sampler=top_k"], None),
        (["divergence=reverse_kl", "/capture.sampler=nucleus", "missing_mass=renormalise"], None),
        (["divergence=jsd", "pivot=gate", "/sources.0.cache=x", "/sources.1.cache=y"], None),
        (["divergence=forward_kl", "missing_mass=drop"], None),
        # the label's share in the course of a training
        (["label_schedule=linear"], "label_weight_end: missing; label_schedule linear goes there"),
        (["label_schedule=cosine"], "label_weight_end: missing; label_schedule cosine goes there"),
        (
            ["label_weight_end=0.3"],
            f"label_weight_end: 0.3 will not do: label_schedule constant {UNASKED}",
        ),
        (
            ["label_weight_end=0.0", "label_schedule=confidence"],
            f"label_weight_end: 0.0 will not do: label_schedule confidence {UNASKED}",
        ),
        (
            ["label_weight_end=1.5", "label_schedule=linear"],
            "label_weight_end: 1.5 will not do: input should be less than or equal to 1",
        ),
        (["label_weight_end=0.0", "label_schedule=cosine"], None),
        (["label_schedule=confidence"], None),
        # weights as told
        (["gate=fixed"], "weights: missing; gate fixed asks it: name: weight"),
        (["weights={a: 1.5}"], "weights: {'a': 1.5} will not do without gate: fixed"),
        (["weights={a: 1, b: 2}", "gate=all"], "weights: {'a': 1.0, 'b': 2.0} will not do without gate: fixed"),
        (["weights={c: 1}", "gate=fixed"], "weights: 'c' teaches nobody; known here: a, b, pivot"),
        (["weights={pivot: 1}", "gate=fixed", "pivot=gate"], "weights: 'pivot' teaches nobody; known here: a, b"),
        (
            ["weights={b: 1}", "gate=fixed", "topology=pairwise"],
            "weights: a has none, and a target of its own that would learn from labels alone; give it one, leave the "
            "source away, or set distill.topology: joint",
        ),
        (["weights={b: 1}", "gate=fixed", "topology=joint"], None),
        (
            ["weights={a: 0, b: 0}", "gate=fixed"],
            "weights: {'a': 0.0, 'b': 0.0} will not do: nobody would teach; give one a weight above 0",
        ),
        (
            ["weights={a: -1}", "gate=fixed"],
            "weights.a: -1 will not do: input should be greater than or equal to 0",
        ),
        (["weights={a: .inf}", "gate=fixed"], "weights.a: inf will not do: input should be a finite number"),
        (["weights={a: 3, pivot: 1, b: 0}", "gate=fixed", "pivot=teach", "topology=joint"], None),
        # LoRA
        (["lora.modules=all"], "lora.modules: 'all' will not do: set all-linear, or a list of modules' names"),
        (["lora.modules=[]"], "lora.modules: [] will not do: set all-linear, or a list of modules' names"),
        (["lora.modules=[q_proj, v_proj]"], None),
        (["lora={}"], None),
    ],
)
def test_settings_of_distill_that_do_not_go_together(tmp_path: Path, overrides: list[str], line: str | None) -> None:
    path = write(tmp_path)
    given = [o[1:] if o.startswith("/") else f"distill.{o}" for o in overrides]
    if line is None:
        load(path, given)
    else:
        assert refusal(path, *given) == f"distill.{line}"


def test_what_distill_says_arrives(tmp_path: Path) -> None:
    given = [
        "gate=fixed",
        "pivot=teach",
        "topology=joint",
        "weights={a: 3, pivot: 1}",
        "lora={rank: 4, modules: [q_proj]}",
    ]
    distill = load(write(tmp_path), [f"distill.{o}" for o in given]).distill
    assert distill.weights == {"a": 3.0, "pivot": 1.0} and distill.lora == Lora(rank=4, modules=("q_proj",))
    assert load(write(tmp_path), ["distill.lora={}"]).distill.lora == Lora(16, 32, 0.0, "all-linear")
    plain = load(write(tmp_path)).distill
    assert plain.lora is None and plain.weights == {} and plain.label_weight_end is None


def leaves(kind: Any, at: str = "") -> list[str]:
    """Every key of the config, dotted; of the lists of models and datasets, those of the first."""
    found = []
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        first = {"sources": Model, "data": Dataset}.get(field.name) if kind is not Dataset else None
        inner = hint if is_dataclass(hint) else first
        key = f"{at}{field.name}"
        found += leaves(inner, f"{key}.0." if first else f"{key}.") if inner else [key]
    return found


@pytest.mark.parametrize(
    ("sampler", "key", "line"),
    [
        (
            "random",
            "k",
            "random asks draws, temperature alone; leave it away, or set capture.sampler to top_k or nucleus",
        ),
        ("top_k", "draws", "top_k asks k alone; leave it away, or set capture.sampler to random or hybrid"),
        (
            "hybrid",
            "mass",
            "hybrid asks head, draws, temperature alone; leave it away, or set capture.sampler to nucleus",
        ),
        ("nucleus", "head", "nucleus asks k, mass alone; leave it away, or set capture.sampler to hybrid"),
    ],
)
def test_a_setting_of_another_sampler_is_refused(tmp_path: Path, sampler: str, key: str, line: str) -> None:
    with pytest.raises(ValueError) as refused:
        load(write(tmp_path), [f"capture.sampler={sampler}", f"capture.{key}=1"])
    assert str(refused.value) == f"capture.{key}: 1 will not do: sampler {line}"


def test_every_key_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    path, keys = write(tmp_path), leaves(Config)
    assert len(keys) > 60 and {"name", "sources.0.dtype", "prepare.data.0.limit", "distill.gate"} <= set(keys)
    for key in keys:
        assert refusal(path, f"{key}={{'?': {{}}}}").startswith(key), key


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "holds no keys; begin with `name:`, `pivot:`, `sources:`, `prepare:`"),
        ("- name", "holds no keys; begin with `name:`, `pivot:`, `sources:`, `prepare:`"),
        ("name: small\npivot: {}\n", "pivot.model: missing; this key must be given (and 2 more)"),
        (BASE.replace("name: small", ""), "name: missing; this key must be given"),
        (BASE.replace("{data: [{data: d.jsonl}]}", "{}"), "prepare.data: missing; this key must be given"),
        (BASE + "1: x\n", f"1: unknown key; known here: {TOP}"),
        (BASE + "2024-01-01: x\n", "is no plain tree of keys and values: keys must be str"),
        (BASE + "out: &again [*again]\n", "is no plain tree of keys and values: Circular reference detected"),
        (BASE + "seed: 1\nseed: 2\n", "is not YAML: the key seed stands twice"),
        (BASE + "distill: {k: 1, k: 2}\n", "is not YAML: the key k stands twice"),
        ("name: [", "is not YAML: while parsing a flow node expected the node content, but found '<stream end>'"),
        ("name: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor for the tag"),
        (BASE.encode() + b"out: \xff", "is not UTF-8 text (invalid start byte at byte"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str | bytes, line: str) -> None:
    assert refusal(write(tmp_path, text)).startswith(line)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    hint = "give --config an existing YAML file"
    assert refusal(tmp_path / "none.yaml") == f"cannot be read (No such file or directory); {hint}"
    assert refusal(tmp_path) == f"cannot be read (Is a directory); {hint}"


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    line = refusal(write(tmp_path), f"seed={'x' * 500}")
    assert line == f"seed: '{'x' * 76}... will not do: input should be a valid integer"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distill.epochs", "write key=value, for example --set distill.epochs=3"),
        ("=3", "write key=value, for example --set distill.epochs=3"),
        ("name.x=1", "name.x is not inside a section"),
        ("name.x.y=1", "name.x.y is not inside a section"),
        ("sources.2.name=c", "'2' is not inside a section"),
        ("sources.a.name=c", "'a' is not inside a section"),
        ("distill.epochs=[", "'[' is not YAML; put it in quotes if it is text"),
    ],
)
def test_a_setting_that_cannot_be_placed(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(ValueError) as refused:
        load(write(tmp_path), [override])
    said = str(refused.value)
    assert said.startswith(f"--set {override}: ") and "\n" not in said
    assert said.endswith(line) or "is not inside a section" in line and "is not inside a section" in said


def test_settings_reach_their_place(tmp_path: Path) -> None:
    given = [
        "name=other",
        "sources.1.name=c",
        "sources.0={name: z, model: s}",
        "prepare.data.0.limit=5",
        "distill.learning_rate=1e-4",
        "distill.weight_decay=2E-3",
        "distill.epochs=3",
        "merge.parameters.tau=0.5",
        "release.prompts=[one, two]",
        "tracking.project='12'",
        "out=a=b",
        "seed=1",
        "seed=2",
    ]
    config = load(write(tmp_path), given)
    assert config.name == "other" and [(s.name, s.model) for s in config.sources] == [("z", "s"), ("c", "r")]
    assert config.prepare.data == (Dataset("d.jsonl", limit=5),)
    assert (config.distill.learning_rate, config.distill.weight_decay, config.distill.epochs) == (1e-4, 2e-3, 3.0)
    assert config.merge.parameters == {"tau": 0.5} and config.release.prompts == ("one", "two")
    assert config.tracking.project == "12"
    assert (config.out, config.seed, str(config.folder)) == ("a=b", 2, "a=b")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e-3", 1.5e-3), (".5e-1", 0.05), ("0.25", 0.25), ("1.e-2", 1e-2)],
)
def test_numbers_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    text = BASE + f"distill: {{learning_rate: {written}}}\n"
    assert load(write(tmp_path, text)).distill.learning_rate == value
    assert load(write(tmp_path), [f"distill.learning_rate={written}"]).distill.learning_rate == value


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    assert load(write(tmp_path), ["name=e5", "sources.0.name=1e", "sources.1.name=a1e-4"]).name == "e5"


def test_merge_parameters_keep_their_types(tmp_path: Path) -> None:
    text = BASE + "merge: {parameters: {a: 1, b: 0.5, c: true, d: paper, e: [1.0, 2.0]}}\n"
    parameters = load(write(tmp_path, text)).merge.parameters
    assert parameters == {"a": 1, "b": 0.5, "c": True, "d": "paper", "e": [1.0, 2.0]}
    assert [type(v) for v in parameters.values()] == [int, float, bool, str, list]


def test_yaml_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = "name: small\npivot: &p {model: p}\nsources:\n  - {<<: *p, name: a}\n  - {<<: *p, name: b, model: q}\n"
    config = load(write(tmp_path, text + "prepare: {data: [{data: d}]}\n"))
    assert [(s.name, s.model) for s in config.sources] == [("a", "p"), ("b", "q")]


def test_a_config_cannot_change(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert str(config.folder) == "runs/small"
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_load(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert (ROOT / config.distill.deepspeed).is_file()


def test_the_papers_settings() -> None:
    fusellm, fusechat = (load(ROOT / f"configs/{name}.yaml") for name in ("fusellm-7b", "fusechat-7b"))
    assert (fusellm.distill.topology, fusellm.distill.label_weight, fusellm.distill.learning_rate) == (
        "joint",
        0.9,
        1e-5,
    )
    assert (fusechat.distill.topology, fusechat.merge.method, len(fusechat.sources)) == ("pairwise", "sce", 5)
    assert [m.name for m in fusechat.sources if m.trust_remote_code] == ["internlm2"]
