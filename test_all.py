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
import textwrap
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
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers compared with are those of a CPU

import finetune_classifier as clf
import finetune_instruct as instruct
import gpt
import load_gpt2
import pretrain
import tokenizer as tok
from gpt import GPT_CONFIG_124M, GPTModel, UserError, generate, generate_text_simple

import numpy as np
import requests
import tiktoken
import torch
import torch.nn.functional as F

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
        status = 0
        try:
            gpt.run_main(lambda: SCRIPTS[script].main(argv))
        except SystemExit as e:
            status = e.code or 0
    return status, out.buffer.getvalue().decode(), err.getvalue()


def quietly(function, *args, **options):
    """Call a function without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **options)


def weights(source):
    """All weights of a model, or of a checkpoint's file, in one row."""
    if isinstance(source, GPTModel):
        state = source.state_dict()
    else:
        state = torch.load(source, weights_only=True)["model"]
    return torch.cat([t.flatten() for t in state.values()])


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


def send(request, body, status=200, headers={}):
    """What most answers are."""
    request.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


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

    def fails(self, command, words, status=1):
        """Run a script that must end with a sentence that has these words."""
        actual, out, err = call(command)
        self.assertEqual(actual, status, out + err)
        self.assertIn(words, " ".join(err.split()))

    def files(self):
        """{path: content} of all that is in the folder."""
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    def metrics(self):
        """The columns of run.csv, as arrays by name."""
        return np.genfromtxt("run.csv", delimiter=",", names=True, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# gpt.py: the model

class TestModel(unittest.TestCase):
    def test_the_ladder_gives_the_numbers_the_book_prints(self):
        x = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],  # "Your
                          [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])  # journey
        batch = torch.stack([x, x])                                                # starts ..."
        for seed, rung, expected in [
                (123, lambda: gpt.attention_without_weights(x), [0.4419, 0.6515, 0.5683]),
                (123, lambda: gpt.SelfAttention_v1(3, 2)(x), [0.3061, 0.8210]),
                (789, lambda: gpt.SelfAttention_v2(3, 2)(x), [-0.0748, 0.0703]),
                (123, lambda: gpt.CausalAttention(3, 2, 6, 0.0)(batch)[1], [-0.5874, 0.0058]),
                (123, lambda: gpt.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)(batch)[1],
                 [-0.5874, 0.0058, 0.5891, 0.3257]),
                (123, lambda: gpt.MultiHeadAttention(3, 2, 6, 0.0, 2)(batch)[1], [0.2943, 0.3897])]:
            torch.manual_seed(seed)
            journey = rung()[1]
            torch.testing.assert_close(journey, torch.tensor(expected), atol=1e-4, rtol=0)

    def test_the_book_s_model_number_for_number(self):
        torch.manual_seed(123)
        model = GPTModel(GPT_CONFIG_124M).eval()
        self.assertEqual(sum(p.numel() for p in model.parameters()), 163_009_536)
        idx = torch.tensor([[15496, 11, 314, 716]])                   # "Hello, I am"
        expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
        self.assertEqual(generate_text_simple(model, idx, 10, 1024)[0, 4:].tolist(), expected)
        self.assertEqual(generate(model, idx, 10)[0, 4:].tolist(), expected)

    def test_published_sizes_have_the_published_parameter_counts(self):
        for size, count in {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080,
                            "1558M": 1_557_611_200}.items():
            with gpt.shapes_only():
                model = GPTModel({**GPT_CONFIG_124M, **gpt.GPT2_SIZES[size], "qkv_bias": True,
                                  "tie_embeddings": True})
            self.assertEqual(sum(p.numel() for p in model.parameters()), count)

    def test_a_fresh_adapter_changes_nothing_and_a_merged_one_computes_the_same(self):
        model, idx = tiny_model(tie_embeddings=True), torch.randint(0, 257, (2, 9))
        before, names = model(idx), model.state_dict().keys()
        for _ in range(2):                                             # the second wraps no more
            gpt.replace_linear_with_lora(model, rank=4, alpha=8)
        self.assertTrue(torch.equal(model(idx), before))
        self.assertIs(model.out_head.weight, model.tok_emb.weight)     # a tied head is left alone
        for name, p in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.1)

        # The scale is alpha / rank, and merging changes no result.
        query, x = model.trf_blocks[0].att.W_query, torch.randn(3, 16)
        expected = query.linear(x) + 8 / 4 * (x @ query.lora.A @ query.lora.B)
        torch.testing.assert_close(query(x), expected)
        adapted = model(idx)
        gpt.merge_lora(model)
        torch.testing.assert_close(model(idx), adapted, atol=1e-5, rtol=0)
        self.assertEqual(model.state_dict().keys(), names)


class TestGeneration(unittest.TestCase):
    def test_cache_gives_the_plain_loop_s_tokens_also_past_the_context(self):
        model = tiny_model(context_length=16, drop_rate=0.5)
        for length, context_size in ((7, 16), (7, 8), (7, None), (7, 100), (40, 16)):
            idx = torch.randint(0, 257, (3, length))
            expected = generate_text_simple(model.eval(), idx, 20, min(context_size or 16, 16))
            torch.testing.assert_close(generate(model.train(), idx, 20, context_size), expected)
            self.assertTrue(model.training)           # dropout was off and is put back

    def test_each_row_of_a_batch_begins_and_ends_where_it_would_alone(self):
        torch.manual_seed(0)
        prompts = [torch.randint(0, 256, (n,)) for n in (3, 9, 1, 6, 4, 5, 2, 7)]
        padding = torch.tensor([9 - len(prompt) for prompt in prompts])
        padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0), value=99) for prompt in prompts])

        def alone(model, prompt, context):
            return generate_text_simple(model, prompt[None], 20, context)[0, len(prompt):].tolist()

        for context in (64, 12):                         # 12: the window slides, row by row
            model = tiny_model(spread=0.3, context_length=context)
            together = generate(model, padded, 20, padding=padding)[:, 9:].tolist()
            self.assertEqual(together, [alone(model, prompt, context) for prompt in prompts])

        # A row that has ended is filled; when all have ended, generation stops.
        model = tiny_model()
        model.out_head.weight.data[256] *= 4             # so that the end of text is often likely
        together = generate(model, padded, 20, eos_id=256, padding=padding)[:, 9:].tolist()
        rows = [alone(model, prompt, 64) for prompt in prompts]
        ends = [[*row, 256].index(256) for row in rows]
        length = min(20, max(ends) + 1)
        self.assertEqual(together, [(row[:end] + [256] * 20)[:length]
                                    for row, end in zip(rows, ends)])
        self.assertGreater(len(set(ends)), 3)

    def test_a_single_row_is_multiplied_as_torch_does(self):
        for outputs, dtype, tolerance in [(77, torch.float32, 1e-5), (1, torch.float32, 1e-5),
                                          (64, torch.bfloat16, 0.02)]:
            plain = torch.nn.Linear(300, outputs).to(dtype)
            fast = gpt.SingleRowLinear(300, outputs).to(dtype)
            fast.load_state_dict(plain.state_dict())
            x = torch.randn(1, 300).to(dtype)
            torch.testing.assert_close(fast(x), plain(x), atol=tolerance, rtol=tolerance)

    def test_sampling_follows_temperature_top_k_and_top_p(self):
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        for options, expected in [
                ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),   # squares, normalised
                ({"temperature": 1e-38}, [1, 0, 0, 0]), ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
                ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]), ({"top_p": 0.01}, [1, 0, 0, 0])]:
            probs = gpt.next_token_probs(logits, **options)
            torch.testing.assert_close(probs, torch.tensor([expected]).float(), msg=str(options))
        drawn = gpt.sample_next(logits.repeat(20_000, 1), 1.0)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(shares, logits.exp()[0], atol=0.015, rtol=0)
        self.assertEqual(gpt.sample_next(logits, 0.0).tolist(), [0])

    def test_attention_weights_are_the_model_s_own(self):
        model, idx = tiny_model(spread=0.3), torch.randint(0, 257, (1, 9))
        block = model.trf_blocks[0]
        x = block.norm1(model.tok_emb(idx) + model.pos_emb(torch.arange(9)))
        values = block.att.W_value(x)[0].unflatten(-1, (2, 8)).transpose(0, 1)     # (H, T, D)
        context_vec = gpt.attention_weights(model, idx, layer=0) @ values
        expected = block.att.out_proj(context_vec.transpose(0, 1).flatten(1))
        torch.testing.assert_close(expected, block.att(x)[0])


# ---------------------------------------------------------------------------------------------
# gpt.py: what the scripts share

