"""Text to token IDs: word by word, then byte-pair encoding, trained and used from scratch.

    python tokenizer.py                                    a walk from words to byte pairs
    python tokenizer.py train data/the-verdict.txt --vocab-size 1024 --out checkpoints/my.tiktoken
    python tokenizer.py encode --tokenizer checkpoints/my.tiktoken "It was not till later"
    python tokenizer.py compare data/the-verdict.txt       GPT-2's tokens: here and in tiktoken

A model computes with numbers, so text becomes a list of token IDs first and comes back from one at
the end. Follows the book, chapter 2; byte-pair encoding is from Sennrich et al. 2016 (arXiv
1508.07909), its byte-level form from GPT-2 (Radford et al. 2019). Left out: normalisation of
Unicode, unigram and WordPiece vocabularies, and more than one core.

Read it in order: words -> the idea of byte pairs -> training -> the tokenizer -> the commands.
"""

import base64
import functools
import heapq
import json
import operator
import os
import sys
import time
from array import array
from collections import Counter, defaultdict
from itertools import cycle, islice, pairwise
from pathlib import Path

import regex
import tiktoken

from gpt import (GPT2_SPLIT_PATTERN, ArgumentParser, Progress, UserError, check_output,
                 gpt2_vocabulary_files, load_tokenizer, positive_int, read_rank_file,
                 read_text_pieces, run_main, write_atomically)

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

        Which white space there was is lost. Raises ValueError for an ID that is not there.
        """
        try:
            text = " ".join([self.int_to_str[i] for i in ids])
        except KeyError as e:
            raise ValueError(f"token id {e} is not in this vocabulary") from None
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

def merge_once(ids, new_id):
    """One step, straight from the definition -> (best pair, its count, IDs with it merged).

    It looks at everything for a single merge. `learn_merges` does the same steps fast.

    Example:
        merge_once(list(b"aaabdaaabac"), 256)
        # ((97, 97), 4, [256, 97, 98, 100, 256, 97, 98, 97, 99])
    """
    counts = Counter(pairwise(ids))
    best = min(counts, key=lambda pair: (-counts[pair], pair))
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == best:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return best, counts[best], merged


# ---------------------------------------------------------------------------------------------
# Training. GPT-2 first cuts text into chunks (about a word with the space before it) and never
# merges across them. So only the distinct chunks matter, each with its count, and a merge only
# has to visit the places where its pair stands.

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
    it a vocabulary. The ID of a token is its rank; the special tokens follow the ranks.
    Book section 2.5.

    Example:
        tokenizer = BPETokenizer()
        tokenizer.train(open("data/the-verdict.txt", encoding="utf-8").read(), vocab_size=1000)
        ids = tokenizer.encode("I had always thought Jack Gisburn rather a cheap genius")
        tokenizer.save("checkpoints/verdict.tiktoken")
    """

    CACHE_CHUNKS = 1 << 16  # how many chunks to remember the IDs of; longer ones than
    CACHE_LENGTH = 64       # this many characters hardly come back

    def __init__(self):
        self._set({byte: i for i, byte in enumerate(BYTES)}, GPT2_SPLIT_PATTERN,
                  {END_OF_TEXT: 256})

    def _set(self, ranks, pat_str, special_tokens):
        self.ranks, self.pat_str, self.special_tokens = ranks, pat_str, special_tokens
        self._split = regex.compile(pat_str)
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes.update({i: token.encode("utf-8") for token, i in special_tokens.items()})
        self._cache = {}

    @property
    def n_vocab(self):
        """How many IDs there are: 256 bytes + merges + special tokens (tiktoken's name for it)."""
        return len(self._bytes)

    def train(self, text, vocab_size, special_tokens=(END_OF_TEXT,)):
        """Learn a vocabulary of `vocab_size` tokens, the bytes and special tokens included.

        `text` is a str or an iterable of str, which is read once and never held as a whole; cut it
        before white space, as each piece is split into chunks on its own. Equal counts: the pair
        with the smaller IDs merges first, so the same text gives the same vocabulary. A text too
        small for `vocab_size` gives as many merges as there are, and a sentence on stderr. Raises
        UserError for a `vocab_size` that the bytes and special tokens already exceed, TypeError
        and ValueError as `encode` does.
        """
        if isinstance(special_tokens, str) or len({"", *special_tokens}) <= len(special_tokens):
            raise UserError("special_tokens must be a list of different, non-empty strings")
        wanted = vocab_size - 256 - len(special_tokens)
        if wanted < 0:
            raise UserError(f"a vocabulary of {vocab_size} is too small for the 256 bytes and "
                            f"{len(special_tokens)} special token(s); ask for at least "
                            f"{256 + len(special_tokens)}")
        counts = Counter()
        split = regex.compile(GPT2_SPLIT_PATTERN)
        for piece in [text] if isinstance(text, str) else text:
            for part in split_special(check_text(piece), special_tokens)[::2]:
                counts.update(split_chunks(split, part))
        ranks = {byte: i for i, byte in enumerate(BYTES)}
        progress = Progress(wanted, "merges")
        merges = learn_merges({chunk.encode("utf-8"): n for chunk, n in counts.items()})
        for left, right, count in islice(merges, wanted):
            ranks[left + right] = len(ranks)
            progress.update(len(ranks) - 256, f"merging, now pairs seen {count:,} times")
        progress.close()
        if (found := len(ranks) - 256) < wanted:
            print(f"the text is too small for {wanted:,} merges: there were {found:,}, so the "
                  f"vocabulary has {len(ranks) + len(special_tokens):,} tokens", file=sys.stderr)
        self._set(ranks, GPT2_SPLIT_PATTERN,
                  {token: len(ranks) + i for i, token in enumerate(special_tokens)})

    def encode(self, text, allowed_special=frozenset()):
        """Text -> list of token IDs.

        A special token in the text is plain bytes unless `allowed_special`, a set of special
        tokens or "all", holds it. Raises TypeError if `text` is not a str, and ValueError if it
        holds a lone surrogate, which has no UTF-8.

        Example:
            tokenizer.encode("Hi<|endoftext|>", allowed_special={"<|endoftext|>"})
        """
        check_text(text)
        allowed = (self.special_tokens if allowed_special == "all"
                   else self.special_tokens.keys() & allowed_special)
        ids, cache = [], self._cache
        for i, part in enumerate(split_special(text, allowed)):
            if i % 2:
                ids.append(self.special_tokens[part])
                continue
            for chunk in split_chunks(self._split, part):
                chunk_ids = cache.get(chunk)
                ids += self._encode_chunk(chunk) if chunk_ids is None else chunk_ids
        return ids

    def _encode_chunk(self, chunk):
        """The IDs of a chunk that is not in the cache."""
        token = chunk.encode("utf-8")
        ids = [self.ranks[token]] if token in self.ranks else self._merge(token)
        if len(chunk) <= self.CACHE_LENGTH:
            if len(self._cache) >= self.CACHE_CHUNKS:
                self._cache.clear()
            self._cache[chunk] = ids
        return ids

    def _merge(self, chunk):
        """Replay the merges on one chunk of bytes: lowest rank first, then leftmost.

        The heap holds every pair that could merge, and grows as tokens do: n log n steps in all.
        """
        ranks, n = self.ranks, len(chunk)
        ends = [*range(1, n + 1), 0]  # where the token that starts here ends
        starts = list(range(-1, n))   # where the token before the one that starts here starts
        heap = [(ranks[chunk[i:i + 2]], i, i + 2) for i in range(n - 1) if chunk[i:i + 2] in ranks]
        heapq.heapify(heap)
        while heap:
            _, start, end = heapq.heappop(heap)
            middle = ends[start]
            # subtle: a pair is out of date if one of its two has grown or been swallowed. A
            # swallowed token ends at n, and ends[n] is 0, which is no pair's end.
            if ends[middle] != end:
                continue
            ends[start], ends[middle], starts[end] = end, n, start
            before = starts[start]
            if before >= 0 and (rank := ranks.get(chunk[before:end])) is not None:
                heapq.heappush(heap, (rank, before, end))
            if end < n and (rank := ranks.get(chunk[start:ends[end]])) is not None:
                heapq.heappush(heap, (rank, start, ends[end]))
        ids, start = [], 0
        while start < n:
            ids.append(ranks[chunk[start:ends[start]]])
            start = ends[start]
        return ids

    def decode_tokens(self, ids):
        """IDs -> the bytes of each token, as a list. Raises ValueError for an ID out of range."""
        try:
            return [self._bytes[i] for i in map(operator.index, ids)]
        except KeyError as e:
            raise ValueError(f"token id {e} is not in this vocabulary, whose ids go from 0 to "
                             f"{self.n_vocab - 1}") from None

    def decode(self, ids):
        """IDs -> text. Bytes that are not UTF-8, half a character say, become U+FFFD.

        Raises ValueError for an ID out of range.
        """
        return b"".join(self.decode_tokens(ids)).decode("utf-8", errors="replace")

    def save(self, path):
        """Write tiktoken's rank file, and the rest beside it as PATH.json, both atomically.

        `gpt.load_tokenizer(path)` gives the same vocabulary as a `tiktoken.Encoding`.
        """
        rest = {"pat_str": self.pat_str, "special_tokens": self.special_tokens}
        with write_atomically(f"{path}.json") as part:
            part.write_text(json.dumps(rest, indent=1) + "\n", encoding="utf-8")
        with write_atomically(path) as part:
            with open(part, "w", encoding="ascii", newline="\n") as file:
                for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
                    file.write(f"{base64.b64encode(token).decode('ascii')} {rank}\n")

    @classmethod
    def load(cls, path):
        """A tokenizer from a rank file. Raises UserError for one that is missing or broken."""
        tokenizer = cls()
        try:
            tokenizer._set(*read_rank_file(path))
            if tokenizer._split.groups:  # findall would return the groups, not the chunks
                raise regex.error("a group that captures; write (?:...)")
        except regex.error as e:
            raise UserError(f"{path}.json has a broken split pattern ({e}); train anew") from None
        return tokenizer

    @classmethod
    def from_gpt2(cls, vocab_bpe=None, encoder_json=None):
        """GPT-2's own vocabulary from OpenAI's two files, by default those in `data/`.

        `vocab.bpe` lists the merges in order, `encoder.json` the ID of every token. Downloads the
        default files if they are not there. Raises UserError if they are not what they should be.
        """
        if vocab_bpe is None or encoder_json is None:
            vocab_bpe, encoder_json = gpt2_vocabulary_files()
        # Both files write a byte as one visible character: itself, or one from U+0100 onwards.
        # The bytes' own IDs follow the same order.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        byte_of = {chr(byte): byte for byte in visible}
        byte_of.update({chr(256 + i): byte for i, byte in enumerate(hidden)})

        def to_bytes(characters):
            return bytes([byte_of[c] for c in characters])

        ranks = {BYTES[byte]: i for i, byte in enumerate(byte_of.values())}
        try:
            lines = Path(vocab_bpe).read_text(encoding="utf-8").splitlines()
            for line in lines[1:]:  # the first one is the version
                left, right = line.split()
                ranks[to_bytes(left + right)] = len(ranks)
            encoder = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
            special_tokens = {token: i for token, i in encoder.items() if i >= len(ranks)}
            if ranks != {to_bytes(t): i for t, i in encoder.items() if t not in special_tokens}:
                raise ValueError("their tokens differ")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{vocab_bpe} and {encoder_json} are not the two files of GPT-2's "
                            f"vocabulary ({e}); delete them, and they are fetched anew") from None
        tokenizer = cls()
        tokenizer._set(ranks, GPT2_SPLIT_PATTERN, special_tokens)
        return tokenizer


