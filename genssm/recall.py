"""Exact recall: what followed the last occurrence of the latest tokens.

A state of constant size remembers the gist of a text, but not every name in it. So a table of
constant size, too, keeps what came after each context of the last k tokens, and the head may make
that token likelier. Source: n-gram heads (Akyürek et al., arXiv 2401.12973); the mixing with a
cache goes back to Grave et al., arXiv 1612.04426.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = -1  # the token id of a position before the sequence begins, and where none is recalled
# Of keys; their product fits into 63 bits. The compiled loop is kept on disk with these in it: who
# changes them must change simd.py, too.
FACTOR, MASK = 0x5BD1E995, 0x7FFFFFFF


class Recall:
    """Contexts of several orders, each with a table of ``slots`` entries: a key and a token.

    A context's slot is its key, a hash of 31 bits, modulo ``slots``. Reading a token first writes
    it as what followed the context before, over whatever its slot held, then looks up the context
    that ends with it. Tokens from ``n_outputs`` on, which are never predicted, are not kept.
    """

    def __init__(self, orders: tuple[int, ...], slots: int, n_outputs: int) -> None:
        self.orders, self.slots, self.n_outputs = orders, slots, n_outputs

    def empty(self, batch: int, device: torch.device) -> Tensor:
        """The tables before any token: (B, K, slots, 2) int32, keys and tokens."""
        shape = (batch, len(self.orders), self.slots, 2)
        return torch.full(shape, NOTHING, dtype=torch.int32, device=device)

    def keys(self, window: Tensor, length: int) -> Tensor:
        """Keys of the contexts before and at each of the last L tokens of window (B, reach + L).

        Returns (B, K, L + 1) int64; NOTHING for a context that begins before the sequence does.
        """
        end, every = window.shape[1] - length, []
        for order in self.orders:
            key = torch.zeros_like(window[:, : length + 1])
            for start in range(end - order, end):
                token = window[:, start : start + length + 1]
                key = (key ^ (token + 1)) * FACTOR & MASK
                key = key ^ key >> 15
            oldest = window[:, end - order : end - order + length + 1]
            every.append(key.masked_fill(oldest == NOTHING, NOTHING))
        return torch.stack(every, 1)

    def __call__(self, window: Tensor, length: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Read the last L >= 1 of the tokens window (B, reach + L), reach at least each order.

        Returns what each order recalls after every token, (B, L, K) int64, and the tables (B, K,
        slots, 2) after all. All positions at once: contexts are sorted by their slots, the earlier
        first, so that a context's neighbour is the one whose token it finds.
        """
        if not length or not self.orders:
            return window.new_empty(len(window), length, len(self.orders)), tables
        window = window.long()
        keys, K = self.keys(window, length), len(self.orders)
        tokens = window[:, None, window.shape[1] - length :].expand(-1, K, -1)
        tokens = torch.where(tokens < self.n_outputs, tokens, NOTHING)
        # One slot more, for contexts that are none.
        slots = torch.where(keys == NOTHING, self.slots, keys % self.slots)
        ranked, order = slots.sort(stable=True)
        same = ranked[..., 1:] == ranked[..., :-1]
        earlier, later = order[..., :-1], order[..., 1:]
        before = torch.full_like(slots, NOTHING)  # the context that wrote the slot last
        before.scatter_(-1, later, torch.where(same, earlier, NOTHING))
        after = torch.full_like(slots, length)  # and the one that writes it next
        after.scatter_(-1, earlier, torch.where(same, later, length))

        padded = F.pad(tables, (0, 0, 0, 1), value=NOTHING)
        stored = padded.gather(2, slots[..., None].expand(-1, -1, -1, 2)).long()
        place = before.clamp(0, length - 1)
        key = torch.where(before < 0, stored[..., 0], keys.gather(-1, place))
        token = torch.where(before < 0, stored[..., 1], tokens.gather(-1, place))
        recalled = torch.where(key == keys, token, NOTHING).masked_fill(keys == NOTHING, NOTHING)

        last = after[..., :length] >= length  # of those that this piece writes into a slot
        target = torch.where(last, slots[..., :length], self.slots)
        entries = torch.stack([keys[..., :length], tokens], -1).int()
        padded = padded.scatter(2, target[..., None].expand(-1, -1, -1, 2), entries)
        return recalled[..., 1:].transpose(1, 2), padded[:, :, : self.slots]
