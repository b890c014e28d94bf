"""What this machine can do at best, measured in the same run as what is compared with it: matrix multiplication through
torch, and reading memory.

Read bandwidth comes from a small C loop (read_bandwidth.c) where there is a C compiler, and from `torch.sum`
otherwise. A processor whose last cache holds the buffer reads faster than its memory does, so the size belongs to
the figure.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.timing import interleaved, seconds
from engine.kernels.op import cpu_missing, extension

MEMORY_BYTES = 2 << 30  # far beyond any last-level cache a virtual machine is likely to share
STREAMS = (1, 2, 4, 8)
PREFETCH_BYTES = (0, 1024, 4096)


@dataclass(frozen=True)
class Machine:
    """Measured limits on all the threads the engine uses: operations and bytes per second."""

    name: str
    isa: str
    threads: int
    gemm_bfloat16: float
    gemm_float32: float
    read_memory: float
    read_bytes: int  # the buffer that read_memory was measured over
    versions: dict[str, str]

    def gemm(self, dtype: str) -> float:
        """Peak of torch's own matmul in `dtype`, FLOP/s."""
        return self.gemm_bfloat16 if dtype == "bfloat16" else self.gemm_float32

    @property
    def memory_limit(self) -> str:
        """What `read_memory` is the speed of."""
        return "memory reads"

    def reads_of(self, size: int, repeats: int = 5) -> float:
        """Bytes per second read from a buffer of `size` bytes."""
        return read_bandwidth(size, repeats)

    def describe(self) -> str:
        return (
            f"{self.name}, {self.threads} threads, code path {self.isa}: bf16 GEMM {self.gemm_bfloat16 / 1e9:.0f} "
            f"GFLOP/s, fp32 {self.gemm_float32 / 1e9:.0f}; reads {self.read_memory / 1e9:.1f} GB/s over "
            f"{self.read_bytes >> 20} MiB"
        )

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure(quick: bool = False) -> Machine:
    """Measures the machine; a few seconds, and 2 GiB of memory for as long. `quick` shrinks everything to nothing."""
    if not cpu_missing():
        torch.set_num_threads(extension().num_threads())
    read_bytes = 1 << 22 if quick else MEMORY_BYTES
    return Machine(
        name=processor(),
        isa="torch" if cpu_missing() else extension().isa(),
        threads=torch.get_num_threads(),
        gemm_bfloat16=gemm_peak(torch.bfloat16, quick),
        gemm_float32=gemm_peak(torch.float32, quick),
        read_memory=read_bandwidth(read_bytes, repeats=1 if quick else 3),
        read_bytes=read_bytes,
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )


def processor() -> str:
    """The processor's own name, without trademarks."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM|C)\)|CPU|Processor", " ", name, flags=re.IGNORECASE).split())


def slug(name: str) -> str:
    """A processor's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gemm_peak(dtype: torch.dtype, quick: bool = False) -> float:
    """FLOP/s of torch's matmul on 2048 x 2048 matrices, median of 7."""
    size = 256 if quick else 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    taken = interleaved({"mm": lambda: torch.mm(a, b)}, repeats=1 if quick else 7, warmup=3)
    return 2 * size**3 / taken["mm"].median


def read_bandwidth(size: int, repeats: int = 5) -> float:
    """Bytes per second read from a buffer of `size` bytes on all threads: the best loop's median."""
    threads = torch.get_num_threads()
    unit = threads * max(STREAMS) * 512
    size = max(unit, size // unit * unit)
    count = size // 8
    memory = mmap.mmap(-1, size)  # page-aligned, as the loop's aligned vectors need
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # small pages stop the prefetch at each 4 KiB
    buffer = torch.frombuffer(memory, dtype=torch.int64)
    torch.arange(count, out=buffer)
    rounds = max(1, (64 << 20) // size)
    total = count * (count - 1) // 2 * rounds % 2**64
    best = 0.0
    for read in _readers(buffer, size, threads, rounds):
        taken = sorted(seconds(lambda read=read: _check(read(), total)) for _ in range(repeats))  # type: ignore[misc]
        best = max(best, size * rounds / taken[len(taken) // 2])
    return best


def _check(got: int, wanted: int) -> None:
    if got % 2**64 != wanted:
        raise RuntimeError(f"the read loop summed to {got % 2**64}, not {wanted}: its speed means nothing")


def _readers(buffer: torch.Tensor, size: int, threads: int, rounds: int) -> list[Callable[[], int]]:
    loop = _read_loop()
    if loop is None:
        return [lambda: sum(int(buffer.sum()) for _ in range(rounds))]
    pool = ThreadPoolExecutor(threads)
    share = size // threads

    def reader(streams: int, ahead: int) -> Callable[[], int]:
        def run() -> int:  # ctypes lets go of the interpreter lock, so plain threads read side by side
            starts = [ctypes.c_void_p(buffer.data_ptr() + i * share) for i in range(threads)]
            parts = [pool.submit(loop, start, ctypes.c_size_t(share), streams, ahead, rounds) for start in starts]
            return sum(part.result() for part in parts)

        return run

    return [reader(streams, ahead) for streams in STREAMS for ahead in PREFETCH_BYTES]


@cache
def _read_loop() -> Callable[..., int] | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_bandwidth.c")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "read_bandwidth.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        loop = ctypes.CDLL(str(library)).read_sum
    loop.restype = ctypes.c_uint64
    return loop
