"""The model: a GPT from one attention head up, generation, LoRA, and the checkpoint between stages.

    python gpt.py                                            a walk through the model, step by step
    python gpt.py --checkpoint checkpoints/pretrained.pt --prompt "The import statement"

This is the one file the stages share: `from gpt import GPTModel, GPT_CONFIG_124M`. It needs torch,
tiktoken, numpy and requests, and follows the book *Build a Large Language Model (From Scratch)* by
Sebastian Raschka ("the book" below), chapters 3 to 5 and appendices D and E, in the book's names.

Read it in order: attention -> the model -> generation -> LoRA -> tokenizer and checkpoint ->
download -> what every script needs -> the walk.

Shapes: B batch (rows), T tokens in a row, C embedding width, H heads, D = C / H head width,
V vocabulary size.
"""

import argparse
import base64
import codecs
import contextlib
import csv
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import requests
import tiktoken
import torch
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
# One optional key, "tie_embeddings": True lets out_head share tok_emb's matrix, as GPT-2 does.

GPT2_SIZES = {  # what differs between the four published sizes of GPT-2 (Radford et al. 2019)
    "124M": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "355M": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "774M": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "1558M": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}


class UserError(Exception):
    """Something the user can mend: one sentence with what is wrong and what to type next."""


# ---------------------------------------------------------------------------------------------
# Attention, from one head to many. The first four classes are a ladder to read; the model uses
# the last one, MultiHeadAttention.

class SelfAttention_v1(nn.Module):
    """One head, with bare matrices. x (T, d_in) -> (T, d_out). Book section 3.4.

    Each token asks a question (query); each token offers a label (key) and a content (value).
    The better a key answers the query, the more of its value flows into the context vector.
    """

    def __init__(self, d_in, d_out):
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x):
        queries, keys, values = x @ self.W_query, x @ self.W_key, x @ self.W_value
        attn_scores = queries @ keys.T                           # (T, T): each query with each key
        # Dividing by the root of the width keeps the softmax from saturating on long vectors.
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)  # rows sum to 1
        return attn_weights @ values                              # (T, d_out)


class SelfAttention_v2(nn.Module):
    """The same head with linear layers, whose initial values suit training better. Section 3.4."""

    def __init__(self, d_in, d_out, qkv_bias=False):
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x):
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)
        attn_scores = queries @ keys.T
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        return attn_weights @ values


class CausalAttention(nn.Module):
    """A head that cannot look ahead, for batches. x (B, T, d_in) -> (B, T, d_out). Section 3.5."""

    def __init__(self, d_in, d_out, context_length, dropout, qkv_bias=False):
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        # True above the diagonal: the keys that lie in the future of a query.
        mask = torch.triu(torch.ones(context_length, context_length), diagonal=1).bool()
        self.register_buffer("mask", mask)

    def forward(self, x):
        T = x.shape[1]
        queries, keys, values = self.W_query(x), self.W_key(x), self.W_value(x)
        attn_scores = queries @ keys.transpose(1, 2)              # (B, T, T)
        # Minus infinity becomes exactly zero in the softmax.
        attn_scores = attn_scores.masked_fill(self.mask[:T, :T], -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        return self.dropout(attn_weights) @ values


class MultiHeadAttentionWrapper(nn.Module):
    """Several causal heads side by side: (B, T, d_in) -> (B, T, num_heads * d_out). Section 3.6."""

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        self.heads = nn.ModuleList(
            [CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)
             for _ in range(num_heads)])

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], dim=-1)


class Linear(nn.Linear):
    """nn.Linear, made faster on a CPU when x is a single row, as in generation.

    torch uses one core for one float32 row. Here the matrix is cut into a block per thread, so
    that all cores read it: 2 to 2.5 times faster on two cores. For bfloat16, torch asks oneDNN
    first, which is made for many rows; torch's own product of one is twice as fast.
    """

    def forward(self, x):
        single = (x.numel() == self.in_features and x.device.type == "cpu" and not x.requires_grad
                  and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
                  and not torch.compiler.is_compiling())
        if single and x.dtype == torch.bfloat16:
            onednn, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
            try:
                return super().forward(x)
            finally:
                torch.backends.mkldnn.enabled = onednn
        if single and x.dtype == torch.float32:
            blocks = min(torch.get_num_threads(), self.out_features)
            rows = self.out_features // blocks * blocks
            weight = self.weight[:rows].view(blocks, -1, self.in_features)
            # subtle: .t() only changes how x is looked at; made .contiguous(), bmm would be slow.
            y = torch.bmm(weight, x.reshape(1, -1).t().expand(blocks, -1, 1)).view(rows)
            if rows < self.out_features:  # what cannot be shared out evenly
                y = torch.cat([y, self.weight[rows:] @ x.flatten()])
            y = y if self.bias is None else y + self.bias
            return y.view(*x.shape[:-1], self.out_features)
        return super().forward(x)


