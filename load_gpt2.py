"""Load OpenAI's GPT-2 weights instead of pretraining, or export a checkpoint to other software.

    python load_gpt2.py                       fetch GPT-2 124M (550 MB) -> checkpoints/gpt2-124M.pt
    python load_gpt2.py --size 355M           or 774M, 1558M: better text, slower
    python load_gpt2.py --from some/folder    weights that are already there; no network is used
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt/      transformers
    python load_gpt2.py --checkpoint checkpoints/pretrained.pt --export my-gpt.gguf  llama.cpp

Two formats are read, with numpy alone: safetensors (Hugging Face's hub) and OpenAI's original
TensorFlow checkpoint. Left out: weights cut into several files, and PyTorch's .bin files (they are
programs: opening one can run code). Shapes: C embedding width, T context length, V vocabulary size.
"""

import contextlib
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt import (
    BYTE_OF_LETTER, GPT2_SIZES, GPT2_SPLIT_PATTERN, GPT_CONFIG_124M, VERDICT, VERDICT_SHA256,
    VERDICT_URLS, ArgumentParser, GPTModel, UserError, check_output, checkpoint_file, check_ranks,
    download, generate, load_checkpoint, make_tokenizer, positive_int, read_gpt2_ranks, run_main,
    save_checkpoint, say, shapes_only, text_to_token_ids, token_ids_to_text, write_atomically)

# ---------------------------------------------------------------------------------------------
# Who is who: each array's name in TensorFlow, on the hub, in llama.cpp's GGUF, and in our model.
# In TensorFlow's names w is a matrix, b a bias or shift, g a scale. A linear layer's matrix is
# (in, out) in the first two, as in the shapes below, and (out, in) in the last two. All but our
# model join query, key and value in one matrix. OpenAI's models are tied: they embed and score with
# the same matrix, wte. An untied model also has an output layer.

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
    ("attn/c_proj/w", "attn.c_proj.weight", "attn_output.weight", ["att.out_proj.weight"]),
    ("attn/c_proj/b", "attn.c_proj.bias", "attn_output.bias", ["att.out_proj.bias"]),  # (C,)
    ("ln_2/g", "ln_2.weight", "ffn_norm.weight", ["norm2.scale"]),                     # (C,)
    ("ln_2/b", "ln_2.bias", "ffn_norm.bias", ["norm2.shift"]),                         # (C,)
    ("mlp/c_fc/w", "mlp.c_fc.weight", "ffn_up.weight", ["ff.layers.0.weight"]),        # (C, 4 C)
    ("mlp/c_fc/b", "mlp.c_fc.bias", "ffn_up.bias", ["ff.layers.0.bias"]),              # (4 C,)
    ("mlp/c_proj/w", "mlp.c_proj.weight", "ffn_down.weight", ["ff.layers.2.weight"]),  # (4 C, C)
    ("mlp/c_proj/b", "mlp.c_proj.bias", "ffn_down.bias", ["ff.layers.2.bias"]),        # (C,)
]
HEAD_NAMES = ("lm_head", "lm_head.weight", "output.weight", ["out_head.weight"])       # (V, C)


def weight_names(n_layers, tied=True):
    """Yield (TensorFlow's, the hub's, GGUF's name, [our names]) of every array of a GPT-2."""
    yield from TOP_NAMES if tied else [*TOP_NAMES, HEAD_NAMES]
    for i in range(n_layers):
        for tf_name, hub_name, gguf_name, ours in BLOCK_NAMES:
            yield (f"h{i}/{tf_name}", f"h.{i}.{hub_name}", f"blk.{i}.{gguf_name}",
                   [f"trf_blocks.{i}.{name}" for name in ours])


# ---------------------------------------------------------------------------------------------
# Into the model.

