"""Prepare: rows → samples, cut, told apart by the hash of their content, on disk and back."""

import codecs
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import artifact, samples, texts, write_lines

from data_prep import stage
from data_prep.samples import cut, fraction, matches, read_rows, to_sample, unique
from data_prep.sorting import Sorted
from fusion.config import Config, Dataset, Model, Prepare
from fusion.corpus import Corpus, write_samples
from fusion.records import Message, Sample, sample_id

CHAT = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, two."},
]


def fusion(*data: Dataset, **settings: Any) -> Config:
    return Config("small", Model("p"), (Model("q", "a"),), Prepare(tuple(data), **settings))


def parts(config: Config) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {part: [] for part in stage.PARTS}
    for part, sample in stage._Split(config).samples():
        found[part].append(sample)
    return found


def ids(of: Sequence[Sample]) -> set[str]:
    return {sample.id for sample in of}


# Rows


def test_a_row_of_text() -> None:
    sample = to_sample({"text": "Some text.\n", "source": "web", "more": 3}, "f:1", None)
    assert sample == Sample(sample_id("Some text.\n"), "web", "Some text.\n", (), True)
    assert sample is not None and sample.segments() == ("Some text.\n",)


def test_a_row_of_messages() -> None:
    sample = to_sample({"messages": CHAT, "text": None}, "f:1", "chat")
    turns = tuple(Message(m["role"], m["content"]) for m in CHAT)
    assert sample == Sample(sample_id(None, turns), "chat", None, turns)
    assert sample is not None and sample.segments() == ("Two.", "Yes, two.")


def test_conversations_are_messages_by_other_names() -> None:
    names = {"user": "human", "assistant": "GPT"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    assert to_sample({"conversations": turns}, "f:1", "x") == to_sample({"messages": CHAT}, "f:1", "x")


def test_the_domain_is_the_configs_then_the_rows() -> None:
    row = {"text": "a", "domain": "d", "source": "s"}
    found = [to_sample(r, "f:1", given) for r, given in ((row, "g"), (row, None), ({"text": "a"}, None))]
    assert [s.domain for s in found if s] == ["g", "d", "all"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": ""},
        {"text": " \n\t"},
        {"text": None},
        {"messages": []},
        {"messages": [], "text": None},
        {"messages": None, "conversations": []},
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        {"messages": [{"role": "user", "content": "Hello?"}]},
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "\n"}]},
    ],
)
def test_a_blank_row_is_no_sample(row: dict) -> None:
    assert to_sample(row, "f:1", None) is None


_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    "turn",
    [
        _CALL,
        {**_CALL, "content": None},
        {**_CALL, "content": "Let me see."},
        {"role": "assistant", "function_call": {"name": "f"}},
        {"role": "assistant", "content": ""},
        {"from": "function_call", "value": "{}"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "text", "text": "and this?"}, {"type": "image"}]},
    ],
)
def test_a_chat_ends_before_a_turn_that_is_not_told_in_text(turn: dict) -> None:
    after = [{"role": "user", "content": "And now?"}, turn, {"role": "assistant", "content": "It is that."}]
    assert to_sample({"messages": [*CHAT, *after]}, "f:1", "x") == to_sample({"messages": CHAT}, "f:1", "x")


def test_turns_that_are_left_out_are_counted(tmp_path: Path) -> None:
    chats = [[*CHAT, _CALL, {"role": "tool", "content": "3"}], CHAT[:2], [CHAT[0], _CALL]]
    path = write_lines(tmp_path / "a.jsonl", ({"messages": chat} for chat in chats))
    split = stage._Split(fusion(Dataset(str(path)), heldout_share=0.0, validation_share=0.0))
    assert [len(s.messages) for _, s in split.samples()] == [4, 2]
    assert split.left_out == {"turns without text, and after such": 2, "blank": 1, "seen before": 0}


