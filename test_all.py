"""What this project guarantees, as tests a newcomer can read: python test_all.py

Everything runs offline with tiny models. A test that needs a file in data/ (the book's text,
GPT-2's vocabulary) is skipped with a reason where the file is missing. Each test compares with
something independent of our code: arithmetic written out, tiktoken, the numbers the book prints.
"""

import base64
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import unittest
import zipfile
from collections import Counter
from itertools import islice
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

TINY = {"vocab_size": 257, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2,
        "drop_rate": 0.1, "qkv_bias": False}
TEXT = "The cat sat on the mat; the dog sat on the log. Nobody knows why, and nobody asked.\n" * 30


def needs(*names):
    """Skip a test, with the reason, unless these files are in data/."""
    return unittest.skipUnless(all((ROOT / "data" / name).exists() for name in names),
                               f"needs data/{' and data/'.join(names)}")


def tiny_model(**changes):
    """A small model with random weights, always the same."""
    torch.manual_seed(0)
    return GPTModel({**TINY, **changes}).eval()


def call(main, *argv):
    """Run a script's main as the command line does -> (status, standard output, error text)."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            gpt.run_main(lambda: main([str(a) for a in argv]))
        except SystemExit as e:
            status = e.code
    text = out.buffer.getvalue().decode()
    if isinstance(status, str):  # what Python prints on standard error when it exits
        return 1, text, status
    return status or 0, text, err.getvalue()


class InFolder(unittest.TestCase):
    """A test that runs in an empty folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        Path("text.txt").write_text(TEXT, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# gpt.py: the model

INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],  # the book's
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])  # six words


class TestAttention(unittest.TestCase):
    def assert_prints(self, actual, expected):
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=0)

    def test_the_ladder_gives_the_numbers_the_book_prints(self):
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

    def test_fast_attention_equals_softmax_and_mask_written_out(self):
        torch.manual_seed(0)
        att = gpt.MultiHeadAttention(8, 8, 5, 0.0, num_heads=2, qkv_bias=True)
        x = torch.randn(3, 5, 8)
        q, k, v = att.W_query(x), att.W_key(x), att.W_value(x)
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            scores = q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(4)
            future = torch.arange(5)[None, :] > torch.arange(5)[:, None]
            weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
            heads.append(weights @ v[..., h])
        expected = att.out_proj(torch.cat(heads, dim=-1))
        torch.testing.assert_close(att(x), expected)
        for mask in (None, torch.ones(5, 5, dtype=torch.bool).tril()):
            split = (t.view(3, 5, 2, 4).transpose(1, 2) for t in (q, k, v))
            stepwise = att.attend_in_steps(*split, mask).transpose(1, 2).reshape(3, 5, 8)
            torch.testing.assert_close(att.out_proj(stepwise), expected)

    def test_training_in_bfloat16_attends_as_in_float32_up_to_rounding(self):
        torch.manual_seed(0)
        att, x = gpt.MultiHeadAttention(64, 64, 100, 0.0, num_heads=2), torch.randn(2, 100, 64)
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            att.zero_grad()
            with gpt.autocast("cpu", dtype):
                y = att(x).float()
            y.square().mean().backward()
            results.append(torch.cat([y.flatten(), *(100 * p.grad.flatten() for p in
                                                     att.parameters() if p.grad is not None)]))
        exact, rounded = results
        error = float((exact - rounded).detach().norm() / exact.detach().norm())
        self.assertLess(error, 0.02)
        self.assertGreater(error, 0)

    def test_dropout_drops_its_share_independently_and_keeps_the_mean(self):
        torch.manual_seed(0)
        for p in (0.1, 0.5):
            drop, x = gpt.Dropout(p), torch.ones(401, 1001, requires_grad=True)  # 4 do not fit
            y = drop(x)
            y.sum().backward()
            self.assertEqual({round(v, 4) for v in y.unique().tolist()}, {0, round(1 / (1 - p), 4)})
            dropped = (y == 0).double()
            self.assertAlmostEqual(float(dropped.mean()), p, delta=0.003)
            for neighbour in (1, 2, 3, 4, 1001):     # no pair goes together more than by chance
                both = (dropped.flatten()[neighbour:] * dropped.flatten()[:-neighbour]).mean()
                self.assertAlmostEqual(float(both), p * p, delta=0.003)
            torch.testing.assert_close(x.grad, y.detach())
            self.assertIs(drop.eval()(x), x)
        self.assertEqual(float(gpt.Dropout(1.0)(torch.ones(3)).sum()), 0)

    def test_fast_attention_equals_the_wrapper_with_equal_weights(self):
        wrapper = gpt.MultiHeadAttentionWrapper(6, 2, 5, 0.0, num_heads=3)
        fast = gpt.MultiHeadAttention(6, 6, 5, 0.0, num_heads=3)
        fast.out_proj = torch.nn.Identity()
        for name in ("W_query", "W_key", "W_value"):
            stacked = torch.cat([getattr(head, name).weight for head in wrapper.heads])
            getattr(fast, name).weight.data = stacked
        x = torch.randn(2, 5, 6)
        torch.testing.assert_close(fast(x), wrapper(x))

    def test_causal_attention_rows_sum_to_one_and_never_look_ahead(self):
        att = gpt.CausalAttention(3, 3, 6, dropout=0.0)
        att.W_value.weight.data = torch.zeros(3, 3)
        att.W_value.weight.data[0, 0] = 1.0
        x = torch.ones(1, 6, 3)                       # every value is 1, so a weighted mean is too
        torch.testing.assert_close(att(x)[0, :, 0], torch.ones(6))
        torch.testing.assert_close(att(x[:, :2]), att(x)[:, :2])

    def test_a_width_the_heads_cannot_share_is_refused(self):
        with self.assertRaisesRegex(ValueError, "not divisible"):
            gpt.MultiHeadAttention(8, 8, 5, 0.0, num_heads=3)


class TestModel(unittest.TestCase):
    def test_layer_norm_is_mean_zero_variance_one_then_scale_and_shift(self):
        norm, x = gpt.LayerNorm(5), torch.randn(2, 3, 5)
        norm.scale.data, norm.shift.data = torch.arange(5.0), torch.full((5,), 0.5)
        mean, var = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
        expected = (x - mean) / torch.sqrt(var + 1e-5) * torch.arange(5.0) + 0.5
        torch.testing.assert_close(norm(x), expected)

    def test_gelu_is_the_tanh_form(self):
        x = torch.linspace(-4, 4, 33)
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
            with torch.device("meta"):
                model = GPTModel({**GPT_CONFIG_124M, **gpt.GPT2_SIZES[size], "qkv_bias": True,
                                  "tie_embeddings": True})
            self.assertEqual(sum(p.numel() for p in model.parameters()), count)
        with torch.device("meta"):
            tied = GPTModel({**GPT_CONFIG_124M, "tie_embeddings": True})
        self.assertEqual(sum(p.numel() for p in tied.parameters()), 124_412_160)

    def test_shapes_and_that_no_position_sees_a_later_token(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 16))
        logits = model(idx)
        self.assertEqual(logits.shape, (2, 16, 257))
        changed = idx.clone()
        changed[:, 10:] = (idx[:, 10:] + 1) % 257
        torch.testing.assert_close(model(changed)[:, :10], logits[:, :10])
        self.assertFalse(torch.allclose(model(changed)[:, 10:], logits[:, 10:]))

    def test_a_text_longer_than_the_context_is_a_sentence(self):
        with self.assertRaisesRegex(ValueError, "17 tokens do not fit"):
            tiny_model()(torch.zeros(1, 17, dtype=torch.long))

    def test_weights_of_other_code_for_the_book_load_by_name(self):
        model = tiny_model()
        theirs = {**model.state_dict(), **{f"trf_blocks.{i}.att.mask": torch.ones(16, 16)
                                           for i in range(2)}}
        other = GPTModel(TINY)
        other.load_state_dict(theirs)
        idx = torch.arange(5)[None]
        torch.testing.assert_close(other.eval()(idx), model(idx))

    def test_tied_embeddings_are_one_matrix_also_after_loading(self):
        model = GPTModel({**TINY, "tie_embeddings": True})
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        self.assertIs(model.out_head.weight, model.tok_emb.weight)


class TestGeneration(unittest.TestCase):
    def test_cache_gives_the_plain_loop_s_tokens_also_past_the_context_window(self):
        model, idx = tiny_model(), torch.randint(0, 257, (3, 7))
        for context_size in (16, 8, 100):      # the window slides from token 16, from 8, from 16
            expected = generate_text_simple(model, idx, 20, min(context_size, 16))
            torch.testing.assert_close(generate(model, idx, 20, context_size), expected)
        long = torch.randint(0, 257, (1, 40))  # a prompt longer than the window
        torch.testing.assert_close(generate(model, long, 5, 16),
                                   generate_text_simple(model, long, 5, 16))

    def test_prompts_of_different_lengths_in_a_batch_equal_one_by_one(self):
        model = tiny_model()
        prompts = [torch.randint(0, 257, (n,)) for n in (3, 9, 1, 6)]
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=99)
        lengths = torch.tensor([len(p) for p in prompts])
        together = generate(model, padded, 20, 16, lengths=lengths)[:, 9:]
        for row, prompt in zip(together, prompts):
            alone = generate_text_simple(model, prompt[None], 20, 16)[0, len(prompt):]
            self.assertEqual(row.tolist(), alone.tolist())

    def test_several_tokens_onto_a_filled_cache_see_all_before_and_none_after(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 12))
        cache = gpt.KVCache(model, 2, 16)
        parts = [model.hidden_states(part, cache) for part in idx.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(idx))

    def test_end_of_text_is_per_row(self):
        model, idx = tiny_model(), torch.randint(0, 257, (3, 4))
        free = generate(model, idx, 12, 16)[:, 4:]
        eos = int(free[1, 2])    # the second row ends at its third token, if not before
        rows = generate(model, idx, 12, 16, eos_id=eos)[:, 4:]
        for row, unstopped in zip(rows, free):
            stop = (unstopped == eos).nonzero().flatten().tolist()
            n = stop[0] if stop else len(unstopped)
            self.assertEqual(row[:n].tolist(), unstopped[:n].tolist()[:len(row)])
            self.assertTrue((row[n:] == eos).all())
        alone = generate(model, idx[1:2], 12, 16, eos_id=eos)[0, 4:].tolist()
        self.assertEqual(alone[-1], eos)       # generation ends when all rows have
        self.assertEqual(alone.count(eos), 1)

    def test_dropout_is_off_and_the_mode_is_put_back_also_after_an_early_end(self):
        model, idx = tiny_model(drop_rate=0.5), torch.randint(0, 257, (1, 4))
        expected = generate(model, idx, 8, 16)
        model.train()
        torch.testing.assert_close(generate(model, idx, 8, 16), expected)
        self.assertTrue(model.training)
        stream = gpt.generate_stream(model, idx, 8, 16)
        next(stream)
        self.assertFalse(model.training)
        stream.close()
        self.assertTrue(model.training)

    def test_a_single_row_in_bfloat16_is_multiplied_as_many_rows_are(self):
        torch.manual_seed(0)
        layer, x = gpt.Linear(300, 77).bfloat16(), torch.randn(4, 300).bfloat16()
        with torch.no_grad():
            single = torch.cat([layer(row[None]) for row in x])
            torch.testing.assert_close(single, layer(x), atol=0.01, rtol=0.02)
        self.assertEqual(torch.backends.mkldnn.enabled, torch.backends.mkldnn.is_available())

    def test_the_smallest_temperature_takes_the_likeliest(self):
        logits = torch.tensor([[1.0, 3.0, 2.0]])
        for temperature in (1e-38, 1e-6):
            self.assertEqual(gpt.sample_next(logits, temperature).tolist(), [1])

    def test_sampling_follows_temperature_top_k_and_top_p(self):
        probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
        logits = probs.log().repeat(20_000, 1)
        rng = torch.Generator().manual_seed(0)

        def shares(**options):
            drawn = gpt.sample_next(logits, generator=rng, **options)
            return torch.bincount(drawn, minlength=4) / len(drawn)

        def expect(actual, expected):
            torch.testing.assert_close(actual, torch.tensor(expected), atol=0.015, rtol=0)

        expect(shares(temperature=1.0), [0.5, 0.25, 0.125, 0.125])
        expect(shares(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22])   # squares, normalised
        expect(shares(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0.0, 0.0])
        expect(shares(temperature=1.0, top_k=99), [0.5, 0.25, 0.125, 0.125])
        expect(shares(temperature=1.0, top_p=0.6), [2 / 3, 1 / 3, 0.0, 0.0])
        expect(shares(temperature=1.0, top_p=0.01), [1.0, 0.0, 0.0, 0.0])
        expect(shares(temperature=0.0), [1.0, 0.0, 0.0, 0.0])

    def test_a_seed_repeats_the_text_and_leaves_other_random_numbers_alone(self):
        model, idx = tiny_model(), torch.randint(0, 257, (2, 4))
        before = torch.get_rng_state()
        texts = [generate(model, idx, 10, 16, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        self.assertTrue(torch.equal(texts[0], texts[1]))
        self.assertFalse(torch.equal(texts[0], texts[2]))
        self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_options_out_of_range_and_an_empty_prompt_are_refused(self):
        model, idx = tiny_model(), torch.zeros(1, 2, dtype=torch.long)
        for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}):
            with self.assertRaises(ValueError):
                generate(model, idx, 2, 16, **bad)
        with self.assertRaisesRegex(ValueError, "prompt is empty"):
            generate(model, idx[:, :0], 2, 16)

    def test_characters_of_several_tokens_stream_whole(self):
        tokenizer = gpt.load_tokenizer("bytes")
        pieces = list(gpt.decode_stream(tokenizer.encode("naïve 🙂"), tokenizer))
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

    def test_a_tied_head_is_left_alone(self):
        model = tiny_model(tie_embeddings=True)
        gpt.replace_linear_with_lora(model, rank=2, alpha=2)
        self.assertIsInstance(model.out_head, torch.nn.Linear)
        self.assertIsInstance(model.trf_blocks[0].att.W_query, gpt.LinearWithLoRA)


# ---------------------------------------------------------------------------------------------
# gpt.py: tokenizers, checkpoint, devices, command line