def make_model(cfg, n_layers, array):
    """A `GPTModel` with float32 copies of what `array(TensorFlow's name)` returns. UserError."""
    weights = {}
    try:
        for tf_name, _, _, ours in weight_names(n_layers, cfg["tie_embeddings"]):
            for name, piece in zip(ours, np.split(array(tf_name), len(ours), axis=-1)):
                piece = piece.T if tf_name.endswith("/w") else piece
                weights[name] = torch.from_numpy(np.array(piece, dtype=np.float32, order="C"))
        weights.setdefault("out_head.weight", weights["tok_emb.weight"])

        with shapes_only():  # no memory yet: assign=True puts our tensors in
            model = GPTModel(cfg)
        model.load_state_dict(weights, assign=True)
        return model
    except KeyError:
        raise UserError(f"the weights lack {tf_name}") from None
    except (RuntimeError, ValueError) as e:
        raise UserError(f"the weights do not fit (it takes qkv_bias True): {e!s:.300}") from None


def load_local(path):
    """A safetensors file, or a folder in either format -> a `GPTModel`, ready to use (eval mode).

    Raises UserError for anything else. Example: model = load_local("data/gpt2/124M")
    """
    path, cfg, places = read_gpt2(path)
    # places: {TensorFlow's name: (dtype, shape, offset in the file)}. np.memmap reads from disk on
    # use; a new one for each array leaves only the finished model in memory.
    return make_model(cfg, cfg["n_layers"], lambda tf_name: read_array(
        np.memmap(path, np.uint8, "r"), *places[tf_name])).eval()


def load_weights_into_gpt(gpt, params):
    """Copy the tree `params` of `download_and_load_gpt2` into a `GPTModel`. Book section 5.5.

    `out_head` shares `tok_emb`'s matrix from then on. Raises UserError before anything is copied.
    """
    cfg = {**gpt.cfg, "tie_embeddings": True}
    model = make_model(cfg, len(params["blocks"]),
                       lambda tf_name: branch(params, tf_name)[tf_name.split("/")[-1]])
    gpt.cfg = cfg
    gpt.tie_weights()
    gpt.load_state_dict(model.state_dict())


def branch(params, tf_name):
    """The dictionary in the book's tree that holds an array.

    Example: for "h3/mlp/c_fc/w" it is params["blocks"][3]["mlp"]["c_fc"], for "ln_f/g" params
    """
    *parts, _ = tf_name.removeprefix("ln_f/").split("/")
    node = params["blocks"][int(parts[0][1:])] if parts else params
    for part in parts[1:]:
        node = node.setdefault(part, {})
    return node


# ---------------------------------------------------------------------------------------------
# The two formats. Each reader checks where the arrays lie, before it reads any weights, and returns
# {name: (dtype, shape, offset in bytes)}. `read_gpt2` turns their exceptions into a UserError.

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16: `read_array` converts it
LONGEST_HEADER = 1 << 20  # bytes, so that a bad file costs little; GPT-2 1558M needs a tenth of it


def read_safetensors(path):
    """Eight bytes with the length of a header, the header in JSON, then the numbers.

    https://github.com/huggingface/safetensors#format; the hub's names, without `transformer.`.
    """
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > min(LONGEST_HEADER, len(data)):
        raise ValueError(f"a header of {start - 8} bytes, in a file of {len(data)}")
    places = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if entry.get("dtype") not in DTYPES:
            continue  # the metadata, or attention masks in bytes

        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not (all(type(n) is int and n > 0 for n in shape) and type(begin) is type(end) is int
                and end - begin == num_bytes and 0 <= begin <= end <= len(data) - start):
            raise ValueError(f"{name} has the shape {shape} and does not lie where the header says")
        places[name.removeprefix("transformer.")] = dtype, shape, start + begin
    return places


def read_tensorflow(path, cfg):
    """OpenAI's data file: float32 arrays in the alphabetical order of their names, nothing else.

    h0/attn/c_attn/b comes first, h10 before h2. So the sizes in hparams.json say where each array
    lies, and the file's own size must be exactly right.
    """
    with shapes_only():
        weights = GPTModel(cfg).state_dict()
    places, offset = {}, 0
    for tf_name, _, _, ours in sorted(weight_names(cfg["n_layers"])):
        t = weights[ours[0]]
        shape = list(t.T.shape if tf_name.endswith("/w") else t.shape)
        shape[-1] *= len(ours)
        places[tf_name] = "<f4", shape, offset
        offset += 4 * math.prod(shape)
    if path.stat().st_size != offset:
        raise ValueError(f"not the {offset:,} bytes of a model with the sizes in hparams.json")
    return places