class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers on a CPU: a number of 64 bits is cut into four of 16.

    2.5 times faster there; with nn.Dropout, random numbers are a tenth of a training step at 124M.
    """

    def forward(self, x):
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2**63, None)
        numbers = bits.view(torch.int16)[:x.numel()].view(x.shape)    # from -2^15 to 2^15 - 1
        keep = numbers >= round(self.p * 2**16) - 2**15               # a share p lies below
        return x * (keep.to(x.dtype) / (1 - self.p))


class MultiHeadAttention(nn.Module):
    """All heads at once, with a fused softmax. (B, T, d_in) -> (B, T, d_out).

    `F.scaled_dot_product_attention` is the arithmetic of `CausalAttention` without ever storing
    the (T, T) weights (Dao et al. 2022, FlashAttention), so there is no mask to keep and
    `context_length` is here for the book's signature only. Section 3.6. `cache` is the KVCache of
    the next part. Raises ValueError when d_out cannot be shared out evenly among the heads.
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
        self.dropout = Dropout(dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, _ = x.shape

        def split_heads(t):  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
            return t.view(B, T, self.num_heads, -1).transpose(1, 2)

        queries = split_heads(self.W_query(x))
        keys = split_heads(self.W_key(x))
        values = split_heads(self.W_value(x))
        mask = None
        if cache is not None:  # put the new keys behind the old ones and look at all of them
            keys, values, mask = cache.extend(layer, keys, values)
        dropout_p = self.dropout.p if self.training else 0.0
        if (self.training and x.device.type == "cpu" and 1 < T <= 512
                and (queries.dtype == torch.bfloat16 or dropout_p > 0)):
            context_vec = self.attend_in_steps(queries, keys, values, mask)
        else:
            # subtle: is_causal assumes that the first query belongs to the first key. With a cache
            # the first query comes later, and would see one key only; so the cache brings a mask.
            context_vec = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None and T > 1,
                dropout_p=dropout_p)
        # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.out_proj(context_vec.transpose(1, 2).reshape(B, T, -1))

    def attend_in_steps(self, queries, keys, values, mask):
        """The same in separate steps, (B, H, T, D): in training on a CPU, torch's fused kernel is
        slow in bfloat16 and has no dropout; this is 2.5 times faster at 256 tokens. But it stores
        the (T, T) weights, so longer rows than 512 are left to the kernel."""
        B, H, T, D = queries.shape
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=queries.device).tril()
        # 0 where a query may look, minus infinity where not: added to the scores.
        mask_to_add = queries.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        queries, keys, values = (t.flatten(0, 1) for t in (queries, keys, values))  # (B H, T, D)
        attn_scores = torch.baddbmm(mask_to_add, queries, keys.mT, alpha=D ** -0.5)  # (B H, T, T)
        attn_weights = self.dropout(torch.softmax(attn_scores, dim=-1))
        return (attn_weights @ values).view(B, H, T, D)


# ---------------------------------------------------------------------------------------------
# The model: normalise, attend, normalise, think; a dozen times. Book chapter 4.

class LayerNorm(nn.Module):
    """Each token's C numbers to mean 0 and variance 1, then scale and shift. Section 4.2.

    (x - mean) / sqrt(var + eps) * scale + shift, with the variance divided by C, not C - 1.
    """

    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GPT-2's form. Hendrycks & Gimpel 2016."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Each token thinks on its own, four times as wide. (B, T, C) -> (B, T, C). Section 4.3."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to its input. (B, T, C) -> (B, T, C). Section 4.5.

    Adding to a shortcut lets gradients reach the first block unweakened; normalising before each
    part rather than after it ("pre-norm") keeps deep stacks trainable.
    """

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"], d_out=cfg["emb_dim"], context_length=cfg["context_length"],
            dropout=cfg["drop_rate"], num_heads=cfg["n_heads"], qkv_bias=cfg["qkv_bias"])
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_resid = Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop_resid(self.att(self.norm1(x), cache, layer))
        return x + self.drop_resid(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token IDs (B, T) -> logits (B, T, V): at each position, a score for every next token.

    Section 4.6. Raises ValueError for more tokens than `cfg["context_length"]`.

    Example:
        torch.manual_seed(123)
        model = GPTModel(GPT_CONFIG_124M)             # the book's model, number for number
        logits = model(torch.tensor([[15496, 11, 314, 716]]))          # (1, 4, 50257)
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = dict(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = Dropout(cfg["drop_rate"])
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
        T = in_idx.shape[1]
        start, longest = (0, 0) if cache is None else (cache.start, cache.longest)
        if longest + T > self.cfg["context_length"]:
            raise ValueError(f"{T} tokens do not fit the model's context of "
                             f"{self.cfg['context_length']}; shorten the text")
        positions = torch.arange(T, device=in_idx.device) + start  # (T,), or (B, 1)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))       # (B, T, C)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.advance(T)
        return self.final_norm(x)

    def forward(self, in_idx):
        return self.out_head(self.hidden_states(in_idx))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch's; also takes the weights of other code for the book, which save their masks."""
        state_dict = {name: t for name, t in state_dict.items() if not name.endswith("att.mask")}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.tie_weights()
        return result


# ---------------------------------------------------------------------------------------------
# Generation: predict, choose, append, repeat.

def text_to_token_ids(text, tokenizer):
    """Text -> (1, T) token IDs; `<|endoftext|>` in the text is the special token. Section 5.1."""
    return torch.tensor(tokenizer.encode(text, allowed_special={"<|endoftext|>"},
                                         disallowed_special=())).unsqueeze(0)


def token_ids_to_text(token_ids, tokenizer):
    """(1, T) or (T,) token IDs -> text. Section 5.1."""
    return tokenizer.decode(token_ids.flatten().tolist())


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """The loop one would explain first: always the likeliest token. (B, T) -> (B, T + n).

    Section 4.7. It reads the whole text again for every new token; `generate` does not.
    """
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]                         # as much as the model can see
        with torch.no_grad():
            logits = model(idx_cond)
        idx_next = logits[:, -1].argmax(dim=-1, keepdim=True)     # (B, 1), from the last position
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


