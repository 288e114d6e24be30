"""Smalt inside other software."""
