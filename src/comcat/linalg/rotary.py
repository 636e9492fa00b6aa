"""Rotary position embedding: which pairs of components of queries and keys to keep, and with which weights.

Between projection and product the components of a query pair up and each pair is turned by an angle that grows with the
token's position (RoFormer, arXiv 2104.09864). With pairs as complex numbers the score of a query at s and a key at t is

    sum_p Re( conj(q_p) k_p e^{i (theta_p(t) - theta_p(s))} )

a sum over pairs, of which any can be left out. What is left can stand in for it: pairs turn apart only as fast as their
frequencies differ, and those that hardly turn over an image are as good as not turned. With ``u`` the key as the query
sees it, turned by the angle between the two, and positions independent of contents,

    E[u_p conj(u_p')] = E[k_p conj(k_p')] |E e^{i (theta_p - theta_p')}|^2
    E[u_p u_p']       = E[k_p k_p']       |E e^{i (theta_p + theta_p')}|^2

Where pairs turn freely nothing but ``E|k_p|^2`` is left of either: leaving p out then costs ``E|q_p|^2 E|k_p|^2 / 2``,
and nothing makes up for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.running import double
from .factorize import REFIT_RIDGE, whitening

#: How components pair up: i with i + d / 2, or 2 i with 2 i + 1.
LAYOUTS = ("half", "next")

#: How often queries and keys are refitted in turns; the error has settled by then.
_ROUNDS = 5


class Turns(NamedTuple):
    """How much of a product of two pairs outlasts the turns between queries and keys, from 0 to 1."""

    aligned: Tensor  # (groups or 1, d / 2, d / 2) of k_p conj(k_p')
    mirrored: Tensor  # (groups or 1, d / 2, d / 2) of k_p k_p'

    @classmethod
    def of(cls, moment: Tensor) -> Turns:
        """From E[t^T t] (groups, d, d) over the tokens, t all cosines, then all sines of the angles."""
        half = moment.shape[-1] // 2
        cc, cs, sc, ss = _blocks(double(moment), half, half)
        return cls((cc + ss).square() + (sc - cs).square(), (cc - ss).square() + (sc + cs).square())

    @classmethod
    def free(cls, pairs: int, like: Tensor) -> Turns:
        """Of pairs that all turn freely."""
        aligned = torch.eye(pairs, dtype=torch.float64, device=double(like).device)[None]
        return cls(aligned, torch.zeros_like(aligned))

    def seen(self, moment: Tensor, layout: str) -> Tensor:
        """The moment (groups, d, d) of keys as queries see them, or of queries as keys do, from their own."""
        places = _all_places(moment.shape[-1], layout, moment.device)
        halves = self._average(double(moment)[:, places][:, :, places])
        back = places.argsort()
        return halves[:, back][:, :, back]

    def _average(self, moment: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The same with first components first, for the pairs that are rows and those that are columns."""
        aligned, mirrored = self
        if rows is not None:
            aligned, mirrored = aligned[:, rows], mirrored[:, rows]
        if columns is not None:
            aligned, mirrored = aligned[:, :, columns], mirrored[:, :, columns]
        a, b, c, e = _blocks(moment, *aligned.shape[-2:])
        even, odd = aligned * (a + e), aligned * (c - b)
        even_mirrored, odd_mirrored = mirrored * (a - e), mirrored * (c + b)
        top = torch.cat([even + even_mirrored, odd_mirrored - odd], -1)
        bottom = torch.cat([odd + odd_mirrored, even - even_mirrored], -1)
        return torch.cat([top, bottom], -2) / 2


class PairOrder(NamedTuple):
    """Pairs of all heads of a layer, most worth keeping first."""

    order: Tensor  # (d / 2,) int64
    gains: Tensor  # (d / 2,): the expected squared error of the scores that each saves


