"""Classification: a pretrained GPT learns to tell spam from ham (what is no spam), or other labels.

    python finetune_classifier.py                        the SMS Spam Collection, spam or ham
    python finetune_classifier.py --data reviews.csv --text-column review --label-column stars
    python finetune_classifier.py --init checkpoints/gpt2-124M.pt --train lora
    python finetune_classifier.py --classify "You won a prize! Call now" --classify "see you at 8"
    python finetune_classifier.py --classify < texts.txt               a text per line

Reads a language model and a table of texts and labels. Writes checkpoints/classifier.pt (the model
that was best on the validation texts) and classifier.csv (the metrics). Book chapter 6, appendix E.
Shapes as in gpt.py: B rows, T tokens, C embedding width, H heads of width D.
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
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from gpt import (
    ArgumentParser, Progress, TrainingRun, UserError, add_training_arguments, autocast,
    check_output, download, find_start, fingerprint, fingerprint_model, generate,
    keep_freed_memory, load_checkpoint, non_negative_float, pick_device, pick_dtype,
    positive_float, positive_int, read_text_pieces, replace_head, replace_linear_with_lora,
    run_main, say, scale_lr, text_to_token_ids, token_ids_to_text, write_atomically)

# ---------------------------------------------------------------------------------------------
# The task. A language model continues texts; asked "is this spam?" it goes on writing as its
# training text would, as nobody has taught it to answer. But on its way to the next token it has
# learned to read, and what it reads stands in the vectors of its last block. A small layer on top
# of those, and the last block, learn the answer from about a thousand examples.

def ask(model, tokenizer, text):
    """What the language model answers (12 tokens) before any training. Book section 6.4."""
    prompt = f"Is this message spam? Answer yes or no.\n\n{text}\n\nAnswer:"
    idx = text_to_token_ids(prompt, tokenizer).to(model.tok_emb.weight.device)
    ids = generate(model, idx, 12, model.cfg["context_length"], eos_id=tokenizer.eot_token)
    return token_ids_to_text(ids[0, idx.shape[1]:], tokenizer)


# ---------------------------------------------------------------------------------------------
# Texts and labels: a list of (label, text).

def create_balanced_dataset(examples, seed=123):
    """As many texts of each class as the rarest has, drawn at random. Book section 6.2."""
    # 87 % of the SMS messages are ham: a model that always answers "ham" is right that often, and
    # training would find this answer first.
    by_class = {}
    for label, text in examples:
        by_class.setdefault(label, []).append((label, text))
    size = min(map(len, by_class.values()))
    rng = random.Random(seed)
    return [example for label in sorted(by_class) for example in rng.sample(by_class[label], size)]


def random_split(examples, train_frac=0.7, validation_frac=0.1, seed=123):
    """Shuffle and cut in three -> (train, validation, test). Book section 6.2."""
    # The validation texts show which state of the training is best. The best of many looks better
    # than it is, so the test texts are used only once, at the end.
    shuffled = random.Random(seed).sample(examples, len(examples))
    train_end = int(len(shuffled) * train_frac)
    validation_end = train_end + int(len(shuffled) * validation_frac)
    return shuffled[:train_end], shuffled[train_end:validation_end], shuffled[validation_end:]


class SpamDataset(torch.utils.data.Dataset):
    """Labelled texts as token IDs: item i is (IDs (T,), class number). Book section 6.3.

    Texts longer than `max_length` lose their end; `num_cut` counts them. `collate` pads a batch to
    its own longest text, not to the longest of all.
    """

    def __init__(self, examples, tokenizer, max_length=None, class_names=("ham", "spam")):
        ids = [tokenizer.encode(text, disallowed_special=()) for _, text in examples]
        self.num_cut = sum(len(row) > len(row[:max_length]) for row in ids)
        self.ids = [torch.tensor(row[:max_length]) for row in ids]
        self.labels = torch.tensor([class_names.index(label) for label, _ in examples])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return self.ids[i], self.labels[i]


def pad(rows, device="cpu"):
    """Rows (T_i,) or (T_i, C) -> (padded with zeros at the right, their lengths (B,))."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True).to(device), lengths.to(device)


