"""OpenAI's GPT-2 weights in our model, instead of pretraining one yourself.

    python load_gpt2.py                       fetch GPT-2 124M (550 MB) -> checkpoints/gpt2-124M.pt
    python load_gpt2.py --size 355M           or 774M, 1558M: better text, slower
    python load_gpt2.py --from some/folder    weights that are already there; no network is used
    python gpt.py --checkpoint checkpoints/gpt2-124M.pt --prompt "The meaning of life is"

GPT-2 is published in two file formats; both are read here byte by byte, without their frameworks:
safetensors (Hugging Face's hub) and OpenAI's original TensorFlow checkpoint. Either becomes the
tree of arrays that section 5.5 of the book calls `params`, and that is copied into a `GPTModel`.

Read it in order: who is who -> safetensors -> TensorFlow -> tree -> model -> download ->
demonstration. Left out: weights cut into several files, PyTorch's own .bin files (they are
programs: opening one can run code), and models that are not GPT-2.

Shapes: C embedding width, T context length, V vocabulary size, as in gpt.py.
"""

import contextlib
import functools
import json
import math
import mmap
import re
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from gpt import (
    GPT2_SIZES, GPT_CONFIG_124M, VERDICT, VERDICT_ADDRESS, VERDICT_SHA256, ArgumentParser, GPTModel,
    UserError, allocate, check_output, decode_stream, download, generate_stream, human,
    load_tokenizer, positive_int, printable, run_main, save_checkpoint, shapes_only,
    text_to_token_ids)

LARGEST_HEADER = 1 << 20  # bytes; GPT-2 1558M needs a tenth of it. Bounds what a bad file can cost

# ---------------------------------------------------------------------------------------------
# Who is who: each array's name in TensorFlow, on the hub, and in our model. Both publications
# store a linear layer's matrix as (in, out), torch stores (out, in); and they keep the query, key
# and value layers side by side in one matrix c_attn (C, 3 C), which is cut in three.

TOP_NAMES = [
    ("wte", "wte.weight", ["tok_emb.weight"]),                                # (V, C)
    ("wpe", "wpe.weight", ["pos_emb.weight"]),                                # (T, C)
    ("ln_f/g", "ln_f.weight", ["final_norm.scale"]),                          # (C,)
    ("ln_f/b", "ln_f.bias", ["final_norm.shift"]),                            # (C,)
]
BLOCK_NAMES = [
    ("ln_1/g", "ln_1.weight", ["norm1.scale"]),                               # (C,)
    ("ln_1/b", "ln_1.bias", ["norm1.shift"]),                                 # (C,)
    ("attn/c_attn/w", "attn.c_attn.weight",                                   # (C, 3 C)
     ["att.W_query.weight", "att.W_key.weight", "att.W_value.weight"]),
    ("attn/c_attn/b", "attn.c_attn.bias",                                     # (3 C,)
     ["att.W_query.bias", "att.W_key.bias", "att.W_value.bias"]),
    ("attn/c_proj/w", "attn.c_proj.weight", ["att.out_proj.weight"]),         # (C, C)
    ("attn/c_proj/b", "attn.c_proj.bias", ["att.out_proj.bias"]),             # (C,)
    ("ln_2/g", "ln_2.weight", ["norm2.scale"]),                               # (C,)
    ("ln_2/b", "ln_2.bias", ["norm2.shift"]),                                 # (C,)
    ("mlp/c_fc/w", "mlp.c_fc.weight", ["ff.layers.0.weight"]),                # (C, 4 C)
    ("mlp/c_fc/b", "mlp.c_fc.bias", ["ff.layers.0.bias"]),                    # (4 C,)
    ("mlp/c_proj/w", "mlp.c_proj.weight", ["ff.layers.2.weight"]),            # (4 C, C)
    ("mlp/c_proj/b", "mlp.c_proj.bias", ["ff.layers.2.bias"]),                # (C,)
]


