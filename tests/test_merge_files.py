"""Checkpoint folders of the merge room: what is read, what is refused, how files are laid out."""

import errno
import json
import os
import re
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import TOYS, make_folder, make_toys, near, read
from safetensors.torch import load_file, save_file

from fusion.merge import writer
from fusion.merge.checkpoint import CheckpointReader, SafetensorsFile
from fusion.merge.jobs import Job, Layout
from fusion.merge.writer import OpenShard, PartialFolder, carry_over, shards_of


def test_reader_single_equals_sharded(tmp_path: Path) -> None:
    single, sharded = make_toys(tmp_path / "1"), make_toys(tmp_path / "2", shards=2)
    with CheckpointReader(single[1]) as one, CheckpointReader(sharded[1]) as two:
        assert one.names == two.names == ("a.weight", "b.0.weight", "b.1.weight")
        assert two.view("a.weight").shape == (6, 4) and two.view("a.weight").dtype == "float32"
        expected = load_file(Path(single[1]) / "model.safetensors")
        for name in one.names:
            assert np.array_equal(one.array(name), expected[name].numpy())
            assert np.array_equal(one.array(name), two.array(name))
        part = np.empty(5, np.float32)
        one.view("a.weight").read(7, part)
        assert part.tolist() == expected["a.weight"].flatten()[7:12].tolist()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool],
)
def test_every_type_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (100 * torch.rand(3, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    back = read(make_folder(tmp_path / "x", {"w": tensor, "scalar": tensor[0, 0].clone(), "none": tensor[:0].clone()}))
    assert torch.equal(back["w"], tensor) and back["w"].dtype is dtype
    assert back["scalar"].shape == () and back["none"].shape == (0, 5)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
            CheckpointReader(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = tmp_path / "x"
    assert "no such folder" in refusal(folder)
    folder.mkdir()
    assert "has no config.json; give the folder that save_pretrained wrote" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "has no safetensors weights; there must be a model.safetensors or" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW')" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors cannot be read (it is no safetensors file, or cut short)" in refusal(folder)
    save_file({}, folder / "model.safetensors")
    assert "holds no tensors; download it again" in refusal(folder)
    (folder / "model.safetensors").unlink()

    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "has no weight_map of tensors to shards" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    assert "names the shard '../one.safetensors', not a file of this folder" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    assert "shard one.safetensors is named in model.safetensors.index.json but absent" in refusal(folder)
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    assert "model.safetensors.index.json names b, missing in one.safetensors" in refusal(folder)
    index.unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert "holds an adapter, not a model; name it as BASE+ADAPTER" in refusal(folder)


def test_more_files_than_a_shell_allows_at_first(tmp_path: Path) -> None:
    folders = make_toys(tmp_path, shards=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 130, hard))
    try:
        readers = [CheckpointReader(folder) for folder in folders]
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard and len(readers) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _with_header(path: Path, header: bytes, data: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"{", "its header is damaged"),
        (b"[1]", "its header is damaged"),
        (b'{"w": 3}', "its header is damaged"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "w does not lie within it"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "w does not lie within it"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "w does not lie within it"),
        (b'{"w": {"dtype": "I64", "shape": [-1, -1], "data_offsets": [0, 8]}}', "w does not lie within it"),
        (b'{"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', "its header is damaged"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}', "its header is damaged"),
        pytest.param(b"[" * 100_000, "its header is damaged", id="deep"),
        (b"\xff\xfe", "its header is damaged"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"x.safetensors cannot be read \\({why}\\); download it again"):
        SafetensorsFile(_with_header(tmp_path / "x.safetensors", header, 8))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", {"w": torch.ones(100)})
    with CheckpointReader(folder) as reader:
        view = reader.view("w")
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(200)
        with pytest.raises(ValueError, match="the file ends within it; download it again"):
            view.read(0, np.empty(100, np.float32))


def _layout(folder: str, names: tuple[str, ...] = tuple(TOYS), dtype: str = "float32") -> Layout:
    reader = CheckpointReader(folder)
    jobs = tuple(Job(name, reader.view(name).shape, dtype, (reader.view(name),)) for name in names)
    return Layout(jobs, ("x",), reader.config, Path(folder), "digest")


def test_files_written_out_of_order_are_what_the_library_reads(tmp_path: Path) -> None:
    layout = _layout(make_toys(tmp_path)[0])
    tensors = {name: near(0, shape, 5)[0] for name, shape in TOYS.items()}
    for size, count in [(1e9, 1), (100, 2), (1, 3)]:
        shards = shards_of(layout.jobs, size)
        assert len(shards) == count
        partial = PartialFolder(tmp_path / f"out-{count}", "digest")
        partial.begin()
        for shard in shards:
            opened = OpenShard(shard, partial.folder)
            for job in reversed(shard.jobs):
                flat = tensors[job.name].flatten().numpy()
                for start in reversed(range(0, flat.size, 4)):
                    opened.write(job, start, flat[start : start + 4])
            partial.note(shard, [])
            opened.finish()
        partial.finish(layout, shards)
        back = read(partial.out)
        assert all(torch.equal(back[name], tensors[name]) for name in TOYS)
        files = sorted(path.name for path in partial.out.iterdir() if path.suffix == ".safetensors")
        numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert files == (["model.safetensors"] if count == 1 else numbered)
        assert all(load_file(partial.out / file) for file in files)
        if count > 1:
            index = json.loads((partial.out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == 4 * (24 + 5 + 9) and set(index["weight_map"]) == set(TOYS)


def test_a_partial_folder_is_taken_up_by_the_same_merge_only(tmp_path: Path) -> None:
    layout = _layout(make_toys(tmp_path)[0])
    shards = shards_of(layout.jobs, 1)
    first = PartialFolder(tmp_path / "out", "one")
    first.begin()
    opened = OpenShard(shards[0], first.folder)
    first.note(shards[0], [{"name": "a.weight"}])
    opened.finish()
    with pytest.raises(ValueError, match="out: another merge is writing it now; wait for it, or give another folder"):
        PartialFolder(tmp_path / "out", "one").begin()
    first.release()
    again = PartialFolder(tmp_path / "out", "one")
    again.begin()
    assert again.report_of(shards[0]) == [{"name": "a.weight"}] and again.report_of(shards[1]) is None
    again.release()
    other = PartialFolder(tmp_path / "out", "two")
    other.begin()
    assert other.report_of(shards[0]) is None and not list(other.folder.glob("*.safetensors"))
    other.remove()
    assert not other.folder.exists()


def test_a_mount_point_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can neither be removed nor replaced: what was written beside it goes into it."""
    layout, replace = _layout(make_toys(tmp_path)[0]), os.replace
    partial = PartialFolder(tmp_path / "out", "one")
    partial.out.mkdir()
    partial.begin()
    (shard,) = shards_of(layout.jobs, 1e9)
    opened = OpenShard(shard, partial.folder)
    partial.note(shard, [])
    opened.finish()

    def busy(source: Path, target: Path) -> None:
        if Path(target) == partial.out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(writer.os, "replace", busy)
    partial.finish(layout, [shard])
    assert (partial.out / "model.safetensors").is_file() and (partial.out / "config.json").is_file()
    assert not partial.folder.exists()


def test_what_is_neither_weights_nor_code_is_carried_over(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", {"w": torch.ones(2)}, torch_dtype="float32")
    kept = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
    ]
    left = ["pytorch_model.bin", "modeling_toy.py", "x.pkl", "manifest.json", "README.md", ".gitattributes"]
    left += ["other.safetensors", "pytorch_model.bin.index.json", "optimizer.pt", "adapter_config.json"]
    for name in kept + left:
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    layout = _layout(str(source), ("w",), "bfloat16")
    layout.config["auto_map"] = {"AutoModelForCausalLM": "modeling_toy.Toy"}
    carry_over(layout, out)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == sorted([*kept, "config.json", "additional_chat_templates/rag.jinja"])
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "auto_map" not in written
