"""Pretraining: teach a GPT to predict the next token, on your text or on the one Python ships.

    python pretrain.py                                   one minute on a laptop, no download
    python pretrain.py --preset stories                  short stories, from nothing
    python pretrain.py --data my_texts/ --out checkpoints/mine.pt
    python pretrain.py --preset verdict                  the book's run, its chapter 5
    python pretrain.py --simple                          the book's run with the plain loop
    torchrun --nproc-per-node 2 pretrain.py              one run, shared by two processes

Writes --out, checkpoints/pretrained.pt unless given, and a .csv beside it. It follows Sebastian
Raschka's book *Build a Large Language Model (From Scratch)*. Shapes as in gpt.py: B rows, T tokens,
V vocabulary.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

from gpt import (  # before torch, which reads a setting of gpt.py when it starts
    END_OF_TEXT, GPT2_SIZES, GPT_CONFIG_124M, VERDICT, VERDICT_SHA256, VERDICT_URLS, ArgumentParser,
    GPTModel, Run, UserError, add_training_arguments, autocast, check_output, download, find_files,
    find_stories, fingerprint, generate, generate_text_simple, keep_freed_memory, load_checkpoint,
    load_tokenizer, name, path, pick_device, pick_dtype, positive_int, printable, probability,
    process_number, progress, read_pieces, run_main, say, sum_over_processes,
    text_to_token_ids, token_ids_to_text, tokenizer_to_spec, write_atomically)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

# ---------------------------------------------------------------------------------------------
# The data. Predicting the next token needs no labels: the text itself says what comes next. The
# text is cut into rows of T tokens. A new row begins every `stride` tokens. The target of a row is
# the row moved on by one token. Here are the two rows of "In the heart of every town lies a park"
# with T = 4 and stride = 4, as if each word were a token. (With stride = 2 the second row would
# begin at "heart": rows would overlap.)
#
#     input   In   the    heart  of          every  town  lies  a
#     target  the  heart  of     every       town   lies  a     park
#
# Each position is one exercise: all tokens up to it are given, and its target is the answer. The
# first row holds four:  In -> the,  In the -> heart,  In the heart -> of,  and so on.

class GPTDatasetV1(TensorDataset):
    """Text -> pairs (input, target) of `max_length` tokens, one every `stride`. Book section 2.6.

    A target is its input moved on by one token. Raises ValueError when the text is too short.
    """

    def __init__(self, txt, tokenizer, max_length, stride):
        tokens = text_to_token_ids(txt, tokenizer)[0]
        if len(tokens) <= max_length:
            raise ValueError(f"{len(tokens)} tokens of text, but at least {max_length + 1} needed")
        super().__init__(tokens[:-1].unfold(0, max_length, stride),   # windows (rows, max_length)
                         tokens[1:].unfold(0, max_length, stride))


def create_dataloader_v1(txt, batch_size=4, max_length=256, stride=128, shuffle=True,
                         drop_last=True, num_workers=0):
    """Text -> batches of (inputs, targets), each (B, T), in GPT-2's tokens. Book section 2.6."""
    dataset = GPTDatasetV1(txt, load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers)


# ---------------------------------------------------------------------------------------------
# The loss. Cross-entropy is minus the logarithm of the probability that the model gave to the token
# that really came. Three tokens that got the probabilities 0.5, 0.1 and 0.9 cost
#
#     -ln 0.5 = 0.693    -ln 0.1 = 2.303    -ln 0.9 = 0.105    on average  1.034 nats
#
# A nat is the unit of natural logarithms. exp(loss) is the perplexity: with exp(1.034) = 2.8, the
# model hesitates as if between 2.8 equally likely tokens.
#
# Losses per token of two vocabularies cannot be compared, as one's tokens may be longer. Losses per
# byte can. 1.034 nats are 1.034 / ln 2 = 1.49 bits; if a token has 4 bytes on average, that makes
# 0.37 bits per byte: a program could use the model to compress text to so many bits a byte.
#
# The training loss is measured on what the model learns from, the validation loss on text that it
# has never seen. While both fall, the model learns the language. When the validation loss rises and
# the training loss goes on falling, it learns its text by heart: that is overfitting. More text, a
# smaller model or fewer steps help; the model from before the rise is the one to keep.

