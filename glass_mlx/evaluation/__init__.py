"""How well and how fast: fidelity, exact answers, speed, conformance to Metal, plots."""
