# Real work on a CPU in half an hour: crammed BERT with 4 layers of width 256. Rotary positions
# replace the paper's sinusoid: with them attention begins to pay within the first minutes
# (results/README.md has the curve).
exec(open("config/crammed.py").read())
out_dir = "out/cpu"

# 100 MB of Wikipedia; --sources=FOLDER reads a folder instead
dataset = "cpu"
sources = [{"path": "wikimedia/wikipedia", "name": "20231101.en", "split": "train"}]
max_chars = 100_000_000
max_rows = 0
filter_ratio = 0.0  # 0.25 is for a vocabulary of 32,768
order = "shuffle"
vocab_size = 8192
val_rows = 1024

n_layer = 4
n_head = 4
n_embd = 256
n_inner = 1024
position = "rotary"
rotary_base = 1000.0

budget_hours = 0.5
batch_size = 64
micro_batch_size = 64
batch_ramp = 0.0
learning_rate = 2e-3
eval_minutes = 2.5
checkpoint_minutes = 5.0

glue_learning_rate = 2e-4  # 4e-5 suits 120 M parameters
# The rows of pretraining have no <cls>; a model this small does not learn to use it in 5 epochs.
glue_pooling = "mean"
