"""Instruction finetuning: teach a language model to answer, judge its answers, talk to it.

    python finetune_instruct.py                              the book's data (chapter 7)
    python finetune_instruct.py --data mine.jsonl --train lora --prompt-style phi3
    python finetune_instruct.py --judge llama3               have the answers scored by Ollama
    python finetune_instruct.py --chat
    python finetune_instruct.py --ask "Rewrite in the passive voice." --input "I ate the fish."

Reads a checkpoint and records of instruction, input and output; writes checkpoints/instruct.pt (the
model with the lowest validation loss), instruct.csv (the metrics) and instruct-responses.json
(answers to the test records, with scores). Shapes as in gpt.py: B rows, T tokens, V vocabulary.
"""

import argparse
import collections
import contextlib
import json
import math
import re
import sys
import types
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from gpt import (
    ArgumentParser, Progress, TrainingRun, UserError, add_training_arguments, autocast, beside,
    check_output, ctrl_c_waits, download, find_start, fingerprint, fingerprint_model, generate,
    generate_stream, keep_freed_memory, load_checkpoint, non_negative_float, pick_device,
    pick_dtype, positive_float, positive_int, print_stream, read_text_pieces,
    replace_linear_with_lora, run_main, say, scale_lr, text_to_token_ids, write_atomically)

# ---------------------------------------------------------------------------------------------
# Classification or instructions? A classifier (finetune_classifier.py) gives one of a few labels:
# it needs little data and is easy to measure. A model finetuned on instructions can be asked
# anything: it needs a larger model, many different examples, and is hard to measure.
#
# The prompt. A record has an instruction, sometimes an input, and the output wanted. Training shows
# the model all three in one fixed form, so that later it answers the first two with the third.

PROMPT_STYLES = {  # the text put before a record's instruction, input and output
    # Taori et al. 2023; the book's section 7.2
    "alpaca": {"instruction": "Below is an instruction that describes a task. Write a response "
                              "that appropriately completes the request.\n\n### Instruction:\n",
               "input": "\n\n### Input:\n", "output": "\n\n### Response:\n"},
    # Abdin et al. 2024; the book's exercise 7.1
    "phi3": {"instruction": "<|user|>\n", "input": "\n", "output": "\n<|assistant|>\n"},
}


def format_input(entry, style="alpaca"):
    """A record -> the text that asks its question. Section 7.2."""
    before = PROMPT_STYLES[style]
    return (before["instruction"] + entry["instruction"]
            + (before["input"] + entry["input"] if entry.get("input") else ""))


def encode_prompt(entry, tokenizer, style="alpaca"):
    """A record -> the list of tokens after which the model is to answer."""
    text = format_input(entry, style) + PROMPT_STYLES[style]["output"]
    return text_to_token_ids(text, tokenizer)[0].tolist()


class InstructionDataset(Dataset):
    """Records as token lists: item i is prompt + answer. Section 7.3.

    Prompt (`prompt_lengths[i]` tokens) and answer are encoded apart, so that training shows the
    model exactly the tokens that it sees when it is asked. A record whose prompt leaves no room for
    an answer within `max_length` tokens is left out.
    """

    def __init__(self, data, tokenizer, style="alpaca", max_length=math.inf):
        self.data, self.encoded_texts, self.prompt_lengths = [], [], []
        for entry in data:
            prompt = encode_prompt(entry, tokenizer, style)
            if len(prompt) < max_length:
                answer = text_to_token_ids(entry["output"], tokenizer)[0].tolist()
                self.data.append(entry)
                self.encoded_texts.append(prompt + answer)
                self.prompt_lengths.append(len(prompt))

    def __getitem__(self, i):
        return self.encoded_texts[i]

    def __len__(self):
        return len(self.data)


# ---------------------------------------------------------------------------------------------
# Batches. Rows are padded to the longest. The targets are the inputs moved on by one token, as in
# pretraining. -100, which the loss leaves out, marks where nothing is to be learned: the padding
# and, with `prompt_lengths`, the prompt, which the model is given.

