"""The model: a GPT from one attention head up, generation, LoRA; then what the scripts share.

    python gpt.py                                            a walk through the model, step by step
    python gpt.py --prompt "The import statement"            text from checkpoints/pretrained.pt
    python gpt.py --prompt "The import statement" --explain  what the model sees and expects

The one file that the stages share: `from gpt import GPTModel, GPT_CONFIG_124M`. It follows the book
*Build a Large Language Model (From Scratch)* by Sebastian Raschka, chapters 3 to 5 and appendix E.
The lesson comes first; a line says where it ends. Shapes: B batch (rows), T tokens in a row,
C embedding width, H heads, D = C / H head width, V vocabulary size.
"""

import contextlib
import functools
import math
import os
import signal

# Two settings before torch is loaded; the lesson begins at GPT_CONFIG_124M.
#
# A thread of torch that waits for another keeps its core busy for 3,000 rounds, then sleeps. With
# more rounds, any other program on the machine would slow training almost to a halt.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
on_ctrl_c = signal.getsignal(signal.SIGINT)
with contextlib.suppress(ValueError):  # Ctrl-C while torch loads: no traceback
    if on_ctrl_c is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn as nn
import torch.nn.functional as F

with contextlib.suppress(ValueError, TypeError):  # in a thread; in a program with Python inside
    signal.signal(signal.SIGINT, on_ctrl_c)

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
# decoder alone: it continues a text, and can do every task that can be written as a text to
# continue.

# ---------------------------------------------------------------------------------------------
# Embeddings. A text is cut into tokens (pieces of words), each with a number, its ID. A model
# computes with vectors, so each ID picks one: that row of a table. With vectors of two numbers,
#
#     table = [[0.3, 1.2],     the token IDs  2 0 2  become  [[0.4, 0.7],
#              [0.9, 0.1],                                    [0.3, 1.2],
#              [0.4, 0.7]]                                    [0.4, 0.7]]
#
# The numbers begin at random and are learned like all others; tokens that are used alike end up
# with similar rows. A second table has a row per position, which is added to the token's. Without
# it, attention (explained next) that sees the words before and after could not tell "dog bites
# man" from "man bites dog". Book sections 2.7 and 2.8.

# ---------------------------------------------------------------------------------------------
# Softmax turns any numbers, here called scores, into shares: positive, with the sum 1. It takes the
# exponential of each and divides by their sum. The largest score gets the largest share.
#
#     scores 2, 1, 0  ->  exp: 7.39, 2.72, 1.00, the sum is 11.11  ->  shares 0.67, 0.24, 0.09
#
# Attention, from its idea to many heads. Each step adds one thing; the model uses the last one,
# MultiHeadAttention.

def attention_without_weights(x):
    """The idea: each token becomes a mean of all, the similar ones weighing most. (T, C) -> (T, C).

    The score of two tokens is their dot product, which is large when they point the same way:
    [1, 0] . [1, 1] = 1 * 1 + 0 * 1 = 1. Nothing is learned yet, so a token always attends to what
    resembles it. A verb could not look for its subject. Book section 3.3.

    Example:
        attention_without_weights(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))[0]
        # scores 1, 0, 1 -> weights 0.42, 0.16, 0.42
        # 0.42 * [1, 0] + 0.16 * [0, 1] + 0.42 * [1, 1] = [0.84, 0.58]
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
    before the softmax is the same in one step, as exp(-infinity) is 0.

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

    The heads' matrices stand side by side in one wide matrix. One product computes them all, and
    `split_heads` cuts the result into H pieces. `d_out` is now the width of all heads together.

    `F.scaled_dot_product_attention` is the arithmetic of `CausalAttention`, without storing the
    (T, T) weights (Dao et al. 2022, FlashAttention). `is_causal=True` replaces the stored mask, so
    `context_length` is not used; it stays so that code from the book runs. Raises ValueError when
    d_out cannot be shared out evenly among the heads.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out {d_out} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)  # lets the heads' results mix
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, t):
        """(B, T, C) -> (B, T, H, D) -> (B, H, T, D)

        A product of two tensors multiplies their last two dimensions and keeps those before. With
        H before T, queries times keys is a (T, T) table for each head.
        """
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, remember=None):
        queries = self.split_heads(self.W_query(x))
        keys = self.split_heads(self.W_key(x))
        values = self.split_heads(self.W_value(x))

        # Skip this at first. In generation `remember` (`KVCache.extend`, below) keeps these keys
        # and values, and returns those of all tokens so far, with a mask: who may see whom.
        mask = None
        if remember is not None:
            keys, values, mask = remember(keys, values)

        context_vec = F.scaled_dot_product_attention(            # (B, H, T, D)
            queries, keys, values, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout.p if self.training else 0.0)

        # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return self.out_proj(context_vec.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------
# The model: normalise, attend, normalise, feed forward; a dozen times. Book chapter 4.

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

    Two linear layers in a row can do no more than one: something that is not linear has to stand
    between them. The older ReLU cuts off at 0, and what it cuts gets no gradient; GELU is a smooth
    curve there. Section 4.3.

        x       -2       -0.5     0      0.5     2
        ReLU     0        0       0      0.5     2
        GELU    -0.045   -0.154   0      0.346   1.955
    """

    def forward(self, x):
        # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the approximation that GPT-2 uses
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers for each token by itself: C -> 4 C -> C numbers. Section 4.3.

    Attention moves information between tokens; here each token works on what it has gathered.
    (B, T, C) -> (B, T, C).
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))

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

    def forward(self, x, remember=None):
        x = x + self.drop_resid(self.att(self.norm1(x), remember))
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
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Make out_head use tok_emb's matrix, if the configuration says so (Press & Wolf 2017)."""
        if self.cfg.get("tie_embeddings"):
            self.out_head.weight = self.tok_emb.weight

    def hidden_states(self, in_idx, cache=None):
        """Token IDs (B, T) -> (B, T, C), all of the model but out_head. `cache` is a KVCache."""
        T, context = in_idx.shape[1], self.cfg["context_length"]
        total = T + (cache.length if cache else 0)
        if total > context:
            raise ValueError(f"{total} tokens do not fit the model's context of {context}")

        # Skip `cache` at first: only generation has one (`KVCache`, below). Each block then gets a
        # function, the `remember` of its attention, that keeps its keys and values.
        positions = cache.begin(T) if cache else torch.arange(T, device=in_idx.device)

        # What the token is, plus where it stands.
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))       # (B, T, C)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, functools.partial(cache.extend, layer) if cache else None)
        return self.final_norm(x)

    def forward(self, in_idx):
        return self.out_head(self.hidden_states(in_idx))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch's, but passes over `att.mask`, which weights saved by the book's code have."""
        state_dict = {name: t for name, t in state_dict.items() if not name.endswith("att.mask")}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)

        # assign=True puts the given tensors in the place of ours, so a tied model then has two.
        self.tie_weights()
        return result


def walk():
    """Print GPT-2's parameters, part by part, and the shapes of a sentence on its way through."""
    with shapes_only():  # a model without numbers in it is enough, and takes no memory
        model = GPTModel({**GPT_CONFIG_124M, "tie_embeddings": True, "qkv_bias": True})
    block, total = model.trf_blocks[0], sum(p.numel() for p in model.parameters())
    print("A GPT reads tokens (pieces of words) and scores every token that could come\nnext.\n\n"
          "The parameters of GPT-2, the smallest of its four sizes, by part")
    for part, modules in [
            ("tok_emb: one vector per token", [model.tok_emb]),
            ("pos_emb: one vector per position", [model.pos_emb]),
            ("attention, in 12 blocks", [block.att for block in model.trf_blocks]),
            ("feed-forward, in 12 blocks", [block.ff for block in model.trf_blocks]),
            ("layer norms", [m for m in model.modules() if isinstance(m, LayerNorm)]),
            ("together; out_head is tok_emb's matrix", [model])]:
        number = sum(p.numel() for module in modules for p in module.parameters())
        print(f"  {part:40s} {number:>12,} {100 * number / total:5.1f} %")
    print(f"  memory: {total * 4 / 1e6:.0f} MB to use it in float32, and at least\n"
          f"  {total * 16 / 1e6:.0f} MB to train it (weights, gradients, AdamW's two averages)\n\n"
          "'Every effort moves you' on its way through: what each part gives")

    # Each of these modules prints the shape of what it gives, in the order in which they run.
    for module, note in [
            (model.tok_emb, "tok_emb: a vector per token, (B, T, C)"),
            (model.pos_emb, "pos_emb: a vector per position, added to it"),
            (block.norm1, "norm1: mean 0, variance 1 in each token"),
            (block.att.W_query, "att.W_query: 12 heads, each with 64 numbers"),
            (block.att.W_key, "att.W_key: each query meets each earlier key"),
            (block.att.W_value, "att.W_value: what a token gives if it is found"),
            (block.att.out_proj, "att.out_proj: what was found, added to the token"),
            (block.ff.layers[0], "ff.layers[0]: four times as wide, then GELU"),
            (block.ff.layers[2], "ff.layers[2]: and back, added to the token"),
            (block, "the whole block; 11 more like it follow"),
            (model.out_head, "out_head: logits, a score per next token, (B, T, V)")]:
        module.register_forward_hook(
            lambda _, __, out, note=note: print(f"  {str(tuple(out.shape)):14s} {note}"))
    model(torch.tensor([[6109, 3626, 6100, 345]], device="meta"))  # meta: shapes, no numbers
    print("\nThe last row of logits chooses the fifth token; append it and repeat: that is\n"
          "generation.\n\nNext: `python pretrain.py` trains a small GPT here, in about a minute.")


