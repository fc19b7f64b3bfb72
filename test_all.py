"""What this project guarantees, as tests a newcomer can read: python test_all.py

Everything runs offline with tiny models; a test that needs a file in data/ is skipped where it is
missing. Each test compares with something independent of our code: arithmetic written out, GPT-2 in
numpy, tiktoken, the numbers the book prints.
"""

import ast
import contextlib
import csv
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent
os.environ["TIKTOKEN_CACHE_DIR"] = str(ROOT / "data" / "tiktoken")
os.environ["NO_PROXY"] = "127.0.0.1"

import numpy as np
import requests
import tiktoken
import torch
import torch.nn.functional as F

import finetune_classifier as clf
import finetune_instruct as instruct
import gpt
import load_gpt2
import pretrain
import tokenizer as tok
from gpt import GPT_CONFIG_124M, GPTModel, UserError, generate, generate_text_simple

SCRIPTS = {f"{module.__name__}.py": module
           for module in (tok, gpt, pretrain, load_gpt2, clf, instruct)}
TINY = {"vocab_size": 257, "context_length": 64, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
        "drop_rate": 0.1, "qkv_bias": False}
BYTES = gpt.load_tokenizer("bytes")
TEXT = "The cat sat on the mat; the dog sat on the log. Nobody knows why, and nobody asked.\n" * 30
RECORDS = [{"instruction": f"Say {word}", "input": "loud" if i % 3 == 0 else "",
            "output": "" if i == 4 else word * (1 + i % 3)}
           for i, word in enumerate("one two three four five six seven eight nine ten".split() * 3)]

# Small runs of the three training scripts, the same but for the flags that a test puts behind them.
PRETRAIN = ("pretrain.py --data text.txt --context-length 16 --emb-dim 16 --n-layers 1 --n-heads 2 "
            "--dtype float32 --out run.pt ")
CLASSIFY = ("finetune_classifier.py --init tiny.pt --data data.tsv --dtype float32 --lr 0.01 "
            "--epochs 2 --out run.pt ")
INSTRUCT = ("finetune_instruct.py --init tiny.pt --data records.json --prompt-style phi3 --lr 0.01 "
            "--dtype float32 --max-new-tokens 8 --out run.pt ")


def needs(*names):
    """Skip a test, with the reason, unless these files are in data/."""
    return unittest.skipUnless(all((ROOT / "data" / name).exists() for name in names),
                               f"needs data/{' and data/'.join(names)}")


def tiny_model(spread=None, **changes):
    """A small model with random weights, always the same; `spread` wide, so that all have a say."""
    torch.manual_seed(0)
    model = GPTModel({**TINY, **changes}).eval()
    if spread:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=spread)
    return model


def call(command):
    """Run a script's main as the command line does -> (status, standard output, error text)."""
    script, *argv = shlex.split(command)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            gpt.run_main(lambda: SCRIPTS[script].main(argv))
        except SystemExit as e:
            return e.code or 0, out.buffer.getvalue().decode(), err.getvalue()


def quietly(function, *args, **options):
    """Call a function without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **options)


def weights(path):
    """All weights of a checkpoint in one row."""
    return torch.cat([t.flatten() for t in torch.load(path, weights_only=True)["model"].values()])


def labelled_lines(classes=("ham", "spam")):
    """Texts that can be told apart: a line per text, of different lengths."""
    words = ["meet me at home", "WIN cash NOW 0800", "the weather is mild"]
    return "".join(f"{name}\t{words[k]} {'x' * (i % 13)} {i}\n"
                   for i in range(40) for k, name in enumerate(classes))


def serve(test, answer):
    """The address of a web server that lives as long as the test; `answer(request)` writes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_POST = do_GET
        log_message = mock.Mock()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}/"


def send(request, body, status=200, length=None, headers=()):
    """What most answers are."""
    request.send_response(status)
    for name, value in [("Content-Length", length or len(body)), *headers]:
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
    request.wfile.flush()


