"""Every scheme and layout on 8 virtual devices against dense attention: values, gradients, masks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtok.parallel import Layout, gathered_attention, ring_attention, token_ring_attention, ulysses_attention

T, D = 48, 8
SCHEMES = {
    "ring": ring_attention,
    "token_ring": token_ring_attention,
    "ulysses": ulysses_attention,
    "gathered": gathered_attention,
}


def operands(h, g, *, seed=0, b=2, packed=False, bias=True, dead=(0, 7)):
    """Left padding, a bias, and three packed sequences."""
    rng = np.random.default_rng(seed)
    pos = np.stack([np.maximum(np.arange(T) - n, -1) for n in dead[:b]]).astype(np.int32)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x = {"q": normal(b, h, T, D), "k": normal(b, g, T, D), "v": normal(b, g, T, D), "pos": pos}
    x["bias"] = normal(b, g, T) if bias else None
    x["segment"] = np.sort(rng.integers(0, 3, (b, T)), 1).astype(np.int32) if packed else None
    x["weights"] = normal(b, h, T, D), normal(b, h, T)
    return x


def dense(q, k, v, bias, pos, segment, causal, window):
    """The definition, float32 at the highest precision."""
    r = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, r, 1), jnp.repeat(v, r, 1)
    i, j = pos[:, None, :, None], pos[:, None, None]
    see = (i >= 0) & (j >= 0) & ((j <= i) | (not causal)) & (True if window is None else i - j < window)
    see &= True if segment is None else (segment[:, None, :, None] == segment[:, None, None])
    y = jnp.einsum("bhtd,bhsd->bhts", q, k, precision="highest") * D**-0.5
    y = y if bias is None else y + jnp.repeat(bias, r, 1)[:, :, None]
    y = jnp.where(see, y, -1e30)
    lse = jax.nn.logsumexp(y, -1)
    p = jnp.where(see, jnp.exp(y - lse[..., None]), 0)
    return jnp.einsum("bhts,bhsd->bhtd", p, v, precision="highest"), jnp.where(see.any(-1), lse, -jnp.inf)


def total(weights, out, lse):
    return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * weights[1])


@functools.cache
def wanted(h, g, causal, window, packed):
    x = operands(h, g, packed=packed)

    @jax.jit
    def run(q, k, v, bias):
        def loss(*floats):
            out, lse = dense(*floats, jnp.asarray(x["pos"]), None if x["segment"] is None else jnp.asarray(x["segment"]), causal, window)
            return total(x["weights"], out, lse), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    (_, values), grads = run(x["q"], x["k"], x["v"], x["bias"])
    return jax.device_get((*values, *grads))


def sharded(scheme, layout, n, causal, window, x, mesh=None, **options):
    """(out, lse, gradients) of a scheme, in the tokens' own order."""
    mesh = jax.make_mesh((n,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n]) if mesh is None else mesh
    names = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    rows, heads = P(None, names), P(None, None, names)
    layout, t = Layout(layout, mesh.shape["ring"] if "ring" in mesh.shape else n), T

    def attend(q, k, v, bias, pos, segment):
        more = {} if segment is None else {"q_segment": segment, "k_segment": segment}
        return SCHEMES[scheme](
            q,
            k,
            v,
            q_pos=pos,
            k_pos=pos,
            bias=bias,
            layout=layout.kind,
            causal=causal,
            window=window,
            **{"axis": "sequence"} | options,
            **more,
        )

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(heads,) * 4 + (rows,) * 2, out_specs=(heads, heads))

    @jax.jit
    def run(q, k, v, bias, pos, segment, weights):
        put = lambda a, axis, fill=0: None if a is None else layout.place(a, axis=axis, fill=fill)

        def loss(*floats):
            found = mapped(*(put(a, 2) for a in floats), put(pos, 1, -1), put(segment, 1))
            out, lse = (layout.restore(a, t, axis=2) for a in found)
            return total(weights, out, lse), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    with jax.set_mesh(mesh):
        (_, values), grads = run(x["q"], x["k"], x["v"], x["bias"], x["pos"], x["segment"], x["weights"])
    return jax.device_get((*values, *grads))


def agree(found, want):
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        most = max(1, np.abs(b[np.isfinite(b)]).max())
        np.testing.assert_allclose(a, b, atol=(2e-6 if i < 2 else 1e-5) * most, rtol=0, err_msg=str(i))


MASKS = {"causal": (True, None, False), "full": (False, None, False), "packed": (True, None, True), "window": (True, 9, False)}
CASES = [
    *(("ring", layout, n, "causal", 4, 2) for layout in ("contiguous", "striped", "zigzag") for n in (1, 2, 4, 8)),
    *(("ring", layout, 4, mask, 4, 1) for layout in ("contiguous", "striped", "zigzag") for mask in ("full", "packed", "window")),
    *(("token_ring", layout, 4, "causal", 4, 4) for layout in ("contiguous", "striped", "zigzag")),
    *(("token_ring", "zigzag", n, mask, 4, 2) for n, mask in ((8, "packed"), (2, "window"), (4, "full"))),
    *(("ulysses", layout, 4, "causal", 8, 2) for layout in ("contiguous", "striped", "zigzag")),
    *(("ulysses", "contiguous", n, mask, 8, 2) for n, mask in ((8, "packed"), (2, "window"), (2, "full"))),
    *(("gathered", layout, 4, "causal", 4, 2) for layout in ("contiguous", "striped", "zigzag")),
    *(("gathered", "contiguous", n, mask, 4, 2) for n, mask in ((8, "packed"), (2, "window"), (4, "full"))),
]


