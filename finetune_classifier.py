"""Classification: a pretrained GPT learns to tell spam from ham (the rest), or any other labels.

    python finetune_classifier.py                        the SMS Spam Collection, spam or ham
    python finetune_classifier.py --classify 'You won a prize! Call now' --classify 'see you at 8'
    python finetune_classifier.py --classify < texts.txt                    a text per line
    python finetune_classifier.py --init checkpoints/gpt2-124M.pt --train lora
    python finetune_classifier.py --data reviews.csv --text-column review --label-column stars \\
        --out checkpoints/stars.pt

It reads a language model and a table, and writes checkpoints/classifier.pt, the model that was best
on the validation texts, and classifier.csv, the metrics. It follows chapter 6 and appendix E of the
book. Shapes as in gpt.py: B rows, T tokens, C embedding width.
"""

import csv
import hashlib
import io
import itertools
import math
import random
import re
import shlex
import sys
import zipfile
from collections import Counter
from pathlib import Path

from gpt import (  # before torch, which reads a setting of gpt.py when it starts
    ArgumentParser, Run, UserError, add_training_arguments, autocast, check_output, download,
    find_start, fingerprint, generate, keep_freed_memory, load_checkpoint, name,
    non_negative_float, path, pick_device, pick_dtype, positive_float, positive_int, printable,
    progress, read_text, replace_linear_with_lora, run_main, say, scale_lr, token_ids_to_text,
    write_atomically)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

# ---------------------------------------------------------------------------------------------
# The task. A language model continues texts. Asked "is this spam?", it goes on as its training text
# would, because nobody has taught it to answer. But to predict the next token it has learned to
# read, and what it has read stands in the vectors of its last block. A small layer on top of them,
# trained together with the last block on about a thousand examples, learns the answer.

def ask(model, tokenizer, text):
    """What a language model answers when it is merely asked, in 12 tokens. Book section 6.4."""
    ids = encode(f"Is this message spam? Answer yes or no.\n\n{text}\n\nAnswer:", tokenizer)
    answer = generate(model, ids, 12, eos_id=tokenizer.eot_token)
    return token_ids_to_text(answer[0, len(ids):], tokenizer)


# ---------------------------------------------------------------------------------------------
# Texts and labels: a list of (label, text).

def create_balanced_dataset(examples, seed=123):
    """As many texts of each class as the rarest has, drawn at random. Book section 6.2."""
    check_examples(examples)
    # 87 % of the SMS messages are ham: a model that always answers "ham" is right that often, and
    # training would find this answer first.
    classes = sorted({label for label, _ in examples})
    by_class = [[example for example in examples if example[0] == label] for label in classes]
    size = min(map(len, by_class))
    rng = random.Random(seed)
    return [example for texts in by_class for example in rng.sample(texts, size)]


def random_split(examples, train_frac=0.7, validation_frac=0.1, seed=123):
    """Shuffle and cut in three -> (train, validation, test). Book section 6.2."""
    check_examples(examples)
    # The validation texts show which state of the training is best. The best of many looks better
    # than it is, so the test texts are used only once, at the end.
    examples = random.Random(seed).sample(examples, len(examples))
    train_end = int(len(examples) * train_frac)
    validation_end = train_end + int(len(examples) * validation_frac)
    return examples[:train_end], examples[train_end:validation_end], examples[validation_end:]


def encode(text, tokenizer, max_length=None):
    """A text -> its first `max_length` token IDs, (T,). Raises ValueError for an empty text."""
    # The mark <|endoftext|> in a message is text like any other. A token of GPT-2 has at most 128
    # characters, so what stands behind 128 * max_length need not be read.
    end = 128 * max_length if max_length else None
    ids = tokenizer.encode(text[:end], disallowed_special=())
    if not ids:
        raise ValueError("a text is empty: it has no last token for the classifier to read")
    return torch.tensor(ids[:max_length])


