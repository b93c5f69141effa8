import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import heads
from jaxtok.core.recipe import Recipe
from jaxtok.core.types import Evidence
from jaxtok.methods import DuoAttention, StreamingLLM
from jaxtok.methods.policy.duo_attention import full_heads, load_gates, save_gates
from jaxtok.models import blocks, decoder, load
from jaxtok.testing.world import CFG, LIVE, near, world
from jaxtok.train import duo_attention
from tests.golden import make_duo
from tests.golden.make_kvpress import FOLDER, RATIOS
from tests.methods import toys

small = {"duo_attention": lambda capacity: DuoAttention(capacity=capacity, sinks=2)}
SINKS, RECENT = 1, 3


def test_by_hand():
    """Sinks 0 1, of six tokens the newest two beside them; the step drops the older of those."""
    kv = toys.cache(np.zeros((1, 1, 6, 2)), np.zeros((1, 1, 6, 2)))
    policy = DuoAttention(capacity=4, sinks=2)
    _, plan = toys.fit(policy, kv, Evidence())
    np.testing.assert_array_equal(plan.index[0, 0], [0, 1, 4, 5])
    assert policy.head_group(0) is None and policy.head_group(1) is policy and DuoAttention().capacity == 64 + 256


def test_checks_of_a_policy():
    toys.check_policy(lambda capacity: DuoAttention(capacity=capacity, sinks=2), protected=lambda p, seen: p < 2 or p >= seen - 6)


# --- which heads --------------------------------------------------------------------------------------------------------


def test_sparsity_and_threshold_by_hand():
    gates = np.array([[0.9, 0.1, 0.4], [0.4, 1.0, 0.0]])
    assert full_heads(gates, threshold=0.4).tolist() == [[True, False, True], [True, True, False]]
    # 5 * .5 = 2.5: the three above the quantile; of the two 0.4 the one in the lower layer
    assert full_heads(gates, sparsity=0.5).tolist() == [[True, False, True], [False, True, False]]
    assert full_heads(gates, sparsity=0).all() and not full_heads(gates, sparsity=1).any()
    assert [int(full_heads(gates, sparsity=s).sum()) for s in (0.01, 0.2, 0.21, 0.8, 0.99)] == [5, 5, 4, 2, 1]


def test_equals_the_official_choice(data):
    """Gates of real models: sparsify_attention_heads at five sparsities with its own noise, and without noise up to its ties."""
    case = np.load(data / "golden" / "duo_patterns.npz")
    names = sorted({key.split("_")[0] for key in case})
    assert names
    for name in names:
        gates = load_gates(data / "reference" / "duo_attention" / f"{case[name + '_name']}.tsv")
        np.testing.assert_array_equal(gates, case[f"{name}_heads"])
        assert case[f"{name}_raw"].min() < 0 <= gates.min()  # clipped
        for percent in (0, 25, 50, 75, 100):
            want, noise = case[f"{name}_sp{percent}_full_heads"] > 0, case[f"{name}_sp{percent}_noise"]
            sparsity = percent / 100
            np.testing.assert_array_equal(full_heads(gates + noise, sparsity=sparsity), want)
            mine = full_heads(gates, sparsity=sparsity)
            assert mine.mean() == want.mean() == 1 - case[f"{name}_sp{percent}_real_sparsity"]
            edge = np.sort(gates.ravel())[::-1][max(int(mine.sum()) - 1, 0)]
            assert (mine == want)[np.abs(gates - edge) > 2e-6].all()


def test_published_gates_split_every_layer(data, tmp_path):
    """All six files: half of the heads full, in any layout; a gate of 1 is never dropped for one of 0; written and read again."""
    files = sorted((data / "reference" / "duo_attention").glob("*.tsv"))
    assert len(files) == 6
    for path in files:
        gates = load_gates(path)
        full = full_heads(gates, sparsity=0.5)
        sizes, order = heads.split(full)
        assert len(sizes) == 32 and {sum(row) for row in sizes} == {gates.shape[1]} and sum(row[0] for row in sizes) == full.sum()
        assert len({row for row in sizes}) > 1, "real models have unequal layers"
        moved = np.take_along_axis(full, np.array(order), 1)
        assert all(row[:n].all() and not row[n:].any() for row, (n, _) in zip(moved, sizes, strict=True))
        assert gates[full].min() >= gates[~full].max()
    save_gates(tmp_path / "gates.tsv", gates)
    np.testing.assert_array_equal(load_gates(tmp_path / "gates.tsv"), gates)


# --- the gated model and the split cache --------------------------------------------------------------------------------


