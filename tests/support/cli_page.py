"""Generate `docs/cli.md`: the options and output of every command.

    python tests/support/cli_page.py            # writes docs/cli.md

Commands run in a folder with a run that was trained on one topology and then on another, and with files that
a user may pass by mistake. Times and speeds in their output are replaced.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cli.md"
FIXTURES = ROOT / "tests" / "peers" / "fixtures"
for folder in (ROOT, ROOT / "tests" / "support", ROOT / "examples" / "megatron_gpt"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from commands import run  # noqa: E402
from ranks import Ranks  # noqa: E402

WIDTH = 100
LONGEST = 36
"""Maximum lines shown of a command's output."""

CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 8}},
    "seed": 1,
    "zero_optimization": {"stage": 1},
}
MODEL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}

USES: dict[str, list[str]] = {
    "inspect": [
        "inspect runs/tiny",
        "inspect runs/bf16 --atoms 'norm*' --stats",
        "inspect runs/tiny --tag global_step4 --json",
        "inspect theirs",
    ],
    "verify": ["verify runs/tiny --all", "verify runs/damaged"],
    "diff": ["diff runs/tiny runs/copy", "diff runs/bf16 runs/fp32", "diff theirs runs/bf16"],
    "doctor": ["doctor runs/tiny --world-size 3", "doctor runs/tiny --world-size 5", "doctor theirs"],
    "export": [
        "export runs/tiny weights.safetensors",
        "export runs/tiny bf16 --format hf --dtype bf16",
        "export runs/tiny tiny-dcp --format dcp --optimizer",
        "export runs/tiny tiny-megatron --format megatron --optimizer",
        "export runs/tiny tiny-deepspeed --format deepspeed-universal",
        "export runs/tiny weights.safetensors",
        "export runs/damaged other.safetensors",
        "export theirs theirs.safetensors",
    ],
    "import": [
        "import theirs --dry-run",
        "import theirs runs/imported",
        "inspect runs/imported",
        "import theirs runs/imported",
        "import malicious.pt runs/never",
    ],
    "plot": ["plot runs/tiny", "plot runs/tiny --layout --atom layers.0.ffn.up.weight", "plot runs/tiny"],
    "plan": ["plan --params 1B --world-size 8 --zero 1"],
    "bench": ["bench gpt.json --nproc 3", "bench gpt.json --nproc 2 --micro-batch 3"],
    "config": ["config ds_config.json --world-size 2"],
    "clean": ["clean runs/half --dry-run", "clean runs/half"],
    "prune": ["prune runs/tiny --keep-last 1 --dry-run"],
}
"""Examples per command, in order: later ones use the files of earlier ones."""

MISTAKES = {
    "an empty folder": "empty",
    "a file": "notes.txt",
    "a missing path": "runs/tinny",
    "a half-written checkpoint": "runs/half",
    "a folder of DeepSpeed's": "theirs",
    "a tag that isn't there": "runs/tiny --tag global_step9",
}
ON_RUNS = {
    "inspect": "inspect {}",
    "verify": "verify {}",
    "diff": "diff {} runs/tiny",
    "doctor": "doctor {} --world-size 2",
    "export": "export {} never.safetensors",
    "import": "import {} runs/never",
    "plot": "plot {} never.png",
    "clean": "clean {} --dry-run",
    "prune": "prune {} --keep-last 1 --dry-run",
}
IN_PLACE = {"inspect", "diff", "doctor", "export"}
WITHOUT_TAG = {"clean", "diff", "prune"}


