"""Random damage to a checkpoint of any format: a byte is as likely as any other, and so is a file."""

from random import Random

from damage import Files, flip_at

BLOCKS = (16, 512, 4096)


def damaged(files: Files, own: list[str], older: dict[str, str], rng: Random) -> tuple[str, Files]:
    """Return a description of damage to the files `own`, and all files after it.

    `older` names the same files of an older checkpoint; it is empty for a checkpoint of one file.
    """
    ways = [flip, flip, several, zeros, zeros, cut, delete, *([swap] if len(own) > 1 else [])]
    ways += [of_older] if older else []
    way, after = rng.choice(ways), dict(files)
    return f"{way.__name__} {way(after, own, older, rng)}", after


def anywhere(files: Files, own: list[str], rng: Random) -> str:
    """Choose a file by its size."""
    return rng.choices(own, [len(files[path]) for path in own])[0]


def flip(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    """Flip a bit."""
    path = anywhere(files, own, rng)
    return f"{path} {flip_at(files, path, rng)}"


def several(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    return ", ".join(flip(files, own, older, rng) for _ in range(rng.randint(2, 8)))


def zeros(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    """Make a block zeros."""
    path, size = anywhere(files, own, rng), rng.choice(BLOCKS)
    at = rng.randrange(len(files[path])) // size * size
    part = files[path][at : at + size]
    files[path] = files[path][:at] + bytes(len(part)) + files[path][at + size :]
    return f"{path} {at}+{len(part)}"


def cut(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    """Cut a file short."""
    path = rng.choice(own)
    files[path] = files[path][: rng.randrange(max(1, len(files[path])))]
    return f"{path} {len(files[path])}"


def delete(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    path = rng.choice(own)
    del files[path]
    return path


def swap(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    """Exchange two files."""
    a, b = rng.sample(own, 2)
    files[a], files[b] = files[b], files[a]
    return f"{a}, {b}"


def of_older(files: Files, own: list[str], older: dict[str, str], rng: Random) -> str:
    """Put an older checkpoint's file in the place of the same one."""
    path = rng.choice(sorted(older))
    files[path] = files[older[path]]
    return path
