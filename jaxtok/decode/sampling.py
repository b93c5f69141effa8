"""From logits to the next token: greedy, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn. The filters act in this order, as in transformers' generate; what they leave is renormalised.

    temperature: logits are divided by it; 0 = greedy, the first of the largest logits.
    top_k: keep the k largest logits and all that tie with the k-th. None or k >= vocab = all.
    top_p: keep the smallest set of largest probabilities whose mass reaches p, at least one (nucleus, arXiv:1904.09751). Among equal
        logits the lower id goes in first (transformers leaves that to torch.sort). None or 1 = all.
    min_p: keep what is at least p times as probable as the best (arXiv:2407.01082). None or 0 = all.

    Raises ValueError for a negative, infinite or tiny (0 < t < 1e-6) temperature, top_k < 1, top_p outside (0, 1], min_p outside [0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise ValueError(f"temperature={self.temperature}: must be finite and >= 1e-6, or 0 for greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be >= 1, or None to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1], or None to keep all")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must be in [0, 1], or None to keep all")


def keep_top_k(logits: Float[Array, "*b vocab"], k: int) -> Float[Array, "*b vocab"]:
    """Logits under the k-th largest become -inf; ties with it stay."""
    if k < 1:
        raise ValueError(f"k={k}: must be >= 1")
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "*b vocab"], p: float | Float[Array, ""]) -> Float[Array, "*b vocab"]:
    """Logits outside the smallest set of largest probabilities with mass >= p become -inf; the best always stays."""
    shifted = _shift(logits)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    falling, order = jax.lax.sort((-shifted, ids), dimension=-1, num_keys=1, is_stable=True)
    weight = jnp.exp(-falling)
    mass = jnp.cumsum(weight, axis=-1)
    # a token goes in while the mass before it falls short of p; the last to go in is the bar for the others
    last = jnp.maximum(jnp.sum(mass - weight < p * mass[..., -1:], axis=-1, keepdims=True) - 1, 0)
    bar, bar_id = -jnp.take_along_axis(falling, last, axis=-1), jnp.take_along_axis(order, last, axis=-1)
    return jnp.where((shifted > bar) | ((shifted == bar) & (ids <= bar_id)), logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "*b vocab"], p: float | Float[Array, ""]) -> Float[Array, "*b vocab"]:
    """Logits of tokens less probable than p times the best become -inf."""
    return jnp.where(jnp.exp(_shift(logits)) < p, -jnp.inf, logits)


def _shift(logits: Array) -> Array:
    """Logits with the row's largest at 0; -inf stays, also in a row of nothing else."""
    best = logits.max(-1, keepdims=True)
    return logits - jnp.where(jnp.isneginf(best), 0, best)


def filter_logits(sampler: Sampler, logits: Float[Array, "*b vocab"]) -> Float[Array, "*b vocab"]:
    """The distribution that `sampler` draws from, as f32 logits: the largest of a row is 0, what was filtered out is -inf.

    Its softmax is what acceptance rules of speculative decoding need. Greedy leaves one token. A row of -inf stays so.
    """
    shifted = _shift(logits.astype(jnp.float32))
    if sampler.temperature == 0:
        best = jax.nn.one_hot(jnp.argmax(shifted, -1), logits.shape[-1], dtype=bool)
        return jnp.where(best, shifted, -jnp.inf)
    out = shifted / sampler.temperature
    if sampler.top_k is not None and sampler.top_k < logits.shape[-1]:
        out = keep_top_k(out, sampler.top_k)
    if sampler.top_p is not None and sampler.top_p < 1:
        out = keep_top_p(out, sampler.top_p)
    if sampler.min_p:
        out = keep_min_p(out, sampler.min_p)
    return out


def row_keys(key: Key[Array, "*k"] | UInt32[Array, "*k 2"], rows: int) -> Key[Array, " b"]:
    """One PRNG key a row. A single key is folded with the row's index; keys of shape [rows] are taken as they are."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"keys of shape {key.shape} for {rows} rows: give one key, or one a row")
    return key


def sample(sampler: Sampler, key: Key[Array, "*k"] | UInt32[Array, "*k 2"] | None, logits: Float[Array, "b vocab"]) -> Int[Array, " b"]:
    """One token a row, i32.

    key: one key, of which row i uses ``fold_in(key, i)``, or one key a row; unused (None will do) when greedy. A row's token depends on
        its own logits and key only, so a batch equals a loop over rows with those keys.
    logits: finite or -inf (never drawn). A row with nothing but -inf gives -1, which is no token.
    Raises ValueError without a key unless greedy.
    """
    possible = jnp.any(logits > -jnp.inf, axis=-1)
    if sampler.temperature == 0:
        token = jnp.argmax(logits, -1)
    elif key is None:
        raise ValueError(f"temperature={sampler.temperature} draws at random and needs a key; pass one, or temperature=0")
    else:
        token = jax.vmap(jax.random.categorical)(row_keys(key, logits.shape[0]), filter_logits(sampler, logits))
    return jnp.where(possible, token, -1).astype(jnp.int32)
