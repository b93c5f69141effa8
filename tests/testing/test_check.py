"""`jaxtok.testing.check`: all laws at once. That the laws catch what they should is in tests/methods/test_laws.py."""

import pytest

import jaxtok as jt
from jaxtok import testing
from jaxtok.core.protocols import PromptMethod
from jaxtok.methods import KNorm

make = lambda capacity: KNorm(capacity=capacity)


def holds(make):
    assert make(6).capacity == 6


def fails(make):
    assert not make(6), "a reason\nover two lines"


def raises(make):
    raise TypeError("no such thing")


def cannot(make):
    raise testing.Unable("it needs another machine")


@pytest.fixture
def laws(monkeypatch):
    def put(*laws):
        monkeypatch.setattr(testing, "LAWS", {law.__name__: law for law in laws})

    return put


def test_what_holds_and_what_could_not_be_asked(laws):
    laws(holds, cannot)
    assert testing.check(make) == {"holds": "holds", "cannot": "not asked: it needs another machine"}


def test_all_broken_laws_are_named_at_once(laws):
    laws(holds, fails, raises)
    with pytest.raises(
        AssertionError, match=r"^2 of 3 laws do not hold\nfails: a reason over two lines.*\nraises: TypeError: no such thing$"
    ):
        testing.check(make)


def test_exemptions(laws):
    laws(holds, fails)
    assert testing.check(make, exempt={"fails": "by design"}) == {"holds": "holds", "fails": "exempt: by design"}
    with pytest.raises(AssertionError, match="holds: it holds, but is exempt"):
        testing.check(make, exempt={"fails": "by design", "holds": "by mistake"})
    laws(raises)
    with pytest.raises(AssertionError, match="raises: TypeError: no such thing"):  # an error is no way to differ by design
        testing.check(make, exempt={"raises": "by design"})
    laws(holds, fails)
    with pytest.raises(ValueError, match="no law nope; the laws: holds, fails"):
        testing.check(make, exempt={"nope": "?"})


def test_what_is_no_law_s_to_say(laws):
    laws(holds)
    with pytest.raises(ValueError, match="no room for the 64 protected rows"):
        testing.check(lambda capacity: jt.build("snapkv:window=64", capacity))

    class Early(PromptMethod):
        site = "prompt"

    with pytest.raises(ValueError, match=r"laws for the sites cache, policy and reader.*acts at 'prompt'"):
        testing.check(lambda capacity: Early())