def custom_collate_fn(batch, pad_token_id=50256, ignore_index=-100, allowed_max_length=None,
                      device="cpu", prompt_lengths=None):
    """B token lists -> inputs (B, T), targets (B, T), on `device`. Section 7.3.

    After a row's last token comes one end of text (`pad_token_id`) as a target, so that the model
    learns to stop, then `ignore_index`. `allowed_max_length` cuts rows at the end. With
    `prompt_lengths` the tokens of each prompt are not targets; but every row keeps at least one, as
    the mean over no targets is not a number.

    Example:
        custom_collate_fn([[1, 2, 3], [7]])
        # [[1, 2, 3], [7, 50256, 50256]] and [[2, 3, 50256], [50256, -100, -100]]
    """
    T = min(max(map(len, batch)), allowed_max_length or math.inf)
    inputs = torch.full((len(batch), T), pad_token_id)
    targets = torch.full((len(batch), T), ignore_index)
    for row, ids in enumerate(batch):
        length = min(len(ids), T)
        inputs[row, :length] = torch.tensor(ids[:length])
        # subtle: which places are padding follows from the lengths, never from the token there,
        # so an end of text inside a row is learned like any other token.
        targets[row, :length] = torch.tensor([*ids, pad_token_id][1:length + 1])
        # The prompt's last token has the answer's first one as its target: that one stays.
        if prompt_lengths is not None:
            targets[row, :max(0, min(prompt_lengths[row], length) - 1)] = ignore_index
    return inputs.to(device), targets.to(device)


# ---------------------------------------------------------------------------------------------
# The loss and the simplest loop, as in pretraining with other rows; then the loop that is used.

def calc_loss_batch(input_batch, target_batch, model, device):
    """Mean cross-entropy in nats per target. Sections 5.1.3 and 7.6.

    Only positions with a target need logits: the projection to the vocabulary is a third of the
    work of GPT-2 124M, and skipping it elsewhere makes a step 1.19 times as fast.
    """
    is_target = target_batch.to(device) != -100                       # (B, T)
    hidden = model.hidden_states(input_batch.to(device))[is_target]   # (N, C)
    return F.cross_entropy(model.out_head(hidden), target_batch.to(device)[is_target])


def train_model_simple(model, dataset, optimizer, device, num_epochs, batch_size, pad_token_id):
    """Train on an InstructionDataset, prompts too; return each step's loss. Section 7.6."""
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True,
                        collate_fn=lambda batch: custom_collate_fn(
                            batch, pad_token_id, allowed_max_length=model.cfg["context_length"]))
    losses = []
    model.train()

    for _ in range(num_epochs):
        for input_batch, target_batch in loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def train_model(model, train_set, run, optimizer, args, device, dtype, evaluate):
    """The loop that is used. `run` (gpt.py) picks a step's records, evaluates, saves, resumes."""
    for step in run.steps(evaluate):
        # The step's records in batches, and how many targets these have together.
        rows = run.rows_of_step(step, len(train_set))
        batches = make_batches(train_set, rows, args, model, args.mask_prompt)
        num_targets = sum(int((targets != -100).sum()) for _, targets in batches)

        # Dividing by the targets of the whole step makes many small batches equal one large one,
        # even with different numbers of targets. `packed_losses`, after the lesson, is a faster
        # `calc_loss_batch` without the mean.
        step_loss = 0.0
        for inputs, targets in batches:
            with autocast(device, dtype):
                losses = packed_losses(model, inputs.to(device), targets.to(device))
            loss = losses.sum() / num_targets
            loss.backward()
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        run.record(step_loss, sum(len(train_set[i]) for i in rows))


# ---------------------------------------------------------------------------------------------
# Answers to the test records, many at once.

def generate_responses(model, tokenizer, entries, style="alpaca", max_new_tokens=256,
                       batch_size=32):
    """Give each entry a `model_response`, always the likeliest token, as if alone. 7.7.

    An answer ends with the end of text, after `max_new_tokens` or when the context is full.
    """
    context, end = model.cfg["context_length"], tokenizer.eot_token
    progress = Progress(len(entries), "answers")

    # Prompts of like length go together, so that little is padded.
    pairs = [(encode_prompt(entry, tokenizer, style), entry) for entry in entries]
    pairs.sort(key=lambda pair: len(pair[0]))
    for done in range(0, len(pairs), batch_size):
        prompts, batch = zip(*pairs[done:done + batch_size])
        lengths = [len(prompt) for prompt in prompts]
        idx, _ = custom_collate_fn(prompts, end, device=model.tok_emb.weight.device)
        out = generate(model, idx, min(max_new_tokens, context - lengths[0]), context, eos_id=end,
                       lengths=torch.tensor(lengths))

        # Every row's new tokens begin where the padded prompts end; `generate` hides the padding.
        for entry, length, new in zip(batch, lengths, out[:, idx.shape[1]:].tolist()):
            answer = [*new[:context - length], end]
            entry["model_response"] = tokenizer.decode(answer[:answer.index(end)]).strip()
        progress.update(done + len(batch), f"answer {done + len(batch)} of {len(pairs)}")
    progress.close()


