"""What attention is measured beside computes the same, in its own layout. The timing itself needs no test."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention_cases import attention_cases, exact_backends, sdpa, serving, under_each
from benchmarks.case import Case
from benchmarks.flash_attention import FlashAttention, flash_attentions
from benchmarks.workloads import MODELS
from engine.kernels.attention import OP

OPS = ["attention prefill", "attention backward", "attention forward + backward", "attention decode"]


def as_flash_attn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Takes and gives [S, T, H, Dh], as flash-attn does."""
    assert options.keys() <= {"causal", "cache_seqlens"} and options["causal"]
    whole = "cache_seqlens" in options
    if whole:
        assert options["cache_seqlens"].tolist() == [k.shape[1]] * k.shape[0]
        assert options["cache_seqlens"].dtype == torch.int32
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), causal=not whole).transpose(1, 2)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    peer = FlashAttention("peer", as_flash_attn, as_flash_attn)
    both = FlashAttention("with lse", lambda *x, **o: (as_flash_attn(*x, **o), None), as_flash_attn)
    made = attention_cases(MODELS["tiny"], torch.float32, [24], (3, 20, 16), peers=[peer, both])
    return {case.op: case for case in made}


def listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", ["peer", "with lse"])
@pytest.mark.parametrize("op", OPS)
def test_flash_attn_is_handed_what_sdpa_is_in_its_own_layout(cases: dict[str, Case], op: str, name: str) -> None:
    assert cases[op].torch is not None
    for _ in range(2):  # as often as it is timed
        theirs, torchs = listed(cases[op].peers[name]()), listed(cases[op].torch())  # type: ignore[misc]
        assert len(theirs) == len(torchs) == (3 if "backward" in op else 1)
        for a, b in zip(theirs, torchs, strict=True):
            torch.testing.assert_close(a.transpose(1, 2), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_ours_can_be_called_again_and_again(cases: dict[str, Case], op: str) -> None:
    first, again = (listed(cases[op].ours()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)


def test_backward_counts_five_products_where_forward_counts_two(cases: dict[str, Case]) -> None:
    forward, backward, both = (cases[op].work for op in OPS[:3])
    # 24 rows see 300 keys; 4 heads of 16 columns, two products, two operations each
    assert forward == 2 * 2 * 300 * 4 * 16
    assert (backward, both) == (2.5 * forward, 3 * forward)


def test_every_backend_of_torch_that_runs_gives_the_same() -> None:
    heads = [torch.randn(2, count, 8, 16) for count in (4, 2, 2)]

    def make(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return lambda: sdpa(q, k, v, causal=True)

    found = under_each(make, heads)
    assert any(name.startswith("math") for name in found)
    assert not any(name.startswith("cudnn") for name in found), "there is none on a CPU"
    for run in found.values():
        torch.testing.assert_close(run(), sdpa(*heads, causal=True))


def test_backends_asked_for_are_those_that_can_run() -> None:
    serves = OP.chosen(torch.float32, "cpu").name
    assert serving(OP, torch.float32, "cpu") == [serves]
    assert serving(OP, torch.float32, "cpu", ["cuda"]) == [serves]
    assert serving(OP, torch.float32, "cpu", exact_backends())[0] == serves
    assert "torch" not in exact_backends() and "cuda" in exact_backends()


def test_flash_attn_that_is_not_there_is_said_in_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.flash_attention.find_spec", lambda name: None)
    assert flash_attentions(torch.bfloat16) == ([], ["flash-attn 2 is not installed", "flash-attn 3 is not installed"])


def test_flash_attn_is_found_by_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    good, broken = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    good.__version__, good.flash_attn_func, good.flash_attn_with_kvcache = "2.8", as_flash_attn, as_flash_attn  # type: ignore[attr-defined]
    monkeypatch.setattr("benchmarks.flash_attention.find_spec", lambda name: name)
    for module in (good, broken):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found, notes = flash_attentions(torch.bfloat16)
    assert [each.name for each in found] == ["flash-attn 2 2.8"]
    assert len(notes) == 1 and notes[0].startswith("flash-attn 3 cannot be imported")
    assert flash_attentions(torch.float32) == ([], ["flash-attn 2 has no float32", "flash-attn 3 has no float32"])
