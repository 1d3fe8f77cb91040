"""The release room: the table, the verdict, the report, the card, publishing."""

import ast
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from rich.console import Console

from fusion import config_file
from fusion.artifact import Artifact
from fusion.config import Config, Model
from fusion.release import stage
from fusion.release.card import model_card
from fusion.release.publish import publish
from fusion.release.report import console_table, verdict, write_report
from fusion.release.summary import (
    MergeFacts,
    Role,
    Scored,
    StageFacts,
    Summary,
    by_kind,
    by_layer,
    curve,
    smooth,
    taught_by,
)

NASTY = '<script>alert("x")</script> & [bold]'
PLOTS = {"bits.png", "training.png", "teachers.png", "merge.png"}


def scored(role: Role, math_bits: float, code_bits: float, name: str | None = None) -> Scored:
    bits = {"math": math_bits, "code": code_bits}
    path = f"runs/t/{role}"
    return Scored(name or role, role, bits, (math_bits + code_bits) / 2, 1234567, "LlamaForCausalLM", path)


def stages() -> tuple[StageFacts, ...]:
    history: list[dict[str, Any]] = [
        {"step": s, "loss": 2.0, "label_loss": 3 - s / 20, "taught_by/llama": 0.6, "fusion_loss/llama": 2.5}
        for s in range(1, 11)
    ]
    history.append({"step": 10, "train_runtime": 4.0})
    told = {"history": history, "taught_by/llama": 0.6, "taught_by/pivot": 0.1, "steps": 10}
    cache = {"samples": 40, "tokens": 1234567, "bytes on disk": 34_500_000, "bytes a token": 27.9}
    align = {"coverage": 0.8125, "ids mapped": 0.5, "ids seen": 0.25, "mass mapped": 0.9871}
    return (
        StageFacts("prepare", None, {"samples": 50}),
        StageFacts("capture/llama", 12.5, cache),
        StageFacts("align/llama", 2.0, align),
        StageFacts("distill/llama", 100.0, told),
        StageFacts("distill/control", 90.0, {"history": [{"step": 1, "label_loss": 2.0, "grad_norm": 1.0}]}),
    )


def merged() -> MergeFacts:
    names = ["embed.weight", *(f"layers.{n}.{k}.weight" for n in (0, 1, 10) for k in ("q", "k")), "ids"]
    coefficients = tuple((n, () if n == "ids" else (0.25, 0.75)) for n in names)
    updates = tuple((n, () if n == "ids" else (0.0 if n == "embed.weight" else 4e-8, 1e-8)) for n in names)
    return MergeFacts("sce", {"select_topk": 0.2}, ("llama", "qwen"), coefficients, updates)


def summary(fused: Scored | None = None, *without: Role, **changes: Any) -> Summary:
    models = (
        fused or scored("fused", 1.6, 0.8),
        scored("target", 1.7, 0.9, "target-qwen"),
        scored("target", 1.6, 0.9, "target-llama"),
        scored("control", 1.9, 0.9),
        scored("pivot", 2.0, 1.0),
        scored("source", 1.5, 0.7, "llama"),
        scored("source", 1.8, 0.6, "qwen"),
    )
    told: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "models": tuple(m for m in models if m.role not in without),
        "stages": stages(),
        "merge": merged(),
        "continuations": (("def f(x):", "\n  return x"), (NASTY, " \ufffd and on")),
        "heldout": {"math": 12, "code": 9},
    }
    return Summary(**{**told, **changes})


def config(folder: Path, **changes: Any) -> Config:
    tree = {
        "name": "tiny",
        "pivot": {"model": "meta-llama/Llama-3.2-1B"},
        "sources": [{"model": "Qwen/Qwen3-4B", "name": "llama"}, {"model": str(folder), "name": "qwen"}],
        "prepare": {"data": [{"data": "corpus.jsonl"}]},
        **changes,
    }
    path = folder / "fusion.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML, and quotes every name
    return config_file.load(path)


# the record


def test_json_gives_the_summary_back() -> None:
    whole = summary()
    assert Summary.from_json(whole.to_json()) == whole
    assert Summary.from_json(whole.to_json()).domains == ("math", "code")


def test_json_is_strict_where_a_figure_is_not_finite() -> None:
    told = summary(stages=(StageFacts("merge", 1.0, {"grad_norm": math.nan, "deep": [math.inf]}),)).to_json()
    assert "NaN" not in told and "Infinity" not in told
    assert json.loads(told)["stages"][0]["facts"] == {"grad_norm": None, "deep": [None]}