# ---------------------------------------------------------------------------------------------
# Scores. Whether an answer is good is hard to say without reading it; these are three rough ways.

def token_f1(answer, truth):
    """How far two texts share their words, 0 to 1, whatever the order (Rajpurkar et al. 2016).

    Example:
        token_f1("The cat sat.", "the cat sat down")           # 2 * 3 / (3 + 4) = 0.857
    """
    a, b = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (answer, truth))
    return 2 * (a & b).total() / (a + b).total() if a or b else float(answer == truth)


def score_responses(entries, losses):
    """Write scores into each entry; return their means. `losses` are `record_losses`.

    The response loss, in nats, is that of the right answer's tokens; e to it is the perplexity, as
    if the model hesitated between so many tokens.
    """
    for entry, (total, count) in zip(entries, losses.tolist()):
        entry["response_loss"] = round(total / count, 4)
        entry["exact_match"] = entry["model_response"] == entry["output"].strip()
        entry["token_f1"] = round(token_f1(entry["model_response"], entry["output"]), 4)

    total, count = losses.sum(dim=0)
    return {"response_loss": float(total / count), "perplexity": float((total / count).exp()),
            **{name: sum(entry[name] for entry in entries) / len(entries)
               for name in ("exact_match", "token_f1")}}


# ---------------------------------------------------------------------------------------------
# The judge: a larger model, which an Ollama server (https://ollama.com) runs. Section 7.8.

OLLAMA = "http://localhost:11434/api/chat"


