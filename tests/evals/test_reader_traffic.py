"""Bytes of one step of each reader on a cache of 16,384 slots in bf16, counted by tracing: nothing runs.

Choosing and attending are counted apart and held against the method's own formula (`Reader.traffic`). XLA cannot read scattered slots in
place: its gather writes a copy that attention reads again. That copy is counted too, held against its own formula and left out of the
shares below, which are those of a kernel that reads in place.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxtok.core.reader import Sight
from jaxtok.core.types import KV
from jaxtok.evals import cost
from jaxtok.methods import ActQKV, Landmark, Quest, RecycledAttention, SentenceKV, TidalDecode, TokenSelect
from jaxtok.ops.cache import block_slots
from jaxtok.ops.read import attend_all, attend_slots

S, D, BUDGET = 16384, 128, 16384 // 20
LAYER = 5  # a sparse one
HEADS = [(8, 8), (32, 8)]


def structs(h: int, g: int):
    """(q, pos, cache, frequencies) of a step, as shapes."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    half, whole, wide = jnp.bfloat16, jnp.int32, jnp.float32
    kv = KV(
        of(half, 1, g, S, D),
        of(half, 1, g, S, D),
        of(whole, 1, g, S),
        of(wide, 1, g, S),
        of(whole, 1),
        of(whole, 1),
        of(whole),
        of(whole, 1, g),
    )
    return of(half, 1, h, 1, D), of(whole, 1, 1), kv, of(wide, D // 2)


def counted(fn, *args, branch="max"):
    out = cost.count(fn, *args, branch=branch)
    assert not out.unknown, out.unknown
    return out.bytes, out.by_primitive.get("gather", (0, 0))[1]


@functools.cache
def full(h: int, g: int) -> int:
    """Bytes of attention to everything."""
    q, pos, kv, freqs = structs(h, g)
    return counted(lambda q, pos, kv, freqs: attend_all(q, pos, kv, Sight(freqs)), q, pos, kv, freqs)[0]


READ = {TidalDecode: lambda m: m.top_k, RecycledAttention: lambda m: m.top_k + m.stride - 1, SentenceKV: lambda m: m.budget}


@functools.cache
def step(method, h: int, g: int, layer: int = LAYER, hit: bool = False) -> dict[str, int]:
    """Bytes of a step: choosing, attending in place, copying; and what the formula says."""
    q, pos, kv, freqs = structs(h, g)
    state = jax.eval_shape(lambda kv: method.start({}, layer, kv, h), kv)
    branch = int(hit)
    formula = method.traffic(layer, h, kv, hit)
    if method.attends:

        def attend(state, carry, q, pos, kv, freqs):
            return method.attend({}, layer, state, carry, q, pos, kv, Sight(freqs))

        carry = None
        for i in range(layer):  # what earlier layers hand on
            carry = jax.eval_shape(
                lambda s, c, *a, i=i: method.attend({}, i, s, c, *a[:3], Sight(a[3]))[1], state, carry, q, pos, kv, freqs
            )
        both, gathered = counted(attend, state, carry, q, pos, kv, freqs, branch=1 - branch)
        if not gathered or type(method) not in READ:  # choosing and attending share a pass, or their gathers cannot be told apart
            return dict(choose=0, attend=both - gathered, copy=gathered, formula_choose=0, formula_attend=sum(formula))
        slots = jax.ShapeDtypeStruct((1, g, READ[type(method)](method)), jnp.int32)
        alone, copied = counted(lambda q, pos, kv, slots, freqs: attend_slots(q, pos, kv, slots, Sight(freqs)), q, pos, kv, slots, freqs)
        return dict(choose=both - alone, attend=alone - copied, copy=copied, formula_choose=formula.choose, formula_attend=formula.attend)

    def choose(state, q, pos, kv, freqs):
        state = method.update({}, state, kv, jnp.zeros(kv.pos.shape[:2], jnp.int32))
        state, _, index = method.read({}, layer, state, None, q, pos, kv, Sight(freqs))
        return state, index

    index = jax.eval_shape(choose, state, q, pos, kv, freqs)[1]
    attend = lambda q, pos, kv, index, freqs: attend_slots(q, pos, kv, block_slots(index, method.block), Sight(freqs))
    chosen = counted(choose, state, q, pos, kv, freqs, branch=branch)[0]
    both, gathered = counted(attend, q, pos, kv, index.index, freqs)
    return dict(choose=chosen, attend=both - gathered, copy=gathered, formula_choose=formula.choose, formula_attend=formula.attend)


N_TOKENSELECT = dict(n_init=128, n_local=256, top_k=BUDGET - 384)
METHODS = {
    "quest": (Quest(pages=BUDGET // 16), False, 0.15),
    "actqkv": (ActQKV(budget=BUDGET, n_init=128, n_local=256), False, 0.15),
    "sentencekv": (SentenceKV(budget=BUDGET, ends=(1, 2), sentences=800), True, 0.15),
    "landmark": (Landmark(top_k=BUDGET // 51, share="heads"), False, 0.15),
    "recycled": (RecycledAttention(top_k=BUDGET, stride=50), True, 0.15),
    "tokenselect hit": (TokenSelect(**N_TOKENSELECT), True, 0.15),
    "tokenselect miss": (TokenSelect(**N_TOKENSELECT), False, 0.60),
    "tidaldecode": (TidalDecode(top_k=BUDGET, corrections=(13,)), False, 0.15),
}


@pytest.mark.parametrize("h, g", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_a_sparse_layer(name, h, g):
    """At 5% of the cache: the count is the method's formula within 10%, choosing and attending apart, and the share of full attention is bounded."""
    method, hit, most = METHODS[name]
    got = step(method, h, g, hit=hit)
    print(name, h, g, {key: round(x / full(h, g), 4) for key, x in got.items()})
    assert (got["choose"] + got["attend"]) / full(h, g) <= most
    for part in ("choose", "attend"):
        assert abs(got[part] - got[f"formula_{part}"]) <= 0.1 * got[f"formula_{part}"] + 0.0005 * full(h, g), (part, got)
    assert got["copy"] <= 2.1 * got["attend"]


@pytest.mark.parametrize("h, g", HEADS)
def test_recycled_over_fifty_steps(h, g):
    method = RecycledAttention(top_k=BUDGET, stride=50)
    sparse, whole = step(method, h, g, hit=True), step(method, h, g)
    assert (49 * sparse["attend"] + whole["attend"]) / 50 / full(h, g) <= 0.15
    assert abs(whole["attend"] - whole["formula_attend"]) <= 0.1 * whole["formula_attend"]
    assert whole["copy"] == 0, "a full step gathers nothing"


@pytest.mark.parametrize("h, g", HEADS)
def test_tidaldecode_over_32_layers(h, g):
    """Two dense layers, two that select, 28 that reuse the choice."""
    method = TidalDecode(top_k=BUDGET, dense_layers=2, corrections=(13,))
    layers = [step(method, h, g, layer) for layer in (0, 1, 2, 3, 13)]
    for got in layers:
        assert abs(got["attend"] - got["formula_attend"]) <= 0.1 * got["formula_attend"]
    dense, _, select, sparse, correct = (got["attend"] for got in layers)
    assert (2 * dense + select + correct + 28 * sparse) / 32 / full(h, g) <= 0.20


def test_a_hit_spends_no_bytes_on_the_keys():
    """`lax.cond`: the branch that reuses a selection reads no key."""
    method = TokenSelect(**N_TOKENSELECT)
    hit, miss = step(method, 8, 8, hit=True), step(method, 8, 8)
    assert miss["choose"] - hit["choose"] > 0.45 * full(8, 8)