def test_parts_of_text_are_one_text() -> None:
    parts = [
        {"type": "text", "text": "T"},
        {"type": "output_text", "text": "w"},
        {"type": None, "text": "o"},
        {"text": "."},
    ]
    turns = [{"role": m["role"], "content": parts if m["content"] == "Two." else m["content"]} for m in CHAT]
    assert to_sample({"messages": turns}, "f:1", "x") == to_sample({"messages": CHAT}, "f:1", "x")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"txt": "a", "id": 1}, "f:9: has neither `text` nor `messages`; its keys are txt, id"),
        ({}, "f:9: has neither `text` nor `messages`; its keys are none"),
        ({"text": 5}, "f:9: has neither `text` nor `messages`; its keys are text"),
        ({"messages": 5}, "f:9: `messages` is not a list: '5'"),
        ({"messages": {"role": "user"}}, "f:9: `messages` is not a list: \"{'role': 'user'}\""),
        ({"messages": ["hello"]}, "f:9: a message is not {role, content}: 'hello'"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "f:9: a message is not {role, content}: \"{'role': 'user', 'content': 5}\"",
        ),
        ({"text": "ab\ud800"}, "f:9: is not valid Unicode (lone surrogate at character 2)"),
        (
            {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "a"}]},
            "f:9: is not valid Unicode (lone surrogate at character 0)",
        ),
    ],
)
def test_a_row_of_another_shape_is_refused(row: dict, line: str) -> None:
    with pytest.raises(ValueError) as refused:
        to_sample(row, "f:9", None)
    assert str(refused.value) == line


def test_ids_are_of_the_content_alone() -> None:
    assert sample_id("a") == "ac8d8342bbb2362d"  # sha256 of '"a"'
    turns = (Message("user", "a"), Message("assistant", "b"))
    kinds = [sample_id("a"), sample_id("b"), sample_id("é"), sample_id(None, turns), sample_id(None, turns[:1])]
    assert len(set(kinds)) == 5
    assert sample_id(None, (Message("user", "ab"),)) != sample_id(None, (Message("user", "a"), Message("user", "b")))


def test_where_keeps_rows_by_value() -> None:
    row = {"split": "train", "n": 3, "ok": True}
    assert matches(row, {}) and matches(row, {"split": "train", "n": "3", "ok": "True"})
    assert not matches(row, {"split": "train", "n": "4"}) and not matches(row, {"other": "x"})


# Cutting


def whole(text: str) -> Sample:
    return Sample(sample_id(text), "d", text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab cd\nef gh\nij", ["ab cd\n", "ef gh\nij"]),
        ("ab cd\nef gh ij kl mn", ["ab cd\n", "ef gh", " ij kl", " mn"]),
        ("12345678", ["12345678"]),
        ("123456789", ["12345678", "9"]),
        ("x" * 20, ["x" * 8, "x" * 8, "x" * 4]),
        (" " + "x" * 9, [" " + "x" * 7, "xx"]),
        ("日本語日本語", ["日本", "語日", "本語"]),
        ("a🙂🙂", ["a🙂", "🙂"]),
        ("\n" * 9 + "a", ["\na"]),
    ],
)
def test_texts_are_cut_at_lines_then_spaces_then_characters(text: str, pieces: list[str]) -> None:
    made = cut(whole(text), 8)
    assert [p.text for p in made] == pieces
    assert [p.complete for p in made] == [False] * (len(made) - 1) + [True]
    assert [p.id for p in made] == [sample_id(p) for p in pieces]


@given(st.text("ab \n日🙂\u0301", max_size=60), st.integers(4, 20))
def test_pieces_of_a_text_are_the_text(text: str, size: int) -> None:
    from data_prep.samples import _cut_text

    pieces = list(_cut_text(text, size))
    assert "".join(pieces) == text
    assert all(len(p.encode()) <= size for p in pieces) and (all(pieces) or not text)
    kept = cut(whole(text), size)
    assert [p.text for p in kept] == [p for p in pieces if p.strip()]


def test_a_last_piece_of_white_space_leaves_no_complete_one() -> None:
    assert [(p.text, p.complete) for p in cut(whole("abcdef\n\n\n\n\n"), 7)] == [("abcdef\n", False)]


@pytest.mark.parametrize(("size", "turns"), [(100, 4), (27, 4), (26, 2), (13, 2), (12, 0), (1, 0)])
def test_long_chats_lose_their_last_turns(size: int, turns: int) -> None:
    sample = to_sample({"messages": CHAT}, "f:1", "d")
    assert sample is not None and sum(len(m.content) for m in sample.messages) == 27
    kept = cut(sample, size)
    if turns == 4:
        assert kept == [sample]
    else:
        first = sample.messages[:turns]
        assert kept == ([Sample(sample_id(None, first), "d", None, first)] if turns else [])


# Reading