@pytest.mark.parametrize("text", ["", "{}", '{"name": 3}', "[]"])
def test_json_that_is_no_summary_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\Aresults: .* will not do: .*; release again\Z"):
        Summary.from_json(text)


@pytest.mark.parametrize("bits", [math.nan, math.inf, 0.0, -1.0])
def test_a_broken_model_is_refused_by_name(bits: float) -> None:
    with pytest.raises(ValueError, match=rf"fused: {bits} bits per byte on math"):
        scored("fused", bits, 1.0)


def test_a_summary_needs_its_models_and_domains() -> None:
    with pytest.raises(ValueError, match=r"0 models are pivot \[\]"):
        summary(None, "pivot")
    with pytest.raises(ValueError, match="0 models are fused"):
        summary(None, "fused")
    with pytest.raises(ValueError, match="2 models are control"):
        summary(None, models=(*summary().models, scored("control", 1, 1)))
    with pytest.raises(ValueError, match="fused: was not measured on prose"):
        summary(heldout={"math": 1, "prose": 1})
    with pytest.raises(ValueError, match="nothing was measured"):
        summary(heldout={})
    with pytest.raises(ValueError, match=r"w: 1 values for 2 targets"):
        MergeFacts("sce", {}, ("a", "b"), (("w", (1.0,)),))


def test_curves_weigh_teachers_by_what_they_taught() -> None:
    taught = {"taught_by/a": 0.6, "fusion_loss/a": 2.0, "taught_by/b": 0.2, "fusion_loss/b": 4.0}
    alone = {"taught_by/a": 0.0, "taught_by/b": 0.0}
    logs: list[dict[str, Any]] = [{"step": 1, "label_loss": 3.0, **taught}, {"step": 2, "train_runtime": 1}]
    logs.insert(1, {"step": 2, "label_loss": 2.0, **alone})
    steps, label, fusion = curve({"history": logs})
    assert (steps, label, fusion[0]) == ([1, 2], [3.0, 2.0], pytest.approx((0.6 * 2 + 0.2 * 4) / 0.8))
    assert math.isnan(fusion[1])
    assert curve({}) == ([], [], [])
    assert taught_by(taught) == {"a": 0.6, "b": 0.2}


def test_smoothing_keeps_a_constant_and_short_curves() -> None:
    assert smooth([2.0] * 100) == [2.0] * 100
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([]) == []
    wave = smooth([float(n % 2) for n in range(90)])
    assert wave[45] == pytest.approx(3 / 7)  # three on each side
    assert wave[0] == pytest.approx(2 / 4)
    holes = smooth([1.0, math.nan, *[1.0] * 88])
    assert math.isnan(holes[1]) and holes[0] == 1.0


def test_tensors_are_grouped_by_layer_and_kind() -> None:
    rows = [
        ("model.layers.10.mlp.up.weight", (4.0, 0.0)),
        ("model.layers.2.mlp.up.weight", (2.0, 0.0)),
        ("model.layers.2.attn.q.bias", (1.0, 1.0)),
        ("model.layers.2.experts.7.w1.weight", (3.0, 2.0)),
        ("model.norm.weight", (5.0, 5.0)),
        ("mask", ()),
    ]
    assert by_layer(rows) == {"norm": [5, 5], "layer 2": [2, 1], "layer 10": [4, 0]}
    assert list(by_layer(rows)) == ["norm", "layer 2", "layer 10"]
    assert by_kind(rows) == {"mlp.up": [3, 0], "attn.q.bias": [1, 1], "experts.*.w1": [3, 2]}
    assert by_layer([]) == {}


# the table and the verdict


def shown(whole: Summary, **options: Any) -> str:
    console = Console(record=True, width=140, file=io.StringIO(), **options)
    console.print(console_table(whole))
    return console.export_text(styles=bool(options))


def test_table_has_a_row_a_model_in_order() -> None:
    text = shown(summary())
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert "tiny: held-out bits per byte (lower is better)" in text
    heads = [cell.strip() for cell in text.splitlines()[2].split("┃")[1:-1]]
    assert heads == ["model", "role", "math", "code", "mean", "vs pivot"]
    assert rows == [
        ["llama", "source", "1.5000", "0.7000", "1.1000", "-26.67 %"],
        ["qwen", "source", "1.8000", "0.6000", "1.2000", "-20.00 %"],
        ["pivot", "pivot", "2.0000", "1.0000", "1.5000", ""],
        ["control", "control", "1.9000", "0.9000", "1.4000", "-6.67 %"],
        ["qwen", "target", "1.7000", "0.9000", "1.3000", "-13.33 %"],
        ["llama", "target", "1.6000", "0.9000", "1.2500", "-16.67 %"],
        ["fused", "fused", "1.6000", "0.8000", "1.2000", "-20.00 %"],
    ]


