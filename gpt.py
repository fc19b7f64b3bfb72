"""The model: a GPT from one attention head up, generation, LoRA; then what the scripts share.

    python gpt.py                                            a walk through the model, step by step
    python gpt.py --prompt "The import statement"            text from checkpoints/pretrained.pt
    python gpt.py --prompt "The import statement" --explain  what the model sees and expects

The one file that the stages share: `from gpt import GPTModel, GPT_CONFIG_124M`. It follows the book
*Build a Large Language Model (From Scratch)* by Sebastian Raschka, chapters 3 to 5 and appendix E.
The lesson comes first; a line says where it ends. Shapes: B batch (rows), T tokens in a row,
C embedding width, H heads, D = C / H head width, V vocabulary size.
"""

import argparse
import base64
import codecs
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

GPT_CONFIG_124M = {
    "vocab_size": 50257,     # how many different tokens there are (V)
    "context_length": 1024,  # how many tokens the model can look at (the largest T)
    "emb_dim": 768,          # numbers per token inside the model (C)
    "n_heads": 12,           # attention heads per block (H)
    "n_layers": 12,          # transformer blocks
    "drop_rate": 0.1,        # share of activations that dropout zeroes in training
    "qkv_bias": False,       # bias in the query, key and value layers; OpenAI's weights have one
}
# With one more key, "tie_embeddings": True, the model's first and last matrix are one, as in GPT-2.
# Each has 38.6 million numbers: with one, the model has 124 million parameters, as its name says;
# with two, as in the book and in this dictionary, it has 163 million.

GPT2_SIZES = {  # what differs between the four published sizes of GPT-2 (Radford et al. 2019)
    "124M": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "355M": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "774M": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "1558M": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}

# A transformer (Vaswani et al. 2017) first had two halves for translation: an encoder, in which
# every word sees the whole sentence, and a decoder, which writes the translation word by word and
# sees only what is written already. BERT is an encoder alone: it fills in missing words. A GPT is a
# decoder alone: it continues a text, and every task that can be written as a text to continue is
# one for it.

# ---------------------------------------------------------------------------------------------
# Embeddings. A text is cut into tokens (pieces of words), each with a number, its ID. A model
# computes with vectors, so each ID picks one: that row of a table. With vectors of two numbers,
#
#     table = [[0.3, 1.2],     the token IDs  2 0 2  become  [[0.4, 0.7],
#              [0.9, 0.1],                                    [0.3, 1.2],
#              [0.4, 0.7]]                                    [0.4, 0.7]]
#
# The numbers begin at random and are learned like all others; tokens that are used alike end up
# with similar rows. A second table has a row per position, added to the token's: without it, "dog
# bites man" and "man bites dog" would look the same to attention. Book sections 2.7 and 2.8.

# ---------------------------------------------------------------------------------------------
# Attention, from its idea to many heads. Each rung of this ladder adds one thing; the model uses
# the last one, MultiHeadAttention.

def attention_without_weights(x):
    """The idea: each token becomes a mean of all, the similar ones weighing most. (T, C) -> (T, C).

    Nothing is learned yet, so a token always attends to what resembles it. A verb could not look
    for its subject. Book section 3.3.
    """
    attn_scores = x @ x.T                                        # (T, T): how alike two tokens are
    attn_weights = torch.softmax(attn_scores, dim=-1)            # positive, each row sums to 1
    return attn_weights @ x                                      # (T, C): weighted means


class SelfAttention_v1(nn.Module):
    """One head: a query, a key and a value matrix. x (T, d_in) -> (T, d_out). Section 3.4.

    Each token asks a question (query); each token offers a label (key) and a content (value).
    The better a key answers the query, the more of its value flows into the output, which is also
    called the context vector.
    """

    def __init__(self, d_in, d_out):
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x):
        queries = x @ self.W_query                               # (T, d_out)
        keys = x @ self.W_key
        values = x @ self.W_value
        attn_scores = queries @ keys.T                           # (T, T): each query with each key

        # Wide vectors give large scores, whose softmax is nearly all 0 and 1, with almost no
        # gradient. Dividing by the root of the width keeps them small.
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        return attn_weights @ values                             # (T, d_out)


class SelfAttention_v2(nn.Module):
    """The same head with linear layers, whose initial values suit training better. Section 3.4."""

    def __init__(self, d_in, d_out, qkv_bias=False):
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x):
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)
        attn_weights = torch.softmax(queries @ keys.T / keys.shape[-1] ** 0.5, dim=-1)
        return attn_weights @ values


class CausalAttention(SelfAttention_v2):
    """A head that cannot look ahead, for batches. x (B, T, d_in) -> (B, T, d_out). Section 3.5.

    A model that is to predict the next token must not see it. Setting the weights of future tokens
    to zero and dividing each row by its new sum would do; setting their scores to minus infinity
    before the softmax is the same in one step, as e to minus infinity is 0.

    Dropout zeroes a random share of the weights in training, and only there, so that no token can
    rely on a single other one; the rest are divided by the share kept, which keeps the mean.
    """

    def __init__(self, d_in, d_out, context_length, dropout, qkv_bias=False):
        super().__init__(d_in, d_out, qkv_bias)
        self.dropout = nn.Dropout(dropout)

        # True above the diagonal: the keys that lie in the future of a query.
        mask = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)
        self.register_buffer("mask", mask)  # moves with the model, is not trained

    def forward(self, x):
        T = x.shape[1]
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)
        attn_scores = queries @ keys.transpose(1, 2)             # (B, T, T)
        attn_scores = attn_scores.masked_fill(self.mask[:T, :T], -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        return self.dropout(attn_weights) @ values


class MultiHeadAttentionWrapper(nn.Module):
    """Several causal heads side by side: (B, T, d_in) -> (B, T, num_heads * d_out). Section 3.6.

    One head can look for a subject while another looks for the word before.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        self.heads = nn.ModuleList(CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)
                                   for _ in range(num_heads))

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(nn.Module):
    """All heads at once. (B, T, d_in) -> (B, T, d_out). Section 3.6.

    `F.scaled_dot_product_attention` is the arithmetic of `CausalAttention`, without storing weights
    (Dao et al. 2022, FlashAttention) or a mask: `context_length` is for the book's signature only.
    `Linear` is torch's, made faster for generation behind the lesson; `cache` is a KVCache. Raises
    ValueError when d_out cannot be shared out evenly among the heads.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out {d_out} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.W_query = Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = Linear(d_out, d_out)  # lets the heads' results mix
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, t):
        """(B, T, C) -> (B, T, H, D) -> (B, H, T, D)"""
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, cache=None, layer=0):
        queries = self.split_heads(self.W_query(x))
        keys = self.split_heads(self.W_key(x))
        values = self.split_heads(self.W_value(x))

        # A KVCache (see generation; skip it at first) adds the keys and values of earlier tokens.
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)

        # subtle: is_causal assumes that the first query belongs to the first key. With a cache the
        # first query comes later and would see one key only, so the cache brings a mask.
        context_vec = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=None if cache is None else cache.mask,
            is_causal=cache is None, dropout_p=self.dropout.p if self.training else 0.0)

        # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.out_proj(context_vec.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------
