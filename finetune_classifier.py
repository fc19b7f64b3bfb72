"""Classification: a pretrained GPT learns to tell spam from ham, or any labelled texts apart.

    python finetune_classifier.py                        the SMS Spam Collection, spam or ham
    python finetune_classifier.py --data reviews.csv --text-column review --label-column stars
    python finetune_classifier.py --init checkpoints/gpt2-124M.pt --train lora --seeds 5
    python finetune_classifier.py --classify "You won a prize! Call now" --classify "see you at 8"
    python finetune_classifier.py --classify < texts.txt               a text per line

Reads a language model (checkpoints/gpt2-124M.pt if it is there, else pretrained.pt) and a table of
texts and labels. Writes checkpoints/classifier.pt when training ends: the evaluation that was best
on the validation texts, with its test figures. Until then classifier-resume.pt holds the newest
state, for --resume. The metrics go to classifier.csv.

Read it in order: texts and labels -> token IDs -> the book's simple loop -> the model in two
parts, frozen and trained -> the loop that runs -> the report -> main. Book chapter 6, appendix E.
Shapes as in gpt.py: B rows, T tokens, C embedding width.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import math
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gpt import (
    ArgumentParser, CtrlC, Metrics, Progress, UserError, add_training_arguments, autocast, beside,
    check_output, download, find_start, load_checkpoint, merge_lora, non_negative_float,
    pick_device, pick_dtype, positive_float, positive_int, random_state, read_text_pieces,
    replace_head, replace_linear_with_lora, run_main, save_checkpoint, save_dictionary,
    set_random_state, write_atomically)

SMS_NAME = "SMSSpamCollection"
SMS_URLS = ["https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"]
SMS_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
SMS_MOST_BYTES = 10_000_000   # the file has 477,907
STARTS = [Path("checkpoints") / "gpt2-124M.pt", Path("checkpoints") / "pretrained.pt"]
LEARNING_RATES = {  # at GPT-2's width, 768; a model half as wide takes twice the rate
    "last-block": 5e-5, "all": 5e-5,    # the book's
    "head": 1e-3, "lora": 8e-4,         # few or fresh weights, with a longer way to go
}
FEWEST_TEXTS = 10             # of a class: then a tenth, the validation part, can hold one


# ---------------------------------------------------------------------------------------------
# Texts and labels: a list of (label, text).

def download_and_unzip_spam_data(urls=SMS_URLS, path=Path("data") / SMS_NAME, sha256=SMS_SHA256):
    """The SMS Spam Collection (Almeida et al. 2011), fetched if it is not there -> its path. 6.2.

    Only the one file that is expected leaves the archive. Raises UserError with each address and
    its reason.
    """
    path, reasons = Path(path), []
    if path.exists():
        return path
    archive_path = path.with_name("sms+spam+collection.zip")
    for url in urls:
        try:
            download([url], archive_path)
        except UserError as e:
            reasons.append(str(e).split("\n")[-1].strip())
            continue
        try:
            with zipfile.ZipFile(archive_path) as archive, archive.open(SMS_NAME) as file:
                content = file.read(SMS_MOST_BYTES)       # whatever size the archive claims
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("the file inside has another content (SHA-256)")
        except Exception as e:  # whatever a broken archive makes zipfile raise
            reasons.append(f"{url}: not the expected archive ({e})")
            archive_path.unlink()
            continue
        with write_atomically(path) as part:
            part.write_bytes(content)
        archive_path.unlink()
        return path
    raise UserError(f"{SMS_NAME} could not be downloaded; put the file of that name from the "
                    f"archive at {path} by hand, or try again when there is a network:\n  "
                    + "\n  ".join(reasons))


def read_table(path):
    """A TSV or CSV file -> list of (line number, cells). Raises UserError.

    The ending .csv or .tsv decides; with any other, a first line with commas and no tab means CSV.
    In CSV, quotes hold text together that has commas or line breaks in it.
    """
    path = Path(path)
    text = "".join(read_text_pieces(path)).removeprefix("\ufeff")   # Excel's byte order mark
    suffix, first = path.suffix.lower(), text.split("\n", 1)[0]
    if suffix == ".tsv" or (suffix != ".csv" and ("\t" in first or "," not in first)):
        # subtle: in TSV a quote is a character like any other. A reader that honours quotes merges
        # SMS messages, and finds 5,572 instead of 5,574.
        return [(number, line.removesuffix("\r").split("\t"))
                for number, line in enumerate(text.split("\n"), 1)]
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader]
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({e}); a text with quotes "
                        'in it is written as "he said ""hi"""') from None