def query_model(prompt, model="llama3", url=OLLAMA, timeout=300):
    """One question to an Ollama server -> its answer, the same each time. Raises UserError."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": False,
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048}}
    reply = None
    try:
        reply = requests.post(url, json=body, timeout=timeout)
        return reply.json()["message"]["content"]
    except (requests.RequestException, KeyError, TypeError) as e:
        reason = e if reply is None else reply.text[:80]
        raise UserError(f"the judge at {url} gave no answer ({reason}); start it with: ollama "
                        f"serve, and get its model with: ollama pull {model}") from None


def generate_model_scores(json_data, json_key, model="llama3", url=OLLAMA, save=lambda: None):
    """Let `model` score each entry's `json_key` from 0 to 100 -> list of scores. Section 7.8.

    A score is the first such number in the reply; a reply without one does not count. Both go into
    entry["judge"], then `save()` is called, so that after a failure (UserError) another call only
    asks for what is missing.
    """
    progress = Progress(len(json_data), "scores")
    for i, entry in enumerate(json_data, 1):
        if entry.get("judge", {}).get("model") != model:
            # The book's words, so that scores can be compared with its own.
            prompt = (f"Given the input `{format_input(entry)}` and correct output "
                      f"`{entry['output']}`, score the model response `{entry[json_key]}` on a "
                      "scale from 0 to 100, where 100 is the best score. Respond with the integer "
                      "number only.")

            # An empty answer gets 0 without a question.
            reply = query_model(prompt, model, url) if entry[json_key] else "0"
            found = re.search(r"(?<![-\d])(100|\d\d?)(?!\d)", reply)
            score = int(found[0]) if found else None
            entry["judge"] = {"model": model, "score": score, "reply": reply}
            save()
        progress.update(i, f"score {i} of {len(json_data)}")
    progress.close()
    return [e["judge"]["score"] for e in json_data if e["judge"]["score"] is not None]


# ---------------------------------------------------------------------------------------------
# Chat. The model was trained on single questions, each with its answer. It is shown what was said
# before, as far as that fits, but has never learned to refer to it: "and in French?" is a question
# it cannot understand. A chat model is trained on whole conversations.

def print_answer(model, tokenizer, style, entry, turns, args, presses=()):
    """Print the answer to a question while it is made; both become the last of `turns`.

    A turn is a list of tokens; the oldest are dropped beyond three quarters of the context.
    Raises UserError when the question leaves no room for an answer.
    """
    context = model.cfg["context_length"]
    prompt = encode_prompt(entry, tokenizer, style)
    if len(prompt) >= context:
        raise UserError(f"a question of {len(prompt)} tokens leaves no room for an answer in the "
                        f"context of {context}; ask it shorter")
    turns.append(prompt)
    while len(turns) > 1 and sum(map(len, turns)) > context * 3 // 4:
        del turns[0]

    # The answer. An end of text follows it, as in training.
    idx = torch.tensor([sum(turns, [])], device=model.tok_emb.weight.device)
    stream = generate_stream(model, idx, min(args.max_new_tokens, context - idx.shape[1]), context,
                             args.temperature, eos_id=tokenizer.eot_token, seed=args.seed)
    turns[-1] += [*print_stream(stream, tokenizer, presses), tokenizer.eot_token]


def chat(model, tokenizer, style, args):
    """A conversation in the terminal. Ctrl-C stops an answer; at the > it ends the chat."""
    turns = []
    print("/reset forgets the conversation; /exit or Ctrl-D ends it.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return print()

        if text == "/exit":
            return
        if text == "/reset":
            turns.clear()
        elif text:
            try:
                with ctrl_c_waits() as presses:
                    print_answer(model, tokenizer, style, {"instruction": text}, turns, args,
                                 presses)
            except UserError as e:
                print(e)


# =============================================================================================
# The lesson ends here. What follows: a faster loss, reading records, the command.
# =============================================================================================

def packed_losses(model, inputs, targets):
    """inputs, targets (B, T) -> (N,), the cross-entropy of each of the N targets in nats.

    Padding is not computed at all: the rows are put one after another. The beginning they all share
    is computed once, if none of its tokens is a target (with dropout the rows then share its
    noise). With GPT-2 124M a step is 1.27 times as fast as with `calc_loss_batch`.
    """
    # P: the length of the beginning that all rows share, with no target in it.
    is_target = targets != -100                                       # (B, T)
    P = int(((inputs == inputs[0]) & ~is_target).all(dim=0).cumprod(dim=0).sum())
    used = is_target.flip(1).cumsum(1).flip(1) > 0                    # up to a row's last target
    used[1:, :P] = False
    rows, positions = used.nonzero(as_tuple=True)                     # (M,), (M,)
    visible = ((rows == rows[:, None]) | (positions < P)) & (positions <= positions[:, None])

    # In the place of gpt.KVCache, what tells the model each token's position in its own text, and
    # which tokens each token sees. It stores nothing. The model adds M to `longest`.
    cache = types.SimpleNamespace(
        begin=lambda T: positions, extend=lambda layer, keys, values: (keys, values),
        mask=visible, longest=int(positions.max()) + 1 - len(positions))
    hidden = model.hidden_states(inputs[used][None], cache)[0]        # (M, C)
    logits = model.out_head(hidden[is_target[used]])                  # (N, V)
    return F.cross_entropy(logits.float(), targets[is_target], reduction="none")


def make_batches(dataset, rows, args, model, mask_prompt):
    """Record numbers -> a list of (inputs, targets) with at most --batch-size records each.

    A batch has at most 4,096 tokens: the cost of attention grows with their square.
    """
    context = model.cfg["context_length"]
    longest = min(context, max(len(dataset[i]) for i in rows))
    size = max(1, min(args.batch_size, 4096 // longest))

    batches = []
    for start in range(0, len(rows), size):
        part = rows[start:start + size]
        lengths = [dataset.prompt_lengths[i] for i in part] if mask_prompt else None
        batches.append(custom_collate_fn([dataset[i] for i in part], args.end,
                                         allowed_max_length=context, prompt_lengths=lengths))
    return batches


@torch.no_grad()
def record_losses(model, dataset, args, device, dtype, mask_prompt):
    """-> (records, 2): the sum of each record's losses and the number of its targets."""
    result = []
    for inputs, targets in make_batches(dataset, range(len(dataset)), args, model, mask_prompt):
        with autocast(device, dtype):
            losses = packed_losses(model, inputs.to(device), targets.to(device)).cpu()
        counts = (targets != -100).sum(dim=1).tolist()
        result += [(row.double().sum(), len(row)) for row in losses.split(counts)]
    return torch.tensor(result, dtype=torch.float64)


RECORDS_URLS = ["https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
                "01_main-chapter-code/instruction-data.json"]
RECORDS_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"


