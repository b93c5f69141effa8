"""The lm-evaluation-harness on a jaxtok model, with any method at work on its cache (needs the `eval` extra).

    python -m jaxtok.evals.harness run --model jaxtok --model_args "model=embedded,method=snapkv:window=16,budget=25%" --tasks ...

is the harness's own command line with one more model; `Harness` says what goes into --model_args. In Python:

    from jaxtok.evals.harness import Harness
    lm_eval.simple_evaluate(Harness(model="path/to/a/checkpoint", method="h2o", budget="128"), tasks=[...])

A prompt is prefilled, the method acts, and what follows (a continuation to score, a text to generate) goes through the caches token by
token: step policies evict and readers choose as in use. `experiments/lm_eval_local.py` runs local tasks, offline.
"""

import logging
import sys
from typing import Any

from jaxtok.core import plugins
from jaxtok.core.recipe import Recipe
from jaxtok.evals import batched, measure
from jaxtok.evals.batched import Prompt
from jaxtok.models import load
from jaxtok.models.chat import MARK, ChatTemplate
from jaxtok.models.text import Stream

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm  # pyright: ignore[reportMissingImports,reportMissingModuleSource]
except ImportError as e:
    missing = f"the lm-evaluation-harness is not installed ({e}): pip install 'jaxtok[eval]'"
    if __name__ == "__main__":
        print(f"jaxtok: {missing}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ImportError(missing) from None

log = logging.getLogger(__name__)


@register_model("jaxtok")
class Harness(TemplateLM):
    """A model for the harness.

    model: a Hugging Face directory or hub id, a llama2.c .bin file, or "embedded", the model of the package.
    method: a spec such as "snapkv:window=32" (";" for "," in a command line), or a Recipe. budget: slots a KV head that a spec's method
        keeps, a number or a share of each prompt ("25%").
    draft: a smaller model with the same tokens, named as `model`, for methods that look at a draft of the answer; None = that of the embedded
        model where that is the model.
    question: where in a prompt the question begins, at the last place where this text stands ("\\n": the last line): it is read after the
        method has acted. None: the method has seen all of the prompt.
    batch_size: rows of a batch. max_length: tokens of prompt and continuation, longer prompts lose their beginning (a warning counts
        them); None = what the model was trained for. max_gen_toks: tokens generated where a task does not say. imports: a file or module
        that registers methods. device and max_batch_size, which the harness passes on, are of no consequence: JAX takes the accelerator
        that it finds (JAX_PLATFORMS chooses).

    ValueError for arguments that cannot work, and for `loglikelihood_rolling` with a method that compresses after a prefill: it scores
    all tokens, so there is no prompt to compress.
    """

    def __init__(
        self,
        model: str = "embedded",
        method: str | Recipe = measure.FULL,
        budget: str | int = "50%",
        *,
        draft: str | None = None,
        question: str | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        imports: str | None = None,
        device: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = "model, method, budget, draft, question, batch_size, max_length, max_gen_toks, seed, imports"
            raise ValueError(f"the model jaxtok has no argument {', '.join(unknown)}; it has {known}")
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size={batch_size!r} must be a number")
        if imports is not None:
            plugins.load(imports)
        cfg, params, tokenizer = load.load(model)
        if tokenizer is None:
            raise ValueError(f"{model} has no tokenizer (tokenizer.json, or tokenizer.bin beside a llama2.c file)")
        method = method.replace(";", ",") if isinstance(method, str) else method
        draft = load.DRAFT if draft is None and model == load.EMBEDDED else draft
        self.model = batched.Model(
            cfg=cfg, params=params, method=method, budget=str(budget), batch=int(batch_size), seed=seed, encode=tokenizer.encode,
            draft=None if draft is None else load.load(draft)[:2],
        )  # fmt: skip
        self.text, self.name, self.question, self.max_gen_toks = tokenizer, model, question, max_gen_toks
        self.max_length = cfg.context if max_length is None else max_length

    # --- what the base class asks for -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it; ValueError where the model has no such token."""
        for token in (self.text.bos, *self.model.cfg.eos):
            if token is not None:
                return token
        raise ValueError(f"{self.name} has no token that begins or ends a text, so nothing can be scored without a context")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids; the special tokens around them unless the text (of a chat template) spells them out already."""
        plain = self.text.encode(string, special=False)
        special = add_special_tokens is not False and (not plain or plain[0] != self.text.bos)
        return self.text.encode(string, special=True) if special else plain

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the checkpoint's template; without a generation prompt it stops where its last message would go on."""
        template = ChatTemplate.read(self.name)
        if add_generation_prompt:
            return template(chat_history)
        *before, last = chat_history
        return template([*before, last | {"content": last["content"] + MARK}], reply=False).partition(MARK)[0]

    @property
    def tokenizer_name(self) -> str:
        return self.name

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _prompt(self, text: str, room: int, ids: list[int] | None = None) -> tuple[Prompt, bool]:
        """(the ids of a prompt that leaves `room` for what follows, whether it had to lose its beginning)."""
        at = -1 if self.question is None else text.rfind(self.question)
        if at >= 0:
            prompt = Prompt(self.tok_encode(text[:at]), self.text.encode(text[at:], special=False))
        else:
            prompt = Prompt(self.tok_encode(text) if ids is None else ids)
        if not prompt.context:
            prompt = prompt._replace(context=[self.eot_token_id])
        most = self.max_length - len(prompt.question) - room
        if most < 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a context beside {len(prompt.question) + room} tokens that follow"
            )
        return prompt._replace(context=prompt.context[-most:]), len(prompt.context) > most

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        made = [self._prompt(pair[0].rstrip(), len(said), ids) for pair, ids, said in requests]
        self._warn(sum(cut for _, cut in made))
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            out = self.model.likelihoods([(prompt, said) for (prompt, _), (_, _, said) in zip(made, requests, strict=True)], bar.update)
        for (pair, _, _), found in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, found)
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_length; see the class for what it refuses."""
        recipe = self.model.recipe(self.max_length)[0]
        early = recipe.cache if recipe.prompt is None else recipe.prompt
        if early is not None:
            raise ValueError(
                f"loglikelihood_rolling scores all of a text and leaves {early.name} no prompt to compress; take a step policy or a "
                "reader, or jaxtok compare --tasks perplexity"
            )
        windows, of = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1):
                context, said = make_disjoint_window(pair)
                windows.append((Prompt(context), said))
                of.append(i)
        with tqdm(total=len(windows), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            found = self.model.likelihoods(windows, bar.update)
        out = [0.0] * len(requests)
        for i, (score, _) in zip(of, found, strict=True):
            out[i] += score
        for request, score in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut before the first of its stop texts."""
        wanted = [batched.wanted(request.args[1], self.max_gen_toks) for request in requests]
        made = [self._prompt(request.args[0], w.new) for request, w in zip(requests, wanted, strict=True)]
        self._warn(sum(cut for _, cut in made))
        out = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for sampler in dict.fromkeys(w.sampler for w in wanted):
                mine = [i for i, w in enumerate(wanted) if w.sampler == sampler]
                said = lambda j, ids, mine=mine: self._said(made[mine[j]][0], ids)
                found = self.model.continuations(
                    [(made[i][0], wanted[i].new) for i in mine],
                    sampler=sampler,
                    done=lambda j, ids, mine=mine, said=said: wanted[mine[j]].cut(said(j, ids)) is not None,
                    tick=bar.update,
                )
                for j, (i, ids) in enumerate(zip(mine, found, strict=True)):
                    text = said(j, ids)
                    short = wanted[i].cut(text)
                    out[i] = text if short is None else short
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _said(self, prompt: Prompt, ids: list[int]) -> str:
        stream = Stream(self.text, prompt.question or prompt.context)
        return stream.push(ids) + stream.end()

    def _warn(self, count: int) -> None:
        if count:
            log.warning("%d prompts lost their beginning to fit max_length=%d", count, self.max_length)


def main() -> int:
    """The harness's command line; what jaxtok refuses is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    for line in plugins.discover():
        print(f"jaxtok: {line}", file=sys.stderr)
    try:
        cli_evaluate()
    except ValueError as e:
        print(f"jaxtok: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