class SpamDataset(Dataset):
    """Labelled texts as token IDs: item i is (IDs (T,), class number ()). Book section 6.3.

    Texts longer than `max_length` tokens lose their end. Raises ValueError. Example, in bytes:
        SpamDataset([("spam", "Win!")], tokenizer)[0]    # (tensor([ 87, 105, 110,  33]), tensor(1))
    """

    def __init__(self, examples, tokenizer, max_length=None, class_names=("ham", "spam")):
        check_examples(examples, class_names)
        self.examples = examples
        self.labels = torch.tensor([class_names.index(label) for label, _ in examples])
        self.rows = [encode(text, tokenizer, max_length) for _, text in examples]
        self.max_length = max(map(len, self.rows))  # of the longest text

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i], self.labels[i]


def collate(batch):
    """Items of a dataset -> (token IDs (B, T), lengths (B,), labels (B,)), for a DataLoader."""
    # Zeros at the right make the rows equally long. The book pads all texts to the longest of all;
    # the longest of the batch is enough.
    rows, labels = zip(*batch)
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True), lengths, torch.stack(labels)


# ---------------------------------------------------------------------------------------------
# The model. Its output layer has an output per token of the vocabulary. A layer with an output per
# class takes its place, and begins with random weights. How much of the rest should learn?

def replace_head(model, num_classes):
    """Replace out_head (C -> V) by a new layer (C -> num_classes), in place. Book section 6.5."""
    # In a tied model out_head and tok_emb are one matrix. tok_emb keeps it; the head has its own.
    model.cfg["tie_embeddings"] = False
    model.out_head = nn.Linear(model.cfg["emb_dim"], num_classes).to(model.tok_emb.weight.device)


def freeze(model, train="last-block", rank=16, alpha=16):
    """Let only a part of the model learn; the rest is frozen. ValueError for an unknown `train`.

    "head"        the new head alone
    "last-block"  also the last block and the final norm (section 6.5). The first blocks find what
                  every task needs; the last one gathers what the next token depends on, and has to
                  gather something else now.
    "lora"        the head, and a small correction to each matrix in the blocks, of rank `rank`
                  (appendix E; Hu et al. 2021; class LoRALayer in gpt.py explains it)
    "all"         everything
    """
    if train not in ("head", "last-block", "lora", "all"):
        raise ValueError(f'train must be "head", "last-block", "lora" or "all", not {train!r}')
    model.requires_grad_(train == "all")
    model.out_head.requires_grad_(True)
    if train == "last-block":
        model.trf_blocks[-1].requires_grad_(True)
        model.final_norm.requires_grad_(True)
    if train == "lora":
        replace_linear_with_lora(model.trf_blocks, rank, alpha)

    # No dropout, as in the book. So what is frozen gives the same output in every epoch, and can be
    # computed once.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def classify_batch(model, inputs, lengths):
    """Token IDs (B, T) and lengths (B,) -> logits, a score per class, (B, classes)."""
    if inputs.is_floating_point():  # a shortcut for frozen blocks; skip it at first
        return classify_kept(model, inputs, lengths)

    # subtle: a token sees only itself and the tokens before it. So the last real token has read the
    # whole text, and no real token sees the padding at the right. What the model makes of the
    # padding itself is of no use.
    hidden = model.hidden_states(inputs)                                      # (B, T, C)
    last = hidden[torch.arange(len(inputs), device=inputs.device), lengths - 1]   # (B, C)
    return model.out_head(last)


# ---------------------------------------------------------------------------------------------
# How good is it? Accuracy is what we want, but it changes only when a prediction flips. The loss,
# -log(probability of the right class), changes with every weight, so it has a slope that training
# can follow. Before training, two classes give an accuracy near 50 % and a loss near log(2) = 0.69.

@torch.no_grad()
def predict_loader(data_loader, model, device, num_batches=None, dtype=torch.float32):
    """Logits (N, classes) and labels (N,) of the first `num_batches` batches (None: of all)."""
    model.eval()
    logits, labels = [], []
    for inputs, lengths, targets in itertools.islice(data_loader, num_batches):
        with autocast(device, dtype):  # matrix products in `dtype`; see gpt.py
            scores = classify_batch(model, inputs.to(device), lengths.to(device))
        logits.append(scores.float().cpu())
        labels.append(targets)
        progress(f"reading texts, batch {len(labels):,}")
    progress("")
    return torch.cat(logits), torch.cat(labels)


