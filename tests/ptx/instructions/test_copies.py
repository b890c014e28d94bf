"""cp.async and bulk copies, on hand-written PTX: what they copy, when, and what breaks their rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ptx.instructions.tensor_map import TensorMap
from tests.ptx.programs import element, run
from tests.ptx.syntax import PTXError

_MODES = [
    {"schedule": schedule, "completion": completion}
    for schedule in ("in order", "random")
    for completion in ("early", "late")
]
modes = pytest.mark.parametrize("mode", _MODES, ids=lambda mode: "-".join(mode.values()))
_SHARED = ".extern .shared .align 128 .b8 memory[];"
_FIRST = "setp.eq.u32 %p1, %r0, 0;\n"  # %p1: the first thread


def _wait(address: str, parity: int = 0) -> str:
    return f"""{{ .reg .pred done; again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [{address}], {parity}; @!done bra.uni again; }}
    """


def _run(body: str, *arguments: Any, **options: Any) -> None:
    run(body, *arguments, shared=options.pop("shared", 4096), declared=_SHARED, **options)


# %r10: where this thread's 16 bytes are in shared memory; %rd1 its elements of the source, %rd2 of the result
_PLACES = element(0, 16, "%rd1") + element(1, 16, "%rd2") + "mov.b32 %r10, memory; mad.lo.s32 %r10, %r0, 16, %r10;\n"
_OUT = "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r10]; st.global.v4.b32 [%rd2], {%r20, %r21, %r22, %r23};\n"


@modes
def test_copies_of_threads_are_there_after_their_wait(mode: dict[str, Any]) -> None:
    source, result = torch.randn(64, 4), torch.zeros(64, 4)
    _run(f"""{_PLACES} cp.async.cg.shared.global [%r10], [%rd1], 16; cp.async.commit_group;
         cp.async.wait_group 0; {_OUT}""", source, result, **mode)  # fmt: skip
    assert torch.equal(result, source)


@modes
def test_what_a_copy_does_not_take_is_zero(mode: dict[str, Any]) -> None:
    source, result = torch.randn(64, 4), torch.ones(64, 4)
    _run(f"""{_PLACES} and.b32 %r11, %r0, 3; mul.lo.s32 %r11, %r11, 4;
         cp.async.cg.shared.global [%r10], [%rd1], 0x10, %r11; cp.async.wait_all; {_OUT}""",
         source, result, **mode)  # fmt: skip
    taken = torch.arange(4)[None] < torch.arange(64)[:, None] % 4
    assert torch.equal(result, torch.where(taken, source, 0.0))


@modes
def test_a_wait_leaves_the_last_groups_in_flight(mode: dict[str, Any]) -> None:
    """The first group is waited for and read; the second, to the same place, is found after its own wait."""
    source, result, second = torch.randn(64, 4), torch.zeros(64, 4), torch.zeros(64, 4)
    body = f"""{_PLACES} {element(2, 16, "%rd3")}
        cp.async.ca.shared.global [%r10], [%rd1], 16; cp.async.commit_group;
        cp.async.ca.shared.global [%r10+1024], [%rd1], 16; cp.async.commit_group;
        cp.async.wait_group 1; {_OUT}
        cp.async.wait_group 0; ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r10+1024];
        st.global.v4.b32 [%rd3], {{%r20, %r21, %r22, %r23}};"""
    _run(body, source, result, second, **mode)
    assert torch.equal(result, source)
    assert torch.equal(second, source)


@modes
@pytest.mark.parametrize("waits", ["", "cp.async.wait_group 1;"])
def test_reading_what_is_not_waited_for_is_an_error(mode: dict[str, Any], waits: str) -> None:
    body = f"{_PLACES} cp.async.ca.shared.global [%r10], [%rd1], 16; cp.async.commit_group; {waits} {_OUT}"
    with pytest.raises(PTXError, match="has not waited for that"):
        _run(body, torch.randn(64, 4), torch.zeros(64, 4), **mode)


@modes
def test_an_mbarrier_tells_of_copies_of_threads(mode: dict[str, Any]) -> None:
    """The second warp reads what the first has copied."""
    source, result = torch.randn(64, 4), torch.zeros(64, 4)
    body = f"""{_PLACES} {_FIRST} setp.lt.u32 %p2, %r0, 32; mov.b32 %r12, memory; add.s32 %r12, %r12, 2048;
        @%p1 mbarrier.init.shared::cta.b64 [%r12], 32;
        bar.sync 0;
        @%p2 cp.async.ca.shared.global [%r10], [%rd1], 16;
        @%p2 cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r12];
        @%p2 bra done;
        {_wait("%r12")}
        add.s32 %r10, %r10, -512; {_OUT}
        done:"""
    _run(body, source, result, **mode)
    assert torch.equal(result[32:], source[:32])


def _bulk(copy: str, *, expects: int = 1024, waits: str = _wait("%r12"), reads: str = _OUT) -> str:
    """The first thread makes an mbarrier at %r12 and copies; everybody waits and reads 16 bytes."""
    return f"""{_PLACES} {_FIRST} mov.b32 %r11, memory; add.s32 %r12, %r11, 2048; ld.param.u64 %rd5, [p0];
        @%p1 mbarrier.init.shared::cta.b64 [%r12], 1;
        bar.sync 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r12], {expects};
        @%p1 {copy}
        {waits} {reads}"""


_PLAIN = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%rd5], 1024, [%r12];"


@modes
def test_a_bulk_copy_completes_the_phase_that_expects_its_bytes(mode: dict[str, Any]) -> None:
    source, result = torch.randn(64, 4), torch.zeros(64, 4)
    _run(_bulk(_PLAIN), source, result, **mode)
    assert torch.equal(result, source)


@modes
def test_bytes_that_do_not_come_are_a_deadlock(mode: dict[str, Any]) -> None:
    with pytest.raises(PTXError, match="waits for 0 of 1 arrivals and 16 bytes"):
        _run(_bulk(_PLAIN, expects=1040), torch.randn(64, 4), torch.zeros(64, 4), **mode)


@modes
def test_reading_a_bulk_copy_without_the_mbarrier_is_an_error(mode: dict[str, Any]) -> None:
    with pytest.raises(PTXError, match="a bulk copy for the mbarrier at 2048 wrote, and has not waited"):
        _run(_bulk(_PLAIN, waits=""), torch.randn(64, 4), torch.zeros(64, 4), **mode)


def test_a_block_that_ends_before_its_bytes_have_come_is_an_error() -> None:
    with pytest.raises(PTXError, match="has ended before these bytes have come"):
        _run(_bulk(_PLAIN, waits="", reads=""), torch.randn(64, 4), torch.zeros(64, 4), completion="late")


@modes
@pytest.mark.parametrize("start", [(0, 0), (48, -3), (-8, 12)])
def test_a_tensor_copy_lies_under_its_swizzle_with_zeros_outside(mode: dict[str, Any], start: tuple[int, int]) -> None:
    """8 rows of 128 bytes; pieces of 16 bytes are exchanged by the row's number."""
    source, result = torch.randn(15, 128).bfloat16(), torch.zeros(64, 8, dtype=torch.bfloat16)
    tensor_map = TensorMap(source.data_ptr(), (100, 15), (2, 256), (64, 8), 2, 128, tensors=(source,))
    x, y = start
    copy = ("cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
            f"[%r11], [%rd5, {{%r13, {y}}}], [%r12];")  # fmt: skip
    body = _bulk(copy).replace(
        "ld.param.u64 %rd5, [p0];", f"mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5; mov.b32 %r13, {x};"
    )
    body = body.replace(element(0, 16, "%rd1"), "")
    _run(body, tensor_map, result, **mode)
    around = torch.zeros(215, 328, dtype=torch.bfloat16)
    around[100:115, 100:200] = source[:, :100]
    expected = around[100 + y : 108 + y, 100 + x : 164 + x].reshape(8, 8, 8)
    rows, pieces = torch.arange(8)[:, None], torch.arange(8)[None]
    assert torch.equal(result.reshape(8, 8, 8), expected[rows, pieces ^ rows])


