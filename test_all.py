"""What this project guarantees, as tests a newcomer can read: python test_all.py

Everything runs offline with tiny models. A test that needs a file in data/ (the book's text,
GPT-2's vocabulary) is skipped with a reason where the file is missing. Each test compares with
something independent of our code: arithmetic written out, tiktoken, the numbers the book prints.
"""

import contextlib
import csv
import hashlib
import http.server
import io
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

import numpy as np
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

TINY = {"vocab_size": 257, "context_length": 64, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
        "drop_rate": 0.1, "qkv_bias": False}
TEXT = "The cat sat on the mat; the dog sat on the log. Nobody knows why, and nobody asked.\n" * 30
BYTES = gpt.load_tokenizer("bytes")


def needs(*names):
    """Skip a test, with the reason, unless these files are in data/."""
    return unittest.skipUnless(all((ROOT / "data" / name).exists() for name in names),
                               f"needs data/{' and data/'.join(names)}")


def tiny_model(seed=0, spread=None, **changes):
    """A small model with random weights, always the same; `spread` wide, so that all have a say."""
    torch.manual_seed(seed)
    model = GPTModel({**TINY, **changes}).eval()
    if spread:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=spread)
    return model


def call(main, *argv):
    """Run a script's main as the command line does -> (status, standard output, error text)."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            gpt.run_main(lambda: main([str(a) for a in argv]))
        except SystemExit as e:
            return e.code or 0, out.buffer.getvalue().decode(), err.getvalue()


def quietly(function, *args, **options):
    """Call a function without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **options)


def weights(path, kind="language model"):
    """All parameters of a checkpoint in one row."""
    model = gpt.load_checkpoint(path, kind=kind)[0]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def labelled_lines(n=40, classes=("ham", "spam")):
    """Texts that can be told apart: a line per text, of different lengths."""
    words = ["meet me at home", "WIN cash NOW 0800", "the weather is mild"]
    return "".join(f"{name}\t{words[k]} {'x' * (i % 13)} {i}\n"
                   for i in range(n) for k, name in enumerate(classes))


RECORDS = [{"instruction": f"Say {word}", "input": "loud" if i % 3 == 0 else "",
            "output": "" if i == 4 else word * (1 + i % 3)}
           for i, word in enumerate("one two three four five six seven eight nine ten".split() * 3)]


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
        return Path(name)

    def ok(self, main, *argv):
        """Run a script that must succeed -> what it prints."""
        status, out, err = call(main, *argv)
        self.assertEqual(status, 0, out + err)
        return out


# Small runs of the three training scripts, the same but for what follows the flags here.
PRETRAIN = (pretrain.main, "--data", "text.txt", "--context-length", 16, "--emb-dim", 16,
            "--n-layers", 1, "--n-heads", 2, "--dtype", "float32", "--out", "run.pt")
CLASSIFY = (clf.main, "--init", "tiny.pt", "--data", "data.tsv", "--dtype", "float32", "--lr", 0.01,
            "--epochs", 2, "--out", "run.pt")
INSTRUCT = (instruct.main, "--init", "tiny.pt", "--data", "records.json", "--prompt-style", "phi3",
            "--dtype", "float32", "--lr", 0.01, "--max-new-tokens", 8, "--out", "run.pt")


# ---------------------------------------------------------------------------------------------
# gpt.py: the model

INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],  # the book's
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])  # six words


class TestAttention(unittest.TestCase):
    def assert_prints(self, actual, expected):
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=0)

    def test_the_ladder_gives_the_numbers_the_book_prints(self):
        self.assert_prints(gpt.attention_without_weights(INPUTS)[:2], [
            [0.4421, 0.5931, 0.5790], [0.4419, 0.6515, 0.5683]])
        torch.manual_seed(123)
        self.assert_prints(gpt.SelfAttention_v1(3, 2)(INPUTS), [
            [0.2996, 0.8053], [0.3061, 0.8210], [0.3058, 0.8203], [0.2948, 0.7939],
            [0.2927, 0.7891], [0.2990, 0.8040]])
        torch.manual_seed(789)
        self.assert_prints(gpt.SelfAttention_v2(3, 2)(INPUTS), [
            [-0.0739, 0.0713], [-0.0748, 0.0703], [-0.0749, 0.0702], [-0.0760, 0.0685],
            [-0.0763, 0.0679], [-0.0754, 0.0693]])
        batch = torch.stack([INPUTS, INPUTS])
        torch.manual_seed(123)
        self.assert_prints(gpt.MultiHeadAttentionWrapper(3, 2, 6, 0.0, num_heads=2)(batch)[1], [
            [-0.4519, 0.2216, 0.4772, 0.1063], [-0.5874, 0.0058, 0.5891, 0.3257],
            [-0.6300, -0.0632, 0.6202, 0.3860], [-0.5675, -0.0843, 0.5478, 0.3589],
            [-0.5526, -0.0981, 0.5321, 0.3428], [-0.5299, -0.1081, 0.5077, 0.3493]])
        torch.manual_seed(123)
        self.assert_prints(gpt.MultiHeadAttention(3, 2, 6, 0.0, num_heads=2)(batch)[1], [
            [0.3190, 0.4858], [0.2943, 0.3897], [0.2856, 0.3593], [0.2693, 0.3873],
            [0.2639, 0.3928], [0.2575, 0.4028]])

    def test_fast_attention_equals_the_wrapper_with_equal_weights(self):
        wrapper = gpt.MultiHeadAttentionWrapper(6, 2, 5, 0.0, num_heads=3)
        fast = gpt.MultiHeadAttention(6, 6, 5, 0.0, num_heads=3)
        fast.out_proj = torch.nn.Identity()
        for name in ("W_query", "W_key", "W_value"):
            stacked = torch.cat([getattr(head, name).weight for head in wrapper.heads])
            getattr(fast, name).weight.data = stacked
        x = torch.randn(2, 5, 6)
        torch.testing.assert_close(fast(x), wrapper(x))

    def test_zeroing_and_renormalising_equals_minus_infinity_before_the_softmax(self):
        att, x = gpt.CausalAttention(3, 4, 6, dropout=0.0), INPUTS[None]
        queries, keys, values = att.W_query(x), att.W_key(x), att.W_value(x)
        all_weights = torch.softmax(queries @ keys.transpose(1, 2) / 2, dim=-1)   # 2 = root of 4
        zeroed = all_weights * torch.ones(6, 6).tril()
        expected = zeroed / zeroed.sum(dim=-1, keepdim=True) @ values
        torch.testing.assert_close(att(x), expected)

    def test_a_width_the_heads_cannot_share_is_refused(self):
        with self.assertRaisesRegex(ValueError, "not divisible"):
            gpt.MultiHeadAttention(8, 8, 5, 0.0, num_heads=3)


class TestModel(unittest.TestCase):
    def test_layer_norm_and_gelu_are_the_arithmetic_beside_them(self):
        norm, x = gpt.LayerNorm(5), torch.randn(2, 3, 5)
        norm.scale.data, norm.shift.data = torch.arange(5.0), torch.full((5,), 0.5)
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
        expected = (x - mean) / torch.sqrt(var + 1e-5) * torch.arange(5.0) + 0.5
        torch.testing.assert_close(norm(x), expected)
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)
        torch.testing.assert_close(gpt.GELU()(x), 0.5 * x * (1 + torch.tanh(inner)))

    def test_the_book_s_model_number_for_number(self):
        torch.manual_seed(123)
        model = GPTModel(GPT_CONFIG_124M).eval()
        self.assertEqual(sum(p.numel() for p in model.parameters()), 163_009_536)
        idx = torch.tensor([[15496, 11, 314, 716]])                   # "Hello, I am"
        expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
        self.assertEqual(generate_text_simple(model, idx, 10, 1024)[0, 4:].tolist(), expected)
        self.assertEqual(generate(model, idx, 10, 1024)[0, 4:].tolist(), expected)

    def test_published_sizes_have_the_published_parameter_counts(self):
        counts = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080,
                  "1558M": 1_557_611_200}
        for size, count in counts.items():
            with gpt.shapes_only():
                model = GPTModel({**GPT_CONFIG_124M, **gpt.GPT2_SIZES[size], "qkv_bias": True,
                                  "tie_embeddings": True})
            self.assertEqual(sum(p.numel() for p in model.parameters()), count)

    def test_shapes_and_that_no_position_sees_a_later_token(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 16))
        logits = model(idx)
        self.assertEqual(logits.shape, (2, 16, 257))
        changed = idx.clone()
        changed[:, 10:] = (idx[:, 10:] + 1) % 257
        torch.testing.assert_close(model(changed)[:, :10], logits[:, :10])
        self.assertFalse(torch.allclose(model(changed)[:, 10:], logits[:, 10:]))

    def test_a_text_longer_than_the_context_is_a_sentence(self):
        with self.assertRaisesRegex(ValueError, "65 tokens do not fit"):
            tiny_model()(torch.zeros(1, 65, dtype=torch.long))

    def test_weights_of_other_code_for_the_book_load_by_name(self):
        model = tiny_model()
        masks = {f"trf_blocks.{i}.att.mask": torch.ones(64, 64) for i in range(2)}
        other = GPTModel(TINY)
        other.load_state_dict({**model.state_dict(), **masks})
        idx = torch.arange(5)[None]
        torch.testing.assert_close(other.eval()(idx), model(idx))

    def test_parameters_stay_float32_under_bfloat16(self):
        model = tiny_model()
        with gpt.autocast("cpu", torch.bfloat16):
            loss = model(torch.zeros(1, 4, dtype=torch.long)).float().mean()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.assertEqual({t.dtype for t in [*model.parameters(), *grads]}, {torch.float32})


class TestGeneration(unittest.TestCase):
    def setUp(self):
        self.model = tiny_model(context_length=16)

    def test_cache_gives_the_plain_loop_s_tokens_also_past_the_context_window(self):
        idx = torch.randint(0, 257, (3, 7))
        for context_size in (16, 8, 100):      # the window slides from token 16, from 8, from 16
            expected = generate_text_simple(self.model, idx, 20, min(context_size, 16))
            torch.testing.assert_close(generate(self.model, idx, 20, context_size), expected)
        long = torch.randint(0, 257, (1, 40))  # a prompt longer than the window
        torch.testing.assert_close(generate(self.model, long, 5, 16),
                                   generate_text_simple(self.model, long, 5, 16))

    def test_prompts_of_different_lengths_in_a_batch_equal_one_by_one(self):
        prompts = [torch.randint(0, 257, (n,)) for n in (3, 9, 1, 6)]
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=99)
        lengths = torch.tensor([len(p) for p in prompts])
        together = generate(self.model, padded, 20, 16, lengths=lengths)[:, 9:]
        for row, prompt in zip(together, prompts):
            alone = generate_text_simple(self.model, prompt[None], 20, 16)[0, len(prompt):]
            self.assertEqual(row.tolist(), alone.tolist())

    def test_several_tokens_onto_a_filled_cache_see_all_before_and_none_after(self):
        idx = torch.randint(0, 257, (2, 12))
        cache = gpt.KVCache(self.model, 2, 16)
        parts = [self.model.hidden_states(part, cache) for part in idx.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), self.model.hidden_states(idx))

    def test_end_of_text_is_per_row(self):
        idx = torch.randint(0, 257, (3, 4))
        free = generate(self.model, idx, 12, 16)[:, 4:]
        eos = int(free[1, 2])    # the second row ends at its third token, if not before
        rows = generate(self.model, idx, 12, 16, eos_id=eos)[:, 4:]
        for row, unstopped in zip(rows.tolist(), free.tolist()):
            n = unstopped.index(eos) if eos in unstopped else len(row)
            self.assertEqual(row, unstopped[:n] + [eos] * (len(row) - n))
        alone = generate(self.model, idx[1:2], 12, 16, eos_id=eos)[0, 4:].tolist()
        self.assertEqual(alone.index(eos), len(alone) - 1)     # it ends when all rows have

    def test_dropout_is_off_and_the_mode_is_put_back_also_after_an_early_end(self):
        model, idx = tiny_model(drop_rate=0.5), torch.randint(0, 257, (1, 4))
        expected = generate(model, idx, 8, 16)
        torch.testing.assert_close(generate(model.train(), idx, 8, 16), expected)
        stream = gpt.generate_stream(model, idx, 8, 16)
        next(stream)
        self.assertFalse(model.training)
        stream.close()
        self.assertTrue(model.training)

    def test_a_single_row_is_multiplied_as_many_rows_are(self):
        torch.manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            layer, x = gpt.Linear(300, 77).to(dtype), torch.randn(4, 300).to(dtype)
            with torch.no_grad():
                single = torch.cat([layer(row[None]) for row in x])
                torch.testing.assert_close(single, layer(x), atol=tolerance, rtol=tolerance)
        self.assertEqual(torch.backends.mkldnn.enabled, torch.backends.mkldnn.is_available())

    def test_sampling_follows_temperature_top_k_and_top_p(self):
        logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
        for options, expected in [
                ({}, [0.5, 0.25, 0.125, 0.125]),
                ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),   # squares, normalised
                ({"temperature": 1e-38}, [1.0, 0.0, 0.0, 0.0]),
                ({"top_k": 2}, [2 / 3, 1 / 3, 0.0, 0.0]),
                ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
                ({"top_p": 0.6}, [2 / 3, 1 / 3, 0.0, 0.0]),
                ({"top_p": 0.01}, [1.0, 0.0, 0.0, 0.0])]:
            probs = gpt.next_token_probs(logits, **options)
            torch.testing.assert_close(probs, torch.tensor([expected]), msg=str(options))
        drawn = gpt.sample_next(logits.repeat(20_000, 1), 1.0)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(shares, logits.exp()[0], atol=0.015, rtol=0)
        self.assertEqual(gpt.sample_next(logits, 0.0).tolist(), [0])

    def test_a_seed_repeats_the_text_and_leaves_other_random_numbers_alone(self):
        idx, before = torch.randint(0, 257, (2, 4)), torch.get_rng_state()
        texts = [generate(self.model, idx, 10, 16, temperature=1.0, seed=s) for s in (1, 1, 2)]
        self.assertTrue(torch.equal(texts[0], texts[1]))
        self.assertFalse(torch.equal(texts[0], texts[2]))
        self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_options_out_of_range_and_an_empty_prompt_are_refused(self):
        idx = torch.zeros(1, 2, dtype=torch.long)
        for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}):
            with self.assertRaises(ValueError):
                generate(self.model, idx, 2, 16, **bad)
        with self.assertRaisesRegex(ValueError, "prompt is empty"):
            generate(self.model, idx[:, :0], 2, 16)

    def test_characters_of_several_tokens_stream_whole(self):
        pieces = list(gpt.decode_stream(BYTES.encode("naïve 🙂"), BYTES))
        self.assertEqual("".join(pieces), "naïve 🙂")
        self.assertNotIn("�", "".join(pieces))