class KVCache:
    """The keys and values of the tokens read so far, so that each is computed only once.

    For every layer one (B, H, max_length, D) tensor of keys and one of values, allocated once.
    Rows may differ in length. `start` is where the next token goes: an integer while all rows are
    equally long, else one per row, (B, 1). `longest` is the number of tokens in the longest row.
    """

    def __init__(self, model, batch_size, max_length):
        heads, weight = model.cfg["n_heads"], model.tok_emb.weight
        shape = (batch_size, heads, max_length, model.cfg["emb_dim"] // heads)
        self.keys = [weight.new_zeros(shape) for _ in model.trf_blocks]
        self.values = [weight.new_zeros(shape) for _ in model.trf_blocks]
        self.start = self.longest = 0

    def set_lengths(self, lengths):
        """Call after reading prompts padded at the right: of row i, lengths[i] tokens are real."""
        if bool((lengths != self.longest).any()):
            self.start = lengths[:, None]
            self.rows = torch.arange(len(lengths), device=lengths.device)

    def extend(self, layer, keys, values):
        """Store (B, H, T, D) new keys and values; return all of them and the mask they need."""
        T, end = keys.shape[2], self.longest + keys.shape[2]
        all_keys, all_values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        if isinstance(self.start, int):
            all_keys[:, :, self.start:] = keys
            all_values[:, :, self.start:] = values
            query_positions = torch.arange(self.start, end, device=keys.device)[:, None]
        else:  # each row writes at its own position, one token at a time
            all_keys[self.rows, :, self.start[:, 0]] = keys[:, :, 0]
            all_values[self.rows, :, self.start[:, 0]] = values[:, :, 0]
            query_positions = self.start[:, :, None, None]
        if isinstance(self.start, int) and (T == 1 or self.start == 0):
            return all_keys, all_values, None  # one query sees every key; or is_causal does it
        key_positions = torch.arange(end, device=keys.device)
        return all_keys, all_values, key_positions <= query_positions

    def advance(self, num_tokens):
        """Count the tokens that every layer has stored."""
        self.start = self.start + num_tokens
        self.longest += num_tokens


def sample_next(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> next tokens (B,). Section 5.3; top-p is Holtzman et al. 2020.

    temperature 0 takes the likeliest token; below 1 the likely get likelier, above 1 the unlikely
    do. top_k keeps the k likeliest tokens; top_p keeps the likeliest whose probabilities reach p.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    # Less the largest, which no softmax sees: a tiny temperature must not make infinities.
    logits = (logits.float() - logits.max(dim=-1, keepdim=True).values.float()) / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if top_p is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        # A token stays if those before it have not reached p, so the likeliest always stays.
        sorted_probs[sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p] = 0.0
        probs = torch.zeros_like(probs).scatter(1, order, sorted_probs)
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


@torch.no_grad()
def generate_stream(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None,
                    eos_id=None, top_p=None, lengths=None, seed=None):
    """Yield the next tokens (B,) of each row as they come; arguments as in `generate`."""
    if idx.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token, such as <|endoftext|>")
    if (temperature < 0 or (top_k is not None and top_k < 1)
            or (top_p is not None and not 0 < top_p <= 1)):
        raise ValueError("temperature must be 0 or more, top_k 1 or more, top_p within (0, 1]")
    B, T = idx.shape
    device = idx.device
    context_size = min(context_size, model.cfg["context_length"])
    rng = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    lengths = torch.full((B,), T, device=device) if lengths is None else lengths.to(device)
    text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
    rows = torch.arange(B, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(model, B, min(context_size, T + max_new_tokens))
    was_training = model.training
    model.eval()
    try:
        for longest in range(T, T + max_new_tokens):
            if longest > context_size:  # the window slides: with the positions, all keys change
                first = (lengths - context_size).clamp(min=0)
                window = first[:, None] + torch.arange(context_size, device=device)
                hidden = model.hidden_states(text.gather(1, window))
                hidden = hidden[rows, lengths - first - 1]        # each row's last token
            elif longest == T:          # read the prompts in one pass
                hidden = model.hidden_states(idx, cache)[rows, lengths - 1]
                cache.set_lengths(lengths)
            else:                       # read only the token that came last
                hidden = model.hidden_states(idx_next[:, None], cache)[:, -1]
            logits = model.out_head(hidden)                       # (B, V): the last token's only
            idx_next = sample_next(logits, temperature, top_k, top_p, rng)
            if eos_id is not None:
                idx_next = idx_next.masked_fill(finished, eos_id)
                finished |= idx_next == eos_id
            text[rows, lengths] = idx_next
            lengths = lengths + 1
            yield idx_next
            if eos_id is not None and finished.all():
                break
    finally:
        model.train(was_training)


def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None,
             top_p=None, lengths=None, seed=None):
    """Continue each row of token IDs: (B, T) -> (B, T + n), n <= max_new_tokens. Section 5.3.

    At temperature 0 the tokens are those of `generate_text_simple`; `sample_next` explains the
    other choices, `seed` makes them repeatable. A row that produced `eos_id` is filled with it,
    and generation ends when all rows have. Prompts of different lengths are padded at the right
    (with any token) and their `lengths` (B,) given; the new tokens are `result[:, T:]`.
    Raises ValueError for an empty prompt or an option out of its range.
    """
    new = list(generate_stream(model, idx, max_new_tokens, context_size, temperature, top_k,
                               eos_id, top_p, lengths, seed))
    return torch.cat([idx, torch.stack(new, dim=1)], dim=1) if new else idx


def compile_generation(model):
    """Let torch.compile rewrite, in place, the step that reads one new token with the cache.

    The first tokens then take up to a minute; prompts, whose lengths vary, are read as before.
    """
    plain, compiled = model.hidden_states, torch.compile(model.hidden_states)

    def hidden_states(in_idx, cache=None):
        single = cache is not None and in_idx.shape[1] == 1
        return (compiled if single else plain)(in_idx, cache)

    model.hidden_states = hidden_states


# ---------------------------------------------------------------------------------------------
# LoRA: leave a trained matrix as it is and learn a small correction. Hu et al. 2021; book E.

class LoRALayer(nn.Module):
    """x (..., in_dim) -> x A B * alpha / rank (..., out_dim).

    The matrix B starts at zero, and so does the correction.
    """

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        # Dividing by the rank keeps the size of the correction, and the best learning rate, about
        # the same when the rank is changed.
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
    """Wrap every linear layer inside `model`, in place; freeze what it had before you call it.

    A head tied to the token embedding is left alone: merging would change the embedding too.
    """
    for name, module in list(model.named_children()):
        tied = name == "out_head" and model.cfg.get("tie_embeddings")
        if isinstance(module, nn.Linear) and not tied:
            setattr(model, name, LinearWithLoRA(module, rank, alpha).to(module.weight.device))
        else:
            replace_linear_with_lora(module, rank, alpha)


@torch.no_grad()
def merge_lora(model):
    """Add every correction to its matrix and unwrap it: the same function, the plain model."""
    for name, module in list(model.named_children()):
        if isinstance(module, LinearWithLoRA):
            lora = module.lora
            module.linear.weight += lora.scaling * (lora.A @ lora.B).T  # Linear stores (out, in)
            setattr(model, name, module.linear)
        else:
            merge_lora(module)


# ---------------------------------------------------------------------------------------------
# Tokenizers. Whichever it is, tiktoken's encoder runs it. A vocabulary is a list of byte strings;
# the place of one in it is its rank, which is both its token ID and its priority: when text is cut
# into tokens, the merge that gives the lowest rank comes first (tokenizer.py shows how).

GPT2_SPLIT_PATTERN = (  # how GPT-2 cuts text into chunks before it merges bytes: contractions,
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")  # words, ...
GPT2_VOCABULARY = {  # the two files that define GPT-2's tokens, with their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join("data", "tiktoken"))


def gpt2_vocabulary_files():
    """The paths of `data/vocab.bpe` and `data/encoder.json`, downloaded if they are not there."""
    for name, sha256 in GPT2_VOCABULARY.items():
        download([f"https://openaipublic.blob.core.windows.net/gpt-2/models/124M/{name}",
                  f"https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/124M/{name}"],
                 Path("data") / name, sha256)
    return [Path("data") / name for name in GPT2_VOCABULARY]


def load_gpt2_tokenizer():
    """tiktoken's `gpt2`, with its two files fetched by `download` if tiktoken lacks them."""
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    # tiktoken names a file in its cache by the SHA-1 of the address.
    names = {name: cache / hashlib.sha1((address + name).encode()).hexdigest()
             for name in GPT2_VOCABULARY}
    if not all(path.exists() for path in names.values()):
        for source in gpt2_vocabulary_files():
            with write_atomically(names[source.name]) as part:
                shutil.copyfile(source, part)
    return tiktoken.get_encoding("gpt2")


def read_rank_file(path):
    """A trained vocabulary -> (ranks, split pattern, special tokens). Raises UserError.

    PATH holds tiktoken's format, a line `base64-token rank` per token; PATH.json holds
    {"pat_str": ..., "special_tokens": {name: id}}, by default GPT-2's pattern and an
    `<|endoftext|>` after the last rank.
    """
    ranks, path = {}, Path(path)
    try:
        lines = path.read_text(encoding="ascii").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with: python tokenizer.py train TEXT "
                        f"--out {path}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as a rank file ({e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(f"{path}, line {number}: expected a base64 token, a space and a rank, "
                            f"found {line[:40]!r}") from None
        if token in ranks or not token:
            raise UserError(f"{path}, line {number}: the token {token!r} is empty or there twice")
        if rank != len(ranks):
            raise UserError(f"{path}, line {number}: expected rank {len(ranks)}, found {rank}; "
                            "ranks count up from 0 without gaps")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} is not a byte-level vocabulary: the single byte {missing[0]} has "
                        "no rank")
    sidecar = Path(f"{path}.json")
    try:
        more = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.exists() else {}
        pattern = more.get("pat_str", GPT2_SPLIT_PATTERN)
        special = more.get("special_tokens", {"<|endoftext|>": len(ranks)})
        expected = list(range(len(ranks), len(ranks) + len(special)))
        if not isinstance(pattern, str) or sorted(special.values()) != expected:
            raise ValueError("the special tokens' ids must follow the ranks")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UserError(f"{sidecar} is broken ({e}); train the vocabulary anew") from None
    return ranks, pattern, special


def load_tokenizer(spec):
    """`gpt2`, `bytes`, the path of a rank file, or what a checkpoint holds -> tiktoken.Encoding.

    Every tokenizer has `<|endoftext|>`, as `tokenizer.eot_token`. Raises UserError.
    """
    if spec == "gpt2":
        return load_gpt2_tokenizer()
    if spec == "bytes":
        name, ranks, pattern = "bytes", {bytes([i]): i for i in range(256)}, GPT2_SPLIT_PATTERN
        special = {"<|endoftext|>": 256}
    elif isinstance(spec, dict):
        name, pattern, special = spec["name"], spec["pat_str"], spec["special_tokens"]
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["tokens"])}
    elif not Path(spec).exists() and not str(spec).endswith(".tiktoken"):
        raise UserError(f"unknown tokenizer {str(spec)!r}; use gpt2, bytes, or the path of a file "
                        "made by: python tokenizer.py train")
    else:
        name, (ranks, pattern, special) = Path(spec).stem + ".tiktoken", read_rank_file(spec)
    if "<|endoftext|>" not in special:
        raise UserError(f"the tokenizer {name!r} has no <|endoftext|>, which separates documents; "
                        "train it with that special token")
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    except ValueError as e:  # the split pattern is not a regular expression
        raise UserError(f"the tokenizer {name!r} cannot be used ({e})") from None


