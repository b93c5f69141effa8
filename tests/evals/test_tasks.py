"""Cases hold what they promise: the answer once, at its depth, in the length asked; keys of training and evaluation never meet."""

import json
import math
import re

import numpy as np
import pytest

from jaxtok.evals import ruler, tasks, threads, wording

NEEDLES = ("needle", "multi_key", "multi_value", "multi_query")
RETRIEVAL = (*NEEDLES, "kv_recall")
UNIT = {"kv_recall": 14, "common_words": 8, "frequent_words": 60}  # the step, in characters, in which a filler grows; 1 = characters
UNIT |= dict.fromkeys(threads.TASKS, 80)


def words(text: str) -> list[int]:
    """A tokenizer that is not additive: words, with 7 letters at most a token, so that joining texts merges tokens."""
    return [len(p) for w in re.findall(r"\S+", text) for p in re.findall(r".{1,7}", w)]


@pytest.mark.parametrize("template", ["short", "ruler"])
@pytest.mark.parametrize("task", RETRIEVAL)
def test_answers_stand_in_the_context_exactly_once_beside_their_key(task, template):
    for e in tasks.examples(task, 20, length=1500, template=template):
        asked = re.findall(r"[a-z]{4,6}(?==)|(?<=\) )[a-z]{4,6}|[a-z]+-[a-z-]+", e.question)
        assert asked
        for answer in e.answers:
            assert e.context.count(answer) == 1
            before = e.context[: e.context.index(answer)]
            assert any(before.endswith((f"{k}=", f"{k} is: ")) for k in asked)
        assert len(set(e.answers)) == len(e.answers)
        assert not any(a in e.question for a in e.answers)


@pytest.mark.parametrize("template", ["short", "ruler"])
@pytest.mark.parametrize("encode", [tasks.chars, words], ids=["chars", "words"])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_length_is_at_most_the_one_asked_and_close(task, encode, template):
    length = 600 if encode is words else 2600
    options = {"common": 2, "times": 6, "rare": 1} if task == "common_words" else {}
    for e in tasks.examples(task, 5, length=length, encode=encode, template=template, **options):
        assert e.length == len(encode(e.context)) + len(encode(e.question))
        assert length - max(60, UNIT.get(task, 1)) <= e.length <= length
        if encode is tasks.chars and task not in UNIT:
            assert e.length == length
        assert e.max_new >= max(len(encode(a)) for a in e.answers)


@pytest.mark.parametrize("task", RETRIEVAL)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_asked_fact_stands_at_the_depth(task, depth):
    for e in tasks.examples(task, 10, length=3000, depth=depth):
        assert e.depth == e.context.index(e.answers[0]) / len(e.context)
        assert abs(e.depth - depth) < 0.05


def test_depths_are_uniform_by_default():
    found = [e.depth for e in tasks.examples("needle", 200, length=400)]
    assert abs(np.mean(found) - 0.5) < 0.06 and np.quantile(found, 0.1) < 0.2 and np.quantile(found, 0.9) > 0.8


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_case_is_a_function_of_seed_and_index(task):
    make = lambda n, seed: tasks.examples(task, n, length=900, seed=seed)
    many, few, other = make(6, 3), make(3, 3), make(6, 4)
    same = lambda a, b: a[:4] == b[:4] and a.length == b.length
    assert all(same(a, b) or (math.isnan(a.depth) and a[:3] == b[:3]) for a, b in zip(few, many, strict=False))
    assert all(a.context != b.context and a.answers != b.answers for a, b in zip(many, other, strict=True))
    assert len({e.context for e in many}) == 6


