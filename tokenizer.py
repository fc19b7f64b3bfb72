"""Text to token IDs: word by word, then byte-pair encoding, trained and used from scratch.

    python tokenizer.py                                    a walk from words to byte pairs
    python tokenizer.py train data/the-verdict.txt --vocab-size 1024 --out checkpoints/my.tiktoken
    python tokenizer.py encode --tokenizer checkpoints/my.tiktoken "It was not till later"

A model computes with numbers, so text becomes a list of token IDs first and comes back from one at
the end. Follows the book, chapter 2; byte-pair encoding is from Sennrich et al. 2016 (arXiv
1508.07909), its byte-level form from GPT-2 (Radford et al. 2019). Left out: normalisation of
Unicode, unigram and WordPiece vocabularies, letters newer than the Unicode tables of tiktoken.
"""

import base64
import heapq
import os
import sys
import time
from array import array
from collections import Counter, defaultdict
from itertools import cycle, islice, pairwise
from pathlib import Path

import regex

from gpt import (GPT2_SPLIT_PATTERN, VOCAB_BPE, ArgumentParser, Progress, UserError, positive_int,
                 read_gpt2_ranks, read_rank_file, read_text_pieces, run_main, say,
                 write_atomically)

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"
BYTES = [bytes([i]) for i in range(256)]


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
        """IDs -> text, one space between words and none before most punctuation.

        Which white space there was is lost. Raises KeyError for an ID that is not there.
        """
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
        if tuple(tokens[i:i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
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
    """The trainer one would explain first -> (merges [((left, right), count)], the text's IDs)."""
    ids, merges = list(text.encode("utf-8")), []
    for new_id in range(256, 256 + num_merges):
        if len(ids) < 2:
            break  # the whole text is one token
        pair, count, ids = merge_once(ids, new_id)
        merges.append((pair, count))
    return merges, ids


# ---------------------------------------------------------------------------------------------
# Chunks. A token like "dog." or "the cat" would waste the vocabulary on chance neighbours, so GPT-2
# first cuts text into chunks and never merges across them. gpt.py has its pattern in one line:
#
#     '(?:[sdmt]|ll|ve|re)     the ending of a contraction:   's  'd  'm  't  'll  've  're
#      ?\p{L}+                 letters, and the space before:  "the"  " cat"
#      ?\p{N}+                 digits, and the space before:   " 1908"
#      ?[^\s\p{L}\p{N}]+       other signs, and the space:     "..."  " ("
#     \s+(?!\S)               white space up to the last one, which belongs to what follows
#     \s+                     white space that is left, such as a line break
#
# So only the distinct chunks matter, each with its count: that makes training fast.

def count_chunks(text, counts):
    """Add the chunks of `text` to `counts`, {chunk: how often}; the longest has 1,000 characters.

    A text without any white space is thus cut, too, instead of being one huge chunk.
    """
    counts.update(chunk[i:i + 1000] for chunk in regex.findall(GPT2_SPLIT_PATTERN, text)
                  for i in range(0, len(chunk), 1000))


# ---------------------------------------------------------------------------------------------
# The fast trainer. Where `merge_once` looks at everything, this one visits only the places where
# the best pair stands: 8,192 tokens from 1.4 MB take seconds or less instead of hours.

GAP = -1  # stands between chunks, and where a token has been swallowed by the one before it


def learn_merges(chunk_counts):
    """Yield (left bytes, right bytes, count) for one new token after another, most frequent first.

    `chunk_counts` is {bytes: how often}. Ends when nothing is left to merge. Time and memory grow
    with the bytes of the distinct chunks, even if there is but one huge chunk.

    All chunks lie end to end in one row of bytes. A token covers `len(tokens[id])` places: its
    first place holds its ID in `heads`, its last place in `tails`, so the length of a token leads
    to its neighbours and no list of links is needed.
    """
    tokens = BYTES[:]
    ids = {token: i for i, token in enumerate(tokens)}
    heads, weights = array("i"), array("q")
    for chunk, count in chunk_counts.items():
        heads.extend(chunk)
        heads.append(GAP)
        weights.extend([count] * (len(chunk) + 1))
    tails = heads[:]
    counts, places = defaultdict(int), defaultdict(lambda: array("i"))  # of each pair
    for i, pair in enumerate(pairwise(heads)):
        if GAP not in pair:
            counts[pair] += weights[i]
            places[pair].append(i)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)

    while queue:
        count, pair = heapq.heappop(queue)
        if counts[pair] != -count:  # other merges took some of it: it has to queue again
            if counts[pair]:
                heapq.heappush(queue, (-counts[pair], pair))
            continue
        left, right = pair
        token = tokens[left] + tokens[right]
        if token not in ids:  # "abc" can arise as a + bc and as ab + c: it is one token
            ids[token] = len(tokens)
            tokens.append(token)
            yield tokens[left], tokens[right], -count
        new, size, arose = ids[token], len(tokens[left]), set()
        # From left to right, so that "aaa" becomes (aa)a. subtle: some places are out of date by
        # now; the pair still stands at i only if both its tokens do.
        for i in sorted(places.pop(pair)):
            if heads[i] != left or heads[i + size] != right:
                continue
            weight, end = weights[i], i + len(token)
            before, after = tails[i - 1], heads[end]
            if before != GAP:
                counts[before, left] -= weight
                counts[before, new] += weight
                places[before, new].append(i - len(tokens[before]))
                arose.add((before, new))
            if after != GAP:
                counts[right, after] -= weight
                counts[new, after] += weight
                places[new, after].append(i)
                arose.add((new, after))
            heads[i], heads[i + size], tails[end - 1] = new, GAP, new
        del counts[pair]
        for pair in arose:
            if counts[pair]:  # "aaaa" first gives (aa)a, which is gone again in (aa)(aa)
                heapq.heappush(queue, (-counts[pair], pair))


# ---------------------------------------------------------------------------------------------
# The tokenizer. All it needs is a rank per token: the order in which tokens were made. Encoding
# replays it: of all neighbours in a chunk, those that form the token of lowest rank merge first.

class BPETokenizer:
    """Byte-level byte-pair encoding: `decode(encode(text)) == text` for every text.

    A new one knows the 256 single bytes and `<|endoftext|>`; `train`, `load` and `from_gpt2` give
    it a vocabulary. The ID of a token is its rank; the end of text follows the last rank. It serves
    wherever the other scripts take a tokenizer. Book section 2.5.

    Example:
        tokenizer = BPETokenizer()
        tokenizer.train(open("data/the-verdict.txt", encoding="utf-8").read(), vocab_size=1000)
        ids = tokenizer.encode("I had always thought Jack Gisburn rather a cheap genius")
        tokenizer.save("checkpoints/verdict.tiktoken")
    """

    MOST_CACHED = 1 << 16  # how many chunks to remember the IDs of

    def __init__(self, ranks=None, name="bytes"):
        # The names are tiktoken's, as gpt.py reads both kinds of tokenizer.
        self.name, self._pat_str = name, GPT2_SPLIT_PATTERN
        self._mergeable_ranks = ranks or {byte: i for i, byte in enumerate(BYTES)}
        self.eot_token = len(self._mergeable_ranks)
        self.n_vocab = self.eot_token + 1
        self._tokens = dict(enumerate([*self._mergeable_ranks, END_OF_TEXT.encode()]))
        self._cache = {}

    def train(self, text, vocab_size):
        """Learn a vocabulary of `vocab_size` tokens, the bytes and the end of text included.

        `text` is a str or an iterable of str, which is read once and never held as a whole; cut it
        before white space, as each piece is split into chunks on its own. A text too small for
        `vocab_size` gives as many merges as there are, and a sentence on stderr. Raises UserError
        for fewer than 257 tokens, UnicodeEncodeError as `encode` does.
        """
        if vocab_size < 257:
            raise UserError(f"a vocabulary of {vocab_size} is too small for the 256 bytes and "
                            f"{END_OF_TEXT}; ask for at least 257")
        counts, wanted = Counter(), vocab_size - 257
        for piece in [text] if isinstance(text, str) else text:
            for part in piece.split(END_OF_TEXT):
                count_chunks(part, counts)

        ranks = {byte: i for i, byte in enumerate(BYTES)}
        progress = Progress(wanted, "merges")
        merges = learn_merges({chunk.encode("utf-8"): n for chunk, n in counts.items()})
        for left, right, count in islice(merges, wanted):
            ranks[left + right] = len(ranks)
            progress.update(len(ranks) - 256, f"merging, now pairs seen {count:,} times")
        progress.close()
        if len(ranks) < vocab_size - 1:
            print(f"the text is too small for {wanted:,} merges: there were {len(ranks) - 256:,}, "
                  f"so the vocabulary has {len(ranks) + 1:,} tokens", file=sys.stderr)
        self.__init__(ranks, f"bpe-{len(ranks) + 1}")

    def encode(self, text, allowed_special=frozenset(), disallowed_special=()):
        """Text -> list of token IDs.

        `<|endoftext|>` in the text is plain text unless `allowed_special`, a set or "all", holds
        it. `disallowed_special` is there for tiktoken's signature. Raises UnicodeEncodeError for a
        lone surrogate, half a character, which has no UTF-8.

        Example:
            tokenizer.encode("Hi<|endoftext|>", allowed_special={"<|endoftext|>"})
        """
        special = allowed_special == "all" or END_OF_TEXT in allowed_special
        ids = []
        for i, part in enumerate(text.split(END_OF_TEXT) if special else [text]):
            ids += [self.eot_token] if i else []
            for chunk in regex.findall(self._pat_str, part):
                ids += self._cache.get(chunk) or self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk):
        """The IDs of a chunk: merge the pair that makes the token of lowest rank; repeat."""
        ranks, tokens = self._mergeable_ranks, [BYTES[byte] for byte in chunk.encode("utf-8")]
        while True:
            pairs = [pair for pair in pairwise(tokens) if pair[0] + pair[1] in ranks]
            if not pairs:
                break
            best = min(pairs, key=lambda pair: ranks[pair[0] + pair[1]])
            tokens = merge_pair(tokens, best, best[0] + best[1])

        # Words come back: their IDs are remembered.
        if len(self._cache) >= self.MOST_CACHED:
            self._cache.clear()
        self._cache[chunk] = [ranks[token] for token in tokens]
        return self._cache[chunk]

    def decode_bytes(self, ids):
        """IDs -> bytes. Raises KeyError for an ID that is not there."""
        return b"".join(self._tokens[i] for i in ids)

    def decode(self, ids):
        """IDs -> text. Bytes that are not UTF-8, half a character say, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write tiktoken's rank file, all or nothing; `gpt.load_tokenizer(path)` reads it too."""
        with write_atomically(path) as part:
            with open(part, "w", encoding="ascii", newline="\n") as file:
                for token, rank in self._mergeable_ranks.items():
                    file.write(f"{base64.b64encode(token).decode('ascii')} {rank}\n")

    @classmethod
    def load(cls, path):
        """A tokenizer from a rank file. Raises UserError for one that is missing or broken."""
        return cls(read_rank_file(path), Path(path).stem)

    @classmethod
    def from_gpt2(cls, vocab_bpe=None, encoder_json=None):
        """GPT-2's own vocabulary from OpenAI's list of merges, by default `data/vocab.bpe`.

        Downloads that file if it is not there. The merges in order give the ranks, so
        `encoder.json`, which lists every ID, is not needed. Raises UserError.
        """
        return cls(read_gpt2_ranks(vocab_bpe), "gpt2")


