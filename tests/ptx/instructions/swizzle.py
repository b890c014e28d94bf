"""Where bytes lie in shared memory under the swizzles that tensor copies and warpgroup products share.

A swizzle of W bytes (32, 64 or 128) exchanges the 16-byte pieces of every W bytes: bits 4 and up of an address are
exclusive-ored with the bits from 7 on, as many as W / 16 needs (PTX ISA, "Swizzling modes"). It acts on the address in
the block's shared memory, not on the offset in a tile, so tiles are aligned to 8 W bytes.
"""

from __future__ import annotations

import numpy as np

WIDTHS = (16, 32, 64, 128)  # 16 stands for no swizzle: one piece, with nothing to exchange it with


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Shared-memory addresses of the bytes that would lie at `addresses` without a swizzle; `width` is of `WIDTHS`."""
    if width not in WIDTHS:
        raise ValueError(f"a swizzle of {width} bytes does not exist; there are {WIDTHS}")
    return addresses ^ (((addresses >> 7) & (width // 16 - 1)) << 4)