def tokenizer_spec(tokenizer):
    """What a checkpoint holds of a tokenizer: a name, or everything needed to rebuild it."""
    if tokenizer.name in ("gpt2", "bytes"):
        return tokenizer.name
    tokens = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return {"name": tokenizer.name, "pat_str": tokenizer._pat_str,
            "special_tokens": dict(tokenizer._special_tokens),
            "tokens": [base64.b64encode(token).decode("ascii") for token in tokens]}


# ---------------------------------------------------------------------------------------------
# The checkpoint: the only thing that passes from one stage to the next.

@contextlib.contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`; it becomes `path` only if the block succeeds."""
    path = Path(path)
    part = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(e, OSError):
            raise
        raise UserError(f"{path} could not be written ({e.strerror or e}); what was there is kept. "
                        "Free some space or choose another place") from None


def save_dictionary(path, contents):
    """torch.save to `path`, all or nothing. Raises UserError."""
    with write_atomically(path) as part:
        try:
            torch.save(contents, part)
        except RuntimeError:  # what torch makes of a failed write
            raise OSError(errno.ENOSPC, "is the disk full?") from None


def save_checkpoint(path, model, tokenizer, **extras):
    """Write model, configuration and tokenizer to `path`, all or nothing.

    `extras` (optimizer state, step, prompt style ...) ride along: dictionaries, lists, strings,
    numbers and tensors only. `class_names` marks a classifier. Raises UserError.
    """
    # torch.compile keeps the real model inside its wrapper.
    model = getattr(model, "_orig_mod", model)
    kind = "classifier" if "class_names" in extras else "language model"
    save_dictionary(path, {**extras, "kind": kind, "config": model.cfg,
                           "model": model.state_dict(), "tokenizer": tokenizer_spec(tokenizer)})


def replace_head(model, num_classes):
    """Put a classification head (C -> num_classes) in out_head's place. Book section 6.5.

    A tied token embedding keeps its matrix: the new head is a layer of its own.
    """
    model.cfg = {**model.cfg, "tie_embeddings": False}
    model.out_head = nn.Linear(model.cfg["emb_dim"], num_classes).to(model.tok_emb.weight.device)


class _NoInit(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.normal_:  # of embeddings; without memory, it imports for a second
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only():
    """Modules made in this context have shapes but no numbers: they take no memory, no time."""
    with torch.device("meta"), _NoInit():
        yield


def allocate(module, device):
    """Give a module made in `shapes_only` memory, still without numbers."""
    # What torch's to_empty does; that one, however, imports a compiler's worth of modules first.
    module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def load_checkpoint(path, device="cpu", kind="language model"):
    """Read a checkpoint -> (model, tokenizer, everything else in a dictionary).

    The model is in training mode, as torch makes them: call `model.eval()` before `model(ids)`.
    Raises UserError when the file is not there, cut short, not a checkpoint, of another `kind`
    ("language model" or "classifier"), or when weights and configuration do not match.
    """
    path = Path(path)
    maker = {"language model": "pretrain.py", "classifier": "finetune_classifier.py"}[kind]
    make = f"make one with: python {maker}"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {make}")
    try:
        # mmap: the file is read straight into the model, never held twice.
        saved = torch.load(path, map_location="cpu", weights_only=True,
                           mmap=os.name != "nt")  # Windows cannot replace a file that is mapped
        found, cfg, weights, spec = (saved[key] for key in ("kind", "config", "model", "tokenizer"))
    except Exception:  # whatever a foreign or cut file makes torch.load raise
        raise UserError(f"{path} is not a checkpoint of this project, or was cut short; "
                        f"{make}") from None
    if found != kind:
        raise UserError(f"{path} holds a {found}, but a {kind} is needed; {make}")
    try:
        with shapes_only():  # to compare before anything is made
            model = GPTModel(cfg)
            if kind == "classifier":
                replace_head(model, len(saved["class_names"]))
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        actual = {name: tuple(t.shape) for name, t in weights.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} has a configuration that does not describe a model ({e}); "
                        f"{make}") from None
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise UserError(f"{path} does not match its own configuration: {name} should be "
                            f"{expected.get(name)} but is {actual.get(name)}; {make}")
    allocate(model, device)
    model.tie_weights()
    model.load_state_dict(weights)
    tokenizer = load_tokenizer(spec)
    return model, tokenizer, {k: v for k, v in saved.items() if k not in ("model", "tokenizer")}


# ---------------------------------------------------------------------------------------------
# Downloads.

VERDICT = Path("data") / "the-verdict.txt"  # the book's training text, by Edith Wharton (1908)
VERDICT_ADDRESS = ("https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/"
                   "01_main-chapter-code/the-verdict.txt")
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"


def download(urls, path, sha256=None, timeout=30):
    """Make sure that the file `path` is there; return it as a Path.

    A file that is there is used as it is, without the network. Otherwise each address is tried in
    turn, into `path` + ".part", which a later call resumes; size and SHA-256 (the one given, or
    the one that Hugging Face's hub announces) are checked before the file gets its name.
    `timeout` is in seconds without a byte. Raises UserError with each address and its reason.
    """
    path, reasons, origin = Path(path), [], None
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    for url in urls:
        failures = 0
        while failures < 3:  # in a row, without a byte; then the next address
            before = part.stat().st_size if part.exists() else 0
            # Two servers' bytes are mixed only if a checksum can tell whether they match.
            resume = bool(sha256) or origin in (None, url)
            try:
                fetch(url, path, sha256, timeout, resume)
                return path
            except requests.exceptions.RequestException as e:
                reason, final = explain_failure(e, timeout)
            except ValueError as e:  # what came is not what was announced
                reason, final = str(e), before == 0 or not resume
            except OSError as e:
                raise UserError(f"{path} could not be written ({e.strerror})") from None
            if final:
                break
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            origin = url if after != before else origin
            time.sleep(min(failures, timeout / 10))
        reasons.append(f"  {url}: {reason}")
    raise UserError(f"{path.name} could not be downloaded; put it at {path} by hand, or try again "
                    "when there is a network:\n" + "\n".join(reasons))


def explain_failure(error, timeout):
    """What requests raised -> (the reason in words, whether trying again is pointless)."""
    if isinstance(error, requests.exceptions.HTTPError):
        status = error.response.status_code
        return f"{status} {error.response.reason}", status < 500
    if isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error):
        return (f"no answer within {timeout} s",
                isinstance(error, requests.exceptions.ConnectTimeout))
    if "Max retries" in str(error):
        return "no connection", True
    return "the connection broke off", False


def fetch(url, path, sha256, timeout, resume):
    """One attempt of `download`. Raises what requests raises, or ValueError for wrong content."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if resume and part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # so that lengths count the file's own bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status, length = response.status_code, response.headers.get("Content-Length")
        if status in (206, 416):  # the rest of the file; or there is no rest
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)",
                                response.headers.get("Content-Range", ""))
            if not have or not span or int(span[1] or span[2]) != have:
                part.unlink(missing_ok=True)
                raise ValueError("the server did not go on where it was asked to")
            length = span[2]
        else:  # the whole file, whatever was asked
            response.raise_for_status()
            have = 0
        if status not in (200, 206, 416):
            raise ValueError(f"{status} {response.reason} instead of the file")
        if status != 416 and response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError("a web page came instead of the file")
        sha256 = sha256 or announced_sha256(response)
        if not (length or sha256 or "chunked" in response.headers.get("Transfer-Encoding", "")):
            raise ValueError("the server does not say how long the file is")
        if status != 416:
            have = receive(response, part, have, length and int(length))
    if length and have < int(length):
        raise requests.exceptions.ConnectionError(f"{have} of {length} bytes came")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if (sha256 and digest.hexdigest() != sha256.lower()) or (length and have > int(length)):
        part.unlink()
        raise ValueError(f"wrong content: {have} bytes with the SHA-256 {digest.hexdigest()}, "
                         f"expected {length or have} bytes with {sha256 or 'any'}")
    os.replace(part, path)


def receive(response, part, have, total):
    """Append what comes to `part`, which has `have` bytes; return how many it has then."""
    progress = Progress(total, "B")
    progress.update(have)
    try:
        with open(part, "ab" if have else "wb") as file:
            # Small reads: when the connection breaks off, what a read has not returned is lost.
            while block := response.raw.read(1 << 14, decode_content=False):
                have += file.write(block)
                progress.update(have, f"downloading {part.stem}")
    except requests.packages.urllib3.exceptions.HTTPError as e:
        raise requests.exceptions.ConnectionError(e) from None
    finally:
        progress.close()
    return have


def announced_sha256(response):
    """The SHA-256 that the hub announces in a header, before it redirects; or None."""
    for header in ("X-Linked-Etag", "ETag"):
        for answer in [*response.history, response]:
            if found := re.fullmatch('(?:W/)?"?([0-9a-f]{64})"?', answer.headers.get(header, "")):
                return found[1]


# ---------------------------------------------------------------------------------------------
# What every script needs: the device, the options, errors in a sentence, progress, metrics. There
# is nothing about language models from here to the walk.

def pick_device(name="auto"):
    """`auto` (cuda if there, else cpu), `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"the device {name!r} is not available here; use --device auto") from None
    return device


