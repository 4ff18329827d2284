"""Host files, --include and --exclude, device numbers, core lists."""

from __future__ import annotations

import pytest

from tritonspeed.cli.hosts import (
    limit,
    parse_core_list,
    parse_hostfile,
    parse_node_list,
    select_slots,
    split_cores,
    visible_devices,
)

HOSTS = {"a": (0, 1, 2, 3), "b": (0, 1), "c": (0,)}


def test_hostfile_keeps_order_and_skips_comments() -> None:
    text = "# cluster\n\nworker-1 slots=2  # the small one\n  worker-0   slots = 4\n#worker-2 slots=1\n"
    hosts = parse_hostfile(text)
    assert list(hosts.items()) == [("worker-1", (0, 1)), ("worker-0", (0, 1, 2, 3))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\nb slots=1\na slots=4", "hosts.txt:3: host 'a' stands here twice"),
        ("a slots=two", "hosts.txt:1: 'a slots=two' is not of the form"),
        ("a", "is not of the form"),
        ("a slots=2 max=4", "is not of the form"),
        ("a slots=0", "slots=0"),
        ("# nothing\n", "names no host"),
    ],
)
def test_hostfile_mistakes(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_hostfile(text, "hosts.txt")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", HOSTS),
        ("b", "", {"b": (0, 1)}),
        ("c@a:3,1", "", {"a": (1, 3), "c": (0,)}),
        ("", "a", {"b": (0, 1), "c": (0,)}),
        ("", "a:0,1@c", {"a": (2, 3), "b": (0, 1)}),
        ("", "b:0,1", {"a": (0, 1, 2, 3), "c": (0,)}),
    ],
)
def test_select_slots(include: str, exclude: str, expected: dict[str, tuple[int, ...]]) -> None:
    chosen = select_slots(HOSTS, include, exclude)
    assert list(chosen.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("a", "b", "both given"),
        ("d", "", "no host 'd'; the hosts are a, b, c"),
        ("b:2", "", "host 'b' has no slot 2; its slots are 0,1"),
        ("", "b:0,5", "no slot 5"),
        ("", "a@b@c", "leaves no slot"),
        ("a:", "", "not of the form"),
        ("a:x", "", "not of the form"),
        ("a@@b", "", "not of the form"),
        ("a:0@a:1", "", "names host 'a' twice"),
        ("a:1,1", "", "names a slot of 'a' twice"),
    ],
)
def test_select_mistakes(include: str, exclude: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_slots(HOSTS, include, exclude)


def test_node_list_tells_whole_hosts_from_slots() -> None:
    assert parse_node_list("a@b:0,2", "--include") == {"a": None, "b": (0, 2)}


def test_limit() -> None:
    assert limit(HOSTS, 2, 1) == {"a": (0,), "b": (0,)}
    assert limit(HOSTS, None, None) == HOSTS
    with pytest.raises(ValueError, match="--num_nodes 4, but there are 3 hosts"):
        limit(HOSTS, 4, None)
    with pytest.raises(ValueError, match="--num_gpus 2, but host 'c' has 1 slots"):
        limit(HOSTS, None, 2)


def test_visible_devices_never_shows_what_was_hidden() -> None:
    assert visible_devices((0, 2), None) == "0,2"
    assert visible_devices((4, 5), "7,5, 4") == "4,5"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=4,5 hides 0"):
        visible_devices((0, 4), "4,5")
    with pytest.raises(ValueError, match="by identifier"):
        visible_devices((0,), "GPU-8a1b,GPU-9c2d")


def test_core_lists() -> None:
    assert parse_core_list("0-3,8, 10-10") == (0, 1, 2, 3, 8, 10)
    for text in ("3-1", "a", "", "1,,2", "-1"):
        with pytest.raises(ValueError, match="neither a core nor a range"):
            parse_core_list(text)
    with pytest.raises(ValueError, match="a core twice"):
        parse_core_list("0-3,2")


def test_split_cores_gives_equal_parts() -> None:
    cores = (0, 1, 2, 3, 8)
    assert [split_cores(cores, rank, 2) for rank in range(2)] == [(0, 1), (2, 3)]
    with pytest.raises(ValueError, match="6 ranks"):
        split_cores(cores, 0, 6)
