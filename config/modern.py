# Crammed BERT in the form of ModernBERT: with rotary positions, without a norm before the first
# attention, and with a head of linear layer, GELU and norm. `python -m tools.export_hf` writes it
# as a ModernBertForMaskedLM, which transformers loads without any code of ours.
exec(open("config/crammed.py").read())
out_dir = "out/modern"

position = "rotary"
first_norm = False
head_transform = True
