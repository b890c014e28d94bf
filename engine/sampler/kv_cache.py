"""The paged KV cache's book-keeping: which page is whose, and which pages hold prompts seen before.

Pages are reference-counted, so sequences with a common beginning share them. A full page can be found again by the
chain of tokens that leads to it: its key is (the node of the page before it, its own tokens), and since the key holds
the tokens themselves a hit needs no further check. Pages nobody refers to stay findable until they are needed for
something else, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

import numpy as np

ROOT = 0  # the node before the first page

Key = tuple[int, bytes]


class KVCache:
    """Hands out page numbers in [0, num_pages)."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._references = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages - 1, -1, -1))  # never written, or forgotten
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, nobody's; the oldest first
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._node_of: dict[int, int] = {}
        self._nodes = count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return len(self._free) + len(self._idle)

    def allocate(self, num_pages: int) -> list[int] | None:
        """That many pages with one reference each, or None when there are not enough."""
        if num_pages > self.num_free:
            return None
        return [self._take() for _ in range(num_pages)]

    def share(self, pages: list[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each; pages further along the sequence are forgotten before those they build on."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: np.ndarray) -> tuple[list[int], int]:
        """The longest chain of known full pages that `tokens` starts with, and its last node.

        At least the last token is left to compute: its hidden state is what the next token is sampled from. The
        pages are not yet shared.
        """
        pages: list[int] = []
        node = ROOT
        if self.prefix_caching:
            for i in range((len(tokens) - 1) // self.page_size):
                page = self._page_of.get((node, self._tokens(tokens, i)))
                if page is None:
                    break
                pages.append(page)
                node = self._node_of[page]
        return pages, node

    def register(self, node: int, tokens: np.ndarray, index: int, page: int) -> int:
        """Makes page `index` of `tokens`, now full, findable behind `node`; returns the node to go on from."""
        key = (node, self._tokens(tokens, index))
        known = self._page_of.get(key)
        if known is not None:
            return self._node_of[known]
        self._page_of[key] = page
        self._key_of[page] = key
        self._node_of[page] = next(self._nodes)
        return self._node_of[page]

    def forget(self) -> None:
        """Nothing is findable any more: the weights have changed."""
        self._page_of.clear()
        self._key_of.clear()
        self._node_of.clear()
        self._free.extend(reversed(self._idle))
        self._idle.clear()

    def _tokens(self, tokens: np.ndarray, index: int) -> bytes:
        return tokens[index * self.page_size : (index + 1) * self.page_size].tobytes()

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            del self._node_of[page]
        self._references[page] = 1
        return page
