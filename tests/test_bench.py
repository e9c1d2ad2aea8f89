"""Speeds are of tokens, steps are train.py's; and a plain loop of transformers scores like ours."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import train
from nanocram.configurator import resolve
from nanocram.faults import Fault
from nanocram.glue import METRICS, load_task
from tools import bench
from tools.bench import Recipe, Turn
from tools.export_hf import mark_as_in_fine_tuning


def test_speeds_are_of_tokens(monkeypatch):
    """Rows twice as long that take twice as long are as fast.

    If the first entry does not run, it is the one named.
    """

    class Worker:
        def __init__(self, make, recipe, compiled):
            self.seconds = recipe.config["seq_len"] / 128
            if self.seconds > 4:
                raise bench.ProcessEnded

        def turn(self):
            return Turn(self.seconds, 0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(bench, "Worker", Worker)
    recipes = {}
    for name, seq_len in (("a", 128), ("b", 256), ("c", 1024)):
        recipes[name] = Recipe({"seq_len": seq_len, "compile": False}, 8, 8)
    assert bench.relative_speeds(recipes) == {"a": 1.0, "b": 1.0}
    with pytest.raises(Fault, match="c: does not run"):
        bench.relative_speeds(dict(reversed(recipes.items())))


def test_a_worker_times_steps_and_its_end_is_noticed():
    with bench.Worker(make_counted_step, 3) as worker:
        turns = [worker.turn() for _ in range(2)]
    assert all(turn.seconds < 1 and turn.memory > 0 for turn in turns)
    n_steps = turns[0].parts["steps so far"]
    assert n_steps >= 2 and turns[1].parts["steps so far"] > n_steps
    with pytest.raises(bench.ProcessEnded):
        bench.Worker(make_counted_step, 0)


def make_counted_step(most):
    """Return a step that raises if it may not run once."""
    counts = Counter()

    def step():
        counts["steps so far"] += 1
        if not most:
            raise MemoryError
        return dict(counts)

    return step


def test_the_step_that_is_timed_is_the_one_of_train(monkeypatch):
    """With the recipe's batch, micro-batches, clipping and optimizers."""
    asked = []
    plain = train.training_step

    def watched(model, forward, optimizers, scaler, micro_batches, grad_clip):
        result = plain(model, forward, optimizers, scaler, micro_batches, grad_clip)
        asked.append((len(micro_batches), micro_batches[0][0].shape, grad_clip, len(optimizers)))
        assert not result[2]
        return result

    monkeypatch.setattr(train, "training_step", watched)
    words = [*TINY, "--grad_clip=0.7", "--optimizer=muon"]
    step = bench.make_our_step(Recipe(resolve("train.py", words), 12, 4), compiled=False)
    parts = step()
    assert asked == [(3, (4, 32), 0.7, 2)]
    assert list(parts) == ["data and masks", "step"] and min(parts.values()) > 0


def test_mistakes_are_one_line(run, home):
    message, output = run("bench.py")
    assert message == 2 and "usage: python -m tools.bench" in output
    assert "there is no shape huge" in run("bench.py", "train", "huge")[0]
    assert "none does not exist" in run("bench.py", "prepare", "none")[0]


# --------------------------------------------------------------------------------------------------
# Nothing is lost by our batches of similar lengths: minutes, so only `make slow` runs it

SETTINGS = ["--glue_epochs=3", "--glue_seeds=2", "--glue_max_train=600", "--glue_max_len=64"]


@pytest.mark.slow
def test_a_plain_loop_of_transformers_scores_like_finetune_glue(run, home):
    """On the exported model, shuffled, padded to glue_max_len, with the settings of glue.json."""
    size = ["--max_steps=200", "--batch_size=16", "--micro_batch_size=16", "--compile=False"]
    common = ["--tasks=docs_package", "--dtype=float32"]
    for script, words in (("prepare.py", []), ("train.py", size), ("finetune_glue.py", SETTINGS)):
        message, output = run(script, "config/demo.py", *common, *words)
        assert message is None, message
    assert run("export_hf.py", "out/demo", "--to=exported")[0] is None
    entry = json.loads(Path("out/demo/glue.json").read_text())["rows"]["run"]["docs_package"]
    ours = entry["scores"]
    theirs = [score_of_plain_loop("docs_package", entry["settings"], seed) for seed in range(2)]
    print(f"docs_package: finetune_glue.py {ours}, transformers {theirs}")
    assert abs(np.mean(ours) - np.mean(theirs)) < 3.0
    assert min(ours + theirs) > 30.0  # of six packages, about as many examples of each


