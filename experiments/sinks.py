"""Which heads of a model sink into the first token, on which kind of text, and what the loss says when a head is taken away.

Claim: none of the paper's is repeated (its models have billions of parameters). This shows, for two small models, the numbers that the
    paper looks at: sink mass, entropies, value drain, residual peak, and the rise of the loss when a head attends to nothing or to the
    first token alone. A head that is dormant loses nothing by the latter.
Command: JAXTOK_DATA=... python experiments/sinks.py        (results.json and a figure a model in experiments/results/sinks)
    For a model and texts of yours: --models DIR --texts a.txt b.txt
Hardware and time: one core of a 2.6 GHz Xeon; `seconds` in results.json.
Expected: models this small have no sinks to speak of: no head of stories260K gives bos a tenth of its attention on stories; on DNA, which
    it never saw, one head gives it 31% (and 7% on stories: active there, half asleep here). No head is dormant, so none may stream.

Windows of a text begin anywhere, with bos where the tokenizer has one. "dormant" counts sequences: row entropy under `below`, column
entropy over `above`, sink mass `mass` or more. Entropies alone (`mass` 0, as the paper has it) would call many heads of these models
dormant that look at their neighbours.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from jaxtok.cli.common import console
from jaxtok.core import heads
from jaxtok.evals import figures, report
from jaxtok.models import diagnose, load

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """length: tokens of a window; count: windows of each text; below, above, mass: of dormant heads; least: of `sinks_needed`."""

    models: tuple[str, ...] = ("embedded", "stories260K")
    texts: tuple[str, ...] = ("tinystories_a.txt", "tinyshakespeare.txt", "dna_chloroplast_NC_000932.txt")
    length: int = 256
    count: int = 8
    below: float = 0.5
    above: float = 0.8
    mass: float = 0.3
    least: float = 0.1
    out: pathlib.Path = ROOT / "experiments/results/sinks"


def find(name: str, folder: str) -> str:
    """A file or folder as named, or of the shared data."""
    path = pathlib.Path(os.environ.get("JAXTOK_DATA") or ROOT / "data") / folder / name
    return str(path) if path.exists() else name


def windows(tokenizer, text: str, options: Options) -> np.ndarray:
    """i32 [count length]: evenly over the text, each from a word on."""
    out = []
    for i in range(options.count):
        start = text.find(" ", i * (len(text) - 12 * options.length) // options.count) + 1
        out.append(tokenizer.encode(text[start : start + 12 * options.length], special=True)[: options.length])
    return np.asarray(out, np.int32)


def run(name: str, options: Options) -> dict:
    """One model on all texts."""
    cfg, params, tokenizer = load.load(find(name, "") if name != load.EMBEDDED else name)
    look = jax.jit(functools.partial(diagnose.diagnose, cfg))
    change = jax.jit(functools.partial(diagnose.effects, cfg))
    bounds = {"below": options.below, "above": options.above, "least": options.mass}
    screen, panels, out = console(), [], {}
    for file in options.texts:
        ids = jnp.asarray(windows(tokenizer, pathlib.Path(find(file, "text")).read_text(), options))
        found, moved = look(params, ids), change(params, ids)
        asleep = jnp.mean(diagnose.dormant(found, **bounds).astype(jnp.float32), 1)
        full = diagnose.full_heads(found, **bounds)
        mean = lambda x: np.round(np.mean(np.asarray(x), 1), 4).tolist()
        out[file] = {
            **{field: mean(getattr(found, field)) for field in ("row", "column", "mass", "share", "drain", "peak")},
            "loss": float(jnp.mean(found.loss)),
            "dormant": np.round(np.asarray(asleep), 4).tolist(),
            "rise_zero": np.round(np.mean(np.asarray(moved.zero), -1), 4).tolist(),
            "rise_first": np.round(np.mean(np.asarray(moved.first), -1), 4).tolist(),
            "sinks_needed": diagnose.sinks_needed(found, options.least),
            "heads": heads.split(full).sizes,
        }
        panels.append((f"{name}: {pathlib.Path(file).stem[:16]}", out[file]["mass"]))
        table = Table(title=f"{name} on {file}: loss {out[file]['loss']:.3f}, sinks needed {out[file]['sinks_needed']}")
        for column in ("layer", "sink mass by head", "dormant", "rise if zero", "rise if all on the first", "value drain", "residual peak"):
            table.add_column(column)
        show = lambda row: " ".join(f"{x:.2f}" for x in row)
        for i in range(cfg.layers):
            per_head = [show(out[file][field][i]) for field in ("mass", "dormant", "rise_zero", "rise_first", "drain")]
            table.add_row(str(i), *per_head, f"{out[file]['peak'][i]:.2f}")
        screen.print(table)
    figures.sinks(panels, options.out / f"{pathlib.Path(name).stem}.png")
    return out


def main(options: Options) -> None:
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {name: run(name, options) for name in options.models}
    document = {"options": json.loads(json.dumps(dataclasses.asdict(options) | {"out": options.out.name})), "machine": report.machine()}
    report.write(options.out / "results.json", document | {"seconds": round(time.perf_counter() - start, 1), "results": results})


if __name__ == "__main__":
    main(tyro.cli(Options))
