"""A foreign checkpoint in place is what an import makes of it: for commands, exports and the Python call."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import answer, refused, run
from foreign_files import FIXTURES, saved
from marks import slow
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import ckpt
import uni3d
from uni3d.checkpoint.functions import load
from uni3d.importers import detect
from uni3d.importers.in_place import ForeignCheckpoint
from uni3d.importers.source import Options
from uni3d.manifest import RunManifest

MEGATRON = "megatron_distributed/checkpoint/iter_0000003"
KINDS = {
    "deepspeed": "deepspeed_zero2_fp16/checkpoint",
    "deepspeed-universal": "deepspeed_zero3_fp32_universal/checkpoint",
    "dcp": "dcp_fsdp/checkpoint",
    "megatron": MEGATRON,
    "safetensors": "weights_llama_sharded/checkpoint",
    "torch": "weights_bin/checkpoint",
}


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of runs that `uni3d import` wrote, by kind."""
    folder = tmp_path_factory.mktemp("imports")
    for kind, name in KINDS.items():
        answer("import", FIXTURES / name, folder / kind)
    return {kind: folder / kind for kind in KINDS}


def rows(given: list[dict[str, Any]], *but: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in but} for row in given]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_an_import_writes(imports: dict[str, Path], kind: str) -> None:
    found, written = uni3d.open(FIXTURES / KINDS[kind]), uni3d.open(imports[kind])
    assert isinstance(found, ForeignCheckpoint)
    assert not isinstance(written, ForeignCheckpoint)
    assert found.source.kind == kind
    mine, theirs = (RunManifest.of(each).document() for each in (found, written))
    assert mine | {"created": None} == theirs | {"created": None}
    assert (found.tag, found.atoms) == (written.tag, written.atoms)
    for key, info in written.arrays.items():
        assert (found.arrays[key].dtype, found.arrays[key].grid) == (info.dtype, info.grid)
        whole = found.read(*key)
        assert whole.tobytes() == written.read(*key).tobytes(), key
        box = ckpt.Box(tuple(n // 3 for n in info.shape), tuple(n - n // 3 - n // 4 for n in info.shape))
        assert found.read(*key, box).tobytes() == np.ascontiguousarray(whole[box.slices]).tobytes()


@pytest.mark.parametrize("kind", ["deepspeed", slow("dcp"), "megatron", slow("safetensors"), slow("torch")])
def test_commands(imports: dict[str, Path], tmp_path: Path, kind: str) -> None:
    here, there = FIXTURES / KINDS[kind], imports[kind]
    listed = answer("inspect", here), answer("inspect", there)
    but = "created", "written on", "latest"
    assert rows(listed[0], *but) == rows(listed[1], *but)
    assert listed[0][0]["written on"] == f"{kind}, in place"
    pictures = [answer("inspect", each, "--atoms", "--stats") for each in (here, there)]
    assert pictures[0] == pictures[1]
    assert answer("diff", here, there)["differences"] == []
    for name in ("out.safetensors", "out.pt"):
        files = [tmp_path / side / name for side in ("here", "there")]
        for file, of in zip(files, (here, there), strict=True):
            file.parent.mkdir(exist_ok=True)
            answer("export", of, file)
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize("kind", ["deepspeed", slow("dcp")])
def test_exports_that_others_go_on_from(imports: dict[str, Path], tmp_path: Path, kind: str) -> None:
    forms = [("dcp", "--optimizer")] + ([("deepspeed-universal",)] if kind == "deepspeed" else [])
    for form, *options in forms:
        folders = [tmp_path / form / side for side in ("here", "there")]
        for folder, of in zip(folders, (FIXTURES / KINDS[kind], imports[kind]), strict=True):
            answer("export", of, folder, "--format", form, *options)
        names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
        assert names[0] == names[1]
        assert len(names[0]) > 10
        for name in names[0]:
            if name.name != ".metadata":  # torch's pickle of a random identifier, too
                assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_differences_are_found(imports: dict[str, Path]) -> None:
    done = run("diff", FIXTURES / "deepspeed_zero1_bf16/checkpoint", imports["deepspeed"])
    assert done.returncode == 1
    assert "arrays differ" in done.words


def test_hugging_face(tmp_path: Path) -> None:
    folder = FIXTURES / "weights_llama/checkpoint"
    told = answer("export", folder, tmp_path / "hf", "--format", "hf", "--hf-config", folder / "config.json")
    assert told["tensors"] == len(uni3d.open(tmp_path / "hf").atoms)
    assert answer("diff", folder, tmp_path / "hf")["differences"] == []


def test_the_doctor_says_what_is_there(tmp_path: Path) -> None:
    report = answer("doctor", FIXTURES / KINDS["deepspeed"], "--world-size", 4)
    assert report["would_resume"]
    assert {"weights and buffers", "optimizer", "LR schedule", "step"} <= report["in_place"][
        "restored"
    ].keys()
    assert report["in_place"]["lacks"] == {}
    assert report["in_place"]["ranks"] == [1, 2, 4], "those that divide the batch of 12"
    done = run("doctor", FIXTURES / KINDS["safetensors"])
    assert done.returncode == 1
    for words in ("lacks optimizer", "LR schedule", "generation_config.json: not read", "goes on on 1, 2, 4"):
        assert words in done.words, words
    assert answer("doctor", FIXTURES / KINDS["dcp"])["world_size"] == 1


def test_the_layout_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = answer("plot", FIXTURES / KINDS["dcp"], tmp_path / "a.png", "--layout", "--dp", 2, "--zero", 3)
    assert row["before"]["imported_from"] == "dcp"
    assert "convert it with uni3d import" in refused("plot", FIXTURES / KINDS["dcp"])
    assert "convert it with uni3d import" in refused("verify", FIXTURES / KINDS["dcp"])


def test_weights_by_the_names_of_deepspeed(imports: dict[str, Path]) -> None:
    weights = [
        uni3d.get_fp32_state_dict_from_zero_checkpoint(place)
        for place in (FIXTURES / KINDS["deepspeed"], imports["deepspeed"])
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- options ----------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    net.register_buffer("scale", torch.ones(3))
    return net


def test_options(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "weights.bin")
    found = uni3d.open(tmp_path / "weights.bin", name_map={r"(\d)\.(.*)": r"layers.\1.\2"}, buffers=["scale"])
    assert [*found.atoms] == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight", "scale"]
    assert found.atoms["scale"] == ["value"]
    (tmp_path / "names.json").write_text(json.dumps({r"0\..*": None, "nothing": "x"}))
    found = uni3d.open(tmp_path / "weights.bin", kind="torch", name_map=tmp_path / "names.json")
    assert [*found.atoms] == ["1.bias", "1.weight", "scale"]
    assert "pattern 'nothing' of the name map: it matches no tensor" in found.left_out
    with pytest.raises(ValueError, match="kind is 'tf'; expected auto, deepspeed"):
        uni3d.open(tmp_path, kind="tf")


def test_options_of_our_own(imports: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="is uni3d's own"):
        uni3d.open(imports["dcp"], buffers=["a"])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match="is not a folder"):
        uni3d.open(tmp_path / "mistyped")
    with pytest.raises(ckpt.CheckpointError, match="holds no committed checkpoint"):
        uni3d.open(tmp_path)
    for n in (500, 1000):
        (tmp_path / f"checkpoint-{n}").mkdir()
    with pytest.raises(ckpt.CheckpointError, match=r"did you mean .*/checkpoint-1000\?"):
        uni3d.open(tmp_path)
    with pytest.raises(ckpt.CheckpointError, match=r"give --split .* \(an option of `uni3d import`"):
        uni3d.open(FIXTURES / "deepspeed_tp_no_patterns/checkpoint")


def test_a_value_that_fp32_lacks(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([0.1], dtype=torch.float64)}, tmp_path / "w.bin")
    with pytest.raises(ckpt.CheckpointError, match="which float32 can't represent"):
        uni3d.open(tmp_path / "w.bin").read("w")


def test_damage_is_found(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "weights.bin"
    torch.save(net.state_dict(), path)
    data = path.read_bytes()
    at = data.index(net[0].weight.detach().numpy().tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    found = uni3d.open(path)
    assert found.read("1.weight").shape == (2, 5)
    with pytest.raises(ckpt.CheckpointError, match="is damaged"):
        found.read("0.weight")


# --- loads ------------------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(kind: type[torch.optim.Optimizer], **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = kind(model.parameters(), **settings)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.filterwarnings("ignore:.*in this run, .* in the checkpoint")
def test_an_optimizer_of_unknown_class_is_the_given_one(tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    weights, states = get_state_dict(model, optimizer)
    folder = saved(tmp_path / "dcp", {"model": weights, "optim": states})
    losses = [step(model, optimizer) for _ in range(2)]
    other = network()
    mine = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.1)
    load(folder, model=other, optimizer=mine)
    assert mine.param_groups[0]["momentum"] == 0.9
    assert [step(other, mine) for _ in range(2)] == losses
    unlike = network()
    before = [p.clone() for p in unlike.parameters()]
    adam = torch.optim.AdamW(unlike.parameters())
    with pytest.raises(
        ckpt.CheckpointError, match=r"doesn't record the class .* are momentum_buffer; those of AdamW"
    ):
        load(folder, model=unlike, optimizer=adam)
    assert all(map(torch.equal, before, unlike.parameters()))
    assert not adam.state
    told = refused("export", folder, tmp_path / "x", "--format", "dcp", "--optimizer")
    assert "doesn't record the class of its optimizer; import it, with --optimizer CLASS" in told


def test_a_half_precision_model_takes_half_precision_weights(tmp_path: Path) -> None:
    theirs = network().bfloat16()
    torch.save(theirs.state_dict(), tmp_path / "half.bin")
    mine = network().bfloat16()
    with torch.no_grad():
        mine[0].weight.zero_()
    report = load(tmp_path / "half.bin", model=mine).report
    assert {"scale/value", "0.weight/fp32"} <= {*report.restored}
    assert torch.equal(mine[0].weight, theirs[0].weight)
    torch.save(network().state_dict(), tmp_path / "whole.bin")
    with pytest.raises(ckpt.CheckpointError, match=r"float32\[5, 3\] in .*, but the model's is bfloat16"):
        load(tmp_path / "whole.bin", model=mine)
    whole = network()
    load(tmp_path / "half.bin", model=whole)
    assert torch.equal(whole[0].weight, theirs[0].weight.float())


def test_what_is_opened_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = network()
    renamed = {f"body.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": renamed, "epoch": 3}, tmp_path / "weights.bin")
    mine = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    mine.register_buffer("scale", torch.zeros(3))
    opened = uni3d.open(tmp_path / "weights.bin", name_map={r"body\.(.*)": r"\1"}, buffers=["*.scale"])
    report = load(opened, model=mine).report
    assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
    assert report.left_out == ["epoch: not part of the state_dict"]
    assert "left out: epoch: not part of the state_dict" in capsys.readouterr().err


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("names", [("first", "last"), ("last",), ("first",)])
def test_ties_are_the_models(tmp_path: Path, names: tuple[str, ...]) -> None:
    values = torch.randn(3, 3)
    saved(tmp_path / "dcp", {"model": {f"{name}.weight": values.clone() for name in names}})
    model = Tied()
    load(tmp_path / "dcp", model=model)
    assert torch.equal(model.first.weight, values)
    apart = {"first.weight": values, "last.weight": values + 1}
    saved(tmp_path / "apart", {"model": apart})
    with pytest.raises(ckpt.CheckpointError, match="one tied weight in this run, but two in the checkpoint"):
        load(tmp_path / "apart", model=model)


@pytest.mark.parametrize("kind", ["deepspeed", "dcp"])
def test_a_run_does_not_begin_anew_in_a_foreign_folder(kind: str) -> None:
    keeper = uni3d.Checkpointer(FIXTURES / KINDS[kind], model=network())
    with pytest.raises(ckpt.CheckpointError, match=f"is a {kind} checkpoint: load it in place"):
        keeper.restore()


# --- a Trainer's folder ------------------------------------------------------------------------------------


def trainers_folder(folder: Path, states: Any, weights: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save(states, folder / "optimizer.pt")
    torch.save({"last_epoch": 3, "_step_count": 4, "base_lrs": [0.1]}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    return folder


def decayed(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return an optimizer whose groups, like a Trainer's, aren't in the model's order."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1, **settings)


@pytest.mark.filterwarnings("ignore:.*doesn't restore the checkpoint's scheduler")
def test_numbered_states_by_the_given_optimizer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = decayed(model)
    for _ in range(3):
        step(model, optimizer)
    folder = trainers_folder(tmp_path, optimizer.state_dict(), model.state_dict())
    losses = [step(model, optimizer) for _ in range(2)]
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mine = decayed(other)
    load(folder, model=other, optimizer=mine)
    assert [step(other, mine) for _ in range(2)] == losses
    found = uni3d.open(folder)
    assert found.tag == "global_step3"
    assert RunManifest.of(found).optimizer is None
    (line,) = (line for line in found.left_out if line.startswith("optimizer.pt: "))
    assert "numbered, and it isn't certain" in line
    flat = torch.optim.AdamW(other.parameters())
    with pytest.raises(
        ckpt.CheckpointError, match=r"has no optimizer.*groups of \[2, 2\].*given optimizer's have \[4\]"
    ):
        load(folder, model=other, optimizer=flat)


def test_numbered_states_by_their_shapes(tmp_path: Path) -> None:
    model = network()
    optimizer = decayed(model)
    for _ in range(3):
        step(model, optimizer)
    folder = trainers_folder(tmp_path / "theirs", optimizer.state_dict(), model.state_dict())
    found = uni3d.open(folder)
    groups = RunManifest.of(found).optimizer.groups  # type: ignore[union-attr]
    assert [group["params"] for group in groups] == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
    for name, parameter in model.named_parameters():
        assert torch.equal(
            torch.from_numpy(found.read(name, "exp_avg")), optimizer.state[parameter]["exp_avg"]
        )
    assert "optimizer.pt: its numbered states were matched by their shapes" in found.left_out
    answer("import", folder, tmp_path / "run")
    assert answer("diff", folder, tmp_path / "run")["differences"] == []


def test_a_part_that_cannot_be_followed_names_the_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4, 3)}, file := tmp_path / "model.pt")
    (array,) = detect.read(file, "auto", Options()).arrays
    assert array.read_part is not None
    with pytest.raises(ckpt.CheckpointError, match=f"{file} hasn't the form of a torch checkpoint"):
        array.read_part(("no slice",))  # type: ignore[arg-type]
