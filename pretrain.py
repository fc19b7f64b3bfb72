"""Pretraining: teach a GPT to predict the next token, on your text or on the one Python ships.

    python pretrain.py                                   two minutes on a laptop, nothing downloaded
    python pretrain.py --data my_texts/ --out checkpoints/mine.pt
    python pretrain.py --preset verdict                  the book's run (chapter 5)
    python pretrain.py --preset gpt2 --data corpus/ --device cuda
    torchrun --nproc-per-node 2 pretrain.py              the same run, shared by two processes

Reads text, writes checkpoints/pretrained.pt (the newest state, for --resume and the next stages),
pretrained-best.pt (the lowest validation loss) and pretrained.csv (the metrics).

Read it in order: presets -> the book's data loader and simple loop -> the tokens in a file ->
the training loop that runs -> benchmark -> main. Shapes as in gpt.py: B rows, T tokens, V
vocabulary.
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import math
import mmap
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from gpt import (
    GPT2_SIZES, GPT_CONFIG_124M, VERDICT, VERDICT_ADDRESS, VERDICT_SHA256, ArgumentParser, CtrlC,
    GPTModel, Metrics, Progress, UserError, add_training_arguments, autocast, beside, best_path,
    check_output, download, generate, generate_text_simple, keep_freed_memory, load_checkpoint,
    load_tokenizer, pick_device, pick_dtype, positive_int, printable, read_text_pieces, run_main,
    save_checkpoint, text_to_token_ids, token_ids_to_text, tokenizer_spec, write_atomically)

SMALL = {"vocab_size": None,  # the tokenizer's
         "context_length": 256, "emb_dim": 192, "n_heads": 3, "n_layers": 3,
         "drop_rate": 0.0,    # share of activations that training zeroes
         "qkv_bias": False, "tie_embeddings": True}
# Measured: validation loss in nats per byte. In the same 85 s, 3 blocks of width 192 and 4 of 128
# reach 1.22, 6 of 128 and 4 of 192 reach 1.30. For 4 of 192: Muon 1.49, AdamW (lr 0.002) 2.02 in
# 400 steps; waves as positions 1.34 in 600 steps, random ones 1.64 in 540.

PRESETS = {
    # Every number here is a starting point to play with; most have a flag of the same name.
    "quick": {
        "config": SMALL,
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
        "prompt": "The import statement"},   # what each evaluation continues
    # The book's run, section 5.2: constant learning rate, torch's own initial values.
    "verdict": {
        "config": {**GPT_CONFIG_124M, "context_length": 256}, "tokenizer": "gpt2",
        "init_weights": "torch", "optimizer": "adamw, book",
        "batch_size": 2, "grad_accum": 1, "epochs": 10, "max_steps": None, "lr": 4e-4,
        "warmup_steps": 0, "final_lr_share": 1.0, "weight_decay": 0.1, "clip": None,
        "eval_every": 20, "prompt": "Every effort moves you"},
    # GPT-2's recipe (Radford et al. 2019; Brown et al. 2020, appendix B) for your own large text.
    "gpt2": {
        "config": {**GPT_CONFIG_124M, "drop_rate": 0.0, "tie_embeddings": True},
        "tokenizer": "gpt2", "init_weights": "gpt2", "optimizer": "adamw",
        "batch_size": 8, "grad_accum": 8, "epochs": 1, "max_steps": None, "lr": 6e-4,
        "warmup_steps": 200, "final_lr_share": 0.1, "weight_decay": 0.1, "clip": 1.0,
        "eval_every": 100, "prompt": "Every effort moves you"},
}
# With --init the weights are good already and want small steps.
CONTINUE = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 50, "clip": 1.0}


# ---------------------------------------------------------------------------------------------
# The book's way: a data set of (input, target) rows, a loss, the simplest loop that trains. It is
# here to be read first; the run itself uses what comes after.

class GPTDatasetV1(Dataset):
    """Text cut into rows of `max_length` tokens, a row every `stride`. Book section 2.6.

    Item i is (input, target), both (max_length,); the target is the input moved on by one token.
    Raises ValueError when the text has no `max_length` + 1 tokens.
    """

    def __init__(self, txt, tokenizer, max_length, stride):
        tokens = torch.tensor(tokenizer.encode(txt, allowed_special={"<|endoftext|>"}))
        if len(tokens) <= max_length:
            raise ValueError(f"the text has {len(tokens)} tokens; at least {max_length + 1} are "
                             "needed")
        self.input_ids = tokens[:-1].unfold(0, max_length, stride)    # (rows, T), a view: no copies
        self.target_ids = tokens[1:].unfold(0, max_length, stride)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return self.input_ids[i], self.target_ids[i]


def create_dataloader_v1(txt, batch_size=4, max_length=256, stride=128, shuffle=True,
                         drop_last=True, num_workers=0):
    """Text -> batches of (inputs, targets), each (B, T), in GPT-2's tokens. Book section 2.6."""
    dataset = GPTDatasetV1(txt, load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last,
                      num_workers=num_workers)