def test_lines_are_numbered_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\n  \n{"text": "\xc3\xa9"}')
    rows = list(read_rows(Dataset(str(path)), "prepare.data.0.data"))
    assert rows == [(f"{path}:1", {"text": "a"}), (f"{path}:4", {"text": "é"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "b"', "is not JSON (Expecting ',' delimiter); one object a line"),
        (b"[", "is not JSON (Expecting value); one object a line"),
        (b'["b"]', "is not an object with `text` or `messages`"),
        (b'{"text": "\xff"}', "is not UTF-8 (invalid start byte at byte 10)"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as refused:
        list(read_rows(Dataset(str(path)), "prepare.data.0.data"))
    assert str(refused.value) == f"{path}:3: {said}"


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "/none/at/all"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError) as refused:
        list(read_rows(Dataset(str(tmp_path / name)), "prepare.data.3.data"))
    path = tmp_path / name
    line = f"prepare.data.3.data: {path} does not exist; give a .jsonl or .parquet file, a folder or a hub id"
    assert str(refused.value) == line


def test_parquet_rows(tmp_path: Path) -> None:
    rows = [{"text": "one", "domain": "d", "n": 1}, {"text": "two", "domain": "d", "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_rows(Dataset(str(tmp_path / "a.parquet")), "k"))
    assert [row for _, row in read] == rows and read[1][0] == f"{tmp_path / 'a.parquet'} row 2"
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "b.parquet")
    chat = next(read_rows(Dataset(str(tmp_path / "b.parquet")), "k"))[1]
    assert to_sample(chat, "w", "d") == to_sample({"messages": CHAT}, "w", "d")


def test_a_parquet_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=f"^prepare.data.0.data: {re.escape(str(path))} cannot be loaded: "):
        list(read_rows(Dataset(str(path)), "prepare.data.0.data"))


# Splitting


def test_fractions_are_uniform_and_independent() -> None:
    found = [[fraction(id, salt) for salt in range(4)] for id in map(sample_id, texts(8000))]
    for share in (0.1, 0.5, 0.9):
        for salt in range(4):
            below = sum(f[salt] < share for f in found) / len(found)
            assert abs(below - share) < 5 * (share * (1 - share) / len(found)) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2), (2, 3)):
        both = sum(f[one] < 0.5 and f[other] < 0.5 for f in found) / len(found)
        assert abs(both - 0.25) < 5 * (0.25 * 0.75 / len(found)) ** 0.5
    assert fraction("00000000ffffffff", 0) == 0 and fraction("00000000ffffffff", 1) == 1 - 2**-32
    assert fraction("80000000" + "0" * 8, 0) == 0.5
    assert fraction("00000000ffffffff", 2) == 0xA155B0A6 / 2**32  # sha256 of "2 00000000ffffffff"


def test_the_split_is_by_hash(tmp_path: Path) -> None:
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", ({"text": t} for t in texts(4000)))))
    limits = {"heldout_limit": 4000, "validation_limit": 4000}
    split = parts(fusion(data, heldout_share=0.2, train_share=0.5, validation_share=0.1, **limits))
    for part, share in (("heldout", 0.2), ("validation", 0.8 * 0.5 * 0.1), ("train", 0.8 * 0.5 * 0.9)):
        assert abs(len(split[part]) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    rest = {i for i in map(sample_id, texts(4000)) if fraction(i, 0) >= 0.2 and fraction(i, 1) < 0.5}
    assert ids(split["heldout"]) == {i for i in map(sample_id, texts(4000)) if fraction(i, 0) < 0.2}
    assert ids(split["validation"]) == {i for i in rest if fraction(i, 2) < 0.1}
    assert ids(split["train"]) == {i for i in rest if fraction(i, 2) >= 0.1}


def test_the_split_is_the_same_in_any_order_and_company(tmp_path: Path) -> None:
    rows = [{"text": t} for t in texts(500)]
    alone = parts(fusion(Dataset(str(write_lines(tmp_path / "a.jsonl", rows))), heldout_share=0.3))
    Random(1).shuffle(rows)
    more = write_lines(tmp_path / "c.jsonl", ({"text": t + "."} for t in texts(200)))
    shuffled = Dataset(str(write_lines(tmp_path / "b.jsonl", rows)))
    mixed = parts(fusion(Dataset(str(more)), shuffled, heldout_share=0.3))
    everything = ids([sample for part in stage.PARTS for sample in alone[part]])
    for part in stage.PARTS:
        assert alone[part] and ids(alone[part]) == ids(mixed[part]) & everything
    larger = parts(fusion(shuffled, heldout_share=0.6))
    assert ids(alone["heldout"]) < ids(larger["heldout"])


def test_a_held_out_dataset_is_never_trained_on(tmp_path: Path) -> None:
    rows = [{"text": t} for t in texts(60)]
    train, held = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl", rows[:20])
    config = fusion(Dataset(str(train)), Dataset(str(held), heldout=True), heldout_share=0.5)
    split = parts(config)
    assert ids(split["heldout"]) == set(map(sample_id, texts(60)[:20]))
    assert ids(split["train"]) == set(map(sample_id, texts(60)[20:]))
    limited = stage._Split(fusion(*config.prepare.data, heldout_limit=5))
    found = list(limited.samples())
    assert sum(part == "heldout" for part, _ in found) == 5 and limited.left_out["over prepare.heldout_limit"] == 15
    assert not ids([s for p, s in found if p == "train"]) & set(map(sample_id, texts(60)[:20]))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows: list[dict] = [{"text": "one two"}, {"text": " "}, {"text": "one two"}, {"text": "x", "lang": "de"}]
    rows += [{"messages": CHAT[:1]}, {"messages": CHAT}, {"text": "one\ntwo\nthree\nfour"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    held = write_lines(tmp_path / "b.jsonl", [{"text": "held"}])
    config = fusion(Dataset(str(path), domain="d"), Dataset(str(held), domain="d", heldout=True), max_bytes=8)
    split = stage._Split(config)
    found = [(part, s.text) for part, s in split.samples()]
    assert found == [("heldout", "held")] + [("train", t) for t in ("one two", "x", "one\ntwo\n", "three\n", "four")]
    assert split.left_out == {"blank": 2, "seen before": 1, "longer than prepare.max_bytes": 1}
    assert split.counts == {"train": 5, "train d": 5, "heldout": 1, "heldout d": 1}
    chosen = parts(fusion(Dataset(str(path), where={"lang": "de"}), Dataset(str(held), heldout=True)))
    assert [s.text for s in chosen["train"]] == ["x"]
    first = parts(fusion(Dataset(str(path), limit=2), Dataset(str(held), heldout=True)))
    assert [s.text for s in first["train"]] == ["one two"]  # blank rows do not count, one seen before does


# Validation


def test_validation_stops_at_its_limit_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    rows = [{"text": t, "domain": "small" if n % 10 == 0 else "large"} for n, t in enumerate(texts(400))]
    domains = {sample_id(row["text"]): row["domain"] for row in rows}
    first = {
        d: sorted((i for i in domains if domains[i] == d), key=lambda i: fraction(i, 2)) for d in ("small", "large")
    }
    held = Dataset(str(write_lines(tmp_path / "held.jsonl", [{"text": "held"}])), heldout=True)
    for order in (list, reversed, lambda of: Random(3).sample(of, len(of))):
        data = Dataset(str(write_lines(tmp_path / "a.jsonl", order(rows))))
        for share in (0.3, 0.999):
            split = stage._Split(fusion(data, held, validation_share=share, validation_limit=20))
            found = list(split.samples())
            some = {d: [i for i in of if fraction(i, 2) < share][:20] for d, of in first.items()}
            assert ids([s for p, s in found if p == "validation"]) == {i for of in some.values() for i in of}
            assert ids([s for p, s in found if p != "heldout"]) == set(domains) and len(found) == 401
            small = len(some["small"])
            assert small == (17 if share == 0.3 else 20) and split.counts["validation large"] == 20
            assert split.counts["validation"] == 20 + small and split.counts["train"] == 380 - small
            assert split.left_out == {"seen before": 0}


def test_documents_are_not_torn_apart(tmp_path: Path) -> None:
    documents = ["".join(f"{n} {k} of it\n" for k in range(3 + n % 3)) for n in range(100)]
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", ({"text": t, "domain": "d"} for t in documents))))
    held = Dataset(str(write_lines(tmp_path / "held.jsonl", [{"text": "held"}])), heldout=True)
    split = parts(fusion(data, held, max_bytes=14, validation_share=0.5, validation_limit=10))
    of = {part: "".join(str(s.text) for s in split[part]) for part in ("train", "validation")}
    whole = {part: [d for d in documents if d in of[part]] for part in of}
    assert len(whole["train"]) + len(whole["validation"]) == 100
    chosen = sorted((d for d in documents if fraction(sample_id(d), 2) < 0.5), key=lambda d: fraction(sample_id(d), 2))
    assert sorted(whole["validation"]) == sorted(chosen[:4])
    counts = [len(d.splitlines()) for d in chosen[:4]]
    assert sum(counts[:-1]) < 10 <= sum(counts) == len(split["validation"])
    assert len(split["train"]) + len(split["validation"]) == sum(len(d.splitlines()) for d in documents)


def test_nothing_is_in_two_parts(tmp_path: Path) -> None:
    """Documents share pieces, some stand twice, some are held out too."""
    documents = [f"same {n % 7}\nsame {n % 5}\nown {n // 2}\n" for n in range(120)]
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", ({"text": t} for t in documents))))
    held = Dataset(str(write_lines(tmp_path / "b.jsonl", ({"text": t} for t in documents[:9]))), heldout=True)
    for more in ((), (held,)):
        split = parts(fusion(data, *more, heldout_share=0.2, max_bytes=8, validation_share=0.4))
        found = [str(s.text) for part in stage.PARTS for s in split[part]]
        assert len(found) == len(set(found)) and all(split.values())
        assert set(found) == {line for d in documents for line in d.splitlines(keepends=True)}
    assert {s.text for s in split["heldout"]} == {line for d in documents[:9] for line in d.splitlines(keepends=True)}


def test_chats_are_validation_too(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "Two."}]} for t in texts(50)
    ]
    held = Dataset(str(write_lines(tmp_path / "held.jsonl", [{"text": "held"}])), heldout=True)
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", chats)))
    split = parts(fusion(data, held, validation_share=0.5, validation_limit=7))
    assert len(split["validation"]) == 7 and len(split["train"]) == 43
    assert max(fraction(s.id, 2) for s in split["validation"]) < min(fraction(s.id, 2) for s in split["train"])


def test_every_domain_of_many_documents_has_some_validation(tmp_path: Path) -> None:
    """The document whose hash comes first, where the share gives a domain none; few documents lend none."""
    rows = [{"text": t, "domain": d} for d, n, seed in (("many", 40, 1), ("few", 9, 2)) for t in texts(n, seed=seed)]
    held = Dataset(str(write_lines(tmp_path / "held.jsonl", [{"text": "held"}])), heldout=True)
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", rows)))
    least = min((sample_id(t) for t in texts(40, seed=1)), key=lambda i: fraction(i, 2))
    for share, expected in ((1e-9, {least}), (0, set())):
        out = artifact(tmp_path / str(share), "prepare")
        facts = stage.run(fusion(data, held, validation_share=share), {}, out)
        train = ids(list(Corpus(out.folder, "train")))
        assert ids(list(Corpus(out.folder, "validation"))) == expected and not train & expected
        assert len(train) == facts["samples"]["train"] == 49 - len(expected)
        assert facts["samples"].get("validation many", 0) == facts["samples"]["validation"] == len(expected)


@pytest.mark.parametrize("held", [0, 20_000, 1 << 30])
def test_what_memory_does_not_hold_waits_on_disk(tmp_path: Path, held: int) -> None:
    """The same bytes, in whatever order samples come and however few are held; a killed run's files do not count."""
    made = [
        *samples(300),
        *samples(30, words=200),
        Sample("0" * 16, "chat", None, (Message("assistant", "é" * 9000),)),
    ]
    made = [made[n] for n in np.random.default_rng(0).permutation(len(made))]
    folder, dropped = tmp_path / "work", {made[3].id, made[-1].id}
    folder.mkdir()
    write_samples(folder / "0.parquet", samples(5, seed=9))
    found = Sorted(folder, held)
    for sample in made:
        found.add(sample)
    files = len(list(folder.glob("*")))
    # of 331 files twice 128 were merged, and 75 were not
    assert files == 2 + 75 if held == 0 else files == 0 if held == 1 << 30 else 5 < files < 128
    for sample in (made[3], made[-1]):
        found.drop(sample)
    kept = sorted((s for s in made if s.id not in dropped), key=lambda s: s.id)
    assert len(found) == len(kept) == 329
    assert found.bytes == sum(len(text.encode()) for s in kept for text in s.segments())
    found.write(tmp_path / "found.parquet")
    write_samples(tmp_path / "whole.parquet", kept)
    assert list(Corpus(tmp_path, "found")) == kept and not folder.exists()
    assert list(Corpus(tmp_path, "found").ids()) == [s.id for s in kept]
    assert (tmp_path / "found.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_large_corpus_is_prepared_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": t, "domain": d} for d in "ab" for t in texts(200, seed=ord(d))]
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", rows)))
    config = fusion(data, heldout_share=0.2, validation_share=1e-9)  # validation is lent its documents
    content, facts = [], []
    for name, held in (("whole", 1 << 30), ("large", 4000)):
        monkeypatch.setattr(stage, "Sorted", partial(Sorted, held=held))
        out = artifact(tmp_path / name, "prepare")
        facts.append(stage.run(config, {}, out))
        content.append({path.name: path.read_bytes() for path in out.folder.glob("*.parquet")})
    assert content[0] == content[1] and len(content[0]) == 3 and facts[0] == facts[1]
    assert facts[0]["samples"]["validation"] == 2


