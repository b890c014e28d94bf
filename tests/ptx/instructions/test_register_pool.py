"""setmaxnreg: registers that warps give to their block's pool and take from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ptx.machine import Machine
from tests.ptx.parse import parse
from tests.ptx.programs import SCHEDULES, kernel
from tests.ptx.syntax import PTXError


def _run(body: str, registers: str = ".maxnreg 128", **options: Any) -> torch.Tensor:
    """256 threads, of which %p1 are the first 128."""
    out = torch.zeros(256, dtype=torch.int32)
    text = kernel(
        f"""setp.lt.u32 %p1, %r0, 128; {body}
        ld.param.u64 %rd1, [p0]; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], 1;""",
        1,
    )
    Machine(parse(text.replace(")\n{", f")\n{registers}\n{{", 1)), "k", 256, 0, **options).run((1,), [out])
    return out


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_warps_wait_for_the_registers_that_others_give(schedule: str, seed: int) -> None:
    out = _run("""@!%p1 bra other; setmaxnreg.inc.sync.aligned.u32 232; bra.uni end;
        other: setmaxnreg.dec.sync.aligned.u32 24; end:""", schedule=schedule, seed=seed)  # fmt: skip
    assert out.tolist() == [1] * 256


@pytest.mark.parametrize(
    ("body", "registers", "message"),
    [
        ("@!%p1 bra other; setmaxnreg.inc.sync.aligned.u32 240; bra.uni end;"
         "other: setmaxnreg.dec.sync.aligned.u32 24; end:", ".maxnreg 128", "no thread can go on.*the pool has 80"),
        ("setmaxnreg.inc.sync.aligned.u32 120;", ".maxnreg 128", "cannot become 120"),
        ("setmaxnreg.dec.sync.aligned.u32 136;", ".maxnreg 128", "cannot become 136"),
        ("setmaxnreg.dec.sync.aligned.u32 20;", ".maxnreg 128", "a multiple of 8"),
        ("setmaxnreg.dec.sync.aligned.u32 24;", "", "does not say how many"),
    ],
)  # fmt: skip
def test_registers_that_are_not_there_are_an_error(body: str, registers: str, message: str) -> None:
    with pytest.raises(PTXError, match=f"(?s){message}"):
        _run(body, registers)
