"""The problems that bench_kernels, tune_kernels and gpu_report run: every kernel on its cases, on the shapes of the goals, and dense attention.

Arrays of large problems are made on the device. Where a float32 reference of all of it would not fit, a sample of the query rows (of the keys, of
the query blocks, of the heads) is compared. FLOPs and bytes are the algorithm's: products of visible or listed pairs; every array that has to be
read or written, once, of a cache the listed rows, of K and V under a block table the listed blocks.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtok_kernels import block_sparse, column_sum, flash, merge, read, scores
from jaxtok_kernels.block_sparse import cases as sparse_cases
from jaxtok_kernels.block_sparse import reference as sparse_reference
from jaxtok_kernels.column_sum import cases as column_cases
from jaxtok_kernels.column_sum import reference as column_reference
from jaxtok_kernels.flash import cases as flash_cases
from jaxtok_kernels.flash import reference as flash_reference
from jaxtok_kernels.merge import cases as merge_cases
from jaxtok_kernels.merge import reference as merge_reference
from jaxtok_kernels.read import cases as read_cases
from jaxtok_kernels.read import reference as read_reference
from jaxtok_kernels.scores import cases as score_cases
from jaxtok_kernels.scores import reference as score_reference

KERNELS = "flash", "column_sum", "block_sparse", "read", "scores", "merge"
DENSITIES = 1, 2, 4, 8, 16  # 1/rho
CHECK, TIME, GRAD = "check", "time", "grad"  # CASES, for numbers; what is timed; CASES with their gradients


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Those of the goals: query and KV heads, channels, tokens of a prefill, slots of a cache, rows of it that are read, tokens and blocks under a table."""

    h: int = 32
    g: int = 8
    d: int = 128
    prefill: tuple[int, ...] = (8192, 32768, 131072)
    cache: int = 131072
    rows: int = 2048
    pages: tuple[int, ...] = (16, 64)
    table: int = 32768
    block: int = 128
    copy: int = 2**31  # bytes
    product: int = 8192  # rows of a square matrix


GOAL = Shapes()
TINY = Shapes(h=4, g=2, d=16, prefill=(16, 32, 48), cache=256, rows=16, table=64, block=16, copy=2**12, product=32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`call(impl, block sizes)` is a function of the arrays of `shared` and then of `own`, which differ from set to set; `compare(args, out)`
    gives what was found and what is right, as float32. peer: the dense attention that does the same work without the method."""

    kernel: str
    name: str
    own: Callable[[int], tuple]
    shared: Callable[[int], tuple] = lambda seed: ()
    call: Callable[[str, dict[str, int]], Callable[..., Any]]
    compare: Callable[[tuple, Any], tuple[Any, Any]]
    dtype: str
    unit: str = ""  # whose matrix products are the ceiling, if not dtype's
    flops: float = 0.0
    bytes: float = 0.0
    peer: str = ""
    tol: float | None = None
    least: float = 0.0  # the tolerance is of max(least, max|right|): long sums of random rows are small, and zeros must not pass for them
    after: str = "xla"  # the impl where the kernel says that it cannot do this; "" = none


def label(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def normal(seed: int, at: int, shape, dtype) -> jax.Array:
    return _normal(seed * 16 + at, tuple(shape), jnp.dtype(dtype))


def size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def some(n: int, many: int, seed: int = 0) -> np.ndarray:
    """`many` of the first n numbers, the first and the last among them; all if there are no more."""
    if n <= many:
        return np.arange(n)
    return np.unique(np.r_[0, n - 1, np.random.default_rng(seed).choice(n, many - 2, replace=False)])


def visible(case, named: dict[str, np.ndarray]) -> np.ndarray:
    """How many keys each query sees, [b e t]."""
    q, k = named["q_pos"], named["k_pos"].reshape(case.b, -1, case.s)
    mine = named.get("q_segment", np.zeros_like(q))
    theirs = np.broadcast_to(named.get("k_segment", np.zeros((case.b, case.s), np.int32))[:, None], k.shape)
    out = np.zeros((*k.shape[:2], case.t), np.int64)
    for b, e in np.ndindex(k.shape[:2]):
        for n in np.unique(mine[b]):
            keys = np.sort(k[b, e][(k[b, e] >= 0) & (theirs[b, e] == n)])
            rows = (q[b] >= 0) & (mine[b] == n)
            upto = np.searchsorted(keys, q[b][rows], "right") if case.causal else len(keys)
            before = 0 if case.window is None else np.searchsorted(keys, q[b][rows] - case.window, "right")
            out[b, e, rows] = upto - before
    return out


# flash and column_sum ------------------------------------------------------------------------------------------------------------------


def _attention(case, seed: int, exact: bool):
    """q, k, v and the named arrays; `exact`: the case's own, junk in dead rows and all."""
    small = case if exact else dataclasses.replace(case, d=1, c=1)
    q, k, v, named = small.arrays(seed)
    if exact:
        q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k, v))
    else:
        heads = (case.h, case.t, case.d), (case.g, case.s, case.d), (case.g, case.s, case.c)
        q, k, v = (normal(seed, i, (case.b, *x), case.dtype) for i, x in enumerate(heads))
    return q, k, v, named


