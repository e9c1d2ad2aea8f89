# Our own recipe, inside the rules: crammed BERT with Muon, rotary positions, QK-norm, and <mask> in every masked place.
# Chosen at 4 x 256 on a CPU (config/nanocram_cpu.py, results/README.md); at this size it has not been run.
exec(open("config/crammed.py").read())
out_dir = "out/nanocram"

position = "rotary"
rotary_base = 1000.0
qk_norm = True
mask_80_10_10 = False

# A step of Muon moves a matrix by 0.2 lr sqrt(width) in its spectral norm. The same norm at three times the width of
# nanocram_cpu.py, where 1e-2 was best, takes 1e-2 / sqrt(3).
optimizer = "muon"
learning_rate = 6e-3