class TestCheckpoint(InFolder):
    def test_model_tokenizer_and_extras_come_back(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}
        tokenizer = tiktoken.Encoding("mine", pat_str=r"\S+|\s+", mergeable_ranks=ranks,
                                      special_tokens={"<|endoftext|>": 258})
        model = tiny_model(vocab_size=259, tie_embeddings=True)
        gpt.save_checkpoint("a/b.pt", model, tokenizer, step=7, names=["x"])
        again, tokenizer2, extras = gpt.load_checkpoint("a/b.pt")
        self.assertEqual((extras["step"], extras["names"], extras["config"]), (7, ["x"], model.cfg))
        text = "the thing <|endoftext|>"
        self.assertEqual(tokenizer2.encode(text, allowed_special="all"),
                         tokenizer.encode(text, allowed_special="all"))
        idx = torch.arange(9)[None]
        self.assertTrue(torch.equal(again.eval()(idx), model(idx)))
        self.assertIs(again.out_head.weight, again.tok_emb.weight)
        self.assertEqual(list(Path("a").iterdir()), [Path("a/b.pt")])    # no temporary file stays

    def test_unfit_files_are_one_sentence_with_the_command_that_makes_a_fit_one(self):
        tokenizer, model = gpt.load_tokenizer("bytes"), tiny_model()
        gpt.save_checkpoint("good.pt", model, tokenizer)
        Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:5000])
        Path("empty.pt").touch()
        torch.save({"weights": torch.ones(3)}, "foreign.pt")
        torch.save({"kind": "language model", "config": {**TINY, "emb_dim": 32},
                    "model": model.state_dict(), "tokenizer": "bytes"}, "shape.pt")
        torch.save({"kind": "language model", "config": {"emb_dim": 3}, "model": {},
                    "tokenizer": "bytes"}, "config.pt")
        gpt.replace_head(model, 2)
        gpt.save_checkpoint("classifier.pt", model, tokenizer, class_names=["ham", "spam"])
        for name, reason in {
                "none.pt": "there is no checkpoint", "cut.pt": "cut short", "empty.pt": "cut short",
                "foreign.pt": "not a checkpoint", "shape.pt": "final_norm.scale should be",
                "config.pt": "does not describe a model", ".": "there is no checkpoint",
                "classifier.pt": "holds a classifier"}.items():
            with self.assertRaisesRegex(UserError, reason) as caught:
                gpt.load_checkpoint(name)
            self.assertIn("python pretrain.py", str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
        with self.assertRaisesRegex(UserError, "python finetune_classifier.py"):
            gpt.load_checkpoint("good.pt", kind="classifier")

    def test_a_checkpoint_cannot_run_code(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, ("owned",)
        torch.save({"kind": Evil()}, "evil.pt")
        with self.assertRaises(UserError):
            gpt.load_checkpoint("evil.pt")
        self.assertFalse(Path("owned").exists())

    def test_a_classifier_comes_back_with_its_head_and_a_tied_embedding_is_kept(self):
        model = tiny_model(tie_embeddings=True)
        embedding = model.tok_emb.weight.clone()
        gpt.replace_head(model, 3)
        gpt.save_checkpoint("c.pt", model, gpt.load_tokenizer("bytes"), class_names=list("abc"))
        again, _, extras = gpt.load_checkpoint("c.pt", kind="classifier")
        self.assertEqual(again(torch.zeros(1, 4, dtype=torch.long)).shape, (1, 4, 3))
        self.assertTrue(torch.equal(again.tok_emb.weight, embedding))
        self.assertEqual(extras["class_names"], ["a", "b", "c"])

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "needs limits on file size (Linux, macOS)")
    def test_a_full_disk_is_a_sentence_and_the_old_file_stays(self):
        import resource
        tokenizer = gpt.load_tokenizer("bytes")
        gpt.save_checkpoint("x.pt", tiny_model(), tokenizer)
        before = Path("x.pt").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with self.assertRaisesRegex(UserError, "x.pt could not be written"):
                gpt.save_checkpoint("x.pt", tiny_model(), tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        self.assertEqual(Path("x.pt").read_bytes(), before)
        self.assertFalse(Path("x.pt.tmp").exists())


class TestTokenizerSpecification(InFolder):
    def test_bytes_round_trips_any_text(self):
        tokenizer = gpt.load_tokenizer("bytes")
        text = "naïve 🙂\n\ttab \x00 <|endoftext|>"
        ids = tokenizer.encode(text, disallowed_special=())
        self.assertEqual(bytes(ids), text.encode())
        self.assertEqual(tokenizer.decode(ids), text)
        self.assertEqual((tokenizer.n_vocab, tokenizer.eot_token), (257, 256))

    @needs("tiktoken")
    def test_gpt2_tokens_are_the_ones_the_walk_shows(self):
        tokenizer = gpt.load_tokenizer("gpt2")
        self.assertEqual(tokenizer.encode("Every effort moves you"), [6109, 3626, 6100, 345])
        self.assertEqual(gpt.tokenizer_spec(tokenizer), "gpt2")

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_tokenizer_needs_only_the_two_published_files(self):
        Path("data").mkdir()
        for name in gpt.GPT2_VOCABULARY:
            Path("data", name).write_bytes((ROOT / "data" / name).read_bytes())
        with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=os.path.join("data", "tiktoken")):
            self.assertEqual(gpt.load_gpt2_tokenizer().n_vocab, 50257)
        self.assertEqual(len(list(Path("data", "tiktoken").iterdir())), 2)

    def test_a_pattern_that_is_not_one_and_a_missing_end_of_text_are_sentences(self):
        spec = gpt.tokenizer_spec(tiktoken.Encoding(
            "x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256}))
        with self.assertRaisesRegex(UserError, "cannot be used"):
            gpt.load_tokenizer({**spec, "pat_str": "(["})
        with self.assertRaisesRegex(UserError, "no <|endoftext|>"):
            gpt.load_tokenizer({**spec, "special_tokens": {}})
        with self.assertRaisesRegex(UserError, "unknown tokenizer 'gpt9'"):
            gpt.load_tokenizer("gpt9")


    def test_special_tokens_other_than_end_of_text_are_plain_text_in_a_prompt(self):
        tokenizer = tiktoken.Encoding(
            "x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256, "<|user|>": 257})
        self.assertEqual(gpt.text_to_token_ids("<|user|><|endoftext|>", tokenizer).tolist(),
                         [[*b"<|user|>", 256]])


class TestTerminal(InFolder):
    def test_text_is_shown_without_what_could_steer_the_terminal(self):
        self.assertEqual(gpt.printable("a\x1b[2Jb\r\n\tc\u202ed\x07"),
                         "a\ufffd[2Jb\n\tc\ufffdd\ufffd")
        for fine in ("10\u00a0km", "\u3000", "\N{MAN}\u200d\N{WOMAN}", "naïve ß 你好"):
            self.assertEqual(gpt.printable(fine), fine)

    def test_the_advice_for_a_wrong_encoding_fits_it(self):
        for encoding, name in (("utf-16", "utf-16"), ("latin1", "latin1")):
            Path("t.txt").write_text("café au lait", encoding=encoding)
            with self.assertRaisesRegex(UserError, f"iconv -f {name} "):
                list(gpt.read_text_pieces("t.txt"))


class TestDevice(unittest.TestCase):
    def test_auto_is_cpu_without_a_gpu_and_unknown_devices_are_a_sentence(self):
        if not torch.cuda.is_available():
            self.assertEqual(gpt.pick_device("auto").type, "cpu")
        for name in ("tpu", "cuda:99", "meta", "gpu"):
            with self.assertRaisesRegex(UserError, "not available here"):
                gpt.pick_device(name)

    def test_auto_dtype_follows_the_stopwatch(self):
        def ticking(*seconds):  # six timed products in float32, then six in bfloat16
            clock, times = 0.0, []
            for s in seconds:
                for _ in range(6):
                    times += [clock, clock + s]
                    clock += s
            return mock.patch.object(gpt.time, "perf_counter", side_effect=times)

        with ticking(2.0, 1.0):
            self.assertIs(gpt.pick_dtype("auto", "cpu"), torch.bfloat16)
        with ticking(1.0, 0.9):        # too close to be "really faster"
            self.assertIs(gpt.pick_dtype("auto", "cpu"), torch.float32)
        self.assertIs(gpt.pick_dtype("float32", "cpu"), torch.float32)

    def test_keeping_freed_memory_is_left_out_where_the_c_library_cannot(self):
        gpt.keep_freed_memory(largest=1 << 20)
        for error in (OSError, TypeError):          # no such library; Windows wants a name
            with mock.patch.object(gpt.ctypes, "CDLL", side_effect=error):
                gpt.keep_freed_memory(largest=1 << 20)
        with mock.patch.object(gpt.ctypes, "CDLL", return_value=object()):   # macOS, musl
            gpt.keep_freed_memory(largest=1 << 20)

    def test_parameters_stay_float32_under_bfloat16(self):
        model = tiny_model()
        with gpt.autocast("cpu", torch.bfloat16):
            loss = model(torch.zeros(1, 4, dtype=torch.long)).float().mean()
        loss.backward()
        self.assertEqual({p.dtype for p in model.parameters()}, {torch.float32})
        self.assertEqual({p.grad.dtype for p in model.parameters() if p.grad is not None},
                         {torch.float32})


class TestGptCommand(InFolder):
    def test_the_walk_shows_the_parameter_count_and_every_shape(self):
        status, out, err = call(gpt.main)
        self.assertEqual((status, err), (0, ""))
        for part in ("124,439,808", "(1, 4, 768)", "(1, 12, 4, 4)", "(1, 4, 50257)"):
            self.assertIn(part, out)

    def test_it_writes_from_a_checkpoint_the_same_text_for_the_same_seed(self):
        gpt.save_checkpoint("m.pt", tiny_model(), gpt.load_tokenizer("bytes"))
        argv = ("--checkpoint", "m.pt", "--prompt", "The", "--max-new-tokens", 20, "--dtype",
                "float32", "--top-k", 1000, "--top-p", 0.9)
        first, again, other = call(gpt.main, *argv), call(gpt.main, *argv), call(
            gpt.main, *argv, "--seed", 5)
        self.assertEqual(first[0], 0)
        self.assertTrue(first[1].startswith("The"))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)
        status, out, _ = call(gpt.main, "--checkpoint", "m.pt", "--prompt", "The", "--dtype",
                              "float32", "--max-new-tokens", 5, "--temperature", 0)
        tokenizer = gpt.load_tokenizer("bytes")
        idx = generate_text_simple(tiny_model(), gpt.text_to_token_ids("The", tokenizer), 5, 16)
        self.assertEqual(out, gpt.printable(tokenizer.decode(idx[0].tolist())) + "\n")

    def test_wrong_usage_is_status_2_and_one_sentence(self):
        for bad in (("--temperature", "-1"), ("--temperature", "nan"), ("--top-k", 0),
                    ("--top-p", 2), ("--max-new-tokens", "x"), ("--nonsense",)):
            status, out, err = call(gpt.main, *bad)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), bad)
        status, _, err = call(gpt.main, "--prompt", "x")
        self.assertEqual(status, 1)
        self.assertIn("python pretrain.py", err)


# ---------------------------------------------------------------------------------------------
# pretrain.py

SMALL_RUN = ("--data", "text.txt", "--tokenizer", "bytes", "--context-length", 16, "--emb-dim", 16,
             "--n-layers", 1, "--n-heads", 2, "--dtype", "float32", "--out", "run.pt")


def weights(path):
    """All parameters of a checkpoint in one row."""
    model = gpt.load_checkpoint(path)[0]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestBookLoop(unittest.TestCase):
    def setUp(self):
        self.tokenizer = gpt.load_tokenizer("bytes")

    def test_rows_are_windows_and_targets_are_moved_by_one(self):
        data = pretrain.GPTDatasetV1("abcdefgh", self.tokenizer, max_length=3, stride=2)
        rows = [(bytes(x.tolist()), bytes(y.tolist())) for x, y in data]
        self.assertEqual(rows, [(b"abc", b"bcd"), (b"cde", b"def"), (b"efg", b"fgh")])
        with self.assertRaisesRegex(ValueError, "at least 9"):
            pretrain.GPTDatasetV1("abcdefgh", self.tokenizer, max_length=8, stride=8)

    @needs("tiktoken", "the-verdict.txt")
    def test_the_book_s_first_batch(self):
        text = (ROOT / "data" / "the-verdict.txt").read_text(encoding="utf-8")
        loader = pretrain.create_dataloader_v1(text, batch_size=8, max_length=4, stride=4,
                                               shuffle=False)
        inputs, targets = next(iter(loader))
        self.assertEqual(inputs[:2].tolist(), [[40, 367, 2885, 1464], [1807, 3619, 402, 271]])
        self.assertEqual(targets[:2].tolist(), [[367, 2885, 1464, 1807], [3619, 402, 271, 10899]])

    def test_loss_is_the_mean_of_minus_log_probability(self):
        model = tiny_model()
        x, y = torch.randint(0, 257, (2, 2, 5))
        probs = torch.softmax(model(x), dim=-1)
        expected = -torch.stack([probs[b, t, y[b, t]].log() for b in range(2) for t in range(5)])
        loss = pretrain.calc_loss_batch(x, y, model, "cpu")
        torch.testing.assert_close(loss, expected.mean())
        loader = [(x, y), (y, x)]
        other = pretrain.calc_loss_batch(y, x, model, "cpu").item()
        self.assertAlmostEqual(pretrain.calc_loss_loader(loader, model, "cpu"),
                               (loss.item() + other) / 2, places=5)
        self.assertAlmostEqual(pretrain.calc_loss_loader(loader, model, "cpu", num_batches=1),
                               loss.item(), places=5)
        self.assertTrue(math.isnan(pretrain.calc_loss_loader([], model, "cpu")))

    def test_the_simple_loop_learns_and_reports_every_evaluation(self):
        data = pretrain.GPTDatasetV1(TEXT, self.tokenizer, max_length=16, stride=16)
        loader = torch.utils.data.DataLoader(data, batch_size=8, drop_last=True)
        model = tiny_model(drop_rate=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train, val, seen = pretrain.train_model_simple(
                model, loader, loader, optimizer, "cpu", num_epochs=2, eval_freq=10, eval_iter=2,
                start_context="The", tokenizer=self.tokenizer)
        self.assertLess(train[-1], train[0] - 1)
        self.assertEqual(seen, [(10 * i + 1) * 8 * 16 for i in range(len(seen))])
        self.assertIn("Ep 1 (Step 000000)", out.getvalue())


class TestTokensOnDisk(InFolder):
    def tokens(self, **changes):
        name, documents, stamp = pretrain.find_documents("quick", [Path("text.txt")])
        return pretrain.tokens_on_disk(documents, stamp, gpt.load_tokenizer("bytes"))

    def test_every_token_but_the_first_is_a_target_once_an_epoch(self):
        for length in (33, 34, 48, 49, 50):
            rows = pretrain.TokenRows(np.arange(length, dtype=np.uint16), T=16)
            x, y = rows.batch(range(rows.num_rows))
            self.assertEqual(sorted(y[y != -100].tolist()), list(range(1, length)))
            self.assertTrue(((x + 1 == y) | (y == -100)).all())
            for part in ([0], [rows.num_rows - 1], range(rows.num_rows)):
                self.assertEqual(rows.count_targets(np.array(part)),
                                 int((rows.batch(part)[1] != -100).sum()))

    def test_each_epoch_reads_every_row_once_in_a_new_order(self):
        settings = {"batch_size": 2, "grad_accum": 2, "seed": 1}
        epochs = [np.concatenate([pretrain.rows_of_step(e * 3 + k, 11, settings)
                                  for k in range(3)]) for e in range(2)]
        self.assertEqual([sorted(e) for e in epochs], [list(range(11))] * 2)
        self.assertNotEqual(list(epochs[0]), list(epochs[1]))

    def test_validation_is_the_last_part_and_shares_no_token(self):
        train, val = pretrain.split_tokens(np.arange(1000), T=16, val_share=0.1, name="x")
        self.assertEqual((train.tokens[-1], val.tokens[0], val.tokens[-1]), (899, 900, 999))
        with self.assertRaisesRegex(UserError, "100 tokens, but at least 171 are needed"):
            pretrain.split_tokens(np.arange(100), T=16, val_share=0.1, name="x")
        pretrain.split_tokens(np.arange(171), T=16, val_share=0.1, name="x")

    def test_documents_of_a_folder_are_joined_with_end_of_text_in_sorted_order(self):
        Path("d/sub").mkdir(parents=True)
        for name, text in (("b.txt", "second"), ("empty.txt", ""), ("a.txt", "first"),
                           ("sub/c.txt", "third"),
                           (".hidden", "no")):
            Path("d", name).write_text(text, encoding="utf-8")
        _, documents, stamp = pretrain.find_documents("quick", [Path("d")])
        tokenizer = gpt.load_tokenizer("bytes")
        tokens = pretrain.tokens_on_disk(documents, stamp, tokenizer)
        self.assertEqual(tokenizer.decode(tokens.tolist()),
                         "first<|endoftext|>second<|endoftext|>third<|endoftext|>")
        self.assertEqual(tokens.dtype, np.uint16)

    def test_the_file_is_made_once_and_anew_when_the_text_changes(self):
        self.tokens()
        [path] = Path("data").iterdir()
        made = path.stat().st_mtime_ns
        self.tokens()
        self.assertEqual(path.stat().st_mtime_ns, made)
        Path("text.txt").write_text("another text", encoding="utf-8")
        self.assertEqual(bytes(self.tokens()[:-1].tolist()), b"another text")

    def test_a_vocabulary_above_65536_takes_32_bits(self):
        tokenizer = tiktoken.Encoding(
            "big", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 70_000})
        tokens = pretrain.tokens_on_disk([["ab"]], "x", tokenizer)
        self.assertEqual((tokens.tolist(), tokens.dtype), ([97, 98, 70_000], np.uint32))

    def test_memory_does_not_grow_with_the_text(self):
        import tracemalloc
        peaks = []
        for repeats in (20, 200):  # 0.5 MB and 5 MB of text
            Path("text.txt").write_text(TEXT * 10 * repeats, encoding="utf-8")
            _, documents, stamp = pretrain.find_documents("quick", [Path("text.txt")])
            small = [gpt.read_text_pieces("text.txt", size=100_000)]
            tracemalloc.start()
            tokens = pretrain.tokens_on_disk(small, stamp, gpt.load_tokenizer("bytes"))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            self.assertEqual(len(tokens), len(TEXT) * 10 * repeats + 1)
        self.assertLess(peaks[1], peaks[0] + 500_000)


    @unittest.skipUnless(Path("/proc/self/status").exists(), "reads Linux's account of memory")
    def test_reading_every_row_does_not_keep_the_file_in_memory(self):
        def mapped():  # megabytes of files that the process holds
            status = Path("/proc/self/status").read_text(encoding="ascii")
            return int(re.search(r"RssFile:\s+(\d+)", status)[1]) / 1000

        np.arange(20_000_000, dtype=np.uint16).tofile("tokens.bin")  # 40 MB
        rows = pretrain.TokenRows(np.memmap("tokens.bin", np.uint16, mode="r")[:-5], T=1000)
        before = mapped()
        for row in range(rows.num_rows - 1):
            x, _ = rows.batch([row])
            self.assertEqual(int(x[0, 0]), row * 1000 % 65536)
        first = rows.fingerprint()
        self.assertLess(mapped(), before + 8)
        self.assertEqual(first, pretrain.TokenRows(np.array(rows.tokens), T=1000).fingerprint())
        self.assertNotEqual(first, pretrain.TokenRows(rows.tokens[1:], T=1000).fingerprint())


class TestTrainingSteps(unittest.TestCase):
    def test_unequal_small_batches_give_the_gradient_of_one_large_one(self):
        rows = pretrain.TokenRows(np.random.default_rng(0).integers(0, 257, 70), T=16)
        gradients, losses = [], []
        for batch_size in (5, 2):      # 5 rows at once; or 2, 2 and the last, with 5 targets
            model = tiny_model(drop_rate=0.0)
            losses.append(pretrain.accumulate_gradients(
                model, rows, np.arange(5), {"batch_size": batch_size, "dtype": torch.float32},
                torch.device("cpu")))
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)
        x, y = rows.batch(range(5))
        expected = F.cross_entropy(tiny_model(drop_rate=0.0)(x)[y != -100], y[y != -100])
        self.assertAlmostEqual(losses[0], expected.item(), places=5)
        self.assertAlmostEqual(losses[1], expected.item(), places=5)

    def test_learning_rate_rises_then_falls_as_half_a_cosine(self):
        s = {"warmup_steps": 4, "total_steps": 14, "final_lr_share": 0.1}
        self.assertEqual([pretrain.lr_factor(i, s) for i in range(4)], [0.25, 0.5, 0.75, 1.0])
        self.assertAlmostEqual(pretrain.lr_factor(9, s), 0.55)           # half-way
        self.assertAlmostEqual(pretrain.lr_factor(14, s), 0.1)
        flat = {"warmup_steps": 0, "total_steps": 14, "final_lr_share": 1.0}
        self.assertEqual({pretrain.lr_factor(i, flat) for i in range(14)}, {1.0})

    def test_only_matrices_decay_and_every_parameter_has_one_optimizer(self):
        for optimizer in ("adamw", "muon"):
            model = tiny_model(tie_embeddings=True)
            settings = {"optimizer": optimizer, "lr": 1.0, "weight_decay": 0.1,
                        "dtype": torch.float32}
            groups = [g for o in pretrain.make_optimizers(model, settings) for g in o.param_groups]
            held = [p for g in groups for p in g["params"]]
            self.assertEqual({id(p) for p in held}, {id(p) for p in model.parameters()})
            self.assertEqual(len(held), len(list(model.parameters())))
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
        model = tiny_model(emb_dim=64, n_layers=8, drop_rate=0.0)
        pretrain.init_gpt2_weights(model)
        block = model.trf_blocks[0]
        self.assertAlmostEqual(block.ff.layers[0].weight.std().item(), 0.02, delta=0.001)
        self.assertAlmostEqual(block.ff.layers[2].weight.std().item(), 0.005, delta=0.0004)
        self.assertAlmostEqual(block.att.out_proj.weight.std().item(), 0.005, delta=0.0004)

    def test_bits_per_byte_divides_by_bytes_not_tokens(self):
        ranks = {**{bytes([i]): i for i in range(256)}, b"the ": 256}
        tokenizer = tiktoken.Encoding("t", pat_str=r"the |.", mergeable_ranks=ranks,
                                      special_tokens={"<|endoftext|>": 257})
        tokens = np.array([97, *[256] * 6, 257, *[98] * 9])       # targets: 24 + 0 + 9 bytes
        rows = pretrain.TokenRows(tokens, T=16)
        model = tiny_model(vocab_size=258)
        model.out_head.weight.data.zero_()                        # every token equally likely
        nats, bits = pretrain.evaluate_rows(
            model, rows, pretrain.bytes_per_token(tokenizer),
            {"batch_size": 2, "eval_batches": 9, "dtype": torch.float32}, torch.device("cpu"))
        self.assertAlmostEqual(nats, math.log(258), places=5)
        self.assertAlmostEqual(bits, 16 * math.log2(258) / 33, places=5)