def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy of a batch in nats per token, to call backward() on. Section 5.1.3."""
    logits = model(input_batch.to(device))  # (B, T, V); cross_entropy makes them probabilities
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if none. Section 5.1.3."""
    losses = [calc_loss_batch(inputs, targets, model, device).item()
              for inputs, targets in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


@torch.no_grad()
def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """(training loss, validation loss), over `eval_iter` batches each. Section 5.2."""
    model.eval()  # without dropout
    train_loss = calc_loss_loader(train_loader, model, device, eval_iter)
    val_loss = calc_loss_loader(val_loader, model, device, eval_iter)
    model.train()
    return train_loss, val_loss


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print 50 tokens that continue `start_context`, always the likeliest. Section 5.2."""
    model.eval()
    idx = text_to_token_ids(start_context, tokenizer).to(device)
    ids = generate_text_simple(model, idx, 50, context_size=model.pos_emb.weight.shape[0])
    say("", token_ids_to_text(ids, tokenizer).replace("\n", " "))  # prints; "" is its label
    model.train()


def train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                       eval_iter, start_context, tokenizer):
    """The plain loop -> (training losses, validation losses, tokens seen). Section 5.2.

    `python pretrain.py --simple` runs it at the book's size; here it is with a small model:
        text = open("data/the-verdict.txt", encoding="utf-8").read()
        cfg = {**GPT_CONFIG_124M, "context_length": 64, "emb_dim": 48, "n_heads": 3, "n_layers": 2}
        model, tokenizer = GPTModel(cfg), load_tokenizer("gpt2")
        train_loader = create_dataloader_v1(text[:18000], 8, max_length=64, stride=64)
        val_loader = create_dataloader_v1(text[18000:], 8, 64, 64, drop_last=False)
        optimizer = AdamW(model.parameters(), lr=0.003)
        train_model_simple(model, train_loader, val_loader, optimizer, "cpu", 1, 5, 1,
                           "Every effort moves you", tokenizer)
    """
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()  # as backward() adds to the gradients that are there
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            loss.backward()        # how would the loss change with each weight?
            optimizer.step()       # change each weight so that the loss falls
            tokens_seen += input_batch.numel()
            global_step += 1

            # Now and then, measure both losses.
            if global_step % eval_freq == 0:
                losses = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(losses[0])
                val_losses.append(losses[1])
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): "
                      f"Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


# ---------------------------------------------------------------------------------------------
# The optimizer decides how a gradient changes a weight. The plainest rule, weight -= lr * gradient
# (lr is the learning rate), moves weights with large gradients far and those with small ones hardly
# at all. AdamW (Loshchilov & Hutter 2019) keeps two running averages for each weight: of its
# gradient, and of the gradient's square. It subtracts from the weight
#
#     lr * average gradient / square root of the average square
#
#     the last gradients               average    root     subtracted
#     0.1,    0.1,    0.1,    0.1      0.1        0.1      1.0 * lr
#     0.001,  0.001,  0.001,  0.001    0.001      0.001    1.0 * lr, as much as above
#     0.1,   -0.1,    0.1,   -0.1      0          0.1      0, as the gradients do not agree
#
# Before that, weight decay (the W in AdamW) multiplies the weight by 1 - lr * weight_decay. It
# pulls all weights to zero. Only those that the data needs stay large.

class Muon(torch.optim.Optimizer):
    """Steps of equal length in all directions, for the matrices in the blocks. Jordan et al. 2024.

    AdamW looks at each number alone, Muon at a matrix as a whole. [[3, 0], [0, 0.1]] stretches one
    direction 3 times and the other 0.1 times: these factors are its singular values. In a gradient
    a few are large, from what occurs often in the text, and most are tiny. Muon averages gradients
    over steps (momentum) and then sets all singular values near 1, so what is rare is learned as
    fast as what is common. (torch.optim.Muon works in 16-bit numbers, bfloat16, which many CPUs
    only emulate.)
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Change every matrix by its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["average"] = torch.zeros_like(p)

                # a.lerp(b, w) is a + w * (b - a): a moves by the share w towards b.
                average = self.state[p]["average"].lerp_(p.grad, 1 - group["momentum"])

                # The average, with the newest gradient counted once more (Nesterov's momentum).
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]))

                # Weight decay, then the step. `update` is as large for a matrix as for its
                # transpose. In a tall one, with more outputs than inputs, it is spread over more
                # outputs, and each changes less: so the step is made longer.
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def orthogonal(self, update):
        """Move the singular values of a matrix near 1, about 0.7 to 1.2, in five rounds."""
        # norm() is the root of the sum of the squared singular values: now none is above 1.
        X = update.to(self.dtype) / (update.norm() + 1e-7)
        tall = X.shape[0] > X.shape[1]
        X = X.T if tall else X  # the smaller square, X X^T, is less work
        for _ in range(5):
            # X X^T X has the cubes of X's singular values, X X^T X X^T X the fifth powers. So each
            # value s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5; a search found these numbers.
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return (X.T if tall else X).to(update.dtype)


