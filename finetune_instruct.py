"""Instruction finetuning: teach a language model to answer, judge its answers, talk to it.

    python finetune_instruct.py                              the book's data and run (chapter 7)
    python finetune_instruct.py --data mine.jsonl --train lora --prompt-style phi3
    python finetune_instruct.py --resume --judge llama3      have its answers scored by Ollama
    python finetune_instruct.py --chat
    python finetune_instruct.py --ask "Rewrite in the passive voice." --input "I ate the fish."

Reads a checkpoint and records of instruction, input and output. Writes checkpoints/instruct.pt
(the newest state, for --resume, --chat and --ask), instruct-best.pt (the lowest validation loss),
instruct.csv (the metrics), instruct-responses.json (the answers to the test records, each with
its scores) and instruct-scores.json (what they come to).

Read it in order: records and prompts -> batches -> the loss -> LoRA -> the training loop ->
answers -> scores -> the judge -> chat -> main. Shapes as in gpt.py: B rows, T tokens, V vocabulary.
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from gpt import (
    ArgumentParser, CtrlC, LinearWithLoRA, Metrics, Progress, UserError, add_training_arguments,
    autocast, beside, best_path, check_output, decode_stream, download, find_start, generate,
    generate_stream, keep_freed_memory, load_checkpoint, merge_lora, non_negative_float,
    pick_device, pick_dtype, positive_float, positive_int, printable, random_state,
    read_text_pieces, replace_linear_with_lora, run_main, save_checkpoint, set_random_state,
    write_atomically)

RECORDS = ("https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/"
           "01_main-chapter-code/instruction-data.json")
RECORDS_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"
STARTS = [Path("checkpoints") / name for name in  # what to finetune: the first that is there
          ("gpt2-355M.pt", "gpt2-124M.pt", "pretrained.pt")]
OLLAMA = "http://localhost:11434/api/chat"

PROMPT_STYLES = {  # the text put before a record's instruction, input and output
    "alpaca": {  # Taori et al. 2023; the book's section 7.2
        "instruction": "Below is an instruction that describes a task. Write a response that "
                       "appropriately completes the request.\n\n### Instruction:\n",
        "input": "\n\n### Input:\n",
        "output": "\n\n### Response:\n"},
    "phi3": {  # Abdin et al. 2024; the book's exercise 7.1
        "instruction": "<|user|>\n",
        "input": "\n",
        "output": "\n<|assistant|>\n"},
}


# ---------------------------------------------------------------------------------------------
# Records, and the prompts made of them.

def read_records(path):
    """A JSON list, or a .jsonl file with a record per line -> records as `check_record` makes them.

    Raises UserError with line and column of what does not parse, or the index of a wrong record.
    """
    path, number = Path(path), 1
    text = "".join(read_text_pieces(path)).removeprefix("\ufeff")
    by_line = path.suffix.lower() in (".jsonl", ".ndjson")
    try:
        if by_line:
            records = []
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    records.append(json.loads(line))
        else:
            records = json.loads(text)
    except (ValueError, RecursionError) as e:  # also a number of 5,000 digits, brackets without end
        column = f", column {e.colno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON: line {number + getattr(e, 'lineno', 1) - 1}{column}: "
                        f"{getattr(e, 'msg', e)}"
                        + ("" if by_line else "; a file with one record per line is to end in "
                           ".jsonl")) from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} holds {'an empty list' if records == [] else 'no list'}; write "
                        '[{"instruction": ..., "input": ..., "output": ...}, ...]')
    return [check_record(record, f"{path}: record {i} (the first is 0)")
            for i, record in enumerate(records)]


def check_record(record, where):
    """-> {"instruction", "input", "output"}, three texts. Raises UserError.

    In the `messages` style the last message is the output, and what was said before it, by a
    system message for example, is the instruction.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object with instruction and output")
    if record.get("messages") is not None:
        messages = record["messages"]
        if not (isinstance(messages, list) and len(messages) > 1
                and all(isinstance(m, dict) and isinstance(m.get("content"), str)
                        for m in messages) and messages[-1].get("role") == "assistant"):
            raise UserError(f"{where}: messages must be a list of two or more, each with a role "
                            "and a text as its content, the last one the assistant's")
        record = {"instruction": "\n\n".join(m["content"] for m in messages[:-1]),
                  "output": messages[-1]["content"]}
    texts = {"instruction": None, "input": "", "output": None}
    texts.update({name: record[name] for name in texts if record.get(name) is not None})
    for name in texts:
        if texts[name] is None:
            raise UserError(f"{where} has no {name}")
        if not isinstance(texts[name], str):
            raise UserError(f"{where}: its {name} is {json.dumps(texts[name])[:40]}, not text")
    return texts


def format_input(entry, style="alpaca"):
    """A record -> the text that asks its question. Section 7.2."""
    before = PROMPT_STYLES[style]
    return (before["instruction"] + entry["instruction"]
            + (before["input"] + entry["input"] if entry.get("input") else ""))


