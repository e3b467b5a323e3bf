"""Replies of models under several sampling settings, kept as Open-Assistant's sampling reports."""