def _plain(case) -> dict[str, Any]:
    """The options of a reference that gets a sample of the rows: `diagonal` only promises what positions say."""
    return case.options() | {"diagonal": None}


def _sampled(case, q, k, v, named, rows, **options):
    cut = {n: x[:, rows] if n.startswith("q_") else x for n, x in named.items()}
    return flash_reference.flash(q[:, :, rows], k, v, **cut, **options)


def flash_row(name: str, case, *, exact: bool = False, grad: bool = False, peer: str = "") -> Row:
    """The forward pass; `grad`: with the gradients for q, k, v and bias of a sum that weighs out and lse."""
    small = dataclasses.replace(case, d=1, c=1).arrays(0)[-1]
    rows = some(case.t, 16 if case.s < 2**16 else 4) if not exact else np.arange(case.t)
    pairs = visible(case, small).sum() * case.h / (case.g if case.heads else 1)
    numbers = case.b * (case.h * case.t * (case.d + case.c) + case.g * case.s * (case.d + case.c))

    def own(seed):
        q, k, v, named = _attention(case, seed, exact)
        return q, k, v, jax.tree.map(jnp.asarray, named)

    def loss(fn, q, k, v, bias, named):
        out, lse = fn(q, k, v, **named, **({} if bias is None else {"bias": bias}))
        return jnp.sum(jnp.cos(out.astype(jnp.float32))) + jnp.sum(jnp.sin(jnp.where(lse > -jnp.inf, lse, 0)))

    def gradients(fn, q, k, v, named):
        bias, rest = named.get("bias"), {n: x for n, x in named.items() if n != "bias"}
        return jax.grad(lambda q, k, v, bias: loss(fn, q, k, v, bias, rest), (0, 1, 2) if bias is None else (0, 1, 2, 3))(q, k, v, bias)

    def call(impl, sizes):
        fn = lambda q, k, v, **named: flash.flash(q, k, v, **named, **case.options(), **(case.blocks() | sizes), impl=impl)[:2]
        return (lambda *a: gradients(fn, *a)) if grad else lambda q, k, v, named: fn(q, k, v, **named)

    @jax.jit
    def want(q, k, v, named):
        if not grad:
            return _sampled(case, q, k, v, named, rows, **_plain(case))
        if exact:
            return gradients(lambda q, k, v, **n: flash_reference.flash(q, k, v, **n, **case.options()), q, k, v, named)
        cut = {n: x[:, rows] if n.startswith("q_") else x for n, x in named.items()}
        return gradients(lambda q, k, v, **n: flash_reference.flash(q, k, v, **n, **_plain(case)), q[:, :, rows], k, v, cut)[:1]

    def compare(args, out):
        if grad:
            return (out if exact else (out[0][:, :, rows],)), want(*args)
        return (out[0][:, :, rows], out[1][:, :, rows]), want(*args)

    return Row(
        kernel="flash", name=name, own=own, call=call, compare=compare, dtype=case.dtype, peer=peer, after="",
        flops=(7 if grad else 2) * pairs * (case.d + case.c), tol=1e-5 if grad and case.dtype == "float32" else None,
        bytes=(2 if grad else 1) * numbers * size(case.dtype) + 4 * case.b * case.h * case.t,
    )  # fmt: skip