def collate(batch):
    """Items of a SpamDataset -> (token IDs (B, T), lengths (B,), labels (B,)), for a DataLoader."""
    rows, labels = zip(*batch)
    return (*pad(rows), torch.stack(labels))


# ---------------------------------------------------------------------------------------------
# The model: `replace_head` (gpt.py) replaces the output layer, which has one output per token of
# the vocabulary, by one with an output per class. How much of the rest should learn?

def freeze(model, train, rank=16, alpha=16):
    """Let only a part of the model learn -> how many blocks before the last one stay as they are.

    "head": the new head alone. "last-block": also the last block and the final norm (section 6.5):
    the first blocks read what every task needs; the last one gathers what the next token depends
    on, and now has to gather something else. "lora": the head, and a correction to every matrix in
    the blocks (appendix E; Hu et al. 2021). "all": everything.
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
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return len(model.trf_blocks) - 1 if train in ("head", "last-block") else 0


def classify_batch(model, ids, lengths):
    """Token IDs (B, T) and lengths (B,) -> a score per class, (B, classes)."""
    # subtle: the last real token has read the whole text; the last position of a padded row is
    # padding, and what it says depends on the longest text of the batch.
    hidden = model.hidden_states(ids)                                     # (B, T, C)
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]   # (B, C)
    return model.out_head(last)


# ---------------------------------------------------------------------------------------------
# The simple loop: the whole model for every batch. A loader yields (token IDs (B, T), lengths (B,),
# labels (B,)), as `collate` makes them. Book sections 6.6 and 6.7.

@torch.no_grad()
def calc_accuracy_loader(data_loader, model, device, num_batches=None):
    """The share of right predictions in the first `num_batches` batches (None: all), else NaN."""
    model.eval()
    right = []
    for ids, lengths, labels in itertools.islice(data_loader, num_batches):
        predicted = classify_batch(model, ids.to(device), lengths.to(device)).argmax(dim=-1)
        right += (predicted == labels.to(device)).tolist()
    return sum(right) / len(right) if right else math.nan


def calc_loss_batch(ids, lengths, labels, model, device):
    """Mean cross-entropy of a batch in nats per text, a tensor to call backward() on."""
    # Accuracy changes only when a prediction flips; the loss, -log(probability of the right class),
    # changes with every weight, so it has a slope that training can follow.
    logits = classify_batch(model, ids.to(device), lengths.to(device))
    return F.cross_entropy(logits, labels.to(device))


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Mean loss over the first `num_batches` batches (None: all); NaN if there are none."""
    model.eval()
    losses = [calc_loss_batch(*batch, model, device).item()
              for batch in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses) if losses else math.nan