def pick_dtype(name="auto", device="cpu"):
    """The type that matrix products are computed in: torch.float32 or torch.bfloat16.

    `auto` takes bfloat16 where it is really faster. A GPU tells; many CPUs only emulate it, so
    there a product is timed in both types (a few milliseconds).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    device = torch.device(device)
    if device.type == "cuda":  # compute capability 8.0 (Ampere) and later
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    if device.type != "cpu":
        return torch.float32
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            times[dtype] = min(times.get(dtype, math.inf), time.perf_counter() - start)
    faster = times[torch.bfloat16] < 0.75 * times[torch.float32]
    return torch.bfloat16 if faster else torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in `dtype`; parameters stay float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help and wrong usage as one sentence, status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message):
        """Print the sentence and leave."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive_int(text):
    """An argparse type: a whole number from 1."""
    if not re.fullmatch("[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive_float(text):
    """An argparse type: a finite number above 0."""
    if non_negative_float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def non_negative_float(text):
    """An argparse type: a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def seed_number(text):
    """An argparse type: a whole number from 0 that every generator of random numbers takes."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most 9 digits")
    return int(text)


def add_common_arguments(parser):
    """The options that mean the same in every script: --seed, --device, --dtype."""
    parser.add_argument("--seed", type=seed_number, default=123,
                        help="the same seed, the same result")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="number type of matrix products; auto takes the faster")


