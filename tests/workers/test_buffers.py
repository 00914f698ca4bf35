"""Memory for what comes in: lent again when, and only when, nobody can see it any more."""

from __future__ import annotations

import ctypes
import resource
import threading

import pytest
import torch
from torch import Tensor

from decentral.workers.buffers import GRAIN, Buffers, prepare_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    assert prepare_memory()
    size = 2 << 20
    b"x" * size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        assert len(b"x" * size) == size
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < size // resource.getpagesize()  # fewer than one fresh one has, of twenty


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("nbytes", [0, 1, GRAIN - 1, GRAIN, GRAIN + 1, 10 * GRAIN + 3])
def test_a_lent_tensor_is_an_ordinary_one(nbytes: int) -> None:
    lent = Buffers(100 * GRAIN).lend(nbytes)
    assert (lent.dtype, lent.shape, lent.is_contiguous()) == (torch.uint8, (nbytes,), True)
    lent.fill_(7)
    assert lent.sum() == 7 * nbytes


def test_steady_rounds_allocate_nothing() -> None:
    buffers = Buffers(100 * GRAIN)
    sizes = [5 * GRAIN, 5 * GRAIN - 1, 3 * GRAIN]  # chunks of a vector differ by an element
    first = {place(tensor) for tensor in [buffers.lend(nbytes) for nbytes in sizes]}
    for _ in range(10):
        assert {place(tensor) for tensor in [buffers.lend(nbytes) for nbytes in sizes]} == first


def test_memory_is_not_lent_while_a_view_of_it_lives() -> None:
    buffers = Buffers(100 * GRAIN)
    lent = buffers.lend(GRAIN)
    lent.fill_(1)
    view = lent.view(torch.float32)[10:20].detach()
    at = place(lent)
    del lent
    other = buffers.lend(GRAIN)
    assert place(other) != at
    other.fill_(2)
    assert bool((view.view(torch.uint8) == 1).all())
    del view
    assert place(buffers.lend(GRAIN)) == at


def test_what_waits_to_be_lent_is_bounded() -> None:
    buffers = Buffers(10 * GRAIN)
    lent = [buffers.lend(4 * GRAIN) for _ in range(5)]
    assert buffers.free_bytes == 0
    del lent
    assert buffers.free_bytes == 8 * GRAIN


def test_loans_may_end_in_any_thread() -> None:
    buffers = Buffers(1000 * GRAIN)

    def use(tensors: list[Tensor]) -> None:
        while tensors:
            tensors.pop().fill_(3)

    for _ in range(20):
        shares = [[buffers.lend(GRAIN) for _ in range(10)] for _ in range(4)]
        threads = [threading.Thread(target=use, args=(share,)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert buffers.free_bytes == 40 * GRAIN
