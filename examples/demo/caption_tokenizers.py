"""FLUX.1's two tokenizers, learned from a handful of captions: small, offline, in the original's file layout.

The `tokenizers` library's own trainers break ties by hash order, so that two runs give two vocabularies; the
counting is therefore done here, and the library only cuts texts into words and writes its file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = 77
"""What CLIP has positions for."""
CLIP_MERGES = 300
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
"""How CLIP's own tokenizer cuts a text into words."""

T5_TOKENS = 512
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
T5_SENTINELS = [f"<extra_id_{number}>" for number in range(100)]
T5_LETTERS = [chr(code) for code in range(33, 127)]


def read_captions(folder: Path) -> list[str]:
    """The captions of X-Flux's layout, `NAME.json` beside each image, in the order of the names."""
    return [json.loads(file.read_text("utf-8"))["caption"] for file in sorted(folder.glob("*.json"))]


def write_clip_tokenizer(folder: Path, captions: Iterable[str]) -> int:
    """CLIP's byte-level BPE as `vocab.json` and `merges.txt`; returns the number of tokens."""
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(CLIP_WORDS, "removed", invert=True), in_bytes])
    words = Counter(word for caption in captions for word, _ in cut.pre_tokenize_str(clean.normalize_str(caption)))
    merges = learn_merges(words, CLIP_MERGES)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    vocab = [*letters, *endings, *("".join(merge) for merge in merges), BOS, EOS]
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(vocab)})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CLIP_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", {**settings, **special})
    return len(vocab)


def learn_merges(words: Counter[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent neighbours become one token, over and over; ties by spelling."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def write_t5_tokenizer(folder: Path, captions: Iterable[str]) -> int:
    """T5's unigram model as `tokenizer.json`, of whole words and letters; returns the number of tokens."""
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    words = Counter(word for caption in captions for word, _ in cut.pre_tokenize_str(caption))
    total = sum(words.values())
    pieces = [(word, math.log(words[word] / total)) for word in sorted(words)]
    # A letter costs more than any word, so that a known word is never spelled out.
    spelling = -math.log(total) - 10
    letters = [(letter, spelling) for letter in ["▁", *T5_LETTERS] if letter not in words]
    # The sentinels stand at the end of the vocabulary, the last one first, as in T5's own file.
    ends = [(token, 0.0) for token in reversed(T5_SENTINELS)]
    vocab = [*((token, 0.0) for token in T5_SPECIAL), *pieces, *letters, *ends]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=T5_SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", T5_SPECIAL.index("</s>"))]
    )
    # Special tokens that the model already has keep their ids.
    tokenizer.add_special_tokens([*T5_SPECIAL, *reversed(T5_SENTINELS)])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    folder.mkdir(parents=True)
    write_json(folder / "tokenizer.json", content)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": T5_SENTINELS, **names})
    settings = {
        "additional_special_tokens": T5_SENTINELS,
        "clean_up_tokenization_spaces": False,
        "extra_ids": len(T5_SENTINELS),
        "model_max_length": T5_TOKENS,
        "tokenizer_class": "T5Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", {**settings, **names})
    return len(vocab)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
