"""Measure how fast this machine trains, prepares and fine-tunes, next to what else one would use.

The candidates take turns, so that a noisy machine is noisy for all of them. Shown are medians and,
in brackets, the extremes.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch

import train
from finetune_glue import batches, collate
from model import BERT, Classifier, Config, flops_per_token
from nanocram.configurator import ROOT, resolve
from nanocram.device import make_deterministic, peak_flops, pick_device, pick_dtype
from nanocram.faults import Fault, one_line, run_script, write_json
from nanocram.optim import make_optimizers
from nanocram.sources import read_documents

RESULTS = ROOT / "results" / "bench"
SEQ_LEN = 128
REPEATS = 5  # turns of each candidate
SPIN_COUNT = "3000"  # as train.py and finetune_glue.py set it
GPU_ROWS = 256  # in a micro-batch on a GPU, for all shapes


@dataclass
class Shape:
    """The size of a model, and the rows of its micro-batch on a CPU."""

    n_layer: int
    width: int
    n_head: int
    vocab_size: int
    rows: int


SHAPES = {
    "demo": Shape(4, 256, 4, 8192, 64),
    "small": Shape(12, 384, 6, 32768, 64),
    "crammed": Shape(16, 768, 12, 32768, 32),
}


@dataclass
class Recipe:
    """A resolved config of train.py, with the rows of the batch that is timed."""

    config: dict
    rows: int
    micro_rows: int  # rows in a micro-batch


@dataclass
class Turn:
    """What one turn of a step has measured."""

    seconds: float  # per step
    memory: int  # bytes, the most so far
    parts: dict = field(default_factory=dict)  # {part of the last step: seconds}


def import_transformers():
    try:
        import transformers
    except ImportError as e:
        raise Fault("needs `pip install transformers`") from e
    return transformers


def synchronize(device):
    """Wait until a GPU has done what it was given, since its calls return before."""
    if device == "cuda":
        torch.cuda.synchronize()


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# Steps of training


def model_config(config):
    """Return the model's Config of a resolved config."""
    return Config(**{key: config[key] for key in Config.__dataclass_fields__})


def make_our_step(recipe, compiled):
    """Return train.py's step on random tokens, as a function that returns {part: seconds}."""
    # a model and its optimizers, as train.py makes them
    config = recipe.config
    device = pick_device(config["device"])
    model = BERT(model_config(config)).to(device)
    model.dtype = pick_dtype(device, config["dtype"])
    optimizers = make_optimizers(
        model,
        config["optimizer"],
        config["learning_rate"],
        config["weight_decay"],
        (config["beta1"], config["beta2"]),
        config["adam_eps"],
    )
    scaler = torch.amp.GradScaler(device, enabled=model.dtype == torch.float16)
    forward = torch.compile(model, dynamic=False) if compiled else model

    # a corpus of random tokens above the five special ones
    vocab_size = model.config.vocab_size
    seq_len = config["seq_len"]
    mask_id = 4
    rows = np.random.default_rng(0).integers(5, vocab_size, (1000, seq_len)).astype(np.uint16)
    n_masked = train.n_masked(seq_len, config["mask_rate"])
    generator = torch.Generator(device).manual_seed(0)

    def step():
        # read rows and mask them
        start = time.monotonic()
        ids = train.next_rows(rows, 0, recipe.rows, device)
        batch = train.mask_tokens(
            ids, n_masked, mask_id, vocab_size, generator, config["mask_80_10_10"]
        )
        micro_batches = train.split_batch(batch, recipe.micro_rows)
        synchronize(device)
        ready = time.monotonic()

        # forward, backward, clip, step
        train.training_step(model, forward, optimizers, scaler, micro_batches, config["grad_clip"])
        synchronize(device)
        return {"data and masks": ready - start, "step": time.monotonic() - ready}

    return step