# ---------------------------------------------------------------------------------------------
# Generation: predict, choose, append, repeat.

def text_to_token_ids(text, tokenizer):
    """Text -> (1, T) token IDs; `<|endoftext|>` is the token between documents. Section 5.1."""
    return torch.tensor([tokenizer.encode(text, allowed_special={"<|endoftext|>"})])


def token_ids_to_text(token_ids, tokenizer):
    """(1, T) or (T,) token IDs -> text. Section 5.1."""
    # A model may have more IDs than its tokenizer has tokens; those IDs are left out.
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

    A temperature below 1 makes likely tokens even likelier, above 1 gives the unlikely ones more
    chance. `top_k` keeps the k likeliest tokens; `top_p` keeps the likeliest that together reach p
    (Holtzman et al. 2020).
    """
    logits = logits.float() / max(temperature, 1e-6)  # a tiny one must not make infinities
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probs = torch.softmax(logits, dim=-1)

    # Sort, the likeliest first. A token stays if those before it have not reached p, so the first
    # always stays. `scatter` puts each probability back in its token's place.
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


# The simple loop reads every token again and again. A token sees only what stands before it, so its
# key and value never change: it is enough to compute them once and to keep them. For a new token
# only its own query, key and value are computed; those of the earlier tokens come from the cache.
#
# Prompts of different lengths are padded at the left, so that every row's newest token stands last:
#
#     row                  padding  positions
#     [a, b, c, d, e]      0        [0, 1, 2, 3, 4]
#     [-, -, x, y, z]      2        [-2, -1, 0, 1, 2]: a row's first token has the position 0

class KVCache:
    """The keys and values of the tokens read so far: (B, H, max_length, D) for each block.

    `padding` (B,) counts the tokens at the left of each row that are not text. `length` counts the
    tokens read so far, with padding.
    """

    def __init__(self, model, batch_size, max_length, padding):
        C, H, weight = model.cfg["emb_dim"], model.cfg["n_heads"], model.tok_emb.weight
        shape = (len(model.trf_blocks), batch_size, H, max_length, C // H)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.padding, self.length = padding, 0

    def begin(self, T):
        """T tokens per row are about to be read -> their positions (B, T)."""
        self.first, self.length = self.length, self.length + T
        positions = torch.arange(self.length, device=self.padding.device) - self.padding[:, None]
        query_pos = positions[:, None, self.first:, None]         # (B, 1, T, 1)
        key_pos = positions[:, None, None, :]                     # (B, 1, 1, length)

        # subtle: a new query at position 7 must see the keys 0 to 7. `is_causal` would treat it as
        # position 0 and show it one key. Text does not see padding. Padding sees padding, because
        # the softmax of a query that sees no key is NaN.
        self.mask = (key_pos <= query_pos) & ((key_pos < 0) == (query_pos < 0))
        return positions[:, self.first:].clamp(min=0)  # the table has no negative rows

    def extend(self, layer, keys, values):
        """Store new keys and values (B, H, T, D) -> those of all tokens so far, and the mask."""
        self.keys[layer, :, :, self.first:self.length] = keys
        self.values[layer, :, :, self.first:self.length] = values
        return (self.keys[layer, :, :, :self.length], self.values[layer, :, :, :self.length],
                self.mask)


@torch.no_grad()
def generate_stream(model, idx, max_new_tokens, context_size=None, temperature=0.0, top_k=None,
                    eos_id=None, top_p=None, padding=None, seed=None):
    """Yield each row's next token, (B,), step by step. The arguments are those of `generate`."""
    # Tensors: idx (B, T), and padding (B,), zeros if there is none.
    idx, padding, context_size = check_prompt(model, idx, padding, context_size, temperature,
                                              top_k, top_p)
    B, T = idx.shape
    rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    finished = torch.zeros(B, dtype=torch.bool, device=idx.device)
    cache = None
    was_training = model.training
    model.eval()  # without dropout
    speed_up_single_rows(model)  # the same results; only some processors gain by it
    try:
        for length in range(T, T + max_new_tokens):
            # Read the prompts, later only the newest token. When the text is longer than the
            # context, the window slides, and all positions change: read the whole window anew.
            idx_new = idx[:, -1:]
            if cache is None or length > context_size:
                first = max(0, length - context_size)  # where the window begins
                cache = KVCache(model, B, min(context_size, T + max_new_tokens),
                                (padding - first).clamp(min=0))  # the padding still in it
                idx_new = idx[:, first:]

            # Predict.
            hidden = model.hidden_states(idx_new, cache)[:, -1]   # (B, C), of the last position
            logits = model.out_head(hidden)                       # (B, V)

            # Choose. A row that has ended stays at its end.
            idx_next = sample_next(logits, temperature, top_k, top_p, rng)
            if eos_id is not None:
                idx_next = idx_next.masked_fill(finished, eos_id)
                finished |= idx_next == eos_id

            # Append.
            idx = torch.cat((idx, idx_next[:, None]), dim=1)
            yield idx_next
            if finished.all():
                break
    finally:
        model.train(was_training)