def add_training_arguments(parser, out, epochs, batch_size, lr, eval_every, grad_accum=1):
    """The options of every training run, with this script's defaults."""
    arg = parser.add_argument
    arg("--out", type=Path, default=Path(out), help="checkpoint to write; metrics go beside it")
    arg("--resume", action="store_true", help="go on from --out if it is there")
    arg("--epochs", type=positive_int, default=epochs, help="passes over the training data")
    arg("--max-steps", type=positive_int, help="stop after this many optimizer steps")
    arg("--batch-size", type=positive_int, default=batch_size, help="rows in a batch")
    arg("--grad-accum", type=positive_int, default=grad_accum, help="batches per optimizer step")
    arg("--lr", type=positive_float, default=lr, help="(peak) learning rate")
    arg("--eval-every", type=positive_int, default=eval_every, help="steps between evaluations")
    add_common_arguments(parser)


def run_main(main):
    """Run a script's main(): a UserError is a sentence and status 1, Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
    try:
        status = main()
        sys.stdout.flush()
    except UserError as e:
        status = f"{Path(sys.argv[0]).name}: {e}"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except PermissionError as e:
        status = f"{Path(sys.argv[0]).name}: {e.filename} may not be opened; check who owns it"
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        status = (f"{Path(sys.argv[0]).name}: out of memory; choose a smaller model or, where "
                  "there is --batch-size, a smaller batch")
    sys.exit(status)


def keep_freed_memory(largest):
    """Tell the C library to keep freed memory for reuse; blocks above `largest` bytes go back.

    Otherwise every training step returns its memory to the system and asks for it again, page by
    page: a fifth of the time at 124M on two cores. Does nothing where the library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, largest)   # M_MMAP_THRESHOLD: blocks up to this size are kept ...
        mallopt(-1, 1 << 30)   # M_TRIM_THRESHOLD: ... up to a gigabyte of them


