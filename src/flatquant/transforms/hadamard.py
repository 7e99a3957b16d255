"""Hadamard matrices by construction: entries +-1, H H^T = n I, so that H / sqrt(n) spreads every channel evenly.

An order n > 2 must be a multiple of 4; whether every such order exists is unknown. Tried in this order:

- Sylvester (1867): H_2 (x) H_(n/2).
- Paley (J. Math. Phys. 12, 1933), from the squares of the field with q elements, q a prime power: order q + 1 for
  q = 3 mod 4 (I), order 2 (q + 1) for q = 1 mod 4 (II).
- Williamson (Duke Math. J. 11, 1944): order 4 m from four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4 m I,
  found by a search among sequences that a subgroup of the units mod m leaves alone.
- the Kronecker product of two smaller ones.

Nothing is tabulated. What was given up: orders whose only known constructions are others (the least is 188); there, and
at orders where none can exist, `largest_hadamard_divisor` says how much of n a Hadamard matrix can mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SYLVESTER = np.array([[1, 1], [1, -1]], dtype=np.int8)

# Sequences of the Williamson search: 2^11 of them make two million pairs, a second's work.
_MAX_ORBITS = 11


def hadamard(n: int) -> Float[Tensor, "{n} {n}"]:
    """A Hadamard matrix of order n.  # float32 of +-1, (n, n)

    Raises:
        ValueError: none of the constructions reaches n; ask `has_hadamard` first.
    """
    build = _construction(n)
    if build is None:
        raise ValueError(f"no construction here gives a Hadamard matrix of order {n}")
    return torch.from_numpy(build().astype(np.float32))


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` can make order n."""
    return _construction(n) is not None


