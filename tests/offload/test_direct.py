"""Direct requests: what is read is what was written, and each way to fail says what, where and what to do."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonspeed.offload import direct
from tritonspeed.offload.direct import DirectFile, DiskError, Pool, Traffic
from tritonspeed.offload.memory import PAGE_BYTES, host_empty
from tritonspeed.offload.options import Requests
from tritonspeed.offload.page_file import whole_pages

SMALL = Requests(block_bytes=2 * PAGE_BYTES, depth=3, threads=2)


@pytest.fixture
def pool():
    pool = Pool(SMALL)
    yield pool
    pool.close()


@pytest.fixture(params=("direct", "refused when opened", "refused when used", "memory"))
def folder(request, tmp_path, monkeypatch):
    """A folder on a disk, on file systems that refuse O_DIRECT sooner or later, and in memory."""
    monkeypatch.setattr(direct, "_said_buffered", False)
    really_open, really = os.open, {"preadv": os.preadv, "pwritev": os.pwritev}

    def refuse_open(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, *args, **kwargs)

    def refuse(name):
        def call(descriptor, buffers, offset):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return really[name](descriptor, buffers, offset)

        return call

    if request.param == "refused when opened":
        monkeypatch.setattr(os, "open", refuse_open)
    elif request.param == "refused when used":
        for name in really:
            monkeypatch.setattr(os, name, refuse(name))
    elif request.param == "memory":
        if not Path("/dev/shm").is_dir():
            pytest.skip("no tmpfs here")
        place = Path("/dev/shm") / f"tritonspeed-test-{os.getpid()}"
        place.mkdir()
        yield place
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
        return
    yield tmp_path


def opened(folder: Path, pool: Pool, num_bytes: int) -> DirectFile:
    path = folder / "file"
    path.write_bytes(bytes(PAGE_BYTES + whole_pages(num_bytes)))
    return DirectFile(path, pool, PAGE_BYTES, num_bytes)


def noise(num_bytes: int) -> torch.Tensor:
    return host_empty(num_bytes, torch.uint8).random_(0, 256)


@pytest.mark.parametrize("num_bytes", (0, 1, 512, 4096, 4097, 3 * 8192, 100_001))
def test_a_round_trip(folder, pool, num_bytes):
    file, values = opened(folder, pool, num_bytes), noise(num_bytes)
    file.write(0, values).wait()
    file.sync().wait()
    into = noise(num_bytes)
    file.read(0, into).wait()
    assert torch.equal(into, values)
    content = (folder / "file").read_bytes()
    assert content[:PAGE_BYTES] == bytes(PAGE_BYTES), "what is before the contents was written to"
    assert content[PAGE_BYTES : PAGE_BYTES + num_bytes] == values.numpy().tobytes()
    assert not any(content[PAGE_BYTES + num_bytes :]), "behind the contents there are zeros"
    file.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pages_in_any_order(tmp_path_factory, data):
    num_bytes = data.draw(st.integers(0, 40_000))
    pool = Pool(SMALL)
    file, wanted = opened(tmp_path_factory.mktemp("any"), pool, num_bytes), torch.zeros(num_bytes, dtype=torch.uint8)
    starts = st.integers(0, num_bytes // PAGE_BYTES).map(lambda page: page * PAGE_BYTES)
    for _ in range(data.draw(st.integers(1, 5))):
        lo = data.draw(starts)
        hi = data.draw(st.sampled_from([num_bytes, *range(lo, num_bytes, PAGE_BYTES)]))
        values = noise(hi - lo)
        wanted[lo:hi] = values
        file.write(lo, values).wait()
        lo = data.draw(starts)
        into = noise(data.draw(st.integers(0, num_bytes - lo)))
        file.read(lo, into).wait()
        assert torch.equal(into, wanted[lo : lo + into.numel()])
    pool.close()
    file.close()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_tensors_travel_without_a_copy(pool, tmp_path, dtype):
    file = opened(tmp_path, pool, 2 * PAGE_BYTES)
    values = host_empty(2 * PAGE_BYTES // dtype.itemsize, dtype).copy_(torch.randn(2 * PAGE_BYTES // dtype.itemsize))
    file.write(0, values).wait()
    assert direct.bytes_of(values).obj.ctypes.data == values.data_ptr()
    assert torch.equal(torch.from_file(str(tmp_path / "file"), False, 3 * PAGE_BYTES, dtype=torch.uint8)[PAGE_BYTES:],
                       values.view(torch.uint8))  # fmt: skip


def test_a_refusal_is_said_once(tmp_path, pool, monkeypatch, caplog):
    monkeypatch.setattr(direct, "_said_buffered", False)
    monkeypatch.setattr(direct, "_O_DIRECT", 0)
    with caplog.at_level(logging.WARNING, "tritonspeed"):
        files = [opened(tmp_path, pool, 5000) for _ in range(3)]
    assert not any(file.is_direct for file in files)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path) in caplog.text and "page cache" in caplog.text


def test_what_is_not_on_a_page_is_our_mistake(tmp_path, pool):
    file, values = opened(tmp_path, pool, 5 * PAGE_BYTES), noise(2 * PAGE_BYTES)
    for offset, tensor in ((1, values), (0, values[1:]), (0, values[:-1]), (4 * PAGE_BYTES, values), (0, values[::2])):
        with pytest.raises(AssertionError, match=str(tmp_path)):
            file.write(offset, tensor)


def failing(monkeypatch, name: str, number: int, after: int = 0) -> None:
    """``os.<name>`` fails with an error number, after it has worked ``after`` times."""
    really, calls = getattr(os, name), []

    def call(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return really(*args)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        (
            "pwritev",
            errno.ENOSPC,
            r"write of 8,192 bytes at 12288 failed: No space.*[\d,]+ bytes are free.*nvme_path",
        ),
        ("pwritev", errno.EDQUOT, "quota"),
        ("pwritev", errno.EROFS, "read-only.*dmesg"),
        ("pwritev", errno.EIO, "smartctl"),
        ("preadv", errno.EIO, "read of 8,192 bytes at 12288 failed.*smartctl"),
        ("preadv", errno.ESTALE, "read of .*dmesg"),
        ("fdatasync", errno.EIO, "sync of .*smartctl"),
    ],
)
def test_an_error_names_file_place_and_remedy(tmp_path, monkeypatch, name, number, says):
    pool = Pool(Requests(block_bytes=8192, depth=1, threads=1))
    file, buffer = opened(tmp_path, pool, 5 * 8192), noise(5 * 8192)
    failing(monkeypatch, name, number, after=0 if name == "fdatasync" else 1)
    start = {"pwritev": lambda: file.write(0, buffer), "preadv": lambda: file.read(0, buffer), "fdatasync": file.sync}
    handle = start[name]()
    for _ in range(2):  # it is not forgotten when it was said
        with pytest.raises(DiskError, match=says) as raised:
            handle.wait()
        assert raised.value.errno == number and raised.value.filename == str(tmp_path / "file")
    pool.close()


def test_the_first_of_several_errors_is_raised_when_all_have_ended(tmp_path, pool, monkeypatch):
    file, values, running = opened(tmp_path, pool, 6 * 8192), noise(6 * 8192), []
    really = os.pwritev

    def call(descriptor, buffers, offset):
        if offset == PAGE_BYTES:
            raise OSError(errno.EIO, "first")
        running.append(offset)
        time.sleep(0.02)
        running.remove(offset)
        return really(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", call)
    with pytest.raises(DiskError, match="first"):
        file.write(0, values).wait()
    assert not running, "the buffer is still being read from"


def test_requests_that_are_carried_out_in_parts_are_finished(tmp_path, pool, monkeypatch):
    really = {"preadv": os.preadv, "pwritev": os.pwritev}
    for name, largest in (("pwritev", 4096), ("preadv", 1000)):  # the second leaves the page: buffered from there on
        monkeypatch.setattr(os, name, lambda d, b, o, name=name, n=largest: really[name](d, [b[0][:n]], o))
    file, values = opened(tmp_path, pool, 30_000), noise(30_000)
    file.write(0, values).wait()
    assert file.is_direct
    into = noise(30_000)
    file.read(0, into).wait()
    assert torch.equal(into, values) and not file.is_direct


def test_a_file_that_was_cut_off(folder, pool):
    file = opened(folder, pool, 10 * 8192)
    os.truncate(folder / "file", 3 * 8192)
    with pytest.raises(DiskError, match="cut off at 24576 bytes"):
        file.read(0, noise(10 * 8192)).wait()
    with pytest.raises(DiskError, match="cut off at 24576 of 86016"):
        file.sync().wait()
    file.close()


def test_a_file_that_has_vanished(folder, pool):
    file = opened(folder, pool, 8192)
    (folder / "file").unlink()
    file.write(0, noise(8192)).wait()
    with pytest.raises(DiskError, match="was deleted while in use") as raised:
        file.sync().wait()
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        DirectFile(folder / "file", pool, PAGE_BYTES, 8192)
    file.close()


def test_more_files_than_the_soft_limit(tmp_path, monkeypatch):
    really, limits = os.open, []

    def full(path, flags, *args):
        if not limits:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really(path, flags, *args)

    pool = Pool(SMALL)
    monkeypatch.setattr(direct.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(direct.resource, "setrlimit", lambda which, limit: limits.append(limit))
    monkeypatch.setattr(os, "open", full)
    opened(tmp_path, pool, 10).close()
    assert limits == [(4096, 4096)]
    limits.clear()
    monkeypatch.setattr(direct.resource, "getrlimit", lambda which: (1024, 1024))
    with pytest.raises(DiskError, match=r"1024 files are open, the limit: raise it \(ulimit -n\)"):
        opened(tmp_path, pool, 10)
    pool.close()


def test_traffic_counts_bytes_and_the_seconds_in_which_something_moved(tmp_path, pool):
    file = opened(tmp_path, pool, 8 * 8192 + 5)
    file.write(0, noise(8 * 8192 + 5)).wait()
    file.read(0, noise(3 * 8192)).wait()
    traffic = pool.traffic
    assert (traffic.written_bytes, traffic.read_bytes) == (8 * 8192 + PAGE_BYTES, 3 * 8192)
    assert traffic.write_seconds > 0 and traffic.read_seconds > 0


def test_what_overlaps_in_time_is_counted_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(direct.time, "perf_counter", lambda: now[0])
    traffic = Traffic()
    with traffic.busy("read", 10):
        now[0] = 1.0
        with traffic.busy("read", 20), traffic.busy("write", 5):
            now[0] = 3.0
        now[0] = 4.0
    now[0] = 9.0
    with pytest.raises(KeyError), traffic.busy("read", 100):
        now[0] = 10.0
        raise KeyError
    assert (traffic.read_bytes, traffic.read_seconds) == (30, 5.0)
    assert (traffic.written_bytes, traffic.write_seconds) == (5, 2.0)


def test_so_many_requests_are_under_way_at_once(tmp_path, monkeypatch):
    pool, most, now, lock = Pool(Requests(block_bytes=4096, depth=5, threads=1)), 0, 0, threading.Lock()
    together = threading.Barrier(5, timeout=20)  # passes only if all five are here at the same time
    really = os.preadv

    def call(descriptor, buffers, offset):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        with lock:
            now -= 1
        return really(descriptor, buffers, offset)

    file = opened(tmp_path, pool, 10 * 4096)
    monkeypatch.setattr(os, "preadv", call)
    file.read(0, noise(10 * 4096)).wait()
    assert most == 5
    pool.close()
