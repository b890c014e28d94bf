"""The CUDA decode of every shape and dtype, on a GPU, for compute-sanitizer to watch (`make test-gpu`).

compute-sanitizer --error-exitcode=1 python -m tests.kernels.cuda.sanitized
"""

from __future__ import annotations

import itertools

import torch

from engine.kernels.attention import AttentionSpec
from tests.kernels.cuda.cases import decoded


def main() -> None:
    dtypes, pages = (torch.bfloat16, torch.float16), (None, torch.float8_e4m3fn)
    for head_dim, dtype, kv_dtype in itertools.product((64, 96, 128, 256), dtypes, pages):
        out = decoded("cuda", AttentionSpec(8, 2, head_dim, kv_dtype=kv_dtype), dtype)
        torch.cuda.synchronize()
        print(f"{head_dim} {dtype} {kv_dtype}: {'finite' if out.isfinite().all() else 'NOT FINITE'}")


if __name__ == "__main__":
    main()
