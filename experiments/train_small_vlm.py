"""Train the small vision-language model that ships inside the package (jaxtok/models/embedded_vlm).

Claim: a LLaVA of 1.3M parameters (tower, projector, GQA decoder) learns on one CPU core in about an hour to answer questions about the places
    of handwritten digits that it was never trained on.
Command: JAXTOK_DATA=... python experiments/train_small_vlm.py
         JAXTOK_DATA=... python experiments/train_small_vlm.py --evaluate   (the tables of results/small_vlm/eval.json)
    with XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" for one core.
Hardware and time: one core of a 2.6 GHz Xeon, shared with other work, 71 minutes.
Expected: 98.5% of 1,000 prompts about digits never trained on; 22% without the question, 12% without the picture.
Killed and started again, it goes on from its last checkpoint (results/small_vlm/checkpoints, not committed).

Stage 0 trains the tower on views of 4 x 4 patches around a digit, with their places in the canvas: what covers each patch, and of the class row
which digits are there (on whole canvases a patch took long to find the others of its digit). Stage 1 trains the tower on whole canvases, with
more labels: of each patch the classes of the digits right and left of its own, and whether its own is nearest to a corner. Stage 2 adds projector and decoder: six questions a
canvas, each of which sees the picture and itself (the same as six prompts); the dense loss stays at a smaller weight. The heads of the dense
labels are thrown away. At the end the rate falls in a line to 0.
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
import optax
import tokenizers
import tyro

from jaxtok.evals import digits
from jaxtok.models import blocks, encoder, load, vlm
from jaxtok.models.config import Config, EncoderConfig
from jaxtok.models.text import JsonTokenizer
from jaxtok.train import checkpoint, figures
from jaxtok.train.loop import fit

ROOT = pathlib.Path(__file__).parents[1]
CFG = vlm.VlmConfig(
    vision=EncoderConfig(
        family="clip_vision_model", width=128, layers=5, heads=4, hidden=256, image=(digits.SIDE, digits.SIDE), patch=(digits.PATCH, digits.PATCH), channels=1,
        act="quick_gelu", norm_eps=1e-5, stem_norm=True, patch_bias=False, out_bias=False,
    ),
    text=Config(
        family="qwen3", vocab=len(digits.WORDS), width=128, layers=4, heads=4, kv_heads=2, head_dim=32, hidden=256, norm_eps=1e-6,
        qk_norm=True, bos=digits.IDS["<s>"], eos=(digits.END,),
    ),
    until=4,
    image_token=digits.IMAGE_TOKEN,
)  # fmt: skip
HEADS = {"class": 11, "right": 11, "left": 11, "corner": 4}  # of each patch; 10 = none
VIEW, VIEWS = 4, 7  # patches of a side of a view, views of a canvas
PLACES, RELATIONS = 3, 3  # questions a canvas
VALIDATION = 300  # of the 4,000 digits: never trained on, to watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """steps updates on canvases with `least` digits or more."""

    steps: int
    kind: str  # "views", "tower" or "whole"
    least: int
    patches: int = digits.GRID**2  # that the tower sees: those that digits cover and others by chance
    batch: int = 32  # canvases
    dense: float = 1.0  # weight of the loss of the dense labels


STAGES = (
    Stage(steps=700, kind="views", least=VIEWS, patches=VIEW**2),
    Stage(steps=300, kind="tower", least=6),
    Stage(steps=1500, kind="tower", least=6, patches=72),
    Stage(steps=2400, kind="whole", least=4, patches=72, dense=0.5),
    Stage(steps=300, kind="whole", least=4, dense=0.3),
)
FALL = 1500  # updates at the end in which the rate falls


# --- batches ----------------------------------------------------------------------------------------------------------

_HEAD = digits.encode(digits.HEAD)
_TAIL = digits.encode(digits.TAIL)
_PLACE = len(digits.encode("which digit is nearest the top left corner ?")) + len(_TAIL) + 1  # with the answer
_RELATION = len(digits.encode("which digit is right of the 7 ?")) + len(_TAIL) + 1
LENGTHS = [_PLACE] * PLACES + [_RELATION] * RELATIONS
ASKS = np.cumsum(LENGTHS) - 2  # where, behind the picture, the answer is said


def visible(patches: int) -> np.ndarray:
    """see [n n] of a row of training: text and picture, then questions that see these and themselves."""
    part = np.repeat(np.arange(len(LENGTHS) + 1), [len(_HEAD) + patches, *LENGTHS])
    order = np.arange(len(part))
    return (order[:, None] >= order[None]) & ((part[None] == 0) | (part[:, None] == part[None]))


def views(c: digits.Canvases, images: np.ndarray, which: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Views of VIEW x VIEW patches, each with the box of a digit wholly inside; patches of digits that are cut off have no label (-1)."""
    box, side = c.box[:, :VIEWS], VIEW * digits.PATCH
    low = np.maximum(-(-(box[..., 2:] - side) // digits.PATCH), 0)
    high = np.minimum(box[..., :2] // digits.PATCH, digits.GRID - VIEW)
    first = low + (rng.random(low.shape) * (high - low + 1)).astype(int)  # [b v 2] row and column of the first patch
    inside = (
        (c.box[:, None, :, :2] >= digits.PATCH * first[:, :, None]) & (c.box[:, None, :, 2:] <= digits.PATCH * first[:, :, None] + side)
    ).all(-1)
    inside &= (c.label >= 0)[:, None]  # [b v 9]
    steps = np.arange(VIEW)
    at = (first[..., 0, None, None] + steps[:, None]) * digits.GRID + first[..., 1, None, None] + steps[None]
    at = at.reshape(*at.shape[:2], -1)  # [b v p]
    row = np.arange(len(box))[:, None, None]
    mine = which[row, at]
    whole = np.take_along_axis(inside, np.maximum(mine, 0), 2)
    pixel = np.arange(side)
    y, x = (digits.PATCH * first[..., k, None] + pixel for k in (0, 1))
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    return {
        "images": flat(images[row[..., None], y[..., :, None], x[..., None, :]]),
        "at": flat(at).astype(np.int32),
        "class": flat(np.where(mine < 0, 10, np.where(whole, label[row, at], -1))).astype(np.int32),
        "counts": flat(np.minimum((inside[..., None] & (c.label[:, None, :, None] == np.arange(10))).sum(2), 2)).astype(np.int32),
    }


def batch_of(source: digits.Digits, seed: int, step: int, stage: Stage) -> dict[str, np.ndarray]:
    """The batch of a step, a function of (seed, step, stage)."""
    n, rng = stage.batch, np.random.default_rng((seed, step, stage.batch))
    c = digits.canvases(source, [(seed, step, i) for i in range(n)], least=stage.least, bend=1.0)
    patch = digits.cover(c.box) & (c.label >= 0)[..., None, None]
    which = np.where(patch.any(1), patch.argmax(1), -1).reshape(n, -1)  # of each patch its digit
    of = lambda table: np.where(which < 0, 10, np.take_along_axis(table, np.maximum(which, 0), 1)).astype(np.int32)
    images = digits.normalised(c.pixels)[:, 0]
    if stage.kind == "views":
        return views(c, images, which, of(c.label), rng)
    beside, nearest = digits.beside(c), digits.nearest(c)
    name = lambda k: np.where(k < 0, np.where(k == -1, 10, -1), np.take_along_axis(c.label, np.maximum(k, 0), 1))  # -1: unclear
    corner = np.where(nearest[:, None] < 0, -1, which[..., None] == nearest[:, None])
    labels = {"class": of(c.label), "right": of(name(beside[..., 0])), "left": of(name(beside[..., 1]))}
    labels["corner"] = np.where((which < 0)[..., None], 0, corner).astype(np.int32)
    if stage.patches < digits.GRID**2:
        at = np.argsort(rng.random(which.shape) + (which < 0), axis=1, kind="stable")[:, : stage.patches]
        at = np.sort(at, 1).astype(np.int32)
    else:
        at = np.tile(np.arange(digits.GRID**2, dtype=np.int32), (n, 1))
    labels = {k: np.take_along_axis(v, at if v.ndim == 2 else at[..., None], 1) for k, v in labels.items()}
    counts = np.minimum((c.label[..., None] == np.arange(10)).sum(1), 2).astype(np.int32)
    out = {"images": images, "at": at, "counts": counts} | labels
    if stage.kind == "tower":
        return out
    repack = rng.random((n, 1)) < 0.5  # positions in the decoder: of the grid, or those of the rows that are left
    place = np.where(repack, np.arange(stage.patches), at)
    behind = np.where(repack, stage.patches, digits.GRID**2)
    lead = len(_HEAD)
    own = np.concatenate([np.arange(k) for k in LENGTHS])
    first = np.tile(np.arange(lead), (n, 1))
    out["pos"] = np.concatenate([first, lead + place, lead + behind + own], 1).astype(np.int32)
    ids, weight = np.zeros((n, lead + sum(LENGTHS)), np.int32), np.zeros((n, len(LENGTHS)), np.float32)
    for i, kinds in enumerate(digits.questions(c)):
        row, slot = list(_HEAD), 0
        for asked, many, length in zip(kinds, (PLACES, RELATIONS), (_PLACE, _RELATION), strict=True):
            picked = rng.permutation(len(asked))[:many]
            for j in range(many):
                if j < len(picked):
                    text, _, it = asked[picked[j]]
                    row += [*digits.encode(text), *_TAIL, digits.IDS["0"] + c.label[i, it]]
                    weight[i, slot] = 1
                else:
                    row += [0] * length
                slot += 1
        ids[i] = row
    return out | {"ids": ids, "weight": weight}


# --- losses -----------------------------------------------------------------------------------------------------------


def embed(p, images, at):
    """Rows of views, or of some patches of canvases, which stand at the places `at` [b n] of the grid: what `vit.embed` makes of a canvas."""
    b, side, (size, _) = images.shape[0], images.shape[1] // digits.PATCH, CFG.vision.patch
    cut = images.reshape(b, side, size, side, size).transpose(0, 1, 3, 2, 4).reshape(b, side * side, size * size)
    if at.shape[1] < side * side:
        cut = jnp.take_along_axis(cut, at[..., None], 1)
    rows = encoder.linear(p, "patch", cut) + p["pos"][1 + at]
    lead = jnp.broadcast_to((p["cls"] + p["pos"][0])[None, None], (b, 1, rows.shape[2]))
    return encoder.norm(CFG.vision, p, "stem_norm", jnp.concatenate([lead, rows], 1))


def tower(params, images, at):
    """Patch rows after CFG.until layers [b n c], class row after all [b c]."""
    cfg, p = CFG.vision, params["vision"]
    rows = embed(p, images[..., 0], at)
    for i in range(cfg.layers):
        layer = p["layers"][i]
        y = encoder.before(cfg, layer, rows)
        last = i == CFG.until
        q = encoder.heads(cfg, encoder.linear(layer, "q", y[:, :1] if last else y))  # of the last layer the class row is all that is read
        k, v = (encoder.heads(cfg, encoder.linear(layer, n, y)) for n in "kv")
        weight = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q * cfg.head_dim**-0.5, k), -1)
        out = jnp.einsum("bhqk,bhkd->bhqd", weight, v).transpose(0, 2, 1, 3).reshape(*q.shape[:1], q.shape[2], -1)
        x = encoder.join(cfg, layer, rows[:, :1] if last else rows, encoder.linear(layer, "o", out), 1)
        x = encoder.join(cfg, layer, x, encoder.mlp(cfg, layer, encoder.norm(cfg, layer, "norm2", x)), 2)
        if last:
            return rows[:, 1:], encoder.norm(cfg, p, "norm", x)[:, 0]
        rows = x
    raise AssertionError


def dense(params, batch, rows, first):
    """Loss and accuracies of the labels of the patches and of the class row."""
    mean = lambda x, mask: jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
    y = rows - jnp.mean(rows, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
    z = encoder.linear(params["heads"], "patch", y)
    on, off = (jnp.float32(x) for x in ((batch["class"] >= 0) & (batch["class"] < 10), batch["class"] == 10))
    loss, metrics, at = jnp.zeros(()), {}, 0
    for name, n in HEADS.items():
        part, want = z[..., at : at + n], batch.get(name)
        at += n
        if want is None:
            continue
        if name == "corner":
            known = (want >= 0).astype(jnp.float32)
            nll = optax.sigmoid_binary_cross_entropy(part, jnp.maximum(want, 0).astype(jnp.float32))
            loss += mean(nll, known * on[..., None]) + 0.1 * mean(nll, known)
            metrics["patch_corner"] = mean(((part > 0) == (want > 0)).astype(jnp.float32), known * on[..., None])
            continue
        nll = optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(want, 0))
        known = (want >= 0).astype(jnp.float32)
        loss += mean(nll, known * on) + (0.5 * mean(nll, known * off) if name == "class" else 0.0)
        metrics["patch_" + name] = mean((jnp.argmax(part, -1) == want).astype(jnp.float32), known * on)
    counts = encoder.linear(params["heads"], "cls", first).reshape(-1, 10, 3)
    loss += optax.softmax_cross_entropy_with_integer_labels(counts, batch["counts"]).mean()
    metrics["counts"] = jnp.mean((jnp.argmax(counts, -1) == batch["counts"]).astype(jnp.float32))
    return loss, metrics


def tower_loss(params, batch, key):
    return dense(params, batch, *tower(params, batch["images"], batch["at"]))


def whole_loss(share, params, batch, key):
    cfg, p = CFG.text, params["projector"]
    rows, first = tower(params, batch["images"], batch["at"])
    aux, metrics = dense(params, batch, rows, first)
    seen = encoder.linear(p, "down", encoder.act(CFG.act, encoder.linear(p, "up", rows)))
    x, lead = blocks.embed(cfg, params, batch["ids"]), len(_HEAD)
    x = jnp.concatenate([x[:, :lead], seen, x[:, lead:]], 1)
    at, see = batch["pos"], visible(rows.shape[1])
    for i, layer in enumerate(params["layers"]):
        q, k, v = blocks.qkv(cfg, layer, x)
        q, k = blocks.rotate(cfg, i, q, at), blocks.rotate(cfg, i, k, at)
        q = q.reshape(q.shape[0], cfg.kv_heads, -1, *q.shape[2:]) * cfg.head_dim**-0.5
        z = jnp.where(see[None, None, None], jnp.einsum("bgrqd,bgkd->bgrqk", q, k), -1e9)
        out = jnp.einsum("bgrqk,bgkd->bgrqd", jax.nn.softmax(z, -1), v)
        x = blocks.mlp(cfg, layer, blocks.out_proj(cfg, layer, x, out.reshape(out.shape[0], cfg.heads, *out.shape[3:])))
    ask = lead + rows.shape[1] + ASKS
    want = batch["ids"][:, lead + ASKS + 1]
    z = blocks.logits(cfg, params, jnp.concatenate([x[:, ask], x[:, ask + 1]], 1))
    k = len(ask)
    nll = optax.softmax_cross_entropy_with_integer_labels(z[:, :k], want)
    end = optax.softmax_cross_entropy_with_integer_labels(z[:, k:], jnp.full((*z.shape[:1], k), digits.END))
    right = (jnp.argmax(z[:, :k], -1) == want).astype(jnp.float32)
    mean = lambda x, w: jnp.sum(x * w) / jnp.maximum(jnp.sum(w), 1.0)
    w = batch["weight"]
    metrics |= {
        "answer": mean(right, w),
        "place": mean(right[:, :PLACES], w[:, :PLACES]),
        "relation": mean(right[:, PLACES:], w[:, PLACES:]),
    }
    return mean(nll + 0.1 * end, w) + share * aux, metrics


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """Train the small vision-language model, write that of a checkpoint, or evaluate it as shipped."""

    evaluate: bool = False
    export: bool = False  # write the model of the newest checkpoint, wherever the training stands
    seed: int = 0
    rate: float = 1.2e-3  # peak learning rate
    count: int = 1000  # prompts of --evaluate
    out: pathlib.Path = ROOT / "experiments" / "results" / "small_vlm"
    model: pathlib.Path = ROOT / "jaxtok" / "models" / "embedded_vlm"


def sources() -> tuple[digits.Digits, digits.Digits]:
    """The 4,000 digits of training without those to watch, and these."""
    all_ = digits.load("train")
    cut = len(all_.label) - VALIDATION
    order = np.random.default_rng(0).permutation(len(all_.label))
    take = lambda i: digits.Digits(all_.image[i], all_.label[i])
    return take(order[:cut]), take(order[cut:])


def waves(grid: tuple[int, int], c: int) -> np.ndarray:
    """Positions to begin with [rows*cols c]: sines and cosines of the row in one half of the channels, of the column in the other."""
    turns = np.arange(max(grid))[:, None] * 2 * np.pi / np.geomspace(3, 2 * max(grid), c // 4)
    one = np.concatenate([np.sin(turns), np.cos(turns)], 1)
    y, x = np.indices(grid).reshape(2, -1)
    return np.concatenate([one[y], one[x]], 1).astype(np.float32)


def init(seed: int) -> Any:
    params = vlm.init(CFG, jax.random.key(seed))
    # with positions of std 0.02 the patches of a digit did not find one another
    params["vision"]["pos"] = params["vision"]["pos"].at[1:].set(0.7 * waves(CFG.vision.grid, CFG.vision.width))
    # embeddings of std 0.5, and norms of q and k above 1: heads can tell tokens apart from the start
    params["embed"] = 0.5 * jax.random.normal(jax.random.key(seed + 1), params["embed"].shape)
    params["layers"] = tuple(p | {k: 1.4 * p[k] for k in ("q_norm", "k_norm")} for p in params["layers"])
    wide = CFG.vision.width
    draw = lambda k, n: wide**-0.5 * jax.random.normal(jax.random.key(seed + k), (wide, n))
    heads = {
        "patch": draw(2, sum(HEADS.values())),
        "patch_bias": jnp.zeros(sum(HEADS.values())),
        "cls": draw(3, 30),
        "cls_bias": jnp.zeros(30),
    }
    return params | {"heads": heads}


def train(args: Args) -> None:
    steps = sum(stage.steps for stage in STAGES)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, args.rate, 150),
            optax.constant_schedule(args.rate),
            optax.linear_schedule(args.rate, 0.0, FALL),
        ],
        [150, steps - FALL],
    )
    matrices = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05, mask=matrices))
    params = init(args.seed)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters with those of the dense labels, {steps} steps", flush=True)
    source, watched = sources()
    start = time.time()

    def on_log(line: dict[str, float]) -> None:
        if line["step"] % 50 == 0:
            print({k: round(v, 3) for k, v in line.items()}, flush=True)

    losses = {stage.dense: functools.partial(whole_loss, stage.dense) for stage in STAGES}
    state, first = None, 0
    for stage in STAGES:
        loss_fn = losses[stage.dense] if stage.kind == "whole" else tower_loss
        check, end = jax.jit(lambda p, b, f=loss_fn: f(p, b, None)[1]), first + stage.steps
        for stop in [*range(first, end, 250)[1:], end]:
            before = None if state is None else int(state.step)
            state = fit(
                loss_fn, params if state is None else None, lambda s, stage=stage: batch_of(source, args.seed, s, stage), optimizer=optimizer, steps=stop,
                state=state, seed=args.seed, directory=args.out / "checkpoints", save_every=100, log_every=10, on_log=on_log, progress=False,
            )  # fmt: skip
            if int(state.step) == stop != before:
                seen = [jax.device_get(check(state.params, batch_of(watched, args.seed + 1000, i, stage))) for i in range(6)]
                mean = {k: round(float(np.mean([m[k] for m in seen])), 4) for k in seen[0]}
                print(f"watched digits after {stop}:", json.dumps(mean), f"{time.time() - start:.0f} s", flush=True)
        first = end
    ship(args, state.params)


