"""Text to token ids and back: BERT's WordPiece, or byte-pair encoding trained on the user's own captions.

Both have the same seven special tokens and the same form, `[CLS] text [SEP]` padded right with [PAD]; a model
puts [ENC] (image-grounded encoder) or [DEC] (decoder) in place of [CLS].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from blipfast.files import whole

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
VOCAB = Path(__file__).parent / "assets" / "vocab.txt"
MODEL_MAX_LENGTH = 512  # BERT's position embeddings


class Encoding(dict):
    """Token ids and masks, by item (`enc["input_ids"]`) or attribute (`enc.input_ids`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Encoding:
        """Move the tensors to `device`, in place."""
        for name, value in self.items():
            self[name] = value.to(device, non_blocking=non_blocking)
        return self


class Tokenizer:
    """BLIP's view of a Hugging Face `tokenizers` tokenizer, which must have SPECIAL_TOKENS in its vocabulary.

    Ids by name: pad_token_id, unk_token_id, cls_token_id, sep_token_id = eos_token_id, mask_token_id,
    bos_token_id ([DEC]), enc_token_id ([ENC]). `len(tokenizer)` is the vocabulary with the special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "the tokenizer") -> None:
        ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, id in ids.items() if id is None]
        if missing:
            raise ValueError(
                f"{source}: the vocabulary lacks {', '.join(missing)}. "
                "Make one that has all special tokens with `blipfast tokenizer train`."
            )
        self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id, self.mask_token_id = (
            ids[token] for token in SPECIAL_TOKENS[:5]
        )
        self.bos_token_id, self.enc_token_id = ids["[DEC]"], ids["[ENC]"]
        self.eos_token_id = self.sep_token_id
        self.all_special_ids = tuple(ids.values())
        self.additional_special_tokens_ids = [self.enc_token_id]  # official BLIP's way to [ENC]

        backend.add_special_tokens(list(SPECIAL_TOKENS))  # known already; now also skipped when decoding
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
        )
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._cleans_up = isinstance(backend.decoder, decoders.WordPiece)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Encode one text or a list of texts as `[CLS] ... [SEP]`.

        padding: False, True or "longest" (of these texts), "max_length". truncation keeps the first
        `max_length` - 1 tokens and [SEP]; without a `max_length` it is 512.
        return_tensors: "pt" for int64 tensors [B, T] (one text too: [1, T]), None for lists (one text: flat).
        Returns input_ids and attention_mask (1 token, 0 padding).
        Raises ValueError for unknown arguments, and for "pt" with texts of several lengths left unpadded.
        """
        if padding not in (False, True, "longest", "max_length") or return_tensors not in (None, "pt"):
            raise ValueError(
                f"padding={padding!r}, return_tensors={return_tensors!r}: padding is False, True, 'longest' or "
                "'max_length'; return_tensors is None or 'pt'."
            )
        max_length = MODEL_MAX_LENGTH if max_length is None else max_length
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: a text needs at least 2 tokens, [CLS] and [SEP].")
        single = isinstance(text, str)
        rows = [row.ids for row in self.backend.encode_batch_fast([text] if single else list(text))]
        if truncation:
            rows = [row if len(row) <= max_length else row[: max_length - 1] + row[-1:] for row in rows]
        lengths = [len(row) for row in rows]
        if padding:
            width = max_length if padding == "max_length" else max(lengths, default=0)
            rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        masks = [[1] * length + [0] * (len(row) - length) for row, length in zip(rows, lengths)]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise ValueError(
                    f"Texts of {min(lengths)} to {max(lengths)} tokens do not fit one tensor; pass padding=True"
                    " (and truncation=True with a max_length)."
                )
            return Encoding(input_ids=_tensor(rows), attention_mask=_tensor(masks))
        return Encoding(
            input_ids=rows[0] if single else rows,
            attention_mask=masks[0] if single else masks,
        )

    @property
    def vocab_size(self) -> int:
        """Without the special tokens that were added, as transformers counts."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without [CLS] and [SEP]."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor) -> str | list[str]:
        """The token of an id, or those of several."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return (
            self.backend.id_to_token(ids)
            if isinstance(ids, int)
            else list(map(self.backend.id_to_token, ids))
        )

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or those of several; of what is none, that of [UNK]."""
        if not isinstance(tokens, str):
            return list(map(self.convert_tokens_to_ids, tokens))
        found = self.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids [T] to text. WordPiece is joined as Hugging Face does it: `a dog's tail, red`."""
        return self.batch_decode([ids], skip_special_tokens)[0]

    def batch_decode(
        self, ids: Sequence[Sequence[int]] | Tensor, skip_special_tokens: bool = False
    ) -> list[str]:
        """Ids [B, T], or B lists of any lengths, to B texts."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in ids]
        texts = self.backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        return [_clean_up(text) if self._cleans_up else text.replace("\ufffd", "") for text in texts]

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json for `load_tokenizer`; an old file is replaced whole."""
        with whole(path) as unfinished:
            unfinished.write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def init_tokenizer() -> Tokenizer:
    """BERT's uncased WordPiece with [DEC] = 30522 and [ENC] = 30523, from the vocabulary in this package.

    Its ids are those of transformers' BertTokenizer for bert-base-uncased.
    """
    words = VOCAB.read_text(encoding="utf-8").splitlines()
    backend = tokenizers.Tokenizer(
        models.WordPiece(
            {word: i for i, word in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=100
        )
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)  # and strips accents, spaces out Chinese
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(backend)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer "bert-base-uncased" (see `init_tokenizer`), a tokenizer.json, or the one in a run folder.

    Raises FileNotFoundError if there is no such file, ValueError if it is no tokenizer or lacks special tokens.
    """
    if str(name_or_path) == "bert-base-uncased":
        return init_tokenizer()
    path = Path(name_or_path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such tokenizer. Give bert-base-uncased, a tokenizer.json or a run folder."
        )
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}).") from None
    return Tokenizer(backend, str(path))


def train_tokenizer(captions: Iterable[str], vocab_size: int = 8000, lowercase: bool = True) -> Tokenizer:
    """Byte-level BPE trained on `captions`; any language goes through it without [UNK].

    Spaces are collapsed and characters composed (NFC) before encoding, and with `lowercase` capitals are lost;
    otherwise decoding gives back the text. The vocabulary is smaller than `vocab_size` if the captions have fewer
    pairs to merge. Raises ValueError if `vocab_size` is below 263 (special tokens and bytes) or no caption has text.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size}: at least {smallest} are needed, special tokens and bytes."
        )
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    steps = [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence(steps + ([normalizers.Lowercase()] if lowercase else []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with_text = 0

    def counted() -> Iterable[str]:
        nonlocal with_text
        for caption in captions:
            with_text += bool(caption.strip())
            yield caption

    backend.train_from_iterator(counted(), trainer)
    if not with_text:
        raise ValueError("There is no caption to train the tokenizer on.")
    return Tokenizer(backend)


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Texts as the models take them: one alone counts as a list of one, as in official BLIP."""
    return [texts] if isinstance(texts, str) else list(texts)


def with_prompt(prompt: str, caption: str) -> str:
    """A caption after a prompt; a space at the prompt's end, which YAML drops unless there are quotes, is put back."""
    gap = " " if prompt and prompt[-1].isascii() and prompt[-1].isalnum() else ""
    return prompt + gap + caption


def pre_caption(caption: str, max_words: int = 50) -> str:
    """Official BLIP's caption cleaning: lower case, . ! " ( ) * # : ; ~ to spaces, at most `max_words` words."""
    caption = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", caption.lower()))
    return " ".join(caption.rstrip("\n").strip(" ").split(" ")[:max_words])


def pre_question(question: str, max_ques_words: int = 50) -> str:
    """Official BLIP's question cleaning: as `pre_caption`, but the characters are removed and spaces kept."""
    question = re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ")
    return " ".join(question.split(" ")[:max_ques_words])


def _tensor(rows: list[list[int]]) -> Tensor:
    return (
        torch.tensor(rows, dtype=torch.int64).view(len(rows), -1)
        if rows
        else torch.empty(0, 0, dtype=torch.int64)
    )


def _clean_up(text: str) -> str:
    """transformers' `clean_up_tokenization_spaces`, in its order: no space before punctuation and contractions."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip() if spaced == " ' " else spaced[1:])
    return text
