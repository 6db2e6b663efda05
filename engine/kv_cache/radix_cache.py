"""The prefix cache: a radix tree over whole pages (RadixAttention, Zheng et al. 2024).

Pages enter the tree as they fill, so a request that finishes has nothing left to insert: it unlocks its path. A request
holds a *cursor*, the node at whose end its pages end; a lock counts on every node from there to the root.

        root ---- [p0 p1 p2] ---- [p3 p4]          A's cursor is the node [p3 p4]
                      \\
                       `--------- [p7]             B's cursor is the node [p7]

    Splitting [p0 p1 p2] after p0 leaves every cursor right: the node keeps its tail [p1 p2], a new node [p0] goes above
    it and takes its locks, for whoever locks the tail passes through the head.

    A cursor grows in place only if nobody else can stand on its node: one lock, no child. Otherwise it moves to a child.

Pure host code: it knows neither requests nor tensors. Keys are the int32 bytes of a page's tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from .page_pool import Pages, no_pages

TOKEN_BYTES = 4


@dataclass(eq=False)
class Node:
    """An edge of the tree with what hangs below it: `pages` and the bytes of their tokens."""

    tokens: bytearray
    pages: Pages[int]
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    lock_ref: int = 0
    last_access: int = 0
    # Of a root: what it is found by.
    extra_key: str = ""


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached prefix: its pages, and the node at whose end they end."""

    node: Node
    pages: Pages[int]


def num_common_pages(tokens: bytearray, ids: bytearray | memoryview, page_size: int) -> int:
    """Leading whole pages that two runs of int32 bytes share: compared as bytes, then bisected."""
    size = page_size * TOKEN_BYTES
    first, second = memoryview(tokens), memoryview(ids)
    limit = min(len(first), len(second)) // size
    if first[: limit * size] == second[: limit * size]:
        return limit
    equal, differs = 0, limit
    while differs - equal > 1:
        middle = (equal + differs) // 2
        if first[equal * size : middle * size] == second[equal * size : middle * size]:
            equal = middle
        else:
            differs = middle
    return equal


