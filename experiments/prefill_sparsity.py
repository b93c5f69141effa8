"""What a prefill loses, and saves, by reading a share of the blocks of keys.

Claim: SALE and DHSA keep 98% of the full needle score of the embedded model at a density of a quarter. Measured at 6,144 tokens (full 1.000 of 40
    cases; 0.800 at 8,192): every variant of DHSA at 640 keys 1.000 at density 0.12 to 0.22, with even boundaries, no predictor. That is its dense
    tail's doing: A-shape with the same tail has 1.000 at 0.23, without 0.100; block top-k without a tail 0.000. SALE, without a tail, 1.000 at 0.18
    (tau 0.25, the best 1,024 keys at most) and, with thresholds by head calibrated on training prompts (theta 1 and 2), at 0.17 and 0.16; at the
    paper's tau of 0.004 and at most 2,048 keys 1.000 at 0.48: estimates in 4 bits of this model's 32 channels pass so small a threshold
    nearly everywhere. In all of these more blocks passed than found room (`lost`), so that the bound by tau does not hold there. At 256 keys:
    DHSA 1.000 at 0.10 (variant topk 0.925 at 0.06), vertical-slash, without a tail, 1.000 at 0.15. 98% of 40 cases = all of them.
Command: JAXTOK_DATA=... python experiments/prefill_sparsity.py          (killed and started again, it goes on after the last row done)
         python experiments/prefill_sparsity.py --parts times             (the times alone, into the same file; with nothing else running)
Hardware and time: two cores of a 2.6 GHz Xeon beside other work: 40 s to 8 minutes a setting. In the committed result: SALE's rows
    --sale-keys 2048 --taus 0.004 --thetas (none) and --sale-keys 1024 --taus 0.25 --thetas 1.0 2.0.
Times, on the idle machine (medians of 5, sides in turn), milliseconds at 1,024 / 2,048 / 4,096 / 8,192 / 16,384: dense 13 / 42 / 138 / 516 / 1,982;
    DHSA 21 / 50 / 96 / 226 / 448 (below dense from 4,096 tokens on, with a predictor too; variant a from 2,048); SALE 33 / 77 / 198 / 544 / 1,748
    (from 16,384 on: XLA estimates the visible pairs in float32). Exponents: dense 1.81, DHSA 1.10, variant a 1.06, SALE 1.42.
Expected: experiments/results/prefill_sparsity/results.json: for each setting the needle score, and by layer and query head the density (share of
    causal blocks listed; `keys`: share of keys read) and the relative error of the attention's output; the same without a score on text for
    the real checkpoint; for each length the times, and exponents fitted over the lengths; figure.png.

Length: the longest of `at` at which the model finds 90% of the needles. Density and error are those of each layer on the dense model's inputs; rows of
the tail count as dense. Needles: half as many depths as cases, in the package's haystack. A decode step reads the whole cache, so what is lost is
what the prompt's own rows did not read. `+tail`: the last 64 rows dense, as DHSA has them in any case. Times: one layer's attention in
float32, sides in turn, medians; XLA goes through a list's static length, so SALE is given a capacity there. Without JAXTOK_DATA the real checkpoint is left out.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.cli.common import console
from jaxtok.core.recipe import Recipe
from jaxtok.core.sparsifier import Sparsifier
from jaxtok.decode import generate, prefill
from jaxtok.evals import figures, report, sparsity, tasks
from jaxtok.methods import DHSA, SALE, AShape, BlockTopK, VerticalSlash
from jaxtok.models import load, sparsify, text
from jaxtok.models.config import Config
from jaxtok.train.sale import calibrate

OUT = pathlib.Path(__file__).parent / "results" / "prefill_sparsity" / "results.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    path: str = "embedded"
    """The model of the needles: a name or a path, as of models.load.load."""
    parts: tuple[Literal["needles", "real", "times"], ...] = ("needles", "real", "times")
    at: tuple[int, ...] = (8192, 6144, 4096, 2048)
    """Lengths, longest first."""
    cases: int = 40
    batch: int = 4
    keys: tuple[int, ...] = (640, 256)
    """Keys that a block of queries reads."""
    sale_keys: tuple[int, ...] = (2048, 1024)
    """SALE's capacities: XLA goes through a list's static length, so all blocks would take longer than dense attention."""
    taus: tuple[float, ...] = (0.004, 0.25)
    thetas: tuple[float, ...] = (1.0, 2.0)
    """SALE calibrated to these errors on training prompts (of 2,048 tokens), from 1 down instead of the paper's 0.008."""
    data: str = os.environ.get("JAXTOK_DATA", "")
    """Where stories260K and text/ are."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """For times."""
    repeats: int = 7
    sides: tuple[str, ...] = ("full", "a_shape", "block_topk", "dhsa", "dhsa:predicted", "dhsa:a", "sale")
    out: pathlib.Path = OUT


def settings(
    keys: Sequence[int], capacities: Sequence[int], taus: Sequence[float], thetas: Sequence[float], n: int, **sizes: int
) -> dict[str, Sparsifier]:
    """label -> method; capacities: SALE's; sizes: block_q, block_k, and SALE's local and segment."""
    bq, bk, local = sizes["block_q"], sizes["block_k"], sizes["local"]
    blocks, first = {"block_q": bq, "block_k": bk}, {"sinks": bk, "local": bk}
    out: dict[str, Sparsifier] = {}
    for c in keys:
        out[f"a_shape {c}"] = AShape(local=c - bk, sinks=bk, **blocks)
        out[f"a_shape+tail {c}"] = AShape(local=c - bk, sinks=bk, tail=bq, **blocks)
        out[f"block_topk {c}"] = BlockTopK(capacity=c, sinks=bk, **blocks)
        out[f"block_topk+tail {c}"] = BlockTopK(capacity=c, sinks=bk, tail=bq, **blocks)
        out[f"vertical_slash {c}"] = VerticalSlash(verticals=c // 8, slashes=c // 8, rows=bq, sinks=bk // 2, recent=bk // 2, **blocks)
        out[f"dhsa {c}"] = DHSA(capacity=c, chunks=n // bk, tail=bq, **first, **blocks)
        for variant in ("topk", "a", "vs", "vsb"):
            out[f"dhsa:{variant} {c}"] = DHSA(capacity=c, variant=variant, tail=bq, **blocks)
    for c in capacities:
        sale: dict[str, Any] = dict(capacity=c, local=local, segment=sizes["segment"], least=0, **blocks)
        out |= {f"sale {c} tau={tau}": SALE(tau=tau, **sale) for tau in taus}
        out |= {f"sale {c} theta={theta}": SALE(**sale) for theta in thetas}
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def answer(cfg, recipe: Recipe, new: int, params, ids, live) -> jax.Array:
    tokens, layers = prefill(cfg, params, ids, live, recipe, new=new)
    return generate(cfg, params, tokens, layers, new=new).ids


def scored(o: Options, n: int, cfg, params, tokenizer, method: Sparsifier | None, learned) -> float:
    """Needles found in prompts of n tokens."""
    encode = lambda s: tokenizer.encode(s, special=False)
    depths = max(1, o.cases // 2)
    mine = [
        tasks.examples("needle", 1, length=n, encode=encode, seed=s, depth=(i + 0.5) / depths)[0]
        for s in range(-(-o.cases // depths))
        for i in range(depths)
    ][: o.cases]
    params, found = params | {"methods": {"sparsify": learned}}, []
    for at in range(0, len(mine), o.batch):
        some = mine[at : at + o.batch]
        ids, live = text.pad([encode(c.context + c.question) for c in some], n)
        said = np.asarray(answer(cfg, Recipe(sparsify=method), max(c.max_new for c in some), params, ids, live))
        for case, row in zip(some, said, strict=True):
            reply = tokenizer.decode([int(i) for i in row[: case.max_new] if i >= 0])
            found.append(tasks.string_match(reply, case.answers))
    return float(np.mean(found))


def rows(n: int, tokenizer, split: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of full length without padding, for densities (or, of the training keys, for thresholds)."""
    encode = lambda s: tokenizer.encode(s, special=False)
    mine = tasks.examples("kv_recall" if split == "train" else "needle", 2, length=n + 64, encode=encode, seed=7, split=split)
    ids = np.stack([np.asarray(encode(c.context + c.question))[-n:] for c in mine])
    return ids, np.ones(ids.shape, bool)


