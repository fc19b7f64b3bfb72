"""Text to token IDs: word by word, then byte-pair encoding, trained and used from scratch.

    python tokenizer.py                                    a walk from words to byte pairs
    python tokenizer.py train data/the-verdict.txt --vocab-size 1024 --out checkpoints/my.tiktoken
    python tokenizer.py encode --tokenizer checkpoints/my.tiktoken "It was not till later"

A model computes with numbers, so text is first turned into token IDs, and IDs into text at the end.
Follows *Build a Large Language Model (From Scratch)*, chapter 2. Byte-pair encoding: Gage 1994; for
words, Sennrich et al. 2016 (arXiv 1508.07909); on bytes, GPT-2 (Radford et al. 2019). Left out:
unigram, WordPiece, normalization.
"""

import base64
import heapq
import sys
import time
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import chain, cycle, islice, pairwise
from pathlib import Path

import regex  # like re, but knows \p{L}, any letter

from gpt import (GPT2_SPLIT_PATTERN, VOCAB_BPE, ArgumentParser, Progress, UserError,
                 load_tokenizer, positive_int, read_gpt2_ranks, read_rank_file, read_text_pieces,
                 run_main, say, write_atomically)

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"  # between documents; for unknown words
BYTES = {bytes([i]): i for i in range(256)}  # the first 256 tokens, each with its ID


# ---------------------------------------------------------------------------------------------
# Words. The plainest tokenizer: a token is a word or a punctuation mark. Book sections 2.2 to 2.4.

def split_words(text):
    """Cut a text at white space (dropped), punctuation and double hyphens (kept).

    Example:
        split_words("Hello, world. Is this-- a test?")
        # ['Hello', ',', 'world', '.', 'Is', 'this', '--', 'a', 'test', '?']
    """
    return [w for w in regex.split(r"""([,.:;?_!"()']|--|\s)""", text) if w.strip()]


def build_vocab(text, special_tokens=(END_OF_TEXT, UNKNOWN)):
    """Number the distinct words of `text` in sorted order, then the special tokens: {word: ID}."""
    words = sorted(set(split_words(text)) - set(special_tokens))
    return {word: i for i, word in enumerate([*words, *special_tokens])}


class SimpleTokenizerV1:
    """Words to IDs and back, for the words of `vocab` ({word: ID}) only. Book section 2.3.

    Example:
        tokenizer = SimpleTokenizerV1(build_vocab("the cat sat on the mat."))
        tokenizer.decode(tokenizer.encode("the mat sat."))     # 'the mat sat.'
    """

    def __init__(self, vocab):
        self.str_to_int = vocab
        self.int_to_str = {i: s for s, i in vocab.items()}

    def encode(self, text):
        """Text -> list of IDs. Raises KeyError with the first word that `vocab` does not hold."""
        return [self.str_to_int[word] for word in split_words(text)]

    def decode(self, ids):
        """IDs -> text: a space between words, none before most marks. Raises KeyError."""
        text = " ".join(self.int_to_str[i] for i in ids)
        return regex.sub(r"""\s+([,.:;?!"()'])""", r"\1", text)


class SimpleTokenizerV2(SimpleTokenizerV1):
    """The same, but an unknown word becomes `<|unk|>`, which `vocab` must hold. Section 2.4."""

    def encode(self, text):
        """Text -> list of IDs; never fails, but every unknown word becomes the same ID."""
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
    merged, i = [], 0
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
    best = min(counts, key=lambda pair: (-counts[pair], pair))
    return best, counts[best], merge_pair(ids, best, new_id)


def train_simple(text, num_merges):
    """The simplest trainer, without chunks -> (merges [((left, right), count)], the text's IDs)."""
    ids, merges = list(text.encode("utf-8")), []
    for new_id in range(256, 256 + num_merges):
        if len(ids) < 2:
            break  # nothing is left to merge
        pair, count, ids = merge_once(ids, new_id)
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
#     \s+(?!\S)                white space, without its last character if text follows
#     \s+                      white space that is left: a line break or tab before text
#
# Equal chunks merge equally, so training needs only the distinct ones, with their counts.

