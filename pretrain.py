"""Pretraining: teach a GPT to predict the next token, on your text or on the one Python ships.

    python pretrain.py                                   two minutes on a laptop, nothing downloaded
    python pretrain.py --data my_texts/ --out checkpoints/mine.pt
    python pretrain.py --preset verdict                  the book's run (chapter 5)
    python pretrain.py --preset gpt2 --data corpus/ --device cuda
    torchrun --nproc-per-node 2 pretrain.py              the same run, shared by two processes

Reads text, writes checkpoints/pretrained.pt (the model with the lowest validation loss) and
pretrained.csv (the metrics). Shapes as in gpt.py: B rows, T tokens, V vocabulary.
"""

import contextlib
import datetime
import itertools
import math
import os
import shlex
import sys
from glob import glob
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from gpt import (
    GPT2_SIZES, GPT_CONFIG_124M, VERDICT, VERDICT_SHA256, VERDICT_URLS, ArgumentParser, GPTModel,
    Progress, TrainingRun, UserError, add_training_arguments, argument, autocast, check_output,
    download, fingerprint, generate, generate_text_simple, keep_freed_memory, load_checkpoint,
    load_tokenizer, pick_device, pick_dtype, positive_int, process_number, read_text_pieces,
    run_main, say, sum_over_processes, text_to_token_ids, token_ids_to_text, tokenizer_to_spec,
    write_atomically)

# ---------------------------------------------------------------------------------------------
# The data. Predicting the next token needs no labels: the text itself says what comes next, so any
# text can be learned from. Each position of a row is one exercise: all tokens up to it are given,
# and the token after it is the answer. From the four tokens  In the heart of  come the exercises
# In -> the,  In the -> heart,  In the heart -> of.

class GPTDatasetV1(Dataset):
    """Text cut into rows of `max_length` tokens, a row every `stride`. Book section 2.6.

    Item i is (input, target), both (max_length,); the target is the input moved on by one token.
    Raises ValueError when the text has no `max_length` + 1 tokens.
    """

    def __init__(self, txt, tokenizer, max_length, stride):
        tokens = text_to_token_ids(txt, tokenizer)[0]
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
    logits = model(input_batch.to(device))                            # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none. 5.1.3."""
    losses = [calc_loss_batch(inputs, targets, model, device).item()
              for inputs, targets in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """(training loss, validation loss), each over `eval_iter` batches, without dropout. 5.2.

    The validation text is held out: a text that was only learned by heart does not help there.
    """
    model.eval()
    with torch.no_grad():
        train_loss = calc_loss_loader(train_loader, model, device, eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, eval_iter)
    model.train()
    return train_loss, val_loss


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print how the model continues `start_context`, 50 tokens, greedily. Section 5.2."""
    model.eval()
    idx = text_to_token_ids(start_context, tokenizer).to(device)
    ids = generate_text_simple(model, idx, max_new_tokens=50,
                               context_size=model.pos_emb.weight.shape[0])
    print(token_ids_to_text(ids, tokenizer).replace("\n", " "))
    model.train()


# ---------------------------------------------------------------------------------------------
# The loop one would explain first.

def train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                       eval_iter, start_context, tokenizer):
    """Train for `num_epochs` passes over the text; `train_model` below is what runs. Section 5.2.

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

            # Now and then, look how far it is.
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
# What the loop that runs adds: a schedule, clipping, accumulation, weight decay, and better initial
# values. The numbers are starting points to play with; nearly all have a flag of the same name.

PRESETS = {
    # A model for two minutes on two cores. Measured in 85 s: 3 blocks of width 192 and 4 of 128
    # reach 1.22 nats per byte, 6 of 128 and 4 of 192 reach 1.30.
    "quick": {
        "context_length": 256, "emb_dim": 192, "n_heads": 3, "n_layers": 3,
        "drop_rate": 0.0,            # share of activations that training zeroes
        "tie_embeddings": True,
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
        **GPT_CONFIG_124M, "context_length": 256, "tie_embeddings": False, "tokenizer": "gpt2",
        "init_weights": "torch", "optimizer": "adamw, book",
        "batch_size": 2, "grad_accum": 1, "epochs": 10, "max_steps": None, "lr": 4e-4,
        "warmup_steps": 0, "final_lr_share": 1.0, "weight_decay": 0.1, "clip": None,
        "eval_every": 18, "prompt": "Every effort moves you"},
    # GPT-2's recipe (Radford et al. 2019; Brown et al. 2020, appendix B) for your own large text.
    "gpt2": {
        **GPT_CONFIG_124M, "drop_rate": 0.0, "tie_embeddings": True, "tokenizer": "gpt2",
        "init_weights": "gpt2", "optimizer": "adamw",
        "batch_size": 8, "grad_accum": 8, "epochs": 1, "max_steps": None, "lr": 6e-4,
        "warmup_steps": 200, "final_lr_share": 0.1, "weight_decay": 0.1, "clip": 1.0,
        "eval_every": 100, "prompt": "Every effort moves you"},
}
# With --init the weights are good already and want small steps.
CONTINUE = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 50, "clip": 1.0}


