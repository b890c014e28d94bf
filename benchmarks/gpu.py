"""What a GPU can do at best, by torch: matrix multiplication, and copying its memory. No GPU has run this yet."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

import torch

from benchmarks.machine import Machine
from benchmarks.timing import per_call

COPY_BYTES = 4 << 30  # many times any cache


@dataclass(frozen=True)
class Gpu(Machine):
    """`read_memory` is of a copy, bytes read and written; `threads` counts multiprocessors."""

    @property
    def memory_limit(self) -> str:
        return "copies"

    def reads_of(self, size: int, repeats: int = 5) -> float:
        return copy_bandwidth(size // 2, repeats)

    def describe(self) -> str:
        return (
            f"{self.name} ({self.isa}, {self.threads} multiprocessors): bf16 GEMM {self.gemm_bfloat16 / 1e12:.0f} "
            f"TFLOP/s, fp32 {self.gemm_float32 / 1e12:.0f}; copies {self.read_memory / 1e9:,.0f} GB/s over "
            f"{self.read_bytes >> 20} MiB; {', '.join(f'{name} {value}' for name, value in self.versions.items())}"
        )


def measure(quick: bool = False) -> Gpu:
    """Measures torch's current GPU on random data."""
    import triton  # here alone: it takes a second, and a machine without a GPU need not have it

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    read_bytes = 1 << 24 if quick else COPY_BYTES
    return Gpu(
        name=properties.name,
        isa=f"sm_{properties.major}{properties.minor}",
        threads=properties.multi_processor_count,
        gemm_bfloat16=gemm_peak(torch.bfloat16, 1024 if quick else 8192),
        gemm_float32=gemm_peak(torch.float32, 512 if quick else 4096),
        read_memory=copy_bandwidth(read_bytes, repeats=1 if quick else 5),
        read_bytes=read_bytes,
        versions={"torch": torch.__version__, "triton": triton.__version__, **_driver()},
    )


def gemm_peak(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of torch's matmul on square matrices, median of 7; float32 without TF32, as the engine has it."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        return 2 * size**3 / per_call({"mm": lambda: torch.mm(a, b)}, repeats=7, window_s=0.02)["mm"].median
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second, read and written, of copying `size` bytes from one half of memory to another."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = per_call({"copy": lambda: target.copy_(source)}, repeats, window_s=0.02)
    return 2 * size / taken["copy"].median


def _driver() -> dict[str, str]:
    """Driver and clocks while it works, as nvidia-smi has them; empty where that is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid  # its number may differ from torch's
    query = "driver_version,clocks.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{device}"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    names = ("driver", "SM clock", "memory clock")
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}