class TestPretrainCommand(InFolder):
    def test_it_trains_saves_and_the_checkpoint_writes(self):
        status, out, err = call(pretrain.main, *SMALL_RUN, "--max-steps", 30, "--eval-every", 10)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("bits/byte", out)
        rows = Path("run.csv").read_text(encoding="utf-8").splitlines()
        self.assertEqual(rows[0], "step,tokens,train_loss,val_loss,bits_per_byte")
        self.assertEqual([r.split(",")[0] for r in rows[1:]], ["10", "20", "30"])
        losses = [float(r.split(",")[3]) for r in rows[1:]]
        self.assertLess(losses[-1], losses[0])
        self.assertTrue(Path("run-best.pt").exists())
        status, out, _ = call(gpt.main, "--checkpoint", "run.pt", "--prompt", "The")
        self.assertEqual(status, 0)

    def test_metrics_and_plot_never_take_the_checkpoint_s_name(self):
        for name in ("run.csv", "run.png", "lr0.01"):
            status, _, err = call(pretrain.main, *SMALL_RUN, "--max-steps", 1, "--out", name)
            self.assertEqual((status, err), (0, ""))
            gpt.load_checkpoint(name)
            self.assertTrue(Path(name + ".csv").read_text(encoding="utf-8").startswith("step,"))

    def test_started_from_a_checkpoint_it_keeps_model_and_tokenizer(self):
        call(pretrain.main, *SMALL_RUN, "--max-steps", 1)
        status, out, _ = call(pretrain.main, "--init", "run.pt", "--data", "text.txt",
                              "--max-steps", 2, "--out", "next.pt")
        self.assertEqual(status, 0)
        self.assertEqual(gpt.load_checkpoint("next.pt")[2]["config"],
                         gpt.load_checkpoint("run.pt")[2]["config"])

    def test_what_torch_compile_traced_trains_and_writes_the_same(self):
        run = (*SMALL_RUN, "--max-steps", 3, "--dtype", "float32")
        ask = ("--checkpoint", "run.pt", "--prompt", "The", "--max-new-tokens", 12,  # slides
               "--dtype", "float32")
        call(pretrain.main, *run)
        expected, (_, text, _) = weights("run.pt"), call(gpt.main, *ask)
        compiled = functools.partial(torch.compile, backend="eager")  # needs no C++ compiler
        with mock.patch.object(torch, "compile", compiled):
            status, out, err = call(pretrain.main, *run, "--compile", "--out", "compiled.pt")
            self.assertEqual((status, err), (0, ""))
            self.assertIn("torch.compile and the first step took", out)
            torch.testing.assert_close(weights("compiled.pt"), expected)
            status, out, err = call(gpt.main, *ask, "--compile")
        self.assertEqual((status, out), (0, text))
        self.assertIn("torch.compile took", err)

    def test_the_quick_preset_needs_no_file_and_no_network(self):
        with mock.patch("requests.get", side_effect=AssertionError("network used")):
            status, out, _ = call(pretrain.main, "--max-steps", 1, "--n-layers", 1,
                                  "--eval-batches", 1, "--emb-dim", 12, "--n-heads", 1)
        self.assertEqual(status, 0)
        self.assertIn("Python's reference manual", out)
        self.assertTrue(Path("checkpoints/pretrained.pt").exists())

    def test_the_verdict_preset_is_the_book_s(self):
        preset = pretrain.PRESETS["verdict"]
        self.assertEqual(preset["config"], {**GPT_CONFIG_124M, "context_length": 256})
        self.assertEqual([preset[k] for k in ("batch_size", "lr", "weight_decay", "epochs",
                                              "warmup_steps", "final_lr_share",
                                              "clip")],
                         [2, 4e-4, 0.1, 10, 0, 1.0, None])

    def test_an_interrupted_run_resumed_ends_with_the_same_weights(self):
        run = (*SMALL_RUN, "--max-steps", 12, "--eval-every", 4)
        model = {**TINY, "drop_rate": 0.2}                     # so that random numbers matter
        with mock.patch.dict(pretrain.PRESETS["quick"], config=model):
            call(pretrain.main, *run)
            expected, log = weights("run.pt"), Path("run.csv").read_text(encoding="utf-8")
            for stop_at in (1, 4, 7, 11):
                for file in Path(".").glob("run*"):
                    file.unlink()
                steps, real = [], pretrain.accumulate_gradients

                def interrupted(*args):                        # as if Ctrl-C came in this step
                    steps.append(1)
                    if len(steps) == stop_at:
                        os.kill(os.getpid(), signal.SIGINT)
                    return real(*args)

                with mock.patch.object(pretrain, "accumulate_gradients", interrupted):
                    status, out, _ = call(pretrain.main, *run)
                self.assertEqual(status, 130)
                self.assertIn(f"step {stop_at} is saved", out)
                self.assertEqual(call(pretrain.main, *run, "--resume")[0], 0)
                self.assertTrue(torch.equal(weights("run.pt"), expected), stop_at)
                self.assertEqual(Path("run.csv").read_text(encoding="utf-8"), log)

    def test_a_killed_run_resumed_ends_with_the_same_weights(self):
        run = (*SMALL_RUN, "--max-steps", 300, "--eval-every", 10)
        command = [sys.executable, str(ROOT / "pretrain.py"), *map(str, run), "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not Path("run.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()                                          # SIGKILL: no chance to clean up
        process.wait()
        self.assertLess(gpt.load_checkpoint("run.pt")[2]["step"], 300)
        self.assertEqual(call(pretrain.main, *run, "--resume")[0], 0)
        resumed = weights("run.pt")
        call(pretrain.main, *run)
        self.assertTrue(torch.equal(resumed, weights("run.pt")))

    def test_resuming_another_run_is_refused_and_changes_nothing(self):
        call(pretrain.main, *SMALL_RUN, "--max-steps", 2)
        before = Path("run.pt").read_bytes()
        for flags, word in ((("--max-steps", 2, "--batch-size", 3), "--batch-size"),
                            (("--max-steps", 2, "--seed", 9), "--seed"),
                            (("--max-steps", 5), "--max-steps"),
                            (("--max-steps", 2, "--emb-dim", 32), "emb_dim 16")):
            status, _, err = call(pretrain.main, *SMALL_RUN, *flags, "--resume")
            self.assertEqual(status, 1)
            self.assertIn(word, err)
        self.assertEqual(Path("run.pt").read_bytes(), before)

    def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(self):
        calls, real = [], pretrain.accumulate_gradients

        def diverging(*args):
            calls.append(1)
            return math.nan if len(calls) == 6 else real(*args)

        with mock.patch.object(pretrain, "accumulate_gradients", diverging):
            status, _, err = call(pretrain.main, *SMALL_RUN, "--max-steps", 9, "--eval-every", 5)
        self.assertEqual(status, 1)
        self.assertIn("the loss is nan at step 6", err)
        self.assertEqual(gpt.load_checkpoint("run.pt")[2]["step"], 5)
        self.assertTrue(torch.isfinite(weights("run.pt")).all())

    def test_two_processes_give_the_losses_of_one_and_resume_in_either(self):
        run = [*map(str, SMALL_RUN), "--grad-accum", "2", "--batch-size", "3", "--max-steps"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--standalone", str(ROOT / "pretrain.py")]
        done = subprocess.run([*torchrun, *run, "6", "--eval-every", "2"], capture_output=True,
                              text=True, timeout=100)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        together = Path("run.csv").read_text(encoding="utf-8").splitlines()
        self.assertEqual(done.stdout.count("step     6"), 1)      # one process prints
        call(pretrain.main, *run, "6", "--eval-every", "2")
        alone = Path("run.csv").read_text(encoding="utf-8").splitlines()
        self.assertEqual(len(alone), 4)
        for a, b in zip(together[1:], alone[1:]):
            np.testing.assert_allclose([float(v) for v in a.split(",")],
                                       [float(v) for v in b.split(",")], atol=1e-4)

    def test_bad_input_is_one_sentence_and_nothing_is_written(self):
        Path("empty.txt").touch()
        Path("short.txt").write_text("too short", encoding="utf-8")
        Path("latin.txt").write_bytes("café".encode("latin-1") * 100)
        Path("binary.txt").write_bytes(b"a\0b" * 100)
        Path("folder").mkdir()
        Path("cut.pt").write_bytes(b"PK\3\4 not much")
        cases = {
            ("--data", "none.txt"): "none.txt is not there", ("--data", "empty.txt"): "is empty",
            ("--data", "short.txt"): "10 tokens, but at least 2,571",
            ("--data", "folder"): "no text",
            ("--data", "latin.txt"): "not UTF-8 text", ("--data", "binary.txt"): "not a text file",
            ("--tokenizer", "gpt9"): "unknown tokenizer", ("--device", "tpu"): "not available",
            ("--tokenizer", "none.tiktoken"): "none.tiktoken is not there",
            ("--out", "folder"): "cannot write folder", ("--n-heads", 5): "cannot be shared out",
            ("--out", "text.txt/x.pt"): "cannot write", ("--init", "none.pt"): "no checkpoint",
            ("--init", "cut.pt"): "cut short", ("--out", "cut.pt", "--resume"): "cut short",
            ("--preset", "gpt2"): "--data FILE-OR-FOLDER"}
        for flags, reason in cases.items():
            status, out, err = call(pretrain.main, *flags)
            self.assertEqual((status, out), (1, ""), flags)
            self.assertIn(reason, err)
            self.assertEqual(err.strip().count("\n"), 0, err)
        for flags in (("--batch-size", 0), ("--max-steps", -1), ("--lr", "nan"), ("--lr", 0),
                      ("--epochs", "x"), ("--preset", "none"), ("--val-share", 1.5),
                      ("--dtype", "x"), ("--init", "a.pt", "--tokenizer", "bytes"), ("--lr", "inf"),
                      ("--eval-every", 0)):
            status, out, err = call(pretrain.main, *flags)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), (flags, err))
        self.assertFalse(Path("checkpoints/pretrained.pt").exists())

    def test_without_a_network_the_error_says_where_to_put_the_file(self):
        import requests
        with mock.patch("requests.get", side_effect=requests.exceptions.ConnectionError):
            status, _, err = call(pretrain.main, "--preset", "verdict")
        self.assertEqual(status, 1)
        self.assertIn(os.path.join("data", "the-verdict.txt"), err)
        self.assertIn("https://raw.githubusercontent.com", err)


# ---------------------------------------------------------------------------------------------
# tokenizer.py: words and byte pairs

HOSTILE = [
    "", " ", "  ", "\n", " \n\n \t x  ", "a\r\nb\rc\x0bd\x0ce",
    "\x00\x01\x1b[31m\x1c\x1d\x1e\x1f\x7f\x85",
    "a\x1cb !\x1c x", "tab\tand\u00a0nbsp\u2003em\u2028ls\u2029ps\u3000wide\u200bzero\ufeffbom",
    "".join(map(chr, [9, 10, 11, 12, 13, 32, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028,
                      0x2029, 0x202f, 0x205f, 0x3000])), "x" + " " * 1000 + "y", "\n" * 300,
    "e\u0301 n\u0303 \u0301\u0301\u0301 Z\u0351\u036b\u0343a\u0321\u034al\u0310",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f",
    "0123 \u0660\u0661\u0662 \u0967\u0968 \uff11\uff12 \u00bd\u00b2 \u2167 \U0001d7d8 3.14 1,000",
    "I'm you're he's we've I'd they'll can't 'tis I'M YOU'RE HE'S WE'VE I'D THEY'LL CAN'T",
    "it's' 's's ''s 'll'l 'v've o'clock rock'n'roll \u2019s it\u2019s",
    "<|endoftext|>", "<|unk|> <|endoftext|",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d\u4e16\u754c "
    "\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\uffff\U0010ffff\ufdd0 \ue000",
    "--- ... !!! ?!?! ((())) $$$ a_b_c C++ x==y //",
    "i\u0307 \u0130 \u01c5 \ufb01 \u00df \u1e9e",
]


def fuzz(seed, strings, length):
    """Strings with a fixed seed, of words, marks, white space and characters from everywhere."""
    r = random.Random(seed)
    parts = ["the", " quick", "'s", "'LL", "'", " ", "  ", "\n", "\t", "\u00a0", "\u3000", "1",
             "٣", "\u0301", "\u200d", "👍", "é", "ß", "<|endoftext|>", "_",
             "--", "中文", "\x1c", "\x85"]
    return ["".join(r.choice(parts) if r.random() < 0.8 else
                    chr(r.choice([r.randrange(0xd800), r.randrange(0xe000, 0x110000)]))
                    for _ in range(r.randrange(length))) for _ in range(strings)]


class TestWords(unittest.TestCase):

    @needs("the-verdict.txt")
    def test_ids_are_the_books(self):
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

    def test_unknown_word_and_id(self):
        v1 = tok.SimpleTokenizerV1(tok.build_vocab("a cat, a dog."))
        self.assertEqual(v1.decode(v1.encode("a dog , a cat .")), "a dog, a cat.")
        with self.assertRaisesRegex(KeyError, "mouse"):
            v1.encode("a mouse")
        with self.assertRaisesRegex(ValueError, "99"):
            v1.decode([99])


class TestBPETraining(unittest.TestCase):

    def test_wikipedias_example(self):
        # aaabdaaabac -> ZabdZabac (Z = aa) -> ZYdZYac (Y = ab) -> XdXac (X = ZY)
        ids, pairs = list(b"aaabdaaabac"), []
        for new_id in (256, 257, 258):
            pair, count, ids = tok.merge_once(ids, new_id)
            pairs.append((pair, count))
        self.assertEqual(pairs, [((97, 97), 4), ((97, 98), 2), ((256, 257), 2)])
        self.assertEqual(ids, [258, 100, 258, 97, 99])
        self.assertEqual(list(islice(tok.learn_merges({b"aaabdaaabac": 1}), 3)),
                         [(b"a", b"a", 4), (b"a", b"b", 2), (b"aa", b"ab", 2)])
        t = tok.BPETokenizer()
        t.train("aaabdaaabac", 260)
        self.assertEqual(t.encode("aaabdaaabac"), [258, 100, 258, 97, 99])

    def test_fast_trainer_does_what_the_definition_says(self):
        r = random.Random(0)
        for _ in range(200):
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
                for token in row:  # `done` marks a token that came out of this merge
                    if merged and (merged[-1], token) == ((pair[0], False), pair[1]):
                        merged[-1] = (joined, True)
                    else:
                        merged.append((token, False))
                rows[k] = ([token for token, _ in merged], n)

    def test_str_pieces_and_tokens_do_not_differ(self):
        text = "the cat sat on the mat; the cat ate the rat. " * 20  # 45 characters
        whole, pieces = tok.BPETokenizer(), tok.BPETokenizer()
        whole.train(text, 270)
        pieces.train((text[i:i + 45] for i in range(0, len(text), 45)), 270)
        self.assertEqual(whole.ranks, pieces.ranks)
        self.assertEqual((whole.n_vocab, whole.special_tokens), (270, {"<|endoftext|>": 269}))

    def test_special_tokens_are_not_learned_as_text(self):
        t = tok.BPETokenizer()
        t.train("<|endoftext|>ab ab<|endoftext|>ab ab" * 9, 259, ["<|endoftext|>", "<|x|>"])
        self.assertEqual(list(t.ranks)[256:], [b"ab"])
        self.assertEqual(t.special_tokens, {"<|endoftext|>": 257, "<|x|>": 258})
        self.assertEqual(t.encode("<|x|>ab", allowed_special="all"), [258, 256])

    def test_too_small_a_vocabulary_or_text(self):
        t = tok.BPETokenizer()
        with self.assertRaisesRegex(gpt.UserError, "at least 257"):
            t.train("text", 256)
        t.train("text", 257)
        self.assertEqual(t.encode("te"), [116, 101])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            t.train("aaaa", 5000)  # aa, aaaa
        self.assertIn("there were 2,", err.getvalue())
        self.assertEqual((t.n_vocab, t.encode("aaaa")), (259, [257]))
        for bad in ("<|endoftext|>", ["a", "a"], [""]):
            with self.assertRaises(gpt.UserError):
                t.train("text", 300, special_tokens=bad)

    def test_one_huge_chunk_takes_linear_time(self):
        r = random.Random(0)

        def seconds(chunk):
            t, start = tok.BPETokenizer(), time.process_time()
            t.train(chunk, 1000)
            self.assertEqual(t.decode(t.encode(chunk)), chunk)
            return time.process_time() - start

        with contextlib.redirect_stderr(io.StringIO()):
            for make in (lambda n: "a" * n, lambda n: "".join(r.choices("abcdefgh", k=n))):
                seconds(make(1000))
                # 8 times the length: 8 times the time if linear, 64 if quadratic
                self.assertLess(seconds(make(160_000)), 25 * seconds(make(20_000)))


