"""The mathematics of Mamba-2's scan on K chunks of q positions of every row.

Inside a chunk a head's output is a masked matrix product, y = (C B^T * M) v with v = delta x, where M[i, j] is the
decay from j to i, and 0 where a document starts in between; what came before is in the state at the entry.

Shapes: H = G R heads in G groups that share B and C, P channels a head, N states.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambatrain.ops.reference import computing_dtype

LOWEST_EXPONENT = -2000.0  # 2^-1075 is 0 in fp64


class Gradients(NamedTuple):
    """Of the arguments, in the layout of the chunks; A is summed over rows and positions."""

    x: Tensor  # (B, K, q, H, P), without the skip
    raw: Tensor  # (B, K, q, H)
    A: Tensor  # (H,)
    B: Tensor  # (B, K, G, q, N)
    C: Tensor  # (B, K, G, q, N)


class Chunks:
    """The positions `span` of every row in chunks of q, in the computing dtype."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        boundaries: Tensor | None,
        span: slice,
        q: int,
    ) -> None:
        dtype = computing_dtype(x)
        self.A = A.to(dtype)
        self.x, raw, B, C = (torch.unflatten(tensor[:, span].to(dtype), 1, (-1, q)) for tensor in (x, dt, B, C))
        self.B, self.C = B.transpose(2, 3).contiguous(), C.transpose(2, 3).contiguous()  # (B, K, G, q, N)
        self.raw = raw if dt_bias is None else raw + dt_bias.to(dtype)  # (B, K, q, H)
        self.delta = F.softplus(self.raw)
        self.v = self.x * self.delta[..., None]  # (B, K, q, H, P)
        # Exponents of 2: torch's exp2 takes a quarter of the time of exp on x86. In fp64, because a decay inside the
        # chunk is the difference of two sums, and both may be large; bounded, because one that gives 0 in any dtype may
        # be as large as it likes, and would drown the others.
        exponents = (self.delta.double() * (A.double() * math.log2(math.e))).clamp_(min=LOWEST_EXPONENT)
        self.document = self.started = None
        self.restarts: list[list[bool]] = []  # of each row, of each chunk; read once, because a GPU must be waited for
        if boundaries is not None:
            self.document = torch.unflatten(boundaries[:, span], 1, (-1, q)).cumsum(2)  # (B, K, q), from the entry on
            self.started = self.document > 0  # (B, K, q), since the entry
            self.restarts = self.started[:, :, -1].tolist()
        self.sums = exponents.cumsum(2)  # (B, K, q, H)
        self.from_entry = self.sums.exp2().to(dtype)  # (B, K, q, H), decay from the entry to i
        self.to_exit = (self.sums[:, :, -1:] - self.sums).exp2().to(dtype)  # (B, K, q, H), decay from j to the exit
        if self.document is not None and self.started is not None:
            self.from_entry.masked_fill_(self.started[..., None], 0)
            self.to_exit.masked_fill_((self.document < self.document[:, :, -1:])[..., None], 0)

    def pass_states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """From the state before (B, H, P, N): those at the entry of each chunk (B, K, H, P, N), and the one behind."""
        added = self._by_group(self.v * self.to_exit[..., None]).mT @ self.B  # (B, K, G, R P, N)
        added = added.view(*added.shape[:2], *state.shape[1:])
        entry = torch.empty_like(added)
        for k in range(added.shape[1]):
            entry[:, k] = state
            state = self._pass_on(state, added[:, k], k)
        return entry, state

    def outputs(self, entry: Tensor) -> Tensor:
        """y (B, K, q, H, P) without the skip."""
        y = self._times_scores(self._decays(), self._scores()) @ _heads_first(self.v)
        return y.transpose(2, 3).addcmul(self._seen(entry), self.from_entry[..., None])

    def run_back(self, g: Tensor, entry: Tensor, carry: Tensor) -> tuple[Gradients, Tensor]:
        """The gradients from those of y, g (B, K, q, H, P), and of the state behind, carry; and of the state before."""
        g_entry = self._by_group(g * self.from_entry[..., None])  # (B, K, G, q, R P)
        carries, carry = self._pass_back(g_entry.mT @ self.C, carry)  # (B, K, H, P, N), of each chunk's exit
        dC = g_entry @ self._states_by_group(entry)
        dB = self._by_group(self.v * self.to_exit[..., None]) @ self._states_by_group(carries)
        dv_exit = self._by_head(self.B @ self._states_by_group(carries).mT) * self.to_exit[..., None]

        # The exponent at t lies between all j < t and all i >= t, entry and exit included. Each kind is summed by
        # itself: row sums minus column sums would be the difference of large numbers.
        entry_to_i = (g * self._seen(entry)).sum(-1) * self.from_entry  # (B, K, q, H)
        j_to_exit = (dv_exit * self.v).sum(-1)
        entry_to_exit = (carries * entry).sum((-1, -2)) * self.from_entry[:, :, -1]  # (B, K, H)
        if self.started is not None:  # by selection: the state may have been inf
            dC.masked_fill_(self.started[:, :, None, :, None], 0)
            entry_to_exit.masked_fill_(self.started[:, :, -1:], 0)
        dexponent = entry_to_i.flip(2).cumsum(2).flip(2) + entry_to_exit[:, :, None]
        dexponent[:, :, 1:] += j_to_exit.cumsum(2)[:, :, :-1]

        dv, dexponent_inside, dscores = self._inside_back(g)
        dv = dv.transpose(2, 3) + dv_exit
        dexponent += dexponent_inside.transpose(2, 3)
        dC += dscores @ self.B
        dB += dscores.mT @ self.C
        ddelta = (dv * self.x).sum(-1).addcmul_(dexponent, self.A)
        draw = torch.ops.aten.softplus_backward(ddelta, self.raw, 1, 20)
        dA = (dexponent * self.delta).sum((0, 1, 2))
        return Gradients(dv.mul_(self.delta[..., None]), draw, dA, dB, dC), carry

    def _inside_back(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients inside a chunk: of v (B, K, H, q, P), exponents (B, K, H, q) and scores (B, K, G, q, q)."""
        g, v = _heads_first(g), _heads_first(self.v)
        scores, decays = self._scores(), self._decays()
        dweights = (g @ v.mT).mul_(decays)  # (B, K, H, q, q), now of the scores
        dscores = torch.unflatten(dweights, 2, (scores.shape[2], -1)).sum(3)
        dv = self._times_scores(decays, scores).mT @ g
        dlog = self._times_scores(dweights, scores)  # of log M[i, j]
        before = torch.ones(dlog.shape[-2:], dtype=dlog.dtype, device=dlog.device).triu_(1)  # [j < t]
        return dv, (dlog @ before).tril_().sum(-2), dscores

    def _pass_back(self, added: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """`pass_states` from the last chunk to the first; `added` (B, K, G, R P, N) is from a chunk's own y."""
        added = added.view(*added.shape[:2], *carry.shape[1:])
        carries = torch.empty_like(added)
        for k in reversed(range(added.shape[1])):
            carries[:, k] = carry
            carry = self._pass_on(carry, added[:, k], k)
        return carries, carry

    def _pass_on(self, state: Tensor, added: Tensor, k: int) -> Tensor:
        """added + decay over chunk k * state, without the state in rows where a document starts in the chunk."""
        passed = added.addcmul(self.from_entry[:, k, -1, :, None, None], state)
        for row, restarts in enumerate(self.restarts):
            if restarts[k]:
                passed[row] = added[row]
        return passed

    def _decays(self) -> Tensor:
        """M (B, K, H, q, q): decay from j to i, 0 for j > i and across a start."""
        sums = self.sums.transpose(2, 3).contiguous()
        high = sums.to(self.x.dtype)
        low = (sums - high).to(self.x.dtype)
        exponents = high[..., None] - high[..., None, :]
        exponents += low[..., None]
        exponents -= low[..., None, :]
        q = exponents.shape[-1]
        apart = torch.ones(q, q, dtype=torch.bool, device=exponents.device).triu_(1)
        if self.document is not None:
            apart = (apart | (self.document[..., None] != self.document[..., None, :]))[:, :, None]
        return exponents.masked_fill_(apart, -math.inf).exp2_()

    def _scores(self) -> Tensor:
        """C B^T (B, K, G, q, q)."""
        return self.C @ self.B.mT

    def _times_scores(self, weights: Tensor, scores: Tensor) -> Tensor:
        """weights (B, K, H, q, q) times its group's scores, in place."""
        torch.unflatten(weights, 2, (scores.shape[2], -1)).mul_(scores[:, :, :, None])
        return weights

    def _seen(self, entry: Tensor) -> Tensor:
        """What C reads of the entry states before decay (B, K, q, H, P); 0 where a document started since."""
        seen = self._by_head(self.C @ self._states_by_group(entry).mT)
        return seen if self.started is None else seen.masked_fill_(self.started[..., None, None], 0)

    def _states_by_group(self, states: Tensor) -> Tensor:
        """(B, K, H, P, N) -> (B, K, G, R P, N)."""
        return states.view(*self.B.shape[:3], -1, self.B.shape[4])

    def _by_group(self, x: Tensor) -> Tensor:
        """(B, K, q, H, P) -> (B, K, G, q, R P): heads of a group side by side, for one large product."""
        return x.reshape(*x.shape[:3], self.B.shape[2], -1).transpose(2, 3)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, K, G, q, R P) -> (B, K, q, H, P)."""
        return x.transpose(2, 3).reshape(self.x.shape)


def _heads_first(x: Tensor) -> Tensor:
    """(B, K, q, H, P) -> (B, K, H, q, P)."""
    return x.transpose(2, 3).contiguous()
