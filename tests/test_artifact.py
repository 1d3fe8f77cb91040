"""A stage's folder: its key, its manifest, what is refused of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fusion import __version__
from fusion.artifact import (
    MANIFEST,
    Artifact,
    atomic,
    digest,
    file_digest,
    read_manifest,
    verify,
    write_json,
)

SETTINGS: dict[str, Any] = {"k": 32, "map": "soft", "data": [["d1", {"limit": None}]]}
INPUTS = {"prepare": "1234", "model": "5678"}
FILES = {"shard-000000.parquet": b"0123456789" * 9, "model/config.json": b"{}", "model/a/deep.txt": b"x"}


def planned(root: Path, settings: dict[str, Any] = SETTINGS, inputs: dict[str, str] = INPUTS) -> Artifact:
    return Artifact.planned(root, "capture", "math", settings, inputs)


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    out = planned(tmp_path)
    for name, content in FILES.items():
        (out.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (out.folder / name).write_bytes(content)
    out.publish({"tokens": 7, "history": [{"step": 1}]}, 1.26)
    return out


def test_digests_are_sha256() -> None:
    assert digest({"b": 1, "a": [2, None]}) == hashlib.sha256(b'{"a":[2,null],"b":1}').hexdigest()[:16]


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_folder_and_label(tmp_path: Path) -> None:
    out = planned(tmp_path)
    assert out.folder == tmp_path / "capture" / f"math-{out.key[:10]}" and out.label == "capture/math"
    alone = Artifact.planned(tmp_path, "merge", "", {}, {})
    assert alone.folder == tmp_path / "merge" / alone.key[:10] and alone.label == "merge"


def test_key_is_the_same_for_the_same(tmp_path: Path) -> None:
    reversed_settings = {k: SETTINGS[k] for k in reversed(SETTINGS)}
    reversed_inputs = {k: INPUTS[k] for k in reversed(INPUTS)}
    assert planned(tmp_path).key == planned(tmp_path / "elsewhere", reversed_settings, reversed_inputs).key
    assert len(planned(tmp_path).key) == 16


def test_key_changes_with_all_that_matters(tmp_path: Path) -> None:
    changed = [
        planned(tmp_path),
        planned(tmp_path, {**SETTINGS, "k": 33}),
        planned(tmp_path, {**SETTINGS, "k": "32"}),
        planned(tmp_path, {**SETTINGS, "more": None}),
        planned(tmp_path, {k: v for k, v in SETTINGS.items() if k != "k"}),
        planned(tmp_path, {**SETTINGS, "data": [["d1", {"limit": 3}]]}),
        planned(tmp_path, inputs={**INPUTS, "model": "5679"}),
        planned(tmp_path, inputs={"prepare": "5678", "model": "1234"}),
        planned(tmp_path, inputs={**INPUTS, "more": ""}),
        Artifact.planned(tmp_path, "align", "math", SETTINGS, INPUTS),
    ]
    assert len({out.key for out in changed}) == len({out.folder for out in changed}) == len(changed)


def test_done_only_with_its_own_manifest(tmp_path: Path, made: Artifact) -> None:
    assert made.done()
    assert not planned(tmp_path, {**SETTINGS, "k": 1}).done()
    manifest = json.loads((made.folder / MANIFEST).read_text())
    write_json(made.folder / MANIFEST, {**manifest, "key": "0" * 16})
    assert not made.done()
    (made.folder / MANIFEST).unlink()
    assert not made.done()


def test_manifest_tells_everything(made: Artifact) -> None:
    manifest = read_manifest(made.folder)
    told = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
    assert manifest == {
        "stage": "capture",
        "subject": "math",
        "key": made.key,
        "version": __version__,
        "settings": SETTINGS,
        "inputs": INPUTS,
        "files": told,
        "seconds": 1.3,
        "facts": {"tokens": 7, "history": [{"step": 1}]},
    }
    assert verify(made.folder) == manifest


def test_publish_leaves_out_work_and_parts(made: Artifact) -> None:
    for name in ("work/checkpoint-1/state.json", ".shard-000001.parquet.77.part", "model/work/kept.txt"):
        (made.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.folder / name).write_text("x")
    made.publish({}, 0.0)
    assert set(read_manifest(made.folder)["files"]) == {*FILES, "model/work/kept.txt"}


def test_publish_of_an_empty_folder(tmp_path: Path) -> None:
    planned(tmp_path).publish({}, 0.0)
    assert verify(planned(tmp_path).folder)["files"] == {} and planned(tmp_path).done()


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_file(made: Artifact, name: str) -> None:
    path, hint = made.folder / name, "start again with --repair to make it anew"
    content = FILES[name]
    flipped = bytes([content[0] ^ 1]) + content[1:]
    for damaged in (content[:-1], content + b"\0", flipped, b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as refused:
            verify(made.folder)
        assert str(refused.value) == f"{path}: fails its checksum; {hint}"
    path.unlink()
    with pytest.raises(ValueError) as refused:
        verify(made.folder)
    assert str(refused.value) == f"{path}: is missing; {hint}"
    path.write_bytes(content)
    verify(made.folder)


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read_manifest(tmp_path)
    line = f"{tmp_path}: has no manifest.json: it is not a finished stage folder; run its stage first"
    assert str(refused.value) == line


def test_a_manifest_cut_anywhere_is_refused(made: Artifact) -> None:
    path = made.folder / MANIFEST
    whole = path.read_bytes()
    line = f"{path}: is damaged; remove the folder and run its stage again"
    for size in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:size])
        for ask in (lambda: read_manifest(made.folder), lambda: verify(made.folder), made.done):
            with pytest.raises(ValueError) as refused:
                ask()
            assert str(refused.value) == line


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{}", b'{"files": 3, "key": "", "facts": {}}', b"\xff\xfe"])
def test_a_manifest_of_another_shape_is_refused(made: Artifact, content: bytes) -> None:
    (made.folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json: is damaged; remove the folder and run its stage again"):
        read_manifest(made.folder)


def test_no_flipped_bit_of_a_manifest_is_a_bug_of_ours(made: Artifact) -> None:
    path = made.folder / MANIFEST
    whole = path.read_bytes()
    refused = 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ (1 << n % 8)]) + whole[n + 1 :])
        try:
            verify(made.folder)
        except ValueError as error:
            assert str(made.folder) in str(error)
            refused += 1
    assert refused > len(whole) // 4  # what breaks JSON or names; settings and figures have no checksum


def test_atomic_writes_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError), atomic(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic(path) as part:
        part.write_bytes(b"first")
        assert not path.exists() and part.parent == path.parent and part.name.endswith(".part")
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    with pytest.raises(KeyboardInterrupt), atomic(path) as part:
        part.write_bytes(b"second, cut off")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    with atomic(path) as part:
        part.write_bytes(b"second")
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_atomic_json_keeps_the_old_file_where_the_new_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": Path("x"), "a": 1})
    assert path.read_text() == '{\n "a": 1,\n "b": "x"\n}\n'
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, loop)
    assert json.loads(path.read_text()) == {"a": 1, "b": "x"} and list(tmp_path.iterdir()) == [path]
