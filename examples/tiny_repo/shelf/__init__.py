"""Keeps track of what lies on which shelf."""
