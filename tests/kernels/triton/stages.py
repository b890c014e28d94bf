"""How far the tests of layouts compile a kernel: to where the compiler has dealt its elements to threads and chosen its
instructions, which takes a fraction of the time to machine code. In processes whose kernels are not interpreted."""

from __future__ import annotations

import re
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from engine.kernels.triton.launch import Launch

_compiled: dict[tuple[str, str], str] = {}


def compiled_to(last: str, launch: Launch) -> str:
    """The kernel for Hopper after the stage `last`: "ttgir", or "ptx". The same launch is compiled once."""
    key = last, repr(launch)
    if key not in _compiled:
        _compiled[key] = _compile(last, launch)
    return _compiled[key]


def _compile(last: str, launch: Launch) -> str:
    names = launch.kernel.arg_names
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, divisible)
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    given = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {"hash": "", "target": target, **options.__dict__}
    for name, stage in stages.items():
        code = stage(code, metadata)
        if name == last:
            return str(code)
    raise ValueError(f'there is no stage "{last}"; there are {", ".join(stages)}')


def reductions(ttgir: str) -> list[tuple[str, str]]:
    """The type and the layout of what each reduction is over."""
    return _with_layouts(r'"tt.reduce"[\s\S]*?\}\) : \(tensor<(\w+), (#\w+)>', ttgir)


def products(ttgir: str) -> list[tuple[str, str]]:
    """The type and the layout of the result of each product that wgmma computes."""
    return _with_layouts(r"= ttng.warp_group_dot .*-> tensor<(\w+), (#\w+)>", ttgir)


def _with_layouts(pattern: str, ttgir: str) -> list[tuple[str, str]]:
    layouts = dict(re.findall(r"(#(?:blocked|mma)\d*) = (.*)", ttgir))
    return [(kind, layouts[layout]) for kind, layout in re.findall(pattern, ttgir)]
