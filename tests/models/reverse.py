"""A one-layer post-norm encoder over one-hot digits, as a pure function of the nested dict that its Flax checkpoint holds.

x = W(onehot(ids)) + p;  x = LN(x + attention(x));  x = LN(x + W(relu(W(x))));  logits = W(relu(LN(W(x)))).
p[i, 2j] = sin(i / 10000**(2j/c)), p[i, 2j + 1] = cos(the same); one head; every W has a bias; LN has scale and bias, eps 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.ops.attention import attention

FILE = "reverse_task_flax/ReverseTask.ckpt"


def linear(p, x):
    return x @ p["kernel"] + p["bias"][None, None]


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6) * p["scale"][None, None] + p["bias"][None, None]


def waves(n: int, c: int) -> np.ndarray:
    """The position table, f32 [n c]."""
    angle = np.arange(n)[:, None] / 10000 ** (np.arange(0, c, 2) / c)[None]
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(n, c).astype(np.float32)


def forward(params, ids):
    """Logits f32 [b n 10] of ids [b n]."""
    p, (b, n) = params["transformer"]["layers_0"], ids.shape
    x = linear(params["input_layer"], jax.nn.one_hot(ids, params["input_layer"]["kernel"].shape[0]))
    x = x + waves(n, x.shape[-1])[None]
    q, k, v = jnp.split(linear(p["self_attn"]["qkv_proj"], x)[:, None], 3, -1)
    order = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    y = attention(q, k, v, q_pos=order, k_pos=order, causal=False)[0][:, 0]
    x = layer_norm(p["norm1"], x + linear(p["self_attn"]["o_proj"], y))
    x = layer_norm(p["norm2"], x + linear(p["linear_3"], jax.nn.relu(linear(p["linear_0"], x))))
    x = layer_norm(params["output_net_1"], linear(params["output_net_0"], x))
    return linear(params["output_net_4"], jax.nn.relu(x))
