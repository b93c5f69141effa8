"""Problems for the read kernel, by name; the same ones test it, lower it and time it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """b sequences, g KV heads, e lists, r query rows a list, s slots in blocks of `block`, m listed; `live`: share of listed entries used."""

    b: int = 2
    g: int = 2
    e: int = 2
    r: int = 4
    s: int = 64
    d: int = 32
    c: int = 32
    block: int = 16
    m: int = 3
    live: float = 1.0
    dtype: str = "float32"
    softcap: float | None = None
    window: int | None = None
    dead: float = 0.1  # share of slots without a token
    stride: int | None = None
    turned: int = 0  # channels that turn by an id of each listed slot
    split: int | None = None
    full: bool = False  # every slot is read, without a table

    def arrays(self, seed: int = 0) -> tuple[np.ndarray | None, ...]:
        """q, q_pos, k, v, k_pos, bias, index (and ids, freqs) as numpy (float32; cast q, k, v to `dtype`)."""
        rng = np.random.default_rng(seed)
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        k_pos = np.stack([[rng.permutation(self.s) for _ in range(self.g)] for _ in range(self.b)]).astype(np.int32)
        k_pos[rng.random(k_pos.shape) < self.dead] = -1
        most = (self.s - self.block) // (self.stride or self.block) + 1
        index = np.stack([[rng.permutation(most)[: self.m] for _ in range(self.e)] for _ in range(self.b)]).astype(np.int32)
        index[rng.random(index.shape) >= self.live] = -1
        q_pos = rng.integers(self.s // 2, self.s, (self.b, self.r)).astype(np.int32)
        q_pos[:, self.r // 2 :][:, 1:] = -1 if self.r > 2 else q_pos[:, self.r // 2 :][:, 1:]  # dead queries
        bias = np.log(rng.integers(1, 4, k_pos.shape)).astype(np.float32)
        rows = lambda heads, n, d: normal(self.b, heads, n, d)
        out = rows(self.e, self.r, self.d), q_pos, rows(self.g, self.s, self.d), rows(self.g, self.s, self.c), k_pos, bias, index
        if self.full:
            return *out[:-1], None
        if not self.turned:
            return out
        ids = rng.integers(0, self.s, (self.b, self.e, self.m * self.block)).astype(np.int32)
        return *out, ids, (10_000.0 ** -np.linspace(0, 1, self.turned // 2)).astype(np.float32)

    def structs(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """The shapes of `arrays`, q, k, v in `dtype`."""
        of, kind, whole = jax.ShapeDtypeStruct, jnp.dtype(self.dtype), jnp.int32
        b, slots, n = self.b, (self.b, self.g, self.s), self.m * self.block
        q, k, v = (of(x, kind) for x in ((b, self.e, self.r, self.d), (*slots, self.d), (*slots, self.c)))
        out = q, of((b, self.r), whole), k, v, of(slots, whole), of(slots, jnp.float32)
        turned = (of((b, self.e, n), whole), of((self.turned // 2,), jnp.float32)) if self.turned else ()
        return *out, None if self.full else of((b, self.e, self.m), whole), *turned

    def options(self) -> dict:
        return dict(block=self.block, stride=self.stride, scale=self.d**-0.5, softcap=self.softcap, window=self.window, split=self.split)


CASES = {
    "pages": Case(),
    "several tiles": Case(s=1024, block=16, m=40, live=0.7),
    "bf16": Case(dtype="bfloat16", d=64, c=64),
    "rows": Case(block=1, m=17, live=0.8),
    "a list a query head": Case(e=8, r=1),
    "wide values": Case(c=64, d=16),
    "window and soft-cap": Case(window=20, softcap=5.0),
    "blocks of 51": Case(block=51, s=51 * 6, m=4, live=0.8),
    "bf16 rows": Case(block=1, m=17, live=0.8, dtype="bfloat16"),
    "bf16 blocks of 51": Case(block=51, s=51 * 6, m=4, live=0.8, dtype="bfloat16"),
    "unrotated pages": Case(turned=32, live=0.7),
    "unrotated rows": Case(turned=16, block=1, m=17, live=0.8, dtype="bfloat16"),
    "unrotated blocks of 51": Case(turned=32, block=51, s=51 * 6, e=8, r=1, m=1, dtype="bfloat16"),
    "a run of rows": Case(block=5, stride=1, s=64, e=8, r=1, m=1, turned=32),
    "a run of bf16 rows": Case(block=50, stride=1, s=306, e=8, r=1, m=1, dtype="bfloat16"),
    "split": Case(s=1024, block=16, m=40, live=0.7, split=2, b=1),
    "split rows": Case(block=1, s=700, m=600, b=1, split=3, dtype="bfloat16"),
    "split unrotated pages": Case(s=1024, block=16, m=40, live=0.7, split=3, b=1, turned=32),
    "all": Case(full=True, e=8, r=3, s=700, split=1),
    "all, split": Case(full=True, s=2100, split=3, d=64, c=16, dead=0.6, softcap=5.0, b=1),
    "all bf16": Case(full=True, s=40, dtype="bfloat16", window=20, g=1, e=8, r=1),
    "nothing listed": Case(live=0.0),
    "nothing live": Case(dead=1.0),
    "one query": Case(r=1, e=2, g=1),
}
GPU = {  # small ones of what GPUs take, for the interpreter
    "pages": Case(b=1, d=64, c=64, dtype="bfloat16", live=0.8),
    "split pages of 24, 16 channels": Case(
        b=1, g=1, e=2, r=2, block=24, s=240, m=9, d=16, c=48, dtype="bfloat16", split=2, window=99, softcap=5.0
    ),
    "rows": Case(b=1, g=1, block=1, m=70, s=90, d=64, c=64, dtype="float16", live=0.8),
    "rows of 128": Case(b=1, g=1, block=3, m=30, s=90, d=128, c=128, dtype="bfloat16", live=0.7, split=2),
    "all": Case(b=1, full=True, e=4, r=3, s=197, d=32, c=16, dtype="bfloat16", split=2),
}
LARGE = {  # for lowering and benchmarks
    "quest 16k": Case(b=1, g=8, e=8, r=4, s=16384, d=128, c=128, block=16, m=51, dtype="bfloat16"),
    "quest 128k": Case(b=1, g=8, e=8, r=4, s=131072, d=128, c=128, block=16, m=409, dtype="bfloat16"),
    "pages of 64": Case(b=1, g=8, e=8, r=4, s=131072, d=128, c=128, block=64, m=102, dtype="bfloat16"),
    "blocks of 51": Case(b=1, g=8, e=128, r=4, s=16320, d=128, c=128, block=51, m=1, dtype="bfloat16"),
    "rows 16k f32": Case(b=1, g=8, e=8, r=4, s=16384, d=128, c=128, block=1, m=819),
    "unrotated pages": Case(b=1, g=8, e=8, r=4, s=16384, d=128, c=128, block=16, m=51, turned=128, dtype="bfloat16"),
    "unrotated blocks of 51": Case(b=1, g=8, e=128, r=4, s=16320, d=128, c=128, block=51, m=1, turned=128, dtype="bfloat16"),
    "split rows": Case(b=1, g=1, e=1, r=8, s=131072, d=128, c=128, block=1, m=65536, dtype="bfloat16", split=4),
    "unrotated, split": Case(b=1, g=8, e=8, r=4, s=131072, d=128, c=128, block=16, m=2048, turned=128, dtype="bfloat16"),
    "all 128k": Case(b=1, g=8, e=8, r=4, s=131072, d=128, c=128, full=True, dtype="bfloat16"),
    "all 128k f32": Case(b=1, g=1, e=1, r=8, s=131072, d=128, c=128, full=True),
    "rows 16k": Case(b=1, g=8, e=8, r=4, s=16384, d=128, c=128, block=1, m=819, dtype="bfloat16"),
}
