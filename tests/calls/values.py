"""Shape sets, and arrays out of the bytes that hypothesis drew: ties, denormals, 1e30, dead rows, gaps, budgets out of range."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.types import KV, DensePlan, Evidence, Plan, Tokens


class Sizes(NamedTuple):
    """One shape set; `i` is its number, from which options follow."""

    i: int
    b: int  # batch
    h: int  # query heads
    g: int  # KV heads
    n: int  # rows, slots
    t: int  # queries
    d: int  # head dim
    m: int  # rows kept
    w: int  # window rows

    @property
    def dtype(self) -> Any:
        return (np.float32, np.float32, jnp.bfloat16, np.float32, np.float16)[self.i % 5]

    @property
    def batch(self) -> tuple[int, ...]:
        """Of a sequence, or of a cache."""
        return self.one((self.b,), (self.b, self.g))

    @property
    def plan(self) -> str:
        return ("select", "merge", "dense")[self.i // 2 % 3]

    def one(self, *options: Any) -> Any:
        """An option of this set."""
        return options[self.i % len(options)]


SETS = tuple(
    Sizes(i, *row)
    for i, row in enumerate(
        [
            (2, 4, 2, 12, 3, 8, 5, 2), (1, 1, 1, 1, 1, 2, 1, 1), (3, 2, 2, 7, 1, 4, 3, 1), (1, 8, 2, 16, 16, 4, 16, 3),
            (2, 4, 1, 9, 9, 6, 4, 2), (2, 6, 3, 24, 1, 4, 8, 5), (1, 2, 1, 3, 2, 2, 3, 3), (4, 2, 1, 10, 4, 16, 9, 1),
            (2, 2, 1, 33, 33, 8, 12, 4), (1, 4, 4, 5, 1, 8, 2, 5), (5, 1, 1, 6, 6, 4, 6, 2), (2, 4, 2, 20, 1, 2, 19, 8),
            (1, 3, 1, 2, 2, 4, 1, 2), (2, 8, 4, 13, 5, 4, 7, 2), (3, 4, 2, 4, 4, 8, 3, 1), (1, 2, 2, 40, 7, 32, 10, 16),
            (2, 2, 2, 8, 2, 64, 4, 2), (1, 4, 2, 300, 300, 4, 20, 3), (7, 2, 1, 5, 1, 4, 4, 1), (2, 4, 2, 17, 17, 8, 30, 2),
            (1, 16, 2, 11, 1, 4, 3, 2), (2, 5, 5, 6, 3, 2, 5, 6), (1, 1, 1, 64, 1, 8, 16, 2), (3, 6, 2, 15, 15, 10, 6, 4),
        ]
    )
)  # fmt: skip

HUGE = 1e30  # the largest magnitude of a drawn float; its square is not finite in float32
WILD = np.random.default_rng(0).normal(size=256)
TAME = WILD.copy()
WILD[:24] = [0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, -1e-38, 1e-30, 1e-20, 0.5, -0.5, 1, -1, 1 + 2**-23, 2, 1e4, -1e4, 1e10, 1e15, -1e15,
             1e19, -1e19, HUGE, -HUGE]  # fmt: skip
WILD[24:64] = np.tile(WILD[:8], 5)
ROW = np.arange(256)
TABLES = {
    "tame": TAME,
    "wild": WILD,
    "huge": np.where(ROW % 3, HUGE, 0.0) * np.where(ROW % 2, 1, -1),
    "tiny": np.array([1e-45, -1e-45, 1e-38, -1e-38, 0.0, 1e-30, -1e-30, 2e-45])[ROW % 8],
    "ties": np.array([0.0, 1.0, 1.0, -1.0])[ROW % 4],
    "zero": np.zeros(256),
}


class Values:
    """Arrays out of drawn bytes."""

    def __init__(self, raw: bytes, s: Sizes):
        self.raw, self.s, self.at = np.frombuffer(raw, np.uint8), s, 0

    def bits(self, *shape: int) -> np.ndarray:
        """u8: the bytes in a cycle (ties, patterns), or random ones seeded by them."""
        self.at += 1
        if self.raw[0] % 2:
            return np.random.default_rng([*self.raw[:12].tolist(), self.at]).integers(0, 256, shape, np.uint8)
        i = (np.arange(math.prod(shape)) * (2 * (self.at % 5) + 1) + self.at) % len(self.raw)
        return self.raw[i].reshape(shape)

    def pick(self, *options: Any) -> Any:
        self.at += 1
        return options[int(self.raw[self.at % len(self.raw)]) % len(options)]

    def floats(self, *shape: int, dtype: Any = np.float32, least: float | None = None) -> np.ndarray:
        """Finite floats, none above HUGE."""
        x = TABLES[self.pick("tame", "wild", "wild", *TABLES)][self.bits(*shape)]
        x = np.abs(x) + least if least is not None else x
        top = min(HUGE, float(jnp.finfo(dtype).max) / 4)  # a rotation adds two
        return np.clip(x, -top, top).astype(dtype)

    def rows(self, *shape: int) -> np.ndarray:
        """Floats in the set's dtype."""
        return self.floats(*shape, dtype=self.s.dtype)

    def angles(self, r: int) -> np.ndarray:
        """Rotary frequencies: an id times one of them must be a float."""
        return np.minimum(self.floats(r, least=0), 1e6).astype(np.float32)

    def ints(self, low: int, high: int, *shape: int, dtype: Any = np.int32) -> np.ndarray:
        return ((self.bits(*shape).astype(np.int64) * 2654435761 + self.at) % (high - low + 1) + low).astype(dtype)

    def mask(self, *shape: int) -> np.ndarray:
        kind = self.pick("some", "some", "all", "none")
        return self.bits(*shape) % 2 == 0 if kind == "some" else np.full(shape, kind == "all")

    def positions(self, rows: int, n: int, *, packed: bool = True) -> np.ndarray:
        """i32 [rows n]: ascending, -1 = dead; rows may be empty or full, steps may jump."""
        kind = self.pick("some", "all", "none", "few", "holes")
        count = {"all": n, "none": 0, "few": 1}.get(kind)
        count = self.ints(0, n, rows) if count is None else np.full(rows, min(count, n))
        live = np.arange(n)[None] >= n - count[:, None]
        if not packed and kind == "holes":
            live = self.mask(rows, n)
        far = self.pick(0, 1, 10_000)
        step = 1 + far * (self.bits(rows, n).astype(np.int64) % (3 if far == 1 else 256))
        return np.where(live, np.cumsum(np.where(live, step, 0), 1) - 1, -1).astype(np.int32)

    def keep(self, *shape: int) -> np.ndarray:
        """Budgets: 0..n, and values out of range."""
        out = self.ints(0, self.s.n, *shape)
        return np.where(self.bits(*shape) % 7 == 0, self.ints(-(2**31), 2**31 - 1, *shape), out).astype(np.int32)

    def kv(self, slots: int | None = None, *, packed: bool = True) -> KV:
        s, n = self.s, self.s.n if slots is None else slots
        pos = self.positions(s.b * s.g, n, packed=packed).reshape(s.b, s.g, n)
        if not packed and self.pick(True, False):
            pos = np.take_along_axis(pos, np.argsort(self.bits(*pos.shape), -1), -1)  # slots in any order
        bias = self.pick(np.zeros(pos.shape, np.float32), np.log1p(self.bits(*pos.shape).astype(np.float32)), self.floats(*pos.shape))
        return KV(
            k=self.rows(s.b, s.g, n, s.d),
            v=self.rows(s.b, s.g, n, s.d),
            pos=pos,
            bias=bias,
            seen=(pos.max((1, 2)) + 1 + self.ints(0, 3, s.b)).astype(np.int32),
            delta=self.ints(-9, 9, s.b),
            cursor=self.ints(0, n),
            lost=self.ints(0, 9, s.b, s.g),
        )

    def tokens(self) -> Tokens:
        s = self.s
        b, n, a = s.b, s.n, s.one(1, 3)
        pos = self.positions(b, n)
        return Tokens(
            x=self.rows(b, n, s.d),
            pos=pos,
            rope=self.ints(0, 10**6, b, n, a),
            size=np.where(pos >= 0, self.floats(b, n, least=0), 0).astype(np.float32),
            kind=self.ints(0, 4, b, n, dtype=np.int8),
            segment=self.ints(-1, 3, b, n),
            cell=self.ints(-1, 9, b, n, 2),
            source=self.ints(-1, n - 1, b, n + 2),
            seen=(pos.max(1) + 1).astype(np.int32),
            delta=self.ints(-9, 9, b),
            lost=self.ints(0, 9, b),
        )

    def plan(self, batch: tuple[int, ...], n: int, m: int, kind: str) -> Plan | DensePlan:
        if kind == "dense":
            w = self.floats(*batch, m, n, least=0).astype(np.float64) * self.mask(*batch, m, n)
            return DensePlan((w / np.maximum(w.sum(-1, keepdims=True), 1e-300)).astype(np.float32))
        if kind == "select":
            mask = self.mask(*batch, n)
            mask &= np.cumsum(mask, -1) <= m
            upto = np.cumsum(mask, -1) + m - mask.sum(-1, keepdims=True)
            assign, weight = np.where(mask, upto - 1, -1), None
        else:
            assign, weight = self.ints(-1, m - 1, *batch, n), self.floats(*batch, n, least=0)
        member = assign[..., None, :] == np.arange(m)[:, None]
        index = np.where(member.any(-1), np.where(member, np.arange(n), n).min(-1), -1)
        return Plan(index.astype(np.int32), assign.astype(np.int32), weight, self.ints(0, 9, *batch))

    def evidence(self, slots: int | None = None) -> Evidence:
        """Everything that a method may ask for, none of it from a real model."""
        s, n = self.s, self.s.n if slots is None else slots
        weight = functools.partial(self.floats, least=0)
        return Evidence(
            rows=weight(s.b, s.h, s.w, n),
            received=weight(s.b, s.h, n),
            peak=weight(s.b, s.h, n),
            perturbed=weight(s.b, s.h, n),
            ranked=weight(s.b, s.h, n),
            cls=weight(s.b, s.h, n),
            keys=self.rows(s.b, s.g, n, s.d),
            queries=(self.floats(s.b, s.h, s.d), self.floats(s.b, s.h, s.d, s.d)),
            turned=self.rows(s.b, s.h, s.w, s.d),
            values=self.rows(s.b, s.g, n, s.d),
            lead=self.rows(s.b, s.h, s.d),
            asked=weight(s.b, s.h, n),
            asked_peak=weight(s.b, s.h, n),
            looked=weight(s.b, s.h, n),
            text=self.rows(s.b, s.d),
            detail=self.floats(s.b, n),
            change=weight(s.b, n, 2, 2),
            hidden=self.rows(s.b, n, 2 * s.d),
            weights={"o": self.rows(s.h * s.d, 2 * s.d)},
            freqs=np.logspace(0, -4, s.d // 2).astype(np.float32),
            layer=np.int32(self.pick(0, 1, 7)),
            key=jax.random.key(int(self.raw[0])) if s.one(True, False) else None,
        )
