"""Tasks of lm-evaluation-harness: scores are those of a plain reading, and what is wrong is said before models load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.config import Model
from fusion.release import tasks

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"asked": f"the {a} sat on the", "choices": [" mat", " dog", " long way home"], "answer": n % 3}
    for n, a in enumerate(("cat", "dog", "life", "two", "door", "mat", "one"))
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> Path:
    made: Path = tiny_llama(tmp_path_factory.mktemp("model"), byte_level_tokenizer, seed=3, initializer_range=0.4)
    return made


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    path = tmp_path / "pick.yaml"
    path.write_text(TASK.format(name="pick", data=tmp_path / "questions.jsonl"))
    return path


def naive(folder: Path) -> tuple[float, float]:
    """How often the answer is the likeliest choice, by its sum of log p and by that of a character."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = [0, 0]
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            asked, ids = (
                tokenizer(t, add_special_tokens=False)["input_ids"] for t in (row["asked"], f"{row['asked']}{choice}")
            )
            with torch.no_grad():
                logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logp_TV[t - 1, ids[t]]) for t in range(len(asked), len(ids))))
        by_length = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]  # type: ignore[call-overload]
        for n, scores in enumerate((sums, by_length)):
            right[n] += max(range(3), key=scores.__getitem__) == row["answer"]
    return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)


def test_scores_are_those_of_a_plain_reading(folder: Path, task: Path) -> None:
    model = Model(str(folder), "a", dtype="float32")
    found = tasks.scores(tasks.manager([str(task)]), [str(task)], model, folder)
    assert set(found) == {"pick"} and set(found["pick"]) == {"acc", "acc_norm"}
    plain = naive(folder)
    assert 0 < sum(plain) < 2
    assert (found["pick"]["acc"][0], found["pick"]["acc_norm"][0]) == pytest.approx(plain)
    error = found["pick"]["acc"][1]
    assert error == pytest.approx((plain[0] * (1 - plain[0]) / (len(QUESTIONS) - 1)) ** 0.5)


def test_the_first_questions_alone(folder: Path, task: Path) -> None:
    model = Model(str(folder), "a", dtype="float32")
    found = tasks.scores(tasks.manager([str(task)]), [str(task)], model, folder, limit=1)
    assert found["pick"]["acc"][0] in (0.0, 1.0)


def test_what_is_no_task_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^--tasks: no_such_task: no task, group or tag"):
        tasks.manager(["gsm8k", "no_such_task"])
    with pytest.raises(ValueError, match=r"none\.yaml is no file$"):
        tasks.manager([str(tmp_path / "none.yaml")])


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fusion\[eval\]'"):
        tasks.manager(["gsm8k"])


def test_a_task_file_with_a_mistake_is_one_line(folder: Path, task: Path) -> None:
    task.write_text(task.read_text().replace("doc_to_target: answer", "doc_to_target: '{{nobody.name}}'"))
    with pytest.raises(ValueError, match="^--tasks .*pick.yaml: cannot be asked: "):
        tasks.scores(tasks.manager([str(task)]), [str(task)], Model(str(folder), "a", dtype="float32"), folder)


def test_a_task_file_that_cannot_be_read(task: Path) -> None:
    for broken, said in (
        ("task: [pick", "cannot be read"),
        ("- pick", "names no task"),
        ("metric: acc", "names no task"),
    ):
        task.write_text(broken)
        with pytest.raises(ValueError, match=f"^--tasks: .*pick.yaml {said}"):
            tasks.manager([str(task)])


def test_a_model_that_is_not_whole_is_no_model(folder: Path, task: Path, tmp_path: Path) -> None:
    """The harness would draw the weights that are missing, and give the scores of those."""
    known, broken = tasks.manager([str(task)]), tmp_path / "broken"
    shutil.copytree(folder, broken)
    held = load_file(broken / "model.safetensors")
    save_file({n: w for n, w in held.items() if "layers.1." not in n}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="^a: .*broken lacks weights: model.layers.1."):
        tasks.scores(known, [str(task)], Model(str(broken), "a", dtype="float32"), broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    with pytest.raises(ValueError, match="^a: .*broken does not load"):
        tasks.scores(known, [str(task)], Model(str(broken), "a", dtype="float32"), broken)


def test_a_task_whose_data_cannot_be_had_is_one_line(folder: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    def raises(**_: Any) -> None:
        raise error

    monkeypatch.setattr(lm_eval, "simple_evaluate", raises)
    model, error = Model(str(folder), "a", dtype="float32"), RuntimeError("Dataset scripts are no longer supported")
    with pytest.raises(ValueError, match="^--tasks .*: cannot be asked: RuntimeError: Dataset scripts"):
        tasks.scores(tasks.manager([str(task)]), [str(task)], model, folder)
    error = torch.OutOfMemoryError("much asked")
    with pytest.raises(ValueError, match="^a: the device has too little memory for the tasks; lower --batch-size"):
        tasks.scores(tasks.manager([str(task)]), [str(task)], model, folder)


def test_what_was_measured_is_shown_when_a_later_model_fails(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": "the cat sat on the mat"}])
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    done = launched(folder, tmp_path / "broken", "--data", tmp_path / "texts.jsonl", "--domain", "d")
    assert done.returncode == 2 and done.stderr.startswith("error: model-2: ") and done.stderr.count("\n") == 1
    assert "bits per byte" in done.stdout and done.stdout.count("\u2502") == 4


def test_bits_per_byte_stay_when_a_task_fails(folder: Path, task: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": "the cat sat on the mat"}])
    (tmp_path / "questions.jsonl").unlink()
    out = tmp_path / "figures.json"
    done = launched(folder, "--data", tmp_path / "texts.jsonl", "--tasks", task, "--json", out)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    (row,) = json.loads(out.read_text())
    assert row["mean"] > 0 and row["settings"]["tasks"] == [str(task)] and row["settings"]["limit"] is None


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "launch/evaluate.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_side_by_side_from_the_command_line(folder: Path, task: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "texts.jsonl", [{"text": "the cat sat on the mat"}, {"text": "two dogs"}])
    out = tmp_path / "figures.json"
    done = launched(folder, folder, "--data", tmp_path / "texts.jsonl", "--domain", "d", "--tasks", task, "--json", out)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(out.read_text())
    assert first == second and first["bits_per_byte"]["d"] == first["mean"]
    assert first["tasks"]["pick"]["acc"]["value"] == pytest.approx(naive(folder)[0])
    assert "bits per byte" in done.stdout and "acc_norm" in done.stdout and "it/s" not in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "nothing to measure by: give --data or --tasks"),
        (("--tasks", "gsm8k", "--batch-size", "0"), "--batch-size: 0 will not do"),
        (("--tasks", "gsm8k", "--json", "nowhere/at/all.json"), "there is no folder"),
        (("--tasks", "gsm8k", "--json", "."), "--json .: is a folder"),
        (("--tasks", "gsm8k", "--chat"), "has no chat template"),
        (("--tasks", "gsm8k*"), "no task, group or tag"),
        (("--data", "texts.jsonl", "--template", "nowhere.jinja"), "nowhere.jinja is no file"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, given: tuple[str, ...], said: str) -> None:
    done = launched(folder, *given)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
