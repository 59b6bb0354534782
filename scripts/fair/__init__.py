"""The fair table: suites of equal trainings, their records and their page (`scripts/fair_table.py`)."""