def read_array(data, dtype, shape, offset):
    """One array of a file, `data` being its np.memmap: numbers are read when they are used."""
    array = np.ndarray(shape, dtype, data, offset)
    # A bfloat16, which numpy does not have, is the upper half of a float32.
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "<u2" else array


# The settings that are allowed (with others a model would load without an error and write
# nonsense); then our names of the sizes, with OpenAI's.
ALLOWED = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
           "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
           "scale_attn_by_inverse_layer_idx": [False]}
SIZES = {"vocab_size": "n_vocab", "context_length": "n_ctx", "emb_dim": "n_embd",
         "n_heads": "n_head", "n_layers": "n_layer"}


def read_config(path, hub):
    """The configuration of the weights in `path`; `hub` is what `read_safetensors` found, or None.

    OpenAI's hparams.json has every size. The hub's arrays show all but the number of heads: it is
    in config.json, else heads are 64 wide as in OpenAI's models.
    """
    path = path.with_name("hparams.json" if hub is None else "config.json")
    config = {}
    if hub is None or path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
    for key, values in ALLOWED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{path.name} says {key} {config[key]!r}, GPT-2 has {values[0]!r}")
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in (hub or {}))

    if hub is not None:
        V, C = hub["wte.weight"][1]
        T, _ = hub["wpe.weight"][1]
        L = len({name.split(".")[1] for name in hub if name.startswith("h.")})
        heads = C // 64 if C % 64 == 0 else 0
        config = {"n_head": heads, **config, "n_layer": L, "n_vocab": V, "n_ctx": T, "n_embd": C}
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    whole = all(type(n) is int and 0 < n < 10**6 for n in sizes.values())
    if not whole or sizes["n_layers"] > 1000 or sizes["emb_dim"] % sizes["n_heads"]:
        raise ValueError(f"sizes must be whole, emb_dim a multiple of n_heads, not {sizes}")
    return {**GPT_CONFIG_124M, "drop_rate": 0.0, "qkv_bias": True, "tie_embeddings": tied, **sizes}


def read_gpt2(path):
    """A file or folder -> (the file with the numbers, configuration, places). Raises UserError."""
    path = Path(path)
    kinds = ("model.safetensors", "*.safetensors", "model.ckpt.data*")
    files = [path] if path.is_file() else [f for kind in kinds for f in sorted(path.glob(kind))]
    if not files:
        raise UserError(f"{path} holds neither format of GPT-2: model.safetensors (the hub), or "
                        "model.ckpt.data-00000-of-00001 with hparams.json (OpenAI)")

    path = files[0]
    try:
        hub = read_safetensors(path) if path.suffix == ".safetensors" else None
        cfg = read_config(path, hub)
        if hub is None:
            return path, cfg, read_tensorflow(path, cfg)
        names = weight_names(cfg["n_layers"], cfg["tie_embeddings"])
        return path, cfg, {tf_name: hub[hub_name] for tf_name, hub_name, _, _ in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{path} is not a complete GPT-2 ({reason}); fetch it again, and the .json "
                        "file that belongs to it") from None


# ---------------------------------------------------------------------------------------------
# Are the weights right? A text that makes sense, and a loss like the book's, show it.

PROMPT = "Every effort moves you"


