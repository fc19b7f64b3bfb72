"""What this project guarantees, as tests a newcomer can read: python test_all.py

Everything runs offline with tiny models. A test that needs a file in data/ (the book's text,
GPT-2's vocabulary) is skipped with a reason where the file is missing. Each test compares with
something independent of our code: arithmetic written out, tiktoken, the numbers the book prints.
"""

import contextlib
import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent
os.environ["TIKTOKEN_CACHE_DIR"] = str(ROOT / "data" / "tiktoken")

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import gpt
import pretrain
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
        torch.testing.assert_close(att(x), att.out_proj(torch.cat(heads, dim=-1)))

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
        for name, text in (("b.txt", "second"), ("a.txt", "first"), ("sub/c.txt", "third"),
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
            {"batch_size": 2, "eval_batches": None, "dtype": torch.float32}, torch.device("cpu"))
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

    def test_started_from_a_checkpoint_it_keeps_model_and_tokenizer(self):
        call(pretrain.main, *SMALL_RUN, "--max-steps", 1)
        status, out, _ = call(pretrain.main, "--init", "run.pt", "--data", "text.txt",
                              "--max-steps", 2, "--out", "next.pt")
        self.assertEqual(status, 0)
        self.assertEqual(gpt.load_checkpoint("next.pt")[2]["config"],
                         gpt.load_checkpoint("run.pt")[2]["config"])

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
            ("--data", "folder"): "no files",
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


class TestScripts(unittest.TestCase):
    def test_help_names_every_default_and_every_script_answers(self):
        for script in ("gpt.py", "tokenizer.py", "pretrain.py", "load_gpt2.py",
                       "finetune_classifier.py", "finetune_instruct.py"):
            done = subprocess.run([sys.executable, str(ROOT / script), "--help"],
                                  capture_output=True, text=True, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, ""), script)
            self.assertIn("usage:", done.stdout)


if __name__ == "__main__":
    unittest.main()