def generate(model, idx, max_new_tokens, context_size=None, temperature=0.0, top_k=None,
             eos_id=None, top_p=None, padding=None, seed=None):
    """Continue each row of token IDs: (B, T) -> (B, T + n), n <= max_new_tokens. Section 5.3.

    Temperature 0 gives the tokens of `generate_text_simple`; `next_token_probs` explains the other
    choices, and a `seed` makes them repeatable. `context_size` is the model's own unless given.
    A row that produced `eos_id` (the end of text) is filled with it; when all have, generation
    ends. `idx` may be a list, of one row or of rows. Shorter prompts are padded at the left, with
    any token; `padding` (B,), a list or a tensor, counts these tokens in each row. Raises
    ValueError for an empty prompt or an option out of range.
    """
    new = generate_stream(model, idx, max_new_tokens, context_size, temperature, top_k, eos_id,
                          top_p, padding, seed)
    return torch.column_stack([as_rows(idx, model), *new])  # each of `new` is a column


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


# ---------------------------------------------------------------------------------------------
# LoRA (low-rank adaptation): leave a trained matrix as it is and learn a small correction. Hu et
# al. 2021; appendix E. A matrix of 768 x 768 has 589,824 numbers. A correction of rank 16, the
# product of a 768 x 16 and a 16 x 768 matrix, has 24,576. Gradients, and what the optimizer
# remembers of them, are kept for these alone.

class LoRALayer(nn.Module):
    """x (..., in_dim) -> x A B * alpha / rank (..., out_dim).

    The matrix B (not the batch) starts at zero, so at first nothing changes. A starts at random, as
    in nn.Linear: if both were zero, neither would get a gradient. alpha sets the size of the
    correction. Dividing by the rank keeps it about the same when the rank is changed.
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
    """Wrap every linear layer inside `model`, in place. Freeze the parameters before:
    `model.requires_grad_(False)`.

    Two kinds are left alone: layers that are wrapped already, and a tied head. Its matrix is also
    the embedding's: `merge_lora`, below, would change both.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for parent in list(model.modules()):
        if isinstance(parent, LinearWithLoRA):
            continue
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


# The same by hand, in Python:
#
#     import torch
#     from gpt import GPTModel, generate, load_tokenizer, text_to_token_ids, token_ids_to_text
#     tokenizer = load_tokenizer("bytes")                # a token is a byte
#     model = GPTModel({"vocab_size": tokenizer.n_vocab, "context_length": 64, "emb_dim": 48,
#                       "n_heads": 3, "n_layers": 2, "drop_rate": 0.0, "qkv_bias": False})
#     idx = text_to_token_ids("Every effort", tokenizer)
#     print(model(idx).shape)                            # (1, 12, 257): B, T, V
#     print(token_ids_to_text(generate(model, idx, 20), tokenizer))    # noise: nothing is learned
#
# Try it:
# 1. Swap two words of a prompt and see which next tokens change:
#        python gpt.py --explain --prompt "dog bites man"
# 2. Delete `+ self.pos_emb(positions)` above, and train anew: how much worse is the loss? Why is it
#    not as bad as one would think? (Think of the causal mask.)  python pretrain.py
# 3. Make the text wilder or tamer:  python gpt.py --prompt "The" --temperature 1.5

# =============================================================================================
# The lesson ends here. What follows makes it practical: processors and number types, tokenizers,
# checkpoints, downloads, texts, options and errors, the record of a training run, the command.
# =============================================================================================

import argparse
import base64
import codecs
import copy
import csv
import ctypes
import glob
import hashlib
import json
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import torch.distributed as dist


class UserError(Exception):
    """Something the user can mend: one sentence with what is wrong and what to type next."""


# ---------------------------------------------------------------------------------------------
# The same, faster; devices and number types; what generation is given.

class SingleRowLinear(nn.Linear):
    """`nn.Linear`, about twice as fast for a single row, as in generation, on an AMD processor.

    For one float32 row torch's library (MKL) uses one core of it: here each core gets a block of
    the matrix. For one bfloat16 row torch asks oneDNN, which is made for many rows.
    """

    def forward(self, x):
        if x.numel() != self.in_features or x.device.type != "cpu":
            return super().forward(x)
        if x.dtype == torch.bfloat16:
            torch.backends.mkldnn.enabled = False  # oneDNN
            y = super().forward(x)
            torch.backends.mkldnn.enabled = True
            return y

        # subtle: .t() only changes how x is looked at; made .contiguous(), bmm would be slow.
        blocks = min(torch.get_num_threads(), self.out_features)
        rows = self.out_features // blocks * blocks
        weight = self.weight[:rows].view(blocks, -1, self.in_features)
        y = torch.bmm(weight, x.reshape(1, -1).t().expand(blocks, -1, 1)).view(rows)
        y = torch.cat([y, self.weight[rows:] @ x.flatten()])  # rows that cannot be shared out
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def speed_up_single_rows(model):
    """On an AMD processor, turn linear layers into `SingleRowLinear`; others would lose by it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = SingleRowLinear


def keep_freed_memory(largest):
    """Keep freed memory, in blocks of up to `largest` bytes: 124M trains 1.3 times as fast."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc (Linux) can do it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, largest) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older ones take 32 MB
        mallopt(-1, 1 << 30)                          # M_TRIM_THRESHOLD: up to a gigabyte in all


def pick_device(name="auto"):
    """`auto` (cuda if there, else cpu), `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # whatever torch makes of a name
        raise UserError(f"there is no device {name!r} here; use --device cpu, or auto") from None
    return torch.device(name)


def pick_dtype(name="auto", device="cpu"):
    """The type of matrix products; `auto`: bfloat16 where the processor has instructions for it."""
    if name != "auto":
        return getattr(torch, name)
    find = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.6 cannot tell: float32
    has = find() if torch.device(device).type == "cpu" else {}
    fast = has.get("avx512_bf16") or has.get("amx_bf16")
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere and later
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


def as_rows(idx, model):
    """Token IDs, (T,) or (B, T) -> a tensor (B, T) on the model's device. Raises ValueError."""
    idx = torch.as_tensor(idx, device=model.tok_emb.weight.device)
    if idx.is_floating_point() or idx.ndim not in (1, 2) or idx.numel() == 0:
        raise ValueError("the prompt must be whole numbers, (T,) or (B, T), at least one in a row, "
                         f"such as <|endoftext|>, not {idx.dtype} {tuple(idx.shape)}")
    return idx.long().view(-1, idx.shape[-1])


