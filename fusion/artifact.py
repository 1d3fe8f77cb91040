"""A stage's folder: named by a key of everything that made it, finished when its manifest is there.

The key covers the settings that matter and the keys of what was read, so a changed setting gives a new folder and no
finished work is ever overwritten; an unchanged one finds its folder again. Shards are written under temporary names and
renamed; the manifest, with sizes and checksums, comes last.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
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
        files = {
            p.relative_to(self.folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_digest(p)}
            for p in names
            if "work" not in p.relative_to(self.folder).parts[:1]
        }
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
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: has no {MANIFEST}: it is not a finished stage folder; run its stage first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is damaged; remove the folder and run its stage again") from None


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a finished folder against its manifest, which is returned.

    Raises:
        ValueError: a file is missing, cut short or changed; it is named.
    """
    manifest = read_manifest(folder)
    for name, told in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path}: is missing; remove {folder} and run the {manifest['stage']} stage again")
        if path.stat().st_size != told["bytes"] or file_digest(path) != told["sha256"]:
            raise ValueError(f"{path}: fails its checksum; remove {folder} and run the {manifest['stage']} stage again")
    return manifest
