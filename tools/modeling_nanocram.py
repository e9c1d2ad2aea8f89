"""nanoCram models as `transformers` loads them. export_hf.py puts model.py in front of what follows the imports."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput

from model import BERT, Config

# exported from here on


class NanocramConfig(PretrainedConfig):
    """architecture: the Config of model.py as a dict; pooling and pooler_width: the classification head's."""

    model_type = "nanocram"

    def __init__(self, architecture=None, pooling="first", pooler_width=1024, classifier_dropout=0.1, **kwargs):
        self.architecture = vars(Config(**architecture or {}))
        self.pooling, self.pooler_width, self.classifier_dropout = pooling, pooler_width, classifier_dropout
        self.vocab_size, self.hidden_size = self.architecture["vocab_size"], self.architecture["n_embd"]
        self.num_hidden_layers, self.num_attention_heads = self.architecture["n_layer"], self.architecture["n_head"]
        self.max_position_embeddings = self.architecture["max_len"]
        super().__init__(**kwargs)


class NanocramModel(PreTrainedModel):
    """The encoder: last_hidden_state (B, T, width)."""

    config_class = NanocramConfig
    base_model_prefix = "nanocram"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.bert = BERT(Config(**config.architecture))
        # the tables of positions are saved too, as transformers fills a model from its file alone
        self.bert._non_persistent_buffers_set.clear()
        self.build()
        self.post_init()

    def build(self):
        """Heads, in subclasses."""

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.bert.embedding

    def encode(self, input_ids, attention_mask=None, token_type_ids=None):
        self.bert.dtype = self.bert.embedding.weight.dtype
        mask = None if attention_mask is None else attention_mask.bool()
        return self.bert.encode(input_ids, mask, token_type_ids)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **kwargs):
        return BaseModelOutput(last_hidden_state=self.encode(input_ids, attention_mask, token_type_ids))


class NanocramForMaskedLM(NanocramModel):
    """logits (B, T, vocab_size); labels (B, T) with -100 where nothing is to be predicted."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        logits = self.bert.logits(self.encode(input_ids, attention_mask, token_type_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class NanocramForSequenceClassification(NanocramModel):
    """logits (B, num_labels), with the head of the paper's GLUE runs; num_labels = 1 is regression."""

    def build(self):
        self.pooler = nn.Linear(self.config.hidden_size, self.config.pooler_width)
        self.head = nn.Linear(self.config.pooler_width, self.config.num_labels)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.encode(input_ids, mask, token_type_ids)
        pooled = hidden[:, 0] if self.config.pooling == "first" else (hidden * mask[..., None]).sum(1) / mask.sum(1, True)
        pooled = F.dropout(torch.tanh(self.pooler(pooled)), self.config.classifier_dropout, self.training)
        logits, loss = self.head(pooled), None
        if labels is not None:
            regression = self.config.num_labels == 1
            loss = F.mse_loss(logits[:, 0], labels.float()) if regression else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
