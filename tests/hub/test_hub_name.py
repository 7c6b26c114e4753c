import pytest

from jax_lora.hub.hub_name import HubName, find_hub_name, parse_hub_name


@pytest.mark.parametrize(
    "text",
    ["owner/name", "Qwen/Qwen3-0.6B", "o/n@main", "o/n_1.x@refs/pr/1", f"o/n@{'0' * 40}"],
)
def test_a_name_is_printed_as_it_is_typed(text):
    assert str(parse_hub_name(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "path/to/model",
        "./owner/name",
        "../name",
        "/owner/name",
        "~/name",
        "owner/",
        "owner\\name",
        "owner/na me",
        "owner/..",
        "owner/name.git",
        "owner/a--b",
        "owner/name@",
        "owner/name@../x",
        "owner/name@a b",
        "owner/name@-x",
        "owner/n\N{LATIN SMALL LETTER A WITH ACUTE}me",
        "owner/name\n",
        "",
    ],
)
def test_a_path_is_not_a_name(text):
    assert parse_hub_name(text) is None


def test_a_local_path_of_the_name_is_preferred(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_hub_name("owner/name") == HubName("owner/name")
    assert find_hub_name(tmp_path / "name") is None
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").touch()
    assert find_hub_name("owner/name") is None
    assert find_hub_name("owner/name@main") == HubName("owner/name", "main")
