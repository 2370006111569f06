"""Control groups of both versions, mount tables and listeners, from what the kernel writes."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from quire_operators.host import (
    ControlGroups,
    address_problem,
    file_system,
    file_system_in,
    listener,
    lock_holder,
    physical_cores,
)

MOUNTS = r"""
/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/export /mnt/share nfs4 rw 0 0
server:/blank /mnt/with\040blank cifs rw 0 0
/dev/vdb /mnt/share/local ext4 rw 0 0
first /mnt/twice ext4 rw 0 0
second /mnt/twice 9p rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/tmp/x/y", "tmpfs"),
        ("/mnt/share/state", "nfs4"),
        ("/mnt/shared", "ext4"),
        ("/mnt/share/local/state", "ext4"),
        ("/mnt/with blank/state", "cifs"),
        ("/mnt/twice", "9p"),
    ],
)
def test_the_innermost_mount_counts_and_the_last_of_equals(folder: str, kind: str) -> None:
    assert file_system_in(MOUNTS, Path(folder)) == kind


def test_a_folder_that_is_not_there_yet_is_where_it_would_be_made(tmp_path: Path) -> None:
    assert file_system(tmp_path / "a" / "b") == file_system(tmp_path) != ""


def group(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text + "\n")


def test_room_is_what_the_tightest_group_leaves_and_what_the_kernel_would_give_up(tmp_path: Path) -> None:
    stat = "anon 700\nactive_file 30\ninactive_file 60\nshmem 5"
    group(tmp_path, "a", memory__max="1000", memory__current="900", memory__stat=stat)
    group(tmp_path, "a/b", memory__max="max", memory__current="500", memory__stat=stat)
    two = ControlGroups(tmp_path, "0::/a/b\n")
    assert (two.memory_room(closely=False), two.memory_room(closely=True)) == (100, 190)
    old = "cache 90\ntotal_active_file 1\ntotal_inactive_file 2\ninactive_file 50"
    group(tmp_path, "memory/c", memory__limit_in_bytes="50", memory__usage_in_bytes="40", memory__stat=old)
    one = ControlGroups(tmp_path, "4:memory:/c\n")
    assert (one.memory_room(closely=False), one.memory_room(closely=True)) == (10, 13)
    assert ControlGroups(tmp_path, "0::/none\n").memory_room(closely=True) is None


def test_siblings_are_one_core(tmp_path: Path) -> None:
    for number, siblings in ((0, "0,4"), (4, "0,4"), (1, "1,5"), (5, "1,5"), (2, "2,6")):
        group(tmp_path, f"cpu{number}/topology", thread_siblings_list=siblings)
    assert physical_cores({0, 1, 2, 4, 5}, tmp_path) == 3
    assert physical_cores({0, 4}, tmp_path) == 1
    assert physical_cores({7, 8}, tmp_path) == 2, "the kernel says nothing of them"
    mine = physical_cores(os.sched_getaffinity(0))
    assert 1 <= mine <= len(os.sched_getaffinity(0))


def test_limits_of_version_2_and_of_every_group_above(tmp_path: Path) -> None:
    group(tmp_path, "outer/inner", cpu__max="max 100000", memory__max="max", memory__current="5")
    group(tmp_path, "outer", cpu__max="150000 100000", memory__max="1000", memory__current="400")
    groups = ControlGroups(tmp_path, "0::/outer/inner\n")
    assert groups.cores() == 1.5
    assert groups.memory() == (1000, 400)
    group(tmp_path, "outer/inner", cpu__max="50000 100000", memory__max="700", memory__current="300")
    assert groups.cores() == 0.5
    assert groups.memory() == (700, 300)


def test_limits_of_version_1(tmp_path: Path) -> None:
    membership = "4:memory:/a/b\n3:cpu,cpuacct:/\n0::/\n"
    group(tmp_path, "memory/a/b", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="7")
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    groups = ControlGroups(tmp_path, membership)
    assert (groups.cores(), groups.memory()) == (None, None)
    group(tmp_path, "cpu", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    group(tmp_path, "memory/a", memory__limit_in_bytes="4096", memory__usage_in_bytes="96")
    assert (groups.cores(), groups.memory()) == (2.0, (4096, 96))


def test_no_control_groups_are_no_limits(tmp_path: Path) -> None:
    groups = ControlGroups(tmp_path, "")
    assert (groups.cores(), groups.memory()) == (None, None)


def test_who_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = listener("127.0.0.1", port)
        assert found is not None
        assert found.pid == os.getpid()
        assert f"in use by another program (process {os.getpid()}, " in (address_problem("127.0.0.1", port) or "")
    assert listener("127.0.0.1", port) is None
    assert address_problem("127.0.0.1", port) is None
    assert "cannot listen on 192.0.2.1" in (address_problem("192.0.2.1", 0) or "")


def test_the_holder_of_a_lock_is_found_in_the_kernels_table(tmp_path: Path) -> None:
    lock = tmp_path / "daemon.lock"
    assert lock_holder(lock) is None
    with lock.open("w") as file:
        assert lock_holder(lock) is None
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(lock) == os.getpid()