def check_prompt(model, idx, padding, context_size, temperature, top_k, top_p):
    """-> (idx (B, T), padding (B,), context size), as generation needs them. ValueError."""
    idx = as_rows(idx, model)
    context = model.cfg["context_length"]
    context_size = context if context_size is None else min(context_size, context)
    fits = [context_size >= 1, top_k is None or top_k >= 1, temperature >= 0,
            top_p is None or 0 < top_p <= 1]
    if not all(fits):
        raise ValueError("context_size and top_k must be 1 or more, temperature 0 or more, top_p "
                         "above 0 and at most 1")
    padding = torch.zeros_like(idx[:, 0]) if padding is None else torch.as_tensor(padding)
    if padding.shape != idx.shape[:1] or padding.min() < 0 or padding.max() >= idx.shape[1]:
        raise ValueError("padding must have a number per row, from 0 to T - 1")
    return idx, padding.to(idx.device), context_size


# ---------------------------------------------------------------------------------------------
# Tokenizers. Whichever it is, tiktoken's encoder runs it. A vocabulary is a table from byte strings
# to ranks; a rank is both the token's ID and its priority, as the merge that gives the lowest rank
# comes first (tokenizer.py shows how). `<|endoftext|>`, which stands between documents, comes last.
#
# One rule for this mark in a text: in a text to learn or to continue (corpora, --prompt) it is the
# token that divides documents; in records, questions and texts to classify it is plain text.

END_OF_TEXT = "<|endoftext|>"
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
    """`vocab.bpe` (downloaded if not there) -> GPT-2's tokens, {bytes: rank}. Raises UserError."""
    path = Path(path or download(VOCAB_BPE_URLS, VOCAB_BPE, VOCAB_BPE_SHA256))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != VOCAB_BPE_SHA256:
        raise UserError(f"{path} is not GPT-2's vocab.bpe; delete it, and it is fetched anew")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_OF_LETTER.values())}
    # Behind a line with the version, each line is a merge: two tokens that become the next one.
    for line in content.decode("utf-8").strip().split("\n")[1:]:
        ranks[bytes(BYTE_OF_LETTER[letter] for letter in line.replace(" ", ""))] = len(ranks)
    return ranks


def ranks_to_text(ranks):
    """{bytes: rank} -> lines `base64-token rank`, tiktoken's format, for files and checkpoints."""
    return "".join(f"{base64.b64encode(token).decode('ascii')} {rank}\n"
                   for token, rank in sorted(ranks.items(), key=lambda item: item[1]))


def ranks_from_text(text):
    """The way back -> {bytes: rank}. ValueError unless ranks count up from 0 and bytes have one."""
    pairs = [line.split() for line in text.splitlines()]
    table = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if list(table.values()) != list(range(len(pairs))):
        raise ValueError("its ranks do not count up from 0, or a token is there twice")
    if not all(bytes([byte]) in table for byte in range(256)):
        raise ValueError("a single byte has no rank")
    return table


def read_rank_file(path):
    """A file of ranks -> {bytes: rank}. Raises UserError."""
    try:
        return ranks_from_text(Path(path).read_text(encoding="ascii"))
    except Exception as e:  # not there, not ASCII, not base64, not in order
        raise UserError(f"{path} is not a rank file ({e!s:.150}); use gpt2, bytes, or a file made "
                        "by: python tokenizer.py train TEXT") from None


def make_tokenizer(name, ranks, pat_str=GPT2_SPLIT_PATTERN):
    """{bytes: rank} -> tiktoken.Encoding, with `<|endoftext|>` (its `eot_token`) after the last.

    Raises ValueError for a split pattern that loses text or finds nothing: tiktoken would crash.
    """
    import regex
    import tiktoken
    sample = "Hi, it's 42 \n\n d'ét\u00e9 \u6f22\u5b57!"
    chunks = [found[0] for found in regex.finditer(pat_str, sample)]
    if "" in chunks or "".join(chunks) != sample:
        raise ValueError("its split pattern loses text")
    return tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


@functools.cache
def named_tokenizer(name):
    """The tokenizer `gpt2` or `bytes`, made once."""
    return make_tokenizer(name, read_gpt2_ranks() if name == "gpt2" else
                          {bytes([byte]): byte for byte in range(256)})


def load_tokenizer(spec):
    """`gpt2`, `bytes`, or the path of a rank file -> tiktoken.Encoding. Raises UserError."""
    if spec in ("gpt2", "bytes"):
        return named_tokenizer(spec)
    return make_tokenizer("bpe", read_rank_file(spec))


def tokenizer_to_spec(tokenizer):
    """What a checkpoint holds of a tokenizer: a name, or ranks and pattern. Raises ValueError.

    Elsewhere tiktoken's `encode`, `decode`, `decode_bytes`, `n_vocab` and `eot_token` are enough.
    """
    try:
        if tokenizer.name in ("gpt2", "bytes"):
            return tokenizer.name
        ranks = tokenizer._mergeable_ranks
        if (tokenizer.eot_token, tokenizer.n_vocab) != (len(ranks), len(ranks) + 1):
            raise ValueError(f"a checkpoint holds one special token, {END_OF_TEXT}, as the last ID")
        return {"pat_str": tokenizer._pat_str, "ranks": ranks_to_text(ranks)}
    except AttributeError as e:
        raise ValueError("a checkpoint holds tokenizers of tiktoken or tokenizer.py; for others use"
                         f" torch.save(model.state_dict(), path) ({e})") from None


# ---------------------------------------------------------------------------------------------
# The checkpoint: the only thing that passes from one stage to the next.

@contextlib.contextmanager
def write_atomically(path):
    """Yield a temporary path, which becomes `path` only if the block succeeds. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # by a killed process
            if time.time() - left.stat().st_mtime > 60:
                left.unlink()

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

    `extras` (plain data) ride along; `class_names` marks a classifier. Raises ValueError for what
    could not be loaded again.
    """
    kind = "language model"
    if "class_names" in extras:
        kind, extras["class_names"] = "classifier", [str(name) for name in extras["class_names"]]
    if any(isinstance(module, LinearWithLoRA) for module in model.modules()):
        model = merge_lora(copy.deepcopy(model))
    saved = {**extras, "kind": kind, "config": model.cfg, "model": model.state_dict(),
             "tokenizer": tokenizer_to_spec(tokenizer)}
    with write_atomically(path) as part:
        torch.save(saved, part)
        try:
            read_checkpoint(part, kind)
        except Exception as e:
            raise ValueError(f"this checkpoint could not be loaded again: {e!s:.300}") from None