def their_config(shape, kind):
    """Return a config of transformers, its feed-forward layers as large as ours in parameters."""
    transformers = import_transformers()
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
    }
    # weights per layer, in squares of the width: ours is gated and has 4 + 2, so BERT's has 3 + 3
    if kind == "Bert":
        return transformers.BertConfig(
            **common,
            intermediate_size=3 * shape.width,
            max_position_embeddings=SEQ_LEN,
            hidden_dropout_prob=0.0,  # like ours
            attention_probs_dropout_prob=0.0,
        )
    # ModernBERT's is gated, too; it names its special tokens, which must lie in the vocabulary
    return transformers.ModernBertConfig(
        **common,
        intermediate_size=2 * shape.width,
        sparse_prediction=True,  # logits at the masked positions only, like ours
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )


def make_their_step(shape, kind, device, dtype, compiled):
    """Return a step of BertForMaskedLM or ModernBertForMaskedLM of transformers, as a function.

    ModernBERT computes logits at the masked positions only, like ours; BertForMaskedLM at all.
    """
    transformers = import_transformers()
    model_class = getattr(transformers, f"{kind}ForMaskedLM")
    model = model_class(their_config(shape, kind)).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    # a batch of random tokens, a quarter of which count in the loss
    ids = torch.randint(5, shape.vocab_size, (shape.rows, SEQ_LEN), device=device)
    labels = ids.masked_fill(torch.rand(ids.shape, device=device) > 0.25, -100)

    def step():
        # no mask: one of ones would become (B, 1, T, T), and keep flash attention out
        forward(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return {}

    return step


# --------------------------------------------------------------------------------------------------
# Turns, each candidate in a process of its own


class ProcessEnded(Exception):
    """The process of a candidate ended; what it printed says why."""


class Worker:
    """A process that runs one step, so that none uses the memory and the settings of another."""

    def __init__(self, make, *args):
        """Start a process that makes a step, make(*args), and runs it once to warm up."""
        # spawn: a forked process would inherit memory, threads and a GPU that is in use
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_turns, args=(theirs, make, args))
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection
        self.turn()

    def turn(self):
        """Run the step for at least a second. Raise ProcessEnded if the process did not live."""
        try:
            self.connection.send("turn")
            return self.connection.recv()
        except (EOFError, OSError) as e:
            self.close()
            raise ProcessEnded from e

    def close(self):
        self.connection.close()
        self.process.join()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def serve_turns(connection, make, args):
    """Make a step, and send a Turn of it whenever the other end asks for one."""
    try:
        pick_device("auto")  # has an allocator setting that is worth 8 to 15 %: for all candidates
        step = make(*args)
        step()
        while connection.recv():
            connection.send(time_turn(step))
    except EOFError:
        return  # the other end is closed
    except Exception as e:
        sys.exit(f"  {one_line(e)}")  # printed, and noticed at the other end


def time_turn(step):
    """Run the step for at least a second and return a Turn."""
    start = time.monotonic()
    n_steps = 0
    while time.monotonic() < start + 1:
        parts = step()
        n_steps += 1
    return Turn((time.monotonic() - start) / n_steps, memory_used(), parts)


def memory_used():
    """Return the most bytes that were allocated on the GPU.

    On a CPU it is the resident size of the process, which includes 0.4 GB of torch itself.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows lacks

    # in bytes on macOS, in kilobytes elsewhere
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def take_turns(candidates, repeats):
    """Return {name: [seconds of each call]} of functions, each called once before to warm up."""
    times = {name: [] for name in candidates}
    for i in range(repeats + 1):
        for name, function in candidates.items():
            start = time.monotonic()
            function()
            if i > 0:
                times[name].append(time.monotonic() - start)
    return times


def show(title, seconds, work, unit, base=None, memory=None):
    """Print one line: work per second, its extremes, its ratio to `base`, and gigabytes.

    Returns the same as an entry of the report.
    """
    rates = sorted(work / s for s in seconds)
    extremes = f"[{rates[0]:,.0f}, {rates[-1]:,.0f}]"
    line = f"  {title:<46} {median(rates):>11,.0f} {extremes} {unit}"
    if base:
        line += f"   x {median(rates) / base:.2f}"
    if memory:
        line += f"   {memory / 1e9:.2f} GB"
    print(line, flush=True)
    return {"what": title, "unit": unit, "rates": [work / s for s in seconds], "bytes": memory}


def write_report(command, entries):
    """Write what was measured to results/bench, with the machine, the commit and the command."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    capabilities = torch.cpu.get_capabilities()
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "amx": bool(capabilities.get("amx_bf16")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
    }
    now = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{command[0]}-{now}.json"
    report = {"command": command, "commit": commit, "date": now, "machine": machine}
    write_json(path, report | {"entries": entries})
    print(path)


