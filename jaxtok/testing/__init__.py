"""The laws of a method, for the tests of whoever writes one.

    from jaxtok.testing import LAWS, check

    check(lambda capacity: Mine(capacity=capacity))  # all of them; AssertionError says which do not hold

    @pytest.mark.parametrize("law", LAWS)  # or one test each
    def test_law(law):
        LAWS[law](lambda capacity: Mine(capacity=capacity))

The methods meet prompts of 3 to 12 tokens and capacities from 3 to 27, so a window or what is protected must be small (2 or 3). The first
law of a method compiles what the others use. A method that reduces rows (sites vit, select, layers) has ROW_LAWS; its maker takes how many
of 16 image rows are left. One law wants two devices (on a CPU: `jax.config.update("jax_num_cpu_devices", 2)` before
anything runs).
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtok.testing import rows, world
from jaxtok.testing.laws import LAWS, Unable
from jaxtok.testing.rows import LAWS as ROW_LAWS
from jaxtok.testing.world import CAP

__all__ = ["LAWS", "ROW_LAWS", "check"]

HOLDS = "holds"


def check(make: Callable[[int], Any], *, exempt: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every law on the method `make(capacity)` -> {law: "holds", or the reason why it was not asked}.

    exempt: {law: reason} for laws that the method breaks by design; one that holds nevertheless is stale, and so refused.
    AssertionError: which laws do not hold and how, one line each. ValueError for a law that is none and for a site without laws.
    """
    if not __debug__:
        raise ValueError("the laws are assertions, which python -O leaves out; run without it")
    exempt = dict(exempt or {})
    method = make(CAP)  # what fails here is no law's to say
    laws = ROW_LAWS if getattr(method, "site", None) in ("vit", "select", "layers") else LAWS
    if not exempt.keys() <= laws.keys():
        raise ValueError(f"no law {', '.join(sorted(exempt.keys() - laws.keys()))}; the laws: {', '.join(laws)}")
    (rows if laws is ROW_LAWS else world).recipe_of(method)
    found, broken = {}, []
    for name, law in laws.items():
        try:
            law(make)
        except Unable as e:
            found[name] = f"not asked: {e}"
        except Exception as e:  # whatever a method raises breaks the law
            if name in exempt and isinstance(e, AssertionError):
                found[name] = f"exempt: {exempt[name]}"
            else:
                what = "" if isinstance(e, AssertionError) else f"{type(e).__name__}: "
                broken.append(f"{name}: {what}{' '.join(str(e).split())}")
        else:
            found[name] = HOLDS
            if name in exempt:
                broken.append(f"{name}: it holds, but is exempt ({exempt[name]}); take the exemption out")
    if broken:
        raise AssertionError(f"{len(broken)} of {len(laws)} laws do not hold\n" + "\n".join(broken))
    return found
