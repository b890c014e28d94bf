"""The cache's book-keeping: pages are never lost, never shared by accident, and found by their tokens only."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler.kv_cache import ROOT, KVCache


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def fill(cache: KVCache, tokens: np.ndarray) -> list[int]:
    """What a sequence does: match, share, allocate the rest, register what is full."""
    cached, node = cache.match(tokens)
    cache.share(cached)
    pages = cached + (cache.allocate(-(-len(tokens) // cache.page_size) - len(cached)) or [])
    for index in range(len(cached), len(tokens) // cache.page_size):
        node = cache.register(node, tokens, index, pages[index])
    return pages


def test_allocate_gives_none_rather_than_too_few():
    cache = KVCache(num_pages=3, page_size=16)
    assert cache.allocate(4) is None
    assert cache.num_free == 3
    assert sorted(cache.allocate(3)) == [0, 1, 2]
    assert cache.allocate(1) is None


def test_released_pages_can_be_allocated_again():
    cache = KVCache(num_pages=2, page_size=16)
    pages = cache.allocate(2)
    cache.release(pages)
    assert sorted(cache.allocate(2)) == sorted(pages)


def test_shared_page_is_free_only_after_the_last_release():
    cache = KVCache(num_pages=1, page_size=16)
    pages = cache.allocate(1)
    cache.share(pages)
    cache.release(pages)
    assert cache.num_free == 0
    cache.release(pages)
    assert cache.num_free == 1


def test_a_known_beginning_is_found():
    cache = KVCache(num_pages=8, page_size=16)
    tokens = np.arange(40, dtype=np.int32)
    pages = fill(cache, tokens)
    found, _ = cache.match(np.concatenate([tokens[:32], ids(7, 7, 7)]))
    assert found == pages[:2]


def test_the_last_token_is_always_left_to_compute():
    cache = KVCache(num_pages=8, page_size=16)
    tokens = np.arange(32, dtype=np.int32)
    pages = fill(cache, tokens)
    assert cache.match(tokens)[0] == pages[:1]


def test_same_page_tokens_behind_another_beginning_are_not_found():
    cache = KVCache(num_pages=8, page_size=16)
    shared = np.arange(16, dtype=np.int32)
    fill(cache, np.concatenate([shared, shared, ids(1)]))
    found, _ = cache.match(np.concatenate([shared + 1, shared, ids(1)]))
    assert found == []


def test_a_hash_collision_cannot_give_wrong_pages(monkeypatch):
    class Collides(bytes):
        def __hash__(self) -> int:
            return 0

    cache = KVCache(num_pages=8, page_size=16)
    monkeypatch.setattr(cache, "_tokens", lambda t, i: Collides(t[i * 16 : (i + 1) * 16].tobytes()))
    fill(cache, np.arange(17, dtype=np.int32))
    assert cache.match(np.arange(1, 18, dtype=np.int32))[0] == []


def test_least_recently_used_page_is_forgotten_first():
    cache = KVCache(num_pages=2, page_size=16)
    first, second = np.arange(17, dtype=np.int32), np.arange(100, 117, dtype=np.int32)
    for tokens in (first, second):
        pages = cache.allocate(1)
        cache.register(ROOT, tokens, 0, pages[0])
        cache.release(pages)
    cache.allocate(1)
    assert cache.match(first)[0] == []
    assert len(cache.match(second)[0]) == 1


def test_deeper_pages_are_forgotten_before_those_they_build_on():
    cache = KVCache(num_pages=3, page_size=16)
    tokens = np.arange(48, dtype=np.int32)
    pages = fill(cache, tokens)
    cache.release(pages)
    cache.allocate(1)
    assert cache.match(np.append(tokens, 0).astype(np.int32))[0] == pages[:2]


def test_forget_makes_nothing_findable_and_loses_no_page():
    cache = KVCache(num_pages=3, page_size=16)
    tokens = np.arange(40, dtype=np.int32)
    running = fill(cache, tokens)
    cache.forget()
    assert cache.match(tokens)[0] == []
    cache.release(running)
    assert cache.num_free == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70), st.booleans()), max_size=30))
def test_pages_are_conserved_whatever_happens(history):
    cache = KVCache(num_pages=12, page_size=16)
    held: list[list[int]] = []
    for beginning, length, release in history:
        tokens = np.full(length, beginning, dtype=np.int32)
        if -(-length // 16) <= cache.num_free:
            held.append(fill(cache, tokens))
        if release and held:
            cache.release(held.pop(0))
        in_use = {page for pages in held for page in pages}
        assert len(in_use) + cache.num_free == 12
    for pages in held:
        cache.release(pages)
    assert cache.num_free == 12
