"""A run killed with SIGKILL, twice, and resumed is the unbroken run: same parameters, bit for bit, same log."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def start(*args):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "train" / "killable.py"), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def steps(directory):
    return {p.name for p in directory.iterdir() if p.name.isdigit()}


def lines(directory):
    out = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall"} for line in out]


def test_killed_in_a_step_and_in_a_save(tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    unbroken = start(whole, tmp_path / "whole.npz")

    code, _, err = finish(start(broken, tmp_path / "broken.npz", "batch", 22))
    assert code == -signal.SIGKILL, err
    assert steps(broken) == {"15"}
    assert max(line["step"] for line in lines(broken)) > 15  # lines that the resumed run must drop

    code, out, err = finish(start(broken, tmp_path / "broken.npz", "save", 30))
    assert code == -signal.SIGKILL, err
    assert out == "restored 15\n"
    left = [p.name for p in broken.iterdir() if p.name.startswith("30.")]
    assert left and steps(broken) == {"15"}, "the kill must come in the middle of the save"

    code, out, err = finish(start(broken, tmp_path / "broken.npz"))
    assert code == 0, err
    assert out == "restored 15\n"
    assert steps(broken) == {"45", "50"} and not any(p.name in left for p in broken.iterdir())

    code, out, err = finish(unbroken)
    assert code == 0 and out == "", err
    with np.load(tmp_path / "whole.npz") as a, np.load(tmp_path / "broken.npz") as b:
        assert a.files == b.files and len(a.files) > 6
        for name in a.files:
            assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
    assert [line["step"] for line in lines(broken)] == list(range(1, 51))
    assert lines(broken) == lines(whole)
    wall = [json.loads(line)["wall"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert wall == sorted(wall)  # goes on over resumes
