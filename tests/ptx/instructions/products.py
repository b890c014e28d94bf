"""wgmma in flight: products between their issue and the wait that lets registers be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.instructions.fragments import accumulated
from tests.ptx.instructions.ordering import ProtocolError
from tests.ptx.syntax import Register


@dataclass
class Product:
    """One wgmma.mma_async of a warpgroup: `sums` [64, columns] float32 (or the product before, on the same registers)
    plus what `operands` reads when it is called: A [64, K] and B [columns, K]."""

    registers: tuple[Register, ...]
    sums: np.ndarray | Product
    operands: Callable[[], tuple[np.ndarray, np.ndarray]]
    pieces: np.ndarray
    line: int
    result: np.ndarray | None = None

    def run(self) -> np.ndarray:
        if self.result is None:
            before = self.sums.run() if isinstance(self.sums, Product) else self.sums
            self.sums = self.result = accumulated(before, *self.operands())
        return self.result


@dataclass
class Warpgroup:
    """The products in flight of one warpgroup, in the order of their issue; `groups` are committed. `fenced` are the
    warpgroup's registers of 32 bits at its last wgmma.fence."""

    groups: list[list[Product]] = field(default_factory=list)
    open: list[Product] = field(default_factory=list)
    writers: dict[int, Product] = field(default_factory=dict)
    fenced: np.ndarray | None = None

    def before(self, registers: tuple[Register, ...]) -> Product | None:
        """The product in flight that these sums continue. Raises ProtocolError where one writes to some of the
        registers, or to all of them in another order: only a product of the same shape may follow without a wait."""
        product = self.writers.get(registers[0].index)
        if product is not None and product.registers == registers:
            return product
        if any(register.index in self.writers for register in registers):
            raise ProtocolError("a product in flight writes to some of this one's registers of sums")
        return None

    def check_idle(self, registers: tuple[Register, ...]) -> None:
        """Raises ProtocolError where a product in flight writes to one of the registers."""
        for register in registers:
            if register.index in self.writers:
                raise ProtocolError(
                    f"{register.name} is read while the wgmma of line {self.writers[register.index].line} writes it"
                )

    def issue(self, product: Product) -> None:
        self.open.append(product)
        self.writers.update((register.index, product) for register in product.registers)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, most: int) -> tuple[list[Product], list[Product]]:
        """Completes all groups but the last `most`: (their products, those of them whose result belongs in the
        registers, because no product in flight goes on with it)."""
        count = max(0, len(self.groups) - most)
        done = [product for group in self.groups[:count] for product in group]
        self.groups = self.groups[count:]
        last = []
        for product in done:
            product.run()
            if self.writers.get(product.registers[0].index) is product:
                last.append(product)
                for register in product.registers:
                    del self.writers[register.index]
        return done, last