# =============================================================================================
# The lesson ends here. What follows: the walk, and the commands train and encode.
# =============================================================================================

STORY = ("The baker bakes bread before the break of day. The bread the baker bakes is brown, and "
         "the brown bread is better than the bread of the other bakers. 'Do bakers bake better "
         "bread by day?' the other bakers ask. 'The better baker bakes by the break of day,' the "
         "baker says, and takes the brown bread to the other end of the bay.")
SENTENCE = "The baker bakes better pancakes."


def walk():
    """A sentence as words, as byte pairs learned before your eyes, and in GPT-2's vocabulary."""
    vocab = build_vocab(STORY)
    v1, v2 = SimpleTokenizerV1(vocab), SimpleTokenizerV2(vocab)
    print(f"A story of {len(STORY)} characters:\n\n  {STORY[:85]}...\n")
    print(f"1. Words. With punctuation marks there are {len(vocab) - 2} different ones. Number")
    print("   them, and text is numbers:\n")
    known = "The baker bakes better bread."
    print(f"  {known}  ->  {v1.encode(known)}  ->  {v1.decode(v1.encode(known))}\n")
    print("  But a word list never holds every word:\n")
    try:
        v1.encode(SENTENCE)
    except KeyError as e:
        print(f"  V1  {SENTENCE}  ->  KeyError: {e}")
    print(f"  V2  {SENTENCE}  ->  {v2.encode(SENTENCE)}  ->  {v2.decode(v2.encode(SENTENCE))}")

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
        tokens = tokens_of(tokenizer, SENTENCE)
        print(f"  {size:6,}  {len(tokens):3d} tokens  {show(tokens)}")
    print("\n   No word is unknown, and decoding gives back every byte: "
          f"{tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE}")

    print("\n3. GPT-2 learned 50,000 merges from 40 GB of web pages, in just this way.\n")
    if VOCAB_BPE.exists():
        gpt2 = BPETokenizer.from_gpt2()
        tokens = tokens_of(gpt2, SENTENCE)
        print(f"  {gpt2.n_vocab:,}  {len(tokens):3d} tokens  {show(tokens)}")
        print(f"  {gpt2.encode(SENTENCE)}")
    else:
        print("  Its vocabulary is not here yet. To fetch it (0.5 MB) and see the sentence in it:\n"
              f'    python tokenizer.py encode --tokenizer gpt2 "{SENTENCE}"')
    print("\nNext: python tokenizer.py train YOUR-TEXT.txt learns a vocabulary of your own.")


