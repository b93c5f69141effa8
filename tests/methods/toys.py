"""Small caches for the methods' own tests, and what every scorer and every step policy is asked there.

The references (`softmax_rows`, `top`) are numpy in float64 and share nothing with the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.reader import Sight
from jaxtok.core.reduce import grow_kv
from jaxtok.core.rotary import turn
from jaxtok.core.types import KV, Evidence, Noise
from jaxtok.core.vacate import vacate
from jaxtok.ops.attention import attention
from jaxtok.ops.cache import place
from jaxtok.ops.evidence import perturbed, received, rows
from jaxtok.ops.noise import words

B, H, G, N, D = 2, 4, 2, 24, 8
LIVE = (24, 17)


def freqs(d: int):
    """What raw policies are rotated by."""
    return jnp.asarray(1e4 ** (-np.arange(d // 2) / (d // 2)), jnp.float32)


def sight(d: int = D, **changes) -> Sight:
    """What a reader is told besides positions."""
    return Sight(freqs(d))._replace(**changes)


def cache(k, v, live=None, dtype=jnp.float32) -> KV:
    """A cache [b g n d] whose last live[i] rows of sequence i are alive."""
    b, g, n, _ = k.shape
    live = np.full(b, n) if live is None else np.asarray(live)
    pos = np.maximum(np.arange(n)[None] - (n - live)[:, None], -1).astype(np.int32)
    zero = jnp.zeros((b,), jnp.int32)
    return KV(
        k=jnp.asarray(k, dtype),
        v=jnp.asarray(v, dtype),
        pos=jnp.asarray(np.repeat(pos[:, None], g, 1)),
        bias=jnp.zeros((b, g, n), jnp.float32),
        seen=jnp.asarray(live, jnp.int32),
        delta=zero,
        cursor=jnp.full((), n, jnp.int32),
        lost=jnp.zeros((b, g), jnp.int32),
    )


def problem(seed=0, live=LIVE, h=H, g=G, n=N, d=D, junk=0.0) -> tuple[np.ndarray, KV]:
    """(queries f32 [b h n d], cache) of random numbers, with `junk` in the dead rows."""
    rng, b = np.random.default_rng(seed), len(live)
    q, k, v = (rng.normal(size=(b, e, n, d)).astype(np.float32) * s for e, s in ((h, 2.0), (g, 2.0), (g, 1.0)))
    dead = (np.arange(n)[None] < n - np.asarray(live)[:, None])[:, None, :, None]
    q, k, v = (np.where(dead, np.float32(junk), x) for x in (q, k, v))
    return q, cache(k, v, live)


@functools.partial(jax.jit, static_argnames=("w", "noise"))
def look(q, kv: KV, w: int, noise: Noise | None = None) -> Evidence:
    """The model's attention evidence of a prefill, in layer 0 and without a key."""
    see: dict[str, Any] = dict(q_pos=kv.pos[:, 0], k_pos=kv.pos)
    q = q.astype(kv.k.dtype)
    _, lse = attention(q, kv.k, kv.v, **see)
    last = rows(q[:, :, -w:], kv.k, lse[:, :, -w:], q_pos=kv.pos[:, 0, -w:], k_pos=kv.pos)
    disturbed = None if noise is None else perturbed(q, kv.k, words=words(None, noise.seed, 0), tau=noise.tau, **see)
    return Evidence(rows=last, received=received(q, kv.k, lse, **see), perturbed=disturbed)


def softmax_rows(q, k, pos, scale=None) -> np.ndarray:
    """f64 [b h n n]: causal attention in numpy, key heads repeated h/g times; dead rows and columns are 0."""
    q, k = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), q.shape[1] // k.shape[1], 1)
    pos = np.asarray(pos)[:, 0]
    logit = np.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    see = (pos[:, None, :] >= 0) & (pos[:, :, None] >= pos[:, None, :])
    logit = np.where(see[:, None], logit, -np.inf)
    e = np.exp(logit - logit.max(-1, keepdims=True, initial=-1e30))
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def top(score, pos, keep, protect=lambda p, seen: False) -> list[list[set]]:
    """Positions kept of each (sequence, head): the protected ones and the best others, `keep` in all; plain Python."""
    out = []
    for s, p in zip(np.asarray(score), np.asarray(pos), strict=True):
        out.append([])
        for scores, places in zip(s, p, strict=True):
            seen = places.max() + 1
            safe = {int(x) for x in places if x >= 0 and protect(x, seen)}
            rest = sorted((-scores[j], int(x)) for j, x in enumerate(places) if x >= 0 and int(x) not in safe)
            out[-1].append(safe | {x for _, x in rest[: max(keep - len(safe), 0)]})
    return out


