"""Attention of the rows of pictures to those that stand near them in the picture's grid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxtok.core import check
from jaxtok.core.reduce import gather
from jaxtok.core.select import pack


class Near(NamedTuple):
    """Which rows each row sees, as a mask or as a list."""

    mask: Array | None = None  # bool [b n n]
    index: Array | None = None  # i32 [b n m]; -1 = unused entry


def pictures(cell: Int[Array, "b n 2"], apart: Int[Array, "b n k"]) -> Int32[Array, "b n"]:
    """The number of the picture that each row belongs to, for rows in raster order within each.

    A picture begins where cells no longer ascend in raster order or one of `apart` (a crop's number, how much text came before) changes. A
    row without a cell (-1) is a picture of its own.
    """
    if cell.ndim != 3 or cell.shape[-1] != 2 or apart.ndim != 3 or apart.shape[:2] != cell.shape[:2]:
        raise ValueError(f"cells are {list(cell.shape)} and apart {list(apart.shape)}; they must be [b n 2] and [b n k]")
    row, col = cell[..., 0], cell[..., 1]
    ahead = (row[:, 1:] > row[:, :-1]) | ((row[:, 1:] == row[:, :-1]) & (col[:, 1:] > col[:, :-1]))
    same = ahead & jnp.all(apart[:, 1:] == apart[:, :-1], -1) & (row[:, 1:] >= 0) & (row[:, :-1] >= 0)
    return jnp.cumsum(jnp.pad(~same, ((0, 0), (1, 0)))[:, : row.shape[1]], -1, dtype=jnp.int32)


def neighbours(cell: Int[Array, "b n 2"], picture: Int[Array, "b n"], live: Bool[Array, "b n"], *, reach: int, causal: bool = True) -> Near:
    """Live rows of the same picture at most `reach` rows and columns away, itself among them; causal: none that stands later.

    A list of (2 reach + 1)^2 entries (causal: half of that and one), or a mask where the list would not be a quarter of the rows. Cells of a
    picture must differ and ascend in raster order (`pictures`), or a list may lack some.
    """
    check.count("reach", reach, 0, 2**15)
    if cell.ndim != 3 or cell.shape[-1] != 2 or picture.shape != cell.shape[:2] or live.shape != picture.shape:
        raise ValueError(
            f"cells are {list(cell.shape)}, pictures {list(picture.shape)}, live {list(live.shape)}; they must be [b n 2], [b n], [b n]"
        )
    n, wide = cell.shape[1], 2 * reach + 1
    close = lambda x: (x[:, :, None] - x[:, None] <= reach) & (x[:, None] - x[:, :, None] <= reach)
    see = close(cell[..., 0]) & close(cell[..., 1]) & (picture[:, :, None] == picture[:, None])
    see = see & live[:, :, None] & live[:, None]
    see = see & jnp.tril(jnp.ones((n, n), bool))[None] if causal else see
    most = reach * wide + reach + 1 if causal else wide * wide
    return Near(index=pack(see, most).index) if 4 * most <= n else Near(mask=see)


def attend_near(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n c"],
    near: Near,
    *,
    bias: Float32[Array, "b n"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Float32[Array, "b h n c"], Float32[Array, "b h n"]]:
    """Attention of each row to those that `near` lists or marks -> (out, logsumexp), both float32; `ops.attention` says how.

    A list reads m keys a row (a gather), a mask all n of them. A row that sees nothing gets out 0 and lse -inf.
    """
    if q.ndim != 4 or k.ndim != 4 or v.shape[:3] != k.shape[:3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; they must be [b h n d], [b g n d], [b g n c]")
    (b, h, n, d), g = q.shape, k.shape[1]
    table = near.mask if near.index is None else near.index
    if k.shape != (b, g, n, d) or table is None or table.shape[:2] != (b, n):
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)} and who sees whom {None if table is None else list(table.shape)}")
    q = q.reshape(b, g, h // g, n, d)
    if near.index is None:
        y = jnp.einsum("bgrnd,bgmd->bgrnm", q, k, preferred_element_type=jnp.float32)
        extra, see, form = None if bias is None else bias[:, None], table, "bgrnm,bgmc->bgrnc"
    else:
        flat = near.index.reshape(b, -1)
        take = lambda x: gather(x, jnp.broadcast_to(flat[:, None], (b, g, flat.shape[1]))).reshape(b, g, n, -1, x.shape[-1])
        k, v = take(k), take(v)
        y = jnp.einsum("bgrnd,bgnmd->bgrnm", q, k, preferred_element_type=jnp.float32)
        extra, see, form = None if bias is None else gather(bias, flat).reshape(b, n, -1), near.index >= 0, "bgrnm,bgnmc->bgrnc"
    y = y * (d**-0.5 if scale is None else scale)
    y = y if softcap is None else softcap * jnp.tanh(y / softcap)
    y = y if extra is None else y + extra[:, None, None]
    limit = jnp.finfo(jnp.float32).max  # products of finite numbers may overflow
    y = jnp.where(see[:, None, None], jnp.clip(jnp.nan_to_num(y, nan=-limit), -limit, limit), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(y, -1, keepdims=True, initial=-jnp.inf))
    weight = jnp.exp(y - jnp.where(top > -jnp.inf, top, 0.0))
    total = jnp.sum(weight, -1)
    some = total > 0
    norm = jnp.where(some, total, 1.0)
    out = jnp.einsum(form, weight.astype(v.dtype), v, preferred_element_type=jnp.float32) / norm[..., None]
    lse = jnp.where(some, jnp.where(some, top[..., 0], 0.0) + jnp.log(norm), -jnp.inf)
    return jnp.where(some[..., None], out, 0.0).reshape(b, h, n, -1), lse.reshape(b, h, n)