def encode_text(text, tokenizer):
    """Text -> token IDs; of special tokens it may hold `<|endoftext|>`."""
    return tokenizer.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special=())


def encode_prompt(entry, tokenizer, style="alpaca"):
    """A record -> the tokens after which the model is to answer."""
    text = format_input(entry, style) + PROMPT_STYLES[style]["output"]
    return encode_text(text, tokenizer)


def split_records(records):
    """85 % to train, 10 % to test, the rest to validate, in file order. Section 7.2."""
    num_train, num_test = int(len(records) * 0.85), int(len(records) * 0.1)
    return (records[:num_train], records[num_train:num_train + num_test],
            records[num_train + num_test:])


class InstructionDataset(Dataset):
    """Records as token lists: item i is prompt + answer. Section 7.3.

    `prompt_lengths[i]` says where the answer begins. Prompt and answer are encoded apart, so that
    training shows the model exactly the tokens that it sees when it is asked.
    """

    def __init__(self, data, tokenizer, style="alpaca"):
        self.data, self.encoded_texts, self.prompt_lengths = data, [], []
        for entry in data:
            prompt = encode_prompt(entry, tokenizer, style)
            answer = encode_text(entry["output"], tokenizer)
            self.encoded_texts.append(prompt + answer)
            self.prompt_lengths.append(len(prompt))

    def __getitem__(self, i):
        return self.encoded_texts[i]

    def __len__(self):
        return len(self.data)

    def fit(self, context_length):
        """Leave out each record whose prompt is longer than the context: no answer can follow.

        Returns how many those are, and how many more will lose the end of their answer.
        """
        keep = [i for i, length in enumerate(self.prompt_lengths) if length <= context_length]
        left_out = len(self) - len(keep)
        for name in ("data", "encoded_texts", "prompt_lengths"):
            setattr(self, name, [getattr(self, name)[i] for i in keep])
        return left_out, sum(len(ids) > context_length for ids in self.encoded_texts)


# ---------------------------------------------------------------------------------------------
# Batches: rows of similar length, padded to the longest of them.

