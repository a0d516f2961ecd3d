"""Tokenizers: ids and texts as transformers' BertTokenizer has them, and byte-pair encoding of any language."""

import hashlib
import pickle

import pytest
import torch

from blipfast.text import (
    VOCAB,
    init_tokenizer,
    load_tokenizer,
    pre_caption,
    pre_question,
    train_tokenizer,
    with_prompt,
)

STRINGS = [
    "a dog's tail, red",
    "A Dog Runs Across The Field .",
    "two men's hats; isn't it? don't! we're, they've, i'm",
    "it is 'quoted' text, \"twice\"",
    "I do n't know",
    "naïve café, Ünïcödé, façade",
    "e\u0301clair, combining accents",
    "一只狗在草地上奔跑",
    "mixed 中文 and english中文",
    "日本語のテキスト",
    "한국어 텍스트",
    "emoji 😀 face, 👩‍🚀",
    "10,000.5 - 3/4 (b) [x] {y} 50% $3 #4 @home a&b c+d=e",
    "x" * 120,
    "supercalifragilisticexpialidocious pneumothorax",
    "tabs\tnew\nlines  and   spaces ",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen",
    "control\x00\x07characters\ufffd",
    "[MASK] in a text [SEP] and [UNK]",
    "¿qué? ¡sí!",
    "“curly” ‘quotes’ — dash … dots",
    "straße İstanbul ΑΒΓ Привет",
    "ﬁ ligature ½ ² ℃",
    "e-mail: someone@example.com, www.example.com/a?b=c",
    "a . b ! c ? d , e",
    "he 's , she 've , they 're",
    "rock ' n ' roll",
    "",
    " ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀",
]


@pytest.fixture(scope="module")
def wordpiece():
    return init_tokenizer()


@pytest.fixture(scope="module")
def bpe():
    captions = [
        "A red dog runs across the grass",
        "一只红色的狗在草地上奔跑",
        "빨간 개가 잔디 위를 달린다",
    ] * 4
    return train_tokenizer(captions, vocab_size=400)


@pytest.fixture(params=["wordpiece", "bpe"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_vocabulary_is_bert_base_uncased():
    digest = hashlib.sha256(VOCAB.read_bytes()).hexdigest()
    assert digest == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def test_special_ids_are_those_of_official_blip(wordpiece):
    assert (wordpiece.pad_token_id, wordpiece.unk_token_id, wordpiece.mask_token_id) == (0, 100, 103)
    assert (wordpiece.cls_token_id, wordpiece.sep_token_id, wordpiece.eos_token_id) == (101, 102, 102)
    assert (wordpiece.bos_token_id, wordpiece.enc_token_id, len(wordpiece)) == (30522, 30523, 30524)
    assert wordpiece.additional_special_tokens_ids == [30523]
    assert wordpiece("a picture of ").input_ids == [101, 1037, 3861, 1997, 102]


def test_ids_and_texts_equal_transformers(wordpiece):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(VOCAB))
    assert len(theirs) == 30522  # a wrong argument silently gives a vocabulary of five
    for text in STRINGS:
        ids = theirs(text).input_ids
        assert wordpiece(text).input_ids == ids, text
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=True)
            assert wordpiece.decode(ids, skip_special_tokens=skip) == expected, text


def test_batches_equal_transformers(wordpiece):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(VOCAB))
    for how in ({"padding": "longest"}, {"padding": "max_length", "truncation": True, "max_length": 9}):
        ours, expected = (
            tokenizer(STRINGS[:13], return_tensors="pt", **how) for tokenizer in (wordpiece, theirs)
        )
        assert torch.equal(ours.input_ids, expected.input_ids)
        assert torch.equal(ours.attention_mask, expected.attention_mask)


def test_decoding_joins_words_and_punctuation(wordpiece):
    assert (
        wordpiece.decode(wordpiece("A dog's tail , red").input_ids, skip_special_tokens=True)
        == "a dog's tail, red"
    )


def test_texts_are_wrapped_padded_and_cut_the_same_way(tokenizer):
    texts = ["a red dog", "a red dog runs across the green grass", ""]
    enc = tokenizer(texts, padding="max_length", truncation=True, max_length=6, return_tensors="pt")
    assert enc.input_ids.shape == enc.attention_mask.shape == (3, 6)
    assert enc.input_ids.dtype == enc.attention_mask.dtype == torch.int64
    assert (enc.input_ids[:, 0] == tokenizer.cls_token_id).all()
    last = enc.attention_mask.sum(1) - 1
    assert (enc.input_ids[range(3), last] == tokenizer.sep_token_id).all()
    assert torch.equal(enc.attention_mask == 0, enc.input_ids == tokenizer.pad_token_id)
    assert last.tolist()[1:] == [5, 1]
    longest = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    assert longest.shape[1] == max(len(row) for row in tokenizer(texts).input_ids)


def test_one_text_is_flat_and_a_row_as_a_tensor(tokenizer):
    flat = tokenizer("a red dog")
    assert tokenizer("a red dog", return_tensors="pt").input_ids.tolist() == [flat.input_ids]
    assert flat["attention_mask"] == [1] * len(flat.input_ids)


def test_an_encoding_can_be_changed_moved_and_read_by_name(tokenizer):
    enc = tokenizer(["a dog", "a red dog"], padding=True, return_tensors="pt")
    assert enc.to("cpu") is enc
    enc.input_ids[:, 0] = tokenizer.enc_token_id
    assert enc["input_ids"][:, 0].tolist() == [tokenizer.enc_token_id] * 2
    enc.input_ids = enc.input_ids[:1]
    assert dict(**enc)["input_ids"].shape[0] == 1
    with pytest.raises(AttributeError):
        _ = enc.token_type_ids


