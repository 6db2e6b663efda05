"""Small tokenizers of every kind that checkpoints have, made with the `tokenizers` library."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>"]
# An added token that is ordinary text, with a space, which no byte-level alphabet has.
ADDED = "add ed é"
CORPUS = ["STOP at the 你好 world, don't stop 🙂 .", "a aa ab  b STOPPED ? état ▁ naïve"] * 4


def add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(ADDED, normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As of GPT-2, Qwen and Llama 3. Some tokens hold a part of a character, some the end of one and a part of the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["你好你好 你們 🙂🙂🙃", *CORPUS], trainer)
    return add_tokens(tokenizer)


def sentencepiece_model() -> models.BPE:
    """Pieces trained on the corpus, and one token for every byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("▁STOPabdehnort,."),
        limit_alphabet=30,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    form = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in form["merges"]]
    return models.BPE(form["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def byte_fallback(decoder: Any = None) -> Tokenizer:
    """As of Llama 2 and Mistral."""
    tokenizer = Tokenizer(sentencepiece_model())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return add_tokens(tokenizer)


def byte_fallback_unstripped() -> Tokenizer:
    """As of Gemma."""
    return byte_fallback(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def byte_fallback_replaced_late() -> Tokenizer:
    """Spaces come of the fused text, of which two are stripped."""
    return byte_fallback(
        decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 2, 0)]
        )
    )


def word_piece() -> Tokenizer:
    words = ["[UNK]", "don", "'", "t", "n't", ".", ",", "?", "STOP", "##STOP", "##s", "a", "##a", "you", "##'", "é"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return add_tokens(tokenizer)


def metaspace() -> Tokenizer:
    """As of T5: unigram pieces."""
    pieces = ["<unk>", "▁", "▁a", "a", "▁STOP", "ST", "OP", "▁▁", "é", "你", "好", "b", "a▁b"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return add_tokens(tokenizer)


def word_ends() -> Tokenizer:
    words = ["a</w>", "a", "STOP</w>", "ST", "OP</w>", "b</w>c", "é</w>"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return add_tokens(tokenizer)


def ctc() -> Tokenizer:
    words = ["<pad>", "|", "a", "b", "STOP", "é", "'s", " ."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.decoder = decoders.CTC()
    return add_tokens(tokenizer)


def no_decoder() -> Tokenizer:
    words = ["[UNK]", "a", "STOP", "ST OP", "é"]
    return add_tokens(Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")))


def replaced_by_pattern() -> Tokenizer:
    """A decoder of the whole text, of which nothing can be told before the end."""
    return byte_fallback(
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex("▁+"), " ")])
    )


KINDS = {
    make.__name__: make()
    for make in (
        byte_level,
        byte_fallback,
        byte_fallback_unstripped,
        byte_fallback_replaced_late,
        word_piece,
        metaspace,
        word_ends,
        ctc,
        no_decoder,
        replaced_by_pattern,
    )
}
