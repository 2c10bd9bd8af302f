"""Distillation: a frozen teacher, run once per batch, and the students that follow it, on one rank or on groups."""