def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy of a batch in nats per token, a tensor to call backward() on. 5.1.3."""
    logits = model(input_batch.to(device))                            # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none. 5.1.3."""
    num_batches = min(num_batches or len(data_loader), len(data_loader))
    losses = [calc_loss_batch(inputs, targets, model, device).item()
              for _, (inputs, targets) in zip(range(num_batches), data_loader)]
    return sum(losses) / num_batches if num_batches else math.nan


def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """(training loss, validation loss), each over `eval_iter` batches, without dropout. 5.2."""
    model.eval()
    with torch.no_grad():
        losses = tuple(calc_loss_loader(loader, model, device, num_batches=eval_iter)
                       for loader in (train_loader, val_loader))
    model.train()
    return losses


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print how the model continues `start_context`, 50 tokens, greedily. Section 5.2."""
    model.eval()
    idx = text_to_token_ids(start_context, tokenizer).to(device)
    ids = generate_text_simple(model, idx, max_new_tokens=50,
                               context_size=model.pos_emb.weight.shape[0])
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    model.train()


def train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                       eval_iter, start_context, tokenizer):
    """The loop one would explain first; `train_model` below is the one that runs. Section 5.2.

    Returns the lists (training losses, validation losses, tokens seen), an entry per evaluation.
    """
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            loss.backward()   # how would the loss change with each weight?
            optimizer.step()  # change each weight so that it falls
            tokens_seen += input_batch.numel()
            global_step += 1
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device,
                                                      eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {train_loss:.3f}, "
                      f"Val loss {val_loss:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


# ---------------------------------------------------------------------------------------------
# The text as one long row of tokens in a file, so that its size does not matter.

def find_documents(preset, data):
    """-> (name, list of documents, stamp). A document is an iterable of pieces of text.

    `data` are files and folders (all files in them, sorted); without, the preset's own text. The
    stamp changes when the text does.
    """
    if data:
        paths = []
        for path in data:
            inside = sorted(  # neither hidden nor empty
                p for p in path.rglob("*") if p.is_file() and p.stat().st_size and not any(
                    part.startswith(".") for part in p.relative_to(path).parts))
            if path.is_dir() and not inside:
                raise UserError(f"the folder {path} has no text; put UTF-8 files in it")
            paths += inside if path.is_dir() else [path]
    elif preset == "verdict":
        paths = [download([VERDICT_ADDRESS], VERDICT, VERDICT_SHA256)]
    elif preset == "gpt2":
        raise UserError("the preset gpt2 trains on your own text; name it: --data FILE-OR-FOLDER")
    else:  # the reference manual, which every CPython carries for its help()
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python comes without pydoc_data, the text of the quick preset; "
                            "name another text: --data FILE-OR-FOLDER") from None
        texts = [topics[name] for name in sorted(topics)]
        stamp = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return "Python's reference manual", [[t] for t in texts], stamp
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is not there; check --data")
    stamp = repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    return name, [read_text_pieces(p) for p in paths], stamp


def tokens_on_disk(documents, stamp, tokenizer):
    """All documents as one array of token IDs, each closed by `<|endoftext|>`; a memory map.

    They are written once to data/tokens-*.bin, 16 bits each if the vocabulary allows it, piece by
    piece; the name depends on text and tokenizer, so a change of either makes a new file.
    """
    spec = repr(tokenizer_spec(tokenizer))
    key = hashlib.sha256(f"{stamp} {spec}".encode()).hexdigest()[:16]
    path = Path("data") / f"tokens-{key}.bin"
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    if not path.exists():
        progress, done = Progress(None, "tokens"), 0
        with write_atomically(path) as part, open(part, "wb") as file:
            for document in documents:
                for piece in document:
                    ids = tokenizer.encode_to_numpy(piece, disallowed_special=()).astype(dtype)
                    ids.tofile(file)
                    done += len(ids)
                    progress.update(done, "turning text into tokens")
                np.array([tokenizer.eot_token], dtype).tofile(file)
        progress.close()
    return np.memmap(path, dtype, mode="r")


class TokenRows:
    """All tokens, cut into rows of T inputs and T targets.

    Every token but the first is a target exactly once: the last row is moved to the left until it
    is full, and targets that were there before become -100, which the loss ignores. Ten tokens and
    T = 4: the rows begin at 0, 4 and 5, and three targets of the last one are -100.
    """

    def __init__(self, tokens, T):
        self.tokens, self.T = tokens, T
        self.num_targets = len(tokens) - 1
        self.num_rows = math.ceil(self.num_targets / T)

    def count_targets(self, rows):
        """How many tokens of these rows are targets."""
        repeated = self.num_rows * self.T - self.num_targets          # in the last row
        return len(rows) * self.T - repeated * int(self.num_rows - 1 in rows)

    def batch(self, rows, device="cpu"):
        """Row numbers (B,) -> inputs (B, T), targets (B, T)."""
        starts = np.asarray(rows) * self.T
        moved = np.maximum(starts + self.T - self.num_targets, 0)     # how far the last row moves
        block = self.tokens[(starts - moved)[:, None] + np.arange(self.T + 1)].astype(np.int64)
        self.forget_pages()
        targets = np.where(np.arange(self.T) < moved[:, None], -100, block[:, 1:])
        x, y = torch.from_numpy(block[:, :-1].copy()), torch.from_numpy(targets)
        if torch.device(device).type == "cuda":  # pinned memory is copied while the GPU computes
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def forget_pages(self):
        """Drop the pages just read from this process's memory, where the whole file would end."""
        if isinstance(self.tokens, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.tokens._mmap.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self):
        """A hash to know this text by: of 64 pieces, which cover up to a million tokens."""
        starts = np.linspace(0, max(0, len(self.tokens) - 2**14), 64).astype(int)
        parts = b"".join(self.tokens[start:start + 2**14].tobytes() for start in starts)
        self.forget_pages()
        return hashlib.sha256(parts).hexdigest()


