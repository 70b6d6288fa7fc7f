"""Random damage to the files of a checkpoint, beside another one of the same run."""

from pathlib import Path
from random import Random

Files = dict[str, bytes]
"""Content of each file by its path in the run's folder."""

TAG, OTHER = "t1", "t2"


def damaged(files: Files, rng: Random) -> tuple[str, Files]:
    """Return a description of damage to the files of a tag, and the files after it."""
    ways = [
        flip,
        flip,
        several,
        zeros,
        cut,
        longer,
        delete,
        blocks,
        swap,
        of_other_tag,
        swap_atoms,
        swap_tags,
    ]
    way = rng.choice(ways)
    after = dict(files)
    return f"{way.__name__} {way(after, rng)}", after


def any_file(files: Files, rng: Random) -> str:
    """Choose a file of the tag; one with data as often as a document."""
    own = sorted(path for path in files if path.startswith(f"{TAG}/"))
    data = [path for path in own if is_data(path)]
    return rng.choice(data if rng.random() < 0.5 else own)


def is_data(path: str) -> bool:
    return path.rpartition("/")[2].split(".")[0] == "c"


def flip(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    return f"{path} {flip_at(files, path, rng)}"


def flip_at(files: Files, path: str, rng: Random) -> int:
    data = bytearray(files[path])
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    files[path] = bytes(data)
    return place


def several(files: Files, rng: Random) -> str:
    paths = [any_file(files, rng) for _ in range(rng.randint(1, 3))]
    return str([(path, flip_at(files, path, rng)) for path in paths for _ in range(rng.randint(1, 4))])


def zeros(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    block = rng.choice((1, 16, 512, 4096))
    begin = rng.randrange(len(files[path])) // block * block
    size = len(files[path][begin : begin + block])
    files[path] = files[path][:begin] + bytes(size) + files[path][begin + size :]
    return f"{path} {begin}+{size}"


def cut(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    size = rng.choice((0, 1, len(files[path]) - 1, rng.randrange(len(files[path]))))
    files[path] = files[path][:size]
    return f"{path} {size}"


def longer(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    more = rng.choice((b"\0", b"\n", bytes(4096), files[path], rng.randbytes(rng.randint(1, 300))))
    files[path] += more
    return f"{path} {len(more)}"


def delete(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    del files[path]
    return path


def blocks(files: Files, rng: Random) -> str:
    """Exchange two blocks of a file."""
    path = any_file(files, rng)
    data, size = files[path], rng.choice((1, 4, 512, 4096))
    a, b = sorted(rng.randrange(max(1, len(data) // size)) * size for _ in range(2))
    if b + size <= len(data) and a + size <= b:
        first, second = data[a : a + size], data[b : b + size]
        files[path] = data[:a] + second + data[a + size : b] + first + data[b + size :]
    return f"{path} {a}, {b}, {size} bytes"


def swap(files: Files, rng: Random) -> str:
    a, b = any_file(files, rng), any_file(files, rng)
    files[a], files[b] = files[b], files[a]
    return f"{a}, {b}"


def of_other_tag(files: Files, rng: Random) -> str:
    path = any_file(files, rng)
    files[path] = files[path.replace(TAG, OTHER, 1)]
    return path


def swap_atoms(files: Files, rng: Random) -> str:
    """Exchange the folders of two atoms, or of two states."""
    depth = rng.choice((3, 4))
    folders = {"/".join(path.split("/")[:depth]) for path in files if path.startswith(f"{TAG}/atoms/")}
    a, b = rng.sample(sorted(f for f in folders if not f.endswith(".json")), 2)
    exchange(files, a, b)
    return f"{a}, {b}"


def swap_tags(files: Files, rng: Random) -> str:
    """Exchange the tags, or part of them."""
    place = rng.choice(("", "/atoms", "/manifest.json", "/arrays.0.json"))
    exchange(files, TAG + place, OTHER + place)
    return place


def exchange(files: Files, a: str, b: str) -> None:
    inside = {path: files.pop(path) for path in [*files] if f"{path}/".startswith((f"{a}/", f"{b}/"))}
    for path, data in inside.items():
        old, new = (a, b) if f"{path}/".startswith(f"{a}/") else (b, a)
        files[new + path.removeprefix(old)] = data


def put(run: Path, files: Files, before: Files) -> None:
    """Make the folder hold `files`, given that it holds `before`."""
    for path in before.keys() - files.keys():
        (run / path).unlink()
    for path, data in files.items():
        if before.get(path) != data:
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_bytes(data)
