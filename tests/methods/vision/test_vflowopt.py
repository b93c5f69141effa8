"""VFlowOpt behind the encoder and in the decoder against its formulas, the official outputs and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.recipe import Recipe
from jaxtok.core.reduce import reduce
from jaxtok.core.types import IMAGE, SPECIAL, Evidence, Needs
from jaxtok.methods import VFlowOptLayers, VFlowOptSelect
from jaxtok.methods.vision.vflowopt import official_top, vflowopt
from jaxtok.models import decoder, vlm
from jaxtok.models.config import EncoderConfig
from tests.methods.golden import cases
from tests.methods.vision.places import TINY, model, planned, prompt, spy
from tests.methods.vision.select import best, grid, images, kept, left

small = {
    "vflowopt.select": lambda n: VFlowOptSelect(capacity=n, t=0.5, m=2.5, shape=(4, 4)),
    "vflowopt.select:plain": lambda n: VFlowOptSelect(capacity=n, t=0.5, recycle=False),
    "vflowopt.layers": lambda n: VFlowOptLayers(capacity=n, images=16),
}


def attention(rng, n):
    a = np.exp(2 * rng.normal(size=(1, 3, n, n)))
    return (a / a.sum(-1, keepdims=True)).astype(np.float32)


def importance(m, t):
    received = m.mean(0)
    loud = received > t * m.mean()
    return m[loud].mean(0) if loud.any() else received


def reference(x, score, top, m, cell, part):
    """(rows in raster order, their old rows)."""
    stay = best(score, top)
    groups = {}
    for j in range(len(x)):
        if j not in stay:
            groups.setdefault((part[j], *(int(c / m) for c in cell[j])), []).append(j)
    out = {j: x[j] for j in stay}
    for rows in groups.values():
        lead = max(rows, key=lambda j: (score[j], -j))
        out[lead] = (score[rows] / score[rows].sum()) @ x[rows]
    return np.array([out[j] for j in sorted(out)]), sorted(out)


@pytest.mark.parametrize("m, t", [(2.5, 1.1), (2.0, 0.0)])
def test_reference(m, t):
    rng = np.random.default_rng(int(10 * m + t))
    cell, part = np.tile(grid(4, 4), (3, 1)), np.repeat([0, 1, 2], 16)
    probs, x = attention(rng, 48), rng.normal(size=(1, 48, 3)).astype(np.float32)
    tokens = images(x, 0, segment=part, cell=cell)
    method = VFlowOptSelect(capacity=22, special=0, t=t, m=m, shape=(4, 4), grid=(1, 2))
    high, wide, far, away = method.cells
    joined = cell + np.stack([np.zeros(48, int), np.maximum(part - 1, 0) * 4], -1)
    score = importance(probs[0].astype(np.float64).mean(0), t)
    want, rows = reference(x[0].astype(np.float64), score, 22 - high * wide - far * away, m, joined, part > 0)
    out = left(method, tokens, Evidence(probs=probs))
    np.testing.assert_allclose(out.x[0, -len(want) :], want, atol=1e-5)
    assert out.pos[0, -len(want) :].tolist() == rows


def test_at_t_zero_all_rows_vote():
    rng = np.random.default_rng(1)
    probs, free = attention(rng, 12), jnp.ones((1, 12), bool)
    mean = jnp.asarray(probs.mean(1))
    want = probs.mean((1, 2))
    for t in (0.0, 1e5):  # and where nothing is above the threshold (NaN in the code)
        np.testing.assert_allclose(VFlowOptSelect(capacity=4, t=t).importance(mean, free), want, rtol=1e-5)


def test_without_recycling_it_is_a_selection():
    rng = np.random.default_rng(2)
    probs, tokens = attention(rng, 12), images(rng.normal(size=(1, 12, 3)), 0)
    want = best(importance(probs[0].astype(np.float64).mean(0), 1.2), 5)
    assert kept(VFlowOptSelect(capacity=5, special=0, t=1.2, recycle=False), tokens, Evidence(probs=probs)) == want


def test_official_maps(data):
    for case in cases(data, "vflowopt_map"):
        t, alpha = float(case["t"]), float(case["alpha_v"])
        mean = case["head_mean_attention"] if "head_mean_attention" in case else case["attention"].mean(1)
        free = jnp.ones(mean.shape[:2], bool)
        detail = jnp.asarray(case["entropy_used"].reshape(mean.shape[:2])) if alpha else None
        found = VFlowOptSelect(capacity=4, t=t, alpha_v=alpha).importance(jnp.asarray(mean), free, detail)
        if not case["is_nan"]:
            np.testing.assert_allclose(found, case["importance_map"].reshape(found.shape), atol=1e-6)


def test_official_recycling(data, monkeypatch):
    """Newlines are kind SPECIAL here; they weigh 1.0 there and are never dropped."""
    for case in cases(data, "vflowopt_recycle"):
        x, score, width, rows = (case[k] for k in ("features", "attn_map", "local_width_with_newline", "local_rows"))
        n, m, side = len(x), float(case["m"]), 27
        thumb = side * side
        cell = np.concatenate([grid(side, side), grid(int(rows), int(width))])
        part = np.r_[np.zeros(thumb, int), np.ones(n - thumb, int)]
        newline = (part == 1) & (cell[:, 1] == int(width) - 1)
        assert (score[newline] == 1).all()
        tokens = images(x[None], segment=part, cell=cell, kind=np.where(newline, SPECIAL, IMAGE))
        top = official_top(n, float(case["vit_r"]), m)
        assert n - top - int(n / m**2) == int(case["reduce_tokens"])
        shape = max(side, int(rows)), max(side, int(width))
        method = VFlowOptSelect(capacity=n, special=int(newline.sum()), m=m, shape=shape, grid=(1, 1))
        high, wide, far, away = method.cells
        method = VFlowOptSelect(
            capacity=top - int(newline.sum()) + high * wide + far * away, special=method.special, m=m, shape=shape, grid=(1, 1)
        )
        monkeypatch.setattr(VFlowOptSelect, "score", lambda self, params, tokens, evidence, score=score: jnp.asarray(score[None]))
        run = jax.jit(lambda tokens, method=method: (plan := method.plan({}, (), tokens, Evidence())[1], reduce(plan, tokens).x))
        plan, out = run(tokens)
        index = np.asarray(plan.index[0])
        assert index[index >= 0].tolist() == np.flatnonzero(case["kept_mask"]).tolist()
        np.testing.assert_allclose(out[0][index >= 0], case["out_features"], atol=1e-5)


# --- between the decoder's layers -----------------------------------------------------------------------------------------


def test_official_stages(data):
    """Which rows of the prompt each stage keeps, by the map that came along: newlines always, int(ratio * rows of the image) in all."""
    for case in cases(data, "vflowopt_recycle"):
        score, first, ratios = case["out_attn_map"], int(case["image_start"]), [round(float(r), 6) for r in case["llm_r"]]
        many, text = len(score), first + int(case["text_after"])
        kind = np.zeros(many + text, np.int8)
        kind[first : first + many] = np.where(score == 1, SPECIAL, IMAGE)
        full, here = np.zeros(many + text, np.float32), np.arange(many + text)
        full[first : first + many] = score
        lines = int((score == 1).sum())
        for j, ratio in enumerate(ratios):
            mask = case[f"llm_stage{j}_keep_mask"]
            mask = mask if len(mask) == len(here) else mask[here]
            left = int((kind[here] == IMAGE).sum())
            stay = int(mask.sum()) - text - lines
            if len(case[f"llm_stage{j}_keep_mask"]) == len(here):
                assert stay == int(ratio * (left + lines)) - lines
            x = np.zeros((1, len(here), 2), np.float32)
            tokens = images(x, 0, kind=kind[here])._replace(score=jnp.asarray(full[here][None]))
            plan = planned(VFlowOptLayers(capacity=stay, images=left), tokens, Evidence())[1]
            np.testing.assert_array_equal(plan.assign[0] >= 0, mask)
            here = here[mask]


def test_the_map_goes_along():
    """From the tower to the decoder's layers: what stays there are the rows of largest map among those that came; text rows stay."""
    vision = EncoderConfig(width=16, layers=2, heads=4, hidden=24, image=(8, 8), patch=(2, 2), channels=3)
    cfg = vlm.VlmConfig(vision=vision, text=TINY, until=2, image_token=31)
    params = vlm.init(cfg, jax.random.key(0))
    ids = jnp.asarray([[1, *[31] * cfg.patches, 2, 3]] * 2)
    pictures = jax.random.normal(jax.random.key(1), (2, 1, 8, 8, 3))
    recipe = vflowopt(16, vit_ratio=0.6, ratios=(0.7, 0.5), places=(2, 3), t=1.0, m=2.0, shape=(4, 4))
    assert recipe.select.capacity == 10 and recipe.layers[0][1].stages == ((2, 7), (3, 3))
    recipe = recipe.replace(select=VFlowOptSelect(capacity=10, t=1.0, m=2.0, shape=(4, 4), special=int(vision.cls)))

    @jax.jit
    def run(params, pictures):
        tokens = vlm.embed(cfg, params, pictures, ids, recipe=recipe)
        return tokens, decoder.prefill(cfg.text, params, tokens, recipe, new=1)

    tokens, (end, layers) = jax.device_get(run(params, pictures))
    assert [layer[0].kv.pos.shape[2] for layer in layers] == [tokens.pos.shape[1] + 1 - less for less in (0, 0, 3, 7)]
    for i in range(2):
        image = np.flatnonzero((tokens.kind[i] == IMAGE) & (tokens.pos[i] >= 0))
        assert len(set(tokens.score[i][image])) > 3
        kept = [int(image[j]) for j in best(tokens.score[i][image], 3 + len(image) - 10)]
        rows = [j for j in range(tokens.pos.shape[1]) if j in kept or (tokens.pos[i][j] >= 0 and j not in image)]
        assert end.pos[i][end.pos[i] >= 0].tolist() == tokens.pos[i][rows].tolist()
        np.testing.assert_array_equal(end.rope[i][end.pos[i] >= 0], tokens.rope[i][rows], err_msg="positions are kept")


def test_without_a_map():
    method = VFlowOptLayers(capacity=1, images=4)
    assert method.needs == Needs(score=True)
    with pytest.raises(ValueError, match="an earlier site"):
        spy(TINY, model(), prompt("tiiiit"), Recipe(layers=((0, method),)))


def test_the_papers_recipe():
    """As shipped: 729 rows and no newlines: 84 stay (less 644, less 2), and one for each of 4 cells; 88 go through 18 layers, 52 through the rest."""
    recipe = vflowopt()
    assert official_top(729, 0.117, 17.4) == 84 and recipe.select.capacity == 88
    assert [(k, m.layer(k, 28).images, m.layer(k, 28).capacity) for k, m in recipe.layers] == [(18, 88, 52)]
    assert vflowopt(729, vit_ratio=1.0, ratios=(1.0, 1.0), m=24.0).layers == ()
    with pytest.raises(ValueError, match="equally many"):
        vflowopt(ratios=(0.5,))