def find_columns(path, first, text_column=None, label_column=None):
    """The first line's cells -> (text, label), column numbers from 0. Raises UserError.

    A column may be given by its header or its number from 1; else those named text and label are
    taken, else the label comes first and the text second.
    """
    names = [cell.strip().lower() for cell in first]

    def find(wanted, usual):
        if wanted is None:
            return names.index(usual) if usual in names else None
        if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
            return int(wanted) - 1
        if wanted.lower() in names:
            return names.index(wanted.lower())
        raise UserError(f"{path} has no column {wanted!r}; its first line has {len(names)}: "
                        + ", ".join(repr(cell[:30]) for cell in first))

    text, label = find(text_column, "text"), find(label_column, "label")
    others = [i for i in range(len(first)) if i not in (text, label)]
    label = others.pop(0) if label is None else label
    text = others.pop(0) if text is None else text
    if text == label:
        raise UserError(f"text and label are the same column of {path}; give two different ones")
    return text, label


def read_labelled_texts(path, text_column=None, label_column=None):
    """-> (list of (label, text), list of remarks about the file). Raises UserError."""
    rows = [(number, cells) for number, cells in read_table(path)
            if any(cell.strip() for cell in cells)]               # a blank line is nothing
    if not rows:
        raise UserError(f"{path} has no texts; give a table of labels and texts")
    width = len(rows[0][1])
    for number, cells in rows:
        if not 2 <= len(cells) == width:
            raise UserError(f"{path}, line {number}: {len(cells)} column"
                            f"{'s' * (len(cells) > 1)}, expected {max(2, width)}; tabs divide the "
                            "columns, in a .csv file commas, where quotes keep a text together")
    text, label = find_columns(path, rows[0][1], text_column, label_column)
    examples = [(cells[label].strip(), cells[text]) for _, cells in rows]
    remarks = []
    # Labels repeat, a header does not.
    if examples[0][0] not in {label for label, _ in examples[1:]}:
        remarks.append(f"line {rows[0][0]} is a header ({', '.join(examples[0])})")
        examples = examples[1:]
    full = [(label, text) for label, text in examples if label and text.strip()]
    if len(full) < len(examples):
        remarks.append(f"{len(examples) - len(full):,} without text or label skipped")
    return full, remarks


def check_classes(path, examples):
    """The class names, sorted. Raises UserError when there is nothing to tell apart or to split."""
    counts = Counter(label for label, _ in examples)
    if not counts:
        raise UserError(f"{path} has no labelled texts; give a table of labels and texts")
    if len(counts) < 2:
        raise UserError(f"{path} has only the class {', '.join(counts)!r}; at least two are "
                        "needed. Is --label-column the right one?")
    rarest = min(counts, key=counts.get)
    if counts[rarest] < FEWEST_TEXTS:
        raise UserError(f"the class {rarest[:40]!r} of {path} has too few texts to split, "
                        f"{counts[rarest]}; at least {FEWEST_TEXTS} are needed. Add some, leave "
                        "the class out, or give another --label-column")
    return sorted(counts)


def create_balanced_dataset(examples, seed=123):
    """As many texts of each class as the rarest has, drawn by chance. Book section 6.2."""
    by_class = {}
    for label, text in examples:
        by_class.setdefault(label, []).append((label, text))
    size, rng = min(map(len, by_class.values())), random.Random(seed)
    return [example for label in sorted(by_class) for example in rng.sample(by_class[label], size)]


def random_split(examples, train_frac=0.7, validation_frac=0.1, seed=123):
    """Shuffle and cut in three -> (train, validation, test); the rest is for testing. 6.2."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    train_end = int(len(shuffled) * train_frac)
    validation_end = train_end + int(len(shuffled) * validation_frac)
    return shuffled[:train_end], shuffled[train_end:validation_end], shuffled[validation_end:]


# ---------------------------------------------------------------------------------------------
# Token IDs, in batches.

class SpamDataset(Dataset):
    """Labelled texts as token IDs: item i is (IDs (T,), class number). Book section 6.3.

    Texts longer than `max_length` lose their end; `num_cut` counts them. Nothing is padded here:
    `collate` pads a batch to its own longest text, not to the longest of all.
    """

    def __init__(self, examples, tokenizer, max_length=None, class_names=("ham", "spam")):
        ids = tokenizer.encode_ordinary_batch([text for _, text in examples])
        self.num_cut = sum(len(row) > (max_length or math.inf) for row in ids)
        self.ids = [torch.tensor(row[:max_length]) for row in ids]
        self.labels = torch.tensor([class_names.index(label) for label, _ in examples])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.ids[i], self.labels[i]


def pad(rows, device="cpu"):
    """Rows (T_i,) or (T_i, C) -> (padded with zeros at the right, their lengths (B,))."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(list(rows), batch_first=True).to(device), lengths.to(device)