def score_of_plain_loop(name, settings, seed):
    """Fine-tune the folder `exported` with AdamW and a cosine. Return the dev score."""
    import transformers

    # the data that finetune_glue.py has seen
    task = load_task(name, "", "demo")
    (dev,) = task.dev.values()
    examples = task.train
    most = settings["glue_max_train"]
    chosen = np.random.default_rng(0).choice(len(examples), most, replace=False)
    examples = [examples[i] for i in chosen]

    # the exported model, with the dropout and the pooling that it was fine-tuned with
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    mark_as_in_fine_tuning(tokenizer.backend_tokenizer)
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        "exported",
        trust_remote_code=True,
        num_labels=len(task.labels),
        pooling=settings["glue_pooling"],
        classifier_dropout=settings["glue_dropout"],
        hidden_dropout_prob=settings["glue_dropout"],
    )

    def logits_of(examples):
        batch = tokenizer(
            [first for first, _, _ in examples],
            [second or "" for _, second, _ in examples],
            padding="max_length",
            truncation=True,
            max_length=settings["glue_max_len"],
            return_tensors="pt",
        )
        return model(**batch).logits

    # train
    size = settings["glue_batch_size"]
    n_batches = len(examples) // size
    n_steps = settings["glue_epochs"] * n_batches
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["glue_learning_rate"],
        weight_decay=settings["glue_weight_decay"],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    n_warmup = int(settings["glue_warmup"] * n_steps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, n_warmup, n_steps)
    for _ in range(settings["glue_epochs"]):
        model.train()
        for index in torch.randperm(len(examples))[: n_batches * size].split(size):
            batch = [examples[i] for i in index]
            labels = torch.tensor([label for _, _, label in batch])
            torch.nn.functional.cross_entropy(logits_of(batch), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    # score
    model.eval()
    with torch.no_grad():
        logits = torch.cat([logits_of(dev[i : i + 64]) for i in range(0, len(dev), 64)])
    labels = np.array([label for _, _, label in dev])
    return METRICS[task.metric](logits.argmax(-1).numpy(), labels)


def test_a_report_has_machine_commit_and_command(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench")
    entries = [bench.show("ours", [2.0, 1.0, 4.0], 100, "tokens/s", 25.0, 10**9)]
    bench.write_report(["train", "demo"], entries)
    (path,) = (tmp_path / "bench").glob("train-*.json")
    report = json.loads(path.read_text())
    assert report["command"] == ["train", "demo"] and report["machine"]["cores"] >= 1
    assert report["entries"][0]["rates"] == [50.0, 100.0, 25.0] and "commit" in report


def test_the_headline_is_the_best_of_ours_against_the_best_of_theirs(capsys):
    usual = "BertForMaskedLM, float32, eager"
    bench.show_ratios({"nanoCram, eager": 1.1, usual: 5.0, "ModernBertForMaskedLM, compiled": 2.0})
    first, second = capsys.readouterr().out.splitlines()
    assert "2.00 times as fast as the best of theirs: ModernBertForMaskedLM, compiled" in first
    assert "5.00 times as fast as BertForMaskedLM as it comes" in second


def test_the_speed_of_the_recipe_follows_from_one_and_four_micro_batches(monkeypatch, capsys):
    """0.1 s for the optimizer and 0.5 s per micro-batch: 32 of them take 16.1 s."""

    class Worker:
        def __init__(self, make, recipe, compiled):
            assert recipe.rows == 256

        def turn(self):
            return Turn(2.1, 0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(bench, "Worker", Worker)
    shape = bench.Shape(1, 32, 2, 90, 64)
    recipe = Recipe({"batch_size": 2048}, 64, 64)
    found = bench.show_recipe_speed(recipe, shape, 1e9, 0.6, 1e10)
    assert found["mfu of the recipe"] == pytest.approx(32 * 1e9 / 16.1 / 1e10)
    assert f"{2048 * 128 / 16.1:,.0f} tokens/s" in capsys.readouterr().out


def test_the_rivals_get_no_mask_of_ones(monkeypatch):
    """Compiled, such a mask would keep flash attention out."""
    transformers = pytest.importorskip("transformers")
    seen = []
    plain = transformers.BertForMaskedLM.forward

    def watched(self, *args, **kwargs):
        seen.append(kwargs.get("attention_mask"))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", watched)
    shape = bench.Shape(1, 32, 2, 90, 2)
    bench.make_their_step(shape, "Bert", "cpu", torch.float32, False)()
    assert seen == [None]
