"""What `mha` may use as `attend`: a cache that remembers, and a batch that keeps its sequences apart.

Attention is the only place where tokens talk, so it is the only place that must know of either. The other
functions see rows; to them a decode step is a prompt of one row, and a batch is a longer prompt.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from picogpt.model import attention, causal_attention, causal_mask, keep


def with_attend(params, attends):
    """A shallow copy of the parameter tree whose i-th block attends by `attends[i]`."""
    blocks = [
        {**block, "attn": {**block["attn"], "attend": attend}}
        for block, attend in zip(params["blocks"], attends, strict=True)
    ]
    return {**params, "blocks": blocks}


class KVCache:
    """An `attend` that remembers the keys and values of one block, so that each token is projected only once.

    It is the exception to the rule that functions change nothing: every call appends. The queries of a call
    belong to the tokens it appends; give `gpt2` their `position_ids`.

    Attributes: `length`, the tokens remembered; `store`, keys and values `[2, n_head, capacity, d]` in the
    model's dtype, of which `length` rows are filled. The capacity is a hint: a full cache at least doubles.
    """

    def __init__(self, capacity: int = 256):
        self.length = 0
        self.capacity = capacity
        self.store: Any = None

    def __call__(self, q, k, v, tap=keep):  # 3 x [n_head, n_q, d] -> [n_head, n_q, d]
        start = self.length
        self.reserve(k.shape[1], k)
        return self.part(start, self.length)(q, k, v, tap)

    def reserve(self, n_rows: int, like) -> None:
        """Lengthen by `n_rows`, whose content is still to be written, for keys such as `like`."""
        filled, self.length = self.length, self.length + n_rows
        if self.store is not None and self.length <= self.capacity:
            return
        if self.capacity < self.length:
            self.capacity = max(self.length, 2 * self.capacity)
        n_head, _, d = like.shape
        # Rows never written are never touched, so an ample capacity costs address space, not memory.
        store = np.empty((2, n_head, self.capacity, d), dtype=like.dtype)
        if self.store is not None:
            store[:, :, :filled] = self.store[:, :, :filled]
        self.store = store

    def part(self, start: int, stop: int, wait: Callable[[], object] = lambda: None) -> Callable[..., Any]:
        """An `attend` for the reserved rows `start` to `stop`.

        Rows know nothing of one another but in attention: threads that own a part each write its keys and
        values, `wait` until all have, and attend."""

        def attend(q, k, v, tap=keep):  # 3 x [n_head, n_q, d] -> [n_head, n_q, d]
            self.store[0, :, start:stop] = k
            self.store[1, :, start:stop] = v
            wait()
            keys, values = self.store[:, :, :stop]
            return causal_attention(q, keys, values, tap)

        return attend

    def fork(self) -> "KVCache":
        """A copy that goes its own way: several samples share the work of one prompt."""
        twin = KVCache(self.capacity)
        if self.store is not None:
            twin.reserve(self.length, self.store[0])
            twin.store[:, :, : self.length] = self.store[:, :, : self.length]
        return twin


class JAXCache:
    """A KVCache for `jax.jit`: what it is given it leaves alone, and the new arrays stand in `.state`.

    keys, values  `[n_head, capacity, d]`, of which the first `length` rows are filled; their shape never
    changes, so that one compiled program serves every step. Make sure that the rows to come still fit.
    """

    def __init__(self, keys, values, length):
        self.state = keys, values
        self.length = length

    def __call__(self, q, k, v, tap=keep):  # 3 x [n_head, n_q, d] -> [n_head, n_q, d]
        xp = q.__array_namespace__()
        here = self.length + xp.arange(k.shape[1])
        keys, values = self.state
        self.state = keys, values = keys.at[:, here].set(k), values.at[:, here].set(v)
        return attention(q, keys, values, causal_mask(here, keys.shape[1], q.dtype), tap)


def packed(attends, lengths):
    """An `attend` for several sequences whose rows follow one another: nobody looks across a border.

    attends  one callable a sequence: `causal_attention`, or each sequence's own cache
    lengths  how many rows each sequence has in this call

    No padding and no mask: rows that are not there cost nothing. A tap sees each sequence's pattern in turn.
    """
    stops = np.cumsum(lengths)
    borders = list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))

    def attend(q, k, v, tap=keep):  # 3 x [n_head, sum(lengths), d] -> [n_head, sum(lengths), d]
        xp = q.__array_namespace__()
        parts = [
            own(q[:, start:stop], k[:, start:stop], v[:, start:stop], tap=tap)
            for own, (start, stop) in zip(attends, borders, strict=True)
        ]
        return xp.concatenate(parts, axis=1)

    return attend