def collate(batch):
    """Items of a SpamDataset -> (token IDs (B, T), lengths (B,), labels (B,)), for a DataLoader."""
    rows, labels = zip(*batch)
    return (*pad(rows), torch.stack(labels))


def batches_of_similar_length(rows, most_tokens=2048):
    """Row numbers in batches, longest first, that hold little padding."""
    order, batch = sorted(range(len(rows)), key=lambda i: -len(rows[i])), []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------
# The book's way: the whole model for every batch, in the simplest loop that trains. It is here to
# be read; the run itself uses what comes after.

def classify_batch(model, ids, lengths):
    """Token IDs (B, T) and lengths (B,) -> a score per class, (B, classes)."""
    # subtle: the last real token has read the whole text; the last position of a padded row is
    # padding, and what it says depends on the longest text of the batch.
    last = model.hidden_states(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]
    return model.out_head(last)


@torch.no_grad()
def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """The share of right predictions in the first `num_batches` batches (None: all). 6.6.

    The loader yields (token IDs (B, T), lengths (B,), labels (B,)), as `collate` makes them.
    """
    model.eval()
    right = total = 0
    for ids, lengths, labels in itertools.islice(data_loader, num_batches):
        predicted = classify_batch(model, ids.to(device), lengths.to(device)).argmax(dim=-1)
        right += int((predicted == labels.to(device)).sum())
        total += len(labels)
    return right / total if total else math.nan


