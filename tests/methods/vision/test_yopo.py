"""YOPO against whole rows of attention in numpy, the official outputs, its limit and what it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import decode
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import IMAGE, SPECIAL, Needs
from jaxtok.evals import cost
from jaxtok.methods import YOPO, FastV, SnapKV
from jaxtok.methods.vision.yopo import load_heads, save_heads
from jaxtok.models import blocks, decoder, edits
from jaxtok.models.config import Config
from jaxtok.testing.world import near
from jaxtok.train import yopo
from tests.methods.golden import cases
from tests.methods.vision import tinyllama

small = {"yopo": lambda n: YOPO(images=n), "yopo:official": lambda n: YOPO(images=n, variant="official", layercut=1)}

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24)
B, BEFORE, IMAGES, BEHIND, T = 3, 2, 32, 4, 3
N = BEFORE + IMAGES + BEHIND
# two pictures of 4 x 4 side by side without text between them, a newline row behind the first; the third prompt has but 21 rows of them
HEADS = np.random.default_rng(3).random((CFG.layers, CFG.heads)) < 0.5
MORE = np.array([[7, 3, 9], [1, 30, 2], [5, 5, 8]])


@functools.cache
def world(dtype="float32"):
    params = blocks.init(CFG, jax.random.key(0), jnp.dtype(dtype), embed_std=1.0)
    params["layers"] = tuple(p | {"q": p["q"] * 2, "k": p["k"] * 2} for p in params["layers"])
    n = N + 1
    ids = jax.random.randint(jax.random.key(1), (B, n), 0, CFG.vocab)
    row = np.arange(n) - BEFORE
    first, second = (row >= 0) & (row < 16), (row >= 17) & (row < 33)
    kind = np.where(first | second, IMAGE, np.where(row == 16, SPECIAL, 0))
    place = np.where(first, row, row - 17)
    cell = np.where((first | second)[:, None], np.stack([place // 4, place % 4], -1), -1)
    live = np.ones((B, n), bool)
    live[2, (row >= 0) & (row < 3)] = live[2, (row >= 25) & (row < 33)] = False
    tokens = decoder.embed(CFG, params, ids, jnp.asarray(live))
    index = [np.concatenate([np.flatnonzero(~each), np.flatnonzero(each)]) for each in live]
    wide = lambda a, dtype: jnp.asarray(np.stack([a[i] for i in index]), dtype)
    return params, tokens._replace(kind=wide(kind, jnp.int8), cell=wide(cell, jnp.int32))


def learned(params, heads):
    return params if heads is None else params | {"methods": {"edits": ({"heads": jnp.asarray(heads)},)}}


@functools.partial(jax.jit, static_argnums=0)
def run(method, params, tokens):
    """(last row, steps, rows of a text that continues) of the prefill."""
    recipe = Recipe(edits=(method,)) if method is not None else Recipe()
    end, layers = decoder.prefill(CFG, params, tokens, recipe, new=T, proportional=True)
    more = decoder.embed(CFG, params, jnp.asarray(MORE))
    after = decoder.prefill(CFG, params, more, recipe, new=0, layers=layers)[0].x if method == METHODS["paper"] else None

    def one(layers, ids):
        x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, ids[:, None]), jnp.ones((B, 1), bool), layers, recipe)
        return layers, x[:, 0]

    layers, out = jax.lax.scan(one, layers, jnp.asarray(MORE).T)
    return end.x[:, -1], jnp.swapaxes(out, 0, 1), after, end, layers


# --- the reference ---------------------------------------------------------------------------------------------------------


def turned(z, angle):
    """Channel i against channel i + d / 2, by the angles [n d/2]."""
    low, high, c, s = z[..., : angle.shape[1]], z[..., angle.shape[1] :], np.cos(angle), np.sin(angle)
    return np.concatenate([low * c - high * s, high * c + low * s], -1)


def reference(method, heads, params, tokens, more):
    """f64 [b 1+T c]: the last row and T further text rows behind it, one sequence after the other, by whole rows of attention."""
    get = lambda a: np.asarray(a, np.float64)
    heads, out = np.ones((CFG.layers, CFG.heads)) if heads is None else get(heads), []
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.norm_eps) * get(w)
    for b in range(len(tokens.pos)):
        alive = np.asarray(tokens.pos[b]) >= 0
        x = np.concatenate([get(tokens.x[b])[alive], get(params["embed"])[more[b]]])
        kind = np.concatenate([np.asarray(tokens.kind[b])[alive], np.zeros(len(more[b]), int)])
        cell = np.concatenate([np.asarray(tokens.cell[b])[alive], np.full((len(more[b]), 2), -1)])
        at, image, picture, last = np.arange(len(x)), kind == IMAGE, np.zeros(len(x), int), None
        for j in np.flatnonzero(image):
            new = last is None or (kind[last:j] == 0).any() or tuple(cell[j]) <= tuple(cell[last])
            picture[j], last = (0 if last is None else picture[last]) + new, j
        for i, p in enumerate(params["layers"]):
            cut = method.layercut is not None and i >= method.layercut
            if cut and method.variant == "paper":
                x, at, kind, cell, picture, image = (a[~image] for a in (x, at, kind, cell, picture, image))
            y = rms(x, p["attn_norm"])
            q, k, v = ((y @ get(p[name])).reshape(len(x), -1, CFG.head_dim).transpose(1, 0, 2) for name in "qkv")
            angle = at[:, None] * get(blocks.frequencies(CFG, i))
            q, k, v = turned(q, angle), np.repeat(turned(k, angle), 2, 0), np.repeat(v, 2, 0)
            see = at[None] <= at[:, None]
            if method.window is not None:
                reach = (method.window - 1) // 2
                close = (np.abs(cell[:, None] - cell[None]) <= reach).all(-1) & (picture[:, None] == picture[None])
                both = image[:, None] & image[None]
                see = np.where(both, close & see if method.variant == "paper" else close, see)
            w = np.where(see[None], q @ k.transpose(0, 2, 1) * CFG.head_dim**-0.5, -np.inf)
            w = np.exp(w - w.max(-1, keepdims=True))
            w = w / w.sum(-1, keepdims=True)
            w[:, :, image] *= 0 if cut else heads[i][:, None, None]
            o = w @ v
            o[:, image] *= heads[i][:, None, None]
            x = x + o.transpose(1, 0, 2).reshape(len(x), -1) @ get(p["o"])
            y = rms(x, p["mlp_norm"])
            gate, up = y @ get(p["gate"]), y @ get(p["up"])
            hidden = gate / (1 + np.exp(-gate)) * up
            hidden[np.ix_(image, np.arange(CFG.hidden) >= CFG.hidden // method.mlpcut)] = 0
            x = x + hidden @ get(p["down"])
        out.append(x[-1 - len(more[b]) :])
    return np.stack(out)


METHODS = {
    "paper": YOPO(images=IMAGES, window=3, layercut=1),
    "official": YOPO(images=IMAGES, window=4, layercut=1, mlpcut=5, variant="official"),
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_reference(name):
    """Prefill, steps and a prefill that continues; GQA, padding, two pictures with a newline, lists and masks of near rows, head masks."""
    params, tokens = world()
    last, steps, after, end, _ = run(METHODS[name], learned(params, HEADS), tokens)
    want = reference(METHODS[name], HEADS, params, tokens, MORE)
    near(last, want[:, 0], 3e-5, "last row")
    near(steps, want[:, 1:], 3e-5, "steps")
    if after is not None:
        near(after, want[:, 1:], 3e-5, "a prefill that continues")
    assert end.lost.tolist() == [0, 0, 0]


def test_the_limit_is_the_plain_model():
    """A window over the grid of a picture, all heads, no cut, the whole MLP: the plain model (variant paper), with merged rows, too."""
    params, tokens = world()
    second = jnp.cumsum(tokens.kind == SPECIAL, -1) > 0  # the first picture is text here, so that there is one
    size = jnp.where(tokens.pos >= 0, 1.0 + jnp.arange(N + 1, dtype=jnp.float32) % 3, 0.0)
    one = tokens._replace(kind=jnp.where(second, tokens.kind, 0).astype(jnp.int8), size=size)
    plain, wide = run(None, params, one), run(YOPO(images=16, window=7, layercut=CFG.layers, mlpcut=1), learned(params, HEADS | True), one)
    for i in range(2):
        near(wide[i], plain[i], 2e-5, "a window over the grid")


def test_heads_by_hand():
    """A head that is shut takes nothing of images, and text weights stay: with two equal keys, one of them an image's, half of the value."""
    cfg = Config(vocab=4, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, hidden=2)
    one = jnp.eye(2)
    p = {"attn_norm": jnp.ones(2), "mlp_norm": jnp.ones(2), "q": 0 * one, "k": 0 * one, "v": one, "o": one}
    p |= {"gate": 0 * one, "up": 0 * one, "down": 0 * one}
    params = {"embed": jnp.asarray([[1.0, -1.0], [1.0, 1.0]] * 2), "norm": jnp.ones(2), "layers": (p,)}
    tokens = decoder.embed(cfg, params, jnp.asarray([[1, 0]]))
    tokens = tokens._replace(kind=jnp.asarray([[IMAGE, 0]], jnp.int8))
    method = YOPO(images=1, window=None, layercut=None, mlpcut=1)
    look = jax.jit(lambda heads: decoder.prefill(cfg, learned(params, heads), tokens, Recipe(edits=(method,)), new=0)[0])
    for heads, want in ((1, [2.0, -1.0]), (0, [1.5, -1.5])):  # x + (v_image + v_text) / 2, x + v_text / 2
        end = look(jnp.asarray([[heads == 1]]))
        np.testing.assert_allclose(end.x[0, -1], want, atol=1e-4)
        np.testing.assert_allclose(end.x[0, 0], [1.0 + heads, 1.0 + heads], atol=1e-4)  # of an image row, too