def calc_accuracy_loader(data_loader, model, device, num_batches=None, dtype=torch.float32):
    """The share of texts whose likeliest class is the right one. Book section 6.6."""
    logits, labels = predict_loader(data_loader, model, device, num_batches, dtype)
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def calc_loss_loader(data_loader, model, device, num_batches=None, dtype=torch.float32):
    """The mean loss, in nats per text. Book section 6.6."""
    logits, labels = predict_loader(data_loader, model, device, num_batches, dtype)
    return F.cross_entropy(logits, labels).item()


# ---------------------------------------------------------------------------------------------
# Training.

def train_classifier_simple(model, train_loader, val_loader, optimizer, device, num_epochs,
                            eval_freq, eval_iter, run=None, dtype=torch.float32, seed=123, accum=1):
    """The training loop. Book section 6.7.

    `run` (gpt.py) is the run's notebook. `due` says whether it is time to measure. `report` prints
    and saves what was measured, and the model if it is the best so far. `done` counts a step
    and its tokens and notes its loss; the mean of the noted losses is the `train_loss` of the next
    report. `run.rows` holds the reports. Without a `run` nothing is written.

    Every `eval_freq` steps the model is measured on `eval_iter` batches (None: all). Returns lists
    of training losses (means over the steps before), validation losses, training accuracies and
    validation accuracies, and the number of texts seen.
    """
    steps_per_epoch = math.ceil(len(train_loader) / accum)
    run = run or Run(num_epochs * steps_per_epoch)
    examples_seen, batches = 0, None

    while True:
        # Measure when it is due, on the first `eval_iter` batches. The loader shuffles, so the seed
        # decides which texts are in them.
        if run.due(eval_freq):
            torch.manual_seed(hash((seed, run.step)))
            how = model, device, eval_iter, dtype
            run.report(epoch=run.step / steps_per_epoch,
                       val_loss=calc_loss_loader(val_loader, *how),
                       train_accuracy=calc_accuracy_loader(train_loader, *how),
                       val_accuracy=calc_accuracy_loader(val_loader, *how))
        if run.step >= run.total_steps:
            break

        # The loader shuffles anew in each epoch. A resumed run skips the steps that are done.
        epoch, k = divmod(run.step, steps_per_epoch)
        if batches is None or k == 0:
            torch.manual_seed(hash((seed, epoch)))
            batches = itertools.islice(train_loader, k * accum, None)

        # A step takes `accum` batches and adds up their gradients, as one larger batch would give.
        step_batches = list(itertools.islice(batches, accum))
        num_texts = sum(len(labels) for _, _, labels in step_batches)
        examples_seen += num_texts

        # How would the loss change with each weight? Each text of the step counts the same.
        model.train()
        step_loss = 0.0
        for inputs, lengths, labels in step_batches:
            with autocast(device, dtype):
                logits = classify_batch(model, inputs.to(device), lengths.to(device))
            loss = F.cross_entropy(logits.float(), labels.to(device), reduction="sum") / num_texts
            loss.backward()
            step_loss += loss.detach()

        # Change each weight so that the loss falls.
        optimizer.step()
        optimizer.zero_grad()
        run.done(step_loss, sum(int(lengths.sum()) for _, lengths, _ in step_batches))

    # Without the first row: it was measured before any training, and has no training loss.
    names = "train_loss", "val_loss", "train_accuracy", "val_accuracy"
    lists = [[row[name] for row in run.rows[1:]] for name in names]
    return *lists, examples_seen


# ---------------------------------------------------------------------------------------------
# The result: what the classifier says of a text, and how far it can be trusted.

def classify_texts(texts, model, tokenizer, device, dtype=torch.float32, max_length=None):
    """Texts -> probabilities (number of texts, classes). Raises ValueError for an empty text."""
    context = model.cfg["context_length"]
    rows = [encode(text, tokenizer, min(max_length or context, context)) for text in texts]
    # `collate` wants labels: 0 fills their place, and is thrown away.
    loader = DataLoader([(row, torch.tensor(0)) for row in rows], 32, collate_fn=collate)
    logits, _ = predict_loader(loader, model, device, dtype=dtype)
    return torch.softmax(logits, dim=-1)


