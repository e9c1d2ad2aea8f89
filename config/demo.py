# `make demo`: all three stages, offline, in a few minutes on two cores. Crammed BERT with 4
# layers of width 256 and rotary positions, on the documentation inside the installed Python
# packages.
exec(open("config/cpu.py").read())
out_dir = "out/demo"

dataset = "demo"
sources = ["docs"]
max_chars = 0
val_rows = 512

budget_hours = 0.06
eval_minutes = 1.0
checkpoint_minutes = 1.0

tasks = ["docs_package", "docs_next"]
glue_epochs = 3
glue_seeds = 2
glue_max_train = 2000