def test_keys_of_training_and_evaluation_never_meet():
    train, held = (set(wording.word_keys(np.random.default_rng(0), 20_000, s)) for s in ("train", "eval"))
    assert len(train) == len(held) == 20_000 and not train & held
    checksum = lambda k: sum(map(ord, k)) - ord("a") * len(k)
    assert all(checksum(k) % 4 == 0 for k in held) and all(checksum(k) % 4 for k in train)
    for split in ("train", "eval"):
        for e in tasks.examples("kv_recall", 5, length=1000, split=split):
            keys = re.findall(r"([a-z]+)=", e.context)
            assert len(keys) > 60 and len(set(keys)) == len(keys)
            assert all((checksum(k) % 4 == 0) == (split == "eval") for k in keys)


def test_short_wording_word_by_word():
    t = tasks.TEMPLATES["short"]
    assert t.fact("mako", "528") == " Remember mako=528."
    assert t.ask(["mako"], False) == "\nRemember mako="
    assert t.ask(["mako", "tiru"], False) == "\nRecall (a) mako= (b) tiru=: (a) mako="
    assert t.reply(["mako", "tiru"], ["528", "991"]) == "528 (b) tiru=991"
    e = tasks.examples("multi_query", 1, length=500)[0]
    # the question is a prefix of a fact: key and "=" are what stood before the answer
    assert f"Remember {e.question.rsplit(' ', 1)[1]}{e.answers[0]}." in e.context


def test_multi_value_asks_all_the_values_of_one_key():
    for e in tasks.examples("multi_value", 10, length=700, asked=3, needles=6):
        key = e.question.rsplit(" ", 1)[1][:-1]
        assert sorted(re.findall(rf" Remember {key}=(\d+)\.", e.context)) == sorted(e.answers) and len(e.answers) == 3
        assert len(re.findall(r" Remember [a-z]+=", e.context)) == 6


def test_multi_key_hides_as_many_facts_as_asked():
    for n in (2, 8, 15):
        e = tasks.examples("multi_key", 1, length=800, needles=n)[0]
        assert len(re.findall(r" Remember [a-z]+=\d{3}\.", e.context)) == n


@pytest.mark.parametrize("template", ["short", "ruler"])
def test_variable_tracking_chains_to_the_value(template):
    for e in tasks.examples("variable_tracking", 5, length=1200, template=template, hops=3):
        value = re.findall(r"\d{3,5}", e.question)[0]
        links = re.findall(r"(?:Remember|VAR) (\w+) ?= ?(?:VAR )?(\w+)\.", e.context)
        assert [v for v, _ in links] == list(e.answers) and len(links) == 4
        assert [s for _, s in links] == [value, *e.answers[:-1]]


def test_common_words_are_the_common_ones():
    e = tasks.examples("common_words", 1, length=1000, common=3, times=5, rare=2)[0]
    counts = {w: e.context.split().count(w) for w in e.context.split()}
    assert {w for w, c in counts.items() if c == 5} == set(e.answers) and set(counts.values()) == {5, 2}


@pytest.mark.parametrize("length", [400, 4000])
def test_frequent_words_are_in_strict_order_of_frequency(length):
    for e in tasks.examples("frequent_words", 5, length=length):
        text = [w for w in e.context.split() if w != "..."]
        counts = sorted(((text.count(w), w) for w in set(text)), reverse=True)
        assert [w for _, w in counts[:3]] == list(e.answers)
        assert counts[0][0] > counts[1][0] > counts[2][0] > counts[3][0]


def test_needle_grid_is_lengths_by_depths():
    grid = tasks.needle_grid(2, lengths=(300, 600), depths=(0.0, 1.0))
    assert [e.length for e in grid] == [300] * 4 + [600] * 4
    assert [round(e.depth) for e in grid] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_own_haystack_is_used_and_repeated_when_short():
    e = tasks.examples("needle", 1, length=900, text="one two three four five. ")[0]
    assert re.sub(r" Remember [a-z]+=\d{3}\.", "", e.context).replace("one two three four five. ", "").count("t") <= 4