# The model: normalise, attend, normalise, think; a dozen times. Book chapter 4.

class LayerNorm(nn.Module):
    """Each token's C numbers to mean 0 and variance 1, then scale and shift, learned. Section 4.2.

    Layer upon layer, numbers would grow or vanish; this brings them back to one size.
    """

    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        # In one call:  (x - mean) / sqrt(variance + 1e-5) * scale + shift,
        # where mean = x.mean(-1, keepdim=True), variance = x.var(-1, unbiased=False, keepdim=True).
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class GELU(nn.Module):
    """A soft switch: large numbers pass, very negative ones become 0 (Hendrycks & Gimpel 2016).

    Two linear layers with nothing nonlinear between them would be one. Section 4.3.
    """

    def forward(self, x):
        # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the approximation that GPT-2 uses
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Each token thinks on its own, four times as wide. (B, T, C) -> (B, T, C). Section 4.3."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg["emb_dim"]
        self.layers = nn.Sequential(Linear(C, 4 * C), GELU(), Linear(4 * C, C))

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to its input. (B, T, C) -> (B, T, C). Section 4.5.

    Adding the input back (the shortcut) lets gradients reach the first block unweakened;
    normalising before each part rather than after it ("pre-norm") keeps deep stacks trainable.
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg["emb_dim"]
        self.att = MultiHeadAttention(C, C, cfg["context_length"], cfg["drop_rate"],
                                      cfg["n_heads"], cfg["qkv_bias"])
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(C)
        self.norm2 = LayerNorm(C)
        self.drop_resid = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop_resid(self.att(self.norm1(x), cache, layer))
        return x + self.drop_resid(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token IDs (B, T) -> logits (B, T, V): at each position, a score for each possible next token.

    A softmax turns logits, which may be any numbers, into probabilities. Section 4.6. Raises
    ValueError for more than `context_length` tokens. Example:
        torch.manual_seed(123)
        model = GPTModel(GPT_CONFIG_124M)             # the book's model, number for number
        logits = model(torch.tensor([[15496, 11, 314, 716]]))          # (1, 4, 50257)
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = dict(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Make out_head use tok_emb's matrix, if the configuration says so (Press & Wolf 2017)."""
        if self.cfg.get("tie_embeddings"):
            self.out_head.weight = self.tok_emb.weight

    def hidden_states(self, in_idx, cache=None):
        """(B, T) token IDs -> (B, T, C), what out_head reads. `cache` holds the tokens before."""
        T, context = in_idx.shape[1], self.cfg["context_length"]
        total = T + (cache.longest if cache else 0)
        if total > context:
            raise ValueError(f"{total} tokens do not fit the model's context of {context}")
        positions = cache.begin(T) if cache else torch.arange(T, device=in_idx.device)

        # What the token is, plus where it stands.
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))       # (B, T, C)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, cache, layer)
        return self.final_norm(x)

    def forward(self, in_idx):
        return self.out_head(self.hidden_states(in_idx))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch's; also takes the weights of other code for the book, which save their masks."""
        state_dict = {name: t for name, t in state_dict.items() if not name.endswith("att.mask")}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.tie_weights()
        return result


def walk():
    """Print GPT-2's parameters, part by part, and the shape of the data after each step."""
    with shapes_only():  # a model without numbers in it is enough, and takes no memory
        model = GPTModel({**GPT_CONFIG_124M, "tie_embeddings": True, "qkv_bias": True})
    blocks, L = model.trf_blocks, len(model.trf_blocks)
    block, att = blocks[0], blocks[0].att
    print("A GPT reads tokens (pieces of words) and scores every token that could come next.\n\n"
          "The parameters of GPT-2, the smallest of its four sizes, by part")
    total = sum(p.numel() for p in model.parameters())

    # A name and the modules that it stands for.
    for name, modules in [
            ("tok_emb: one vector per token", [model.tok_emb]),
            ("pos_emb: one vector per position", [model.pos_emb]),
            (f"attention, in {L} blocks", [block.att for block in blocks]),
            (f"feed-forward, in {L} blocks", [block.ff for block in blocks]),
            ("layer norms", [m for m in model.modules() if isinstance(m, LayerNorm)]),
            ("out_head: the same matrix as tok_emb", []),
            ("together", [model])]:
        number = sum(p.numel() for module in modules for p in module.parameters())
        print(f"  {name:40s} {number:>12,} {100 * number / total:5.1f} %")
    print(f"  memory: {total * 4 / 1e6:.0f} MB to use it in float32, and at least\n"
          f"  {total * 16 / 1e6:.0f} MB to train it (weights, gradients and AdamW's two averages)")

    def show(what, t, note):
        print(f"  {what:28s} {str(tuple(t.shape)):16s} {note}")
        return t

    print("\nOne short sentence on its way through, and the shape after each step")
    ids = torch.tensor([[6109, 3626, 6100, 345]], device="meta")
    positions = torch.arange(4, device="meta")
    show("token IDs", ids, "(B, T): 6109 3626 6100 345, 'Every effort moves you'")
    x = show("tok_emb + pos_emb", model.tok_emb(ids) + model.pos_emb(positions), "(B, T, C)")

    # The first block, one step at a time. Keys and values have the queries' shape, and a softmax
    # changes none, so the queries stand for all three.
    y = show("norm1", block.norm1(x), "mean 0, variance 1 in each token")
    q = show("W_query, and W_key, W_value", att.W_query(y), "one query, key, value per token")
    q = show("split into heads", att.split_heads(q), "(B, H, T, D)")
    w = show("queries x keys, softmax", q @ q.transpose(2, 3), "(B, H, T, T): who looks at whom")
    y = show("weights x values", w @ q, "(B, H, T, D): what they find there")
    y = show("join heads, out_proj", att.out_proj(y.transpose(1, 2).flatten(2)), "(B, T, C)")
    x = show("add to the shortcut", x + y, "what a token is + what it found")
    y = show("norm2, ff.layers[0], GELU", block.ff.layers[:2](block.norm2(x)), "(B, T, 4 C)")
    x = show("ff.layers[2], add", x + block.ff.layers[2](y), f"that is one block; {L - 1} more")

    x = show("final_norm", model.final_norm(x), "(B, T, C)")
    show("out_head: logits", model.out_head(x), "(B, T, V): scores for every next token")
    print("\nThe last row of logits chooses the fifth token; append it and repeat: that is "
          "generation.\nNext: `python pretrain.py` trains a small GPT here, in about two minutes.")


# ---------------------------------------------------------------------------------------------
# Generation: predict, choose, append, repeat.

