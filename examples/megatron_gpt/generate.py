"""Generate text with exported weights: plain PyTorch, no uni3d import.

    python generate.py --config configs/tiny.json --weights model.safetensors --prompt "def "

The model must be one of bytes (`vocab_size` 256), as trained on `--data builtin` or `FILE.txt`.
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

SEPARATOR = 0
"""Ends a document in the training text: an empty prompt starts after one, and generation stops at one."""


def load_model(config_path: Path, weights_path: Path) -> GPT:
    """The model of a config, with the weights of a safetensors file. Raises ValueError where they differ."""
    for flag, path in (("--config", config_path), ("--weights", weights_path)):
        if not path.is_file():
            raise ValueError(f"{flag} {path}: there is no such file")
    try:
        config = GPTConfig(**json.loads(config_path.read_text())["model"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--config {config_path}: not a model's config ({error!r})") from error
    if config.vocab_size != 256:
        raise ValueError(
            f"vocab_size({config.vocab_size}) of {config_path}: only models of bytes (256) fit here"
        )
    try:
        state = load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"--weights {weights_path}: not a safetensors file ({error})") from error
    # Built without weights: the file's own tensors become the parameters, so nothing is initialised in vain.
    with torch.device("meta"):
        model = GPT(config)
    wanted = model.state_dict()
    if config.tied_head:
        del wanted["head.weight"]  # stored once, under the name of the embedding
    check_fit(wanted, state, f"{weights_path} does not fit {config_path}")
    if config.tied_head:
        state["head.weight"] = state["embed.tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], prefix: str) -> None:
    """One line for what `load_state_dict` would say in many."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{prefix}: {shown}{more}")


@torch.inference_mode()
def generate(model: GPT, prompt: bytes, count: int, *, temperature: float, seed: int) -> bytes:
    """`prompt` and up to `count` more bytes, fewer where the model ends the document.

    `temperature` 0 takes the likeliest byte each time. Each step reads the last `max_seq_len` bytes anew:
    slower than a cache of keys and values, and enough for a line of text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [*(prompt or bytes([SEPARATOR]))]
    start = len(ids)
    for _ in range(count):
        window = torch.tensor([ids[-model.config.max_seq_len :]])
        logits = model(window)[0, -1]
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if byte == SEPARATOR:
            break
        ids.append(byte)
    return prompt + bytes(ids[start:])


def printable(text: bytes) -> str:
    """Text that is safe to print: bytes that are not UTF-8 and control characters become a mark."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in decoded)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with exported weights.")
    parser.add_argument(
        "--config", type=Path, required=True, help="the JSON config the model was trained with"
    )
    parser.add_argument("--weights", type=Path, required=True, help="a file from `uni3d export`")
    parser.add_argument("--prompt", default="", help="the text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="the most bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: give at least 1")
    if args.temperature < 0:
        parser.error(f"--temperature {args.temperature}: give 0 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        model = load_model(args.config, args.weights)
    except ValueError as error:
        sys.exit(f"generate.py: {error}")
    prompt = args.prompt.encode()
    text = generate(model, prompt, args.tokens, temperature=args.temperature, seed=args.seed)
    print(printable(text))


if __name__ == "__main__":
    main()
