"""Instruction finetuning: teach a language model to answer and to hold a conversation.

    python finetune_instruct.py                              the book's data (chapter 7)
    python finetune_instruct.py --data mine.jsonl --train lora --out checkpoints/mine.pt
    python finetune_instruct.py --chat
    python finetune_instruct.py --ask "Rewrite in the passive voice." --input "I ate the fish."
    python finetune_instruct.py --judge llama3               have the answers scored by Ollama

Reads a checkpoint and questions with their answers. Writes checkpoints/instruct.pt (the model with
the lowest validation loss), instruct.csv (the metrics) and instruct-responses.json (answers to the
test records, with scores). Shapes as in gpt.py: B rows, T tokens, C embedding width, V vocabulary.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import re
import shlex
import textwrap
from pathlib import Path

from gpt import (  # before torch, which reads a setting of gpt.py when it starts
    END_OF_TEXT, ArgumentParser, Run, UserError, add_training_arguments, autocast, beside,
    check_output, download, find_start, fingerprint, generate, generate_stream, keep_freed_memory,
    load_checkpoint, name, non_negative_float, path, pick_device, pick_dtype, positive_float,
    positive_int, print_stream, progress, read_text, replace_linear_with_lora, run_main, say,
    scale_lr, text_to_token_ids, token_ids_to_text, write_atomically)

import requests
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

# ---------------------------------------------------------------------------------------------
# Classification or instructions? A classifier (finetune_classifier.py) gives one of a few labels:
# it needs little data and is easy to measure. A model finetuned on instructions can be asked
# anything: it needs a larger model, many different examples, and is hard to measure.
#
# The prompt. A record has an instruction, sometimes an input, and the output that is wanted.
# Training shows the model all three in one fixed form. Later the model is given the first two in
# the same form, and goes on with the third.

PROMPT_STYLES = {  # the text put before a record's instruction, input and output
    # Taori et al. 2023; the book's section 7.2
    "alpaca": {"instruction": "Below is an instruction that describes a task. Write a response "
                              "that appropriately completes the request.\n\n### Instruction:\n",
               "input": "\n\n### Input:\n", "output": "\n\n### Response:\n"},
    # Abdin et al. 2024; the book's exercise 7.1
    "phi3": {"instruction": "<|user|>\n", "input": "\n", "output": "\n<|assistant|>\n"},
}


def format_input(entry, style="alpaca"):
    """A record -> the text that asks its question; earlier turns are not in it. Section 7.2."""
    before = PROMPT_STYLES[style]
    text = before["instruction"] + entry["instruction"]
    if entry.get("input"):
        text += before["input"] + entry["input"]
    return text


# ---------------------------------------------------------------------------------------------
# Conversations. "What is my name?" can only be answered by someone who heard it. So a record may
# have a history: the earlier questions, each with its answer, the oldest first.
#
#     {"history": [["I am Ann.", "Hello!"]], "instruction": "What is my name?", "output": "Ann."}
#
# The model reads all turns in one row. In the style phi3 that is
#
#     <|user|>
#     I am Ann.
#     <|assistant|>
#     Hello!<END><|user|>
#     What is my name?
#     <|assistant|>
#     Ann.<END>
#
# <END> is the end of text, one token of its own. It follows each answer, so that the model learns
# to stop. Where a question or an answer itself mentions <|endoftext|>, that is only text.
#
# The model is to learn to answer, not to ask. A target is the token that the model should predict
# at a place. -100 stands where there is none: it is the number that torch's cross_entropy skips.

def encode(text, tokenizer):
    """Text -> list of token IDs. Raises UserError for a text that the tokenizer cannot read."""
    try:
        return tokenizer.encode(text, disallowed_special=())
    except ValueError as e:
        raise UserError(f"a text cannot be cut into tokens ({e!s:.90}); shorten it") from None


def encode_entry(entry, tokenizer, style="alpaca", room=math.inf):
    """A record -> its turns in one row: token IDs, and the same with -100 for the questions.

    If there are more than `room` tokens, the oldest turns are left out. The last turn stays. Raises
    UserError.
    """
    turns = [{"instruction": q, "output": a} for q, a in entry.get("history", [])]
    ids, learned = [], []

    # The newest turn first, until the room is full.
    for turn in reversed([*turns, entry]):
        # Prompt and answer are encoded separately. In one string, the tokenizer might merge the end
        # of one with the start of the other, and the prompt's tokens would differ from those of a
        # question in the chat.
        prompt = encode(format_input(turn, style) + PROMPT_STYLES[style]["output"], tokenizer)
        answer = encode(turn["output"], tokenizer) + [tokenizer.eot_token]
        if ids and len(prompt + answer + ids) > room:
            break
        ids = prompt + answer + ids
        learned = [-100] * len(prompt) + answer + learned
    return ids, learned


def encode_prompt(entry, tokenizer, style, context_length):
    """A record -> the token IDs after which the model is to answer. Raises UserError."""
    # The oldest turns are left out until a quarter of the context is free for the answer.
    ids, _ = encode_entry({**entry, "output": ""}, tokenizer, style, 0.75 * context_length)
    if len(ids) > context_length:
        raise UserError(f"a question of {len(ids) - 1} tokens leaves no room for an answer in the "
                        f"context of {context_length}; ask it shorter")
    return ids[:-1]  # without the end of the empty answer


# ---------------------------------------------------------------------------------------------
# The data set. As in pretraining, the targets are the inputs moved on by one token. Here is the
# conversation above, shortened, with a word for a token. Q stands for the last token of a prompt:
#
#     inputs     I    am   Ann  Q      Hello  <END>  my    name  Q    Ann
#     targets   -100 -100 -100  Hello  <END>  -100  -100  -100   Ann  <END>

class InstructionDataset(Dataset):
    """Records as rows. Item i is a pair of lists of token IDs, (inputs, targets). Section 7.3.

    With `mask_prompt` questions are not learned. A row longer than `max_length` loses its oldest
    turns, then the end of its answer. A record whose question fills `max_length` is not used.
    """

    def __init__(self, data, tokenizer, style="alpaca", max_length=10**9, mask_prompt=False):
        self.data = []       # the records that are used
        self.items = []
        self.num_cut = 0
        for entry in data:
            ids, learned = encode_entry(entry, tokenizer, style, max_length + 1)
            if set(learned[:max_length]) == {-100}:
                continue  # the question fills the row: one token of the answer at most would fit

            # A place's target is the next token: `max_length` places need one token more. The last
            # token is only a target, so `ids[:-1]`.
            targets = learned if mask_prompt else ids
            self.data.append(entry)
            self.items.append((ids[:-1][:max_length], targets[1:max_length + 1]))

            # A whole record has len(history) + 1 turns, each with one end of text.
            lost_turns = ids.count(tokenizer.eot_token) <= len(entry.get("history", []))
            self.num_cut += lost_turns or len(ids) > max_length + 1

    def __getitem__(self, i):
        return self.items[i]

    def __len__(self):
        return len(self.items)


# ---------------------------------------------------------------------------------------------
# Batches. Shorter rows are padded at the right. Nothing is to be learned in the padding, so its
# targets are -100, too.

def custom_collate_fn(batch, pad_token_id=50256, ignore_index=-100, allowed_max_length=None,
                      device="cpu"):
    """B items -> inputs (B, T), targets (B, T), on `device`. Section 7.3.

    An item is a pair of lists, inputs and targets. Or it is one list of token IDs, as in the book:
    then all of it is learned, and the end of text (`pad_token_id`) after it.

    Example:
        custom_collate_fn([[1, 2, 3], [7]])
        # [[1, 2, 3], [7, 50256, 50256]] and [[2, 3, 50256], [50256, -100, -100]]
    """
    pairs = [item if isinstance(item, tuple) else (item, [*item[1:], pad_token_id])
             for item in batch]
    T = min(max(len(ids) for ids, _ in pairs), allowed_max_length or 10**9)

    # subtle: padding is the end-of-text token, too. Only the places after a row's own end get the
    # target -100, so a real end of text is still learned.
    inputs = [(ids + [pad_token_id] * T)[:T] for ids, _ in pairs]
    targets = [(goals + [ignore_index] * T)[:T] for _, goals in pairs]
    return torch.tensor(inputs, device=device), torch.tensor(targets, device=device)


class LikeLengths:
    """Batches of row numbers, for a DataLoader's `batch_sampler`, in a new random order each time.

    Rows of similar length stand together, with little padding: that saves a seventh of the work.
    """

    def __init__(self, dataset, batch_size):
        self.lengths, self.batch_size = [len(inputs) for inputs, _ in dataset], batch_size

    def __len__(self):
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self):
        # Shuffle. In pieces of eight batches, sort the rows by length. Shuffle the batches.
        order = []
        for rows in torch.randperm(len(self.lengths)).split(8 * self.batch_size):
            order += sorted(rows.tolist(), key=self.lengths.__getitem__)
        batches = torch.tensor(order).split(self.batch_size)
        return iter([batches[i].tolist() for i in torch.randperm(len(batches))])


# ---------------------------------------------------------------------------------------------
# The loss: how surprised the model is by the right next token, -log of its probability, as in
# pretraining. Here the mean is taken over the targets only.

def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy in nats per target. Sections 5.1.3 and 7.6.

    Only the positions with a target go through out_head: it is a third of GPT-2 124M's work.
    """
    target_batch = target_batch.to(device)
    is_target = target_batch != -100                                  # (B, T)
    hidden = model.hidden_states(input_batch.to(device))[is_target]   # (B, T, C) -> (N, C)
    logits = model.out_head(hidden)                                   # (N, C) -> (N, V)
    return F.cross_entropy(logits.float(), target_batch[is_target])


