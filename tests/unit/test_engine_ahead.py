"""Items fetched ahead come in order, the first as soon as it is there, and nothing is left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rayprune.engine.data.transport import ahead


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_all_items_come_in_order(depth: int) -> None:
    assert list(ahead(iter(range(9)), depth, "test")) == list(range(9))
    assert list(ahead(iter(()), depth, "test")) == []


def test_the_first_item_waits_for_no_other_and_the_next_is_fetched_meanwhile() -> None:
    held, fetched = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        fetched.set()
        assert held.wait(20)
        yield 1

    got = ahead(items(), 2, "test")
    assert next(got) == 0
    assert fetched.wait(20), "nobody fetches while the first item is used"
    held.set()
    assert list(got) == [1]


def test_an_error_comes_in_its_items_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("the disk is gone")

    got = ahead(items(), 4, "test")
    assert [next(got), next(got)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(got)


def test_who_stops_early_leaves_no_thread_and_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    got = ahead(items(), 2, "test-early")
    assert next(got) == 0
    got.close()  # type: ignore[attr-defined]  # a generator
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-early")]


def test_items_that_may_never_come_are_not_waited_for() -> None:
    held = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        held.wait(20)

    got = ahead(items(), 2, "test-stuck", join=False)
    assert next(got) == 0
    got.close()  # type: ignore[attr-defined]
    (stuck,) = (thread for thread in threading.enumerate() if thread.name.startswith("test-stuck"))
    held.set()
    stuck.join(20)
    assert not stuck.is_alive(), "it ends when the item has come after all"
