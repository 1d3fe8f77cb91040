"""Chats through templates of every habit: contents and ends of turns are found, or the template is refused by name."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import (
    CONTENTS,
    SHARED,
    WITH_TEMPLATE,
    WITHOUT_TEMPLATE,
    Line,
    chat_sample,
    check_meeting,
    check_places,
    renderer,
)
from test_tokens_kinds import TEXTS, byte_level, sentence_piece
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fusion.records import Carries, Rendered
from fusion.tokens.render import Renderer

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
EACH = "{% for m in messages %}"
END = "{% endfor %}"
TURN = EACH + "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>" + END


@cache
def tokenizer(kind: str = "level") -> PreTrainedTokenizerFast:
    backend = {
        "level": byte_level,
        "prefix": lambda: byte_level(prefix=True),
        "first": lambda: sentence_piece("first"),
        "always": lambda: sentence_piece("always"),
        "normalizer": lambda: sentence_piece(None),
        "unknown": lambda: sentence_piece(None, fallback=False),
    }[kind]()
    backend.add_special_tokens(["<s>", "</s>", *ROLES])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def reads(template: str, *turns: tuple[str, str], kind: str = "level") -> tuple[Renderer, Rendered]:
    made = Renderer(tokenizer(kind), "my-model", template)
    sample = chat_sample(*turns)
    rendered = made.render(sample)
    check_places(made, sample, rendered)
    return made, rendered


def turns_of(made: Renderer, rendered: Rendered) -> list[tuple[str, str | None]]:
    """(the text of the positions that carry content, the name of the token that ends it) for each assistant's turn."""
    found: list[tuple[str, str | None]] = []
    at = np.flatnonzero(rendered.carries == Carries.CONTENT)
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(at) else []:
        stop = int(run[-1]) + 1
        while rendered.carries[stop] == Carries.END and rendered.boundary[stop] < 0:
            stop += 1  # white space of the template's before the end
        ends = rendered.carries[stop] == Carries.END
        name = made._tokenizer.convert_ids_to_tokens(int(rendered.ids[stop + 1])) if ends else None
        found.append((made.table.join(rendered.ids[run + 1]).decode(), name))
    return found


TALK = (("user", "q"), ("assistant", "the cat"), ("user", "q"), ("assistant", "no"))


# ---------------------------------------------------------------- what ends a turn


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURN, ["<|end|>", "<|end|>"]),
        # nothing ends a turn: the token that opens the next one is no end
        (EACH + "<|{{ m['role'] }}|>{{ m['content'] }}" + END, [None, None]),
        (EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}\n" + END, [None, None]),
        # the end token ends whichever turn it follows, also where the last one goes without
        (EACH + "<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}</s>{% endif %}" + END, ["</s>", None]),
        (EACH + "<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}<|end|>{% endif %}" + END, [None, None]),
        # what the template always puts after a turn ends it, whatever its name
        (EACH + "{{ m['content'] }}<|user|>" + END, ["<|user|>", "<|user|>"]),
        (EACH + "{{ m['role'] }}: {{ m['content'] }}\n" + END, [None, None]),
        (EACH + "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n" + END, ["</s>"] * 2),
        (EACH + "{{ m['content'] }} \n <|end|>" + END, ["<|end|>"] * 2),
        (EACH + "{{ m['content'] }}.<|end|>" + END, [None, None]),
    ],
)
def test_what_ends_a_turn(template: str, ends: list[str | None]) -> None:
    for kind in ("level", "prefix", "first", "always", "normalizer"):
        made, rendered = reads(template, *TALK, kind=kind)
        assert not rendered.lossy
        assert [end for _, end in turns_of(made, rendered)] == ends
        assert [text.strip() for text, _ in turns_of(made, rendered)] == ["the cat", "no"] or ends == [None, None]


def test_what_ends_a_turn_when_the_user_has_the_last_word() -> None:
    for template, end in ((TURN, "<|end|>"), (TURN.replace("<|end|>", ""), None)):
        made, rendered = reads(template, *TALK[:3])
        assert turns_of(made, rendered) == [("the cat", end)]
        assert rendered.content_bytes == 7


