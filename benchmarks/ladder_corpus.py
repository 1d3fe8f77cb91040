"""The texts of the quality ladder: parts of the corpus to fuse on, more text of the same kinds, held-out pieces."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Rows = list[dict[str, str]]
_FILES = {"math": "math_qa", "code": "code_python", "prose": "prose_gutenberg"}


def read(path: Path) -> Rows:
    """JSON lines with `domain` and `text`."""
    with path.open() as file:
        return [json.loads(line) for line in file]


def more(text: Path, without: Iterable[Mapping[str, str]]) -> Rows:
    """What ../shared/text has of the zoo's three domains beside some rows, and beside GSM8K's test questions.

    A text that shares more than one long line with any of those rows is left out too: code is copied about.
    """
    rows = list(without)
    known = {_bare(row["text"]) for row in rows}
    lines = {line for row in rows for line in _long_lines(row["text"])}
    found: Rows = []
    for domain, name in _FILES.items():
        for row in read(text / f"{name}.jsonl"):
            if row.get("split") == "test":
                continue
            made = row.get("text") or _asked_and_answered(row["messages"])  # type: ignore[arg-type]
            if _bare(made) not in known and len(_long_lines(made) & lines) < 2:
                found.append({"domain": domain, "text": made})
    return found


def _asked_and_answered(messages: Sequence[Mapping[str, str]]) -> str:
    """As the zoo's corpus writes it."""
    return f"Question: {messages[0]['content']}\nAnswer: {messages[1]['content']}"


def _bare(text: str) -> str:
    return " ".join(text.split())


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 50}


def part(rows: Rows, bytes_a_domain: float, rest: Sequence[dict[str, str]] = (), last: bool = False) -> Rows:
    """So many bytes of each domain: the first rows by the hash of their text, or the `last`, then those of `rest`.

    A smaller part is the beginning of a larger one. ValueError where a domain has not so many.
    """
    chosen: Rows = []
    for domain in _FILES:
        size = 0
        for rows_of in (rows, rest):
            for row in sorted((r for r in rows_of if r["domain"] == domain), key=_place, reverse=last):
                if size < bytes_a_domain:
                    chosen.append(row)
                    size += len(row["text"].encode())
        if size < 0.98 * bytes_a_domain:
            raise ValueError(f"{domain}: {size} bytes of text, and {bytes_a_domain:.0f} are wanted")
    return chosen


def _place(row: Mapping[str, str]) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()


def halved(rows: Rows, names: tuple[str, str]) -> Rows:
    """Rows with the name of a half before their domain, whole texts in one half, by hash: a third in the first."""
    return [{**row, "domain": f"{names[int(_place(row), 16) % 3 > 0]}-{row['domain']}"} for row in rows]


def bytes_of(rows: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Bytes of each domain."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["domain"]] = sizes.get(row["domain"], 0) + len(row["text"].encode())
    return sizes


def write(path: Path, rows: Rows) -> Path:
    """JSON lines; as it is where it holds the same."""
    told = "".join(json.dumps({"domain": r["domain"], "text": r["text"]}, ensure_ascii=False) + "\n" for r in rows)
    if not path.exists() or path.read_text() != told:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told)
    return path
