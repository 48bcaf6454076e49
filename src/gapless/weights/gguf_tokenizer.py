"""A tokenizer from GGUF metadata (`tokenizer.ggml.*`), as the files that a model folder would have."""

from __future__ import annotations

from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gapless.errors import CorruptModelError, UnsupportedModelError
from gapless.weights.fields import Fields
from gapless.weights.spm_merges import merges_from_scores

# Values of tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end a turn of a chat. Older files name only one end-of-sequence token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")

# How words are cut before merging, as the models' own tokenizer.json files state it. Digits go in threes or singly.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2",)
_SMOLLM = ("smollm",)
_GPT2 = ("gpt-2", "gpt2", "default")


def build_tokenizer(metadata: Fields, architecture: str) -> tuple[Tokenizer, dict[str, object]]:
    """The tokenizer and the tokenizer_config.json of a GGUF file of the GGUF architecture `architecture`.

    Raises UnsupportedModelError for a tokenizer that can not be rebuilt exactly, CorruptModelError.
    """
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    kinds = _token_kinds(metadata, len(tokens))
    model = metadata.text("tokenizer.ggml.model")
    if model == "gpt2":
        pre = metadata.text("tokenizer.ggml.pre") or ("qwen2" if architecture.startswith("qwen") else "default")
        tokenizer = _byte_level(metadata, tokens, pre)
        add_bos = metadata.flag("tokenizer.ggml.add_bos_token", pre in _LLAMA3)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, kinds)
        add_bos = metadata.flag("tokenizer.ggml.add_bos_token", True)
    else:
        raise UnsupportedModelError(f"{metadata.where}: a tokenizer of the kind {model!r} is not supported")
    tokenizer.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL or (kind == UNKNOWN and model == "llama")
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise CorruptModelError(f"{metadata.where}: tokenizer.ggml.tokens lists a token twice")
    settings = _settings(metadata, tokens)
    add_eos = metadata.flag("tokenizer.ggml.add_eos_token")
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    _add_ends(tokenizer, metadata, tokens, add_bos, add_eos)
    return tokenizer, settings


def end_token_ids(metadata: Fields) -> list[int]:
    """Every id that ends a continuation: those the metadata names, and control tokens that end a chat's turn."""
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    kinds = _token_kinds(metadata, len(tokens))
    named = [_token_id(metadata, name, tokens) for name in ("eos", "eot", "eom")]
    turns = [tokens.index(text) for text in _TURN_ENDS if text in tokens and kinds[tokens.index(text)] == CONTROL]
    return list(dict.fromkeys([each for each in named if each is not None] + turns))


def begin_token_id(metadata: Fields) -> int | None:
    """The id of the beginning-of-sequence token, if the metadata names one."""
    return _token_id(metadata, "bos", _texts(metadata, "tokenizer.ggml.tokens"))


def _byte_level(metadata: Fields, tokens: list[str], pre: str) -> Tokenizer:
    merges = [_merge(metadata, line) for line in _texts(metadata, "tokenizer.ggml.merges")]
    vocab = {text: index for index, text in enumerate(tokens)}
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptModelError(f"{metadata.where}: the merge {left!r} {right!r} makes no token of the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    tokenizer.decoder = decoders.ByteLevel()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in _GPT2:
        tokenizer.pre_tokenizer = words
    elif pre in _SMOLLM:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    elif pre in _LLAMA3 or pre in _QWEN2:
        pattern = Regex(_CL100K % ("{1,3}" if pre in _LLAMA3 else ""))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_only])
        if pre in _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join(_SMOLLM + _LLAMA3 + _QWEN2 + _GPT2)
        raise UnsupportedModelError(f"{metadata.where}: tokenizer.ggml.pre {pre!r} is not supported; known: {known}")
    return tokenizer


def _sentencepiece(metadata: Fields, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """A SentencePiece BPE vocabulary. Pieces merge by score; what no piece covers falls back to bytes."""
    scores = metadata.items("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens) or not all(isinstance(each, float) for each in scores):
        raise CorruptModelError(f"{metadata.where}: tokenizer.ggml.scores must hold one number for each token")
    vocab = {text: index for index, text in enumerate(tokens)}
    if any(f"<0x{byte:02X}>" not in vocab for byte in range(256)):
        raise UnsupportedModelError(f"{metadata.where}: a SentencePiece vocabulary without all 256 bytes")
    pieces = {
        text: score
        for text, score, kind in zip(tokens, cast("list[float]", scores), kinds, strict=True)
        if kind == NORMAL
    }
    merges = merges_from_scores(pieces, vocab)
    if not merges:
        raise UnsupportedModelError(f"{metadata.where}: a SentencePiece vocabulary whose pieces do not merge")
    unknown = _token_id(metadata, "unknown", tokens)
    unknown_text = tokens[unknown if unknown is not None else kinds.index(UNKNOWN) if UNKNOWN in kinds else 0]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown_text, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _add_ends(tokenizer: Tokenizer, metadata: Fields, tokens: list[str], add_bos: bool, add_eos: bool) -> None:
    bos, eos = _token_id(metadata, "bos", tokens), _token_id(metadata, "eos", tokens)
    before = [(tokens[bos], bos)] if add_bos and bos is not None else []
    after = [(tokens[eos], eos)] if add_eos and eos is not None else []
    if before or after:
        single = [*(text for text, _ in before), "$A", *(text for text, _ in after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=before + after)


def _settings(metadata: Fields, tokens: list[str]) -> dict[str, object]:
    """The part of tokenizer_config.json that other readers of the folder look for."""
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := _token_id(metadata, theirs, tokens)) is not None:
            settings[f"{ours}_token"] = tokens[index]
    if template := metadata.text("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def _texts(metadata: Fields, name: str) -> list[str]:
    values = metadata.items(name)
    if values is None:
        raise metadata.missing(name)
    if not all(isinstance(value, str) for value in values):
        raise CorruptModelError(f"{metadata.where}: {name} must hold texts only")
    return cast("list[str]", values)


def _token_kinds(metadata: Fields, count: int) -> list[int]:
    values = metadata.items("tokenizer.ggml.token_type")
    if values is None:
        return [NORMAL] * count
    if len(values) != count or not all(isinstance(value, int) for value in values):
        raise CorruptModelError(f"{metadata.where}: tokenizer.ggml.token_type must hold one number for each token")
    return cast("list[int]", values)


def _token_id(metadata: Fields, name: str, tokens: list[str]) -> int | None:
    ids = metadata.ids(f"tokenizer.ggml.{name}_token_id", len(tokens))
    return ids[0] if ids else None


def _merge(metadata: Fields, line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    if not left or not right:
        raise CorruptModelError(f"{metadata.where}: tokenizer.ggml.merges has the line {line[:40]!r}")
    return left, right
