"""Load OpenAI's GPT-2 weights instead of pretraining, or write a checkpoint for other software.

    python load_gpt2.py                       fetch GPT-2 124M (550 MB) -> checkpoints/gpt2-124M.pt
    python load_gpt2.py --size 355M           or 774M, 1558M: better text, slower
    python load_gpt2.py --from some/folder    weights that are already there; no network is used
    python load_gpt2.py --from model.pth      weights saved by code for the book
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt/      transformers
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt.gguf  llama.cpp

The hub is Hugging Face's website for models, transformers its Python library; llama.cpp is a
program that runs models without Python.
Three kinds of files are read: safetensors (Hugging Face's hub), OpenAI's original TensorFlow
checkpoint, and what `torch.save(model.state_dict(), "model.pth")` writes. C is the embedding width,
T the context length, V the vocabulary size.
"""

import contextlib
import json
import math
import re
import shlex
import shutil
import struct
from pathlib import Path

from gpt import (  # first: it sets how torch's threads wait
    BYTE_OF_LETTER, END_OF_TEXT, GPT2_SIZES, GPT2_SPLIT_PATTERN, VERDICT, VERDICT_SHA256,
    VERDICT_URLS, ArgumentParser, GPTModel, UserError, check_output, checkpoint_file, download,
    generate, load_checkpoint, load_tokenizer, make_tokenizer, name as name_type, path as path_type,
    positive_int, run_main, save_checkpoint, say, shapes_only, text_to_token_ids,
    token_ids_to_text, write_atomically)

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# Who is who. The columns are each array's name in TensorFlow, on the hub, in llama.cpp's GGUF and
# in our model, then its shape in TensorFlow and on the hub.
#
# - In TensorFlow's names w is a matrix, b a bias or shift, g a scale.
# - The matrices in the blocks are (in, out) there, and (out, in) in GGUF and our model.
# - All but our model join query, key and value in one matrix.
# - OpenAI's models are tied: one matrix, wte, embeds the tokens and computes the logits. An untied
#   model also has lm_head.

TOP_NAMES = [
    ("wte", "wte.weight", "token_embd.weight", ["tok_emb.weight"], "V C"),
    ("wpe", "wpe.weight", "position_embd.weight", ["pos_emb.weight"], "T C"),
    ("ln_f/g", "ln_f.weight", "output_norm.weight", ["final_norm.scale"], "C"),
    ("ln_f/b", "ln_f.bias", "output_norm.bias", ["final_norm.shift"], "C"),
]
BLOCK_NAMES = [
    ("ln_1/g", "ln_1.weight", "attn_norm.weight", ["norm1.scale"], "C"),
    ("ln_1/b", "ln_1.bias", "attn_norm.bias", ["norm1.shift"], "C"),
    ("attn/c_attn/w", "attn.c_attn.weight", "attn_qkv.weight",
     ["att.W_query.weight", "att.W_key.weight", "att.W_value.weight"], "C 3C"),
    ("attn/c_attn/b", "attn.c_attn.bias", "attn_qkv.bias",
     ["att.W_query.bias", "att.W_key.bias", "att.W_value.bias"], "3C"),
    ("attn/c_proj/w", "attn.c_proj.weight", "attn_output.weight", ["att.out_proj.weight"], "C C"),
    ("attn/c_proj/b", "attn.c_proj.bias", "attn_output.bias", ["att.out_proj.bias"], "C"),
    ("ln_2/g", "ln_2.weight", "ffn_norm.weight", ["norm2.scale"], "C"),
    ("ln_2/b", "ln_2.bias", "ffn_norm.bias", ["norm2.shift"], "C"),
    ("mlp/c_fc/w", "mlp.c_fc.weight", "ffn_up.weight", ["ff.layers.0.weight"], "C 4C"),
    ("mlp/c_fc/b", "mlp.c_fc.bias", "ffn_up.bias", ["ff.layers.0.bias"], "4C"),
    ("mlp/c_proj/w", "mlp.c_proj.weight", "ffn_down.weight", ["ff.layers.2.weight"], "4C C"),
    ("mlp/c_proj/b", "mlp.c_proj.bias", "ffn_down.bias", ["ff.layers.2.bias"], "C"),
]
HEAD_NAMES = ("lm_head", "lm_head.weight", "output.weight", ["out_head.weight"], "V C")


