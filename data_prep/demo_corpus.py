"""The offline demo's corpus, from what every Python has: source code, reference prose, generated word problems.

Three domains, "code", "prose" and "math", and three disjoint parts: ``pretrain`` (what the sources and the pivot read),
``fuse`` (the small corpus to fuse on) and ``heldout`` (what everything is measured on). Code and prose are split by the
hash of the file they come from, so that no file lies in two parts; word problems by the hash of their own text.
"""

import ast
import hashlib
import inspect
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.demo_math import word_problems

DOMAINS = ("math", "code", "prose")
PARTS = ("pretrain", "fuse", "heldout")
SHARES = {"heldout": 12, "fuse": 26, "pretrain": 100}  # cumulative percent of files or problems, by hash
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "encodings",
    "lib2to3",
    "lib-dynload",
}
SKIPPED |= {"pydoc_data", "__pycache__", "_bundled"}
TABLES = {"html/entities.py", "stringprep.py", "locale.py"}  # Python by its name only
SHORTEST, LONGEST = 600, 1200  # characters of a piece
ECHO = 0.2  # a held-out piece goes if more of it than this also stands in another part
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Sizes:
    """Bytes of text to keep of each domain in each part; less is kept where there is less."""

    pretrain: int = 1_800_000
    fuse: int = 52_000
    heldout: int = 42_000
    files: int | None = None  # read only the first so many modules, in the order of their hashes


QUICK = Sizes(pretrain=60_000, fuse=6_000, heldout=4_000, files=60)


@dataclass(frozen=True)
class Piece:
    """A text, its domain, and the name of what it was cut from: the unit of the split."""

    text: str
    domain: str
    origin: str


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def part_of(origin: str) -> str:
    """The part that a file, topic or problem belongs to: its hash decides, so that adding one moves no other."""
    percent = int(_hash(origin)[:8], 16) % 100
    return next(part for part, below in SHARES.items() if percent < below)


def library_files(root: Path, limit: int | None = None) -> Iterator[tuple[str, str, ast.Module]]:
    """(relative path, source, syntax tree) of at most ``limit`` standard modules, by hash of path; none is imported.

    Raises ValueError when there is no source under ``root`` (a Python that ships compiled files only).
    """
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each not in SKIPPED and not each.startswith("config-")]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    found = 0
    for name in sorted(names, key=_hash):
        if name in TABLES or name.startswith(("_sysconfigdata", "sitecustomize")):  # the latter are this machine's own
            continue
        try:
            source = (root / name).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        yield name, source, tree
        found += 1
        if found == limit:
            return
    if not found:
        raise ValueError(f"no Python source under {root}: the demo's corpus is made from the standard library's files")


def _docstrings(tree: ast.Module) -> Iterator[tuple[Documented, ast.Expr, str]]:
    """(owner, docstring statement, its text as written)."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # Statements stand in these fields alone; ast.walk would visit every expression too, ten times the nodes.
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            waiting.extend(getattr(node, block, ()))
        first = node.body[0] if isinstance(node, Documented) and node.body else None
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(first, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            assert isinstance(node, Documented)
            yield node, first, value.value


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with every docstring cut out, `pass` left where a body would be empty; still valid Python."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for owner, statement, _ in _docstrings(tree):
        first, last = statement.lineno - 1, (statement.end_lineno or 0) - 1
        stays = b"pass" if len(owner.body) == 1 and not isinstance(owner, ast.Module) else b""
        # ast counts columns in UTF-8 bytes, which is why the lines are bytes here.
        head, tail = lines[first][: statement.col_offset], lines[last][statement.end_col_offset or 0 :]
        tail = tail.lstrip(b" ;") if tail.lstrip().startswith(b";") else tail
        for number in range(first, last + 1):
            lines[number] = b""
        lines[first] = head + stays + tail if (head + stays + tail).strip() else b""
    return b"".join(lines).decode()


def _packed(units: Iterable[str], may_cut: Callable[[str], bool], joint: str) -> Iterator[str]:
    """Join units to pieces of SHORTEST to LONGEST characters, cut before a unit that ``may_cut`` where possible."""
    held: list[str] = []
    size = 0
    for unit in units:
        if held and (size + len(unit) > LONGEST or (size >= SHORTEST and may_cut(unit))):
            yield joint.join(held)
            held, size = [], 0
        if len(unit) <= LONGEST:
            held.append(unit)
            size += len(unit) + len(joint)
    if held:
        yield joint.join(held)


def code_pieces(name: str, source: str, tree: ast.Module) -> Iterator[Piece]:
    """A module's code without docstrings and long comments, cut before a definition where one is near."""
    # A block of comment lines (a licence, an essay) is prose; a line or two among code belong to it.
    text = re.sub(r"(?m)(^[ \t]*#.*\n){3,}", "", without_docstrings(source, tree))
    text = re.sub(r"\n{3,}", "\n\n\n", text)
    lines = [line.rstrip() for line in text.splitlines()]
    starts = re.compile(r"\s*(def |class |async def |@)")
    for piece in _packed(lines, lambda line: starts.match(line) is not None, "\n"):
        if len(piece.strip()) >= SHORTEST // 2:
            yield Piece(piece.strip("\n"), "code", name)


