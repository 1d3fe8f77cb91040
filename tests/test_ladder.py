"""The quality ladder: every rung's config loads, parts of the corpus nest, sums are right."""

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import ROOT, artifact, load, samples, tree, write_lines

from fusion import config_file
from fusion.measure import Reading


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ladder")


def _trials() -> dict[str, Any]:
    trials: dict[str, Any] = importlib.import_module("ladder_trials").TRIALS
    return trials


def _zoo(ladder: Any, folder: Path) -> Any:
    for name in ("pivot-a", "math-b", "code-c", "prose-d"):
        (folder / "zoo" / name).mkdir(parents=True, exist_ok=True)
        (folder / "zoo" / name / "config.json").write_text(f'{{"name": "{name}"}}')
    for name in ("fuse.jsonl", "heldout.jsonl"):
        (folder / "zoo" / name).touch()
    return ladder.Zoo.of(folder / "zoo")


def test_a_zoo_is_four_models_and_two_files(ladder: Any, tmp_path: Path) -> None:
    zoo = _zoo(ladder, tmp_path)
    assert zoo.pivot == tmp_path / "zoo/pivot-a" and list(zoo.sources) == ["math", "code", "prose"]
    assert str(zoo.named().pivot) == "zoo/pivot-a" and str(zoo.named().sources["prose"]) == "zoo/prose-d"
    (tmp_path / "zoo/code-e").mkdir()
    with pytest.raises(ValueError, match="2 folders are called code-…, and one is wanted"):
        ladder.Zoo.of(tmp_path / "zoo")
    (tmp_path / "zoo/code-e").rmdir()
    (tmp_path / "zoo/fuse.jsonl").unlink()
    with pytest.raises(ValueError, match="there is no fuse.jsonl"):
        ladder.Zoo.of(tmp_path / "zoo")


def test_every_rung_of_every_regime_is_a_config(ladder: Any, tmp_path: Path) -> None:
    places = [_zoo(ladder, tmp_path), *(tmp_path / name for name in ("corpus.jsonl", "heldout.jsonl", "out"))]
    for regime in (*ladder.REGIMES.values(), ladder.QUICK):
        for rung in ladder.RUNGS.values():
            holds = ladder.tree(rung, regime, *places, 3, 1e-3, ROOT / "configs/deepspeed/zero0.json")
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(holds))
            config = config_file.load(tmp_path / "c.yaml")
            assert config.seed == 3 and config.distill.epochs * rung.times == pytest.approx(regime.passes)
            assert (config.distill.topology == "pairwise") == (rung.trains == "pairwise")
            published = rung.name in ("fusellm", "fusechat")
            assert (config.align.procedure, config.distill.gate_unit) == (
                (rung.name, "tokens") if published else ("boundaries", "bytes")
            )
            assert rung.merges or rung.trains != "pairwise"


def test_parts_of_the_corpus(ladder: Any, tmp_path: Path) -> None:
    corpus = importlib.import_module("ladder_corpus")
    rows = [{"domain": d, "text": f"{d} {n} " + "x" * 50} for d in ("math", "code", "prose") for n in range(20)]
    small, large = corpus.part(rows, 200), corpus.part(rows, 700)
    assert all(200 <= size < 270 for size in corpus.bytes_of(small).values())
    assert all(row in large for row in small) and len(large) < len(rows)
    others = [{"domain": d, "text": f"more {d}" + "y" * 900} for d in ("math", "code", "prose")]
    assert [row for row in corpus.part(rows, 1500, others) if row in others] == others
    with pytest.raises(ValueError, match="math: .* bytes of text, and 3000 are wanted"):
        corpus.part(rows, 3000, others)
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2\n#### 2"}]
    asked = [{"messages": chat, "split": how} for how in ("train", "test")]
    asked.append({"messages": [{"role": "user", "content": "2+2?"}, chat[1]], "split": "train"})
    write_lines(tmp_path / "math_qa.jsonl", asked)
    write_lines(tmp_path / "code_python.jsonl", [{"text": "def f():\n  pass"}, {"text": "x = 1"}])
    write_lines(tmp_path / "prose_gutenberg.jsonl", [{"text": "It was."}])
    known = [{"domain": "math", "text": "Question: 2+2?\nAnswer: 2 #### 2\n"}, {"domain": "code", "text": "x = 1"}]
    found = corpus.more(tmp_path, known)
    assert [row["text"] for row in found] == [
        "Question: 1+1?\nAnswer: 2\n#### 2",
        "def f():\n  pass",
        "It was.",
    ]


