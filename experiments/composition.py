"""Tower, decoder, cache and steps reduced at once: what each adds, in one compiled program for a ragged batch.

Claim: ToMe in the tower, PyramidDrop between the decoder's layers, SnapKV on its caches and Quest in the steps are one recipe and one jit
    (embed, prefill, generate). With nothing to reduce its output is the plain model's; one compile serves three budgets.
Command: JAXTOK_DATA=... python experiments/composition.py           (the small vision-language model of the package)
         python experiments/composition.py --model random            (random weights in its shape, random pictures: no data needed)
Hardware and time: two cores of a 2.6 GHz Xeon, shared, about five minutes; `seconds` in results.json.
Expected: experiments/results/composition/{results.json,README.md}.

The recipe grows site by site. Image rows: `tower` of all patches when the tower is done, `kept` when the pruner is done (both by equal
factors from place to place); `slots` a layer and KV head; a step reads `pages` pages of `page` slots, but for the first decoder layer,
which reads everything. FLOPs and bytes are counted from the programs' jaxprs (jaxtok.evals.cost), of which batch the table takes one
sequence; bytes a step are those of the whole step, of which the weights are read in any case. XLA gathers the pages that are read, which writes and
reads them once more: on a cache as small as this one that costs more than it saves. The column "read in place" is what the step moves of its
caches with a kernel that reads pages where they lie, by the methods' own formulas (Reader.traffic, tested against such a kernel).
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtok.core.recipe import Recipe
from jaxtok.core.types import live_count
from jaxtok.decode import generate, replay
from jaxtok.evals import agreement, cost, report, stages
from jaxtok.methods import Quest, SnapKV
from jaxtok.models import blocks, decoder, vlm
from jaxtok.models.config import Config, EncoderConfig

ROOT = pathlib.Path(__file__).parents[1]
PLAIN = Recipe()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """count: questions; batch: prompts that run at once; budgets: shares of the static sizes that the one program is asked for."""

    model: str = "embedded_vlm"
    tower: str = "tome"
    pruner: str = "pyramiddrop"
    entering: float = 0.75
    kept: float = 0.5
    slots: int = 64
    window: int = 16
    pages: int = 3
    page: int = 8
    new: int = 8
    batch: int = 4
    count: int = 40
    budgets: tuple[float, ...] = (1.0, 0.75, 0.5)
    out: pathlib.Path = ROOT / "experiments/results/composition"


# --- the model and its questions -----------------------------------------------------------------------------------------


def random_model(options: Options) -> tuple[vlm.VlmConfig, Any, Any]:
    """Random weights in the shape of the small model, and random pictures under prompts of different lengths."""
    vision = EncoderConfig(
        family="clip_vision_model", width=128, layers=6, heads=4, hidden=256, image=(84, 84), patch=(7, 7), channels=1, act="quick_gelu",
        norm_eps=1e-5, stem_norm=True, patch_bias=False,
    )  # fmt: skip
    text = Config(family="qwen3", vocab=40, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, hidden=256, norm_eps=1e-6, qk_norm=True)
    cfg = vlm.VlmConfig(vision=vision, text=text, until=5, image_token=39)
    rng, n = np.random.default_rng(0), cfg.patches + 16
    words = rng.integers(8, 15, options.count)
    ids = rng.integers(0, 39, (options.count, n)).astype(np.int32)
    live = np.arange(n)[None] >= (16 - words)[:, None]
    ids[:, 11 : 11 + cfg.patches] = cfg.image_token
    live[:, 11:] = True
    images = rng.normal(size=(options.count, 1, 84, 84, 1)).astype(np.float32)
    return cfg, vlm.init(cfg, jax.random.key(0)), (images, ids, live, None)


def model_of(options: Options) -> tuple[vlm.VlmConfig, Any, Any]:
    """(cfg, params, (images, ids, live, answers or None))."""
    if options.model == "random":
        return random_model(options)
    from jaxtok.evals import digits, onlookers

    model = onlookers.of(options.model)
    asked = digits.batch(digits.load("unseen"), 2, options.count)
    return model.cfg, model.params, (asked.images, asked.ids, asked.live, asked.answer)  # type: ignore[return-value]


# --- the recipe, site by site ----------------------------------------------------------------------------------------------


def recipes(cfg: vlm.VlmConfig, options: Options, full: bool = False) -> dict[str, Recipe]:
    """What is added -> the recipe so far; `full`: at budgets that change nothing."""
    sizes = stages.Sizes.of(cfg)
    n = sizes.patches
    entering, kept = (n, n) if full else (stages.rows_of(options.entering, n), stages.rows_of(options.kept, n))
    built = stages.recipe_of([f"{options.tower}:keep={entering}", f"{options.pruner}:keep={kept}"], sizes, kept)
    slots, pages = (4 * n, 4 * n) if full else (options.slots, options.pages)
    out = {"plain": PLAIN, options.tower: Recipe(vit=built.vit)}
    out[options.pruner] = out[options.tower].replace(layers=built.layers)
    out["snapkv"] = out[options.pruner].replace(cache=SnapKV(capacity=slots, window=options.window))
    out["quest"] = out["snapkv"].replace(reader=Quest(pages=pages, block=options.page, dense_layers=1))
    return out


def budgets(cfg: vlm.VlmConfig, recipe: Recipe, share: float, words: np.ndarray) -> dict[str, Any]:
    """Traced budgets: `share` of what the recipe's static sizes leave at each place. words [b]: text rows."""
    sizes, n = stages.Sizes.of(cfg), cfg.patches
    left, vit, layers = n, [], []
    for k, method in recipe.vit:
        left = stages.rows_left(method, k, left, sizes)
        vit.append(jnp.int32(sizes.special + round(share * left)))
    for k, method in recipe.layers:
        left = stages.rows_left(method, k, left, sizes)
        layers.append(jnp.asarray(words + round(share * left), jnp.int32))
    out: dict[str, Any] = {"vit": vit, "layers": layers}
    if recipe.cache is not None:
        out["cache"] = jnp.int32(max(round(share * min(recipe.cache.slots, n + int(words.max()))), 1))
    return {site: value for site, value in out.items() if value is not None and (site == "cache" or len(value))}


