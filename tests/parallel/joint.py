"""A prefill, a continuation and two training steps over 4 devices: one process with 4, or two with 2 each. Prints what came out as JSON.

`python joint.py wait` instead goes on until it is killed.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from jaxtok.core.recipe import Recipe
from jaxtok.decode import generate
from jaxtok.methods import SnapKV
from jaxtok.models import blocks, decoder
from jaxtok.models.config import Config
from jaxtok.parallel import Spread, leader, make_mesh, shardings

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=16)
T, NEW = 32, 4


def main() -> dict:
    mesh = make_mesh(sequence=2, tensor=2)
    spread = Spread(mesh=mesh, layout="zigzag")
    recipe = Recipe(cache=SnapKV(capacity=12, window=4, pool=3))
    params = jax.jit(lambda: blocks.init(CFG, jax.random.key(0)), out_shardings=shardings(blocks_shapes(), mesh))()
    ids = jax.random.randint(jax.random.key(1), (2, T), 0, CFG.vocab)

    @jax.jit
    def run(params, ids):
        tokens, layers = decoder.prefill(CFG, params, decoder.embed(CFG, params, ids), recipe, new=NEW, impl=spread)
        return generate(CFG, params, tokens, layers, recipe, new=NEW, eos=(), impl=spread).ids

    @jax.jit
    def update(params, ids):
        def loss(params):
            z = blocks.forward(CFG, params, ids, impl=spread)
            return optax.softmax_cross_entropy_with_integer_labels(z[:, :-1], ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

    made = run(params, ids)
    losses = []
    for _ in range(2):
        params, value = update(params, ids)
        losses.append(float(multihost_utils.process_allgather(value, tiled=True)))
    return {"ids": multihost_utils.process_allgather(made, tiled=True).tolist(), "losses": losses, "processes": jax.process_count()}


def blocks_shapes():
    return jax.eval_shape(lambda: blocks.init(CFG, jax.random.key(0)))


if __name__ == "__main__":
    if sys.argv[1:] == ["wait"]:
        print("joined", jax.process_index(), file=sys.stderr, flush=True)
        mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        step = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P()))
        while True:
            jax.block_until_ready(step(jnp.ones(jax.device_count())))
            time.sleep(0.2)
    found = main()
    if leader():
        print(json.dumps(found), flush=True)