def calc_loss_batch(ids, lengths, labels, model, device):
    """Mean cross-entropy of a batch in nats per text, a tensor to call backward() on. 6.6."""
    return F.cross_entropy(classify_batch(model, ids.to(device), lengths.to(device)),
                           labels.to(device))


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none. 6.6."""
    losses = [calc_loss_batch(*batch, model, device).item()
              for batch in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs,
                            eval_freq, eval_iter):
    """The loop one would explain first; `train_classifier` below is the one that runs. 6.7.

    Returns the lists (training losses, validation losses, training accuracies, validation
    accuracies), the losses every `eval_freq` steps and the accuracies every epoch, over
    `eval_iter` batches, and the number of texts seen.
    """
    train_losses, val_losses, train_accs, val_accs = [], [], [], []
    examples_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        for ids, lengths, labels in train_loader:
            model.train()
            optimizer.zero_grad()
            calc_loss_batch(ids, lengths, labels, model, device).backward()
            optimizer.step()
            examples_seen += len(labels)
            global_step += 1
            if global_step % eval_freq == 0:
                model.eval()
                train_losses.append(calc_loss_loader(train_loader, model, device, eval_iter))
                val_losses.append(calc_loss_loader(val_loader, model, device, eval_iter))
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss "
                      f"{train_losses[-1]:.3f}, Val loss {val_losses[-1]:.3f}")
        train_accs.append(calc_accuracy_loader(train_loader, model, device, eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, eval_iter))
        print(f"Training accuracy: {train_accs[-1]:.2%} | Validation accuracy: {val_accs[-1]:.2%}")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


# ---------------------------------------------------------------------------------------------
# The model in two parts. Most of it stays as it is, and the part that stays gives the same output
# in every epoch. So it reads each text once, and only the rest runs again and again.

def freeze(model, train, rank=16, alpha=16):
    """Let only a part of the model learn -> how many blocks, from the bottom, stay as they are.

    "head": the new head. "last-block": also the last block and the final norm (book section 6.5).
    "all": everything. "lora": the head, and a correction to every matrix in the blocks (book
    appendix E; Hu et al. 2021).
    """
    num_blocks = len(model.trf_blocks)
    model.requires_grad_(train == "all")
    model.out_head.requires_grad_(True)
    if train == "last-block":
        model.trf_blocks[-1].requires_grad_(True)
        model.final_norm.requires_grad_(True)
    if train == "lora":
        replace_linear_with_lora(model.trf_blocks, rank, alpha)
    return {"head": num_blocks, "last-block": num_blocks - 1, "all": 0, "lora": 0}[train]


def last_token_block(block, x, lengths):
    """`block(x)` at the last real token of each row only: (B, T, C) -> (B, C).

    That one position is all that the head reads. Every token gives a key and a value; only the
    last one needs a query, an output and a feed-forward pass: five sixths of the work are saved.
    """
    (B, T, C), att = x.shape, block.att
    rows, last = torch.arange(B, device=x.device), lengths - 1

    def split_heads(t):  # (B, T, C) -> (B, H, T, D)
        return t.view(B, -1, att.num_heads, C // att.num_heads).transpose(1, 2)

    normed = block.norm1(x)
    queries = split_heads(att.W_query(normed[rows, last]))        # (B, H, 1, D)
    keys, values = split_heads(att.W_key(normed)), split_heads(att.W_value(normed))
    # The last real token sees itself and what is before it, and not the padding behind it.
    real = torch.arange(T, device=x.device) < lengths[:, None]    # (B, T)
    context_vec = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=real[:, None, None],
        dropout_p=att.dropout.p if att.training else 0.0)
    x = x[rows, last] + block.drop_resid(att.out_proj(context_vec.reshape(B, C)))
    return x + block.drop_resid(block.ff(block.norm2(x)))


def run_frozen(model, ids, lengths, depth):
    """Token IDs (B, T) -> what the first `depth` blocks make of them, (B, T, C).

    If these are all blocks, only the last real token is of use: (B, 1, C).
    """
    # subtle: rows are padded at the right, and no mask is needed: causal attention never looks
    # right, so no real token sees the padding. What the padding itself yields is never read.
    x = model.drop_emb(model.tok_emb(ids)
                       + model.pos_emb(torch.arange(ids.shape[1], device=ids.device)))
    num_blocks = len(model.trf_blocks)
    x = model.trf_blocks[:min(depth, num_blocks - 1)](x)
    if depth == num_blocks:
        x = last_token_block(model.trf_blocks[-1], x, lengths)[:, None]
    return x


def run_rest(model, x, lengths, depth):
    """What `run_frozen` made, (B, T, C) -> a score per class at the last real token, (B, classes).

    Token IDs (B, T) go through the frozen part first.
    """
    if not x.is_floating_point():
        x = run_frozen(model, x, lengths, depth)
    if depth < len(model.trf_blocks):
        x = model.trf_blocks[depth:-1](x)
        x = last_token_block(model.trf_blocks[-1], x, lengths)[:, None]
    return model.out_head(model.final_norm(x[:, 0]))


@torch.no_grad()
def compute_frozen(model, ids, depth, settings, device):
    """Run every text through the frozen part once: list of (T_i,) -> list of (T_i, C)."""
    model.eval()  # dropout would make each epoch's output another one
    lengths = [1 if depth == len(model.trf_blocks) else len(row) for row in ids]
    # Kept in float32, like the sums along the shortcuts: rounding would change the result.
    kept = torch.empty(sum(lengths), model.cfg["emb_dim"]).split(lengths)
    progress, done = Progress(sum(map(len, ids)), "tokens"), 0
    for batch in batches_of_similar_length(ids):
        x, batch_lengths = pad([ids[i] for i in batch], device)
        with autocast(device, settings["dtype"]):
            x = run_frozen(model, x, batch_lengths, depth)
        for i, row in zip(batch, x):
            kept[i].copy_(row[:lengths[i]])
        done += int(batch_lengths.sum())
        progress.update(done, f"reading each text once, {depth} of {len(model.trf_blocks)} blocks")
    progress.close()
    return list(kept)


def free_memory():
    """Bytes of memory that are free, as Linux and its containers tell; elsewhere a guess."""
    free = []
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
            free.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii"))
                       for name in ("max", "current"))
        free.append(max(0, limit - used))
    return min(free, default=4 * 2**30)


# ---------------------------------------------------------------------------------------------
# The training loop that runs.

def texts_of_step(step, num_texts, settings):
    """The text numbers of an optimizer step: each epoch is a new shuffle, known from the seed."""
    per_step = settings["batch_size"] * settings["grad_accum"]
    epoch, k = divmod(step, math.ceil(num_texts / per_step))
    order = np.random.default_rng([settings["seed"], epoch]).permutation(num_texts)
    return order[k * per_step:(k + 1) * per_step]


def train_step(model, rows, labels, numbers, settings, device):
    """Forward and backward over the texts `numbers`, a batch at a time; returns the mean loss."""
    step_loss = 0.0
    for part in np.array_split(numbers, math.ceil(len(numbers) / settings["batch_size"])):
        x, lengths = pad([rows[i] for i in part], device)
        with autocast(device, settings["dtype"]):
            logits = run_rest(model, x, lengths, settings["depth"])
        loss = F.cross_entropy(logits.float(), labels[part].to(device), reduction="sum")
        (loss / len(numbers)).backward()
        step_loss += loss.item() / len(numbers)
    return step_loss


@torch.no_grad()
def predict(model, rows, settings, device):
    """Scores of all texts without dropout, in their order: (number of texts, classes)."""
    set_mode(model, settings, training=False)
    logits = torch.empty(len(rows), model.out_head.out_features)
    for batch in batches_of_similar_length(rows):
        x, lengths = pad([rows[i] for i in batch], device)
        with autocast(device, settings["dtype"]):
            logits[batch] = run_rest(model, x, lengths, settings["depth"]).float().cpu()
    return logits


def classify_texts(texts, model, tokenizer, device, dtype=torch.float32):
    """Texts -> probabilities (number of texts, classes). Raises ValueError for an empty text."""
    ids = [torch.tensor(row[:model.cfg["context_length"]], dtype=torch.long)
           for row in tokenizer.encode_ordinary_batch(list(texts))]
    if not all(map(len, ids)):
        raise ValueError("a text is empty; there is nothing to classify")
    logits = predict(model, ids, {"depth": 0, "dtype": dtype}, device)
    return torch.softmax(logits, dim=-1)


def classify_review(text, model, tokenizer, device, class_names=("not spam", "spam")):
    """The likeliest class of one text. Book section 6.8."""
    return class_names[int(classify_texts([text], model, tokenizer, device).argmax())]


def evaluate_parts(model, parts, settings, device):
    """Loss in nats per text and accuracy, on all training and all validation texts."""
    row = {}
    for name, short in (("train", "train"), ("validation", "val")):
        rows, labels = parts[name]
        logits = predict(model, rows, settings, device)
        row[f"{short}_loss"] = round(F.cross_entropy(logits, labels).item(), 5)
        right = int((logits.argmax(dim=-1) == labels).sum())
        row[f"{short}_accuracy"] = round(right / len(labels), 5)
    return row


def set_mode(model, settings, training):
    """Dropout only while training, and only in what is trained."""
    model.train(training)
    if settings["depth"]:
        model.drop_emb.eval()
        model.trf_blocks[:settings["depth"]].eval()


def trained_parameters(model):
    """Name -> parameter, of those that learn."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model, weights):
    """Put saved values into the parameters that learn."""
    with torch.no_grad():
        for name, p in trained_parameters(model).items():
            p.copy_(weights[name])


