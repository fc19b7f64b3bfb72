"""OpenAI's GPT-2 weights in, instead of pretraining; and any checkpoint out, to other software.

    python load_gpt2.py                       fetch GPT-2 124M (550 MB) -> checkpoints/gpt2-124M.pt
    python load_gpt2.py --size 355M           or 774M, 1558M: better text, slower
    python load_gpt2.py --from some/folder    weights that are already there; no network is used
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt/      transformers
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt.gguf  llama.cpp

GPT-2 is published in two file formats; both are read here with numpy alone: safetensors (Hugging
Face's hub) and OpenAI's original TensorFlow checkpoint. Left out: weights cut into several files,
PyTorch's own .bin files (they are programs: opening one can run code), models that are not GPT-2.

Shapes: C embedding width, T context length, V vocabulary size, as in gpt.py.
"""

import contextlib
import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt import (
    BYTE_OF_LETTER, GPT2_SIZES, GPT2_SPLIT_PATTERN, GPT_CONFIG_124M, VERDICT, VERDICT_SHA256,
    VERDICT_URLS, VOCAB_BPE, ArgumentParser, GPTModel, UserError, check_output, checkpoint_file,
    check_ranks, download, generate, load_checkpoint, make_tokenizer, positive_int,
    read_gpt2_ranks, run_main, save_checkpoint, say, shapes_only, text_to_token_ids,
    token_ids_to_text, write_atomically)

# ---------------------------------------------------------------------------------------------
# Who is who: each array's name in TensorFlow, on the hub, in llama.cpp's GGUF, and in our model.
# The first two store a linear layer's matrix as (in, out), torch stores (out, in); and all three
# keep the query, key and value layers side by side in one matrix c_attn (C, 3 C).

TOP_NAMES = [
    ("wte", "wte.weight", "token_embd.weight", ["tok_emb.weight"]),                    # (V, C)
    ("wpe", "wpe.weight", "position_embd.weight", ["pos_emb.weight"]),                 # (T, C)
    ("ln_f/g", "ln_f.weight", "output_norm.weight", ["final_norm.scale"]),             # (C,)
    ("ln_f/b", "ln_f.bias", "output_norm.bias", ["final_norm.shift"]),                 # (C,)
]
BLOCK_NAMES = [
    ("ln_1/g", "ln_1.weight", "attn_norm.weight", ["norm1.scale"]),                    # (C,)
    ("ln_1/b", "ln_1.bias", "attn_norm.bias", ["norm1.shift"]),                        # (C,)
    ("attn/c_attn/w", "attn.c_attn.weight", "attn_qkv.weight",                         # (C, 3 C)
     ["att.W_query.weight", "att.W_key.weight", "att.W_value.weight"]),
    ("attn/c_attn/b", "attn.c_attn.bias", "attn_qkv.bias",                             # (3 C,)
     ["att.W_query.bias", "att.W_key.bias", "att.W_value.bias"]),
    ("attn/c_proj/w", "attn.c_proj.weight", "attn_output.weight",                      # (C, C)
     ["att.out_proj.weight"]),
    ("attn/c_proj/b", "attn.c_proj.bias", "attn_output.bias", ["att.out_proj.bias"]),  # (C,)
    ("ln_2/g", "ln_2.weight", "ffn_norm.weight", ["norm2.scale"]),                     # (C,)
    ("ln_2/b", "ln_2.bias", "ffn_norm.bias", ["norm2.shift"]),                         # (C,)
    ("mlp/c_fc/w", "mlp.c_fc.weight", "ffn_up.weight", ["ff.layers.0.weight"]),        # (C, 4 C)
    ("mlp/c_fc/b", "mlp.c_fc.bias", "ffn_up.bias", ["ff.layers.0.bias"]),              # (4 C,)
    ("mlp/c_proj/w", "mlp.c_proj.weight", "ffn_down.weight", ["ff.layers.2.weight"]),  # (4 C, C)
    ("mlp/c_proj/b", "mlp.c_proj.bias", "ffn_down.bias", ["ff.layers.2.bias"]),        # (C,)
]