def kept(kv: KV) -> list[list[set]]:
    return [[{int(x) for x in head if x >= 0} for head in row] for row in np.asarray(kv.pos)]


@functools.cache
def program(method):
    return jax.jit(lambda kv, evidence, keep: method.compress({}, kv, evidence, keep)[0])


@functools.cache
def scorer(method):
    return jax.jit(lambda kv, evidence: method.score({}, kv, evidence))


def run(method, kv: KV, evidence: Evidence, keep=None) -> KV:
    return program(method)(kv, evidence, keep)


def check_scorer(make, evidence, *, protected) -> None:
    """What is asked of every scorer: `make(capacity)`, `evidence(q, kv)`, `protected(pos, seen)`: the positions that must stay."""
    q, kv = problem()
    method, seen, budget = make(10), evidence(q, kv), lambda keep: jnp.full((B,), keep, jnp.int32)
    out = run(method, kv, seen, budget(10))
    assert out.k.shape == (B, G, 10, D)
    for row, live in zip(kept(out), LIVE, strict=True):
        safe = {p for p in range(live) if protected(p, live)}
        assert all(len(head) == min(10, live) and safe <= head for head in row)
    assert (np.diff(np.asarray(out.pos), axis=-1) > 0).all()
    at = np.asarray(out.pos) + (N - np.asarray(LIVE))[:, None, None]
    np.testing.assert_array_equal(out.k, np.take_along_axis(np.asarray(kv.k), at[..., None], 2))

    # a traced budget under the capacity is the smaller capacity
    assert kept(run(method, kv, seen, budget(7))) == kept(run(make(7), kv, seen))
    # a budget that covers the cache is decided statically
    assert make(N).compress({}, kv, seen)[0] is kv
    # junk in dead slots changes nothing, nor do the other rows
    loud, dirty = problem(junk=1e4)
    assert kept(run(method, dirty, evidence(loud, dirty), budget(10))) == kept(out)
    (other, stranger), first = problem(9), jnp.array([True, False])
    mixed = jax.tree.map(lambda x, y: jnp.where(first.reshape((2,) + (1,) * (x.ndim - 1)), x, y) if x.ndim else x, stranger, kv)
    assert kept(run(method, mixed, evidence(np.concatenate([other[:1], q[1:]]), mixed), budget(10)))[1] == kept(out)[1]
    # nothing live: nothing kept, no NaN
    empty = run(method, kv._replace(pos=jnp.full_like(kv.pos, -1), seen=jnp.zeros_like(kv.seen)), seen, budget(10))
    assert (np.asarray(empty.pos) < 0).all() and np.isfinite(np.asarray(empty.k)).all()
    # bf16 numbers, float32 scores (that they choose alike is a law)
    half = kv._replace(k=kv.k.astype(jnp.bfloat16), v=kv.v.astype(jnp.bfloat16))
    assert jax.eval_shape(scorer(method), half, seen).dtype == jnp.float32
    assert jax.eval_shape(program(method), half, seen, None).k.dtype == jnp.bfloat16


# --- readers ------------------------------------------------------------------------------------------------------------


def attend_to(q, kv: KV, sets, scale=None) -> np.ndarray:
    """f64 [b h d]: attention of one query [b h d] to the live ones of the slots `sets[b][h]`; zeros where none is."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, kv.k, kv.v))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for i, head in np.ndindex(*q.shape[:2]):
        e = head // (q.shape[1] // k.shape[1])
        at = [j for j in sorted(sets[i][head]) if j >= 0 and np.asarray(kv.pos)[i, e, j] >= 0]
        if at:
            logit = k[i, e, at] @ q[i, head] * (q.shape[-1] ** -0.5 if scale is None else scale) + np.asarray(kv.bias, np.float64)[i, e, at]
            p = np.exp(logit - logit.max())
            out[i, head] = p @ v[i, e, at] / p.sum()
    return out


def everything(q, kv: KV):
    return [[range(kv.pos.shape[-1])] * q.shape[1]] * q.shape[0]


def newest(kv: KV) -> jax.Array:
    """i32 [b 1]: the position of the query whose key was written last."""
    return jnp.max(kv.pos, (1, 2))[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def begin(reader, layer, kv, group):
    """A reader's state after a prefill."""
    return reader.start({}, layer, kv, group)


# --- step policies ------------------------------------------------------------------------------------------------------


@functools.cache
def _fit(policy):
    def fit(kv, evidence, keep):
        state = policy.start({}, kv, evidence)
        return state, policy.fit({}, state, kv, evidence, keep)

    return jax.jit(fit)


def fit(policy, kv: KV, evidence: Evidence, keep=None):
    """(state before, plan) of a policy after a prefill."""
    return _fit(policy)(kv, evidence, None if keep is None else jnp.asarray(keep, jnp.int32))