def train_classifier(model, parts, settings, device, out, saved=None):
    """Train on parts["train"], (rows, labels) as `run_rest` takes them; leave the best weights.

    Best is the highest accuracy on all of parts["validation"], then the lowest loss. `saved` is a
    state to go on from: the run then ends with the very weights of one that was never
    interrupted. Returns the best evaluation. Raises UserError when the loss is not finite (the
    last state is kept) and KeyboardInterrupt after Ctrl-C, when the step is saved.
    """
    rows, labels = parts["train"]
    learning = trained_parameters(model)
    optimizer = torch.optim.AdamW(learning.values(), lr=settings["lr"],
                                  weight_decay=settings["weight_decay"], fused=True)
    step, best, best_weights = 0, None, None
    if saved:
        step, best, best_weights = saved["step"], saved["best"], saved["best_weights"]
        load_trained(model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"])
    metrics = Metrics(out, step)
    per_epoch = math.ceil(len(rows) / (settings["batch_size"] * settings["grad_accum"]))
    progress = Progress(settings["total_steps"], "steps")
    with CtrlC() as stop:
        while step < settings["total_steps"]:
            set_mode(model, settings, training=True)
            loss = train_step(model, rows, labels, texts_of_step(step, len(rows), settings),
                              settings, device)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step + 1}; start anew with a lower "
                                f"--lr than {settings['lr']:g}")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update(step, f"step {step} | loss {loss:.3f}")
            evaluate = step % settings["eval_every"] == 0 or step == settings["total_steps"]
            if evaluate:
                progress.close()
                row = {"step": step, "epoch": round(step / per_epoch, 3),
                       **evaluate_parts(model, parts, settings, device)}
                if not math.isfinite(row["val_loss"]):
                    raise UserError(f"the validation loss is {row['val_loss']} at step {step}; "
                                    f"start anew with a lower --lr than {settings['lr']:g}")
                metrics.add(**row)
                print(f"epoch {row['epoch']:4g} | train loss {row['train_loss']:.3f}, accuracy "
                      f"{row['train_accuracy']:6.1%} | val loss {row['val_loss']:.3f}, accuracy "
                      f"{row['val_accuracy']:6.1%}", flush=True)
                merit = (row["val_accuracy"], -row["val_loss"])
                if best is None or merit > (best["val_accuracy"], -best["val_loss"]):
                    best = row
                    best_weights = {name: p.detach().clone() for name, p in learning.items()}
            if evaluate or stop.pressed:
                save_dictionary(state_path(out), {
                    "settings": settings_to_save(settings), "step": step, "best": best,
                    "weights": {name: p.detach() for name, p in learning.items()},
                    "best_weights": best_weights, "optimizer": optimizer.state_dict(),
                    "random": random_state()})
            if stop.pressed:
                progress.close()
                print(f"stopped at step {step}, saved; go on with the same command and --resume")
                raise KeyboardInterrupt
    load_trained(model, best_weights)
    metrics.plot(per="text")
    return best