def processor_name():
    """Return the processor's name as Linux has it, or what Python knows."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# --------------------------------------------------------------------------------------------------
# bench train


def bench_train(names):
    """Print the tokens per second of full training steps, ours and those of transformers."""
    import_transformers()
    device = pick_device("auto")
    entries = []
    for name in names:
        shape = SHAPES[name]
        if device == "cuda":
            shape = replace(shape, rows=GPU_ROWS)
        try:
            found = bench_shape(name, shape, device, pick_dtype(device, "auto"))
        except ProcessEnded as e:
            raise Fault(f"{name}: our compiled step ended, see above; out of memory?") from e
        entries += [{"shape": name} | entry for entry in found]
    return entries


def recipe_of_shape(shape):
    """Return the recipe of train.py's defaults with a model of that size."""
    sizes = {
        "vocab_size": shape.vocab_size,
        "n_layer": shape.n_layer,
        "n_embd": shape.width,
        "n_head": shape.n_head,
        "n_inner": 4 * shape.width,
        "seq_len": SEQ_LEN,
    }
    config = resolve("train.py", [f"--{key}={value}" for key, value in sizes.items()])
    return Recipe(config, shape.rows, shape.rows)


def candidates_next_to(recipe, shape, device, dtype):
    """Return {label: (function that makes a step, its arguments)}, without ours compiled."""
    candidates = {"nanoCram, eager": (make_our_step, recipe, False)}

    # theirs as they come, in fp32, and in the best dtype of the device with and without compiler
    for kind in ("Bert", "ModernBert"):
        candidates[f"{kind}ForMaskedLM, float32, eager"] = (
            make_their_step, shape, kind, device, torch.float32, False,
        )  # fmt: skip
        for compile in (False, True):
            how = "compiled" if compile else "eager"
            candidates[f"{kind}ForMaskedLM, {name_of(dtype)}, {how}"] = (
                make_their_step, shape, kind, device, dtype, compile,
            )  # fmt: skip
    return candidates


