"""Problems for the merge kernels, by name; the same ones test them, lower them and time them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Match:
    """n rows against m of d channels; `forbidden`: share of the m that takes no part (None = no bias); `whole`: small integers, with ties."""

    b: int = 2
    n: int = 24
    m: int = 20
    d: int = 16
    dtype: str = "float32"
    forbidden: float | None = None
    whole: bool = False

    def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)

        def rows(n):
            if self.whole:
                return jnp.asarray(rng.integers(-1, 2, (self.b, n, self.d)), self.dtype)
            x = rng.standard_normal((self.b, n, self.d))
            return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), self.dtype)

        out = {"a": rows(self.n), "c": rows(self.m)}
        if self.forbidden is not None:
            bias = np.where(rng.random((self.b, self.m)) < self.forbidden, -np.inf, rng.integers(0, 2, (self.b, self.m)))
            out["bias"] = jnp.asarray(bias, jnp.float32)
        return out

    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `arrays`."""
        of = jax.ShapeDtypeStruct
        out = {name: of((self.b, n, self.d), jnp.dtype(self.dtype)) for name, n in (("a", self.n), ("c", self.m))}
        return out if self.forbidden is None else out | {"bias": of((self.b, self.m), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Merge:
    """n rows of c channels into m groups; `dropped`: share that goes nowhere."""

    b: int = 2
    n: int = 24
    m: int = 16
    c: int = 16
    dtype: str = "float32"
    dropped: float = 0.1
    mean: bool = True

    def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        assign = np.where(rng.random((self.b, self.n)) < self.dropped, -1, rng.integers(0, self.m, (self.b, self.n)))
        return {
            "x": jnp.asarray(rng.standard_normal((self.b, self.n, self.c)), self.dtype),
            "weight": jnp.asarray(rng.integers(0, 4, (self.b, self.n)), jnp.float32),
            "assign": jnp.asarray(assign, jnp.int32),
        }

    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `arrays`."""
        of, rows = jax.ShapeDtypeStruct, (self.b, self.n)
        return {"x": of((*rows, self.c), jnp.dtype(self.dtype)), "weight": of(rows, jnp.float32), "assign": of(rows, jnp.int32)}


MATCH = {
    "match": Match(),
    "ties": Match(whole=True, d=4, n=300, m=700, forbidden=0.3),
    "ties bf16": Match(whole=True, d=4, dtype="bfloat16", n=70, m=130),
    "tiles": Match(n=600, m=1100, d=8, b=1),
    "one row, one partner": Match(n=1, m=1),
    "all forbidden": Match(forbidden=1.0),
}
MERGE = {
    "merge": Merge(),
    "sums": Merge(mean=False, n=37, m=5, c=30),
    "bf16": Merge(dtype="bfloat16", c=40),
    "several tiles": Merge(n=530, m=700, c=700, b=1, dropped=0.9),
    "all dropped": Merge(dropped=1.0),
    "one group": Merge(m=1, n=9),
}
GPU = {  # for the interpreter
    "match": Match(b=1, n=70, m=133),
    "ties bf16": Match(b=1, n=70, m=300, d=4, whole=True, forbidden=0.3, dtype="bfloat16"),
    "merge": Merge(b=1, c=40),
    "merge bf16 sums": Merge(b=1, n=20, m=7, c=128, mean=False, dtype="bfloat16"),
}
LARGE = {  # for lowering, compilation and benchmarks
    "match keys": Match(b=8, n=2048, m=2048, d=64),
    "match hidden": Match(b=1, n=8192, m=8100, d=1152, forbidden=0.1),
    "match bf16": Match(b=4, n=1000, m=999, d=128, dtype="bfloat16"),
    "merge hidden": Merge(b=8, n=4096, m=2048, c=1152, dtype="bfloat16"),
    "merge f32": Merge(b=4, n=577, m=300, c=1024),
    "merge cache": Merge(b=8, n=32768, m=8192, c=128, dtype="bfloat16"),
}