@pytest.mark.parametrize("settings", [{"validation_share": 0}])
def test_validation_may_hold_nothing(tmp_path: Path, settings: dict) -> None:
    data = Dataset(str(write_lines(tmp_path / "a.jsonl", ({"text": t} for t in texts(100)))))
    out = artifact(tmp_path, "prepare")
    facts = stage.run(fusion(data, heldout_share=0.2, **settings), {}, out)
    corpus = Corpus(out.folder, "validation")
    assert list(corpus) == [] and len(corpus) == 0 and corpus.groups == 0
    assert facts["samples"]["validation"] == facts["bytes"]["validation"] == 0
    assert facts["samples"]["train"] + facts["samples"]["heldout"] == 100
    train = {i for i in map(sample_id, texts(100)) if fraction(i, 0) >= 0.2}
    assert ids(list(Corpus(out.folder, "train"))) == train


def test_unique_remembers() -> None:
    one, two = samples(2)
    seen: set[str] = set()
    assert list(unique([one, two, one], seen)) == [one, two] and list(unique([two], seen)) == []


# The stage


def test_the_stage_writes_a_corpus_that_reads_back(tmp_path: Path) -> None:
    rows: list[dict] = [{"text": t, "domain": "plain"} for t in texts(300)]
    rows += [{"messages": CHAT, "domain": "chat"}, {"text": "word " * 30, "domain": "long"}, {"text": "\n"}]
    config = fusion(
        Dataset(str(write_lines(tmp_path / "a.jsonl", rows))), heldout_share=0.2, validation_share=0.1, max_bytes=100
    )
    out = artifact(tmp_path, "prepare")
    facts = stage.run(config, {}, out)
    split = parts(config)
    for part in stage.PARTS:
        corpus = Corpus(out.folder, part)
        read = list(corpus)
        assert read == sorted(split[part], key=lambda s: s.id) and len(corpus) == len(read)
        assert facts["bytes"][part] == sum(len(text.encode()) for s in read for text in s.segments())
        assert [s for n in range(corpus.groups) for s in corpus.group(n)] == read
        assert facts["samples"][part] == len(read) > 10
    assert sum(facts["samples"][part] for part in stage.PARTS) == 300 + 1 + 2
    assert facts["left out"] == {"blank": 1}
    assert json.loads(json.dumps(facts)) == facts
    assert sorted(p.name for p in out.folder.iterdir()) == [f"{part}.parquet" for part in sorted(stage.PARTS)]


