"""Evaluation of networks with several exits."""