def classify_review(text, model, tokenizer, device, max_length=None, class_names=("ham", "spam")):
    """The likeliest class of one text. Book section 6.8. Raises ValueError."""
    if len(class_names) != model.out_head.out_features:
        raise ValueError(f"class_names has {len(class_names)} names, but this model tells "
                         f"{model.out_head.out_features} classes apart")
    probs = classify_texts([text], model, tokenizer, device, max_length=max_length)
    return class_names[int(probs.argmax())]


def report(class_names, labels, predicted, commonest):
    """Print accuracy, baseline, and what was taken for what, from class numbers, (N,) each."""
    n, total = len(class_names), len(labels)
    # The confusion matrix: table[i, j] counts the texts of class i that were taken for class j.
    # bincount counts how often each number i * n + j occurs. On the diagonal stand the right ones.
    table = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n)
    accuracy = table.trace().item() / total

    # With few test texts the accuracy is uncertain, so an interval is printed with it: `centre`
    # plus or minus `half`, by the formula of Wilson (1927). 1.96 belongs to 95 %: if we repeated
    # the test with many sets of texts, 95 of 100 such intervals would contain the true accuracy.
    square = 1.96 ** 2 / total
    centre = (accuracy + square / 2) / (1 + square)
    half = math.sqrt(square * (accuracy * (1 - accuracy) + square / 4)) / (1 + square)
    print()
    say("test", f"{accuracy:.1%} of {total} texts are right "
        f"(95 % interval {centre - half:.1%} to {centre + half:.1%})")

    # The baseline takes no model: it always answers `commonest`, the class of most training texts.
    # If it is not below the interval, the test does not show that the model learned.
    baseline = table[commonest].sum().item() / total
    say("baseline", f"{baseline:.1%} for always answering {class_names[commonest]!r}")

    # Precision: of what was called spam, the share that is spam. Recall: of all spam, the share
    # that was called spam.
    print("\ntrue class        texts  precision  recall  predicted as")
    for i, label in enumerate(class_names):
        texts, called, found = table[i].sum(), table[:, i].sum(), table[i, i]
        precision = f"{found / called:.1%}" if called else "-"
        recall = f"{found / texts:.1%}" if texts else "-"
        predictions = ", ".join(f"{name}: {k}" for name, k in zip(class_names, table[i]) if k)
        line = f"{label[:16]:16}  {texts:5}  {precision:>9}  {recall:>6}  {predictions}"
        print(printable(line)[:79])


# The same by hand, in Python:
#     from finetune_classifier import *
#     from gpt import GPT_CONFIG_124M, GPTModel, load_tokenizer
#     cfg = {**GPT_CONFIG_124M, "vocab_size": 257, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
#     model, tokenizer = GPTModel(cfg), load_tokenizer("bytes")  # it has read nothing yet
#     parts = random_split(create_balanced_dataset(read_labelled_texts("data/SMSSpamCollection")))
#     train, val, test = [DataLoader(SpamDataset(part, tokenizer), 8, shuffle=True,
#                                    collate_fn=collate) for part in parts]
#     replace_head(model, num_classes=2)
#     freeze(model, "last-block")
#     optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
#     train_classifier_simple(model, train, val, optimizer, "cpu", 1, eval_freq=50, eval_iter=5)
#     print(classify_review("Call now to claim your prize", model, tokenizer, "cpu"))
#
# Try it:
# 1. How accurate is the head alone, when the last block stays as pretraining left it?
#        python finetune_classifier.py --train head --out checkpoints/head.pt
# 2. Leave most texts ham. Compare the baseline and spam's recall with a run without options:
#        python finetune_classifier.py --no-balance --out checkpoints/unbalanced.pt
# 3. Why the last token? In classify_batch write `0 * lengths` instead of `lengths - 1`: the first
#    token has seen only itself. Which accuracy do you expect?
#        python finetune_classifier.py --train all --epochs 1 --out checkpoints/first.pt

# =============================================================================================
# The lesson ends here. What follows: the same, faster; checks, the download, tables, the command.
# =============================================================================================

# The same, faster. Frozen blocks give the same output for a text in every epoch. It is computed
# once and kept. And the head reads one position of the last block's output: the feed-forward
# network computes only that.