@torch.no_grad()
def calc_loss_loader(data_loader, model, device, num_batches=None, dtype=torch.float32):
    """Mean loss per target over a loader's first batches, or all of them. Section 5.1.3."""
    model.eval()
    total = count = 0
    for inputs, targets in itertools.islice(data_loader, num_batches):
        num_targets = int((targets != -100).sum())
        with autocast(device, dtype):
            total += calc_loss_batch(inputs, targets, model, device).item() * num_targets
        count += num_targets
        progress(f"validating, {count:,} targets")
    return total / count


# ---------------------------------------------------------------------------------------------
# The loop (sections 5.2 and 7.6). `autocast` lets matrix products run in bfloat16 where that is
# faster: a number type with the range of float32 in half the bytes, and with only three digits.
#
# All weights learn, unless --train lora adds LoRA corrections to the linear layers and freezes the
# rest: class LoRALayer in gpt.py explains them.

def train_model_simple(model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq,
                       eval_iter, start_context, tokenizer, run=None, dtype=torch.float32,
                       grad_accum=1, seed=123):
    """Train -> training losses, validation losses, tokens seen: lists with one per measurement.

    The model is measured before training and then every `eval_freq` steps, on `eval_iter` batches
    of the validation data (None: all). A training loss is the mean over the steps before, so the
    first is None. A step takes `grad_accum` batches.

    `run` (gpt.py) is the run's notebook. `due` says whether it is time to measure. `report` prints
    and saves what was measured, and the model if it is the best so far. `done` counts a step
    and its tokens and notes its loss; the mean of the noted losses is the `train_loss` of the next
    report. `run.rows` holds the reports. Without a `run` nothing is written.
    """
    steps_per_epoch = math.ceil(len(train_loader) / grad_accum)
    run = run or Run(num_epochs * steps_per_epoch)
    batches, tokens_seen = None, []
    while True:
        # Measure when it is due, and let the model answer a question.
        if run.due(eval_freq):
            val_loss = calc_loss_loader(val_loader, model, device, eval_iter, dtype)
            idx = text_to_token_ids(start_context, tokenizer)
            out = generate(model, idx, max_new_tokens=50, eos_id=tokenizer.eot_token)
            answer = token_ids_to_text(out[:, idx.shape[1]:], tokenizer).removesuffix(END_OF_TEXT)
            run.report(epoch=run.step / steps_per_epoch, val_loss=val_loss, sample=answer)
            tokens_seen.append(run.tokens)
        if run.step >= run.total_steps:
            break

        # The batches of this step, the k-th of its epoch. The loader shuffles anew in each epoch,
        # from a seed for the epoch; the -1 keeps it apart from the seeds of the steps, below. A
        # resumed run skips the batches that it has seen.
        epoch, k = divmod(run.step, steps_per_epoch)
        if batches is None or k == 0:
            torch.manual_seed(hash((seed, -1, epoch)))
            batches = itertools.islice(train_loader, k * grad_accum, None)
        step_batches = list(itertools.islice(batches, grad_accum))

        # Random numbers (dropout) follow from seed and step, so a resumed run has the same ones.
        torch.manual_seed(hash((seed, run.step)))
        model.train()

        # Gradients. A batch counts by its share of the targets: many small ones equal a large one.
        counts = [(targets != -100).sum() for _, targets in step_batches]
        step_loss = 0.0
        for (input_batch, target_batch), count in zip(step_batches, counts):
            with autocast(device, dtype):
                loss = calc_loss_batch(input_batch, target_batch, model, device)
            loss = loss * count / sum(counts)
            loss.backward()   # how would the loss change with each weight?
            step_loss += loss.item()
        optimizer.step()      # change each weight so that the loss falls
        optimizer.zero_grad()
        run.done(step_loss, sum(inputs.numel() for inputs, _ in step_batches))

    rows = run.rows[len(run.rows) - len(tokens_seen):]  # a resumed run has earlier ones, too
    return [row["train_loss"] for row in rows], [row["val_loss"] for row in rows], tokens_seen