class TestBPETokenizer(unittest.TestCase):

    def setUp(self):
        self.dir = Path(self.enterContext(tempfile.TemporaryDirectory()))

    @classmethod
    def setUpClass(cls):
        os.chdir(ROOT)
        if (ROOT / "data/vocab.bpe").exists() and (ROOT / "data/encoder.json").exists():
            cls.ours, cls.theirs = tok.BPETokenizer.from_gpt2(), gpt.load_tokenizer("gpt2")

    def same(self, text):
        ids = self.ours.encode(text)
        if ids != self.theirs.encode_ordinary(text) or self.ours.decode(ids) != text:
            self.fail(f"not as tiktoken, or no round trip: {text[:200]!r}")

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_is_tiktokens_on_hostile_strings(self):
        self.assertEqual(self.ours.n_vocab, self.theirs.n_vocab)
        for text in HOSTILE + fuzz(seed=1, strings=2000, length=60):
            self.same(text)

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_is_tiktokens_on_long_runs(self):
        r = random.Random(2)
        for text in ("a" * 50_000, " " * 50_000, "\n" * 50_000 + "x", "!" * 50_000, "7" * 50_000,
                     "é" * 25_000, "👍" * 12_500, "".join(r.choices("abcdefghij", k=50_000))):
            self.same(text)

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_is_tiktokens_on_every_assigned_code_point(self):
        for block in range(0, 0x110000, 256):  # beside each kind of character
            self.same("".join(f"a{c}1 {c}{c} {c}'s " for c in map(chr, range(block, block + 256))
                              if unicodedata.category(c) not in ("Cn", "Cs")))

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_is_tiktokens_on_special_tokens(self):
        text = "a<|endoftext|> b<|endoftext|><|endoftext|>"
        for allowed in (set(), {"<|endoftext|>"}, "all"):
            self.assertEqual(self.ours.encode(text, allowed_special=allowed), self.theirs.encode(
                text, allowed_special=allowed, disallowed_special=()))

    @needs("vocab.bpe", "encoder.json")
    def test_gpt2_decodes_any_ids_as_tiktoken_does(self):
        r = random.Random(3)
        for _ in range(200):
            ids = [r.randrange(50257) for _ in range(20)]
            self.assertEqual(self.ours.decode(ids), self.theirs.decode(ids))

    def test_any_text_round_trips_in_a_trained_vocabulary_that_tiktoken_reads(self):
        t = tok.BPETokenizer()
        texts = HOSTILE + fuzz(seed=4, strings=300, length=60)
        t.train(texts[::2], 600, ["<|endoftext|>", "<|user|>"])
        t.save(self.dir / "a.tiktoken")
        again = tok.BPETokenizer.load(self.dir / "a.tiktoken")
        theirs = gpt.load_tokenizer(str(self.dir / "a.tiktoken"))
        ranks = tiktoken.load.load_tiktoken_bpe(str(self.dir / "a.tiktoken"))
        self.assertEqual((ranks, theirs.n_vocab), (t.ranks, 600))
        for text in texts + ["a<|user|>b<|endoftext|>"]:
            ids = t.encode(text, allowed_special="all")
            self.assertEqual(ids, again.encode(text, allowed_special="all"))
            self.assertEqual(ids, theirs.encode(text, allowed_special="all"))
            self.assertEqual(t.decode(ids), text)

    def test_training_twice_gives_the_same_files(self):
        text = " ".join(fuzz(seed=5, strings=100, length=60))
        for name in "ab":
            t = tok.BPETokenizer()
            t.train(text, 500)
            t.save(self.dir / "new" / name)
        for end in ("", ".json"):
            self.assertEqual((self.dir / f"new/a{end}").read_bytes(),
                             (self.dir / f"new/b{end}").read_bytes())
        self.assertEqual(sorted(os.listdir(self.dir / "new")), ["a", "a.json", "b", "b.json"])

    def test_forgetting_the_cache_changes_nothing(self):
        t = tok.BPETokenizer()
        texts = fuzz(seed=6, strings=100, length=60)
        expected = [t.encode(text) for text in texts]
        t._cache.clear()
        with mock.patch.object(tok.BPETokenizer, "CACHE_CHUNKS", 3):
            self.assertEqual([t.encode(text) for text in texts], expected)
            self.assertLessEqual(len(t._cache), 3)

    def test_what_has_no_tokens_is_an_error_that_says_so(self):
        t = tok.BPETokenizer()
        for text in (5, None, b"bytes", ["a"]):
            with self.assertRaisesRegex(TypeError, f"not {type(text).__name__}"):
                t.encode(text)
        for use in (t.encode, lambda text: t.train(text, 300)):
            with self.assertRaisesRegex(ValueError, "lone surrogate, U[+]D83D at position 2"):
                use("ab\ud83d")
        for bad in (257, -1, 10**20):
            with self.assertRaisesRegex(ValueError, f"token id {bad} .* 0 to 256"):
                t.decode([65, bad])
        self.assertEqual(t.decode([0xe2, 0x82]), "\ufffd")
        self.assertEqual(t.decode([]), "")

    def test_broken_files_are_one_sentence(self):
        t, path = tok.BPETokenizer(), self.dir / "x.tiktoken"
        t.train("aaaa bbbb", 262)
        t.save(path)
        good = path.read_text(encoding="ascii").split("\n")
        extra = base64.b64encode(b"zz").decode()
        for broken in ("", "\n".join(good[:-2] + ["!!!! 260"]),
                       "\n".join(good[:-1] + [extra + " 999"]),
                       "\n".join(good[:-1] + [good[-2]]), "\n".join(good[1:]), "é",
                       good[0] + " 1"):
            path.write_text(broken, encoding="utf-8")
            with self.assertRaises(gpt.UserError):
                tok.BPETokenizer.load(path)
        path.write_text("\n".join(good), encoding="ascii")
        for sidecar in ("{", "[]", '{"special_tokens": {"a": 3}}', '{"pat_str": "("}',
                        '{"pat_str": "(a)|."}', '{"pat_str": 3}'):
            Path(f"{path}.json").write_text(sidecar, encoding="utf-8")
            with self.assertRaises(gpt.UserError):
                tok.BPETokenizer.load(path)
        with self.assertRaises(gpt.UserError):
            tok.BPETokenizer.load(self.dir / "missing")
        with self.assertRaisesRegex(gpt.UserError, "not the two files"):
            tok.BPETokenizer.from_gpt2(path, path)


class TestTokenizerCommands(unittest.TestCase):

    def setUp(self):
        self.dir = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)

    def main(self, *args):
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err:
            tok.main([str(arg) for arg in args])
        return out.getvalue() + err.getvalue()

    def test_walk_needs_no_file(self):
        out = self.main()
        for part in ("KeyError: 'pancakes'", "' ' + 'b'    seen", "gives back every byte: True",
                     "encode --tokenizer gpt2"):
            self.assertIn(part, out)
        self.assertNotIn("\x1b", out)

    def test_train_encode_compare(self):
        Path("a.txt").write_text("the cat sat on the mat. " * 100, encoding="utf-8")
        Path("b.txt").write_text("the rat sat on the cat. " * 100, encoding="utf-8")
        out = self.main("train", "a.txt", "b.txt", "--vocab-size", 270, "--out", "new/x.tiktoken")
        self.assertRegex(out, r"held out 4\d\d bytes, (?s:.*) [2-9]\.\d\d bytes per token")
        ids = gpt.load_tokenizer("new/x.tiktoken").encode_ordinary("the cat")
        out = self.main("encode", "--tokenizer", "new/x.tiktoken", "the cat")
        self.assertEqual(out.split("\n")[0], " ".join(map(str, ids)))
        self.assertEqual(out.split("\n")[1].replace("|", ""), "the cat")
        self.assertIn("every token is the same",
                      self.main("compare", "a.txt", "--tokenizer", "new/x.tiktoken"))

    def test_train_says_when_the_text_is_too_small(self):
        Path("a.txt").write_text("ab ab", encoding="utf-8")
        self.assertIn("too small for 243 merges", self.main("train", "a.txt", "--vocab-size", 500))
        self.assertTrue(Path("checkpoints/my.tiktoken").exists())

    def test_bad_input_is_one_sentence(self):
        Path("empty").touch()
        Path("binary").write_bytes(bytes(range(256)))
        Path("good").write_text("good text", encoding="utf-8")
        for args in (["train", "missing"], ["train", "good", "empty"], ["train", "binary"],
                     ["train", "."], ["train", "good", "--vocab-size", 256], ["compare", "missing"],
                     ["encode", "--tokenizer", "missing", "x"],
                      ["encode", "--tokenizer", "good", "x"],
                     ["encode", "--tokenizer", "bytes", "\udcff"], ["train", "good", "--out", "."]):
            with self.subTest(args=args):
                with self.assertRaises(gpt.UserError) as caught:
                    self.main(*args)
                self.assertNotIn("\n", str(caught.exception))

    def test_show_escapes_what_a_terminal_would_obey(self):
        self.assertEqual(tok.show([b"a\n", b"\x1b[31m", "é".encode()[:1], "é".encode()]),
                         r"a\n|\x1b[31m|\xc3|é")
        stdout = io.StringIO()
        stdout.isatty = lambda: True
        with mock.patch.object(sys, "stdout", stdout):
            with mock.patch.dict(os.environ, {"NO_COLOR": "1"}):
                self.assertNotIn("\x1b", tok.show([b"a", b"b"]))
            with mock.patch.dict(os.environ):
                os.environ.pop("NO_COLOR", None)
                self.assertIn("\x1b", tok.show([b"a", b"b"]))

    def test_pieces_of_a_file_have_the_chunks_of_the_whole(self):
        text = " ".join(HOSTILE + fuzz(seed=7, strings=50, length=60)).replace("\0", "")
        Path("a.txt").write_text(text, encoding="utf-8", newline="")
        whole = tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, text)
        for size in (1, 2, 3, 7, 50, 1000):
            pieces = list(gpt.read_text_pieces("a.txt", size=size))
            chunks = [c for p in pieces for c in tok.regex.findall(gpt.GPT2_SPLIT_PATTERN, p)]
            self.assertEqual(chunks, whole)


# ---------------------------------------------------------------------------------------------
# gpt.download, against a server that misbehaves

FILE = bytes(range(256)) * 800  # 204,800 bytes
FILE_SHA256 = hashlib.sha256(FILE).hexdigest()


class DownloadTest(unittest.TestCase):
    """Each test gives the server a list of answers, one per request; the last one repeats."""

    def setUp(self):
        test, self.asked, self.answers = self, [], [self.whole]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                test.asked.append((self.path, self.headers.get("Range")))
                answer = test.answers[0] if len(test.answers) == 1 else test.answers.pop(0)
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.stalled = threading.Event()
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
        if length != "unknown":
            request.send_header("Content-Length", len(body) if length is None else length)
        request.end_headers()
        request.wfile.write(body)
        request.wfile.flush()

    def whole(self, request, headers=()):
        self.send(request, FILE, headers=headers)

    def ranged(self, request):
        if not request.headers.get("Range"):
            return self.whole(request)
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(FILE):
            return self.send(request, b"<html>", 416, headers=[
                ("Content-Range", f"bytes */{len(FILE)}"), ("Content-Type", "text/html")])
        self.send(request, FILE[start:], 206, headers=[
            ("Content-Range", f"bytes {start}-{len(FILE) - 1}/{len(FILE)}")])

    def cut(self, request):  # half, then the connection is closed
        self.send(request, FILE[:100_000], length=len(FILE))
        request.close_connection = True

    def stall(self, request):  # half, then silence
        self.send(request, FILE[:100_000], length=len(FILE))
        self.stalled.wait(5)

    def status(self, number, headers=()):
        return lambda request: self.send(request, b"no", number, headers=headers)

    # What must hold.

    def fetch(self, *urls, sha256=None, timeout=1):
        with contextlib.redirect_stdout(io.StringIO()):
            return gpt.download(urls or [self.url], self.path, sha256, timeout)

    def check_file(self, requests=None):
        self.assertEqual(self.path.read_bytes(), FILE)
        self.assertFalse(self.part.exists())
        if requests:
            self.assertEqual([asked[1] for asked in self.asked], requests)

    def check_fails(self, words, *urls, sha256=None):
        with self.assertRaises(UserError) as caught:
            self.fetch(*urls, sha256=sha256)
        self.assertIn(words, str(caught.exception))
        self.assertIn(str(self.path), str(caught.exception))  # where to put it by hand
        self.assertFalse(self.path.exists())

    def test_a_file_that_is_there_needs_no_network(self):
        self.path.parent.mkdir()
        self.path.write_bytes(b"mine")
        self.assertEqual(self.fetch(), self.path)
        self.assertEqual((self.path.read_bytes(), self.asked), (b"mine", []))

    def test_redirect_whose_first_answer_announces_the_checksum(self):
        for etag in (f'"{FILE_SHA256}"', f'W/"{FILE_SHA256}"', FILE_SHA256):
            self.answers = [self.status(302, [("Location", "/cdn"), ("X-Linked-Etag", etag)]),
                            lambda r: self.whole(r, [("ETag", '"' + 64 * "0" + '"')])]
            self.fetch()
            self.check_file()
            self.path.unlink()
        self.assertEqual([path for path, _ in self.asked], ["/file", "/cdn"] * 3)
        wrong = ("X-Linked-Etag", '"' + 64 * "0" + '"')
        self.answers = [self.status(302, [("Location", "/cdn"), wrong]), self.whole]
        self.check_fails("wrong content")
        self.assertFalse(self.part.exists())

    def test_an_etag_that_is_no_checksum_is_not_taken_for_one(self):
        self.answers = [lambda r: self.whole(r, [("ETag", '"0x8D5"')])]
        self.fetch()
        self.check_file()

    def test_404_then_the_next_address(self):
        self.answers = [self.status(404), self.whole]
        self.fetch(self.url, self.url + "2")
        self.check_file()
        self.assertEqual([path for path, _ in self.asked], ["/file", "/file2"])

    def test_500_then_success(self):
        self.answers = [self.status(500), self.status(503), self.whole]
        self.fetch()
        self.check_file([None] * 3)

    def test_500_for_ever_is_an_error_with_the_reason(self):
        self.answers = [self.status(500)]
        self.check_fails("500 Internal Server Error")
        self.assertEqual(len(self.asked), 3)

    def test_a_cut_connection_resumes_where_it_broke(self):
        self.answers = [self.cut, self.ranged]
        self.fetch()
        self.check_file([None, "bytes=100000-"])

    def test_a_connection_that_breaks_often_gets_there(self):
        def some(request):  # 30,000 bytes, then the end
            start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
            self.send(request, FILE[start:start + 30_000], 206 if start else 200,
                      len(FILE) - start,
                      [("Content-Range", f"bytes {start}-{len(FILE) - 1}/{len(FILE)}")])
            request.close_connection = True
        self.answers = [some]
        self.fetch()
        self.check_file()
        self.assertEqual(len(self.asked), 7)

    def test_a_server_that_ignores_range(self):
        self.answers = [self.cut, self.whole]
        self.fetch()
        self.check_file([None, "bytes=100000-"])

    def test_a_server_that_resumes_elsewhere(self):
        self.answers = [self.cut, lambda r: self.send(r, FILE[5:], 206, headers=[
            ("Content-Range", f"bytes 5-{len(FILE) - 1}/{len(FILE)}")]), self.whole]
        self.fetch()
        self.check_file([None, "bytes=100000-", None])

    def test_a_stalled_connection_is_given_up_and_resumed(self):
        self.answers = [self.stall, self.ranged]
        self.fetch(timeout=0.3)
        self.check_file()
        self.assertGreater(int(self.asked[1][1][6:-1]), 80_000)

    def test_a_server_that_says_nothing(self):
        self.answers = [lambda r: self.stalled.wait(5)]
        with self.assertRaisesRegex(UserError, "no answer within 0.2 s"):
            self.fetch(timeout=0.2)

    def test_a_partial_file_of_an_earlier_run(self):
        self.path.parent.mkdir()
        for size in (1, 100_000, len(FILE)):  # all of it: 416, and the checksum still counts
            self.part.write_bytes(FILE[:size])
            self.answers = [self.ranged]
            self.fetch(sha256=FILE_SHA256)
            self.check_file()
            self.path.unlink()
        self.assertEqual([r for _, r in self.asked],
                         ["bytes=1-", "bytes=100000-", f"bytes={len(FILE)}-"])

    def test_a_partial_file_longer_than_the_file_begins_again(self):
        self.path.parent.mkdir()
        self.part.write_bytes(FILE + b"more")
        self.answers = [self.ranged]
        self.fetch()
        self.check_file([f"bytes={len(FILE) + 4}-", None])

    def test_a_partial_file_of_something_else_begins_again(self):
        self.path.parent.mkdir()
        self.part.write_bytes(b"x" * 5000)
        self.answers = [self.ranged]
        self.fetch(sha256=FILE_SHA256)
        self.check_file(["bytes=5000-", None])

    def test_bytes_of_two_servers_are_not_mixed_without_a_checksum(self):
        def other(request):
            self.send(request, b"x" * 100_000, length=len(FILE))
            request.close_connection = True
        self.answers = [other, self.status(404), self.ranged]
        self.fetch(self.url, self.url + "2")
        self.check_file([None, "bytes=100000-", None])

    def test_wrong_checksum(self):
        self.check_fails("wrong content", sha256="0" * 64)
        self.assertFalse(self.part.exists())

    def test_a_web_page_is_not_the_file(self):
        self.answers = [lambda r: self.whole(r, [("Content-Type", "text/html; charset=utf-8")])]
        self.check_fails("a web page came")

    def test_an_answer_without_a_file(self):
        self.answers = [self.status(204)]
        self.check_fails("204")
        self.answers = [lambda r: self.send(r, FILE, length="unknown")]
        self.check_fails("does not say how long")

    def test_ctrl_c_keeps_the_part_and_a_later_call_resumes(self):
        self.answers = [self.ranged]

        def interrupt(progress, done, text=""):
            if done > 100_000:
                raise KeyboardInterrupt
        with mock.patch.object(gpt.Progress, "update", interrupt):
            self.assertRaises(KeyboardInterrupt, self.fetch)
        have = self.part.stat().st_size
        self.assertGreater(have, 100_000)
        self.assertFalse(self.path.exists())
        self.fetch()
        self.check_file([None, f"bytes={have}-"])

    def test_no_network_names_every_address(self):
        with socket.socket() as closed:  # bound but not listening: nobody answers
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
            self.check_fails(f"{url}: no connection\n  {url}b: no connection", url, url + "b")

    def test_a_folder_that_cannot_be_written(self):
        self.path.parent.write_bytes(b"a file where the folder should be")
        with self.assertRaisesRegex(UserError, "could not be written"):
            self.fetch()


