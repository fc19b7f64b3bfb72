"""Classification: a pretrained GPT learns to tell spam from ham, or any labelled texts apart.

    python finetune_classifier.py                        the SMS Spam Collection, spam or ham
    python finetune_classifier.py --data reviews.csv --text-column review --label-column stars
    python finetune_classifier.py --init checkpoints/gpt2-124M.pt --train lora
    python finetune_classifier.py --classify "You won a prize! Call now" --classify "see you at 8"
    python finetune_classifier.py --classify < texts.txt               a text per line

Reads a language model (checkpoints/gpt2-124M.pt if it is there, else pretrained.pt) and a table of
texts and labels. Writes checkpoints/classifier.pt (the model that was best on the validation texts)
and classifier.csv (the metrics). Book chapter 6 and appendix E.

Shapes as in gpt.py: B rows, T tokens, C embedding width.
"""

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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gpt import (
    ArgumentParser, Progress, TrainingRun, UserError, add_training_arguments, autocast,
    check_output, download, find_start, fingerprint, fingerprint_model, generate,
    keep_freed_memory, load_checkpoint, non_negative_float, pick_device, pick_dtype,
    positive_float, positive_int, read_text_pieces, replace_head, replace_linear_with_lora,
    run_main, say, scale_lr, text_to_token_ids, token_ids_to_text, write_atomically)

# ---------------------------------------------------------------------------------------------
# The task. Why finetune at all? A language model continues texts; asked "is this spam?" it goes on
# writing as its training text would, and has never seen such a question answered. But on its way to
# the next token it has learned to read, and what it reads stands in the vectors of its last block.
# A small layer on top of those learns the answer from a few hundred examples.

def ask(model, tokenizer, text):
    """What a language model says when it is merely asked; 12 tokens. Book section 6.4."""
    prompt = f"Is this message spam? Answer yes or no.\n\n{text}\n\nAnswer:"
    idx = text_to_token_ids(prompt, tokenizer).to(model.tok_emb.weight.device)
    ids = generate(model, idx, 12, model.cfg["context_length"], eos_id=tokenizer.eot_token)
    return token_ids_to_text(ids[0, idx.shape[1]:], tokenizer)


# ---------------------------------------------------------------------------------------------
# Texts and labels: a list of (label, text).

def create_balanced_dataset(examples, seed=123):
    """As many texts of each class as the rarest has, drawn by chance. Book section 6.2.

    Of the SMS messages 87 % are ham: always answering "ham" would be right that often, and the
    model would first of all learn to do so.
    """
    by_class = {}
    for label, text in examples:
        by_class.setdefault(label, []).append((label, text))
    size = min(map(len, by_class.values()))
    rng = random.Random(seed)
    return [example for label in sorted(by_class) for example in rng.sample(by_class[label], size)]


def random_split(examples, train_frac=0.7, validation_frac=0.1, seed=123):
    """Shuffle and cut in three -> (train, validation, test). Book section 6.2.

    The validation texts choose among the states of the training; the test texts are looked at once,
    in the end, as the best of many tries looks better than it is.
    """
    shuffled = random.Random(seed).sample(examples, len(examples))
    train_end = int(len(shuffled) * train_frac)
    validation_end = train_end + int(len(shuffled) * validation_frac)
    return shuffled[:train_end], shuffled[train_end:validation_end], shuffled[validation_end:]


class SpamDataset(Dataset):
    """Labelled texts as token IDs: item i is (IDs (T,), class number). Book section 6.3.

    Texts longer than `max_length` lose their end; `num_cut` counts them. Nothing is padded here:
    `collate` pads a batch to its own longest text, not to the longest of all.
    """

    def __init__(self, examples, tokenizer, max_length=None, class_names=("ham", "spam")):
        ids = [tokenizer.encode(text, disallowed_special=()) for _, text in examples]
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


# ---------------------------------------------------------------------------------------------
# The model: `replace_head` (gpt.py) puts a layer with one output per class in the place of the one
# with an output per token. How much of the rest should learn?