@torch.no_grad()
def calc_text_loss(model, tokenizer, text):
    """The mean loss in nats per token on a text's first 32 windows of 256 tokens. Section 5.1."""
    token_ids = text_to_token_ids(text, tokenizer)[0]
    T = min(256, model.cfg["context_length"], len(token_ids) - 1)
    B = min((len(token_ids) - 1) // T, 32)
    inputs, targets = token_ids[:B * T].view(B, T), token_ids[1:B * T + 1].view(B, T)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()


def demonstrate(model, tokenizer, prompt, max_new_tokens):
    """Continue the prompt greedily and measure a loss, each beside what the book shows for 124M."""
    T, V = model.cfg["context_length"], model.cfg["vocab_size"]
    idx = text_to_token_ids(prompt or "<|endoftext|>", tokenizer)
    ids = generate(model, idx, max_new_tokens, T, eos_id=tokenizer.eot_token)
    say(f"\nThe greedy continuation of {prompt!r}:\n\n{token_ids_to_text(ids, tokenizer)}")
    if prompt == PROMPT:
        say("\n(GPT-2 124M in the book, section 6.4: Every effort moves you forward. / The first "
            "step is to\nunderstand the importance of your work)")
    if VERDICT.exists():
        text = VERDICT.read_text(encoding="utf-8")  # its last tenth is the book's validation set
        loss = calc_text_loss(model, tokenizer, text[int(0.9 * len(text)):])
        say(f"\nLoss on the last tenth of {VERDICT}: {loss:.3f} nats per token\n(GPT-2 124M in the "
            f"book, exercise 5.5: 3.560; a model that knows nothing, ln {V:,}: {math.log(V):.3f})")


# =============================================================================================
# The lesson ends here. What follows: downloads and tokenizers, the way out, the command.
# =============================================================================================

HUB_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
TF_URLS = ["https://openaipublic.blob.core.windows.net/gpt-2/models/{}/{}",
           "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{}/{}"]


def download_gpt2(model_size, models_dir):
    """The folder `models_dir`/`model_size` with the weights in one of the formats. UserError."""
    if model_size not in GPT2_SIZES:
        raise UserError(f"GPT-2 has no size {model_size!r}; choose one of {', '.join(GPT2_SIZES)}")
    folder = Path(models_dir) / model_size
    tf_files = [folder / "hparams.json", folder / "model.ckpt.data-00000-of-00001"]
    if all(path.exists() for path in tf_files):
        return folder

    try:
        download([HUB_URL.format(HUB_NAMES[model_size])], folder / "model.safetensors")
    except UserError as e:
        say(f"{e}\nNow OpenAI's own format:")
        for path in tf_files:
            download([url.format(model_size, path.name) for url in TF_URLS], path)
    return folder


def download_and_load_gpt2(model_size, models_dir):
    """-> (settings, params): GPT-2's sizes, and its weights as a tree of arrays. Book section 5.5.

    Looks into `models_dir`/`model_size` before it downloads. Raises UserError. Example:
        settings, params = download_and_load_gpt2("124M", "data/gpt2")
        params["blocks"][0]["attn"]["c_attn"]["w"].shape                         # (768, 2304)
    """
    path, cfg, places = read_gpt2(download_gpt2(model_size, models_dir))
    data = np.memmap(path, np.uint8, "r")
    params = {"blocks": [{} for _ in range(cfg["n_layers"])]}
    for tf_name, place in places.items():
        branch(params, tf_name)[tf_name.split("/")[-1]] = read_array(data, *place)
    return {theirs: cfg[ours] for ours, theirs in SIZES.items()}, params


def find_tokenizer(folder, vocab_size):
    """The tokenizer in a folder's tokenizer.json, else GPT-2's. Raises UserError.

    Byte-pair tokens are in the order they were learned, so a smaller model takes the first ones.
    """
    path = folder / "tokenizer.json"
    try:
        if not path.is_file():
            tokens = [token for token, rank in read_gpt2_ranks().items() if rank < vocab_size - 1]
            name = "gpt2" if len(tokens) == 50256 else f"bpe-{len(tokens) + 1}"
            return make_tokenizer(name, check_ranks(tokens, range(len(tokens))))

        contents = json.loads(path.read_text(encoding="utf-8"))
        vocab = sorted(contents["model"]["vocab"].items(), key=lambda item: item[1])
        pairs = [(bytes(BYTE_OF_LETTER[letter] for letter in token), rank)
                 for token, rank in vocab if token != "<|endoftext|>"]
        ranks = check_ranks(*zip(*pairs))
        steps = contents["pre_tokenizer"].get("pretokenizers")  # GPT-2's own file names no pattern
        pattern = steps[0]["pattern"]["Regex"] if steps else GPT2_SPLIT_PATTERN
        return make_tokenizer(f"bpe-{len(ranks) + 1}", ranks, pattern)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"no tokenizer for {vocab_size} tokens ({e!r:.80}); put a byte-level "
                        f"tokenizer.json into {folder}") from None


