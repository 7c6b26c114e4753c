"""Tokenizers without tokenizer.json, and the ids of texts by the libraries that they come from.

Run where sentencepiece and transformers are installed: python tests/make_fixtures/vocabularies.py
It writes the ids for the vocabularies that are there; with --train, it first makes others.
"""

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
import transformers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "How many rows are in the table of books? Count the rows.",
    "select name from books where year > 1990 and price < 20;",
    "Er sagte: „Äpfel und Öl kosten 3,50 €“ – und ging über die Straße.",
    "Le café était fermé; l'été, ça ira mieux à l'hôtel.",
    "def add(a, b):\n    return a + b  # the sum",
    "東京は日本の首都です。 人口は多い。",
    "Привет, мир! Как дела сегодня?",
] * 4
TEXTS = [
    "",
    " ",
    "a",
    "The quick brown fox",
    "  two  spaces,   three ",
    "how many books?\nnew\tline\n\n",
    "ＦＵＬＬ width ﬁne ™ and ½ co\u00a0op",
    "naïve café Ünïcödé ÄÖÜ",
    "東京は日本の首都です。",
    "😀 smile 🏳️‍🌈",
    "aaa aaaa xxxxx zzzzzzzz",
    "<sep>a<sep><sep> b <sep>",
    "a<user>b",
    "1234567890 3.14 -- ... ?!",
    "don't I'll we've THE End",
    "control \u0007 bell\u200bzero",
    "the rows ▁of the table",
    "\u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "if x:\n        return  y\r\n",
]
# Rules as in nmt_nfkc, for a few characters: the whole set would make a file of 240 kB.
RULES = {
    **{chr(0xFF21 + i): chr(0x41 + i) for i in range(26)},
    "ﬁ": "fi",
    "™": "TM",
    "½": "1⁄2",
    "\t": " ",
    "\n": " ",
    "\r": " ",
    "\u00a0": " ",
    "\u0007": "",
    "\u200b": " ",
    "A\u0308": "Ä",
}


def sentencepiece_model(folder, *, rules=False, config=None, **options):
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        if rules:
            table = Path(scratch) / "rules.tsv"
            lines = (
                f"{' '.join(f'{ord(c):X}' for c in key)}\t{' '.join(f'{ord(c):X}' for c in to)}\n"
                for key, to in RULES.items()
            )
            table.write_text("".join(lines))
            options["normalization_rule_tsv"] = str(table)
        else:
            options.setdefault("normalization_rule_name", "identity")
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=written,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level(folder, special, config):
    folder.mkdir(parents=True)
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(
        SENTENCES, vocab_size=400, special_tokens=special, show_progress=False
    )
    backend.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def word_piece(folder, config):
    folder.mkdir(parents=True)
    lower = config.get("do_lower_case", True)
    backend = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    backend.train_from_iterator(SENTENCES, vocab_size=400, show_progress=False)
    backend.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def train():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    sentencepiece_model(
        FIXTURES / "unigram",
        rules=True,
        model_type="unigram",
        vocab_size=300,
        user_defined_symbols=["<sep>"],
        control_symbols=["<control>"],
        config={"add_bos_token": False},
    )
    sentencepiece_model(
        FIXTURES / "unigram_bytes",
        model_type="unigram",
        vocab_size=500,
        character_coverage=0.98,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        config={"add_bos_token": False},
    )
    sentencepiece_model(
        FIXTURES / "llama",
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        remove_extra_whitespaces=False,
        config={"tokenizer_class": "LlamaTokenizer"},
    )
    sentencepiece_model(
        FIXTURES / "gemma",
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["<sep>", "\n", "\n\n", "▁▁", "▁▁▁▁"],
        config={"tokenizer_class": "GemmaTokenizer"},
    )
    sentencepiece_model(
        FIXTURES / "bpe_symbols",
        rules=True,
        model_type="bpe",
        vocab_size=300,
        user_defined_symbols=["<sep>", "<user>"],
        config={"tokenizer_class": "LlamaTokenizer"},
    )
    ends = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    byte_level(FIXTURES / "gpt2", ["<|endoftext|>"], {"tokenizer_class": "GPT2Tokenizer"})
    byte_level(FIXTURES / "roberta", ends, {"tokenizer_class": "RobertaTokenizer"})
    byte_level(FIXTURES / "qwen2", ["<|endoftext|>"], {"tokenizer_class": "Qwen2Tokenizer"})
    word_piece(FIXTURES / "bert", {"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    cased = {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": True}
    word_piece(FIXTURES / "bert_cased", cased | {"tokenizer_class": "BertTokenizer"})


def ids_of(folder):
    """Return the ids of the texts by sentencepiece, or by transformers."""
    model = folder / "tokenizer.model"
    if model.is_file():
        encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    else:
        encode = transformers.AutoTokenizer.from_pretrained(folder).encode
    return [encode(text) for text in TEXTS]


def main():
    if "--train" in sys.argv:
        train()
    folders = sorted(folder for folder in FIXTURES.iterdir() if folder.is_dir())
    expected = {folder.name: ids_of(folder) for folder in folders}
    text = json.dumps({"texts": TEXTS, "ids": expected}, separators=(",", ":"))
    (FIXTURES / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
