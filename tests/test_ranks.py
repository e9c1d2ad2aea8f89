"""Several processes, all on one CPU over gloo. What needs several GPUs was not run."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, start
from test_train import last_step, log, weights

import train
from nanocram import ranks
from nanocram.faults import Fault

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# train.py, which writes at its end which threads are left
WATCHED = f"""
import atexit, os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
def write():
    tasks = os.listdir("/proc/self/task")
    names = [open(f"/proc/self/task/{{task}}/comm").read() for task in tasks]
    print(names, file=open("threads" + os.environ["RANK"], "w"))
atexit.register(write)
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def popen(command, **variables):
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def start_ranks(world, script, *args):
    """Start processes as a Slurm script does: nothing but five variables."""
    port = free_port()
    processes = []
    for rank in range(world):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(popen([sys.executable, str(script), *args], **variables))
    return processes


def curve(name):
    return np.array([(entry["loss"], entry["grad_norm"]) for entry in log(name)])


# --------------------------------------------------------------------------------------------------
# The same curve


def test_two_and_three_processes_give_the_curve_of_one(run, tiny_data, home):
    """Loss and gradient norm, step by step, in several micro-batches and in fewer rows at first.

    The processes are started by their variables. They end without a thread of gloo, which could
    abort a process that Python has left.
    """
    Path("watched.py").write_text(WATCHED)
    args = [*TINY, "--max_steps=12", "--batch_size=24", "--batch_ramp=0.5", "--batch_ramp_rows=12"]
    args += ["--micro_batch_size=4", "--count_tokens=2000", "--optimizer=muon"]
    assert run("train.py", *args, "--out_dir=out/one")[0] is None

    two = start_ranks(2, "watched.py", *args, "--out_dir=out/two")
    three = start_ranks(3, ROOT / "train.py", *args, "--out_dir=out/three")
    for process in [*two, *three]:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors

    one = curve("one")
    assert one.shape == (12, 2)
    for name, world in (("two", 2), ("three", 3)):
        assert np.allclose(curve(name), one, rtol=1e-4), name
        assert all(
            torch.allclose(weights("one")[k], v, atol=1e-3) for k, v in weights(name).items()
        )
        rules = json.loads(Path(f"out/{name}/rules.json").read_text())
        assert f"{world} cpu" in rules["4 one GPU, 24 hours"]["did"]
    for rank in "01":
        threads = Path("threads" + rank).read_text()
        assert "python" in threads and "gloo" not in threads


@pytest.mark.slow
def test_two_agents_of_torchrun_give_the_curve_of_one_process(run, tiny_data, home):
    """As on two machines, with one process and with two.

    The agent that holds the rendezvous may end before the other one has said goodbye, and then the
    other one ends with an error although all is done. So what the run has written is what counts.
    """
    args = [*TINY, "--max_steps=12", "--batch_size=24", "--micro_batch_size=4"]
    assert run("train.py", *args, "--out_dir=out/one")[0] is None
    where = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    agents = []
    for n in (1, 2):
        command = [*TORCHRUN, *where, f"--nproc_per_node={n}", str(ROOT / "train.py"), *args]
        agents.append(popen([*command, "--out_dir=out/three"]))
    errors = [agent.communicate(timeout=600)[1] for agent in agents]
    assert 0 in [agent.returncode for agent in agents], errors
    assert np.allclose(curve("three"), curve("one"), rtol=1e-4)
    assert Path("out/three/model.pt").exists()


def test_each_process_reads_only_its_rows_and_draws_the_masks_of_all(tiny_data):
    ids = torch.randint(5, 90, (12, 32))
    generator = torch.Generator()
    whole = train.mask_tokens(ids, 10, 4, 90, generator.manual_seed(7))
    parts = []
    for rank in range(3):
        mine = ids[4 * rank : 4 * rank + 4]
        parts.append(train.mask_tokens(mine, 10, 4, 90, generator.manual_seed(7), True, rank, 3))
    for tensor, *own in zip(whole, *parts):
        assert torch.equal(tensor, torch.cat(own))


# train.py under a clock that nothing but forward passes moves, on each process at another speed
FAKE_CLOCK = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import model
from nanocram import device
forward, clock = model.BERT.forward, [1000.0]
time.monotonic = lambda: clock[0]
device.peak_flops = lambda *_: (1e12, "of a test")
def slow_forward(self, ids, positions, targets=None):
    if targets is not None:
        clock[0] += 2 * len(ids) * int(os.environ["WORLD_SIZE"]) / (1 + int(os.environ["RANK"]))
    return forward(self, ids, positions, targets)
