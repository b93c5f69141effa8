"""Train the character model that ships inside the package (jaxtok/models/embedded), and its draft a quarter the size.

Claim: a 3-layer GQA decoder of 0.47M parameters learns in half an hour on one CPU core to retrieve from text that it was
    never trained on.
Command: JAXTOK_DATA=... python experiments/train_embedded.py            (then again with --draft)
         JAXTOK_DATA=... python experiments/train_embedded.py --evaluate  (the table of results/embedded/eval.json)
    with XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" for one core.
Hardware and time: one core of a 2.6 GHz Xeon, 30 minutes (2,690 updates of 4,096 characters, 3 to 10 thousand a second); the
    draft 25 minutes on half a core.
Expected: needle, multi_key and kv_recall 99.5% or more and multi_query 98% or more up to 1,024 characters; at 4,096 see the card.

Killed and started again, it goes on from its last checkpoint (results/embedded/<name>/checkpoints, not committed).

What made it learn, in the order of the curriculum: streams of pairs in which keys recur (a loss at each recurrence, so that a
row of 128 characters holds many questions), the number of different pairs growing; then facts in real text and lists of
pairs with the questions at the end, at growing lengths. Jumps in the positions show short rows the distances of long ones.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro

from jaxtok.evals import tasks, wording
from jaxtok.models import blocks, load
from jaxtok.models.config import Config
from jaxtok.models.text import JsonTokenizer
from jaxtok.ops.attention import attention
from jaxtok.train import figures
from jaxtok.train.loop import fit

ROOT = pathlib.Path(__file__).parents[1]
CHARS = "\n" + "".join(map(chr, range(32, 127)))  # ids 1..96; 0 = U+FFFD stands for every other character
TEXT, FORM, ANSWER = 0.1, 0.02, 1.0  # weights of the loss: running text, keys and wording, answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """steps updates on `batch` rows of `length` characters with up to `pairs` (at the start, at the end) facts, and shares of the kinds."""

    steps: int
    length: int
    batch: int
    pairs: tuple[int, int]
    kinds: tuple[float, float, float]  # stream of recurring pairs, facts in text, list of pairs
    joint: float = 0.0  # share of questions that ask several keys at once (with it, facts of one key too): only once pairs are matched
    dense: bool = False  # lists hold the upper half of `pairs`, not any number up to it
    jump: int = 0  # positions jump by up to this, once to thrice in a row


CURRICULUM = (
    Stage(steps=600, length=128, batch=32, pairs=(2, 8), kinds=(0.7, 0.15, 0.15)),
    Stage(steps=550, length=256, batch=16, pairs=(6, 20), kinds=(0.25, 0.4, 0.35), joint=0.3, jump=512),
    Stage(steps=450, length=512, batch=8, pairs=(12, 42), kinds=(0.15, 0.45, 0.4), joint=0.4, jump=1500),
    Stage(steps=320, length=1024, batch=4, pairs=(20, 85), kinds=(0.1, 0.45, 0.45), joint=0.4, jump=1500),
    Stage(steps=150, length=2048, batch=2, pairs=(40, 170), kinds=(0.0, 0.5, 0.5), joint=0.3, jump=1000),
    Stage(steps=150, length=4096, batch=1, pairs=(150, 341), kinds=(0.0, 0.4, 0.6), joint=0.3),
)
# Short rows again, with more joint questions, at a third of the rate: the long rows had cost them.
FINISH = (
    Stage(steps=100, length=256, batch=16, pairs=(2, 20), kinds=(0.1, 0.5, 0.4), joint=0.6),
    Stage(steps=120, length=512, batch=8, pairs=(2, 42), kinds=(0.1, 0.5, 0.4), joint=0.6, jump=1000),
    Stage(steps=100, length=1024, batch=4, pairs=(2, 85), kinds=(0.0, 0.5, 0.5), joint=0.6, jump=1500),
    Stage(steps=40, length=4096, batch=1, pairs=(100, 341), kinds=(0.0, 0.4, 0.6), joint=0.5),
)
# And long lists again, now as full as a row holds, at a fifth of the rate.
LAST = (Stage(steps=110, length=4096, batch=1, pairs=(370, 385), kinds=(0.0, 0.3, 0.7), joint=0.3, dense=True),)
BIG = Config(family="qwen3", vocab=97, width=128, layers=3, heads=4, kv_heads=2, head_dim=32, hidden=256, context=4096, norm_eps=1e-6,
             rope_theta=1e6, qk_norm=True)  # fmt: skip
DRAFT = dataclasses.replace(BIG, width=64, head_dim=16, hidden=128)


# --- text and tokens --------------------------------------------------------------------------------------------------

_IDS = np.zeros(128, np.int32)
_IDS[[ord(c) for c in CHARS]] = np.arange(1, len(CHARS) + 1)


def encode(text: str) -> np.ndarray:
    """Ids i32 [n]: what the shipped tokenizer makes of the text."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return _IDS[np.where(codes < 127, codes, 0)]


