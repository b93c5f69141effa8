"""Every check names the value and the cure."""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.core import check
from jaxtok.core.types import DensePlan, Plan


def test_at_least():
    check.at_least("window", 3, 3)
    for bad in (2, math.nan):
        with pytest.raises(ValueError, match=f"window must be >= 3, got {bad}"):
            check.at_least("window", bad, 3)


def test_between():
    check.between("ratio", 0.0, 0.0, 1.0)
    check.between("ratio", 1, 0.0, 1.0)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"ratio must be from 0.0 to 1.0, got {bad}"):
            check.between("ratio", bad, 0.0, 1.0)
    with pytest.raises(ValueError, match="got inf"):
        check.between("ratio", math.inf, 0.0, math.inf)


def test_numbers_and_kinds():
    check.count("pages", 3)
    check.count("pages", 0, 0)
    for bad, error, said in ((0, ValueError, ">= 1, got 0"), (2**31, ValueError, "<= 2147483647, got 2147483648"), (2.0, TypeError, "whole number"),
                             (True, TypeError, "got True"), ("3", TypeError, "got '3'"), (None, TypeError, "got None")):  # fmt: skip
        with pytest.raises(error, match=f"pages must be .*{said}"):
            check.count("pages", bad)
    for bad in ("x", None, (), True):
        with pytest.raises(TypeError, match="x must be a number, got"):
            check.share("x", bad)
    with pytest.raises(ValueError, match=f"got {10**400}"):  # no float, so math.isfinite would overflow
        check.between("x", 10**400, 0, 1)
    check.kind("x", 1, int)
    with pytest.raises(TypeError, match=r"x must be a int, got 1\.5"):
        check.kind("x", 1.5, int)


def test_cache():
    def kv(**changed):
        shapes = dict(k=(2, 3, 4, 5), v=(2, 3, 4, 6), pos=(2, 3, 4), bias=(2, 3, 4), seen=(2,)) | changed
        return types.SimpleNamespace(**{name: np.zeros(shape) for name, shape in shapes.items()})

    check.cache(kv())
    for bad in (dict(k=(2, 3, 5, 5)), dict(v=(2, 3, 4)), dict(pos=(2, 4)), dict(bias=(2, 3, 1)), dict(k=(2, 0, 4, 5), v=(2, 0, 4, 5), pos=(2, 0, 4), bias=(2, 0, 4))):  # fmt: skip
        with pytest.raises(ValueError, match="k, v, pos, bias, seen of a cache are"):
            check.cache(kv(**bad))


def test_one_of():
    check.one_of("kind", "max", ("max", "avg"))
    with pytest.raises(ValueError, match="kind must be one of max, avg, got 'min'"):
        check.one_of("kind", "min", ("max", "avg"))


def test_budget():
    check.budget("capacity", 1)
    check.budget("capacity", 4, protected=4)
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"capacity must be >= 1, got {bad}"):
            check.budget("capacity", bad)
    for bad in (0.5, True, None):
        with pytest.raises(TypeError, match=r"budget.capacity\(ratio, n\)"):
            check.budget("capacity", bad)
    with pytest.raises(ValueError, match="capacity=4 has no room for the 5 protected rows; raise capacity"):
        check.budget("capacity", 4, protected=5)


def test_plan():
    index, lost = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2,), jnp.int32)
    check.plan(Plan(index, index, None, lost))
    check.plan(DensePlan(jnp.zeros((2, 3, 4))))
    for bad in (Plan(index, index[0], None, lost), Plan(index, index, None, lost[:, None]), Plan(index, index, index[:1], lost)):
        with pytest.raises(ValueError, match="the arrays of a plan are"):
            check.plan(bad)
