"""A decoder's layers in numpy float64, written from the formulas, for references of methods between them; one sequence, no padding."""

import numpy as np

from jaxtok.core.types import IMAGE
from jaxtok.testing.rows import TEXT


def norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def rotate(x, ids, theta):
    """x [e n d], half-split pairs."""
    d = x.shape[-1]
    angle = np.asarray(ids)[:, None] * theta ** (-np.arange(0, d, 2) / d)
    lo, hi = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([lo * np.cos(angle) - hi * np.sin(angle), hi * np.cos(angle) + lo * np.sin(angle)], -1)


def layer(cfg, p, x, ids):
    """(rows behind the layer, attention [h n n], rotated keys [g n d]) of rows x [n c] in order, at the rotary ids."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    n, d = len(x), cfg.head_dim
    y = norm(x, p["attn_norm"], cfg.norm_eps)
    split = lambda a: a.reshape(n, -1, d).swapaxes(0, 1)
    q, k, v = rotate(split(y @ p["q"]), ids, cfg.rope_theta), rotate(split(y @ p["k"]), ids, cfg.rope_theta), split(y @ p["v"])
    own = np.arange(cfg.heads) // (cfg.heads // cfg.kv_heads)  # the key head of each query head
    logits = np.where(np.tril(np.ones((n, n), bool)), q @ k[own].swapaxes(1, 2) * d**-0.5, -np.inf)
    a = np.exp(logits - logits.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    x = x + (a @ v[own]).swapaxes(0, 1).reshape(n, -1) @ p["o"]
    y = norm(x, p["mlp_norm"], cfg.norm_eps)
    gate = y @ p["gate"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ p["up"])) @ p["down"], a, k


def rows_of(tokens, b):
    """(x, whether a row is of an image) of the live rows of sequence b."""
    live = np.asarray(tokens.pos[b]) >= 0
    return np.asarray(tokens.x[b], np.float64)[live], (np.asarray(tokens.kind[b]) == IMAGE)[live]


def twice(params, x, image, choose, repack=True):
    """Rows behind the second of TEXT's layers, `choose(x, image, A0, A1, keys1)` -> (x, ids) in between; A0, A1, keys1: those of all rows."""
    ids = np.arange(len(x))
    x, before, _ = layer(TEXT, params["layers"][0], x, ids)
    _, own, keys = layer(TEXT, params["layers"][1], x, ids)
    x, ids = choose(x, image, before, own, keys)
    return layer(TEXT, params["layers"][1], x, np.arange(len(x)) if repack else ids)[0]
