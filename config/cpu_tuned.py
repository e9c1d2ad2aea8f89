# config/cpu.py with batches and a learning rate that suit half an hour of two slow cores (10
# million tokens) better. This is the baseline of config/nanocram_cpu.py. The entry
# cpu_tuned+scaled_sinusoidal_positions of tools.sweep is the same with the paper's positions.
exec(open("config/cpu.py").read())
out_dir = "out/cpu_tuned"

batch_ramp = 0.6
batch_ramp_rows = 16
micro_batch_size = 16
learning_rate = 4e-3
