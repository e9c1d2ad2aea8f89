import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, start
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import train
from nanocram import cooccurrence, device, runs
from nanocram.faults import Fault
from nanocram.optim import NorMuon

NANOCRAM = "--optimizer=muon --position=rotary --qk_norm=True --neighbour_keys=True".split()
NANOCRAM += "--value_residual=True --embedding_skip=True".split()
NANOCRAM += ["--count_tokens=3000", "--decoder_bias=True"]


OPTIMIZERS = ["adamw", "muon", "Adam", "RAdam", "NAdam", "Adafactor"]


def log(name="tiny", key="loss"):
    entries = [json.loads(line) for line in Path(f"out/{name}/log.jsonl").read_text().splitlines()]
    return [e for e in entries if key in e]


def weights(name="tiny"):
    return torch.load(f"out/{name}/model.pt", weights_only=True)["model"]


# --------------------------------------------------------------------------------------------------
# Masks and schedules


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30), st.integers(1, 7))
def test_masks_of_the_paper(seed, rows):
    """Exactly 32 of 128 positions a row, of those 26 <mask>, 3 random, 3 unchanged; nothing else
    changes.
    """
    vocab, mask_id = 10**12, 4  # so large that a random token is hardly ever the old one
    ids = torch.randint(5, vocab, (rows, 128), generator=torch.Generator().manual_seed(seed))
    inputs, positions, targets = train.mask_tokens(
        ids, 32, mask_id, vocab, torch.Generator().manual_seed(seed + 1)
    )
    assert positions.shape == targets.shape == (rows, 32)
    for row in range(rows):
        where = positions[row].tolist()
        assert len(set(where)) == 32
        rest = sorted(set(range(128)) - set(where))
        assert torch.equal(inputs[row, rest], ids[row, rest]) and torch.equal(
            targets[row], ids[row, where]
        )
        changed = inputs[row, where]
        assert [(changed == mask_id).sum(), (changed == ids[row, where]).sum()] == [26, 3]
        random = changed[(changed != mask_id) & (changed != ids[row, where])]
        assert len(random.unique()) == 3


def test_masks_are_uniform_seeded_and_all_mask_without_the_mix():
    ids = torch.arange(5, 133).repeat(4000, 1)
    a = train.mask_tokens(ids, 32, 4, 200, torch.Generator().manual_seed(1))
    b = train.mask_tokens(ids, 32, 4, 200, torch.Generator().manual_seed(1))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    share = torch.zeros(128).scatter_add(0, a[1].flatten(), torch.ones(a[1].numel())) / 4000
    assert share.min() > 0.22 and share.max() < 0.28  # 0.25 +- 4.4 standard deviations
    changed, old = a[0].gather(1, a[1]), a[2]
    random = changed[(changed != 4) & (changed != old)]
    times = torch.bincount(random, minlength=200)  # 60 on average, but for <mask> itself
    assert times[4] == 0 and times.sum() - times.min() > 11_000 and times.sort().values[1] > 20
    inputs, positions, _ = train.mask_tokens(
        ids, 19, 4, 200, torch.Generator().manual_seed(1), mix=False
    )
    assert (inputs.gather(1, positions) == 4).all() and ((inputs == 4).sum(1) == 19).all()


def test_the_number_of_masked_positions_is_rounded():
    assert [train.n_masked(32, rate) for rate in (0.01, 0.15, 0.2, 0.25)] == [1, 5, 6, 8]


def test_positions_in_the_flat_batch():
    assert train.flat_positions(torch.tensor([[3, 1], [0, 15]]), 16).tolist() == [3, 1, 16, 31]


def factor_with(p, schedule="triangle", warmup=0.0, cooldown=0.25, triangle_base=0.25):
    """The learning rate with the defaults of train.py."""
    return train.learning_rate_factor(p, schedule, warmup, cooldown, triangle_base)


def test_triangle_and_ramp_are_the_papers():
    factor = factor_with

    def batch(p):
        return train.batch_rows(p, 8192, 0.6, 128)

    for p in np.linspace(0, 1, 101):
        assert factor(p) == pytest.approx(min(0.25 + p, (1 - p) / 0.25))
        assert batch(p) == min(128 * (math.floor(8192 * p / (0.6 * 128)) + 1), 8192)
    assert factor(0.75) == 1.0 and batch(0) == 128 and batch(0.6) == 8192


@pytest.mark.parametrize(
    # at p = 0, 0.05, 0.1, 0.55, 1 with a warm-up of 0.1 and a cool-down of 0.25
    "schedule, values",
    [
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
        ("trapezoid", [0, 0.5, 1, 1, 0]),
        ("inverse_sqrt", [0, 0.5, 1, (0.1 / 0.55) ** 0.5, 0]),
        ("ramp", [0, 0.05, 0.1, 0.55, 0]),
    ],
)
def test_other_schedules(schedule, values):
    found = [factor_with(p, schedule, 0.1) for p in (0, 0.05, 0.1, 0.55, 1)]
    assert found == pytest.approx(values, abs=1e-12)
    before, after = (factor_with(0.75 + e, schedule, 0.1) for e in (-1e-9, 1e-9))
    assert before == pytest.approx(after, abs=1e-6)  # no jump where the cool-down begins
    if schedule not in ("inverse_sqrt", "ramp"):
        assert factor_with(0, schedule) == 1.0


def test_in_the_cool_down_the_rate_falls_linearly_from_what_it_has_reached():
    """At p = 0.9 two fifths of a cool-down of 0.25 are left."""
    for schedule, at_its_begin in (("ramp", 0.75), ("inverse_sqrt", (0.1 / 0.75) ** 0.5)):
        assert factor_with(0.9, schedule, 0.1) == pytest.approx(0.4 * at_its_begin)