@torch.no_grad()
def keep_frozen(model, data, device, dtype):
    """Put what all blocks but the last one make of a text, (T, C), in place of its token IDs."""
    if sum(map(len, data.rows)) * model.cfg["emb_dim"] * 4 > 2e9:
        return  # more than 2 GB of memory: it is computed in every epoch instead

    model.eval()
    kept = []
    for ids, lengths, _ in DataLoader(data, batch_size=32, collate_fn=collate):
        with autocast(device, dtype):
            x = model.tok_emb(ids.to(device)) + model.pos_emb.weight[:ids.shape[1]]
            x = model.trf_blocks[:-1](x).float().cpu()
        kept += [row[:length] for row, length in zip(x, lengths)]
        progress(f"the frozen blocks read {len(kept):,} of {len(data):,} texts")
    data.rows = kept


def classify_kept(model, x, lengths):
    """`classify_batch`, of what `keep_frozen` keeps: (B, T, C) and lengths (B,) -> (B, classes)."""
    # After the attention only the last token goes on. For the other tokens this saves 8 of the
    # block's 12 products with a C x C matrix.
    block = model.trf_blocks[-1]
    x = x + block.att(block.norm1(x))                                 # (B, T, C)
    last = x[torch.arange(len(x), device=x.device), lengths - 1]      # (B, C)
    last = last + block.ff(block.norm2(last))
    return model.out_head(model.final_norm(last))


# ---------------------------------------------------------------------------------------------
# Labelled texts: checks, the download, tables.

SMS = Path("data", "SMSSpamCollection")  # Almeida et al. 2011
SMS_URLS = ["https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
            "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"]
SMS_SHA256 = "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"


def check_examples(examples, class_names=None):
    """Raises ValueError unless `examples` is a list of (label, text), with these labels."""
    labels = {example[0] for example in examples if isinstance(example, (tuple, list))}
    if not labels:
        raise ValueError('expected a list of (label, text), such as [("ham", "see you"), ...]; '
                         'a DataFrame gives one by list(zip(df["Label"], df["Text"]))')
    if class_names and not labels <= set(class_names):
        raise ValueError(f"class_names, {class_names}, lacks {labels - set(class_names)!s:.200}")


def download_and_unzip_spam_data(urls=SMS_URLS, path=SMS, sha256=SMS_SHA256):
    """The SMS Spam Collection, fetched if it is not there -> its path. Raises UserError."""
    path = Path(path)
    if not path.exists():
        archive = download(urls, path.with_name("sms+spam+collection.zip"))
        try:
            content = zipfile.ZipFile(archive).read(SMS.name)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("not the expected archive, another SHA-256")
        except Exception as e:  # whatever a broken archive makes zipfile raise
            raise UserError(f"{archive}: {e!s:.150}; delete it and try again") from None
        with write_atomically(path) as part:
            part.write_bytes(content)
        archive.unlink()
    return path


def read_labelled_texts(path, text_column="text", label_column="label"):
    """A table -> list of (label, text). Without such a header the label is first. UserError."""
    if Path(path).suffix.lower() in (".json", ".jsonl"):
        raise UserError(f"{path} is JSON; make a table of it, with a text and a label in each line")
    text = read_text(path)
    first_line = re.sub('"[^"]*"', "", text.lstrip(" \r\n").partition("\n")[0])  # not in quotes
    divider = "\t" if "\t" in first_line else max(",;", key=first_line.count)

    # subtle: between tabs a quote is a character like any other. A reader that honours quotes
    # merges SMS messages, and finds 5,572 instead of 5,574.
    quoting = csv.QUOTE_NONE if divider == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=divider, quoting=quoting,
                        strict=True)
    rows = []
    try:
        for cells in filter(None, reader):  # an empty line gives no cells
            rows.append(cells)
            if len(cells) != max(2, len(rows[0])):
                raise ValueError(f"{len(cells)} columns, expected {max(2, len(rows[0]))} "
                                 f"(divided by {divider!r} outside quotes)")
    except Exception as e:  # the reader's own, too
        raise UserError(f"{path}, line {reader.line_num}: {e!s:.150}") from None

    # The two columns, by header or number.
    columns = {"label": 0, "text": 1}
    columns |= {title.strip().lower(): i for i, title in enumerate(rows[0])}
    columns |= {str(i + 1): i for i in range(len(rows[0]))}
    wanted = [label_column.lower(), text_column.lower()]
    label_at, text_at = map(columns.get, wanted)
    if label_at == text_at or None in (label_at, text_at):
        raise UserError(f"{path} has no two columns {' and '.join(wanted)}; choose --label-column "
                        f"and --text-column from: {', '.join(rows[0])[:200]}")
    examples = [(cells[label_at].strip(), cells[text_at]) for cells in rows]
    if examples[0][0] not in {label for label, _ in examples[1:]}:
        say("header", ", ".join(rows[0]))  # labels repeat, a header does not
        del examples[0]

    # Lines without a text or a label are left out.
    full = [(label, text) for label, text in examples if label and text.strip()]
    if not full:
        raise UserError(f"{path} has no texts with labels")
    commonest = Counter(label for label, _ in full).most_common(20)
    say("data", f"{path}: {len(full):,} of {len(examples):,} lines have a text and a label, "
        + ", ".join(f"{label}: {number:,}" for label, number in commonest))
    return full


