"""A layer of an encoder for the methods that attend in its place: plain arrays, softmax attention in numpy, an output that changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.core.mixer import Layer
from jaxtok.evals.cost import count
from jaxtok.models.config import EncoderConfig
from jaxtok.ops.attention import attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def config(h: int, d: int, layers: int = 1) -> EncoderConfig:
    return EncoderConfig(width=h * d, layers=layers, heads=h, hidden=8, image=(8, 8), patch=(2, 2), cls=False, pool="mean")


def normal(seed, *shape) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(q, k, v, *, x=None, live=None, size=None, grid=None) -> Layer:
    """q, k, v [b h n d]; what they do by themselves is `attention`."""
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    b, h, n, d = q.shape
    live = jnp.ones((b, n), bool) if live is None else jnp.broadcast_to(live, (b, n))
    pos = jnp.where(live, jnp.cumsum(live, 1, dtype=jnp.int32) - 1, -1)
    size = jnp.ones((b, n), jnp.float32) if size is None else jnp.asarray(size, jnp.float32)
    bias = jnp.broadcast_to(jnp.log(size)[:, None], (b, h, n))
    attend = lambda q, k, v: attention(q, k, v, q_pos=pos, k_pos=pos, bias=bias, causal=False)[0]
    out = lambda y: y.transpose(0, 2, 1, 3).reshape(b, n, h * d)
    x = jnp.zeros((b, n, h * d), q.dtype) if x is None else jnp.asarray(x)
    return Layer(x, q, k, v, pos, size, grid, attend, out)


@functools.partial(jax.jit, static_argnames=("method", "grid", "i"))
def mix(method, params, q, k, v, *, x=None, live=None, size=None, grid=None, i=0):
    """What layer i's attention block adds, in one program: done eagerly, each operation in it would be compiled by itself."""
    return method.mix(params, (), i, layer(q, k, v, x=x, live=live, size=size, grid=grid))[0]


def softmax(logit, there=None) -> np.ndarray:
    """Over the last axis, in float64; 0 over nothing."""
    logit = np.asarray(logit, np.float64)
    there = np.broadcast_to(True if there is None else there, logit.shape)
    top = np.max(np.where(there, logit, -np.inf), -1, keepdims=True)
    e = np.where(there, np.exp(np.where(there, logit - np.where(np.isfinite(top), top, 0), 0)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def full(q, k, v, live=None, size=None, scale=None) -> np.ndarray:
    """Softmax attention [b n h d], heads side by side as [b n h*d]; 0 in dead rows."""
    b, h, n, d = q.shape
    live = np.ones((b, n), bool) if live is None else np.broadcast_to(live, (b, n))
    logit = np.einsum("bhnd,bhmd->bhnm", np.asarray(q, np.float64), k) * (d**-0.5 if scale is None else scale)
    logit = logit + (0 if size is None else np.log(size)[:, None, None])
    out = np.einsum("bhnm,bhmd->bnhd", softmax(logit, live[:, None, None]), np.asarray(v, np.float64))
    return np.where(live[..., None], out.reshape(b, n, h * d), 0)


def exponent(make, *, h: int = 4, d: int = 16) -> float:
    """The fitted exponent of the operator's counted FLOPs over LENGTHS: make(n) -> (method, its parameters, grid)."""

    def flops(n):
        method, params, grid = make(n)
        shape = jax.ShapeDtypeStruct((1, h, n, d), jnp.float32)

        def run(q, k, v):
            there = layer(q, k, v, grid=grid)._replace(x=q.transpose(0, 2, 1, 3).reshape(1, n, h * d))
            return method.mix(params, (), 0, there)[0]

        return count(run, shape, shape, shape).flops

    return float(np.polyfit(np.log(LENGTHS), np.log([flops(n) for n in LENGTHS]), 1)[0])


def gradients(fn, *args, eps: float = 1e-3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Gradients of sum(fn(*args) * w), w random: finite, and along a random direction what a central difference in float32 gives."""
    rng = np.random.default_rng(seed)
    args = [jnp.asarray(a) for a in args]
    step = [jnp.asarray(rng.normal(size=a.shape).astype(np.float32)) for a in args]
    weight = jnp.asarray(rng.normal(size=jax.eval_shape(fn, *args).shape).astype(np.float32))
    both = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(fn(*a) * weight), tuple(range(len(args)))))
    ahead, behind = (float(both(*(a + t * s for a, s in zip(args, step, strict=True)))[0]) for t in (eps, -eps))
    grads = both(*args)[1]
    got, want = sum(float(jnp.vdot(g, s)) for g, s in zip(grads, step, strict=True)), (ahead - behind) / (2 * eps)
    assert abs(got - want) < 2e-2 * max(1, abs(want)) and all(np.isfinite(g).all() for g in grads)
    return tuple(np.asarray(g) for g in grads)
