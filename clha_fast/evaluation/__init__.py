"""Answers and models measured: a file a metric, intervals over prompts, comparisons, and tables of runs."""
