"""The fixed upstream's answers are what the load generator looks for."""

import json
from pathlib import Path

from bench import upstream


def test_the_whole_answer_holds_what_is_looked_for() -> None:
    assert all(text in upstream.whole_answer() for text in upstream.WHOLE_TEXTS)
    assert json.loads(upstream.whole_answer())["usage"] == upstream.USAGE


def test_the_streamed_answer_is_the_whole_one_in_pieces() -> None:
    *events, done = upstream.streamed_answer()
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == upstream.SENTENCE
    assert chunks[-1]["usage"] == upstream.USAGE
    assert done == "data: [DONE]\n\n"
    assert all(wanted in "".join(upstream.streamed_answer()) for wanted in upstream.STREAM_TEXTS)


def test_no_word_of_the_configuration_is_longer_than_the_server_takes() -> None:
    assert max(len(event) for event in upstream.streamed_answer()) < 4000
    assert len(upstream.whole_answer()) < 4000
    assert "'" not in "".join(upstream.streamed_answer()) + upstream.whole_answer()


def test_everything_the_upstream_writes_stays_in_its_folder() -> None:
    lines = upstream.configuration(8080, Path("/given/folder")).splitlines()
    written = [line for line in lines if line.strip().startswith(("pid ", "error_log ")) or "_temp_path " in line]
    assert len(written) == 7
    assert all("/given/folder/" in line for line in written)