def weight_names(n_layers, tied=True):
    """Yield (TensorFlow's, the hub's, GGUF's name, [our names], shape) of each array of a GPT-2."""
    yield from TOP_NAMES if tied else [*TOP_NAMES, HEAD_NAMES]
    for i in range(n_layers):
        for tf_name, hub_name, gguf_name, ours, shape in BLOCK_NAMES:
            yield (f"h{i}/{tf_name}", f"h.{i}.{hub_name}", f"blk.{i}.{gguf_name}",
                   [f"trf_blocks.{i}.{name}" for name in ours], shape)


def count_blocks(names):
    """Count the blocks. The first number in an array's name is the number of its block."""
    return len({re.search(r"\d+", name)[0] for name in names if re.search(r"\d", name)})


# ---------------------------------------------------------------------------------------------
# Into the model.

def to_our_names(arrays):
    """{TensorFlow's name: array} -> {our name: float32 tensor}. Raises KeyError, ValueError.

    It empties `arrays`, so that memory holds one model and not two.
    """
    weights = {}
    for tf_name, _, _, ours, _ in weight_names(count_blocks(arrays), tied="lm_head" not in arrays):
        array = arrays.pop(tf_name)

        # Most arrays stay whole. Query, key and value are cut apart: (C, 3 C) -> three (C, C).
        for name, piece in zip(ours, np.split(array, len(ours), axis=-1)):
            if tf_name.endswith("/w"):
                piece = piece.T  # nn.Linear keeps its matrix as (out, in)
            weights[name] = torch.from_numpy(np.ascontiguousarray(piece, dtype=np.float32))
    return weights