def check_text(text):
    """Return `text` if UTF-8 can spell it. Raises TypeError (no str), ValueError (surrogates)."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer encodes a str, not {type(text).__name__} {text!r:.40}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"the text has a lone surrogate, U+{ord(text[e.start]):04X} at position "
                         f"{e.start}, which is half a character and has no UTF-8; remove it with "
                         "text.encode('utf-8', 'ignore').decode('utf-8')") from None
    return text


def split_special(text, special_tokens):
    """Cut at the special tokens -> [text, special token, text, ..., text]; the longer one wins."""
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)


def split_chunks(split, text):
    """The chunks of `text` that the compiled pattern `split` finds, exactly as tiktoken cuts it."""
    # Latin letters, quotation marks and currency signs have long been settled: nothing to look up.
    if (not regex.search("[^\0-\u024f\u2000-\u206f\u20a0-\u20cf]", text)
            or newer_letters().isdisjoint(text)):
        return split.findall(text)
    with_symbols = "".join(["\uffff" if c in newer_letters() else c for c in text])
    return [text[m.start():m.end()] for m in split.finditer(with_symbols)]


@functools.cache
def newer_letters():
    """The set of letters and digits that `regex` knows but tiktoken takes for symbols.

    Unicode gains letters every year, and the tables in the two packages are of different years.
    """
    letters = regex.findall(r"[\p{L}\p{N}]", "".join(  # there are none from U+40000 onwards
        map(chr, [*range(0xd800), *range(0xe000, 0x40000)])))
    ranks = {token: i for i, token in enumerate([*BYTES, b"'s"])}
    tables = tiktoken.Encoding("tables", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks,
                               special_tokens={})
    # After a letter, 's is a chunk and so a token. After a symbol, ' belongs to the symbol.
    ids = tables.encode_ordinary("".join(letter + "'s " for letter in letters))
    marks = [i for i in ids if i in (ranks[b"'s"], ranks[b"'"])]
    return {letter for letter, mark in zip(letters, marks) if mark == ranks[b"'"]}


# ---------------------------------------------------------------------------------------------
# python tokenizer.py: the walk. It needs no file and no network.

STORY = ("The baker bakes bread before the break of day. The bread the baker bakes is brown, and "
         "the brown bread is better than the bread of the other bakers. 'Do bakers bake better "
         "bread by day?' the other bakers ask. 'The better baker bakes by the break of day,' the "
         "baker says, and takes the brown bread to the other end of the bay.")
SENTENCE = "The baker bakes better pancakes."


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


def walk():
    """A sentence as words, as byte pairs learned before your eyes, and in GPT-2's vocabulary."""
    vocab = build_vocab(STORY)
    print(f"A story of {len(STORY)} characters:\n\n  {STORY[:85]}...\n\n"
          f"1. Words. With punctuation marks there are {len(vocab) - 2} different ones. Number\n"
          "   them, and text is numbers:\n")
    known = "The baker bakes better bread."
    ids = SimpleTokenizerV1(vocab).encode(known)
    print(f"  {known}  ->  {ids}  ->  {SimpleTokenizerV1(vocab).decode(ids)}\n\n"
          "  But a word list never holds every word:\n")
    try:
        SimpleTokenizerV1(vocab).encode(SENTENCE)
    except KeyError as e:
        print(f"  V1  {SENTENCE}  ->  KeyError: {e}")
    v2 = SimpleTokenizerV2(vocab)
    print(f"  V2  {SENTENCE}  ->  {v2.encode(SENTENCE)}  ->  {v2.decode(v2.encode(SENTENCE))}")

    print("\n2. Byte pairs. Start with the 256 bytes, which spell everything, and join the most\n"
          "   frequent pair of neighbours into a new token, again and again:\n")
    counts = Counter(regex.findall(GPT2_SPLIT_PATTERN, STORY))
    merges = learn_merges({chunk.encode("utf-8"): n for chunk, n in counts.items()})
    for i, (left, right, count) in enumerate(islice(merges, 12), 256):
        print(f"  {i}  {str(left)[1:]:>8s} + {str(right)[1:]:6s} seen {count} times")
    print("\n   A space belongs to the word after it. The sentence, as the vocabulary grows:\n")
    tokenizer = BPETokenizer()
    for size in (257, 269, 289, 309):
        tokenizer.train(STORY, size)
        tokens = tokenizer.decode_tokens(tokenizer.encode(SENTENCE))
        print(f"  {size:6,}  {len(tokens):3d} tokens  {show(tokens)}")
    print("\n   No word is unknown, and decoding gives back every byte: "
          f"{tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE}")

    print("\n3. GPT-2 learned 50,000 merges from 40 GB of web pages, in just this way.\n")
    if all((Path("data") / name).exists() for name in ("vocab.bpe", "encoder.json")):
        gpt2 = BPETokenizer.from_gpt2()
        tokens = gpt2.decode_tokens(gpt2.encode(SENTENCE))
        print(f"  {gpt2.n_vocab:,}  {len(tokens):3d} tokens  {show(tokens)}\n"
              f"  {gpt2.encode(SENTENCE)}")
    else:
        print("  Its vocabulary is not here yet. To fetch it (1.5 MB) and see the sentence in it:\n"
              f'    python tokenizer.py encode --tokenizer gpt2 "{SENTENCE}"')
    print("\nNext: python tokenizer.py train YOUR-TEXT.txt learns a vocabulary of your own.")