def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs,
                            eval_freq, eval_iter):
    """The book's loop, section 6.7; `train_classifier` below is what runs.

    -> (training losses, validation losses, training accuracies, validation accuracies, number of
    texts seen): losses every `eval_freq` steps, accuracies every epoch, over `eval_iter` batches.
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
# The same, many times faster. Frozen blocks read each text once, and their output is kept. And the
# head reads only one position of the last block's output.

def last_token_block(block, x, lengths):
    """`block(x)` at the last real token of each row only: (B, T, C) -> (B, C)."""
    # Every token gives a key and a value; only the last one needs a query, an output and a
    # feed-forward pass: 10 of the block's 12 products with a C x C matrix are saved.
    att = block.att
    rows, last = torch.arange(len(x), device=x.device), lengths - 1
    normed = block.norm1(x)
    queries = att.split_heads(att.W_query(normed[rows, last])[:, None])   # (B, H, 1, D)
    keys = att.split_heads(att.W_key(normed))                             # (B, H, T, D)
    values = att.split_heads(att.W_value(normed))

    # A single query needs no causal mask, but one that hides the padding behind the last token.
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]   # (B, T)
    context_vec = F.scaled_dot_product_attention(queries, keys, values, real[:, None, None])
    x = x[rows, last] + att.out_proj(context_vec.flatten(1))
    return x + block.ff(block.norm2(x))


def run_frozen(model, ids, depth):
    """Token IDs (B, T) -> what the first `depth` blocks make of them, (B, T, C)."""
    # subtle: rows are padded at the right, and no padding mask is needed: causal attention never
    # looks right, so no real token sees the padding. What the padding itself yields is never read.
    x = model.tok_emb(ids) + model.pos_emb(torch.arange(ids.shape[1], device=ids.device))
    return model.trf_blocks[:depth](x)


def run_rest(model, x, lengths, depth):
    """What `run_frozen` made, (B, T, C), or token IDs (B, T) -> a score per class, (B, classes)."""
    if not x.is_floating_point():
        x = run_frozen(model, x, depth)
    x = model.trf_blocks[depth:-1](x)  # an empty slice returns x
    x = last_token_block(model.trf_blocks[-1], x, lengths)
    return model.out_head(model.final_norm(x))


@torch.no_grad()
def in_batches(function, rows, device, dtype, most_tokens=2048):
    """Yield (i, what `function(padded, lengths)` makes of row i), for all rows."""
    # Longest first: the first text of a batch sets its width, and like lengths need little padding.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    progress = Progress(len(rows), "texts")
    done = 0
    while done < len(order):
        batch = order[done:done + max(1, most_tokens // len(rows[order[done]]))]
        x, lengths = pad([rows[i] for i in batch], device)
        with autocast(device, dtype):
            result = function(x, lengths)
        yield from zip(batch, result.float().cpu())
        done += len(batch)
        if sys.stdout.isatty():  # in a file it would stand between the lines of --classify
            progress.update(done, "reading texts")
    progress.close()


def read_once(model, ids, depth, keep_limit, device, dtype):
    """Run every text through the frozen part: list of (T_i,) -> list of (T_i, C).

    Returns `ids` if nothing is frozen or the output takes more than `keep_limit` megabytes.
    """
    if depth == 0:
        return list(ids)
    size = sum(map(len, ids)) * model.cfg["emb_dim"] * 4 / 1e6
    keep = size <= keep_limit
    say(f"frozen   the first {depth} of {len(model.trf_blocks)} blocks, their output takes "
        f"{size:,.0f} MB: " + ("kept" if keep else "computed in every epoch"))
    rows = list(ids)
    if keep:
        for i, x in in_batches(lambda x, _: run_frozen(model, x, depth), ids, device, dtype):
            rows[i] = x[:len(ids[i])]
    return rows


def predict(model, rows, depth, device, dtype):
    """Scores of all texts without dropout, in their order: (number of texts, classes)."""
    model.eval()
    logits = torch.empty(len(rows), model.out_head.out_features)
    for i, scores in in_batches(lambda *x: run_rest(model, *x, depth), rows, device, dtype):
        logits[i] = scores
    return logits


def train_classifier(model, rows, labels, num_train, run, optimizer, args, depth, device, dtype):
    """The loop that runs. `run` (gpt.py) seeds each step, evaluates, saves, resumes.

    `rows` are as from `read_once`: the `num_train` training texts, then the validation texts.
    """
    def evaluate():
        logits = predict(model, rows, depth, device, dtype)
        right = (logits.argmax(dim=-1) == labels).double()
        return {"val_loss": F.cross_entropy(logits[num_train:], labels[num_train:]).item(),
                "train_accuracy": right[:num_train].mean().item(),
                "val_accuracy": right[num_train:].mean().item()}

    for step in run.steps(evaluate):
        # The gradients of --grad-accum batches add up to that of the mean over all their texts.
        numbers = torch.from_numpy(run.rows_of_step(step, num_train))
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
    """Texts, none of them empty -> probabilities (number of texts, classes)."""
    ids = [torch.tensor(tokenizer.encode(text, disallowed_special=())[:model.cfg["context_length"]])
           for text in texts]
    return torch.softmax(predict(model, ids, 0, device, dtype), dim=-1)


def classify_review(text, model, tokenizer, device, class_names=("ham", "spam")):
    """The likeliest class of one text. Book section 6.8."""
    return class_names[int(classify_texts([text], model, tokenizer, device).argmax())]


def wilson_interval(right, total, z=1.96):
    """The 95 % interval of a share (Wilson 1927); it stays within 0 and 1."""
    # Computed from many samples of texts, 95 of 100 such intervals contain the true share.
    p = right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return centre - half, centre + half


def report(class_names, labels, predicted, commonest):
    """Print accuracy, baseline, and what was taken for what, from class numbers, (N,) each."""
    # Rows are the true classes, columns the predicted ones. The baseline takes no model: it always
    # answers `commonest`, the class that most training texts have.
    n, total = len(class_names), len(labels)
    table = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
    right = int(table.trace())
    baseline = int(table[commonest].sum()) / total
    low, high = wilson_interval(right, total)
    say(f"\ntest     {right / total:.1%} of {total} texts are right "
        f"(95 % interval {low:.1%} to {high:.1%})\n"
        f"baseline {baseline:.1%} for always answering {class_names[commonest]!r}")
    if low <= baseline:
        say("         The baseline is not below the interval: this test does not show that the "
            "model\n         learned. Try a larger language model, more texts or more epochs.")

    # Precision: of what was called spam, how much is; recall: of the spam, how much was found.
    width = max(10, *map(len, class_names))
    names = "  ".join(f"{name:>{width}}" for name in class_names)
    say(f"\n{'true class':{width}}  precision  recall   predicted: {names}")
    for i, name in enumerate(class_names):
        precision = table[i, i] / table[:, i].sum()
        recall = table[i, i] / table[i].sum()
        counts = "  ".join(f"{count:{width}}" for count in table[i].tolist())
        say(f"{name:{width}}  {precision:>9.1%}  {recall:>6.1%}              {counts}")


# =============================================================================================
# The lesson ends here. What follows: the download, reading tables, the command.
# =============================================================================================

SMS_NAME = "SMSSpamCollection"
SMS_URLS = ["https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"]
SMS_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"
LEARNING_RATES = {"last-block": 5e-5, "all": 5e-5,   # the book's, for GPT-2's width
                  "head": 1e-3, "lora": 8e-4}        # only new weights, which begin at random


def download_and_unzip_spam_data(urls=SMS_URLS, path=Path("data") / SMS_NAME, sha256=SMS_SHA256):
    """The SMS Spam Collection (Almeida et al. 2011), fetched if missing -> its path. UserError."""
    path, reasons = Path(path), []
    if path.exists():
        return path

    # Where one address serves a broken archive, the next one is asked.
    archive = path.with_name("sms+spam+collection.zip")
    for url in urls:
        try:
            download([url], archive)
            with zipfile.ZipFile(archive) as file:
                content = file.read(SMS_NAME)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("not the expected archive: another SHA-256")
            with write_atomically(path) as part:
                part.write_bytes(content)
            return path
        except Exception as e:  # whatever a broken archive makes zipfile raise
            reasons.append(f"  {url}: " + str(e).split("\n")[-1].removeprefix(f"  {url}: "))
        finally:
            archive.unlink(missing_ok=True)
    raise UserError(f"{SMS_NAME} could not be downloaded; unpack the archive and put this file at "
                    f"{path} by hand:\n" + "\n".join(reasons))


def read_table(path):
    """A CSV file (ending .csv, or no tab in line 1) or TSV file -> rows of cells. UserError."""
    # subtle: in TSV a quote is a character like any other. A reader that honours quotes merges SMS
    # messages, and finds 5,572 instead of 5,574.
    text = "".join(read_text_pieces(path)).removeprefix("\ufeff")   # Excel's byte order mark
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if Path(path).suffix.lower() == ".csv" or "\t" not in text.lstrip("\r\n").split("\n")[0]:
        style = {"strict": True}
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), **style)

    # Blank lines are left out; a cell too many is mostly a comma outside quotes.
    rows = []
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                rows.append(cells)
                if not 2 <= len(cells) == len(rows[0]):
                    raise csv.Error(f"{len(cells)} columns, expected {max(2, len(rows[0]))} "
                                    "(divided by tabs; in a .csv file by commas outside quotes)")
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: {e}") from None
    if not rows:
        raise UserError(f"{path} has no texts; give a table of labels and texts")
    return rows


def find_column(header, wanted, usual, otherwise):
    """A header or a number from 1 -> a column number from 0; without, the one named `usual`."""
    for i, name in enumerate(header):
        if (wanted or usual).lower() in (name.strip().lower(), str(i + 1)):
            return i
    if wanted:
        raise UserError(f"no column {wanted!r} in the first line: {', '.join(header)[:200]}")
    return otherwise


def read_labelled_texts(path, text_column=None, label_column=None):
    """-> list of (label, text). Columns: as asked, else named text and label, else 1 and 2."""
    rows = read_table(path)
    label = find_column(rows[0], label_column, "label", 0)
    text = find_column(rows[0], text_column, "text", 1)
    if text == label:
        raise UserError("text and label are the same column; give --text-column and --label-column")
    examples = [(cells[label].strip(), cells[text]) for cells in rows]
    if examples[0][0] not in {name for name, _ in examples[1:]}:
        say(f"header   {', '.join(examples.pop(0))}")  # labels repeat, a header does not

    full = [(name, text) for name, text in examples if name and text.strip()]
    counts = Counter(name for name, _ in full)
    found = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())[:20])
    say(f"data     {path}: {len(full):,} texts, {found}\n"
        f"skipped  {len(examples) - len(full):,} without text or label")

    # Two classes of 10 texts leave 2 to validate.
    rarest = min(counts, key=counts.get, default="")
    if len(counts) < 2 or counts[rarest] < 10:
        raise UserError(f"{path} has {len(counts)} classes, the rarest, {rarest[:40]!r}, with "
                        f"{counts[rarest]} texts; give two classes of 10, or a --label-column")
    return full


def classify_command(args):
    """--classify: a line per text with class, probability and the text."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, saved = load_checkpoint(args.checkpoint, device, kind="classifier")
    if "-" in args.classify:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    typed = "-" in args.classify and sys.stdin.isatty()  # who types wants an answer to each line
    if typed:
        print("a text per line, please; Ctrl-D ends", file=sys.stderr)
    lines = (line.rstrip("\n") for text in args.classify
             for line in (sys.stdin if text == "-" else [text]))

    # A line with nothing in it has no last token to read.
    while batch := list(itertools.islice(lines, 1 if typed else 256)):
        texts = [text for text in batch if text.strip()]
        if len(texts) < len(batch):
            print(f"{len(batch) - len(texts)} empty text(s) skipped", file=sys.stderr)
        for text, probs in zip(texts, classify_texts(texts, model, tokenizer, device, dtype)):
            say(f"{saved['class_names'][int(probs.argmax())]}\t{probs.max():.3f}\t{text}")