def init_gpt2_weights(model, std):
    """GPT-2's initial values: normal, `std` wide; smaller where a block adds to the shortcut.

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
    which token is the one before.
    """
    T, C = model.pos_emb.weight.shape
    angles = torch.arange(T)[:, None] / (2 * T) ** (torch.arange(0, C, 2) / C)     # (T, C / 2)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :C]
    model.pos_emb.weight.data.copy_(size * waves)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the matrices inside the model. Jordan et al. 2024.

    A gradient matrix mostly points in few directions, those that the data stresses most. Muon
    averages gradients over steps (momentum) and then makes the average orthogonal: all its
    directions get one length. So rare directions are learned as fast as common ones. After 400
    steps of the quick preset with 4 blocks the loss is 1.49, with AdamW 2.02. torch.optim.Muon does
    the same, but always in bfloat16, which is slow on a processor that only emulates it.
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
        tall = X.shape[0] > X.shape[1]
        X = X.T if tall else X
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return (X.T if tall else X).to(update.dtype)


def make_optimizers(model, optimizer, lr, weight_decay, dtype):
    """A list of optimizers that together hold every parameter.

    Weight decay pulls numbers to zero, so that only those grow large which the data needs. It is
    for the matrices inside the blocks: biases, norms and embeddings have no reason to be near zero
    (the book lets everything decay).
    """
    if optimizer == "adamw, book":
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)]
    inside = {p for p in model.trf_blocks.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if p in inside]
    rest = [p for p in model.parameters() if p not in inside]
    if optimizer == "muon":  # AdamW wants smaller steps than Muon
        return [Muon(matrices, lr, weight_decay=weight_decay, dtype=dtype),
                torch.optim.AdamW(rest, 0.15 * lr, betas=(0.9, 0.95), weight_decay=0, fused=True)]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                               {"params": rest, "weight_decay": 0.0}],
                              lr=lr, betas=(0.9, 0.95), fused=True)]


def lr_factor(step, total_steps, warmup_steps, final_lr_share):
    """What the learning rate is multiplied by: a linear rise, then half a cosine down.

    At first nothing is known and gradients are wild, so steps are small; in the end small steps let
    the weights settle.
    """
    warmup_steps = min(warmup_steps, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return final_lr_share + (1 - final_lr_share) * cosine


def train_model(model, train_rows, run, optimizers, args, device, dtype, evaluate):
    """The loop that runs. `run` (gpt.py) seeds each step, evaluates, saves, resumes.

    Accumulation: a large batch gives steadier gradients than memory allows at once, so the batches
    of a step are read one after the other and their gradients add up. Each loss is divided by the
    number of targets in the whole step, and so the sum is that of one large batch. Clipping: a
    rare, very long gradient would throw the weights off; it is shortened to the length `clip`.
    """
    rank, world = process_number()
    wrapped = torch.compile(model) if args.compile else model
    if world > 1:  # averages the gradients over the processes
        wrapped = DistributedDataParallel(wrapped, [device] if device.type == "cuda" else None)
    num_targets = args.batch_size * args.grad_accum // world * train_rows.T

    for step in run.steps(evaluate):
        # The learning rate of this step.
        factor = lr_factor(step, run.total_steps, args.warmup_steps, args.final_lr_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

        # Gradients, a batch at a time. Each process reads its share of every batch, and sends its
        # gradients to the others once per step, with the last batch.
        step_loss = 0.0
        for i, rows in enumerate(np.split(run.rows_of_step(step, len(train_rows)),
                                          args.grad_accum)):
            inputs, targets = train_rows.batch(rows[rank::world], device)
            wait = world > 1 and i < args.grad_accum - 1
            with wrapped.no_sync() if wait else contextlib.nullcontext():
                with autocast(device, dtype):
                    logits = wrapped(inputs)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                       reduction="sum") / num_targets
                loss.backward()
            step_loss += loss.detach()

        # Clip, then step.
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.record(step_loss / world, num_targets)


# =============================================================================================
# The lesson ends here. What follows: tokens on disk, several processes, the command.
# =============================================================================================

def find_documents(preset, data):
    """-> (name, list of documents, stamp). A document is an iterable of pieces of text.

    `data` are files and folders (all files in them, sorted); without, the preset's own text. The
    stamp changes when the text does. Raises UserError, OSError.
    """
    if not data and preset == "gpt2":
        raise UserError("the preset gpt2 trains on your own text; name it: --data FILE-OR-FOLDER")
    if not data and preset == "quick":  # the manual that every CPython carries for its help()
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python comes without pydoc_data, the text of the quick preset; "
                            "name another text: --data FILE-OR-FOLDER") from None
        texts = [topics[name] for name in sorted(topics)]
        return "Python's reference manual", [[text] for text in texts], texts

    paths = []
    for path in data or [download(VERDICT_URLS, VERDICT, VERDICT_SHA256)]:
        inside = sorted(path / name for name in glob("**/*", root_dir=path, recursive=True))
        full = [p for p in inside if p.is_file() and p.stat().st_size]
        paths += full if path.is_dir() else [path]
    if not paths:
        raise UserError("the folder has no text; put UTF-8 files in it")
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    name = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    return name, [read_text_pieces(p) for p in paths], stamp