def count_chunks(text, counts):
    """Add the chunks of `text` to `counts`, {chunk: how often}; long ones in pieces."""
    counts.update(chunk[i:i + 1000] for chunk in regex.findall(GPT2_SPLIT_PATTERN, text)
                  for i in range(0, len(chunk), 1000))


# ---------------------------------------------------------------------------------------------
# The fast trainer. Where `merge_once` looks at everything, this one visits only the chunks that
# hold the best pair: 8,192 tokens from 1.4 MB take less than a second. It writes a token as one
# character, the one whose number is the ID, and a chunk as a string of those, because Python is
# fast at finding a pair of characters in a string and at putting another in its place.

def learn_merges(chunk_counts):
    """{chunk as bytes: how often} -> (left, right, count) per new token, most frequent first."""
    tokens = {chr(i): token for token, i in BYTES.items()}
    chunks = [chunk.decode("latin-1") for chunk in chunk_counts]  # a character for each byte
    weights = list(chunk_counts.values())

    # Count each pair, and note which chunks hold it. The queue keeps the smallest first, so counts
    # are negative in it.
    counts, places = defaultdict(int), defaultdict(list)
    for n, chunk in enumerate(chunks):
        for pair in map("".join, pairwise(chunk)):
            counts[pair] += weights[n]
            places[pair].append(n)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)

    while queue and queue[0][0]:  # until no pair is left that occurs
        # The best pair comes first; if its count fell since it was queued, queue it again.
        count, pair = heapq.heappop(queue)
        if counts[pair] != -count:
            heapq.heappush(queue, (-counts[pair], pair))
            continue

        left, right = pair
        new = chr(len(tokens))
        tokens[new] = tokens[left] + tokens[right]
        yield tokens[left], tokens[right], -count

        # Merge it in its chunks. With N for ab, "xaby" becomes "xNy": -"xa" -"by" +"xN" +"Ny".
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
    """Byte-level byte-pair encoding: `decode(encode(text)) == text` for any text.

    A new one knows the 256 bytes; `train`, `load` and `from_gpt2` give it a vocabulary. A token's
    ID is its rank; `<|endoftext|>` follows the last. The other scripts take it, too. Section 2.5.

    Example:
        tokenizer = BPETokenizer()
        tokenizer.train(open("data/the-verdict.txt", encoding="utf-8").read(), vocab_size=1000)
        ids = tokenizer.encode("I had always thought Jack Gisburn rather a cheap genius")
        tokenizer.save("checkpoints/verdict.tiktoken")
    """

    def __init__(self, ranks=None, name=None):
        # Named as in tiktoken, OpenAI's tokenizer library, so that gpt.py can use either.
        self.name = name or (f"bpe-{len(ranks) + 1}" if ranks else "bytes")
        self._pat_str = GPT2_SPLIT_PATTERN
        self._mergeable_ranks = ranks or dict(BYTES)
        self.eot_token = len(self._mergeable_ranks)
        self.n_vocab = self.eot_token + 1
        self._tokens = dict(enumerate([*self._mergeable_ranks, END_OF_TEXT.encode()]))
        self._encode_chunk.cache_clear()  # it is shared by all tokenizers; the ranks changed

    def train(self, text, vocab_size):
        """Learn a vocabulary of `vocab_size` tokens, the bytes and the end of text included.

        `text` is a str or an iterable of str, read once and never held as a whole; cut it before
        white space. A text too small gives fewer tokens and a warning on stderr. Raises UserError
        for fewer than 257 tokens, UnicodeEncodeError as `encode` does.
        """
        if vocab_size < 257:
            raise UserError(f"{vocab_size} tokens are too few; ask for at least 257")
        if vocab_size > sys.maxunicode:  # `learn_merges` has a character for each
            raise UserError(f"{vocab_size} tokens are too many; ask for at most {sys.maxunicode}")
        counts, wanted = Counter(), vocab_size - 257
        for piece in [text] if isinstance(text, str) else text:
            for part in piece.split(END_OF_TEXT):
                count_chunks(part, counts)

        # Each merge gives the token of the next rank.
        ranks, progress = dict(BYTES), Progress(wanted, "merges")
        merges = learn_merges({chunk.encode("utf-8"): n for chunk, n in counts.items()})
        for left, right, count in islice(merges, wanted):
            ranks[left + right] = len(ranks)
            progress.update(len(ranks) - 256, f"merging, now pairs seen {count:,} times")
        progress.close()
        if len(ranks) - 256 < wanted:
            print(f"too small a text: there were {len(ranks) - 256:,}, not {wanted:,} merges",
                  file=sys.stderr)
        self.__init__(ranks)

    def encode(self, text, allowed_special=frozenset(), disallowed_special=()):
        """Text -> list of token IDs. `disallowed_special` is ignored; tiktoken has it.

        `<|endoftext|>` in the text is plain text unless `allowed_special`, a set or "all", holds
        it. Raises UnicodeEncodeError for a lone surrogate, half a character, which has no UTF-8.
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
        """Write tiktoken's rank file, all or nothing; `gpt.load_tokenizer(path)` reads it too."""
        with write_atomically(path) as part:
            part.write_bytes(b"".join(b"%b %d\n" % (base64.b64encode(token), rank)
                                      for token, rank in self._mergeable_ranks.items()))

    @classmethod
    def load(cls, path):
        """A tokenizer from a rank file. Raises UserError for one that is missing or broken."""
        return cls(read_rank_file(path))

    @classmethod
    def from_gpt2(cls, vocab_bpe=None, encoder_json=None):
        """GPT-2's vocabulary from OpenAI's `vocab.bpe` (downloaded) alone. Raises UserError."""
        return cls(read_gpt2_ranks(vocab_bpe), "gpt2")