def bench_shape(name, shape, device, dtype):
    """Print the speeds of one shape: each candidate takes turns with our compiled step."""
    recipe = recipe_of_shape(shape)
    tokens = shape.rows * SEQ_LEN
    size = f"{shape.n_layer} x {shape.width}, vocabulary {shape.vocab_size:,}"
    print(f"{name}: {size}, {shape.rows} rows of {SEQ_LEN} per step")

    turns = []  # of ours
    peaks = []  # FLOP/s, measured before each of them
    entries = []
    ratios = {}  # {label: how many times as fast ours is}
    with Worker(make_our_step, recipe, True) as ours:
        # the others one after the other, so that two models at most share the memory
        for label, candidate in candidates_next_to(recipe, shape, device, dtype).items():
            rounds = []
            try:
                with Worker(*candidate) as theirs:
                    for _ in range(REPEATS):
                        peaks.append(peak_flops(device, dtype)[0])
                        turns.append(ours.turn())
                        rounds.append(theirs.turn())
            except ProcessEnded:
                print(f"  {label}: its process ended, see above; out of memory?", flush=True)
                continue
            # relative to our own turns in these rounds
            our_speed = tokens / median(turn.seconds for turn in turns[-REPEATS:])
            seconds = [turn.seconds for turn in rounds]
            memory = rounds[-1].memory
            entries.append(show(label, seconds, tokens, "tokens/s", our_speed, memory))
            ratios[label] = our_speed / (tokens / median(seconds))

    # ours, over the turns against all of them
    seconds = [turn.seconds for turn in turns]
    memory = turns[-1].memory
    entries.append(show("nanoCram, compiled", seconds, tokens, "tokens/s", None, memory))
    show_ratios(ratios)

    # where the time of our compiled step goes
    total = median(sum(turn.parts.values()) for turn in turns)
    fractions = []
    for part in turns[0].parts:
        fraction = median(turn.parts[part] for turn in turns) / total
        fractions.append(f"{part} {fraction:.1%}")
    print(f"  of the compiled step: {', '.join(fractions)}")

    # and how much of the peak it uses
    n_masked = train.n_masked(SEQ_LEN, recipe.config["mask_rate"])
    flops = tokens * flops_per_token(model_config(recipe.config), SEQ_LEN, n_masked)
    mfu = median(flops / turn.seconds / peak for turn, peak in zip(turns, peaks))
    peak = f"{median(peaks) / 1e12:.2f} TFLOP/s in {name_of(dtype)}"
    print(f"  MFU {mfu:.0%} of {peak}, {peak_flops(device, dtype)[1]}")

    more = show_recipe_speed(recipe, shape, flops, median(seconds), median(peaks))
    return [*entries, {"what": "MFU", "mfu": mfu, "peak": median(peaks)} | more]


def show_recipe_speed(recipe, shape, flops, one, peak):
    """Print the speed and MFU of the recipe, whose step has many micro-batches.

    flops, one: of a step with one micro-batch, the latter in seconds. peak: FLOP/s.
    """
    # the optimizer moves once per step: what more micro-batches cost is without it
    with Worker(make_our_step, replace(recipe, rows=4 * shape.rows), True) as ours:
        four = median(ours.turn().seconds for _ in range(REPEATS))
    per_micro_batch = (four - one) / 3
    n_micro = recipe.config["batch_size"] // shape.rows
    seconds = one + (n_micro - 1) * per_micro_batch

    # print
    speed = n_micro * shape.rows * SEQ_LEN / seconds
    mfu = n_micro * flops / seconds / peak
    rows = f"{recipe.config['batch_size']:,} rows per step"
    print(
        f"  as the recipe runs, {rows}: {speed:,.0f} tokens/s, MFU {mfu:.0%}, computed from steps"
    )
    print(f"  of one and of four micro-batches ({one:.3f} s and {four:.3f} s)\n")
    return {"mfu of the recipe": mfu, "seconds of 1 and 4 micro-batches": [one, four]}


def show_ratios(ratios):
    """Print how many times as fast ours is: the best against the best, then as it comes."""
    theirs = {label: ratio for label, ratio in ratios.items() if "nanoCram" not in label}
    if not theirs:
        return
    best = min(theirs, key=theirs.get)
    print(
        f"  nanoCram, compiled, is {theirs[best]:.2f} times as fast as the best of theirs: {best}"
    )
    usual = "BertForMaskedLM, float32, eager"
    if usual in theirs:
        print(f"  and {theirs[usual]:.2f} times as fast as BertForMaskedLM as it comes: {usual}")


def profile_step(name):
    """Print where the time of our eager step goes, by operation, and write a trace of it."""
    from torch.profiler import ProfilerActivity, profile

    device = pick_device("auto")
    shape = replace(SHAPES[name], rows=GPU_ROWS) if device == "cuda" else SHAPES[name]
    step = make_our_step(recipe_of_shape(shape), False)
    step()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    table = profiler.key_averages()
    print(table.table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=40))
    path = f"profile-{name}.json"
    profiler.export_chrome_trace(path)
    print(f"{path}: open it in chrome://tracing or ui.perfetto.dev")