def custom_collate_fn(batch, pad_token_id=50256, ignore_index=-100, allowed_max_length=None,
                      device="cpu", prompt_lengths=None):
    """B token lists -> inputs (B, T), targets (B, T), on `device`. Section 7.3.

    Targets are the inputs moved on by one token; after a row's last token comes one end of text
    (`pad_token_id`), then `ignore_index`. `allowed_max_length` cuts rows at the end. With
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
        if prompt_lengths is not None:
            targets[row, :max(0, min(prompt_lengths[row], length) - 1)] = ignore_index
    return inputs.to(device), targets.to(device)


def make_batches(dataset, rows, settings, device, mask_prompt):
    """Record numbers -> a list of (their numbers, inputs, targets).

    A batch has at most batch_size records and, together, 4,096 tokens: `calc_losses` packs it in
    one row, whose attention grows with the square of its length.
    """
    parts, num_tokens = [[]], 0
    for i in rows:
        length = min(len(dataset[i]), settings["context_length"])
        if parts[-1] and (len(parts[-1]) == settings["batch_size"] or num_tokens + length > 4096):
            parts.append([])
            num_tokens = 0
        parts[-1].append(i)
        num_tokens += length
    return [(part, *custom_collate_fn(
        [dataset[i] for i in part], settings["pad_token_id"], -100, settings["context_length"],
        device, [dataset.prompt_lengths[i] for i in part] if mask_prompt else None))
        for part in parts if part]


def plan_epoch(epoch, lengths, settings):
    """-> the record numbers of each optimizer step of an epoch, known from the seed alone.

    The records are shuffled, sorted by length within groups of 50 steps, and the steps shuffled:
    the rows of a step have about one length, and still each epoch mixes them anew. Where the
    records do not come out even, some steps have one less.
    """
    rng = np.random.default_rng([settings["seed"], epoch])
    order, lengths = rng.permutation(len(lengths)), np.asarray(lengths)
    per_step = settings["batch_size"] * settings["grad_accum"]
    for start in range(0, len(order), 50 * per_step):
        group = order[start:start + 50 * per_step]
        order[start:start + 50 * per_step] = group[np.argsort(lengths[group], kind="stable")]
    steps = np.array_split(order, steps_per_epoch(len(order), settings))
    return [steps[i] for i in rng.permutation(len(steps))]


# ---------------------------------------------------------------------------------------------
# The loss: on the answer alone, or on the whole text as in the book.

class Packed:
    """Several texts in one row of N tokens. Takes gpt.KVCache's place, but stores nothing: it
    tells the model each token's position and which tokens it may see.

    positions (N,): a token's place in its own text. visible (N, N): which tokens each token sees.
    """

    def __init__(self, positions, visible):
        N = len(positions)
        # The model adds `start` to 0 ... N-1, and checks `longest` + N against its context.
        self.start = positions - torch.arange(N, device=positions.device)
        self.longest = int(positions.max()) + 1 - N
        self.visible = visible

    def extend(self, layer, keys, values):
        """Nothing to add; but this mask instead of the causal one."""
        return keys, values, self.visible

    def advance(self, num_tokens):
        """Nothing follows."""


def calc_losses(model, inputs, targets, dtype="float32"):
    """inputs, targets (B, T) -> (N,), the cross-entropy of each of the N targets in nats.

    Nothing is computed that is not needed. Padding: not at all, the rows are put one behind the
    other. The text that they all begin with, half of a prompt: once, if none of its tokens is a
    target (with dropout the rows then share its noise). The projection to the vocabulary, a third
    of GPT-2's work: where there is a target.
    """
    is_target = targets != -100
    # P: the length of the beginning that all rows share, with no target in it.
    P = int(((inputs == inputs[0]) & ~is_target).all(dim=0).cumprod(dim=0).sum())
    used = is_target.flip(1).cumsum(1).flip(1) > 0                    # up to a row's last target
    used[1:, :P] = False
    rows, positions = used.nonzero(as_tuple=True)                     # (N,), (N,)
    shared = positions < P
    visible = ((rows == rows[:, None]) | shared) & (positions <= positions[:, None])
    with autocast(inputs.device, getattr(torch, dtype)):
        hidden = model.hidden_states(inputs[used][None], Packed(positions, visible))  # (1, N, C)
        logits = model.out_head(hidden[0][is_target[used]])
    return F.cross_entropy(logits.float(), targets[is_target], reduction="none")


@contextlib.contextmanager
def lookups_apart(model):
    """While this lasts, the gradient of looking up tied embeddings goes straight to their rows.

    A tied matrix gets a gradient from the head, for all V tokens, and one from the lookup, for
    few; torch makes a second matrix for those few. Adding them to the first saves a tenth of a
    step at 124M.
    """
    lookups = []

    def keep(module, args, vectors):
        if model.cfg.get("tie_embeddings") and vectors.requires_grad:
            lookups.append((args[0], vectors.detach().requires_grad_()))
            return lookups[-1][1]

    handle = model.tok_emb.register_forward_hook(keep)
    try:
        yield
        for ids, vectors in lookups:
            model.tok_emb.weight.grad.index_add_(0, ids.flatten(), vectors.grad.flatten(0, -2))
    finally:
        handle.remove()


def accumulate_gradients(model, dataset, rows, settings, device):
    """Forward and backward over the records of one step, a batch at a time; the mean loss.

    Dividing by the targets of the whole step makes many small batches equal one large one, also
    when they hold different numbers of targets.
    """
    batches = make_batches(dataset, rows, settings, device, settings["mask_prompt"])
    num_targets = sum(int((targets != -100).sum()) for _, _, targets in batches)
    step_loss = 0.0
    with lookups_apart(model):
        for _, inputs, targets in batches:
            loss = calc_losses(model, inputs, targets, settings["dtype"]).sum() / num_targets
            loss.backward()
            step_loss += loss.item()
    return step_loss


@torch.no_grad()
def record_losses(model, dataset, settings, device, mask_prompt):
    """-> (records, 2): the sum of each record's losses and the number of its targets."""
    result = torch.zeros(len(dataset), 2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    order = np.argsort([len(ids) for ids in dataset.encoded_texts], kind="stable")
    for rows, inputs, targets in make_batches(dataset, order, settings, device, mask_prompt):
        losses = calc_losses(model, inputs, targets, settings["dtype"]).double().cpu()
        counts = (targets != -100).sum(dim=1).tolist()
        for i, row in zip(rows, losses.split(counts)):
            result[i] = torch.tensor([row.sum(), len(row)])
    model.train(was_training)
    return result


def mean_loss(losses):
    """What `record_losses` returns -> nats per target."""
    return float(losses[:, 0].sum() / losses[:, 1].sum())


# ---------------------------------------------------------------------------------------------
# LoRA: the weights as they are, and a small correction to learn. Book appendix E.

def add_lora(model, settings):
    """Freeze the model and give each linear layer a correction that begins at zero."""
    model.requires_grad_(False)
    replace_linear_with_lora(model, settings["lora_rank"], settings["lora_alpha"])


def plain_model(model):
    """The model as others know it: itself, or with LoRA a copy with the corrections merged."""
    if not any(isinstance(module, LinearWithLoRA) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    merge_lora(model)
    return model


def unmerged(model):
    """What merging loses: each corrected matrix and its correction; {} without LoRA."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if name.endswith((".linear.weight", ".lora.A", ".lora.B"))}


# ---------------------------------------------------------------------------------------------
# The training loop.

def train_model(model, tokenizer, train_set, val_set, settings, device, out, saved=None):
    """Train until settings["total_steps"], evaluating and saving every settings["eval_every"].

    AdamW at a constant learning rate, as in section 7.6. `saved` is the dictionary of a checkpoint
    to go on from: the run then ends with the very weights of one that was never interrupted.
    Raises UserError when the loss is not finite (the last checkpoint is kept) and
    KeyboardInterrupt after Ctrl-C, when the step is saved.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], weight_decay=0.1, fused=True)
    step, best, loss_sum, loss_steps = 0, math.inf, 0.0, 0
    if saved:
        step, best, (loss_sum, loss_steps) = saved["step"], saved["best"], saved["losses"]
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"])
    lengths, plan = [len(ids) for ids in train_set.encoded_texts], None
    per_epoch, metrics = steps_per_epoch(len(train_set), settings), Metrics(out, step)
    progress = Progress(settings["total_steps"], "steps")
    model.train()
    with CtrlC() as stop:
        while step < settings["total_steps"]:
            epoch, k = divmod(step, per_epoch)
            if k == 0 or plan is None:
                plan = plan_epoch(epoch, lengths, settings)
            loss = accumulate_gradients(model, train_set, plan[k], settings, device)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step + 1}; the last checkpoint is "
                                f"kept. Try a lower --lr than {settings['lr']:g}")
            optimizer.step()
            optimizer.zero_grad()
            step, loss_sum, loss_steps = step + 1, loss_sum + loss, loss_steps + 1
            progress.update(step, f"step {step} | loss {loss:.3f}")
            evaluate = step % settings["eval_every"] == 0 or step == settings["total_steps"]
            better = False
            if evaluate:
                progress.close()
                losses = record_losses(model, val_set, settings, device, settings["mask_prompt"])
                val_loss, train_loss = mean_loss(losses), loss_sum / loss_steps
                if not math.isfinite(val_loss):
                    raise UserError(f"the validation loss is {val_loss} at step {step}; the last "
                                    f"checkpoint is kept. Try a lower --lr than {settings['lr']:g}")
                print(f"step {step:5d} | epoch {step / per_epoch:.2f} | train loss "
                      f"{train_loss:.3f} | val loss {val_loss:.3f}", flush=True)
                metrics.add(step=step, epoch=round(step / per_epoch, 3),
                            train_loss=round(train_loss, 5), val_loss=round(val_loss, 5))
                better, best = val_loss < best, min(val_loss, best)
                loss_sum, loss_steps = 0.0, 0
            if evaluate or stop.pressed:
                save_state(out, model, tokenizer, better, settings, step=step, best=best,
                           losses=[loss_sum, loss_steps], optimizer=optimizer.state_dict())
            if stop.pressed:
                progress.close()
                print(f"stopped at step {step}, saved; go on with the same command and --resume")
                raise KeyboardInterrupt
    if metrics.rows:
        metrics.plot(per="target token")


