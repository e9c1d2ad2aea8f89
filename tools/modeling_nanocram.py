"""nanoCram models as `transformers` loads them.

tools.export_hf writes model.py and what follows the imports here into one file, which needs nothing
else of this repository.

The layers are those of model.py, but all of torch's own kind, and called as a whole. So LoRA and
int8 find them, and may put something else in their place.
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel, modeling_outputs
from transformers.utils import can_return_tuple

from model import (
    ATTENTION,
    BERT,
    ClassificationHead,
    Config,
    FeedForward,
    Linear,
    dropout,
    make_norm,
    mean_of_tokens,
    rotary_tables,
    rotate,
    sinusoid,
    with_neighbours,
)

# exported from here on


class NanocramConfig(PretrainedConfig):
    """The fields of Config above, under their names here or in transformers, and of the heads."""

    model_type = "nanocram"
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "max_len",
        "layer_norm_eps": "norm_eps",
        "type_vocab_size": "token_types",
        "hidden_dropout_prob": "dropout",
    }

    def __init__(
        self,
        pooling="mean",  # first, mean: what a head for whole texts sees
        pooler_width=1024,  # outputs of the first layer of that head
        classifier_dropout=0.1,  # before the last layer of all heads but that of masked tokens
        **kwargs,
    ):
        for name, default in vars(Config()).items():
            setattr(self, name, kwargs.pop(name, default))
        self.pooling = pooling
        self.pooler_width = pooler_width
        self.classifier_dropout = classifier_dropout
        kwargs.setdefault("tie_word_embeddings", self.tie_weights)
        super().__init__(**kwargs)

    def encoder(self):
        """Return the Config of a BERT without a head."""
        config = Config(**{name: getattr(self, name) for name in vars(Config())})
        return replace(config, head_transform=False, decoder_bias=False, tie_weights=True)


# --------------------------------------------------------------------------------------------------
# The encoder


class WholeFeedForward(FeedForward):
    """The same function with one product in place of two by halves of the weights."""

    def forward(self, x):
        if not self.glu:
            return super().forward(x)
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)


def use_plain_layers(bert):
    """Replace the layers of a BERT that cast their weights, or use a part of them."""
    # one layer for both halves of a gated one
    for block in bert.blocks:
        if block.feed_forward is not None:
            block.feed_forward = WholeFeedForward(block.config)
    # torch's own linear layers
    for module in list(bert.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear):
                has_bias = layer.bias is not None
                setattr(module, name, nn.Linear(layer.in_features, layer.out_features, has_bias))


def position_tables(config):
    """Return {name: table} of the positions that are computed, not learned."""
    if config.position in ("scaled_sinusoidal", "sinusoidal"):
        return {"sinusoid": sinusoid(config.max_len, config.n_embd)}
    if config.position != "rotary":
        return {}
    width = ATTENTION[config.attention].rotary_width(config)
    cos, sin = rotary_tables(config.max_len, width, config.rotary_base)
    return {"cos": cos, "sin": sin}


def attention_weights(block, x, mask, rotary):
    """Return the weights (B, H, T, T) with which the attention of a block mixes its input x."""
    c = block.config
    if c.attention != "softmax":
        raise ValueError(f"attention={c.attention} has no softmax whose weights could be returned")
    B, T, D = x.shape
    if c.norm_place == "pre":
        x = block.norm1(x)

    # queries and keys (B, H, T, d), as in SelfAttention
    qkv = block.attention.qkv(x).view(B, T, 3, c.n_head, D // c.n_head)
    qk = qkv[:, :, :2]
    if c.qk_norm:
        qk = F.rms_norm(qk, qk.shape[-1:])
    q, k = qk.permute(2, 0, 3, 1, 4)
    if mask is not None:
        mask = mask[:, None, None]
    if c.neighbour_keys:
        q = with_neighbours(q, mask, *rotary)
        k = with_neighbours(k, mask, *rotary)
    elif rotary is not None:
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)

    # their products, without the padding
    scores = q @ k.mT / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


class NanocramPreTrainedModel(PreTrainedModel):
    """What the encoder and the models with a head have in common."""

    config_class = NanocramConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    # Trainer divides the loss of a batch by the number of its parts, unless the model does
    accepts_loss_kwargs = False

    def _init_weights(self, module):
        # a head that is not in the file; and the tables of positions, which are in no file
        super()._init_weights(module)
        if isinstance(module, BERT):
            for name, table in position_tables(module.config).items():
                module.get_buffer(name).copy_(table)

    def get_input_embeddings(self):
        return self.base_model.bert.embedding

    def set_input_embeddings(self, embedding):
        self.base_model.bert.embedding = embedding


class NanocramModel(NanocramPreTrainedModel):
    """The encoder. Its last_hidden_state is (B, T, width)."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BERT(config.encoder())
        self.gradient_checkpointing = False
        use_plain_layers(self.bert)
        self.post_init()

    def embed(self, input_ids, inputs_embeds, token_type_ids, position_ids):
        """Return the input of the first block (B, T, D), and the tables of `rotate` or None.

        position_ids: (B, T) or (1, T).
        """
        c, bert = self.config, self.bert
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")

        # which token
        x = inputs_embeds
        if x is None:
            x = bert.embedding(input_ids)
        dtype = x.dtype

        # in which segment
        T = x.size(1)
        if c.token_types and token_type_ids is None:
            x = x + bert.type_embedding.weight[0]
        elif c.token_types:
            x = x + bert.type_embedding(token_type_ids.clamp(max=c.token_types - 1))

        # at which position
        if T > c.max_len:
            raise ValueError(f"a sequence of {T} tokens is longer than max_len = {c.max_len}")
        if position_ids is None:
            position_ids = torch.arange(T, device=x.device)[None]
        rotary = None
        if c.position == "learned":
            x = x + bert.position_embedding(position_ids)
        elif c.position == "scaled_sinusoidal":
            x = x + bert.position_scale * bert.sinusoid[position_ids]
        elif c.position == "sinusoidal":
            x = x + bert.sinusoid[position_ids]
        elif c.position == "rotary":
            cos = bert.cos[position_ids].to(dtype)
            sin = bert.sin[position_ids].to(dtype)
            rotary = (cos, sin)
            if c.attention == "softmax":  # the same for all heads
                rotary = (cos[:, None], sin[:, None])
        x = bert.embedding_norm(x.to(dtype))
        return dropout(x, c.dropout, self.training), rotary

    def run_block(self, block, *inputs):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, *inputs)
        return block(*inputs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_hidden_states=None,
        output_attentions=None,
    ):
        # what is wanted
        c = self.config
        if output_hidden_states is None:
            output_hidden_states = c.output_hidden_states
        if output_attentions is None:
            output_attentions = c.output_attentions

        # the input
        x, rotary = self.embed(input_ids, inputs_embeds, token_type_ids, position_ids)
        mask = attention_mask
        if mask is not None:
            mask = mask.bool()

        # the blocks, as in BERT.encode
        embedded = x
        first_values = None
        hidden_states = [x]
        attentions = []
        for i, block in enumerate(self.bert.blocks):
            if c.embedding_skip:
                scale = self.bert.stream_scale[i].to(x.dtype)
                skip = self.bert.skip_scale[i].to(x.dtype)
                x = scale * x + skip * embedded
            if output_attentions:
                attentions.append(attention_weights(block, x, mask, rotary))
            x, first_values = self.run_block(block, x, mask, rotary, first_values)
            hidden_states.append(x)
        hidden_states[-1] = self.bert.final_norm(x)

        return modeling_outputs.BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