def tokenizer() -> JsonTokenizer:
    """One token a character; anything but printable ASCII and the newline becomes U+FFFD."""
    vocab = {"\ufffd": 0} | {c: i + 1 for i, c in enumerate(CHARS)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="\ufffd", fuse_unk=False))
    inner.decoder = tokenizers.decoders.Fuse()
    return JsonTokenizer(inner)


@functools.cache
def books() -> tuple[str, str, str]:
    """Moby Dick (Project Gutenberg 2701) with its lines as printed, the same unwrapped, and its last 100,000 characters (held out)."""
    where = pathlib.Path(os.environ.get("JAXTOK_DATA") or ROOT / "data") / "text" / "moby_dick.txt"
    if not where.is_file():
        raise SystemExit(f"needs {where}: point JAXTOK_DATA to the shared data folder")
    text = where.read_text("utf-8-sig")
    for a, b in (("\u201c", '"'), ("\u201d", '"'), ("\u2018", "'"), ("\u2019", "'"), ("\u2014", "--"), ("\r", "")):
        text = text.replace(a, b)
    text = text[text.index("Call me Ishmael") : text.rindex("End of Project Gutenberg")]
    text, held = text[:-100_000], text[-100_000:]
    unwrap = lambda t: re.sub(" +", " ", re.sub(r"(?<!\n)\n(?!\n)", " ", t).replace("\n\n", "\n"))
    return re.sub(r"\n\n+", "\n", text), unwrap(text), unwrap(held)


def excerpt(rng: np.random.Generator, n: int) -> str:
    """n characters of the training text from a random place on, wrapped or not."""
    text = books()[int(rng.integers(2))]
    start = int(rng.integers(0, len(text) - n - 1))
    return text[start : start + n]


# --- training rows ----------------------------------------------------------------------------------------------------

SHORT = wording.TEMPLATES["short"]
Row = list[tuple[str, float]]  # pieces of text, each with the weight of its loss


