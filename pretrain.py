"""Pretraining: teach a GPT to predict the next token, on your text or on the one Python ships.

    python pretrain.py                                   two minutes on a laptop, nothing downloaded
    python pretrain.py --data my_texts/ --out checkpoints/mine.pt
    python pretrain.py --preset verdict                  Raschka's run (his book's chapter 5)
    python pretrain.py --preset gpt2 --data corpus/ --device cuda
    torchrun --nproc-per-node 2 pretrain.py              the same run, shared by two processes

Writes checkpoints/pretrained.pt and .csv. Shapes as in gpt.py: B rows, T tokens, V vocabulary.
"""

import itertools
import math
import os
import shlex
import sys
from datetime import timedelta
from glob import glob
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from gpt import (
    GPT2_SIZES, GPT_CONFIG_124M, VERDICT, VERDICT_SHA256, VERDICT_URLS, ArgumentParser, GPTModel,
    Progress, TrainingRun, UserError, add_training_arguments, autocast, check_output, download,
    fingerprint, generate, generate_text_simple, keep_freed_memory, load_checkpoint, load_tokenizer,
    pick_device, pick_dtype, positive_int, probability, process_number, read_text_pieces, run_main,
    say, sum_over_processes, text_to_token_ids, token_ids_to_text, tokenizer_to_spec,
    write_atomically)

# ---------------------------------------------------------------------------------------------
# The data. Predicting the next token needs no labels: the text itself says what comes next. Each
# position of a row is one exercise: all tokens up to it are given, the one after it is the answer.
# "In the heart of" makes three:  In -> the,  In the -> heart,  In the heart -> of.

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
# A nat is the unit of natural logarithms, and e to the loss is the perplexity: with e^1.034 = 2.8,
# the model hesitates as if between 2.8 equally likely tokens. Tokens of different vocabularies
# cannot be compared, bytes of text can: divided by ln 2 and by the bytes in a token, the loss is in
# bits per byte, which is also how small the model could compress the text.

def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy of a batch in nats per token, a tensor to call backward() on. 5.1.3."""
    logits = model(input_batch.to(device))  # (B, T, V); cross_entropy makes them probabilities
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none. 5.1.3."""
    losses = [calc_loss_batch(inputs, targets, model, device).item()
              for inputs, targets in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


@torch.no_grad()
def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """(training loss, validation loss of a held-out text), over `eval_iter` batches each. 5.2."""
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
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    model.train()


def train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                       eval_iter, start_context, tokenizer):
    """The loop one would explain first -> training losses, validation losses, tokens seen. 5.2."""
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
# What the loop that runs adds: a schedule, clipping, accumulation, weight decay, and better initial
# values. The numbers are starting points to play with. The first preset takes two minutes on two
# cores: its 3 blocks of width 192 reach 1.21 nats per byte, 6 of width 128 only 1.27.

QUICK = {
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

# With --init the weights are good already and want small steps.
CONTINUE = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 50, "clip": 1.0}


def init_gpt2_weights(model, std, sines=False):
    """GPT-2's initial values: normal, `std` wide.

    Each block adds to the shortcut twice. The matrices that do are divided by the root of
    2 n_layers, so the sum is equally large at any depth (Radford et al. 2019, section 2.3).
    `sines` makes the positions waves of many lengths (Vaswani et al. 2017, section 3.5): neighbours
    look alike, and attention soon finds the previous token.
    """
    for name, p in model.named_parameters():
        if p.ndim == 2:
            adds = name.endswith(("att.out_proj.weight", "ff.layers.2.weight"))
            torch.nn.init.normal_(p, std=std / math.sqrt(2 * model.cfg["n_layers"] if adds else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)

    if sines:
        T, C = model.pos_emb.weight.shape
        angles = torch.arange(T)[:, None] / (2 * T) ** (torch.arange(0, C, 2) / C)   # (T, C / 2)
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :C]
        model.pos_emb.weight.data.copy_(0.1 * waves)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the matrices inside the model. Jordan et al. 2024.

    A gradient matrix mostly points in few directions. Muon averages gradients over steps
    (momentum). Then it gives all directions one length. So what is rare is learned as fast as what
    is common. torch.optim.Muon does the same, but in bfloat16, which many CPUs only emulate.
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
                average = self.state[p]["average"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(average, group["momentum"]))

                # Weight decay, then the step; tall matrices take longer ones.
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def orthogonal(self, update):
        """Give all directions a length (singular value) near 1: five times a polynomial."""
        X = update.to(self.dtype) / (update.norm() + 1e-7)  # no length is above 1
        tall = X.shape[0] > X.shape[1]
        X = X.T if tall else X
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return (X.T if tall else X).to(update.dtype)


