"""Agreement of ranks on success or failure."""

import numpy as np
import pytest
from ckpt_helpers import run_ranks

from ckpt import CheckpointError, Solo
from ckpt.comm import agreed, distinct, from_rank_0, merged


def test_a_rank_that_is_alone_talks_to_itself():
    comm, sent = Solo(), {0: np.arange(3, dtype=np.uint8)}
    assert (comm.rank, comm.size) == (0, 1)
    assert comm.all_reduce(5, lambda values: values[0] + 1) == 5, "nothing is merged"
    assert (comm.gather("a"), comm.broadcast("b")) == (["a"], "b")
    received = comm.exchange(sent)
    assert received == sent
    assert received is not sent


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("call", [agreed, distinct, lambda comm, work: merged(comm, work, max)])
def test_the_error_of_one_rank_is_raised_on_all(call, culprit):
    def work(comm):
        def fail():
            if comm.rank >= culprit:
                raise (CheckpointError if comm.rank == culprit else ValueError)(f"no {comm.rank}")
            return 1

        return call(comm, fail)

    errors = run_ranks(3, work)
    assert [(type(e), str(e)) for e in errors] == [(CheckpointError, f"no {culprit} (rank {culprit})")] * 3


def test_an_error_that_is_not_the_package_s_own_has_its_type_before_it():
    with pytest.raises(CheckpointError, match=r"^ZeroDivisionError: .* by zero$"):
        merged(Solo(), lambda: 1 // 0, lambda values: values[0])


@pytest.mark.parametrize("call", [agreed, from_rank_0])
def test_an_interrupt_stays_one_where_it_came_and_is_an_error_elsewhere(call):
    def work(comm):
        def interrupted():
            if comm.rank == 0:
                raise KeyboardInterrupt
            return 1

        return call(comm, interrupted)

    here, there = run_ranks(2, work)
    assert isinstance(here, KeyboardInterrupt)
    assert isinstance(there, CheckpointError)
    assert str(there) == "KeyboardInterrupt:  (rank 0)"


def test_values_are_counted_with_their_first_ranks():
    found = run_ranks(4, lambda comm: distinct(comm, lambda: comm.rank % 3))
    assert found == [{0: (0, 2), 1: (1, 1), 2: (2, 1)}] * 4


def test_what_rank_0_finds_is_known_to_all():
    assert run_ranks(3, lambda comm: from_rank_0(comm, lambda: f"of {comm.rank}")) == ["of 0"] * 3
    errors = run_ranks(2, lambda comm: from_rank_0(comm, lambda: [][0]))
    assert [str(error) for error in errors] == ["IndexError: list index out of range (rank 0)"] * 2
