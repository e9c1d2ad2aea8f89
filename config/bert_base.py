# BERT-base (Devlin et al. 2019), trained in a wall-clock budget: the original architecture and
# optimizer (google-research/bert, optimization.py), and a cosine to zero at the end of the budget.
exec(open("config/crammed.py").read())
out_dir = "out/bert_base"

dataset = "pile_unfiltered"
order = "shuffle"  # the corpus as it comes
filter_ratio = 0.0

n_layer, n_head, n_embd, n_inner, max_len = 12, 12, 768, 3072, 512
norm_place = "post"
bias = True
glu = False
position = "learned"
final_norm = False
head_transform = True
decoder_bias = True
token_types = 2
dropout = 0.1

mask_rate = 0.15
optimizer = "adamw"  # BERT's Adam decouples its decay, but lacks the correction of the first steps
learning_rate = 1e-4
beta2 = 0.999
adam_eps = 1e-6
grad_clip = 1.0
schedule = "cosine"
warmup = 0.06
batch_size = 512
batch_ramp = 0.0