def order_pairs(query_moment: Tensor, seen: Tensor, layout: str) -> PairOrder:
    """Backward elimination of pairs under the best refit of the queries to the rest, one order for all heads.

    Leaving out pair p costs ``tr(E[q_p^T q_p] Cov(u_p | the other u))``, with q refitted to what is left so far.

    Args:
        query_moment: (groups, d, d), before the rotation.
        seen: (groups, d, d), the moment of the keys as the queries see them (:meth:`Turns.seen`).
        layout: one of :data:`LAYOUTS`.
    """
    places = _all_places(seen.shape[-1], layout, double(seen).device)
    query, seen = (double(moment)[:, places][:, :, places] for moment in (query_moment, seen))
    half = seen.shape[-1] // 2
    root = whitening(seen, REFIT_RIDGE)
    seen = root.mT @ root
    left = list(range(half))
    order, gains = [], []
    while left:
        kept = torch.tensor([*left, *(half + p for p in left)], device=seen.device)
        inverse = torch.linalg.inv(seen[:, kept][:, :, kept])
        refit = seen[:, :, kept] @ inverse  # (groups, d, 2 left)
        errors = torch.linalg.inv(_of_pairs(inverse))  # (groups, left, 2, 2)
        costs = (_of_pairs(refit.mT @ query @ refit) * errors).sum((0, 2, 3))
        least = int(costs.argmin())
        gains.append(costs[least].clamp_min(0))
        order.append(left.pop(least))
    return PairOrder(torch.tensor(order[::-1], device=seen.device), torch.stack(gains[::-1]))


def refit_pairs(
    query_moment: Tensor, key_moment: Tensor, pairs: Tensor, turns: Turns, layout: str
) -> tuple[Tensor, Tensor]:
    """Maps (groups, d, 2 r) of queries and of keys to the kept pairs, of least squared error of the scores.

    Queries are fitted to given keys and keys to given queries, in turns, each a linear least-squares problem. What is
    fitted is the error alone, so that with all pairs kept both maps are the identity.

    Args:
        query_moment, key_moment: (groups, d, d), before the rotation, the keys centred.
        pairs: (r,), the kept ones.
    """
    places = _all_places(key_moment.shape[-1], layout, double(key_moment).device)
    query, key = (double(moment)[:, places][:, :, places] for moment in (query_moment, key_moment))
    half = key.shape[-1] // 2
    chosen = torch.eye(2 * half, dtype=torch.float64, device=key.device)[:, torch.cat([pairs, pairs + half])]
    q_map = k_map = chosen.expand(len(key), -1, -1)
    for _ in range(_ROUNDS):
        q_map = q_map + _correction(key, k_map, q_map, pairs, turns)
        k_map = k_map + _correction(query, q_map, k_map, pairs, turns)
    back = places.argsort()
    return q_map[:, back], k_map[:, back]


def _correction(moment: Tensor, other: Tensor, own: Tensor, pairs: Tensor, turns: Turns) -> Tensor:
    """What to add to one side's map (groups, d, 2 r) for the least squares, given the other side's and its moment."""
    crossed = moment @ other
    gram = turns._average(other.mT @ crossed, pairs, pairs)
    error = turns._average(crossed, None, pairs) - own @ gram
    root = whitening(gram, REFIT_RIDGE)
    return torch.cholesky_solve(error.mT, root, upper=True).mT


def _blocks(matrix: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (groups, 2 rows, 2 columns): first with first components, first with second, second with first, and so on."""
    top, bottom = matrix.split(rows, -2)
    return *top.split(columns, -1), *bottom.split(columns, -1)


def _of_pairs(matrix: Tensor) -> Tensor:
    """The blocks (groups, n, 2, 2) of single pairs in (groups, 2 n, 2 n)."""
    half = matrix.shape[-1] // 2
    blocks = [block.diagonal(dim1=-2, dim2=-1) for block in _blocks(matrix, half, half)]
    return torch.stack(blocks, -1).unflatten(-1, (2, 2))


def _all_places(width: int, layout: str, device: torch.device) -> Tensor:
    """(d,): the components, first ones first."""
    return pair_places(torch.arange(width // 2, device=device), width, layout)


def pair_places(pairs: Tensor, width: int, layout: str) -> Tensor:
    """(..., r) pairs to the (..., 2 r) components they are: first all first ones, then all second ones."""
    if layout == "half":
        return torch.cat([pairs, pairs + width // 2], -1)
    return torch.cat([2 * pairs, 2 * pairs + 1], -1)
