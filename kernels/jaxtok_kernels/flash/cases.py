"""Problems for the flash kernels, by name; the same ones test them, lower them and time them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """b sequences, h query and g KV heads, t queries, s keys, d channels of keys and c of values; `dead`: share of dead rows and keys."""

    b: int = 1
    h: int = 2
    g: int = 2
    t: int = 40
    s: int = 40
    d: int = 16
    c: int = 16
    dtype: str = "float32"
    packed: bool = True  # positions ascend, queries at the end of the keys; otherwise they are scattered
    heads: bool = False  # positions a KV head
    biased: bool = False
    segments: int = 0
    dead: float = 0.0
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    diagonal: int | None = None
    block_q: int | None = 16
    block_k: int | None = 16

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """q, k, v (float32; cast to `dtype`) and the named arrays: positions, and biases and segments where the case has them."""
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        shape = (self.b, self.g, self.s) if self.heads else (self.b, self.s)
        if self.packed:
            k_pos = np.broadcast_to(np.arange(self.s), shape).copy()
            q_pos = np.broadcast_to(np.arange(self.t) + self.s - self.t, (self.b, self.t)).copy()
        else:
            k_pos = np.argsort(rng.random(shape), -1)
            q_pos = rng.integers(0, self.s, (self.b, self.t))
        k_pos[rng.random(k_pos.shape) < self.dead] = -1
        q_pos[rng.random(q_pos.shape) < self.dead] = -1
        named: dict[str, np.ndarray] = {"q_pos": q_pos.astype(np.int32), "k_pos": k_pos.astype(np.int32)}
        if self.biased:
            named["bias"] = np.log(rng.integers(1, 4, (self.b, self.g, self.s))).astype(np.float32)
        if self.segments:
            named["k_segment"] = np.broadcast_to(np.arange(self.s) * self.segments // self.s, (self.b, self.s)).astype(np.int32)
            named["q_segment"] = np.take_along_axis(named["k_segment"], np.clip(q_pos, 0, self.s - 1), 1)
        q, k, v = normal(self.b, self.h, self.t, self.d), normal(self.b, self.g, self.s, self.d), normal(self.b, self.g, self.s, self.c)
        keys = k_pos if self.heads else k_pos[:, None]
        junk = lambda x, pos: np.where(pos[..., None] < 0, np.float32(1e30), x)  # what lies in dead rows never matters
        return junk(q, q_pos[:, None]), junk(k, keys), junk(v, keys), named

    def options(self) -> dict:
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "diagonal": self.diagonal}

    def blocks(self) -> dict:
        return {"block_q": self.block_q, "block_k": self.block_k}


CASES = {
    "causal, a ragged tail, GQA 4": Case(h=4, g=1, diagonal=0),
    "full, wide values, dead rows, biases": Case(causal=False, t=24, s=40, c=32, dead=0.3, biased=True),
    "scattered positions a head, soft-cap, biases": Case(b=2, h=4, packed=False, heads=True, dead=0.2, softcap=3.0, biased=True),
    "a chunk after a prefix, window": Case(t=24, s=72, diagonal=48, window=20),
    "segments, window, GQA 8": Case(h=8, g=1, t=48, s=48, segments=3, window=9, diagonal=0),
    "bf16": Case(dtype="bfloat16", h=4, biased=True, softcap=5.0, d=64, c=64),
    "one query, one block": Case(t=1, s=17, h=8, block_q=None, block_k=None),
    "one key": Case(t=5, s=1, packed=False, block_q=None, block_k=None, biased=True),
    "nothing live": Case(dead=1.0, biased=True, t=17, s=33),
}
GPU = {  # for the GPU interpreter, which is slow; tiles there are of 128 rows, so these hold several
    "a chunk after a prefix, ragged tails": Case(
        dtype="bfloat16", h=2, g=1, t=70, s=200, d=64, c=64, diagonal=130, block_q=None, block_k=64
    ),
    "all options": Case(
        h=2,
        g=1,
        t=70,
        s=140,
        d=80,
        c=64,
        dtype="bfloat16",
        packed=False,
        heads=True,
        biased=True,
        segments=2,
        dead=0.2,
        window=50,
        softcap=5.0,
        block_q=None,
        block_k=64,
    ),
}
LARGE = {  # for lowering and benchmarks
    "8k bf16": Case(h=32, g=8, t=8192, s=8192, d=128, c=128, dtype="bfloat16", diagonal=0, block_q=None, block_k=None),
    "8k bf16, all options": Case(
        h=32,
        g=4,
        t=8000,
        s=8192,
        d=128,
        c=128,
        dtype="bfloat16",
        packed=False,
        heads=True,
        biased=True,
        segments=4,
        window=4096,
        softcap=50.0,
        block_q=None,
        block_k=None,
    ),
    "a chunk of 128k": Case(h=32, g=8, t=2048, s=131072, d=128, c=128, dtype="bfloat16", diagonal=129024, block_q=None, block_k=None),
    "4k f32": Case(h=8, g=8, t=4096, s=4096, d=64, c=64, diagonal=0, biased=True, block_q=None, block_k=None),
    "one query": Case(h=32, g=8, t=1, s=16384, d=80, c=96, dtype="bfloat16", block_q=None, block_k=None),
}
