"""A training run that kills itself, for test_kill.py:  killable.py DIRECTORY OUT [batch N | save N]

`batch N`: SIGKILL while batch N is asked for (the step before it is in flight). `save N`: SIGKILL at the moment the finished checkpoint of
step N would be renamed into place. The loss draws noise from the key, the data come from an iterator with a position, the optimizer is Adam.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok import train

DIRECTORY, OUT, *KILL = sys.argv[1:]


class Stream:
    """Batches from a generator whose position is its own state, not the step."""

    def __init__(self):
        self.rng, self.count = np.random.default_rng(7), 0

    def __iter__(self):
        return self

    def __next__(self):
        if KILL[:1] == ["batch"] and self.count == int(KILL[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        return {"x": self.rng.normal(size=(8, 6)).astype(np.float32)}

    def state(self):
        return {"rng": self.rng.bit_generator.state, "count": self.count}

    def restore(self, saved):
        print("restored", saved["count"], flush=True)
        self.rng.bit_generator.state, self.count = saved["rng"], saved["count"]


def loss(params, batch, key):
    hidden = jax.nn.gelu(batch["x"] @ params["in"])
    hidden = hidden * jax.random.bernoulli(key, 0.8, hidden.shape) / 0.8
    error = hidden @ params["out"] - batch["x"]
    return (error**2).mean(), {"mae": jnp.abs(error).mean()}


def hook(event, args):
    if event == "os.rename" and f"{args[0]}".rpartition("/")[2].startswith(f"{KILL[1]}."):
        os.kill(os.getpid(), signal.SIGKILL)


if KILL[:1] == ["save"]:
    sys.addaudithook(hook)
keys = jax.random.split(jax.random.key(1))
params = {"in": jax.random.normal(keys[0], (6, 16)) / 2, "out": jax.random.normal(keys[1], (16, 6)) / 4}
optimizer = optax.adamw(optax.cosine_decay_schedule(3e-2, 50))
end = train.fit(loss, params, Stream(), optimizer=optimizer, steps=50, directory=DIRECTORY, save_every=15, log_every=1, accumulate=2)
np.savez(OUT, *(np.asarray(leaf) for leaf in jax.tree.leaves((end.params, end.opt_state, end.step, jax.random.key_data(end.key)))))
