"""Models in, checked at the door; kept, and watched for files that change."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.errors import Conflict, InvalidModelFile, InvalidRequest, ModelNotFound, NotFound
from fleetmind.core.settings import Settings
from fleetmind.core.types import ModelName
from fleetmind.fleet.catalog import NAME, Catalog, near, slug
from fleetmind.fleet.packaged import Package
from fleetmind.fleet.snapshot import ModelSource
from fleetmind.node.protocol import Ability
from fleetmind.testing.clocks import ManualClock
from fleetmind.testing.model_files import Tensor, gguf, llama, tiny_model

from .fakes import MemoryDocuments

TINY = Package(
    model=ModelName("tiny"),
    distribution="no-such-distribution",
    version="1.0",
    wheel_sha256="0" * 64,
    module="no_such_module_anywhere",
    file="tiny.gguf",
    file_sha256=hashlib.sha256(tiny_model()).hexdigest(),
    file_bytes=len(tiny_model()),
)


@pytest.fixture
def store() -> MemoryDocuments:
    return MemoryDocuments()


@pytest.fixture
def catalog(store: MemoryDocuments, tmp_path: Path) -> Catalog:
    return new_catalog(store, tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny Llama (F16).gguf"
    path.write_bytes(tiny_model())
    return path


def new_catalog(store: MemoryDocuments, home: Path) -> Catalog:
    return Catalog(store, Settings(), ManualClock(), home=home, package=TINY)


async def test_a_file_gets_its_name_and_numbers_from_itself(catalog: Catalog, file: Path) -> None:
    model = await catalog.add_file(file)
    assert (model.name, model.source, model.engine) == ("tiny-llama-f16", ModelSource.FILE, "llamacpp")
    assert model.path == str(file)
    assert model.shape is not None
    assert model.shape.layers == 2
    assert catalog.get("tiny-llama-f16") == model
    assert catalog.all() == (model,)


async def test_context_is_cut_to_what_the_model_was_trained_for_and_says_so(catalog: Catalog, file: Path) -> None:
    asked = await catalog.add_file(file, name="asked", context_tokens=9000, slots=2)
    assert (asked.context_tokens, asked.slots) == (2048, 2)
    assert asked.note == "context limited to 2048 tokens, which the model was trained for; 9000 were asked for"
    small = await catalog.add_file(file, name="small", context_tokens=512)
    assert (small.context_tokens, small.note) == (512, "")
    assert "4096 were the default" in (await catalog.add_file(file, name="default")).note


async def test_a_link_is_resolved(catalog: Catalog, file: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(file)
    assert (await catalog.add_file(tmp_path / "link.gguf")).path == str(file)


async def test_an_encoder_can_only_embed(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "e.gguf"
    path.write_bytes(gguf(llama(llama__pooling_type=1)))
    assert (await catalog.add_file(path)).abilities == {Ability.EMBEDDING}


async def test_a_file_that_talks_can_be_made_to_embed_instead(catalog: Catalog, file: Path) -> None:
    model = await catalog.add_file(file, options={"embedding": True, "pooling": "mean"})
    assert model.abilities == {Ability.EMBEDDING}
    assert model.options == {"embedding": True, "pooling": "mean"}
    assert (await catalog.add_file(file, name="talks", options={})).abilities == {Ability.CHAT, Ability.COMPLETION}
    for options in ({"embeding": True}, {"embedding": 1}, {"embedding": "yes"}, {"pooling": "sum"}, {"pooling": True}):
        with pytest.raises(InvalidRequest):
            await catalog.add_file(file, name="bad", options=options)


async def test_a_bad_file_is_refused_and_leaves_nothing(catalog: Catalog, store: MemoryDocuments, file: Path) -> None:
    os.truncate(file, 100)
    with pytest.raises(InvalidModelFile):
        await catalog.add_file(file)
    for path in (Path("/no/such/file"), Path("nul\0"), file.parent):
        with pytest.raises(InvalidModelFile):
            await catalog.add_file(path)
    assert (catalog.all(), store.documents, store.events) == ((), {}, [])


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-dash", "a b", "a" * 129, "ü", "a\n"])
async def test_a_bad_name_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await catalog.add_fake(name, {})
    assert refusal.value.param == "name"


@pytest.mark.parametrize("name", ["a", "GPT-4o.mini_1", "a" * 128])
async def test_a_good_name_is_taken_once(catalog: Catalog, name: str) -> None:
    await catalog.add_fake(name, {})
    with pytest.raises(Conflict):
        await catalog.add_fake(name, {})


@pytest.mark.parametrize(
    ("param", "value"),
    [("slots", 0), ("slots", -1), ("slots", 10**9), ("context_tokens", 1), ("context_tokens", 2**40), ("replicas", -1)],
)
async def test_numbers_have_bounds(catalog: Catalog, file: Path, param: str, value: int) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await catalog.add_file(file, **{param: value})  # type: ignore[arg-type]
    assert refusal.value.param == param


async def test_a_remote_model(catalog: Catalog) -> None:
    model = await catalog.add_remote("big", "https://api.example.org:8443/v1/", remote_model="org/big", key_env="KEY")
    assert (model.url, model.remote_model, model.key_env) == ("https://api.example.org:8443/v1", "org/big", "KEY")
    assert (model.source, model.engine, model.slots) == (ModelSource.REMOTE, "remote", 256)
    assert (await catalog.add_remote("here", "http://10.0.0.2:8000")).url == "http://10.0.0.2:8000/v1"
    assert (await catalog.add_remote("six", "http://[::1]:8000/x")).url == "http://[::1]:8000/x/v1"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.org/v1",
        "ftp://example.org",
        "file:///etc/passwd",
        "http://",
        "http:///v1",
        "http://user:secret@example.org/v1",
        "http://secret@example.org/v1",
        "http://example.org/v1?key=secret",
        "http://example.org/v1#secret",
        "http://example.org:99999/v1",
        "http://exa mple.org/v1",
        "http://example.org/\r\nX: y",
        "http://[::1/v1",
        "http://bücher.example/v1",
        "http://example.org/" + "x" * 3000,
    ],
)
async def test_a_bad_url_is_refused_without_repeating_secrets(catalog: Catalog, url: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await catalog.add_remote("m", url)
    assert refusal.value.param == "url"
    assert "secret" not in refusal.value.message + refusal.value.hint


@pytest.mark.parametrize("key_env", ["", "sk-abcdef", "A B", "1A", "a" * 200])
async def test_a_key_is_given_by_the_name_of_a_variable(catalog: Catalog, key_env: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await catalog.add_remote("m", "http://example.org", key_env=key_env)
    assert refusal.value.param == "key_env"
    assert "sk-abcdef" not in str(refusal.value)


async def test_a_fake_model_has_known_knobs(catalog: Catalog) -> None:
    model = await catalog.add_fake("m", {"slots": 2, "memory_bytes": 5}, replicas=3)
    assert (model.slots, model.replicas_wanted, model.options["memory_bytes"]) == (2, 3, 5)
    with pytest.raises(InvalidRequest, match="did you mean"):
        await catalog.add_fake("n", {"slotz": 2})


async def test_what_was_added_is_there_after_a_restart(catalog: Catalog, store: MemoryDocuments, file: Path) -> None:
    await catalog.add_file(file)
    await catalog.add_remote("r", "http://example.org", key_env="KEY")
    await catalog.add_fake("f", {"ttft_s": 0.5, "hang_after_tokens": 3})
    store.documents = json.loads(json.dumps(store.documents))
    again = new_catalog(store, file.parent)
    assert await again.load() == ()
    assert again.models() == catalog.models()


async def test_an_entry_that_can_not_be_read_is_reported_and_the_others_live(
    store: MemoryDocuments, tmp_path: Path
) -> None:
    catalog = new_catalog(store, tmp_path)
    await catalog.add_fake("good", {})
    await catalog.add_fake("old", {})
    broken = store.documents["old"]["entry"]
    assert isinstance(broken, dict)
    del broken["model"]["slots"]
    store.documents |= {"newer": {"format": 99, "entry": {}}, "odd": {"x": 1}, "swapped": store.documents["good"]}
    again = new_catalog(store, tmp_path)
    notes = await again.load()
    assert {model.name for model in again.all()} == {"good"}
    assert set(again.broken()) == {"old", "newer", "odd", "swapped"}
    assert any("format 99" in note for note in notes)
    with pytest.raises(Conflict):
        await again.add_fake("old", {})
    await again.remove("old")
    await again.add_fake("old", {})


async def test_changes_are_journaled_and_told(catalog: Catalog, store: MemoryDocuments) -> None:
    seen: list[int] = []
    catalog.subscribe(lambda: seen.append(len(catalog.models())))
    await catalog.add_fake("m", {})
    await catalog.remove("m")
    assert seen == [1, 0]
    assert [(event.kind.value, event.subject) for event in store.events] == [
        ("model.added", "m"),
        ("model.removed", "m"),
    ]


async def test_a_name_that_is_not_there_has_neighbours(catalog: Catalog) -> None:
    for name in ("smollm2-135m-instruct", "qwen2.5-0.5b", "llama-3"):
        await catalog.add_fake(name, {})
    with pytest.raises(ModelNotFound) as missing:
        catalog.get("SmolLM2-135M")
    assert missing.value.near[0] == "smollm2-135m-instruct"
    with pytest.raises(ModelNotFound) as missing:
        await catalog.remove("x" * 100_000)
    assert len(missing.value.message) < 300
    assert missing.value.near == ()


def test_neighbours_keep_their_case() -> None:
    assert near("gpt-4O", ["GPT-4o", "other"]) == ("GPT-4o",)


@given(st.text())
def test_a_slug_is_always_a_name(text: str) -> None:
    assert NAME.fullmatch(slug(text))


async def test_a_file_is_watched(catalog: Catalog, store: MemoryDocuments, file: Path) -> None:
    name = (await catalog.add_file(file)).name
    assert await catalog.check(name) is None
    file.rename(file.with_suffix(".away"))
    assert "is gone" in str(await catalog.check(name))
    file.with_suffix(".away").rename(file)
    assert await catalog.check(name) is None
    before = store.documents[name]
    os.utime(file, ns=(1, 1))
    assert await catalog.check(name) is None, "only touched"
    assert store.documents[name] != before, "the new mark is remembered"
    file.write_bytes(gguf(llama(llama__block_count=1), [Tensor("other")]))
    assert "another one now" in str(await catalog.check(name))
    file.write_bytes(b"GGUF")
    assert "truncated" in str(await catalog.check(name))


async def test_what_has_no_file_needs_no_check(catalog: Catalog) -> None:
    await catalog.add_fake("m", {})
    assert await catalog.check("m") is None
    assert await catalog.check("nobody") is None


async def test_the_packaged_model_is_verified_and_added_once(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        await catalog.add_packaged()
    assert "fleetmind models add tiny" in missing.value.hint
    fetched = tmp_path / "models" / "tiny.gguf"
    fetched.parent.mkdir()
    fetched.write_bytes(tiny_model()[:-1] + b"x")
    with pytest.raises(InvalidModelFile) as wrong:
        await catalog.add_packaged()
    assert wrong.value.fault == "hash-mismatch"
    fetched.write_bytes(tiny_model())
    model = await catalog.add_packaged()
    assert (model.name, model.source, model.path) == ("tiny", ModelSource.PACKAGED, str(fetched))
    assert model.sha256 == TINY.file_sha256
    assert await catalog.add_packaged() is model


async def test_a_packaged_file_that_changes_is_not_served(catalog: Catalog, tmp_path: Path) -> None:
    fetched = tmp_path / "models" / "tiny.gguf"
    fetched.parent.mkdir()
    fetched.write_bytes(tiny_model())
    await catalog.add_packaged()
    fetched.write_bytes(tiny_model()[:-1] + b"x")
    assert "is not the file of" in str(await catalog.check("tiny"))
    fetched.unlink()
    assert "not on this machine" in str(await catalog.check("tiny"))
