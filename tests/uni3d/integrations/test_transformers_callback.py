"""The Trainer of transformers saves and resumes by uni3d: its steps are those of a run without a break."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from hf_models import ADAM, hf
from marks import matrix, slow
from page_diffs import script
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import ExportableState

import uni3d
from uni3d.integrations.transformers import CheckpointCallback

pytestmark = pytest.mark.usefixtures("fresh_ranks")

GLOBAL_BATCH, STEPS = 12, 5


def samples() -> list[dict[str, Tensor]]:
    """Return data of which an epoch has three steps, the third half as large."""
    ids = torch.randint(0, hf_models.VOCABULARY, (30, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def prepare() -> None:
    """Make accelerate see this process as a rank."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def trainer(
    folder: str,
    ranks: int,
    callbacks: list[Any],
    dropout: float = 0.0,
    eval_dataset: Any = None,
    **options: Any,
) -> Any:
    hf.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": GLOBAL_BATCH // ranks,
        "max_steps": STEPS,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": ADAM["lr"],
        "adam_epsilon": ADAM["eps"],
        "weight_decay": ADAM["weight_decay"],
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    args = hf.TrainingArguments(folder, **(given | options))
    if args.fsdp and args.device.type == "cpu":  # accelerate shards on GPUs alone, and else takes DDP
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = hf_models.make("llama", attention_dropout=dropout)
    made = hf.Trainer(model, args, train_dataset=samples(), eval_dataset=eval_dataset, callbacks=callbacks)
    made.remove_callback(hf.PrinterCallback)
    return made


def history(made: Any) -> dict[str, list[float]]:
    keys = ("loss", "grad_norm", "learning_rate", "epoch")
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    return {key: [entry[key] for entry in logged] for key in keys}


def weights(made: Any) -> dict[str, Tensor]:
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in made.model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


class Stop(hf.TrainerCallback):
    """A machine that is lost after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_case(
    run: str, sharded: bool, stop: int, options: dict[str, Any], dropout: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, Tensor], str]:
    prepare()
    keeper = CheckpointCallback(run)
    fsdp = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}} if sharded else {}
    made = trainer(f"{run}-output", dist.get_world_size(), [keeper, Stop(stop)], dropout, **fsdp, **options)
    try:
        made.train(resume_from_checkpoint=keeper.resume(made))
    except KeyboardInterrupt:
        keeper.on_train_end(made.args, made.state, made.control)
    assert sharded == any(isinstance(p, DTensor) for p in made.model.parameters())
    return history(made), weights(made), type(made.model_wrapped).__name__


def uninterrupted(folder: Path, **options: Any) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    made = trainer(str(folder), 1, [], save_strategy="no", **options)
    made.train()
    return history(made), weights(made)


RESIZES = [
    slow(2, False, 3, False, 2),
    matrix(2, False, 3, False, 3),  # at the end of an epoch
    slow(3, False, 2, True, 1),
    matrix(2, True, 3, True, 4),
    matrix(3, True, 1, False, 2),
]
"""Ranks and whether they shard, before a break and after it, and the steps before it."""


@pytest.mark.parametrize(("ranks_before", "sharded_before", "ranks_after", "sharded_after", "stop"), RESIZES)
def test_the_steps_are_those_of_an_uninterrupted_run(
    hf_ranks: Ranks,
    alone: None,
    tmp_path: Path,
    ranks_before: int,
    sharded_before: bool,
    ranks_after: int,
    sharded_after: bool,
    stop: int,
) -> None:
    options = {"lr_scheduler_type": "cosine"}
    expected, expected_weights = uninterrupted(tmp_path / "alone", **options)
    run = str(tmp_path / "run")
    for ranks, sharded, until in ((ranks_before, sharded_before, stop), (ranks_after, sharded_after, -1)):
        found = hf_ranks.run(ranks, trainer_case, run, sharded, until, options)
        for losses, _, kind in found:
            for key, values in expected.items():
                wanted = values[:stop] if until > 0 else values
                assert losses[key] == pytest.approx(wanted, rel=1e-5), key
            assert kind.startswith("FSDP" if sharded else "DistributedDataParallel")
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not list((tmp_path / "run-output").glob("checkpoint-*")), "the Trainer writes none of its own"
    assert sorted(p.name for p in (tmp_path / "run").glob("global_step*"))[-1] == f"global_step{STEPS}"


def whole_case(folder: str, dropout: float) -> dict[str, list[float]]:
    prepare()
    made = trainer(folder, dist.get_world_size(), [], dropout, save_strategy="no")
    made.train()
    return history(made)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_dropout_goes_on_on_as_many_ranks(hf_ranks: Ranks, tmp_path: Path, stop: int) -> None:
    expected = hf_ranks.run(2, whole_case, str(tmp_path / "whole"), 0.3)
    run = str(tmp_path / "run")
    hf_ranks.run(2, trainer_case, run, False, stop, {}, 0.3)
    found = hf_ranks.run(2, trainer_case, run, False, -1, {}, 0.3)
    for (losses, _, _), values in zip(found, expected, strict=True):
        assert losses["loss"] == values["loss"]
    (resized, _, _), *_ = hf_ranks.run(3, trainer_case, run, False, -1, {"max_steps": STEPS + 1}, 0.3)
    assert len(resized["loss"]) == STEPS + 1


class Counter(hf.TrainerCallback, ExportableState):
    """A callback with a state, which logs a norm that JSON has no number for."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        self.count += 10
        state.log_history.append({"grad_norm": float("inf")})

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