class TestLoRA(unittest.TestCase):
    def test_a_fresh_adapter_changes_nothing_and_a_merged_one_computes_the_same(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 9))
        before = model(idx)
        gpt.replace_linear_with_lora(model, rank=4, alpha=8)
        self.assertTrue(torch.equal(model(idx), before))
        for name, p in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(p, std=0.1)
        adapted = model(idx)
        self.assertFalse(torch.allclose(adapted, before, atol=1e-3))
        gpt.merge_lora(model)
        torch.testing.assert_close(model(idx), adapted, atol=1e-5, rtol=0)
        self.assertEqual(model.state_dict().keys(), tiny_model().state_dict().keys())

    def test_the_scale_is_alpha_over_rank(self):
        lora, x = gpt.LoRALayer(3, 5, rank=2, alpha=6), torch.randn(4, 3)
        lora.B.data = torch.randn(2, 5)
        torch.testing.assert_close(lora(x), 3.0 * (x @ lora.A @ lora.B))

    def test_it_takes_any_module_and_leaves_a_tied_head_alone(self):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
        gpt.replace_linear_with_lora(model, rank=2, alpha=2)
        self.assertIsInstance(model[1][0], gpt.LinearWithLoRA)
        model = tiny_model(tie_embeddings=True)
        gpt.replace_linear_with_lora(model, rank=2, alpha=2)
        self.assertNotIsInstance(model.out_head, gpt.LinearWithLoRA)
        self.assertIsInstance(model.trf_blocks[0].att.W_query, gpt.LinearWithLoRA)


# ---------------------------------------------------------------------------------------------
# gpt.py: what the scripts share

class TestCheckpoint(InFolder):
    def test_model_tokenizer_and_extras_come_back(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}
        tokenizer = gpt.make_tokenizer("mine", ranks, r"\S+|\s+")
        model = tiny_model(vocab_size=259, tie_embeddings=True)
        gpt.save_checkpoint("a/b.pt", model, tokenizer, names=["x"])
        again, tokenizer2, extras = gpt.load_checkpoint("a/b.pt")
        self.assertEqual((extras["names"], extras["config"]), (["x"], model.cfg))
        text = "the thing <|endoftext|>"
        self.assertEqual(tokenizer2.encode(text, allowed_special="all"),
                         tokenizer.encode(text, allowed_special="all"))
        idx = torch.arange(9)[None]
        self.assertTrue(torch.equal(again(idx), model(idx)))          # without dropout
        self.assertIs(again.out_head.weight, again.tok_emb.weight)
        self.assertEqual(list(Path("a").iterdir()), [Path("a/b.pt")])    # no temporary file stays

    def test_a_classifier_comes_back_with_its_head_and_a_tied_embedding_is_kept(self):
        model = tiny_model(tie_embeddings=True)
        embedding = model.tok_emb.weight.clone()
        gpt.replace_head(model, 3)
        gpt.save_checkpoint("c.pt", model, BYTES, class_names=list("abc"))
        again, _, extras = gpt.load_checkpoint("c.pt", kind="classifier")
        self.assertEqual(again(torch.zeros(1, 4, dtype=torch.long)).shape, (1, 4, 3))
        self.assertTrue(torch.equal(again.tok_emb.weight, embedding))
        self.assertEqual(extras["class_names"], ["a", "b", "c"])
        with self.assertRaisesRegex(UserError, "holds a classifier"):
            gpt.load_checkpoint("c.pt")

    def test_whatever_is_wrong_with_a_file_is_one_sentence_with_what_makes_a_fit_one(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("owned",)

        self.write("secret.tiktoken", "a secret line\n")
        good = torch.load("tiny.pt", weights_only=True)
        table = {"pat_str": ".", "tokens": ["AA=="]}
        for change, words in [
                ({"kind": Evil()}, "not a checkpoint"), ({"kind": "state"}, "it holds a state"),
                ({"config": {**good["config"], "n_heads": 0}}, "does not describe"),
                ({"config": {**good["config"], "n_heads": 3}}, "not divisible"),
                ({"config": {**good["config"], "n_layers": 10**7}}, "does not describe"),
                ({"config": {**good["config"], "emb_dim": 32}}, "size mismatch"),
                ({"config": {"emb_dim": 3}}, "vocab_size"), ({"model": {}}, "does not describe"),
                ({"model": {**good["model"], "final_norm.scale": torch.full((16,), math.nan)}},
                 "not finite"),
                ({"tokenizer": "secret.tiktoken"}, "string indices"),
                ({"tokenizer": table}, "no rank"), ({"tokenizer": {**table, "tokens": 5}}, "int"),
                ({"config": {**good["config"], "vocab_size": 9}}, "more tokens than its model")]:
            torch.save({**good, **change}, "bad.pt")
            with self.assertRaisesRegex(UserError, words) as caught:
                gpt.load_checkpoint("bad.pt")
            self.assertRegex(str(caught.exception), r"python pretrain.py$")
            self.assertNotIn("\n", str(caught.exception))
            self.assertNotIn("secret line", str(caught.exception))
        self.assertFalse(Path("owned").exists())
        self.write("bad.pt", Path("tiny.pt").read_bytes()[:5000])
        for name in ("bad.pt", "none.pt", "text.txt", "."):
            with self.assertRaisesRegex(UserError, "no checkpoint|not a checkpoint"):
                gpt.load_checkpoint(name)

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "needs limits on file size (Linux, macOS)")
    def test_a_full_disk_is_a_sentence_and_the_old_file_stays(self):
        import resource
        before = Path("tiny.pt").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with self.assertRaisesRegex(OSError, "tiny.pt could not be written"):
                gpt.save_checkpoint("tiny.pt", tiny_model(), BYTES)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        self.assertEqual(Path("tiny.pt").read_bytes(), before)
        self.assertEqual(list(Path().glob("*.tmp")), [])


class TestTokenizers(InFolder):
    def test_bytes_round_trips_any_text(self):
        text = "naïve 🙂\n\ttab \x00 <|endoftext|>"
        ids = BYTES.encode(text, disallowed_special=())
        self.assertEqual(bytes(ids), text.encode())
        self.assertEqual(BYTES.decode(ids), text)
        self.assertEqual((BYTES.n_vocab, BYTES.eot_token), (257, 256))

    @needs("vocab.bpe", "tiktoken")
    def test_gpt2_from_its_merges_alone_is_tiktoken_s(self):
        os.chdir(ROOT)
        ours, theirs = gpt.load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
        self.assertEqual(ours._mergeable_ranks, theirs._mergeable_ranks)
        self.assertEqual((ours.n_vocab, ours.eot_token), (theirs.n_vocab, theirs.eot_token))
        self.assertEqual(ours.encode("Every effort moves you"), [6109, 3626, 6100, 345])
        self.assertEqual(gpt.tokenizer_to_spec(ours), "gpt2")

    def test_what_is_no_vocabulary_is_a_sentence(self):
        tok.BPETokenizer().save("good.tiktoken")
        good = Path("good.tiktoken").read_text(encoding="ascii")
        for broken in ("", good + "!!!! 256\n", good + "enp6 999\n", good + "AA== 256\n",
                       good.partition("\n")[2], "é", "AA== 0 1"):
            self.write("bad.tiktoken", broken)
            with self.assertRaisesRegex(UserError, "bad.tiktoken is not a rank file"):
                gpt.load_tokenizer("bad.tiktoken")
        with self.assertRaisesRegex(UserError, "gpt9 is not a rank file"):
            gpt.load_tokenizer("gpt9")
        self.write("data/vocab.bpe", "#version\na b\n")
        with self.assertRaisesRegex(UserError, "not GPT-2's vocab.bpe"):
            gpt.load_tokenizer("gpt2")


class TestTerminal(InFolder):
    def test_text_is_shown_without_what_could_steer_the_terminal(self):
        self.assertEqual(gpt.printable("a\x1b[2Jb\r\n\tc\u202ed\x07"),
                         "a\ufffd[2Jb\n\tc\ufffdd\ufffd")
        for fine in ("10\u00a0km", "\u3000", "\N{MAN}\u200d\N{WOMAN}", "naïve ß 你好"):
            self.assertEqual(gpt.printable(fine), fine)

    def test_pieces_of_a_file_join_to_the_whole_and_have_its_tokens(self):
        text = "Some words, \n\n  and more\tof them 12345. " * 40 + "x" * 300
        for content in (text, "y" * 1000, "é" * 500):
            self.write("t.txt", content)
            pieces = list(gpt.read_text_pieces("t.txt", size=101))
            self.assertEqual("".join(pieces), content)
            self.assertGreater(len(pieces), 5)
            self.assertLess(max(map(len, pieces)), 250)
        chunks = [c for p in gpt.read_text_pieces(self.write("t.txt", text), size=101)
                  for c in tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, p)]
        whole = tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, text)
        self.assertEqual(chunks[:200], whole[:200])

    def test_the_advice_for_a_wrong_encoding_fits_it(self):
        for encoding, name in (("utf-16", "utf-16"), ("latin1", "latin1")):
            self.write("t.txt", "café au lait".encode(encoding))
            with self.assertRaisesRegex(UserError, f"iconv -f {name} "):
                list(gpt.read_text_pieces("t.txt"))

    @unittest.skipUnless(Path("/dev/full").exists(), "needs /dev/full (Linux)")
    def test_a_full_disk_behind_standard_output_is_a_sentence(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, str(ROOT / "gpt.py")], stdout=full,
                                  stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Agpt.py: .*No space left.*\n\Z")