class InFolder(unittest.TestCase):
    """A test in an empty folder of its own, with a text, a table, records and a tiny model."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.write("text.txt", TEXT)
        self.write("data.tsv", labelled_lines())
        self.write("records.json", json.dumps(RECORDS))
        gpt.save_checkpoint("tiny.pt", tiny_model(spread=0.3, tie_embeddings=True), BYTES)

    def write(self, name, content):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    def ok(self, command):
        """Run a script that must succeed -> what it prints."""
        status, out, err = call(command)
        self.assertEqual(status, 0, out + err)
        return out

    def metrics(self):
        """The columns of run.csv, as arrays by name."""
        return np.genfromtxt("run.csv", delimiter=",", names=True, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# gpt.py: the model

class TestModel(unittest.TestCase):
    def test_layer_norm_and_gelu_are_the_arithmetic_beside_them(self):
        norm, x = gpt.LayerNorm(5), torch.randn(2, 3, 5)
        norm.scale.data, norm.shift.data = torch.arange(5.0), torch.full((5,), 0.5)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        expected = (x - mean) / torch.sqrt(var + 1e-5) * torch.arange(5.0) + 0.5
        torch.testing.assert_close(norm(x), expected)
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
        torch.testing.assert_close(gpt.GELU()(x), 0.5 * x * (1 + torch.tanh(inner)))

    def test_the_ladder_gives_the_numbers_the_book_prints(self):
        x = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],  # "Your
                          [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])  # journey
        batch = torch.stack([x, x])                                                # starts ..."
        for seed, rung, expected in [
                (123, lambda: gpt.attention_without_weights(x), [0.4419, 0.6515, 0.5683]),
                (123, lambda: gpt.SelfAttention_v1(3, 2)(x), [0.3061, 0.8210]),
                (789, lambda: gpt.SelfAttention_v2(3, 2)(x), [-0.0748, 0.0703]),
                (123, lambda: gpt.MultiHeadAttentionWrapper(3, 2, 6, 0.0, num_heads=2)(batch)[1],
                 [-0.5874, 0.0058, 0.5891, 0.3257]),
                (123, lambda: gpt.MultiHeadAttention(3, 2, 6, 0.0, num_heads=2)(batch)[1],
                 [0.2943, 0.3897])]:
            torch.manual_seed(seed)
            journey = rung()[1]
            torch.testing.assert_close(journey, torch.tensor(expected), atol=1e-4, rtol=0)

    def test_fast_attention_equals_the_wrapper_with_equal_weights(self):
        wrapper = gpt.MultiHeadAttentionWrapper(6, 2, 5, 0.0, num_heads=3)
        fast = gpt.MultiHeadAttention(6, 6, 5, 0.0, num_heads=3)
        fast.out_proj = torch.nn.Identity()
        for name in ("W_query", "W_key", "W_value"):
            stacked = torch.cat([getattr(head, name).weight for head in wrapper.heads])
            getattr(fast, name).weight.data = stacked
        x = torch.randn(2, 5, 6)
        torch.testing.assert_close(fast(x), wrapper(x))

    def test_the_book_s_model_number_for_number(self):
        torch.manual_seed(123)
        model = GPTModel(GPT_CONFIG_124M).eval()
        self.assertEqual(sum(p.numel() for p in model.parameters()), 163_009_536)
        idx = torch.tensor([[15496, 11, 314, 716]])                   # "Hello, I am"
        expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
        self.assertEqual(generate_text_simple(model, idx, 10, 1024)[0, 4:].tolist(), expected)
        self.assertEqual(generate(model, idx, 10, 1024)[0, 4:].tolist(), expected)

    def test_published_sizes_have_the_published_parameter_counts(self):
        for size, count in {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080,
                            "1558M": 1_557_611_200}.items():
            with gpt.shapes_only():
                model = GPTModel({**GPT_CONFIG_124M, **gpt.GPT2_SIZES[size], "qkv_bias": True,
                                  "tie_embeddings": True})
            self.assertEqual(sum(p.numel() for p in model.parameters()), count)

    def test_no_position_sees_a_later_token(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 16))
        changed = idx.clone()
        changed[:, 10:] = (idx[:, 10:] + 1) % 257
        logits, after = model(idx), model(changed)
        self.assertEqual(logits.shape, (2, 16, 257))
        torch.testing.assert_close(after[:, :10], logits[:, :10])
        self.assertFalse(torch.allclose(after[:, 10:], logits[:, 10:]))

    def test_weights_of_other_code_for_the_book_load_by_name(self):
        model, other, idx = tiny_model(), GPTModel(TINY).eval(), torch.arange(5)[None]
        masks = {f"trf_blocks.{i}.att.mask": torch.ones(64, 64) for i in range(2)}
        other.load_state_dict(model.state_dict() | masks)
        torch.testing.assert_close(other(idx), model(idx))

    def test_a_fresh_adapter_changes_nothing_and_a_merged_one_computes_the_same(self):
        model, idx = tiny_model(tie_embeddings=True), torch.randint(0, 257, (2, 9))
        before, names = model(idx), model.state_dict().keys()
        gpt.replace_linear_with_lora(model, rank=4, alpha=8)
        self.assertTrue(torch.equal(model(idx), before))
        self.assertIs(model.out_head.weight, model.tok_emb.weight)     # a tied head is left alone
        for name, p in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.1)
        adapted = model(idx)
        self.assertFalse(torch.allclose(adapted, before, atol=1e-3))
        gpt.merge_lora(model)
        torch.testing.assert_close(model(idx), adapted, atol=1e-5, rtol=0)
        self.assertEqual(model.state_dict().keys(), names)

    def test_the_scale_is_alpha_over_rank_in_any_torch_module(self):
        model, x = torch.nn.Sequential(torch.nn.Linear(3, 5)), torch.randn(4, 3)
        before = model(x)
        gpt.replace_linear_with_lora(model, rank=2, alpha=6)
        lora = model[0].lora
        torch.nn.init.normal_(lora.B)
        torch.testing.assert_close(model(x), before + 3.0 * (x @ lora.A @ lora.B))


class TestGeneration(unittest.TestCase):
    def test_cache_gives_the_plain_loop_s_tokens_also_past_the_context_window(self):
        model = tiny_model(context_length=16, drop_rate=0.5)
        for length, context_size in ((7, 16), (7, 8), (7, 100), (40, 16)):
            idx = torch.randint(0, 257, (3, length))
            expected = generate_text_simple(model.eval(), idx, 20, min(context_size, 16))
            torch.testing.assert_close(generate(model.train(), idx, 20, context_size), expected)
            self.assertTrue(model.training)           # dropout was off and is put back

    def test_several_tokens_onto_a_filled_cache_see_all_before_and_none_after(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 12))
        cache = gpt.KVCache(model, 2, 16)
        parts = [model.hidden_states(part, cache) for part in idx.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(idx))

    def test_each_row_of_a_batch_begins_and_ends_where_it_would_alone(self):
        model, ends = tiny_model(), set()
        model.out_head.weight.data[256] *= 4         # so that the end of text, 256, is often likely
        prompts = [torch.randint(0, 256, (n,)) for n in (3, 9, 1, 6, 4, 5, 2, 7)]
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=99)
        together = generate(model, padded, 20, 64, eos_id=256,
                            lengths=torch.tensor([len(p) for p in prompts]))[:, 9:]
        for row, prompt in zip(together.tolist(), prompts):
            alone = generate_text_simple(model, prompt[None], 20, 64)[0, len(prompt):].tolist()
            end = [*alone, 256].index(256)
            self.assertEqual(row, (alone[:end] + [256] * 20)[:len(row)])
            ends.add(end)
        self.assertGreater(len(ends), 3)
        self.assertEqual(len(row), min(20, max(ends) + 1))             # when all have ended

    def test_a_single_row_is_multiplied_as_many_rows_are(self):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            layer, x = gpt.Linear(300, 77).to(dtype), torch.randn(4, 300).to(dtype)
            with torch.no_grad():
                single = torch.cat([layer(row[None]) for row in x])
                torch.testing.assert_close(single, layer(x), atol=tolerance, rtol=tolerance)

    def test_sampling_follows_temperature_top_k_and_top_p(self):
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        for options, expected in [
                ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),   # squares, normalised
                ({"temperature": 1e-38}, [1, 0, 0, 0]), ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
                ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
                ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]), ({"top_p": 0.01}, [1, 0, 0, 0])]:
            probs = gpt.next_token_probs(logits, **options)
            torch.testing.assert_close(probs, torch.tensor([expected]).float(), msg=str(options))
        drawn = gpt.sample_next(logits.repeat(20_000, 1), 1.0)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(shares, logits.exp()[0], atol=0.015, rtol=0)
        self.assertEqual(gpt.sample_next(logits, 0.0).tolist(), [0])


# ---------------------------------------------------------------------------------------------
# gpt.py: what the scripts share

class TestCheckpoint(InFolder):
    def test_model_tokenizer_and_extras_come_back(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}
        tokenizer = gpt.make_tokenizer("mine", ranks, r"\S+|\s+")
        model, idx = tiny_model(vocab_size=259, tie_embeddings=True), torch.arange(9)[None]
        gpt.save_checkpoint("a/b.pt", model, tokenizer, names=["x"])
        self.assertEqual(os.listdir("a"), ["b.pt"])                    # no temporary file stays
        again, tokenizer2, extras = gpt.load_checkpoint("a/b.pt")
        self.assertEqual((extras["names"], extras["config"]), (["x"], model.cfg))
        self.assertEqual(*(t.encode("the thing<|endoftext|>", allowed_special="all")
                           for t in (tokenizer, tokenizer2)))
        self.assertTrue(torch.equal(again(idx), model(idx)))           # without dropout
        self.assertIs(again.out_head.weight, again.tok_emb.weight)

        # A classifier's head is its own; the embedding stays as it was.
        gpt.replace_head(model, 3)
        gpt.save_checkpoint("c.pt", model, tokenizer, class_names=list("abc"))
        classifier, _, extras = gpt.load_checkpoint("c.pt", kind="classifier")
        self.assertEqual((classifier(idx).shape, extras["class_names"]), ((1, 9, 3), list("abc")))
        self.assertTrue(torch.equal(classifier.tok_emb.weight, again.tok_emb.weight))

    def test_a_foreign_or_broken_file_is_one_sentence_with_what_makes_a_fit_one(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("owned",)

        good = torch.load("tiny.pt", weights_only=True)
        broken = {**good["model"], "final_norm.scale": torch.full((16,), math.nan)}
        self.write("cut.pt", Path("tiny.pt").read_bytes()[:5000])
        for number, changes in enumerate([
                {"kind": Evil()}, {"kind": "classifier"}, {"model": {}}, {"model": broken},
                {"tokenizer": "text.txt"}, {"tokenizer": {"pat_str": ".", "tokens": ["AA=="]}},
                *({"config": {**good["config"], **change}} for change in (
                    {"n_heads": 0}, {"n_heads": 3}, {"n_layers": 10**7}, {"emb_dim": 32},
                    {"vocab_size": 9}))]):
            torch.save({**good, **changes}, f"{number}.pt")
        for path in {*Path().iterdir()} - {Path("tiny.pt")} | {Path("none.pt")}:
            with self.subTest(path=path), self.assertRaisesRegex(
                    UserError, r"\A[^\n]*checkpoint[^\n]*python pretrain.py\Z"):
                gpt.load_checkpoint(path)
        self.assertFalse(Path("owned").exists())

    def test_a_failed_write_keeps_the_old_file(self):
        before = Path("tiny.pt").read_bytes()
        with mock.patch("torch.save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaises(OSError):
                gpt.save_checkpoint("tiny.pt", tiny_model(), BYTES)
        self.assertEqual((Path("tiny.pt").read_bytes(), list(Path().glob("*.tmp"))), (before, []))


class TestTerminal(InFolder):
    def test_text_is_shown_without_what_could_steer_the_terminal(self):
        self.assertEqual(gpt.printable("naïve 你好 👨\u200d👩 \x1b[2Jb\r\n\tc\u202ed\x07"),
                         "naïve 你好 👨\u200d👩 \ufffd[2Jb\n\tc\ufffdd\ufffd")

    def test_pieces_of_a_file_join_to_the_whole_and_have_its_tokens(self):
        text = "Some words, \n\n  and more\tof them 12345. " * 40
        for content, pattern in ((text, gpt.GPT2_SPLIT_PATTERN), ("é" * 1000, "é")):
            self.write("t.txt", content)
            pieces = list(gpt.read_text_pieces("t.txt", size=101))
            self.assertEqual([chunk for p in pieces for chunk in tok.regex.findall(pattern, p)],
                             tok.regex.findall(pattern, content))
            self.assertEqual(("".join(pieces), max(map(len, pieces)) < 250), (content, True))

    def test_gpt_py_writes_the_same_text_for_the_same_seed(self):
        run = "gpt.py --checkpoint tiny.pt --prompt The --max-new-tokens 20 --dtype float32 "
        first, again, other = (self.ok(run + f"--top-p 0.99 --seed {seed}") for seed in (4, 4, 5))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)
        self.ok("gpt.py --checkpoint tiny.pt --prompt '' --max-new-tokens 3")   # a new document
        ids = generate_text_simple(gpt.load_checkpoint("tiny.pt")[0],
                                   gpt.text_to_token_ids("The", BYTES), 20, 64)
        self.assertEqual(self.ok(run + "--temperature 0"),
                         gpt.printable(gpt.token_ids_to_text(ids, BYTES)) + "\n")

    def test_attention_weights_are_the_model_s_own(self):
        model, idx = tiny_model(spread=0.3), torch.randint(0, 257, (1, 9))
        att_weights = gpt.attention_weights(model, idx, layer=0)               # (H, T, T)
        torch.testing.assert_close(att_weights.tril().sum(dim=-1), torch.ones(2, 9))
        block = model.trf_blocks[0]
        x = block.norm1(model.tok_emb(idx) + model.pos_emb(torch.arange(9)))
        values = block.att.W_value(x)[0].unflatten(-1, (2, 8)).transpose(0, 1)  # (H, T, D)
        context_vec = (att_weights @ values).transpose(0, 1).flatten(1)
        torch.testing.assert_close(block.att.out_proj(context_vec), block.att(x)[0])

    def test_the_walk_and_explain_show_what_the_model_does(self):
        out = self.ok("gpt.py")
        for part in ("124,439,808", "(1, 4, 768)", "(1, 12, 4, 4)", "(1, 4, 50257)"):
            self.assertIn(part, out)
        out = self.ok("gpt.py --checkpoint tiny.pt --explain --prompt 'abc\x1b[2J é'")
        self.assertNotIn("\x1b", out)
        ids = gpt.text_to_token_ids("abc\x1b[2J é", BYTES)
        probs = gpt.load_checkpoint("tiny.pt")[0](ids)[0, -1].softmax(dim=-1)
        self.assertIn(f"{probs.max().item():.1%}", out)
        command = ["--checkpoint", "tiny.pt", "--explain", "--prompt", "long words " * 4]
        done = subprocess.run([sys.executable, str(ROOT / "gpt.py"), *command], timeout=60,
                              capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        self.assertIn(b"##", done.stdout)                 # plain shades where there is no UTF-8
        tables = done.stdout.decode().split("likeliest")[1]
        self.assertLessEqual(max(map(len, tables.split("\n"))), 80)

    @unittest.skipUnless(Path("/dev/full").exists(), "needs /dev/full (Linux)")
    def test_a_full_disk_behind_standard_output_is_a_sentence(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([sys.executable, str(ROOT / "gpt.py")], stdout=full,
                                  stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Agpt.py: .*No space left.*\n\Z")


FILE = bytes(range(256)) * 800  # 204,800 bytes, and the answers of a server that has them
FILE_SHA256 = hashlib.sha256(FILE).hexdigest()


def answer(status, body=b"no", *headers):
    return lambda request: send(request, body, status, headers=headers)


whole = answer(200, FILE)


def ranged(request):
    start = int((request.headers["Range"] or "bytes=0-")[6:-1])
    where = f"bytes {start}-{len(FILE) - 1}/{len(FILE)}"
    status = 200 if start == 0 else 206 if start < len(FILE) else 416   # 416: there is no such rest
    send(request, FILE[start:], status, headers=[("Content-Range", where)])


def cut(request):  # half, then the connection is closed
    send(request, FILE[:100_000], length=len(FILE))
    request.close_connection = True


def stall(request):  # half, then silence
    send(request, FILE[:100_000], length=len(FILE))
    time.sleep(1)


class TestDownload(InFolder):
    """Each case gives the server a list of answers, one per request; the last one repeats."""

    def setUp(self):
        super().setUp()

        def next_answer(request):
            self.asked.append(request.headers["Range"])
            (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)

        self.url = serve(self, next_answer)

    def fetch(self, answers, urls, sha256=None):
        self.asked, self.answers = [], list(answers)
        quietly(gpt.download, urls, "deep/file.bin", sha256, timeout=0.5)
        return Path("deep/file.bin").read_bytes()

    def test_what_arrives_whole(self):
        path, part = Path("deep/file.bin"), Path("deep/file.bin.part")
        rest = [None, "bytes=98304-"]                              # six reads of 16 KB had come
        moved = [("Location", "/cdn"), ("X-Linked-Etag", f'"{FILE_SHA256}"')]
        elsewhere = answer(206, b"abc", ("Content-Range", "bytes 7-9/204800"))
        for before, answers, sha256, asked in [
                (b"", [whole], None, [None]),
                (b"", [cut, ranged], None, rest),
                (b"", [stall, ranged], FILE_SHA256, rest),
                (b"", [cut, whole], None, rest),                   # the server ignores the range
                (b"", [cut, elsewhere, whole], None, [*rest, None]),
                (b"", [answer(302, b"", *moved), whole], None, [None, None]),
                (b"", [answer(404), whole], None, [None, None]),   # the next address
                (b"", [answer(200, b"<html>", ("Content-Type", "text/html")), whole], None,
                 [None, None]),
                (FILE[:5000], [ranged], FILE_SHA256, ["bytes=5000-"]),
                (b"x" * 5000, [ranged], FILE_SHA256, ["bytes=5000-", None]),   # of another file
                (FILE + b"more", [ranged], FILE_SHA256, ["bytes=204804-", None])]:
            self.write(part, before)
            content = self.fetch(answers, [self.url, self.url + "2"], sha256)
            self.assertEqual((content == FILE, self.asked, part.exists()), (True, asked, False))
            path.unlink()
        self.write(path, b"mine")                                  # is used without any network
        self.assertEqual((self.fetch([whole], [self.url]), self.asked), (b"mine", []))

    def test_what_fails_names_every_address_and_the_place_for_the_file(self):
        nobody = "http://127.0.0.1:9/"
        for failure, word in [
                (answer(500), "500"), (answer(404), "404"), (answer(200, b""), "wrong content"),
                (answer(200, FILE, ("X-Linked-Etag", 64 * "0")), "wrong content"),
                (lambda request: time.sleep(1), "timed out")]:
            with self.assertRaises(UserError) as caught:
                self.fetch([failure], [nobody, self.url])
            for part in (nobody, "refused", self.url, word, str(Path("deep/file.bin"))):
                self.assertIn(part, str(caught.exception))
            self.assertFalse(Path("deep/file.bin").exists())


class TestTrainingRun(InFolder):
    def test_interrupted_at_any_step_and_resumed_a_run_ends_with_the_same_weights(self):
        run = ("pretrain.py --init tiny.pt --data text.txt --batch-size 4 --dtype float32 "
               "--out run.pt --max-steps 12 --eval-every 4 ")    # with dropout: chance matters
        self.ok(run)
        expected, log = weights("run.pt"), Path("run.csv").read_bytes()
        record, state = gpt.TrainingRun.record, Path("run-resume.pt")
        for stop_at in (1, 4, 7, 12):
            steps = itertools.count(1)

            def interrupted(*args):
                if next(steps) == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)          # as Ctrl-C does
                return record(*args)

            with mock.patch.object(gpt.TrainingRun, "record", interrupted):
                self.assertEqual(call(run)[0], 130)
            before = state.read_bytes()
            for flags in ("--batch-size 3", "--seed 9", "--max-steps 6", "--data data.tsv"):
                status, _, err = call(run + flags + " --resume")           # that is another run
                self.assertEqual((status, state.read_bytes()), (1, before))
                self.assertIn(f"another {flags.split()[0]}", err)
            self.ok(run + "--resume")
            self.assertTrue(torch.equal(weights("run.pt"), expected), stop_at)
            self.assertEqual((Path("run.csv").read_bytes(), state.exists()), (log, False))
        self.assertIn("run.pt is complete", self.ok(run + "--resume"))

    def test_killed_and_resumed_each_script_ends_with_the_same_weights(self):
        gpt.save_checkpoint("tiny.pt", tiny_model(spread=0.3, drop_rate=0.2), BYTES)
        for run in (PRETRAIN, CLASSIFY + "--train lora --epochs 99 ",
                    INSTRUCT + "--train lora --epochs 99 --no-responses "):
            run += "--max-steps 150 --eval-every 10 "
            process = subprocess.Popen([sys.executable, *shlex.split(f"{ROOT}/{run}")],
                                       stdout=subprocess.DEVNULL)
            while not Path("run-resume.pt").exists() and process.poll() is None:
                time.sleep(0.01)
            process.kill()                                       # SIGKILL: no chance to clean up
            process.wait()
            self.assertIn("resumed", self.ok(run + "--resume"))
            resumed, log = weights("run.pt"), Path("run.csv").read_bytes()
            self.ok(run)
            self.assertTrue(torch.equal(resumed, weights("run.pt")), run)
            self.assertEqual(Path("run.csv").read_bytes(), log)

    def test_the_best_model_is_kept_and_the_metrics_have_a_row_per_evaluation(self):
        run = INSTRUCT + "--no-responses --epochs 9 --lr 0.05 --eval-every 1 --max-steps "
        self.ok(run + "9")
        best, metrics = weights("run.pt"), self.metrics()
        self.assertEqual(metrics["step"].tolist(), list(range(10)))
        step = 1 + int(metrics["val_loss"][1:].argmin())
        self.assertLess(step, 9)                    # it is not simply the last
        self.ok(run + str(step))
        self.assertTrue(torch.equal(weights("run.pt"), best))

    def test_a_loss_that_is_not_finite_stops_each_script_and_keeps_the_checkpoint(self):
        for run in (PRETRAIN, CLASSIFY, INSTRUCT + "--no-responses "):
            self.ok(run + "--max-steps 2")
            before = weights("run.pt")
            status, _, err = call(run + "--max-steps 3 --lr 1e38 ")
            self.assertEqual(status, 1)
            self.assertRegex(err, "the loss is (nan|inf) after step")
            self.assertTrue(torch.equal(weights("run.pt"), before))

    def test_auto_dtype_follows_what_the_processor_reports(self):
        for has, expected in (("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
            with mock.patch.object(torch.cpu, "get_capabilities", return_value={has: True}):
                self.assertIs(gpt.pick_dtype("auto", "cpu"), expected)


# ---------------------------------------------------------------------------------------------
# pretrain.py

class TestPretraining(InFolder):
    def test_token_files_of_texts_that_are_gone_do_not_pile_up(self):
        for i in range(6):
            pretrain.tokens_on_disk([["ab"]], i, BYTES)
        self.assertEqual(len(list(Path("data").iterdir())), 4)
        in_use = pretrain.TokenRows(*pretrain.tokens_on_disk([["ab"]], "kept", BYTES), 0, 3, 1)
        for i in range(6):
            in_use.batch([0])
            pretrain.tokens_on_disk([["ab"]], i, BYTES)
        self.assertEqual(in_use.batch([0])[0].tolist(), [[97]])

    def test_rows_are_windows_and_targets_are_moved_by_one(self):
        data = pretrain.GPTDatasetV1("abcdefgh", BYTES, max_length=3, stride=2)
        rows = [(bytes(x.tolist()), bytes(y.tolist())) for x, y in data]
        self.assertEqual(rows, [(b"abc", b"bcd"), (b"cde", b"def"), (b"efg", b"fgh")])

    def test_loss_is_the_mean_of_minus_log_probability(self):
        model, (x, y) = tiny_model(), torch.randint(0, 257, (2, 2, 5))
        probs = torch.softmax(model(x), dim=-1)
        expected = -torch.stack([probs[b, t, y[b, t]].log() for b in range(2) for t in range(5)])
        loss, other = (pretrain.calc_loss_batch(*xy, model, "cpu") for xy in ((x, y), (y, x)))
        torch.testing.assert_close(loss, expected.mean())
        mean = pretrain.calc_loss_loader([(x, y), (y, x)], model, "cpu")
        self.assertAlmostEqual(mean, (loss + other).item() / 2, places=5)

    @needs("vocab.bpe", "the-verdict.txt")
    def test_seeded_training_gives_the_losses_of_the_book_s_own_code(self):
        os.chdir(ROOT)
        text = Path("data/the-verdict.txt").read_text(encoding="utf-8")
        loader = pretrain.create_dataloader_v1(text, 8, max_length=4, stride=4, shuffle=False)
        inputs, targets = next(iter(loader))               # printed in the book's section 2.6
        self.assertEqual(inputs[:2].tolist(), [[40, 367, 2885, 1464], [1807, 3619, 402, 271]])
        self.assertEqual(targets[:2].tolist(), [[367, 2885, 1464, 1807], [3619, 402, 271, 10899]])

        # The losses are those of the package llms-from-scratch 1.0.19, seeds and all.
        torch.manual_seed(123)
        loader = pretrain.create_dataloader_v1(text[:int(0.9 * len(text))], 2, 256, stride=256)
        torch.manual_seed(123)
        model = GPTModel({**TINY, "vocab_size": 50257, "context_length": 256, "emb_dim": 48,
                          "n_heads": 4}).train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1), []
        for x, y in itertools.chain(loader, loader):
            optimizer.zero_grad()
            loss = pretrain.calc_loss_batch(x, y, model, "cpu")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        np.testing.assert_allclose(losses[:10], [
            10.9837, 10.9965, 10.9899, 10.9854, 10.9826, 10.9601, 11.0129, 10.9683, 10.9233,
            10.9072], atol=1e-3)

    def test_the_simple_loop_learns_and_reports_every_evaluation(self):
        data, model = pretrain.GPTDatasetV1(TEXT, BYTES, 16, stride=16), tiny_model(drop_rate=0.0)
        loader = torch.utils.data.DataLoader(data, batch_size=8, drop_last=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train, val, seen = quietly(pretrain.train_model_simple, model, loader, loader, optimizer,
                                   "cpu", 2, eval_freq=10, eval_iter=2, start_context="The",
                                   tokenizer=BYTES)
        self.assertLess(train[-1], train[0] - 1)
        self.assertEqual(seen, [(10 * i + 1) * 8 * 16 for i in range(len(val))])

    def test_the_metrics_of_a_model_that_knows_nothing_and_whole_rows_only(self):
        t, V = tok.BPETokenizer(), 280
        t.train(TEXT, V)
        model = tiny_model(vocab_size=V)
        model.out_head.weight.data.zero_()                        # every token equally likely
        gpt.save_checkpoint("tiny.pt", model, t)
        self.ok("pretrain.py --init tiny.pt --data text.txt --batch-size 2 --max-steps 1 "
                "--out run.pt")
        ids = [*t.encode(TEXT), t.eot_token]
        held_out = ids[int(0.9 * len(ids)):]
        targets = held_out[1:(len(held_out) - 1) // 64 * 64 + 1]
        num_bytes = sum(len(t.decode_bytes([i])) for i in targets if i != t.eot_token)
        first, _ = self.metrics()
        np.testing.assert_allclose(
            [first["val_loss"], first["perplexity"], first["bits_per_byte"]],
            [math.log(V), V, len(targets) * math.log2(V) / num_bytes], rtol=1e-5)
        saved, tokenizer, _ = gpt.load_checkpoint("run.pt")            # model and tokenizer stay
        self.assertEqual((saved.cfg, tokenizer.encode(TEXT)), (model.cfg, t.encode(TEXT)))

    @needs("vocab.bpe", "the-verdict.txt")
    def test_the_book_s_verdict_has_nine_steps_an_epoch(self):
        for name in ("vocab.bpe", "the-verdict.txt"):
            self.write(f"data/{name}", (ROOT / "data" / name).read_bytes())
        self.ok("pretrain.py --preset verdict --epochs 2 --n-layers 1 --emb-dim 12 --out run.pt")
        self.assertEqual((self.metrics()["epoch"][-1], self.metrics()["step"][-1]), (2, 18))

    def test_documents_of_a_folder_are_joined_with_end_of_text_and_written_once(self):
        for name, text in (("b.txt", "two" * 50), ("empty.txt", ""), ("a.txt", "one" * 50),
                           ("sub/c.txt", "three" * 50), (".hidden", "no")):
            self.write("d/" + name, text)
        for _ in range(2):
            self.ok(PRETRAIN + "--data d --batch-size 1 --max-steps 1")
        [path] = Path("data").glob("tokens-*.bin")
        self.assertEqual(BYTES.decode(np.fromfile(path, np.uint16).tolist()),
                         "".join(word * 50 + "<|endoftext|>" for word in ("one", "two", "three")))

    def test_accumulated_batches_give_the_step_of_one_large_batch(self):
        results = []
        for split in ("--batch-size 6", "--batch-size 2 --grad-accum 3"):
            self.ok(PRETRAIN + f"--max-steps 3 {split}")
            results.append([weights("run.pt"), torch.tensor(self.metrics()["train_loss"][-1])])
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)

    def test_learning_rate_rises_then_falls_as_half_a_cosine(self):
        factors = [pretrain.lr_factor(i, 42, 4, 0.1) for i in range(43)]
        self.assertEqual(factors[:4], [0.25, 0.5, 0.75, 1.0])
        for step, factor in ((4, 1.0), (23, 0.55), (42, 0.1)):            # 23 is half-way
            self.assertAlmostEqual(factors[step], factor)
        self.assertEqual({pretrain.lr_factor(i, 14, 0, 1.0) for i in range(14)}, {1.0})

    def test_only_matrices_decay_and_every_parameter_has_one_optimizer(self):
        model = tiny_model(tie_embeddings=True)
        inside = {id(p) for p in model.trf_blocks.parameters() if p.ndim == 2}
        for name in ("adamw", "muon"):
            optimizers = pretrain.make_optimizers(model, name, 1.0, 0.1, torch.float32)
            held = [(id(p), group["weight_decay"] > 0) for optimizer in optimizers
                    for group in optimizer.param_groups for p in group["params"]]
            self.assertEqual(sorted(held), sorted((id(p), id(p) in inside)
                                                  for p in model.parameters()))

    def test_muon_moves_every_direction_equally_far(self):
        p = torch.nn.Parameter(torch.zeros(6, 3))
        p.grad = torch.randn(6, 3) * torch.tensor([20.0, 1.0, 0.5])    # very unequal columns
        pretrain.Muon([p], lr=1.0).step()
        singular_values = torch.linalg.svdvals(p.detach()) / math.sqrt(6 / 3)
        self.assertTrue(((singular_values > 0.6) & (singular_values < 1.3)).all())

    def test_gpt2_initial_values_shrink_where_a_block_adds(self):
        model = tiny_model(emb_dim=64, n_layers=8)
        pretrain.init_gpt2_weights(model, std=0.02)
        block = model.trf_blocks[0]
        for layer, std in ((block.ff.layers[0], 0.02), (block.ff.layers[2], 0.02 / 4),
                           (block.att.out_proj, 0.02 / 4)):            # 4: the root of 2 * 8
            self.assertAlmostEqual(layer.weight.std().item() / std, 1, delta=0.08)

    def test_presets_are_defaults_and_the_quick_one_needs_no_network(self):
        book = {**GPT_CONFIG_124M, "context_length": 256, "batch_size": 2, "lr": 4e-4,
                "weight_decay": 0.1, "epochs": 10, "max_steps": None, "clip": None}
        for flags, expected in [
                ("--preset verdict", book), ("--init x.pt", {"lr": 1e-4}),
                ("--size 355M --epochs 3", {"emb_dim": 1024, "epochs": 3, "max_steps": None})]:
            args = vars(pretrain.parse_arguments(flags.split()))
            self.assertEqual({name: args[name] for name in expected}, expected)
        self.assertIn("(default: 0.0006)", self.ok("pretrain.py --preset gpt2 --help"))
        with mock.patch("requests.get", side_effect=AssertionError("network used")):
            self.ok("pretrain.py --max-steps 2 --eval-batches 1 --n-layers 1 --emb-dim 12")
        self.assertTrue(Path("checkpoints/pretrained.pt").exists())

    def test_two_processes_give_the_losses_of_one(self):
        run = PRETRAIN + "--grad-accum 2 --batch-size 4 --max-steps 6 --eval-every 2"
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                               "2", "--standalone", *shlex.split(f"{ROOT}/{run}")],
                              capture_output=True, text=True, timeout=100)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        self.assertEqual(done.stdout.count("step 6 |"), 1)      # one process prints
        together = self.metrics()
        self.ok(run)
        for name in ("step", "train_loss", "val_loss"):
            np.testing.assert_allclose(together[name], self.metrics()[name], atol=1e-3)


# ---------------------------------------------------------------------------------------------
# tokenizer.py

STRINGS = [
    "", " ", " \n\n \t x  ", "a\r\nb\rc\x0bd\x0ce", "\x00\x01\x1b[31m\x1c\x1f\x7f\x85", "\n" * 300,
    "x" + " " * 1000 + "y", "tab\tand\u00a0nbsp\u2003em\u2028ls\u2029ps\u200bzero\ufeffbom",
    "e\u0301 n\u0303 \u0301\u0301 Z\u0351\u036b\u0343a\u0321 i\u0307 \u01c5 \ufb01 \u1e9e",
    "नमस्ते שלום مرحبا 你好世界 こんにちは 한국어", "👨\u200d👩\u200d👧 🇩🇪 👍🏽",
    "٠١٢ १२ １２ ½² Ⅷ 3.14 1,000",
    "I'm you're he's we've I'd they'll can't 'tis I'M YOU'RE HE'S WE'VE I'D THEY'LL CAN'T",
    "it's' 's's ''s 'll'l 'v've o'clock rock'n'roll \u2019s ... !!! ((())) $$$ a_b_c C++ x==y //",
    "<|unk|> <|endoftext|", "<|endoftext|>", "a<|endoftext|> b<|endoftext|><|endoftext|>",
    "a" * 5000, "é" * 2500, "".join(random.Random(2).choices("abcdefghij", k=20_000))]


def fuzz(seed, strings):
    """Strings with a fixed seed, of words, marks, white space and letters from everywhere."""
    r = random.Random(seed)
    parts = ["the", " quick", "'s", "'LL", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "1", "٣",
             "\u0301", "\u200d", "👍", "é", "ß", "<|endoftext|>", "_", "--", "中文", "\x1c"]
    return ["".join(r.choice(parts) if r.random() < 0.8 else chr(r.randrange(0x250))
                    for _ in range(r.randrange(60))) for _ in range(strings)]


class TestTokenizer(InFolder):
    @needs("the-verdict.txt")
    def test_ids_are_the_book_s(self):
        vocab = tok.build_vocab((ROOT / "data/the-verdict.txt").read_text(encoding="utf-8"))
        ids = tok.SimpleTokenizerV1(vocab).encode(
            '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.')
        self.assertEqual((len(vocab), ids), (1132, [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596,
                                                    5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]))
        v2, text = tok.SimpleTokenizerV2(vocab), "do you like tea? <|endoftext|> In the sunlit "
        ids = v2.encode("Hello, " + text + "terraces of the palace.")
        self.assertEqual(ids, [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988,
                               1131, 7])
        self.assertEqual(v2.decode(ids), "<|unk|>, " + text + "terraces of the <|unk|>.")
    def test_wikipedia_s_example(self):
        # aaabdaaabac -> ZabdZabac (Z = aa) -> ZYdZYac (Y = ab) -> XdXac (X = ZY)
        merges, ids = tok.train_simple("aaabdaaabac", 3)
        self.assertEqual(merges, [((97, 97), 4), ((97, 98), 2), ((256, 257), 2)])
        t = tok.BPETokenizer()
        t.train("aaabdaaabac", 260)
        self.assertEqual((ids, t.encode("aaabdaaabac")), ([258, 100, 258, 97, 99],) * 2)

    def test_the_fast_trainer_makes_the_merges_of_the_slow_one(self):
        """`merge_once` on all chunks in one row, twice each, with a unique number after each."""
        for seed in range(60):
            r = random.Random(seed)
            chunks = {bytes(r.choices(b"abc", k=r.choice([1, 3, 8, 30]))): r.randint(1, 9)
                      for _ in range(8)}
            unique, row = itertools.count(10**6), []
            for chunk in [*Counter(chunks).elements()] * 2:
                row += [*chunk, next(unique)]
            tokens, expected = [bytes([b]) for b in range(256)], []
            while True:
                (left, right), count, merged = tok.merge_once(row, len(tokens))
                if count == 1:                               # only the unique numbers are left
                    break
                row = merged
                tokens.append(tokens[left] + tokens[right])
                expected.append((tokens[left], tokens[right], count // 2))
            self.assertEqual(list(tok.learn_merges(chunks)), expected)

    @needs("vocab.bpe", "tiktoken")
    def test_gpt2_s_tokens_are_tiktoken_s(self):
        os.chdir(ROOT)
        ours, theirs = tok.BPETokenizer.from_gpt2(), tiktoken.get_encoding("gpt2")
        self.assertEqual((ours.name, ours.n_vocab, ours.eot_token), ("gpt2", 50257, 50256))
        self.assertEqual(gpt.load_tokenizer("gpt2")._mergeable_ranks, theirs._mergeable_ranks)
        for text, allowed in itertools.product(STRINGS + fuzz(seed=1, strings=1000),
                                               (set(), {"<|endoftext|>"})):
            ids = ours.encode(text, allowed_special=allowed)
            self.assertEqual(ids, theirs.encode(text, allowed_special=allowed,
                                                disallowed_special=()), text[:80])
            self.assertEqual(ours.decode(ids), text)
        half = list(range(50257))[::-7]                     # any IDs, also half characters
        self.assertEqual(ours.decode(half), theirs.decode(half))

    def test_a_trained_vocabulary_round_trips_any_text_and_tiktoken_reads_it(self):
        texts = STRINGS + fuzz(seed=4, strings=300)
        for name in ("a.tiktoken", "b.tiktoken"):
            ours = tok.BPETokenizer()
            ours.train(texts[::2], 600)
            ours.save(name)
        self.assertEqual(Path("a.tiktoken").read_bytes(), Path("b.tiktoken").read_bytes())
        again, theirs = tok.BPETokenizer.load("a.tiktoken"), gpt.load_tokenizer("a.tiktoken")
        self.assertEqual((ours.n_vocab, theirs.n_vocab, ours.eot_token), (600, 600, 599))
        for text in texts:
            ids = ours.encode(text, allowed_special="all")
            self.assertEqual(ids, again.encode(text, allowed_special="all"))
            self.assertEqual(ids, theirs.encode(text, allowed_special="all"))
            self.assertEqual(ours.decode(ids), text)
            streamed = "".join(gpt.decode_stream(ids, theirs))   # characters of several tokens too
            self.assertEqual(streamed, text)
        self.assertTrue(torch.equal(*(gpt.text_to_token_ids(TEXT, t) for t in (ours, theirs))))

    def test_pieces_train_as_the_whole_and_the_end_of_text_is_not_learned(self):
        text = "the cat sat on the mat; the cat ate the rat. " * 20  # 45 characters
        whole, pieces, t = (tok.BPETokenizer() for _ in range(3))
        whole.train(text, 270)
        pieces.train((text[i:i + 45] for i in range(0, len(text), 45)), 270)
        self.assertEqual(whole._mergeable_ranks, pieces._mergeable_ranks)
        quietly(t.train, "<|endoftext|>ab ab<|endoftext|>ab ab" * 9, 5000)
        self.assertEqual(list(t._mergeable_ranks)[256:], [b"ab", b" ab"])   # the text has no more

    def test_what_is_no_vocabulary_is_a_sentence(self):
        tok.BPETokenizer().save("good.tiktoken")
        good = Path("good.tiktoken").read_text(encoding="ascii")
        for broken in ("", "é", "AA== 0 1", good[8:], *(good + line for line in (
                "!!!! 256\n", "enp6 999\n", "AA== 256\n"))):
            self.write("bad.tiktoken", broken)
            with self.assertRaisesRegex(UserError, "bad.tiktoken is not a rank file"):
                gpt.load_tokenizer("bad.tiktoken")
        self.write("data/vocab.bpe", "#version\na b\n")
        with self.assertRaisesRegex(UserError, "not GPT-2's vocab.bpe"):
            gpt.load_tokenizer("gpt2")

    def test_a_text_without_white_space_is_cut_into_equal_chunks(self):
        counts = Counter()
        tok.count_chunks("a" * 5_000_500, counts)
        self.assertEqual(counts, {"a" * 1000: 5000, "a" * 500: 1})

    def test_the_walk_needs_no_file_and_the_commands_train_and_encode(self):
        self.assertIn("KeyError: 'pancakes'", self.ok("tokenizer.py"))
        out = self.ok("tokenizer.py train text.txt --vocab-size 280 --out my.tiktoken")
        self.assertIn("bytes per token", out)
        text = "mat\x1b<|endoftext|>"
        out = self.ok(f"tokenizer.py encode --tokenizer my.tiktoken '{text}' --allow-special")
        ids = tok.BPETokenizer.load("my.tiktoken").encode(text, "all")
        self.assertEqual(out.split("\n")[0], " ".join(map(str, ids)))
        self.assertNotIn("\x1b", out)                      # shown, not obeyed


# ---------------------------------------------------------------------------------------------
# load_gpt2.py. Small files in both formats, and GPT-2 in numpy to say what the logits must be.

V, T, C, H, L = 400, 16, 32, 2, 11  # 11 blocks: h10 comes before h2 in sorted order
GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
              "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
              "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
              "mlp.c_proj": "ffn_down"}


def random_gpt2():
    """{the hub's name: float32 array} of a tiny GPT-2, every array different."""
    rng, shapes = np.random.default_rng(0), {}
    for i in range(L):
        for name, shape in {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
                            "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    shapes |= {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_gpt2(w, ids):
    """Logits (T, V) of token IDs (T,), after Radford et al. 2019."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    w = {name: array.astype(np.float64) for name, array in w.items()}
    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for i in range(L):
        q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        heads = []
        for h in np.split(np.arange(C), H):
            scores = q[:, h] @ k[:, h].T / np.sqrt(C // H)
            scores = np.exp(np.where(np.tri(len(ids)) == 1, scores, -np.inf))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, h])
        x = x + linear(np.concatenate(heads, axis=-1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def write_safetensors(path, arrays, change=lambda header: None, dtype="F32"):
    """`arrays` as {name: array}; `change` may alter the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(change(header) or header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_gguf(path):
    """(keys, {tensor's name: array}) of a GGUF file, after llama.cpp's description."""
    data, at = path.read_bytes(), 24

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text():
        return take(f"{take('Q')}s").decode()

    def value(kind):
        if kind == 9:
            item, count = take("IQ")
            return [value(item) for _ in range(count)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    keys = {text(): value(take("I")) for _ in range(num_keys)}
    infos = [(text(), np.atleast_1d(take(f"{take('I')}Q"))[::-1], *take("IQ"))
             for _ in range(num_tensors)]
    tensors, start = {}, at + -at % 32
    for name, shape, kind, offset in infos:
        if kind == 0:
            array = np.frombuffer(data, "<f4", math.prod(shape), start + offset)
        else:                                    # 8: blocks of 32 rounded numbers with one scale
            blocks = np.frombuffer(data, [("scale", "<f2"), ("numbers", "i1", 32)],
                                   math.prod(shape) // 32, start + offset)
            array = blocks["numbers"] * blocks["scale"][:, None].astype(np.float32)
        tensors[name] = array.reshape(shape)
    return keys, tensors


def tensorflow_name(hub_name):
    """h.3.attn.c_attn.weight -> model/h3/attn/c_attn/w, as OpenAI names it."""
    name = re.sub(r"^h\.(\d+)\.", r"h\1/", hub_name).replace(".", "/")
    name = re.sub(r"(ln_\w)/weight", r"\1/g", name).replace("/weight", "/w").replace("/bias", "/b")
    return "model/" + name.replace("wte/w", "wte").replace("wpe/w", "wpe")


class TestLoadGPT2(InFolder):
    FILE = Path("hub/model.safetensors")

    def setUp(self):
        super().setUp()
        self.weights = random_gpt2()
        self.write("hub/config.json", json.dumps({"n_head": H, "vocab_size": V}))
        write_safetensors(self.FILE, self.weights)
        arrays = {tensorflow_name(name): array for name, array in self.weights.items()}
        self.write("tf/model.ckpt.data-00000-of-00001",
                   b"".join(arrays[name].tobytes() for name in sorted(arrays)))
        self.write("tf/hparams.json", json.dumps(
            {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}))

    def check_logits(self, model, tolerance=2e-4):
        ids = [0, 299, 7, 7, 42]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(logits, numpy_gpt2(self.weights, ids), atol=tolerance, rtol=1e-4)

    @needs("gpt2-tiny-hf", "gpt2-tiny-tf")
    def test_files_of_transformers_and_tensorflow_give_transformers_logits(self):
        expected = np.load(ROOT / "data" / "gpt2-tiny-tf" / "expected_logits.npz")
        for name in ("gpt2-tiny-hf", "gpt2-tiny-tf"):
            with torch.no_grad():
                logits = load_gpt2.load_local(ROOT / "data" / name)(
                    torch.from_numpy(expected["ids"])).numpy()
            self.assertLess(np.abs(logits - expected["logits"]).max(), 2e-5, name)

    def test_every_format_and_spelling_gives_the_logits_of_gpt2_in_numpy(self):
        for source in ("hub", self.FILE, "tf"):
            self.check_logits(load_gpt2.load_local(source))
        masks = {"transformer.h.3.attn.bias": np.ones((1, 1, T, T), np.float32)}
        write_safetensors(self.FILE, masks | {f"transformer.{name}": array
                                              for name, array in self.weights.items()})
        self.check_logits(load_gpt2.load_local("hub"))
        halves = {name: array.astype(np.float16) for name, array in self.weights.items()}
        write_safetensors(self.FILE, halves, dtype="F16")
        self.check_logits(load_gpt2.load_local("hub"), tolerance=0.3)
        upper = {name: array.view(np.uint16)[..., 1::2] for name, array in self.weights.items()}
        write_safetensors(self.FILE, upper, dtype="BF16")         # a float32's upper 16 bits
        self.weights = {name: (array.astype(np.uint32) << 16).view(np.float32)
                        for name, array in upper.items()}
        self.check_logits(load_gpt2.load_local("hub"))

    def test_params_are_the_book_s_tree_and_load_into_a_model(self):
        Path("models").mkdir()
        Path("tf").rename("models/124M")
        settings, params = load_gpt2.download_and_load_gpt2("124M", "models")
        self.assertEqual((settings["n_head"], settings["n_layer"]), (H, L))
        np.testing.assert_array_equal(params["blocks"][10]["mlp"]["c_fc"]["w"],
                                      self.weights["h.10.mlp.c_fc.weight"])
        cfg = {"vocab_size": V, "context_length": T, "emb_dim": C, "n_layers": L, "qkv_bias": True}
        model = tiny_model(**cfg)
        load_gpt2.load_weights_into_gpt(model, params)
        self.check_logits(model)
        with self.assertRaisesRegex(UserError, "qkv_bias True"):
            load_gpt2.load_weights_into_gpt(tiny_model(**cfg | {"qkv_bias": False}), params)
        del params["blocks"][3]["attn"]["c_proj"]["b"]
        with self.assertRaisesRegex(UserError, "h3/attn/c_proj/b"):
            load_gpt2.load_weights_into_gpt(model, params)

    def test_files_that_are_cut_damaged_or_hostile_are_a_sentence(self):
        def fails(words, folder="hub"):
            with self.assertRaisesRegex(UserError, words):
                load_gpt2.load_local(folder)

        for change in ({"dtype": "I64"}, {"shape": [V, C, 1]}, {"shape": [-V, -C]},
                       {"data_offsets": [0, 10**12]}, {"data_offsets": [-38400, 0]},
                       {"data_offsets": [0.0, 4.0 * V * C]}):
            write_safetensors(self.FILE, self.weights, lambda h: h["wte.weight"].update(change))
            fails("wte.weight|config.json|a complete GPT-2")
        write_safetensors(self.FILE, self.weights, lambda h: h.pop("h.3.mlp.c_fc.bias") and None)
        fails("h.3.mlp.c_fc.bias")
        for content in (b"", b"\xff" * 100, struct.pack("<Q", 9) + b"{" * 9):
            self.write(self.FILE, content)
            fails("not a complete GPT-2")
        write_safetensors(self.FILE, self.weights)
        for config in ("", "[]", '{"n_head": 5}', '{"n_head": 0}', '{"model_type": "llama"}',
                       '{"n_layer": 1000000}'):
            self.write("hub/config.json", config)
            fails("a complete GPT-2")
        data = Path("tf/model.ckpt.data-00000-of-00001")
        for content in (data.read_bytes()[:-1], data.read_bytes() + b"x"):
            self.write(data, content)
            fails("bytes", folder="tf")

    @needs("vocab.bpe")
    def test_from_a_folder_to_a_checkpoint_that_writes(self):
        self.write("data/vocab.bpe", (ROOT / "data/vocab.bpe").read_bytes())
        out = self.ok("load_gpt2.py --from hub --out a.pt --max-new-tokens 3")
        self.assertIn("Every effort moves you", out)
        model, tokenizer, _ = gpt.load_checkpoint("a.pt")
        self.check_logits(model)
        self.assertEqual((tokenizer.n_vocab, tokenizer.decode(tokenizer.encode("né"))), (V, "né"))

    def export(self, tokenizer, *paths):
        """Load what is in hub/ and write it for other software."""
        model = load_gpt2.load_local("hub")
        gpt.save_checkpoint("m.pt", model, tokenizer, prompt_texts=instruct.PROMPT_STYLES["phi3"])
        for path in paths:
            self.ok(f"load_gpt2.py --checkpoint m.pt --export {path}")

    def test_an_exported_folder_is_read_again_with_or_without_a_head_of_its_own(self):
        trained = tok.BPETokenizer()
        trained.train(TEXT + " ".join(fuzz(seed=7, strings=50)), V)
        for tokenizer in (BYTES, trained):
            self.export(tokenizer, "my-gpt/")
            self.ok("load_gpt2.py --from my-gpt --out back.pt")
            back, again, _ = gpt.load_checkpoint("back.pt")
            self.check_logits(back)
            self.assertEqual(again.encode(TEXT), tokenizer.encode(TEXT))
            self.weights["lm_head.weight"] = self.weights["wte.weight"] + 1
            write_safetensors(self.FILE, self.weights)

        # Other software goes by the list of merges: replayed in its order, it gives our tokens.
        contents = json.loads(Path("my-gpt/tokenizer.json").read_text(encoding="utf-8"))["model"]
        order = {tuple(pair): i for i, pair in enumerate(contents["merges"])}
        letters = {byte: letter for letter, byte in gpt.BYTE_OF_LETTER.items()}
        for text in STRINGS[:-3] + fuzz(seed=8, strings=100):
            ids = []
            for chunk in tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, text):
                parts = [letters[byte] for byte in chunk.encode()]
                while pairs := [pair for pair in zip(parts, parts[1:]) if pair in order]:
                    i = list(zip(parts, parts[1:])).index(min(pairs, key=order.get))
                    parts[i:i + 2] = [parts[i] + parts[i + 1]]
                ids += [contents["vocab"][part] for part in parts]
            self.assertEqual(ids, trained.encode(text), text)

    def test_a_gguf_file_has_every_tensor_key_and_the_prompt(self):
        self.weights["lm_head.weight"] = self.weights["wte.weight"] + 1
        write_safetensors(self.FILE, self.weights)
        self.export(BYTES, "m.gguf", "small.gguf --quantize q8_0")
        (keys, tensors), (_, rounded) = map(read_gguf, (Path("m.gguf"), Path("small.gguf")))
        for hub_name, array in self.weights.items():
            block, name, ending = re.fullmatch(r"(h\.\d+\.)?(.*)\.(\w+)", hub_name).groups("")
            name = block.replace("h.", "blk.") + GGUF_NAMES[name] + "." + ending
            array = array.T if ".c_" in hub_name else array           # linear layers are (out, in)
            np.testing.assert_array_equal(tensors.pop(name), array)
            errors = np.abs(rounded.pop(name) - array).reshape(-1, 32).max(axis=1)
            if array.ndim == 2 and name != "position_embd.weight":    # half of a 127th, at most
                self.assertTrue((0 < errors).all())
                errors -= np.abs(array).reshape(-1, 32).max(axis=1) / 200
            self.assertLessEqual(errors.max(), 0)
        self.assertEqual((tensors, rounded), ({}, {}))
        self.assertEqual((keys["gpt2.block_count"], len(keys["tokenizer.ggml.tokens"]),
                          keys["tokenizer.ggml.eos_token_id"]), (L, V, 256))
        modelfile = Path("m.Modelfile").read_text(encoding="utf-8")
        for text in (keys["tokenizer.chat_template"], modelfile):
            self.assertIn("<|assistant|>", text)


# ---------------------------------------------------------------------------------------------
# finetune_classifier.py

class TestClassifier(InFolder):
    @needs("SMSSpamCollection")
    def test_the_sms_file_has_all_its_messages_and_splits_as_in_the_book(self):
        examples = quietly(clf.read_labelled_texts, ROOT / "data" / "SMSSpamCollection")
        self.assertEqual(Counter(label for label, _ in examples), {"ham": 4827, "spam": 747})
        balanced = clf.create_balanced_dataset(examples, seed=5)
        self.assertEqual(Counter(label for label, _ in balanced), {"ham": 747, "spam": 747})
        parts = clf.random_split(balanced, 0.7, 0.1, seed=5)
        self.assertEqual([len(part) for part in parts], [1045, 149, 300])
        self.assertEqual(Counter(sum(parts, [])), Counter(balanced))     # nobody lost or doubled

    def test_tables_with_quotes_and_columns_by_header_by_number_and_by_default(self):
        stars = [("5", "good"), ("1", 'bad "')] * 10
        tsv = "id\ttext\tstars\n" + "".join(f"7\t{text}\t{label}\r\n" for label, text in stars)
        quoted = [("a", 'he said "hi",\nthen left'), ("b", "y, z")] * 10
        with io.StringIO(newline="") as file:
            csv.writer(file).writerows([("label", "text"), *quoted])
            in_quotes = "\ufeff" + file.getvalue()                   # with Excel's byte order mark
        for name, content, columns, expected in [
                ("t.csv", in_quotes, (), quoted), ("t.tsv", tsv, ("text", "stars"), stars),
                ("t.tsv", tsv, ("TEXT", "3"), stars), ("t.tsv", tsv, (None, "stars"), stars)]:
            self.write(name, content)
            self.assertEqual(quietly(clf.read_labelled_texts, name, *columns), expected)

    def test_download_takes_the_expected_file_only_and_tries_the_mirror(self):
        content, file = b"ham\thello\n", io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../evil", "no")
            archive.writestr("SMSSpamCollection", content)
        answers = {"/none": (b"", 404), "/bad": (b"not a zip file",), "/good": (file.getvalue(),)}
        url = serve(self, lambda request: send(request, *answers[request.path]))
        urls = [url + name for name in ("none", "bad", "good")]
        path = quietly(clf.download_and_unzip_spam_data, urls, "sub/SMSSpamCollection",
                       hashlib.sha256(content).hexdigest())
        self.assertEqual((path.read_bytes(), os.listdir("sub")), (content, ["SMSSpamCollection"]))
        with self.assertRaisesRegex(UserError, "(?s)404.*/bad.*/good.*SHA-256"):
            quietly(clf.download_and_unzip_spam_data, urls, "other/SMSSpamCollection")

    def test_padding_never_changes_a_result(self):
        """Against the plain model, a row at a time, read at its last token."""
        texts = ["a", "short text", "a longer text than the others " * 2, "mid length text"]
        ids = [torch.tensor(BYTES.encode(text)) for text in texts]
        for num_layers in (1, 2):
            model = tiny_model(spread=0.3, n_layers=num_layers)
            gpt.replace_head(model, 3)
            with torch.no_grad():
                truth = torch.stack([model(row[None])[0, -1] for row in ids])
                x, lengths = clf.pad(ids)
                wider = torch.cat([x, torch.full((4, 64 - x.shape[1]), 99)], dim=1)
                torch.testing.assert_close(clf.classify_batch(model, wider, lengths), truth)
            probs = quietly(clf.classify_texts, texts, model, BYTES, "cpu")
            torch.testing.assert_close(probs, truth.softmax(dim=-1))
            best = truth.argmax(dim=-1)
            self.assertEqual([clf.classify_review(text, model, BYTES, "cpu", "xyz")
                              for text in texts], ["xyz"[i] for i in best])

            # Three of the four texts get the right label, all in the first of two batches.
            data = list(zip(ids, [*best[:3], (best[3] + 1) % 3]))
            loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=clf.collate)
            accuracies = [clf.calc_accuracy_loader(loader, model, "cpu", n) for n in (None, 1)]
            self.assertEqual(accuracies, [3 / 4, 1])

    def test_the_run_is_the_plain_loop_on_the_whole_model(self):
        """Frozen part kept, computed afresh, and the simple loop: the same weights."""
        train, val = (clf.SpamDataset(part, BYTES, 64) for part in clf.random_split(
            clf.create_balanced_dataset(quietly(clf.read_labelled_texts, "data.tsv")))[:2])
        order = np.concatenate([np.random.default_rng([123, epoch]).permutation(len(train))
                                for epoch in (0, 1)])       # each text once, in a new order
        for mode, learns in {
                "head": r"out_head", "last-block": r"out_head|final_norm|trf_blocks\.1", "all": "",
                "lora": r"out_head|trf_blocks.*(W_\w+|out_proj|layers\.\d)\.weight"}.items():
            run = CLASSIFY + f"--train {mode} --max-steps 9 --eval-every 9 "
            self.ok(run)
            kept = weights("run.pt")
            self.ok(run + "--keep-limit 0")
            torch.testing.assert_close(weights("run.pt"), kept, atol=1e-4, rtol=0)

            model = gpt.load_checkpoint("tiny.pt")[0]
            start = {name: t.clone() for name, t in model.state_dict().items()}
            torch.manual_seed(123)
            gpt.replace_head(model, 2)
            clf.freeze(model, mode)                         # dropout too: off, as in the book
            loader = torch.utils.data.DataLoader(train, collate_fn=clf.collate,
                                                 batch_sampler=order[:72].reshape(9, 8).tolist())
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          lr=0.01, weight_decay=0.1)
            quietly(clf.train_classifier_simple, model, loader, loader, optimizer, "cpu", 1, 9, 2)
            plain = torch.cat([t.flatten() for t in gpt.merge_lora(model).state_dict().values()])
            torch.testing.assert_close(kept, plain, atol=1e-4, rtol=0)
            for name, t in torch.load("run.pt", weights_only=True)["model"].items():
                same = name in start and torch.equal(start[name], t)
                self.assertEqual(same, not re.match(learns, name), f"{mode}: {name}")

    def test_the_report_follows_from_the_predictions(self):
        labels = torch.tensor([0] * 50 + [1] * 50)
        for spam, words in ((10, "60.0%.*50.2% to 69.1%.*50.0%.*55.6% +100.0% .*100.0% +20.0% "),
                            (6, "56.0%.*does not show")):            # its interval holds 50 %
            predicted = torch.tensor([0] * (100 - spam) + [1] * spam)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                clf.report(["ham", "spam"], labels, predicted, commonest=0)
            self.assertRegex(out.getvalue(), "(?s)" + words)

    def test_three_classes_learn_and_travel_to_classify(self):
        self.write("data.tsv", "a\t\n\nb\t \n" + labelled_lines(classes=("a", "b", "c\x1b"))
                   + f"a\t{'long ' * 20}\n" * 10)
        out = self.ok(CLASSIFY + "--epochs 12 --no-balance --train all")
        self.assertIn("2 without text", out)
        self.assertIn("10 are cut to 64 tokens", out)
        texts = b"meet me at home now\n\nWIN cash NOW 0800 x\nthe weather is mild\x1b\n"
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts))):
            lines = self.ok("finetune_classifier.py --checkpoint run.pt --classify").splitlines()
        self.assertEqual([line.split("\t")[0::2] for line in lines], [
            ["a", "meet me at home now"], ["b", "WIN cash NOW 0800 x"],
            ["c\ufffd", "the weather is mild\ufffd"]])