def tokens_on_disk(documents, stamp, tokenizer):
    """All documents as token IDs in a file, each closed by `<|endoftext|>` -> (path, dtype).

    They are written once, to data/tokens-*.bin, 16 bits each if the vocabulary allows it, piece by
    piece; the name depends on text and tokenizer. The four newest such files are kept.
    """
    path = Path("data") / f"tokens-{fingerprint(stamp, tokenizer_to_spec(tokenizer))}.bin"
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    if not path.exists():
        progress = Progress(None, "million tokens")
        with write_atomically(path) as part, open(part, "wb") as file:
            for document in documents:
                for piece in document:
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
    """The tokens from `first` to `last` in a file, in rows of T inputs and T targets.

    The tail that fills no row is dropped. Rows are read when they are needed, so memory does not
    grow with the text.
    """

    def __init__(self, path, dtype, first, last, T):
        self.path, self.dtype, self.first, self.T = path, np.dtype(dtype), first, T
        self.num_rows = max(0, last - first - 1) // T

    def __len__(self):
        return self.num_rows

    def batch(self, rows, device="cpu"):
        """Row numbers (B,) -> inputs (B, T), targets (B, T)."""
        block = np.empty((len(rows), self.T + 1), np.int64)
        with open(self.path, "rb") as file:
            for i, row in enumerate(rows):
                file.seek((self.first + int(row) * self.T) * self.dtype.itemsize)
                block[i] = np.fromfile(file, self.dtype, self.T + 1)
        block = torch.from_numpy(block).to(device)
        return block[:, :-1], block[:, 1:]


def write_sample(model, tokenizer, args, length, device):
    """How the model continues --prompt, at temperature 0.8: the likeliest text repeats itself."""
    idx = text_to_token_ids(args.prompt, tokenizer).to(device)
    ids = generate(model, idx, length, model.cfg["context_length"], temperature=0.8,
                   seed=args.seed, eos_id=tokenizer.eot_token)
    return token_ids_to_text(ids, tokenizer)


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
        text = targets[targets != tokenizer.eot_token].tolist()
        num_bytes += len(tokenizer.decode_bytes(text))
    nats, num_bytes = sum_over_processes([nats, num_bytes], device)

    loss = nats / (count * rows.T)
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 99)),
            "bits_per_byte": nats / num_bytes / math.log(2),
            "sample": " ".join(write_sample(model, tokenizer, args, 60, device).split())}


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
    # The flags that decide what the others' defaults are, or whether they make sense, come first.
    first = ArgumentParser(add_help=False)
    arg = first.add_argument
    arg("--preset", choices=list(PRESETS), default="quick", help="which recipe")
    arg("--data", type=Path, nargs="+", help="files and folders of UTF-8 text instead of the "
        "preset's own")
    arg("--init", type=Path, help="checkpoint to start from instead of random weights")
    arg("--size", choices=list(GPT2_SIZES), help="width, depth and heads of a published GPT-2")
    chosen, others = first.parse_known_args(argv)
    given = {text.split("=")[0] for text in others}
    fresh = {"--tokenizer", "--context-length", "--emb-dim", "--n-layers", "--n-heads"}
    if chosen.init and (chosen.size or fresh & given):
        first.error("--init brings its own tokenizer and sizes; leave out the flags for those")

    # The preset, and what those flags change in it.
    defaults = {**PRESETS[chosen.preset], **GPT2_SIZES.get(chosen.size, {})}
    if chosen.init:
        defaults.update(CONTINUE)
    if chosen.data:
        defaults["prompt"] = None
    if {"--epochs", "--max-steps"} & given:  # whoever asks for one of them gets all of it
        defaults.update(epochs=None, max_steps=None)

    # The others.
    parser = ArgumentParser(parents=[first], description="Pretrain a GPT. The defaults are those "
                            f"of the preset {chosen.preset}.")
    arg = parser.add_argument
    arg("--tokenizer", help="gpt2, bytes, or a file made by: python tokenizer.py train")
    for name in ("--context-length", "--emb-dim", "--n-layers", "--n-heads"):
        arg(name, type=positive_int, help="of a fresh model")
    arg("--prompt", help="what each evaluation continues; with --data it is by default the "
        "beginning of the held-out part")
    arg("--val-share", type=argument(float, "a share between 0 and 1", lambda x: 0 < x < 1),
        default=0.1, help="last part of the tokens, held out")
    arg("--eval-batches", type=positive_int, default=200, help="most batches in an evaluation")
    arg("--compile", action="store_true", help="let torch.compile rewrite the model first")
    add_training_arguments(parser, "pretrained.pt", **defaults)
    return parser.parse_args(argv)


