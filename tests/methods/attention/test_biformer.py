"""BiFormer against loops written from its card, the official outputs, its limits; its cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.methods import BiFormer
from jaxtok.methods.attention import biformer
from jaxtok.methods.attention.biformer import enhance
from tests.methods.attention.layers import config, exponent, full, gradients, layer, mix, normal, softmax
from tests.methods.golden import cases

small = {
    "biformer": lambda n: BiFormer(side=2, topk=(2, -2), kernel=3),
    "biformer:official": lambda n: BiFormer(side=3, topk=(2,), kernel=0, variant="official", soft=True),
}
regional, route = jax.jit(biformer.regional, static_argnums=5), jax.jit(biformer.route, static_argnums=(3, 4))
regions, cells = (jax.jit(f, static_argnums=(1, 2)) for f in (biformer.regions, biformer.cells))


def members(grid, side):
    """The cells of each region, in order; a region may be empty."""
    high, wide = -(-grid[0] // side), -(-grid[1] // side)
    box = [[] for _ in range(side**2)]
    for y in range(grid[0]):
        for x in range(grid[1]):
            box[y // high * side + x // wide].append(y * grid[1] + x)
    return box, high * wide


def convolved(v, kernel, bias, grid):
    """[n c]: the depthwise convolution, by loops."""
    (rows, cols), half, out = grid, kernel.shape[0] // 2, np.zeros(v.shape)
    for y in range(rows):
        for x in range(cols):
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    if 0 <= y + dy < rows and 0 <= x + dx < cols:
                        out[y * cols + x] += kernel[dy + half, dx + half, 0] * v[(y + dy) * cols + x + dx]
    return out + bias


def reference(q, k, v, live, grid, side, topk, scale, pads=False, soft=False):
    """One picture, [h n d] each: routing and attention by loops -> [n h*d], regions listed."""
    h, n, d = q.shape
    box, size = members(grid, side)
    alive = [[j for j in b if live[j]] for b in box]
    wide = lambda x: x.transpose(1, 0, 2).reshape(n, h * d).astype(np.float64)
    mean = lambda x: np.stack([wide(x)[b].mean(0) if b else np.zeros(h * d) for b in alive])
    affinity = mean(q) @ mean(k).T * (h * d) ** -0.5
    affinity[:, [not b for b in alive]] = np.finfo(np.float32).min
    out, lists = np.zeros((n, h, d)), np.argsort(-affinity, axis=1, kind="stable")[:, :topk]
    for r, cells_of in enumerate(alive):
        factor = softmax(affinity[r, lists[r]]) if soft else np.ones(topk)
        keys = [(j, f) for s, f in zip(lists[r], factor, strict=True) for j in alive[s]]
        extra = sum(size - len(box[s]) for s in lists[r]) if pads else 0  # keys of zeros
        for i in cells_of:
            for head in range(h):
                logit = np.array([f * scale * q[head, i] @ k[head, j] for j, f in keys] + [0.0] * extra)
                if len(logit):
                    share = softmax(logit)
                    out[i, head] = sum(share[at] * f * v[head, j] for at, (j, f) in enumerate(keys))
    return out.reshape(n, h * d), lists


@pytest.mark.parametrize(
    "grid, side, topk, soft", [((4, 6), 2, 2, False), ((5, 7), 3, 4, False), ((5, 7), 3, 2, True), ((4, 4), 4, 1, False)]
)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_reference(grid, side, topk, soft, variant):
    b, h, n, d = 3, 2, grid[0] * grid[1], 4
    q, k, v = (normal(i, b, h, n, d) for i in range(3))
    live = np.ones((b, n), bool)
    live[1] = np.arange(n) % 5 > 0
    live[2] = np.arange(n) < 2  # most regions are empty
    kernel, bias = normal(3, 3, 3, 1, h * d), normal(4, h * d)
    method = BiFormer(side=side, topk=(topk,), kernel=3, variant=variant, soft=soft)
    params = {"lepe": jnp.asarray(kernel), "lepe_bias": jnp.asarray(bias)}
    got = mix(method, params, q, k, v, live=live, grid=grid)
    scale = d**-0.5 if variant == "paper" else (h * d) ** -0.5
    for i in range(b):
        want, _ = reference(q[i], k[i], v[i], live[i], grid, side, topk, scale, variant == "official", soft)
        flat = np.where(live[i][:, None], v[i].transpose(1, 0, 2).reshape(n, h * d), 0)
        want = np.where(live[i][:, None], want + convolved(flat, kernel, bias, grid), 0)
        np.testing.assert_allclose(got[i], want, atol=2e-5)


def test_regions_and_back():
    x = jnp.arange(1.0, 36.0).reshape(1, 35)
    cut = regions(x, (5, 7), 3)
    assert cut.shape == (1, 9, 6) and cut[0, 0].tolist() == [1, 2, 3, 8, 9, 10] and cut[0, 8].tolist() == [35, 0, 0, 0, 0, 0]
    assert np.array_equal(cells(cut, (5, 7), 3), x)


@pytest.mark.parametrize("grid, side, topk", [((4, 6), 2, 4), ((5, 7), 3, 9), ((3, 3), 1, 1), ((4, 6), 2, -2)])
def test_all_regions_are_full_attention(grid, side, topk):
    """topk = side^2 = full attention + the convolution; so is -2."""
    b, h, n, d = 2, 2, grid[0] * grid[1], 4
    q, k, v = (normal(i, b, h, n, d) for i in range(3))
    live = np.arange(n) >= np.array([[0], [3]])
    kernel, bias = normal(3, 5, 5, 1, h * d), normal(4, h * d)
    params = {"lepe": jnp.asarray(kernel), "lepe_bias": jnp.asarray(bias)}
    got = mix(BiFormer(side=side, topk=(topk,)), params, q, k, v, live=live, grid=grid)
    flat = np.where(live[..., None], v.transpose(0, 2, 1, 3).reshape(b, n, h * d), 0)
    sharp = np.stack([convolved(x, kernel, bias, grid) for x in flat])
    np.testing.assert_allclose(got, np.where(live[..., None], full(q, k, v, live) + sharp, 0), atol=2e-5)


def test_regions_permuted():
    """Permuting the regions permutes what comes out of them (without the convolution, which knows where they stand)."""
    b, h, d, side, p = 1, 2, 4, 3, 4
    q, k, v = (jnp.asarray(normal(i, b, side**2, p, h, d)) for i in range(3))
    there, order = jnp.ones((b, side**2, p), bool), np.random.default_rng(0).permutation(side**2)
    wide = lambda x: x.reshape(b, side**2, p, h * d)

    def run(q, k, v):
        return regional(q, k, v, there, route(wide(q), wide(k), there, 3, 1.0)[0][:, None], 0.5)

    np.testing.assert_allclose(run(*(x[:, order] for x in (q, k, v))), run(q, k, v)[:, order], atol=1e-6)


def test_a_list_for_each_head():
    """The same list for every head is one list for all."""
    b, h, r, p, d = 2, 2, 4, 3, 4
    q, k, v = (jnp.asarray(normal(i, b, r, p, h, d)) for i in range(3))
    there = jnp.asarray(np.random.default_rng(1).random((b, r, p)) < 0.8)
    graph = jnp.asarray(np.random.default_rng(0).integers(0, r, (b, 1, r, 2)), jnp.int32)
    one = regional(q, k, v, there, graph, 0.5)
    np.testing.assert_allclose(regional(q, k, v, there, jnp.repeat(graph, h, 1), 0.5), one, atol=1e-6)


def test_stages_and_weights():
    method = BiFormer(side=4)
    assert [method.layer(i, 8).topk for i in range(8)] == [(1,), (1,), (4,), (4,), (16,), (16,), (-2,), (-2,)]
    assert [method.layer(i, 2).topk for i in range(2)] == [(1,), (16,)]
    params = method.init_params(jax.random.key(0), config(2, 4, layers=3))
    assert len(params) == 3 and params[0]["lepe"].shape == (5, 5, 1, 8) and params[0]["lepe_bias"].shape == (8,)
    assert not np.array_equal(params[0]["lepe"], params[1]["lepe"])
    assert dataclasses.replace(method, kernel=0).init_params(jax.random.key(0), config(2, 4)) == ({},)


def test_gradients():
    """Of the attention among listed regions; none goes through the routing."""
    h, n, d, grid = 2, 16, 3, (4, 4)
    live = np.arange(n) >= np.array([[0], [5]])
    arrays = [normal(i, 2, h, n, d) for i in range(3)] + [normal(3, 3, 3, 1, h * d), normal(4, h * d)]
    method = BiFormer(side=2, topk=(2,), kernel=3)

    def fn(q, k, v, kernel, bias):
        return mix(method, {"lepe": kernel, "lepe_bias": bias}, q, k, v, live=live, grid=grid)

    grads = gradients(fn, *arrays)
    assert all(np.any(g) for g in grads) and not any(g[1, :, :5].any() for g in grads[:3])  # dead cells
    wide = jnp.asarray(normal(5, 1, 4, 4, 6))
    assert not np.any(jax.grad(lambda x: jnp.sum(route(x, wide, jnp.ones((1, 4, 4), bool), 2, 1.0)[1]))(wide))


def test_what_lies_in_dead_cells_changes_nothing():
    q, k, v = (normal(i, 1, 2, 16, 3) for i in range(3))
    live = np.arange(16) % 3 > 0
    method = BiFormer(side=2, topk=(2,), kernel=3)
    (params,) = method.init_params(jax.random.key(0), config(2, 3))
    dead = [np.where(live[:, None], x, 1e4).astype(np.float32) for x in (q, k, v)]
    one, two = (mix(method, params, *x, live=live, grid=(4, 4)) for x in ([q, k, v], dead))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert not np.asarray(one)[0, ~live].any()


# --- the official code -------------------------------------------------------------------------------------------------


def heads(x, h):
    return jnp.asarray(x).reshape(*x.shape[:-1], h, -1)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_legacy(data):
    """x is padded before the projection where `side` does not divide the grid, so that pads carry the biases; v is sharpened with them."""
    for c in cases(data, "biformer_legacy"):
        if int(c.get("kv_per_win", -1)) > 0:
            continue  # pooled keys and values are not carried
        x, h, side, topk, qk = c["x"], *(int(c[name]) for name in ("num_heads", "n_win", "topk", "qk_dim"))
        b, high, wide, dim = x.shape
        x = np.pad(x, ((0, 0), (0, -high % side), (0, -wide % side), (0, 0)))
        grid = rows, cols = x.shape[1:3]
        qkv = x.reshape(b, -1, dim) @ c["w_qkv.qkv.weight"].T + c["w_qkv.qkv.bias"]
        q, k, v = (jnp.asarray(a) for a in np.split(qkv, [qk, 2 * qk], -1))
        there = jnp.ones((b, side**2, rows * cols // side**2), bool)
        graph, value = route(regions(q, grid, side), regions(k, grid, side), there, topk, float(c["scale"]))
        assert np.array_equal(graph, c["r_idx"].reshape(graph.shape))
        want = np.take_along_axis(c["region_affinity"].reshape(b, side**2, -1), np.asarray(graph), -1)
        np.testing.assert_allclose(value, want, atol=1e-5)
        np.testing.assert_allclose(jax.nn.softmax(value), c["r_weight"].reshape(value.shape), atol=1e-5)
        share = jax.nn.softmax(value) if c.get("soft_routing", False) else None
        cut = (regions(heads(a, h), grid, side) for a in (q, k, v))
        out = np.asarray(cells(regional(*cut, there, graph[:, None], float(c["scale"]), share), grid, side)).reshape(b, -1, dim)
        if int(c["side_dwconv"]):
            out = out + enhance(v, jnp.asarray(np.moveaxis(c["w_lepe.weight"], (0, 1), (3, 2))), jnp.asarray(c["w_lepe.bias"]), grid)
        out = (np.asarray(out) @ c["w_wo.weight"].T + c["w_wo.bias"]).reshape(x.shape)
        close(out[:, :high, :wide], c["out"])


def test_nchw(data):
    for c in cases(data, "biformer_nchw"):
        x, h, side, topk = np.moveaxis(c["x"], 1, -1), int(c["num_heads"]), int(c["n_win"]), int(c["topk"])
        b, rows, cols, dim = x.shape
        if rows % side or cols % side:
            continue  # the official code makes more regions then
        square = lambda name, c=c: c[f"w_{name}.weight"].reshape(c[f"w_{name}.weight"].shape[:2])
        q, k, v = (jnp.asarray(a) for a in np.split(x.reshape(b, -1, dim) @ square("qkv_linear").T + c["w_qkv_linear.bias"], 3, -1))
        cut = lambda a, grid=(rows, cols), side=side: regions(a, grid, side)
        there = jnp.ones((b, side**2, rows * cols // side**2), bool)
        graph, _ = route(cut(q), cut(k), there, topk, 1.0)
        want = np.broadcast_to(np.sort(c["r_idx"], -1), (b, h, side**2, topk))
        assert np.array_equal(np.broadcast_to(np.sort(graph, -1)[:, None], want.shape), want)
        out = cells(regional(*(cut(heads(a, h)) for a in (q, k, v)), there, graph[:, None], float(c["scale"])), (rows, cols), side)
        out = out.reshape(b, -1, dim)
        if int(c["side_dwconv"]):
            kernel = jnp.asarray(np.moveaxis(c["w_lepe.weight"], (0, 1), (3, 2)))
            out = out + enhance(v, kernel, jnp.asarray(c["w_lepe.bias"]), (rows, cols))
        close((np.asarray(out) @ square("output_linear").T + c["w_output_linear.bias"]).reshape(x.shape), np.moveaxis(c["out"], 1, -1))


def test_lists_of_heads(data):
    """Each head by lists of its own (rrsda)."""
    for c in cases(data, "biformer_rrsda"):
        graph = jnp.asarray(c["region_graph"], jnp.int32)
        b, _, rows, cols = c["q"].shape
        h, size = graph.shape[1], c["region_size"].tolist()
        if rows % size[0] or cols % size[1] or rows // size[0] != cols // size[1] or c["kv_region_size"].tolist() != size:
            continue  # regions here stand side x side
        grid, side = (rows, cols), rows // size[0]
        q, k, v = (regions(heads(np.moveaxis(c[name], 1, -1).reshape(b, rows * cols, -1), h), grid, side) for name in "qkv")
        out = regional(q, k, v, jnp.ones(q.shape[:3], bool), graph, float(c["scale"]))
        close(np.moveaxis(np.asarray(cells(out, grid, side)).reshape(b, rows, cols, -1), -1, 1), c["out"])


# --- cost -----------------------------------------------------------------------------------------------------------------


def square(n):
    rows = 1 << (n.bit_length() - 1) // 2
    return rows, n // rows


def cost(side_of, topk=4):
    params = {"lepe": jnp.zeros((5, 5, 1, 64)), "lepe_bias": jnp.zeros((64,))}
    return exponent(lambda n: (BiFormer(side=side_of(n), topk=(topk,)), params, square(n)))


def test_cost():
    """Regions per side as n^(1/3): the cost as n^(4/3). With a fixed count of them it is quadratic."""
    assert cost(lambda n: round(n ** (1 / 3))) <= 1.6
    assert cost(lambda n: 7) > 1.75


@pytest.mark.parametrize("given", [dict(side=0), dict(topk=()), dict(topk=(0,)), dict(topk=(-1,)), dict(side=2, topk=(5,)), dict(kernel=4), dict(variant="x")])  # fmt: skip
def test_refuses(given):
    with pytest.raises(ValueError):
        BiFormer(**({"topk": (1,)} | given))


def test_refuses_rows_that_are_no_grid():
    q = normal(0, 1, 2, 9, 3)
    for method, grid in ((BiFormer(side=2, topk=(1,)), (2, 4)), (BiFormer(side=2, topk=(1,)), None), (BiFormer(side=4), (3, 3))):
        with pytest.raises(ValueError):
            method.mix({}, (), 0, layer(q, q, q, grid=grid))