def test_official_outputs(data):
    for case in cases(data, "yopo"):
        cfg, params = tinyllama.model(case)
        params = learned(params, case["head_mask"])
        tokens, images, grid = tinyllama.rows(cfg, params, case), int(case["image_tokens"]), int(case["grid"])
        row = np.arange(tokens.pos.shape[1]) - int(case["image_start"])
        cell = np.where(((row >= 0) & (row < images))[:, None], np.stack([row // grid, row % grid], -1), -1)
        method = YOPO(
            images=images,
            window=int(case["window_w"]),
            layercut=int(case["layercut"]),
            mlpcut=int(case["mlpcut_ratio"]),
            variant="official",
        )
        tokens = tokens._replace(cell=jnp.asarray(cell, jnp.int32)[None])
        end = jax.jit(lambda p, t, c=cfg, m=method: decoder.prefill(c, p, t, Recipe(edits=(m,)), new=0)[0])(params, tokens)
        got = blocks.norm(end.x, params["norm"], cfg.norm_eps, cfg.norm_offset)
        np.testing.assert_allclose(got, case["last_hidden_state"], atol=3e-5)


# --- what is saved -----------------------------------------------------------------------------------------------------------


def products(method, cfg, images, n):
    """FLOPs of all matrix products of a prefill of n rows."""
    params = jax.eval_shape(lambda: blocks.init(cfg, jax.random.key(0)))

    def fn(params, ids):
        tokens = decoder.embed(cfg, params, ids)
        row = jnp.arange(n, dtype=jnp.int32)
        kind = jnp.where(row < images, IMAGE, 0).astype(jnp.int8)[None]
        cell = jnp.stack([row // 16, row % 16], -1)[None]
        recipe = Recipe(edits=(method,)) if method is not None else Recipe()
        return decoder.prefill(cfg, params, tokens._replace(kind=kind, cell=cell), recipe, new=0)

    return cost.count(fn, params, jax.ShapeDtypeStruct((1, n), jnp.int32)).by_primitive["dot_general"][0]


def test_the_saving_is_counted():
    """Each part by its formula: products of MLP channels, of image queries and near keys, of layers without image rows."""
    cfg = Config(vocab=8, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=64)
    n, images, c, f, hd, gd = 160, 128, 32, 64, 32, 16
    text = n - images
    projections = lambda m: 2 * m * c * (2 * hd + 2 * gd)
    mlp = lambda m, channels: 2 * m * 3 * c * channels
    pair = lambda q, k: 4 * q * k * hd  # logits and values
    off = dict(window=None, layercut=None, mlpcut=1)
    plain = products(None, cfg, images, n)
    assert plain == 2 * (projections(n) + mlp(n, f) + pair(n, n))
    apart = pair(n, text) + pair(text, images) + pair(images, images)  # who sees whom, cut into three
    assert apart == pair(n, n)
    count = lambda **given: products(YOPO(images=images, **off | given), cfg, images, n)
    assert count(window=47, layercut=1, variant="official") == plain  # masks
    near_keys = lambda m: pair(images, images) - pair(images, m)
    assert count(window=3, mlpcut=2) == plain - 2 * (near_keys(5) + mlp(images, f // 2))  # 3 above, 1 left, itself
    assert count(window=3, variant="official") == plain - 2 * near_keys(9)
    assert count(layercut=1) == plain - (projections(images) + mlp(images, f) + pair(n, n) - pair(text, text))


def test_caches_hold_no_image_key_behind_the_cut():
    params, tokens = world()
    *_, end, layers = run(METHODS["paper"], learned(params, HEADS), tokens)
    sizes = [(part.kv.k.shape[2], None if part.frozen is None else part.frozen.kv.k.shape[2]) for (part,) in layers]
    text = N + 1 - IMAGES
    assert sizes == [(text + T, IMAGES), (text + T, None)]
    assert end.x.shape[1] == text and (np.asarray(end.source) >= 0).sum(-1).tolist() == [7, 7, 7]
    seen = [int((np.asarray(part.pos)[2, 0] >= 0).sum()) for (part,) in layers]
    assert seen == [7 + 21 + T, 7 + T]


# --- at the edges ------------------------------------------------------------------------------------------------------------


def test_rows_that_find_no_room():
    """20 image rows for a place of 16, and the other way round: the oldest go, and are counted."""
    _, tokens = world()
    for images, lost, left in ((16, [16, 16, 5], [23, 23, 23]), (N - 1, [5, 5, 5], [34, 34, 23])):
        end, split = jax.jit(lambda t, m=images: edits._enter(YOPO(images=m), t))(tokens)
        assert end.lost.tolist() == lost and (np.asarray(end.pos) >= 0).sum(-1).tolist() == left
        assert (np.diff(np.asarray(end.pos)) > 0)[np.asarray(end.pos)[:, 1:] > 0].all()
        assert split.image.index.shape == (B, images) and split.text.index.shape == (B, N + 1 - images)


def test_junk_in_dead_rows_and_empty_prompts():
    params, tokens = world()
    params = learned(params, HEADS)
    base = run(METHODS["paper"], params, tokens)
    junk = tokens._replace(x=jnp.where((tokens.pos < 0)[..., None], 3e3, tokens.x))
    near(run(METHODS["paper"], params, junk)[1], base[1], 1e-5, "junk in dead rows")
    empty = tokens._replace(pos=tokens.pos.at[1].set(-1), size=tokens.size.at[1].set(0.0), seen=tokens.seen.at[1].set(0))
    got = run(METHODS["paper"], params, empty)
    assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
    near(got[1][::2], base[1][::2], 2e-5, "rows are independent")


def test_gradients_are_finite():
    params, tokens = world()
    empty = tokens._replace(pos=tokens.pos.at[1].set(-1), size=tokens.size.at[1].set(0.0))

    def loss(x):
        end, _ = decoder.prefill(CFG, learned(params, HEADS), empty._replace(x=x), Recipe(edits=(METHODS["paper"],)), new=0)
        return jnp.sum(end.x**2)

    assert np.isfinite(jax.jit(jax.grad(loss))(empty.x)).all()


def test_bf16():
    params, tokens = world("bfloat16")
    shapes = jax.eval_shape(functools.partial(run, METHODS["official"]), learned(params, HEADS), tokens)
    assert shapes[0].dtype == shapes[1].dtype == jnp.bfloat16 and shapes[4][0][0].frozen.kv.k.dtype == jnp.bfloat16


def test_refused():
    def refused(match, method=None, cfg=CFG, **sites):
        with pytest.raises(ValueError, match=match):
            Recipe(edits=(method or YOPO(images=4),), **sites).validate(cfg)

    refused("use it without cache", cache=SnapKV(capacity=64))
    refused("use it without layers", layers=((1, FastV(capacity=2, images=4)),))
    refused("mlpcut=30 leaves none of the MLP's 24 channels", YOPO(images=4, mlpcut=30))
    refused("the model one of 8 tokens", cfg=Config(vocab=8, width=8, layers=2, heads=1, kv_heads=1, head_dim=8, hidden=8, window=8))
    with pytest.raises(ValueError, match="one edit at a time: yopo, yopo"):
        Recipe(edits=(YOPO(images=4), YOPO(images=5))).validate(CFG)
    with pytest.raises(ValueError, match="variant must be one of paper, official"):
        YOPO(images=4, variant="kvpress")
    params, tokens = world()
    with pytest.raises(ValueError, match=f"told of images=99 rows, but {N + 1} rows come in all"):
        jax.eval_shape(lambda t: decoder.prefill(CFG, params, t, Recipe(edits=(YOPO(images=99),)), new=0), tokens)
    with pytest.raises(ValueError, match=r"heads are \[1, 4\]; the model has 2 layers of 4 heads"):
        jax.eval_shape(lambda t: decoder.prefill(CFG, learned(params, HEADS[:1]), t, Recipe(edits=(YOPO(images=33),)), new=0), tokens)
    with pytest.raises(ValueError, match="take the whole prompt"):
        decode.prefill_chunked(CFG, params, jnp.asarray(MORE), recipe=Recipe(edits=(YOPO(images=1),)), chunk=2, new=0)
    with pytest.raises(ValueError, match="acts in the prefill itself"):
        decoder.compress(CFG, params, (), (), Recipe(edits=(YOPO(images=1),)), new=0)


# --- which heads -------------------------------------------------------------------------------------------------------------


def test_official_votes(data):
    for case in cases(data, "yopo_headmask"):
        votes, heads = yopo.vote(case["sum_visual"], case["sum_rest"], float(case["threshold"]))
        np.testing.assert_array_equal(votes, case["votes"])
        np.testing.assert_array_equal(heads, case["mask"])


def test_votes_by_hand():
    """Five samples, two layers of two heads: three votes of five are more than 40 %, two are not."""
    visual = np.array([[[1, 9], [1, 9], [9, 9], [9, 9], [1, 1]], [[1, 1], [1, 1], [9, 1], [9, 1], [9, 1]]], np.float32)
    votes, heads = yopo.vote(visual, np.full_like(visual, 10), 0.5, whole=0)
    assert votes.tolist() == [[2, 4], [3, 0]] and heads.tolist() == [[False, True], [True, False]]
    votes, heads = yopo.vote(visual, np.full_like(visual, 10), 0.5, whole=1)
    assert votes.tolist() == [[5, 5], [3, 0]]
    assert yopo.vote(visual, np.zeros_like(visual), 0.5, whole=0)[1].all()


def test_published_heads(data, tmp_path):
    """All seven files: the first two layers keep every head, the named number stays on average; written and read again."""
    files = sorted((data / "reference" / "yopo").glob("*.npy"))
    assert len(files) == 7
    for path in files:
        heads = load_heads(path)
        assert heads.dtype == bool and heads.shape[0] == heads.shape[1] and heads[:2].all()
        assert abs(heads.sum(1).mean() - int(path.stem.split("_")[-1])) < 0.5
        save_heads(tmp_path / "heads.npy", heads)
        np.testing.assert_array_equal(load_heads(tmp_path / "heads.npy"), heads)
    (tmp_path / "no.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read the heads"):
        load_heads(tmp_path / "no.npy")
    np.save(tmp_path / "no.npy", np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="must hold 0 or 1 for each layer and query head"):
        load_heads(tmp_path / "no.npy")


def test_calibration_counts_attention():
    """The sums are those of the whole attention matrix over live queries; the heads of a model are the votes of its samples."""
    params, tokens = world()

    @jax.jit
    def both(tokens):
        whole = decoder.survey(CFG, params, tokens, Needs(probs=True))[2]
        return yopo.measure(CFG, params, tokens), jnp.stack([found.probs for (found,) in whole])

    (visual, rest), probs = jax.device_get(both(tokens))
    image = np.asarray(tokens.kind == IMAGE) & (np.asarray(tokens.pos) >= 0)
    want = np.einsum("lbhij,bj->lbh", probs.astype(np.float64), image)
    near(visual, want, 1e-4, "attention to image rows")
    near(visual + rest, np.broadcast_to((np.asarray(tokens.pos) >= 0).sum(-1)[None, :, None], visual.shape), 1e-4, "all attention")
    heads = yopo.calibrate(CFG, params, [tokens, tokens], 1.0, whole=0)
    np.testing.assert_array_equal(heads, (visual > rest).sum(1) > 0.4 * B)
    level = yopo.threshold_of(visual, rest, 3, whole=0)
    kept = lambda level: yopo.vote(visual, rest, level, whole=0)[1].sum(1).mean()
    assert kept(level) <= 3 < kept(level - 1e-5) and kept(0) == CFG.heads
    with pytest.raises(ValueError, match="data holds no batch"):
        yopo.calibrate(CFG, params, [], 1.0)