def test_rates_are_those_of_the_keys():
    config = {"learning_rate": 2.0, "schedule": "trapezoid", "warmup": 0.1, "cooldown": 0.4}
    config |= {"triangle_base": 0.25, "batch_size": 8, "batch_ramp": 0.5, "batch_ramp_rows": 2}
    assert train.rates_at(0.05, config) == (pytest.approx(1.0), 2)
    assert train.rates_at(0.8, config) == (pytest.approx(1.0), 8)


def test_a_step_takes_at_most_half_of_what_is_left():
    config = {"budget_hours": 1.0, "max_steps": 0}
    for p in np.linspace(0, 1, 101):
        for speed in (0.01, 0.3, 1.0, 7.0):  # rows per second
            rows = train.rows_that_fit(1000, p, config, speed, 8)
            assert rows % 8 == 0 and 8 <= rows <= 1000
            if rows > 8:
                assert rows / speed <= (1 - p) * 3600 / 2 + 1e-6
            if rows < 1000:
                assert (rows + 8) / speed > (1 - p) * 3600 / 2 - 1e-6
    assert train.rows_that_fit(1000, 0.99, config, 0.0, 8) == 1000  # the speed is not known yet
    by_steps = {"budget_hours": 1.0, "max_steps": 7}
    assert train.rows_that_fit(1000, 0.99, by_steps, 1.0, 8) == 1000


def test_one_cycle_is_a_triangle():
    for p in np.linspace(0, 1, 11):
        factor = factor_with(p, "triangle", cooldown=0.5, triangle_base=0.0)
        assert factor == pytest.approx(1 - abs(2 * p - 1))


def test_evaluation_is_the_same_whatever_the_batch():
    from test_model import bert

    def as_defined(module, inputs):
        """15 % of the positions, all of them masked, no dropout."""
        assert (
            not module.training
            and ((inputs[0] == 4).sum(1) == 3).all()
            and len(inputs[1]) == 3 * len(inputs[0])
        )

    rows, model = (
        np.random.default_rng(0).integers(5, 50, (37, 20)).astype(np.uint16),
        bert(dropout=0.5),
    )
    model.register_forward_pre_hook(as_defined)
    found = train.evaluate(model, rows, 4, "cpu", batch=64)
    again = train.evaluate(model, rows, 4, "cpu", batch=7)
    assert model.training
    assert again == pytest.approx(found, rel=1e-5)
    assert abs(found["val_loss"] - math.log(50)) < 0.5 and 0 <= found["val_accuracy"] < 0.2


def test_losses_at_new_and_at_seen_words():
    """Against loops over rows, positions and the words that are visible in a row."""
    from test_model import bert

    rows = np.random.default_rng(1).integers(5, 30, (23, 20)).astype(np.uint16)
    model = bert().eval()
    found = train.evaluate(model, rows, 4, "cpu")
    ids = torch.from_numpy(rows.astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    inputs, positions, _ = train.mask_tokens(ids, 3, 4, 1, generator, mix=False)
    new, seen, by_row = [], [], []
    with torch.no_grad():
        for i in range(23):
            log_p = model.logits(model.encode(inputs[i : i + 1]))[0].log_softmax(-1)
            visible = set(inputs[i].tolist())
            losses = []
            for at in positions[i].tolist():
                loss = -log_p[at, ids[i, at]].item()
                (seen if ids[i, at].item() in visible else new).append(loss)
                losses.append(loss)
            by_row.append(np.mean(losses))
    assert 10 < len(seen) < 59 and len(seen) + len(new) == 69
    assert found["val_loss_new"] == pytest.approx(np.mean(new), rel=1e-5)
    assert found["val_loss_seen"] == pytest.approx(np.mean(seen), rel=1e-5)
    assert found["val_loss"] == pytest.approx(np.mean(new + seen), rel=1e-5)
    standard_error = np.std(by_row, ddof=1) / 23**0.5
    assert found["val_loss_se"] == pytest.approx(standard_error, rel=1e-4)
    nothing_twice = np.arange(5, 25, dtype=np.uint16)[None]
    assert train.evaluate(model, nothing_twice, 4, "cpu")["val_loss_seen"] is None


# --------------------------------------------------------------------------------------------------
# Runs


def plain_optimizers(bert, optimizer):
    """Return optimizers with a decay of 5 and groups by the names of parameters."""
    named = dict(bert.named_parameters())
    matrices = {3: [], 2: [], 1: []}  # by how many matrices one parameter holds
    if optimizer == "muon":
        for i in range(2):
            block = f"blocks.{i}."
            matrices[3].append(named.pop(f"{block}attention.qkv.weight"))
            matrices[1].append(named.pop(f"{block}attention.out.weight"))
            matrices[2].append(named.pop(f"{block}feed_forward.up.weight"))
            matrices[1].append(named.pop(f"{block}feed_forward.down.weight"))
    vectors = [p for name, p in named.items() if re.search("norm|position_scale", name)]
    others = [p for name, p in named.items() if not re.search("norm|position_scale", name)]
    groups = [{"params": others, "weight_decay": 5.0}, {"params": vectors, "weight_decay": 0.0}]
    opts = [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-12)]
    if optimizer == "muon":
        groups = [{"params": params, "parts": n} for n, params in matrices.items()]
        opts.append(NorMuon(groups, 1.0, 5.0, torch.float32))
    return opts


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_the_loop_written_plainly(run, tiny_data, optimizer):
    """Schedule, ramp, clipping, decay, masks by seed and step, and the data in their order.

    In another loop, without micro-batches: the norm of the gradient at each step, and the weights.
    """
    args = [
        "--max_steps=12",
        "--batch_size=24",
        "--batch_ramp=0.6",
        "--batch_ramp_rows=8",
        "--micro_batch_size=4",
        "--seed=7",
        f"--optimizer={optimizer}",
    ]
    args += ["--weight_decay=5.0", "--grad_clip=0.1"]
    assert run("train.py", *TINY, *args)[0] is None
    config = json.loads(Path("out/tiny/config.json").read_text())
    torch.manual_seed(7)
    bert = model.BERT(model.Config(**{k: config[k] for k in model.Config.__dataclass_fields__}))
    begin = {k: v.clone() for k, v in bert.state_dict().items()}
    opts, at = plain_optimizers(bert, optimizer), 0
    data = torch.from_numpy(
        np.fromfile("data/tiny/train.bin", np.uint16).reshape(-1, 32).astype(np.int64)
    )
    norms = []
    for step in range(12):
        p = step / 12
        n = min(8 * (math.floor(24 * p / (0.6 * 8)) + 1), 24)
        noise = torch.Generator().manual_seed(
            int(np.random.SeedSequence([7, step]).generate_state(1)[0])
        )
        inputs, positions, targets = train.mask_tokens(data[at : at + n], 8, 4, 90, noise)
        bert(inputs, train.flat_positions(positions, 32), targets.flatten()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(bert.parameters(), 0.1).item())
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = config["learning_rate"] * min(0.25 + p, (1 - p) / 0.25)
            opt.step()
            opt.zero_grad()
        at += n
    assert [e["grad_norm"] for e in log()] == pytest.approx(norms, rel=1e-3)
    for k, v in bert.state_dict().items():
        assert (weights()[k] - v).norm() < 0.01 * (v - begin[k]).norm() + 1e-7, k