def read_data(args, tokenizer, context):
    """Read, balance, split -> three SpamDatasets and the class names. Raises UserError."""
    files = [args.data or download_and_unzip_spam_data(), args.val_data, args.test_data]
    tables = [read_labelled_texts(file, args.text_column, args.label_column)
              for file in files if file]
    number = Counter(label for label, _ in tables[0])
    class_names = sorted({label for table in tables for label, _ in table})
    rarest = min(class_names, key=lambda label: number[label])
    if len(class_names) < 2 or number[rarest] < 10:  # two classes of 10 leave 2 to validate
        raise UserError(f"{files[0]} has {number[rarest]} texts of {rarest[:40]!r}; give at least "
                        "two classes with 10 texts of each, or another --label-column")

    # Three parts of one table, or three tables. Sorted, like lengths stand together: less padding.
    train = tables[0] if args.no_balance else create_balanced_dataset(tables[0], args.seed)
    parts = [train, *tables[1:]] if args.val_data else random_split(train, seed=args.seed)
    parts = [sorted(part, key=lambda example: len(example[1])) for part in parts]
    data = [SpamDataset(part, tokenizer, context, class_names) for part in parts]
    seen = {text for _, text in parts[0]}
    repeated = sum(text in seen for _, text in parts[2])
    say("split", "{:,} to train, {:,} to validate, {:,} to test; ".format(*map(len, parts))
        + f"{repeated} test texts are also training texts; texts are cut after {context} tokens")
    return data, class_names


# ---------------------------------------------------------------------------------------------
# The command.

LEARNING_RATES = {"last-block": 5e-5, "all": 5e-5,   # the book's, for GPT-2's width
                  "head": 1e-3, "lora": 8e-4}        # only new weights, which begin at random


def classify_command(args):
    """--classify: print a line per text with class, probability and text. -> (model, tokenizer)"""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, saved = load_checkpoint(args.checkpoint, device, kind="classifier")
    lines = args.classify or open(0, encoding="utf-8", errors="replace", closefd=False)
    typed = not args.classify and lines.isatty()  # who types wants an answer to each line
    if typed:
        print("a text per line, please; Ctrl-D ends", file=sys.stderr)

    texts = (line.strip() for line in lines if line.strip())
    while batch := list(itertools.islice(texts, 1 if typed else 256)):
        results = classify_texts(batch, model, tokenizer, device, dtype)
        for text, probs in zip(batch, results):
            label = saved["class_names"][int(probs.argmax())]
            line = f"{label}\t{probs.max():.3f}\t{' '.join(text.split())}"
            print(printable(line), flush=True)
    return model, tokenizer