# ---------------------------------------------------------------------------------------------
# Answers. The prompts of a batch have different lengths. Padding stands at the left of the shorter
# ones, so that each row's newest token stands last and its answer goes on from there.

def generate_responses(model, tokenizer, entries, style="alpaca", max_new_tokens=256,
                       batch_size=32):
    """Give each entry a `model_response`, as if it were asked alone. Section 7.7.

    The likeliest token is always taken, up to the end of text or of the context. Raises UserError.
    """
    context, end = model.cfg["context_length"], tokenizer.eot_token

    # Prompts of similar length go together, so that little is padded.
    pairs = [(encode_prompt(entry, tokenizer, style, context), entry) for entry in entries]
    pairs.sort(key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), batch_size):
        prompts, batch = zip(*pairs[start:start + batch_size])
        longest = len(prompts[-1])
        padding = [longest - len(prompt) for prompt in prompts]
        idx = [[end] * n + prompt for n, prompt in zip(padding, prompts)]    # (B, T)

        # The shortest prompt has room for the most new tokens, so generate that many for all rows.
        # Where a row then passes the context, `generate` lets go of its padding first. A longer
        # prompt would lose its own start: its tokens from there on are dropped, and so is all
        # that follows the end of text.
        room = context - len(prompts[0])
        out = generate(model, idx, min(max_new_tokens, room), eos_id=end, padding=padding)
        for entry, prompt, row in zip(batch, prompts, out.tolist()):
            answer = row[longest:longest + context - len(prompt)]
            answer = [*itertools.takewhile(lambda token: token != end, answer)]
            entry["model_response"] = token_ids_to_text(torch.tensor(answer), tokenizer).strip()
        progress(f"answering, {start + len(batch)} of {len(pairs)} records")