def relative_speeds(recipes):
    """Return {name: tokens per second, as a multiple of the first recipe's} of {name: Recipe}.

    A recipe that does not run is not in the result.
    """
    (first, reference), *others = recipes.items()
    speeds = {first: 1.0}
    try:
        base = Worker(make_our_step, reference, reference.config["compile"])
    except ProcessEnded as e:
        raise Fault(f"{first}: does not run, and all speeds are relative to its own") from e
    with base:
        for name, recipe in others:
            # how much longer the first recipe takes for a step, in turns side by side
            ratios = []
            try:
                with Worker(make_our_step, recipe, recipe.config["compile"]) as other:
                    for _ in range(3 * REPEATS):
                        base_seconds = base.turn().seconds
                        ratios.append(base_seconds / other.turn().seconds)
            except ProcessEnded:
                print(f"{name}: does not run", flush=True)
                continue

            # a step of the one may have more tokens than a step of the other
            tokens = recipe.rows * recipe.config["seq_len"]
            base_tokens = reference.rows * reference.config["seq_len"]
            speeds[name] = median(ratios) * tokens / base_tokens
            print(f"{name}: {speeds[name]:.2f} times the tokens/s of {first}", flush=True)
    return speeds


# --------------------------------------------------------------------------------------------------
# bench prepare


def bench_prepare(folder):
    """Print the characters per second from text to bins.

    The vocabulary is given, so that its training is in none of the figures.
    """
    import datasets

    datasets.disable_progress_bars()
    if not folder.exists():
        raise Fault(f"{folder} does not exist")
    folder = folder.resolve()

    # the texts as prepare.py reads them
    documents = read_documents({"files": str(folder)}, 0, "blank_line", Counter())
    texts = [text for text, _ in documents]
    n_chars = sum(len(text) for text in texts)
    print(f"prepare: {n_chars / 1e6:.0f} M characters")
    with tempfile.TemporaryDirectory() as home:
        times = take_turns(prepare_candidates(Path(home), folder, texts), repeats=2)

    # all of them tokenize, so that alone is what they are compared with
    base = median(n_chars / s for s in times["tokenizers.encode_batch alone"])
    entries = []
    for label, seconds in times.items():
        entries.append(show(label, seconds, n_chars, "characters/s", base))
    return entries


def prepare_candidates(home, folder, texts):
    """Return {label: function} of three ways to tokenize the texts of a folder."""
    from tokenizers import Tokenizer

    # a first run of prepare.py, which trains the vocabulary
    (home / "config").symlink_to(ROOT / "config")
    command = [sys.executable, ROOT / "prepare.py", "config/cpu.py"]
    command += [f"--sources={folder}", "--max_chars=0"]
    first = subprocess.run([*command, "--dataset=first"], cwd=home, stdout=subprocess.DEVNULL)
    if first.returncode:
        raise Fault("prepare.py failed, see above")
    path = home / "data" / "first" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    n_runs = iter(range(100))  # numbers of the output folders

    def tokenize_alone():
        allow_parallel_tokenizers()
        for i in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=False)

    def run_prepare():
        allow_parallel_tokenizers()
        own = [f"--dataset=d{next(n_runs)}", f"--tokenizer_file={path}"]
        subprocess.run([*command, *own], cwd=home, check=True, stdout=subprocess.DEVNULL)

    def use_datasets():
        map_datasets(texts, tokenizer, home / f"usual{next(n_runs)}")

    return {
        "tokenizers.encode_batch alone": tokenize_alone,
        "prepare.py": run_prepare,
        "datasets.map": use_datasets,
    }