def text_to_token_ids(text, tokenizer):
    """Text -> (1, T) token IDs; `<|endoftext|>` is the token between documents. Section 5.1."""
    return torch.tensor([tokenizer.encode(text, allowed_special="all")])


def token_ids_to_text(token_ids, tokenizer):
    """(1, T) or (T,) token IDs -> text. Section 5.1."""
    # A model may have more IDs than the tokenizer; those stand for no text.
    return tokenizer.decode([i for i in token_ids.flatten().tolist() if i < tokenizer.n_vocab])


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """The simplest loop: always the likeliest token. (B, T) -> (B, T + n).

    Section 4.7. It reads the whole text again for every new token; `generate` does not.
    """
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]                         # as much as the model can see
        with torch.no_grad():
            logits = model(idx_cond)
        idx_next = logits[:, -1].argmax(dim=-1, keepdim=True)     # (B, 1), from the last position
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) -> probabilities (B, V) to draw the next token from. Section 5.3.

    A temperature below 1 makes the likely likelier, above 1 the unlikely. `top_k` keeps the k
    likeliest tokens; `top_p` keeps the likeliest that together reach p (Holtzman et al. 2020).
    """
    logits = logits.float() / max(temperature, 1e-6)  # a tiny one must not make infinities
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probs = torch.softmax(logits, dim=-1)

    # A token stays if those before it have not reached p, so the likeliest always stays.
    if top_p is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        sorted_probs[sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p] = 0.0
        probs = torch.zeros_like(probs).scatter(1, order, sorted_probs)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample_next(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> next tokens (B,). Temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probs = next_token_probs(logits, temperature, top_k, top_p)
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


class KVCache:
    """The keys and values of the tokens read so far, so that each is computed only once.

    A token's key and value never change, as it sees only what is before it; so a new token needs
    its own query, key and value, and those kept here: (B, H, max_length, D) for each layer.
    `lengths` (B,) counts each row's tokens; prompts of different lengths are padded at the right.
    """

    def __init__(self, model, batch_size, max_length):
        heads, weight = model.cfg["n_heads"], model.tok_emb.weight
        shape = (batch_size, heads, max_length, model.cfg["emb_dim"] // heads)
        self.keys = [weight.new_zeros(shape) for _ in model.trf_blocks]
        self.values = [weight.new_zeros(shape) for _ in model.trf_blocks]
        self.rows = torch.arange(batch_size, device=weight.device)[:, None]
        self.lengths = torch.zeros_like(self.rows[:, 0])
        self.longest = 0

    def begin(self, T):
        """T tokens per row are about to be read -> their positions (B, T)."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        self.lengths = self.lengths + T
        self.longest += T

        # True where a key is not later than the query: (B, 1, T, longest).
        key_positions = torch.arange(self.longest, device=self.lengths.device)
        self.mask = key_positions <= self.positions[:, None, :, None]
        return self.positions

    def extend(self, layer, keys, values):
        """Store (B, H, T, D) new keys and values; return those of all tokens so far."""
        # subtle: with a slice between two index tensors, their shape comes first: (B, T, H, D).
        self.keys[layer][self.rows, :, self.positions] = keys.transpose(1, 2)
        self.values[layer][self.rows, :, self.positions] = values.transpose(1, 2)
        return self.keys[layer][:, :, :self.longest], self.values[layer][:, :, :self.longest]


@torch.no_grad()
def generate_stream(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None,
                    eos_id=None, top_p=None, lengths=None, seed=None):
    """Yield each row's next token, (B,), step by step. Read it first with B = 1, lengths = [T]."""
    if idx.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token, such as <|endoftext|>")
    k_fits = top_k is None or top_k >= 1
    p_fits = top_p is None or 0 < top_p <= 1
    if temperature < 0 or not k_fits or not p_fits:
        raise ValueError("temperature must be 0 or more, top_k 1 or more, top_p within (0, 1]")

    (B, T), device = idx.shape, idx.device
    context_size = min(context_size, model.cfg["context_length"])
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
    text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
    rows = torch.arange(B, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(model, B, min(context_size, T + max_new_tokens))
    was_training = model.training
    model.eval()
    try:
        for longest in range(T, T + max_new_tokens):
            # Predict. When the window slides, all positions change and with them all keys, so
            # each row's last `context_size` tokens are read anew, without the cache.
            if longest > context_size:
                first = (lengths - context_size).clamp(min=0)
                window = first[:, None] + torch.arange(context_size, device=device)
                hidden = model.hidden_states(text.gather(1, window))[rows, lengths - first - 1]
            elif longest == T:          # the prompts, in one pass
                hidden = model.hidden_states(idx, cache)[rows, lengths - 1]
                cache.lengths = lengths  # padding does not count
            else:                       # only the token that came last
                hidden = model.hidden_states(idx_next[:, None], cache)[:, -1]
            logits = model.out_head(hidden)                       # (B, V)

            # Choose. A row that has ended stays at its end.
            idx_next = sample_next(logits, temperature, top_k, top_p, rng)
            if eos_id is not None:
                idx_next = idx_next.masked_fill(finished, eos_id)
                finished |= idx_next == eos_id

            # Append.
            text[rows, lengths] = idx_next
            lengths = lengths + 1
            yield idx_next
            if finished.all():
                break
    finally:
        model.train(was_training)


def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None,
             top_p=None, lengths=None, seed=None):
    """Continue each row of token IDs: (B, T) -> (B, T + n), n <= max_new_tokens. Section 5.3.

    Temperature 0 gives the tokens of `generate_text_simple`; `next_token_probs` explains the other
    choices, `seed` makes them repeatable. A row that produced `eos_id` (the end of text) is filled
    with it; when all have, generation ends. Prompts of different lengths are padded at the right,
    their `lengths` (B,) given. Raises ValueError for an empty prompt or an option out of its range.
    """
    new = list(generate_stream(model, idx, max_new_tokens, context_size, temperature, top_k,
                               eos_id, top_p, lengths, seed))
    return torch.cat([idx, torch.stack(new, dim=1)], dim=1) if new else idx


# ---------------------------------------------------------------------------------------------
# LoRA: leave a trained matrix as it is and learn a small correction. Hu et al. 2021; appendix E.
# A matrix of 768 x 768 has 589,824 numbers; a correction of rank 16, a product of 768 x 16 and
# 16 x 768, has 24,576. Gradients and the optimizer's averages are kept for these alone.

class LoRALayer(nn.Module):
    """x (..., in_dim) -> x A B * alpha / rank (..., out_dim).

    B starts at zero, so the correction does too; alpha sets its size. Dividing by the rank keeps
    size and best learning rate about the same when the rank is changed.
    """

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.scaling * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A linear layer plus its correction."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x):
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model, rank, alpha):
    """Wrap every linear layer inside `model`, in place; the caller has frozen its parameters.

    A layer that shares its matrix with an embedding, as a tied head does, is left alone: merging
    would change the embedding too.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and not any(module.weight is t for t in tables):
                setattr(parent, name, LinearWithLoRA(module, rank, alpha).to(module.weight.device))


@torch.no_grad()
def merge_lora(model):
    """Add every correction to its matrix and unwrap it: the same function, the plain model."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LinearWithLoRA):
                lora = module.lora
                module.linear.weight += lora.scaling * (lora.A @ lora.B).T  # Linear has (out, in)
                setattr(parent, name, module.linear)
    return model


