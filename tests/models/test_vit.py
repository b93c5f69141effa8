"""An encoder's sites with toy methods, against a plain numpy encoder: what happens to the rows at each place, and what is refused."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core.protocols import Held
from jaxtok.core.recipe import Recipe
from jaxtok.core.reducer import Reducer
from jaxtok.core.select import choose, from_index, identity, pack
from jaxtok.core.types import IMAGE, SPECIAL, Needs, Plan
from jaxtok.models import encoder, resample, vit
from jaxtok.models.config import EncoderConfig

CFG = EncoderConfig(width=12, layers=3, heads=2, hidden=20, image=(8, 8), patch=(2, 2), out=5)
ROWS = 17  # a class row and 16 patches
PLACES = ("block", "attn", "around", "ahead")


@functools.cache
def world(dtype="float32"):
    params = encoder.init(CFG, jax.random.key(0), jnp.dtype(dtype))
    params["layers"] = tuple(p | {"q": p["q"] * 3, "k": p["k"] * 3} for p in params["layers"])
    return params, jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@functools.partial(jax.jit, static_argnames=("recipe", "until"))
def encode(params, images, recipe=vit.PLAIN, keep=None, until=None) -> vit.Encoded:
    return vit.encode(CFG, params, vit.embed(CFG, params, images), recipe, keep=keep, until=until)


# --- toys -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Same(Reducer):
    """All rows stay."""

    name = "same"
    place: str = "block"
    restore: int | None = None
    needs: ClassVar[Needs] = Needs()

    @property
    def at(self):
        return self.place

    def plan(self, params, state, tokens, evidence, keep=None):
        return state, identity(tokens.pos.shape)


PAIR = (np.arange(ROWS) + 1) // 2  # the group of each row: the class row alone, then two by two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Same):
    """Rows behind the class row become their means two by two."""

    name = "pairs"

    def plan(self, params, state, tokens, evidence, keep=None):
        b, n = tokens.pos.shape
        wide = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.int32), (b, len(a)))
        index = np.maximum(2 * np.arange((n + 1) // 2) - 1, 0)
        return state, Plan(wide(index), wide(PAIR[:n]), tokens.size, jnp.zeros((b,), jnp.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Most(Same):
    """The class row and those of the largest mean stay, `capacity` in all; one row fewer each layer where `fewer`."""

    name = "most"
    capacity: int = 9
    fewer: bool = False

    def layer(self, i, layers):
        return dataclasses.replace(self, capacity=self.capacity - i) if self.fewer else self

    def plan(self, params, state, tokens, evidence, keep=None):
        live, safe = tokens.pos >= 0, tokens.kind == SPECIAL
        score = jnp.mean(tokens.x.astype(jnp.float32), -1)
        limit = (self.capacity if keep is None else keep) - jnp.sum(safe & live, -1)
        mask = choose(score, live, jnp.maximum(limit, 0), safe, most=self.capacity)
        return state, pack(mask, self.capacity, jnp.where(safe, jnp.inf, score))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remember(Same):
    """Where it acts for the (rest+1)-th time, the row that was at first row 3, 5, 7, ... goes: a state that moves with the rows."""

    name = "remember"
    seed: int = 0

    def start(self, params, tokens):
        b, n = tokens.pos.shape
        return Held(jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n)), jnp.zeros((), jnp.int32))

    def plan(self, params, state, tokens, evidence, keep=None):
        return Held(state.slots, state.rest + 1), pack(state.slots != 3 + 2 * state.rest, tokens.pos.shape[1] - 1)


def ask(**needs) -> Reducer:
    """A method of site select that asks."""
    return type("Ask", (Same,), {"name": "ask", "needs": Needs(**needs)})()


# --- the numpy encoder ------------------------------------------------------------------------------------------------


def norm(x, p, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.norm_eps) * p[name] + p[name + "_bias"]


def mean(x, group):
    return np.stack([x[group == g].mean(0) for g in range(group.max() + 1)])


def probs(y, p):
    q, k = ((y @ p[n] + p[n + "_bias"]).reshape(len(y), CFG.heads, -1).transpose(1, 0, 2) for n in "qk")
    a = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    a = np.exp(a - a.max(-1, keepdims=True))
    return a / a.sum(-1, keepdims=True)


def mix(a, y, p):
    v = (y @ p["v"] + p["v_bias"]).reshape(len(y), CFG.heads, -1).transpose(1, 0, 2)
    return (a @ v).transpose(1, 0, 2).reshape(len(a[0]), -1) @ p["o"] + p["o_bias"]


def reference(params, x, place=None, layer=1, restore=None, group=PAIR):
    """Rows f64 [n c] behind the last layer: groups of rows are averaged at a place of one layer, undone before another."""
    gelu = lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    for i, p in enumerate(params["layers"]):
        here = place if i == layer else None
        x = x[group] if restore == i else x
        x = mean(x, group) if here == "block" else x
        if here == "around":
            y = mean(norm(x, p, "norm1"), group)
            x = x + mix(probs(y, p), y, p)[group]
        elif here == "ahead":
            a = probs(norm(x, p, "norm1"), p)  # rows of a group are averaged, columns summed
            a = np.stack([mean(h, group) @ (group[:, None] == np.arange(group.max() + 1)) for h in a])
            x = mean(x, group)
            x = x + mix(a, norm(x, p, "norm1"), p)
        else:
            y = norm(x, p, "norm1")
            x = x + mix(probs(y, p), y, p)
        x = mean(x, group) if here == "attn" else x
        x = x + gelu(norm(x, p, "norm2") @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    return x[group] if restore is not None and restore >= CFG.layers else x


@functools.cache
def start():
    """(float64 parameters, rows [b n c]) of the world."""
    params, images = world()
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params), np.asarray(vit.embed(CFG, params, images).x, np.float64)


def test_plain():
    params, rows = start()
    got = encode(*world())
    for b in range(2):
        np.testing.assert_allclose(got.tokens.x[b], reference(params, rows[b]), atol=2e-5)
    tokens = got.tokens
    assert tokens.kind[0].tolist() == [SPECIAL] + [IMAGE] * 16 and tokens.cell[0, 1:6].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


@pytest.mark.parametrize("place, restore", [*((p, None) for p in PLACES), ("block", 2), ("block", 9)])
def test_what_becomes_of_the_rows_at_each_place(place, restore):
    """Pairs are averaged in layer 1; with `restore` each row is back, as what its group has become."""
    params, rows = start()
    got = encode(*world(), Recipe(vit=((1, Pairs(place=place, restore=restore)),))).tokens
    back = place == "around" or restore is not None
    assert got.x.shape[1] == (ROWS if back else 9)
    for b in range(2):
        want = reference(params, rows[b], place, restore=restore)
        np.testing.assert_allclose(got.x[b], want, atol=2e-5)
        assert got.source[b].tolist() == list(range(ROWS) if back else PAIR)
        assert got.size[b].tolist() == ([1] * ROWS if back else [1] + [2] * 8)


@pytest.mark.parametrize("place, restore", [*((p, None) for p in PLACES), ("block", 2)])
def test_all_rows_is_the_plain_encoder(place, restore):
    params, images = world()
    want = encode(params, images).tokens
    got = encode(params, images, Recipe(vit=((1, Same(place=place, restore=restore)),))).tokens
    np.testing.assert_allclose(got.x, want.x, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, got._replace(x=0), want._replace(x=0))


def test_a_dropped_row_comes_back_as_it_was():
    """Undone, a kept row is what it has become; a dropped one is what it was before layer 1."""
    params, images = world()
    got = encode(params, images, Recipe(vit=((1, Most(capacity=6, restore=2)),)), until=2).tokens
    dropped = encode(params, images, Recipe(vit=((1, Most(capacity=6)),)), until=2).tokens
    before = encode(params, images, until=1).tokens
    for b in range(2):
        want = [before.x[b, i] if row < 0 else dropped.x[b, row] for i, row in enumerate(dropped.source[b].tolist())]
        assert sum(row < 0 for row in dropped.source[b].tolist()) == ROWS - 6
        np.testing.assert_allclose(got.x[b], np.stack(want), atol=1e-6)


def test_undone_inside_one_another():
    """Pairs from layer 0 on and pairs of these in layer 1, each back before its own layer."""
    params, rows = start()
    one = lambda i, x: reference({"layers": params["layers"][i : i + 1]}, x)
    got = encode(*world(), Recipe(vit=((0, Pairs(restore=3)), (1, Pairs(restore=2))))).tokens
    for b in range(2):
        inner = one(1, mean(one(0, mean(rows[b], PAIR)), PAIR[:9]))
        np.testing.assert_allclose(got.x[b], one(2, inner[PAIR[:9]])[PAIR], atol=2e-5)


def test_keep_is_traced():
    """One trace for every budget; the rows are those of the method whose capacity is the budget."""
    params, images = world()
    traces = []

    @jax.jit
    def run(keep):
        traces.append(0)
        recipe = Recipe(vit=((0, Most(capacity=9)), (1, Most(capacity=8, place="attn"))))
        return vit.encode(CFG, params, vit.embed(CFG, params, images), recipe, keep={"vit": (keep, None)}).tokens

    for keep in (7, 4):
        got = run(jnp.asarray(keep))
        assert got.x.shape[1] == 8 and np.sum(np.asarray(got.pos) >= 0, -1).tolist() == [keep] * 2 and not got.lost.any()
    small = encode(params, images, Recipe(vit=((0, Most(capacity=4)),))).tokens
    np.testing.assert_allclose(got.x[:, -4:], small.x, atol=1e-5)
    by_row = run(jnp.asarray([3, 6]))
    assert np.sum(np.asarray(by_row.pos) >= 0, -1).tolist() == [3, 6] and len(traces) == 2  # [] and [b]
    with pytest.raises(TypeError, match=r"keep\['vit'\] counts slots"):
        run(jnp.asarray(0.5))


def test_each_layer_has_its_instance():
    got = encode(*world(), Recipe(vit=tuple((i, Most(capacity=10, fewer=True)) for i in range(3)))).tokens
    assert got.x.shape[1] == 8


def test_a_state_is_shared_by_the_places_of_one_method():
    """The second time it acts, its rows have moved and it has counted on; another method begins anew; a reduction undone lifts states."""
    params, images = world()
    gone = lambda *entries: np.flatnonzero(np.asarray(encode(params, images, Recipe(vit=entries)).tokens.source[0]) < 0).tolist()
    assert gone((0, Remember()), (2, Remember())) == [3, 5]
    assert gone((0, Remember()), (2, Remember(seed=1))) == [3, 4]  # its own row 3 is what was row 4
    one = Remember(restore=2)
    assert gone((0, Remember()), (1, one), (2, Remember())) == [3, 5]


def test_evidence_moves_with_the_rows():
    """site select: of layer 0, ahead of a reduction, and of the last one; of the layer behind, on the rows as they are."""
    params, images = world()
    keys = ask(layers=(0, -1), keys=True, received=True)
    plain = encode(params, images, Recipe(select=keys))
    assert plain.evidence.received.shape == (2, 2, 2, ROWS) and plain.evidence.keys.shape == (2, 2, 2, ROWS, 6)
    np.testing.assert_allclose(np.sum(plain.evidence.received, -1), ROWS, rtol=1e-5)
    index = jnp.asarray([[0, 2, 5, 9]] * 2, jnp.int32)
    fixed = type("Fixed", (Same,), {"name": "fixed", "plan": lambda self, params, state, tokens, *_: (state, from_index(index, ROWS))})()
    cut = encode(params, images, Recipe(vit=((1, fixed),), select=keys))
    assert cut.evidence.received.shape == (2, 2, 2, 4)
    np.testing.assert_allclose(cut.evidence.received[0], plain.evidence.received[0][..., index[0]], rtol=1e-5)
    np.testing.assert_allclose(np.sum(cut.evidence.received[1], -1), 4, rtol=1e-5)
    behind = encode(params, images, Recipe(select=ask(own=True, keys=True)), until=2)
    np.testing.assert_allclose(behind.evidence.keys, plain.evidence.keys[1], atol=1e-5)


def test_select():
    """Applied to what came out; nothing without a method."""
    params, images = world()
    out = encode(params, images)
    recipe = Recipe(select=Most(capacity=5))
    got = jax.jit(vit.select, static_argnums=2)(params, out, recipe, keep=jnp.asarray([5, 3]))
    assert got.x.shape[1] == 5 and np.sum(np.asarray(got.pos) >= 0, -1).tolist() == [5, 3]
    assert vit.select(params, out, vit.PLAIN) is out.tokens


def test_learned_weights_reach_their_method():
    """params["methods"]["vit"][j] is what entry j is given."""

    class Learned(Same):
        name = "learned"

        def plan(self, params, state, tokens, evidence, keep=None):
            return state, pack(params["mask"][None] & (tokens.pos >= 0), 4)

    params, images = world()
    masks = tuple({"mask": jnp.arange(ROWS if i == 0 else 6) % 17 < m} for i, m in enumerate((6, 4)))
    recipe = Recipe(vit=((0, Most(capacity=6)), (1, Learned())))
    got = encode(params | {"methods": {"vit": masks}}, images, recipe).tokens
    assert got.x.shape[1] == 4


def test_gelu():
    """x Phi(x) by the error function, to float32; in bfloat16 the tail keeps its digits."""
    x = jnp.linspace(-6.0, 6.0, 97)
    want = [float(v) * 0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x]
    np.testing.assert_allclose(encoder.act("gelu", x), want, atol=1e-6)
    narrow = encoder.act("gelu", x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    rounded = [float(v) * 0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x.astype(jnp.bfloat16)]
    np.testing.assert_allclose(narrow.astype(jnp.float32), rounded, rtol=2**-8, atol=1e-6)


def test_all_rows_of_an_image_stand_in_line():
    """Class row and patches at 0, 1, 2, ...; each of size one, none dead."""
    params, images = world()
    tokens = jax.tree.map(np.asarray, vit.embed(CFG, params, images))
    assert (tokens.pos == np.arange(ROWS)).all() and (tokens.size == 1).all() and (tokens.seen == ROWS).all()
    assert tokens.pos.dtype == np.int32 and (tokens.rope[..., 0] == np.arange(ROWS)).all()


def test_bf16():
    """Reduced at all four places."""
    recipe = Recipe(vit=((0, Pairs()), (0, Pairs(place="attn")), (1, Pairs(place="around")), (2, Pairs(place="ahead"))))
    tokens = encode(*world("bfloat16"), recipe).tokens
    assert tokens.x.dtype == jnp.bfloat16 and tokens.size.dtype == jnp.float32 and tokens.x.shape[1] == 3
    exact = encode(*world(), recipe).tokens
    assert tokens.size.tolist() == exact.size.tolist() and 0 < np.abs(tokens.x.astype(jnp.float32) - exact.x).max() < 0.2


# --- what is refused --------------------------------------------------------------------------------------------------


def needy(place="block", **needs):
    return type("Needy", (Same,), {"name": "needy", "needs": Needs(**needs)})(place=place)


@pytest.mark.parametrize(
    "recipe, until, match",
    [
        (Recipe(vit=((3, Same(place="attn")),)), 3, "same acts at layer 3; of 3 layers that run it has places 0 to 2"),
        (Recipe(vit=((2, Same(place="attn")),)), 2, "same acts at layer 2; of 2 layers that run it has places 0 to 1"),
        (Recipe(vit=((-1, Same()),)), 3, "same acts at layer -1"),
        (Recipe(vit=((0, needy(received=True)),)), 3, "needy acts at layer 0; of 3 layers that run it has places 1 to 3"),
        (Recipe(vit=((1, needy(layers=(0,))),)), 3, r"needy needs evidence of layers \(0,\); inside an encoder"),
        (Recipe(vit=((1, Same(restore=1)),)), 3, "same is undone before layer 1; it acts at 'block' of layer 1"),
        (Recipe(vit=((1, Same(place="attn", restore=2)),)), 3, "same is undone before layer 2; it acts at 'attn' of layer 1"),
        (Recipe(vit=((1, Same(place="around")), (1, Pairs(place="ahead")))), 3, "two methods act around or ahead of the attention of one layer"),
        (Recipe(select=ask(layers=(3,), keys=True)), 3, "ask needs evidence of layer 3; 3 layers run"),
        (Recipe(vit=((0, Same(restore=2)), (1, Pairs(restore=3)))), 3, "pairs begins at layer 1, inside same, and must be undone before layer 2 too, not 3"),
        (Recipe(vit=((0, Pairs(restore=2)), (2, needy(received=True)))), 3, "needy needs evidence of layer 1 about all rows; .* inside pairs"),
        (Recipe(vit=((1, Pairs(place="around")), (2, needy(keys=True)))), 3, "needy needs evidence of layer 1 about all rows; .* inside pairs"),
        (Recipe(vit=((1, Pairs(place="around")), (1, needy("attn", keys=True)))), 3, "needy needs evidence of layer 1 about all rows"),
        (Recipe(vit=((1, Pairs(restore=9)),), select=ask(keys=True)), 2, "ask needs evidence of layer 1 about all rows"),
        (Recipe(vit=((1, Pairs(restore=2)),), select=ask(layers=(0, -1), keys=True)), 3, "ask needs evidence of layer 0 about all rows"),
    ],
)  # fmt: skip
def test_validate_encoder(recipe, until, match):
    with pytest.raises(ValueError, match=match):
        recipe.validate_encoder(CFG, until)


def test_what_works():
    for recipe in (
        Recipe(vit=((0, Same()), (0, needy("attn", received=True)), (1, needy("block", own=True, keys=True)))),
        Recipe(vit=((0, Pairs(restore=2)), (1, needy(received=True)), (1, Same(restore=2))), select=ask(layers=(-1,), keys=True)),
    ):
        recipe.validate_encoder(CFG, 3)


def test_wrong_calls():
    params, images = world()
    tokens = vit.embed(CFG, params, images)
    with pytest.raises(ValueError, match="until=4 of 3 layers"):
        vit.encode(CFG, params, tokens, until=4)
    with pytest.raises(ValueError, match="must be a tuple of one dict a layer"):
        vit.encode(CFG, params | {"layers": list(params["layers"])}, tokens)
    with pytest.raises(ValueError, match="ask asks for evidence of the layer behind the last; run fewer layers: until=2"):
        vit.encode(CFG, params, tokens, Recipe(select=ask(own=True, keys=True)))
    with pytest.raises(ValueError, match=r"images are \[2, 8, 8, 1\] for patches of \(2, 2\) and 3 channels"):
        vit.embed(CFG, params, images[..., :1])


# --- positions of another size ----------------------------------------------------------------------------------------


def test_resampled_positions():
    """A constant stays; the same size is the array itself; a slope at points between, by the two kernels."""
    slope = jnp.broadcast_to(jnp.arange(8.0)[None, :, None], (6, 8, 1)).reshape(48, 1)
    assert resample.resize_grid(slope, (6, 8), (6, 8)) is slope
    near, far = lambda t: 1.25 * t**3 - 2.25 * t**2 + 1, lambda t: -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
    between = far(1.75) * 0 + near(0.75) * 1 + near(0.25) * 2 + far(1.25) * 3  # at 1.75, of 0, 1, 2, 3
    for antialias, want in ((False, between), (True, 1.75)):
        flat = resample.resize_grid(jnp.ones((48, 2)), (6, 8), (3, 11), antialias)
        np.testing.assert_allclose(flat, np.ones((33, 2)), rtol=1e-6)
        wide = np.asarray(resample.resize_grid(slope, (6, 8), (6, 16), antialias)).reshape(6, 16)
        np.testing.assert_allclose(wide[:, 4], want, rtol=1e-5)
    assert resample.resize_grid(slope.astype(jnp.bfloat16), (6, 8), (2, 2)).dtype == jnp.bfloat16
