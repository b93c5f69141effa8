"""Bytes of one step of each reader on a cache of 16,384 slots, counted by tracing: nothing runs.

Choosing and attending are counted apart and held against the method's own formula (`Reader.traffic`). Slots are read where they lie, by
the kernel of `jaxtok_kernels.read`; XLA would gather them first, a copy that is written and read again. Pages in bf16; single rows in
float32, since the kernel copies narrower rows by pairs, as the last test says.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxtok.core.reader import Sight
from jaxtok.core.types import KV
from jaxtok.evals import cost
from jaxtok.methods import ActQKV, Landmark, Quest, RecycledAttention, SentenceKV, TidalDecode, TokenSelect
from jaxtok.ops.read import attend_all, attend_blocks, attend_slots

S, D, BUDGET = 16384, 128, 16384 // 20
LAYER = 5  # a sparse one
HEADS = [(8, 8), (32, 8)]


def in_place(freqs):
    return Sight(freqs, impl="interpret")


def structs(h: int, g: int, dtype):
    """(q, pos, cache, frequencies) of a step, as shapes."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    whole, wide = jnp.int32, jnp.float32
    rows = of(dtype, 1, g, S, D)
    kv = KV(rows, rows, of(whole, 1, g, S), of(wide, 1, g, S), of(whole, 1), of(whole, 1), of(whole), of(whole, 1, g))
    return of(dtype, 1, h, 1, D), of(whole, 1, 1), kv, of(wide, D // 2)


def counted(fn, *args, branch="max") -> int:
    out = cost.count(fn, *args, branch=branch)
    assert not out.unknown, out.unknown
    return out.bytes


@functools.cache
def full(h: int, g: int, dtype=jnp.bfloat16) -> int:
    """Bytes of attention to everything."""
    return counted(lambda q, pos, kv, freqs: attend_all(q, pos, kv, Sight(freqs)), *structs(h, g, dtype))


READ = {TidalDecode: lambda m: m.top_k, RecycledAttention: lambda m: m.top_k + m.stride - 1, SentenceKV: lambda m: m.budget}


@functools.cache
def step(method, h: int, g: int, dtype=jnp.bfloat16, layer: int = LAYER, hit: bool = False, whole: bool = False) -> dict[str, int]:
    """Bytes of a step: choosing, attending; and what the formula says. `whole`: it reads everything, in one pass with its choice."""
    sight = Sight if whole else in_place
    q, pos, kv, freqs = structs(h, g, dtype)
    state = jax.eval_shape(lambda kv: method.start({}, layer, kv, h), kv)
    formula, branch = method.traffic(layer, h, kv, hit), int(hit)
    if method.attends:

        def attend(state, carry, q, pos, kv, freqs):
            return method.attend({}, layer, state, carry, q, pos, kv, sight(freqs))

        carry = None
        for i in range(layer):  # what earlier layers hand on
            carry = jax.eval_shape(
                lambda s, c, *a, i=i: method.attend({}, i, s, c, *a[:3], sight(a[3]))[1], state, carry, q, pos, kv, freqs
            )
        both = counted(attend, state, carry, q, pos, kv, freqs, branch=1 - branch)
        if whole or type(method) not in READ:
            return dict(choose=0, attend=both, formula_choose=0, formula_attend=sum(formula))
        slots = jax.ShapeDtypeStruct((1, g, READ[type(method)](method)), jnp.int32)
        alone = counted(lambda q, pos, kv, slots, freqs: attend_slots(q, pos, kv, slots, sight(freqs)), q, pos, kv, slots, freqs)
        return dict(choose=both - alone, attend=alone, formula_choose=formula.choose, formula_attend=formula.attend)

    def choose(state, q, pos, kv, freqs):
        state = method.update({}, state, kv, jnp.zeros(kv.pos.shape[:2], jnp.int32))
        state, _, index = method.read({}, layer, state, None, q, pos, kv, sight(freqs))
        return state, index

    index = jax.eval_shape(choose, state, q, pos, kv, freqs)[1]
    attend = lambda q, pos, kv, index, freqs: attend_blocks(q, pos, kv, index.index, sight(freqs), method.block, index.rope)
    return dict(
        choose=counted(choose, state, q, pos, kv, freqs, branch=branch),
        attend=counted(attend, q, pos, kv, index, freqs),
        formula_choose=formula.choose,
        formula_attend=formula.attend,
    )


N_TOKENSELECT = dict(n_init=128, n_local=256, top_k=BUDGET - 384)
PAGES, ROWS = jnp.bfloat16, jnp.float32
METHODS = {
    "quest": (Quest(pages=BUDGET // 16), PAGES, False, 0.15),
    "actqkv": (ActQKV(budget=BUDGET, n_init=128, n_local=256), PAGES, False, 0.15),
    "sentencekv": (SentenceKV(budget=BUDGET, ends=(1, 2), sentences=800), ROWS, True, 0.15),
    "landmark": (Landmark(top_k=BUDGET // 51, share="heads"), ROWS, False, 0.15),
    "recycled": (RecycledAttention(top_k=BUDGET, stride=50), ROWS, True, 0.15),
    "tokenselect hit": (TokenSelect(**N_TOKENSELECT), ROWS, True, 0.15),
    "tokenselect miss": (TokenSelect(**N_TOKENSELECT), ROWS, False, 0.60),
    "tidaldecode": (TidalDecode(top_k=BUDGET, corrections=(13,)), ROWS, False, 0.15),
}


@pytest.mark.parametrize("h, g", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_a_sparse_layer(name, h, g):
    """At 5% of the cache: the count is the method's formula within 10%, choosing and attending apart, and the share of full attention is bounded."""
    method, dtype, hit, most = METHODS[name]
    got, all_of_it = step(method, h, g, dtype, hit=hit), full(h, g, dtype)
    print(name, h, g, {key: round(x / all_of_it, 4) for key, x in got.items()})
    assert (got["choose"] + got["attend"]) / all_of_it <= most
    for part in ("choose", "attend"):
        assert abs(got[part] - got[f"formula_{part}"]) <= 0.1 * got[f"formula_{part}"] + 0.0005 * all_of_it, (part, got)


@pytest.mark.parametrize("h, g", HEADS)
def test_recycled_over_fifty_steps(h, g):
    method = RecycledAttention(top_k=BUDGET, stride=50)
    sparse, whole = step(method, h, g, ROWS, hit=True), step(method, h, g, ROWS, whole=True)
    assert (49 * sparse["attend"] + whole["attend"]) / 50 / full(h, g, ROWS) <= 0.15
    assert abs(whole["attend"] - whole["formula_attend"]) <= 0.1 * whole["formula_attend"]


@pytest.mark.parametrize("h, g", HEADS)
def test_tidaldecode_over_32_layers(h, g):
    """Two dense layers, two that select, 28 that reuse the choice."""
    method = TidalDecode(top_k=BUDGET, dense_layers=2, corrections=(13,))
    layers = [step(method, h, g, ROWS, layer, whole=layer != 3) for layer in (0, 1, 2, 3, 13)]
    for got in layers:
        assert abs(got["attend"] - got["formula_attend"]) <= 0.1 * got["formula_attend"]
    dense, _, select, sparse, correct = (got["attend"] for got in layers)
    assert (2 * dense + select + correct + 28 * sparse) / 32 / full(h, g, ROWS) <= 0.20


def test_a_hit_spends_no_bytes_on_the_keys():
    """`lax.cond`: the branch that reuses a selection reads no key."""
    method = TokenSelect(**N_TOKENSELECT)
    hit, miss = step(method, 8, 8, hit=True), step(method, 8, 8)
    assert miss["choose"] - hit["choose"] > 0.45 * full(8, 8)


@pytest.mark.parametrize("name", [name for name, (_, dtype, *_) in METHODS.items() if dtype is ROWS])
def test_rows_of_sixteen_bits_come_in_pairs(name):
    """The TPU's memory holds two of them to a word: what is attended to costs about twice the formula."""
    method, _, hit, _ = METHODS[name]
    got = step(method, 32, 8, jnp.bfloat16, hit=hit)
    print(name, {key: round(x / full(32, 8), 4) for key, x in got.items()})
    assert got["attend"] <= 2.2 * got["formula_attend"] + 0.0005 * full(32, 8)
