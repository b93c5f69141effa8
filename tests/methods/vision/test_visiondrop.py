"""VisionDrop's encoder stage against its formulas, the official outputs and its limits."""

import numpy as np
import pytest

from jaxtok.core.types import Evidence
from jaxtok.methods import FasterVLM, VisionDropSelect
from tests.methods.golden import cases
from tests.methods.vision.select import best, images, kept, left

small = {"visiondrop.select": lambda n: VisionDropSelect(capacity=n, contextual=3)}


def reference(x, cls, metric, dominant, contextual):
    """Rows of x [1+n c]: class row and dominant ones in raster order, then the merged targets."""
    top = [0] + [1 + j for j in best(cls.sum(0)[1:], dominant)]
    rest = np.array([j for j in range(1, len(x)) if j not in top])
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    targets = rest[np.arange(contextual) * max(len(rest) // contextual, 1)]
    others = np.setdiff1d(rest, targets)
    to = np.argmax(unit[others] @ unit[targets].T, 1)
    merged = [x[t] + (x[others[to == i]].mean(0) if (to == i).any() else 0) for i, t in enumerate(targets)]
    return np.array([*x[top], *merged])


@pytest.mark.parametrize("dominant, contextual", [(5, 3), (2, 6)])
def test_reference(dominant, contextual):
    rng = np.random.default_rng(dominant)
    x, cls = rng.normal(size=(1, 18, 4)).astype(np.float32), rng.uniform(size=(1, 2, 18)).astype(np.float32)
    keys = rng.normal(size=(1, 2, 18, 3)).astype(np.float32)
    out = left(VisionDropSelect(capacity=dominant + contextual, contextual=contextual), images(x), Evidence(cls=cls, keys=keys))
    np.testing.assert_allclose(out.x[0], reference(x[0], cls[0], keys[0].mean(0), dominant, contextual), atol=1e-5)


def test_no_contextual_rows_leave_the_dominant_ones():
    rng = np.random.default_rng(1)
    x, cls = rng.normal(size=(1, 18, 4)).astype(np.float32), rng.uniform(size=(1, 2, 18)).astype(np.float32)
    want = kept(FasterVLM(capacity=5), images(x), Evidence(cls=cls))
    out = left(VisionDropSelect(capacity=5, contextual=0), images(x), Evidence(cls=cls, keys=cls[..., None]))
    np.testing.assert_allclose(out.x[0], x[0, want])


def test_room_for_all_rows_is_the_identity():
    rng = np.random.default_rng(2)
    x, cls = rng.normal(size=(1, 12, 4)).astype(np.float32), rng.uniform(size=(1, 2, 12)).astype(np.float32)
    out = left(VisionDropSelect(capacity=17, contextual=4), images(x), Evidence(cls=cls, keys=cls[..., None]))
    np.testing.assert_allclose(out.x[0], x[0])


def test_official_outputs(data):
    for case in cases(data, "visiondrop_vit"):
        d, c, x = int(case["dominant_patches"]), int(case["contextual"]), case["hidden_layer_minus2"]
        if not c:
            continue  # divides by zero
        evidence = Evidence(cls=case["cls_attn_layer22"], keys=case["key_metric_layer22_head_mean"][:, None])
        out = left(VisionDropSelect(capacity=d + c, contextual=c), images(x), evidence)
        np.testing.assert_allclose(out.x, case["out_tokens"], atol=1e-5)