def train(args):
    """Labelled texts + a language model -> a classifier, its checkpoint and its report."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    keep_freed_memory(largest=1 << 25)  # larger blocks vary in size and would pile up
    start = find_start(args.init, ("gpt2-124M.pt", "stories.pt", "pretrained.pt"),
                       "This stage teaches a language model to tell spam from ham.")
    check_output(args, args.data, args.val_data, args.test_data, start)
    model, tokenizer, _ = load_checkpoint(start, device)

    # The texts: what trains, what chooses among the states, and what tests.
    data, class_names = read_data(args, tokenizer, model.cfg["context_length"])
    settings = {"init": fingerprint(model), "data": fingerprint(*[d.examples for d in data])}
    if not args.data:
        say("asked", f"is 'Call now!' spam? The model says {ask(model, tokenizer, 'Call now!')!r}")

    # What learns.
    torch.manual_seed(args.seed)
    replace_head(model, len(class_names))
    freeze(model, args.train, args.lora_rank, args.lora_alpha)
    learning = [p for p in model.parameters() if p.requires_grad]
    say("model", f"{start}, {args.train}: {sum(p.numel() for p in learning):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters learn")
    if args.train in ("head", "last-block"):
        for part in data[:2]:
            keep_frozen(model, part, device, dtype)

    # The run. As many training texts are measured as there are validation texts.
    train_loader = DataLoader(data[0], args.batch_size, shuffle=True, collate_fn=collate)
    val_loader = DataLoader(data[1], args.batch_size, collate_fn=collate)
    steps_per_epoch = math.ceil(len(train_loader) / args.grad_accum)
    args.lr = args.lr or scale_lr(LEARNING_RATES[args.train], model)
    optimizer = torch.optim.AdamW(learning, args.lr, weight_decay=args.weight_decay, fused=True)
    run = Run(min(args.epochs * steps_per_epoch, args.max_steps or math.inf), args, model,
              [optimizer], tokenizer, settings, class_names=class_names)
    train_classifier_simple(
        model, train_loader, val_loader, optimizer, device, args.epochs,
        args.eval_every or steps_per_epoch, len(val_loader), run, dtype, args.seed, args.grad_accum)
    run.finish()

    # The report of the best model, which is the saved one.
    model, tokenizer, _ = load_checkpoint(args.out, device, kind="classifier")
    test_loader = DataLoader(data[2], batch_size=32, collate_fn=collate)
    logits, labels = predict_loader(test_loader, model, device, dtype=dtype)
    report(class_names, labels, logits.argmax(dim=-1), int(data[0].labels.bincount().argmax()))
    print("\nNext:\n  python finetune_classifier.py --classify 'Call now to claim your prize' \\\n"
          f"    --checkpoint {shlex.quote(str(args.out))}")
    return model, tokenizer


def main(argv=None):
    """Train, or classify -> (model, tokenizer)."""
    parser = ArgumentParser(description="Teach a pretrained GPT to classify texts; or classify.")
    arg = parser.add_argument
    arg("--classify", nargs="*", action="extend", metavar="TEXT", type=name,
        help="print the class of TEXT (repeatable), or of each line of standard input")
    arg("--checkpoint", type=path, default=Path("checkpoints/classifier.pt"), help="for --classify")

    # Where the texts come from.
    arg("--data", type=path, help="TSV or CSV file of labelled texts; default: the SMS messages")
    arg("--val-data", type=path, help="a table to validate with; then --data only trains")
    arg("--test-data", type=path, help="a table to test with, beside --val-data")
    arg("--label-column", type=name, default="label", help="header or number; else the first")
    arg("--text-column", type=name, default="text", help="header or number; else the second")
    arg("--no-balance", action="store_true", help="take all texts, not equally many of each class")

    # What is trained, and how.
    arg("--init", type=path, help="language model; default: the best one in checkpoints/")
    arg("--train", choices=list(LEARNING_RATES), default="last-block", help="which part learns")
    arg("--lora-rank", type=positive_int, default=16, help="width of LoRA's corrections")
    arg("--lora-alpha", type=positive_float, default=16.0, help="their size: times alpha / rank")
    arg("--weight-decay", type=non_negative_float, default=0.1, help="pull towards zero")
    add_training_arguments(parser, "classifier.pt", epochs=5, batch_size=8)
    args = parser.parse_args(argv)
    if args.classify is not None:
        return classify_command(args)
    if bool(args.val_data) != bool(args.test_data) or args.val_data and not args.data:
        parser.error("--val-data and --test-data are given together, with --data to train on")
    return train(args)


if __name__ == "__main__":
    run_main(main)