def read_records(path):
    """A JSON list, or a .jsonl file with a record per line -> records. Raises UserError."""
    text = "".join(read_text_pieces(path)).removeprefix("\ufeff")
    if Path(path).suffix.lower() == ".jsonl":
        text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"

    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as e:  # also a number of 5,000 digits, brackets without end
        raise UserError(f"{path} is not JSON: {e} (a record per line? name it .jsonl)") from None
    if not isinstance(records, list) or not records:
        raise UserError(f'{path} holds no list of records: [{{"instruction": "...", ...}}, ...]')

    # Only the three texts are kept; an input may be missing.
    result, names = [], ("instruction", "input", "output")
    for i, record in enumerate(records):
        entry = {**record, "input": record.get("input") or ""} if isinstance(record, dict) else {}
        for name in names:
            if not isinstance(entry.get(name), str):
                raise UserError(f"{path}: record {i} (the first is 0) has no text as its {name}")
        result.append({name: entry[name] for name in names})
    return result


def make_datasets(path, tokenizer, style, context):
    """A file -> sets to train (first 85 %), validate (last 5 %), test (the rest). Section 7.2."""
    records = read_records(path)
    a = int(len(records) * 0.85)
    b = a + int(len(records) * 0.1)
    parts = (records[:a], records[b:], records[a:b])
    sets = [InstructionDataset(part, tokenizer, style, context) for part in parts]

    # How many there are, and what is too long.
    train, val, test = map(len, sets)
    left_out = len(records) - train - val - test
    cut = sum(len(ids) > context for part in sets for ids in part)
    say(f"records  {path}: {train} to train, {val} to validate, {test} to test")
    if left_out or cut:
        say(f"         longer than {context} tokens: {cut} lose the end of the answer, {left_out} "
            "have no room for one" + "; --prompt-style phi3 is shorter" * (style != "phi3"))
    if not train or not val:
        raise UserError(f"{path}: at least one record to train and one to validate are needed")
    return sets


def write_json(path, value):
    """Write JSON that people can read, all or nothing. What UTF-8 cannot hold becomes a ?."""
    with write_atomically(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8",
                        errors="replace")


def answer_and_score(test_set, args, device, dtype):
    """Answer the test records with the saved model, score the answers, print some, write all."""
    path, entries = beside(args.out, "-responses.json"), test_set.data
    model, tokenizer, _ = load_checkpoint(args.out, device)
    losses = record_losses(model, test_set, args, device, dtype, mask_prompt=True)
    model.to(dtype)  # subtle: after the losses, as it rounds the weights for good
    generate_responses(model, tokenizer, entries, args.prompt_style, args.max_new_tokens)
    scores = score_responses(entries, losses)
    write_json(path, entries)

    # The first three to read, and the means of all.
    for entry in entries[:3]:
        say(f"\n{entry['instruction']} {entry['input']}".rstrip())
        say(f"  expected: {entry['output']}\n  answered: {entry['model_response']}")
    means = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
    say(f"\nscores   {len(entries)} answers: {means}\nanswers  {path}")