def begin(cfg, recipe: Recipe, new: int, params, images, ids, live, keep):
    """Embed and prefill."""
    only = lambda *names: {name: keep[name] for name in names if name in keep} or None
    tokens = vlm.embed(cfg, params, images, ids, live, recipe, keep=only("vit"), proportional=True)
    return decoder.prefill(cfg.text, params, tokens, recipe, new=new, keep=only("layers", "cache"))


class Programs:
    """The programs of one recipe, which count their traces."""

    def __init__(self, cfg, recipe: Recipe, options: Options):
        self.cfg, self.recipe, self.new, self.traces = cfg, recipe, options.new, 0
        self.chain = jax.jit(self._chain)
        self.along = jax.jit(self._along)

    def _chain(self, params, images, ids, live, keep):
        """The whole chain: (ids [b new], first logits, live rows at the end, live slots [l b], rows without room [b])."""
        self.traces += 1
        tokens, layers = begin(self.cfg, self.recipe, self.new, params, images, ids, live, keep)
        made = generate(self.cfg.text, params, tokens, layers, self.recipe, new=self.new, eos=())
        slots = jnp.stack([live_count(part.pos[:, 0]) for (part,) in layers])
        lost = tokens.lost + sum(jnp.sum(part.kv.lost, -1) for (part,) in made.layers)
        return made.ids, decoder.logits(self.cfg.text, params, tokens.x[:, -1:])[:, 0], live_count(tokens.pos), slots, lost

    def _along(self, params, images, ids, live, keep, said):
        """Logits [new b vocab] along given ids."""
        tokens, layers = begin(self.cfg, self.recipe, self.new, params, images, ids, live, keep)
        return replay(self.cfg.text, params, tokens, layers, said, self.recipe)[0]


