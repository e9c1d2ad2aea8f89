# The fully trained BERT-base from the hub, under the same protocol, with the paper's settings for
# it (batch 32, learning rate 2e-5). With --out_dir=out/crammed its scores become a row of that
# run's scorecard: python finetune_glue.py config/bert_base_eval.py
exec(open("config/bert_base.py").read())
out_dir = "out/bert_base_eval"

glue_init = "google-bert/bert-base-uncased"
glue_batch_size = 32
glue_learning_rate = 2e-5
