"""The files of a tokenizer go with a model that is saved."""

from jax_lora.models.tokenizer_files import copy_companions

FILES = (
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def test_every_file_of_a_tokenizer_is_copied_and_a_chosen_template_is_the_default(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in (*FILES, "model.safetensors", "additional_chat_templates/notes.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_companions(source, target)
    found = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    assert found == sorted(FILES)
    assert all((target / name).read_text() == name for name in FILES)
    copy_companions(source, target, "chosen")
    assert (target / "chat_template.jinja").read_text() == "chosen"
