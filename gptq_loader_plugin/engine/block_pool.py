"""Which block of keys and values holds which tokens, and who needs it.

A block holds the keys and values of `block_size` positions, in every layer. Full blocks are known
by all tokens up to their end, so that sequences that begin the same share them; those that nobody
needs any more are kept until their room is needed, the longest unused first. (PagedAttention,
arXiv:2309.06180; vLLM's automatic prefix caching.)
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from hashlib import sha256
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BlockPool", "BlockTable"]


class BlockPool:
    """Blocks, and the prefixes that some of them hold.

    Args:
        num_blocks: how many there are.
        block_size: positions in each.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.lock = threading.RLock()
        self._users = [0] * num_blocks
        # Nobody's blocks, the next one to be taken first: empty ones before those with a prefix.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._prefixes: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def free_blocks(self) -> int:
        """Count the blocks that nobody needs."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a block; the prefix that it held is forgotten.

        Raises:
            GPTQLoaderError: every block is in use.
        """
        with self.lock:
            if not self._free:
                raise GPTQLoaderError(
                    f"all {self.num_blocks * self.block_size:,} positions of the key-value cache "
                    "are in use",
                    hint="write fewer replies at a time, or shorter ones",
                )
            block, _ = self._free.popitem(last=False)
            digest = self._digests.pop(block, None)
            if digest is not None:
                del self._prefixes[digest]
            self._users[block] = 1
            return block

    def find(self, digest: bytes) -> int | None:
        """Find the block that ends a prefix, and take it."""
        with self.lock:
            block = self._prefixes.get(digest)
            if block is not None:
                self._users[block] += 1
                self._free.pop(block, None)
            return block

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block known by the prefix that it ends, unless another one is."""
        with self.lock:
            if digest not in self._prefixes and block not in self._digests:
                self._prefixes[digest], self._digests[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; the first of a sequence are kept longest, as others may begin so."""
        with self.lock:
            for block in reversed(blocks):
                self._users[block] -= 1
                if not self._users[block]:
                    self._free[block] = None
                    if block not in self._digests:
                        self._free.move_to_end(block, last=False)

    def clear(self) -> None:
        """Forget every prefix."""
        with self.lock:
            self._prefixes.clear()
            self._digests.clear()


class BlockTable:
    """The blocks of one sequence, in order.

    Args:
        pool: where they are from.
        seed: what its keys depend on beside the tokens, such as how they are rotated; blocks of
            sequences with another seed are not shared.

    Attributes:
        blocks: its blocks.
        tokens: those whose keys and values are in them.
    """

    def __init__(self, pool: BlockPool, seed: object = ()) -> None:
        self._pool = pool
        self._digest = sha256(repr(seed).encode()).digest()
        self._published = 0  # blocks that `_digest` goes to the end of
        self.blocks: list[int] = []
        self.tokens: list[int] = []

    def __len__(self) -> int:
        """Count the positions that are filled."""
        return len(self.tokens)

    def __del__(self) -> None:
        """Give the blocks back, where nobody has."""
        self.release()

    def reuse(self, ids: Sequence[int]) -> int:
        """Take the blocks that hold the beginning of `ids`; return how many tokens they hold.

        Never the last one, whose logits are needed.
        """
        size = self._pool.block_size
        for end in range(size, len(ids), size):
            part = ids[end - size : end]
            digest = self._extend(part)
            block = self._pool.find(digest)
            if block is None:
                break
            self.blocks.append(block)
            self.tokens += part
            self._digest, self._published = digest, self._published + 1
        return len(self.tokens)

    def reserve(self, count: int) -> list[int]:
        """Have room for `count` more positions; return their slots: block x size + offset.

        Raises:
            GPTQLoaderError: there are no blocks left.
        """
        size, first = self._pool.block_size, len(self.tokens)
        while len(self.blocks) * size < first + count:
            self.blocks.append(self._pool.allocate())
        return [
            self.blocks[position // size] * size + position % size
            for position in range(first, first + count)
        ]

    def append(self, tokens: Sequence[int]) -> None:
        """Note that tokens were read, into the room that was reserved."""
        self.tokens += tokens
        size = self._pool.block_size
        while (self._published + 1) * size <= len(self.tokens):
            start = self._published * size
            self._digest = self._extend(self.tokens[start : start + size])
            self._pool.publish(self.blocks[self._published], self._digest)
            self._published += 1

    def release(self) -> None:
        """Give the blocks back: full ones stay known for the next sequence that begins so."""
        blocks, self.blocks = self.blocks, []
        self.tokens = []
        if blocks:
            self._pool.release(blocks)

    def _extend(self, tokens: Sequence[int]) -> bytes:
        return sha256(self._digest + array("q", tokens).tobytes()).digest()
