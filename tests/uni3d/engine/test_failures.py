"""A rank that fails during a step: the others stop with its reason instead of waiting forever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from marks import matrix, slow
from models import Stack, global_batches, make_engine, seeded, train, train_plainly
from ranks import Ranks

TESTS = Path(__file__).parents[2]

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
from models import OwnLoss, Stack, global_batches, make_engine, micro_batches, seeded

zero, pp, rank = {zero}, {pp}, int({rank!r})
engine = make_engine(seeded(Stack), zero=zero, pp=pp)
data = micro_batches(global_batches(3), engine)
engine.train_batch(data)
if rank == 1:
    def fail(*_):
        raise ValueError("boom in\\nthe model")
    list(engine.module.modules())[-1].register_forward_pre_hook(fail)
try:
    engine.train_batch(data)
except Exception as error:
    print(f"{{type(error).__name__}}|{{error}}", flush=True)
try:
    engine.train_batch(data)
except RuntimeError as error:
    print(str(error).splitlines()[0], flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(("zero", "pp"), [slow(3, 1), matrix(0, 1), matrix(1, 2)])
def test_a_rank_that_raises_in_the_model(zero: int, pp: int) -> None:
    paths = [str(TESTS.parent), str(TESTS / "support"), str(TESTS / "uni3d")]
    port = str(free_port())
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        code = SCRIPT.format(paths=paths, zero=zero, pp=pp, rank=rank)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | place | where,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=100) for process in processes]
    first, second = (out.splitlines() for out, _ in outputs)
    assert "boom in" in second[0], outputs
    assert first[0].startswith(
        "RankFailedError|step 2: train_batch() failed on rank 1: ValueError: boom in the model"
    )
    for lines in (first, second):
        assert lines[-1].startswith("this engine can't be used any more: train_batch() failed"), outputs


def short_iterator_case() -> list[float]:
    engine = make_engine(seeded(Stack))
    with pytest.raises(StopIteration):
        engine.train_batch(iter([]))
    return train(engine, global_batches(2))


def test_an_iterator_that_ends_leaves_the_engine_usable(ranks: Ranks) -> None:
    losses, _, _ = train_plainly(seeded(Stack), global_batches(2))
    for found in ranks.run(2, short_iterator_case):
        assert found == pytest.approx(losses, rel=1e-5)