def state_path(out):
    """checkpoints/classifier.pt -> checkpoints/classifier-resume.pt"""
    return out.with_name(out.stem + "-resume" + out.suffix)


def settings_to_save(settings):
    """The settings as a file may hold them: numbers, strings and the like."""
    return {**settings, "dtype": str(settings["dtype"]).removeprefix("torch.")}


# ---------------------------------------------------------------------------------------------
# The report: all of it follows from the confusion matrix.

def wilson_interval(right, total, z=1.96):
    """The 95 % interval of a share (Wilson 1927); it stays within 0 and 1, unlike p +- z s."""
    p = right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return centre - half, centre + half


def print_report(class_names, test):
    """`test` holds "confusion", a row per true class and a column per predicted one, and
    "majority", the number of the class that is commonest in the training texts."""
    confusion = torch.tensor(test["confusion"])
    total, right = int(confusion.sum()), int(confusion.trace())
    low, high = wilson_interval(right, total)
    commonest = test["majority"]
    print(f"\ntest     {right / total:.1%} of {total} texts are right (95 % interval {low:.1%} to "
          f"{high:.1%}; one text is {100 / total:.2f} points)\n"
          f"baseline {int(confusion[commonest].sum()) / total:.1%} for always answering "
          f"{class_names[commonest]!r}, the commonest training class\n")
    widths = [max(5, len(name)) for name in class_names]
    first = max(10, *widths)
    print(f"{'true class':{first}}  precision  recall   predicted: "
          + "  ".join(f"{name:>{w}}" for name, w in zip(class_names, widths)))
    for i, name in enumerate(class_names):
        predicted, true = int(confusion[:, i].sum()), int(confusion[i].sum())
        shares = [f"{int(confusion[i, i]) / n:.1%}" if n else "-" for n in (predicted, true)]
        print(f"{name:{first}}  {shares[0]:>9}  {shares[1]:>6}              "
              + "  ".join(f"{n:{w}}" for n, w in zip(confusion[i].tolist(), widths)))


# ---------------------------------------------------------------------------------------------
# python finetune_classifier.py

def parse_arguments(argv):
    """The command line."""
    parser = ArgumentParser(description="Teach a pretrained GPT to classify texts, or classify "
                            "texts with it. Without --lr, the learning rate follows from --train "
                            "and the model's width; without --eval-every, an epoch ends with an "
                            "evaluation.")
    arg = parser.add_argument
    arg("--classify", nargs="?", const="-", action="append", metavar="TEXT",
        help="print the class of TEXT (repeatable), or of each line of standard input, by the "
        "classifier at --out; trains nothing")
    arg("--data", type=Path, help="TSV or CSV file of labelled texts instead of the SMS Spam "
        "Collection")
    arg("--label-column", help="its header or its number; default: the one named label, else the "
        "first")
    arg("--text-column", help="its header or its number; default: the one named text, else the "
        "first that is left")
    arg("--no-balance", action="store_true", help="take all texts, not equally many of each class")
    arg("--init", type=Path, help="language model to start from; default: "
        + ", else ".join(map(str, STARTS)))
    arg("--train", choices=["head", "last-block", "all", "lora"], default="last-block",
        help="which part learns")
    arg("--lora-rank", type=positive_int, default=16, help="width of LoRA's corrections")
    arg("--lora-alpha", type=positive_float, default=16.0, help="their size: they are "
        "multiplied by alpha / rank")
    arg("--weight-decay", type=non_negative_float, default=0.1, help="pull towards zero")
    arg("--seeds", type=positive_int, default=1, help="repeat everything with as many seeds")
    arg("--keep-limit", type=non_negative_float, metavar="MB", help="keep what the frozen part "
        "computes if it takes no more than this; default: half of the free memory")
    add_training_arguments(parser, "checkpoints/classifier.pt", epochs=5, batch_size=8, lr=None,
                           eval_every=None)  # make_settings finds them
    return parser.parse_args(argv)