def freeze(model, train, rank=16, alpha=16):
    """Let only a part of the model learn -> how many blocks, from the bottom, stay as they are.

    "head": the new head alone. "last-block": also the last block and the final norm (book section
    6.5). The first blocks see letters and words, which are the same for every task; the last one
    gathers what the next token depends on, and now has to gather something else. "all": everything.
    "lora": the head, and a correction to every matrix in the blocks (appendix E; Hu et al. 2021).
    """
    model.requires_grad_(train == "all")
    model.out_head.requires_grad_(True)
    if train == "last-block":
        model.trf_blocks[-1].requires_grad_(True)
        model.final_norm.requires_grad_(True)
    if train == "lora":
        replace_linear_with_lora(model.trf_blocks, rank, alpha)

    # Without dropout, as in the book, what is frozen gives the same output in every epoch.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return len(model.trf_blocks) - 1 if train in ("head", "last-block") else 0


def classify_batch(model, ids, lengths):
    """Token IDs (B, T) and lengths (B,) -> a score per class, (B, classes)."""
    # subtle: the last real token has read the whole text; the last position of a padded row is
    # padding, and what it says depends on the longest text of the batch.
    last = model.hidden_states(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]
    return model.out_head(last)


# ---------------------------------------------------------------------------------------------
# The loop one would explain first: the whole model for every batch.

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
    """Mean cross-entropy of a batch in nats per text, a tensor to call backward() on. 6.6.

    Accuracy jumps when a text changes sides; the loss, minus the logarithm of the probability of
    the right class, has a slope that training can follow.
    """
    return F.cross_entropy(classify_batch(model, ids.to(device), lengths.to(device)),
                           labels.to(device))


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none. 6.6."""
    model.eval()
    losses = [calc_loss_batch(*batch, model, device).item()
              for batch in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs,
                            eval_freq, eval_iter):
    """Train for `num_epochs` passes; `train_classifier` below is what runs. Book section 6.7.

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

            # Now and then the losses, after each epoch the accuracies.
            if global_step % eval_freq == 0:
                train_losses.append(calc_loss_loader(train_loader, model, device, eval_iter))
                val_losses.append(calc_loss_loader(val_loader, model, device, eval_iter))
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss "
                      f"{train_losses[-1]:.3f}, Val loss {val_losses[-1]:.3f}")
        train_accs.append(calc_accuracy_loader(train_loader, model, device, eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, eval_iter))
        print(f"Training accuracy: {train_accs[-1]:.1%} | Validation accuracy: {val_accs[-1]:.1%}")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


# ---------------------------------------------------------------------------------------------
# The same, many times faster. What is frozen gives the same output in every epoch, so it reads each
# text once, its output is kept, and only the rest runs again and again. And of the last block, the
# head reads one position alone.

def last_token_block(block, x, lengths):
    """`block(x)` at the last real token of each row only: (B, T, C) -> (B, C).

    Every token gives a key and a value; only the last one needs a query, an output and a
    feed-forward pass: five sixths of the block's work are saved.
    """
    att = block.att
    rows, last = torch.arange(len(x), device=x.device), lengths - 1
    normed = block.norm1(x)
    queries = att.split_heads(att.W_query(normed[rows, last])[:, None])   # (B, H, 1, D)
    keys = att.split_heads(att.W_key(normed))                             # (B, H, T, D)
    values = att.split_heads(att.W_value(normed))

    # The last real token sees itself and what is before it, and not the padding behind it.
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]   # (B, T)
    context_vec = F.scaled_dot_product_attention(queries, keys, values,
                                                 attn_mask=real[:, None, None])
    x = x[rows, last] + att.out_proj(context_vec.flatten(1))
    return x + block.ff(block.norm2(x))


def run_frozen(model, ids, depth):
    """Token IDs (B, T) -> what the first `depth` blocks make of them, (B, T, C)."""
    # subtle: rows are padded at the right, and no mask is needed: causal attention never looks
    # right, so no real token sees the padding. What the padding itself yields is never read.
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = model.tok_emb(ids) + model.pos_emb(positions)
    return model.trf_blocks[:depth](x)


def run_rest(model, x, lengths, depth):
    """What `run_frozen` made, (B, T, C), or token IDs (B, T) -> a score per class, (B, classes)."""
    if not x.is_floating_point():
        x = run_frozen(model, x, depth)
    x = model.trf_blocks[depth:-1](x)
    x = last_token_block(model.trf_blocks[-1], x, lengths)
    return model.out_head(model.final_norm(x))


