"""Two real processes on localhost: the result of one, and an end within a minute when the other is killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxtok import cli
from jaxtok.parallel import launch

SCRIPT = pathlib.Path(__file__).with_name("joint.py")
ROOT = pathlib.Path(__file__).parents[2]


def environment(devices):
    keep = {k: v for k, v in os.environ.items() if k not in launch.ENVIRONMENT}
    return keep | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def begin(where, process, *arguments):
    command = [sys.executable, "-m", "jaxtok", "launch", "--coordinator", where, "--processes", "2", "--process", str(process)]
    return subprocess.Popen(
        [*command, "--", str(SCRIPT), *arguments], env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def test_two_processes_give_what_one_gives():
    alone = subprocess.run([sys.executable, str(SCRIPT)], env=environment(4), capture_output=True, text=True, timeout=300)
    command = [sys.executable, "-m", "jaxtok", "launch", "--local", "2", "--devices", "2", str(SCRIPT)]
    both = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    assert both.returncode == 0, both.stderr
    said = [line for line in both.stdout.splitlines() if line.startswith("{")]
    assert len(said) == 1, both.stdout  # process 0 alone
    one, two = json.loads(alone.stdout), json.loads(said[0])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["ids"] == two["ids"]
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-6)
    assert two["losses"][1] < two["losses"][0]


def test_a_script_that_fails_ends_the_launch(tmp_path):
    """With its own traceback, and exit code 2; the other process does not wait for ever."""
    script = tmp_path / "fails.py"
    script.write_text("import jax, time\nif jax.process_index():\n    raise ValueError('no such book')\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "jaxtok", "launch", "--local", "2", "--devices", "1", str(script)]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "no such book" in done.stderr and "a process ended with exit code 1" in done.stderr


def test_a_killed_process_ends_the_other_within_a_minute():
    where = free()
    both = [begin(where, i, "wait") for i in range(2)]
    for p in both:
        while "joined" not in p.stderr.readline():
            assert p.poll() is None
    both[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    both[1].communicate()
    _, err = both[0].communicate(timeout=60)
    assert time.monotonic() - start < 60 and both[0].returncode != 0
    assert any(word in err for word in ("heartbeat", "Connection closed", "unhealthy", "UNAVAILABLE", "disconnected")), err[-2000:]


def test_refused(monkeypatch, capsys, tmp_path):
    for name in launch.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert launch.initialize() is False
    with pytest.raises(ValueError, match="give all three, or none"):
        launch.initialize("localhost:1", 2)
    with pytest.raises(ValueError, match="must be host:port"):
        launch.initialize("localhost", 2, 0)
    with pytest.raises(ValueError, match=r"process=2 must be one of 0 \.\. 1"):
        launch.initialize("localhost:1", 2, 2)
    monkeypatch.setenv("JAXTOK_PROCESSES", "two")
    with pytest.raises(ValueError, match="coordinator=None"):
        launch.initialize()
    monkeypatch.delenv("JAXTOK_PROCESSES")
    assert cli.main(["launch", str(tmp_path / "none.py")]) == 2
    assert "no such script" in capsys.readouterr().err
