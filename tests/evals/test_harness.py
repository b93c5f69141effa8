"""The lm-evaluation-harness on jaxtok models: its three kinds of requests, and a local task with the scores of `compare`."""

import importlib.util
import json
import logging
import os
import pathlib
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.models import blocks, load
from tests.evals import tiny

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("the lm-evaluation-harness is not installed (the eval extra)", allow_module_level=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the harness is imported
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from jaxtok.evals.harness import Harness

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("harness") / "model"
    load.save(path, *tiny.make())
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 1}  # the newline
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    return str(path)


def request(*args):
    return SimpleNamespace(args=args)


def logp(path, text):
    """log p of each character of `text` after the first, in one pass."""
    cfg, params, tokenizer = load.load(path)
    ids = tokenizer.encode(text)
    out = jax.nn.log_softmax(blocks.forward(cfg, params, jnp.asarray([ids]), jnp.ones((1, len(ids)), bool))[0], -1)
    return np.asarray(out)[np.arange(len(ids) - 1), ids[1:]], np.asarray(out).argmax(-1)[:-1] == ids[1:]


def test_loglikelihood(path):
    pairs = [("a context", " and more"), ("blanks stay  ", "here"), ("", "from nothing"), ("x", "y")]
    found = Harness(model=path, batch_size="3").loglikelihood([request(*p) for p in pairs], disable_tqdm=True)
    for (context, said), (score, greedy) in zip(pairs, found, strict=True):
        context = context or "\n"  # what ends a text stands before it, as the model has nothing that begins one
        n = len(context) - len(context.rstrip(" ")) + len(said)  # blanks at the end of a context count as said
        each, best = logp(path, context + said)
        assert score == pytest.approx(each[-n:].sum(), abs=1e-3) and greedy == best[-n:].all()


def test_loglikelihood_with_a_method_and_a_question(path):
    pair = request("a context of some length\nand what is asked", " or said")
    full, seen, unseen = (
        Harness(model=path, method=m, budget=6, question=q).loglikelihood([pair], disable_tqdm=True)[0][0]
        for m, q in (("full", None), ("k_norm", None), ("k_norm", "\n"))
    )
    assert len({round(x, 3) for x in (full, seen, unseen)}) == 3
    assert Harness(model=path, question="\n").loglikelihood([pair], disable_tqdm=True)[0][0] == pytest.approx(full, abs=1e-3)


@pytest.mark.parametrize("method", ["full", "h2o"])
def test_loglikelihood_rolling_scores_every_token_once(path, method):
    text = "a text that is longer than the window of twenty tokens"
    (found,) = Harness(model=path, method=method, budget=64, max_length=20).loglikelihood_rolling([request(text)], disable_tqdm=True)
    want, whole = 0.0, "\n" + text
    for at in range(0, len(text), 20):
        n = min(20, len(text) - at)  # the last window is as long as the others, and scores what is left
        want += logp(path, whole[at + n - 20 : at + n + 1])[0][-n:].sum()
    assert found == pytest.approx(want, abs=1e-3)


def test_generate_until(path):
    prompts = ["once upon a time", "short"]
    free = Harness(model=path, batch_size=2).generate_until([request(p, {"max_gen_toks": 20}) for p in prompts], disable_tqdm=True)
    for prompt, text in zip(prompts, free, strict=True):
        _, best = logp(path, prompt + text)
        assert best[-len(text) :].all() and (len(text) == 20 or "\n" not in text)
    stop = free[0][5:7]
    ask = [request(prompts[0], {"until": [stop], "max_gen_toks": 20}), request(prompts[1], {"until": "\t", "max_gen_toks": 3})]
    cut = Harness(model=path, batch_size=2).generate_until(ask, disable_tqdm=True)
    assert cut == [free[0][: free[0].index(stop)], free[1][:3]]


def test_prompts_that_are_too_long_lose_their_beginning(path, caplog):
    long = "something that does not fit " * 3 + "the end"
    with caplog.at_level(logging.WARNING):
        found = Harness(model=path, max_length=16).generate_until([request(long, {"max_gen_toks": 4})], disable_tqdm=True)
    assert found == Harness(model=path).generate_until([request(long[-12:], {"max_gen_toks": 4})], disable_tqdm=True)
    assert "1 prompts lost their beginning to fit max_length=16" in caplog.text
    with pytest.raises(ValueError, match="max_length=16 leaves no room for a context beside 16 tokens"):
        Harness(model=path, max_length=16).generate_until([request("x", {"max_gen_toks": 16})], disable_tqdm=True)


def test_chat_templates(path):
    said = [{"role": "user", "content": "Hi"}]
    model = Harness(model=path)
    assert model.apply_chat_template(said) == "[user] Hi|[assistant] "
    assert (
        model.apply_chat_template([*said, {"role": "assistant", "content": "Well, "}], add_generation_prompt=False)
        == "[user] Hi|[assistant] Well, "
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methd": "h2o"}, "the model jaxtok has no argument methd; it has model, method"),
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a number"),
        ({"budget": "lots"}, "budget 'lots' must be"),
        ({"imports": "nowhere.py"}, "cannot import nowhere.py"),
    ],
)
def test_refused(path, options, message):
    with pytest.raises(ValueError, match=message):
        Harness(model=path, **options)


def test_what_a_compressor_cannot_do_is_refused(path):
    with pytest.raises(ValueError, match="leaves snapkv no prompt to compress"):
        Harness(model=path, method="snapkv:window=4", budget=8).loglikelihood_rolling([request("text")])


@pytest.mark.slow
def test_a_local_task_has_the_scores_of_compare(monkeypatch, tmp_path):
    script = pathlib.Path(__file__).parents[2] / "experiments" / "lm_eval_local.py"
    spec = importlib.util.spec_from_file_location("lm_eval_local", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lm_eval_local", module)
    spec.loader.exec_module(module)
    found = module.main(methods=("full", "key_diff"), budget="20%", count=4, length=120, folder=str(tmp_path))
    assert [(row["method"], row["question seen"]) for row in found] == [(m, s) for s in (True, False) for m in ("full", "key_diff")]
    assert [row["harness"] for row in found] == [row["compare"] for row in found]
    assert found[0]["harness"] == found[0]["choice"] == 1
