"""Strictness for every test, and the shared data when it is there."""

import collections
import gc
import os
import pathlib
import re
from importlib import metadata

# Tests compile far more than they compute: skip the expensive passes of the CPU compiler (the last two flags: from jaxlib 0.11 on refused).
# Set XLA_FLAGS to override.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" * metadata.version("jaxlib").startswith("0.10."),
)
# The GPU interpreter's warpgroups (jax >= 0.11.2) wait for each other in threads of XLA's pool: with one a core, two cores wait for ever.
if not metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("NPROC", "8")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # sharding laws, sequence parallelism
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def group(nodeid: str) -> str:
    """What shares compiled programs and runs in one process under `-n`: a file, or the laws of one method."""
    law = re.search(r"test_law(?:_of_rows)?\[(.*)-\w+\]$", nodeid)
    return law[1] if law else nodeid.partition("::")[0]


# Groups that take longest (see the list at the end of a run), begun first, so that no process is left alone with one.
LONG = ("tests/test_transforms.py", "tests/evals/test_compare.py", "tests/methods/test_kvpress_more.py", "tests/evals/test_batched.py",
        "tests/experiments/test_training_scripts.py", "tests/test_hostile.py", "tests/decode/test_turns.py", "tests/models/test_decoder.py",
        "tests/models/test_published_sizes.py", "tests/methods/test_kvpress.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: group(item.nodeid) not in LONG)


def pytest_configure(config):
    if hasattr(config.option, "maxworkerrestart"):
        config.option.maxworkerrestart = "0"  # a crash is a failure


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by the number of tests
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group
    return scheduler


def pytest_collection_finish():
    """The collector need not walk through what stays for good."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    """Between groups compiled programs and what was traced are let go before a process holds too much: memory maps (65,530 on Linux, where
    the compiler would crash), bytes, and objects that the collector walks through."""
    if nextitem is not None and group(nextitem.nodeid) == group(item.nodeid):
        return
    own = pathlib.Path("/proc/self")
    if not (own / "maps").exists():
        return
    maps, resident = (own / "maps").read_bytes().count(b"\n"), int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if maps > 5_000 or resident > 1.5e9:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """The exemptions from the laws, and where the time went: methods in their laws, files."""
    methods, files = collections.Counter(), collections.Counter()
    for report in (r for kind in ("passed", "failed", "") for r in terminalreporter.stats.get(kind, [])):
        files[report.nodeid.split("::")[0]] += report.duration
        if "::test_law" in report.nodeid and "[" in report.nodeid:
            methods[group(report.nodeid)] += report.duration
    if methods:
        from tests.methods.test_laws import EXEMPT

        terminalreporter.section("laws")
        for (label, law), reason in EXEMPT.items():
            terminalreporter.line(f"exempt: {label}: {law}: {reason}")
    for what, seconds in filter(all, (("methods in their laws", methods), ("files", files))):
        terminalreporter.line(f"slowest {what}: " + ", ".join(f"{name} {t:.0f} s" for name, t in seconds.most_common(20)))


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The shared data folder: $JAXTOK_DATA, else data/ beside pyproject.toml; the test skips without it."""
    path = pathlib.Path(os.environ.get("JAXTOK_DATA") or pathlib.Path(__file__).parents[1] / "data")
    if not path.is_dir():
        pytest.skip("needs the shared data folder: set JAXTOK_DATA")
    return path
