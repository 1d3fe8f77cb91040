"""`--plan`: its figures against a hand's, what a calibration measures and leaves alone, and when it gives formulas."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from data_prep import stage as prepare
from data_prep.samples import beginning, read_rows
from fusion import costs, pipeline, sizes, survey, tracking
from fusion.capture.cache import Cache
from fusion.config import Capture, Config, Dataset, Distill, Lora, Model, Prepare
from fusion.corpus import Corpus


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Any,
    tiny_neox: Any,
    byte_level_tokenizer: PreTrainedTokenizerFast,
    sentencepiece_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "pivot": tiny_llama(folder / "pivot", sentencepiece_tokenizer),
        "a": tiny_llama(folder / "a", byte_level_tokenizer, seed=1),
        "b": tiny_neox(folder / "b", byte_level_tokenizer, seed=2),
    }


@pytest.fixture
def tree(tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(survey, "SECONDS", 0.5)
    return tiny.tree(tmp_path, made["pivot"], {"a": made["a"], "b": made["b"]})


def rows_of(config: Config, calibrate: bool = True) -> dict[str, costs.Cost]:
    return {cost.label: cost for cost in costs.estimate(config, survey.survey(config, calibrate))}


def shown(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    said = io.StringIO()
    monkeypatch.setattr(tracking.console, "file", said)
    monkeypatch.setattr(tracking.console, "_width", 160)
    costs.show(config)
    return said.getvalue()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Formulas


@pytest.mark.parametrize(
    ("settings", "measured", "within"),
    [  # bytes a token of the zoo's three sources on text of three domains, docs/scale.md
        (Capture(), (24, 40), 0.0),
        (Capture(sampler="hybrid", head=8), (32, 48.1), 0.0),
        (Capture(sampler="top_k", k=8), (16.6, 16.7), 0.05),
        (Capture(sampler="top_k", k=12), (21.9, 22), 0.05),
        (Capture(sampler="top_k", k=64), (80, 90), 0.0),
        (Capture(draws=10), (12.1, 14.4), 0.05),
    ],
)
def test_bytes_a_token_are_as_measured(settings: Capture, measured: tuple[float, float], within: float) -> None:
    low, high = measured
    assert low * (1 - within) <= sizes.cache_bytes(settings) <= high * (1 + within)


def test_bytes_a_token_by_hand() -> None:
    assert sizes.cache_bytes(Capture(sampler="top_k", k=10)) == pytest.approx(5.5 + 1.5 + 12)
    assert sizes.cache_bytes(Capture(draws=32)) == pytest.approx(5.5 + 16)
    tempered = Capture(sampler="hybrid", head=10, draws=32, temperature=0.8)
    assert sizes.cache_bytes(tempered) == pytest.approx(5.5 + 1.5 + 12 + 2 * 16)
    nucleus, top_k = Capture(sampler="nucleus", k=10), Capture(sampler="top_k", k=10)
    assert sizes.cache_bytes(nucleus) == sizes.cache_bytes(top_k)


def test_hours_devices_and_nodes_by_hand() -> None:
    assert sizes.reading_hours(70e9, 10e9) == pytest.approx(2 * 70e9 * 10e9 / 400e12 / 3600)
    assert [sizes.devices_for(w, 80e9) for w in (1, 64e9, 64.1e9, 141.2e9)] == [1, 1, 2, 3]
    assert [sizes.nodes_for(5491, days, 281e9, 80e9) for days in (1, 3, 7)] == [29, 10, 5]
    assert sizes.nodes_for(1, 1, 2e12, 80e9) == 4  # 32 devices to hold two terabytes
    assert [sizes.state_a_device(1e9, stage, 8) for stage in range(4)] == [16e9, 5.5e9, 3.75e9, 2e9]
    away = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    assert sizes.state_parts({}, False) == ("optimizer", "gradients", "weights")
    assert sizes.state_parts(away, False) == ("gradients", "weights") and sizes.state_parts(away, True) == ("weights",)
    assert sizes.state_a_device(6.74e9, 2, 8, sizes.state_parts(away, False)) == pytest.approx(15.165e9)
    assert sizes.state_parts({"offload_optimizer": "cpu"}, True) == ("weights",)
    found = [sizes.checkpoints_bytes(1e9, stage, Distill(evaluations=2)) for stage in (0, 2, 3)]
    assert found == [50e9, 50e9, 44e9]
    assert sizes.checkpoints_bytes(1e9, 3, Distill(keep="last")) == 42e9
    assert sizes.checkpoints_bytes(1e9, 3, Distill(lora=Lora())) == 6e9


def test_figures_as_people_read_them() -> None:
    assert [sizes.in_hours(v) for v in (None, 0, 1e-4, 0.01234, 0.4567, 1234.56)] == [
        "?",
        "0",
        "< 0.001",
        "0.012",
        "0.457",
        "1,234.6",
    ]
    assert [sizes.in_bytes(v) for v in (None, 12, 1234567, 2e12)] == ["?", "12B", "1.2 MB", "2.0 TB"]


def test_costs_by_hand(tmp_path: Path, tree: dict[str, Any]) -> None:
    for section in (tree["pivot"], *tree["sources"]):
        section["parameters"] = 1e9
    tree["sources"][1]["active_parameters"] = tree["pivot"]["active_parameters"] = 2e8
    tree["prepare"]["data"][0]["megabytes"] = 8
    settings = ["distill.epochs=3", "capture.sampler=top_k", "capture.k=10"]
    config = tiny.load(tmp_path, tree, *settings, "prepare.validation_share=0")
    rows = {cost.label: cost for cost in costs.estimate(config)}
    hour = 400e12 * 3600
    assert rows["prepare"].tokens == 2e6 and rows["capture/a"].hours == pytest.approx(2 * 1e9 * 2e6 / hour)
    assert rows["capture/b"].hours == pytest.approx(2 * 2e8 * 2e6 / hour)
    assert rows["capture/a"].disk == pytest.approx(2e6 * 19)
    assert rows["distill/control"].tokens == 6e6
    assert rows["distill/control"].hours == pytest.approx(6 * 2e8 * 6e6 / hour)
    assert rows["merge"].disk == 4e9  # the best merge so far and the next
    assert {(cost.state, cost.by) for cost in rows.values()} == {("to do", "estimated")}
    for limit, tokens in ((1000, 1.96e6), (10, 2e6 - 10 * 4096 / 4)):  # 0.02 of 8 MB, or ten samples of 4 KB
        config = tiny.load(tmp_path, tree, f"prepare.validation_limit={limit}")
        assert next(c for c in costs.estimate(config) if c.label == "prepare").tokens == pytest.approx(tokens)


# The data's beginning


def test_the_beginning_of_a_file(tmp_path: Path) -> None:
    path = tiny.write_lines(tmp_path / "a.jsonl", ({"text": "x" * 88} for _ in range(50)))
    dataset = Dataset(str(path))
    size = path.stat().st_size // 50
    rows, share = beginning(dataset, "k", 10 * size - 1)
    assert rows == list(read_rows(dataset, "k"))[:10] and share == 0.2
    rows, share = beginning(dataset, "k", 1 << 20)
    assert len(rows) == 50 and share == 1
    path.write_text("")
    assert beginning(dataset, "k", 1 << 20) == ([], 1)
    table = pa.table({"text": [f"{n} text" for n in range(40)]})
    pq.write_table(table, tmp_path / "b.parquet")
    dataset = Dataset(str(tmp_path / "b.parquet"))
    rows, share = beginning(dataset, "k", (tmp_path / "b.parquet").stat().st_size // 4)
    assert [row["text"] for _, row in rows] == [f"{n} text" for n in range(10)] and share == 0.25


def test_a_preview_of_all_is_what_prepare_makes(tmp_path: Path) -> None:
    paths = [tiny.write_lines(tmp_path / f"{n}.jsonl", ({"text": t} for t in tiny.texts(60, seed=n))) for n in "ab"]
    data = (Dataset(str(paths[0])), Dataset(str(paths[1]), limit=20))
    for settings in (
        {},
        {"train_share": 0.5, "heldout_share": 0.2},
        {"max_bytes": 30},
        {"validation_share": 0.5},
        {"validation_share": 0.5, "validation_limit": 10, "max_bytes": 10},
    ):
        config = Config("small", Model("p"), (Model("q", "a"),), Prepare(data, **settings))
        train = [s for part, s in prepare._Split(config).samples() if part == "train"]
        found = prepare.preview(config)
        assert found is not None
        assert found[:2] == (len(train), sum(len(s.encode()) for x in train for s in x.segments()))
        assert {s.id for s in found[2]} == {s.id for s in train}


def test_a_preview_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write_lines(tmp_path / "a.jsonl", ({"text": f"{n:04} of the same length"} for n in range(1000)))
    monkeypatch.setattr(prepare, "_PREVIEW_BYTES", path.stat().st_size // 10)
    data = Dataset(str(path))
    held = Dataset(str(path), heldout=True)
    for dataset, wanted in ((data, 1000), (Dataset(str(path), limit=300), 300), (Dataset(str(path), limit=50), 50)):
        found = prepare.preview(Config("small", Model("p"), (Model("q", "a"),), Prepare((dataset, held))))
        assert found is not None
        assert found[0] == pytest.approx(wanted, rel=0.02) and found[1] == pytest.approx(23 * wanted, rel=0.02)
    for limit, left in ((1000, 500), (150, 850), (20, 980)):  # the beginning, 100 lines, has some 50 for validation
        settings = {"validation_share": 0.5, "validation_limit": limit}
        found = prepare.preview(Config("small", Model("p"), (Model("q", "a"),), Prepare((data, held), **settings)))
        assert found is not None
        assert found[0] == pytest.approx(left, rel=0.1) and found[1] == pytest.approx(23 * found[0])
    absent = Config("small", Model("p"), (Model("q", "a"),), Prepare((data, Dataset("owner/name"))))
    assert prepare.preview(absent) is None


# What is measured


def test_a_calibration_comes_near_the_capture(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tiny.load(tmp_path, tree)
    before = rows_of(config)
    assert [before[f"capture/{n}"].by for n in ("a", "b", "pivot")] == ["measured"] * 3
    assert before["prepare"].by == "measured" and before["prepare"].samples == 38  # two are validation's
    pipeline.run(config, ["prepare", "capture"])
    after = rows_of(config)
    for name in ("a", "b", "pivot"):
        (folder,) = (tmp_path / "run" / "capture").glob(f"{name}-*")
        cache, train = Cache(folder, None, name), Corpus(next((tmp_path / "run" / "prepare").iterdir()), "train")
        facts = cache.facts
        assert set(cache.ids()) == {sample.id for sample in train}
        row, done = before[f"capture/{name}"], after[f"capture/{name}"]
        assert (done.by, done.state, done.hours) == ("captured", "done", 0)
        assert (done.tokens, done.disk) == (facts["tokens"], facts["bytes on disk"])
        assert row.samples == done.samples == 38 and row.tokens == pytest.approx(facts["tokens"], rel=0.2)
        assert row.hours is not None and 0 < row.hours < 0.1
        assert row.disk is not None and done.disk is not None
        assert row.disk == pytest.approx(done.disk, rel=0.9)  # shards of eight samples are mostly their own frame
    assert after["prepare"].state == "done" and after["prepare"].samples == 38


def test_a_calibration_of_what_was_prepared(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tiny.load(tmp_path, tree)
    pipeline.run(config, ["prepare"])
    (tmp_path / "run" / ".fingerprints.json").unlink()
    kept = everything(tmp_path / "run")
    rows = rows_of(config)
    left = everything(tmp_path / "run")
    left.pop(".fingerprints.json")
    assert left == kept and rows["prepare"].state == "done"
    assert {rows[f"capture/{n}"].by for n in ("a", "b", "pivot")} == {"measured"}


def test_a_calibration_leaves_nothing_behind(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found = survey.survey(tiny.load(tmp_path, tree), True)
    assert sorted(found.trials) == ["a", "b", "pivot"] and not list(scratch.iterdir())
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".fingerprints.json"]


def test_what_is_not_calibrated(tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tree["sources"][0]["parallel"] = "zero3"
    tree["sources"][1] |= {"model": "owner/name", "parameters": 1e9}
    found = survey.survey(tiny.load(tmp_path, tree), True)
    assert list(found.trials) == ["pivot"]
    assert found.reasons == {"a": "parallel: zero3 takes all devices", "b": "not here"}
    rows = rows_of(tiny.load(tmp_path, tree))
    assert [rows[f"capture/{n}"].by for n in ("a", "b", "pivot")] == ["estimated", "estimated", "measured"]
    monkeypatch.setattr(survey, "_free", lambda: 1000.0)
    assert survey.survey(tiny.load(tmp_path, tree), True).reasons["pivot"] == "too large for this device"
    assert survey.survey(tiny.load(tmp_path, tree), False).reasons == {}
    tree["prepare"]["data"][0] = {"data": "owner/data", "megabytes": 4}
    found = survey.survey(tiny.load(tmp_path, tree), True)
    assert not found.trials and found.reasons["pivot"] == "its data is not here"


def test_a_source_with_a_cache_needs_nothing(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = tiny.load(tmp_path, tree)
    pipeline.run(config, ["prepare", "capture"])
    (folder,) = (tmp_path / "run" / "capture").glob("a-*")
    tree["sources"][0]["cache"] = str(folder)
    found = survey.survey(tiny.load(tmp_path, tree, f"out={tmp_path / 'other'}"), True)
    assert sorted(found.trials) == ["b", "pivot"]
    assert "capture/a" not in rows_of(tiny.load(tmp_path, tree), False)


def test_samples_that_a_source_cannot_read(tmp_path: Path, tree: dict[str, Any]) -> None:
    lines = [*tiny.texts(38), "word " * 2000, "tree " * 2000]
    tiny.write_lines(tmp_path / "train.jsonl", ({"text": text} for text in lines))
    settings = ["prepare.max_bytes=20000", "prepare.validation_share=0"]
    config = tiny.load(tmp_path, tree, *settings)
    with pytest.raises(ValueError, match="^a: sample .* tokens and the context is 256; lower prepare.max_bytes"):
        rows_of(config)
    skipping = tiny.load(tmp_path, tree, *settings, "capture.too_long=skip")
    assert rows_of(skipping)["capture/a"].samples == pytest.approx(38)
    tiny.write_lines(tmp_path / "train.jsonl", ({"text": text} for text in lines[38:]))
    reason = "none of the samples fits its context"
    assert set(survey.survey(skipping, True).reasons.values()) == {reason}


# What is shown


def test_the_plan_on_the_screen(tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tree["sources"][0] |= {"model": "owner/large", "parameters": 70e9, "dtype": "auto"}
    mixture = {"parameters": 141e9, "active_parameters": 39e9, "parallel": "zero3", "dtype": "auto"}
    tree["sources"][1] |= {"model": "owner/larger", **mixture}
    tree["prepare"]["data"][0] = {"data": "owner/data", "megabytes": 40000}
    said = shown(tiny.load(tmp_path, tree, "pivot.parameters=8e9"), monkeypatch)
    assert "not calibrated (not here): a, b" in said and "not calibrated (its data is not here): pivot" in said
    assert "a: 140.0 GB of weights do not fit a device of 80.0 GB; set `parallel: zero3` and take 3 devices" in said
    assert "b: 282" not in said and said.count("≥ 9.8 M") == 3
    hours = 2 * (70e9 + 39e9 + 8e9) * 1e10 / 400e12 / 3600
    assert f"all captures, one after the other: {hours:,.0f} device hours" in said
    for line in ("1 day ", "3 days", "7 days"):
        assert line in said
    tree["prepare"]["data"][0]["megabytes"] = 400
    assert "one after the other" not in shown(tiny.load(tmp_path, tree), monkeypatch)
    tree["prepare"]["data"][0] = {"data": str(tmp_path / "train.jsonl"), "limit": 5}
    assert "≥ " not in shown(tiny.load(tmp_path, tree), monkeypatch).replace("≥ 3", "").replace("≥ 5", "")


def test_only_the_first_rank_plans(tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(tiny.load(tmp_path, tree), monkeypatch) == ""
    assert not (tmp_path / "run").exists()


def test_the_scale_config_is_what_docs_work_out() -> None:
    """docs/scale.md repeats these figures."""
    from fusion import config_file

    config = config_file.load(tiny.ROOT / "configs/scale-70b.yaml")
    rows = {cost.label: cost for cost in costs.estimate(config)}
    captures = [cost for label, cost in rows.items() if label.startswith("capture/")]
    assert len(captures) == 7
    assert {cost.tokens for cost in captures} == {1e10 - 64 * 8000 / 4}  # without validation's
    text = (tiny.ROOT / "docs/scale.md").read_text()
    hours = sizes.total(cost.hours for cost in captures)
    disk = sizes.total(cost.disk for cost in captures)
    assert hours is not None and f"{hours:,.0f} device hours" in text
    assert f"{sizes.in_bytes(disk)}" in text
    nodes = [sizes.nodes_for(hours, days, 281.2e9, 80e9) for days in (1, 3, 7)]
    assert f"{nodes[0]} nodes in a day, {nodes[1]} in three, {nodes[2]} in a week" in text
    assert json.loads((tiny.ROOT / config.distill.deepspeed).read_text())["zero_optimization"]["stage"] == 3