def make_optimizers(model, optimizer, lr, weight_decay, dtype=torch.float32):
    """A list of optimizers that together hold every parameter.

    `optimizer` is "adamw, book", "adamw" or "muon". Biases, norms, embeddings and the output layer
    do not decay: they have no reason to be near zero. (The book lets everything decay.)
    """
    matrices = [p for p in model.trf_blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p not in set(matrices)]
    betas = (0.9, 0.95)  # how much of AdamW's two averages stays in each step

    # fused=True: the same arithmetic in fewer, larger calls, which is faster.
    if optimizer == "adamw, book":
        optimizers = [AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)]
    elif optimizer == "adamw":
        optimizers = [AdamW(matrices, lr, betas, weight_decay=weight_decay, fused=True),
                      AdamW(rest, lr, betas, weight_decay=0, fused=True)]
    else:  # AdamW wants smaller steps than Muon
        optimizers = [Muon(matrices, lr, weight_decay=weight_decay, dtype=dtype),
                      AdamW(rest, 0.15 * lr, betas, weight_decay=0, fused=True)]

    # Remember each learning rate as the peak: for each step the loop sets it to `peak_lr` times
    # `lr_factor`, below.
    for group in (group for o in optimizers for group in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------------------------
# `train_model_simple` shows the idea. `train_model`, which every run without --simple uses, adds
# four things: initial values, a schedule for the learning rate, clipping, and accumulation.

def init_gpt2_weights(model, std, sines=False):
    """GPT-2's initial values: normal, `std` wide (Radford et al. 2019, section 2.3).

    In each block, attention and feed-forward add their output to the vectors that pass through (the
    shortcut): 2 n_layers additions. A sum of N random numbers is about sqrt(N) times as wide as
    one. So the matrices that write these outputs start smaller by sqrt(2 n_layers).

    `sines` makes the position vectors waves of many lengths (Vaswani et al. 2017, section 3.5).
    Neighbours then look alike from the first step on, which makes it easy for attention to look at
    the token before.
    """
    for name, p in model.named_parameters():
        if p.ndim == 2:
            adds = name.endswith(("att.out_proj.weight", "ff.layers.2.weight"))
            torch.nn.init.normal_(p, std=std / math.sqrt(2 * model.cfg["n_layers"] if adds else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)

    if sines:
        T, C = model.pos_emb.weight.shape
        # The first wave is 6 positions long; each next one is longer, the last about 12 T.
        angles = torch.arange(T)[:, None] / (2 * T) ** (torch.arange(0, C, 2) / C)   # (T, C / 2)
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :C]
        model.pos_emb.weight.data.copy_(0.1 * waves)


def lr_factor(step, total_steps, warmup_steps, final_lr_share):
    """What the learning rate is multiplied by: a linear rise, then half a cosine down."""
    # At first gradients are wild, so steps are small; at the end small steps let weights settle.
    warmup_steps = min(warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final_lr_share + (1 - final_lr_share) * (1 + math.cos(math.pi * share)) / 2


@functools.lru_cache(maxsize=1)  # the same in all steps of an epoch
def shuffled(seed, epoch, n):
    """The numbers from 0 to n - 1 in a random order, another one in each epoch: (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, epoch))))


def train_model(run, train_rows, val_rows, device, dtype):
    """The loop of every run without --simple.

    `train_rows` and `val_rows` are `TokenRows`, below the lesson: their `batch` takes a tensor of
    row numbers and gives the inputs and targets of these rows.

    `run` (gpt.py) is the run's notebook. `due` says whether it is time to measure. `report` prints
    and saves what was measured, and the model if it is the best so far. `done` counts a step
    and its tokens and notes its loss; the mean of the noted losses is the `train_loss` of the next
    report.

    `dtype` is the type of matrix products. bfloat16 has 16 bits, float32's range and only three
    digits; some processors multiply it twice as fast. `autocast` runs the products in it, while
    weights, sums and the loss stay in float32.
    """
    model, args = run.model, run.args

    # The number of this process, and how many there are: 0 and 1 without torchrun. With it, each
    # reads its share of every batch, and backward() averages the gradients over all.
    rank, world = process_number()

    # `fast_model` has the weights of `model`. If asked, torch.compile makes it faster; with several
    # processes its backward() averages the gradients.
    fast_model = compile_and_share(model, args.compile)
    rows_per_step = args.batch_size * args.grad_accum
    steps_per_epoch = len(train_rows) // rows_per_step

    while True:
        # Measure when it is due.
        if run.due(args.eval_every):
            run.report(run.step / steps_per_epoch,
                       **evaluate_rows(model, val_rows, run.tokenizer, args, device, dtype))
        if run.step >= run.total_steps:
            break

        # The learning rate of this step.
        factor = lr_factor(run.step, run.total_steps, args.warmup_steps, args.final_lr_share)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]

        # The numbers of this step's rows.
        epoch, k = divmod(run.step, steps_per_epoch)
        order = shuffled(args.seed, epoch, len(train_rows))
        rows = order[k * rows_per_step:(k + 1) * rows_per_step]

        # Dropout draws random numbers. They follow from seed and step alone, so a resumed run goes
        # on like one that was never stopped.
        torch.manual_seed(hash((args.seed, run.step, rank)))
        model.train()

        # Gradients. A large batch gives steadier ones but may not fit in memory, so the gradients
        # of `grad_accum` smaller batches add up. These are equally large, so dividing each loss by
        # `grad_accum` gives the mean over all of them, as in one large batch.
        step_loss = 0.0
        for batch in rows.split(args.batch_size):
            inputs, targets = train_rows.batch(batch[rank::world], device)
            with autocast(device, dtype):
                loss = calc_loss_batch(inputs, targets, fast_model, device) / args.grad_accum
            loss.backward()
            step_loss += loss.detach()

        # Clipping shortens the rare, very long gradient that would throw the weights off.
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # This process's share of the mean loss and of the tokens; `done` adds up the shares.
        run.done(step_loss / world, inputs.numel() * args.grad_accum)


@torch.no_grad()
def evaluate_rows(model, rows, tokenizer, args, device, dtype):
    """-> {"val_loss" in nats per token, "perplexity", "bits_per_byte", "sample"}."""
    # At most --eval-batches batches, spread evenly; each process takes its share.
    rank, world = process_number()
    count = min(len(rows), args.eval_batches * args.batch_size)
    numbers = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).long()[rank::world]
    model.eval()

    # Add up the losses, and the bytes of text that the targets stand for. The end of text costs
    # nats, too, but has no bytes.
    nats = num_bytes = 0
    for i in range(0, len(numbers), args.batch_size):
        progress(f"measuring, row {i:,} of {len(numbers):,}")
        inputs, targets = rows.batch(numbers[i:i + args.batch_size], device)
        with autocast(device, dtype):
            nats += calc_loss_batch(inputs, targets, model, device).item() * targets.numel()
        text = targets[targets != tokenizer.eot_token]
        num_bytes += len(tokenizer.decode_bytes(text.tolist()))
    nats, num_bytes = sum_over_processes([nats, num_bytes], device)
    loss = nats / (count * rows.T)  # T: tokens in a row

    # What the model writes. Tokens are drawn from their probabilities, a little sharpened (see
    # `next_token_probs` in gpt.py); a model that always takes the likeliest repeats itself.
    idx = text_to_token_ids(args.prompt or END_OF_TEXT, tokenizer).to(device)
    ids = generate(model, idx, 100, rows.T, 0.8, seed=args.seed, eos_id=tokenizer.eot_token)
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 99)),
            "bits_per_byte": nats / max(num_bytes, 1) / math.log(2),
            "sample": token_ids_to_text(ids, tokenizer).replace(END_OF_TEXT, " ")}


# ---------------------------------------------------------------------------------------------
# The presets: numbers to start from and to play with.

QUICK = {                        # 3 blocks of width 192 learn more in a minute than 6 of width 128
    "context_length": 256, "emb_dim": 192, "n_heads": 3, "n_layers": 3,
    "drop_rate": 0.0,            # share of activations that training zeroes
    "tie_embeddings": True,      # the output layer is the token embedding
    "tokenizer": "bytes",        # a token is a byte: nothing to download, nothing to train
    "init_weights": "sines",     # GPT-2's initial values, and waves for the positions
    "optimizer": "muon",         # see class Muon
    "batch_size": 4,             # rows of context_length tokens in a batch
    "grad_accum": 1,             # batches whose gradients are added up for one step
    "epochs": None,              # passes over the text; None: as many as max_steps takes
    "max_steps": 1000,           # optimizer steps
    "lr": 0.02,                  # learning rate at its peak
    "warmup_steps": 50,          # steps in which it rises from 0, at most a tenth of all
    "final_lr_share": 0.0,       # what is left of it at the end; 1 keeps it constant
    "weight_decay": 0.1,         # how strongly matrices are pulled to 0
    "clip": 1.0,                 # a longer gradient is shortened to this; None: never
    "eval_every": 250,           # steps from one evaluation, with its checkpoint, to the next
    "prompt": "The import statement"}   # what each evaluation continues

PRESETS = {
    "quick": QUICK,
    # Short stories, with a vocabulary learned by: python tokenizer.py train --stories
    "stories": {**QUICK, "tokenizer": "checkpoints/stories.tiktoken", "batch_size": 16,
                "max_steps": 700, "lr": 0.03, "eval_every": 175, "prompt": "Once upon a time",
                "out": Path("checkpoints", "stories.pt")},
    # The book's run, section 5.2: constant learning rate, torch's own initial values.
    "verdict": {**QUICK, **GPT_CONFIG_124M, "context_length": 256, "tie_embeddings": False,
                "tokenizer": "gpt2", "init_weights": "torch", "optimizer": "adamw, book",
                "batch_size": 2, "epochs": 10, "max_steps": None, "lr": 4e-4, "warmup_steps": 0,
                "final_lr_share": 1.0, "clip": None, "eval_every": 18,
                "prompt": "Every effort moves you"},
    # GPT-2's size, GPT-3's recipe (Brown et al. 2020, appendix B), for your own large text.
    "gpt2": {**QUICK, **GPT_CONFIG_124M, "drop_rate": 0.0, "tokenizer": "gpt2",
             "init_weights": "gpt2", "optimizer": "adamw", "batch_size": 8, "grad_accum": 8,
             "epochs": 1, "max_steps": None, "lr": 6e-4, "warmup_steps": 200,
             "final_lr_share": 0.1, "eval_every": 100}}

# --init FILE starts from trained weights: small steps with a constant learning rate, for 3 epochs
# or 1,000 steps, whichever is less. The context is the model's own.
CONTINUE = {"context_length": None, "optimizer": "adamw", "lr": 1e-4, "warmup_steps": 0,
            "final_lr_share": 1.0, "clip": 1.0, "epochs": 3, "max_steps": 1000}

# To train a small model by hand, in Python: see the docstring of `train_model_simple`.
#
# Try it:
# 1. What helps most? Run this, and note the validation loss:
#        python pretrain.py --max-steps 300 --out checkpoints/try.pt
#    Then once with "optimizer": "adamw" and "lr": 0.003 in QUICK, once with "init_weights": "gpt2".
# 2. See overfitting: the training loss goes on falling while the validation loss rises.
#        python pretrain.py --preset verdict --out checkpoints/verdict.pt
# 3. Train on a text of yours, and compare its bits per byte with those of Python's manual:
#        python pretrain.py --data YOUR-TEXT.txt --out checkpoints/try.pt

# =============================================================================================
# The lesson ends here. What follows: tokens on disk, several processes, the command.
# =============================================================================================

def find_text(args):
    """-> (name, what identifies the text, a list of texts, each in pieces). UserError, OSError."""
    if args.data is None and args.preset == "gpt2":
        raise UserError("the preset gpt2 trains on your own text; name it: --data FILE-OR-FOLDER")
    if args.data is None and args.preset == "quick":  # the manual that CPython carries for help()
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python has no pydoc_data; give a text: --data FILE") from None
        return "Python's manual", list(topics.values()), [[text] for text in topics.values()]

    files = find_files(args.data) if args.data else [
        find_stories() if args.preset == "stories" else
        download(VERDICT_URLS, VERDICT, VERDICT_SHA256)]
    contents = []
    for file in files:
        progress(f"reading {file}")
        next(read_pieces(file))  # refuses what is no text before anything is kept of it
        with open(file, "rb") as opened:
            contents.append([file.suffix, hashlib.file_digest(opened, "sha256").hexdigest()])
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    return name, contents, [read_pieces(file) for file in files]


def tokens_on_disk(texts, contents, tokenizer):
    """Write all texts as token IDs, each closed by `<|endoftext|>` -> (path, dtype).

    Once, piece by piece; the name depends on text and tokenizer. The last 8 bytes hold the number
    of tokens, so a file that was cut is noticed. Files that no run used for a day are deleted.
    """
    file = Path("data") / f".tokens-{fingerprint(contents, tokenizer_to_spec(tokenizer))}.bin"
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    if count_tokens(file, dtype) is None:
        with write_atomically(file) as part, open(part, "wb") as out:
            for text in texts:
                last = None
                for piece in text:
                    # Turn a piece into tokens, and write them behind the others.
                    try:
                        ids = tokenizer.encode_to_numpy(piece, allowed_special={END_OF_TEXT})
                    except ValueError as e:  # of a million spaces in a row
                        raise UserError(f"the text cannot be cut into tokens ({e!s:.90})") from None
                    ids.astype(dtype).tofile(out)
                    last = ids[-1] if len(ids) else last
                    progress(f"turning text into tokens: {out.tell() // dtype.itemsize:,}")

                # Close the text; at the end of the file stands the number of tokens.
                if last != tokenizer.eot_token:
                    np.array([tokenizer.eot_token], dtype).tofile(out)
            np.array([out.tell() // dtype.itemsize], np.uint64).tofile(out)

    # Mark this one as used today, and delete those that no run used for a day.
    os.utime(file)
    for old in file.parent.glob(".tokens-*.bin"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86400:
                old.unlink()
    return file, dtype


def count_tokens(file, dtype):
    """The number of tokens in a file of `tokens_on_disk`; None if it is not there or not whole."""
    if not file.is_file() or file.stat().st_size < 8:
        return None
    count = (file.stat().st_size - 8) // dtype.itemsize
    written = np.fromfile(file, np.uint64, offset=file.stat().st_size - 8)
    return count if written[0] == count else None


class TokenRows:
    """The tokens `first` to `last` of a file in whole rows of T, each read when it is needed."""

    def __init__(self, file, dtype, first, last, T):
        self.file = open(file, "rb")  # kept open: it can be read even if another run deletes it
        self.dtype, self.T = dtype, T
        self.starts = range(first, last - T, T)

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, device="cpu"):
        """Row numbers (B,) -> inputs (B, T), targets (B, T)."""
        block = np.empty((len(rows), self.T + 1), np.int64)
        for i, row in enumerate(rows):
            self.file.seek(self.starts[row] * self.dtype.itemsize)
            block[i] = np.frombuffer(self.file.read((self.T + 1) * self.dtype.itemsize), self.dtype)
        block = torch.from_numpy(block).to(device)
        return block[:, :-1], block[:, 1:]


def cut_tokens(file, dtype, name, context, args):
    """A file of tokens -> (rows to train, rows held out: the last part). Raises UserError."""
    num_tokens = count_tokens(file, dtype)
    cut = int(num_tokens * (1 - args.val_share))
    T = args.context_length or context
    if T > context:
        raise UserError(f"the model of --init sees {context} tokens; --context-length can be less")

    while True:
        train_rows = TokenRows(file, dtype, 0, cut, T)
        val_rows = TokenRows(file, dtype, cut, num_tokens, T)
        if len(train_rows) >= args.batch_size * args.grad_accum and len(val_rows):
            say("text", f"{name}: {cut:,} tokens to train, {num_tokens - cut:,} held out")
            return train_rows, val_rows

        # A trained model can learn from rows that are shorter than what it sees.
        if args.context_length or T < 32:
            raise UserError(f"the text of {name} is too short: {cut} tokens to train and "
                            f"{num_tokens - cut} held out, for rows of {T}; add text, or change "
                            "--context-length, --batch-size, --grad-accum or --val-share")
        T //= 2


def make_model(args):
    """-> (model, tokenizer): those of --init, or fresh ones. Raises UserError."""
    if args.init:
        return load_checkpoint(args.init)[:2]
    if args.emb_dim % args.n_heads:
        raise UserError(f"--emb-dim {args.emb_dim} cannot be shared out among {args.n_heads} heads")
    if args.tokenizer == PRESETS["stories"]["tokenizer"] and not Path(args.tokenizer).exists():
        raise UserError(f"there is no vocabulary {args.tokenizer}; learn it first, in seconds: "
                        "python tokenizer.py train --stories")
    tokenizer = load_tokenizer(args.tokenizer)
    cfg = {name: getattr(args, name, value) for name, value in GPT_CONFIG_124M.items()}
    cfg.update(vocab_size=tokenizer.n_vocab, tie_embeddings=args.tie_embeddings)
    model = GPTModel(cfg)

    if args.init_weights == "gpt2":
        init_gpt2_weights(model, std=0.02)
    if args.init_weights == "sines":  # narrower models than GPT-2 want larger numbers
        init_gpt2_weights(model, std=0.04, sines=True)
    return model, tokenizer


def join_processes(device):
    """Under torchrun join the other processes, of which only the first prints -> torch.device."""
    if "LOCAL_RANK" not in os.environ:
        return pick_device(device)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    device = pick_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # a large text takes its time
    if dist.get_rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    return device


def compile_and_share(model, compile):
    """The model as training calls it: compiled if asked, its gradients averaged over processes."""
    model = torch.compile(model) if compile else model
    if process_number()[1] > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    return model


def simple():
    """--simple: the book's chapter 5 as it stands, at its size; some minutes on a laptop."""
    torch.manual_seed(123)
    text = download(VERDICT_URLS, VERDICT, VERDICT_SHA256).read_text(encoding="utf-8")
    model = GPTModel({**GPT_CONFIG_124M, "context_length": 256})
    tokenizer, cut = load_tokenizer("gpt2"), int(0.9 * len(text))
    train_loader = create_dataloader_v1(text[:cut], 2, max_length=256, stride=256)
    val_loader = create_dataloader_v1(text[cut:], 2, 256, 256, shuffle=False, drop_last=False)
    optimizer = AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    train_model_simple(model, train_loader, val_loader, optimizer, "cpu", 10, 5, 5,
                       "Every effort moves you", tokenizer)
    return model, tokenizer


def parse_arguments(argv):
    """The command line; what is not given there comes from the preset."""
    parser = ArgumentParser(description="Pretrain a GPT. The defaults are those of the preset.")
    arg = parser.add_argument
    arg("--preset", choices=list(PRESETS), default="quick", help="which recipe")
    arg("--data", type=path, nargs="+", help="UTF-8 files and folders instead of the preset's text")
    arg("--init", type=path, help="checkpoint to start from instead of random weights")
    arg("--size", choices=list(GPT2_SIZES), help="width, depth and heads of a published GPT-2")
    arg("--simple", action="store_true", help="train_model_simple on The Verdict; saves nothing")

    arg("--tokenizer", type=name, help="gpt2, bytes, or a file made by: python tokenizer.py train")
    arg("--context-length", type=positive_int, help="tokens in a row; with --init it can be less")
    for flag in ("--emb-dim", "--n-layers", "--n-heads"):
        arg(flag, type=positive_int, help="of a fresh model")
    arg("--prompt", help="what each evaluation continues; with --data, the held-out part's start")
    arg("--val-share", type=probability, default=0.1, help="last part of the tokens, held out")
    arg("--eval-batches", type=positive_int, default=200, help="most batches in an evaluation")
    arg("--compile", action="store_true", help="let torch.compile rewrite the model first")
    add_training_arguments(parser, "pretrained.pt")

    # What is given decides the defaults of the rest: read it first, and show --help after that.
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    defaults = {**PRESETS[given.preset], **GPT2_SIZES.get(given.size, {})}
    if given.init:
        defaults.update(CONTINUE)
        if any((given.size, given.tokenizer, given.emb_dim, given.n_layers, given.n_heads)):
            parser.error("--init brings its own tokenizer and sizes; leave out the flags for those")

    if given.data:
        defaults["prompt"] = None
    if given.epochs or given.max_steps:  # a given one replaces both of the preset's
        defaults.update(epochs=None, max_steps=None)
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def main(argv=None):
    """Text -> tokens -> model -> training -> checkpoint. Returns (model, tokenizer)."""
    args = parse_arguments(argv)
    if args.simple:
        return simple()
    device = join_processes(args.device)
    rank, world = process_number()
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # on a GPU, TF32 for what stays float32
    keep_freed_memory(largest=1 << 30)          # each step frees and takes blocks of equal sizes
    if args.batch_size % world:
        raise UserError(f"make --batch-size {args.batch_size} a multiple of {world}, the processes")
    check_output(args, args.init, *(args.data or []))

    # Text and model. The first process writes files; the others wait, then find them there.
    if rank > 0:
        dist.barrier()
    model, tokenizer = make_model(args)
    name, contents, texts = find_text(args)
    file, token_dtype = tokens_on_disk(texts, contents, tokenizer)
    train_rows, val_rows = cut_tokens(file, token_dtype, name, model.cfg["context_length"], args)
    if rank == 0 and world > 1:
        dist.barrier()
    if args.prompt is None:
        start = token_ids_to_text(val_rows.batch([0])[0][0, :30], tokenizer)
        args.prompt = " ".join(start.replace(END_OF_TEXT, " ").split())[:30].strip("\ufffd")

    # Say what is trained.
    V, size = model.cfg["vocab_size"], sum(p.numel() for p in model.parameters())
    sizes = "{n_layers} blocks, {emb_dim} wide, {n_heads} heads, context {context_length}"
    say("model", f"{size:,} parameters: {sizes.format(**model.cfg)}")
    say("loss", f"in nats per token; a blind guess among {V:,} costs ln {V:,} = {math.log(V):.2f}")

    # Train it.
    model.to(device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, dtype)
    per_epoch = len(train_rows) // (args.batch_size * args.grad_accum)
    total_steps = min((args.epochs or math.inf) * per_epoch, args.max_steps or math.inf)

    # What tells this run apart from others, when it is resumed.
    settings = {"data": fingerprint(contents), "init": fingerprint(model) if args.init else None,
                "tokenizer": fingerprint(tokenizer_to_spec(tokenizer)),
                "context_length": train_rows.T}
    constant = args.final_lr_share == 1 and args.warmup_steps == 0
    run = Run(total_steps, args, model, optimizers, tokenizer, settings, constant)
    train_model(run, train_rows, val_rows, device, dtype)
    run.finish()

    # Say how to use it.
    words = f"--checkpoint {shlex.quote(str(args.out))} --prompt={shlex.quote(args.prompt)}"
    print(printable(f"\nNext:\n  python gpt.py {words}"))
    return model, tokenizer


if __name__ == "__main__":
    run_main(main)