model.BERT.forward = slow_forward
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def test_all_processes_cut_a_long_step_alike(run, tiny_data, home):
    """By the clock of the first one, so that the curve is that of one process as fast as both."""
    Path("fake_clock.py").write_text(FAKE_CLOCK)
    args = [*TINY, "--budget_hours=0.1", "--batch_size=64", "--log_seconds=0.001"]
    one = start_ranks(1, "fake_clock.py", *args, "--micro_batch_size=8", "--out_dir=out/one")
    two = start_ranks(2, "fake_clock.py", *args, "--micro_batch_size=4", "--out_dir=out/two")
    for process in [*one, *two]:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
    for name in ("one", "two"):
        assert [e["batch_size"] for e in log(name)] == [56, 24, 16, 8, 8, 8], name
    assert np.allclose(curve("one"), curve("two"), rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Processes that end


def test_a_dead_process_ends_the_job_and_the_checkpoint_continues_on_one(run, tiny_data, home):
    """No agent watches: the other process ends by itself, in one line."""
    args = [*TINY, "--max_steps=100_000", "--checkpoint_minutes=0.001", "--micro_batch_size=4"]
    first, second = start_ranks(2, ROOT / "train.py", *args)
    while not Path("out/tiny/ckpt.pt").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second.kill()
    last = first.communicate(timeout=120)[1].strip().splitlines()[-1]
    assert first.returncode == 1
    assert last.startswith("train.py: another process of this job has ended, or hangs (")
    second.communicate()

    # a single process continues, and rule 4 remembers the devices of all parts
    step = torch.load("out/tiny/ckpt.pt", weights_only=True)["step"]
    process = start("train.py", *args, cwd=home)
    while last_step() < step + 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert f"continuing out/tiny at step {step:,}" in process.communicate()[0]
    assert torch.load("out/tiny/ckpt.pt", weights_only=True)["world"] == 2


def test_torchrun_restarts_a_job_that_then_ends_as_if_nothing_had_happened(run, tiny_data, home):
    args = [*TINY, "--max_steps=60", "--checkpoint_minutes=0.0001"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    job = popen([*command, str(ROOT / "train.py"), *args])
    while last_step() < 20 or not Path("out/tiny/ckpt.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, errors = job.communicate(timeout=600)
    assert job.returncode == 0, errors
    assert "continuing out/tiny at step" in output

    assert run("train.py", *args, "--out_dir=out/whole")[0] is None
    assert [entry["step"] for entry in log()] == list(range(1, 61))
    assert np.allclose(curve("tiny"), curve("whole"), rtol=1e-4)


def test_what_ends_another_process_is_one_line(monkeypatch):
    def lost(config):
        raise RuntimeError("[/x/third_party/gloo/gloo/pair.cc:1] Timed out waiting. More of it.")

    def wrong(config):
        raise RuntimeError("a mistake in the code")

    with pytest.raises(Fault, match=r"has ended, or hangs \(Timed out waiting\)"):
        ranks.run(lost, {})
    with pytest.raises(RuntimeError, match="a mistake"):
        ranks.run(wrong, {})

    # without an agent, nothing but a timeout ends a process that waits for one that hangs
    seen = []
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, timeout: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    for _ in range(2):
        assert ranks.start("cpu") == (0, 2, True)
    assert seen[0]["timeout"] == datetime.timedelta(minutes=10)

    # a process that is started again does not find what the one before has left in the store
    first, second = (options["store"] for options in seen)
    first.set("address", "of the dead")
    assert first.check(["address"]) and not second.check(["address"])


# --------------------------------------------------------------------------------------------------
# One process, and processes of another library


def test_one_process_has_no_group_and_no_wrapper(monkeypatch):
    """Also if torchrun has started it."""
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert ranks.start("cpu") == (0, 1, False)
    model = torch.nn.Linear(2, 2)
    assert not dist.is_initialized() and ranks.wrap(model, "cpu") is model
    ranks.share_gradient(model, False)
    assert ranks.agree(True, False, True, 7.0, 5.0) == (True, False, True, 7.0, 5.0)


def test_a_group_that_exists_is_used_and_left_alone(run, tiny_data):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        message, output = run("train.py", *TINY, "--max_steps=2")
        assert message is None and "step 2" in output, message
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_variable_that_is_missing_is_named(run, tiny_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    message, _ = run("train.py", *TINY, "--max_steps=2")
    assert "WORLD_SIZE is 4, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in message
    assert not Path("out").exists()