def weight_names(n_layers):
    """Yield (TensorFlow's name, the hub's name, [our names]) of every array of a GPT-2."""
    # wte comes first: it is the largest, and a copy costs most when the model is already full.
    yield from TOP_NAMES
    for i in range(n_layers):
        for tf_name, hub_name, ours in BLOCK_NAMES:
            yield f"h{i}/{tf_name}", f"h.{i}.{hub_name}", [f"trf_blocks.{i}.{o}" for o in ours]


# ---------------------------------------------------------------------------------------------
# Files are mapped, not read: a tensor is a view of the file, and the operating system fetches a
# page when it is first looked at. Nothing is held twice, and nothing exceeds the file.

def map_file(path):
    """A file as a bytes-like `mmap` (private: writing to it does not change the file)."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; check the path, or leave out --from to download "
                        "GPT-2") from None
    except ValueError:
        raise UserError(f"{path} is empty; delete it and fetch it again") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None


def view_tensors(file, places, start):
    """{name: (dtype, shape, begin, end)} -> {name: tensor}, views of `file`.

    `begin` and `end` count bytes from `start`. Raises ValueError when a place leaves the file,
    overlaps another, or has another length than its dtype and shape.
    """
    tensors, previous, previous_end = {}, None, 0
    for name, (dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if not 0 <= begin <= end <= len(file) - start:
            raise ValueError(f"{name} lies outside the file, which may have been cut short")
        if begin < previous_end:
            raise ValueError(f"{name} overlaps {previous}")
        if math.prod(shape) * dtype.itemsize != end - begin or min(shape, default=1) < 1:
            raise ValueError(f"{name} takes {end - begin} bytes, which does not fit its shape "
                             f"{tuple(shape)} of {dtype}")
        previous, previous_end = name, end
        tensors[name] = torch.frombuffer(file, dtype=dtype, count=math.prod(shape),
                                         offset=start + begin).view(shape)
    return tensors


def release(file):
    """Give the pages of a mapped file back; they come again when they are looked at again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows does it on its own
        file.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------------------------------------