def split_tokens(tokens, T, val_share, name):
    """-> (training rows, validation rows): the last `val_share` of the tokens is held out."""
    num_train = int(len(tokens) * (1 - val_share))
    if min(num_train, len(tokens) - num_train) < T + 1:
        needed = math.ceil((T + 1) / min(val_share, 1 - val_share)) + 1
        raise UserError(f"{name} is too short: {len(tokens):,} tokens, but at least {needed:,} are "
                        f"needed for a context of {T}; add text or lower --context-length")
    return TokenRows(tokens[:num_train], T), TokenRows(tokens[num_train:], T)


# ---------------------------------------------------------------------------------------------
# The training loop that runs.

def init_gpt2_weights(model, std=0.02):
    """GPT-2's initial values: normal, 0.02 wide; smaller where a block adds to the shortcut.

    A block adds twice, so n_layers blocks add 2 n_layers times, and dividing by the root of that
    keeps the sum's size independent of the depth (Radford et al. 2019, section 2.3).
    """
    for name, p in model.named_parameters():
        if p.ndim == 2:
            adds = name.endswith(("att.out_proj.weight", "ff.layers.2.weight"))
            torch.nn.init.normal_(p, std=std / math.sqrt(2 * model.cfg["n_layers"] if adds else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def init_sine_positions(model, size=0.1):
    """Start the position vectors as waves of many lengths (Vaswani et al. 2017, section 3.5).

    Neighbouring positions then look alike from the start, and attention need not first find out
    which token is the one before. The vectors are trained on like any other parameter.
    """
    T, C = model.pos_emb.weight.shape
    angles = torch.arange(T)[:, None] / (2 * T) ** (torch.arange(0, C, 2) / C)     # (T, C / 2)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :C]
    model.pos_emb.weight.data.copy_(size * waves)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: an update moves all directions of a matrix equally far.

    For matrices inside the model; Jordan et al. 2024. torch.optim.Muon does the same, but always
    in bfloat16, which takes a CPU that only emulates it 100 times as long.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Change every matrix by its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                state, momentum = self.state[p], group["momentum"]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 1 - momentum)
                update = self.orthogonal(p.grad.lerp(state["average"], momentum))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def orthogonal(self, update):
        """Bring all singular values near 1: a polynomial of the matrix, applied five times."""
        X = update.to(self.dtype) / (update.norm() + 1e-7)
        if tall := X.shape[0] > X.shape[1]:
            X = X.T
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return (X.T if tall else X).to(update.dtype)


def make_optimizers(model, settings):
    """A list of optimizers that together hold every parameter.

    Only matrices inside the blocks decay: biases, norms and embeddings have no reason to be near
    zero. The book lets everything decay.
    """
    lr, decay = settings["lr"], settings["weight_decay"]
    if settings["optimizer"] == "adamw, book":
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, fused=True)]
    inside = {p for p in model.trf_blocks.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if p in inside]
    rest = [p for p in model.parameters() if p not in inside]
    if settings["optimizer"] == "muon":
        return [Muon(matrices, lr, weight_decay=decay, dtype=settings["dtype"]),
                # AdamW wants smaller steps than Muon.
                torch.optim.AdamW(rest, 0.15 * lr, betas=(0.9, 0.95), weight_decay=0, fused=True)]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": decay},
                               {"params": rest, "weight_decay": 0.0}],
                              lr=lr, betas=(0.9, 0.95), fused=True)]