def make_model(weights, n_heads=None):
    """{our name: tensor} -> a `GPTModel` in eval mode. Raises KeyError, ValueError, RuntimeError.

    Shapes show all sizes but the number of heads. Without `n_heads` a head is 64 wide, as in GPT-2.
    """
    V, C = weights["tok_emb.weight"].shape
    if not n_heads and C % 64:
        raise ValueError(f"the width {C} is no multiple of 64; give --n-heads")
    head = weights.setdefault("out_head.weight", weights["tok_emb.weight"])
    cfg = {"vocab_size": V, "context_length": len(weights["pos_emb.weight"]), "emb_dim": C,
           "n_heads": n_heads or C // 64, "n_layers": count_blocks(weights), "drop_rate": 0.0,
           "qkv_bias": "trf_blocks.0.att.W_query.bias" in weights,
           "tie_embeddings": torch.equal(head, weights["tok_emb.weight"])}

    with shapes_only():  # no memory yet: assign=True puts our tensors in
        model = GPTModel(cfg)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_local(path, n_heads=None):
    """A file, or a folder in a published format -> a `GPTModel`, ready to use (eval mode).

    A bad file may raise any error. Example: model = load_local("data/gpt2/124M")
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt"):
        arrays, settings = read_published(path)
        return make_model(to_our_names(arrays), n_heads or settings.get("n_head"))

    # What torch.save writes has our names already. No code in the file is run (weights_only). The
    # book's chapter 5 saves the optimizer's numbers, too. DistributedDataParallel and torch.compile
    # put a word in front of each name.
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): t.float().contiguous()
               for name, t in saved.get("model_state_dict", saved).items()}
    return make_model(weights, n_heads)


def load_weights_into_gpt(gpt, params):
    """Copy `params` into a `GPTModel`. Book section 5.5.

    `params` is a tree, as `download_and_load_gpt2` (below the lesson) gives it: there the array
    h0/attn/c_attn/w is params["blocks"][0]["attn"]["c_attn"]["w"], and ln_f/g is params["g"].

    `out_head` shares `tok_emb`'s matrix from then on. Raises KeyError for a missing array and
    RuntimeError for a model that does not fit. The model needs qkv_bias True.
    """
    arrays = {"wte": params["wte"], "wpe": params["wpe"],
              "ln_f/g": params["g"], "ln_f/b": params["b"]}
    for i, block in enumerate(params["blocks"]):
        for tf_name, *_ in BLOCK_NAMES:
            node = block
            for key in tf_name.split("/"):
                node = node[key]
            arrays[f"h{i}/{tf_name}"] = node

    weights = to_our_names(arrays)
    gpt.cfg["tie_embeddings"] = True
    gpt.load_state_dict({**weights, "out_head.weight": weights["tok_emb.weight"]})


# ---------------------------------------------------------------------------------------------
# Safetensors, the format of Hugging Face's hub: eight bytes with the length of a header, the header
# in JSON, then the numbers. https://github.com/huggingface/safetensors#format

def read_safetensors(path):
    """A file -> {the hub's name, without `transformer.`: array}. A bad file may raise any error."""
    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<i2"}
    arrays = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        for name, entry in json.loads(file.read(length)).items():
            if entry.get("dtype") not in dtypes:
                continue  # no weights: metadata, or a mask
            file.seek(8 + length + entry["data_offsets"][0])
            array = np.fromfile(file, dtypes[entry["dtype"]], math.prod(entry["shape"]))
            if entry["dtype"] == "BF16":  # numpy does not have it: it is a float32's upper half
                array = torch.from_numpy(array).view(torch.bfloat16).float().numpy()
            arrays[name.removeprefix("transformer.")] = array.reshape(entry["shape"])
    return arrays


# ---------------------------------------------------------------------------------------------
# OpenAI's own files: hparams.json with the sizes, and the data file of a TensorFlow checkpoint. It
# holds float32 arrays in the alphabetical order of their names and nothing else: h0/attn/c_attn/b
# comes first, h10 before h2. So the sizes say where each array lies.

TF_DATA = "model.ckpt.data-00000-of-00001"


def read_tensorflow(path, settings):
    """The data file -> {TensorFlow's name: array}. Raises KeyError, ValueError."""
    C = settings["n_embd"]
    sizes = {"V": settings["n_vocab"], "T": settings["n_ctx"], "C": C, "3C": 3 * C, "4C": 4 * C}
    arrays = {}
    with open(path, "rb") as file:
        for tf_name, _, _, _, letters in sorted(weight_names(settings["n_layer"])):
            shape = [sizes[letter] for letter in letters.split()]
            arrays[tf_name] = np.fromfile(file, "<f4", math.prod(shape)).reshape(shape)
    return arrays


def read_published(path):
    """A folder in either format, or a .safetensors file -> ({TensorFlow's name: array}, settings).

    The settings are those of the .json file beside the weights. A bad file may raise any error.
    """
    if (path / TF_DATA).exists():
        settings = json.loads((path / "hparams.json").read_text(encoding="utf-8"))
        return read_tensorflow(path / TF_DATA, settings), settings

    # A large model is cut into several files: model-00001-of-00002.safetensors and so on.
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds neither format of GPT-2: no .safetensors, no {TF_DATA}")
    arrays = {}
    for file in files:
        arrays |= read_safetensors(file)
    names = weight_names(count_blocks(arrays), "lm_head.weight" not in arrays)
    arrays = {tf_name: arrays[hub_name] for tf_name, hub_name, *_ in names}

    # A model with other settings would load without an error, and then generate nonsense.
    gpt2 = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    config = files[0].with_name("config.json")
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    for key, value in gpt2.items():
        # "gelu_pytorch_tanh" is another name of gelu_new.
        if settings.get(key, value) not in (value, "gelu_pytorch_tanh"):
            raise ValueError(f"config.json says {key} {settings[key]}, GPT-2 has {value}")
    return arrays, settings


# ---------------------------------------------------------------------------------------------
# Are the weights right? A text that makes sense, and a loss like the book's, show it.

@torch.no_grad()
def calc_text_loss(model, tokenizer, text):
    """-> (mean loss in nats per token, bits per byte), on a text's first 32 windows. Section 5.1.

    The longer a tokenizer's tokens, the harder each one is to guess: only bits per byte can be
    compared between tokenizers. A nat is log2(e) = 1.44 bits.
    """
    # B windows of T tokens, read one at a time to spare memory.
    token_ids = text_to_token_ids(text, tokenizer)[0]
    T = min(256, model.cfg["context_length"], len(token_ids) - 1)
    B = min((len(token_ids) - 1) // T, 32)
    inputs = token_ids[:B * T].view(B, T)
    targets = token_ids[1:B * T + 1].view(B, T)

    losses = [F.cross_entropy(model(x[None])[0], y).item() for x, y in zip(inputs, targets)]
    loss = sum(losses) / B
    num_bytes = len(tokenizer.decode_bytes(targets.flatten().tolist()))
    return loss, loss / math.log(2) * targets.numel() / num_bytes  # bits a token * tokens a byte


def demonstrate(model, tokenizer, prompt, max_new_tokens):
    """Print a continuation and a loss, and after each the book's result for GPT-2 124M."""
    ids = generate(model, text_to_token_ids(prompt, tokenizer), max_new_tokens,
                   eos_id=tokenizer.eot_token)
    say("text", f"{prompt!r}, continued by the likeliest tokens:\n"
        + token_ids_to_text(ids, tokenizer))
    say("book", "GPT-2 124M, section 6.4: Every effort moves you forward. / The first step is to "
        "understand the importance of your work")

    if VERDICT.exists():
        text = VERDICT.read_text(encoding="utf-8")  # its last tenth is the book's validation set
        loss, bits = calc_text_loss(model, tokenizer, text[int(0.9 * len(text)):])
        V = model.cfg["vocab_size"]
        say("loss", f"{loss:.3f} nats per token, {bits:.3f} bits per byte, on the last tenth of "
            f"{VERDICT}. A blind guess among {V:,} tokens: {math.log(V):.3f} nats")
        say("book", "GPT-2 124M, exercise 5.5: 3.560 nats per token, 1.341 bits per byte")


# ---------------------------------------------------------------------------------------------
# Out to other software: the table of names read the other way.

MARK = "written by load_gpt2.py"  # in each exported file; no file without it is overwritten

# For tokenizer.json, the tokenizer's file in transformers: split text as GPT-2 does, no more.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}


def published_arrays(model, column):
    """{name: array}, the name from a column of the table: 1 is the hub's, 2 is GGUF's."""
    weights = model.state_dict()
    zeros = torch.zeros(model.cfg["emb_dim"])  # where ours has no bias for query, key and value
    arrays = {}
    for names in weight_names(model.cfg["n_layers"], model.cfg.get("tie_embeddings")):
        array = np.concatenate([weights.get(name, zeros).numpy() for name in names[3]])
        if column == 1 and names[0].endswith("/w"):  # GGUF keeps torch's (out, in)
            array = np.ascontiguousarray(array.T)
        arrays[names[column]] = array
    return arrays


def vocabulary(tokenizer):
    """(tokens, pairs that merge), with a visible letter for each byte, as in GPT-2's files.

    A byte may be a space or a part of a character; `BYTE_OF_LETTER` (gpt.py) has a letter for each.
    Other software wants the two tokens of which each token was made; a tokenizer keeps only ranks.
    So every way to cut a token into two known ones is listed, in the order of the ranks. A text
    gets the same IDs as from tokenizer.py, which never asks how a token was made: it merges any
    two neighbours that form one, the lowest rank first.
    """
    if tokenizer._pat_str != GPT2_SPLIT_PATTERN:
        raise UserError("only tokenizers that split text as GPT-2 does can be exported")
    letter_of_byte = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    ranks = tokenizer._mergeable_ranks
    tokens = ["".join(letter_of_byte[byte] for byte in token)
              for token in sorted(ranks, key=ranks.get)]
    known = set(tokens)
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    return [*tokens, END_OF_TEXT], [pair for pair in splits if known.issuperset(pair)]


def chat_template(texts):
    """The texts of a prompt style -> a template: a program that writes a conversation as text.

    `texts` is an entry of PROMPT_STYLES (finetune_instruct.py), saved in the checkpoint of a model
    finetuned on instructions. A conversation is a list of messages, each with a content and a role:
    user, assistant, or, before the first question, system (what the model shall be like). In the
    template's language, Jinja, {{ }} inserts a text and {% %} is a command. `loop.index0` is the
    number of the message. `add_generation_prompt` says that an answer is wanted.

    For each turn it writes, as in training, the text "instruction", the question, the text
    "output", the answer and the end of text. A system message stands in the first turn, before the
    question, with an empty line between them.
    """
    # json.dumps puts a text in quotes, with \n for a line break, as the template needs it.
    before, after = json.dumps(texts["instruction"]), json.dumps(texts["output"])
    return ("{% for message in messages %}"
            # An answer.
            "{% if message['role'] == 'assistant' %}"
            "{{ " + after + " + message['content'] + '<|endoftext|>' }}"
            # The first text of a turn: a question, or a system message.
            "{% elif loop.first or messages[loop.index0 - 1]['role'] == 'assistant' %}"
            "{{ " + before + " + message['content'] }}"
            # A question behind a system message.
            "{% else %}{{ '\\n\\n' + message['content'] }}{% endif %}{% endfor %}"
            # At the end, if an answer is wanted: the text behind which the model writes it.
            "{% if add_generation_prompt %}{{ " + after + " }}{% endif %}")


# ---------------------------------------------------------------------------------------------
# A folder for transformers: the numbers in safetensors, the rest in JSON.

def folder_files(cfg, tokenizer, template):
    """What stands beside the numbers: {name of a file: its contents, to be written as JSON}."""
    end = tokenizer.eot_token
    tokens, merges = vocabulary(tokenizer)
    return {
        "config.json": dict(
            source=MARK, architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32",
            vocab_size=cfg["vocab_size"], n_positions=cfg["context_length"], n_embd=cfg["emb_dim"],
            n_layer=cfg["n_layers"], n_head=cfg["n_heads"], bos_token_id=end, eos_token_id=end,
            tie_word_embeddings=bool(cfg.get("tie_embeddings"))),
        "tokenizer_config.json": dict(
            source=MARK, tokenizer_class="PreTrainedTokenizerFast", chat_template=template,
            bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False,
            model_max_length=cfg["context_length"]),
        "tokenizer.json": dict(
            # ignore_merges: a chunk that is itself a token stays whole, as in tiktoken.
            model=dict(source=MARK, type="BPE", ignore_merges=True,
                       vocab={token: i for i, token in enumerate(tokens)}, merges=merges),
            added_tokens=[dict(id=end, content=END_OF_TEXT, special=True, normalized=False,
                               single_word=False, lstrip=False, rstrip=False)],
            normalizer=None, pre_tokenizer=BYTE_LEVEL, post_processor=None, decoder=BYTE_LEVEL)}


def export_folder(model, tokenizer, template, folder):
    """Write what transformers' `from_pretrained(folder)` opens. Raises UserError, OSError.

    Stopped at any moment, it leaves a whole model: in `folder` or, between the two renames, in
    FOLDER.old.tmp.
    """
    folder = Path(folder).resolve()
    check_ours(folder)
    new = folder.with_name(f"{folder.name}.new.tmp")
    old = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, contents in folder_files(model.cfg, tokenizer, template).items():
        text = json.dumps(contents, indent=1, ensure_ascii=False)
        (new / name).write_text(text, encoding="utf-8")

    # The numbers, with a header that says where each array begins and ends.
    arrays = published_arrays(model, column=1)
    header = {"__metadata__": {"format": "pt", "source": MARK}}
    offset = 0
    for name, array in arrays.items():
        if name != "lm_head.weight":
            name = f"transformer.{name}"
        end = offset + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with open(new / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(arrays.values())  # an array is written as its bytes

    # Put the old folder aside, then the new one in its place.
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# GGUF, the format of llama.cpp: a header, keys with values, a list of tensors, then their numbers.
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
# In struct's formats < is the low byte first, I and i are 4 bytes, Q 8 bytes, f a float32. 4s is
# four letters, 2Q is Q twice.

UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9  # types of keys' values
F32, Q8_0 = 0, 8                                       # types of tensors


def gguf_string(text):
    """A text with its length in front."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """A value with the number of its type in front, as GGUF's keys have it."""
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + gguf_string(value)
    if isinstance(value[0], int):  # a list of numbers: tokenizer.ggml.token_type
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(gguf_string, value))


def gguf_array(name, array, quantize):
    """-> (GGUF's number of the type, the array as stored). `quantize` rounds matrices, but not the
    positions, to q8_0: each 32 numbers of a row become a float16 scale and 32 int8."""
    if not quantize or array.ndim == 1 or array.shape[1] % 32 or "pos" in name:
        return F32, array
    blocks = array.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    numbers = np.round(blocks / np.maximum(scales.astype("f4"), 1e-12)).clip(-127, 127)
    return Q8_0, np.concatenate([scales.view(np.int8), numbers.astype(np.int8)], axis=1)


def export_gguf(model, tokenizer, template, path, quantize=None):
    """Write a GGUF file, all or nothing. Raises UserError, OSError."""
    check_ours(path)
    cfg, end = model.cfg, tokenizer.eot_token
    tokens, merges = vocabulary(tokenizer)
    unused = [f"<|unused_{i}|>" for i in range(len(tokens), cfg["vocab_size"])]
    keys = {
        "general.description": MARK,
        "general.architecture": "gpt2", "gpt2.block_count": cfg["n_layers"],
        "gpt2.context_length": cfg["context_length"], "gpt2.embedding_length": cfg["emb_dim"],
        "gpt2.feed_forward_length": 4 * cfg["emb_dim"],
        "gpt2.attention.head_count": cfg["n_heads"], "gpt2.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [1] * end + [3] + [5] * len(unused),  # text, special, unused
        # At least one pair is needed. ÿ stands for the byte 255, which is never in UTF-8.
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges] or ["ÿ ÿ"]}
    if template:
        keys["tokenizer.chat_template"] = template

    # Zeros after each array let the next one begin at a multiple of 32 bytes. GGUF lists the last
    # dimension of a shape first.
    key_parts = [gguf_string(key) + gguf_value(value) for key, value in keys.items()]
    array_parts, data = [], []
    offset = 0
    for name, array in published_arrays(model, column=2).items():
        kind, stored = gguf_array(name, array, quantize)
        array_parts.append(gguf_string(name) + struct.pack(
            f"<I{array.ndim}QIQ", array.ndim, *array.shape[::-1], kind, offset))
        data += [stored, b"\0" * (-stored.nbytes % 32)]
        offset += stored.nbytes + len(data[-1])

    # The header: the format's name, its version, how many tensors and how many keys.
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(array_parts), len(key_parts))
    head += b"".join(key_parts + array_parts)
    with write_atomically(path) as part, open(part, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        file.writelines(data)


# Try it:
# 1. What does OpenAI's model know? python gpt.py --checkpoint checkpoints/gpt2-124M.pt
#    --prompt "The capital of France is" --temperature 0
# 2. How near to GPT-2 is a model of your own? Export it, then compare the bits per byte:
#    python load_gpt2.py --from my-gpt/
# 3. How small is a model in 8 bits? python load_gpt2.py --checkpoint checkpoints/pretrained.pt
#    --export my-gpt.gguf --quantize q8_0
#
# The same by hand, in Python:
#     from gpt import GPT_CONFIG_124M, GPTModel, generate, load_tokenizer
#     from load_gpt2 import export_folder, load_local
#
#     tokenizer = load_tokenizer("bytes")
#     cfg = {**GPT_CONFIG_124M, "vocab_size": tokenizer.n_vocab, "emb_dim": 64, "n_heads": 1}
#     export_folder(GPTModel(cfg), tokenizer, None, "random-gpt")
#     model = load_local("random-gpt")                 # or load_local("data/gpt2/124M")
#     ids = generate(model, tokenizer.encode("Every effort moves you"), max_new_tokens=5)
#     print(tokenizer.decode(ids[0].tolist()))


# =============================================================================================
# The lesson ends here. What follows: what protects files, downloads, tokenizers, the command.
# =============================================================================================

def check_ours(path):
    """Raise UserError if a file, or one in a folder, lacks the mark of this script."""
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_dir() or file.exists() and MARK.encode() not in file.open("rb").read(400):
            raise UserError(f"{path} holds something else than an export of this script; choose "
                            "another name with --export")


HUB_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
TF_URLS = ["https://openaipublic.blob.core.windows.net/gpt-2/models/{}/{}",
           "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{}/{}"]


def download_gpt2(model_size, models_dir):
    """The folder `models_dir`/`model_size` with the weights in one of the formats. UserError."""
    folder = Path(models_dir) / model_size
    if (folder / TF_DATA).exists():
        return folder
    try:
        download([HUB_URL.format(HUB_NAMES[model_size])], folder / "model.safetensors")
    except UserError as e:
        say("hub", f"{e}\nNow OpenAI's own format:")
        for name in ("hparams.json", TF_DATA):
            download([url.format(model_size, name) for url in TF_URLS], folder / name)
    return folder


def download_and_load_gpt2(model_size, models_dir):
    """-> (settings, params): GPT-2's sizes, and its weights as a tree of arrays. Book section 5.5.

    What lies in `models_dir`/`model_size` is not fetched again. Raises UserError. Example:
        settings, params = download_and_load_gpt2("124M", "data/gpt2")
        params["blocks"][0]["attn"]["c_attn"]["w"].shape                         # (768, 2304)
    """
    arrays, settings = read_published(download_gpt2(model_size, models_dir))
    V, C = arrays["wte"].shape
    L = count_blocks(arrays)
    settings = {"n_vocab": V, "n_ctx": len(arrays["wpe"]), "n_embd": C, "n_layer": L,
                "n_head": C // 64, **settings}

    # h3/mlp/c_fc/w becomes params["blocks"][3]["mlp"]["c_fc"]["w"], and ln_f/g params["g"].
    params = {"blocks": [{} for _ in range(L)]}
    for tf_name, array in arrays.items():
        *parts, key = tf_name.removeprefix("ln_f/").split("/")
        node = params["blocks"][int(parts.pop(0)[1:])] if parts else params
        for part in parts:
            node = node.setdefault(part, {})
        node[key] = array
    return settings, params


def find_tokenizer(weights, vocab_size):
    """The tokenizer in or beside `weights`, or GPT-2's. A bad file may raise any error.

    Its tokens must have our IDs: the 256 bytes first, the end of text last.
    """
    folder = weights if weights.is_dir() else weights.parent

    def read(name):
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    contents, vocab = read("tokenizer.json"), read("vocab.json")
    if contents:
        vocab, merges = contents["model"]["vocab"], contents["model"]["merges"]
        vocab |= {token["content"]: token["id"] for token in contents["added_tokens"]}
        if contents["normalizer"] or {**BYTE_LEVEL, **contents["pre_tokenizer"]} != BYTE_LEVEL:
            raise ValueError("its tokenizer prepares text in another way than GPT-2's")
    elif vocab:  # the older form, in several files
        vocab |= read("added_tokens.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif vocab_size >= 50257:
        return load_tokenizer("gpt2")
    else:
        raise ValueError("there is no tokenizer.json beside it")

    # Between them stand the tokens in the order of the merges that make them.
    letters = sorted(BYTE_OF_LETTER, key=vocab.__getitem__)
    tokens = list(dict.fromkeys([*letters, *("".join(m).replace(" ", "") for m in merges)]))
    if vocab != {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}:
        raise ValueError("its tokenizer has added tokens, or its IDs are not in the order of the "
                         "merges with <|endoftext|> last")
    return make_tokenizer("bpe", {bytes(BYTE_OF_LETTER[letter] for letter in token): i
                                  for i, token in enumerate(tokens)})


# The command.

def export(path, quantize, checkpoint):
    """Write a checkpoint as a folder for transformers or as a GGUF file -> (model, tokenizer)."""
    model, tokenizer, extras = load_checkpoint(checkpoint)
    texts = extras.get("prompt_texts")  # of a model that was finetuned on instructions
    template = chat_template(texts) if texts else None
    if path.suffix.lower() != ".gguf":
        export_folder(model, tokenizer, template, path)
        say("saved", f"{path}, for AutoModelForCausalLM.from_pretrained({str(path)!r})")
        return model, tokenizer

    modelfile = path.with_suffix(".Modelfile")
    quoted = shlex.quote(str(path))
    check_ours(modelfile)
    export_gguf(model, tokenizer, template, path, quantize)
    say("saved", f"{path}, {path.stat().st_size / 1e6:,.1f} MB. Use it with:")
    if not texts:
        print(f'  llama-completion -m {quoted} -no-cnv -p "Once"')
        return model, tokenizer

    # The same template for Ollama, which repeats it for each turn, the last up to .Response.
    modelfile.write_text(
        f'# {MARK}\nFROM ./{path.name}\nTEMPLATE """{texts["instruction"]}'
        "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}" + texts["output"]
        + '{{ .Response }}<|endoftext|>"""\nPARAMETER stop "<|endoftext|>"\n', encoding="utf-8")
    print(f"  llama-cli -m {quoted}\n  "
          f"ollama create {shlex.quote(path.stem)} -f {shlex.quote(str(modelfile))}")
    return model, tokenizer


def main(argv=None):
    """Get the weights, save them, show that they work; or export. Returns (model, tokenizer)."""
    parser = ArgumentParser(description="OpenAI's GPT-2 weights in, or a checkpoint out.")
    arg = parser.add_argument

    # Weights in.
    arg("--size", choices=list(GPT2_SIZES), default="124M", help="which GPT-2 to fetch")
    arg("--from", dest="source", type=path_type, metavar="PATH", help="a folder or file instead")
    arg("--n-heads", type=positive_int, help="if nothing says it and heads are not 64 wide")
    arg("--tokenizer", type=name_type, help="gpt2, bytes or a rank file; default: the folder's own")
    arg("--out", type=checkpoint_file, help="default: checkpoints/gpt2-SIZE.pt or gpt2-local.pt")
    arg("--prompt", type=name_type, default="Every effort moves you", help="text to continue")
    arg("--max-new-tokens", type=positive_int, default=15, help="by at most this many")

    # A checkpoint out.
    arg("--export", type=path_type, metavar="PATH", help="write --checkpoint to a folder or .gguf")
    arg("--checkpoint", type=path_type, help="to export; default: checkpoints/pretrained.pt")
    arg("--quantize", choices=["q8_0"], help="round matrices to 8 bits in a GGUF file")
    args = parser.parse_args(argv)

    if args.quantize and (args.export is None or args.export.suffix.lower() != ".gguf"):
        parser.error("argument --quantize: it goes with --export NAME.gguf")
    if args.checkpoint and not args.export:
        parser.error("argument --checkpoint: it goes with --export PATH")
    if args.export:
        checkpoint = args.checkpoint or Path("checkpoints", "pretrained.pt")
        return export(args.export, args.quantize, checkpoint)

    # Get them and save them: nothing is saved before model and tokenizer are whole.
    args.out = args.out or Path("checkpoints") / f"gpt2-{'local' if args.source else args.size}.pt"
    args.resume = False
    check_output(args, args.source, endings=())
    source = args.source or download_gpt2(args.size, Path("data") / "gpt2")
    try:
        model = load_local(source, args.n_heads)
        tokenizer = (load_tokenizer(args.tokenizer) if args.tokenizer else
                     find_tokenizer(source, model.cfg["vocab_size"]))
        save_checkpoint(args.out, model, tokenizer)
    except (UserError, OSError):
        raise
    except Exception as e:  # whatever a bad file makes of the lines above
        raise UserError(f"{source} cannot be used ({type(e).__name__}: {e!s:.200}); fetch all its "
                        "files again, or see --tokenizer and --n-heads") from None
    say("saved", f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{model.cfg['n_layers']} blocks, {model.cfg['n_heads']} heads")

    if args.source is None:
        with contextlib.suppress(UserError):  # the weights are what the user came for
            download(VERDICT_URLS, VERDICT, VERDICT_SHA256, timeout=10)
    demonstrate(model, tokenizer, args.prompt, args.max_new_tokens)
    out = shlex.quote(str(args.out))
    print(f"\nNext:\n  python gpt.py --checkpoint {out} --prompt \"Life is\"\n"
          f"  python finetune_classifier.py --init {out}")
    return model, tokenizer


if __name__ == "__main__":
    run_main(main)
