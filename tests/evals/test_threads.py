"""Every threading case is solved by a solver that reads the context and the question alone."""

import collections
import itertools
import json
import re

import pytest

from jaxtok.evals import tasks, threads
from tests.evals.test_tasks import words

LENGTH = {"short": 600, "ruler": 2600}
BOTH = pytest.mark.parametrize("template", ["short", "ruler"])


def pairs(e, template):
    """[(key, value), ...] as they stand in the context."""
    if template == "ruler":
        return json.loads(e.context, object_pairs_hook=list)
    assert re.fullmatch(r"([^=, ]+=[^=, ]+, )+", e.context)
    return [tuple(p.split("=")) for p in e.context.split(", ")[:-1]]


def asked(e, template):
    """The keys that the question names, in its order."""
    if template == "ruler":
        return re.findall(r'"([0-9a-f-]{36})"', e.question)
    return list(dict.fromkeys(re.findall(r"([a-z]{5})=", e.question)))


def walks(table, key):
    """All ways from a key to a value that is no key, as lists of names."""
    return [[key, *rest] for value in table[key] for rest in (walks(table, value) if value in table else [[value]])]


def table_of(rows):
    table = collections.defaultdict(list)
    for key, value in rows:
        table[key].append(value)
    return table


@BOTH
@pytest.mark.parametrize("task", threads.TASKS)
def test_a_solver_finds_the_answers(task, template):
    for e in tasks.examples(task, 12, length=LENGTH[template], template=template):
        rows, starts = pairs(e, template), asked(e, template)
        table = table_of(rows)
        if task == "conditional_needle":
            assert not starts and tuple(v for k, v in rows if "*" in k) == e.answers and len(e.answers) == 4
        elif task in ("single_needle", "multi_needle"):
            assert tuple(table[k][0] for k in starts) == e.answers
        else:
            found = [sorted(walks(table, k), key=len) for k in starts]
            assert tuple(ways[-1][-1] for ways in found) == e.answers
            links = 4 if task == "multi_thread" else 5
            assert all(len(ways[-1]) == links + 1 for ways in found)
            assert all(len(ways) == 1 or len(ways[-2]) < len(ways[-1]) for ways in found)  # one is the longest
            assert len(found) == (3 if task == "multi_thread" else 1)
        assert not any(a in e.question for a in e.answers)
        assert all(e.context.count(a) == 1 for a in e.answers) and len(set(e.answers)) == len(e.answers)


@BOTH
@pytest.mark.parametrize("task", threads.TASKS)
def test_keys_and_values_are_all_different(task, template):
    e = tasks.examples(task, 1, length=4 * LENGTH[template], template=template)[0]
    rows = pairs(e, template)
    keys, vals = [k for k, _ in rows], [v for _, v in rows]
    if task == "branched_thread":
        many = [k for k, n in collections.Counter(keys).items() if n > 1]
        assert len(many) == 4 and all(keys.count(k) == 2 for k in many)
    else:
        assert len(set(keys)) == len(keys)
    if task.endswith("thread") or template == "ruler":
        assert len(set(zip(keys, vals, strict=True))) == len(rows) and max(collections.Counter(vals).values()) == 1
    if task.endswith("thread"):  # nothing but its links tells a thread's pairs: all names look alike, others lead nowhere
        assert len({len(x) for x in keys + vals}) == 1
        linked = sum(v in set(keys) for v in vals)
        assert linked == {"thread": 4, "multi_thread": 9, "branched_thread": 4}[task]


@BOTH
@pytest.mark.parametrize("direction", threads.DIRECTIONS)
def test_direction(direction, template):
    seen = set()
    for e in tasks.examples("thread", 10, length=LENGTH[template], template=template, direction=direction):
        rows = pairs(e, template)
        (way,) = walks(table_of(rows), asked(e, template)[0])
        where = [rows.index(pair) for pair in itertools.pairwise(way)]
        seen.add("forward" if where == sorted(where) else "backward" if where == sorted(where)[::-1] else "random")
    assert seen == {direction} if direction != "random" else "random" in seen