def _bits(mean: float) -> dict[str, dict[str, float]]:
    return {h: {"math": mean, "code": mean, "prose": mean, "mean": mean} for h in ("report", "choose")}


def test_sums_over_seeds(ladder: Any) -> None:
    show = importlib.import_module("ladder_show")

    def run(rung: str, mean: float, chosen: bool = True, **more: Any) -> dict[str, Any]:
        return {"regime": "quick", "rung": rung, "about": rung, "chosen": chosen, "rate": 1e-3, **_bits(mean), **more}

    models = {"a": _bits(2.2), "b": _bits(2.3), "average": _bits(2.0)}
    rows = [run("pivot", 2.4), run("labels", 2.3), run("labels", 2.2), run("labels", 1.0, chosen=False)]
    rows.append(run("pairwise", 2.0, models=models, targets=["a", "b"]))
    lines = {line["label"]: line for line in show.summed(ladder.QUICK, rows)}
    assert list(lines) == ["pivot", "labels", "pairwise/a", "pairwise/b", "pairwise/average", "pairwise"]
    assert lines["labels"]["bits"]["mean"] == pytest.approx((2.25, 0.0707), abs=1e-4)
    assert lines["labels"]["gain"] == pytest.approx(0.15) and lines["labels"]["times"] == pytest.approx(1)
    assert lines["pairwise/average"]["times"] == pytest.approx(0.4 / 0.15)
    worse = [run("pivot", 2.4), run("labels", 2.5), run("joint", 2.3)]
    assert [line["times"] for line in show.summed(ladder.QUICK, worse)] == [None] * 3
    nothing = [run("pivot", 2.4), run("labels", 2.399), run("joint", 2.3)]
    assert [line["times"] for line in show.summed(ladder.QUICK, nothing)] == [None] * 3
    assert lines["pairwise/a"]["about"] == "pairwise · target a"


def _labels(label: str, bits: float, text: float) -> dict[str, Any]:
    same = {"label": label, "rung": label, "trains": "control"}
    return {**same, "text": text, "choose": bits, "bits": {"mean": (bits, 0.0)}}


def test_text_that_label_only_training_needs(ladder: Any) -> None:
    show = importlib.import_module("ladder_show")
    labels = {"labels": 2.4, "labels-2": 2.3, "labels-10": 2.2}
    lines = [_labels(name, bits, float(name.partition("-")[2] or 1)) for name, bits in labels.items()]
    lines.append(_labels("labels-back", 2.41, 1.0))  # not so good
    lines.append({**_labels("labels-2/control", 2.0, 2.0), "rung": "labels-2"})
    lines.append({**_labels("joint", 2.0, 1.0), "trains": "joint"})
    assert show.texts_needed(lines, 2.45) == (1.0, True)
    assert show.texts_needed(lines, 2.35) == pytest.approx((2**0.5, True))
    assert show.texts_needed(lines, 2.25) == pytest.approx((20**0.5, True))
    assert show.texts_needed(lines, 2.2) == pytest.approx((10.0, True))
    assert show.texts_needed(lines, 2.1) == (10.0, False)


