"""The menu-bar app: a model, an endpoint and GLASS behind one icon.

``settings``, ``state`` and ``menu`` are pure; ``controller``, ``server_control`` and ``jobs`` do the work; ``app`` and
``window`` show it with Toga; ``macos`` and ``login`` are for the Mac only.
"""
