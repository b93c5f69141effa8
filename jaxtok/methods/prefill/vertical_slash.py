"""Vertical-slash. Source: arXiv:2407.02490 (MInference)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxtok.core import check, select
from jaxtok.core.registry import register
from jaxtok.core.sparsifier import Sparsifier, View, best_blocks, between, newest, reach, with_tokens
from jaxtok.core.types import BlockTable
from jaxtok.ops.block_sparse import lines


@register(
    "vertical_slash",
    site="sparsify",
    paper="arXiv:2407.02490",
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    authors="Huiqiang Jiang and Yucheng Li and Chengruidong Zhang and Qianhui Wu and Xufang Luo and Surin Ahn and Zhenhua Han and Amir H. Abdi "
    "and Dongsheng Li and Chin-Yew Lin and Yuqing Yang and Lili Qiu",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(Sparsifier):
    """Read the keys (verticals) and the distances (slashes) that the last queries attend to most.

        A = attention of the last `rows` tokens;   vertical_j = sum_i A_ij,   slash_o = sum_i A_i,i-o
        query i reads key j  <=>  j is one of the best `verticals` keys, or a pair at one of the best `slashes` distances is in the pair's blocks

    The first `sinks` keys and the distances below `recent` are always among them, inside the numbers. Keys are chosen one by one (the
    table's mask), distances by whole blocks, in which the published code works too. Each query head has its own. verticals >= n is
    plain attention. The static length of a list is at most verticals + slashes * (1 + ceil(block_q / block_k)) blocks.

    Not causal in what it chooses: the prompt's last rows decide for all.
    Which head of a model takes this pattern and with how many lines is searched offline in the paper; here all heads take it.
    """

    verticals: int
    slashes: int
    rows: int = 64
    sinks: int = 30
    recent: int = 100
    block_q: int = 64
    block_k: int = 64
    tail: int = 0

    def __post_init__(self):
        for name, low in (("rows", 1), ("sinks", 0), ("recent", 1), ("block_q", 1), ("block_k", 1), ("tail", 0)):
            check.count(name, getattr(self, name), low)
        check.budget("verticals", self.verticals, self.sinks)
        check.budget("slashes", self.slashes, self.recent)

    @classmethod
    def sized(cls, capacity: int, given: dict[str, Any]) -> dict[str, Any]:
        """Fields with which about `capacity` keys are read, half of them by each kind of line."""
        half = max(1, capacity // 2)
        least = {"verticals": given.get("sinks", cls.sinks), "slashes": given.get("recent", cls.recent)}
        return {name: max(half, low) for name, low in least.items()}

    def whole(self, n: int) -> bool:
        return self.verticals >= n

    def table(self, params, view: View) -> BlockTable:
        see: dict[str, Any] = dict(window=view.window, softcap=view.softcap, scale=view.scale, impl=view.impl)
        vertical, slash = lines(view.q, view.k, view.pos, last=self.rows, **see)
        (_, _, _, n, _), size = view.sizes, (self.block_q, self.block_k)
        number = jnp.arange(n, dtype=jnp.int32)[None, None]
        live = jnp.broadcast_to((view.pos >= 0)[:, None], vertical.shape)
        key = select.choose(jnp.where(number < self.sinks, 1e9, vertical), live, self.verticals)
        apart = select.choose(jnp.where(number < self.recent, 1e9, slash), live, self.slashes)
        first = (jnp.arange(view.blocks(size[0]), dtype=jnp.int32) * size[0])[:, None]
        start = (jnp.arange(view.blocks(size[1]), dtype=jnp.int32) * size[1])[None]
        many = between(
            apart.astype(jnp.float32), first - start - size[1] + 1, first - start + size[0]
        )  # chosen distances between two blocks
        slanted = (many > 0) | newest(view, *size, 0)
        some = jnp.any(jnp.pad(key, ((0, 0), (0, 0), (0, -n % size[1]))).reshape(*key.shape[:2], view.blocks(size[1]), size[1]), -1)
        score = jnp.where(slanted | some[:, :, None], 0.0, -jnp.inf)
        most = self.verticals + self.slashes * (1 + -(-size[0] // size[1])) + -(-size[0] // size[1]) + 1
        table = best_blocks(score, reach(view, *size), slanted, most)
        whole = jnp.repeat(slanted, size[1], -1)[..., :n]
        return with_tokens(table, whole | key[:, :, None], size[1])