def test_trials_and_rungs_without_a_source(ladder: Any, tmp_path: Path) -> None:
    places = [_zoo(ladder, tmp_path), *(tmp_path / name for name in ("corpus.jsonl", "heldout.jsonl", "out"))]
    loaded, trained = {}, {}
    for rung in (ladder.RUNGS["joint"], ladder.RUNGS["joint-no-math"], *_trials().values()):
        holds = ladder.tree(rung, ladder.TRIAL, *places, 0, 1e-3, ROOT / "configs/deepspeed/zero0.json")
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**holds, "name": "same"}))
        loaded[rung.name], trained[rung.name] = config_file.load(tmp_path / "c.yaml"), rung.trains
    assert [s.name for s in loaded["joint-no-math"].sources] == ["code", "prose"]
    assert len({(trained[name], repr(config)) for name, config in loaded.items()}) == len(
        loaded
    )  # every trial changes something
    assert not set(_trials()) & set(ladder.RUNGS)


def test_all_regimes_in_one_table_and_one_picture(ladder: Any, tmp_path: Path) -> None:
    show, draw = importlib.import_module("ladder_show"), importlib.import_module("ladder_picture")
    rows = [_row("trial", "pivot", 2.4, rate=None), _row("trial", "math", 3.0, rate=None)]
    rows += [_row("trial", "labels", 2.375), _row("trial", "labels", 2.37501)]
    rows.append(_row("trial", "pairwise", 2.25))
    kinds = {"math": 2.375, "code": 2.26, "average": 2.25}
    rows[-1] |= {
        "models": {name: _bits(bits) for name, bits in kinds.items()},
        "targets": ["math", "code"],
    }
    rows += [_row("least", "pivot", 2.4, rate=None), _row("least", "joint", 2.3)]
    regimes = [ladder.TRIAL, ladder.LEAST]
    assert [line.split(" | ")[:2] for line in show.overview(regimes, rows).splitlines()[2:]] == [
        ["| the pivot", "2.4000"],
        ["| labels", "2.3750 ± 0.0000 (2), +0.0250, 1.00×"],
        ["| joint", ""],
        ["| pairwise · best target", "2.2600, +0.1400, 5.60×"],
        ["| pairwise", "**2.2500**, +0.1500, 6.00×"],
    ]
    assert show.overview(regimes, rows).splitlines()[4].endswith("| **2.3000**, +0.1000 |")
    draw.picture(tmp_path / "ladder.png", regimes, rows)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_held_out_texts_are_halved_whole(ladder: Any) -> None:
    corpus = importlib.import_module("ladder_corpus")
    rows = [{"domain": d, "text": f"{d} {n}"} for d in ("math", "code", "prose") for n in range(300)]
    halves = corpus.halved(rows, ("choose", "report"))
    first = [row["text"] for row in halves if row["domain"] == "choose-math"]
    assert 70 < len(first) < 130
    assert {row["domain"] for row in halves if "math" in row["text"]} == {"choose-math", "report-math"}
    assert corpus.part(rows, 100, last=True)[0] not in corpus.part(rows, 100)


@pytest.fixture
def climbing(ladder: Any) -> Any:
    return importlib.import_module("ladder_climb")


def test_learning_rates_are_climbed_until_none_is_better(
    ladder: Any, climbing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[float, int]] = []

    def run(self: Any, regime: Any, rung: Any, rate: float, seed: int) -> dict[str, Any]:
        ran.append((rate, seed))
        return {"rate": rate, "seed": seed, "choose": {"mean": abs(rate - 2e-3)}}

    monkeypatch.setattr(climbing.Climber, "run", run)
    climber = climbing.Climber(None, None, "a lab")
    rows = climber.climb(ladder.QUICK, ladder.RUNGS["labels"], ladder.RATES, 2)
    assert ran == [(r, 0) for r in (5e-4, 2.5e-4, 1e-3, 2e-3, 4e-3)] + [(2e-3, 1)]
    assert [(row["rate"], row["seed"]) for row in rows if row["chosen"]] == [(2e-3, 0), (2e-3, 1)]
    assert all(row["climbed"] for row in rows)
    assert not climber.climb(ladder.QUICK, ladder.RUNGS["labels"], [5e-4, 1e-3, 2e-3], 1)[0]["climbed"]  # at the end
    ran.clear()
    (row,) = climber.climb(ladder.QUICK, ladder.RUNGS["joint"], [1e-3], 1)
    assert ran == [(1e-3, 0)] and not row["climbed"]


