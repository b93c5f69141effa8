"""The traffic model against the collectives of compiled programs, to the byte."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtok.parallel import gathered_attention, ring_attention, token_ring_attention, ulysses_attention
from jaxtok.parallel.traffic import Call, Collective, collectives, sent

SCHEMES = {"ring": ring_attention, "token_ring": token_ring_attention, "ulysses": ulysses_attention, "gathered": gathered_attention}


def program(scheme, call, layout="contiguous"):
    """(the mapped call, its arguments on the mesh)."""
    names = ("ring", "s") if call.ring > 1 else ("s",)
    shape = (call.ring, call.n) if call.ring > 1 else (call.n,)
    many = call.n * call.ring
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:many])
    rows, heads = P(None, names), P(None, None, names)

    def attend(q, k, v, bias, q_pos, k_pos, q_segment, k_segment):
        more = {"ring": "ring"} if call.ring > 1 else {}
        more |= dict(q_pos=q_pos, k_pos=k_pos, bias=bias, q_segment=q_segment, k_segment=k_segment)
        return SCHEMES[scheme](q, k, v, axis="s", layout=layout, **more)

    specs, t = (heads,) * 4 + (rows,) * 4, call.c * many
    zeros = lambda *shape, dtype=call.dtype: jnp.zeros(shape, dtype)
    at = lambda there: zeros(call.b, t, dtype=jnp.int32) if there else None
    args = (
        *(zeros(call.b, heads_, t, call.d) for heads_ in (call.h, call.g, call.g)),
        zeros(call.b, call.g, t, dtype=jnp.float32) if call.bias else None,
        *map(at, (True, True, call.segments, call.segments)),
    )
    placed = [None if x is None else jax.device_put(x, jax.NamedSharding(mesh, spec)) for spec, x in zip(specs, args, strict=True)]
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, heads)), placed


def bytes_of(found, kind):
    return sum(c.sent for c in found if c.kind == kind)


@pytest.mark.parametrize(
    "scheme, layout, call",
    [
        ("ring", "contiguous", Call(n=8, b=2, h=4, g=2, c=8, d=16, dtype=jnp.float32)),
        ("ring", "zigzag", Call(n=4, b=1, h=8, g=1, c=8, d=8, dtype=jnp.float32, bias=True, segments=True)),
        ("token_ring", "zigzag", Call(n=4, b=2, h=4, g=2, c=8, d=16, dtype=jnp.float32)),
        ("token_ring", "contiguous", Call(n=8, b=1, h=4, g=1, c=8, d=8, dtype=jnp.float32, segments=True)),
        ("ulysses", "contiguous", Call(n=4, b=2, h=8, g=4, c=8, d=16, dtype=jnp.float32)),
        ("ulysses", "contiguous", Call(n=4, b=1, h=8, g=2, c=8, d=16, dtype=jnp.float32, bias=True)),
        ("ulysses", "zigzag", Call(n=2, b=1, h=8, g=2, c=8, d=16, dtype=jnp.float32, ring=4)),
        ("gathered", "contiguous", Call(n=4, b=2, h=4, g=2, c=8, d=16, dtype=jnp.float32)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"n{x.n}g{x.g}",
)
def test_forward(scheme, layout, call):
    run, args = program(scheme, call, layout)
    found, want = collectives(jax.jit(run).lower(*args).compile()), sent(scheme, call)
    assert bytes_of(found, "collective-permute") == want.permute
    assert bytes_of(found, "all-to-all") == want.exchange
    assert bytes_of(found, "all-gather") == want.gather
    assert not bytes_of(found, "all-reduce") and not bytes_of(found, "reduce-scatter")


@pytest.mark.parametrize("layout, bias", [("contiguous", False), ("zigzag", True)])
def test_backward_of_the_ring(layout, bias):
    call = Call(n=4, b=1, h=4, g=2, c=8, d=8, dtype=jnp.float32, bias=bias)
    run, (q, k, v, given, *rest) = program("ring", call, layout)
    floats = (q, k, v) if given is None else (q, k, v, given)
    made, pull = jax.jit(lambda *floats: jax.vjp(lambda q, k, v, bias=None: run(q, k, v, bias, *rest), *floats))(*floats)
    found = collectives(jax.jit(lambda pull, made: pull(made)).lower(pull, made).compile())
    assert bytes_of(found, "collective-permute") == sent("ring", call, backward=True).total


def test_loops_are_counted_and_asked_for():
    text = """
HloModule m

%body (p: (f32[4])) -> (f32[4]) {
  %x = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
  ROOT %w = f32[4]{0} while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert collectives(text) == [Collective("all-gather", 16, 1, 2), Collective("collective-permute", 16, 5, 1)]
    assert [c.sent for c in collectives(text)] == [16, 80]
    with pytest.raises(ValueError, match="loop of unknown length"):
        collectives(text.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("")
    with pytest.raises(ValueError, match="only the ring's is modelled"):
        sent("gathered", Call(n=2, b=1, h=1, g=1, c=1, d=1), backward=True)
    with pytest.raises(ValueError, match="must be one of ring"):
        sent("star", Call(n=2, b=1, h=1, g=1, c=1, d=1))