# =============================================================================================
# The lesson ends here. What follows: the walk, and the commands train and encode.
# =============================================================================================

STORY = ("The baker bakes bread before the break of day. The bread the baker bakes is brown, and "
         "the brown bread is better than the bread of the other bakers. 'Do bakers bake better "
         "bread by day?' the other bakers ask. 'The better baker bakes by the break of day,' the "
         "baker says, and takes the brown bread to the other end of the bay.")
SENTENCE = "The baker bakes better pancakes."


def show(tokenizer, ids):
    """IDs -> a line of tokens, in colours on a terminal, else with | between; odd ones escaped."""
    texts = [tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in ids]
    texts = [repr(text)[1:-1].replace(r"\\", "\\") for text in texts]
    if not sys.stdout.isatty():
        return "|".join(texts)
    colours = cycle((153, 222, 157, 218, 189))  # black on pastel, readable on any background
    return "".join(f"\x1b[30;48;5;{c}m{text}\x1b[0m" for c, text in zip(colours, texts))


def walk():
    """A sentence as words, as byte pairs learned before your eyes, and in GPT-2's vocabulary."""
    vocab = build_vocab(STORY)
    v1, v2 = SimpleTokenizerV1(vocab), SimpleTokenizerV2(vocab)
    print(f"A story of {len(STORY)} characters:\n\n  {STORY[:85]}...\n")
    print(f"1. Words and marks, {len(vocab) - 2} different ones. Number them: text is numbers.\n")
    ids = v1.encode("The baker bakes better bread.")
    print(f"  V1  The baker bakes better bread.  ->  {ids}  ->  {v1.decode(ids)}")

    print("\n  But a word list never holds every word:\n")
    try:
        v1.encode(SENTENCE)
    except KeyError as e:
        print(f"  V1  {SENTENCE}  ->  KeyError: {e}")
    ids = v2.encode(SENTENCE)
    print(f"  V2  {SENTENCE}  ->  {ids}  ->  {v2.decode(ids)}")

    print("\n2. Byte pairs. Start with the 256 bytes, which spell everything, and join the most")
    print("   frequent pair of neighbours into a new token, again and again:\n")
    counts = Counter()
    count_chunks(STORY, counts)
    merges = learn_merges({chunk.encode("utf-8"): n for chunk, n in counts.items()})
    for i, (left, right, count) in enumerate(islice(merges, 12), 256):
        print(f"  {i}  {str(left)[1:]:>8s} + {str(right)[1:]:6s} seen {count} times")

    print("\n   A space belongs to the word after it. The sentence, as the vocabulary grows:\n")
    tokenizer = BPETokenizer()
    for size in (257, 269, 289, 309):
        tokenizer.train(STORY, size)
        ids = tokenizer.encode(SENTENCE)
        print(f"  {size:6,}  {len(ids):3d} tokens  {show(tokenizer, ids)}")
    same = tokenizer.decode(ids) == SENTENCE
    print(f"\n   No word is unknown, and decoding gives back every byte: {same}")

    print("\n3. GPT-2 learned 50,000 merges from 40 GB of web pages, in just this way.\n")
    if VOCAB_BPE.exists():
        gpt2 = BPETokenizer.from_gpt2()
        ids = gpt2.encode(SENTENCE)
        print(f"  {gpt2.n_vocab:,}  {len(ids):3d} tokens  {show(gpt2, ids)}\n  {ids}")
    else:
        print(f'  To see it: python tokenizer.py encode "{SENTENCE}"')
    print("\nNext: python tokenizer.py train YOUR-TEXT.txt learns a vocabulary of your own.")


