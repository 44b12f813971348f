"""Without these, a backward pass could wait for an exchange that nobody will ever finish."""

import threading
import time

import pytest
import torch

from cyclebnn_dist.comm.executor import ThreadExecutor

PATIENCE_SECONDS = 20


@pytest.fixture
def executor():
    executor = ThreadExecutor("test")
    yield executor
    executor.close()


def outcome(future):
    """The value of a future, or the text of its error; None where neither comes."""
    box = []

    def wait():
        try:
            box.append(future.wait())
        except RuntimeError as error:
            box.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return box[0] if box else None


def test_no_exchanges_are_done_at_once(executor):
    flat = torch.empty(0)
    assert outcome(executor.submit([], flat)) is flat


def test_what_comes_after_the_end_fails_and_the_end_may_come_twice(executor):
    executor.close()
    executor.close()
    ran = []
    assert "after the reducer was closed" in outcome(executor.submit([lambda: ran.append(1)], torch.empty(1)))
    assert not ran


def test_what_hangs_on_a_future_may_wait_for_another_exchange(executor):
    flat = torch.zeros(2)

    def more(future):
        future.value()[0] += 1
        return executor.submit([lambda: flat[1:].add_(2)], flat).wait()

    assert outcome(executor.submit([lambda: flat.add_(1)], flat).then(more)) is flat
    assert flat.tolist() == [2, 3]


def test_an_error_reaches_what_is_under_way_and_what_is_to_come(executor):
    begun, peer_is_gone = threading.Event(), threading.Event()

    def wait_for_a_peer():
        with executor.waiting():
            begun.set()
            assert peer_is_gone.wait(PATIENCE_SECONDS)

    def fail():
        raise RuntimeError("no peer")

    under_way = executor.submit([wait_for_a_peer], torch.empty(1))
    assert begun.wait(PATIENCE_SECONDS)
    failing = executor.submit([lambda: None, fail, lambda: None], torch.empty(1))
    assert "no peer" in outcome(failing)
    assert "no peer" in outcome(under_way)
    peer_is_gone.set()
    executor.drain()
    assert "no peer" in outcome(executor.submit([lambda: None], torch.empty(1)))
    assert str(executor.error) == "no peer"


def test_draining_waits_for_all_parts_of_what_was_submitted(executor):
    may_end, ended = threading.Event(), []

    def exchange():
        with executor.waiting():
            assert may_end.wait(PATIENCE_SECONDS)
        ended.append(1)

    executor.submit([exchange] * 20, torch.empty(1))
    threading.Timer(0.1, may_end.set).start()
    executor.drain()
    assert len(ended) == 20


def test_one_exchange_works_at_a_time(executor):
    at_work, most = [0], [0]

    def exchange():
        for _ in range(3):
            at_work[0] += 1
            time.sleep(0.001)  # others could run now
            most[0] = max(most[0], at_work[0])
            at_work[0] -= 1
            with executor.waiting():
                time.sleep(0.001)

    outcome(executor.submit([exchange] * 12, torch.empty(1)))
    assert most == [1], "counters, residuals and scratch memory would be written by several at once"
