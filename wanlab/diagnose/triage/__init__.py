"""Triage: which change to make first, from a decision tree over the measurements of saved runs."""