def find_start(init, candidates):
    """The checkpoint to start from: `init` or the first candidate that is there, else UserError."""
    found = init or next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError("there is no language model to start from; make one with: python "
                        "load_gpt2.py (GPT-2, a download) or with: python pretrain.py (two "
                        "minutes, nothing to download)")
    return found


def beside(out, ending):
    """checkpoints/mine.pt and ".csv" -> checkpoints/mine.csv; a name without .pt only grows."""
    return out.with_suffix(ending) if out.suffix == ".pt" else out.with_name(out.name + ending)


def best_path(out):
    """checkpoints/pretrained.pt -> checkpoints/pretrained-best.pt"""
    return out.with_name(out.stem + "-best" + out.suffix)


def check_output(path):
    """Find out before the work, not after, that `path` can be written. Raises UserError."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is a folder or a device, not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".tmp")
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror}); choose another place with "
                        "--out") from None


def read_text_pieces(path, size=1 << 22):
    """Yield a UTF-8 file as pieces of about `size` bytes, so that its length does not matter.

    A piece ends before a white space that follows something else: there GPT-2's pattern always
    splits, so tokens come out as from the whole text. Raises UserError: missing, empty, not text.
    """
    path, decoder, rest = Path(path), codecs.getincrementaldecoder("utf-8")(), ""
    try:
        with open(path, "rb") as file:
            position = 0
            while block := file.read(size):
                new = len(rest)
                rest += decoder.decode(block)
                if "\0" in rest[new:]:
                    raise UserError(f"{path} is not a text file; give plain UTF-8 text")
                position += len(block)
                for cut in range(len(rest) - 1, max(new, 1) - 1, -1):
                    if rest[cut] in " \t\r\n" and not rest[cut - 1].isspace():
                        yield rest[:cut]
                        rest = rest[cut:]
                        break
            rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        with open(path, "rb") as file:
            guess = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise UserError(f"{path} is not UTF-8 text (near byte {position + e.start}); convert it "
                        f"with: iconv -f {guess} -t utf-8 {path}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); check the path") from None
    if position == 0:
        raise UserError(f"{path} is empty; give a file with text in it")
    if rest:
        yield rest


def printable(text):
    """Text as a terminal may show it: without control characters, which could steer it."""
    def harmless(c):  # also wide and unbreakable spaces, and what joins emoji
        return c.isprintable() or c in "\n\t\u200d" or (c.isspace() and c > "\x9f")

    return "".join(c if harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text if c != "\r")


def human(number):
    """1234567 -> '1.2 M'."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000 or unit == "G":
            return f"{number:.{0 if not unit else 1}f} {unit}".rstrip()
        number /= 1000


class Progress:
    """How far a long job is: on a terminal one line that rewrites itself, else one now and then.

    `total` in `unit`s, None if unknown. Shows text, share done, units per second, time left.
    """

    def __init__(self, total, unit):
        self.total, self.unit, self.first, self.shown = total, unit, None, 0.0
        self.terminal = sys.stdout.isatty()
        self.start = self.last = time.monotonic()

    def update(self, done, text=""):
        """Say that `done` units are done (counted from 0, also when resuming)."""
        now = time.monotonic()
        if self.first is None:  # the time starts here: what came before was preparation
            self.first, self.start = done, now
        if now - self.last < (0.1 if self.terminal else 10.0):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        line = f"{text} | {human(rate)}{'' if human(rate)[-1:].isalpha() else ' '}{self.unit}/s"
        if self.total and rate > 0:
            left = int((self.total - done) / rate)
            line += f" | {100 * done / self.total:.0f} % | {left // 60}:{left % 60:02d} left"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
            self.shown = width
        else:
            print(line, flush=True)

    def close(self):
        """Wipe the line, so that what follows stands on a clean one."""
        if self.shown:
            print("\r" + " " * self.shown + "\r", end="", flush=True)
            self.shown = 0


class CtrlC:
    """`with CtrlC() as stop:` lets a loop finish its step after Ctrl-C: ask `stop.pressed`.

    A second Ctrl-C, a second or more later, interrupts at once.
    """

    def __enter__(self):
        self.pressed = 0.0  # when
        self.previous = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_):
        # torchrun passes on the Ctrl-C that its processes have seen already: that is not a second.
        if self.pressed and time.monotonic() - self.pressed > 1:
            raise KeyboardInterrupt
        self.pressed = self.pressed or time.monotonic()

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)


class Metrics:
    """The numbers of a training run, a row per evaluation, in a CSV file beside the checkpoint.

    Losses are in nats (natural logarithms) per token.
    """

    def __init__(self, out, resume_step=0):
        self.path, self.rows = beside(Path(out), ".csv"), []
        if resume_step and self.path.exists():  # keep the rows up to the checkpoint
            with open(self.path, newline="", encoding="utf-8") as file:
                self.rows = [r for r in csv.DictReader(file) if int(r["step"]) <= resume_step]

    def add(self, **row):
        """Add a row, with its `step`, and write the file."""
        self.rows.append(row)
        with write_atomically(self.path) as part:
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
                writer.writerows(self.rows)

    def plot(self, per="token"):
        """Draw train_loss and val_loss over steps as PNG, if matplotlib is there; say so."""
        path = self.path.with_name(self.path.name.removesuffix(".csv") + ".png")
        try:
            import matplotlib
        except ImportError:
            print(f"no plot of {self.path}: pip install matplotlib draws one")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        figure, axes = plt.subplots(figsize=(6, 4))
        for name in ("train_loss", "val_loss"):
            axes.plot([int(r["step"]) for r in self.rows], [float(r[name]) for r in self.rows],
                      label=name)
        axes.set(xlabel="step", ylabel=f"loss (nats per {per})")
        axes.legend()
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        print(f"plot     {path}")


