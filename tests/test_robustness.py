"""A small sample of experiments/robustness.py: awkward values and wrong arguments, the same in every run."""

import zlib

import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from experiments import robustness
from tests import calls


def failures(names, most, **given):
    """What `most` calls of each function came to."""
    out, counts = [], []
    for name in names:
        counts.append(robustness.exercise(name, most, seed=zlib.crc32(name.encode()), **given))
        out += counts[-1].failures
    assert sum(c.calls for c in counts) == most * len(counts)
    return out


def test_every_public_function_and_method_has_a_case():
    assert not calls.missing(), "give it a case in tests/calls/core.py or ops.py; a method, `small` in its own test file"


def test_static_arguments():
    assert not failures(calls.PLAIN, 8)


@pytest.mark.parametrize("part", range(2))
def test_spoiled_arguments(part):
    names = [name for name in calls.CASES if zlib.crc32(name.encode()) % 2 == part]
    assert not failures(names, 4, way=0, sets=calls.SETS[:8])


def test_awkward_values():
    """One function in three on one shape set: compiling is what takes time."""
    names = [name for name in calls.CASES if zlib.crc32(name.encode()) % 3 == 0]
    assert not failures(names, 6, way=1, sets=calls.SETS[:1])


def test_the_script_counts_and_sees(monkeypatch):
    """A NaN, an infinity, an error of a right call and a forbidden error are failures."""

    def broken(x, kind):
        if kind == "raises":
            raise ValueError("x is 3")
        return {"nan": x / x, "inf": 1 / (x * 0 + 0.0), "fine": x}[kind]

    def made(kind):
        return lambda s: calls.Case(broken, lambda v: {"x": jnp.zeros((2,)) + 0.0}, {"kind": kind})

    for kind, field in (("nan", "nans"), ("inf", "infinities"), ("raises", "forbidden"), ("fine", None)):
        monkeypatch.setitem(calls.CASES, f"core.{kind}", made(kind))
        count = robustness.exercise(f"core.{kind}", 3, 0, way=1)
        assert count.calls == 3 and bool(count.failures) == (field is not None) and (field is None or getattr(count, field) == 3)
    for error, field in ((KeyError("x"), "forbidden"), (ValueError("x is 3"), None)):

        def fails(x, error=error):
            raise error

        monkeypatch.setitem(calls.PLAIN, "core.fails", lambda draw, fails=fails: (fails, (draw(st.integers()),), {}))
        count = robustness.exercise("core.fails", 3, 0)
        assert bool(count.failures) == (field is not None) and (field is None or getattr(count, field) == 3)