# ---------------------------------------------------------------------------------------------
# Scores. Whether an answer is good is hard to say without reading it. These are three rough ways.

def token_f1(answer, truth):
    """How far two texts share their words, 0 to 1, whatever the order (Rajpurkar et al. 2016).

    Example:
        token_f1("The cat sat.", "the cat sat down")           # 2 * 3 / (3 + 4) = 0.857
    """
    a, b = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (answer, truth))
    return 2 * (a & b).total() / (a + b).total() if a or b else float(answer == truth)


@torch.no_grad()
def score_responses(model, tokenizer, entries, style="alpaca"):
    """Write three scores into each entry with its `model_response`; return the means of all.

    `exact_match`: is the answer the expected one? `token_f1`: how far do they share their words?
    `response_loss`: the mean loss of the expected answer's tokens. exp(mean of the losses) is the
    perplexity: with 5, the model is as unsure as if it chose among 5 equally likely tokens.
    """
    context, device = model.cfg["context_length"], model.tok_emb.weight.device
    model.eval()
    for i, entry in enumerate(entries, 1):
        entry["exact_match"] = entry["model_response"] == entry["output"].strip()
        entry["token_f1"] = round(token_f1(entry["model_response"], entry["output"]), 4)

        # The prompt and the expected answer as one row. Targets are moved on by one: that of the
        # prompt's last token is already the answer's first.
        prompt = encode_prompt(entry, tokenizer, style, context)
        answer = [*encode(entry["output"], tokenizer), tokenizer.eot_token]
        item = (prompt + answer[:-1], [-100] * (len(prompt) - 1) + answer)
        batch = custom_collate_fn([item], allowed_max_length=context)
        entry["response_loss"] = round(calc_loss_batch(*batch, model, device).item(), 4)
        progress(f"scoring, {i} of {len(entries)} records")

    means = {score: sum(entry[score] for entry in entries) / len(entries)
             for score in ("response_loss", "exact_match", "token_f1")}
    return {**means, "perplexity": math.exp(means["response_loss"])}