@functools.cache
def program(recipe):
    """Rows after the last layer [b n c] of the prompts of the laws' world, read token by token."""

    def go(params):
        ids, live = world()[1], jnp.asarray(LIVE)
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids[:, :1], live[:, :1]), recipe, new=ids.shape[1])

        def one(layers, row):
            x, layers = decoder.step(CFG, params, blocks.embed(CFG, params, row[0][:, None]), row[1][:, None], layers, recipe)
            return layers, x[:, 0]

        layers, x = jax.lax.scan(one, layers, (ids[:, 1:].T, live[:, 1:].T))
        return jnp.concatenate([tokens.x, jnp.swapaxes(x, 0, 1)], 1)

    return jax.jit(go)


@functools.cache
def gated():
    run = lambda params, gates: duo_attention.gated(
        CFG, params, gates, world()[1], jnp.asarray(LIVE), sinks=SINKS, recent=RECENT + 1, remat=False
    )
    return jax.jit(run)


def live(x):
    return np.asarray(x)[LIVE]


def test_gates_of_one_are_full_attention():
    params = world()[0]
    plain = jax.jit(lambda p: blocks.hidden(CFG, p, world()[1], jnp.asarray(LIVE), remat=False))(params)
    near(live(gated()(params, jnp.ones((2, 2)))), live(plain), 2e-5, "gates of one")
    assert np.abs(live(gated()(params, jnp.zeros((2, 2)))) - live(plain)).max() > 1e-2


def test_gates_of_zero_are_streamingllm_at_positions_of_the_text():
    params = world()[0]
    want = program(Recipe(policy=StreamingLLM(capacity=SINKS + RECENT, sinks=SINKS, compact=False)))(params)
    near(live(gated()(params, jnp.zeros((2, 2)))), live(want), 2e-5, "gates of zero")


def test_hard_gates_are_the_split_cache():
    """Head 1 of layer 0 full: its weights come first, its cache is an array of its own, and every row is what the gates compute."""
    params, gates = world()[0], np.array([[0.0, 1.0], [0.0, 0.0]])
    found = heads.split(full_heads(gates, threshold=0.5))
    recipe = Recipe(policy=DuoAttention(capacity=SINKS + RECENT, sinks=SINKS), heads=found.sizes)
    got = program(recipe)(blocks.reorder_heads(CFG, params, found.order))
    near(live(got), live(gated()(params, jnp.asarray(gates, jnp.float32))), 2e-5, "hard gates")


# --- kvpress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_duo.NAMES)
def test_equals_kvpress(name):
    """Scores on the fly, and what is left of a prompt at three ratios of streaming heads, through prefill with the weights reordered."""
    cfg, params, _ = load.load(FOLDER / name, dtype=jnp.float32)
    with np.load(FOLDER / name / "duo.npz") as case, np.load(FOLDER / name / "case.npz") as other:
        case, ids = dict(case), jnp.asarray(other["ids"])
    texts = jnp.asarray(case["texts"])
    scores = np.asarray(duo_attention.proxy(cfg, params, jnp.maximum(texts, 0), texts >= 0, length=int(case["length"])))
    near(scores, case["scores"], 2e-5, "scores")
    policy = DuoAttention(capacity=make_duo.SINKS + make_duo.RECENT, sinks=make_duo.SINKS)
    ratio = RATIOS[0 if "qwen" in name else 1]  # one of them each, for the compiler's sake
    for i, removed in enumerate(RATIOS):
        full = heads.best(scores, scores.size - round(scores.size * removed))
        want = case["kept"][i]
        assert (want.all(-1) == full).all()
        if removed == ratio:
            found = heads.split(full)
            recipe, moved = Recipe(policy=policy, heads=found.sizes), blocks.reorder_heads(cfg, params, found.order)
            fill = jax.jit(lambda p, recipe=recipe: decoder.prefill(cfg, p, decoder.embed(cfg, p, ids[None]), recipe, new=0)[1])
            for j, parts in enumerate(fill(moved)):
                kept = [np.isin(np.arange(len(ids)), head) for part in parts for head in np.asarray(part.kv.pos[0])]
                np.testing.assert_array_equal(np.stack(kept), want[j][list(found.order[j])])


def test_refuses(tmp_path):
    for match, make in {
        "capacity=4 has no room for the 65 protected rows": lambda: DuoAttention(capacity=4),
        "sinks must be >= 0": lambda: DuoAttention(sinks=-1),
        "give sparsity or threshold, exactly one": lambda: full_heads(np.zeros((2, 2))),
        "sparsity must be from 0 to 1": lambda: full_heads(np.zeros((2, 2)), sparsity=1.5),
        "cannot read the gates": lambda: load_gates(tmp_path / "none.tsv"),
        "duo_attention tells 2 head groups apart; Recipe.heads says 1": lambda: Recipe(policy=DuoAttention()).validate(CFG),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
    (tmp_path / "bad.tsv").write_text("1\tnan\n")
    with pytest.raises(ValueError, match="must hold one finite gate"):
        load_gates(tmp_path / "bad.tsv")
