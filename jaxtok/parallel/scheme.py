"""Attention of a model whose sequence several devices share: give it to prefill, generate and step as `impl`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxtok.ops import evidence
from jaxtok.ops.attention import Shared, attention
from jaxtok.parallel.columns import ring_received
from jaxtok.parallel.layout import Layout
from jaxtok.parallel.ring import ring_attention
from jaxtok.parallel.token_ring import token_ring_attention
from jaxtok.parallel.ulysses import gathered_attention, ulysses_attention

SCHEMES: dict[str, Callable[..., Any]] = {
    "ring": ring_attention,
    "token_ring": token_ring_attention,
    "ulysses": ulysses_attention,
    "gathered": gathered_attention,
}

MASKS = ("causal", "full", "window", "padding", "segments")  # each works with every scheme and layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(Shared):
    """Sequences cut over the `sequence` axis of a mesh, batches over `data`, heads over `tensor` (axes that the mesh lacks are not cut).

        mesh = parallel.make_mesh(data=1, sequence=8, tensor=1)
        spread = parallel.Spread(mesh=mesh, scheme="ring", layout="zigzag")
        tokens, layers = decoder.prefill(cfg, params, tokens, recipe, new=64, impl=spread)

    Everything outside attention is one program over global arrays, which XLA cuts along. A prefill lays its rows out once, and its caches come
    out in their own order, cut over the sequence; compressors see them whole, so they keep exactly what they keep on one device. Room for new tokens is rounded up to equal shards.
    A step reads each device's slots and merges by the logsumexp. The rows of a prefill must be a multiple of the shards (zigzag: twice):
    pad them at the left, dead.

    Raises:
      ValueError: the scheme, the layout or the mesh is none; `sequence` is no axis of the mesh.
    """

    mesh: Mesh
    scheme: str = "ring"
    layout: str = "zigzag"
    data: str = "data"
    sequence: str = "sequence"
    tensor: str = "tensor"
    placed: bool = False  # set by the model where it has laid out the rows of a call (`laid`)

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme {self.scheme!r} must be one of {', '.join(SCHEMES)}")
        if self.sequence not in self.mesh.shape:
            raise ValueError(f"the mesh has the axes {', '.join(self.mesh.axis_names)}, and none is called {self.sequence!r}")
        self.cut  # noqa: B018  (made to check the layout)

    @property
    def n(self) -> int:
        return self.mesh.shape[self.sequence]

    @property
    def cut(self) -> Layout:
        return Layout(self.layout, self.n)

    # --- where arrays stand ---------------------------------------------------------------------------------------------------

    def spec(self, *axes: str | None) -> P:
        """data, sequence and tensor by name; None = not cut."""
        names = {"data": self.data, "sequence": self.sequence, "tensor": self.tensor}
        return P(*(names[a] if a is not None and names[a] in self.mesh.shape else None for a in axes))

    def hold(self, x: Array, *axes: str | None) -> Array:
        """x cut so, where its sizes allow."""
        fits = [a if a is not None and not x.shape[i] % self.mesh.shape.get(getattr(self, a), 1) else None for i, a in enumerate(axes)]
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*fits)))

    def laid(self) -> "Spread":
        """For calls over rows that `place` has put in the order of the layout."""
        return dataclasses.replace(self, placed=True)

    def rows(self, t: int) -> int:
        """Rows that t tokens take."""
        return self.cut.padded(t)

    def place(self, x: Array, axis: int = 1) -> Array:
        """Rows in the order of the layout."""
        if x.shape[axis] != self.cut.padded(x.shape[axis]):
            raise ValueError(
                f"{x.shape[axis]} rows cannot be cut into {self.n} equal shards ({self.layout}); pad them at the left to {self.cut.padded(x.shape[axis])}"
            )
        return self._exchanged(x, axis, home=False)

    def restore(self, x: Array, axis: int = 1) -> Array:
        """Rows in their own order."""
        return self._exchanged(x, axis, home=True)

    def _exchanged(self, x: Array, axis: int, home: bool) -> Array:
        """Rows from one order to the other, each sent straight to the device that holds it then."""
        if self.layout == "contiguous" or self.n == 1:
            return x
        c = x.shape[axis] // self.n
        if self.layout == "striped" and c % self.n:
            return self.cut.restore(x, x.shape[axis], axis=axis) if home else self.cut.place(x, axis=axis)
        spec = P(*(self.sequence if i == axis else None for i in range(x.ndim)))
        move = _striped if self.layout == "striped" else _zigzag
        run = functools.partial(move, axis=axis, name=self.sequence, home=home)
        names = frozenset((self.sequence,))  # other axes are left to XLA
        return jax.shard_map(run, mesh=self.mesh, in_specs=spec, out_specs=spec, axis_names=names)(x)

    def last(self, x: Array, w: int, axis: int) -> Array:
        """The last w tokens of rows in the order of the layout."""
        if self.layout == "contiguous":
            return lax.slice_in_dim(x, x.shape[axis] - w, x.shape[axis], axis=axis)
        at = jnp.argsort(jnp.asarray(self.cut.order(x.shape[axis])))[x.shape[axis] - w :]
        return jnp.take(x, at, axis)

    # --- what attention and its evidence are ----------------------------------------------------------------------------------

    def _mapped(self, run: Callable[..., Any], arrays: dict[str, Array | None], specs: dict[str, P], out: Any) -> Any:
        given = {name: x for name, x in arrays.items() if x is not None}
        call = jax.shard_map(lambda given: run(**given), mesh=self.mesh, in_specs=({n: specs[n] for n in given},), out_specs=out)
        return call(given)

    def _specs(self, q, k, k_pos, whole: bool = False) -> dict[str, P]:
        heads = "tensor" if not k.shape[1] % self.mesh.shape.get(self.tensor, 1) else None
        data = "data" if not q.shape[0] % self.mesh.shape.get(self.data, 1) else None
        own = None if whole else "sequence"
        rows, keys = self.spec(data, own), self.spec(data, "sequence")
        of = lambda own: self.spec(data, heads, own)
        return {
            "q": of(own), "k": of("sequence"), "v": of("sequence"), "bias": of("sequence"), "lse": of(own), "q_pos": rows, "q_segment": rows,
            "k_segment": keys, "k_pos": of("sequence") if k_pos.ndim == 3 else keys,
        }  # fmt: skip

    def attention(
        self, q, k, v, *, q_pos, k_pos, bias=None, q_segment=None, k_segment=None, diagonal=None, **options
    ) -> tuple[Array, Array]:
        """As `ops.attention.attention`: of rows that are laid out by the scheme, of others (a step, a chunk) by a split read."""
        arrays = dict(q=q, k=k, v=v, q_pos=q_pos, k_pos=k_pos, bias=bias, q_segment=q_segment, k_segment=k_segment)
        if k.shape[2] % self.n:  # a cache that is not cut
            return attention(**arrays, diagonal=diagonal, **options)
        whole = not self.placed
        specs = self._specs(q, k, k_pos, whole)
        if not whole:
            run = functools.partial(SCHEMES[self.scheme], axis=self.sequence, layout=self.layout, **options)
        else:
            run = functools.partial(_split, axis=self.sequence, out_dtype=options.pop("out_dtype", None) or q.dtype, **options)
        return self._mapped(run, arrays, specs, (specs["q"], specs["lse"]))

    def received(self, q, k, lse, *, q_pos, k_pos, bias=None, diagonal=None, **options) -> Array:
        """As `ops.evidence.received`: of rows that are laid out by a ring, of others, which all devices know, by each of its own keys."""
        arrays = dict(q=q, k=k, lse=lse, q_pos=q_pos, k_pos=k_pos, bias=bias)
        if k.shape[2] % self.n:
            return evidence.received(**arrays, diagonal=diagonal, **options)
        whole = not self.placed
        specs = self._specs(q, k, k_pos, whole)
        if whole:
            run = functools.partial(evidence.received, **options)
            return self._mapped(run, arrays, specs, P(specs["q"][0], specs["q"][1], self.sequence))
        run = functools.partial(ring_received, axis=self.sequence, layout=self.layout, **options)
        return self._mapped(run, arrays, specs, specs["lse"])

    def some_rows(self, q, k, lse, *, q_pos, k_pos, bias=None, **options) -> Array:
        """As `ops.evidence.rows`, for a few queries that all devices know."""
        if k.shape[2] % self.n:
            return evidence.rows(q, k, lse, q_pos=q_pos, k_pos=k_pos, bias=bias, **options)
        specs = self._specs(q, k, k_pos, whole=True)
        arrays = dict(q=q, k=k, lse=lse, q_pos=q_pos, k_pos=k_pos, bias=bias)
        data, heads = specs["q"][0], specs["q"][1]
        run = lambda q, k, lse, **see: evidence.rows(q, k, lse, **see, **options)
        return self._mapped(run, arrays, specs, P(data, heads, None, self.sequence))


def _zigzag(x: Array, *, axis: int, name: str, home: bool) -> Array:
    """Chunks r and 2n - 1 - r of device r, one of which is even, become chunks 2r and 2r + 1 (home), or back: two permutations."""
    n, rank = lax.axis_size(name), lax.axis_index(name)
    even = [r if r % 2 == 0 else 2 * n - 1 - r for r in range(n)]  # the even chunk of device r
    odd = [r if r % 2 else 2 * n - 1 - r for r in range(n)]
    first, second = jnp.split(x, 2, axis)
    low = rank % 2 == 0  # whether chunk r is the even one
    if home:
        a, b = jnp.where(low, first, second), jnp.where(low, second, first)
        a = lax.ppermute(a, name, [(r, even[r] // 2) for r in range(n)])
        b = lax.ppermute(b, name, [(r, odd[r] // 2) for r in range(n)])
        return jnp.concatenate([a, b], axis)
    a = lax.ppermute(first, name, [(even[r] // 2, r) for r in range(n)])
    b = lax.ppermute(second, name, [(odd[r] // 2, r) for r in range(n)])
    return jnp.concatenate([jnp.where(low, a, b), jnp.where(low, b, a)], axis)


def _striped(x: Array, *, axis: int, name: str, home: bool) -> Array:
    """Every n-th token becomes a run of them (home), or back: one all-to-all."""
    n, c = lax.axis_size(name), x.shape[axis]
    cut = lambda x, sizes: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
    if home:
        got = lax.all_to_all(x, name, axis, axis, tiled=True)  # from each device the c/n tokens that come home
        return jnp.swapaxes(cut(got, (n, c // n)), axis, axis + 1).reshape(x.shape)
    return lax.all_to_all(jnp.swapaxes(cut(x, (c // n, n)), axis, axis + 1).reshape(x.shape), name, axis, axis, tiled=True)


def _split(q, k, v, *, axis: str, out_dtype, **see) -> tuple[Array, Array]:
    """Attention of queries that all devices know to the keys of all of them: each to its own, merged by the logsumexp."""
    out, lse = attention(q, k, v, out_dtype=jnp.float32, **see)
    top = lax.pmax(lax.stop_gradient(lse), axis)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    mass = jnp.exp(lse - top)
    total = lax.psum(mass, axis)
    some = total > 0
    norm = jnp.where(some, total, 1.0)
    out = lax.psum(mass[..., None] * out, axis) / norm[..., None]
    return out.astype(out_dtype), jnp.where(some, top + jnp.log(norm), -jnp.inf)


def make_mesh(*, data: int = 1, sequence: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """One mesh (data, sequence, tensor) over the first devices, which XLA cuts arrays along by itself.

    Raises:
      ValueError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    many = data * sequence * tensor
    if min(data, sequence, tensor) < 1 or many > len(devices):
        raise ValueError(f"data={data}, sequence={sequence}, tensor={tensor} want {many} devices, and there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, sequence, tensor), ("data", "sequence", "tensor"), axis_types=auto, devices=devices[:many])