# safetensors: eight bytes with the length of a header, the header in JSON, then the numbers.
# https://github.com/huggingface/safetensors#format

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unique_keys(pairs):
    """A hook for `json.loads`: a name that is there twice is an error."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is in the header twice")
    return dict(pairs)


def read_safetensors(path):
    """A .safetensors file -> (its mmap, {hub's name: tensor}). Raises UserError.

    Names lose the prefix `transformer.`; the buffers with the causal mask are left out.
    """
    file, places = map_file(path), {}
    try:
        length = int.from_bytes(file[:8], "little")
        if length > len(file) - 8:
            raise ValueError(f"its header should have {length} bytes, but the file has {len(file)}")
        if length > LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes is too long for a GPT-2")
        header = json.loads(file[8:8 + length].decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        for full_name, entry in header.items():
            name = full_name.removeprefix("transformer.")
            if full_name == "__metadata__" or re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias",
                                                                   name):
                continue
            if name in places:
                raise ValueError(f"{name} is there with and without the prefix transformer.")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name} has the dtype {dtype!r}, which is not supported; "
                                 f"supported: {', '.join(SAFETENSORS_DTYPES)}")
            if not all(type(n) is int for n in [*shape, *offsets]) or len(offsets) != 2:
                raise ValueError(f"{name} has a shape or offsets that are not whole numbers")
            places[name] = (SAFETENSORS_DTYPES[dtype], shape, *offsets)
        tensors = view_tensors(file, places, start=8 + length)
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors.get("wte.weight", torch.empty(0))):
            raise ValueError("lm_head.weight is not the same as wte.weight, as it is in GPT-2")
        release(file)
        return file, tensors
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        reason = str(e) if type(e) is ValueError else f"its header is not as expected: {e!r:.80}"
        raise UserError(f"{path} is not a readable safetensors file: {reason}") from None


# ---------------------------------------------------------------------------------------------
# TensorFlow's checkpoint: the numbers lie in model.ckpt.data-00000-of-00001, one array after the
# other, and model.ckpt.index says where. The index is a LevelDB table: blocks of sorted keys and
# values, an index block that lists them, and a footer that points at the index block. A value is
# a protocol-buffer record.
# https://github.com/google/leveldb/blob/main/doc/table_format.md
# https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto

TF_INDEX, TF_DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TF_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}
TABLE_MAGIC = 0xDB4775248B80FB57


def read_varint(data, at):
    """A number in groups of seven bits, lowest first, the eighth bit set if more follow."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number in it is longer than 64 bits")


def read_bytes(data, at, length):
    """`length` bytes from `at` on, or ValueError: a slice alone would be silently shorter."""
    if at + length > len(data):
        raise ValueError("a record in it is cut short")
    return data[at:at + length], at + length


def read_message(data):
    """A protocol-buffer record -> {field number: [values]}."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == 0:                                                # a number
            value, at = read_varint(data, at)
        elif kind == 2:                                              # text, or a record inside
            length, at = read_varint(data, at)
            value, at = read_bytes(data, at, length)
        elif kind in (1, 5):                                         # 8 or 4 bytes as they are
            value, at = read_bytes(data, at, 8 if kind == 1 else 4)
            value = int.from_bytes(value, "little")
        else:
            raise ValueError(f"a record in it has a field of the unknown kind {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def read_block(table, pointer):
    """Yield the (key, value) pairs of the block at `pointer` (its offset and size, as varints).

    A key is stored as how much it shares with the key before and what differs: after
    `model/h0/ln_1/b` comes 14, `g`. The shortcuts at the block's end (for binary search) are
    not needed.
    """
    offset, at = read_varint(pointer, 0)
    size, _ = read_varint(pointer, at)
    block, at = read_bytes(table, offset, size)
    trailer, _ = read_bytes(table, at, 5)  # one byte for the compression, four for the checksum
    if trailer[0] != 0:
        raise ValueError("its blocks are compressed, which is not supported")
    check_crc(block + trailer[:1], int.from_bytes(trailer[1:], "little"), "a block of the index")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    if size < 4 or end < 0:
        raise ValueError("a block in it is cut short")
    key, at = b"", 0
    while at < end:
        shared, at = read_varint(block, at)
        rest, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or shared + rest > 200:
            raise ValueError("a name in it is damaged")
        suffix, at = read_bytes(block, at, rest)
        value, at = read_bytes(block, at, length)
        key = key[:shared] + suffix
        yield key, value


def read_index(path):
    """model.ckpt.index -> {TensorFlow's name: (dtype, shape, begin, end, checksum)}. UserError."""
    table, places, previous = map_file(path), {}, None
    try:
        if len(table) < 48 or int.from_bytes(table[-8:], "little") != TABLE_MAGIC:
            raise ValueError("it does not end as a table does; it may have been cut short")
        if len(table) > LARGEST_HEADER:
            raise ValueError(f"{len(table)} bytes are too many for a GPT-2")
        footer, at = table[-48:], 0
        for _ in range(2):  # skip the first pointer: its block is not needed
            _, at = read_varint(footer, at)
        for _, pointer in read_block(table, footer[at:]):
            for key, value in read_block(table, pointer):
                if previous is not None and key <= previous:
                    raise ValueError("its names are not in order, or one is there twice")
                previous, name = key, key.decode("utf-8")
                if key == b"":  # the first record is about the whole checkpoint
                    check_header(read_message(value))
                elif name.startswith("model/"):  # else a step counter or the like
                    places[name.removeprefix("model/")] = read_place(name, read_message(value))
        return places
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        reason = str(e) if type(e) is ValueError else "a record in it is damaged"
        raise UserError(f"{path} is not a readable TensorFlow index: {reason}") from None


def check_header(record):
    """BundleHeaderProto: 1 is the number of data files, 2 the byte order. Raises ValueError."""
    if record.get(1) != [1] or record.get(2, [0]) != [0]:
        raise ValueError("numbers cut into several files, or big-endian, are not supported")


def read_place(name, record):
    """BundleEntryProto -> (dtype, shape, begin, end, checksum). Raises what damage makes it."""
    # 1 is the dtype, 2 the shape (with a record per dimension), 4 the offset (left out if zero), 5
    # the size, 6 the checksum.
    dtype, begin, size, checksum = (record.get(n, [0])[-1] for n in (1, 4, 5, 6))
    shape = [read_message(dim)[1][0] for dim in read_message(record[2][0]).get(2, [])]
    if not all(type(n) is int for n in (dtype, begin, size, checksum, *shape)):
        raise ValueError(f"the record of {name} is damaged")
    if dtype not in TF_DTYPES:
        raise ValueError(f"{name} has the dtype number {dtype}, which is not supported; supported: "
                         "1 (float32), 19 (float16), 14 (bfloat16)")
    return TF_DTYPES[dtype], shape, begin, begin + size, checksum


def read_tensorflow(folder):
    """A folder -> (the mmap of its numbers, {TensorFlow's name: tensor}). Raises UserError."""
    places = read_index(folder / TF_INDEX)
    file = map_file(folder / TF_DATA)
    try:
        tensors = view_tensors(file, {name: p[:4] for name, p in places.items()}, start=0)
        for name, (*_, begin, end, crc) in places.items():
            check_crc(memoryview(file)[begin:end], crc, name)
            release(file)
    except ValueError as e:
        raise UserError(f"{folder / TF_DATA} does not fit its index: {e}; delete it and fetch it "
                        "again") from None
    # The matrices are stored as convolutions of width 1: (1, in, out).
    return file, {name: t[0] if t.ndim == 3 and t.shape[0] == 1 else t
                  for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------
# CRC-32C, the checksum of TensorFlow's files, fast enough in numpy for half a gigabyte. The plain
# loop is  crc = step(crc ^ word)  over the file's 32-bit words. step is linear: step(a ^ b) is
# step(a) ^ step(b). So the words may be laid out in rows, each row moved on by a whole row's steps
# and added to the next, and the last row folded in halves in the same way.

ROW = 1 << 14  # words in a row: small enough for the processor's cache


@functools.lru_cache
def crc_tables(words):
    """What `words` steps (a power of two) make of each value of the low and of the high 16 bits."""
    images = np.uint32(1) << np.arange(32, dtype=np.uint32)  # 32 single bits, each moved on
    if words == 1:
        for _ in range(32):  # 0x82F63B78 is the polynomial, its lowest power in the highest bit
            images = (images >> 1) ^ (images & 1) * np.uint32(0x82F63B78)
    else:
        images = crc_steps(crc_steps(images, words // 2), words // 2)
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, dtype=np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ image])
        tables.append(table)
    return tables


def crc_steps(crcs, words):
    """An array of checksums (N,), each moved on by `words` steps."""
    low, high = crc_tables(words)
    return low.take(crcs & 0xFFFF) ^ high.take(crcs >> 16)


def crc32c(data):
    """The CRC-32C (Castagnoli; RFC 3720, appendix B.4) of bytes.

    Example: crc32c(b"123456789") == 0xE3069283
    """
    words = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
    crc = 0xFFFFFFFF
    if len(words):
        # Zeros in front change nothing while the checksum is zero, so the first row is filled up
        # with them; where the words begin, the checksum begins with all ones.
        first = (len(words) - 1) % ROW + 1
        row = np.zeros(ROW, dtype=np.uint32)
        row[-first:] = words[:first]
        row[-first] ^= crc
        for next_row in words[first:].reshape(-1, ROW):
            row = crc_steps(row, ROW) ^ next_row
        while len(row) > 1:
            half = len(row) // 2
            row = crc_steps(row[:half], half) ^ row[half:]
        crc = int(crc_steps(row, 1)[0])
    for byte in bytes(data[len(words) * 4:]):
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (crc & 1) * 0x82F63B78
    return crc ^ 0xFFFFFFFF


def check_crc(data, stored, what):
    """Raise ValueError if `data` has not the checksum that TensorFlow stored, in its disguise."""
    rotated = stored - 0xA282EAD8 & 0xFFFFFFFF
    if crc32c(data) != (rotated >> 17 | rotated << 15) & 0xFFFFFFFF:
        raise ValueError(f"the checksum of {what} is wrong, so it is damaged")


# ---------------------------------------------------------------------------------------------
# From the file's names to the book's tree: params["blocks"][3]["attn"]["c_attn"]["w"].

def read_config(folder):
    """(path, dictionary) of the config.json (hub) or hparams.json (OpenAI) in `folder`.

    (None, {}) if there is none. Raises UserError when it is broken, or describes a model that
    computes otherwise than GPT-2.
    """
    paths = [folder / name for name in ("config.json", "hparams.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None, {}
    try:
        if path.stat().st_size > LARGEST_HEADER:
            raise ValueError("it is too long")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not the file that comes with GPT-2 ({e})") from None
    for key, gpt2 in {"model_type": ["gpt2"], "layer_norm_epsilon": [1e-5],
                      "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                      "scale_attn_weights": [True],
                      "scale_attn_by_inverse_layer_idx": [False]}.items():
        if config.get(key, gpt2[0]) not in gpt2:
            raise UserError(f"{path} says {key} {config[key]!r}, but GPT-2 has {gpt2[0]!r}; other "
                            "models cannot be loaded")
    return path, config


def find_settings(path, tensors, column, folder):
    """The sizes of a model, from its tensors and the JSON file beside them: OpenAI's `hparams`.

    `column` says which of `weight_names` the tensors bear. Raises UserError for a tensor that is
    missing or does not belong to a GPT-2, and for sizes that contradict each other.
    """
    config_path, config = read_config(folder)
    blocks = {m[0] for m in (re.match(r"h\.?[0-9]+", name) for name in tensors) if m}
    n_layers = config.get("n_layer", len(blocks))
    if type(n_layers) is not int or n_layers < 1:
        raise UserError(f"{config_path or path} has {n_layers!r} blocks; a GPT-2 has one or more")
    known = set()
    for names in weight_names(n_layers):
        if names[column] not in tensors:
            raise UserError(f"{path} lacks the tensor {names[column]} of a GPT-2 with {n_layers} "
                            "blocks; fetch it again")
        known.add(names[column])
    if more := sorted(tensors.keys() - known):
        raise UserError(f"{path} holds {more[0]}, which a GPT-2 with {n_layers} blocks has not")
    wte, wpe = (tensors[names[column]] for names in TOP_NAMES[:2])
    if wte.ndim != 2 or wpe.ndim != 2:
        raise UserError(f"{path}: wte and wpe have the shapes {tuple(wte.shape)} and "
                        f"{tuple(wpe.shape)}, but should be matrices")
    settings = {"n_vocab": wte.shape[0], "n_ctx": wpe.shape[0], "n_embd": wte.shape[1],
                "n_head": config.get("n_head"), "n_layer": n_layers}
    for key, hub_key in [("n_vocab", "vocab_size"), ("n_ctx", "n_positions"), ("n_embd",) * 2]:
        if (stated := config.get(key, config.get(hub_key, settings[key]))) != settings[key]:
            raise UserError(f"{config_path} says {key} {stated!r}, but {path} has {settings[key]}; "
                            "the two do not belong together")
    C, H = settings["n_embd"], settings["n_head"]
    if H is None:  # no tensor shows how many heads share the C numbers
        H = settings["n_head"] = C // 64
        if C not in [size["emb_dim"] for size in GPT2_SIZES.values()]:
            print(f"no config.json says how many attention heads there are; taken as {H} of 64 "
                  "numbers each, the width in every published GPT-2")
    if type(H) is not int or H < 1 or C % H:
        raise UserError(f"{config_path or path}: {C} numbers per token cannot be shared out among "
                        f"{H!r} heads; put the config.json that belongs to the weights beside them")
    return settings


def branch(params, name):
    """Where the tree keeps an array: "h3/attn/c_attn/w" -> (blocks[3]["attn"]["c_attn"], "w")."""
    *path, leaf = name.split("/")
    if path[:1] == ["ln_f"]:  # the book keeps the last norm's g and b at the top
        path = []
    elif path:
        params = params["blocks"][int(path.pop(0)[1:])]
    for part in path:
        params = params.setdefault(part, {})
    return params, leaf


def read_gpt2(path):
    """A file or folder of either format -> (mmap, settings, params). Raises UserError.

    The leaves of `params` are tensors that look into the mapped file.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (files := sorted(path.glob("*.safetensors"))):
        path = folder / "model.safetensors"
        if len(files) == 1:
            [path] = files
    if path.is_dir() or path.name.startswith("model.ckpt"):
        if not (folder / TF_INDEX).is_file():
            raise UserError(f"{folder} holds neither format of GPT-2: model.safetensors (the hub), "
                            f"or {TF_INDEX} with {TF_DATA} and hparams.json (OpenAI)")
        column, path = 0, folder / TF_DATA
        file, tensors = read_tensorflow(folder)
    else:
        column = 1
        file, tensors = read_safetensors(path)
    settings = find_settings(path, tensors, column, folder)
    params = {"blocks": [{} for _ in range(settings["n_layer"])]}
    for names in weight_names(settings["n_layer"]):
        node, leaf = branch(params, names[0])
        node[leaf] = tensors[names[column]]
    return file, settings, params


# ---------------------------------------------------------------------------------------------
# Into the model.

def match_weights(gpt, params):
    """[(parameter of `gpt`, the tensor to copy into it)], after checking every name and shape."""
    if len(params["blocks"]) != len(gpt.trf_blocks):
        raise UserError(f"the weights have {len(params['blocks'])} blocks, but the model has "
                        f"{len(gpt.trf_blocks)}")
    weights, pairs = dict(gpt.named_parameters()), []
    for name, _, ours in weight_names(len(params["blocks"])):
        node, leaf = branch(params, name)
        if leaf not in node:
            raise UserError(f"the weights lack {name}")
        if missing := [our for our in ours if our not in weights]:
            raise UserError(f"the model has no {missing[0]}; make it with qkv_bias True")
        array, transposed = torch.as_tensor(node[leaf]), leaf == "w"
        shape = list(weights[ours[0]].shape)[::-1 if transposed else 1]
        shape[-1] *= len(ours)
        if list(array.shape) != shape:
            raise UserError(f"{name} has the shape {tuple(array.shape)}, but the model needs "
                            f"{tuple(shape)}")
        for our, piece in zip(ours, array.chunk(len(ours), dim=-1)):
            pairs.append((weights[our], piece.T if transposed else piece))
    return pairs


@torch.no_grad()
def load_weights_into_gpt(gpt, params, after_each=None):
    """Copy the tree `params` into a `GPTModel`, in place. Book section 5.5.

    GPT-2 scores tokens with the matrix it embeds them with, so `out_head` shares `tok_emb`'s.
    `after_each` is called after every copy. Raises UserError for a missing array or another shape,
    by name, before anything is copied.
    """
    pairs = match_weights(gpt, params)
    gpt.cfg["tie_embeddings"] = True
    gpt.tie_weights()
    for parameter, array in pairs:
        parameter.copy_(array)  # also turns 16-bit numbers into the model's 32 bits
        if after_each:
            after_each()


def load_local(path):
    """A safetensors file, or a folder in either format -> a `GPTModel`, ready to use (eval mode).

    Example: model = load_local("data/gpt2/124M")

    Only the finished model takes memory: each tensor's pages of the file are given back as soon as
    they are copied. Raises UserError for anything that is not a complete GPT-2.
    """
    file, settings, params = read_gpt2(path)
    cfg = {**GPT_CONFIG_124M, "vocab_size": settings["n_vocab"],
           "context_length": settings["n_ctx"], "emb_dim": settings["n_embd"],
           "n_heads": settings["n_head"], "n_layers": settings["n_layer"],
           "drop_rate": 0.0,  # as the book has it for finetuning, chapters 6 and 7
           "qkv_bias": True, "tie_embeddings": True}
    with shapes_only():  # everything is checked before any memory is taken
        model = GPTModel(cfg)
    match_weights(model, params)
    allocate(model, "cpu")
    load_weights_into_gpt(model, params, after_each=lambda: release(file))
    return model.eval()


# ---------------------------------------------------------------------------------------------
# The download: the hub, then OpenAI's own files, then the book's copy of those.

HUB_ADDRESS = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
TF_ADDRESSES = ["https://openaipublic.blob.core.windows.net/gpt-2/models/{}/{}",
                "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{}/{}"]


def download_gpt2(model_size, models_dir):
    """The folder `models_dir`/`model_size` with the weights in one of the formats. UserError."""
    if model_size not in GPT2_SIZES:
        raise UserError(f"GPT-2 has no size {model_size!r}; choose one of {', '.join(GPT2_SIZES)}")
    folder = Path(models_dir) / model_size
    hub_file = folder / "model.safetensors"
    tf_files = [folder / name for name in ("hparams.json", TF_INDEX, TF_DATA)]
    if hub_file.exists() or all(path.exists() for path in tf_files):
        return folder
    try:
        download([HUB_ADDRESS.format(HUB_NAMES[model_size])], hub_file)
    except UserError as hub_error:
        try:
            for path in tf_files:
                download([a.format(model_size, path.name) for a in TF_ADDRESSES], path)
        except UserError as e:
            raise UserError(f"{hub_error}\nIn OpenAI's format, {e}") from None
    return folder


def download_and_load_gpt2(model_size, models_dir):
    """-> (settings, params): GPT-2's sizes, and its weights as a tree of numpy arrays.

    The arrays look into the mapped file. Looks into `models_dir`/`model_size` before it downloads.
    Book section 5.5. Raises UserError.

    Example:
        settings, params = download_and_load_gpt2("124M", "data/gpt2")
        params["blocks"][0]["attn"]["c_attn"]["w"].shape                         # (768, 2304)
    """
    _, settings, params = read_gpt2(download_gpt2(model_size, models_dir))
    for name, _, _ in weight_names(settings["n_layer"]):
        node, leaf = branch(params, name)
        t = node[leaf]
        node[leaf] = (t.float() if t.dtype == torch.bfloat16 else t).numpy()
    return settings, params


# ---------------------------------------------------------------------------------------------
# python load_gpt2.py: fetch, convert, and show that the weights are right.

PROMPT = "Every effort moves you"


def fit_tokenizer(vocab_size):
    """GPT-2's tokenizer; for a model with another vocabulary, one of that size. Raises UserError.

    A byte-pair vocabulary lists its merges in the order they were learnt, so its beginning is a
    vocabulary too. Beyond GPT-2's tokens come `<|extra_0|>` and so on, which stand for no text.
    """
    tokenizer = load_tokenizer("gpt2")
    if vocab_size == tokenizer.n_vocab:
        return tokenizer
    if vocab_size < 257:
        raise UserError(f"the model has {vocab_size} tokens, but the 256 bytes and <|endoftext|> "
                        "need 257; it can be used in Python: load_gpt2.load_local(path)")
    print(f"the model has {vocab_size} tokens, GPT-2's tokenizer {tokenizer.n_vocab}: it is "
          "made to fit")
    ranks = {t: rank for t, rank in tokenizer._mergeable_ranks.items() if rank < vocab_size - 1}
    special = ["<|endoftext|>", *(f"<|extra_{i}|>" for i in range(vocab_size - len(ranks) - 1))]
    return tiktoken.Encoding(
        f"gpt2-{vocab_size}", pat_str=tokenizer._pat_str, mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


@torch.no_grad()
def calc_verdict_loss(model, tokenizer):
    """The mean loss (nats per token) on the last tenth of The Verdict, the book's validation set.

    Windows of 256 tokens, one after the other, as in the book's section 5.1.
    """
    text = VERDICT.read_text(encoding="utf-8")
    token_ids = torch.tensor(tokenizer.encode(text[int(0.9 * len(text)):]))
    T = min(256, model.cfg["context_length"])
    B = (len(token_ids) - 1) // T
    inputs, targets = token_ids[:B * T].view(B, T), token_ids[1:B * T + 1].view(B, T)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()


def demonstrate(model, tokenizer, size, prompt, max_new_tokens):
    """Continue the prompt greedily and measure a loss, each beside what the book shows for 124M."""
    print(f"\nThe greedy continuation of {prompt!r}:\n\n{prompt}", end="", flush=True)
    idx = text_to_token_ids(prompt or "<|endoftext|>", tokenizer)
    tokens = (int(row[0]) for row in generate_stream(
        model, idx, max_new_tokens, model.cfg["context_length"], eos_id=tokenizer.eot_token))
    for piece in decode_stream((t for t in tokens if t != tokenizer.eot_token), tokenizer):
        print(printable(piece), end="", flush=True)
    print()
    if size == "124M" and prompt == PROMPT:
        print("\n(the book, section 6.4: Every effort moves you forward. / The first step is to "
              "understand\nthe importance of your work)")
    if not VERDICT.exists():
        return print(f"\nNo loss is measured, because {VERDICT} is not there.")
    V = model.cfg["vocab_size"]
    print(f"\nLoss on the last tenth of {VERDICT}, in nats per token\n"
          f"  this model                    {calc_verdict_loss(model, tokenizer):6.3f}")
    if size:
        print("  GPT-2 124M in the book         3.560  (solution of exercise 5.5)" +
              ("" if size == "124M" else "; a larger one should get less"))
    print(f"  a model that knows nothing    {math.log(V):6.3f}  (ln {V})")


def main(argv=None):
    """Get the weights, save them as a checkpoint, show that they work."""
    parser = ArgumentParser(description="OpenAI's GPT-2 weights as a checkpoint of this project.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", default="124M", help=f"which GPT-2: {', '.join(GPT2_SIZES)}")
    which.add_argument("--from", dest="source", type=Path, metavar="PATH", help="weights that are "
                       "there: a .safetensors file, or a folder with one or with OpenAI's files")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default: "
                        "checkpoints/gpt2-SIZE.pt, or gpt2-local.pt with --from)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive_int, default=15, help="at most this many")
    args = parser.parse_args(argv)
    check_output(args.out or Path("checkpoints") / "gpt2.pt")
    source = args.source or download_gpt2(args.size, Path("data") / "gpt2")
    model = load_local(source)
    size = next((s for s, cfg in GPT2_SIZES.items() if cfg.items() <= model.cfg.items()), None)
    tokenizer = fit_tokenizer(model.cfg["vocab_size"])
    out = args.out or Path("checkpoints") / f"gpt2-{'local' if args.source else args.size}.pt"
    save_checkpoint(out, model, tokenizer)
    print(f"GPT-2{' ' + size if size else ''} from {source}\n  "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.cfg['n_layers']} "
          f"blocks, {model.cfg['n_heads']} heads, context {model.cfg['context_length']}\n"
          f"  saved as {out} ({human(out.stat().st_size)}B)")
    if args.source is None:
        with contextlib.suppress(UserError):  # the weights are what the user came for
            download([VERDICT_ADDRESS], VERDICT, VERDICT_SHA256, timeout=10)
    demonstrate(model, tokenizer, size, args.prompt, args.max_new_tokens)
    print(f"\nNext: python gpt.py --checkpoint {out} --prompt \"The meaning of life is\"\n"
          f"or    python finetune_classifier.py --init {out}")


if __name__ == "__main__":
    run_main(main)
