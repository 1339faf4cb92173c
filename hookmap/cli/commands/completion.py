"""`hookmap completion`: what a shell needs to complete commands, options and their choices."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    eval "$(hookmap completion bash)"                                         in ~/.bashrc
    eval "$(hookmap completion zsh)"                                          in ~/.zshrc
    hookmap completion fish > ~/.config/fish/completions/hookmap.fish         once
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows the three shells above
    click.echo(made(ctx.find_root().command, {}, "hookmap", "_HOOKMAP_COMPLETE").source())
