"""Text to token ids and back, with the tokenizer and the chat template a checkpoint folder carries."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from qwen_jax.chat_template import ChatTemplate
from qwen_jax.config import read_json
from qwen_jax.errors import CheckpointError
from qwen_jax.streaming import ByteStream, TextStream, WindowStream

# How Qwen2 cuts text into words before merging bytes: contractions, letters with one leading sign, single
# digits, signs, line breaks, blanks. tokenizer.json carries it, vocab.json and merges.txt do not.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(CheckpointError):
    """Tokenizer files that are missing or broken, or text and ids they cannot take."""


def has_tokenizer(folder: str | Path) -> bool:
    """Whether `folder` holds the files of a tokenizer at all."""
    folder = Path(folder)
    old = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return old or (folder / "tokenizer.json").is_file()


class Tokenizer:
    """A checkpoint's tokenizer. Build it with `Tokenizer.from_folder`.

    Attributes:
        vocab_size: one more than the highest id; the model's own vocabulary is padded and may be larger.
        eos_id, bos_id, pad_id: as tokenizer_config.json names them, None where it does not.
        special_ids: ids that `decode` leaves out unless asked to keep them.
        chat_template: the checkpoint's chat templates.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: ChatTemplate
    ) -> None:
        # A file saved in mid-training may carry both, and would shorten or pad every prompt without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # Asked by what it does: the decoder may be wrapped in a sequence. Qwen's is of this kind.
        self._byte_level = bool(backend.decoder) and backend.decoder.decode(["ĠÃ", "©"]) == " é"
        self._token_bytes = functools.cache(self._bytes_of)
        self.chat_template = chat_template
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.eos_id = self._id_of(config, "eos_token")
        self.bos_id = self._id_of(config, "bos_token")
        self.pad_id = self._id_of(config, "pad_token")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, else vocab.json and merges.txt; tokenizer_config.json, chat templates.

        Raises:
            TokenizerError: no tokenizer files, or broken ones. Without a chat template only its use fails.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        config = _read_object(path) if path.is_file() else {}
        if not has_tokenizer(folder):
            raise TokenizerError(
                f"{folder}: no tokenizer: it holds neither tokenizer.json nor vocab.json and merges.txt"
            )
        if (folder / "tokenizer.json").is_file():
            backend = _load(folder / "tokenizer.json")
        else:
            backend = _build(folder / "vocab.json", folder / "merges.txt")
        _add_tokens(backend, config, path)
        try:
            return cls(backend, config, ChatTemplate.from_folder(folder, config, _token_names(config)))
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self.chat_template.names)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; a special token written out in it becomes its id.

        Args:
            text: any length; Unicode is normalised as the tokenizer says (NFC).
            add_special_tokens: also what the post-processor puts around a text; Qwen2.5's puts nothing.

        Raises:
            TokenizerError: `text` holds half of a surrogate pair, which no encoding can hold.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of every text, in parallel."""
        for text in texts:
            _check_text(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids of the padded vocabulary show nothing.

        Raises:
            TokenizerError: an id is not an integer from 0 to 2**32 - 1.
        """
        ids = list(ids)
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special)
        except (OverflowError, TypeError):
            raise TokenizerError(f"token ids must be integers from 0 up, got {ids!r:.80}") from None

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for ids that come one by one: its pieces joined equal `decode` of all of them."""
        if not self._byte_level:
            return WindowStream(
                lambda ids: self.decode(ids, skip_special=False),
                lambda index: not (skip_special and index in self.special_ids),
            )
        if not skip_special:
            return ByteStream(self._token_bytes)
        return ByteStream(lambda index: b"" if index in self.special_ids else self._token_bytes(index))

    def apply_chat_template(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`: see `ChatTemplate.render`."""
        return self.chat_template.render(messages, add_generation_prompt, template, **variables)

    def _bytes_of(self, index: int) -> bytes:
        """Bytes of an id in a byte-level vocabulary, where every character of a token stands for one byte.

        An added token may hold characters that stand for none (a blank): it is plain text then.
        """
        try:
            token = self._backend.id_to_token(index)
        except (OverflowError, TypeError):
            raise TokenizerError(f"token ids must be integers from 0 up, got {index!r:.80}") from None
        if token is None:
            return b""
        try:
            return bytes(_byte_of_character()[character] for character in token)
        except KeyError:
            return token.encode()

    def _id_of(self, config: Mapping[str, Any], name: str) -> int | None:
        token = _token_names(config).get(name)
        if token is None:
            return None
        index = self._backend.token_to_id(token)
        if index is None:
            raise TokenizerError(f"{name} {token!r} is not in the vocabulary")
        return index


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"a text to encode must be a str, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds a lone surrogate at character {error.start}: it cannot be encoded"
        ) from None


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{path}: not a tokenizer this can read: {' '.join(str(error).split())}"
        ) from None


def _build(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """A tokenizer as Qwen2 defines it, from the two files that older checkpoints carry."""
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{vocab}, {merges.name}: not a BPE vocabulary: {' '.join(str(error).split())}"
        ) from None
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Adds what the config's `added_tokens_decoder` names and the vocabulary lacks, each at its id."""
    declared = config.get("added_tokens_decoder") or {}
    try:
        tokens = sorted((int(index), AddedToken(**_added(token))) for index, token in declared.items())
    except (TypeError, ValueError, AttributeError):
        raise TokenizerError(f"{path}: added_tokens_decoder is not a table from id to token") from None
    present = backend.get_added_tokens_decoder()
    for index, token in tokens:
        if index not in present:
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise TokenizerError(
                f"{path}: added token {token.content!r} should have id {index}, "
                f"but the vocabulary gives it {backend.token_to_id(token.content)}"
            )


def _added(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "__type"}


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like; the file writes a text, an object with `content`, or null."""
    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            names[name] = content
        elif value is not None:
            raise TokenizerError(f"{name} must be a token, got {value!r:.80}")
    return names


def _read_object(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return raw