@cache
def largest_hadamard_divisor(n: int) -> int:
    """The largest divisor of n that is an order of `hadamard`: 576 -> 576, 90 -> 2, 9 -> 1."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and has_hadamard(d))


def hadamard_split(n: int, blocks: int = 1) -> tuple[int, int]:
    """Factor n = n1 * n2 so that Hadamard matrices mix as much as can be; of those, the least n1 + n2, and n1 <= n2
    where it can be.

    11008 -> (64, 172), where the cheapest split, (86, 128), has a factor without a Hadamard matrix.

    Args:
        blocks: n1 is a multiple of it, as it divides n: a matrix for each block of n1 / blocks.
    """

    def unmixed(d: int) -> int:
        return d // largest_hadamard_divisor(d)

    whole = n // blocks
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    n1 = min(
        {a for d in small for a in (d, whole // d)},
        key=lambda a: (unmixed(a) * unmixed(whole // a), blocks * a + whole // a, a),
    )
    return blocks * n1, whole // n1


@cache
def _construction(n: int) -> Callable[[], np.ndarray] | None:
    """How to make order n, or None; the matrix itself is made when called.  # int8, (n, n)"""
    if n in (1, 2):
        return lambda: SYLVESTER[:n, :n]
    if n % 4:
        return None
    if (half := _construction(n // 2)) is not None:
        return lambda: np.kron(SYLVESTER, half())
    if _prime_power(n - 1):  # 3 mod 4
        return lambda: _paley_one(n - 1)
    if n % 8 == 4 and _prime_power(n // 2 - 1):  # 1 mod 4
        return lambda: _paley_two(n // 2 - 1)
    if n % 8 == 4 and (rows := _williamson_rows(n // 4)) is not None:
        return lambda: _williamson(rows)
    for d in range(4, math.isqrt(n) + 1, 4):
        if n % d == 0 and (left := _construction(d)) is not None and (right := _construction(n // d)) is not None:
            return lambda left=left, right=right: np.kron(left(), right())
    return None


# --------------------------------------------------------------------------------------------- Paley


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k."""
    if q < 2:
        return None
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _jacobsthal(q: int) -> np.ndarray:
    """chi(a - b) for all a, b of the field with q elements: 0 on the diagonal, 1 where a - b is a square, else -1."""
    decomposed = _prime_power(q)
    assert decomposed is not None
    p, k = decomposed
    elements = np.array(list(product(range(p), repeat=k)))  # polynomials over Z_p, highest power first, (q, k)
    place = p ** np.arange(k)[::-1]  # an element's number is its digits in base p
    chi = np.full(q, -1, dtype=np.int8)
    chi[[int(_multiply(a, a, p, _irreducible(p, k)) @ place) for a in elements]] = 1
    chi[0] = 0
    differences = (elements[:, None] - elements[None]) % p  # (q, q, k)
    return chi[differences @ place]


def _multiply(a: np.ndarray, b: np.ndarray, p: int, modulus: tuple[int, ...]) -> np.ndarray:
    """a b modulo the monic polynomial x^k + modulus, coefficients highest first.  # (k,)"""
    k = len(modulus)
    full = np.convolve(a, b) % p  # (2 k - 1,)
    for i in range(len(full) - k):
        full[i + 1 : i + 1 + k] = (full[i + 1 : i + 1 + k] - full[i] * np.array(modulus)) % p
    return full[-k:]


@cache
def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Lower coefficients of a monic irreducible polynomial of degree k: no product of two smaller ones."""
    if k == 1:
        return (0,)
    reducible = set()
    for degree in range(1, k // 2 + 1):
        for a in product(range(p), repeat=degree):
            for b in product(range(p), repeat=k - degree):
                reducible.add(tuple((np.convolve((1, *a), (1, *b)) % p).tolist())[1:])
    return next(c for c in product(range(p), repeat=k) if c not in reducible)


def _bordered(q: int, sign: int) -> np.ndarray:
    """[[0, 1], [sign, Q]]: a conference matrix of order q + 1, skew for sign -1, symmetric for sign 1."""
    c = np.zeros((q + 1, q + 1), dtype=np.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, sign, _jacobsthal(q)
    return c


def _paley_one(q: int) -> np.ndarray:
    return _bordered(q, -1) + np.eye(q + 1, dtype=np.int8)


def _paley_two(q: int) -> np.ndarray:
    eye = np.eye(q + 1, dtype=np.int8)
    return np.kron(_bordered(q, 1), SYLVESTER) + np.kron(eye, np.array([[1, -1], [-1, -1]], dtype=np.int8))


# --------------------------------------------------------------------------------------------- Williamson


def _williamson(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]] from the circulants' first rows."""
    m = len(rows[0])
    shift = (np.arange(m)[None] - np.arange(m)[:, None]) % m
    a, b, c, d = (row[shift].astype(np.int8) for row in rows)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _williamson_rows(m: int) -> list[np.ndarray] | None:
    """First rows of four symmetric circulants of order m (odd), as `_williamson` takes them, or None."""
    found = (_four_sequences(m, orbits) for orbits in _orbit_choices(m))
    return next((rows for rows in found if rows is not None), None)


def _orbit_choices(m: int) -> list[list[list[int]]]:
    """Partitions of 1 .. m-1 into orbits of subgroups of the units that hold -1, fewest orbits first."""
    units = [u for u in range(1, m) if math.gcd(u, m) == 1]
    groups = {frozenset(s * pow(u, e, m) % m for e in range(m) for s in (1, -1)) for u in units}
    choices = []
    for group in groups:
        orbits = {frozenset(g * x % m for g in group) for x in range(1, m)}
        if len(orbits) <= _MAX_ORBITS:
            choices.append(sorted(sorted(orbit) for orbit in orbits))
    return sorted(choices, key=lambda orbits: (len(orbits), orbits))


def _four_sequences(m: int, orbits: list[list[int]]) -> list[np.ndarray] | None:
    """Four sequences of +-1, constant on the orbits, whose cyclic autocorrelations cancel at every shift but 0."""
    signs = np.array(list(product((1, -1), repeat=len(orbits))), dtype=np.int64)  # (s, orbits)
    rows = np.ones((len(signs), m), dtype=np.int64)
    for index, orbit in enumerate(orbits):
        rows[:, orbit] = signs[:, index : index + 1]
    # Autocorrelations are constant on the orbits too: one shift of each is enough.
    correlation = np.stack([(rows * np.roll(rows, orbit[0], 1)).sum(1) for orbit in orbits], 1)  # (s, orbits)
    key = correlation @ np.random.default_rng(0).integers(1, 1 << 40, len(orbits))  # equal vectors have equal keys
    first, second = np.triu_indices(len(rows))
    sums = key[first] + key[second]
    # two pairs whose sums cancel
    order = np.argsort(sums)
    found = order[np.searchsorted(sums, -sums, sorter=order).clip(max=len(sums) - 1)]
    for i in np.flatnonzero(sums[found] == -sums):
        four = [first[i], second[i], first[found[i]], second[found[i]]]
        if not correlation[four].sum(0).any():
            return [rows[j] for j in four]
    return None