def weight_names(n_layers):
    """Yield (TensorFlow's, the hub's, GGUF's name, [our names]) of every array of a GPT-2."""
    yield from TOP_NAMES
    for i in range(n_layers):
        for tf_name, hub_name, gguf_name, ours in BLOCK_NAMES:
            yield (f"h{i}/{tf_name}", f"h.{i}.{hub_name}", f"blk.{i}.{gguf_name}",
                   [f"trf_blocks.{i}.{name}" for name in ours])


def published_shape(tf_name, ours, weights):
    """The shape of an array as OpenAI and the hub store it, from those of our tensors."""
    shape = list(weights[ours[0]].shape)
    if tf_name.endswith("/w"):
        shape.reverse()
    return [*shape[:-1], shape[-1] * len(ours)]


# ---------------------------------------------------------------------------------------------
# Into the model.

def convert(arrays, n_layers):
    """`arrays(TensorFlow's name)` -> numpy array; returns our state_dict, float32, all copies."""
    weights = {}
    for tf_name, _, _, ours in weight_names(n_layers):
        for name, piece in zip(ours, np.split(arrays(tf_name), len(ours), axis=-1)):
            piece = piece.T if tf_name.endswith("/w") else piece
            weights[name] = torch.from_numpy(np.array(piece, dtype=np.float32, order="C"))
    weights["out_head.weight"] = weights["tok_emb.weight"]  # GPT-2 scores with what it embeds with
    return weights


def tree_path(tf_name):
    """Where the book's tree has an array: "h3/mlp/c_fc/w" -> ["blocks", 3, "mlp", "c_fc", "w"]."""
    first, *parts = tf_name.split("/")
    if first[1:].isdecimal():
        return ["blocks", int(first[1:]), *parts]
    return parts or [first]  # the book keeps the last norm's g and b at the top


def load_weights_into_gpt(gpt, params):
    """Copy the tree `params` of `download_and_load_gpt2` into a `GPTModel`. Book section 5.5.

    `out_head` shares `tok_emb`'s matrix from then on. Raises UserError for a missing array or
    another shape, by name, before anything is copied.
    """
    def lookup(tf_name):
        try:
            node = params
            for part in tree_path(tf_name):
                node = node[part]
            return np.asarray(node)
        except KeyError:
            raise UserError(f"the weights lack {tf_name}") from None

    try:
        weights = convert(lookup, len(params["blocks"]))
        with shapes_only():
            GPTModel(gpt.cfg).load_state_dict(weights, assign=True)
    except (RuntimeError, ValueError) as e:
        raise UserError("these weights do not fit the model (make it with qkv_bias True): "
                        + " ".join(str(e).split())[:300]) from None
    gpt.cfg["tie_embeddings"] = True
    gpt.tie_weights()
    gpt.load_state_dict(weights)


def load_local(path):
    """A safetensors file, or a folder in either format -> a `GPTModel`, ready to use (eval mode).

    Example: model = load_local("data/gpt2/124M")

    One array of the file is looked at after the other, so only the finished model takes memory.
    Raises UserError for anything that is not a complete GPT-2.
    """
    path, cfg, places = read_gpt2(path)
    weights = convert(lambda name: read_array(path, *places[name]), cfg["n_layers"])
    if "lm_head" in places:
        weights["out_head.weight"] = torch.from_numpy(
            np.array(read_array(path, *places["lm_head"]), dtype=np.float32))
    with shapes_only():
        model = GPTModel(cfg)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_array(path, dtype, shape, offset):
    """One array of a file, read when it is looked at; bfloat16 is the upper half of a float32."""
    array = np.memmap(path, "<u2" if dtype == "BF16" else dtype, "r", offset, tuple(shape))
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


# ---------------------------------------------------------------------------------------------
# The two formats. Each reader returns where the arrays lie: {TensorFlow's name: (dtype, shape, byte
# offset)}. Everything is checked before a number is read.

DTYPES = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("BF16", 2)}
LONGEST_HEADER = 1 << 20  # bytes; GPT-2 1558M needs a tenth of it. Bounds what a bad file can cost