# ---------------------------------------------------------------------------------------------
# finetune_instruct.py

class TestInstructions(InFolder):
    def test_collate_gives_the_book_s_example(self):
        inputs, targets = instruct.custom_collate_fn([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
        self.assertEqual(inputs.tolist(), [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256],
                                           [7, 8, 9, 50256, 50256]])
        self.assertEqual(targets.tolist(), [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100],
                                            [8, 9, 50256, -100, -100]])
        _, targets = instruct.custom_collate_fn([[1, 9, 9, 2], [3]], pad_token_id=9)
        self.assertEqual(targets.tolist(), [[9, 9, 2, 9], [9, -100, -100, -100]])  # no padding

    def test_masking_and_cutting_leave_each_row_a_target(self):
        rows = [[1, 2, 3, 4, 5, 6], [7, 8]]
        _, targets = instruct.custom_collate_fn(rows, 0, prompt_lengths=[4, 1])
        self.assertEqual(targets.tolist(), [[-100, -100, -100, 5, 6, 0],
                                            [8, 0, -100, -100, -100, -100]])
        for length in range(1, 7):
            _, targets = instruct.custom_collate_fn(rows, 0, -100, length, prompt_lengths=[5, 2])
            self.assertEqual(targets.shape[1], length)
            self.assertTrue((targets != -100).any(dim=1).all())

    @needs("instruction-data.json", "tiktoken")
    def test_the_book_s_records_are_its_text_and_split_and_encode_as_there(self):
        path, tokenizer = ROOT / "data" / "instruction-data.json", tiktoken.get_encoding("gpt2")
        train, val, test = quietly(instruct.make_datasets, path, tokenizer, "alpaca", 1024)
        self.assertEqual([len(train), len(val), len(test)], [935, 55, 110])
        self.assertEqual(instruct.format_input(train.data[0]), (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nEvaluate the following phrase by "
            "transforming it into the spelling given.\n\n### Input:\nfreind --> friend"))
        for entry, ids in zip(train.data, train):
            self.assertEqual(ids, tokenizer.encode(
                instruct.format_input(entry) + "\n\n### Response:\n" + entry["output"]))

    def test_a_record_per_line_is_read_too_and_a_bad_one_is_named(self):
        good = '{"instruction": "a", "output": "b"}'
        self.write("r.jsonl", good + "\n\n" + good[:-1] + ', "input": null, "more": 1}\n')
        self.assertEqual(instruct.read_records("r.jsonl"),
                         [{"instruction": "a", "input": "", "output": "b"}] * 2)
        for text, words in [('[{"instruction": "a",\n "output": }]', "line 2"), ("[]", "no list"),
                            ("{}", "no list"), ("[1]", "record 0"), ("[" * 100000, "not JSON"),
                            (f'[{good}, {{"instruction": "b"}}]', "record 1 .* output")]:
            self.write("r.json", text)
            with self.assertRaisesRegex(UserError, words):
                instruct.read_records("r.json")

    def test_the_run_is_the_plain_loop_whatever_the_batches(self):
        """Packed or padded, six records at once or two and two and two: the same losses."""
        gpt.save_checkpoint("tiny.pt", tiny_model(0.2, drop_rate=0.0), BYTES)
        for mask in (True, False):
            train, val, _ = quietly(instruct.make_datasets, "records.json", BYTES, "phi3", 64)
            model, losses = gpt.load_checkpoint("tiny.pt")[0], []

            def mean_loss(data, rows):
                inputs, targets = instruct.custom_collate_fn(
                    [data[i] for i in rows], 256,
                    prompt_lengths=[data.prompt_lengths[i] for i in rows] if mask else None)
                return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

            at_first = mean_loss(val, range(len(val))).item()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            for rows in np.random.default_rng([123, 0]).permutation(25)[:24].reshape(4, 6):
                optimizer.zero_grad()
                loss = mean_loss(train, rows)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            for split in ("--batch-size 6", "--batch-size 2 --grad-accum 3"):
                self.ok(INSTRUCT + f"--no-responses --max-steps 4 --eval-every 1 {split} "
                        + ("--mask-prompt" if mask else "--no-mask-prompt"))
                metrics = self.metrics()
                self.assertAlmostEqual(metrics["val_loss"][0], at_first, places=4)
                np.testing.assert_allclose(metrics["train_loss"][1:], losses, atol=2e-3)

    def test_the_simple_loop_learns(self):
        model, data = tiny_model(drop_rate=0.0), instruct.InstructionDataset(RECORDS, BYTES, "phi3")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = instruct.train_model_simple(model, data, optimizer, "cpu", 6, 8, 256)
        self.assertEqual(len(losses), 6 * 3)
        self.assertLess(losses[-1], losses[0] - 1)

    def test_a_run_answers_scores_and_is_asked(self):
        long = [{"instruction": "x" * 60, "output": "y"}, {"instruction": "x", "output": "y" * 60}]
        self.write("records.json", json.dumps(RECORDS + long))
        out = self.ok(INSTRUCT + "--epochs 3 --train lora")
        self.assertIn("1 lose the end of the answer, 1 have no room", out)
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["output"] for e in entries], [r["output"] for r in RECORDS[27:30]])
        self.assertIn(f"token f1 {sum(e['token_f1'] for e in entries) / 3:.3f}", out)
        model = gpt.load_checkpoint("run.pt")[0]
        ask = "finetune_instruct.py --checkpoint run.pt --dtype float32 --max-new-tokens 8 "
        for entry in entries:
            data = instruct.InstructionDataset([entry], BYTES, "phi3")
            batch = instruct.custom_collate_fn([data[0]], 256, prompt_lengths=data.prompt_lengths)
            loss = instruct.calc_loss_batch(*batch, model, "cpu").item()
            self.assertAlmostEqual(entry["response_loss"], loss, places=3)
            answer = self.ok((ask + "--ask '{instruction}' --input '{input}'").format(**entry))
            self.assertEqual(answer.strip(), entry["model_response"])
        with mock.patch("builtins.input", side_effect=["Say one", "x" * 99, "/reset", EOFError]):
            with mock.patch.object(sys, "stdin", mock.Mock()):
                out = self.ok("finetune_instruct.py --checkpoint run.pt --chat")
        self.assertIn("no room for an answer", out.replace("\n", " "))

    def test_token_f1_written_out(self):
        for answer, truth, expected in (("The cat sat.", "the cat sat down", 6 / 7),
                                        ("a a", "b", 0), ("", "b", 0), ("?", "?", 1)):
            self.assertAlmostEqual(instruct.token_f1(answer, truth), expected)

    def test_the_book_s_question_the_first_integer_counts_and_no_score_is_lost(self):
        replies, questions = ["11", None, "Score: 40/100", "very good", "1000"], []

        def ollama(request):
            questions.append(json.loads(request.rfile.read(int(request.headers["Content-Length"]))))
            reply = replies.pop(0)
            body = {"message": {"content": reply}} if reply else {"error": "busy"}
            send(request, json.dumps(body).encode())

        self.write("run-responses.json", json.dumps(
            [{**record, "model_response": "AAA"} for record in RECORDS[:4]]
            + [{**RECORDS[0], "model_response": ""}]))
        url = serve(self, ollama)
        judge = f"finetune_instruct.py --judge llama3 --judge-url {url} --out run.pt"
        status, _, err = call(judge)
        self.assertEqual((status, "busy" in err, "ollama pull llama3" in err), (1, True, True))
        self.assertIn("17.00 of 100", self.ok(judge))              # (11 + 40 + 0) / 3
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["judge"]["score"] for e in entries], [11, 40, None, None, 0])
        self.assertEqual(questions[0]["options"], {"seed": 123, "temperature": 0, "num_ctx": 2048})
        self.assertEqual(questions[0]["messages"][0]["content"],
                         f"Given the input `{instruct.format_input(RECORDS[0])}` and correct "
                         "output `one`, score the model response `AAA` on a scale from 0 to 100, "
                         "where 100 is the best score. Respond with the integer number only.")