# --------------------------------------------------------------------------------------------------
# The heads. `inputs` are the arguments of NanocramModel.


class NanocramForMaskedLM(NanocramPreTrainedModel):
    """Logits are (B, T, vocab_size). Labels are (B, T); -100 leaves a token out of the loss."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {"decoder.weight": "model.bert.embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        D = config.n_embd
        self.model = NanocramModel(config)
        if config.head_transform:
            self.transform = nn.Linear(D, D, config.bias)
            self.transform_norm = make_norm(config)
        self.decoder = nn.Linear(D, config.vocab_size, config.decoder_bias)
        self.post_init()

    def get_output_embeddings(self):
        return self.decoder

    def set_output_embeddings(self, decoder):
        self.decoder = decoder

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        num_items_in_batch=None,
        **inputs,
    ):
        inputs["return_dict"] = True
        encoded = self.model(input_ids, attention_mask, token_type_ids, **inputs)
        # the head, as in BERT.logits
        hidden = encoded.last_hidden_state
        if self.config.head_transform:
            hidden = self.transform_norm(F.gelu(self.transform(hidden)))
        logits = self.decoder(hidden)
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, size, num_items_in_batch)
        return modeling_outputs.MaskedLMOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )


class NanocramForSequenceClassification(NanocramPreTrainedModel):
    """Logits are (B, num_labels), from the head that nanoCram fine-tunes.

    Labels are (B,) classes, (B, num_labels) zeros and ones, or (B,) values if num_labels is 1.
    """

    def __init__(self, config):
        super().__init__(config)
        self.model = NanocramModel(config)
        self.classifier = ClassificationHead(
            config.n_embd, config.num_labels, config.classifier_dropout, config.pooler_width
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **inputs
    ):
        inputs["return_dict"] = True
        encoded = self.model(input_ids, attention_mask, token_type_ids, **inputs)
        hidden = encoded.last_hidden_state
        # one vector per text, and the head on it
        if attention_mask is None:
            attention_mask = hidden.new_ones(hidden.shape[:2])
        if self.config.pooling == "first":
            pooled = hidden[:, 0]
        else:
            pooled = mean_of_tokens(hidden, attention_mask)
        logits = self.classifier(pooled)

        loss = None
        if labels is not None:
            # values may be given as integers
            is_value = self.config.num_labels == 1 and self.config.problem_type is None
            if is_value or self.config.problem_type == "regression":
                labels = labels.to(logits.dtype)
            loss = self.loss_function(labels, logits, self.config)
        return modeling_outputs.SequenceClassifierOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )


class NanocramForTokenClassification(NanocramPreTrainedModel):
    """Logits are (B, T, num_labels). Labels are (B, T); -100 leaves a token out of the loss."""

    accepts_loss_kwargs = True

    def __init__(self, config):
        super().__init__(config)
        self.model = NanocramModel(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        num_items_in_batch=None,
        **inputs,
    ):
        inputs["return_dict"] = True
        encoded = self.model(input_ids, attention_mask, token_type_ids, **inputs)
        logits = self.classifier(self.drop(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            count = {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, self.config, **count)
        return modeling_outputs.TokenClassifierOutput(
            loss, logits, encoded.hidden_states, encoded.attentions
        )


class NanocramForQuestionAnswering(NanocramPreTrainedModel):
    """Start and end logits are (B, T). Positions are (B,), of the first and last token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanocramModel(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.n_embd, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        **inputs,
    ):
        inputs["return_dict"] = True
        encoded = self.model(input_ids, attention_mask, token_type_ids, **inputs)
        logits = self.classifier(self.drop(encoded.last_hidden_state))
        start, end = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return modeling_outputs.QuestionAnsweringModelOutput(
            loss, start, end, encoded.hidden_states, encoded.attentions
        )
