"""Text to token IDs: word by word, then byte-pair encoding, trained and used from scratch.

    python tokenizer.py                                    a walk from words to byte pairs
    python tokenizer.py train --stories                    learn a vocabulary from stories
    python tokenizer.py train my_texts/ --vocab-size 1024 --out checkpoints/my.tiktoken
    python tokenizer.py encode --tokenizer checkpoints/my.tiktoken "It was not till later"

A model computes with numbers. So a text is cut into tokens, words or parts of words, and each token
has a number, its ID. All tokens with their IDs are the vocabulary. What a model writes are IDs
again; the same vocabulary turns them into text.

Follows *Build a Large Language Model (From Scratch)*, chapter 2. Byte-pair encoding: Gage 1994; for
words, Sennrich et al. 2016 (arXiv 1508.07909); on bytes, GPT-2 (Radford et al. 2019).
"""

import heapq
import shlex
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import chain, cycle, islice, pairwise
from pathlib import Path

from gpt import (
    END_OF_TEXT, GPT2_SPLIT_PATTERN, ArgumentParser, argument, find_files, find_stories,
    load_tokenizer, name, path, progress, ranks_to_text, read_gpt2_ranks, read_pieces,
    read_rank_file, run_main, say, write_atomically)

import regex  # like re, but knows \p{L}, any letter

UNKNOWN = "<|unk|>"  # in place of an unknown word; END_OF_TEXT, "<|endoftext|>", divides documents
BYTES = {bytes([i]): i for i in range(256)}  # the first 256 tokens, each with its ID


# ---------------------------------------------------------------------------------------------
# Words. The plainest tokenizer: a token is a word or a punctuation mark. Book sections 2.2 to 2.4.

def split_words(text):
    """Cut a text into words and marks: "Is this-- true?" -> ['Is', 'this', '--', 'true', '?']."""
    # The ( ) keep the marks that split; `if` drops white space and empty strings.
    return [w for w in regex.split(r"""([,.:;?_!"()']|--|\s)""", text) if w.strip()]


def build_vocab(text, special_tokens=(END_OF_TEXT, UNKNOWN)):
    """Number the distinct words of `text` in sorted order, then the special tokens: {word: ID}."""
    words = sorted(set(split_words(text)) - set(special_tokens))
    return {word: i for i, word in enumerate([*words, *special_tokens])}


class SimpleTokenizerV1:
    """Words to IDs and back, for the words of `vocab` ({word: ID}) only. Book section 2.3."""

    def __init__(self, vocab):
        self.str_to_int = vocab
        self.int_to_str = {i: s for s, i in vocab.items()}

    def encode(self, text):
        """Text -> list of IDs. Raises KeyError with the first word that `vocab` does not hold."""
        return [self.str_to_int[word] for word in split_words(text)]

    def decode(self, ids):
        """IDs -> text: words with a space between, none before a mark. Raises KeyError."""
        text = " ".join(self.int_to_str[i] for i in ids)
        return regex.sub(r"""\s+([,.:;?!"()'])""", r"\1", text)


class SimpleTokenizerV2(SimpleTokenizerV1):
    """The same, but an unknown word becomes `<|unk|>`, which `vocab` must hold. Section 2.4."""

    def encode(self, text):
        """Text -> list of IDs. It never fails, but all unknown words become the same ID."""
        unknown = self.str_to_int[UNKNOWN]
        return [self.str_to_int.get(word, unknown) for word in split_words(text)]


# ---------------------------------------------------------------------------------------------
# Byte pairs. A word list never holds every word; single bytes spell everything, but at great
# length. Byte-pair encoding lies in between, and grows its own vocabulary: start with the 256
# bytes; find the pair of neighbouring tokens that occurs most often; make it a new token; repeat.
# Frequent words end up as one token, rare ones as a few, and any text at all can be spelled.
#
# Among equally frequent pairs, the pair with the smallest IDs wins. On "aaabdaaabac":
#     a a a b d a a a b a c       'aa' occurs most often, 4 times (overlaps count): call it Z
#     Z a b d Z a b a c           'ab' and 'Za' occur twice; 'ab' has the smaller IDs: Y
#     Z Y d Z Y a c               'ZY' twice: X
#     X d X a c                   every pair occurs once: little left to gain