def make_optimizers(model, optimizer, lr, weight_decay, dtype):
    """A list of optimizers that together hold every parameter.

    Weight decay pulls numbers to zero, so that only those the data needs grow large. Biases, norms
    and embeddings have no reason to be near zero (the book lets everything decay).
    """
    if optimizer == "adamw, book":
        return [AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)]

    matrices = [p for p in model.trf_blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    common = {"betas": (0.9, 0.95), "fused": True}
    if optimizer == "muon":  # AdamW wants smaller steps than Muon
        return [Muon(matrices, lr, weight_decay=weight_decay, dtype=dtype),
                AdamW(rest, 0.15 * lr, weight_decay=0, **common)]
    return [AdamW(matrices, lr, weight_decay=weight_decay, **common),
            AdamW(rest, lr, weight_decay=0, **common)]


def lr_factor(step, total_steps, warmup_steps, final_lr_share):
    """What the learning rate is multiplied by: a linear rise, then half a cosine down."""
    # At first gradients are wild, so steps are small; at the end small steps let weights settle.
    warmup_steps = min(warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final_lr_share + (1 - final_lr_share) * (1 + math.cos(math.pi * share)) / 2


def train_model(model, train_rows, run, optimizers, args, device, dtype, evaluate):
    """The loop that runs. `run` (gpt.py) shuffles the rows, evaluates without dropout, saves.

    Accumulation: a large batch gives steadier gradients but may not fit in memory, so the gradients
    of `grad_accum` batches add up. All have the same number of targets, so loss / grad_accum gives
    the gradient of one large batch. Clipping shortens the rare, very long gradient that would throw
    the weights off.
    """
    rank, world = process_number()
    wrapped = torch.compile(model) if args.compile else model
    if world > 1:  # averages the gradients over the processes
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)

    for step in run.steps(evaluate):
        # The learning rate of this step.
        factor = lr_factor(step, run.total_steps, args.warmup_steps, args.final_lr_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                peak = group.setdefault("initial_lr", group["lr"])  # is stored at the first step
                group["lr"] = factor * peak

        # Gradients, a batch at a time. Each process reads its share of the batch.
        step_loss = 0.0
        batches = np.split(run.rows_of_step(step, len(train_rows)), args.grad_accum)
        for i, rows in enumerate(batches):
            if world > 1:  # gradients are exchanged at the last batch only
                wrapped.require_backward_grad_sync = i == args.grad_accum - 1
            inputs, targets = train_rows.batch(rows[rank::world], device)
            with autocast(device, dtype):
                loss = calc_loss_batch(inputs, targets, wrapped, device) / args.grad_accum
            loss.backward()
            step_loss += loss.detach()

        # Clip, then step.
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.record(step_loss / world, inputs.numel() * args.grad_accum)


# =============================================================================================
# The lesson ends here. What follows: tokens on disk, several processes, the command.
# =============================================================================================

def find_documents(preset, data):
    """-> (name, list of documents, each in pieces of text, stamp that changes when the text does).

    `data` are files and folders; None: the preset's own text. Raises UserError, OSError.
    """
    if not data and preset == "gpt2":
        raise UserError("the preset gpt2 trains on your own text; name it: --data FILE-OR-FOLDER")
    if not data and preset == "quick":  # the manual that every CPython carries for its help()
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python has no pydoc_data; give a text: --data FILE") from None
        return "Python's reference manual", [[text] for text in topics.values()], topics

    paths = []
    for path in data or [download(VERDICT_URLS, VERDICT, VERDICT_SHA256)]:
        inside = sorted(path / name for name in glob("**", root_dir=path, recursive=True))
        full = [p for p in inside if p.is_file() and p.stat().st_size]
        paths += full if path.is_dir() else [path]
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    return name, [read_text_pieces(p) for p in paths], stamp


def tokens_on_disk(documents, stamp, tokenizer):
    """Write all documents as token IDs, each closed by `<|endoftext|>` -> (path, dtype).

    Once, piece by piece; the name depends on text and tokenizer. The four files last used are kept.
    """
    path = Path("data") / f"tokens-{fingerprint(stamp, tokenizer_to_spec(tokenizer))}.bin"
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    if not path.exists():
        progress = Progress(None, "million tokens")
        with write_atomically(path) as part, open(part, "wb") as file:
            for document in documents:
                for piece in document:
                    # Special tokens in the text count as plain text.
                    ids = tokenizer.encode_to_numpy(piece, disallowed_special=())
                    ids.astype(dtype).tofile(file)
                    progress.update(file.tell() / dtype.itemsize / 1e6, "turning text into tokens")
                np.array([tokenizer.eot_token], dtype).tofile(file)
        progress.close()

    os.utime(path)
    for old in sorted(path.parent.glob("tokens-*.bin"), key=os.path.getmtime)[:-4]:
        old.unlink(missing_ok=True)
    return path, dtype


class TokenRows:
    """The tokens `first` to `last` of a file in whole rows of T, each read when it is needed."""

    def __init__(self, path, dtype, first, last, T):
        self.path, self.dtype, self.T = path, np.dtype(dtype), T
        self.starts = range(first, last - T, T)

    def __len__(self):
        return len(self.starts)

    def batch(self, rows, device="cpu"):
        """Row numbers (B,) -> inputs (B, T), targets (B, T)."""
        os.utime(self.path)  # it is in use: `tokens_on_disk` deletes what is not
        offsets = [self.starts[row] * self.dtype.itemsize for row in rows]
        block = [np.fromfile(self.path, self.dtype, self.T + 1, offset=at) for at in offsets]
        block = torch.tensor(np.array(block, np.int64).reshape(-1, self.T + 1), device=device)
        return block[:, :-1], block[:, 1:]


def cut_tokens(path, dtype, name, T, args):
    """A file of tokens -> (rows to train, rows held out: the last part). Raises UserError."""
    num_tokens = path.stat().st_size // dtype.itemsize
    cut = int(num_tokens * (1 - args.val_share))
    train_rows = TokenRows(path, dtype, 0, cut, T)
    val_rows = TokenRows(path, dtype, cut, num_tokens, T)
    if len(train_rows) < args.batch_size * args.grad_accum or not len(val_rows):
        raise UserError(f"the text of {name} is too short: {num_tokens} tokens for rows of {T}; "
                        "add text, or lower --context-length, --batch-size or --grad-accum")
    say(f"text     {name}: {cut:,} tokens to train, {num_tokens - cut:,} held out")
    return train_rows, val_rows


def make_model(args):
    """-> (model, tokenizer): those of --init, or fresh ones. Raises UserError."""
    if args.init:
        return load_checkpoint(args.init)[:2]
    if args.emb_dim % args.n_heads:
        raise UserError(f"--emb-dim {args.emb_dim} cannot be shared out among {args.n_heads} heads")
    tokenizer = load_tokenizer(args.tokenizer)
    cfg = {name: getattr(args, name, value) for name, value in GPT_CONFIG_124M.items()}
    cfg.update(vocab_size=tokenizer.n_vocab, tie_embeddings=args.tie_embeddings)
    model = GPTModel(cfg)

    if args.init_weights == "gpt2":
        init_gpt2_weights(model, std=0.02)
    if args.init_weights == "sines":  # narrower models than GPT-2 want larger numbers
        init_gpt2_weights(model, std=0.04, sines=True)
    return model, tokenizer


@torch.no_grad()
def evaluate_rows(model, rows, tokenizer, args, device, dtype):
    """-> {"val_loss" in nats per token, "perplexity", "bits_per_byte", "sample"}."""
    # At most --eval-batches batches, spread evenly; each process takes its share.
    rank, world = process_number()
    count = min(len(rows), args.eval_batches * args.batch_size)
    numbers = np.linspace(0, len(rows) - 1, count).astype(int)[rank::world]

    # Add up the losses, and the bytes of text that the targets stand for.
    nats = num_bytes = 0
    for start in range(0, len(numbers), args.batch_size):
        inputs, targets = rows.batch(numbers[start:start + args.batch_size], device)
        with autocast(device, dtype):
            nats += calc_loss_batch(inputs, targets, model, device).item() * targets.numel()
        text = targets[targets != tokenizer.eot_token]
        num_bytes += len(tokenizer.decode_bytes(text.tolist()))
    nats, num_bytes = sum_over_processes([nats, num_bytes], device)
    loss = nats / (count * rows.T)

    # What the model writes, drawn at temperature 0.8: always the likeliest would repeat itself.
    idx = text_to_token_ids(args.prompt or "<|endoftext|>", tokenizer).to(device)
    ids = generate(model, idx, 100, rows.T, 0.8, seed=args.seed, eos_id=tokenizer.eot_token)
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 99)),
            "bits_per_byte": nats / num_bytes / math.log(2),
            "sample": " ".join(token_ids_to_text(ids, tokenizer).split())}


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
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def parse_arguments(argv):
    """The command line; what is not given there comes from the preset."""
    parser = ArgumentParser(description="Pretrain a GPT. The defaults are those of the preset.")
    arg = parser.add_argument
    arg("--preset", choices=list(PRESETS), default="quick", help="which recipe")
    arg("--data", type=Path, nargs="+", help="UTF-8 files and folders instead of the preset's text")
    arg("--init", type=Path, help="checkpoint to start from instead of random weights")
    arg("--size", choices=list(GPT2_SIZES), help="width, depth and heads of a published GPT-2")

    arg("--tokenizer", help="gpt2, bytes, or a file made by: python tokenizer.py train")
    for name in ("--context-length", "--emb-dim", "--n-layers", "--n-heads"):
        arg(name, type=positive_int, help="of a fresh model")
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
        fresh = ("size", "tokenizer", "context_length", "emb_dim", "n_layers", "n_heads")
        if any(vars(given)[name] for name in fresh):
            parser.error("--init brings its own tokenizer and sizes; leave out the flags for those")

    if given.data:
        defaults["prompt"] = None
    if given.epochs or given.max_steps:  # a given one replaces both of the preset's
        defaults.update(epochs=None, max_steps=None)
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def main(argv=None):
    """Text -> tokens -> model -> training -> checkpoint."""
    args = parse_arguments(argv)
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
    name, documents, stamp = find_documents(args.preset, args.data)
    model, tokenizer = make_model(args)
    path, token_dtype = tokens_on_disk(documents, stamp, tokenizer)
    train_rows, val_rows = cut_tokens(path, token_dtype, name, model.cfg["context_length"], args)
    if rank == 0 and world > 1:
        dist.barrier()
    if args.prompt is None:
        start, _ = val_rows.batch([0])
        args.prompt = token_ids_to_text(start[0, :30], tokenizer)[:30].strip("\ufffd")

    # The run.
    model.to(device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, dtype)
    per_epoch = len(train_rows) // (args.batch_size * args.grad_accum)
    settings = {"data": fingerprint(stamp), "tokenizer": fingerprint(tokenizer_to_spec(tokenizer))}
    run = TrainingRun(args, model, tokenizer, optimizers, per_epoch, settings)

    # Say what is trained, train it, and say how to use it.
    sizes = "{n_layers} blocks, {emb_dim} wide, {n_heads} heads, context {context_length}"
    V, size = model.cfg["vocab_size"], sum(p.numel() for p in model.parameters())
    say(f"model    {size:,} parameters: {sizes.format(**model.cfg)}")
    say(f"loss     in nats per token; a blind guess among {V:,} has ln {V:,} = {math.log(V):.2f}. "
        "Perplexity is e\n         to the loss: among how many tokens the model hesitates")
    train_model(model, train_rows, run, optimizers, args, device, dtype, lambda: evaluate_rows(
        model, val_rows, tokenizer, args, device, dtype))
    run.finish()
    say(f"\nNext: python gpt.py --checkpoint {args.out} --prompt={shlex.quote(args.prompt)}")


if __name__ == "__main__":
    run_main(main)