def ship(args: Args, params: Any) -> None:
    metrics = args.out / "metrics.jsonl"
    metrics.write_bytes((args.out / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, args.out / "curves.png", ("loss", "patch_class"), smooth=15)
    load.save(args.model, CFG, {k: v for k, v in params.items() if k != "heads"}, tokenizer())
    print(f"wrote {args.model}", flush=True)


def tokenizer() -> JsonTokenizer:
    """Words apart by blanks; those in brackets stand for themselves anywhere."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=digits.IDS, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([w for w in digits.WORDS if w.startswith("<")])
    return JsonTokenizer(inner)


# --- evaluation -------------------------------------------------------------------------------------------------------


def interval(hits: np.ndarray) -> dict[str, float]:
    """Share of hits with its 95% interval (Wilson), and how many there were."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / 4 / n**2) ** 0.5 / (1 + z * z / n)
    return {"share": round(p, 4), "low": round(middle - half, 4), "high": round(middle + half, 4), "n": n}


def blind(b: digits.Batch, kind: str) -> digits.Batch:
    """The prompts with something taken away or exchanged; the answers stay."""
    n = len(b.ids)
    other = np.roll(np.arange(n), n // 4 * 2 + 2)  # places stay places
    differs = lambda i, j: (b.ids[i] != b.ids[j]).any()
    asked = np.array([next((j for j in (i + np.arange(2, n, 2)) % n if differs(i, j)), i) for i in range(n)])
    words = (b.ids != digits.IMAGE_TOKEN) & (np.cumsum(b.ids == digits.IMAGE_TOKEN, 1) > 0)
    words[:, -len(_TAIL) :] = False
    return {
        "no question": b._replace(live=b.live & ~words),
        "another question": b._replace(ids=b.ids[asked], live=b.live[asked]),
        "no picture": b._replace(images=np.full_like(b.images, -digits.MEAN / digits.STD)),
        "another picture": b._replace(images=b.images[other]),
    }[kind]


def priors(source: digits.Digits, b: digits.Batch) -> dict[str, float]:
    """What can be had without the model: a constant, a constant for each question, and who knows all digits but not the question."""
    many = digits.batch(source, 99, 8000)
    key = lambda x, i: tuple(x.ids[i][x.ids[i] != digits.IMAGE_TOKEN])
    table: dict[tuple, list[int]] = {}
    for i in range(len(many.ids)):
        table.setdefault(key(many, i), []).append(int(many.answer[i]))
    top = lambda answers: int(np.bincount(answers).argmax())
    constant, best = top(many.answer), {k: top(v) for k, v in table.items()}
    oracle = []
    for kinds, label in zip(digits.questions(digits.Canvases(b.images[:, 0, :, :, 0], b.label, b.box)), b.label, strict=True):
        votes = np.zeros(10)
        for asked in filter(None, kinds):
            np.add.at(votes, [label[it] for _, _, it in asked], 1 / len(asked) / sum(map(bool, kinds)))
        oracle.append(votes.max())
    return {
        "constant": round(float(np.mean(b.answer == constant)), 4),
        "constant of each question": round(float(np.mean([best.get(key(b, i), constant) == b.answer[i] for i in range(len(b.ids))])), 4),
        "all digits known but not the question": round(float(np.mean(oracle)), 4),
        "a random digit of the canvas": round(float(np.mean([(label[label >= 0] == a - digits.IDS["0"]).mean() for label, a in zip(b.label, b.answer, strict=True)])), 4),
    }  # fmt: skip


def evaluate(args: Args) -> dict[str, Any]:
    cfg, params, _ = load.load_vlm(args.model)
    b = digits.batch(digits.load("unseen"), 7, args.count)
    hits = digits.right(cfg, params, b)
    number = (b.label >= 0).sum(1)
    out: dict[str, Any] = {"digits": "unseen (every fifth of the 5,000)", "all": interval(hits)}
    out |= {"place": interval(hits[~b.relation]), "relation": interval(hits[b.relation])}
    out["by number of digits"] = {str(k): interval(hits[number == k]) for k in range(4, 10)}
    for kind in ("no question", "another question", "no picture", "another picture"):
        out[kind] = interval(digits.right(cfg, params, blind(digits.Batch(*(x[:1000] for x in b)), kind)))
    out["priors"] = priors(digits.load("train"), b)
    out["digits of training"] = interval(digits.right(cfg, params, digits.batch(digits.load("train"), 8, min(args.count, 1000))))
    out["bytes"] = sum(f.stat().st_size for f in args.model.iterdir())
    return out


def report(args: Args) -> None:
    out = evaluate(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "eval.json").write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.export:
        ship(args, checkpoint.load(args.out / "checkpoints", init(args.seed)))
    elif args.evaluate:
        report(args)
    else:
        train(args)
