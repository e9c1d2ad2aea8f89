# 24-hour BERT (Izsak et al. 2021, arXiv 2104.07705): BERT-large with pre-norm and a high learning
# rate, which falls linearly to zero when the budget ends.
exec(open("config/bert_base.py").read())
out_dir = "out/izsak"

n_layer, n_head, n_embd, n_inner, max_len = 24, 16, 1024, 4096, 128
norm_place = "pre"
norm_eps = 1e-6
token_types = 0

learning_rate = 2e-3
beta2 = 0.98
grad_clip = 0.0
schedule = "linear"
batch_size = 4096