def measured(cfg, params, label: str, method: Sparsifier, some, training) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, what the method learned): density and error by head on the prompts `some`, thresholds found on `training`."""
    learned: dict[str, Any] = {}
    row: dict[str, Any] = {"setting": label}
    if "theta" in label:
        theta = float(label.partition("=")[2])
        whole = dataclasses.replace(method, capacity=None)
        learned = {"tau": jax.jit(lambda p, i, a: calibrate(cfg, p, i, a, whole, theta=theta, first=1.0))(params, *training)}
        row["taus"] = np.asarray(learned["tau"]).round(6).tolist()
    params = params | {"methods": {"sparsify": learned}}
    found = jax.device_get(jax.jit(lambda p, i, a: sparsity.by_head(cfg, p, i, a, method))(params, *some))
    row |= {"density": float(found.density.mean()), "error": float(found.error.mean())}
    row |= {"keys": float((found.density.mean(1) * found.keys).mean()), "lost": int(found.lost.sum())}
    return row | {"densities": found.density.round(4).tolist(), "errors": found.error.round(5).tolist()}, learned


def needles(o: Options, document: dict[str, Any], save) -> None:
    cfg, params, tokenizer = load.load(o.path)
    full = document.setdefault("full", {})
    for n in o.at:
        if str(n) not in full:
            begin = time.time()
            full[str(n)] = scored(o, n, cfg, params, tokenizer, None, {})
            console().print(f"full {n}: {full[str(n)]:.3f}, {time.time() - begin:.0f} s")
            save()
        if full[str(n)] >= 0.9:
            break
    some, training = rows(n, tokenizer, "eval"), rows(2048, tokenizer, "train")
    found = document.setdefault("rows", [])
    for label, method in settings(o.keys, o.sale_keys, o.taus, o.thetas, n, block_q=64, block_k=32, local=128, segment=128).items():
        if any(row["setting"] == label for row in found):
            continue
        begin = time.time()
        row, learned = measured(cfg, params, label, method, some, training)
        row |= {"length": n, "needle": scored(o, n, cfg, params, tokenizer, method, learned)}
        found.append(row)
        console().print(
            f"{label}: needle {row['needle']:.3f}, density {row['density']:.3f}, {row['error']:.3f}, {time.time() - begin:.0f} s"
        )
        save()


def real(o: Options, document: dict[str, Any], save) -> None:
    """stories260K at its full length, 512, on stories that it was not trained on; smaller blocks."""
    folder = pathlib.Path(o.data)
    if not o.data or not (folder / "stories260K").exists():
        console().print("no stories260K: the real checkpoint is left out; JAXTOK_DATA names the folder")
        return
    cfg, params, tokenizer = load.load(str(folder / "stories260K"))
    n = cfg.context
    every = tokenizer.encode((folder / "text" / "tinystories_valid5.txt").read_text(encoding="utf-8"))
    training = tokenizer.encode((folder / "text" / "tinystories_a.txt").read_text(encoding="utf-8"))
    cut = lambda ids: np.asarray(ids[: len(ids) // n * n][: 4 * n]).reshape(-1, n)
    some, learning = ((x, np.ones(x.shape, bool)) for x in (cut(every), cut(training)))
    found = document.setdefault("real", {"model": "stories260K", "length": n, "prompts": len(some[0]), "rows": []})["rows"]
    wanted = settings((96,), (192,), o.taus, (), n, block_q=16, block_k=8, local=16, segment=16)
    for label in sorted(wanted, key=lambda label: (not label.startswith("sale"), not label.startswith("dhsa"))):
        method = wanted[label]
        if any(row["setting"] == label for row in found):
            continue
        row, _ = measured(cfg, params, label, method, some, learning)
        console().print(f"real, {label}: density {row['density']:.3f}, error {row['error']:.3f}")
        found.append(row)
        save()


def times(o: Options) -> dict[str, list[float]]:
    """Median seconds of one layer's attention at each length, 8 query heads on 2 KV heads of 64 channels."""
    out: dict[str, list[float]] = {}
    cfg = Config(vocab=8, width=8, layers=1, heads=8, kv_heads=2, head_dim=64, hidden=8)
    for n in o.lengths:
        key = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(a, (1, h, n, 64)) for a, h in zip(key, (8, 2, 2), strict=True))
        pos = jnp.arange(n, dtype=jnp.int32)[None]
        some: dict[str, Sparsifier | None] = {
            "full": None,
            "a_shape": AShape(local=448),
            "block_topk": BlockTopK(capacity=512, sinks=64, shared=True),
            "dhsa": DHSA(capacity=512, chunks=max(8, n // 64), tail=0),
            "dhsa:predicted": DHSA(capacity=512, chunks=max(8, n // 64), tail=0, predicted=True, hidden=64),
            "dhsa:a": DHSA(capacity=512, variant="a", tail=0),
            "sale": SALE(capacity=512, least=0),
        }
        sides = {}
        for label in o.sides:
            method = some[label]
            learned = {} if method is None else method.init_params(key[0], cfg)
            run = jax.jit(lambda q, k, v, m=method, p=learned, pos=pos: sparsify.attend(m, p, 0, q, k, v, pos)[0])
            sides[label] = run.lower(q, k, v).compile()
        took: dict[str, list[float]] = {label: [] for label in sides}
        for _ in range(o.repeats + 1):
            for label, side in sides.items():
                begin = time.perf_counter()
                jax.block_until_ready(side(q, k, v))
                took[label].append(time.perf_counter() - begin)
        for label, each in took.items():
            out.setdefault(label, []).append(float(np.median(each[1:])))
        console().print(f"{n}: " + ", ".join(f"{label} {each[-1] * 1e3:.0f} ms" for label, each in out.items()))
    return out


def exponent(lengths: tuple[int, ...], seconds: list[float]) -> float:
    """Of the power of n that fits best."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def timed(o: Options, document: dict[str, Any]) -> None:
    load_before = os.getloadavg()
    took = times(o)
    crossing = lambda each: next(
        (n for i, n in enumerate(o.lengths) if all(a < b for a, b in zip(each[i:], took["full"][i:], strict=True))), None
    )
    document["times"] = {
        "lengths": o.lengths,
        "seconds": took,
        "exponent": {label: exponent(o.lengths, each) for label, each in took.items()},
        "below_dense_from": {label: crossing(each) for label, each in took.items() if label != "full"},
        "load": {"before": load_before, "after": os.getloadavg()},
        "repeats": o.repeats,
        "machine": report.machine(),
    }
    console().print({name: document["times"][name] for name in ("exponent", "below_dense_from", "load")})


def main(o: Options) -> dict[str, Any]:
    given = {k: v for k, v in dataclasses.asdict(o).items() if k in ("path", "cases")}
    document = json.loads(o.out.read_text()) if o.out.exists() else {}
    if report.clean(given) != document.get("options"):
        document = {"options": given, "machine": report.machine()} | {k: document[k] for k in ("times", "real") if k in document}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    save = lambda: report.write(o.out, document)
    if "needles" in o.parts:
        needles(o, document, save)
    if "real" in o.parts:
        real(o, document, save)
    if "times" in o.parts:
        timed(o, document)
    save()
    if "rows" in document and "times" in document:
        figures.sparsity(
            document["rows"], document["full"][str(document["rows"][0]["length"])], document["times"], o.out.with_name("figure.png")
        )
    return document


if __name__ == "__main__":
    main(tyro.cli(Options, description=(__doc__ or "").partition("\n")[0]))