def test_an_answer_is_never_taken_from_numbers_in_the_haystack():
    text = " ".join(f"{i:03d}" for i in range(0, 1000, 2))  # half of all values
    for e in tasks.examples("needle", 10, length=20_000, text=text):
        assert e.context.count(e.answers[0]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "nedle"}, "nedle.*needle"),
        ({"length": 20}, "length=20.*raise length"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"template": "long"}, "long.*short, ruler"),
        ({"split": "test"}, "test.*train, eval"),
        ({"needles": 3}, "needle has no option needles"),
        ({"text": " "}, "haystack"),
    ],
)
def test_wrong_arguments_name_the_cure(options, message):
    task = options.pop("task", "needle")
    with pytest.raises(ValueError, match=message):
        tasks.examples(task, 1, **{"length": 300, **options})


def test_too_many_values_for_their_digits():
    assert len(set(wording.values(np.random.default_rng(0), 4000, 4))) == 4000
    with pytest.raises(ValueError, match="digits=6"):
        wording.values(np.random.default_rng(0), 9000, 4)


def test_jsonl_reader_on_a_written_file(tmp_path):
    path = tmp_path / "niah_mine.jsonl"
    rows = [
        {"index": 0, "input": "Some text. The magic is 71.\nMore.\nWhat is the magic? The magic is", "outputs": ["71"], "length": 19},
        {"input": "a b\n\nQuestion: which?", "outputs": ["x", "yy"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = ruler.read_jsonl(path)
    assert (first.context, first.question) == ("Some text. The magic is 71.\nMore.", "\nWhat is the magic? The magic is")
    assert first.answers == ("71",) and first.length == 19 and first.task == "niah_mine" and first.max_new == 128
    assert first.depth == pytest.approx(24 / 33)
    assert second.context + second.question == rows[1]["input"] and second.length == -1 and math.isnan(second.depth)
    assert ruler.read_jsonl(path, encode=tasks.chars)[1].length == len(rows[1]["input"])
    assert len(ruler.read_jsonl(path, limit=1)) == 1


@pytest.mark.parametrize("line", ["{", '{"input": "x"}', '{"input": "x", "outputs": []}', '{"input": "x", "outputs": "y"}', "[1]"])
def test_jsonl_reader_names_the_bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input": "x\\ny", "outputs": ["z"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2 "):
        ruler.read_jsonl(path)
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        ruler.read_jsonl(tmp_path / "gone.jsonl")


def test_jsonl_reader_on_rulers_own_rows(data):
    folder = data / "ruler_llama3_4096"
    for name, start in (
        ("niah_single_2", "What is the special magic number for "),
        ("vt", "Question: Find all"),
        ("fwe", "Question: Do not"),
    ):
        rows = ruler.read_jsonl(folder / f"{name}.jsonl")
        assert rows and all(e.question.startswith("\n" + start) and e.length > 3000 for e in rows)
        assert all(a in e.context for e in rows for a in e.answers)
        assert all(0 < e.depth < 1 for e in rows)


def test_jsonl_written_is_read_back(tmp_path):
    made = tasks.examples("multi_query", 3, length=400)
    ruler.write_jsonl(tmp_path / "multi_query.jsonl", made)
    same = lambda e: (e.context, e.question, e.answers, e.depth, e.length, e.task)
    assert list(map(same, ruler.read_jsonl(tmp_path / "multi_query.jsonl"))) == list(map(same, made))


def test_scores():
    assert tasks.string_match("It is ABC and 12.", ["abc", "12", "7"]) == pytest.approx(2 / 3)
    assert tasks.exact_first(" 528 (b)", ["528", "1"]) == 1.0
    assert tasks.exact_first("52", ["528"]) == 0.0 and tasks.exact_first("1528", ["528"]) == 0.0


def test_the_haystack_ships_and_is_plain():
    text = tasks.haystack()
    assert len(text) > 140_000 and set(text) <= set("\n" + "".join(map(chr, range(32, 127))))
    assert not re.search(r"\bRemember [a-z]+=", text)
