"""The rule that chooses a program."""

import jax
import jax.numpy as jnp
import pytest

from jaxtok.ops import _impl


def test_auto_takes_what_was_measured_here(monkeypatch):
    kind = jax.devices()[0].device_kind
    assert _impl.chosen("flash", "auto") == "xla"  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _impl.chosen("flash", "auto") == "xla"  # never measured
    monkeypatch.setattr(_impl, "table", lambda: {kind: {"flash": {"block_q": 64}}})
    assert _impl.settings("flash") == {"block_q": 64} and _impl.settings("read") is None
    assert _impl.chosen("flash", "auto") == "pallas_tpu" and _impl.chosen("read", "auto") == "xla"
    assert _impl.chosen("flash", "auto", "its window is traced") == "xla"
    assert _impl.chosen("flash", "auto", unfit=("pallas_tpu",)) == "xla"
    assert _impl.chosen("flash", "xla") == "xla" and _impl.chosen("read", "interpret") == "interpret"


def test_what_a_platform_does_not_take():
    x = lambda dtype, d: jnp.zeros((1, 1, 1, d), dtype)
    assert _impl.unfit(x(jnp.bfloat16, 128)) == ()
    assert _impl.unfit(x(jnp.float32, 64)) == ("pallas_gpu",)
    assert _impl.unfit(x(jnp.float16, 64), x(jnp.float16, 256)) == ("pallas_tpu", "pallas_gpu")


def test_refused():
    with pytest.raises(ValueError, match="impl is 'fast'; it must be one of auto, xla"):
        _impl.chosen("flash", "fast")
    with pytest.raises(NotImplementedError, match="impl='interpret': its window is traced; use impl='xla' or 'auto'"):
        _impl.chosen("flash", "interpret", "its window is traced")
