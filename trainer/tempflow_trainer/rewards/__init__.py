"""Scorers of images; one file per kind of reward."""
