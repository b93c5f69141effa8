"""`jaxtok generate --chat`: a conversation in the template of the checkpoint, streamed, on one cache that a method may compress."""

import functools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxtok.cli.common import load_model

if TYPE_CHECKING:
    from jaxtok.cli.generate import Generate

EXIT, NEW = "/exit", "/new"
MOST = 4096  # slots, unless the user says otherwise
BLOCK = 8  # tokens between two looks at what was said
BUCKET = 16  # turns are padded to this times a power of two, each of which is a compiled program


def run(command: "Generate") -> None:
    """The conversation: turns from --prompt or line by line from standard input, until they end."""
    import jax

    from jaxtok.core.registry import parse_budget
    from jaxtok.decode import Sampler
    from jaxtok.evals import cases, measure
    from jaxtok.models.chat import ChatTemplate, Conversation

    if len(command.methods) != 1:
        raise ValueError(f"a chat takes one method, got {', '.join(command.methods)}")
    for name, value in (("new", command.new), ("context", command.context)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    sampler = Sampler(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p, min_p=command.min_p)
    size = parse_budget(command.budget)
    measure.site_of(command.methods[0])
    template = ChatTemplate.read(command.model)
    cfg, params, tokenizer = load_model(command.model)
    slots = min(cfg.context, MOST) if command.context is None else command.context
    recipe = measure.recipe_of(command.methods[0], cases.slots(size, slots))
    own = recipe.init_params(jax.random.key(command.seed), cfg)
    params = params | {"methods": own} if jax.tree.leaves(own) else params
    end = tokenizer.encode(template.specials.get("eos_token", ""), special=False)
    eos = (*cfg.eos, *(end if len(end) == 1 else ()))  # some checkpoints name the end of a turn in their tokenizer only
    voice = Voice(cfg, params, tokenizer, recipe, slots=slots, new=command.new, sampler=sampler, eos=eos, seed=command.seed)
    conversation, found = Conversation(template, command.system), []
    for text in _turns(command.prompt):
        if text == NEW and not command.prompt:
            conversation = Conversation(template, command.system)
            continue
        more, fresh = conversation.ask(text)
        if fresh and any(m["role"] == "assistant" for m in conversation.messages):
            _note("the template rewrites earlier turns: all of the conversation is read again")
        said = []
        for piece in voice.reply(more, fresh):
            said.append(piece)
            if not command.json:
                print(piece, end="", flush=True)
        conversation.answer("".join(said))
        found.append({"method": command.methods[0], "prompt": text, "text": "".join(said), **voice.facts()})
        if not command.json:
            print(flush=True)
    if command.json:
        print(json.dumps(found, indent=1))


def _note(text: str) -> None:
    print(f"jaxtok: {text}", file=sys.stderr)


def _turns(prompts: tuple[str, ...]) -> Iterator[str]:
    """What the user says: the prompts, else lines of standard input up to its end or /exit."""
    if prompts:
        yield from (sys.stdin.read() if p == "-" else p for p in prompts)
        return
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asked else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip() == EXIT:
            return
        if line.strip():
            yield line.strip()


class Voice:
    """The model in a conversation: its caches, and what it makes of a turn."""

    def __init__(self, cfg, params, tokenizer, recipe, *, slots: int, new: int, sampler, eos: tuple[int, ...], seed: int):
        import jax

        from jaxtok.decode import turns

        recipe.validate(cfg)
        self.cfg, self.params, self.tokenizer, self.new = cfg, params, tokenizer, new
        self.bounded, self.slots, self.key = recipe.cache is not None or recipe.policy is not None, slots, jax.random.key(seed)
        self.eos, self.count, self.lost, self.ids = eos, 0, 0, []
        fixed = {"cfg": cfg, "params": params, "recipe": recipe}
        self._begin = functools.partial(turns.begin, **fixed, slots=slots, new=new)
        static = functools.partial(functools.partial, **{"cfg": cfg, "recipe": recipe})
        # caches are updated in place where their shapes stay
        self._listen = jax.jit(static(turns.listen, new=new), donate_argnames=() if self.bounded else ("layers",))
        self._speak = jax.jit(static(turns.speak, most=BLOCK, sampler=sampler, eos=eos), donate_argnames=("layers",))
        self.layers: Any = None

    def reply(self, text: str, fresh: bool) -> Iterator[str]:
        """Read `text`, on new caches if `fresh`, and say the reply piece by piece."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jaxtok.decode.turns import Said
        from jaxtok.models.text import Stream, pad

        ids = self.tokenizer.encode(text, special=False)
        if fresh:
            self.layers, self.count, self.lost = self._begin(), 0, 0
        size = BUCKET
        while size < len(ids):
            size *= 2
        if not self.bounded:
            size = min(size, self.slots)
            if not len(ids) <= size:
                raise ValueError(
                    f"a turn of {len(ids)} tokens is more than the cache of {self.slots} slots holds; raise --context or name a method "
                    "that evicts (--methods)"
                )
        rows, live = map(jnp.asarray, pad([ids], size, side="right"))
        self.key, read, draw = jax.random.split(self.key, 3)
        x, self.layers = self._listen(params=self.params, layers=self.layers, ids=rows, live=live, key=read)
        said, stream, self.ids = Said.start(x), Stream(self.tokenizer, ids), []
        while bool(said.running[0]) and int(said.count) < self.new:
            left = jnp.asarray(self.new - int(said.count), jnp.int32)
            some, said, self.layers = self._speak(params=self.params, said=said, layers=self.layers, left=left, key=draw)
            some = [int(i) for i in np.asarray(some)[0] if i >= 0 and int(i) not in self.eos]
            self.ids += some
            yield stream.push(some)
        yield stream.end()
        self._report(len(ids) + len(self.ids))

    def _report(self, more: int) -> None:
        """Say what a turn of `more` tokens, its reply included, has come up against."""
        lost = max(int(part.kv.lost.max()) for parts in self.layers for part in parts)
        if lost > self.lost:
            _note(
                f"the cache is full: {lost} tokens found no room and are forgotten; {NEW} begins anew, --context gives more room than "
                f"{self.slots} slots, a method that evicts (--methods) does without"
            )
        if self.count <= self.cfg.context < self.count + more:
            _note(f"the conversation has {self.count + more} tokens, more than the {self.cfg.context} that the model was trained for")
        self.count, self.lost = self.count + more, lost

    def facts(self) -> dict[str, Any]:
        """What there is to know after a reply: its ids, tokens of the conversation, live slots a layer and head, tokens without room."""
        import numpy as np

        parts = [part.kv for row in self.layers for part in row]
        kept = float(np.mean([np.sum(np.asarray(kv.pos) >= 0) / kv.pos.shape[1] for kv in parts]))
        return {"ids": self.ids, "tokens": self.count, "kept": kept, "lost": self.lost}
