"""The pure decoder inside a Flax linen module: train it with optax, answer from a compressed cache.

Claim: a linen module of a dozen lines gives the plain function's logits to the last bit, trains with an ordinary TrainState, and
    takes any recipe: the embedded model still finds every needle after SnapKV cut each layer's cache to an eighth (question seen).
Command: python experiments/linen_example.py
Hardware and time: two cores of a 2.6 GHz Xeon (jax 0.10.2, flax 0.12.8), 20 to 35 seconds.
Expected: difference 0; 2.136 nats before and 2.104 after the step; 20 of 20 needles in the whole cache, 20 in SnapKV's 128 slots a
    head, 2 in StreamingLLM's 128.
"""

import functools
import importlib.resources
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxtok as jt
from jaxtok.evals import tasks
from jaxtok.methods import SnapKV, StreamingLLM
from jaxtok.models import blocks, decoder, load, text
from jaxtok.models.config import Config


class Decoder(nn.Module):
    """The decoder's parameter dict is one linen parameter; every method passes it to pure functions."""

    cfg: Config
    recipe: jt.Recipe = decoder.PLAIN

    def setup(self):
        self.param("decoder", functools.partial(blocks.init, self.cfg))  # as an attribute it would be frozen, its tuple of layers too

    def weights(self):
        return core.unfreeze(self.get_variable("params", "decoder"))

    def __call__(self, ids, live=None):
        """Logits of the parallel pass."""
        return blocks.forward(self.cfg, self.weights(), ids, live)

    def generate(self, ids, live, *, new: int):
        """Greedy ids after a prefill whose caches the recipe compressed."""
        weights = self.weights()
        tokens, layers = decoder.prefill(self.cfg, weights, decoder.embed(self.cfg, weights, ids, live), self.recipe, new=new)
        return jt.decode.generate(self.cfg, weights, tokens, layers, self.recipe, new=new).ids


def loss_fn(apply_fn, params, ids):
    """Mean negative log likelihood of the next token, in nats."""
    logits = apply_fn({"params": params}, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@jax.jit
def train_step(state: TrainState, ids):
    """(the state after one update, the loss before it)."""
    loss, grads = jax.value_and_grad(lambda params: loss_fn(state.apply_fn, params, ids))(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    cfg, weights, tokenizer = load.load(pathlib.Path(str(importlib.resources.files("jaxtok.models") / "embedded")))
    ids = jnp.asarray(tokenizer.encode(tasks.haystack()[: 8 * 256]), jnp.int32).reshape(8, 256)
    model, params = Decoder(cfg), {"decoder": weights}

    far = jnp.abs(jax.jit(model.apply)({"params": params}, ids) - jax.jit(blocks.forward, static_argnums=0)(cfg, weights, ids)).max()
    print(f"largest difference between the module's logits and the plain function's: {far}")

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-4))
    state, before = train_step(state, ids)
    _, after = train_step(state, ids)
    print(f"nats a character of Shakespeare, before and after one step on it: {before:.4f} {after:.4f}")

    cases = tasks.examples("needle", 20, length=1024, encode=tokenizer.encode)
    prompts, live = map(jnp.asarray, text.pad([tokenizer.encode(case.context + case.question) for case in cases], bucket=64))
    recipes = {
        "all 1,024 characters": decoder.PLAIN,
        "the 128 that SnapKV keeps": jt.Recipe(cache=SnapKV(capacity=128, window=16)),
        "the last 128 (StreamingLLM)": jt.Recipe(policy=StreamingLLM(capacity=128)),
    }
    for name, recipe in recipes.items():
        answer = jax.jit(functools.partial(Decoder(cfg, recipe).apply, method="generate", new=3))
        said = [tokenizer.decode(row) for row in np.asarray(answer({"params": state.params}, prompts, live))]
        print(f"needles found in {name}: {sum(a == case.answers[0] for a, case in zip(said, cases, strict=True))} of 20")


if __name__ == "__main__":
    main()
