"""Errors of a rank, and what the others say of them."""

from unittest import mock

import pytest
from ranks import Ranks

from parallel import failures
from parallel.failures import Failures, RankFailedError

TEXTS = [
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv",
    "Application timeout caused pair closure",
]


def lost_case(text: str) -> str:
    with (
        mock.patch.object(failures, "PATIENCE_S", 0.1),
        pytest.raises(RankFailedError) as caught,
        Failures().told("step 3: train_batch()"),
    ):
        raise RuntimeError(text)
    return str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_gloos_own_words_are_a_lost_connection(ranks: Ranks, text: str) -> None:
    assert ranks.run(1, lost_case, text) == [
        "step 3: train_batch() failed: the connection to another rank was lost; see its last output"
    ]
