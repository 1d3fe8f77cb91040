"""Rows of any dataset → samples: read, checked, cut to size, told apart by the hash of their content."""

import codecs
import csv
import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fusion.config import Dataset
from fusion.records import Message, Sample, sample_id

T = TypeVar("T")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_CALLS = ("function_call", "tool_call")  # whose turn is one
_TEXTS = ("text", "input_text", "output_text")  # parts of a content
_LONGEST_CELL = 1 << 30  # characters of a table's cell
BEGUN = (".jsonl", ".json", ".parquet")  # files whose beginning can be read alone
_PACKED = ("", ".gz", ".bz2", ".zst")
_LINES = tuple(kind + packed for kind in (".jsonl", ".json") for packed in _PACKED)
_TABLES = {kind + packed: between for kind, between in ((".csv", ","), (".tsv", "\t")) for packed in _PACKED}
_FILES = (*_LINES, *_TABLES, ".parquet")


def read_rows(dataset: Dataset, key: str) -> Iterator[tuple[str, dict]]:
    """Every row of a dataset with where it stands (`file:line` or `dataset row n`).

    Raises:
        ValueError: nothing is there, or it cannot be read; `key` names the config entry.
    """
    path = Path(dataset.data).expanduser()
    if path.name.endswith(_LINES) and path.is_file():
        yield from _json_lines(path)
        return
    between = next((between for kind, between in _TABLES.items() if path.name.endswith(kind)), None)
    if between and path.is_file():
        yield from _table(path, between)
        return
    yield from _with_datasets(dataset, path, key)


def beginning(dataset: Dataset, key: str, size: int) -> tuple[list[tuple[str, dict]], float]:
    """The rows that begin a file of `BEGUN`, and which share of it they are: all, or somewhat more than `size` bytes.

    Raises:
        ValueError: as `read_rows`.
    """
    path = Path(dataset.data).expanduser()
    if path.suffix != ".parquet":
        whole, read, lines = path.stat().st_size, 0, 0
        with path.open("rb") as file:
            for line in file:
                read, lines = read + len(line), lines + 1
                if read > size:
                    break
        rows = itertools.takewhile(lambda row: int(row[0].rpartition(":")[2]) <= lines, read_rows(dataset, key))
        return list(rows), read / whole if whole else 1.0
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as held:
        whole = held.metadata.num_rows
    share = min(size / max(path.stat().st_size, 1), 1)
    some = list(itertools.islice(read_rows(dataset, key), math.ceil(share * whole)))
    return some, len(some) / whole if whole else 1.0


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    with _unpacked(path) as lines:
        for number, line in enumerate(_whole(lines, path), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: is not JSON ({error.msg}); one object a line") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: is not UTF-8 ({error.reason} at byte {error.start})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: is not an object with `text` or `messages`")
            yield f"{path}:{number}", row


def _table(path: Path, between: str) -> Iterator[tuple[str, dict]]:
    """The rows of a table; all cells are text, as they stand."""
    csv.field_size_limit(_LONGEST_CELL)
    with io.TextIOWrapper(_unpacked(path), "utf-8-sig", newline="") as lines:
        rows = csv.DictReader(_whole(lines, path), delimiter=between)
        try:
            for row in rows:
                yield f"{path}:{rows.line_num}", row
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: is no row of a table ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 ({error.reason} after line {rows.line_num})") from None


def _unpacked(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))


def _whole(lines: Iterable[T], path: Path) -> Iterator[T]:
    try:
        yield from lines
    except OSError as error:  # pyarrow's, of a packed file that is damaged
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]})") from None


def _with_datasets(dataset: Dataset, path: Path, key: str) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset

    if path.suffix == ".parquet" and path.is_file():
        how: dict[str, Any] = {"path": "parquet", "data_files": str(path), "split": "train", "streaming": True}
    elif path.is_file():
        raise ValueError(
            f"{key}: {dataset.data} is of a type that is not read; give .jsonl, .csv or .tsv (also .gz, .bz2, .zst), "
            ".parquet, a folder or a hub id"
        )
    elif path.exists() or not path.is_absolute() and not path.name.endswith(_FILES):
        how = {"path": str(path) if path.exists() else dataset.data, "name": dataset.subset, "split": dataset.split}
    else:
        raise ValueError(f"{key}: {dataset.data} does not exist; give a .jsonl or .parquet file, a folder or a hub id")
    number = 0
    try:
        rows = iter(load_dataset(**how))
    except Exception as error:  # datasets raises its own, huggingface_hub's and pyarrow's errors alike
        raise ValueError(f"{key}: {dataset.data} cannot be loaded: {' '.join(str(error).split())[:160]}") from error
    while True:
        number += 1
        try:
            row = dict(next(rows))
        except StopIteration:
            return
        except Exception as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(f"{key}: {dataset.data} cannot be read at row {number}: {why}") from error
        yield f"{dataset.data} row {number}", row


