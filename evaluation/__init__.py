"""Scores: one file per evaluator, all with the contract of `evaluation.evaluator.Evaluator`."""