def read_checkpoint(path, kind):
    """-> (model, tokenizer, all else in a dictionary). Raises whatever is wrong with the file."""
    # mmap: numbers stay in the file until used. Windows cannot replace a file that is mapped.
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    cfg, weights = saved["config"], saved.pop("model")
    if saved["kind"] != kind:
        raise ValueError(f"it holds a {saved['kind']}, but a {kind} is needed")
    if len({name.split(".")[1] for name in weights if "trf_blocks" in name}) != cfg["n_layers"]:
        raise ValueError("its weights are of another number of blocks")
    for name, t in weights.items():
        if t.dtype != torch.float32 or not t.is_contiguous() or not t.sum().isfinite():
            raise ValueError(f"{name} has numbers that are not finite, or not float32")

    # The tokenizer.
    spec = saved.pop("tokenizer")
    tokenizer = named_tokenizer(spec) if spec in ("gpt2", "bytes") else make_tokenizer(
        "bpe", ranks_from_text(spec["ranks"]), spec["pat_str"])
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise ValueError("its tokenizer has more tokens than its model")

    with shapes_only():
        model = GPTModel(cfg)
        if kind == "classifier":
            model.out_head = nn.Linear(cfg["emb_dim"], len(saved["class_names"]))
    model.load_state_dict(weights, assign=True)
    return model, tokenizer, saved


def load_checkpoint(path, device="cpu", kind="language model", maker=None):
    """Read a checkpoint -> (model in evaluation mode, tokenizer, all else in a dictionary).

    A file is checked whole before anything of it is used. Raises UserError when it is not there,
    cut short, or not of this `kind`, with the script that makes one, `maker`.
    """
    maker = maker or ("pretrain.py" if kind == "language model" else "finetune_classifier.py")
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}; make one with: python {maker}")
    try:
        model, tokenizer, extras = read_checkpoint(path, kind)
    except UserError:  # vocab.bpe could not be downloaded
        raise
    except Exception as e:  # whatever a foreign or cut file causes
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:150]
        raise UserError(f"{path} is not the checkpoint that is needed, or is cut short ({reason}); "
                        f"make one with: python {maker}") from None
    return model.to(device).eval(), tokenizer, extras


# ---------------------------------------------------------------------------------------------
# Downloads.

VERDICT = Path("data") / "the-verdict.txt"  # the book's training text, by Edith Wharton (1908)
VERDICT_URLS = ["https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/"
                "01_main-chapter-code/the-verdict.txt"]
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
STORIES = Path("data") / "TinyStories-valid.txt"  # Eldan & Li 2023, CDLA-Sharing-1.0
STORIES_URLS = ["https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/" + name
                for name in ("TinyStoriesV2-GPT4-valid.txt", "TinyStories-valid.txt")]


def find_stories():
    """Short stories in simple words -> their file: one in data/ that is named so, or fetched."""
    found = sorted(STORIES.parent.glob("[Tt]iny[Ss]tories*.txt"))
    return found[0] if found else download(STORIES_URLS, STORIES)


def download(urls, path, sha256=None, timeout=30):
    """Make sure that the file `path` is there; return it as a Path.

    Unless it is, each address is tried, up to three times, into PATH.part, with which a later try
    goes on. SHA-256 (given, or announced by Hugging Face's hub) is checked before the file gets its
    name. `timeout`: seconds without a byte. Raises UserError with each address and its reason.
    """
    path, part, reasons = Path(path), Path(f"{path}.part"), {}
    if path.exists():
        return path
    for url in urls:
        for attempt in range(3):
            begun = part.exists()
            try:
                fetch(url, part, sha256, timeout)
                return part.replace(path)
            except Exception as e:  # of the connection, or whatever a broken answer causes
                reasons[url] = " ".join(str(e).split()).rpartition(": ")[2].rstrip("\"')>")[:200]
            if not begun and not part.exists():
                break  # nothing came; asking again helps only where something did
        if sha256 is None:  # without it, nobody could tell that two servers' bytes were mixed
            part.unlink(missing_ok=True)
    reasons = "".join(f"\n  {url}: {reason}" for url, reason in reasons.items())
    raise UserError(f"{path.name} could not be downloaded; put it at {path} by hand, or try again "
                    f"when there is a network:{reasons}")


def fetch(url, part, sha256, timeout):
    """One attempt of `download`. Raises an exception; what turns out to be wrong is deleted."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity",  # so that lengths count the file's own bytes
               "Range": f"bytes={have}-" if have else None}
    with requests.get(url, headers=headers, stream=True, timeout=(10, timeout)) as response:
        if response.status_code == 416:  # there is no such rest
            part.unlink()
        if not response.ok:
            raise ValueError(f"{response.status_code} {response.reason}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError("a web page came instead of the file")
        for answer in [*response.history, response]:  # the hub announces it before it redirects
            announced = answer.headers.get("X-Linked-Etag", "").strip('"')
            sha256 = sha256 or (announced if len(announced) == 64 else None)

        # The rest of the file, or all of it; in small reads, as a broken one gives nothing.
        have = have if response.status_code == 206 else 0
        total = have + int(response.headers.get("Content-Length", 0))
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file:
            try:
                for block in response.iter_content(1 << 14):
                    have += file.write(block)
                    progress(f"downloading {part.stem}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB")
            except requests.exceptions.ChunkedEncodingError:
                raise ValueError(f"{have} of {total} bytes came") from None

    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, digest) or not have:
        part.unlink()
        raise ValueError(f"wrong content, {have} bytes with the SHA-256 {digest}")


# ---------------------------------------------------------------------------------------------
# Texts that the user brings.

def read_blocks(path, size=None):
    """Yield a UTF-8 file in blocks of `size` characters, or line by line. UserError, OSError."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file that can be read twice; save its text to one first")

    empty = True
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: drops a byte order mark
            for block in iter(lambda: file.read(size), "") if size else file:
                if "\0" in block:
                    raise UserError(f"{path} is not a text file; give plain UTF-8 text")
                empty = empty and block.isspace()
                yield block
    except UnicodeDecodeError as e:
        # Say which kind of file it is, as far as its bytes tell.
        why = "is not UTF-8 text; find out its encoding and convert it: iconv -f ENCODING -t utf-8"
        if e.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            why = "is UTF-16, not UTF-8; convert it with: iconv -f utf-16 -t utf-8"
        elif e.reason == "unexpected end of data":
            why = "is cut within its last character; fetch it anew, or repair it: iconv -c -t utf-8"
        raise UserError(f"{path} {why} {path}") from None
    if empty:
        raise UserError(f"{path} is empty; give a file with text in it")


def read_text(path):
    """The whole of a UTF-8 file. Raises UserError, OSError."""
    return "".join(read_blocks(path, 1 << 20))


