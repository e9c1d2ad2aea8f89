# An experiment: crammed BERT with an embedding that starts from counted pairs of tokens, NorMuon,
# rotary positions, QK-norm, queries and keys that contain the neighbours', values that contain
# those of the first block, and skips from the embedding. With 4 layers of width 256 on a CPU
# (config/nanocram_cpu.py) it had a lower val_loss after equal time, and a better STS-B. It needs
# Muon for fine-tuning, too: results/README.md. At full size, Muon with rotary positions and
# QK-norm was run for two minutes of an H100, and had a lower val_loss there as well. Nobody has
# run it for a day.
exec(open("config/crammed.py").read())
out_dir = "out/nanocram"

position = "rotary"
rotary_base = 1000.0
qk_norm = True
neighbour_keys = True
value_residual = True
embedding_skip = True
count_tokens = 100_000_000
decoder_bias = True

# A step of Muon moves a matrix by 0.2 lr sqrt(width) in its spectral norm. nanocram_cpu.py has
# 6e-3 at a third of this width; the same norm here takes 6e-3 / sqrt(3). The rule does not know
# about depth, nor about the batch, which is 128 to 8,192 rows here and 64 there.
optimizer = "muon"
learning_rate = 3.5e-3
weight_decay = 0.1
schedule = "trapezoid"
warmup = 0.05
cooldown = 0.6

glue_optimizer = "muon"
glue_learning_rate = 9e-4  # 1.5e-3 in nanocram_cpu.py, by the same rule
glue_dropout = 0.0
