"""Folders of small BERT, RoBERTa, and T5 models as transformers saved them, with tokenizers."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = "good fine nice bad poor dull the film was is a plot cast music and not very so".split()
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "t5": ["<pad>", "</s>", "<unk>"],
}
ROLES = {
    "bert": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
    "roberta": {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 4},
    "t5": {"pad": 0, "eos": 1, "unk": 2},
}
TEMPLATES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
}


def model_folder(target, architecture, variant):
    """Copy a committed model, and write a tokenizer of whole words beside it."""
    source = FIXTURES / architecture / variant
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected*"))
    special = SPECIAL[architecture]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    names = {role: special[number] for role, number in ROLES[architecture].items()}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, names["unk"]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    single, pair = TEMPLATES[architecture]
    used = [(token, vocabulary[token]) for token in special if token in single]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=used)
    backend.save(str(target / "tokenizer.json"))
    roles = {f"{role}_token": token for role, token in names.items()}
    (target / "tokenizer_config.json").write_text(json.dumps(roles))
    return target
