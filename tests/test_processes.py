"""Tests that a process which is forked for a test (``processes.py``) does as a new one."""

from __future__ import annotations

import pytest
from processes import Ended, environment, running

SEEN = """
import os, signal, sys, time
print(sys.argv, os.getcwd(), sys.path[:2], os.environ["GIVEN"], sorted(os.environ), __name__)
print(signal.getsignal(signal.SIGINT), sys.stdout.encoding, file=sys.stderr)
"""


ENDS = ["sys.exit(3)", "sys.exit('why')", "1 / 0", "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "os._exit(4)"]


@pytest.mark.parametrize(("how", "end"), [("-c", ""), ("-m", ""), ("file", ""), *(("-c", end) for end in ENDS)])
def test_as_a_new_one(tmp_path, how, end):
    (tmp_path / "program.py").write_text(SEEN + end)
    args = {"-c": ("-c", SEEN + end), "-m": ("-m", "program"), "file": ("program.py",)}[how]
    ended, env = [], environment(GIVEN="5")
    del env["HF_HUB_DISABLE_TELEMETRY"]
    for new in (True, False):
        with running(tmp_path, (*args, "x", 1), env, new=new, bare=True) as process:
            ended.append(process.ended())
    assert without_frames(ended[0]) == without_frames(ended[1])


def without_frames(ended: Ended) -> tuple[int | None, str, list[str]]:
    return ended.code, ended.out, [line for line in ended.err.splitlines() if not line.startswith(" ")]


def test_each_draws_its_own_numbers(tmp_path):
    drawn = set()
    for _ in range(2):
        args = ("-c", "import mlx.core as mx; print(mx.random.randint(0, 1 << 30).item())")
        with running(tmp_path, args, environment()) as process:
            drawn.add(process.ended().out)
    assert len(drawn) == 2
