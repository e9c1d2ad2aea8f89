# config/nanocram.py at the size of config/cpu.py, which has rotary positions already: half an
# hour of two CPU cores.
exec(open("config/cpu.py").read())
out_dir = "out/nanocram_cpu"

qk_norm = True
neighbour_keys = True
value_residual = True
embedding_skip = True

count_tokens = 25_000_000  # all of the corpus, which takes 5 seconds
decoder_bias = True
optimizer = "muon"
learning_rate = 6e-3
weight_decay = 0.1
schedule = "trapezoid"
warmup = 0.05
cooldown = 0.6

glue_optimizer = "muon"  # AdamW hardly fine-tunes what Muon pretrained: results/README.md
glue_learning_rate = 1.5e-3
glue_dropout = 0.0