def test_table_marks_the_best_and_the_fused() -> None:
    text = shown(summary(), force_terminal=True, color_system="standard")
    body = [line for line in text.splitlines() if "│" in line]
    bold = [re.findall(r"\x1b\[1(?:;7)?m([\d.]+)", line) for line in body]
    assert bold == [[], [], [], [], [], ["1.6000"], ["1.6000", "0.8000", "1.2000"]]  # ties are both best
    assert ["\x1b[7m" in line for line in body] == [False] * 6 + [True]


def test_table_shows_names_as_they_are() -> None:
    whole = summary(models=tuple(
        Scored(m.name, m.role, {"[red]$x$": 1.0}, 1.0, 1, "A", "p") for m in summary().models
    ), heldout={"[red]$x$": 3})  # fmt: skip
    assert "[red]$x$" in shown(whole)


def test_verdict_better() -> None:
    assert verdict(summary()) == (
        "On the mean of 2 held-out domains the fused model needs 1.2000 bits per byte: "
        "20.00% fewer than the pivot (1.5000); "
        "14.29% fewer than the control trained on labels alone (1.4000); "
        "4.00% fewer than the best target llama (1.2500). So it is better than each of these."
    )


def test_verdict_worse_says_than_what() -> None:
    told = verdict(summary(scored("fused", 1.5, 1.2)))
    assert "10.00% fewer than the pivot" in told and "8.00% more than the best target llama" in told
    last = "So it is worse than the best target llama; by domain it is worse than the pivot on code."
    assert told.endswith(last)
    told = verdict(summary(scored("fused", 2.0, 1.1)))
    assert told.endswith(
        "So it is worse than the pivot, the control trained on labels alone and the best target llama; "
        "by domain it is worse than the pivot on code."
    )


def test_verdict_equal() -> None:
    told = verdict(summary(scored("fused", 1.60004, 0.9)))
    assert "as many as the best target llama (1.2500)" in told
    assert told.endswith("So none of these is better.")


def test_verdict_with_little_to_compare() -> None:
    told = verdict(summary(None, "control", "target", "source"))
    assert told.endswith("20.00% fewer than the pivot (1.5000). So it is better than it.")
    one = verdict(summary(heldout={"math": 3}))
    assert one.startswith("On the one held-out domain the fused model")
    one_target = tuple(m for m in summary().models if m.name != "target-qwen")
    assert "the only target llama" in verdict(summary(models=one_target))


# the report