def test_an_unknown_character_ends_no_turn() -> None:
    template = EACH + "{{ m['role'] }}\n{{ m['content'] }}\n" + END  # the newline is unknown to it
    made = Renderer(tokenizer("unknown"), "my-model", template)
    rendered = made.render(chat_sample(*TALK))
    assert rendered.lossy and not (rendered.carries == Carries.END).any()


def test_the_unknown_token_may_be_the_end_token() -> None:
    """As in tokenizers that were trained with one special token for all."""
    state = json.loads(tokenizer().backend_tokenizer.to_str())
    state["model"]["unk_token"] = "</s>"
    backend = Tokenizer.from_str(json.dumps(state))
    template = EACH + "{{ m['content'] }}</s>" + END
    ends = []
    for made in (PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), tokenizer()):
        rendered = Renderer(made, "my-model", template).render(chat_sample(*TALK))
        assert not rendered.lossy
        ends.append(int((rendered.carries == Carries.END).sum()))
    assert ends == [2, 2]


# ---------------------------------------------------------------- literals in contents


@pytest.mark.parametrize("kind", ["level", "prefix", "first", "always", "normalizer"])
@pytest.mark.parametrize("literal", ["</s>", "<|end|>", "<|assistant|>x<|end|>", "<s><s>", "<unk>", "<0x0A>"])
def test_a_literal_changes_nothing_but_its_content(kind: str, literal: str) -> None:
    """The template's own tokens are those of a chat without literals, fragment by fragment."""
    plain = "{{ bos_token }}" + EACH + "[{{ m['role'] }}] {{ m['content'] }} \n<|end|>\n" + END
    made, calm = reads(plain, *TALK, kind=kind)
    _, odd = reads(plain, ("user", literal), ("assistant", literal), *TALK[2:], kind=kind)
    assert not odd.lossy
    assert turns_of(made, odd)[0][0].strip() == literal
    own = [i for i in calm.ids.tolist() if i in made._encoder.special]
    assert [i for i in odd.ids.tolist() if i in made._encoder.special] == own
    ends = [r.ids.tolist().index(own[1]) for r in (calm, odd)]  # where the first user's turn ends
    begun = [r.ids.tolist()[end : end + 4] for r, end in zip((calm, odd), ends, strict=True)]
    assert begun[0] == begun[1]  # the template's "\n[a..." after it
    assert odd.ids.tolist()[-8:] == calm.ids.tolist()[-8:]


def test_template_pieces_of_mistral_have_no_mark() -> None:
    made = renderer("tokenizers/mistral-v0.1")
    calm = made.render(chat_sample(("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")))
    odd = made.render(chat_sample(("user", "q"), ("assistant", "</s>"), ("user", "q"), ("assistant", "two")))
    turn = [i for i, piece in enumerate(made.table.pieces) if piece == b"["]
    second = [r.ids.tolist()[r.ids.tolist().index(made.end_id) + 1] for r in (calm, odd)]
    assert second[0] == second[1] and second[0] in turn  # "[INST]" after </s>, not "▁[INST]"


def test_byte_names_in_contents() -> None:
    made = renderer("zoo/pivot-llama")  # its 256 bytes are special tokens: a template would be parsed for them
    rendered = made.render(chat_sample(("user", "<0x0A>"), ("assistant", "a <0x0A> b\n")))
    assert not rendered.lossy
    at = np.flatnonzero(rendered.carries == Carries.CONTENT)
    assert made.table.join(rendered.ids[at + 1]) == b"a <0x0A> b\n"


# ---------------------------------------------------------------- templates and their habits

SYSTEM = ("system", "Be brief.")


def test_a_system_message_inside_the_first_turn() -> None:
    merges = (
        "{% set s = messages[0]['content'] %}{% for m in messages[1:] %}<|{{ m['role'] }}|>"
        "{% if loop.first %}<<{{ s }}>>\n{% endif %}{{ m['content'] | trim }}<|end|>{% endfor %}"
    )
    made, rendered = reads(merges, SYSTEM, *TALK)
    assert turns_of(made, rendered) == [("the cat", "<|end|>"), ("no", "<|end|>")]