# ---------------------------------------------------------------------------------------------
# Out to other software: the table of names read the other way.

LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def published_arrays(model, column):
    """Yield (name, array) in a column of the table, 1 the hub's or 2 GGUF's, one at a time to spare
    memory. GGUF keeps torch's (out, in)."""
    weights = model.state_dict()
    no_bias = torch.zeros(model.cfg["emb_dim"])  # every layer of GPT-2 has one
    for names in weight_names(model.cfg["n_layers"], model.cfg.get("tie_embeddings")):
        array = np.concatenate([weights.get(name, no_bias).numpy() for name in names[3]])
        if column == 1 and names[0].endswith("/w"):
            array = np.ascontiguousarray(array.T)
        yield names[column], array


def vocabulary(tokenizer):
    """(tokens, pairs that merge), with a visible letter for each byte, as in GPT-2's files.

    A rank does not say of which two tokens a token was made: every split into two is a merge.
    """
    ranks = tokenizer._mergeable_ranks
    tokens = ["".join(LETTER_OF_BYTE[byte] for byte in token)
              for token in sorted(ranks, key=ranks.get)]
    known = set(tokens)
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    return [*tokens, "<|endoftext|>"], [pair for pair in splits if known.issuperset(pair)]


def tokenizer_json(tokenizer):
    """A tokenizer as the library Hugging Face tokenizers reads it."""
    tokens, merges = vocabulary(tokenizer)
    split = dict(type="Split", pattern={"Regex": tokenizer._pat_str}, behavior="Isolated",
                 invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special = dict(id=tokenizer.eot_token, content="<|endoftext|>", special=True, normalized=False,
                   single_word=False, lstrip=False, rstrip=False)
    return dict(version="1.0", added_tokens=[special], normalizer=None, post_processor=None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
                decoder=byte_level,
                model=dict(type="BPE", ignore_merges=True,  # as tiktoken: a whole chunk first
                           vocab={token: i for i, token in enumerate(tokens)}, merges=merges))


def write_safetensors(model, path):
    """The model's arrays by the hub's names, in the layout that `read_safetensors` reads."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in published_arrays(model, column=1):
        name = name if name == "lm_head.weight" else f"transformer.{name}"
        end = offset + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in published_arrays(model, column=1):
            file.write(array)


def export_folder(model, tokenizer, template, folder):
    """Write what transformers' `from_pretrained(folder)` opens, all or nothing. UserError."""
    cfg, text = model.cfg, "<|endoftext|>"
    end = dict(bos_token_id=tokenizer.eot_token, eos_token_id=tokenizer.eot_token)
    files = {
        "config.json": dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32", **end,
            vocab_size=cfg["vocab_size"], n_positions=cfg["context_length"], n_embd=cfg["emb_dim"],
            n_layer=cfg["n_layers"], n_head=cfg["n_heads"], activation_function="gelu_new",
            layer_norm_epsilon=1e-5, tie_word_embeddings=bool(cfg.get("tie_embeddings"))),
        "generation_config.json": dict(pad_token_id=tokenizer.eot_token, **end),
        # The tokenizer.
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=text, eos_token=text,
            model_max_length=cfg["context_length"], clean_up_tokenization_spaces=False,
            chat_template=template),
        "tokenizer.json": tokenizer_json(tokenizer)}

    folder = folder.resolve()
    if not {path.name for path in folder.glob("*")} <= {"model.safetensors", *files}:
        raise UserError(f"{folder} holds something else; choose another place with --export")

    # Written beside it, then put in its place.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary, folder.name)
        part.mkdir()
        for name, contents in files.items():
            contents = json.dumps(contents, indent=1, ensure_ascii=False)
            (part / name).write_text(contents, encoding="utf-8")
        write_safetensors(model, part / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)


