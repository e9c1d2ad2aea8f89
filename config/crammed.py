# Crammed BERT: the paper's final recipe, 24 hours on one GPU. The architecture is model.py's
# default, the training is train.py's. Both follow the authors' code at its last commit (arch
# crammed-bert, train bert-o4, data the-pile).
out_dir = "out/crammed"

# 8 million documents of the Pile. Documents with many tokens per character are dropped, the rows
# with most full stops come first, and rows are cut after sorting.
dataset = "pile"
sources = [{"path": "monology/pile-uncopyrighted", "split": "train"}]
max_chars = 50_000_000_000
max_rows = 85_000_000
filter_ratio = 0.25
order = "sentence_length"

budget_hours = 24.0