@pytest.mark.slow
def test_the_trainers_own_state_comes_back(alone: None, tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"save_total_limit": 2, "restore_callback_states_from_checkpoint": True}
    keeper = CheckpointCallback(run)
    made = trainer(str(tmp_path / "output"), 1, [keeper, Counter()], **options)
    assert keeper.resume(made) is None
    made.train()
    assert sorted(path.name for path in run.glob("global_step*")) == ["global_step4", "global_step5"]
    again = trainer(str(tmp_path / "output"), 1, [keeper, Counter()], max_steps=7, **options)
    folder = keeper.resume(again)
    assert folder is not None
    again.train(resume_from_checkpoint=folder)
    assert again.state.global_step == 7
    assert [e.get("grad_norm") for e in again.state.log_history].count(float("inf")) == 7
    (counter,) = [c for c in again.callback_handler.callbacks if isinstance(c, Counter)]
    assert counter.count == 70
    assert again.state.total_flos > made.state.total_flos
    assert not Path(folder).exists()


def finished(run: Path) -> None:
    keeper = CheckpointCallback(run)
    made = trainer(str(run) + "-output", 1, [keeper], max_steps=1)
    made.train(resume_from_checkpoint=keeper.resume(made))


def begin_anew(keeper: CheckpointCallback, folder: str) -> None:
    made = trainer(folder, 1, [keeper])
    keeper.resume(made)
    made.train()


def never_asked(keeper: CheckpointCallback, folder: str) -> None:
    trainer(folder, 1, [keeper]).train()


def other_batch(keeper: CheckpointCallback, folder: str) -> None:
    keeper.resume(trainer(folder, 1, [keeper], per_device_train_batch_size=2))


def other_checkpoint(keeper: CheckpointCallback, folder: str) -> None:
    made = trainer(folder, 1, [keeper])
    keeper.resume(made)
    made.train(resume_from_checkpoint=folder)


def best_model(keeper: CheckpointCallback, folder: str) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    keeper.resume(trainer(folder, 1, [keeper], eval_dataset=samples()[:2], **best))


def without_callback(keeper: CheckpointCallback, folder: str) -> None:
    keeper.resume(trainer(folder, 1, []))


def first_fsdp(keeper: CheckpointCallback, folder: str) -> None:
    given = trainer(folder, 1, [keeper])
    given.is_fsdp_enabled = True  # which it is on GPUs alone
    given.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    keeper.resume(given)


REFUSED: dict[Callable[[CheckpointCallback, str], None], str] = {
    begin_anew: r"has global_step1, but the Trainer begins anew: call trainer\.train\(",
    never_asked: "must see the Trainer before each train: call",
    other_batch: "samples per step: 12 in the checkpoint, 24 now",
    other_checkpoint: "train was given the checkpoint .*, but CheckpointCallback resumes",
    best_model: "load_best_model_at_end is set, which CheckpointCallback refuses: keep enough",
    first_fsdp: "fsdp is set, which CheckpointCallback refuses: its version 1 is untested",
    without_callback: "the Trainer doesn't have this callback",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refusals(alone: None, tmp_path: Path, case: Callable[[CheckpointCallback, str], None]) -> None:
    finished(tmp_path / "run")
    with pytest.raises((ValueError, RuntimeError), match=REFUSED[case]):
        case(CheckpointCallback(tmp_path / "run"), str(tmp_path / "output"))


def test_a_checkpoint_of_another_trainer_is_refused(alone: None, tmp_path: Path) -> None:
    uni3d.save(tmp_path, model=torch.nn.Linear(2, 2), step=3).wait()
    keeper = CheckpointCallback(tmp_path)
    with pytest.raises(ValueError, match="global_step3 has no state of transformers' Trainer"):
        keeper.resume(trainer(str(tmp_path), 1, [keeper]))


# --- the page ------------------------------------------------------------------------------------------


def page_case(folder: str, changed: bool, steps: int) -> dict[str, list[float]]:
    """Run the page's script on a Trainer's arguments that stay as they are."""
    prepare()
    given = trainer(folder, dist.get_world_size(), [], max_steps=steps, lr_scheduler_type="constant")
    names = {"Trainer": hf.Trainer, "model": given.model, "args": given.args, "data": samples()}
    os.chdir(folder)
    exec(script("transformers: the Trainer", changed=changed), names)
    return history(names["trainer"])


def test_the_pages_script(hf_ranks: Ranks, tmp_path: Path) -> None:
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
    expected = hf_ranks.run(2, page_case, str(tmp_path / "plain"), False, STEPS)[0]
    hf_ranks.run(2, page_case, str(tmp_path / "kept"), True, 2)
    found = hf_ranks.run(3, page_case, str(tmp_path / "kept"), True, STEPS)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert len(list((tmp_path / "kept" / "runs" / "mine").glob("global_step*"))) == 3
    assert list((tmp_path / "plain").glob("checkpoint-*")), "of the Trainer's own"
