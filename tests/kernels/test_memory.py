"""Buffers: aligned, zero where promised, and never given to two tensors at once."""

import torch

from engine.kernels.memory import ALIGNMENT, Pool, allocate, zeros


def test_blocks_are_aligned_and_zero():
    for size in (1, 100, 1 << 20, (1 << 23) + 3):
        block = allocate(size)
        assert block.data_ptr() % ALIGNMENT == 0
        assert block.numel() == size
        assert not block.any()


def test_zeros_has_the_shape_and_dtype():
    x = zeros((3, 5), torch.bfloat16)
    assert (tuple(x.shape), x.dtype, x.is_contiguous()) == ((3, 5), torch.bfloat16, True)


def test_pool_uses_a_block_again_once_its_tensor_is_gone():
    pool = Pool()
    first = pool.take((1000,), torch.float32)
    address = first.data_ptr()
    del first
    assert pool.take((990,), torch.float32).data_ptr() == address


def test_pool_never_gives_one_block_to_two_tensors():
    pool = Pool()
    held = [pool.take((64,), torch.float32) for _ in range(5)]
    assert len({t.data_ptr() for t in held}) == 5


def test_a_view_keeps_its_block():
    pool = Pool()
    view = pool.take((4, 100), torch.float32)[1:2].view(10, 10)
    view.fill_(7.0)
    other = pool.take((4, 100), torch.float32)
    other.fill_(1.0)
    assert (view == 7.0).all()


def test_a_tensor_saved_for_backward_keeps_its_block():
    pool = Pool()
    x = torch.ones(100, requires_grad=True)
    saved = pool.take((100,), torch.float32).fill_(3.0)
    y = (x * saved).sum()
    del saved
    pool.take((100,), torch.float32).fill_(-1.0)
    y.backward()
    assert (x.grad == 3.0).all()


def test_clear_leaves_tensors_in_use_alone():
    pool = Pool()
    x = pool.take((100,), torch.float32).fill_(2.0)
    pool.clear()
    assert pool.nbytes == 0
    pool.take((100,), torch.float32).fill_(0.0)
    assert (x == 2.0).all()