def make_settings(args, seed, parts, class_names, model, device):
    """What decides the result of a run, numbers and strings, and the number of steps."""
    per_epoch = math.ceil(len(parts["train"]) / (args.batch_size * args.grad_accum))
    # Every 1009th number is enough to recognise the model.
    weights = b"".join(p.detach().cpu().flatten()[::1009].numpy().tobytes()
                       for p in model.parameters())
    return {"classes": class_names, "data": hashlib.sha256(repr(parts).encode()).hexdigest(),
            "init": hashlib.sha256(weights).hexdigest(), "seed": seed, "train": args.train,
            "lora_rank": args.lora_rank, "lora_alpha": args.lora_alpha,
            "lr": args.lr or LEARNING_RATES[args.train] * 768 / model.cfg["emb_dim"],
            "weight_decay": args.weight_decay, "batch_size": args.batch_size,
            "grad_accum": args.grad_accum, "eval_every": args.eval_every or per_epoch,
            "total_steps": min(args.epochs * per_epoch, args.max_steps or math.inf),
            "dtype": pick_dtype(args.dtype, device)}


def load_state(args, out, settings):
    """-> (state to go on from, test figures of a finished run), each None if it is not there.

    Raises UserError when they belong to another run than the command line describes.
    """
    state = finished = None
    if state_path(out).exists():
        path = state_path(out)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = state["settings"]
        except Exception:  # whatever a cut file makes torch.load raise
            raise UserError(f"{path} is not the state of a run, or was cut short; start anew "
                            "without --resume") from None
    elif out.exists():
        path, (_, _, finished) = out, load_checkpoint(out, kind="classifier")
        before = finished.get("settings", {})
    else:
        return None, None
    if args.dtype == "auto":  # which depends on a measurement; a resumed run keeps it
        settings["dtype"] = getattr(torch, before.get("dtype", "float32"))
    now = settings_to_save(settings)
    for name in sorted(now, key=lambda name: name == "data"):  # last: it differs with the seed too
        if before.get(name) != now[name]:
            values = "" if name in ("data", "init") else f" ({before.get(name)}, now {now[name]})"
            what = {"classes": "set of classes", "total_steps": "number of steps",
                    "data": "--data, another column or --no-balance"}.get(
                name, "--" + name.replace("_", "-"))
            raise UserError(f"{path} is a run with another {what}{values}; repeat its command, or "
                            "start anew without --resume")
    return state, finished


def run(args, examples, class_names, start, seed, out, device):
    """One whole run: split, read, train, test, save -> the test figures for `print_report`."""
    chosen = examples if args.no_balance else create_balanced_dataset(examples, seed)
    parts = dict(zip(("train", "validation", "test"), random_split(chosen, seed=seed)))
    model, tokenizer, _ = load_checkpoint(start, device)
    settings = make_settings(args, seed, parts, class_names, model, device)
    state, finished = load_state(args, out, settings) if args.resume else (None, None)
    if finished:
        print(f"{out} is the finished result of this run")
        print_report(class_names, finished["test"])
        return finished["test"]
    torch.manual_seed(seed)
    replace_head(model, len(class_names))
    depth = settings["depth"] = freeze(model, args.train, args.lora_rank, args.lora_alpha)
    model.to(device)

    data = {part: SpamDataset(texts, tokenizer, model.cfg["context_length"], class_names)
            for part, texts in parts.items()}
    describe(args, start, parts, data, model, settings, device, state)
    ids = [row for part in data.values() for row in part.ids]
    rows = keep_frozen(model, ids, settings, device, args.keep_limit) if depth else ids
    rows = iter(rows)
    ready = {part: (list(itertools.islice(rows, len(d))), d.labels) for part, d in data.items()}
    best = train_classifier(model, ready, settings, device, out, state)

    rows, labels = ready["test"]
    predicted = predict(model, rows, settings, device).argmax(dim=-1)
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
    confusion.index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    test = {"confusion": confusion.tolist(), "majority": int(ready["train"][1].bincount().argmax())}
    merge_lora(model)
    save_checkpoint(out, model, tokenizer, class_names=class_names, test=test, best=best,
                    settings=settings_to_save(settings))
    state_path(out).unlink()
    print(f"saved    {out}: epoch {best['epoch']:g}, the best on validation "
          f"({best['val_accuracy']:.1%}); {beside(out, '.csv').name}")
    print_report(class_names, test)
    return test


