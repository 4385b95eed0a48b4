"""Start the app.

python -m apps.menubar            the icon in the menu bar
python -m apps.menubar --window   and its window
python -m apps.menubar --serve …  the server without the app, with the options of glass_mlx.server
"""

from __future__ import annotations

import os
import sys

# Downloads by HTTP can be cancelled, those by Xet cannot. This must precede any import of huggingface_hub.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


def main() -> None:
    """Start the app, or the server. A packaged app is also its own ``sys.executable``, so arguments come first."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--serve"]:
        from glass_mlx import server

        sys.argv[1:] = arguments[1:]
        return server.main()
    if "-h" in arguments or "--help" in arguments:
        return print(__doc__)
    try:
        from toga.platform import get_backend

        backend = get_backend()
    except (ModuleNotFoundError, RuntimeError) as e:
        if isinstance(e, ModuleNotFoundError) and e.name != "toga":
            raise
        backend = None
    if backend is None or (backend == "toga_dummy" and "TOGA_BACKEND" not in os.environ):  # a backend without windows
        sys.exit("error: the app needs toga: pip install 'glass_mlx[app]'")
    run("--window" in arguments)


def run(window: bool) -> None:
    """Run the app until it is quit."""
    from glass_mlx.serving.logs import log_to_file

    from .app import GlassApp
    from .controller import Controller
    from .instance import Instance

    instance = Instance()
    if not instance.is_first:
        instance.call_first()
        return print("GLASS runs already: its window is shown.")
    log = log_to_file("menubar.log")
    controller = Controller()
    if log is None:
        controller.notify("The log file cannot be written, so there is no log. Is the disk full?")
    GlassApp(controller, log, window, instance.is_called).main_loop()
    controller.close()
    instance.close()


if __name__ == "__main__":
    main()