def split_texts(args):
    """Read, balance and cut in three -> lists of (label, text): (train, validation, test)."""
    path = args.data or download_and_unzip_spam_data()
    examples = read_labelled_texts(path, args.text_column, args.label_column)
    if not args.no_balance:
        examples = create_balanced_dataset(examples, args.seed)
    train, val, test = random_split(examples, seed=args.seed)
    seen = {text for _, text in train}
    say(f"split    {len(train):,} to train, {len(val):,} to validate, {len(test):,} to test; "
        f"{sum(text in seen for _, text in test)} test texts are also training texts")
    return train, val, test


def train(args):
    """Labelled texts + a language model -> a classifier, its checkpoint and its report."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    keep_freed_memory(largest=1 << 25)  # larger blocks vary in size and would pile up
    start = find_start(args.init, ("gpt2-124M.pt", "pretrained.pt"),
                       "This stage teaches a language model to tell spam from ham.")
    check_output(args, args.data, start)
    model, tokenizer, _ = load_checkpoint(start, device)

    # The texts: what trains, what chooses among the states, and the rest, which tests.
    split = split_texts(args)
    num_train = len(split[0])
    num_seen = num_train + len(split[1])
    class_names = sorted({label for label, _ in sum(split, [])})
    data = SpamDataset(sum(split, []), tokenizer, model.cfg["context_length"], class_names)
    say(f"         {data.num_cut} are cut to {model.cfg['context_length']} tokens")
    if not args.data:
        say("asked    'Is this message spam? Answer yes or no', the language model goes on with "
            + repr(ask(model, tokenizer, split[1][0][1])))

    # The model: what learns, and what the rest makes of each text.
    settings = {"data": fingerprint(split), "init": fingerprint_model(model)}
    torch.manual_seed(args.seed)
    replace_head(model, len(class_names))
    depth = freeze(model, args.train, args.lora_rank, args.lora_alpha)
    learning = [p for p in model.parameters() if p.requires_grad]
    say(f"model    {start}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in learning):,} of them learn ({args.train})")
    rows = read_once(model, data.ids, depth, args.keep_limit, device, dtype)

    # The run.
    args.lr = args.lr or scale_lr(LEARNING_RATES[args.train], model)
    per_epoch = math.ceil(num_train / (args.batch_size * args.grad_accum))
    args.eval_every = args.eval_every or per_epoch
    optimizer = torch.optim.AdamW(learning, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = TrainingRun(args, model, tokenizer, [optimizer], per_epoch, settings,
                      class_names=class_names)
    train_classifier(model, rows[:num_seen], data.labels[:num_seen], num_train, run, optimizer,
                     args, depth, device, dtype)

    # The report of the best model, which is the saved one.
    model, _, _ = load_checkpoint(args.out, device, kind="classifier")
    predicted = predict(model, rows[num_seen:], depth, device, dtype).argmax(dim=-1)
    run.finish()
    report(class_names, data.labels[num_seen:], predicted,
           commonest=int(data.labels[:num_train].bincount().argmax()))
    say(f"\nNext: python finetune_classifier.py --checkpoint {args.out} --classify 'Call now'")


def main(argv=None):
    """Train, or classify."""
    parser = ArgumentParser(description="Teach a pretrained GPT to classify texts; or classify.")
    arg = parser.add_argument
    arg("--classify", nargs="?", const="-", action="append", metavar="TEXT",
        help="print the class of TEXT (repeatable), or of each line of standard input")
    arg("--checkpoint", type=Path, default=Path("checkpoints/classifier.pt"), help="for --classify")

    # Where the texts come from.
    arg("--data", type=Path, help="TSV or CSV file of labelled texts; default: the SMS messages")
    arg("--label-column", help="header or number; default: the one named label, else the first")
    arg("--text-column", help="header or number; default: the one named text, else the second")
    arg("--no-balance", action="store_true", help="take all texts, not equally many of each class")

    # What is trained, and how.
    arg("--init", type=Path, help="language model; default: gpt2-124M.pt, else pretrained.pt")
    arg("--train", choices=list(LEARNING_RATES), default="last-block", help="which part learns")
    arg("--lora-rank", type=positive_int, default=16, help="width of LoRA's corrections")
    arg("--lora-alpha", type=positive_float, default=16.0, help="size: times alpha / rank")
    arg("--weight-decay", type=non_negative_float, default=0.1, help="pull towards zero")
    arg("--keep-limit", type=non_negative_float, metavar="MB", default=2000,
        help="keep the frozen part's output if it takes at most this much memory")
    add_training_arguments(parser, "classifier.pt", epochs=5, batch_size=8)

    args = parser.parse_args(argv)
    if args.classify:
        return classify_command(args)
    train(args)


if __name__ == "__main__":
    run_main(main)
