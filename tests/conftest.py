"""Before anything is imported: where there is no GPU, Triton kernels run in Triton's interpreter, unless somebody has
said TRITON_INTERPRET=0 (those who simulate what the compiler makes of them)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
