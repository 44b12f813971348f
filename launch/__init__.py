"""Launching: a recipe and a cluster profile become a submitit job. No torch is imported here."""