class TestCheckpoint(InFolder):

    def test_import_and_main_work_in_a_thread_and_a_user_s_own_spin_count_wins(self):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "77"}
        code = ("import os, threading\n"
                "def work():\n"
                "    import pretrain\n"
                f"    pretrain.main({shlex.split(PRETRAIN)[1:]} + ['--max-steps', '1'])\n"
                "    print(os.environ['GOMP_SPINCOUNT'])\n"
                "thread = threading.Thread(target=work)\n"
                "thread.start(), thread.join()")
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        self.assertTrue(out.stdout.endswith("\n77\n"), out.stderr)

    def test_model_tokenizer_and_extras_come_back(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}
        tokenizer = gpt.make_tokenizer("mine", ranks, r"\S+|\s+")
        model, idx = tiny_model(vocab_size=259, tie_embeddings=True), torch.arange(9)[None]
        gpt.save_checkpoint("a/b.pt", model, tokenizer, names=["x"])
        self.assertEqual(os.listdir("a"), ["b.pt"])                    # no temporary file stays
        again, tokenizer2, extras = gpt.load_checkpoint("a/b.pt")
        self.assertEqual((extras["names"], extras["config"]), (["x"], model.cfg))
        self.assertEqual(tokenizer2.encode("the<|endoftext|>", allowed_special="all"), [257, 258])
        self.assertTrue(torch.equal(again(idx), model(idx)))           # without dropout
        self.assertIs(again.out_head.weight, again.tok_emb.weight)

        # A classifier's names are saved as text.
        clf.replace_head(model, 2)
        gpt.save_checkpoint("c.pt", model, tokenizer, class_names=np.array([3, 5]))
        self.assertEqual(torch.load("c.pt", weights_only=True)["class_names"], ["3", "5"])

    def test_a_foreign_or_broken_file_is_one_sentence_with_what_makes_a_fit_one(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("owned",)

        good = torch.load("tiny.pt", weights_only=True)
        not_a_number = {**good["model"], "final_norm.scale": torch.full((16,), math.nan)}
        for number, changes in enumerate([
                {"kind": Evil()}, {"kind": "classifier"}, {"model": {}}, {"model": not_a_number},
                {"tokenizer": "text.txt"}, {"tokenizer": {"pat_str": ".", "ranks": "AA== 0"}},
                {"config": {**good["config"], "n_layers": 10**7}}]):
            torch.save({**good, **changes}, f"{number}.pt")
        self.write("cut.pt", Path("tiny.pt").read_bytes()[:5000])
        for path in {*Path().iterdir()} - {Path("tiny.pt")} | {Path("none.pt")}:
            with self.subTest(path=path), self.assertRaisesRegex(
                    UserError, r"\A[^\n]{,250}checkpoint[^\n]{,250}python maker.py\Z"):
                gpt.load_checkpoint(path, maker="maker.py")
        self.assertFalse(Path("owned").exists())

    def test_a_failed_write_keeps_the_old_file_and_files_of_killed_runs_vanish(self):
        before = Path("tiny.pt").read_bytes()
        for name in ("tiny.pt.1.tmp", "tiny.pt.2.tmp", "mine.tmp"):
            self.write(name, "half a checkpoint")
        os.utime("tiny.pt.1.tmp", (0, 0))             # nobody has written to it for long
        with mock.patch("torch.save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaises(OSError):
                gpt.save_checkpoint("tiny.pt", tiny_model(), BYTES)
        self.assertEqual(Path("tiny.pt").read_bytes(), before)
        self.assertEqual({*Path().glob("*.tmp")}, {Path("tiny.pt.2.tmp"), Path("mine.tmp")})


class TestTexts(InFolder):
    def pieces(self, content, size, name="t.txt"):
        self.write(name, content)
        return list(gpt.read_pieces(name, size))

    def test_the_mark_divides_documents_whatever_the_size_of_the_pieces(self):
        mark, r = gpt.END_OF_TEXT, random.Random(1)
        words = ["the", "cat", "<b>", "said:", "\n", "x>y", "<|", "12", "naïve", "漢字漢字"]
        documents = [" ".join(r.choices(words, k=30)).strip() for _ in range(60)]
        for space, size in itertools.product(("\n", " \n\n", ""), (10, 50, 1000)):
            pieces = self.pieces(f"{space}{mark}{space}".join(documents), size)
            self.assertEqual("".join(pieces), mark.join(documents))
            self.assertEqual(sum(piece.count(mark) for piece in pieces), 59)   # none is cut
        lines = "".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in documents)
        self.assertEqual("".join(self.pieces(lines, 10, "t.jsonl")), mark.join(documents) + mark)
        half = self.pieces(r'{"text": "half an emoji \ud83d"}', 10, "t.jsonl")
        self.assertEqual("".join(half), f"half an emoji ?{mark}")

    def test_pieces_are_the_whole_text_and_cut_where_its_tokens_are(self):
        text = "Some words, \n\n  and more\tof them 12345. " * 40
        for content, pattern in ((text, gpt.GPT2_SPLIT_PATTERN), ("é" * 1000, "é"),
                                 ("\ufeffone\r\ntwo", r"\S+|\s+")):       # a byte order mark
            pieces, content = self.pieces(content, size=101), content.lstrip("\ufeff")
            self.assertEqual([chunk for p in pieces for chunk in tok.regex.findall(pattern, p)],
                             tok.regex.findall(pattern, content))
            self.assertLess(max(map(len, pieces)), 250)
        for content in ("a" + " " * 10**6 + "b", "<" * 10**6, ("a " * 10 + "x" * 10**5) * 10):
            self.assertEqual("".join(self.pieces(content, 1 << 18)), content)  # in under a second

    def test_what_is_no_text_is_one_sentence(self):
        cut = "größer und schöner\n".encode("utf-8") * 2000
        for name, content, words in [
                ("blank.txt", " \n" * 99, "is empty"), ("zero.txt", b"a\0b", "not a text file"),
                ("utf16.txt", TEXT.encode("utf-16"), "is UTF-16.*iconv -f utf-16 -t utf-8 utf16"),
                ("cut.txt", cut[:cut.rindex(b"\xb6")], "cut within its last character"),
                ("gbk.txt", "你好,世界。".encode("gbk") * 99, "encoding.*-f ENCODING"),
                ("/dev/null", "lost", "is not a file that can be read twice"),
                ("a.json", "[]", "JSON"),
                ("a.jsonl", '{"text": "x"}\n{"txt": "y"}', 'line 2: expected {"text": "..."}'),
                ("b.jsonl", "[" * 200_000, "line 1: expected")]:
            self.write(name, content)
            with self.subTest(name), self.assertRaisesRegex(
                    UserError, rf"\A{name}[^\n]*{words}[^\n]{{,200}}\Z"):
                list(gpt.read_pieces(name))

    def test_a_folder_gives_each_of_its_files_once(self):
        for name in ("d/b.txt", "d/e/a.txt", "d/.git/x", "d/.hidden", "one.txt", "linked/c.txt"):
            self.write(name, "text")
        self.write("nothing/empty.txt", "")
        os.symlink(Path("d").absolute(), "d/e/again")             # leads back to where it is
        os.symlink("../linked", "d/f")
        os.symlink("loop", "d/loop")                              # leads nowhere
        self.assertEqual(gpt.find_files(["d", "one.txt"]), [
            Path("d/b.txt"), Path("d/e/a.txt"), Path("d/f/c.txt"), Path("one.txt")])
        with self.assertRaisesRegex(UserError, "the folder nothing has no file with text"):
            gpt.find_files(["d", "nothing"])
        denied = mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied"))
        with denied, self.assertRaises(PermissionError):          # never less text
            gpt.find_files(["d"])


class TestTerminal(InFolder):
    def test_a_character_of_several_tokens_comes_out_whole(self):
        stream = [torch.tensor([i]) for i in [*"é漢".encode(), 256, *b"no more"]]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(gpt.print_stream(stream, BYTES), [*"é漢".encode()])
        self.assertEqual(out.getvalue(), "é漢\n")

    def test_what_is_said_fits_80_columns_and_loses_no_word(self):
        r = random.Random(1)
        for _ in range(200):
            words = ["w" * r.randint(1, 60) for _ in range(r.randint(0, 40))]
            text = "".join(word + r.choice((" ", "\n", "  ", "\t")) for word in words)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                gpt.say("label", text)
            self.assertLessEqual(max(map(len, out.getvalue().split("\n"))), 79)
            self.assertEqual(out.getvalue().split(), ["label", *words])

    def test_gpt_py_writes_what_the_plain_loop_does_and_the_same_for_the_same_seed(self):
        run = "gpt.py --checkpoint tiny.pt --prompt The --max-new-tokens 20 --dtype float32 "
        ids = generate_text_simple(gpt.load_checkpoint("tiny.pt")[0],
                                   gpt.text_to_token_ids("The", BYTES), 20, 64)
        self.assertEqual(self.ok(run + "--temperature 0"),
                         gpt.printable(gpt.token_ids_to_text(ids, BYTES)) + "\n")
        first, again, other = (self.ok(run + f"--seed {seed}") for seed in (4, 4, 5))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_explain_shows_the_model_s_probabilities(self):
        text = "abc\x1b[2J é long words long words"
        out = self.ok(f"gpt.py --checkpoint tiny.pt --explain --prompt {shlex.quote(text)}")
        logits = gpt.load_checkpoint("tiny.pt")[0](gpt.text_to_token_ids(text, BYTES))[0, -1]
        self.assertIn(f"{logits.softmax(dim=-1).max().item():.1%}", out)
        self.assertNotIn("\x1b", out)

    def test_closed_streams_and_a_full_disk_are_no_traceback(self):
        gpt_py = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/gpt.py"
        chat_py = gpt_py.replace("gpt.py", "finetune_instruct.py --chat --checkpoint tiny.pt <&-")
        for streams, status, words in [("<&- >&- 2>&-", 0, ""), ("| true", 0, ""),
                                       (f">&- 2>&-; {chat_py} >&-", 0, ""),
                                       ("> /dev/full", 1, "gpt.py: .*No space left.*\n")]:
            done = subprocess.run(f"unset PYTHONUNBUFFERED; {gpt_py} {streams}", shell=True,
                                  timeout=60, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (status, ""))
            self.assertRegex(done.stderr, rf"\A{words}\Z")
        quietly(gpt.run_main, mock.Mock())                # a notebook's stdout has no reconfigure

    def test_the_model_needs_torch_alone(self):
        code = ("import sys; sys.modules.update(numpy=None, regex=None, requests=None)\n"
                "sys.modules['tiktoken'] = None; import gpt\n"
                "model = gpt.GPTModel(gpt.GPT_CONFIG_124M | {'n_layers': 1})\n"
                "print(gpt.generate(model, [8], 2).shape)")
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=60,
                              capture_output=True, text=True)
        self.assertEqual(done.stdout, "torch.Size([1, 3])\n", done.stderr)


FILE = bytes(range(256)) * 800  # 204,800 bytes, and the answers of a server that has them
FILE_SHA256 = hashlib.sha256(FILE).hexdigest()


def answer(status, body=b"no", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: send(request, body, status, headers)


def asked_for(size=len(FILE)):
    """An answer with what was asked for; the connection is closed after `size` bytes."""
    def respond(request):
        start = int((request.headers["Range"] or "bytes=0-")[6:-1])
        send(request, FILE[start:start + size], 206 if start else 200,
             {"Content-Length": len(FILE) - start})
        request.close_connection = True
    return respond


whole, ranged, cut, drop = answer(200, FILE), asked_for(), asked_for(100_000), asked_for(1 << 14)


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
        quietly(gpt.download, urls, "deep/er/file.bin", sha256, timeout=0.5)
        return Path("deep/er/file.bin").read_bytes()

    def test_what_arrives_whole(self):
        path = Path("deep/er/file.bin")
        rest = [None, "bytes=98304-"]                              # six reads of 16 KB had come
        moved = answer(302, b"", Location="/cdn", X_Linked_Etag=f'"{FILE_SHA256}"')
        page = answer(200, b"<html>", Content_Type="text/html")
        for answers, asked in [
                ([whole], [None]), ([cut, ranged], rest),
                ([cut, whole], rest),                              # the server ignores the range
                ([moved, whole], [None, None]),
                ([answer(404), page, whole], [None, None, None]),
                ([drop, drop, drop, whole],                        # the next, from the start
                 [None, "bytes=16384-", "bytes=32768-", None])]:
            with self.subTest(asked):
                content = self.fetch(answers, 3 * [self.url])
                self.assertEqual((content == FILE, self.asked), (True, asked))
                self.assertEqual(os.listdir(path.parent), [path.name])
            path.unlink(missing_ok=True)

        # A part of another file is found out; a file that is there needs no network.
        self.write("deep/er/file.bin.part", b"of another file")
        content = self.fetch([ranged], [self.url], FILE_SHA256)
        self.assertEqual((content == FILE, self.asked), (True, ["bytes=15-", None]))
        self.write(path, b"mine")
        self.assertEqual((self.fetch([whole], [self.url]), self.asked), (b"mine", []))

    def test_what_fails_names_every_address_and_the_place_for_the_file(self):
        nobody = "http://127.0.0.1:9/"
        for failure, words, asked in [
                (answer(404), "404", 1), (answer(200, b""), "wrong content", 1),
                (answer(200, FILE, X_Linked_Etag=64 * "0"), "wrong content", 1),
                (lambda request: time.sleep(1), "timed out", 1),
                (answer(200, FILE, Content_Length="abc"), "abc", 1),
                (drop, "49152 of 204800 bytes came", 3)]:         # it does not ask for ever
            with self.subTest(words), self.assertRaisesRegex(
                    UserError, f"deep/er/file.bin[^$]*{nobody}.*refused[^$]*{self.url}.*{words}"):
                self.fetch([failure], [nobody, self.url])
            self.assertEqual(len(self.asked), asked)


class TestTrainingRun(InFolder):
    VAL_LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 6.0, 8: 7.0}      # by step: the model of 4 is the best

    def train(self, flags="", stop=None, loss=None):
        """A plain loop with a `Run`, stopped after step `stop`."""
        parser = gpt.ArgumentParser()
        gpt.add_training_arguments(parser, "x.pt", batch_size=2, lr=0.01, eval_every=2, max_steps=6)
        args = parser.parse_args(f"--out run.pt --dtype float32 {flags}".split())
        model = tiny_model(drop_rate=0.2)                      # with dropout: chance matters
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        run = gpt.Run(args.max_steps, args, model, [optimizer], BYTES, constant=False)
        while True:
            if run.due(args.eval_every):
                run.report(epoch=1, val_loss=self.VAL_LOSSES[run.step])
            if run.step >= run.total_steps:
                break
            torch.manual_seed(run.step)
            model.train()
            idx = torch.randint(0, 257, (2, 9))
            step_loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
            optimizer.zero_grad()
            step_loss.backward()
            optimizer.step()
            run.done(loss or step_loss.item(), idx.numel())
            if run.step == stop:
                raise KeyboardInterrupt
        run.finish()

    def killed(self, *args, **options):
        """A new run that is stopped."""
        for left in Path().glob("run*"):
            left.unlink()
        with self.assertRaises(KeyboardInterrupt):
            quietly(self.train, *args, **options)

    def result(self):
        return weights("run.pt").tolist(), Path("run.csv").read_text(encoding="utf-8")

    def test_stopped_after_any_step_and_resumed_a_run_ends_with_the_same_weights_and_metrics(self):
        quietly(self.train)
        expected = self.result()
        self.assertEqual(self.metrics()["step"].tolist(), [0, 2, 4, 6])
        self.assertFalse(Path("run-resume.pt").exists())       # the run is complete
        quietly(self.train, "--max-steps 4")                   # step 4 was the best, and is kept
        self.assertTrue(torch.equal(weights("run.pt"), torch.tensor(expected[0])))
        for stop in range(1, 7):
            with self.subTest(stop=stop):
                self.killed(stop=stop)
                quietly(self.train, "--resume")
                self.assertEqual(self.result(), expected)

    def test_a_run_is_not_prolonged_where_its_learning_rate_falls(self):
        self.killed(stop=5)
        with self.assertRaisesRegex(UserError, "falls towards.* step 6.*--init run.pt"):
            quietly(self.train, "--max-steps 8 --resume")

    def test_a_deleted_model_is_written_again_from_its_state_or_missed(self):
        quietly(self.train)
        expected = self.result()
        self.killed(stop=5)                                    # the state is of step 4, the best
        Path("run.pt").unlink()
        quietly(self.train, "--resume")
        self.assertEqual(self.result(), expected)
        self.killed("--max-steps 8", stop=7)                   # it is of step 6, but 4 was better
        Path("run.pt").unlink()
        with self.assertRaisesRegex(UserError, "best model.*run.pt, is gone"):
            quietly(self.train, "--max-steps 8 --resume")

    def test_a_changed_state_is_a_sentence(self):
        self.killed(stop=5)
        state = torch.load("run-resume.pt", weights_only=True)
        for change in ({"step": "four"}, {"rows": None}, {"optimizers": []}, {"weights": {}},
                       {"settings": 3}, {}):
            torch.save({**state, **change}, "run-resume.pt")
            if not change:
                os.truncate("run-resume.pt", 500)
            with self.subTest(change), self.assertRaisesRegex(
                    UserError, r"\Arun-resume.pt [^\n]{,300}leave out --resume\Z"):
                quietly(self.train, "--resume")

    def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(self):
        self.killed(stop=3)
        before = weights("run.pt")
        with self.assertRaisesRegex(UserError, "the loss is nan after step 3.*--lr"):
            quietly(self.train, "--resume", loss=math.nan)
        self.assertTrue(torch.equal(weights("run.pt"), before))