def allow_parallel_tokenizers():
    """Undo what datasets.map leaves set, in this process and in those it starts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def map_datasets(texts, tokenizer, folder):
    """Tokenize, pack, shuffle and save as the examples of transformers do."""
    import datasets

    sep_id = 3

    def tokenize(batch):
        encodings = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids + [sep_id] for encoding in encodings]}

    def pack(batch):
        ids = list(chain.from_iterable(batch["ids"]))
        starts = range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)
        return {"ids": [ids[i : i + SEQ_LEN] for i in starts]}

    # with a process per core
    data = datasets.Dataset.from_dict({"text": texts})
    n_processes = os.cpu_count()
    data = data.map(tokenize, batched=True, remove_columns="text", num_proc=n_processes)
    data = data.map(pack, batched=True, num_proc=n_processes)
    data.shuffle(seed=0).save_to_disk(folder)


# --------------------------------------------------------------------------------------------------
# bench finetune


def bench_finetune():
    """Print the examples per second of fine-tuning at 4 x 256, in batches of 16.

    Lengths are like those of GLUE's single sentences and pairs: most are short.
    """
    transformers = import_transformers()
    device = pick_device("auto")
    dtype = pick_dtype(device, "auto")
    make_deterministic(device)  # as finetune_glue.py does; here for all candidates

    # rows of random tokens, up to 120 of them, between <cls> and <sep>
    rng = np.random.default_rng(0)
    special_ids = {"pad": 0, "cls": 2, "sep": 3}
    rows = []
    for length in np.minimum(rng.gamma(3, 12, 1600), 120):
        words = rng.integers(5, 8192, max(int(length), 3)).tolist()
        rows.append([special_ids["cls"], *words, special_ids["sep"]])
    lengths = np.array([len(row) for row in rows])
    print(f"fine-tuning, 4 x 256, batch 16, mean length {lengths.mean():.0f}")

    # our classifier, on batches of similar lengths
    shape = SHAPES["demo"]
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_inner": 1024}
    bert = BERT(Config(vocab_size=shape.vocab_size, **sizes, dropout=0.1)).to(device)
    bert.dtype = dtype
    classifier = Classifier(bert, 2).to(device).train()

    def our_logits():
        for index in batches(lengths, 16, rng):
            yield classifier(*collate(rows, index, special_ids, device, SEQ_LEN))

    candidates = {f"finetune_glue.py, {name_of(dtype)}": make_epoch(classifier, our_logits, device)}

    # that of transformers, padded to 128 tokens
    config = transformers.BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
    )
    for their_dtype in dict.fromkeys([torch.float32, dtype]):
        model = transformers.BertForSequenceClassification(config).to(device, their_dtype).train()
        label = f"transformers, padded to {SEQ_LEN}, {name_of(their_dtype)}"
        candidates[label] = make_epoch(model, padded_logits(model, rows, device), device)

    # relative to what a user of transformers gets without asking for another dtype
    times = take_turns(candidates, 3)
    base = median(len(rows) / s for s in times[f"transformers, padded to {SEQ_LEN}, float32"])
    entries = []
    for label, seconds in times.items():
        entries.append(show(label, seconds, len(rows), "examples/s", base))
    return entries


def padded_logits(model, rows, device):
    """Return a function that yields a model's logits on batches of 16 rows, padded to SEQ_LEN."""

    def logits():
        for start in range(0, len(rows), 16):
            padded = [row + [0] * (SEQ_LEN - len(row)) for row in rows[start : start + 16]]
            ids = torch.tensor(padded, device=device)
            yield model(input_ids=ids, attention_mask=(ids != 0).long()).logits

    return logits


