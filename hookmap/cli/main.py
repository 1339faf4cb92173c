"""The entry point of the command line: finds the commands, and turns errors into messages and exit codes.

0 done, 1 failed, 2 wrong usage, 130 interrupted. Output for programs goes to stdout, output for people to stderr.
"""

import os
import pkgutil
import re
import shlex
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import click

from hookmap import HookmapError, __version__
from hookmap.cli import commands
from hookmap.cli.options import Folder, in_ascii
from hookmap.wording import did_you_mean, sentence

_PATHS = {"FILE", "FILE.pt", "DIR", "MODEL", "MAP", "MAP|MODEL", "STORE", "FROM", "TO"}
"""names in the help of arguments and options that may be paths"""


class _Commands(click.Group):
    """Each file of `hookmap/cli/commands` is a command; there is no other list of them."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        _write_anything()
        if os.environ.get("NO_COLOR"):  # rich looks at it, click does not
            extra["color"] = False
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}").command
        if not any(option.name == "debug" for option in command.params):
            command.params.append(_debug_option())
        _check_texts(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = did_you_mean(args[0], self.list_commands(ctx), n=2)
            raise click.UsageError(error.message + sentence(hint), ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        _quiet_libraries()
        try:
            return super().invoke(ctx)
        except HookmapError as error:
            _fail(ctx, str(error), error)
        except click.UsageError as error:
            if (told := _one_too_many(error)) is None:
                raise
            raise click.UsageError(told, error.ctx) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click knows what to do with its own, and ends quietly where nobody reads stdout any more
        except ModuleNotFoundError as error:
            if (error.name or "hookmap").partition(".")[0] == "hookmap":
                raise
            told = f"{ctx.invoked_subcommand} needs {error.name}, which is not installed here."
            _fail(ctx, f"{told} Install all that hookmap needs: pip install hookmap", error)
        except PermissionError as error:
            _fail(ctx, f"no permission: {error.filename or error}", error)
        except Exception as error:
            text = (
                f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
            )
            hint = "This is not an error that hookmap foresaw; add --debug to see the traceback."
            _fail(ctx, f"{type(error).__name__}: {text}\n{hint}", error)


def _check_texts(command: click.Command) -> None:
    """Refuse files where folders belong and digits that are not ASCII; let shells complete paths.

    Whether a path is there is not checked here: a MODEL may be a hub id.
    """
    for param in command.params:
        name = (param.metavar or param.human_readable_name).strip("[].")
        if name == "DIR" and isinstance(param.type, click.Path | click.types.StringParamType):
            param.type = Folder(readable=False)
        elif param.type is click.STRING and name in _PATHS:
            param.type = click.Path(readable=False)
        elif isinstance(param.type, click.types.IntParamType | click.types.FloatParamType):
            param.type = in_ascii(param.type)
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _check_texts(below)


def _one_too_many(error: click.UsageError) -> str | None:
    """What to write where an argument is one too many, which click calls unexpected; None of other errors."""
    match = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message, re.DOTALL)
    if match is None or error.ctx is None:
        return None
    command, name = error.ctx.command, error.ctx.command_path
    takes = " ".join(each.make_metavar(error.ctx) for each in command.params if isinstance(each, click.Argument))
    options = {option for each in command.params if isinstance(each, click.Option) for option in each.opts}
    asked = {"--prompt": "A prompt", "--clean": "The prompt", "--prompts": "A file of prompts"}
    option = next((option for option in asked if option in options), None)
    instead = (
        f"{asked[option]} is an option: {name} {takes} {option} {shlex.quote(match[1])}"
        if option and takes
        else f"For what it takes: {name} --help"
    )
    return f"{match[1]!r} is one argument too many: {name} takes {takes or 'options alone'}. {instead}"


def _fail(ctx: click.Context, message: str, error: Exception) -> None:
    if ctx.meta.get("hookmap.debug"):
        raise error
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    ctx.exit(1)


def _write_anything() -> None:
    """Tables and JSON are not all ASCII: write UTF-8 to files and pipes, and `?` for what a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            if stream.isatty() or "PYTHONIOENCODING" in os.environ:
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # half a surrogate pair, which no UTF-8 holds


def _quiet_libraries() -> None:
    """Silence transformers' and huggingface_hub's advice for their own users, unless these variables are set."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar in a log file is a thousand lines


def _debug_option() -> click.Option:
    def keep(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta["hookmap.debug"] = True  # meta is shared with the parent context, where errors are caught

    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=keep, help="Show the traceback of an error."
    )


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command(cls=_Commands, params=[_debug_option()], context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="hookmap")
def main() -> None:
    """Name a tensor once and read it from any Hugging Face causal language model.

    MODEL is a hub id or a model folder (for show also a map). It may be left out: then it is what the environment
    variable HOOKMAP_MODEL or the file hookmap.yaml names, or else the bundled demo model.

    \b
    hookmap discover Qwen/Qwen3-0.6B -o map.json
    hookmap capture Qwen/Qwen3-0.6B --points resid_pre,resid_mid --layers 8,12,16 --prompt "Hello" -o run
    hookmap inspect run
    """
