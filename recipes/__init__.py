"""Shipped recipes; installed as ``mambatrain._recipes``."""