def test_the_stage_writes_the_same_bytes_again(tmp_path: Path) -> None:
    rows = [{"text": t} for t in texts(200)]
    content = []
    for name in ("a", "b"):
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        out = artifact(tmp_path / name, "prepare")
        settings = {"heldout_share": 0.2, "validation_share": 0.2, "validation_limit": 10}
        assert stage.run(fusion(Dataset(str(path)), **settings), {}, out)["samples"]["validation"] == 10
        content.append([(out.folder / f"{part}.parquet").read_bytes() for part in stage.PARTS])
        rows.reverse()
    assert content[0] == content[1]


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        ([], {}, "prepare.data.0.data: {path} has no rows"),
        (
            [{"text": " "}],
            {},
            "prepare.data.0.data: {path} has 1 rows and none is left after `where`, blank ones and prepare.train_share",
        ),
        (
            [{"text": "a"}],
            {"heldout_share": 0},
            "prepare: no sample is left to measure on; raise prepare.heldout_share or mark a dataset `heldout: true`",
        ),
        (
            [{"text": "a"}],
            {"heldout_share": 0.9999},
            "prepare: no sample is left to train on; lower prepare.heldout_share or prepare.validation_share",
        ),
        ([{"text": "a"}, {"body": "b"}], {}, "{path}:2: has neither `text` nor `messages`; its keys are body"),
    ],
)
def test_the_stage_refuses_and_writes_nothing(tmp_path: Path, rows: list, settings: dict, line: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    out = artifact(tmp_path, "prepare")
    with pytest.raises(ValueError) as refused:
        stage.run(fusion(Dataset(str(path)), **settings), {}, out)
    assert str(refused.value) == line.format(path=path)
    assert list(out.folder.iterdir()) == []


@pytest.mark.parametrize(("count", "groups"), [(0, 0), (1, 1), (8, 1), (9, 2), (320, 32), (1000, 33), (9000, 36)])
def test_groups_are_small_enough_to_share_out(tmp_path: Path, count: int, groups: int) -> None:
    made = samples(count)
    write_samples(tmp_path / "train.parquet", made)
    corpus = Corpus(tmp_path, "train")
    assert corpus.groups == groups and len(corpus) == count
    assert [s.id for s in corpus] == [s.id for s in made]


def test_json_lines_are_read_packed_and_with_a_mark_of_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in range(3)]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + lines)
    for kind, name in (("gzip", "a.jsonl.gz"), ("bz2", "a.json.bz2"), ("zstd", "a.jsonl.zst")):
        with pa.output_stream(str(tmp_path / name), compression=kind) as packed:
            packed.write(lines)
    for path in tmp_path.iterdir():
        assert [row for _, row in read_rows(Dataset(str(path)), "data")] == rows, path
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:20])
    with pytest.raises(ValueError, match="b.jsonl.gz: cannot be read"):
        list(read_rows(Dataset(str(tmp_path / "b.jsonl.gz")), "data"))