class RadixCache:
    """The tree, one root per `extra_key` that has pages or is in use: keys are the clients' choice, and any number of them
    may come. The caller owns the pages: it frees what `evict` and `flush` return."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self.num_cached_pages = 0
        self.num_evictable_pages = 0

    def match_prefix(self, input_ids: bytes, extra_key: str, max_tokens: int) -> PrefixMatch:
        """The longest prefix of `input_ids` in whole pages, of at most `max_tokens` tokens. Splits at its end."""
        node = self._roots.get(extra_key)
        if node is None:
            node = self._roots[extra_key] = Node(bytearray(), no_pages(), None, extra_key=extra_key)
        ids = memoryview(input_ids)
        end = max(0, max_tokens) // self._page_size * self._page_bytes
        start = 0
        pages = no_pages()
        while start < end:
            child = node.children.get(bytes(ids[start : start + self._page_bytes]))
            if child is None:
                break
            num_common = num_common_pages(child.tokens, ids[start:end], self._page_size)
            if num_common < len(child.pages):
                child = self._split(child, num_common)
            node = child
            self._touch(node)
            pages.extend(node.pages)
            start += num_common * self._page_bytes
        return PrefixMatch(node, pages)

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut a node's first pages off into a new parent, which is returned."""
        assert node.parent is not None
        cut = num_pages * self._page_bytes
        upper = Node(node.tokens[:cut], node.pages[:num_pages], node.parent, {}, node.lock_ref, node.last_access)
        node.parent.children[self._key(upper)] = upper
        # A copy, as a view of the old bytes may still be alive.
        node.tokens = node.tokens[cut:]
        node.pages = node.pages[num_pages:]
        node.parent = upper
        upper.children[self._key(node)] = node
        return upper

    def _key(self, node: Node) -> bytes:
        return bytes(node.tokens[: self._page_bytes])

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_access = self._clock

    def lock(self, node: Node) -> None:
        """Keep the path to `node` from being evicted."""
        step: Node | None = node
        while step is not None:
            self._lock_one(step)
            step = step.parent

    def _lock_one(self, node: Node) -> None:
        if node.lock_ref == 0:
            self.num_evictable_pages -= len(node.pages)
        node.lock_ref += 1

    def unlock(self, node: Node) -> None:
        """Undo one `lock`. Costs the path's nodes - the branchings of the conversation - not its pages."""
        self._touch(node)
        step: Node | None = node
        while step is not None:
            assert step.lock_ref > 0
            step.lock_ref -= 1
            if step.lock_ref == 0:
                self.num_evictable_pages += len(step.pages)
                self._drop_if_empty(step)
            step = step.parent

    def _drop_if_empty(self, node: Node) -> None:
        """A root that nobody stands on and nothing hangs below is forgotten."""
        if node.parent is None and not node.children and node.lock_ref == 0:
            del self._roots[node.extra_key]

    def extend(self, node: Node, tokens: bytes, pages: Pages[int]) -> tuple[Node, Pages[int]]:
        """Move a locked cursor over more pages, and its lock with it. `tokens` are the bytes of all of them.

        Returns the new cursor and the pages that the tree did not take, because it holds the same tokens already: there
        the cursor follows the tree's copy, and the caller keeps its own.
        """
        assert node.lock_ref > 0 and len(tokens) == len(pages) * self._page_bytes
        view = memoryview(tokens)
        done = 0
        while done < len(pages):
            rest = view[done * self._page_bytes :]
            child = node.children.get(bytes(rest[: self._page_bytes]))
            if child is None:
                node = self._adopt(node, rest, pages[done:])
                break
            num_common = num_common_pages(child.tokens, rest, self._page_size)
            if num_common < len(child.pages):
                child = self._split(child, num_common)
            self._lock_one(child)
            node = child
            done += num_common
        return node, pages[:done]

    def _adopt(self, node: Node, tokens: memoryview, pages: Pages[int]) -> Node:
        """Take pages that the tree does not have, at the end of a locked node."""
        self.num_cached_pages += len(pages)
        if not node.children and node.lock_ref == 1 and node.parent is not None:
            node.tokens += tokens
            node.pages.extend(pages)
            return node
        child = Node(bytearray(tokens), pages, node, {}, 1)
        self._touch(child)
        node.children[self._key(child)] = child
        return child

    def evict(self, num_pages: int) -> Pages[int]:
        """Up to `num_pages` pages that nobody has locked: least recently used leaves first, from their ends."""
        evicted = no_pages()
        leaves = [(node.last_access, id(node), node) for node in self._nodes() if self._is_evictable(node)]
        heapq.heapify(leaves)
        while leaves and len(evicted) < num_pages:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            key = self._key(node)
            keep = max(0, len(node.pages) - (num_pages - len(evicted)))
            evicted.extend(node.pages[keep:])
            del node.pages[keep:]
            del node.tokens[keep * self._page_bytes :]
            if keep == 0:
                del parent.children[key]
                if self._is_evictable(parent):
                    heapq.heappush(leaves, (parent.last_access, id(parent), parent))
                self._drop_if_empty(parent)
        self.num_cached_pages -= len(evicted)
        self.num_evictable_pages -= len(evicted)
        return evicted

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return node.parent is not None and not node.children and node.lock_ref == 0

    def flush(self) -> Pages[int]:
        """Drop everything; nothing may be locked."""
        assert all(node.lock_ref == 0 for node in self._nodes()), "a request still runs on cached pages"
        pages = no_pages()
        for node in self._nodes():
            pages.extend(node.pages)
        self._roots.clear()
        self.num_cached_pages = self.num_evictable_pages = 0
        return pages

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self) -> None:
        """Counters, keys and locks agree with the tree. Costs a pass over it."""
        nodes = list(self._nodes())
        assert sum(len(node.pages) for node in nodes) == self.num_cached_pages
        assert sum(len(node.pages) for node in nodes if node.lock_ref == 0) == self.num_evictable_pages
        assert all(root.children or root.lock_ref for root in self._roots.values()), "an empty root was kept"
        for node in nodes:
            assert len(node.tokens) == len(node.pages) * self._page_bytes
            assert node.lock_ref >= max((child.lock_ref for child in node.children.values()), default=0)
            for key, child in node.children.items():
                assert child.parent is node and child.pages and self._key(child) == key


class NullPrefixCache:
    """The prefix cache that is switched off: nothing is found and nothing is taken."""

    num_cached_pages = 0
    num_evictable_pages = 0

    def __init__(self, page_size: int) -> None:
        self._root = Node(bytearray(), no_pages(), None)

    def match_prefix(self, input_ids: bytes, extra_key: str, max_tokens: int) -> PrefixMatch:
        return PrefixMatch(self._root, no_pages())

    def lock(self, node: Node) -> None: ...

    def unlock(self, node: Node) -> None: ...

    def extend(self, node: Node, tokens: bytes, pages: Pages[int]) -> tuple[Node, Pages[int]]:
        return node, pages

    def evict(self, num_pages: int) -> Pages[int]:
        return no_pages()

    def flush(self) -> Pages[int]:
        return no_pages()

    def check_integrity(self) -> None: ...
