"""Drivers of decoding: token streams, verified decoding, sampling, conversations, and what each step costs."""
