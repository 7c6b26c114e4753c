import json

import jax

import jax_lora
from jax_lora.report.versions import write_versions


def test_the_file_names_packages_and_devices(tmp_path):
    write_versions(tmp_path)
    found = json.loads((tmp_path / "versions.json").read_text())
    assert (found["jax_lora"], found["jax"]) == (jax_lora.__version__, jax.__version__)
    assert len(found["devices"]) == len(jax.devices())
