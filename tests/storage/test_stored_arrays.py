"""Arrays on the disk are compared with the expected ones before they are read."""

import json
import shutil

import jax
import numpy as np
import pytest

from jax_lora.storage import array_store, stored_arrays
from jax_lora.storage.ocdbt_index import check_index
from jax_lora.storage.stored_arrays import check_stored

ARRAYS = {
    "0000": {"a": np.ones((40, 3), np.float32), "b": np.zeros((3, 2), np.float32)},
    "0001": {"value": np.ones(2, jax.numpy.bfloat16), "n": np.int32(3)},
}


def template(**changed):
    leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), ARRAYS)
    leaves["0000"] |= changed
    return leaves


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays") / "saved"
    array_store.write_arrays(folder, ARRAYS)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "arrays")


def store(folder):
    import tensorstore

    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{folder.as_uri()}/"}).result()


def rewrite(folder, name, **changed):
    values = store(folder)
    key = f"{name}/.zarray"
    stored = json.loads(values.read(key).result().value) | changed
    values.write(key, json.dumps(stored).encode()).result()


def test_arrays_that_were_written_are_read(saved):
    again = array_store.read_arrays(saved, template())
    assert jax.tree.all(jax.tree.map(np.array_equal, again, ARRAYS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": [2**20, 2**10]}, "shape"),
        ({"shape": "x"}, "shape"),
        ({"dtype": "<f8"}, "more than 480 bytes"),
        ({"dtype": [["x", "<f4"]]}, "type"),
        ({"chunks": [2**20, 2**10]}, "chunks"),
        ({"chunks": [-1, 3]}, "chunks"),
        ({"chunks": [40]}, "chunks"),
        ({"chunks": [0, 3]}, "chunks"),
        ({"dimension_separator": "x"}, "1 chunks, separated by 'x'"),
        ({"chunks": [40, 2]}, "a chunk of 480 bytes instead of 320"),
        ({"compressor": {"id": "blosc"}}, "compression"),
        ({"filters": [{"id": "delta"}]}, "compression"),
    ],
    ids=str,
)
def test_other_metadata_is_refused_before_anything_is_read(folder, changed, message):
    rewrite(folder, "0000.a", **changed)
    with pytest.raises(ValueError, match=message):
        check_stored(folder, template())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"plain bytes",
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd\x00\x58",  # no size
        b"\x28\xb5\x2f\xfd\xe0" + (2**31).to_bytes(8, "little"),
    ],
)
def test_a_chunk_must_state_the_size_of_the_array(folder, frame):
    store(folder).write("0000.a/0.0", frame).result()
    with pytest.raises(ValueError, match="instead of 480"):
        check_stored(folder, template())


def test_every_chunk_that_a_reader_looks_up_is_checked(folder):
    store(folder).write("0000.a/0/0", b"plain bytes").result()
    check_stored(folder, template())  # no reader has this name for it
    rewrite(folder, "0000.a", dimension_separator="/")
    with pytest.raises(ValueError, match="instead of 480"):
        check_stored(folder, template())


def test_an_array_of_many_small_chunks_is_refused(folder, monkeypatch):
    monkeypatch.setattr(stored_arrays, "_MOST_CHUNKS", 100)
    rewrite(folder, "0000.a", chunks=[1, 1])
    with pytest.raises(ValueError, match="120 chunks.*at most 100 are read"):
        check_stored(folder, template())


def test_an_absent_array_is_reported_by_orbax(saved):
    with pytest.raises(ValueError, match="structures do not match"):
        array_store.read_arrays(saved, template(c=jax.ShapeDtypeStruct((2,), np.float32)))


@pytest.mark.parametrize("text", ["[]", "{}", '{"use_ocdbt": false}', '{"use_ocdbt": 1}', "x"])
def test_another_format_is_refused(folder, text):
    (folder / "_METADATA").write_text(text)
    with pytest.raises(ValueError):
        check_stored(folder, template())


def compressed(blocks, magic=0x0CDB20DE):
    """A node of the index, with blocks that repeat a byte 128 times 1024 times."""
    block = (2**17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = (2**17 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd\x00\x58" + block * (blocks - 1) + last
    length = (14 + len(frame) + 4).to_bytes(8, "little")
    return magic.to_bytes(4, "big") + length + b"\0\1" + frame + bytes(4)


@pytest.mark.parametrize("before", [b"", bytes(1000), b"\x0c\xdb\x20\xde"])
def test_a_node_of_the_index_that_expands_too_far_is_refused(folder, before):
    file = next(folder.glob("ocdbt.process_0/d/*"))
    file.write_bytes(before + compressed(400))
    check_index(folder)
    file.write_bytes(before + compressed(600))
    with pytest.raises(ValueError, match="array_index_bytes=N"):
        check_stored(folder, template())


def test_values_that_end_like_the_start_of_a_node_do_not_count(folder):
    (folder / "d" / "values").write_bytes(b"\x0c\xdb\x20\xde" + bytes(9))  # a header has 14 bytes
    check_index(folder)


def test_small_nodes_count_together(folder):
    for number in range(70):
        (folder / "d" / f"{number}").write_bytes(compressed(8))
    with pytest.raises(ValueError, match="index of more than 67,108,864 bytes"):
        check_index(folder)


def test_a_manifest_that_expands_too_far_is_refused(folder):
    (folder / "manifest.ocdbt").write_bytes(compressed(600, magic=0x0CDB3A2A))
    with pytest.raises(ValueError, match=r"manifest\.ocdbt: an index"):
        check_index(folder)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/0000", "ocdbt.process_0/manifest.ocdbt"])
def test_a_huge_sparse_file_is_not_read(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(2**42)
    problems = array_store.file_problems(folder, {}, 100)
    assert (
        len(problems) == 1 and "4,398,046" in problems[0] and "array_index_bytes=N" in problems[0]
    )