# ---------------------------------------------------------------------------------------------
# Mistakes people make, each one sentence

class TestRefusals(InFolder):
    def test_what_people_mistype_or_lack_is_one_sentence_and_changes_no_file(self):
        for name, content in {
                "ham.tsv": labelled_lines(("ham",)), "my.csv": labelled_lines(),
                "mixed.csv": "label;text\nham;Hi; you\n", "quote.csv": 'a,b\nham,"Hello\n',
                "one.json": '[{"instruction": "a", "output": "b"}]'}.items():
            self.write(name, content)
        before = self.files()
        for command, words in {
                "gpt.py --prompt x": "make one with: python pretrain.py",
                "gpt.py --checkpoint tiny.pt --device tpu": "there is no device 'tpu'",
                "gpt.py --checkpoint tiny.pt --explain --layer 2": "2 layers",
                "finetune_classifier.py": "python pretrain.py",
                "finetune_classifier.py --classify x": "python finetune_classifier.py",
                "finetune_classifier.py --checkpoint tiny.pt --classify x": "language model",
                CLASSIFY + "--data ham.tsv": "40 texts of 'ham'; give at least two classes",
                CLASSIFY + "--data my.jsonl": "my.jsonl is JSON",
                CLASSIFY + "--data mixed.csv": "line 2: 3 columns, expected 2 (divided by ';'",
                CLASSIFY + "--data quote.csv": "quote.csv, line 2",
                CLASSIFY + "--label-column stars": "no two columns stars and text",
                CLASSIFY + "--data my.csv --out my.pt": "my.csv is read by this command",
                "finetune_instruct.py": "python pretrain.py",
                "finetune_instruct.py --chat": "make one with: python finetune_instruct.py",
                "finetune_instruct.py --judge x": "make it anew with: python finetune_instruct.py",
                INSTRUCT + "--data one.json": "one record to train",
                INSTRUCT + "--out ./tiny.pt": "tiny.pt is read by this"}.items():
            with self.subTest(command):
                self.fails(command, words)
        for command in ("gpt.py --top-p 2", "gpt.py --non\x1bsense", "gpt.py --max 3",
                        CLASSIFY + "--classify ''", CLASSIFY + "--val-data data.tsv",
                        INSTRUCT + "--test-data x", INSTRUCT + "--chat --ask x"):
            with self.subTest(command):
                self.fails(command, "--help", status=2)
        self.assertEqual(self.files(), before)

    def test_an_output_that_would_destroy_something_is_refused_before_any_work(self):
        for name in ("mine.pt", "foreign.csv", "folder/a.txt", "data.csv"):
            self.write(name, "keep me")
        self.write("ours.csv", "step,epoch,train_loss\n")
        self.write("ours.png", "a picture")

        def check(out):
            inputs = "folder", "tiny.pt", None, Path("data.csv")
            gpt.check_output(mock.Mock(out=Path(out), resume=False), *inputs)

        for out, words in {"tiny.pt": "tiny.pt is read by", "folder/x.pt": "x.pt is read by",
                           "data.pt": "data.csv is read by",
                           "mine.pt": "mine.pt is not of this project",
                           "foreign.pt": "foreign.csv is not of this project"}.items():
            with self.subTest(out), self.assertRaisesRegex(UserError, words):
                check(out)
        check("ours.pt")
        check("new/x.pt")

    def test_wrong_arguments_in_python_are_an_error_that_says_why(self):
        model, infinite, small = tiny_model(), tiny_model(), tiny_model(vocab_size=100)
        infinite.out_head.weight.data[3, 3] = math.inf
        clf.replace_head(classifier := tiny_model(), 3)
        two_specials = tiktoken.Encoding(
            "mine", pat_str=BYTES._pat_str, mergeable_ranks=BYTES._mergeable_ranks,
            special_tokens={"<|other|>": 256, "<|endoftext|>": 257})
        for words, function in [
                ("top_p", lambda: generate(model, [1], 2, top_p=1.5)),
                ("temperature", lambda: generate(model, [1], 2, temperature=-1)),
                ("whole numbers", lambda: generate(model, [1.0, 2.0], 2)),
                ("padding", lambda: generate(model, [[1], [2]], 2, padding=[1, 0])),
                ("65 tokens do not fit", lambda: model(torch.zeros(1, 65, dtype=torch.long))),
                ("loses text", lambda: gpt.make_tokenizer("mine", {}, "a*")),
                ("a single byte has no rank", lambda: gpt.ranks_from_text("AA== 0\nAQ== 1")),
                ("text.txt .*tokenizer.py train TEXT", lambda: gpt.load_tokenizer("text.txt")),
                ("train must be", lambda: clf.freeze(model, "last_block")),
                ("DataFrame", lambda: clf.create_balanced_dataset(iter(["Label", "Text"]))),
                ("lacks", lambda: clf.SpamDataset([("see you", "ham")], BYTES)),
                ("is empty", lambda: clf.classify_texts(["a", ""], model, BYTES, "cpu")),
                ("3 classes", lambda: clf.classify_review("see you", classifier, BYTES, "cpu")),

                # What could not be loaded is not saved.
                ("tiktoken", lambda: gpt.save_checkpoint("new.pt", model, object())),
                ("one special token", lambda: gpt.save_checkpoint("new.pt", model, two_specials)),
                ("not finite", lambda: gpt.save_checkpoint("new.pt", infinite, BYTES)),
                ("more tokens", lambda: gpt.save_checkpoint("new.pt", small, BYTES)),
                ("Unsupported|weights_only", lambda: gpt.save_checkpoint(
                    "new.pt", model, BYTES, accuracy=np.float64(0.5)))]:
            with self.subTest(words), self.assertRaisesRegex((ValueError, UserError), words):
                function()
        self.assertEqual(list(Path().glob("new*")), [])


class TestLessons(InFolder):
    """The lines that a lesson tells its reader to type run as they stand."""

    @needs("the-verdict.txt", "SMSSpamCollection", "instruction-data.json", "vocab.bpe")
    def test_the_same_by_hand_runs_as_it_stands(self):
        for name in ("data", "README.md"):
            Path(name).symlink_to(ROOT / name)
        Path("checkpoints").mkdir()
        for script in SCRIPTS:
            text = (ROOT / script).read_text(encoding="utf-8")
            lines = text.partition("# The same by hand, in Python:")[2].split("\n")
            block = itertools.takewhile(re.compile("#$|#     ").match, lines[1:])
            code, names = "\n".join(line[1:] for line in block), {}
            if script == "pretrain.py":                    # there they stand in a docstring
                docstring = pretrain.train_model_simple.__doc__
                code, names = docstring.split("a small model:\n")[1], dict(vars(pretrain))
            self.assertGreater(code.count("\n"), 4)
            with self.subTest(script):
                quietly(exec, textwrap.dedent(code), names)


# ---------------------------------------------------------------------------------------------
# tokenizer.py