def read_pieces(path, size=1 << 18):
    """Yield a text to learn from as pieces of about `size` characters: its length does not matter.

    `<|endoftext|>` divides documents; white space around it is dropped. A piece ends before white
    space, where GPT-2's pattern always splits, so it has the tokens of the whole text. A .jsonl
    file has a document in each line, under "text". Raises UserError, OSError.
    """
    ending = Path(path).suffix.lower()
    if ending in (".json", ".csv", ".tsv"):
        raise UserError(f"{path} is a table or JSON, and would be learned with its markup; give "
                        'plain text, or a .jsonl file with a {"text": ...} in each line')
    rest = ""
    marks = re.compile(rf"(?<!\s)\s*(?:{re.escape(END_OF_TEXT)}\s*)+")  # with the space around them
    for number, block in enumerate(read_blocks(path, None if ending == ".jsonl" else size), 1):
        if ending == ".jsonl":
            try:
                block = json.loads(block)["text"] + END_OF_TEXT if block.strip() else ""
                block = block.encode("utf-8", "replace").decode()  # half a character becomes ?
            except Exception as e:  # whatever is no object with a text
                raise UserError(f'{path}, line {number}: expected {{"text": "..."}} '
                                f"({type(e).__name__}: {e!s:.100})") from None
        rest = marks.sub(END_OF_TEXT, rest + block)

        # The last white space behind a word, and what follows, wait for the next block; without
        # any, all is given but what may be the beginning of a mark.
        found = re.match(r".*\S(?=\s)", rest, re.DOTALL)
        mark = rest.rfind("<", -len(END_OF_TEXT))
        cut = found.end() if found else len(rest[:mark if mark >= 0 else None].rstrip())
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def find_files(paths):
    """Files, and folders with all that is in them -> a list of files. UserError, OSError."""
    def fail(error):
        raise error

    files = []
    for path in map(Path, paths):
        inside, seen = [], set()
        if not path.is_dir():
            files.append(path)
            continue
        for folder, subfolders, names in os.walk(path, onerror=fail, followlinks=True):
            known = os.path.realpath(folder) in seen  # a link has led back to it
            seen.add(os.path.realpath(folder))
            subfolders[:] = sorted(n for n in subfolders if not known and not n.startswith("."))
            inside += [Path(folder, n) for n in names if not known and not n.startswith(".")]
        inside = sorted(file for file in inside if file.is_file() and file.stat().st_size)
        if not inside:
            raise UserError(f"the folder {path} has no file with text in it")
        files += inside
    return files


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
        self.exit(2, wrap(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def argument(kind, what, fits):
    """An argparse type: `kind` (int, float, str or Path) of the text, if it `fits`."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if text.strip() and fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return convert


positive_int = argument(int, "a whole number above 0", lambda n: 0 < n < 10**12)
positive_float = argument(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative_float = argument(float, "a number of 0 or more", lambda x: 0 <= x < math.inf)
probability = argument(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
seed_number = argument(int, "a whole number of at most 9 digits", lambda n: 0 <= n < 10**9)
name = argument(str, "a name", lambda text: True)
path = argument(Path, "the name of a file or folder", lambda path: True)
checkpoint_file = argument(Path, "a name that ends in .pt but not in -resume.pt", lambda path: (
    path.suffix == ".pt" and not path.stem.endswith("-resume")))


def add_common_arguments(parser):
    """The options that mean the same in every script: --seed, --device, --dtype."""
    arg = parser.add_argument
    arg("--seed", type=seed_number, default=123, help="the same seed, the same result")
    arg("--device", type=name, default="auto", help="auto, cpu, cuda, cuda:N or mps")
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
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # None: it was closed
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="replace")  # what is not UTF-8 becomes ?, and it goes on

    status, message = 1, ""
    try:
        main()
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except BrokenPipeError:  # the reader of our output, `head` say, has left
        pass
    except (UserError, OSError) as e:
        message = str(e)
    except (RuntimeError, MemoryError) as e:  # the user can only mend a lack of memory
        if not re.search("out ?of ?memory|MemoryError|(allocate|enough) memory", repr(e), re.I):
            raise
        message = "out of memory; choose a smaller model or a smaller batch"

    progress("")
    if message:  # with a command on a line of its own, to be copied
        message = f"{Path(sys.argv[0]).name}: {message}".replace(": python ", ":\n  python ")
        print(wrap(message), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status:
        sys.exit(status)


def printable(text):
    """Text as a terminal may show it: without what could steer it, such as escapes."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  "\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def wrap(text, first="", then=""):
    """Each line of a text for 80 columns, cut between words; `first` and `then` begin the lines."""
    lines = []
    for line in printable(text).split("\n"):
        begin = then if lines else first
        lines.append(textwrap.fill(line, 79, initial_indent=begin, subsequent_indent=then,
                                   break_long_words=False, break_on_hyphens=False)
                     or begin.rstrip())
    return "\n".join(lines)


def say(label, text):
    """Print a text, which may come from data or a model, in lines behind a label."""
    progress("")
    print(wrap(text, f"{label:9}", " " * 9), flush=True)


def progress(text):
    """Say on standard error how far a job is: on a terminal in one line, which is rewritten and
    which an empty text wipes; elsewhere in a new line every 30 s.
    """
    now = time.monotonic()
    if not sys.stderr.isatty():
        if text and now - progress.last > 30:
            progress.last = now
            print(printable(text)[:79], file=sys.stderr, flush=True)
    elif (text and now - progress.last > 0.1) or (progress.shown and not text):
        progress.last, progress.shown = now, bool(text)
        print(f"\r{printable(text)[:79]}\x1b[K", end="", file=sys.stderr, flush=True)


progress.last, progress.shown = time.monotonic(), False


# ---------------------------------------------------------------------------------------------
# What surrounds a training loop, the same in every stage.

def find_start(init, names, stage):
    """The checkpoint to start from: `init`, or the first of `names` in checkpoints/. UserError."""
    found = [path for path in map(Path("checkpoints").joinpath, names) if path.is_file()]
    if not init and not found:
        raise UserError(f"{stage} There is no language model to start from; make one first with: "
                        "python pretrain.py (a minute), or python load_gpt2.py (a download)")
    return init or found[0]


def scale_lr(lr, model):
    """A learning rate for GPT-2's width, 768 -> for this model's; narrow ones want more."""
    return lr * max(1.0, 768 / model.cfg["emb_dim"]) ** 2


def beside(out, ending):
    """checkpoints/mine.pt and "-resume.pt" -> checkpoints/mine-resume.pt"""
    return out.with_name(out.stem + ending)


def check_output(args, *inputs, endings=("-resume.pt", ".csv", ".png", "-responses.json")):
    """Find out before the work that --out can be written and nothing is lost. UserError, OSError.

    With --resume, if the run is complete, says so and exits.
    """
    out, inputs = args.out, {Path(path).resolve() for path in inputs if path}
    metrics, state = beside(out, ".csv"), beside(out, "-resume.pt")
    for path in [out, *(beside(out, ending) for ending in endings)]:
        # Training reads a folder whole; a conversion (no endings) reads only its known files.
        if path.resolve() in inputs or endings and not inputs.isdisjoint(path.resolve().parents):
            raise UserError(f"{path} is read by this command; choose another --out")
        try:
            if path == out and out.exists():
                torch.load(out, map_location="cpu", weights_only=True, mmap=True)["tokenizer"]
            elif path != state and path.exists():  # was written after the metrics, which begin so:
                metrics.read_bytes().index(b"step,epoch,train_loss", 0, 21)
        except Exception:  # whatever a foreign file causes
            raise UserError(f"{path} is not of this project, or its {metrics.name} is gone; choose "
                            "another --out, or move it away") from None
    if args.resume and out.exists() and not state.exists():
        say("done", f"{out} is complete. To train it further, start a new run from it: "
            f"--init {out} --out NEW.pt")
        sys.exit()
    tempfile.TemporaryFile(dir=next(f for f in out.absolute().parents if f.exists())).close()


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
    """Texts, numbers, lists and models -> a short hash, to know them by when a run is resumed."""
    parts = [[p.detach().flatten()[::1009].tolist() for p in part.parameters()]  # enough of it
             if isinstance(part, nn.Module) else part for part in parts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Run:
    """The record of a training run: its metrics, its best model, the state to go on from.

    A loop asks when to measure (`due`), tells what was measured (`report`) and that a step is done
    (`done`). With the command line's `args` it writes --out, the best model on the validation data;
    OUT-resume.pt, the newest state, where --resume begins; OUT.csv and OUT.png, the metrics.
    `settings` tells apart runs with equal options, by the contents of their files, say. A
    learning rate that falls to its end says how long the run is; if it is `constant`, the run can
    be prolonged. `extras` go into the checkpoint.
    """

    def __init__(self, total_steps, args=None, model=None, optimizers=(), tokenizer=None,
                 settings=None, constant=True, **extras):
        self.total_steps, self.args, self.constant = total_steps, args, constant
        self.model, self.optimizers, self.tokenizer = model, optimizers, tokenizer
        self.extras = extras
        self.step, self.losses, self.rows = 0, [], []  # the state, with weights and averages
        self.device = "cpu" if model is None else model.tok_emb.weight.device
        self.writes = args is not None and process_number()[0] == 0
        if args:
            # A path may change between two starts: what its file holds is in `settings`.
            given = {name: value for name, value in vars(args).items()
                     if not isinstance(value, (Path, list))
                     and name not in ("resume", "device", "epochs", "max_steps")}
            self.settings = {n: str(value) for n, value in {**given, **(settings or {})}.items()}
            self.resume_file = beside(args.out, "-resume.pt")
            dtype = str(pick_dtype(args.dtype, self.device)).removeprefix("torch.")
            say("run", f"{total_steps:,} steps of {args.batch_size} x {args.grad_accum}, learning "
                f"rate {args.lr:g}, {self.device}, {dtype}")
            if args.resume and self.resume_file.exists():
                self.load()

        # What this start has done, in seconds without evaluations.
        self.first_step, self.tokens, self.seconds = self.step, 0, 1e-9
        self.clock = self.saved_at = time.monotonic()
        self.header_shown = False

    def due(self, every):
        """Is it time to measure? Before the first step, after each `every` and after the last."""
        measured = self.rows and self.rows[-1]["step"] == self.step
        return not measured and (self.step % every == 0 or self.step >= self.total_steps)

    def report(self, epoch, sample=None, **values):
        """Add a row of numbers, such as val_loss, to the metrics; print it; write all files.

        Raises UserError when the loss is not finite.
        """
        self.check(values["val_loss"])
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.rows.append({"step": self.step, "epoch": epoch, "train_loss": loss, **values})
        self.losses = []

        # A line of a table, with its header before the first.
        progress("")
        header, line = "", ""
        for name, value in self.rows[-1].items():
            width, digits = max(9, len(name) + 2), 0 if name == "step" else 3
            cell = "-" if value is None else f"{value:,.{digits}f}"
            header += f"{name.replace('_', ' '):>{width}}"
            line += f"{cell:>{width}}"
        print(line if self.header_shown else f"{header}\n{line}", flush=True)
        self.header_shown = True
        if sample:
            say("", "\n".join(textwrap.wrap(" ".join(sample.split())[:140], 70)))

        # The state first: what is not written yet follows from it.
        if self.writes:
            self.save()
            self.write_what_follows()
        self.clock = time.monotonic()

    def write_what_follows(self):
        """Write the model, if it is the best so far, and the metrics. Raises UserError."""
        # The best has the highest accuracy, if there is one, and then the lowest loss.
        best = max(self.rows[1:], default=None,
                   key=lambda row: (row.get("val_accuracy", 0), -row["val_loss"]))
        if best and best["step"] == self.step:
            save_checkpoint(self.args.out, self.model, self.tokenizer, **self.extras)
        elif best and not self.args.out.exists():
            raise UserError(f"the best model so far, {self.args.out}, is gone; put it back")
        write_metrics(self.rows, self.args.out)

    def done(self, loss, tokens):
        """A step is done, with this process's share of the mean loss and of the tokens."""
        loss, tokens = sum_over_processes([float(loss), tokens], self.device)
        self.step += 1
        self.losses.append(loss)
        self.check(loss)

        # How fast it goes, and how long it will take.
        self.tokens += tokens
        self.seconds += time.monotonic() - self.clock
        self.clock = time.monotonic()
        left = int(self.seconds / (self.step - self.first_step) * (self.total_steps - self.step))
        progress(f"step {self.step:,} of {self.total_steps:,} | loss {loss:.3f} | "
                 f"{self.tokens / self.seconds:,.0f} tokens/s | {left // 60}:{left % 60:02d} left")
        if self.writes and self.clock - self.saved_at > 300:
            self.save()

    def check(self, loss):
        """Raises UserError when training has gone astray."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} after step {self.step}; what was saved is kept. "
                            "Start anew with a lower learning rate (--lr)")

    def weights(self):
        """What learns: {name: tensor}."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self):
        """Write all that a resumed run needs: what learns, the optimizers' averages, the rows."""
        with write_atomically(self.resume_file) as part:
            torch.save({"step": self.step, "losses": self.losses, "rows": self.rows,
                        "total_steps": self.total_steps, "settings": self.settings,
                        "weights": self.weights(),
                        "optimizers": [o.state_dict() for o in self.optimizers]}, part)
        self.saved_at = time.monotonic()

    def load(self):
        """Go on where OUT-resume.pt stands. Raises UserError when it is of another run."""
        try:
            saved = torch.load(self.resume_file, map_location="cpu", weights_only=True)
            other = dict(self.settings.items() - saved["settings"].items())
            if other:
                raise ValueError(f"it is of a run with another --{min(other).replace('_', '-')}")
            if saved["total_steps"] != self.total_steps and not self.constant:
                raise ValueError(f"its learning rate falls towards step {saved['total_steps']:,}; "
                                 f"for more, start a new run with --init {self.args.out}")

            # Put everything back in its place.
            self.step, self.losses, self.rows = int(saved["step"]), saved["losses"], saved["rows"]
            for name, weight in self.weights().items():
                weight.copy_(saved["weights"][name])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if self.writes:
                self.write_what_follows()  # the run may have been killed before it had done this
        except Exception as e:  # also whatever a changed file makes of the lines above
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"{self.resume_file} cannot be used: {reason}. Repeat the run's own "
                            "command, or leave out --resume") from None
        say("resumed", f"after step {self.step:,}")

    def finish(self):
        """Say how it went, with the validation loss as a line of blocks; drop a state of no use."""
        losses = [row["val_loss"] for row in self.rows]
        low, span = min(losses), max(losses) - min(losses) or 1.0
        curve = "".join("▁▂▃▄▅▆▇█"[round(7 * (loss - low) / span)] for loss in losses[-30:])
        say("val loss", f"{curve} from {losses[0]:.3f} to {losses[-1]:.3f}, lowest {low:.3f}")
        say("time", f"{self.seconds:,.0f} s, {self.tokens / self.seconds:,.0f} tokens/s")
        say("saved", f"{self.args.out}, the best on the validation data")
        if self.constant:
            say("state", f"{self.resume_file}: --resume with more --epochs or --max-steps goes on "
                "from it; else delete it")
        elif self.writes:
            self.resume_file.unlink(missing_ok=True)


def write_metrics(rows, out):
    """Write OUT.csv and, if matplotlib is installed, OUT.png with the losses over the steps."""
    try:
        with (write_atomically(beside(out, ".csv")) as part,
              open(part, "w", newline="", encoding="utf-8") as file):
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

        # The picture.
        from matplotlib.figure import Figure
        axes = Figure().subplots()
        for name in ("train_loss", "val_loss"):
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.legend()
        axes.figure.savefig(beside(out, ".png"), dpi=120)
    except ImportError:
        pass
    except Exception as e:  # a picture is not worth a run
        say("metrics", f"not written: {e!s:.200}")


# ---------------------------------------------------------------------------------------------
# The command: looking inside, and writing.

def explain(model, tokenizer, idx, layer, head, top_k, top_p):
    """Print a prompt's tokens, the likeliest next ones, and who looks at whom."""
    def show(token):
        return printable(repr(token_ids_to_text(torch.tensor([token]), tokenizer)))

    tokens = idx[0].tolist()
    print(f"{len(tokens)} tokens, each with its ID")
    items = [f"{show(token)} {token}".replace(" ", "\u00a0") for token in tokens]  # kept whole
    print(wrap("   ".join(items), "  ", "  ").replace("\u00a0", " "))

    # The same scores at three temperatures, and which tokens the other two choices would keep.
    with torch.no_grad():
        logits = model(idx)[:, -1]
    probs = [next_token_probs(logits, temperature)[0] for temperature in (0.5, 1.0, 1.5)]
    kept = {"k": next_token_probs(logits, top_k=top_k)[0],
            "p": next_token_probs(logits, top_p=top_p)[0]}
    print(f"\nThe likeliest next tokens; k: kept by top-k {top_k}, p: kept by top-p {top_p:g}")
    print(" " * 16 + "temperature 0.5  temperature 1    temperature 1.5  kept at 1")
    for token in logits[0].topk(min(8, logits.shape[-1])).indices.tolist():
        shares = [p[token].item() for p in probs]
        columns = "".join(f"{'█' * round(8 * p):8s} {p:6.1%}  " for p in shares)
        marks = " ".join(name for name, p in kept.items() if p[token] > 0)
        print(f"  {show(token):14.14s}{columns}{marks}".rstrip())

    # A row per token, its weights as shades: the fullest is the row's largest.
    weights = attention_weights(model, idx, layer)
    weights = weights.mean(dim=0) if head is None else weights[head]
    which = "all heads" if head is None else f"head {head}"
    first = max(0, len(tokens) - 30)
    print(f"\nWho looks at whom: layer {layer}, {which}. A row shows what its token looks at")
    print(" " * 18 + "".join(f"{i % 100:2d}" for i in range(first, len(tokens))))
    for i in range(first, len(tokens)):
        row = weights[i, first:i + 1] / weights[i].max()
        shaded = "".join(2 * " ░▒▓█"[round(4 * share)] for share in row.tolist())
        print(f"  {i:3d} {show(tokens[i]):12.12s}{shaded}")


def print_stream(stream, tokenizer):
    """Print the tokens of `generate_stream` as text while they come, up to the end of text.

    A character of several tokens comes out whole. Returns the list of tokens.
    """
    decoder, tokens = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for row in stream:
        token = int(row[0])
        if token == tokenizer.eot_token:
            break
        tokens.append(token)
        piece = tokenizer.decode_bytes([token]) if token < tokenizer.n_vocab else b""
        print(printable(decoder.decode(piece)), end="", flush=True)
    print(printable(decoder.decode(b"", final=True)))
    return tokens


def main(argv=None):
    """The walk, or text from a checkpoint, or what the model sees and expects."""
    parser = ArgumentParser(description="A walk through the model; or text from a checkpoint.")
    arg = parser.add_argument
    arg("--checkpoint", type=path, help="the model (with --prompt: checkpoints/pretrained.pt)")
    arg("--prompt", help="text to continue; with --checkpoint alone, a new document begins")
    arg("--max-new-tokens", type=positive_int, default=200, help="when to stop")
    arg("--temperature", type=non_negative_float, default=0.8, help="0: always the likeliest token")
    arg("--top-k", type=positive_int, help="choose among the k likeliest tokens")
    arg("--top-p", type=probability, help="choose among the likeliest that reach this probability")

    arg("--explain", action="store_true", help="show tokens, next tokens and attention instead")
    arg("--layer", type=int, default=-1, help="whose attention, from 0; -1 is the last")
    arg("--head", type=int, help="which head, from 0; default: the mean of all")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.prompt is None and not args.explain:
        return walk()

    # Load, then explain or write.
    device = pick_device(args.device)
    checkpoint = args.checkpoint or Path("checkpoints") / "pretrained.pt"
    model, tokenizer, _ = load_checkpoint(checkpoint, device)
    context, L, H = (model.cfg[name] for name in ("context_length", "n_layers", "n_heads"))
    idx = text_to_token_ids(args.prompt or END_OF_TEXT, tokenizer).to(device)
    if args.explain:
        if not -L <= args.layer < L or not 0 <= (args.head or 0) < H:
            raise UserError(f"{checkpoint} has {L} layers and {H} heads, counted from 0")
        explain(model, tokenizer, idx[:, -context:], args.layer % L, args.head, args.top_k or 5,
                args.top_p or 0.9)
        return model, tokenizer

    model.to(pick_dtype(args.dtype, device))
    print(printable(args.prompt or ""), end="", flush=True)
    start = time.monotonic()
    tokens = print_stream(generate_stream(
        model, idx, args.max_new_tokens, context, args.temperature, args.top_k,
        tokenizer.eot_token, args.top_p, seed=args.seed), tokenizer)
    speed = len(tokens) / (time.monotonic() - start)
    print(f"{len(tokens)} tokens, {speed:.1f} tokens/s", file=sys.stderr)
    return model, tokenizer


if __name__ == "__main__":
    run_main(main)
