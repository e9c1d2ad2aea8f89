# Rows of 128 tokens for nine tenths of the time, then rows of 512, as BERT was trained: short rows
# are cheaper, and most of what there is to learn is in them. This is the second part. It branches
# off from a run of config/cpu.py whose learning rate has stayed at its peak (the commands are in
# docs/scale.md), keeps its tokenizer, model and optimizer, and lets the rate fall to zero.
exec(open("config/cpu.py").read())
out_dir = "out/two_lengths"

dataset = "cpu_512"
seq_len = 512
val_rows = 256
tokenizer_file = "out/cpu_128"

init_from = "out/cpu_128/ckpt.pt"
budget_hours = 0.05
schedule = "linear"
batch_size = 16  # as many tokens per step as 64 rows of 128
micro_batch_size = 16