def train(files, vocab_size, out):
    """Train on the first nine tenths of the files, save, and measure on the last tenth."""
    if out.exists():
        read_rank_file(out)  # a file that is something else is not overwritten
    total = sum(path.stat().st_size for path in files)
    size = max(256, min(total // 100, 1 << 22))
    pieces = chain.from_iterable(read_text_pieces(path, size) for path in files)

    def first_part():
        done, progress = 0, Progress(total / 1e6, "MB")
        for piece in pieces:
            done += len(piece.encode("utf-8"))
            progress.update(done / 1e6, "reading")
            yield piece
            if done >= 0.9 * total:
                break
        progress.close()

    start, tokenizer = time.perf_counter(), BPETokenizer()
    tokenizer.train(first_part(), vocab_size)
    tokenizer.save(out)
    say(f"trained  {tokenizer.n_vocab:,} tokens in {time.perf_counter() - start:.1f} s -> {out}")
    words = [i for i in range(tokenizer.eot_token) if tokenizer.decode([i]).strip().isalpha()]
    longest = sorted(words, key=lambda i: -len(tokenizer.decode([i])))[:6]
    print(f"longest  {show(tokenizer, longest)}")

    # Measure on text that the training has not seen.
    num_bytes = num_tokens = 0
    for piece in pieces:
        num_bytes += len(piece.encode("utf-8"))
        num_tokens += len(tokenizer.encode(piece, allowed_special="all"))
    if num_tokens:
        say(f"held out {num_bytes:,} bytes, the last tenth: {num_tokens:,} tokens, "
            f"{num_bytes / num_tokens:.2f} bytes per token (more is better; 1 without merges)")


def main(argv=None):
    """The walk without a command, else train or encode."""
    parser = ArgumentParser(description="Text to token IDs. Without a command: a walk.")
    commands = parser.add_subparsers(dest="command", metavar="train | encode")
    arg = commands.add_parser("train", help="learn a vocabulary from text files").add_argument
    arg("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    arg("--vocab-size", type=positive_int, default=4096, help="tokens, the 256 bytes included")
    arg("--out", type=Path, default=Path("checkpoints/my.tiktoken"), help="rank file to write")
    arg = commands.add_parser("encode", help="show a text as tokens").add_argument
    arg("text", help="what to encode")
    arg("--allow-special", action="store_true", help="<|endoftext|> in it is the special token")
    arg("--tokenizer", default="gpt2", help="gpt2, bytes, or a rank file that train has written")

    args = parser.parse_args(argv)
    if args.command == "train":
        train(args.files, args.vocab_size, args.out)
    elif args.command == "encode":
        tokenizer = BPETokenizer(load_tokenizer(args.tokenizer)._mergeable_ranks)
        text = args.text.encode("utf-8", "replace").decode("utf-8")  # what is not UTF-8 becomes ?
        ids = tokenizer.encode(text, "all" if args.allow_special else frozenset())
        print(*ids)
        print(show(tokenizer, ids))
    else:
        walk()


if __name__ == "__main__":
    run_main(main)
