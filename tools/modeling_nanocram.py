"""nanoCram models as `transformers` loads them.

tools.export_hf writes model.py and what follows the imports here into one file, which needs nothing
else of this repository.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput

from model import BERT, Config

# exported from here on


class NanocramConfig(PretrainedConfig):
    """The architecture, as a dict of the fields of Config above, and the classification head."""

    model_type = "nanocram"

    def __init__(
        self,
        architecture=None,
        pooling="first",  # first, mean: what the head sees
        pooler_width=1024,  # outputs of the head's first layer
        classifier_dropout=0.1,
        **kwargs,
    ):
        self.architecture = vars(Config(**architecture or {}))
        self.pooling = pooling
        self.pooler_width = pooler_width
        self.classifier_dropout = classifier_dropout
        # the names that `transformers` expects
        self.vocab_size = self.architecture["vocab_size"]
        self.hidden_size = self.architecture["n_embd"]
        self.num_hidden_layers = self.architecture["n_layer"]
        self.num_attention_heads = self.architecture["n_head"]
        self.max_position_embeddings = self.architecture["max_len"]
        super().__init__(**kwargs)


class NanocramModel(PreTrainedModel):
    """The encoder. Its last_hidden_state is (B, T, width)."""

    config_class = NanocramConfig
    base_model_prefix = "nanocram"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.bert = BERT(Config(**config.architecture))
        # transformers fills a model from its file only, so the tables of positions are saved, too
        self.bert._non_persistent_buffers_set.clear()
        self.build()
        self.post_init()

    def build(self):
        """Add the head; subclasses do."""

    # for a head that is not in the file
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.bert.embedding

    def encode(self, input_ids, attention_mask=None, token_type_ids=None):
        # the person who loads the model chooses the dtype of all weights
        self.bert.dtype = self.bert.embedding.weight.dtype
        mask = attention_mask
        if mask is not None:
            mask = mask.bool()
        return self.bert.encode(input_ids, mask, token_type_ids)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **kwargs):
        hidden = self.encode(input_ids, attention_mask, token_type_ids)
        return BaseModelOutput(last_hidden_state=hidden)


class NanocramForMaskedLM(NanocramModel):
    """Logits are (B, T, vocab_size). Labels are (B, T); -100 leaves a token out of the loss."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        hidden = self.encode(input_ids, attention_mask, token_type_ids)
        logits = self.bert.logits(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class NanocramForSequenceClassification(NanocramModel):
    """Logits are (B, num_labels), from the head of Classifier. num_labels = 1 is a regression."""

    def build(self):
        self.pooler = nn.Linear(self.config.hidden_size, self.config.pooler_width)
        self.head = nn.Linear(self.config.pooler_width, self.config.num_labels)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids)
        hidden = self.encode(input_ids, mask, token_type_ids)

        # pooling, and the head, in the dtype of the weights
        if self.config.pooling == "first":
            pooled = hidden[:, 0]
        else:
            total = (hidden * mask[..., None]).sum(1)
            pooled = total / mask.sum(1, keepdim=True)
        features = torch.tanh(self.pooler(pooled))
        features = F.dropout(features, self.config.classifier_dropout, self.training)
        logits = self.head(features)

        # as in fine-tuning: squared error of values, cross-entropy of classes
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits[:, 0], labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