# ---------------------------------------------------------------------------------------------
# The judge: a larger model, which an Ollama server (https://ollama.com) runs. Section 7.8.

OLLAMA = "http://localhost:11434/api/chat"


def query_model(prompt, model="llama3", url=OLLAMA, timeout=300):
    """One question to an Ollama server -> its answer, the same each time. Raises UserError."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": False,
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048}}
    try:
        reply = requests.post(url, json=body, timeout=timeout)
        reply.raise_for_status()
        return reply.json()["message"]["content"].strip()
    except Exception as e:  # no server, no JSON, or JSON of another kind
        raise UserError(f"the judge at {url} gave no answer ({e!r:.150}); start it with: ollama "
                        f"serve, and get its model with: ollama pull {model}") from None


def generate_model_scores(json_data, json_key, model="llama3", url=OLLAMA, save=lambda: None):
    """Let `model` score each entry's `json_key` from 0 to 100 -> list of scores. Section 7.8.

    The score is the first whole number from 0 to 100 in a reply; a reply without one does not
    count. Score and reply go into entry["judge"], then `save()` is called. After a failure
    (UserError) a new call asks only about the entries that have no score.
    """
    for i, entry in enumerate(json_data, 1):
        if entry.get("judge", {}).get("model") != model:
            # Earlier turns, then the book's prompt: the scores can be compared with the book's.
            before = "".join(f"{q}\n{a}\n\n" for q, a in entry.get("history", []))
            prompt = (f"Given the input `{before}{format_input(entry)}` and correct output "
                      f"`{entry['output']}`, score the model response `{entry[json_key]}` on a "
                      "scale from 0 to 100, where 100 is the best score. Respond with the integer "
                      "number only.")

            # An empty answer gets 0 without a question.
            reply = query_model(prompt, model, url) if entry[json_key] else "0"
            found = re.search(r"(?<![-\d])(100|\d\d?)(?!\d)", reply)
            score = int(found[0]) if found else None
            entry["judge"] = {"model": model, "score": score, "reply": reply}
            save()
        progress(f"judging, {i} of {len(json_data)} answers")
    return [e["judge"]["score"] for e in json_data if e["judge"]["score"] is not None]


# ---------------------------------------------------------------------------------------------
# Chat: a conversation that grows. Each question is a record whose history is all that was said
# before, so the model sees it in the form that it was trained on.

def print_answer(model, tokenizer, entry, args):
    """Print the answer to the last question as it is made; return it. Raises UserError."""
    context = model.cfg["context_length"]
    prompt = encode_prompt(entry, tokenizer, args.prompt_style, context)
    stream = generate_stream(model, prompt, min(args.max_new_tokens, context - len(prompt)),
                             temperature=args.temperature, eos_id=tokenizer.eot_token,
                             seed=args.seed)
    return token_ids_to_text(torch.tensor(print_stream(stream, tokenizer)), tokenizer)


def chat(model, tokenizer, args):
    """A conversation in the terminal. Ctrl-C stops an answer; at the > it ends the chat."""
    history = []
    text = "/help"
    while text != "/exit":
        # A command, or a question.
        if text == "/help":
            print("/reset forgets the conversation, /exit or Ctrl-D ends it, /help shows this.")
        elif text == "/reset":
            history.clear()
        elif text:
            try:
                entry = {"instruction": text, "history": history}
                history.append((text, print_answer(model, tokenizer, entry, args)))
            except KeyboardInterrupt:  # this turn is not remembered
                print()
            except UserError as e:
                say("", str(e))

        text = input("> ").strip()  # Ctrl-D and Ctrl-C leave from here


# ---------------------------------------------------------------------------------------------
# The same by hand, in Python:
#     from finetune_instruct import *
#     from gpt import GPT_CONFIG_124M, GPTModel, load_tokenizer
#
#     cfg = {**GPT_CONFIG_124M, "vocab_size": 257, "emb_dim": 48, "n_heads": 2, "n_layers": 2}
#     model, tokenizer = GPTModel(cfg), load_tokenizer("bytes")
#     records = read_records("data/instruction-data.json")[:80]     # there after a first run
#     data = InstructionDataset(records, tokenizer, "phi3", mask_prompt=True)
#     collate = functools.partial(custom_collate_fn, pad_token_id=tokenizer.eot_token)
#     loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
#     optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
#     train_model_simple(model, loader, loader, optimizer, "cpu", num_epochs=2, eval_freq=10,
#                        eval_iter=5, start_context="<|user|>\nHi\n<|assistant|>\n",
#                        tokenizer=tokenizer)
#
# Try it:
# 1. Find the answers of a conversation in its targets. After the lines above:
#        entry = {"history": [["I am Ann.", "Hi!"]], "instruction": "Who am I?", "output": "Ann."}
#        custom_collate_fn([InstructionDataset([entry], tokenizer, "phi3", mask_prompt=True)[0]])
# 2. Is it better to learn the questions too? Compare the response losses at the end of two runs.
#        python finetune_instruct.py --no-mask-prompt --out checkpoints/questions-too.pt
# 3. How good is LoRA when only few numbers learn? Compare again.
#        python finetune_instruct.py --train lora --lora-rank 4 --out checkpoints/lora.pt

# =============================================================================================
# The lesson ends here. What follows: reading records, the command.
# =============================================================================================

RECORDS_URLS = ["https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
                "01_main-chapter-code/instruction-data.json"]
RECORDS_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"

FIELDS = {  # the names that files use, and the names here; of two, the later in this list counts
    "prompt": "instruction", "instruction": "instruction", "context": "input", "input": "input",
    "completion": "output", "response": "output", "output": "output", "history": "history"}
IS_ANSWER = {"system": False, "user": False, "human": False, "assistant": True, "gpt": True}


def to_entry(record):
    """A record of a file -> {"instruction", "input", "output", "history"}. Raises any exception."""
    entry = {"input": "", "history": []}
    for name, field in FIELDS.items():
        if record.get(name) is not None:
            entry[field] = record[name]

    # Messages. All that is said before an answer, also by the system, is its question.
    messages = record.get("messages") or record.get("conversations") or []
    question = []
    for message in messages:
        question.append(message.get("content", message.get("value")))
        if IS_ANSWER[message.get("role", message.get("from"))]:
            answer = question.pop()
            entry["history"].append(("\n\n".join(question), answer))
            question = []
    if messages:
        entry["instruction"], entry["output"] = entry["history"].pop()

    if "instruction" not in entry or "output" not in entry:
        raise ValueError(f"its names are {', '.join(record):.100}; --help shows the known ones")

    # Joining fails unless all of them are texts.
    "".join([entry["instruction"], entry["input"], entry["output"]])
    for turn in entry["history"]:
        if not isinstance(turn, (list, tuple)):
            raise ValueError("a history has pairs, [question, answer]")
        question, answer = turn
        "".join([question, answer])
    return entry


def read_records(file):
    """A JSON list of records, or a record per line -> list of entries. UserError, OSError."""
    text, entries = read_text(file), []
    try:
        is_list = text.lstrip().startswith("[")
        lines = filter(str.strip, text.split("\n"))
        for record in json.loads(text) if is_list else map(json.loads, lines):
            entries.append(to_entry(record))
    except Exception as e:  # whatever a foreign file makes of the lines above
        raise UserError(f"{file} must be a JSON list of records, or have a record in each line. "
                        f"After {len(entries)} records: {e!r:.200}") from None
    return entries


def make_datasets(args, file, tokenizer, context):
    """-> sets to train (first 85 %), validate (last 5 %) and test (the rest). 7.2. UserError."""
    records = read_records(file)
    train_end = int(len(records) * 0.85)
    test_end = train_end + int(len(records) * 0.1)
    parts = [records[:train_end], records[test_end:], records[train_end:test_end]]
    if args.val_data:  # then all of the first file trains
        parts = [records, read_records(args.val_data), read_records(args.test_data)]

    sets = [InstructionDataset(part, tokenizer, args.prompt_style, context, args.mask_prompt)
            for part in parts]
    train, val, test = map(len, sets)
    left_out = sum(map(len, parts)) - train - val - test
    say("records", f"{file}: {train} to train, {val} to validate, {test} to test; too long for the "
        f"context of {context} tokens: {sum(data.num_cut for data in sets)} lose their oldest "
        f"turns or the end of the answer, {left_out} are left out")
    if not train or not val:
        raise UserError("at least one record to train and one to validate are needed")
    return sets


def pick_style(given, saved, context):
    """The prompt's style: --prompt-style, the checkpoint's, or one that suits the context."""
    return given or saved.get("prompt_style") or ("alpaca" if context >= 512 else "phi3")


def write_json(file, value):
    """Write JSON that people can read, all or nothing. What UTF-8 cannot hold becomes a ?."""
    with write_atomically(file) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8",
                        errors="replace")


def answer_and_score(model, tokenizer, entries, args):
    """Answer the test records, score the answers, print three of them, write all."""
    file = beside(args.out, "-responses.json")
    generate_responses(model, tokenizer, entries, args.prompt_style, args.max_new_tokens)
    scores = score_responses(model, tokenizer, entries, args.prompt_style)
    write_json(file, entries)

    shorten = functools.partial(textwrap.shorten, width=140, placeholder=" ...")
    for entry in entries[:3]:
        say("asked", shorten(f"{entry['instruction']} {entry['input']}"))
        say("expected", shorten(entry["output"]))
        say("answered", shorten(entry["model_response"]))
    means = ", ".join(f"{score.replace('_', ' ')} {mean:.3f}" for score, mean in scores.items())
    say("scores", f"{file}, {len(entries)} answers: {means}")


def judge(args):
    """--judge: let a model of an Ollama server score the answers that training has written."""
    file = beside(args.out, "-responses.json")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        scores = generate_model_scores(entries, "model_response", args.judge, args.judge_url,
                                       lambda: write_json(file, entries))
        mean = sum(scores) / len(scores) if scores else math.nan
    except UserError:  # of the judge
        raise
    except Exception as e:  # whatever a changed file makes of the lines above
        raise UserError(f"{file} cannot be used ({e!r:.150}); make it anew with: python "
                        f"finetune_instruct.py --out {args.out}") from None
    say("judge", f"{args.judge}: {mean:.2f} of 100, mean of {len(scores)} of {len(entries)} "
        "answers")
    return scores


def talk(args):
    """--chat, or --ask with one question."""
    device = pick_device(args.device)
    model, tokenizer, saved = load_checkpoint(args.checkpoint, device,
                                              maker="finetune_instruct.py")
    model.to(pick_dtype(args.dtype, device))
    args.prompt_style = pick_style(args.prompt_style, saved, model.cfg["context_length"])
    if args.ask:
        print_answer(model, tokenizer, {"instruction": args.ask, "input": args.input}, args)
        return model, tokenizer

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lets input() edit a line and go back to earlier ones
    try:
        chat(model, tokenizer, args)
    except EOFError:  # Ctrl-D
        print()
    return model, tokenizer


def finetune(args):
    """Checkpoint + records -> training -> answers -> scores."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    keep_freed_memory(largest=1 << 25)  # larger blocks vary in size and would pile up
    start = find_start(args.init, ("gpt2-355M.pt", "gpt2-124M.pt", "stories.pt", "pretrained.pt"),
                       "This stage teaches a language model to follow instructions.")
    check_output(args, args.data, args.val_data, args.test_data, start)
    data = args.data or download(RECORDS_URLS, Path("data/instruction-data.json"), RECORDS_SHA256)

    # The model and the records.
    model, tokenizer, saved = load_checkpoint(start, device)
    context = model.cfg["context_length"]
    args.prompt_style = style = pick_style(args.prompt_style, saved, context)
    train_set, val_set, test_set = make_datasets(args, data, tokenizer, context)
    settings = {"data": fingerprint(train_set.items, val_set.items), "init": fingerprint(model)}

    # What of the model learns.
    torch.manual_seed(args.seed)
    if args.train == "lora":
        model.requires_grad_(False)
        replace_linear_with_lora(model, args.lora_rank, args.lora_alpha)
    learning = [p for p in model.parameters() if p.requires_grad]
    say("model", f"{start}: {sum(p.numel() for p in learning):,} parameters learn")

    # The run.
    args.lr = args.lr or scale_lr(5e-5, model)
    optimizer = torch.optim.AdamW(learning, lr=args.lr, weight_decay=0.1, fused=True)
    collate = functools.partial(custom_collate_fn, pad_token_id=tokenizer.eot_token)
    train_loader = DataLoader(train_set, batch_sampler=LikeLengths(train_set, args.batch_size),
                              collate_fn=collate)
    val_loader = DataLoader(val_set, args.batch_size, collate_fn=collate)
    steps = args.epochs * math.ceil(len(train_loader) / args.grad_accum)
    run = Run(min(steps, args.max_steps or steps), args, model, [optimizer], tokenizer, settings,
              prompt_style=style, prompt_texts=PROMPT_STYLES[style])

    # Each evaluation asks the first question of the validation records.
    question = tokenizer.decode(encode_prompt(val_set.data[0], tokenizer, style, context))
    train_model_simple(model, train_loader, val_loader, optimizer, device, args.epochs,
                       args.eval_every, None, question, tokenizer, run, dtype, args.grad_accum,
                       args.seed)
    run.finish()

    # The best model answers the test records.
    if len(test_set) and not args.no_responses:
        model, tokenizer, _ = load_checkpoint(args.out, device)
        answer_and_score(model.to(dtype), tokenizer, test_set.data, args)
    out = shlex.quote(str(args.out))
    print(f"\nNext:\n  python finetune_instruct.py --chat --checkpoint {out}")
    return load_checkpoint(args.out, device)[:2]