# =============================================================================================
# The lesson ends here. What follows makes it practical: speed on a CPU, tokenizers, checkpoints,
# downloads, options and errors, what surrounds a training run, and the command.
# =============================================================================================


class UserError(Exception):
    """Something the user can mend: one sentence with what is wrong and what to type next."""


# ---------------------------------------------------------------------------------------------
# Speed on a CPU, and the number types.

class Linear(nn.Linear):
    """nn.Linear, made faster on a CPU when x is a single row, as in generation.

    torch uses one core for one float32 row: here each thread gets a block of the matrix. For
    bfloat16, torch asks oneDNN first, which is made for many rows. On two cores a 124M model
    generates 2.2 to 2.4 times as fast.
    """

    def forward(self, x):
        single = (x.numel() == self.in_features and x.device.type == "cpu" and not x.requires_grad
                  and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu"))
        if single and x.dtype == torch.bfloat16:
            onednn = torch.backends.mkldnn.enabled
            torch.backends.mkldnn.enabled = False
            y = super().forward(x)
            torch.backends.mkldnn.enabled = onednn
            return y
        if not single or x.dtype != torch.float32:
            return super().forward(x)

        # subtle: .t() only changes how x is looked at; made .contiguous(), bmm would be slow.
        blocks = min(torch.get_num_threads(), self.out_features)
        rows = self.out_features // blocks * blocks
        weight = self.weight[:rows].view(blocks, -1, self.in_features)
        y = torch.bmm(weight, x.reshape(1, -1).t().expand(blocks, -1, 1)).view(rows)
        if rows < self.out_features:  # what cannot be shared out evenly
            y = torch.cat([y, self.weight[rows:] @ x.flatten()])
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def keep_freed_memory(largest):
    """Let the C library keep freed memory for the next step, in blocks of up to `largest` bytes.

    Asking the system for it again takes time: training at 124M is 1.5 times as fast. Only glibc
    (Linux) can do it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: blocks up to this many bytes are kept (32 MB at most in older glibc) ...
        mallopt(-3, largest) or mallopt(-3, 1 << 25)
        mallopt(-1, 1 << 30)   # M_TRIM_THRESHOLD: ... up to a gigabyte of them


def pick_device(name="auto"):
    """`auto` (cuda if there, else cpu), `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"the device {name!r} is not available here; use --device auto") from None
    return torch.device(name)


def pick_dtype(name="auto", device="cpu"):
    """The type of matrix products; `auto`: bfloat16 where the processor has instructions for it."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":  # Ampere and later
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        has = torch.cpu.get_capabilities() if torch.device(device).type == "cpu" else {}
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in `dtype`; parameters stay float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def shapes_only():
    """Modules made in this context have shapes but no numbers: they take no memory, no time."""
    normal_ = nn.init.normal_
    nn.init.normal_ = lambda tensor, **_: tensor  # for embeddings; it would import for a second
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = normal_


# ---------------------------------------------------------------------------------------------
# Tokenizers. Whichever it is, tiktoken's encoder runs it. A vocabulary is a table from byte strings
# to ranks; a rank is both the token's ID and its priority, as the merge that gives the lowest rank
# comes first (tokenizer.py shows how). `<|endoftext|>`, which stands between documents, comes last.

GPT2_SPLIT_PATTERN = (  # how text is cut into chunks before bytes are merged; see tokenizer.py
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
VOCAB_BPE = Path("data") / "vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_BPE_URLS = ["https://openaipublic.blob.core.windows.net/gpt-2/models/124M/vocab.bpe",
                  "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/124M/vocab.bpe"]

# GPT-2's files show each byte as one visible letter: itself, or one from U+0100 on. The ranks of
# the single bytes follow the same order.
_HIDDEN = [*range(33), *range(127, 161), 173]
BYTE_OF_LETTER = {chr(byte): byte for byte in range(256) if byte not in _HIDDEN}
BYTE_OF_LETTER.update((chr(256 + i), byte) for i, byte in enumerate(_HIDDEN))


def read_gpt2_ranks(path=None):
    """GPT-2's 50,256 tokens from `vocab.bpe` (downloaded if not there) -> {bytes: rank}. UserError.

    After a line with the version, each line holds a merge: two tokens that become the next one.
    """
    path = Path(path or download(VOCAB_BPE_URLS, VOCAB_BPE, VOCAB_BPE_SHA256))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCAB_BPE_SHA256:
        raise UserError(f"{path} is not GPT-2's vocab.bpe; delete it, and it is fetched anew")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_OF_LETTER.values())}
    for line in content.decode("utf-8").strip().split("\n")[1:]:
        ranks[bytes(BYTE_OF_LETTER[letter] for letter in line.replace(" ", ""))] = len(ranks)
    return ranks


def read_rank_file(path):
    """A file of lines `base64-token rank`, tiktoken's format -> {bytes: rank}. Raises UserError."""
    try:
        pairs = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
        return check_ranks([base64.b64decode(token, validate=True) for token, _ in pairs],
                           [int(rank) for _, rank in pairs])
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{path} is not a rank file ({e}); use gpt2, bytes, or a file made by: "
                        "python tokenizer.py train TEXT") from None


def check_ranks(tokens, ranks):
    """-> {bytes: rank}. Raises ValueError unless ranks count up from 0 and every byte has one."""
    table = dict(zip(tokens, ranks))
    if list(table.values()) != list(range(len(tokens))):
        raise ValueError("its ranks do not count up from 0, or a token is there twice")
    if not all(bytes([byte]) in table for byte in range(256)):
        raise ValueError("a single byte has no rank")
    return table


def make_tokenizer(name, ranks, pat_str=GPT2_SPLIT_PATTERN):
    """{bytes: rank} -> tiktoken.Encoding, with `<|endoftext|>` (its `eot_token`) after the last."""
    return tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def load_tokenizer(spec):
    """`gpt2`, `bytes`, or the path of a rank file -> tiktoken.Encoding. Raises UserError."""
    if spec == "gpt2":
        return make_tokenizer(spec, read_gpt2_ranks())
    if spec == "bytes":
        return make_tokenizer(spec, {bytes([i]): i for i in range(256)})
    return make_tokenizer("bpe", read_rank_file(spec))


def tokenizer_to_spec(tokenizer):
    """What a checkpoint holds of a tokenizer: a name, or everything needed to rebuild it."""
    if tokenizer.name in ("gpt2", "bytes"):
        return tokenizer.name
    tokens = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return {"pat_str": tokenizer._pat_str,
            "tokens": [base64.b64encode(token).decode("ascii") for token in tokens]}


def tokenizer_from_spec(spec):
    """The way back. A file may come from anywhere, so a path in it is not followed."""
    if spec in ("gpt2", "bytes"):
        return load_tokenizer(spec)
    tokens = [base64.b64decode(token) for token in spec["tokens"]]
    return make_tokenizer("bpe", check_ranks(tokens, range(len(tokens))), spec["pat_str"])


def decode_stream(tokens, tokenizer):
    """Token IDs one by one -> pieces of text; a character of several tokens comes out whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token < tokenizer.n_vocab:
            yield decoder.decode(tokenizer.decode_bytes([int(token)]))
    yield decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------
# The checkpoint: the only thing that passes from one stage to the next.

@contextlib.contextmanager
def write_atomically(path):
    """Yield a temporary path, which becomes `path` only if the block succeeds. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs do not meet in it
    try:
        yield part
        os.replace(part, path)
    except RuntimeError as e:  # what torch makes of a failed write
        raise OSError(f"{path} could not be written; is the disk full? ({e})") from None
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path, model, tokenizer, **extras):
    """Write model (LoRA merged), configuration and tokenizer to `path`, all or nothing. OSError.

    `extras` ride along: plain data and tensors only. `class_names` marks a classifier.
    """
    kind = "classifier" if "class_names" in extras else "language model"
    if any(isinstance(module, LinearWithLoRA) for module in model.modules()):
        model = merge_lora(copy.deepcopy(model))
    with write_atomically(path) as part:
        torch.save({**extras, "kind": kind, "config": model.cfg, "model": model.state_dict(),
                    "tokenizer": tokenizer_to_spec(tokenizer)}, part)


def replace_head(model, num_classes):
    """Put a classification head (C -> num_classes) in out_head's place. Book section 6.5."""
    model.cfg = {**model.cfg, "tie_embeddings": False}  # a tied embedding keeps its matrix
    model.out_head = nn.Linear(model.cfg["emb_dim"], num_classes).to(model.tok_emb.weight.device)


def load_checkpoint(path, device="cpu", kind="language model"):
    """Read a checkpoint -> (model in evaluation mode, tokenizer, all else in a dictionary).

    A file is checked whole before anything of it is used. Raises UserError when it is not there,
    cut short, not of this `kind` ("language model" or "classifier"), or does not fit together.
    """
    maker = {"language model": "pretrain.py", "classifier": "finetune_classifier.py"}[kind]
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}; make one with: python {maker}")
    try:
        # mmap: numbers stay in the file until used. Windows cannot replace a file that is mapped.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        cfg, weights = saved["config"], saved.pop("model")
        if saved["kind"] != kind:
            raise ValueError(f"it holds a {saved['kind']}, but a {kind} is needed")

        # The sizes first, so that a model of ten million blocks is refused before it is made.
        sizes = [cfg[name] for name in GPT_CONFIG_124M if name not in ("drop_rate", "qkv_bias")]
        blocks = {name.split(".")[1] for name in weights if name.startswith("trf_blocks.")}
        if not all(type(n) is int and n > 0 for n in sizes) or len(blocks) != cfg["n_layers"]:
            raise ValueError("its configuration does not describe its weights")
        for name, t in weights.items():
            if t.dtype != torch.float32 or not t.is_contiguous() or not t.sum().isfinite():
                raise ValueError(f"{name} has numbers that are not finite, or not float32")
        tokenizer = tokenizer_from_spec(saved.pop("tokenizer"))
        if tokenizer.n_vocab > cfg["vocab_size"]:
            raise ValueError("its tokenizer has more tokens than its model")

        with shapes_only():
            model = GPTModel(cfg)
            if kind == "classifier":
                replace_head(model, len(saved["class_names"]))
        model.load_state_dict(weights, assign=True)
    except UserError:
        raise
    except Exception as e:  # whatever a foreign or cut file makes of the lines above
        reason = " ".join(str(e).split())[:150] or type(e).__name__
        raise UserError(f"{path} is not the checkpoint that is needed, or is cut short ({reason}); "
                        f"make one with: python {maker}") from None
    return model.to(device).eval(), tokenizer, saved


# ---------------------------------------------------------------------------------------------
# Downloads.

VERDICT = Path("data") / "the-verdict.txt"  # the book's training text, by Edith Wharton (1908)
VERDICT_URLS = ["https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/"
                "01_main-chapter-code/the-verdict.txt"]
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"


def download(urls, path, sha256=None, timeout=30):
    """Make sure that the file `path` is there; return it as a Path.

    Unless it is, each address is tried in turn, into PATH.part, which a later call continues;
    length and SHA-256 (given, or announced by Hugging Face's hub) are checked before the file gets
    its name. `timeout`: seconds without a byte. Raises UserError with each address and its reason.
    """
    path, part, reasons = Path(path), Path(f"{path}.part"), []
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    for url in urls:
        # An address is asked again while it still delivers bytes.
        before = -1
        while part.stat().st_size != before:
            before = part.stat().st_size
            try:
                fetch(url, part, sha256, timeout)
                return part.replace(path)
            except requests.RequestException as e:
                reason = e
        reasons.append(f"\n  {url}: {reason}")

        # Without a hash, nobody could tell that two servers' bytes were mixed.
        if sha256 is None:
            part.write_bytes(b"")
    if part.stat().st_size == 0:
        part.unlink()
    raise UserError(f"{path.name} could not be downloaded; put it at {path} by hand, or try again "
                    "when there is a network:" + "".join(reasons))


def fetch(url, part, sha256, timeout):
    """One attempt of `download`. Raises requests.RequestException; wrong content is deleted."""
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity",  # so that lengths count the file's own bytes
               "Range": f"bytes={have}-" if have else None}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        # The rest of the file, or the whole of it, or neither.
        status = response.status_code
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 416 or (status == 206 and not goes_on):
            part.write_bytes(b"")
            raise requests.RequestException("the part that was there is not of this file")
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise requests.RequestException("a web page came instead of the file")

        # The hub announces the hash before it redirects.
        for answer in [*response.history, response]:
            found = re.fullmatch('"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-Etag", ""))
            sha256 = sha256 or (found and found[1])

        # Small reads: when the connection breaks off, what a read has not returned is lost.
        have = have if goes_on else 0
        total = have + int(response.headers.get("Content-Length", 0))
        with (open(part, "ab" if have else "wb") as file,
              contextlib.closing(Progress(total / 1e6, "MB")) as progress):
            for block in response.iter_content(1 << 14):
                have += file.write(block)
                progress.update(have / 1e6, f"downloading {part.stem}")

    if have < total:
        raise requests.RequestException(f"{have} of {total} bytes came")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, digest) or not have:
        part.write_bytes(b"")
        raise requests.RequestException(f"wrong content: {have} bytes with the SHA-256 {digest}")


# ---------------------------------------------------------------------------------------------
# Options, errors and text on the terminal.

class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help and wrong usage as one sentence, status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Print the sentence and leave."""
        self.exit(2, printable(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def argument(kind, what, fits):
    """An argparse type: `kind` (int, float or Path) of the text, if it `fits`."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return convert


positive_int = argument(int, "a whole number above 0", lambda n: 0 < n < 10**12)
positive_float = argument(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative_float = argument(float, "a number of 0 or more", lambda x: 0 <= x < math.inf)
probability = argument(float, "between 0 and 1", lambda x: 0 < x <= 1)
seed_number = argument(int, "a whole number of at most 9 digits", lambda n: 0 <= n < 10**9)
checkpoint_file = argument(Path, "a name that ends in .pt but not in -resume.pt", lambda path: (
    path.suffix == ".pt" and not path.stem.endswith("-resume")))


def add_common_arguments(parser):
    """The options that mean the same in every script: --seed, --device, --dtype."""
    arg = parser.add_argument
    arg("--seed", type=seed_number, default=123, help="the same seed, the same result")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arg("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="number type of matrix products; auto takes the faster")


def add_training_arguments(parser, out, **defaults):
    """The options of every training run, with this script's defaults."""
    arg = parser.add_argument
    arg("--out", type=checkpoint_file, default=Path("checkpoints", out), help="where to save")
    arg("--resume", action="store_true", help="go on with an interrupted run of this command")
    arg("--epochs", type=positive_int, help="passes over the training data")
    arg("--max-steps", type=positive_int, help="stop after this many optimizer steps")
    arg("--batch-size", type=positive_int, help="rows in a batch")
    arg("--grad-accum", type=positive_int, default=1, help="batches per optimizer step")
    arg("--lr", type=positive_float, help="(peak) learning rate")
    arg("--eval-every", type=positive_int, help="steps between evaluations")
    add_common_arguments(parser)
    parser.set_defaults(**defaults)


def run_main(main):
    """Run a script's main(): what the user can mend is a sentence and status 1, Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
    status, message = 0, ""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except BrokenPipeError:
        # The reader of our output, `head` say, has left.
        status = 1
    except (UserError, OSError) as e:
        status, message = 1, str(e)
    except (RuntimeError, MemoryError) as e:  # the user can only mend a lack of memory
        if not any(words in repr(e) for words in ("OutOfMemory", "MemoryError", "allocate memory")):
            raise
        status, message = 1, "out of memory; choose a smaller model or a smaller batch"

    if message:
        print(printable(f"{Path(sys.argv[0]).name}: {message}"), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def printable(text):
    """Text as a terminal may show it: without what could steer it, such as escapes."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  "\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def say(text=""):
    """Print what may hold names of files or texts from data, at once."""
    print(printable(text), flush=True)


def shades(fine, plain):
    """`fine` characters, or `plain` ones where standard output cannot show those."""
    return fine if "utf" in (sys.stdout.encoding or "").lower() else plain


class Progress:
    """How far a long job is: on a terminal one line that rewrites itself, else one now and then."""

    def __init__(self, total, unit):
        self.total, self.unit = total, unit  # None: unknown, and not to be shown
        self.first, self.width = None, 0

    def update(self, done, text):
        """Say that `done` units are done (counted from 0, also when resuming)."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if self.first is None:  # the time starts here: what came before was preparation
            self.first, self.start, self.last = done, now, now
        if now - self.last < (0.1 if terminal else 10.0):
            return

        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        line = text + (f" | {rate:,.1f} {self.unit}/s" if self.unit else "")
        if self.total and rate > 0:
            left = int((self.total - done) / rate)
            line += f" | {100 * done / self.total:.0f} % | {left // 60}:{left % 60:02d} left"
        if not terminal:
            return say(line)
        self.width = os.get_terminal_size().columns - 1
        print("\r" + printable(line)[:self.width].ljust(self.width), end="", flush=True)

    def close(self):
        """Wipe the line, so that what follows stands on a clean one."""
        if self.width:
            print("\r" + " " * self.width, end="\r", flush=True)


def read_text_pieces(path, size=1 << 18):  # tiktoken fails on a million spaces in a row
    """Yield a UTF-8 file as pieces of about `size` characters, so that its length does not matter.

    A piece ends before a white space, where GPT-2's pattern always splits, so tokens come out as
    from the whole text (a piece without one is cut at its end). Raises UserError, OSError.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(size):
                rest += block
                if "\0" in block:
                    raise UserError(f"{path} is not a text file; give plain UTF-8 text")

                # The last white space that follows a word; the rest waits for the next block.
                found = re.match(r".*\S(?=[ \t\r\n])", rest, re.DOTALL)
                cut = found.end() if found else len(rest) - 1
                yield rest[:cut]
                rest = rest[cut:]

    except UnicodeDecodeError as e:
        guess = "utf-16" if e.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise UserError(f"{path} is not UTF-8 text; convert it with: iconv -f {guess} -t utf-8 "
                        f"{path}") from None
    if not rest:  # what was read always leaves a character
        raise UserError(f"{path} is empty; give a file with text in it")
    yield rest


# ---------------------------------------------------------------------------------------------
# What surrounds a training loop, the same in every stage.

def find_start(init, names, stage):
    """The checkpoint to start from: `init`, or the first of `names` in checkpoints/. UserError."""
    found = [path for path in map(Path("checkpoints").joinpath, names) if path.is_file()]
    if not init and not found:
        raise UserError(f"{stage} There is no language model to start from; make one first with: "
                        "python pretrain.py (two minutes), or python load_gpt2.py (a download)")
    return init or found[0]


def scale_lr(lr, model):
    """A learning rate for GPT-2's width, 768 -> for this model's; narrow ones want more."""
    return lr * max(1.0, 768 / model.cfg["emb_dim"]) ** 2


def beside(out, ending):
    """checkpoints/mine.pt and "-resume.pt" -> checkpoints/mine-resume.pt"""
    return out.with_name(out.stem + ending)


def check_output(args, *inputs, endings=("-resume.pt", ".csv", ".png")):
    """Find out before the work, not after, that --out can be written and no input is lost by it.

    Raises UserError when --out, or a file beside it, is or lies in an input, or --out is not ours;
    OSError. With --resume, if the run is complete, says so and exits.
    """
    out, inputs = args.out, {Path(path).resolve() for path in inputs if path}
    for path in [out, *(beside(out, ending) for ending in endings)]:
        # Training reads a folder whole; a conversion (no endings) reads only its known files.
        if path.resolve() in inputs or endings and not inputs.isdisjoint(path.resolve().parents):
            raise UserError(f"{path} is read by this command and would be overwritten; choose "
                            "another --out")
    if out.exists():
        try:
            torch.load(out, map_location="cpu", weights_only=True, mmap=True)["tokenizer"]
        except Exception:  # whatever a foreign file makes torch.load raise
            raise UserError(f"{out} is no checkpoint of this project; choose another --out, or "
                            "move it away") from None
        if args.resume and not beside(out, "-resume.pt").exists():
            say(f"{out} is complete, or the run was stopped before its first save: there is no "
                f"{beside(out, '-resume.pt').name} to go on with")
            sys.exit()
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()


def process_number():
    """(number of this process, how many there are): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(numbers, device="cpu"):
    """A list of numbers -> the list of their sums over all processes of torchrun."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.tolist()


def fingerprint(*parts):
    """Texts, numbers and lists -> a short hash, to know them by when a run is resumed."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fingerprint_model(model):
    """A hash to know a model's weights by; every 1009th number is enough."""
    return fingerprint(*(p.detach().flatten()[::1009].tolist() for p in model.parameters()))


@contextlib.contextmanager
def ctrl_c_waits():
    """Yield a list that grows with each Ctrl-C, so that a loop can finish its step first."""
    presses = []

    def press(*_):
        presses.append(1)
        if len(presses) > 2:  # a user who insists; torchrun sends one more than was pressed
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, previous)


class TrainingRun:
    """What surrounds a training loop: seeds, evaluations, checkpoints, metrics, Ctrl-C, --resume.

    --out gets the model that was best on the validation data, OUT-resume.pt the newest state (until
    the run is complete), OUT.csv and OUT.png the metrics. A run that is stopped or killed, and then
    resumed, ends with the same weights as an uninterrupted one (on a CPU): a step's random numbers
    follow from seed and step. `settings` identifies what the command line only names, such as data.
    The loop: `for step in run.steps(evaluate): ...; run.record(loss, num_tokens)`.
    """

    def __init__(self, args, model, tokenizer, optimizers, per_epoch, settings, **extras):
        self.args, self.model, self.optimizers, self.per_epoch = args, model, optimizers, per_epoch
        self.device = model.tok_emb.weight.device
        self.resume_file = beside(args.out, "-resume.pt")
        self.save_best = lambda: save_checkpoint(args.out, model, tokenizer, **extras)
        self.tokens, self.seconds = 0, 1e-9  # since this start
        self.total_steps = min((args.epochs or math.inf) * per_epoch, args.max_steps or math.inf)
        self.settings = {name: str(value) for name, value in {**vars(args), **settings}.items()
                         if name not in ("out", "resume", "device")}

        # What changes as it runs; `losses` are those since the last evaluation.
        self.state = {"step": 0, "losses": [], "rows": []}
        if args.resume and self.resume_file.exists():
            self.load_state()

    def steps(self, evaluate):
        """Yield the number of each step that is to be done; evaluate and save in between."""
        state, progress, args = self.state, Progress(self.total_steps, None), self.args
        say(f"run      {self.total_steps:,} steps of {args.batch_size} x {args.grad_accum}, "
            f"learning rate {args.lr:g}, {self.device}, {pick_dtype(args.dtype, self.device)}")
        if state["step"] == 0:
            self.evaluate(evaluate)
        with ctrl_c_waits() as self.presses, contextlib.closing(progress):
            while state["step"] < self.total_steps:
                torch.manual_seed(hash((args.seed, state["step"], process_number()[0])))
                self.model.train()
                start = time.monotonic()
                yield state["step"]

                # The loop has done the step.
                self.seconds += time.monotonic() - start
                state["step"] += 1
                text = f"step {state['step']} | loss {state['losses'][-1]:.3f} | "
                progress.update(state["step"], f"{text}{self.tokens / self.seconds:,.0f} tokens/s")

                # Evaluate when it is due; save then, and after Ctrl-C.
                due = state["step"] % args.eval_every == 0 or state["step"] == self.total_steps
                if due or self.pressed:
                    progress.close()
                    if due:
                        self.evaluate(evaluate)
                    self.save_state()
                if self.pressed:
                    say(f"step {state['step']} is saved; go on with the same command and --resume")
                    raise KeyboardInterrupt

    def rows_of_step(self, step, num_rows):
        """The numbers of a step's rows: each epoch is a new shuffle, known from the seed."""
        epoch, k = divmod(step, self.per_epoch)
        per_step = self.args.batch_size * self.args.grad_accum
        return shuffle(self.args.seed, epoch, num_rows)[k * per_step:(k + 1) * per_step]

    def record(self, loss, tokens):
        """Called in each step, with this process's share of the mean loss and of the tokens."""
        loss, tokens, self.pressed = sum_over_processes(
            [float(loss), tokens, len(self.presses)], self.device)
        self.state["losses"].append(self.finite(loss))
        self.tokens += tokens

    def finite(self, loss):
        """The loss itself. Raises UserError when training has gone astray."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} after step {self.state['step']}; what was saved "
                            f"is kept. Start anew with a lower --lr than {self.args.lr:g}")
        return loss

    def evaluate(self, evaluate):
        """Add a row to the metrics and print it; save the model if it is the best so far."""
        state, losses = self.state, self.state["losses"]
        self.model.eval()
        row = {"step": state["step"], "epoch": state["step"] / self.per_epoch,
               "train_loss": sum(losses) / len(losses) if losses else None, **evaluate()}
        sample = row.pop("sample", None)
        self.finite(row["val_loss"])
        say(" | ".join(f"{name.replace('_', ' ')} {value:.{0 if name == 'step' else 3}f}"
                       for name, value in row.items() if value is not None))
        if sample:
            say(f"    {sample}")
        state["rows"].append(row)
        state["losses"] = []

        # Best is the highest accuracy, where there is one, then the lowest loss; step 0 is out.
        best = max(state["rows"][1:], default=None,
                   key=lambda row: (row.get("val_accuracy", 0), -row["val_loss"]))
        if best is row and process_number()[0] == 0:
            self.save_best()

    def save_state(self):
        """Write the metrics, then all that a resumed run needs."""
        if process_number()[0] == 0:
            write_metrics(self.state["rows"], self.args.out)
            trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            with write_atomically(self.resume_file) as part:
                torch.save({"state": self.state, "settings": self.settings, "weights": trained,
                            "optimizers": optimizers}, part)

    def load_state(self):
        """Go on where OUT-resume.pt stands. Raises UserError when it is of another run."""
        saved = torch.load(self.resume_file, map_location="cpu", weights_only=True)
        other = dict(self.settings.items() - saved["settings"].items())
        if other:
            raise UserError(f"{self.resume_file} is of a run with another --"
                            f"{min(other).replace('_', '-')}; repeat its command, or leave out "
                            "--resume")
        self.state = saved["state"]
        self.model.load_state_dict(saved["weights"], strict=False)
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        say(f"resumed  after step {self.state['step']:,}")

    def finish(self):
        """Say how it went, with the validation loss as a line, and drop the state: all is done."""
        losses = [row["val_loss"] for row in self.state["rows"]]
        low, span = min(losses), max(losses) - min(losses) or 1.0
        marks = shades("▁▂▃▄▅▆▇█", ".:-=+*#@")
        curve = "".join(marks[round(7 * (loss - low) / span)] for loss in losses)
        say(f"val loss {curve} from {losses[0]:.3f} to {losses[-1]:.3f}, lowest {low:.3f}")
        say(f"time     {self.seconds:,.0f} s, {self.tokens / self.seconds:,.0f} tokens/s")
        say(f"saved    {self.args.out}, the best on the validation data")
        if process_number()[0] == 0:  # the others are done before the first has saved
            self.resume_file.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def shuffle(seed, epoch, num_rows):
    """The row numbers of an epoch in a random order."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def write_metrics(rows, out):
    """Write OUT.csv and, if matplotlib is installed, OUT.png with the losses over the steps."""
    with open(beside(out, ".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        axes = Figure().subplots()
        for name in ("train_loss", "val_loss"):
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.legend()
        axes.figure.savefig(beside(out, ".png"), dpi=120)


# ---------------------------------------------------------------------------------------------
# The command: looking inside, and writing.

@torch.no_grad()
def attention_weights(model, idx, layer):
    """Who looks at whom: (1, T) token IDs -> (H, T, T), in each head a row per query.

    `MultiHeadAttention` computes the same weights but never shows them.
    """
    block, T = model.trf_blocks[layer], idx.shape[1]
    x = model.tok_emb(idx) + model.pos_emb(torch.arange(T, device=idx.device))
    x = block.norm1(model.trf_blocks[:layer](x))
    queries = block.att.split_heads(block.att.W_query(x))[0]              # (H, T, D)
    keys = block.att.split_heads(block.att.W_key(x))[0]
    attn_scores = queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
    future = torch.ones(T, T, device=idx.device).triu(diagonal=1).bool()
    return torch.softmax(attn_scores.masked_fill(future, -torch.inf), dim=-1)


def explain(model, tokenizer, idx, layer, head, top_k, top_p):
    """Print a prompt's tokens, the likeliest next ones, and who looks at whom."""
    def show(token):
        return repr(token_ids_to_text(torch.tensor([token]), tokenizer))

    tokens = idx[0].tolist()
    say(f"{len(tokens)} tokens, each with its ID")
    say("  " + " ".join(f"{show(token)} {token}" for token in tokens))

    # The same scores at three temperatures, and which tokens the other two choices would keep.
    with torch.no_grad():
        logits = model(idx)[:, -1]
    probs = [next_token_probs(logits, temperature)[0] for temperature in (0.5, 1.0, 1.5)]
    kept = {"k": next_token_probs(logits, top_k=top_k)[0],
            "p": next_token_probs(logits, top_p=top_p)[0]}
    say(f"\nThe likeliest next tokens; k: kept by top-k {top_k}, p: kept by top-p {top_p:g}")
    say(" " * 16 + "temperature 0.5  temperature 1    temperature 1.5  kept at 1")
    for token in logits[0].topk(min(8, logits.shape[-1])).indices.tolist():
        shares = [p[token].item() for p in probs]
        columns = "".join(f"{shades('█', '#') * round(8 * p):8s} {p:6.1%}  " for p in shares)
        marks = " ".join(name for name, p in kept.items() if p[token] > 0)
        say(f"  {show(token):14.14s}{columns}{marks}")

    # A row per token, its weights as shades: the fullest is the row's largest.
    weights = attention_weights(model, idx, layer)
    weights = weights.mean(dim=0) if head is None else weights[head]
    which = "all heads" if head is None else f"head {head}"
    marks = shades(" ░▒▓█", " .:=#")
    first = max(0, len(tokens) - 30)
    say(f"\nWho looks at whom: layer {layer}, {which}. A row shows what its token looks at")
    say(" " * 18 + "".join(f"{i % 100:2d}" for i in range(first, len(tokens))))
    for i in range(first, len(tokens)):
        row = weights[i, first:i + 1]
        shaded = "".join(2 * marks[round(4 * share)] for share in (row / row.max()).tolist())
        say(f"  {i:3d} {show(tokens[i]):12.12s}{shaded}")


def print_stream(stream, tokenizer, presses=()):
    """Print the tokens of `generate_stream` as text while they come, up to the end of text.

    A Ctrl-C in `presses` ends it too. Returns the list of tokens.
    """
    tokens = (int(row[0]) for row in stream)
    tokens = itertools.takewhile(lambda i: not presses and i != tokenizer.eot_token, tokens)
    shown, returned = itertools.tee(tokens)
    for piece in decode_stream(shown, tokenizer):
        print(printable(piece), end="", flush=True)
    print()
    return list(returned)


def main(argv=None):
    """The walk without --checkpoint, --prompt or --explain; else write or explain."""
    parser = ArgumentParser(description="A walk through the model; or text from a checkpoint.")
    arg = parser.add_argument
    arg("--checkpoint", type=Path, help="the model (with --prompt: checkpoints/pretrained.pt)")
    arg("--prompt", help="text to continue; with --checkpoint alone, a new document begins")
    arg("--max-new-tokens", type=positive_int, default=200, help="when to stop")
    arg("--temperature", type=non_negative_float, default=0.8, help="0: always the likeliest token")
    arg("--top-k", type=positive_int, help="choose among the k likeliest tokens")
    arg("--top-p", type=probability, help="choose among the likeliest that reach this probability")

    # What --explain shows.
    arg("--explain", action="store_true", help="show tokens, next tokens and attention instead")
    arg("--layer", type=int, default=-1, help="whose attention, from 0; -1 is the last")
    arg("--head", type=int, help="which head, from 0; default: the mean of all")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.prompt is None and not args.explain:
        return walk()

    # Load, then explain or write.
    device = pick_device(args.device)
    path = args.checkpoint or Path("checkpoints") / "pretrained.pt"
    model, tokenizer, _ = load_checkpoint(path, device)
    context, L, H = (model.cfg[name] for name in ("context_length", "n_layers", "n_heads"))
    idx = text_to_token_ids(args.prompt or "<|endoftext|>", tokenizer).to(device)
    if args.explain:
        if not -L <= args.layer < L or not 0 <= (args.head or 0) < H:
            raise UserError(f"{path} has {L} layers and {H} heads, counted from 0")
        return explain(model, tokenizer, idx[:, -context:], args.layer % L, args.head,
                       args.top_k or 5, args.top_p or 0.9)

    model.to(pick_dtype(args.dtype, device))
    print(printable(args.prompt or ""), end="", flush=True)
    start = time.monotonic()
    tokens = print_stream(generate_stream(
        model, idx, args.max_new_tokens, context, args.temperature, args.top_k,
        tokenizer.eot_token, args.top_p, seed=args.seed), tokenizer)
    speed = len(tokens) / (time.monotonic() - start)
    print(f"{len(tokens)} tokens, {speed:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