def column_row(name: str, case, *, exact: bool = False, peer: str = "") -> Row:
    """lse is what the reference finds; of large problems log(keys seen) + 1/2, about what random rows give."""
    small = dataclasses.replace(case, d=1, c=1).arrays(0)[-1]
    keys = some(case.s, 64 if case.t < 2**16 else 16) if not exact else np.arange(case.s)
    pairs = visible(case, small).sum() * case.h / (case.g if case.heads else 1)

    def own(seed):
        q, k, v, named = _attention(case, seed, exact)
        known = jax.tree.map(jnp.asarray, named)
        if exact:
            return q, k, flash_reference.flash(q, k, v, **known, **case.options())[1], known
        number = visible(case, named)
        lse = np.where(number > 0, np.log(np.maximum(number, 1)) + 0.5, -np.inf).astype(np.float32)
        return q, k, jnp.asarray(np.repeat(lse, case.h // lse.shape[1], 1)), known

    def call(impl, sizes):
        return lambda q, k, lse, named: column_sum.column_sum(q, k, lse, **named, **case.options(), **(case.blocks() | sizes), impl=impl)

    @jax.jit
    def want(q, k, lse, named):
        cut = {n: x[..., keys] if n.startswith("k_") or n == "bias" else x for n, x in named.items()}
        return column_reference.column_sum(q, k[:, :, keys], lse, **cut, **(case.options() if exact else _plain(case)))

    return Row(
        kernel="column_sum", name=name, own=own, call=call, compare=lambda args, out: (out[..., keys], want(*args)), dtype=case.dtype,
        flops=2 * pairs * case.d, peer=peer, after="",
        bytes=case.b * (size(case.dtype) * case.d * (case.h * case.t + case.g * case.s) + 4 * case.h * (case.t + case.s)),
    )  # fmt: skip


# block_sparse --------------------------------------------------------------------------------------------------------------------------


def spread(case, share: float, seed: int):
    """A causal table of `share` of the blocks that each block of queries may see, at least its own."""
    nq, nk = case.blocks
    order = np.random.default_rng(seed).random((case.b, case.lists, nq, nk), np.float32)
    own = np.minimum((np.arange(nq) * case.bq + case.s - case.t + case.bq - 1) // case.bk, nk - 1)
    order = np.where(np.arange(nk)[None] > own[:, None], 2, np.where(np.arange(nk)[None] == own[:, None], -1, order))
    count = np.maximum(1, np.round(share * (own + 1))).astype(np.int32)
    index = np.argsort(order, -1)[..., : count.max()].astype(np.int32)
    return index, np.broadcast_to(count, index.shape[:3]).copy()


def sparse_row(name: str, case, *, exact: bool = False, grad: bool = False, share: float | None = None, peer: str = "") -> Row:
    """share: of a table by `spread` instead of the case's own."""
    nq = case.blocks[0]
    blocks = np.arange(nq) if exact else some(nq - (case.t % case.bq > 0), 3 if case.s * case.room < 2**22 else 2)
    rows = (blocks[:, None] * case.bq + np.arange(case.bq)).reshape(-1)
    rows = rows[rows < case.t]

    def tables(seed):
        given, named = (case if exact else dataclasses.replace(case, d=1, c=1)).arrays(seed)
        if share is not None:
            given[3:5] = spread(case, share, seed)
        return given, named

    def own(seed):
        given, named = tables(seed)
        if exact:
            q, k, v = (jnp.asarray(x, case.dtype) for x in given[:3])
        else:
            heads = (case.h, case.t, case.d), (case.g, case.s, case.d), (case.g, case.s, case.c)
            q, k, v = (normal(seed, i, (case.b, *x), case.dtype) for i, x in enumerate(heads))
        named = {n: jnp.asarray(x) for n, x in named.items() if x is not None}
        return q, k, v, jnp.asarray(given[3]), jnp.asarray(given[4]), named

    def gradients(fn, q, k, v, index, count, named):
        bias, rest = named.get("bias"), {n: x for n, x in named.items() if n != "bias"}

        def loss(q, k, v, bias):
            out, lse = fn(q, k, v, index, count, **rest, bias=bias)
            return jnp.sum(jnp.cos(out.astype(jnp.float32))) + jnp.sum(jnp.sin(jnp.where(lse > -jnp.inf, lse, 0)))

        return jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3))(q, k, v, bias)

    def call(impl, sizes):
        fn = lambda *a, **named: block_sparse.block_sparse(*a, **named, **case.options(), impl=impl)[:2]
        return (lambda *a: gradients(fn, *a)) if grad else lambda q, k, v, i, n, named: fn(q, k, v, i, n, **named)

    @jax.jit
    def want(q, k, v, index, count, named):
        fn = lambda *a, **n: sparse_reference.block_sparse(*a, **n, **case.options())
        if grad and exact:
            return gradients(fn, q, k, v, index, count, named)
        cut = {"q_pos": named["q_pos"][:, rows]} | ({"token_mask": named["token_mask"][:, :, blocks]} if "token_mask" in named else {})
        given = q[:, :, rows], k, v, index[:, :, blocks], count[:, :, blocks]
        return gradients(fn, *given, named | cut)[:1] if grad else fn(*given, **(named | cut))

    def compare(args, out):
        if grad:
            return (out if exact else (out[0][:, :, rows],)), want(*args)
        return tuple(x[:, :, rows] for x in out), want(*args)

    listed = tables(0)[0][4].sum() if not exact else 0
    tiles = float(listed) * case.h / case.lists * case.bq * case.bk
    each = size(case.dtype) * (case.d + case.c) + 8 + 12 * (case.mask is not None)
    return Row(
        kernel="block_sparse", name=name, own=own, call=call, compare=compare, dtype=case.dtype, peer=peer, after="",
        flops=(7 if grad else 2) * tiles * (case.d + case.c), tol=1e-5 if grad and case.dtype == "float32" else None,
        bytes=float(listed) * case.bk * each + case.b * case.h * case.t * (size(case.dtype) * (case.d + case.c) + 4),
    )  # fmt: skip


# read ----------------------------------------------------------------------------------------------------------------------------------


def read_row(name: str, case, *, exact: bool = False, live: bool = False, peer: str = "") -> Row:
    """live: every query is alive at the last position, as in decoding."""
    options = case.options()
    listed = {n: x for n, x in options.items() if n != "split"}

    def arrays(seed):
        small = case if exact else dataclasses.replace(case, d=1, c=1)
        q, q_pos, k, v, k_pos, bias, index, *rest = small.arrays(seed)
        return q, (np.full_like(q_pos, case.s - 1) if live else q_pos), k, v, k_pos, bias, index, rest

    def shared(seed):
        _, _, k, v, k_pos, bias, _, _ = arrays(seed)
        if exact:
            k, v = (jnp.asarray(x, case.dtype) for x in (k, v))
        else:
            k, v = (normal(seed, i, (case.b, case.g, case.s, n), case.dtype) for i, n in enumerate((case.d, case.c)))
        return k, v, jnp.asarray(k_pos), jnp.asarray(bias)

    def own(seed):
        q, q_pos, _, _, _, _, index, rest = arrays(seed)
        q = jnp.asarray(q, case.dtype) if exact else normal(seed, 2, (case.b, case.e, case.r, case.d), case.dtype)
        return q, jnp.asarray(q_pos), *(None if x is None else jnp.asarray(x) for x in (index, *rest))

    def order(fn):
        return lambda k, v, k_pos, bias, q, q_pos, *rest: fn(q, q_pos, k, v, k_pos, bias, *rest)

    want = jax.jit(order(lambda *a: read_reference.read(*a, **listed)))
    slots = case.b * case.g * case.s if case.full else case.b * case.e * case.m * case.block
    numbers = case.b * case.e * case.r * (case.d + case.c)
    return Row(
        kernel="read", name=name, shared=shared, own=own, dtype=case.dtype, peer=peer, after="",
        call=lambda impl, sizes: order(lambda *a: read.read(*a, **(options | sizes), impl=impl)[:2]),
        compare=lambda args, out: (out, want(*args)),
        flops=2 * slots * case.r * (case.e / case.g if case.full else 1) * (case.d + case.c),
        bytes=slots * (size(case.dtype) * (case.d + case.c) + 8) + numbers * size(case.dtype),
    )  # fmt: skip


def cache(o: Shapes, seed: int, dtype: str):
    """A full cache of one sequence."""
    from jaxtok.core.types import KV

    k, v = (normal(seed, i, (1, o.g, o.cache, o.d), dtype) for i in range(2))
    pos = jnp.broadcast_to(jnp.arange(o.cache, dtype=jnp.int32), (1, o.g, o.cache))
    whole = lambda n, shape: jnp.full(shape, n, jnp.int32)
    return KV(k, v, pos, jnp.zeros(pos.shape), whole(o.cache, (1,)), whole(0, (1,)), whole(0, ()), whole(0, (1, o.g)))


def freqs(o: Shapes) -> jax.Array:
    return 1e4 ** -(jnp.arange(0, o.d, 2) / o.d)


def _step(o: Shapes, name: str, method, shared, own, choose, traffic, dtype="bfloat16") -> Row:
    """A reader's step, its choice and the attention: choose(kv, state, q, sight) -> (state, index, queries as they meet the keys)."""
    from jaxtok.core.reader import Sight
    from jaxtok.ops.read import attend_blocks

    pos = jnp.full((1, 1), o.cache - 1, jnp.int32)

    def call(impl, sizes):
        def run(kv, *rest):
            sight = Sight(freqs(o), impl=impl)
            state, index, q = choose(kv, *rest, sight)
            return *attend_blocks(q, pos, kv, index.index, sight, method.block, index.rope), state

        return run

    @jax.jit
    def want(kv, *rest):
        _, index, q = choose(kv, *rest, Sight(freqs(o), impl="xla"))
        turned = () if index.rope is None else (index.rope, freqs(o))
        rows, at = q.reshape(1, o.g, o.h // o.g, o.d), jnp.tile(pos, (1, o.h // o.g))
        out, lse = read_reference.read(rows, at, kv.k, kv.v, kv.pos, kv.bias, index.index, *turned, block=method.block, scale=o.d**-0.5)
        return out.reshape(1, o.h, 1, o.d), lse.reshape(1, o.h, 1)

    return Row(
        kernel="read", name=name, shared=shared, own=own, call=call, compare=lambda args, out: (out[:2], want(*args)), dtype=dtype,
        peer=f"decode {label(o.cache)}", bytes=traffic,
    )  # fmt: skip


def quest_row(o: Shapes, page: int, dtype: str = "bfloat16") -> Row:
    """Quest as a model calls it: the bounds of the pages by XLA, the best pages, attention to them."""
    from jaxtok.methods import Quest

    method = Quest(pages=max(3, o.rows // page), block=page)

    def shared(seed):
        kv = cache(o, seed, dtype)
        return kv, jax.jit(lambda kv: method.start({}, 5, kv, o.h))(kv)

    def choose(kv, state, q, sight):
        pos = jnp.full((1, 1), o.cache - 1, jnp.int32)
        state, _, index = method.read({}, 5, state, None, q, pos, kv, sight)
        return (), index, q

    own = lambda seed: (normal(seed, 2, (1, o.h, 1, o.d), dtype),)
    traffic = 2 * o.cache // page * o.g * o.d * size(dtype) + 2 * o.g * method.pages * page * o.d * size(dtype)
    return _step(o, f"Quest, pages of {page}, with its selection", method, shared, own, choose, traffic)


def quest_by_kernels_row(o: Shapes, page: int, dtype: str = "bfloat16") -> Row:
    """The same by kernels alone: page_bounds, top-k, read."""
    plain, pages = quest_row(o, page, dtype), max(3, o.rows // page)

    def run(impl):
        def step(kv, state, q):
            bound = scores.page_bounds(q[:, :, 0], state.low, state.high, impl=impl)
            index = jnp.sort(lax.top_k(bound, pages)[1].astype(jnp.int32), -1)
            rows, at = q.reshape(1, o.g, o.h // o.g, o.d), jnp.full((1, o.h // o.g), o.cache - 1, jnp.int32)
            out, lse = read.read(rows, at, kv.k, kv.v, kv.pos, kv.bias, index, block=page, scale=o.d**-0.5, impl=impl)[:2]
            return out.reshape(1, o.h, 1, o.d), lse.reshape(1, o.h, 1)

        return step

    name = f"Quest, pages of {page}, by kernels alone"
    return dataclasses.replace(plain, name=name, call=lambda impl, sizes: run(impl), after="")


def tokenselect_row(o: Shapes, hit: bool, dtype: str = "bfloat16") -> Row:
    """TokenSelect (the paper's n_init, n_local and top_k) where the last selection is read again, or must be made anew."""
    from jaxtok.core.reader import Sight
    from jaxtok.methods import TokenSelect
    from jaxtok.ops.read import turn

    method = TokenSelect(top_k=o.rows, **({} if o.cache > 4096 else {"n_init": 4, "n_local": 8}))
    pos, sight = jnp.full((1, 1), o.cache - 1, jnp.int32), Sight(freqs(o), impl="xla")
    before = jax.jit(lambda kv, q: method.read({}, 5, method.start({}, 5, kv, o.h), None, q, pos, kv, sight)[0])

    def choose(kv, state, q, sight):
        state, _, index = method.read({}, 5, state, None, q, pos, kv, sight)
        return state, index, turn(q, jnp.repeat(index.query, o.h // o.g, 1), freqs(o))

    def own(seed):
        first = normal(seed, 2, (1, o.h, 1, o.d), dtype)
        state = before(cache(o, seed % SHARED, dtype), first)
        return state, first if hit else normal(seed, 3, first.shape, dtype)

    n = sum(method.sizes[1:]) * method.block
    traffic = o.g * o.d * size(dtype) * (2 * n + (0 if hit else o.cache)) + 40 * o.cache
    return _step(o, f"TokenSelect, a cache {'hit' if hit else 'miss'}", method, lambda seed: (cache(o, seed, dtype),), own, choose, traffic)


SHARED = 4  # caches that the input sets share


# scores and merge ----------------------------------------------------------------------------------------------------------------------


def score_row(name: str, case, *, exact: bool = False) -> Row:
    options = case.keywords()
    few = case.h // case.g if case.fn == "low_bit" else case.h  # query heads that are compared: of low_bit the last KV head's

    def own(seed):
        given = (case if exact else dataclasses.replace(case, d=1)).arrays(seed)
        if not exact:
            shape = {n: x.shape for n, x in case.structs().items()}
            drawn = {n: normal(seed, i, shape[n], case.dtype) + 0.5 for i, n in enumerate(("q", "k", "low", "x")) if n in given}
            given |= {n: x.astype(case.dtype) for n, x in drawn.items()}
            if "high" in given:
                given["high"] = given["low"] + jnp.abs(normal(seed, 5, shape["high"], case.dtype))
        return (given,)

    def cut(given):
        if case.fn != "low_bit" or exact:
            return given
        heads = {"q": -few, "lse": -few, "k": -1, "k_pos": -1}
        return {n: x[:, heads[n] :][:, :1] if n in heads else x for n, x in given.items()}

    want = jax.jit(lambda given: getattr(score_reference, case.fn)(**cut(given), **options))
    mine = lambda out: out if exact or case.fn != "low_bit" else out[:, -few:][:, :1]
    b, h, g, t, s, d, n = case.b, case.h, case.g, case.t, case.s, case.d, size(case.dtype)
    if case.fn == "page_bounds":
        flops, moved = 4 * b * h * s * d, n * b * d * (h + 2 * g * s) + 4 * b * g * s
    elif case.fn == "chunk_means":
        chunks = b * h * -(-s // options["chunk"]) * d
        flops, moved = b * h * s * d, n * b * h * s * d + 4 * b * h * s + chunks * (4 + 2 * n * bool(options.get("bounds")))
    else:
        flops, moved = 2 * b * h * (t * s - t * t // 2) * d, n * b * d * (h * t + g * s) + 8 * b * h * (t + s)
    return Row(
        kernel="scores", name=name, own=own, dtype=case.dtype, unit="int8" if case.fn == "low_bit" else "", flops=flops, bytes=moved,
        call=lambda impl, sizes: lambda given: getattr(scores, case.fn)(**given, **options, impl=impl),
        compare=lambda args, out: (mine(out), want(*args)), after="",
    )  # fmt: skip


def merge_row(name: str, case, *, exact: bool = False) -> Row:
    n = size(case.dtype)
    if isinstance(case, merge_cases.Match):

        @jax.jit
        def want(given, where):
            best, _ = merge_reference.match(**given)
            a, c = (given[x].astype(jnp.float32) for x in "ac")
            theirs = jnp.take_along_axis(c, jnp.maximum(where, 0)[..., None], 1)
            mine = jnp.einsum("bnd,bnd->bn", a, theirs, precision="highest")
            bias = given.get("bias")
            mine = mine if bias is None else mine + jnp.take_along_axis(bias, jnp.maximum(where, 0), 1)
            return best, jnp.where(where >= 0, mine, -jnp.inf)  # the score of the partner that was named

        def compare(args, out):
            best, named = want(args[0], out[1])
            return (out[0], named), (best, best)

        call = lambda impl, sizes: lambda given: merge.match(**given, impl=impl)
        flops, moved = 2 * case.b * case.n * case.m * case.d, case.b * (n * case.d * (case.n + case.m) + 8 * case.n)
    else:

        def one(x, weight, assign):
            weight = jnp.where(assign < 0, 0.0, weight)
            to = jnp.where(assign < 0, case.m, assign)
            rows = jnp.where(weight[:, None] > 0, x.astype(jnp.float32), 0.0) * weight[:, None]
            total, mass = (jnp.zeros((case.m + 1, *y.shape[1:]), jnp.float32).at[to].add(y)[: case.m] for y in (rows, weight))
            return total / jnp.where(mass > 0, mass, 1.0)[:, None] if case.mean else total

        want = jax.jit(lambda given: jax.vmap(one)(given["x"], given["weight"], given["assign"]))
        compare = lambda args, out: (out, want(*args))
        call = lambda impl, sizes: lambda given: merge.segment_merge(**given, m=case.m, mean=case.mean, impl=impl)
        flops, moved = 2 * case.b * case.n * case.c, case.b * (n * case.c * (case.n + case.m) + 8 * case.n)
    own = lambda seed: (case.arrays(seed),)
    return Row(kernel="merge", name=name, own=own, call=call, compare=compare, dtype=case.dtype, flops=flops, bytes=moved, after="")


# dense attention and the machine's ceilings ----------------------------------------------------------------------------------------------


def peers(platform: str) -> tuple[str, ...]:
    """What dense attention there is."""
    more = ("tokamax",) if importlib.util.find_spec("tokamax") else ()
    return ("cudnn", "xla", *more) if platform == "gpu" else ("xla", *more)


def dense_row(o: Shapes, kind: Any, what: str, t: int, s: int, *, grad: bool = False, dtype: str = "bfloat16") -> Row:
    """`jax.nn.dot_product_attention` (or tokamax's) in the layout [b t h d] that it wants; what = prefill (causal), full or decode."""
    causal, rows = what == "prefill", some(t, 4)

    def attend(q, k, v):
        if kind == "tokamax":
            import tokamax  # type: ignore

            return tokamax.dot_product_attention(q, k, v, is_causal=causal)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=kind)

    def run(q, k, v):
        return jax.grad(lambda *a: jnp.sum(jnp.cos(attend(*a).astype(jnp.float32))), (0, 1, 2))(q, k, v) if grad else attend(q, k, v)

    @jax.jit
    def want(q, k, v):
        at, keys = jnp.asarray(rows + s - t, jnp.int32)[None], jnp.arange(s, dtype=jnp.int32)[None]
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q[:, rows], k, v))
        fn = lambda q: flash_reference.flash(q, k, v, q_pos=at, k_pos=keys, causal=causal)[0]
        return jnp.swapaxes(jax.grad(lambda q: jnp.sum(jnp.cos(fn(q))))(q.astype(jnp.float32)) if grad else fn(q), 1, 2)

    pairs = o.h * (t * s - t * (t - 1) / 2 if causal else t * s)
    name = f"{what} {label(s)}{', forward and backward' if grad else ''}"
    return Row(
        kernel="dense", name=f"{name}, {kind}", dtype=dtype, peer=name, call=lambda impl, sizes: run,
        own=lambda seed: tuple(normal(seed, i, (1, n, e, o.d), dtype) for i, (n, e) in enumerate(((t, o.h), (s, o.g), (s, o.g)))),
        compare=lambda args, out: ((out[0] if grad else out)[:, rows], want(*args)),
        flops=(7 if grad else 2) * pairs * 2 * o.d, bytes=(2 if grad else 1) * size(dtype) * o.d * 2 * (o.h * t + o.g * s),
    )  # fmt: skip


def product_row(o: Shapes, dtype: str) -> Row:
    n, wide = o.product, jnp.int32 if dtype == "int8" else jnp.dtype(dtype)

    def own(seed):
        x = tuple(normal(seed, i, (n, n), "float32" if dtype == "int8" else dtype) for i in range(2))
        return tuple(jnp.round(30 * y).astype(jnp.int8) for y in x) if dtype == "int8" else x

    exact = "highest" if dtype == "float32" else None
    call = lambda impl, sizes: lambda a, b: jnp.matmul(a, b, preferred_element_type=wide, precision=exact)
    want = jax.jit(lambda a, b: jnp.matmul(a[:4].astype(jnp.float32), b.astype(jnp.float32), precision="highest"))
    return Row(
        kernel="ceiling", name=f"matmul {dtype}", own=own, call=call, compare=lambda args, out: (out[:4], want(*args)), dtype=dtype,
        flops=2 * n**3, bytes=3 * n * n * size(dtype), tol=2e-2 if size(dtype) < 4 else 1e-5,
    )  # fmt: skip


def copy_row(o: Shapes) -> Row:
    n = o.copy // 4
    own = lambda seed: (jnp.arange(n, dtype=jnp.int32) + seed,)
    ends = lambda x: jnp.stack([x[0], x[n // 2], x[-1]])
    return Row(
        kernel="ceiling", name="copy", own=own, call=lambda impl, sizes: lambda x: ~x, bytes=8 * n, dtype="int32", tol=1e-6,
        compare=lambda args, out: (ends(out), ends(~args[0])),
    )  # fmt: skip


# what there is to run --------------------------------------------------------------------------------------------------------------------


def _narrowed(cases: dict[str, Any], impl: str) -> dict[str, Any]:
    """GPU kernels take 16 bits, but for some; there a float32 case runs in bfloat16 too."""
    if not impl.endswith("gpu"):
        return cases
    out = dict(cases)
    for name, case in cases.items():
        if case.dtype == "float32":
            out[f"{name}, in bfloat16"] = dataclasses.replace(case, dtype="bfloat16")
    return out


def _case(make: Callable[..., Row], name: str, case: Any, **more) -> Row:
    return dataclasses.replace(make(name, case, exact=True, **more), least=1.0)


def checks(impl: str, tiny: bool) -> dict[str, Callable[[], Row]]:
    """Every kernel on its CASES, by "check kernel: case"; flash and block_sparse with their gradients too. tiny: one case a kernel."""
    gpu = lambda module: {f"{n} (small)": c for n, c in getattr(module, "GPU", {}).items()} if impl.endswith("gpu") else {}
    both = lambda module: gpu(module) | module.CASES
    of: dict[str, tuple[dict[str, Any], Callable[..., Row]]] = {
        "flash": (both(flash_cases), flash_row),
        "column_sum": (both(column_cases), column_row),
        "block_sparse": (both(sparse_cases), sparse_row),
        "read": (both(read_cases), read_row),
        "scores": (both(score_cases), score_row),
        "merge": (gpu(merge_cases) | merge_cases.MATCH | merge_cases.MERGE, merge_row),
    }
    found: dict[str, Callable[[], Row]] = {}
    for grad in (False, True):
        for kernel, (cases, make) in of.items():
            if grad and kernel not in ("flash", "block_sparse"):
                continue
            named = _narrowed(cases, impl)
            named = {n: named[n] for n in list(named)[:1]} if tiny else named
            more: dict[str, Any] = {"grad": True} if grad else {}
            for name, case in named.items():
                found[f"{GRAD if grad else CHECK} {kernel}: {name}"] = functools.partial(_case, make, name, case, **more)
    return found


def timed(platform: str, tiny: bool) -> dict[str, Callable[[], Row]]:
    """What is timed, most important first: ceilings, dense attention and goals; every LARGE case; the longest prefill; gradients."""
    o = TINY if tiny else GOAL
    found: dict[str, Callable[[], Row]] = {}

    def put(row: Callable[..., Row], kernel: str, name: str, *args, **more):
        found[f"{TIME} {kernel}: {name}"] = functools.partial(row, *args, **more)

    for dtype in ("bfloat16",):
        put(product_row, "ceiling", f"matmul {dtype}", o, dtype)
    put(copy_row, "ceiling", "copy", o)
    heads: dict[str, Any] = dict(h=o.h, g=o.g, d=o.d, c=o.d, dtype="bfloat16")
    fast, most = peers(platform), o.prefill[-1]

    def dense(what, t, s, grad=False):
        for kind in fast if what == "decode" or s <= 8192 else [x for x in fast if x != "xla"] or fast:
            name = f"{what} {label(s)}{', forward and backward' if grad else ''}"
            put(dense_row, "dense", f"{name}, {kind}", o, kind, what, t, s, grad=grad)

    def prefill(n, grad=False):
        case = flash_cases.Case(t=n, s=n, diagonal=0, block_q=None, block_k=None, **heads)
        name, peer = f"prefill {label(n)}", f"prefill {label(n)}"
        if grad:
            tail = ", forward and backward"
            put(flash_row, "flash", name + tail, name + tail, case, grad=True, peer=peer + tail)
            return
        put(flash_row, "flash", name, name, case, peer=peer)
        put(column_row, "column_sum", name, name, case, peer=peer)

    def decoding(name, **more):
        case = read_cases.Case(b=1, g=o.g, e=o.g, r=o.h // o.g, s=o.cache, d=o.d, c=o.d, dtype="bfloat16", dead=0.0, **more)
        put(read_row, "read", name, name, case, live=True, peer=f"decode {label(o.cache)}")

    dense("decode", 1, o.cache)
    decoding(f"decode {label(o.cache)}", full=True)
    decoding(f"{o.rows} rows by indices", block=1, m=o.rows)
    for n in sorted({*o.prefill[:-1], o.table}):
        dense("prefill", n, n)
    for n in o.prefill[:-1]:
        prefill(n)
    for part in DENSITIES:
        case = sparse_cases.Case(t=o.table, s=o.table, bq=o.block, bk=o.block, density=1 / part, **heads)
        put(sparse_row, "block_sparse", f"rho 1/{part}", f"rho 1/{part}", case, share=1 / part, peer=f"prefill {label(o.table)}")
    for page in o.pages:
        put(quest_row, "read", f"Quest, pages of {page}, with its selection", o, page)
    for hit in (True, False):
        put(tokenselect_row, "read", f"TokenSelect, a cache {'hit' if hit else 'miss'}", o, hit)
    dense("prefill", most, most)
    prefill(most)
    for page in o.pages:
        put(quest_by_kernels_row, "read", f"Quest, pages of {page}, by kernels alone", o, page)
    dense("prefill", o.prefill[0], o.prefill[0], grad=True)
    prefill(o.prefill[0], grad=True)
    for dtype in ("float32", "int8"):
        put(product_row, "ceiling", f"matmul {dtype}", o, dtype)
    large = {
        "flash": (flash_cases, flash_row),
        "column_sum": (column_cases, column_row),
        "block_sparse": (sparse_cases, sparse_row),
        "read": (read_cases, read_row),
        "scores": (score_cases, score_row),
        "merge": (merge_cases, merge_row),
    }
    if tiny:
        for kernel, cases, make in (("scores", score_cases.CASES, score_row), ("merge", merge_cases.MATCH, merge_row)):
            name, case = next(iter(cases.items()))
            put(make, kernel, name, name, case)
        return found
    alike = {"8k bf16", "all 128k"}  # goals have these
    for kernel, (module, make) in large.items():
        for name, case in module.LARGE.items():
            if not (name in alike and kernel in ("flash", "column_sum", "read")):
                peer = {"flash": "prefill 8k", "column_sum": "prefill 8k"}.get(kernel, "") if "8k" in name else ""
                peer = f"decode {label(case.s)}" if kernel == "read" and case.s == o.cache else peer
                more: dict[str, Any] = {"peer": peer} if peer else {}
                put(make, kernel, name, name, case, **more)
    return found


def tolerance(row: Row, impl: str) -> float:
    """Of |found - right| <= tolerance * max(row.least, max|right|)."""
    if size(row.dtype) == 2:
        return 5e-2 if "backward" in row.name else 2e-2
    if row.tol is not None:
        return row.tol
    return 2e-6 if impl.startswith("interpret") else 1e-5  # chips have other exponentials and sum in another order


HUGE = 1e29


def difference(found: Any, right: Any, tol: float, least: float = 1.0) -> tuple[float, bool]:
    """(largest |found - right|, whether it is within the tolerance; NaN and infinities in other places never are)."""
    delta, good = 0.0, True
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = (np.asarray(jnp.asarray(x, jnp.float32)) for x in (a, b))
        if a.shape != b.shape:
            return math.inf, False
        plain = np.abs(b) < HUGE
        odd = ~plain
        with np.errstate(invalid="ignore"):
            good &= bool(np.all((a[odd] == b[odd]) | (np.abs(a[odd] - b[odd]) <= 1e-5 * np.abs(b[odd]) * (np.abs(b[odd]) < np.inf))))
        off = np.abs(a[plain] - b[plain])
        if off.size:
            most = float(np.max(off))
            delta = max(delta, most) if most == most else math.nan
            good &= most <= tol * max(least, float(np.max(np.abs(b[plain]))), 1e-30)  # False of NaN
    return delta, bool(good)