def counted(cfg, recipe: Recipe, options: Options, params, rows, keep) -> dict[str, float]:
    """Of one sequence of a batch: counted FLOPs and bytes, rows that enter the decoder, their mean over its layers, bytes of its caches."""
    entry = functools.partial(begin, cfg, recipe, options.new)
    prefill = cost.count(entry, params, *rows, keep)
    _, layers = jax.eval_shape(entry, params, *rows, keep)

    def step(params, token, layers):
        x, layers = decoder.step(cfg.text, params, blocks.embed(cfg.text, params, token), jnp.ones(token.shape, bool), layers, recipe)
        return decoder.logits(cfg.text, params, x), layers

    token = jax.ShapeDtypeStruct((options.batch, 1), jnp.int32)
    once = cost.count(step, params, token, layers)
    weights = sum(x.nbytes for name in ("layers", "norm", "head") for x in jax.tree.leaves(params.get(name, ())))
    weights += params["embed"].nbytes if cfg.text.tied else 0
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([part.kv for parts in layers for part in parts]))
    bare = recipe.replace(cache=None, reader=None)
    _, whole = jax.eval_shape(functools.partial(begin, cfg, bare, 0), params, *rows, {k: v for k, v in keep.items() if k != "cache"})
    wide = [part.kv.k.shape[2] for (part,) in whole]
    b, reader = options.batch, recipe.reader or Quest(pages=1, dense_layers=cfg.text.layers)  # one that reads everything
    moved = sum(sum(reader.traffic(i, cfg.text.heads, part.kv)) for i, (part,) in enumerate(layers))
    return {
        "read_in_place": moved / b,
        "entering": wide[0],
        "average": float(np.mean(wide)),
        "slots": float(np.mean([part.kv.k.shape[2] - options.new for (part,) in layers])),
        "cache_bytes": nbytes / b,
        "prefill_flops": prefill.flops / b,
        "prefill_bytes": prefill.bytes / b,
        "step_flops": once.flops / b,
        "step_bytes": once.bytes / b,
        "step_bytes_without_weights": (once.bytes - weights) / b,
    }


# --- the experiment ------------------------------------------------------------------------------------------------------


def run(options: Options) -> dict[str, Any]:
    cfg, params, (images, ids, live, answers) = model_of(options)
    b, many = options.batch, len(ids) // options.batch
    batch = lambda i: tuple(jnp.asarray(x[i * b : (i + 1) * b]) for x in (images, ids, live))
    words = lambda i: np.sum((ids != cfg.image_token) & live, -1)[i * b : (i + 1) * b]
    lengths = np.sum(live, -1)
    print(f"{many} batches of {b} prompts of {lengths.min()} to {lengths.max()} tokens, {cfg.patches} of them of the picture")
    lines, plain, reference = [], None, None
    for name, recipe in recipes(cfg, options).items():
        programs = Programs(cfg, recipe, options)
        said, first, slots, lost = [], [], [], 0
        for i in range(many):
            made, logits, _, kept, gone = jax.device_get(programs.chain(params, *batch(i), {}))
            said.append(made), first.append(logits), slots.append(kept)
            lost += int(gone.sum())
        said, first, slots = np.concatenate(said), np.concatenate(first), np.concatenate(slots, 1)
        plain = (said, first) if plain is None else plain
        target = lambda i, ids=plain[0]: jnp.asarray(ids[i * b : (i + 1) * b])
        along = np.concatenate([np.asarray(programs.along(params, *batch(i), {}, target(i))) for i in range(many)], 1)
        reference = along if reference is None else reference
        distance, same = map(np.asarray, agreement.divergence(jnp.asarray(reference), jnp.asarray(along)))
        line = {
            "recipe": name if name == "plain" else "+ " + name,
            "methods": str(recipe),
            **counted(cfg, recipe, options, params, batch(0), {}),
            "live_slots": float(slots.mean()),
            "accuracy": None if answers is None else float((first.argmax(-1) == answers[: len(first)]).mean()),
            "first_same": float((first.argmax(-1) == plain[1].argmax(-1)).mean()),
            "top1": float(same.mean()),
            "kl": float(distance.mean()),
            "lost": lost,
            "traces": programs.traces,
        }
        print(json.dumps({k: v for k, v in line.items() if k != "methods"}))
        lines.append(line)
    full = recipes(cfg, options, full=True)["quest"]
    programs, far, equal = Programs(cfg, full, options), 0.0, True
    for i in range(min(many, 5)):
        made, logits, _, _, gone = jax.device_get(programs.chain(params, *batch(i), budgets(cfg, full, 1.0, words(i))))
        far = max(far, float(np.abs(logits - plain[1][i * b : (i + 1) * b]).max()))
        along = np.asarray(programs.along(params, *batch(i), budgets(cfg, full, 1.0, words(i)), jnp.asarray(plain[0][i * b : (i + 1) * b])))
        far = max(far, float(np.abs(along - reference[:, i * b : (i + 1) * b]).max()))
        equal = equal and bool((made == plain[0][i * b : (i + 1) * b]).all())
    print(f"at full budgets: largest difference of logits to the plain model {far:.1e}, same tokens: {equal}")
    small = recipes(cfg, options)["quest"]
    programs, served = Programs(cfg, small, options), []
    for share in options.budgets:
        right, rows, kept = [], [], []
        for i in range(many):
            _, logits, end, slots, _ = jax.device_get(programs.chain(params, *batch(i), budgets(cfg, small, share, words(i))))
            right.append(logits.argmax(-1)), rows.append(end - words(i)), kept.append(slots)
        right = np.concatenate(right)
        served.append(
            {
                "share": share, "image_rows_at_the_end": float(np.concatenate(rows).mean()), "live_slots": float(np.concatenate(kept, 1).mean()),
                "accuracy": None if answers is None else float((right == answers[: len(right)]).mean()),
                "first_same": float((right == plain[1].argmax(-1)).mean()),
            }
        )  # fmt: skip
    print(f"{len(options.budgets)} budgets, {programs.traces} trace: {json.dumps(served)}")
    if not equal or far > 1e-4 or programs.traces != 1:
        raise ValueError(f"at full budgets {far:.1e} off, same tokens {equal}; {programs.traces} traces")
    return {
        "lines": lines,
        "full": {"difference": far, "same_tokens": equal},
        "budgets": served,
        "traces": programs.traces,
        "lengths": [int(lengths.min()), int(lengths.max())],
    }


