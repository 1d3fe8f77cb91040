"""Tasks of lm-evaluation-harness (Gao et al., zenodo 10256836), which is imported here alone."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fusion import cluster, hub, tracking
from fusion.config import Model

Score = tuple[float, float | None]  # and its standard error, where it has one


class _Loader(yaml.SafeLoader):
    """Reads a task file without calling what it calls."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def manager(tasks: Sequence[str]) -> Any:
    """What knows the tasks: names, groups and tags of the harness, and task files of one's own (`.yaml`).

    Raises:
        ValueError: the harness is not installed, or has no such task; a file that is not there.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks: needs lm-evaluation-harness; pip install 'fusion[eval]'")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    from lm_eval.tasks import TaskManager

    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"--tasks: {file} is no file")
        try:
            holds = yaml.load(Path(file).read_text(), Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--tasks: {file} cannot be read: {error}") from error
        if not isinstance(holds, dict) or not {"task", "group", "include"} & set(holds):
            raise ValueError(f"--tasks: {file} names no task")
    known = TaskManager(include_defaults=len(files) < len(tasks))  # reading all of the harness's own takes seconds
    unknown = [task for task in tasks if task not in files and task not in known.all_tasks]
    if unknown:
        raise ValueError(f"--tasks: {', '.join(unknown)}: no task, group or tag of lm-evaluation-harness has this name")
    return known


def scores(
    known: Any,
    tasks: Sequence[str],
    model: Model,
    folder: Path,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, dict[str, Score]]:
    """A model's scores on the tasks, shared out over all ranks.

    Texts begin with a start token where the tokenizer says so, as the harness does it, so that scores are those that
    others report.

    Args:
        known: a `manager` of them.
        folder: where the model is.
        fewshot: worked examples before each question; None, as many as a task says.
        limit: the first so many questions of each task.
        batch_size: questions at once.
        chat: questions as turns of the model's own chat template, which it has to have.

    Returns:
        Task or group → metric and filter, as in `exact_match,strict` → value and standard error; on rank 0, and nothing
        on the others.

    Raises:
        ValueError: a task that cannot be asked, data that cannot be had, or a model that does not load.
    """
    import datasets
    import jinja2
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    tracking.say(f"tasks of {model.model}")
    tokenizer = hub.load_tokenizer(model, folder)

    class Read(HFLM):
        """The harness would fill weights that a checkpoint lacks at random."""

        def _create_model(self, *_: Any, **__: Any) -> None:
            self._model = hub.load_model(model, folder).to(self.device)

    read = Read(
        pretrained=str(folder),
        tokenizer=tokenizer if isinstance(tokenizer, transformers.PreTrainedTokenizerFast) else str(folder),
        device=str(cluster.device()),  # of several ranks accelerate decides
        dtype=cluster.precision(model.dtype),
        batch_size=batch_size,
    )
    broken = (KeyError, TypeError, AttributeError, ImportError, AssertionError, IndexError, ZeroDivisionError)
    wrong = (*broken, jinja2.TemplateError, datasets.exceptions.DatasetsError)
    try:
        with _without_bars():
            found = lm_eval.simple_evaluate(
                model=read,
                tasks=list(dict.fromkeys(tasks)),
                task_manager=known,
                num_fewshot=fewshot,
                limit=limit,
                apply_chat_template=chat,
                log_samples=False,
            )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{model.name}: the device has too little memory for the tasks; lower --batch-size") from error
    except (*wrong, RuntimeError) as error:  # what a task file with a mistake comes to
        if isinstance(error, RuntimeError) and "Dataset scripts" not in str(error):
            raise
        asked = ", ".join(tasks)
        raise ValueError(f"--tasks {asked}: cannot be asked: {type(error).__name__}: {error}") from error
    return {} if found is None else {name: _told(row) for name, row in found["results"].items()}


def _without_bars() -> AbstractContextManager[Any]:
    """In a log the harness's progress bars, which no setting of it turns off, would be hundreds of lines."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def _told(row: dict[str, Any]) -> dict[str, Score]:
    """The metrics of a result of the harness, each with its error."""
    told: dict[str, Score] = {}
    for name, value in row.items():
        metric, comma, kind = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = row.get(f"{metric}_stderr,{kind}")
            told[name.removesuffix(",none")] = (float(value), float(error) if isinstance(error, float) else None)
    return told