# GGUF, the format of llama.cpp: a header, keys with values, a list of tensors, then their numbers.
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

def gguf_string(text):
    """A text with its length in front."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """A value with the number of its type in front, as GGUF's keys have it."""
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value[0], int):  # a list; llama.cpp wants the types of tokens signed
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))


def gguf_keys(cfg, tokenizer, template):
    """What a GGUF file says of a model and its tokenizer: {key: value}."""
    end = tokenizer.eot_token
    tokens, merges = vocabulary(tokenizer)
    unused = [f"<|unused_{i}|>" for i in range(len(tokens), cfg["vocab_size"])]
    return {
        "general.architecture": "gpt2", "gpt2.block_count": cfg["n_layers"],
        "gpt2.context_length": cfg["context_length"], "gpt2.embedding_length": cfg["emb_dim"],
        "gpt2.feed_forward_length": 4 * cfg["emb_dim"],
        "gpt2.attention.head_count": cfg["n_heads"], "gpt2.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [1] * end + [3] + [5] * len(unused),  # text, special, unused
        # One pair at least is needed: this one is never in UTF-8.
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges] or ["ÿ ÿ"],
        **({"tokenizer.chat_template": template} if template else {})}


def gguf_array(name, array, quantize):
    """-> (GGUF's number of the type, the array as stored). `quantize` rounds matrices, but not the
    positions, to q8_0: each 32 numbers of a row become a float16 scale and 32 int8."""
    if not quantize or array.ndim == 1 or array.shape[1] % 32 or "pos" in name:
        return 0, array
    blocks = array.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f2")
    numbers = np.round(blocks / np.maximum(scales.astype("f4"), 1e-12)).clip(-127, 127)
    return 8, np.concatenate([scales.view(np.int8), numbers.astype(np.int8)], axis=1)