@torch.no_grad()
def in_batches(function, rows, device, dtype, what, most_tokens=2048):
    """Yield (row numbers, `function(padded, lengths)`) for all rows, in batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))   # longest first: little padding
    progress = Progress(len(rows), "texts")
    done = 0
    while done < len(order):
        batch = order[done:done + max(1, most_tokens // len(rows[order[done]]))]
        x, lengths = pad([rows[i] for i in batch], device)
        with autocast(device, dtype):
            result = function(x, lengths)
        yield batch, result.float().cpu()
        done += len(batch)
        progress.update(done, what)
    progress.close()


def compute_frozen(model, ids, depth, device, dtype):
    """Run every text through the frozen part once: list of (T_i,) -> list of (T_i, C)."""
    lengths = [len(row) for row in ids]
    # Kept in float32, like the sums along the shortcuts: rounding would change the result.
    kept = torch.empty(sum(lengths), model.cfg["emb_dim"]).split(lengths)
    model.eval()
    for batch, x in in_batches(lambda x, lengths: run_frozen(model, x, depth), ids, device, dtype,
                               "reading each text once"):
        for i, row in zip(batch, x):
            kept[i].copy_(row[:lengths[i]])
    return list(kept)


def predict(model, rows, depth, device, dtype):
    """Scores of all texts without dropout, in their order: (number of texts, classes)."""
    logits = torch.empty(len(rows), model.out_head.out_features)
    model.eval()
    for batch, scores in in_batches(lambda x, lengths: run_rest(model, x, lengths, depth), rows,
                                    device, dtype, "predicting"):
        logits[batch] = scores
    return logits


def train_classifier(model, parts, run, optimizer, args, depth, device, dtype):
    """The loop that runs. `run` (gpt.py) seeds each step, evaluates, saves, resumes.

    `parts` are {"train": (rows, labels), "val": ...}, the rows as `run_rest` takes them.
    """
    def evaluate():
        result = {}
        for name in ("train", "val"):
            rows, labels = parts[name]
            logits = predict(model, rows, depth, device, dtype)
            result[f"{name}_accuracy"] = float((logits.argmax(dim=-1) == labels).double().mean())
        return {"val_loss": F.cross_entropy(logits, labels).item(), **result}

    rows, labels = parts["train"]
    for step in run.steps(evaluate):
        # Gradients, a batch at a time, divided by the number of texts in the whole step.
        numbers = torch.from_numpy(run.rows_of_step(step, len(rows)))
        step_loss = num_tokens = 0
        for batch in numbers.split(args.batch_size):
            x, lengths = pad([rows[i] for i in batch], device)
            with autocast(device, dtype):
                logits = run_rest(model, x, lengths, depth)
            loss = F.cross_entropy(logits.float(), labels[batch].to(device), reduction="sum")
            (loss / len(numbers)).backward()
            step_loss += loss.detach() / len(numbers)
            num_tokens += int(lengths.sum())

        optimizer.step()
        optimizer.zero_grad()
        run.record(step_loss, num_tokens)


# ---------------------------------------------------------------------------------------------
# The result: what the classifier says of a text, and how far it can be trusted.

def classify_texts(texts, model, tokenizer, device, dtype=torch.float32):
    """Texts -> probabilities (number of texts, classes). Raises ValueError for an empty text."""
    ids = [torch.tensor(tokenizer.encode(text, disallowed_special=())[:model.cfg["context_length"]])
           for text in texts]
    if not all(map(len, ids)):
        raise ValueError("a text is empty; there is nothing to classify")
    return torch.softmax(predict(model, ids, 0, device, dtype), dim=-1)


def classify_review(text, model, tokenizer, device, class_names=("not spam", "spam")):
    """The likeliest class of one text. Book section 6.8."""
    return class_names[int(classify_texts([text], model, tokenizer, device).argmax())]


def wilson_interval(right, total, z=1.96):
    """The 95 % interval of a share (Wilson 1927); it stays within 0 and 1, unlike p +- z s.

    If the same model were tested on many other samples of texts, the true share would lie within
    this range in 95 of 100 cases.
    """
    p = right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return centre - half, centre + half


def report(class_names, labels, predicted, commonest):
    """Print accuracy, baseline, and what was taken for what.

    `labels` and `predicted` (N,) are class numbers; always answering `commonest`, the class that
    most training texts have, is the baseline: it takes no model.
    """
    # Rows are the true classes, columns the predicted ones.
    n = len(class_names)
    table = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
    total, right = len(labels), int(table.trace())
    low, high = wilson_interval(right, total)
    baseline = int(table[commonest].sum()) / total
    say(f"\ntest     {right / total:.1%} of {total} texts are right (95 % interval {low:.1%} to "
        f"{high:.1%})")
    say(f"baseline {baseline:.1%} for always answering {class_names[commonest]!r}, the commonest "
        "training class")
    if low <= baseline:
        say("         The baseline is not below the interval: this test does not show that the "
            "model learned\n         anything. A larger language model, more texts or more epochs "
            "may help.")

    # Precision: of what was called spam, how much is; recall: of the spam, how much was found.
    width = max(10, *map(len, class_names))
    say(f"\n{'true class':{width}}  precision  recall   predicted: "
        + "  ".join(f"{name:>{width}}" for name in class_names))
    for i, name in enumerate(class_names):
        precision = table[i, i] / table[:, i].sum()
        recall = table[i, i] / table[i].sum()
        say(f"{name:{width}}  {precision:>9.1%}  {recall:>6.1%}              "
            + "  ".join(f"{count:{width}}" for count in table[i].tolist()))


# =============================================================================================
# The lesson ends here. What follows: the download, reading tables, the command.
# =============================================================================================

SMS_NAME = "SMSSpamCollection"
SMS_URLS = ["https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"]
SMS_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
LEARNING_RATES = {"last-block": 5e-5, "all": 5e-5,   # the book's, for GPT-2's width
                  "head": 1e-3, "lora": 8e-4}        # few or fresh weights, with a longer way to go


def download_and_unzip_spam_data(urls=SMS_URLS, path=Path("data") / SMS_NAME, sha256=SMS_SHA256):
    """The SMS Spam Collection (Almeida et al. 2011), fetched if it is not there -> its path. 6.2.

    Only the one file that is expected leaves the archive. Raises UserError with each address and
    its reason.
    """
    path, reasons = Path(path), []
    if path.exists():
        return path
    for url in urls:
        archive_path = path.with_name("sms+spam+collection.zip")
        try:
            download([url], archive_path)
            with zipfile.ZipFile(archive_path) as archive, archive.open(SMS_NAME) as file:
                content = file.read(10_000_000)           # whatever size the archive claims
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("the file inside has another content (SHA-256)")
        except UserError as e:
            reasons.append(str(e).split("\n")[-1].strip())
        except Exception as e:  # whatever a broken archive makes zipfile raise
            reasons.append(f"{url}: not the expected archive ({e})")
            archive_path.unlink(missing_ok=True)
        else:
            with write_atomically(path) as part:
                part.write_bytes(content)
            archive_path.unlink()
            return path
    raise UserError(f"{SMS_NAME} could not be downloaded; put the file of that name from the "
                    f"archive at {path} by hand, or try again when there is a network:\n  "
                    + "\n  ".join(reasons))


def read_table(path):
    """A TSV or CSV file -> list of rows of cells, all of one length. Raises UserError.

    The ending .csv or .tsv decides; with any other, a first line with commas and no tab means CSV.
    """
    text = "".join(read_text_pieces(path)).removeprefix("\ufeff")   # Excel's byte order mark
    suffix, first = Path(path).suffix.lower(), text.split("\n", 1)[0]
    # subtle: in TSV a quote is a character like any other. A reader that honours quotes merges SMS
    # messages, and finds 5,572 instead of 5,574.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if suffix == ".csv" or (suffix != ".tsv" and "," in first and "\t" not in first):
        style = {"strict": True}
    csv.field_size_limit(2**31 - 1)

    # Blank lines are left out; a cell too many is mostly a comma outside quotes.
    reader, rows = csv.reader(io.StringIO(text, newline=""), **style), []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(cells)
                if not 2 <= len(cells) == len(rows[0]):
                    raise csv.Error(f"{len(cells)} columns, expected {max(2, len(rows[0]))}; tabs "
                                    "divide them, in a .csv file commas")
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: {e} (quotes keep a text together: "
                        '"he said ""hi"", then left")') from None
    if not rows:
        raise UserError(f"{path} has no texts; give a table of labels and texts")
    return rows


def find_column(path, header, wanted, usual, otherwise):
    """A header or a number from 1 -> a column number from 0; without, the one named `usual`."""
    names = [cell.strip().lower() for cell in header]
    if wanted is None:
        return names.index(usual) if usual in names else otherwise
    if wanted.lower() in names:
        return names.index(wanted.lower())
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    raise UserError(f"{path} has no column {wanted!r}; its first line has {len(names)}: "
                    + ", ".join(repr(cell[:30]) for cell in header))


def read_labelled_texts(path, text_column=None, label_column=None):
    """-> list of (label, text); says what it left out. Raises UserError.

    Without a word about columns, those named label and text are taken, else the first two.
    """
    rows = read_table(path)
    label = find_column(path, rows[0], label_column, "label", 0)
    text = find_column(path, rows[0], text_column, "text", 1)
    if text == label:
        raise UserError(f"text and label are the same column of {path}; name both with "
                        "--text-column and --label-column")
    examples = [(cells[label].strip(), cells[text]) for cells in rows]
    if examples[0][0] not in {name for name, _ in examples[1:]}:
        say(f"header   {', '.join(examples.pop(0))}")  # labels repeat, a header does not
    full = [(name, text) for name, text in examples if name and text.strip()]
    if len(full) < len(examples):
        say(f"skipped  {len(examples) - len(full):,} without text or label")

    # There must be something to tell apart, and enough of it: a tenth is for validation.
    counts = Counter(name for name, _ in full)
    if len(counts) < 2:
        raise UserError(f"{path} has {len(counts)} classes of texts, and at least two are needed; "
                        "is --label-column the right one?")
    rarest = min(counts, key=counts.get)
    if counts[rarest] < 10:
        raise UserError(f"the class {rarest[:40]!r} of {path} has too few texts to split, "
                        f"{counts[rarest]}; at least 10 are needed. Add some, leave the class out, "
                        "or give another --label-column")
    return full


def classify_command(args):
    """--classify: a line per text with class, probability and the text."""
    device = pick_device(args.device)
    model, tokenizer, saved = load_checkpoint(args.checkpoint, device, kind="classifier")
    dtype = pick_dtype(args.dtype, device)
    typed = sys.stdin is not None and sys.stdin.isatty()
    if "-" in args.classify:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if typed:
            print("a text per line, please; Ctrl-D ends", file=sys.stderr)
    texts = itertools.chain.from_iterable(
        (line.rstrip("\r\n") for line in sys.stdin) if text == "-" else [text]
        for text in args.classify)

    # Who types wants an answer to each line.
    while batch := list(itertools.islice(texts, 1 if typed else 256)):
        full = [text for text in batch if text.strip()]
        if len(full) < len(batch):
            print(f"{len(batch) - len(full)} empty text(s) skipped", file=sys.stderr)
        for text, row in zip(full, classify_texts(full, model, tokenizer, device, dtype)):
            say(f"{saved['class_names'][int(row.argmax())]}\t{row.max():.3f}\t{text}")


def parse_arguments(argv):
    """The command line."""
    parser = ArgumentParser(description="Teach a pretrained GPT to classify texts, or classify "
                            "texts with it.")
    arg = parser.add_argument
    arg("--classify", nargs="?", const="-", action="append", metavar="TEXT", help="print the class "
        "of TEXT (repeatable), or of each line of standard input; trains nothing")
    arg("--checkpoint", type=Path, default=Path("checkpoints/classifier.pt"), help="the classifier "
        "for --classify")
    arg("--data", type=Path, help="TSV or CSV file of labelled texts instead of the SMS Spam "
        "Collection")
    arg("--label-column", help="its header or its number; default: the one named label, else the "
        "first")
    arg("--text-column", help="its header or its number; default: the one named text, else the "
        "second")
    arg("--no-balance", action="store_true", help="take all texts, not equally many of each class")
    arg("--init", type=Path, help="language model to start from; default: "
        "checkpoints/gpt2-124M.pt, else pretrained.pt")
    arg("--train", choices=list(LEARNING_RATES), default="last-block", help="which part learns")
    arg("--lora-rank", type=positive_int, default=16, help="width of LoRA's corrections")
    arg("--lora-alpha", type=positive_float, default=16.0, help="their size: they are "
        "multiplied by alpha / rank")
    arg("--weight-decay", type=non_negative_float, default=0.1, help="pull towards zero")
    arg("--keep-limit", type=non_negative_float, metavar="MB", default=2000, help="keep what the "
        "frozen part computes if it takes no more memory than this")
    add_training_arguments(parser, "classifier.pt", epochs=5, batch_size=8)
    return parser.parse_args(argv)


def split_texts(args, path):
    """Read, balance and cut in three -> {"train": [(label, text), ...], "val", "test"}."""
    examples = read_labelled_texts(path, args.text_column, args.label_column)
    counts = Counter(label for label, _ in examples)
    say(f"data     {path}: {len(examples):,} texts, "
        + ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts)))
    if not args.no_balance:
        examples = create_balanced_dataset(examples, args.seed)
    train, val, test = random_split(examples, seed=args.seed)
    seen = {text for _, text in train}
    say(f"split    {len(train):,} to train, {len(val):,} to validate, {len(test):,} to test; "
        f"{sum(text in seen for _, text in test)} test texts are also training texts")
    return {"train": train, "val": val, "test": test}


def read_once(model, data, depth, args, device, dtype):
    """{part: SpamDataset} -> {part: (rows, labels)}, the rows as `run_rest` takes them.

    What the frozen part makes of each text is kept, if there is one and --keep-limit allows it.
    """
    size = sum(len(row) for d in data.values() for row in d.ids) * model.cfg["emb_dim"] * 4 / 1e6
    keep = depth > 0 and size <= args.keep_limit
    parts = {}
    for part, dataset in data.items():
        rows = compute_frozen(model, dataset.ids, depth, device, dtype) if keep else dataset.ids
        parts[part] = (rows, dataset.labels)
    if depth:
        say(f"frozen   {depth} of {len(model.trf_blocks)} blocks, their output takes {size:,.0f} "
            "MB: " + ("kept" if keep else "above --keep-limit, computed in every epoch"))
    return parts


def train(args):
    """Labelled texts + a language model -> a classifier, its checkpoint and its report."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    keep_freed_memory(largest=1 << 25)  # the sizes of larger ones vary: kept, they would add up
    start = find_start(args.init, ("gpt2-124M.pt", "pretrained.pt"),
                       "This stage teaches a language model to tell spam from ham, or any labelled "
                       "texts apart.")
    check_output(args, args.data, start)

    # The texts, in three parts.
    split = split_texts(args, args.data or download_and_unzip_spam_data())
    class_names = sorted({label for texts in split.values() for label, _ in texts})
    model, tokenizer, _ = load_checkpoint(start, device)
    context = model.cfg["context_length"]
    data = {part: SpamDataset(texts, tokenizer, context, class_names)
            for part, texts in split.items()}
    num_cut = sum(dataset.num_cut for dataset in data.values())
    if num_cut:
        say(f"         {num_cut} are cut to {context} tokens")
    if not args.data:
        say("asked    'Is this message spam? Answer yes or no', the language model goes on with "
            + repr(ask(model, tokenizer, split["val"][0][1])))

    # The model: what learns, and what the rest makes of each text.
    settings = {"data": fingerprint(split), "init": fingerprint_model(model)}
    torch.manual_seed(args.seed)
    replace_head(model, len(class_names))
    depth = freeze(model, args.train, args.lora_rank, args.lora_alpha)
    learning = [p for p in model.parameters() if p.requires_grad]
    say(f"model    {start}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in learning):,} of them learn ({args.train})")
    parts = read_once(model, data, depth, args, device, dtype)

    # The run.
    args.lr = args.lr or scale_lr(LEARNING_RATES[args.train], model)
    per_epoch = math.ceil(len(data["train"]) / (args.batch_size * args.grad_accum))
    args.eval_every = args.eval_every or per_epoch
    optimizer = torch.optim.AdamW(learning, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = TrainingRun(args, model, tokenizer, [optimizer], per_epoch, settings,
                      class_names=class_names)
    train_classifier(model, parts, run, optimizer, args, depth, device, dtype)

    # The report of the best model, which is the saved one.
    model, _, _ = load_checkpoint(args.out, device, kind="classifier")
    rows, labels = parts["test"]
    predicted = predict(model, rows, depth, device, dtype).argmax(dim=-1)
    run.finish()
    report(class_names, labels, predicted, int(parts["train"][1].bincount().argmax()))
    say(f"\nNext: python finetune_classifier.py --checkpoint {args.out} --classify \"Call now!\"")


def main(argv=None):
    """Train, or classify."""
    args = parse_arguments(argv)
    if args.classify:
        classify_command(args)
    else:
        train(args)


if __name__ == "__main__":
    run_main(main)
