"""llama2.c checkpoints (the legacy `.bin`): a header of seven i32, then float32 weights; interleaved RoPE pairs."""

import pathlib
import struct
from typing import Any

import numpy as np

from jaxtok.models.config import Config

_MAGIC = 0x616B3432  # "ak42": the versioned formats


def _half_split(w: np.ndarray, heads: int) -> np.ndarray:
    """[heads*d, c] with rotary pairs (2i, 2i+1) -> pairs (i, i + d/2)."""
    return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a torch.save archive (zip) or a bare pickle."""
    return head[:2] == b"PK" or head[:1] == b"\x80"


def read(path: str | pathlib.Path) -> tuple[Config, dict[tuple[str | int, ...], Any]]:
    """Config and {path in params: function that reads it, [in, out]}; ValueError when size and header disagree.

    Header: width, hidden, layers, heads, kv_heads, vocab (negative = the head is not the embedding), context.
    Weights in file order: embed, attn_norm, q, k, v, o, mlp_norm, gate, down, up (each [l ...], matrices [out, in]), norm,
    two RoPE tables [context d/2] (unused), head if not shared. bos is 1; a text ends at 2 or where the next begins (1).
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(28)
    if is_pickle(head):
        raise ValueError(f"{path} is a pickle (torch.save), which is never opened: it can run code; convert it to safetensors")
    if len(head) < 28:
        raise ValueError(f"{path} is no llama2.c checkpoint: {size} bytes, the header alone has 28")
    c, f, l, h, g, signed, n = struct.unpack("<7i", head)
    if c == _MAGIC:
        raise ValueError(f"{path} has llama2.c's versioned format; supported: the legacy one (export.py --version 0)")
    vocab = abs(signed)
    named = f"width={c} hidden={f} layers={l} heads={h} kv_heads={g} vocab={signed} context={n}"
    if min(c, f, l, h, g, vocab, n) < 1 or c % h or h % g or c // h % 2:
        raise ValueError(f"{path} is no llama2.c checkpoint: its header says {named}")
    d = c // h
    stacked = {"attn_norm": (c,), "q": (h * d, c), "k": (g * d, c), "v": (g * d, c), "o": (c, h * d), "mlp_norm": (c,)}
    stacked |= {"gate": (f, c), "down": (c, f), "up": (f, c)}
    order: list[tuple[str, tuple[int, ...]]] = [("embed", (vocab, c)), *((k, (l, *s)) for k, s in stacked.items()), ("norm", (c,))]
    order += [("", (2, n, d // 2))] + ([("head", (vocab, c))] if signed < 0 else [])
    want = 28 + 4 * sum(int(np.prod(s, dtype=object)) for _, s in order)  # python ints: absurd headers must not overflow
    if size != want:
        raise ValueError(f"{path} is no llama2.c checkpoint or is cut off: {size} bytes, its header ({named}) needs {want}")
    cfg = Config(
        family="llama",
        vocab=vocab,
        width=c,
        layers=l,
        heads=h,
        kv_heads=g,
        head_dim=d,
        hidden=f,
        context=n,
        tied=signed > 0,
        bos=1,
        eos=(1, 2),
    )

    weights: dict[tuple[str | int, ...], Any] = {}
    at = 28
    for name, shape in order:
        w = np.memmap(path, "<f4", "r", at, shape)
        at += 4 * w.size
        if name in ("embed", "norm"):
            weights[name,] = lambda w=w: np.asarray(w)
        elif name == "head":
            weights[name,] = lambda w=w: w.T
        elif name:
            for i in range(l):
                turn = {"q": h, "k": g}.get(name)
                # .T of a norm [c] is itself
                weights["layers", i, name] = lambda w=w, i=i, turn=turn: (w[i] if turn is None else _half_split(w[i], turn)).T
    return cfg, weights


def looks_like_tokenizer(path: pathlib.Path) -> bool:
    """llama2.c names its tokenizers tokenizer.bin or tok<vocab>.bin."""
    return path.name.startswith("tok")