def merge_pair(tokens, pair, new):
    """The list of tokens with `new` for each `pair` of neighbours, from left to right."""
    merged = []
    i = 0
    while i < len(tokens):
        found = tuple(tokens[i:i + 2]) == pair
        merged.append(new if found else tokens[i])
        i += 2 if found else 1
    return merged


def merge_once(ids, new_id):
    """One step, straight from the definition -> (best pair, its count, IDs with it merged).

    Example:
        merge_once(list(b"aaabdaaabac"), 256)
        # ((97, 97), 4, [256, 97, 98, 100, 256, 97, 98, 97, 99])
    """
    counts = Counter(pairwise(ids))
    best = min(counts, key=lambda pair: (-counts[pair], pair))  # highest count, then smallest IDs
    return best, counts[best], merge_pair(ids, best, new_id)


def train_simple(text, num_merges):
    """The simplest trainer: a loop -> (merges [((left, right), count)], the text's IDs)."""
    ids = list(text.encode("utf-8"))  # UTF-8 writes each character as one to four bytes
    merges = []
    while len(ids) > 1 and len(merges) < num_merges:
        pair, count, ids = merge_once(ids, 256 + len(merges))
        merges.append((pair, count))
    return merges, ids


# ---------------------------------------------------------------------------------------------
# Chunks. A token like "dog." or "the cat" would waste the vocabulary on chance neighbours, so GPT-2
# first cuts text into chunks and never merges across them. Its pattern (in gpt.py), cut at each |,
# with [ ] for a space:
#
#     '(?:[sdmt]|ll|ve|re)     the ending of a contraction:   's  'd  'm  't  'll  've  're
#     [ ]?\p{L}+               letters, and the space before:  "the"  " cat"
#     [ ]?\p{N}+               digits, and the space before:   " 1908"
#     [ ]?[^\s\p{L}\p{N}]+     other signs, and the space:     "..."  " ("
#     \s+(?!\S)                white space: all of it at the end of the text; before a word all but
#                              the last character, which is left for " cat"
#     \s+                      white space that is left: a line break or tab before text
#
# Equal chunks merge equally, so training needs only the distinct ones, with their counts.

def count_chunks(text):
    """Text -> {chunk as UTF-8 bytes: how often}. `<|endoftext|>` divides documents."""
    found = Counter()
    for document in text.split(END_OF_TEXT):
        found.update(regex.findall(GPT2_SPLIT_PATTERN, document))

    # Chunks of over 10,000 characters, such as rows of spaces, would take long and are left out.
    return {chunk.encode("utf-8"): n for chunk, n in found.items() if len(chunk) <= 10_000}


# ---------------------------------------------------------------------------------------------
# The fast trainer. Where `merge_once` looks at everything, this one visits only the chunks that
# hold the best pair: 8,192 tokens from 1.4 MB take less than a second. Here a token is one
# character, chr(ID), and a chunk is a string of them, because Python is fast at finding and
# replacing in strings. `tokens` gives the bytes of each character.