STRINGS = [
    "", " \n\n \t x  ", "a\r\nb\rc\x0bd\x0ce\x00\x01\x1b[31m\x1c\x7f\x85", "x" + " " * 999 + "y",
    "\u00a0nbsp\u2003em\u2028ls\u200bzero\ufeffbom e\u0301 Z\u0351\u036b\u0343a\u0321 \u01c5",
    "नमस्ते שלום مرحبا 你好世界 こんにちは 한국어 👨\u200d👩\u200d👧 🇩🇪 ٠١٢ १२ １２ ½² Ⅷ 3.14 1,000",
    "I'm you're he's we've I'd they'll can't 'tis I'M YOU'RE HE'S WE'VE I'D THEY'LL it's' 's's",
    "''s 'll'l 'v've o'clock \u2019s ... !!! ((())) $$$ a_b_c C++ x==y // <|unk|> <|endoftext|",
    "a<|endoftext|> b<|endoftext|><|endoftext|>", "a" * 5000, "é" * 2500]


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

        v2 = tok.SimpleTokenizerV2(vocab)
        ids = v2.encode("Hello, do you like tea? <|endoftext|> In the palace.")
        self.assertEqual(ids, [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 1131, 7])
        self.assertEqual(v2.decode(ids), "<|unk|>, do you like tea? <|endoftext|> In the <|unk|>.")

    def test_wikipedia_s_example(self):
        # aaabdaaabac -> ZabdZabac (Z = aa) -> ZYdZYac (Y = ab) -> XdXac (X = ZY)
        merges, ids = tok.train_simple("aaabdaaabac", 3)
        self.assertEqual(merges, [((97, 97), 4), ((97, 98), 2), ((256, 257), 2)])
        t = tok.BPETokenizer()
        t.train("aaabdaaabac", 260)
        self.assertEqual((ids, t.encode("aaabdaaabac")), ([258, 100, 258, 97, 99],) * 2)

    def test_the_fast_trainer_makes_the_merges_of_the_slow_one(self):
        # The slow one gets all chunks in one row, twice each, with a unique number after each.
        for seed in range(60):
            r = random.Random(seed)
            chunks = {bytes(r.choices(b"abc", k=r.choice([1, 3, 8, 30]))): r.randint(1, 9)
                      for _ in range(8)}
            unique, row = itertools.count(10**6), []
            for chunk in [*Counter(chunks).elements()] * 2:
                row += [*chunk, next(unique)]

            tokens, expected = [bytes([b]) for b in range(256)], []
            while (step := tok.merge_once(row, len(tokens)))[1] > 1:  # then only unique ones
                (left, right), count, row = step
                tokens.append(tokens[left] + tokens[right])
                expected.append((tokens[left], tokens[right], count // 2))
            self.assertEqual(list(tok.learn_merges(chunks)), expected)

    @needs("vocab.bpe", "tiktoken")
    def test_gpt2_s_tokens_are_tiktoken_s(self):
        os.chdir(ROOT)
        ours, theirs = tok.BPETokenizer.from_gpt2(), tiktoken.get_encoding("gpt2")
        self.assertEqual((ours.name, ours.n_vocab, ours.eot_token), ("gpt2", 50257, 50256))
        texts = STRINGS + fuzz(seed=1, strings=1000)
        for text, allowed in itertools.product(texts, (set(), {"<|endoftext|>"})):
            ids = ours.encode(text, allowed)
            expected = theirs.encode(text, allowed_special=allowed, disallowed_special=())
            self.assertEqual(ids, expected, text[:80])
        some = list(range(50257))[::-7]  # any IDs, also of half characters
        self.assertEqual(ours.decode(some), theirs.decode(some))

    def test_a_trained_vocabulary_round_trips_any_text_and_tiktoken_reads_it(self):
        texts = STRINGS + fuzz(seed=4, strings=300)
        ours = tok.BPETokenizer()
        ours.train("".join(texts[::2]), 600)
        ours.save("a.tiktoken")
        theirs = gpt.load_tokenizer("a.tiktoken")
        self.assertEqual((ours.n_vocab, theirs.n_vocab, ours.eot_token), (600, 600, 599))
        for text in texts:
            ids = ours.encode(text, allowed_special="all")
            self.assertEqual(ids, theirs.encode(text, allowed_special="all"))
            self.assertEqual(ours.decode(ids), text)

    def test_the_mark_divides_documents_and_a_short_text_has_few_tokens(self):
        text = f"ab ab<|endoftext|>ab é {'x' * 10**6}"
        self.assertEqual(tok.count_chunks(text), {b"ab": 2, b" ab": 1, b" \xc3\xa9": 1})
        t = tok.BPETokenizer()
        t.train("<|endoftext|>ab ab" * 9, 5000)
        self.assertEqual(list(t._mergeable_ranks)[256:], [b"ab", b" ab"])

    def test_train_learns_nine_tenths_and_measures_the_rest(self):
        self.write("texts/a.txt", " ab" * 9000 + " ab xy" * 500)
        out = self.ok("tokenizer.py train texts --vocab-size 259 --out my.tiktoken")
        learned = tok.BPETokenizer.load("my.tiktoken")
        self.assertEqual(list(learned._mergeable_ranks)[256:], [b" a", b" ab"])
        self.assertIn("held out 1.50 bytes per token", out)  # " ab" is one, " xy" are three
        self.assertIn("python pretrain.py --data texts --tokenizer my.tiktoken", out)
        self.write("a.jsonl", '{"url": "https://example.org/1", "text": "ab"}\n' * 100)
        self.assertIn("held out 2.00 bytes per token", self.ok(
            "tokenizer.py train a.jsonl --vocab-size 258 --out a.tiktoken"))  # not the markup

        # A file that is no vocabulary is not overwritten.
        self.fails("tokenizer.py train texts --out text.txt", "text.txt")
        self.assertEqual(Path("text.txt").read_text(encoding="utf-8"), TEXT)

        # The IDs of a text, and its tokens: nothing in them steers the terminal.
        out = self.ok("tokenizer.py encode --tokenizer my.tiktoken 'x\x1b\n ab'")
        self.assertEqual(out, "120 27 10 257\nx|\\x1b|\\n| ab|\n")


# ---------------------------------------------------------------------------------------------
# pretrain.py

class TestPretraining(InFolder):
    # The data.

    def test_rows_are_windows_and_targets_are_moved_by_one(self):
        data = pretrain.GPTDatasetV1("abcdefgh", BYTES, max_length=3, stride=2)
        rows = [(bytes(x.tolist()), bytes(y.tolist())) for x, y in data]
        self.assertEqual(rows, [(b"abc", b"bcd"), (b"cde", b"def"), (b"efg", b"fgh")])

    def test_each_document_ends_with_the_id_of_the_mark_and_a_cut_file_is_made_anew(self):
        self.write("texts/a.txt", "one<|endoftext|>two\n<|endoftext|>\n")
        self.write("texts/b.jsonl", '{"text": "three"}\n{"text": "four"}')
        self.write("texts/sub/c.txt", "five")
        expected = [256 if c == "|" else ord(c) for c in "one|two|three|four|five|"]
        for size in (5, 8, 20, 0):
            _, contents, texts = pretrain.find_text(pretrain.parse_arguments(["--data", "texts"]))
            file, dtype = pretrain.tokens_on_disk(texts, contents, BYTES)
            ids = np.fromfile(file, dtype, pretrain.count_tokens(file, dtype))
            self.assertEqual(ids.tolist(), expected)
            os.truncate(file, size)                            # the next pass must notice it

    def test_token_files_unused_for_a_day_are_deleted_but_an_open_one_is_read_on(self):
        write = lambda text: pretrain.tokens_on_disk([[text]], text, BYTES)
        (old, dtype), (young, _) = write("an old text"), write("young")
        rows = pretrain.TokenRows(old, dtype, 0, 11, T=4)
        self.addCleanup(rows.file.close)
        for used_now in ("an old text", "young"):
            os.utime(old, (0, 0))
            write(used_now)
            self.assertEqual((old.exists(), young.exists()), (used_now != "young", True))
        self.assertEqual(rows.batch([0, 1])[0].tolist(), [[*b"an o"], [*b"ld t"]])

    # The loss and the loop of the book.

    def test_loss_is_the_mean_of_minus_log_probability(self):
        model, (x, y) = tiny_model(), torch.randint(0, 257, (2, 2, 5))
        probs = torch.softmax(model(x), dim=-1)
        expected = -torch.stack([probs[b, t, y[b, t]].log() for b in range(2) for t in range(5)])
        loss = pretrain.calc_loss_batch(x, y, model, "cpu")
        torch.testing.assert_close(loss, expected.mean())
        other = pretrain.calc_loss_batch(y, x, model, "cpu")
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
        losses, calc_loss_batch = [], pretrain.calc_loss_batch

        def noted(*args):
            loss = calc_loss_batch(*args)
            losses.append(loss.item())
            return loss

        for drop_rate, expected in [
                (0.0, [10.9820, 10.9910, 10.9753, 10.9875, 10.9903, 10.9488, 11.0143, 10.9587,
                       10.9110, 10.9038]),
                (0.1, [10.9837, 10.9965, 10.9899, 10.9854, 10.9826, 10.9601, 11.0129, 10.9683,
                       10.9233, 10.9072])]:
            torch.manual_seed(123)
            if drop_rate and F.dropout(torch.ones(4000), 0.5).sum() != 4004:
                continue                           # this torch draws other numbers for dropout
            torch.manual_seed(123)
            loader = pretrain.create_dataloader_v1(text[:int(0.9 * len(text))], 2, 256, stride=256)
            torch.manual_seed(123)
            model = GPTModel({**TINY, "vocab_size": 50257, "context_length": 256, "emb_dim": 48,
                              "n_heads": 4, "drop_rate": drop_rate})
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
            losses.clear()
            with mock.patch.multiple(pretrain, calc_loss_batch=noted,
                                     evaluate_model=lambda *_: (0, 0),
                                     generate_and_print_sample=mock.Mock()):
                _, _, tokens_seen = quietly(pretrain.train_model_simple, model, loader, [],
                                            optimizer, "cpu", 2, 10, 0, "", None)
            self.assertEqual(tokens_seen, [2 * 256, 11 * 2 * 256])
            np.testing.assert_allclose(losses[:10], expected, atol=1e-3)

    # What the loop that runs adds.

    def test_muon_moves_every_direction_equally_far(self):
        p = torch.nn.Parameter(torch.zeros(6, 3))
        p.grad = torch.randn(6, 3) * torch.tensor([20.0, 1.0, 0.5])    # very unequal columns
        pretrain.Muon([p], lr=1.0).step()
        singular_values = torch.linalg.svdvals(p.detach()) / math.sqrt(6 / 3)
        self.assertTrue(((singular_values > 0.6) & (singular_values < 1.3)).all())

    def test_only_matrices_decay_and_every_parameter_has_one_optimizer(self):
        model = tiny_model(tie_embeddings=True)
        inside = {id(p) for p in model.trf_blocks.parameters() if p.ndim == 2}
        for name in ("adamw", "muon"):
            held = [(id(p), group["weight_decay"] > 0)
                    for optimizer in pretrain.make_optimizers(model, name, 1.0, 0.1)
                    for group in optimizer.param_groups for p in group["params"]]
            expected = [(id(p), id(p) in inside) for p in model.parameters()]
            self.assertEqual(sorted(held), sorted(expected))

    def test_gpt2_initial_values_shrink_where_a_block_adds(self):
        model = tiny_model(emb_dim=64, n_layers=8)
        pretrain.init_gpt2_weights(model, std=0.02)
        block = model.trf_blocks[0]
        for layer, std in ((block.ff.layers[0], 0.02), (block.ff.layers[2], 0.02 / 4),
                           (block.att.out_proj, 0.02 / 4)):            # 4: the root of 2 * 8
            self.assertAlmostEqual(layer.weight.std().item() / std, 1, delta=0.08)

    def test_learning_rate_rises_then_falls_as_half_a_cosine(self):
        factors = [pretrain.lr_factor(i, 42, 4, 0.1) for i in range(43)]
        self.assertEqual(factors[:4], [0.25, 0.5, 0.75, 1.0])
        for step, factor in ((4, 1.0), (23, 0.55), (42, 0.1)):            # 23 is half-way
            self.assertAlmostEqual(factors[step], factor)
        self.assertEqual({pretrain.lr_factor(i, 14, 0, 1.0) for i in range(14)}, {1.0})

    def test_three_processes_and_accumulated_batches_give_the_losses_of_one_large_batch(self):
        run = PRETRAIN + "--max-steps 4 --eval-every 2 --val-share 0.015 "    # two rows held out
        shared = f"{ROOT}/{run} --batch-size 6 --grad-accum 2"
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                               "3", "--standalone", *shlex.split(shared)],
                              capture_output=True, text=True, timeout=100)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        self.assertEqual(done.stdout.count("Next:"), 1)                   # one process prints
        together = self.metrics()
        self.ok(run + "--batch-size 12")
        for name in ("step", "train_loss", "val_loss", "bits_per_byte"):
            np.testing.assert_allclose(together[name], self.metrics()[name], atol=1e-3)

    def test_the_metrics_of_a_model_that_knows_nothing_over_whole_rows(self):
        t, V = tok.BPETokenizer(), 280
        t.train(TEXT, V)
        model = tiny_model(vocab_size=V)
        model.out_head.weight.data.zero_()                        # every token equally likely
        gpt.save_checkpoint("tiny.pt", model, t)
        self.write("text.txt", TEXT.replace("\n", "<|endoftext|>"))
        self.ok("pretrain.py --init tiny.pt --data text.txt --max-steps 1 --out run.pt")

        ids = [i for line in TEXT.splitlines() for i in [*t.encode(line), t.eot_token]]
        held_out = ids[int(0.9 * len(ids)):]
        targets = held_out[1:(len(held_out) - 1) // 64 * 64 + 1]
        num_bytes = sum(len(t.decode_bytes([i])) for i in targets if i != t.eot_token)
        first, _ = self.metrics()
        np.testing.assert_allclose(
            [first["val_loss"], first["perplexity"], first["bits_per_byte"]],
            [math.log(V), V, len(targets) * math.log2(V) / num_bytes], rtol=1e-5)

    # Presets, and what a run leaves to go on with.

    @needs("vocab.bpe", "the-verdict.txt")
    def test_the_book_s_verdict_has_nine_steps_an_epoch(self):
        Path("data").symlink_to(ROOT / "data")
        self.ok("pretrain.py --preset verdict --max-steps 1 --n-layers 1 --emb-dim 12 --out run.pt")
        self.assertAlmostEqual(self.metrics()["epoch"][-1], 1 / 9)

        with (mock.patch.dict(pretrain.GPT_CONFIG_124M, emb_dim=12, n_layers=1),
              mock.patch.object(pretrain, "train_model_simple") as loop):
            self.ok("pretrain.py --simple")
        self.assertEqual([len(loader) for loader in loop.call_args.args[1:3]], [9, 1])

    def test_the_stories_need_two_commands(self):
        self.write("data/TinyStories.txt", 20 * f"Once upon a time {TEXT}<|endoftext|>")
        self.fails("pretrain.py --preset stories", "python tokenizer.py train --stories")
        self.ok("tokenizer.py train --stories --vocab-size 300")
        out = self.ok("pretrain.py --preset stories --max-steps 1 --n-layers 1 --emb-dim 12 "
                      "--batch-size 2 --eval-batches 1")
        self.assertIn("a blind guess among 300 ", out)
        self.assertNotIn("<|", out)

    def test_presets_are_defaults(self):
        book = {**GPT_CONFIG_124M, "context_length": 256, "batch_size": 2, "lr": 4e-4,
                "weight_decay": 0.1, "epochs": 10, "max_steps": None, "clip": None}
        for flags, expected in [
                ("--preset verdict", book), ("--init x.pt", {"lr": 1e-4}),
                ("--size 355M --epochs 3", {"emb_dim": 1024, "epochs": 3, "max_steps": None})]:
            args = vars(pretrain.parse_arguments(flags.split()))
            self.assertEqual({name: args[name] for name in expected}, expected)
        self.assertIn("(default: 0.0006)", self.ok("pretrain.py --preset gpt2 --help"))

    def test_the_quick_run_needs_no_network_and_the_next_command_runs_as_printed(self):
        with mock.patch("requests.get", side_effect=AssertionError("network used")):
            out = self.ok("pretrain.py --max-steps 1 --eval-batches 1 --n-layers 1 --emb-dim 12")
        following = re.search(r"\nNext:\n  python (gpt.py .*)\n", out)[1]
        self.assertIn("pretrained.pt --prompt='The import statement'", following)
        self.ok(following + " --max-new-tokens 1")

    def test_a_trained_model_learns_from_a_text_shorter_than_its_context(self):
        self.write("short.txt", TEXT[:400])
        run = "pretrain.py --init tiny.pt --data short.txt --max-steps 2 --out run.pt "
        model, tokenizer = quietly(pretrain.main, shlex.split(run)[1:])
        self.assertEqual((model.cfg["context_length"], tokenizer.name), (64, "bytes"))  # as before
        self.assertTrue(torch.equal(weights(model), weights("run.pt")))
        self.fails(run + "--context-length 65", "sees 64 tokens")
        self.write("short.txt", TEXT[:40])
        self.fails(run, "too short")
        self.write("short.txt", "a" + " " * 1_500_000 + "b")
        self.fails(run, "cannot be cut into tokens")

    def test_the_data_s_content_decides_whether_a_run_can_go_on(self):
        run = ("pretrain.py --init tiny.pt --data text.txt --dtype float32 --eval-every 2 "
               "--out run.pt --max-steps ")
        self.ok(run + "6")
        expected, log = weights("run.pt"), Path("run.csv").read_bytes()
        self.ok(run + "4")
        self.write("more.txt", TEXT + "!")
        for flags in ("--data more.txt", "--data text.txt more.txt", "--seed 9"):
            self.fails(run + f"6 --resume {flags}", f"another {flags.split()[0]}")

        Path("text.txt").rename("moved.txt")
        os.utime("moved.txt", (0, 0))
        self.ok(run + "6 --resume --data moved.txt")           # prolonged, it is the longer run
        self.assertTrue(torch.equal(weights("run.pt"), expected))
        self.assertEqual(Path("run.csv").read_bytes(), log)


# ---------------------------------------------------------------------------------------------
# All scripts

KILLED = """
import os, shlex, signal, sys
import finetune_classifier, finetune_instruct, pretrain
import torch._dynamo    # all optimizers need it: import it once, not in each run

def counted(*args, replace=os.replace):    # SIGKILL: no chance to clean up after `count` files
    global count
    replace(*args)
    count -= ".tokens" not in str(args[1])
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = counted
for command in sys.argv[1:]:
    script, *argv = shlex.split(command)
    for count in (1, 2, 3, 4):
        if os.fork() == 0:
            sys.modules[script.removesuffix(".py")].main([*argv, "--out", f"{script}{count}.pt"])
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
"""


class TestAllScripts(InFolder):
    def test_killed_and_resumed_each_script_ends_with_the_same_weights(self):
        # Files 1 and 2 are the state and the metrics, before the first step. Two steps later 3 is
        # the state again, and 4 is the best model. The plotting backend is one that there is not.
        runs = [run + " --max-steps 6 --eval-every 2" for run in (
            "pretrain.py --init tiny.pt --data text.txt --dtype float32 --out run.pt",
            CLASSIFY + "--train lora",
            INSTRUCT + "--train lora --no-responses --batch-size 4 --grad-accum 2")]
        killed = subprocess.run([sys.executable, "-c", KILLED, *runs], capture_output=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT),
                                     "MPLBACKEND": "bogus"}, timeout=200)
        self.assertEqual(killed.returncode, 0, killed.stderr[-2000:])
        for run in runs:
            self.ok(run)
            expected, log = weights("run.pt"), Path("run.csv").read_bytes()
            self.ok(f"{run} --out prolonged.pt --epochs 1 --max-steps 4")
            killed = [run.split()[0] + str(count) for count in (1, 2, 3, 4)]
            for out in [*killed, "prolonged"]:
                self.assertIn("resumed", self.ok(f"{run} --out {out}.pt --epochs 3 --resume"))
                self.assertTrue(torch.equal(weights(f"{out}.pt"), expected), out)
                self.assertEqual(Path(f"{out}.csv").read_bytes(), log, out)

    def test_without_a_network_the_error_names_the_addresses_and_the_place_for_the_file(self):
        gpt.named_tokenizer.cache_clear()
        for command, place, *addresses in [
                ("tokenizer.py encode hi", "data/vocab.bpe", *gpt.VOCAB_BPE_URLS),
                ("tokenizer.py train --stories", "data/TinyStories-valid.txt", *gpt.STORIES_URLS),
                ("pretrain.py --preset verdict --tokenizer bytes --n-layers 1",
                 "data/the-verdict.txt", *gpt.VERDICT_URLS),
                ("load_gpt2.py --size 355M", "data/", "openai-community/gpt2-medium/resolve",
                 "openaipublic.blob.core.windows.net/", "f001.backblazeb2.com/"),
                ("finetune_classifier.py --init tiny.pt", "data/sms+spam+collection.zip",
                 "archive.ics.uci.edu/", "f001.backblazeb2.com/"),
                ("finetune_instruct.py --init tiny.pt", "data/instruction-data.json", "https://")]:
            with mock.patch("requests.get", side_effect=requests.ConnectionError("unplugged")):
                status, out, err = call(command)
            self.assertEqual(status, 1, command)
            for word in (place, *addresses, "unplugged"):
                self.assertIn(word, out + err, command)
            self.assertFalse(Path("data").exists())       # nothing is left of the attempt

    def test_the_order_of_imports_and_that_every_open_names_its_encoding(self):
        for script in SCRIPTS:
            found = []
            for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    found.append(node.module.partition(".")[0])
                elif isinstance(node, ast.Import):
                    found += [alias.name.partition(".")[0] for alias in node.names]
                elif isinstance(node, ast.Call):
                    text = ast.unparse(node)
                    if re.match(r"open\(|.*\.(read|write)_text\(", text, re.DOTALL):
                        self.assertRegex(text, r"encoding=|'[rwa]b'", script)

            # A stage needs nothing of ours but gpt, and gpt before torch: it sets how threads wait.
            ours = [name for name in found if f"{name}.py" in SCRIPTS]
            self.assertEqual(ours, [] if script == "gpt.py" else ["gpt"], script)
            others = [name for name in found if name not in sys.stdlib_module_names]
            self.assertEqual(others[0], "torch" if script == "gpt.py" else "gpt", script)

    def test_every_command_in_the_readme_parses(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        commands = re.findall(r"(?m)^!?(?:torchrun \S+ \d+|python) (\w+\.py.*)$", readme)
        self.assertGreater(len(commands), 20)
        for command in commands:
            script, *words = shlex.split(command, comments=True)
            help_text = self.ok(" ".join([script, *set(words[:1]) & {"train", "encode"}, "--help"]))
            for word in words:
                if word.startswith("--"):
                    self.assertIn(word.partition("=")[0], help_text, command)

    def test_an_empty_name_is_wrong_usage(self):
        for script in [*SCRIPTS, "tokenizer.py train", "tokenizer.py encode"]:
            options = re.findall("(?m)^  (--[a-z-]+) [A-Z{]", self.ok(f"{script} --help"))
            for option in set(options) - {"--prompt", "--input"}:   # empty ones make sense
                status, _, err = call(f"{script} {option} ''")
                self.assertEqual((status, option in err), (2, True), f"{script}: {err}")

    def test_what_is_printed_fits_80_columns(self):
        for command in ["gpt.py", "tokenizer.py", PRETRAIN + "--max-steps 1",
                        CLASSIFY + "--max-steps 1", INSTRUCT + "--max-steps 1",
                        "gpt.py --prompt x", "gpt.py --checkpoint tiny.pt --explain --prompt x"]:
            _, out, err = call(command)
            longest = max((out or err).splitlines(), key=len)
            self.assertLessEqual(len(longest), 80, f"{command}: {longest}")


# ---------------------------------------------------------------------------------------------
# load_gpt2.py

V, T, C, H, L = 400, 16, 32, 2, 11  # 11 blocks: h10 comes before h2 in sorted order
HUB_FILE = Path("hub/model.safetensors")
BLOCK = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
         "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
              "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
              "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
              "mlp.c_proj": "ffn_down"}