# ---------------------------------------------------------------------------------------------
# load_gpt2.py. Small files in both formats, written byte by byte, and GPT-2 in twenty lines of
# numpy to say what the logits must be.

V, T, C, H, L = 300, 16, 8, 2, 11  # 11 blocks: h10 comes before h2 in sorted order
HUB_TO_TF = {"ln_1.weight": "ln_1/g", "ln_1.bias": "ln_1/b", "ln_2.weight": "ln_2/g",
             "ln_2.bias": "ln_2/b",
             **{f"{n}.{a}": f"{n.replace('.', '/')}/{a[0]}" for a in ("weight", "bias")
                for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}}


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
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


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


def write_safetensors(path, weights, header=None, dtype="F32", pad=0):
    """`weights` as {name: array or bytes}; `header` replaces or changes (a function) the JSON."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in weights.items():
        end = len(data) + array.nbytes
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    if callable(header):
        header(entries)
    text = header if isinstance(header, bytes) else json.dumps(entries).encode() + b" " * pad
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def slow_crc32c(data):
    """CRC-32C as the standard defines it, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = SLOW_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


SLOW_TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    SLOW_TABLE.append(byte)


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out + bytes([n]))


def field(number, value):
    """A protocol-buffer field: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries, compression=0, share=True):
    """A LevelDB block of (key, value)s, with a restart point every 16, and its trailer."""
    out, restarts, last = b"", [], b""
    for n, (key, value) in enumerate(entries):
        shared = 0 if n % 16 == 0 or not share else len(os.path.commonprefix([key, last]))
        if n % 16 == 0:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + bytes([compression])
    return out + struct.pack("<I", masked(slow_crc32c(out)))


def write_index(path, entries, per_block=30, compression=0):
    """A LevelDB table of (key, value)s."""
    out, pointers = b"", []
    for at in range(0, len(entries), per_block):
        part = block(entries[at:at + per_block], compression)
        pointers.append((entries[at:at + per_block][-1][0],
                         varint(len(out)) + varint(len(part) - 5)))
        out += part
    footer = varint(len(out)) + varint(8)
    out += block([])
    index = block(pointers)
    footer += varint(len(out)) + varint(len(index) - 5)
    path.write_bytes(out + index + footer.ljust(40, b"\0") +
                     struct.pack("<Q", 0xDB4775248B80FB57))


def write_tensorflow(folder, weights, change=None, **index_options):
    """OpenAI's three files. `change` may alter {key: [dtype, shape, offset, size, crc]}."""
    folder.mkdir(exist_ok=True)
    names = {}
    for hub, array in weights.items():
        parts = hub.split(".", 2)
        if parts[0] == "h":
            array = array[None] if "mlp" not in hub and array.ndim == 2 else array
            names[f"model/h{parts[1]}/{HUB_TO_TF[parts[2]]}"] = array
        else:
            names["model/" + {"ln_f.weight": "ln_f/g", "ln_f.bias": "ln_f/b"}.get(
                hub, parts[0])] = array
    data, records = b"", {}
    for name in sorted(names):
        raw = names[name].tobytes()
        records[name] = [1, names[name].shape, len(data), len(raw), masked(slow_crc32c(raw))]
        data += raw
    if change:
        change(records)
    entries = [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name, (dtype, shape, offset, size, crc) in sorted(records.items()):
        shape = b"".join(field(2, field(1, n)) for n in shape)
        entries.append((name.encode(), field(1, dtype) + field(2, shape) +
                        (field(4, offset) if offset else b"") + field(5, size) +
                        varint(6 << 3 | 5) + struct.pack("<I", crc)))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    write_index(folder / "model.ckpt.index", entries, **index_options)
    (folder / "hparams.json").write_text(json.dumps(
        {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}), encoding="utf-8")
    return folder


class LoadCase(unittest.TestCase):
    """A temporary folder with a tiny GPT-2 in both formats: self.hub and self.tf."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir, self.weights = Path(folder.name), random_gpt2()
        self.hub, self.tf = self.dir / "hub", self.dir / "tf"
        self.hub.mkdir()
        self.file = write_safetensors(self.hub / "model.safetensors", self.weights)
        (self.hub / "config.json").write_text(json.dumps({"n_head": H}), encoding="utf-8")
        write_tensorflow(self.tf, self.weights)

    def logits(self, source, ids=(0, 299, 7, 7, 42)):
        model = source if isinstance(source, torch.nn.Module) else load_gpt2.load_local(source)
        with torch.no_grad():
            return model(torch.tensor([ids]))[0].numpy()

    def check_logits(self, source, tolerance=2e-4, weights=None):
        ids = [0, 299, 7, 7, 42]
        weights = {k: v.astype(np.float64) for k, v in (weights or self.weights).items()}
        np.testing.assert_allclose(self.logits(source), numpy_gpt2(weights, ids), atol=tolerance)

    def check_refused(self, source, *words):
        """One UserError with these words, raised before memory is taken for a model."""
        with mock.patch.object(load_gpt2, "allocate", side_effect=AssertionError("allocated")):
            with self.assertRaises(UserError) as caught, contextlib.redirect_stdout(io.StringIO()):
                load_gpt2.load_local(source)
        for word in words:
            self.assertIn(word, str(caught.exception))


class LoadGPT2Test(LoadCase):
    @needs("gpt2-tiny-hf", "gpt2-tiny-tf")
    def test_files_of_transformers_and_tensorflow_give_transformers_logits(self):
        expected = np.load(ROOT / "data" / "gpt2-tiny-tf" / "expected_logits.npz")
        for name in ("gpt2-tiny-hf", "gpt2-tiny-tf"):
            model = load_gpt2.load_local(ROOT / "data" / name)
            with torch.no_grad():
                logits = model(torch.from_numpy(expected["ids"])).numpy()
            self.assertLess(np.abs(logits - expected["logits"]).max(), 2e-5, name)

    def test_both_formats_give_the_logits_of_gpt2_in_numpy(self):
        self.check_logits(self.hub)
        self.check_logits(self.file)  # the file alone, beside its config.json
        self.check_logits(self.tf)
        self.check_logits(self.tf / "model.ckpt.index")

    def test_names_with_prefix_masks_and_a_copy_of_the_embedding(self):
        weights = {f"transformer.{name}": array for name, array in self.weights.items()}
        weights["transformer.h.3.attn.bias"] = np.ones((1, 1, T, T), np.float32)
        weights["transformer.h.3.attn.masked_bias"] = np.float32([-1e4]).reshape(())
        weights["lm_head.weight"] = self.weights["wte.weight"]
        for pad in (0, 1, 3):  # so that the numbers also lie at odd addresses
            write_safetensors(self.file, weights, pad=pad)
            self.check_logits(self.hub)

        def as_bool(header):
            header["transformer.h.3.attn.bias"].update(dtype="BOOL", shape=[4 * T * T])
        write_safetensors(self.file, weights, as_bool)  # newer files have a mask of BOOL
        self.check_logits(self.hub)

    def test_sixteen_bit_numbers(self):
        half = {name: array.astype(np.float16) for name, array in self.weights.items()}
        write_safetensors(self.file, half, dtype="F16")
        self.check_logits(self.hub, weights=half)
        cut = {k: v.view(np.uint32) >> 16 for k, v in self.weights.items()}  # bfloat16 by hand
        write_safetensors(self.file, {k: v.astype(np.uint16) for k, v in cut.items()},
                          dtype="BF16")
        cut = {k: (v << 16).view(np.float32) for k, v in cut.items()}
        self.check_logits(self.hub, weights=cut)

        def as_half(records):
            for record in records.values():
                record[0] = 19
        write_tensorflow(self.tf, half, as_half)
        self.check_logits(self.tf, weights=half)
        self.assertEqual(load_gpt2.load_local(self.tf).tok_emb.weight.dtype, torch.float32)

    def test_out_head_shares_the_embedding(self):
        model = load_gpt2.load_local(self.hub)
        self.assertIs(model.out_head.weight, model.tok_emb.weight)
        self.assertEqual(sum(p.numel() for p in model.parameters()),
                         sum(a.size for a in self.weights.values()))
        self.assertFalse(model.training)

    def test_params_are_the_book_s_tree_of_numpy_arrays(self):
        for folder in (self.hub, self.tf):
            folder.rename(self.dir / "124M")
            settings, params = load_gpt2.download_and_load_gpt2("124M", self.dir)
            (self.dir / "124M").rename(folder)
            self.assertEqual(settings, {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H,
                                        "n_layer": L})
            self.assertEqual(sorted(params), ["b", "blocks", "g", "wpe", "wte"])
            self.assertEqual(sorted(params["blocks"][10]), ["attn", "ln_1", "ln_2", "mlp"])
            for array, name in ((params["wte"], "wte.weight"), (params["g"], "ln_f.weight"),
                                (params["blocks"][10]["attn"]["c_attn"]["w"],
                                 "h.10.attn.c_attn.weight"),
                                (params["blocks"][2]["mlp"]["c_proj"]["b"], "h.2.mlp.c_proj.bias"),
                                (params["blocks"][1]["ln_2"]["g"], "h.1.ln_2.weight")):
                self.assertIsInstance(array, np.ndarray)
                np.testing.assert_array_equal(array, self.weights[name])

    def test_load_weights_into_gpt_copies_or_says_what_does_not_fit(self):
        self.tf.rename(self.dir / "124M")
        _, params = load_gpt2.download_and_load_gpt2("124M", self.dir)
        cfg = {"vocab_size": V, "context_length": T, "emb_dim": C, "n_heads": H, "n_layers": L,
               "drop_rate": 0.0, "qkv_bias": True}
        model = gpt.GPTModel(cfg)
        load_gpt2.load_weights_into_gpt(model, params)
        self.check_logits(model)
        for change, words in (({"context_length": 32}, "wpe has the shape (16, 8), but the model "
                               "needs (32, 8)"), ({"n_layers": 10}, "11 blocks"),
                              ({"qkv_bias": False}, "qkv_bias True"),
                              ({"emb_dim": 16}, "wte has the shape")):
            model = gpt.GPTModel({**cfg, **change})
            before = model.tok_emb.weight.clone()
            with self.assertRaises(UserError) as caught:
                load_gpt2.load_weights_into_gpt(model, params)
            self.assertIn(words, str(caught.exception))
            self.assertTrue(torch.equal(before, model.tok_emb.weight))
        del params["blocks"][7]["mlp"]["c_fc"]["w"]
        with self.assertRaisesRegex(UserError, "lack h7/mlp/c_fc/w"):
            load_gpt2.load_weights_into_gpt(gpt.GPTModel(cfg), params)

    def test_a_checkpoint_of_it_gives_the_same_logits(self):
        model = load_gpt2.load_local(self.hub)
        gpt.save_checkpoint(self.dir / "x.pt", model, gpt.load_tokenizer("bytes"))
        again, _, _ = gpt.load_checkpoint(self.dir / "x.pt")
        np.testing.assert_array_equal(self.logits(again.eval()), self.logits(model))

    def test_checksums_are_those_of_the_standard_at_every_length(self):
        self.assertEqual(load_gpt2.crc32c(b"123456789"), 0xE3069283)
        self.assertEqual(load_gpt2.crc32c(bytes(32)), 0x8A9136AA)  # RFC 3720, B.4
        self.assertEqual(load_gpt2.crc32c(b"\xff" * 32), 0x62A8AB43)
        data, row = np.random.default_rng(1).bytes(200_000), 4 * load_gpt2.ROW
        for length in (0, 1, 3, 4, 5, 8, row - 1, row, row + 1, row + 4, 2 * row, 3 * row - 3):
            self.assertEqual(load_gpt2.crc32c(data[:length]), slow_crc32c(data[:length]), length)

    @unittest.skipUnless(Path("/proc/self/status").exists(), "needs Linux")
    def test_the_peak_is_the_model_alone(self):
        width, total = 768, 0
        shapes = {name: [n * width // C for n in array.shape]
                  for name, array in self.weights.items()
                  if name[:2] != "h." or name[:4] in ("h.0.", "h.1.")}
        shapes["wte.weight"], shapes["wpe.weight"] = [5000, width], [1024, width]
        for name, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            shapes[name] = {"dtype": "F32", "shape": shape, "data_offsets": [total, total + size]}
            total += size
        write_safetensors(self.file, {}, json.dumps(shapes).encode())
        with open(self.file, "r+b") as file:  # zeros that take no room on the disk
            file.truncate(self.file.stat().st_size + total)
        (self.hub / "config.json").unlink()
        code = ("import re, sys; sys.path.insert(0, sys.argv[1]); import load_gpt2\n"
                "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', "
                "open('/proc/self/status', encoding='ascii').read())[1]) * 1024\n"
                "a = peak(); load_gpt2.load_local(sys.argv[2]); print(peak() - a)")
        peak = int(subprocess.run([sys.executable, "-c", code, str(ROOT), str(self.file)],
                                  check=True, capture_output=True, text=True).stdout)
        self.assertLess(peak, 1.15 * total + 10e6)  # what torch itself takes at first use


class BadGPT2FilesTest(LoadCase):
    def test_safetensors_that_are_cut_damaged_or_hostile(self):
        good, entry = self.file.read_bytes(), "wpe.weight"

        def changed(**change):
            return lambda header: header[entry].update(change)

        def renamed(header):
            header["transformer.wpe.weight"] = dict(header["wpe.weight"])

        at = json.loads(good[8:8 + int.from_bytes(good[:8], "little")])[entry]["data_offsets"]
        for content, *words in (
                (b"", "empty"), (b"abc", "header"), (good[:100], "header should have"),
                (good[:-4], "outside the file"), (good[:len(good) // 2], "outside the file"),
                (struct.pack("<Q", 1 << 63) + good[8:], "header should have"),
                (b"PK\3\4" + bytes(5000), "header should have"),
                (b"[1, 2]", "not a JSON object"), (b"{,}", "header is not as expected"),
                (b"\xff\xfe", "header is not as expected"), (b"[" * 100_000, "header"),
                (b'{"wte.weight": 5}', "header is not as expected"),
                (b'{"wte.weight": {"dtype": "F32"}}', "header is not as expected"),
                (b'{"a": {}, "a": {}}', "twice"), (b" " * ((1 << 20) + 1) + b"{}", "too long"),
                (changed(dtype="I64"), "wpe.weight", "'I64'", "not supported"),
                (changed(dtype=["F32"]), "header is not as expected"),
                (changed(data_offsets=[at[0] - 4, at[1] - 4]), "wpe.weight", "overlaps"),
                (changed(data_offsets=[10 ** 9, 10 ** 9 + 512]), "wpe.weight", "outside"),
                (changed(data_offsets=[-512, 0]), "wpe.weight", "outside"),
                (changed(data_offsets=[at[1], at[0]]), "wpe.weight", "outside"),
                (changed(data_offsets=[0.5, 512.5]), "wpe.weight", "whole numbers"),
                (changed(data_offsets=at[:1]), "wpe.weight", "whole numbers"),
                (changed(shape=[10 ** 12, 10 ** 6]), "wpe.weight", "does not fit its shape"),
                (changed(shape=[-16, -8]), "wpe.weight", "does not fit its shape"),
                (changed(shape=[0, 8], data_offsets=[at[0], at[0]]), "wpe.weight", "does not fit"),
                (changed(shape=[True, 128]), "wpe.weight", "whole numbers"),
                (changed(shape=[128]), "wte and wpe"),
                (changed(shape=[32, 4]), "wpe has the shape (32, 4)", "(32, 8)"),
                (lambda header: header.pop(entry), "lacks the tensor wpe.weight"),
                (renamed, "with and without the prefix")):
            with self.subTest(words=words):
                if callable(content) or content[:1] in (b"{", b"[", b"\xff", b" "):
                    write_safetensors(self.file, self.weights, content)
                else:
                    self.file.write_bytes(content)
                self.check_refused(self.file, *words)

    def test_tensors_that_are_missing_or_too_many(self):
        for drop in ("h.4.mlp.c_fc.bias", "wte.weight", "ln_f.bias"):
            weights = {k: v for k, v in self.weights.items() if k != drop}
            self.check_refused(write_safetensors(self.file, weights), f"lacks the tensor {drop}")
        more = {**self.weights, "h.0.adapter.weight": np.ones(3, np.float32)}
        self.check_refused(write_safetensors(self.file, more), "h.0.adapter.weight")
        more = {**self.weights, "lm_head.weight": self.weights["wte.weight"] + 1}
        self.check_refused(write_safetensors(self.file, more), "lm_head.weight")
        last = {k: v for k, v in self.weights.items() if not k.startswith("h.10.")}
        (self.hub / "config.json").write_text('{"n_layer": 11, "n_head": 2}', encoding="utf-8")
        self.check_refused(write_safetensors(self.file, last), "h.10.ln_1.weight")

        def drop_one(records):
            del records["model/h10/attn/c_proj/w"]
        self.check_refused(write_tensorflow(self.tf, self.weights, drop_one),
                           "lacks the tensor h10/attn/c_proj/w")

    def test_config_files_that_do_not_fit(self):
        for text, word in (("", "config.json"), ("[]", "not a JSON object"), ("{", "config.json"),
                           ("[" * 100_000, "config.json"), ('{"n_head": 3}', "3 heads"),
                           ('{"n_head": 0}', "0 heads"), ('{"n_head": "x"}', "heads"), ("{}", ""),
                           ('{"n_layer": -1}', "-1 blocks"), ('{"n_layer": 1000000000}', "lacks"),
                           ('{"n_layer": 3}', "holds h.10"), ('{"n_embd": 16}', "n_embd 16"),
                           ('{"vocab_size": 5}', "n_vocab 5"), ('{"model_type": "opt"}', "'opt'"),
                           ('{"activation_function": "relu"}', "relu")):
            with self.subTest(text=text[:40]):
                (self.hub / "config.json").write_text(text, encoding="utf-8")
                self.check_refused(self.hub, word)

    def test_tensorflow_checkpoints_that_are_cut_damaged_or_hostile(self):
        key, data = "model/wpe", self.tf / "model.ckpt.data-00000-of-00001"
        index = self.tf / "model.ckpt.index"

        def changed(place, value):
            return lambda records: records[key].__setitem__(place, value)

        for change, *words in (
                (changed(0, 9), "model/wpe", "dtype number 9"),
                (changed(1, (16, 16)), "wpe", "does not fit its shape"),
                (changed(1, (1 << 40, 1 << 40)), "wpe", "does not fit its shape"),
                (changed(1, ((1 << 64) - 1, 8)), "wpe", "does not fit its shape"),  # -1
                (changed(2, 0), "overlaps"), (changed(2, 1 << 62), "wpe", "outside the file"),
                (changed(3, 1 << 62), "wpe", "outside the file"),
                (changed(4, 5), "checksum of wpe is wrong")):
            with self.subTest(words=words):
                self.check_refused(write_tensorflow(self.tf, self.weights, change), *words)
        self.check_refused(write_tensorflow(self.tf, self.weights, compression=1), "compressed")
        write_tensorflow(self.tf, self.weights)
        good, numbers = index.read_bytes(), data.read_bytes()
        for at in (0, 70_00, len(numbers) - 1):  # one bit, anywhere
            data.write_bytes(numbers[:at] + bytes([numbers[at] ^ 1]) + numbers[at + 1:])
            self.check_refused(self.tf, "checksum of", str(data))
        data.write_bytes(numbers[:-5])
        self.check_refused(self.tf, "outside the file")
        data.write_bytes(b"")
        self.check_refused(self.tf, "empty")
        data.unlink()
        self.check_refused(self.tf, "not there")
        data.write_bytes(numbers)
        for content, word in ((b"", "empty"), (good[:40], "does not end"), (good[1:], "index"),
                              (good[:-1], "does not end"), (good[100:], "index"),
                              (good + bytes(1 << 20) + good[-48:], "too many")):
            index.write_bytes(content)
            self.check_refused(self.tf, word, str(index))

    def test_no_damaged_byte_of_an_index_gets_through_or_raises_anything_else(self):
        index, rng = self.tf / "model.ckpt.index", np.random.default_rng(2)
        good, places = index.read_bytes(), load_gpt2.read_index(index)
        for at in rng.choice(len(good) - 48, 60, replace=False):
            index.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.integers(8)]) + good[at + 1:])
            with contextlib.suppress(UserError):
                self.assertEqual(load_gpt2.read_index(index), places)

    def test_no_random_record_raises_anything_but_a_sentence(self):
        rng = np.random.default_rng(3)
        for _ in range(300):  # with right checksums, so that the parser sees the nonsense
            entries = [(rng.bytes(rng.integers(1, 9)), rng.bytes(rng.integers(0, 30)))
                       for _ in range(3)]
            entries[0] = (b"model/" + entries[0][0], entries[0][1])
            write_index(self.tf / "model.ckpt.index", sorted(entries))
            with contextlib.suppress(UserError):
                load_gpt2.read_index(self.tf / "model.ckpt.index")
        for damaged in (b"\x05\x05\x00abcde", b"\x00\xff\xff\xff\xff\x7f\x00a",
                        b"\xff" * 30, b"\x00\x03\x00abc\x09\x01\x00x"):
            content = damaged + struct.pack("<II", 0, 1) + b"\0"
            content += struct.pack("<I", masked(slow_crc32c(content)))
            pointer = block([(b"z", varint(0) + varint(len(content) - 5))])
            (self.tf / "model.ckpt.index").write_bytes(
                content + pointer + (b"\0\0" + varint(len(content)) + varint(len(pointer) - 5))
                .ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))
            self.assertRaises(UserError, load_gpt2.read_index, self.tf / "model.ckpt.index")

    def test_a_folder_with_neither_format_and_a_path_that_is_not_there(self):
        (self.dir / "empty").mkdir()
        self.check_refused(self.dir / "empty", "neither format", "model.safetensors",
                           "model.ckpt.index")
        self.check_refused(self.dir / "nowhere", "is not there")


class LoadGPT2CommandTest(LoadCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)

    def run_command(self, *argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                load_gpt2.main([str(a) for a in argv])
            except UserError as e:
                return 1, out.getvalue(), str(e)
            except SystemExit as e:
                return e.code, out.getvalue(), err.getvalue()
        return 0, out.getvalue(), err.getvalue()

    @needs("tiktoken")
    def test_from_a_folder_to_a_checkpoint_that_writes(self):
        cache = {"TIKTOKEN_CACHE_DIR": str(ROOT / "data" / "tiktoken")}
        with mock.patch.dict(os.environ, cache):
            for folder in (self.hub, self.tf):
                with mock.patch("requests.get", side_effect=AssertionError("network")):
                    status, out, _ = self.run_command("--from", folder, "--out", "a/b.pt")
                self.assertEqual(status, 0)
                self.assertIn("Every effort moves you", out)
                self.assertIn(f"{sum(a.size for a in self.weights.values()):,} parameters", out)
                self.assertIn("the-verdict.txt is not there", out)
                model, tokenizer, _ = gpt.load_checkpoint("a/b.pt")
                self.check_logits(model.eval())
                self.assertEqual(tokenizer.n_vocab, V)
                self.assertEqual(tokenizer.decode(tokenizer.encode("Größe 12")), "Größe 12")

    @needs("the-verdict.txt", "tiktoken")
    def test_the_loss_is_the_mean_over_the_book_s_two_windows(self):
        with mock.patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": str(ROOT / "data/tiktoken")}):
            tokenizer = gpt.load_tokenizer("gpt2")
        model = gpt.GPTModel({"vocab_size": 50257, "context_length": 256, "emb_dim": 4,
                              "n_heads": 1, "n_layers": 1, "drop_rate": 0.0, "qkv_bias": True})
        path = ROOT / "data" / "the-verdict.txt"
        text, losses = path.read_text(encoding="utf-8"), []
        ids = tokenizer.encode(text[int(0.9 * len(text)):])
        for i in range(0, len(ids) - 256, 256):  # GPTDatasetV1's loop
            logits = model(torch.tensor([ids[i:i + 256]]))[0].detach().double().log_softmax(-1)
            losses += [-logits[t, target].item() for t, target in enumerate(ids[i + 1:i + 257])]
        self.assertEqual(len(losses), 512)
        with mock.patch.object(load_gpt2, "VERDICT", path):
            self.assertAlmostEqual(load_gpt2.calc_verdict_loss(model, tokenizer),
                                   np.mean(losses), places=4)

    def test_the_hub_first_then_openai_then_the_book_s_mirror(self):
        asked = []

        def no_network(url, **_):
            asked.append(url)
            raise gpt.requests.exceptions.ConnectionError("Max retries exceeded")
        with mock.patch("requests.get", no_network):
            status, _, err = self.run_command("--size", "355M")
        self.assertEqual(status, 1)
        self.assertEqual([url.split("/")[2] for url in asked], [
            "huggingface.co", "openaipublic.blob.core.windows.net", "f001.backblazeb2.com"])
        self.assertIn("gpt2-medium", asked[0])
        for url in asked:
            self.assertIn(f"{url}: no connection", err)
        self.assertIn(str(Path("data/gpt2/355M/model.safetensors")), err)

    def test_wrong_input_is_a_sentence_and_a_status(self):
        for argv, status, words in (
                (["--size", "125M"], 1, "124M, 355M, 774M, 1558M"),
                (["--from", "nowhere"], 1, "nowhere is not there"),
                (["--from", self.dir], 1, "neither format"),
                (["--from", self.hub, "--out", self.tf], 1, "folder"),
                (["--from", self.hub, "--size", "355M"], 2, "not allowed"),
                (["--max-new-tokens", "0"], 2, "above 0")):
            with self.subTest(argv=argv):
                got, _, err = self.run_command(*argv)
                self.assertEqual(got, status)
                self.assertIn(words, err)

    def test_the_script_exits_1_with_one_sentence_and_no_traceback(self):
        (self.dir / "empty.safetensors").write_bytes(b"")
        run = subprocess.run([sys.executable, ROOT / "load_gpt2.py", "--from", "empty.safetensors"],
                             capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertRegex(run.stderr, r"^load_gpt2.py: empty.safetensors is empty.*\n$")


# ---------------------------------------------------------------------------------------------
# finetune_classifier.py

CLASSIFIER_CFG = {"vocab_size": 257, "context_length": 64, "emb_dim": 16, "n_heads": 2,
                  "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True, "tie_embeddings": True}


def classifier_trunk(seed=1, **changes):
    torch.manual_seed(seed)
    model = gpt.GPTModel({**CLASSIFIER_CFG, **changes})
    for p in model.parameters():  # far from the initial values, so that every part has a say
        torch.nn.init.normal_(p, std=0.3)
    return model


def labelled_lines(n=40, classes=("ham", "spam")):
    """Texts that can be told apart: a line per text, of different lengths."""
    words = ["meet me at home", "WIN cash NOW 0800", "the weather is mild"]
    return "".join(f"{name}\t{words[k]} {'x' * (i % 23)} {i}\n"
                   for i in range(n) for k, name in enumerate(classes))


class ClassifierFolder(unittest.TestCase):
    """An empty folder to work in, with a tiny language model and a small table."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        self.tokenizer = gpt.load_tokenizer("bytes")
        gpt.save_checkpoint("tiny.pt", classifier_trunk(), self.tokenizer)
        self.write("data.tsv", labelled_lines())

    def write(self, name, text):
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        Path(name).write_bytes(data)
        return Path(name)

    def main(self, *argv):
        """Run the script in this process -> what it prints."""
        argv = list(map(str, argv))
        if "--classify" not in argv:
            argv = ["--init", "tiny.pt", "--data", "data.tsv", "--dtype", "float32",
                    "--device", "cpu", "--epochs", "2", "--lr", "0.01", "--out", "c.pt", *argv]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            clf.main(argv)
        return out.getvalue()

    def fails(self, *argv):
        """Run the script, which must end with a UserError of one sentence -> that sentence."""
        with self.assertRaises(gpt.UserError) as caught:
            self.main(*argv)
        return str(caught.exception)

    def weights(self, path):
        return gpt.load_checkpoint(path, kind="classifier")[0].state_dict()

    def assert_same(self, a, b, tolerance=None):
        self.assertEqual(a.keys(), b.keys())
        for name in a:
            if tolerance is None:
                self.assertTrue(torch.equal(a[name], b[name]), name)
            else:
                torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


class LabelledTexts(ClassifierFolder):
    @needs("SMSSpamCollection")
    def test_sms_file_has_all_its_messages_and_splits_as_in_the_book(self):
        examples, remarks = clf.read_labelled_texts(ROOT / "data" / "SMSSpamCollection")
        self.assertEqual(Counter(label for label, _ in examples), {"ham": 4827, "spam": 747})
        self.assertEqual(remarks, [])
        balanced = clf.create_balanced_dataset(examples, seed=5)
        self.assertEqual(Counter(label for label, _ in balanced), {"ham": 747, "spam": 747})
        parts = clf.random_split(balanced, 0.7, 0.1, seed=5)
        self.assertEqual([len(part) for part in parts], [1045, 149, 300])
        self.assertEqual(Counter(sum(parts, [])), Counter(balanced))     # nobody lost or doubled
        self.assertNotEqual(clf.random_split(balanced, 0.7, 0.1, seed=6), parts)

    def test_csv_quotes_hold_commas_and_line_breaks(self):
        rows = [("label", "text"), ("a", 'he said "hi",\nthen left'), ("a", "x"), ("b", "y, z")]
        with open("t.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(rows)
        examples, remarks = clf.read_labelled_texts("t.csv")
        self.assertEqual(examples, rows[1:])
        self.assertIn("header", remarks[0])

    def test_columns_by_header_by_number_and_by_default(self):
        self.write("t.tsv", "id\ttext\tstars\n1\tgood\t5\n2\tbad\t1\n3\tfine\t5\n")
        wanted = [("5", "good"), ("1", "bad"), ("5", "fine")]
        for columns in (("text", "stars"), ("TEXT", "3"), (None, "stars"), ("2", "3")):
            self.assertEqual(clf.read_labelled_texts("t.tsv", *columns)[0], wanted)
        self.write("t.tsv", "no\tx\r\nyes\ty\r\nno\tz \"\r\n")           # no header, CR LF, a quote
        self.assertEqual(clf.read_labelled_texts("t.tsv"),
                         ([("no", "x"), ("yes", "y"), ("no", 'z "')], []))
        self.write("t.csv", "good,1\nbad,2\nfine,1\n")     # a number is a place, not a cell
        self.assertEqual(clf.read_labelled_texts("t.csv", "1", "2")[0],
                         [("1", "good"), ("2", "bad"), ("1", "fine")])

    def test_a_comma_outside_quotes_never_cuts_a_text(self):
        self.write("t.csv", "label,text\nham,Hello\nham,Hello, how are you\n")
        with self.assertRaisesRegex(UserError, "line 3: 3 columns, expected 2; .* quotes"):
            clf.read_labelled_texts("t.csv")

    def test_empty_texts_are_skipped_and_said(self):
        self.write("data.tsv", "ham\t\nspam\t  \n\n" + labelled_lines())
        self.assertIn("2 without text or label skipped", self.main())

    def test_bad_tables_are_one_sentence(self):
        many = labelled_lines()
        for content, words in (
                ("", "empty"), (b"\x00\x01\x02" * 99, "not a text file"),
                (b"\xff\xfe\xfa", "UTF-8"),
                ("\n\n", "no texts"), ("ham\tx\nspam\n" + many, "line 2: 1 column"),
                (labelled_lines(classes=("ham",)), "only the class 'ham'"),
                (many + "eggs\ta\neggs\tb\n", "'eggs' of data.tsv has too few texts to split, 2")):
            self.write("data.tsv", content)
            self.assertIn(words, self.fails())
        Path("data.tsv").unlink()
        self.assertIn("data.tsv cannot be read (No such file", self.fails())
        self.write("data.tsv", many)
        self.assertIn("no column 'stars'", self.fails("--label-column", "stars"))
        self.assertIn("no column '3'", self.fails("--text-column", "3"))
        self.assertIn("the same column", self.fails("--text-column", "1", "--label-column", "1"))
        self.write("q.csv", 'a,"x\nb,y\n')
        self.assertIn("not valid CSV", self.fails("--data", "q.csv"))

    def test_download_takes_the_expected_file_only_and_tries_the_mirror(self):
        content = b"ham\thello\n"
        with zipfile.ZipFile("good.zip", "w") as archive:
            archive.writestr("../evil", "no")
            archive.writestr("SMSSpamCollection", content)
        self.write("bad.zip", "<html>down for maintenance</html>")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=self.folder)
        handler.log_message = None
        with mock.patch.object(http.server.SimpleHTTPRequestHandler, "log_message"), \
                http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            site = f"http://127.0.0.1:{server.server_port}"
            sha = hashlib.sha256(content).hexdigest()
            with contextlib.redirect_stdout(io.StringIO()):
                path = clf.download_and_unzip_spam_data(
                    [f"{site}/none.zip", f"{site}/bad.zip", f"{site}/good.zip"],
                    self.folder / "sub" / "SMSSpamCollection", sha)
                with self.assertRaises(gpt.UserError) as caught:
                    clf.download_and_unzip_spam_data(
                        [f"{site}/none.zip", f"{site}/bad.zip", f"{site}/good.zip"],
                        self.folder / "other" / "SMSSpamCollection")
            server.shutdown()
        self.assertEqual(path.read_bytes(), content)
        self.assertEqual([p.name for p in path.parent.iterdir()], ["SMSSpamCollection"])
        self.assertFalse((self.folder / "evil").exists())
        self.assertRegex(str(caught.exception), "(?s)404.*not the expected archive.*SHA-256")


class ClassifierModel(ClassifierFolder):
    def test_padding_never_changes_a_result(self):
        """Against the plain model, a row at a time, read at its last token."""
        texts = ["a", "short text", "a longer text than the others " * 2, "mid length text"]
        for num_layers in (1, 2):
            model = classifier_trunk(n_layers=num_layers).eval()
            gpt.replace_head(model, 3)
            ids = [torch.tensor(self.tokenizer.encode(text))[:64] for text in texts]
            with torch.no_grad():
                truth = torch.stack([model(row[None])[0, -1] for row in ids])
                x, lengths = clf.pad(ids)
                wider = torch.cat([x, torch.full((4, 64 - x.shape[1]), 99)], dim=1)
                for padded in (x, wider):
                    torch.testing.assert_close(clf.classify_batch(model, padded, lengths), truth)
                    for depth in range(num_layers + 1):
                        frozen = clf.run_frozen(model, padded, lengths, depth)
                        torch.testing.assert_close(
                            clf.run_rest(model, frozen, lengths, depth), truth)
            probs = clf.classify_texts(texts, model, self.tokenizer, "cpu")
            torch.testing.assert_close(probs, truth.softmax(dim=-1))
            self.assertEqual(clf.classify_review(texts[1], model, self.tokenizer, "cpu", "xyz"),
                             "xyz"[int(truth[1].argmax())])

    def test_the_run_is_the_book_s_plain_loop_on_the_whole_model(self):
        """Frozen part kept, computed afresh, and the simple loop: the same weights."""
        # A bias of the keys moves all scores of a query alike and so changes nothing; its gradient
        # is rounding, which AdamW makes as large as any other. Hence a model without it.
        gpt.save_checkpoint("tiny.pt", classifier_trunk(qkv_bias=False), self.tokenizer)
        parts = clf.random_split(clf.create_balanced_dataset(
            clf.read_labelled_texts("data.tsv")[0], 123), seed=123)
        train, val = (clf.SpamDataset(p, self.tokenizer, 64) for p in parts[:2])
        for mode in ("head", "last-block", "all", "lora"):
            self.main("--train", mode, "--max-steps", 10)
            with mock.patch.object(clf, "compute_frozen", side_effect=AssertionError):
                text = self.main("--train", mode, "--max-steps", 10, "--keep-limit", 0,
                                 "--out", "afresh.pt")
            self.assertEqual("computed in every epoch" in text, mode in ("head", "last-block"))
            self.assert_same(self.weights("c.pt"), self.weights("afresh.pt"), 1e-4)

            model = gpt.load_checkpoint("tiny.pt")[0]
            torch.manual_seed(123)
            gpt.replace_head(model, 2)
            clf.freeze(model, mode)
            order = [clf.texts_of_step(step, len(train), {"batch_size": 8, "grad_accum": 1,
                                                         "seed": 123}) for step in range(10)]
            loader = torch.utils.data.DataLoader(train, batch_sampler=order[:7],
                                                 collate_fn=clf.collate)
            rest = torch.utils.data.DataLoader(train, batch_sampler=order[7:],
                                               collate_fn=clf.collate)
            val_loader = torch.utils.data.DataLoader(val, batch_size=3, collate_fn=clf.collate)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          lr=0.01, weight_decay=0.1)
            with contextlib.redirect_stdout(io.StringIO()):
                seen = [clf.train_classifier_simple(model, part, val_loader, optimizer, "cpu", 1,
                                                    5, None)[-1] for part in (loader, rest)]
            self.assertEqual(seen, [56, 24])
            gpt.merge_lora(model)
            kept = gpt.load_checkpoint("c.pt", kind="classifier")[2]["best"]
            if kept["step"] == 10:
                self.assert_same(self.weights("c.pt"), model.state_dict(), 1e-4)

    def test_what_is_frozen_stays_and_a_tied_embedding_is_kept(self):
        start = gpt.load_checkpoint("tiny.pt")[0].state_dict()
        learns = {"head": r"out_head", "last-block": r"out_head|final_norm|trf_blocks\.1",
                  "lora": r"out_head|trf_blocks.*(W_\w+|out_proj|layers\.\d)\.weight", "all": ""}
        for mode, pattern in learns.items():
            self.main("--train", mode)
            for name, value in self.weights("c.pt").items():
                same = name in start and torch.equal(start[name], value)
                self.assertEqual(same, not re.match(pattern, name), f"{mode}: {name}")

    def test_texts_longer_than_the_context_are_cut_and_counted(self):
        data = clf.SpamDataset([("ham", "y" * 64), ("spam", "y" * 65)], self.tokenizer, 64)
        self.assertEqual((data.num_cut, [len(row) for row in data.ids]), (1, [64, 64]))
        self.write("data.tsv", labelled_lines() + f"ham\t{'long ' * 20}\n" * 10)
        self.assertIn("10 of all are cut to 64 tokens", self.main("--no-balance"))

    def test_accuracy_is_counted_over_all_batches(self):
        model = classifier_trunk()
        gpt.replace_head(model, 2)
        data = clf.SpamDataset([line.split("\t") for line in labelled_lines(5).split("\n")[:-1]],
                               self.tokenizer, 64)
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=clf.collate)
        with torch.no_grad():
            right = [int(model(row[None])[0, -1].argmax()) == int(label) for row, label in data]
        self.assertEqual(clf.calc_accuracy_loader(loader, model, "cpu"), sum(right) / 10)
        self.assertEqual(clf.calc_accuracy_loader(loader, model, "cpu", 1), sum(right[:4]) / 4)


