"""Generate text with exported weights: plain PyTorch, no uni3d import.

    python generate.py --config configs/tiny.json --weights model.safetensors --prompt "At noon "

The model must be one of bytes (`vocab_size` 256), as trained with `--data builtin` or `--data FILE.txt`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from model import GPT, GPTConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def load_model(config_path: Path, weights_path: Path) -> tuple[GPT, int]:
    """Return the model of a config with the weights of a safetensors file, and its `seq_len`.

    Raises:
        ValueError: a file is missing or malformed, or the weights don't fit the config.
    """
    for flag, path in (("--config", config_path), ("--weights", weights_path)):
        if not path.is_file():
            raise ValueError(f"{flag} {path}: no such file")
    try:
        document = json.loads(config_path.read_text())
        config, seq_len = GPTConfig(**document["model"]), int(document["seq_len"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--config {config_path}: expected model and seq_len ({error!r})") from error
    if config.vocab_size != 256:
        raise ValueError(
            f"--config {config_path}: vocab_size({config.vocab_size}), but generate.py supports only models "
            "of bytes, with vocab_size 256"
        )
    try:
        state = load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"--weights {weights_path}: not a safetensors file ({error})") from error
    # On the meta device: the file's tensors become the parameters, so there is nothing to initialize.
    with torch.device("meta"):
        model = GPT(config)
    wanted = model.state_dict()
    if config.tied_head:
        del wanted["head.weight"]  # stored once, under the name of the embedding
    check_fit(wanted, state, f"{weights_path} doesn't fit {config_path}")
    if config.tied_head:
        state["head.weight"] = state["embed.tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), seq_len


def check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], prefix: str) -> None:
    """Check names and shapes in advance: `load_state_dict` reports differences in many lines."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{prefix}: {shown}{more}")


@torch.inference_mode()
def generate(model: GPT, prompt: bytes, count: int, *, seq_len: int, temperature: float, seed: int) -> bytes:
    """Return `prompt` and `count` more bytes.

    `temperature` 0 takes the most likely byte each time. The model reads at most the last `seq_len` bytes,
    the length that it was trained on: it has never seen later positions. There is no cache of keys and
    values, which a line of text doesn't need.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [*(prompt or b"\n")]  # an empty prompt starts a new line
    start = len(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids[-seq_len:]]))[0, -1]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            chances = (logits / temperature).softmax(-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
    return prompt + bytes(ids[start:])


def printable(text: bytes) -> str:
    """Replace bytes that are not UTF-8, and control characters, so that the text is safe to print."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with exported weights.")
    parser.add_argument(
        "--config", type=Path, required=True, help="JSON config that the model was trained with"
    )
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file, from `uni3d export`")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="number of bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely byte")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: expected at least 1")
    if args.temperature < 0:
        parser.error(f"--temperature {args.temperature}: expected 0 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        model, seq_len = load_model(args.config, args.weights)
    except ValueError as error:
        sys.exit(f"generate.py: {error}")
    options = {"seq_len": seq_len, "temperature": args.temperature, "seed": args.seed}
    text = generate(model, args.prompt.encode(), args.tokens, **options)
    print(printable(text))


if __name__ == "__main__":
    main()