def to_sample(row: dict, where: str, domain: str | None) -> Sample | None:
    """A row as a sample; None where it is blank.

    `text`, `messages` (role, content) and `conversations` (from, value) are understood. A chat ends with the
    assistant's last turn before one that is not told in text: a call of a tool, an image, an assistant's empty answer.

    Raises:
        ValueError: the row has none of these, or one of another shape.
    """
    domain = str(domain or row.get("domain") or row.get("source") or "all")
    turns = turns_of(row)
    if turns is not None:
        if not isinstance(turns, list | tuple):
            raise ValueError(f"{where}: `messages` is not a list: {str(turns)[:60]!r}")
        messages = _told(turns, where)
        _check_unicode("".join(m.content for m in messages), where)
        return Sample(sample_id(None, messages), domain, None, messages) if messages else None
    text = row.get("text", "" if {"messages", "conversations"} & row.keys() else None)
    if text is None and "text" in row:
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: has neither `text` nor `messages`; its keys are {', '.join(map(str, row)) or 'none'}"
        )
    _check_unicode(text, where)
    return Sample(sample_id(text), domain, text) if text.strip() else None


def turns_of(row: dict) -> Any:
    """The turns of a row that is a chat, None where it is none."""
    return _listed(row.get("messages")) or _listed(row.get("conversations"))


def _listed(turns: Any) -> Any:
    """A chat's turns in a list, also where they stand in columns of one length."""
    if not isinstance(turns, dict) or not all(isinstance(column, list) for column in turns.values()):
        return turns
    if len({len(column) for column in turns.values()}) > 1:
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]


def _told(turns: Sequence[object], where: str) -> tuple[Message, ...]:
    """The turns of a chat, or those that end with the assistant's last before one that is not told in text."""
    messages: list[Message] = []
    for message in (_message(turn, where) for turn in turns if not _unsaid(turn)):
        if message is None or (message.role == "assistant" and not message.content.strip()):
            while messages and messages[-1].role != "assistant":
                messages.pop()
            break
        messages.append(message)
    return tuple(messages) if any(m.role == "assistant" for m in messages) else ()


def _unsaid(turn: object) -> bool:
    """Whether it is the system's turn in a chat that has none: datasets of one schema leave it empty."""
    if not isinstance(turn, dict) or str(turn.get("role", turn.get("from"))).lower() != "system":
        return False
    told = [turn[key] for key in ("content", "value") if key in turn]
    return bool(told) and all(value is None for value in told)


def _message(turn: object, where: str) -> Message | None:
    """A turn; None for one that is not told in text."""
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        calls = bool(turn.get("tool_calls") or turn.get("function_call") or role in _CALLS)
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            told = [part for part in content if (part.get("type") or "text") in _TEXTS]
            texts = [part["text"] for part in told if isinstance(part.get("text"), str)]
            content = "".join(texts) if len(texts) == len(content) else None
        if isinstance(role, str) and (isinstance(content, str) or calls or {"content", "value"} & turn.keys()):
            if calls or content is None:
                return None
            if isinstance(content, str):
                return Message(_ROLES.get(role.lower(), role.lower()), content)
    raise ValueError(f"{where}: a message is not {{role, content}}: {str(turn)[:60]!r}")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: is not valid Unicode (lone surrogate at character {error.start})") from None


def cut(sample: Sample, max_bytes: int) -> list[Sample]:
    """The sample in pieces of at most `max_bytes`.

    A text is cut at line ends, else spaces, else anywhere between characters; a chat keeps the leading turns that fit
    and ends with an assistant's, or is nothing at all.
    """
    if sample.text is not None:
        pieces = list(_cut_text(sample.text, max_bytes))
        last = len(pieces) - 1
        return [Sample(sample_id(p), sample.domain, p, (), n == last) for n, p in enumerate(pieces) if p.strip()]
    kept, size, fits = 0, 0, 0
    for n, message in enumerate(sample.messages, 1):
        size += len(message.content.encode())
        if size <= max_bytes and message.role == "assistant":
            kept, fits = n, fits + 1
    if kept == len(sample.messages):
        return [sample]
    messages = sample.messages[:kept]
    return [replace(sample, id=sample_id(None, messages), messages=messages)] if fits else []


def _cut_text(text: str, max_bytes: int) -> Iterator[str]:
    start = 0
    while True:
        window = text[start : start + max_bytes + 1]  # a character takes at least a byte
        head = window.encode()[:max_bytes].decode(errors="ignore")
        if head == window:
            yield window
            return
        at = head.rfind("\n") + 1 or max(head.rfind(" "), 0) or len(head) or 1
        yield window[:at]
        start += at


def fraction(id: str, salt: int) -> float:
    """A number in [0, 1) that depends on the id alone; those of several salts are independent of each other."""
    # an id's own digits are enough for salts 0 and 1
    digits = id[8 * salt : 8 * salt + 8] or hashlib.sha256(f"{salt} {id}".encode()).hexdigest()[:8]
    return int(digits, 16) / 2**32


def matches(row: dict, where: dict[str, str]) -> bool:
    """True when the row has every value that the config asks for."""
    return all(str(row.get(column)) == value for column, value in where.items())


def unique(samples: Iterable[Sample], seen: set[str]) -> Iterator[Sample]:
    """The samples whose id has not been seen."""
    for sample in samples:
        if sample.id not in seen:
            seen.add(sample.id)
            yield sample
