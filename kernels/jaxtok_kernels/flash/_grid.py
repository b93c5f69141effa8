"""The grid of the TPU kernels of flash and column_sum: a block of rows against a run of key blocks, or the reverse; what is not needed is not fetched."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtok_kernels.flash._block import Given, Ids, Spec, boxes, divide, ids, meets, pad, ranges, round_up, seen

KEYS = 512  # of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """One program is (sequence, KV head, outer block, step); the inner block of a step is the outer one's first needed block + step.

    Rows are the outer blocks, or with `by_keys` keys are. The r query heads of a group are folded into the rows of a block (r * block_q of
    them), so a key is fetched once for all of them. The number of steps is a number at run time: the longest run of any outer block.
    Blocks before and after a run cost nothing; those inside it that cannot hold a visible pair are fetched and not computed.
    """

    spec: Spec
    by_keys: bool
    b: int
    g: int
    e: int
    r: int
    nq: int
    nk: int
    block_q: int
    block_k: int
    ids: int  # 1, or 2 with segments

    @property
    def outer(self) -> int:
        return self.nk if self.by_keys else self.nq

    def inner(self, b, g, o, step, first, last, *_):
        """The inner block of a step, its run's last one for what lies beyond: the same block again is not fetched again."""
        at = (b * self.e + (g if self.e > 1 else 0)) * self.outer + o
        return jnp.minimum(first[at] + step, jnp.maximum(last[at], 0))

    def at(self, *where):
        """(i, j): the block of rows and the block of keys of a program."""
        o, n = where[2], self.inner(*where)
        return (n, o) if self.by_keys else (o, n)

    def rows(self, width: int) -> pl.BlockSpec:
        """Of [b g r T width]."""
        return pl.BlockSpec((None, None, self.r, self.block_q, width), lambda *w: (w[0], w[1], 0, self.at(*w)[0], 0))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of [b g S width]."""
        return pl.BlockSpec((None, None, self.block_k, width), lambda *w: (w[0], w[1], self.at(*w)[1], 0))

    def row_numbers(self, n: int) -> pl.BlockSpec:
        """Of [b g nq n r*block_q]."""
        return pl.BlockSpec((None, None, None, n, self.r * self.block_q), lambda *w: (w[0], w[1], self.at(*w)[0], 0, 0))

    def row_ids(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.ids, self.r * self.block_q), lambda *w: (w[0], self.at(*w)[0], 0, 0))

    def key_ids(self) -> pl.BlockSpec:
        return self._key_numbers(self.ids, self.e > 1)

    def key_bias(self) -> pl.BlockSpec:
        """Of [b g nk 1 block_k]."""
        return self._key_numbers(1, True)

    def _key_numbers(self, n: int, heads: bool) -> pl.BlockSpec:
        shape = (None, None, None, n, self.block_k)
        return pl.BlockSpec(shape, lambda *w: (w[0], w[1] if heads else 0, self.at(*w)[1], 0, 0))

    def place(self, first, last, q_box, k_box):
        """Inside the kernel: (step, whether it is the last, whether its tile has to be computed, whether its inner block was fetched)."""
        b, g, o, step = (pl.program_id(n) for n in range(4))
        steps, at = pl.num_programs(3), (b * self.e + (g if self.e > 1 else 0)) * self.outer + o
        i, j = self.at(b, g, o, step, first, last)
        rows = [q_box[(b * self.nq + i) * 4 + n] for n in range(4)]
        keys = [k_box[((b * self.e + (g if self.e > 1 else 0)) * self.nk + j) * 4 + n] for n in range(4)]
        need = (first[at] + step <= last[at]) & meets(self.spec, rows, keys, i, j, self.block_q, self.block_k)
        before = jnp.where(step > 0, o, o - 1), jnp.where(step > 0, step, steps) - 1
        same = self.inner(b, g, jnp.maximum(before[0], 0), before[1], first, last) == self.inner(b, g, o, step, first, last)
        return step, step == steps - 1, need, (before[0] < 0) | ~same


def make(spec: Spec, x: Given, q: jax.Array, k: jax.Array, *, rows: int, by_keys: bool) -> tuple[Grid, Ids]:
    """The grid of a call with about `rows` folded rows a block, and the positions in its blocks."""
    (b, h, t), (g, s) = q.shape[:3], k.shape[1:3]
    r = h // g
    if q.dtype == jnp.float16 and not spec.interpret:
        raise NotImplementedError("no kernel for float16 on TPUs: cast q, k, v to bfloat16")
    block_q = divide(t, max(rows // r // 16 * 16, 16), 16) if spec.block_q is None else min(spec.block_q, round_up(t, 16))
    block_k = divide(s, KEYS, 128) if spec.block_k is None else min(spec.block_k, round_up(s, 16))
    at = ids(x, r, block_q, block_k)
    grid = Grid(
        spec=spec,
        by_keys=by_keys,
        b=b,
        g=g,
        e=x.far.shape[1],
        r=r,
        nq=at.q.shape[1],
        nk=at.k.shape[2],
        block_q=block_q,
        block_k=block_k,
        ids=at.q.shape[2],
    )
    return grid, at


def run(grid: Grid, at: Ids, kernel: Callable, operands: list, outs: list, scratch: list, *, products: int, width: int, name: str):
    """The kernel over the grid. operands and outs: (array or shape, its BlockSpec); products: of a row and a key, `width` channels each."""
    _, *runs = ranges(grid.spec, at, grid.r)
    first, last = runs[grid.by_keys]
    q_box, k_box = boxes(at)
    steps = jnp.maximum(jnp.max(last - first) + 1, 1)
    pairs = grid.b * grid.g * grid.r * grid.nq * grid.block_q * grid.nk * grid.block_k
    moved = sum(x.size * x.dtype.itemsize for x, _ in [*operands, *outs])
    return pl.pallas_call(
        functools.partial(kernel, grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(grid.b, grid.g, grid.outer, steps),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in outs],
            scratch_shapes=scratch,
        ),
        out_shape=[x for x, _ in outs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * pairs * width * products, bytes_accessed=moved, transcendentals=pairs),
        name=name,
        interpret=grid.spec.interpret,
    )(*(x.reshape(-1) for x in (first, last, q_box, k_box)), *(x for x, _ in operands))


def biases(bias: jax.Array | None, grid: Grid) -> list:
    """The operand of the biases, where there are any."""
    if bias is None:
        return []
    x = pad(bias, grid.block_k, 2)
    return [(x.reshape(*x.shape[:2], grid.nk, 1, grid.block_k), grid.key_bias())]


def column(x: jax.Array) -> jax.Array:
    """Numbers along the lanes [n m] as columns [m n]."""
    return jnp.transpose(x)


def tile_seen(grid: Grid, q_at: jax.Array, k_at: jax.Array, by_columns: bool = False) -> jax.Array:
    """Which pairs of a tile are visible. Rows' ids are columns [R n] and keys' are [n K]; with by_columns [n R] and [K n]."""
    part = lambda x, n, column: x[:, n : n + 1] if column else x[n : n + 1]
    mine, theirs = ([part(x, n, c) for n in range(grid.ids)] for x, c in ((q_at, not by_columns), (k_at, by_columns)))
    return seen(grid.spec, mine[0], theirs[0], *(x[1] for x in (mine, theirs) if grid.ids > 1))
