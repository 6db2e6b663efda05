"""Memory of operators: tensors beside each other, kept for the next call, given back when told to."""

from __future__ import annotations

import threading

import torch

from waybill.parallel.cpu_ops.scratch import ALIGNMENT, Scratch


def test_tensors_have_their_shapes_and_lie_beside_each_other() -> None:
    first, none, last = Scratch().tensors(((3, 5), torch.bfloat16), ((0, 7), torch.float32), ((2, 2), torch.float32))
    assert (first.shape, none.shape, last.shape) == ((3, 5), (0, 7), (2, 2))
    first.fill_(1)
    last.fill_(2)
    assert first.eq(1).all() and last.eq(2).all()
    assert first.data_ptr() % ALIGNMENT == last.data_ptr() % ALIGNMENT == 0


def test_a_smaller_call_has_the_same_memory_and_a_larger_one_more() -> None:
    scratch = Scratch()
    (large,) = scratch.tensors(((100,), torch.float32))
    (small,) = scratch.tensors(((10,), torch.bfloat16))
    assert small.data_ptr() == large.data_ptr() and small.untyped_storage().nbytes() == large.untyped_storage().nbytes()
    (larger,) = scratch.tensors(((1000,), torch.float32))
    assert larger.untyped_storage().nbytes() > large.untyped_storage().nbytes()


def test_release_gives_the_memory_back() -> None:
    scratch = Scratch()
    scratch.tensors(((1000,), torch.float32))
    scratch.release()
    (small,) = scratch.tensors(((4,), torch.float32))
    assert small.untyped_storage().nbytes() == ALIGNMENT


def test_threads_have_memory_of_their_own() -> None:
    scratch, found = Scratch(), []
    (own,) = scratch.tensors(((16,), torch.float32))
    thread = threading.Thread(target=lambda: found.append(scratch.tensors(((16,), torch.float32))[0]))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != own.data_ptr()