def save_state(out, model, tokenizer, better, settings, **state):
    """Write the newest state and, if it is `better`, the best one.

    Both hold a plain model, which any stage can read; what a run with LoRA needs to go on exactly
    where it was, the matrices before the merge, is stored too.
    """
    whole, style = plain_model(model), settings["prompt_style"]
    if better:
        save_checkpoint(best_path(out), whole, tokenizer, prompt_style=style, step=state["step"])
    save_checkpoint(out, whole, tokenizer, prompt_style=style, settings=settings,
                    unmerged=unmerged(model), random=random_state(), **state)


def steps_per_epoch(num_records, settings):
    """Optimizer steps in which each record is seen once."""
    return math.ceil(num_records / (settings["batch_size"] * settings["grad_accum"]))


# ---------------------------------------------------------------------------------------------
# Answers to the test records, many at once.

def generate_responses(model, tokenizer, entries, style="alpaca", max_new_tokens=256,
                       batch_size=32, save=lambda: None):
    """Give each entry without a `model_response` one, greedily; `save()` follows each round.

    A round adds up to 64 tokens to the shortest texts; finished ones leave, the others go on in a
    later round. So little is padded, and nobody waits for the longest. An answer ends with the end
    of text, after `max_new_tokens` or where the context does (a prompt that fills the context gets
    an empty one), and is the same as if its prompt had been alone.
    """
    context, end = model.cfg["context_length"], tokenizer.eot_token
    device = model.tok_emb.weight.device
    texts = {i: encode_prompt(entry, tokenizer, style) for i, entry in enumerate(entries)
             if "model_response" not in entry}                        # prompt and answer so far
    starts = {i: len(ids) for i, ids in texts.items()}
    limits = {i: max(start, min(start + max_new_tokens, context)) for i, start in starts.items()}
    progress = Progress(len(texts), "answers")
    while texts:
        batch = sorted(texts, key=lambda i: len(texts[i]))[:batch_size]
        lengths = [len(texts[i]) for i in batch]
        idx, _ = custom_collate_fn([texts[i] for i in batch], end, device=device)
        steps = min([64] + [limits[i] - len(texts[i]) for i in batch])
        out = generate(model, idx, steps, context, eos_id=end,
                       lengths=torch.tensor(lengths, device=device))
        for i, new in zip(batch, out[:, idx.shape[1]:].tolist()):
            texts[i] = texts[i] + list(itertools.takewhile(lambda token: token != end, new))
            if end in new or len(texts[i]) == limits[i]:
                entries[i]["model_response"] = tokenizer.decode(texts.pop(i)[starts[i]:]).strip()
        save()
        progress.update(len(starts) - len(texts), f"{len(starts) - len(texts)} answers")
    progress.close()