@BOTH
def test_options_count_what_they_say(template):
    make = lambda task, **options: tasks.examples(task, 1, length=2 * LENGTH[template], template=template, **options)[0]
    e = make("thread", links=9)
    assert len(walks(table_of(pairs(e, template)), asked(e, template)[0])[0]) == 10
    e = make("thread", links=1)
    assert dict(pairs(e, template))[asked(e, template)[0]] == e.answers[0]
    e = make("multi_thread", threads=4, links=2)
    assert len(e.answers) == len(asked(e, template)) == 4
    e = make("branched_thread", branches=3, links=3)
    assert len(walks(table_of(pairs(e, template)), asked(e, template)[0])) == 5
    assert len(make("multi_needle", needles=6).answers) == 6
    e = make("conditional_needle", needles=3, mark="#")
    assert sum("#" in k for k, _ in pairs(e, template)) == 3 and "#" in e.question


@pytest.mark.parametrize("task", ["multi_needle", "conditional_needle"])
def test_clusters(task):
    for clustered in (True, False):
        spread = []
        for e in tasks.examples(task, 8, length=900, clustered=clustered, depth=0.5):
            at = sorted([v for _, v in pairs(e, "short")].index(a) for a in e.answers)
            spread.append(at[-1] - at[0])
        assert (set(spread) == {3}) == clustered


def test_depth_places_the_needle():
    for depth in (0.0, 0.4, 1.0):
        e = tasks.examples("single_needle", 1, length=2000, depth=depth)[0]
        assert abs(e.depth - depth) < 0.02


@pytest.mark.parametrize("encode", [tasks.chars, words], ids=["chars", "words"])
@pytest.mark.parametrize("length", [1500, 5000])
def test_lengths_are_obeyed_and_filled(encode, length):
    for task in threads.TASKS:
        for e in tasks.examples(task, 2, length=length, encode=encode, template="ruler"):
            row = len(encode('"' + "0" * 36 + '": "' + "0" * 36 + '", '))
            assert length - row - 1 <= e.length <= length and e.length == len(encode(e.context)) + len(encode(e.question))


def test_keys_of_the_short_wording_keep_to_their_split():
    checksum = lambda k: sum(map(ord, k)) - ord("a") * len(k)
    for split in ("train", "eval"):
        e = tasks.examples("thread", 1, length=800, split=split)[0]
        assert all((checksum(x) % 4 == 0) == (split == "eval") for pair in pairs(e, "short") for x in pair)


def test_short_wording_word_by_word():
    hay = threads.HAYSTACKS["short"]
    assert hay.asked(["mako"]) == "\nRemember mako=" and hay.followed(["mako"]) == "\nFollow mako="
    assert hay.followed(["mako", "tiru"]) == "\nFollow (a) mako= (b) tiru=: (a) mako="
    assert hay.reply(["mako", "tiru"], ["pelo", "kira"]) == "pelo (b) tiru=kira" and hay.reply([], ["1", "2"]) == "1 2"


def test_replies_take_what_max_new_says():
    e = tasks.examples("multi_thread", 1, length=2600, template="ruler")[0]
    assert e.max_new == len('", "'.join(e.answers)) + 1 and tasks.string_match('", "'.join(e.answers), e.answers) == 1
    assert tasks.string_match(e.answers[0], e.answers) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("thread", {"direction": "up"}, "up.*forward, backward, random"),
        ("thread", {"links": 0}, "links.*0"),
        ("multi_thread", {"threads": 0}, "threads.*0"),
        ("branched_thread", {"branches": 1}, "branches.*1"),
        ("branched_thread", {"links": 1}, "links.*1"),
        ("multi_needle", {"needles": 0}, "needles.*0"),
        ("multi_needle", {"needles": 600}, "600 values"),
        ("conditional_needle", {"mark": "a"}, "mark='a'"),
        ("conditional_needle", {"mark": "**"}, "mark="),
        ("thread", {"needles": 2}, "thread has no option needles; it has: direction, links"),
        ("thread", {"length": 60}, "length=60.*raise length"),
    ],
)
def test_wrong_options_name_the_cure(task, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.examples(task, 1, **{"length": 700, **options})
