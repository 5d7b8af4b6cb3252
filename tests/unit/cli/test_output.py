"""Results go to standard output, narration to standard error."""

import io
import json

from rich.table import Table

from fleetmind.cli.output import Output
from fleetmind.core.errors import Conflict


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def output(
    *, is_json: bool = False, out: io.StringIO | None = None, **environ: str
) -> tuple[Output, io.StringIO, io.StringIO]:
    out, err = out or io.StringIO(), io.StringIO()
    return Output(is_json=is_json, out=out, err=err, environ=environ), out, err


def coloured() -> Table:
    table = Table("Name")
    table.add_row("[red]brackets are text[/red]")
    table.columns[0].style = "green"
    return table


def test_json_is_one_line_on_standard_output_and_nothing_is_narrated() -> None:
    made, out, err = output(is_json=True)
    made.say("hello")
    with made.waiting("loading") as tell:
        tell("still loading")
    made.result({"ä": 1}, lambda: "never drawn")
    assert json.loads(out.getvalue()) == {"ä": 1}
    assert out.getvalue().count("\n") == 1
    assert err.getvalue() == ""


def test_a_person_gets_the_view_on_standard_output_and_narration_on_standard_error() -> None:
    made, out, err = output()
    made.say("hello")
    made.result({"a": 1}, lambda: "drawn")
    assert (out.getvalue(), err.getvalue()) == ("drawn\n", "hello\n")


def test_names_with_brackets_are_shown_as_they_are() -> None:
    made, out, _ = output()
    made.result({}, coloured)
    assert "[red]brackets are text[/red]" in out.getvalue()


def test_a_pipe_gets_no_colour_and_no_cut_line() -> None:
    made, out, _ = output()
    made.result({}, lambda: "word " * 40)
    made.result({}, coloured)
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().splitlines()[0].strip() == ("word " * 40).strip()


def test_a_terminal_gets_colour_unless_no_color_is_set() -> None:
    made, out, _ = output(out=Terminal(), TERM="xterm-256color")
    made.result({}, coloured)
    assert "\x1b[32m" in out.getvalue()
    made, out, _ = output(out=Terminal(), TERM="xterm-256color", NO_COLOR="1")
    made.result({}, coloured)
    assert "\x1b[32m" not in out.getvalue()


def test_waiting_without_a_terminal_says_each_change_once() -> None:
    made, _, err = output()
    with made.waiting("loading") as tell:
        tell("loading")
        tell("almost")
    assert err.getvalue() == "loading\nalmost\n"


def test_a_failure_is_json_on_standard_error_for_programs() -> None:
    made, out, err = output(is_json=True)
    made.fail(Conflict("taken", hint="choose another"))
    assert json.loads(err.getvalue())["error"]["code"] == "conflict"
    assert out.getvalue() == ""
