"""The script that weighs sparse prefills, on a model that has learned nothing."""

import jax
import numpy as np
import pytest

from jaxtok.methods import SALE
from jaxtok.models import blocks
from jaxtok.models.config import Config
from tests.experiments.test_training_scripts import script

CFG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=16)


@pytest.fixture
def made(monkeypatch):
    return script("prefill_sparsity", monkeypatch)


def test_thresholds_by_head_bound_the_error(made):
    """A looser bound reads fewer blocks; a bound of nothing reads all and errs by nothing."""
    params = blocks.init(CFG, jax.random.key(0), embed_std=1.0)
    ids = np.random.default_rng(0).integers(0, 32, (2, 64)).astype(np.int32)
    rows = [ids, np.ones(ids.shape, bool)]
    method, found = SALE(capacity=64, local=4, segment=4, block_q=8, block_k=4, tile=4, least=0), []
    for theta in (1e-6, 0.5, 100.0):
        row, learned = made.measured(CFG, params, f"sale 64 theta={theta}", method, rows, rows)
        assert np.shape(row["taus"]) == learned["tau"].shape == (2, 4) and row["lost"] == 0
        found.append(row)
    assert found[0]["density"] == 1 and found[0]["error"] < 1e-5
    assert found[0]["density"] >= found[1]["density"] > found[2]["density"]


def test_times(made, tmp_path):
    where = tmp_path / "results.json"
    done = made.main(made.Options(parts=("times",), lengths=(128, 256), repeats=1, sides=("full", "dhsa:a"), out=where))
    assert (
        where.is_file() and set(done["times"]["exponent"]) == {"full", "dhsa:a"} and list(done["times"]["below_dense_from"]) == ["dhsa:a"]
    )


def test_labels_are_settings(made):
    """Each setting has a name of its own, and room for what it forces."""
    wanted = made.settings((640, 256), (2048, 1024), (0.004, 0.25), (1.0,), 4096, block_q=64, block_k=32, local=128, segment=128)
    assert len(wanted) == 2 * 10 + 2 * 3