def test_ragged_texts_and_bad_arguments_say_what_to_pass(tokenizer):
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["a", "a red dog"], return_tensors="pt")
    with pytest.raises(ValueError, match="'longest'"):
        tokenizer("a", padding="left")
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer("a", truncation=True, max_length=1)


def test_tensors_and_batches_decode_like_lists(tokenizer):
    enc = tokenizer(["a dog", "a red dog"], padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(enc.input_ids, skip_special_tokens=True) == ["a dog", "a red dog"]
    assert tokenizer.decode(enc.input_ids[1], skip_special_tokens=True) == "a red dog"


def test_byte_pairs_keep_every_language(bpe):
    for text in [
        "一只红色的猫，在这里。",
        "빨간 고양이가 달린다",
        "émoji 😀👩‍🚀",
        "ünseen wörds: naïve",
        "ไทย العربية",
    ]:
        ids = bpe(text).input_ids
        assert bpe.unk_token_id not in ids
        assert bpe.decode(ids, skip_special_tokens=True) == text


def test_byte_pairs_learn_from_the_captions(bpe):
    assert len(bpe(" red").input_ids) < len(bpe(" xqz").input_ids)
    assert len(bpe("一只红色的狗在草地上奔跑").input_ids) <= 6


def test_a_prompt_is_a_prefix_of_its_caption_in_ids_and_in_text(tokenizer):
    prompt, caption = tokenizer("a picture of a ").input_ids, tokenizer("a picture of a red dog").input_ids
    assert caption[: len(prompt) - 1] == prompt[:-1]
    assert tokenizer.decode(caption, skip_special_tokens=True)[len("a picture of a ") :] == "red dog"


def test_byte_pairs_cut_inside_a_character_decode_to_clean_text(bpe):
    ids = bpe("a 😀").input_ids[:-2]
    assert "\ufffd" not in bpe.decode(ids)


def test_byte_pairs_lower_case_unless_told_otherwise():
    assert (
        train_tokenizer(["Dog"] * 3, 300)("Dog").input_ids
        == train_tokenizer(["dog"] * 3, 300)("dog").input_ids
    )
    kept = train_tokenizer(["Dog"] * 3, 300, lowercase=False)
    assert kept.decode(kept("A Dog").input_ids, skip_special_tokens=True) == "A Dog"


def test_training_twice_gives_the_same_tokenizer():
    captions = [
        f"{colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("cat", "bat", "rat", "car")
    ]
    assert len({train_tokenizer(captions, 280).backend.to_str() for _ in range(3)}) == 1


@pytest.mark.parametrize(
    "captions, size, said", [([], 300, "no caption"), ([" "], 300, "no caption"), (["a"], 262, "263")]
)
def test_training_on_nothing_or_too_small_is_refused(captions, size, said):
    with pytest.raises(ValueError, match=said):
        train_tokenizer(captions, size)


def test_a_saved_tokenizer_loads_from_its_file_and_from_a_run_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert loaded.enc_token_id == tokenizer.enc_token_id
        assert len(loaded) == len(tokenizer)
        for text in STRINGS:
            ids = tokenizer(text).input_ids
            assert loaded(text).input_ids == ids
            assert loaded.decode(ids, True) == tokenizer.decode(ids, True)


def test_the_official_name_loads_word_piece():
    assert load_tokenizer("bert-base-uncased").enc_token_id == 30523


def test_a_file_that_is_no_blip_tokenizer_is_named(tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(FileNotFoundError, match="no.json"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: not a tokenizer.json"):
        load_tokenizer(tmp_path / "broken.json")
    Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, unk_token="[UNK]")
    ).save(str(tmp_path / "bert.json"))
    with pytest.raises(ValueError, match=r"bert.json: the vocabulary lacks \[DEC\], \[ENC\]"):
        load_tokenizer(tmp_path / "bert.json")


def test_a_tokenizer_can_be_sent_to_a_worker(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer))("a red dog").input_ids == tokenizer("a red dog").input_ids


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ("A Dog. It's (very) red!\n", "a dog it's very red"),
        ('x*y#z:;~ "q"', "x y z q"),
        ("  two   spaces  ", "two spaces"),
        ("well-known, a/b?", "well-known, a/b?"),
        ("一只狗", "一只狗"),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_official(caption, cleaned):
    assert pre_caption(caption) == cleaned


def test_captions_and_questions_are_cut_to_words():
    assert pre_caption("one two three four", max_words=2) == "one two"
    assert pre_question("What is (this)? A dog!  ", max_ques_words=3) == "what is this?"
    assert pre_question("is it:red") == "is itred"


def test_tokens_and_ids_are_told_as_transformers_tells_them():
    tokenizer = init_tokenizer()
    tokens = ["two", "sc", "##hn", "##au", "##zers"]
    assert tokenizer.tokenize("Two schnauzers") == tokens
    ids = tokenizer("two schnauzers").input_ids[1:-1]
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(torch.tensor(ids)) == tokens
    assert tokenizer.convert_ids_to_tokens(tokenizer.enc_token_id) == "[ENC]"
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id
    assert tokenizer.vocab_size == 30522


def test_a_prompt_whose_space_yaml_dropped_gets_it_back():
    assert (
        with_prompt("a picture of", "a dog") == with_prompt("a picture of ", "a dog") == "a picture of a dog"
    )
    assert with_prompt("", "a dog") == "a dog"
    assert with_prompt("photo-", "a dog") == "photo-a dog"
    assert with_prompt("图片是", "一只狗") == "图片是一只狗"