def random_gpt2():
    """{the hub's name: float32 array} of a tiny GPT-2, in numbers that bfloat16 holds, too."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i, (name, shape) in itertools.product(range(L), BLOCK.items()):
        shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    arrays = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    return {name: (array.view("u4") & 0xffff0000).view("f4") for name, array in arrays.items()}


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
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")                 # (T, 3 C)
        q, k, v = np.split(qkv.reshape(len(ids), 3 * H, C // H).swapaxes(0, 1), 3)
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(C // H)) * np.tri(len(ids))
        heads = scores / scores.sum(-1, keepdims=True) @ v                         # (H, T, C / H)
        x = x + linear(heads.swapaxes(0, 1).reshape(-1, C), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


def write_safetensors(path, arrays, dtype="F32"):
    """Write {name: array} in the hub's format."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_gguf(path):
    """(keys, {tensor's name: array}) of a GGUF file, after llama.cpp's description."""
    file = io.BytesIO(Path(path).read_bytes())

    def take(form):
        values = struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))
        return values[0] if len(values) == 1 else values

    def text():
        return file.read(take("Q")).decode()

    def value(kind):
        if kind == 9:                                # a list
            kind, count = take("IQ")
            return [value(kind) for _ in range(count)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f"}[kind])

    magic, num_tensors, num_keys = take("8sQQ")
    assert magic == b"GGUF\3\0\0\0"                 # version 3
    keys = {text(): value(take("I")) for _ in range(num_keys)}
    infos = [(text(), np.atleast_1d(take(f"{take('I')}Q"))[::-1], *take("IQ"))
             for _ in range(num_tensors)]
    data, tensors = file.getvalue()[file.tell() + -file.tell() % 32:], {}
    for name, shape, kind, offset in infos:
        if kind == 0:
            array = np.frombuffer(data, "<f4", math.prod(shape), offset)
        else:                                        # 8: 32 rounded numbers and their scale
            blocks = np.frombuffer(data, [("scale", "<f2"), ("numbers", "i1", 32)],
                                   math.prod(shape) // 32, offset)
            array = blocks["numbers"] * blocks["scale"][:, None].astype(np.float32)
        tensors[name] = array.reshape(shape)
    return keys, tensors


def tensorflow_name(hub_name):
    """h.3.attn.c_attn.weight -> model/h3/attn/c_attn/w, as OpenAI names it."""
    name = re.sub(r"^h\.(\d+)\.", r"h\1/", hub_name).replace(".", "/")
    name = re.sub(r"(ln_\w)/weight", r"\1/g", name).replace("/weight", "/w").replace("/bias", "/b")
    return "model/" + name.replace("wte/w", "wte").replace("wpe/w", "wpe")


class TestLoadGPT2(InFolder):
    def setUp(self):
        super().setUp()
        self.weights = random_gpt2()
        self.write("hub/config.json", json.dumps({"n_head": H, "vocab_size": V}))
        write_safetensors(HUB_FILE, self.weights)
        tf = sorted((tensorflow_name(name), w.tobytes()) for name, w in self.weights.items())
        self.write("models/124M/model.ckpt.data-00000-of-00001", b"".join(data for _, data in tf))
        self.write("models/124M/hparams.json", json.dumps(
            {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}))

    def check_logits(self, model, ids=(0, 299, 7, 7, 42)):
        logits = model(torch.tensor([ids]))[0].detach().numpy()
        np.testing.assert_allclose(logits, numpy_gpt2(self.weights, list(ids)), 1e-4, 2e-4)

    def refused(self, words, source="hub --tokenizer bytes"):
        self.fails(f"load_gpt2.py --from {source} --out refused.pt", words)
        self.assertFalse(Path("refused.pt").exists())

    def export(self, tokenizer, *paths):
        """Load what is in hub/ and write it for other software."""
        texts = instruct.PROMPT_STYLES["phi3"]
        gpt.save_checkpoint("m.pt", load_gpt2.load_local("hub"), tokenizer, prompt_texts=texts)
        for path in paths:
            self.ok(f"load_gpt2.py --checkpoint m.pt --export {path}")

    @needs("gpt2-tiny-hf", "gpt2-tiny-tf")
    def test_files_of_transformers_and_tensorflow_give_transformers_logits(self):
        expected = np.load(ROOT / "data" / "gpt2-tiny-tf" / "expected_logits.npz")
        for name in ("gpt2-tiny-hf", "gpt2-tiny-tf"):
            model = load_gpt2.load_local(ROOT / "data" / name)
            logits = model(torch.from_numpy(expected["ids"])).detach().numpy()
            self.assertLess(np.abs(logits - expected["logits"]).max(), 2e-5, name)

    def test_every_format_and_spelling_gives_the_logits_of_gpt2_in_numpy(self):
        for source in ("hub", HUB_FILE, "models/124M"):
            self.check_logits(load_gpt2.load_local(source))

        # Cut into two files, with longer names, in numbers of two bytes.
        HUB_FILE.unlink()
        for dtype, shorten in (("F16", lambda array: array.astype(np.float16)),
                               ("BF16", lambda array: array.view(np.uint16)[..., 1::2])):
            arrays = [(f"transformer.{name}", shorten(w)) for name, w in self.weights.items()]
            write_safetensors("hub/model-00001-of-00002.safetensors", dict(arrays[:60]), dtype)
            write_safetensors("hub/model-00002-of-00002.safetensors", dict(arrays[60:]), dtype)
            self.check_logits(load_gpt2.load_local("hub"))

    def test_a_state_dict_of_code_for_the_book_becomes_a_checkpoint(self):
        ids = torch.tensor([[1, 2, 3]])
        for changes in ({}, {"qkv_bias": True}, {"tie_embeddings": True}):
            model = tiny_model(spread=0.3, **changes)
            plain = {**model.state_dict(), "trf_blocks.0.att.mask": torch.ones(64, 64).triu(1)}
            wrapped = {f"_orig_mod.module.{name}": t for name, t in plain.items()}
            for saved in (plain, {"model_state_dict": wrapped, "optimizer_state_dict": {}}):
                torch.save(saved, "model.pth")
                self.ok("load_gpt2.py --from model.pth --n-heads 2 --tokenizer bytes --out a.pt")
                back = gpt.load_checkpoint("a.pt")[0]
                self.assertEqual(back.cfg["tie_embeddings"], "tie_embeddings" in changes)
                self.assertTrue(torch.equal(back(ids), model(ids)))

    def test_params_are_the_book_s_tree_and_load_into_a_model(self):
        settings, params = load_gpt2.download_and_load_gpt2("124M", "models")
        self.assertEqual((settings["n_head"], settings["n_layer"]), (H, L))
        np.testing.assert_array_equal(params["blocks"][10]["mlp"]["c_fc"]["w"],
                                      self.weights["h.10.mlp.c_fc.weight"])
        model = tiny_model(vocab_size=V, context_length=T, emb_dim=C, n_layers=L, qkv_bias=True)
        load_gpt2.load_weights_into_gpt(model, params)
        self.check_logits(model)

    def test_what_would_be_read_wrong_or_is_damaged_is_a_sentence(self):
        self.refused("tokenizer.json", "hub")
        self.export(BYTES, "my-gpt")
        right = json.loads(Path("my-gpt/tokenizer.json").read_text(encoding="utf-8"))
        for change, words in (({"added_tokens": [{"id": 300, "content": "<pad>"}]}, "added tokens"),
                              ({"pre_tokenizer": {"type": "Whitespace"}}, "another way")):
            self.write("my-gpt/tokenizer.json", json.dumps({**right, **change}))
            self.refused(words, "my-gpt")

        whole = HUB_FILE.read_bytes()
        for content in (b"", whole[:100], whole[:-100], b"\xff" * 100):
            self.write(HUB_FILE, content)
            self.refused("Error: ")
        write_safetensors(HUB_FILE, {n: a for n, a in self.weights.items() if "10.ln_1" not in n})
        self.refused("h.10.ln_1.weight")

        self.write(HUB_FILE, whole)
        for config, words in (("", "line 1"), ('{"n_head": 5}', "divisible"), ("{}", "--n-heads"),
                              ('{"layer_norm_epsilon": 1e-6}', "config.json says"),
                              ("[" * 200_000, "RecursionError")):
            self.write("hub/config.json", config)
            self.refused(words)

    def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_byte(self):
        self.write("data/the-verdict.txt", TEXT)
        self.weights["wte.weight"][:] = 0
        write_safetensors(HUB_FILE, self.weights)
        out = " ".join(self.ok("load_gpt2.py --from hub --tokenizer bytes --out a.pt").split())
        self.assertIn(f"{math.log(V):.3f} nats per token, {math.log2(V):.3f} bits per byte", out)

    def test_an_exported_folder_is_read_again_with_or_without_a_head_of_its_own(self):
        for _ in range(2):
            self.export(BYTES, "my-gpt/")
            self.ok("load_gpt2.py --from my-gpt --out back.pt")
            model, tokenizer, _ = gpt.load_checkpoint("back.pt")
            self.check_logits(model)
            self.assertEqual(tokenizer.encode(TEXT), BYTES.encode(TEXT))
            self.weights["lm_head.weight"] = self.weights["wte.weight"] + 1
            write_safetensors(HUB_FILE, self.weights)

    def test_an_exported_vocabulary_gives_other_software_our_tokens(self):
        trained = tok.BPETokenizer()
        trained.train(TEXT + " ".join(map(chr, range(160, 1200))), V)
        self.export(trained, "my-gpt")
        text = TEXT[:200] + "".join(map(chr, range(32, 1300))) + "I'm 3.14 \n\n\t x  ..."
        expected = trained.encode(text)

        # Other software replays the list of merges in its order (Sennrich et al. 2016).
        model = json.loads(Path("my-gpt/tokenizer.json").read_text(encoding="utf-8"))["model"]
        letters = {byte: letter for letter, byte in gpt.BYTE_OF_LETTER.items()}
        tokens = "\n".join(" ".join(letters[byte] for byte in chunk.encode())
                           for chunk in tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, text))
        for a, b in model["merges"]:
            pair = rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)"
            tokens = re.sub(pair, lambda match: a + b, tokens)
        self.assertEqual([model["vocab"][token] for token in tokens.split()], expected)

        # The same vocabulary is read in this form, and in the older one of two files.
        self.write("my-gpt/vocab.json", json.dumps({**model["vocab"], gpt.END_OF_TEXT: V - 1}))
        merges = "\n".join(map(" ".join, model["merges"]))
        self.write("my-gpt/merges.txt", f"#version: 0.2\n{merges}")
        for _ in range(2):
            self.ok("load_gpt2.py --from my-gpt --out back.pt")
            self.assertEqual(gpt.load_checkpoint("back.pt")[1].encode(text), expected)
            Path("my-gpt/tokenizer.json").unlink(missing_ok=True)
        self.write("my-gpt/added_tokens.json", '{"<pad>": 400}')
        self.refused("added tokens", "my-gpt")

    def test_an_export_replaces_its_own_files_alone_and_only_when_it_is_whole(self):
        self.export(BYTES, "my-gpt", "m.gguf", "m.gguf --quantize q8_0", "my-gpt", "noted")
        self.write("noted/README.md", "about my model")
        self.write("mine.Modelfile", "FROM mine\n")
        before = self.files()
        for path in ("noted", "hub", "mine.gguf", "text.txt"):
            self.fails(f"load_gpt2.py --checkpoint m.pt --export {path}", "holds something else")
        with mock.patch.object(Path, "write_text", side_effect=OSError("disk full")):
            self.fails("load_gpt2.py --checkpoint m.pt --export my-gpt", "disk full")
        self.assertEqual(self.files(), before)

    def test_an_export_stopped_at_a_rename_leaves_a_whole_model(self):
        self.export(BYTES, "my-gpt")
        for renames in ([KeyboardInterrupt], [mock.DEFAULT, KeyboardInterrupt]):
            with mock.patch("os.rename", wraps=os.rename, side_effect=renames):
                self.assertEqual(call("load_gpt2.py --checkpoint m.pt --export my-gpt")[0], 130)
            left, = (name for name in ("my-gpt", "my-gpt.old.tmp") if Path(name).exists())
            self.check_logits(load_gpt2.load_local(Path(left)))
            self.ok("load_gpt2.py --checkpoint m.pt --export my-gpt")
            self.assertEqual([*Path().glob("my-gpt*")], [Path("my-gpt")])

    def test_the_chat_template_writes_the_tokens_that_training_shows(self):
        import jinja2  # as transformers does it
        self.export(BYTES, "my-gpt", "m.gguf")
        template = read_gguf("m.gguf")[0]["tokenizer.chat_template"]
        config = Path("my-gpt/tokenizer_config.json").read_text(encoding="utf-8")
        self.assertEqual(json.loads(config)["chat_template"], template)
        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        messages = [{"role": role, "content": content} for role, content in (
            ("system", "Be brief."), ("user", "Say \"one\"."), ("assistant", "one\n"),
            ("user", "Again?"), ("assistant", "two"))]
        written = template.render(messages=messages)
        learned, _ = instruct.encode_entry(instruct.to_entry({"messages": messages}), BYTES, "phi3")
        self.assertEqual(BYTES.encode(written, allowed_special="all"), learned)
        asked = template.render(messages=messages[:-1], add_generation_prompt=True)
        self.assertEqual(asked + "two<|endoftext|>", written)
        modelfile = Path("m.Modelfile").read_text(encoding="utf-8")        # the same for Ollama
        self.assertIn('TEMPLATE """<|user|>\n{{ if .System }}{{ .System }}\n\n{{ end }}'
                      '{{ .Prompt }}\n<|assistant|>\n{{ .Response }}<|endoftext|>"""', modelfile)

    def test_a_gguf_file_has_every_tensor_and_key(self):
        self.weights["lm_head.weight"] = self.weights["wte.weight"] + 1
        write_safetensors(HUB_FILE, self.weights)
        self.export(BYTES, "m.gguf", "small.gguf --quantize q8_0")
        (keys, tensors), (_, rounded) = map(read_gguf, ("m.gguf", "small.gguf"))
        for hub_name, array in self.weights.items():
            block, name, ending = re.fullmatch(r"(h\.\d+\.)?(.*)\.(\w+)", hub_name).groups("")
            name = block.replace("h.", "blk.") + GGUF_NAMES[name] + "." + ending
            array = array.T if ".c_" in hub_name else array           # linear layers are (out, in)
            np.testing.assert_array_equal(tensors.pop(name), array)
            error = np.abs(rounded.pop(name) - array).max()
            self.assertEqual(error > 0, array.ndim == 2 and "position" not in name)
            self.assertLessEqual(error, np.abs(array).max() / 200)   # half of a 127th, at most
        self.assertEqual((tensors, rounded), ({}, {}))
        self.assertEqual((keys["gpt2.block_count"], len(keys["tokenizer.ggml.tokens"]),
                          keys["tokenizer.ggml.eos_token_id"]), (L, V, 256))


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

    def test_tables_with_any_divider_and_columns_by_header_number_and_default(self):
        stars = [("5", "good"), ("1", 'bad "')] * 10
        tsv = "id\ttext\tstars\n" + "".join(f"7\t{text}\t{label}\r\n" for label, text in stars)
        said = [("a", 'he said "hi",\nthen; left'), ("b", "y, z; w")] * 2
        quoted = 'a{0}"he said ""hi"",\nthen; left"\nb{0}"y, z; w"\n' * 2
        for content, columns, expected in [
                ("\ufeff" + quoted.format(","), (), said),
                ("label;text\n" + quoted.format(";"), (), said),
                (tsv, ("text", "stars"), stars), (tsv, ("TEXT", "3"), stars),
                ('a,"u; v; w"\n' * 9, (), [("a", "u; v; w")] * 9),
                ("\tno label\n" + "a\tx\n" * 9, (), [("a", "x")] * 9)]:
            self.write("table", content)
            self.assertEqual(quietly(clf.read_labelled_texts, "table", *columns), expected)

    def test_an_archive_put_there_by_hand_must_hold_the_expected_file(self):
        archive = Path("sms+spam+collection.zip")
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("../evil", "no")
            file.writestr("SMSSpamCollection", "ham\thello\n")
        with self.assertRaisesRegex(UserError, "another SHA-256.*delete it"):
            clf.download_and_unzip_spam_data([], "SMSSpamCollection")
        clf.download_and_unzip_spam_data([], "SMSSpamCollection",
                                         hashlib.sha256(b"ham\thello\n").hexdigest())
        self.assertEqual(Path("SMSSpamCollection").read_bytes(), b"ham\thello\n")
        self.assertFalse(archive.exists() or Path("../evil").exists())

    def test_padding_and_kept_outputs_never_change_a_result(self):
        """Against the plain model, a row at a time, read at its last token."""
        texts = ["a", "short <|endoftext|>", "a longer text than the others " * 2, "mid length"]
        model = tiny_model(spread=0.3)
        clf.replace_head(model, 3)
        data = clf.SpamDataset([(c, text) for c, text in zip("xyzx", texts)], BYTES, 64, "xyz")
        with torch.no_grad():
            truth = torch.stack([model(row[None])[0, -1] for row in data.rows])
            x, lengths, _ = clf.collate([data[i] for i in range(4)])
            wider = torch.cat([x, torch.full((4, 64 - x.shape[1]), 99)], dim=1)
            torch.testing.assert_close(clf.classify_batch(model, wider, lengths), truth)
        probs = clf.classify_texts(texts, model, BYTES, "cpu")
        torch.testing.assert_close(probs, truth.softmax(dim=-1))
        best = ["xyz"[i] for i in truth.argmax(dim=-1)]
        self.assertEqual([clf.classify_review(text, model, BYTES, "cpu", class_names="xyz")
                          for text in texts], best)

        # Loss and accuracy, with what the frozen blocks make of the texts in place of the IDs.
        clf.keep_frozen(model, data, "cpu", torch.float32)
        self.assertEqual([row.shape for row in data.rows], [(n, 16) for n in lengths])
        loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=clf.collate)
        loss = -truth.log_softmax(dim=-1)[range(4), data.labels].mean()
        self.assertAlmostEqual(clf.calc_loss_loader(loader, model, "cpu"), float(loss), places=5)
        right = [a == b for a, b in zip("xyzx", best)]
        accuracies = [clf.calc_accuracy_loader(loader, model, "cpu", n) for n in (None, 1)]
        self.assertEqual(accuracies, [sum(right) / 4, sum(right[:3]) / 3])

    def test_the_run_is_a_loop_over_single_texts_without_padding(self):
        train = clf.random_split(clf.create_balanced_dataset(
            quietly(clf.read_labelled_texts, "data.tsv")))[0]
        train = clf.SpamDataset(sorted(train, key=lambda pair: len(pair[1])), BYTES, 64)
        for mode, learns in {
                "head": r"out_head", "last-block": r"out_head|final_norm|trf_blocks\.1", "all": "",
                "lora": r"out_head|trf_blocks.*(W_\w+|out_proj|layers\.\d)\.weight"}.items():
            run = CLASSIFY + f"--train {mode} --max-steps 9 --eval-every 9 "
            self.ok(run)
            once = weights("run.pt")
            self.ok(run + "--batch-size 4 --grad-accum 2")
            torch.testing.assert_close(weights("run.pt"), once, atol=1e-3, rtol=0)

            model = gpt.load_checkpoint("tiny.pt")[0]
            start = {name: t.clone() for name, t in model.state_dict().items()}
            torch.manual_seed(123)
            clf.replace_head(model, 2)
            clf.freeze(model, mode)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          lr=0.01, weight_decay=0.1)
            order = []                                # each text once an epoch, in a new order
            for epoch in (0, 1):
                torch.manual_seed(hash((123, epoch)))
                order += torch.utils.data.DataLoader(range(len(train)), 8, shuffle=True)
            for numbers in order[:9]:
                loss = sum(F.cross_entropy(model(train[i][0][None])[:, -1], train[i][1][None])
                           for i in numbers) / len(numbers)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.testing.assert_close(once, weights(gpt.merge_lora(model)), atol=1e-3, rtol=0)
            for name, t in torch.load("run.pt", weights_only=True)["model"].items():
                same = name in start and torch.equal(start[name], t)
                self.assertEqual(same, not re.match(learns, name), f"{mode}: {name}")

    def test_the_book_s_call_learns_and_returns_five_values(self):
        parts = clf.random_split(quietly(clf.read_labelled_texts, "data.tsv"))
        loaders = [torch.utils.data.DataLoader(clf.SpamDataset(part, BYTES), 8, shuffle=True,
                                               collate_fn=clf.collate) for part in parts[:2]]
        clf.replace_head(model := tiny_model(), num_classes=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        train_losses, *others, val_accs, examples_seen = quietly(
            clf.train_classifier_simple, model, *loaders, optimizer, torch.device("cpu"),
            num_epochs=5, eval_freq=10, eval_iter=5)
        self.assertEqual((len(train_losses), examples_seen), (4, 5 * len(parts[0])))
        self.assertLess(train_losses[-1], train_losses[0] / 2)
        self.assertEqual(val_accs[-1], 1)

    def test_the_report_follows_from_the_predictions(self):
        labels = torch.tensor([0] * 50 + [1] * 50)
        for spam, words in [
                (10, "60.0%.*50.2% to 69.1%.*50.0%.*ham +50 +55.6% +100.0% +ham: 50\n"
                     "spam +50 +100.0% +20.0% +ham: 40, spam: 10\n"),
                (0, "spam +50 +- +0.0% +ham: 50\n")]:            # never predicted: no precision
            predicted = torch.tensor([0] * (100 - spam) + [1] * spam)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                clf.report(["ham", "spam"], labels, predicted, commonest=0)
            self.assertRegex(out.getvalue(), "(?s)" + words)

    def test_three_classes_learn_and_travel_to_classify(self):
        self.write("data.tsv", "a\t\n\nb\t \n" + labelled_lines(classes=("a", "b", "c\x1b"))
                   + f"a\t{' ' * 10**6}x\n")
        out = self.ok(CLASSIFY + "--epochs 12 --no-balance --train all")
        self.assertIn("121 of 123 lines have a text", out)

        self.write("in.txt", "meet me at home now\n\nWIN cash NOW\nthe weather is mild\x1b\n")
        with open("in.txt", encoding="utf-8") as file:
            before = os.dup(0)
            os.dup2(file.fileno(), 0)
            lines = self.ok("finetune_classifier.py --checkpoint run.pt --classify").splitlines()
            os.dup2(before, 0)
        self.assertEqual([line.split("\t")[0::2] for line in lines], [
            ["a", "meet me at home now"], ["b", "WIN cash NOW"],
            ["c\ufffd", "the weather is mild\ufffd"]])

    def test_own_splits_train_on_all_of_data_and_test_on_the_rest(self):
        self.write("val.tsv", "ham\tmeet me\nham\tmeet\nspam\tWIN cash\n")
        self.write("test.csv", "label,text\n" + "spam,WIN NOW\n" * 3)
        out = self.ok(CLASSIFY + "--val-data val.tsv --test-data test.csv")
        self.assertIn("80 to train, 3 to validate, 3 to test", out)
        self.assertIn("of 3 texts are right", out)
        same_texts = [("a", "hi"), ("b", "hi"), ("c", "hi")]          # odd, but no mistake
        self.assertEqual(len(clf.SpamDataset(same_texts, BYTES, class_names="abc")), 3)


# ---------------------------------------------------------------------------------------------
# finetune_instruct.py

ANN = {"history": [["I am Ann.", "Hello!"]], "instruction": "Who am I?", "output": "Ann."}
ANN_ROW = [*b"<|user|>\nI am Ann.\n<|assistant|>\nHello!", 256,
           *b"<|user|>\nWho am I?\n<|assistant|>\nAnn."]     # the agreed form, byte by byte
LAST_TURN = ANN_ROW[ANN_ROW.index(256) + 1:]

FACTS = {  # what can be told, how, the answer to it; what is asked later, and its answer
    "name": ("Tim Lily Tom Mia Ben Sue Max Anna Sam Lucy Jack Ella Leo Zoe Bob Amy Jim Kate",
             "My name is {}.", "Hello, {}!", "What is my name?", "Your name is {}."),
    "color": ("red blue green yellow pink black white brown purple gold gray orange",
              "My ball is {}.", "I like {} balls.", "What color is my ball?", "Your ball is {}."),
    "number": ("2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25",
               "I ate {} apples.", "{} are a lot.", "How many apples?", "You ate {} apples."),
    "animal": ("dog cat bird fish frog bear duck pig cow horse sheep mouse lion rabbit",
               "My pet is a {}.", "A {} is a good friend.", "What is my pet?", "It is a {}.")}


def write_conversations(path, number=4000, seed=0):
    """Conversations in which one to three things are told, then one of them is asked."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(number):
            told = [(FACTS[kind], rng.choice(FACTS[kind][0].split()))
                    for kind in rng.sample(list(FACTS), rng.choice([1, 2, 3]))]
            fact, thing = rng.choice(told)
            history = [[f[1].format(t), f[2].format(t)] for f, t in told]
            file.write(json.dumps({"history": history, "instruction": fact[3],
                                   "output": fact[4].format(thing)}) + "\n")


def set_of(*records, **options):
    return instruct.InstructionDataset(records, BYTES, "phi3", **options)


def collate(batch):
    return instruct.custom_collate_fn(batch, 256)


class TestInstructions(InFolder):
    def test_collate_gives_the_book_s_example(self):
        inputs, targets = instruct.custom_collate_fn([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
        self.assertEqual(inputs.tolist(), [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256],
                                           [7, 8, 9, 50256, 50256]])
        self.assertEqual(targets.tolist(), [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100],
                                            [8, 9, 50256, -100, -100]])
        _, targets = instruct.custom_collate_fn([[1, 9, 9, 2], [3]], pad_token_id=9)
        self.assertEqual(targets.tolist(), [[9, 9, 2, 9], [9, -100, -100, -100]])  # no padding
        inputs, _ = instruct.custom_collate_fn([[1, 9, 9, 2], [3]], 9, allowed_max_length=3)
        self.assertEqual(inputs.tolist(), [[1, 9, 9], [3, 9, 9]])

    def test_targets_are_the_answers_and_their_ends_and_a_mark_in_a_text_is_text(self):
        for mask, expected in ((True, [*b"Hello!", 256, *b"Ann.", 256]),
                               (False, [*ANN_ROW[1:], 256])):
            inputs, targets = collate([set_of(ANN, mask_prompt=mask)[0]])
            self.assertEqual(inputs[0].tolist(), ANN_ROW)
            self.assertEqual([i for i in targets[0].tolist() if i != -100], expected)
            self.assertEqual(targets[0, -5:].tolist(), [*b"Ann.", 256])
        row, _ = set_of({"instruction": "<|endoftext|>?", "output": "<|endoftext|>"})[0]
        self.assertEqual(bytes(row), b"<|user|>\n<|endoftext|>?\n<|assistant|>\n<|endoftext|>")

    @needs("instruction-data.json", "tiktoken")
    def test_the_book_s_records_are_its_text_and_split_and_encode_as_there(self):
        path, tokenizer = ROOT / "data" / "instruction-data.json", tiktoken.get_encoding("gpt2")
        args = mock.Mock(prompt_style="alpaca", mask_prompt=False, val_data=None)
        train, val, test = quietly(instruct.make_datasets, args, path, tokenizer, 1024)
        self.assertEqual([len(train), len(val), len(test)], [935, 55, 110])
        self.assertEqual(instruct.format_input(train.data[0]), (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nEvaluate the following phrase by "
            "transforming it into the spelling given.\n\n### Input:\nfreind --> friend"))
        for entry, (ids, targets) in zip(train.data, train):
            self.assertEqual(ids, tokenizer.encode(
                instruct.format_input(entry) + "\n\n### Response:\n" + entry["output"]))
            self.assertEqual(targets, [*ids[1:], 50256])

    def test_a_file_in_any_of_the_known_forms_is_read(self):
        user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        shared = [{"from": name, "value": text}
                  for name, text in (("human", "p"), ("gpt", "o"), ("human", "q"), ("gpt", "a"))]
        history = [["p", "o"]]
        for record, expected in [
                ({"instruction": "q", "input": None, "output": "a", "x": 1}, ("q", "", "a", [])),
                ({"instruction": "q", "output": "a", "history": history}, ("q", "", "a", history)),
                ({"instruction": "q", "context": "i", "response": "a"}, ("q", "i", "a", [])),
                ({"prompt": "q", "completion": "a"}, ("q", "", "a", [])),
                ({"messages": [{"role": "system", "content": "s"}, user, answer], "prompt": "q"},
                 ("s\n\nq", "", "a", [])),
                ({"conversations": shared}, ("q", "", "a", history))]:
            expected = dict(zip(("instruction", "input", "output", "history"), expected))
            lines = f"\ufeff{json.dumps(record)}\n\n{json.dumps(record)}\n"
            for content in (json.dumps([record, record]), lines):
                self.write("r.json", content)
                read = json.loads(json.dumps(instruct.read_records("r.json")))  # tuples to lists
                self.assertEqual(read, [expected] * 2)
        write_conversations("told.jsonl", number=20)
        written = map(json.loads, Path("told.jsonl").read_text(encoding="utf-8").splitlines())
        self.assertEqual(instruct.read_records("told.jsonl"), [{"input": "", **r} for r in written])

    def test_what_is_no_record_is_named_with_its_names(self):
        good = '{"instruction": "a", "output": "b"}'
        for content, words in [
                ("[" * 200_000, "JSON list"),
                ('[{"instruction": "a", "output": 5}]', "0 records"),
                (f'[{good}, {{"output": "b", "label": 1}}]', "1 records.*names are output, label"),
                (good.replace("}", ', "history": [["a"]]}'), "0 records"),
                (good.replace("}", ', "history": [{"question": "a", "answer": "b"}]}'), "pairs"),
                ('{"messages": [{"role": "tool", "content": "a"}]}', "tool")]:
            self.write("r.json", content)
            with self.subTest(words), self.assertRaisesRegex(UserError, f"(?s)r.json.*{words}"):
                instruct.read_records("r.json")

    def test_what_is_too_long_loses_its_oldest_turns_then_the_end_of_its_answer(self):
        long = {**ANN, "history": [["x" * 99, "y"], *ANN["history"]]}
        cut = {"instruction": "x" * 50, "output": "y" * 50}
        unanswered = {"instruction": "x" * 99, "output": "y"}
        data = set_of(ANN, long, cut, unanswered, max_length=len(ANN_ROW), mask_prompt=True)
        self.assertEqual([ids for ids, _ in data][:2], [ANN_ROW] * 2)
        self.assertEqual((len(data), data.num_cut), (3, 2))
        self.assertEqual((len(data[2][0]), data[2][1][-1]), (len(ANN_ROW), ord("y")))
        self.assertTrue(all(set(targets) > {-100} for _, targets in data))   # never a mean of none
        with self.assertRaisesRegex(UserError, "ask it shorter"):
            instruct.encode_prompt(unanswered, BYTES, "phi3", len(ANN_ROW))
        with self.assertRaisesRegex(UserError, "shorten it"):
            set_of({"instruction": "a" + " " * 10**6, "output": "b"})

    def chat(self, *lines, context=256):
        """(status, prompts that the model gets, what is printed) when it always says "Hello!"."""
        prompts = []

        def answer(model, prompt, *args, **options):
            prompts.append(list(prompt))
            if "stop" in BYTES.decode(prompt):
                raise KeyboardInterrupt
            return map(torch.tensor, [[token] for token in [*b"Hello!", 256]])

        gpt.save_checkpoint("chat.pt", tiny_model(context_length=context), BYTES)
        with (mock.patch("builtins.input", side_effect=lines),
              mock.patch.object(instruct, "generate_stream", answer)):
            status, out, _ = call("finetune_instruct.py --chat --checkpoint chat.pt")
        return status, prompts, out

    def test_chat_sends_the_tokens_that_training_showed_and_drops_the_oldest_turns(self):
        status, prompts, out = self.chat("I am Ann.", "  ", "/help", "stop", "Who am I?", EOFError)
        self.assertEqual((status, out.count("Hello!"), out.count("/reset")), (0, 2, 2))
        self.assertEqual(prompts[-1], ANN_ROW[:-4])           # what was stopped is forgotten
        _, prompts, _ = self.chat("I am Ann.", "/reset", "Who am I?", "/exit")
        self.assertEqual(prompts[-1], LAST_TURN[:-4])
        _, prompts, out = self.chat("I am Ann.", "x" * 99, f"a{' ' * 10**6}b", "Who am I?", "/exit",
                                    context=80)
        self.assertEqual(prompts[-1], LAST_TURN[:-4])
        self.assertRegex(" ".join(out.split()), "no room for an answer.*; shorten it")
        self.assertEqual(self.chat("Hi", KeyboardInterrupt)[0], 130)
        latin1 = io.TextIOWrapper(io.BytesIO("café".encode("latin-1")), encoding="utf-8")
        with mock.patch("sys.stdin", latin1):
            self.ok("finetune_instruct.py --chat --checkpoint chat.pt --max-new-tokens 1")

    def test_the_book_s_call_teaches_an_answer_that_uses_an_earlier_turn(self):
        """A small model learns to say who spoke; without the earlier turn it cannot know."""
        names = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrst", repeat=2)]
        random.Random(0).shuffle(names)
        records = [{"history": [(f"I am {name}.", "Hi!")], "instruction": "Who am I?",
                    "output": name} for name in names[:280]]
        data = set_of(*records[40:], mask_prompt=True)
        model = tiny_model(context_length=128, emb_dim=32, drop_rate=0.0)
        loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        _, val_losses, tokens_seen = quietly(
            instruct.train_model_simple, model, loader, loader, optimizer, torch.device("cpu"),
            num_epochs=10, eval_freq=100, eval_iter=1, start_context="Hi", tokenizer=BYTES)
        self.assertEqual(tokens_seen, [steps * 16 * len(data[0][0]) for steps in (0, 100, 150)])
        self.assertLess(val_losses[-1], val_losses[0] - 1)
        for cut_off, low, high in (({}, 0.8, 1), ({"history": []}, 0, 0.1)):
            entries = [{**entry, **cut_off} for entry in records[:40]]
            instruct.generate_responses(model, BYTES, entries, "phi3", 8)
            share = sum(e["model_response"] == e["output"] for e in entries) / 40
            self.assertTrue(low <= share <= high, share)

    def test_scores_written_out_of_the_last_answer_alone(self):
        for answer, truth, expected in (("The cat sat.", "the cat sat down", 6 / 7),
                                        ("a a", "b", 0), ("", "b", 0), ("?", "?", 1)):
            self.assertAlmostEqual(instruct.token_f1(answer, truth), expected)
        model, entry = tiny_model(spread=0.3, context_length=128), {**ANN, "model_response": "Ann."}
        means = instruct.score_responses(model.train(), BYTES, [entry], "phi3")
        logits = model(torch.tensor([ANN_ROW]))[0, -5:]
        expected = F.cross_entropy(logits, torch.tensor([*b"Ann.", 256])).item()
        self.assertAlmostEqual(means["response_loss"], expected, places=3)
        self.assertEqual((means["exact_match"], means["token_f1"]), (1, 1))

    def test_the_judge_gets_the_book_s_question_and_its_first_integer_counts(self):
        replies, questions = ["11", "Score: 40/100", "very good", "1000"], []

        def ollama(request):
            questions.append(json.loads(request.rfile.read(int(request.headers["Content-Length"]))))
            send(request, json.dumps({"message": {"content": replies.pop(0)}}).encode())

        entries = [{**record, "model_response": "AAA"} for record in [ANN, *RECORDS[:3]]]
        self.write("run-responses.json", json.dumps([*entries, {**ANN, "model_response": ""}]))
        self.assertIn("17.00 of 100", self.ok(                      # (11 + 40 + 0) / 3
            f"finetune_instruct.py --judge x --judge-url {serve(self, ollama)} --out run.pt"))
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["judge"]["score"] for e in entries], [11, 40, None, None, 0])
        self.assertIn("input `I am Ann.\nHello!\n", questions[0]["messages"][0]["content"])
        self.assertEqual(questions[1]["messages"][0]["content"],
                         f"Given the input `{instruct.format_input(RECORDS[0])}` and correct "
                         "output `one`, score the model response `AAA` on a scale from 0 to 100, "
                         "where 100 is the best score. Respond with the integer number only.")


class TestInstructRun(InFolder):
    def test_the_run_is_the_plain_loop_whatever_the_batches(self):
        """All records at once, or three batches of nine with their gradients added: one loss."""
        gpt.save_checkpoint("tiny.pt", tiny_model(0.2, drop_rate=0.0), BYTES)
        for mask in (True, False):
            train = collate(list(set_of(*RECORDS[:25], mask_prompt=mask)))
            val = collate(list(set_of(*RECORDS[28:], mask_prompt=mask)))
            model = gpt.load_checkpoint("tiny.pt")[0]
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            losses, val_losses = [], []
            for _ in range(3):
                val_losses.append(F.cross_entropy(model(val[0]).flatten(0, 1), val[1].flatten()))
                losses.append(F.cross_entropy(model(train[0]).flatten(0, 1), train[1].flatten()))
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
            for split in ("--batch-size 25", "--batch-size 9 --grad-accum 3"):
                self.ok(INSTRUCT + f"--no-responses --epochs 3 --eval-every 1 {split} "
                        + ("" if mask else "--no-mask-prompt"))
                for name, expected in (("val_loss", val_losses), ("train_loss", losses)):
                    actual = self.metrics()[name][name == "train_loss":][:3]
                    np.testing.assert_allclose(actual, torch.stack(expected).tolist(), atol=2e-3)

    def test_a_run_answers_scores_and_is_asked(self):
        long = [{"instruction": "x" * 60, "output": "y"}, {"instruction": "x", "output": "y" * 60}]
        self.write("records.json", json.dumps([*RECORDS, *long]))
        self.write("test.json", json.dumps(RECORDS[:3]))
        run = INSTRUCT + "--train lora --val-data records.json --test-data test.json"
        out = " ".join(self.ok(run).split())
        self.assertIn("31 to train, 31 to validate, 3 to test", out)
        self.assertIn("2 lose their oldest turns or the end of the answer, 2 are left out", out)
        self.assertEqual(gpt.load_checkpoint("run.pt")[2]["prompt_style"], "phi3")
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertIn(f"token f1 {sum(e['token_f1'] for e in entries) / 3:.3f}", out)
        for entry, record in zip(entries, RECORDS[:3]):
            answer = self.ok("finetune_instruct.py --checkpoint run.pt --dtype float32 "
                             "--max-new-tokens 8 --ask '{instruction}' --input '{input}'"
                             .format(**record))
            self.assertEqual(answer.strip(), entry["model_response"])

    def test_the_style_follows_flag_checkpoint_and_context(self):
        for given, saved, context, style in (
                (None, {}, 1024, "alpaca"), (None, {}, 256, "phi3"),
                ("alpaca", {}, 256, "alpaca"), (None, {"prompt_style": "phi3"}, 1024, "phi3")):
            self.assertEqual(instruct.pick_style(given, saved, context), style)

    def test_edited_responses_and_a_judge_s_odd_reply_are_a_sentence_and_change_no_file(self):
        good, edited = {**RECORDS[0], "model_response": "A"}, "run-responses.json cannot be used"
        url = serve(self, lambda request: send(request, json.dumps(reply).encode()))
        for entries, reply, words in [
                (5, 5, edited), ([1], 5, edited), ([RECORDS[0]], 5, edited),
                ([{**good, "history": [5]}], 5, edited), ([{**good, "judge": 5}], 5, edited),
                ([{**good, "judge": {"model": "x", "score": "5"}}], 5, edited),
                *(([good], odd, "ollama pull x") for odd in (
                    5, None, [1], {"error": "busy"}, {"message": {"content": ["x"]}}))]:
            self.write("run-responses.json", json.dumps(entries))
            self.fails(f"finetune_instruct.py --judge x --judge-url {url} --out run.pt", words)
            self.assertEqual(json.loads(Path("run-responses.json").read_bytes()), entries)


if __name__ == "__main__":
    unittest.main()