def learn_merges(chunk_counts):
    """{chunk as bytes: how often} -> (left, right, count) per new token, most frequent first."""
    tokens = {chr(i): token for token, i in BYTES.items()}
    chunks = [chunk.decode("latin-1") for chunk in chunk_counts]  # latin-1: byte i becomes chr(i)
    weights = list(chunk_counts.values())

    # Count each pair, and note which chunks hold it. A heap gives its smallest entry first. We want
    # the largest count, so it holds negative counts.
    counts, places = defaultdict(int), defaultdict(list)
    for n, chunk in enumerate(chunks):
        for pair in map("".join, pairwise(chunk)):
            counts[pair] += weights[n]
            places[pair].append(n)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)

    while queue and queue[0][0]:  # until no pair is left that occurs
        # The best pair comes first. Other merges may have lowered its count since it was queued;
        # then it is queued again with the true one.
        count, pair = heapq.heappop(queue)
        if counts[pair] != -count:
            heapq.heappush(queue, (-counts[pair], pair))
            continue

        left, right = pair
        new = chr(len(tokens))
        tokens[new] = tokens[left] + tokens[right]
        yield tokens[left], tokens[right], -count

        # Merge it in its chunks, and correct the counts around it. If "ab" becomes N, then "xaby"
        # becomes "xNy": the pairs "xa" and "by" lose one, "xN" and "Ny" gain one.
        arose = set()
        for n in places.pop(pair):  # some no longer hold it: `while` skips them
            while pair in chunks[n]:
                before, _, after = chunks[n].partition(pair)
                chunks[n] = before + new + after
                x, y = before[-1:], after[:1]
                for old, fresh in ((x + left, x + new), (right + y, new + y)):
                    if len(old) == 2:  # at an end of the chunk there is no neighbour
                        counts[old] -= weights[n]
                        counts[fresh] += weights[n]
                        places[fresh].append(n)
                        arose.add(fresh)

        del counts[pair]
        for fresh in arose:
            heapq.heappush(queue, (-counts[fresh], fresh))


# ---------------------------------------------------------------------------------------------
# The tokenizer. All it needs is a rank per token: the order in which tokens were made. Encoding
# replays it: of all neighbours in a chunk, those that form the token of lowest rank merge first.

class BPETokenizer:
    """Byte-level byte-pair encoding: `decode(encode(text)) == text` for any text. Section 2.5.

    A new one knows the 256 bytes; `train`, `load` and `from_gpt2` give it a vocabulary. A token's
    ID is its rank. `<|endoftext|>` comes last, with the ID `eot_token`; `n_vocab` counts them all.
    """

    def __init__(self, ranks=None, name="bpe"):
        # Named as in tiktoken, OpenAI's tokenizer library, so that gpt.py can use either.
        self.name = name if ranks else "bytes"
        self._pat_str = GPT2_SPLIT_PATTERN
        self._mergeable_ranks = ranks or dict(BYTES)
        self.eot_token = len(self._mergeable_ranks)
        self.n_vocab = self.eot_token + 1
        self._tokens = {rank: token for token, rank in self._mergeable_ranks.items()}
        self._tokens[self.eot_token] = END_OF_TEXT.encode()
        self._encode_chunk.cache_clear()  # train() calls __init__ again: forget the old IDs

    def train(self, text, vocab_size):
        """Learn from a text, or its `count_chunks`, until there are `vocab_size` tokens (> 256)."""
        counts = count_chunks(text) if isinstance(text, str) else text
        ranks = dict(BYTES)
        # 257 tokens are not learned: the bytes and `<|endoftext|>`.
        for left, right, _ in islice(learn_merges(counts), vocab_size - 257):
            ranks[left + right] = len(ranks)  # each merge makes the token of the next rank
        self.__init__(ranks)

    def encode(self, text, allowed_special=frozenset(), disallowed_special=()):
        """Text -> list of token IDs.

        `<|endoftext|>` in the text becomes its token if `allowed_special`, a set or "all", holds
        it; else it is plain text. `disallowed_special` is there for calls written for tiktoken.
        """
        special = allowed_special == "all" or END_OF_TEXT in allowed_special
        ids = []
        for i, part in enumerate(text.split(END_OF_TEXT) if special else [text]):
            ids += [self.eot_token] if i else []
            for chunk in regex.findall(self._pat_str, part):
                ids += self._encode_chunk(chunk)
        return ids

    @lru_cache(1 << 16)  # chunks repeat: the IDs of recent ones are remembered
    def _encode_chunk(self, chunk):
        """The IDs of a chunk: merge the pair that makes the token of lowest rank; repeat."""
        ranks, tokens = self._mergeable_ranks, [bytes([byte]) for byte in chunk.encode("utf-8")]
        while True:
            pairs = [pair for pair in pairwise(tokens) if pair[0] + pair[1] in ranks]
            if not pairs:
                return [ranks[token] for token in tokens]
            best = min(pairs, key=lambda pair: ranks[pair[0] + pair[1]])
            tokens = merge_pair(tokens, best, best[0] + best[1])

    def decode_bytes(self, ids):
        """IDs -> bytes. Raises KeyError for an ID that is not there."""
        return b"".join(self._tokens[i] for i in ids)

    def decode(self, ids):
        """IDs -> text. A token may hold part of a character: it becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write a rank file, as tiktoken has it: in each line a token and its rank.

        `gpt.load_tokenizer(path)` reads it, too. A write that fails leaves an old file as it was.
        """
        with write_atomically(path) as part:
            part.write_text(ranks_to_text(self._mergeable_ranks), encoding="utf-8")

    @classmethod
    def load(cls, path):
        """A tokenizer from a rank file. Raises UserError for one that is missing or broken."""
        return cls(read_rank_file(path))

    @classmethod
    def from_gpt2(cls, vocab_bpe=None, encoder_json=None):
        """GPT-2's vocabulary from the file `vocab_bpe`, downloaded if not given. Raises UserError.

        OpenAI's second file, `encoder_json`, is not needed: the order of the merges gives the IDs.
        """
        return cls(read_gpt2_ranks(vocab_bpe), "gpt2")