# ---------------------------------------------------------------------------------------------
# All scripts: mistakes people make, each one sentence

class TestRefusals(InFolder):
    def check(self, status, cases):
        """Each command ends with this status and one line that has these words; no file changes."""
        def files():
            return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()
                    and path.parent.name != "data"}

        before = files()
        for command, words in cases.items():
            with self.subTest(command=command):
                actual, _, err = call(command)
                self.assertEqual((actual, err.count("\n")), (status, 1), err)
                self.assertIn(words, err)
        self.assertEqual(files(), before)

    def test_what_people_mistype_or_lack(self):
        for name, content in {
                "empty.txt": "", "short.txt": "too short", "binary.txt": b"a\0b" * 100,
                "latin.txt": "café".encode("latin-1") * 100, "utf16.txt": TEXT.encode("utf-16"),
                "one.tsv": labelled_lines(classes=("ham",)), "run.csv": labelled_lines(),
                "rare.tsv": labelled_lines() + "eggs\ta\neggs\tb\n",
                "ragged.csv": "label,text\nham,Hello\nham,Hello, how are you\n",
                "mine.pt": "my notes", "mine/notes.txt": "keep me", "mine.gguf": "keep me"}.items():
            self.write(name, content)
        Path("folder").mkdir()
        gpt.replace_head(model := tiny_model(), 2)
        gpt.save_checkpoint("class.pt", model, BYTES, class_names=["a", "b"])
        for run, cases in {
                PRETRAIN: {
                    "--data none.txt": "none.txt", "--data empty.txt": "is empty",
                    "--data short.txt": "too short", "--data folder": "0 files is too short",
                    "--data latin.txt": "iconv -f latin1 ", "--data utf16.txt": "iconv -f utf-16 ",
                    "--data binary.txt": "not a text file", "--tokenizer gpt9": "gpt9",
                    "--tokenizer none.tiktoken": "python tokenizer.py train",
                    "--n-heads 5": "5 heads", "--device tpu": "not available",
                    "--out text.txt/x.pt": "text.txt", "--out mine.pt": "is no checkpoint of this",
                    "--data run.csv": "run.csv is read by this command",
                    "--data mine --out mine/new.pt": "is read by this command"},
                "pretrain.py ": {"--init none.pt": "none.pt", "--preset gpt2": "--data "},
                CLASSIFY: {
                    "--data none.tsv": "none.tsv", "--data empty.txt": "is empty",
                    "--data one.tsv": "1 class", "--data rare.tsv": "'eggs', with 2",
                    "--data ragged.csv": "line 3", "--label-column stars": "no column 'stars'",
                    "--text-column 1": "same column", "--data run.csv": "run.csv is read by this",
                    "--out tiny.pt": "tiny.pt is read by this command"},
                "finetune_classifier.py ": {"": "python pretrain.py", "--classify x": "classifier"},
                INSTRUCT: {"--data none.json": "none.json", "--data text.txt": "not JSON",
                           "--out ./tiny.pt": "tiny.pt is read by this command"},
                "finetune_instruct.py ": {"": "python pretrain.py", "--judge x": "no answers",
                                          f"--checkpoint tiny.pt --ask {'x' * 99}": "shorter"},
                "gpt.py ": {
                    "--prompt x": "python pretrain.py", "--checkpoint class.pt": "classifier",
                    "--checkpoint tiny.pt --explain --layer 2": "2 layers"},
                "load_gpt2.py ": {
                    "--from nowhere": "nowhere", "--from folder": "holds neither format",
                    "--from . --out mine.pt": "is no checkpoint of this",
                    "--checkpoint class.pt --export x/": "holds a classifier",
                    "--checkpoint tiny.pt --export mine": "something else",
                    "--checkpoint tiny.pt --export mine.gguf": "no GGUF"},
                "tokenizer.py train ": {
                    "none.txt": "none.txt", "text.txt --vocab-size 9": "at least 257",
                    "text.txt --vocab-size 2000000": "at most 1114111",
                    "text.txt --out text.txt": "not a rank file",
                    "text.txt --out mine.pt": "mine.pt"},
        }.items():
            self.check(1, {run + flags: words for flags, words in cases.items()})

    def test_wrong_usage_is_status_2(self):
        for run, flags in {
                PRETRAIN: ("--batch-size 0", "--max-steps -1", "--lr nan", "--lr 0", "--epochs x",
                           "--preset none", "--val-share 1.5", "--dtype x", "--out run.txt",
                           "--out run-resume.pt", "--max 3", "--seed 99999999999",
                           "--non\x1bsense"),
                "pretrain.py ": ("--init a.pt --tokenizer bytes",),
                "gpt.py ": ("--temperature -1", "--top-p 2", "--top-k 0"),
                CLASSIFY: ("--train some",), "tokenizer.py ": ("compare text.txt",),
                "finetune_instruct.py ": ("--input x", "--chat --ask x"),
                "load_gpt2.py ": ("--size 3B", "--export x/ --quantize q8_0")}.items():
            self.check(2, {run + flag: "see " for flag in flags})

    def test_without_a_network_the_error_names_the_addresses_and_the_place_for_the_file(self):
        for command, words in [
                ("pretrain.py --preset verdict", "data.the-verdict.txt.*https://"),
                ("finetune_classifier.py --init tiny.pt", "data.SMSSpamCollection.*https://"),
                ("finetune_instruct.py --init tiny.pt", "data.instruction-data.json.*https://"),
                ("tokenizer.py encode hi", "data.vocab.bpe.*https://"),
                ("load_gpt2.py --size 355M", "huggingface.co/openai-community/gpt2-medium/resolve.*"
                 "openaipublic.blob.core.windows.net/.*f001.backblazeb2.com/")]:
            with mock.patch("requests.get", side_effect=requests.ConnectionError("unplugged")):
                status, out, err = call(command)
            self.assertEqual(status, 1)
            self.assertRegex(out + err, f"(?s){words}.*unplugged")

    def test_wrong_arguments_in_python_are_a_value_error_that_says_why(self):
        model, idx = tiny_model(), torch.zeros(1, 2, dtype=torch.long)
        for function, words in [
                (lambda: gpt.MultiHeadAttention(8, 8, 5, 0.0, num_heads=3), "not divisible"),
                (lambda: model(torch.zeros(1, 65, dtype=torch.long)), "65 tokens do not fit"),
                (lambda: generate(model, idx, 2, 64, top_p=1.5), "top_p"),
                (lambda: generate(model, idx[:, :0], 2, 64), "prompt is empty"),
                (lambda: pretrain.GPTDatasetV1("abcdefgh", BYTES, 8, stride=8), "at least 9"),
                (lambda: tok.BPETokenizer().encode("ab\ud83d"), "surrogates")]:
            with self.assertRaisesRegex(ValueError, words):
                function()