def make_model(args, vocab_size):
    """A fresh model of the sizes in `args`, with the preset's initial values."""
    cfg = {name: vars(args).get(name, value) for name, value in GPT_CONFIG_124M.items()}
    cfg.update(vocab_size=vocab_size, tie_embeddings=args.tie_embeddings)
    if cfg["emb_dim"] % cfg["n_heads"]:
        raise UserError(f"emb_dim {cfg['emb_dim']} cannot be shared out among {cfg['n_heads']} "
                        "heads; change --emb-dim or --n-heads")
    model = GPTModel(cfg)
    if args.init_weights != "torch":  # narrower models than GPT-2 want larger numbers
        init_gpt2_weights(model, std=0.04 if args.init_weights == "sines" else 0.02)
    if args.init_weights == "sines":
        init_sine_positions(model)
    return model


def cut_tokens(path, dtype, name, T, args):
    """A file of tokens -> (rows to train, rows held out: the last part). Raises UserError."""
    num_tokens = path.stat().st_size // dtype.itemsize
    cut = int(num_tokens * (1 - args.val_share))
    train_rows = TokenRows(path, dtype, 0, cut, T)
    val_rows = TokenRows(path, dtype, cut, num_tokens, T)
    if len(train_rows) < args.batch_size * args.grad_accum or not len(val_rows):
        raise UserError(f"{name} is too short: {len(train_rows)} rows of {T} tokens to train and "
                        f"{len(val_rows)} to validate, but a step takes {args.batch_size} x "
                        f"{args.grad_accum}; add text, or lower --context-length or --batch-size")
    say(f"text     {name}: {cut:,} tokens to train, {num_tokens - cut:,} held out")
    return train_rows, val_rows


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
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out evenly among {world} "
                        "processes; change one of the two")

    # Text and model. The first process writes files; the others wait, then find them there.
    if rank == 0:
        check_output(args, args.init, *(args.data or []))
    else:
        dist.barrier()
    name, documents, stamp = find_documents(args.preset, args.data)
    if args.init:
        model, tokenizer, _ = load_checkpoint(args.init)
    else:
        tokenizer = load_tokenizer(args.tokenizer)
        model = make_model(args, tokenizer.n_vocab)
    path, token_dtype = tokens_on_disk(documents, stamp, tokenizer)
    if rank == 0 and world > 1:
        dist.barrier()
    T = model.cfg["context_length"]
    train_rows, val_rows = cut_tokens(path, token_dtype, name, T, args)
    if args.prompt is None:
        args.prompt = tokenizer.decode(val_rows.batch([0])[0][0, :30].tolist())[:30].strip("\ufffd")

    # The run.
    samples = [train_rows.batch([row])[0].tolist()
               for row in range(0, len(train_rows), len(train_rows) // 64 + 1)]
    model.to(device)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, dtype)
    run = TrainingRun(args, model, tokenizer, optimizers,
                      per_epoch=len(train_rows) // (args.batch_size * args.grad_accum),
                      settings={"data": fingerprint(len(train_rows), samples)})
    sizes = "{n_layers} blocks, {emb_dim} wide, {n_heads} heads, context {context_length}"
    say(f"model    {sum(p.numel() for p in model.parameters()):,} parameters: "
        + sizes.format(**model.cfg))
    V = model.cfg["vocab_size"]
    say(f"A blind guess has a loss of ln {V:,} = {math.log(V):.2f}.")
    train_model(model, train_rows, run, optimizers, args, device, dtype, lambda: evaluate_rows(
        model, val_rows, tokenizer, args, device, dtype))
    run.finish()

    # What it writes, and what to type next.
    if rank == 0:
        model, _, _ = load_checkpoint(args.out, device)
        say(f"\nIt writes (temperature 0.8):\n{write_sample(model, tokenizer, args, 300, device)}")
        say(f"\nNext: python gpt.py --checkpoint {args.out} --prompt={shlex.quote(args.prompt)}")


if __name__ == "__main__":
    run_main(main)