class NoQuestions:
    questions = 0


def test_what_is_recorded_is_not_run_again(
    ladder: Any, climbing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, float]] = []

    def run(lab: Any, regime: Any, rung: Any, rate: float, seed: int, known: dict[str, Any]) -> dict[str, Any]:
        ran.append((rung.name, rate))
        models = {"joint": _bits(1 + rate)}
        models |= {name: {**_bits(1 + rate / 3), "merge": how} for name, how in rung.merges.items()}
        return {"models": {**known.get("models", {}), **models}, "targets": ["joint"], "rate": rate, "seed": seed}

    monkeypatch.setattr(climbing, "_run", run)
    path, regime = tmp_path / "record.jsonl", ladder.TRIAL
    zoo, whole, joint = _zoo(ladder, tmp_path), ladder.RUNGS["joint-whole"], ladder.RUNGS["joint"]

    def climb(rung: Any, trains: bool) -> list[dict[str, Any]]:
        lab = NoQuestions() if trains else None
        climber = climbing.Climber(zoo, climbing.Record(path, zoo, tmp_path / "memory.json"), lab)
        rows: list[dict[str, Any]] = climber.climb(regime, rung, [5e-4, 1e-3], 1)
        return rows

    assert [row["rate"] for row in climb(whole, True) if row["chosen"]] == [5e-4]
    assert sorted(ran) == [("joint-whole", 5e-4), ("joint-whole", 1e-3)]
    assert climb(joint, False) == []  # trained, but drawn back nowhere
    (best,) = [row for row in climb(joint, True) if row["chosen"]]
    assert best["choose"]["mean"] == pytest.approx(1 + 5e-4 / 3, abs=1e-6) and best["rung"] == "joint"
    assert sorted(ran[2:]) == [("joint", 5e-4), ("joint", 1e-3)]  # the same trainings, found by the lab
    for trains in (True, False):
        assert [row["rung"] for row in climb(whole, trains)] == ["joint-whole"] * 2
        assert climb(joint, trains) == climb(joint, True) and len(ran) == 4
    assert climb(ladder.RUNGS["labels"], False) == []
    assert str(ROOT) not in path.read_text() and str(tmp_path) not in path.read_text()
    path.write_text(path.read_text() + '{"key": "a", "row": 5}\n')
    with pytest.raises(ValueError, match="record.jsonl, line 5: is no line of a record"):
        climbing.Record(path, zoo, tmp_path / "memory.json")


def test_a_key_tells_all_that_decides_a_run(ladder: Any, climbing: Any, tmp_path: Path) -> None:
    made = _zoo(ladder, tmp_path)

    def key(rung: str = "joint", regime: Any = ladder.TRIAL, seed: int = 0, rate: float = 1e-3, zoo: Any = made) -> str:
        record = climbing.Record(None, zoo, tmp_path / "memory.json")
        told: str = record.of_run({**ladder.RUNGS, **_trials()}[rung], regime, seed, rate)
        return told

    def of_pivot(regime: Any, zoo: Any = made) -> str:
        told: str = climbing.Record(None, zoo, tmp_path / "memory.json").of_model(regime, "pivot")
        return told

    first = key()
    assert key("joint-whole") == first and key("labels") == key("labels-back") != first
    other = _zoo(ladder, tmp_path / "elsewhere")
    assert key(zoo=other) == first and of_pivot(ladder.TRIAL, other) == of_pivot(ladder.TRIAL)
    typed = ladder.Zoo.of(tmp_path / "zoo", "bfloat16")
    converged, small = ladder.REGIMES["converged"], ladder.REGIMES["small-12"]
    keys = [first, key("labels"), key("labels-10"), key("labels", small), key("labels", converged)]
    keys += [key(seed=1), key(rate=2e-3), key("weight-0"), key("top-32"), key("joint-no-code"), key(zoo=typed)]
    models = [of_pivot(converged), of_pivot(small), of_pivot(small, typed)]
    for name in ("fuse.jsonl", "heldout.jsonl", "pivot-a/config.json", "code-c/config.json"):
        path = tmp_path / "elsewhere/zoo" / name
        kept = path.read_text()
        path.write_text(kept + " ")
        keys.append(key(zoo=other))
        path.write_text(kept)
    assert len(set(keys)) == len(keys) and len(set(models)) == len(models)