def make_epoch(model, logits, device):
    """Return a function that trains a classifier on all batches whose logits are yielded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def epoch():
        for batch_logits in logits():
            labels = torch.zeros(len(batch_logits), dtype=torch.long, device=device)
            torch.nn.functional.cross_entropy(batch_logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)

    return epoch


# --------------------------------------------------------------------------------------------------
# bench busy


def bench_busy():
    """Print the speed of a training and a fine-tuning step, alone and next to a busy process.

    Once as torch comes, and once with threads that fall asleep sooner, as the stages set it. The
    two take turns.
    """
    recipe = recipe_of_shape(SHAPES["demo"])
    steps = {
        "training, compiled": (make_our_step, recipe, True),
        "training, eager": (make_our_step, recipe, False),
        "fine-tuning": (make_finetuning_step,),
    }
    spin_counts = {"as torch comes": None, f"GOMP_SPINCOUNT={SPIN_COUNT}": SPIN_COUNT}
    entries = []
    for name, step in steps.items():
        with contextlib.ExitStack() as stack:
            # a process reads the variable while it imports torch
            workers = {}
            for policy, spin_count in spin_counts.items():
                os.environ.pop("GOMP_SPINCOUNT", None)
                if spin_count:
                    os.environ["GOMP_SPINCOUNT"] = spin_count
                workers[policy] = stack.enter_context(Worker(*step))
                workers[policy].turn()

            # turns without and with other work
            alone = {policy: [] for policy in workers}
            busy = {policy: [] for policy in workers}
            for _ in range(REPEATS + 1):
                for policy, worker in workers.items():
                    alone[policy].append(worker.turn().seconds)
                with busy_process():
                    for policy, worker in workers.items():
                        busy[policy].append(worker.turn().seconds)

        # relative to torch as it comes, alone
        base = 1000 / median(alone["as torch comes"])
        for policy in workers:
            title = f"{name}, {policy}"
            entries.append(show(f"{title}, alone", alone[policy], 1000, "steps/1,000 s", base))
            title = f"{title}, one core busy"
            entries.append(show(title, busy[policy], 1000, "steps/1,000 s", base))
    return entries


@contextlib.contextmanager
def busy_process():
    """Keep a core busy during a block, with the lowest priority, as a browser in the background."""
    command = [sys.executable, "-c", "while True: pass"]
    # in a session of its own: where the kernel groups processes by session, nice counts inside only
    process = subprocess.Popen(["nice", "-n", "19", *command], start_new_session=True)
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def make_finetuning_step():
    """Return a step on 16 texts of 48 tokens, at 4 x 256."""
    device = pick_device("auto")
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_inner": 1024}
    bert = BERT(Config(vocab_size=8192, **sizes, dropout=0.1)).to(device)
    bert.dtype = pick_dtype(device, "auto")
    classifier = Classifier(bert, 2).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, 8192, (16, 48), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    labels = torch.zeros(16, dtype=torch.long, device=device)

    def step():
        torch.nn.functional.cross_entropy(classifier(ids, mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return {}

    return step


# --------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    # train
    about = "training steps, next to BertForMaskedLM and ModernBertForMaskedLM of transformers"
    command = commands.add_parser("train", help=about, description=about)
    sizes = [f"{name} ({s.n_layer} x {s.width}, {s.vocab_size:,})" for name, s in SHAPES.items()]
    about_shapes = f"layers x width, vocabulary: {', '.join(sizes)}; default: demo small"
    command.add_argument("shapes", nargs="*", metavar="SHAPE", help=about_shapes)
    about_profile = "instead, show where the time of our eager step goes, by operation"
    command.add_argument("--profile", action="store_true", help=about_profile)

    # prepare
    about = "prepare.py, next to encode_batch of tokenizers alone and to datasets.map"
    command = commands.add_parser("prepare", help=about, description=about)
    command.add_argument("folder", type=Path, help="text to read")

    # finetune
    about = "fine-tuning, next to a plain loop of transformers that pads to 128 tokens"
    commands.add_parser("finetune", help=about, description=about)

    # busy
    about = "training and fine-tuning next to a process that keeps a core busy"
    commands.add_parser("busy", help=about, description=about)

    # do it
    args = parser.parse_args(argv)
    if args.command == "train":
        unknown = [name for name in args.shapes if name not in SHAPES]
        if unknown:
            raise Fault(f"there is no shape {unknown[0]}; known are {', '.join(SHAPES)}")
        shapes = args.shapes or ["demo", "small"]
        if args.profile:
            profile_step(shapes[0])
            return
        entries = bench_train(shapes)
    elif args.command == "prepare":
        entries = bench_prepare(args.folder)
    elif args.command == "busy":
        entries = bench_busy()
    else:
        entries = bench_finetune()
    write_report(argv or sys.argv[1:], entries)


if __name__ == "__main__":
    run_script(main)