def markdown(found: dict[str, Any], options: Options) -> str:
    """The table, and what was checked."""
    head = ["recipe", "rows entering", "layer average", "slots", "cache bytes", "FLOPs prefill", "FLOPs a step", "bytes a step", "but for weights", "read in place",
            "accuracy", "first token as plain", "top-1 along plain", "KL"]  # fmt: skip
    row = lambda cells: "| " + " | ".join(cells) + " |"
    out = ["# ToMe, a pruner, SnapKV and Quest in one program", "", f"Model: {options.model}; batch {options.batch}, prompts of {found['lengths'][0]} to "
           f"{found['lengths'][1]} tokens; {options.new} tokens generated. Each line adds a site; numbers are of one sequence. Rows: static, those of "
           "the decoder's first layer and the mean over its layers; slots a layer and KV head, without room for new tokens.", "", row(head),
           "|" + "---|" * len(head)]  # fmt: skip
    for r in found["lines"]:
        cells = [r["recipe"], f"{r['entering']:.0f}", f"{r['average']:.1f}", f"{r['slots']:.0f}"]
        cells += [
            report.size(r[k])
            for k in ("cache_bytes", "prefill_flops", "step_flops", "step_bytes", "step_bytes_without_weights", "read_in_place")
        ]
        out.append(row([*cells, *(report.show(r[k], 3) for k in ("accuracy", "first_same", "top1", "kl"))]))
    out += ["", f"At full budgets the whole recipe's logits are at most {found['full']['difference']:.1e} from the plain model's, along "
            f"{options.new} tokens; the tokens are the same: {'yes' if found['full']['same_tokens'] else 'no'}.", ""]  # fmt: skip
    out += [f"One program ({found['traces']} trace) at budgets given while it runs:", "", row(["budget", "image rows at the end", "live slots", "accuracy", "first token as plain"]), "|---|---|---|---|---|"]  # fmt: skip
    for r in found["budgets"]:
        out.append(row([f"{r['share']:.0%}", f"{r['image_rows_at_the_end']:.1f}", f"{r['live_slots']:.1f}", report.show(r["accuracy"], 3), report.show(r["first_same"], 3)]))  # fmt: skip
    return "\n".join(out) + "\n"


def main(options: Options) -> None:
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    found = run(options)
    settings = dataclasses.asdict(options) | {"out": options.out.name}
    document = {"options": settings, "machine": report.machine(), "seconds": round(time.perf_counter() - start, 1), **found}
    report.write(options.out / "results.json", document)
    (options.out / "README.md").write_text(markdown(found, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