def prose_pieces(origin: str, texts: Iterable[str]) -> Iterator[Piece]:
    """Reference prose in pieces of whole paragraphs; what is no prose (examples, tables, rules) is left out."""
    paragraphs = []
    for text in texts:
        for block in re.split(r"\n\s*\n", text.expandtabs().replace("\r", "")):
            lines = [line.rstrip() for line in block.strip("\n").split("\n")]
            flowing = not any(line[:1].isspace() or re.match(r"[*+-]|\d+\.", line) for line in lines)
            paragraph = " ".join(lines) if flowing else "\n".join(lines)
            letters = sum(c.isalpha() or c == " " for c in paragraph)
            if ">>>" not in paragraph and len(paragraph) > 40 and letters > 0.85 * len(paragraph):
                paragraphs.append(paragraph)
    for piece in _packed(paragraphs, lambda paragraph: True, "\n\n"):
        if len(piece) >= SHORTEST // 3:
            yield Piece(piece, "prose", origin)


def _topics(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference that ``help()`` shows, read as a literal."""
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())


def library_pieces(root: Path, limit: int | None = None) -> Iterator[Piece]:
    """All code and prose pieces; a docstring's origin is its module, so code and prose of one file stay together."""
    for name, source, tree in library_files(root, limit):
        yield from code_pieces(name, source, tree)
        texts = [inspect.cleandoc(text) for _, _, text in _docstrings(tree)]
        yield from prose_pieces(name, [text for text in texts if len(text) >= 200])
    for topic, text in _topics(root):
        yield from prose_pieces(f"topic {topic}", [text])


def _telling_lines(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= 25}


def without_echoes(pieces: list[Piece]) -> list[Piece]:
    """Drop held-out code and prose whose lines also stand in another part: modules and topics copy one another."""
    elsewhere: set[str] = set()
    for piece in pieces:
        if part_of(piece.origin) != "heldout":
            elsewhere |= _telling_lines(piece.text)

    def echoes(piece: Piece) -> bool:
        shared = sum(len(line) for line in _telling_lines(piece.text) & elsewhere)
        return part_of(piece.origin) == "heldout" and shared > ECHO * len(piece.text)

    return [piece for piece in pieces if not echoes(piece)]


def _filled(pieces: Iterable[Piece], sizes: Sizes) -> dict[str, list[Piece]]:
    """Pieces by part, taken in the given order until a part has its bytes of a domain; no text twice."""
    parts: dict[str, list[Piece]] = {part: [] for part in PARTS}
    room = {(part, domain): getattr(sizes, part) for part in PARTS for domain in DOMAINS}
    seen: set[str] = set()
    for piece in pieces:
        place = (part_of(piece.origin), piece.domain)
        if room[place] > 0 and piece.text not in seen:
            seen.add(piece.text)
            parts[place[0]].append(piece)
            room[place] -= len(piece.text.encode())
    return parts


def build_corpus(sizes: Sizes, seed: int, root: Path | None = None) -> dict[str, list[Piece]]:
    """The three parts, each in the order of its pieces' hashes. Only the word problems depend on the seed.

    ``root`` is the standard library to read, this Python's own by default. Raises ValueError if it holds no source.
    """
    library = list(library_pieces(root or Path(sysconfig.get_path("stdlib")), sizes.files))
    # The hash of a text is a fair shuffle of files and directories that needs no seed.
    ordered = sorted(without_echoes(library), key=lambda piece: _hash(piece.text))
    problems = itertools.islice(word_problems(seed), (sizes.pretrain + sizes.fuse + sizes.heldout) // 150)
    math = [Piece(problem.text, "math", problem.text) for problem in problems]
    parts = _filled(itertools.chain(ordered, math), sizes)
    return {part: sorted(pieces, key=lambda piece: _hash(piece.text)) for part, pieces in parts.items()}


def write_part(path: Path, pieces: list[Piece]) -> None:
    """One JSON object {"text", "domain"} a line, in UTF-8."""
    rows = (json.dumps({"text": piece.text, "domain": piece.domain}, ensure_ascii=False) for piece in pieces)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="\n")


def read_part(path: Path) -> dict[str, list[str]]:
    """The texts of a part by domain, in the file's order."""
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts[row["domain"]].append(row["text"])
    return texts