def export_gguf(model, tokenizer, template, path, quantize):
    """Write a GGUF file, all or nothing. Raises UserError."""
    if tokenizer._pat_str != GPT2_SPLIT_PATTERN:
        raise UserError("GGUF cannot say how this tokenizer splits text; export it as a folder")
    if path.exists() and not path.read_bytes().startswith(b"GGUF"):
        raise UserError(f"{path} is there and is no GGUF file; choose another name")

    # The header says where each array begins: at a multiple of 32 bytes.
    keys = {"general.name": path.stem, **gguf_keys(model.cfg, tokenizer, template)}
    parts = [gguf_string(key) + gguf_value(value) for key, value in keys.items()]
    offset = 0
    for name, array in published_arrays(model, column=2):
        kind, stored = gguf_array(name, array, quantize)
        parts.append(gguf_string(name) + struct.pack(
            f"<I{array.ndim}QIQ", array.ndim, *array.shape[::-1], kind, offset))
        offset += stored.nbytes + -stored.nbytes % 32
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(parts) - len(keys), len(keys)) + b"".join(parts)

    with write_atomically(path) as part, open(part, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        for name, array in published_arrays(model, column=2):
            _, stored = gguf_array(name, array, quantize)
            file.write(stored)
            file.write(b"\0" * (-stored.nbytes % 32))


def say_what_rounding_costs(model, tokenizer, path):
    """Print size and loss before and after, on The Verdict or, without it, this script's text."""
    source = VERDICT if VERDICT.exists() else Path(__file__)
    text = source.read_text(encoding="utf-8")
    before = calc_text_loss(model, tokenizer, text)
    for name, p in model.named_parameters():
        kind, blocks = gguf_array(name, p.detach().numpy(), quantize=True)
        if kind == 8:  # what the file's reader makes of it
            scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
            p.data = torch.from_numpy(blocks[:, 2:] * scales).view(p.shape)
    after = calc_text_loss(model, tokenizer, text)
    size = 4e-6 * sum(p.numel() for p in model.parameters())
    say(f"size     {size:,.1f} MB in float32, {path.stat().st_size / 1e6:,.1f} MB in q8_0")
    say(f"loss     {before:.4f} in float32, {after:.4f} in q8_0, on {source.name}")


def export(path, quantize, checkpoint):
    """Write a checkpoint as a folder for transformers, or as a GGUF file for llama.cpp."""
    model, tokenizer, extras = load_checkpoint(checkpoint)
    texts, template = extras.get("prompt_texts"), None
    if texts:  # a finetuned model's prompt, in Jinja
        template = ("{% for message in messages %}{% if message['role'] == 'assistant' %}"
                    "{{ message['content'] + '<|endoftext|>' }}{% else %}{{ "
                    + json.dumps(texts["instruction"]) + " + message['content'] + "
                    + json.dumps(texts["output"]) + " }}{% endif %}{% endfor %}")
    if path.suffix.lower() != ".gguf":
        export_folder(model, tokenizer, template, path)
        return say(f"saved    {path}. With transformers:\n"
                   f"  model = AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
                   f"  tokenizer = AutoTokenizer.from_pretrained({str(path)!r})")

    export_gguf(model, tokenizer, template, path, quantize)
    if quantize:
        say_what_rounding_costs(model, tokenizer, path)
    say(f"saved    {path}. Use it with:\n  llama-completion -m {path} -no-cnv -p \"Once\"")
    if texts:  # the same prompt for Ollama
        modelfile = path.with_suffix(".Modelfile")
        template = texts["instruction"] + "{{ .Prompt }}" + texts["output"] + "{{ .Response }}"
        modelfile.write_text(f'FROM ./{path.name}\nTEMPLATE """{template}"""\n'
                             'PARAMETER stop "<|endoftext|>"\n', encoding="utf-8")
        say(f"  ollama create {path.stem} -f {modelfile}")


def main(argv=None):
    """Get the weights, save them as a checkpoint, show that they work; or export a checkpoint."""
    parser = ArgumentParser(description="OpenAI's GPT-2 weights in, or a checkpoint out.")
    arg = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=list(GPT2_SIZES), default="124M", help="which GPT-2")
    which.add_argument("--from", dest="source", type=Path, metavar="PATH",
                       help="a .safetensors file, or a folder with one or with OpenAI's files")
    arg("--out", type=checkpoint_file, help="default: checkpoints/gpt2-SIZE.pt or gpt2-local.pt")
    arg("--prompt", default=PROMPT, help="text to continue")
    arg("--max-new-tokens", type=positive_int, default=15, help="at most this many")

    arg("--export", type=Path, metavar="PATH", help="write --checkpoint for other software: a "
        "folder for transformers, or a file that ends in .gguf for llama.cpp and Ollama")
    arg("--checkpoint", type=Path, default=Path("checkpoints/pretrained.pt"), help="to export")
    arg("--quantize", choices=["q8_0"], help="round matrices to 8 bits in a GGUF file")
    args = parser.parse_args(argv)
    if args.quantize and (args.export is None or args.export.suffix.lower() != ".gguf"):
        parser.error("argument --quantize: it goes with --export NAME.gguf")
    if args.export:
        return export(args.export, args.quantize, args.checkpoint)

    args.out = args.out or Path("checkpoints") / f"gpt2-{'local' if args.source else args.size}.pt"
    args.resume = False
    check_output(args, args.source, endings=())
    source = args.source or download_gpt2(args.size, Path("data") / "gpt2")
    model = load_local(source)
    folder = source if source.is_dir() else source.parent
    tokenizer = find_tokenizer(folder, model.cfg["vocab_size"])
    save_checkpoint(args.out, model, tokenizer)
    say(f"{source}: {sum(p.numel() for p in model.parameters()):,} parameters, saved as {args.out}")

    if args.source is None:
        with contextlib.suppress(UserError):  # the weights are what the user came for
            download(VERDICT_URLS, VERDICT, VERDICT_SHA256, timeout=10)
    demonstrate(model, tokenizer, args.prompt, args.max_new_tokens)
    say(f"\nNext: python gpt.py --checkpoint {args.out} --prompt \"The meaning of life is\"\n"
        f"or    python finetune_classifier.py --init {args.out}")


if __name__ == "__main__":
    run_main(main)