def train_case(steps: int, zero: int, folder: str) -> None:
    """Resume, train up to `steps`, and save."""
    import torch
    from model import GPT, GPTConfig

    import uni3d

    with torch.device("meta"):
        model = GPT(GPTConfig(**MODEL))
    data = torch.utils.data.TensorDataset(
        torch.arange(16 * 8).view(16, 8) % 64, torch.arange(1, 16 * 8 + 1).view(16, 8) % 64
    )
    config = CONFIG | {"zero_optimization": {"stage": zero}, "parallel": {"device": "cpu"}}
    engine = uni3d.initialize(model=model, training_data=data, config=config)[0]
    engine.resume(folder)
    while engine.global_steps < steps:
        rate = engine.get_lr()[0]
        loss = engine.train_batch().item()
        if engine.global_rank == 0:
            degrees = engine.model.topology.degrees
            line = {"step": engine.global_steps, "loss": loss, "grad_norm": engine.get_global_grad_norm()}
            line |= {"lr": rate, "samples": engine.global_samples, "zero": zero}
            line |= {"pp": degrees.pp, "dp": degrees.dp, "tp": degrees.tp}
            with (Path(folder) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()


def train(ranks: Ranks, run: Path) -> None:
    """Train a run on two topologies.

    Not from within the temporary folder: the ranks outlive it, and torch can't load its libraries from a
    working directory that no longer exists.
    """
    run.mkdir(parents=True)
    ranks.run(1, train_case, 2, 0, str(run))
    ranks.run(2, train_case, 4, 3, str(run))


def prepare() -> None:
    """Add the other files to the current folder, which has a run."""
    Path("empty").mkdir()
    Path("notes.txt").write_text("not a checkpoint\n")
    shutil.copytree("runs/tiny/global_step4", "runs/half/.saving.global_step4")
    Path("runs/half/.saving.global_step4/manifest.json").unlink()
    shutil.copytree("runs/tiny", "runs/damaged")
    (chunk,) = Path("runs/damaged/global_step4/atoms/norm.weight/fp32").glob("c*")
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    shutil.copytree("runs/tiny", "runs/copy")
    for dtype in ("bf16", "fp32"):
        theirs = FIXTURES / f"deepspeed_zero1_{dtype}" / "checkpoint"
        assert run("import", theirs, f"runs/{dtype}").returncode == 0
    shutil.copytree(FIXTURES / "deepspeed_zero1_bf16" / "checkpoint", "theirs")
    for n in (500, 1000):
        Path(f"trainer/checkpoint-{n}").mkdir(parents=True)
    Path("ds_config.json").write_text(json.dumps(CONFIG, indent=1))
    document = {"model": {"num_layers": 2}, "seq_len": 64, "uni3d": CONFIG | {"parallel": {"pp": 2}}}
    Path("gpt.json").write_text(json.dumps(document))
    _malicious(Path("malicious.pt"))


def _malicious(path: Path) -> None:
    import torch

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch it-ran",)

    torch.save({"weight": torch.ones(2), "more": Runs()}, path)


def page(ranks: Ranks) -> str:
    """Return the text of the page."""
    with tempfile.TemporaryDirectory() as folder, _terminal():
        train(ranks, Path(folder, "runs", "tiny"))
        return _page_of(folder)


def _page_of(folder: str) -> str:
    with contextlib.chdir(folder):
        prepare()
        parts = [INTRODUCTION, _block("uni3d --help", show=False)]
        for command, uses in USES.items():
            parts += [f"## `uni3d {command}`", _block(f"{command} --help", show=False)]
            parts += [_block(use) for use in uses]
        parts += [MISTAKEN, *(_mistakes(command) for command in ON_RUNS)]
        assert not Path("it-ran").exists()
        assert not list(Path().glob("never*")) + list(Path("runs").glob("never*"))
    return "\n\n".join(parts) + "\n"


INTRODUCTION = f"""# The command line

Generated by `python tests/support/cli_page.py`, and checked by a test. Times are replaced. Every command has
`--json`. Exit codes: 0 for success; 1 for damage, a difference or an error, which is one line on stderr; 2
for invalid options and, in `diff` and `doctor`, for a checkpoint that can't be read.

`runs/tiny` was trained for two steps on one process and then two on two (dp 2, ZeRO 3). `runs/damaged` is a
copy with one flipped bit, `runs/copy` an identical copy. `runs/bf16` and `runs/fp32` were imported from
DeepSpeed. `runs/half` has an interrupted save, `theirs` is a DeepSpeed checkpoint, `trainer` a folder
with checkpoints of transformers' Trainer, and `malicious.pt` is a
file of `torch.save` that would run a shell command when unpickled. The
terminal is {WIDTH} columns wide."""

MISTAKEN = """## Mistakes

What each command says if it is given the wrong path or tag."""


def _mistakes(command: str) -> str:
    lines = [f"### `uni3d {command}`", ""]
    for what, given in MISTAKES.items():
        if "--tag" in given and command in WITHOUT_TAG:
            continue
        if command == "import" and given == "theirs":
            what, given = "a run of our own", "runs/tiny"
        if command in IN_PLACE and given == "theirs":
            what, given = "a folder of a Trainer's checkpoints", "trainer"
        use = ON_RUNS[command].format(given)
        done = _run(use)
        said = _steady(done.stderr or done.stdout).strip().splitlines()
        text = " ".join(line.strip() for line in said) if done.returncode else "; ".join(said[:3])
        lines.append(f"- {what} (exit {done.returncode}): `{text[:300]}`")
    return "\n".join(lines)


def _block(use: str, *, show: bool = True) -> str:
    """Return a command and its output as a block of text."""
    done = _run(use.removeprefix("uni3d "))
    said = _steady(done.stdout + done.stderr).rstrip()
    lines = said.splitlines()
    if show and len(lines) > LONGEST:
        said = "\n".join([*lines[: LONGEST - 8], f"... ({len(lines) - LONGEST + 3} lines more)", *lines[-5:]])
    exit_code = f"\n(exit code {done.returncode})" if done.returncode else ""
    head = f"$ uni3d {use.removeprefix('uni3d ')}"
    return "\n".join(["```text", head, *(line.rstrip() for line in (said + exit_code).splitlines()), "```"])


def _run(use: str) -> Any:
    import shlex

    return run(*shlex.split(use))


def _steady(text: str) -> str:
    """Replace whatever differs between runs: times, speeds, dates, the folder."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "2026-11-28 12:00", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "2026-11-28T12:00:00+00:00", text)
    text = re.sub(r"in \d+\.\d+ s \(\d+ MB/s\)", "in 0.01 s (100 MB/s)", text)
    return text.replace(str(Path.cwd()) + "/", "")


@contextlib.contextmanager
def _terminal() -> Any:
    """Set a fixed terminal width, without colours."""
    from unittest import mock

    from uni3d.cli import terminal

    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}):
        _forget(terminal)
        yield
    _forget(terminal)


def _forget(terminal: Any) -> None:
    """Let the commands look at the terminal again; they keep what they have found."""
    terminal.out.cache_clear()
    terminal.err.cache_clear()


if __name__ == "__main__":
    pool = Ranks(2)
    try:
        Path(sys.argv[1] if sys.argv[1:] else PAGE).write_text(page(pool))
    finally:
        pool.stop()
