# The crammed BERT that the authors of the paper have released, under the paper's protocol: whether
# a GPU and this code give its published average of 80.7 takes an evening to see.
# With --out_dir=out/crammed its scores become a row of that run's scorecard:
# python finetune_glue.py config/crammed_bert_eval.py
exec(open("config/crammed.py").read())
out_dir = "out/crammed_bert_eval"

glue_init = "JonasGeiping/crammed-bert"
