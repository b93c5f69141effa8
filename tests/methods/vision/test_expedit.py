"""Expedit against its formulas, the official outputs and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import gather, reduce, representative
from jaxtok.core.types import Evidence
from jaxtok.methods import Expedit
from jaxtok.methods.vision.expedit import distances, layout, spread
from jaxtok.models import encoder, vit
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.toyrows import normal, rows

small = lambda n: Expedit(grid=(4, 4), clusters=(n // 4, 4), restore=3, tau=1e4 if n == 16 else 0.5, k=1 if n == 16 else 4, special=1)


@functools.partial(jax.jit, static_argnums=0)
def run(method, tokens, z):
    """(clustered rows, their affinities, what z brings back)."""
    state, plan = method.plan({}, method.start({}, tokens), tokens, Evidence())
    moved = state._replace(slots=jax.tree.map(lambda a: gather(a, representative(plan)), state.slots))
    out = reduce(plan, tokens)
    now = tokens._replace(source=jnp.broadcast_to(jnp.arange(tokens.pos.shape[1], dtype=jnp.int32)[None], tokens.pos.shape))
    now = now._replace(source=reduce(plan, now).source)
    return out, plan.w, method.undo({}, moved, out._replace(x=z), now)


def pixels(x, special=0):
    """Rows of maps [b H W c], behind class rows."""
    b, high, wide, c = x.shape
    flat = np.concatenate([np.zeros((b, special, c), np.float32), x.reshape(b, -1, c)], 1)
    return rows(flat, special, grid=(high, wide))


def reference(x, clusters, neighbours, tau, iterations):
    """Loops over the pixels of one map [H W c] -> (centroids, affinities)."""
    high, wide, _ = x.shape
    h, w = clusters
    cells = [(i, j) for i in range(h) for j in range(w)]
    cut = lambda i, n, k: slice(i * n // k, -(-(i + 1) * n // k))
    c = [x[cut(i, high, h), cut(j, wide, w)].mean((0, 1)) for i, j in cells]
    q = np.zeros((len(cells), high, wide))
    for _ in range(iterations):
        q[:] = 0
        for y in range(high):
            for k in range(wide):
                mine = (y * h // high, k * w // wide)
                near = [m for m, cell in enumerate(cells) if max(abs(cell[0] - mine[0]), abs(cell[1] - mine[1])) <= neighbours // 2]
                e = np.exp([-tau * ((x[y, k] - c[m]) ** 2).sum() for m in near])
                q[near, y, k] = e / e.sum()
        c = [(q[m][..., None] * x).sum((0, 1)) / q[m].sum() for m in range(len(cells))]
    return np.array(c), q


def returned(x, c, z, tau, k, power):
    out = []
    for p in x.reshape(-1, x.shape[-1]):
        w = np.exp(-tau * ((p - c) ** 2).sum(-1))
        w = np.where(w >= np.sort(w)[-k], w, 0)
        out.append((w[:, None] * z).sum(0) / (w.sum() if power == 1 else np.sqrt((w**2).sum())))
    return np.array(out)


@pytest.mark.parametrize("clusters, neighbours, variant", [((3, 3), 3, "official"), ((2, 4), 5, "paper")])
def test_reference(clusters, neighbours, variant):
    x = normal(1, 2, 6, 7, 5).astype(np.float64)
    m = clusters[0] * clusters[1]
    z = normal(2, 2, m + 1, 5)
    method = Expedit(grid=(6, 7), clusters=clusters, restore=2, tau=0.2, neighbours=neighbours, k=4, special=1, variant=variant)
    out, w, back = run(method, pixels(x, 1), jnp.asarray(z))
    for i in range(2):
        c, q = reference(x[i], clusters, neighbours, 0.2, 5)
        np.testing.assert_allclose(out.x[i, 1:], c, atol=1e-5)
        np.testing.assert_allclose(w[i, 1:, 1:], q.reshape(m, -1) / q.reshape(m, -1).sum(1, keepdims=True), atol=1e-5)
        np.testing.assert_allclose(back[i, 1:], returned(x[i], c, z[i, 1:], 0.2, 4, 2 if variant == "official" else 1), atol=1e-4)
        np.testing.assert_array_equal(back[i, 0], z[i, 0])
    np.testing.assert_allclose(np.asarray(out.size).sum(1), 43, rtol=1e-5)


def test_limits():
    """As many clusters as pixels and a sharp softmax: the identity both ways; constants stay constant where weights sum to 1 only."""
    x = normal(3, 1, 4, 4, 6)
    out, _, back = run(Expedit(grid=(4, 4), clusters=(4, 4), restore=1, tau=1e3, k=1), pixels(x), jnp.asarray(x.reshape(1, 16, 6)))
    np.testing.assert_allclose(out.x, x.reshape(1, 16, 6), atol=1e-5)
    np.testing.assert_allclose(back, x.reshape(1, 16, 6), atol=1e-5)
    z = jnp.full((1, 4, 6), 2.0)
    paper, official = (run(Expedit(grid=(4, 4), clusters=(2, 2), restore=1, variant=v), pixels(x), z)[2] for v in ("paper", "official"))
    np.testing.assert_allclose(paper, 2.0, rtol=1e-5)
    assert float(jnp.abs(official - 2.0).max()) > 0.1
    w = spread(distances(jnp.asarray(normal(4, 1, 9, 3)), jnp.asarray(normal(5, 1, 5, 3))), jnp.ones((1, 9, 5), bool), 0.3, 3, 1)
    np.testing.assert_allclose(jnp.sum(w, -1), 1.0, rtol=1e-6)
    assert ((np.asarray(w) > 0).sum(-1) == 3).all()


def test_official_outputs(data):
    """The masks, the affinities of the last round, the clusters, the weights back and what they bring."""
    for case in cases(data, "expedit"):
        x, clusters = case["x"], (int(case["cluster_h"]), int(case["cluster_w"]))
        b, high, wide, _ = x.shape
        options = dict(
            tau=float(case["temperature"]), neighbours=int(case["cluster_window"]), k=int(case["k"]), iterations=int(case["n_iters"])
        )
        method = Expedit(grid=(high, wide), clusters=clusters, restore=1, **options)
        _, near, label = layout((high, wide), clusters, method.neighbours)
        np.testing.assert_array_equal(near, case["neighbour_mask"])
        np.testing.assert_array_equal(np.broadcast_to(label, case["init_label_map"].shape), case["init_label_map"])
        q, c = jax.jit(method.clustered)(jnp.asarray(x.reshape(b, high * wide, -1)), jnp.ones((b, high * wide), bool))
        np.testing.assert_allclose(q[:, 0], case["affinity_last"], atol=2e-5 * max(1.0, method.tau))  # tau times the rounding
        np.testing.assert_allclose(c[:, 0], case["clusters"].reshape(b, len(near), -1), atol=2e-5)
        out, _, back = run(method, pixels(x), jnp.asarray(case["z"][..., : x.shape[-1]]))
        np.testing.assert_allclose(out.x, case["clusters"].reshape(b, len(near), -1), atol=2e-5)
        w = spread(
            distances(jnp.asarray(x.reshape(b, high * wide, -1)), c[:, 0]),
            jnp.ones((b, high * wide, len(near)), bool),
            method.tau,
            method.k,
            2,
        )
        np.testing.assert_allclose(w, case["attention_l2"], atol=5e-5)
        np.testing.assert_allclose(jnp.einsum("bpm,bmc->bpc", w, case["z"]), case["out"], atol=2e-4)
        np.testing.assert_allclose(back, case["out"][..., : x.shape[-1]], atol=2e-4)
        nearest = dataclasses.replace(method, k=1)  # one cluster, whose weight is 1: the naive way back
        np.testing.assert_allclose(
            run(nearest, pixels(x), jnp.asarray(case["z"][..., : x.shape[-1]]))[2], case["out_naive_unpool"][..., : x.shape[-1]], atol=1e-5
        )


def test_official_windows(data):
    """Windows with zeros past the border: clusters of the joined grid, and what they bring back."""
    for case in cases(data, "expedit_windowed"):
        x, side, window = case["x"], round(float(case["num_cluster"]) ** 0.5), int(case["window"])
        b, high, wide, channels = x.shape
        options = dict(
            tau=float(case["temperature"]), neighbours=int(case["cluster_window"]), k=int(case["k"]), iterations=int(case["n_iters"])
        )
        method = Expedit(grid=(high, wide), clusters=(side, side), window=window, restore=1, **options)
        ny, nx = method.windows
        assert (ny * window, nx * window) == (int(case["pad_h"]), int(case["pad_w"]))
        cut = lambda a, n: a.reshape(b, ny, n, nx, n, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b * ny * nx, n * n, -1)  # noqa: B023
        padded = np.zeros((b, ny * window, nx * window, channels), np.float32)
        padded[:, :high, :wide] = x
        split = cut(padded, window)
        q, c = jax.jit(method.clustered)(jnp.asarray(split.reshape(b, -1, channels)), jnp.ones((b, ny * nx * window**2), bool))
        want = cut(case["clustered"], side)
        np.testing.assert_allclose(c.reshape(want.shape), want, atol=2e-5)
        w = spread(
            distances(jnp.asarray(split), jnp.asarray(want)), jnp.ones((len(split), window**2, side**2), bool), method.tau, method.k, 2
        )
        back = np.asarray(jnp.einsum("vpm,vmc->vpc", w, cut(case["z"], side)))
        joined = back.reshape(b, ny, nx, window, window, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, ny * window, nx * window, -1)
        np.testing.assert_allclose(joined[:, :high, :wide], case["out"], atol=2e-4)
        tokens = pixels(x)
        out = run(method, tokens, jnp.zeros((b, method.count(high * wide, high * wide), channels)))[0]
        live = np.asarray(out.pos) >= 0
        joined = case["clustered"].reshape(b, -1, channels)
        for i in range(b):  # clusters that hold pixels of the image, in the order of the joined grid
            found = np.asarray(out.x[i])[live[i]]
            place = [int(np.argmin(np.abs(joined[i] - row).sum(-1))) for row in found]
            assert place == sorted(place) and len(set(place)) == len(place)
            np.testing.assert_allclose(found, joined[i][place], atol=2e-5)


def test_in_an_encoder():
    """Before layer 1, back before layer 2: a middle layer that does nothing gives the rows that the formulas give."""
    cfg = EncoderConfig(width=8, layers=3, heads=2, hidden=8, image=(8, 8), patch=(2, 2), channels=3, final_norm=False)
    params = encoder.init(cfg, jax.random.key(0))
    still = {k: jnp.zeros_like(v) if k in ("o", "down") else v for k, v in params["layers"][1].items()}
    params["layers"] = (params["layers"][0], still, still)
    method = Expedit(grid=(4, 4), clusters=(2, 2), restore=2, tau=0.3, k=3, special=1)
    tokens = vit.embed(cfg, params, jax.random.normal(jax.random.key(1), (2, 8, 8, 3)))
    found = jax.jit(lambda t: vit.encode(cfg, params, t, Recipe(vit=((1, method),))).tokens)(tokens)
    first = np.asarray(jax.jit(lambda t: vit.encode(cfg, params, t, until=1).tokens.x)(tokens), np.float64)
    for i in range(2):
        c, _ = reference(first[i, 1:].reshape(4, 4, 8), (2, 2), 5, 0.3, 5)
        np.testing.assert_allclose(found.x[i, 1:], returned(first[i, 1:], c, c, 0.3, 3, 2), atol=1e-4)
    np.testing.assert_allclose(found.x[:, 0], first[:, 0], atol=1e-5)
    assert (np.asarray(found.source) == np.arange(17)).all() and (np.asarray(found.pos) == np.arange(17)).all()


def test_bad_input():
    good = dict(grid=(4, 4), clusters=(2, 2), restore=2)
    for bad in ({"clusters": (5, 2)}, {"tau": 0.0}, {"k": 0}, {"variant": "l3"}, {"clusters": (2, 3), "window": 2}, {"grid": (0, 4)}):
        with pytest.raises(ValueError):
            Expedit(**good | bad)
