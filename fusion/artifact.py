"""A stage's folder: named by a key of everything that made it, finished when its manifest is there.

The key covers the settings that matter and the keys of what was read, so a changed setting gives a new folder and no
finished work is ever overwritten; an unchanged one finds its folder again. Shards are written under temporary names and
renamed; the manifest, with sizes and checksums, comes last.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def digest(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a value as JSON."""
    packed = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(packed.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, flushed to disk and renamed to it when the block ends well, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left half-written. Nobody may be writing."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


class Journal:
    """Which files of an unfinished folder are whole: a line of JSON a file, written after the file is.

    Every rank has a journal of its own under `work/`; all are read. A line that was cut off counts for nothing.
    """

    def __init__(self, folder: Path, name: str):
        self._folder, self._path = folder, folder / "work" / f"whole-{name}.jsonl"

    def add(self, path: Path) -> None:
        """Write down a file of the folder as it is on the disk now."""
        self.note({path.relative_to(self._folder).as_posix(): _told(path)})

    def note(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down files with their sizes and checksums."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            # begins a line too: the one before may have been cut off
            file.writelines("\n" + json.dumps([name, told]) + "\n" for name, told in files.items())
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
        """Name → size and checksum of every file that was whole when it was written, as often as it was."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("work/whole-*.jsonl")):
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    name, told = json.loads(line)
                    found.setdefault(str(name), []).append({"bytes": int(told["bytes"]), "sha256": str(told["sha256"])})
        return found

    @staticmethod
    def whole(folder: Path, names: Iterable[str]) -> set[str]:
        """Of some files, those that are as they were when one of the ranks, in this run or before, wrote them down."""
        told = Journal.read(folder)
        there = [name for name in names if name in told and (folder / name).exists()]
        now = _in_threads(_told, [folder / name for name in there])
        return {name for name, as_it_is in zip(there, now, strict=True) if as_it_is in told[name]}


def damage(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of files with the sizes and checksums that they should have, those that are otherwise, and how."""

    def look(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
        name, told = item
        path = folder / name
        if not path.exists():
            return name, "is missing"
        if path.stat().st_size != told["bytes"] or file_digest(path) != told["sha256"]:
            return name, "fails its checksum"
        return name, ""

    return {name: how for name, how in _in_threads(look, files.items()) if how}


def _told(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _in_threads(work: Any, items: Iterable[Any]) -> list[Any]:
    """Hashes are counted outside Python's lock: several files at a time keep a disk busy."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


@dataclass(frozen=True)
class Artifact:
    """One stage's folder, finished or not.

    Attributes:
        folder: where it is.
        stage: the stage that makes it.
        subject: what the stage makes it of (a source's or target's name), empty where there is one only.
        key: digest of all that determines its content.
        settings: the settings that went into the key.
        inputs: name → key of each thing read.
    """

    folder: Path
    stage: str
    subject: str
    key: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @staticmethod
    def planned(
        root: Path, stage: str, subject: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> "Artifact":
        """The artifact that these settings and inputs make, under `root`."""
        key = digest([stage, settings, inputs])
        name = f"{subject}-{key[:10]}" if subject else key[:10]
        return Artifact(root / stage / name, stage, subject, key, settings, inputs)

    @property
    def label(self) -> str:
        """`stage` or `stage/subject`."""
        return f"{self.stage}/{self.subject}" if self.subject else self.stage

    def done(self) -> bool:
        """True when the manifest is there and is this artifact's own."""
        return (self.folder / MANIFEST).exists() and read_manifest(self.folder)["key"] == self.key

    def publish(self, facts: Mapping[str, Any], seconds: float) -> None:
        """Write the manifest: from now on the folder is finished. `facts` are figures worth keeping."""
        from fusion import __version__

        names = sorted(
            p for p in self.folder.rglob("*") if p.is_file() and not p.name.endswith(".part") and p.name != MANIFEST
        )
        whole = [p for p in names if "work" not in p.relative_to(self.folder).parts[:1]]
        told = _in_threads(_told, whole)
        files = {p.relative_to(self.folder).as_posix(): t for p, t in zip(whole, told, strict=True)}
        write_json(
            self.folder / MANIFEST,
            {
                "stage": self.stage,
                "subject": self.subject,
                "key": self.key,
                "version": __version__,
                "settings": self.settings,
                "inputs": self.inputs,
                "files": files,
                "seconds": round(seconds, 1),
                "facts": facts,
            },
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """A finished folder's manifest.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = {n: {"bytes": told["bytes"], "sha256": told["sha256"]} for n, told in manifest["files"].items()}
        known = {name: manifest[name] for name in ("stage", "subject", "key", "seconds", "facts")}
        return {**manifest, **known, "files": files}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: has no {MANIFEST}: it is not a finished stage folder; run its stage first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is damaged; remove the folder and run its stage again") from None


def verify(folder: Path, but: Collection[str] = ()) -> dict[str, Any]:
    """Check every file of a finished folder, `but` some by name, against its manifest, which is returned.

    Raises:
        ValueError: a file is missing, cut short or changed; it is named.
    """
    manifest = read_manifest(folder)
    files = {name: told for name, told in manifest["files"].items() if name not in but}
    for name, how in damage(folder, files).items():
        raise ValueError(f"{folder / name}: {how}; start again with --repair to make it anew")
    return manifest