def test_a_run_is_one_graph(run, tiny_data, monkeypatch):
    """No recompilation by the ramp of the batch or by evaluations."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, own = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **k: own(m, backend=counter, **k))
    args = [
        "--max_steps=12",
        "--batch_size=24",
        "--batch_ramp=0.6",
        "--batch_ramp_rows=8",
        "--micro_batch_size=8",
    ]
    args += ["--eval_minutes=0.0001", "--compile=True"]
    assert run("train.py", *TINY, *args)[0] is None and counter.frame_count == 1


def test_the_time_after_the_last_checkpoint_counts(run, tiny_data):
    run("train.py", *TINY, "--max_steps=2")
    os.remove("out/tiny/model.pt")
    with open("out/tiny/log.jsonl", "a") as f:
        f.write('{"step": 3, "hours": 0.5}\n')
    assert "at step 2, 0.500 h into the budget" in run("train.py", *TINY, "--max_steps=2")[1]
    assert (
        "0.500 h"
        in json.loads(Path("out/tiny/rules.json").read_text())["4 one GPU, 24 hours"]["did"]
    )


def test_counting_is_part_of_the_budget(run, tiny_data, monkeypatch):
    monkeypatch.setattr(cooccurrence, "initialize_from_counts", lambda *_: time.sleep(0.2))
    assert run("train.py", *TINY, "--max_steps=1", "--count_tokens=100")[0] is None
    assert log()[0]["hours"] * 3600 >= 0.2


def test_the_mean_loss_of_a_log_line_is_that_of_the_steps_taken():
    interval = train.Interval("cpu")
    for loss, is_bad in ((2.0, False), (math.nan, True), (4.0, False)):
        interval.add(torch.tensor(loss), torch.tensor(is_bad), 10)
    loss, _, skipped = interval.close()
    assert (loss, skipped, interval.tokens) == (3.0, 1, 30)


def test_micro_batches_divide_the_batch_and_the_increments_of_its_ramp():
    config = {"batch_size": 24, "micro_batch_size": 8, "batch_ramp": 0.5, "batch_ramp_rows": 12}
    with pytest.raises(Fault, match="micro_batch_size = 8 must divide"):
        train.micro_batch_rows(config, 1)
    assert train.micro_batch_rows(config | {"batch_ramp": 0.0}, 1) == 8
    assert train.micro_batch_rows(config, 2) == 2


def forecast(capsys, order, speed, counts=None):
    """Return what is said of 36,000 tokens in an hour at `speed` tokens/s."""
    meta = {"settings": {"order": order}, "counts": counts or {}}
    train.forecast(np.zeros((1000, 36), np.uint16), meta, speed, 0, 3600.0, 1.0)
    return capsys.readouterr().out


def test_a_sorted_corpus_beyond_the_budget_is_a_warning(capsys):
    for order, speed, warns in (
        ("sentence_length", 5.0, True),
        ("shuffle", 5.0, False),
        ("sentence_length", 10.0, False),
    ):
        out = forecast(capsys, order, speed)
        assert ("max_rows=500 cuts after sorting" in out) == warns
        assert f"{speed / 10:.0%} of one epoch" in out
    meta = {"settings": {"order": "shuffle"}, "counts": {}}
    train.forecast(np.zeros((1000, 36), np.uint16), meta, 5.0, 18_000, 1800.0, 1.0)
    assert "75% of one epoch" in capsys.readouterr().out  # half of it had been seen


def test_a_corpus_that_is_repeated_is_a_warning_that_says_how_much_text_fits(capsys):
    out = forecast(capsys, "sentence_length", 30.0, {"characters": 144_000})
    assert "seen 3.0 times, and its order (sentence_length) comes round again" in out
    assert "max_chars=4.3e+05 fits" in out  # three times 144,000
    assert "seen 3.0 times; " in forecast(capsys, "shuffle", 30.0)
    assert "warning" not in forecast(capsys, "shuffle", 10.5)


def test_a_run_learns_more_than_unigrams(run, tiny_data):
    args = [
        *TINY,
        "--max_steps=400",
        "--batch_size=32",
        "--micro_batch_size=32",
        "--position=rotary",
        "--n_embd=64",
    ]
    message, output = run("train.py", *args, "--n_inner=128", "--rotary_base=100.0")
    assert message is None, message
    tokens = np.fromfile("data/tiny/train.bin", np.uint16)
    p = np.bincount(tokens) / len(tokens)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    losses = [e["loss"] for e in log()]
    final = log(key="val_loss")[-1]
    assert losses[0] > entropy + 0.3 and final["val_loss"] < entropy - 0.5, (
        losses[0],
        final,
        entropy,
    )
    assert final["val_accuracy"] > 0.3
    # a line's speed is that of its own step
    seconds = sum(32 * 32 / e["tokens_per_s"] for e in log()[1:])
    assert seconds < 2 * 3600 * final["hours"]
    assert {
        "step",
        "tokens",
        "hours",
        "progress",
        "loss",
        "lr",
        "batch_size",
        "grad_norm",
        "tokens_per_s",
        "mfu",
    } <= log()[0].keys()
    assert [e["step"] for e in log()] == list(range(1, 401)) and final["progress"] == 1.0
    assert sorted(os.listdir("out/tiny")) == [
        "ckpt.pt",
        "config.json",
        "log.jsonl",
        "model.pt",
        "rules.json",
        "tokenizer.json",
        "train.lock",
    ]
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    assert saved["config"]["n_embd"] == 64 and not [k for k in saved["model"] if "_orig_mod" in k]
    assert all(v.dtype == torch.float32 for v in saved["model"].values())
    rules = json.loads(Path("out/tiny/rules.json").read_text())
    assert len(rules) == 4 and all(r["verdict"] != "broken" for r in rules.values())


def test_the_split_into_micro_batches_changes_nothing(run, tiny_data):
    """With a ramp: the losses, step by step, of micro-batches of 8, 4 and 2 rows."""
    ramp = ["--batch_size=24", "--batch_ramp=0.6", "--batch_ramp_rows=8", "--max_steps=30"]
    for m in (8, 4, 2):
        assert (
            run("train.py", *TINY, *ramp, f"--micro_batch_size={m}", f"--out_dir=out/m{m}")[0]
            is None
        )
    one, two, four = (np.array([e["loss"] for e in log(f"m{m}")]) for m in (8, 4, 2))
    assert np.allclose(one, two, atol=1e-4) and np.allclose(one, four, atol=1e-4)
    assert [e["batch_size"] for e in log("m8")] == [e["batch_size"] for e in log("m2")]
    assert log("m8")[0]["batch_size"] == 8 and log("m8")[-1]["batch_size"] == 24


def last_step():
    lines = (
        Path("out/tiny/log.jsonl").read_text().splitlines()
        if Path("out/tiny/log.jsonl").exists()
        else []
    )
    return max((e["step"] for e in map(json.loads, lines[:-1])), default=0)


def start_copy(run, *args):
    """Train in a copy of this process, which need not import anything. Return its id."""
    copy = os.fork()
    if copy:
        return copy
    status = 2
    try:
        message, _ = run("train.py", *args)
        status = int(message is not None)
    finally:
        os._exit(status)


@pytest.mark.parametrize("recipe", [["--mask_rate=0.3"], NANOCRAM], ids=["crammed", "nanocram"])
def test_interrupted_and_resumed_equals_uninterrupted(run, tiny_data, recipe):
    """kill -9 twice, then SIGTERM, and a last part that finishes: the same weights, bit for bit,
    and the same log.
    """
    args = [*TINY, "--max_steps=200", "--dropout=0.1", *recipe]
    rarely = ["--checkpoint_minutes=9.0", "--eval_minutes=9.0"]
    often = ["--checkpoint_minutes=0.0005", "--eval_minutes=0.001"]
    assert run("train.py", *args, *rarely, "--out_dir=out/whole")[0] is None
    for step, kill in ((30, signal.SIGKILL), (80, signal.SIGKILL), (140, signal.SIGTERM)):
        process = start_copy(run, *args, *often)
        while last_step() < step or not Path("out/tiny/ckpt.pt").exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended too early"
            time.sleep(0.005)
        os.kill(process, kill)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status == (-9 if kill == signal.SIGKILL else 1)
    message, output = run("train.py", *args, *often)
    assert message is None and "continuing out/tiny at step" in output
    assert len(log(key="resumed")) == 3
    a, b = weights("whole"), weights()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [(e["step"], e["loss"]) for e in log()] == [(e["step"], e["loss"]) for e in log("whole")]
    assert len(log(key="val_loss")) > 1  # evaluations change nothing either


def test_ctrl_c_in_a_large_step_saves_at_once_and_the_step_is_done_again(
    run, tiny_data, monkeypatch
):
    args, seen = (
        [*TINY, "--max_steps=3", "--batch_size=64", "--micro_batch_size=4", "--dropout=0.1"],
        [],
    )  # 16 passes a step
    assert run("train.py", *args, "--out_dir=out/whole")[0] is None

    def ctrl_c(loss, model):
        seen.append(1)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        sabotage(patch, range(20, 49), ctrl_c)
        assert "stopped; saved at step 1, the same command continues" in run("train.py", *args)[0]
    assert len(seen) == 1
    assert run("train.py", *args)[0] is None
    a, b = weights("whole"), weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_kills_do_not_give_time_back(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "hours": s / 10}) + "\n" for s in range(1, 9))
        + '{"step": 9, "ho'
    )
    assert runs.truncate_log(path, 3) == pytest.approx(0.8 * 3600)
    assert runs.truncate_log(path, 3) == pytest.approx(
        0.8 * 3600
    )  # killed again before the first new line
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 3]


def test_the_clock_stops_the_run_and_counts_earlier_parts(run, tiny_data, home):
    budget = ["--budget_hours=0.001", "--checkpoint_minutes=0.001", "--log_seconds=0.01"]  # 3.6 s
    process = start("train.py", *TINY, *budget, cwd=home)
    while not Path("out/tiny/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1.0)
    process.kill()
    process.communicate()
    spent = log()[-1]["hours"]
    message, output = run("train.py", *TINY, *budget, "--checkpoint_minutes=9.0")
    assert message is None and "continuing" in output
    assert output.count("h of budget, the corpus lasts") == 1
    hours = [e["hours"] for e in log()]
    assert hours == sorted(hours) and not [h for h in hours if h > 0.00125]
    later = [e for e in log() if e["hours"] > spent]
    assert later[0]["progress"] >= spent / 0.001 - 1e-9  # the killed part's time is not given back
    lr = [e["lr"] for e in log()]
    assert max(lr) == pytest.approx(0.003, rel=0.05) and lr[-1] < 0.001


SLOW = ["--budget_hours=0.1", "--batch_size=64", "--micro_batch_size=8", "--log_seconds=0.001"]


@pytest.fixture
def slow_device(run, monkeypatch):
    """A clock that nothing but training moves: two seconds a row of a forward pass."""
    clock, forward = [1000.0], model.BERT.forward
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(device, "peak_flops", lambda *_: (1e12, "of a test"))

    def slow_forward(self, ids, positions, targets=None):
        if targets is not None:
            clock[0] += 2 * len(ids)
        return forward(self, ids, positions, targets)

    monkeypatch.setattr(model.BERT, "forward", slow_forward)


def test_long_steps_are_cut_to_fit_the_budget(run, tiny_data, slow_device):
    """A step takes 128 s of 360 s: uncut, the third one would end at 384 s, from 71 % on."""
    message, _ = run("train.py", *TINY, *SLOW)
    assert message is None
    entries = log()
    # after the first step, whose line is left out, 232 s are left, then 120, 72, 40, 24 and 8
    assert [e["batch_size"] for e in entries] == [56, 24, 16, 8, 8, 8]
    assert entries[-1]["tokens"] == 32 * (64 + 56 + 24 + 16 + 8 + 8 + 8)
    assert entries[-1]["hours"] * 3600 == pytest.approx(368)
    assert entries[-1]["lr"] == pytest.approx(0.003 * (8 / 360) / 0.25)


def test_with_max_steps_no_step_is_cut(run, tiny_data, slow_device):
    assert run("train.py", *TINY, *SLOW, "--max_steps=4")[0] is None
    assert {e["batch_size"] for e in log()} == {64}


def test_the_end_of_the_corpus(run, tiny_data):
    rows = json.loads(Path("data/tiny/meta.json").read_text())["train_rows"]
    ids = train.next_rows(np.arange(10, dtype=np.uint16).reshape(5, 2), 4, 3, "cpu")
    assert ids.tolist() == [[8, 9], [0, 1], [2, 3]]
    message, output = run("train.py", *TINY, f"--max_steps={rows // 8 + 5}")
    assert message is None and output.count("the corpus ends") == 1
    large = [f"--batch_size={8 * (rows // 8 + 1)}", "--micro_batch_size=8", "--out_dir=out/large"]
    message, output = run("train.py", *TINY, *large, "--max_steps=3")  # an epoch in each step
    assert message is None and output.count("the corpus ends") == 1


def test_weights_and_biases_gets_what_the_log_gets(run, tiny_data, monkeypatch):
    seen = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: seen.append(settings)
    fake.log = lambda entry, step: seen.append(entry | {"at": step})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run("train.py", *TINY, "--max_steps=4", "--wandb_log=True")[0] is None
    assert (
        seen[0]["config"]["n_embd"] == 32
        and seen[0]["id"] == "out-tiny"
        and seen[0]["resume"] is None
    )
    logged = [json.loads(line) for line in Path("out/tiny/log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in e.items() if k != "at"} for e in seen[1:]] == logged
    assert all(e["at"] == e["step"] for e in seen[1:])


def test_a_finished_run_is_not_overwritten(run, tiny_data):
    assert run("train.py", *TINY, "--max_steps=2")[0] is None
    before = Path("out/tiny/model.pt").read_bytes()
    message, _ = run("train.py", *TINY, "--max_steps=3")
    assert "holds a finished run" in message and Path("out/tiny/model.pt").read_bytes() == before
    Path("mine/scratch").mkdir(parents=True)
    Path("mine/config.json").write_text("{}")
    for resume in ("auto", "never"):
        message, _ = run("train.py", *TINY, "--max_steps=3", "--out_dir=mine", f"--resume={resume}")
        assert "mine holds files that are not of a run" in message
    assert Path("mine/scratch").exists() and Path("mine/config.json").read_text() == "{}"
    Path("out/tiny/glue.json").write_text("{}")
    assert run("train.py", *TINY, "--max_steps=3", "--resume=never")[0] is None
    assert (
        Path("out/tiny/model.pt").read_bytes() != before and not Path("out/tiny/glue.json").exists()
    )
    assert len(log()) == 3


def test_same_config_same_bytes(run, tiny_data):
    for name in ("a", "b"):
        run("train.py", *TINY, "--max_steps=5", f"--out_dir=out/{name}")
    assert Path("out/a/model.pt").read_bytes() == Path("out/b/model.pt").read_bytes()


def test_a_checkpoint_from_before_a_key_has_its_default(run, tiny_data):
    assert run("train.py", *TINY, "--max_steps=2")[0] is None
    path = Path("out/tiny/ckpt.pt")
    ckpt = torch.load(path, weights_only=True)
    config = dict(ckpt["config"])
    del ckpt["config"]["embedding_skip"], ckpt["config"]["count_tokens"]
    torch.save(ckpt, path)

    def load(config):
        args = (config, ROOT / "train.py", train.FREE_KEYS, train.rates_of_checkpoint, "auto")
        run = runs.Run("out/tiny", *args)
        run.close()
        return run.checkpoint

    os.remove("out/tiny/model.pt")
    assert load(config)["step"] == 2
    with pytest.raises(Fault, match="embedding_skip was False, now True"):
        load(config | {"embedding_skip": True})
    with pytest.raises(Fault, match="count_tokens was 0, now 100"):
        load(config | {"count_tokens": 100})


@pytest.mark.parametrize(
    "recipe", [[], [*NANOCRAM, "--count_tokens=0"]], ids=["crammed", "nanocram"]
)
def test_every_dtype_trains(run, tiny_data, recipe):
    """fp16 with its loss scaler (which a CPU has too), and resumed in another dtype."""
    for dtype in ("float32", "bfloat16", "float16"):
        args = [
            *TINY,
            "--max_steps=40",
            f"--dtype={dtype}",
            f"--out_dir=out/{dtype}",
            "--checkpoint_minutes=0.0001",
        ]
        args += recipe
        assert run("train.py", *args)[0] is None
    plain, bf16, fp16 = (
        np.array([e["loss"] for e in log(d)]) for d in ("float32", "bfloat16", "float16")
    )
    assert np.abs(bf16 - plain).max() < 0.05 and np.abs(fp16 - plain).max() < 0.05
    assert torch.load("out/float16/ckpt.pt", weights_only=True)["scaler"]["scale"] > 1
    assert not torch.load("out/bfloat16/ckpt.pt", weights_only=True)["scaler"]


def test_counts_begin_in_fp16_with_a_step_left_out(run, tiny_data):
    """The logits are large, and the scaler's first guess is too; it finds a scale in one step and
    loses little.
    """
    for dtype in ("float32", "float16"):
        assert (
            run(
                "train.py",
                *TINY,
                *NANOCRAM,
                "--max_steps=80",
                f"--dtype={dtype}",
                f"--out_dir=out/{dtype}",
            )[0]
            is None
        )
    plain, fp16 = (np.array([e["loss"] for e in log(d)], float) for d in ("float32", "float16"))
    assert np.isnan(fp16).sum() <= 2 and np.isfinite(fp16[2:]).all()
    assert (
        abs(fp16[-20:].mean() - plain[-20:].mean()) < 0.05 < plain[:20].mean() - plain[-20:].mean()
    )


@pytest.mark.parametrize("recipe", [["--n_layer=1"], NANOCRAM], ids=["crammed", "nanocram"])
def test_compiled_and_eager_runs_agree(run, tiny_data, recipe):
    for name, compile in (("eager", False), ("compiled", True)):
        message, output = run(
            "train.py",
            *TINY,
            *recipe,
            "--max_steps=8",
            f"--out_dir=out/{name}",
            f"--compile={compile}",
        )
        assert message is None and "warning" not in output, output
    a, b = ([e["loss"] for e in log(n)] for n in ("eager", "compiled"))
    assert np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("seconds, says", [(4.9, False), (5.1, True)])
def test_a_compilation_of_more_than_five_seconds_says_so(monkeypatch, capsys, seconds, says):
    class Timer:
        """A timer of threads whose time passes in compile_checked only."""

        def __init__(self, interval, function, args):
            self.interval, self.function, self.args = interval, function, args

        def start(self):
            timers.append(self)

        def cancel(self):
            timers.remove(self)

    def compile(model, *batch):
        for timer in timers:
            if seconds >= timer.interval:
                timer.function(*timer.args)
        if model == "broken":
            raise RuntimeError("out of memory")
        return "compiled " + model

    timers = []
    monkeypatch.setattr(train.threading, "Timer", Timer)
    monkeypatch.setattr(train, "compile_checked", compile)
    assert train.prepare_forward("model", True, [["batch"]], "cpu") == "compiled model"
    output = capsys.readouterr().out
    assert output.count("compiling") == output.count("\n") == int(says) and not timers
    with pytest.raises(RuntimeError):
        train.prepare_forward("broken", True, [["batch"]], "cpu")
    assert not timers
    assert train.prepare_forward("model", False, [["batch"]], "cpu") == "model"


def test_a_broken_compiler_is_a_warning(run, tiny_data, monkeypatch):
    def broken(model, **_):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    message, output = run("train.py", *TINY, "--max_steps=3", "--compile=True")
    assert message is None and "going on without: RuntimeError: no compiler here\n" in output

    class Wrong(
        torch.nn.Module
    ):  # what torch 2.13 did to rotary positions: the keys' gradient of a block is noise
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *batch):
            loss = self.model(*batch)
            keys = self.model.blocks[1].attention.qkv.weight.chunk(3)[1]
            return loss + (keys * torch.randn_like(keys) * 1e-6).sum() - (keys * 0).sum()

    monkeypatch.setattr(torch, "compile", lambda model, **_: Wrong(model))
    message, output = run(
        "train.py", *TINY, "--max_steps=3", "--compile=True", "--out_dir=out/wrong"
    )
    assert message is None and "torch.compile changes the gradient of" in output

    Wrong.forward = lambda self, *batch: (
        self.model(*batch) * math.nan
    )  # which dropout does not explain
    message, output = run(
        "train.py", *TINY, "--max_steps=3", "--compile=True", "--dropout=0.1", "--out_dir=out/nan"
    )
    assert message is None and "torch.compile changes the gradient of" in output


# --------------------------------------------------------------------------------------------------
# Mistakes and faults


def test_mistakes_end_in_one_line_before_anything_is_touched(run, tiny_data):
    for args, expected in [
        (["--dataset=none"], "run prepare.py"),
        (["--micro_batch_size=3"], "must divide batch_size"),
        (["--max_len=16"], "rows have 32 tokens, more than max_len = 16"),
        (["--n_head=5"], "not divisible by n_head = 5"),
        (["--schedule=inverse_sqrt"], "set warmup"),
        (
            ["--count_tokens=100", "--n_embd=128"],
            "count_tokens needs a vocabulary as large as n_embd",
        ),
        (["--wandb_log=True"], "needs `pip install wandb`"),
    ]:
        message, _ = run("train.py", *TINY, "--max_steps=2", *args)
        assert expected in message and "\n" not in message
    good = Path("data/tiny/val.bin").read_bytes()
    Path("data/tiny/val.bin").write_bytes(good[:-2] + b"\x07\x00")
    message, _ = run("train.py", *TINY, "--max_steps=2")
    assert "val.bin is not the file that meta.json describes" in message
    Path("data/tiny/val.bin").write_bytes(good)
    with open("data/tiny/train.bin", "r+b") as f:
        f.truncate(1000)
    message, _ = run("train.py", *TINY, "--max_steps=2")
    assert "train.bin has 1,000 bytes, meta.json says" in message
    assert not Path("out").exists()


def test_a_checkpoint_of_another_experiment_is_refused(run, tiny_data):
    run("train.py", *TINY, "--max_steps=2")
    os.remove("out/tiny/model.pt")
    before = Path("out/tiny/ckpt.pt").read_bytes()
    message, _ = run("train.py", *TINY, "--max_steps=2", "--n_layer=3", "--learning_rate=0.5")
    assert "n_layer was 2, now 3" in message and "learning_rate was 0.003, now 0.5" in message
    Path("out/tiny/ckpt.pt").write_bytes(before[: len(before) // 2])
    message, _ = run("train.py", *TINY, "--max_steps=2")
    assert "ckpt.pt cannot be read" in message and "\n" not in message


def test_a_checkpoint_can_run_no_code(run, tiny_data):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    run("train.py", *TINY, "--max_steps=2")
    os.remove("out/tiny/model.pt")
    torch.save({"config": Evil(), "model": Evil()}, "out/tiny/model.pt")
    for command in (
        ["finetune_glue.py", *TINY, "--tasks=rte"],
        ["fill_mask.py", "out/tiny", "bal <mask>"],
    ):
        message, _ = run(*command)
        assert "cannot be read" in message and "\n" not in message and not Path("pwned").exists()
    os.remove("out/tiny/model.pt")
    torch.save({"config": Evil()}, "out/tiny/ckpt.pt")
    pickle.loads(pickle.dumps(Evil()))  # the attack works where pickles are trusted
    os.rmdir("pwned")
    message, _ = run("train.py", *TINY, "--max_steps=2")
    assert "cannot be read" in message and not Path("pwned").exists()


def sabotage(monkeypatch, at, how):
    """The training losses number `at`, counted over all forward passes from 1 on, go through
    `how(loss, model)`.
    """
    forward, calls = model.BERT.forward, itertools.count(1)

    def forward_or_fault(self, ids, positions, targets=None):
        loss = forward(self, ids, positions, targets)
        return how(loss, self) if targets is not None and next(calls) in at else loss

    monkeypatch.setattr(model.BERT, "forward", forward_or_fault)


NAN_LOSS = lambda loss, model: loss * math.nan  # noqa: E731
NAN_GRADIENT = lambda loss, model: loss + (model.embedding.weight[0, 0] * 0).sqrt()  # noqa: E731


@pytest.mark.parametrize("how", [NAN_LOSS, NAN_GRADIENT])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_left_out_and_logged(
    run, tiny_data, monkeypatch, how, optimizer
):
    sabotage(monkeypatch, {3, 7, 8}, how)
    assert run("train.py", *TINY, "--max_steps=12", f"--optimizer={optimizer}")[0] is None
    assert [e["step"] for e in log() if e["skipped"]] == [3, 7, 8]
    assert all(math.isfinite(e["loss"]) for e in log() if not e["skipped"])
    assert [e["loss"] for e in log() if e["skipped"]] == [None] * 3
    opt = torch.load("out/tiny/ckpt.pt", weights_only=True)["optimizers"][0]["state"]
    assert {int(p["step"]) for p in opt.values()} == {12 - 3}  # AdamW has taken the other steps
    assert all(v.isfinite().all() for v in weights().values())


@pytest.mark.parametrize("how", [NAN_LOSS, NAN_GRADIENT])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_in_fp16_is_left_out_by_every_optimizer(
    run, tiny_data, monkeypatch, how, optimizer
):
    """The embedding alone has the bad gradient, which is AdamW's; the scaler's scale falls, and
    Muon leaves it out, too.
    """
    sabotage(monkeypatch, {3, 7}, how)
    assert (
        run(
            "train.py",
            *TINY,
            "--max_steps=12",
            "--dtype=float16",
            f"--optimizer={optimizer}",
            "--grad_clip=0.0",
        )[0]
        is None
    )
    assert [e["step"] for e in log() if e["skipped"]] == [3, 7]
    ckpt = torch.load("out/tiny/ckpt.pt", weights_only=True)
    assert ckpt["scaler"]["scale"] == 65536 / 4
    assert all(v.isfinite().all() for v in weights().values())
    assert all(
        v["momentum"].isfinite().all()
        for opt in ckpt["optimizers"][1:]
        for v in opt["state"].values()
    )


def test_three_in_a_row_go_back_to_the_checkpoint_and_the_data_move_on(run, tiny_data, monkeypatch):
    sabotage(monkeypatch, {40, 41, 42}, NAN_LOSS)
    args = [*TINY, "--max_steps=60", "--checkpoint_minutes=0.0001"]
    message, output = run("train.py", *args)
    assert message is None, message
    (back,) = log(key="back_to_step")
    assert back["step"] == 42 and back["skipped"] == 3 and 1 <= back["back_to_step"] <= 42
    assert log()[-1]["tokens"] == 60 * 8 * 32 and log()[-1]["loss"] < log()[0]["loss"]


def test_going_back_restores_the_weights_of_the_checkpoint(run, tiny_data, monkeypatch):
    """Saved at step 10; steps 40 to 42 are not finite; step 43 begins with the saved weights."""
    args = [*TINY, "--max_steps=60"]

    def stop(loss, model):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        sabotage(patch, {10}, stop)
        assert "saved at step 10" in run("train.py", *args)[0]
    saved = torch.load("out/tiny/ckpt.pt", weights_only=True)["model"]
    seen = []

    def break_three_and_watch(loss, model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return loss * math.nan if len(seen) < 4 else loss

    sabotage(monkeypatch, {30, 31, 32, 33}, break_three_and_watch)  # counted after step 10
    assert run("train.py", *args)[0] is None
    assert [e["back_to_step"] for e in log(key="back_to_step")] == [10]
    assert any(not torch.equal(seen[2][name], saved[name]) for name in saved)
    assert all(torch.equal(seen[3][name], saved[name]) for name in saved)


def test_a_run_that_stays_broken_stops_with_a_diagnosis(run, tiny_data, monkeypatch):
    sabotage(monkeypatch, {*range(20, 23), *range(50, 90)}, NAN_LOSS)
    message, _ = run("train.py", *TINY, "--max_steps=200", "--checkpoint_minutes=0.0001")
    assert (
        "not finite 3 times in a row, step 52" in message
        and "first module with such an output: the loss" in message
    )
    assert not Path("out/tiny/model.pt").exists()
    assert all(
        v.isfinite().all()
        for v in torch.load("out/tiny/ckpt.pt", weights_only=True)["model"].values()
    )


def test_the_diagnosis_names_the_first_module(run, tiny_data):
    from test_model import bert

    broken = bert()
    with torch.no_grad():
        broken.blocks[1].feed_forward.up.weight[3, 3] = math.inf
    batch = torch.randint(50, (2, 16)), torch.arange(4), torch.arange(4)
    assert train.first_non_finite(broken, [batch]) == "blocks.1.feed_forward.up"
    assert train.first_non_finite(bert(), [batch]) == "none, only gradients"


def cpu_allocation():
    torch.empty(1 << 50)


def gpu_allocation():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")


@pytest.mark.parametrize("allocation", [cpu_allocation, gpu_allocation])
def test_out_of_memory_saves_and_says_what_to_set(run, tiny_data, monkeypatch, allocation):
    args = [*TINY, "--max_steps=12"]
    assert run("train.py", *args, "--out_dir=out/whole")[0] is None

    with monkeypatch.context() as patch:
        sabotage(patch, {6}, lambda loss, model: allocation())
        message, _ = run("train.py", *args)
    assert (
        "out of memory; --micro_batch_size=4" in message
        and "saved at step 5" in message
        and "\n" not in message
    )
    assert run("train.py", *args, "--micro_batch_size=4")[0] is None
    assert np.allclose([e["loss"] for e in log()], [e["loss"] for e in log("whole")], atol=1e-4)


@pytest.mark.parametrize("where", ["checkpoint", "log"])
def test_a_full_disk_loses_nothing_that_was_saved(run, tiny_data, home, where):
    """A limit on the size of files stands for the disk: writes fail in the middle of a file."""
    assert run("train.py", *TINY, "--max_steps=3")[0] is None
    os.remove("out/tiny/model.pt")
    before = Path("out/tiny/ckpt.pt").read_bytes()
    limit = (
        len(before) // 2
        if where == "checkpoint"
        else Path("out/tiny/log.jsonl").stat().st_size + 300
    )
    script = (
        f"ulimit -f {max(limit // 1024, 1)}; exec {sys.executable} {ROOT / 'train.py'} "
        + " ".join(TINY)
    )
    if where == "log":
        script += " --checkpoint_minutes=60"
    process = subprocess.run(
        ["bash", "-c", script + " --max_steps=3"], capture_output=True, text=True
    )
    last = process.stderr.strip().splitlines()[-1]
    assert (
        process.returncode == 1
        and last.startswith("train.py:")
        and "what was saved before is intact" in last
    )
    assert Path("out/tiny/ckpt.pt").read_bytes() == before
    assert not Path("out/tiny/model.pt").exists() and not list(Path("out/tiny").glob("*.tmp"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_on_a_cpu_works_in_memory_that_it_has():
    """The C library gives large tensors back to the system, and the next step pays for every page
    of them again.
    """
    code = """
import resource, torch
from nanocram import device
device.pick_device("cpu")
def step():
    kept = [torch.zeros(10_000_000) for _ in range(5)]  # 200 MB
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert int(faults) < 1000  # of 50,000 pages