# The same by hand, in Python:
#     from tokenizer import BPETokenizer
#     tokenizer = BPETokenizer()
#     tokenizer.train(open("README.md", encoding="utf-8").read(), vocab_size=1000)
#     ids = tokenizer.encode("A token is a word or a part of one.")
#     print(ids, [tokenizer.decode([i]) for i in ids])
#     tokenizer.save("checkpoints/readme.tiktoken")
#
# Try it:
# 1. The same word can be different tokens. What makes the difference?
#        python tokenizer.py encode "bread Bread BREAD bread"
# 2. With four times the vocabulary, is a text four times as short? Try 300, 1200 and 4800.
#        python tokenizer.py train --stories --vocab-size 300 --out checkpoints/try.tiktoken
# 3. A vocabulary is made for its text. What does this one make of other languages?
#        python tokenizer.py encode --tokenizer checkpoints/try.tiktoken "bread, Brot, хлеб"


# =============================================================================================
# The lesson ends here. What follows: the walk, and the commands train and encode.
# =============================================================================================

def show(tokenizer, ids):
    """IDs -> their tokens in lines of 79 columns: in colours on a terminal, else a | after each."""
    shown, column = "", 0
    for i, colour in zip(ids, cycle((153, 222, 157, 218, 189))):  # pastel, behind black letters
        text = tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace")
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a line break: \n

        if column and column + len(text) > 78:
            shown, column = shown + "\n", 0
        column += len(text) + 1
        shown += f"\x1b[30;48;5;{colour}m{text}\x1b[0m" if sys.stdout.isatty() else f"{text}|"
    return shown


def walk():
    """A sentence as words, then as tokens of byte pairs, which are learned before your eyes."""
    story = ("The baker bakes brown bread before the break of day. The brown bread is better than "
             "the bread of the other bakers. 'Do bakers bake better bread by day?' the other "
             "bakers ask. 'The better baker bakes by the break of day,' the baker says.")
    sentence = "The baker bakes better pancakes."

    print("1. Words. Number the words and marks of a story, and a text becomes numbers.\n")
    say("story", story)
    words = SimpleTokenizerV2(build_vocab(story))
    for text in ("The baker bakes better bread.", sentence):
        ids = words.encode(text)
        print(f"\ntext     {text}\nIDs      {ids}\ndecoded  {words.decode(ids)}")

    print("\n2. Byte pairs. No word list holds every word, but 256 bytes spell everything.\n"
          "   Join the most frequent pair of neighbours into a new token, and repeat:\n")
    for i, (left, right, count) in zip(range(256, 268), learn_merges(count_chunks(story))):
        print(f"   {i}  {str(left)[1:]:>8s} + {str(right)[1:]:6s} seen {count} times")

    print("\n3. No word is unknown now, and a larger vocabulary needs fewer tokens for it:\n\n"
          " known  used  the sentence")
    tokenizer = BPETokenizer()
    for size in (257, 269, 289, 309):
        tokenizer.train(story, size)
        ids = tokenizer.encode(sentence)
        print(f"{size:6,}  {len(ids):4d}  {show(tokenizer, ids)}")

    print("\nGPT-2 learned 50,257 tokens from 40 GB of web pages, in just this way.\n\nNext:\n"
          f'  python tokenizer.py encode "{sentence}"\n  python tokenizer.py train --stories')


