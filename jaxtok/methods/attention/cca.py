"""CCA-Attention. Source: arXiv:2412.12465; chenyaofo/CCA-Attention, codebase/core/{cca_attn,cca_pooling,cca}.py."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxtok.core import check, select
from jaxtok.core.attention import Attention, Rows
from jaxtok.core.reader import Sight
from jaxtok.core.reduce import gather
from jaxtok.core.registry import register
from jaxtok.ops.attention import attention, merge
from jaxtok.ops.banded import banded
from jaxtok.ops.store import Store, begin, extend, write


class Cores(NamedTuple):
    """The last window + group keys, and a core for each complete group; a core's pos is the first order that sees it."""

    near: Store
    far: Store


@register(
    "cca",
    site="attention",
    paper="arXiv:2412.12465",
    title="Core Context Aware Transformers for Long Context Language Modeling",
    authors="Yaofo Chen and Zeng You and Shuhai Zhang and Haokun Li and Yirui Li and Yaowei Wang and Mingkui Tan",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CCA(Attention):
    """Old tokens are read through one core a group, recent ones as they are, in one softmax.

        core of group c (its `group` = g tokens in order, keys after the rotary embedding), for each query head:
            w = softmax_j(q_last . k_j / sqrt(d)),   k_c = sum_j w_j k_j,   v_c = sum_j w_j v_j        q_last: of the group's last token
        the i-th token (from 1) sees the cores of n = max(0, floor((i - window) / g)) groups and the tokens n g < j <= i

    Cores and tokens share one softmax and cover each earlier token once. A core has no position of its own. It costs
    O(n (window + g) + n^2 / g); a decode step holds window + g keys and a core a group. pooling "mean" and "max" (over the keys, and over
    the values, elementwise) replace w. group = 1, or a sequence of at most `window` tokens, is plain causal attention.

    The paper's text pools hidden states; the official code, and this, pools keys and values. window % group must be 0: elsewhere the
    official kernel's mask and its plain mask differ. The official decode re-pools the first group in layers 0 and 1; not copied: here a
    core is made when its group is complete and seen when it has left the window, which is the parallel pass. In decode the official code
    pools by w whatever `pooling` says; here it does what it says.

    No weights of its own: it is trained, or fine-tuned, through those of the model.
    """

    group: int = 16
    window: int = 1024
    pooling: str = "cca"

    def __post_init__(self):
        check.count("group", self.group)
        check.count("window", self.window)
        check.one_of("pooling", self.pooling, ("cca", "mean", "max"))
        if self.window % self.group:
            raise ValueError(f"window={self.window} must be a multiple of group={self.group}")

    def attend(self, j: int, q, k, v, rows: Rows) -> Float[Array, "b h n d"]:
        g, n, see = self.group, q.shape[2], rows.see
        old = np.maximum(0, (np.arange(n) + 1 - self.window) // g)
        out, lse = banded(q, k, v, old * g, softcap=see.softcap, scale=see.scale, impl=see.impl)
        m = int(old[-1]) if n else 0
        if m:
            whole = lambda x: x[:, :, : m * g].reshape(*x.shape[:2], m, g, x.shape[-1])
            far = self.cores(q[:, :, g - 1 : m * g : g], whole(k), whole(v), see)
            at = jnp.asarray((np.arange(m) + 1) * g + self.window - 1, jnp.int32)[None]
            out, _ = merge(out, lse, *self._read(q, *far, jnp.broadcast_to(at, (q.shape[0], m)), rows))
        return out.astype(q.dtype)

    def cores(
        self, last: Float[Array, "b h m d"], k: Float[Array, "b g m p d"], v: Float[Array, "b g m p c"], see: Sight
    ) -> tuple[Array, Array]:
        """Keys and values of m groups from their tokens' and their last tokens' queries; by query head, or as k where no query counts."""
        if self.pooling != "cca":
            pool = jnp.mean if self.pooling == "mean" else jnp.max
            return tuple(pool(x.astype(jnp.float32), 3).astype(x.dtype) for x in (k, v))  # type: ignore[return-value]
        (b, h, m, d), e = last.shape, k.shape[1]
        scale = d**-0.5 if see.scale is None else see.scale
        q = last.reshape(b, e, h // e, m, d)
        y = jnp.einsum("bermd,bempd->bermp", q, k, preferred_element_type=jnp.float32) * scale
        w = jax.nn.softmax(select.finite(y), -1)
        mixed = lambda x: jnp.einsum("bermp,bempd->bermd", w, x.astype(jnp.float32)).reshape(b, h, m, x.shape[-1]).astype(x.dtype)
        return mixed(k), mixed(v)

    def start(self, j: int, q, k, v, rows: Rows, slots: int) -> Cores:
        (b, _, n, _), g, count = q.shape, self.group, rows.count
        near = begin(k, v, count, max(1, min(self.window + g, slots)))
        m, room = n // g, max(slots // g, 1)
        whole = lambda x: x[:, :, : m * g].reshape(*x.shape[:2], m, g, x.shape[-1])
        kc, vc = self.cores(q[:, :, g - 1 : m * g : g], whole(k), whole(v), rows.see)
        fit = lambda x: jnp.pad(x[:, :, :room], ((0, 0), (0, 0), (0, max(room - m, 0)), (0, 0)))
        end = (jnp.arange(room, dtype=jnp.int32)[None] + 1) * g
        pos = jnp.where((end <= count[:, None]) & (end <= m * g), end + self.window - 1, -1)
        return Cores(near, Store(fit(kc), fit(vc), jnp.broadcast_to(pos, (b, room))))

    def step(self, j: int, state: Cores, q, k, v, rows: Rows) -> tuple[Float[Array, "b h 1 d"], Cores]:
        (b, e), g, pos = k.shape[:2], self.group, rows.pos[:, 0]
        near = extend(state.near, k, v, pos)
        slots = near.pos.shape[-1]
        mine = (jnp.maximum(pos, 0) // g * g)[:, None] + jnp.arange(g, dtype=jnp.int32)[None]
        at = jnp.broadcast_to((mine % slots)[:, None], (b, e, g))
        kc, vc = self.cores(q, gather(near.k, at)[:, :, None], gather(near.v, at)[:, :, None], rows.see)
        ends = (pos >= 0) & ((pos + 1) % g == 0)
        far = write(state.far, kc, vc, jnp.where(ends, pos // g, -1), pos + self.window)
        first = jnp.maximum(0, (pos + 1 - self.window) // g) * g
        out, lse = self._read(q, near.k, near.v, jnp.where(near.pos >= first[:, None], near.pos, -1), rows)
        out, _ = merge(out, lse, *self._read(q, far.k, far.v, far.pos, rows))
        return out.astype(q.dtype), Cores(near, far)

    def _read(self, q, k, v, k_pos, rows: Rows) -> tuple[Array, Array]:
        see = rows.see
        return attention(q, k, v, q_pos=rows.pos, k_pos=k_pos, softcap=see.softcap, scale=see.scale, out_dtype=jnp.float32, impl=see.impl)