def describe(args, start, parts, data, model, settings, device, state):
    """Say what is about to run, before it takes its time."""
    train, validation, test = (len(texts) for texts in parts.values())
    seen = {text for _, text in parts["train"]}
    twice = sum(text in seen for _, text in parts["test"])
    num_cut = sum(dataset.num_cut for dataset in data.values())
    learn = sum(p.numel() for p in trained_parameters(model).values())
    print(f"split    {train:,} texts to train, {validation:,} to validate, {test:,} to test; "
          f"{twice} of the test texts\n         are training texts too, word for word; {num_cut} "
          f"of all are cut to {model.cfg['context_length']} tokens\n"
          f"model    {start}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{learn:,} of them learn ({args.train})\n"
          f"run      {settings['total_steps']:,} steps of {args.batch_size} x {args.grad_accum} "
          f"texts, learning rate {settings['lr']:.2g}, {device}, "
          f"{settings_to_save(settings)['dtype']}, seed {settings['seed']}"
          + (f", from step {state['step']:,}" if state else ""), flush=True)


def keep_frozen(model, ids, settings, device, limit=None):
    """What the frozen part makes of each text if there is memory for it, else the token IDs."""
    depth = settings["depth"]
    tokens = len(ids) if depth == len(model.trf_blocks) else sum(map(len, ids))
    size = tokens * model.cfg["emb_dim"] * 4
    limit = free_memory() / 2 if limit is None else limit * 1e6
    if size > limit:
        print(f"frozen   {depth} of {len(model.trf_blocks)} blocks; keeping their output takes "
              f"{size / 1e6:,.0f} MB, and {limit / 1e6:,.0f} may be used: computed in every epoch")
        return ids
    rows = compute_frozen(model, ids, depth, settings, device)
    print(f"frozen   {depth} of {len(model.trf_blocks)} blocks, computed once, their output kept: "
          f"{size / 1e6:,.0f} MB", flush=True)
    return rows


def classify_command(args):
    """--classify: a line per text with class, probability and the text."""
    device = pick_device(args.device)
    model, tokenizer, saved = load_checkpoint(args.out, device, kind="classifier")
    dtype = pick_dtype(args.dtype, device)
    if "-" in args.classify:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if sys.stdin.isatty():
            print("a text per line, please; Ctrl-D ends", file=sys.stderr)
    texts = itertools.chain.from_iterable(
        (line.rstrip("\r\n") for line in sys.stdin) if text == "-" else [text]
        for text in args.classify)
    at_once = 1 if sys.stdin.isatty() else 256   # who types wants an answer to each line
    while batch := list(itertools.islice(texts, at_once)):
        full = [text for text in batch if text.strip()]
        if len(full) < len(batch):
            print(f"{len(batch) - len(full)} empty text(s) skipped", file=sys.stderr)
        if not full:
            continue
        probs = classify_texts(full, model, tokenizer, device, dtype)
        for text, row in zip(full, probs):
            print(f"{saved['class_names'][int(row.argmax())]}\t{row.max():.3f}\t{text}", flush=True)


def main(argv=None):
    """Labelled texts + a language model -> a classifier, its report and its checkpoint."""
    args = parse_arguments(argv)
    if args.classify:
        return classify_command(args)
    device = pick_device(args.device)
    check_output(args.out)
    start = find_start(args.init, STARTS)
    path = args.data or download_and_unzip_spam_data()
    examples, remarks = read_labelled_texts(path, args.text_column, args.label_column)
    class_names = check_classes(path, examples)
    counts = Counter(label for label, _ in examples)
    print(f"data     {path}: {len(examples):,} texts, "
          + ", ".join(f"{counts[name]:,} {name}" for name in class_names)
          + ("" if args.no_balance else f"; {min(counts.values()):,} of each are used"))
    for remark in remarks:
        print(f"         {remark}")
    accuracies = []
    for seed in range(args.seed, args.seed + args.seeds):
        out = args.out if seed == args.seed else args.out.with_name(
            f"{args.out.stem}-seed{seed}{args.out.suffix}")
        test = run(args, examples, class_names, start, seed, out, device)
        confusion = torch.tensor(test["confusion"])
        accuracies.append(int(confusion.trace()) / int(confusion.sum()))
    if args.seeds > 1:
        print(f"\n{args.seeds} seeds: test accuracy {np.mean(accuracies):.1%} on average, standard "
              f"deviation {100 * np.std(accuracies, ddof=1):.1f} points, from "
              f"{min(accuracies):.1%} to "
              f"{max(accuracies):.1%}")
    print(f"\nNext: python finetune_classifier.py --out {args.out} --classify \"Call now!\"")


if __name__ == "__main__":
    run_main(main)