class Reader(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        sources = ("src", "srcset", "href", "action", "data", "poster")
        self.fetched += [v or "" for k, v in attrs if k in sources]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "new"
    assert write_report(summary(), folder) == folder / "report.html"
    return folder


def test_report_is_one_file_that_fetches_nothing(report: Path) -> None:
    page = (report / "report.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert len(read.fetched) == 2 * len(PLOTS)
    assert all(url.startswith("data:image/png;base64,iVBOR") for url in read.fetched)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_report_escapes_what_models_write(report: Path) -> None:
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(" in page
    assert NASTY in Reader(page).text
    assert "\ufffd and on" in page


def test_report_tells_all_figures(report: Path) -> None:
    text = " ".join(Reader((report / "report.html").read_text(encoding="utf-8")).text.split())
    assert verdict(summary()) in text
    for told in ("81.2%", "50.0%", "25.0%", "98.7%", "1,234,567", "27.9", "34.50"):
        assert told in text, told
    for told in ("12.5 s", "204.5 s", "Seed 7"):
        assert told in text, told
    assert "Method sce, select_topk 0.2; targets llama, qwen." in text
    assert "-20.00 %" in text


def test_report_files(report: Path) -> None:
    pngs = {p.name: p.read_bytes() for p in (report / "plots").iterdir()}
    assert set(pngs) == PLOTS
    for name, png in pngs.items():
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 8_000, name
        assert int.from_bytes(png[16:20], "big") >= 1000  # pixels wide
    results = Summary.from_json((report / "results.json").read_bytes())
    assert results.models == summary().models and results.merge == summary().merge


def test_report_of_a_run_that_tells_nothing(tmp_path: Path) -> None:
    whole = summary(stages=(), merge=MergeFacts("linear", {}, ("llama",)), continuations=())
    text = Reader(write_report(whole, tmp_path).read_text(encoding="utf-8")).text
    assert text.count("This run has no figures for it.") == 3
    assert "No prompts were given" in text
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"bits.png"}


# the card


def front(card: str) -> dict[str, Any]:
    head = re.match(r"---\n(.*?\n)---\n\n# ", card, re.DOTALL)
    assert head
    return dict(yaml.safe_load(head[1]))


def test_card_front_matter(tmp_path: Path) -> None:
    card = model_card(summary(), config(tmp_path, release={"license": "apache-2.0", "hub": "me/tiny"}))
    assert front(card) == {
        "license": "apache-2.0",
        "base_model": ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-4B"],  # the folder is no hub id
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["model-fusion", "knowledge-distillation", "merge"],
    }
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name", ["1e3", "null", "yes/no", "0x1F", "1.5/2_0", "2024-01-01"])
@pytest.mark.parametrize("license", ["mit", 'a: b # "c"', "- x\n---\ny", "[", "null", "ünï\u2028"])
def test_card_front_matter_of_weird_names(tmp_path: Path, name: str, license: str) -> None:
    told = config(tmp_path, pivot={"model": name}, release={"license": license})
    meta = front(model_card(summary(), told))
    assert (meta["license"], meta["base_model"][0]) == (license, name)


def test_card_without_hub_models(tmp_path: Path) -> None:
    sources = [{"model": str(tmp_path), "name": "llama"}, {"model": "./there/not", "name": "qwen"}]
    card = model_card(summary(), config(tmp_path, pivot={"model": "/somewhere/pivot"}, sources=sources))
    assert set(front(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "states no licence" in card and "/somewhere" not in card


def test_card_tells_what_is_needed(tmp_path: Path) -> None:
    card = model_card(summary(), config(tmp_path, release={"hub": "me/tiny"}))
    assert "| llama | source | 1.5000 | 0.7000 | 1.1000 | -26.67 % |" in card
    assert "| **fused** | **fused** | **1.6000** | **0.8000** | **1.2000** | **-20.00 %** |" in card
    assert verdict(summary()) in card
    assert "| merge | sce, select\\_topk 0.2 |" in card
    assert "| kept of each source | random, draws 50, temperature 1.0 |" in card
    drawn_back = replace(summary(), merge=replace(summary().merge, scale=0.6, outside=0.6))
    assert "| merge | sce, select\\_topk 0.2, 0.6 of the update |" in model_card(drawn_back, config(tmp_path))
    apart = replace(summary(), merge=replace(summary().merge, scale=0.6, outside=0.4))
    assert "0.6 of the layers' update and 0.4 of the others' |" in model_card(apart, config(tmp_path))
    assert "[Qwen/Qwen3-4B](https://huggingface.co/Qwen/Qwen3-4B)" in card
    for paper in ("2401.10491", "2402.16107", "2408.07990"):
        assert paper in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code and "from_pretrained('me/tiny', dtype=\"auto\")" in code[1]
    ast.parse(code[1])
    assert "trust_remote_code" not in card


def test_a_source_that_was_not_measured_taught_all_the_same(tmp_path: Path) -> None:
    """Its cache was given, or it has no figure."""
    whole = summary()
    pivot = StageFacts("align/pivot", 1.0, {"coverage": 1.0})  # it taught itself
    others = tuple(m for m in whole.models if m.role != "source")
    told = summary(models=others, stages=(*whole.stages, pivot))
    assert told.sources == ("llama",) and whole.sources == ("llama", "qwen")  # qwen has no stage here
    card = model_card(told, config(tmp_path))
    assert "- llama: [Qwen/Qwen3-4B](https://huggingface.co/Qwen/Qwen3-4B)\n- qwen: " in card
    write_report(told, tmp_path)
    assert "Sources fused: 1." in (tmp_path / "report.html").read_text()


def test_card_tables_hold_any_domain(tmp_path: Path) -> None:
    models = tuple(Scored(m.name, m.role, {"a|<b>": 1.0}, 1.0, 1, "A", "p") for m in summary().models)
    card = model_card(summary(models=models, heldout={"a|<b>": 3}), config(tmp_path))
    assert "| model | role | a\\|&lt;b&gt; | mean | vs pivot |" in card


# publishing


class Hub:
    """Stands for HfApi; remembers what it is asked."""

    asked: list[tuple[str, Any]] = []
    fails: Exception | None = None
    private = True

    def __init__(self, token: str):
        Hub.asked = [("token", token)]

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        if Hub.fails:
            raise Hub.fails
        Hub.asked.append(("create", (repo, private, exist_ok)))
        return f"https://huggingface.co/{repo}"

    def model_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=Hub.private)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.asked.append(("upload", (repo_id, folder_path)))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(Hub, "asked", [])
    return tmp_path


def test_publish(checkpoint: Path) -> None:
    assert publish(checkpoint, "me/tiny", True, "hf_secret") == "https://huggingface.co/me/tiny"
    assert Hub.asked == [
        ("token", "hf_secret"),
        ("create", ("me/tiny", True, True)),
        ("upload", ("me/tiny", checkpoint)),
    ]


def test_publish_takes_the_machines_token(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    publish(checkpoint, "me/tiny", False)
    assert Hub.asked[:2] == [("token", "hf_mine"), ("create", ("me/tiny", False, True))]


def test_publish_never_exposes_a_private_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "private", False)
    with pytest.raises(ValueError, match="me/tiny is public; set release.private to false"):
        publish(checkpoint, "me/tiny", True, "hf_secret")
    assert [what for what, _ in Hub.asked] == ["token", "create"]


@pytest.mark.parametrize("repo", ["tiny", "", "a/b/c", "/tiny", "me/", "me/ti ny", "../tiny", "https://hf.co/me/tiny"])
def test_publish_refuses_a_repo_that_is_not_owner_name(checkpoint: Path, repo: str) -> None:
    told = rf"release.hub: {re.escape(repr(repo))} will not do; write owner/name"
    with pytest.raises(ValueError, match=told):
        publish(checkpoint, repo, True, "hf_secret")
    assert not Hub.asked


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_publish_refuses_a_folder_without_a_model(checkpoint: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(ValueError, match="has no model"):
        publish(checkpoint, "me/tiny", True, "hf_secret")
    assert not Hub.asked


def test_publish_needs_a_token(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="me/tiny needs a token.*HF_TOKEN"):
        publish(checkpoint, "me/tiny", True)
    assert not Hub.asked


class Refused(Exception):
    def __init__(self, status: int):
        super().__init__("line one\nline two")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (Refused(401), r"does not authorise this \(401\); give a token that may write"),
        (Refused(403), r"does not authorise this \(403\)"),
        (Refused(500), r"the hub answers 500 \(line one line two\)"),
        (OfflineModeIsEnabled("no"), "set offline; unset HF_HUB_OFFLINE"),
        (ConnectionError("no route\nto host"), r"cannot be reached \(no route to host\)"),
    ],
)
def test_publish_tells_a_failure_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, told: str
) -> None:
    monkeypatch.setattr(Hub, "fails", failure)
    line = rf"\Arelease.hub: me/tiny could not be published: .*{told}"
    with pytest.raises(ValueError, match=line) as error:
        publish(checkpoint, "me/tiny", True, "hf_secret")
    assert "\n" not in str(error.value) and "hf_secret" not in str(error.value)


def test_a_release_is_published_once_and_after_all_else(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that does not take it loses nothing: the next launch tries again, and that alone."""
    said: list[str] = []
    monkeypatch.setattr(stage.tracking, "say", said.append)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    told = config(tmp_path, out=str(tmp_path / "run"), release={"hub": "me/tiny"})
    out = Artifact.planned(tmp_path / "run", "release", "", {}, {})
    shutil.copytree(checkpoint, out.folder / "checkpoint", ignore=shutil.ignore_patterns("run"))
    write_report(summary(), out.folder)
    (out.folder / "checkpoint/README.md").write_text("a card")
    out.publish({}, 1.0)
    monkeypatch.setattr(Hub, "fails", ConnectionError("no route"))
    with pytest.raises(ValueError, match="release.hub: me/tiny could not be published"):
        stage.announce(told, out)
    assert (tmp_path / "run/fused").is_symlink() and "checkpoint" in said[-1]
    monkeypatch.setattr(Hub, "fails", None)
    (out.folder / "checkpoint/README.md").write_text("a better card")
    stage.announce(told, out)
    assert ("upload", ("me/tiny", out.folder / "checkpoint")) in Hub.asked
    Hub.asked = []
    stage.announce(told, out)
    assert not Hub.asked and said.count("published   https://huggingface.co/me/tiny") == 2
    (out.folder / "published").unlink()
    (out.folder / "checkpoint/config.json").write_text("damaged")
    with pytest.raises(ValueError, match="fails its checksum"):
        stage.announce(told, out)
    assert not Hub.asked


def test_a_source_without_a_figure_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(stage.tracking, "say", said.append)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(stage, "bits_per_byte", lambda *_: {"math": 1.0, "code": math.nan})
    told, model = config(tmp_path), Model(str(tmp_path), "qwen")
    assert stage._measure(told, "source", model, tmp_path, []) is None
    assert said == ["  qwen: its logits are not finite on held-out samples (code); it is not shown"]
    with pytest.raises(ValueError, match="qwen: nan bits per byte on code"):
        stage._measure(told, "pivot", model, tmp_path, [])