def judge(args):
    """--judge: let a model of an Ollama server score the answers that training has written."""
    path = beside(args.out, "-responses.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:  # raises if one of the texts is missing
            format_input(entry) + entry["output"] + entry["model_response"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"there are no answers in {path}; make them with: python "
                        "finetune_instruct.py") from None

    # Each score is written as it comes.
    scores = generate_model_scores(entries, "model_response", args.judge, args.judge_url,
                                   lambda: write_json(path, entries))
    mean = sum(scores) / len(scores) if scores else math.nan
    say(f"judge    {args.judge}: {mean:.2f} of 100, mean of {len(scores)} of {len(entries)} "
        "answers")


def talk(args):
    """--chat, or --ask with one question."""
    device = pick_device(args.device)
    model, tokenizer, saved = load_checkpoint(args.checkpoint, device)
    model.to(pick_dtype(args.dtype, device))
    style = args.prompt_style or saved.get("prompt_style", "alpaca")
    if style not in PROMPT_STYLES:
        raise UserError(f"the checkpoint has the unknown style {style!r}; give --prompt-style")

    if args.chat:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, lets input() edit a line and go back to earlier ones
        sys.stdin.reconfigure(errors="replace")
        chat(model, tokenizer, style, args)
    else:
        entry = {"instruction": args.ask, "input": args.input}
        print_answer(model, tokenizer, style, entry, [], args)


def parse_arguments(argv):
    """The command line."""
    parser = ArgumentParser(description="Finetune a GPT to follow instructions; or talk to it.")
    arg = parser.add_argument
    arg("--data", type=Path, help="JSON or JSONL file of records instead of the book's 1,100")
    arg("--init", type=Path, help="where to start; default: the best model in checkpoints/")
    arg("--prompt-style", choices=list(PROMPT_STYLES), help="default: the checkpoint's, or alpaca")
    arg("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="learn the answer alone, not the prompt too")
    arg("--train", choices=["all", "lora"], default="all", help="every weight, or LoRA corrections")
    arg("--lora-rank", type=positive_int, default=16, help="width of a correction")
    arg("--lora-alpha", type=positive_float, default=16.0, help="size: times alpha / rank")

    # Answers to the test records.
    arg("--no-responses", action="store_true", help="do not answer the test records")
    arg("--max-new-tokens", type=positive_int, default=256, help="the longest answer")
    arg("--judge", metavar="MODEL", help="only let this model of Ollama score the answers")
    arg("--judge-url", default=OLLAMA, help="where its server is")

    # Questions to the model.
    talking = parser.add_mutually_exclusive_group()
    talking.add_argument("--chat", action="store_true", help="talk to the model at --checkpoint")
    talking.add_argument("--ask", metavar="TEXT", help="one question to it")
    arg("--input", default="", metavar="TEXT", help="what the question of --ask is about")
    arg("--checkpoint", type=Path, default=Path("checkpoints/instruct.pt"), help="the model to ask")
    arg("--temperature", type=non_negative_float, default=0.0, help="0: always the likeliest token")

    add_training_arguments(parser, "instruct.pt", epochs=2, batch_size=8, eval_every=40)
    args = parser.parse_args(argv)
    if args.input and args.ask is None:
        parser.error("argument --input: it goes with --ask")
    return args


def finetune(args):
    """Checkpoint + records -> training -> answers -> scores."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    keep_freed_memory(largest=1 << 25)  # larger blocks vary in size and would pile up
    start = find_start(args.init, ("gpt2-355M.pt", "gpt2-124M.pt", "pretrained.pt"),
                       "This stage teaches a language model to follow instructions.")
    check_output(args, args.data, start, endings=("-resume.pt", ".csv", ".png", "-responses.json"))
    path = args.data or download(RECORDS_URLS, Path("data/instruction-data.json"), RECORDS_SHA256)

    # The model and the records.
    model, tokenizer, saved = load_checkpoint(start, device)
    args.end = tokenizer.eot_token
    args.prompt_style = style = args.prompt_style or saved.get("prompt_style", "alpaca")
    sets = make_datasets(path, tokenizer, style, model.cfg["context_length"])
    train_set, val_set, test_set = sets
    settings = {"data": fingerprint(train_set.encoded_texts), "init": fingerprint_model(model)}

    # What of the model learns, and the run.
    torch.manual_seed(args.seed)
    if args.train == "lora":
        model.requires_grad_(False)
        replace_linear_with_lora(model, args.lora_rank, args.lora_alpha)
    learning = [p for p in model.parameters() if p.requires_grad]
    say(f"model    {start}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(p.numel() for p in learning):,} of them learn")
    args.lr = args.lr or scale_lr(5e-5, model)
    optimizer = torch.optim.AdamW(learning, lr=args.lr, weight_decay=0.1, fused=True)
    per_epoch = math.ceil(len(train_set) / (args.batch_size * args.grad_accum))
    run = TrainingRun(args, model, tokenizer, [optimizer], per_epoch, settings,
                      prompt_style=style, prompt_texts=PROMPT_STYLES[style])

    def evaluate():
        losses = record_losses(model, val_set, args, device, dtype, args.mask_prompt).sum(dim=0)
        return {"val_loss": float(losses[0] / losses[1])}

    train_model(model, train_set, run, optimizer, args, device, dtype, evaluate)
    if len(test_set) and not args.no_responses:
        answer_and_score(test_set, args, device, dtype)
    run.finish()


def main(argv=None):
    """Train, judge or talk."""
    args = parse_arguments(argv)
    if args.chat or args.ask is not None:
        talk(args)
    elif args.judge:
        judge(args)
    else:
        finetune(args)
        say(f"\nNext: python finetune_instruct.py --chat --checkpoint {args.out}")


if __name__ == "__main__":
    run_main(main)
