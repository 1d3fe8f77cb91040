"""Windows of a sample: they miss and repeat nothing, and what is scored has half a context before it."""

import numpy as np
import pytest

from fusion.records import Carries, Rendered
from fusion.tokens.windows import windows


def rendered(length: int, kinds: list[int]) -> Rendered:
    ids = np.arange(length, dtype=np.int32)
    carries = np.array((kinds * length)[: length - 1] + [Carries.NOTHING], dtype=np.uint8)
    return Rendered(ids, np.full(length, -1), carries, 1)


@pytest.mark.parametrize("kinds", [[1], [1, 0, 0, 1], [0, 2, 1]])
def test_each_content_token_is_scored_once(kinds: list[int]) -> None:
    for length in (1, 2, 3, 4, 5, 9, 16, 31, 64, 65, 100):
        for context in (2, 3, 4, 5, 8, 31, 32, 33, 64, 200, None):
            whole = rendered(length, kinds)
            scored: list[int] = []
            for window in windows("d", whole, context):
                assert len(window.ids) == len(window.content) and (context is None or len(window.ids) <= context)
                assert window.domain == "d" and 0 <= window.first < max(len(window.ids), 1)
                at = window.scored()
                assert at.tolist() == [
                    i for i in range(window.first, len(window.ids) - 1) if whole.carries[window.ids[i]] == 1
                ]
                scored += window.ids[at].tolist()  # ids number the positions
                seen = at + 1  # tokens of context before the one that is predicted
                if window.ids[0] > 0 and context is not None:
                    assert (seen >= (context + 1) // 2).all()
            assert scored == np.flatnonzero(whole.carries == Carries.CONTENT).tolist()


def test_windows_by_hand() -> None:
    found = list(windows("d", rendered(7, [1]), 4))
    assert [w.ids.tolist() for w in found] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    assert [w.first for w in found] == [0, 1, 1]
    assert [w.scored().tolist() for w in found] == [[0, 1, 2], [1, 2], [1]]
    assert [w.ids[w.scored() + 1].tolist() for w in found] == [[1, 2, 3], [4, 5], [6]]  # each but the start token once
    assert found[0].content.tolist() == [True] * 4 and found[2].content.tolist() == [True, True, False]


def test_one_window_where_the_context_is_enough() -> None:
    for context in (10, 11, None):
        (window,) = windows("d", rendered(10, [1]), context)
        assert window.first == 0 and window.ids.tolist() == list(range(10))
        assert window.scored().tolist() == list(range(9))


@pytest.mark.parametrize("length", [1, 6])
def test_a_sample_without_content_scores_nothing(length: int) -> None:
    for context in (1, 2, 4, None):
        made = list(windows("d", rendered(length, [Carries.NOTHING]), context))
        assert made and all(len(w.scored()) == 0 for w in made)
