# config/cpu.py with the batches and the rate that suit half an hour of two slow cores, 10 M tokens, better: the baseline of
# config/nanocram_cpu.py. `sweep.py cpu_tuned cpu_tuned+scaled_sinusoidal_positions ...` has it with the paper's positions.
exec(open("config/cpu.py").read())
out_dir = "out/cpu_tuned"

batch_ramp = 0.6
batch_ramp_rows = 16
micro_batch_size = 16
learning_rate = 4e-3
