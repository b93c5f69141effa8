"""The laws of three readers and two compressors once more, attention and its evidence by the kernels in Pallas' interpreter.

But for `transforms_compose`, which takes gradients through steps: the kernel of reads has none, and the law stays with XLA."""

import jax
import jax.numpy as jnp
import pytest

from jaxtok.testing import LAWS, world
from tests.methods.laws import makers
from tests.methods.test_laws import EXEMPT

METHODS = ("quest", "tokenselect", "tidaldecode", "snapkv", "h2o")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    before, world.IMPL = world.IMPL, "interpret"
    world.forget()
    yield
    world.IMPL = before
    world.forget()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("law", LAWS)
def test_law_by_kernels(name, law):
    make = makers(name)[name]
    if (name, law) in EXEMPT:
        with pytest.raises(AssertionError):
            LAWS[law](make)
        return
    LAWS[law](make)


def test_the_kernels_run():
    """Prefill, evidence and steps hold kernel calls (what layers share is printed once)."""
    params, ids, force = world.world()
    method = makers("h2o")["h2o"](world.CAP)
    args = world.weights(method, params), world.tokens_of(params, ids), force, {"policy": jnp.full((world.B,), 4)}, jax.random.key(0)
    text = str(jax.make_jaxpr(lambda *a: world.run(world.recipe_of(method), *a))(*args))
    assert text.count("pallas_call") == 3
