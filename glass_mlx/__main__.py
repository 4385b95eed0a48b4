"""``python -m glass_mlx COMMAND``: the commands by name, as mlx-lm has them."""

import importlib
import sys

COMMANDS = {
    "chat": "chat with a model in the terminal",
    "generate": "answer one prompt, or continue a text",
    "server": "serve an OpenAI-compatible API and a chat page",
    "models": "list, download and remove models",
    "stats": "measure, check, compare and share a model's global ranks",
    "doctor": "check that everything works on this machine",
    "evaluate": "measure how far sparse decoding is from the dense model",
    "benchmark": "measure speed and memory against plain mlx-lm",
    "tradeoff": "compare the speed and fidelity of all ways to decode",
    "families": "list the model families that are covered",
}
USAGE = "usage: glass_mlx COMMAND [options]; glass_mlx --help lists the commands"


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(
            "usage: glass_mlx COMMAND [options]\n",
            *(f"  {name:10} {does}" for name, does in COMMANDS.items()),
            sep="\n",
        )
        print("\nglass_mlx COMMAND --help says more about each.")
    elif command == "--version":
        from ._version import __version__

        print(f"glass_mlx {__version__}")
    elif command not in COMMANDS:
        from .hub.names import near_miss

        close = near_miss(command, COMMANDS)
        print(f"{USAGE}\nglass_mlx: error: no command {command!r}{close and f'; {close}'}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"glass_mlx {command}", *sys.argv[2:]]
        importlib.import_module(f"glass_mlx.{command}").main()


if __name__ == "__main__":
    main()
