"""A replica's log is bounded and readable from its end."""

import asyncio
from pathlib import Path

import pytest

from fleetmind.node.logs import ReplicaLog, read_tail


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_a_flood_stays_below_the_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    log = ReplicaLog(tmp_path / "r.log", 10_000)
    for at in range(5000):
        log.write(f"line {at}\n".encode())
        assert size(tmp_path) <= 10_000
    tail = read_tail(tmp_path / "r.log", 300)
    assert tail == [f"line {at}" for at in range(4700, 5000)]
    assert size(tmp_path) >= 5_000


def test_one_piece_larger_than_the_bound_is_cut(tmp_path: Path) -> None:
    ReplicaLog(tmp_path / "r.log", 1000).write(b"x" * 5000 + b"end\n")
    assert size(tmp_path) <= 1000
    assert read_tail(tmp_path / "r.log", 1)[0].endswith("xend")


def test_a_log_is_continued_after_a_restart(tmp_path: Path) -> None:
    ReplicaLog(tmp_path / "r.log", 1000).write(b"a" * 400 + b"\n")
    ReplicaLog(tmp_path / "r.log", 1000).write(b"b" * 400 + b"\n")
    assert size(tmp_path) <= 1000
    assert [line[0] for line in read_tail(tmp_path / "r.log", 10)] == ["a", "b"]


@pytest.mark.parametrize("lines", [0, -1])
def test_no_lines_asked_for_are_none(tmp_path: Path, lines: int) -> None:
    ReplicaLog(tmp_path / "r.log", 1000).write(b"a\nb\n")
    assert read_tail(tmp_path / "r.log", lines) == []


def test_bytes_that_are_no_text_are_shown_somehow(tmp_path: Path) -> None:
    ReplicaLog(tmp_path / "r.log", 1000).write(b"ok\n\xff\xfe\n")
    assert read_tail(tmp_path / "r.log", 2)[0] == "ok"
    assert len(read_tail(tmp_path / "r.log", 9)) == 2


def test_a_disk_that_refuses_does_not_stop_the_engine(tmp_path: Path) -> None:
    (tmp_path / "r.log").mkdir()  # nothing can be written there
    log = ReplicaLog(tmp_path / "r.log", 1000)
    log.write(b"lost\n")
    assert log.bytes_written == 5


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "r.log").symlink_to(victim)
    ReplicaLog(tmp_path / "r.log", 1000).write(b"x")
    assert victim.read_text() == "untouched"


async def test_the_pump_writes_until_the_end(tmp_path: Path) -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"one\ntwo\n")
    stream.feed_eof()
    await ReplicaLog(tmp_path / "r.log", 1000).pump(stream)
    assert read_tail(tmp_path / "r.log", 5) == ["one", "two"]
    assert (tmp_path / "r.log").stat().st_mode & 0o777 == 0o600