def test_processes_add_to_one_record(ladder: Any, climbing: Any, tmp_path: Path) -> None:
    first, second = (climbing.Record(tmp_path / "r.jsonl", _zoo(ladder, tmp_path), tmp_path / "m.json") for _ in "ab")
    first.add("a", {"rate": 3.125e-5, "bits": 1.23456789})
    assert second.get("a") == {"rate": 3.125e-5, "bits": 1.234568}
    (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text().rstrip())  # cut off
    second.add("b", {"bits": 2})
    assert first.get("b") == {"bits": 2} and first.get("c") is None


@pytest.mark.skipif(not (ROOT.parent / "shared/zoo").is_dir(), reason="the shared zoo is not here")
def test_every_line_that_is_recorded_is_found(ladder: Any, climbing: Any, tmp_path: Path) -> None:
    record = importlib.import_module("ladder_record")
    zoo = ladder.Zoo.of(ROOT.parent / "shared/zoo")
    known = record.Record(record.HERE, zoo, tmp_path / "memory.json")
    regimes = [*ladder.REGIMES.values(), ladder.TRIAL, ladder.LEAST]
    found = {known.of_model(regime, name) for regime in regimes for name in ("pivot", *ladder.DOMAINS)}
    rungs = {**ladder.RUNGS, **_trials()}
    for line in record.HERE.read_text().splitlines():
        held = json.loads(line)
        if "config" in held["row"]:
            regime = next(r for r in regimes if held["row"]["config"]["name"].startswith(f"{r.name}-"))
            rung = rungs[held["row"]["config"]["name"].removeprefix(f"{regime.name}-")]
            of = rung, regime, held["row"]["seed"], held["row"]["rate"]
            assert held["key"] == known.of_run(*of), rung.name
            assert held["row"]["config"] == record.told(record.config(zoo, *of)), rung.name
        else:
            assert held["key"] in found


def test_a_record_with_parts_of_a_regime(
    ladder: Any, climbing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality, path = importlib.import_module("quality"), tmp_path / "record.jsonl"
    record = climbing.Record(path, _zoo(ladder, tmp_path), tmp_path / "memory.json")
    for regime in (ladder.TRIAL, ladder.REGIMES["converged"]):
        record.add(record.of_model(regime, "math"), {"rung": "math", "about": "source math", "seed": 0, **_bits(3.0)})
    record.add(record.of_model(ladder.TRIAL, "pivot"), {"rung": "pivot", "about": "the pivot", "seed": 0, **_bits(2.4)})
    run = {"models": {"control": _bits(2.3)}, "targets": ["control"], "rate": 5e-4, "seed": 0, "positions": 9}
    record.add(record.of_run(ladder.RUNGS["labels"], ladder.TRIAL, 0, 5e-4), run)

    def show(*more: str) -> str:
        asked = ["--recorded", "--zoo", str(tmp_path / "zoo"), "--record", str(path), "--work", str(tmp_path / "work")]
        monkeypatch.setattr("sys.argv", ["quality.py", *asked, *more])
        quality.main()
        return capsys.readouterr().out

    said = show("--regimes", "trial", "converged", "small-12", "--markdown", str(tmp_path / "table.md"))
    assert "label-only training" in said and "converged" not in said and "small-12" not in said
    assert "2.3000**\\*, +0.1000, 1.00× |" in (tmp_path / "table.md").read_text()
    assert "lower or higher learning rate was not tried" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="has nothing of converged"):
        show("--regimes", "converged")
    for option, value, error in (
        ("--rates", "0", "--rates 0: must be above 0 and below 1"),
        ("--plot", str(tmp_path / "a.xyz"), "must end in .png"),
        ("--markdown", str(tmp_path), "is a folder"),
        ("--record", str(tmp_path / "none"), "there is no such file"),
    ):
        with pytest.raises(ValueError, match=error):
            show(option, value)


