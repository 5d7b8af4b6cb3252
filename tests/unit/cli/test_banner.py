"""What a start says can be used as it is."""

import json
import shlex
from typing import Any

from fleetmind.cli.banner import banner, curl


def started(**changed: object) -> dict[str, Any]:
    return {
        "version": "1.2.3", "url": "http://127.0.0.1:9200", "pid": 7, "key": None, "token_file": "/my home/run/token",
        "certificate": None, "devices": ["A card, 24.0 GiB (simulated)"], "models": ["a: loading", "b: ready"],
        "preload": ["p"], "ready_s": 1.25, "notes": [], **changed,
    }  # fmt: skip


def test_the_first_start_shows_the_key_and_a_page_link_that_carries_it_in_the_fragment() -> None:
    text = banner(started(key="fm_a_b_c"))
    assert "http://127.0.0.1:9200/#key=fm_a_b_c" in text
    assert "Bearer fm_a_b_c" in text
    assert "shown this once" in text
    assert "run/token" not in text


def test_later_starts_show_no_key_and_read_the_token_of_this_start() -> None:
    text = banner(started())
    assert "fm_" not in text
    assert "Bearer $(cat '/my home/run/token')" in text


def test_the_curl_line_is_one_command_with_a_body_that_names_a_ready_model() -> None:
    words = shlex.split(" ".join(line.removesuffix("\\") for line in curl(started())))
    assert words[0] == "curl"
    assert "http://127.0.0.1:9200/v1/chat/completions" in words
    assert json.loads(words[words.index("-d") + 1])["model"] == "b"


def test_with_tls_curl_trusts_the_servers_certificate() -> None:
    assert "--cacert /etc/tls.pem" in curl(started(certificate="/etc/tls.pem"))[0]


def test_notes_devices_and_how_to_stop_are_told() -> None:
    text = banner(started(notes=["the context was cut", "and more"]), is_detached=True)
    assert all(word in text for word in ("(simulated)", "the context was cut", "and more", "fleetmind down"))
    assert "Ctrl-C" in banner(started())
    assert "fleetmind models add" in banner(started(models=[], preload=[]))
