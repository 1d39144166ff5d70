"""SentencePiece tokenizer with Gemma's special ids: encodes, decodes, and trains a small model from text."""

import contextlib
import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gemma_jax.errors import UserError
from gemma_jax.paths import read_bytes, user_path

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0..3
# Ids 4..110 of google/gemma's tokenizer.model. Ids 108..110 are runs of newlines. Because newlines are never
# part of a longer piece, a prompt that ends at a line's end is tokenised as in the training text.
_GEMMA_USER_DEFINED = (
    *("<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(99)),
    *(START_OF_TURN, END_OF_TURN),
    *("\n", "\n\n", "\n\n\n"),
)
# The user-defined pieces of Gemma's file that only format text; encode_typed() does not split them.
_HTML_TAG = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)
# Training gets a text in parts of this many characters, because SentencePiece silently skips a sentence with
# more bytes than a limit. Cuts are too rare to change which pieces are learnt.
_TRAINING_PART = 4096
_LARGEST_FILE = 2**26  # bytes; Gemma's own file has 4 million
# A text that is not reproduced exactly by a model with a normaliser, a dummy prefix or no byte fallback.
_PROBE = "  a\tﬁ\r\n\n b\x00é𐍈  "


class Tokenizer:
    """A SentencePiece model with pad 0, eos 1, bos 2, unk 3 and turn markers (shared by Gemma 1 to 3).

    Instances are immutable, and are pickled as the bytes of their model file.
    """

    pad_id = 0
    eos_id = 1
    bos_id = 2
    unk_id = 3

    def __init__(self, model: bytes, source: str = "the tokenizer model") -> None:
        """Loads the bytes of a model file, called `source` in errors. Raises UserError as load() does."""
        remedy = "give the tokenizer.model file of a Gemma checkpoint or one that Tokenizer.train wrote"
        if not model:
            raise UserError(f"{source} is empty; {remedy}.")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = ModelProto.FromString(model).pieces
            if any(isinstance(piece.piece, bytes) for piece in pieces):  # protobuf's form of invalid UTF-8
                raise ValueError("a piece is not UTF-8")
        except (RuntimeError, ValueError) as error:  # SentencePiece raises either
            raise UserError(f"{source} is not a whole SentencePiece model; {remedy}.") from error
        ids = (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
        if ids != (self.pad_id, self.eos_id, self.bos_id, self.unk_id):
            raise UserError(
                f"{source} has pad, eos, bos, unk at ids {', '.join(map(str, ids))} "
                f"where Gemma has 0, 1, 2, 3; {remedy}."
            )
        for marker in (START_OF_TURN, END_OF_TURN):
            if processor.piece_to_id(marker) == self.unk_id:
                raise UserError(f"{source} has no piece {marker}; {remedy}.")
        # The probe is repeated because decoding removes a dummy prefix, but only at the start of the text.
        if processor.decode(2 * processor.encode(_PROBE)) != 2 * _PROBE:
            raise UserError(f"{source} does not keep white space and every character exactly; {remedy}.")
        self._model = model
        self._processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.start_of_turn_id: int = processor.piece_to_id(START_OF_TURN)
        self.end_of_turn_id: int = processor.piece_to_id(END_OF_TURN)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """The SHA-256 of the model file, in hexadecimal."""
        self._control_text = _control_text_pattern(pieces)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self._model,)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a model file, local or in a bucket (gs://, s3://).

        Raises:
            UserError: The file is missing or empty, is not a SentencePiece model, does not have Gemma's ids
                (pad 0, eos 1, bos 2, unk 3, both turn markers), or does not preserve every character.
        """
        model = read_bytes(user_path(path), _LARGEST_FILE)
        return cls(model, source=f"The tokenizer file {os.fspath(path)}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> "Tokenizer":
        """Trains a byte-pair model on `texts`, writes it to `path` and returns it.

        The same texts and size make the same file on any machine. Ids 0..110 are those of Gemma's own file,
        each digit is a piece, rare characters are encoded as bytes, and nothing is normalised. A run of
        newlines is a separate piece; other pieces may span spaces (`▁for▁i▁in▁range(`), which on Python
        source results in more bytes per token than Gemma's own rule (benchmarks/LOG.md, 2026-11-23). All of
        `texts` is held in memory, so pass a sample of a large corpus.

        Raises:
            UserError: There is no text, it holds lone surrogates, `vocab_size` is too small for the fixed
                pieces, bytes and characters (the message gives the minimum) or too large for the text, or
                `path` cannot be written.
        """
        failures: list[Exception] = []

        def parts() -> Iterator[str]:
            try:
                for text in texts:
                    _check_surrogates(text)
                    for start in range(0, len(text), _TRAINING_PART):
                        # SentencePiece silently drops a part with U+2585, its symbol for unknown characters.
                        yield text[start : start + _TRAINING_PART].replace("\u2585", " ")
            except Exception as error:
                failures.append(error)  # SentencePiece would re-raise it as a RuntimeError
                raise

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=parts(),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                pad_id=cls.pad_id,
                eos_id=cls.eos_id,
                bos_id=cls.bos_id,
                unk_id=cls.unk_id,
                pad_piece=_SPECIAL[0],
                eos_piece=_SPECIAL[1],
                bos_piece=_SPECIAL[2],
                unk_piece=_SPECIAL[3],
                user_defined_symbols=list(_GEMMA_USER_DEFINED),
                byte_fallback=True,
                # Otherwise, after training on text with no space, spaces would be encoded as bytes that
                # decode to U+2581.
                required_chars="\u2581",
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_by_whitespace=False,
                split_by_unicode_script=False,
                split_digits=True,
                max_sentencepiece_length=32,
                max_sentence_length=4 * _TRAINING_PART + 1,  # bytes; no character has more than 4
                num_threads=2,  # fixed, because it is stored in the file and so part of the fingerprint
                minloglevel=2,
            )
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise _training_error(error, vocab_size) from error
        tokenizer = cls(model.getvalue(), source="The trained tokenizer")
        tokenizer.save(path)
        return tokenizer

    @classmethod
    def from_pieces(cls, pieces: Iterable[tuple[str, float, int]], source: str) -> "Tokenizer":
        """Builds a byte-pair model from its pieces, with Gemma's settings for everything else.

        Args:
            pieces: The text, score and type of each piece in the order of the ids, as `pieces` returns them.
            source: Where they are from, for messages.

        Raises:
            UserError: The pieces make no tokenizer of Gemma's kind; see `load`.
        """
        model = ModelProto()
        for text, score, kind in pieces:
            model.pieces.add(piece=text, score=score, type=kind)
        trained, normalizer = model.trainer_spec, model.normalizer_spec
        trained.model_type, trained.byte_fallback = trained.BPE, True
        trained.vocab_size = len(model.pieces)
        trained.pad_id, trained.eos_id, trained.bos_id, trained.unk_id = 0, 1, 2, 3
        trained.pad_piece, trained.eos_piece, trained.bos_piece, trained.unk_piece = _SPECIAL
        normalizer.name, normalizer.add_dummy_prefix = "identity", False
        normalizer.remove_extra_whitespaces = False
        return cls(model.SerializeToString(), source)

    def pieces(self) -> list[tuple[str, float, int]]:
        """The text, score and type (a number of SentencePiece's `ModelProto`) of each id."""
        return [(piece.piece, piece.score, piece.type) for piece in ModelProto.FromString(self._model).pieces]

    def acts_as_control(self, piece: str) -> bool:
        """Whether a user-defined piece is a control token, as turn markers are, and not mere text."""
        return self._control_text.match(piece) is not None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model file atomically: readers get the old or the new file. UserError on failure."""
        target = user_path(path)
        unfinished = target.parent / f"{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(self._model)
            unfinished.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise UserError(
                f"The tokenizer file {target} cannot be written ({error}); free space or name another path."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, exactly as SentencePiece does, without bos or eos.

        A turn marker in `text` becomes its one id; use encode_typed() for text that a user typed. U+2581 is
        SentencePiece's symbol for a space and is encoded as one. Raises UserError for lone surrogates.
        """
        _check_surrogates(text)
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        """Encodes each text as encode() does, on `num_threads` threads (-1: all cores)."""
        for text in texts:
            _check_surrogates(text)
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        return ids

    def encode_typed(self, text: str) -> list[int]:
        """Returns the ids of a text that a user typed: nothing in it becomes a control token.

        This is encode(), except that turn markers and every other user-defined piece that is not white space
        or an HTML tag (`<mask>`, `<unused7>`, `[@BOS@]` ...) become ordinary pieces. decode() restores the
        text.
        """
        _check_surrogates(text)
        # The text is cut after the first character of each occurrence, overlapping ones included. Then no
        # part contains a complete one, and SentencePiece, which encodes one part at a time, matches none.
        cuts = [0, *(match.start() + 1 for match in self._control_text.finditer(text)), len(text)]
        ids: list[int] = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            ids += self._processor.encode(text[start:end])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, as SentencePiece does.

        pad, bos and eos decode to nothing, unk to " ⁇ ", and each byte that is not UTF-8 to U+FFFD.
        Raises UserError for an id that is not in the vocabulary.
        """
        checked = [int(i) for i in ids]
        for i in checked:
            self._check_id(i)
        text: str = self._processor.decode(checked)
        return text

    def piece(self, id: int) -> str:
        """Returns the piece as spelled in the model file: `▁the`, `<0x0A>`, `<bos>`.

        Raises UserError for an id that is not in the vocabulary.
        """
        self._check_id(id)
        piece: str = self._processor.id_to_piece(id)
        return piece

    def byte(self, id: int) -> int | None:
        """Returns the byte of a byte piece such as `<0x0A>`; None for every other piece."""
        piece = self.piece(id)
        return int(piece[1:-1], 16) if self._processor.is_byte(id) else None

    def piece_bytes(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of text that each id stands for, int32 [vocab_size].

        It is 0 for control pieces and unk. For text without U+2581, the sum over encode(text) is
        len(text.encode()).
        """
        kind = ModelProto.SentencePiece
        counts = np.zeros(self.vocab_size, np.int32)
        for i, piece in enumerate(ModelProto.FromString(self._model).pieces):
            if piece.type == kind.BYTE:
                counts[i] = 1
            elif piece.type not in (kind.CONTROL, kind.UNKNOWN):
                counts[i] = len(piece.piece.replace("\u2581", " ").encode())
        return counts

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"Token id {id} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}."
            )


def _control_text_pattern(pieces: Iterable[ModelProto.SentencePiece]) -> re.Pattern[str]:
    """Returns a zero-width pattern that matches where a piece that could act as a control token begins."""
    texts = [piece.piece for piece in pieces if piece.type == ModelProto.SentencePiece.USER_DEFINED]
    # The turn markers are always included, even if the model lists them as ordinary pieces.
    texts += [START_OF_TURN, END_OF_TURN]
    control = [text for text in texts if text.strip("\u2581 \t\r\n") and not _HTML_TAG.fullmatch(text)]
    return re.compile(f"(?={'|'.join(map(re.escape, control))})")


def _training_error(error: RuntimeError, vocab_size: int) -> Exception:
    """Returns a UserError if the user can correct the cause of a failed training, else the error itself."""
    message = str(error)
    if "sentences_.empty()" in message:
        return UserError("There is no text to train a tokenizer on; check the corpus.")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"A vocabulary of {vocab_size} is too small; this text needs at least {found[1]} "
            f"({4 + len(_GEMMA_USER_DEFINED)} fixed pieces, 256 bytes and its characters): raise vocab_size."
        )
    if found := re.search(r"Vocabulary size too high \(\d+\).* <= (\d+)", message):
        return UserError(
            f"A vocabulary of {vocab_size} is too large for this text; "
            f"lower vocab_size to at most {found[1]} or train on more text."
        )
    return error


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Character {error.start} of the text is U+{ord(text[error.start]):04X}, half a surrogate pair, "
            "which is no character; decode the text as UTF-8 before passing it."
        ) from None
