"""File systems on which several processes can't write one file, found in made-up lists of mounts."""

from pathlib import Path

import pytest

from ckpt import files_for, open_store
from ckpt.stores.mounts import WHOLE_FILES, can_share_files

ROOT = "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw"


def mounts(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text("\n".join([ROOT, *lines, ""]), "utf-8")
    return path


def mount(place: str, kind: str, source: str, options: str = "shared:5") -> str:
    fields = f"40 22 0:45 / {place} rw,nosuid {options}".rstrip()
    return f"{fields} - {kind} {source} rw,user_id=0"


@pytest.mark.parametrize(
    ("kind", "source", "shared"),
    [
        ("ext4", "/dev/sdb1", True),
        ("nfs4", "server:/data", True),
        ("lustre", "10.0.0.1@tcp:/scratch", True),
        ("fuse.gcsfuse", "bucket", False),
        ("fuse", "gcsfuse", False),
        ("fuse.s3fs", "s3fs", False),
        ("fuse", "mountpoint-s3", False),
        ("fuse", "blobfuse2", False),
        ("fuse.rclone", "remote:bucket", False),
        ("fuse.sshfs", "host:/data", True),
        ("fuseblk", "/dev/sdc1", True),
        ("nfs4", "server:/s3fs", True),  # only a name
    ],
)
def test_kinds_of_file_systems(tmp_path, kind, source, shared):
    listed = mounts(tmp_path, mount("/mnt/data", kind, source))
    assert can_share_files(Path("/mnt/data"), listed) == shared
    assert can_share_files(Path("/mnt/data/runs/mine"), listed) == shared, "whether it exists or not"
    assert can_share_files(Path("/mnt/database"), listed), "another folder"
    assert can_share_files(Path("/mnt"), listed)


@pytest.mark.parametrize("program", WHOLE_FILES)
def test_every_program_is_known_by_type_and_by_source(tmp_path, program):
    for kind, source in ((f"fuse.{program}", "bucket"), ("fuse", program)):
        assert not can_share_files(Path("/mnt/data/run"), mounts(tmp_path, mount("/mnt/data", kind, source)))


def test_the_innermost_mount_decides(tmp_path):
    bucket, disk = mount("/mnt", "fuse.gcsfuse", "b"), mount("/mnt/disk", "ext4", "/dev/sdb1")
    for lines in ((bucket, disk), (disk, bucket)):
        listed = mounts(tmp_path, *lines)
        assert not can_share_files(Path("/mnt/run"), listed)
        assert can_share_files(Path("/mnt/disk/run"), listed)


def test_of_two_mounts_on_one_place_the_last_decides(tmp_path):
    bucket, disk = mount("/mnt", "fuse.gcsfuse", "b"), mount("/mnt", "ext4", "/dev/sdb1")
    assert can_share_files(Path("/mnt/run"), mounts(tmp_path, bucket, disk))
    assert not can_share_files(Path("/mnt/run"), mounts(tmp_path, disk, bucket))


@pytest.mark.parametrize("options", ["", "shared:5", "shared:5 master:1 propagate_from:2"])
def test_the_number_of_optional_fields_varies(tmp_path, options):
    listed = mounts(tmp_path, mount("/mnt/data", "fuse.gcsfuse", "bucket", options))
    assert not can_share_files(Path("/mnt/data/run"), listed)


ODD = {r"my\040data": "my data", r"a\134b": r"a\b", "größe": "größe", r"ö\040ü": "ö ü"}


@pytest.mark.parametrize(("escaped", "name"), ODD.items())
def test_odd_names(tmp_path, escaped, name):
    listed = mounts(tmp_path, mount(f"/mnt/{escaped}", "fuse.gcsfuse", "bucket"))
    assert not can_share_files(Path(f"/mnt/{name}/run"), listed)
    assert can_share_files(Path(f"/mnt/{name[0]}/run"), listed)


def test_a_name_that_is_no_text(tmp_path):
    listed = tmp_path / "mountinfo"
    place = b"/mnt/\xff"
    listed.write_bytes(mount("/mnt/X", "fuse.gcsfuse", "bucket").encode().replace(b"/mnt/X", place))
    assert not can_share_files(Path(place.decode(errors="surrogateescape")) / "run", listed)


def test_a_link_leads_to_where_the_files_are(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "bucket")
    listed = mounts(tmp_path, mount(f"{tmp_path}/bucket", "fuse.gcsfuse", "bucket"))
    assert not can_share_files(tmp_path / "run", listed)
    assert can_share_files(tmp_path / "runs", listed)


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = mounts(tmp_path, mount(str(tmp_path), "fuse.gcsfuse", "bucket"))
    assert not can_share_files(Path("run"), listed)
    assert can_share_files(Path("../run"), listed)


def test_without_such_a_list_files_are_shared(tmp_path):
    assert can_share_files(tmp_path, tmp_path / "missing")


def test_what_is_planned_is_what_the_place_can(tmp_path, memory_url, monkeypatch):
    assert files_for(tmp_path) == "array"
    assert files_for(memory_url) == "writer"
    monkeypatch.setattr("ckpt.stores.local.can_share_files", lambda folder: folder != tmp_path / "bucket")
    assert files_for(tmp_path / "bucket") == "writer"
    assert files_for(f"file://{tmp_path}/run") == "array"
    assert not open_store(tmp_path / "bucket").shares_files