def read_safetensors(path):
    """Eight bytes with the length of a header, the header in JSON, then the numbers.

    https://github.com/huggingface/safetensors#format. -> {the hub's name: (dtype, shape, offset)},
    names without the prefix `transformer.`. Raises UserError.
    """
    places, size = {}, path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes, in a file of {size}")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if entry.get("dtype") not in DTYPES:
                continue  # the metadata, or an attention mask in bytes
            dtype, itemsize = DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if not all(type(n) is int and n > 0 for n in entry["shape"]):
                raise ValueError(f"{name} has the shape {entry['shape']}")
            if end - begin != math.prod(entry["shape"]) * itemsize or not (
                    0 <= begin <= end <= size - 8 - length):
                raise ValueError(f"{name} does not lie where the header says")
            places[name.removeprefix("transformer.")] = dtype, entry["shape"], 8 + length + begin
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        reason = e if type(e) is ValueError else f"its header is not as expected: {e!r:.80}"
        raise UserError(f"{path} is not a readable safetensors file ({reason}); fetch it "
                        "again") from None
    return places


def read_tensorflow(path, weights):
    """OpenAI's data file: float32 arrays in the alphabetical order of their names, nothing else.

    model/h0/attn/c_attn/b comes first, h10 comes before h2. So the sizes in hparams.json say where
    each array lies, and the file's own size must be exactly right. `weights` are tensors of the
    shapes that our model has. -> {TensorFlow's name: (dtype, shape, offset)}. Raises UserError.
    """
    places, offset = {}, 0
    n_layers = len({name.split(".")[1] for name in weights if name.startswith("trf_blocks.")})
    for tf_name, _, _, ours in sorted(weight_names(n_layers)):
        shape = published_shape(tf_name, ours, weights)
        places[tf_name] = "<f4", shape, offset
        offset += 4 * math.prod(shape)
    if path.stat().st_size != offset:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, but a model of the sizes in "
                        f"its hparams.json has {offset:,}; fetch it again")
    return places


def read_config(folder, places):
    """The configuration of a model: from config.json (the hub) or hparams.json (OpenAI) in
    `folder`, else from its arrays alone. Raises UserError."""
    path = next((folder / name for name in ("config.json", "hparams.json")
                 if (folder / name).is_file()), None)
    config = {}
    try:
        if path:
            config = json.loads(path.read_text(encoding="utf-8"))
        for key, gpt2 in {"model_type": ["gpt2"], "layer_norm_epsilon": [1e-5],
                          "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                          "scale_attn_weights": [True],
                          "scale_attn_by_inverse_layer_idx": [False]}.items():
            if config.get(key, gpt2[0]) not in gpt2:
                raise ValueError(f"it says {key} {config[key]!r}, but GPT-2 has {gpt2[0]!r}")
        if places:
            V, C = places["wte.weight"][1]
            T = places["wpe.weight"][1][0]
            L = len({name.split(".")[1] for name in places if name.startswith("h.")})
            config = {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_layer": L,
                      "n_head": C // 64, **config}  # no array shows how many heads there are
        cfg = {**GPT_CONFIG_124M, "drop_rate": 0.0, "qkv_bias": True, "tie_embeddings": True,
               "vocab_size": config.get("vocab_size", config.get("n_vocab")),
               "context_length": config.get("n_positions", config.get("n_ctx")),
               "emb_dim": config["n_embd"], "n_heads": config["n_head"],
               "n_layers": config["n_layer"]}
        sizes = [cfg[name] for name in ("vocab_size", "context_length", "emb_dim", "n_heads",
                                        "n_layers")]
        if not all(type(n) is int and 0 < n < 10**6 for n in sizes) or cfg["n_layers"] > 1000:
            raise ValueError(f"its sizes are {sizes}")
        if cfg["emb_dim"] % cfg["n_heads"]:
            raise ValueError(f"{cfg['emb_dim']} numbers per token cannot be shared out among "
                             f"{cfg['n_heads']} heads")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path or folder} does not describe a GPT-2 ({e}); put the config.json or "
                        "hparams.json that belongs to the weights beside them") from None
    return cfg


