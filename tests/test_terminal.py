"""How a command ends when something outside of it is in its way."""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path

import httpx
import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from flows import terminal
from flows.cli import app
from tasks.core import hardware
from tasks.core.display import Display
from tasks.core.settings import check_home, load_settings

pytestmark = pytest.mark.fast


def unreachable() -> RuntimeError:
    """As Prefect's client says it."""
    error = RuntimeError("Failed to reach API at http://127.0.0.1:9/api/")
    error.__cause__ = httpx.ConnectError("All connection attempts failed")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/store/x"), "Error: Read-only file system: /store/x. Free space or mend"),
        (OSError(errno.EIO, "Input/output error", "/store/x"), "Error: Input/output error: /store/x. See whether the disk is sound"),
        (OSError(errno.EPERM, "Not permitted", "/store/x"), "Error: Not permitted: /store/x. Free space or mend the permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "Error: File name too long: /x. Correct the path"),
        (MlflowException("API request failed\nwith a long story"), "Error: MLflow does not do what was asked (API request failed)"),
        (httpx.ConnectError("All connection attempts failed"), "Error: Prefect's API does not do what was asked (All connection"),
        (unreachable(), "Error: Prefect's API does not do what was asked (All connection"),
    ],
)
def test_a_server_or_disk_that_is_gone_is_one_message(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, terminal.one_message(load_settings()):
        raise error
    message = capsys.readouterr().err
    assert "traceback" not in message or type(error).__name__ in (load_settings().home / "logs" / "error.log").read_text()
    assert end.value.code == 2 and message.startswith(said) and "same command again" in message and len(message.splitlines()) == 1


def test_a_full_disk_is_named_whatever_the_error_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    monkeypatch.setattr(hardware, "FULL", 10**18)  # more than is free here
    with pytest.raises(SystemExit), terminal.one_message(load_settings()):
        raise MlflowException("database or disk is full")
    assert capsys.readouterr().err.startswith(f"Error: the disk is full: {home}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "is no folder"),
        ("file/home", "is below .*/file, which is no folder"),
        ("file/in/home", "is below .*/file, which is no folder"),
        ("link", "is no folder"),
        ("x" * 300, r"cannot be used \(File name too long\)"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [pytest.param(["ablate", "deployments/ablations/quick.yaml"], marks=pytest.mark.slow), ["promote"], ["rollback"], ["up"], ["down"]],
)
def test_a_home_that_cannot_be_one_is_one_message(
    command: list[str], name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("CARTWRIGHT_HOME", str(tmp_path / name))
    with pytest.raises(SystemExit) as end, terminal.one_message(load_settings()):
        app(command)
    told = capsys.readouterr()
    assert end.value.code == 2 and not told.out and len(told.err.splitlines()) == 1
    assert re.match(f"Error: CARTWRIGHT_HOME = '{tmp_path}/{name}': {problem}. Set it to a folder", told.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_home_that_is_there_or_can_be_made_is_accepted_and_not_made(home: Path) -> None:
    check_home(load_settings())
    assert not home.exists()
    home.mkdir()
    check_home(load_settings())


def test_an_error_of_ours_stays_one() -> None:
    with pytest.raises(KeyError), terminal.one_message(load_settings()):
        raise KeyError("a defect")


@pytest.mark.parametrize("terminal", [False, True])
def test_text_of_others_is_shown_as_it_is(terminal: bool) -> None:
    written = io.StringIO()
    display = Display(Console(file=written, force_terminal=terminal, width=200))
    display.say("[/x] has [free] and \x1b]0;title\x07, 5\u00a0kg")
    display.start("evaluate [/s]\x1b[2J")
    display.event({"done": 1, "total": 2, "note": "[/note]\x1b[2J"})
    display.finish("evaluate [/s]", "failed", 1.0, "no template: [/INST]")
    text = written.getvalue()
    assert "\x1b[2J" not in text
    assert "[/x] has [free] and �]0;title�, 5\u00a0kg" in text and "evaluate [/s]" in text and "no template: [/INST]" in text
