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

SCORED = ["docs_package", "docs_next"]  # single texts, and pairs
SETTINGS = ["--glue_epochs=2", "--glue_seeds=2", "--glue_max_train=1000", "--dtype=float32"]


@pytest.mark.slow
def test_a_plain_loop_of_transformers_scores_like_finetune_glue(run, home):
    """On the exported model, shuffled, padded to glue_max_len, with the settings of glue.json."""
    size = ["--max_steps=150", "--compile=False"]
    for script, words in (("prepare.py", []), ("train.py", size), ("finetune_glue.py", SETTINGS)):
        message, output = run(script, "config/demo.py", *words, f"--tasks={','.join(SCORED)}")
        assert message is None, message
    assert run("export_hf.py", "out/demo", "--to=exported")[0] is None
    row = json.loads(Path("out/demo/glue.json").read_text())["rows"]["run"]
    for name in SCORED:
        ours = row[name]["scores"]
        theirs = [score_of_plain_loop(name, row[name]["settings"], seed) for seed in range(2)]
        print(f"{name}: finetune_glue.py {ours}, transformers {theirs}")
        assert abs(np.mean(ours) - np.mean(theirs)) < 3.0
        assert min(ours + theirs) > {"docs_package": 40.0, "docs_next": 52.0}[name]


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
