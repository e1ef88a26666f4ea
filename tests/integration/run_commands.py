"""Runs example commands one after the other in this interpreter: `python run_commands.py COMMANDS.json`.

Imports cost more than a tiny model's steps; one interpreter pays them once. Each command is a list: script, arguments.
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run all; the first that fails ends it, with its name."""
    for script, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        print(f"$ {Path(script).name} {' '.join(arguments)}", file=sys.stderr, flush=True)
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise


if __name__ == "__main__":
    main()