def test_a_date_is_the_same_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}|{% if strftime_now is defined %}x{% endif %}\n" + TURN
    made, rendered = reads(template, *TALK)
    assert made.table.join(rendered.ids).startswith(b"26 Jul 2024|xq")
    assert str(datetime.now().year).encode() not in made.table.join(rendered.ids)
    assert turns_of(made, rendered) == [("the cat", "<|end|>"), ("no", "<|end|>")]
    assert "{% macro" not in made.table.join(rendered.ids).decode()


STRIPS: dict[str, Callable[[str], str]] = {
    " | trim": str.strip,
    ".strip('\\n')": lambda s: s.strip("\n"),
    ".lstrip()": str.lstrip,
    ".rstrip('\\n')": lambda s: s.rstrip("\n"),
    ".strip(' ')": lambda s: s.strip(" "),
}


@pytest.mark.parametrize("strip", STRIPS)
def test_templates_that_strip(strip: str) -> None:
    template = EACH + "<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{{ m['content']" + strip
    template += " }}{% else %}{{ m['content'] }}{% endif %}\n<|end|>" + END
    for content in (" \n the cat \n ", "\n\nthe cat\n\n", "  the cat  ", "the cat", "\n", "  ", ""):
        shown = STRIPS[strip](content)
        made, rendered = reads(template, ("user", content), ("assistant", content), *TALK[2:])
        at = np.flatnonzero(rendered.carries == Carries.CONTENT)
        spelled = made.table.join(rendered.ids[at + 1]).decode()
        assert spelled.startswith(shown) and spelled.endswith("no")
        lead = len(content) - len(content.lstrip()) if shown == content.lstrip() else content.find(shown)
        if shown.strip():
            first = rendered.boundary[at[0]]
            assert first == -1 or (first == 1 + lead and content[lead:].startswith(shown))
        ends = rendered.boundary[(rendered.carries == Carries.END) & (rendered.boundary >= 0)]
        assert ends.tolist() == Line(chat_sample(("assistant", content), TALK[3])).ends()


def test_a_user_shown_twice_is_found_once() -> None:
    twice = EACH + "<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'user' %}|{{ m['content'] }}{% endif %}"
    twice += "<|end|>" + END
    made, rendered = reads(twice, ("user", "<|end|>"), TALK[1])
    assert turns_of(made, rendered) == [("the cat", "<|end|>")]