@functools.cache
def _start(policy):
    def start(kv, evidence, keep):
        state = policy.start({}, kv, evidence)
        kv, state = policy.refit({}, state, kv, evidence, keep)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, policy.capacity + 1 - x.shape[-1])))
        kv = grow_kv(kv, policy.capacity + 1)
        return kv._replace(cursor=jnp.full((), policy.capacity, jnp.int32)), type(state)(jax.tree.map(pad, state.slots), state.rest)

    return jax.jit(start)


@functools.cache
def _step(policy):
    def step(kv, state, q, k, v, keep):
        at, pos = policy.capacity, kv.seen
        kv = kv._replace(
            k=kv.k.at[:, :, at].set(k),
            v=kv.v.at[:, :, at].set(v),
            pos=kv.pos.at[:, :, at].set(pos[:, None]),
            bias=kv.bias.at[:, :, at].set(0),
            seen=kv.seen + 1,
        )
        see: dict[str, Any] = dict(q_pos=pos[:, None], k_pos=kv.pos, bias=kv.bias)
        q, keys = q[:, :, None], kv.k
        if policy.raw:
            q, keys = place(q, kv, kv.cursor, freqs(q.shape[-1]))
        out, lse = attention(q, keys, kv.v, **see)
        row = rows(q, keys, lse, **see)
        seen = Evidence(rows=row, received=row[:, :, 0])
        kv, state, _ = vacate(policy, {}, policy.observe({}, state, kv, seen), kv, keep, seen)
        return kv, state, out, row

    return jax.jit(step)


@jax.jit
def _turned(q, kv, freqs):
    ids = jnp.maximum(kv.pos, 0)
    return turn(q, jnp.repeat(ids, q.shape[1] // ids.shape[1], 1), freqs), kv._replace(k=turn(kv.k, ids, freqs))


def drive(policy, q, k, v, live, prefill, keep=None, dtype=jnp.float32):
    """Prefill with the first rows of q, k, v [b e T d] (left-padded to `prefill`, live[i] of them alive), then a step for each other
    row. A raw policy gets queries and keys before the rotary embedding of `freqs`. Yields (kv, state, attention output, attention row)
    after the prefill (without the last two) and after every step."""
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    kv = cache(k[:, :, :prefill], v[:, :, :prefill], live, dtype)
    first, seen = q[:, :, :prefill], kv
    if policy.raw:
        first, seen = _turned(first, kv, freqs(q.shape[-1]))
    kv, state = _start(policy)(kv, look(first, seen, 1, policy.needs.perturbed), keep)
    yield kv, state, None, None
    for t in range(prefill, q.shape[2]):
        kv, state, out, row = _step(policy)(kv, state, q[:, :, t], k[:, :, t], v[:, :, t], keep)
        yield kv, state, out, row


def check_policy(make, *, protected) -> None:
    """What is asked of every step policy: `make(capacity)`, `protected(pos, seen)`: the positions that must stay."""
    rng, steps = np.random.default_rng(3), 18
    q, k, v = (rng.normal(size=(B, e, N + steps, D)).astype(np.float32) * 2 for e in (H, G, G))
    dead = (np.arange(N + steps)[None] < N - np.asarray(LIVE)[:, None])[:, None, :, None]
    policy, sets = make(8), {}
    for name, junk, keep in (("plain", 0.0, 8), ("junk", 1e4, 8), ("small", 0.0, 6)):
        rows_ = (np.where(dead, np.float32(junk), x) for x in (q, k, v))
        sets[name] = []
        for t, (kv, _, _, _) in enumerate(drive(policy, *rows_, LIVE, N, jnp.full((B,), keep, jnp.int32))):
            sets[name].append(kept(kv))
            assert (np.asarray(kv.pos)[:, :, 8] < 0).all() and int(kv.cursor) == 8
            for row, live in zip(kept(kv), LIVE, strict=True):
                safe = {p for p in range(live + t) if protected(p, live + t)}
                assert all(len(head) == keep and max(head) < live + t for head in row)
                assert keep < 8 or all(safe <= head for head in row)
    assert sets["plain"] == sets["junk"]
    small = [kept(kv) for kv, *_ in drive(make(6), q, k, v, LIVE, N)]
    assert small == sets["small"], "a traced budget under the capacity is the smaller capacity"
    # bf16 in, bf16 out, state in float32
    half = cache(k[:, :, :N], v[:, :, :N], LIVE, jnp.bfloat16)
    out, state = jax.eval_shape(_start(policy), half, look(q[:, :, :N], half, 1, policy.needs.perturbed), None)
    assert out.k.dtype == jnp.bfloat16 and all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state.slots))
