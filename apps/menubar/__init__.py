"""The menu-bar app: a model, an endpoint and GLASS behind one icon.

``settings``, ``state`` and ``menu`` are pure, ``controller`` and ``jobs`` do the work, ``app`` and ``window`` show it
with Toga, and ``macos`` has all that only a Mac has.
"""
