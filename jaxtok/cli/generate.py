"""`jaxtok generate`: continue prompts with a method at work on the cache."""

import dataclasses
import json
import sys

from jaxtok.cli.common import EMBEDDED, Common, load_draft, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Continue prompts with a method at work on the cache."""

    prompt: tuple[str, ...] = ()
    """One text or several, which then run as one batch; - reads one from standard input. In a chat: what you say, turn by turn."""
    model: str = EMBEDDED
    """A Hugging Face directory or hub id, a llama2.c .bin file or directory, or `embedded`, the model of the package."""
    draft: str | None = None
    """A smaller model with the same tokens, as --model, for the methods that look at a draft of the answer; default: that of the embedded
    model where that is the model."""
    methods: tuple[str, ...] = ("full",)
    """Such as snapkv:window=32 or ada_kv:base=k_norm; each continues all prompts."""
    budget: str = "50%"
    """Slots that a method keeps a KV head: a number of tokens or a share of the prompt (25%), in a chat of --context."""
    new: int = 100
    """Tokens to generate at most, in a chat for each reply."""
    chat: bool = False
    """Talk with a chat model, in the template of its checkpoint. Without --prompt: type a line a turn; /new begins anew, /exit ends."""
    system: str | None = None
    """In a chat: the system message."""
    context: int | None = None
    """In a chat: slots of a cache that no method bounds; default: what the model was trained for, at most 4096."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int | None = None
    """Draw from the k most probable tokens."""
    top_p: float | None = None
    """Draw from the most probable tokens that hold this mass."""
    min_p: float | None = None
    """Draw from tokens at least this share as probable as the best."""
    seed: int = 0
    """Of what is drawn."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        if self.chat:
            if self.draft is not None:
                raise ValueError("a chat has no method that looks at a draft; leave --draft out")
            from jaxtok.cli import chat

            return chat.run(self)
        if not self.prompt:
            raise ValueError("generate needs --prompt, or --chat")
        if self.system is not None or self.context is not None:
            raise ValueError("--system and --context go with --chat")
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jaxtok.core.registry import parse_budget
        from jaxtok.core.types import live_count
        from jaxtok.decode import Sampler, generate, prefill, reread
        from jaxtok.decode.prefill import check_draft
        from jaxtok.evals import cases, heads, measure
        from jaxtok.models import text

        sampler = Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        size = parse_budget(self.budget)
        for spec in self.methods:
            measure.site_of(spec)
        cfg, params, tokenizer = load_model(self.model)
        prompts = [sys.stdin.read() if p == "-" else p for p in self.prompt]
        encoded = [tokenizer.encode(p, special=True) for p in prompts]
        if not all(encoded):
            raise ValueError("the prompt is empty and the model has no token that begins a text; give a prompt")
        ids, live = map(jnp.asarray, text.pad(encoded, bucket=cases.BUCKET))
        capacity, found = cases.slots(size, ids.shape[1]), []
        draft = load_draft(self.draft, self.model)
        for spec in self.methods:
            heads.validate(spec, capacity, cfg, measure.recipe_of)
            if not heads.told_apart(spec):
                check_draft(cfg, measure.recipe_of(spec, capacity), draft)
        splits = heads.Splits(cfg, params, tokenizer)
        small, draft_params = draft or (None, None)

        def run(recipe, params, draft_params, ids, live, key):
            keep, after = measure.keeps(recipe, cases.keep(size, live), capacity)
            ask = reread.request(tokenizer.encode)
            given = None if small is None else (small, draft_params)
            tokens, layers = prefill(cfg, params, ids, live, recipe, new=self.new, draft=given, ask=ask, keep=keep, key=key)
            out = generate(cfg, params, tokens, layers, recipe, new=self.new, sampler=sampler, key=key, keep=after)
            return out.ids, out.count, jnp.mean(heads.average(layers, lambda part: live_count(part.pos)))

        for spec in self.methods:
            apart = heads.told_apart(spec)
            recipe, full = splits.at(spec, capacity, ids.shape[1]) if apart else (measure.recipe_of(spec, capacity), params)
            own = recipe.init_params(jax.random.key(self.seed), cfg)
            full = full | {"methods": own} if jax.tree.leaves(own) else full
            said, count, kept = jax.jit(run, static_argnums=0)(recipe, full, draft_params, ids, live, jax.random.key(self.seed))
            for i, (prompt, row) in enumerate(zip(prompts, np.asarray(said), strict=True)):
                row = [int(t) for t in row[: int(count[i])] if int(t) not in cfg.eos]
                whole = tokenizer.decode([*encoded[i], *row])
                found.append({"method": spec, "prompt": prompt, "text": whole, "ids": row, "kept": float(kept)})
        if self.json:
            print(json.dumps(found, indent=1))
            return
        for entry in found:
            if len(found) > 1:
                print(f"--- {entry['method']}, {entry['kept']:.1f} slots kept of a prompt of up to {ids.shape[1]}")
            print(entry["text"])
