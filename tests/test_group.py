"""Tests of the processes that share a model: what they agree on, who speaks, and that they end together."""

from __future__ import annotations

import pytest
from launching import launch

from glass_mlx import group
from glass_mlx.errors import GlassError

# What every process runs: ``work`` is the case's. Who waits for another one in an exchange takes up a core.
PROGRAM = """
import logging, os, sys, threading
import mlx.core as mx
from glass_mlx import group
from glass_mlx.errors import GlassError
from glass_mlx.group import *
from glass_mlx.group import perform

def exchange():
    mx.eval(mx.distributed.all_sum(mx.ones((8,))))

def work():
{work}

perform(together(work))
print("after", rank())
"""
# Where one process alone ends, or fails: the others may notice sooner, and it need not wait long for them to end first.
SOONER = PROGRAM.replace("\nperform", "\ngroup._INTERVAL, group._GRACE = 0.05, 0.4\nperform")


@pytest.fixture
def run(tmp_path):
    """Run work in some processes; how they ended."""

    def run(work: str, count: int = 2, program: str = PROGRAM):
        lines = "\n".join(f"    {line}" for line in work.splitlines())
        (tmp_path / "program.py").write_text(program.format(work=lines))
        return launch(tmp_path, "program.py", count=count, bare=True)

    return run


def test_one_process_is_no_group():
    assert group.size() == 1 and group.rank() == 0
    group.agree({"anything": object()})
    assert group.gather([3]) == [[3]]
    assert group.decided(True) and not group.all_of(False) and group.attempt(lambda: 5) == 5
    group.tell("nobody")
    seen = []
    group.perform(lambda: seen.append(1))
    assert seen == [1]


# What the processes share, what the first one says to the others, as often as it speaks, and errors that end nothing.
SHARED = """
assert share(mx.array([rank() + 5])).tolist() == [5]
assert gather([rank(), 7]) == [[i, 7] for i in range(size())]
assert share_in_graph(mx.array([rank() + 5, 3]), mx.zeros((1,))).tolist() == [5, 3]
assert decided(rank() == 0) and not decided(rank() == 1)
assert all_of(rank() < 3) and not all_of(rank() < 2)
agree({"a fact": 1, "another": "x"})
try: agree({"the weather": "fine", "the model's weights": rank() // 2})
except GlassError as e: differ = str(e)
has = "0" if rank() == 0 else "another one"
assert f"differ in the model's weights: rank 2 from rank 0, which has {has}" in differ, differ
numbers = gather([mx.random.randint(0, 1 << 30).item()])
assert len({row[0] for row in numbers}) == 1, numbers

for one in [{"a": [1, 2.5, None, "\u00e4"]}, "", list(range(5000))]:
    if rank() == 0: tell(one)
    else: assert hear() == one

def find():
    if rank() == 1: raise GlassError("no d\u00efsk")
for i in range(2):
    try: attempt(find)
    except GlassError as e: print(e)
print(attempt(rank))

print("said by", rank())
print("noted by", rank(), file=sys.stderr)
logging.getLogger("glass_mlx").warning("warned by %d", rank())
"""


def test_what_the_processes_share(run):
    ended = run(SHARED, count=3)
    assert [(process.code, process.errors) for process in ended] == [(0, [])] * 3, [process.err for process in ended]
    # what fails on one machine fails on all; when the work is done, each may speak again
    said = [["rank 1: no d\u00efsk", "rank 1: no d\u00efsk", "0", "said by 0", "after 0"], ["after 1"], ["after 2"]]
    assert [process.out.splitlines() for process in ended] == said
    assert "noted by 0" in ended[0].err and "warned by 0" in ended[0].err
    assert not any("noted" in process.err or "warned" in process.err for process in ended[1:])


def ends_together(ended, line: str, told: tuple[int, ...] = (0,)) -> None:
    """All have ended with an error, which only these tell."""
    for rank, process in enumerate(ended):
        assert process.code != 0 and "after" not in process.out
        assert len(process.errors) == (rank in told), process.err
        assert "Traceback" not in process.err
    assert line in ended[told[0]].errors[0]


@pytest.mark.parametrize(
    "busy",
    ["while True: exchange()", "sys.stdin.read()", "while True: pass"],
    ids=["exchanging", "waiting for input", "computing"],
)
def test_a_process_that_dies_ends_the_others(run, busy):
    """Whatever they are at, within moments, and one says so."""
    ended = run(f"exchange()\nif rank() == 1: os._exit(7)\n{busy}", program=SOONER)
    assert ended[1].code == 7
    ends_together(ended, "rank 1 has ended")


def test_the_first_process_may_be_the_one_that_dies(run):
    ended = run("exchange()\nif rank() == 0: os._exit(7)\nwhile True: exchange()", program=SOONER)
    ends_together(ended, "rank 0 has ended", told=(1,))


def test_a_process_that_never_came(monkeypatch):
    """MLX gives up after half a minute."""

    def gives_up():
        raise RuntimeError("[ring] Couldn't connect")

    monkeypatch.setattr(group, "size", gives_up)
    with pytest.raises(GlassError, match="cannot be reached.*Couldn't connect"):
        group.perform(lambda: None)


def test_an_error_in_one_process(run):
    """It says what happened to it, and the first one that it has ended."""
    ended = run('exchange()\nif rank() == 1: raise GlassError("no disk")\nsys.stdin.read()', program=SOONER)
    ends_together(ended, "rank 1 has ended", told=(0, 1))
    assert ended[1].errors == ["error: rank 1: no disk"]


def test_an_error_in_all_processes_is_told_once(run):
    ends_together(run('raise GlassError("no such model")'), "error: no such model")


def test_a_bug_is_shown(run):
    ended = run("exchange()\nif rank() == 1: 1 / 0\nwhile True: exchange()", program=SOONER)
    assert "ZeroDivisionError" in ended[1].err and [process.code for process in ended] == [1, 1]


def test_other_work_is_refused(run):
    ended = run("pass", program=PROGRAM.replace("together(work)", "work"))
    ends_together(ended, "this command runs on one machine")


@pytest.mark.parametrize("first", ["tell(5)", "exchange(); tell(5); exchange()"])
def test_processes_at_different_points_end(run, first):
    """Nothing that they then exchange is taken for something else."""
    work = f"if rank() == 0: {first}; sys.stdin.read()\nelse: exchange(); hear(); hear()"
    ended = run(work, program=SOONER)
    assert all(process.code and "after" not in process.out for process in ended), ended
    assert any(process.errors for process in ended)


def test_a_process_that_dies_while_it_listens(run):
    work = "if rank() == 1: threading.Timer(0.5, os._exit, [7]).start(); hear()\nelse: sys.stdin.read()"
    ended = run(work, program=SOONER)
    ends_together(ended, "rank 1 has ended")


def test_the_first_process_excuses_the_others(run):
    """It alone says why it ends."""
    ended = run('if rank() > 0: hear()\ngive_up()\nraise GlassError("no port")')
    ends_together(ended, "error: no port")