def pairs_of(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """n different training keys with a value each; at times two keys differ in one letter."""
    keys = wording.word_keys(rng, n, "train")
    if n > 1 and rng.random() < 0.3:
        at, other = int(rng.integers(len(keys[0]))), wording.word_keys(rng, 1, "train")[0]
        twin = keys[0][:at] + other[0] + keys[0][at + 1 :]
        if twin not in keys and (sum(map(ord, twin)) - ord("a") * len(twin)) % 4:
            keys[1] = twin
    return [(k, f"{v:03d}") for k, v in zip(keys, rng.integers(0, 1000, n).tolist(), strict=True)]


def stream(rng: np.random.Generator, length: int, n: int) -> Row:
    """Pairs in which n keys recur, with a loss at each recurrence."""
    pool, end = pairs_of(rng, n), (", ", "\n", ". ")[int(rng.integers(3))]
    out: Row = []
    used = size = 0
    while size <= length:
        fresh = used < n and (used == 0 or rng.random() > 0.4)
        key, value = pool[used if fresh else int(rng.integers(used))]
        used += fresh
        out += [(key + "=", FORM), (value, 0.0 if fresh else ANSWER), (end, FORM)]
        size += len(key) + 4 + len(end)
    return out


def joint(pairs: list[tuple[str, str]], copy: float) -> Row:
    """One question for all of the pairs; `copy`: weight of the keys that the reply copies from the question."""
    keys, values = zip(*pairs, strict=True)
    double = len(set(keys)) == 1  # the values of one key: which comes first is anyone's guess, the last is certain again
    out: Row = [(SHORT.ask(keys, double), FORM), (values[0], 0.3 if double else ANSWER)]
    for i in range(1, len(keys)):
        out += [(f" ({'abcdefgh'[i]}) {keys[i]}=", copy), (values[i], 0.5 if double and i < len(keys) - 1 else ANSWER)]
    return out


def questions(rng: np.random.Generator, pairs: list[tuple[str, str]], most: int, share: float) -> Row:
    """Up to `most` pairs are asked, each by itself or, a `share` of the questions, two to four at once.

    share=0 (the first stage): one joint question at most, at the end, so that the gradient is left to matching a key.
    """
    asked = [pairs[i] for i in rng.permutation(len(pairs))[:most]]
    out: Row = []
    last: list[tuple[str, str]] = []
    if not share and len(asked) > 1 and rng.random() < 0.4:
        n = int(rng.integers(2, 5))
        last, asked = asked[:n] if rng.random() >= 0.3 else [], asked[n:]
    while asked:
        n = int(rng.integers(2, 5)) if share and len(asked) > 1 and rng.random() < share else 1
        group, asked = asked[:n], asked[n:]
        out += joint(group, 1.0) if len(group) > 1 else [(SHORT.ask([group[0][0]], False), FORM), (group[0][1], ANSWER)]
    return out + (joint(last, 0.5) if last else [])


def facts(rng: np.random.Generator, length: int, n: int, most: int, share: float) -> Row:
    """n facts in text, then questions. In a `share` of the rows one key has two or three values."""
    pairs = pairs_of(rng, n)
    if n > 3 and rng.random() < (share or 0.33):
        for i in range(1, int(rng.integers(2, 4))):
            pairs[i] = (pairs[0][0], pairs[i][1])
    unique = [p for p in pairs if sum(p[0] == k for k, _ in pairs) == 1]
    double = [p for p in pairs if p not in unique]
    tail = questions(rng, unique, most, share) if unique else []
    if double:
        rng.shuffle(double)
        tail += joint(double, 1.0 if share else 0.5)
    sentences = [SHORT.fact(*p) for p in pairs]
    room = length + 1 - sum(len(t) for t, _ in tail) - sum(map(len, sentences))
    if room < n + 8:
        return facts(rng, length, max(1, n // 2), max(1, most // 2), share)
    text, last, out = excerpt(rng, room), 0, []
    for cut, fact in zip(np.sort(rng.integers(0, room, n)).tolist(), rng.permutation(sentences).tolist(), strict=True):
        cut = max(last, text.rfind(" ", last, cut))
        out += [(text[last:cut], TEXT), (fact, FORM)]
        last = cut
    return [*out, (text[last:], TEXT), *tail]


def listing(rng: np.random.Generator, length: int, n: int, most: int, share: float) -> Row:
    """A list of n pairs (text before it where there is room), then questions."""
    pairs = pairs_of(rng, n)
    tail = questions(rng, pairs, most, share)
    body = "".join(SHORT.row(*p) for p in pairs)
    room = length + 1 - sum(len(t) for t, _ in tail) - len(body)
    if room < 0 and share:
        return listing(rng, length, max(2, int((0.85 if n < 342 else 0.95) * n)), max(2, most - 1), share)
    head = [(excerpt(rng, room - 1) + "\n", TEXT)] if room > 1 else []
    return [*head, (body, FORM), *tail]


def batch_of(stage: Stage, seed: int, step: int, done: float) -> dict[str, np.ndarray]:
    """The batch of a step, a function of (seed, step): ids i32 [b n+1], weight f32 [b n+1], pos i32 [b n]. done: 0..1 of the stage."""
    rng = np.random.default_rng([seed, step])
    n, b = stage.length, stage.batch
    top = stage.pairs[0] + (stage.pairs[1] - stage.pairs[0]) * min(1.0, done / 0.8)
    ids, weight = np.ones((b, n + 1), np.int32), np.zeros((b, n + 1), np.float32)
    for i, kind in enumerate(rng.choice(3, b, p=stage.kinds)):
        most = int(rng.integers(3, 5 + n // 48)) if stage.joint else 4
        if kind == 0:
            row = stream(rng, n, int(rng.integers(2, round(top) + 1)))
        elif kind == 1:
            row = facts(rng, n, int(rng.integers(1, max(2, min(round(top), n // 24)) + 1)), most, stage.joint)
        else:
            least, cap = (round(top) // 2, n // 10) if stage.dense else (2, max(3, min(round(top), n // 12)))
            row = listing(rng, n, int(rng.integers(least, min(round(top), cap) + 1 if stage.dense else cap + 1)), most, stage.joint)
        text = encode("".join(t for t, _ in row))
        cost = np.repeat(np.array([w for _, w in row], np.float32), [len(t) for t, _ in row])
        # a stream starts at its first pair, the others end at their last answer
        text, cost = (text[: n + 1], cost[: n + 1]) if kind == 0 else (text[-n - 1 :], cost[-n - 1 :])
        ids[i, n + 1 - len(text) :], weight[i, n + 1 - len(text) :] = text, cost
    pos = np.broadcast_to(np.arange(n, dtype=np.int32), (b, n)).copy()
    if stage.jump:
        jumps = np.zeros((b, n), np.int32)
        for i in np.flatnonzero(rng.random(b) < 0.6):
            jumps[i, rng.integers(0, n, 3)] = rng.integers(0, stage.jump, 3) * (rng.random(3) < 0.7)
        pos += np.cumsum(jumps, 1, dtype=np.int32)
    return {"ids": ids, "weight": weight, "pos": pos}


# --- the model --------------------------------------------------------------------------------------------------------


def apply(cfg: Config, params: Any, ids: jax.Array, pos: jax.Array) -> jax.Array:
    """Logits f32 [b n vocab] of the causal pass at the given positions (`blocks.forward` with positions that may jump)."""

    def layer(x, p):
        q, k, v = blocks.qkv(cfg, p, x)
        q, k = blocks.rotate(cfg, 0, q, pos), blocks.rotate(cfg, 0, k, pos)
        # a row at a time: the logits of one row stay in a core's cache, those of a batch do not (1.7 times faster at 256)
        one = lambda t: attention(t[0][None], t[1][None], t[2][None], q_pos=t[3][None], k_pos=t[3][None], diagonal=0)[0][0]
        out = jax.lax.map(one, (q, k, v, pos))
        return blocks.mlp(cfg, p, blocks.out_proj(cfg, p, x, out)), None

    return blocks.logits(cfg, params, jax.lax.scan(layer, blocks.embed(cfg, params, ids), params["layers"])[0])


def make_loss(cfg: Config):
    def loss_fn(params, batch, key):
        z = apply(cfg, params, batch["ids"][:, :-1], batch["pos"])
        want, weight = batch["ids"][:, 1:], batch["weight"][:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(z, want)
        right = (jnp.argmax(z, -1) == want).astype(jnp.float32)
        mean = lambda x, mask: jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
        answer, text = ((jnp.abs(weight - w) < 1e-6).astype(jnp.float32) for w in (ANSWER, TEXT))
        return mean(nll, weight), {"answer": mean(right, answer), "answer_nll": mean(nll, answer), "text_nll": mean(nll, text)}

    return loss_fn


# --- evaluation -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _greedy(cfg: Config, params: Any, ids: jax.Array, live: jax.Array) -> jax.Array:
    return jnp.argmax(blocks.forward(cfg, params, ids, live), -1)


def replies(e: tasks.Example) -> list[str]:
    """The perfect continuations of a case's question: the values of one key may come in any order."""
    keys = re.findall(r"(?:\) |Remember )([a-z]+)=", e.question.split(":")[0])
    orders = [e.answers] if len(set(keys)) == len(keys) else itertools.permutations(e.answers)
    return [SHORT.reply(keys, order) for order in orders]


def padded(texts: list[str], width: int) -> np.ndarray:
    """Ids i32 [b width] of texts, left-padded with 0."""
    out = np.zeros((len(texts), width), np.int32)
    for row, text in zip(out, map(encode, texts), strict=True):
        row[width - len(text) :] = text
    return out


def exact(cfg: Config, params: Any, cases: list[tasks.Example], length: int) -> float:
    """Fraction of the cases whose greedy continuation is a perfect one, all answers right.

    Teacher forcing gives the same verdict as generating: greedy text equals the wanted text if and only if each next token does.
    """
    rows = [(i, e.context + e.question, reply) for i, e in enumerate(cases) for reply in replies(e)]
    good, size = np.zeros(len(cases), bool), max(1, 8192 // length)
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        ids = padded([text + reply for _, text, reply in part] + [""] * (size - len(part)), length + 32)
        out = np.asarray(_greedy(cfg, params, ids, ids > 0))
        for (i, _, reply), row, want in zip(part, out, ids, strict=False):
            n = len(reply)
            good[i] |= bool((row[-n - 1 : -1] == want[-n:]).all())
    return float(good.mean())


TASKS = ("needle", "multi_key", "multi_value", "multi_query", "kv_recall")


def evaluate(cfg: Config, params: Any, lengths: tuple[int, ...], count: int) -> dict[str, dict[str, float]]:
    """Task -> length -> score with the full cache, on evaluation keys in text that training never saw."""
    made = lambda t, n: tasks.examples(t, count, length=n, seed=1)
    return {t: {str(n): round(exact(cfg, params, made(t, n), n), 4) for n in lengths} for t in TASKS}


def agreement(big: tuple[Config, Any], draft: tuple[Config, Any], length: int = 512, rows: int = 64) -> dict[str, float]:
    """How often the draft's greedy next token is the big model's: in unseen text, and in the replies to retrieval questions."""
    text = tasks.haystack()
    both = lambda ids: [np.asarray(_greedy(c, p, ids, ids > 0)) for c, p in (big, draft)]
    a, b = both(padded([text[i * length : (i + 1) * length] for i in range(rows)], length))
    shares = []
    for t in TASKS:
        cases = [(e.context + e.question, replies(e)[0]) for e in tasks.examples(t, rows, length=length, seed=2)]
        c, d = both(padded([text + reply for text, reply in cases], length + 32))
        shares += [(x[-n - 1 : -1] == y[-n - 1 : -1]).mean() for x, y, n in zip(c, d, (len(r) for _, r in cases), strict=True)]
    return {"text": round(float((a == b).mean()), 4), "replies": round(float(np.mean(shares)), 4)}


def text_nll(cfg: Config, params: Any, text: str, length: int = 512, rows: int = 64) -> float:
    """Mean negative log likelihood, nats a character, of the first `rows` stretches of `length` characters of the text."""
    ids = np.stack([encode(text[i * length : (i + 1) * length]) for i in range(rows)])
    nll = jax.jit(lambda p, x: optax.softmax_cross_entropy_with_integer_labels(blocks.forward(cfg, p, x)[:, :-1], x[:, 1:]).mean())
    return round(float(np.mean([nll(params, part) for part in np.split(ids, 8)])), 4)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    """Train the embedded model, or its draft, or evaluate both as shipped."""

    draft: bool = False
    evaluate: bool = False
    seed: int = 0
    rate: float = 4e-3  # peak learning rate
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)  # of --evaluate
    count: int = 200  # cases a task and length of --evaluate
    out: pathlib.Path = ROOT / "experiments" / "results" / "embedded"
    models: pathlib.Path = ROOT / "jaxtok" / "models"


def train(args: Args) -> None:
    name, cfg = ("draft", DRAFT) if args.draft else ("big", BIG)
    folder = args.out / name
    phases = (CURRICULUM[:4],) if args.draft else (CURRICULUM, FINISH, LAST)
    stages, ends = sum(phases, ()), np.cumsum([sum(s.steps for s in phase) for phase in phases])
    peak = args.rate
    rate = optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(0.0, peak, 100, ends[0], 0.03 * peak),
            *(optax.cosine_decay_schedule(peak / d, sum(s.steps for s in p)) for d, p in zip((3, 5), phases[1:], strict=False)),
        ],
        ends[:-1].tolist(),
    )
    matrices = lambda p: jax.tree.map(lambda x: x.ndim > 1 and min(x.shape[-2:]) > cfg.layers, p)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05, mask=matrices))
    # embeddings of std 0.7: with the usual small ones the first layers see characters too alike to match keys
    params = blocks.stack(blocks.init(cfg, jax.random.key(args.seed), embed_std=0.7))
    # a direction that all tokens share: what a head needs to look at the characters before, whatever they are
    params["embed"] += 0.7 * jax.random.normal(jax.random.key(args.seed + 1), (1, cfg.width))
    params["layers"] |= {k: 1.4 * params["layers"][k] for k in ("q_norm", "k_norm")}
    print(f"{name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {ends[-1]} steps", flush=True)
    ends = np.cumsum([s.steps for s in stages])

    def data(step: int) -> dict[str, np.ndarray]:
        i = int(np.searchsorted(ends, step, side="right"))
        stage = stages[i]
        return batch_of(stage, args.seed, step, (step - (ends[i] - stage.steps)) / stage.steps)

    def on_log(line: dict[str, float]) -> None:
        if line["step"] % 100 == 0:
            print({k: round(v, 3) for k, v in line.items()}, flush=True)

    state, trained, start, loss_fn = None, params, time.time(), make_loss(cfg)
    for end in ends.tolist():
        state = fit(
            loss_fn, params if state is None else None, data, optimizer=optimizer, steps=end, state=state, seed=args.seed,
            directory=folder / "checkpoints", save_every=200, log_every=10, tokens=lambda b: b["pos"].size, on_log=on_log, progress=False,
        )  # fmt: skip
        trained = blocks.unstack(state.params)
        if int(state.step) == end:  # else a checkpoint took us past this stage
            print(f"after {end}:", evaluate(cfg, trained, (256, 1024), 24), f"{time.time() - start:.0f} s", flush=True)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes((folder / "checkpoints" / "metrics.jsonl").read_bytes())
    figures.curves(metrics, folder / "curves.png", ("loss", "answer", "text_nll"), smooth=15)
    where = args.models / ("embedded_draft" if args.draft else "embedded")
    load.save(where, cfg, trained, tokenizer())
    print(f"wrote {where}", flush=True)


def report(args: Args) -> None:
    out: dict[str, Any] = {"count": args.count}
    both = {}
    for name in ("embedded", "embedded_draft"):
        cfg, params, _ = load.load(args.models / name)
        both[name] = (cfg, params)
        out[name] = evaluate(cfg, params, args.lengths if name == "embedded" else args.lengths[:3], args.count)
        out[name]["text_nll"] = {
            "moby_dick_held_out": text_nll(cfg, params, books()[2]),
            "haystack": text_nll(cfg, params, tasks.haystack()),
        }
        print(name, json.dumps(out[name]), flush=True)
    out["draft_agreement"] = agreement(both["embedded"], both["embedded_draft"])
    (args.out / "eval.json").write_text(json.dumps(out, indent=1) + "\n")
    print(out["draft_agreement"])


if __name__ == "__main__":
    args = tyro.cli(Args)
    report(args) if args.evaluate else train(args)