def read_gpt2(path):
    """A file or folder of either format -> (the file with the numbers, configuration, places).

    Raises UserError.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path} is not there; check the path, or leave out --from to download "
                        "GPT-2")
    if path.is_dir():
        files = [*sorted(path.glob("*.safetensors")), *path.glob("model.ckpt.data*")]
        if not files:
            raise UserError(f"{folder} holds neither format of GPT-2: model.safetensors (the hub), "
                            "or model.ckpt.data-00000-of-00001 with hparams.json (OpenAI)")
        path = folder / "model.safetensors" if folder / "model.safetensors" in files else files[0]
    hub = read_safetensors(path) if path.suffix == ".safetensors" else None
    cfg = read_config(folder, hub)
    with shapes_only():
        weights = GPTModel(cfg).state_dict()
    if hub is None:
        return path, cfg, read_tensorflow(path, weights)

    # The hub's names, checked against the shapes that the model needs.
    places = {}
    for tf_name, hub_name, _, ours in weight_names(cfg["n_layers"]):
        needed = published_shape(tf_name, ours, weights)
        if hub_name not in hub or hub[hub_name][1] != needed:
            found = f"the shape {hub[hub_name][1]}" if hub_name in hub else "no such array"
            raise UserError(f"{path}: {hub_name} should have the shape {needed}, but there is "
                            f"{found}; the weights do not fit their config.json")
        places[tf_name] = hub[hub_name]
    if "lm_head.weight" in hub:  # a head of its own, or a copy of wte
        head, table = read_array(path, *hub["lm_head.weight"]), read_array(path, *hub["wte.weight"])
        if not np.array_equal(head, table):
            places["lm_head"] = hub["lm_head.weight"]
            cfg["tie_embeddings"] = False
    return path, cfg, places


# ---------------------------------------------------------------------------------------------
# Are the weights right? A text that makes sense, and a loss like the book's, show it.

PROMPT = "Every effort moves you"


@torch.no_grad()
def calc_text_loss(model, tokenizer, text):
    """The mean loss on a text, in nats per token, in windows of 256 tokens, as in section 5.1."""
    token_ids = text_to_token_ids(text, tokenizer)[0]
    T = min(256, model.cfg["context_length"], len(token_ids) - 1)
    B = min((len(token_ids) - 1) // T, 32)
    inputs, targets = token_ids[:B * T].view(B, T), token_ids[1:B * T + 1].view(B, T)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()


def demonstrate(model, tokenizer, size, prompt, max_new_tokens):
    """Continue the prompt greedily and measure a loss, each beside what the book shows for 124M."""
    idx = text_to_token_ids(prompt or "<|endoftext|>", tokenizer)
    ids = generate(model, idx, max_new_tokens, model.cfg["context_length"],
                   eos_id=tokenizer.eot_token)
    say(f"\nThe greedy continuation of {prompt!r}:\n\n{token_ids_to_text(ids, tokenizer)}")
    if size == "124M" and prompt == PROMPT:
        say("\n(the book, section 6.4: Every effort moves you forward. / The first step is to "
            "understand\nthe importance of your work)")
    if VERDICT.exists():
        text = VERDICT.read_text(encoding="utf-8")  # its last tenth is the book's validation set
        loss = calc_text_loss(model, tokenizer, text[int(0.9 * len(text)):])
        say(f"\nLoss on the last tenth of {VERDICT}, in nats per token")
        say(f"  this model                    {loss:6.3f}")
        say("  GPT-2 124M in the book         3.560  (solution of exercise 5.5)")
        V = model.cfg["vocab_size"]
        say(f"  a model that knows nothing    {math.log(V):6.3f}  (ln {V:,})")


# =============================================================================================
# The lesson ends here. What follows: downloads and tokenizers, the way out, the command.
# =============================================================================================

HUB_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
TF_URLS = ["https://openaipublic.blob.core.windows.net/gpt-2/models/{}/{}",
           "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{}/{}"]
TF_FILES = ["hparams.json", "model.ckpt.data-00000-of-00001"]


def download_gpt2(model_size, models_dir):
    """The folder `models_dir`/`model_size` with the weights in one of the formats. UserError."""
    if model_size not in GPT2_SIZES:
        raise UserError(f"GPT-2 has no size {model_size!r}; choose one of {', '.join(GPT2_SIZES)}")
    folder = Path(models_dir) / model_size
    tf_files = [folder / name for name in TF_FILES]
    if all(path.exists() for path in tf_files):
        return folder
    try:
        download([HUB_URL.format(HUB_NAMES[model_size])], folder / "model.safetensors")
    except UserError as hub_error:
        try:
            for path in tf_files:
                download([url.format(model_size, path.name) for url in TF_URLS], path)
        except UserError as e:
            raise UserError(f"{hub_error}\nIn OpenAI's format, {e}") from None
    return folder


def download_and_load_gpt2(model_size, models_dir):
    """-> (settings, params): GPT-2's sizes, and its weights as a tree of numpy arrays.

    The arrays look into the file. Looks into `models_dir`/`model_size` before it downloads. Book
    section 5.5. Raises UserError.

    Example:
        settings, params = download_and_load_gpt2("124M", "data/gpt2")
        params["blocks"][0]["attn"]["c_attn"]["w"].shape                         # (768, 2304)
    """
    path, cfg, places = read_gpt2(download_gpt2(model_size, models_dir))
    params = {"blocks": [{} for _ in range(cfg["n_layers"])]}
    for tf_name, _, _, _ in weight_names(cfg["n_layers"]):
        *parts, leaf = tree_path(tf_name)
        node = params
        for part in parts:
            node = node[part] if isinstance(node, list) else node.setdefault(part, {})
        node[leaf] = read_array(path, *places[tf_name])
    settings = {"n_vocab": cfg["vocab_size"], "n_ctx": cfg["context_length"],
                "n_embd": cfg["emb_dim"], "n_head": cfg["n_heads"], "n_layer": cfg["n_layers"]}
    return settings, params


def find_tokenizer(folder, vocab_size):
    """The tokenizer in a folder's tokenizer.json, else GPT-2's. Raises UserError.

    A byte-pair vocabulary lists its merges in the order they were learnt, so for a model with fewer
    tokens its beginning is a vocabulary too.
    """
    path, pattern, name = folder / "tokenizer.json", GPT2_SPLIT_PATTERN, "gpt2"
    if path.is_file():
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            vocab = {**contents["model"]["vocab"]}
            vocab.pop("<|endoftext|>", None)
            tokens = sorted(vocab, key=vocab.get)
            ranks = check_ranks([bytes(map(BYTE_OF_LETTER.__getitem__, token)) for token in tokens],
                                [vocab[token] for token in tokens])
            name = f"bpe-{len(ranks) + 1}"
            with contextlib.suppress(KeyError, TypeError):  # GPT-2's own file names no pattern
                pattern = contents["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not a byte-level vocabulary ({e!r:.80}); move it away to "
                            "use GPT-2's") from None
    elif vocab_size < 257:
        raise UserError(f"the model has {vocab_size} tokens, but the 256 bytes and <|endoftext|> "
                        "need 257; it can be used in Python: load_gpt2.load_local(path)")
    else:
        ranks = {token: rank for token, rank in read_gpt2_ranks().items() if rank < vocab_size - 1}
        name = "gpt2" if len(ranks) == 50256 else f"gpt2-{vocab_size}"
    return make_tokenizer(name, ranks, pattern)


# ---------------------------------------------------------------------------------------------
# Out to other software: the table of names read the other way.

LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def published_arrays(model, column):
    """Yield (name, array) in a column of the table, one array at a time to spare memory.

    On the hub (column 1) matrices are (in, out), in GGUF (column 2) they stay (out, in).
    """
    weights, no_bias = model.state_dict(), torch.zeros(model.cfg["emb_dim"])
    for names in weight_names(model.cfg["n_layers"]):
        array = np.concatenate([weights.get(name, no_bias).numpy() for name in names[3]])
        turn = column == 1 and names[0].endswith("/w")
        yield names[column], np.ascontiguousarray(array.T) if turn else array
    if not model.cfg.get("tie_embeddings"):
        yield ["lm_head.weight", "output.weight"][column - 1], weights["out_head.weight"].numpy()


def find_merges(tokenizer):
    """The pairs of tokens, as visible letters, that merge into each token, in the order of ranks.

    A rank says which token comes first, not from which two it was made: every split into two tokens
    is a merge.
    """
    if tokenizer.name == "gpt2":
        lines = VOCAB_BPE.read_text(encoding="utf-8").strip().split("\n")[1:]
        return [tuple(line.split(" ")) for line in lines]
    ranks, merges = tokenizer._mergeable_ranks, []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(to_letters(a), to_letters(b)) for _, _, a, b in sorted(pairs)]
    return merges


def to_letters(token):
    """Bytes -> the visible letters that stand for them in GPT-2's files."""
    return "".join(LETTER_OF_BYTE[byte] for byte in token)