def tokens_of(tokenizer, text, allowed_special=frozenset()):
    """The bytes of each token of a text, as a list."""
    return [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text, allowed_special)]


def show(tokens):
    """Tokens as bytes -> a line: a colour each on a terminal, else with | between them.

    What cannot be printed (half a character, a line break) is shown as an escape.
    """
    texts = ["".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
                     for c in token.decode("utf-8", errors="backslashreplace"))
             for token in tokens]
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return "|".join(texts)
    colours = cycle((153, 222, 157, 218, 189))  # black on pastel, readable on any background
    return "".join(f"\x1b[30;48;5;{c}m{text}\x1b[0m" for c, text in zip(colours, texts))


def train(files, vocab_size, out):
    """Train on the first nine tenths of the files, save, and measure on the last tenth."""
    if out.resolve() in {path.resolve() for path in files}:
        raise UserError(f"{out} is a text to train on and would be overwritten; choose another "
                        "--out")
    if out.exists():
        read_rank_file(out)  # a file that is something else is not overwritten
    for path in files:  # so that a wrong path shows now, and not after an hour
        next(read_text_pieces(path, size=1 << 10))
    total = sum(path.stat().st_size for path in files)
    pieces = (piece for path in files
              for piece in read_text_pieces(path, size=max(256, min(total // 100, 1 << 22))))
    progress, start, tokenizer = Progress(total / 1e6, "MB"), time.perf_counter(), BPETokenizer()

    def first_part():
        done = 0
        while done < 0.9 * total and (piece := next(pieces, "")):
            done += len(piece.encode("utf-8"))
            yield piece
            progress.update(done / 1e6, "reading")
        progress.close()

    tokenizer.train(first_part(), vocab_size)
    tokenizer.save(out)
    say(f"trained  {tokenizer.n_vocab:,} tokens in {time.perf_counter() - start:.1f} s: 256 bytes, "
        f"{tokenizer.n_vocab - 257:,} merges, {END_OF_TEXT}")
    words = [token for token in tokenizer._mergeable_ranks
             if token.decode("utf-8", "replace").strip().isalpha()]
    print(f"longest  {show(sorted(words, key=len)[:-7:-1])}")
    say(f"saved    {out}")
    num_bytes = num_tokens = 0
    for piece in pieces:
        num_bytes += len(piece.encode("utf-8"))
        num_tokens += len(tokenizer.encode(piece, allowed_special="all"))
    if num_tokens:
        say(f"held out {num_bytes:,} bytes, the last tenth of the text, which the training has not "
            f"seen:\n         {num_tokens:,} tokens, {num_bytes / num_tokens:.2f} bytes per token "
            "(more is better; without merges it is 1)")


def encode(spec, text, allow_special):
    """Print the IDs of a text, then its tokens."""
    tokenizer = {"gpt2": BPETokenizer.from_gpt2, "bytes": BPETokenizer}.get(
        spec, lambda: BPETokenizer.load(spec))()
    allowed = "all" if allow_special else frozenset()
    try:
        print(*tokenizer.encode(text, allowed))
    except UnicodeEncodeError:  # Python hides foreign bytes on the command line in lone surrogates
        raise UserError("the text is not UTF-8; set the terminal to UTF-8 and type it "
                        "again") from None
    print(show(tokens_of(tokenizer, text, allowed)))


def main(argv=None):
    """The walk without a command, else train or encode."""
    parser = ArgumentParser(description="Text to token IDs: words, then byte-pair encoding. "
                            "Without a command: a walk through both.")
    commands = parser.add_subparsers(dest="command", metavar="train | encode")
    sub = commands.add_parser("train", help="learn a vocabulary from text files")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    sub.add_argument("--vocab-size", type=positive_int, default=4096,
                     help="how many tokens, the 256 bytes and <|endoftext|> included")
    sub.add_argument("--out", type=Path, default=Path("checkpoints/my.tiktoken"),
                     help="rank file to write, in tiktoken's format")
    sub = commands.add_parser("encode", help="show a text as tokens")
    sub.add_argument("text", help="what to encode")
    sub.add_argument("--allow-special", action="store_true",
                     help="let <|endoftext|> in the text be the special token")
    sub.add_argument("--tokenizer", default="gpt2",
                     help="gpt2, bytes, or a rank file that train has written")
    args = parser.parse_args(argv)
    if args.command == "train":
        train(args.files, args.vocab_size, args.out)
    elif args.command == "encode":
        encode(args.tokenizer, args.text, args.allow_special)
    else:
        walk()


if __name__ == "__main__":
    run_main(main)