def train(args):
    """Learn from nine tenths of the text, save, and measure on the rest -> the tokenizer."""
    files = [find_stories()] if args.stories else find_files(args.files)
    out = args.out or Path("checkpoints", "stories.tiktoken" if args.stories else "my.tiktoken")
    if out.exists():
        read_rank_file(out)  # a file that is something else is not overwritten

    # The last tenth is held out, to measure on text that the training has not seen. A .jsonl file is
    # more than its texts: only a first reading tells how long they are.
    total = 0
    for file in files:
        is_text = file.suffix.lower() != ".jsonl"
        total += (file.stat().st_size if is_text else
                  sum(len(piece.encode("utf-8")) for piece in read_pieces(file)))
    size = max(256, min(total // 100, 1 << 18))
    learned, held_out, done = Counter(), Counter(), 0
    for piece in chain.from_iterable(read_pieces(file, size) for file in files):
        counts = learned if done < 0.9 * total else held_out
        counts.update(count_chunks(piece))
        done += len(piece.encode("utf-8"))
        progress(f"counting, {len(learned):,} different chunks so far")

    tokenizer = BPETokenizer()
    tokenizer.train(learned, args.vocab_size)
    tokenizer.save(out)
    say("trained", f"{tokenizer.n_vocab:,} tokens -> {out}")

    num_bytes = sum(n * len(chunk) for chunk, n in held_out.items())
    num_tokens = sum(n * len(tokenizer.encode(chunk.decode())) for chunk, n in held_out.items())
    if num_tokens:
        say("held out", f"{num_bytes / num_tokens:.2f} bytes per token (1 without merges)")

    words = ["--preset", "stories"] if args.stories else ["--data", *map(str, args.files)]
    print(f"\nNext:\n  python pretrain.py {shlex.join([*words, '--tokenizer', str(out)])}")
    return tokenizer


def main(argv=None):
    """The walk without a command, else train (returns the tokenizer) or encode (the IDs)."""
    parser = ArgumentParser(description="Text to token IDs. Without a command: a walk.")
    commands = parser.add_subparsers(dest="command", metavar="train | encode")

    arg = commands.add_parser("train", help="learn a vocabulary from texts").add_argument
    size = argument(int, "a whole number of 257 or more", lambda n: n >= 257)
    arg("files", nargs="*", type=path, metavar="FILE", help="UTF-8 text, or a folder of texts")
    arg("--stories", action="store_true", help="learn from TinyStories, which is fetched once")
    arg("--vocab-size", type=size, default=4096, help="tokens to have, the 256 bytes included")
    arg("--out", type=path, help="rank file; else checkpoints/my.tiktoken or stories.tiktoken")

    arg = commands.add_parser("encode", help="show a text as tokens").add_argument
    arg("text", help="what to encode")
    arg("--tokenizer", type=name, default="gpt2", help="gpt2, bytes, or a rank file of train")

    args = parser.parse_args(argv)
    if args.command is None:
        return walk()
    if args.command == "train":
        if args.stories == bool(args.files):
            parser.error("train needs either FILE, the text to learn from, or --stories")
        return train(args)

    tokenizer = BPETokenizer(load_tokenizer(args.tokenizer)._mergeable_ranks)
    text = args.text.encode("utf-8", "replace").decode("utf-8")  # what is not UTF-8 becomes ?
    ids = tokenizer.encode(text)
    print(*ids)
    print(show(tokenizer, ids))
    return ids


if __name__ == "__main__":
    run_main(main)