CHAT = (("user", "Question"), ("assistant", "Answer"), ("user", "Another"), ("assistant", "Answer"))
REFUSED = {
    "upper case": (EACH + "{{ m['content'] | upper }}" + END, "rewrites the content of message 1 (user)"),
    "upper case for the assistant": (
        EACH + "{{ m['content'] | upper if m['role'] == 'assistant' else m['content'] }}" + END,
        "rewrites the content of message 2 (assistant)",
    ),
    "cut": (EACH + "{{ m['content'][:4] }}|" + END, "rewrites the content of message 1 (user)"),
    "no users": (
        "{% for m in messages if m['role'] != 'user' %}{{ m['content'] }}{% endfor %}",
        "drops or rewrites message 1 (user)",
    ),
    "backwards": ("{% for m in messages | reverse %}{{ m['content'] }}|{% endfor %}", "reorders message 2 (assistant)"),
    "answers first": (
        EACH + "{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}" + END + "{{ messages[0]['content'] }}",
        "reorders message 2 (assistant)",
    ),
    "answers twice": (EACH + "{{ m['content'] * 2 }}" + END, "repeats message 2 (assistant)"),
    "by length": (EACH + "{{ m['content'] | length }}{{ m['content'] }}" + END, "its own words depend on the contents"),
    "by its beginning": ("{{ messages[0]['content'][:1] }}" + TURN, "its own words depend on the contents"),
    "refusing": ("{{ raise_exception('no\nchats   here') }}", "no chats here"),
    "no Jinja": ("{% for m in messages %}", "Unexpected end of template"),
    "an unknown name": ("{{ nothing.at.all }}", "is undefined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_lose_a_content_are_refused(case: str) -> None:
    template, told = REFUSED[case]
    chat = chat_sample(*CHAT)
    with pytest.raises(ValueError) as error:
        Renderer(tokenizer(), "my-model", template).render(chat)
    message = str(error.value)
    assert message.startswith(f"my-model: the chat template given, on sample {chat.id}: ") and told in message
    assert "\n" not in message


@pytest.mark.parametrize("folder", ["tokenizers/mistral-v0.1", "tokenizers/phi-3"])
def test_a_dropped_system_message_is_told(folder: str) -> None:
    chat = chat_sample(SYSTEM, *TALK)
    with pytest.raises(
        ValueError, match=rf"^{folder}: its chat template, on sample {chat.id}: .*message 1 \(system\)$"
    ):
        renderer(folder).render(chat)


def test_a_tokenizer_with_several_templates() -> None:
    several = tokenizer("level").__class__(
        tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    several.chat_template = {"default": TURN, "tool_use": "tools"}
    made = Renderer(several, "several")
    assert turns_of(made, made.render(chat_sample(*TALK))) == [("the cat", "<|end|>"), ("no", "<|end|>")]
    several.chat_template = {"rag": TURN, "tool_use": "tools"}
    with pytest.raises(
        ValueError, match="^several: its chat templates have no default; name one in the config"
    ) as error:
        Renderer(several, "several")
    assert "\n" not in str(error.value)


def test_text_that_is_no_unicode_is_told() -> None:
    made = Renderer(tokenizer(), "my-model", TURN)
    for sample in (chat_sample(("user", "q"), ("assistant", "a\ud800")), chat_sample(("user", "\udfff"))):
        with pytest.raises(ValueError, match=f"^my-model: sample {sample.id} is no Unicode text: "):
            made.render(sample)


# ---------------------------------------------------------------- any content

ALL = [*WITH_TEMPLATE, *WITHOUT_TEMPLATE, "models/stories260K"]
HARD = st.sampled_from(CONTENTS) | TEXTS.map(lambda t: t.replace("▁", "_"))


@pytest.mark.parametrize("folder", ALL)
@settings(max_examples=12)
@given(contents=st.lists(HARD, min_size=3, max_size=3), same=st.booleans())
def test_any_content_in_real_templates(folder: str, contents: list[str], same: bool) -> None:
    made = renderer(folder)
    first, second, third = (contents[0],) * 3 if same else contents
    sample = chat_sample(("user", second), ("assistant", first), ("user", first), ("assistant", third))
    rendered = made.render(sample)
    check_places(made, sample, rendered)
    ends = rendered.boundary[(rendered.carries == Carries.END) & (rendered.boundary >= 0)]
    assert ends.tolist() == Line(sample).ends()
    own = [int(i) for i in rendered.ids if not made.table.lengths[i]]
    calm = made.render(chat_sample(*TALK))
    assert own == [int(i) for i in calm.ids if not made.table.lengths[i]]  # no content became a control token
    check_meeting(rendered, rendered)


def test_chats_of_the_corpus() -> None:
    """Real chats through every real template: found, exact but for what a normalizer changes, and ended."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}")
    rows = [json.loads(line) for line in (SHARED / "text" / "instruct_chat.jsonl").read_text().splitlines()[::170]]
    chats = [chat_sample(*((m["role"], m["content"]) for m in row["messages"])) for row in rows if "messages" in row]
    assert len(chats) > 20
    for folder in WITH_TEMPLATE:
        for sample in chats:
            if sample.messages[0].role == "system" and folder in ("tokenizers/mistral-v0.1", "tokenizers/phi-3"):
                continue
            rendered = renderer(folder).render(sample)
            assert not rendered.lossy
            ends = rendered.boundary[(rendered.carries == Carries.END) & (rendered.boundary >= 0)]
            assert ends.tolist() == Line(sample).ends()