def take_old_responses(path, checkpoint, entries):
    """Take over the answers, and the judge's scores, that this very checkpoint got before.

    Only if the file is newer than the checkpoint, and where it has the same record.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        if path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns:
            for entry, old in zip(entries, json.loads(path.read_text(encoding="utf-8"))):
                if entry.items() <= old.items():
                    entry.update({name: old[name] for name in ("model_response", "judge")
                                  if name in old})


def write_json(path, value):
    """Write JSON that people can read, all or nothing."""
    with write_atomically(path) as part:
        # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
        with open(part, "w", encoding="utf-8", errors="replace") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------
# Scores that need no server.

def token_f1(answer, truth):
    """How far two texts share their words, 0 to 1, whatever the order (Rajpurkar et al. 2016).

    Example:
        token_f1("The cat sat.", "the cat sat down")           # 2 * 3 / (3 + 4) = 0.857
    """
    a, b = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (answer, truth))
    return 2 * (a & b).total() / (a + b).total() if a or b else float(answer == truth)


def score_responses(model, test_set, entries, settings, device):
    """Write scores into each entry; return their means in a dictionary.

    The response loss is that of the right answer's tokens, in nats; e to it is the perplexity, as
    if the model hesitated between so many tokens. Both are None if no entry fits the context;
    `test_set` has those that do, as `test_set.data`.
    """
    losses = record_losses(model, test_set, settings, device, mask_prompt=True)
    loss = mean_loss(losses) if len(test_set) else None
    for entry, (total, count) in zip(test_set.data, losses.tolist()):
        entry["response_loss"] = round(total / count, 4)
    for entry in entries:
        answer, truth = entry["model_response"], entry["output"].strip()
        entry["exact_match"], entry["token_f1"] = answer == truth, round(token_f1(answer, truth), 4)
    return {"answers": len(entries), "response_loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 99)),
            **{name: sum(entry[name] for entry in entries) / len(entries)
               for name in ("exact_match", "token_f1")}}


# ---------------------------------------------------------------------------------------------
# The judge: a larger model, which an Ollama server (https://ollama.com) runs. Section 7.8.

def explain_failure(error, url, timeout):
    """An exception of requests -> a UserError that says what to do."""
    if isinstance(error, ValueError):
        return UserError(f"{url} is not an address; give one as in --judge-url {OLLAMA}")
    if "timed out" in str(error):
        return UserError(f"the judge at {url} sent nothing for {timeout} s; see what its server "
                         "does, then repeat the command with --resume")
    if "Max retries" in str(error):
        return UserError(f"there is no judge at {url}; start one with: ollama serve")
    return UserError(f"the connection to the judge at {url} broke off; repeat the command with "
                     "--resume")


def find_judge(model, url=OLLAMA, timeout=30):
    """Make sure that the server is up and has pulled `model`. Raises UserError."""
    url = url.removesuffix("chat") + "tags"
    try:
        with requests.get(url, timeout=timeout) as response:
            names = [str(entry["name"]) for entry in json.loads(response.content)["models"]]
    except requests.exceptions.RequestException as e:
        raise explain_failure(e, url, timeout) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"what answers at {url} is not an Ollama server; start one with: ollama "
                        "serve") from None
    if not {model, model + ":latest"} & set(names):
        raise UserError(f"the judge has no model {model}; get it with: ollama pull {model} (it "
                        f"has: {', '.join(names) or 'none'})")


def query_model(prompt, model="llama3", url=OLLAMA, timeout=300):
    """One question to an Ollama server -> its answer, a text. Section 7.8.

    The same question gets the same answer. `timeout` is in seconds without a byte. Raises
    UserError when there is no server, or when it stalls, breaks off, or sends an error or nonsense.
    """
    pieces, line = [], b""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}],
            "options": {"seed": 123, "temperature": 0, "num_ctx": 2048}}
    try:
        with requests.post(url, json=body, stream=True, timeout=timeout) as response:
            for line in response.iter_lines():                # each line a piece of the answer
                if line:
                    part = json.loads(line)
                    if "error" in part:
                        raise UserError(f"the judge at {url} reports: {part['error']}")
                    pieces.append(part["message"]["content"])
                    if part.get("done"):
                        return "".join(pieces)
            raise requests.exceptions.ConnectionError("no piece said that it was the last")
    except requests.exceptions.RequestException as e:
        raise explain_failure(e, url, timeout) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the judge at {url} sent what is no answer of Ollama: "
                        f"{line[:60].decode(errors='replace')!r}") from None


def generate_model_scores(json_data, json_key, model="llama3", url=OLLAMA, save=lambda: None):
    """Let `model` score each entry's `json_key` from 0 to 100 -> list of scores. Section 7.8.

    A score is the first integer of the reply; replies without one are counted, shown, and left
    out of the list. Score and reply go into entry["judge"], then `save()` is called, so that after
    a failure (UserError) another call only asks for what is missing.
    """
    progress, unreadable = Progress(len(json_data), "scores"), 0
    for i, entry in enumerate(json_data):
        if entry.get("judge", {}).get("model") != model:
            if entry[json_key] == "":
                score, reply = 0, "(nothing was answered)"
            else:
                reply = query_model(  # the book's words, so that scores can be compared with it
                    f"Given the input `{format_input(entry)}` and correct output "
                    f"`{entry['output']}`, score the model response `{entry[json_key]}` on a scale "
                    "from 0 to 100, where 100 is the best score. Respond with the integer number "
                    "only.", model, url)
                found = re.search(r"-?\d+", reply)
                score = int(found[0]) if found and len(found[0]) < 9 else None
                score = score if score is not None and 0 <= score <= 100 else None
            entry["judge"] = {"model": model, "score": score, "reply": reply}
            save()
        if entry["judge"]["score"] is None:
            unreadable += 1
            progress.close()
            print(f"answer {i}: no score from 0 to 100 in the judge's {entry['judge']['reply']!r}")
        progress.update(i + 1, f"score {i + 1} of {len(json_data)}")
    progress.close()
    if unreadable:
        print(f"{unreadable} of {len(json_data)} replies hold no score and do not count")
    return [e["judge"]["score"] for e in json_data if e["judge"]["score"] is not None]


# ---------------------------------------------------------------------------------------------
# Chat.

def print_answer(model, tokenizer, ids, args, stop=None):
    """Print the answer to the tokens `ids` while it is made; return its tokens."""
    tokens, context = [], model.cfg["context_length"]
    stream = generate_stream(
        model, torch.tensor([ids], device=model.tok_emb.weight.device),
        min(args.max_new_tokens, context - len(ids)), context, args.temperature,
        eos_id=tokenizer.eot_token, seed=args.seed)

    def until_end():
        for row in stream:
            if int(row[0]) == tokenizer.eot_token or (stop and stop.pressed):
                return
            tokens.append(int(row[0]))
            yield tokens[-1]

    for piece in decode_stream(until_end(), tokenizer):
        print(printable(piece), end="", flush=True)
    print()
    return tokens


def encode_question(model, tokenizer, style, instruction, given=""):
    """A question -> the tokens to be answered. Raises UserError when it is too long."""
    context = model.cfg["context_length"]
    ids = encode_prompt({"instruction": instruction, "input": given}, tokenizer, style)
    if len(ids) >= context:
        raise UserError(f"the question is {len(ids)} tokens long, which leaves no room for an "
                        f"answer in the context of {context}; ask it shorter")
    return ids


def chat(model, tokenizer, style, args):
    """A conversation in the terminal; with each question go the newest turns that fit.

    Ctrl-C stops an answer; where a question is awaited it ends the chat, as /exit and Ctrl-D do.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lets input() edit a line and go back to earlier ones
    sys.stdin.reconfigure(errors="replace")
    context, turns = model.cfg["context_length"], []
    room = min(args.max_new_tokens, context // 4)  # for the answer
    print("/reset forgets the conversation; /exit or Ctrl-D ends it.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            turns = []
            print("(forgotten)")
        elif text.startswith("/") and " " not in text:
            print("there are /reset and /exit")
        elif text:
            try:
                turns.append(encode_question(model, tokenizer, style, text))
            except UserError as e:
                print(e)
                continue
            while len(turns) > 1 and sum(map(len, turns)) + room > context:
                turns.pop(0)
            with CtrlC() as stop:
                turns[-1] += print_answer(model, tokenizer, sum(turns, []), args, stop)
            turns[-1].append(tokenizer.eot_token)


def talk(args, device):
    """--chat and --ask."""
    path = args.init or args.out
    if not path.exists():
        raise UserError(f"there is no checkpoint {path} to talk to; make one with: python "
                        "finetune_instruct.py")
    model, tokenizer, saved = load_checkpoint(path, device)
    model.to(pick_dtype(args.dtype, device))
    style = args.prompt_style or saved.get("prompt_style", "alpaca")
    if args.chat:
        return chat(model, tokenizer, style, args)
    ids = encode_question(model, tokenizer, style, args.ask, args.input)
    print_answer(model, tokenizer, ids, args)


# ---------------------------------------------------------------------------------------------
# python finetune_instruct.py

def parse_arguments(argv):
    """The command line."""
    parser = ArgumentParser(description="Finetune a GPT to follow instructions; or talk to it.")
    arg = parser.add_argument
    arg("--data", type=Path, help="JSON or JSONL file of records instead of the book's 1,100")
    arg("--init", type=Path, help="checkpoint to start from; default: "
        + ", else ".join(map(str, STARTS)) + "; with --chat or --ask: the one to talk to, "
        "default: the one at --out")
    arg("--prompt-style", choices=list(PROMPT_STYLES), help="how a record becomes a prompt; "
        "default: the checkpoint's, else alpaca")
    arg("--mask-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="learn the answer alone, not the prompt too")
    arg("--train", choices=["all", "lora"], default="all", help="what learns: every weight, or a "
        "small correction to each matrix")
    arg("--lora-rank", type=positive_int, default=16, help="width of a correction")
    arg("--lora-alpha", type=positive_float, default=16.0, help="its size: it is multiplied by "
        "alpha / rank")
    arg("--no-responses", action="store_true", help="do not answer the test records")
    arg("--max-new-tokens", type=positive_int, default=256, help="the longest answer")
    arg("--judge", metavar="MODEL", help="have the answers scored by this model of an Ollama "
        "server, such as llama3")
    arg("--judge-url", default=OLLAMA, help="where that server is")
    talking = parser.add_mutually_exclusive_group()
    talking.add_argument("--chat", action="store_true", help="talk to the checkpoint at --out")
    talking.add_argument("--ask", metavar="TEXT", help="one question to it")
    arg("--input", default="", metavar="TEXT", help="what the question of --ask is about")
    arg("--temperature", type=non_negative_float, default=0.0, help="for --chat and --ask; 0 "
        "always takes the likeliest token")
    add_training_arguments(parser, "checkpoints/instruct.pt", epochs=2, batch_size=8, eval_every=40,
                           lr=None)  # make_settings finds one
    args = parser.parse_args(argv)
    if args.input and args.ask is None:
        parser.error("argument --input: it goes with --ask")
    if args.judge and args.no_responses:
        parser.error("argument --judge: there is nothing to judge with --no-responses")
    args.judge_url = args.judge_url.rstrip("/").removesuffix("/api/chat") + "/api/chat"
    return args


def make_settings(args, model, tokenizer, style, train_set, device):
    """What decides the result of a run, as numbers and strings, and the number of steps."""
    # GPT-2's learning rate is the book's; a narrower model needs larger steps.
    lr = args.lr or 5e-5 * max(1.0, 768 / model.cfg["emb_dim"]) ** 2
    settings = {"data": hashlib.sha256(repr(train_set.encoded_texts).encode()).hexdigest(),
                "seed": args.seed, "batch_size": args.batch_size, "grad_accum": args.grad_accum,
                "lr": lr, "prompt_style": style, "mask_prompt": args.mask_prompt,
                "train": args.train, "lora_rank": args.lora_rank, "lora_alpha": args.lora_alpha,
                "eval_every": args.eval_every, "pad_token_id": tokenizer.eot_token,
                "context_length": model.cfg["context_length"],
                "dtype": str(pick_dtype(args.dtype, device)).removeprefix("torch.")}
    settings["total_steps"] = min(args.epochs * steps_per_epoch(len(train_set), settings),
                                  args.max_steps or math.inf)
    return settings


def check_resume(saved, settings, path):
    """Raise UserError when the run in the checkpoint is not the one the command line describes.

    Its length may differ, as every step is like the others, and how often it is evaluated.
    """
    before = saved.get("settings", {})
    if "mask_prompt" not in before:
        raise UserError(f"{path} is not a run of finetune_instruct.py that can go on; start from "
                        f"its weights with: --init {path}")
    for name in reversed(settings):  # the data last: it differs too if the prompt style does
        if (name not in ("eval_every", "dtype", "total_steps")
                and before.get(name) != settings[name]):
            raise UserError(f"{path} is a run with another --{name.replace('_', '-')}; repeat its "
                            "command, or leave out --resume to start anew")


def load_data(args, tokenizer, style, context_length):
    """-> InstructionDatasets to train and to validate, the test records, and those of them that
    fit the context as an InstructionDataset; prints their numbers. Raises UserError."""
    path = args.data or download([RECORDS], Path("data") / "instruction-data.json", RECORDS_SHA256)
    records = read_records(path)
    train, test, val = split_records(records)
    test = [dict(record) for record in test]  # they will get answers and scores
    train_set, test_set, val_set = sets = [
        InstructionDataset(part, tokenizer, style) for part in (train, test, val)]
    left_out, cut = map(sum, zip(*(part.fit(context_length) for part in sets)))
    print(f"records  {path}: {len(train)} to train, {len(test)} to test, {len(val)} to validate")
    if left_out or cut:
        print(f"         longer than the context of {context_length} tokens: {cut} lose the end "
              f"of the answer, {left_out} have no room for one and are left out"
              + ("; --prompt-style phi3 is shorter" if style == "alpaca" else ""))
    if args.judge and not test:
        raise UserError(f"{path}: of {len(records)} records none is left to test, so there is "
                        "nothing to judge; at least 10 are needed")
    if not len(train_set) or not len(val_set):
        raise UserError(f"{path}: of {len(records)} records, {len(train_set)} are left to train "
                        f"and {len(val_set)} to validate; at least one of each is needed")
    return train_set, val_set, test, test_set


def answer_and_score(model, tokenizer, test, test_set, settings, args, device):
    """Answer the test records, score the answers, print and write both."""
    path = args.out.with_name(args.out.stem + "-responses.json")
    scores_path = args.out.with_name(args.out.stem + "-scores.json")
    if args.resume:
        take_old_responses(path, args.out, test)

    def save():
        write_json(path, test)

    generate_responses(model, tokenizer, test, settings["prompt_style"], args.max_new_tokens,
                       save=save)
    scores = score_responses(model, test_set, test, settings, device)
    save()
    write_json(scores_path, scores)
    for entry in test[:3]:
        print(f"\n{entry['instruction']} {entry['input']}".rstrip()
              + f"\n  expected: {entry['output']}\n  answered: {entry['model_response']}")
    loss = "" if scores["response_loss"] is None else (
        f"response loss {scores['response_loss']:.3f}, perplexity {scores['perplexity']:.2f}, ")
    print(f"\nscores   {len(test)} answers: {loss}exact match {scores['exact_match']:.1%}, "
          f"token F1 {scores['token_f1']:.3f}")
    if args.judge:
        numbers = generate_model_scores(test, "model_response", args.judge, args.judge_url, save)
        mean = sum(numbers) / len(numbers) if numbers else None
        write_json(scores_path, {**scores, "judge": {"model": args.judge, "mean": mean,
                                                     "scored": len(numbers)}})
        print(f"judge    {args.judge}: " + (f"{mean:.2f} of 100, mean of " if numbers else "")
              + f"{len(numbers)} of {len(test)} answers scored")
    print(f"saved    {path}, {scores_path.name}\n"
          "The book's models, judged by Llama 3 8B as --judge llama3 does: 51.75 (GPT-2 355M, two "
          "epochs,\n--no-mask-prompt), 47.73 (--mask-prompt), 50.23 (--train lora "
          "--no-mask-prompt).")


def main(argv=None):
    """Checkpoint + records -> training -> answers -> scores; or a conversation."""
    args = parse_arguments(argv)
    device = pick_device(args.device)
    if args.chat or args.ask is not None:
        return talk(args, device)
    check_output(args.out)
    if args.judge:
        find_judge(args.judge, args.judge_url)
    resume = args.resume and args.out.exists()
    start = args.out if resume else find_start(args.init, STARTS)
    model, tokenizer, saved = load_checkpoint(start)
    style = args.prompt_style or saved.get("prompt_style", "alpaca")
    train_set, val_set, test, test_set = load_data(args, tokenizer, style,
                                                   model.cfg["context_length"])
    settings = make_settings(args, model, tokenizer, style, train_set, device)
    torch.manual_seed(args.seed)
    keep_freed_memory(largest=1 << 25)  # the sizes of larger ones vary: kept, they would add up
    if resume:
        check_resume(saved, settings, args.out)
        if args.dtype == "auto":  # it depends on a measurement; a resumed run keeps the choice
            settings["dtype"] = saved["settings"]["dtype"]
    if args.train == "lora":
        add_lora(model, settings)
        if resume:
            model.load_state_dict(saved["unmerged"], strict=False)
    model.to(device)
    print(f"model    {start}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of them learn\n"
          f"run      {settings['total_steps']:,} steps of {args.batch_size} x {args.grad_accum} "
          f"records, learning rate {settings['lr']:g}, {device}, {settings['dtype']}"
          + (f", from step {saved['step']:,}" if resume else ""), flush=True)
    train_model(model, tokenizer, train_set, val_set, settings, device, args.out,
                saved if resume else None)
    print(f"saved    {args.out} (newest), {best_path(args.out).name} (lowest validation loss), "
          f"{beside(args.out, '.csv').name}")
    if test and not args.no_responses:
        answer_and_score(plain_model(model), tokenizer, test, test_set, settings, args, device)
    print("\nNext: python finetune_instruct.py --chat"
          + (f" --out {args.out}" if args.out != Path("checkpoints/instruct.pt") else ""))


if __name__ == "__main__":
    run_main(main)