# Each thread writes 16 bytes of shared memory, which the first then stores
_STORE = """ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1]; st.shared.v4.b32 [%r10], {%r20, %r21, %r22, %r23};
    mov.b32 %r11, memory; ld.param.u64 %rd5, [p1];
    FENCE bar.sync 0;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r11], 1024;
    cp.async.bulk.commit_group;
    WAIT bar.sync 0;
    AFTER
"""


def _stores(fence: str = "fence.proxy.async.shared::cta;", wait: str = "cp.async.bulk.wait_group.read 0;",
            after: str = "st.shared.b32 [%r10], 0;") -> str:  # fmt: skip
    return _PLACES + _FIRST + _STORE.replace("FENCE", fence).replace("WAIT", wait).replace("AFTER", after)


@modes
def test_a_bulk_store_has_read_its_source_after_its_wait(mode: dict[str, Any]) -> None:
    source, result = torch.randn(64, 4), torch.zeros(64, 4)
    _run(_stores(), source, result, **mode)
    assert torch.equal(result, source)


@modes
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fence": ""}, "without a fence.proxy.async"), ({"wait": ""}, "has not waited for warp 0, which reads there")],
)
def test_a_bulk_store_wants_a_fence_before_and_a_wait_after(
    mode: dict[str, Any], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(PTXError, match=message):
        _run(_stores(**changes), torch.randn(64, 4), torch.zeros(64, 4), **mode)


def test_fences_can_be_left_out_where_the_compiler_does() -> None:
    source, result = torch.randn(64, 4), torch.zeros(64, 4)
    _run(_stores(fence=""), source, result, strict=False)
    assert torch.equal(result, source)


def test_a_tensor_copy_to_global_memory_leaves_out_what_is_outside() -> None:
    source, result = torch.randn(64, 4), torch.zeros(10, 4)
    tensor_map = TensorMap(result.data_ptr(), (4, 10), (4, 16), (4, 64), 4, 16, tensors=(result,))
    body = _stores(after="").replace("ld.param.u64 %rd5, [p1];", "mov.b64 %rd5, p1; cvta.param.u64 %rd5, %rd5;")
    body = body.replace("bulk.global.shared::cta.bulk_group [%rd5], [%r11], 1024;",
                        "bulk.tensor.2d.global.shared::cta.bulk_group [%rd5, {0, 3}], [%r11];")  # fmt: skip
    body = body.replace(element(1, 16, "%rd2"), "")
    _run(body, source, tensor_map)
    assert torch.equal(result[3:], source[:7])
    assert not result[:3].any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r10], 24;", "16 has to divide"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r10], 8192;", "beyond shared memory"),
        ("cp.async.ca.shared.global [%r10+4092], [%rd1], 16;", "does not divide it"),
        ("cp.async.ca.shared.global [%r10], [%rd1], 8, 12;", "12 bytes are to be taken of 8"),
        ("cp.async.ca.shared.global [%r10], [%rd1], 12;", "4, 8 or 16"),
        ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {0, 0}], [%r10];", "parameter"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r10], 16;", "not modelled"),
    ],
)
def test_what_is_not_allowed_or_not_modelled_is_an_error(line: str, message: str) -> None:
    with pytest.raises(PTXError, match=message):
        _run(_PLACES + line, torch.randn(64, 4), torch.zeros(64, 4))
