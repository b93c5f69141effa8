"""Problems for the score kernels, by name; the same ones test them, lower them and time them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """`fn` of the package; b sequences, h and g heads, t queries, s keys or rows (p pages), d channels; `dead`: share without a token."""

    fn: str
    b: int = 2
    h: int = 4
    g: int = 2
    t: int = 40
    s: int = 96
    d: int = 16
    dtype: str = "float32"
    dead: float = 0.2
    lse: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        rows = lambda *n: jnp.asarray(rng.standard_normal(n) + 0.5, self.dtype)
        b, h, g, t, s, d = self.b, self.h, self.g, self.t, self.s, self.d
        if self.fn == "page_bounds":
            low = rows(b, g, s, d)
            return {"q": rows(b, h, d), "low": low, "high": low + jnp.abs(rows(b, g, s, d))}
        if self.fn == "chunk_means":
            return {"x": rows(b, h, s, d), "live": jnp.asarray(rng.random((b, h, s)) >= self.dead)}
        k_pos = np.broadcast_to(np.arange(s), (b, g, s)).copy()
        k_pos[rng.random(k_pos.shape) < self.dead] = -1
        q_pos = np.broadcast_to(np.arange(s - t, s), (b, t)).copy()
        q_pos[:, : t // 8] = -1
        lse = {"lse": jnp.asarray(rng.standard_normal((b, h, t)), jnp.float32).at[:, :, t // 2].set(-jnp.inf)} if self.lse else {}
        whole = lambda x: jnp.asarray(x, jnp.int32)
        return {"q": rows(b, h, t, d), "k": rows(b, g, s, d), "q_pos": whole(q_pos), "k_pos": whole(k_pos)} | lse

    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `arrays`."""
        of, f32, i32 = jax.ShapeDtypeStruct, jnp.float32, jnp.int32
        kind, (b, h, g, t, s, d) = jnp.dtype(self.dtype), (self.b, self.h, self.g, self.t, self.s, self.d)
        if self.fn == "page_bounds":
            return {"q": of((b, h, d), kind), "low": of((b, g, s, d), kind), "high": of((b, g, s, d), kind)}
        if self.fn == "chunk_means":
            return {"x": of((b, h, s, d), kind), "live": of((b, h, s), jnp.bool_)}
        out = {"q": of((b, h, t, d), kind), "k": of((b, g, s, d), kind), "q_pos": of((b, t), i32), "k_pos": of((b, g, s), i32)}
        return out | ({"lse": of((b, h, t), f32)} if self.lse else {})

    def keywords(self) -> dict[str, Any]:
        return dict(self.options) | ({"scale": self.d**-0.5} if self.fn == "low_bit" else {})


def _of(fn: str, *options: tuple[str, Any], **sizes) -> Case:
    return Case(fn, options=options, **sizes)


CASES = {
    "bounds": _of("page_bounds", s=37),
    "bounds mean bf16": _of("page_bounds", ("group", "mean"), h=8, s=600, d=64, dtype="bfloat16"),
    "bounds sum, a page": _of("page_bounds", ("group", "sum"), h=2, s=1, b=1),
    "means": _of("chunk_means", ("chunk", 16), h=2, s=96),
    "means ragged bf16": _of("chunk_means", ("chunk", 5), h=1, s=603, dtype="bfloat16"),
    "means of large chunks": _of("chunk_means", ("chunk", 300), h=1, s=9001, d=192, b=1),
    "means, all dead": _of("chunk_means", ("chunk", 16), s=40, dead=1.0),
    "means and bounds": _of("chunk_means", ("chunk", 16), ("bounds", True), h=2, s=1100, b=1, dead=0.9),
    "means and bounds bf16": _of("chunk_means", ("chunk", 51), ("bounds", True), h=1, s=204, dtype="bfloat16"),
    "low bit": _of("low_bit", ("block_q", 16), ("block_k", 32)),
    "low bit ragged bf16": _of("low_bit", ("block_q", 10), ("block_k", 5), ("tile", 5), t=95, s=131, h=2, dtype="bfloat16", lse=False),
    "8 bits": _of("low_bit", ("block_q", 8), ("block_k", 8), ("bits", 8), h=8, g=1, t=80, s=1030, b=1),
    "low bit, all dead": _of("low_bit", t=9, s=20, dead=1.0, h=2),
    "low bit, one query": _of("low_bit", t=1, s=33, h=2),
}
GPU = {  # small ones of what GPUs take, for the interpreter
    "bounds": _of("page_bounds", b=1, s=70, d=32, dtype="bfloat16"),
    "bounds mean": _of("page_bounds", ("group", "mean"), b=1, h=3, g=1, s=7, dtype="float16"),
    "means": _of("chunk_means", ("chunk", 5), b=1, h=1, s=333, dtype="bfloat16"),
    "low bit": _of("low_bit", ("block_q", 16), ("block_k", 5), b=1, h=2, g=1, t=20, s=60),
    "low bit, wide blocks": _of("low_bit", ("block_q", 70), ("block_k", 32), ("bits", 8), b=1, h=1, g=1, t=90, s=100, d=64, lse=False),
}
LARGE = {  # for lowering, compilation and benchmarks
    "bounds 128k": _of("page_bounds", b=1, h=32, g=8, s=8192, d=128, dtype="bfloat16"),
    "bounds f32": _of("page_bounds", b=4, h=32, g=8, s=1000, d=128),
    "means 128k": _of("chunk_means", ("chunk", 32), b=1, h=8, s=131072, d=128, dtype="bfloat16"),
    "means of 1009": _of("chunk_means", ("chunk", 1009), b=1, h=8, s=100000, d=128, dtype="bfloat16"),
    "means and bounds 128k": _of("chunk_means", ("chunk", 16), ("bounds", True), b=1, h=8, s=131072, d=128, dtype="bfloat16"),
    "means and bounds of 51": _of("chunk_means", ("chunk", 51), ("bounds", True), b=1, h=8, s=16384, d=128),
    "low bit 16k": _of("low_bit", b=1, h=32, g=8, t=16384, s=16384, d=128, dtype="bfloat16"),
    "low bit 4k of 5": _of("low_bit", ("block_q", 128), ("block_k", 51), b=2, h=8, g=8, t=4000, s=4003, d=64, dtype="bfloat16"),
}
