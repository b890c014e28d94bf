"""CUDA sources compile for every GPU they are for, without spilling registers. Nothing runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NVCC = shutil.which("nvcc")
SOURCES = sorted((Path(__file__).resolve().parents[3] / "engine" / "csrc" / "cuda").glob("*.cu"))
SPILLING = """
__global__ void __launch_bounds__(1024) spilling(const float* in, float* out) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) kept[i] = in[threadIdx.x + 1024 * i];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) sum += kept[i];
#pragma unroll
  for (int i = 0; i < 128; ++i) out[threadIdx.x + 1024 * i] = kept[i] / sum;
}
"""
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")


def spills(source: Path, architecture: str, folder: Path) -> tuple[int, int]:
    """How many kernels a source has, and how many bytes they spill."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", target, "-Xptxas=-v", "-c", source, "-o", folder / "o.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    return len(re.findall(r"Used \d+ registers", report)), sum(map(int, re.findall(r"(\d+) bytes spill", report)))


@pytest.mark.parametrize("architecture", ["80", "90a", "100a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_kernels_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    kernels, spilled = spills(source, architecture, tmp_path)
    assert kernels > 0 and spilled == 0


def test_planted_spill_is_found(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert spills(source, "80", tmp_path)[1] > 0