def lr_factor(step, settings):
    """What the learning rate is multiplied by: a linear rise, then half a cosine down."""
    if step < settings["warmup_steps"]:
        return (step + 1) / settings["warmup_steps"]
    share = (step - settings["warmup_steps"]) / max(
        1, settings["total_steps"] - settings["warmup_steps"])
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return settings["final_lr_share"] + (1 - settings["final_lr_share"]) * cosine


@functools.lru_cache(maxsize=1)
def epoch_order(seed, epoch, num_rows):
    """The row numbers in a new order for each epoch, known from the seed."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def rows_of_step(step, num_rows, settings):
    """The row numbers of an optimizer step; the last one of an epoch may have fewer."""
    per_step = settings["batch_size"] * settings["grad_accum"]
    epoch, k = divmod(step, math.ceil(num_rows / per_step))
    return epoch_order(settings["seed"], epoch, num_rows)[k * per_step:(k + 1) * per_step]


def accumulate_gradients(model, train_rows, rows, settings, device, rank=0, world=1):
    """Forward and backward over the rows of one step, a batch at a time.

    Each process takes its share of every batch and returns its share of the mean loss. Losses are
    divided by the number of targets in the whole step, so many small batches, or many processes,
    give the same gradients as one large batch.
    """
    num_targets, step_loss = train_rows.count_targets(rows), 0.0
    batches = np.array_split(rows, math.ceil(len(rows) / settings["batch_size"]))
    for batch in batches:
        share = batch[rank::world]
        inputs, targets = train_rows.batch(share if len(share) else batch[:1], device)
        if not len(share):        # nothing left for this process, but the others wait for it
            targets.fill_(-100)
        # Gradients travel between processes once per step, with the last batch.
        wait = world > 1 and batch is not batches[-1]
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast(device, settings["dtype"]):
                logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                   reduction="sum") / num_targets
            # DistributedDataParallel takes the mean over processes; times world it is the sum.
            (loss * world).backward()
        step_loss += loss.detach()
    return float(step_loss)


@torch.no_grad()
def evaluate_rows(model, rows, bytes_of, settings, device, rank=0, world=1):
    """Over `rows`, without dropout -> (nats per token, bits per byte of text).

    Bits per byte compare models of different vocabularies: a token may stand for many bytes;
    `bytes_of` (V,) says for how many.
    """
    count = min(rows.num_rows, settings["eval_batches"] * settings["batch_size"])
    numbers = np.linspace(0, rows.num_rows - 1, count).astype(int)[rank::world]
    sums = torch.zeros(3, dtype=torch.float64)                        # nats, tokens, bytes
    model.eval()
    for start in range(0, len(numbers), settings["batch_size"]):
        inputs, targets = rows.batch(numbers[start:start + settings["batch_size"]], device)
        with autocast(device, settings["dtype"]):
            logits = model(inputs)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        real = targets[targets != -100].cpu()
        sums += torch.tensor([nats.item(), len(real), bytes_of[real].sum()])
    model.train()
    nats, tokens, num_bytes = sum_over_processes(sums, device)
    return nats / tokens, nats / num_bytes / math.log(2)


def bytes_per_token(tokenizer):
    """(V,): how many bytes of text each token stands for; none for special tokens."""
    lengths = torch.zeros(tokenizer.n_vocab, dtype=torch.long)
    for token in tokenizer.token_byte_values():
        lengths[tokenizer.encode_single_token(token)] = len(token)
    return lengths


def sum_over_processes(numbers, device):
    """A (N,) tensor -> the list of sums over all processes of torchrun."""
    numbers = numbers.to(device=device, dtype=torch.float32 if device.type == "mps" else None)
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def train_model(model, tokenizer, train_rows, val_rows, settings, device, out, saved=None):
    """Train until settings["total_steps"], evaluating and saving every settings["eval_every"].

    `saved` is the dictionary of a checkpoint to go on from: the run then ends with the very
    weights of one that was never interrupted. Raises UserError when the loss is not finite (the
    last checkpoint is kept) and KeyboardInterrupt after Ctrl-C, when the step is saved.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizers = make_optimizers(model, settings)
    peak_lrs = [[group["lr"] for group in o.param_groups] for o in optimizers]
    step, tokens, best, loss_sum, loss_steps = 0, 0, math.inf, 0.0, 0
    if saved:
        step, tokens, best = saved["step"], saved["tokens"], saved["best"]
        loss_sum, loss_steps = saved["losses"]
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    wrapped = torch.compile(model) if settings["compile"] else model
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, [device] if device.type == "cuda" else None)
    bytes_of = bytes_per_token(tokenizer)
    metrics = Metrics(out, step)
    per_epoch = math.ceil(train_rows.num_rows / settings["batch_size"] / settings["grad_accum"])
    progress = Progress(settings["total_steps"] / per_epoch * train_rows.num_targets, "tokens")
    model.train()
    start = time.monotonic()
    with CtrlC() as stop:
        while step < settings["total_steps"]:
            for optimizer, peaks in zip(optimizers, peak_lrs):
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * lr_factor(step, settings)
            # Dropout's random numbers follow from seed, step and process: nothing to save of them.
            torch.manual_seed(hash((settings["seed"], step, rank)))
            rows = rows_of_step(step, train_rows.num_rows, settings)
            loss = accumulate_gradients(wrapped, train_rows, rows, settings, device, rank, world)
            # One message for both: the whole loss, and whether any process saw a Ctrl-C.
            loss, pressed = sum_over_processes(torch.tensor([loss, stop.pressed]), device)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step + 1}; the last checkpoint is "
                                f"kept. Try a lower --lr than {settings['lr']:g}")
            if settings["clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if settings["compile"] and step == (saved["step"] if saved else 0):
                progress.close()
                print(f"torch.compile and the first step took {time.monotonic() - start:.0f} s")
            step, tokens = step + 1, tokens + train_rows.count_targets(rows)
            loss_sum, loss_steps = loss_sum + loss, loss_steps + 1
            progress.update(tokens, f"step {step} | loss {loss:.3f}")
            evaluate = step % settings["eval_every"] == 0 or step == settings["total_steps"]
            if evaluate:
                progress.close()
                val_loss, bits = evaluate_rows(model, val_rows, bytes_of, settings, device,
                                               rank, world)
                if not math.isfinite(val_loss):
                    raise UserError(f"the validation loss is {val_loss} at step {step}; the last "
                                    f"checkpoint is kept. Try a lower --lr than {settings['lr']:g}")
                if rank == 0:
                    metrics.add(step=step, tokens=tokens,
                                train_loss=round(loss_sum / loss_steps, 5),
                                val_loss=round(val_loss, 5), bits_per_byte=round(bits, 5))
                    print_evaluation(model, tokenizer, settings, device, metrics.rows[-1])
                    if val_loss < best:
                        save_checkpoint(best_path(out), model, tokenizer, step=step)
                best, loss_sum, loss_steps = min(best, val_loss), 0.0, 0
            if (evaluate or pressed) and rank == 0:
                save_checkpoint(out, model, tokenizer, step=step, tokens=tokens, best=best,
                                losses=[loss_sum, loss_steps], settings=plain(settings),
                                optimizers=[o.state_dict() for o in optimizers])
            if pressed:
                progress.close()
                print(f"step {step} is saved; go on with the same command and --resume")
                raise KeyboardInterrupt
    if rank == 0:
        metrics.plot()


def plain(settings):
    """The settings as a checkpoint may hold them: numbers, strings and the like."""
    return {**settings, "dtype": str(settings["dtype"]).removeprefix("torch.")}


def print_evaluation(model, tokenizer, settings, device, row):
    """A line of numbers, and how the model continues the preset's prompt, greedily."""
    print(f"step {row['step']:5d} | train loss {row['train_loss']:.3f} | val loss "
          f"{row['val_loss']:.3f} | perplexity {math.exp(min(row['val_loss'], 99)):.1f} | "
          f"{row['bits_per_byte']:.3f} bits/byte")
    idx = text_to_token_ids(settings["prompt"], tokenizer).to(device)
    ids = generate(model, idx, 60, model.cfg["context_length"], eos_id=tokenizer.eot_token)
    text = printable(token_ids_to_text(ids, tokenizer))
    print("           " + " ".join(text.split()), flush=True)


# ---------------------------------------------------------------------------------------------
# python pretrain.py --benchmark

def seconds(function, device, repeats):
    """The time one call takes, the best of `repeats` after a first one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def benchmark(args, preset, device):
    """Print tokens/s in training and generation, and what the machine could do at best.

    A token costs 6 operations per weight of a matrix (2 forward, 4 backward) and 12 n_layers T C
    for attention (Chowdhery et al. 2022, appendix B). Generating one reads every matrix once.
    """
    torch.manual_seed(args.seed)
    tokenizer = args.tokenizer or preset["tokenizer"]
    model = make_model(args, preset, 50257 if tokenizer == "gpt2" else
                       load_tokenizer(tokenizer).n_vocab).to(device)
    cfg, T = model.cfg, model.cfg["context_length"]
    num_matrix = sum(p.numel() for name, p in model.named_parameters()
                     if p.ndim == 2 and "emb" not in name)
    num_matrix += cfg["vocab_size"] * cfg["emb_dim"] * bool(cfg.get("tie_embeddings"))
    rows = TokenRows(np.random.default_rng(0).integers(0, cfg["vocab_size"], 64 * T + 1), T)
    buffer = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    bandwidth = buffer.numel() * 4 / seconds(buffer.sum, device, 30)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{name}, torch {torch.__version__}, memory read at {bandwidth / 1e9:.0f} GB/s\n"
          f"{sum(p.numel() for p in model.parameters()):,} parameters, context {T}\n"
          "dtype     batch  train tokens/s  of matmul peak  generate tokens/s  of bandwidth  GB")
    for dtype in (torch.float32, torch.bfloat16):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        settings = {**preset, "batch_size": args.batch_size or preset["batch_size"],
                    "dtype": dtype, "lr": 1e-4}
        optimizers = make_optimizers(model, settings)
        trained = torch.compile(model) if args.compile else model

        def step():
            accumulate_gradients(trained, rows, np.arange(settings["batch_size"]), settings, device)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        n = 1024 if device.type == "cpu" else 8192
        a = torch.ones(n, n, device=device, dtype=dtype)
        peak = 2 * n**3 / seconds(lambda: a @ a, device, 30)
        train = settings["batch_size"] * T / seconds(step, device, 3)
        used = train * (6 * num_matrix + 12 * cfg["n_layers"] * T * cfg["emb_dim"]) / peak
        writer = copy.deepcopy(model).to(dtype)
        idx = torch.zeros(1, max(1, min(8, T // 2)), dtype=torch.long, device=device)
        new = max(1, min(64, T - 8))
        tokens = new / seconds(lambda: generate(writer, idx, new, T), device, 1)
        read = tokens * num_matrix * dtype.itemsize / bandwidth
        memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                  else peak_memory())
        print(f"{plain(settings)['dtype']:8s} {settings['batch_size']:6d} {train:15,.0f} "
              f"{100 * used:13.0f} % {tokens:18,.1f} {100 * read:11.0f} % {memory / 1e9:3.1f}",
              flush=True)


def peak_memory():
    """The most memory in bytes that this process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------
# python pretrain.py

@contextlib.contextmanager
def first_process_first():
    """The first process does what is in the block, such as writing a file; then the others."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def join_processes(device):
    """Under torchrun join the other processes; return the torch.device of this one.

    Each process runs this whole script. Only the first one prints.
    """
    if "LOCAL_RANK" not in os.environ:
        return pick_device(device)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(days=1))  # a large text takes its time
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def parse_arguments(argv):
    """The command line; what is not given there comes from the preset."""
    parser = ArgumentParser(description="Pretrain a GPT. Numbers that are not given come from the "
                            "preset, a table at the top of this file.")
    arg = parser.add_argument
    arg("--preset", choices=list(PRESETS), default="quick", help="which recipe")
    arg("--data", type=Path, nargs="+", help="files and folders of UTF-8 text instead of the "
        "preset's own")
    arg("--init", type=Path, help="checkpoint to start from instead of random weights")
    arg("--tokenizer", help="gpt2, bytes, or a file made by: python tokenizer.py train")
    arg("--size", choices=list(GPT2_SIZES), help="width, depth and heads of a published GPT-2")
    for name in ("context_length", "emb_dim", "n_layers", "n_heads"):
        arg("--" + name.replace("_", "-"), type=positive_int, help=f"{name} of the model")
    arg("--prompt", help="what each evaluation continues; default: the preset's, or with --data "
        "the beginning of the held-out part")
    arg("--val-share", type=float, default=0.1, help="last part of the tokens, held out")
    arg("--compile", action="store_true", help="let torch.compile rewrite the model first")
    arg("--benchmark", action="store_true", help="no training, but a table of speeds")
    arg("--eval-batches", type=positive_int, default=200, help="most batches in an evaluation, "
        "spread evenly over the held-out part")
    add_training_arguments(parser, "checkpoints/pretrained.pt", None, None, None, None, None)
    args = parser.parse_args(argv)
    if not 0 < args.val_share < 1:
        parser.error("argument --val-share: it must lie between 0 and 1")
    if args.init and (args.tokenizer or args.size or args.emb_dim or args.n_layers
                      or args.n_heads or args.context_length):
        parser.error("--init brings its own tokenizer and sizes; leave out the flags for those")
    return args


def make_model(args, preset, vocab_size):
    """A fresh model of the preset, changed by the command line's sizes."""
    cfg = {**preset["config"], **GPT2_SIZES.get(args.size, {}), "vocab_size": vocab_size}
    cfg.update({name: getattr(args, name) for name in cfg if getattr(args, name, None)})
    if cfg["emb_dim"] % cfg["n_heads"]:
        raise UserError(f"emb_dim {cfg['emb_dim']} cannot be shared out among {cfg['n_heads']} "
                        "heads; change --emb-dim or --n-heads")
    model = GPTModel(cfg)
    if preset["init_weights"] != "torch":  # narrower models than GPT-2 want larger numbers
        init_gpt2_weights(model, std=0.04 if preset["init_weights"] == "sines" else 0.02)
    if preset["init_weights"] == "sines":
        init_sine_positions(model)
    return model


def make_settings(args, preset, train_rows):
    """The preset with what the command line says, and the number of steps that follows."""
    settings = {name: value for name, value in preset.items() if name != "config"}
    if args.init:
        settings.update(CONTINUE)
    if args.epochs or args.max_steps:  # whoever asks for one of them gets all of it
        settings["epochs"] = settings["max_steps"] = None
    for name in ("tokenizer", "batch_size", "grad_accum", "epochs", "max_steps", "lr", "eval_every",
                 "prompt"):
        settings[name] = getattr(args, name) or settings[name]
    settings.update(seed=args.seed, eval_batches=args.eval_batches, compile=args.compile)
    per_epoch = math.ceil(train_rows.num_rows / (settings["batch_size"] * settings["grad_accum"]))
    epochs = settings["epochs"] * per_epoch if settings["epochs"] else math.inf
    settings["total_steps"] = min(epochs, settings["max_steps"] or math.inf)
    settings["warmup_steps"] = min(settings["warmup_steps"], settings["total_steps"] // 10)
    settings["fingerprint"] = train_rows.fingerprint()
    return settings


def check_resume(saved, settings, args):
    """Raise UserError when the run in the checkpoint is not the one the command line describes."""
    path, before, cfg = args.out, saved.get("settings"), saved["config"]
    if not before:
        raise UserError(f"{path} is not a run of pretrain.py that can go on; start from its "
                        f"weights with: --init {path}")
    names = {"fingerprint": "text or --val-share", "total_steps": "--epochs or --max-steps",
             **dict.fromkeys(("optimizer", "init_weights", "weight_decay", "warmup_steps", "clip",
                              "final_lr_share"), "--preset or --init")}
    for name, now in settings.items():
        if name in before and before[name] != now and name not in (
                "epochs", "max_steps", "eval_every", "eval_batches", "prompt", "compile", "dtype"):
            name = names.get(name, "--" + name.replace("_", "-"))
            raise UserError(f"{path} is a run with another {name}; repeat its command, or start "
                            f"anew from its weights with: --init {path}")
    sizes = dict(GPT2_SIZES.get(args.size, {}))
    sizes.update({name: getattr(args, name) for name in cfg if getattr(args, name, None)})
    for name, value in sizes.items():
        if value != cfg[name]:
            raise UserError(f"{path} is a run with {name} {cfg[name]}; repeat its command")


def main(argv=None):
    """Text -> tokens -> model -> training -> checkpoint."""
    args = parse_arguments(argv)
    preset = PRESETS[args.preset]
    device = join_processes(args.device)
    torch.set_float32_matmul_precision("high")  # on a GPU, TF32 for what stays float32
    keep_freed_memory(largest=1 << 30)          # each step frees and takes blocks of equal sizes
    if args.benchmark:
        return benchmark(args, preset, device)
    torch.manual_seed(args.seed)
    saved = None
    with first_process_first():
        check_output(args.out)
        documents_name, documents, stamp = find_documents(args.preset, args.data)
        if args.resume and args.out.exists():
            model, tokenizer, saved = load_checkpoint(args.out)
        elif args.init:
            model, tokenizer, _ = load_checkpoint(args.init)
        else:
            tokenizer = load_tokenizer(args.tokenizer or preset["tokenizer"])
            model = make_model(args, preset, tokenizer.n_vocab)
        tokens = tokens_on_disk(documents, stamp, tokenizer)
    train_rows, val_rows = split_tokens(tokens, model.cfg["context_length"], args.val_share,
                                        documents_name)
    settings = make_settings(args, preset, train_rows)
    if args.data and not args.prompt:
        settings["prompt"] = tokenizer.decode(val_rows.tokens[:30].tolist())[:30]
    settings["dtype"] = pick_dtype(args.dtype, device)
    [slow] = sum_over_processes(torch.tensor([settings["dtype"] == torch.float32]).float(), device)
    if slow:  # processes that measured differently must agree
        settings["dtype"] = torch.float32
    if saved:
        check_resume(saved, settings, args)
        # The choice of `auto` depends on a measurement; a resumed run keeps it.
        if args.dtype == "auto":
            settings["dtype"] = getattr(torch, saved["settings"]["dtype"])
    model.to(device)
    cfg = model.cfg
    print(f"text     {documents_name}: {train_rows.num_targets + 1:,} tokens ({tokenizer.name}) "
          f"to train, {val_rows.num_targets + 1:,} held out\n"
          f"model    {sum(p.numel() for p in model.parameters()):,} parameters: {cfg['n_layers']} "
          f"blocks, {cfg['emb_dim']} wide, {cfg['n_heads']} heads, context "
          f"{cfg['context_length']}\n"
          f"run      {settings['total_steps']:,} steps of {settings['batch_size']} x "
          f"{settings['grad_accum']} rows, {device}, {plain(settings)['dtype']}"
          + (f", from step {saved['step']:,}" if saved else "")
          + f"\nA blind guess has a loss of ln {cfg['vocab_size']:,} = "
          f"{math.log(cfg['vocab_size']):.2f}.", flush=True)
    train_model(model, tokenizer, train_rows, val_rows, settings, device, args.out, saved)
    print(f"saved    {args.out} (newest), {best_path(args.out).name} (lowest validation loss), "
          f"{beside(args.out, '.csv').name}\n\nIt writes (temperature 0.8):")
    idx = text_to_token_ids(settings["prompt"], tokenizer).to(device)
    ids = generate(model, idx, 300, cfg["context_length"], temperature=0.8, seed=args.seed,
                   eos_id=tokenizer.eot_token)
    print(printable(token_ids_to_text(ids, tokenizer)))
    prompt = printable(settings["prompt"])
    prompt = shlex.quote(prompt) if set(prompt) & set('"$`\\!\n') else f'"{prompt}"'
    print(f"\nNext: python gpt.py --checkpoint {args.out} --prompt {prompt}")


if __name__ == "__main__":
    run_main(main)