class TestRepository(unittest.TestCase):
    def test_a_stage_imports_nothing_of_ours_but_gpt_and_every_open_names_its_encoding(self):
        for script in SCRIPTS:
            code = (ROOT / script).read_text(encoding="utf-8")
            imported = set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE))
            self.assertEqual(imported & {name[:-3] for name in SCRIPTS},
                             set() if script == "gpt.py" else {"gpt"})
            for node in ast.walk(ast.parse(code)):
                text = ast.unparse(node) if isinstance(node, ast.Call) else ""
                if re.match(r"open\(|.*\.(read|write)_text\(", text, re.DOTALL):
                    self.assertRegex(text, r"encoding=|'[rwa]b'", script)

    def test_every_command_in_the_readme_parses(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        commands = re.findall(r"^!?(?:torchrun \S+ \d+|python) (\w+\.py.*?)(?:  +#.*)?$", readme,
                              re.MULTILINE)
        self.assertGreater(len(commands), 20)
        for command in commands:
            script, *words = shlex.split(command, comments=True)
            sub = words[0] if words and words[0] in ("train", "encode") else ""
            status, text, _ = call(f"{script} {sub} --help")
            self.assertEqual(status, 0)
            for flag in re.findall(r"--[a-z][a-z0-9-]+", " ".join(words)):
                self.assertIn(flag, text, command)


if __name__ == "__main__":
    unittest.main(warnings="ignore")
