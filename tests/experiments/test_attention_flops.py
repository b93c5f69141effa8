"""Goals of experiments/attention_flops.py, by its own counting: programs are traced, nothing runs."""

import pytest

from experiments import attention_flops as script


@pytest.mark.parametrize("row", [row for row in script.ROWS if row.goal is not None], ids=lambda row: row.label)
def test_exponents(row):
    found = script.measure(row)
    assert found["met"] and found["exponent"] <= row.goal and found["exponent_of_pairs"] <= row.goal


def test_what_has_no_goal_is_quadratic_or_says_why():
    """Full attention, and landmark attention in training: n^2. The count is near the pairs' 4 d FLOPs, or twice that with the future's."""
    for row in script.ROWS[:2]:
        found = script.measure(row, (4096, 8192))
        assert 1.9 < found["exponent"] < 2.05
        per = [a / (b * 4 * script.H * script.D) for a, b in zip(found["flops"], found["pairs"], strict=True)]
        assert all(1.0 < x < 2.3 for x in per)


def test_pairs_by_hand():
    """Window 3 of 5 rows: 1 + 2 + 3 + 3 + 3. CCA, group 2, window 2: rows 1 to 6 see 1, 2, 3, 3, 4, 4. Segments of 2: 1, 1, 2, 2, 3."""
    assert script.seen(5, 3) == 12 and script.seen(3, 9) == 6
    assert script.cca(6, 2, 2) == 1 + 2 + 3 + 3 + 4 + 4
    assert script.scout(5, 2, 0.0) == 1 + 1 + 2 + 2 + 3
    assert script.routed(64, 4, 2) == 64 * 2 * 4 + 256


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LENGTHS", (1024, 2048))
    monkeypatch.setattr(script, "ROWS", (script.ROWS[0], script.ROWS[-1]))
    rows = [script.measure(row, (1024, 2048)) for row in script.ROWS]
    text = script.markdown({"lengths": (1024, 2048), "rows": rows})
    assert "| full causal attention |" in text and "<= 1.1: met" in text