class TestGptCommand(InFolder):
    def test_the_walk_shows_the_parameter_count_and_every_shape(self):
        out = self.ok(gpt.main)
        for part in ("124,439,808", "(1, 4, 768)", "(1, 12, 4, 4)", "(1, 4, 50257)"):
            self.assertIn(part, out)

    def test_it_writes_from_a_checkpoint_the_same_text_for_the_same_seed(self):
        argv = ("--checkpoint", "tiny.pt", "--prompt", "The", "--max-new-tokens", 20, "--dtype",
                "float32")
        first, again, other = (self.ok(gpt.main, *argv, "--top-p", 0.99, "--seed", seed)
                               for seed in (4, 4, 5))
        self.assertTrue(first.startswith("The"))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)
        model = gpt.load_checkpoint("tiny.pt")[0]
        idx = generate_text_simple(model, gpt.text_to_token_ids("The", BYTES), 20, 64)[0].tolist()
        status, out, err = call(gpt.main, *argv, "--temperature", 0)
        self.assertEqual(out, gpt.printable(BYTES.decode(idx)) + "\n")
        self.assertRegex(err, r"20 tokens, .* tokens/s")

    def test_attention_weights_are_the_model_s_own_and_their_rows_sum_to_one(self):
        model, idx = tiny_model(spread=0.3), torch.randint(0, 257, (1, 9))
        x = model.tok_emb(idx) + model.pos_emb(torch.arange(9))
        x = model.trf_blocks[0](x)
        att, normed = model.trf_blocks[1].att, model.trf_blocks[1].norm1(x)[0]
        weights = gpt.attention_weights(model, idx, layer=1)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 9))
        heads = []
        for h, d in enumerate((slice(0, 8), slice(8, 16))):
            scores = att.W_query(normed)[:, d] @ att.W_key(normed)[:, d].T / math.sqrt(8)
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).exp()
            expected = scores / scores.sum(dim=-1, keepdim=True)
            torch.testing.assert_close(weights[h], expected)
            heads.append(expected @ att.W_value(normed)[:, d])
        torch.testing.assert_close(att.out_proj(torch.cat(heads, dim=-1)), att(normed[None])[0])

    def test_explain_shows_tokens_probabilities_and_attention_in_80_columns(self):
        argv = ("--checkpoint", "tiny.pt", "--prompt", "x" * 20 + "a\nb\x1b[2J é", "--explain")
        out = self.ok(gpt.main, *argv)
        self.assertLessEqual(max(len(line) for line in out.split("\n")[2:]), 80)
        self.assertNotIn("\x1b", out)
        logits = gpt.load_checkpoint("tiny.pt")[0](gpt.text_to_token_ids(argv[3], BYTES))[0, -1]
        best = float(logits.div(0.5).softmax(dim=-1).max())
        self.assertIn(f"{best:.1%}", out)
        self.assertNotEqual(out, self.ok(gpt.main, *argv, "--layer", 0, "--head", 1))
        done = subprocess.run([sys.executable, str(ROOT / "gpt.py"), *argv], capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
        self.assertIn(b"##", done.stdout)          # plain shades where there is no UTF-8


# ---------------------------------------------------------------------------------------------
# gpt.py: downloads, as a table of answers that a server gives

FILE = bytes(range(256)) * 800  # 204,800 bytes
FILE_SHA256 = hashlib.sha256(FILE).hexdigest()


class TestDownload(unittest.TestCase):
    """Each test gives the server a list of answers, one per request; the last one repeats."""

    def setUp(self):
        test = self
        self.asked, self.answers, self.stalled = [], [self.whole], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                test.asked.append(self.headers.get("Range"))
                answer = test.answers[0] if len(test.answers) == 1 else test.answers.pop(0)
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/file"
        folder = tempfile.TemporaryDirectory()
        self.path = Path(folder.name) / "deep" / "file.bin"
        self.part = Path(f"{self.path}.part")
        no_proxy = mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1"})
        no_proxy.start()
        for clean in (folder.cleanup, self.server.server_close, self.server.shutdown,
                      self.stalled.set, no_proxy.stop):
            self.addCleanup(clean)

    # The answers.

    def send(self, request, body, status=200, length=None, headers=()):
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("Content-Length", len(body) if length is None else length)
        request.end_headers()
        request.wfile.write(body)
        request.wfile.flush()

    def whole(self, request):
        self.send(request, FILE)

    def ranged(self, request):
        if not request.headers.get("Range"):
            return self.whole(request)
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(FILE):
            return self.send(request, b"", 416, headers=[
                ("Content-Range", f"bytes */{len(FILE)}")])
        self.send(request, FILE[start:], 206, headers=[
            ("Content-Range", f"bytes {start}-{len(FILE) - 1}/{len(FILE)}")])

    def cut(self, request):  # half, then the connection is closed
        self.send(request, FILE[:100_000], length=len(FILE))
        request.close_connection = True

    def stall(self, request):  # half, then silence
        self.send(request, FILE[:100_000], length=len(FILE))
        self.stalled.wait(5)

    def answer(self, status, body=b"no", headers=()):
        return lambda request: self.send(request, body, status, headers=headers)

    def fetch(self, *urls, sha256=None):
        return quietly(gpt.download, urls or [self.url], self.path, sha256, timeout=0.5)

    def test_what_arrives_whole(self):
        elsewhere = ("Content-Range", "bytes 7-9/204800")
        moved = [("Location", "/cdn"), ("X-Linked-Etag", f'"{FILE_SHA256}"')]
        for answers, sha256, asked in [
                ([self.whole], None, [None]),
                ([self.cut, self.ranged], None, [None, "bytes=98304-"]),
                ([self.stall, self.ranged], FILE_SHA256, [None, "bytes=98304-"]),
                ([self.cut, self.whole], None, [None, "bytes=98304-"]),       # ignores the range
                ([self.answer(302, headers=moved), self.whole], None, [None, None]),
                ([self.answer(404), self.whole], None, [None, None]),          # the next address
                ([self.answer(200, b"<html>", [("Content-Type", "text/html")]), self.whole], None,
                 [None, None]),
                ([self.cut, self.answer(206, b"abc", [elsewhere]), self.whole], None,
                 [None, "bytes=98304-", None])]:
            self.answers, self.asked = answers, []
            self.fetch(self.url, self.url + "?second", sha256=sha256)
            self.assertEqual((self.path.read_bytes() == FILE, self.asked), (True, asked))
            self.assertFalse(self.part.exists())
            self.path.unlink()

    def test_a_file_that_is_there_needs_no_network_and_a_part_is_gone_on_with(self):
        self.path.parent.mkdir()
        self.path.write_bytes(b"mine")
        self.fetch()
        self.assertEqual((self.path.read_bytes(), self.asked), (b"mine", []))
        self.path.unlink()
        for part, asked in ((FILE[:5000], ["bytes=5000-"]),
                            (b"x" * 5000, ["bytes=5000-", None]),       # of another file
                            (FILE + b"more", ["bytes=204804-", None])):
            self.part.write_bytes(part)
            self.answers, self.asked = [self.ranged], []
            self.fetch(self.url, self.url, sha256=FILE_SHA256)
            self.assertEqual((self.path.read_bytes() == FILE, self.asked), (True, asked))
            self.path.unlink()

    def test_what_fails_names_every_address_and_the_place_for_the_file(self):
        with http.server.HTTPServer(("127.0.0.1", 0), None) as closed:
            nobody = f"http://127.0.0.1:{closed.server_port}/"
        wrong = [("X-Linked-Etag", 64 * "0")]
        for answer, words in [(self.answer(500), "500"), (self.answer(404), "404"),
                              (self.answer(200, FILE, wrong), "wrong content"),
                              (self.answer(200, b""), "wrong content"),
                              (lambda r: self.stalled.wait(1), "timed out")]:
            self.answers = [answer]
            with self.assertRaisesRegex(UserError, words) as caught:
                self.fetch(nobody, self.url)
            for part in (nobody, self.url, str(self.path), "refused"):
                self.assertIn(part, str(caught.exception))
            self.assertFalse(self.path.exists())


# ---------------------------------------------------------------------------------------------
# gpt.py: what surrounds a training run, with each of the three scripts that train

class TestTrainingRun(InFolder):
    def test_interrupted_at_any_step_and_resumed_a_run_ends_with_the_same_weights(self):
        run = (*PRETRAIN, "--max-steps", 12, "--eval-every", 4)
        preset = {**pretrain.PRESETS["quick"], "drop_rate": 0.2}     # so that chance matters
        record = gpt.TrainingRun.record
        with mock.patch.dict(pretrain.PRESETS, quick=preset):
            self.ok(*run)
            expected, log = weights("run.pt"), Path("run.csv").read_bytes()
            for stop_at in (1, 3, 4, 7, 11, 12):
                for file in Path(".").glob("run*"):
                    file.unlink()
                steps = []

                def interrupted(self, *args):                  # as if Ctrl-C came in this step
                    steps.append(1)
                    if len(steps) == stop_at:
                        os.kill(os.getpid(), signal.SIGINT)
                    return record(self, *args)

                with mock.patch.object(gpt.TrainingRun, "record", interrupted):
                    status, out, _ = call(*run)
                self.assertEqual(status, 130)
                self.assertIn(f"step {stop_at} is saved", out)
                self.ok(*run, "--resume")
                self.assertTrue(torch.equal(weights("run.pt"), expected), stop_at)
                self.assertEqual(Path("run.csv").read_bytes(), log)
                self.assertFalse(Path("run-resume.pt").exists())
        self.assertIn("run.pt is complete", self.ok(*run, "--resume"))

    def test_killed_and_resumed_each_script_ends_with_the_same_weights(self):
        gpt.save_checkpoint("tiny.pt", tiny_model(spread=0.3, drop_rate=0.2), BYTES)
        for script, (main, *argv), more, kind in [
                ("pretrain.py", PRETRAIN, ("--max-steps", 300), "language model"),
                ("finetune_classifier.py", CLASSIFY,
                 ("--train", "lora", "--max-steps", 200, "--epochs", 99), "classifier"),
                ("finetune_instruct.py", INSTRUCT, ("--train", "lora", "--epochs", 99, "--max-steps",
                                                   150, "--no-responses"), "language model")]:
            argv = [*map(str, argv), *map(str, more), "--eval-every", "10"]
            process = subprocess.Popen([sys.executable, str(ROOT / script), *argv],
                                       stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while not Path("run-resume.pt").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            process.kill()                                      # SIGKILL: no chance to clean up
            process.wait()
            self.assertTrue(Path("run-resume.pt").exists(), script)
            self.assertIn("resumed", self.ok(main, *argv, "--resume"))
            resumed, log = weights("run.pt", kind), Path("run.csv").read_bytes()
            self.ok(main, *argv)
            self.assertTrue(torch.equal(resumed, weights("run.pt", kind)), script)
            self.assertEqual(Path("run.csv").read_bytes(), log)

    def stopped(self, *run):
        """Leave the run as a Ctrl-C in its third step would."""
        with mock.patch.object(gpt.TrainingRun, "record", autospec=True) as record:
            def press(run, *_):
                run.state["losses"].append(1.0)
                if run.state["step"] == 2:
                    os.kill(os.getpid(), signal.SIGINT)
            record.side_effect = press
            self.assertEqual(call(*run)[0], 130)

    def test_resuming_another_run_is_refused_and_changes_nothing(self):
        run = (*PRETRAIN, "--max-steps", 5)
        self.stopped(*run)
        before = Path("run-resume.pt").read_bytes()
        for flags, word in ((("--batch-size", 3), "--batch-size"), (("--seed", 9), "--seed"),
                            (("--max-steps", 6), "--max-steps"), (("--emb-dim", 32), "--emb-dim"),
                            (("--data", "data.tsv"), "--data")):
            status, _, err = call(*run, *flags, "--resume")
            self.assertEqual(status, 1)
            self.assertIn(f"is of a run with another {word};", err)
        self.assertEqual(Path("run-resume.pt").read_bytes(), before)

    def test_the_best_model_is_kept_and_the_metrics_have_a_row_per_evaluation(self):
        losses = iter([5.0, 3.0, 2.0, 4.0])
        real, seen = pretrain.evaluate_rows, []

        def pretended(model, *args):
            seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
            return {**real(model, *args), "val_loss": next(losses)}

        with mock.patch.object(pretrain, "evaluate_rows", pretended):
            out = self.ok(*PRETRAIN, "--max-steps", 6, "--eval-every", 2)
        self.assertTrue(torch.equal(weights("run.pt"), seen[2]))        # that of loss 2.0
        self.assertIn("lowest 2.000", out)
        with open("run.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([(row["step"], row["val_loss"]) for row in rows],
                         [("0", "5.0"), ("2", "3.0"), ("4", "2.0"), ("6", "4.0")])

    def test_a_loss_that_is_not_finite_stops_each_script_and_keeps_the_checkpoint(self):
        for run, kind in ((PRETRAIN, "language model"), (CLASSIFY, "classifier"),
                          (INSTRUCT, "language model")):
            self.ok(*run, "--max-steps", 2)
            before = weights("run.pt", kind)
            real = F.cross_entropy
            with mock.patch.object(F, "cross_entropy", lambda *a, **k: real(*a, **k) * math.nan):
                status, _, err = call(*run, "--max-steps", 3)
            self.assertEqual(status, 1)
            self.assertRegex(err, "the loss is nan at step 1; what was saved is kept")
            self.assertTrue(torch.equal(weights("run.pt", kind), before))

    def test_nothing_that_is_read_or_is_not_ours_is_overwritten(self):
        self.write("mine.pt", "my own notes")
        self.write("run.csv", labelled_lines())
        before = {path: path.read_bytes() for path in Path().iterdir()}
        for run, flags, words in [
                (PRETRAIN, ("--out", "mine.pt"), "is no checkpoint of this project"),
                (PRETRAIN, ("--data", "run.csv"), "run.csv is read by this command"),
                (PRETRAIN, ("--data", "mine.pt", "--out", "mine.pt"), "is read by this command"),
                (CLASSIFY, ("--out", "tiny.pt"), "tiny.pt is read by this command"),
                (INSTRUCT, ("--out", "./tiny.pt"), "tiny.pt is read by this command"),
                (CLASSIFY, ("--data", "run.csv"), "run.csv is read by this command"),
                ((load_gpt2.main,), ("--from", ".", "--out", "mine.pt"), "is no checkpoint"),
                ((tok.main, "train"), ("text.txt", "--out", "text.txt"), "not a rank file"),
                ((tok.main, "train"), ("text.txt", "--out", "mine.pt"), "not a rank file")]:
            status, _, err = call(*run, *flags)
            self.assertEqual(status, 1, flags)
            self.assertIn(words, err)
        self.assertEqual({path: path.read_bytes() for path in Path().iterdir()}, before)

    def test_auto_dtype_follows_what_the_processor_reports(self):
        for has, expected in (({"avx512_bf16": True}, torch.bfloat16),
                              ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
            with mock.patch.object(torch.cpu, "get_capabilities", return_value=has):
                self.assertIs(gpt.pick_dtype("auto", "cpu"), expected)
        self.assertIs(gpt.pick_dtype("float32", "cpu"), torch.float32)
        for name in ("tpu", "cuda:99", "meta", "gpu"):
            with self.assertRaisesRegex(UserError, "not available here"):
                gpt.pick_device(name)


# ---------------------------------------------------------------------------------------------
# pretrain.py

class TestBookLoop(unittest.TestCase):
    def test_rows_are_windows_and_targets_are_moved_by_one(self):
        data = pretrain.GPTDatasetV1("abcdefgh", BYTES, max_length=3, stride=2)
        rows = [(bytes(x.tolist()), bytes(y.tolist())) for x, y in data]
        self.assertEqual(rows, [(b"abc", b"bcd"), (b"cde", b"def"), (b"efg", b"fgh")])
        with self.assertRaisesRegex(ValueError, "at least 9"):
            pretrain.GPTDatasetV1("abcdefgh", BYTES, max_length=8, stride=8)

    def test_loss_is_the_mean_of_minus_log_probability(self):
        model = tiny_model()
        x, y = torch.randint(0, 257, (2, 2, 5))
        probs = torch.softmax(model(x), dim=-1)
        expected = -torch.stack([probs[b, t, y[b, t]].log() for b in range(2) for t in range(5)])
        loss = pretrain.calc_loss_batch(x, y, model, "cpu")
        torch.testing.assert_close(loss, expected.mean())
        other = pretrain.calc_loss_batch(y, x, model, "cpu").item()
        for batches, mean in ((None, (loss.item() + other) / 2), (1, loss.item())):
            self.assertAlmostEqual(pretrain.calc_loss_loader([(x, y), (y, x)], model, "cpu",
                                                             batches), mean, places=5)
        self.assertTrue(math.isnan(pretrain.calc_loss_loader([], model, "cpu")))

    @needs("vocab.bpe", "the-verdict.txt")
    def test_seeded_training_gives_the_losses_of_the_book_s_own_code(self):
        os.chdir(ROOT)
        text = Path("data/the-verdict.txt").read_text(encoding="utf-8")
        loader = pretrain.create_dataloader_v1(text, batch_size=8, max_length=4, stride=4,
                                               shuffle=False)
        inputs, targets = next(iter(loader))               # printed in the book's section 2.6
        self.assertEqual(inputs[:2].tolist(), [[40, 367, 2885, 1464], [1807, 3619, 402, 271]])
        self.assertEqual(targets[:2].tolist(), [[367, 2885, 1464, 1807], [3619, 402, 271, 10899]])

        # The losses are those of the package llms-from-scratch 1.0.19, seeds and all.
        torch.manual_seed(123)
        loader = pretrain.create_dataloader_v1(text[:int(0.9 * len(text))], batch_size=2,
                                               max_length=256, stride=256)
        torch.manual_seed(123)
        model = GPTModel({**TINY, "vocab_size": 50257, "context_length": 256, "emb_dim": 48,
                          "n_heads": 4}).train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1), []
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss = pretrain.calc_loss_batch(x, y, model, "cpu")
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        np.testing.assert_allclose(losses[:10], [
            10.9837, 10.9965, 10.9899, 10.9854, 10.9826, 10.9601, 11.0129, 10.9683, 10.9233,
            10.9072], atol=1e-3)

    def test_the_simple_loop_learns_and_reports_every_evaluation(self):
        data = pretrain.GPTDatasetV1(TEXT, BYTES, max_length=16, stride=16)
        loader = torch.utils.data.DataLoader(data, batch_size=8, drop_last=True)
        model = tiny_model(drop_rate=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train, val, seen = quietly(
            pretrain.train_model_simple, model, loader, loader, optimizer, "cpu", num_epochs=2,
            eval_freq=10, eval_iter=2, start_context="The", tokenizer=BYTES)
        self.assertLess(train[-1], train[0] - 1)
        self.assertEqual(seen, [(10 * i + 1) * 8 * 16 for i in range(len(seen))])


class TestTokensOnDisk(InFolder):
    def rows(self, numbers, T):
        np.array(numbers, np.uint16).tofile("tokens.bin")
        return pretrain.TokenRows("tokens.bin", np.uint16, 0, len(numbers), T)

    def test_rows_are_whole_and_each_target_follows_its_input(self):
        for length, num_rows in ((16, 0), (17, 1), (32, 1), (33, 2)):
            rows = self.rows(range(length), T=16)
            self.assertEqual(len(rows), num_rows)
            x, y = rows.batch(range(num_rows))
            self.assertEqual(x.flatten().tolist(), list(range(16 * num_rows)))
            self.assertTrue((x + 1 == y).all())

    def test_each_epoch_reads_every_row_once_in_a_new_order(self):
        args = mock.Mock(seed=1, batch_size=2, grad_accum=2)
        run = mock.Mock(args=args, per_epoch=3)
        epochs = [np.concatenate([gpt.TrainingRun.rows_of_step(run, e * 3 + k, 12)
                                  for k in range(3)]).tolist() for e in range(2)]
        self.assertEqual([sorted(e) for e in epochs], [list(range(12))] * 2)
        self.assertNotEqual(*epochs)

    def test_documents_of_a_folder_are_joined_with_end_of_text_and_written_once(self):
        for name, text in (("b.txt", "second"), ("empty.txt", ""), ("a.txt", "first"),
                           ("sub/c.txt", "third"), (".hidden", "no")):
            self.write("d/" + name, text)
        tokenizer = gpt.make_tokenizer("x", {bytes([i]): i for i in range(256)}, ".")
        for last in ("third", "other"):
            self.write("d/sub/c.txt", last)
            for _ in range(2):
                _, documents, stamp = pretrain.find_documents("quick", [Path("d")])
                path, dtype = pretrain.tokens_on_disk(documents, stamp, tokenizer)
            self.assertEqual(tokenizer.decode(np.fromfile(path, dtype).tolist()),
                             f"first<|endoftext|>second<|endoftext|>{last}<|endoftext|>")
        self.assertEqual(len(list(Path("data").iterdir())), 2)
        for i in range(5):                                  # files of texts that are gone do not
            pretrain.tokens_on_disk([["x"]], i, tokenizer)  # pile up
        self.assertEqual(len(list(Path("data").iterdir())), 4)

    def test_the_book_s_verdict_has_nine_steps_an_epoch(self):
        rows = self.rows(range(int(5146 * 0.9)), T=256)          # 5,145 tokens and one end of text
        self.assertEqual(len(rows) // pretrain.PRESETS["verdict"]["batch_size"], 9)

    def test_bits_per_byte_divides_by_bytes_not_tokens(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"the ": 256}
        tokenizer = gpt.make_tokenizer("t", ranks)
        rows = self.rows([97, *[256] * 6, 257, *[98] * 9], T=16)       # targets: 24 + 0 + 9 bytes
        model = tiny_model(vocab_size=258)
        model.out_head.weight.data.zero_()                        # every token equally likely
        args = mock.Mock(eval_batches=9, batch_size=2, prompt="a", seed=1)
        row = pretrain.evaluate_rows(model, rows, tokenizer, args, torch.device("cpu"),
                                     torch.float32)
        self.assertAlmostEqual(row["val_loss"], math.log(258), places=5)
        self.assertAlmostEqual(row["perplexity"], 258, places=2)
        self.assertAlmostEqual(row["bits_per_byte"], 16 * math.log2(258) / 33, places=5)


class TestPretraining(InFolder):
    def test_accumulated_batches_give_the_step_of_one_large_batch(self):
        for name, split in (("a.pt", (6, 1)), ("b.pt", (2, 3))):
            self.ok(*PRETRAIN, "--max-steps", 3, "--batch-size", split[0], "--grad-accum", split[1],
                    "--out", name)
        torch.testing.assert_close(weights("a.pt"), weights("b.pt"), atol=1e-4, rtol=1e-3)

    def test_learning_rate_rises_then_falls_as_half_a_cosine(self):
        factors = [pretrain.lr_factor(i, 41, 4, 0.1) for i in range(42)]
        self.assertEqual(factors[:4], [0.25, 0.5, 0.75, 1.0])
        self.assertAlmostEqual(factors[4], 1.0)
        self.assertAlmostEqual(pretrain.lr_factor(23, 42, 4, 0.1), 0.55)  # half-way
        self.assertAlmostEqual(factors[41], 0.1)
        self.assertEqual({pretrain.lr_factor(i, 14, 0, 1.0) for i in range(14)}, {1.0})

    def test_only_matrices_decay_and_every_parameter_has_one_optimizer(self):
        for optimizer in ("adamw", "muon"):
            model = tiny_model(tie_embeddings=True)
            optimizers = pretrain.make_optimizers(model, optimizer, 1.0, 0.1, torch.float32)
            groups = [group for o in optimizers for group in o.param_groups]
            held = [id(p) for group in groups for p in group["params"]]
            self.assertEqual(sorted(held), sorted(id(p) for p in model.parameters()))
            decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
            names = [n for n, p in model.named_parameters() if id(p) in decayed]
            self.assertTrue(all(n.endswith("weight") and "emb" not in n for n in names), names)
            self.assertEqual(len(names), 2 * 6)

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
        self.assertAlmostEqual(block.ff.layers[0].weight.std().item(), 0.02, delta=0.001)
        self.assertAlmostEqual(block.ff.layers[2].weight.std().item(), 0.005, delta=0.0004)
        self.assertAlmostEqual(block.att.out_proj.weight.std().item(), 0.005, delta=0.0004)

    def test_the_quick_preset_needs_no_file_and_no_network(self):
        with mock.patch("requests.get", side_effect=AssertionError("network used")):
            out = self.ok(pretrain.main, "--max-steps", 2, "--n-layers", 1, "--eval-batches", 1,
                          "--emb-dim", 12, "--n-heads", 1)
        for part in ("Python's reference manual", "perplexity", "bits per byte", "tokens/s"):
            self.assertIn(part, out)
        self.assertTrue(Path("checkpoints/pretrained.pt").exists())

    def test_presets_are_the_defaults_that_help_shows(self):
        args = pretrain.parse_arguments(["--preset", "verdict"])
        self.assertEqual({name: vars(args)[name] for name in GPT_CONFIG_124M},
                         {**GPT_CONFIG_124M, "context_length": 256})
        self.assertEqual((args.batch_size, args.lr, args.weight_decay, args.epochs, args.max_steps,
                          args.clip), (2, 4e-4, 0.1, 10, None, None))
        args = pretrain.parse_arguments(["--size", "355M", "--n-heads", "8", "--epochs", "3"])
        self.assertEqual((args.emb_dim, args.n_heads, args.epochs, args.max_steps),
                         (1024, 8, 3, None))
        self.assertEqual(pretrain.parse_arguments(["--init", "x.pt"]).lr, 1e-4)
        status, out, _ = call(pretrain.main, "--preset", "gpt2", "--help")
        self.assertRegex(out, r"\(default: 0.0006\)")

    def test_started_from_a_checkpoint_it_keeps_model_and_tokenizer(self):
        out = self.ok(pretrain.main, "--init", "tiny.pt", "--data", "text.txt", "--max-steps", 2,
                      "--out", "next.pt")
        self.assertEqual(gpt.load_checkpoint("next.pt")[2]["config"],
                         gpt.load_checkpoint("tiny.pt")[2]["config"])
        self.assertIn("gpt.py --checkpoint next.pt", out)

    def test_two_processes_give_the_losses_of_one(self):
        run = [*map(str, PRETRAIN[1:]), "--grad-accum", "2", "--batch-size", "4", "--max-steps",
               "6", "--eval-every", "2"]
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node",
                               "2", "--standalone", str(ROOT / "pretrain.py"), *run],
                              capture_output=True, text=True, timeout=100)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        self.assertEqual(done.stdout.count("step 6 |"), 1)      # one process prints
        together = Path("run.csv").read_text(encoding="utf-8").splitlines()
        self.ok(pretrain.main, *run)
        alone = Path("run.csv").read_text(encoding="utf-8").splitlines()
        self.assertEqual(len(alone), 5)
        for a, b in zip(together[2:], alone[2:]):
            np.testing.assert_allclose([float(v) for v in a.split(",")],
                                       [float(v) for v in b.split(",")], atol=1e-3)


# ---------------------------------------------------------------------------------------------
# tokenizer.py

STRINGS = [
    "", " ", "  ", "\n", " \n\n \t x  ", "a\r\nb\rc\x0bd\x0ce", "a\x1cb !\x1c x",
    "\x00\x01\x1b[31m\x1c\x1d\x1e\x1f\x7f\x85", "x" + " " * 1000 + "y", "\n" * 300,
    "tab\tand\u00a0nbsp\u2003em\u2028ls\u2029ps\u3000wide\u200bzero\ufeffbom",
    "e\u0301 n\u0303 \u0301\u0301\u0301 Z\u0351\u036b\u0343a\u0321\u034al\u0310",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0e2a\u0e27\u0e31",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "0123 \u0660\u0661\u0662 \u0967\u0968 \uff11\uff12 \u00bd\u00b2 \u2167 3.14 1,000",
    "I'm you're he's we've I'd they'll can't 'tis I'M YOU'RE HE'S WE'VE I'D THEY'LL CAN'T",
    "it's' 's's ''s 'll'l 'v've o'clock rock'n'roll \u2019s it\u2019s", "<|unk|> <|endoftext|",
    "<|endoftext|>", "a<|endoftext|> b<|endoftext|><|endoftext|>", "i\u0307 \u01c5 \ufb01 \u1e9e",
    "--- ... !!! ?!?! ((())) $$$ a_b_c C++ x==y //", "a" * 5000, "7" * 5000, "é" * 2500,
    "".join(random.Random(2).choices("abcdefghij", k=20_000)),
]


def fuzz(seed, strings):
    """Strings with a fixed seed, of words, marks, white space and letters from everywhere."""
    r = random.Random(seed)
    parts = ["the", " quick", "'s", "'LL", "'", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "1",
             "٣", "\u0301", "\u200d", "👍", "é", "ß", "<|endoftext|>", "_", "--", "中文", "\x1c"]
    return ["".join(r.choice(parts) if r.random() < 0.8 else chr(r.randrange(0x250))
                    for _ in range(r.randrange(60))) for _ in range(strings)]


class TestWords(unittest.TestCase):
    @needs("the-verdict.txt")
    def test_ids_are_the_book_s(self):
        vocab = tok.build_vocab((ROOT / "data/the-verdict.txt").read_text(encoding="utf-8"))
        self.assertEqual(len(vocab), 1132)
        v1, v2 = tok.SimpleTokenizerV1(vocab), tok.SimpleTokenizerV2(vocab)
        ids = v1.encode('"It\'s the last he painted, you know," Mrs. Gisburn said with '
                        'pardonable pride.')
        self.assertEqual(ids, [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38,
                               851, 1108, 754, 793, 7])
        text = "Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace."
        ids = v2.encode(text)
        self.assertEqual(ids, [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988,
                               1131, 7])
        self.assertEqual(v2.decode(ids), "<|unk|>, do you like tea? <|endoftext|> In the sunlit "
                                         "terraces of the <|unk|>.")

    def test_an_unknown_word_is_named(self):
        v1 = tok.SimpleTokenizerV1(tok.build_vocab("a cat, a dog."))
        self.assertEqual(v1.decode(v1.encode("a dog , a cat .")), "a dog, a cat.")
        with self.assertRaisesRegex(KeyError, "mouse"):
            v1.encode("a mouse")


class TestBytePairs(InFolder):
    def test_wikipedia_s_example(self):
        # aaabdaaabac -> ZabdZabac (Z = aa) -> ZYdZYac (Y = ab) -> XdXac (X = ZY)
        merges, ids = tok.train_simple("aaabdaaabac", 3)
        self.assertEqual(merges, [((97, 97), 4), ((97, 98), 2), ((256, 257), 2)])
        self.assertEqual(ids, [258, 100, 258, 97, 99])
        t = tok.BPETokenizer()
        t.train("aaabdaaabac", 260)
        self.assertEqual(t.encode("aaabdaaabac"), [258, 100, 258, 97, 99])

    def test_the_fast_trainer_does_what_the_definition_says(self):
        r = random.Random(0)
        for _ in range(100):
            chunks = {bytes(r.choices(b"abc", k=r.choice([1, 3, 8, 30]))): r.randint(1, 9)
                      for _ in range(8)}
            self.assertEqual(list(tok.learn_merges(chunks)), self.by_definition(chunks))

    def by_definition(self, chunks):
        rows = [([bytes([b]) for b in chunk], n) for chunk, n in chunks.items()]
        ids, merges = {bytes([b]): b for b in range(256)}, []
        while True:
            counts = Counter()
            for row, n in rows:
                for pair in zip(row, row[1:]):
                    counts[pair] += n
            if not counts:
                return merges
            pair = min(counts, key=lambda p: (-counts[p], ids[p[0]], ids[p[1]]))
            joined = pair[0] + pair[1]
            if joined not in ids:
                ids[joined] = len(ids)
                merges.append((*pair, counts[pair]))
            for k, (row, n) in enumerate(rows):
                merged = []
                for token in row:  # the flag marks a token that came out of this merge
                    if merged and (merged[-1], token) == ((pair[0], False), pair[1]):
                        merged[-1] = (joined, True)
                    else:
                        merged.append((token, False))
                rows[k] = ([token for token, _ in merged], n)

    @needs("vocab.bpe", "tiktoken")
    def test_gpt2_s_tokens_are_tiktoken_s(self):
        ours, theirs = tok.BPETokenizer.from_gpt2(ROOT / "data/vocab.bpe"), tiktoken.get_encoding(
            "gpt2")
        self.assertEqual((ours.name, ours.n_vocab, ours.eot_token), ("gpt2", 50257, 50256))
        for text in STRINGS + fuzz(seed=1, strings=1000):
            for allowed in (set(), {"<|endoftext|>"}):
                ids = ours.encode(text, allowed_special=allowed)
                self.assertEqual(ids, theirs.encode(text, allowed_special=allowed,
                                                    disallowed_special=()), text[:80])
                self.assertEqual(ours.decode(ids), text)
        r = random.Random(3)
        for _ in range(100):                                # any IDs, also half characters
            ids = [r.randrange(50257) for _ in range(20)]
            self.assertEqual(ours.decode(ids), theirs.decode(ids))

    def test_a_trained_vocabulary_round_trips_any_text_and_tiktoken_reads_it(self):
        texts = STRINGS + fuzz(seed=4, strings=300)
        for name in ("a.tiktoken", "b.tiktoken"):
            t = tok.BPETokenizer()
            t.train(texts[::2], 600)
            t.save(name)
        self.assertEqual(Path("a.tiktoken").read_bytes(), Path("b.tiktoken").read_bytes())
        again, theirs = tok.BPETokenizer.load("a.tiktoken"), gpt.load_tokenizer("a.tiktoken")
        self.assertEqual((t.n_vocab, theirs.n_vocab, t.eot_token), (600, 600, 599))
        for text in texts:
            ids = t.encode(text, allowed_special="all")
            self.assertEqual(ids, again.encode(text, allowed_special="all"))
            self.assertEqual(ids, theirs.encode(text, allowed_special="all"))
            self.assertEqual(t.decode(ids), text)

    def test_pieces_do_not_differ_from_the_whole_and_the_end_of_text_is_not_learned(self):
        text = "the cat sat on the mat; the cat ate the rat. " * 20  # 45 characters
        whole, pieces = tok.BPETokenizer(), tok.BPETokenizer()
        whole.train(text, 270)
        pieces.train((text[i:i + 45] for i in range(0, len(text), 45)), 270)
        self.assertEqual(whole._mergeable_ranks, pieces._mergeable_ranks)
        whole.train("<|endoftext|>ab ab<|endoftext|>ab ab" * 9, 258)
        self.assertEqual(list(whole._mergeable_ranks)[256:], [b"ab"])

    def test_too_small_a_vocabulary_or_text(self):
        t = tok.BPETokenizer()
        with self.assertRaisesRegex(UserError, "at least 257"):
            t.train("text", 256)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            t.train("aaaa", 5000)  # aa, aaaa
        self.assertIn("there were 2,", err.getvalue())
        self.assertEqual((t.n_vocab, t.encode("aaaa")), (259, [257]))
        with self.assertRaisesRegex(ValueError, "surrogates"):
            t.encode("ab\ud83d")

    def test_a_text_without_white_space_is_cut_into_equal_chunks(self):
        counts = Counter()
        tok.count_chunks("a" * 5_000_500, counts)
        self.assertEqual(counts, {"a" * 1000: 5000, "a" * 500: 1})

    def test_it_serves_wherever_the_stages_take_a_tokenizer(self):
        t = tok.BPETokenizer()
        t.train(TEXT, 300)
        self.assertEqual(gpt.text_to_token_ids("mat<|endoftext|>", t)[0, -1], t.eot_token)
        self.assertEqual(len(clf.SpamDataset([("ham", "the mat")], t)), 1)
        entry = {"instruction": "Sit.", "input": "", "output": "The mat"}
        data = instruct.InstructionDataset([entry], t)
        self.assertEqual(t.decode(data[0][data.prompt_lengths[0]:]), "The mat")
        gpt.save_checkpoint("t.pt", tiny_model(vocab_size=t.n_vocab), t)
        self.assertEqual(gpt.load_checkpoint("t.pt")[1].encode(TEXT), t.encode(TEXT))
        self.assertEqual("".join(gpt.decode_stream(t.encode(TEXT), t)), TEXT)

    def test_the_walk_needs_no_file_and_the_commands_train_and_encode(self):
        out = self.ok(tok.main)
        for part in ("KeyError: 'pancakes'", "seen 29 times", "gives back every byte: True"):
            self.assertIn(part, out)
        self.write("text.txt", TEXT + "A last tenth that training does not see. " * 8)
        out = self.ok(tok.main, "train", "text.txt", "--vocab-size", 280, "--out", "my.tiktoken")
        self.assertIn("trained  280 tokens", out)
        self.assertIn("bytes per token", out)
        out = self.ok(tok.main, "encode", "--tokenizer", "my.tiktoken", "mat\x1b<|endoftext|>",
                      "--allow-special")
        ids = tok.BPETokenizer.load("my.tiktoken").encode("mat\x1b<|endoftext|>", "all")
        self.assertEqual(out.split("\n")[0], " ".join(map(str, ids)))
        self.assertIn("\\x1b|<|endoftext|>", out)          # shown, not obeyed


# ---------------------------------------------------------------------------------------------
# load_gpt2.py: in. Small files in both formats, and GPT-2 in twenty lines of numpy to say what the
# logits must be.

V, T, C, H, L = 300, 16, 32, 2, 11  # 11 blocks: h10 comes before h2 in sorted order


def random_gpt2():
    """{the hub's name: float32 array} of a tiny GPT-2, every array different."""
    rng, shapes = np.random.default_rng(0), {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}
    shapes = {f"h.{i}.{name}": shape for i in range(L) for name, shape in shapes.items()}
    shapes |= {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_gpt2(w, ids):
    """Logits (T, V) of token IDs (T,), after Radford et al. 2019."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

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
    return norm(x, "ln_f") @ w["wte.weight"].T


def write_safetensors(path, weights, change=lambda header: None, dtype="F32"):
    """`weights` as {name: array}; `change` may alter the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in weights.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensorflow_name(hub_name):
    """h.3.attn.c_attn.weight -> model/h3/attn/c_attn/w, as OpenAI names it."""
    name = re.sub(r"^h\.(\d+)\.", r"h\1/", hub_name).replace(".", "/")
    name = re.sub(r"(ln_\w)/weight", r"\1/g", name).replace("/weight", "/w").replace("/bias", "/b")
    return "model/" + name.replace("wte/w", "wte").replace("wpe/w", "wpe")


class TestLoadGPT2(InFolder):
    def setUp(self):
        super().setUp()
        self.weights = random_gpt2()
        Path("hub").mkdir()
        self.file = Path("hub/model.safetensors")
        write_safetensors(self.file, self.weights)
        self.write("hub/config.json", json.dumps({"n_head": H, "vocab_size": V}))
        arrays = {tensorflow_name(name): array for name, array in self.weights.items()}
        self.write("tf/model.ckpt.data-00000-of-00001",
                   b"".join(arrays[name].tobytes() for name in sorted(arrays)))
        self.write("tf/hparams.json", json.dumps(
            {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}))

    def check_logits(self, source, tolerance=2e-4):
        ids = [0, 299, 7, 7, 42]
        weights = {name: array.astype(np.float64) for name, array in self.weights.items()}
        model = source if isinstance(source, GPTModel) else load_gpt2.load_local(source)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].numpy()
        np.testing.assert_allclose(logits, numpy_gpt2(weights, ids), atol=tolerance, rtol=1e-4)
        return model

    @needs("gpt2-tiny-hf", "gpt2-tiny-tf")
    def test_files_of_transformers_and_tensorflow_give_transformers_logits(self):
        expected = np.load(ROOT / "data" / "gpt2-tiny-tf" / "expected_logits.npz")
        for name in ("gpt2-tiny-hf", "gpt2-tiny-tf"):
            model = load_gpt2.load_local(ROOT / "data" / name)
            with torch.no_grad():
                logits = model(torch.from_numpy(expected["ids"])).numpy()
            self.assertLess(np.abs(logits - expected["logits"]).max(), 2e-5, name)

    def test_both_formats_give_the_logits_of_gpt2_in_numpy(self):
        self.check_logits("hub")
        self.check_logits(self.file)  # the file alone, beside its config.json
        model = self.check_logits("tf")
        self.assertIs(model.out_head.weight, model.tok_emb.weight)
        self.assertFalse(model.training)

    def test_prefix_masks_sixteen_bits_and_a_copy_of_the_embedding(self):
        named = {f"transformer.{name}": array for name, array in self.weights.items()}
        extra = {"transformer.h.3.attn.bias": np.ones((1, 1, T, T), np.float32),
                 "lm_head.weight": self.weights["wte.weight"]}
        write_safetensors(self.file, {**named, **extra})
        self.check_logits("hub")
        halves = {name: array.astype(np.float16) for name, array in self.weights.items()}
        write_safetensors(self.file, halves, dtype="F16")
        self.check_logits("hub", tolerance=0.3)
        upper = {name: (array.view(np.uint32) >> 16).astype(np.uint16)
                 for name, array in self.weights.items()}
        write_safetensors(self.file, upper, dtype="BF16")
        self.weights = {name: (array.astype(np.uint32) << 16).view(np.float32)
                        for name, array in upper.items()}
        self.check_logits("hub")

    def test_params_are_the_book_s_tree_and_load_into_a_model(self):
        Path("models").mkdir()
        Path("tf").rename("models/124M")
        settings, params = load_gpt2.download_and_load_gpt2("124M", "models")
        self.assertEqual(settings, {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H,
                                    "n_layer": L})
        np.testing.assert_array_equal(params["blocks"][10]["mlp"]["c_fc"]["w"],
                                      self.weights["h.10.mlp.c_fc.weight"])
        np.testing.assert_array_equal(params["g"], self.weights["ln_f.weight"])
        cfg = {**TINY, "vocab_size": V, "context_length": T, "emb_dim": C, "n_layers": L}
        model = GPTModel({**cfg, "qkv_bias": True})
        load_gpt2.load_weights_into_gpt(model, params)
        self.check_logits(model.eval())
        for change, words in (({"qkv_bias": False}, "qkv_bias True"), ({"emb_dim": 8}, "mismatch")):
            model = GPTModel({**cfg, "qkv_bias": True, **change})
            before = [p.clone() for p in model.parameters()]
            with self.assertRaisesRegex(UserError, words):
                load_gpt2.load_weights_into_gpt(model, params)
            torch.testing.assert_close(list(model.parameters()), before)
        del params["blocks"][3]["attn"]["c_proj"]["b"]
        with self.assertRaisesRegex(UserError, "lack h3/attn/c_proj/b"):
            load_gpt2.load_weights_into_gpt(model, params)

    def test_files_that_are_cut_damaged_or_hostile_are_a_sentence(self):
        def entry(**change):
            return lambda header: header["wte.weight"].update(change)

        def without(name):
            return lambda header: header.pop(name) and None

        for change, words in [
                (entry(dtype="I64"), "wte.weight"), (entry(shape=[V, C, 1]), "not a complete GPT-2"),
                (entry(shape=[-V, -C]), "has the shape"), (entry(shape=[1e3]), "has the shape"),
                (entry(data_offsets=[0, 10**12]), "does not lie"),
                (entry(data_offsets=[-38400, 0]), "does not lie"), (lambda h: [1], "not a complete"),
                (without("h.3.mlp.c_fc.bias"), "h.3.mlp.c_fc.bias"), (without("wpe.weight"), "wpe"),
                (lambda h: {"x": "y" * (1 << 20)}, "a header of")]:
            write_safetensors(self.file, self.weights, change)
            with self.assertRaisesRegex(UserError, words):
                load_gpt2.load_local("hub")
        for content in (b"", b"\xff" * 100, struct.pack("<Q", 9) + b"{" * 9,
                        struct.pack("<Q", 2) + b"\xff\xfe"):
            self.file.write_bytes(content)
            with self.assertRaisesRegex(UserError, "not a complete GPT-2"):
                load_gpt2.load_local("hub")
        data = Path("tf/model.ckpt.data-00000-of-00001")
        for content in (data.read_bytes()[:-1], data.read_bytes() + b"x"):
            data.write_bytes(content)
            with self.assertRaisesRegex(UserError, "bytes of a model with the sizes"):
                load_gpt2.load_local("tf")
        for config in ("", "[]", '{"n_embd": 8}', '{"n_head": 5}', '{"n_head": 0}',
                       '{"model_type": "llama"}', '{"n_layer": 1000000}'):
            write_safetensors(self.file, self.weights)
            self.write("hub/config.json", config)
            with self.assertRaises(UserError):
                load_gpt2.load_local("hub")
        with self.assertRaisesRegex(UserError, "holds neither format"):
            load_gpt2.load_local(".")

    @needs("vocab.bpe")
    def test_from_a_folder_to_a_checkpoint_that_writes(self):
        self.write("data/vocab.bpe", (ROOT / "data/vocab.bpe").read_bytes())
        out = self.ok(load_gpt2.main, "--from", "hub", "--out", "a.pt", "--max-new-tokens", 3)
        self.assertIn("Every effort moves you", out)
        model, tokenizer, _ = gpt.load_checkpoint("a.pt")
        self.check_logits(model)
        self.assertEqual((tokenizer.n_vocab, tokenizer.decode(tokenizer.encode("né"))), (V, "né"))

    def test_the_hub_first_then_openai_then_the_book_s_mirror(self):
        asked = []

        def get(url, **_):
            asked.append(url)
            raise load_gpt2.requests_error("unplugged")

        import requests
        load_gpt2.requests_error = requests.ConnectionError
        self.addCleanup(delattr, load_gpt2, "requests_error")
        with mock.patch.object(requests, "get", get):
            status, _, err = call(load_gpt2.main, "--size", "355M")
        self.assertEqual(status, 1)
        self.assertIn("unplugged", err)
        self.assertEqual([re.sub(r"https://([^/]*)/.*", r"\1", url) for url in asked],
                         ["huggingface.co", "openaipublic.blob.core.windows.net",
                          "f001.backblazeb2.com"])
        self.assertIn("gpt2-medium/resolve/main/model.safetensors", asked[0])


# ---------------------------------------------------------------------------------------------
# load_gpt2.py: out, read back by the published layouts

def read_gguf(path):
    """(keys, {tensor's name: (dimensions reversed, type, bytes from its start)}) of a GGUF file."""
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
    infos = []
    for _ in range(num_tensors):
        name, count = text(), take("I")
        infos.append((name, np.atleast_1d(take(f"{count}Q"))[::-1].tolist(), *take("IQ")))
    start = at + -at % 32
    return keys, {name: (shape, kind, data[start + offset:]) for name, shape, kind, offset in infos}


class TestExport(InFolder):
    def checkpoint(self, tokenizer, **changes):
        changes = {"vocab_size": tokenizer.n_vocab, "emb_dim": 32, **changes}
        model = tiny_model(spread=0.3, **changes)
        gpt.save_checkpoint("m.pt", model, tokenizer, prompt_texts=instruct.PROMPT_STYLES["phi3"])
        return model

    def expected(self, model, names):
        """What an array of ours must be, in torch's order, from the table of names."""
        state = model.state_dict()
        return torch.cat([state.get(n, torch.zeros(model.cfg["emb_dim"])) for n in names]).numpy()

    def test_a_folder_has_every_tensor_and_closes_the_circle(self):
        trained = tok.BPETokenizer()
        trained.train(TEXT, 280)
        for tokenizer in (BYTES, trained):
            for tied in (True, False):
                model = self.checkpoint(tokenizer, tie_embeddings=tied, qkv_bias=tied)
                self.ok(load_gpt2.main, "--checkpoint", "m.pt", "--export", "my-gpt/")
                places = load_gpt2.read_safetensors(Path("my-gpt/model.safetensors"))
                data = np.memmap("my-gpt/model.safetensors", np.uint8, "r")
                for tf_name, hub_name, _, ours in load_gpt2.weight_names(2):
                    array = load_gpt2.read_array(data, *places.pop(hub_name))
                    expected = self.expected(model, ours)
                    np.testing.assert_array_equal(array, expected.T if tf_name.endswith("/w")
                                                  else expected)
                self.assertEqual(list(places), [] if tied else ["lm_head.weight"])
                self.ok(load_gpt2.main, "--from", "my-gpt", "--out", "back.pt")
                back, again, _ = gpt.load_checkpoint("back.pt")
                idx = torch.arange(9)[None]
                torch.testing.assert_close(back(idx), model(idx))
                self.assertEqual(again.encode(TEXT), tokenizer.encode(TEXT))
        config = json.loads(Path("my-gpt/config.json").read_text(encoding="utf-8"))
        self.assertEqual((config["eos_token_id"], config["tie_word_embeddings"]), (279, False))

    def test_merges_replayed_in_their_order_give_the_tokens_of_the_ranks(self):
        trained = tok.BPETokenizer()
        trained.train(TEXT + " ".join(fuzz(seed=7, strings=50)), 400)
        self.checkpoint(trained)
        self.ok(load_gpt2.main, "--checkpoint", "m.pt", "--export", "my-gpt")
        contents = json.loads(Path("my-gpt/tokenizer.json").read_text(encoding="utf-8"))
        order = {tuple(pair): i for i, pair in enumerate(contents["model"]["merges"])}
        for text in STRINGS[:20] + fuzz(seed=8, strings=100):
            ids = []
            for chunk in tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, text):
                parts = [load_gpt2.LETTER_OF_BYTE[byte] for byte in chunk.encode()]
                while pairs := [pair for pair in zip(parts, parts[1:]) if pair in order]:
                    i = list(zip(parts, parts[1:])).index(min(pairs, key=order.get))
                    parts[i:i + 2] = [parts[i] + parts[i + 1]]
                ids += [contents["model"]["vocab"][part] for part in parts]
            self.assertEqual(ids, trained.encode(text), text)

    def test_a_gguf_file_has_every_tensor_key_and_the_prompt(self):
        for tied in (True, False):
            model = self.checkpoint(BYTES, tie_embeddings=tied, qkv_bias=tied)
            self.ok(load_gpt2.main, "--checkpoint", "m.pt", "--export", "m.gguf")
            keys, tensors = read_gguf(Path("m.gguf"))
            for _, _, name, ours in load_gpt2.weight_names(2):
                shape, kind, data = tensors.pop(name)
                expected = self.expected(model, ours)
                self.assertEqual((kind, shape), (0, list(expected.shape)))
                array = np.frombuffer(data, "<f4", expected.size).reshape(shape)
                np.testing.assert_array_equal(array, expected)
            self.assertEqual(list(tensors), [] if tied else ["output.weight"])
        self.assertEqual(keys["gpt2.block_count"], 2)
        self.assertEqual(len(keys["tokenizer.ggml.tokens"]), 257)
        self.assertEqual(keys["tokenizer.ggml.eos_token_id"], 256)
        self.assertIn("<|assistant|>", keys["tokenizer.chat_template"])
        self.assertIn("{{ .Prompt }}\n<|assistant|>\n", Path("m.Modelfile").read_text("utf-8"))

    def test_eight_bits_are_blocks_of_32_with_one_scale(self):
        model = self.checkpoint(BYTES, tie_embeddings=True)
        out = self.ok(load_gpt2.main, "--checkpoint", "m.pt", "--export", "m.gguf", "--quantize",
                      "q8_0")
        keys, tensors = read_gguf(Path("m.gguf"))
        for _, _, name, ours in load_gpt2.weight_names(2):
            shape, kind, data = tensors[name]
            expected = self.expected(model, ours)
            rounded = expected.ndim == 2 and name != "position_embd.weight"
            self.assertEqual(kind, 8 if rounded else 0, name)
            if rounded:
                blocks = np.frombuffer(data, [("scale", "<f2"), ("numbers", "i1", 32)],
                                       expected.size // 32)
                array = blocks["numbers"] * blocks["scale"][:, None].astype(np.float32)
                errors = np.abs(array - expected.reshape(-1, 32)).max(axis=1)
                self.assertTrue((errors <= np.abs(expected).reshape(-1, 32).max(axis=1) / 200).all())
        self.assertRegex(out, r"loss +\d+\.\d+ in float32, \d+\.\d+ in q8_0")

    def test_what_cannot_be_exported_is_a_sentence_and_loses_nothing(self):
        model = tiny_model()
        gpt.replace_head(model, 2)
        gpt.save_checkpoint("c.pt", model, BYTES, class_names=["a", "b"])
        self.write("mine/notes.txt", "keep me")
        self.write("mine.gguf", "keep me")
        for flags, words in [(("--checkpoint", "c.pt", "--export", "x/"), "holds a classifier"),
                             (("--checkpoint", "tiny.pt", "--export", "mine"), "something else"),
                             (("--checkpoint", "tiny.pt", "--export", "mine.gguf"), "no GGUF"),
                             (("--checkpoint", "none.pt", "--export", "x/"), "no checkpoint")]:
            status, _, err = call(load_gpt2.main, *flags)
            self.assertEqual(status, 1)
            self.assertIn(words, err)
        self.assertEqual([Path(p).read_text("utf-8") for p in ("mine/notes.txt", "mine.gguf")],
                         ["keep me"] * 2)


# ---------------------------------------------------------------------------------------------
# finetune_classifier.py

class TestLabelledTexts(InFolder):
    def read(self, *args):
        return quietly(clf.read_labelled_texts, *args)

    @needs("SMSSpamCollection")
    def test_the_sms_file_has_all_its_messages_and_splits_as_in_the_book(self):
        examples = self.read(ROOT / "data" / "SMSSpamCollection")
        self.assertEqual(Counter(label for label, _ in examples), {"ham": 4827, "spam": 747})
        balanced = clf.create_balanced_dataset(examples, seed=5)
        self.assertEqual(Counter(label for label, _ in balanced), {"ham": 747, "spam": 747})
        parts = clf.random_split(balanced, 0.7, 0.1, seed=5)
        self.assertEqual([len(part) for part in parts], [1045, 149, 300])
        self.assertEqual(Counter(sum(parts, [])), Counter(balanced))     # nobody lost or doubled
        self.assertNotEqual(clf.random_split(balanced, 0.7, 0.1, seed=6), parts)

    def test_csv_quotes_hold_commas_and_line_breaks(self):
        rows = [("a", 'he said "hi",\nthen left'), ("b", "y, z")] * 10
        with open("t.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("label", "text"), *rows])
        self.assertEqual(self.read("t.csv"), rows)

    def test_columns_by_header_by_number_and_by_default(self):
        lines = [("5", "good"), ("1", "bad \"")] * 10
        self.write("t.tsv", "id\ttext\tstars\n" + "".join(f"7\t{t}\t{s}\r\n" for s, t in lines))
        for columns in (("text", "stars"), ("TEXT", "3"), (None, "stars"), ("2", "3")):
            self.assertEqual(self.read("t.tsv", *columns), lines)
        self.write("t.csv", "".join(f"{t.strip(chr(34))},{s}\n" for s, t in lines))
        self.assertEqual(self.read("t.csv", "1", "2"), [(s, t.strip('"')) for s, t in lines])

    def test_download_takes_the_expected_file_only_and_tries_the_mirror(self):
        content = b"ham\thello\n"
        with zipfile.ZipFile("good.zip", "w") as archive:
            archive.writestr("../evil", "no")
            archive.writestr("SMSSpamCollection", content)
        self.write("bad.zip", "<html>down for maintenance</html>")
        with mock.patch.object(http.server.SimpleHTTPRequestHandler, "log_message"), \
                http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                                http.server.SimpleHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            urls = [f"http://127.0.0.1:{server.server_port}/{name}.zip"
                    for name in ("none", "bad", "good")]
            path = quietly(clf.download_and_unzip_spam_data, urls, "sub/SMSSpamCollection",
                           hashlib.sha256(content).hexdigest())
            with self.assertRaisesRegex(UserError, "(?s)404.*not the expected archive.*SHA-256"):
                quietly(clf.download_and_unzip_spam_data, urls, "other/SMSSpamCollection")
            server.shutdown()
        self.assertEqual(path.read_bytes(), content)
        self.assertEqual([p.name for p in path.parent.iterdir()], ["SMSSpamCollection"])
        self.assertEqual(list(Path().rglob("evil")), [])


class TestClassifier(InFolder):
    def test_padding_never_changes_a_result(self):
        """Against the plain model, a row at a time, read at its last token."""
        texts = ["a", "short text", "a longer text than the others " * 2, "mid length text"]
        for num_layers in (1, 2):
            model = tiny_model(spread=0.3, n_layers=num_layers)
            gpt.replace_head(model, 3)
            ids = [torch.tensor(BYTES.encode(text))[:64] for text in texts]
            with torch.no_grad():
                truth = torch.stack([model(row[None])[0, -1] for row in ids])
                x, lengths = clf.pad(ids)
                wider = torch.cat([x, torch.full((4, 64 - x.shape[1]), 99)], dim=1)
                for padded in (x, wider):
                    torch.testing.assert_close(clf.classify_batch(model, padded, lengths), truth)
                    for depth in range(num_layers):
                        frozen = clf.run_frozen(model, padded, depth)
                        torch.testing.assert_close(clf.run_rest(model, frozen, lengths, depth),
                                                   truth)
            probs = quietly(clf.classify_texts, texts, model, BYTES, "cpu")
            torch.testing.assert_close(probs, truth.softmax(dim=-1))
            self.assertEqual(quietly(clf.classify_review, texts[1], model, BYTES, "cpu", "xyz"),
                             "xyz"[int(truth[1].argmax())])

    def test_the_run_is_the_plain_loop_on_the_whole_model(self):
        """Frozen part kept, computed afresh, and the simple loop: the same weights."""
        train, val = (clf.SpamDataset(part, BYTES, 64) for part in clf.random_split(
            clf.create_balanced_dataset(quietly(clf.read_labelled_texts, "data.tsv")))[:2])
        for mode in ("head", "last-block", "all", "lora"):
            run = (*CLASSIFY, "--train", mode, "--max-steps", 6, "--eval-every", 6)
            self.assertEqual("MB: kept" in self.ok(*run), mode in ("head", "last-block"))
            kept = weights("run.pt", "classifier")
            self.ok(*run, "--keep-limit", 0)
            torch.testing.assert_close(weights("run.pt", "classifier"), kept, atol=1e-4, rtol=0)

            model = gpt.load_checkpoint("tiny.pt")[0]
            torch.manual_seed(123)
            gpt.replace_head(model, 2)
            clf.freeze(model, mode)
            order = np.random.default_rng([123, 0]).permutation(len(train))[:48].reshape(6, 8)
            loader = torch.utils.data.DataLoader(train, batch_sampler=order.tolist(),
                                                 collate_fn=clf.collate)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          lr=0.01, weight_decay=0.1)
            quietly(clf.train_classifier_simple, model, loader, loader, optimizer, "cpu", 1, 5, 2)
            gpt.merge_lora(model)
            plain = torch.cat([p.detach().flatten() for p in model.parameters()])
            torch.testing.assert_close(kept, plain, atol=1e-4, rtol=0)

    def test_what_is_frozen_stays_and_a_tied_embedding_is_kept(self):
        start = gpt.load_checkpoint("tiny.pt")[0].state_dict()
        learns = {"head": r"out_head", "last-block": r"out_head|final_norm|trf_blocks\.1",
                  "lora": r"out_head|trf_blocks.*(W_\w+|out_proj|layers\.\d)\.weight", "all": ""}
        for mode, pattern in learns.items():
            self.ok(*CLASSIFY, "--train", mode, "--max-steps", 3)
            state = gpt.load_checkpoint("run.pt", kind="classifier")[0].state_dict()
            for name, value in state.items():
                same = name in start and torch.equal(start[name], value)
                self.assertEqual(same, not re.match(pattern, name), f"{mode}: {name}")

    def test_classifiers_are_finetuned_without_dropout_as_in_the_book(self):
        model = tiny_model(drop_rate=0.5)
        self.assertEqual(clf.freeze(model, "last-block"), 1)
        rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        self.assertEqual(set(rates), {0.0})

    def test_accuracy_is_counted_over_all_batches(self):
        model = tiny_model(spread=0.3)
        gpt.replace_head(model, 2)
        data = clf.SpamDataset([line.split("\t") for line in labelled_lines(5).split("\n")[:-1]],
                               BYTES, 64)
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=clf.collate)
        with torch.no_grad():
            right = [int(model(row[None])[0, -1].argmax()) == int(label) for row, label in data]
        self.assertEqual(clf.calc_accuracy_loader(loader, model, "cpu"), sum(right) / 10)
        self.assertEqual(clf.calc_accuracy_loader(loader, model, "cpu", 1), sum(right[:4]) / 4)

    def test_the_report_follows_from_the_predictions(self):
        labels, predicted = torch.tensor([0] * 50 + [1] * 50), torch.tensor([0] * 90 + [1] * 10)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            clf.report(["ham", "spam"], labels, predicted, commonest=0)
        out = out.getvalue()
        self.assertIn("60.0% of 100 texts are right (95 % interval 50.2% to 69.1%)", out)
        self.assertIn("baseline 50.0%", out)
        self.assertNotIn("does not show", out)
        self.assertRegex(out, r"ham +55.6% +100.0% +50 +0\nspam +100.0% +20.0% +40 +10\n")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            clf.report(["ham", "spam"], labels, torch.tensor([0] * 94 + [1] * 6), commonest=0)
        self.assertIn("this test does not show that the model", " ".join(out.getvalue().split()))

    def test_three_classes_learn_and_travel_to_classify(self):
        self.write("data.tsv", "a\t\n\nb\t \n" + labelled_lines(classes=("a", "b", "c\x1b"))
                   + f"a\t{'long ' * 20}\n" * 10)
        out = self.ok(*CLASSIFY, "--epochs", 12, "--no-balance", "--train", "all")
        self.assertIn("skipped  2 without text or label", out)
        self.assertIn("10 are cut to 64 tokens", out)
        self.assertNotIn("\x1b", out)
        for text, name in (("meet me at home now", "a"), ("WIN cash NOW 0800 x", "b"),
                           ("the weather is mild\x1b", "c\ufffd")):
            out = self.ok(clf.main, "--checkpoint", "run.pt", "--classify", text)
            self.assertRegex(out, rf"\A{name}\t[01]\.\d\d\d\t{text[:19]}")
        done = subprocess.run([sys.executable, str(ROOT / "finetune_classifier.py"), "--checkpoint",
                               "run.pt", "--classify"], input="meet me at home\n\nWIN cash NOW\n",
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(re.findall(r"^\w+", done.stdout, re.MULTILINE), ["a", "b"])
        self.assertIn("1 empty text(s) skipped", done.stderr)


# ---------------------------------------------------------------------------------------------
# finetune_instruct.py

class TestInstructionData(InFolder):
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

    def test_prompts_are_the_book_s_text(self):
        entry = {"instruction": "Add.", "input": "1, 2", "output": "3"}
        self.assertEqual(instruct.format_input(entry),
                         "Below is an instruction that describes a task. Write a response that "
                         "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                         "### Input:\n1, 2")
        self.assertEqual(instruct.format_input({**entry, "input": ""}, "phi3"), "<|user|>\nAdd.")
        dataset = instruct.InstructionDataset([entry], BYTES)
        text = BYTES.decode(dataset[0])
        self.assertEqual(text, instruct.format_input(entry) + "\n\n### Response:\n3")
        self.assertEqual(text[dataset.prompt_lengths[0]:], "3")

    @needs("instruction-data.json", "tiktoken")
    def test_the_book_s_records_split_and_encode_as_the_book_does(self):
        records = instruct.read_records(ROOT / "data" / "instruction-data.json")
        tokenizer = tiktoken.get_encoding("gpt2")
        parts = quietly(instruct.make_datasets, ROOT / "data" / "instruction-data.json", tokenizer,
                        "alpaca", 1024)
        self.assertEqual([len(part) for part in parts], [935, 55, 110])
        for entry, ids in zip(records, instruct.InstructionDataset(records, tokenizer)):
            self.assertEqual(ids, tokenizer.encode(
                instruct.format_input(entry) + "\n\n### Response:\n" + entry["output"]))

    def test_a_record_per_line_is_read_too_and_a_bad_one_is_named(self):
        good = '{"instruction": "a", "output": "b"}'
        self.write("r.jsonl", good + "\n\n" + good[:-1] + ', "input": null, "more": 1}\n')
        self.assertEqual(instruct.read_records("r.jsonl"),
                         [{"instruction": "a", "input": "", "output": "b"}] * 2)
        for name, text, words in [
                ("r.json", '[{"instruction": "a",\n "output": }]', "line 2"),
                ("r.json", "[]", "no list of records"), ("r.json", "{}", "no list of records"),
                ("r.json", "[1]", "record 0 .* no text as its instruction"),
                ("r.json", f'[{good}, {{"instruction": "b"}}]', "record 1 .* no text as its output"),
                ("r.json", f'[{good[:-4]}5}}]', "record 0 .* no text as its output"),
                ("r.json", "[" * 100000, "not JSON"), ("r.json", "1" * 5000, "not JSON"),
                ("r.jsonl", f"{good}\n\nx\n", "line 3")]:
            self.write(name, text)
            with self.subTest(text=text[:50]), self.assertRaisesRegex(UserError, words):
                instruct.read_records(name)


class TestInstructionTraining(InFolder):
    def setUp(self):
        super().setUp()
        self.model = tiny_model(spread=0.2, drop_rate=0.0)
        self.args = mock.Mock(batch_size=8, end=256)
        self.dataset = instruct.InstructionDataset(RECORDS, BYTES, "phi3")

    def test_a_packed_batch_equals_padded_rows_and_log_probabilities_written_out(self):
        for mask in (True, False):
            [(inputs, targets)] = instruct.make_batches(self.dataset, range(6), self.args, self.model,
                                                        mask)
            gradients = []
            for loss in (lambda: instruct.packed_losses(self.model, inputs, targets).mean(),
                         lambda: instruct.calc_loss_batch(inputs, targets, self.model, "cpu"),
                         lambda: F.cross_entropy(self.model(inputs).flatten(0, 1),
                                                 targets.flatten())):
                self.model.zero_grad()
                value = loss()
                value.backward()
                gradients.append([value.detach(), *(p.grad.clone() for p in
                                                    self.model.parameters())])
            torch.testing.assert_close(gradients[0], gradients[2], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(gradients[1], gradients[2], atol=1e-4, rtol=1e-3)

        losses = instruct.record_losses(self.model, self.dataset, self.args, "cpu", torch.float32,
                                        True)
        for i in (0, 3, 4):  # the fifth answer is empty: its end of text is still a target
            answer = [*BYTES.encode(RECORDS[i]["output"]), 256]
            prompt = self.dataset[i][:len(self.dataset[i]) - len(answer) + 1]
            with torch.no_grad():
                log_probs = self.model(torch.tensor([prompt + answer[:-1]]))[0].log_softmax(dim=-1)
            expected = -sum(log_probs[len(prompt) - 1 + k, t] for k, t in enumerate(answer))
            self.assertAlmostEqual(float(losses[i, 0]), float(expected), places=3)
            self.assertEqual(int(losses[i, 1]), len(answer))

    def test_unequal_batches_give_the_step_of_one_large_batch(self):
        gpt.save_checkpoint("tiny.pt", self.model, BYTES)            # without dropout
        for name, split in (("a.pt", (6, 1)), ("b.pt", (2, 3))):
            self.ok(*INSTRUCT, "--no-responses", "--max-steps", 4, "--eval-every", 1, "--batch-size",
                    split[0], "--grad-accum", split[1], "--out", name)
        a, b = (np.genfromtxt(name, delimiter=",", skip_header=2) for name in ("a.csv", "b.csv"))
        np.testing.assert_allclose(a[:, 2:], b[:, 2:], atol=2e-3)

    def test_long_records_make_smaller_batches(self):
        model = mock.Mock(cfg={"context_length": 1024})
        dataset = [[1] * 50] * 7 + [[1] * 1024] * 9 + [[1] * 5000]
        parts = instruct.make_batches(dataset, np.arange(17), mock.Mock(batch_size=5, end=0), model,
                                      False)
        self.assertEqual([tuple(inputs.shape) for inputs, _ in parts],
                         [(4, 50), (4, 1024), (4, 1024), (4, 1024), (1, 1024)])

    def test_the_simple_loop_learns(self):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        losses = instruct.train_model_simple(self.model, self.dataset, optimizer, "cpu", 6, 8, 256)
        self.assertEqual(len(losses), 6 * 3)
        self.assertLess(losses[-1], losses[0] - 1)

    def test_answers_in_batches_are_those_of_one_prompt_alone(self):
        self.model = tiny_model()
        self.model.out_head.weight.data[256] *= 4      # so that rows end at different places
        together = [dict(record) for record in RECORDS[:16]]
        quietly(instruct.generate_responses, self.model, BYTES, together, "phi3", 20, 5)
        lengths = set()
        for entry in together:
            prompt = gpt.text_to_token_ids(
                instruct.format_input(entry, "phi3") + "\n<|assistant|>\n", BYTES)
            steps = max(0, min(20, 64 - prompt.shape[1]))
            new = generate_text_simple(self.model, prompt[:, :64], steps, 64)
            new = new[0, prompt.shape[1]:].tolist()
            new = new[:new.index(256)] if 256 in new else new
            lengths.add(len(new))
            self.assertEqual(entry["model_response"], BYTES.decode(new).strip())
        self.assertGreater(len(lengths), 3)

    def test_a_run_answers_scores_and_is_asked(self):
        out = self.ok(*INSTRUCT, "--epochs", 3, "--train", "lora")
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["output"] for e in entries], [r["output"] for r in RECORDS[25:28]])
        f1 = sum(e["token_f1"] for e in entries) / 3
        self.assertIn(f"token f1 {f1:.3f}", out)
        for entry in entries:
            asked = ("--ask", entry["instruction"], "--input", entry["input"], "--dtype", "float32")
            answer = self.ok(instruct.main, "--checkpoint", "run.pt", *asked, "--max-new-tokens", 8)
            self.assertEqual(answer.strip(), entry["model_response"])
        with mock.patch("builtins.input", side_effect=["Say one", "x" * 99, "/reset", EOFError]):
            with mock.patch.object(sys, "stdin", mock.Mock()):
                out = self.ok(instruct.main, "--checkpoint", "run.pt", "--chat")
        self.assertIn("no room for an answer in the context of 64", out.replace("\n", " "))

    def test_token_f1_written_out(self):
        self.assertAlmostEqual(instruct.token_f1("The cat sat.", "the cat sat down"), 6 / 7)
        self.assertEqual(instruct.token_f1("a a", "b"), 0.0)
        self.assertEqual(instruct.token_f1("", "b"), 0.0)
        self.assertEqual(instruct.token_f1("?", "?"), 1.0)

    def test_records_longer_than_the_context_are_counted(self):
        long = [{"instruction": "x" * 60, "input": "", "output": "y"},
                {"instruction": "x" * 20, "input": "", "output": "y" * 60}] * 10
        self.write("records.json", json.dumps(RECORDS + long))
        out = self.ok(*INSTRUCT, "--max-steps", 1)
        self.assertIn("10 lose the end of the answer, 10 have no room", out)


class TestJudge(InFolder):
    def setUp(self):
        super().setUp()
        test, self.replies, self.questions = self, [], []

        class FakeOllama(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                test.questions.append(json.loads(self.rfile.read(length)))
                reply = test.replies.pop(0)
                body = reply if isinstance(reply, bytes) else json.dumps(
                    {"message": {"content": reply}}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("localhost", 0), FakeOllama)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.url = f"http://localhost:{server.server_port}/api/chat"

    def test_the_question_is_the_book_s_and_the_first_integer_counts(self):
        self.replies[:] = ["87", "Score: 40/100", "very good", "1000"]
        entries = [{"instruction": "Add.", "input": "", "output": "3", "answer": f"{i}"}
                   for i in range(4)] + [{"instruction": "", "output": "", "answer": ""}]
        scores = quietly(instruct.generate_model_scores, entries, "answer", url=self.url)
        self.assertEqual(scores, [87, 40, 0])
        self.assertEqual(entries[2]["judge"]["reply"], "very good")
        question = self.questions[0]
        self.assertEqual(question["options"], {"seed": 123, "temperature": 0, "num_ctx": 2048})
        self.assertEqual(question["messages"][0]["content"],
                         f"Given the input `{instruct.format_input(entries[0])}` and correct "
                         "output `3`, score the model response `0` on a scale from 0 to 100, where "
                         "100 is the best score. Respond with the integer number only.")

    def test_a_failure_is_a_sentence_and_loses_no_score(self):
        entries = [{**r, "model_response": "AAA"} for r in RECORDS[:3]]
        self.write("run-responses.json", json.dumps(entries))
        judge = (instruct.main, "--judge", "llama3", "--judge-url", self.url, "--out", "run.pt")
        for reply, words in ((b'{"error": "out of memory"}', "out of memory.*ollama pull llama3"),
                             (b"<html>", "<html>"), (b"[1]", "gave no answer")):
            self.replies[:] = [reply]
            with self.assertRaisesRegex(UserError, words):
                instruct.query_model("?", url=self.url)
        self.replies[:] = ["11", b'{"error": "busy"}']
        self.assertEqual(call(*judge)[0], 1)
        self.replies[:] = ["22", "33"]
        self.assertIn("22.00 of 100, mean of 3 of 3", self.ok(*judge))
        entries = json.loads(Path("run-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["judge"]["score"] for e in entries], [11, 22, 33])


# ---------------------------------------------------------------------------------------------
# All scripts: mistakes people make, each one sentence

class TestRefusals(InFolder):
    def check(self, cases):
        files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        for run, flags, status, words in cases:
            with self.subTest(flags=flags, words=words):
                actual, _, err = call(*run, *flags)
                self.assertEqual(actual, status, err)
                self.assertIn(words, err)
                self.assertEqual(err.strip().count("\n"), 0, err)
        self.assertEqual({path: path.read_bytes() for path in Path().rglob("*") if path.is_file()
                          and path.parent.name != "data"}, files)

    def test_what_people_mistype_or_lack(self):
        self.write("empty.txt", "")
        self.write("short.txt", "too short")
        self.write("latin.txt", "café".encode("latin-1") * 100)
        self.write("binary.txt", b"a\0b" * 100)
        self.write("cut.pt", b"PK\3\4 not much")
        self.write("one.tsv", labelled_lines(classes=("ham",)))
        self.write("rare.tsv", labelled_lines() + "eggs\ta\neggs\tb\n")
        self.write("ragged.csv", "label,text\nham,Hello\nham,Hello, how are you\n")
        self.write("quote.csv", 'a,"x\nb,y\n')
        Path("folder").mkdir()
        pre, clf_, ins = PRETRAIN, CLASSIFY, INSTRUCT
        self.check([
            (pre, ("--data", "none.txt"), 1, "No such file or directory: 'none.txt'"),
            (pre, ("--data", "empty.txt"), 1, "is empty"),
            (pre, ("--data", "short.txt"), 1, "short.txt is too short"),
            (pre, ("--data", "folder"), 1, "0 files is too short"),
            (pre, ("--data", "latin.txt"), 1, "not UTF-8 text"),
            (pre, ("--data", "binary.txt"), 1, "not a text file"),
            (pre, ("--data", "x\x1b[31m"), 1, "x"),
            (pre, ("--tokenizer", "gpt9"), 1, "use gpt2, bytes, or"),
            (pre, ("--tokenizer", "none.tiktoken"), 1, "python tokenizer.py train"),
            (pre, ("--device", "tpu"), 1, "not available"),
            (pre, ("--n-heads", 5), 1, "cannot be shared out"),
            (pre, ("--out", "folder/text.txt/../../text.txt/x.pt"), 1, "text.txt"),
            ((pretrain.main,), ("--init", "none.pt"), 1, "no checkpoint"),
            ((pretrain.main,), ("--init", "cut.pt"), 1, "cut short"),
            ((pretrain.main,), ("--preset", "gpt2"), 1, "--data FILE-OR-FOLDER"),
            (clf_, ("--data", "none.tsv"), 1, "No such file or directory"),
            (clf_, ("--data", "empty.txt"), 1, "is empty"),
            (clf_, ("--data", "one.tsv"), 1, "has 1 classes"),
            (clf_, ("--data", "rare.tsv"), 1, "the rarest, 'eggs', with 2 texts"),
            (clf_, ("--data", "ragged.csv"), 1, "line 3: 3 columns, expected 2"),
            (clf_, ("--data", "quote.csv"), 1, "quote.csv, line 2"),
            (clf_, ("--label-column", "stars"), 1, "no column 'stars'"),
            (clf_, ("--text-column", "1"), 1, "the same column"),
            (clf_, ("--init", "text.txt"), 1, "not a checkpoint"),
            ((clf.main,), (), 1, "This stage teaches a language model to tell spam from ham"),
            ((clf.main,), ("--classify", "x", "--checkpoint", "tiny.pt"), 1, "a classifier is"),
            (ins, ("--data", "none.json"), 1, "No such file or directory"),
            (ins, ("--data", "text.txt"), 1, "not JSON"),
            ((instruct.main,), (), 1, "This stage teaches a language model to follow"),
            ((instruct.main,), ("--ask", "x", "--checkpoint", "none.pt"), 1, "no checkpoint none"),
            ((instruct.main,), ("--ask", "x" * 99, "--checkpoint", "tiny.pt"), 1, "ask it shorter"),
            ((instruct.main,), ("--judge", "x", "--out", "no.pt"), 1, "there are no answers"),
            ((gpt.main,), ("--prompt", "x"), 1, "python pretrain.py"),
            ((gpt.main,), ("--checkpoint", "tiny.pt", "--explain", "--layer", 2), 1, "2 layers"),
            ((load_gpt2.main,), ("--from", "nowhere"), 1, "nowhere"),
            ((load_gpt2.main,), ("--from", "folder"), 1, "holds neither format"),
            ((tok.main,), ("train", "none.txt"), 1, "No such file"),
            ((tok.main,), ("train", "text.txt", "--vocab-size", 9), 1, "at least 257"),
        ])

    def test_wrong_usage_is_status_2(self):
        self.check([(run, flags, 2, "see ") for run, flags in [
            (PRETRAIN, ("--batch-size", 0)), (PRETRAIN, ("--max-steps", -1)),
            (PRETRAIN, ("--lr", "nan")), (PRETRAIN, ("--lr", 0)), (PRETRAIN, ("--lr", "inf")),
            (PRETRAIN, ("--epochs", "x")), (PRETRAIN, ("--preset", "none")),
            (PRETRAIN, ("--val-share", 1.5)), (PRETRAIN, ("--dtype", "x")),
            (PRETRAIN, ("--out", "run.txt")), (PRETRAIN, ("--max", 3)),
            ((pretrain.main,), ("--init", "a.pt", "--tokenizer", "bytes")),
            ((gpt.main,), ("--temperature", "-1")), ((gpt.main,), ("--top-p", 2)),
            ((gpt.main,), ("--top-k", 0)), ((gpt.main,), ("--non\x1bsense",)),
            (CLASSIFY, ("--train", "some")), (CLASSIFY, ("--seed", "9" * 20)),
            ((instruct.main,), ("--input", "x")), ((instruct.main,), ("--chat", "--ask", "x")),
            ((load_gpt2.main,), ("--size", "3B")),
            ((load_gpt2.main,), ("--export", "x/", "--quantize", "q8_0")),
            ((tok.main,), ("compare", "text.txt"))]])

    def test_without_a_network_the_error_says_where_to_put_the_file(self):
        import requests
        for (main, *argv), path in [
                ((pretrain.main, "--preset", "verdict"), "the-verdict.txt"),
                ((clf.main, "--init", "tiny.pt"), "SMSSpamCollection"),
                ((instruct.main, "--init", "tiny.pt"), "instruction-data.json"),
                ((tok.main, "encode", "hi"), "vocab.bpe")]:
            with mock.patch("requests.get", side_effect=requests.ConnectionError("unplugged")):
                status, _, err = call(main, *argv)
            self.assertEqual(status, 1)
            for part in (os.path.join("data", path), "unplugged", "https://"):
                self.assertIn(part, err)


class TestRepository(unittest.TestCase):
    def test_a_stage_imports_nothing_of_ours_but_gpt(self):
        ours = {path.stem for path in ROOT.glob("*.py")} - {"gpt"}
        for script in set(ROOT.glob("*.py")) - {ROOT / "test_all.py"}:
            code = script.read_text(encoding="utf-8")
            words = re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE)
            self.assertFalse(ours & set(words), script.name)
            self.assertIn("The lesson ends here", code)

    def test_every_command_in_the_readme_parses_and_every_file_it_names_exists(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        commands = re.findall(r"^!?(?:torchrun \S+ \d+|python) (\w+\.py.*?)(?:  +#.*)?$", readme,
                              re.MULTILINE)
        self.assertGreater(len(commands), 20)
        helps = {}
        for command in commands:
            script, *words = shlex.split(command, comments=True)
            sub = [w for w in words[:1] if script == "tokenizer.py" and not w.startswith("-")]
            if (script, *sub) not in helps:
                done = subprocess.run([sys.executable, str(ROOT / script), *sub, "--help"],
                                      capture_output=True, text=True, timeout=60)
                self.assertEqual((done.returncode, done.stderr), (0, ""), command)
                helps[(script, *sub)] = done.stdout
            for flag in re.findall(r"--[a-z][a-z0-9-]+", " ".join(words)):
                self.assertIn(flag, helps[(script, *sub)], command)
        for name in re.findall(r"`(\w+\.py)`", readme):
            self.assertTrue((ROOT / name).exists(), name)


if __name__ == "__main__":
    unittest.main()
