"""Problems for the block-sparse kernel, by name; the same ones test it, lower it and time it."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """b sequences, h query and g KV heads, e lists (0 = g), t queries in blocks of bq, s keys in blocks of bk; `density`: share of blocks listed.

    The last query stands at the last key. `counts` = "random" draws each list's length; `most` is the room of a list (0 = all blocks).
    """

    b: int = 1
    h: int = 2
    g: int = 1
    e: int = 0
    t: int = 48
    s: int = 64
    d: int = 16
    c: int = 16
    bq: int = 16
    bk: int = 16
    density: float = 0.5
    counts: str = "even"
    most: int = 0
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    bias: bool = False
    mask: float | None = None  # share of listed keys that the token mask lets through
    dead: float = 0.0  # share of keys and queries without a token; 2.0 = one live key

    @property
    def lists(self) -> int:
        return self.e or self.g

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.t // self.bq), -(-self.s // self.bk)

    @property
    def room(self) -> int:
        return self.most or max(1, round(self.density * self.blocks[1]))

    def arrays(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray | None]]:
        """([q, k, v, block_index, block_count], the arrays given by name) as numpy (float32; cast q, k, v to `dtype`)."""
        rng, (nq, nk) = np.random.default_rng(seed), self.blocks
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        at = (self.b, self.lists, nq)
        index = np.argsort(rng.random((*at, nk)), -1).astype(np.int32)[..., : self.room]
        index = np.pad(index, [(0, 0)] * 3 + [(0, self.room - index.shape[-1])], constant_values=-1)
        count = np.full(at, round(self.density * nk), np.int32)
        if self.counts == "random":
            count = rng.integers(0, min(self.room, nk) + 1, at).astype(np.int32)
            count[..., 0] = 0
        q_pos = np.tile(np.arange(self.s - self.t, self.s, dtype=np.int32), (self.b, 1))
        k_pos = np.tile(np.arange(self.s, dtype=np.int32), (self.b, self.g, 1))
        if self.dead <= 1:
            q_pos[rng.random(q_pos.shape) < self.dead] = -1
            k_pos[rng.random(k_pos.shape) < self.dead] = -1
        else:
            k_pos[..., np.arange(self.s) != 5] = -1
        bias = np.log(rng.integers(1, 4, k_pos.shape)).astype(np.float32) if self.bias else None
        mask = rng.random((*index.shape, self.bk)) < self.mask if self.mask is not None else None
        heads = lambda n, rows, width: normal(self.b, n, rows, width)
        given = [heads(self.h, self.t, self.d), heads(self.g, self.s, self.d), heads(self.g, self.s, self.c), index, count]
        return given, {"q_pos": q_pos, "k_pos": k_pos, "bias": bias, "token_mask": mask}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every argument that the case has."""
        nq, wide = self.blocks[0], (self.b, self.g, self.s)
        table = self.b, self.lists, nq, self.room
        of = {"q": (self.b, self.h, self.t, self.d), "k": (*wide, self.d), "v": (*wide, self.c)}
        found: dict[str, tuple[tuple[int, ...], str]] = {name: (shape, self.dtype) for name, shape in of.items()}
        found |= {
            "block_index": (table, "int32"),
            "block_count": (table[:3], "int32"),
            "q_pos": ((self.b, self.t), "int32"),
            "k_pos": (wide, "int32"),
        }
        found |= {} if self.bias is False else {"bias": (wide, "float32")}
        return found | ({} if self.mask is None else {"token_mask": ((*table, self.bk), "bool")})

    def options(self) -> dict:
        return dict(block_q=self.bq, block_k=self.bk, causal=self.causal, window=self.window, softcap=self.softcap)


CASES = {  # the first four share their programs
    "everything": Case(h=4, density=1.0, bias=True),
    "nothing listed": Case(h=4, density=0.0, most=4, bias=True),
    "one live key": Case(h=4, density=1.0, dead=2.0, bias=True),
    "all dead": Case(h=4, density=1.0, dead=1.0, bias=True),
    "heads of their own, unequal blocks": Case(b=2, h=4, g=2, e=4, bk=8, counts="random", most=6, softcap=3.0, mask=0.6, bias=True),
    "8 heads, ragged": Case(h=8, t=41, s=59, d=24, c=8, bk=24, density=1.0, counts="random", window=30, dead=0.2),
    "one query a block": Case(t=3, s=20, bq=1, bk=5, density=0.5, causal=False, mask=0.7),
    "one query, one key": Case(h=1, t=1, s=1, bq=16, bk=16, density=1.0),
    "bf16, lists of two heads": Case(
        b=2, h=4, e=2, g=1, t=40, bk=32, dtype="bfloat16", bias=True, density=1.0, counts="random", mask=0.8, softcap=5.0
    ),
}
GPU = {  # for the interpreter of GPU kernels, which is slow
    "two warpgroups": Case(h=2, t=40, s=66, bq=64, bk=64, dtype="bfloat16", density=1.0),
    "lists of their own, blocks of several tiles": Case(
        h=2,
        e=2,
        t=40,
        s=200,
        bq=24,
        bk=136,
        d=24,
        c=80,
        dtype="bfloat16",
        density=1.0,
        bias=True,
        mask=0.7,
        softcap=5.0,
        window=150,
        dead=0.1,
    ),
}


def _wide(**more: Any) -> Case:
    given: dict[str, Any] = dict(h=32, g=8, d=128, c=128, bq=128, bk=128, dtype="bfloat16")
    return Case(**(given | more))


LARGE = {  # for lowering, full compiles and benchmarks
    "8k": _wide(t=8192, s=8192, density=0.125),
    "128k": _wide(t=131072, s=131072, density=0.125),
    "a list a query head": _wide(t=8192, s=8192, density=0.125, e=32, bias=True),
    "blocks of 64 by 32, masked": _wide(t=8192, s=8192, density=0.125, mask=0.9, bias=True, softcap=30.0, bq=64, bk=32),
    "float32": _wide(t=4096, s=4096, density=0.25, window=1024, dtype="float32"),
    "regions of 49": _wide(b=4, h=8, t=49 * 49, s=49 * 49, d=64, c=64, bq=49, bk=49, density=4 / 49, causal=False),
    "heads of 256": _wide(h=8, g=4, t=8192, s=8192, d=256, c=256, density=0.125, softcap=50.0, window=4096),
}