# ---------------------------------------------------------------------------------------------
# python tokenizer.py train, encode, compare.

def open_tokenizer(spec):
    """`gpt2`, `bytes` or the path of a rank file -> BPETokenizer."""
    if spec == "gpt2":
        return BPETokenizer.from_gpt2()
    return BPETokenizer() if spec == "bytes" else BPETokenizer.load(spec)


def train(files, vocab_size, out):
    """Train on the first nine tenths of the files, save, and measure on the last tenth."""
    check_output(out)
    for path in files:  # so that a wrong path shows now, and not after an hour
        next(read_text_pieces(path, size=1 << 10))
    total = sum(path.stat().st_size for path in files)
    if not total:
        raise UserError("the text must be in files, whose size is known, not in a pipe")
    pieces = (piece for path in files
              for piece in read_text_pieces(path, size=max(1, min(total // 100, 1 << 22))))
    progress = Progress(total, "B")

    def first_part():
        done = 0
        while done < 0.9 * total and (piece := next(pieces, "")):
            done += len(piece.encode("utf-8"))
            yield piece
            progress.update(done, "reading")
        progress.close()

    start, tokenizer = time.perf_counter(), BPETokenizer()
    tokenizer.train(first_part(), vocab_size)
    tokenizer.save(out)
    print(f"trained  {tokenizer.n_vocab:,} tokens in {time.perf_counter() - start:.1f} s: 256 "
          f"bytes, {len(tokenizer.ranks) - 256:,} merges, {len(tokenizer.special_tokens)} special")
    words = [t for t in tokenizer.ranks if t.decode("utf-8", "ignore").strip().isalpha()]
    print(f"longest  {show(sorted(words, key=len)[:-7:-1])}")
    print(f"saved    {out} and {out}.json")
    num_bytes = num_tokens = 0
    for piece in pieces:
        num_bytes += len(piece.encode("utf-8"))
        num_tokens += len(tokenizer.encode(piece, allowed_special="all"))
    if num_tokens:
        print(f"held out {num_bytes:,} bytes, the last tenth of the text, which the training has "
              f"not seen:\n         {num_tokens:,} tokens, {num_bytes / num_tokens:.2f} bytes per "
              "token (more is better; without merges it is 1)")
    else:
        print("held out nothing: the text is too short, or has no white space to cut it at")


def encode(spec, text, allow_special):
    """Print the IDs of a text, then its tokens."""
    tokenizer = open_tokenizer(spec)
    try:
        ids = tokenizer.encode(text, allowed_special="all" if allow_special else set())
    except ValueError:  # Python hides foreign bytes on the command line in lone surrogates
        raise UserError("the text is not UTF-8; set the terminal to UTF-8 and type it "
                        "again") from None
    print(*ids)
    print(show(tokenizer.decode_tokens(ids)))


def compare(spec, path):
    """Encode a file here and with tiktoken; print whether the tokens agree, and the speeds."""
    text = "".join(read_text_pieces(path))
    num_bytes = len(text.encode("utf-8"))
    theirs, ours = load_tokenizer(spec), open_tokenizer(spec)

    def timed(name, encode):
        start = time.perf_counter()
        ids = encode(text)
        seconds = time.perf_counter() - start
        print(f"{name:42s} {len(ids):12,} {seconds:9.3f} {num_bytes / 1e6 / seconds:9.2f}")
        return ids

    print(f"{'':42s} {'tokens':>12s} {'seconds':>9s} {'MB/s':>9s}")
    expected = timed("tiktoken, in Rust", theirs.encode_ordinary)
    found = timed("BPETokenizer, first time", ours.encode)
    timed("BPETokenizer, chunks in its cache", ours.encode)
    print(f"{num_bytes / max(1, len(found)):.2f} bytes per token; the text comes back from its "
          f"tokens: {'yes' if ours.decode(found) == text else 'no'}")
    if found != expected:
        i = next(i for i, (a, b) in enumerate(zip(found + [None], expected + [None])) if a != b)
        raise UserError(f"the tokens differ from number {i} on: {found[i:i + 5]} here, "
                        f"{expected[i:i + 5]} in tiktoken")
    print("every token is the same")


def main(argv=None):
    """The walk without a command, else train, encode or compare."""
    parser = ArgumentParser(description="Text to token IDs: words, then byte-pair encoding. "
                            "Without a command: a walk through both.")
    commands = parser.add_subparsers(dest="command", metavar="train | encode | compare")
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
    other = commands.add_parser("compare", help="check tokens and speed against tiktoken")
    other.add_argument("file", type=Path, metavar="FILE", help="UTF-8 text")
    for command in (sub, other):
        command.add_argument("--tokenizer", default="gpt2",
                             help="gpt2, bytes, or a rank file that train has written")
    args = parser.parse_args(argv)
    if args.command == "train":
        return train(args.files, args.vocab_size, args.out)
    if args.command == "encode":
        return encode(args.tokenizer, args.text, args.allow_special)
    if args.command == "compare":
        return compare(args.tokenizer, args.file)
    return walk()


if __name__ == "__main__":
    run_main(main)