def test_a_best_rate_whose_neighbours_were_not_tried_is_told(
    ladder: Any, climbing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {5e-4: 1.0, 1e-3: 2.0}

    def run(self: Any, regime: Any, rung: Any, rate: float, seed: int) -> dict[str, Any] | None:
        return {"rate": rate, "choose": {"mean": known[rate]}} if rate in known else None

    monkeypatch.setattr(climbing.Climber, "run", run)
    climber = climbing.Climber(None, None, None)
    told = {row["rate"]: row["climbed"] for row in climber.climb(ladder.TRIAL, ladder.RUNGS["joint"], ladder.RATES, 1)}
    assert told == {5e-4: False, 1e-3: False}
    known[2.5e-4] = 1.5
    assert all(row["climbed"] for row in climber.climb(ladder.TRIAL, ladder.RUNGS["joint"], ladder.RATES, 1))


def _row(regime: str, rung: str, mean: float, rate: float | None = 1e-3, **domains: float) -> dict[str, Any]:
    bits = {"math": mean, "code": mean, "prose": mean, "mean": mean} | domains
    about = "the pivot" if rung == "pivot" else rung
    told = {"regime": regime, "rung": rung, "about": about, "chosen": True, "positions": 1000 * mean, "rate": rate}
    return {**told, "choose": bits, "report": bits}


def test_which_source_helped_where_what_more_text_gives_and_what_bytes_buy(ladder: Any) -> None:
    show, besides = (importlib.import_module(name) for name in ("ladder_show", "ladder_besides"))
    rows = [_row("trial", "pivot", 2.4), _row("trial", "labels", 2.375), _row("trial", "joint", 2.25)]
    rows[-1] |= {"cache_bytes": 2.5e6}
    rows.append(_row("trial", "joint-no-math", 2.2625, math=2.375))
    rows[-1] |= {"models": {"joint": rows[-1], "as far as chosen": rows[-1]}, "targets": ["joint"]}
    (helped,) = besides.besides([ladder.TRIAL], rows)
    assert helped.rows == [["math", "+0.1250", "+0.0125", "+0.0125", "+0.0125"]]
    more = [_row("small-12", "pivot", 2.4), _row("small-12", "labels", 2.25), _row("small-12", "labels-back", 2.24)]
    more.append(_row("one-pass", "pivot", 2.4))
    regimes = [ladder.REGIMES["small-12"], ladder.REGIMES["one-pass"], ladder.TRIAL]
    assert besides.besides(regimes, [*rows, *more]) == [helped]  # one regime alone that has labels and joint
    more.append(_row("small-12", "joint", 2.0))
    assert besides.besides(regimes, [*rows, *more])[-1].rows == [
        ["5 % of the corpus, 12 passes", "2,250", "+0.0250", "–", "+0.1500"],
        ["15 % of the corpus, 12 passes", "2,000", "+0.1500", "+0.1600", "+0.4000"],
    ]
    rows += [
        {**_row("trial", "draws-200", 2.2), "cache_bytes": 9e6},
        {**_row("trial", "top-32", 2.3), "cache_bytes": 4e5},
    ]
    stored = besides.besides([ladder.TRIAL], rows)[-1]
    assert stored.rows == [
        ["top-32", "0.4", "+0.1000"],
        ["50 draws", "2.5", "+0.1500"],
        ["draws-200", "9.0", "+0.2000"],
    ]
    assert stored.markdown().splitlines()[2:5] == [
        "| kept of each source | MB of all sources and the pivot | joint's gain |",
        "| --- | --- | --- |",
        "| top-32 | 0.4 | +0.1000 |",
    ]
    assert stored.markdown() in show.overview([ladder.TRIAL], rows, [stored])


def test_what_each_merge_gives_and_how_near_the_sources_a_target_is(ladder: Any) -> None:
    besides = importlib.import_module("ladder_besides")
    rows = [_row("small-12", "pivot", 2.4), _row("converged", "pivot", 2.0)]
    rows += [
        _row(name, domain, 3.0, **{domain: 1.5}) for name in ("small-12", "converged") for domain in ladder.DOMAINS
    ]
    rows += [_row("small-12", "joint", 2.25), _row("small-12", "pairwise", 2.3), _row("small-12", "pairwise", 2.5)]
    for row, of_math in zip(rows[-2:], (2.3, 2.5), strict=True):
        target, average = (_row("small-12", "pairwise", mean) for mean in (of_math, of_math - 0.25))
        row |= {"models": {"math": target, "average": average}, "targets": ["math"], "climbed": False}
    regimes = [ladder.REGIMES["small-12"], ladder.REGIMES["converged"]]
    merged, near = besides.besides(regimes, rows)
    assert merged.columns == ["", "small-12"]
    assert merged.rows == [["target math", "2.4000 ± 0.1414 (2)*"], ["average", "2.1500 ± 0.1414 (2)*"]]
    assert near.rows == [
        ["the pivot", *["2.4000"] * 4],
        ["joint: 15 % of the corpus, 12 passes", *["2.2500"] * 4],
        ["each source in its own domain", *["1.5000"] * 4],
    ]
    with_both = besides.besides(regimes, [*rows, _row("converged", "joint", 1.75)])[1]
    assert [told[0] for told in with_both.rows][2] == "the pivot, converged"


def test_a_merge_is_made_where_a_figure_is_asked_for_and_gone_afterwards(
    climbing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = importlib.import_module("ladder_lab")
    lab = object.__new__(shop.Lab)
    lab.work, lab.questions, lab._unmade = tmp_path, 0, {}
    lab.zoo = _zoo(importlib.import_module("ladder"), tmp_path)
    (tmp_path / "readings").mkdir()
    lab._pieces = {"choose": samples(2, seed=1), "report": samples(2, seed=2)}
    config = load(tmp_path, tree(tmp_path, tmp_path / "pivot", {"a": tmp_path}))
    target = artifact(tmp_path, "distill")
    noise, best = 0.0, (0.75, 0.5)  # by how much scales suit one sample and not the other; what suits both
    merged: list[tuple[float, float]] = []

    def merge(recipe: Any, folder: Path) -> None:
        merged.append((1.0, 1.0) if recipe.lines is None else (recipe.lines.alpha, recipe.lines.outside))
        folder.mkdir(parents=True)

    def read(model: Any, folder: Path, pieces: Any, batch_tokens: int) -> Reading:
        layers, outside = (0, 0) if folder.name == "pivot" else merged[-1]
        assert folder.name == "pivot" or folder.is_dir()
        nats = 2 + (layers - best[0]) ** 2 + (outside - best[1]) ** 2 + noise * np.array([layers, -layers])
        return Reading(("plain", "plain"), math.log(2) * nats, np.ones(2, np.int64))

    monkeypatch.setattr(shop, "merge", merge)
    monkeypatch.setattr(shop, "plan", lambda recipe: recipe)
    monkeypatch.setattr(shop, "read", read)
    monkeypatch.setattr(shop.hub, "fingerprint", lambda *_: {"weights": "pivot"})
    told = climbing._merged(lab, config, {"joint": target}, {"method": "linear", "scale": "auto"})
    assert told["scale"] == [0.75, 0.5] and told["report"] == {"plain": 2.0, "mean": 2.0}
    assert merged[-2:] == [(0.75, 0.5)] * 2 and len(merged) == 10  # once more for the half that reports
    again = climbing._merged(lab, config, {"joint": target}, {"method": "linear", "scale": "auto"})
    assert again == told and len(merged) == 10 and not list((tmp_path / "merged").glob("*"))
    noise, best = 10.0, (1.25, 1.2)
    shutil.rmtree(tmp_path / "readings")
    (tmp_path / "readings").mkdir()
    told = climbing._merged(lab, config, {"joint": target}, {"method": "linear", "scale": "auto"})
    assert told["scale"] == [1.0, 1.0]  # nothing is surely better
