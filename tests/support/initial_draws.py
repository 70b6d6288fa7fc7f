"""Initial weights as documented, drawn whole: each tile in turn, from a generator of its own.

Shares no code with `parallel`, so that an error in either shows.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

Fill = Callable[[Tensor, torch.Generator], object]


def tile_extents(shape: tuple[int, ...]) -> list[int]:
    """Return the tile's extents: up to 512 of the last dim, earlier dims from the right while 16,384 elements
    aren't reached, and what is left goes to the last dim."""
    left = 16384 // min(shape[-1], 512)
    extents: list[int] = []
    for size in shape[-2::-1]:
        extents.insert(0, min(size, left))
        left //= extents[0]
    return [*extents, min(shape[-1], 16384 // math.prod(extents))]


def tile_generator(seed: int, name: str, number: int) -> torch.Generator:
    """Return a Mersenne Twister whose 624 words are a hash."""
    text = f"initial weights 1:{seed}:{name}:".encode() + struct.pack("<Q", number)
    words = struct.unpack("<624I", hashlib.shake_256(text).digest(4 * 624))
    state = struct.pack("<QiiQ624Q40x", 0, 1, 1, 0, *words)  # seed, words left, is seeded, next word
    return torch.Generator().set_state(torch.tensor(list(state), dtype=torch.uint8))


def drawn(seed: int, name: str, shape: tuple[int, ...], fill: Fill) -> Tensor:
    """Return the whole parameter; `fill` does to a tile what the model does to a parameter."""
    whole, extents = torch.empty(shape), tile_extents(shape)
    starts = [range(0, size, extent) for size, extent in zip(shape, extents, strict=True)]
    for number, corner in enumerate(itertools.product(*starts)):
        place = tuple(slice(c, c + e) for c, e in zip(corner, extents, strict=True))
        tile = torch.empty(whole[place].shape)
        fill(tile, tile_generator(seed, name, number))
        whole[place] = tile
    return whole


def drawn_at_once(seed: int, name: str, shape: tuple[int, ...], fill: Fill) -> Tensor:
    """Return a parameter that can't be drawn in tiles. Torch's own generator is seeded for it too."""
    seeds = []
    for text in (name, f"{name} without a generator"):
        digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
        seeds.append(int.from_bytes(digest[:7], "little"))
    whole = torch.empty(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[1])
        fill(whole, torch.Generator().manual_seed(seeds[0]))
    return whole
