"""``python -m glass_mlx COMMAND``: the commands by name, as mlx-lm has them."""

import importlib
import sys

COMMANDS = ("chat", "generate", "server", "stats", "evaluate", "benchmark", "tradeoff", "families", "doctor")


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        usage = f"usage: glass_mlx {{{','.join(COMMANDS)}}} ..."
        if command in ("-h", "--help"):
            print(usage)
            return
        print(f"{usage}\nglass_mlx: error: no command {command!r}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"glass_mlx {command}", *sys.argv[2:]]
    importlib.import_module(f"glass_mlx.{command}").main()


if __name__ == "__main__":
    main()
