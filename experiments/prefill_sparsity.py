"""What a prefill loses, and saves, by reading a share of the blocks of keys.

Claim: SALE and DHSA keep 98% of the full needle score of the embedded model at a density of a quarter; from some length on a compiled DHSA layer is
    faster than a dense one on the CPU.
Command: python experiments/prefill_sparsity.py
Hardware and time: not measured yet.
Expected: experiments/results/prefill_sparsity/results.json: for each setting the needle score, and by layer and query head the density (share of
    causal blocks listed) and the relative error of the attention's output; for each length the times, and exponents fitted over the lengths.

Density and error are those of each layer on the dense model's inputs. Needles: half as many depths as cases, in the package's haystack. A
decode step reads the whole cache, so what is lost is what the prompt's own rows did not read. Times: one layer's attention in float32, sides in
turn, medians; XLA goes through a list's static length, so SALE is given a capacity there.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.cli.common import console
from jaxtok.core.recipe import Recipe
from jaxtok.core.sparsifier import Sparsifier, View
from jaxtok.core.types import Needs
from jaxtok.decode import generate, prefill
from jaxtok.evals import report, tasks
from jaxtok.methods import DHSA, SALE, AShape, BlockTopK, VerticalSlash
from jaxtok.models import cached, decoder, load, sparsify, text
from jaxtok.ops.block_sparse import density
from jaxtok.train.sale import calibrate

OUT = pathlib.Path(__file__).parent / "results" / "prefill_sparsity" / "results.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    path: str = "embedded"
    """The model: a name or a path, as of models.load.load."""
    length: int = 2048
    cases: int = 50
    batch: int = 10
    shares: tuple[float, ...] = (0.05, 0.1, 0.25)
    """Keys a block of queries reads, of the prompt."""
    taus: tuple[float, ...] = (0.001, 0.004, 0.016)
    thetas: tuple[float, ...] = (0.1, 0.4)
    """SALE calibrated to these errors on training keys."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """For times."""
    repeats: int = 5
    out: pathlib.Path = OUT


def settings(o: Options) -> dict[str, Sparsifier | None]:
    """label -> method."""
    out: dict[str, Sparsifier | None] = {"full": None}
    for share in o.shares:
        keys = max(256, round(share * o.length))
        out[f"a_shape {share}"] = AShape(local=keys - 64)
        out[f"block_topk {share}"] = BlockTopK(capacity=keys, block_k=32, sinks=32)
        out[f"vertical_slash {share}"] = VerticalSlash(verticals=keys // 2, slashes=max(keys // 4, 101), block_k=32)
        out[f"dhsa {share}"] = DHSA(capacity=keys, chunks=o.length // 32, sinks=32, local=32)
        out[f"dhsa:a {share}"] = DHSA(capacity=keys, variant="a")
    out |= {f"sale tau={tau}": SALE(tau=tau) for tau in o.taus}
    return out | {f"sale theta={theta}": SALE() for theta in o.thetas}


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_head(cfg, method: Sparsifier, params, learned, ids, live) -> tuple[jax.Array, jax.Array]:
    """(density [l h], relative error of the output [l h]) of each layer on the dense model's rows."""
    tokens, shares, errors = decoder.embed(cfg, params, ids, live), [], []
    for i, p in enumerate(params["layers"]):
        before = tokens
        tokens, ((kv, seen),) = cached.attend_rows(
            cfg, p, i, before, None, Recipe(), Needs(turned=ids.shape[1]), False, None, "auto"
        )  # fmt: skip
        see: dict[str, Any] = dict(window=cfg.layer_window(i), softcap=cfg.softcap, scale=cfg.scale)
        q, pos = seen.turned, before.pos
        attend = lambda m, q=q, kv=kv, pos=pos, i=i, see=see: sparsify.attend(m, learned, i, q, kv.k, kv.v, pos, **see)[0]
        dense, sparse = attend(None), attend(method)
        length = lambda x: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, (0, 2, 3)))
        errors.append(length(sparse - dense) / length(dense))
        table = method.table(learned, View(q, kv.k, pos, i, **see))
        share = jnp.mean(density(table, pos, block_q=method.block_q, block_k=method.block_k), 0)
        shares.append(jnp.repeat(share, cfg.heads // share.shape[0]))
    return jnp.stack(shares), jnp.stack(errors)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def answer(cfg, recipe: Recipe, new: int, params, ids, live) -> jax.Array:
    tokens, layers = prefill(cfg, params, ids, live, recipe, new=new)
    return generate(cfg, params, tokens, layers, new=new).ids


def scored(o: Options, cfg, params, tokenizer, method: Sparsifier | None, learned) -> float:
    """Needles found."""
    encode = lambda s: tokenizer.encode(s, special=False)
    depths = max(1, o.cases // 2)
    mine = [
        tasks.examples("needle", 1, length=o.length, encode=encode, seed=s, depth=(i + 0.5) / depths)[0]
        for s in range(-(-o.cases // depths))
        for i in range(depths)
    ][: o.cases]
    params, found = params | {"methods": {"sparsify": learned}}, []
    for at in range(0, len(mine), o.batch):
        some = mine[at : at + o.batch]
        ids, live = text.pad([encode(c.context + c.question) for c in some], o.length)
        said = np.asarray(answer(cfg, Recipe(sparsify=method), max(c.max_new for c in some), params, ids, live))
        for case, row in zip(some, said, strict=True):
            reply = tokenizer.decode([int(i) for i in row[: case.max_new] if i >= 0])
            found.append(tasks.string_match(reply, case.answers))
    return float(np.mean(found))


def rows(o: Options, tokenizer, split: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of full length without padding, for densities (or, of the training keys, for thresholds)."""
    encode = lambda s: tokenizer.encode(s, special=False)
    mine = tasks.examples("kv_recall" if split == "train" else "needle", 2, length=o.length + 64, encode=encode, seed=7, split=split)
    ids = np.stack([np.asarray(encode(c.context + c.question))[-o.length :] for c in mine])
    return ids, np.ones(ids.shape, bool)


def times(o: Options) -> dict[str, list[float]]:
    """Median seconds of one layer's attention at each length, 8 query heads on 2 KV heads of 64 channels."""
    out: dict[str, list[float]] = {}
    for n in o.lengths:
        key = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(a, (1, h, n, 64)) for a, h in zip(key, (8, 2, 2), strict=True))
        pos = jnp.arange(n, dtype=jnp.int32)[None]
        some: dict[str, Sparsifier | None] = {
            "full": None,
            "a_shape": AShape(local=448),
            "block_topk": BlockTopK(capacity=512, sinks=64, shared=True),
            "dhsa": DHSA(capacity=512, chunks=max(8, n // 64), tail=0),
            "dhsa:a": DHSA(capacity=512, variant="a", tail=0),
            "sale": SALE(capacity=512, least=0),
        }
        sides = {}
        for label, method in some.items():
            run = jax.jit(lambda q, k, v, method=method, pos=pos: sparsify.attend(method, {}, 0, q, k, v, pos)[0])
            sides[label] = run.lower(q, k, v).compile()
        took: dict[str, list[float]] = {label: [] for label in sides}
        for _ in range(o.repeats + 1):
            for label, side in sides.items():
                begin = time.perf_counter()
                jax.block_until_ready(side(q, k, v))
                took[label].append(time.perf_counter() - begin)
        for label, each in took.items():
            out.setdefault(label, []).append(float(np.median(each[1:])))
    return out


def exponent(lengths: tuple[int, ...], seconds: list[float]) -> float:
    """Of the power of n that fits best."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def main(o: Options) -> dict[str, Any]:
    cfg, params, tokenizer = load.load(o.path)
    ids, live = rows(o, tokenizer, "eval")
    found = []
    for label, method in settings(o).items():
        learned: dict[str, Any] = {}
        if method is not None and "theta" in label:
            theta = float(label.partition("=")[2])
            learned = {
                "tau": jax.jit(lambda p, i, a, m=method, t=theta: calibrate(cfg, p, i, a, m, theta=t))(params, *rows(o, tokenizer, "train"))
            }
        row: dict[str, Any] = {"setting": label, "needle": scored(o, cfg, params, tokenizer, method, learned)}
        if method is not None:
            share, error = (np.asarray(x) for x in by_head(cfg, method, params, learned, ids, live))
            row |= {"density": float(share.mean()), "densities": share.round(4).tolist(), "errors": error.round(5).tolist()}
        console().print({name: x for name, x in row.items() if name not in ("densities", "errors")})
        found.append(row)
    took = times(o)
    fits = {label: exponent(o.lengths, each) for label, each in took.items()}
    crossing = {
        label: next((n for n, a, b in zip(o.lengths, each, took["full"], strict=True) if a < b), None) for label, each in took.items()
    }
    options = {k: v for k, v in dataclasses.asdict(o).items() if k != "out"}
    document = {
        "options": options,
        "machine": report.machine(),
        "rows": found,
        "seconds": took,
        "exponent": fits,
        "below_dense_from": crossing,
    }
    console().print({"exponent": fits, "below dense from": crossing})
    o.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(o.out, document)
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=(__doc__ or "").partition("\n")[0]))