@pytest.mark.parametrize("scheme, layout, n, mask, h, g", CASES, ids=["-".join(map(str, c)) for c in CASES])
def test_equals_dense(scheme, layout, n, mask, h, g):
    causal, window, packed = MASKS[mask]
    found = sharded(scheme, layout, n, causal, window, operands(h, g, packed=packed))
    agree(found, wanted(h, g, causal, window, packed))


@pytest.mark.parametrize("layout, shape", [("zigzag", (2, 4)), ("striped", (4, 2)), ("contiguous", (1, 2)), ("zigzag", (2, 1))])
def test_usp(layout, shape):
    """Two axes; with one device on an axis it is the other scheme alone."""
    mesh = jax.make_mesh(shape, ("ring", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: math.prod(shape)])
    found = sharded("ulysses", layout, None, True, None, operands(8, 2), mesh, axis="heads", ring="ring")
    agree(found, wanted(8, 2, True, None, False))


@pytest.mark.parametrize(
    "scheme, layout", [("ring", "contiguous"), ("ring", "striped"), ("ring", "zigzag"), ("token_ring", "zigzag"), ("ulysses", "contiguous"), ("gathered", "striped")]
)  # fmt: skip
def test_explicit_mesh(scheme, layout):
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    h = 8 if scheme == "ulysses" else 4
    x = operands(h, 2)
    placed = Layout(layout, 4)
    with jax.set_mesh(mesh):
        heads, rows = P(None, None, "sequence"), P(None, "sequence")

        @jax.jit
        @functools.partial(jax.shard_map, in_specs=(heads,) * 4 + (rows,), out_specs=(heads, heads))
        def run(q, k, v, bias, pos):
            return SCHEMES[scheme](q, k, v, q_pos=pos, k_pos=pos, bias=bias, axis="sequence", layout=layout)

        put = lambda a, axis, spec, fill=0: jax.device_put(placed.place(jnp.asarray(a), axis=axis, fill=fill), spec)
        found = jax.device_get(run(*(put(x[name], 2, heads) for name in ("q", "k", "v", "bias")), put(x["pos"], 1, rows, -1)))
    agree([placed.restore(jnp.asarray(a), T, axis=2) for a in found], wanted(h, 2, True, None, False)[:2])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_pmap(layout):
    placed, x = Layout(layout, 4), operands(4, 2, bias=False)

    def run(q, k, v, pos):
        return ring_attention(q, k, v, q_pos=pos, k_pos=pos, axis="sequence", layout=layout)

    cut = lambda a, axis, fill=0: np.stack(np.split(np.asarray(placed.place(jnp.asarray(a), axis=axis, fill=fill)), 4, axis))
    out, lse = jax.pmap(run, axis_name="sequence", devices=jax.devices()[:4])(*(cut(x[n], 2) for n in "qkv"), cut(x["pos"], 1, -1))
    whole = [placed.restore(jnp.asarray(np.concatenate(np.asarray(a), 2)), T, axis=2) for a in (out, lse)]
    see = dense(*(jnp.asarray(x[n]) for n in "qkv"), None, jnp.asarray(x["pos"]), None, True, None)
    agree([np.asarray(a) for a in whole], jax.device_get(see))


def test_layouts():
    """Tokens come back; the work of the devices at T = 8,192, N = 8 is what the balanced layouts promise."""
    x = jnp.arange(2 * 13).reshape(2, 13)
    for kind in ("contiguous", "striped", "zigzag"):
        layout = Layout(kind, 3)
        placed = layout.place(x, fill=-1)
        np.testing.assert_array_equal(layout.restore(placed, 13), x)
        np.testing.assert_array_equal(layout.positions(13), np.where(placed[0] < 0, -1, placed[0]))
        assert layout.pairs(13).sum() == 13 * 14 // 2
    assert Layout("zigzag", 2).order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert Layout("striped", 2).order(6).tolist() == [0, 2, 4, 1, 3, 5]
    share = {kind: (p := Layout(kind, 8).pairs(8192)).max() / p.min() for kind in ("contiguous", "striped", "zigzag")}
    assert share["zigzag"] == 1 and share["striped"] < 1.02 and share["contiguous"] > 10, share


def test_refused():
    run = lambda n=2, h=4, g=2, c=6, **options: jax.eval_shape(
        jax.vmap(
            lambda q, k, pos: ring_or(options)(
                q, k, k, q_pos=pos, k_pos=pos, axis="s", **{k: v for k, v in options.items() if k != "scheme"}
            ),
            axis_name="s",
        ),
        *(jax.ShapeDtypeStruct(s, t) for s, t in (((n, 1, h, c, 4), jnp.float32), ((n, 1, g, c, 4), jnp.float32), ((n, 1, c), jnp.int32))),
    )
    ring_or = lambda options: SCHEMES[options.get("scheme", "ring")]
    with pytest.raises(ValueError, match="layout 'spiral' must be one of"):
        run(layout="spiral")
    with pytest.raises(ValueError, match="zigzag shard is two chunks: 5"):
        run(c=5, layout="zigzag")
    with pytest.raises(ValueError, match="static int >= 1"):
        run(window=0)
    with pytest.raises(ValueError, match="6 query heads cannot be shared by 4"):
        run(n=4, h=6, scheme="ulysses")
    with pytest.raises(ValueError, match="counts shards"):
        Layout("zigzag", 0)
    with pytest.raises(ValueError, match="cannot hold 9 tokens"):
        Layout("zigzag", 2).restore(jnp.zeros((1, 11)), 9)