def random_state():
    """The state of torch's random numbers, for a checkpoint."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state):
    """Go on with the random numbers of `random_state()`."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------------------------------------
# python gpt.py: the walk, or text from a checkpoint.

def decode_stream(tokens, tokenizer):
    """Token IDs one by one -> pieces of text; a character of several tokens comes out whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)


def walk():
    """Show GPT-2's configuration, its parameters, and the shape of the data after each step."""
    cfg = {**GPT_CONFIG_124M, "tie_embeddings": True, "qkv_bias": True}
    with shapes_only():
        model = GPTModel(cfg)
    print("A GPT reads tokens (pieces of words) and scores every token that could come next.\n\n"
          "The configuration of GPT-2, the smallest of its four sizes")
    for key, value in cfg.items():
        print(f"  {key:16s} {value}")

    def count(module):
        return sum(p.numel() for p in module.parameters())

    block, L = model.trf_blocks[0], cfg["n_layers"]
    parts = [("tok_emb: one vector per token", count(model.tok_emb)),
             ("pos_emb: one vector per position", count(model.pos_emb)),
             (f"attention, {L} times {count(block.att):,}", L * count(block.att)),
             (f"feed-forward, {L} times {count(block.ff):,}", L * count(block.ff)),
             ("layer norms", L * 2 * count(block.norm1) + count(model.final_norm)),
             ("out_head: the same matrix as tok_emb", 0)]
    total = count(model)
    print("\nIts parameters, by part")
    for name, number in [*parts, ("together", total)]:
        print(f"  {name:40s} {number:>12,} {100 * number / total:5.1f} %")
    print(f"  memory: {total * 4 / 1e6:.0f} MB to use it in float32, {total * 16 / 1e6:.0f} MB to "
          "train it\n  (weights, gradients and AdamW's two averages)")

    ids = torch.tensor([[6109, 3626, 6100, 345]], device="meta")
    positions = torch.arange(4, device="meta")
    att, steps = block.att, []

    def show(what, t, note):
        steps.append(f"  {what:28s} {str(tuple(t.shape)):16s} {note}")
        return t

    show("token IDs", ids, "(B, T): 6109 3626 6100 345, 'Every effort moves you'")
    x = show("tok_emb + pos_emb", model.tok_emb(ids) + model.pos_emb(positions),
             "(B, T, C)")
    y = show("norm1", block.norm1(x), "mean 0, variance 1 in each token")
    q = show("W_query, and W_key, W_value", att.W_query(y), "one query, key, value per token")
    # Keys and values have the queries' shape, and a softmax changes none: q stands for all.
    q = show("split into heads", q.view(1, 4, att.num_heads, -1).transpose(1, 2), "(B, H, T, D)")
    w = show("queries x keys, softmax", q @ q.transpose(2, 3), "(B, H, T, T): who looks at whom")
    y = show("weights x values", w @ q, "(B, H, T, D): what they find there")
    y = show("join heads, out_proj", att.out_proj(y.transpose(1, 2).reshape(1, 4, -1)), "(B, T, C)")
    x = show("add to the shortcut", x + y, "what a token is + what it found")
    y = show("norm2, ff.layers[0], GELU", block.ff.layers[:2](block.norm2(x)), "(B, T, 4 C)")
    x = show("ff.layers[2], add", x + block.ff.layers[2](y), f"that is one block; {L - 1} more")
    x = show("final_norm", model.final_norm(x), "(B, T, C)")
    show("out_head: logits", model.out_head(x), "(B, T, V): scores for every next token")
    print("\nOne short sentence on its way through, and the shape after each step\n"
          + "\n".join(steps))
    print("\nThe last row of logits chooses the fifth token; append it and repeat: that is "
          "generation.\nNext: `python pretrain.py` trains a small GPT here, in about two minutes.")


def main(argv=None):
    """The walk without --checkpoint or --prompt, else write."""
    parser = ArgumentParser(description="A walk through the model; or text from a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="the language model that writes; with "
                        "--prompt alone: checkpoints/pretrained.pt")
    parser.add_argument("--prompt", help="text to continue; without it, a new document begins")
    parser.add_argument("--max-new-tokens", type=positive_int, default=200, help="when to stop")
    parser.add_argument("--temperature", type=non_negative_float, default=0.8,
                        help="0 always takes the likeliest token, 1 samples as trained")
    parser.add_argument("--top-k", type=positive_int, help="choose among the k likeliest tokens")
    parser.add_argument("--top-p", type=positive_float, help="choose among the likeliest tokens "
                        "that together reach this probability")
    parser.add_argument("--compile", action="store_true", help="let torch.compile rewrite the "
                        "model first")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.top_p and args.top_p > 1:
        parser.error("argument --top-p: it is a probability, at most 1")
    if args.checkpoint is None and args.prompt is None:
        return walk()
    device = pick_device(args.device)
    path = args.checkpoint or Path("checkpoints") / "pretrained.pt"
    model, tokenizer, _ = load_checkpoint(path, device)
    model.to(pick_dtype(args.dtype, device))
    idx = text_to_token_ids(args.prompt or "<|endoftext|>", tokenizer).to(device)
    if args.compile:
        start = time.monotonic()
        compile_generation(model)
        for _ in zip(range(4), generate_stream(model, idx, args.max_new_tokens,
                                               model.cfg["context_length"])):
            pass  # the second is the first single one; at the third, positions begin to vary
        print(f"torch.compile took {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(args.prompt or "", end="", flush=True)
    tokens = (int(row[0]) for row in generate_stream(
        model, idx, args.max_new_tokens, model.cfg["context_length"], args.temperature,
        args.top_k, tokenizer.eot_token, args.top_p, seed=args.seed))
    for piece in decode_stream((t for t in tokens if t != tokenizer.eot_token), tokenizer):
        print(printable(piece), end="", flush=True)
    print()


if __name__ == "__main__":
    run_main(main)
