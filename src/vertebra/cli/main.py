"""The command: one thin file a verb, found by looking into this folder.

A verb's module holds `command`, a click command named after it, and imports nothing heavy at its top, so
that `vertebra --help` answers without torch.
"""

import importlib
import json
import sys
from pathlib import Path

import click

from vertebra.errors import VertebraError, near


class Verbs(click.Group):
    """The verbs, one module each beside this file."""

    def list_commands(self, context: click.Context) -> list[str]:
        files = Path(__file__).parent.glob("*.py")
        return sorted(f.stem for f in files if not f.stem.startswith("_") and f.stem not in ("main", "options"))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(context):
            return None
        return importlib.import_module(f"vertebra.cli.{name}").command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verbs = self.list_commands(context)
        if args and not args[0].startswith("-") and args[0] not in verbs:
            context.fail(f"no verb is called {args[0]!r}{near(args[0], verbs)}; verbs: {', '.join(verbs)}")
        return super().resolve_command(context, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vertebra", prog_name="vertebra")
def vertebra() -> None:
    """Choose, train and ship vision backbones.

    Start with `vertebra battle FOLDER`: which backbone should I use for these images?
    """


def main(args: list[str] | None = None) -> None:
    """Run the command and leave with the exit code that `vertebra.errors` documents."""
    words = sys.argv[1:] if args is None else args
    try:
        code = vertebra(args=words, prog_name="vertebra", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except VertebraError as error:
        if "--json" in words:
            click.echo(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        click.echo(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
        sys.exit(1)
