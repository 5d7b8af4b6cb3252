"""Configuration: precedence, origins, and refusals that say what to do."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetmind.core.config import (
    Configuration,
    Source,
    example,
    home_from,
    leaves,
    load,
    mask,
)
from fleetmind.core.errors import ConfigurationError
from fleetmind.core.settings import Settings

SOURCES = ("file", "environment", "flag")


def configure(home: Path, text: str = "", environ: dict[str, str] | None = None, **flags: str) -> Configuration:
    (home / "fleetmind.toml").write_text(text, encoding="utf-8")
    return load(home, environ=environ or {}, flags={name.replace("__", "."): value for name, value in flags.items()})


def refusal(home: Path, text: str = "", environ: dict[str, str] | None = None, **flags: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as refused:
        configure(home, text, environ, **flags)
    return refused.value


def test_without_any_source_every_value_is_its_default(tmp_path: Path) -> None:
    configuration = load(tmp_path, environ={"PATH": "/bin"}, flags={})
    assert configuration.settings == Settings()
    assert {origin.source for origin in configuration.origins.values()} == {Source.DEFAULT}


@given(st.dictionaries(st.sampled_from(SOURCES), st.integers(0, 65535)))
def test_the_strongest_source_wins_and_is_named(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, int]
) -> None:
    home = tmp_path_factory.mktemp("home")
    configuration = configure(
        home,
        f"[server]\nport = {given['file']}\n" if "file" in given else "",
        {"FLEETMIND_SERVER_PORT": str(given["environment"])} if "environment" in given else {},
        **({"server__port": str(given["flag"])} if "flag" in given else {}),
    )
    strongest = next((source for source in reversed(SOURCES) if source in given), "default")
    assert configuration.settings.server.port == given.get(strongest, 9200)
    assert configuration.origins["server.port"].source == strongest
    assert configuration.settings.server.host == "127.0.0.1"


def test_every_default_is_accepted_from_every_source(tmp_path: Path) -> None:
    active = re.sub(r"(?m)^# ([a-z_]+ = )", r"\1", example())
    from_file = configure(tmp_path, active)
    assert from_file.settings == Settings()
    assert {origin.source for origin in from_file.origins.values()} == {Source.FILE}
    texts = {
        one.name: ",".join(one.default) if isinstance(one.default, tuple) else str(one.default) for one in leaves()
    }
    environ = {one.variable: texts[one.name] for one in leaves()}
    assert load(tmp_path / "none", environ=environ, flags={}).settings == Settings()
    assert load(tmp_path / "none", environ={}, flags=texts).settings == Settings()


def test_origins_say_file_and_line(tmp_path: Path) -> None:
    text = "# mine\n[server]\nhost = 'localhost'\n\n  port=1\n[gateway]\nretries_max = 0\n"
    origins = configure(tmp_path, text, {"FLEETMIND_NODE_STOP_GRACE_S": "1"}, fleet__starts_max="3").origins
    assert origins["server.port"].where == f"{tmp_path}/fleetmind.toml:5"
    assert origins["gateway.retries_max"].where == f"{tmp_path}/fleetmind.toml:7"
    assert origins["node.stop_grace_s"].where == "FLEETMIND_NODE_STOP_GRACE_S"
    assert origins["fleet.starts_max"].where == "--set fleet.starts_max"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("[server]\nbody_bytes_max = '16MiB'", "server.body_bytes_max", 16 * 1024**2),
        ("[server]\nbody_bytes_max = 1_000_000", "server.body_bytes_max", 1_000_000),
        ("[models]\ncontext_tokens = '8k'", "models.context_tokens", 8192),
        ("[node]\nstart_s_max = 5", "node.start_s_max", 5.0),
        ("[models]\npreload = []", "models.preload", ()),
        ("server.origins_allowed = ['https://a', 'https://b']", "server.origins_allowed", ("https://a", "https://b")),
        ("[models]\nfetch_packaged = false", "models.fetch_packaged", False),
    ],
)
def test_values_of_the_file_have_toml_types_and_units(tmp_path: Path, text: str, name: str, value: object) -> None:
    found = configure(tmp_path, text).value(name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("variable", "given", "name", "value"),
    [
        ("FLEETMIND_MODELS_PRELOAD", " a, b ,,c", "models.preload", ("a", "b", "c")),
        ("FLEETMIND_MODELS_PRELOAD", "", "models.preload", ()),
        ("FLEETMIND_MODELS_FETCH_PACKAGED", "No", "models.fetch_packaged", False),
        ("FLEETMIND_FLEET_RESERVE_BYTES", "1.5 GiB", "fleet.reserve_bytes", 1610612736),
        ("FLEETMIND_NODE_LLAMA_SERVER", "/opt/llama-server", "node.llama_server", "/opt/llama-server"),
        ("FLEETMIND_GATEWAY_USAGE_FLUSH_S", "0.25", "gateway.usage_flush_s", 0.25),
    ],
)
def test_words_of_the_environment_become_values(
    tmp_path: Path, variable: str, given: str, name: str, value: object
) -> None:
    assert configure(tmp_path, environ={variable: given}).value(name) == value


@pytest.mark.parametrize(
    ("text", "environ", "flags", "near"),
    [
        ("[server]\nprot = 1", {}, {}, "server.port"),
        ("[servr]\nport = 1", {}, {}, "server"),
        ("[node]\nrestarts_max = 1", {}, {}, "fleet.restarts_max"),
        ("", {"FLEETMIND_SERVER_PROT": "1"}, {}, "FLEETMIND_SERVER_PORT"),
        ("", {"FLEETMIND_HOMR": "/x"}, {}, "FLEETMIND_HOME"),
        ("", {}, {"gateway.queue_call_max": "1"}, "gateway.queue_calls_max"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    tmp_path: Path, text: str, environ: dict[str, str], flags: dict[str, str], near: str
) -> None:
    error = refusal(tmp_path, text, environ, **{name.replace(".", "__"): value for name, value in flags.items()})
    assert error.hint == f"Did you mean {near}?"
    assert error.code == "invalid_configuration"


def test_a_name_like_no_other_is_refused_with_where_to_look(tmp_path: Path) -> None:
    assert "config show" in refusal(tmp_path, environ={"FLEETMIND_XYZZY": "1"}).hint


@pytest.mark.parametrize(
    ("name", "given", "accepted"),
    [
        ("server.port", "65536", "a whole number from 0 to 65535"),
        ("server.port", "-1", "a whole number from 0 to 65535"),
        ("server.port", "80.0", "a whole number"),
        ("server.port", "", "a whole number"),
        ("server.port", "٣", "a whole number"),
        ("server.port", "9" * 5000, "a whole number"),
        ("server.body_bytes_max", "lots", "a size from 1024"),
        ("models.context_tokens", "0", "a whole number from 64"),
        ("node.start_s_max", "0", "a number above 0"),
        ("node.start_s_max", "nan", "a number above 0"),
        ("node.start_s_max", "inf", "a number above 0"),
        ("models.fetch_packaged", "perhaps", "true or false"),
        ("logs.level", "loud", "debug or info or warning or error"),
        ("server.host", "", "text that isn't empty"),
        ("telemetry.otlp_endpoint", "localhost:4318", "an http(s) address"),
        ("store.url", "mysql://x", "postgresql://"),
    ],
)
def test_a_malformed_value_is_refused_with_name_value_origin_and_what_is_accepted(
    tmp_path: Path, name: str, given: str, accepted: str
) -> None:
    error = refusal(tmp_path, **{name.replace(".", "__"): given})
    assert error.param == name
    assert error.message.startswith(f"{name} can't be ")
    assert f"--set {name}" in error.message
    assert accepted in error.message
    assert len(error.message) < 600


@pytest.mark.parametrize(
    "text",
    [
        "[server]\nport = '9200'",
        "[server]\nport = true",
        "[server]\nport = 9200.0",
        "[server]\nhost = 1",
        "[models]\npreload = 'a'",
        "[models]\npreload = [1]",
        "[models]\nfetch_packaged = 1",
        "[node]\nstart_s_max = 1979-05-27",
    ],
)
def test_a_value_of_the_wrong_type_in_the_file_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    assert f"{tmp_path}/fleetmind.toml:2" in refusal(tmp_path, text).message


def test_a_malformed_value_is_refused_even_where_a_stronger_source_overrides_it(tmp_path: Path) -> None:
    assert "fleetmind.toml:2" in refusal(tmp_path, "[server]\nport = -1", server__port="1").message


@pytest.mark.parametrize("text", ["[server", "port = ", "server = 3", "x = 1\nx = 2"])
def test_a_file_that_is_not_toml_or_not_our_tree_is_refused(tmp_path: Path, text: str) -> None:
    assert "fleetmind.toml" in refusal(tmp_path, text).message or "unknown" in refusal(tmp_path, text).message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fleetmind.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load(tmp_path, environ={}, flags={})
    (tmp_path / "fleetmind.toml").write_text("[" * 100_000)
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load(tmp_path, environ={}, flags={})
    (tmp_path / "fleetmind.toml").write_bytes(b"#" * (1024**2 + 1))
    with pytest.raises(ConfigurationError, match="larger than"):
        load(tmp_path, environ={}, flags={})
    (tmp_path / "fleetmind.toml").unlink()
    (tmp_path / "fleetmind.toml").mkdir()
    with pytest.raises(ConfigurationError, match="can't be read"):
        load(tmp_path, environ={}, flags={})


def test_values_that_belong_together_are_checked_together(tmp_path: Path) -> None:
    assert "server.tls_key" in refusal(tmp_path, server__tls_certificate="/c.pem").hint
    assert "server.tls_certificate" in refusal(tmp_path, server__tls_key="/k.pem").hint
    assert refusal(tmp_path, fleet__restart_backoff_s="60").param == "fleet.restart_backoff_s"


def test_no_password_is_shown_or_refused_aloud(tmp_path: Path) -> None:
    configuration = configure(tmp_path, store__url="postgresql://me:hunter2@host/db")
    assert configuration.settings.store.url == "postgresql://me:hunter2@host/db"
    shown = {row["name"]: row["value"] for row in configuration.show()}
    assert shown["store.url"] == "postgresql://me:***@host/db"
    error = refusal(tmp_path, store__url="postgres:me:hunter2@host")
    assert "hunter2" not in error.message + error.hint
    assert error.__cause__ is None


@given(st.text(st.characters(exclude_categories=("Z", "C"), exclude_characters="\"'"), min_size=8))
def test_mask_hides_any_password(password: str) -> None:
    text = f"postgresql://me:{password}@host:5432/db"
    assert mask(text) == "postgresql://me:***@host:5432/db"


def test_every_leaf_is_described_and_every_variable_is_its_own() -> None:
    assert len({leaf.variable for leaf in leaves()}) == len(leaves())
    for leaf in leaves():
        assert leaf.help.endswith("."), leaf.name
        assert leaf.accepts, leaf.name
        assert leaf.type, leaf.name
    # Times and sizes say so in name and unit, so that nobody reads seconds as milliseconds.
    for leaf in leaves():
        key = leaf.name.partition(".")[2].split("_")
        assert ("s" in key) == (leaf.unit == "seconds"), leaf.name
        assert ("bytes" in key) == (leaf.unit == "bytes"), leaf.name


def test_the_example_names_every_leaf_and_is_toml() -> None:
    text = example()
    assert tomllib.loads(text) == {name: {} for name in Settings.model_fields}
    active = tomllib.loads(re.sub(r"(?m)^# ([a-z_]+ = )", r"\1", text))
    assert {f"{section}.{key}" for section, table in active.items() for key in table} == {
        leaf.name for leaf in leaves()
    }


def test_home_is_where_the_variable_says_or_in_the_user_s_home() -> None:
    assert home_from({"HOME": "/h"}) == Path("/h/.local/share/fleetmind")
    assert home_from({"HOME": "/h", "FLEETMIND_HOME": "/data"}) == Path("/data")
    assert home_from({"HOME": "/h", "FLEETMIND_HOME": "~/x"}) == Path("/h/x")
    assert home_from({"HOME": "/h", "FLEETMIND_HOME": ""}) == Path("/h/.local/share/fleetmind")
    assert home_from({"FLEETMIND_HOME": "relative"}) == Path.cwd() / "relative"