def test_tables_are_read_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,domain\n"one, two",x\n')
    (tmp_path / "a.tsv").write_text("text\tdomain\none, two\tx\n")
    for name in ("a.csv", "a.tsv"):
        ((_, row),) = read_rows(Dataset(str(tmp_path / name)), "data")
        assert row == {"text": "one, two", "domain": "x"}
    (tmp_path / "b.csv").write_text('text,n\nNone,1\n"a\nb",\n12,2\n')  # all is text
    found = list(read_rows(Dataset(str(tmp_path / "b.csv")), "data"))
    assert [row for _, row in found] == [
        {"text": "None", "n": "1"},
        {"text": "a\nb", "n": ""},
        {"text": "12", "n": "2"},
    ]
    assert found[2][0].endswith("b.csv:5")
    (tmp_path / "c.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(ValueError, match="c.csv: is not UTF-8"):
        list(read_rows(Dataset(str(tmp_path / "c.csv")), "data"))
    with pytest.raises(ValueError, match="^data: train.csv does not exist"):
        next(read_rows(Dataset("train.csv"), "data"))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="^data: .*a.txt is of a type that is not read; give .jsonl"):
        next(read_rows(Dataset(str(tmp_path / "a.txt")), "data"))


def test_chats_as_datasets_hold_them() -> None:
    told = {"from": ["human", "gpt"], "value": ["Tea?", "Yes."]}  # columns of a table
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    unsaid = [{"role": "system", "content": None}, *turns]  # all rows have the turn, some say nothing in it
    found = [to_sample(row, "here", None) for row in ({"conversations": told}, {"messages": unsaid})]
    assert found == [to_sample({"messages": turns}, "here", None)] * 2 and found[0] is not None
    assert to_sample({"messages": {"role": [], "content": []}, "text": "x"}, "here", None) == to_sample(
        {"text": "x"}, "here", None
    )
    with pytest.raises(ValueError, match="`messages` is not a list"):
        to_sample({"messages": {"role": ["user", "assistant"], "content": ["q"]}}, "here", None)
    with pytest.raises(ValueError, match="a message is not"):
        to_sample({"messages": [{"role": "system", "text": "be brief"}, *turns]}, "here", None)