def chat_template(extras):
    """The Jinja template of a finetuned model's prompt, or None."""
    texts = extras.get("prompt_texts")
    return texts and ("{% for message in messages %}{% if message['role'] == 'assistant' %}"
                      "{{ message['content'] + '<|endoftext|>' }}{% else %}{{ "
                      + json.dumps(texts["instruction"]) + " + message['content'] + "
                      + json.dumps(texts["output"]) + " }}{% endif %}{% endfor %}")


def tokenizer_json(tokenizer):
    """A tokenizer as the library Hugging Face tokenizers reads it."""
    end, ranks = tokenizer.eot_token, tokenizer._mergeable_ranks
    vocab = {to_letters(token): rank for token, rank in ranks.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str}, "behavior": "Isolated",
             "invert": False}
    special = {"id": end, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": True,  # as tiktoken: a whole chunk first
                      "vocab": {**vocab, "<|endoftext|>": end},
                      "merges": [list(pair) for pair in find_merges(tokenizer)]}}


def write_safetensors(model, path):
    """The model's arrays by the hub's names, in the layout that `read_safetensors` reads."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in published_arrays(model, column=1):
        name = name if name == "lm_head.weight" else f"transformer.{name}"
        header[name] = {"dtype": "F32", "shape": array.shape,
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in published_arrays(model, column=1):
            file.write(array)


def export_folder(model, tokenizer, extras, folder):
    """Write what transformers' `from_pretrained(folder)` opens, all or nothing."""
    end, cfg, text = tokenizer.eot_token, model.cfg, "<|endoftext|>"
    files = {
        "config.json": {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "vocab_size": cfg["vocab_size"], "n_positions": cfg["context_length"],
            "n_ctx": cfg["context_length"], "n_embd": cfg["emb_dim"], "n_layer": cfg["n_layers"],
            "n_head": cfg["n_heads"], "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": bool(cfg.get("tie_embeddings")),
            "bos_token_id": end, "eos_token_id": end, "dtype": "float32"},
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text, "eos_token": text,
            "clean_up_tokenization_spaces": False, "model_max_length": cfg["context_length"],
            "chat_template": chat_template(extras)},
        "tokenizer.json": tokenizer_json(tokenizer),
    }
    folder = folder.resolve()
    there = {path.name for path in folder.glob("[!.]*")} if folder.exists() else set()
    if not there <= {"model.safetensors", *files}:
        raise UserError(f"{folder} holds something else; choose another place with --export")

    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        for name, contents in files.items():
            (part / name).write_text(json.dumps(contents, indent=1, ensure_ascii=False),
                                     encoding="utf-8")
        write_safetensors(model, part / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# GGUF, the format of llama.cpp: a header, keys with values, a list of tensors, then their numbers.
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

def gguf_value(value):
    """A value with its type in front, as GGUF's keys have it."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value[0], int):  # llama.cpp wants the types of tokens signed
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    kind = gguf_value(value[0])[:4]  # a list: the type of its items, how many, the items
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(
        gguf_value(item)[4:] for item in value)


def gguf_string(text):
    """A text with its length in front."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def quantize_q8_0(array):
    """Float32 (rows, n) -> blocks of 32 numbers: a float16 scale and 32 int8, as bytes."""
    blocks = array.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    numbers = np.round(blocks / np.maximum(scales.astype("f4"), 1e-12)).clip(-127, 127)
    return np.concatenate([scales.view(np.int8), numbers.astype(np.int8)], axis=1)


def dequantize_q8_0(blocks, shape):
    """The way back, to see what rounding has cost."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return (blocks[:, 2:] * scales).reshape(shape)


def gguf_array(name, array, quantize):
    """-> (type number, the array as it is stored): matrices can be rounded, all else stays."""
    rounded = quantize and array.ndim == 2 and array.shape[1] % 32 == 0 and "pos" not in name
    return (8, quantize_q8_0(array)) if rounded else (0, array)


def export_gguf(model, tokenizer, extras, path, quantize):
    """Write a GGUF file, all or nothing. Raises UserError."""
    cfg, ranks = model.cfg, tokenizer._mergeable_ranks
    if tokenizer._pat_str != GPT2_SPLIT_PATTERN:
        raise UserError("this checkpoint's tokenizer does not split text as GPT-2's does, which "
                        "GGUF cannot say; export it as a folder")
    if path.exists() and open(path, "rb").read(4) != b"GGUF":
        raise UserError(f"{path} is there and is no GGUF file; choose another name")
    tokens = [to_letters(token) for token in ranks] + ["<|endoftext|>"]
    tokens += [f"<|unused_{i}|>" for i in range(len(tokens), cfg["vocab_size"])]
    merges = [" ".join(pair) for pair in find_merges(tokenizer)]
    keys = {
        "general.architecture": "gpt2", "general.name": path.stem,
        "gpt2.block_count": cfg["n_layers"], "gpt2.context_length": cfg["context_length"],
        "gpt2.embedding_length": cfg["emb_dim"], "gpt2.feed_forward_length": 4 * cfg["emb_dim"],
        "gpt2.attention.head_count": cfg["n_heads"],
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type":  # text, the special token, unused
            [1] * len(ranks) + [3] + [5] * (len(tokens) - len(ranks) - 1),
        "tokenizer.ggml.merges": merges or ["ÿ ÿ"],  # one at least; this pair is never in UTF-8
        "tokenizer.ggml.bos_token_id": len(ranks), "tokenizer.ggml.eos_token_id": len(ranks),
        "tokenizer.ggml.add_bos_token": False,
    }
    if chat_template(extras):
        keys["tokenizer.chat_template"] = chat_template(extras)

    # The header says where each array begins: at a multiple of 32 bytes.
    head, infos, offset, count = b"", b"", 0, 0
    for key, value in keys.items():
        head += gguf_string(key) + gguf_value(value)
    for name, array in published_arrays(model, column=2):
        kind, stored = gguf_array(name, array, quantize)
        infos += gguf_string(name) + struct.pack(f"<I{array.ndim}QIQ", array.ndim,
                                                 *array.shape[::-1], kind, offset)
        offset += stored.nbytes + -stored.nbytes % 32
        count += 1
    head = struct.pack("<4sIQQ", b"GGUF", 3, count, len(keys)) + head + infos
    with write_atomically(path) as part, open(part, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        for name, array in published_arrays(model, column=2):
            _, stored = gguf_array(name, array, quantize)
            file.write(np.ascontiguousarray(stored))
            file.write(b"\0" * (-stored.nbytes % 32))


def say_what_rounding_costs(model, tokenizer, path):
    """Print size and loss before and after, on The Verdict or, without it, this script's text."""
    source = VERDICT if VERDICT.exists() else Path(__file__)
    text = source.read_text(encoding="utf-8")
    losses, size = [calc_text_loss(model, tokenizer, text)], 0
    for name, p in model.named_parameters():
        kind, blocks = gguf_array(name, p.detach().numpy(), True)
        size += 4 * p.numel()
        if kind == 8:  # what the file's reader makes of it
            scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
            p.data = torch.from_numpy(blocks[:, 2:] * scales).view(p.shape)
    model.tie_weights()
    losses.append(calc_text_loss(model, tokenizer, text))
    say(f"size     {size / 1e6:,.1f} MB in float32, {path.stat().st_size / 1e6:,.1f} MB in q8_0")
    say(f"loss     {losses[0]:.4f} in float32, {losses[1]:.4f} in q8_0, on {source.name}")


def export(args):
    """--export: a folder for transformers, or with a name that ends in .gguf, for llama.cpp."""
    model, tokenizer, extras = load_checkpoint(args.checkpoint)
    path, texts = args.export, extras.get("prompt_texts")
    if path.suffix.lower() != ".gguf":
        export_folder(model, tokenizer, extras, path)
        say(f"saved    {path}. Use it with:\n"
            "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"  model = AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
            f"  tokenizer = AutoTokenizer.from_pretrained({str(path)!r})")
        return

    export_gguf(model, tokenizer, extras, path, args.quantize)
    if args.quantize:
        say_what_rounding_costs(model, tokenizer, path)
    say(f"saved    {path}. Use it with:\n  llama-completion -m {path} -no-cnv -p \"Once\"")
    if texts:  # a finetuned model: Ollama learns its prompt from a file
        modelfile = path.with_suffix(".Modelfile")
        with write_atomically(modelfile) as part:
            template = texts["instruction"] + "{{ .Prompt }}" + texts["output"] + "{{ .Response }}"
            part.write_text(f'FROM ./{path.name}\nTEMPLATE """{template}"""\n'
                            'PARAMETER stop "<|endoftext|>"\n', encoding="utf-8")
        say(f"  ollama create {path.stem} -f {modelfile}")


def main(argv=None):
    """Get the weights, save them as a checkpoint, show that they work; or export a checkpoint."""
    parser = ArgumentParser(description="OpenAI's GPT-2 weights as a checkpoint of this project; "
                            "or a checkpoint for other software.")
    arg = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=list(GPT2_SIZES), default="124M", help="which GPT-2")
    which.add_argument("--from", dest="source", type=Path, metavar="PATH", help="weights that are "
                       "there: a .safetensors file, or a folder with one or with OpenAI's files")
    arg("--out", type=checkpoint_file, help="checkpoint to write (default: "
        "checkpoints/gpt2-SIZE.pt, or gpt2-local.pt with --from)")
    arg("--prompt", default=PROMPT, help="text to continue")
    arg("--max-new-tokens", type=positive_int, default=15, help="at most this many")
    arg("--export", type=Path, metavar="PATH", help="write --checkpoint for other software: a "
        "folder for transformers, or a file that ends in .gguf for llama.cpp and Ollama")
    arg("--checkpoint", type=Path, default=Path("checkpoints/pretrained.pt"), help="what --export "
        "writes")
    arg("--quantize", choices=["q8_0"], help="round matrices to 8 bits in a GGUF file")
    args = parser.parse_args(argv)
    if args.quantize and (args.export is None or args.export.suffix.lower() != ".gguf"):
        parser.error("argument --quantize: it goes with --export NAME.gguf")
    if args.export:
        return export(args)

    args.out = args.out or Path("checkpoints") / f"gpt2-{'local' if args.source else args.size}.pt"
    args.resume = False
    check_output(args, args.source, endings=())
    source = args.source or download_gpt2(args.size, Path("data") / "gpt2")
    model = load_local(source)
    size = next((s for s, cfg in GPT2_SIZES.items() if cfg.items() <= model.cfg.items()), None)
    folder = source if source.is_dir() else source.parent
    tokenizer = find_tokenizer(folder, model.cfg["vocab_size"])
    save_checkpoint(args.out, model, tokenizer)
    say(f"GPT-2{' ' + size if size else ''} from {source}\n  "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.cfg['n_layers']} "
        f"blocks, {model.cfg['n_heads']} heads, context {model.cfg['context_length']}\n"
        f"  saved as {args.out} ({args.out.stat().st_size / 1e6:,.0f} MB)")
    if args.source is None:
        with contextlib.suppress(UserError):  # the weights are what the user came for
            download(VERDICT_URLS, VERDICT, VERDICT_SHA256, timeout=10)
    demonstrate(model, tokenizer, size, args.prompt, args.max_new_tokens)
    say(f"\nNext: python gpt.py --checkpoint {args.out} --prompt \"The meaning of life is\"\n"
        f"or    python finetune_classifier.py --init {args.out}")


if __name__ == "__main__":
    run_main(main)