def main(argv=None):
    """Train, judge or talk -> (model, tokenizer), or the list of scores."""
    parser = ArgumentParser(description="Finetune a GPT to follow instructions; or talk to it.")
    arg = parser.add_argument
    arg("--data", type=path, help="records instead of the book's, a JSON list or one a line: "
        "instruction, input, output, history; instruction, context, response; prompt, completion; "
        "messages; or conversations")
    arg("--val-data", type=path, help="records to validate on; then --data only trains")
    arg("--test-data", type=path, help="records to answer, beside --val-data")
    arg("--init", type=path, help="where to start; default: the best model in checkpoints/")

    # How it is trained, and what it answers then.
    arg("--prompt-style", choices=list(PROMPT_STYLES), help="default: the checkpoint's; else "
        "alpaca, or the shorter phi3 for a context below 512 tokens")
    arg("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="learn the answers alone, not the questions too")
    arg("--train", choices=["all", "lora"], default="all", help="every weight, or LoRA corrections")
    arg("--lora-rank", type=positive_int, default=16, help="width of a correction")
    arg("--lora-alpha", type=positive_float, default=16.0, help="size: times alpha / rank")
    arg("--no-responses", action="store_true", help="do not answer the test records")
    arg("--max-new-tokens", type=positive_int, default=256, help="the longest answer")

    # What to do instead of training.
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--judge", type=name, metavar="MODEL", help="of Ollama, to score answers")
    instead.add_argument("--chat", action="store_true", help="talk to the model at --checkpoint")
    instead.add_argument("--ask", type=name, metavar="TEXT", help="one question to it")
    arg("--judge-url", type=name, default=OLLAMA, help="where the judge's server is")
    arg("--input", default="", metavar="TEXT", help="what the question of --ask is about")
    arg("--checkpoint", type=path, default=Path("checkpoints/instruct.pt"), help="the model to ask")
    arg("--temperature", type=non_negative_float, default=0.0, help="0: always the likeliest token")

    add_training_arguments(parser, "instruct.pt", epochs=2, batch_size=8, eval_every=40)
    args = parser.parse_args(argv)
    if bool(args.val_data) != bool(args.test_data):
        parser.error("--val-data and --test-data are given together")
    if args.judge:
        return judge(args)
    return talk(args) if args.chat or args.ask else finetune(args)


if __name__ == "__main__":
    run_main(main)