class ClassifierRuns(ClassifierFolder):
    def test_a_killed_run_resumed_ends_as_an_uninterrupted_one(self):
        """With dropout and every part that can train; killed right after a save, twice."""
        gpt.save_checkpoint("tiny.pt", classifier_trunk(drop_rate=0.2), self.tokenizer)
        for mode in ("head", "last-block", "all", "lora"):
            argv = ["--train", mode, "--epochs", 3, "--eval-every", 5, "--grad-accum", 2,
                    "--batch-size", 4]
            self.main(*argv, "--out", "whole.pt")
            whole = gpt.load_checkpoint("whole.pt", kind="classifier")
            save, saves = torch.save, []

            class Killed(BaseException):
                pass

            def save_then_die(content, path):
                save(content, path)
                if "optimizer" in content:
                    os.replace(path, "cut-resume.pt")    # what write_atomically was about to do
                    saves.append(content["step"])
                    raise Killed

            with mock.patch.object(torch, "save", save_then_die):
                for resume in ([], ["--resume"]):
                    with self.assertRaises(Killed):
                        self.main(*argv, "--out", "cut.pt", *resume)
            self.assertEqual(saves, [5, 10])
            self.main(*argv, "--out", "cut.pt", "--resume")
            cut = gpt.load_checkpoint("cut.pt", kind="classifier")
            self.assert_same(whole[0].state_dict(), cut[0].state_dict())
            self.assertEqual(whole[2], cut[2])
            self.assertEqual(Path("whole.csv").read_bytes(), Path("cut.csv").read_bytes())
            self.assertFalse(Path("cut-resume.pt").exists())
        self.assertIn("finished result", self.main(*argv, "--out", "cut.pt", "--resume"))
        self.assertIn("another --lr (0.01, now 0.5)",
                      self.fails(*argv, "--out", "cut.pt", "--resume", "--lr", 0.5))
        self.write("data.tsv", labelled_lines(classes=("no", "yes")))
        self.assertIn("another set of classes (['ham', 'spam'], now ['no', 'yes'])",
                      self.fails(*argv, "--out", "cut.pt", "--resume"))

    def test_ctrl_c_saves_the_step(self):
        with mock.patch.object(clf.CtrlC, "pressed", True, create=True), \
                mock.patch.object(clf.CtrlC, "__enter__", lambda self: self), \
                mock.patch.object(clf.CtrlC, "__exit__", lambda *_: None):
            with self.assertRaises(KeyboardInterrupt):
                self.main()
        self.assertEqual(torch.load("c-resume.pt", weights_only=True)["step"], 1)
        self.main("--resume")
        self.main("--out", "whole.pt")
        self.assert_same(self.weights("c.pt"), self.weights("whole.pt"))

    def test_a_loss_that_is_not_finite_stops_the_run(self):
        self.assertIn("start anew with a lower --lr", self.fails("--lr", "1e30", "--train", "all"))

    def test_report_follows_from_the_confusion_matrix(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            clf.print_report(["ham", "spam"], {"confusion": [[90, 10], [5, 45]], "majority": 0})
        for words in ("90.0% of 150 texts", "66.7% for always answering 'ham'", "94.7%", "81.8%"):
            self.assertIn(words, out.getvalue())
        # Newcombe 1998, table I: 81 of 263, Wilson's interval.
        low, high = clf.wilson_interval(81, 263)
        self.assertEqual((round(low, 4), round(high, 4)), (0.2553, 0.3662))
        self.assertAlmostEqual(clf.wilson_interval(300, 300)[1], 1.0)

    def test_three_classes_learn_and_travel_to_classify(self):
        self.write("data.tsv", labelled_lines(classes=("no", "maybe so", "ja")))
        text = self.main("--seeds", 2)
        self.assertRegex(text, r"2 seeds: test accuracy \d")
        self.assertTrue(Path("c-seed124.pt").exists())
        self.assertEqual(gpt.load_checkpoint("c.pt", kind="classifier")[2]["class_names"],
                         ["ja", "maybe so", "no"])
        lines = ["meet me at home xx 3", "", "WIN cash NOW 0800 xxxx 1", "é" * 99]
        texts = [line for line in lines if line]
        model = gpt.load_checkpoint("c.pt", kind="classifier")[0].eval()
        with torch.no_grad():
            truth = [model(gpt.text_to_token_ids(text, self.tokenizer)[:, :64])[0, -1].softmax(0)
                     for text in texts]
        wanted = [f"{['ja', 'maybe so', 'no'][int(p.argmax())]}\t{p.max():.3f}\t{text}"
                  for p, text in zip(truth, texts)]
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            text = self.main("--classify", "--dtype", "float32", "--out", "c.pt")
        self.assertEqual(text.split("\n")[:-1], wanted)
        self.assertIn("1 empty", err.getvalue())
        argv = [word for text in texts for word in ("--classify", text)]
        self.assertEqual(self.main(*argv, "--dtype", "float32", "--out", "c.pt"),
                         "\n".join(wanted) + "\n")

    def test_bad_checkpoints_are_one_sentence(self):
        self.assertIn("python finetune_classifier.py",
                      self.fails("--classify", "x", "--out", "c.pt"))
        self.assertIn("no checkpoint none.pt", self.fails("--init", "none.pt"))
        self.write("cut.pt", Path("tiny.pt").read_bytes()[:999])
        self.assertIn("cut short", self.fails("--init", "cut.pt"))
        self.main()
        self.assertIn("holds a classifier", self.fails("--init", "c.pt", "--out", "d.pt"))
        self.write("d-resume.pt", b"nonsense")
        self.assertIn("not the state of a run", self.fails("--resume", "--out", "d.pt"))
        with self.assertRaises(gpt.UserError) as caught:
            clf.main(["--data", "data.tsv"])
        self.assertRegex(str(caught.exception), "python load_gpt2.py.*python pretrain.py")

    def test_the_script_itself_trains_and_fails_in_a_sentence(self):
        base = [sys.executable, ROOT / "finetune_classifier.py", "--init", "tiny.pt"]
        done = subprocess.run([*base, "--data", "data.tsv", "--epochs", "1"], text=True,
                              capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"(?s)ham.*epoch +1 .*test .*baseline .*Next: python")
        failed = subprocess.run([*base, "--data", "none.tsv"], text=True, capture_output=True)
        self.assertEqual((failed.returncode, failed.stdout), (1, ""))
        self.assertRegex(failed.stderr, r"^finetune_classifier.py: none.tsv cannot be read.*\n$")


# ---------------------------------------------------------------------------------------------
# finetune_instruct.py

RECORDS = [{"instruction": f"Say {word}", "input": "now" if i % 3 else "", "output": word * (i % 4)}
           for i, word in enumerate(["one", "two", "three", "four", "five", "six"] * 5, 1)]


class FakeOllama(http.server.BaseHTTPRequestHandler):
    """A judge that answers from a list of replies: a text, or a function of the handler."""

    replies, questions = [], []

    def log_message(self, *_):
        pass

    def send(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send(b'{"models": [{"name": "llama3:latest"}]}')

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.questions.append(question)
        reply = self.replies.pop(0)
        if callable(reply):
            return reply(self)
        pieces = [{"message": {"content": c}, "done": False} for c in reply]
        pieces.append({"message": {"content": ""}, "done": True})
        self.send("".join(json.dumps(p) + "\n" for p in pieces).encode())


class TestInstructionData(InFolder):
    def setUp(self):
        super().setUp()
        self.tokenizer = gpt.load_tokenizer("bytes")

    def read(self, text, name="records.json"):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return instruct.read_records(name)

    def test_collate_gives_the_documented_example(self):
        inputs, targets = instruct.custom_collate_fn([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
        self.assertEqual(inputs.tolist(), [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256],
                                           [7, 8, 9, 50256, 50256]])
        self.assertEqual(targets.tolist(), [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100],
                                            [8, 9, 50256, -100, -100]])

    def test_an_end_of_text_inside_a_record_is_not_padding(self):
        _, targets = instruct.custom_collate_fn([[1, 9, 9, 2], [3]], pad_token_id=9)
        self.assertEqual(targets.tolist(), [[9, 9, 2, 9], [9, -100, -100, -100]])

    def test_masking_and_cutting_leave_each_row_a_target(self):
        rows = [[1, 2, 3, 4, 5, 6], [7, 8]]
        _, targets = instruct.custom_collate_fn(rows, 0, prompt_lengths=[4, 1])
        self.assertEqual(targets.tolist(), [[-100, -100, -100, 5, 6, 0],
                                            [8, 0, -100, -100, -100, -100]])
        for length in range(1, 7):
            _, targets = instruct.custom_collate_fn(rows, 0, -100, length, prompt_lengths=[5, 2])
            self.assertEqual(targets.shape[1], length)
            self.assertTrue((targets != -100).any(dim=1).all())

    def test_prompts_are_the_books_text(self):
        entry = {"instruction": "Add.", "input": "1, 2", "output": "3"}
        self.assertEqual(instruct.format_input(entry),
                         "Below is an instruction that describes a task. Write a response that "
                         "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                         "### Input:\n1, 2")
        self.assertEqual(instruct.format_input({**entry, "input": ""}, "phi3"), "<|user|>\nAdd.")
        dataset = instruct.InstructionDataset([entry], self.tokenizer)
        text = self.tokenizer.decode(dataset[0])
        self.assertEqual(text, instruct.format_input(entry) + "\n\n### Response:\n3")
        self.assertEqual(text[dataset.prompt_lengths[0]:], "3")

    @needs("instruction-data.json", "tiktoken")
    def test_the_books_records_split_and_encode_as_the_book_does(self):
        records = instruct.read_records(ROOT / "data" / "instruction-data.json")
        self.assertEqual([len(part) for part in instruct.split_records(records)], [935, 110, 55])
        tokenizer = tiktoken.get_encoding("gpt2")
        for entry, ids in zip(records, instruct.InstructionDataset(records, tokenizer)):
            self.assertEqual(ids, tokenizer.encode(
                instruct.format_input(entry) + "\n\n### Response:\n" + entry["output"]))

    def test_lines_and_messages_are_read_too(self):
        expected = {"instruction": "Be kind.\n\nHi", "input": "", "output": "Hello"}
        messages = {"messages": [{"role": "system", "content": "Be kind."},
                                 {"role": "user", "content": "Hi"},
                                 {"role": "assistant", "content": "Hello"}]}
        lines = json.dumps(messages) + "\n\n" + json.dumps({**expected, "input": None}) + "\n"
        self.assertEqual(self.read(lines, "records.jsonl"), [expected, expected])

    def test_bad_records_are_named(self):
        good = '{"instruction": "a", "output": "b"}'
        for text, words in [
                ('[{"instruction": "a",\n "output": }]', "line 2, column 12"),
                ("", "empty"), ("[]", "empty list"), ("{}", "no list"), ("[1]", "record 0"),
                (f'[{good}, {{"output": "b"}}]', "record 1 (the first is 0) has no instruction"),
                (f'[{good}, {{"instruction": "b"}}]', "record 1 (the first is 0) has no output"),
                (f'[{good}, {{"instruction": "a", "output": 5}}]', "its output is 5, not text"),
                ('[{"messages": [{"role": "user", "content": "a"}]}]', "messages must"),
                ("[" * 100000, "not JSON"), ("1" * 5000, "not JSON"), (b"\xff\xfe[]", "UTF-8")]:
            with self.subTest(text=text[:50]), self.assertRaises(UserError) as caught:
                self.read(text)
            self.assertIn(words, str(caught.exception))
        with self.assertRaisesRegex(UserError, "line 3, column 1"):
            self.read(f"{good}\n\nx\n", "records.jsonl")
        with self.assertRaisesRegex(UserError, "nothere.json cannot be read"):
            instruct.read_records("nothere.json")

    def test_an_epoch_has_each_record_once_in_batches_of_like_length(self):
        lengths = np.random.default_rng(0).integers(20, 100, size=935)
        settings = {"seed": 1, "batch_size": 8, "grad_accum": 1}
        plan = instruct.plan_epoch(0, lengths, settings)
        self.assertEqual(len(plan), 117)
        self.assertEqual(sorted(np.concatenate(plan)), list(range(935)))
        padded = sum(len(rows) * max(lengths[rows]) for rows in plan)
        self.assertLess(padded, 1.05 * lengths.sum())
        again = instruct.plan_epoch(0, lengths, settings)
        self.assertTrue(all((a == b).all() for a, b in zip(plan, again)))
        other = instruct.plan_epoch(1, lengths, settings)
        self.assertFalse(all(set(a) == set(b) for a, b in zip(plan, other)))


class TestInstructionTraining(InFolder):
    def setUp(self):
        super().setUp()
        self.tokenizer = gpt.load_tokenizer("bytes")
        self.model = tiny_model(context_length=64)
        gpt.save_checkpoint("tiny.pt", self.model, self.tokenizer)
        Path("records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
        self.settings = {"batch_size": 8, "grad_accum": 1, "seed": 0, "mask_prompt": True,
                         "pad_token_id": 256, "context_length": 64, "dtype": "float32"}
        self.dataset = instruct.InstructionDataset(RECORDS, self.tokenizer, "phi3")

    def run_script(self, *argv, expect=0):
        status, out, err = call(instruct.main, "--init", "tiny.pt", "--data", "records.json",
                                "--prompt-style", "phi3", "--dtype", "float32", "--lr", "0.01",
                                "--max-new-tokens", "8", *argv)
        self.assertEqual(status, expect, out + err)
        return out if expect == 0 else err

    def test_unequal_micro_batches_equal_one_batch(self):
        gradients = []
        for batch_size in (8, 3):
            self.model.zero_grad()
            loss = instruct.accumulate_gradients(
                self.model, self.dataset, np.arange(8), {**self.settings, "batch_size": batch_size},
                "cpu")
            gradients.append([loss, *(p.grad.clone() for p in self.model.parameters())])
        torch.testing.assert_close(*gradients)

    def test_a_tied_embedding_gets_the_gradients_of_head_and_lookup(self):
        model = tiny_model(context_length=64, tie_embeddings=True)
        [(_, inputs, targets)] = instruct.make_batches(self.dataset, range(8), self.settings,
                                                       "cpu", True)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        for batch_size in (8, 3):
            model.zero_grad()
            instruct.accumulate_gradients(model, self.dataset, np.arange(8),
                                          {**self.settings, "batch_size": batch_size}, "cpu")
            torch.testing.assert_close([p.grad for p in model.parameters()], expected)

    def test_the_loss_is_that_of_the_answer_tokens_alone(self):
        losses = instruct.record_losses(self.model, self.dataset, self.settings, "cpu", True)
        for i in (0, 3, 4):  # the fourth answer is empty: its end of text is still a target
            prompt = self.tokenizer.encode(instruct.format_input(RECORDS[i], "phi3")
                                           + "\n<|assistant|>\n")
            answer = [*self.tokenizer.encode(RECORDS[i]["output"]), 256]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                log_probs = self.model(ids[:, :-1])[0].log_softmax(dim=-1)
            expected = -sum(log_probs[len(prompt) - 1 + k, t] for k, t in enumerate(answer))
            self.assertAlmostEqual(float(losses[i, 0]), float(expected), places=3)
            self.assertEqual(int(losses[i, 1]), len(answer))

    def test_a_packed_batch_equals_padded_rows(self):
        for prompt_lengths in (self.dataset.prompt_lengths[:6], None):
            rows = [self.dataset[i] for i in range(6)]
            inputs, targets = instruct.custom_collate_fn(rows, 256, prompt_lengths=prompt_lengths)
            gradients = []
            for packed in (True, False):
                self.model.zero_grad()
                loss = (instruct.calc_losses(self.model, inputs, targets).sum() if packed else
                        F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(),
                                        reduction="sum"))
                loss.backward()
                gradients.append([loss.detach(), *(p.grad for p in self.model.parameters())])
                self.model.zero_grad(set_to_none=True)
            torch.testing.assert_close(*gradients)

    def test_long_records_make_smaller_batches(self):
        settings = {**self.settings, "batch_size": 5, "context_length": 1024}
        dataset = [[1] * 50] * 7 + [[1] * 1024] * 9 + [[1] * 5000]
        parts = instruct.make_batches(dataset, np.arange(17), settings, "cpu", False)
        self.assertEqual([len(rows) for rows, _, _ in parts], [5, 5, 4, 3])
        self.assertEqual([i for rows, _, _ in parts for i in rows], list(range(17)))
        self.assertEqual(instruct.make_batches(dataset, [], settings, "cpu", False), [])

    def test_a_killed_run_resumed_equals_one_that_was_not(self):
        class Killed(BaseException):
            pass

        for train in ("all", "lora"):
            args = ["--no-responses", "--eval-every", "2", "--epochs", "2", "--grad-accum", "2",
                    "--batch-size", "4", "--train", train]
            self.run_script(*args, "--out", f"{train}-a.pt")
            real, calls = instruct.accumulate_gradients, []

            def die_later(*arguments):
                calls.append(1)
                if len(calls) == 6:
                    raise Killed
                return real(*arguments)

            with mock.patch.object(instruct, "accumulate_gradients", die_later):
                with self.assertRaises(Killed):
                    self.run_script(*args, "--out", f"{train}-b.pt")
            out = self.run_script(*args, "--out", f"{train}-b.pt", "--resume")
            self.assertIn("from step 4", out)
            a, b = (torch.load(f"{train}-{x}.pt", weights_only=True) for x in "ab")
            for part in ("model", "unmerged", "optimizer", "best", "step"):
                torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
            self.assertEqual(*(Path(f"{train}-{x}.csv").read_text(encoding="utf-8") for x in "ab"))
            start = torch.load("tiny.pt", weights_only=True)["model"]
            self.assertFalse(torch.equal(a["model"]["trf_blocks.0.ff.layers.0.weight"],
                                         start["trf_blocks.0.ff.layers.0.weight"]))

    def test_lora_begins_with_no_change_and_merges_into_the_same_function(self):
        ids = torch.randint(0, 257, (2, 9))
        with torch.no_grad():
            before = self.model(ids)
            instruct.add_lora(self.model, {"lora_rank": 4, "lora_alpha": 8})
            self.assertTrue(torch.equal(self.model(ids), before))
            for name, p in self.model.named_parameters():
                self.assertEqual(p.requires_grad, ".lora." in name)
                if name.endswith(".lora.B"):
                    p.normal_(std=0.1)
            merged = instruct.plain_model(self.model)
            self.assertEqual(set(merged.state_dict()), set(tiny_model().state_dict()))
            torch.testing.assert_close(merged(ids), self.model(ids), rtol=0, atol=1e-5)
            self.assertGreater(float((merged(ids) - before).abs().max()), 0.01)

    def test_answers_in_batches_are_those_of_one_prompt_alone(self):
        for seed in range(2):
            torch.manual_seed(seed)
            self.model = GPTModel(self.model.cfg).eval()
            # About one token in ten is the end, so that rows end at different places.
            self.model.out_head.weight.data[256] += 0.07 * self.model.out_head.weight.data.sum(0)
            together = [dict(record) for record in RECORDS[:16]]
            instruct.generate_responses(self.model, self.tokenizer, together, "phi3", 20, 5)
            for entry in together:
                prompt = gpt.text_to_token_ids(
                    instruct.format_input(entry, "phi3") + "\n<|assistant|>\n", self.tokenizer)
                steps = min(20, 64 - prompt.shape[1])
                new = generate_text_simple(self.model, prompt, steps, 64)[0, prompt.shape[1]:]
                new = new.tolist()
                new = new[:new.index(256)] if 256 in new else new
                self.assertEqual(entry["model_response"], self.tokenizer.decode(new).strip())

    def test_a_run_answers_scores_and_is_asked(self):
        out = self.run_script("--out", "i.pt", "--epochs", "3")
        entries = json.loads(Path("i-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["output"] for e in entries], [r["output"] for r in RECORDS[25:28]])
        self.assertTrue(all(isinstance(e["model_response"], str) for e in entries))
        scores = json.loads(Path("i-scores.json").read_text(encoding="utf-8"))
        self.assertAlmostEqual(scores["perplexity"], math.exp(scores["response_loss"]))
        self.assertIn(f"token F1 {scores['token_f1']:.3f}", out)
        status, out, _ = call(instruct.main, "--out", "i.pt", "--ask", entries[0]["instruction"],
                              "--input", entries[0]["input"], "--dtype", "float32")
        self.assertEqual((status, out.strip()), (0, entries[0]["model_response"]))
        with mock.patch("builtins.input", side_effect=["Say one", "x" * 99, "/reset", EOFError]):
            with mock.patch.object(sys, "stdin", mock.Mock()):
                status, out, _ = call(instruct.main, "--out", "i.pt", "--chat")
        self.assertEqual(status, 0)
        self.assertIn("no room for an answer in the context of 64", out)

    def test_token_f1_written_out(self):
        self.assertAlmostEqual(instruct.token_f1("The cat sat.", "the cat sat down"), 6 / 7)
        self.assertEqual(instruct.token_f1("a a", "b"), 0.0)
        self.assertEqual(instruct.token_f1("", "b"), 0.0)
        self.assertEqual(instruct.token_f1("?", "?"), 1.0)

    def test_records_longer_than_the_context_are_counted(self):
        records = RECORDS + [{"instruction": "x" * 60, "input": "", "output": "y"},
                             {"instruction": "x" * 20, "input": "", "output": "y" * 60}] * 10
        Path("records.json").write_text(json.dumps(records), encoding="utf-8")
        out = self.run_script("--out", "i.pt", "--max-steps", "1")
        self.assertIn("10 lose the end of the answer, 10 have no room", out)
        Path("records.json").write_text(json.dumps(records[30:31] * 9), encoding="utf-8")
        self.assertIn("at least one of each", self.run_script("--out", "j.pt", expect=1))

    def test_wrong_use_is_one_sentence(self):
        for argv, status, words in [
                (["--input", "x"], 2, "goes with --ask"), (["--chat", "--ask", "x"], 2, "not"),
                (["--judge", "x", "--no-responses"], 2, "nothing to judge"),
                (["--ask", "x", "--out", "none.pt"], 1, "no checkpoint none.pt to talk to"),
                (["--ask", "x" * 99, "--out", "tiny.pt"], 1, "ask it shorter"),
                (["--init", "records.json"], 1, "not a checkpoint"), ([], 1, "load_gpt2.py"),
                (["--out", "tiny.pt", "--resume", "--data", "records.json", "--prompt-style",
                  "phi3"], 1, "not a run of finetune_instruct.py"),
                (["--judge", "x", "--judge-url", "http://localhost:1"], 1, "ollama serve"),
                (["--judge", "x", "--judge-url", "nonsense"], 1, "is not an address")]:
            with self.subTest(argv=argv):
                actual, out, err = call(instruct.main, *argv)
                self.assertEqual(actual, status, out + err)
                self.assertIn(words, err)
                self.assertEqual(err.strip().count("\n"), 0)

    def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(self):
        self.run_script("--out", "i.pt", "--max-steps", "2", "--no-responses")
        before = Path("i.pt").read_bytes()
        with mock.patch.object(instruct, "accumulate_gradients", return_value=math.nan):
            err = self.run_script("--out", "i.pt", "--resume", "--no-responses", expect=1)
        self.assertIn("the loss is nan at step 3", err)
        with mock.patch.object(instruct, "mean_loss", return_value=math.nan):
            err = self.run_script("--out", "i.pt", "--resume", "--no-responses", expect=1)
        self.assertIn("the validation loss is nan at step", err)
        self.assertEqual(Path("i.pt").read_bytes(), before)

    def test_test_records_that_all_exceed_the_context_have_answers_but_no_loss(self):
        records = [{**r, "instruction": "x" * 99} if 25 <= i < 28 else r
                   for i, r in enumerate(RECORDS)]
        Path("records.json").write_text(json.dumps(records), encoding="utf-8")
        out = self.run_script("--out", "i.pt", "--max-steps", "1")
        self.assertIn("3 answers: exact match", out)
        scores = json.loads(Path("i-scores.json").read_text(encoding="utf-8"))
        self.assertIsNone(scores["response_loss"])


class TestJudge(InFolder):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("localhost", 0), FakeOllama)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.base = f"http://localhost:{self.server.server_port}"
        self.url = self.base + "/api/chat"
        FakeOllama.replies, FakeOllama.questions = [], []

    def test_the_question_is_the_books_and_the_first_integer_counts(self):
        FakeOllama.replies[:] = ["87", "Score: 40/100", "very good", "1000"]
        entries = [{"instruction": "Add.", "input": "", "output": "3", "answer": f"{i}"}
                   for i in range(4)] + [{"instruction": "", "output": "", "answer": ""}]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            scores = instruct.generate_model_scores(entries, "answer", url=self.url)
        self.assertEqual(scores, [87, 40, 0])
        self.assertIn("'very good'", out.getvalue())
        self.assertIn("2 of 5 replies", out.getvalue())
        question = FakeOllama.questions[0]
        self.assertEqual(question["options"], {"seed": 123, "temperature": 0, "num_ctx": 2048})
        self.assertEqual(question["messages"][0]["content"],
                         f"Given the input `{instruct.format_input(entries[0])}` and correct "
                         "output `3`, score the model response `0` on a scale from 0 to 100, where "
                         "100 is the best score. Respond with the integer number only.")

    def test_each_failure_is_a_sentence(self):
        def drop(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"message": {"content": "8"}, "done": false}\n')

        for reply, words in [
                (lambda h: time.sleep(1), "sent nothing for 0.3 s"), (drop, "broke off"),
                (lambda h: h.send(b'{"message": {"content": "8"}}\n'), "broke off"),
                (lambda h: h.send(b'{"error": "out of memory"}', 500), "reports: out of memory"),
                (lambda h: h.send(b'{"message": \n'), "no answer of Ollama"),
                (lambda h: h.send(b"[1]\n"), "no answer of Ollama"),
                (lambda h: h.send(b"<html>", 502), "<html>")]:
            FakeOllama.replies[:] = [reply]
            with self.subTest(words), self.assertRaisesRegex(UserError, words):
                instruct.query_model("?", url=self.url, timeout=0.3)
        with self.assertRaisesRegex(UserError, "ollama pull phi3 .it has: llama3:latest"):
            instruct.find_judge("phi3", self.url)

    def test_a_failure_loses_no_answer_and_no_score(self):
        model = tiny_model(context_length=64)
        model.final_norm.shift.data.fill_(1.0)
        model.out_head.weight.data[65] = 5.0  # it answers AAA
        gpt.save_checkpoint("tiny.pt", model, gpt.load_tokenizer("bytes"))
        Path("records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
        args = ["--init", "tiny.pt", "--data", "records.json", "--prompt-style", "phi3", "--out",
                "i.pt", "--max-steps", "1", "--max-new-tokens", "3", "--lr", "1e-6", "--judge",
                "llama3", "--judge-url", self.base]
        FakeOllama.replies[:] = ["11", lambda h: h.send(b'{"error": "out of memory"}', 500)]
        status, _, err = call(instruct.main, *args)
        self.assertEqual(status, 1)
        self.assertIn("out of memory", err)
        first = json.loads(Path("i-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e.get("judge", {}).get("score") for e in first], [11, None, None])
        self.assertEqual([e["model_response"] for e in first], ["AAA"] * 3)
        FakeOllama.replies[:] = ["22", "33"]
        status, out, err = call(instruct.main, *args, "--resume")
        self.assertEqual(status, 0, err)
        self.assertIn("22.00 of 100, mean of 3 of 3", out)
        second = json.loads(Path("i-responses.json").read_text(encoding="utf-8"))
        self.assertEqual([e["judge"]["score"] for e in second], [11, 22, 33])


# ---------------------------------------------------------------------------------------------
# All scripts

class TestScripts(unittest.TestCase):
    def test_every_script_answers_help(self):
        for script in ("gpt", "tokenizer", "pretrain", "load_gpt2", "finetune_classifier",
                       "finetune_instruct"):
            done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--help"],
                                  capture_output=True, text=True, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, ""), script)
            self.assertIn("usage:", done.stdout)

    def test_a_stage_imports_nothing_of_ours_but_gpt(self):
        ours = {path.stem for path in ROOT.glob("*.py")} - {"gpt"}
        for script in ROOT.glob("*.py"):
            if script.name == "test_all.py":
                continue
            code = script.read_text(encoding="utf-8")
            words = re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE)
            self.assertFalse(ours & set(words), script.name)


if __name__ == "__main__":
    unittest.main()
